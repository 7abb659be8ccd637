"""The proof that llama.cpp reads a text as the checkpoint's own tokenizer does: token ids compared, with limits.

The folder's tokenizer is tokenizer.json as the `tokenizers` library reads it, or tokenizer.model as sentencepiece does
where there is no tokenizer.json. Both sides run in a child process (`python -m loopgguf.proof`), for the files are not
trusted and llama.cpp may end the process; the child has a time and a memory limit. Nothing in the folder is executed.
Chat templates are not compared.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from loopgguf.container import Value, read_gguf, string, write_gguf
from loopgguf.documents import JsonObject
from loopgguf.errors import InputError
from loopgguf.pre_tokenizers import SPLITS_MARKS, flatten_steps
from loopgguf.vocabulary import SPACE, TokenizerFiles, TokenType, read_files

Encode = Callable[[str], list[int]]

# What tokenizers disagree about. Original text; each line is compared by itself, then all of it at once.
TORTURE_TEXT = (
    "The ferry left at dawn, and nobody aboard had slept.",
    "I'm sure they've said she'd go, we'll see; it's DON'T and CAN'T, I'M, YOU'RE, O'Neill's 'tis and rock'n'roll.",
    "0 7 42 365 1024 65536 123456 9876543 31415926 1000000007 3.14159 1,234,567.89 -40 6e-23 0x1F 10% ½ Ⅻ ٣٤٥ ४२",
    "one  two   three    four     five                                end",
    "\ttab\t\ttabs \t mixed \t\n\n\nthree lines\n \n  \n\r\nwindows\r\n\r\nline ends\rold mac   ",
    "   leading spaces and trailing ones   ",
    'def area(r: float) -> float:\n    """πr²"""\n    return 3.14 * r**2  # ok\n\nif __name__ == \'__main__\':\n\tprint(area(2)!=0)\n',
    "for (int i=0;i<n;++i){ x[i]^=~(y<<3)|z&&w; } // <b>&amp;</b> /* $HOME */ `ls -la | grep \\.txt$`",
    "https://example.org:8080/a/b_c?id=17&q=tea%20pot#top user.name+tag@mail.example.co.uk C:\\Temp\\new_file.TXT",
    "camelCase PascalCase snake_case SCREAMING_CASE kebab-case HTTPServer2Go iPhone eBay McDonald",
    "!!! ??? ... --- ===== ***** ~~~~ <<>> [](){} ''''' \"\"\"\" ,,, ;;; ::: /// \\\\ __ @@ ## %% ^^ && || ++ ` ´ “quoted” ‘so’ «là» – — … • § ¶",
    "Zażółć gęślą jaźń; Straße, Ærø, naïve café, İstanbul'da ığdır, Ångström, señor, përtej, ťažký, ẞ ﬁ ﬂ",
    "Ελληνικά και μαθηματικά: Σίσυφος. Съешь же ещё этих булок, товарищ! Їжак ґанок.",
    "今天天气很好，我们去公园散步吧。東京都は2024年も暑かった。カタカナとひらがな、ﾊﾝｶｸ。中文ABC混排123测试",
    "안녕하세요, 오늘은 비가 옵니다. 한국어 띄어쓰기 시험.",
    "مرحبا بالعالم، كيف حالك؟ اَلسَّلَامُ ١٢٣ فارسی می‌نویسم. שלום עולם, מַה שְּׁלוֹמְךָ?",
    "नमस्ते दुनिया, क्या हाल है? ภาษาไทยไม่มีช่องว่าง ជំរាបសួរ வணக்கம் বাংলা ሰላም გამარჯობა Բարեւ",
    "e\u0301le\u0300ve cafe\u0301 n\u0303 a\u030a o\u0308 Z\u0324\u0307 \u1112\u1161\u11ab\u1100\u1173\u11af A\u030a \u212b \u2126 \u212a",
    "😀😅🚀 👩‍🚀👨‍👩‍👧‍👦 👍🏽 🇫🇮🇯🇵 ❤️ ☕️ 1️⃣ 🏴‍☠️ ⚙ 🜁",
    "zero\u200bwidth soft\u00adhyphen no\u00a0break thin\u2009space ideographic\u3000space line\u2028sep bom\ufeff nel\u0085 rtl\u200f",
    "∀x∈ℝ: x²≥0 ∧ ∑ᵢ₌₁ⁿ i = n(n+1)/2, ∫₀^∞ e^{-x}dx = 1; H₂O → 2H⁺ + ½O₂ ≈ ≠ ± × ÷ 𝔸𝕓𝒸 𝟙𝟚",
    '{"name": "Ada", "tags": ["a", "b\\n"], "n": -1.5e+10, "ok": true, "none": null}',
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa hahahahahahaha ........................ 0000000000000000000000",
    "user: Can you count to ten?\nassistant: Sure! 1, 2, 3, 4, 5, 6, 7, 8, 9, 10.\n\nuser: thx ;-) <3\n",
    "a\x01b\x1b[0m\x7f \ue000 \U0001f9ff\U000e0041 \ufffd",
)

_TIME_LIMIT_SECONDS = 120
_MEMORY_BASE_BYTES = 2 << 30
_MEMORY_PER_FILE_BYTE = 40  # a 34 MB tokenizer.json costs the tokenizers library about 500 MB
_MAX_CONTROL_TOKENS = 2000
_N_SAMPLED_TOKENS = 1000


@dataclass(frozen=True)
class _Reference:
    """The tokenizer that llama.cpp is compared with. `prepare` does to a text what llama.cpp is known to leave out."""

    name: str
    encode: Encode
    encode_with_specials: Encode | None
    decode: Callable[[int], str]
    prepare: Callable[[str], str]
    notes: tuple[str, ...]


def _normal_forms(tokenizer: Mapping[str, object]) -> list[str]:
    kinds = (str(step.get("type")) for step in flatten_steps(tokenizer.get("normalizer"), "normalizers"))
    return [kind for kind in kinds if kind in ("NFC", "NFD", "NFKC", "NFKD")]


def _reference_of_json(files: TokenizerFiles, controls: Sequence[tuple[int, str]]) -> _Reference:
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(files.tokenizer_path))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    known = {added.content for added in tokenizer.get_added_tokens_decoder().values()}
    # tokens that only tokenizer_config.json calls special: transformers adds them too
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for _, text in controls if text not in known])
    forms = _normal_forms(files.tokenizer)
    metaspace = any(step.get("type") == "Metaspace" for step in flatten_steps(files.tokenizer.get("pre_tokenizer"), "pretokenizers"))

    def prepare(text: str) -> str:
        for form in forms:
            text = unicodedata.normalize(form, text)  # type: ignore[arg-type, unused-ignore]
        return text.removeprefix(" ") if metaspace else text

    notes = []
    if forms:
        notes.append(
            f"tokenizer.json normalizes text to {', '.join(forms)}, which llama.cpp does not: decomposed accents, conjoining Hangul and signs such as "
            "U+212B get other token ids unless a prompt is normalized before"
        )
    if metaspace:
        notes.append("tokenizer.json puts a space in front of a text that has none (Metaspace), llama.cpp in front of every text: a leading space counts twice")
    return _Reference(
        "tokenizer.json",
        lambda text: list(tokenizer.encode(text, add_special_tokens=False).ids),
        lambda text: list(tokenizer.encode(text, add_special_tokens=True).ids),
        lambda token: str(tokenizer.decode([token], skip_special_tokens=False)),
        prepare,
        tuple(notes),
    )


def _reference_of_sentencepiece(path: Path) -> _Reference:
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_file=str(path))
    prefixed = processor.normalize("a") == SPACE + "a"

    def prepare(text: str) -> str:
        normal = str(processor.normalize(text)).replace(SPACE, " ")
        return normal.removeprefix(" ") if prefixed else normal

    notes: tuple[str, ...] = ()
    if any(prepare(text) != text for text in TORTURE_TEXT):
        notes = ("tokenizer.model normalizes text (Unicode forms or spaces), which llama.cpp does not: such text gets other token ids",)
    return _Reference("tokenizer.model", processor.encode, None, lambda token: str(processor.decode([token])), prepare, notes)


def _around(ids: Sequence[int], at: int) -> str:
    return f"{'… ' if at > 3 else ''}{list(ids[max(at - 3, 0) : at + 6])}"


def _difference(text: str, expected: Sequence[int], got: Sequence[int]) -> str | None:
    """Return where the token ids of `text` differ; None where they are the same."""
    if expected == got:
        return None
    at = next((i for i, (a, b) in enumerate(zip(expected, got, strict=False)) if a != b), min(len(expected), len(got)))
    return f"at token {at} of {text[:100]!r}: got {_around(got, at)}, expected {_around(expected, at)}"


def _compare(reference: _Reference, encode: Encode, text: str) -> str | None:
    """Return where `encode`, given what llama.cpp is to be given, differs from the reference on `text`; None if nowhere."""
    return _difference(text, reference.encode(text), encode(reference.prepare(text)))


def _has_marks(text: str) -> bool:
    return any(unicodedata.category(c).startswith("M") for c in text)


def _compare_text(reference: _Reference, encode: Encode, pre: str, notes: list[str]) -> str | None:
    """Return the first difference on the torture text, line by line and then joined; None if there is none. Lines whose
    combining marks llama.cpp is known to split off are told in `notes` only."""
    marked = [text for text in TORTURE_TEXT if pre in SPLITS_MARKS and _has_marks(text)]
    strict = [text for text in TORTURE_TEXT if text not in marked]
    for text in (*strict, "\n".join(strict)):
        difference = _compare(reference, encode, text)
        if difference is not None:
            return difference
    difference = next(filter(None, (_compare(reference, encode, text) for text in marked)), None)
    if difference is not None:
        notes.append(f"llama.cpp splits off combining marks with pre-tokenizer {pre!r}, the tokenizer does not, {difference}")
    return None


def _compare_controls(reference: _Reference, encode: Encode, controls: Sequence[tuple[int, str]], notes: list[str]) -> str | None:
    """Return the first control token that is not read as itself. What stands around them is told in `notes` only:
    stripped or added spaces at control tokens are properties llama.cpp does not have."""
    for _, text in controls[:_MAX_CONTROL_TOKENS]:
        difference = _difference(text, reference.encode(text), encode(text))
        if difference is not None:
            return difference
    difference = _compare(reference, encode, "".join(f"{token}user\nHello there{token} Hello \n{token}" for _, token in controls[:64]))
    if difference is not None:
        notes.append(f"text beside control tokens is read with other spaces by llama.cpp, {difference}")
    return None


def _compare_entries(reference: _Reference, encode: Encode, types: Sequence[int], notes: list[str]) -> None:
    """Note how many of a sample of vocabulary entries, taken as text, are not tokenized alike."""
    normal = [token for token, kind in enumerate(types) if kind == TokenType.NORMAL]
    sample = map(reference.decode, normal[:: max(len(normal) // _N_SAMPLED_TOKENS, 1)])
    differences = [_compare(reference, encode, text) for text in sample if text and "\ufffd" not in text]
    found = [difference for difference in differences if difference is not None]
    if found:
        notes.append(f"{len(found)} of {len(differences)} vocabulary entries, taken as text, get other token ids in llama.cpp, the first {found[0]}")


def _compare_ends(reference: _Reference, encode: Encode, notes: list[str]) -> None:
    """Note where BOS and EOS around a text differ from tokenizer.json's post-processor."""
    if reference.encode_with_specials is None:
        return
    expected, got = reference.encode_with_specials("Hello"), encode("Hello")
    if expected != got:
        notes.append(f"special tokens around a text differ: {reference.name} gives {expected[:8]} for 'Hello', llama.cpp {got[:8]}")


