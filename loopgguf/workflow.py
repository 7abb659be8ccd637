"""The commands of the tool, without printing: source → statistics → plan → encode → verify → publish → evaluate.

Progress goes through a callback, what a user should know comes back in the result's `notes`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from loopgguf.calibration import Chunks
from loopgguf.checkpoint import GUARD, SEARCH, drop_stage, job_folder, sweep
from loopgguf.collapse import LOW_BPW, CollapseCheck, check_collapse, low_bits_warning
from loopgguf.comparison import ComparedFile, compare_measured, find_baseline, short_names
from loopgguf.encode import Order
from loopgguf.errors import QualityError
from loopgguf.evaluation import Quality, measure_qualities
from loopgguf.fidelity import Fidelity, measure_fidelities
from loopgguf.gate import CheckedResult, Gate
from loopgguf.guard import guard_chunks, guard_kinds, refuse_guard
from loopgguf.importance import ImatrixRequest, calibration_chunks, compute_imatrix, given_importance, made_importance, merge_imatrices
from loopgguf.intent import DEFAULT_PROFILE, QuantizeRequest, is_sized, refuse_feedback_options, resolve
from loopgguf.opening import DEFAULT_CTX_SIZE, Settings, cut_text, model_name, open_model
from loopgguf.pipeline import WriteResult
from loopgguf.planfile import SavedPlan, imatrix_digest
from loopgguf.planner import SizedPlan, bits_per_weight, label_of, nearest_label, plan_conversion
from loopgguf.profile import load_profile
from loopgguf.protection import DEFAULT_COVERAGE, known_mask, known_super_weights, refuse_bad_coverage, refuse_existing_protection, save_protection
from loopgguf.publish import SPEAKING_PROMPT, check_outputs, publish, total_bytes
from loopgguf.recovery import pass_gate, refuse_gate, selection_chunks
from loopgguf.reference import known_reference, reference_gguf
from loopgguf.reportfile import Samples, make_document, refuse_existing_report, write_document
from loopgguf.search import refuse_search, search_chunks, search_plan
from loopgguf.source import Source, open_source
from loopgguf.speed import known_speeds
from loopgguf.splits import tokens_sha256
from loopgguf.super_weights import Found, Mask
from loopgguf.tasks import TaskResult, load_task, measure_task
from loopgguf.verify import Recheck, recheck, speak

__all__ = [
    "ComparisonResult",
    "EvaluationResult",
    "Gate",
    "ImatrixRequest",
    "PlanResult",
    "QuantizeRequest",
    "Settings",
    "check_again",
    "compare",
    "compute_imatrix",
    "convert",
    "evaluate",
    "make_plan",
    "merge_imatrices",
    "quantize",
    "reference_gguf",
    "search_super_weights",
    "write_report",
]


def quantize(model: Path, output: Path | None = None, request: QuantizeRequest | None = None, settings: Settings | None = None) -> WriteResult:
    """Turn a checkpoint folder or a GGUF into a quantized GGUF, verified and published; or only plan it (`dry_run`).

    output: default `NAME-TYPE.gguf` for a preset, `NAME-LG-TYPE.gguf` else (TYPE: the preset that `general.file_type`
    names), in the current folder. Raises UsageError for a request that cannot be met (before any work), InputError for a
    bad model or imatrix, OutputError for an output that exists or cannot be written, QualityError when the finished file
    does not pass its checks, or cannot be made to pass the request's gate. A file below 2.5 bits per weight is checked
    for collapse beside the full-precision GGUF, where there is one; then, and with a gate, it is a `CheckedResult`.
    """
    request, settings = request or QuantizeRequest(), settings or Settings()
    gate = request.gate
    _refuse_contradictions(request)
    source, notes = open_model(model, settings)
    selection = selection_chunks(source, request, gate.files, settings) if gate is not None and not request.dry_run else None
    search_text = search_chunks(source, request, settings) if request.search is not None and not request.dry_run else None
    guard_text = guard_chunks(source, request, settings) if request.guard is not None and not request.dry_run else None
    output = output or _foreseen_output(model, request)
    folder = settings.job_folder or job_folder(output or Path(f"{model_name(model)}-LG"))
    settings = replace(settings, job_folder=folder)
    sweep(folder)
    # before an imatrix is made for it; a job that was killed may have given it its name
    if output is not None and not request.keep_split and not request.dry_run:
        check_outputs(source, [output], (), overwrite=settings.overwrite or (settings.resume and folder.exists()))
    resolved = resolve(source, request, settings)
    is_measured = any(text is not None for text in (search_text, guard_text, selection))
    reference, said = reference_gguf(model, replace(settings, job_folder=None)) if is_measured else (None, [])
    notes += said
    if search_text is not None and reference is not None:
        resolved = search_plan(source, resolved, request, reference, search_text, settings, folder)
    if guard_text is not None and reference is not None:
        resolved = guard_kinds(source, resolved, request, reference, guard_text, settings, folder)
    output = output or Path(f"{model_name(model)}-LG-{nearest_label(resolved.plan)}.gguf")
    notes += resolved.notes
    bpw = bits_per_weight(resolved.plan)
    if bpw < LOW_BPW:
        settings.announce(low_bits_warning(bpw, is_sized=resolved.sized is not None))
    notes += _describe_unmeasured(request)
    try:
        if gate is None or selection is None or reference is None:
            result = publish(source, resolved.order(request), output, settings, notes, dry_run=request.dry_run)
        else:
            gated = pass_gate(source, resolved, request, gate, output, reference, selection, settings)
            result = replace(gated, notes=(*notes, *gated.notes))
    except QualityError:  # going on would end in the same way
        _drop_found(folder)
        raise
    if request.dry_run:
        return result
    _drop_found(folder)
    return result if bpw >= LOW_BPW else _with_collapse_check(result, reference or known_reference(source), settings)


def _refuse_contradictions(request: QuantizeRequest) -> None:
    """Raise UsageError where what is to be measured contradicts the rest of a request."""
    if request.gate is not None:
        refuse_gate(request, request.gate)
    if request.search is not None:
        refuse_search(request)
    if request.guard is not None:
        refuse_guard(request)
    refuse_feedback_options(request)


def _drop_found(folder: Path) -> None:
    """Remove from a job folder what was found by measuring, for the file that rests on it is there."""
    drop_stage(folder, SEARCH)
    drop_stage(folder, GUARD)


def _describe_unmeasured(request: QuantizeRequest) -> list[str]:
    """Say what of a request a dry run leaves out."""
    if not request.dry_run:
        return []
    search = ["search: a dry run measures nothing; types may be swapped within the same size"] if request.search is not None else []
    gate = [f"quality gate: {request.gate}; a dry run measures nothing, and recovery may make the file larger"] if request.gate is not None else []
    guard = ["guard of error feedback: a dry run measures nothing"] if request.guard is not None else []
    return [*search, *guard, *gate]


def _with_collapse_check(result: WriteResult, reference: Path | None, settings: Settings) -> WriteResult:
    """Return the result with what its generated text says beside the reference's; a note where there is none to run."""
    if reference is None:
        note = "not checked for collapse: there is no full-precision GGUF of this model yet; `loopgguf evaluate` makes one and checks"
        return replace(result, notes=(*result.notes, note))
    notes = list(result.notes)
    collapse = _collapse_of(result.paths[0], reference, notes, settings)
    return CheckedResult(**{**vars(result), "notes": tuple(notes), "collapse": collapse})


