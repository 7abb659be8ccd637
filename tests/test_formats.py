"""The type table against libggml's and gguf's own, the fallback chain and sizes against tables written out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopgguf import formats, ggml
from loopgguf.errors import UsageError
from loopgguf.formats import (
    ACTIVATION_TYPES,
    FLOAT_TYPES,
    FORMATS,
    INTEGER_TYPES,
    QUANTIZED_TYPES,
    REMOVED_TYPES,
    GgmlType,
    fallback_type,
    parse_size,
    parse_type,
)

T = GgmlType


@pytest.mark.parametrize("ggml_type", sorted(FORMATS))
def test_table_equals_libggml(ggml_type: GgmlType) -> None:
    """Catches a wrong block size or byte count: every planned size would be off."""
    traits = ggml.library().ggml_get_type_traits(ggml_type).contents
    assert (traits.blck_size, traits.type_size) == (FORMATS[ggml_type].block, FORMATS[ggml_type].block_bytes)
    assert traits.type_name.decode().lower() == ggml_type.name.lower()
    assert traits.is_quantized == (ggml_type in QUANTIZED_TYPES | ACTIVATION_TYPES)


def test_table_knows_every_type_of_libggml() -> None:
    """Catches a type that a newer ggml has and the table lacks; removed ids have a type size of 0."""
    n_types = max(FORMATS) + 1
    assert {n for n in range(n_types) if ggml.library().ggml_get_type_traits(n).contents.type_size} == {int(t) for t in FORMATS}
    assert not ggml.library().ggml_validate_row_data(n_types, None, 0)  # GGML_TYPE_COUNT: an invalid type
    assert set(range(n_types)) == {int(t) for t in FORMATS} | REMOVED_TYPES.keys()


def test_table_equals_gguf_py() -> None:
    """Catches a type whose id differs from the one other tools write; gguf 0.19 gives Q8_1 40 bytes where ggml has 36."""
    from gguf import GGML_QUANT_SIZES

    theirs = {t.name: (int(t), *size) for t, size in GGML_QUANT_SIZES.items()}
    ours = {t.name: (int(t), f.block, f.block_bytes) for t, f in FORMATS.items()}
    assert set(ours) - set(theirs) <= {"Q1_0", "Q2_0"}
    assert {name: ours[name] for name in theirs if name != "Q8_1"} == {name: size for name, size in theirs.items() if name != "Q8_1"}


def test_every_type_is_of_one_kind() -> None:
    """Catches a type that is neither encoded nor copied, or both."""
    kinds = [FLOAT_TYPES, INTEGER_TYPES, ACTIVATION_TYPES, QUANTIZED_TYPES]
    assert sorted(t for kind in kinds for t in kind) == sorted(FORMATS) == sorted(GgmlType)


def test_types_that_need_an_imatrix_equal_libggml() -> None:
    """Catches an encode without importance that makes ggml abort the whole process."""
    required = {t for t in FORMATS if ggml.library().ggml_quantize_requires_imatrix(t) & 1}
    assert required == formats.IMATRIX_REQUIRED_BY_GGML
    # llama-quantize refuses these (llama-quant.cpp, tensor_requires_imatrix)
    assert {T.IQ3_XXS, T.IQ2_XXS, T.IQ2_XS, T.IQ2_S, T.IQ1_M, T.IQ1_S} == formats.IMATRIX_REQUIRED


# (type, what a row of a multiple of 32 but not of the block falls back to), from the switch of llama-quant.cpp
FALLBACKS = {
    T.IQ1_S: T.IQ4_NL,
    T.IQ1_M: T.IQ4_NL,
    T.IQ2_XXS: T.IQ4_NL,
    T.IQ2_XS: T.IQ4_NL,
    T.IQ2_S: T.IQ4_NL,
    T.IQ3_XXS: T.IQ4_NL,
    T.IQ3_S: T.IQ4_NL,
    T.IQ4_XS: T.IQ4_NL,
    T.Q2_0: T.Q4_0,
    T.Q2_K: T.Q4_0,
    T.Q3_K: T.Q4_0,
    T.TQ1_0: T.Q4_0,
    T.TQ2_0: T.Q4_0,
    T.Q4_K: T.Q5_0,
    T.Q5_K: T.Q5_1,
    T.Q6_K: T.Q8_0,
}
OF_32 = [T.Q4_0, T.Q4_1, T.Q5_0, T.Q5_1, T.Q8_0, T.IQ4_NL, T.MXFP4]
WITHOUT_FALLBACK = [T.Q1_0, T.NVFP4]


def test_fallback_table_is_complete() -> None:
    """Catches a new quantized type that nobody decided a fallback for."""
    assert {*FALLBACKS, *OF_32, *WITHOUT_FALLBACK} == QUANTIZED_TYPES


@pytest.mark.parametrize(("wanted", "smaller"), FALLBACKS.items())
def test_fallback_equals_llama_quantize(wanted: GgmlType, smaller: GgmlType) -> None:
    """Catches another type than llama-quantize's for odd rows, and an encode that would abort."""
    assert fallback_type(wanted, 512) is wanted
    assert fallback_type(wanted, 32 * 9) is smaller
    assert fallback_type(wanted, 72) is T.F16  # 1152 / 16, as in vision towers


