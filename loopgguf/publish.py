"""From a plan to a published file: metadata, layout, encode, flush, verify, rename. The only place that publishes a model."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loopgguf.checkpoint import QUANTIZE, content_key, job_folder, open_stage
from loopgguf.container import Layout, Metadata, PartFile, Value, ValueType, part_path, plan_layout, refuse_existing, shard_path, string, uint32, write_file
from loopgguf.encode import Basis, Order, describe_untried, encode, encoding_fields, find_basis
from loopgguf.errors import InputError, OutputError, QualityError, UsageError
from loopgguf.feedback import Compensate, describe_feedback
from loopgguf.journal import Journal, Parts, take_back
from loopgguf.manifest import manifest_line, manifest_path, read_manifest
from loopgguf.opening import Settings, refuse_same_file
from loopgguf.pipeline import KeptWeight, TensorLog, WriteResult
from loopgguf.planner import PlanRow
from loopgguf.protection import Protection, flat_row
from loopgguf.source import Source, refuse_changed
from loopgguf.splits import tokens_sha256
from loopgguf.verify import decode_row, speak, verify_file
from loopgguf.version import __version__

SPEAKING_PROMPT = "Once upon a time"
SELECTION_NAMES_BYTES = 512  # half of `intent.GATE_BYTES`


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
        metadata["loopgguf.selection.dataset"] = string(_fitting(order.selection.names))
        metadata["loopgguf.selection.sha256"] = string(tokens_sha256(order.selection.tokens))
    if order.predicted_kld_nats is not None:
        metadata["loopgguf.selection.predicted_kld"] = string(f"{order.predicted_kld_nats.value:.4g} ± {order.predicted_kld_nats.standard_error or 0:.2g}")
    if order.protection is not None:
        metadata["loopgguf.super_weights"] = string("protected")
    return metadata


def _fitting(names: Sequence[str]) -> str:
    """Return as many names as fit into what a size keeps for them, and how many more there are."""
    n_fitting = sum(n_bytes <= SELECTION_NAMES_BYTES for n_bytes in itertools.accumulate(len(f"{name}, ".encode()) for name in names))
    return ", ".join([*names[:n_fitting], *([f"and {len(names) - n_fitting} more"] if n_fitting < len(names) else [])])


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
    """Raise OutputError for an output that exists and may not be overwritten, is a folder or one of the inputs, through links
    too; or whose part or manifest is."""
    for path in paths:
        for written in (path, part_path(path), manifest_path(path)):
            refuse_same_file(written, (*source.files, *source.side_files, *inputs))
        for named in (path, manifest_path(path)):
            refuse_existing(named, overwrite=overwrite)


def publish(source: Source, order: Order, output: Path, settings: Settings, notes: Sequence[str], *, dry_run: bool = False) -> WriteResult:
    """Write an order as `output` and return what came of it; a dry run stops at the layout.

    What is finished is kept in a job folder until then, with the part files, and the same order goes on from it. Raises
    OutputError for an output that exists, is an input, or cannot be written; UsageError when the job folder is of another
    order or in use, Interrupted when the user stops it; errors of the encoders and QualityError as `pipeline.execute` and
    `verify`, after which nothing stays behind.
    """
    files = lay_out(source, order, output)
    paths, n_bytes = tuple(path for path, _ in files), sum(layout.total_bytes for _, layout in files)
    if dry_run:
        return WriteResult(order.plan, paths, n_bytes, {}, {}, "", tuple(notes), is_dry_run=True)
    check_outputs(source, paths, order.inputs, overwrite=True)
    basis = find_basis(source, order, settings)
    if order.compensate is not Compensate.OFF:
        settings.announce(describe_feedback(source, order.compensate, basis.stored, is_sequential=basis.is_sequential))
    if basis.is_spared:
        settings.announce("error feedback: not in sequence, for which the disk would have to hold the matrices of all layers: --compensate-sequence does it")
    fingerprint = _fingerprint(source, order, files, basis, settings)
    with open_stage(settings.job_folder or job_folder(output), QUANTIZE, fingerprint, resume=settings.resume, keep=settings.keep_job) as job:
        state = job.load()
        if state is not None:
            take_back(state, paths)
        check_outputs(source, paths, order.inputs, overwrite=settings.overwrite)
        with contextlib.ExitStack() as stack:
            parts = [
                (stack.enter_context(PartFile(path, layout.total_bytes, overwrite=settings.overwrite, goes_on=state is not None)), layout)
                for path, layout in files
            ]
            journal = Journal(job, parts, state, n_threads=settings.n_threads)
            try:
                written = _write(source, order, basis, journal, settings)
            except (InputError, OutputError) as error:
                if not journal.n_saved:
                    raise
                raise type(error)(f"{error}. {journal.n_saved} finished tensors are kept in {job.folder.parent}: the same command goes on") from error
    notes = [*notes, *describe_untried(order, written.logs)]
    return WriteResult(order.plan, paths, n_bytes, written.logs, written.seconds, written.sample_text, tuple(notes), super_weights=written.super_weights)


def _fingerprint(source: Source, order: Order, files: Sequence[tuple[Path, Layout]], basis: Basis, settings: Settings) -> dict[str, object]:
    """Return what the bytes of the output depend on, by names that a user understands."""
    return {
        "output": [path.name for path, _ in files],
        "metadata": content_key(*(hashlib.sha256(layout.header).hexdigest() for _, layout in files)),
        **encoding_fields(source, order, basis, settings),
    }


@dataclass(frozen=True)
class _Written:
    """What came of writing: the log of each tensor, the seconds of each phase, what the file said, and its super weights."""

    logs: Mapping[str, TensorLog]
    seconds: Mapping[str, float]
    sample_text: str
    super_weights: tuple[KeptWeight, ...] | None


def _write(source: Source, order: Order, basis: Basis, journal: Journal, settings: Settings) -> _Written:
    """Encode, flush, verify and publish."""
    parts = journal.parts
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[phase] = time.perf_counter() - start

    try:
        with timed("encode and write"):
            for part, layout in parts:
                _write_frame(part, layout)
            encode(source, order, basis, journal, settings)
        with timed("fsync"):
            for part, _ in parts:
                part.sync()
        with timed("verify"):
            logs = {row.name: journal.logs[row.name] for row in order.plan.rows} | (order.reuse.kept_logs if order.reuse is not None else {})
            sample_text, digests = _verify(source, parts, logs, settings)
            kept = None if order.protection is None else _read_back(order.protection, source, {row.name: row for row in order.plan.rows}, parts)
        refuse_changed(source)
    except QualityError:
        journal.give_up()
        raise
    journal.verified(digests)
    _publish_all([part for part, _ in parts], digests, overwrite=settings.overwrite)
    journal.finish()
    return _Written(logs, seconds, sample_text, kept)


def _write_frame(part: PartFile, layout: Layout) -> None:
    """Write what is not a payload: the header, and the padding behind each payload."""
    part.write_at(0, layout.header)
    ends = [info.offset for info in layout.tensors[1:]] + [layout.total_bytes]
    for info, end in zip(layout.tensors, ends, strict=False):
        if padding := end - info.offset - info.n_bytes:
            part.write_at(info.offset + info.n_bytes, bytes(padding))


def _read_back(protection: Protection, source: Source, rows: Mapping[str, PlanRow], parts: Parts) -> tuple[KeptWeight, ...]:
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


def _verify(source: Source, parts: Parts, logs: Mapping[str, TensorLog], settings: Settings) -> tuple[str, dict[str, str]]:
    """Check each part as a reader would, then load and run the whole under its final names; return what it said, and the SHA-256
    of each part by its final name."""
    digests = {}
    for part, layout in parts:
        checked = verify_file(part.path, layout, source.tensors, logs, n_threads=settings.n_threads, progress=settings.progress)
        digests[part.target.name] = checked.sha256
    with tempfile.TemporaryDirectory(prefix="loopgguf-") as folder:  # llama.cpp finds the shards of a model by their names
        links = [Path(folder) / part.target.name for part, _ in parts]
        for link, (part, _) in zip(links, parts, strict=True):
            link.symlink_to(part.path.resolve())
        return speak(links[0], SPEAKING_PROMPT, n_threads=settings.n_threads), digests


def move_published(path: Path, target: Path) -> None:
    """Give a published file another name, on the same disk, and its manifest too; a file of that name is replaced."""
    digest = read_manifest(path)
    assert digest is not None, path
    try:
        manifest_path(target).unlink(missing_ok=True)  # there is none of another file at any time
        path.replace(target)
    except OSError as error:
        raise OutputError(f"cannot rename {path} to {target}: {error.strerror}. The finished model is kept as {path}") from error
    write_file(manifest_path(target), manifest_line(target, digest), overwrite=True)
    manifest_path(path).unlink(missing_ok=True)


def _publish_all(parts: Sequence[PartFile], digests: Mapping[str, str], *, overwrite: bool) -> None:
    """Give all parts their names, and each its manifest; where one fails, none keeps its name."""
    published: list[PartFile] = []
    with contextlib.ExitStack() as stack:
        manifests = []
        for part in parts:
            line = manifest_line(part.target, digests[part.target.name])
            manifest = stack.enter_context(PartFile(manifest_path(part.target), len(line), overwrite=overwrite))
            manifest.write_at(0, line)
            manifest.sync()
            manifests.append(manifest)
        try:
            for manifest in manifests:  # there is none of another file at any time
                manifest.target.unlink(missing_ok=True)
            for part in (*parts, *manifests):
                part.publish()
                published.append(part)
        except BaseException:
            for part in published:
                with contextlib.suppress(OSError):  # where nothing can be renamed any more, the next run takes it back
                    part.take_back()
            raise
