"""accumulators.py: sums against numpy on small arrays, and what belongs to which set."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopgguf.accumulators import Audience, ColumnSums, HoldoutSplit, Spikes, split_holdout
from loopgguf.attention import AttentionMass
from loopgguf.curvature import GramSums
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
    assert Audience([GramSums()]).wants_gradients


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


def test_importing_needs_no_torch():
    """Catches an import that costs every command on a GGUF three seconds."""
    code = "import sys, loopgguf.accumulators, loopgguf.activations; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)
