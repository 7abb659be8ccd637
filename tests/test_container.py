"""GGUF files to the byte: what is written, what is read back, and what is refused with one clear line."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopgguf import container
from loopgguf.container import PartFile, TensorInfo, Value, ValueType, array, boolean, float32, plan_layout, read_gguf, read_shards, string, uint32, write_gguf
from loopgguf.errors import InputError, OutputError
from loopgguf.formats import ACTIVATION_TYPES, FORMATS, GgmlType, row_bytes, tensor_bytes

# --- a GGUF by hand, independent of the writer ------------------------------------------------------------------------

U8, I8, U16, I16, U32, I32, F32, BOOL, STR, ARR, U64, I64, F64 = range(13)  # value types of gguf.h


def u32(n: int) -> bytes:
    return struct.pack("<I", n)


def u64(n: int) -> bytes:
    return struct.pack("<Q", n)


def text(raw: str | bytes) -> bytes:
    raw = raw.encode() if isinstance(raw, str) else raw
    return u64(len(raw)) + raw


def pair(key: str | bytes, value_type: int, payload: bytes) -> bytes:
    return text(key) + struct.pack("<i", value_type) + payload


def items(item_type: int, count: int, payload: bytes = b"") -> bytes:
    """The payload of an array value."""
    return struct.pack("<i", item_type) + u64(count) + payload


def info(name: str | bytes, dims: list[int], ggml_type: int, offset: int) -> bytes:
    return text(name) + u32(len(dims)) + b"".join(map(u64, dims)) + u32(ggml_type) + u64(offset)


def gguf_bytes(
    pairs: list[bytes],
    infos: list[bytes],
    data: bytes = b"",
    *,
    n_pairs: int | None = None,
    n_tensors: int | None = None,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    head = b"GGUF" + u32(version) + u64(len(infos) if n_tensors is None else n_tensors) + u64(len(pairs) if n_pairs is None else n_pairs)
    head += b"".join(pairs + infos)
    return head + bytes(-len(head) % alignment) + data


ARCHITECTURE = pair("general.architecture", STR, text("llama"))
ONE_TENSOR = info("a", [8], 0, 0)  # 8 F32, 32 bytes
VALID = gguf_bytes(
    [ARCHITECTURE, pair("llama.block_count", U32, u32(2)), pair("tokenizer.ggml.tokens", ARR, items(STR, 2, text("a") + text("bc")))],
    [info("a", [3, 2], 0, 0), info("b", [32], 8, 32)],
    bytes(32) + bytes(34) + bytes(30),
)


@pytest.fixture(scope="module")
def scratch() -> Iterator[Path]:
    """A folder for hypothesis, which wants no function-scoped fixture."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


# --- golden bytes -----------------------------------------------------------------------------------------------------

GOLDEN = bytes.fromhex(
    "47475546"  # "GGUF"
    "03000000"  # version 3
    "0300000000000000"  # three tensors
    "0300000000000000"  # three keys
    "0100000000000000" + "61"  # key "a"
    "04000000" + "07000000"  # UINT32 7
    "0100000000000000" + "62"  # key "b"
    "08000000" + "0200000000000000" + "c3a9"  # STRING "é", two bytes
    "0100000000000000" + "63"  # key "c"
    "09000000" + "06000000" + "0200000000000000" + "0000803f" + "000000c0"  # ARRAY of two FLOAT32: 1.0, -2.0
    "0100000000000000" + "78"  # tensor "x"
    "02000000" + "0300000000000000" + "0200000000000000"  # two dimensions, the row of 3 first, then 2 rows
    "00000000" + "0000000000000000"  # F32 at 0: 24 bytes, padded to 32
    "0100000000000000" + "79"  # tensor "y"
    "01000000" + "0400000000000000"  # one dimension of 4
    "01000000" + "2000000000000000"  # F16 at 32: 8 bytes, padded to 32
    "0100000000000000" + "7a"  # tensor "z"
    "01000000" + "2000000000000000"  # one dimension of 32
    "08000000"
    + "4000000000000000"  # Q8_0 at 64: 34 bytes, padded to 64
    # 24 + 17 + 23 + 33 + 41 + 33 + 33 = 204 bytes so far, the data starts at 224
    + "00" * 20
    + "0000803f0000004000004040000080400000a0400000c040"  # 1 2 3 4 5 6 as F32
    + "00" * 8
    + "003c004000420044"  # 1 2 3 4 as F16
    + "00" * 24
    + "0038"  # scale 0.5 as F16
    + "fc" * 32  # 32 times -4
    + "00" * 30
)


def _payloads() -> list[tuple[str, GgmlType, tuple[int, ...], bytes]]:
    return [
        ("x", GgmlType.F32, (2, 3), np.arange(1, 7, dtype="<f4").tobytes()),
        ("y", GgmlType.F16, (4,), np.arange(1, 5, dtype="<f2").tobytes()),
        ("z", GgmlType.Q8_0, (32,), np.float16(0.5).tobytes() + np.full(32, -4, np.int8).tobytes()),
    ]


def _write(target: Path, metadata: dict[str, Value], tensors: list[tuple[str, GgmlType, tuple[int, ...], bytes]]) -> None:
    layout = plan_layout(metadata, [(name, ggml_type, shape) for name, ggml_type, shape, _ in tensors])
    with PartFile(target, layout.total_bytes, overwrite=True) as part:
        for placed, tensor in reversed(list(zip(layout.tensors, tensors, strict=True))):  # any order
            part.write_at(placed.offset, tensor[3])
        part.write_at(0, layout.header)
        part.publish()


