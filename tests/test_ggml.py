"""libggml through ctypes: decoders against gguf-py's, encoders against themselves in slabs, guards before ggml's aborts."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from loopgguf import ggml
from loopgguf.errors import UsageError
from loopgguf.formats import FLOAT_TYPES, FORMATS, IMATRIX_IGNORED, IMATRIX_REQUIRED_BY_GGML, INTEGER_TYPES, QUANTIZED_TYPES, GgmlType, row_bytes

T = GgmlType
SLOW = {T.IQ1_S, T.IQ1_M, T.IQ2_S, T.IQ2_XS}  # their tables take 2 to 11 s to build
ENCODED = [pytest.param(t, marks=pytest.mark.slow if t in SLOW else ()) for t in sorted(QUANTIZED_TYPES)]


def _rows(n_rows: int = 7, n_in: int = 512, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal((n_rows, n_in)).astype(np.float32)


def _importance(n_in: int = 512, seed: int = 1) -> NDArray[np.float32]:
    return np.random.default_rng(seed).gamma(0.5, size=n_in).astype(np.float32) + np.float32(1e-3)


def _random_blocks(ggml_type: GgmlType, n_rows: int, n_blocks: int) -> NDArray[np.uint8]:
    n_bytes = FORMATS[ggml_type].block_bytes
    return np.frombuffer(np.random.default_rng(int(ggml_type)).bytes(n_rows * n_blocks * n_bytes), np.uint8).reshape(n_rows, -1).copy()


# --- naive decoders of the two types that gguf-py lacks ---------------------------------------------------------------


def _decode_q1_0(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A block of 128: an F16 scale d, then one bit each, lowest first: −d or d."""
    blocks = packed.reshape(-1, 18)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    return np.where(bits, scale, -scale).reshape(len(packed), -1)


