"""What is fuzzed: every parser of a stranger's file, valid seeds under 4 KB with a way to mutate each, and the stages of reading.

A parser takes a path and returns, or raises `LoopggufError`. A stage is past when a function of the parser has returned:
`Stage("header", container, "_read_metadata")` counts inputs whose metadata was read whole; the last stage of each is that
the parser has returned.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import yaml
from mutations import Field, mutate_bytes, mutate_fields, mutate_tree, pack, spell_json

from loopgguf import architectures, container, corpus, documents, grams, planfile, profile, safetensor, statistics, tasks, vocabulary
from loopgguf.corpus import find_parts, read_rows, read_text
from loopgguf.errors import LoopggufError
from loopgguf.formats import GgmlType, tensor_bytes
from loopgguf.planner import Plan, PlanRow
from loopgguf.pre_tokenizers import PRE_TOKENIZERS

MAX_SEED_BYTES = 4096
MAX_MESSAGE_CHARACTERS = 2000
STAGES = ("magic", "header", "tensor table", "values")
Mutate = Callable[[Random], bytes]


@dataclass(frozen=True)
class Seed:
    """A valid file: its name, its bytes, how to make mutants of it, and the valid files that lie beside it."""

    file_name: str
    valid: bytes
    mutate: Mutate
    beside: Mapping[str, bytes] = field(default_factory=dict)


@dataclass(frozen=True)
class Stage:
    """Past when the function `name` of `owner`, a module or class, has returned for the first time."""

    label: str
    owner: Any
    name: str


@dataclass(frozen=True)
class Parser:
    """A reader of files: `seeds` are made when first asked for, `parse` is given the path of a mutant."""

    name: str
    seeds: Callable[[], Sequence[Seed]]
    parse: Callable[[Path], object]
    stages: tuple[Stage, ...]


def _of_bytes(file_name: str, valid: bytes, **beside: Any) -> Seed:
    return Seed(file_name, valid, lambda rng: mutate_bytes(rng, valid), **beside)


def _of_fields(file_name: str, fields: Sequence[Field], **beside: Any) -> Seed:
    return Seed(file_name, pack(fields), lambda rng: mutate_fields(rng, fields), **beside)


def _of_tree(file_name: str, tree: object, **beside: Any) -> Seed:
    return Seed(file_name, json.dumps(tree).encode(), lambda rng: spell_json(rng, mutate_tree(rng, tree)), **beside)


# --- GGUF ---------------------------------------------------------------------------------------------------------------

_U32, _F32, _STRING, _ARRAY = 4, 6, 8, 9


def _text(text: str) -> Field:
    return Field("text", text.encode())


def _pair(key: str, value_type: int, *value: Field) -> list[Field]:
    return [_text(key), Field("<i", value_type), *value]


def _strings(*texts: str) -> list[Field]:
    return [Field("<i", _STRING), Field("<Q", len(texts)), *map(_text, texts)]


def _info(name: str, dims: Sequence[int], ggml_type: int, offset: int) -> list[Field]:
    return [_text(name), Field("<I", len(dims)), *(Field("<Q", n) for n in dims), Field("<I", ggml_type), Field("<Q", offset)]


def _gguf(pairs: Sequence[list[Field]], infos: Sequence[list[Field]], data: bytes) -> list[Field]:
    head = [Field("raw", b"GGUF"), Field("<I", 3), Field("<Q", len(infos)), Field("<Q", len(pairs))]
    return [*head, *(f for part in (*pairs, *infos) for f in part), Field("pad", 32), Field("raw", data)]


@cache
def _gguf_seeds() -> list[Seed]:
    pairs = [
        _pair("general.architecture", _STRING, _text("llama")),
        _pair("general.alignment", _U32, Field("<I", 32)),
        _pair("llama.block_count", _U32, Field("<I", 2)),
        _pair("llama.rope.freq_base", _F32, Field("<f", 1e4)),
        _pair("tokenizer.ggml.add_bos_token", 7, Field("<B", 1)),
        _pair("tokenizer.ggml.tokens", _ARRAY, *_strings("a", "bc", "d")),
        _pair("tokenizer.ggml.scores", _ARRAY, Field("<i", _F32), Field("<Q", 3), *(Field("<f", n) for n in (0.0, -1.0, -2.0))),
        _pair("flags", _ARRAY, Field("<i", 7), Field("<Q", 2), Field("<B", 0), Field("<B", 1)),
    ]
    infos = [_info("token_embd.weight", [32, 2], 8, 0), _info("blk.0.attn_q.weight", [4, 2], 0, 96), _info("output_norm.weight", [3], 1, 128)]
    small = _gguf(pairs[:1], [_info("a", [8], 0, 0)], bytes(32))
    return [_of_fields("model.gguf", _gguf(pairs, infos, bytes(160))), _of_fields("model.gguf", small)]


def _parse_gguf(path: Path) -> None:
    for file in container.read_shards(path):
        assert all(file.data_offset <= t.offset and t.offset + t.n_bytes <= file.size_bytes for t in file.tensors)


# --- imatrix ------------------------------------------------------------------------------------------------------------


def _floats(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


@cache
def _imatrix_gguf_seeds() -> list[Seed]:
    pairs = [
        _pair("general.type", _STRING, _text("imatrix")),
        _pair("imatrix.datasets", _ARRAY, *_strings("a.txt")),
        _pair("imatrix.chunk_count", _U32, Field("<I", 2)),
        _pair("imatrix.chunk_size", _U32, Field("<I", 512)),
    ]
    infos, data = [], b""
    for name, shape, values in (
        ("blk.0.attn_q.weight.in_sum2", [4], _floats(1, 2, 3, 4)),
        ("blk.0.attn_q.weight.counts", [1], _floats(1024)),
        ("blk.0.attn_q.weight.in_sum", [4], _floats(-1, 0, 1, 2)),
        ("blk.0.attn_q.weight.in_max", [4], _floats(1, 1, 1, 2)),
        ("blk.0.ffn_down_exps.weight.in_sum2", [2, 2], _floats(1, 2, 3, 4)),
        ("blk.0.ffn_down_exps.weight.counts", [1, 2], _floats(10, 0)),
    ):
        infos.append(_info(name, shape, 0, len(data)))
        data += values + bytes(-len(values) % 32)
    return [_of_fields("a.imatrix.gguf", _gguf(pairs, infos, data))]


@cache
def _imatrix_dat_seeds() -> list[Seed]:
    def entry(name: str, *values: float) -> list[Field]:
        return [Field("text", name.encode(), "<i"), Field("<i", 3), Field("<i", len(values)), *(Field("<f", v) for v in values)]

    fields = [Field("<i", 3), *entry("blk.0.attn_q.weight", 1, 2, 3), *entry("blk.0.attn_k.weight", 1, 2, 3), *entry("output.weight", 0, 1)]
    return [_of_fields("a.dat", [*fields, Field("<i", 12), Field("text", b"a.txt", "<i")]), _of_fields("a.dat", fields)]


def _parse_imatrix(path: Path) -> None:
    loaded = statistics.load_imatrix(path)
    for name in statistics.merge([loaded, loaded]).columns:
        importance = loaded.importance(name)
        assert importance is not None and np.isfinite(statistics.sanitize_importance(importance)[0]).all()


# --- safetensors --------------------------------------------------------------------------------------------------------

_HEADER = {
    "__metadata__": {"format": "pt"},
    "a.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b.weight": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
    "c": {"dtype": "I64", "shape": [], "data_offsets": [32, 40]},
}


def _spell_safetensors(header: bytes, data: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + data


@cache
def _safetensors_seeds() -> list[Seed]:
    data = _floats(1, 2, 3, 4, 5, 6) + bytes(16)
    valid = _spell_safetensors(json.dumps(_HEADER).encode(), data)

    def mutate(rng: Random) -> bytes:
        if rng.random() < 0.2:
            return mutate_bytes(rng, valid)
        return _spell_safetensors(spell_json(rng, mutate_tree(rng, _HEADER)), data)

    return [Seed("model.safetensors", valid, mutate)]


def _parse_safetensors(path: Path) -> None:
    _, tensors = safetensor.read_safetensors(path)
    for stored in tensors.values():
        assert stored.offset + stored.n_bytes <= path.stat().st_size
        if stored.dtype in safetensor._NUMPY_DTYPES:
            safetensor.read_array(stored)


_GRAM_METADATA = {
    "loopgguf.gram": "1",
    "loopgguf.calibration": "abc",
    "loopgguf.split": json.dumps({"holdout_chunks": [3, 7], "seed": 0, "label_seed": None}),
}
_GRAM_HEADER = {
    "__metadata__": _GRAM_METADATA,
    "inputs.blk.0.attn_norm": {"dtype": "F32", "shape": [6], "data_offsets": [0, 24]},
    "inputs.blk.0.attn_norm/tokens": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]},
    "first.blk.0.attn_norm": {"dtype": "F32", "shape": [3], "data_offsets": [32, 44]},
    "first.blk.0.attn_norm/weight": {"dtype": "F64", "shape": [], "data_offsets": [44, 52]},
    "holdout.inputs.blk.0.ffn_down_exps#1": {"dtype": "F32", "shape": [3], "data_offsets": [52, 64]},
    "holdout.inputs.blk.0.ffn_down_exps#1/tokens": {"dtype": "I64", "shape": [], "data_offsets": [64, 72]},
}
_GRAM_DATA = (*(_floats(1, 2, 3, 4, 5, 6), np.int64(9).tobytes(), _floats(1, 2, 3), np.float64(2.5).tobytes(), _floats(1, 2, 3), np.int64(9).tobytes()),)


@cache
def _gram_seeds() -> list[Seed]:
    data = b"".join(_GRAM_DATA)

    def mutate(rng: Random) -> bytes:
        if rng.random() < 0.5:
            return _spell_safetensors(spell_json(rng, mutate_tree(rng, _GRAM_HEADER)), data)
        return _spell_safetensors(json.dumps(_GRAM_HEADER).encode(), mutate_bytes(rng, data + bytes(8))[: len(data)].ljust(len(data), b"\xff"))

    return [Seed("a.imatrix.gram-00001-of-00001.safetensors", _spell_safetensors(json.dumps(_GRAM_HEADER).encode(), data), mutate)]


def _parse_grams(path: Path) -> None:
    loaded = grams.load_grams(path.with_name("a.imatrix.gguf"))
    for found in (loaded.train, loaded.holdout):
        for kind in (*grams.MATRICES, *grams.VECTORS, *grams.CURVATURES):
            for _ in getattr(found, kind).values():
                pass


@cache
def _index_seeds() -> list[Seed]:
    def shard(*names: str) -> bytes:
        header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [4 * i, 4 * i + 4]} for i, name in enumerate(names)}
        return _spell_safetensors(json.dumps(header).encode(), bytes(4 * len(names)))

    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    tree = {"metadata": {"total_size": 16}, "weight_map": {"a": names[0], "b": names[0], "c": names[1], "d": names[1]}}
    return [_of_tree(safetensor.INDEX_NAME, tree, beside={names[0]: shard("a", "b"), names[1]: shard("c", "d")})]


# --- config.json, profile, plan -----------------------------------------------------------------------------------------

_LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 128,
    "vocab_size": 20,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "attention_bias": False,
    "sliding_window": None,
}
_LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
_YARN_ROPE = {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "beta_slow": 1, "rope_theta": 1e6}


@cache
def _config_seeds() -> list[Seed]:
    qwen = {**_LLAMA, "architectures": ["Qwen3ForCausalLM"], "rope_parameters": _YARN_ROPE}
    return [_of_tree("config.json", tree) for tree in (_LLAMA, {**_LLAMA, "rope_scaling": _LLAMA3_ROPE}, qwen)]


def _parse_config(path: Path) -> None:
    config = documents.load_json(path)
    family = architectures.find_family(config)
    numbers = architectures.read_hyperparameters(family, config)
    architectures.find_limitations(config, numbers)
    architectures.hyperparameter_metadata(family, numbers)
    for _, _weight in zip(range(100), architectures.expected_weights(family, numbers, config), strict=False):
        pass  # lazily: two layers may be said to be four billion
    if numbers.head_dim < 2**16:  # a tensor of that size is what config.json asks for; the weights would have to have it
        architectures.rope_factors(numbers)


# small ones: PyYAML reads a hundred bytes a millisecond
_PROFILES: tuple[dict[str, Any], ...] = (
    {"name": "mine", "description": "an example", "file_type": "q4_k_m", "default": "q4_k", "rules": [{"role": "output", "type": "Q6_K"}]},
    {"default": "q4_k", "rules": [{"role": ["attn_v", "attn_k"], "layers": ["0-3", 7], "type": "Q5_K"}]},
    {"default": "q4_k", "types": ["IQ4_XS", "Q5_K"], "rules": [{"role": "ffn_down", "layers": {"first": "1/8", "last": 2}, "floor": "Q4_K"}]},
    {"default": "q4_k", "rules": [{"match": r"blk\.1[0-2]\.ffn_(up|gate)", "ceiling": "Q8_0"}]},
)


def _spell_yaml(rng: Random, tree: object) -> bytes:
    if rng.random() < 0.5:
        return spell_json(rng, tree)
    try:
        raw = yaml.safe_dump(tree, allow_unicode=True).encode("utf-8", "surrogatepass")
    except RecursionError:  # the writer's own; JSON is YAML too
        return spell_json(rng, tree)
    return mutate_bytes(rng, raw) if rng.random() < 0.2 else raw


@cache
def _profile_seeds() -> list[Seed]:
    def of(tree: object) -> Seed:
        return Seed("mine.yaml", yaml.safe_dump(tree).encode(), lambda rng: _spell_yaml(rng, mutate_tree(rng, tree)))

    return [of(tree) for tree in _PROFILES]


def _parse_profile(path: Path) -> None:
    for rule in profile.load_profile(path).rules:
        for name in ("output.weight", "token_embd.weight", "blk.3.attn_v.weight", "blk.0.ffn_down_exps.weight"):
            rule.applies(name, 8, is_tied=True)


def _plan_row(name: str, shape: tuple[int, ...], ggml_type: GgmlType, **more: Any) -> PlanRow:
    return PlanRow(name, shape, GgmlType.BF16, ggml_type, tensor_bytes(ggml_type, shape), "size", **more)


def _plan_tree() -> Any:
    rows = (
        _plan_row("token_embd.weight", (8, 256), GgmlType.Q6_K, estimated_error=0.25, explanation="Q8_0: +1 bytes"),
        _plan_row("blk.0.ffn_down.weight", (256, 96), GgmlType.Q4_0, wanted=GgmlType.Q3_K, fallback="rows of 96", uses_imatrix=True),
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "plan.json"
        planfile.save_plan(planfile.SavedPlan(Plan("size 123 bytes", 15, rows), "demo", 4711, None), path)
        return json.loads(path.read_text(encoding="utf-8"))


def _sign(tree: Any) -> Any:
    """Give a changed plan the hash of its rows, where it still has rows: else no mutant would get past the hash."""
    with contextlib.suppress(LoopggufError, KeyError, TypeError, ValueError, OverflowError):
        tree["hash"] = Plan(tree["intent"], tree["file_type"], tuple(planfile._parse_row(row, "row") for row in tree["rows"])).hash
    return tree


@cache
def _plan_seeds() -> list[Seed]:
    tree = _plan_tree()
    return [Seed("plan.json", json.dumps(tree).encode(), lambda rng: spell_json(rng, _sign(mutate_tree(rng, tree))))]


# --- calibration --------------------------------------------------------------------------------------------------------

_CHAT = [{"role": "user", "content": "Hello, who are you?"}, {"role": "assistant", "content": "A model.\nYou?"}]
_ROWS = [
    {"text": "Once upon a time, naïve façade — 漢字."},
    {"messages": _CHAT, "tools": [{"name": "look", "parameters": {"at": "string"}}]},
    {"prompt": "2 + 2 = ", "completion": "4"},
    {"prompt": _CHAT[:1], "completion": _CHAT[1:]},
]


def _parquet() -> bytes:
    import pyarrow
    from pyarrow import parquet

    table = pyarrow.Table.from_pylist([{"text": "Once upon a time"}, {"text": None}, {"text": "漢字 🙂"}])
    stream = io.BytesIO()
    parquet.write_table(table, stream, compression="none", store_schema=False)
    return stream.getvalue()


@cache
def _calibration_seeds() -> list[Seed]:
    def lines(rng: Random) -> bytes:
        rows = [mutate_tree(rng, row) if rng.random() < 0.5 else row for row in _ROWS]
        return b"\n".join(spell_json(rng, row) for row in rows)

    jsonl = "".join(json.dumps(row) + "\n" for row in _ROWS).encode()
    return [
        _of_bytes("a.txt", "\ufeffOnce upon a time,\r\nnaïve façade — 漢字 🙂.\r\n\n<|eot|>\n".encode()),
        _of_tree("a.json", _ROWS),
        Seed("a.jsonl", jsonl, lines),
        _of_bytes("a.parquet", _parquet()),
    ]


def _parse_calibration(path: Path) -> None:
    (part,), _ = find_parts([path])
    if part.is_text:
        read_text(part, Counter())
    for _ in () if part.is_text else read_rows(part, Counter()):
        pass


_QUESTION = {"context": "2 + 2 =", "choices": [" 4", " 5", " 漢字"], "answer": 0}
_SENTENCE = {"text": "Once upon a time"}


@cache
def _task_seeds() -> list[Seed]:
    def of(row: object) -> Seed:
        def mutate(rng: Random) -> bytes:
            return b"\n".join(spell_json(rng, mutate_tree(rng, row) if rng.random() < 0.5 else row) for _ in range(3))

        return Seed("a.jsonl", json.dumps(row).encode(), mutate)

    return [of(_QUESTION), of(_SENTENCE)]


# --- tokenizer files ----------------------------------------------------------------------------------------------------

_N_VOCAB = 280
_BYTE_TOKENS = [f"<0x{byte:02X}>" for byte in range(256)]


def _byte_level_tree() -> Any:
    vocab = ["a", "b", "c", "ab", "abc", "Ġ", "Ġa"]
    split = {"type": "Split", "pattern": {"Regex": PRE_TOKENIZERS["llama-bpe"][0]}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    special = {"id": 7, "content": "<|end|>", "single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "added_tokens": [special, {**special, "id": 8, "content": "<think>", "special": False}],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {text: i for i, text in enumerate(vocab)},
            "merges": [["a", "b"], ["ab", "c"], "Ġ a"],
        },
    }


def _byte_fallback_tree() -> Any:
    vocab = ["<unk>", "<s>", *_BYTE_TOKENS, "▁", "a", "▁a"]
    return {
        "added_tokens": [{"id": 1, "content": "<s>", "special": True}],
        "normalizer": {"type": "Prepend", "prepend": "▁"},
        "model": {"type": "BPE", "unk_token": "<unk>", "byte_fallback": True, "vocab": {t: i for i, t in enumerate(vocab)}, "merges": ["▁ a"]},
    }


_TOKENIZER_CONFIG = {
    "bos_token": "<|end|>",
    "eos_token": {"content": "<|end|>", "special": True},
    "add_bos_token": True,
    "added_tokens_decoder": {"8": {"content": "<think>", "special": False}},
    "chat_template": [{"name": "default", "template": "{{ messages }}"}, {"name": "tool use", "template": "x"}],
    "clean_up_tokenization_spaces": False,
}


def _sentencepiece(pieces: Sequence[tuple[str, int]]) -> Any:
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    for text, kind in pieces:
        piece = model.pieces.add()
        piece.piece = text
        if kind != 1:
            piece.type = kind
    model.normalizer_spec.add_dummy_prefix = False
    return model


def _sentencepiece_seed() -> Seed:
    model = _sentencepiece([("<unk>", 2), ("<s>", 3), *((text, 6) for text in _BYTE_TOKENS), ("▁", 1), ("a", 1), ("▁a", 4)])
    valid = model.SerializeToString()

    def mutate(rng: Random) -> bytes:
        changed = type(model).FromString(valid)
        for _ in range(rng.choice((1, 2))):
            piece = rng.choice(changed.pieces)
            edit = rng.randrange(4)
            if edit == 0:
                piece.piece = rng.choice(("", "a", "\0", "▁▁", "a" * 300, "<0x00>"))
            elif edit == 1:
                piece.score = rng.choice((math.nan, math.inf, -1e30, 1.0))
            elif edit == 2:
                piece.type = rng.choice((1, 2, 3, 4, 5, 6))
            else:
                changed.pieces.remove(piece)
        raw = changed.SerializeToString()
        return mutate_bytes(rng, raw) if rng.random() < 0.5 else raw

    return Seed("tokenizer.model", valid, mutate, {"added_tokens.json": b'{"<x>": 260}'})


@cache
def _tokenizer_seeds() -> list[Seed]:
    tokenizer, config = json.dumps(_byte_level_tree()).encode(), json.dumps(_TOKENIZER_CONFIG).encode()
    model = _sentencepiece_seed()
    return [
        _of_tree("tokenizer.json", _byte_level_tree(), beside={"tokenizer_config.json": config}),
        Seed("tokenizer.json", json.dumps(_byte_fallback_tree(), ensure_ascii=False, separators=(",", ":")).encode(), _mutate_byte_fallback),
        _of_tree("tokenizer_config.json", _TOKENIZER_CONFIG, beside={"tokenizer.json": tokenizer}),
        model,
        _of_tree("added_tokens.json", {"<x>": 261, "<y>": 262}, beside={"tokenizer.model": model.valid}),
        _of_bytes("chat_template.jinja", b"{% for m in messages %}{{ m.content }}{% endfor %}", beside={"tokenizer.json": tokenizer}),
    ]


def _mutate_byte_fallback(rng: Random) -> bytes:
    return spell_json(rng, mutate_tree(rng, _byte_fallback_tree()))


def _parse_tokenizer(path: Path) -> None:
    found = vocabulary.read_vocabulary(path.parent, {"model_type": "llama", "pad_token_id": -1}, _N_VOCAB)
    container.plan_layout(found.metadata, [])  # what was read can be written


# --- the parsers --------------------------------------------------------------------------------------------------------


def _stages(*places: tuple[Any, str]) -> tuple[Stage, ...]:
    return tuple(Stage(label, owner, name) for label, (owner, name) in zip(STAGES, places, strict=False))


# the places behind which magic, header and tensor table are past
_READ_GGUF = ((container, "_read_preamble"), (container, "_read_metadata"), (container, "_read_tensors"))
_READ_DAT = ((statistics._Legacy, "number"), (statistics._Legacy, "entry"), (statistics, "_load_legacy"))
_READ_SAFETENSORS = ((safetensor, "_read_header"), (safetensor, "parse_object"), (safetensor, "read_safetensors"))
_READ_INDEX = ((safetensor, "load_json"), (safetensor, "_read_index"), (safetensor, "read_safetensors"))
_READ_CONFIG = ((documents, "load_json"), (architectures, "find_family"), (architectures, "read_hyperparameters"))
_READ_PROFILE = ((profile._Loader, "get_single_data"), (profile, "_check_keys"), (profile, "_rule"))
_READ_PLAN = ((planfile, "load_json"), (planfile, "_checked"), (planfile, "_parse_row"))
_READ_TEXT = ((corpus, "_file_part"), (corpus, "_decode"), (corpus, "_to_row"))
_READ_GRAMS = ((safetensor, "_read_header"), (safetensor, "parse_object"), (grams, "_read_split"))
_READ_TASK = ((tasks, "read_whole"), (tasks, "parse_json"), (tasks, "_parse_row"))
_READ_TOKENIZER = ((vocabulary, "read_files"), (vocabulary, "_read_tokens"), (vocabulary, "_check_texts"))

PARSERS: Mapping[str, Parser] = {
    parser.name: parser
    for parser in (
        Parser("gguf", _gguf_seeds, _parse_gguf, _stages(*_READ_GGUF)),
        Parser("imatrix-gguf", _imatrix_gguf_seeds, _parse_imatrix, _stages(*_READ_GGUF)),
        Parser("imatrix-dat", _imatrix_dat_seeds, _parse_imatrix, _stages(*_READ_DAT)),
        Parser("safetensors", _safetensors_seeds, _parse_safetensors, _stages(*_READ_SAFETENSORS)),
        Parser("index", _index_seeds, lambda path: safetensor.read_weights(path.parent), _stages(*_READ_INDEX)),
        Parser("config", _config_seeds, _parse_config, _stages(*_READ_CONFIG)),
        Parser("profile", _profile_seeds, _parse_profile, _stages(*_READ_PROFILE)),
        Parser("plan", _plan_seeds, planfile.load_plan, _stages(*_READ_PLAN)),
        Parser("calibration", _calibration_seeds, _parse_calibration, _stages(*_READ_TEXT)),
        Parser("task", _task_seeds, tasks.load_task, _stages(*_READ_TASK)),
        Parser("grams", _gram_seeds, _parse_grams, _stages(*_READ_GRAMS)),
        Parser("tokenizer", _tokenizer_seeds, _parse_tokenizer, _stages(*_READ_TOKENIZER)),
    )
}


class Recorder:
    """Knows, while it is entered, which stages of a parser an input got past: `passed`, to be cleared before each."""

    def __init__(self, parser: Parser) -> None:
        self.parser, self.passed = parser, set[str]()
        self._stack = contextlib.ExitStack()

    def _watch(self, stage: Stage) -> None:
        original = getattr(stage.owner, stage.name)

        def watched(*arguments: Any, **options: Any) -> Any:
            result = original(*arguments, **options)
            self.passed.add(stage.label)
            return result

        setattr(stage.owner, stage.name, watched)
        self._stack.callback(setattr, stage.owner, stage.name, original)

    def __enter__(self) -> Recorder:
        for stage in self.parser.stages:
            self._watch(stage)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def lay_out(scratch: Path, seeds: Sequence[Seed]) -> list[Path]:
    """Make a folder for each seed, with the files that lie beside it, and return them."""
    folders = []
    for i, seed in enumerate(seeds):
        folders.append(scratch / str(i))
        folders[-1].mkdir()
        for name, raw in seed.beside.items():
            (folders[-1] / name).write_bytes(raw)
    return folders


class Finding(Exception):
    """What a parser must not do: any other exception, a message that is not one short printable line, or a file left behind."""


def check_one(parser: Parser, folder: Path, seed: Seed, mutant: bytes) -> bool:
    """Give one mutant to a parser in a folder that holds the seed's other files; return whether it was accepted.

    Raises Finding, with the cause, for everything but a return and a `LoopggufError` whose text is one printable line.
    """
    path = folder / seed.file_name
    path.write_bytes(mutant)
    accepted = True
    try:
        parser.parse(path)
    except LoopggufError as error:
        accepted, message = False, str(error)
        if not message.isprintable() or len(message) > MAX_MESSAGE_CHARACTERS:
            raise Finding(f"message of {len(message)} characters: {message!r:.300}") from error
    except Exception as error:
        raise Finding(f"{type(error).__name__}: {error!s:.300}") from error
    left = {entry.name for entry in folder.iterdir()} - {seed.file_name, *seed.beside}
    if left:
        raise Finding(f"left behind: {sorted(left)}")
    return accepted