def _prove(folder: Path, gguf: Path) -> JsonObject:
    """Compare in this process. Return {"notes": […], "difference": text or None, "reference": file name}."""
    from loopgguf.llama import Model  # in the child only: the parent needs no libllama for this

    metadata = read_gguf(gguf).metadata
    texts, types = metadata["tokenizer.ggml.tokens"].data, metadata["tokenizer.ggml.token_type"].data
    assert isinstance(texts, list)
    assert isinstance(types, list)
    kinds = [int(kind) for kind in types]
    controls = [(token, str(texts[token])) for token, kind in enumerate(kinds) if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)]
    files = read_files(folder)
    reference = _reference_of_json(files, controls) if files.tokenizer else _reference_of_sentencepiece(files.model_path)
    notes = list(reference.notes)
    with Model(gguf, vocab_only=True) as model:

        def encode(text: str) -> list[int]:
            return model.tokenize(text, add_special=False, parse_special=True)

        difference = _compare_text(reference, encode, str(metadata["tokenizer.ggml.pre"].data), notes)
        if difference is None and files.tokenizer:  # sentencepiece itself never reads control tokens from text
            difference = _compare_controls(reference, encode, controls, notes)
        if difference is None:
            _compare_entries(reference, encode, kinds, notes)
        _compare_ends(reference, lambda text: model.tokenize(text, add_special=True, parse_special=True), notes)
    return {"notes": notes, "difference": difference, "reference": reference.name}


