"""What is known of a model's inputs: makes imatrices, adds them up, and finds the one that a quantization uses.

Each way ends in `Importance`: the statistics and where they came from. What was made before for the same model and text
is taken again from the user cache folder.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from loopgguf.accumulators import EMBEDDING, Extremes, Key, Spikes, split_holdout
from loopgguf.attention import AttentionMass, refuse_existing_attention, save_attention
from loopgguf.calibration import Chunks, describe_shortage
from loopgguf.checkpoint import IMATRIX, Job, cache_path, content_key, job_folder, open_stage, sweep, was_publishing
from loopgguf.collection import Collector, GramRequest, Pass, plan_grams, run_checkpoint, run_gguf, run_gguf_grams
from loopgguf.container import refuse_existing
from loopgguf.curvature import gram_shapes
from loopgguf.errors import InputError, UsageError
from loopgguf.grams import GramHeader, GramWriter, check_disk, find_grams, load_grams, refuse_existing_grams, stored_bytes
from loopgguf.loss import PassResult
from loopgguf.opening import DEFAULT_CTX_SIZE, Settings, cut_text, model_fields, model_name, open_model, refuse_same_file
from loopgguf.protection import (
    DEFAULT_COVERAGE,
    find_super_weights,
    protection_paths,
    refuse_bad_coverage,
    refuse_existing_protection,
    save_protection,
    select_mask,
)
from loopgguf.sensitivity import VERSION as SENSITIVITY_VERSION
from loopgguf.sensitivity import Sensitivities, SensitivitySums, from_grams, load_sensitivities, save_sensitivities
from loopgguf.source import Source, refuse_changed
from loopgguf.statistics import ColumnSums, ImatrixFormat, Statistics, check_coverage, describe_gaps, load_imatrix, merge, save_imatrix
from loopgguf.super_weights import Found
from loopgguf.version import __version__

logger = logging.getLogger(__name__)

DEFAULT_SAMPLES = 512
GRADIENT_CHUNKS = 24  # of the calibration text: 12 rank single tensors as well as measuring them does (Spearman 0.95)


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
    attention: bool = False  # also write what attention each position receives
    super_weights: bool = False  # also look for super weights, and write them and the mask beside it
    super_weight_coverage: float = DEFAULT_COVERAGE  # of the mask
    in_files: tuple[Path, ...] = ()  # imatrices whose sums are added
    output_format: ImatrixFormat | None = None


@dataclass(frozen=True)
class ImatrixResult:
    """An imatrix and the pass that made it; `path` is where it lies."""

    path: Path
    statistics: Statistics
    run: PassResult
    chunks: Chunks
    notes: tuple[str, ...]
    super_weights: Found | None = None  # None: not looked for


def calibration_chunks(source: Source, request: ImatrixRequest, settings: Settings) -> Chunks:
    """Return the calibration text that a request means, cut into chunks."""
    return cut_text(source, request.files, "calibration", request.ctx_size, request.n_samples, settings, parse_special=request.parse_special, seed=request.seed)


def _calibration_notes(chunks: Chunks) -> list[str]:
    shortage = describe_shortage(chunks)
    return [*([f"calibration text: {shortage}"] if shortage else []), *chunks.notes]


@dataclass(frozen=True)
class _Task:
    """An imatrix to be made: of which model, from which text, how, and where it goes."""

    source: Source
    request: ImatrixRequest
    chunks: Chunks
    settings: Settings
    output: Path

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of the model's tensors, by name."""
        return {tensor.name: tensor.shape for tensor in self.source.tensors}

    @property
    def how(self) -> Pass:
        settings = self.settings
        common = (settings.n_threads, self.request.process_output, settings.device, settings.max_memory_bytes)
        return Pass(*common, documents=self.chunks.documents, progress=settings.progress)

    @property
    def fingerprint(self) -> dict[str, object]:
        """What the statistics depend on, by names that a user understands."""
        request = self.request
        return {
            **model_fields(self.source, self.settings),
            "calibration text": self.chunks.fingerprint,
            "ctx-size": request.ctx_size,
            "samples": self.chunks.n_chunks,
            "process-output": request.process_output,
            "engine": "torch" if self.source.is_checkpoint else "llama.cpp",
            "device": self.settings.device,
            "gram": request.gram,
            "gradient": request.gradient,
            "max-memory": self.settings.max_memory_bytes if request.gradient else None,
            "attention": request.attention,
            "super weights": request.super_weights,
            "seed": request.seed if request.gram else None,
        }

    def refuse_existing(self) -> None:
        """Raise OutputError when one of the files to be written exists and may not be overwritten."""
        overwrite = self.settings.overwrite
        refuse_existing(self.output, overwrite=overwrite)
        if self.request.gram:
            refuse_existing_grams(self.output, overwrite=overwrite)
        if self.request.attention:
            refuse_existing_attention(self.output, overwrite=overwrite)
        if self.request.super_weights:
            refuse_existing_protection(protection_paths(self.output)[0], overwrite=overwrite)


