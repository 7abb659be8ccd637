"""What a user reads: plans, quality and files as rich tables, and the same facts as JSON-able values.

Renders results; measures and decides nothing. Every number keeps the name it has elsewhere (`estimated_*`,
`measured_*`, llama-perplexity's labels).
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.table import Table
from rich.text import Text

from loopgguf.architectures import tensor_role
from loopgguf.attention import load_attention
from loopgguf.calibration import Share
from loopgguf.collapse import CollapseCheck
from loopgguf.comparison import ComparedFile
from loopgguf.container import GgufFile, Value, is_gguf, read_gguf, read_shards
from loopgguf.curvature import GramSet, LayerSummary, summarize_layer
from loopgguf.errors import InputError
from loopgguf.evaluation import INTERVAL_PERCENT, Measure, Quality, labelled
from loopgguf.fidelity import Fidelity, TensorFidelity, snr_db
from loopgguf.formats import FORMATS, GgmlType
from loopgguf.gate import CheckedResult, GateResult
from loopgguf.grams import find_grams, load_grams
from loopgguf.pipeline import FeedbackLog, WriteResult
from loopgguf.planner import Plan, bits_per_weight, summarize_fallbacks, to_json
from loopgguf.speed import PROMPT_TOKENS, Speed
from loopgguf.statistics import Statistics, load_imatrix
from loopgguf.summary import (
    Comparison,
    ExpertCoverage,
    LayerAverage,
    TensorSummary,
    average_layers,
    compare_statistics,
    judge,
    summarize_experts,
    summarize_tensors,
)
from loopgguf.super_weights import TOLERANCE, Found, Mask, SuperWeight, add_masks
from loopgguf.tasks import TaskResult
from loopgguf.verify import Recheck

MAX_VALUE_CHARACTERS = 72  # of a metadata value shown in a table
PERCENT_LABELS = ("Cor(ln(PPL(Q)), ln(PPL(base)))", "Mean Δp", "RMS Δp", "Same top p")


def table(*columns: str, title: str = "", numbers: Iterable[str] = ()) -> Table:
    """Return an empty plain table; the columns in `numbers` are right-aligned."""
    result = Table(title=title or None, title_justify="left", box=None, pad_edge=False, header_style="bold")
    for column in columns:
        result.add_column(column, justify="right" if column in set(numbers) else "left", no_wrap=column not in ("reason", "value"))
    return result


def shape_text(shape: Sequence[int]) -> str:
    """Return a row-major shape as `rows × columns`."""
    return " × ".join(str(n) for n in shape)


def names_text(names: Sequence[str], n_shown: int = 3) -> str:
    """Return the first names of a list, and how many more there are."""
    more = f" and {len(names) - n_shown} more" if len(names) > n_shown else ""
    return ", ".join(names[:n_shown]) + more


def shares_table(shares: Sequence[Share]) -> Table:
    """Return one line per source of calibration text: documents used and read, tokens, share of all tokens."""
    result = table("source", "documents", "read", "tokens", "share", numbers=("documents", "read", "tokens", "share"))
    total = sum(share.n_tokens for share in shares)
    for share in shares:
        result.add_row(share.name, f"{share.n_documents:,}", f"{share.n_read:,}", f"{share.n_tokens:,}", f"{share.n_tokens / total:.1%}")
    return result


# --- plan -------------------------------------------------------------------------------------------------------------


def plan_table(plan: Plan, *, explain: bool = False) -> Table:
    """Return one line per tensor: what it is, what it becomes, its exact bytes, and why.

    A plan by size has the estimated error too, and with `explain` what the neighbouring types would do.
    """
    estimates = any(row.estimated_error is not None for row in plan.rows)
    headings = ("tensor", "shape", "from", "to", "bytes", *(("est. error",) if estimates else ()), "reason")
    result = table(*headings, numbers=("bytes", "est. error"))
    for row in plan.rows:
        reason = "; ".join(filter(None, (row.reason, row.fallback, row.explanation if explain else "")))
        estimate = "" if row.estimated_error is None else f"{row.estimated_error:.2e}"
        cells = (row.name, shape_text(row.shape), row.source_type.name, row.type.name, f"{row.n_bytes:,}")
        result.add_row(*cells, *((estimate,) if estimates else ()), reason)
    return result


def type_table(items: Iterable[tuple[GgmlType, int, int]], title: str = "", speeds: Mapping[GgmlType, Speed] | None = None) -> Table:
    """Return tensors counted by type from (type, weights, bytes) of each, largest share first, with a total line.

    speeds: of the types on this machine, told as tokens per second of a matrix product with 10⁹ weights.
    """
    totals: dict[GgmlType, list[int]] = defaultdict(lambda: [0, 0, 0])
    for ggml_type, n_weights, n_bytes in items:
        for i, n in enumerate((1, n_weights, n_bytes)):
            totals[ggml_type][i] += n
    fast = ("tok/s", "prompt tok/s") if speeds else ()
    headings = ("tensors", "weights", "bytes", "bpw", *fast)
    result = table("type", *headings, title=title, numbers=headings)
    for ggml_type, (n_tensors, n_weights, n_bytes) in sorted(totals.items(), key=lambda item: -item[1][2]):
        result.add_row(ggml_type.name, str(n_tensors), f"{n_weights:,}", f"{n_bytes:,}", f"{FORMATS[ggml_type].bpw:.4g}", *_speed_cells(speeds, ggml_type))
    n_tensors, n_weights, n_bytes = (sum(t[i] for t in totals.values()) for i in range(3))
    result.add_section()
    result.add_row("all", str(n_tensors), f"{n_weights:,}", f"{n_bytes:,}", f"{8 * n_bytes / n_weights:.4f}" if n_weights else "")
    return result


SPEED_NOTE = f"tok/s: of 10⁹ weights of the type on this machine, one token at a time as text is generated, and {PROMPT_TOKENS} at a time as prompts are read"


def _speed_cells(speeds: Mapping[GgmlType, Speed] | None, ggml_type: GgmlType) -> list[str]:
    speed = speeds.get(ggml_type) if speeds else None
    return [] if speed is None else [f"{speed.generation / 1e9:.2f}", f"{speed.prompt / 1e9:.2f}"]


def plan_types(plan: Plan, speeds: Mapping[GgmlType, Speed] | None = None) -> Table:
    """Return the plan's tensors counted by type; with the types' speeds on this machine where they were measured."""
    return type_table(((row.type, row.n_weights, row.n_bytes) for row in plan.rows), speeds=speeds)


def size_line(plan: Plan, total_bytes: int) -> str:
    """Return the size of the finished file in words: exact bytes, and bits per weight of the tensors."""
    return f"{total_bytes:,} bytes ({total_bytes / 1e6:,.1f} MB), {bits_per_weight(plan):.3f} bits per weight"


def written_lines(result: WriteResult) -> list[str]:
    """Return what a user should know of a written (or planned) model, a line each."""
    plan = result.plan
    lines = [f"{plan.intent}: {size_line(plan, result.total_bytes)}, plan {plan.hash[:12]}"]
    if fallbacks := summarize_fallbacks(plan):
        lines.append(fallbacks)
    if plan.without_importance:
        lines.append(f"{len(plan.without_importance)} tensors are encoded without imatrix data: {names_text(plan.without_importance)}")
    lines += [f"{rule}: {n} tensors" for rule, n in plan.reasons.items() if rule.startswith("--")]
    if result.is_dry_run:
        return [*lines, f"dry run: nothing was written; would write {', '.join(str(p) for p in result.paths)}"]
    errors = [log.sampled.relative_error for log in result.logs.values() if log.sampled is not None]
    if errors:
        lines.append(
            f"measured error of {len(errors)} encoded tensors, sampled rows: mean {np.mean(errors):.3g} of the squared weights, worst {max(errors):.3g}"
        )
    floored = {name: log.n_floored for name, log in result.logs.items() if log.n_floored}
    if floored:
        lines.append(f"sanitised: {sum(floored.values())} importances too small to use were raised, in {len(floored)} tensors ({names_text(list(floored))})")
    if feedback := [matrix for log in result.logs.values() for matrix in log.feedback]:
        lines.append(feedback_line(feedback))
    lines += super_weight_lines(result)
    lines += _check_lines(result)
    lines.append("seconds: " + ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in result.seconds.items()))
    lines.append(f"it says: {result.sample_text!r}")
    return [*lines, f"wrote {', '.join(str(p) for p in result.paths)}"]


def _check_lines(result: WriteResult) -> list[str]:
    """Return what running the file beside its reference came to."""
    if not isinstance(result, CheckedResult):
        return []
    lines = []
    if result.gate is not None:
        gate = result.gate
        reading = next(step.after for step in reversed(gate.steps) if step.is_better)
        lines.append(f"quality gate passed by file {len(gate.steps)}: {reading}; {gate.gate} on {gate.n_scored:,} scored tokens of {', '.join(gate.texts)}")
    return [*lines, *([result.collapse.verdict] if result.collapse is not None else [])]


def _gate_json(gate: GateResult) -> dict[str, object]:
    limits = {key: limit for key, limit in asdict(gate.gate).items() if key != "files"}
    return {**limits, "texts": list(gate.texts), "n_scored": gate.n_scored, "steps": [asdict(step) for step in gate.steps]}


def collapse_json(collapse: CollapseCheck | None) -> dict[str, object] | None:
    """Return a check for collapse as JSON-able values; null where none was made."""
    if collapse is None:
        return None
    writing = {"writing": asdict(collapse.writing), "reference": asdict(collapse.reference)}
    return {"is_collapsed": collapse.is_collapsed, "verdict": collapse.verdict, **writing, "texts": list(collapse.texts)}


def _checks_json(result: WriteResult) -> dict[str, object]:
    gate, collapse = (result.gate, result.collapse) if isinstance(result, CheckedResult) else (None, None)
    return {"gate": None if gate is None else _gate_json(gate), "collapse": collapse_json(collapse)}


def feedback_line(logs: Sequence[FeedbackLog]) -> str:
    """Return what error feedback came to: which way won how often, the mean held-out error beside the plain encoder's, and how many
    matrices make up for the drift of their inputs."""
    ways = Counter(log.way for log in logs)
    won = ", ".join(f"{way} {n}" for way, n in ways.most_common())
    ratio = np.mean([log.held_out_ratio for log in logs])
    n_aimed = sum(log.is_aimed for log in logs)
    drift = f"; {n_aimed} make up for the drift of their inputs, and their error is from there" if n_aimed else ""
    return f"error feedback: {won} of {len(logs)} matrices; estimated error on held-out tokens {ratio:.3f} × the plain encoder's{drift}"


def recheck_table(result: Recheck) -> Table:
    """Return the error of a file's weights against its model's, by type: ‖w − ŵ‖² / ‖w‖² of its tensors."""
    by_type: dict[str, dict[str, float]] = {}
    for name, (ggml_type, error) in result.relative_errors.items():
        by_type.setdefault(ggml_type.name, {})[name] = error
    shown = table("type", "tensors", "mean error", "worst", "of", numbers=("tensors", "mean error", "worst"))
    for name, errors in sorted(by_type.items(), key=lambda item: np.mean(list(item[1].values()))):
        worst = max(errors, key=lambda tensor: errors[tensor])
        shown.add_row(name, str(len(errors)), f"{np.mean(list(errors.values())):.3g}", f"{errors[worst]:.3g}", worst)
    return shown


def recheck_line(result: Recheck) -> str:
    """Return what a second check found, in words."""
    n_files = len(result.paths)
    digest = "no .sha256 to compare with" if not result.n_manifests else f"SHA-256 as in {result.n_manifests} of {n_files} .sha256"
    return f"{result.paths[0]}: {result.n_tensors} tensors, {result.n_bytes:,} bytes of weights, all finite; {digest}; it says: {result.sample_text!r}"


def recheck_json(result: Recheck) -> dict[str, object]:
    """Return what a second check found as JSON-able values."""
    errors = {name: {"type": ggml_type.name, "relative_error": error} for name, (ggml_type, error) in result.relative_errors.items()}
    return {
        "paths": [str(path) for path in result.paths],
        "n_tensors": result.n_tensors,
        "n_bytes": result.n_bytes,
        "n_manifests": result.n_manifests,
        "says": result.sample_text,
        "tensors": errors,
    }


def super_weight_lines(result: WriteResult) -> list[str]:
    """Return what became of each super weight, read back from the written file, and of the mask."""
    lines = []
    for kept in result.super_weights or ():
        raised = f", raised from {kept.type_before.name}" if kept.type_before is not kept.type else ""
        missed = f": misses by more than {TOLERANCE:.0%}" if kept.miss > TOLERANCE else ""
        lines.append(
            f"super weight {place_text(kept.weight)}: {kept.weight.spike.value:.6g} → {kept.decoded:.6g} ({kept.miss:.2%}), {kept.type.name}{raised}{missed}"
        )
    mask = add_masks(*(log.mask for log in result.logs.values()))
    if mask is not None:
        n_tensors = sum(log.mask is not None for log in result.logs.values())
        error, plain = mask.relative_errors
        lines.append(
            f"super-weight mask: {mask.n:,} weights in {n_tensors} tensors, within {TOLERANCE:.0%}: {mask.n_kept / mask.n:.1%} "
            f"(plain encoder {mask.n_kept_plain / mask.n:.1%}), root mean square error {error:.2%} (plain encoder {plain:.2%})"
        )
    return lines


def place_text(weight: SuperWeight) -> str:
    """Return where a super weight is: `blk.1.ffn_down.weight[788, 2427]`, with the expert's number where there is one."""
    expert = "" if weight.matrix is None else f"{weight.matrix}, "
    return f"{weight.name}[{expert}{weight.spike.row}, {weight.spike.column}]"


