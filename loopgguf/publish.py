"""From a plan to a published file: metadata, layout, encode, flush, verify, rename. The only place that publishes a model."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from loopgguf.architectures import tensor_role
from loopgguf.calibration import Chunks
from loopgguf.container import Layout, Metadata, PartFile, Value, ValueType, plan_layout, refuse_existing, shard_path, string, uint32
from loopgguf.errors import OutputError, UsageError
from loopgguf.feedback import MIN_TOKENS_PER_COLUMN, Compensate, Feedback, describe_feedback, run_feedback, stored_feedback
from loopgguf.formats import QUANTIZED_TYPES
from loopgguf.importance import ImatrixRequest, Importance, calibration_chunks
from loopgguf.opening import Settings, refuse_same_file
from loopgguf.pipeline import Job, KeptWeight, TensorLog, WriteResult, execute
from loopgguf.planner import OUTPUT, Plan, PlanRow
from loopgguf.protection import Protection, flat_row
from loopgguf.report import names_text
from loopgguf.source import Source, Tensor
from loopgguf.splits import tokens_sha256
from loopgguf.verify import decode_row, speak, verify_file
from loopgguf.version import __version__

SPEAKING_PROMPT = "Once upon a time"


@dataclass(frozen=True)
class Reuse:
    """Tensors of a file that was written before from the same source, encoded as they are planned again, and the logs of that file."""

    tensors: Mapping[str, Tensor]
    logs: Mapping[str, TensorLog]


@dataclass(frozen=True)
class Order:
    """What is to be written: a plan, what its encoders are told, and how the output is cut."""

    plan: Plan
    importance: Importance | None = None
    imatrix: Path | None = None  # the file that was given, beside which Gram matrices may lie
    compensate: Compensate = Compensate.OFF
    calibration: ImatrixRequest = field(default_factory=ImatrixRequest)
    protection: Protection | None = None
    keep_split: bool = False
    selection: Chunks | None = None  # the text it must pass a gate on
    reuse: Reuse | None = None
    inputs: tuple[Path, ...] = ()  # files that the user gave besides the source, which the output must not replace


def _metadata(source: Source, order: Order) -> dict[str, Value]:
    """Return the source's metadata with what this file is and came from; names only, no paths."""
    plan, importance = order.plan, order.importance
    metadata = dict(source.metadata)
    metadata["general.quantization_version"] = uint32(2)
    metadata["general.file_type"] = uint32(plan.file_type)
    metadata["general.quantized_by"] = string("loopgguf")
    if importance is not None and any(row.uses_imatrix for row in plan.rows):
        metadata["quantize.imatrix.file"] = string(importance.origin.name)
        metadata["quantize.imatrix.dataset"] = string(", ".join(importance.origin.datasets))
        metadata["quantize.imatrix.entries_count"] = uint32(importance.origin.n_entries)
        metadata["quantize.imatrix.chunks_count"] = uint32(importance.origin.n_chunks)
    metadata["loopgguf.version"] = string(__version__)
    metadata["loopgguf.intent"] = string(plan.intent)
    metadata["loopgguf.plan_hash"] = string(plan.hash)
    if order.compensate is not Compensate.OFF:
        metadata["loopgguf.compensate"] = string(order.compensate)
    if order.selection is not None:
        metadata["loopgguf.selection.dataset"] = string(", ".join(order.selection.names))
        metadata["loopgguf.selection.sha256"] = string(tokens_sha256(order.selection.tokens))
    if order.protection is not None:
        metadata["loopgguf.super_weights"] = string("protected")
    return metadata


def lay_out(source: Source, order: Order, output: Path) -> list[tuple[Path, Layout]]:
    """Return each output file with its layout, exact to the byte: one, or one per shard of a split GGUF.

    Raises UsageError when shards are to be kept of a source that is not a split GGUF.
    """
    n_shards = 1 + max(tensor.shard for tensor in source.tensors) if order.keep_split else 1
    if order.keep_split and n_shards == 1:
        raise UsageError(f"--keep-split: {source.path} is no split GGUF: leave the option out")
    metadata, rows = _metadata(source, order), order.plan.rows
    if n_shards == 1:
        return [(output, _layout_of(metadata, rows))]
    shard_of = {tensor.name: tensor.shard for tensor in source.tensors}
    files = []
    for shard in range(n_shards):
        split: dict[str, Value] = {
            "split.no": Value(ValueType.UINT16, shard),
            "split.count": Value(ValueType.UINT16, n_shards),
            "split.tensors.count": Value(ValueType.INT32, len(rows)),
        }
        shard_metadata = {**metadata, **split} if shard == 0 else split
        files.append((shard_path(output, shard + 1, n_shards), _layout_of(shard_metadata, [row for row in rows if shard_of[row.name] == shard])))
    return files


