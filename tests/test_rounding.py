"""The compiled loops against a dozen lines that do the same by definition, one column or unit at a time, in float64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from loopgguf import ggml
from loopgguf.compensate import Damping, damped, feedback_factor
from loopgguf.formats import GgmlType
from loopgguf.grids import Grid, find_grid, points_of, read_scales, unpack
from loopgguf.rounding import VISITED_COLUMNS, Rounding, choose, choose_signed, nearest_level, own_costs

SCALAR_TYPES = [GgmlType.Q4_0, GgmlType.Q5_1, GgmlType.Q8_0, GgmlType.IQ4_NL, GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.Q4_K, GgmlType.Q6_K, GgmlType.IQ4_XS]
UNIT_TYPES = [GgmlType.IQ2_XXS, GgmlType.IQ2_S, GgmlType.IQ3_XXS, GgmlType.IQ3_S, pytest.param(GgmlType.IQ1_S, marks=pytest.mark.slow)]


def _covariance(n: int, seed: int) -> np.ndarray:
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(2 * n, n)) @ (np.eye(n) + 0.5 * generator.normal(size=(n, n)) / np.sqrt(n))
    return damped(X.T @ X / len(X), Damping(0.05))


def _case(ggml_type: GgmlType, n_blocks: int = 1, n: int = 5) -> tuple[Grid, np.ndarray, np.ndarray, np.ndarray]:
    """A grid, weights, H, and the weights as libggml packs them."""
    grid = find_grid(ggml_type)
    assert grid is not None
    n_in = n_blocks * 256
    W = np.random.default_rng(ggml_type).normal(size=(n, n_in)).astype(np.float32)
    H = _covariance(n_in, 3)
    return grid, W, H, ggml.encode_rows(ggml_type, W, np.diag(H).astype(np.float32))


@pytest.mark.parametrize("ggml_type", SCALAR_TYPES, ids=lambda t: t.name)
def test_scalar_codes_are_the_textbooks(ggml_type: GgmlType) -> None:
    """Index slips in the update: the result still beats rounding to nearest, so only equal codes show them."""
    grid, W, H, packed = _case(ggml_type)
    ours = unpack(grid, Rounding(grid, H).round_block(packed, W, feedback_factor(H))).index
    scales, target, theirs = read_scales(grid, packed), W.astype(np.float64), np.empty_like(ours)
    for j in range(W.shape[1]):  # the best change of all that is still free, by a fresh inverse
        values = scales.scale[:, j, None].astype(np.float64) * grid.points[:, 0] + scales.offset[:, j, None]
        theirs[:, j] = np.abs(values - target[:, j, None]).argmin(axis=1)
        met = np.take_along_axis(values, theirs[:, j, None], axis=1)[:, 0]
        target[:, j + 1 :] -= np.outer(met - target[:, j], H[j, j + 1 :] @ np.linalg.inv(H[j + 1 :, j + 1 :]))
    dead = scales.scale == 0
    assert ((ours == theirs) | dead).mean() > 0.999  # a tie may fall otherwise, and what follows it


@pytest.mark.parametrize("ggml_type", UNIT_TYPES, ids=lambda t: t.name)
def test_unit_codes_are_the_textbooks(ggml_type: GgmlType) -> None:
    """The factor of a unit transposed, or an error that is handed on from the wrong column of it."""
    grid, W, H, packed = _case(ggml_type)
    rounding = Rounding(grid, H)
    ours = unpack(grid, rounding.round_block(packed, W, feedback_factor(H)))
    scales, target, step = read_scales(grid, packed), W.astype(np.float64), rounding._step
    theirs = unpack(grid, packed)
    signs = np.zeros(W.shape, np.bool_) if theirs.is_negative is None else theirs.is_negative
    for first in range(0, W.shape[1], step):
        block, rest, units = slice(first, first + step), slice(first + step, None), slice(first // grid.unit, (first + step) // grid.unit)
        after = H[block, rest] @ np.linalg.inv(H[rest, rest])
        for i, s in enumerate(scales.scale[:, first]):
            if s != 0:
                x = (target[i, block] - scales.offset[i, block]) / s
                M, columns, has_signs = H[block, block] - after @ H[rest, block], np.ascontiguousarray(grid.points.T, float), grid.sign_places is not None
                own = own_costs(M[None], columns, has_signs)[0]
                choose(x, M, own, columns, has_signs, grid.has_parity, theirs.index[i, units], signs[i, block])
        met = (scales.scale * points_of(grid, theirs) + scales.offset)[:, block]
        target[:, rest] -= (met - target[:, block]) @ after
    assert (ours.index == theirs.index).mean() > 0.99  # a tie may fall otherwise, and what follows it


@pytest.mark.parametrize("has_parity", [False, True])
@pytest.mark.parametrize("unit", [4, 8])
def test_signed_points_are_the_best_of_all(unit: int, has_parity: bool) -> None:
    """A point chosen before its signs: where one must be turned, another point may be better."""
    generator = np.random.default_rng(unit)
    points = generator.choice([1.0, 3.0, 5.0], (6, unit))
    index, negative = np.zeros(8 // unit, np.int32), np.zeros(8, np.bool_)
    for _ in range(20):
        x, M = 3 * generator.normal(size=8), np.diag(np.exp(generator.normal(size=8)))
        columns = np.ascontiguousarray(points.T)
        choose_signed(x, M, own_costs(M[None], columns, True)[0], columns, has_parity, index, negative)
        best = min(
            float((np.concatenate([points[p] for p in ps]) * s - x) ** 2 @ np.diag(M))
            for ps in itertools.product(range(6), repeat=8 // unit)
            for s in (np.array(signs) for signs in itertools.product([1, -1], repeat=8) if not has_parity or np.prod(signs) > 0)
        )
        got = (np.where(negative, -1, 1) * points[index].reshape(-1) - x) ** 2 @ np.diag(M)
        assert not has_parity or negative.sum() % 2 == 0
        assert np.isclose(got, best)


def _joint(C: np.ndarray, E: np.ndarray, H: np.ndarray) -> float:
    return float(np.trace(C @ E @ H @ E.T))


def _descend_afresh(rounding: Rounding, packed: np.ndarray, W: np.ndarray, C: np.ndarray, sweeps: int) -> tuple[np.ndarray, int]:
    """The same visits, to and fro, each with its gradient computed anew from what the codes decode to."""
    n_moves = 0
    for sweep in range(sweeps):
        starts = range(0, W.shape[1], VISITED_COLUMNS)
        for start in reversed(starts) if sweep % 2 else starts:
            block = slice(start, start + VISITED_COLUMNS)
            G = (C @ (rounding.decode(packed) - W) @ rounding.H)[:, block].copy()
            scale, (place, negative) = read_scales(rounding.grid, packed).scale[:, block].copy(), rounding._unpack(packed)
            n_moves += rounding._visit(block, G, C, scale, place, negative[:, block], np.zeros_like(G))
            packed = rounding._pack(place, negative, packed)
    return packed, n_moves


@pytest.mark.parametrize("ggml_type", [*SCALAR_TYPES, *UNIT_TYPES], ids=lambda t: t.name)
def test_descents_lower_the_objective_and_keep_its_gradient(ggml_type: GgmlType) -> None:
    """A move whose effect on the row itself, on the rows after it or on other columns is not taken down: later moves then raise
    the loss."""
    grid, W, H, packed = _case(ggml_type, n_blocks=2)
    H, C = H.astype(np.float32), _covariance(len(W), 9).astype(np.float32)
    rounding = Rounding(grid, H)
    before = ggml.decode_rows(ggml_type, packed) - W
    errors = [_joint(C, before, H)]
    for sweeps in (1, 2, 3):
        ours, n_moves = rounding.descend(packed, before.T @ C, C, sweeps)
        theirs, n_theirs = _descend_afresh(rounding, packed, W, C, sweeps)
        assert n_moves == pytest.approx(n_theirs, rel=0.02) and np.mean(ours != theirs) < 0.02  # near-ties may fall otherwise
        errors.append(_joint(C, ggml.decode_rows(ggml_type, ours) - W, H))
    assert errors == sorted(errors, reverse=True) and errors[1] < errors[0]


def test_nothing_is_better_elsewhere_at_the_end() -> None:
    """Sweeps that end too early, or a nearest level that is none."""
    grid, W, H, packed = _case(GgmlType.Q3_K, n=2)
    rounding = Rounding(grid, H)
    packed, _ = rounding.descend(packed, (ggml.decode_rows(grid.type, packed) - W).T, np.eye(2, dtype=np.float32), 1000)
    E, scales, codes = ggml.decode_rows(grid.type, packed) - W.astype(np.float64), read_scales(grid, packed), unpack(grid, packed)
    G = E @ H
    for j in range(W.shape[1]):
        change = scales.scale[:, j, None] * (grid.points[:, 0] - grid.points[codes.index[:, j]])
        assert (change * (2 * G[:, j, None] + change * H[j, j]) >= -1e-6).all()


def test_nearest_level() -> None:
    """Ends of the range, and the middle between uneven levels."""
    even, uneven = np.arange(-4.0, 4.0), np.array([-10.0, 0.0, 1.0, 8.0])
    assert [nearest_level(x, even, True) for x in (-9.0, -1.4, 0.6, 99.0)] == [0, 3, 5, 7]
    assert [nearest_level(x, uneven, False) for x in (-99.0, -4.9, 0.6, 4.4, 4.6)] == [0, 1, 2, 2, 3]