def _limit_memory(n_bytes: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limit, macOS refuses some
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (n_bytes, n_bytes))


def _run_child(folder: Path, gguf: Path) -> JsonObject:
    """Run `_prove` in a child process with a time and a memory limit, and return its answer."""
    size = sum(path.stat().st_size for path in (gguf, folder / "tokenizer.json", folder / "tokenizer.model") if path.is_file())
    limit = _MEMORY_BASE_BYTES + _MEMORY_PER_FILE_BYTE * size
    search_path = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "RAYON_NUM_THREADS"), "1")  # each would reserve a stack
    environment = {**os.environ, **threads, "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": os.pathsep.join(search_path)}
    # -P: the working folder, perhaps the model's own, is not searched for modules
    command = [sys.executable, "-P", "-m", "loopgguf.proof", str(folder.absolute()), str(gguf), str(limit)]
    try:
        done = subprocess.run(command, capture_output=True, env=environment, timeout=_TIME_LIMIT_SECONDS, check=False, encoding="utf-8", errors="replace")
    except subprocess.TimeoutExpired as error:
        raise InputError(
            f"tokenizer of {folder} could not be compared with llama.cpp's: no answer in {_TIME_LIMIT_SECONDS} s. Is it a hostile file?"
        ) from error
    if done.returncode != 0:
        cause = (done.stderr.strip().splitlines() or ["no message"])[-1][:300]
        if done.returncode < 0:
            cause = f"stopped by {signal.Signals(-done.returncode).name} (memory limit {limit} bytes): {cause}"
        raise InputError(f"tokenizer of {folder} could not be compared with llama.cpp's: {cause}. Download the tokenizer files again")
    answer: JsonObject = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def prove_vocabulary(folder: Path, metadata: Mapping[str, Value], *, forced: bool = False) -> tuple[str, ...]:
    """Return notes, one line each, after llama.cpp and the folder's own tokenizer gave the same token ids.

    metadata: all of the model's GGUF metadata, or the tokenizer.* keys alone. forced: the user chose the pre-tokenizer
    by name, so a difference is a note instead of an error. The folder's tokenizer is tokenizer.json as the `tokenizers`
    library reads it; where there is none, tokenizer.model as sentencepiece reads it, which knows no control tokens in
    text. Compared are TORTURE_TEXT, every control token, a sample of the vocabulary, and BOS and EOS around a text.
    What llama.cpp is known to leave out (Unicode normalization, spaces at control tokens, marks as letters for some
    pre-tokenizers) is noted, not refused.
    Raises InputError with the first differing piece and both lists of ids, or when one of the two cannot read its file.
    """
    whole = {"general.architecture": string("llama"), **metadata}
    with tempfile.TemporaryDirectory(prefix="loopgguf-") as scratch:
        gguf = Path(scratch) / "vocabulary.gguf"
        write_gguf(gguf, whole, [])
        answer = _run_child(folder, gguf)
    notes = [str(note) for note in answer["notes"]] if isinstance(answer["notes"], list) else []
    difference = answer["difference"]
    if difference is not None:
        pre = metadata["tokenizer.ggml.pre"].data
        text = f"token ids of {answer['reference']} in {folder} and of llama.cpp with pre-tokenizer {pre!r} differ {difference}"
        if not forced:
            raise InputError(f"{text}. Pass --pre-tokenizer NAME to choose another, or to accept the difference")
        notes.insert(0, text)
    return tuple(notes)


def _main(arguments: Sequence[str]) -> None:
    folder, gguf, limit = arguments
    _limit_memory(int(limit))
    answer = _prove(Path(folder), Path(gguf))
    sys.stdout.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    _main(sys.argv[1:])
