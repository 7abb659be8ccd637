"""Presets against llama.cpp's own chooser: live, through the library inside llama-cpp-python, and by golden hashes."""

from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import llama_cpp.llama_cpp as binding
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_cpp._logger import set_verbose

from loopgguf.architectures import tensor_order
from loopgguf.container import Value, ValueType, array, string, uint32
from loopgguf.errors import InputError, UsageError
from loopgguf.formats import GgmlType, fallback_type
from loopgguf.presets import ALIASES, PRESETS, ModelFacts, choose_types, find_preset, is_quantizable, read_facts, requires_imatrix, why_kept

Tensors = list[tuple[str, tuple[int, ...]]]

# --- the oracle: llama.cpp's chooser, exported by libllama under C++ names --------------------------------------------

_SYMBOLS = {
    "model": "_Z31llama_quant_model_from_metadataPK22llama_quant_model_desc",
    "init": "_Z16llama_quant_initPK11llama_modelPK27llama_model_quantize_params",
    "free": "_Z16llama_quant_freeP19quantize_state_impl",
    "allows": "_Z38llama_quant_tensor_allows_quantizationPK19quantize_state_implPK11ggml_tensor",
    "compute": "_Z25llama_quant_compute_typesP19quantize_state_impl11llama_ftypePP11ggml_tensorP9ggml_typem",
}


class _Description(ctypes.Structure):
    _fields_ = [
        ("architecture", ctypes.c_char_p),
        *((name, ctypes.c_uint32) for name in ("n_embd", "n_ff", "n_layer", "n_head", "n_head_kv", "n_expert", "n_embd_head_k", "n_embd_head_v")),
    ]


class _InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


def _library() -> Any:
    lib = binding._lib
    pointer = ctypes.c_void_p
    signatures = {
        "model": (pointer, [ctypes.POINTER(_Description)]),
        "init": (pointer, [pointer, pointer]),
        "free": (None, [pointer]),
        "allows": (ctypes.c_bool, [pointer, pointer]),
        "compute": (None, [pointer, ctypes.c_int, pointer, pointer, ctypes.c_size_t]),
    }
    for key, (restype, argtypes) in signatures.items():
        function = getattr(lib, _SYMBOLS[key])
        function.restype, function.argtypes = restype, argtypes
    lib.ggml_init.restype, lib.ggml_init.argtypes = pointer, [_InitParams]
    lib.ggml_new_tensor_4d.restype, lib.ggml_new_tensor_4d.argtypes = pointer, [pointer, ctypes.c_int, *[ctypes.c_int64] * 4]
    lib.ggml_set_name.restype, lib.ggml_set_name.argtypes = pointer, [pointer, ctypes.c_char_p]
    lib.ggml_free.restype, lib.ggml_free.argtypes = None, [pointer]
    return lib


needs_oracle = pytest.mark.skipif(not hasattr(binding._lib, _SYMBOLS["compute"]), reason="libllama does not export its type chooser under this name")


class Oracle:
    """llama.cpp's chooser on tensors without data."""

    def __init__(self, model: ModelFacts, tensors: Tensors) -> None:
        set_verbose(False)
        self.lib = _library()
        self.description = _Description(
            model.architecture.encode(), 4096, 11008, model.n_layer, model.n_head, model.n_head_kv, model.n_expert, 128, 128
        )  # fmt: skip
        self.model = getattr(self.lib, _SYMBOLS["model"])(ctypes.byref(self.description))
        self.params = binding.llama_model_quantize_default_params()
        self.state = getattr(self.lib, _SYMBOLS["init"])(self.model, ctypes.byref(self.params))
        self.context = self.lib.ggml_init(_InitParams(400 * (len(tensors) + 8), None, True))
        self.pointers = {name: self._tensor(name, shape) for name, shape in tensors}

    def _tensor(self, name: str, shape: tuple[int, ...]) -> int:
        sizes = [*reversed(shape), *[1] * (4 - len(shape))]
        pointer = self.lib.ggml_new_tensor_4d(self.context, GgmlType.F32, *sizes)
        self.lib.ggml_set_name(pointer, name.encode())
        return int(pointer)

    def allows(self, name: str) -> bool:
        return bool(getattr(self.lib, _SYMBOLS["allows"])(self.state, self.pointers[name]))

    def types(self, file_type: int, names: Sequence[str]) -> dict[str, GgmlType]:
        pointers = (ctypes.c_void_p * len(names))(*(self.pointers[name] for name in names))
        result = (ctypes.c_int * len(names))()
        getattr(self.lib, _SYMBOLS["compute"])(self.state, file_type, pointers, result, len(names))
        return dict(zip(names, map(GgmlType, result), strict=True))

    def close(self) -> None:
        self.lib.ggml_free(self.context)
        getattr(self.lib, _SYMBOLS["free"])(self.state)
        binding.llama_model_free(self.model)


