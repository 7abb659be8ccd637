"""Executes a Plan over a stream of tensors into part files: read, encode, check, write, slab by slab.

A slab is a run of rows of one matrix. Each worker thread takes a slab the whole way (pread → float32 → encode →
validate → pwrite at its planned offset), so memory is bounded by `n_threads` slabs whatever the size of a tensor or of
the model, and the bytes do not depend on the number of threads: every ggml encoder treats each row by itself.
A tensor whose curvature is given is encoded with error feedback instead, which hands errors from row to row: its slab
is the whole matrix. Publishes nothing and decides nothing; the plan says what and the layout says where.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from threadpoolctl import threadpool_limits

from loopgguf import ggml
from loopgguf.compensate import FAST, Damping, Effort, LossCurvature, encode_guarded
from loopgguf.container import PartFile, TensorInfo
from loopgguf.errors import InputError, QualityError
from loopgguf.formats import FLOAT_TYPES, INTEGER_TYPES, QUANTIZED_TYPES, GgmlType, row_bytes
from loopgguf.planner import Plan, PlanRow
from loopgguf.progress import Progress
from loopgguf.source import Tensor
from loopgguf.statistics import sanitize_importance
from loopgguf.super_weights import MaskLog, Pins, SuperWeight, add_masks, encode_rows, measure_mask, pins_between

SLAB_WEIGHTS = 1 << 20  # enough work to hide Python's overhead, small enough that a slab stays in the caches
SAMPLED_ROWS = 8  # of each encoded tensor, decoded again at once and after the file is reopened
_BYTES_PER_WEIGHT = 12  # of a slab in flight: the source's bytes (≤ 4), float32 (4), the packed rows (≤ 4)


@dataclass(frozen=True)
class SampledError:
    """‖w − ŵ‖² / ‖w‖² of rows start … stop of a tensor, against which the reopened file is checked."""

    start: int
    stop: int
    relative_error: float


@dataclass(frozen=True)
class FeedbackLog:
    """What error feedback came to: which way won ("plain", "columns", "columns and rows"), its held-out error as a part
    of the plain encoder's, and its damping; None where the plain encoder's bytes were kept."""

    way: str
    held_out_ratio: float
    damping: Damping | None
    is_aimed: bool = False  # at weights that make up for the drift of its inputs


@dataclass(frozen=True)
class TensorLog:
    """What happened to one tensor: the error of its sampled rows (encoded tensors only), importances that were floored,
    error feedback where it was tried, how the weights of the super weights' mask came out, and the SHA-256 of its bytes in
    the file."""

    sampled: SampledError | None = None
    n_floored: int = 0
    feedback: tuple[FeedbackLog, ...] = ()  # of its matrices, in the order they were done
    mask: MaskLog | None = None
    sha256: str = ""


@dataclass(frozen=True)
class KeptWeight:
    """A super weight as the written file holds it: its tensor's type, the one planned before it was raised, and what it decodes to."""

    weight: SuperWeight
    type: GgmlType
    type_before: GgmlType
    decoded: float

    @property
    def miss(self) -> float:
        """|decoded − value| ÷ |value|."""
        return abs(self.decoded - self.weight.spike.value) / abs(self.weight.spike.value)


@dataclass(frozen=True)
class WriteResult:
    """A published model (or, for a dry run, what it would be) and how it came about."""

    plan: Plan
    paths: tuple[Path, ...]
    total_bytes: int
    logs: Mapping[str, TensorLog]
    seconds: Mapping[str, float]
    sample_text: str
    notes: tuple[str, ...]
    is_dry_run: bool = False
    super_weights: tuple[KeptWeight, ...] | None = None  # None: not asked to protect any


@dataclass(frozen=True)
class Job:
    """One tensor's way: where its rows come from, what the plan makes of them, and where they go; `curvature` gives
    what error feedback needs of a matrix of it by number (None: plain bytes), and is asked when its turn comes; `pins`
    are weights to keep, by the tensor's row."""

    tensor: Tensor
    row: PlanRow
    part: PartFile
    info: TensorInfo
    curvature: Callable[[int], LossCurvature | None] | None = None
    effort: Effort = FAST
    pins: Pins = field(default_factory=dict)


@dataclass(frozen=True)
class _Slab:
    job: Job
    start: int  # rows of the tensor seen as (n_rows, n_in)
    stop: int
    importance: ggml.FloatArray | None
    sample: tuple[int, int] | None  # rows to decode again, inside this slab

    @property
    def pins(self) -> Pins:
        """The pins of the slab's rows, counted from its first."""
        return pins_between(self.job.pins, self.start, self.stop) if self.job.pins else {}


