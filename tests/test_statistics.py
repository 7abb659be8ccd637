"""statistics.py: imatrix files are read as llama-quantize reads them, or refused by name."""

from __future__ import annotations

import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from loopgguf.container import ValueType, array, read_gguf, string, uint32, write_gguf
from loopgguf.errors import InputError, OutputError
from loopgguf.formats import GgmlType
from loopgguf.statistics import Columns, ColumnSums, Statistics, check_coverage, describe_gaps, load_imatrix, merge, sanitize_importance, save_imatrix

Q, GATE = "blk.0.attn_q.weight", "blk.0.ffn_gate_exps.weight"
KEYS = {"general.type": string("imatrix"), "imatrix.datasets": array(ValueType.STRING, ["a.txt"])}
KEYS |= {"imatrix.chunk_count": uint32(3), "imatrix.chunk_size": uint32(512)}


def f32(*values: float) -> np.ndarray:
    return np.array(values, np.float32)


def columns(rows: list[list[float]], counts: list[float]) -> Columns:
    return Columns(np.array(rows, np.float32), np.array(counts, np.int64))


@pytest.fixture
def statistics() -> Statistics:
    return Statistics({Q: columns([[2, 4, 6]], [4]), GATE: columns([[1, 2], [0, 0], [9, 3]], [1, 0, 3])}, ("a.txt", "b.txt"), 7, 512)


def legacy(entries: list[tuple[bytes, int, list[float]]], tail: bytes = b"") -> bytes:
    out = struct.pack("<i", len(entries))
    for name, n_calls, values in entries:
        out += struct.pack("<i", len(name)) + name + struct.pack("<ii", n_calls, len(values)) + f32(*values).tobytes()
    return out + tail


# --- collecting ---------------------------------------------------------------------------------------------------------


def test_column_sums_by_hand():
    """Catches sums over rows instead of columns, and means instead of sums."""
    sums = ColumnSums()
    sums.add(Q, None, np.array([[1, 2], [3, 4]], np.float32))
    sums.add(Q, None, np.array([[0, 1]], np.float32))
    assert sums.columns()[Q].sum_squares.tolist() == [[10, 21]]
    assert sums.columns()[Q].counts.tolist() == [3]


def test_experts_are_kept_apart_and_unreached_ones_counted_zero():
    """Catches a missing row for an expert that no token reached, which shifts all experts behind it."""
    sums = ColumnSums()
    for expert, X in enumerate(([[1, 1]], [], [[2, 0], [1, 3]])):
        sums.add(GATE, expert, np.array(X, np.float32).reshape(-1, 2))
    result = sums.columns()[GATE]
    assert result.sum_squares.tolist() == [[1, 1], [0, 0], [5, 9]]
    assert result.counts.tolist() == [1, 0, 2]


@given(npst.arrays(np.float32, (40, 5), elements=st.floats(-100, 100, width=32)), st.integers(1, 39))
def test_grouping_of_tokens_does_not_matter(X: np.ndarray, cut: int):
    """Catches accumulation error that grows with the number of slabs (float32 running sums lose small terms)."""
    once, twice = ColumnSums(), ColumnSums()
    once.add(Q, None, X)
    for part in (X[:cut], X[cut:]):
        twice.add(Q, None, part)
    exact = (X.astype(np.float64) ** 2).sum(axis=0)
    for sums in (once, twice):
        np.testing.assert_allclose(sums.columns()[Q].sum_squares[0], exact, rtol=1e-5, atol=1e-30)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_activation_that_is_not_finite_names_weight_and_column(bad: float):
    """Catches an imatrix that is poisoned in the middle of a long run and only found when quantizing."""
    with pytest.raises(InputError, match=rf"activations of {Q}: .* in column 1"):
        ColumnSums().add(Q, None, np.array([[1, bad]], np.float32))


# --- normalising --------------------------------------------------------------------------------------------------------


def test_importance_is_llama_quantizes_float32_division(statistics: Statistics):
    """Catches float64 division, which differs in the last bit and then in the file's bytes; unseen experts are ones."""
    odd = Statistics({Q: columns([[0.1, 1 / 3]], [55808])}, (), 1, 512)
    assert (odd.importance(Q) == np.array([[0.1, 1 / 3]], np.float32) / np.float32(55808)).all()
    assert statistics.importance(GATE).tolist() == [[1, 2], [1, 1], [3, 1]]
    assert statistics.importance(GATE).dtype == np.float32
    assert statistics.importance("output.weight") is None


