"""Model families as tables: classes, tensor names and shapes, rope permutation, hyper-parameters, who shares an input.

Everything that differs between families is a field of `Family`; no code elsewhere asks which architecture it has.
Knows config.json's keys in both spellings (transformers 4's `rope_theta`, `rope_scaling`; transformers 5's
`rope_parameters`) and GGUF's names; reads no files. Weights' own types come from the weights, so `torch_dtype` and
`dtype` are not read: published ones are often wrong. What llama.cpp would silently compute otherwise than the
checkpoint (an activation that is not SiLU, an unknown rope scaling) is refused here.
Sources: llama.cpp's conversion/base.py, llama.py, qwen.py (keys and names), src/models/*.cpp (what the runtime loads).
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from loopgguf.container import Shape, Value, boolean, float32, string, uint32
from loopgguf.errors import InputError

Config = Mapping[str, object]
Condition = tuple[str, bool]  # a config key and the value it must have; a missing key counts as false

# --- names of GGUF tensors ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Role:
    """What a tensor does: `kind` is its name without layer and `.weight` (`attn_q`, `ffn_down_exps`, `attn_q.bias`)."""

    kind: str
    layer: int | None


_LAYER_NAME = re.compile(r"blk\.(\d+)\.(.+)", re.DOTALL)


def tensor_role(name: str) -> Role:
    """Return the role of a GGUF tensor name: `blk.3.attn_q.weight` → Role('attn_q', 3), `output.weight` → Role('output', None)."""
    match = _LAYER_NAME.fullmatch(name)
    layer, rest = (int(match[1]), match[2]) if match else (None, name)
    return Role(rest.removesuffix(".weight"), layer)


def tensor_order(name: str) -> tuple[int, bytes]:
    """Return the key that sorts tensors as llama-quantize writes them: those of no layer first, then by layer, then by
    the name's bytes (src/llama-model-loader.h, `weight_name_comparer`)."""
    match = re.match(r"blk\.\s*([+-]?\d+)", name)
    return int(match[1]) if match else -1, name.encode()


# Which norm's output each linear reads, the same for every llama.cpp decoder in these tables: one importance, one Gram
# matrix and one fold per norm. `ffn_gate_inp` is the router of a mixture of experts.
NORM_FEEDS: Mapping[str, tuple[str, ...]] = {
    "attn_norm": ("attn_q", "attn_k", "attn_v", "attn_qkv"),
    "ffn_norm": ("ffn_gate", "ffn_up", "ffn_gate_inp", "ffn_gate_exps", "ffn_up_exps", "ffn_gate_shexp", "ffn_up_shexp"),
    "output_norm": ("output",),
}
_NORM_OF = {linear: norm for norm, linears in NORM_FEEDS.items() for linear in linears}
_OWN_INPUT = frozenset({"attn_output", "ffn_down", "ffn_down_exps", "ffn_down_shexp"})


def input_group(name: str) -> str | None:
    """Return the name of the input that a weight reads; tensors with equal names share their input, hence their statistics.

    `blk.3.attn_q.weight`, `…attn_k.weight` → `blk.3.attn_norm` (the norm that feeds them); `blk.3.ffn_down.weight` →
    `blk.3.ffn_down` (alone). None for what multiplies no activations: norms, biases, embeddings, unknown names.
    """
    role = tensor_role(name)
    if not name.endswith(".weight"):
        return None
    group = _NORM_OF.get(role.kind, role.kind if role.kind in _OWN_INPUT else None)
    return group if group is None or role.layer is None else f"blk.{role.layer}.{group}"


# --- the families --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Weight:
    """One weight of a family, `{layer}` standing for the layer's number.

    shape: names of dimensions (see `Hyperparameters.dimensions`), row-major. permuted: the rows are reordered inside each
    head for llama.cpp's rope (`rope_source_rows`). when: the condition under which the checkpoint must have it;
    otherwise it may. None: it always must.
    """

    hf: str
    gguf: str
    shape: tuple[str, ...]
    permuted: bool = False
    when: Condition | None = None


@dataclass(frozen=True)
class Family:
    """What one or more Hugging Face classes share, under the name llama.cpp has for it.

    optional_keys: config keys that may be missing; `Hyperparameters` says what that means. writes_head_dim: the head
    dimension is written even when config.json does not name it. writes_vocab_size: so are `vocab_size` and
    `rope.dimension_count`. has_rope_freqs: the runtime reads Llama 3's rope factors from a tensor.
    """

    arch: str
    classes: tuple[str, ...]
    weights: tuple[Weight, ...]
    optional_keys: frozenset[str]
    writes_head_dim: bool
    writes_vocab_size: bool
    has_rope_freqs: bool


