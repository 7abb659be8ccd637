"""Metadata at which llama.cpp would end the process, or read behind an array, is refused before it is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from tiny_llama import N_VOCAB, write_tiny_llama

from loopgguf.container import Value, ValueType, array, float32, read_gguf, string, uint32, write_gguf
from loopgguf.errors import InputError
from loopgguf.llama import Model
from loopgguf.runnable import check_runnable

INTEGERS = array(ValueType.INT32, range(N_VOCAB))
# changes of the metadata of a model that runs, and what is said of them
METADATA: dict[str, tuple[Mapping[str, Value | None], list[str]]] = {
    "block_count 0": ({"llama.block_count": uint32(0)}, ["block_count"]),
    "2^32 - 1 layers": ({"llama.block_count": uint32(2**32 - 1)}, ["block_count", "4294967295"]),
    "no tokens": ({"tokenizer.ggml.tokens": None}, ["tokenizer"]),
    "tokens are numbers": ({"tokenizer.ggml.tokens": INTEGERS}, ["tokenizer.ggml.tokens", "array of STRING"]),
    "tokens are a text": ({"tokenizer.ggml.tokens": string("abc")}, ["tokenizer.ggml.tokens", "got STRING"]),
    "scores are integers": ({"tokenizer.ggml.scores": INTEGERS}, ["tokenizer.ggml.scores", "array of FLOAT32"]),
    "scores are missing": ({"tokenizer.ggml.scores": array(ValueType.FLOAT32, [0.0])}, ["tokenizer.ggml.scores", "got 1 values"]),
    "types are missing": ({"tokenizer.ggml.token_type": array(ValueType.INT32, [])}, ["tokenizer.ggml.token_type", "got 0 values"]),
    "types are texts": ({"tokenizer.ggml.token_type": array(ValueType.STRING, ["a"] * N_VOCAB)}, ["tokenizer.ggml.token_type", "array of INT32"]),
    "merges are numbers": (
        {"tokenizer.ggml.model": string("gpt2"), "tokenizer.ggml.pre": string("gpt-2"), "tokenizer.ggml.merges": INTEGERS},
        ["tokenizer.ggml.merges", "array of STRING"],
    ),
    "a token twice": ({"tokenizer.ggml.tokens": array(ValueType.STRING, ["a"] * N_VOCAB)}, ["token 'a'", "as 0 and as 1"]),
    "a token twice up to its NUL": ({"tokenizer.ggml.tokens": array(ValueType.STRING, [f"a\0{i}" for i in range(N_VOCAB)])}, ["token 'a'"]),
    "no token for a byte": ({"tokenizer.ggml.tokens": array(ValueType.STRING, [f"<0x{n:02X}>" for n in range(1, N_VOCAB + 1)])}, ["the byte 0x00"]),
    "unknown rope scaling": ({"llama.rope.scaling.type": string("1/0")}, ["rope.scaling.type", "got 1/0"]),
    "negative epsilon": ({"llama.attention.layer_norm_rms_epsilon": float32(-1.0)}, ["epsilon"]),
    "epsilon is NaN": ({"llama.attention.layer_norm_rms_epsilon": float32(float("nan"))}, ["epsilon"]),
    "experts without end": ({"llama.expert_count": uint32(2**31)}, ["expert_count"]),
    "experts that are not used": ({"llama.expert_count": uint32(4)}, ["expert"]),
    "more experts used than there are": ({"llama.expert_used_count": uint32(4)}, ["expert"]),
    "more experts used in a layer than there are": ({"llama.expert_used_count": array(ValueType.UINT32, [4])}, ["expert"]),
}


@pytest.mark.parametrize(("changes", "words"), METADATA.values(), ids=METADATA.keys())
def test_what_llama_cpp_does_not_survive(tmp_path: Path, changes: Mapping[str, Value | None], words: list[str]) -> None:
    """`GGML_ASSERT` in place of a line of ours, on every way to a loaded model."""
    path = write_tiny_llama(tmp_path / "tiny.gguf", changes=changes)
    for load in (lambda: check_runnable(read_gguf(path)), lambda: Model(path), lambda: Model(path, vocab_only=True)):
        with pytest.raises(InputError) as caught:
            load()
        assert all(word in str(caught.value) for word in words), caught.value


RUNNING: dict[str, Mapping[str, Value | None]] = {
    "as it is": {},
    "scores left out": {"tokenizer.ggml.scores": None},
    "more scores than tokens": {"tokenizer.ggml.scores": array(ValueType.FLOAT32, [0.0] * (N_VOCAB + 1))},
    "a rope scaling": {"llama.rope.scaling.type": string("linear"), "llama.rope.scaling.factor": float32(2.0)},
    "an epsilon of 0": {"llama.attention.layer_norm_rms_epsilon": float32(0.0)},
    "no experts": {"llama.expert_count": uint32(0), "llama.expert_used_count": uint32(0)},
    "no experts, layer by layer": {"llama.expert_used_count": array(ValueType.UINT32, [0])},
}


@pytest.mark.parametrize("changes", RUNNING.values(), ids=RUNNING.keys())
def test_what_llama_cpp_runs_is_passed(tmp_path: Path, changes: Mapping[str, Value | None]) -> None:
    """A check that is stricter than llama.cpp, and takes working models from their users."""
    path = write_tiny_llama(tmp_path / "tiny.gguf", changes=changes)
    check_runnable(read_gguf(path))
    with Model(path) as model:
        assert model.n_vocab == N_VOCAB


def test_files_that_are_no_models_are_passed(tmp_path: Path) -> None:
    """A vocabulary without sizes, or a file without any vocabulary, refused for keys that it does not need."""
    metadata = {"general.architecture": string("llama"), "tokenizer.ggml.model": string("no_vocab")}
    write_gguf(tmp_path / "none.gguf", metadata, [])
    check_runnable(read_gguf(tmp_path / "none.gguf"))
    write_gguf(tmp_path / "empty.gguf", {}, [])
    check_runnable(read_gguf(tmp_path / "empty.gguf"))
