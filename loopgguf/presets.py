"""llama-quantize's presets: which ggml type each tensor gets under `Q4_K_M` and its kin, as tables of rules.

Reproduces the choice of llama-quant.cpp tensor by tensor, its running counters included, so that a plan made here and
a file made by llama-quantize agree. Knows names, shapes and a handful of hyper-parameters; does not look at rows that
do not divide into blocks (`formats.fallback_type`), at forced types or at overrides (`planner`). Sources: llama-quant.cpp
(`llama_ftype_get_default_type`, `tensor_allows_quantization`, `llama_tensor_get_type_impl`), quantize.cpp (names).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass
from enum import Enum, auto

from loopgguf.container import Metadata, Shape
from loopgguf.errors import InputError, UsageError
from loopgguf.formats import FLOAT_TYPES, IMATRIX_REQUIRED, IMATRIX_REQUIRED_BY_GGML, GgmlType, fits_row

T = GgmlType


@dataclass(frozen=True)
class Preset:
    """A preset of llama-quantize: its `llama_ftype` number (goes to `general.file_type`) and the type it starts from."""

    name: str
    file_type: int
    default: GgmlType

    @property
    def is_float(self) -> bool:
        return self.default in FLOAT_TYPES


PRESETS: dict[str, Preset] = {
    name: Preset(name, file_type, default)
    for name, file_type, default in (
        ("Q1_0", 40, T.Q1_0),
        ("Q2_0", 41, T.Q2_0),
        ("Q4_0", 2, T.Q4_0),
        ("Q4_1", 3, T.Q4_1),
        ("MXFP4_MOE", 38, T.MXFP4),
        ("Q5_0", 8, T.Q5_0),
        ("Q5_1", 9, T.Q5_1),
        ("IQ2_XXS", 19, T.IQ2_XXS),
        ("IQ2_XS", 20, T.IQ2_XS),
        ("IQ2_S", 28, T.IQ2_XS),
        ("IQ2_M", 29, T.IQ2_S),
        ("IQ1_S", 24, T.IQ1_S),
        ("IQ1_M", 31, T.IQ1_M),
        ("TQ1_0", 36, T.TQ1_0),
        ("TQ2_0", 37, T.TQ2_0),
        ("Q2_K", 10, T.Q2_K),
        ("Q2_K_S", 21, T.Q2_K),
        ("IQ3_XXS", 23, T.IQ3_XXS),
        ("IQ3_S", 26, T.IQ3_S),
        ("IQ3_M", 27, T.IQ3_S),
        ("IQ3_XS", 22, T.IQ3_S),
        ("Q3_K_S", 11, T.Q3_K),
        ("Q3_K_M", 12, T.Q3_K),
        ("Q3_K_L", 13, T.Q3_K),
        ("IQ4_NL", 25, T.IQ4_NL),
        ("IQ4_XS", 30, T.IQ4_XS),
        ("Q4_K_S", 14, T.Q4_K),
        ("Q4_K_M", 15, T.Q4_K),
        ("Q5_K_S", 16, T.Q5_K),
        ("Q5_K_M", 17, T.Q5_K),
        ("Q6_K", 18, T.Q6_K),
        ("Q8_0", 7, T.Q8_0),
        ("F16", 1, T.F16),
        ("BF16", 32, T.BF16),
        ("F32", 0, T.F32),
    )
}
ALIASES = {"Q3_K": "Q3_K_M", "Q4_K": "Q4_K_M", "Q5_K": "Q5_K_M"}


def find_preset(name: str) -> Preset:
    """Return the preset called `name` in any case, by alias or by llama_ftype number, as llama-quantize reads it.

    Raises UsageError listing the presets. NVFP4 has a number in llama.h but no type rule in llama.cpp, so it is none.
    """
    upper = name.strip().upper()
    if upper.isdecimal():
        upper = next((preset.name for preset in PRESETS.values() if preset.file_type == int(upper)), upper)
    preset = PRESETS.get(ALIASES.get(upper, upper))
    if preset is None:
        raise UsageError(f"unknown quantization preset: got {name!r}, expected one of {', '.join([*PRESETS, *ALIASES])}")
    return preset


# --- what the rules look at -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModelFacts:
    """The hyper-parameters that llama-quantize's rules depend on; heads are those of the first layer."""

    architecture: str
    n_layer: int
    n_head: int
    n_head_kv: int
    n_expert: int = 0

    @property
    def n_gqa(self) -> int:
        """How many query heads share one key/value head; 0 when the first layer has none."""
        return self.n_head // self.n_head_kv if self.n_head_kv else 0

    @property
    def is_70b(self) -> bool:
        """Whether llama.cpp calls the model 70B (src/models/*.cpp), which it does by the number of layers."""
        if self.architecture in ("llama", "llama-embed"):
            return self.n_layer == 80 and self.n_head != self.n_head_kv and self.n_expert != 8
        return self.n_layer == {"qwen2": 80, "deci": 80, "olmo": 80, "jais2": 68}.get(self.architecture)