@pytest.mark.parametrize("wanted", OF_32)
def test_types_of_32_fall_back_to_f16(wanted: GgmlType) -> None:
    """Catches an error where llama-quantize has an answer."""
    assert fallback_type(wanted, 96) is wanted
    assert fallback_type(wanted, 33) is T.F16


@pytest.mark.parametrize("wanted", WITHOUT_FALLBACK)
def test_types_without_fallback_say_so(wanted: GgmlType) -> None:
    """Catches a KeyError; llama-quantize throws, too."""
    assert fallback_type(wanted, 128) is wanted
    with pytest.raises(UsageError, match=rf"{wanted.name}.*rows of 96"):
        fallback_type(wanted, 96)


@pytest.mark.parametrize("kept", sorted(FLOAT_TYPES))
def test_floats_fit_any_row(kept: GgmlType) -> None:
    """Catches a fallback from a type that has no blocks."""
    assert fallback_type(kept, 7) is kept


@given(st.sampled_from(sorted(QUANTIZED_TYPES - set(WITHOUT_FALLBACK))), st.integers(1, 5000))
def test_a_fallback_always_fits(wanted: GgmlType, n_in: int) -> None:
    """Catches a chain that ends in a type whose block does not fit either."""
    assert formats.fits_row(fallback_type(wanted, n_in), n_in)


def test_sizes_by_hand() -> None:
    """Catches padding counted in, or rows and columns exchanged."""
    assert formats.row_bytes(T.Q4_K, 512) == 288
    assert formats.tensor_bytes(T.Q4_K, (3, 5, 256)) == 15 * 144
    assert formats.tensor_bytes(T.F32, (7,)) == 28
    assert formats.tensor_bytes(T.F16, (2**20, 2**20, 2**20)) == 2**61  # no wrapping
    assert [formats.padded(n) for n in (0, 1, 32, 33)] == [0, 32, 32, 64]
    assert formats.padded(33, 64) == 64
    assert FORMATS[T.Q4_K].bpw == 4.5
    with pytest.raises(AssertionError):
        formats.row_bytes(T.Q4_K, 255)


@pytest.mark.parametrize(("name", "expected"), [("q4_k", T.Q4_K), ("Q4_K", T.Q4_K), ("bf16", T.BF16), ("iq2_xxs", T.IQ2_XXS), ("mxfp4", T.MXFP4)])
def test_type_names(name: str, expected: GgmlType) -> None:
    """Catches names that only work in one case."""
    assert parse_type(name) is expected


@pytest.mark.parametrize("name", ["Q4_K_M", "", "q8_1", "Q8_K", "I32", "f64", "Q4_2", "__class__", "12"])
def test_unknown_type_names(name: str) -> None:
    """Catches a preset taken for a type, and types that ggml cannot encode (it would abort)."""
    with pytest.raises(UsageError, match=r"unknown ggml type: got .*expected one of F32, F16, Q4_0"):
        parse_type(name)


@pytest.mark.parametrize(
    ("text", "n_bytes"),
    [
        ("3.2GB", 3_200_000_000),
        ("3.2 GB", 3_200_000_000),
        (" 3.2gb ", 3_200_000_000),
        ("3.2G", 3_200_000_000),
        ("64MiB", 64 * 2**20),
        ("64mib", 64 * 2**20),
        ("1KiB", 1024),
        ("1kB", 1000),
        ("2T", 2 * 10**12),
        ("1TiB", 2**40),
        ("512", 512),
        ("512B", 512),
        ("1e9", 10**9),
        ("0.5G", 500_000_000),
        ("+1K", 1000),
    ],
)
def test_sizes_with_units(text: str, n_bytes: int) -> None:
    """Catches GB read as GiB, or the unit's case mattering."""
    assert parse_size(text) == n_bytes


def test_a_bare_number_has_the_unit_it_is_given() -> None:
    """Catches `--max-buffer-size 64` read as 64 bytes; a written unit wins."""
    assert parse_size("64", bare_unit_bytes=2**20) == 64 * 2**20
    assert parse_size("64KiB", bare_unit_bytes=2**20) == 64 * 2**10
    assert parse_size("64B", bare_unit_bytes=2**20) == 64


@pytest.mark.parametrize(
    "text",
    ["", " ", "GB", "0", "0GB", "-1GB", "nan", "inf", "infGB", "1e999", "1e308T", "3.2XB", "3,2GB", "1GB2", "1 2GB", "GB1", "0x10", "1e", "0.1B", "1GiBB"],
)
def test_no_sizes(text: str) -> None:
    """Catches zero, negative or unlimited sizes that would come out as a strange plan, and a bare ValueError."""
    with pytest.raises(UsageError, match="not a size: got"):
        parse_size(text)
