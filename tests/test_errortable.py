"""The error table against a naive encode-decode, its sampling, its candidates and its cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loopgguf import errortable, ggml
from loopgguf.architectures import tensor_role
from loopgguf.errors import InputError
from loopgguf.errortable import Basis, ErrorRow, ErrorTable, Request, Sampling, TypeDamage, candidate_types, measure_errors, prior_nats, tilted
from loopgguf.formats import GgmlType
from loopgguf.sensitivity import Sensitivity
from loopgguf.source import Tensor

T = GgmlType
FAST = (T.Q4_0, T.Q4_K, T.Q8_0)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_tensor(values: np.ndarray, name: str = "blk.0.ffn_up.weight") -> Tensor:
    rows = np.ascontiguousarray(values, np.float32).reshape(-1, values.shape[-1])
    return Tensor(name, values.shape, T.F32, lambda start, stop: rows[start:stop].view(np.uint8))


def weights(*shape: int) -> np.ndarray:
    return np.random.default_rng(3).normal(0, 0.1, shape).astype(np.float32)


class Imatrix:
    """Importances of every weight alike."""

    def __init__(self, values: np.ndarray) -> None:
        self.values = values

    def importance(self, name: str) -> np.ndarray:
        return self.values


class Backward:
    """A backward pass that reached every weight."""

    fingerprint = "test"

    def __init__(self, found: Sensitivity) -> None:
        self.found = found

    def sensitivity(self, name: str) -> Sensitivity:
        return self.found


def measure(
    tensor: Tensor, types: tuple[GgmlType, ...] = FAST, imatrix: Imatrix | None = None, backward: Backward | None = None, **sampling: object
) -> errortable.ErrorRow:
    table = measure_errors(
        [Request(tensor, types)], imatrix, source_fingerprint="f", n_layer=4, is_tied=True, gradients=backward, sampling=Sampling(**sampling), n_threads=2
    )
    return table.rows[tensor.name]


def test_errors_are_those_of_the_encoder_under_the_imatrix() -> None:
    """Would catch errors of another encoding than the pipeline's, weights applied to rows, or a missing importance."""
    W, importance = weights(300, 256), np.linspace(0.1, 4, 256, dtype=np.float32)
    row = measure(make_tensor(W), imatrix=Imatrix(importance[None]), is_exact=True)
    for ggml_type in FAST:
        decoded = ggml.decode_rows(ggml_type, ggml.encode_rows(ggml_type, W, importance))
        expected = (importance * (W - decoded).astype(np.float64) ** 2).sum()
        damage = row.damage(ggml_type)
        assert damage is not None
        assert damage.squared_error == pytest.approx(expected, rel=1e-5)
        assert damage.relative_error == pytest.approx(expected / (importance * W.astype(np.float64) ** 2).sum(), rel=1e-5)
        assert damage.estimated_error == prior_nats("blk.0.ffn_up.weight", 4, is_tied=True) * damage.relative_error
    assert (row.basis, row.n_sampled_rows, row.n_rows) == (Basis.PRIOR, 300, 300)


def test_gradients_give_nats() -> None:
    """Would catch a factor ½ lost, rows weighted by another row's gradient, or H_w used for its diagonal."""
    W = weights(20, 64)
    generator = np.random.default_rng(5)
    X = generator.normal(size=(100, 64)).astype(np.float32)
    H, r = X.T @ X / 100, generator.uniform(0.1, 2, 20).astype(np.float32)
    row = measure(make_tensor(W), (T.Q4_0,), backward=Backward(Sensitivity(r[None], np.diag(H)[None].copy())))
    E = (W - ggml.decode_rows(T.Q4_0, ggml.encode_rows(T.Q4_0, W))).astype(np.float64)
    M = np.diag(np.diag(H))
    damage = row.damage(T.Q4_0)
    assert damage is not None and row.basis is Basis.GRADIENTS
    assert damage.estimated_error == pytest.approx(0.5 * sum(r[i] * E[i] @ M @ E[i] for i in range(20)), rel=1e-5)


def test_a_sample_estimates_the_whole_and_depends_on_nothing_but_seed_and_name() -> None:
    """Would catch a sample that is not scaled up, or one that changes between runs or with threads."""
    tensor = make_tensor(weights(4000, 64))
    exact, sampled = measure(tensor, (T.Q4_0, T.Q8_0), is_exact=True), measure(tensor, (T.Q4_0, T.Q8_0), share=0.05)
    assert sampled.n_sampled_rows == 256 and exact.n_sampled_rows == 4000
    for ggml_type in (T.Q4_0, T.Q8_0):
        assert sampled.damage(ggml_type).squared_error == pytest.approx(exact.damage(ggml_type).squared_error, rel=0.05)
    assert [list(rows) for rows in Sampling().choose(tensor)] == [list(rows) for rows in Sampling().choose(tensor)]
    assert list(Sampling(seed=1).choose(tensor)[0]) != list(Sampling().choose(tensor)[0])


