"""Tokenizer files of a checkpoint folder → the tokenizer.* keys of a GGUF.

Three kinds are read, the first that fits: SentencePiece (`tokenizer.model` → model "llama"), byte-level BPE
(`tokenizer.json` → "gpt2"), and BPE with byte fallback as converted from SentencePiece (`tokenizer.json` alone →
"llama", with scores made from the merge ranks). Keys are those of llama.cpp's converter (conversion/base.py,
gguf-py/gguf/vocab.py); the differences are wanted and small: the pre-tokenizer is told by the structure of
tokenizer.json, chat templates in files win over tokenizer_config.json as in transformers, and scores are never a
constant (upstream's -1000 for every token makes llama.cpp merge from the left).

Parses JSON and protobuf only, in bounded time and memory, and imports neither transformers nor torch. That llama.cpp
reads the result as the tokenizer does is left to `proof`. Not read: vocab.json with merges.txt, tekken.json, WordPiece
and Unigram vocabularies.
"""

from __future__ import annotations

import json
import re
import string as characters
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TypeGuard, cast

from loopgguf.container import Value, ValueType, array, boolean, string, uint32
from loopgguf.documents import JsonObject, parse_json, read_whole
from loopgguf.errors import InputError
from loopgguf.pre_tokenizers import ADDS_BOS, SPM, find_pre_tokenizer, flatten_steps

_MAX_FILE_BYTES = 256 << 20  # the largest published tokenizer.json is 35 MB
SPACE = "▁"  # SentencePiece writes a space so
_UNMERGED_SCORE = -1000.0  # of tokens outside the model, as upstream
_OWN_FILES = "Use the tokenizer files of this very model, or resize its embedding to the tokenizer"
_FILLER_SCORE = -10000.0
_LLAMA_TYPES = ("llama", "mistral", "mixtral")  # what upstream's Llama converter handles
_NAMED_TOKENS = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")  # `bos_token` and so on in tokenizer_config.json
_SPECIAL_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding", "mask": "mask", "eot": "eot", "eom": "eom"}


