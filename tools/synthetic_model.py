"""Make a Llama checkpoint folder of any size with random weights, for benchmarks of speed and memory.

    python tools/synthetic_model.py DIR --size 1GB --vocab 128000

The folder is what a real one is (config.json as published checkpoints spell it, sharded BF16 safetensors with an
index, tokenizer.json, generation_config.json), so every command takes it, and llama.cpp runs the result. The weights
mean nothing: no figure of quality may come from it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path
from typing import BinaryIO

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # works in a bare clone, too

from loopgguf.container import read_gguf
from loopgguf.formats import parse_size
from loopgguf.statistics import NEVER_COLLECTED, Columns, Statistics, save_imatrix

REPOSITORY = Path(__file__).resolve().parents[1]
SHARD_BYTES = 500_000_000
HEAD_DIM = 64
N_GQA = 4  # query heads per key/value head, as in Llama 3
BLOCK_WEIGHTS = 1 << 20  # of random weights, repeated with its segments in another order each time
SEGMENT_WEIGHTS = 1 << 12
SPECIAL_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>")
# what llama.cpp knows as `llama-bpe`
SPLIT_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

Shapes = dict[str, tuple[int, ...]]


# --- weights ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Dimensions:
    """The sizes of a Llama with tied embeddings; `n_layers` fills it up to the wanted size."""

    hidden: int
    ffn: int
    n_layers: int
    vocab_size: int

    @property
    def layer_shapes(self) -> Shapes:
        hidden, kv, ffn = self.hidden, self.hidden // N_GQA, self.ffn
        return {
            "input_layernorm": (hidden,),
            "mlp.down_proj": (hidden, ffn),
            "mlp.gate_proj": (ffn, hidden),
            "mlp.up_proj": (ffn, hidden),
            "post_attention_layernorm": (hidden,),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.v_proj": (kv, hidden),
        }

    @property
    def shapes(self) -> Shapes:
        """Name → shape of every weight in the checkpoint."""
        layers = {f"model.layers.{i}.{name}.weight": shape for i in range(self.n_layers) for name, shape in self.layer_shapes.items()}
        return {"model.embed_tokens.weight": (self.vocab_size, self.hidden), **layers, "model.norm.weight": (self.hidden,)}


def choose_dimensions(size_bytes: int, vocab_size: int) -> Dimensions:
    """Return dimensions whose BF16 weights take about `size_bytes` (at least one layer), wider for larger models."""
    n_weights = size_bytes // 2
    hidden = next(h for h in (4096, 2048, 1024, 512, 256) if h == 256 or 5 * h * vocab_size <= 2 * n_weights)
    dimensions = Dimensions(hidden, hidden * 7 // 2, 1, vocab_size)
    layer = sum(math.prod(shape) for shape in dimensions.layer_shapes.values())
    return Dimensions(hidden, hidden * 7 // 2, max(1, round((n_weights - vocab_size * hidden) / layer)), vocab_size)


def _bf16(values: np.ndarray) -> np.ndarray:
    return (values.astype("<f4").view("<u4") >> 16).astype("<u2")


def _random_blocks(rng: np.random.Generator) -> Iterator[bytes]:
    """Yield normal weights × 0.02 as BF16 without end: one block, its segments shuffled anew each time."""
    block = _bf16(rng.standard_normal(BLOCK_WEIGHTS, np.float32) * 0.02).reshape(-1, SEGMENT_WEIGHTS)
    while True:
        yield block[rng.permutation(len(block))].tobytes()


def _write_tensor(stream: BinaryIO, shape: tuple[int, ...], blocks: Iterator[bytes]) -> None:
    left = 2 * math.prod(shape)
    if len(shape) == 1:  # a norm
        stream.write(_bf16(np.ones(shape, np.float32)).tobytes())
        return
    while left:
        data = next(blocks)[:left]
        stream.write(data)
        left -= len(data)


def _write_shard(path: Path, shapes: Shapes, blocks: Iterator[bytes]) -> None:
    """Write one safetensors file front to back, a block of weights in memory at a time."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in shapes.items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", len(raw)) + raw)
        for shape in shapes.values():
            _write_tensor(stream, shape, blocks)


