"""Plans by size on synthetic errors: exact to the byte, never over, rules to the letter, presets never better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopgguf.architectures import tensor_order
from loopgguf.container import Value, float32, string, uint32
from loopgguf.errors import UsageError
from loopgguf.errortable import DEFAULT_TYPES, Basis, ErrorRow, ErrorTable, TypeDamage
from loopgguf.formats import FORMATS, GgmlType
from loopgguf.planner import (
    Plan,
    SizedPlan,
    SizeProblem,
    TypeRules,
    budget_for_kld,
    file_bytes,
    meant_for_kld,
    parse_overrides,
    plan_preset,
    plan_size,
    size_problem,
    to_json,
)
from loopgguf.profile import parse_profile
from loopgguf.source import Tensor

T = GgmlType
N_LAYER = 4
METADATA: Mapping[str, Value] = {
    "general.architecture": string("llama"),
    "llama.block_count": uint32(N_LAYER),
    "llama.attention.head_count": uint32(4),
    "llama.attention.head_count_kv": uint32(2),
    "llama.attention.layer_norm_rms_epsilon": float32(1e-5),
}


def no_rows(start: int, stop: int) -> np.ndarray:
    raise AssertionError("a plan reads no weights")


def model(n_in: int = 256) -> list[Tensor]:
    tensors = [Tensor("token_embd.weight", (64, n_in), T.BF16, no_rows), Tensor("output_norm.weight", (n_in,), T.F32, no_rows)]
    tensors.append(Tensor("output.weight", (64, n_in), T.BF16, no_rows))
    for layer in range(N_LAYER):
        for kind, n_rows in (("attn_q", 256), ("attn_k", 128), ("attn_v", 128), ("attn_output", 256), ("ffn_down", 512), ("ffn_up", 512)):
            tensors.append(Tensor(f"blk.{layer}.{kind}.weight", (n_rows, n_in), T.BF16, no_rows))
    return sorted(tensors, key=lambda t: tensor_order(t.name))


def in_layers(name: str) -> bool:
    return name.startswith("blk.")


def synthetic(problem: SizeProblem, seed: int = 0) -> ErrorTable:
    """Errors that fall by four per bit, with noise, and differ from tensor to tensor by orders of magnitude."""
    generator = np.random.default_rng(seed)
    rows = {}
    for request in problem.requests:
        scale = request.tensor.n_rows * generator.lognormal(0, 1.5)
        damages = [
            TypeDamage(t, 0.0, 0.0, 0.0 if t is request.tensor.type else float(scale * 4.0 ** -FORMATS[t].bpw * generator.lognormal(0, 0.2)))
            for t in request.types
        ]
        rows[request.tensor.name] = ErrorRow(request.tensor.name, 1, 1, Basis.PRIOR, tuple(damages))
    return ErrorTable(rows)


def solved(budget_bytes: int, rules: TypeRules | None = None, profile: str = "", seed: int = 0, n_in: int = 256) -> tuple[SizedPlan, SizeProblem]:
    problem = size_problem(model(n_in), METADATA, rules, in_layers, parse_profile(profile, "p", "p") if profile else None)
    return plan_size(problem, synthetic(problem, seed), budget_bytes, lambda plan: file_bytes(plan, METADATA)), problem


def types(plan: Plan) -> dict[str, GgmlType]:
    return {row.name: row.type for row in plan.rows}


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 5), st.floats(0, 1))
def test_never_over_the_budget_and_exact_to_the_byte(seed: int, share: float) -> None:
    """Would catch a header, padding or kept tensor left out of the sum."""
    low, high = solved(10**6, seed=seed)[0].reachable_bytes
    budget = low + int(share * (high - low))
    sized, _ = solved(budget, seed=seed)
    assert sized.total_bytes == file_bytes(sized.plan, METADATA) <= budget
    assert sized.solution.gap < 0.02


def test_both_ends_are_reached_and_beyond_is_refused_with_the_interval() -> None:
    """Would catch an interval that the tool itself cannot meet."""
    low, high = solved(10**6)[0].reachable_bytes
    assert solved(low)[0].total_bytes == low
    assert solved(high)[0].total_bytes == high
    for budget in (low - 1, high + 1):
        with pytest.raises(UsageError, match=rf"size: got {budget:,} bytes, expected {low:,} to {high:,}"):
            solved(budget)


def test_bytes_that_are_kept_of_a_budget() -> None:
    """Catches a size with a gate that is refused as out of an interval which it is in, and one that the keys of a gate exceed."""
    free, problem = solved(10**6)
    (low, high), table = free.reachable_bytes, synthetic(problem)

    def plan(budget_bytes: int) -> SizedPlan:
        return plan_size(problem, table, budget_bytes, lambda plan: file_bytes(plan, METADATA), 1000)

    with pytest.raises(UsageError, match=f"got {low:,} bytes, expected {low + 1000:,} to {high + 1000:,}"):
        plan(low)
    assert plan(low + 1000).total_bytes == low
    assert plan(high).total_bytes <= high - 1000


@pytest.mark.parametrize("preset", ["Q2_K", "IQ2_M", "Q3_K_M", "Q4_K_M", "Q6_K"])
def test_no_preset_of_its_size_is_estimated_better(preset: str) -> None:
    """Would catch a solver that loses to what llama-quantize does anyway."""
    of_preset = plan_preset(model(), METADATA, preset, None, in_layers)
    sized, problem = solved(file_bytes(of_preset, METADATA))
    table = synthetic(problem)
    chosen = types(of_preset)
    estimates = [table.rows[r.tensor.name].damage(chosen[r.tensor.name]) for r in problem.requests]
    assert sized.solution.error <= sum(d.estimated_error for d in estimates if d is not None) * (1 + 1e-6)
    assert sized.best_preset is not None and not sized.is_preset


def test_overrides_and_profile_rules_are_honoured_to_the_letter() -> None:
    """Would catch a pin traded away for bytes, or a limit that holds for one rule only."""
    profile = "{default: Q4_K, types: [IQ2_XXS, Q3_K, Q4_K, Q5_K, Q6_K, Q8_0], "
    profile += "rules: [{role: attn_v, type: Q6_K}, {role: ffn_down, floor: Q4_K}, {layers: 0, ceiling: Q5_K}]}"
    rules = TypeRules(overrides=parse_overrides([r"attn_v\.weight=Q8_0", "blk.3.attn_q=IQ1_S"]), output_type=T.Q5_1)
    sized, _ = solved(820_000, rules, profile)
    found = types(sized.plan)
    assert {found[f"blk.{i}.attn_v.weight"] for i in range(N_LAYER)} == {T.Q8_0}  # the user's word before the profile's
    assert found["blk.3.attn_q.weight"] is T.IQ1_S and found["output.weight"] is T.Q5_1
    assert all(FORMATS[found[f"blk.{i}.ffn_down.weight"]].bpw >= 4.5 for i in range(N_LAYER))
    assert all(FORMATS[t].bpw <= 5.5 for name, t in found.items() if name.startswith("blk.0.") and "attn_v" not in name)
    free = {t for name, t in found.items() if "norm" not in name and "attn_v" not in name and name not in ("blk.3.attn_q.weight", "output.weight")}
    assert free <= {T.IQ2_XXS, T.Q3_K, T.Q4_K, T.Q5_K, T.Q6_K, T.Q8_0}
    assert all(row.reason for row in sized.plan.rows)


def test_embeddings_get_no_type_that_needs_data_they_never_have() -> None:
    """Would catch a plan that the encoder aborts on."""
    problem = size_problem(model(), METADATA, None, in_layers)
    of_embedding = next(r for r in problem.requests if r.tensor.name == "token_embd.weight")
    assert {T.IQ2_XXS, T.IQ2_XS, T.IQ1_S}.isdisjoint(of_embedding.types) and T.Q2_K in of_embedding.types
    assert {T.IQ2_XXS, T.IQ3_XXS}.isdisjoint(t for r in size_problem(model(), METADATA).requests if in_layers(r.tensor.name) for t in r.types)
    assert all(t is T.BF16 or FORMATS[t].block == 32 for r in size_problem(model(n_in=96), METADATA, None, in_layers).requests for t in r.types)


def test_what_cannot_be_planned_is_refused() -> None:
    """Would catch rules that contradict a size and are dropped in silence."""
    with pytest.raises(UsageError, match="--pure"):
        solved(500_000, TypeRules(pure=True))
    with pytest.raises(UsageError, match="leave no tensor free"):
        solved(500_000, TypeRules(overrides=parse_overrides(["weight=Q4_K"])))
    with pytest.raises(UsageError, match=r"attn_q\.weight: got the types Q4_K, expected one of 5\.5"):
        solved(500_000, profile="{default: Q4_K, types: [Q4_K], rules: [{role: attn_q, floor: Q5_K}]}")
    with pytest.raises(UsageError, match="matches no tensor"):
        solved(500_000, TypeRules(overrides=parse_overrides(["nothing=Q4_K"])))


def test_estimates_and_explanations_do_not_change_the_hash_and_name_the_neighbours() -> None:
    """Would catch a hash, and so a file, that depends on the last digit of a measured error."""
    sized, _ = solved(600_000)
    row = next(r for r in sized.plan.rows if r.name == "blk.1.ffn_up.weight")
    assert row.estimated_error is not None and "bytes" in row.explanation and "nats" in row.explanation
    assert "explanation" not in to_json(sized.plan) and "estimated_error" not in to_json(sized.plan)
    assert math.isclose(sum(r.estimated_error or 0 for r in sized.plan.rows), sized.solution.error)
    assert set(DEFAULT_TYPES) >= set(types(sized.plan).values()) - {T.F32}


# --- by estimated KLD -------------------------------------------------------------------------------------------------


def with_gradients(table: ErrorTable) -> ErrorTable:
    return ErrorTable({name: replace(row, basis=Basis.GRADIENTS) for name, row in table.rows.items()})


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9])
def test_the_smallest_file_of_an_estimated_kld(share: float) -> None:
    """Would catch a file above the target, one that is smaller within reach, and a header left out of its size."""
    problem = size_problem(model(), METADATA, None, in_layers, None)
    table = with_gradients(synthetic(problem))

    def measure(plan: Plan) -> int:
        return file_bytes(plan, METADATA)

    low, high = solved(10**6)[0].reachable_bytes
    wanted = plan_size(problem, table, low + int(share * (high - low)), measure)
    target = wanted.solution.error
    budget = budget_for_kld(problem, table, target, measure)
    assert plan_size(problem, table, budget, measure).solution.error <= target * (1 + 1e-9)
    assert budget <= wanted.total_bytes * 1.001
    named = meant_for_kld(plan_size(problem, table, budget, measure), target, measure)
    assert named.plan.intent == f"target KLD {target:g}" and named.total_bytes == measure(named.plan)
    assert plan_size(problem, table, int(0.99 * budget), measure).solution.error > target


def test_a_kld_without_an_estimate_is_refused() -> None:
    """Would catch a prior, in no unit, taken for nats; and a target that no file reaches."""
    problem = size_problem(model(), METADATA, None, in_layers, None)
    table = synthetic(problem)
    with pytest.raises(UsageError, match=r"--target-kld: got no gradients for 26 of 26 tensors \(.*\), expected them for all"):
        budget_for_kld(problem, table, 0.05, lambda plan: file_bytes(plan, METADATA))
    rows = {name: replace(row, damages=tuple(d for d in row.damages if d.estimated_error > 0)) for name, row in with_gradients(table).rows.items()}
    with pytest.raises(UsageError, match=r"--target-kld: got 1e-12, expected at least"):
        budget_for_kld(problem, ErrorTable(rows), 1e-12, lambda plan: file_bytes(plan, METADATA))
