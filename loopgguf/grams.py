"""Gram matrices on disk: safetensors shards beside an imatrix, or in a job folder, written layer by layer and read one matrix at a time.

`NAME.imatrix.gguf` → `NAME.imatrix.gram-00001-of-00033.safetensors`, …: a shard per layer, and one for what belongs to
no layer. An entry is `WHAT.NAME`, `WHAT.NAME#EXPERT`, and in the held-out set `holdout.WHAT.NAME`, where WHAT is a field of
`curvature.GramSet` and NAME an input group or weight. Symmetric matrices are packed: row i of the upper triangle from
the diagonal on, then row i + 1, float32, sums over tokens and not means. Beside each entry lies `…/tokens` (or
`…/weight`), what it is divided by. Holds no statistics in memory but those of one layer; computes none.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopgguf.accumulators import EMBEDDING, FloatArray
from loopgguf.architectures import input_group
from loopgguf.container import flush_folder, part_path
from loopgguf.curvature import Curvature, FirstToken, Gram, GramSet, GramStatistics, has_output_gram
from loopgguf.documents import parse_object
from loopgguf.errors import InputError, OutputError
from loopgguf.safetensor import Deferred, StoredTensor, read_array, read_safetensors, write_safetensors

Divided = Gram | FirstToken | Curvature

FORMAT = "1"
HOLDOUT = "holdout."
MATRICES, VECTORS, CURVATURES = ("inputs", "weighted", "outputs"), ("first", "first_weighted"), ("curvature",)
_MAX_SUM = 1e30  # beyond which products of two overflow
_BLOCK = 512  # rows mirrored at a time
_NO_LAYER = "no-layer"  # the shard of what belongs to none
_ENTRY = re.compile(rf"({re.escape(HOLDOUT)})?({'|'.join((*MATRICES, *VECTORS, *CURVATURES))})\.(.+?)(?:#(\d{{1,6}}))?")


# --- packing ------------------------------------------------------------------------------------------------------------


def packed_size(n: int) -> int:
    """Return the number of values of a packed n × n triangle."""
    return n * (n + 1) // 2


def pack_triangle(matrix: FloatArray) -> FloatArray:
    """Return the upper triangle of a symmetric (n, n) matrix, row by row, (n (n + 1) / 2,)."""
    n = len(matrix)
    packed, at = np.empty(packed_size(n), np.float32), 0
    for i in range(n):
        packed[at : at + n - i] = matrix[i, i:]
        at += n - i
    return packed


def unpack_triangle(packed: FloatArray) -> FloatArray:
    """Return the symmetric (n, n) matrix of a packed triangle."""
    n = (math.isqrt(8 * packed.size + 1) - 1) // 2
    assert packed_size(n) == packed.size
    matrix, at = np.empty((n, n), np.float32), 0
    for i in range(n):
        matrix[i, i:] = packed[at : at + n - i]
        at += n - i
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        diagonal = matrix[start:stop, start:stop]
        lower = np.tril_indices(stop - start, -1)
        diagonal[lower] = diagonal.T[lower]
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
    return matrix


# --- sizes --------------------------------------------------------------------------------------------------------------


def stored_bytes(shapes: Mapping[str, Sequence[int]], *, has_gradient: bool) -> int:
    """Return the bytes that the matrices of these weights take on disk, train and held-out set together, at most.

    shapes: of what is collected, by GGUF name, (n_out, n_in) or (n_experts, n_out, n_in); with gradients
    `token_embd.weight` too. Experts that no token reaches take nothing. Headers and vectors are counted generously.
    """
    inputs: dict[str, int] = {}
    n_values = 0
    for name, shape in shapes.items():
        if name != EMBEDDING:
            inputs[input_group(name) or name] = math.prod(shape[:-2]) * packed_size(shape[-1])
            n_values += 2 * shape[-1] + shape[-2]
        if has_gradient:
            n_values += packed_size(shape[-1])  # H_w, or G0 of the embedding
            n_values += packed_size(shape[-2]) if has_output_gram(name) else 0
    return 2 * (4 * (n_values + sum(inputs.values())) + 4096 * len(shapes))


def check_disk(folder: Path, n_bytes: int, remedy: str = "choose another disk with -o") -> None:
    """Raise OutputError when `folder` (or the nearest one above that exists) has no room for `n_bytes` of matrices."""
    existing = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise OutputError(f"disk space for Gram matrices in {existing}: got {free:,} bytes free, expected {n_bytes:,}. Free some space or {remedy}")


# --- writing ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GramHeader:
    """What all matrices of a file have in common; see `curvature.GramStatistics`."""

    holdout_chunks: tuple[int, ...]
    seed: int
    label_seed: int | None
    fingerprint: str


def _divisor(value: Divided) -> tuple[str, NDArray[Any]]:
    if isinstance(value, FirstToken):
        return "/weight", np.array(value.weight, np.float64)
    return "/tokens", np.array(value.n_tokens, np.int64)


def _packed(gram: Gram) -> Deferred:
    return Deferred(np.dtype(np.float32), (packed_size(len(gram.total)),), lambda: pack_triangle(gram.total))


def _entries(grams: GramSet, prefix: str) -> Iterator[tuple[str, NDArray[Any] | Deferred]]:
    for what in (*MATRICES, *VECTORS, *CURVATURES):
        for key, value in getattr(grams, what).items():
            name, matrix = key if isinstance(key, tuple) else (key, None)
            label = f"{prefix}{what}.{name}" + ("" if matrix is None else f"#{matrix}")
            yield label, _packed(value) if isinstance(value, Gram) else value.total
            suffix, divisor = _divisor(value)
            yield label + suffix, divisor


def gram_path(imatrix: Path, number: int, n_shards: int) -> Path:
    """Return the path of shard `number` (from 1) beside an imatrix: its name without `.gguf` or `.dat`, and `.gram-…`."""
    return imatrix.with_name(f"{imatrix_stem(imatrix)}.gram-{number:05d}-of-{n_shards:05d}.safetensors")


def imatrix_stem(imatrix: Path) -> str:
    """Return what the names of all files of an imatrix begin with: its own without `.gguf` or `.dat`."""
    return imatrix.name.removesuffix(".gguf").removesuffix(".dat")


def find_grams(imatrix: Path) -> list[Path]:
    """Return the shards beside an imatrix, in order of their names; empty when there are none."""
    pattern = re.compile(re.escape(imatrix_stem(imatrix)) + r"\.gram-\d{5}-of-\d{5}\.safetensors")
    return sorted(path for path in imatrix.absolute().parent.iterdir() if pattern.fullmatch(path.name))


def refuse_existing_grams(imatrix: Path, *, overwrite: bool) -> None:
    """Raise OutputError when there are shards beside an imatrix that may not be overwritten."""
    found = find_grams(imatrix) if imatrix.absolute().parent.is_dir() else []
    if found and not overwrite:
        raise OutputError(f"output {found[0]} already exists: pass --overwrite or choose another name with -o")


class GramWriter:
    """A sink of layers' matrices: a finished shard each in `folder`, which `publish` gives names beside the imatrix too.

    folder: may hold shards of a job that goes on; a layer that comes again replaces its shard.
    """

    def __init__(self, folder: Path, header: GramHeader) -> None:
        self.folder, self.header = folder, header
        with _explained(folder):
            folder.mkdir(parents=True, exist_ok=True)

    def _shard(self, layer: int | None) -> Path:
        return self.folder / (_NO_LAYER if layer is None else f"layer-{layer:05d}")

    def _shards(self) -> list[Path]:
        return sorted(path for path in self.folder.iterdir() if path.suffix != ".part")

    @property
    def is_complete(self) -> bool:
        """Whether all that a pass gives has been written: what belongs to no layer comes last."""
        return self._shard(None).exists()

    def written(self) -> GramStatistics:
        """Return what was written, as `load_grams`."""
        return _load(self._shards())

    def __call__(self, layer: int | None, train: GramSet, holdout: GramSet) -> None:
        """Write one layer's matrices (None: of what belongs to no layer), durably. Raises OutputError."""
        arrays = dict([*_entries(train, ""), *_entries(holdout, HOLDOUT)])
        if not arrays:
            return
        path = self._shard(layer)
        temporary = path.with_suffix(".part")
        with _explained(path), temporary.open("wb") as stream:
            write_safetensors(stream.write, arrays, self._metadata())
            stream.flush()
            os.fsync(stream.fileno())
        with _explained(path):
            temporary.replace(path)

    def _metadata(self) -> dict[str, str]:
        header = {"holdout_chunks": self.header.holdout_chunks, "seed": self.header.seed, "label_seed": self.header.label_seed}
        return {"loopgguf.gram": FORMAT, "loopgguf.calibration": self.header.fingerprint, "loopgguf.split": json.dumps(header)}

    def require(self, layers: Sequence[int | None]) -> None:
        """Raise InputError when the shard of a layer that a job has finished is missing or damaged."""
        for layer in layers:
            read_safetensors(self._shard(layer))

    def publish(self, imatrix: Path, *, overwrite: bool = False) -> list[Path]:
        """Give the shards names beside the imatrix too, and return them; older ones are removed. Raises OutputError."""
        refuse_existing_grams(imatrix, overwrite=overwrite)
        shards = self._shards()
        names = [gram_path(imatrix, number, len(shards)) for number in range(1, len(shards) + 1)]
        with _explained(imatrix):
            for old in find_grams(imatrix):
                old.unlink()
            for shard, name in zip(shards, names, strict=True):
                _give_name(shard, name)
            flush_folder(imatrix.absolute().parent)
        return names