def ours(model: ModelFacts, preset_name: str, tensors: Tensors, *, has_imatrix: bool = False) -> dict[str, GgmlType]:
    preset = find_preset(preset_name)
    rows = {name: shape[-1] for name, shape in tensors}
    chosen = choose_types(model, preset, tensors, has_imatrix=has_imatrix)
    return chosen if preset.is_float else {name: fallback_type(ggml_type, rows[name]) for name, ggml_type in chosen.items()}


DENSE = ("attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up")
FUSED = ("attn_output", "attn_qkv", "ffn_down", "ffn_up", "attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b", "ssm_in", "nextn.eh_proj")
EXPERTS = ("attn_k", "attn_output", "attn_q", "attn_v", "ffn_down_exps", "ffn_down_shexp", "ffn_gate_exps", "ffn_gate_shexp", "ffn_up_exps", "ffn_up_shexp")


def build(kinds: Sequence[str], n_layer: int, n_in: int, *, n_ff: int = 0, tied: bool = False) -> Tensors:
    """A model's tensors in file order; experts are stacks of four."""
    tensors: Tensors = [("token_embd.weight", (32, n_in)), ("output_norm.weight", (n_in,)), *([] if tied else [("output.weight", (32, n_in))])]
    for layer in range(n_layer):
        for kind in kinds:
            matrix = (8, (n_ff or n_in) if "ffn_down" in kind else n_in)
            tensors.append((f"blk.{layer}.{kind}.weight", (4, *matrix) if kind.endswith("_exps") else matrix))
    return sorted(tensors, key=lambda tensor: tensor_order(tensor[0]))


@needs_oracle
@settings(max_examples=60, deadline=None)
@given(
    architecture=st.sampled_from(["llama", "qwen3", "falcon", "gemma3", "qwen3moe", "bailingmoe3", "glm5-next"]),
    n_layer=st.sampled_from([1, 2, 6, 7, 15, 16, 24, 31, 32, 40, 80]),
    heads=st.sampled_from([(32, 32), (32, 8), (8, 4), (64, 8), (16, 0)]),
    kinds=st.sampled_from([DENSE, FUSED, EXPERTS]),
    n_expert=st.sampled_from([0, 1, 3, 4, 8, 128]),
    n_in=st.sampled_from([2048, 256, 576, 100]),
    n_ff=st.sampled_from([0, 1536, 1408]),
    tied=st.booleans(),
)
def test_types_equal_llama_cpp(
    architecture: str, n_layer: int, heads: tuple[int, int], kinds: Sequence[str], n_expert: int, n_in: int, n_ff: int, tied: bool
) -> None:
    """Would catch any rule, counter, boundary or fallback that differs from llama.cpp's for any model without an imatrix."""
    if kinds is EXPERTS and n_expert < 2:
        n_expert = 8
    if architecture == "falcon" or (architecture == "llama" and n_layer == 80):
        n_expert = 0 if kinds is not EXPERTS else 16  # no such Falcon; the oracle's model calls 80 layers of eight experts 70B, the loader does not
    model = ModelFacts(architecture, n_layer, *heads, n_expert)
    tensors = build(kinds, n_layer, n_in, n_ff=n_ff, tied=tied)
    oracle = Oracle(model, tensors)
    wanted = [name for name, shape in tensors if is_quantizable(name, shape, architecture)]
    assert wanted == [name for name, _ in tensors if oracle.allows(name)]
    for preset in PRESETS.values():
        if preset.name == "Q1_0" and any(n % 128 for n in (n_in, n_ff)):
            continue  # llama.cpp throws, see test_planner
        assert ours(model, preset.name, tensors) == oracle.types(preset.file_type, wanted), preset.name
    oracle.close()


