"""Super weights: found from activations and weights, kept by the encoder, and what keeping them costs. Arrays only.

A super weight (a) is a single weight of an ffn_down that makes one output, many times larger than the layer's others,
from one input that is as extreme (`find_spike`). The mask (b) is a model's largest |w|·√importance (`TopSelection`).
Both are kept by the importance of their columns, raised in their rows alone: every ggml encoder treats a row by itself,
so rows without one keep their bytes (`encode_pinned_rows`). Knows no files, no models and no plans.
Source: *The Super Weight in Large Language Models* (arXiv 2411.07191).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass

import numpy as np
from numpy.typing import NDArray

from loopgguf import ggml
from loopgguf.formats import GgmlType

FloatArray = NDArray[np.float32]
Indices = NDArray[np.int64]

MIN_SPIKE = 30.0  # × the layer's own median: without a super weight a layer has 4 to 27 at its input and 2 to 48 at its output
MIN_SHARE = 0.5  # of the output that the one weight makes: below it the output is the work of many
TOLERANCE = 0.01  # relative: a super weight that misses by more moves the activation that all later layers rely on
MAX_ROW_COST = 0.02  # by how much the mask may raise a row's error under its own importance; at 0.1 the KLD rises
_BOOSTS = tuple(4.0**i for i in range(1, 11))  # of the importance of what is kept, the least that does it


# --- (a) spikes -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spike:
    """A weight that makes its layer's largest output from its largest input; both signed, and × the layer's median.

    share: weight · input ÷ output, each the largest over the tokens; about 1 where the weight makes the output alone.
    """

    row: int
    column: int
    value: float
    input: float
    input_ratio: float
    output: float
    output_ratio: float
    share: float


def _ratio(largest: float, values: FloatArray) -> float:
    return largest / max(float(np.median(values)), float(np.finfo(np.float32).tiny))


def find_spike(inputs: FloatArray, outputs: FloatArray, read_row: Callable[[int], FloatArray], removed: Collection[tuple[int, int]] = ()) -> Spike | None:
    """Return the super weight of one ffn_down; None where input and output do not both spike, or no single weight makes the output.

    inputs: (n_in,) the largest activation of each column, signed; outputs: (n_out,) of each row. read_row: row number →
    its weights (n_in,). removed: (row, column) of weights that are zero already: the next one is looked for.
    """
    magnitudes, heights = np.abs(inputs), np.abs(outputs)
    row = int(heights.argmax())
    left = magnitudes.copy()
    left[[c for r, c in removed if r == row]] = 0
    column = int(left.argmax())
    input_ratio, output_ratio = _ratio(float(left[column]), magnitudes), _ratio(float(heights[row]), heights)
    if input_ratio < MIN_SPIKE or output_ratio < MIN_SPIKE:
        return None
    value = float(read_row(row)[column])
    share = value * float(inputs[column]) / float(outputs[row])
    if share < MIN_SHARE:
        return None
    return Spike(row, column, value, float(inputs[column]), input_ratio, float(outputs[row]), output_ratio, share)


@dataclass(frozen=True)
class SuperWeight:
    """One super weight: its tensor, the expert's number there (None: it is one matrix), its place and value and how it spikes.

    n_pass: the pass that it was found in, those found before being zero. measured_perplexity: of the model with this
    weight alone set to zero.
    """

    name: str
    matrix: int | None
    layer: int | None
    spike: Spike
    n_pass: int
    measured_perplexity: float


@dataclass(frozen=True)
class Found:
    """A model's super weights in the order they were found, and the perplexity as it is on the same `n_tokens` of `texts`.

    is_complete: the last pass showed no spike; else the search ended at its limit.
    """

    weights: tuple[SuperWeight, ...]
    measured_perplexity: float
    n_tokens: int
    texts: tuple[str, ...]
    is_complete: bool

    def to_json(self) -> dict[str, object]:
        """Return what was found as JSON-able values, a weight's spike among its own."""
        weights = [{**{key: value for key, value in asdict(w).items() if key != "spike"}, **asdict(w.spike)} for w in self.weights]
        return {**asdict(self), "weights": weights}


# --- (b) the mask -----------------------------------------------------------------------------------------------------


