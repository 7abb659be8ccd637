"""The tables: names, shapes, order, rope, and config.json read strictly in both spellings."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopgguf.architectures import (
    FAMILIES,
    NORM_FEEDS,
    Config,
    Hyperparameters,
    Role,
    expected_weights,
    find_family,
    find_limitations,
    hyperparameter_metadata,
    input_group,
    read_hyperparameters,
    rope_factors,
    rope_source_rows,
    tensor_order,
    tensor_role,
)
from loopgguf.container import ValueType
from loopgguf.errors import InputError

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def config(**changes: object) -> dict[str, object]:
    """Return a config.json as published checkpoints have it; a value of `...` removes the key."""
    keys: dict[str, object] = {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 131072,
        "vocab_size": 40,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": None,
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
    }
    return {key: value for key, value in (keys | changes).items() if value is not ...}


def read(keys: Config) -> Hyperparameters:
    return read_hyperparameters(find_family(keys), keys)


def metadata(keys: Config) -> dict[str, object]:
    family = find_family(keys)
    return {key: value.data for key, value in hyperparameter_metadata(family, read_hyperparameters(family, keys)).items()}


# --- names ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("blk.0.attn_q.weight", Role("attn_q", 0)),
        ("blk.11.ffn_down_exps.weight", Role("ffn_down_exps", 11)),
        ("blk.3.attn_q.bias", Role("attn_q.bias", 3)),
        ("blk.3.attn_q_norm.weight", Role("attn_q_norm", 3)),
        ("output.weight", Role("output", None)),
        ("rope_freqs.weight", Role("rope_freqs", None)),
        ("blk.x.attn_q.weight", Role("blk.x.attn_q", None)),
    ],
)
def test_role_of_a_name(name: str, role: Role) -> None:
    """A bias taken for its weight would be given the weight's type."""
    assert tensor_role(name) == role


def test_order_is_by_layer_then_bytes() -> None:
    """Sorting as text puts blk.10 before blk.2, and every offset then differs from llama-quantize's file."""
    names = [
        "blk.10.attn_k.weight",
        "blk.2.ffn_up.weight",
        "token_embd.weight",
        "blk.2.attn_k.weight",
        "output.weight",
        "blk.0.ffn_norm.weight",
        "rope_freqs.weight",
    ]
    assert sorted(names, key=tensor_order) == [
        "output.weight",
        "rope_freqs.weight",
        "token_embd.weight",
        "blk.0.ffn_norm.weight",
        "blk.2.attn_k.weight",
        "blk.2.ffn_up.weight",
        "blk.10.attn_k.weight",
    ]


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("blk.3.attn_q.weight", "blk.3.attn_norm"),
        ("blk.3.attn_v.weight", "blk.3.attn_norm"),
        ("blk.3.ffn_up.weight", "blk.3.ffn_norm"),
        ("blk.3.ffn_gate_exps.weight", "blk.3.ffn_norm"),
        ("blk.3.attn_output.weight", "blk.3.attn_output"),
        ("blk.3.ffn_down_exps.weight", "blk.3.ffn_down_exps"),
        ("output.weight", "output_norm"),
        ("blk.3.attn_q.bias", None),
        ("blk.3.attn_norm.weight", None),
        ("token_embd.weight", None),
        ("rope_freqs.weight", None),
    ],
)
def test_input_group(name: str, group: str | None) -> None:
    """Tensors of different inputs in one group would be folded or compensated by each other's statistics."""
    assert input_group(name) == group


def test_tables_are_consistent() -> None:
    """A class in two families, a doubled name, or a linear without a group would be found only in use."""
    classes = [name for family in FAMILIES for name in family.classes]
    assert len(set(classes)) == len(classes)
    for family in FAMILIES:
        for names in ([w.gguf for w in family.weights], [w.hf for w in family.weights]):
            assert len(set(names)) == len(names)
        matrices = [w.gguf.format(layer=0) for w in family.weights if len(w.shape) == 2 and "token_embd" not in w.gguf]
        assert all(input_group(name) for name in matrices)
        norms = {tensor_role(w.gguf.format(layer=0)).kind for w in family.weights}
        assert norms >= set(NORM_FEEDS)
        permuted = {w.gguf.split(".", 2)[2].split(".")[0] for w in family.weights if w.permuted}
        assert permuted == ({"attn_q", "attn_k"} if family.arch == "llama" else set())


