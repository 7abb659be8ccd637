"""The main line as code: source → statistics → plan → encode → verify → publish → evaluate. The only place that publishes.

Each public function is one command of the tool, without printing: progress goes through a callback, what a user should
know comes back in the result's `notes`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from loopgguf import __version__
from loopgguf.accumulators import EMBEDDING, split_holdout
from loopgguf.activations import PassResult
from loopgguf.calibration import Chunks, default_text, describe_shortage, load_chunks
from loopgguf.chat import find_template
from loopgguf.checkpoint import Job as SavedJob
from loopgguf.checkpoint import cache_path, content_key
from loopgguf.collection import GramRequest, Pass, run_checkpoint, run_gguf, run_gguf_grams
from loopgguf.container import (
    Layout,
    Metadata,
    PartFile,
    Value,
    ValueType,
    plan_layout,
    read_gguf,
    refuse_existing,
    shard_path,
    string,
    uint32,
    write_gguf,
)
from loopgguf.errors import OutputError, UsageError
from loopgguf.errortable import Sampling, measure_errors
from loopgguf.evaluation import Quality, measure_quality
from loopgguf.feedback import Compensate, Feedback, collect_feedback, refuse_without_gradients
from loopgguf.formats import GgmlType
from loopgguf.grams import GramHeader, GramWriter, check_disk, refuse_existing_grams, stored_bytes
from loopgguf.llama import Model
from loopgguf.pipeline import Job, Progress, TensorLog, WriteResult, execute
from loopgguf.planfile import SavedPlan, check_plan, imatrix_digest, load_plan
from loopgguf.planner import (
    OUTPUT,
    Plan,
    PlanRow,
    SizedPlan,
    TypeRules,
    describe_sized,
    nearest_label,
    plan_conversion,
    plan_preset,
    plan_profile,
    plan_size,
    size_problem,
)
from loopgguf.presets import read_facts
from loopgguf.profile import load_profile
from loopgguf.proof import prove_vocabulary
from loopgguf.sensitivity import Sensitivities, SensitivitySums, load_sensitivities, save_sensitivities
from loopgguf.source import Source, open_source
from loopgguf.statistics import (
    ColumnSums,
    ImatrixFormat,
    Statistics,
    check_coverage,
    describe_gaps,
    load_imatrix,
    merge,
    save_imatrix,
)
from loopgguf.verify import speak, verify_file

logger = logging.getLogger(__name__)

DEFAULT_MAX_BUFFER_BYTES = 256 << 20
DEFAULT_CTX_SIZE = 512
DEFAULT_SAMPLES = 512
DEFAULT_PROFILE = "balanced"
GRADIENT_CHUNKS = 24  # of the calibration text: 12 rank single tensors as well as measuring them does (Spearman 0.95)
SPEAKING_PROMPT = "Once upon a time"


def default_threads() -> int:
    """Return the number of CPUs this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Settings:
    """How to work, not what to make: nothing here changes a byte of the output."""

    n_threads: int = field(default_factory=default_threads)
    max_buffer_bytes: int = DEFAULT_MAX_BUFFER_BYTES
    overwrite: bool = False
    pre_tokenizer: str | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class ImatrixRequest:
    """Which calibration text makes an imatrix, cut how. `files`: what `corpus.find_parts` takes."""

    files: tuple[str | Path, ...] = ()
    ctx_size: int = DEFAULT_CTX_SIZE
    n_samples: int = DEFAULT_SAMPLES
    process_output: bool = False
    parse_special: bool = False
    seed: int = 0  # chooses documents where there are more than asked for; of no effect on texts alone
    gram: bool = False  # also write Gram matrices beside it
    gradient: bool = False  # those of the gradients too; a checkpoint folder only
    in_files: tuple[Path, ...] = ()  # imatrices whose sums are added
    output_format: ImatrixFormat | None = None
    resume: bool = True
    job_folder: Path | None = None


@dataclass(frozen=True)
class ImatrixResult:
    """An imatrix and the pass that made it; `path` is where it lies."""

    path: Path
    statistics: Statistics
    run: PassResult
    chunks: Chunks
    notes: tuple[str, ...]


# --- source -----------------------------------------------------------------------------------------------------------


