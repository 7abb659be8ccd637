"""Calibration text → chunks of token ids: texts cut as llama-imatrix cuts them, other documents packed.

A text (.txt) is one document: tokenized whole, cut into chunks of `n_ctx` tokens, tail dropped, the first token of each
chunk replaced by BOS where the vocabulary adds one. The documents of .json, .jsonl, .parquet and data sets are packed
into chunks one after another, each with its own BOS, and each token is told which document it belongs to. Where there
is more than asked for, a seeded shuffle chooses, and every source gives its share. Knows nothing of models but their
vocabulary and chat template. Sources: tools/imatrix/imatrix.cpp (`compute_imatrix`), tools/perplexity/perplexity.cpp,
common/arg.cpp (`--file` drops one closing newline).
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
import logging
import random
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from loopgguf.chat import ChatTemplate, Conversation, render
from loopgguf.corpus import Document, Part, Row, find_parts, read_rows, read_text
from loopgguf.errors import InputError, UsageError
from loopgguf.progress import Progress

logger = logging.getLogger(__name__)

DEFAULT_N_CTX = 512  # tokens; imatrices and perplexities in the wild are made with it
DEFAULT_N_CHUNKS = 512
MIN_N_CTX = 16  # llama-imatrix collects nothing from shorter batches
MIN_CHUNKS = 2  # llama-imatrix and llama-perplexity refuse a text of fewer
_BYTES_PER_TOKEN = 16  # how much text is kept for a token; prose has 4, and when it was not enough more is kept
_DOCUMENTS_AT_ONCE = 256  # how many conversations one child process renders

Tokens = NDArray[np.int32]
TextUse = Literal["calibration", "selection", "heldout"]  # of the texts that ship with the package


class Vocabulary(Protocol):
    """What is needed of a tokenizer; `llama.Model` is one. A negative `bos` or `eos` is one that it does not have."""

    adds_bos: bool
    bos: int
    eos: int

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]: ...


@dataclass(frozen=True)
class Share:
    """What one source, an argument of `-f`, gave: documents and tokens used, of as many documents read."""

    name: str
    n_documents: int
    n_tokens: int
    n_read: int


@dataclass(frozen=True)
class Chunks:
    """Calibration samples: `tokens` (n_chunks, n_ctx) int32, the base names of their files, what identifies them.

    `fingerprint` is the SHA-256 of the token ids, their documents and their shape; `notes` are lines for the user about
    what was changed or left out; `n_asked` is how many chunks were wanted. `shares` says what each source gave.

    `documents` (n_chunks, n_ctx) int32 numbers the documents of each chunk from 0 on, in order: a token must attend to
    tokens of its own number only, its position counts from the first of them, and the next token is only predicted
    within a number. None: each chunk is one document.
    """

    tokens: Tokens
    names: tuple[str, ...]
    fingerprint: str
    n_asked: int
    notes: tuple[str, ...] = ()
    documents: Tokens | None = None
    shares: tuple[Share, ...] = ()

    @property
    def n_chunks(self) -> int:
        return int(self.tokens.shape[0])

    @property
    def n_ctx(self) -> int:
        return int(self.tokens.shape[1])


def default_text(name: TextUse) -> Path:
    """Return the path of a text that ships with the package: in a wheel beside the code, in a clone in `imatrix/`."""
    package = Path(__file__).parent
    packaged = package / "texts" / f"{name}.txt"
    return packaged if packaged.exists() else package.parent / "imatrix" / f"{name}.txt"


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
    vocabulary: Vocabulary,
    paths: Sequence[str | Path],
    n_ctx: int = DEFAULT_N_CTX,
    n_chunks: int | None = DEFAULT_N_CHUNKS,
    *,
    parse_special: bool = False,
    seed: int = 0,
    template: ChatTemplate | None = None,
    progress: Progress | None = None,
) -> Chunks:
    """Return at most `n_chunks` chunks (None: all) of `n_ctx` tokens of calibration text.

    paths: what `corpus.find_parts` takes. Texts alone are cut each on its own, in order, from the start. As soon as
    other kinds are among them, documents and chunks are shuffled by `seed` and every source is used in proportion to
    its bytes. parse_special: read the special tokens spelled in texts as such; in conversations they always are.
    template: the model's own, for conversations.

    Raises InputError naming the file, the tokens got and those needed when a file holds not one chunk, or all together
    fewer than two, and for conversations without a template; as `corpus.find_parts`, `corpus.read_rows` and
    `chat.render`; UsageError for numbers that make no sense.
    """
    if n_ctx < MIN_N_CTX:
        raise UsageError(f"context size: got {n_ctx} tokens, expected at least {MIN_N_CTX}. Use -c {DEFAULT_N_CTX}")
    if n_chunks is not None and n_chunks < 1:
        raise UsageError(f"number of samples: got {n_chunks}, expected at least 1")
    parts, notes = find_parts(paths, progress)
    if n_chunks is None and sum(part.is_remote and not part.is_joined for part in parts) > 1:
        raise UsageError(f"number of samples: got all of {parts[0].source}, which is {len(parts)} files to download. Give a number")
    reader = _Reader(vocabulary, n_ctx, parse_special, template)
    load = _load_texts if all(part.is_text for part in parts) else _load_mixture
    chunks = load(reader, parts, n_chunks, seed, notes)
    for note in chunks.notes:
        logger.info("%s", note)
    return chunks


@dataclass(frozen=True)
class _Reader:
    """Documents → token ids, under one vocabulary and one set of rules."""

    vocabulary: Vocabulary
    n_ctx: int
    parse_special: bool
    template: ChatTemplate | None

    def cut(self, document: Document, n_chunks: int | None = None, min_chunks: int = 1) -> Tokens:
        """Return the chunks of a text, (n, n_ctx) int32. Raises InputError when it has fewer than `min_chunks`."""
        tokens = self.vocabulary.tokenize(document.text, add_special=True, parse_special=self.parse_special)
        _refuse_short(document.name, len(tokens), self.n_ctx, min_chunks)
        return cut_chunks(tokens, self.n_ctx, adds_bos=self.vocabulary.adds_bos, bos=self.vocabulary.bos, n_chunks=n_chunks)

    def read(self, rows: Sequence[Row]) -> list[list[int]]:
        """Return the token ids of documents, with BOS where the vocabulary adds one, and texts with EOS where it has one.

        A conversation is what the template writes: it has the ends of its turns, and often BOS, already.
        """
        conversations = [row.content for row in rows if isinstance(row.content, Conversation)]
        if conversations and self.template is None:
            remedy = "Use rows with `text`, or a model with tokenizer.chat_template"
            raise InputError(f"{conversations[0].where} holds messages, and the model has no chat template to write them with. {remedy}")
        rendered = iter(render(self.template, conversations) if self.template else ())
        return [self._read_text(row.content) if isinstance(row.content, str) else self._read_chat(next(rendered)) for row in rows]

    def _read_text(self, text: str) -> list[int]:
        tokens = self.vocabulary.tokenize(text, add_special=True, parse_special=self.parse_special)
        eos = self.vocabulary.eos
        return tokens if eos < 0 or tokens[-1:] == [eos] else [*tokens, eos]

    def _read_chat(self, text: str) -> list[int]:
        tokens = self.vocabulary.tokenize(text, add_special=False, parse_special=True)
        return tokens if self.bos is None or tokens[:1] == [self.bos] else [self.bos, *tokens]

    @property
    def bos(self) -> int | None:
        """What every document and every piece of one begins with, if anything."""
        return self.vocabulary.bos if self.vocabulary.adds_bos else None


def _refuse_short(name: str, n_tokens: int, n_ctx: int, min_chunks: int) -> None:
    if n_tokens < min_chunks * n_ctx:
        raise InputError(
            f"calibration text {name} is too short: got {n_tokens} tokens, expected at least {min_chunks * n_ctx} for {n_ctx} a sample. "
            "Give more text, or a smaller context with -c"
        )


def _finish(tokens: Tokens, documents: Tokens | None, shares: Sequence[Share], names: Sequence[str], n_asked: int | None, notes: Sequence[str]) -> Chunks:
    """Return the chunks with the fingerprint of their content; what every chunk is one document of needs no numbers."""
    if documents is not None and not documents.any():
        documents = None
    digest = hashlib.sha256(repr(tokens.shape).encode())
    for content in (tokens, documents):
        if content is not None:
            digest.update(np.ascontiguousarray(content, "<i4").tobytes())
    return Chunks(tokens, tuple(names), digest.hexdigest(), n_asked or len(tokens), tuple(notes), documents, tuple(shares))


# --- texts alone ------------------------------------------------------------------------------------------------------


def _load_texts(reader: _Reader, parts: Sequence[Part], n_chunks: int | None, _seed: int, notes: list[str]) -> Chunks:
    """Return the first chunks of the texts, as llama-imatrix would use them."""
    skipped = Counter[str]()
    documents = [read_text(part, skipped) for part in parts]
    notes += [note for document in documents for note in document.notes]
    cuts: list[Tokens] = []
    n_read, n_tokens, n_used = Counter[str](), Counter[str](), Counter[str]()
    for part, document in zip(parts, documents, strict=True):
        n_read[part.source] += 1
        n_left = None if n_chunks is None else n_chunks - sum(len(cut) for cut in cuts)
        if n_left == 0:
            notes.append(f"{document.name}: not used, the texts before it hold the {n_chunks} samples asked for")
            continue
        cuts.append(reader.cut(document, n_left, MIN_CHUNKS if len(documents) == 1 else 1))
        n_used[part.source] += 1
        n_tokens[part.source] += cuts[-1].size
    shares = [Share(name, n_used[name], n_tokens[name], n_read[name]) for name in n_read]
    return _finish(np.concatenate(cuts), None, shares, [document.name for document in documents[: len(cuts)]], n_chunks, notes)


# --- documents --------------------------------------------------------------------------------------------------------


class _Sample:
    """The first rows of a seeded shuffle of one source, `max_bytes` of them (None: all); the rest is only counted."""

    def __init__(self, seed: str, max_bytes: int | None) -> None:
        self.random, self.max_bytes = random.Random(seed), max_bytes
        self.heap: list[tuple[float, int, Row]] = []  # the last of the shuffle on top
        self.n_rows = self.n_bytes = self.kept_bytes = 0

    def add(self, row: Row) -> None:
        self.n_rows += 1
        self.n_bytes += row.n_bytes
        self.kept_bytes += row.n_bytes
        heapq.heappush(self.heap, (-self.random.random(), self.n_rows, row))
        while self.max_bytes is not None and self.kept_bytes - self.heap[0][2].n_bytes >= self.max_bytes:
            self.kept_bytes -= heapq.heappop(self.heap)[2].n_bytes

    @property
    def is_full(self) -> bool:
        return self.max_bytes is not None and self.n_bytes >= self.max_bytes

    @property
    def is_cut(self) -> bool:
        return self.kept_bytes < self.n_bytes

    def rows(self) -> Iterator[tuple[float, Row]]:
        """Yield the rows as shuffled, each with the fraction of the source's bytes that it is the middle of."""
        before = 0
        for _, _, row in sorted(self.heap, key=lambda entry: (-entry[0], entry[1])):
            yield (before + row.n_bytes / 2) / self.n_bytes, row
            before += row.n_bytes