# --- rope ----------------------------------------------------------------------------------------------------------------


@given(n_head=st.integers(1, 5), half=st.integers(1, 6), data=st.data())
def test_permutation_equals_reshape_and_swap(n_head: int, half: int, data: st.DataObject) -> None:
    """A wrong order of q or k rows gives a model that loads and writes nonsense."""
    n_rows = n_head * 2 * half
    start = data.draw(st.integers(0, n_rows))
    stop = data.draw(st.integers(start, n_rows))
    rows = np.arange(n_rows)
    naive = rows.reshape(n_head, 2, half).swapaxes(1, 2).reshape(n_rows)
    assert np.array_equal(rope_source_rows(start, stop, 2 * half), naive[start:stop])


def _factor(pair: int, theta: float, head_dim: int, factor: float, low: float, high: float, n_ctx: int) -> float:
    """Llama 3.1's rule for one rotated pair, in double precision."""
    wavelength = 2 * math.pi * theta ** (2 * pair / head_dim)
    if wavelength < n_ctx / high:
        return 1.0
    if wavelength > n_ctx / low:
        return factor
    smooth = (n_ctx / wavelength - low) / (high - low)
    return 1 / ((1 - smooth) / factor + smooth)


def test_rope_factors_of_llama3() -> None:
    """Factors swapped between long and short wavelengths damage only long contexts, so no short test run shows it."""
    factors = rope_factors(read(config(head_dim=128, rope_scaling=LLAMA3 | {"rope_type": "llama3"})))
    assert factors is not None and factors.dtype == np.float32 and factors.shape == (64,)
    naive = [_factor(pair, 500000.0, 128, 8.0, 1.0, 4.0, 8192) for pair in range(64)]
    assert np.allclose(factors, naive, rtol=2e-5)
    assert factors[0] == 1.0 and factors[-1] == 8.0 and 1.0 < factors[32] < 8.0


def test_rope_factors_without_a_band_between() -> None:
    """Equal frequency factors leave nothing to interpolate; a division by zero must not reach the file."""
    factors = rope_factors(read(config(head_dim=64, rope_scaling=LLAMA3 | {"rope_type": "llama3", "high_freq_factor": 1.0})))
    assert factors is not None and set(factors.tolist()) == {1.0, 8.0}
    assert rope_factors(read(config())) is None


# --- config.json ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scaling", "type_key"),
    [
        (None, "rope_type"),
        ({"factor": 4.0, "type": "linear"}, "type"),
        ({"factor": 4.0, "type": "yarn", "original_max_position_embeddings": 32768, "beta_fast": 16}, "type"),
        (LLAMA3 | {"rope_type": "llama3"}, "rope_type"),
    ],
)
def test_both_spellings_are_the_same_model(scaling: dict[str, object] | None, type_key: str) -> None:
    """Published configs have rope_theta and rope_scaling, those saved by transformers 5 rope_parameters."""
    old = config(rope_scaling=scaling)
    parameters = {key: value for key, value in (scaling or {}).items() if key != type_key}
    parameters |= {"rope_theta": 500000.0, "rope_type": scaling[type_key] if scaling else "default"}
    new = config(rope_theta=..., rope_scaling=..., torch_dtype=..., dtype="bfloat16", rope_parameters=parameters)
    assert read(old) == read(new)
    assert metadata(old) == metadata(new)


def test_metadata_of_llama() -> None:
    """A key of another name or type is ignored by llama.cpp, or refused when the file is loaded."""
    family = find_family(config())
    values = hyperparameter_metadata(family, read(config()))
    assert {key: value.data for key, value in values.items()} == {
        "llama.block_count": 2,
        "llama.context_length": 131072,
        "llama.embedding_length": 64,
        "llama.feed_forward_length": 96,
        "llama.attention.head_count": 4,
        "llama.attention.head_count_kv": 2,
        "llama.rope.freq_base": 500000.0,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.attention.key_length": 16,
        "llama.attention.value_length": 16,
        "llama.vocab_size": 40,
        "llama.rope.dimension_count": 16,
    }
    floats = {"llama.rope.freq_base", "llama.attention.layer_norm_rms_epsilon"}
    assert all(value.type is (ValueType.FLOAT32 if key in floats else ValueType.UINT32) for key, value in values.items())