def _weight(hf: str, gguf: str, *shape: str, permuted: bool = False, when: Condition | None = None) -> Weight:
    """Return the row of a weight or bias inside a layer; both names end alike."""
    return Weight(f"model.layers.{{layer}}.{hf}", f"blk.{{layer}}.{gguf}", shape, permuted, when)


_IF_ATTENTION_BIAS: Condition = ("attention_bias", True)
_IF_MLP_BIAS: Condition = ("mlp_bias", True)

_OUTSIDE_LAYERS = (
    Weight("model.embed_tokens.weight", "token_embd.weight", ("n_vocab", "n_embd")),
    Weight("model.norm.weight", "output_norm.weight", ("n_embd",)),
    Weight("lm_head.weight", "output.weight", ("n_vocab", "n_embd"), when=("tie_word_embeddings", False)),
)
_NORMS = (
    _weight("input_layernorm.weight", "attn_norm.weight", "n_embd"),
    _weight("post_attention_layernorm.weight", "ffn_norm.weight", "n_embd"),
)
_HEAD_NORMS = (
    _weight("self_attn.q_norm.weight", "attn_q_norm.weight", "head_dim"),
    _weight("self_attn.k_norm.weight", "attn_k_norm.weight", "head_dim"),
)
_VALUE_AND_OUTPUT = (
    _weight("self_attn.v_proj.weight", "attn_v.weight", "n_kv", "n_embd"),
    _weight("self_attn.o_proj.weight", "attn_output.weight", "n_embd", "n_q"),
)
# llama.cpp rotates neighbouring pairs for arch llama (rope type NORM), Hugging Face halves of a head: rows are reordered
_PERMUTED_QUERY_KEY = (
    _weight("self_attn.q_proj.weight", "attn_q.weight", "n_q", "n_embd", permuted=True),
    _weight("self_attn.k_proj.weight", "attn_k.weight", "n_kv", "n_embd", permuted=True),
)
_QUERY_KEY = (
    _weight("self_attn.q_proj.weight", "attn_q.weight", "n_q", "n_embd"),
    _weight("self_attn.k_proj.weight", "attn_k.weight", "n_kv", "n_embd"),
)
_FEED_FORWARD = (
    _weight("mlp.gate_proj.weight", "ffn_gate.weight", "n_ff", "n_embd"),
    _weight("mlp.up_proj.weight", "ffn_up.weight", "n_ff", "n_embd"),
    _weight("mlp.down_proj.weight", "ffn_down.weight", "n_embd", "n_ff"),
)
_LLAMA_BIASES = (
    _weight("self_attn.q_proj.bias", "attn_q.bias", "n_q", permuted=True, when=_IF_ATTENTION_BIAS),
    _weight("self_attn.k_proj.bias", "attn_k.bias", "n_kv", permuted=True, when=_IF_ATTENTION_BIAS),
    _weight("self_attn.v_proj.bias", "attn_v.bias", "n_kv", when=_IF_ATTENTION_BIAS),
    _weight("self_attn.o_proj.bias", "attn_output.bias", "n_embd", when=_IF_ATTENTION_BIAS),
    _weight("mlp.gate_proj.bias", "ffn_gate.bias", "n_ff", when=_IF_MLP_BIAS),
    _weight("mlp.up_proj.bias", "ffn_up.bias", "n_ff", when=_IF_MLP_BIAS),
    _weight("mlp.down_proj.bias", "ffn_down.bias", "n_embd", when=_IF_MLP_BIAS),
)


def _query_key_value_biases(when: Condition | None) -> tuple[Weight, ...]:
    return (
        _weight("self_attn.q_proj.bias", "attn_q.bias", "n_q", when=when),
        _weight("self_attn.k_proj.bias", "attn_k.bias", "n_kv", when=when),
        _weight("self_attn.v_proj.bias", "attn_v.bias", "n_kv", when=when),
    )