@dataclass(frozen=True, order=True)
class _Unit:
    """A document of many, or one chunk of a text; sources are used side by side when units go by `rank`, in [0, 1]."""

    rank: float
    source: int
    document: int
    chunk: int
    content: Row | Tokens = field(compare=False)


def _text_units(cut: Tokens, source: int, document: int, seed: int) -> list[_Unit]:
    """Return the chunks of a text in a seeded order."""
    order = list(range(len(cut)))
    random.Random(f"{seed}:text {document}").shuffle(order)
    return [_Unit((place + 0.5) / len(cut), source, document, chunk, cut[chunk]) for place, chunk in enumerate(order)]


def _row_units(sample: _Sample, source: int) -> list[_Unit]:
    return [_Unit(rank, source, place, 0, row) for place, (rank, row) in enumerate(sample.rows())]


class _Pack:
    """Documents one after another as they fill chunks: the tokens, and for each the number of its document."""

    def __init__(self, n_ctx: int, bos: int | None) -> None:
        self.n_ctx, self.bos = n_ctx, bos
        self.tokens: list[int] = []
        self.numbers: list[int] = []
        self.sources: list[int] = []  # of each document

    def add(self, tokens: Sequence[int], source: int) -> None:
        """Append a document; what goes on in the next chunk begins with BOS there too."""
        rest = list(tokens)
        while rest:
            room = self.n_ctx - len(self.tokens) % self.n_ctx
            self.tokens += rest[:room]
            self.numbers += [len(self.sources)] * len(rest[:room])
            rest = rest[room:]
            if rest and self.bos is not None:
                rest.insert(0, self.bos)
        self.sources.append(source)

    @property
    def n_chunks(self) -> int:
        return len(self.tokens) // self.n_ctx

    def chunks(self, n_chunks: int | None) -> tuple[Tokens, Tokens]:
        """Return the tokens and the numbers of their documents, both (n, n_ctx) int32, numbered over all chunks."""
        n = self.n_chunks if n_chunks is None else min(n_chunks, self.n_chunks)
        tokens, numbers = (np.array(values[: n * self.n_ctx], np.int32).reshape(n, self.n_ctx) for values in (self.tokens, self.numbers))
        return tokens, numbers