def _foreseen_output(model: Path, request: QuantizeRequest) -> Path | None:
    """Return the default output where it does not depend on what the plan comes to."""
    if request.plan is not None or is_sized(request):
        return None
    if request.quant_type is not None:
        return Path(f"{model_name(model)}-{request.quant_type.upper()}.gguf")
    return Path(f"{model_name(model)}-LG-{label_of(load_profile(request.profile or DEFAULT_PROFILE).file_type)}.gguf")


@dataclass(frozen=True)
class PlanResult:
    """A plan that was only made; `sized` tells more of one by size."""

    saved: SavedPlan
    sized: SizedPlan | None
    notes: tuple[str, ...]


def make_plan(model: Path, request: QuantizeRequest, settings: Settings | None = None, *, measures_speed: bool = False) -> PlanResult:
    """Return the plan of a request and the exact size of its file; encodes nothing but the samples that a size needs.

    measures_speed: see how fast this machine multiplies by weights of the plan's types, too.
    """
    settings = settings or Settings()
    source, notes = open_model(model, settings)
    resolved = resolve(source, request, settings)
    importance = resolved.importance
    digest = imatrix_digest(resolved.plan, importance) if importance is not None and importance.statistics is not None else None
    saved = SavedPlan(resolved.plan, model_name(model), total_bytes(source, resolved.order(request)), digest)
    if measures_speed:
        saved = replace(saved, speeds=known_speeds((row.type for row in saved.plan.rows if len(row.shape) > 1), n_threads=settings.n_threads))
    return PlanResult(saved, resolved.sized, (*notes, *resolved.notes))