class TopSelection:
    """The `n` largest of any number of scores that come in slabs: exact, in memory for 2 n and one slab.

    The threshold rises with what was seen, so that later slabs add little. Of equal scores the first ones are kept;
    zeros never are.
    """

    def __init__(self, n: int) -> None:
        self.n, self.threshold = n, np.float32(0)
        self._places: list[Indices] = []
        self._scores: list[FloatArray] = []
        self._n_kept = 0

    def add(self, first: int, scores: FloatArray) -> None:
        """Add scores (any shape) float32 of the places from `first` on; slabs come in order of their places."""
        flat = scores.reshape(-1)
        above = np.flatnonzero(flat > self.threshold)
        self._places.append(above + first)
        self._scores.append(flat[above])
        self._n_kept += len(above)
        if self._n_kept > 2 * self.n:
            self._compact()

    def _compact(self) -> None:
        places, scores = np.concatenate(self._places), np.concatenate(self._scores)
        order = np.argsort(-scores, kind="stable")[: self.n]  # places are in order, so a tie goes to the first
        if len(order) == self.n and self.n:
            self.threshold = scores[order[-1]]
        kept = np.sort(order)
        self._places, self._scores, self._n_kept = [places[kept]], [scores[kept]], len(kept)

    def take(self) -> Indices:
        """Return the places of the largest scores, sorted."""
        if not self._places:
            return np.empty(0, np.int64)
        self._compact()
        return self._places[0]


@dataclass(frozen=True)
class Mask:
    """The largest |w|·√importance of a model: `indices` by tensor, flat and sorted; `coverage` of the weights with an importance."""

    indices: Mapping[str, Indices]
    coverage: float

    @property
    def n_weights(self) -> int:
        return sum(map(len, self.indices.values()))


def mask_scores(rows: FloatArray, importance: FloatArray) -> FloatArray:
    """Return |w|·√importance of rows (n, n_in) under importance (n_in,): how much a weight moves its output, root mean square."""
    scores: FloatArray = np.abs(rows) * np.sqrt(importance)
    return scores


# --- keeping them -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pin:
    """What is kept of one row: columns of super weights, whatever it costs the row, and those of the mask, within `MAX_ROW_COST`."""

    super_columns: tuple[int, ...] = ()
    mask_columns: tuple[int, ...] = ()

    def within(self, start: int, stop: int) -> Pin:
        """Return the pin of columns start … stop − 1, counted from `start`."""
        return Pin(*(tuple(c - start for c in columns if start <= c < stop) for columns in (self.super_columns, self.mask_columns)))

    @property
    def columns(self) -> tuple[int, ...]:
        return tuple(sorted({*self.super_columns, *self.mask_columns}))


Pins = Mapping[int, Pin]  # by row


def pins_between(pins: Pins, start: int, stop: int) -> Pins:
    """Return the pins of rows start … stop − 1, counted from `start`."""
    return {row - start: pin for row, pin in pins.items() if start <= row < stop}


def misses(values: FloatArray, decoded: FloatArray) -> FloatArray:
    """Return |decoded − value| ÷ |value|; a zero that stays zero misses by nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        relative: FloatArray = np.abs(decoded - values) / np.abs(values)
    return np.nan_to_num(relative, nan=0.0, posinf=np.inf)


def _encode_row(ggml_type: GgmlType, row: FloatArray, importance: FloatArray | None, pin: Pin) -> ggml.ByteArray:
    """Return one row (n_in,) packed, (1, row bytes), so that what is pinned keeps its value: with the least boost of its importance
    that does it, else the best one. Without importance it is the plain encoder's."""
    if importance is None:
        return ggml.encode_rows(ggml_type, row[None])
    columns = list(pin.columns)
    wanted = list(pin.super_columns) or columns  # a super weight's row is judged by it alone
    limit = np.inf if pin.super_columns else 1 + MAX_ROW_COST

    def encode(boost: float) -> tuple[ggml.ByteArray, float, float]:
        assert importance is not None
        raised = importance.copy()
        raised[columns] *= np.float32(boost)
        packed = ggml.encode_rows(ggml_type, row[None], raised)
        decoded = ggml.decode_rows(ggml_type, packed)[0]
        worst = float(misses(row[wanted], decoded[wanted]).max())
        return packed, worst, float(np.square(decoded - row) @ importance)

    best, least, plain_cost = encode(1.0)
    for boost in _BOOSTS:
        if least <= TOLERANCE:
            break
        packed, worst, cost = encode(boost)
        if worst < least and cost <= limit * plain_cost:
            best, least = packed, worst
    return best


def encode_pinned_rows(
    ggml_type: GgmlType, rows: FloatArray, importance: FloatArray, pins: Pins, packed: ggml.ByteArray, first: int = 0, originals: FloatArray | None = None
) -> None:
    """Encode the pinned ones of `rows` (n, width) float32 again, so that what is pinned keeps its value, in place in `packed`.

    importance: (width,) float32 > 0. first: the column that the rows start at. originals: (n, n_in), the weights before
    error feedback changed the rows: a super weight keeps that value, and what is still free makes up for the rest.
    """
    for number, pin in pins.items():
        here = pin.within(first, first + rows.shape[1])
        if not here.columns:
            continue
        row = rows[number].copy()
        if originals is not None:
            for column in here.super_columns:
                row[column] = originals[number, first + column]
        packed[number] = _encode_row(ggml_type, row, importance, here)[0]


