"""A model's super weights: found by running it, kept beside the imatrix, and what a quantization does about them.

`find_super_weights` looks for spikes, sets the weight to zero, looks again, until none is left, and measures what each
is worth; `select_mask` streams all weights once. They lie beside an imatrix as `NAME.super-weights.json` and, the mask,
`.safetensors`: flat indices by tensor. `plan_protection` raises the types of a plan where an encoder cannot keep what is
to be kept; `Protection.pins` tells the encoders what that is. Encodes nothing but rows to try (see `super_weights.py`).
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import numpy as np

from loopgguf import ggml
from loopgguf.accumulators import Extremes, Key, Spikes
from loopgguf.activations import collect_from_checkpoint, collect_from_gguf
from loopgguf.allocation import Choice, solve
from loopgguf.architectures import tensor_role
from loopgguf.calibration import Chunks
from loopgguf.checkpoint import cache_path, content_key, write_cached
from loopgguf.container import refuse_existing, write_file
from loopgguf.documents import load_json, parse_object
from loopgguf.errors import InputError, UsageError
from loopgguf.errortable import candidate_types
from loopgguf.formats import FORMATS, QUANTIZED_TYPES, GgmlType, padded
from loopgguf.grams import imatrix_stem
from loopgguf.loss import PassResult
from loopgguf.opening import Settings
from loopgguf.planner import Plan, PlanRow, with_type
from loopgguf.safetensor import read_array, read_safetensors, write_safetensors
from loopgguf.source import Source, Tensor
from loopgguf.statistics import Statistics, sanitize_importance
from loopgguf.super_weights import (
    TOLERANCE,
    FloatArray,
    Found,
    Indices,
    Mask,
    Pin,
    Pins,
    Spike,
    SuperWeight,
    TopSelection,
    find_spike,
    first_keeping,
    mask_misses,
    mask_scores,
)
from loopgguf.torch_model import WeightEdit

FORMAT = "1"  # of the files
VERSION = 1  # of the search: part of the name in the cache
PROBE_CHUNKS = 8  # of the calibration text: a spike is there on any text, and each weight found costs two passes
MAX_FOUND = 16  # models in the literature have 1 to 6
DEFAULT_COVERAGE = 1e-4
MAX_COVERAGE = 0.01
COVERAGE_KEY, FORMAT_KEY = "loopgguf.super-weight-coverage", "loopgguf.super-weights"
# types that a tensor is raised to: their encoders are quick, and each is better than the one before
_STEPS = (GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.Q4_0, GgmlType.Q4_K, GgmlType.Q5_0, GgmlType.Q5_K, GgmlType.Q6_K, GgmlType.Q8_0, GgmlType.F16, GgmlType.BF16)
_SAMPLED_ROWS = 32  # of a tensor, on which types are compared for the mask
_SLAB_WEIGHTS = 1 << 20

GetImportance = Callable[[str], FloatArray | None]


NOTHING_FOUND = Found((), float("nan"), 0, (), is_complete=False)  # before anything was looked for


# --- (a) ----------------------------------------------------------------------------------------------------------------


def flat_row(tensor: Tensor, matrix: int | None, row: int) -> int:
    """Return the row's number in the tensor seen as (n_rows, n_in)."""
    return (matrix or 0) * (tensor.n_rows // tensor.n_matrices) + row


def _read_row(tensor: Tensor, row: int) -> FloatArray:
    (decoded,) = ggml.decode_rows(tensor.type, np.ascontiguousarray(tensor.read_rows(row, row + 1)))
    return np.asarray(decoded)


def _first_spike(tensors: Mapping[str, Tensor], extremes: Mapping[Key, Extremes], removed: Sequence[WeightEdit]) -> tuple[Key, Spike] | None:
    """Return the spike of the earliest layer that has one: what it makes may be why later layers spike."""
    for (name, matrix), seen in sorted(extremes.items(), key=lambda item: (item[1].layer or 0, item[0][0], item[0][1] or 0)):
        tensor = tensors[name]

        def read_row(row: int, tensor: Tensor = tensor, matrix: int | None = matrix) -> FloatArray:
            return _read_row(tensor, flat_row(tensor, matrix, row))

        gone = [(edit.row, edit.column) for edit in removed if (edit.name, edit.matrix) == (name, matrix)]
        spike = find_spike(seen.inputs, seen.outputs, read_row, gone)
        if spike is not None:
            return (name, matrix), spike
    return None


def find_super_weights(source: Source, chunks: Chunks, settings: Settings, extremes: Mapping[Key, Extremes] | None = None) -> Found:
    """Return a model's super weights, each with the perplexity that its loss alone would mean, on the first chunks of a text.

    extremes: what an earlier pass over the whole text saw, which is the first pass then; nothing runs again where it saw no
    spike. A checkpoint folder is run by torch, a GGUF by llama.cpp, whose file is not touched: what the weight adds is
    taken out of its output. Raises InputError as the engines do.
    """
    tensors = {tensor.name: tensor for tensor in source.tensors}
    tokens = chunks.tokens[:PROBE_CHUNKS]
    documents = None if chunks.documents is None else chunks.documents[:PROBE_CHUNKS]

    def run(edits: Sequence[WeightEdit]) -> tuple[Mapping[Key, Extremes], PassResult]:
        spikes, how = Spikes(), {"n_threads": settings.n_threads, "documents": documents, "edits": edits, "progress": settings.progress}
        if source.is_checkpoint:
            result = collect_from_checkpoint(source.path, tokens, [spikes], device=settings.device, **how)  # type: ignore[arg-type]
        else:
            result = collect_from_gguf(source.path, tokens, [spikes], wants=Spikes.is_watched, **how)  # type: ignore[arg-type]
        return spikes.extremes(), result

    def describe(passed: PassResult | None, weights: Sequence[SuperWeight], *, is_complete: bool) -> Found:
        passed = passed or run(())[1]
        return Found(tuple(weights), passed.perplexity, passed.n_tokens, chunks.names, is_complete)

    base: PassResult | None = None
    if extremes is None:
        extremes, base = run(())
    removed: list[WeightEdit] = []
    weights: list[SuperWeight] = []
    spike = _first_spike(tensors, extremes, removed)
    while spike is not None and len(weights) < MAX_FOUND:
        (name, matrix), seen = spike
        edit = WeightEdit(name, seen.row, seen.column, 0.0, matrix, seen.value)
        removed.append(edit)
        extremes, together = run(removed)
        alone = together if len(removed) == 1 else run([edit])[1]
        weights.append(SuperWeight(name, matrix, tensor_role(name).layer, seen, len(removed), alone.perplexity))
        spike = _first_spike(tensors, extremes, removed)
    return describe(base, weights, is_complete=spike is None)


# --- (b) ----------------------------------------------------------------------------------------------------------------


def refuse_bad_coverage(coverage: float) -> None:
    """Raise UsageError for a coverage that is no small part of the weights: a mask of many protects none."""
    if not 0 <= coverage <= MAX_COVERAGE:
        raise UsageError(f"--super-weight-coverage: got {coverage}, expected a part of all weights from 0 to {MAX_COVERAGE}, such as {DEFAULT_COVERAGE:f}")


def select_mask(source: Source, statistics: Statistics, coverage: float, settings: Settings) -> Mask:
    """Return the `coverage` (0…1) of a model's weights that count most under an imatrix; the weights are read once, in slabs."""
    tensors = [tensor for tensor in source.tensors if tensor.name in statistics.columns and len(tensor.shape) > 1]
    ends = np.cumsum([0, *(tensor.n_rows * tensor.n_in for tensor in tensors)])
    selection = TopSelection(round(coverage * int(ends[-1])))
    for number, (tensor, first) in enumerate(zip(tensors, ends[:-1].tolist(), strict=True), 1):
        importance = statistics.importance(tensor.name)
        assert importance is not None
        per_matrix, step = tensor.n_rows // tensor.n_matrices, max(1, _SLAB_WEIGHTS // tensor.n_in)
        for matrix in range(tensor.n_matrices):
            for start in range(matrix * per_matrix, (matrix + 1) * per_matrix, step):
                stop = min(start + step, (matrix + 1) * per_matrix)
                rows = ggml.decode_rows(tensor.type, np.ascontiguousarray(tensor.read_rows(start, stop)))
                selection.add(first + start * tensor.n_in, mask_scores(rows, importance[matrix]))
        if settings.progress is not None:
            settings.progress("looking for the weights that count most", number, len(tensors))
    places = selection.take()
    edges = np.searchsorted(places, ends)
    parts = {tensor.name: places[a:b] - first for tensor, first, a, b in zip(tensors, ends[:-1], edges[:-1], edges[1:], strict=True)}
    return Mask({name: part for name, part in parts.items() if len(part)}, coverage)


# --- files --------------------------------------------------------------------------------------------------------------


def protection_paths(imatrix: Path) -> tuple[Path, Path]:
    """Return where super weights and mask lie beside an imatrix."""
    path = imatrix.with_name(f"{imatrix_stem(imatrix)}.super-weights.json")
    return path, mask_path(path)


def mask_path(path: Path) -> Path:
    """Return where the mask lies beside the super weights at `path`."""
    return path.with_suffix(".safetensors")


def refuse_existing_protection(path: Path, *, overwrite: bool) -> None:
    """Raise OutputError where super weights at `path`, or the mask beside them, are there and may not be overwritten, UsageError for
    a name that is not .json."""
    if path.suffix != ".json":
        raise UsageError(f"-o {path}: got {path.suffix or 'no ending'}, expected .json; the mask goes beside it as .safetensors")
    for target in (path, mask_path(path)):
        refuse_existing(target, overwrite=overwrite)


def save_protection(found: Found, mask: Mask | None, path: Path, *, overwrite: bool = False) -> tuple[Path, ...]:
    """Write super weights to `path` and the mask, where there is one, beside them, and return where. Raises OutputError."""
    write_file(path, (json.dumps({FORMAT_KEY: FORMAT, **found.to_json()}, indent=1) + "\n").encode(), overwrite=overwrite)
    if mask is None:
        return (path,)
    stream = io.BytesIO()
    write_safetensors(stream.write, mask.indices, {FORMAT_KEY: FORMAT, COVERAGE_KEY: repr(mask.coverage)})
    write_file(mask_path(path), stream.getvalue(), overwrite=overwrite)
    return path, mask_path(path)


def _refuse(path: Path, what: str, got: object, expected: str) -> InputError:
    return InputError(f"{what} in {path}: got {got!s:.120}, expected {expected}. Make it again: loopgguf imatrix --super-weights")


_KINDS: Mapping[str, tuple[type, ...]] = {"str": (str,), "int": (int,), "float": (float, int), "int | None": (int, type(None))}


def _record(path: Path, kind: type[Any], given: Mapping[str, object], **known: object) -> Any:
    """Return a dataclass made of JSON values, each of the type its field has; `known` are fields that are not in the JSON."""
    values: dict[str, object] = dict(known)
    for wanted in fields(kind):
        if wanted.name not in known:
            value = given.get(wanted.name)
            if wanted.name not in given or isinstance(value, bool) or not isinstance(value, _KINDS[str(wanted.type)]):
                raise _refuse(path, f"{wanted.name} of a super weight", value, str(wanted.type))
            values[wanted.name] = value
    return kind(**values)


def load_found(path: Path, source: Source) -> Found:
    """Return the super weights in a file. Raises InputError when it is malformed, or of another model: a weight has another value."""
    data = load_json(path)
    weights, texts = data.get("weights"), data.get("texts")
    if data.get(FORMAT_KEY) != FORMAT or not isinstance(weights, list) or not isinstance(texts, list) or not all(isinstance(w, dict) for w in weights):
        raise _refuse(path, FORMAT_KEY, data.get(FORMAT_KEY), f"{FORMAT!r} with lists of weights and texts")
    loaded = tuple(_record(path, SuperWeight, w, spike=_record(path, Spike, w)) for w in weights)
    tensors = {tensor.name: tensor for tensor in source.tensors}
    for weight in loaded:
        value = _value_at(tensors.get(weight.name), weight)
        if value != weight.spike.value:
            what = f"{weight.name}[{weight.spike.row}, {weight.spike.column}] of the model"
            raise _refuse(path, what, "no such weight" if value is None else value, f"{weight.spike.value}; these are another model's super weights")
    is_complete = data.get("is_complete")
    if not isinstance(is_complete, bool):
        raise _refuse(path, "is_complete", is_complete, "true or false")
    return _record(path, Found, data, weights=loaded, texts=tuple(map(str, texts)), is_complete=is_complete)  # type: ignore[no-any-return]


def _value_at(tensor: Tensor | None, weight: SuperWeight) -> float | None:
    spike = weight.spike
    matrix, per_matrix = weight.matrix or 0, 0 if tensor is None else tensor.n_rows // tensor.n_matrices
    if tensor is None or not (0 <= spike.row < per_matrix and 0 <= spike.column < tensor.n_in and 0 <= matrix < tensor.n_matrices):
        return None
    return float(_read_row(tensor, flat_row(tensor, matrix, spike.row))[spike.column])


def load_mask(path: Path, source: Source) -> Mask:
    """Return the mask in a file. Raises InputError when it is malformed or of another model."""
    raw, stored = read_safetensors(path)
    metadata = parse_object(raw, f"the header of {path}").get("__metadata__")
    sizes = {tensor.name: tensor.n_rows * tensor.n_in for tensor in source.tensors}
    coverage = metadata.get(COVERAGE_KEY) if isinstance(metadata, dict) and metadata.get(FORMAT_KEY) == FORMAT else None
    if not isinstance(coverage, str) or not re.fullmatch(r"\d{1,9}(\.\d{1,20})?(e-\d\d)?", coverage, re.ASCII):
        raise _refuse(path, FORMAT_KEY, metadata, f"{FORMAT!r} and a coverage")
    indices = {}
    for name, entry in stored.items():
        if name not in sizes or entry.dtype != "I64" or len(entry.shape) != 1:
            raise _refuse(path, f"tensor {name!r:.80}", f"{entry.dtype} {entry.shape}", "I64 indices of a weight of the model")
        places = read_array(entry)
        if len(places) and (places[0] < 0 or places[-1] >= sizes[name] or not (np.diff(places) > 0).all()):
            raise _refuse(path, f"indices of {name}", f"{places[0]} … {places[-1]}", f"rising ones below {sizes[name]}; this is another model's mask")
        indices[name] = places
    return Mask(indices, float(coverage))


def known_super_weights(
    source: Source, imatrix: Path | None, cut: Callable[[], Chunks], settings: Settings, *, may_run: bool = True
) -> tuple[Found | None, str]:
    """Return the super weights that lie beside the imatrix, or were found before for the same model and text, or are found
    now and kept in the cache; and where they come from, in words. may_run: else None where they are not known.

    cut: gives the calibration text, which is not cut where it is not needed.
    """
    if imatrix is not None and (path := protection_paths(imatrix)[0]).exists():
        return load_found(path, source), f"taken from {path}"
    chunks = cut()
    path = cache_path("super-weights", content_key(VERSION, source.fingerprint, chunks.fingerprint, PROBE_CHUNKS), ".json")
    if path.exists():
        return load_found(path, source), f"taken from {path}, found before in the same model and text"
    if not may_run:
        return None, "not looked for yet"
    found = find_super_weights(source, chunks, settings)
    write_cached(path, json.dumps({FORMAT_KEY: FORMAT, **found.to_json()}, indent=1).encode())
    return found, f"looked for on {found.n_tokens:,} scored tokens of {', '.join(found.texts)}, kept as {path}"


def known_mask(source: Source, statistics: Statistics, imatrix: Path | None, coverage: float, settings: Settings) -> Mask:
    """Return the mask that lies beside the imatrix if its coverage is the one asked for, else the one selected now."""
    if imatrix is not None and (path := protection_paths(imatrix)[1]).exists():
        mask = load_mask(path, source)
        if mask.coverage == coverage:
            return mask
    return select_mask(source, statistics, coverage, settings)


# --- what a quantization does about them --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protection:
    """What is to be kept of a model. `raised`: tensors whose type was raised for it, with the type before."""

    found: Found
    mask: Mask
    raised: Mapping[str, GgmlType] = field(default_factory=dict)

    @property
    def fingerprint(self) -> str:
        """What the encoders are told of it depends on this."""
        places = {name: hashlib.sha256(np.ascontiguousarray(indices, "<i8").tobytes()).hexdigest() for name, indices in self.mask.indices.items()}
        return content_key(self.found.to_json(), places)

    def pins(self, tensor: Tensor) -> Pins:
        """Return what is kept of a tensor, by its rows."""
        pins: dict[int, Pin] = {}
        for weight in self.found.weights:
            if weight.name == tensor.name:
                row = flat_row(tensor, weight.matrix, weight.spike.row)
                pins[row] = Pin((*pins.get(row, Pin()).super_columns, weight.spike.column))
        rows, columns = np.divmod(self.mask.indices.get(tensor.name, np.empty(0, np.int64)), tensor.n_in)
        for row, start, stop in _runs(rows):
            pins[row] = replace(pins.get(row, Pin()), mask_columns=tuple(columns[start:stop].tolist()))
        return pins


def _runs(values: Indices) -> list[tuple[int, int, int]]:
    """Return (value, start, stop) of each run of equal values in a sorted array."""
    starts = np.flatnonzero(np.diff(values, prepend=-1))
    return list(zip(values[starts].tolist(), starts.tolist(), [*starts[1:].tolist(), len(values)], strict=True)) if len(values) else []


def _row_importance(importance: FloatArray | None, tensor: Tensor, row: int) -> FloatArray | None:
    return None if importance is None else np.ascontiguousarray(importance[row // (tensor.n_rows // tensor.n_matrices)])


def _larger_types(tensor: Tensor, row: PlanRow, *, has_importance: bool) -> list[GgmlType]:
    possible = candidate_types(tensor, _STEPS, has_importance=has_importance)
    return sorted((t for t in possible if FORMATS[t].bpw > FORMATS[row.type].bpw), key=lambda t: FORMATS[t].bpw)


def plan_protection(source: Source, plan: Plan, protection: Protection, importance: GetImportance, budget_bytes: int) -> tuple[Plan, Protection, list[str]]:
    """Return the plan with types raised where needed, the protection that says so, and notes.

    A tensor whose super weight misses by more than 1 % under the best importance gets the smallest type that keeps it; for the mask,
    the types that keep most of it within `budget_bytes` more. Types that the user asked for by name stay, and a note says so.
    """
    tensors = {tensor.name: tensor for tensor in source.tensors}
    notes: list[str] = []

    def rows_of(name: str) -> FloatArray | None:
        found = importance(name)
        return None if found is None else sanitize_importance(found)[0]

    raised: dict[str, PlanRow] = {}
    for row in plan.rows:
        if row.is_encoded and row.type in QUANTIZED_TYPES and row.name in {weight.name for weight in protection.found.weights}:
            better, note = _raise_for_super(tensors[row.name], row, protection, rows_of(row.name))
            raised |= {row.name: better} if better is not None else {}
            notes += [note] if note else []
    if budget_bytes:
        rest = [
            row for row in plan.rows if row.uses_imatrix and row.name not in raised and row.name in protection.mask.indices and not row.reason.startswith("--")
        ]
        raised |= _raise_for_mask(tensors, rest, protection, rows_of, budget_bytes)
    before = {row.name: row.type for row in plan.rows if row.name in raised}
    return replace(plan, rows=tuple(raised.get(row.name, row) for row in plan.rows)), replace(protection, raised=before), notes


def _raise_for_super(tensor: Tensor, row: PlanRow, protection: Protection, importance: FloatArray | None) -> tuple[PlanRow | None, str]:
    """Return the row with the type that keeps every super weight of the tensor, or None where its own does or must do; and a note."""
    choices = [row.type, *_larger_types(tensor, row, has_importance=importance is not None)]
    needed = 0
    for number, pin in protection.pins(tensor).items():
        if pin.super_columns:
            kept = first_keeping(choices[needed:], _read_row(tensor, number), _row_importance(importance, tensor, number), Pin(pin.super_columns))
            needed = len(choices) - 1 if kept is None else choices.index(kept)
    if needed == 0:
        return None, ""
    missed = f"{row.type.name} misses a super weight of {row.name} by more than {TOLERANCE:.0%}"
    if row.reason.startswith("--"):
        return None, f"{missed}: the type stays, for it was asked for by {row.reason}"
    return with_type(row, choices[needed], f"super weight: {row.type.name} misses it by more than {TOLERANCE:.0%}", has_importance=importance is not None), ""


def _raise_for_mask(
    tensors: Mapping[str, Tensor], rows: Sequence[PlanRow], protection: Protection, importance: GetImportance, budget_bytes: int
) -> dict[str, PlanRow]:
    """Return the rows whose types are raised so that the fewest weights of the mask miss, within the budget; misses are counted on sampled rows."""
    options: list[list[PlanRow]] = []
    items: list[list[Choice]] = []
    for row in rows:
        tensor, weights = tensors[row.name], importance(row.name)
        assert weights is not None
        better = [
            with_type(row, t, "super weights: within --super-weight-budget", has_importance=True) for t in _larger_types(tensor, row, has_importance=True)
        ]
        pins = {number: pin for number, pin in protection.pins(tensor).items() if pin.mask_columns}
        sampled = list(pins)[:: max(1, len(pins) // _SAMPLED_ROWS)]
        read = {number: (_read_row(tensor, number), _row_importance(weights, tensor, number)) for number in sampled}
        choices = []
        for option in (row, *better):
            missed = sum(mask_misses(option.type, *read[number], pins[number]) for number in sampled)
            choices.append(Choice(padded(option.n_bytes) - padded(row.n_bytes), missed * len(pins) / max(len(sampled), 1)))
        options.append([row, *better])
        items.append(choices)
    if not items:
        return {}
    picks = solve(items, budget_bytes).picks
    return {option[pick].name: option[pick] for option, pick in zip(options, picks, strict=True) if pick}
