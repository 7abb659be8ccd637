"""The pre-tokenizers that llama.cpp knows by name, and the name for the one that a byte-level tokenizer.json describes.

A name is found by the structure of tokenizer.json, not by a hash of token ids as in llama.cpp's converter. That a name
does what the table says is left to `proof`. Regexes are compared as text; none is compiled or run.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path

from loopgguf.documents import JsonObject
from loopgguf.errors import InputError

_WORDS_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_WORDS_LLAMA3 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _REST
_WORDS_QWEN2 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _REST
_WORDS_QWEN35 = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + _REST
_WORDS_SEED = _CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1}| ?[^\s\p{L}\p{N}\r\n]+|" + _REST
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + "+{0}|" + r"[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*{0}|"
_WORDS_TEKKEN = _CASED.replace("{0}", "") + r"\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _REST
_WORDS_GPT4O = _CASED.replace("{0}", _CONTRACTIONS + "?") + r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _REST
_WORDS_BAILING = r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+"
_WORDS_DEEPSEEK3 = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|""" + _REST
_LETTERS_DEEPSEEK = (
    r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼ"
    r"ℂℇℊ-ℓℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃]+"
)
_HAN_DEEPSEEK = "[一-龥ࠀ-一가-퟿]+"
_DIGIT = r"\p{N}"

# The splits a text goes through, in order, as `_split_steps` spells them. One name for each behaviour: names that
# llama.cpp treats alike (falcon3, pixtral, lfm2 as llama-bpe; llama4 as gpt-4o; deepseek-r1-qwen, megrez as qwen2;
# refact, command-r, exaone as starcoder; mpt, olmo, phi-2 as gpt-2) are not repeated. Cf. src/llama-vocab.cpp.
PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "llama-bpe": (_WORDS_LLAMA3,),
    "qwen2": (_WORDS_QWEN2,),
    "qwen35": (_WORDS_QWEN35,),
    "gpt-2": (_WORDS_GPT2,),
    "smollm": (_DIGIT, _WORDS_GPT2),
    "tekken": (_WORDS_TEKKEN,),
    "gpt-4o": (_WORDS_GPT4O,),
    "bailingmoe": (_WORDS_BAILING,),
    "seed-coder": (_WORDS_SEED,),
    "deepseek-llm": (r"[\r\n]", _LETTERS_DEEPSEEK, r"\s?[!-/:-~！-／：-～‘-‟　-。]+", r"\s+$", _HAN_DEEPSEEK, r"\p{N}+"),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _HAN_DEEPSEEK, _DIGIT),
    "deepseek-v3": (r"\p{N}{1,3}", "[一-龥぀-ゟ゠-ヿ]+", _WORDS_DEEPSEEK3),
}
# the name for the same splits where merges are not ignored, and where decoding cleans up spaces
_WITHOUT_IGNORE_MERGES = {"llama-bpe": "smaug-bpe"}
_WITH_CLEAN_SPACES = {"smollm": "starcoder"}
SPM = "default"  # the name that goes with SentencePiece vocabularies; they have no pre-tokenizer
# llama.cpp prepends BOS for these unless the file says otherwise
ADDS_BOS = (SPM, "llama-bpe", "tekken", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "chameleon")
# llama.cpp writes \p{M} out of the letters of these, so words of Indic scripts, Thai or vowel-pointed Hebrew fall apart
SPLITS_MARKS = ("tekken", "gpt-4o", "llama4", "kanana2", "talkie")


def _split_step(step: JsonObject) -> str:
    kind = step.get("type")
    if kind == "Split":
        pattern = step.get("pattern")
        regex = str(pattern.get("Regex", re.escape(str(pattern.get("String", ""))))) if isinstance(pattern, dict) else str(pattern)
        regex = regex.replace("\r", r"\r").replace("\n", r"\n")
        isolated = (step.get("behavior"), bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))  # the same for regexes that match all
        return regex if isolated else f"{step.get('behavior')}: {regex}"
    if kind == "Digits":
        return _DIGIT if step.get("individual_digits") else r"\p{N}+"
    if kind == "ByteLevel":
        prefix = "Prefix: space " if step.get("add_prefix_space") else ""
        return (prefix + (_WORDS_GPT2 if step.get("use_regex", True) else "")).strip()
    return json.dumps(step, sort_keys=True, ensure_ascii=False)


def flatten_steps(section: object, members: str) -> list[JsonObject]:
    """Return the steps of a normalizer, pre_tokenizer or post_processor of a tokenizer.json, sequences flattened.

    members: the key under which a Sequence of this kind keeps its parts.
    """
    if not isinstance(section, dict):
        return []
    if section.get("type") != "Sequence":
        return [section]
    inner = section.get(members)
    return [step for part in inner for step in flatten_steps(part, members)] if isinstance(inner, list) else []


def _split_steps(tokenizer: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(text for step in flatten_steps(tokenizer.get("pre_tokenizer"), "pretokenizers") if (text := _split_step(step)))


def _likeness(known: tuple[str, ...], steps: tuple[str, ...]) -> float:
    """Return how alike two pre-tokenizers are written, 0 to 1, by their first 600 characters."""
    return difflib.SequenceMatcher(None, " ".join(known)[:600], " ".join(steps)[:600], autojunk=False).ratio()


def _unknown(steps: tuple[str, ...], path: Path) -> InputError:
    digest = hashlib.sha256(json.dumps(steps).encode()).hexdigest()[:16]
    nearest = ", ".join(sorted(PRE_TOKENIZERS, key=lambda name: -_likeness(PRE_TOKENIZERS[name], steps))[:3])
    shown = json.dumps(steps, ensure_ascii=False)
    return InputError(
        f"unknown pre-tokenizer in {path}: got a pre_tokenizer of structure {digest} ({shown[:120]}…), expected one that llama.cpp has a name for. "
        f"Nearest known: {nearest}. Pass --pre-tokenizer NAME to choose one; the token ids are then compared all the same"
    )


def find_pre_tokenizer(tokenizer: Mapping[str, object], *, clean_spaces: bool = False, path: Path = Path("tokenizer.json")) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a byte-level tokenizer.json.

    tokenizer: the parsed file; clean_spaces: what tokenizer_config.json says as clean_up_tokenization_spaces (it decides
    between names that only decode differently). Raises InputError for a structure no known name stands for, naming the
    nearest ones and `--pre-tokenizer`.
    """
    steps = _split_steps(tokenizer)
    model = tokenizer.get("model")
    ignore_merges = isinstance(model, dict) and bool(model.get("ignore_merges"))
    name = next((name for name, known in PRE_TOKENIZERS.items() if known == steps), None)
    if name is None:
        raise _unknown(steps, path)
    name = name if ignore_merges else _WITHOUT_IGNORE_MERGES.get(name, name)
    return _WITH_CLEAN_SPACES.get(name, name) if clean_spaces else name
