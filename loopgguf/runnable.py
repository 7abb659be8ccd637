"""What llama.cpp takes for granted of a file's metadata, checked before it is given the file.

Where these do not hold it ends the whole process (`GGML_ASSERT`) or reads behind the end of an array; whatever else is
wrong it refuses by itself. Sources: src/llama-vocab.cpp (`load`), src/llama-model.cpp (`load_hparams`), src/llama-hparams.h.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NoReturn

from loopgguf.container import GgufFile, Value, ValueType
from loopgguf.errors import InputError

MAX_LAYERS = 512
MAX_EXPERTS = 512
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_NO_VOCABULARY = ("no_vocab", "none")
# item types of the arrays of a vocabulary; those of the second group have a value for each token
_ITEM_TYPES = {
    "tokens": (ValueType.STRING,),
    "merges": (ValueType.STRING,),
    "precompiled_charsmap": (ValueType.INT8, ValueType.UINT8),
    "scores": (ValueType.FLOAT32,),
    "token_type": (ValueType.INT32,),
}
_PER_TOKEN = ("scores", "token_type")


def check_runnable(file: GgufFile) -> None:
    """Raise InputError naming the key where llama.cpp would not survive the metadata of this file, the first of its shards."""
    _check_vocabulary(file)
    _check_sizes(file)


def _refuse(file: GgufFile, key: str, got: object, expected: str) -> NoReturn:
    raise InputError(f"{key} in {file.path}: got {got!s:.80}, expected {expected}. Download or convert the file again")


def _items(value: Value | None) -> list[object]:
    return list(value.data) if value is not None and isinstance(value.data, list) else []


def _check_vocabulary(file: GgufFile) -> None:
    metadata = file.metadata
    tokens = _items(metadata.get("tokenizer.ggml.tokens"))
    kind = metadata.get("tokenizer.ggml.model")
    for name, item_types in _ITEM_TYPES.items():
        key, value = f"tokenizer.ggml.{name}", metadata.get(f"tokenizer.ggml.{name}")
        if value is None:
            continue
        if value.item_type not in item_types:
            _refuse(file, key, _spelled(value), f"an array of {' or '.join(item_type.name for item_type in item_types)}")
        if name in _PER_TOKEN and len(_items(value)) < len(tokens):
            _refuse(file, key, f"{len(_items(value))} values", f"one for each of {len(tokens)} tokens")
    if not tokens and kind is not None and kind.data not in _NO_VOCABULARY:
        _refuse(file, "tokenizer.ggml.tokens", "no tokens", "the vocabulary")
    _refuse_token_twice(file, tokens)
    if kind is not None and kind.data == "llama":
        _refuse_missing_bytes(file, tokens)


def _spelled(value: Value) -> str:
    return value.type.name if value.item_type is None else f"an array of {value.item_type.name}"


def _refuse_token_twice(file: GgufFile, tokens: list[object]) -> None:
    seen: dict[str, int] = {}
    for number, text in enumerate(tokens):
        known = str(text).partition("\0")[0]  # llama.cpp reads as far as that, and names empty ones by their number
        if known and seen.setdefault(known, number) != number:
            _refuse(file, f"token {known!r:.80}", f"it as {seen[known]} and as {number}", "each once")


def _refuse_missing_bytes(file: GgufFile, tokens: list[object]) -> None:
    """A text with such a byte outside of all tokens would end the process."""
    known = set(tokens)
    for byte in range(256):
        if f"<0x{byte:02X}>" not in known and bytes((byte,)).decode("utf-8", "surrogateescape") not in known:
            _refuse(file, "tokenizer.ggml.tokens", f"no token for the byte 0x{byte:02X}", "all 256, <0x00> to <0xFF>")


def _check_sizes(file: GgufFile) -> None:
    architecture = file.metadata.get("general.architecture")
    prefix = "" if architecture is None else f"{architecture.data}."
    layers = _integer(file.metadata, f"{prefix}block_count")
    if layers is not None and not 1 <= layers <= MAX_LAYERS:
        _refuse(file, f"{prefix}block_count", layers, f"1 to {MAX_LAYERS} layers")
    _check_experts(file, prefix)
    scaling = file.metadata.get(f"{prefix}rope.scaling.type")
    if scaling is not None and scaling.data not in _ROPE_SCALINGS:
        _refuse(file, f"{prefix}rope.scaling.type", scaling.data, f"one of {', '.join(_ROPE_SCALINGS)}")
    for name in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        value = file.metadata.get(f"{prefix}{name}")
        if value is not None and not (isinstance(value.data, float) and math.isfinite(value.data) and value.data >= 0):
            _refuse(file, f"{prefix}{name}", value.data, "a finite number from 0")


def _check_experts(file: GgufFile, prefix: str) -> None:
    n_experts = _integer(file.metadata, f"{prefix}expert_count") or 0
    if not 0 <= n_experts <= MAX_EXPERTS:
        _refuse(file, f"{prefix}expert_count", n_experts, f"at most {MAX_EXPERTS} experts")
    used = file.metadata.get(f"{prefix}expert_used_count")
    numbers = [n for n in (_items(used) or [0 if used is None else used.data]) if isinstance(n, int)]  # one for all layers, or one for each
    if not all(min(n_experts, 1) <= n <= n_experts for n in numbers):
        _refuse(file, f"{prefix}expert_used_count", numbers, f"1 to {n_experts}, the number of experts" if n_experts else "none, for there are no experts")


def _integer(metadata: Mapping[str, Value], key: str) -> int | None:
    value = metadata.get(key)
    return value.data if value is not None and isinstance(value.data, int) else None
