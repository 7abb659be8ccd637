"""Tokenizer files → tokenizer.* keys, proven against llama.cpp; tokenizers are trained here on the torture text."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from loopgguf.container import ValueType, read_gguf, string, uint32, write_gguf
from loopgguf.errors import InputError
from loopgguf.llama import Model
from loopgguf.vocabulary import PRE_TOKENIZERS, TORTURE_TEXT, TokenType, Vocabulary, find_pre_tokenizer, prove_vocabulary, read_vocabulary

LLAMA_CONFIG = {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}
N_BPE = 700
N_SPM = 1200
EDIT = Callable[[dict[str, Any]], None]


def data(vocabulary: Vocabulary, key: str) -> Any:
    return vocabulary.metadata[f"tokenizer.ggml.{key}"].data


def train_byte_level(steps: tuple[str, ...], *, normalizer: normalizers.Normalizer | None = None, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    splits = [pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=N_BPE - 20, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(TORTURE_TEXT, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


@pytest.fixture(scope="module")
def byte_level_json() -> str:
    """A byte-level tokenizer.json with Llama 3's splits."""
    return train_byte_level(PRE_TOKENIZERS["llama-bpe"], ignore_merges=True).to_str()


@pytest.fixture
def folder(tmp_path: Path, byte_level_json: str) -> Path:
    (tmp_path / "tokenizer.json").write_text(byte_level_json, encoding="utf-8")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}}), encoding="utf-8")
    return tmp_path


@pytest.fixture(scope="module")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BPE tokenizer.model with byte fallback and no normalization, as Llama 2's is."""
    scratch = tmp_path_factory.mktemp("spm")
    (scratch / "text.txt").write_text("\n".join(TORTURE_TEXT), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(scratch / "text.txt"),
        model_prefix=str(scratch / "tokenizer"),
        vocab_size=N_SPM - 20,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        split_digits=True,
        minloglevel=2,
    )
    return scratch / "tokenizer.model"