def convert(model: Path, output: Path | None = None, outtype: str = "bf16", *, dry_run: bool = False, settings: Settings | None = None) -> WriteResult:
    """Turn a checkpoint folder (or a GGUF) into an F32, F16, BF16 or Q8_0 GGUF, as llama.cpp's converter does."""
    settings = settings or Settings()
    source, notes = open_model(model, settings)
    plan = plan_conversion(source.tensors, source.metadata, outtype)
    output = output or Path(f"{model_name(model)}-{outtype.upper()}.gguf")
    return publish(source, Order(plan), output, settings, notes, dry_run=dry_run)


def check_again(path: Path, against: Path | None = None, settings: Settings | None = None) -> Recheck:
    """Check a finished GGUF again: structure, every value, that llama.cpp runs it, and with `against` every weight beside the model's."""
    settings = settings or Settings()
    source = open_model(against, settings)[0] if against is not None else None
    return recheck(path, source, prompt=SPEAKING_PROMPT, n_threads=settings.n_threads, progress=settings.progress)


@dataclass(frozen=True)
class SuperWeightsResult:
    """A model's super weights, the mask where there is an imatrix, and the files they were written to."""

    found: Found
    mask: Mask | None
    paths: tuple[Path, ...]
    notes: tuple[str, ...]


def search_super_weights(
    model: Path,
    calibration: ImatrixRequest | None = None,
    output: Path | None = None,
    *,
    imatrix: Path | None = None,
    use_imatrix: bool = True,
    coverage: float = DEFAULT_COVERAGE,
    settings: Settings | None = None,
) -> SuperWeightsResult:
    """Return a model's super weights: those beside `imatrix`, those found before, or those found now on the calibration text.

    The mask needs an imatrix, given or made as `quantize` makes it; without one there is none. output: a .json file for the
    super weights, the mask beside it as .safetensors; None: nothing is written. Raises as `compute_imatrix`.
    """
    calibration, settings = calibration or ImatrixRequest(), settings or Settings()
    refuse_bad_coverage(coverage)
    if output is not None:
        refuse_existing_protection(output, overwrite=settings.overwrite)
    source, notes = open_model(model, settings)
    found, origin = known_super_weights(source, imatrix, lambda: calibration_chunks(source, calibration, settings), settings)
    assert found is not None
    notes.append(f"super weights: {origin}")
    mask = None
    if use_imatrix:
        importance = given_importance(source, imatrix) if imatrix is not None else made_importance(source, calibration, settings)
        assert importance.statistics is not None
        mask = known_mask(source, importance.statistics, imatrix, coverage, settings)
        notes += importance.notes
    paths = save_protection(found, mask, output, overwrite=settings.overwrite) if output is not None else ()
    return SuperWeightsResult(found, mask, paths, tuple(notes))


# --- evaluation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluationResult:
    """The measured quality of a file against its reference, and on what."""

    candidate: Path
    reference: Path
    quality: Quality
    chunks: Chunks
    notes: tuple[str, ...]
    fidelity: Fidelity = field(default_factory=Fidelity)


@dataclass(frozen=True)
class ComparisonResult:
    """Files measured against one reference on one text, sorted by size; `baseline` is the name of the one they are compared with,
    `reference_gguf` what was run for the reference."""

    files: tuple[ComparedFile, ...]
    reference: Path
    reference_gguf: Path
    baseline: str
    chunks: Chunks
    notes: tuple[str, ...]
    tasks: tuple[TaskResult, ...] = ()  # accuracies in the order of `files`
    fidelities: tuple[Fidelity, ...] = ()  # in the order of `files`, empty ones where no level was asked for
    collapses: tuple[CollapseCheck | None, ...] = ()  # in the order of `files`, of those below 2.5 bits per weight


def evaluate(
    candidate: Path,
    reference: Path,
    files: Sequence[str | Path] = (),
    *,
    levels: Sequence[str] = (),
    ctx_size: int = DEFAULT_CTX_SIZE,
    n_chunks: int | None = None,
    settings: Settings | None = None,
) -> EvaluationResult:
    """Measure a GGUF against its full-precision reference (a GGUF or a checkpoint folder) on held-out text.

    files: texts, default the held-out text that ships with the package. levels: some of `fidelity.LEVELS`, measured
    besides that of the model. Both models are run by llama.cpp with the same settings, side by side; no logit file is
    written. Raises InputError for bad files, texts or different vocabularies.
    """
    result = compare([candidate], reference, files, levels=levels, ctx_size=ctx_size, n_chunks=n_chunks, settings=settings)
    return EvaluationResult(candidate, reference, result.files[0].quality, result.chunks, result.notes, result.fidelities[0])


