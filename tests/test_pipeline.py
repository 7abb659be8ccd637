"""Executing a plan: the bytes of a naive encode whatever the slabs and threads, errors that name the tensor, nothing left behind."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from loopgguf import ggml, pipeline
from loopgguf.container import Layout, PartFile, plan_layout, read_gguf, uint32
from loopgguf.errors import InputError, LoopggufError, OutputError, QualityError
from loopgguf.formats import GgmlType, row_bytes, tensor_bytes
from loopgguf.pipeline import Job, TensorLog, execute, relative_error, slab_weights
from loopgguf.planner import PlanRow
from loopgguf.source import Tensor
from loopgguf.statistics import sanitize_importance

T = GgmlType
Importances = Mapping[str, NDArray[np.float32]]
MIB = 1 << 20

# --- models in memory -------------------------------------------------------------------------------------------------


def _packed(ggml_type: GgmlType, values: NDArray[np.generic]) -> NDArray[np.uint8]:
    """The rows of an array as a source holds them; integers and doubles as they are."""
    rows = np.ascontiguousarray(values).reshape(-1, values.shape[-1])
    if rows.dtype == np.float32:
        return ggml.encode_rows(ggml_type, rows)
    return rows.view(np.uint8)


def _tensor(name: str, values: NDArray[np.generic], ggml_type: GgmlType = T.BF16) -> Tensor:
    packed = _packed(ggml_type, values)
    packed.setflags(write=False)
    return Tensor(name, values.shape, ggml_type, lambda start, stop: packed[start:stop])


def _row(tensor: Tensor, ggml_type: GgmlType, *, uses_imatrix: bool = False) -> PlanRow:
    return PlanRow(tensor.name, tensor.shape, tensor.type, ggml_type, tensor_bytes(ggml_type, tensor.shape), "by hand", uses_imatrix=uses_imatrix)


def _normal(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def _positive(*shape: int, seed: int = 1) -> NDArray[np.float32]:
    return (np.random.default_rng(seed).gamma(0.5, size=shape) + 0.01).astype(np.float32)


@contextmanager
def _jobs(folder: Path, plan: list[tuple[Tensor, PlanRow]]) -> Iterator[tuple[list[Job], PartFile, Layout]]:
    layout = plan_layout({"a": uint32(1)}, [(row.name, row.type, row.shape) for _, row in plan])
    with PartFile(folder / "out.gguf", layout.total_bytes, overwrite=True) as part:
        part.write_at(0, layout.header)
        yield [Job(tensor, row, part, info) for (tensor, row), info in zip(plan, layout.tensors, strict=True)], part, layout


def _execute(
    folder: Path,
    plan: list[tuple[Tensor, PlanRow]],
    importances: Importances | None = None,
    *,
    n_threads: int = 2,
    max_buffer_bytes: int = 64 * MIB,
    progress: Callable[[str, int, int], None] | None = None,
) -> tuple[dict[str, bytes], Mapping[str, TensorLog]]:
    """Return every tensor's bytes in the finished file, and the logs."""
    with _jobs(folder, plan) as (jobs, part, _):
        logs = execute(jobs, (importances or {}).get, n_threads=n_threads, max_buffer_bytes=max_buffer_bytes, progress=progress)
        part.publish()
    raw = part.target.read_bytes()
    return {t.name: raw[t.offset : t.offset + t.n_bytes] for t in read_gguf(part.target).tensors}, logs


def _naive(tensor: Tensor, row: PlanRow, importance: NDArray[np.float32] | None = None) -> bytes:
    """The whole tensor at once, matrix by matrix."""
    raw = tensor.read_rows(0, tensor.n_rows)
    if row.type is tensor.type:
        return raw.tobytes()
    matrices = ggml.decode_rows(tensor.type, raw).reshape(tensor.n_matrices, -1, tensor.n_in)
    return b"".join(
        ggml.encode_rows(row.type, np.ascontiguousarray(m), None if importance is None else importance[i]).tobytes() for i, m in enumerate(matrices)
    )


