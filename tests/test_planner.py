"""Plans against llama_model_quantize itself on a tiny model, and every refusal."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import llama_cpp.llama_cpp as binding
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_cpp._logger import set_verbose

from loopgguf.architectures import tensor_order
from loopgguf.container import Value, float32, read_gguf, string, uint32, write_gguf
from loopgguf.errors import LoopggufError, UsageError
from loopgguf.formats import FORMATS, GgmlType, parse_type
from loopgguf.planner import (
    Override,
    Plan,
    TypeRules,
    bits_per_weight,
    file_bytes,
    nearest_label,
    parse_overrides,
    plan_conversion,
    plan_preset,
    plan_profile,
    summarize_fallbacks,
    to_json,
)
from loopgguf.presets import PRESETS
from loopgguf.profile import load_profile, profile_names
from loopgguf.source import Tensor

N_LAYER = 16
KINDS = ("attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up")
METADATA: dict[str, Value] = {
    "general.architecture": string("llama"),
    "llama.block_count": uint32(N_LAYER),
    "llama.context_length": uint32(64),
    "llama.embedding_length": uint32(256),
    "llama.feed_forward_length": uint32(256),
    "llama.attention.head_count": uint32(4),
    "llama.attention.head_count_kv": uint32(4),
    "llama.attention.layer_norm_rms_epsilon": float32(1e-5),
}


def no_rows(start: int, stop: int) -> np.ndarray:
    raise AssertionError("a plan reads no weights")


def tensor(name: str, shape: tuple[int, ...], ggml_type: GgmlType = GgmlType.BF16) -> Tensor:
    return Tensor(name, shape, ggml_type, no_rows)


def model(
    *, tied: bool = False, n_in: int = 256, n_layer: int = N_LAYER, matrix_type: GgmlType = GgmlType.BF16, vector_type: GgmlType = GgmlType.F32
) -> list[Tensor]:
    """A Llama of matrices of two rows, in file order."""
    tensors = [tensor("token_embd.weight", (2, n_in), matrix_type), tensor("output_norm.weight", (n_in,), vector_type)]
    tensors += [] if tied else [tensor("output.weight", (2, n_in), matrix_type)]
    for layer in range(n_layer):
        tensors += [tensor(f"blk.{layer}.{kind}.weight", (2, n_in), matrix_type) for kind in KINDS]
        tensors += [tensor(f"blk.{layer}.{kind}_norm.weight", (n_in,), vector_type) for kind in ("attn", "ffn")]
    return sorted(tensors, key=lambda t: tensor_order(t.name))


def types(plan: Plan) -> dict[str, GgmlType]:
    return {row.name: row.type for row in plan.rows}


def everything(name: str) -> bool:
    return True


# --- the oracle: llama_model_quantize ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool, int], Path]:
    """Give the tiny model as a BF16 file: tied or not, rows of so many weights."""
    folder = tmp_path_factory.mktemp("sources")
    rng = np.random.default_rng(0)

    def path_of(tied: bool, n_in: int) -> Path:
        path = folder / f"{'tied' if tied else 'untied'}-{n_in}.gguf"
        if not path.exists():
            arrays = []
            for t in model(tied=tied, n_in=n_in):
                values = rng.standard_normal(t.shape, dtype=np.float32)
                raw = (values.view(np.uint32) >> 16).astype(np.uint16)
                arrays.append((t.name, t.type, values if t.type is GgmlType.F32 else raw))
            write_gguf(path, METADATA, arrays)
        return path

    return path_of


def run_llama_quantize(source: Path, target: Path, file_type: int, rules: TypeRules, covered: Sequence[str] | None, n_in: int) -> dict[str, GgmlType]:
    """Return the types in the file that llama.cpp makes."""
    set_verbose(False)
    params = binding.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = 1, file_type, rules.pure
    params.quantize_output_tensor = not rules.leave_output
    if rules.output_type is not None:
        params.output_tensor_type = rules.output_type
    if rules.token_embedding_type is not None:
        params.token_embedding_type = rules.token_embedding_type
    kept: list[object] = []
    if rules.overrides:
        overrides = (binding.llama_model_tensor_override * (len(rules.overrides) + 1))()
        for slot, override in zip(overrides, rules.overrides, strict=False):
            slot.pattern, slot.type = override.pattern.encode(), override.type
        params.tt_overrides = ctypes.cast(overrides, type(params.tt_overrides))
        kept.append(overrides)
    if covered is not None:
        ones = np.ones(n_in, np.float32)
        data = (binding.llama_model_imatrix_data * (len(covered) + 1))()
        for slot, name in zip(data, covered, strict=False):
            slot.name, slot.data, slot.size = name.encode(), ones.ctypes.data_as(ctypes.POINTER(ctypes.c_float)), n_in
        params.imatrix = ctypes.cast(data, type(params.imatrix))
        kept += [ones, data]
    assert binding.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)) == 0
    return {info.name: info.type for info in read_gguf(target).tensors}


FAST = [name for name in PRESETS if not name.startswith(("IQ1", "IQ2"))]  # the tables of the others take seconds to build
SOME_TYPES = [GgmlType.Q4_K, GgmlType.Q8_0, GgmlType.F16, GgmlType.Q3_K, GgmlType.Q5_0]
maybe_type = st.none() | st.sampled_from(SOME_TYPES)
PATTERNS = ["attn_v", "ffn_down", r"blk\.(0|3|15)\.ffn_down", "blk.1", "_gate", "_gate|token_embd", "attn_k|output", "attn_(q|k)", r"^blk\.2\.attn_v\.weight$"]


@settings(max_examples=60, deadline=None)
@given(
    preset=st.sampled_from(FAST),
    tied=st.booleans(),
    n_in=st.sampled_from([256, 96, 40]),
    with_imatrix=st.booleans(),
    patterns=st.lists(st.sampled_from(PATTERNS), unique=True, max_size=2),
    override_type=st.sampled_from(SOME_TYPES),
    output_type=maybe_type,
    token_embedding_type=maybe_type,
    pure=st.booleans(),
    leave_output=st.booleans(),
)
def test_plan_equals_llama_quantize(
    sources: Callable[[bool, int], Path],
    tmp_path_factory: pytest.TempPathFactory,
    preset: str,
    tied: bool,
    n_in: int,
    with_imatrix: bool,
    patterns: list[str],
    override_type: GgmlType,
    output_type: GgmlType | None,
    token_embedding_type: GgmlType | None,
    pure: bool,
    leave_output: bool,
) -> None:
    """Would catch any wrong order of options, pins that do not shift the counters, and a wrong mixture with an imatrix."""
    overrides = tuple(Override(pattern, override_type) for pattern in patterns)
    if PRESETS[preset].is_float:  # llama.cpp ignores these then, in silence
        overrides, output_type = (), None if tied else output_type
    rules = TypeRules(overrides, output_type, token_embedding_type, pure, leave_output and not tied and output_type is None)
    tensors = model(tied=tied, n_in=n_in)
    covered = [t.name for t in tensors if t.name.startswith("blk.") and len(t.shape) == 2] if with_imatrix else None
    try:
        plan = plan_preset(tensors, METADATA, preset, rules, None if covered is None else covered.__contains__)
    except UsageError:
        return  # what llama-quantize ignores or aborts on; the refusals have their own tests
    if any(row.fallback for row in plan.rows if row.reason.startswith(("--output", "--token"))):
        return  # llama.cpp does not check forced types and aborts the process
    target = tmp_path_factory.mktemp("oracle") / "out.gguf"
    assert types(plan) == run_llama_quantize(sources(tied, n_in), target, plan.file_type, rules, covered, n_in)


@pytest.mark.slow
@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith(("IQ1", "IQ2"))])
def test_low_bit_plan_equals_llama_quantize(sources: Callable[[bool, int], Path], tmp_path: Path, preset: str) -> None:
    """Would catch a wrong mixture of the presets below three bits, all of which need an imatrix."""
    tensors = model()
    covered = [t.name for t in tensors if len(t.shape) == 2]
    plan = plan_preset(tensors, METADATA, preset, None, covered.__contains__)
    assert types(plan) == run_llama_quantize(sources(False, 256), tmp_path / "out.gguf", plan.file_type, TypeRules(), covered, 256)


def test_file_bytes_equal_the_written_file(sources: Callable[[bool, int], Path], tmp_path: Path) -> None:
    """Would catch a dry run that is a byte off: padding, header, block sizes."""
    plan = plan_preset(model(), METADATA, "Q4_K_M")
    run_llama_quantize(sources(False, 256), tmp_path / "out.gguf", plan.file_type, TypeRules(), None, 256)
    written = read_gguf(tmp_path / "out.gguf")
    assert file_bytes(plan, written.metadata) == (tmp_path / "out.gguf").stat().st_size
    assert plan.tensor_bytes == sum(info.n_bytes for info in written.tensors)


# --- sizes, fallbacks, hash -------------------------------------------------------------------------------------------


def test_sizes_by_hand() -> None:
    """Would catch bpw counted without norms or over the wrong number of weights."""
    tensors = [tensor("blk.0.attn_q.weight", (2, 256)), tensor("blk.0.attn_norm.weight", (256,), GgmlType.F32)]
    plan = plan_preset(tensors, METADATA, "Q8_0")
    assert [row.n_bytes for row in plan.rows] == [2 * 272, 1024]
    assert bits_per_weight(plan) == 8 * (544 + 1024) / 768


def test_fallbacks_are_counted_and_priced() -> None:
    """Would catch a fallback that stays silent, or a wrong price for it."""
    tensors = [tensor("blk.0.attn_q.weight", (10, 288)), tensor("blk.0.ffn_up.weight", (10, 256)), tensor("blk.0.attn_norm.weight", (288,), GgmlType.F32)]
    plan = plan_preset(tensors, METADATA, "Q4_K_S")
    row = plan.rows[0]
    assert (row.type, row.wanted) == (GgmlType.Q5_0, GgmlType.Q4_K)
    assert "288" in row.fallback and "256" in row.fallback and "Q4_K" in row.fallback
    with_fallback = 8 * plan.tensor_bytes / plan.n_weights
    without = with_fallback - 2880 * (5.5 - 4.5) / plan.n_weights
    summary = summarize_fallbacks(plan)
    assert summary is not None
    assert f"1 of 2 tensors fall back: {with_fallback:.2f} instead of {without:.2f} bpw" in summary
    assert "Q4_0" in summary and "Q4_K" not in summary
    assert summarize_fallbacks(plan_preset(tensors[1:], METADATA, "Q4_K_S")) is None


def test_no_fallback_names_the_tensor() -> None:
    """Would catch the exception that llama.cpp throws for Q1_0 reaching the user without the tensor's name."""
    with pytest.raises(UsageError, match=r"blk\.0\.attn_q\.weight.*Q1_0"):
        plan_preset([tensor("blk.0.attn_q.weight", (2, 96))], METADATA, "Q1_0")


