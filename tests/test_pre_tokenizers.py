"""The name of a pre-tokenizer, from the structure of tokenizer.json; that each name is right is proven with llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tiny_tokenizers import N_BPE, data, edit_json, train_byte_level, write_byte_level
from tokenizers import normalizers

from loopgguf.errors import InputError
from loopgguf.pre_tokenizers import PRE_TOKENIZERS, find_pre_tokenizer
from loopgguf.proof import prove_vocabulary
from loopgguf.vocabulary import read_vocabulary


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_byte_level(tmp_path)


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_every_known_pre_tokenizer_is_found_and_proven(name: str, tmp_path: Path) -> None:
    """Would catch a regex in the table that is not what llama.cpp does under that name: the ids would differ."""
    normalizer = normalizers.NFC() if name == "qwen2" else None
    tokenizer = train_byte_level(PRE_TOKENIZERS[name], normalizer=normalizer, ignore_merges=name in ("llama-bpe", "tekken"))
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = read_vocabulary(tmp_path, {"eos_token_id": 2}, N_BPE)
    assert data(vocabulary, "pre") == name
    limitation = {"qwen2": "normalizes text to NFC", "tekken": "combining marks", "gpt-4o": "combining marks"}
    notes = [note for note in prove_vocabulary(tmp_path, vocabulary.metadata) if "vocabulary entries" not in note]
    assert [limitation[name] in note for note in notes] == [True] * (name in limitation)


def byte_level_parts(pre_tokenizer: object, **model: object) -> dict[str, object]:
    return {"pre_tokenizer": pre_tokenizer, "model": {"type": "BPE", **model}}


def test_find_pre_tokenizer_from_spellings() -> None:
    """Would catch an equal structure in another spelling that is not recognized, and the two settings beside the splits."""
    digits = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel", "add_prefix_space": False}]}
    assert find_pre_tokenizer(byte_level_parts({"type": "ByteLevel", "add_prefix_space": False})) == "gpt-2"
    assert find_pre_tokenizer(byte_level_parts(digits)) == "smollm"
    assert find_pre_tokenizer(byte_level_parts(digits), clean_spaces=True) == "starcoder"
    split = {"type": "Split", "pattern": {"Regex": PRE_TOKENIZERS["llama-bpe"][0]}, "behavior": "Removed", "invert": True}
    words = {"type": "Sequence", "pretokenizers": [split, {"type": "ByteLevel", "use_regex": False}]}
    assert find_pre_tokenizer(byte_level_parts(words, ignore_merges=True)) == "llama-bpe"
    assert find_pre_tokenizer(byte_level_parts(words)) == "smaug-bpe"
    newlines = {"type": "Split", "pattern": {"Regex": "[\r\n]"}, "behavior": "Isolated"}
    rest = [{"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated"} for regex in PRE_TOKENIZERS["deepseek-coder"][1:]]
    coder = {"type": "Sequence", "pretokenizers": [newlines, *rest, {"type": "ByteLevel", "use_regex": False}]}
    assert find_pre_tokenizer(byte_level_parts(coder)) == "deepseek-coder"


def test_unknown_pre_tokenizer_names_the_nearest_and_the_way_out(folder: Path) -> None:
    """Would catch a silent default: llama.cpp's "default" splits differently from every modern tokenizer."""

    def four_digits(parsed: dict[str, Any]) -> None:
        pattern = parsed["pre_tokenizer"]["pretokenizers"][0]["pattern"]
        pattern["Regex"] = pattern["Regex"].replace("{1,3}", "{1,4}")

    edit_json(folder / "tokenizer.json", four_digits)
    with pytest.raises(InputError, match=r"unknown pre-tokenizer in .*tokenizer\.json.*structure [0-9a-f]{16}.*Nearest known: llama-bpe.*--pre-tokenizer NAME"):
        read_vocabulary(folder, {}, N_BPE)
    vocabulary = read_vocabulary(folder, {}, N_BPE, "llama-bpe")
    assert data(vocabulary, "pre") == "llama-bpe"
    notes = prove_vocabulary(folder, vocabulary.metadata, forced=True)
    assert "differ at token" in notes[0]
