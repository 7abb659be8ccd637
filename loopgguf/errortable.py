"""What every type would do to every weight: errors of really encoded rows, on a seeded sample of rows.

Rows are read, encoded and decoded by libggml exactly as the pipeline will do it, so nothing here is a model of an
encoder. Two numbers come of it for each (tensor, type):

* `squared_error`, Σ importance · (w − ŵ)², scaled from the sample to the whole tensor, and its ratio to the same sum of w;
* `estimated_error`, what the planner adds up. With gradients it is the mean KLD in nats per token,
  ½ Σ_i r_i e_iᵀ H_w e_i (GuidedQuant, arXiv 2505.07004, for the weighting; e_i is row i of w − ŵ, r_i the row's mean
  squared gradient over the tensor's, H_w = Σ_t w_t x_t x_tᵀ / n_tokens with w_t the mean squared gradient of token t).
  Without, it is the ratio times a documented prior per kind of weight (`PRIOR_NATS`); the table says on what it rests.

Runs no model and decides nothing. Results are kept in the user's cache folder, a small file per tensor, so an interrupted
measurement goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from loopgguf import ggml
from loopgguf.accumulators import EMBEDDING, HEAD
from loopgguf.architectures import tensor_role
from loopgguf.checkpoint import cache_path, content_key, write_cached
from loopgguf.errors import InputError
from loopgguf.formats import FLOAT_TYPES, FORMATS, QUANTIZED_TYPES, GgmlType, fits_row
from loopgguf.presets import requires_imatrix
from loopgguf.progress import Progress
from loopgguf.sensitivity import Sensitivity
from loopgguf.source import Tensor
from loopgguf.statistics import sanitize_importance

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float32]

# mainline runs these too, but without training for them they lose to others of their size, or are for special hardware
SPECIAL_TYPES = frozenset({GgmlType.TQ1_0, GgmlType.TQ2_0, GgmlType.MXFP4, GgmlType.NVFP4, GgmlType.Q1_0, GgmlType.Q2_0})
DEFAULT_TYPES = tuple(sorted(QUANTIZED_TYPES - SPECIAL_TYPES | {GgmlType.F16, GgmlType.BF16}))
_SLAB_WEIGHTS = 1 << 18  # a job encodes so many weights as every type in turn: tenths of a second to seconds
# Priors for weights without gradients, KLD in nats per relative squared error: medians by kind over 112 replacements of
# single tensors in SmolLM2-135M (30 layers; a layer of a model of n layers counts √(30/n), which fits the demo model's six). The first two layers and the
# last stick out in every model seen so far, but for q, k and v. The head works on the logits themselves.
_PRIORS = {"attn_q": 0.03, "attn_k": 0.045, "attn_v": 0.08, "attn_qkv": 0.05, "attn_output": 0.045, "ffn_gate": 0.13, "ffn_up": 0.12, "ffn_down": 0.17}
_STICKING_OUT = frozenset({"attn_output", "ffn_gate", "ffn_up", "ffn_down"})
_FIRST_LAYERS, _LAST_LAYER = 3.0, 4.0
_PRIOR_OTHER, _PRIOR_HEAD, _PRIOR_EMBEDDING = 0.1, 8.0, 1.0
# What error feedback leaves of the errors of each kind of weight, medians of tools/bench_gains.py: types differ by less. The head's
# own is not measured and taken for the embeddings', experts' for those of dense weights.
FEEDBACK_GAINS = {
    "token_embd": 0.24,
    "output": 0.24,
    "attn_q": 0.22,
    "attn_k": 0.24,
    "attn_v": 0.36,
    "attn_output": 0.4,
    "ffn_gate": 0.67,
    "ffn_up": 0.65,
    "ffn_down": 0.72,
}
FEEDBACK_GAINS |= {f"{kind}_exps": FEEDBACK_GAINS[kind] for kind in ("ffn_gate", "ffn_up", "ffn_down")}
_VERSION = 2  # of the numbers in the cache: raise it when their meaning changes


# --- what is known about the loss -------------------------------------------------------------------------------------


class Gradients(Protocol):
    """Statistics of a backward pass, by GGUF tensor name."""

    @property
    def fingerprint(self) -> str:
        """What the pass depended on: it is part of the names in the cache."""
        ...

    def sensitivity(self, name: str) -> Sensitivity | None:
        """Return what is known of a weight; None where the pass did not reach it."""
        ...


class Importances(Protocol):
    """What an imatrix says: mean x² per column, (n_matrices, n_in) float32, or None for a weight it has no data for."""

    def importance(self, name: str) -> FloatArray | None: ...


# --- the table --------------------------------------------------------------------------------------------------------


class Basis(StrEnum):
    """What an estimated error, in nats per token, rests on."""

    GRADIENTS = "gradients"
    PRIOR = "prior"


@dataclass(frozen=True)
class TypeDamage:
    """What one type does to one weight. See the module's text for the units; 0 for a copy."""

    type: GgmlType
    squared_error: float
    relative_error: float
    estimated_error: float