NAMES = [
    *(
        "token_embd.weight",
        "per_layer_token_embd.weight",
        "output.weight",
        "output_norm.weight",
        "position_embd.weight",
        "token_types.weight",
        "rope_freqs.weight",
    ),
    *(
        f"blk.0.{kind}.weight"
        for kind in (*DENSE, *FUSED, *EXPERTS, "ffn_gate_inp", "ffn_gate_inp_shexp", "ffn_gate_tid2eid", "attn_norm", "attn_q_norm", "hc_x")
    ),
    *("blk.0.attn_q.bias", "blk.0.attn_q.scale", "per_layer_model_proj.weight", "altup_proj.weight", "blk.0.laurel_l.weight", "blk.1.altup_router.weight"),
    *("blk.0.ssm_conv1d.weight", "blk.0.shortconv.conv.weight", "blk.0.indexer.k_proj.weight", "blk.0.indexer.q_proj.weight", "blk.0.indexer.attn_q_b.weight"),
    *("blk.0.time_mix_w1.weight", "blk.0.time_mix_key.weight", "blk.0.time_mix_decay_w2.weight", "blk.0.time_mix_lerp_fused.weight", "blk.0.ssm_beta.weight"),
    *("enc.blk.0.attn_rel_b.weight", "v.position_embd.weight", "v.patch_embd.weight", "sam.neck.0.weight", "a.rvq.codebook.weight", "mm.a.code_embd.weight"),
    *("mm.patch_merger.weight", "v.blk.0.rel_pos_h.weight", "blk.0.attn_v_b.weight", "blk.0.attn_k_b.weight", "blk.0.ssm_f_a.weight", "cls.weight"),
]


@needs_oracle
@pytest.mark.parametrize("architecture", ["llama", "glm5-next", "bert"])
@pytest.mark.parametrize("shape", [(64, 64), (64,), (1, 64), (1, 1, 64), (64, 1), (2, 64, 64), (2, 1, 64)])
def test_never_quantized_equals_llama_cpp(architecture: str, shape: tuple[int, ...]) -> None:
    """Would catch a tensor that llama.cpp keeps and we quantize, or the reverse; ggml does not see leading ones of a shape."""
    oracle = Oracle(ModelFacts(architecture, 2, 4, 4), [(name, shape) for name in NAMES])
    assert {name: is_quantizable(name, shape, architecture) for name in NAMES} == {name: oracle.allows(name) for name in NAMES}
    oracle.close()


# --- golden: checked once against llama.cpp's snapshots (tools/check_presets.py) ----------------------------------------