def _decode_q2_0(packed: NDArray[np.uint8]) -> NDArray[np.float32]:
    """A block of 64: an F16 scale d, then two bits each, lowest first: −d, 0, d, 2d."""
    blocks = packed.reshape(-1, 18)
    scale = blocks[:, :2].copy().view(np.float16).astype(np.float32)
    codes = (blocks[:, 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    return ((codes.reshape(len(blocks), -1).astype(np.float32) - 1) * scale).reshape(len(packed), -1)


def _oracle(ggml_type: GgmlType) -> Callable[[NDArray[np.uint8]], NDArray[np.float32]]:
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize

    if ggml_type in (T.Q1_0, T.Q2_0):
        return _decode_q1_0 if ggml_type is T.Q1_0 else _decode_q2_0
    return lambda packed: np.asarray(dequantize(packed, GGMLQuantizationType(ggml_type)), np.float32)


@pytest.mark.parametrize("ggml_type", sorted(QUANTIZED_TYPES))
def test_decoders_equal_gguf_py_on_random_bytes(ggml_type: GgmlType) -> None:
    """Catches a wrong type id, row length or decoder: every bit equal, NaN and infinite scales included."""
    packed = _random_blocks(ggml_type, 16, 8)
    decoded = ggml.decode_rows(ggml_type, packed)
    with np.errstate(all="ignore"):
        expected = _oracle(ggml_type)(packed)
    assert decoded.shape == (16, 8 * FORMATS[ggml_type].block) and decoded.dtype == np.float32
    assert ((decoded.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(decoded) & np.isnan(expected))).all()


@pytest.mark.parametrize("ggml_type", ENCODED)
@pytest.mark.parametrize("weighted", [False, True])
def test_encoded_rows_decode_to_something_near(ggml_type: GgmlType, weighted: bool) -> None:
    """Catches an encoder that gets the wrong type or a transposed slab; NMSE of a Gaussian by bits per weight."""
    if ggml_type in IMATRIX_REQUIRED_BY_GGML and not weighted:
        pytest.skip("ggml aborts without an imatrix")
    rows = _rows()
    packed = ggml.encode_rows(ggml_type, rows, _importance() if weighted else None)
    assert packed.shape == (7, row_bytes(ggml_type, 512)) and packed.dtype == np.uint8
    assert ggml.rows_are_valid(ggml_type, packed)
    decoded = ggml.decode_rows(ggml_type, packed)
    assert np.array_equal(decoded, _oracle(ggml_type)(packed))
    relative_error = float(np.square(decoded - rows).sum() / np.square(rows).sum())
    assert relative_error < (0.65 if FORMATS[ggml_type].bpw < 2.3 else 7 * 4.0 ** -FORMATS[ggml_type].bpw)  # seven times a Gaussian's bound


@pytest.mark.parametrize("ggml_type", ENCODED)
@pytest.mark.parametrize("weighted", [False, True])
def test_slabs_encode_as_the_whole(ggml_type: GgmlType, weighted: bool) -> None:
    """Catches an encoder that looks beyond its row: bytes would depend on slab size and thread count."""
    if ggml_type in IMATRIX_REQUIRED_BY_GGML and not weighted:
        pytest.skip("ggml aborts without an imatrix")
    rows, importance = _rows(11), _importance() if weighted else None
    whole = ggml.encode_rows(ggml_type, rows, importance)
    cuts = [0, 1, 4, 11]
    with ThreadPoolExecutor(3) as pool:
        slabs = list(pool.map(lambda i: ggml.encode_rows(ggml_type, rows[cuts[i] : cuts[i + 1]], importance), range(3)))
    assert np.array_equal(np.concatenate(slabs), whole)


@pytest.mark.parametrize("ggml_type", ENCODED)
def test_importance_matters_where_the_table_says(ggml_type: GgmlType) -> None:
    """Catches an importance that never reaches the encoder, and a type wrongly listed as ignoring it."""
    rows = _rows()
    first, second = (ggml.encode_rows(ggml_type, rows, _importance(seed=seed)) for seed in (1, 2))
    assert np.array_equal(first, second) == (ggml_type in IMATRIX_IGNORED)


@pytest.mark.parametrize("ggml_type", [T.Q4_K, T.Q6_K, T.IQ4_XS, T.IQ3_S])
def test_only_the_ratio_of_importances_matters(ggml_type: GgmlType) -> None:
    """Catches a need to normalise: means and sums of squares give the same bytes (a power of two is exact)."""
    rows, importance = _rows(), _importance()
    assert np.array_equal(ggml.encode_rows(ggml_type, rows, importance), ggml.encode_rows(ggml_type, rows, importance * np.float32(1024)))


@pytest.mark.parametrize("ggml_type", sorted(IMATRIX_REQUIRED_BY_GGML))
def test_no_importance_is_refused_before_ggml_aborts(ggml_type: GgmlType) -> None:
    """Catches SIGABRT of the whole process."""
    with pytest.raises(UsageError, match=rf"{ggml_type.name} cannot be encoded without an imatrix"):
        ggml.encode_rows(ggml_type, _rows())


@pytest.mark.parametrize(
    ("ggml_type", "rows", "importance"),
    [
        (T.Q4_K, _rows(n_in=255), None),  # no whole block
        (T.Q4_K, _rows().astype(np.float64), None),
        (T.Q4_K, _rows(4, 1024)[:, ::2], None),  # not contiguous
        (T.Q4_K, _rows(), _importance(511)),
        (T.Q4_K, _rows(), _importance().astype(np.float64)),
        (T.I32, _rows(), None),
        (T.Q8_K, _rows(), None),
        (T.Q8_1, _rows(), None),
    ],
)
def test_our_own_mistakes_stop_at_an_assertion(ggml_type: GgmlType, rows: Any, importance: Any) -> None:
    """Catches an abort or a read beyond the buffer for a caller's mistake."""
    with pytest.raises(AssertionError):
        ggml.encode_rows(ggml_type, rows, importance)


@pytest.mark.parametrize("ggml_type", [T.I32, T.F64, T.Q8_K, T.Q8_1])
def test_types_without_a_decoder_stop_at_an_assertion(ggml_type: GgmlType) -> None:
    """Catches a call through a null pointer."""
    with pytest.raises(AssertionError):
        ggml.decode_rows(ggml_type, np.zeros((1, 2920), np.uint8))


@pytest.mark.parametrize("ggml_type", [T.F32, T.BF16, T.Q4_K])
def test_results_go_where_they_are_asked(ggml_type: GgmlType) -> None:
    """Catches a copy beside the given buffer."""
    rows = _rows()
    packed = np.zeros((7, row_bytes(ggml_type, 512)), np.uint8)
    assert ggml.encode_rows(ggml_type, rows, out=packed) is packed and packed.any()
    decoded = np.zeros_like(rows)
    assert ggml.decode_rows(ggml_type, packed, out=decoded) is decoded
    assert np.array_equal(decoded, ggml.decode_rows(ggml_type, packed))
    with pytest.raises(AssertionError):
        ggml.decode_rows(ggml_type, packed, out=decoded[:6].copy())


@pytest.mark.parametrize("ggml_type", [T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_K])
def test_no_rows(ggml_type: GgmlType) -> None:
    """Catches a crash on an empty slab."""
    packed = ggml.encode_rows(ggml_type, np.empty((0, 512), np.float32))
    assert packed.shape == (0, row_bytes(ggml_type, 512))
    assert ggml.decode_rows(ggml_type, packed).shape == (0, 512)
    assert ggml.rows_are_valid(ggml_type, packed)


# --- floats -----------------------------------------------------------------------------------------------------------

_FLOATS = arrays.arrays(np.uint32, st.tuples(st.integers(1, 3), st.integers(1, 70))).map(lambda bits: bits.view(np.float32))


def _to_bf16(values: NDArray[np.float32]) -> NDArray[np.uint16]:
    """Round to nearest, ties to even, subnormals kept, NaN quiet."""
    bits = values.view(np.uint32).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), (bits >> 16) | 64, rounded).astype(np.uint16)


