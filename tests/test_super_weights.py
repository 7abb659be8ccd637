"""Finding super weights in arrays and keeping them in rows, against what a reader would do by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopgguf import ggml
from loopgguf.formats import GgmlType
from loopgguf.super_weights import (
    MAX_ROW_COST,
    TOLERANCE,
    MaskLog,
    Pin,
    TopSelection,
    add_masks,
    encode_pinned_rows,
    find_spike,
    first_keeping,
    mask_misses,
    mask_scores,
    measure_mask,
    misses,
    pins_between,
)

T = GgmlType
N_IN, N_OUT = 512, 64

# --- spikes -----------------------------------------------------------------------------------------------------------


def _layer(column: int = 7, row: int = 3, weight: float = -4.0, size: float = 100.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Inputs and outputs around 1 but for one of each, and a weight that turns the one into the other."""
    generator = np.random.default_rng(0)
    inputs, outputs = generator.uniform(0.5, 1.5, N_IN).astype(np.float32), generator.uniform(0.5, 1.5, N_OUT).astype(np.float32)
    W = generator.normal(scale=0.01, size=(N_OUT, N_IN)).astype(np.float32)
    W[row, column] = weight
    inputs[column], outputs[row] = size, weight * size
    return inputs, outputs, W


def test_a_spike_is_found_where_it_is() -> None:
    """Row and column mixed up, a sign lost, or a ratio to the mean instead of the median."""
    inputs, outputs, W = _layer()
    spike = find_spike(inputs, outputs, lambda row: W[row])
    assert spike is not None
    assert (spike.row, spike.column, spike.value, spike.input, spike.output) == (3, 7, -4, 100, -400)
    assert spike.input_ratio == pytest.approx(100 / np.median(np.abs(inputs)))
    assert spike.output_ratio == pytest.approx(400 / np.median(np.abs(outputs)))
    assert spike.share == pytest.approx(1)


@pytest.mark.parametrize("change", ["no input spike", "no output spike", "many make it", "sign differs", "silent"])
def test_what_is_no_super_weight(change: str) -> None:
    """A detector that fires on a large output alone, on a large input alone, or on a weight that does not make the output."""
    inputs, outputs, W = _layer(size=100.0)
    if change == "no input spike":
        inputs[7], W[3, 7] = 10, -40
    elif change == "no output spike":
        outputs[3] = -4
    elif change == "many make it":
        W[3, 7] = -1
    elif change == "sign differs":
        W[3, 7] = 4
    else:
        inputs[:], outputs[:] = 0, 0
    assert find_spike(inputs, outputs, lambda row: W[row]) is None


def test_the_next_one_of_the_same_row() -> None:
    """A search that finds the weight it has just set to zero again and again: the input's spike stays."""
    inputs, outputs, W = _layer()
    inputs[9], W[3, 9] = 90, -4
    assert (spike := find_spike(inputs, outputs, lambda row: W[row], [(3, 7)])) is not None and spike.column == 9
    assert find_spike(inputs, outputs, lambda row: W[row], [(3, 7), (3, 9)]) is None
    assert (spike := find_spike(inputs, outputs, lambda row: W[row], [(5, 7)])) is not None and spike.column == 7


# --- the mask ---------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.integers(0, 12), max_size=40), max_size=12), st.integers(0, 30))
def test_the_selection_is_exact(slabs: list[list[int]], n: int) -> None:
    """A threshold raised too far, ties settled by the slabs, zeros in the mask, memory that grows with the model."""
    selection, first = TopSelection(n), 0
    for slab in slabs:
        selection.add(first, np.array(slab, np.float32))
        first += len(slab)
        assert sum(map(len, selection._places)) <= 2 * n
    scores = np.array([score for slab in slabs for score in slab], np.float32)
    order = np.argsort(-scores, kind="stable")[:n]
    assert selection.take().tolist() == sorted(order[scores[order] > 0].tolist())


def test_scores_by_hand() -> None:
    """The importance not under the root, or of the rows."""
    rows = np.array([[-1, 2], [3, -4]], np.float32)
    assert mask_scores(rows, np.array([4, 9], np.float32)).tolist() == [[2, 6], [6, 12]]


# --- keeping them -----------------------------------------------------------------------------------------------------


def _rows(seed: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Rows with one weight each that its block's scale search gives up for its neighbours."""
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(12, N_IN)).astype(np.float32)
    rows[4, 100] = 1.7
    return rows, generator.gamma(1.0, size=N_IN).astype(np.float32) + np.float32(0.01)


def _decoded(ggml_type: GgmlType, packed: np.ndarray) -> np.ndarray:
    return ggml.decode_rows(ggml_type, packed)


@pytest.mark.parametrize("ggml_type", [T.Q2_K, T.Q3_K, T.Q4_0, T.Q4_K, T.IQ4_XS])
def test_a_pinned_weight_is_kept_and_other_rows_are_untouched(ggml_type: GgmlType) -> None:
    """Rows without a pin that change a byte; a pin of the wrong row or column; a boost that does nothing."""
    rows, importance = _rows()
    plain = ggml.encode_rows(ggml_type, rows, importance)
    packed = plain.copy()
    encode_pinned_rows(ggml_type, rows, importance, {4: Pin(super_columns=(100,))}, packed)
    assert np.array_equal(np.delete(packed, 4, 0), np.delete(plain, 4, 0))
    before, after = (float(misses(rows[4, [100]], _decoded(ggml_type, p)[4, [100]])[0]) for p in (plain, packed))
    assert after <= before
    assert before <= TOLERANCE or after < 0.5 * before