def compare(
    candidates: Sequence[Path],
    reference: Path,
    files: Sequence[str | Path] = (),
    *,
    baseline: str | None = None,
    tasks: Sequence[Path] = (),
    levels: Sequence[str] = (),
    ctx_size: int = DEFAULT_CTX_SIZE,
    n_chunks: int | None = None,
    settings: Settings | None = None,
) -> ComparisonResult:
    """Measure GGUFs of one model against its full-precision reference on the same text, the reference being run once.

    baseline: the path, file name or name without `.gguf` of the candidate that the others are compared with, default the
    first. tasks: JSONL files of questions, see `tasks.py`. Everything else as in `evaluate`. Raises UsageError for a file
    given twice or an unknown baseline.
    """
    settings = settings or Settings()
    names, at = short_names(candidates), find_baseline(baseline, candidates)
    questions = [load_task(path) for path in tasks]
    sources = [open_source(candidate) for candidate in candidates]  # first: a bad file is refused before a reference is converted for it
    reference_path, notes = reference_gguf(reference, settings)
    chunks = cut_text(open_source(reference_path), files, "heldout", ctx_size, n_chunks, settings)
    notes += [note for name, source in zip(names, sources, strict=True) for note in _texts_used_twice(name, source, chunks)]
    n_threads, progress = settings.n_threads, settings.progress
    measured_below = measure_fidelities(candidates, reference_path, chunks.tokens, levels, n_threads=n_threads, progress=progress)
    fidelities = dict(zip(candidates, measured_below, strict=True))
    qualities = measure_qualities(candidates, reference_path, chunks.tokens, n_threads=n_threads, progress=progress)
    measured = compare_measured(candidates, qualities, at)
    paths = [file.path for file in measured]
    results = [measure_task(task, paths, reference_path, n_threads=n_threads, progress=progress) for task in questions]
    collapses = [_collapse_of(file.path, reference_path, notes, settings) if file.bpw < LOW_BPW else None for file in measured]
    return ComparisonResult(
        measured,
        reference,
        reference_path,
        names[at],
        chunks,
        (*notes, *chunks.notes),
        tuple(results),
        tuple(fidelities[path] for path in paths),
        tuple(collapses),
    )


def _texts_used_twice(name: str, source: Source, chunks: Chunks) -> list[str]:
    """Say it when a file was calibrated, or had to pass a gate, on the text that it is measured on."""
    notes = []
    for use, key in (("calibration", "quantize.imatrix.dataset"), ("selection", "loopgguf.selection.dataset")):
        names = str(source.metadata[key].data).split(", ") if key in source.metadata else []
        overlap = [text for text in chunks.names if text in names]
        recorded = source.metadata.get(f"loopgguf.{use}.sha256")
        if recorded is not None and recorded.data == tokens_sha256(chunks.tokens):
            overlap = list(chunks.names)
        if overlap:
            notes.append(f"{', '.join(sorted(overlap))} is also the {use} text of {name}: its figures flatter; evaluate on other text")
    return notes


def _collapse_of(path: Path, reference: Path, notes: list[str], settings: Settings) -> CollapseCheck | None:
    """Return whether a file still writes; where it cannot be made to, that is a note, and what was made and measured stays."""
    try:
        return check_collapse(path, reference, n_threads=settings.n_threads)
    except QualityError as error:
        notes.append(f"not checked for collapse: {error}")
        return None


REPORT_TOKENS = 64  # of a generation sample


def write_report(result: ComparisonResult, name: Path, *, command: str = "", settings: Settings | None = None) -> tuple[Path, ...]:
    """Write what was measured as NAME.json, NAME.md and NAME.html, and return their paths.

    Each model continues one prompt first; one that cannot is a note in the report. command: what the report says it was
    made by. Raises OutputError when a file exists (unless `settings.overwrite`) or cannot be written.
    """
    settings, notes = settings or Settings(), list(result.notes)
    refuse_existing_report(name, overwrite=settings.overwrite)
    paths = [result.reference_gguf, *(file.path for file in result.files)]
    spoken: list[str | None] = []
    for number, path in enumerate(paths, 1):
        try:
            spoken.append(speak(path, SPEAKING_PROMPT, REPORT_TOKENS, n_threads=settings.n_threads))
        except QualityError as error:
            spoken.append(None)
            notes.append(f"no generation sample: {error}")
        if settings.progress is not None:
            settings.progress("generation samples", number, len(paths))
    document = make_document(
        result.files,
        reference=result.reference_gguf,
        reference_name=result.reference.name,
        baseline=result.baseline,
        texts=result.chunks.names,
        notes=notes,
        command=command,
        tasks=result.tasks,
        fidelities=result.fidelities,
        collapses=result.collapses,
        samples=Samples(SPEAKING_PROMPT, REPORT_TOKENS, spoken[0], tuple(spoken[1:])),
    )
    return write_document(document, name, overwrite=settings.overwrite)