class TokenType(IntEnum):
    """The kinds of tokens, numbered as in llama.h and in SentencePiece's protobuf."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True)
class Vocabulary:
    """The tokenizer.* keys of a GGUF, and what the user should know about them, one line each."""

    metadata: dict[str, Value]
    notes: tuple[str, ...]


# --- files ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Added:
    text: str
    special: bool


@dataclass(frozen=True)
class TokenizerFiles:
    """The parsed tokenizer files of a folder; empty where a file is missing. `merges` are taken out of `tokenizer`."""

    folder: Path
    tokenizer: JsonObject
    merges: list[str]
    config: JsonObject

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / "tokenizer.json"

    @property
    def config_path(self) -> Path:
        return self.folder / "tokenizer_config.json"

    @property
    def model_path(self) -> Path:
        return self.folder / "tokenizer.model"

    @property
    def is_sentencepiece(self) -> bool:
        """Whether the vocabulary is read from tokenizer.model: wherever there is one, as upstream."""
        return self.model_path.is_file()

    @property
    def main_path(self) -> Path:
        """The file the vocabulary is read from."""
        return self.model_path if self.is_sentencepiece else self.tokenizer_path


def _wrong(path: Path, key: str, got: object, expected: str, remedy: str = "Download the tokenizer files again") -> InputError:
    shown = got if isinstance(got, str) and len(got) < 200 else repr(got)[:80]
    return InputError(f"wrong {key} in {path}: got {shown}, expected {expected}. {remedy}")


def _decode(raw: bytes, path: Path) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _wrong(path, "text", f"byte {error.object[error.start]:#04x} at byte {error.start}", "UTF-8") from error


def _parse_object(raw: bytes, path: Path) -> JsonObject:
    try:
        parsed = parse_json(_decode(raw, path))
    except ValueError as error:
        raise InputError(f"{path} is not JSON: {str(error)[:120]}. Download the tokenizer files again") from error
    if not isinstance(parsed, dict):
        raise _wrong(path, "content", parsed, "a JSON object")
    return parsed


def _read_object(path: Path) -> JsonObject:
    return _parse_object(read_whole(path, _MAX_FILE_BYTES), path) if path.is_file() else {}


_MERGES_KEY = re.compile(rb'"merges"\s*+:\s*+\[')
_JSON_STRING = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_JSON_PAIR = rb"\[\s*+" + _JSON_STRING + rb"\s*+,\s*+" + _JSON_STRING + rb"\s*+\]"
_MERGES_RUN = re.compile(rb"(?:\s*+(?:" + _JSON_STRING + rb"|" + _JSON_PAIR + rb")\s*+(?:,|(?=\]))){1,4096}+", re.DOTALL)
_LIST_END = re.compile(rb"\s*+\]")


def _merge_text(merge: object) -> str | None:
    """Return a merge as 'left right', or None for one that is not two parts."""
    if isinstance(merge, str):
        left, _, right = merge.partition(" ")
        return merge if left and right and " " not in right else None
    left, right = cast("list[str]", merge)
    if not left or not right:
        return None
    # GGUF keeps the form with one space, so a space inside a part is written as byte-level BPE writes it
    return left.replace(" ", "Ġ") + " " + right.replace(" ", "Ġ")


def _wrong_merge(path: Path, rank: int, got: object) -> InputError:
    return _wrong(path, f"model.merges[{rank}]", repr(got), "'left right' or ['left', 'right']")


def _take_merges(raw: bytes, path: Path) -> tuple[bytes, list[str]]:
    """Return the JSON text without the items of its "merges", and the merges as 'left right' strings.

    Some thousand at a time: half a million merges as Python lists of pairs, decoded with the widest character of the
    file, would take several hundred MB. An unescaped `"merges": [` cannot lie inside a JSON string, so the search is
    exact.
    """
    keys = [match.end() for match in _MERGES_KEY.finditer(raw)]
    if not keys:
        return raw, []
    if len(keys) > 1:
        raise _wrong(path, "model.merges", f"the key {len(keys)} times", "one list")
    position = keys[0]
    merges: list[str] = []
    while not _LIST_END.match(raw, position):
        run = _MERGES_RUN.match(raw, position)
        if run is None:
            raise _wrong_merge(path, len(merges), raw[position : position + 60].decode("utf-8", "replace").strip())
        try:
            items = json.loads(b"[" + run[0].removesuffix(b",") + b"]")
        except ValueError as error:  # bad UTF-8 or a bad escape
            raise _wrong(path, f"model.merges from item {len(merges)}", str(error)[:80], "UTF-8 and JSON") from error
        for item in items:
            merge = _merge_text(item)
            if merge is None:
                raise _wrong_merge(path, len(merges), item)
            merges.append(merge)
        position = run.end()
    return raw[: keys[0]] + raw[position:], merges


def read_files(folder: Path) -> TokenizerFiles:
    """Return the parsed tokenizer.json and tokenizer_config.json. Raises InputError for one that is malformed or too large."""
    path = folder / "tokenizer.json"
    config = _read_object(folder / "tokenizer_config.json")
    if not path.is_file():
        return TokenizerFiles(folder, {}, [], config)
    rest, merges = _take_merges(read_whole(path, _MAX_FILE_BYTES), path)
    return TokenizerFiles(folder, _parse_object(rest, path), merges, config)


def _is_id(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _one_added(path: Path, key: str, token: object, item: object) -> tuple[int, _Added]:
    if not isinstance(item, dict) or not isinstance(item.get("content"), str) or not _is_id(token):
        raise _wrong(path, key, item, "an object with a token id and a text as content")
    return token, _Added(str(item["content"]), bool(item.get("special")))


def _config_added(files: TokenizerFiles) -> dict[int, _Added]:
    """Return added_tokens_decoder of tokenizer_config.json, by id."""
    decoder = files.config.get("added_tokens_decoder") or {}
    if not isinstance(decoder, dict):
        raise _wrong(files.config_path, "added_tokens_decoder", decoder, "an object")
    added: dict[int, _Added] = {}
    for key, item in decoder.items():
        number = int(key) if key.isdecimal() and len(key) < 10 else None
        token, entry = _one_added(files.config_path, f"added_tokens_decoder[{key!r}]", number, item)
        added[token] = entry
    return added


def _json_added(files: TokenizerFiles) -> dict[int, _Added]:
    """Return added_tokens of tokenizer.json, by id."""
    items = files.tokenizer.get("added_tokens") or []
    if not isinstance(items, list):
        raise _wrong(files.tokenizer_path, "added_tokens", items, "a list")
    added: dict[int, _Added] = {}
    for i, item in enumerate(items):
        token, entry = _one_added(files.tokenizer_path, f"added_tokens[{i}]", item.get("id") if isinstance(item, dict) else None, item)
        if token in added:
            raise _wrong(files.tokenizer_path, f"added_tokens[{i}]", f"id {token} twice ({added[token].text!r}, {entry.text!r})", "each id once")
        added[token] = entry
    return added


def _special_text(files: TokenizerFiles, name: str) -> str | None:
    """Return the text that tokenizer_config.json gives for `bos_token` and the like."""
    entry = files.config.get(f"{name}_token")
    if isinstance(entry, dict):
        entry = entry.get("content")
    return entry if isinstance(entry, str) else None


# --- tokens by id -----------------------------------------------------------------------------------------------------


@dataclass
class _Tokens:
    """The vocabulary by id while it is filled in: text, TokenType and score of each row of the embedding; and whether
    a text gets a space in front, as SentencePiece does unless told otherwise."""

    texts: list[str]
    types: list[int]
    scores: list[float]
    space_prefix: bool = True

    @classmethod
    def fillers(cls, n_vocab: int) -> _Tokens:
        return cls([f"[PAD{i}]" for i in range(n_vocab)], [TokenType.UNUSED] * n_vocab, [_FILLER_SCORE] * n_vocab)

    def put(self, token: int, text: str, kind: int, score: float) -> None:
        self.texts[token], self.types[token], self.scores[token] = text, kind, score

    def put_added(self, token: int, added: _Added) -> None:
        """Replace a row by an added token. llama.cpp takes these as already normalized."""
        control = added.special or _looks_special(added.text)
        if control:
            self.put(token, added.text, TokenType.CONTROL, _UNMERGED_SCORE)
        else:
            self.put(token, added.text.replace(SPACE, " "), TokenType.USER_DEFINED, _UNMERGED_SCORE)


def _looks_special(text: str) -> bool:
    """Tell whether a token that is not marked as special is used as one (command-r, deepseek-coder, gemma)."""
    paired = any(text.startswith(a) and text.endswith(b) for a, b in (("<|", "|>"), ("<｜", "｜>"), ("<unused", ">")))
    return paired or text in ("<pad>", "<mask>", "<2mass>", "[@BOS@]")


def _check_texts(tokens: _Tokens, path: Path) -> None:
    """Refuse what makes llama.cpp abort the process: a text twice."""
    seen: dict[str, int] = {}
    for token, text in enumerate(tokens.texts):
        if seen.setdefault(text, token) != token:
            raise _wrong(path, f"token {text!r}", f"the ids {seen[text]} and {token}", "each text once, for llama.cpp finds tokens by text")


def _read_model_vocab(files: TokenizerFiles, n_vocab: int) -> _Tokens:
    """Return the tokens of tokenizer.json's BPE model, added tokens laid over, fillers where no token is."""
    path = files.tokenizer_path
    model = files.tokenizer.get("model")
    vocab = model.get("vocab") if isinstance(model, dict) else None
    if not isinstance(vocab, dict) or not vocab:
        raise _wrong(path, "model.vocab", vocab, "an object of token texts and ids")
    tokens = _Tokens.fillers(n_vocab)
    for text, token in vocab.items():
        if not _is_id(token) or token >= n_vocab:
            raise _wrong(path, f"model.vocab[{text!r}]", token, f"an id from 0 to {n_vocab - 1}, the rows of the embedding", _OWN_FILES)
        if tokens.types[token] != TokenType.UNUSED:
            raise _wrong(path, f"model.vocab[{text!r}]", f"id {token}, which {tokens.texts[token]!r} has too", "each id once")
        tokens.put(token, text, TokenType.NORMAL, 0.0)
    for token, added in _all_added(files, vocab).items():
        if token >= n_vocab:
            raise _wrong(path, "added_tokens", f"id {token} for {added.text!r}", f"at most {n_vocab - 1}, the rows of the embedding", _OWN_FILES)
        if tokens.types[token] != TokenType.UNUSED and tokens.texts[token] != added.text:
            raise _wrong(path, "added_tokens", f"id {token} for {added.text!r}, which {tokens.texts[token]!r} has in model.vocab", "each id once")
        tokens.put_added(token, added)
    return tokens