def _open(model: Path, settings: Settings) -> tuple[Source, list[str]]:
    """Open a model; a checkpoint's vocabulary is proven against llama.cpp (once per set of tokenizer files)."""
    source = open_source(model, pre_tokenizer=settings.pre_tokenizer)
    notes = list(source.notes)
    if source.is_checkpoint:
        notes += _proof(source, forced=settings.pre_tokenizer is not None)
    return source, notes


def _proof(source: Source, *, forced: bool) -> list[str]:
    remembered = cache_path("vocabulary", content_key(__version__, source.fingerprint, str(source.metadata.get("tokenizer.ggml.pre"))), ".txt")
    if not remembered.exists():
        found = "\n".join(prove_vocabulary(source.path, source.metadata, forced=forced))
        remembered.write_text(found, encoding="utf-8")
    return remembered.read_text(encoding="utf-8").splitlines()


@contextlib.contextmanager
def _vocabulary_file(source: Source) -> Iterator[Path]:
    """Give a GGUF that llama.cpp can load the vocabulary from: the source itself, or a temporary one of a checkpoint."""
    if not source.is_checkpoint:
        yield source.path
        return
    with tempfile.TemporaryDirectory(prefix="loopgguf-") as folder:
        path = Path(folder) / "vocabulary.gguf"
        write_gguf(path, source.metadata, [])
        yield path


# --- imatrix ----------------------------------------------------------------------------------------------------------


def _chunks(
    source: Source,
    files: Sequence[str | Path],
    default: Literal["calibration", "heldout"],
    ctx_size: int,
    n_chunks: int | None,
    settings: Settings,
    *,
    parse_special: bool = False,
    seed: int = 0,
) -> Chunks:
    """Return the texts cut into chunks under the model's own vocabulary and chat template, as llama.cpp tokenizes them."""
    template = find_template(source.metadata, model_name(source.path))
    inputs = tuple(files) or (default_text(default),)
    with _vocabulary_file(source) as path, Model(path, vocab_only=True) as vocabulary:
        return load_chunks(vocabulary, inputs, ctx_size, n_chunks, parse_special=parse_special, seed=seed, template=template, progress=settings.progress)


def _calibration_chunks(source: Source, request: ImatrixRequest, settings: Settings) -> Chunks:
    return _chunks(source, request.files, "calibration", request.ctx_size, request.n_samples, settings, parse_special=request.parse_special, seed=request.seed)


def _calibration_notes(chunks: Chunks) -> list[str]:
    shortage = describe_shortage(chunks)
    return [*([f"calibration text: {shortage}"] if shortage else []), *chunks.notes]


def _collect(
    source: Source, request: ImatrixRequest, chunks: Chunks, settings: Settings, job_folder: Path, output: Path, save: Callable[[Statistics], None]
) -> tuple[Statistics, PassResult]:
    """Return the statistics, after `save` has written them; a run that was stopped goes on from the job folder.

    Gram matrices, where asked for, are published beside `output` before.
    """
    columns = {"columns": ColumnSums(moments=True)}
    how = Pass(settings.n_threads, request.process_output, documents=chunks.documents if source.is_checkpoint else None, progress=settings.progress)
    with SavedJob(job_folder, _job_fingerprint(source, request, chunks), resume=request.resume) as job:
        if request.gram:
            run = _run_grams(source, request, chunks, columns, job, how, output, overwrite=settings.overwrite)
        else:
            run = (run_checkpoint if source.is_checkpoint else run_gguf)(source.path, chunks.tokens, columns, job, how)
        statistics = Statistics(columns["columns"].columns(), chunks.names, len(chunks.tokens), request.ctx_size)
        save(statistics)
        job.finish()
    return statistics, run