_LLAMA = Family(
    arch="llama",
    classes=("LlamaForCausalLM", "LLaMAForCausalLM"),
    weights=(*_OUTSIDE_LAYERS, *_NORMS, *_PERMUTED_QUERY_KEY, *_VALUE_AND_OUTPUT, *_FEED_FORWARD, *_LLAMA_BIASES),
    optional_keys=frozenset({"head_dim", "num_key_value_heads", "rope_theta"}),
    writes_head_dim=True,
    writes_vocab_size=True,
    has_rope_freqs=True,
)
_MISTRAL = replace(_LLAMA, classes=("MistralForCausalLM",), optional_keys=frozenset({"head_dim", "rope_theta"}))
_QWEN2 = Family(
    arch="qwen2",
    classes=("Qwen2ForCausalLM",),
    weights=(*_OUTSIDE_LAYERS, *_NORMS, *_QUERY_KEY, *_VALUE_AND_OUTPUT, *_FEED_FORWARD, *_query_key_value_biases(None)),
    optional_keys=frozenset({"head_dim"}),
    writes_head_dim=False,
    writes_vocab_size=False,
    has_rope_freqs=False,
)
_QWEN3 = replace(
    _QWEN2,
    arch="qwen3",
    classes=("Qwen3ForCausalLM",),
    weights=(*_OUTSIDE_LAYERS, *_NORMS, *_HEAD_NORMS, *_QUERY_KEY, *_VALUE_AND_OUTPUT, *_FEED_FORWARD, *_query_key_value_biases(_IF_ATTENTION_BIAS)),
    optional_keys=frozenset(),
)
FAMILIES = (_LLAMA, _MISTRAL, _QWEN2, _QWEN3)

# buffers of old checkpoints that no runtime needs (conversion/base.py, `prepare_tensors`)
SKIPPED_SUFFIXES = (".attention.masked_bias", ".attention.bias", ".rotary_emb.inv_freq")


