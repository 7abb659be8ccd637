"""The code grids of ggml's types: which bits of a block are codes, and what a code stands for.

libggml offers "quantize these rows"; error feedback needs the grid apart from the rounding. A decoded weight is
sign · scale · point + offset. Scale and offset belong to the block and stay as libggml's encoder chose them; the point
is chosen by an index into a table that all blocks of a type share: one index a column for scalar types, one for 4 or 8
columns for codebook types, most of which have signs beside it. `unpack` takes the codes out of packed rows, `pack` puts
others in their place and leaves every other bit alone, and `read_scales` lets libggml's own decoder say what a block's
scales come to, so no scale is ever parsed here. TQ1_0 packs its codes in base 3 and has no grid here.
Layouts: ggml/src/ggml-common.h and the decoders of ggml-quants.c; the codebooks are those of the gguf package, read at
run time. Chooses nothing: which code is best is for `compensate.py` to say.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopgguf import ggml
from loopgguf.formats import FORMATS, GgmlType

FloatArray = NDArray[np.float32]
Places = NDArray[np.intp]


@dataclass(frozen=True)
class Grid:
    """The grid of a type.

    points: (n_points, unit) float32, what an index stands for where scale is 1 and offset 0. index_places: (units a
    block, bits) where in a block an index's bits are, least significant first. sign_places: the same of the sign bits, in
    fields of 7 or 8 for 8 columns; with 7, the eighth sign is such that an even number is negative.
    """

    type: GgmlType
    points: FloatArray
    index_places: Places
    sign_places: Places | None = None

    @property
    def unit(self) -> int:
        """Columns that share an index."""
        return int(self.points.shape[1])

    @property
    def has_parity(self) -> bool:
        return self.sign_places is not None and self.sign_places.shape[1] == 7


@dataclass(frozen=True)
class Codes:
    """The codes of packed rows: `index` (n, n_in / unit) uint16, and `is_negative` (n, n_in) bool where the type has signs."""

    index: NDArray[np.uint16]
    is_negative: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Scales:
    """What a point is multiplied with and what is added to it, (n, n_in) float32 each."""

    scale: FloatArray
    offset: FloatArray


# --- layouts ----------------------------------------------------------------------------------------------------------

_E32, _E256, _U8, _U4 = np.arange(32), np.arange(256), np.arange(32), np.arange(64)  # columns of a block; its units of 8 and of 4


def _field(byte: NDArray[Any], shift: NDArray[Any] | int, n_bits: int) -> Places:
    """Return the places of `n_bits` bits from bit `shift` of byte `byte` on, one row for each."""
    first = 8 * byte + shift
    return (first[:, None] + np.arange(n_bits)).astype(np.intp)


def _nibbles32(at: int) -> Places:
    return _field(at + _E32 % 16, 4 * (_E32 // 16), 4)


def _nibbles256(at: int) -> Places:
    return _field(at + 32 * (_E256 // 64) + _E256 % 32, 4 * (_E256 % 64 // 32), 4)


def _pairs256(at: int) -> Places:
    return _field(at + 32 * (_E256 // 128) + _E256 % 32, 2 * (_E256 % 128 // 32), 2)


def _high_bits256(at: int) -> Places:
    return _field(at + _E256 % 32, _E256 // 32, 1)


def _sevens(at: int, stride: int) -> Places:
    """Return the sign fields of IQ2_XXS and IQ3_XXS: four of 7 bits in each 32-bit word, whose top 4 bits are a scale."""
    return _field(at + stride * (_U8 // 4), 7 * (_U8 % 4), 7)


def _levels(first: int, n: int) -> FloatArray:
    return np.arange(first, first + n, dtype=np.float32)[:, None]


def _scalar_layouts() -> dict[GgmlType, tuple[FloatArray, Places]]:
    """Return points and index places of the types with a code per column."""
    import gguf.quants

    kvalues = np.array(gguf.quants.IQ4_NL.kvalues, np.float32)[:, None]
    two_complement = np.arange(256, dtype=np.uint8).view(np.int8).astype(np.float32)[:, None]
    ql = _field(64 * (_E256 // 128) + 32 * (_E256 // 32 % 2) + _E256 % 32, 4 * (_E256 % 128 // 64), 4)
    qh = _field(128 + 32 * (_E256 // 128) + _E256 % 32, 2 * (_E256 % 128 // 32), 2)
    iq4_xs = _field(8 + 16 * (_E256 // 32) + _E256 % 16, 4 * (_E256 % 32 // 16), 4)
    return {
        GgmlType.Q4_0: (_levels(-8, 16), _nibbles32(2)),
        GgmlType.Q4_1: (_levels(0, 16), _nibbles32(4)),
        GgmlType.Q5_0: (_levels(-16, 32), np.hstack([_nibbles32(6), _field(2 + _E32 // 8, _E32 % 8, 1)])),
        GgmlType.Q5_1: (_levels(0, 32), np.hstack([_nibbles32(8), _field(4 + _E32 // 8, _E32 % 8, 1)])),
        GgmlType.Q8_0: (two_complement, _field(2 + _E32, 0, 8)),
        GgmlType.IQ4_NL: (kvalues, _nibbles32(2)),
        GgmlType.Q2_K: (_levels(0, 4), _pairs256(16)),
        GgmlType.Q3_K: (_levels(-4, 8), np.hstack([_pairs256(32), _high_bits256(0)])),
        GgmlType.Q4_K: (_levels(0, 16), _nibbles256(16)),
        GgmlType.Q5_K: (_levels(0, 32), np.hstack([_nibbles256(48), _high_bits256(16)])),
        GgmlType.Q6_K: (_levels(-32, 64), np.hstack([ql, qh])),
        GgmlType.IQ4_XS: (kvalues, iq4_xs),
        GgmlType.TQ2_0: (_levels(-1, 4), _pairs256(0)),
    }


def _codebook_layouts() -> dict[GgmlType, tuple[FloatArray, Places, Places | None]]:
    """Return points, index places and sign places of the types with a code for several columns."""
    explicit8 = _field(34 + _U8, 0, 8)
    iq1_s = np.hstack([_field(2 + _U8, 0, 8), _field(34 + 2 * (_U8 // 4), 3 * (_U8 % 4), 3)])  # places count through both bytes of a word
    # the top bit of an IQ1_M index is the sign of its delta, which belongs to the block in IQ1_S
    iq1_m = np.hstack([_field(_U8, 0, 8), _field(32 + _U8 // 2, 4 * (_U8 % 2), 4)])
    iq1_grid = _codebook("IQ1_S")
    return {
        GgmlType.IQ2_XXS: (_codebook("IQ2_XXS"), _field(2 + 8 * (_U8 // 4) + _U8 % 4, 0, 8), _sevens(6, stride=8)),
        GgmlType.IQ2_XS: (_codebook("IQ2_XS"), _field(2 + 2 * _U8, 0, 9), _field(3 + 2 * _U8, 1, 7)),
        GgmlType.IQ2_S: (_codebook("IQ2_S"), np.hstack([_field(2 + _U8, 0, 8), _field(66 + _U8 // 4, 2 * (_U8 % 4), 2)]), explicit8),
        GgmlType.IQ3_XXS: (_codebook("IQ3_XXS"), _field(2 + _U4, 0, 8), _sevens(66, stride=4)),
        GgmlType.IQ3_S: (_codebook("IQ3_S"), np.hstack([_field(2 + _U4, 0, 8), _field(66 + _U4 // 8, _U4 % 8, 1)]), _field(74 + _U8, 0, 8)),
        GgmlType.IQ1_S: (iq1_grid, iq1_s, None),
        GgmlType.IQ1_M: (np.vstack([iq1_grid + np.float32(0.125), iq1_grid - np.float32(0.125)]), iq1_m, None),
    }


def _codebook(name: str) -> FloatArray:
    import gguf.quants

    quant = getattr(gguf.quants, name)
    quant.init_grid()
    return np.ascontiguousarray(quant.grid.reshape(quant.grid_shape), np.float32)


@cache
def _grids() -> dict[GgmlType, Grid]:
    scalar = {ggml_type: Grid(ggml_type, *layout) for ggml_type, layout in _scalar_layouts().items()}
    return scalar | {ggml_type: Grid(ggml_type, *layout) for ggml_type, layout in _codebook_layouts().items()}


def find_grid(ggml_type: GgmlType) -> Grid | None:
    """Return the grid of a type; None for one that has none here (floats, TQ1_0, MXFP4)."""
    return _grids().get(ggml_type)


# --- codes in and out -------------------------------------------------------------------------------------------------


def _bits(grid: Grid, packed: ggml.ByteArray) -> NDArray[np.uint8]:
    """Return the bits of packed rows, (n · blocks, bits of a block)."""
    return np.unpackbits(packed.reshape(-1, FORMATS[grid.type].block_bytes), axis=1, bitorder="little")


def _read_fields(bits: NDArray[np.uint8], places: Places) -> NDArray[np.uint16]:
    fields = np.zeros((len(bits), len(places)), np.uint16)
    for bit, place in enumerate(places.T):
        fields |= bits[:, place].astype(np.uint16) << bit
    return fields


def unpack(grid: Grid, packed: ggml.ByteArray) -> Codes:
    """Return the codes in packed rows (n, row bytes) uint8."""
    bits, n = _bits(grid, packed), len(packed)
    index = _read_fields(bits, grid.index_places).reshape(n, -1)
    if grid.sign_places is None:
        return Codes(index)
    signs = bits[:, grid.sign_places].astype(np.bool_)  # (blocks, fields, 7 or 8)
    if grid.has_parity:
        signs = np.concatenate([signs, np.logical_xor.reduce(signs, axis=2, keepdims=True)], axis=2)
    return Codes(index, signs.reshape(n, -1))


def pack(grid: Grid, codes: Codes, packed: ggml.ByteArray) -> ggml.ByteArray:
    """Return packed rows (n, row bytes) with these codes instead of their own: scales and all else as they were.

    Where the type has parity, the negatives among 8 columns must be even in number.
    """
    bits = _bits(grid, packed)
    n_blocks = len(bits)
    index = codes.index.reshape(n_blocks, -1)
    for bit, place in enumerate(grid.index_places.T):
        bits[:, place] = (index >> bit) & 1
    if grid.sign_places is not None:
        assert codes.is_negative is not None
        signs = codes.is_negative.reshape(n_blocks, -1, 8)
        assert not grid.has_parity or not np.logical_xor.reduce(signs, axis=2).any()
        bits[:, grid.sign_places] = signs[:, :, : grid.sign_places.shape[1]]
    return np.packbits(bits, axis=1, bitorder="little").reshape(packed.shape)


def read_scales(grid: Grid, packed: ggml.ByteArray) -> Scales:
    """Return the scales and offsets of packed rows, by decoding them with every code that of 0, and that of the largest
    number that some point has in all its columns. A codebook without a point of zeros has no offsets."""
    constant = np.flatnonzero((grid.points == grid.points[:, :1]).all(axis=1))
    levels = grid.points[constant, 0]
    largest, zeros = int(constant[np.argmax(np.abs(levels))]), constant[levels == 0]
    offset = _decode_with(grid, packed, int(zeros[0])) if len(zeros) else np.float32(0)
    scale = (_decode_with(grid, packed, largest) - offset) / grid.points[largest, 0]
    return Scales(scale, np.broadcast_to(offset, scale.shape))


def _decode_with(grid: Grid, packed: ggml.ByteArray, index: int) -> FloatArray:
    """Return what packed rows decode to with every index this one, and no negative sign."""
    fmt = FORMATS[grid.type]
    places = grid.index_places if grid.sign_places is None else np.concatenate([grid.index_places.reshape(-1), grid.sign_places.reshape(-1)])
    is_code, codes = np.zeros((2, 8 * fmt.block_bytes), np.uint8)
    is_code[places] = 1
    codes[grid.index_places] = (index >> np.arange(grid.index_places.shape[1])) & 1
    others, same = np.packbits(1 - is_code, bitorder="little"), np.packbits(codes, bitorder="little")
    blocks = packed.reshape(-1, fmt.block_bytes) & others | same
    return ggml.decode_rows(grid.type, blocks.reshape(packed.shape))


def points_of(grid: Grid, codes: Codes) -> FloatArray:
    """Return what the codes stand for where scale is 1 and offset 0, (n, n_in) float32."""
    points = grid.points[codes.index].reshape(len(codes.index), -1)
    return points if codes.is_negative is None else np.where(codes.is_negative, -points, points)