def _run_grams(
    source: Source, request: ImatrixRequest, chunks: Chunks, columns: Mapping[str, ColumnSums], job: SavedJob, how: Pass, output: Path, *, overwrite: bool
) -> PassResult:
    """Run the pass that writes Gram matrices too, after seeing that they fit on the disk, and publish them."""
    refuse_existing_grams(output, overwrite=overwrite)
    shapes = {t.name: t.shape for t in source.tensors if len(t.shape) > 1 and (t.name.startswith("blk.") or (request.gradient and t.name == EMBEDDING))}
    check_disk(output.absolute().parent, stored_bytes(shapes, has_gradient=request.gradient))
    _, holdout = split_holdout(chunks.n_chunks, request.seed)
    grams = GramRequest(tuple(int(i) for i in holdout), request.seed if request.gradient else None)
    writer = GramWriter(job.shards, GramHeader(tuple(grams.holdout), request.seed, grams.label_seed, chunks.fingerprint))
    if source.is_checkpoint:
        run = run_checkpoint(source.path, chunks.tokens, columns, job, how, grams, writer)
    else:
        run = run_gguf_grams(source.path, chunks.tokens, columns, job, how, grams, writer, shapes)
    writer.publish(output, overwrite=overwrite)
    return run


def _job_fingerprint(source: Source, request: ImatrixRequest, chunks: Chunks) -> dict[str, object]:
    """Return what the statistics depend on, by names that a user understands."""
    return {
        "loopgguf version": __version__,
        "model": source.fingerprint,
        "calibration text": chunks.fingerprint,
        "ctx-size": request.ctx_size,
        "samples": chunks.n_chunks,
        "process-output": request.process_output,
        "engine": "torch" if source.is_checkpoint else "llama.cpp",
        "gram": request.gram,
        "gradient": request.gradient,
        "seed": request.seed if request.gram else None,
    }


def _imatrix_path(model: Path | None, output: Path | None, request: ImatrixRequest) -> Path:
    output = output or Path(f"{model_name(model) if model else 'merged'}.imatrix.{request.output_format or 'gguf'}")
    if "imatrix" not in output.name:
        raise UsageError(f"an imatrix file must have `imatrix` in its name, or tools take it for a model: got {output.name}, try {output.stem}.imatrix.gguf")
    return output


def compute_imatrix(model: Path, output: Path | None = None, request: ImatrixRequest | None = None, settings: Settings | None = None) -> ImatrixResult:
    """Run calibration text through a model and write the importance matrix in one of llama.cpp's forms.

    model: a checkpoint folder (run by torch, one decoder layer at a time) or a GGUF (run by llama.cpp). output: default
    `NAME.imatrix.gguf` in the current folder. What is done is kept in a job folder until then, and the same request goes
    on from it. Raises InputError for a bad model or text, OutputError when the output exists or cannot be written,
    UsageError when the job folder is of another request or in use, Interrupted when the user stops it.
    """
    request, settings = request or ImatrixRequest(), settings or Settings()
    output = _imatrix_path(model, output, request)
    refuse_existing(output, overwrite=settings.overwrite)
    parts = [load_imatrix(path) for path in request.in_files]
    source, notes = _open(model, settings)
    if request.gradient:
        refuse_without_gradients(source)
    _refuse_same_file(output, (*source.files, *request.in_files))
    chunks = _calibration_chunks(source, request, settings)

    def save(collected: Statistics) -> None:
        merged = merge([collected, *parts]) if parts else collected
        check_coverage(merged, source.tensors)  # a hole here is our bug, or an --in-file of another model: never save it
        save_imatrix(merged, output, overwrite=settings.overwrite, output_format=request.output_format)

    statistics, run = _collect(source, request, chunks, settings, request.job_folder or output.with_name(output.name + ".job"), output, save)
    statistics = merge([statistics, *parts]) if parts else statistics
    gaps = describe_gaps(check_coverage(statistics, source.tensors))
    return ImatrixResult(output, statistics, run, chunks, (*notes, *_calibration_notes(chunks), *gaps))


def merge_imatrices(
    paths: Sequence[Path], output: Path | None = None, request: ImatrixRequest | None = None, settings: Settings | None = None
) -> tuple[Path, Statistics]:
    """Return the path of the sum of imatrix files of one model (default `merged.imatrix.gguf`), and what is in it.

    Raises InputError for a bad file or files of different models, OutputError for an output that exists, is one of the
    files, or cannot be written.
    """
    request, settings = request or ImatrixRequest(), settings or Settings()
    output = _imatrix_path(None, output, request)
    _refuse_same_file(output, paths)
    refuse_existing(output, overwrite=settings.overwrite)
    merged = merge([load_imatrix(path) for path in paths])
    save_imatrix(merged, output, overwrite=settings.overwrite, output_format=request.output_format)
    return output, merged


