"""Files of calibration text → documents, strictly read: .txt, .json, .jsonl, .parquet, folders, standard input, hub.

A text (.txt, every ending not named here, `-`) is one document as it stands. The other kinds hold many: a row is an
object with `messages`, `text`, or `prompt` and `completion`, or a string in JSON. Rows are streamed; what is wrong
with one is an error that names file and row, and only empty rows are passed over, and counted. Does not tokenize and
does not render conversations.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

from loopgguf import hub
from loopgguf.chat import Conversation
from loopgguf.container import refuse_pointer
from loopgguf.documents import parse_json
from loopgguf.errors import InputError, UsageError
from loopgguf.progress import Progress

MAX_TEXT_BYTES = 256 << 20  # of one document; its tokens take some ten times as much memory
MAX_LINE_BYTES = 64 << 20
BYTE_ORDER_MARK = "\ufeff"
STDIN = "-"
_COLUMNS = ("messages", "tools", "text", "prompt", "completion")
_EXPECTED = "messages, text, or prompt and completion"
_ROWS_AT_ONCE = 1024
_KINDS = {".json": "json", ".jsonl": "jsonl", ".parquet": "parquet", ".txt": "text"}


@dataclass(frozen=True)
class Document:
    """One text: the base name of its file, its characters, and what was changed while reading it."""

    name: str
    text: str
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A document among many: a text, or a conversation to be rendered; `n_bytes` of UTF-8 tell how much it is."""

    content: str | Conversation
    n_bytes: int


@dataclass(frozen=True)
class Part:
    """One file of a source. `source` is the name that its share goes by, `name` the one in messages.

    kind: "text", "json", "jsonl" or "parquet". locate: gives the path, downloaded if need be; None: standard input.
    is_joined: the rows are the paragraphs of one text. is_remote: it is not worth reading beyond what is needed.
    """

    source: str
    name: str
    kind: str
    locate: Callable[[], Path] | None
    is_joined: bool = False
    is_remote: bool = False

    @property
    def is_text(self) -> bool:
        """Whether it is one document, to be cut as llama-imatrix does."""
        return self.kind == "text" or self.is_joined

    @cached_property
    def path(self) -> Path:
        assert self.locate is not None, self.name
        return self.locate()


# --- what was asked for -----------------------------------------------------------------------------------------------


def find_parts(inputs: Sequence[str | Path], progress: Progress | None = None) -> tuple[list[Part], list[str]]:
    """Return the files that `-f` names, in order, and notes for the user. A path that exists wins over a data set's name.

    Raises UsageError for none and for standard input twice, InputError for what is not there, an empty folder, a link
    that leads out of a folder, and as `hub.open_dataset`.
    """
    if not inputs:
        raise UsageError("no calibration text: got no file, expected at least one with -f")
    if sum(str(item) == STDIN for item in inputs) > 1:
        raise UsageError("standard input was given twice as calibration text: give -f - once")
    parts: list[Part] = []
    notes: list[str] = []
    for item in inputs:
        parts += _expand(str(item), notes, progress)
    return parts, notes


def _expand(item: str, notes: list[str], progress: Progress | None) -> list[Part]:
    path = Path(item)
    if item == STDIN:
        return [Part("stdin", "stdin", "text", None)]
    reference = None if path.exists() else hub.parse_reference(item)
    if reference is not None:
        return _dataset_parts(hub.open_dataset(reference), notes, progress)
    if path.is_dir():
        return _folder_parts(path, notes)
    return [_file_part(path, path.name, path.name)]


def _file_kind(name: str) -> str | None:
    return _KINDS.get(Path(name.lower().removesuffix(".gz")).suffix)


def _file_part(path: Path, source: str, name: str) -> Part:
    return Part(source, name, _file_kind(path.name) or "text", lambda: path)


def _dataset_parts(dataset: hub.Dataset, notes: list[str], progress: Progress | None) -> list[Part]:
    notes += [*dataset.notes, f"{dataset.reference.name}: {dataset.reference.repo} at revision {dataset.revision[:12]}"]

    def part(file: str) -> Part:
        name = f"{dataset.reference.name} {file}"
        return Part(
            dataset.reference.name,
            name,
            _file_kind(file) or "text",
            lambda: hub.fetch_file(dataset, file, progress),
            is_joined=dataset.reference.is_joined,
            is_remote=True,
        )

    return [part(file) for file in dataset.files]


def _folder_parts(folder: Path, notes: list[str]) -> list[Part]:
    """Return the files of the known kinds in a folder and its subfolders, by name; hidden ones are passed over."""
    root, parts, n_others = folder.resolve(), list[Part](), 0
    for path in _walk(folder):
        if path.is_symlink() and not path.resolve().is_relative_to(root):
            raise InputError(f"{path} is a link that leads out of the folder {folder}: remove it, or give the file itself with -f")
        if not path.is_file():
            continue
        if _file_kind(path.name) is None:
            n_others += 1
        else:
            parts.append(_file_part(path, root.name, f"{root.name}/{path.relative_to(folder).as_posix()}"))
    if not parts:
        raise InputError(f"no calibration text in the folder {folder}: got {n_others} files of other kinds, expected {', '.join(sorted(_KINDS))}")
    if n_others:
        notes.append(f"{root.name}: {n_others} files of other kinds passed over")
    return parts