Save = Callable[[Statistics, Mapping[Key, Extremes] | None], None]


def _collect(task: _Task, folder: Path, save: Save) -> tuple[Statistics, PassResult]:
    """Return the statistics, after `save` has written them; a run that was stopped goes on from the job folder.

    Gram matrices and attention, where asked for, are published beside the output before. `save` gets the extremes
    around each ffn_down too, where super weights are looked for.
    """
    source, chunks, request, overwrite = task.source, task.chunks, task.request, task.settings.overwrite
    columns, attention, spikes = ColumnSums(moments=True), AttentionMass(), Spikes()
    collectors: dict[str, Collector] = {"columns": columns, **({"attention": attention} if request.attention else {})}
    if request.super_weights:
        collectors["spikes"] = spikes
    task.refuse_existing()
    settings = task.settings
    with open_stage(folder, IMATRIX, task.fingerprint, resume=settings.resume, keep=settings.keep_job) as job:
        writer = None
        if request.gram:
            run, writer = _run_grams(task, collectors, job)
        else:
            run = (run_checkpoint if source.is_checkpoint else run_gguf)(source.path, chunks.tokens, collectors, job, task.how)
        refuse_changed(source)
        task.refuse_existing()
        job.begin_publishing()
        if writer is not None:
            writer.publish(task.output, overwrite=overwrite)
        if layers := attention.layers():
            save_attention(layers, task.output, overwrite=overwrite)
        elif request.attention:
            task.settings.announce("attention: llama.cpp's graph of this model has no softmax node to look at: none is stored")
        statistics = Statistics(columns.columns(), chunks.names, len(chunks.tokens), request.ctx_size)
        save(statistics, spikes.extremes() if request.super_weights else None)
        job.finish()
    return statistics, run


def _run_grams(task: _Task, collectors: Mapping[str, Collector], job: Job) -> tuple[PassResult, GramWriter]:
    """Run the pass that writes Gram matrices too, after seeing that they fit on the disk."""
    request, chunks, path = task.request, task.chunks, task.source.path
    _announce_grams(task, job)
    _, holdout = split_holdout(chunks.n_chunks, request.seed)
    grams = GramRequest(tuple(int(i) for i in holdout), request.seed if request.gradient else None)
    writer = GramWriter(job.shards, GramHeader(tuple(grams.holdout), request.seed, grams.label_seed, chunks.fingerprint))
    if task.source.is_checkpoint:
        run = run_checkpoint(path, chunks.tokens, collectors, job, task.how, grams, writer)
    else:
        run = run_gguf_grams(path, chunks.tokens, collectors, job, task.how, grams, writer, gram_shapes(task.shapes, has_gradient=False))
    return run, writer


def _announce_grams(task: _Task, job: Job) -> None:
    """Say what Gram matrices take of the disk and how often the text is run; raise OutputError where the disk is too small."""
    has_gradient, place = task.request.gradient, task.output.absolute().parent
    matrices = stored_bytes(gram_shapes(task.shapes, has_gradient=has_gradient), has_gradient=has_gradient)
    cost = plan_grams(task.source.path, task.chunks.n_chunks, task.chunks.n_ctx, task.shapes, task.how, has_gradient=has_gradient)
    n_already = sum(path.stat().st_size for path in job.folder.rglob("*") if path.is_file())  # by the run that this one goes on with
    check_disk(job.folder, matrices + cost.hidden_bytes - n_already)
    if place.stat().st_dev != job.folder.stat().st_dev:
        check_disk(place, matrices)
    hidden = f", and until they are there up to {cost.hidden_bytes:,} bytes of hidden states in {job.folder}" if cost.hidden_bytes else ""
    task.settings.announce(f"Gram matrices: at most {matrices:,} bytes beside {task.output.name}{hidden}; {cost.passes}")


def _imatrix_path(model: Path | None, output: Path | None, request: ImatrixRequest) -> Path:
    output = output or Path(f"{model_name(model) if model else 'merged'}.imatrix.{request.output_format or 'gguf'}")
    if "imatrix" not in output.name:
        raise UsageError(f"an imatrix file must have `imatrix` in its name, or tools take it for a model: got {output.name}, try {output.stem}.imatrix.gguf")
    return output