@dataclass(frozen=True)
class _Importance:
    """The statistics that a quantization uses, the file name they go by, and where they came from in words."""

    statistics: Statistics
    name: str
    notes: tuple[str, ...]


def _given_importance(source: Source, imatrix: Path) -> _Importance:
    coverage = check_coverage(load_imatrix(imatrix), source.tensors)
    unused = f"imatrix: {len(coverage.unused)} of its entries are of no tensor of this model: {', '.join(coverage.unused[:3])}"
    return _Importance(coverage.statistics, imatrix.name, (unused,) if coverage.unused else ())


def _made_importance(source: Source, request: ImatrixRequest, settings: Settings) -> _Importance:
    """Return the statistics made before for the same model and text, or new ones, which are kept."""
    chunks = _calibration_chunks(source, request, settings)
    name = f"{model_name(source.path)}.imatrix.gguf"
    cached = cache_path("imatrix", content_key(__version__, source.fingerprint, chunks.fingerprint, request.ctx_size), ".imatrix.gguf")
    text = f"{', '.join(chunks.names)}, {chunks.n_chunks} chunks of {request.ctx_size} tokens"
    if cached.exists():
        return _Importance(load_imatrix(cached), name, (f"imatrix: taken from {cached}, made before from the same model and {text}",))
    statistics, run = _collect(source, request, chunks, settings, cached.with_suffix(".job"), cached, lambda made: save_imatrix(made, cached))
    made = f"imatrix: made from {text} (perplexity {run.perplexity:.4g}), kept as {cached}"
    return _Importance(statistics, name, (made, *_calibration_notes(chunks)))


def _will_be_collected(name: str) -> bool:
    """Tell whether an imatrix that we make has data for a tensor: the layers' weights, neither the head nor embeddings."""
    return name.startswith("blk.")


# --- writing ----------------------------------------------------------------------------------------------------------


def model_name(model: Path) -> str:
    """Return the name a model goes by: its folder's or file's, without shard numbers and `.gguf`."""
    resolved = model.resolve()
    return resolved.name if resolved.is_dir() else resolved.name.removesuffix(".gguf").split("-00001-of-")[0]


def _refuse_same_file(output: Path, inputs: Sequence[Path]) -> None:
    """Raise OutputError when `output` is one of the inputs, through links too."""
    for path in inputs:
        if output.exists() and path.exists() and output.samefile(path):
            raise OutputError(f"output {output} is the input {path}: nothing was written; choose another name with -o")


def _output_metadata(source: Source, plan: Plan, importance: _Importance | None, compensate: Compensate = Compensate.OFF) -> dict[str, Value]:
    """Return the source's metadata with what this file is and came from; names only, no paths."""
    metadata = dict(source.metadata)
    metadata["general.quantization_version"] = uint32(2)
    metadata["general.file_type"] = uint32(plan.file_type)
    metadata["general.quantized_by"] = string("loopgguf")
    if importance is not None and any(row.uses_imatrix for row in plan.rows):
        metadata["quantize.imatrix.file"] = string(importance.name)
        metadata["quantize.imatrix.dataset"] = string(", ".join(Path(dataset).name for dataset in importance.statistics.datasets))
        metadata["quantize.imatrix.entries_count"] = uint32(len(importance.statistics.columns))
        metadata["quantize.imatrix.chunks_count"] = uint32(importance.statistics.n_chunks)
    metadata["loopgguf.version"] = string(__version__)
    metadata["loopgguf.intent"] = string(plan.intent)
    metadata["loopgguf.plan_hash"] = string(plan.hash)
    if compensate is not Compensate.OFF:
        metadata["loopgguf.compensate"] = string(compensate)
    return metadata