def _super_json(result: WriteResult) -> dict[str, object] | None:
    if result.super_weights is None:
        return None
    weights = [
        {"name": k.weight.name, "matrix": k.weight.matrix, "row": k.weight.spike.row, "column": k.weight.spike.column}
        | {"value": k.weight.spike.value, "decoded": k.decoded, "miss": k.miss, "type": k.type.name, "type_before": k.type_before.name}
        for k in result.super_weights
    ]
    mask = add_masks(*(log.mask for log in result.logs.values()))
    if mask is None:
        return {"weights": weights, "mask": None}
    error, plain = mask.relative_errors
    counts = {"n": mask.n, "n_kept": mask.n_kept, "n_kept_plain": mask.n_kept_plain}
    return {"weights": weights, "mask": {**counts, "measured_relative_error": error, "measured_relative_error_plain": plain}}


def written_json(result: WriteResult) -> dict[str, object]:
    """Return a written (or planned) model as JSON-able values."""
    return {
        "paths": [str(path) for path in result.paths],
        "total_bytes": result.total_bytes,
        "dry_run": result.is_dry_run,
        "plan": json.loads(to_json(result.plan)),
        "seconds": dict(result.seconds),
        "sample_text": result.sample_text,
        "tensors": {name: asdict(log) for name, log in result.logs.items()},
        "notes": list(result.notes),
        "super_weights": _super_json(result),
        **_checks_json(result),
    }


