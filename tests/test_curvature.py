"""curvature.py: Gram matrices against naive products, gradients by hand, and what does not belong in a set."""

from __future__ import annotations

import numpy as np
import pytest

from loopgguf.curvature import FirstToken, GramSums, gram_bytes, has_output_gram, plan_passes, summarize_layer
from loopgguf.errors import InputError

Q, K, UP, DOWN = "blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.ffn_up.weight", "blk.0.ffn_down.weight"
EXPERTS = "blk.1.ffn_up_exps.weight"


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- how much of it there is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sizes", "limit", "blocks"),
    [
        ([4, 4, 4], 100, [range(3)]),
        ([4, 4, 4], 8, [range(2), range(2, 3)]),
        ([4, 4, 4], 1, [range(1), range(1, 2), range(2, 3)]),
        ([1, 9, 1, 1], 3, [range(1), range(1, 2), range(2, 4)]),
        ([], 3, []),
    ],
)
def test_plan_passes(sizes: list[int], limit: int, blocks: list[range]):
    """Catches a layer without a pass, and a layer too large for memory that stops the plan."""
    assert plan_passes(sizes, limit) == blocks


def test_gram_bytes_by_hand():
    """Catches shared inputs counted once per weight, and experts counted once."""
    shapes = {Q: (8, 4), K: (2, 4), UP: (16, 4), DOWN: (4, 16)}
    assert gram_bytes(shapes, has_gradient=False) == 4 * (16 + 16 + 256)
    assert gram_bytes(shapes, has_gradient=True) == 4 * (16 + 16 + 256) + 4 * (3 * 16 + 256) + 4 * (64 + 4 + 16)
    assert gram_bytes({EXPERTS: (3, 16, 4)}, has_gradient=False) == 4 * 3 * 16
    assert [has_output_gram(name) for name in (Q, UP, DOWN, EXPERTS)] == [True, False, True, False]


# --- sums ---------------------------------------------------------------------------------------------------------------