def _give_name(shard: Path, name: Path) -> None:
    """Give a shard a second name, so that a job that is killed right after can do it again; or a copy, on another disk."""
    try:
        os.link(shard, name)
    except OSError:
        part = part_path(name)
        shutil.copyfile(shard, part)
        part.replace(name)


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot write {path}: {error.strerror}; free some space or choose another disk") from error


# --- reading ------------------------------------------------------------------------------------------------------------


class _OnDisk(Mapping[Any, Any]):
    """Entries of one kind by key, each read when asked for and not kept."""

    def __init__(self, entries: Mapping[Any, tuple[StoredTensor, StoredTensor]], decode: Callable[[NDArray[Any], NDArray[Any]], Divided]) -> None:
        self._entries, self._decode = entries, decode

    def __getitem__(self, key: Any) -> Divided:
        stored, _ = self._entries[key]
        total, divisor = (read_array(part) for part in self._entries[key])
        largest = max(float(total.max(initial=0)), -float(total.min(initial=0)))  # NaN where there is one
        if not largest <= _MAX_SUM or not 0 <= float(divisor) <= _MAX_SUM:
            raise _refuse(stored.path, f"tensor {stored.name!r:.120}", f"{largest:g} over {float(divisor):g}", "finite sums over a number from 0")
        return self._decode(total, divisor)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)