def super_weight_table(found: Found) -> Table:
    """Return one line per super weight: where, its value, how its input and output spike, and the perplexity without it."""
    numbers = ("row", "column", "value", "input", "× median", "output", "× median ", "share", "pass", "measured perplexity without it")
    ppl = f"measured perplexity as it is: {found.measured_perplexity:.4f}, {found.n_tokens:,} tokens of {', '.join(found.texts)}"
    result = table("tensor", *numbers, numbers=numbers, title=ppl)
    for weight in found.weights:
        spike, expert = weight.spike, "" if weight.matrix is None else f"[{weight.matrix}]"
        cells = (
            f"{spike.value:.6g}",
            f"{spike.input:.4g}",
            f"{spike.input_ratio:.0f}",
            f"{spike.output:.4g}",
            f"{spike.output_ratio:.0f}",
            f"{spike.share:.2f}",
        )
        result.add_row(weight.name + expert, str(spike.row), str(spike.column), *cells, str(weight.n_pass), f"{weight.measured_perplexity:.4f}")
    return result


def super_weight_summary(found: Found) -> list[str]:
    """Return how many super weights there are, in words."""
    if not found.weights:
        return ["no super weights: no ffn_down makes a spike of its output from a spike of its input"]
    more = [] if found.is_complete else ["the search ended with a spike left: there are more"]
    return [f"{len(found.weights)} super weights", *more]


