"""The ggml types as a table, and exact size arithmetic on them.

Knows block sizes, bytes per block, which types are quantized, which cannot be encoded without an imatrix, and what a
row falls back to when no block fits it. Knows no files and does not encode (see `ggml.py`). Sources: ggml.h,
ggml-common.h (block structs), llama-quant.cpp (`tensor_type_fallback`, `tensor_requires_imatrix`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

from loopgguf.errors import UsageError

GGUF_ALIGNMENT = 32  # bytes; llama.cpp pads to this whatever `general.alignment` says


class GgmlType(IntEnum):
    """The type ids of ggml.h; ids that ggml has removed are absent."""

    F32 = 0
    F16 = 1
    Q4_0 = 2
    Q4_1 = 3
    Q5_0 = 6
    Q5_1 = 7
    Q8_0 = 8
    Q8_1 = 9
    Q2_K = 10
    Q3_K = 11
    Q4_K = 12
    Q5_K = 13
    Q6_K = 14
    Q8_K = 15
    IQ2_XXS = 16
    IQ2_XS = 17
    IQ3_XXS = 18
    IQ1_S = 19
    IQ4_NL = 20
    IQ3_S = 21
    IQ2_S = 22
    IQ4_XS = 23
    I8 = 24
    I16 = 25
    I32 = 26
    I64 = 27
    F64 = 28
    IQ1_M = 29
    BF16 = 30
    TQ1_0 = 34
    TQ2_0 = 35
    MXFP4 = 39
    NVFP4 = 40
    Q1_0 = 41
    Q2_0 = 42


# what files of 2023 and 2024 may still hold; llama.cpp reads none of them
REMOVED_TYPES = {4: "Q4_2", 5: "Q4_3", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8"}


@dataclass(frozen=True)
class Format:
    """How one ggml type stores a row: `block` weights in `block_bytes` bytes."""

    block: int
    block_bytes: int

    @property
    def bpw(self) -> float:
        return 8 * self.block_bytes / self.block


FORMATS: dict[GgmlType, Format] = {
    GgmlType.F32: Format(1, 4),
    GgmlType.F16: Format(1, 2),
    GgmlType.BF16: Format(1, 2),
    GgmlType.F64: Format(1, 8),
    GgmlType.I8: Format(1, 1),
    GgmlType.I16: Format(1, 2),
    GgmlType.I32: Format(1, 4),
    GgmlType.I64: Format(1, 8),
    GgmlType.Q4_0: Format(32, 18),
    GgmlType.Q4_1: Format(32, 20),
    GgmlType.Q5_0: Format(32, 22),
    GgmlType.Q5_1: Format(32, 24),
    GgmlType.Q8_0: Format(32, 34),
    GgmlType.Q8_1: Format(32, 36),
    GgmlType.Q2_K: Format(256, 84),
    GgmlType.Q3_K: Format(256, 110),
    GgmlType.Q4_K: Format(256, 144),
    GgmlType.Q5_K: Format(256, 176),
    GgmlType.Q6_K: Format(256, 210),
    GgmlType.Q8_K: Format(256, 292),
    GgmlType.IQ1_S: Format(256, 50),
    GgmlType.IQ1_M: Format(256, 56),
    GgmlType.IQ2_XXS: Format(256, 66),
    GgmlType.IQ2_XS: Format(256, 74),
    GgmlType.IQ2_S: Format(256, 82),
    GgmlType.IQ3_XXS: Format(256, 98),
    GgmlType.IQ3_S: Format(256, 110),
    GgmlType.IQ4_NL: Format(32, 18),
    GgmlType.IQ4_XS: Format(256, 136),
    GgmlType.TQ1_0: Format(256, 54),
    GgmlType.TQ2_0: Format(256, 66),
    GgmlType.MXFP4: Format(32, 17),
    GgmlType.NVFP4: Format(64, 36),
    GgmlType.Q1_0: Format(128, 18),
    GgmlType.Q2_0: Format(64, 18),
}

FLOAT_TYPES = frozenset({GgmlType.F32, GgmlType.F16, GgmlType.BF16})
INTEGER_TYPES = frozenset({GgmlType.F64, GgmlType.I8, GgmlType.I16, GgmlType.I32, GgmlType.I64})  # copied, never encoded
ACTIVATION_TYPES = frozenset({GgmlType.Q8_1, GgmlType.Q8_K})  # llama.cpp makes these at run time; no file holds them
QUANTIZED_TYPES = frozenset(FORMATS) - FLOAT_TYPES - INTEGER_TYPES - ACTIVATION_TYPES

# ggml aborts the process on the first three; llama-quantize refuses the rest (`tensor_requires_imatrix`).
IMATRIX_REQUIRED_BY_GGML = frozenset({GgmlType.IQ2_XXS, GgmlType.IQ2_XS, GgmlType.IQ1_S})
IMATRIX_REQUIRED = IMATRIX_REQUIRED_BY_GGML | {GgmlType.IQ3_XXS, GgmlType.IQ2_S, GgmlType.IQ1_M}
# these encoders do not look at the imatrix at all
IMATRIX_IGNORED = frozenset({GgmlType.Q8_0, GgmlType.MXFP4, GgmlType.NVFP4, GgmlType.TQ1_0, GgmlType.TQ2_0, GgmlType.Q1_0, GgmlType.Q2_0})

_FALLBACK: dict[GgmlType, GgmlType] = {
    **dict.fromkeys(
        (
            GgmlType.IQ1_S,
            GgmlType.IQ1_M,
            GgmlType.IQ2_XXS,
            GgmlType.IQ2_XS,
            GgmlType.IQ2_S,
            GgmlType.IQ3_XXS,
            GgmlType.IQ3_S,
            GgmlType.IQ4_XS,
        ),
        GgmlType.IQ4_NL,
    ),
    **dict.fromkeys((GgmlType.Q2_0, GgmlType.Q2_K, GgmlType.Q3_K, GgmlType.TQ1_0, GgmlType.TQ2_0), GgmlType.Q4_0),
    GgmlType.Q4_K: GgmlType.Q5_0,
    GgmlType.Q5_K: GgmlType.Q5_1,
    GgmlType.Q6_K: GgmlType.Q8_0,
}


def parse_type(name: str) -> GgmlType:
    """Return the ggml type called `name` in any case; raise UsageError listing the types if there is none."""
    try:
        ggml_type = GgmlType[name.upper()]
    except KeyError:
        ggml_type = None
    if ggml_type is None or ggml_type in ACTIVATION_TYPES | INTEGER_TYPES:
        known = ", ".join(t.name for t in sorted(QUANTIZED_TYPES | FLOAT_TYPES))
        raise UsageError(f"unknown ggml type: got {name!r}, expected one of {known}")
    return ggml_type


def fits_row(ggml_type: GgmlType, n_in: int) -> bool:
    """Tell whether rows of `n_in` weights are whole blocks of the type."""
    return n_in % FORMATS[ggml_type].block == 0


def fallback_type(ggml_type: GgmlType, n_in: int) -> GgmlType:
    """Return the type that llama-quantize uses instead when `n_in` is no multiple of the block (llama-quant.cpp,
    `tensor_type_fallback`): the same type when it fits, a 32-wide type of similar size, else F16.

    Raises UsageError for types that upstream has no fallback for (Q1_0, NVFP4).
    """
    if fits_row(ggml_type, n_in):
        return ggml_type
    block = FORMATS[ggml_type].block
    smaller = _FALLBACK.get(ggml_type)
    if smaller is None and block > 32:
        raise UsageError(f"type {ggml_type.name} has blocks of {block} weights and no fallback: got rows of {n_in}; choose another type")
    if smaller is None or not fits_row(smaller, n_in):
        return GgmlType.F16
    return smaller


def row_bytes(ggml_type: GgmlType, n_in: int) -> int:
    """Return the bytes of one row of `n_in` weights, which must be whole blocks."""
    fmt = FORMATS[ggml_type]
    assert n_in % fmt.block == 0, (ggml_type, n_in)
    return n_in // fmt.block * fmt.block_bytes


def tensor_bytes(ggml_type: GgmlType, shape: Sequence[int]) -> int:
    """Return the exact bytes of a tensor of row-major `shape` (last dimension is the row), without padding."""
    return math.prod(shape[:-1]) * row_bytes(ggml_type, shape[-1])


def padded(n_bytes: int, alignment: int = GGUF_ALIGNMENT) -> int:
    """Round `n_bytes` up to the alignment."""
    return -(-n_bytes // alignment) * alignment


_UNITS = {"B": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {f"{u}B": n for u, n in _UNITS.items() if u != "B"}
_UNITS |= {f"{u}iB": 1024 ** (i + 1) for i, u in enumerate("KMGT")}


def parse_size(text: str, bare_unit_bytes: int = 1) -> int:
    """Return the bytes of a size such as `3.2GB` (10⁹), `64MiB` (2²⁰) or a bare number times `bare_unit_bytes`.

    Raises UsageError when it is no positive number with a known unit.
    """
    stripped = text.strip()
    number = stripped.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = stripped[len(number) :].strip()
    multiplier = {name.lower(): n for name, n in _UNITS.items()}.get(unit.lower(), math.nan) if unit else bare_unit_bytes
    try:
        n_bytes = float(number) * multiplier
    except ValueError:
        n_bytes = math.nan
    if not math.isfinite(n_bytes) or round(n_bytes) < 1:
        raise UsageError(f"not a size: got {text!r}, expected a positive number with a unit such as 3.2GB or 64MiB")
    return round(n_bytes)