def _layout_of(metadata: Metadata, rows: Sequence[PlanRow]) -> Layout:
    return plan_layout(metadata, [(row.name, row.type, row.shape) for row in rows])


def total_bytes(source: Source, order: Order) -> int:
    """Return the exact bytes of all files of an order."""
    return sum(layout.total_bytes for _, layout in lay_out(source, order, Path("model.gguf")))


def check_outputs(source: Source, paths: Sequence[Path], inputs: Sequence[Path], *, overwrite: bool) -> None:
    """Raise OutputError for an output that is one of the inputs, a folder, or exists and may not be overwritten."""
    for path in paths:
        refuse_same_file(path, (*source.files, *source.side_files, *inputs))
        refuse_existing(path, overwrite=overwrite)


def publish(source: Source, order: Order, output: Path, settings: Settings, notes: Sequence[str], *, dry_run: bool = False) -> WriteResult:
    """Write an order as `output` and return what came of it; a dry run stops at the layout.

    Raises OutputError for an output that exists, is an input, or cannot be written; errors of the encoders and QualityError as
    `pipeline.execute` and `verify`. Nothing stays behind when anything fails.
    """
    files = lay_out(source, order, output)
    paths, n_bytes = tuple(path for path, _ in files), sum(layout.total_bytes for _, layout in files)
    if dry_run:
        return WriteResult(order.plan, paths, n_bytes, {}, {}, "", tuple(notes), is_dry_run=True)
    check_outputs(source, paths, order.inputs, overwrite=settings.overwrite)
    written = _write(source, order, files, settings)
    notes = [*notes, *_describe_untried(order, written.logs)]
    return WriteResult(order.plan, paths, n_bytes, written.logs, written.seconds, written.sample_text, tuple(notes), super_weights=written.super_weights)


def _describe_untried(order: Order, logs: Mapping[str, TensorLog]) -> list[str]:
    """Say which quantized tensors error feedback was asked for and not tried on."""
    if order.compensate is Compensate.OFF:
        return []
    quantized = [row.name for row in order.plan.rows if row.is_encoded and row.type in QUANTIZED_TYPES]
    untried = [name for name in quantized if not logs[name].feedback]
    if not untried:
        return []
    why = f"no matrices of them, or of fewer than {MIN_TOKENS_PER_COLUMN} tokens a column"
    return [f"error feedback: not tried on {len(untried)} of {len(quantized)} quantized tensors ({names_text(untried)}): {why}"]


def _encode(source: Source, order: Order, parts: Sequence[tuple[PartFile, Layout]], settings: Settings) -> dict[str, TensorLog]:
    """Encode and write all tensors: at once, or with error feedback each layer as soon as its matrices are known."""
    tensors, rows = {tensor.name: tensor for tensor in source.tensors}, {row.name: row for row in order.plan.rows}
    left = {info.name: Job(tensors[info.name], rows[info.name], part, info) for part, layout in parts for info in layout.tensors}
    if order.protection is not None:
        left = {name: replace(job, pins=order.protection.pins(job.tensor)) if job.row.is_encoded else job for name, job in left.items()}
    is_tied = OUTPUT not in tensors
    effort = order.compensate.effort(source.n_weights)
    logs: dict[str, TensorLog] = {}

    def run(jobs: list[Job]) -> None:
        logs.update(
            execute(
                jobs,
                order.importance if order.importance is not None else lambda name: None,
                n_threads=settings.n_threads,
                max_buffer_bytes=settings.max_buffer_bytes,
                progress=settings.progress,
            )
        )

    def with_feedback(names: list[str], feedback: Feedback) -> None:
        run([replace(job, curvature=feedback.curvature(job.row, is_tied=is_tied), effort=effort) for job in map(left.pop, names)])

    def encode_layer(layer: int | None, feedback: Feedback) -> None:
        with_feedback([name for name in left if tensor_role(name).layer == layer], feedback)

    reused = {name: order.reuse.logs[name] for name in order.reuse.tensors} if order.reuse is not None else {}
    if order.reuse is not None:
        run([replace(left.pop(name), tensor=tensor) for name, tensor in order.reuse.tensors.items()])
    if order.compensate is not Compensate.OFF and left:
        stored = stored_feedback(order.imatrix)
        settings.announce(describe_feedback(source, order.compensate, stored))
        if stored is not None:
            with_feedback(list(left), stored)
        else:
            chunks = calibration_chunks(source, order.calibration, settings)
            run_feedback(
                source,
                chunks,
                encode_layer,
                n_threads=settings.n_threads,
                device=settings.device,
                max_memory_bytes=settings.max_memory_bytes,
                progress=settings.progress,
            )
    run(list(left.values()))
    return logs | reused


