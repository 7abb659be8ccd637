"""imatrix files: load, merge, check against a model, save.

`Statistics` is what an imatrix holds, by GGUF tensor name; `accumulators.ColumnSums` makes it from activations. Reads
and writes llama.cpp's GGUF imatrix and the legacy .dat, told apart by content. Tensors that end in `.in_sum` and
`.in_max` carry Σx and max |x| beside llama.cpp's own two: its loader passes over other endings. Runs no model; what the
numbers say is told by `summary.py`.
Sources: tools/imatrix/imatrix.cpp, common/imatrix-loader.cpp, tools/quantize/quantize.cpp (`load_imatrix`).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Literal, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from loopgguf.accumulators import HEAD, Columns, ColumnSums, FloatArray
from loopgguf.container import (
    MAX_NAME_BYTES,
    GgufFile,
    TensorInfo,
    ValueType,
    array,
    is_gguf,
    read_gguf,
    refuse_pointer,
    string,
    uint32,
    write_file,
    write_gguf,
)
from loopgguf.errors import InputError
from loopgguf.formats import GgmlType

__all__ = ["ColumnSums", "Columns", "Coverage", "Statistics", "check_coverage", "load_imatrix", "merge", "sanitize_importance", "save_imatrix"]

ImatrixFormat = Literal["gguf", "dat"]

SQUARES, COUNTS, SUMS, MAXIMA = ".in_sum2", ".counts", ".in_sum", ".in_max"
DATASETS, CHUNK_COUNT, CHUNK_SIZE = "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"
MAX_WEIGHT_NAME_BYTES = MAX_NAME_BYTES - len(SQUARES)
_MAX_SUM = float(np.finfo(np.float32).max)
_MAX_COUNT = 2.0**48  # tokens: far beyond any text, and sums of counts stay exact
# of a matrix's median positive importance: below this a whole block would be encoded as zeros (ggml-quants.c divides
# by sums of importances); the median, not the mean, because one massive activation can be 10⁶ times its neighbours
FLOOR = np.float32(1e-6)
# the input embedding is looked up, not multiplied: no column of it is ever seen, and a tied head goes by its name
NEVER_COLLECTED = "token_embd.weight"


@dataclass(frozen=True)
class Statistics:
    """What calibration text says about the inputs of each weight, by GGUF tensor name.

    `chunk_size` is in tokens; 0 for a legacy .dat, whose counts are chunks instead of tokens.
    """

    columns: Mapping[str, Columns]
    datasets: tuple[str, ...]
    n_chunks: int
    chunk_size: int

    def importance(self, name: str) -> FloatArray | None:
        """Return mean x² per column, (n_matrices, n_in) float32, exactly as llama-quantize normalises it; None if unseen.

        Matrices (experts) that saw no token get ones. Source: tools/quantize/quantize.cpp (`load_imatrix`), in float32 like there.
        """
        columns = self.columns.get(name)
        if columns is None:
            return None
        counts = columns.counts.astype(np.float32)[:, None]
        return np.where(counts > 0, columns.sum_squares / np.maximum(counts, np.float32(1)), np.float32(1))


# --- files ------------------------------------------------------------------------------------------------------------


def _refuse_values(what: str, name: str, path: Path, values: FloatArray, *, least: float, most: float = math.inf) -> None:
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= least) & (values <= most)))
    if bad.size:
        expected = "finite ones" + (f" from {least:g}" if least > -math.inf else "") + (f" to {most:g}" if most < math.inf else "")
        raise InputError(
            f"{what} of {name} in {path}: got {values[bad[0]]} at index {bad[0]} and {bad.size} bad values in all, expected {expected}. Make the imatrix again"
        )


def _checked(name: str, path: Path, squares: FloatArray, counts: FloatArray, sums: FloatArray | None = None, maxima: FloatArray | None = None) -> Columns:
    """Return flat values as Columns; raises InputError naming the weight for anything llama-quantize trips over, and for moments that do not fit."""
    _refuse_values("sums of squares", name, path, squares, least=0)
    _refuse_values("counts", name, path, counts, least=0, most=_MAX_COUNT)
    if squares.size % counts.size:
        raise InputError(f"shape of {name} in {path}: got {squares.size} sums for {counts.size} counts, expected a whole multiple. Make the imatrix again")
    whole_counts = np.floor(counts.astype(np.float64) + 0.5).astype(np.int64)  # lround
    if not whole_counts.any():
        raise InputError(f"counts of {name} in {path}: got 0 tokens, expected at least 1. Make the imatrix again with more text")
    shape = (counts.size, squares.size // counts.size)
    for what, values, least in ((SUMS, sums, -math.inf), (MAXIMA, maxima, 0)):
        if values is not None:
            _refuse_values(what, name, path, values, least=least)
            if values.size != squares.size:
                raise InputError(f"shape of {name}{what} in {path}: got {values.size} values, expected {squares.size}. Make the imatrix again")
    return Columns(squares.reshape(shape), whole_counts, None if sums is None else sums.reshape(shape), None if maxima is None else maxima.reshape(shape))


def load_imatrix(path: Path) -> Statistics:
    """Return the statistics in an imatrix file, GGUF or legacy .dat, told apart by content.

    A GGUF may carry Σx and max |x| too (`.in_sum`, `.in_max`); tensors with other endings are passed over. Raises
    InputError naming file and weight for a missing key, a tensor without its partner, a type other than F32, a value
    that is NaN, infinite or negative, a wrong shape, a weight without any token, or a truncated file.
    """
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"cannot read imatrix {path}: got a folder or a device, expected a file. Check the path")
        return _load_gguf(path) if is_gguf(path) else _load_legacy(path)
    except OSError as error:
        raise InputError(f"cannot read imatrix {path}: {error.strerror}. Check the path and its permissions") from error


def _refuse_key(path: Path, key: str, got: object, expected: str) -> NoReturn:
    raise InputError(f"{key} in {path}: got {got}, expected {expected}. This is no imatrix of llama.cpp; make one with `loopgguf imatrix`")


def _read_count(file: GgufFile, key: str) -> int:
    value = file.metadata.get(key)
    if value is None or value.type is not ValueType.UINT32 or not isinstance(value.data, int):
        _refuse_key(file.path, key, "nothing" if value is None else value.type.name, "a UINT32")
    return value.data


def _read_datasets(file: GgufFile) -> tuple[str, ...]:
    value = file.metadata.get(DATASETS)
    if value is None or value.item_type is not ValueType.STRING or not isinstance(value.data, list):
        _refuse_key(file.path, DATASETS, "nothing" if value is None else value.type.name, "an array of strings")
    return tuple(str(item) for item in value.data)


def _read_values(file: GgufFile, info: TensorInfo) -> FloatArray:
    if info.type is not GgmlType.F32:
        raise InputError(f"type of {info.name} in {file.path}: got {info.type.name}, expected F32. Make the imatrix again")
    with file.path.open("rb") as stream:
        stream.seek(info.offset)
        return np.fromfile(stream, "<f4", info.n_bytes // 4).astype(np.float32, copy=False)


def _load_gguf(path: Path) -> Statistics:
    file = read_gguf(path)
    kind = file.metadata.get("general.type")
    if kind is not None and kind.data != "imatrix":
        _refuse_key(path, "general.type", repr(kind.data), "'imatrix'")
    datasets, n_chunks, chunk_size = _read_datasets(file), _read_count(file, CHUNK_COUNT), _read_count(file, CHUNK_SIZE)
    infos = {info.name: info for info in file.tensors}
    names = sorted({name.removesuffix(suffix) for name in infos for suffix in (SQUARES, COUNTS) if name.endswith(suffix)})
    if not names:
        raise InputError(f"tensors of {path}: got no {SQUARES} among {len(infos)}, expected an imatrix. Make one with `loopgguf imatrix`")
    columns = {}
    for name in names:
        missing = [name + suffix for suffix in (SQUARES, COUNTS) if name + suffix not in infos]
        if missing:
            raise InputError(f"tensors of {name} in {path}: got no {missing[0]}, expected {SQUARES} and {COUNTS} together. Make the imatrix again")
        values = [_read_values(file, infos[name + suffix]) if name + suffix in infos else None for suffix in (SQUARES, COUNTS, SUMS, MAXIMA)]
        assert values[0] is not None and values[1] is not None
        columns[name] = _checked(name, path, values[0], values[1], values[2], values[3])
    return Statistics(columns, datasets, n_chunks, chunk_size)


class _Legacy:
    """Reads a .dat front to back; every length is checked against the bytes that are left."""

    def __init__(self, path: Path, stream: BufferedReader) -> None:
        self.path, self.stream, self.size, self.position = path, stream, path.stat().st_size, 0

    @property
    def left(self) -> int:
        return self.size - self.position

    def refuse(self, field: str, got: object, expected: str) -> NoReturn:
        raise InputError(
            f"malformed imatrix: {field} in {self.path} at byte {self.position}: got {got}, expected {expected}. It is no GGUF and no whole legacy imatrix"
        )

    def take(self, n_bytes: int, field: str) -> bytes:
        data = self.stream.read(n_bytes) if n_bytes <= self.left else b""
        if len(data) != n_bytes:
            self.refuse(field, f"a need of {n_bytes} bytes", f"at most the {self.left} bytes left in the file")
        self.position += n_bytes
        return data

    def number(self, field: str, least: int, most: int) -> int:
        value = int(struct.unpack("<i", self.take(4, field))[0])
        if not least <= value <= most:
            self.refuse(field, value, f"{least} to {most}")
        return value

    def text(self, field: str, least: int, most: int) -> str:
        raw = self.take(self.number(f"length of {field}", least, most), field)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.refuse(field, repr(raw[:40]), "UTF-8")

    def entry(self, i: int) -> tuple[str, Columns]:
        name = self.text(f"name of entry {i}", 1, MAX_WEIGHT_NAME_BYTES)
        n_calls = self.number(f"number of calls of {name}", 1, 2**31 - 1)
        n_values = self.number(f"number of values of {name}", 1, max(1, self.left // 4))
        values = np.frombuffer(self.take(4 * n_values, f"values of {name}"), "<f4").astype(np.float32)
        return name, _checked(name, self.path, values, np.array([n_calls], np.float32))


def _load_legacy(path: Path) -> Statistics:
    """Return the legacy form: values are mean x² · calls, counts are calls (imatrix-loader.cpp)."""
    with path.open("rb") as stream:
        refuse_pointer(path, stream.peek(64))
        return _read_legacy(_Legacy(path, stream))


def _read_legacy(cursor: _Legacy) -> Statistics:
    columns: dict[str, Columns] = {}
    for i in range(cursor.number("number of entries", 1, max(1, cursor.left // 17))):
        name, entry = cursor.entry(i)
        if name in columns:
            cursor.refuse(f"entry {i}", f"{name} twice", "each name once")
        columns[name] = entry
    n_chunks, datasets = 0, ""
    if cursor.left:
        n_chunks = cursor.number("number of chunks", 0, 2**31 - 1)
    if cursor.left:
        datasets = cursor.text("data set", 0, cursor.left)
    if cursor.left:
        cursor.refuse("end of file", f"{cursor.left} bytes more", "none")
    return Statistics(columns, (datasets,) if datasets else (), n_chunks, 0)


def choose_format(path: Path, asked: ImatrixFormat | None = None) -> ImatrixFormat:
    """Return the form to write an imatrix in: as asked, else the legacy one for a name that ends in `.dat`, else GGUF."""
    return asked or ("dat" if path.suffix == ".dat" else "gguf")


def save_imatrix(statistics: Statistics, path: Path, *, overwrite: bool = False, output_format: ImatrixFormat | None = None) -> None:
    """Write the statistics as llama.cpp's GGUF imatrix, or as its legacy .dat: the same statistics, the same bytes.

    The legacy form has no place for Σx, max |x|, counts per expert and more than one data set (their names are joined).
    Raises OutputError when the file exists and may not be overwritten, or cannot be written.
    """
    if choose_format(path, output_format) == "gguf":
        _save_gguf(statistics, path, overwrite=overwrite)
    else:
        _save_legacy(statistics, path, overwrite=overwrite)


def _save_gguf(statistics: Statistics, path: Path, *, overwrite: bool) -> None:
    metadata = {
        "general.type": string("imatrix"),
        DATASETS: array(ValueType.STRING, statistics.datasets),
        CHUNK_COUNT: uint32(statistics.n_chunks),
        CHUNK_SIZE: uint32(statistics.chunk_size),
    }
    tensors: list[tuple[str, GgmlType, NDArray[np.float32]]] = []
    for name, columns in sorted(statistics.columns.items()):
        moments = ((SQUARES, columns.sum_squares), (COUNTS, columns.counts[:, None]), (SUMS, columns.sums), (MAXIMA, columns.max_abs))
        tensors += [(name + suffix, GgmlType.F32, values.astype("<f4", copy=False)) for suffix, values in moments if values is not None]
    write_gguf(path, metadata, tensors, overwrite=overwrite)


def _save_legacy(statistics: Statistics, path: Path, *, overwrite: bool) -> None:
    """Write entries of mean x² · calls, a call being a chunk, counted up (imatrix.cpp, `save_imatrix_legacy`)."""
    entries = [_legacy_entry(name, columns, statistics.chunk_size or 1) for name, columns in sorted(statistics.columns.items())]
    datasets = ", ".join(statistics.datasets).encode()
    data = struct.pack("<i", len(entries)) + b"".join(entries) + struct.pack("<ii", statistics.n_chunks, len(datasets)) + datasets
    write_file(path, data, overwrite=overwrite)


def _legacy_entry(name: str, columns: Columns, chunk_size: int) -> bytes:
    n_calls = -(-int(columns.counts.max()) // chunk_size)
    counts = columns.counts.astype(np.float32)[:, None]
    means = np.where(counts > 0, columns.sum_squares / np.maximum(counts, np.float32(1)), np.float32(1))
    values = (means * np.float32(n_calls)).astype("<f4")
    return struct.pack("<i", len(name.encode())) + name.encode() + struct.pack("<ii", n_calls, values.size) + values.tobytes()


# --- use --------------------------------------------------------------------------------------------------------------


def _in_tokens(part: Statistics, chunk_size: int) -> Mapping[str, Columns]:
    """Return the columns with counts in tokens: a legacy file counts chunks of an unknown size, taken as `chunk_size`."""
    if part.chunk_size or not chunk_size:
        return part.columns
    return {name: Columns(_narrowed(name, c.sum_squares.astype(np.float64) * chunk_size), c.counts * chunk_size) for name, c in part.columns.items()}


def _narrowed(name: str, values: NDArray[np.float64]) -> FloatArray:
    """Return sums as float32. Raises InputError naming the weight where they are beyond it."""
    largest = float(np.abs(values).max(initial=0))
    if largest > _MAX_SUM:
        raise InputError(f"sums of {name}, merged: got {largest:g}, expected at most {_MAX_SUM:g}. One of the imatrices is damaged")
    return values.astype(np.float32)


def _merge_columns(name: str, parts: Sequence[Columns]) -> Columns:
    n_matrices = max(part.counts.size for part in parts)
    if len({part.sum_squares.size for part in parts}) > 1 or any(part.counts.size not in (1, n_matrices) for part in parts):
        shapes = " and ".join(str(part.sum_squares.shape) for part in parts)
        raise InputError(f"columns of {name}: got {shapes}, expected the same in every imatrix. They are of different models")

    def stack(values: Iterable[FloatArray | None]) -> NDArray[np.float64] | None:
        """Return (n_parts, n_matrices, n_in), or None where one part does not know."""
        known = [value.reshape(n_matrices, -1).astype(np.float64) for value in values if value is not None]
        return np.stack(known) if len(known) == len(parts) else None

    squares, sums, maxima = stack(part.sum_squares for part in parts), stack(part.sums for part in parts), stack(part.max_abs for part in parts)
    assert squares is not None
    return Columns(
        _narrowed(name, squares.sum(axis=0)),
        np.stack([np.broadcast_to(part.counts, n_matrices) for part in parts]).sum(axis=0),
        None if sums is None else _narrowed(name, sums.sum(axis=0)),
        None if maxima is None else maxima.max(axis=0).astype(np.float32),
    )


def merge(parts: Sequence[Statistics], chunk_size: int | None = None) -> Statistics:
    """Return the statistics of all parts together: sums and counts added, maxima kept, data sets listed in order.

    chunk_size: that of the result, in tokens, by which the calls of legacy parts count; default that of the first part
    that has one. The number of chunks is the largest count over it, as in imatrix.cpp. Σx and max |x| of a weight are
    kept where all parts with the weight have them. Raises InputError naming the weight when the parts are of different
    models.
    """
    assert parts
    chunk_size = chunk_size or next((part.chunk_size for part in parts if part.chunk_size), 0)
    columns = [_in_tokens(part, chunk_size) for part in parts]
    names = sorted({name for part in columns for name in part})
    merged = {name: _merge_columns(name, [part[name] for part in columns if name in part]) for name in names}
    largest = max((int(c.counts.max()) for c in merged.values()), default=0)
    n_chunks = largest // chunk_size if chunk_size else sum(part.n_chunks for part in parts)
    return Statistics(merged, tuple(d for part in parts for d in part.datasets), n_chunks, chunk_size)


class Weight(Protocol):
    """What is needed of a tensor; `source.Tensor` is one."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class Coverage:
    """How an imatrix fits a model: the statistics of its weights, shaped like them; the weights (two or more dimensions)
    that have none; the names in the imatrix that the model has no weight for."""

    statistics: Statistics
    missing: tuple[str, ...]
    unused: tuple[str, ...]