def test_every_expert_is_sampled_with_its_own_importance() -> None:
    """Would catch rows of one expert weighted by another's importance."""
    W = weights(3, 40, 64)
    importance = np.random.default_rng(1).uniform(0.1, 3, (3, 64)).astype(np.float32)
    row = measure(make_tensor(W, "blk.0.ffn_up_exps.weight"), (T.Q4_0,), Imatrix(importance))
    expected = 0.0
    for i in range(3):
        decoded = ggml.decode_rows(T.Q4_0, ggml.encode_rows(T.Q4_0, W[i], importance[i]))
        expected += float((importance[i] * (W[i] - decoded).astype(np.float64) ** 2).sum())
    assert row.damage(T.Q4_0).squared_error == pytest.approx(expected, rel=1e-5)
    assert [len(rows) for rows in Sampling(min_rows=30, share=0).choose(make_tensor(W))] == [10, 10, 10]


def test_candidates_fit_the_rows_and_have_their_data() -> None:
    """Would catch types that abort the process, or that the pipeline would replace by a fallback."""
    wide, narrow = make_tensor(weights(2, 256)), make_tensor(weights(2, 96))
    with_data = candidate_types(wide, errortable.DEFAULT_TYPES, has_importance=True)
    without = candidate_types(wide, errortable.DEFAULT_TYPES, has_importance=False)
    assert {T.IQ1_S, T.IQ2_XXS, T.IQ3_S, T.Q8_0, T.F16, T.BF16} <= set(with_data)
    assert set(with_data) - set(without) == {T.IQ1_S, T.IQ1_M, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ3_XXS}
    assert set(candidate_types(narrow, errortable.DEFAULT_TYPES, has_importance=True)) == {T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.IQ4_NL, T.F16, T.BF16}
    assert not errortable.SPECIAL_TYPES & set(with_data)
    half = Tensor("blk.0.ffn_up.weight", (2, 256), T.BF16, wide.read_rows)
    assert T.F16 not in candidate_types(half, errortable.DEFAULT_TYPES, has_importance=True)  # as large as the lossless copy


def test_a_type_that_cannot_hold_the_weights_is_no_candidate() -> None:
    """Would catch an infinite error in the table, which no solver survives."""
    W = weights(2, 256)
    W[1, 7] = 1e6
    row = measure(make_tensor(W), (T.F16, T.BF16, T.F32))
    assert [damage.type for damage in row.damages] == [T.BF16, T.F32]
    assert row.damage(T.F32).estimated_error == 0.0


def test_nan_is_refused_by_name() -> None:
    """Would catch a damaged checkpoint planned as if nothing were wrong."""
    W = weights(2, 64)
    W[1, 3] = np.nan
    with pytest.raises(InputError, match=r"blk\.0\.ffn_up\.weight holds NaN"):
        measure(make_tensor(W), (T.Q8_0,))