@dataclass(frozen=True)
class ErrorRow:
    """One weight: all its candidate types, from small to large, and how they were measured."""

    name: str
    n_sampled_rows: int
    n_rows: int
    basis: Basis
    damages: tuple[TypeDamage, ...]

    def damage(self, ggml_type: GgmlType) -> TypeDamage | None:
        """Return the entry of a type, None where it is no candidate."""
        return next((d for d in self.damages if d.type is ggml_type), None)


@dataclass(frozen=True)
class ErrorTable:
    """One row per weight that was asked for, by name."""

    rows: Mapping[str, ErrorRow]


Tilt = Mapping[str, float]
"""A factor for each kind of weight that is not as its estimates say; 1 for others."""


def tilted(table: ErrorTable, tilt: Tilt) -> ErrorTable:
    """Return a table with the estimated errors of each kind of tensor multiplied by its factor in `tilt`."""

    def of(row: ErrorRow) -> ErrorRow:
        factor = tilt.get(tensor_role(row.name).kind, 1.0)
        return replace(row, damages=tuple(replace(d, estimated_error=factor * d.estimated_error) for d in row.damages))

    return ErrorTable({name: of(row) for name, row in table.rows.items()})


@dataclass(frozen=True)
class Sampling:
    """Which rows stand for a weight: `share` of them, but at least `min_rows` (or all), chosen by `seed` and the weight's name.

    The rows of stacked experts are shared out evenly; each gets at least one.
    """

    share: float = 0.03
    min_rows: int = 256
    is_exact: bool = False
    seed: int = 0

    def choose(self, tensor: Tensor) -> list[NDArray[np.int64]]:
        """Return the chosen rows of each matrix, ascending, as rows of the whole tensor."""
        n_rows = tensor.n_rows // tensor.n_matrices
        wanted = max(math.ceil(self.share * tensor.n_rows), self.min_rows)
        n_each = n_rows if self.is_exact else min(n_rows, max(1, math.ceil(wanted / tensor.n_matrices)))
        words = hashlib.sha256(tensor.name.encode()).digest()[:8]
        generator = np.random.default_rng([self.seed, int.from_bytes(words, "little")])
        return [
            matrix * n_rows + (np.arange(n_rows) if n_each == n_rows else np.sort(generator.choice(n_rows, n_each, replace=False)))
            for matrix in range(tensor.n_matrices)
        ]


@dataclass(frozen=True)
class Request:
    """A weight and the types it may have; the one it is stored in means a copy, which has no error."""

    tensor: Tensor
    types: tuple[GgmlType, ...]


def candidate_types(tensor: Tensor, types: Sequence[GgmlType], *, has_importance: bool) -> tuple[GgmlType, ...]:
    """Return those of `types` that this weight can have: smaller than it is now, of whole blocks, with the data they need.

    Behind them its own type, a copy, if that is among `types` or nothing else is possible.
    """

    def is_possible(ggml_type: GgmlType) -> bool:
        is_smaller = FORMATS[ggml_type].bpw < FORMATS[tensor.type].bpw
        return is_smaller and fits_row(ggml_type, tensor.n_in) and (has_importance or not requires_imatrix(tensor.name, ggml_type))

    copy = (tensor.type,) if tensor.type in types or not any(map(is_possible, types)) else ()
    return (*(t for t in types if is_possible(t)), *copy)