def _model() -> tuple[list[tuple[Tensor, PlanRow]], Importances]:
    """A tensor of every kind: encoded with and without importance, experts, copies, one dimension, integers."""
    embedding, norm = _tensor("token_embd.weight", _normal(300, 256)), _tensor("norm.weight", _normal(256), T.F32)
    query, experts = _tensor("q.weight", _normal(64, 512, seed=2)), _tensor("exps.weight", _normal(4, 24, 256, seed=3), T.F16)
    indices, doubles = _tensor("i.weight", np.arange(7 * 5, dtype=np.int32).reshape(7, 5), T.I32), _tensor("d.weight", np.full(3, np.nan), T.F64)
    plan = [
        (embedding, _row(embedding, T.Q6_K)),
        (norm, _row(norm, T.F32)),
        (query, _row(query, T.Q4_K, uses_imatrix=True)),
        (experts, _row(experts, T.IQ4_XS, uses_imatrix=True)),
        (indices, _row(indices, T.I32)),
        (doubles, _row(doubles, T.F64)),
    ]
    return plan, {"q.weight": _positive(1, 512), "exps.weight": _positive(4, 256), "token_embd.weight": _positive(1, 256)}


def _expected(plan: list[tuple[Tensor, PlanRow]], importances: Importances) -> dict[str, bytes]:
    return {row.name: _naive(tensor, row, importances[row.name] if row.uses_imatrix else None) for tensor, row in plan}


# --- the bytes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize("max_buffer_bytes", [1, 40_000, 64 * MIB])
def test_bytes_equal_a_naive_encode(tmp_path: Path, n_threads: int, max_buffer_bytes: int) -> None:
    """Catches slabs at the wrong offset, importances of another expert, and bytes that depend on threads or slabs."""
    plan, importances = _model()
    got, _ = _execute(tmp_path, plan, importances, n_threads=n_threads, max_buffer_bytes=max_buffer_bytes)
    assert got == _expected(plan, importances)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), max_size=3),
    st.sampled_from([T.F32, T.F16, T.BF16, T.Q8_0]),
    st.sampled_from([T.F32, T.F16, T.BF16, T.Q8_0, T.Q4_0, T.Q4_K]),
    st.integers(1, 3),
    st.integers(1, 60_000),
)
def test_any_shape_and_pair_of_types(
    tmp_path_factory: pytest.TempPathFactory, outer: list[int], source: GgmlType, target: GgmlType, n_threads: int, max_buffer_bytes: int
) -> None:
    """Catches a shape (one row, one expert, four dimensions) that the slabs do not cover once and only once."""
    tensor = _tensor("w", _normal(*outer, 256), source)
    row = _row(tensor, target)
    got, logs = _execute(tmp_path_factory.mktemp("any"), [(tensor, row)], n_threads=n_threads, max_buffer_bytes=max_buffer_bytes)
    assert got == {"w": _naive(tensor, row)}
    assert (logs["w"].sampled is None) == (source is target)


def test_each_expert_has_its_own_importance(tmp_path: Path) -> None:
    """Catches the first expert's importance used for all; the test would be vacuous if it made no difference."""
    tensor, importance = _tensor("exps", _normal(3, 10, 256)), _positive(3, 256)
    row = _row(tensor, T.Q4_K, uses_imatrix=True)
    got, _ = _execute(tmp_path, [(tensor, row)], {"exps": importance}, max_buffer_bytes=1)
    assert got["exps"] == _naive(tensor, row, importance)
    assert got["exps"] != _naive(tensor, row, np.repeat(importance[:1], 3, 0))


def test_no_slab_crosses_a_matrix(tmp_path: Path) -> None:
    """Catches one read that spans two experts, half of which gets the other's importance."""
    tensor = _tensor("exps", _normal(3, 5, 256))
    reads: list[tuple[int, int]] = []
    watched = Tensor(tensor.name, tensor.shape, tensor.type, lambda start, stop: (reads.append((start, stop)), tensor.read_rows(start, stop))[1])
    _execute(tmp_path, [(watched, _row(watched, T.Q8_0))], n_threads=1, max_buffer_bytes=12 * 256 * 2)
    assert sorted(reads) == [(0, 2), (2, 4), (4, 5), (5, 7), (7, 9), (9, 10), (10, 12), (12, 14), (14, 15)]