def _layouts(source: Source, plan: Plan, metadata: Metadata, output: Path, keep_split: bool) -> list[tuple[Path, Layout]]:
    """Return each output file with its layout: one, or one per input shard."""
    n_shards = 1 + max(tensor.shard for tensor in source.tensors) if keep_split else 1
    if n_shards == 1:
        return [(output, plan_layout(metadata, [(row.name, row.type, row.shape) for row in plan.rows]))]
    shard_of = {tensor.name: tensor.shard for tensor in source.tensors}
    files = []
    for shard in range(n_shards):
        rows = [row for row in plan.rows if shard_of[row.name] == shard]
        split: dict[str, Value] = {
            "split.no": Value(ValueType.UINT16, shard),
            "split.count": Value(ValueType.UINT16, n_shards),
            "split.tensors.count": Value(ValueType.INT32, len(plan.rows)),
        }
        shard_metadata = {**metadata, **split} if shard == 0 else split
        files.append((shard_path(output, shard + 1, n_shards), plan_layout(shard_metadata, [(row.name, row.type, row.shape) for row in rows])))
    return files


def _jobs(source: Source, rows: Mapping[str, PlanRow], layout: Layout, part: PartFile, feedback: Feedback | None) -> list[Job]:
    tensors = {tensor.name: tensor for tensor in source.tensors}
    jobs = [Job(tensors[info.name], rows[info.name], part, info) for info in layout.tensors]
    if feedback is None:
        return jobs
    is_tied = OUTPUT not in tensors
    return [replace(job, curvature=feedback.curvature(job.row, is_tied=is_tied), dampings=feedback.dampings) for job in jobs]


def _verify(source: Source, parts: Sequence[tuple[PartFile, Layout]], logs: Mapping[str, TensorLog], settings: Settings) -> str:
    """Check each part as a reader would, then load and run the whole under its final names; return what it said."""
    for part, layout in parts:
        verify_file(part.path, layout, source.tensors, logs, n_threads=settings.n_threads, progress=settings.progress)
    with tempfile.TemporaryDirectory(prefix="loopgguf-") as folder:  # llama.cpp finds the shards of a model by their names
        links = [Path(folder) / part.target.name for part, _ in parts]
        for link, (part, _) in zip(links, parts, strict=True):
            link.symlink_to(part.path.resolve())
        return speak(links[0], SPEAKING_PROMPT, n_threads=settings.n_threads)


def _write_model(
    source: Source,
    plan: Plan,
    files: Sequence[tuple[Path, Layout]],
    importance: _Importance | None,
    feedback: Feedback | None,
    settings: Settings,
    notes: Sequence[str],
) -> WriteResult:
    """Encode, flush, verify and publish; nothing stays behind if any of it fails."""
    seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        seconds[phase] = time.perf_counter() - start

    rows = {row.name: row for row in plan.rows}
    with contextlib.ExitStack() as stack:
        parts = [(stack.enter_context(PartFile(path, layout.total_bytes, overwrite=settings.overwrite)), layout) for path, layout in files]
        with timed("encode and write"):
            for part, layout in parts:
                part.write_at(0, layout.header)
            logs = execute(
                [job for part, layout in parts for job in _jobs(source, rows, layout, part, feedback)],
                lambda name: importance.statistics.importance(name) if importance is not None else None,
                n_threads=settings.n_threads,
                max_buffer_bytes=settings.max_buffer_bytes,
                progress=settings.progress,
            )
        with timed("fsync"):
            for part, _ in parts:
                part.sync()
        with timed("verify"):
            sample_text = _verify(source, parts, logs, settings)
        for part, _ in parts:
            part.publish()
    paths = tuple(path for path, _ in files)
    return WriteResult(plan, paths, sum(layout.total_bytes for _, layout in files), logs, seconds, sample_text, tuple(notes))


def _finish(
    source: Source,
    plan: Plan,
    output: Path,
    settings: Settings,
    notes: Sequence[str],
    *,
    importance: _Importance | None = None,
    compensate: Compensate = Compensate.OFF,
    calibration: ImatrixRequest | None = None,
    keep_split: bool = False,
    dry_run: bool = False,
) -> WriteResult:
    """Lay the files out to the byte; stop there for a dry run, else collect what error feedback needs, and write them."""
    files = _layouts(source, plan, _output_metadata(source, plan, importance, compensate), output, keep_split)
    if dry_run:
        return WriteResult(plan, tuple(p for p, _ in files), sum(layout.total_bytes for _, layout in files), {}, {}, "", tuple(notes), is_dry_run=True)
    for path, _ in files:
        _refuse_same_file(path, source.files)
        refuse_existing(path, overwrite=settings.overwrite)
    feedback = None
    if compensate is not Compensate.OFF:
        chunks = _calibration_chunks(source, calibration or ImatrixRequest(), settings)
        feedback = collect_feedback(source, chunks, compensate, n_threads=settings.n_threads, progress=settings.progress)
    return _write_model(source, plan, files, importance, feedback, settings, notes)