def _walk(folder: Path) -> Iterator[Path]:
    """Yield all files and all links in a folder, sorted by path, without following links."""
    paths: list[Path] = []
    for where, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        paths += [Path(where) / name for name in (*links, *files) if not name.startswith(".")]
    yield from sorted(paths)


# --- texts ------------------------------------------------------------------------------------------------------------


def read_document(path: Path) -> Document:
    """Return the text of a UTF-8 file without byte order mark, with LF line ends and without one closing newline.

    Raises InputError when the file cannot be read, is not UTF-8 (with the byte offset), binary, too large, a git-lfs
    pointer, or holds no text.
    """
    with _opened(path, str(path)) as stream:
        return _decode_document(stream.read(MAX_TEXT_BYTES + 1), path.name, str(path))


def read_text(part: Part, skipped: Counter[str]) -> Document:
    """Return a part that is one document; one with joined rows has an empty line between them. Raises as `read_document`."""
    if part.is_joined and part.kind != "text":
        rows = [row.content for row in read_rows(part, skipped)]
        return Document(part.source, "\n\n".join(row for row in rows if isinstance(row, str)))
    if part.locate is None:
        return _decode_document(sys.stdin.buffer.read(MAX_TEXT_BYTES + 1), "stdin", "standard input")
    return read_document(part.path)


def _decode_document(raw: bytes, name: str, where: str) -> Document:
    if len(raw) > MAX_TEXT_BYTES:
        raise InputError(f"calibration text {where}: got more than {MAX_TEXT_BYTES >> 20} MiB in one document. Cut it, or give .jsonl with a row per document")
    text = _decode(raw, where)
    if "\0" in text:
        raise InputError(f"calibration text {where}: got a zero byte at offset {raw.index(0)}, expected text. It is a binary file; give another one with -f")
    notes = []
    if text.startswith(BYTE_ORDER_MARK):
        text = text.removeprefix(BYTE_ORDER_MARK)
        notes.append(f"{name}: byte order mark removed")
    if "\r\n" in text:
        notes.append(f"{name}: {text.count(chr(13) + chr(10))} CRLF line ends read as LF")
        text = text.replace("\r\n", "\n")
    if not text.strip():
        raise InputError(f"calibration text {where}: got an empty file, expected text. Give another file with -f")
    return Document(name, text.removesuffix("\n"), tuple(notes))


def _decode(raw: bytes, where: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"encoding of {where}: got byte {raw[error.start]:#04x} at offset {error.start}, expected UTF-8. Save the text as UTF-8") from error


@contextlib.contextmanager
def _opened(path: Path, where: str) -> Iterator[BinaryIO]:
    """Give a file's bytes, unpacked when its name ends in .gz; what cannot be read is an InputError."""
    try:
        with path.open("rb") as stream:
            refuse_pointer(where, stream.peek(64))
            if path.suffix.lower() != ".gz":
                yield stream
                return
            with gzip.open(stream) as unpacked:
                yield unpacked  # type: ignore[misc]  # a GzipFile reads like any binary file
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise InputError(f"cannot unpack {where}: {error}. Download or compress the file again") from error
    except OSError as error:
        raise InputError(f"cannot read calibration text {where}: {error.strerror or error}. Check the path and its permissions") from error


# --- rows -------------------------------------------------------------------------------------------------------------


def read_rows(part: Part, skipped: Counter[str]) -> Iterator[Row]:
    """Yield the documents of a part that holds many, in order; the empty ones are counted in `skipped` by part name.

    Raises InputError naming file and row for one that is malformed, of the wrong types or has none of the columns, and
    for a file that cannot be read or holds no rows.
    """
    values = {"json": _json_values, "jsonl": _json_lines, "parquet": _parquet_values}[part.kind](part)
    n_rows = 0
    for where, value in values:
        n_rows += 1
        row = _to_row(value, where)
        if row is None:
            skipped[part.name] += 1
        else:
            yield row
    if not n_rows:
        raise InputError(f"calibration text {part.name}: got no rows, expected at least one with {_EXPECTED}. Give another file with -f")


def _json_lines(part: Part) -> Iterator[tuple[str, object]]:
    with _opened(part.path, part.name) as stream:
        yield from _lines_of(stream, part)


def _lines_of(stream: BinaryIO, part: Part) -> Iterator[tuple[str, object]]:
    for number in itertools.count(1):
        line = stream.readline(MAX_LINE_BYTES + 1)
        if not line:
            return
        where = f"{part.name}, line {number}"
        if len(line) > MAX_LINE_BYTES:
            raise InputError(f"bad row in {where}: got more than {MAX_LINE_BYTES >> 20} MiB in one line, expected one JSON object a line. Cut the document")
        text = _decode(line, where).removeprefix(BYTE_ORDER_MARK if number == 1 else "").strip()
        if text:
            yield where, _parse(text, where)