# --- GGUF ---------------------------------------------------------------------------------------------------------------


def test_round_trip_is_exact_and_deterministic(statistics: Statistics, tmp_path: Path):
    """Catches lost bits, an order that depends on insertion, and expert counts that are not kept."""
    one, two = tmp_path / "one.imatrix.gguf", tmp_path / "two.imatrix.gguf"
    save_imatrix(statistics, one)
    save_imatrix(Statistics(dict(reversed(statistics.columns.items())), statistics.datasets, 7, 512), two)
    assert one.read_bytes() == two.read_bytes()
    loaded = load_imatrix(one)
    assert (loaded.datasets, loaded.n_chunks, loaded.chunk_size) == (("a.txt", "b.txt"), 7, 512)
    for name, expected in statistics.columns.items():
        assert (loaded.columns[name].sum_squares == expected.sum_squares).all()
        assert (loaded.columns[name].counts == expected.counts).all()


def test_file_is_laid_out_as_llama_imatrix_writes_it(statistics: Statistics, tmp_path: Path):
    """Catches swapped dimensions: ggml's in_sum2 is [n_in, n_mat] and counts [1, n_mat]."""
    path = tmp_path / "x.imatrix.gguf"
    save_imatrix(statistics, path)
    file = read_gguf(path)
    assert [(t.name, t.type, t.shape) for t in file.tensors] == [
        (f"{Q}.in_sum2", GgmlType.F32, (1, 3)),
        (f"{Q}.counts", GgmlType.F32, (1, 1)),
        (f"{GATE}.in_sum2", GgmlType.F32, (3, 2)),
        (f"{GATE}.counts", GgmlType.F32, (3, 1)),
    ]
    assert list(file.metadata) == ["general.type", "imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"]


def test_moments_come_back(tmp_path: Path):
    """Catches Σx and max |x| that are lost, swapped, or written for a weight that has none."""
    path = tmp_path / "x.imatrix.gguf"
    full = Columns(f32(2, 4)[None], np.array([4]), f32(-1, 2)[None], f32(1, 1.5)[None])
    save_imatrix(Statistics({Q: full, GATE: columns([[1, 2]], [1])}, ("a",), 1, 512), path)
    assert [t.name for t in read_gguf(path).tensors] == [f"{Q}{s}" for s in (".in_sum2", ".counts", ".in_sum", ".in_max")] + [
        f"{GATE}.in_sum2",
        f"{GATE}.counts",
    ]
    loaded = load_imatrix(path).columns
    assert loaded[Q].sums is not None and loaded[Q].max_abs is not None
    assert (loaded[Q].sums.tolist(), loaded[Q].max_abs.tolist()) == ([[-1, 2]], [[1, 1.5]])
    assert loaded[GATE].sums is None and loaded[GATE].max_abs is None


@pytest.mark.parametrize(
    ("suffix", "values", "said"),
    [
        (".in_max", f32(1, -1), f".in_max of {Q} .*got -1.0"),
        (".in_sum", f32(1, np.nan), f".in_sum of {Q} .*got nan"),
        (".in_sum", f32(1, 2, 3), f"shape of {Q}.in_sum .*got 3 values, expected 2"),
    ],
)
def test_bad_moments_are_refused(tmp_path: Path, suffix: str, values: np.ndarray, said: str):
    """Catches a damaged file of which only half is checked."""
    path = tmp_path / "x.gguf"
    tensors = [(f"{Q}.in_sum2", GgmlType.F32, f32(1, 2)[None]), (f"{Q}.counts", GgmlType.F32, f32(2)[None]), (Q + suffix, GgmlType.F32, values[None])]
    write_gguf(path, KEYS, tensors)
    with pytest.raises(InputError, match=said):
        load_imatrix(path)