def mask_table(mask: Mask, *, n_shown: int = 12) -> Table:
    """Return how many weights of the mask lie in which tensor, the fullest first."""
    result = table(
        "tensor", "weights", numbers=("weights",), title=f"mask of the {mask.n_weights:,} largest |w|·√importance ({mask.coverage:.4%} of the weights with one)"
    )
    ranked = sorted(mask.indices.items(), key=lambda item: -len(item[1]))
    for name, places in ranked[:n_shown]:
        result.add_row(name, f"{len(places):,}")
    if rest := ranked[n_shown:]:
        result.add_row(f"{len(rest)} more", f"{sum(len(places) for _, places in rest):,}")
    return result


def super_weights_json(found: Found, mask: Mask | None) -> dict[str, object]:
    """Return super weights, and how many weights of the mask each tensor holds, as JSON-able values."""
    counts = None if mask is None else {"coverage": mask.coverage, "n": mask.n_weights, "tensors": {name: len(p) for name, p in mask.indices.items()}}
    return {**found.to_json(), "mask": counts}


# --- quality ----------------------------------------------------------------------------------------------------------


def _measure_text(label: str, measure: Measure) -> str:
    unit = " %" if label in PERCENT_LABELS else ""
    error = "" if measure.standard_error is None else f" ± {measure.standard_error:.2g}"
    return f"{measure.value:.6g}{error}{unit}"


def quality_table(quality: Quality, title: str = "") -> Table:
    """Return every measured number under llama-perplexity's own name; a number left out says why."""
    result = table("measured", "value", title=title)
    for label, measure in labelled(quality).items():
        result.add_row(label, _measure_text(label, measure) if measure is not None else Text(f"left out: {quality.omitted[label]}", style="dim"))
    return result


def quality_json(quality: Quality) -> dict[str, object]:
    """Return the quality as JSON-able values, without the per-token arrays."""
    numbers = {label: asdict(measure) if measure is not None else {"omitted": quality.omitted[label]} for label, measure in labelled(quality).items()}
    return {"n_chunks": quality.n_chunks, "n_ctx": quality.n_ctx, "n_scored": quality.n_scored, "tokens_sha256": quality.tokens_sha256, "measured": numbers}