def assert_close(got: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("n", [3, 512, 1100])
def test_gram_matrix_is_symmetric_and_right(n: int, as_tensor: bool):
    """Catches a block of the triangle lost, doubled or not mirrored, for arrays and for torch's tensors."""
    torch = pytest.importorskip("torch")
    slabs = [normal(7, n, seed=i) for i in range(3)]
    grams = GramSums()
    for slab in slabs:
        grams.add(DOWN, None, torch.from_numpy(slab) if as_tensor else slab)
    gram = grams.take().inputs["blk.0.ffn_down", None]
    X = np.concatenate(slabs).astype(np.float64)
    assert gram.n_tokens == 21 and gram.total.dtype == np.float32
    assert (gram.total == gram.total.T).all()
    assert_close(gram.mean, X.T @ X / 21)


def test_weights_that_share_an_input_share_one_matrix():
    """Catches q, k and v counted three times, and experts taken for one another."""
    grams = GramSums()
    X = normal(5, 4)
    for _chunk in range(2):
        for name in (Q, K, "blk.0.attn_v.weight"):
            grams.add(name, None, X)
        for expert in (0, 1):
            grams.add(EXPERTS, expert, X[: 2 * expert])
            grams.add("blk.1.ffn_gate_exps.weight", expert, X[: 2 * expert])
    inputs = grams.take().inputs
    assert {key: gram.n_tokens for key, gram in inputs.items()} == {("blk.0.attn_norm", None): 10, ("blk.1.ffn_norm", 1): 4}
    assert_close(inputs["blk.0.attn_norm", None].total, 2 * X.T @ X)


def test_gradients_by_hand():
    """Catches a token weight that is a sum instead of a mean, and H_O of a weight that has none."""
    X, G = normal(6, 4), normal(6, 3, seed=1)
    grams = GramSums()
    for name in (Q, UP):
        grams.add_gradient(name, X, G)
    grams.add_gradient("token_embd.weight", np.ones_like(G), G)
    got = grams.take()
    w = (G**2).mean(axis=1)
    assert set(got.weighted) == {Q, UP} and set(got.outputs) == {Q, "token_embd.weight"}
    assert_close(got.weighted[Q].total, (X * w[:, None]).T @ X)
    assert_close(got.outputs[Q].total, G.T @ G)
    assert_close(got.outputs["token_embd.weight"].mean, G.T @ G / 6)
    assert_close(got.curvature[UP].mean, (G**2).mean(axis=0))
    assert_close(got.first_weighted[Q].outer, w[0] * np.outer(X[0], X[0]))


def test_predicted_divergence_is_the_mean_squared_change_of_the_loss():
    """Catches a scale between r and H_w that the planner would carry along: for independent g and x they multiply."""
    rng = np.random.default_rng(0)
    X, G = rng.standard_normal((4000, 3)).astype(np.float32), (rng.standard_normal((4000, 2)) * [1, 3]).astype(np.float32)
    grams = GramSums()
    grams.add_gradient(UP, X, G)
    got = grams.take()
    E = np.array([[0.1, -0.2, 0.3], [0.2, 0.1, 0.0]])
    r = got.curvature[UP].mean
    predicted = 0.5 * sum(r[i] / r.mean() * E[i] @ got.weighted[UP].mean @ E[i] for i in range(2))
    measured = 0.5 * ((G * (X @ E.T)) ** 2).sum(axis=1).mean()
    assert predicted == pytest.approx(measured, rel=0.1)


def test_first_tokens():
    """Catches first tokens of later documents forgotten; equal ones give exactly their part of H."""
    bos = normal(4, seed=9)
    grams = GramSums()
    X = normal(2, 6, 4)
    X[:, 0] = X[1, 3] = bos
    for number, starts in enumerate(([0], [0, 3])):
        grams.begin_chunk(number, starts)
        grams.add(K, None, X[number])
    first = grams.take().first["blk.0.attn_norm"]
    assert first.weight == 3
    assert_close(first.mean, bos)
    assert_close(first.outer, 3 * np.outer(bos, bos))
    assert first.trace == pytest.approx(3 * float(bos @ bos), rel=1e-5)
    assert FirstToken(np.zeros(2, np.float32), 0.0).trace == 0


def test_take_gives_a_layer_and_forgets_it():
    """Catches matrices that stay in memory after they are handed over, or that go with the wrong layer."""
    grams = GramSums()
    X = normal(5, 4)
    for name in (Q, "blk.1.attn_q.weight", "output.weight"):
        grams.add(name, None, X)
    assert list(grams.take(1).inputs) == [("blk.1.attn_norm", None)]
    assert grams.take(1).inputs == {}
    assert list(grams.take().inputs) == [("blk.0.attn_norm", None), ("output_norm", None)]
    assert grams.state() == {}


def test_only_what_is_wanted():
    """Catches a pass for one block of layers that fills memory with those of all."""
    grams = GramSums(lambda name: name.startswith("blk.1."))
    grams.add(Q, None, normal(5, 4))
    grams.add_gradient(Q, normal(5, 4), normal(5, 4))
    assert grams.state() == {}


def test_chunks_are_added():
    """Catches counts or first tokens of all chunks but the last forgotten."""
    X, grams = normal(8, 4), GramSums()
    for slab in (X[:3], X[3:]):
        grams.add(Q, None, slab)
        grams.add_gradient(Q, slab, slab)
    merged = grams.take()
    assert merged.inputs["blk.0.attn_norm", None].n_tokens == merged.curvature[Q].n_tokens == 8
    assert_close(merged.inputs["blk.0.attn_norm", None].total, X.T @ X)
    assert_close(merged.first["blk.0.attn_norm"].total, X[0] + X[3])
    assert_close(merged.outputs[Q].mean, X.T @ X / 8)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_damage_is_named(bad: float):
    """Catches matrices of NaN."""
    X = normal(3, 4)
    X[1, 2] = bad
    with pytest.raises(InputError, match=r"activations of blk\.0\.attn_q\.weight.*column 2"):
        GramSums().add(Q, None, X)
    with pytest.raises(InputError, match=r"gradients of blk\.0\.attn_q\.weight"):
        GramSums().add_gradient(Q, normal(3, 4), X)


def test_layer_summary_by_hand():
    """Catches shares of the wrong trace."""
    grams = GramSums()
    X = np.array([[3, 0], [0, 1], [0, 2]], np.float32)
    G = np.array([[2], [1], [1]], np.float32)
    grams.add(K, None, X)
    grams.add_gradient(K, X, G)
    summary = summarize_layer(0, grams.take(), np.array([0.4, 0.6], np.float32))
    assert summary.attention_share == pytest.approx(0.5)
    assert summary.input_shares == {"attn_norm": pytest.approx(9 / 14)}
    assert summary.weighted_shares == {"attn_k": pytest.approx(36 / 41)}
    assert summary.diagonal_ratios == {"attn_norm": pytest.approx(9 / 7)}