def test_metadata_of_qwen() -> None:
    """Qwen2 gets a head dimension only when its config has one, Qwen3 always; neither gets vocab_size."""
    qwen2 = config(architectures=["Qwen2ForCausalLM"])
    assert not {"qwen2.attention.key_length", "qwen2.vocab_size", "qwen2.rope.dimension_count"} & metadata(qwen2).keys()
    assert metadata(qwen2 | {"head_dim": 32})["qwen2.attention.key_length"] == 32
    qwen3 = metadata(config(architectures=["Qwen3ForCausalLM"], head_dim=32))
    assert qwen3["qwen3.attention.value_length"] == 32 and "qwen3.vocab_size" not in qwen3


def test_metadata_of_yarn() -> None:
    """A yarn key that is lost changes every long context silently."""
    scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768, "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2}
    found = metadata(config(architectures=["Qwen2ForCausalLM"], rope_scaling=scaling))
    assert {key.removeprefix("qwen2.rope.scaling."): value for key, value in found.items() if ".scaling." in key} == {
        "type": "yarn",
        "factor": 4.0,
        "original_context_length": 32768,
        "yarn_attn_factor": 1.5,
        "yarn_beta_fast": 16.0,
        "yarn_beta_slow": 2.0,
    }


def test_early_llama_lacks_keys() -> None:
    """Llama 2's first configs have no rope_theta, head_dim or num_key_value_heads; they must still convert."""
    p = read(config(rope_theta=..., num_key_value_heads=..., rope_scaling=...))
    assert (p.rope.theta, p.n_head_kv, p.head_dim) == (10000.0, 4, 16)
    with pytest.raises(InputError, match=r"num_key_value_heads is missing in config\.json"):
        read(config(architectures=["MistralForCausalLM"], num_key_value_heads=...))  # transformers would take 8


REQUIRED = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings", "vocab_size", "rms_norm_eps"]


@pytest.mark.parametrize("key", [*REQUIRED, "architectures"])
def test_missing_key_is_named(key: str) -> None:
    """A raw KeyError tells a user nothing; null counts as missing."""
    for absent in (..., None):
        with pytest.raises(InputError, match=rf"^{key} is missing in config\.json"):
            read(config(**{key: absent}))


@pytest.mark.parametrize(("key", "wrong"), list(itertools.product(REQUIRED, ["64", True, -1, 0, [], float("inf"), 10**40])))
def test_wrong_type_is_its_own_error(key: str, wrong: object) -> None:
    """A number as text, or a hostile size, must not reach an allocation or a file."""
    with pytest.raises(InputError, match=rf"^{key} in config\.json: got .*, expected"):
        read(config(**{key: wrong}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GrokForCausalLM"]}, r"unknown architecture.*'GrokForCausalLM', expected one of .*LlamaForCausalLM.*Qwen3ForCausalLM"),
        ({"architectures": []}, r"architectures in config\.json: got \[\]"),
        ({"architectures": "LlamaForCausalLM"}, r"architectures in config\.json: got 'Llama"),
        ({"architectures": [None]}, r"architectures in config\.json"),
        ({"text_config": {}}, r"text_config.*multimodal"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"quantization_config.*gptq"),
        ({"quantization_config": {"quant_algo": "NVFP4"}}, r"quantization_config.*NVFP4"),
        ({"quantization_config": []}, r"quantization_config in config\.json: got \[\]"),
        ({"hidden_act": "gelu"}, r"hidden_act.*'gelu', expected 'silu'"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor"),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 4}}, r"rope_scaling\.rope_type.*'longrope', expected"),
        ({"rope_scaling": {"type": 7}}, r"rope_scaling\.type.*got 7"),
        ({"rope_scaling": {"type": "linear"}}, r"rope_scaling\.factor is missing"),
        ({"rope_scaling": {"type": "linear", "factor": "4"}}, r"rope_scaling\.factor in config\.json: got '4'"),
        ({"rope_scaling": [1]}, r"rope_scaling in config\.json: got \[1\]"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1.0}}}, r"rope_parameters\.full_attention.*one rope"),
        ({"architectures": ["Qwen2ForCausalLM"], "rope_scaling": LLAMA3 | {"rope_type": "llama3"}}, r"'llama3', expected .*qwen2"),
        ({"architectures": ["Qwen2ForCausalLM"], "rope_theta": ...}, r"rope_theta is missing"),
        ({"architectures": ["Qwen3ForCausalLM"]}, r"head_dim is missing"),
        ({"num_key_value_heads": 3}, r"num_key_value_heads in config\.json: got 3, expected a divisor of num_attention_heads 4"),
        ({"hidden_size": 66}, r"num_attention_heads.*divisor of hidden_size 66"),
        ({"head_dim": 15}, r"head dimension.*got 15, expected an even number"),
        ({"is_causal": 1}, r"is_causal in config\.json: got 1, expected true or false"),
        ({"rope_scaling": LLAMA3 | {"rope_type": "llama3", "factor": 1e-45}}, r"rope_scaling\.factor in config\.json: got 1e-45, expected a number from 1e-15"),
        ({"rope_theta": 1e30}, r"rope_theta in config\.json: got 1e\+30"),
        ({"quantization_config": {"quant_method": "a\nb\x1b"}}, r"got weights quantized with a\\nb\\x1b, expected"),
    ],
)
def test_what_cannot_be_followed_is_refused(changes: dict[str, object], message: str) -> None:
    """llama.cpp's converter lets most of these pass, and the model then computes something else."""
    with pytest.raises(InputError, match=message):
        read(config(**changes))