GOLDEN_MODELS = {  # facts, columns of ffn_down, tied
    "qwen3-0.6b": (ModelFacts("qwen3", 28, 16, 8), 1024, 3072, False),
    "qwen3-14b": (ModelFacts("qwen3", 40, 40, 8), 5120, 17408, False),
    "gemma-3-4b": (ModelFacts("gemma3", 34, 8, 4), 2560, 10240, True),
    "llama-3.1-70b": (ModelFacts("llama", 80, 64, 8), 8192, 28672, False),
}
GOLDEN = {  # the first eight digits of the sha256 over the sorted lines `tensor type`, by preset
    "qwen3-0.6b": """
        Q1_0:535cc3b4 Q2_0:518e3806 Q4_0:427d2b26 Q4_1:0a132ec7 MXFP4_MOE:30ffb1d9 Q5_0:5627e25d Q5_1:c63e1392 IQ2_XXS:4f85fd8b IQ2_XS:b30af817
        IQ2_S:3919182a IQ2_M:462739f8 IQ1_S:0fee6ed6 IQ1_M:99ce6107 TQ1_0:16fa7e7f TQ2_0:0e9a87e4 Q2_K:a98074b4 Q2_K_S:ca2fc9ca IQ3_XXS:4a89da90
        IQ3_S:24479a6d IQ3_M:e7f6979d IQ3_XS:7d00107b Q3_K_S:83f3ac9b Q3_K_M:13ccbbda Q3_K_L:c1a836ac IQ4_NL:4c9f85cb IQ4_XS:35b0f7f1
        Q4_K_S:1f2c8359 Q4_K_M:3647cae8 Q5_K_S:2ede98fd Q5_K_M:e2af1c8f Q6_K:db4c72f2 Q8_0:30ffb1d9 F16:9cba21ee BF16:b2012e28 F32:11715de2
    """,
    "qwen3-14b": """
        Q1_0:d8d925b8 Q2_0:b28a339f Q4_0:38aa5e5e Q4_1:4eb8f929 MXFP4_MOE:07a8a3bc Q5_0:eb792844 Q5_1:2fff5c65 IQ2_XXS:3854e578 IQ2_XS:cfd9fa01
        IQ2_S:4adda72b IQ2_M:1469cae4 IQ1_S:95818a61 IQ1_M:9d260b72 TQ1_0:e3a5d9db TQ2_0:a2119e3b Q2_K:213b54c2 Q2_K_S:e5ee6042 IQ3_XXS:a1c2d237
        IQ3_S:daf61cdf IQ3_M:412fcf7d IQ3_XS:8e9b41da Q3_K_S:036f10e6 Q3_K_M:7904f788 Q3_K_L:be4513fa IQ4_NL:f78ecf88 IQ4_XS:aa1e6914
        Q4_K_S:70e660a1 Q4_K_M:5f2533e4 Q5_K_S:a7a634d6 Q5_K_M:89e7e15c Q6_K:505ac6f9 Q8_0:07a8a3bc F16:d50da6ee BF16:96651d68 F32:e4de928f
    """,
    "gemma-3-4b": """
        Q1_0:46566db5 Q2_0:40f9ca28 Q4_0:02394b10 Q4_1:27b5c87b MXFP4_MOE:2096ed22 Q5_0:3afdb1bd Q5_1:5938c5d8 IQ2_XXS:4b48cf28 IQ2_XS:b09b9f3a
        IQ2_S:c0b14b91 IQ2_M:501a7b41 IQ1_S:a2cd1e0b IQ1_M:17167ee1 TQ1_0:6f10a6a2 TQ2_0:df49d570 Q2_K:a9847e50 Q2_K_S:13e3da31 IQ3_XXS:0fbc5f28
        IQ3_S:cc9077f6 IQ3_M:cae79e89 IQ3_XS:81d3bea5 Q3_K_S:bb7c3f5d Q3_K_M:c3503d60 Q3_K_L:5e24fcd9 IQ4_NL:07550eb3 IQ4_XS:fadd35c8
        Q4_K_S:66dd4b6b Q4_K_M:2b7f9b5b Q5_K_S:0b3548ba Q5_K_M:ce3c1810 Q6_K:abb71ff3 Q8_0:2096ed22 F16:2ef129ec BF16:a66571c8 F32:eeef5bf5
    """,
    "llama-3.1-70b": """
        Q1_0:28763ee6 Q2_0:39b26c38 Q4_0:551882cf Q4_1:d568ca51 MXFP4_MOE:ff3d1d3b Q5_0:596028f0 Q5_1:ce65724d IQ2_XXS:05d1c7e4 IQ2_XS:da9a07c7
        IQ2_S:c529f4c7 IQ2_M:6fa01693 IQ1_S:4fed9af5 IQ1_M:ee2e3acd TQ1_0:8ed4e2f8 TQ2_0:59e214e9 Q2_K:f70a9d5d Q2_K_S:3df09c3b IQ3_XXS:213f2c0a
        IQ3_S:218bf544 IQ3_M:d49ec71d IQ3_XS:ceb9a378 Q3_K_S:c154fea4 Q3_K_M:b23321fd Q3_K_L:0749d7b4 IQ4_NL:d11efde8 IQ4_XS:9428ebbb
        Q4_K_S:dd0d126c Q4_K_M:9296ab1c Q5_K_S:75262d40 Q5_K_M:387a995e Q6_K:5b5cfea9 Q8_0:ff3d1d3b F16:9d16b9b5 BF16:a99dc0e5 F32:b039b3c2
    """,
}