def slab_weights(max_buffer_bytes: int, n_threads: int) -> int:
    """Return how many weights a slab may have so that `n_threads` slabs in flight fit in `max_buffer_bytes`."""
    return min(SLAB_WEIGHTS, max(1, max_buffer_bytes // (n_threads * _BYTES_PER_WEIGHT)))


def _slabs(job: Job, importance: ggml.FloatArray | None, n_weights: int) -> Iterator[_Slab]:
    """Cut a tensor into slabs of at most `n_weights` (at least one row) that do not cross a matrix."""
    tensor = job.tensor
    rows_per_matrix = tensor.n_rows // tensor.n_matrices
    step = max(1, n_weights // tensor.n_in) if job.curvature is None else rows_per_matrix
    middle = tensor.n_rows // 2
    for matrix in range(tensor.n_matrices):
        first = matrix * rows_per_matrix
        vector = None if importance is None else importance[matrix]
        for start in range(first, first + rows_per_matrix, step):
            stop = min(start + step, first + rows_per_matrix)
            sample = (middle, min(middle + SAMPLED_ROWS, stop)) if start <= middle < stop else None
            yield _Slab(job, start, stop, vector, sample)


def relative_error(rows: ggml.FloatArray, decoded: ggml.FloatArray) -> float:
    """Return ‖rows − decoded‖² / ‖rows‖², 0 when both are zero."""
    energy = float(np.square(rows, dtype=np.float64).sum())
    return float(np.square(rows - decoded, dtype=np.float64).sum()) / energy if energy else float(np.abs(decoded).max() > 0)


def _refuse_values(tensor: Tensor, ggml_type: GgmlType) -> None:
    if ggml_type is GgmlType.F16:
        raise InputError(f"tensor {tensor.name} holds a value beyond ±65504, which F16 cannot: use BF16 or a quantized type for it (--tensor-type)")
    raise QualityError(
        f"tensor {tensor.name} encoded as {ggml_type.name} holds a non-finite scale: its weights are too large; choose a higher type for it (--tensor-type)"
    )


def _read_float32(slab: _Slab, raw: ggml.ByteArray) -> ggml.FloatArray:
    """Return the slab's weights as float32; refuse those that would make an encoder abort."""
    rows = ggml.decode_rows(slab.job.tensor.type, raw)
    if slab.job.row.type in QUANTIZED_TYPES and not ggml.rows_are_encodable(rows):
        _refuse_values(slab.job.tensor, slab.job.row.type)
    return rows


def _encode(slab: _Slab, rows: ggml.FloatArray) -> tuple[ggml.ByteArray, FeedbackLog | None]:
    """Return the rows packed as planned, by the plain encoder or by the better of it and error feedback."""
    job, target = slab.job, slab.job.row.type
    matrix = slab.start // (job.tensor.n_rows // job.tensor.n_matrices)
    curvature = None if job.curvature is None else job.curvature(matrix)
    if curvature is None:
        return encode_rows(target, rows, slab.importance, slab.pins), None
    encoding = encode_guarded(rows, target, slab.importance, curvature, job.effort, slab.pins)
    return encoding.packed, FeedbackLog(encoding.way, encoding.held_out_ratio, encoding.damping, encoding.is_aimed)


def _run(slab: _Slab) -> TensorLog:
    """Take one slab from the source to the part file; return what it adds to its tensor's log."""
    job, target = slab.job, slab.job.row.type
    tensor = job.tensor
    raw = tensor.read_rows(slab.start, slab.stop)
    if tensor.type not in INTEGER_TYPES and not ggml.rows_are_valid(tensor.type, raw):
        raise InputError(f"tensor {tensor.name} holds NaN or infinity in rows {slab.start} to {slab.stop - 1}: the checkpoint is damaged; download it again")
    offset = job.info.offset + slab.start * row_bytes(target, tensor.n_in)
    if target is tensor.type:
        job.part.write_at(offset, raw.data)
        return TensorLog()
    rows = _read_float32(slab, raw)
    packed, log = _encode(slab, rows)
    feedback = () if log is None else (log,)
    if not ggml.rows_are_valid(target, packed):
        _refuse_values(tensor, target)
    job.part.write_at(offset, packed.data)
    mask = measure_mask(target, rows, slab.importance, slab.pins, packed)
    if slab.sample is None:
        return TensorLog(feedback=feedback, mask=mask)
    start, stop = slab.sample
    inside = slice(start - slab.start, stop - slab.start)
    return TensorLog(SampledError(start, stop, relative_error(rows[inside], ggml.decode_rows(target, packed[inside]))), feedback=feedback, mask=mask)


class _Countdown:
    """How many slabs of each tensor are still to be written; asked from any thread."""

    def __init__(self) -> None:
        self._left: Counter[str] = Counter()
        self._lock = threading.Lock()

    def expect(self, name: str, n_slabs: int) -> None:
        self._left[name] = n_slabs

    def is_last(self, name: str) -> bool:
        """Count one slab as written; tell whether it was the last."""
        with self._lock:
            self._left[name] -= 1
            return self._left[name] == 0


def _write(slab: _Slab, countdown: _Countdown) -> TensorLog:
    """Run one slab; the log of a tensor's last one has the digest of the whole tensor, and no other has."""
    log, info = _run(slab), slab.job.info
    return replace(log, sha256=slab.job.part.sha256(info.offset, info.n_bytes)) if countdown.is_last(info.name) else log


def _initialize_encoders(jobs: Iterable[Job]) -> None:
    """Build the tables of the types about to be encoded, once and from one thread."""
    for ggml_type in sorted({job.row.type for job in jobs if job.row.type is not job.tensor.type} - FLOAT_TYPES):
        ggml.initialize(ggml_type)


def execute(
    jobs: list[Job],
    importances: Callable[[str], ggml.FloatArray | None],
    *,
    n_threads: int,
    max_buffer_bytes: int,
    progress: Progress | None = None,
    on_tensor: Callable[[str, TensorLog], None] | None = None,
    should_stop: Callable[[], bool] = lambda: False,
) -> Mapping[str, TensorLog]:
    """Encode and write every tensor of `jobs`, and return the log of each that was, by name.

    importances: name → mean squared activations (n_matrices, n_in) float32, or None; asked for rows that the plan
    encodes with an imatrix. on_tensor: called, from this thread, with the log of each tensor that is written. should_stop: when it
    says so, no further tensor is begun. Raises InputError for NaN or infinite weights and values that F16 cannot hold,
    QualityError for non-finite block scales, OutputError when the disk is full; the first error stops the work.
    """
    _initialize_encoders(jobs)
    logs: dict[str, TensorLog] = {}
    countdown, left = _Countdown(), Counter[str]()
    n_done = 0

    def slabs() -> Iterator[_Slab]:
        for job in itertools.takewhile(lambda _: not should_stop(), jobs):
            importance = importances(job.row.name) if job.row.uses_imatrix else None
            assert importance is not None or not job.row.uses_imatrix, f"the plan counts on imatrix data that {job.row.name} does not have"
            n_floored = 0
            if importance is not None:
                importance, n_floored = sanitize_importance(importance)
            logs[job.row.name] = TensorLog(n_floored=n_floored)
            cut = list(_slabs(job, importance, slab_weights(max_buffer_bytes, n_threads)))
            countdown.expect(job.row.name, len(cut))
            left[job.row.name] = len(cut)
            yield from cut

    def finish(slab: _Slab, part: TensorLog) -> None:
        nonlocal n_done
        name = slab.job.row.name
        log = logs[name]
        feedback, mask = log.feedback + part.feedback, add_masks(log.mask, part.mask)
        logs[name] = replace(log, sampled=part.sampled or log.sampled, feedback=feedback, mask=mask, sha256=part.sha256 or log.sha256)
        left[name] -= 1
        if left[name] == 0:
            n_done += 1
            if on_tensor is not None:
                on_tensor(name, logs[name])
            if progress is not None:
                progress(name, n_done, len(jobs))

    # one BLAS thread per worker: the workers fill the cores, and a product's rounding must not depend on a thread count
    with ThreadPoolExecutor(n_threads) as pool, threadpool_limits(1, "blas"):
        _drive(pool, slabs(), lambda slab: _write(slab, countdown), finish, depth=2 * n_threads)
    return logs


def _drive(
    pool: ThreadPoolExecutor, slabs: Iterator[_Slab], write: Callable[[_Slab], TensorLog], finish: Callable[[_Slab, TensorLog], None], depth: int
) -> None:
    """Keep `depth` slabs in flight until all are done; on an error, start nothing more and raise it."""
    running: dict[Future[TensorLog], _Slab] = {}
    try:
        while True:
            for slab in itertools.islice(slabs, depth - len(running)):
                running[pool.submit(write, slab)] = slab
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                finish(running.pop(future), future.result())
    finally:
        for future in running:
            future.cancel()
