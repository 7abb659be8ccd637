"""Checkpoint folders of a few kilobytes, written byte by byte: for tests of what reads them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from loopgguf.architectures import expected_weights, find_family, read_hyperparameters

LLAMA_CONFIG: dict[str, object] = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "vocab_size": 20,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_ENCODE = {
    "F32": lambda values: values.astype("<f4"),
    "F16": lambda values: values.astype("<f2"),
    "BF16": lambda values: (values.astype("<f4").view("<u4") >> 16).astype("<u2"),
}

Stored = tuple[str, np.ndarray]  # dtype as safetensors names it, and the stored numbers (BF16: uint16)


def pack_safetensors(tensors: Mapping[str, Stored], changes: Mapping[str, object] | None = None) -> bytes:
    """Return a safetensors file; `changes` replaces or (`...`) removes entries of its header."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (dtype, values) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": [at, at + values.nbytes]}
        at += values.nbytes
    text = json.dumps({key: value for key, value in (header | dict(changes or {})).items() if value is not ...}).encode()
    return len(text).to_bytes(8, "little") + text + b"".join(values.tobytes() for _, values in tensors.values())


def random_weights(config: Mapping[str, object], dtype: str = "BF16", *, optional: bool = False) -> dict[str, Stored]:
    """Return random values for every weight that a checkpoint of this config must (with `optional`: may) have."""
    family = find_family(config)
    generator = np.random.default_rng(0)
    expected = expected_weights(family, read_hyperparameters(family, config), config)
    return {w.hf: (dtype, _ENCODE[dtype](generator.normal(size=w.shape))) for w in expected if w.required or optional}


def write_checkpoint(folder: Path, config: Mapping[str, object] = LLAMA_CONFIG, weights: Mapping[str, Stored] | None = None, *, n_shards: int = 1) -> Path:
    """Write config.json and the weights (random ones by default), in shards with an index if n_shards > 1."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    weights = random_weights(config) if weights is None else weights
    if n_shards == 1:
        (folder / "model.safetensors").write_bytes(pack_safetensors(weights))
        return folder
    names, weight_map = list(weights), {}
    for i in range(n_shards):
        shard = f"model-{i + 1:05d}-of-{n_shards:05d}.safetensors"
        (folder / shard).write_bytes(pack_safetensors({name: weights[name] for name in names[i::n_shards]}))
        weight_map |= dict.fromkeys(names[i::n_shards], shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return folder