@dataclass(frozen=True)
class QuantizeRequest:
    """What to make of a model: a preset, a size, a saved plan or a profile, the rules on top, and which imatrix weighs the columns."""

    profile: str | Path | None = None  # None: `balanced`; with a size: no profile
    quant_type: str | None = None
    size_bytes: int | None = None
    target_bpw: float | None = None  # of the whole file
    plan: Path | None = None
    exact_errors: bool = False
    use_gradients: bool = True  # a checkpoint's, for the errors that a plan by size rests on
    rules: TypeRules = field(default_factory=TypeRules)
    imatrix: Path | None = None
    use_imatrix: bool = True
    calibration: ImatrixRequest = field(default_factory=ImatrixRequest)
    compensate: Compensate = Compensate.OFF
    keep_split: bool = False
    dry_run: bool = False


def quantize(model: Path, output: Path | None = None, request: QuantizeRequest | None = None, settings: Settings | None = None) -> WriteResult:
    """Turn a checkpoint folder or a GGUF into a quantized GGUF, verified and published; or only plan it (`dry_run`).

    output: default `NAME-TYPE.gguf` for a preset, `NAME-LG-TYPE.gguf` for a profile (TYPE: the preset nearest in size),
    in the current folder. Raises UsageError for a request that cannot be met (before any work), InputError for a bad
    model or imatrix, OutputError for an output that exists or cannot be written, QualityError when the finished file
    does not pass its checks.
    """
    request, settings = request or QuantizeRequest(), settings or Settings()
    if output is not None:
        refuse_existing(output, overwrite=settings.overwrite or request.dry_run or request.keep_split)
    source, notes = _open(model, settings)
    if output is not None:
        _refuse_same_file(output, source.files)
    if request.compensate is not Compensate.OFF:
        refuse_without_gradients(source)
    resolved = _resolve(source, request, settings)
    name = f"{model_name(model)}-{request.quant_type.upper()}" if request.quant_type else f"{model_name(model)}-LG-{nearest_label(resolved.plan)}"
    output = output or Path(f"{name}.gguf")
    notes += resolved.notes
    result = _finish(
        source,
        resolved.plan,
        output,
        settings,
        notes,
        importance=resolved.importance,
        compensate=request.compensate,
        calibration=request.calibration,
        keep_split=request.keep_split,
        dry_run=request.dry_run,
    )
    if resolved.total_bytes is not None and result.total_bytes != resolved.total_bytes and not request.keep_split:
        logger.warning("the plan foresaw %d bytes, the file has %d", resolved.total_bytes, result.total_bytes)
    return result


@dataclass(frozen=True)
class _Resolved:
    """What a request comes to: the plan, the importance it is executed with (None where it needs none), notes."""

    plan: Plan
    importance: _Importance | None
    notes: tuple[str, ...] = ()
    sized: SizedPlan | None = None
    total_bytes: int | None = None  # where the plan says it


def _resolve(source: Source, request: QuantizeRequest, settings: Settings) -> _Resolved:
    """Return the plan of a request, whichever way it is given."""
    if request.plan is not None:
        return _resolve_saved(source, request.plan, request, settings)
    given = _given_importance(source, request.imatrix) if request.imatrix is not None else None
    if request.size_bytes is not None or request.target_bpw is not None:
        return _resolve_size(source, request, given, settings)
    if given is not None:
        return _Resolved(_plan(source, request, given.statistics.columns.__contains__), given, given.notes)
    plan = _plan(source, request, _will_be_collected if request.use_imatrix else None)
    needs_one = any(row.uses_imatrix for row in plan.rows) and not request.dry_run
    made = _made_importance(source, request.calibration, settings) if needs_one else None
    return _Resolved(plan, made, made.notes if made is not None else ())