def test_importance_is_used_only_where_the_plan_says(tmp_path: Path) -> None:
    """Catches an embedding encoded with the importance that happens to exist: llama-quantize does not."""
    plan, importances = _model()
    asked: list[str] = []
    with _jobs(tmp_path, plan) as (jobs, _, _):
        execute(jobs, lambda name: (asked.append(name), importances[name])[1], n_threads=2, max_buffer_bytes=MIB)
    assert asked == ["q.weight", "exps.weight"]


def test_floored_importances_are_counted_and_used(tmp_path: Path) -> None:
    """Catches zeros passed on to ggml (it encodes such blocks as zeros), and a repair that nobody hears of."""
    tensor, importance = _tensor("w", _normal(8, 256)), _positive(1, 256)
    importance[0, 32:64] = 0
    row = _row(tensor, T.Q4_0, uses_imatrix=True)
    got, logs = _execute(tmp_path, [(tensor, row)], {"w": importance})
    repaired, n_floored = sanitize_importance(importance)
    assert logs["w"].n_floored == n_floored == 32
    assert got["w"] == _naive(tensor, row, repaired) != _naive(tensor, row, importance)


def test_without_tensors_nothing_happens(tmp_path: Path) -> None:
    """Catches waiting for a slab that never comes."""
    assert _execute(tmp_path, []) == ({}, {})


def test_a_row_longer_than_the_buffer_is_one_slab(tmp_path: Path) -> None:
    """Catches a slab of no rows, which would never end."""
    tensor = _tensor("w", _normal(3, 256 * 64))
    got, _ = _execute(tmp_path, [(tensor, _row(tensor, T.Q4_K))], max_buffer_bytes=1)
    assert got["w"] == _naive(tensor, _row(tensor, T.Q4_K))


@pytest.mark.parametrize(
    ("max_buffer_bytes", "n_threads", "n_weights"), [(24 * MIB, 2, 1 << 20), (12 * MIB, 2, 1 << 19), (12 * MIB, 4, 1 << 18), (1 << 40, 2, 1 << 20), (1, 2, 1)]
)
def test_slabs_of_all_threads_fit_the_buffer(max_buffer_bytes: int, n_threads: int, n_weights: int) -> None:
    """Catches a bound per thread where one for all is promised."""
    assert slab_weights(max_buffer_bytes, n_threads) == n_weights


def test_only_as_many_slabs_as_threads_are_in_memory(tmp_path: Path) -> None:
    """Catches reading ahead: memory would grow with the queue."""
    tensor = _tensor("w", _normal(200, 256))
    lock, alive, most = threading.Lock(), [0], [0]

    def read(start: int, stop: int) -> NDArray[np.uint8]:
        with lock:
            alive[0] += 1
            most[0] = max(most[0], alive[0])
        return tensor.read_rows(start, stop)

    class Part(PartFile):
        def write_at(self, offset: int, data: bytes | memoryview) -> None:
            super().write_at(offset, data)
            with lock:
                alive[0] -= 1

    watched = Tensor(tensor.name, tensor.shape, tensor.type, read)
    layout = plan_layout({}, [("w", T.Q4_K, tensor.shape)])
    with Part(tmp_path / "out.gguf", layout.total_bytes) as part:
        execute([Job(watched, _row(watched, T.Q4_K), part, layout.tensors[0])], {}.get, n_threads=3, max_buffer_bytes=1)
    assert most[0] <= 3 and alive[0] == 0


# --- logs and progress ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_buffer_bytes", [1, 40_000, 64 * MIB])
def test_sampled_errors_equal_naive_ones(tmp_path: Path, max_buffer_bytes: int) -> None:
    """Catches an error of other rows than it says: the reopened file would be refused, or a damaged one accepted."""
    plan, importances = _model()
    got, logs = _execute(tmp_path, plan, importances, max_buffer_bytes=max_buffer_bytes)
    for tensor, row in plan:
        sampled = logs[row.name].sampled
        assert (sampled is not None) == row.is_encoded
        if sampled is None:
            continue
        assert 0 <= sampled.start < sampled.stop <= tensor.n_rows and sampled.stop - sampled.start <= pipeline.SAMPLED_ROWS
        before = ggml.decode_rows(tensor.type, tensor.read_rows(sampled.start, sampled.stop)).astype(np.float64)
        packed = np.frombuffer(got[row.name], np.uint8).reshape(-1, row_bytes(row.type, tensor.n_in))[sampled.start : sampled.stop]
        after = ggml.decode_rows(row.type, packed).astype(np.float64)
        assert sampled.relative_error == pytest.approx(((before - after) ** 2).sum() / (before**2).sum(), rel=1e-6)


