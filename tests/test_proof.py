"""The proof of a vocabulary against llama.cpp: what passes, what is noted, what is refused, and the child process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tiny_tokenizers import (
    LLAMA_CONFIG,
    N_BPE,
    N_SPM,
    converted_from_sentencepiece,
    data,
    train_byte_level,
    write_byte_level,
    write_sentencepiece,
)
from tokenizers import AddedToken, Tokenizer, normalizers, pre_tokenizers

from loopgguf.container import boolean, string, uint32
from loopgguf.errors import InputError
from loopgguf.pre_tokenizers import PRE_TOKENIZERS
from loopgguf.proof import prove_vocabulary
from loopgguf.vocabulary import TokenType, read_vocabulary


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_byte_level(tmp_path)


# --- byte-level BPE ---------------------------------------------------------------------------------------------------


def test_wrong_pre_tokenizer_is_stopped_by_the_proof(folder: Path) -> None:
    """Would catch a proof that proves nothing: one digit a token against three."""
    vocabulary = read_vocabulary(folder, {}, N_BPE, "qwen2")
    with pytest.raises(InputError, match=r"'qwen2' differ at token \d+ of '0 7 42.*: got .*\[.*\], expected .*\[.*\]\. Pass --pre-tokenizer NAME"):
        prove_vocabulary(folder, vocabulary.metadata)


def test_name_that_llama_cpp_does_not_know_is_one_line(folder: Path) -> None:
    """Would catch the abort or traceback of the child reaching the user."""
    vocabulary = read_vocabulary(folder, {}, N_BPE, "no-such-name")
    with pytest.raises(InputError, match=r"could not be compared.*llama\.cpp cannot load"):
        prove_vocabulary(folder, vocabulary.metadata)


def test_nfc_differences_are_noted_not_refused(tmp_path: Path) -> None:
    """Would catch the refusal of every Qwen model, and a proof that hides a real difference behind NFC."""
    train_byte_level(PRE_TOKENIZERS["qwen2"], normalizer=normalizers.NFC()).save(str(tmp_path / "tokenizer.json"))
    vocabulary = read_vocabulary(tmp_path, {}, N_BPE)
    (note,) = prove_vocabulary(tmp_path, vocabulary.metadata)
    assert note.startswith("tokenizer.json normalizes text to NFC, which llama.cpp does not")
    wrong = vocabulary.metadata | {"tokenizer.ggml.pre": string("gpt-2")}
    with pytest.raises(InputError, match="differ at token"):
        prove_vocabulary(tmp_path, wrong)


def test_truncation_and_padding_of_tokenizer_json_do_not_matter(folder: Path) -> None:
    """Would catch a published tokenizer.json with a truncation length making every long line differ."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=16)
    tokenizer.save(str(folder / "tokenizer.json"))
    assert prove_vocabulary(folder, read_vocabulary(folder, {}, N_BPE).metadata) == ()


# --- SentencePiece ----------------------------------------------------------------------------------------------------


def write_llama2(folder: Path, *, legacy: bool) -> None:
    """Write the tokenizer files of a Llama 2 or Mistral folder, as transformers saves them: both kinds side by side."""
    model = write_sentencepiece(folder, control_symbols="[INST],[/INST]")
    tokenizer = converted_from_sentencepiece(model)
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("[INST]", "[/INST]")])
    if not legacy:
        tokenizer.normalizer = None
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.save(str(folder / "tokenizer.json"))
    special = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]")
    config = {
        "tokenizer_class": "LlamaTokenizer",
        "legacy": legacy,
        "add_prefix_space": None,
        "add_bos_token": True,
        "add_eos_token": False,
        "added_tokens_decoder": {str(token): {"content": text, "special": True} for token, text in enumerate(special)},
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("legacy", [True, False])
def test_llama_2_folder_with_both_files(legacy: bool, tmp_path: Path) -> None:
    """Would catch the refusal of every Llama 2 and Mistral folder, or scores of tokenizer.model that contradict the
    merges of tokenizer.json. Where spaces go without `legacy` is another matter in llama.cpp, and noted."""
    write_llama2(tmp_path, legacy=legacy)
    vocabulary = read_vocabulary(tmp_path, LLAMA_CONFIG, N_SPM)
    assert (data(vocabulary, "model"), data(vocabulary, "add_bos_token"), vocabulary.notes) == ("llama", True, ())
    assert data(vocabulary, "tokens")[3:5] == ["[INST]", "[/INST]"]
    assert data(vocabulary, "token_type")[1:5] == [TokenType.CONTROL] * 4
    notes = prove_vocabulary(tmp_path, vocabulary.metadata)
    expected = () if legacy else ("tokenizer.json puts a space in front", "text beside control tokens")
    assert [note.startswith(start) for note, start in zip(notes, expected, strict=True)] == [True] * len(expected)
    wrong = dict(vocabulary.metadata)
    wrong["tokenizer.ggml.add_space_prefix"] = boolean(False)
    with pytest.raises(InputError, match="differ at token"):
        prove_vocabulary(tmp_path, wrong)


def test_metaspace_first_is_a_noted_limitation(tmp_path: Path) -> None:
    """Would catch the refusal of tokenizers with `legacy: false`, whose spaces llama.cpp puts elsewhere."""
    model = write_sentencepiece(tmp_path)
    tokenizer = converted_from_sentencepiece(model)
    model.unlink()
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    notes = prove_vocabulary(tmp_path, read_vocabulary(tmp_path, LLAMA_CONFIG, N_SPM).metadata)
    assert "Metaspace" in notes[0]
    assert "beside control tokens" in notes[1]


# --- the child process ------------------------------------------------------------------------------------------------


def test_proof_child_runs_nothing_of_the_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch `python -m` importing a module that a model folder brings along, when it is the working folder."""
    vocabulary = read_vocabulary(folder, {}, N_BPE)
    for name in ("json.py", "tokenizers.py", "numpy.py", "llama_cpp.py"):
        (folder / name).write_text(f"open({str(folder / 'executed')!r}, 'w')\nraise SystemExit(0)\n", encoding="utf-8")
    monkeypatch.chdir(folder)
    assert prove_vocabulary(folder, vocabulary.metadata) == ()
    assert not (folder / "executed").exists()


def test_proof_takes_the_metadata_of_a_whole_model(folder: Path) -> None:
    """Would catch a vocab-only load that trips over hyper-parameters, as the workflow passes them all."""
    extra = {"general.architecture": string("qwen2"), "qwen2.block_count": uint32(2), "qwen2.context_length": uint32(64)}
    assert prove_vocabulary(folder, {**extra, **read_vocabulary(folder, {}, N_BPE).metadata}) == ()