def _split_shards(shapes: Shapes) -> list[Shapes]:
    """Cut the weights, in order, into shards of about SHARD_BYTES; a larger weight gets a shard of its own."""
    shards: list[Shapes] = [{}]
    n_bytes = 0
    for name, shape in shapes.items():
        size = 2 * math.prod(shape)
        if shards[-1] and n_bytes + size > SHARD_BYTES:
            shards.append({})
            n_bytes = 0
        shards[-1][name] = shape
        n_bytes += size
    return shards


def _write_weights(folder: Path, shapes: Shapes, seed: int) -> None:
    shards = _split_shards(shapes)
    blocks = _random_blocks(np.random.default_rng(seed))
    weight_map = {}
    for i, shard in enumerate(shards):
        file_name = f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / file_name, shard, blocks)
        weight_map.update(dict.fromkeys(shard, file_name))
    total_bytes = sum(2 * math.prod(shape) for shape in shapes.values())
    _write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total_bytes}, "weight_map": weight_map})


# --- tokenizer --------------------------------------------------------------------------------------------------------


def _byte_characters() -> list[str]:
    """Return the 256 characters that byte-level BPE writes bytes as, letters and the space first."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in printable]
    characters = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(hidden))]
    return sorted(characters, key=lambda c: (not ("a" <= c <= "z" or c == "Ġ"), c))


def make_merges(n_merges: int) -> list[list[str]]:
    """Return `n_merges` merges in rank order: two characters each, then, when all pairs are there, a pair and a character.

    Every merge's parts are tokens made before it, and no token can be made in two ways, so that any implementation of
    BPE finds the same tokens.
    """
    characters = _byte_characters()
    n_pairs = min(n_merges, len(characters) ** 2)
    n_triples = n_merges - n_pairs
    pairs = product(characters[: math.ceil(math.sqrt(n_pairs))], repeat=2)
    triples = product(characters[: math.ceil(n_triples ** (1 / 3))], repeat=3)
    return [[a, b] for a, b in islice(pairs, n_pairs)] + [[a + b, c] for a, b, c in islice(triples, n_triples)]


def make_tokenizer(vocab_size: int) -> dict[str, object]:
    """Return a tokenizer.json of exactly `vocab_size` tokens, the special ones last."""
    if vocab_size < 256 + len(SPECIAL_TOKENS):
        raise SystemExit(f"--vocab: got {vocab_size}, expected at least {256 + len(SPECIAL_TOKENS)}: one token for each byte, and the special ones")
    n_plain = vocab_size - len(SPECIAL_TOKENS)
    merges = make_merges(n_plain - 256)
    tokens = [*_byte_characters(), *(left + right for left, right in merges)]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_PATTERN}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    bos = {"SpecialToken": {"id": SPECIAL_TOKENS[0], "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": n_plain + i, "content": token, **flags} for i, token in enumerate(SPECIAL_TOKENS)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [bos, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {SPECIAL_TOKENS[0]: {"id": SPECIAL_TOKENS[0], "ids": [n_plain], "tokens": [SPECIAL_TOKENS[0]]}},
        },
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": merges,
        },
    }


# --- the folder -------------------------------------------------------------------------------------------------------


def _make_config(dimensions: Dimensions) -> dict[str, object]:
    """Return config.json as Llama 3.2 checkpoints have it."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "bos_token_id": dimensions.vocab_size - 2,
        "eos_token_id": dimensions.vocab_size - 1,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "hidden_size": dimensions.hidden,
        "initializer_range": 0.02,
        "intermediate_size": dimensions.ffn,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": dimensions.hidden // HEAD_DIM,
        "num_hidden_layers": dimensions.n_layers,
        "num_key_value_heads": dimensions.hidden // HEAD_DIM // N_GQA,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192, "rope_type": "llama3"},
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.0",
        "use_cache": True,
        "vocab_size": dimensions.vocab_size,
    }