def scored_text(quality: Quality, texts: Sequence[str]) -> str:
    """Return in words what a quality was measured on."""
    return f"{quality.n_scored:,} scored tokens, {quality.n_chunks} chunks of {quality.n_ctx}, of {', '.join(texts)}"


def with_error(measure: Measure | None, n_digits: int, unit: str = "") -> str:
    """Return a number and its standard error with `n_digits` decimals each; nothing for None."""
    if measure is None:
        return ""
    error = "" if measure.standard_error is None else f" ± {measure.standard_error:.{n_digits}f}"
    return f"{measure.value:.{n_digits}f}{error}{unit}"


def measured_cells(quality: Quality) -> tuple[str, ...]:
    """Return the numbers that go under `MEASURED_COLUMNS`."""
    return (
        with_error(quality.mean_kld_nats, 5),
        with_error(quality.kld_quantiles_nats[99.0], 3),
        with_error(quality.same_top_percent, 2, " %"),
        with_error(quality.perplexity_ratio, 4),
    )


MEASURED_COLUMNS = ("mean KLD", "99 % KLD", "same top p", "PPL ratio")


def baseline_text(file: ComparedFile) -> str:
    """Return the ratio of a file's mean KLD to the baseline's, with its interval over chunks."""
    if file.to_baseline is None:
        return "baseline"
    ratio, interval = file.to_baseline.mean_kld_ratio, file.to_baseline.mean_kld_ratio_interval
    if ratio is None:
        return "(the baseline's is 0)"
    return f"{ratio.value:.3f}" + (f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval is not None else "")


def compared_table(files: Sequence[ComparedFile], baseline: str, title: str = "") -> Table:
    """Return one line per file; `*` in the last column marks those that no other file beats in size and mean KLD."""
    headings = ("file", "bytes", "bpw", *MEASURED_COLUMNS, f"mean KLD ÷ {baseline}'s [{INTERVAL_PERCENT:g} %]", "Pareto")
    result = table(*headings, title=title, numbers=headings[1:-1])
    for file in files:
        mark = "*" if file.is_pareto else ""
        result.add_row(Text(file.name), f"{file.n_bytes:,}", f"{file.bpw:.3f}", *measured_cells(file.quality), Text(baseline_text(file)), mark)
    return result


def compared_json(files: Sequence[ComparedFile]) -> list[dict[str, object]]:
    """Return compared files as JSON-able values; `to_baseline` is null for the baseline itself."""
    return [
        {
            "name": file.name,
            "bytes": file.n_bytes,
            "bpw": file.bpw,
            **quality_json(file.quality),
            "to_baseline": asdict(file.to_baseline) if file.to_baseline is not None else None,
            "is_pareto": file.is_pareto,
        }
        for file in files
    ]


def _by_role(tensors: Sequence[TensorFidelity]) -> dict[str, list[TensorFidelity]]:
    roles: dict[str, list[TensorFidelity]] = defaultdict(list)
    for tensor in tensors:
        roles[tensor_role(tensor.name).kind].append(tensor)
    return roles


def fidelity_tables(fidelity: Fidelity, title: str = "") -> list[Table]:
    """Return the errors of a file's tensors by role, and of its blocks' outputs by layer; no table for a level that was not measured."""
    tables = []
    if fidelity.tensors:
        numbers = ("tensors", "bpw", "MAE", "relative error", "SNR dB", "worst")
        tables.append(table("role", *numbers, "of", title=f"{title}: weights by role" if title else "weights by role", numbers=numbers))
        for role, tensors in _by_role(fidelity.tensors).items():
            tables[-1].add_row(role, *_role_cells(tensors))
    if fidelity.layers:
        headings = ("layer", "cosine similarity", "relative error")
        tables.append(table(*headings, title=f"{title}: outputs of blocks" if title else "outputs of blocks", numbers=headings))
        for layer in fidelity.layers:
            tables[-1].add_row(str(layer.layer), with_error(layer.cosine, 6), with_error(layer.relative_error, 6))
    return tables


def _role_cells(tensors: Sequence[TensorFidelity]) -> tuple[str, ...]:
    """Return the means over the weights of all tensors of a role, and the tensor that has lost most of itself."""
    worst, weights = max(tensors, key=lambda t: t.relative_error), [t.n_weights for t in tensors]
    bpw, mae, relative = np.average([(t.bpw, t.mae, t.relative_error) for t in tensors], axis=0, weights=weights).tolist()
    snr = snr_db(relative)
    cells = str(len(tensors)), f"{bpw:.4g}", f"{mae:.3g}", f"{relative:.3g}", "∞" if snr is None else f"{snr:.1f}"
    return *cells, f"{worst.relative_error:.3g}", f"{worst.name} {worst.type.name}"