def check_coverage(statistics: Statistics, tensors: Iterable[Weight]) -> Coverage:
    """Return which of the model's weights the imatrix covers, and the statistics with one row per matrix of each.

    Raises InputError naming the weight when the imatrix is of another model: a wrong number of columns or of experts,
    or not one name in common.
    """
    shapes = {tensor.name: tensor.shape for tensor in tensors if len(tensor.shape) > 1}
    # llama-quantize does not use the imatrix for the embedding, whatever it has there
    covered = {name: c for name, c in statistics.columns.items() if name in shapes and name != NEVER_COLLECTED}
    unused = tuple(sorted(set(statistics.columns) - set(covered)))
    if not covered:
        raise InputError(
            f"imatrix of another model: got statistics of {', '.join(unused[:1]) or 'nothing'}, expected at least one of the model's {len(shapes)} weights. "
            "Make an imatrix of this model"
        )
    columns = {name: _shaped(name, c, shapes[name]) for name, c in covered.items()}
    return Coverage(replace(statistics, columns=columns), tuple(name for name in shapes if name not in covered), unused)


def _shaped(name: str, columns: Columns, shape: tuple[int, ...]) -> Columns:
    n_matrices, n_in = math.prod(shape[:-2]), shape[-1]
    if columns.counts.size not in (1, n_matrices):
        raise InputError(f"imatrix of another model: {name}: got {columns.counts.size} experts, expected {n_matrices}. Make an imatrix of this model")
    if columns.sum_squares.size != n_matrices * n_in:
        got = columns.sum_squares.size / n_matrices
        raise InputError(f"imatrix of another model: {name}: got {got:g} columns, expected {n_in}. Make an imatrix of this model")
    moments = (None if values is None else values.reshape(n_matrices, n_in) for values in (columns.sums, columns.max_abs))
    return Columns(columns.sum_squares.reshape(n_matrices, n_in), np.broadcast_to(columns.counts, n_matrices), *moments)