def _all_added(files: TokenizerFiles, vocab: Mapping[str, object]) -> dict[int, _Added]:
    """Return the added tokens as transformers sees them: those of tokenizer.json, further ones of tokenizer_config.json,
    and tokens of the model that tokenizer_config.json names as bos_token and the like."""
    added = {**_config_added(files), **_json_added(files)}
    texts = {entry.text for entry in added.values()}
    for name in _NAMED_TOKENS:
        text = _special_text(files, name)
        token = vocab.get(text) if text is not None and text not in texts else None
        if text is not None and _is_id(token):
            added[token] = _Added(text, special=True)
    return added


def _set_merge_scores(tokens: _Tokens, files: TokenizerFiles) -> None:
    """Give each token a score by the rank of its first merge, so that llama.cpp's SPM, which merges the best-scored pair
    first and the leftmost of equals, merges in the order of the merges. Ranks up to 2^24 are exact in float32."""
    ids = {text: token for token, text in enumerate(tokens.texts)}
    lowest = float(-len(files.merges) - 1)
    for token, kind in enumerate(tokens.types):
        if kind == TokenType.NORMAL:
            tokens.scores[token] = lowest
    for rank in range(len(files.merges) - 1, -1, -1):
        merge = files.merges[rank]
        text = merge.replace(" ", "", 1)
        if text not in ids:
            raise _wrong(files.tokenizer_path, f"model.merges[{rank}]", repr(merge), f"a merge into a token of the vocabulary, and {text!r} is none")
        tokens.scores[ids[text]] = float(-rank)