def _to_gram(packed: NDArray[Any], n_tokens: NDArray[Any]) -> Gram:
    return Gram(unpack_triangle(packed), int(n_tokens))


def _to_first(total: NDArray[Any], weight: NDArray[Any]) -> FirstToken:
    return FirstToken(total, float(weight))


def _to_curvature(total: NDArray[Any], n_tokens: NDArray[Any]) -> Curvature:
    return Curvature(total, int(n_tokens))


def _refuse(path: Path, what: str, got: object, expected: str) -> InputError:
    return InputError(f"{what} in {path}: got {got!s:.120}, expected {expected}. Make the Gram matrices again")


def _check_entry(stored: StoredTensor, what: str, divisor: StoredTensor | None) -> StoredTensor:
    """Return the divisor of an entry; raises InputError for a dtype, shape or partner that is not as we write it."""
    dtype = "F64" if what in CURVATURES else "F32"
    if stored.dtype != dtype or len(stored.shape) != 1:
        raise _refuse(stored.path, f"tensor {stored.name!r:.120}", f"{stored.dtype} {stored.shape}", f"{dtype} of one dimension")
    if what in MATRICES and packed_size((math.isqrt(8 * stored.shape[0] + 1) - 1) // 2) != stored.shape[0]:
        raise _refuse(stored.path, f"tensor {stored.name!r:.120}", f"{stored.shape[0]} values", "n (n + 1) / 2 of a packed triangle")
    wanted = "F64" if what in VECTORS else "I64"
    if divisor is None or divisor.dtype != wanted or divisor.shape != ():
        raise _refuse(stored.path, f"divisor of tensor {stored.name!r:.120}", "nothing" if divisor is None else divisor.dtype, f"one {wanted}")
    return divisor


def _read_split(raw: bytes, path: Path) -> GramHeader:
    metadata = parse_object(raw, f"the header of {path}").get("__metadata__")
    if not isinstance(metadata, dict) or metadata.get("loopgguf.gram") != FORMAT:
        raise _refuse(path, "loopgguf.gram", metadata, f"{FORMAT!r}")
    split = parse_object(str(metadata.get("loopgguf.split", "")).encode("utf-8", "surrogatepass"), f"loopgguf.split of {path}")
    holdout, seed, label_seed = split.get("holdout_chunks"), split.get("seed"), split.get("label_seed")
    if not isinstance(holdout, list) or not all(isinstance(n, int) for n in holdout) or not isinstance(seed, int) or not isinstance(label_seed, int | None):
        raise _refuse(path, "loopgguf.split", split, "holdout_chunks, seed and label_seed")
    return GramHeader(tuple(holdout), seed, label_seed, str(metadata.get("loopgguf.calibration")))


def _grouped(tensors: Mapping[str, StoredTensor], prefix: str) -> GramSet:
    found: dict[str, dict[Any, tuple[StoredTensor, StoredTensor]]] = {what: {} for what in (*MATRICES, *VECTORS, *CURVATURES)}
    for label, stored in tensors.items():
        match = _ENTRY.fullmatch(label)
        if match is None or (match[1] or "") != prefix or label.endswith(("/tokens", "/weight")):
            continue
        what, name, matrix = match[2], match[3], match[4]
        divisor = _check_entry(stored, what, tensors.get(label + ("/weight" if what in VECTORS else "/tokens")))
        found[what][(name, int(matrix) if matrix else None) if what == "inputs" else name] = (stored, divisor)
    return GramSet(
        inputs=_OnDisk(found["inputs"], _to_gram),
        first=_OnDisk(found["first"], _to_first),
        weighted=_OnDisk(found["weighted"], _to_gram),
        first_weighted=_OnDisk(found["first_weighted"], _to_first),
        outputs=_OnDisk(found["outputs"], _to_gram),
        curvature=_OnDisk(found["curvature"], _to_curvature),
    )


def load_grams(imatrix: Path) -> GramStatistics:
    """Return the Gram matrices beside an imatrix; each is read from disk when it is asked for, and never kept.

    Raises InputError when there are none, a shard is missing, malformed, or of another run than the first.
    """
    paths = find_grams(imatrix)
    if not paths:
        raise InputError(f"Gram matrices of {imatrix}: got no {imatrix_stem(imatrix)}.gram-*.safetensors, expected them beside it. Make them with --gram")
    counts = {int(path.name.removesuffix(".safetensors").rpartition("-")[2]) for path in paths}
    if len(counts) > 1:
        raise _refuse(imatrix.absolute().parent, f"shards of {imatrix_stem(imatrix)}.gram", f"parts of {sorted(counts)} shards", "those of one run")
    n_shards = counts.pop()
    return _load([gram_path(imatrix, number, n_shards) for number in range(1, n_shards + 1)])


def _load(paths: Sequence[Path]) -> GramStatistics:
    tensors: dict[str, StoredTensor] = {}
    headers = []
    for path in paths:
        raw, found = read_safetensors(path)
        twice = next((name for name in found if name in tensors), None)
        if twice is not None:
            raise _refuse(path, f"tensor {twice!r:.120}", "it in two shards", "it in one")
        headers.append(_read_split(raw, path))
        tensors |= found
        if headers[-1] != headers[0]:
            raise _refuse(path, "calibration", headers[-1], f"that of the first shard, {headers[0]!s:.120}")
    first = headers[0]
    return GramStatistics(_grouped(tensors, ""), _grouped(tensors, HOLDOUT), first.holdout_chunks, first.seed, first.label_seed, first.fingerprint)