def _resolve_size(source: Source, request: QuantizeRequest, given: _Importance | None, settings: Settings) -> _Resolved:
    """Measure what every type does to every tensor, and solve for the size."""
    importance = given or (_made_importance(source, request.calibration, settings) if request.use_imatrix else None)
    has_importance = importance.statistics.columns.__contains__ if importance is not None else None
    profile = load_profile(request.profile) if request.profile is not None else None
    problem = size_problem(source.tensors, source.metadata, request.rules, has_importance, profile)

    def measure_file(plan: Plan) -> int:
        files = _layouts(source, plan, _output_metadata(source, plan, importance, request.compensate), Path("model.gguf"), request.keep_split)
        return sum(layout.total_bytes for _, layout in files)

    table = measure_errors(
        problem.requests,
        importance.statistics if importance is not None else None,
        source_fingerprint=source.fingerprint,
        n_layer=read_facts(source.metadata).n_layer,
        is_tied=all(tensor.name != "output.weight" for tensor in source.tensors),
        gradients=_sensitivities(source, request.calibration, settings) if source.is_checkpoint and request.use_gradients else None,
        sampling=Sampling(is_exact=request.exact_errors),
        n_threads=settings.n_threads,
        progress=settings.progress,
    )
    n_weights = sum(tensor.n_rows * tensor.n_in for tensor in source.tensors)
    budget_bytes = request.size_bytes if request.size_bytes is not None else int((request.target_bpw or 0.0) * n_weights / 8)
    sized = plan_size(problem, table, budget_bytes, measure_file)
    notes = (*(importance.notes if importance is not None else ()), *describe_sized(sized, table))
    return _Resolved(sized.plan, importance, notes, sized, sized.total_bytes)


def _sensitivities(source: Source, request: ImatrixRequest, settings: Settings) -> Sensitivities:
    """Return what a backward pass over a few of the calibration chunks tells, or told before."""
    chunks = _calibration_chunks(source, request, settings)
    chosen = np.unique(np.linspace(0, chunks.n_chunks - 1, GRADIENT_CHUNKS).astype(int))
    fingerprint = content_key(__version__, source.fingerprint, chunks.fingerprint, request.ctx_size, len(chosen))
    path = cache_path("sensitivity", fingerprint, ".npz")
    found = load_sensitivities(path, fingerprint)
    if found is None:
        from loopgguf.layerwise import collect_gradients

        sums = SensitivitySums()
        documents = None if chunks.documents is None else chunks.documents[chosen]
        collect_gradients(
            source.path,
            chunks.tokens[chosen],
            [sums],
            n_threads=settings.n_threads,
            label_seed=0,
            documents=documents,
            numbers=chosen.tolist(),
            progress=settings.progress,
        )
        found = sums.take(next(tensor.n_rows for tensor in source.tensors if tensor.name == EMBEDDING), fingerprint)
        save_sensitivities(found, path)
    return found


def _resolve_saved(source: Source, path: Path, request: QuantizeRequest, settings: Settings) -> _Resolved:
    """Read a plan, and see that it is of this model and that the importance is the one it was made with."""
    saved = load_plan(path)
    check_plan(saved, source.tensors, model_name(source.path))
    if not any(row.uses_imatrix for row in saved.plan.rows):
        return _Resolved(saved.plan, None, (), None, saved.total_bytes)
    importance = _given_importance(source, request.imatrix) if request.imatrix is not None else _made_importance(source, request.calibration, settings)
    without = next((row.name for row in saved.plan.rows if row.uses_imatrix and row.name not in importance.statistics.columns), None)
    if without is not None or (saved.imatrix_sha256 is not None and imatrix_digest(saved.plan, importance.statistics.importance) != saved.imatrix_sha256):
        raise UsageError(f"{path} was made with another imatrix than {importance.name}: give the same one with --imatrix, or plan again")
    return _Resolved(saved.plan, importance, importance.notes, None, saved.total_bytes)


def _plan(source: Source, request: QuantizeRequest, has_importance: Callable[[str], bool] | None) -> Plan:
    if request.quant_type is not None:
        return plan_preset(source.tensors, source.metadata, request.quant_type, request.rules, has_importance)
    return plan_profile(source.tensors, source.metadata, load_profile(request.profile or DEFAULT_PROFILE), request.rules, has_importance)


