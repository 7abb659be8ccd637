"""Codes of every type against libggml's decoder, on random bytes."""

from __future__ import annotations

import numpy as np
import pytest

from loopgguf import ggml
from loopgguf.formats import FORMATS, GgmlType
from loopgguf.grids import Codes, find_grid, pack, points_of, read_scales, unpack

TYPES = [t for t in GgmlType if find_grid(t) is not None]


def random_rows(ggml_type: GgmlType, n: int, n_blocks: int, seed: int = 0) -> np.ndarray:
    """Return random bytes whose decoded weights are all finite."""
    generator = np.random.default_rng(seed)
    fmt = FORMATS[ggml_type]
    rows = generator.integers(0, 256, (16 * n, n_blocks * fmt.block_bytes), dtype=np.uint8)
    blocks = rows.reshape(-1, fmt.block_bytes)
    good = np.isfinite(ggml.decode_rows(ggml_type, np.ascontiguousarray(blocks))).all(axis=1)
    return np.ascontiguousarray(blocks[good][: n * n_blocks].reshape(n, -1))


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_codes_and_scales_decode_as_libggml_does(ggml_type: GgmlType) -> None:
    """A bit of a code in the wrong place, or a codebook of another type, would spoil every tensor of that type."""
    grid = find_grid(ggml_type)
    assert grid is not None
    packed = random_rows(ggml_type, 6, 3)
    scales = read_scales(grid, packed)
    part = scales.scale * points_of(grid, unpack(grid, packed))
    decoded = ggml.decode_rows(ggml_type, packed)
    assert (np.abs(part + scales.offset - decoded) <= 1e-6 * (np.abs(part) + np.abs(scales.offset))).all()


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_packing_what_was_unpacked_changes_nothing(ggml_type: GgmlType) -> None:
    """A code that does not survive the way there and back would be another weight than the one that was chosen."""
    grid = find_grid(ggml_type)
    assert grid is not None
    packed = random_rows(ggml_type, 5, 2, seed=1)
    assert (pack(grid, unpack(grid, packed), packed) == packed).all()


@pytest.mark.parametrize("ggml_type", TYPES, ids=lambda t: t.name)
def test_packing_leaves_scales_alone(ggml_type: GgmlType) -> None:
    """Codes that spill into a scale's bits would change a whole block."""
    grid = find_grid(ggml_type)
    assert grid is not None
    packed, other = random_rows(ggml_type, 4, 2, seed=2), random_rows(ggml_type, 4, 2, seed=3)
    mixed = pack(grid, unpack(grid, other), packed)
    before, after = read_scales(grid, packed), read_scales(grid, mixed)
    assert (before.scale == after.scale).all() and (before.offset == after.offset).all()
    got, expected = unpack(grid, mixed), unpack(grid, other)
    assert (got.index == expected.index).all()
    assert (got.is_negative is None and expected.is_negative is None) or (got.is_negative == expected.is_negative).all()


def test_an_odd_number_of_signs_is_refused() -> None:
    """Where the eighth sign is implied, an odd set of signs would silently lose one."""
    grid = find_grid(GgmlType.IQ2_XXS)
    assert grid is not None
    packed = random_rows(GgmlType.IQ2_XXS, 1, 1)
    codes = unpack(grid, packed)
    signs = codes.is_negative.copy()
    signs[0, 0] ^= True
    with pytest.raises(AssertionError):
        pack(grid, Codes(codes.index, signs), packed)
