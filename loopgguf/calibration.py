"""Calibration text → chunks of token ids, cut exactly as llama-imatrix and llama-perplexity cut them.

A .txt is one document: read as UTF-8, tokenized whole, cut into chunks of `n_ctx` tokens, tail dropped, the first
token of each chunk replaced by BOS where the vocabulary adds one. Knows nothing of models but their vocabulary, and
does not download anything. Sources: tools/imatrix/imatrix.cpp (`compute_imatrix`), tools/perplexity/perplexity.cpp,
common/arg.cpp (`--file` drops one closing newline).
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from loopgguf.errors import InputError, UsageError

logger = logging.getLogger(__name__)

DEFAULT_N_CTX = 512  # tokens; imatrices and perplexities in the wild are made with it
DEFAULT_N_CHUNKS = 512
MIN_N_CTX = 16  # llama-imatrix collects nothing from shorter batches
MIN_CHUNKS = 2  # llama-imatrix and llama-perplexity refuse a text of fewer
BYTE_ORDER_MARK = "\ufeff"


class Vocabulary(Protocol):
    """What is needed of a tokenizer; `llama.Model` is one."""

    adds_bos: bool
    bos: int

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]: ...


@dataclass(frozen=True)
class Document:
    """One text: the base name of its file, its characters, and what was changed while reading it."""

    name: str
    text: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Chunks:
    """Calibration samples: `tokens` (n_chunks, n_ctx) int32, the base names of their files, what identifies them.

    `fingerprint` is the SHA-256 of the token ids and their shape; `notes` are lines for the user about what was
    changed or left out; `n_asked` is how many chunks were wanted.
    """

    tokens: NDArray[np.int32]
    names: tuple[str, ...]
    fingerprint: str
    n_asked: int
    notes: tuple[str, ...] = ()

    @property
    def n_chunks(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def n_ctx(self) -> int:
        return int(self.tokens.shape[1])


def default_text(name: Literal["calibration", "heldout"]) -> Path:
    """Return the path of a text that ships with the package: in a wheel beside the code, in a clone in `imatrix/`."""
    package = Path(__file__).parent
    packaged = package / "texts" / f"{name}.txt"
    return packaged if packaged.exists() else package.parent / "imatrix" / f"{name}.txt"


def read_document(path: Path) -> Document:
    """Return the text of a UTF-8 file without byte order mark, with LF line ends and without one closing newline.

    Raises InputError when the file cannot be read, is not UTF-8 (with the byte offset), or holds no text.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read calibration text {path}: {error.strerror}. Check the path and its permissions") from error
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"encoding of {path}: got byte {raw[error.start]:#04x} at offset {error.start}, expected UTF-8. Save the text as UTF-8") from error
    notes = []
    if text.startswith(BYTE_ORDER_MARK):
        text = text.removeprefix(BYTE_ORDER_MARK)
        notes.append(f"{path.name}: byte order mark removed")
    if "\r\n" in text:
        notes.append(f"{path.name}: {text.count(chr(13) + chr(10))} CRLF line ends read as LF")
        text = text.replace("\r\n", "\n")
    if not text.strip():
        raise InputError(f"calibration text {path}: got an empty file, expected text. Give another file with -f")
    return Document(path.name, text.removesuffix("\n"), tuple(notes))


def read_text(paths: Sequence[Path]) -> tuple[Document, ...]:
    """Return each file as a document of its own, in the order given. Raises as `read_document`; UsageError for none."""
    if not paths:
        raise UsageError("no calibration text: got no file, expected at least one with -f")
    return tuple(read_document(path) for path in paths)


def cut_chunks(tokens: Sequence[int], n_ctx: int, *, adds_bos: bool, bos: int, n_chunks: int | None = None) -> NDArray[np.int32]:
    """Return the first `n_chunks` chunks (None: all) of one document, (n, n_ctx) int32; n is what it has, 0 included.

    The tail is dropped; where the vocabulary adds BOS it replaces the first token of each chunk (imatrix.cpp).
    """
    n = len(tokens) // n_ctx
    n = n if n_chunks is None else min(n, n_chunks)
    cut = np.array(tokens[: n * n_ctx], np.int32).reshape(n, n_ctx)
    if adds_bos:
        cut[:, 0] = bos
    return cut


def load_chunks(
    vocabulary: Vocabulary, paths: Sequence[Path], n_ctx: int = DEFAULT_N_CTX, n_chunks: int | None = DEFAULT_N_CHUNKS, *, parse_special: bool = False
) -> Chunks:
    """Return the first `n_chunks` chunks (None: all) of `n_ctx` tokens of the files' text, each file cut on its own, in order.

    Raises InputError naming the file, the tokens got and those needed when a file holds not one chunk, or the only one
    fewer than two; as `read_text` for files that cannot be used; UsageError for numbers that make no sense.
    """
    if n_ctx < MIN_N_CTX:
        raise UsageError(f"context size: got {n_ctx} tokens, expected at least {MIN_N_CTX}. Use -c {DEFAULT_N_CTX}")
    if n_chunks is not None and n_chunks < 1:
        raise UsageError(f"number of samples: got {n_chunks}, expected at least 1")
    documents = read_text(paths)
    parts: list[NDArray[np.int32]] = []
    notes = [note for document in documents for note in document.notes]
    for document in documents:
        n_left = None if n_chunks is None else n_chunks - sum(len(part) for part in parts)
        if n_left == 0:
            notes.append(f"{document.name}: not used, the texts before it hold the {n_chunks} samples asked for")
            continue
        tokens = vocabulary.tokenize(document.text, add_special=True, parse_special=parse_special)
        _refuse_short(document.name, len(tokens), n_ctx, MIN_CHUNKS if len(documents) == 1 else 1)
        parts.append(cut_chunks(tokens, n_ctx, adds_bos=vocabulary.adds_bos, bos=vocabulary.bos, n_chunks=n_left))
    cut = np.concatenate(parts)
    for note in notes:
        logger.info("%s", note)
    return Chunks(cut, tuple(d.name for d in documents[: len(parts)]), _fingerprint(cut), n_chunks or len(cut), tuple(notes))


def _refuse_short(name: str, n_tokens: int, n_ctx: int, min_chunks: int) -> None:
    if n_tokens < min_chunks * n_ctx:
        raise InputError(
            f"calibration text {name} is too short: got {n_tokens} tokens, expected at least {min_chunks * n_ctx} for {n_ctx} a sample. "
            "Give more text, or a smaller context with -c"
        )


def _fingerprint(tokens: NDArray[np.int32]) -> str:
    digest = hashlib.sha256(repr(tokens.shape).encode())
    digest.update(np.ascontiguousarray(tokens, "<i4").tobytes())
    return digest.hexdigest()


def describe_shortage(chunks: Chunks) -> str:
    """Return `51 of 512 samples available` when the text held fewer chunks than were asked for, else an empty text."""
    return "" if chunks.n_chunks >= chunks.n_asked else f"{chunks.n_chunks} of {chunks.n_asked} samples available"
