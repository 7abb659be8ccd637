"""GGUF files: a strict bounded reader and a two-pass writer. Bytes only; ggml's reversed dims live only here.

The reader believes nothing: every count, length, offset and product is checked with exact integers against the size
of the file before anything is allocated, so time and memory are bounded by the file's size, and a file that passes is
laid out exactly as ggml expects it (ggml/src/gguf.cpp). The writer plans the header to the byte first; payloads are
then written at their offsets, in any order and from any thread. Replaces gguf-py's GGUFReader, which accepts
overlapping and wrapping offsets. Format: ggml/docs/gguf.md, version 3, little endian.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import re
import shutil
import struct
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from io import BufferedReader, FileIO
from pathlib import Path
from types import TracebackType
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from loopgguf.errors import InputError, OutputError
from loopgguf.formats import ACTIVATION_TYPES, FORMATS, GGUF_ALIGNMENT, REMOVED_TYPES, GgmlType, padded, row_bytes, tensor_bytes

logger = logging.getLogger(__name__)

MAGIC = b"GGUF"
VERSION = 3
MAX_NAME_BYTES = 63  # GGML_MAX_NAME counts a closing NUL
MAX_KEY_BYTES = 65535
MAX_DIMS = 4
_LFS_POINTER = b"version https://git-lfs"
_PIECE_BYTES = 1 << 20  # read at a time where bytes are hashed

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some network file systems
_NO_PREALLOCATION = (errno.EINVAL, errno.EOPNOTSUPP)  # ZFS among others
_NO_FOLDER_SYNC = (errno.EINVAL, errno.EBADF, errno.EOPNOTSUPP)  # some network file systems

Shape = tuple[int, ...]
Scalar = int | float | bool | str


class ValueType(IntEnum):
    """The types of metadata values, numbered as in gguf.h."""

    UINT8 = 0
    INT8 = 1
    UINT16 = 2
    INT16 = 3
    UINT32 = 4
    INT32 = 5
    FLOAT32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9
    UINT64 = 10
    INT64 = 11
    FLOAT64 = 12


_SCALAR_FORMATS = {
    ValueType.UINT8: "<B",
    ValueType.INT8: "<b",
    ValueType.UINT16: "<H",
    ValueType.INT16: "<h",
    ValueType.UINT32: "<I",
    ValueType.INT32: "<i",
    ValueType.FLOAT32: "<f",
    ValueType.BOOL: "<B",
    ValueType.UINT64: "<Q",
    ValueType.INT64: "<q",
    ValueType.FLOAT64: "<d",
}
_STRING_LENGTH = struct.Struct("<Q")


@dataclass(frozen=True)
class Value:
    """A metadata value with its exact type, so that a copy is the same bytes. Arrays are lists of one `item_type`."""

    type: ValueType
    data: Scalar | list[Scalar]
    item_type: ValueType | None = None


Metadata = Mapping[str, Value]


def uint32(data: int) -> Value:
    return Value(ValueType.UINT32, data)


def float32(data: float) -> Value:
    return Value(ValueType.FLOAT32, data)


def boolean(data: bool) -> Value:
    return Value(ValueType.BOOL, data)


def string(data: str) -> Value:
    return Value(ValueType.STRING, data)


def array(item_type: ValueType, data: Iterable[Scalar]) -> Value:
    return Value(ValueType.ARRAY, list(data), item_type)


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: row-major `shape` (the last dimension is the row), absolute `offset` in its file, bytes."""

    name: str
    type: GgmlType
    shape: Shape
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class GgufFile:
    """The header of one GGUF file that has passed every check."""

    path: Path
    metadata: Metadata
    tensors: tuple[TensorInfo, ...]
    data_offset: int
    size_bytes: int


# --- reading ----------------------------------------------------------------------------------------------------------


def refuse_pointer(where: Path | str, start: bytes) -> None:
    """Raise InputError when a file that begins with `start` is what git has in place of a large one."""
    if start.startswith(_LFS_POINTER):
        raise InputError(f"{where} is a git-lfs pointer, not the file itself: run `git lfs pull` or download the file again")


