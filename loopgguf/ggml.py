"""libggml inside llama-cpp-python through ctypes: encode, decode and validate rows of any ggml type.

One row-major float32 slab in, packed bytes out. Every call releases the GIL, so threads over row slabs scale. Guards
in front of ggml's asserts, which would abort the process. Knows nothing of files or tensors' names.
Sources: ggml/include/ggml.h (`ggml_quantize_chunk`, `ggml_get_type_traits`, `ggml_validate_row_data`).
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopgguf.errors import UsageError
from loopgguf.formats import FLOAT_TYPES, FORMATS, IMATRIX_REQUIRED_BY_GGML, QUANTIZED_TYPES, GgmlType, row_bytes

MAX_WEIGHT = 1e9  # no F16 scale of a block reaches so far: Q6_K and IQ4_XS end at 65504 · 32 · 127

FloatArray = NDArray[np.float32]
ByteArray = NDArray[np.uint8]


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h."""

    _fields_ = [
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
        ("from_float_ref", ctypes.c_void_p),
    ]


_TO_FLOAT = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)


@cache
def library() -> Any:
    """Return the one libggml that libllama uses, with the signatures of the functions used here.

    On Linux and macOS libllama's own handle finds ggml's symbols in its dependencies; opening `libggml-base.so`
    by name would map a second copy.
    """
    import llama_cpp.llama_cpp as binding

    if sys.platform == "win32":
        lib = ctypes.CDLL(str(Path(binding.__file__).parent / "lib" / "ggml-base.dll"))
    else:
        lib = binding._lib
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p]
    lib.ggml_quantize_init.argtypes = [ctypes.c_int]
    lib.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    lib.ggml_get_type_traits.argtypes = [ctypes.c_int]
    lib.ggml_validate_row_data.restype = ctypes.c_bool
    lib.ggml_validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
    lib.ggml_version.restype = ctypes.c_char_p
    return lib


def library_version() -> str:
    """Return ggml's version, for example `0.25.3`."""
    return str(library().ggml_version().decode())


@cache
def _traits(ggml_type: GgmlType) -> Any:
    traits = library().ggml_get_type_traits(ggml_type).contents
    assert (traits.blck_size, traits.type_size) == (FORMATS[ggml_type].block, FORMATS[ggml_type].block_bytes), ggml_type
    return traits


def initialize(ggml_type: GgmlType) -> None:
    """Build the type's tables once (up to 11 s for IQ1), so that no encoding thread waits for another."""
    library().ggml_quantize_init(ggml_type)


def encode_rows(ggml_type: GgmlType, rows: FloatArray, importance: FloatArray | None = None, out: ByteArray | None = None) -> ByteArray:
    """Return the rows packed as `ggml_type`, (n_rows, row bytes) uint8, written into `out` when given.

    rows: (n_rows, n_in) float32, C-contiguous. importance: (n_in,) float32 > 0 or None; used as llama-quantize uses an
    imatrix. Raises UsageError for a type that cannot be encoded without importance.
    """
    n_rows, n_in = rows.shape
    if importance is None and ggml_type in IMATRIX_REQUIRED_BY_GGML:
        raise UsageError(f"{ggml_type.name} cannot be encoded without an imatrix; give one with --imatrix or choose another type")
    assert ggml_type in QUANTIZED_TYPES | FLOAT_TYPES, ggml_type  # ggml aborts on the others
    assert rows.dtype == np.float32 and rows.flags.c_contiguous, (rows.dtype, rows.flags)
    assert importance is None or (importance.dtype == np.float32 and importance.shape == (n_in,) and importance.flags.c_contiguous)
    if out is None:
        out = np.empty((n_rows, row_bytes(ggml_type, n_in)), np.uint8)
    assert out.shape == (n_rows, row_bytes(ggml_type, n_in)) and out.flags.c_contiguous
    # for BF16 too: `ggml_fp32_to_bf16_row` flushes subnormals to zero on some processors, this does not
    library().ggml_quantize_chunk(ggml_type, rows.ctypes.data, out.ctypes.data, 0, n_rows, n_in, None if importance is None else importance.ctypes.data)
    return out


def decode_rows(ggml_type: GgmlType, packed: ByteArray, out: FloatArray | None = None) -> FloatArray:
    """Return packed rows (n_rows, row bytes) uint8 as (n_rows, n_in) float32, written into `out` when given."""
    assert ggml_type in QUANTIZED_TYPES | FLOAT_TYPES, ggml_type  # ggml has no decoder for the others
    fmt = FORMATS[ggml_type]
    n_rows, n_bytes = packed.shape
    if out is None:
        out = np.empty((n_rows, n_bytes // fmt.block_bytes * fmt.block), np.float32)
    assert packed.flags.c_contiguous and out.flags.c_contiguous and out.size * fmt.block_bytes == packed.size * fmt.block
    if ggml_type is GgmlType.F32:
        out.view(np.uint8).reshape(-1)[:] = packed.reshape(-1)
    else:
        _TO_FLOAT(_traits(ggml_type).to_float)(packed.ctypes.data, out.ctypes.data, out.size)
    return out


def rows_are_encodable(rows: FloatArray) -> bool:
    """Tell whether all weights are finite and of a size that quantized types can hold at all.

    A larger one makes an infinite scale in most types, but K-quants encode its block as zeros and the i-quants abort
    the process (from 1e13 on, measured), so it must be found before.
    """
    return not rows.size or max(float(rows.max()), -float(rows.min())) <= MAX_WEIGHT


_EXPONENTS = {GgmlType.F16: np.uint16(0x7C00), GgmlType.BF16: np.uint16(0x7F80)}  # all ones: infinity or NaN


def rows_are_valid(ggml_type: GgmlType, packed: ByteArray) -> bool:
    """Tell whether every float that the bytes hold (weights or block scales) is finite, as llama.cpp checks it.

    Floats are checked here: ggml takes up to ten times longer for them, and prints what it finds.
    """
    assert packed.flags.c_contiguous
    if ggml_type is GgmlType.F32:
        return bool(np.isfinite(packed.view(np.float32)).all())
    if ggml_type in _EXPONENTS:
        ones = _EXPONENTS[ggml_type]
        return not bool(((packed.view(np.uint16) & ones) == ones).any())
    return bool(library().ggml_validate_row_data(ggml_type, packed.ctypes.data, packed.nbytes))
