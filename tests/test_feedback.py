"""What each encoder is told, on matrices small enough to be written down."""

from __future__ import annotations

import numpy as np
import pytest

from loopgguf.architectures import input_group
from loopgguf.compensate import FAST, FULL, mixed
from loopgguf.curvature import Curvature, FirstToken, Gram, GramSet
from loopgguf.errors import InputError
from loopgguf.feedback import MIN_TOKENS_PER_COLUMN, SINK, Compensate, Feedback, may_have_feedback, stored_feedback
from loopgguf.formats import GgmlType
from loopgguf.planner import PlanRow

N = 32
GROUP = input_group("blk.0.attn_q.weight") or ""
ENOUGH = MIN_TOKENS_PER_COLUMN * N


def _row(name: str, *shape: int, uses_imatrix: bool = True) -> PlanRow:
    return PlanRow(name, shape or (N, N), GgmlType.F32, GgmlType.Q4_0, 0, "", uses_imatrix=uses_imatrix)


def _gram(scale: float, n_tokens: int = ENOUGH) -> Gram:
    return Gram((scale * n_tokens * np.eye(N)).astype(np.float32), n_tokens)


def _curvature(feedback: Feedback, row: PlanRow, matrix: int = 0, *, is_tied: bool = False) -> object:
    find = feedback.curvature(row, is_tied=is_tied)
    return None if find is None else find(matrix)


def test_keys_and_values_weigh_the_first_token_where_no_gradient_does() -> None:
    """Plain H for keys and values makes a real model worse than no feedback at all; for other weights the sink is one token of many."""
    first = FirstToken(np.full(N, 2.0, np.float32), 1.0)
    half = GramSet(inputs={(GROUP, None): _gram(1.0)}, first={GROUP: first})
    plain, sunk = (_curvature(Feedback(half, half), _row(f"blk.0.{kind}.weight")) for kind in ("attn_q", "attn_v"))
    assert np.allclose(plain.held_out, np.eye(N))
    assert np.allclose(sunk.held_out, np.eye(N) + (SINK - 1) * 4.0 / ENOUGH)
    assert np.allclose(plain.objective, mixed(plain.held_out)) and np.allclose(sunk.objective, mixed(sunk.held_out))


def test_gradients_go_before_the_sink() -> None:
    """The first token counted twice: by its gradient and by the constant that stands for one."""
    name = "blk.0.attn_k.weight"
    weighted = Gram((ENOUGH * np.diag(np.arange(1.0, N + 1))).astype(np.float32), ENOUGH)
    half = GramSet(
        inputs={(GROUP, None): _gram(1.0)},
        first={GROUP: FirstToken(np.ones(N, np.float32), 1.0)},
        weighted={name: weighted},
        outputs={name: _gram(5.0)},
        curvature={name: Curvature(np.arange(1.0, N + 1), ENOUGH)},
    )
    found = _curvature(Feedback(half, half), _row(name))
    assert np.allclose(found.objective, mixed(np.eye(N), weighted.mean)) and np.allclose(found.held_out, weighted.mean)
    assert np.allclose(found.H_O, 5 * np.eye(N)) and np.isclose(found.row_curvature.mean(), 1.0)


def test_experts_are_joined_by_their_layer() -> None:
    """An expert that few tokens reach and that is encoded by their noise, or one that none reach and that is left out."""
    row = _row("blk.0.ffn_up_exps.weight", 3, N, N)
    group = input_group(row.name) or row.name
    half = GramSet(inputs={(group, 0): _gram(1.0), (group, 1): _gram(3.0)})
    shared = 2.0
    for matrix, own in ((0, (1.0 * ENOUGH + shared * N) / (ENOUGH + N)), (1, (3.0 * ENOUGH + shared * N) / (ENOUGH + N)), (2, shared)):
        found = _curvature(Feedback(half, half), row, matrix)
        assert np.allclose(found.held_out, own * np.eye(N)) and np.allclose(found.objective, mixed(found.held_out))