def _payload(path: Path, tensor: TensorInfo) -> bytes:
    return path.read_bytes()[tensor.offset :][: tensor.n_bytes]


def test_golden_bytes_of_three_tensors(tmp_path: Path) -> None:
    """Catches any change of the format: dimensions not reversed, a wrong width, a payload or the end not padded."""
    metadata = {"a": uint32(7), "b": string("é"), "c": array(ValueType.FLOAT32, [1.0, -2.0])}
    target = tmp_path / "golden.gguf"
    _write(target, metadata, _payloads())
    assert target.read_bytes() == GOLDEN


def test_golden_bytes_are_read(tmp_path: Path) -> None:
    """Catches a reader that agrees with the writer but not with the format."""
    path = tmp_path / "golden.gguf"
    path.write_bytes(GOLDEN)
    file = read_gguf(path)
    assert file.metadata == {"a": uint32(7), "b": string("é"), "c": array(ValueType.FLOAT32, [1.0, -2.0])}
    assert file.tensors == (
        TensorInfo("x", GgmlType.F32, (2, 3), 224, 24),
        TensorInfo("y", GgmlType.F16, (4,), 256, 8),
        TensorInfo("z", GgmlType.Q8_0, (32,), 288, 34),
    )
    assert (file.data_offset, file.size_bytes) == (224, len(GOLDEN))


def test_no_tensors(tmp_path: Path) -> None:
    """Catches a crash on a vocabulary-only file; its header is padded like any other."""
    path = tmp_path / "vocab.gguf"
    write_gguf(path, {"a": uint32(7)}, [])
    assert path.stat().st_size == 64
    assert read_gguf(path).tensors == ()
    path.write_bytes(gguf_bytes([], [])[:24])  # unpadded, as a writer may leave it
    assert read_gguf(path).metadata == {}


def test_last_payload_needs_no_padding_when_read(tmp_path: Path) -> None:
    """Catches refusing files of writers that do not pad the last payload (ggml accepts them mapped)."""
    path = tmp_path / "short.gguf"
    path.write_bytes(GOLDEN[:-30])
    assert len(read_gguf(path).tensors) == 3


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_other_alignments_are_read(tmp_path: Path, alignment: int) -> None:
    """Catches taking 32 for granted when a source says otherwise."""
    path = tmp_path / "aligned.gguf"
    step = -(-4 // alignment) * alignment
    pairs = [pair("general.alignment", U32, u32(alignment))]
    path.write_bytes(gguf_bytes(pairs, [info("a", [1], 0, 0), info("b", [1], 0, step)], bytes(step) + b"\1\2\3\4", alignment=alignment))
    file = read_gguf(path)
    assert file.data_offset % alignment == 0
    assert _payload(path, file.tensors[1]) == b"\1\2\3\4"


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_metadata_with_an_alignment_is_written_with_it(tmp_path: Path, alignment: int) -> None:
    """Catches a copy of a 64-aligned source whose key says 64 and whose offsets say 32: no reader would take it."""
    path = tmp_path / "aligned.gguf"
    _write(path, {"general.alignment": uint32(alignment)}, _payloads())
    file = read_gguf(path)
    assert [_payload(path, t) for t in file.tensors] == [p[3] for p in _payloads()]
    assert all(t.offset % alignment == 0 for t in file.tensors)


def test_version_2_is_read(tmp_path: Path) -> None:
    """Catches refusing version 2, whose little-endian layout is version 3's."""
    path = tmp_path / "v2.gguf"
    path.write_bytes(GOLDEN[:4] + u32(2) + GOLDEN[8:])
    assert len(read_gguf(path).tensors) == 3


# --- round trips ------------------------------------------------------------------------------------------------------

_NUMBERS: dict[ValueType, st.SearchStrategy[Any]] = {
    ValueType.UINT8: st.integers(0, 2**8 - 1),
    ValueType.INT8: st.integers(-(2**7), 2**7 - 1),
    ValueType.UINT16: st.integers(0, 2**16 - 1),
    ValueType.INT16: st.integers(-(2**15), 2**15 - 1),
    ValueType.UINT32: st.integers(0, 2**32 - 1),
    ValueType.INT32: st.integers(-(2**31), 2**31 - 1),
    ValueType.UINT64: st.integers(0, 2**64 - 1),
    ValueType.INT64: st.integers(-(2**63), 2**63 - 1),
    ValueType.FLOAT32: st.floats(width=32, allow_nan=False),
    ValueType.FLOAT64: st.floats(allow_nan=False),
    ValueType.BOOL: st.booleans(),
    ValueType.STRING: st.text(max_size=12),
}
_VALUES = st.sampled_from(sorted(_NUMBERS)).flatmap(
    lambda kind: st.one_of(
        st.builds(Value, st.just(kind), _NUMBERS[kind]),
        st.builds(array, st.just(kind), st.lists(_NUMBERS[kind], max_size=5)),
    )
)
_NAME_CHARACTERS = st.characters(codec="utf-8", exclude_categories=["C", "Z"])
_KEYS = st.text(_NAME_CHARACTERS, min_size=1, max_size=20).map(lambda key: "k." + key)
_NAMES = st.text(_NAME_CHARACTERS, min_size=1, max_size=15)  # up to 60 bytes
_TENSORS = st.lists(
    st.tuples(
        _NAMES, st.sampled_from(sorted(set(FORMATS) - ACTIVATION_TYPES)), st.lists(st.integers(1, 3), max_size=3), st.integers(1, 3), st.integers(0, 2**32)
    ),
    max_size=4,
    unique_by=lambda t: t[0],
)


def _with_payloads(drawn: list[tuple[str, GgmlType, list[int], int, int]]) -> list[tuple[str, GgmlType, tuple[int, ...], bytes]]:
    tensors = []
    for name, ggml_type, outer, n_blocks, seed in drawn:
        shape = (*outer, n_blocks * FORMATS[ggml_type].block)
        tensors.append((name, ggml_type, shape, np.random.default_rng(seed).bytes(tensor_bytes(ggml_type, shape))))
    return tensors


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(_KEYS, _VALUES, max_size=6), _TENSORS)
def test_what_is_written_is_read_back(scratch: Path, metadata: dict[str, Value], drawn: list[tuple[str, GgmlType, list[int], int, int]]) -> None:
    """Catches any value, shape, type or payload that does not survive; order of keys and tensors included."""
    path, tensors = scratch / "any.gguf", _with_payloads(drawn)
    _write(path, metadata, tensors)
    file = read_gguf(path)
    assert list(file.metadata.items()) == list(metadata.items())
    assert [(t.name, t.type, t.shape, _payload(path, t)) for t in file.tensors] == tensors
    assert all(type(got.data) is type(metadata[key].data) for key, got in file.metadata.items())
    assert path.stat().st_size % 32 == 0


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(_KEYS, _VALUES, max_size=6), _TENSORS)
def test_gguf_py_reads_what_is_written(scratch: Path, metadata: dict[str, Value], drawn: list[tuple[str, GgmlType, list[int], int, int]]) -> None:
    """Catches a file that only our own reader understands."""
    from gguf import GGMLQuantizationType, GGUFReader

    path = scratch / "theirs.gguf"
    tensors = [t for t in _with_payloads(drawn) if t[1] in set(GGMLQuantizationType)]
    _write(path, metadata, tensors)
    reader = GGUFReader(path)
    for key, value in metadata.items():
        field = reader.fields[key]
        assert field.types[0] == value.type
        if value.data != []:
            assert field.contents() == value.data
    assert [(t.name, t.tensor_type, tuple(reversed(t.shape.tolist())), t.data.tobytes()) for t in reader.tensors] == tensors