def test_hash_follows_what_decides_the_bytes() -> None:
    """Would catch a plan hash that ignores a tensor's type, or changes between runs."""
    plan = plan_preset(model(), METADATA, "Q4_K_M")
    assert plan.hash == plan_preset(model(), METADATA, "q4_k_m").hash
    changed = replace(plan, rows=(replace(plan.rows[0], uses_imatrix=True), *plan.rows[1:]))
    assert len({plan.hash, changed.hash, plan_preset(model(), METADATA, "Q4_K_S").hash, replace(plan, intent="x").hash}) == 4
    assert json.loads(to_json(plan))["rows"][0]["type"] == plan.rows[0].type.name


def test_imatrix_use_is_told() -> None:
    """Would catch rows that claim an imatrix which their encoder ignores, and silent gaps in the coverage."""
    tensors = model(n_layer=1)
    plan = plan_preset(tensors, METADATA, "Q4_K_M", TypeRules(parse_overrides(["attn_q=Q8_0"])), lambda name: name == "blk.0.attn_k.weight" or "attn_q" in name)
    assert [row.name for row in plan.rows if row.uses_imatrix] == ["blk.0.attn_k.weight"]
    assert "blk.0.ffn_up.weight" in plan.without_importance and "blk.0.attn_q.weight" not in plan.without_importance


