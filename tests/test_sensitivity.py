"""Sums of squared gradients against the textbook, and their file."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loopgguf.curvature import GramSums
from loopgguf.errors import InputError
from loopgguf.sensitivity import SensitivitySums, from_grams, load_sensitivities, save_sensitivities


def slabs() -> list[tuple[np.ndarray, np.ndarray]]:
    generator = np.random.default_rng(0)
    return [(generator.normal(size=(n, 6)).astype(np.float32), generator.normal(size=(n, 4)).astype(np.float32)) for n in (5, 9)]


def collected() -> SensitivitySums:
    sums = SensitivitySums()
    for X, G in slabs():
        sums.add_gradient("blk.0.attn_q.weight", X, G)
        sums.add_gradient("token_embd.weight", 2 * X, X)
    return sums


def test_the_textbook() -> None:
    """Would catch tokens not weighted, a mean over the wrong axis, or sums divided by chunks instead of tokens."""
    X, G = (np.concatenate(parts).astype(np.float64) for parts in zip(*slabs(), strict=True))
    found = collected().take(10, "f").sensitivity("blk.0.attn_q.weight")
    w = (G**2).mean(axis=1)
    H_w = sum(w[t] * np.outer(X[t], X[t]) for t in range(14)) / 14
    r = (G**2).mean(axis=0)
    assert found is not None
    np.testing.assert_allclose(found.column_weights[0], np.diag(H_w), rtol=1e-5)
    np.testing.assert_allclose(found.row_weights[0], r / r.mean(), rtol=1e-5)


def test_a_row_of_the_embeddings_counts_as_the_average_token() -> None:
    """Would catch an embedding whose every row is charged with all tokens: thousands of times too much; or short rows, with
    gradients as large as they are short, taken for long ones."""
    X = np.concatenate([X for X, _ in slabs()]).astype(np.float64)
    found = collected().take(10, "f").sensitivity("token_embd.weight")
    assert found is not None and found.row_weights.shape == (1, 10)
    assert found.row_weights.sum() == pytest.approx(1) and found.is_relative
    lengths = 4 * (X**2).sum(axis=1)
    np.testing.assert_allclose(found.column_weights[0], (lengths[:, None] * X**2).mean(axis=0), rtol=1e-5)


def test_the_head_slab_by_slab_is_the_head_at_once() -> None:
    """Would catch slabs whose tokens are counted twice, or weighed by their own rows alone."""
    generator = np.random.default_rng(2)
    X, P = generator.normal(size=(7, 6)).astype(np.float32), generator.dirichlet(np.ones(10), 7)
    sums = SensitivitySums()
    for start, stop in ((0, 4), (4, 10)):
        sums.add_probabilities(start, 10, X, P[:, start:stop])
    found = sums.take(10, "f").sensitivity("output.weight")
    G2 = P * (1 - P)
    assert found is not None
    np.testing.assert_allclose(found.column_weights[0], (G2.mean(axis=1)[:, None] * X.astype(np.float64) ** 2).mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.row_weights[0], G2.mean(axis=0) / G2.mean(), rtol=1e-5)


def test_values_are_charged_twice() -> None:
    """Would catch the coherence of value errors, measured on two models, lost or spread to other kinds."""
    sums = SensitivitySums()
    X, G = slabs()[0]
    for kind in ("attn_q", "attn_v"):
        sums.add_gradient(f"blk.0.{kind}.weight", X, G)
    q, v = (sums.take(10, "f").sensitivity(f"blk.0.{kind}.weight") for kind in ("attn_q", "attn_v"))
    assert q is not None and v is not None
    np.testing.assert_allclose(v.column_weights, 2 * q.column_weights)


def test_gram_matrices_say_the_same() -> None:
    """Would catch the two ways to gradients giving estimates on two scales, and a row of the embeddings charged with all tokens."""
    P = np.random.default_rng(3).dirichlet(np.ones(10), 5)
    grams, sums = GramSums(), SensitivitySums()
    for a in (grams, sums):
        for X, G in slabs():
            a.add_gradient("blk.0.attn_q.weight", X, G)
        a.add_gradient("token_embd.weight", X, X)
        a.add_probabilities(0, 10, X[:5], P)
    ours, theirs = from_grams(grams.take(), "f"), sums.take(10, "f")
    for name in ("blk.0.attn_q.weight", "output.weight"):
        mine, other = ours.sensitivity(name), theirs.sensitivity(name)
        assert mine is not None and other is not None
        np.testing.assert_allclose(mine.column_weights, other.column_weights, rtol=1e-4)
        np.testing.assert_allclose(mine.row_weights, other.row_weights, rtol=1e-4)
    lookup = ours.sensitivity("token_embd.weight")
    assert lookup is not None and not lookup.is_relative
    np.testing.assert_allclose(lookup.row_weights[0], P.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(lookup.column_weights[0], (X**2).mean(axis=0), rtol=1e-4)


def test_the_file_and_what_is_none(tmp_path: Path) -> None:
    """Would catch a damaged cache entry that stops the work instead of being made again."""
    path = tmp_path / "s.npz"
    assert load_sensitivities(path, "f") is None
    made = collected().take(10, "f")
    save_sensitivities(made, path)
    loaded = load_sensitivities(path, "f")
    assert loaded is not None and loaded.fingerprint == "f" and list(loaded.by_name) == list(made.by_name)
    for name in made.by_name:
        np.testing.assert_array_equal(loaded.by_name[name].column_weights, made.by_name[name].column_weights)
    raw = path.read_bytes()
    for damaged in (raw[: len(raw) // 2], b"", b"no archive"):
        path.write_bytes(damaged)
        assert load_sensitivities(path, "f") is None


def test_a_gradient_that_is_not_finite_is_refused_by_name() -> None:
    """Would catch NaN in every estimate of a plan."""
    with pytest.raises(InputError, match=r"blk\.0\.attn_q\.weight"):
        SensitivitySums().add_gradient("blk.0.attn_q.weight", np.ones((2, 3), np.float32), np.full((2, 2), np.nan, np.float32))