def test_gguf_py_reads_it(statistics: Statistics, tmp_path: Path):
    """Catches a file that only we can read."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "x.imatrix.gguf"
    save_imatrix(statistics, path)
    tensors = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert tensors[f"{GATE}.in_sum2"].data.reshape(3, 2).tolist() == [[1, 2], [0, 0], [9, 3]]


def test_existing_file_is_kept(statistics: Statistics, tmp_path: Path):
    """Catches an imatrix of hours overwritten without being asked."""
    path = tmp_path / "x.imatrix.gguf"
    save_imatrix(statistics, path)
    with pytest.raises(OutputError, match="already exists"):
        save_imatrix(statistics, path)
    save_imatrix(statistics, path, overwrite=True)


def test_unknown_tensors_beside_the_sums_are_ignored(tmp_path: Path):
    """Catches a reader that refuses what upstream ignores."""
    path = tmp_path / "x.gguf"
    tensors = [(f"{Q}.in_sum2", GgmlType.F32, f32(1, 2)[None]), (f"{Q}.counts", GgmlType.F32, f32(2)[None]), (f"{Q}.in_cov", GgmlType.F32, f32(-1, 2)[None])]
    write_gguf(path, KEYS, tensors)
    assert list(load_imatrix(path).columns) == [Q]


@pytest.mark.parametrize("key", ["imatrix.datasets", "imatrix.chunk_count", "imatrix.chunk_size"])
@pytest.mark.parametrize("value", [None, string("7")])
def test_missing_or_mistyped_key_is_refused_by_name(tmp_path: Path, key: str, value: object):
    """Catches a model (or a broken converter's file) taken for an imatrix; llama-quantize refuses it as well."""
    path = tmp_path / "x.gguf"
    keys = {k: v for k, v in KEYS.items() if k != key} | ({key: value} if value else {})
    write_gguf(path, keys, [(f"{Q}.in_sum2", GgmlType.F32, f32(1)[None]), (f"{Q}.counts", GgmlType.F32, f32(1)[None])])
    with pytest.raises(InputError, match=f"{key} in .*x.gguf"):
        load_imatrix(path)


def test_a_model_is_no_imatrix(tmp_path: Path):
    """Catches MODEL and IMATRIX swapped on the command line."""
    path = tmp_path / "x.gguf"
    write_gguf(path, {"general.architecture": string("llama"), "general.type": string("model")}, [(Q, GgmlType.F32, f32(1)[None])])
    with pytest.raises(InputError, match=r"general.type in .*got 'model'"):
        load_imatrix(path)


@pytest.mark.parametrize(
    ("sums", "counts", "said"),
    [
        ([1, np.nan], [4], "sums of squares of blk.0.attn_q.weight in .*got nan at index 1"),
        ([np.inf, 1], [4], "got inf at index 0"),
        ([1, -1], [4], r"got -1.0 at index 1"),
        ([1, 1], [np.nan], "counts of blk.0.attn_q.weight in .*got nan"),
        ([1, 1], [-4], "counts of blk.0.attn_q.weight in .*got -4"),
        ([1, 1], [0], "counts of blk.0.attn_q.weight in .*got 0 tokens"),
        ([1, 1, 1], [1, 1], "shape of blk.0.attn_q.weight in .*got 3 sums for 2 counts"),
    ],
)
def test_bad_values_name_the_weight(tmp_path: Path, sums: list[float], counts: list[float], said: str):
    """Catches the imatrix that ends in "found nan value at block N" or in zeroed blocks hours later."""
    path = tmp_path / "x.gguf"
    write_gguf(path, KEYS, [(f"{Q}.in_sum2", GgmlType.F32, f32(*sums)[None]), (f"{Q}.counts", GgmlType.F32, f32(*counts)[:, None])])
    with pytest.raises(InputError, match=said):
        load_imatrix(path)


def test_wrong_type_and_missing_partner_name_the_weight(tmp_path: Path):
    """Catches F16 sums read as garbage, and sums without counts read as sums of one token."""
    half, alone, empty = (tmp_path / name for name in ("half.gguf", "alone.gguf", "empty.gguf"))
    write_gguf(half, KEYS, [(f"{Q}.in_sum2", GgmlType.F16, np.ones((1, 2), np.float16)), (f"{Q}.counts", GgmlType.F32, f32(1)[None])])
    write_gguf(alone, KEYS, [(f"{Q}.in_sum2", GgmlType.F32, f32(1)[None])])
    write_gguf(empty, KEYS, [])
    for path, said in ((half, f"type of {Q}.in_sum2 .*got F16"), (alone, f"got no {Q}.counts"), (empty, "got no .in_sum2")):
        with pytest.raises(InputError, match=said):
            load_imatrix(path)


def test_no_truncation_of_a_gguf_is_read_as_legacy(statistics: Statistics, tmp_path: Path):
    """Catches upstream's fallback: a damaged GGUF parsed as a .dat, with lengths made of its header's bytes."""
    path = tmp_path / "x.gguf"
    save_imatrix(statistics, path)
    whole = path.read_bytes()
    last = read_gguf(path).tensors[-1]
    for n_bytes in range(0, last.offset + last.n_bytes, 3):  # behind it there is only padding
        path.write_bytes(whole[:n_bytes])
        with pytest.raises(InputError, match="GGUF" if n_bytes >= 4 else "malformed imatrix"):
            load_imatrix(path)


# --- legacy .dat --------------------------------------------------------------------------------------------------------


def test_legacy_file_by_hand(tmp_path: Path):
    """Catches values not divided by the number of calls (quantize.cpp)."""
    path = tmp_path / "imatrix.dat"
    path.write_bytes(legacy([(Q.encode(), 3, [0.3, 6])], struct.pack("<ii", 12, 5) + b"a.txt"))
    loaded = load_imatrix(path)
    assert (loaded.importance(Q) == f32(0.3, 6)[None] / np.float32(3)).all()
    assert (loaded.datasets, loaded.n_chunks, loaded.chunk_size) == (("a.txt",), 12, 0)
    path.write_bytes(legacy([(Q.encode(), 3, [0.3, 6])]))
    assert load_imatrix(path).datasets == ()


def test_legacy_file_is_written_as_llama_imatrix_does(tmp_path: Path):
    """Catches calls that are rounded down to zero, unseen experts without ones, and the tail's order (`save_imatrix_legacy`)."""
    path = tmp_path / "imatrix.dat"
    save_imatrix(Statistics({Q: columns([[3, 6]], [513]), GATE: columns([[1, 2], [0, 0]], [1, 0])}, ("a.txt", "b.txt"), 2, 512), path)
    q = f32(3, 6) / np.float32(513) * np.float32(2)
    expected = legacy([(Q.encode(), 2, q.tolist()), (GATE.encode(), 1, [1, 2, 1, 1])], struct.pack("<ii", 2, 12) + b"a.txt, b.txt")
    assert path.read_bytes() == expected


def test_the_name_or_the_option_chooses_the_form(statistics: Statistics, tmp_path: Path):
    """Catches a GGUF under the name of a .dat, which older tools take for one."""
    for name, asked, expected in (("a.dat", None, b"\2\0\0\0"), ("b.gguf", None, b"GGUF"), ("c.dat", "gguf", b"GGUF"), ("d.gguf", "dat", b"\2\0\0\0")):
        save_imatrix(statistics, tmp_path / name, output_format=asked)
        assert (tmp_path / name).read_bytes()[:4] == expected
    with pytest.raises(OutputError, match="already exists"):
        save_imatrix(statistics, tmp_path / "a.dat")


@given(npst.arrays(np.float32, (3, 4), elements=st.floats(0, 2.0**60, width=32)), st.lists(st.integers(0, 10**6), min_size=3, max_size=3).filter(any))
def test_legacy_round_trip_keeps_importance_to_float32(tmp_path_factory: pytest.TempPathFactory, values: np.ndarray, counts: list[int]):
    """Catches an importance that changes by more than two roundings on the way through a .dat."""
    original = Statistics({GATE: Columns(values, np.array(counts))}, ("a",), 5, 512)
    path = tmp_path_factory.mktemp("legacy") / "x.dat"
    save_imatrix(original, path)
    loaded = load_imatrix(path)
    expected, got = original.importance(GATE), loaded.importance(GATE)
    assert expected is not None and got is not None
    np.testing.assert_allclose(got.reshape(3, 4), expected, rtol=3e-7, atol=1e-44)
    assert (loaded.datasets, loaded.n_chunks) == (("a",), 5)


def test_every_truncation_of_a_legacy_file_is_refused_or_lacks_only_its_tail(tmp_path: Path):
    """Catches reads past the end that leave zeros or garbage in the last entry."""
    path = tmp_path / "imatrix.dat"
    body = legacy([(Q.encode(), 3, [1, 2]), (b"blk.1.attn_q.weight", 3, [1, 2])])
    whole = body + struct.pack("<ii", 12, 5) + b"a.txt"
    for n_bytes in range(len(whole)):
        path.write_bytes(whole[:n_bytes])
        if n_bytes in (len(body), len(body) + 4):  # the tail is optional (imatrix-loader.cpp)
            assert len(load_imatrix(path).columns) == 2
            continue
        with pytest.raises(InputError, match="malformed imatrix"):
            load_imatrix(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
        (struct.pack("<i", 2**31 - 1) + bytes(40), "number of entries .*got 2147483647"),
        (struct.pack("<i", -1) + bytes(40), "number of entries .*got -1"),
        (struct.pack("<ii", 1, -5) + bytes(40), "length of name of entry 0 .*got -5"),
        (struct.pack("<ii", 1, 2**30) + bytes(40), "length of name of entry 0"),
        (legacy([(b"\xff\xfe", 1, [1])]), "name of entry 0 .*expected UTF-8"),
        (legacy([(b"a.weight", 0, [1])]), "number of calls of a.weight .*got 0"),
        (legacy([(b"a.weight", 1, [])]) + bytes(8), "number of values of a.weight .*got 0"),
        (struct.pack("<ii", 1, 1) + b"a" + struct.pack("<ii", 1, 2**31 - 1) + bytes(8), "number of values of a .*got 2147483647"),
        (legacy([(b"a.weight", 1, [1]), (b"a.weight", 1, [1])]), "a.weight twice"),
        (legacy([(b"a.weight", 1, [float("nan")])]), "sums of squares of a.weight .*got nan"),
        (legacy([(b"a.weight", 1, [-1])]), "sums of squares of a.weight .*got -1"),
        (legacy([(b"a.weight", 1, [1])], struct.pack("<ii", 1, 0) + b"more"), "4 bytes more"),
        (legacy([(b"a.weight", 1, [1])], struct.pack("<ii", 1, 99)), "length of data set .*got 99"),
        (b"", "number of entries"),
    ],
)
def test_hostile_legacy_files_are_refused(tmp_path: Path, data: bytes, said: str):
    """Catches allocation by a forged length, negative lengths, and a text file parsed as numbers."""
    path = tmp_path / "imatrix.dat"
    path.write_bytes(data)
    with pytest.raises(InputError, match=said):
        load_imatrix(path)