@dataclass(frozen=True)
class _Weighing:
    """What the errors of a weight's rows are multiplied by."""

    importance: FloatArray | None  # (n_matrices, n_in), sanitized; None: all columns alike
    sensitivities: tuple[Sensitivity, ...]  # of tied embeddings two: the lookup's and the head's
    gradients: str  # the fingerprint of the pass that told them, or ''


@dataclass(frozen=True)
class _Sums:
    """Sums over rows: Σ importance · w², and by type Σ importance · e² and ½ Σ r eᵀ H_w e; None for a type that overflowed."""

    energy: float
    squared: tuple[float | None, ...]
    nats: tuple[float, ...]


def _weigh(sensitivity: Sensitivity, weights: FloatArray, errors: FloatArray, matrix: int, rows: NDArray[np.int64]) -> float:
    """Return ½ Σ_i r_i e_iᵀ H_w e_i over these rows of one matrix; each over ‖w_i‖² where errors count relatively."""
    of_rows = np.square(errors).astype(np.float64) @ sensitivity.column_weights[matrix].astype(np.float64)
    if sensitivity.is_relative:
        of_rows = of_rows / np.maximum(np.square(weights).sum(axis=1, dtype=np.float64), np.finfo(np.float64).tiny)
    return 0.5 * float(of_rows @ sensitivity.row_weights[matrix][rows].astype(np.float64))


