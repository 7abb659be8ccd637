"""A Llama of one layer with random weights, made in milliseconds: for tests that need llama.cpp to run something."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from loopgguf.container import Value, ValueType, array, float32, string, uint32, write_gguf
from loopgguf.formats import GgmlType

N_VOCAB, N_EMBD, N_FF = 259 + 5, 32, 64


def tiny_tokens() -> list[str]:
    return ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"abcde"]


def write_tiny_llama(
    path: Path,
    *,
    noise: float = 0.0,
    tokens: list[str] | None = None,
    broken: bool = False,
    tied: bool = False,
    changes: Mapping[str, Value | None] | None = None,
) -> Path:
    """Write a one-layer F32 Llama with random weights; `noise` perturbs them, `broken` puts a NaN into the last norm; `tied`
    leaves the head out, which the embeddings then are; `changes` replaces metadata, or (None) leaves it out."""
    tokens = tokens or tiny_tokens()
    generator, disturb = np.random.default_rng(0), np.random.default_rng(1)
    shapes = {
        "token_embd.weight": (len(tokens), N_EMBD),
        "output.weight": (len(tokens), N_EMBD),
        **{f"blk.0.attn_{x}.weight": (N_EMBD, N_EMBD) for x in ("q", "k", "v", "output")},
        "blk.0.ffn_gate.weight": (N_FF, N_EMBD),
        "blk.0.ffn_up.weight": (N_FF, N_EMBD),
        "blk.0.ffn_down.weight": (N_EMBD, N_FF),
    }
    weights = {name: (generator.normal(size=shape) * 0.3).astype(np.float32) for name, shape in shapes.items()}
    weights = {name: w + noise * disturb.normal(size=w.shape).astype(np.float32) for name, w in weights.items()}
    weights |= {name: np.ones(N_EMBD, np.float32) for name in ("blk.0.attn_norm.weight", "blk.0.ffn_norm.weight", "output_norm.weight")}
    if tied:
        del weights["output.weight"]
    if broken:
        weights["output_norm.weight"][3] = np.nan
    sizes = {"block_count": 1, "context_length": 64, "embedding_length": N_EMBD, "feed_forward_length": N_FF, "attention.head_count": 2}
    metadata: dict[str, Value] = {
        "general.architecture": string("llama"),
        **{f"llama.{key}": uint32(n) for key, n in sizes.items()},
        "llama.attention.layer_norm_rms_epsilon": float32(1e-5),
        "tokenizer.ggml.model": string("llama"),
        "tokenizer.ggml.tokens": array(ValueType.STRING, tokens),
        "tokenizer.ggml.scores": array(ValueType.FLOAT32, [0.0] * len(tokens)),
        "tokenizer.ggml.token_type": array(ValueType.INT32, [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)]),
        "tokenizer.ggml.bos_token_id": uint32(1),
        "tokenizer.ggml.eos_token_id": uint32(2),
    }
    metadata = {key: value for key, value in {**metadata, **(changes or {})}.items() if value is not None}
    write_gguf(path, metadata, [(name, GgmlType.F32, w) for name, w in weights.items()])
    return path