def describe_gaps(coverage: Coverage) -> list[str]:
    """Return what an imatrix does not know of its model, a line each: the head, weights never multiplied, experts never
    reached, columns that were always zero. What quantizing does about each is said with it."""
    columns = coverage.statistics.columns
    lines = [_head_line(coverage)] if HEAD not in columns else []
    missing = [name for name in coverage.missing if name not in (NEVER_COLLECTED, HEAD)]
    if missing:
        lines.append(f"imatrix: no data for {len(missing)} weights that the text never reached ({_some(missing)}): they are encoded without importance")
    unreached = [f"{(c.counts == 0).sum()} of {c.counts.size} in {name}" for name, c in columns.items() if (c.counts == 0).any()]
    if unreached:
        lines.append(f"imatrix: experts never reached ({_some(unreached)}): all their columns count the same; more text may reach them")
    return [*lines, *_zero_lines(columns)]


def _head_line(coverage: Coverage) -> str:
    if HEAD in coverage.missing:
        return f"imatrix: no data for {HEAD}, which is collected on request only (--process-output): it is encoded without importance"
    return f"imatrix: no data for the head, which is {NEVER_COLLECTED} (tied): it is encoded without importance"


def _zero_lines(columns: Mapping[str, Columns]) -> list[str]:
    reached = {name: c.sum_squares[c.counts > 0] for name, c in columns.items()}
    silent = [name for name, squares in reached.items() if not squares.any()]
    dead = {name: int((squares == 0).sum()) for name, squares in reached.items() if name not in silent and (squares == 0).any()}
    lines = []
    if silent:
        lines.append(f"imatrix: every activation was zero in {len(silent)} weights ({_some(silent)}): all their columns count the same")
    if dead:
        listed = _some([f"{n} in {name}" for name, n in dead.items()])
        lines.append(f"imatrix: {sum(dead.values())} columns were always zero ({listed}): they get the smallest importance that is safe")
    return lines


def _some(items: Sequence[str], n_shown: int = 3) -> str:
    more = f" and {len(items) - n_shown} more" if len(items) > n_shown else ""
    return ", ".join(items[:n_shown]) + more


def sanitize_importance(values: FloatArray) -> tuple[FloatArray, int]:
    """Return importances that are safe to encode with, and how many had to be raised.

    values: (n_matrices, n_in) or (n_in,) float32, finite, ≥ 0. What is below 1e-6 of its matrix's median positive value
    (zero above all: a block without any importance is encoded as zeros, ggml-quants.c) is raised to that; a matrix of
    zeros becomes ones. Where nothing is raised the very array is returned, so that bytes equal llama-quantize's.
    """
    assert np.isfinite(values).all() and (values >= 0).all()
    rows = values.reshape(-1, values.shape[-1])
    floors = np.array([np.median(row[row > 0]) * FLOOR if row.any() else 1.0 for row in rows], np.float32)[:, None]
    floors = np.maximum(floors, np.finfo(np.float32).tiny)
    n_floored = int((rows < floors).sum())
    if n_floored == 0:
        return values, 0
    return np.maximum(rows, floors).reshape(values.shape), n_floored