class _Cursor:
    """Reads a header front to back; every read is checked against the bytes that are left."""

    def __init__(self, stream: BufferedReader[FileIO], path: Path, size: int) -> None:
        self.stream, self.path, self.size = stream, path, size
        self.position = 0

    @property
    def left(self) -> int:
        return self.size - self.position

    def refuse(self, field: str, got: object, expected: str) -> NoReturn:
        # the file chose what is quoted, so it is cut to a readable length
        place = f"{field:.160} in {self.path} at byte {self.position}"
        raise InputError(f"malformed GGUF: {place}: got {got!s:.160}, expected {expected}. Download or convert the file again")

    def take(self, n_bytes: int, field: str) -> bytes:
        if n_bytes > self.left:
            self.refuse(field, f"a need of {n_bytes} bytes", f"at most the {self.left} bytes left in the file")
        data = self.stream.read(n_bytes)
        if len(data) != n_bytes:
            self.refuse(field, f"{len(data)} bytes", f"{n_bytes}; the file shrank while it was read")
        self.position += n_bytes
        return data

    def number(self, value_type: ValueType, field: str) -> int | float:
        fmt = _SCALAR_FORMATS[value_type]
        result: int | float = struct.unpack(fmt, self.take(struct.calcsize(fmt), field))[0]
        return result

    def count(self, value_type: ValueType, field: str, item_bytes: int) -> int:
        """Read a count of items of at least `item_bytes` each, which must fit in what is left of the file."""
        n = int(self.number(value_type, field))
        if n * item_bytes > self.left:
            self.refuse(field, n, f"at most {self.left // item_bytes}, for {self.left} bytes are left in the file")
        return n

    def text(self, field: str, errors: str = "strict") -> str:
        raw = self.take(self.count(ValueType.UINT64, f"length of {field}", 1), field)
        try:
            return raw.decode("utf-8", errors)
        except UnicodeDecodeError:
            self.refuse(field, repr(raw[:40]), "UTF-8")


def _read_type(cursor: _Cursor, field: str) -> ValueType:
    number = int(cursor.number(ValueType.INT32, field))
    try:
        return ValueType(number)
    except ValueError:
        cursor.refuse(field, number, "a value type from 0 to 12")


def _read_scalar(cursor: _Cursor, value_type: ValueType, field: str) -> Scalar:
    if value_type is ValueType.STRING:
        # vocabularies in the wild hold broken UTF-8; surrogates carry such bytes through to a copy unchanged
        return cursor.text(field, errors="surrogateescape")
    number = cursor.number(value_type, field)
    if value_type is ValueType.BOOL:
        if number not in (0, 1):
            cursor.refuse(field, number, "a bool, 0 or 1")
        return bool(number)
    return number


def _read_strings(cursor: _Cursor, n: int, field: str) -> list[str]:
    """Return n strings; a loop of its own because a vocabulary has 400,000 tokens and merges."""
    strings = []
    for _ in range(n):
        (n_bytes,) = _STRING_LENGTH.unpack(cursor.take(8, field))
        strings.append(cursor.take(n_bytes, field).decode("utf-8", "surrogateescape"))
    return strings


def _read_array(cursor: _Cursor, field: str) -> Value:
    item_type = _read_type(cursor, f"item type of {field}")
    if item_type is ValueType.ARRAY:
        cursor.refuse(field, "an array of arrays", "an array of plain values, as llama.cpp does")
    if item_type is ValueType.STRING:
        return array(item_type, _read_strings(cursor, cursor.count(ValueType.UINT64, f"count of {field}", 8), field))
    if item_type is ValueType.BOOL:
        n = cursor.count(ValueType.UINT64, f"count of {field}", 1)
        return array(item_type, (_read_scalar(cursor, item_type, field) for _ in range(n)))
    dtype = np.dtype(_SCALAR_FORMATS[item_type])
    n = cursor.count(ValueType.UINT64, f"count of {field}", dtype.itemsize)
    return array(item_type, np.frombuffer(cursor.take(n * dtype.itemsize, field), dtype).tolist())