@dataclass(frozen=True)
class PlanResult:
    """A plan that was only made; `sized` tells more of one by size. `imatrix_sha256` is of the imatrix it counts on, where known."""

    saved: SavedPlan
    sized: SizedPlan | None
    notes: tuple[str, ...]


def make_plan(model: Path, request: QuantizeRequest, settings: Settings | None = None) -> PlanResult:
    """Return the plan of a request and the exact size of its file; encodes nothing but the samples that a size needs."""
    settings = settings or Settings()
    source, notes = _open(model, settings)
    resolved = _resolve(source, request, settings)
    plan, importance = resolved.plan, resolved.importance
    files = _layouts(source, plan, _output_metadata(source, plan, importance, request.compensate), Path("model.gguf"), request.keep_split)
    digest = imatrix_digest(plan, importance.statistics.importance) if importance is not None else None
    saved = SavedPlan(plan, model_name(model), sum(layout.total_bytes for _, layout in files), digest)
    return PlanResult(saved, resolved.sized, (*notes, *resolved.notes))


def convert(model: Path, output: Path | None = None, outtype: str = "bf16", *, dry_run: bool = False, settings: Settings | None = None) -> WriteResult:
    """Turn a checkpoint folder (or a GGUF) into an F32, F16, BF16 or Q8_0 GGUF, as llama.cpp's converter does."""
    settings = settings or Settings()
    source, notes = _open(model, settings)
    plan = plan_conversion(source.tensors, source.metadata, outtype)
    output = output or Path(f"{model_name(model)}-{outtype.upper()}.gguf")
    return _finish(source, plan, output, settings, notes, dry_run=dry_run)


# --- evaluation -------------------------------------------------------------------------------------------------------


def reference_gguf(model: Path, settings: Settings | None = None) -> tuple[Path, list[str]]:
    """Return a full-precision GGUF of `model`: itself if it is one, else a conversion kept in the cache folder."""
    settings = settings or Settings()
    source, notes = _open(model, settings)
    if not source.is_checkpoint:
        return model, notes
    path = cache_path("reference", content_key(__version__, source.fingerprint), ".gguf")
    if path.exists():
        return path, [*notes, f"reference: {path} ({path.stat().st_size:,} bytes), converted before from the same checkpoint"]
    is_float32 = any(tensor.type is GgmlType.F32 and len(tensor.shape) > 1 for tensor in source.tensors)
    plan = plan_conversion(source.tensors, source.metadata, "f32" if is_float32 else "auto")
    result = _finish(source, plan, path, settings, notes)
    return path, [*notes, f"reference: {model} converted to {path} ({result.total_bytes:,} bytes on disk, kept for the next run)"]


@dataclass(frozen=True)
class EvaluationResult:
    """The measured quality of a file against its reference, and on what."""

    candidate: Path
    reference: Path
    quality: Quality
    chunks: Chunks
    notes: tuple[str, ...]


def evaluate(
    candidate: Path,
    reference: Path,
    files: Sequence[str | Path] = (),
    *,
    ctx_size: int = DEFAULT_CTX_SIZE,
    n_chunks: int | None = None,
    settings: Settings | None = None,
) -> EvaluationResult:
    """Measure a GGUF against its full-precision reference (a GGUF or a checkpoint folder) on held-out text.

    files: texts, default the held-out text that ships with the package. Both models are run by llama.cpp with the same
    settings, side by side; no logit file is written. Raises InputError for bad files, texts or different vocabularies.
    """
    settings = settings or Settings()
    read_gguf(candidate)
    reference_path, notes = reference_gguf(reference, settings)
    source = open_source(candidate)
    chunks = _chunks(source, files, "heldout", ctx_size, n_chunks, settings)
    calibrated_on = source.metadata.get("quantize.imatrix.dataset")
    overlap = sorted(set(chunks.names) & set(str(calibrated_on.data).split(", "))) if calibrated_on else []
    if overlap:
        notes.append(f"{', '.join(overlap)} is also the calibration text of this file: its figures flatter; evaluate on other text")
    quality = measure_quality(candidate, reference_path, chunks.tokens, n_threads=settings.n_threads, progress=settings.progress)
    return EvaluationResult(candidate, reference, quality, chunks, (*notes, *chunks.notes))