def test_limitations_are_said() -> None:
    """Attention windows and dynamic ropes are lost in llama.cpp; nobody would know without a line."""
    assert find_limitations(config(), read(config())) == ()
    mistral = config(architectures=["MistralForCausalLM"], sliding_window=4096)
    assert "sliding_window 4096" in find_limitations(mistral, read(mistral))[0]
    unused = config(architectures=["Qwen2ForCausalLM"], sliding_window=4096, use_sliding_window=False)
    assert find_limitations(unused, read(unused)) == ()
    dynamic = config(rope_scaling={"type": "dynamic", "factor": 2.0})
    assert "dynamic" in find_limitations(dynamic, read(dynamic))[0]


# --- weights -------------------------------------------------------------------------------------------------------------


def weights(keys: Config) -> dict[str, tuple[str, tuple[int, ...], bool]]:
    found = expected_weights(find_family(keys), read(keys), keys)
    return {w.hf: (w.gguf, w.shape, w.required) for w in found}


def test_weights_of_a_config() -> None:
    """A head dimension that is not hidden/heads, tied heads and biases each change what the checkpoint must have."""
    found = weights(config(head_dim=32, tie_word_embeddings=True, attention_bias=True))
    assert found["model.layers.1.self_attn.q_proj.weight"] == ("blk.1.attn_q.weight", (128, 64), True)
    assert found["model.layers.1.self_attn.k_proj.weight"] == ("blk.1.attn_k.weight", (64, 64), True)
    assert found["model.layers.0.self_attn.o_proj.weight"] == ("blk.0.attn_output.weight", (64, 128), True)
    assert found["model.layers.0.mlp.down_proj.weight"] == ("blk.0.ffn_down.weight", (64, 96), True)
    assert found["lm_head.weight"] == ("output.weight", (40, 64), False)
    assert found["model.layers.0.self_attn.k_proj.bias"] == ("blk.0.attn_k.bias", (64,), True)
    assert not found["model.layers.0.mlp.up_proj.bias"][2]
    assert weights(config())["lm_head.weight"][2]


def test_weights_of_qwen() -> None:
    """Qwen2 always has q, k and v biases and no other; Qwen3 has q and k norms instead."""
    qwen2 = weights(config(architectures=["Qwen2ForCausalLM"]))
    assert qwen2["model.layers.0.self_attn.q_proj.bias"] == ("blk.0.attn_q.bias", (64,), True)
    assert "model.layers.0.self_attn.o_proj.bias" not in qwen2
    qwen3 = weights(config(architectures=["Qwen3ForCausalLM"], head_dim=32))
    assert qwen3["model.layers.0.self_attn.k_norm.weight"] == ("blk.0.attn_k_norm.weight", (32,), True)
    assert not qwen3["model.layers.0.self_attn.q_proj.bias"][2]


def test_hostile_layer_count_costs_nothing() -> None:
    """Four billion layers must not be listed before the first missing tensor is found."""
    keys = config(num_hidden_layers=2**32 - 1)
    assert next(iter(expected_weights(find_family(keys), read(keys), keys))).gguf == "token_embd.weight"
