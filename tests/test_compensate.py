"""Error feedback against the textbook: at each step, the best change of all that is still free, by a fresh inverse."""

from __future__ import annotations

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopgguf import compensate as compensate_module
from loopgguf import ggml
from loopgguf.compensate import (
    FAST,
    FULL,
    ROW_BLOCK,
    Columns,
    Damping,
    Effort,
    LossCurvature,
    compensate,
    damped,
    encode_guarded,
    feedback_factor,
    mixed,
    row_blocks,
    weighted_error,
)
from loopgguf.drift import Drift, Moments
from loopgguf.formats import GgmlType
from loopgguf.super_weights import Pin, encode_rows, restore_missed_rows

CHEAP_TYPES = [GgmlType.Q4_0, GgmlType.Q5_1, GgmlType.IQ4_NL, GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.Q6_K, GgmlType.IQ4_XS]


def _covariance(n: int, seed: int, rank: int) -> np.ndarray:
    """A covariance of correlated columns of very different size, as activations have."""
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(rank, n)) * np.exp(generator.normal(size=n))
    return damped(X.T @ X / rank, Damping(0.05))


def _textbook(W: np.ndarray, H: np.ndarray, encode: object, width: int) -> np.ndarray:
    """Columns left to right; each time the remaining weights are changed by −e H_br H_rr⁻¹, inverted afresh."""
    target, decoded = W.astype(np.float64), np.zeros(W.shape)
    for start in range(0, W.shape[1], width):
        block, rest = slice(start, start + width), slice(start + width, None)
        _, decoded[:, block] = encode(target[:, block].astype(np.float32), start)  # type: ignore[operator]
        if start + width < W.shape[1]:
            target[:, rest] -= (decoded[:, block] - target[:, block]) @ H[block, rest] @ np.linalg.inv(H[rest, rest])
    return decoded