def encode_rows(
    ggml_type: GgmlType, rows: FloatArray, importance: FloatArray | None, pins: Pins, first: int = 0, originals: FloatArray | None = None
) -> ggml.ByteArray:
    """Return rows (n, width) packed, (n, row bytes): the pinned ones so that what is pinned keeps its value, the others as ever.

    importance: (width,) float32 > 0; without one nothing is kept. first, originals: as in `encode_pinned_rows`.
    """
    packed = ggml.encode_rows(ggml_type, rows, importance)
    if importance is not None:
        encode_pinned_rows(ggml_type, rows, importance, pins, packed, first, originals)
    return packed


def restore_missed_rows(ggml_type: GgmlType, rows: FloatArray, pins: Pins, packed: ggml.ByteArray, plain: ggml.ByteArray) -> int:
    """Take the bytes of `plain` (n, row bytes) where a row's super weight misses by more than `TOLERANCE` in `packed` and by less
    in `plain`; return in how many rows."""
    n_restored = 0
    for number, pin in pins.items():
        columns, here = list(pin.super_columns), slice(number, number + 1)
        if columns:
            worst, plain_worst = (float(misses(rows[number, columns], ggml.decode_rows(ggml_type, p[here])[0, columns]).max()) for p in (packed, plain))
            if worst > TOLERANCE and plain_worst < worst:
                packed[here] = plain[here]
                n_restored += 1
    return n_restored


def _misses_of(ggml_type: GgmlType, row: FloatArray, importance: FloatArray | None, pin: Pin, columns: Sequence[int]) -> FloatArray:
    decoded = ggml.decode_rows(ggml_type, _encode_row(ggml_type, row, importance, pin))[0]
    return misses(row[list(columns)], decoded[list(columns)])


def first_keeping(ggml_types: Iterable[GgmlType], row: FloatArray, importance: FloatArray | None, pin: Pin) -> GgmlType | None:
    """Return the first of the types whose encoder keeps every super weight of a row (n_in,) within `TOLERANCE`; None: none does."""
    return next((t for t in ggml_types if _misses_of(t, row, importance, pin, pin.super_columns).max() <= TOLERANCE), None)


def mask_misses(ggml_type: GgmlType, row: FloatArray, importance: FloatArray | None, pin: Pin) -> int:
    """Return how many of the mask's weights in a row (n_in,) miss by more than `TOLERANCE`."""
    return int((_misses_of(ggml_type, row, importance, pin, pin.mask_columns) > TOLERANCE).sum())


# --- what it came to --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MaskLog:
    """How weights of the mask came out: how many, within `TOLERANCE` of their value with and without protection, and the sums
    of squares of the weights and of both errors."""

    n: int
    n_kept: int
    n_kept_plain: int
    energy: float
    error: float
    error_plain: float

    @property
    def relative_errors(self) -> tuple[float, float]:
        """Root mean square errors over root mean square weight: as encoded, and by the plain encoder."""
        scale = self.energy or 1.0
        return (self.error / scale) ** 0.5, (self.error_plain / scale) ** 0.5


def add_masks(*logs: MaskLog | None) -> MaskLog | None:
    """Return logs added up; None where there is none."""
    given = [astuple(log) for log in logs if log is not None]
    return MaskLog(*map(sum, zip(*given, strict=True))) if given else None


def measure_mask(ggml_type: GgmlType, rows: FloatArray, importance: FloatArray | None, pins: Pins, packed: ggml.ByteArray) -> MaskLog | None:
    """Return how the mask's weights of `rows` (n, n_in) came out in `packed`, beside the plain encoder; None where there are none."""
    numbers = [number for number, pin in pins.items() if pin.mask_columns]
    if not numbers:
        return None
    picked = np.ascontiguousarray(rows[numbers])
    kept = ggml.decode_rows(ggml_type, np.ascontiguousarray(packed[numbers]))
    plain = ggml.decode_rows(ggml_type, ggml.encode_rows(ggml_type, picked, importance))
    place = np.repeat(np.arange(len(numbers)), [len(pins[number].mask_columns) for number in numbers])
    column = np.concatenate([pins[number].mask_columns for number in numbers])
    w, with_pins, without = (values[place, column] for values in (picked, kept, plain))
    squares = (float(np.square(v, dtype=np.float64).sum()) for v in (w, with_pins - w, without - w))
    return MaskLog(len(w), int((misses(w, with_pins) <= TOLERANCE).sum()), int((misses(w, without) <= TOLERANCE).sum()), *squares)
