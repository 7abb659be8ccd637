"""accumulators.py: sums against numpy on small arrays, and what belongs to which set."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopgguf.accumulators import (
    Audience,
    ColumnSums,
    FirstToken,
    GramSums,
    HoldoutSplit,
    Spikes,
    gram_bytes,
    has_output_gram,
    plan_passes,
    score_tokens,
    split_holdout,
    summarize_layer,
    summarize_pass,
)
from loopgguf.attention import AttentionMass
from loopgguf.errors import InputError

Q, K, UP, DOWN = "blk.0.attn_q.weight", "blk.0.attn_k.weight", "blk.0.ffn_up.weight", "blk.0.ffn_down.weight"
EXPERTS = "blk.1.ffn_up_exps.weight"


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# --- sets -----------------------------------------------------------------------------------------------------------------


@given(st.integers(2, 300), st.integers(0, 5))
def test_split_holdout_is_a_partition(n_chunks: int, seed: int):
    """Catches a chunk in both sets or in none, a set without any, and a choice that is not the seed's."""
    train, holdout = split_holdout(n_chunks, seed)
    assert sorted([*train, *holdout]) == list(range(n_chunks))
    assert len(holdout) == max(round(n_chunks / 10), 1)
    assert split_holdout(n_chunks, seed)[1].tolist() == holdout.tolist()


def test_split_holdout_needs_two_chunks():
    """Catches an empty training set."""
    with pytest.raises(InputError, match="got 1 chunks, expected at least 2"):
        split_holdout(1, 0)


def test_split_holdout_depends_on_the_seed():
    """Catches a seed that is ignored."""
    assert len({tuple(split_holdout(100, seed)[1]) for seed in range(5)}) == 5


def test_an_audience_sends_chunks_to_their_set():
    """Catches a held-out chunk that is counted among the others, and an accumulator of all chunks that misses some."""
    everything, train, holdout = ColumnSums(), ColumnSums(), ColumnSums()
    audience = Audience([everything], HoldoutSplit([train], [holdout], frozenset({1})))
    for number in range(3):
        audience.begin_chunk(number)
        audience.add(Q, None, np.full((2, 1), number, np.float32))
    assert [a.columns()[Q].sum_squares.item() for a in (everything, train, holdout)] == [10, 8, 2]


def test_an_audience_knows_what_is_wanted():
    """Catches outputs or attention computed for nobody, or nobody told."""
    audience = Audience([ColumnSums()], HoldoutSplit([AttentionMass()], [Spikes()], frozenset()))
    assert (audience.wants_output(DOWN), audience.wants_output(UP), audience.wants_attention, audience.wants_gradients) == (True, False, True, False)
    assert not Audience([ColumnSums()]).wants_output(DOWN)
    assert Audience([GramSums(), Spikes()]).wants_output(DOWN)
    assert Audience([GramSums()]).wants_gradients


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


# --- columns --------------------------------------------------------------------------------------------------------------


def test_column_moments_by_hand():
    """Catches a maximum without its magnitude, and an expert without tokens that makes one of minus infinity."""
    sums = ColumnSums(moments=True)
    sums.add(Q, None, np.array([[1, -5], [2, 3]], np.float32))
    sums.add(Q, None, np.array([[-3, 4]], np.float32))
    sums.add(EXPERTS, 0, np.array([[2, 0]], np.float32))
    sums.add(EXPERTS, 1, np.empty((0, 2), np.float32))
    c, e = sums.columns()[Q], sums.columns()[EXPERTS]
    assert (c.sum_squares.tolist(), c.counts.tolist()) == ([[14, 50]], [3])
    assert (c.sums.tolist(), c.max_abs.tolist()) == ([[0, 2]], [[3, 5]])
    assert (e.counts.tolist(), e.sums.tolist(), e.max_abs.tolist()) == ([1, 0], [[2, 0], [0, 0]], [[2, 0], [0, 0]])
    assert ColumnSums().columns() == {}


def test_state_is_everything():
    """Catches a resumed accumulator that differs in a bit, experts above 9 in another order, and layers mixed up."""
    first, second = ColumnSums(moments=True), ColumnSums(moments=True)
    for expert in range(12):
        first.add(EXPERTS, expert, normal(expert, 3, seed=expert))
    first.add(Q, None, normal(4, 3))
    second.restore(first.state(0))
    assert set(second.columns()) == {Q}
    second.restore(first.state(1))
    for name, c in first.columns().items():
        assert (second.columns()[name].sum_squares == c.sum_squares).all()
        assert (second.columns()[name].max_abs == c.max_abs).all()
    assert first.columns()[EXPERTS].counts.tolist() == list(range(12))


def test_spikes_keep_sign_and_place():
    """Catches the largest value taken for the largest magnitude, and weights other than ffn_down."""
    spikes = Spikes()
    for X, Y in (([[1, -9, 2]], [[0, 5]]), ([[3, 8, -2]], [[-7, 1]])):
        spikes.add(DOWN, None, np.array(X, np.float32))
        spikes.add_output(DOWN, None, np.array(Y, np.float32))
        spikes.add(UP, None, np.array(X, np.float32))
        spikes.add_output(UP, None, np.array(Y, np.float32))
    [(key, e)] = spikes.extremes().items()
    assert key == (DOWN, None) and e.layer == 0
    assert (e.inputs.tolist(), e.outputs.tolist(), e.column, e.row) == ([3, -9, 2], [-7, 5], 1, 0)


# --- Gram matrices --------------------------------------------------------------------------------------------------------


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
    grams.add_gradient("token_embd.weight", None, G)
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


# --- the loss -------------------------------------------------------------------------------------------------------------


def test_score_tokens_is_the_naive_softmax():
    """Catches slabs that are cut wrongly, and overflow with large logits."""
    rng = np.random.default_rng(1)
    logits = (rng.standard_normal((150, 11)) * 5 + 700).astype(np.float32)
    targets = rng.integers(0, 11, 150).astype(np.int32)
    p = np.exp(logits.astype(np.float64) - 700)
    naive = -np.log(p[np.arange(150), targets] / p.sum(axis=1))
    np.testing.assert_allclose(score_tokens(logits, targets), naive, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(score_tokens(logits, targets, precision=np.float32), naive, atol=5e-6)


def test_summarize_pass_by_hand():
    """Catches a standard error of the logarithm printed as one of the perplexity (imatrix.cpp: nll2 * ppl)."""
    result = summarize_pass(np.log([2.0, 8.0]))
    assert result.n_tokens == 2
    assert result.perplexity == pytest.approx(4)
    assert result.standard_error == pytest.approx(4 * np.log(2))
    with pytest.raises(InputError, match="got NaN or infinity"):
        summarize_pass(np.array([1.0, np.nan]))


def test_importing_needs_no_torch():
    """Catches an import that costs every command on a GGUF three seconds."""
    code = "import sys, loopgguf.accumulators, loopgguf.activations; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