def test_relative_errors_by_hand() -> None:
    """Catches a division by zero for rows of zeros, and zeros that became something."""
    rows, zeros = np.array([[3, 4]], np.float32), np.zeros((1, 2), np.float32)
    assert relative_error(rows, np.array([[3, 3]], np.float32)) == 1 / 25
    assert relative_error(rows, rows) == relative_error(zeros, zeros) == 0
    assert relative_error(zeros, rows) == 1
    assert relative_error(rows * np.float32(1e30), zeros) == pytest.approx(1)


def test_tensors_of_zeros_and_constants(tmp_path: Path) -> None:
    """Catches NaN errors or invalid blocks where there is nothing to scale."""
    zeros, ones = _tensor("zeros", np.zeros((9, 256), np.float32)), _tensor("ones", np.ones((9, 256), np.float32))
    _, logs = _execute(tmp_path, [(zeros, _row(zeros, T.Q4_K)), (ones, _row(ones, T.Q8_0))])
    assert logs["zeros"].sampled is not None and logs["zeros"].sampled.relative_error == 0
    assert logs["ones"].sampled is not None and logs["ones"].sampled.relative_error < 1e-6


def test_progress_counts_every_tensor_once(tmp_path: Path) -> None:
    """Catches a bar that ends at 97 %, or that counts slabs."""
    plan, importances = _model()
    calls: list[tuple[str, int, int]] = []
    _execute(tmp_path, plan, importances, max_buffer_bytes=1, progress=lambda *call: calls.append(call))
    assert [(done, total) for _, done, total in calls] == [(i + 1, len(plan)) for i in range(len(plan))]
    assert {name for name, _, _ in calls} == {row.name for _, row in plan}


# --- what is refused --------------------------------------------------------------------------------------------------


def _refusal(folder: Path, tensor: Tensor, ggml_type: GgmlType, importances: Importances | None = None) -> LoopggufError:
    good = _tensor("good", _normal(8, 256))
    with pytest.raises(LoopggufError) as caught:
        _execute(folder, [(good, _row(good, T.Q8_0)), (tensor, _row(tensor, ggml_type, uses_imatrix=importances is not None))], importances)
    assert list(folder.iterdir()) == []
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("source", [T.F32, T.F16, T.BF16])
@pytest.mark.parametrize("target", [T.F32, T.F16, T.BF16, T.Q4_K, T.Q6_K, T.MXFP4])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str], bad: float, source: GgmlType, target: GgmlType) -> None:
    """Catches NaN copied or encoded into a file that loads and speaks nonsense, and ggml's own line on the terminal."""
    values = _normal(40, 256)
    values[33, 7] = bad
    error = _refusal(tmp_path, _tensor("blk.7.ffn_down.weight", values, source), target)
    assert isinstance(error, InputError) and "blk.7.ffn_down.weight holds NaN or infinity in rows" in str(error)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("source", [T.F32, T.BF16])
@pytest.mark.parametrize("value", [65536.0, -1e6, 1e30])
def test_values_beyond_f16_are_refused(tmp_path: Path, source: GgmlType, value: float) -> None:
    """Catches an infinity made by a BF16 → F16 conversion."""
    values = _normal(40, 256)
    values[33, 7] = value
    error = _refusal(tmp_path, _tensor("output.weight", values, source), T.F16)
    assert isinstance(error, InputError) and "output.weight" in str(error) and "65504" in str(error)


@pytest.mark.parametrize("value", [1e9, -1e9, 1e20, 1e30, -3e38])
@pytest.mark.parametrize("target", [T.Q8_0, T.Q4_0, T.Q4_K, T.Q6_K, T.Q3_K, T.IQ4_XS, T.IQ3_S])
def test_outliers_beyond_any_scale_are_refused(tmp_path: Path, target: GgmlType, value: float) -> None:
    """Catches an infinite scale, a block that Q6_K silently encodes as zeros, and IQ3_S aborting the process."""
    values = _normal(40, 256)
    values[33, 7] = value
    error = _refusal(tmp_path, _tensor("blk.1.ffn_up.weight", values), target)
    assert isinstance(error, QualityError) and "blk.1.ffn_up.weight" in str(error) and target.name in str(error)