@given(st.binary(max_size=120))
def test_random_bytes_never_crash(tmp_path_factory: pytest.TempPathFactory, data: bytes):
    """Catches any exception but InputError."""
    path = tmp_path_factory.mktemp("fuzz") / "x.dat"
    path.write_bytes(data)
    try:
        load_imatrix(path)
    except InputError:
        return


def test_missing_file_is_refused(tmp_path: Path):
    """Catches a traceback for a mistyped path."""
    with pytest.raises(InputError, match="cannot read imatrix"):
        load_imatrix(tmp_path / "none.dat")


# --- merging ------------------------------------------------------------------------------------------------------------


def test_merge_adds_and_lists(statistics: Statistics):
    """Catches averaging instead of adding, and forgotten weights that only one part has."""
    other = Statistics({Q: columns([[1, 1, 1]], [1024]), "blk.1.attn_q.weight": columns([[5]], [5])}, ("c.txt",), 2, 512)
    merged = merge([statistics, other])
    assert merged.columns[Q].sum_squares.tolist() == [[3, 5, 7]]
    assert merged.columns[Q].counts.tolist() == [1028]
    assert list(merged.columns) == [Q, GATE, "blk.1.attn_q.weight"]
    assert (merged.datasets, merged.n_chunks, merged.chunk_size) == (("a.txt", "b.txt", "c.txt"), 2, 512)