def tensor_error_json(tensor: TensorFidelity) -> dict[str, object]:
    """Return the error of one tensor's weights as JSON-able values; the name and type are left to the caller."""
    quantiles = {f"{percent:g}": value for percent, value in tensor.abs_error_quantiles.items()}
    return {"mae": tensor.mae, "relative_error": tensor.relative_error, "snr_db": tensor.snr_db, "abs_error_quantiles": quantiles}


def layers_json(fidelity: Fidelity) -> list[dict[str, object]]:
    """Return how close the outputs of a file's blocks are, as JSON-able values."""
    return [{"layer": layer.layer, "cosine": asdict(layer.cosine), "relative_error": asdict(layer.relative_error)} for layer in fidelity.layers]


def fidelity_json(fidelity: Fidelity) -> dict[str, object]:
    """Return a file's errors by tensor and by layer as JSON-able values; empty lists for levels that were not measured."""
    tensors = [{"name": t.name, "type": t.type.name, "bpw": t.bpw, **tensor_error_json(t)} for t in fidelity.tensors]
    return {"tensors": tensors, "layers": layers_json(fidelity)}


def tasks_table(tasks: Sequence[TaskResult], names: Sequence[str]) -> Table:
    """Return one line per task and file: right answers of the file and of the reference, and their paired difference."""
    headings = ("task", "questions", "file", "right", "reference", "difference")
    result = table(*headings, numbers=("questions", "right", "reference", "difference"))
    for task in tasks:
        for name, accuracy in zip(names, task.accuracies, strict=True):
            numbers = (accuracy.accuracy_percent, task.reference_percent, accuracy.difference_percent)
            result.add_row(Text(f"{task.name} ({task.kind})"), f"{task.n_items:,}", Text(name), *(with_error(number, 2, " %") for number in numbers))
    return result


def tasks_json(tasks: Sequence[TaskResult]) -> list[dict[str, object]]:
    """Return task results as JSON-able values; `accuracies` are in the order of the files."""
    return [asdict(task) for task in tasks]


# --- inspect ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inspection:
    """A GGUF's shards; if it is an imatrix, the statistics it holds and what the files beside it say of each layer."""

    files: tuple[GgufFile, ...]
    statistics: Statistics | None = None
    layers: tuple[LayerSummary, ...] = ()


def inspect_file(path: Path) -> Inspection:
    """Return what a file holds: a GGUF model (split or whole), or an imatrix in either form. Raises InputError."""
    if not path.is_file():
        got = "a folder" if path.is_dir() else "something that is no file" if path.exists() else "no such file"
        raise InputError(f"cannot inspect {path}: got {got}, expected a GGUF or an imatrix file. Check the path")
    if not is_gguf(path):
        return Inspection((), load_imatrix(path), tuple(summarize_layers(path)))
    first = read_gguf(path)
    kind = first.metadata.get("general.type")
    if kind is not None and kind.data == "imatrix":
        return Inspection((first,), load_imatrix(path), tuple(summarize_layers(path)))
    return Inspection(read_shards(path))


def value_text(value: Value) -> str:
    """Return a metadata value on one short line: arrays by their length and first items, strings cut."""
    if isinstance(value.data, list):
        assert value.item_type is not None
        head = ", ".join(repr(item) for item in value.data[:4])
        return _cut(f"{value.item_type.name.lower()} × {len(value.data):,}: {head}{', …' if len(value.data) > 4 else ''}")
    return _cut(repr(value.data) if isinstance(value.data, str) else str(value.data))


def _cut(text: str) -> str:
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[: MAX_VALUE_CHARACTERS - 1] + "…"


def metadata_table(file: GgufFile) -> Table:
    """Return every metadata key with its type and value."""
    result = table("key", "type", "value")
    for key, value in file.metadata.items():
        result.add_row(key, value.type.name.lower(), Text(value_text(value)))
    return result


def file_types(files: Sequence[GgufFile]) -> Table:
    """Return a model's tensors counted by type, over all its shards."""
    return type_table((t.type, int(np.prod(t.shape, dtype=np.int64)), t.n_bytes) for f in files for t in f.tensors)


def tensor_table(files: Sequence[GgufFile]) -> Table:
    """Return one line per tensor of a model."""
    result = table("tensor", "shape", "type", "bytes", numbers=("bytes",))
    for info in (t for f in files for t in f.tensors):
        result.add_row(info.name, shape_text(info.shape), info.type.name, f"{info.n_bytes:,}")
    return result