def _measure_slab(request: Request, weighing: _Weighing, matrix: int, rows: NDArray[np.int64]) -> _Sums:
    """Encode these rows of one matrix as every type, and sum up what they lose."""
    tensor = request.tensor
    packed = np.concatenate([tensor.read_rows(start, stop) for start, stop in _runs(rows)])
    if not ggml.rows_are_valid(tensor.type, packed):
        raise InputError(f"tensor {tensor.name} holds NaN or infinity in rows {rows[0]} to {rows[-1]}: the checkpoint is damaged; download it again")
    weights = ggml.decode_rows(tensor.type, np.ascontiguousarray(packed))
    importance = None if weighing.importance is None else weighing.importance[matrix]
    column_weights = np.ones(tensor.n_in) if importance is None else importance.astype(np.float64)
    is_encodable = ggml.rows_are_encodable(weights)
    squared: list[float | None] = []
    nats = []
    for ggml_type in request.types:
        errors = _errors(ggml_type, weights, importance) if is_encodable or ggml_type in FLOAT_TYPES else None
        squared.append(None if errors is None else float((np.square(errors).astype(np.float64) @ column_weights).sum()))
        within = rows - matrix * (tensor.n_rows // tensor.n_matrices)
        nats.append(0.0 if errors is None else sum(_weigh(s, weights, errors, matrix, within) for s in weighing.sensitivities))
    return _Sums(float((np.square(weights).astype(np.float64) @ column_weights).sum()), tuple(squared), tuple(nats))


def _errors(ggml_type: GgmlType, weights: FloatArray, importance: FloatArray | None) -> FloatArray | None:
    """Return w − ŵ, or None where the type cannot hold the rows."""
    packed = ggml.encode_rows(ggml_type, weights, importance if ggml_type in QUANTIZED_TYPES else None)
    return weights - ggml.decode_rows(ggml_type, packed) if ggml.rows_are_valid(ggml_type, packed) else None


def _runs(rows: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    """Yield (start, stop) of the runs of consecutive numbers."""
    for run in np.split(rows, np.flatnonzero(np.diff(rows) != 1) + 1):
        yield int(run[0]), int(run[-1]) + 1


def _slabs(chosen: Sequence[NDArray[np.int64]], n_in: int) -> Iterator[tuple[int, NDArray[np.int64]]]:
    step = max(1, _SLAB_WEIGHTS // n_in)
    for matrix, rows in enumerate(chosen):
        for start in range(0, len(rows), step):
            yield matrix, rows[start : start + step]


# --- without gradients ------------------------------------------------------------------------------------------------


def prior_nats(name: str, n_layer: int, *, is_tied: bool) -> float:
    """Return the KLD, nats per token, that a relative squared error of 1 would make at this weight, were it linear."""
    role = tensor_role(name)
    kind = role.kind.removesuffix("_exps").removesuffix("_shexp")
    if name == EMBEDDING:
        return _PRIOR_EMBEDDING + (_PRIOR_HEAD if is_tied else 0.0)
    if name == HEAD:
        return _PRIOR_HEAD
    edge = _FIRST_LAYERS if role.layer in (0, 1) else _LAST_LAYER if role.layer == n_layer - 1 else 1.0
    return _PRIORS.get(kind, _PRIOR_OTHER) * (edge if kind in _STICKING_OUT else 1.0) * math.sqrt(30 / n_layer)


_Numbers = tuple[float, float, float]  # squared, relative, nats of a type; the last is 0 without gradients


def _add_up(request: Request, chosen: Sequence[NDArray[np.int64]], sums: Sequence[_Sums]) -> dict[GgmlType, _Numbers | None]:
    """Add the slabs up, in their order, and scale the sample to the whole weight; None for types that do not hold it."""
    scale = request.tensor.n_rows / sum(len(rows) for rows in chosen)
    energy = math.fsum(part.energy for part in sums)
    numbers: dict[GgmlType, _Numbers | None] = {}
    for k, ggml_type in enumerate(request.types):
        parts = [part.squared[k] for part in sums]
        squared = math.fsum(part for part in parts if part is not None)
        nats = scale * math.fsum(part.nats[k] for part in sums)
        numbers[ggml_type] = None if None in parts else (scale * squared, squared / energy if energy else 0.0, nats)
    return numbers


def _row(tensor: Tensor, types: Sequence[GgmlType], numbers: Mapping[GgmlType, _Numbers | None], n_sampled: int, prior: float) -> ErrorRow:
    """Return the row of a weight; `prior` in nats per relative error, 0 where gradients say it all."""
    damages = [TypeDamage(tensor.type, 0.0, 0.0, 0.0)]
    for ggml_type in types:
        if ggml_type is not tensor.type and (found := numbers[ggml_type]) is not None:
            squared, relative, nats = found
            damages.append(TypeDamage(ggml_type, squared, relative, nats + prior * relative))
    damages.sort(key=lambda damage: (FORMATS[damage.type].bpw, damage.type))
    return ErrorRow(tensor.name, n_sampled, tensor.n_rows, Basis.PRIOR if prior else Basis.GRADIENTS, tuple(damages))


# --- the cache --------------------------------------------------------------------------------------------------------


def _digest(*arrays: FloatArray | None) -> str:
    digest = hashlib.sha256()
    for a in arrays:
        digest.update(b"none" if a is None else np.ascontiguousarray(a).tobytes())
    return digest.hexdigest()


def _cache_entry(source_fingerprint: str, tensor: Tensor, weighing: _Weighing, sampling: Sampling) -> Path:
    """Return where the numbers of a weight lie: everything that they depend on but the type, which is inside."""
    sample = "exact" if sampling.is_exact else (sampling.share, sampling.min_rows, sampling.seed)
    key = content_key(
        _VERSION,
        ggml.library_version(),
        source_fingerprint,
        tensor.name,
        tensor.shape,
        _digest(weighing.importance),
        sample,
        weighing.gradients,
        len(weighing.sensitivities),
    )
    return cache_path("errors", key, ".json")


def _load(path: Path) -> dict[GgmlType, _Numbers | None]:
    """Return the numbers kept so far; none when the file is absent or damaged, for they can be made again."""
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        return {GgmlType[name]: None if numbers is None else (float(numbers[0]), float(numbers[1]), float(numbers[2])) for name, numbers in kept.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError):
        logger.warning("%s is damaged and will be made again", path)
        return {}


def _save(path: Path, numbers: Mapping[GgmlType, _Numbers | None]) -> None:
    write_cached(path, json.dumps({ggml_type.name: values for ggml_type, values in sorted(numbers.items())}).encode())


# --- measuring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Pending:
    """A weight on its way: what is known already, and the slabs that are being encoded."""

    request: Request  # with the missing types only
    types: tuple[GgmlType, ...]
    known: Mapping[GgmlType, _Numbers | None]
    chosen: list[NDArray[np.int64]]
    weighing: _Weighing
    futures: list[Future[_Sums]]
    path: Path


def measure_errors(
    requests: Sequence[Request],
    importances: Importances | None,
    *,
    source_fingerprint: str,
    n_layer: int,
    is_tied: bool,
    gradients: Gradients | None = None,
    sampling: Sampling | None = None,
    n_threads: int,
    progress: Progress | None = None,
) -> ErrorTable:
    """Return what every requested type does to every requested weight.

    importances: of an imatrix, None for uniform columns. source_fingerprint: of the model, for the cache. n_layer,
    is_tied (the head is the embeddings): for the prior of weights without gradients. The numbers do not depend on the number of threads. Raises InputError for
    NaN or infinite weights.
    """
    sampling = sampling or Sampling()
    for ggml_type in sorted({t for request in requests for t in request.types} - FLOAT_TYPES):
        ggml.initialize(ggml_type)
    rows: dict[str, ErrorRow] = {}

    def finish(pending: _Pending) -> None:
        tensor = pending.request.tensor
        numbers = dict(pending.known)
        if pending.futures:
            numbers |= _add_up(pending.request, pending.chosen, [future.result() for future in pending.futures])
            _save(pending.path, numbers)
        n_missing = (2 if is_tied and tensor.name == EMBEDDING else 1) - len(pending.weighing.sensitivities)
        prior = 0.0 if n_missing == 0 else prior_nats(tensor.name, n_layer, is_tied=is_tied)
        if n_missing and pending.weighing.sensitivities:  # gradients at a lookup say nothing of the head
            prior = prior_nats(HEAD, n_layer, is_tied=is_tied)
        rows[tensor.name] = _row(tensor, pending.types, numbers, sum(map(len, pending.chosen)), prior)
        if progress is not None:
            progress("measure errors", len(rows), len(requests))

    waiting: deque[_Pending] = deque()
    with ThreadPoolExecutor(n_threads) as pool:
        try:
            for request in requests:
                waiting.append(_start(pool, request, _weighing(request.tensor, importances, gradients, is_tied=is_tied), sampling, source_fingerprint))
                while sum(len(pending.futures) for pending in waiting) > 4 * n_threads and len(waiting) > 1:
                    finish(waiting.popleft())
            while waiting:
                finish(waiting.popleft())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
    return ErrorTable(rows)


def _weighing(tensor: Tensor, importances: Importances | None, gradients: Gradients | None, *, is_tied: bool) -> _Weighing:
    """Return what is known about what an error in this weight costs."""
    importance = importances.importance(tensor.name) if importances is not None else None
    if importance is not None:
        importance, _ = sanitize_importance(importance)
    if gradients is None:
        return _Weighing(importance, (), "")
    names = (EMBEDDING, HEAD) if is_tied and tensor.name == EMBEDDING else (tensor.name,)
    found = tuple(s for s in map(gradients.sensitivity, names) if s is not None)
    return _Weighing(importance, found, gradients.fingerprint if found else "")


def _balanced(sensitivity: Sensitivity, chosen: Sequence[NDArray[np.int64]]) -> Sensitivity:
    """Return the sensitivity with the chosen rows' weights scaled to the mean of all rows of their matrix.

    Few rows of a head (frequent tokens) have most of the weight: how many of them a sample happens to hold must not matter.
    """
    rows = sensitivity.row_weights.astype(np.float64)
    n_rows = rows.shape[1]
    means = np.array([rows[matrix, numbers - matrix * n_rows].mean() for matrix, numbers in enumerate(chosen)])
    factors = np.where(means > 0, rows.mean(axis=1) / np.where(means > 0, means, 1.0), 1.0)
    return replace(sensitivity, row_weights=(rows * factors[:, None]).astype(np.float32))


def _start(pool: ThreadPoolExecutor, request: Request, weighing: _Weighing, sampling: Sampling, source_fingerprint: str) -> _Pending:
    """Look up what is known of a weight and set off what is not."""
    tensor = request.tensor
    path = _cache_entry(source_fingerprint, tensor, weighing, sampling)
    known = _load(path)
    missing = Request(tensor, tuple(t for t in request.types if t not in known and t is not tensor.type))
    chosen = sampling.choose(tensor)
    weighing = replace(weighing, sensitivities=tuple(_balanced(s, chosen) for s in weighing.sensitivities))
    futures = [pool.submit(_measure_slab, missing, weighing, matrix, rows) for matrix, rows in _slabs(chosen, tensor.n_in)] if missing.types else []
    return _Pending(missing, request.types, known, chosen, weighing, futures, path)