@given(st.lists(st.sampled_from(SOME_TYPES), min_size=1, max_size=4))
def test_reasons_count_every_tensor(chosen: list[GgmlType]) -> None:
    """Would catch an override that reports more or fewer tensors than it decided (first match wins)."""
    overrides = tuple(Override(pattern, ggml_type) for pattern, ggml_type in zip(("attn_v", "blk.1.", "ffn_up", "attn_q"), chosen, strict=False))
    plan = plan_preset(model(), METADATA, "Q4_K_M", TypeRules(overrides))
    for override in overrides:
        earlier = overrides[: overrides.index(override)]
        expected = [r for r in plan.rows if override.pattern in r.name and "norm" not in r.name and not any(o.pattern in r.name for o in earlier)]
        # `blk.1.` as a regular expression also finds blk.10 to blk.15
        if override.pattern != "blk.1.":
            assert plan.reasons[str(override)] >= len([r for r in expected if "blk.1" not in r.name])
        assert all(r.wanted or r.type is override.type for r in plan.rows if r.reason == str(override))
    assert sum(plan.reasons.values()) == len(plan.rows)


# --- profiles ---------------------------------------------------------------------------------------------------------


def llama_8b() -> tuple[list[Tensor], dict[str, Value]]:
    shapes = {"attn_q": (4096, 4096), "attn_k": (1024, 4096), "attn_v": (1024, 4096), "attn_output": (4096, 4096)}
    shapes |= {"ffn_gate": (14336, 4096), "ffn_up": (14336, 4096), "ffn_down": (4096, 14336)}
    tensors = [tensor("token_embd.weight", (128256, 4096)), tensor("output.weight", (128256, 4096)), tensor("output_norm.weight", (4096,))]
    tensors += [tensor(f"blk.{layer}.{kind}.weight", shape) for layer in range(32) for kind, shape in shapes.items()]
    return tensors, {**METADATA, "llama.block_count": uint32(32), "llama.attention.head_count": uint32(32), "llama.attention.head_count_kv": uint32(8)}