def summarize_layers(imatrix: Path) -> list[LayerSummary]:
    """Return what the Gram matrices and the attention beside an imatrix say of each layer; nothing where there are none."""
    grams, attention = load_grams(imatrix).train if find_grams(imatrix) else GramSet(), load_attention(imatrix)
    layers = {layer for group, _ in grams.inputs if (layer := tensor_role(group).layer) is not None} | attention.keys()
    return [summarize_layer(layer, grams, attention[layer].first if layer in attention else None) for layer in sorted(layers)]


def sink_tables(layers: Sequence[LayerSummary]) -> list[Table]:
    """Return a table with a line per layer: how much of the attention and of H's and H_w's trace the first token holds, and
    max/mean of diag(H); no table for no layers. A sink shows as shares near 1 in attention, attn_k and attn_v."""
    if not layers:
        return []
    inputs = [kind for kind in ("attn_norm", "ffn_down") if any(kind in row.input_shares for row in layers)]
    weighted = [kind for kind in ("attn_q", "attn_k", "attn_v", "ffn_down") if any(kind in row.weighted_shares for row in layers)]
    shown = ["attention"] if any(row.attention_share is not None for row in layers) else []
    columns = [*shown, *(f"H {kind}" for kind in inputs), *(f"H_w {kind}" for kind in weighted), *(f"max/mean {kind}" for kind in inputs)]
    title = "The first token's share of attention and of the traces of Gram matrices" + (", and max/mean of diag(H)" if inputs else "")
    result = table("layer", *columns, title=title, numbers=columns)
    for row in layers:
        shares = [row.attention_share] if shown else []
        shares += [*(row.input_shares.get(kind) for kind in inputs), *(row.weighted_shares.get(kind) for kind in weighted)]
        ratios = (row.diagonal_ratios.get(kind) for kind in inputs)
        cells = [*("" if share is None else f"{share:.2f}" for share in shares), *("" if ratio is None else f"{ratio:.4g}" for ratio in ratios)]
        result.add_row(str(row.layer), *cells)
    return [result]


def statistics_table(rows: Sequence[TensorSummary]) -> Table:
    """Return llama-imatrix's `--show-statistics` of mean squared activations, a line per weight, in its order and under its names."""
    result = table("Layer", "Tensor", *_STATISTICS, numbers=_STATISTICS)
    for row in rows:
        numbers = (row.total, row.least, row.largest, row.mean, row.deviation)
        result.add_row(
            "-" if row.layer is None else str(row.layer),
            row.kind,
            *(f"{n:.4g}" for n in numbers),
            f"{100 * row.active:.2f} %",
            f"{row.n_columns:,}",
            f"{row.entropy_bits:.4f}",
            f"{100 * row.entropy_share:.2f} %",
            f"{100 * row.zd:.2f} %",
            f"{row.cosine:.4f}",
            f"{row.n_tokens:,}",
        )
    return result


_STATISTICS = ("Σ(Act²)", "Min", "Max", "μ", "σ", "% Active", "N", "Entropy", "E (norm)", "ZD", "CosSim", "tokens")


def layer_table(layers: Sequence[LayerAverage]) -> Table:
    """Return llama-imatrix's averages per layer, each weight counting as often as it has columns."""
    result = table("Layer", "μΣ(Act²)", "μZD", "μCosSim", numbers=("Layer", "μΣ(Act²)", "μZD", "μCosSim"), title="Averages per layer")
    for row in layers:
        result.add_row(str(row.layer), f"{row.total:.4g}", f"{100 * row.zd:.2f} %", f"{row.cosine:.4f}")
    return result


N_SHOWN_LAYERS = 5  # of the most important, and of the least
BAR_WIDTH = 32


def importance_chart(layers: Sequence[LayerAverage]) -> Table:
    """Return the most and the least important layers by μΣ(Act²), as bars; logarithmic where they differ more than 50-fold."""
    ranked = sorted(layers, key=lambda row: -row.total)
    shown = ranked if len(ranked) <= 2 * N_SHOWN_LAYERS else [*ranked[:N_SHOWN_LAYERS], *ranked[-N_SHOWN_LAYERS:]]
    largest, least = ranked[0].total, min((row.total for row in ranked if row.total > 0), default=1.0)
    is_logarithmic = largest > 50 * least
    scale = " (logarithmic)" if is_logarithmic else ""
    result = table("Layer", "μΣ(Act²)", "", numbers=("Layer", "μΣ(Act²)"), title=f"Most and least important layers{scale}")
    for i, row in enumerate(shown):
        if len(shown) < len(ranked) and i == N_SHOWN_LAYERS:
            result.add_row("…", "", "")
        length = _bar_share(row.total, largest, least) if is_logarithmic else row.total / (largest or 1.0)
        result.add_row(str(row.layer), f"{row.total:.4g}", bar(length))
    return result