def test_kept_numbers_are_used_completed_and_remade_when_damaged(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a cache that is ignored, that hides a change of importance, or whose damage stops the work."""
    tensor, calls = make_tensor(weights(8, 256)), []
    original = errortable._errors
    monkeypatch.setattr(errortable, "_errors", lambda ggml_type, *rest: calls.append(ggml_type) or original(ggml_type, *rest))
    first = measure(tensor)
    assert calls == list(FAST)
    assert measure(tensor) == first and calls == list(FAST)
    measure(tensor, (*FAST, T.Q6_K))
    assert calls[3:] == [T.Q6_K]
    measure(tensor, (T.Q8_0,), Imatrix(np.full((1, 256), 2, np.float32)))
    assert calls[4:] == [T.Q8_0]
    for path in (cache / "loopgguf" / "errors").iterdir():
        path.write_text('{"Q4_0": [1]}', encoding="utf-8")
    assert measure(tensor) == first and calls[5:] == list(FAST)


def test_priors_tell_the_kinds_apart() -> None:
    """Would catch a tied head charged as a mere lookup, an expert as something unknown, or a layer of a deep model as one of a shallow."""
    tied, untied = (prior_nats("token_embd.weight", 30, is_tied=is_tied) for is_tied in (True, False))
    assert tied == untied + prior_nats("output.weight", 30, is_tied=False)
    assert prior_nats("blk.5.ffn_down_exps.weight", 30, is_tied=True) == prior_nats("blk.5.ffn_down.weight", 30, is_tied=True)
    assert prior_nats("blk.5.attn_v.weight", 120, is_tied=True) == prior_nats("blk.5.attn_v.weight", 30, is_tied=True) / 2
    assert (
        prior_nats("blk.29.ffn_up.weight", 30, is_tied=True)
        > prior_nats("blk.1.ffn_up.weight", 30, is_tied=True)
        > prior_nats("blk.9.ffn_up.weight", 30, is_tied=True)
    )


@pytest.mark.parametrize(("is_tied", "basis"), [(True, Basis.PRIOR), (False, Basis.GRADIENTS)])
def test_a_tied_embedding_is_charged_for_the_head_too(is_tied: bool, basis: Basis) -> None:
    """Would catch the largest error of a small model estimated from the gradients at the lookup alone."""
    found = Sensitivity(np.full((1, 20), 0.05, np.float32), np.ones((1, 64), np.float32))

    class Lookup(Backward):
        def sensitivity(self, name: str) -> Sensitivity | None:
            return found if name == "token_embd.weight" else None

    tensor = make_tensor(weights(20, 64), "token_embd.weight")
    table = measure_errors([Request(tensor, (T.Q4_0,))], None, source_fingerprint="f", n_layer=4, is_tied=is_tied, gradients=Lookup(found), n_threads=1)
    row = table.rows[tensor.name]
    damage = row.damage(T.Q4_0)
    assert damage is not None and row.basis is basis
    head = prior_nats("output.weight", 4, is_tied=is_tied) * damage.relative_error if is_tied else 0.0
    assert damage.estimated_error == pytest.approx(0.5 * 0.05 * damage.squared_error + head, rel=1e-5)


def test_errors_of_a_lookup_count_by_the_length_of_their_row() -> None:
    """Would catch embeddings estimated at twice what they do, for tokens hardly trained have short rows, small errors and large gradients."""
    W = weights(20, 64) * np.geomspace(0.1, 10, 20, dtype=np.float32)[:, None]
    sensitivity = Sensitivity(np.full((1, 20), 0.05, np.float32), np.arange(64, dtype=np.float32)[None], is_relative=True)
    damage = measure(make_tensor(W), (T.Q4_0,), backward=Backward(sensitivity)).damage(T.Q4_0)
    E = W - ggml.decode_rows(T.Q4_0, ggml.encode_rows(T.Q4_0, W))
    naive = 0.5 * sum(0.05 * sum(j * E[i, j] ** 2 for j in range(64)) / sum(w**2 for w in W[i]) for i in range(20))
    assert damage is not None and damage.estimated_error == pytest.approx(naive, rel=1e-5)


def test_a_tied_embedding_with_the_heads_gradients_needs_no_prior() -> None:
    """Would catch one of the two uses of a tied embedding counted twice, or not at all."""
    found = Sensitivity(np.full((1, 20), 0.05, np.float32), np.ones((1, 64), np.float32))

    class Both(Backward):
        def sensitivity(self, name: str) -> Sensitivity | None:
            return found if name in ("token_embd.weight", "output.weight") else None

    tensor = make_tensor(weights(20, 64), "token_embd.weight")
    table = measure_errors([Request(tensor, (T.Q4_0,))], None, source_fingerprint="f", n_layer=4, is_tied=True, gradients=Both(found), n_threads=1)
    row = table.rows[tensor.name]
    assert row.basis is Basis.GRADIENTS
    assert row.damages[0].estimated_error == pytest.approx(2 * 0.5 * 0.05 * row.damages[0].squared_error, rel=1e-5)


def test_the_chance_of_rows_with_all_the_weight_is_taken_out() -> None:
    """Would catch a head whose estimate depends on how many frequent tokens the sample holds: up to tenfold."""
    r = np.full((1, 4000), 1e-3, np.float32)
    r[0, :40] = 100
    sensitivity = Sensitivity(r / r.mean(), np.ones((1, 64), np.float32))
    tensor = make_tensor(weights(4000, 64))
    exact = measure(tensor, (T.Q4_0,), backward=Backward(sensitivity), is_exact=True)
    for seed in range(3):
        sampled = measure(tensor, (T.Q4_0,), backward=Backward(sensitivity), seed=seed)
        assert sampled.damage(T.Q4_0).estimated_error == pytest.approx(exact.damage(T.Q4_0).estimated_error, rel=0.5)


def test_tilt() -> None:
    """Catches a factor on another kind of tensor, or on what is not the estimate."""
    damage = TypeDamage(GgmlType.Q4_0, 1.0, 2.0, 3.0)
    rows = {name: ErrorRow(name, 1, 1, Basis.PRIOR, (damage,)) for name in ("blk.0.attn_q.weight", "blk.0.ffn_up.weight")}
    table = tilted(ErrorTable(rows), {"attn_q": 2.0})
    assert {tensor_role(name).kind: row.damages[0] for name, row in table.rows.items()} == {"attn_q": replace(damage, estimated_error=6.0), "ffn_up": damage}