def golden_hash(model: str, preset_name: str) -> str:
    facts, n_in, n_ff, tied = GOLDEN_MODELS[model]
    types = ours(facts, preset_name, build(DENSE, facts.n_layer, n_in, n_ff=n_ff, tied=tied))
    return hashlib.sha256("\n".join(sorted(f"{name} {ggml_type.name}" for name, ggml_type in types.items())).encode()).hexdigest()[:8]


@pytest.mark.parametrize("model", GOLDEN_MODELS)
def test_golden_types(model: str) -> None:
    """Would catch a changed choice for a published model even where libllama's chooser cannot be called."""
    assert " ".join(f"{name}:{golden_hash(model, name)}" for name in PRESETS) == " ".join(GOLDEN[model].split())


# --- by hand ----------------------------------------------------------------------------------------------------------


def test_imatrix_changes_the_mixture() -> None:
    """Would catch a mixture that ignores whether an imatrix exists (IQ3_XXS values, Q4_0's first ffn_down)."""
    tensors = build(DENSE, 16, 256)
    model = ModelFacts("llama", 16, 8, 8)
    for preset, name, without, with_data in (
        ("IQ3_XXS", "blk.5.attn_v.weight", GgmlType.IQ3_S, GgmlType.IQ3_XXS),
        ("IQ3_XXS", "blk.0.ffn_down.weight", GgmlType.Q4_K, GgmlType.IQ3_XXS),
        ("IQ3_XXS", "blk.2.ffn_down.weight", GgmlType.Q3_K, GgmlType.IQ3_XXS),
        ("Q4_0", "blk.1.ffn_down.weight", GgmlType.Q4_0, GgmlType.Q4_1),
        ("Q5_0", "blk.1.ffn_down.weight", GgmlType.Q5_0, GgmlType.Q5_1),
        ("Q4_0", "blk.2.ffn_down.weight", GgmlType.Q4_0, GgmlType.Q4_0),
        ("IQ4_XS", "blk.1.ffn_down.weight", GgmlType.Q5_K, GgmlType.IQ4_XS),
    ):
        assert ours(model, preset, tensors)[name] is without, (preset, name)
        assert ours(model, preset, tensors, has_imatrix=True)[name] is with_data, (preset, name)


def test_pinned_tensors_shift_the_counters() -> None:
    """Would catch layers taken from names: with blk.0.ffn_down pinned, llama.cpp treats blk.1.ffn_down as the first."""
    tensors = build(DENSE, 2, 256)
    model, preset = ModelFacts("llama", 2, 4, 2), find_preset("Q4_K_M")
    assert choose_types(model, preset, tensors, has_imatrix=False)["blk.1.ffn_down.weight"] is GgmlType.Q6_K
    pinned = choose_types(model, preset, tensors, has_imatrix=False, pinned={"blk.0.ffn_down.weight"})
    assert "blk.0.ffn_down.weight" not in pinned
    assert pinned["blk.1.ffn_down.weight"] is GgmlType.Q4_K