@dataclass(frozen=True)
class _Written:
    """What came of writing: the log of each tensor, the seconds of each phase, what the file said, and its super weights."""

    logs: Mapping[str, TensorLog]
    seconds: Mapping[str, float]
    sample_text: str
    super_weights: tuple[KeptWeight, ...] | None


def _write(source: Source, order: Order, files: Sequence[tuple[Path, Layout]], settings: Settings) -> _Written:
    """Encode, flush, verify and publish."""
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[phase] = time.perf_counter() - start

    with contextlib.ExitStack() as stack:
        parts = [(stack.enter_context(PartFile(path, layout.total_bytes, overwrite=settings.overwrite)), layout) for path, layout in files]
        with timed("encode and write"):
            for part, layout in parts:
                part.write_at(0, layout.header)
            logs = _encode(source, order, parts, settings)
        with timed("fsync"):
            for part, _ in parts:
                part.sync()
        with timed("verify"):
            sample_text = _verify(source, parts, logs, settings)
            kept = None if order.protection is None else _read_back(order.protection, source, {row.name: row for row in order.plan.rows}, parts)
        _publish_all([part for part, _ in parts])
    return _Written(logs, seconds, sample_text, kept)


def _read_back(protection: Protection, source: Source, rows: Mapping[str, PlanRow], parts: Sequence[tuple[PartFile, Layout]]) -> tuple[KeptWeight, ...]:
    """Return every super weight as the written file holds it."""
    places = {info.name: (part.path, info) for part, layout in parts for info in layout.tensors}
    tensors = {tensor.name: tensor for tensor in source.tensors}
    kept = []
    for weight in protection.found.weights:
        path, info = places[weight.name]
        row, column = flat_row(tensors[weight.name], weight.matrix, weight.spike.row), weight.spike.column
        now = rows[weight.name].type
        kept.append(KeptWeight(weight, now, protection.raised.get(weight.name, now), float(decode_row(path, info, row)[column])))
    return tuple(kept)


def _verify(source: Source, parts: Sequence[tuple[PartFile, Layout]], logs: Mapping[str, TensorLog], settings: Settings) -> str:
    """Check each part as a reader would, then load and run the whole under its final names; return what it said."""
    for part, layout in parts:
        verify_file(part.path, layout, source.tensors, logs, n_threads=settings.n_threads, progress=settings.progress)
    with tempfile.TemporaryDirectory(prefix="loopgguf-") as folder:  # llama.cpp finds the shards of a model by their names
        links = [Path(folder) / part.target.name for part, _ in parts]
        for link, (part, _) in zip(links, parts, strict=True):
            link.symlink_to(part.path.resolve())
        return speak(links[0], SPEAKING_PROMPT, n_threads=settings.n_threads)


def move_published(path: Path, target: Path) -> None:
    """Give a published file another name, on the same disk; a file of that name is replaced."""
    try:
        path.replace(target)
    except OSError as error:
        raise OutputError(f"cannot rename {path} to {target}: {error.strerror}. The finished model is kept as {path}") from error


def _publish_all(parts: Sequence[PartFile]) -> None:
    """Give all parts their names; where one fails, none keeps its name."""
    published: list[Path] = []
    try:
        for part in parts:
            part.publish()
            published.append(part.target)
    except BaseException:
        for path in published:
            path.unlink(missing_ok=True)
        raise