def _parse(text: str, where: str) -> object:
    try:
        return parse_json(text)
    except ValueError as error:
        raise InputError(f"bad row in {where}: got {str(error)[:120]}, expected one JSON object. Fix or remove the row") from error


def _json_values(part: Part) -> Iterator[tuple[str, object]]:
    """Yield the items of a list; a .json that is no list holds a row a line, as many on the hub do."""
    with _opened(part.path, part.name) as stream:
        start = stream.read(64).decode("utf-8", "replace").removeprefix(BYTE_ORDER_MARK).lstrip()
        stream.seek(0)
        if not start.startswith("["):
            yield from _lines_of(stream, part)
            return
        raw = stream.read(MAX_TEXT_BYTES + 1)
    if len(raw) > MAX_TEXT_BYTES:
        raise InputError(f"{part.name}: got more than {MAX_TEXT_BYTES >> 20} MiB of JSON in one list, expected less. Save it as .jsonl, a row a line")
    items = _parse(_decode(raw, part.name).removeprefix(BYTE_ORDER_MARK), part.name)
    assert isinstance(items, list)
    for number, item in enumerate(items, 1):
        yield f"{part.name}, item {number}", item


def _parquet_values(part: Part) -> Iterator[tuple[str, object]]:
    try:
        import pyarrow
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InputError(f"cannot read {part.name}: .parquet needs pyarrow, which is not installed. Run pip install 'loopgguf[parquet]'") from error
    numbers = itertools.count(1)
    try:
        with _opened(part.path, part.name) as stream, ParquetFile(stream) as file:
            columns = [name for name in _COLUMNS if name in file.schema_arrow.names]
            if not set(columns) & {"messages", "text", "prompt"}:
                raise _no_column(part.name, file.schema_arrow.names)
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                yield from ((f"{part.name}, row {next(numbers)}", row) for row in batch.to_pylist())
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {part.name} from row {next(numbers)}: {str(error)[:160]}. Download or save the file again") from error


def _no_column(where: str, names: Sequence[str]) -> InputError:
    shown = ", ".join(map(str, names[:12])) or "none"
    return InputError(f"no usable column in {where}: got {shown:.300}, expected {_EXPECTED}. Rename the column that holds the text")


def _to_row(value: object, where: str) -> Row | None:
    """Return a row's document, or None for an empty one; null and a missing key are the same, as in parquet."""
    if isinstance(value, str):
        return _text_row(value, where)
    if not isinstance(value, dict):
        raise _bad_row(where, _spoken(value), "an object or a text")
    given = {key: value[key] for key in _COLUMNS if value.get(key) is not None}
    if "messages" in given:
        return _chat_row(given["messages"], given.get("tools"), where)
    if "text" in given:
        return _text_row(_text(given["text"], "text", where), where)
    if "prompt" in given and "completion" in given:
        return _pair_row(given["prompt"], given["completion"], where)
    if any(key in value for key in ("messages", "text", "prompt")) and "prompt" not in given and "completion" not in given:
        return None  # the column is there, and empty
    raise _no_column(where, list(value))


def _bad_row(where: str, got: str, expected: str) -> InputError:
    return InputError(f"bad row in {where}: got {got}, expected {expected}. Fix or remove the row")


def _spoken(value: object) -> str:
    """Return the kind of a value in words of JSON."""
    names = {str: "a text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object", type(None): "null", bytes: "bytes"}
    return names.get(type(value), type(value).__name__)


def _text(value: object, column: str, where: str) -> str:
    if not isinstance(value, str):
        raise _bad_row(where, f"{_spoken(value)} as {column}", "a text")
    return value


def _text_row(text: str, where: str) -> Row | None:
    return Row(text, _n_bytes(text, where)) if text.strip() else None


def _pair_row(prompt: object, completion: object, where: str) -> Row | None:
    if isinstance(prompt, list) and isinstance(completion, list):
        return _chat_row([*prompt, *completion], None, where)
    return _text_row(_text(prompt, "prompt", where) + _text(completion, "completion", where), where)


def _chat_row(messages: object, tools: object, where: str) -> Row | None:
    if not isinstance(messages, list):
        raise _bad_row(where, f"{_spoken(messages)} as messages", "a list of objects with role and content")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise _bad_row(where, f"message {number} without a role", "an object with role and content")
    if tools is not None and not isinstance(tools, list):
        raise _bad_row(where, f"{_spoken(tools)} as tools", "a list")
    if not messages:
        return None
    try:
        spelled = json.dumps([messages, tools], ensure_ascii=False)
    except (TypeError, ValueError) as error:  # parquet has bytes and dates
        raise _bad_row(where, f"{error}", "messages of texts, numbers, lists and objects") from error
    return Row(Conversation(where, messages, tools), _n_bytes(spelled, where))


def _n_bytes(text: str, where: str) -> int:
    try:
        return len(text.encode())
    except UnicodeEncodeError as error:
        raise _bad_row(where, f"half a surrogate pair at character {error.start}", "whole characters") from error