SIZES = [("balanced", 4.4, 4.7), ("attention-high", 4.7, 5.1), ("compression-max", 2.1, 2.65), ("quality", 5.9, 6.3), ("singular-bit", 1.9, 2.4)]


@pytest.mark.parametrize(("name", "low", "high"), [*SIZES, ("cpu-fast", 4.6, 4.9)])
def test_shipped_profiles_have_their_size(name: str, low: float, high: float) -> None:
    """Would catch a profile whose file is not of the size its description promises (Llama 3 8B)."""
    tensors, metadata = llama_8b()
    plan = plan_profile(tensors, metadata, load_profile(name), None, everything)
    assert low < bits_per_weight(plan) < high
    assert nearest_label(plan) in PRESETS


@pytest.mark.parametrize("name", profile_names())
@pytest.mark.parametrize("tied", [True, False])
def test_shipped_profiles_need_no_data_for_embeddings(name: str, tied: bool) -> None:
    """Would catch a profile that cannot be used with an ordinary imatrix, which covers neither embeddings nor output."""
    plan = plan_profile(model(tied=tied), METADATA, load_profile(name), None, lambda tensor_name: tensor_name.startswith("blk."))
    assert types(plan)["output.weight" if not tied else "token_embd.weight"] is load_profile(name).rules[0].type


def test_overrides_win_over_a_profile() -> None:
    """Would catch rules that beat the user's own override, and layers that are counted wrongly."""
    plan = plan_profile(model(), METADATA, load_profile("balanced"), TypeRules(parse_overrides([r"blk\.0\.ffn_down=Q8_0"])))
    got = types(plan)
    assert got["blk.0.ffn_down.weight"] is GgmlType.Q8_0
    assert [got[f"blk.{i}.ffn_down.weight"].name for i in (1, 2, 13, 14, 15)] == ["Q5_K", "IQ4_XS", "IQ4_XS", "Q5_K", "Q5_K"]
    assert plan.intent == r"profile balanced --tensor-type blk\.0\.ffn_down=Q8_0"
    assert plan.reasons[r"--tensor-type blk\.0\.ffn_down=Q8_0"] == 1


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("texts", "culprit"),
    [
        (["attn_v"], "attn_v"),
        (["=Q4_K"], "=Q4_K"),
        (["attn_v="], "attn_v="),
        (["attn_v=Q4_K_M"], "Q4_K_M"),
        (["attn_v=Q8_K"], "Q8_K"),
        (["(attn=Q4_K"], r"\(attn"),
        (["attn_v{99999999999}=Q4_K"], "attn_v"),
        (["attn_v=Q4_K", "attn_v=Q5_K"], "twice"),
        ([""], "REGEX=TYPE"),
    ],
)
def test_bad_override(texts: list[str], culprit: str) -> None:
    """Would catch an override that is misread or explodes in Python's re instead of being refused."""
    with pytest.raises(UsageError, match=culprit):
        parse_overrides(texts)