@settings(max_examples=200, deadline=None)
@given(_FLOATS)
def test_floats_round_to_nearest_even(values: NDArray[np.float32]) -> None:
    """Catches truncation, flushed subnormals (a BF16 instruction does that) and 32-wide loops that forget the rest."""
    with np.errstate(all="ignore"):
        expected = values.astype(np.float16)
    half = ggml.encode_rows(T.F16, values).view(np.float16)
    assert np.array_equal(half, expected, equal_nan=True)
    assert np.array_equal(ggml.decode_rows(T.F16, half.view(np.uint8)), expected.astype(np.float32), equal_nan=True)
    brain = ggml.encode_rows(T.BF16, values).view(np.uint16)
    assert np.array_equal(brain, _to_bf16(values))
    assert np.array_equal(ggml.decode_rows(T.BF16, brain.view(np.uint8)).view(np.uint32), brain.astype(np.uint32) << 16)
    full = ggml.encode_rows(T.F32, values)
    assert full.tobytes() == values.tobytes() == ggml.decode_rows(T.F32, full).tobytes()


@pytest.mark.parametrize("value", [0.0, -0.0, 1e-40, -1e-45, 1.0, 65504.0, 3.38e38])
def test_bf16_edges(value: float) -> None:
    """Catches a lost sign of zero and flushed subnormals in a row long enough for vector instructions."""
    values = np.full((1, 64), value, np.float32)
    assert np.array_equal(ggml.encode_rows(T.BF16, values).view(np.uint16), _to_bf16(values))


# --- validity ---------------------------------------------------------------------------------------------------------

_DTYPES: dict[GgmlType, Any] = {T.F32: np.float32, T.F16: np.float16}


@pytest.mark.parametrize("ggml_type", sorted(FLOAT_TYPES))
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("at", [0, 15, 16, 511, 512 * 7 - 1])
def test_a_single_bad_float_is_found(capfd: pytest.CaptureFixture[str], ggml_type: GgmlType, bad: float, at: int) -> None:
    """Catches a check that skips the tail or one kind of bad value, and ggml's own line on stderr beside our message."""
    rows = _rows()
    packed = ggml.encode_rows(ggml_type, rows)
    assert ggml.rows_are_valid(ggml_type, packed)
    rows.reshape(-1)[at] = bad
    assert not ggml.rows_are_valid(ggml_type, ggml.encode_rows(ggml_type, rows))
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(("ggml_type", "largest"), [(T.F32, np.finfo(np.float32).max), (T.BF16, 3.3895314e38), (T.F16, 65504.0)])
def test_the_largest_float_is_valid(ggml_type: GgmlType, largest: float) -> None:
    """Catches a mask that takes the largest exponent of a number for that of an infinity."""
    assert ggml.rows_are_valid(ggml_type, ggml.encode_rows(ggml_type, np.array([[largest, -largest]], np.float32)))