def test_strings_that_are_no_utf8_are_copied(tmp_path: Path) -> None:
    """Catches a copy that loses the broken bytes some published vocabularies hold."""
    path, copy = tmp_path / "broken.gguf", tmp_path / "copy.gguf"
    path.write_bytes(gguf_bytes([pair("t", ARR, items(STR, 2, text(b"\xff\xfe") + text("ok"))), pair("s", STR, text(b"\xc3"))], []))
    write_gguf(copy, read_gguf(path).metadata, [])
    assert copy.read_bytes() == path.read_bytes()


def test_helpers_name_their_types() -> None:
    """Catches a key written as another type than llama.cpp asks for."""
    assert (uint32(1).type, float32(1).type, boolean(True).type, string("").type) == (ValueType.UINT32, ValueType.FLOAT32, ValueType.BOOL, ValueType.STRING)
    assert array(ValueType.INT32, (1, 2)) == Value(ValueType.ARRAY, [1, 2], ValueType.INT32)


def test_a_number_that_does_not_fit_its_type_is_no_file() -> None:
    """Catches silent wrapping of a metadata value."""
    with pytest.raises(OverflowError):
        plan_layout({"a": Value(ValueType.UINT8, 256)}, [])


# --- hostile headers --------------------------------------------------------------------------------------------------


def _one(*pairs: bytes, **counts: int) -> bytes:
    return gguf_bytes([ARCHITECTURE, *pairs], [ONE_TENSOR], bytes(32), **counts)


def _tensors(*infos: bytes, data: int = 64, **counts: int) -> bytes:
    return gguf_bytes([ARCHITECTURE], list(infos), bytes(data), **counts)


_NESTED = b"".join(struct.pack("<i", ARR) + u64(1) for _ in range(3000))