def test_large_values_stay_in_bf16(tmp_path: Path) -> None:
    """Catches refusing what the target can hold."""
    tensor = _tensor("w", np.full((4, 256), 1e30, np.float32), T.F32)
    got, _ = _execute(tmp_path, [(tensor, _row(tensor, T.BF16))])
    assert got["w"] == _naive(tensor, _row(tensor, T.BF16))


def test_quantized_sources_with_bad_scales_are_refused(tmp_path: Path) -> None:
    """Catches copying a block whose scale is NaN."""
    packed = ggml.encode_rows(T.Q8_0, _normal(8, 256))
    packed[5, :2] = [0x00, 0x7E]
    tensor = Tensor("w", (8, 256), T.Q8_0, lambda start, stop: packed[start:stop])
    assert isinstance(_refusal(tmp_path, tensor, T.Q8_0), InputError)
    assert isinstance(_refusal(tmp_path, tensor, T.Q4_0), InputError)


def test_a_full_disk_stops_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an OSError from a worker thread, and a part left on the full disk."""
    pwrite, n_calls = os.pwrite, [0]

    def fill(fd: int, data: memoryview, offset: int) -> int:
        n_calls[0] += 1
        if n_calls[0] > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", fill)
    plan, importances = _model()
    with pytest.raises(OutputError, match=r"out\.gguf\.part: No space left on device; free some space"):
        _execute(tmp_path, plan, importances, max_buffer_bytes=1)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [InputError, RuntimeError, MemoryError])
def test_the_first_error_stops_the_work(tmp_path: Path, error: type[Exception]) -> None:
    """Catches reading the rest of a 100 GB model after its second slab failed, and an error that is swallowed."""
    tensor = _tensor("w", _normal(2000, 256))
    reads: list[int] = []

    def read(start: int, stop: int) -> NDArray[np.uint8]:
        reads.append(start)
        if start == 10:
            raise error("torn cable")
        return tensor.read_rows(start, stop)

    broken = Tensor("w", tensor.shape, tensor.type, read)
    n_threads = 2
    with pytest.raises(error, match="torn cable"):
        _execute(tmp_path, [(broken, _row(broken, T.Q4_K))], n_threads=n_threads, max_buffer_bytes=1)
    assert len(reads) <= 11 + 3 * n_threads
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_slabs_are_made_stops_the_work(tmp_path: Path) -> None:
    """Catches a hang or a swallowed error when the statistics fail, not a worker."""
    plan, _ = _model()

    def fail(_: str) -> NoReturn:
        raise InputError("imatrix of another model")

    with pytest.raises(InputError, match="another model"), _jobs(tmp_path, plan) as (jobs, _, _):
        execute(jobs, fail, n_threads=2, max_buffer_bytes=1)
    assert list(tmp_path.iterdir()) == []


def test_an_error_in_progress_stops_the_work(tmp_path: Path) -> None:
    """Catches Ctrl-C, which arrives in the main thread, leaving workers behind."""
    plan, importances = _model()

    def interrupt(*_: object) -> NoReturn:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _execute(tmp_path, plan, importances, max_buffer_bytes=1, progress=interrupt)
    assert list(tmp_path.iterdir()) == []
    assert not [t for t in threading.enumerate() if t.name.startswith(ThreadPoolExecutor.__name__)]


def test_tables_are_built_once_and_before_the_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches every thread waiting for the i-quants' tables, and tables of types that are only copied."""
    built: list[GgmlType] = []
    monkeypatch.setattr(ggml, "initialize", built.append)
    plan, importances = _model()
    copied = _tensor("c", _normal(4, 256), T.Q5_K)
    _execute(tmp_path, [*plan, (copied, _row(copied, T.Q5_K))], importances)
    assert built == [T.Q4_K, T.Q6_K, T.IQ4_XS]