def test_merge_of_unlike_chunks_counts_as_llama_imatrix_does():
    """Catches chunks of 512 and of 2048 tokens added as if they were the same (imatrix.cpp: largest count / chunk size)."""
    short, long = Statistics({Q: columns([[1]], [1024])}, (), 2, 512), Statistics({Q: columns([[1]], [4096])}, (), 2, 2048)
    assert (merge([short, long]).n_chunks, merge([short, long]).chunk_size) == (10, 512)
    assert (merge([short, long], 1024).n_chunks, merge([short, long], 1024).chunk_size) == (5, 1024)


def test_moments_are_merged_where_all_parts_have_them():
    """Catches maxima that are added, and a Σx of half the text that is passed off as that of the whole."""
    a = Statistics({Q: Columns(f32(1, 4)[None], np.array([1]), f32(-1, 2)[None], f32(1, 2)[None])}, (), 1, 512)
    b = Statistics({Q: Columns(f32(9, 1)[None], np.array([1]), f32(3, -1)[None], f32(3, 1)[None])}, (), 1, 512)
    merged = merge([a, b]).columns[Q]
    assert merged.sums is not None and merged.max_abs is not None
    assert (merged.sums.tolist(), merged.max_abs.tolist()) == ([[2, 1]], [[3, 2]])
    plain = merge([a, Statistics({Q: columns([[1, 1]], [1])}, (), 1, 512)]).columns[Q]
    assert plain.sums is None and plain.max_abs is None