HOSTILE: dict[str, tuple[bytes, list[str]]] = {
    # header
    "empty file": (b"", ["magic", "0 bytes left"]),
    "bad magic": (b"GGML" + VALID[4:], ["magic", "GGML", "GGUF"]),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", ["git-lfs pointer", "git lfs pull"]),
    "HTML error page": (b"<!doctype html><html>", ["magic", "<!do"]),
    "version 0": (VALID[:4] + u32(0) + VALID[8:], ["version", "got 0"]),
    "version 1": (VALID[:4] + u32(1) + VALID[8:], ["version", "got 1"]),
    "version 4": (VALID[:4] + u32(4) + VALID[8:], ["version", "got 4"]),
    "version 2^32 - 1": (VALID[:4] + u32(2**32 - 1) + VALID[8:], ["version"]),
    "big-endian version 3": (VALID[:4] + struct.pack(">I", 3) + VALID[8:], ["version", "big-endian"]),
    "2^64 - 1 tensors": (_one(n_tensors=2**64 - 1), ["number of tensors", "18446744073709551615"]),
    "more tensors than the file can hold": (_one(n_tensors=20), ["number of tensors", "got 20"]),
    "one tensor too many": (_tensors(ONE_TENSOR, n_tensors=2, data=32), ["tensor 1"]),
    "2^64 - 1 keys": (_one(n_pairs=2**64 - 1), ["number of metadata keys", "18446744073709551615"]),
    "more keys than the file can hold": (_one(n_pairs=20), ["number of metadata keys", "got 20"]),
    "one key too many": (_one(n_pairs=2), ["name of tensor 0"]),  # half of the tensor's info passes for a key
    # keys
    "key of 2^63 bytes": (gguf_bytes([u64(2**63) + b"k"], []) + bytes(64), ["length of key 0", "9223372036854775808"]),
    "key of 2^64 - 1 bytes": (gguf_bytes([u64(2**64 - 1) + b"k"], []) + bytes(64), ["length of key 0"]),
    "empty key": (_one(pair("", U8, b"\1")), ["key 1"]),
    "key of 65536 bytes": (_one(pair("k" * 65536, U8, b"\1")), ["key 1", "65535"]),
    "key is no UTF-8": (_one(pair(b"\xff\xfe", U8, b"\1")), ["key 1", "UTF-8"]),
    "key with a line feed": (_one(pair("a\nb", U8, b"\1")), ["key 1", "a\\nb"]),
    "key twice": (_one(pair("k", U8, b"\1"), pair("k", U8, b"\1")), ["'k'", "twice"]),
    # values
    "value type 13": (_one(pair("k", 13, b"\1")), ["type of 'k'", "got 13"]),
    "value type 99": (_one(pair("k", 99, b"\1")), ["type of 'k'", "got 99"]),
    "value type -1": (_one(pair("k", -1, b"\1")), ["type of 'k'", "got -1"]),
    "bool 2": (_one(pair("k", BOOL, b"\2")), ["'k'", "bool"]),
    "bool 2 in an array": (_one(pair("k", ARR, items(BOOL, 2, b"\1\2"))), ["'k'", "bool"]),
    "string longer than the file": (_one(pair("k", STR, u64(10**6) + b"x")), ["'k'", "1000000"]),
    "string of 2^64 - 1 bytes": (_one(pair("k", STR, u64(2**64 - 1) + b"x")), ["'k'"]),
    "no value at all": (gguf_bytes([pair("k", U64, b"")], [])[:37], ["'k'"]),
    # arrays
    "item type 13": (_one(pair("k", ARR, items(13, 1, b"\1"))), ["item type", "'k'", "got 13"]),
    "item type -1": (_one(pair("k", ARR, items(-1, 1, b"\1"))), ["item type", "'k'", "got -1"]),
    "array of arrays": (_one(pair("k", ARR, items(ARR, 1, items(U8, 1, b"\1")))), ["'k'", "array of arrays"]),
    "3000 nested arrays": (_one(pair("k", ARR, _NESTED)), ["'k'", "array of arrays"]),
    "2000000 strings in 100 bytes": (gguf_bytes([pair("k", ARR, items(STR, 2_000_000))], [])[:49] + bytes(51), ["count of", "'k'", "2000000"]),
    "2000000 bytes in 100": (gguf_bytes([pair("k", ARR, items(U8, 2_000_000))], []) + bytes(36), ["count of", "'k'", "2000000"]),
    "2000000 bools in 100 bytes": (gguf_bytes([pair("k", ARR, items(BOOL, 2_000_000))], []) + bytes(36), ["count of", "'k'", "2000000"]),
    "array whose bytes wrap to 0": (_one(pair("k", ARR, items(U64, 2**61))), ["count of", "'k'"]),
    "array of 2^64 - 1": (_one(pair("k", ARR, items(F32, 2**64 - 1))), ["count of", "'k'"]),
    # alignment
    "alignment 0": (_one(pair("general.alignment", U32, u32(0))), ["general.alignment", "got 0"]),
    "alignment 1": (_one(pair("general.alignment", U32, u32(1))), ["general.alignment", "got 1"]),
    "alignment 13": (_one(pair("general.alignment", U32, u32(13))), ["general.alignment", "got 13"]),
    "alignment 2^31": (_one(pair("general.alignment", U32, u32(2**31))), ["general.alignment", "2147483648"]),
    "alignment as UINT64": (_one(pair("general.alignment", U64, u64(32))), ["general.alignment"]),
    "alignment as text": (_one(pair("general.alignment", STR, text("3\n2" * 5000))), ["general.alignment"]),
    "alignment as an array": (_one(pair("general.alignment", ARR, items(U32, 5000, u32(32) * 5000))), ["general.alignment"]),
    "alignment of the data is not the key's": (
        gguf_bytes([pair("general.alignment", U32, u32(64))], [info("a", [1], 0, 0), info("b", [1], 0, 32)], bytes(128), alignment=64),
        ["offset of 'b'", "got 32", "expected 64"],
    ),
    # tensor infos
    "name of 64 bytes": (_tensors(info("n" * 64, [8], 0, 0)), ["name of tensor 0", "63"]),
    "name of 300 bytes": (_tensors(info("n" * 300, [8], 0, 0), data=512), ["name of tensor 0", "63"]),
    "empty name": (_tensors(info("", [8], 0, 0)), ["name of tensor 0"]),
    "name is no UTF-8": (_tensors(info(b"\xff", [8], 0, 0)), ["name of tensor 0", "UTF-8"]),
    "name with NUL": (_tensors(info("a\0b", [8], 0, 0)), ["name of tensor 0", "a\\x00b"]),
    "name with an escape sequence": (_tensors(info("\x1b[31ma", [8], 0, 0)), ["name of tensor 0", "\\x1b"]),
    "name twice": (_tensors(ONE_TENSOR, info("a", [8], 0, 32)), ["'a'", "twice"]),
    "0 dimensions": (_tensors(info("a", [], 0, 0)), ["number of dimensions of 'a'", "got 0"]),
    "5 dimensions": (_tensors(info("a", [8, 1, 1, 1, 1], 0, 0)), ["number of dimensions of 'a'", "got 5"]),
    "2^32 - 1 dimensions": (_tensors(text("a") + u32(2**32 - 1)), ["number of dimensions of 'a'"]),
    "dimension 0": (_tensors(info("a", [8, 0], 0, 0)), ["dimensions of 'a'", "[8, 0]"]),
    "dimension 2^63": (_tensors(info("a", [2**63], 0, 0)), ["data of 'a'"]),
    "elements wrap to 0": (_tensors(info("a", [2**32, 2**32], 0, 0)), ["data of 'a'"]),
    "bytes wrap to 0": (_tensors(info("a", [2**62], 0, 0)), ["data of 'a'"]),
    "padded bytes wrap to 0": (_tensors(info("a", [2**64 - 1], 24, 0)), ["data of 'a'"]),
    "sum of two sizes wraps": (_tensors(ONE_TENSOR, info("b", [2**64 - 32], 24, 32), info("c", [8], 0, 0)), ["data of 'b'"]),
    "row is no whole block of Q8_0": (_tensors(info("a", [33], 8, 0)), ["row of 'a'", "33", "Q8_0", "32"]),
    "row is no whole block of Q4_K": (_tensors(info("a", [255], 12, 0)), ["row of 'a'", "255", "Q4_K", "256"]),
    **{f"type {n}": (_tensors(info("a", [8], n, 0)), ["type of tensor 'a'", f"got {n}"]) for n in (4, 5, 31, 32, 33, 36, 37, 38, 43, 99, 2**31, 2**32 - 1)},
    **{f"type {t.name}, which no file holds": (_tensors(info("a", [256], t, 0), data=512), ["type of tensor 'a'", t.name]) for t in ACTIVATION_TYPES},
    # offsets
    "offset 7": (_tensors(info("a", [8], 0, 7)), ["offset of 'a'", "got 7"]),
    "offset behind the file": (_tensors(info("a", [8], 0, 2**20)), ["offset of 'a'", "got 1048576"]),
    "offset wraps": (_tensors(info("a", [8], 0, 2**64 - 32)), ["offset of 'a'"]),
    "offsets overlap": (_tensors(ONE_TENSOR, info("b", [8], 0, 0)), ["offset of 'b'", "got 0"]),
    "offsets out of order": (_tensors(info("a", [8], 0, 32), info("b", [8], 0, 0)), ["offset of 'a'", "got 32"]),
    "offsets leave a gap": (_tensors(ONE_TENSOR, info("b", [8], 0, 64), data=96), ["offset of 'b'", "got 64"]),
    # data
    "last byte missing": (_tensors(ONE_TENSOR, data=31), ["data of 'a'", "truncated"]),
    "no data": (_tensors(ONE_TENSOR, data=0), ["data of 'a'"]),
    "a byte behind the last tensor": (_tensors(ONE_TENSOR, data=33), ["end of file", "1 bytes"]),
    "bytes behind a file without tensors": (gguf_bytes([ARCHITECTURE], []) + b"x" * 100, ["end of file", "100 bytes"]),
}