# --- reading config.json -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Keys:
    """Typed access to config.json or a section of it; `null` counts as missing, a wrong type is its own error."""

    values: Config
    prefix: str = ""

    def refuse(self, key: str, expected: str) -> NoReturn:
        raise InputError(f"{self.prefix}{key} in config.json: got {self.values.get(key)!r:.80}, expected {expected}. Check the file or download it again")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def require(self, key: str) -> object:
        if not self.has(key):
            raise InputError(f"{self.prefix}{key} is missing in config.json: got no such key, expected one for this architecture. Download the file again")
        return self.values[key]

    def integer(self, key: str) -> int:
        """Return a required integer from 1 to 2³²−1."""
        value = self.require(key)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**32:
            self.refuse(key, "an integer from 1 to 4294967295")
        return value

    def number(self, key: str) -> float:
        """Return a required number above 0, of a size with which float32 can still reckon."""
        value = self.require(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 1e-15 <= value <= 1e15:
            self.refuse(key, "a number from 1e-15 to 1e15")
        return float(value)

    def flag(self, key: str) -> bool:
        """Return a boolean; a missing one is false."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, bool):
            self.refuse(key, "true or false")
        return bool(value)

    def section(self, key: str) -> _Keys:
        """Return the object under `key`; a missing one is empty."""
        value = self.values.get(key)
        if value is not None and not isinstance(value, dict):
            self.refuse(key, "an object or null")
        return _Keys(value or {}, f"{key}.")


# what tells schemes of one name apart
_SCHEME_DETAILS = ("bits", "w_bit", "weight_block_size", "bnb_4bit_quant_type", "load_in_8bit")
# tensors beside or in place of `….weight`, by the end of their names
_QUANTIZED_SUFFIXES = {
    ".g_idx": "GPTQ",
    ".qzeros": "AWQ or GPTQ",
    ".qweight": "AWQ or GPTQ",
    ".weight_scale_inv": "FP8 in blocks",
    ".weight_packed": "compressed-tensors",
    ".weight_scale": "FP8 or compressed-tensors",
    "_proj_blocks": "MXFP4",
    ".weight.absmax": "bitsandbytes, 4 bits",
    ".SCB": "bitsandbytes, 8 bits",
}


def find_family(config: Config) -> Family:
    """Return the family that config.json's `architectures` names.

    Raises InputError when it names none or one that is not known (listing those that are), when the model is multimodal
    (`text_config`), and when its weights are already quantized (naming the scheme).
    """
    keys = _Keys(config)
    known = {name: family for family in FAMILIES for name in family.classes}
    expected = f"one of {', '.join(sorted(known))}"
    classes = keys.require("architectures")
    if not isinstance(classes, list) or not classes or not isinstance(classes[0], str):
        keys.refuse("architectures", f"a list of class names, {expected}")
    if keys.has("text_config"):
        raise InputError(f"text_config in config.json: got a multimodal model ({classes[0]!r:.80}), expected a text model. Save its language model on its own")
    _refuse_quantized(keys)
    family = known.get(classes[0])
    if family is None:
        raise InputError(f"unknown architecture in config.json: got {classes[0]!r:.80}, expected {expected}. Convert it with llama.cpp and give the GGUF")
    return family


def _refuse_quantized(keys: _Keys) -> None:
    if not keys.has("quantization_config"):
        return
    section = keys.section("quantization_config")
    scheme = next((section.values[key] for key in ("quant_method", "quant_algo", "format") if section.has(key)), "an unnamed scheme")
    details = ", ".join(f"{key} {section.values[key]!s:.40}" for key in _SCHEME_DETAILS if section.has(key))
    raise InputError(
        f"quantization_config in config.json: got weights quantized with {scheme!s:.40}{f' ({details})' if details else ''}, expected F32, F16 or BF16. "
        "Give the original checkpoint instead"
    )


def refuse_quantized_tensors(names: Iterable[str], where: object) -> None:
    """Raise InputError naming the scheme when tensors are there that only quantized checkpoints have, whatever config.json says."""
    for name in names:
        scheme = next((scheme for suffix, scheme in _QUANTIZED_SUFFIXES.items() if name.endswith(suffix)), None)
        if scheme is not None:
            raise InputError(
                f"tensor {name!r:.120} in {where}: got weights quantized with {scheme}, expected F32, F16 or BF16. Give the original checkpoint instead"
            )


@dataclass(frozen=True)
class Rope:
    """How positions are rotated. `type`: default, linear, yarn, llama3 or dynamic; `settings`: its numbers as config.json names them."""

    theta: float
    type: str
    settings: Mapping[str, float]


# per rope type: the numbers it needs, and those it may have
_ROPE_TYPES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "default": ((), ()),
    "dynamic": ((), ()),  # llama.cpp has no such thing; equal up to the trained context
    "linear": (("factor",), ()),
    "yarn": (("factor",), ("extrapolation_factor", "attention_factor", "attn_factor", "beta_fast", "beta_slow")),
    "llama3": (("factor", "low_freq_factor", "high_freq_factor"), ()),
}
_ROPE_TYPES_WITH_ORIGINAL_CONTEXT = frozenset({"yarn", "llama3"})


def _rope_type(rope: _Keys, family: Family) -> str:
    known = sorted(t for t in _ROPE_TYPES if t != "llama3" or family.has_rope_freqs)
    key = "rope_type" if rope.has("rope_type") else "type"
    rope_type = rope.values[key] if rope.has(key) else "default"
    if not isinstance(rope_type, str) or rope_type not in known:
        rope.refuse(key, f"a rope scaling that llama.cpp has for {family.arch}, one of {', '.join(known)}")
    return rope_type


def _read_rope(keys: _Keys, family: Family, n_ctx: int) -> Rope:
    rope = keys.section("rope_parameters" if keys.has("rope_parameters") else "rope_scaling")
    nested = [key for key in ("full_attention", "sliding_attention") if rope.has(key)]
    if nested:
        rope.refuse(nested[0], "one rope for all layers")
    for place in (keys, rope):
        if place.has("partial_rotary_factor") and place.number("partial_rotary_factor") != 1.0:
            place.refuse("partial_rotary_factor", f"1.0, whole heads rotated, as llama.cpp does for {family.arch}")
    place = rope if rope.has("rope_theta") else keys
    theta = 10000.0 if not place.has("rope_theta") and "rope_theta" in family.optional_keys else place.number("rope_theta")
    rope_type = _rope_type(rope, family)
    needed, allowed = _ROPE_TYPES[rope_type]
    settings = {key: rope.number(key) for key in (*needed, *(key for key in allowed if rope.has(key)))}
    if rope_type in _ROPE_TYPES_WITH_ORIGINAL_CONTEXT:
        place = keys if keys.has("original_max_position_embeddings") else rope
        settings["original_max_position_embeddings"] = (
            place.integer("original_max_position_embeddings") if place.has("original_max_position_embeddings") else n_ctx
        )
    return Rope(theta, rope_type, settings)


@dataclass(frozen=True)
class Hyperparameters:
    """The numbers of config.json. Where the family allows a key to be missing: `n_head_kv` is then n_head, `head_dim` is
    n_embd / n_head, and `rope.theta` 10000, as transformers has it. writes_head_dim: GGUF gets the head dimension."""

    n_layer: int
    n_ctx: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    head_dim: int
    n_vocab: int
    rms_epsilon: float
    rope: Rope
    is_causal: bool
    writes_head_dim: bool

    @property
    def dimensions(self) -> dict[str, int]:
        """The sizes by the names that `Weight.shape` uses."""
        return {
            "n_vocab": self.n_vocab,
            "n_embd": self.n_embd,
            "n_ff": self.n_ff,
            "n_q": self.n_head * self.head_dim,
            "n_kv": self.n_head_kv * self.head_dim,
            "head_dim": self.head_dim,
        }


def _read_head_dim(keys: _Keys, family: Family, n_embd: int, n_head: int) -> int:
    if keys.has("head_dim") or "head_dim" not in family.optional_keys:
        head_dim = keys.integer("head_dim")
    elif n_embd % n_head:
        keys.refuse("num_attention_heads", f"a divisor of hidden_size {n_embd}, for there is no head_dim")
    else:
        head_dim = n_embd // n_head
    if head_dim % 2:
        raise InputError(f"head dimension in config.json: got {head_dim}, expected an even number, for rope rotates pairs. Check head_dim and hidden_size")
    return head_dim


def read_hyperparameters(family: Family, config: Config) -> Hyperparameters:
    """Return the numbers of config.json that the family needs.

    Raises InputError naming the key that is missing, of a wrong type, or of a value that llama.cpp cannot follow.
    """
    keys = _Keys(config)
    n_embd, n_head, n_ctx = keys.integer("hidden_size"), keys.integer("num_attention_heads"), keys.integer("max_position_embeddings")
    copies_heads = not keys.has("num_key_value_heads") and "num_key_value_heads" in family.optional_keys
    n_head_kv = n_head if copies_heads else keys.integer("num_key_value_heads")
    if n_head % n_head_kv:
        keys.refuse("num_key_value_heads", f"a divisor of num_attention_heads {n_head}")
    if keys.has("hidden_act") and config["hidden_act"] not in ("silu", "swish"):
        keys.refuse("hidden_act", f"'silu', the one that llama.cpp computes for {family.arch}")
    return Hyperparameters(
        n_layer=keys.integer("num_hidden_layers"),
        n_ctx=n_ctx,
        n_embd=n_embd,
        n_ff=keys.integer("intermediate_size"),
        n_head=n_head,
        n_head_kv=n_head_kv,
        head_dim=_read_head_dim(keys, family, n_embd, n_head),
        n_vocab=keys.integer("vocab_size"),
        rms_epsilon=keys.number("rms_norm_eps"),
        rope=_read_rope(keys, family, n_ctx),
        is_causal=not keys.has("is_causal") or keys.flag("is_causal"),
        writes_head_dim=family.writes_head_dim or keys.has("head_dim"),
    )


def find_limitations(config: Config, hyperparameters: Hyperparameters) -> tuple[str, ...]:
    """Return one line for each thing that llama.cpp will run otherwise than the checkpoint was trained."""
    notes = []
    window = config.get("sliding_window")
    if isinstance(window, int) and window < hyperparameters.n_ctx and config.get("use_sliding_window", True):
        notes.append(f"config.json has sliding_window {window}; llama.cpp attends to all of the context: texts longer than that come out differently")
    if hyperparameters.rope.type == "dynamic":
        notes.append("config.json has dynamic rope scaling, which llama.cpp lacks: texts longer than the trained context come out differently")
    return tuple(notes)


# --- what a GGUF gets from it --------------------------------------------------------------------------------------------

_YARN_KEYS = {
    "extrapolation_factor": "yarn_ext_factor",
    "attn_factor": "yarn_attn_factor",
    "attention_factor": "yarn_attn_factor",  # wins when both are there
    "beta_fast": "yarn_beta_fast",
    "beta_slow": "yarn_beta_slow",
}


def _rope_metadata(rope: Rope) -> dict[str, Value]:
    keys: dict[str, Value] = {}
    if rope.type in ("linear", "yarn"):
        keys = {"scaling.type": string(rope.type), "scaling.factor": float32(rope.settings["factor"])}
    if rope.type == "yarn":
        keys["scaling.original_context_length"] = uint32(int(rope.settings["original_max_position_embeddings"]))
        keys |= {f"scaling.{gguf}": float32(rope.settings[hf]) for hf, gguf in _YARN_KEYS.items() if hf in rope.settings}
    return {f"rope.{key}": value for key, value in keys.items()} | {"rope.freq_base": float32(rope.theta)}


def hyperparameter_metadata(family: Family, hyperparameters: Hyperparameters) -> dict[str, Value]:
    """Return the `{arch}.*` keys of the model, in the order and with the types of llama.cpp's converter."""
    p = hyperparameters
    keys = {
        "block_count": uint32(p.n_layer),
        "context_length": uint32(p.n_ctx),
        "embedding_length": uint32(p.n_embd),
        "feed_forward_length": uint32(p.n_ff),
        "attention.head_count": uint32(p.n_head),
        "attention.head_count_kv": uint32(p.n_head_kv),
    }
    if not p.is_causal:
        keys["attention.causal"] = boolean(False)
    keys |= _rope_metadata(p.rope)
    keys["attention.layer_norm_rms_epsilon"] = float32(p.rms_epsilon)
    if p.writes_head_dim:
        keys |= {"attention.key_length": uint32(p.head_dim), "attention.value_length": uint32(p.head_dim)}
    if family.writes_vocab_size:
        keys |= {"vocab_size": uint32(p.n_vocab), "rope.dimension_count": uint32(p.head_dim)}
    return {f"{family.arch}.{key}": value for key, value in keys.items()}


@dataclass(frozen=True)
class ExpectedWeight:
    """A weight that this model's checkpoint must have, or may have if not `required`; `permuted`: see `Weight`."""

    hf: str
    gguf: str
    shape: Shape
    permuted: bool
    required: bool


def expected_weights(family: Family, hyperparameters: Hyperparameters, config: Config) -> Iterator[ExpectedWeight]:
    """Yield every weight that a checkpoint of this config may have, lazily: a hostile layer count costs nothing."""
    keys, sizes = _Keys(config), hyperparameters.dimensions
    rows = [(w, tuple(sizes[d] for d in w.shape), w.when is None or keys.flag(w.when[0]) is w.when[1]) for w in family.weights]
    for w, shape, required in rows:
        if "{layer}" not in w.hf:
            yield ExpectedWeight(w.hf, w.gguf, shape, w.permuted, required)
    for layer in range(hyperparameters.n_layer):
        for w, shape, required in rows:
            if "{layer}" in w.hf:
                yield ExpectedWeight(w.hf.format(layer=layer), w.gguf.format(layer=layer), shape, w.permuted, required)


def rope_source_rows(start: int, stop: int, head_dim: int) -> NDArray[np.intp]:
    """Return which rows of a Hugging Face q or k projection are rows start…stop of the GGUF's.

    Row 2a + b of a head is the checkpoint's row b·head_dim/2 + a (conversion/llama.py, `permute`).
    """
    rows = np.arange(start, stop, dtype=np.intp)
    in_head = rows % head_dim
    return rows - in_head + in_head % 2 * (head_dim // 2) + in_head // 2


def rope_factors(hyperparameters: Hyperparameters) -> NDArray[np.float32] | None:
    """Return Llama 3's factors by which each rotated pair is slowed down, (head_dim / 2,) float32; None for other ropes.

    Written as tensor `rope_freqs.weight`; single precision, step by step as conversion/llama.py
    (`generate_extra_tensors`), so that the bytes agree.
    """
    rope = hyperparameters.rope
    if rope.type != "llama3":
        return None
    factor, low, high = (rope.settings[key] for key in ("factor", "low_freq_factor", "high_freq_factor"))
    n_ctx, head_dim = rope.settings["original_max_position_embeddings"], hyperparameters.head_dim
    one = np.float32(1)
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    frequencies = one / np.power(rope.theta, exponents.astype(np.float64)).astype(np.float32)
    wavelengths = one / frequencies * np.float32(2 * math.pi)  # two steps, as torch divides a number by a tensor
    with np.errstate(divide="ignore", invalid="ignore"):  # low == high: no wavelength lies between
        smooth = (one / wavelengths * np.float32(n_ctx) - np.float32(low)) / np.float32(high - low)
        between = one / ((one - smooth) / np.float32(factor) + smooth)
    slowed = np.where(wavelengths > np.float32(n_ctx / low), np.float32(factor), between)
    return np.where(wavelengths < np.float32(n_ctx / high), one, slowed).astype(np.float32)