def test_what_is_kept_already_costs_nothing() -> None:
    """A boost where none is needed: the plain encoder's bytes are the best there are."""
    rows, importance = _rows()
    importance[100] = 1e6
    plain = ggml.encode_rows(T.Q4_K, rows, importance)
    packed = plain.copy()
    encode_pinned_rows(T.Q4_K, rows, importance, {4: Pin(super_columns=(100,))}, packed)
    assert np.array_equal(packed, plain)


def test_the_mask_is_kept_within_its_cost() -> None:
    """A mask that spoils the rows it lies in: their error under their own importance may rise by 2 %."""
    rows, importance = _rows()
    pins = {row: Pin(mask_columns=(row, 200 + row)) for row in range(12)}
    plain = ggml.encode_rows(T.Q2_K, rows, importance)
    packed = plain.copy()
    encode_pinned_rows(T.Q2_K, rows, importance, pins, packed)
    costs = [np.square(_decoded(T.Q2_K, p) - rows) @ importance for p in (plain, packed)]
    assert (costs[1] <= costs[0] * (1 + MAX_ROW_COST) * (1 + 1e-6)).all() and not np.array_equal(packed, plain)
    log = measure_mask(T.Q2_K, rows, importance, pins, packed)
    assert log is not None and log.n == 24
    place = (np.repeat(np.arange(12), 2), np.concatenate([pins[row].mask_columns for row in range(12)]))
    errors = [_decoded(T.Q2_K, p)[place] - rows[place] for p in (packed, plain)]
    assert (log.n_kept, log.n_kept_plain) == tuple((np.abs(e) <= TOLERANCE * np.abs(rows[place])).sum() for e in errors)
    scale = np.sqrt(np.square(rows[place]).mean())
    assert log.relative_errors == pytest.approx([np.sqrt(np.square(e).mean()) / scale for e in errors])
    assert log.error <= log.error_plain


def test_a_part_of_the_columns_with_the_originals() -> None:
    """Error feedback that moves a super weight, or a block of columns that takes the pin of another."""
    rows, importance = _rows()
    drifted = rows.copy()
    drifted[4, 100] += 0.3
    block = np.ascontiguousarray(drifted[:, :256])
    plain = ggml.encode_rows(T.Q6_K, block, importance[:256].copy())
    packed = plain.copy()
    encode_pinned_rows(T.Q6_K, block, importance[:256].copy(), {4: Pin((100,)), 5: Pin((300,))}, packed, 0, rows)
    assert misses(rows[4, [100]], _decoded(T.Q6_K, packed)[4, [100]])[0] <= TOLERANCE
    assert np.array_equal(np.delete(packed, 4, 0), np.delete(plain, 4, 0))
    second = ggml.encode_rows(T.Q6_K, np.ascontiguousarray(drifted[:, 256:]), importance[256:].copy())
    packed = second.copy()
    encode_pinned_rows(T.Q6_K, np.ascontiguousarray(drifted[:, 256:]), importance[256:].copy(), {4: Pin((100,))}, packed, 256, rows)
    assert np.array_equal(packed, second)


def test_pins_of_a_slab() -> None:
    """Pins that are not counted from the slab's first row and column."""
    pins = {3: Pin((1,)), 8: Pin((), (2, 300))}
    assert pins_between(pins, 4, 9) == {4: Pin((), (2, 300))}
    assert Pin((1, 260), (300,)).within(256, 512) == Pin((4,), (44,))
    assert Pin((9, 2), (5, 2)).columns == (2, 5, 9)


def test_the_first_type_that_keeps_it() -> None:
    """A type raised too far, or not far enough; without importance the plain encoder is tried."""
    rows, importance = _rows()
    row, pin = rows[4] * np.float32(1), Pin((100,), (7,))
    steps = [T.IQ2_XXS, T.Q2_K, T.Q3_K, T.Q4_K, T.Q6_K, T.Q8_0, T.F16]
    found = first_keeping(steps, row, importance, pin)
    assert found is not None
    for ggml_type in steps[: steps.index(found) + 1]:
        packed = np.ascontiguousarray(ggml.encode_rows(ggml_type, row[None], importance))
        encode_pinned_rows(ggml_type, row[None], importance, {0: pin}, packed)
        assert (misses(row[[100]], _decoded(ggml_type, packed)[0, [100]])[0] <= TOLERANCE) == (ggml_type is found)
    assert first_keeping([T.Q2_K, T.F16], row, None, pin) in (T.Q2_K, T.F16)
    assert first_keeping([], row, importance, pin) is None
    assert mask_misses(T.F16, row, importance, pin) == 0


def test_logs_add_up() -> None:
    """A slab's log that replaces the others'."""
    assert add_masks(None, MaskLog(1, 1, 0, 2.0, 0.5, 1.0), MaskLog(2, 0, 0, 2.0, 0.5, 3.0)) == MaskLog(3, 1, 0, 4.0, 1.0, 4.0)
    assert add_masks(None, None) is None
    assert misses(np.array([0, 0, 2], np.float32), np.array([0, 1, 1], np.float32)).tolist() == [0, np.inf, 0.5]