def _read_metadata(cursor: _Cursor, n_kv: int) -> dict[str, Value]:
    metadata: dict[str, Value] = {}
    for i in range(n_kv):
        key = cursor.text(f"key {i}")
        if not 0 < len(key.encode()) <= MAX_KEY_BYTES or not key.isprintable():
            cursor.refuse(f"key {i}", repr(key), f"1 to {MAX_KEY_BYTES} bytes without control characters")
        if key in metadata:
            cursor.refuse(f"key {i}", f"{key!r} twice", "each key once")
        field = f"value of {key!r}"
        value_type = _read_type(cursor, f"type of {key!r}")
        metadata[key] = _read_array(cursor, field) if value_type is ValueType.ARRAY else Value(value_type, _read_scalar(cursor, value_type, field))
    return metadata


def _read_tensor_type(cursor: _Cursor, name: str) -> GgmlType:
    number = int(cursor.number(ValueType.UINT32, f"type of tensor {name!r}"))
    try:
        ggml_type = GgmlType(number)
    except ValueError:
        removed = REMOVED_TYPES.get(number)
        got = f"{number}, {removed}, which ggml has removed" if removed else number
        cursor.refuse(f"type of tensor {name!r}", got, "a ggml type that this version knows")
    if ggml_type in ACTIVATION_TYPES:
        cursor.refuse(f"type of tensor {name!r}", ggml_type.name, "a type for weights, not for activations")
    return ggml_type


def _read_tensor_name(cursor: _Cursor, i: int) -> str:
    name = cursor.text(f"name of tensor {i}")
    if not 0 < len(name.encode()) <= MAX_NAME_BYTES or not name.isprintable():
        cursor.refuse(f"name of tensor {i}", repr(name), f"1 to {MAX_NAME_BYTES} bytes without control characters")
    return name


def _read_tensor_info(cursor: _Cursor, i: int) -> tuple[str, GgmlType, Shape, int]:
    """Return name, type, shape and the offset relative to the data section, each checked by itself."""
    name = _read_tensor_name(cursor, i)
    n_dims = int(cursor.number(ValueType.UINT32, f"number of dimensions of {name!r}"))
    if not 1 <= n_dims <= MAX_DIMS:
        cursor.refuse(f"number of dimensions of {name!r}", n_dims, f"1 to {MAX_DIMS}")
    dims = [int(cursor.number(ValueType.UINT64, f"dimension {d} of {name!r}")) for d in range(n_dims)]
    ggml_type = _read_tensor_type(cursor, name)
    if min(dims) < 1:
        cursor.refuse(f"dimensions of {name!r}", dims, "positive sizes")
    if dims[0] % FORMATS[ggml_type].block:
        cursor.refuse(f"row of {name!r}", f"{dims[0]} weights", f"a multiple of {ggml_type.name}'s block of {FORMATS[ggml_type].block}")
    offset = int(cursor.number(ValueType.UINT64, f"offset of {name!r}"))
    return name, ggml_type, tuple(reversed(dims)), offset