def test_the_head_needs_no_imatrix() -> None:
    """A head without feedback, because an imatrix has no data for it; or one under the matrices of the last layer."""
    name = "output.weight"
    half = GramSet(inputs={(input_group(name), None): _gram(1.0)}, weighted={name: _gram(3.0)}, curvature={name: Curvature(np.arange(1.0, N + 1), ENOUGH)})
    row = _row(name, uses_imatrix=False)
    found = _curvature(Feedback(half, half), row)
    assert may_have_feedback(row, is_tied=False, has_gradients=False)
    assert np.allclose(found.held_out, 3 * np.eye(N)) and np.isclose(found.row_curvature.mean(), 1.0)
    assert np.allclose(_curvature(Feedback(GramSet(inputs=half.inputs), GramSet(inputs=half.inputs)), row).held_out, np.eye(N))


def test_frequencies_weigh_the_verdict_on_embeddings() -> None:
    """A rare token's row that decides whether the rows of all others are kept."""
    name = "token_embd.weight"
    half = GramSet(outputs={name: _gram(1.0)}, curvature={name: Curvature(np.arange(1.0, N + 1), 2)})
    found = _curvature(Feedback(half, half), _row(name, uses_imatrix=False))
    E = np.zeros((N, N), np.float32)
    E[3] = 1
    assert found.estimate(E) == pytest.approx(4 / 2 * N)


def test_a_tied_embedding_is_encoded_for_both_its_uses() -> None:
    """Feedback under half of what a tied embedding is for, or under a sum of a mean over rows and a total."""
    head, name = "output.weight", "token_embd.weight"
    grams = GramSet(
        inputs={(input_group(head), None): _gram(1.0)},
        weighted={head: _gram(3.0)},
        outputs={name: _gram(5.0)},
        curvature={head: Curvature(np.arange(1.0, N + 1), ENOUGH), name: Curvature(np.ones(N), ENOUGH)},
    )
    row = _row(name, uses_imatrix=False)
    found = _curvature(Feedback(grams, grams), row, is_tied=True)
    assert np.allclose(found.objective, (5 + 3 * N) * np.eye(N)) and np.allclose(found.held_out, found.objective)
    E = np.zeros((N, N), np.float32)
    E[3] = 1
    assert found.estimate(E) == pytest.approx((5 + 3 * N) * N * 4 / np.arange(1, N + 1).mean())
    without = GramSet(inputs=grams.inputs)
    assert np.allclose(_curvature(Feedback(without, without), row, is_tied=True).objective, np.eye(N))
    assert may_have_feedback(row, is_tied=True, has_gradients=False) and not may_have_feedback(row, is_tied=False, has_gradients=False)


def test_what_is_left_to_the_plain_encoder() -> None:
    """Feedback under noise, under nothing, or under half of what a tied embedding is for."""
    frequencies = {"token_embd.weight": Curvature(np.ones(N), ENOUGH)}
    few = GramSet(inputs={(GROUP, None): _gram(1.0, ENOUGH - 1)}, outputs={"token_embd.weight": _gram(1.0)}, curvature=frequencies)
    feedback, embedding = Feedback(few, few), _row("token_embd.weight", uses_imatrix=False)
    assert _curvature(feedback, _row("blk.0.attn_q.weight")) is None
    assert _curvature(feedback, _row("blk.1.attn_q.weight")) is None
    assert _curvature(feedback, _row("blk.0.attn_q.weight", uses_imatrix=False)) is None
    assert _curvature(feedback, embedding) is not None
    assert _curvature(feedback, embedding, is_tied=True) is None


def test_matrices_of_another_model_are_refused() -> None:
    """A shape error in a worker thread instead of a line that says what is wrong."""
    half = GramSet(inputs={(GROUP, None): _gram(1.0)})
    with pytest.raises(InputError, match=r"Gram matrix of blk\.0\.attn_q\.weight: got 32 columns, expected 64"):
        _curvature(Feedback(half, half), _row("blk.0.attn_q.weight", N, 2 * N))


def test_no_matrices_beside_an_imatrix(tmp_path: object) -> None:
    """An imatrix alone must mean a pass of its own, not an error."""
    assert stored_feedback(None) is None
    assert stored_feedback(tmp_path / "a.imatrix.gguf") is None  # type: ignore[operator]


def test_auto_goes_by_size() -> None:
    """`auto` that takes days on a large model, or half the quality on a small one."""
    assert (Compensate.AUTO.effort(135_000_000), Compensate.AUTO.effort(8_000_000_000)) == (FULL, FAST)
    assert (Compensate.FAST.effort(1), Compensate.FULL.effort(10**11)) == (FAST, FULL)