@pytest.mark.parametrize(("raw", "words"), HOSTILE.values(), ids=HOSTILE.keys())
def test_malformed_file_is_refused_in_one_line(tmp_path: Path, raw: bytes, words: list[str]) -> None:
    """Catches accepting it, another exception, a message that does not name the culprit, and memory out of proportion.

    The bound is 1 MiB of read buffer plus some; gguf-py needs 17.8 s and 2,000,000 objects for the array of 100 bytes.
    """
    path = tmp_path / "hostile.gguf"
    path.write_bytes(raw)
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            read_gguf(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700 and message.isprintable()
    assert str(path) in message
    assert " at byte " in message or "git-lfs" in words[0]
    assert all(word in message for word in words), (words, message)
    assert peak_bytes < 3 << 20


@pytest.mark.parametrize("keep", range(len(VALID) - 30))
def test_every_truncation_is_refused(tmp_path: Path, keep: int) -> None:
    """Catches a field that is read without being checked against the end of the file (1 to 23 bytes among them)."""
    path = tmp_path / "short.gguf"
    path.write_bytes(VALID[:keep])
    with pytest.raises(InputError, match=r"malformed GGUF: .* at byte \d+"):
        read_gguf(path)


@settings(max_examples=600, deadline=None)
@given(st.integers(0, len(VALID) - 1), st.integers(0, 255), st.integers(0, len(VALID)), st.booleans())
def test_any_flipped_byte_reads_or_is_refused(scratch: Path, at: int, value: int, keep: int, cut: bool) -> None:
    """Catches an exception of another class, and a tensor that does not lie in the file."""
    raw = bytearray(VALID)
    raw[at] = value
    path = scratch / "flipped.gguf"
    path.write_bytes(raw[:keep] if cut else raw)
    try:
        file = read_gguf(path)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert all(file.data_offset <= t.offset and t.offset + t.n_bytes <= file.size_bytes for t in file.tensors)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200))