def _read_tensors(cursor: _Cursor, n_tensors: int, alignment: int) -> tuple[tuple[TensorInfo, ...], int]:
    """Return the tensor infos with absolute offsets, and where the data section starts."""
    raw = [_read_tensor_info(cursor, i) for i in range(n_tensors)]
    data_offset = padded(cursor.position, alignment)
    tensors, expected = [], 0
    names: set[str] = set()
    for name, ggml_type, shape, offset in raw:
        if name in names:
            cursor.refuse(f"tensor {name!r}", "the name twice", "each name once")
        names.add(name)
        if offset != expected:
            cursor.refuse(f"offset of {name!r}", offset, f"{expected}, right behind the tensor before it (no gap, no overlap)")
        n_bytes = tensor_bytes(ggml_type, shape)
        if data_offset + offset + n_bytes > cursor.size:
            cursor.refuse(f"data of {name!r}", f"{n_bytes} bytes from byte {data_offset + offset}", f"at most the file's {cursor.size} bytes (truncated?)")
        tensors.append(TensorInfo(name, ggml_type, shape, data_offset + offset, n_bytes))
        expected = padded(offset + n_bytes, alignment)
    if cursor.size > data_offset + expected:
        cursor.refuse("end of file", f"{cursor.size - data_offset - expected} bytes behind the last tensor", "no trailing bytes")
    return tuple(tensors), data_offset


def _read_alignment(cursor: _Cursor, metadata: Metadata) -> int:
    value = metadata.get("general.alignment", uint32(GGUF_ALIGNMENT))
    alignment = value.data
    if value.type is not ValueType.UINT32 or not isinstance(alignment, int) or alignment & (alignment - 1) or not 8 <= alignment <= 65536:
        cursor.refuse("general.alignment", repr(alignment), "a 32-bit power of two from 8 to 65536")
    return alignment


def _read_preamble(cursor: _Cursor) -> None:
    refuse_pointer(cursor.path, cursor.stream.peek(64))
    magic = cursor.take(4, "magic")
    if magic != MAGIC:
        cursor.refuse("magic", repr(magic), repr(MAGIC))
    version = int(cursor.number(ValueType.UINT32, "version"))
    if version != VERSION and int.from_bytes(version.to_bytes(4, "little"), "big") in (2, VERSION):
        cursor.refuse("version", "a big-endian file (byte order)", "little endian; convert the model again on this machine")
    if version not in (2, VERSION):
        cursor.refuse("version", version, f"2 or {VERSION}")


def is_gguf(path: Path) -> bool:
    """Tell by its first bytes whether a file claims to be GGUF."""
    with path.open("rb") as stream:
        return stream.read(4) == MAGIC


def read_gguf(path: Path) -> GgufFile:
    """Return the checked header of the GGUF file at `path`.

    Raises InputError naming the field and byte offset for anything that is malformed, truncated, overlapping, of the
    wrong byte order, or larger than the file; reads only the header and never allocates more than a small multiple of
    the file's size.
    """
    try:
        size = path.stat().st_size
        with BufferedReader(path.open("rb", buffering=0), 1 << 20) as stream:
            cursor = _Cursor(stream, path, size)
            _read_preamble(cursor)
            n_tensors = cursor.count(ValueType.UINT64, "number of tensors", 24)
            n_kv = cursor.count(ValueType.UINT64, "number of metadata keys", 13)
            metadata = _read_metadata(cursor, n_kv)
            tensors, data_offset = _read_tensors(cursor, n_tensors, _read_alignment(cursor, metadata))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}. Check the path and its permissions") from error
    return GgufFile(path, metadata, tensors, data_offset, size)


_SHARD_NAME = re.compile(r"^(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf$")


def shard_path(path: Path, number: int, count: int) -> Path:
    """Return the path of shard `number` (from 1) of `count`, named as llama.cpp names splits of `path`."""
    match = _SHARD_NAME.match(path.name)
    stem = match["stem"] if match else path.name.removesuffix(".gguf")
    return path.with_name(f"{stem}-{number:05d}-of-{count:05d}.gguf")


def split_count(file: GgufFile) -> int:
    """Return how many shards the model of this file has; 1 for a whole file. Raises InputError for a non-integer."""
    data = file.metadata.get("split.count", uint32(1)).data
    if not isinstance(data, int) or not 0 <= data <= 99999:
        raise InputError(f"split.count in {file.path}: got {data!r:.160}, expected an integer from 1 to 99999")
    return max(int(data), 1)