def read_facts(metadata: Metadata) -> ModelFacts:
    """Return the facts from a model's metadata. Raises InputError naming the key that is missing or no integer."""
    architecture = metadata["general.architecture"].data if "general.architecture" in metadata else None
    if not isinstance(architecture, str):
        raise InputError(f"general.architecture: got {architecture!r}, expected a text. The file is no language model or is damaged")

    def integer(key: str, default: int | None = None) -> int:
        full = f"{architecture}.{key}"
        data = metadata[full].data if full in metadata else default
        first = data[0] if isinstance(data, list) and data else data
        if not isinstance(first, int) or first < 0:
            raise InputError(f"{full}: got {first!r}, expected an integer. Convert the model again")
        return first

    n_head = integer("attention.head_count", 0)
    return ModelFacts(architecture, integer("block_count"), n_head, integer("attention.head_count_kv", n_head), integer("expert_count", 0))


class _Category(Enum):
    TOKEN_EMBD = auto()
    ATTN_QKV = auto()
    ATTN_KV_B = auto()
    ATTN_V = auto()
    ATTN_K = auto()
    ATTN_Q = auto()
    ATTN_OUTPUT = auto()
    FFN_UP = auto()
    FFN_GATE = auto()
    FFN_DOWN = auto()
    OUTPUT = auto()
    OTHER = auto()


_EMBEDDINGS = ("token_embd.weight", "per_layer_token_embd.weight")
_BY_SUBSTRING = (  # the first that occurs in the name decides; ffn_* include the experts and the shared expert
    ("attn_qkv.weight", _Category.ATTN_QKV),
    ("attn_kv_b.weight", _Category.ATTN_KV_B),
    ("attn_v.weight", _Category.ATTN_V),
    ("attn_k.weight", _Category.ATTN_K),
    ("attn_q.weight", _Category.ATTN_Q),
    ("attn_output.weight", _Category.ATTN_OUTPUT),
    ("ffn_up", _Category.FFN_UP),
    ("ffn_gate", _Category.FFN_GATE),
    ("ffn_down", _Category.FFN_DOWN),
)
# tensors that carry values, fused or not, share the rules and the counter of attn_v
_VALUE_LIKE = frozenset({_Category.ATTN_V, _Category.ATTN_QKV, _Category.ATTN_KV_B})
_FFN = frozenset({_Category.FFN_UP, _Category.FFN_GATE, _Category.FFN_DOWN})


def _category(name: str) -> _Category:
    if name == "output.weight":
        return _Category.OUTPUT
    if name in _EMBEDDINGS:
        return _Category.TOKEN_EMBD
    found = next((category for part, category in _BY_SUBSTRING if part in name), _Category.OTHER)
    return _Category.ATTN_V if found in _VALUE_LIKE else found


def is_embedding(name: str) -> bool:
    """Tell whether `--token-embedding-type` is about this tensor."""
    return name in _EMBEDDINGS


# --- never quantized --------------------------------------------------------------------------------------------------

_NEVER_NAMED = frozenset({"position_embd.weight", "token_types.weight"})
_NEVER_CONTAINING = (
    *("ffn_gate_inp.weight", "ffn_gate_tid2eid.weight"),  # routers
    *("altup", "laurel", "per_layer_model_proj", "ssm_conv1d", "shortconv.conv.weight"),  # small
    *("indexer.k_proj.weight", "indexer.q_proj.weight", "attn_rel_b.weight"),
    *(f"time_mix_{part}.weight" for part in ("first", "w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2", "decay_w1", "decay_w2", "lerp_fused")),
    *(".position_embd", "sam.pos_embd", "sam.neck.", "sam.net_", ".rel_pos", ".patch_embd", ".patch_merger"),  # vision
    *("a.rvq.codebook", "mm.a.code_embd"),  # audio
)
_NEVER_IN_ARCHITECTURE = {
    "glm5-next": (
        *("hc_", "indexer.attn_q_b", "indexer.attn_k", "indexer.proj", "indexer_compressor_gate", "indexer_compressor_ape"),
        *("ssm_f_a.weight", "ssm_f_b.weight", "ssm_g_a.weight", "ssm_g_b.weight", "ssm_beta.weight"),
        *("attn_kv_a_mqa.weight", "attn_k_b.weight", "attn_v_b.weight"),
    )
}
_AT_LEAST_Q8_0 = {"glm5-next": ("attn_q_a", "attn_q_b", "nextn.eh_proj")}