rows = npst.arrays(np.float32, 4, elements=st.floats(0, 1e6, width=32))
amounts = st.lists(st.tuples(rows, rows, st.integers(1, 10**12)), min_size=3, max_size=3)


@given(amounts)
def test_merge_is_associative(parts: list[tuple[np.ndarray, np.ndarray, int]]):
    """Catches a result that depends on the order in which runs were added: counts to the last bit, beyond float32's 2^24."""
    a, b, c = (Statistics({Q: Columns(values[None], np.array([n]), values[None], largest[None])}, (), 1, 512) for values, largest, n in parts)
    left, right = merge([merge([a, b]), c]).columns[Q], merge([a, merge([b, c])]).columns[Q]
    assert left.counts.tolist() == right.counts.tolist() == [sum(n for _, _, n in parts)]
    np.testing.assert_allclose(left.sum_squares, right.sum_squares, rtol=1e-6)
    assert left.sums is not None and right.sums is not None and left.max_abs is not None and right.max_abs is not None
    np.testing.assert_allclose(left.sums, right.sums, rtol=1e-6)
    assert (left.max_abs == right.max_abs).all()


def test_legacy_calls_become_tokens_when_merged_with_tokens():
    """Catches a legacy part of many chunks that weighs as much as a few tokens."""
    old, new = Statistics({Q: columns([[6.0]], [3])}, (), 3, 0), Statistics({Q: columns([[512.0]], [512])}, (), 1, 512)
    merged = merge([old, new])
    assert merged.columns[Q].counts.tolist() == [4 * 512]
    assert merged.importance(Q).tolist() == [[(3 * 512 * 2 + 512) / (4 * 512)]]


def test_merge_of_other_models_is_refused(statistics: Statistics):
    """Catches sums of unequal shapes, broadcast into nonsense."""
    with pytest.raises(InputError, match=f"columns of {Q}: got .* They are of different models"):
        merge([statistics, Statistics({Q: columns([[1, 1]], [2])}, (), 1, 512)])


@pytest.mark.parametrize("others", [Statistics({Q: columns([[3e38]], [512])}, (), 1, 512), Statistics({Q: columns([[3e38]], [3])}, (), 3, 0)])
def test_sums_beyond_float32_are_refused(others: Statistics):
    """Catches an infinite importance, which encodes a whole block as NaN."""
    with pytest.raises(InputError, match=f"sums of {Q}, merged: got "):
        merge([Statistics({Q: columns([[3e38]], [512])}, (), 1, 512), others])


# --- coverage -----------------------------------------------------------------------------------------------------------


def tensor(name: str, *shape: int) -> SimpleNamespace:
    return SimpleNamespace(name=name, shape=shape)


def test_coverage_lists_what_is_missing_and_unused(statistics: Statistics):
    """Catches weights that are quantized without importance and nobody is told."""
    coverage = check_coverage(statistics, [tensor(Q, 8, 3), tensor("blk.0.attn_norm.weight", 3), tensor("output.weight", 9, 3)])
    assert (coverage.missing, coverage.unused) == (("output.weight",), (GATE,))
    assert list(coverage.statistics.columns) == [Q]