def _round_to(step: float) -> object:
    def encode(rows: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
        codes = np.round(rows / step)
        return codes.astype(np.int8).view(np.uint8), (codes * step).astype(np.float32)

    return encode


@pytest.mark.parametrize("width", [1, 4, 16])
def test_columns_are_the_textbooks(width: int) -> None:
    """Index slips in the update: they still beat rounding to nearest, so only the code-for-code comparison sees them."""
    W = np.random.default_rng(1).normal(size=(9, 32)).astype(np.float32)
    H, encode = _covariance(32, 2, 20), _round_to(0.37)
    out = np.empty((9, 32), np.uint8)
    ours = Columns(H, width).encode(W, encode, out)  # type: ignore[arg-type]
    theirs = _textbook(W, H, encode, width)
    assert np.array_equal(ours, theirs.astype(np.float32))
    assert np.array_equal(out.view(np.int8) * np.float32(0.37), ours.astype(np.float32))


@pytest.mark.parametrize("ggml_type", CHEAP_TYPES)
def test_real_types_are_the_textbooks(ggml_type: GgmlType) -> None:
    """Bytes of a block that land in the wrong place of the row, or an importance that is shifted."""
    n = 512
    W = np.random.default_rng(3).normal(size=(6, n)).astype(np.float32)
    H = _covariance(n, 4, 700)
    importance = np.diag(H).astype(np.float32)
    packed, decoded = compensate(W, ggml_type, H, importance=importance)

    def encode(rows: np.ndarray, first: int) -> tuple[np.ndarray, np.ndarray]:
        block = ggml.encode_rows(ggml_type, np.ascontiguousarray(rows), importance[first : first + rows.shape[1]].copy())
        return block, ggml.decode_rows(ggml_type, block)

    width = 256 if ggml_type.name.endswith("_K") or ggml_type.name.endswith("XS") else 32
    same = np.isclose(decoded, _textbook(W, H, encode, width), atol=1e-4).all(axis=1)
    assert same.mean() >= 0.5  # float32 may decide a near-tie otherwise, and the rest of that row, but no other, follows
    assert np.array_equal(ggml.decode_rows(ggml_type, packed), decoded)


def test_rows_are_the_textbooks() -> None:
    """The transpose that is easy to forget when errors go from row to row."""
    n_out, n_in = 3 * ROW_BLOCK, 32
    W = np.random.default_rng(5).normal(size=(n_out, n_in)).astype(np.float32)
    H, H_O = _covariance(n_in, 6, 50), _covariance(n_out, 7, 150)
    importance = np.diag(H).astype(np.float32)
    _, decoded = compensate(W, GgmlType.Q4_0, H, importance=importance, H_O=H_O)
    target = W.astype(np.float64)
    for start in range(0, n_out, ROW_BLOCK):
        rows, rest = slice(start, start + ROW_BLOCK), slice(start + ROW_BLOCK, None)
        _, expected = compensate(target[rows].astype(np.float32), GgmlType.Q4_0, H, importance=importance)
        assert np.allclose(decoded[rows], expected, atol=1e-4)
        if start + ROW_BLOCK < n_out:
            target[rest] -= np.linalg.inv(H_O[rest, rest]) @ H_O[rest, rows] @ (expected - target[rows])


def test_rows_of_a_block_go_together_as_if_those_after_it_answered() -> None:
    """A block of H_O itself instead of what is left of it when the rows after it make good what they can."""
    n_out = 2 * ROW_BLOCK + 8
    H_O = _covariance(n_out, 23, 150)
    blocks, n = row_blocks(n_out, H_O), ROW_BLOCK
    assert [(rows.start, rows.stop) for rows, _, _ in blocks] == [(0, n), (n, 2 * n), (2 * n, n_out)]
    for i, (rows, coupling, _) in enumerate(blocks):
        rest, after = slice(rows.start, None), slice(rows.stop, None)
        answer = -np.linalg.inv(H_O[after, after]) @ H_O[after, rows]
        assert np.allclose(coupling, np.linalg.inv(np.linalg.inv(H_O[rest, rest])[:n, :n]), rtol=1e-4, atol=1e-5)
        handed_on = [carry[:, rows] for _, _, carry in blocks[i + 1 :] if carry is not None]
        assert len(handed_on) == len(blocks) - i - 1 and np.allclose(np.vstack([*handed_on, answer[:0]]), answer, atol=1e-5)
    assert all(carry is None and np.array_equal(coupling, np.eye(len(coupling))) for _, coupling, carry in row_blocks(n_out, None))


@pytest.mark.parametrize(("ggml_type", "sweeps", "is_thorough"), [(GgmlType.Q4_0, 0, False), (GgmlType.Q3_K, 2, True)])
def test_parts_of_the_columns_are_encoded_as_if_there_were_no_others(ggml_type: GgmlType, sweeps: int, is_thorough: bool) -> None:
    """Bytes, importances, pinned weights or errors of one part that go to another, and a damping or gradient of all columns."""
    n_out, n_in = 2 * ROW_BLOCK, 1280  # in parts of 768 and 512
    W = np.random.default_rng(30).normal(size=(n_out, n_in)).astype(np.float32)
    H, H_O = _covariance(n_in, 31, 2000), _covariance(n_out, 32, 150)
    importance = np.diag(H).astype(np.float32)

    def encode(columns: slice, pins: dict[int, Pin], max_columns: int | None) -> tuple[np.ndarray, np.ndarray]:
        return compensate(
            np.ascontiguousarray(W[:, columns]),
            ggml_type,
            H[columns, columns],
            importance=importance[columns].copy(),
            damping=Damping(0.1),
            H_O=H_O,
            sweeps=sweeps,
            is_thorough=is_thorough,
            max_columns=max_columns,
            pins=pins,
        )

    whole, parts = encode(slice(None), {5: Pin((800,))}, 1024), (encode(slice(768), {}, None), encode(slice(768, None), {5: Pin((32,))}, None))
    for ours, left, right in zip(whole, *parts, strict=True):
        assert np.array_equal(ours, np.hstack([left, right]))
    assert not np.array_equal(whole[0], encode(slice(None), {5: Pin((800,))}, None)[0])


def test_effort_says_how_many_columns_go_together() -> None:
    """An option that no encoder hears of."""
    W = np.random.default_rng(33).normal(size=(ROW_BLOCK, 512)).astype(np.float32)
    H, importance = _covariance(512, 34, 900), np.ones(512, np.float32)
    curvature, inner = LossCurvature(H, H), np.diag(H).astype(np.float32)
    for effort in (FAST, replace(FULL, dampings=(Damping(0.1),))):
        how = {"damping": Damping(0.1), "sweeps": effort.sweeps, "is_thorough": effort.is_thorough, "max_columns": 256}
        expected, _ = compensate(W, GgmlType.Q4_0, H, importance=inner, **how)  # type: ignore[arg-type]
        assert np.array_equal(encode_guarded(W, GgmlType.Q4_0, importance, curvature, replace(effort, max_columns=256)).packed, expected)


def test_identity_changes_nothing() -> None:
    """Feedback where there is nothing to feed back: uncorrelated inputs give the plain encoder's bytes."""
    W = np.random.default_rng(8).normal(size=(4, 512)).astype(np.float32)
    ones = np.ones(512, np.float32)
    packed, _ = compensate(W, GgmlType.Q3_K, np.eye(512), importance=ones)
    plain = np.concatenate([ggml.encode_rows(GgmlType.Q3_K, np.ascontiguousarray(W[:, i : i + 256]), ones[:256]) for i in (0, 256)], axis=1)
    assert np.array_equal(packed, plain)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    """A slab of rows must give the bytes that the whole tensor gives."""
    W = np.random.default_rng(9).normal(size=(40, 512)).astype(np.float32)
    H = _covariance(512, 10, 600)
    importance = np.diag(H).astype(np.float32)
    whole, _ = compensate(W, GgmlType.Q2_K, H, importance=importance)
    parts = [compensate(W[i : i + 8], GgmlType.Q2_K, H, importance=importance)[0] for i in range(0, 40, 8)]
    assert np.mean(whole != np.concatenate(parts)) < 1e-3  # BLAS may round a product of other shape in another way


@pytest.mark.parametrize("ggml_type", [*CHEAP_TYPES, pytest.param(GgmlType.IQ3_XXS, marks=pytest.mark.slow)])
def test_the_objective_falls(ggml_type: GgmlType) -> None:
    """A wrong sign, which makes errors worse instead of better."""
    W = np.random.default_rng(11).normal(size=(32, 512)).astype(np.float32)
    H = _covariance(512, 12, 300)
    importance = np.diag(H).astype(np.float32)
    plain = ggml.decode_rows(ggml_type, ggml.encode_rows(ggml_type, W, importance))
    _, decoded = compensate(W, ggml_type, H, importance=importance)
    assert weighted_error(decoded - W, H) < 0.9 * weighted_error(plain - W, H)


def test_feedback_that_fails_leaves_the_plain_bytes_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback in the middle of a model, or a failure that nobody hears of."""

    def fail(H: np.ndarray, damping: Damping) -> np.ndarray:
        raise np.linalg.LinAlgError

    W = np.random.default_rng(15).normal(size=(4, 256)).astype(np.float32)
    H, ones = _covariance(256, 16, 300), np.ones(256, np.float32)
    monkeypatch.setattr(compensate_module, "feedback_factor", fail)
    encoding = compensate_module.encode_guarded(W, GgmlType.Q4_0, ones, compensate_module.LossCurvature(H, held_out=H))
    assert np.array_equal(encoding.packed, ggml.encode_rows(GgmlType.Q4_0, W, ones))
    assert (encoding.way, encoding.damping) == ("plain (feedback failed)", None)


def test_an_effort_is_what_it_says() -> None:
    """Sweeps of K types for the others, or the other way round: `fast` is then slower, or worse, than it has to be."""
    W = np.random.default_rng(24).normal(size=(ROW_BLOCK, 256)).astype(np.float32)
    H, importance = _covariance(256, 25, 300), np.ones(256, np.float32)
    for ggml_type, sweeps in ((GgmlType.Q4_0, 3), (GgmlType.Q3_K, 2)):
        damped_H, inner = damped(H, Damping(0.1)), np.diag(H).astype(np.float32)
        expected, other = (compensate(W, ggml_type, damped_H, importance=inner, sweeps=n)[0] for n in (sweeps, 5 - sweeps))
        packed = encode_guarded(W, ggml_type, importance, LossCurvature(H, H), FAST).packed
        assert np.array_equal(packed, expected) and not np.array_equal(packed, other)


def test_whole_effort_lowers_both_objectives() -> None:
    """Descents that undo what feedback from row to row has done, or the other way round."""
    n_out, n_in = 2 * ROW_BLOCK, 256
    W = np.random.default_rng(17).normal(size=(n_out, n_in)).astype(np.float32)
    H, H_O = _covariance(n_in, 18, 300), _covariance(n_out, 19, 150)
    importance = np.diag(H).astype(np.float32)

    def joint(ggml_type: GgmlType, sweeps: int, is_thorough: bool = False) -> float:
        packed, decoded = compensate(W, ggml_type, H, importance=importance, H_O=H_O, sweeps=sweeps, is_thorough=is_thorough)
        assert np.array_equal(ggml.decode_rows(ggml_type, packed), decoded)
        return float(np.trace(H_O @ (decoded - W) @ H @ (decoded - W).T))

    for ggml_type in (GgmlType.Q4_0, GgmlType.Q3_K, GgmlType.IQ3_S):
        once, thorough = joint(ggml_type, 1), joint(ggml_type, 3, is_thorough=True)
        assert once < 0.9 * joint(ggml_type, 0) and thorough < 0.97 * once


@pytest.mark.parametrize("effort", [FAST, FULL], ids=["fast", "full"])
def test_memory_is_a_few_slabs_and_matrices(effort: Effort) -> None:
    """A copy of the weights or of a matrix too many, where matrices are most of what a large model takes."""
    W = np.random.default_rng(26).normal(size=(64, 1024)).astype(np.float32)
    H, H_O = _covariance(1024, 27, 2000).astype(np.float32), _covariance(64, 28, 100).astype(np.float32)
    importance, curvature = np.diag(H).copy(), LossCurvature(H, H.copy(), H_O, H_O.copy())
    encode_guarded(W, GgmlType.Q4_0, importance, curvature, effort)  # what is made once, compiled loops and tables, is not counted
    tracemalloc.start()
    try:
        encode_guarded(W, GgmlType.Q4_0, importance, curvature, effort)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    held = W.nbytes + 2 * H.nbytes + 2 * H_O.nbytes
    assert held + peak <= 4 * W.nbytes + 2.5 * 2 * (H.nbytes + H_O.nbytes)  # 2.5 matrices in double precision


def test_parts_of_the_columns_take_memory_one_after_the_other() -> None:
    """Matrices of a part that lie there while the next one's are made."""
    W = np.random.default_rng(35).normal(size=(8, 2048)).astype(np.float32)
    H, importance = np.eye(2048, dtype=np.float32) + np.float32(0.5), np.ones(2048, np.float32)

    def peak(n_in: int) -> int:
        tracemalloc.start()
        try:
            compensate(np.ascontiguousarray(W[:, :n_in]), GgmlType.Q4_0, H[:n_in, :n_in], importance=importance, sweeps=2, max_columns=512)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(512)  # what is made once is not counted
    assert peak(2048) < peak(512) + 6 * W.nbytes


@pytest.mark.parametrize("has_rows", [False, True])
def test_a_pinned_weight_keeps_its_value_and_its_error_is_fed_back(has_rows: bool) -> None:
    """Feedback that moves a super weight before it is encoded; a pin counted from the wrong row or column; rows above that change."""
    W = np.random.default_rng(17).normal(size=(2 * ROW_BLOCK, 512)).astype(np.float32)
    row, column = ROW_BLOCK + 5, 300
    H, H_O = _covariance(512, 18, 600), _covariance(len(W), 19, 150) if has_rows else None
    importance = np.diag(H).astype(np.float32)
    plain, without = compensate(W, GgmlType.Q4_K, H, importance=importance, H_O=H_O)
    packed, decoded = compensate(W, GgmlType.Q4_K, H, importance=importance, H_O=H_O, pins={row: Pin((column,))})
    assert abs(without[row, column] / W[row, column] - 1) > 0.02  # else nothing is shown here
    assert abs(decoded[row, column] / W[row, column] - 1) <= 0.01
    assert np.array_equal(ggml.decode_rows(GgmlType.Q4_K, packed), decoded)
    assert np.array_equal(packed[:row], plain[:row]) and np.array_equal(decoded[row, :256], without[row, :256])
    guarded = compensate_module.encode_guarded(W, GgmlType.Q4_K, importance, LossCurvature(H, held_out=H, H_O=H_O), pins={row: Pin((column,))})
    assert guarded.way != "plain" and abs(ggml.decode_rows(GgmlType.Q4_K, guarded.packed)[row, column] / W[row, column] - 1) <= 0.01


def test_a_row_that_lost_its_super_weight_takes_the_plain_bytes() -> None:
    """Single codes that move after the encoder has kept the weight; rows that lose their feedback without need."""
    W = np.random.default_rng(17).normal(size=(ROW_BLOCK, 512)).astype(np.float32)
    importance, pins = np.ones(512, np.float32), {row: Pin((300,)) for row in range(0, ROW_BLOCK, 2)}
    plain, moved = encode_rows(GgmlType.Q4_K, W, importance, pins), W.copy()
    moved[::4, 300] *= 1.5
    packed = encode_rows(GgmlType.Q4_K, moved, importance, pins)
    before = packed.copy()
    assert restore_missed_rows(GgmlType.Q4_K, W, pins, packed, plain) == ROW_BLOCK // 4
    assert np.array_equal(packed[::4], plain[::4]) and not np.array_equal(before[::4], plain[::4])
    others = np.arange(ROW_BLOCK) % 4 != 0
    assert np.array_equal(packed[others], before[others])


# --- aiming -----------------------------------------------------------------------------------------------------------


def _drift(n: int, seed: int) -> Drift:
    """A drift that asks for weights of which each is some of all others, and on held-out tokens for the same."""
    H, generator = _covariance(n, seed, 2 * n).astype(np.float32), np.random.default_rng(seed + 1)
    cross = (generator.normal(size=(n, n)) * 0.5 / np.sqrt(n)).astype(np.float32) @ H
    moments = (Moments(slice(0, n), H, cross, 8 * n),)
    return Drift(moments, moments)


@pytest.mark.parametrize("ggml_type", [GgmlType.Q4_0, GgmlType.Q3_K])
@pytest.mark.parametrize("effort", [FAST, replace(FULL, dampings=FULL.dampings[:2])], ids=["fast", "full"])
def test_feedback_aims_where_the_drift_asks_it_to(ggml_type: GgmlType, effort: Effort) -> None:
    """A drift that no encoder hears of, an error that is not measured from what was aimed at, and a log that does not say what was done."""
    W = np.random.default_rng(40).normal(size=(ROW_BLOCK, 256)).astype(np.float32)
    H, H_O, before = _covariance(256, 41, 400).astype(np.float32), _covariance(ROW_BLOCK, 42, 90).astype(np.float32), W.copy()
    curvature, drift, importance = LossCurvature(H, H, H_O, H_O), _drift(256, 43), np.ones(256, np.float32)
    target = drift.aim(W)
    aimed, plain_aim, expected = (
        encode_guarded(weights, ggml_type, importance, known, effort)
        for weights, known in ((W, replace(curvature, drift=drift)), (W, curvature), (target, curvature))
    )
    assert (aimed.is_aimed, plain_aim.is_aimed, expected.is_aimed) == (True, False, False)
    assert aimed.way == "columns and rows" and np.array_equal(aimed.packed, expected.packed) and np.array_equal(W, before)
    errors = [curvature.estimate(ggml.decode_rows(ggml_type, encoding.packed) - target) for encoding in (aimed, plain_aim)]
    assert errors[0] < 0.5 * errors[1]
    plain = curvature.estimate(ggml.decode_rows(ggml_type, encode_rows(ggml_type, W, importance, {})) - W)
    assert aimed.held_out_ratio == pytest.approx(errors[0] / plain)


def test_the_plain_encoding_is_of_the_models_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that were moved for a drift under bytes that are said to be the plain encoder's; an aim that is none of the log's."""
    W = np.random.default_rng(44).normal(size=(4, 256)).astype(np.float32)
    H, ones = _covariance(256, 45, 300), np.ones(256, np.float32)

    def fail(*_: object, **__: object) -> None:
        raise np.linalg.LinAlgError

    monkeypatch.setattr(compensate_module, "compensate", fail)
    encoding = encode_guarded(W, GgmlType.Q4_0, ones, LossCurvature(H, H, drift=_drift(256, 46)))
    assert np.array_equal(encoding.packed, ggml.encode_rows(GgmlType.Q4_0, W, ones)) and not encoding.is_aimed


def test_a_drift_that_asks_for_nothing_changes_nothing() -> None:
    """A copy of the weights, or a log that says that they make up for something."""
    W = np.random.default_rng(47).normal(size=(8, 256)).astype(np.float32)
    H, ones, drift = _covariance(256, 48, 300), np.ones(256, np.float32), _drift(256, 49)
    opposite = Drift(drift.train, [replace(moments, cross=-moments.cross) for moments in drift.holdout])
    with_drift, without = (encode_guarded(W, GgmlType.Q4_0, ones, LossCurvature(H, H, drift=known)) for known in (opposite, None))
    assert np.array_equal(with_drift.packed, without.packed) and not with_drift.is_aimed


def test_a_drift_that_cannot_be_inverted_leaves_the_plain_bytes_and_says_so() -> None:
    """A traceback in the middle of a model, for a few channels that hold nearly all of a float32 matrix."""
    W = np.random.default_rng(50).normal(size=(4, 256)).astype(np.float32)
    H, ones = _covariance(256, 51, 300), np.ones(256, np.float32)
    second = np.eye(256, dtype=np.float32)
    second[3, 3] = -100
    moments = (Moments(slice(0, 256), second, np.eye(256, dtype=np.float32), 8 * 256),)
    encoding = encode_guarded(W, GgmlType.Q4_0, ones, LossCurvature(H, H, drift=Drift(moments, moments)))
    assert np.array_equal(encoding.packed, ggml.encode_rows(GgmlType.Q4_0, W, ones))
    assert encoding.way == "plain (feedback failed)" and not encoding.is_aimed


@pytest.mark.parametrize("max_columns", [None, 256])
def test_pinned_weights_stay_where_all_others_are_moved(max_columns: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """A super weight that is moved for the drift and then kept at another value, or one of the mask; rows and columns mixed up."""
    W = np.random.default_rng(52).normal(size=(2 * ROW_BLOCK, 512)).astype(np.float32)
    row, column, masked, mask = ROW_BLOCK + 5, 300, 3, (7, 480)
    W[row, column] = 3.0
    pins, drift, before = {row: Pin((column,)), masked: Pin((), mask)}, _drift(512, 53), W.copy()
    H, H_O, importance = _covariance(512, 54, 600), _covariance(len(W), 55, 150), np.ones(512, np.float32)
    target = drift.aim(W)
    assert abs(target[row, column] / W[row, column] - 1) > 0.02  # else nothing is shown here
    aims: list[np.ndarray] = []
    real = compensate_module.compensate
    monkeypatch.setattr(compensate_module, "compensate", lambda aim, *rest, **how: (aims.append(aim), real(aim, *rest, **how))[1])
    curvature, effort = LossCurvature(H, H, H_O, H_O, drift=drift), replace(FAST, max_columns=max_columns)
    encoding = encode_guarded(W, GgmlType.Q4_K, importance, curvature, effort, pins)
    decoded = ggml.decode_rows(GgmlType.Q4_K, encoding.packed)
    assert encoding.is_aimed and abs(decoded[row, column] / W[row, column] - 1) <= 0.01 and np.array_equal(W, before)
    for aim in aims:
        assert np.argwhere(aim != target).tolist() == [[masked, mask[0]], [masked, mask[1]], [row, column]]
        assert aim[row, column] == W[row, column] and (aim[masked, mask] == W[masked, mask]).all()


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 24), seed=st.integers(0, 999))
def test_factor(n: int, seed: int) -> None:
    """H⁻¹ = Uᵀ U with U upper: reading the matrix backwards must not leave it so."""
    H = _covariance(n, seed, 2 * n)
    U = feedback_factor(H)
    assert np.allclose(U, np.triu(U))
    assert np.allclose(U.T @ U @ H, np.eye(n), atol=1e-6)


def test_damping() -> None:
    """Hand-computed: λ of the mean diagonal added, or off-diagonals shrunk; dead columns made harmless."""
    H = np.array([[4.0, 2.0, 0.0], [2.0, 2.0, 0.0], [0.0, 0.0, 0.0]])
    assert np.allclose(damped(H, Damping(0.5)), [[5, 2, 0], [2, 3, 0], [0, 0, 2]])
    assert np.allclose(damped(H, Damping(0.5, to_diagonal=True)), [[4, 1, 0], [1, 2, 0], [0, 0, 2]])


def test_mix() -> None:
    """Hand-computed: equal parts whatever their scales, one that says nothing left out, and something to go by in any case."""
    a, b, zeros = np.array([[4.0, 2.0], [2.0, 2.0]]), np.array([[10.0, 0.0], [0.0, 30.0]]), np.zeros((2, 2))
    assert np.allclose(mixed(a), [[4 / 3, 2 / 3], [2 / 3, 2 / 3]])
    assert np.allclose(mixed(a, b), [[11 / 12, 1 / 3], [1 / 3, 13 / 12]])
    assert np.allclose(mixed(a, zeros), mixed(a)) and np.allclose(mixed(zeros), np.eye(2))


def test_products_in_slabs_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that a slab leaves out or takes twice, of the estimates and of the descents along rows."""
    W = np.random.default_rng(20).normal(size=(40, 256)).astype(np.float32)
    H, H_O = _covariance(256, 21, 300), _covariance(40, 22, 60)
    importance, curvatures = np.diag(H).astype(np.float32), (LossCurvature(H, H), LossCurvature(H, H, H_O, H_O))

    def results() -> tuple[np.ndarray, list[float]]:
        return compensate(W, GgmlType.Q4_0, H, importance=importance, sweeps=2)[0], [c.estimate(W) for c in curvatures]

    packed, whole = results()
    monkeypatch.setattr(compensate_module, "SLAB_ROWS", 16)
    same, parts = results()
    assert np.mean(packed != same) < 1e-3 and np.allclose(whole, parts)  # BLAS may round a product of other shape in another way
    assert np.isclose(whole[1], np.trace(H_O @ W @ H @ W.T), rtol=1e-4)


def test_weighted_error_is_the_trace() -> None:
    """tr(E H Eᵀ), and its rows weighed by their curvature."""
    E = np.random.default_rng(13).normal(size=(3, 5)).astype(np.float32)
    H, r = _covariance(5, 14, 9), np.array([1.0, 2.0, 3.0])
    assert np.isclose(weighted_error(E, H), np.trace(E @ H @ E.T), rtol=1e-4)
    assert np.isclose(weighted_error(E, H, r), np.trace(np.diag(r) @ E @ H @ E.T), rtol=1e-4)