_BYTE_TEXT = re.compile(r"<0x[0-9A-Fa-f]{2}>")


def _mark_byte_tokens(tokens: _Tokens, files: TokenizerFiles) -> None:
    model = files.tokenizer["model"]
    unknown = model.get("unk_token") if isinstance(model, dict) else None
    for token, text in enumerate(tokens.texts):
        if tokens.types[token] != TokenType.NORMAL:
            continue
        if _BYTE_TEXT.fullmatch(text):
            tokens.types[token] = TokenType.BYTE
        elif text == unknown:
            tokens.types[token] = TokenType.UNKNOWN


def _read_sentencepiece(files: TokenizerFiles, n_vocab: int, notes: list[str]) -> _Tokens:
    """Return the tokens of tokenizer.model, overlaid as upstream does with added_tokens.json, then added_tokens_decoder."""
    model, space_prefix = _parse_sentencepiece(files.model_path)
    tokens = _Tokens.fillers(n_vocab)
    tokens.space_prefix = space_prefix
    skipped = max(len(model) - n_vocab, 0)
    for token, (text, score, kind) in enumerate(model[:n_vocab]):
        # a symbol that SentencePiece never splits is what llama.cpp calls user-defined; both look for it in the text itself
        tokens.put(token, text.replace(SPACE, " ") if kind == TokenType.USER_DEFINED else text, kind, score)
    added_path = files.folder / "added_tokens.json"
    for text, number in _read_object(added_path).items():
        if not _is_id(number):
            raise _wrong(added_path, f"id of {text!r}", number, "a token id")
        if number < n_vocab:
            tokens.put(number, text, TokenType.USER_DEFINED, _UNMERGED_SCORE)
        skipped += number >= n_vocab
    for token, added in _config_added(files).items():
        if token < n_vocab:
            tokens.put_added(token, added)
        skipped += token >= n_vocab
    if skipped:
        notes.append(f"{skipped} tokens of {files.folder} beyond the {n_vocab} rows of the embedding were left out: the model cannot see them")
    return tokens