def test_random_bytes_behind_the_magic_read_or_are_refused(scratch: Path, raw: bytes) -> None:
    """Catches an exception of another class for what no mutation of a valid file reaches."""
    path = scratch / "random.gguf"
    path.write_bytes(b"GGUF" + u32(3) + raw)
    try:
        read_gguf(path)
    except InputError as error:
        assert "\n" not in str(error)


def test_a_long_array_takes_a_small_multiple_of_its_bytes(tmp_path: Path) -> None:
    """Catches one Python object of 50 bytes or more per byte of an array."""
    path = tmp_path / "long.gguf"
    path.write_bytes(gguf_bytes([pair("k", ARR, items(U16, 500_000, np.arange(500_000).astype("<u2").tobytes()))], []))
    tracemalloc.start()
    try:
        read_gguf(path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 30 * path.stat().st_size


def test_names_like_paths_are_only_names(tmp_path: Path) -> None:
    """Catches refusing or following a tensor called `../../x`; nothing is ever opened under a tensor's name."""
    path = tmp_path / "a.gguf"
    path.write_bytes(_tensors(info("../../x", [8], 0, 0), data=32))
    assert read_gguf(path).tensors[0].name == "../../x"


def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches SIGBUS (a mapped file) or a struct.error when another process truncates the file."""
    path = tmp_path / "a.gguf"
    path.write_bytes(VALID)
    preamble = container._read_preamble

    def shrink(cursor: Any) -> None:
        os.truncate(path, 30)
        preamble(cursor)

    monkeypatch.setattr(container, "_read_preamble", shrink)
    with pytest.raises(InputError, match="shrank"):
        read_gguf(path)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    """Catches a traceback for a mistyped path."""
    with pytest.raises(InputError, match=r"cannot read .*no\.gguf: No such file"):
        read_gguf(tmp_path / "no.gguf")
    with pytest.raises(InputError, match="Is a directory"):
        read_gguf(tmp_path)


def test_is_gguf_looks_at_the_content(tmp_path: Path) -> None:
    """Catches telling by the extension, and a crash on files of less than four bytes."""
    for name, raw, expected in (("a.dat", VALID, True), ("b.gguf", b"GG", False), ("c.gguf", b"", False)):
        (tmp_path / name).write_bytes(raw)
        assert container.is_gguf(tmp_path / name) is expected


# --- splits -----------------------------------------------------------------------------------------------------------


def _shard(folder: Path, number: int, count: int, names: str, *, of: int | None = None, total: int | None = None, no: int | None = None) -> Path:
    path = folder / f"m-{number:05d}-of-{count:05d}.gguf"
    metadata = {
        "split.no": Value(ValueType.UINT16, number - 1 if no is None else no),
        "split.count": Value(ValueType.UINT16, count if of is None else of),
    }
    if total is not None:
        metadata["split.tensors.count"] = Value(ValueType.INT32, total)
    write_gguf(path, metadata, [(name, GgmlType.F32, np.zeros(8, np.float32)) for name in names])
    return path


def test_shards_are_read_in_order(tmp_path: Path) -> None:
    """Catches shards of which only the first is read; the first may hold metadata only."""
    first = _shard(tmp_path, 1, 3, "", total=3)
    _shard(tmp_path, 2, 3, "ab", total=3)
    _shard(tmp_path, 3, 3, "c", total=3)
    assert ["".join(t.name for t in file.tensors) for file in read_shards(first)] == ["", "ab", "c"]


def test_a_whole_file_is_one_shard(tmp_path: Path) -> None:
    """Catches asking a whole file for its shards."""
    (tmp_path / "a.gguf").write_bytes(VALID)
    assert len(read_shards(tmp_path / "a.gguf")) == 1


def _splits(case: str, folder: Path) -> Path:
    first = _shard(folder, 1, 2, "ab", total=3)
    if case == "missing":
        return first
    second = _shard(folder, 2, 2, "c", total=3)
    if case == "second given":
        return second
    if case == "no number in the name":
        return first.rename(folder / "model.gguf")
    if case == "count of the name is wrong":
        return first.rename(folder / "m-00001-of-00003.gguf")
    second.unlink()
    if case == "second is of another split":
        _shard(folder, 2, 2, "c", of=3, total=3)
    elif case == "second says it is the first":
        _shard(folder, 2, 2, "c", no=0, total=3)
    elif case == "second is damaged":
        second.write_bytes(VALID[:50])
    elif case == "same tensor twice":
        _shard(folder, 2, 2, "b", total=3)
    elif case == "one tensor less than declared":
        _shard(folder, 2, 2, "", total=3)
    elif case == "count is no number":
        write_gguf(first, {"split.count": string("2\n" * 5000)}, [], overwrite=True)
    return first


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("missing", ["missing shard", "m-00002-of-00002.gguf", "2 shards"]),
        ("second given", ["m-00002-of-00002.gguf", "not the first", "m-00001-of-00002.gguf"]),
        ("no number in the name", ["model.gguf", "2 shards", "model-00001-of-00002.gguf"]),
        ("count of the name is wrong", ["m-00001-of-00003.gguf", "2 shards", "expected m-00001-of-00002.gguf"]),
        ("second is of another split", ["m-00002-of-00002.gguf", "not shard 2 of 2"]),
        ("second says it is the first", ["m-00002-of-00002.gguf", "not shard 2 of 2"]),
        ("second is damaged", ["malformed GGUF", "m-00002-of-00002.gguf"]),
        ("same tensor twice", ["do not belong together", "m-00001-of-00002.gguf"]),
        ("one tensor less than declared", ["do not belong together", "expected 3"]),
        ("count is no number", ["split.count", "m-00001-of-00002.gguf"]),
    ],
)
def test_wrong_shards_are_refused(tmp_path: Path, case: str, words: list[str]) -> None:
    """Catches a model quantized from half its shards, or a message that does not say which file to fetch."""
    with pytest.raises(InputError) as caught:
        read_shards(_splits(case, tmp_path))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    assert all(word in message for word in words), message


def test_shard_names() -> None:
    """Catches a doubled suffix when a shard's own name is the stem."""
    assert container.shard_path(Path("x/m.gguf"), 2, 3) == Path("x/m-00002-of-00003.gguf")
    assert container.shard_path(Path("x/m-00001-of-00003.gguf"), 2, 3) == Path("x/m-00002-of-00003.gguf")


# --- part files -------------------------------------------------------------------------------------------------------


def _raise(number: int) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise OSError(number, os.strerror(number))

    return fail


def test_the_target_appears_only_when_published(tmp_path: Path) -> None:
    """Catches writing under the final name: a killed run would leave half a model there."""
    target = tmp_path / "new" / "a.gguf"  # the folder is made
    with PartFile(target, 4) as part:
        part.write_at(0, b"abcd")
        assert not target.exists() and part.path.name == "a.gguf.part"
        part.sync()
        part.publish()
        assert target.read_bytes() == b"abcd"
    assert [p.name for p in target.parent.iterdir()] == ["a.gguf"]


def test_an_overwritten_target_is_whole_at_any_time(tmp_path: Path) -> None:
    """Catches truncating the old file before the new one is complete."""
    target = tmp_path / "a.gguf"
    target.write_bytes(b"old")
    with PartFile(target, 3, overwrite=True) as part:
        part.write_at(0, b"new")
        assert target.read_bytes() == b"old"
        part.publish()
    assert target.read_bytes() == b"new"


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, OutputError])
def test_no_part_is_left_behind(tmp_path: Path, error: type[BaseException]) -> None:
    """Catches a leftover of gigabytes after any error, Ctrl-C included."""
    with pytest.raises(error), PartFile(tmp_path / "a.gguf", 1000) as part:
        part.write_at(0, b"x")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_leaving_without_publishing_leaves_nothing(tmp_path: Path) -> None:
    """Catches publishing by default."""
    with PartFile(tmp_path / "a.gguf", 1000):
        pass
    assert list(tmp_path.iterdir()) == []