def _write_json(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False, indent=None if path.name == "tokenizer.json" else 2), encoding="utf-8")


def make_checkpoint(folder: Path, size_bytes: int, vocab_size: int = 128_000, seed: int = 0) -> None:
    """Write a Hugging Face Llama folder of about `size_bytes` of BF16 weights; the same arguments give the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    dimensions = choose_dimensions(size_bytes, vocab_size)
    _write_json(folder / "config.json", _make_config(dimensions))
    _write_json(folder / "generation_config.json", {"bos_token_id": vocab_size - 2, "eos_token_id": vocab_size - 1, "transformers_version": "4.45.0"})
    _write_json(folder / "tokenizer.json", make_tokenizer(vocab_size))
    special = {"bos_token": SPECIAL_TOKENS[0], "eos_token": SPECIAL_TOKENS[1]}
    _write_json(
        folder / "tokenizer_config.json",
        {**special, "model_max_length": 131072, "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"},
    )
    _write_json(folder / "special_tokens_map.json", special)
    _write_weights(folder, dimensions.shapes, seed)


def make_gguf(folder: Path, path: Path) -> None:
    """Convert a checkpoint folder to a BF16 GGUF at `path` with `loopgguf convert`, replacing what is there."""
    command = [sys.executable, "-m", "loopgguf.cli", "convert", str(folder), "-o", str(path), "--outtype", "bf16", "--overwrite"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    subprocess.run(command, check=True, env=environment, stdout=sys.stderr)  # standard output belongs to a benchmark's table


def make_imatrix(gguf: Path, path: Path, seed: int = 0) -> None:
    """Write an imatrix of random importances for every matrix of the GGUF that llama-imatrix would collect."""
    rng = np.random.default_rng(seed)
    columns = {
        tensor.name: Columns(np.exp(rng.standard_normal((1, tensor.shape[-1]), np.float32)), np.array([512], np.float32))
        for tensor in read_gguf(gguf).tensors
        if len(tensor.shape) > 1 and tensor.name != NEVER_COLLECTED
    }
    save_imatrix(Statistics(columns, ("synthetic",), 1, 512), path, overwrite=True)


@dataclass(frozen=True)
class Model:
    """One synthetic model in all the forms that a benchmark needs."""

    checkpoint: Path
    gguf: Path
    imatrix: Path


def find_or_make(folder: Path, size_bytes: int, vocab_size: int = 128_000) -> Model:
    """Return the model of that size under `folder`, made now where it is not there yet."""
    name = f"synthetic-{size_bytes / 1e9:g}GB-{vocab_size}"
    model = Model(folder / name, folder / f"{name}.gguf", folder / f"{name}.imatrix.gguf")
    if not (model.checkpoint / "model.safetensors.index.json").exists():  # written last
        make_checkpoint(model.checkpoint, size_bytes, vocab_size)
    if not model.gguf.exists():
        make_gguf(model.checkpoint, model.gguf)
    if not model.imatrix.exists():
        make_imatrix(model.gguf, model.imatrix)
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, help="the checkpoint folder to write")
    parser.add_argument("--size", default="1GB", help="bytes of the weights, with a unit (default 1GB)")
    parser.add_argument("--vocab", type=int, default=128_000, help="tokens of the vocabulary (default 128000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gguf", type=Path, help="also convert it to a BF16 GGUF at this path")
    options = parser.parse_args()
    size_bytes = parse_size(options.size)
    make_checkpoint(options.folder, size_bytes, options.vocab, options.seed)
    dimensions = choose_dimensions(size_bytes, options.vocab)
    total_bytes = sum(2 * math.prod(shape) for shape in dimensions.shapes.values())
    print(f"{options.folder}: {dimensions.n_layers} layers of width {dimensions.hidden}, {options.vocab} tokens, {total_bytes / 1e9:.2f} GB of weights")
    if options.gguf is not None:
        make_gguf(options.folder, options.gguf)
        print(f"{options.gguf}: {options.gguf.stat().st_size / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