def compute_imatrix(model: Path, output: Path | None = None, request: ImatrixRequest | None = None, settings: Settings | None = None) -> ImatrixResult:
    """Run calibration text through a model and write the importance matrix in one of llama.cpp's forms.

    model: a checkpoint folder (run by torch, one decoder layer at a time) or a GGUF (run by llama.cpp). output: default
    `NAME.imatrix.gguf` in the current folder. What is done is kept in a job folder until then, and the same request goes
    on from it (`Settings.resume`). Raises InputError for a bad model or text, OutputError when the output exists or cannot be written,
    UsageError when the job folder is of another request or in use, Interrupted when the user stops it.
    """
    request, settings = request or ImatrixRequest(), settings or Settings()
    output = _imatrix_path(model, output, request)
    folder = settings.job_folder or job_folder(output)
    sweep(folder)
    if settings.resume and was_publishing(folder, IMATRIX):
        settings = replace(settings, overwrite=True)
    refuse_existing(output, overwrite=settings.overwrite)
    if request.super_weights:
        refuse_bad_coverage(request.super_weight_coverage)
        refuse_existing_protection(protection_paths(output)[0], overwrite=settings.overwrite)
    parts = [load_imatrix(path) for path in request.in_files]
    source, notes = open_model(model, settings)
    if request.gradient and not source.is_checkpoint:
        raise UsageError("--gradient needs a backward pass, which only a checkpoint folder gives: give the folder instead of the GGUF, or leave it out")
    refuse_same_file(output, (*source.files, *request.in_files))
    chunks = calibration_chunks(source, request, settings)

    found: Found | None = None

    def save(collected: Statistics, extremes: Mapping[Key, Extremes] | None) -> None:
        nonlocal found
        merged = merge([collected, *parts]) if parts else collected
        checked = check_coverage(merged, source.tensors)  # a hole here is our bug, or an --in-file of another model: never save it
        if extremes is not None:
            found = find_super_weights(source, chunks, settings, extremes)
            mask = select_mask(source, checked.statistics, request.super_weight_coverage, settings)
            save_protection(found, mask, protection_paths(output)[0], overwrite=settings.overwrite)
        save_imatrix(merged, output, overwrite=settings.overwrite, output_format=request.output_format)

    task = _Task(source, request, chunks, settings, output)
    statistics, run = _collect(task, folder, save)
    statistics = merge([statistics, *parts]) if parts else statistics
    gaps = describe_gaps(check_coverage(statistics, source.tensors))
    return ImatrixResult(output, statistics, run, chunks, (*notes, *_calibration_notes(chunks), *gaps), found)


def merge_imatrices(
    paths: Sequence[Path], output: Path | None = None, request: ImatrixRequest | None = None, settings: Settings | None = None
) -> tuple[Path, Statistics]:
    """Return the path of the sum of imatrix files of one model (default `merged.imatrix.gguf`), and what is in it.

    Raises InputError for a bad file or files of different models, OutputError for an output that exists, is one of the
    files, or cannot be written.
    """
    request, settings = request or ImatrixRequest(), settings or Settings()
    output = _imatrix_path(None, output, request)
    refuse_same_file(output, paths)
    refuse_existing(output, overwrite=settings.overwrite)
    merged = merge([load_imatrix(path) for path in paths])
    save_imatrix(merged, output, overwrite=settings.overwrite, output_format=request.output_format)
    return output, merged


@dataclass(frozen=True)
class Origin:
    """Where statistics come from, as a file's metadata says it: base names and counts."""

    name: str
    datasets: tuple[str, ...]
    n_entries: int
    n_chunks: int


@dataclass(frozen=True)
class Importance:
    """The statistics that a quantization uses (None in a dry run, which makes none), their origin, and notes."""

    statistics: Statistics | None
    origin: Origin
    notes: tuple[str, ...] = ()

    def __call__(self, name: str) -> np.ndarray | None:
        """Return the importance of a tensor's columns, (n_matrices, n_in) float32, or None."""
        return None if self.statistics is None else self.statistics.importance(name)

    def has(self, name: str) -> bool:
        """Tell whether there are data for a tensor; in a dry run, whether there would be."""
        return _will_be_collected(name) if self.statistics is None else name in self.statistics.columns


def _describe(statistics: Statistics, name: str, notes: Sequence[str]) -> Importance:
    datasets = tuple(Path(dataset).name for dataset in statistics.datasets)
    return Importance(statistics, Origin(name, datasets, len(statistics.columns), statistics.n_chunks), tuple(notes))


def _will_be_collected(name: str) -> bool:
    """Tell whether an imatrix that we make has data for a tensor: the layers' weights, neither the head nor embeddings."""
    return name.startswith("blk.")