def test_override_may_hold_an_equals_sign() -> None:
    """Would catch a split at the first `=`, which breaks lookaheads."""
    assert parse_overrides(["attn_(?=v)=q6_k"]) == (Override("attn_(?=v)", GgmlType.Q6_K),)


@pytest.mark.parametrize(
    ("rules", "culprit"),
    [
        (TypeRules((Override("attn_w", GgmlType.Q8_0),)), "attn_w=Q8_0: the pattern matches no tensor"),
        (TypeRules((Override("output_norm", GgmlType.Q8_0),)), "output_norm.weight is never quantized"),
        (TypeRules((Override("attn", GgmlType.Q8_0), Override("attn_v", GgmlType.Q4_K))), "--tensor-type attn=Q8_0"),
        (TypeRules((Override("^output.weight", GgmlType.Q8_0),), output_type=GgmlType.Q6_K), "--output-tensor-type"),
        (TypeRules(leave_output=True, output_type=GgmlType.Q6_K), "contradict"),
    ],
)
def test_idle_wishes_are_refused(rules: TypeRules, culprit: str) -> None:
    """Would catch an option that silently changes nothing."""
    with pytest.raises(UsageError, match=culprit):
        plan_preset(model(), METADATA, "Q4_K_M", rules)


@pytest.mark.parametrize("rules", [TypeRules(leave_output=True), TypeRules(output_type=GgmlType.Q8_0, pure=True)])
def test_output_options_without_an_output(rules: TypeRules) -> None:
    """Would catch an output option that does nothing for tied embeddings, as in llama-quantize."""
    with pytest.raises(UsageError, match="output"):
        plan_preset(model(tied=True), METADATA, "Q4_K_M", rules)


def test_pure_contradicts_a_profile() -> None:
    """Would catch --pure being ignored with a profile."""
    with pytest.raises(UsageError, match="--pure"):
        plan_profile(model(), METADATA, load_profile("balanced"), TypeRules(pure=True))


@pytest.mark.parametrize(
    ("preset", "overrides", "has_importance", "culprit"),
    [
        ("IQ2_XS", [], None, r"blk\.0\.attn_k\.weight \(IQ2_XS\)"),
        ("Q2_K_S", [], None, "Q2_K"),
        ("Q4_K_M", ["token_embd=IQ2_XXS"], None, r"token_embd\.weight \(IQ2_XXS\)"),
        ("Q4_K_M", ["token_embd=IQ1_S"], lambda name: name.startswith("blk."), r"token_embd\.weight \(IQ1_S\)"),
        ("IQ2_M", [], lambda name: name.startswith("blk.") and "blk.3." not in name, r"blk\.3\..*and \d more"),
    ],
)
def test_types_that_need_an_imatrix(preset: str, overrides: list[str], has_importance: Callable[[str], bool] | None, culprit: str) -> None:
    """Would catch ggml aborting the process, or half a file, because data for one tensor are missing."""
    with pytest.raises(UsageError, match=culprit):
        plan_preset(model(), METADATA, preset, TypeRules(parse_overrides(overrides)), has_importance)


def test_requantizing_needs_consent() -> None:
    """Would catch a quantized source being quantized again without --allow-requantize; equal types are only copied."""
    tensors = model(matrix_type=GgmlType.Q8_0)
    with pytest.raises(UsageError, match=r"output\.weight is Q8_0, and 114 tensors.*--allow-requantize"):
        plan_preset(tensors, METADATA, "Q4_K_M")
    assert not any(row.is_encoded for row in plan_preset(tensors, METADATA, "Q8_0").rows)
    assert types(plan_preset(tensors, METADATA, "Q4_K_M", TypeRules(allow_requantize=True)))["blk.9.attn_q.weight"] is GgmlType.Q4_K
    with pytest.raises(UsageError, match="allow-requantize"):
        plan_conversion(tensors, METADATA, "f16")