def test_existing_target_and_folder_are_refused(tmp_path: Path) -> None:
    """Catches overwriting somebody's file, and a cryptic error for a folder."""
    target = tmp_path / "a.gguf"
    target.write_bytes(b"precious")
    with pytest.raises(OutputError, match=r"a\.gguf already exists.*--overwrite"), PartFile(target, 4):
        raise AssertionError
    with pytest.raises(OutputError, match="is a folder"), PartFile(tmp_path, 4, overwrite=True):
        raise AssertionError
    assert target.read_bytes() == b"precious"
    assert list(tmp_path.iterdir()) == [target]


def test_a_target_that_appears_meanwhile_is_kept(tmp_path: Path) -> None:
    """Catches a rename over the result of another run."""
    target = tmp_path / "a.gguf"
    with pytest.raises(OutputError, match="already exists"), PartFile(target, 4) as part:
        target.write_bytes(b"theirs")
        part.publish()
    assert target.read_bytes() == b"theirs"
    assert list(tmp_path.iterdir()) == [target]


def test_a_full_disk_is_found_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a failure after hours of work that a look at the disk could have told."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 1, 99))  # type: ignore[attr-defined]
    with pytest.raises(OutputError, match="100 bytes needed, 99 free; free some space"), PartFile(tmp_path / "a.gguf", 100):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["posix_fallocate", "pwrite", "fsync"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_of_the_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int) -> None:
    """Catches a bare OSError, or a part left on the full disk."""
    monkeypatch.setattr(os, call, _raise(number))
    with pytest.raises(OutputError, match=r"a\.gguf\.part: " + os.strerror(number)) as caught:
        write_gguf(tmp_path / "a.gguf", {}, [("t", GgmlType.F32, np.zeros(8, np.float32))])
    assert ("free some space" in str(caught.value)) == (number != errno.EIO)
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback; root may write anywhere, so the refusal is made up."""
    monkeypatch.setattr(os, "open", _raise(errno.EACCES))
    with pytest.raises(OutputError, match=r"cannot create .*a\.gguf\.part: Permission denied; check the folder"), PartFile(tmp_path / "a.gguf", 4):
        raise AssertionError


def test_a_file_in_the_place_of_the_folder(tmp_path: Path) -> None:
    """Catches NotADirectoryError for `-o model.gguf/out.gguf`."""
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(OutputError, match="cannot create"), PartFile(tmp_path / "file" / "a.gguf", 4):
        raise AssertionError


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches taking pwrite's word for a full write: Linux never writes more than 2 GiB at once."""
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:3], offset))
    with PartFile(tmp_path / "a", 10) as part:
        part.write_at(0, b"0123456789")
        part.publish()
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_threads_write_side_by_side(tmp_path: Path) -> None:
    """Catches a shared file position."""
    chunk, n_chunks = 4096, 200
    with PartFile(tmp_path / "a", chunk * n_chunks) as part, ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: part.write_at(i * chunk, np.full((2, chunk // 4), i, np.uint16).data), reversed(range(n_chunks))))
        part.publish()
    assert np.array_equal(np.fromfile(tmp_path / "a", np.uint16), np.repeat(np.arange(n_chunks, dtype=np.uint16), chunk // 2))


@pytest.mark.parametrize("piece", [7, 1 << 20])
def test_rows_are_read_back_before_they_are_published(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """Catches rows of another tensor or place, more or fewer of them, and pieces in which a row is cut."""
    monkeypatch.setattr(container, "_PIECE_BYTES", piece)
    wanted = [("a", GgmlType.F32, (3, 5)), ("b", GgmlType.Q4_0, (2, 4, 64)), ("c", GgmlType.F16, (6,))]
    layout = plan_layout({}, wanted)
    rows = {
        name: np.random.default_rng(i).integers(0, 256, (int(np.prod(shape[:-1])), row_bytes(t, shape[-1])), np.uint8)
        for i, (name, t, shape) in enumerate(wanted)
    }
    with PartFile(tmp_path / "a.gguf", layout.total_bytes) as part:
        for info in layout.tensors:
            part.write_at(info.offset, rows[info.name].tobytes())
        for info in layout.tensors:
            n = len(rows[info.name])
            for start, stop in ((0, n), (n - 1, n), (n // 2, n), (1, 1)):
                read = part.read_rows(info, start, stop)
                assert read.dtype == np.uint8 and read.flags.c_contiguous and np.array_equal(read, rows[info.name][start:stop])
        assert b"".join(part.read_at(layout.total_bytes - 3, 9)) == bytes(part.path.read_bytes()[-3:])


def test_the_size_is_the_planned_one_without_preallocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a file without its last padding where the system cannot preallocate (macOS): other bytes than on Linux."""
    monkeypatch.delattr(os, "posix_fallocate")
    _write(tmp_path / "a.gguf", {"a": uint32(7), "b": string("é"), "c": array(ValueType.FLOAT32, [1.0, -2.0])}, _payloads())
    assert (tmp_path / "a.gguf").read_bytes() == GOLDEN


def test_a_leftover_part_is_replaced(tmp_path: Path) -> None:
    """Catches bytes of a killed run in the new file, and a refusal because of it."""
    (tmp_path / "a.part").write_bytes(b"y" * 5000)
    with PartFile(tmp_path / "a", 10) as part:
        part.publish()
    assert (tmp_path / "a").read_bytes() == bytes(10)


def test_two_runs_do_not_write_one_output(tmp_path: Path) -> None:
    """Catches a second run that truncates the first one's part, or removes it when it gives up."""
    with PartFile(tmp_path / "a", 4) as first:
        first.write_at(0, b"mine")
        with pytest.raises(OutputError, match=r"output .*a is being written by another run"), PartFile(tmp_path / "a", 9, overwrite=True):
            raise AssertionError
        first.publish()
        with PartFile(tmp_path / "a", 9, overwrite=True) as second:
            first.discard()  # of a part that is not its own any more
            second.write_at(0, b"theirs")
            second.publish()
    assert (tmp_path / "a").read_bytes() == b"theirs\0\0\0"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_leftover_part_does_not_count_against_the_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `disk full` because of the killed run's part, which is replaced anyway."""
    part = tmp_path / "a.part"
    part.write_bytes(b"y" * 60)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 0, 100 - part.stat().st_size))  # type: ignore[attr-defined]
    with PartFile(tmp_path / "a", 80) as writing:
        writing.publish()
    assert (tmp_path / "a").stat().st_size == 80


def test_a_file_system_without_locks_and_preallocation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a refusal to write to ZFS (no preallocation) or to a network disk (no locks)."""
    fcntl = pytest.importorskip("fcntl")
    monkeypatch.setattr(fcntl, "flock", _raise(errno.ENOLCK))
    monkeypatch.setattr(os, "posix_fallocate", _raise(errno.EOPNOTSUPP))
    with PartFile(tmp_path / "a", 7) as part:
        part.publish()
    assert (tmp_path / "a").read_bytes() == bytes(7)
    assert "no locks" in caplog.text


def test_write_gguf_takes_arrays_in_any_memory_order(tmp_path: Path) -> None:
    """Catches writing a transposed view as it lies in memory."""
    values = np.arange(6, dtype=np.float32).reshape(3, 2).T
    write_gguf(tmp_path / "a.gguf", {}, [("t", GgmlType.F32, values)])
    tensor = read_gguf(tmp_path / "a.gguf").tensors[0]
    assert tensor.shape == (2, 3)
    assert np.array_equal(np.frombuffer(_payload(tmp_path / "a.gguf", tensor), np.float32).reshape(2, 3), values)


def test_write_gguf_refuses_an_array_of_another_width(tmp_path: Path) -> None:
    """Catches a float64 array that would run over the next tensor."""
    with pytest.raises(AssertionError):
        write_gguf(tmp_path / "a.gguf", {}, [("t", GgmlType.F32, np.zeros(8))])
    assert list(tmp_path.iterdir()) == []


def test_layout_adds_up() -> None:
    """Catches planned sizes that differ from the sum of their parts."""
    layout = plan_layout({}, [(n, t, s) for n, t, s, _ in _payloads()])
    assert len(layout.header) % 32 == 0
    assert layout.tensors[0].offset == len(layout.header)
    assert layout.total_bytes == len(layout.header) + 32 + 32 + 64
    assert layout.tensors[2].n_bytes == row_bytes(GgmlType.Q8_0, 32)