def converted_from_sentencepiece(model: Path) -> Tokenizer:
    """A tokenizer.json as transformers converts a BPE tokenizer.model: all splits of a piece are merges, by its score."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocab = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    splits = [
        (text[:i], text[i:], processor.get_score(token))
        for text, token in vocab.items()
        for i in range(1, len(text))
        if text[:i] in vocab and text[i:] in vocab
    ]
    merges = [(left, right) for left, right, score in sorted(splits, key=lambda split: (-split[2], vocab[split[0]], vocab[split[1]]))]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
    return tokenizer


def edit_json(path: Path, edit: EDIT) -> None:
    parsed = json.loads(path.read_text(encoding="utf-8"))
    edit(parsed)
    path.write_text(json.dumps(parsed), encoding="utf-8")


# --- the demo model: hand-checked keys --------------------------------------------------------------------------------


def test_demo_model_keys(demo_model: Path) -> None:
    """Would catch a key that llama.cpp's converter writes and we do not, or another value.

    The list was compared with that converter's output; tokens, types and merges were equal too.
    """
    config = json.loads((demo_model / "config.json").read_text(encoding="utf-8"))
    vocabulary = read_vocabulary(demo_model, config, 4096)
    small = {key.removeprefix("tokenizer.ggml."): value.data for key, value in vocabulary.metadata.items() if not isinstance(value.data, list)}
    assert small == {"model": "gpt2", "pre": "llama-bpe", "bos_token_id": 0, "eos_token_id": 1, "add_bos_token": True, "add_sep_token": False}
    assert data(vocabulary, "tokens")[:2] == ["<|begin_of_text|>", "<|end_of_text|>"]
    assert data(vocabulary, "token_type")[:3] == [TokenType.CONTROL, TokenType.CONTROL, TokenType.NORMAL]
    assert data(vocabulary, "merges")[:3] == ["Ġ t", "Ġ Ġ", "h e"]
    assert len(data(vocabulary, "merges")) == 3838
    assert vocabulary.metadata["tokenizer.ggml.token_type"].item_type is ValueType.INT32
    assert vocabulary.notes == ()
    assert prove_vocabulary(demo_model, vocabulary.metadata) == ()


# --- pre-tokenizers ---------------------------------------------------------------------------------------------------


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


# --- byte-level BPE ---------------------------------------------------------------------------------------------------


def test_padding_types_and_special_tokens(folder: Path) -> None:
    """Would catch fillers at the wrong ids, an added token taken for text, and special tokens found by the wrong file."""
    vocabulary = read_vocabulary(folder, {"eos_token_id": 0, "unk_token_id": [0, 1]}, N_BPE)
    tokens, types = data(vocabulary, "tokens"), data(vocabulary, "token_type")
    n_known = tokens.index("<think>") + 1
    assert types[:4] == [TokenType.CONTROL] * 3 + [TokenType.NORMAL]
    assert types[n_known - 1] == TokenType.USER_DEFINED
    assert tokens[n_known:] == [f"[PAD{i}]" for i in range(n_known, N_BPE)]
    assert types[n_known:] == [TokenType.UNUSED] * (N_BPE - n_known)
    assert (data(vocabulary, "eos_token_id"), data(vocabulary, "padding_token_id")) == (2, 0)
    assert "tokenizer.ggml.unknown_token_id" not in vocabulary.metadata
    assert prove_vocabulary(folder, vocabulary.metadata) == ()


def test_merges_as_strings_and_as_pairs_are_the_same(folder: Path) -> None:
    """Would catch the older spelling of merges; transformers 4.45 changed it."""
    pairs = data(read_vocabulary(folder, {}, N_BPE), "merges")
    edit_json(folder / "tokenizer.json", lambda parsed: parsed["model"].update(merges=[" ".join(pair) for pair in parsed["model"]["merges"]]))
    assert data(read_vocabulary(folder, {}, N_BPE), "merges") == pairs


def test_merges_beyond_one_run_and_with_escapes(tmp_path: Path) -> None:
    """Would catch merges lost where the list is cut into runs, and brackets or quotes inside of tokens."""
    alphabet = ["a", "b", '"', "]", "[", ",", "\\", "é"]
    vocab = {text: token for token, text in enumerate(alphabet)}
    merges = []
    for left in alphabet:
        for right in alphabet:
            merges.append([left, right])
            vocab[left + right] = len(vocab)
    longer = [[left, right] for left in list(vocab)[8:] for right in list(vocab)[8:]]
    for left, right in longer:
        vocab.setdefault(left + right, len(vocab))
    parsed = {"model": {"type": "BPE", "vocab": vocab, "merges": merges + longer}, "pre_tokenizer": {"type": "ByteLevel"}, "added_tokens": []}
    for indent in (None, 2):
        (tmp_path / "tokenizer.json").write_text(json.dumps(parsed, indent=indent), encoding="utf-8")
        vocabulary = read_vocabulary(tmp_path, {}, len(vocab))
        assert data(vocabulary, "merges") == [f"{left} {right}" for left, right in merges + longer]
    assert len(merges + longer) > 4096


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


# --- BOS and the other flags ------------------------------------------------------------------------------------------


def test_bos_default_of_llama_cpp_is_corrected(folder: Path) -> None:
    """Would catch llama.cpp adding BOS (its default for llama-bpe) where the tokenizer adds none."""
    edit_json(folder / "tokenizer.json", lambda parsed: parsed.update(post_processor=None))
    vocabulary = read_vocabulary(folder, {"bos_token_id": 1}, N_BPE)
    assert data(vocabulary, "add_bos_token") is False
    assert vocabulary.notes == ("add_bos_token is set to false: tokenizer.json adds no BOS token, llama.cpp would by default",)
    assert prove_vocabulary(folder, vocabulary.metadata) == ()
    without_key = {key: value for key, value in vocabulary.metadata.items() if not key.endswith("add_bos_token")}
    (note,) = prove_vocabulary(folder, without_key)
    assert note.startswith("special tokens around a text differ")


def test_flags_from_a_template_with_bos_and_eos(folder: Path) -> None:
    """Would catch a template read wrongly: BOS and EOS around, and the old EOS kept as EOT (as upstream does)."""
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    special = [("<|im_start|>", 1), ("<|endoftext|>", 0)]
    tokenizer.post_processor = processors.TemplateProcessing(single="<|im_start|> $A <|endoftext|>", special_tokens=special)
    tokenizer.save(str(folder / "tokenizer.json"))
    vocabulary = read_vocabulary(folder, {}, N_BPE)
    assert data(vocabulary, "add_bos_token") is True
    assert data(vocabulary, "add_eos_token") is True
    assert (data(vocabulary, "bos_token_id"), data(vocabulary, "eos_token_id"), data(vocabulary, "eot_token_id")) == (1, 0, 2)
    assert prove_vocabulary(folder, vocabulary.metadata) == ()


def test_special_ids_outside_the_vocabulary_are_noted(folder: Path) -> None:
    """Would catch `pad_token_id: -1` of early Llama configs stopping a conversion, or reaching the GGUF."""
    vocabulary = read_vocabulary(folder, {"bos_token_id": N_BPE, "mask_token_id": -1}, N_BPE)
    assert [note.split()[0] for note in vocabulary.notes] == ["bos_token_id", "mask_token_id"]
    assert "tokenizer.ggml.bos_token_id" not in vocabulary.metadata


# --- SentencePiece ----------------------------------------------------------------------------------------------------


def test_sentencepiece_model(sentencepiece_model: Path, tmp_path: Path) -> None:
    """Would catch wrong types or scores of pieces, and added tokens that do not replace or extend them."""
    shutil.copy(sentencepiece_model, tmp_path / "tokenizer.model")
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<extra>": N_SPM - 20, "<beyond>": N_SPM}), encoding="utf-8")
    decoder = {str(N_SPM - 19): {"content": "▁hello▁", "special": False}, "1": {"content": "<bos>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder, "add_prefix_space": True}), encoding="utf-8")
    vocabulary = read_vocabulary(tmp_path, LLAMA_CONFIG, N_SPM)
    tokens, types, scores = (data(vocabulary, key) for key in ("tokens", "token_type", "scores"))
    assert (data(vocabulary, "model"), data(vocabulary, "pre"), data(vocabulary, "add_space_prefix")) == ("llama", "default", True)
    assert list(zip(tokens[:4], types[:4], scores[:4], strict=True)) == [
        ("<unk>", TokenType.UNKNOWN, 0.0),
        ("<bos>", TokenType.CONTROL, -1000.0),
        ("</s>", TokenType.CONTROL, 0.0),
        ("<0x00>", TokenType.BYTE, 0.0),
    ]
    assert (tokens[N_SPM - 20], types[N_SPM - 20], scores[N_SPM - 20]) == ("<extra>", TokenType.USER_DEFINED, -1000.0)
    assert tokens[N_SPM - 19] == " hello "
    assert (tokens[-1], types[-1]) == (f"[PAD{N_SPM - 1}]", TokenType.UNUSED)
    assert vocabulary.notes == (f"1 tokens of {tmp_path} beyond the {N_SPM} rows of the embedding were left out: the model cannot see them",)
    assert prove_vocabulary(tmp_path, vocabulary.metadata) == ()


def test_sentencepiece_without_dummy_prefix(tmp_path: Path) -> None:
    """Would catch llama.cpp putting a space in front where the model does not."""
    (tmp_path / "text.txt").write_text("\n".join(TORTURE_TEXT), encoding="utf-8")
    options = {"byte_fallback": True, "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "add_dummy_prefix": False, "minloglevel": 2}
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=1100, model_type="bpe", character_coverage=0.98, **options
    )
    vocabulary = read_vocabulary(tmp_path, {}, 1100)
    assert data(vocabulary, "add_space_prefix") is False
    assert prove_vocabulary(tmp_path, vocabulary.metadata) == ()


def test_tokenizer_json_alone_with_byte_fallback(sentencepiece_model: Path, tmp_path: Path) -> None:
    """Would catch the trap of equal scores: with -1000 for all tokens, llama.cpp merges from the left, not by rank."""
    converted_from_sentencepiece(sentencepiece_model).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}), encoding="utf-8")
    vocabulary = read_vocabulary(tmp_path, LLAMA_CONFIG, N_SPM)
    assert (data(vocabulary, "model"), data(vocabulary, "unknown_token_id"), data(vocabulary, "add_bos_token")) == ("llama", 0, True)
    assert max(data(vocabulary, "scores")[259:]) == 0.0
    assert prove_vocabulary(tmp_path, vocabulary.metadata) == ()
    flat = dict(vocabulary.metadata)
    flat["tokenizer.ggml.scores"] = type(flat["tokenizer.ggml.scores"])(ValueType.ARRAY, [-1000.0] * N_SPM, ValueType.FLOAT32)
    with pytest.raises(InputError, match="differ at token"):
        prove_vocabulary(tmp_path, flat)


def test_metaspace_first_is_a_noted_limitation(sentencepiece_model: Path, tmp_path: Path) -> None:
    """Would catch the refusal of tokenizers with `legacy: false`, whose spaces llama.cpp puts elsewhere."""
    tokenizer = converted_from_sentencepiece(sentencepiece_model)
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    notes = prove_vocabulary(tmp_path, read_vocabulary(tmp_path, LLAMA_CONFIG, N_SPM).metadata)
    assert "Metaspace" in notes[0]
    assert "beside control tokens" in notes[1]


def test_sentencepiece_without_byte_tokens_is_refused(tmp_path: Path) -> None:
    """Would catch a file at which llama.cpp ends the process at the first unknown character."""
    (tmp_path / "text.txt").write_text("\n".join(TORTURE_TEXT[:2]), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / "tokenizer"), vocab_size=60, model_type="bpe", minloglevel=2
    )
    with pytest.raises(InputError, match=r"wrong byte tokens in .*tokenizer\.model: got 0 of the type BYTE, expected all 256"):
        read_vocabulary(tmp_path, {}, 60)


# --- chat templates ---------------------------------------------------------------------------------------------------


def test_chat_template_places_and_names(folder: Path) -> None:
    """Would catch a template lost or taken from the wrong place: file, then tokenizer_config.json, then chat_template.json."""

    def read() -> dict[str, object]:
        metadata = read_vocabulary(folder, {}, N_BPE).metadata
        return {key: value.data for key, value in metadata.items() if "chat_template" in key}

    assert read() == {}
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": "legacy"}), encoding="utf-8")
    assert read() == {"tokenizer.chat_template": "legacy"}
    named = [{"name": "default", "template": "main"}, {"name": "tool use", "template": "tools"}]
    edit_json(folder / "tokenizer_config.json", lambda parsed: parsed.update(chat_template=named))
    assert read() == {"tokenizer.chat_template": "main", "tokenizer.chat_template.tool_use": "tools", "tokenizer.chat_templates": ["tool_use"]}
    (folder / "chat_template.jinja").write_text("{{ 'A' * 300000000 }}", encoding="utf-8")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("with documents", encoding="utf-8")
    assert read() == {
        "tokenizer.chat_template": "{{ 'A' * 300000000 }}",
        "tokenizer.chat_template.rag": "with documents",
        "tokenizer.chat_templates": ["rag"],
    }


# --- hostile files ----------------------------------------------------------------------------------------------------

HOSTILE_EDITS: dict[str, tuple[EDIT, str]] = {
    "model type": (lambda t: t["model"].update(type="Unigram"), r"wrong model\.type in .*tokenizer\.json: got Unigram, expected BPE"),
    "no model": (lambda t: t.pop("model"), r"wrong model\.type"),
    "vocab is a list": (lambda t: t["model"].update(vocab=["a"]), r"wrong model\.vocab"),
    "id beyond": (lambda t: t["model"]["vocab"].update(zzz=N_BPE), rf"wrong model\.vocab\['zzz'\].*got {N_BPE}, expected an id from 0 to {N_BPE - 1}"),
    "id negative": (lambda t: t["model"]["vocab"].update(zzz=-1), r"wrong model\.vocab\['zzz'\]"),
    "id is true": (lambda t: t["model"]["vocab"].update(zzz=True), r"wrong model\.vocab\['zzz'\]"),
    "id is text": (lambda t: t["model"]["vocab"].update(zzz="9"), r"wrong model\.vocab\['zzz'\]"),
    "id twice": (lambda t: t["model"]["vocab"].update(zzz=300), r"wrong model\.vocab\['zzz'\].*got id 300, which .* has too"),
    "added beyond": (lambda t: t["added_tokens"][-1].update(id=N_BPE), rf"wrong added_tokens in .*got id {N_BPE} for '<think>', expected at most {N_BPE - 1}"),
    "added takes an id": (lambda t: t["added_tokens"][-1].update(id=300), r"wrong added_tokens.*which .* has in model\.vocab"),
    "added twice": (lambda t: t["added_tokens"][-1].update(id=0), r"wrong added_tokens\[3\].*id 0 twice"),
    "text twice": (lambda t: t["added_tokens"][-1].update(content="a"), r"wrong token 'a'.*the ids"),
    "added without text": (lambda t: t["added_tokens"][-1].pop("content"), r"wrong added_tokens\[3\]"),
    "added is an object": (lambda t: t.update(added_tokens={}, model={**t["model"]}) or t.update(added_tokens={"a": 1}), r"wrong added_tokens"),
    "merge of three": (lambda t: t["model"]["merges"].__setitem__(1, ["a", "b", "c"]), r"wrong model\.merges\[1\].*expected 'left right'"),
    "merge of one": (lambda t: t["model"]["merges"].__setitem__(1, "ab"), r"wrong model\.merges\[1\]"),
    "merge of numbers": (lambda t: t["model"]["merges"].__setitem__(0, [1, 2]), r"wrong model\.merges\[0\]"),
    "merge half empty": (lambda t: t["model"]["merges"].__setitem__(0, ["a", ""]), r"wrong model\.merges\[0\]"),
    "no merges": (lambda t: t["model"].update(merges=[]), r"wrong model\.merges.*none"),
    "merges is text": (lambda t: t["model"].update(merges="a b"), r"wrong model\.merges"),
    "half a surrogate": (lambda t: t["model"]["vocab"].update({"\ud800": N_BPE - 1}), r"wrong vocabulary.*UTF-8"),
}


@pytest.mark.parametrize("case", HOSTILE_EDITS)
def test_hostile_tokenizer_json(case: str, folder: Path) -> None:
    """Would catch a traceback, a token under another's id, or a file at which llama.cpp aborts (a text twice)."""
    edit, message = HOSTILE_EDITS[case]
    edit_json(folder / "tokenizer.json", edit)
    with pytest.raises(InputError, match=message):
        read_vocabulary(folder, {}, N_BPE)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", b"{", r"tokenizer\.json is not JSON"),
        ("tokenizer.json", b"[1]", r"wrong content in .*tokenizer\.json.*a JSON object"),
        ("tokenizer.json", b'{"model": "\xff"}', r"wrong text in .*tokenizer\.json.*UTF-8"),
        ("tokenizer.json", b"[" * 100_000, r"tokenizer\.json is not JSON"),
        ("tokenizer.json", b'{"model": {"merges": [["a", "\xff"]]}}', r"wrong model\.merges from item 0"),
        ("tokenizer.json", b'{"model": {"merges": ["a b"', r"wrong model\.merges\[0\]"),
        ("tokenizer.json", b'{"merges": ["a b"], "model": {"merges": []}}', r"wrong model\.merges.*the key 2 times"),
        ("tokenizer.model", b"\xff\xff\xff not a model", r"wrong content in .*tokenizer\.model.*SentencePiece"),
        ("tokenizer.model", b"", r"wrong pieces in .*tokenizer\.model"),
        ("tokenizer_config.json", b"null", r"wrong content in .*tokenizer_config\.json"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', r"wrong added_tokens_decoder"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}', r"wrong added_tokens_decoder\['x'\]"),
        ("tokenizer_config.json", b'{"chat_template": {"a": 1}}', r"wrong chat_template in .*tokenizer_config\.json"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "a"}]}', r"wrong chat_template\[0\]"),
        ("chat_template.json", b'{"chat_template": 7}', r"wrong chat_template in .*chat_template\.json: got 7"),
        ("chat_template.jinja", b"\xff\xfe", r"wrong text in .*chat_template\.jinja"),
    ],
)
def test_hostile_bytes(name: str, content: bytes, message: str, folder: Path) -> None:
    """Would catch a traceback for a file that is cut off, of another kind, or not UTF-8."""
    (folder / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_vocabulary(folder, {}, N_BPE)


def test_no_tokenizer_at_all(tmp_path: Path) -> None:
    """Would catch a vague message where only the slow tokenizer's files were downloaded."""
    (tmp_path / "vocab.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match=r"no tokenizer in .*expected tokenizer\.model or tokenizer\.json.*save_pretrained"):
        read_vocabulary(tmp_path, {}, 10)


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


def test_vocabulary_alone_loads_in_llama_cpp(folder: Path, tmp_path: Path) -> None:
    """Would catch keys of a type that llama.cpp refuses, and a size other than the embedding's."""
    target = tmp_path / "vocab.gguf"
    write_gguf(target, {"general.architecture": string("llama"), **read_vocabulary(folder, {}, N_BPE).metadata}, [])
    read_gguf(target)
    with Model(target, vocab_only=True) as model:
        assert (model.n_vocab, model.eos, model.adds_bos) == (N_BPE, 2, False)


def test_reading_imports_neither_transformers_nor_torch(demo_model: Path) -> None:
    """Would catch seconds and hundreds of MB in the parent process."""
    code = (
        "import sys; from pathlib import Path; from loopgguf.vocabulary import read_vocabulary; "
        f"read_vocabulary(Path({str(demo_model)!r}), {{}}, 4096); "
        "sys.exit(bool({'torch', 'transformers', 'tokenizers', 'llama_cpp'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])