def _n_dims(shape: Shape) -> int:
    """Count dimensions as ggml does: leading ones of a row-major shape are not seen."""
    return next((len(shape) - i for i, size in enumerate(shape) if size != 1), 1)


def why_kept(name: str, shape: Shape, architecture: str = "", *, leave_output: bool = False) -> str:
    """Return why llama-quantize never quantizes this tensor, or '' if it does (llama-quant.cpp, `tensor_allows_quantization`)."""
    if _n_dims(shape) < 2:
        return "one-dimensional"
    if not name.endswith("weight"):
        return "not a weight"
    if "_norm.weight" in name:
        return "norm"
    if leave_output and name == "output.weight":
        return "--leave-output-tensor"
    never = (*_NEVER_CONTAINING, *_NEVER_IN_ARCHITECTURE.get(architecture, ()))
    if name in _NEVER_NAMED or any(part in name for part in never):
        return "llama.cpp never quantizes it"
    return ""


def is_quantizable(name: str, shape: Shape, architecture: str = "", *, leave_output: bool = False) -> bool:
    """Tell whether llama-quantize would quantize this tensor."""
    return not why_kept(name, shape, architecture, leave_output=leave_output)


# --- the rules --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Site:
    """Where a tensor stands: it is number `index` of `count` of its kind (in a mixture of experts: its layer)."""

    model: ModelFacts
    index: int
    count: int
    has_imatrix: bool

    @property
    def in_first_eighth(self) -> bool:
        return self.index < self.count // 8

    @property
    def in_middle(self) -> bool:
        return self.count // 8 <= self.index < 7 * self.count // 8

    @property
    def deserves_more(self) -> bool:
        """The first and last eighth, and every third between (`use_more_bits`)."""
        return not self.in_middle or (self.index - self.count // 8) % 3 == 2

    @property
    def shares_values(self) -> bool:
        """Four or more heads read the same values, so precision there is cheap."""
        return self.model.n_gqa >= 4


_Rule = GgmlType | Callable[[_Site], GgmlType | None]  # None: the preset's default type


def _when(test: Callable[[_Site], bool], then: GgmlType, otherwise: GgmlType | None = None) -> _Rule:
    return lambda site: then if test(site) else otherwise


def _for(presets: Iterable[str], rule: _Rule) -> dict[str, _Rule]:
    return dict.fromkeys(presets, rule)


_IQ1_OR_SMALL_IQ2 = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS")
_LARGER_IQ2 = ("IQ2_S", "IQ2_M")
_LOW_BIT = frozenset((*_IQ1_OR_SMALL_IQ2, *_LARGER_IQ2))  # a branch of its own upstream
_HEAD_IN_Q5_K = _LOW_BIT | {"IQ3_XXS"}

_EMBEDDING: dict[str, _Rule] = {
    **_for(_IQ1_OR_SMALL_IQ2, T.Q2_K),
    **_for((*_LARGER_IQ2, "IQ3_XXS"), T.IQ3_S),
    **_for(("TQ1_0", "TQ2_0", "Q2_0"), T.Q4_K),
}

_MIX: dict[_Category, dict[str, _Rule]] = {
    _Category.ATTN_V: {
        **_for(_IQ1_OR_SMALL_IQ2, _when(lambda s: s.shares_values or s.model.n_expert >= 4, T.Q4_K, T.Q2_K)),
        **_for(_LARGER_IQ2, _when(lambda s: s.shares_values or s.model.n_expert >= 4, T.Q4_K, T.IQ3_S)),
        "Q2_K": _when(lambda s: s.shares_values, T.Q4_K, T.Q3_K),
        **_for(("Q2_K_S", "IQ3_XS", "IQ3_S"), _when(lambda s: s.shares_values, T.Q4_K)),
        "IQ3_XXS": lambda s: T.Q4_K if s.shares_values else T.IQ3_XXS if s.has_imatrix else T.IQ3_S,
        "IQ3_M": T.Q4_K,
        "Q3_K_M": _when(lambda s: s.index < 2, T.Q5_K, T.Q4_K),
        "Q3_K_L": T.Q5_K,
        **_for(("IQ4_NL", "IQ4_XS"), _when(lambda s: s.shares_values, T.Q5_K)),
        **_for(("Q4_K_M", "Q5_K_M"), _when(lambda s: s.deserves_more, T.Q6_K)),
        "Q4_K_S": _when(lambda s: s.index < 4, T.Q5_K),
    },
    _Category.ATTN_K: {"IQ3_XS": T.IQ3_XXS, "IQ3_XXS": T.IQ2_S},
    _Category.ATTN_Q: {"IQ3_XS": T.IQ3_XXS, "IQ3_XXS": T.IQ2_S},
    _Category.ATTN_OUTPUT: {
        **_for(("IQ1_S", "IQ1_M"), T.IQ2_XXS),
        **_for((*_LARGER_IQ2, "IQ3_XXS"), T.IQ3_S),
        "Q2_K": T.Q3_K,
        **_for(("Q3_K_M", "IQ3_M"), T.Q4_K),
        "Q3_K_L": T.Q5_K,
    },
    _Category.FFN_DOWN: {
        **_for(_IQ1_OR_SMALL_IQ2, _when(lambda s: s.in_first_eighth, T.Q2_K)),
        **_for(_LARGER_IQ2, _when(lambda s: s.in_first_eighth, T.IQ3_S)),
        "Q2_K": T.Q3_K,
        "Q2_K_S": _when(lambda s: s.in_first_eighth, T.Q4_K),
        "IQ3_XXS": lambda s: None if s.has_imatrix else T.Q4_K if s.in_first_eighth else T.Q3_K,
        "Q3_K_M": _when(lambda s: s.index < s.count // 16, T.Q5_K, T.Q4_K),
        "IQ3_M": _when(lambda s: s.in_first_eighth or (s.model.n_expert == 8 and s.deserves_more), T.Q4_K),
        "Q3_K_L": T.Q5_K,
        **_for(("Q4_K_M", "Q5_K_M"), _when(lambda s: s.deserves_more, T.Q6_K)),
        **_for(("IQ4_NL", "IQ4_XS"), _when(lambda s: s.in_first_eighth and not s.has_imatrix, T.Q5_K)),
        "Q4_K_S": _when(lambda s: s.in_first_eighth, T.Q5_K),
        "Q4_0": _when(lambda s: s.in_first_eighth and s.has_imatrix, T.Q4_1),
        "Q5_0": _when(lambda s: s.in_first_eighth and s.has_imatrix, T.Q5_1),
    },
    _Category.FFN_GATE: {"IQ3_XS": _when(lambda s: s.in_middle, T.IQ3_XXS)},
    _Category.FFN_UP: {"IQ3_XS": _when(lambda s: s.in_middle, T.IQ3_XXS)},
}

# Mixtral-like models of exactly eight experts: attention is tiny beside them, so it gets more.
_USUAL = tuple(name for name in PRESETS if name not in _LOW_BIT)
_RAISED_ATTN_OUTPUT = ("Q2_K", "IQ3_XS", "IQ3_XXS", "Q3_K_S", "Q3_K_M", "IQ4_NL", "Q4_K_S", "Q4_K_M", "IQ3_S", "IQ3_M", "IQ4_XS")
_EIGHT_EXPERTS: dict[_Category, dict[str, _Rule]] = {
    _Category.ATTN_V: {**_MIX[_Category.ATTN_V], **_for(_USUAL, T.Q8_0)},
    _Category.ATTN_K: {**_for(_USUAL, T.Q8_0), **_for(_LOW_BIT, T.Q4_K)},
    _Category.ATTN_OUTPUT: _for((*_LOW_BIT, *_RAISED_ATTN_OUTPUT), T.Q5_K),
}
_FALCON_ATTN_OUTPUT = {name: rule for name, rule in _MIX[_Category.ATTN_OUTPUT].items() if name in _LOW_BIT}
_FALCON: dict[_Category, dict[str, _Rule]] = {
    _Category.ATTN_OUTPUT: {**_FALCON_ATTN_OUTPUT, "Q3_K_L": T.Q4_K},
    _Category.FFN_DOWN: {
        **_MIX[_Category.FFN_DOWN],
        "Q3_K_M": lambda s: T.Q5_K if s.index < s.count // 16 else T.Q4_K if s.deserves_more else T.Q3_K,
        "Q3_K_L": T.Q4_K,
        "Q4_K_M": lambda s: T.Q6_K if s.index < s.count // 16 else T.Q5_K if s.deserves_more else T.Q4_K,
        "Q4_K_S": T.Q4_K,
    },
}


def _mix(model: ModelFacts) -> dict[_Category, dict[str, _Rule]]:
    experts = _EIGHT_EXPERTS if model.n_expert == 8 else {}
    return {**_MIX, **experts, **(_FALCON if model.architecture == "falcon" else {})}


def _head_type(model: ModelFacts, preset: Preset, n_in: int) -> GgmlType:
    """Return the type of output.weight, and of the token embeddings when they are the output too."""
    if preset.name == "MXFP4_MOE" or model.architecture == "falcon" or not fits_row(preset.default, n_in):
        return T.Q8_0
    if preset.name in _HEAD_IN_Q5_K:
        return T.Q5_K
    return T.Q8_0 if preset.default is T.Q8_0 else T.Q6_K


def _experts_only(model: ModelFacts, category: _Category, shape: Shape) -> GgmlType:
    """MXFP4_MOE: stacked experts in MXFP4, all else in Q8_0."""
    is_stack = len(shape) > 2 and shape[-3] > 1 and (model.architecture != "bailingmoe3" or category in _FFN)
    return T.MXFP4 if is_stack else T.Q8_0


_LAYER = re.compile(r"blk\.(\d+)\.")


def _layer(name: str, n_layer: int) -> int:
    match = _LAYER.match(name)
    if match is None or int(match[1]) >= n_layer:
        raise InputError(f"tensor {name}: expected a name blk.N.… with N below block_count = {n_layer}. The metadata and the tensors do not belong together")
    return int(match[1])


def choose_types(
    model: ModelFacts, preset: Preset, tensors: Iterable[tuple[str, Shape]], *, has_imatrix: bool, pinned: Container[str] = ()
) -> dict[str, GgmlType]:
    """Return the type that llama-quantize's mixture gives each quantizable tensor that is not `pinned`, before fallbacks.

    tensors: (name, row-major shape) of the whole model in file order: by layer, then name. Order and pins matter, for
    upstream's "layer" of a dense model is a running number of the tensors its rules have seen; a pinned tensor is not
    seen and shifts all behind it. Raises InputError when an expert tensor's name tells no layer.
    """
    tensors = list(tensors)
    categories = {name: _category(name) for name, _ in tensors}
    is_tied = "output.weight" not in categories
    mix, seen = _mix(model), Counter[_Category]()
    counts = dict.fromkeys(_FFN, model.n_layer) | {_Category.ATTN_V: sum(c is _Category.ATTN_V for c in categories.values())}

    def from_mix(name: str, category: _Category) -> GgmlType:
        count = counts.get(category, 0)
        by_name = category in _FFN and model.n_expert > 1 and preset.name not in _LOW_BIT
        site = _Site(model, _layer(name, count) if by_name else seen[category], count, has_imatrix)
        seen[category] += 1
        rule = mix.get(category, {}).get(preset.name)
        chosen = (rule(site) if callable(rule) else rule) or preset.default
        is_cheap = category is _Category.ATTN_V and model.is_70b and preset.name not in _LOW_BIT
        return T.Q5_K if is_cheap and chosen in (T.Q3_K, T.Q4_K) else chosen

    def choose(name: str, shape: Shape) -> GgmlType:
        category = categories[name]
        if any(part in name for part in _AT_LEAST_Q8_0.get(model.architecture, ())):
            return T.Q8_0
        if category is _Category.OUTPUT or (is_tied and category is _Category.TOKEN_EMBD):
            return _head_type(model, preset, shape[-1])
        if preset.name == "MXFP4_MOE":
            return _experts_only(model, category, shape)
        if category is _Category.TOKEN_EMBD:
            rule = _EMBEDDING.get(preset.name, preset.default)
            assert isinstance(rule, GgmlType)
            return rule
        return from_mix(name, category)

    wanted = ((n, s) for n, s in tensors if n not in pinned and is_quantizable(n, s, model.architecture))
    return {name: preset.default if preset.is_float else choose(name, shape) for name, shape in wanted}


def requires_imatrix(name: str, ggml_type: GgmlType, preset_name: str = "") -> bool:
    """Tell whether this tensor may not be encoded as this type without imatrix data (llama-quant.cpp, `tensor_requires_imatrix`).

    Token embeddings and output are exempt, as upstream, but for the three types on which ggml would abort the process.
    """
    if is_embedding(name) or name == "output.weight":
        return ggml_type in IMATRIX_REQUIRED_BY_GGML
    return ggml_type in IMATRIX_REQUIRED or (ggml_type is T.Q2_K and preset_name == "Q2_K_S")