def _parse_sentencepiece(path: Path) -> tuple[list[tuple[str, float, int]], bool]:
    """Return the (text, score, type) of each piece, and whether a space is put in front of a text."""
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]
    from sentencepiece import sentencepiece_model_pb2

    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(read_whole(path, _MAX_FILE_BYTES))
        pieces = [(piece.piece, piece.score, int(piece.type)) for piece in model.pieces]
    except DecodeError as error:
        remedy = "Where tokenizer.json is the tokenizer, move tokenizer.model out of the folder"
        raise _wrong(path, "content", "something else", "a SentencePiece model", remedy) from error
    if not pieces:
        raise _wrong(path, "pieces", "none", "a SentencePiece vocabulary")
    broken = next((number for number, (text, _, _) in enumerate(pieces) if not isinstance(text, str)), None)
    if broken is not None:  # protobuf hands out bytes then
        raise _wrong(path, f"piece {broken}", repr(pieces[broken][0]), "UTF-8")
    return pieces, bool(model.normalizer_spec.add_dummy_prefix)


def _check_byte_tokens(tokens: _Tokens, path: Path) -> None:
    n_bytes = sum(kind == TokenType.BYTE for kind in tokens.types)
    if n_bytes != 256:
        remedy = "llama.cpp stops the program at a character outside such a vocabulary, so this tokenizer cannot be used with it"
        raise _wrong(path, "byte tokens", f"{n_bytes} of the type BYTE", "all 256, <0x00> to <0xFF>", remedy)


# --- special tokens and templates -------------------------------------------------------------------------------------


@dataclass
class _Specials:
    """The names of special tokens and the add_* flags while they are found."""

    names: dict[str, str | None]
    flags: dict[str, bool]


def _template_ids(template: object) -> list[str | None]:
    """Return the special tokens of a TemplateProcessing side, None where a sequence stands."""
    items = [item for item in template if isinstance(item, dict)] if isinstance(template, list) else []
    specials = (item.get("SpecialToken") for item in items)
    return [str(special.get("id")) if isinstance(special, dict) else None for special in specials]


def _apply_template(specials: _Specials, step: JsonObject) -> None:
    """Read from a TemplateProcessing which tokens it puts around a text (single) and between two (pair)."""
    names, flags = specials.names, specials.flags
    single, pair = _template_ids(step.get("single")), _template_ids(step.get("pair"))
    first = single[0] if len(single) > 1 else None
    last = single[-1] if len(single) > 1 else None
    if first:
        names["bos"] = names["bos"] or first
        flags["bos"] = first in (names["bos"], names["cls"])
    if last:
        if last != names["eos"]:
            names["eot"], names["eos"] = names["eos"], last
        flags["eos"] = True
    inner = pair[1:] if first and pair[:1] == [first] else pair
    inner = inner[:-1] if last and inner[-1:] == [last] else inner
    between = inner[1:-1]
    if between and inner[0] is None and inner[-1] is None:
        ends = (names["sep"], names["eos"])
        flags["sep"] = (between[0] in ends and not last) or (len(between) == 2 and between[1] in ends)