def test_half_precision_norms_of_a_checkpoint_become_f32() -> None:
    """Would catch BF16 norms copied from a checkpoint, which llama.cpp does not run."""
    plan = plan_preset(model(vector_type=GgmlType.BF16), METADATA, "Q4_K_M", TypeRules(leave_output=True))
    assert {row.type for row in plan.rows if "norm" in row.name} == {GgmlType.F32}
    assert types(plan)["output.weight"] is GgmlType.BF16


def test_integers_are_copied() -> None:
    """Would catch an integer table being sent to an encoder."""
    plan = plan_preset([tensor("blk.0.table.weight", (4, 256), GgmlType.I32)], METADATA, "Q4_K_M")
    assert types(plan) == {"blk.0.table.weight": GgmlType.I32}


# --- conversion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("outtype", "expected"), [("f32", "F32"), ("F16", "F16"), ("bf16", "BF16"), ("q8_0", "Q8_0"), ("auto", "BF16")])
def test_conversion(outtype: str, expected: str) -> None:
    """Would catch norms or routers in half precision, and a label that does not fit the content."""
    tensors = [*model(vector_type=GgmlType.BF16), tensor("blk.0.ffn_gate_inp.weight", (4, 256)), tensor("blk.0.attn_q.bias", (256,))]
    plan = plan_conversion(tensors, METADATA, outtype)
    got = types(plan)
    assert {got["token_embd.weight"], got["blk.3.attn_q.weight"], got["output.weight"]} == {parse_type(expected)}
    assert {got[name] for name in ("output_norm.weight", "blk.0.ffn_gate_inp.weight", "blk.0.attn_q.bias")} == {GgmlType.F32}
    assert PRESETS[expected].file_type == plan.file_type


def test_conversion_auto_follows_the_weights() -> None:
    """Would catch `auto` deciding by a norm; F32 weights become F16, as upstream."""
    for matrix_type, expected in ((GgmlType.F16, GgmlType.F16), (GgmlType.BF16, GgmlType.BF16), (GgmlType.F32, GgmlType.F16)):
        vector_type = GgmlType.BF16 if matrix_type is not GgmlType.BF16 else GgmlType.F16
        assert types(plan_conversion(model(matrix_type=matrix_type, vector_type=vector_type), METADATA))["token_embd.weight"] is expected


def test_conversion_falls_back_and_refuses() -> None:
    """Would catch rows of 40 in Q8_0 blocks of 32, and an outtype that convert does not have."""
    row = plan_conversion([tensor("token_embd.weight", (2, 40))], METADATA, "q8_0").rows[0]
    assert (row.type, row.wanted) == (GgmlType.F16, GgmlType.Q8_0)
    with pytest.raises(UsageError, match="q4_k_m"):
        plan_conversion(model(), METADATA, "q4_k_m")


@settings(max_examples=100)
@given(
    preset=st.sampled_from(sorted(PRESETS)),
    n_in=st.integers(1, 1024),
    rules=st.builds(TypeRules, output_type=maybe_type, token_embedding_type=maybe_type, pure=st.booleans(), leave_output=st.booleans()),
)
def test_a_plan_is_complete_or_refused(preset: str, n_in: int, rules: TypeRules) -> None:
    """Would catch a crash, a missing row or rows that are no whole blocks, for any row length and option."""
    tensors = model(n_in=n_in, n_layer=2)
    metadata: Mapping[str, Value] = {**METADATA, "llama.block_count": uint32(2)}
    try:
        plan = plan_preset(tensors, metadata, preset, rules, everything)
    except LoopggufError as error:
        assert "\n" not in str(error)
        return
    assert [row.name for row in plan.rows] == [t.name for t in tensors]
    assert all(row.shape[-1] % FORMATS[row.type].block == 0 for row in plan.rows)