def read_shards(path: Path) -> tuple[GgufFile, ...]:
    """Return the checked headers of a whole file, or of all shards of a split one, given its first shard.

    Raises InputError when a shard is missing, out of order, of another model, or when `path` is not the first.
    """
    first = read_gguf(path)
    count = split_count(first)
    if count == 1:
        return (first,)
    if first.metadata.get("split.no", uint32(0)).data != 0:
        raise InputError(f"{path} is not the first shard: give {shard_path(path, 1, count).name} instead")
    if path.name != shard_path(path, 1, count).name:
        raise InputError(f"{path} is one of {count} shards but is not named like one: expected {shard_path(path, 1, count).name}; rename the shards back")
    files = [first]
    for number in range(2, count + 1):
        sibling = shard_path(path, number, count)
        if not sibling.exists():
            raise InputError(f"missing shard {sibling}: the model has {count} shards; download all of them into one folder")
        files.append(read_gguf(sibling))
        if files[-1].metadata.get("split.no", uint32(0)).data != number - 1 or split_count(files[-1]) != count:
            raise InputError(f"{sibling} is not shard {number} of {count} by its own split.no and split.count; download it again")
    names = [t.name for f in files for t in f.tensors]
    declared = first.metadata.get("split.tensors.count", uint32(len(names))).data
    if len(set(names)) != len(names) or declared != len(names):
        raise InputError(f"shards of {path} do not belong together: got {len(set(names))} distinct of {len(names)} tensors, expected {declared}")
    return tuple(files)


# --- writing ----------------------------------------------------------------------------------------------------------


def _encode_text(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _encode_items(item_type: ValueType, items: Sequence[Scalar]) -> bytes:
    if item_type is ValueType.STRING:
        return b"".join(_encode_text(str(item)) for item in items)
    return np.array(items, np.dtype(_SCALAR_FORMATS[item_type])).tobytes()


def _encode_value(value: Value) -> bytes:
    head = struct.pack("<i", value.type)
    if isinstance(value.data, list):
        assert value.item_type is not None
        return head + struct.pack("<iQ", value.item_type, len(value.data)) + _encode_items(value.item_type, value.data)
    return head + _encode_items(value.type, [value.data])


@dataclass(frozen=True)
class Layout:
    """A GGUF file planned to the byte: its whole header (padding included), where each payload goes, its size."""

    header: bytes
    tensors: tuple[TensorInfo, ...]
    total_bytes: int


def plan_layout(metadata: Metadata, tensors: Iterable[tuple[str, GgmlType, Shape]]) -> Layout:
    """Return the layout of a file with this metadata and these (name, type, row-major shape), in their order.

    Payloads are padded, the last one too, as llama-quantize does: to `general.alignment` where a copied file has it
    (readers believe that key), else to 32 bytes.
    """
    tensors = list(tensors)
    alignment = metadata.get("general.alignment", uint32(GGUF_ALIGNMENT)).data
    assert isinstance(alignment, int)
    parts = [MAGIC, struct.pack("<IQQ", VERSION, len(tensors), len(metadata))]
    parts += [_encode_text(key) + _encode_value(value) for key, value in metadata.items()]
    infos, offset = [], 0
    for name, ggml_type, shape in tensors:
        assert len(name.encode()) <= MAX_NAME_BYTES, name
        dims = tuple(reversed(shape))
        parts.append(_encode_text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, ggml_type, offset))
        infos.append((name, ggml_type, shape, offset, tensor_bytes(ggml_type, shape)))
        offset += padded(infos[-1][4], alignment)
    header = b"".join(parts)
    header += bytes(padded(len(header), alignment) - len(header))
    placed = tuple(TensorInfo(name, ggml_type, shape, len(header) + at, n_bytes) for name, ggml_type, shape, at, n_bytes in infos)
    return Layout(header, placed, len(header) + offset)


@contextlib.contextmanager
def _explained(path: Path, doing: str) -> Iterator[None]:
    """Turn an OSError into an OutputError that says what to do."""
    try:
        yield
    except OSError as error:
        remedy = "free some space or choose another disk" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check the folder and its permissions"
        raise OutputError(f"cannot {doing} {path}: {error.strerror}; {remedy}") from error