def _load_mixture(reader: _Reader, parts: Sequence[Part], n_chunks: int | None, seed: int, notes: list[str]) -> Chunks:
    """Return chunks of all sources, each in proportion to its bytes, chosen by a seeded shuffle."""
    names = list(dict.fromkeys(part.source for part in parts))
    texts = [(names.index(part.source), read_text(part, Counter())) for part in parts if part.is_text]
    notes += [note for _, document in texts for note in document.notes]
    queues = [_text_units(reader.cut(document), source, number, seed) for number, (source, document) in enumerate(texts)]
    row_parts = [[part for part in parts if part.source == name and not part.is_text] for name in names]
    n_bytes_kept = None if n_chunks is None else n_chunks * reader.n_ctx * _BYTES_PER_TOKEN
    while True:
        row_notes: list[str] = []
        samples = [_sample_source(own, f"{seed}:{source}", n_bytes_kept, row_notes) for source, own in enumerate(row_parts)]
        units = heapq.merge(*queues, *(_row_units(sample, source) for source, sample in enumerate(samples)))
        cuts, pack = _fill(reader, units, n_chunks)
        if n_chunks is None or n_bytes_kept is None or len(cuts) + pack.n_chunks >= n_chunks or not any(sample.is_cut for sample in samples):
            break
        n_bytes_kept *= 4  # its documents have more bytes a token than thought
    n_read = [sample.n_rows + sum(source == own for own, _ in texts) for source, sample in enumerate(samples)]
    return _join(reader, [Share(name, 0, 0, n) for name, n in zip(names, n_read, strict=True)], cuts, pack, n_chunks, [*notes, *row_notes])