def _bar_share(value: float, largest: float, least: float) -> float:
    """Return the length of a logarithmic bar: a tenth for the smallest."""
    return 0.1 + 0.9 * math.log(value / least) / math.log(largest / least) if value > 0 else 0.0


def bar(share: float, width: int = BAR_WIDTH) -> str:
    """Return a bar of block characters as long as `share` (0…1) of `width` cells, in eighths of a cell."""
    eighths: int = round(max(0.0, min(share, 1.0)) * width * 8)
    return "█" * (eighths // 8) + " ▏▎▍▌▋▊▉"[eighths % 8].strip()


def expert_table(experts: Sequence[ExpertCoverage]) -> Table:
    """Return how often the experts of each weight were reached, in tokens."""
    numbers = ("experts", "never reached", "hardly (< 0.1 mean)", "fewest", "mean", "most")
    result = table("Tensor", *numbers, "tokens of each expert", numbers=numbers, title="Coverage of experts")
    for row in experts:
        counts = row.counts
        most = max(counts)
        bars = "".join(" " if n == 0 else "▁▂▃▄▅▆▇█"[min(7, 8 * n // (most + 1))] for n in counts[:_MAX_EXPERTS])
        figures = (len(counts), row.n_unreached, row.n_starved, min(counts), round(sum(counts) / len(counts)), most)
        result.add_row(row.name, *(f"{n:,}" for n in figures), bars + ("…" if len(counts) > _MAX_EXPERTS else ""))
    return result


_MAX_EXPERTS = 64  # shown as bars


def comparison_table(comparison: Comparison) -> Table:
    """Return how alike two imatrices are, a line per weight, the least alike first."""
    numbers = ("cosine", "rank correlation", "overlap of top 1 %", "matrices")
    result = table("Tensor", *numbers, numbers=numbers)
    for row in comparison.tensors:
        alone = f" ({row.n_only_one} in one only)" if row.n_only_one else ""
        result.add_row(row.name, f"{row.cosine:.4f}", f"{row.rank_correlation:.4f}", f"{100 * row.top_overlap:.0f} %", f"{row.n_matrices}{alone}")
    return result


def comparison_lines(comparison: Comparison) -> list[str]:
    """Return what only one of two imatrices has, and the verdict on the calibration text."""
    alone = (("first", comparison.only_first), ("second", comparison.only_second))
    return [*(f"only in the {which}: {names_text(names)}" for which, names in alone if names), judge(comparison)]


def imatrix_report(statistics: Statistics) -> list[Table]:
    """Return all that is shown of an imatrix: its weights, layers, most and least important layers, and experts."""
    rows = summarize_tensors(statistics)
    layers, experts = average_layers(rows), summarize_experts(statistics)
    tables = [statistics_table(rows)]
    if layers:
        tables += [layer_table(layers), importance_chart(layers)]
    return [*tables, expert_table(experts)] if experts else tables


def compare_imatrices(first: Path, second: Path) -> Comparison:
    """Return how alike two imatrix files of one model are. Raises InputError when one is no imatrix or they have no weight in common."""
    comparison = compare_statistics(load_imatrix(first), load_imatrix(second))
    if not comparison.tensors:
        raise InputError(f"weights of {second}: got none in common with {first}, expected imatrices of one model. Compare others")
    return comparison


def inspection_json(inspection: Inspection) -> dict[str, object]:
    """Return what a file holds as JSON-able values: an imatrix's statistics, or a model's tensors and short metadata."""
    if inspection.statistics is not None:
        beside = {"first_token": [asdict(layer) for layer in inspection.layers]} if inspection.layers else {}
        return imatrix_json(inspection.statistics) | beside
    tensors = [
        {"name": t.name, "type": t.type.name, "shape": list(t.shape), "n_bytes": t.n_bytes, "file": f.path.name} for f in inspection.files for t in f.tensors
    ]
    metadata = {key: value_text(value) for f in inspection.files[:1] for key, value in f.metadata.items()}
    return {"files": [f.path.name for f in inspection.files], "n_bytes": sum(f.size_bytes for f in inspection.files), "metadata": metadata, "tensors": tensors}


def imatrix_json(statistics: Statistics) -> dict[str, object]:
    """Return an imatrix's statistics as JSON-able values."""
    rows = summarize_tensors(statistics)
    return {
        "datasets": list(statistics.datasets),
        "n_chunks": statistics.n_chunks,
        "chunk_size": statistics.chunk_size,
        "tensors": [asdict(row) for row in rows],
        "layers": [asdict(row) for row in average_layers(rows)],
        "experts": [asdict(row) for row in summarize_experts(statistics)],
    }


def comparison_json(comparison: Comparison) -> dict[str, object]:
    """Return a comparison of two imatrices, and the verdict, as JSON-able values."""
    return {**asdict(comparison), "verdict": judge(comparison)}