def _lock(fd: int) -> None:
    """Lock an open file for this opening of it; raises BlockingIOError when another holds it. The system frees it when we die."""
    if sys.platform == "win32":
        return
    import fcntl

    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logger.warning("this file system has no locks: two runs on one output would not notice each other")


def _open_alone(path: Path) -> int:
    """Return a descriptor of the file at `path`, new or left over, locked; raises BlockingIOError when another run writes it.

    A link there is not followed: what it leads to is somebody's file.
    """
    while True:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0) | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(fd)
            if path.exists() and os.path.samestat(os.fstat(fd), path.stat()):
                return fd
        except BaseException:
            os.close(fd)
            raise
        os.close(fd)  # its last owner has renamed or removed it meanwhile


def part_path(target: Path) -> Path:
    """Return where a file lies until it gets its name."""
    return target.with_name(target.name + ".part")


def flush_folder(folder: Path) -> None:
    """Make renames in a folder durable, where the system can."""
    if sys.platform == "win32":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


class PartFile:
    """A file being written as `NAME.part` beside its target; it gets its name only by `publish`.

    The part is locked, so that two runs on one output do not write into one another; one that a killed run left behind
    is taken over: its bytes too with `goes_on`, if it is of this size (`has_gone_on`), else they are zeros. The disk is
    checked and the space reserved first. `write_at` and `sha256` may be called from any thread. Leaving the block without
    `publish`, by an error or otherwise, removes the part, so that no partial output is left behind; unless `is_kept` has
    been set, because there is something to go on from.
    """

    def __init__(self, target: Path, total_bytes: int, *, overwrite: bool = False, goes_on: bool = False) -> None:
        self.target, self.total_bytes, self.overwrite, self.goes_on = target, total_bytes, overwrite, goes_on
        self.path = part_path(target)
        self.has_gone_on = self.is_kept = False
        self._fd = -1

    def __enter__(self) -> PartFile:
        refuse_existing(self.target, overwrite=self.overwrite)
        with _explained(self.path, "create"):
            self.target.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._fd = _open_alone(self.path)
            except BlockingIOError as error:
                raise OutputError(f"output {self.target} is being written by another run: wait for it, or choose another name with -o") from error
        try:
            with _explained(self.path, "reserve space for"):
                self.has_gone_on = self.is_kept = self.goes_on and os.fstat(self._fd).st_size == self.total_bytes > 0
                self._reserve()
        except BaseException:
            self.close()
            raise
        return self

    def _reserve(self) -> None:
        """Give the part its size, zeros where it is new, and the disk space for it where the file system can."""
        if not self.has_gone_on:
            os.ftruncate(self._fd, 0)  # a leftover's bytes count as free
        missing = self.total_bytes - min(self.total_bytes, getattr(os.fstat(self._fd), "st_blocks", 0) * 512)
        free = shutil.disk_usage(self.target.parent).free
        if free < missing:
            raise OSError(errno.ENOSPC, f"{missing} bytes needed, {free} free")
        try:
            if self.total_bytes and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self._fd, 0, self.total_bytes)
        except OSError as error:
            if error.errno not in _NO_PREALLOCATION:
                raise
        os.ftruncate(self._fd, self.total_bytes)  # where nothing is reserved, the padding at the end exists all the same

    def write_at(self, offset: int, data: bytes | memoryview) -> None:
        """Write all of `data` at `offset`; raises OutputError when the disk is full."""
        view = memoryview(data).cast("B")
        with _explained(self.path, "write"):
            while view:
                done = os.pwrite(self._fd, view, offset)
                view, offset = view[done:], offset + done

    def read_at(self, offset: int, n_bytes: int) -> Iterator[bytes]:
        """Yield these bytes of the part, read back, piece by piece; fewer where the part ends before."""
        with _explained(self.path, "read"):
            while n_bytes and (piece := os.pread(self._fd, min(n_bytes, _PIECE_BYTES), offset)):
                yield piece
                offset, n_bytes = offset + len(piece), n_bytes - len(piece)

    def sha256(self, offset: int, n_bytes: int) -> str:
        """Return the SHA-256 of these bytes of the part, read back, as hex; of fewer where the part ends before."""
        digest = hashlib.sha256()
        for piece in self.read_at(offset, n_bytes):
            digest.update(piece)
        return digest.hexdigest()

    def read_rows(self, info: TensorInfo, start: int, stop: int) -> NDArray[np.uint8]:
        """Return rows start … stop − 1 of a tensor of the part, read back, (stop - start, row bytes) uint8."""
        n_bytes = row_bytes(info.type, info.shape[-1])
        raw = b"".join(self.read_at(info.offset + start * n_bytes, (stop - start) * n_bytes))
        return np.frombuffer(raw, np.uint8).reshape(stop - start, n_bytes)

    def sync(self) -> None:
        """Force the bytes to the disk."""
        with _explained(self.path, "flush"):
            os.fsync(self._fd)

    def publish(self) -> None:
        """Give the finished part its final name, atomically and durably; it keeps its own when that fails."""
        refuse_existing(self.target, overwrite=self.overwrite)
        with _explained(self.target, "publish"):
            self.path.replace(self.target)
            try:
                flush_folder(self.target.parent)
            except OSError:
                self.target.replace(self.path)
                raise
        self._unlock()  # what lies at `path` from now on is not ours

    def take_back(self) -> None:
        """Undo `publish`: a kept part is a part again, another is gone."""
        if self.is_kept:
            self.target.replace(self.path)
        else:
            self.target.unlink()

    def discard(self) -> None:
        """Remove the part and close it, unless it is published."""
        if self._fd >= 0:
            self.path.unlink(missing_ok=True)
            self._unlock()

    def close(self) -> None:
        """Close the part: removed unless it is kept or published."""
        if not self.is_kept:
            self.discard()
        elif self._fd >= 0:
            self._unlock()

    def _unlock(self) -> None:
        fd, self._fd = self._fd, -1
        os.close(fd)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