@pytest.mark.parametrize(
    ("spelling", "name"), [("q4_k_m", "Q4_K_M"), ("Q4_K", "Q4_K_M"), ("Q3_K", "Q3_K_M"), ("15", "Q4_K_M"), (" iq4_xs ", "IQ4_XS"), ("0", "F32")]
)
def test_preset_spellings(spelling: str, name: str) -> None:
    """Would catch a spelling that llama-quantize accepts and we do not."""
    assert find_preset(spelling).name == name


@pytest.mark.parametrize("spelling", ["NVFP4", "Q4_K_X", "", "99", "-1", "39", "Q8_K"])
def test_unknown_preset(spelling: str) -> None:
    """Would catch a preset without rules in llama.cpp (NVFP4, 39) being accepted."""
    with pytest.raises(UsageError, match="Q4_K_M"):
        find_preset(spelling)


def test_file_types_are_unique() -> None:
    """Would catch two presets that write the same general.file_type, and aliases to nowhere."""
    assert len({preset.file_type for preset in PRESETS.values()}) == len(PRESETS)
    assert set(ALIASES.values()) <= set(PRESETS)


def test_why_kept_says_why() -> None:
    """Would catch a wrong reason in the plan's table."""
    assert why_kept("blk.0.attn_norm.weight", (64,)) == "one-dimensional"
    assert why_kept("blk.0.attn_q.bias", (64, 64)) == "not a weight"
    assert why_kept("output.weight", (64, 64), leave_output=True) == "--leave-output-tensor"
    assert why_kept("output.weight", (64, 64)) == ""


def test_imatrix_requirements() -> None:
    """Would catch the hole in llama-quantize: ggml aborts on token embeddings in IQ2_XXS without data."""
    assert requires_imatrix("token_embd.weight", GgmlType.IQ2_XXS)
    assert not requires_imatrix("token_embd.weight", GgmlType.IQ3_XXS)
    assert requires_imatrix("blk.0.attn_q.weight", GgmlType.IQ3_XXS)
    assert not requires_imatrix("blk.0.attn_q.weight", GgmlType.Q2_K, "Q2_K")
    assert requires_imatrix("blk.0.attn_q.weight", GgmlType.Q2_K, "Q2_K_S")


def metadata(**values: Value) -> dict[str, Value]:
    return {"general.architecture": string("llama"), **{f"llama.{key.replace('__', '.')}": value for key, value in values.items()}}


def test_read_facts() -> None:
    """Would catch a missing default: no key/value heads means as many as heads; an array counts by its first layer."""
    heads = array(ValueType.INT32, [8, 4])
    assert read_facts(metadata(block_count=uint32(2), attention__head_count=heads)) == ModelFacts("llama", 2, 8, 8, 0)
    assert read_facts(metadata(block_count=uint32(2), attention__head_count=uint32(8), attention__head_count_kv=uint32(2), expert_count=uint32(8))).n_gqa == 4


@pytest.mark.parametrize(
    ("broken", "culprit"),
    [
        ({}, "general.architecture"),
        ({"general.architecture": uint32(3)}, "general.architecture"),
        (metadata(), "llama.block_count"),
        (metadata(block_count=string("two")), "llama.block_count"),
        (metadata(block_count=uint32(2), expert_count=Value(ValueType.INT32, -1)), "llama.expert_count"),
    ],
)
def test_broken_metadata(broken: dict[str, Value], culprit: str) -> None:
    """Would catch a traceback, or a guess, where a key is missing or of the wrong type."""
    with pytest.raises(InputError, match=culprit):
        read_facts(broken)


@pytest.fixture
def expert_model() -> Iterator[ModelFacts]:
    yield ModelFacts("llama", 2, 8, 8, 4)


def test_expert_without_layer(expert_model: ModelFacts) -> None:
    """Would catch a crash or a guess where an expert tensor's name tells no layer of the model."""
    for name in ("blk.7.ffn_down_exps.weight", "ffn_down_exps.weight"):
        with pytest.raises(InputError, match=name):
            choose_types(expert_model, find_preset("Q4_K_M"), [(name, (4, 8, 256))], has_imatrix=False)
