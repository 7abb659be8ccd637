"""safetensors files: a strict bounded reader of headers, of one file or of a checkpoint's, and a plain writer. Bytes only.

Believes nothing: the header's length, each dtype, shape and span are checked against the file's size, spans must tile
the data without gap or overlap, and a shard named by the index must be a plain file name in the folder itself. Where
such an entry may lead as a symbolic link is for `source` to say. Replaces `safe_open`, whose mapped pages stay in
memory. Format: the safetensors README.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from loopgguf.container import Shape, refuse_pointer
from loopgguf.documents import load_json, parse_object
from loopgguf.errors import InputError

MAX_HEADER_BYTES = 100_000_000  # the reference implementation's own limit
MAX_DIMS = 8
_SLAB_VALUES = 1 << 22  # written at a time
INDEX_NAME = "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# bits per element; those of less than a byte hold whole bytes all the same
_DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
# what numpy has a type for
_NUMPY_DTYPES = {
    **dict(zip(("F64", "F32", "F16"), ("<f8", "<f4", "<f2"), strict=True)),
    **{f"{kind}{8 * n_bytes}": f"<{kind.lower()}{n_bytes}" for kind in "IU" for n_bytes in (1, 2, 4, 8)},
    "BOOL": "?",
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies: dtype as safetensors spells it (`BF16`), row-major shape, absolute offset and bytes."""

    name: str
    dtype: str
    shape: Shape
    path: Path
    offset: int
    n_bytes: int


@dataclass(frozen=True)
class Weights:
    """The shards of a checkpoint in order of their names, the bytes of each one's header, and all tensors by name."""

    files: tuple[Path, ...]
    headers: tuple[bytes, ...]
    tensors: Mapping[str, StoredTensor]


# --- one file ------------------------------------------------------------------------------------------------------------


def _refuse(path: Path, field: str, got: object, expected: str) -> NoReturn:
    raise InputError(f"malformed safetensors: {field} in {path}: got {got!s:.120}, expected {expected}. Download the file again")


def _read_header(path: Path) -> tuple[bytes, int]:
    """Return the header's JSON bytes and the size of the file."""
    try:
        if not path.is_file():
            raise InputError(f"{path} is missing or not a file: the checkpoint needs it. Download all of its shards into one folder")
        size = path.stat().st_size
        with path.open("rb") as stream:
            refuse_pointer(path, stream.peek(64))
            prefix = stream.read(8)
            if len(prefix) < 8:
                _refuse(path, "length of the header", f"a file of {size} bytes", "at least 8 bytes (truncated?)")
            length = struct.unpack("<Q", prefix)[0]
            if length > min(MAX_HEADER_BYTES, size - 8):
                _refuse(path, "length of the header", length, f"at most {min(MAX_HEADER_BYTES, size - 8)} bytes (truncated, or not safetensors?)")
            return stream.read(length), size
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}. Check the path and its permissions") from error