def _read_specials(files: TokenizerFiles) -> _Specials:
    names = {name: _special_text(files, name) for name in _NAMED_TOKENS}
    names["bos"], names["eos"] = names["bos"] or names["cls"], names["eos"] or names["sep"]
    specials = _Specials(names, {})
    for step in flatten_steps(files.tokenizer.get("post_processor"), "processors"):
        if step.get("type") == "ByteLevel":
            specials.flags.setdefault("bos", False)
            specials.flags.setdefault("eos", False)
        elif step.get("type") == "TemplateProcessing":
            _apply_template(specials, step)
    for name in ("bos", "eos", "sep"):
        entry = files.config.get(f"add_{name}_token")
        if isinstance(entry, bool):
            specials.flags.setdefault(name, entry)
    return specials


def _special_ids(specials: _Specials, by_text: Mapping[str, int], config: Mapping[str, object], n_vocab: int, notes: list[str]) -> dict[str, int]:
    """Return the ids of special tokens: by text (by_text: special and added tokens), else as config.json gives them."""
    nested = config.get("text_config")
    ids: dict[str, int] = {}
    for name in _SPECIAL_KEYS:
        token: object = by_text.get(specials.names.get(name) or "")
        if token is None and name not in ("eot", "eom"):
            token = config.get(f"{name}_token_id")
            if token is None and isinstance(nested, dict):
                token = nested.get(f"{name}_token_id")
        if not isinstance(token, int) or isinstance(token, bool):
            continue  # absent, or a list of several: upstream leaves these out too, llama.cpp finds them by their texts
        if 0 <= token < n_vocab:
            ids[name] = token
        else:
            notes.append(f"{name}_token_id {token} of config.json is not among the {n_vocab} tokens and was left out")
    return ids


def _settle_bos(specials: _Specials, ids: Mapping[str, int], pre: str, notes: list[str]) -> None:
    """Write add_bos_token where llama.cpp's default would differ from tokenizer.json, or has no token to add."""
    flags = specials.flags
    adds = flags.get("bos", pre in ADDS_BOS)
    if adds and pre != SPM and "bos" not in ids:
        flags["bos"] = False
        notes.append("add_bos_token is set to false: the tokenizer names no BOS token, and llama.cpp would take token 11 for it")
    elif adds and "bos" not in flags:
        flags["bos"] = False
        notes.append("add_bos_token is set to false: tokenizer.json adds no BOS token, llama.cpp would by default")


def _read_special_metadata(files: TokenizerFiles, config: Mapping[str, object], tokens: _Tokens, pre: str, notes: list[str]) -> dict[str, Value]:
    """Return the ids of special tokens and the add_*_token flags."""
    specials = _read_specials(files)
    known = (TokenType.CONTROL, TokenType.USER_DEFINED, TokenType.UNKNOWN)
    by_text = {text: token for token, text in enumerate(tokens.texts) if tokens.types[token] in known}
    ids = _special_ids(specials, by_text, config, len(tokens.texts), notes)
    if not files.is_sentencepiece:  # with tokenizer.model, transformers' classes add BOS by themselves
        _settle_bos(specials, ids, pre, notes)
    if pre != SPM and "eos" not in ids:
        notes.append("the tokenizer names no EOS token: llama.cpp will take token 11 for it")
    metadata = {f"tokenizer.ggml.{_SPECIAL_KEYS[name]}_token_id": uint32(token) for name, token in ids.items()}
    metadata |= {f"tokenizer.ggml.add_{name}_token": boolean(flag) for name, flag in specials.flags.items()}
    return metadata


def _named_templates(entries: object, path: Path) -> dict[str, str]:
    if isinstance(entries, str):
        return {"default": entries}
    if not isinstance(entries, list):
        raise _wrong(path, "chat_template", entries, "a text or a list of named templates")
    templates: dict[str, str] = {}
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict) or not isinstance(entry.get("name"), str) or not isinstance(entry.get("template"), str):
            raise _wrong(path, f"chat_template[{i}]", entry, "an object with a name and a template")
        templates[str(entry["name"])] = str(entry["template"])
    return templates