def test_one_row_for_all_experts_is_split(tmp_path: Path):
    """Catches expert 1 quantized with expert 0's importance from a legacy file."""
    path = tmp_path / "x.dat"
    path.write_bytes(legacy([(GATE.encode(), 2, [2, 4, 6, 8])]))
    coverage = check_coverage(load_imatrix(path), [tensor(GATE, 2, 5, 2)])
    assert coverage.statistics.importance(GATE).tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ([tensor("blk.9.attn_q.weight", 8, 3)], "got statistics of blk.0.attn_q.weight, expected at least one of the model's 1 weights"),
        ([tensor(Q, 8, 4)], f"{Q}: got 3 columns, expected 4"),
        ([tensor(Q, 8, 3), tensor(GATE, 4, 5, 2)], f"{GATE}: got 3 experts, expected 4"),
        ([tensor(Q, 8, 3), tensor(GATE, 3, 5, 4)], f"{GATE}: got 2 columns, expected 4"),
    ],
)
def test_imatrix_of_another_model_is_refused(statistics: Statistics, tensors: list[SimpleNamespace], said: str):
    """Catches a quantization that silently ignores the imatrix, or reads past a row."""
    with pytest.raises(InputError, match="imatrix of another model") as caught:
        check_coverage(statistics, tensors)
    assert said in str(caught.value)


def test_gaps_are_told():
    """Catches unreached experts, dead columns and unknown heads that nobody hears of."""
    found = {Q: columns([[0, 4, 6]], [4]), GATE: columns([[1, 2], [0, 0]], [1, 0]), "blk.0.attn_k.weight": columns([[0, 0, 0]], [4])}
    model = [
        tensor(Q, 8, 3),
        tensor(GATE, 2, 5, 2),
        tensor("blk.0.attn_k.weight", 8, 3),
        tensor("blk.1.nextn.eh_proj.weight", 4, 8),
        tensor("token_embd.weight", 9, 3),
    ]
    lines = describe_gaps(check_coverage(Statistics(found, (), 1, 512), model))
    for line, said in zip(
        lines,
        [
            "no data for the head, which is token_embd.weight (tied)",
            "no data for 1 weights that the text never reached (blk.1.nextn.eh_proj.weight)",
            f"experts never reached (1 of 2 in {GATE})",
            "every activation was zero in 1 weights (blk.0.attn_k.weight)",
            f"1 columns were always zero (1 in {Q})",
        ],
        strict=True,
    ):
        assert said in line
    untied = describe_gaps(check_coverage(Statistics({Q: columns([[1, 4, 6]], [4])}, (), 1, 512), [tensor(Q, 8, 3), tensor("output.weight", 9, 3)]))
    assert len(untied) == 1 and "output.weight, which is collected on request only (--process-output)" in untied[0]
    head = Statistics({Q: columns([[1, 4, 6]], [4]), "output.weight": columns([[1, 1, 1]], [4])}, (), 1, 512)
    assert describe_gaps(check_coverage(head, [tensor(Q, 8, 3), tensor("output.weight", 9, 3)])) == []


# --- sanitizing ---------------------------------------------------------------------------------------------------------


def test_healthy_importance_is_the_same_array():
    """Catches a floor that changes bytes which must equal llama-quantize's, also beside one massive activation."""
    values = np.array([[1e-3, 2e-3, 1e9, 4e-3, 1e-8]], np.float32)
    same, n_floored = sanitize_importance(values)
    assert same is values
    assert n_floored == 0


def test_zeros_are_raised_and_counted():
    """Catches blocks of zero importance, which ggml encodes as zeros, and a miscount of them."""
    values = np.array([[0, 2, 4, 0], [0, 0, 0, 0], [1, 1, 1, 1]], np.float32)
    raised, n_floored = sanitize_importance(values)
    assert n_floored == 6
    np.testing.assert_allclose(raised, [[3e-6, 2, 4, 3e-6], [1, 1, 1, 1], [1, 1, 1, 1]], rtol=1e-6)
    assert values[0, 0] == 0


@given(npst.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 9)), elements=st.floats(0, 2.0**100, width=32)))
def test_sanitized_importance_is_positive_and_never_lowered(values: np.ndarray):
    """Catches floors that underflow to zero, and values that are changed without need."""
    raised, n_floored = sanitize_importance(values)
    assert (raised > 0).all() and (raised >= values).all()
    assert n_floored == (raised != values).sum()
