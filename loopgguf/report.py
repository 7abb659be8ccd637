"""What a user reads: plans, quality and files as rich tables, and the same facts as JSON-able values.

Renders results; measures and decides nothing. Every number keeps the name it has elsewhere (`estimated_*`,
`measured_*`, llama-perplexity's labels).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.table import Table
from rich.text import Text

from loopgguf.container import GgufFile, Value, is_gguf, read_gguf, read_shards
from loopgguf.errors import InputError
from loopgguf.evaluation import Measure, Quality, labelled
from loopgguf.formats import FORMATS, GgmlType
from loopgguf.pipeline import WriteResult
from loopgguf.planner import Plan, bits_per_weight, summarize_fallbacks, to_json
from loopgguf.statistics import Statistics, load_imatrix

MAX_VALUE_CHARACTERS = 72  # of a metadata value shown in a table
_PERCENT_LABELS = ("Cor(ln(PPL(Q)), ln(PPL(base)))", "Mean Δp", "RMS Δp", "Same top p")


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


def type_table(items: Iterable[tuple[GgmlType, int, int]], title: str = "") -> Table:
    """Return tensors counted by type from (type, weights, bytes) of each, largest share first, with a total line."""
    totals: dict[GgmlType, list[int]] = defaultdict(lambda: [0, 0, 0])
    for ggml_type, n_weights, n_bytes in items:
        for i, n in enumerate((1, n_weights, n_bytes)):
            totals[ggml_type][i] += n
    result = table("type", "tensors", "weights", "bytes", "bpw", title=title, numbers=("tensors", "weights", "bytes", "bpw"))
    for ggml_type, (n_tensors, n_weights, n_bytes) in sorted(totals.items(), key=lambda item: -item[1][2]):
        result.add_row(ggml_type.name, str(n_tensors), f"{n_weights:,}", f"{n_bytes:,}", f"{FORMATS[ggml_type].bpw:.4g}")
    n_tensors, n_weights, n_bytes = (sum(t[i] for t in totals.values()) for i in range(3))
    result.add_section()
    result.add_row("all", str(n_tensors), f"{n_weights:,}", f"{n_bytes:,}", f"{8 * n_bytes / n_weights:.4f}" if n_weights else "")
    return result


def plan_types(plan: Plan) -> Table:
    """Return the plan's tensors counted by type."""
    return type_table((row.type, row.n_weights, row.n_bytes) for row in plan.rows)


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
    if result.is_dry_run:
        return [*lines, f"dry run: nothing was written; would write {', '.join(str(p) for p in result.paths)}"]
    errors = [log.sampled.relative_error for log in result.logs.values() if log.sampled is not None]
    if errors:
        lines.append(
            f"measured error of {len(errors)} encoded tensors, sampled rows: mean {np.mean(errors):.3g} of the squared weights, worst {max(errors):.3g}"
        )
    floored = {name: log.n_floored for name, log in result.logs.items() if log.n_floored}
    if floored:
        lines.append(
            f"sanitised: {sum(floored.values())} importances too small to use were raised, in {len(floored)} tensors ({', '.join(list(floored)[:3])}, …)"
        )
    lines.append("seconds: " + ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in result.seconds.items()))
    lines.append(f"it says: {result.sample_text!r}")
    return [*lines, f"wrote {', '.join(str(p) for p in result.paths)}"]


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
    }


# --- quality ----------------------------------------------------------------------------------------------------------


def _measure_text(label: str, measure: Measure) -> str:
    unit = " %" if label in _PERCENT_LABELS else ""
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


# --- inspect ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Inspection:
    """A GGUF's shards, and the statistics it holds if it is an imatrix."""

    files: tuple[GgufFile, ...]
    statistics: Statistics | None


def inspect_file(path: Path) -> Inspection:
    """Return what a file holds: a GGUF model (split or whole), or an imatrix in either form. Raises InputError."""
    if not path.is_file():
        raise InputError(f"cannot read {path}: no such file. Give a GGUF or an imatrix file")
    if not is_gguf(path):
        return Inspection((), load_imatrix(path))
    first = read_gguf(path)
    kind = first.metadata.get("general.type")
    if kind is not None and kind.data == "imatrix":
        return Inspection((first,), load_imatrix(path))
    return Inspection(read_shards(path), None)


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


def statistics_table(statistics: Statistics) -> Table:
    """Return llama-imatrix's `--show-statistics` of mean squared activations, a line per tensor (imatrix.cpp)."""
    result = table("tensor", "columns", "tokens", "Σ(Act²)", "min", "max", "μ", "σ", "% active", "entropy", "% of max", "ZD", numbers=_STATISTICS)
    for name in sorted(statistics.columns):
        values = statistics.importance(name)
        assert values is not None
        result.add_row(name, str(values.shape[-1]), f"{statistics.columns[name].counts.sum():.0f}", *column_statistics(values.astype(np.float64).ravel()))
    return result


_STATISTICS = ("columns", "tokens", "Σ(Act²)", "min", "max", "μ", "σ", "% active", "entropy", "% of max", "ZD")


def column_statistics(values: NDArray[np.float64]) -> tuple[str, ...]:
    """Return sum, min, max, mean, σ, share > 1e-5, entropy in bits and in % of its maximum, and ZD (share with z > 1) as text."""
    total, mean, deviation = values.sum(), values.mean(), values.std()
    p = values[values > 0] / total if total > 0 else values[:0]
    entropy = float(-(p * np.log2(p)).sum())
    normalized = 100 * entropy / np.log2(len(values)) if len(values) > 1 else 0.0
    zd = float((values > mean + deviation).mean()) if deviation > 0 else 0.0
    active = 100 * float((values > 1e-5).mean())
    numbers = (total, values.min(), values.max(), mean, deviation)
    return (*(f"{n:.4g}" for n in numbers), f"{active:.1f}", f"{entropy:.2f}", f"{normalized:.1f}", f"{100 * zd:.2f} %")