def _read_templates(files: TokenizerFiles) -> dict[str, str]:
    """Return the chat templates by name, the main one as "default"; the first place that has any wins, as in transformers."""
    jinja, legacy = files.folder / "chat_template.jinja", files.folder / "chat_template.json"
    if jinja.is_file():
        templates = {"default": _decode(read_whole(jinja, _MAX_FILE_BYTES), jinja)}
    elif files.config.get("chat_template") is not None:
        templates = _named_templates(files.config["chat_template"], files.config_path)
    elif legacy.is_file():
        templates = _named_templates(_read_object(legacy).get("chat_template"), legacy)
    else:
        templates = {}
    for path in sorted((files.folder / "additional_chat_templates").glob("*.jinja")):
        templates.setdefault(path.stem, _decode(read_whole(path, _MAX_FILE_BYTES), path))
    return templates


def _template_metadata(templates: Mapping[str, str]) -> dict[str, Value]:
    allowed = characters.ascii_letters + characters.digits
    named = {"".join(c if c in allowed else "_" for c in name): template for name, template in templates.items() if name != "default"}
    metadata = {f"tokenizer.chat_template.{name}": string(template) for name, template in named.items() if name}
    if metadata:
        metadata["tokenizer.chat_templates"] = array(ValueType.STRING, [name for name in named if name])
    if "default" in templates:
        metadata["tokenizer.chat_template"] = string(templates["default"])
    return metadata


# --- the vocabulary ---------------------------------------------------------------------------------------------------


def _is_byte_level(files: TokenizerFiles) -> bool:
    return any(step.get("type") == "ByteLevel" for step in flatten_steps(files.tokenizer.get("pre_tokenizer"), "pretokenizers"))


def _is_byte_fallback(files: TokenizerFiles) -> bool:
    model = files.tokenizer.get("model")
    return isinstance(model, dict) and bool(model.get("byte_fallback"))


def _check_model(files: TokenizerFiles) -> None:
    """Refuse a folder without a tokenizer, and kinds of tokenizer.json that are not read."""
    path = files.tokenizer_path
    if not path.is_file():
        remedy = "Add the tokenizer files of the model; from vocab.json and merges.txt, transformers' save_pretrained makes a tokenizer.json"
        raise InputError(f"no tokenizer in {files.folder}: expected tokenizer.model or tokenizer.json. {remedy}")
    model = files.tokenizer.get("model")
    kind = model.get("type", "BPE") if isinstance(model, dict) else model
    if kind != "BPE" or not (_is_byte_level(files) or _is_byte_fallback(files)):
        raise _wrong(path, "model.type", kind, "BPE, byte-level or with byte_fallback", "Other tokenizers are not supported")
    if not files.merges:
        raise _wrong(path, "model.merges", "none", "a list of merges")


def _json_prefixes_space(files: TokenizerFiles) -> bool:
    steps = flatten_steps(files.tokenizer.get("normalizer"), "normalizers") + flatten_steps(files.tokenizer.get("pre_tokenizer"), "pretokenizers")
    return any(step.get("type") == "Prepend" or (step.get("type") == "Metaspace" and step.get("prepend_scheme", "always") != "never") for step in steps)


def _prefix_metadata(files: TokenizerFiles, config: Mapping[str, object], tokens: _Tokens) -> dict[str, Value]:
    """Return add_space_prefix where upstream writes it or llama.cpp's default would be wrong."""
    given = files.config.get("add_prefix_space")
    if isinstance(given, bool) and config.get("model_type") in _LLAMA_TYPES:
        return {"tokenizer.ggml.add_space_prefix": boolean(given)}
    return {} if tokens.space_prefix else {"tokenizer.ggml.add_space_prefix": boolean(False)}