def planned_importance(source: Source) -> Importance:
    """Return what an imatrix that we make of a model will cover, before it is made."""
    n_entries = sum(_will_be_collected(tensor.name) and len(tensor.shape) > 1 for tensor in source.tensors)
    return Importance(None, Origin(f"{model_name(source.path)}.imatrix.gguf", (), n_entries, 0))


def given_importance(source: Source, imatrix: Path) -> Importance:
    """Return an imatrix that was given, with what it lacks. Raises InputError when it is damaged or of another model."""
    coverage = check_coverage(load_imatrix(imatrix), source.tensors)
    unused = f"imatrix: {len(coverage.unused)} of its entries are of no tensor of this model: {', '.join(coverage.unused[:3])}"
    return _describe(coverage.statistics, imatrix.name, [*([unused] if coverage.unused else []), *describe_gaps(coverage)])


def made_importance(source: Source, request: ImatrixRequest, settings: Settings, *, dry_run: bool = False) -> Importance:
    """Return the statistics made before for the same model and text, or new ones, which are kept; a dry run makes none."""
    request = replace(request, process_output=False, gram=False, gradient=False, attention=False, super_weights=False, in_files=(), output_format=None)
    chunks = calibration_chunks(source, request, settings)
    name = f"{model_name(source.path)}.imatrix.gguf"
    cached = cache_path("imatrix", content_key(__version__, source.fingerprint, chunks.fingerprint, request.ctx_size), ".imatrix.gguf")
    text = f"{', '.join(chunks.names)}, {chunks.n_chunks} chunks of {request.ctx_size} tokens"
    task = _Task(source, request, chunks, replace(settings, overwrite=True), cached)
    folder = settings.job_folder or job_folder(cached)
    found = _load_cached(cached)
    if found is not None:
        _drop_finished(task, folder)
        notes = [f"imatrix: taken from {cached}, made before from the same model and {text}", *_calibration_notes(chunks)]
    elif dry_run:
        planned = planned_importance(source)
        origin = replace(planned.origin, datasets=chunks.names, n_chunks=chunks.n_chunks)
        return replace(planned, origin=origin, notes=(f"imatrix: would be made from {text}",))
    else:
        found, run = _collect(task, folder, lambda made, _: save_imatrix(made, cached, overwrite=True))
        notes = [f"imatrix: made from {text} (perplexity {run.perplexity:.4g}), kept as {cached}", *_calibration_notes(chunks)]
    coverage = check_coverage(found, source.tensors)
    return _describe(coverage.statistics, name, [*notes, *describe_gaps(coverage)])


def _drop_finished(task: _Task, folder: Path) -> None:
    """Remove what is left of a run that was killed just after it had kept its imatrix."""
    if was_publishing(folder, IMATRIX):
        with contextlib.suppress(UsageError), open_stage(folder, IMATRIX, task.fingerprint) as job:  # else it is another run's
            job.clear()


def _load_cached(path: Path) -> Statistics | None:
    """Return a cached imatrix; a damaged one is as good as none."""
    try:
        return load_imatrix(path) if path.exists() else None
    except InputError as error:
        logger.warning("the cached imatrix is made again: %s", error)
        return None


def stored_sensitivities(imatrix: Path | None) -> Sensitivities | None:
    """Return what the Gram matrices beside an imatrix tell; None where there are none, or none of gradients.

    Raises InputError as `grams.load_grams`.
    """
    if imatrix is None or not find_grams(imatrix):
        return None
    grams = load_grams(imatrix)
    fingerprint = content_key(SENSITIVITY_VERSION, "Gram matrices", grams.fingerprint, grams.label_seed, grams.holdout_chunks)
    return from_grams(grams.train, fingerprint) if grams.train.weighted else None


def find_sensitivities(source: Source, request: ImatrixRequest, settings: Settings) -> Sensitivities:
    """Return what a backward pass over a few of the calibration chunks tells, or told before."""
    chunks = calibration_chunks(source, request, settings)
    chosen = np.unique(np.linspace(0, chunks.n_chunks - 1, GRADIENT_CHUNKS).astype(int))
    fingerprint = content_key(SENSITIVITY_VERSION, source.fingerprint, chunks.fingerprint, request.ctx_size, len(chosen))
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
            device=settings.device,
            max_memory_bytes=settings.max_memory_bytes,
            label_seed=0,
            documents=documents,
            numbers=chosen.tolist(),
            progress=settings.progress,
        )
        found = sums.take(next(tensor.n_rows for tensor in source.tensors if tensor.name == EMBEDDING), fingerprint)
        save_sensitivities(found, path)
    return found
