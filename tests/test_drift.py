"""drift.py against what the tokens themselves say, in double precision."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopgguf import drift as drift_module
from loopgguf.drift import MIN_TOKENS_PER_COLUMN, Drift, Moments

N_OUT, N_IN, N_TOKENS = 9, 12, 200
ALL = slice(0, N_IN)


def tokens(seed: int, drifted: float = 0.3) -> tuple[np.ndarray, np.ndarray]:
    """Inputs (n_tokens, n_in) of the model and of the file: each column of the latter is some of all, and some noise."""
    generator = np.random.default_rng(seed)
    X = generator.normal(size=(N_TOKENS, N_IN)) * np.exp(generator.normal(size=N_IN))
    mix = drifted * np.random.default_rng(0).normal(size=(N_IN, N_IN)) / np.sqrt(N_IN)
    return X, X + X @ mix + drifted * generator.normal(size=X.shape)


def moments(X: np.ndarray, Y: np.ndarray, columns: slice = ALL) -> Moments:
    X, Y = X[:, columns], Y[:, columns]
    return Moments(columns, (Y.T @ Y / len(Y)).astype(np.float32), ((X - Y).T @ Y / len(Y)).astype(np.float32), len(Y))


def weights(n_out: int = N_OUT, seed: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n_out, N_IN)).astype(np.float32)


@pytest.mark.parametrize("n_out", [N_OUT, drift_module._SLAB_ROWS + 3])
def test_the_whole_way_is_least_squares(n_out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a transposed C, H of the other inputs, a wrong sign, and rows that a slab leaves out."""
    monkeypatch.setattr(drift_module, "STEP", 1.0)
    monkeypatch.setattr(drift_module, "DAMPING", 1e-9)
    X, Y = tokens(2)
    W, known = weights(n_out), (moments(X, Y),)
    expected = np.linalg.lstsq(Y, X @ W.T, rcond=None)[0].T
    aimed = Drift(known, known).aim(W)
    assert aimed.dtype == np.float32
    assert np.allclose(aimed, expected, atol=1e-4) and not np.allclose(W, expected, atol=0.1)


def test_a_part_of_the_way_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a damping of another scale than the mean diagonal, or one that the step is not divided by: hand-computed."""
    second, cross = np.diag(np.array([4.0, 2.0], np.float32)), np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    monkeypatch.setattr(drift_module, "STEP", 0.5)
    monkeypatch.setattr(drift_module, "DAMPING", 1 / 3)
    known = (Moments(slice(0, 2), second, cross, 16),)
    assert np.allclose(Drift(known, known).aim(np.array([[10.0, 6.0]], np.float32)), [[11.0, 7.0]])


def test_without_drift_the_weights_are_the_same_ones() -> None:
    """Catches weights that are said to make up for something where there is nothing to make up for; and dead inputs."""
    X, _ = tokens(3)
    for known in ((moments(X, X),), (moments(0 * X, 0 * X),)):
        W = weights()
        assert Drift(known, known).aim(W) is W


def test_a_holdout_that_says_the_opposite_leaves_the_weights() -> None:
    """Catches noise of few tokens that is taken for a drift, and a verdict by the tokens that the step is from."""
    W, (X, Y) = weights(), tokens(4)
    train = moments(X, Y)
    opposite = Moments(ALL, train.second, -train.cross, train.n_tokens)
    assert Drift((train,), (train,)).aim(W) is not W
    assert Drift((train,), (opposite,)).aim(W) is W


def test_few_tokens_leave_the_weights() -> None:
    """Catches a drift that is noise, which held-out tokens do not see."""
    W, (X, Y) = weights(), tokens(4)
    enough = moments(X, Y)
    few = replace(enough, n_tokens=MIN_TOKENS_PER_COLUMN * N_IN - 1)
    assert Drift((replace(few, n_tokens=few.n_tokens + 1),), (few,)).aim(W) is not W
    assert Drift((few,), (enough,)).aim(W) is W


@pytest.mark.parametrize("accepted", [0, 1])
def test_blocks_of_columns_are_moved_or_left_one_by_one(accepted: int) -> None:
    """Catches a block that is judged or moved by another's moments, and the model's weights written to."""
    W, (X, Y) = weights(), tokens(5)
    before, parts = W.copy(), (slice(0, 8), slice(8, N_IN))
    train = [moments(X, Y, part) for part in parts]
    holdout = [m if i == accepted else Moments(m.columns, m.second, -m.cross, m.n_tokens) for i, m in enumerate(train)]
    aimed = Drift(train, holdout).aim(W)
    own = np.ascontiguousarray(W[:, parts[accepted]])
    alone = Moments(slice(0, own.shape[1]), train[accepted].second, train[accepted].cross, train[accepted].n_tokens)
    assert np.array_equal(W, before)
    assert np.array_equal(aimed[:, parts[1 - accepted]], W[:, parts[1 - accepted]])
    assert np.array_equal(aimed[:, parts[accepted]], Drift((alone,), (alone,)).aim(own)) and not np.array_equal(aimed, W)


def test_both_blocks_together() -> None:
    """Catches a second block that starts from the model's weights again and loses the first one's step."""
    W, (X, Y) = weights(), tokens(6)
    known = [moments(X, Y, part) for part in (slice(0, 8), slice(8, N_IN))]
    opposite = [Moments(m.columns, m.second, -m.cross, m.n_tokens) for m in known]
    aimed, first, second = (Drift(known, holdout).aim(W) for holdout in (known, [known[0], opposite[1]], [opposite[0], known[1]]))
    assert np.array_equal(aimed, np.hstack([first[:, :8], second[:, 8:]]))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.floats(-1.0, 1.0))
def test_the_verdict_is_that_of_the_tokens(seed: int, mixed: float) -> None:
    """Catches a criterion that is not the outputs' error on held-out tokens: a factor of 2, a sign, or the drift's other side.

    The held-out tokens drift by `mixed` of what the others do, so that verdicts go both ways.
    """
    W, (X, Y), (held_out, other) = weights(seed=seed), tokens(seed), tokens(seed + 1)
    other = held_out + mixed * (other - held_out)
    train = moments(X, Y)
    step = Drift((train,), (train,)).aim(W).astype(np.float64) - W
    wanted = held_out @ W.T
    errors = [float(((wanted - other @ V.T) ** 2).sum()) for V in (W.astype(np.float64), W + step)]
    if abs(errors[1] / max(errors[0], 1e-30) - 1) > 1e-3:  # else rounding decides
        is_moved = Drift((train,), (moments(held_out, other),)).aim(W) is not W
        assert is_moved == (errors[1] < errors[0])


def test_verdicts_go_both_ways() -> None:
    """Catches a test above that only ever sees one of them."""
    W, (X, Y), (held_out, other) = weights(), tokens(7), tokens(8)
    train = (moments(X, Y),)
    moved = [Drift(train, (moments(held_out, held_out + share * (other - held_out)),)).aim(W) is not W for share in (-1.0, 0.05, 0.5, 1.0)]
    assert moved == [False, False, True, True]