def _read_tokens(files: TokenizerFiles, n_vocab: int, pre_tokenizer: str | None, notes: list[str]) -> tuple[str, str, _Tokens]:
    """Return tokenizer.ggml.model, tokenizer.ggml.pre and the tokens."""
    if files.is_sentencepiece:
        tokens = _read_sentencepiece(files, n_vocab, notes)
        _check_byte_tokens(tokens, files.model_path)
        return "llama", pre_tokenizer or SPM, tokens
    _check_model(files)
    tokens = _read_model_vocab(files, n_vocab)
    if _is_byte_level(files):
        clean = files.config.get("clean_up_tokenization_spaces") is True
        pre = pre_tokenizer or find_pre_tokenizer(files.tokenizer, clean_spaces=clean, path=files.tokenizer_path)
        return "gpt2", pre, tokens
    _mark_byte_tokens(tokens, files)
    _check_byte_tokens(tokens, files.tokenizer_path)
    _set_merge_scores(tokens, files)
    tokens.space_prefix = _json_prefixes_space(files)
    return "llama", pre_tokenizer or SPM, tokens


def _model_extras(config: Mapping[str, object], model: str) -> dict[str, Value]:
    """Return what upstream writes for two families by the size of their vocabulary: CodeLlama and small Granite."""
    size = config.get("vocab_size")
    if config.get("model_type") not in _LLAMA_TYPES:
        return {}
    if size == 32016 and model == "llama":
        ids = {"prefix": 32007, "suffix": 32008, "middle": 32009, "eot": 32010}
        return {f"tokenizer.ggml.{name}_token_id": uint32(token) for name, token in ids.items()}
    return {"tokenizer.ggml.add_bos_token": boolean(False)} if size == 49152 else {}


def _check_spelling(metadata: Mapping[str, Value], folder: Path) -> None:
    """Refuse half a surrogate pair, which JSON can spell and UTF-8 cannot, wherever it stands."""
    for key, value in metadata.items():
        texts = value.data if isinstance(value.data, list) else [value.data]
        try:
            "".join(text for text in texts if isinstance(text, str)).encode("utf-8")
        except UnicodeEncodeError as error:
            raise _wrong(folder, key, repr(error.object[error.start]), "text that UTF-8 can hold") from error


def read_vocabulary(folder: Path, config: Mapping[str, object], n_vocab: int, pre_tokenizer: str | None = None) -> Vocabulary:
    """Return the tokenizer.* keys for the model in `folder`.

    config: the parsed config.json. n_vocab: rows of the embedding; ids without a token become `[PADi]`, unused.
    pre_tokenizer: llama.cpp's name for it, taken as given; by default found from tokenizer.json.
    Raises InputError naming file and key for files that are missing, malformed, contradict each other or do not fit
    n_vocab, for an unknown pre-tokenizer, and for kinds of tokenizers that are not supported.
    """
    assert n_vocab > 0, n_vocab
    files, notes = read_files(folder), list[str]()
    model, pre, tokens = _read_tokens(files, n_vocab, pre_tokenizer, notes)
    _check_texts(tokens, files.main_path)
    metadata = {
        "tokenizer.ggml.model": string(model),
        "tokenizer.ggml.pre": string(pre),
        "tokenizer.ggml.tokens": array(ValueType.STRING, tokens.texts),
        "tokenizer.ggml.token_type": array(ValueType.INT32, map(int, tokens.types)),
    }
    if model == "llama":
        metadata["tokenizer.ggml.scores"] = array(ValueType.FLOAT32, tokens.scores)
    else:
        metadata["tokenizer.ggml.merges"] = array(ValueType.STRING, files.merges)
    metadata |= _read_special_metadata(files, config, tokens, pre if model == "gpt2" else SPM, notes)
    metadata |= _prefix_metadata(files, config, tokens)
    metadata |= _model_extras(config, model) | _template_metadata(_read_templates(files))
    _check_spelling(metadata, folder)
    return Vocabulary(metadata, tuple(notes))