def _is_size(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _check_tensor(path: Path, name: str, entry: object) -> tuple[str, Shape, int, int]:
    """Return dtype, shape, begin and end of one entry of the header, each checked by itself and against each other."""
    field = f"tensor {name!r:.120}"
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        _refuse(path, field, entry, "an object with dtype, shape and data_offsets")
    dtype, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        _refuse(path, f"dtype of {field}", repr(dtype), f"one of {', '.join(_DTYPE_BITS)}")
    if not isinstance(shape, list) or len(shape) > MAX_DIMS or not all(_is_size(n) for n in shape):
        _refuse(path, f"shape of {field}", shape, f"a list of at most {MAX_DIMS} sizes")
    if not isinstance(span, list) or len(span) != 2 or not all(_is_size(n) for n in span) or span[0] > span[1]:
        _refuse(path, f"data_offsets of {field}", span, "begin and end")
    n_bits = math.prod(shape) * _DTYPE_BITS[dtype]
    if n_bits != 8 * (span[1] - span[0]):
        _refuse(path, f"data_offsets of {field}", f"{span[1] - span[0]} bytes", f"{n_bits // 8} for {dtype} of shape {shape}")
    return dtype, tuple(shape), span[0], span[1]


def read_safetensors(path: Path) -> tuple[bytes, dict[str, StoredTensor]]:
    """Return the header's bytes and the tensors of one file, by name.

    Raises InputError naming the field and tensor for anything malformed, truncated, overlapping or not tiling the file.
    """
    header, size = _read_header(path)
    entries = parse_object(header, f"the header of {path}")
    entries.pop("__metadata__", None)
    checked = sorted(((name, *_check_tensor(path, name, entry)) for name, entry in entries.items()), key=lambda t: (t[3], t[4]))
    data_offset, expected = 8 + len(header), 0
    tensors = {}
    for name, dtype, shape, begin, end in checked:
        if begin != expected:
            _refuse(path, f"data_offsets of tensor {name!r:.120}", f"begin {begin}", f"{expected}, right behind the tensor before it (no gap, no overlap)")
        tensors[name] = StoredTensor(name, dtype, shape, path, data_offset + begin, end - begin)
        expected = end
    if data_offset + expected != size:
        _refuse(path, "size of the file", f"{size} bytes", f"{data_offset + expected}, as its header says (truncated?)")
    return header, tensors


def read_array(stored: StoredTensor) -> NDArray[Any]:
    """Return a stored tensor's values. Raises InputError for a type that numpy lacks (BF16) and for a file cut short."""
    if stored.dtype not in _NUMPY_DTYPES:
        _refuse(stored.path, f"dtype of tensor {stored.name!r:.120}", stored.dtype, f"one of {', '.join(_NUMPY_DTYPES)}")
    n_values = math.prod(stored.shape)
    try:
        values = np.fromfile(stored.path, _NUMPY_DTYPES[stored.dtype], n_values, offset=stored.offset)
    except OSError as error:
        raise InputError(f"cannot read {stored.path}: {error.strerror}. Check the path and its permissions") from error
    if values.size != n_values:
        _refuse(stored.path, f"tensor {stored.name!r:.120}", f"{values.size} values", f"{n_values} (truncated?)")
    return values.reshape(stored.shape)


@dataclass(frozen=True)
class Deferred:
    """An array that is made when its turn to be written comes, so that not all are in memory at once."""

    dtype: np.dtype[Any]
    shape: Shape
    make: Callable[[], NDArray[Any]]


def write_safetensors(write: Callable[[memoryview], object], arrays: Mapping[str, NDArray[Any] | Deferred], metadata: Mapping[str, str] | None = None) -> None:
    """Hand the bytes of a safetensors file that holds `arrays` to `write`, piece by piece: the same arrays, the same bytes.

    Tensors are sorted by name; contiguous ones are never copied whole, and memory-mapped ones may be larger than memory.
    """
    write(memoryview(plan_header(((name, array.dtype, array.shape) for name, array in arrays.items()), metadata)))
    for _, array in sorted(arrays.items()):
        rows = (array.make() if isinstance(array, Deferred) else array).reshape(-1)
        for start in range(0, rows.size, _SLAB_VALUES):
            slab = np.ascontiguousarray(rows[start : start + _SLAB_VALUES])
            write(slab.astype(slab.dtype.newbyteorder("<"), copy=False).data.cast("B"))


def plan_header(tensors: Iterable[tuple[str, np.dtype[Any], Shape]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Return the length and the header of a file that holds these (name, numpy type, shape), in order of their names."""
    spelled = {np.dtype(numpy_name): name for name, numpy_name in _NUMPY_DTYPES.items()}
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for name, dtype, shape in sorted(tensors, key=lambda tensor: tensor[0]):
        n_bytes = math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": spelled[dtype.newbyteorder("<")], "shape": list(shape), "data_offsets": [offset, offset + n_bytes]}
        offset += n_bytes
    header = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    return struct.pack("<Q", len(header)) + header


# --- a folder ------------------------------------------------------------------------------------------------------------


def _read_index(path: Path) -> dict[str, str]:
    """Return tensor name → file name of an index whose every file name is a plain one."""
    weight_map = load_json(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"weight_map in {path}: got {type(weight_map).__name__}, expected tensor names with their shards. Download the file again")
    for tensor, name in weight_map.items():
        if not isinstance(name, str) or not name.isprintable() or not re.fullmatch(r"[^/\\:]{1,240}\.safetensors", name):
            raise InputError(f"shard of {tensor!r:.80} in {path}: got {name!r:.80}, expected the name of a .safetensors file in the same folder. Do not use it")
    return weight_map


def _list_shards(folder: Path) -> list[str]:
    """Return the names of the folder's `model*.safetensors`, complete by their own numbering."""
    names = sorted(path.name for path in folder.glob("model*.safetensors"))
    if not names:
        _refuse_without_safetensors(folder)
    numbered = [match for name in names if (match := re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.safetensors", name))]
    for stem, count in sorted({(match[1], int(match[2])) for match in numbered}):
        for number in range(1, count + 1):
            name = f"{stem}-{number:05d}-of-{count:05d}.safetensors"
            if name not in names:
                raise InputError(f"missing shard {folder / name}: the checkpoint has {count} shards; download all of them into one folder")
    return names


def _refuse_without_safetensors(folder: Path) -> NoReturn:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise InputError(
            f"{folder} has its weights only as pickle ({pickles[0]:.80}), which can run code when loaded: expected .safetensors. "
            "Convert them where you trust them: transformers' AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    raise InputError(f"no weights in {folder}: got no model*.safetensors, expected at least one. Download the checkpoint's weights too")


def read_weights(folder: Path) -> Weights:
    """Return the tensors of all shards that the index names, or else of all `model*.safetensors`.

    Raises InputError when a shard is missing, malformed or outside the folder, when a tensor is in two shards or not in
    the one the index says, and when there is only pickle (saying how to convert it).
    """
    index_path = folder / INDEX_NAME
    weight_map = _read_index(index_path) if index_path.exists() else None
    names = sorted(set(weight_map.values())) if weight_map is not None else _list_shards(folder)
    headers: list[bytes] = []
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        header, found = read_safetensors(folder / name)
        twice = next((tensor for tensor in found if tensor in tensors), None)
        if twice is not None:
            raise InputError(f"tensor {twice!r:.120} is in two shards, {tensors[twice].path.name} and {name}, of {folder}: expected one. Download them again")
        headers.append(header)
        tensors |= found
    for tensor, name in (weight_map or {}).items():
        if tensor not in tensors or tensors[tensor].path.name != name:
            raise InputError(f"{name} lacks tensor {tensor!r:.120}, which {index_path} says it holds. Download the shards again")
    if weight_map is not None and (extra := next((tensor for tensor in tensors if tensor not in weight_map), None)) is not None:
        raise InputError(f"tensor {extra!r:.120} in {tensors[extra].path} is not named in {index_path.name}. Download the shards and the index again")
    return Weights(tuple(folder / name for name in names), tuple(headers), tensors)
