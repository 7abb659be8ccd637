"""Tokenizer files → tokenizer.* keys, each reading proven against llama.cpp; hostile files."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_tokenizers import EDIT, LLAMA_CONFIG, N_BPE, N_SPM, converted_from_sentencepiece, data, edit_json, write_byte_level, write_sentencepiece
from tokenizers import Tokenizer, processors

from loopgguf.container import ValueType, read_gguf, string, write_gguf
from loopgguf.errors import InputError
from loopgguf.llama import Model
from loopgguf.proof import prove_vocabulary
from loopgguf.vocabulary import TokenType, read_vocabulary


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_byte_level(tmp_path)


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


def test_sentencepiece_model(tmp_path: Path) -> None:
    """Would catch wrong types or scores of pieces, and added tokens that do not replace or extend them."""
    write_sentencepiece(tmp_path)
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
    write_sentencepiece(tmp_path, add_dummy_prefix=False)
    vocabulary = read_vocabulary(tmp_path, {}, N_SPM)
    assert data(vocabulary, "add_space_prefix") is False
    assert prove_vocabulary(tmp_path, vocabulary.metadata) == ()


def test_tokenizer_json_alone_with_byte_fallback(tmp_path: Path) -> None:
    """Would catch the trap of equal scores: with -1000 for all tokens, llama.cpp merges from the left, not by rank."""
    model = write_sentencepiece(tmp_path)
    converted_from_sentencepiece(model).save(str(tmp_path / "tokenizer.json"))
    model.unlink()
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}), encoding="utf-8")
    vocabulary = read_vocabulary(tmp_path, LLAMA_CONFIG, N_SPM)
    assert (data(vocabulary, "model"), data(vocabulary, "unknown_token_id"), data(vocabulary, "add_bos_token")) == ("llama", 0, True)
    assert max(data(vocabulary, "scores")[259:]) == 0.0
    assert prove_vocabulary(tmp_path, vocabulary.metadata) == ()
    flat = dict(vocabulary.metadata)
    flat["tokenizer.ggml.scores"] = type(flat["tokenizer.ggml.scores"])(ValueType.ARRAY, [-1000.0] * N_SPM, ValueType.FLOAT32)
    with pytest.raises(InputError, match="differ at token"):
        prove_vocabulary(tmp_path, flat)


def test_sentencepiece_without_byte_tokens_is_refused(tmp_path: Path) -> None:
    """Would catch a file at which llama.cpp ends the process at the first unknown character."""
    write_sentencepiece(tmp_path, byte_fallback=False)
    with pytest.raises(InputError, match=r"wrong byte tokens in .*tokenizer\.model: got 0 of the type BYTE, expected all 256"):
        read_vocabulary(tmp_path, {}, N_SPM)


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
    "half a surrogate": (
        lambda t: t["model"]["vocab"].update({"\ud800": N_BPE - 1}),
        r"wrong tokenizer\.ggml\.tokens in .*'\\ud800', expected text that UTF-8 can hold",
    ),
    "half a surrogate in a merge": (lambda t: t["model"]["merges"].__setitem__(0, ["\ud800", "a"]), r"wrong tokenizer\.ggml\.merges in .*'\\ud800'"),
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
        ("tokenizer.model", b"\x0a\x03\x0a\x01\xff", r"wrong piece 0 in .*tokenizer\.model: got b'\\xff', expected UTF-8"),
        ("tokenizer.model", b"", r"wrong pieces in .*tokenizer\.model"),
        ("tokenizer.json", b'{"model": {"vocab": {"a": 0, "a": 1}}}', r"tokenizer\.json is not JSON: 'a' twice"),
        ("tokenizer_config.json", b"null", r"wrong content in .*tokenizer_config\.json"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": [1]}', r"wrong added_tokens_decoder"),
        ("tokenizer_config.json", b'{"added_tokens_decoder": {"x": {"content": "a"}}}', r"wrong added_tokens_decoder\['x'\]"),
        ("tokenizer_config.json", b'{"chat_template": {"a": 1}}', r"wrong chat_template in .*tokenizer_config\.json"),
        ("tokenizer_config.json", b'{"chat_template": [{"name": "a"}]}', r"wrong chat_template\[0\]"),
        ("tokenizer_config.json", b'{"chat_template": "\\ud800"}', r"wrong tokenizer\.chat_template in .*UTF-8"),
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