@pytest.mark.parametrize("value", [65504.0, -65504.0, 65520.0, 1e30])
def test_f16_overflow_is_found(value: float) -> None:
    """Catches an infinity that BF16 → F16 makes out of a large weight; 65519 is the last that rounds to 65504."""
    rows = _rows()
    rows[3, 5] = value
    assert ggml.rows_are_valid(T.F16, ggml.encode_rows(T.F16, rows)) == (abs(value) < 65520)


@pytest.mark.parametrize("ggml_type", [T.Q8_0, T.Q4_0, T.Q4_K, T.Q6_K, T.IQ4_XS])
@pytest.mark.parametrize("outlier", [1e9, -1e9])
def test_an_overflowing_scale_is_found(ggml_type: GgmlType, outlier: float) -> None:
    """Catches an infinite block scale."""
    rows = _rows()
    rows[3, 5] = outlier
    assert not ggml.rows_are_valid(ggml_type, ggml.encode_rows(ggml_type, rows))


@pytest.mark.parametrize("ggml_type", ENCODED)
def test_the_largest_encodable_weights_do_not_abort(ggml_type: GgmlType) -> None:
    """Catches a limit that lets weights through on which ggml aborts the process (the i-quants, from 1e13 on)."""
    rows = _rows()
    rows[:3] *= np.float32(1e9) / np.abs(rows).max()
    rows[4, 5], rows[5, 300] = 1e9, -1e9
    assert ggml.rows_are_encodable(rows)
    ggml.encode_rows(ggml_type, rows, _importance())


@pytest.mark.parametrize("bad", [1e30, -1e30, 1.1e9, np.nan, np.inf, -np.inf])
def test_weights_beyond_any_scale_are_not_encodable(bad: float) -> None:
    """Catches an outlier of 1e30: IQ3_S aborts the process on it, Q6_K encodes zeros that look valid."""
    rows = _rows()
    rows[3, 5] = bad
    assert not ggml.rows_are_encodable(rows)


def test_an_invalid_mxfp4_exponent_is_found() -> None:
    """Catches e = 255, which means NaN."""
    packed = ggml.encode_rows(T.MXFP4, _rows())
    packed[2, 17] = 255
    assert not ggml.rows_are_valid(T.MXFP4, packed)


@pytest.mark.parametrize("ggml_type", ENCODED)
@pytest.mark.parametrize("value", [0.0, -0.0, 0.5, 1e-40, 1e-12])
def test_constant_rows_encode_to_finite_blocks(ggml_type: GgmlType, value: float) -> None:
    """Catches a division by zero in a block of equal, zero or subnormal weights."""
    rows = np.full((2, 512), value, np.float32)
    packed = ggml.encode_rows(ggml_type, rows, np.ones(512, np.float32))
    assert ggml.rows_are_valid(ggml_type, packed)
    decoded = ggml.decode_rows(ggml_type, packed)
    assert np.isfinite(decoded).all()
    if value == 0:
        assert np.abs(decoded).max() < 1e-3


@pytest.mark.parametrize("ggml_type", sorted(INTEGER_TYPES - {T.F64}))
def test_integers_are_always_valid(ggml_type: GgmlType) -> None:
    """Catches refusing a copied integer tensor whose bytes look like NaN."""
    assert ggml.rows_are_valid(ggml_type, np.full((1, 64), 255, np.uint8))


def test_version_is_a_version() -> None:
    """Catches a library whose symbols are not the ones this table was made for."""
    assert ggml.library_version().split(".")[0].isdigit()
    assert ggml.library() is ggml.library()