def _sample_source(parts: Sequence[Part], seed: str, max_bytes: int | None, notes: list[str]) -> _Sample:
    """Return the sample of the files of one source; of a data set on the hub, only as many files as are needed are read."""
    sample, skipped = _Sample(seed, max_bytes), Counter[str]()
    for number, part in enumerate(parts):
        if part.is_remote and sample.is_full:
            notes.append(f"{part.source}: {number} of its {len(parts)} files read, they hold more than is needed")
            break
        for row in read_rows(part, skipped):
            sample.add(row)
    notes += [f"{name}: {n} empty rows passed over" for name, n in skipped.items()]
    return sample


def _fill(reader: _Reader, units: Iterable[_Unit], n_chunks: int | None) -> tuple[list[_Unit], _Pack]:
    """Return the chunks of texts and the packed documents that come first among `units`, until they are `n_chunks`."""
    cuts, pack, rest = list[_Unit](), _Pack(reader.n_ctx, reader.bos), iter(units)
    while batch := list(itertools.islice(rest, _DOCUMENTS_AT_ONCE)):
        tokens = iter(reader.read([unit.content for unit in batch if isinstance(unit.content, Row)]))
        for unit in batch:
            if n_chunks is not None and len(cuts) + pack.n_chunks >= n_chunks:
                return cuts, pack
            if isinstance(unit.content, Row):
                pack.add(next(tokens), unit.source)
            else:
                cuts.append(unit)
    return cuts, pack


def _join(reader: _Reader, shares: Sequence[Share], cuts: list[_Unit], pack: _Pack, n_chunks: int | None, notes: Sequence[str]) -> Chunks:
    """Return the chunks of texts in their own order, then the packed ones, with what each source gave."""
    cuts = sorted(cuts, key=lambda unit: (unit.source, unit.document, unit.chunk))
    packed, numbers = pack.chunks(None if n_chunks is None else n_chunks - len(cuts))
    texts = np.array([unit.content for unit in cuts], np.int32).reshape(len(cuts), reader.n_ctx)
    tokens = np.concatenate([texts, packed])
    if len(tokens) < MIN_CHUNKS and len(tokens) != n_chunks:
        _refuse_short(", ".join(share.name for share in shares), texts.size + len(pack.tokens), reader.n_ctx, MIN_CHUNKS)
    n_tokens_of, n_documents_of = Counter[int](), Counter[int]()
    for (source, _), n in Counter((unit.source, unit.document) for unit in cuts).items():
        n_tokens_of[source] += n * reader.n_ctx
        n_documents_of[source] += 1
    for number, n in zip(*np.unique(numbers, return_counts=True), strict=True):
        n_tokens_of[pack.sources[number]] += int(n)
        n_documents_of[pack.sources[number]] += 1
    shares = [replace(share, n_documents=n_documents_of[i], n_tokens=n_tokens_of[i]) for i, share in enumerate(shares)]
    documents = np.concatenate([np.zeros_like(texts), numbers - numbers[:, :1]])
    return _finish(tokens, documents, shares, [share.name for share in shares if share.n_tokens], n_chunks, notes)


def describe_shortage(chunks: Chunks) -> str:
    """Return `51 of 512 samples available` when the text held fewer chunks than were asked for, else an empty text."""
    return "" if chunks.n_chunks >= chunks.n_asked else f"{chunks.n_chunks} of {chunks.n_asked} samples available"