def refuse_existing(target: Path, *, overwrite: bool) -> None:
    """Raise OutputError when `target` is a folder, is in what is none, or exists and may not be overwritten."""
    above = next((path for path in target.parents if path.exists()), target.parent)
    if above.exists() and not above.is_dir():
        raise OutputError(f"cannot create {target}: {above} is no folder; choose another name with -o")
    if target.is_dir():
        raise OutputError(f"output {target} is a folder: give a file name with -o")
    if target.exists() and not overwrite:
        raise OutputError(f"output {target} already exists: pass --overwrite or choose another name with -o")


def write_file(path: Path, data: bytes, *, overwrite: bool = False) -> None:
    """Write a small file of any kind durably and at once: whole under its name, or not at all. Raises OutputError."""
    with PartFile(path, len(data), overwrite=overwrite) as part:
        part.write_at(0, data)
        part.sync()
        part.publish()


def write_gguf(target: Path, metadata: Metadata, tensors: Sequence[tuple[str, GgmlType, np.ndarray]], *, overwrite: bool = False) -> None:
    """Write a small GGUF (an imatrix, a vocabulary) in one go and publish it.

    Arrays hold the values of their unpacked type, float32 for F32. Raises OutputError when it cannot be written.
    """
    layout = plan_layout(metadata, [(name, ggml_type, a.shape) for name, ggml_type, a in tensors])
    with PartFile(target, layout.total_bytes, overwrite=overwrite) as part:
        part.write_at(0, layout.header)
        for info, (_, _, data) in zip(layout.tensors, tensors, strict=True):
            assert data.nbytes == info.n_bytes, (info, data.dtype)
            part.write_at(info.offset, data.tobytes())
        part.sync()
        part.publish()
