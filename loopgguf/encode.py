"""What is to be written, and in which order its tensors are encoded: at once, or with error feedback as soon as it can be told what it needs.

A plan's encoders are told importances; error feedback needs matrices besides, which lie beside an imatrix or come layer by
layer from a pass over calibration text. In sequence (`sequence.py`) each input of a layer is told how it has drifted in the
file so far, which takes all matrices first: those of a pass wait in the job folder. Publishes nothing.
"""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import shutil
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from loopgguf.accumulators import split_holdout
from loopgguf.architectures import tensor_role
from loopgguf.calibration import Chunks
from loopgguf.checkpoint import content_key
from loopgguf.compensate import LossCurvature
from loopgguf.curvature import gram_shapes
from loopgguf.drift import Drift
from loopgguf.errors import InputError, UsageError
from loopgguf.evaluation import Measure
from loopgguf.feedback import MIN_TOKENS_PER_COLUMN, SEED, Compensate, Feedback, kept_bytes, may_have_feedback, run_feedback, stored_feedback
from loopgguf.formats import QUANTIZED_TYPES
from loopgguf.grams import GramHeader, GramWriter, check_disk, find_grams, stored_bytes
from loopgguf.hidden_states import finished_layers
from loopgguf.importance import ImatrixRequest, Importance, calibration_chunks
from loopgguf.journal import Journal
from loopgguf.opening import Settings, model_fields
from loopgguf.pipeline import Job as TensorJob
from loopgguf.pipeline import TensorLog, WriteResult, execute
from loopgguf.planfile import imatrix_digest
from loopgguf.planner import OUTPUT, Plan
from loopgguf.progress import Progress
from loopgguf.protection import Protection
from loopgguf.report import names_text
from loopgguf.sequence import run_sequence
from loopgguf.source import Source, Tensor, open_source

logger = logging.getLogger(__name__)

FindCurvature = Callable[[int], LossCurvature | None]

AUTO_SEQUENCE_WEIGHTS = 2_000_000_000  # up to which a sequence may keep all matrices on the disk unasked: some 20 GB
_MATRICES = "matrices"  # of a pass, in the work folder of a job


@dataclass(frozen=True)
class Reuse:
    """Tensors of a file that was written before from the same source, encoded as they are planned again, and the logs of that file."""

    tensors: Mapping[str, Tensor]
    logs: Mapping[str, TensorLog]

    @classmethod
    def of(cls, result: WriteResult, path: Path, plan: Plan) -> Reuse:
        """Return the tensors of a published file, which goes by the name `path` now, that another plan leaves as they are."""
        types = {row.name: row.type for row in plan.rows}
        kept = {row.name for row in result.plan.rows if row.is_encoded and types[row.name] is row.type}
        return cls({tensor.name: tensor for tensor in open_source(path).tensors if tensor.name in kept}, result.logs)

    @property
    def kept_logs(self) -> dict[str, TensorLog]:
        """The logs of the tensors that are taken over."""
        return {name: self.logs[name] for name in self.tensors}


@dataclass(frozen=True)
class Order:
    """What is to be written: a plan, what its encoders are told, and how the output is cut."""

    plan: Plan
    importance: Importance | None = None
    imatrix: Path | None = None  # the file that was given, beside which Gram matrices may lie
    compensate: Compensate = Compensate.OFF
    compensate_columns: int | None = None  # of a Gram matrix that feedback takes together; None: all
    compensate_sequence: bool | None = None  # None: where that takes no great room on the disk
    plain_kinds: frozenset[str] = frozenset()  # of tensors that are left to the plain encoder all the same
    calibration: ImatrixRequest = field(default_factory=ImatrixRequest)
    protection: Protection | None = None
    keep_split: bool = False
    selection: Chunks | None = None  # the text it must pass a gate on
    predicted_kld_nats: Measure | None = None  # on that text
    reuse: Reuse | None = None
    inputs: tuple[Path, ...] = ()  # files that the user gave besides the source, which the output must not replace

    def wants_feedback(self, name: str) -> bool:
        """Tell whether a tensor of this name may be encoded with error feedback, where there is what it takes."""
        return self.compensate is not Compensate.OFF and tensor_role(name).kind not in self.plain_kinds


@dataclass(frozen=True)
class Basis:
    """What error feedback rests on: the matrices beside the imatrix, or else a pass over calibration text; and whether layers are
    encoded in sequence, where any of their weights may have feedback, which runs some of that text too. is_spared: they are not, for
    the disk's sake alone."""

    stored: Feedback | None = None
    chunks: Chunks | None = None
    is_sequential: bool = False
    is_spared: bool = False


def find_basis(source: Source, order: Order, settings: Settings) -> Basis:
    """Return what an order's error feedback rests on; nothing where it has none."""
    if order.compensate is Compensate.OFF:
        return Basis()
    has_layers = any(row.uses_imatrix and order.wants_feedback(row.name) and tensor_role(row.name).layer is not None for row in order.plan.rows)
    can_be_sequential, stored = source.is_checkpoint and has_layers, stored_feedback(order.imatrix)
    wants_sequence = order.compensate_sequence
    if wants_sequence and not source.is_checkpoint:
        raise UsageError(f"--compensate-sequence: {source.path.name} is a GGUF, of which layers cannot be run one by one. Give the checkpoint folder")
    if wants_sequence is None:
        wants_sequence = stored is not None or source.n_weights <= AUTO_SEQUENCE_WEIGHTS
    is_sequential = wants_sequence and can_be_sequential
    needs_text = stored is None or is_sequential
    chunks = calibration_chunks(source, order.calibration, settings) if needs_text else None
    return Basis(stored, chunks, is_sequential, is_spared=can_be_sequential and not is_sequential and order.compensate_sequence is None)


def encoding_fields(source: Source, order: Order, basis: Basis, settings: Settings) -> dict[str, object]:
    """Return what the bytes of an order's tensors depend on, by names that a user understands."""
    libraries = ["llama-cpp-python", "numpy", *([] if order.compensate is Compensate.OFF else ["numba", "scipy", "torch"])]
    used = order.importance if order.importance is not None and order.importance.statistics is not None else None
    return {
        **model_fields(source, settings),
        "plan": order.plan.hash,
        "imatrix": imatrix_digest(order.plan, used) if used is not None else None,
        "compensate": order.compensate,
        "columns fed back together": order.compensate_columns,
        "sequence": basis.is_sequential,
        "kinds without feedback": sorted(order.plain_kinds),
        "Gram matrices": _files_key(find_grams(order.imatrix)) if basis.stored is not None and order.imatrix is not None else None,
        "calibration text": None if basis.chunks is None else content_key(basis.chunks.fingerprint, order.calibration.ctx_size),
        "max-memory": settings.max_memory_bytes if basis.stored is None and basis.chunks is not None else None,
        "super weights": None if order.protection is None else order.protection.fingerprint,
        "device": settings.device,
        **{f"{name} version": importlib.metadata.version(name) for name in libraries},
    }


def _files_key(paths: Sequence[Path]) -> str:
    return content_key(*((path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in paths))


def encode(source: Source, order: Order, basis: Basis, journal: Journal, settings: Settings) -> None:
    """Encode and write the tensors that the journal does not have. Raises as `pipeline.execute`, `feedback.run_feedback` and
    `sequence.run_sequence`; OutputError where the matrices of a pass do not fit on the disk; Interrupted when the user stops it."""
    _Encoding(source, order, basis, journal, settings).run()


def describe_untried(order: Order, logs: Mapping[str, TensorLog]) -> list[str]:
    """Say which quantized tensors error feedback was asked for and not tried on."""
    if order.compensate is Compensate.OFF:
        return []
    quantized = [row.name for row in order.plan.rows if row.is_encoded and row.type in QUANTIZED_TYPES and order.wants_feedback(row.name)]
    untried = [name for name in quantized if not logs[name].feedback]
    if not untried:
        return []
    why = f"no matrices of them, or of fewer than {MIN_TOKENS_PER_COLUMN} tokens a column"
    return [f"error feedback: not tried on {len(untried)} of {len(quantized)} quantized tensors ({names_text(untried)}): {why}"]


class _Encoding:
    """The tensors that are left to encode, by name, and the passes over text that tell what their encoders need."""

    def __init__(self, source: Source, order: Order, basis: Basis, journal: Journal, settings: Settings) -> None:
        self.source, self.order, self.basis, self.journal, self.settings = source, order, basis, journal, settings
        tensors, rows = {tensor.name: tensor for tensor in source.tensors}, {row.name: row for row in order.plan.rows}
        self.places = {info.name: (part, info) for part, layout in journal.parts for info in layout.tensors}
        self.left = {name: TensorJob(tensors[name], rows[name], part, info) for name, (part, info) in self.places.items() if name not in journal.logs}
        if order.protection is not None:
            pins = order.protection.pins
            self.left = {name: replace(job, pins=pins(job.tensor)) if job.row.is_encoded else job for name, job in self.left.items()}
        self.is_tied = OUTPUT not in tensors
        self.effort = replace(order.compensate.effort(source.n_weights), max_columns=order.compensate_columns)

    def run(self) -> None:
        order, basis = self.order, self.basis
        if order.reuse is not None:
            self.execute([replace(self.left.pop(name), tensor=tensor) for name, tensor in order.reuse.tensors.items() if name in self.left])
        if basis.is_sequential:
            self.in_sequence()
        elif basis.stored is not None:
            self.with_feedback(filter(order.wants_feedback, list(self.left)), basis.stored)
        elif basis.chunks is not None:
            self.as_matrices_come()
        self.execute(self.take(list(self.left)))

    def take(self, names: Iterable[str]) -> list[TensorJob]:
        return [self.left.pop(name) for name in names]

    def execute(self, jobs: list[TensorJob], progress: Progress | None = None) -> None:
        execute(
            jobs,
            self.order.importance if self.order.importance is not None else lambda name: None,
            n_threads=self.settings.n_threads,
            max_buffer_bytes=self.settings.max_buffer_bytes,
            progress=progress or self.settings.progress,
            on_tensor=self.journal.finished,
            should_stop=lambda: self.journal.should_stop,
        )
        self.journal.stop_if_asked()

    def with_feedback(self, names: Iterable[str], feedback: Feedback, drift: Drift | None = None, progress: Progress | None = None) -> None:
        def find(job: TensorJob) -> FindCurvature | None:
            found = feedback.curvature(job.row, is_tied=self.is_tied)
            return found if found is None or drift is None else functools.partial(_drifted, found, drift)

        self.execute([replace(job, curvature=find(job), effort=self.effort) for job in self.take(names)], progress)

    def may_be_fed(self) -> list[str]:
        """Return the tensors left that may be encoded with error feedback."""
        has_feedback = functools.partial(may_have_feedback, is_tied=self.is_tied, has_gradients=self.source.is_checkpoint)
        return [name for name, job in self.left.items() if self.order.wants_feedback(name) and has_feedback(job.row)]

    # --- as matrices come ---------------------------------------------------------------------------------------------

    def as_matrices_come(self) -> None:
        """Run the pass that gives the matrices, and encode each layer's tensors with them."""

        def encode_layer(layer: int | None, feedback: Feedback) -> None:
            self.with_feedback([name for name in self.left if tensor_role(name).layer == layer and self.order.wants_feedback(name)], feedback)
            self.journal.save()  # the pass may forget the layer's matrices now

        layers = {tensor_role(name).layer for name in self.may_be_fed()}
        if layers:
            work = self.journal.job.work
            if not layers.isdisjoint(finished_layers(work)):  # a damaged tensor of a layer that it would not show again
                shutil.rmtree(work)
                work.mkdir()
            self.run_pass(encode_layer, layers)

    def run_pass(self, tell: Callable[[int | None, Feedback], None], layers: Collection[int | None] | None = None) -> None:
        """Run the pass that gives the matrices of `layers` (None: all); where it goes layer by layer, it goes on from what lies in the job folder."""
        chunks, settings, work = self.basis.chunks, self.settings, self.journal.job.work
        assert chunks is not None
        n_bytes = kept_bytes(self.source, chunks, settings.max_memory_bytes)
        if n_bytes:
            settings.announce(f"error feedback: up to {n_bytes:,} bytes of hidden states in {work} until it is done")
        run_feedback(
            self.source,
            chunks,
            tell,
            n_threads=settings.n_threads,
            device=settings.device,
            max_memory_bytes=settings.max_memory_bytes,
            progress=self.journal.stopping(settings.progress, between_steps=n_bytes > 0),
            work=work if n_bytes else None,
            wanted=layers,
        )

    # --- in sequence --------------------------------------------------------------------------------------------------

    def in_sequence(self) -> None:
        """Encode what goes without feedback, what belongs to no layer, and then the layers as their inputs become known."""
        fed, chunks, settings = self.may_be_fed(), self.basis.chunks, self.settings
        if not fed:
            return
        assert chunks is not None
        writer = None if self.basis.stored is not None else self.prepared(chunks)
        self.execute(self.take([name for name in self.left if name not in fed]))  # what comes after them is to see them
        self.journal.save()  # so that there is a job to go on with, and the pass with it
        feedback = self.gathered(writer) if writer is not None else self.basis.stored
        assert feedback is not None
        self.with_feedback([name for name in fed if tensor_role(name).layer is None], feedback)

        def encode_input(names: Sequence[str], drift: Drift | None) -> None:
            self.with_feedback(names, feedback, drift, progress=lambda *_: None)  # the sequence's own says how far it is

        run_sequence(
            self.source.path,
            chunks.tokens,
            self.written,
            encode_input,
            wants=self.left.__contains__,
            seed=SEED,
            n_threads=settings.n_threads,
            max_columns=self.order.compensate_columns,
            documents=chunks.documents,
            device=settings.device,
            max_memory_bytes=settings.max_memory_bytes,
            progress=self.journal.stopping(settings.progress, between_steps=False),
        )

    def written(self, name: str) -> Tensor | None:
        """Return a tensor as the file has it by now."""
        if name not in self.journal.logs:
            return None
        part, info = self.places[name]
        return Tensor(name, info.shape, info.type, functools.partial(part.read_rows, info))

    def prepared(self, chunks: Chunks) -> GramWriter:
        """Return what writes the matrices of a pass over the text into the job folder, where they lie until the file is finished, and
        maybe some or all do already."""
        work = self.journal.job.work
        _, holdout = split_holdout(chunks.n_chunks, SEED)
        writer = GramWriter(work / _MATRICES, GramHeader(tuple(int(i) for i in holdout), SEED, SEED, chunks.fingerprint))
        if not self._is_whole(writer, finished_layers(work)):
            logger.warning("matrices in %s are damaged and are collected again", writer.folder)
            shutil.rmtree(work)
            writer = GramWriter(writer.folder, writer.header)
        if not writer.is_complete:
            self._announce_matrices(writer, chunks)
        return writer

    def gathered(self, writer: GramWriter) -> Feedback:
        """Return the matrices of all layers, of a pass over the text where they are not there yet."""
        if not writer.is_complete:
            self.run_pass(lambda layer, feedback: writer(layer, feedback.train, feedback.holdout))
        for path in self.journal.job.work.glob("*.f32"):  # hidden states, which nothing goes on from now
            path.unlink()
        grams = writer.written()
        return Feedback(grams.train, grams.holdout)

    def _is_whole(self, writer: GramWriter, finished: Collection[int]) -> bool:
        """Tell whether the matrices of all layers are there, and can be read, that a run before has finished."""
        layers = {tensor_role(tensor.name).layer for tensor in self.source.tensors} if writer.is_complete else finished
        try:
            writer.require([*layers])
        except InputError:
            return False
        return True

    def _announce_matrices(self, writer: GramWriter, chunks: Chunks) -> None:
        """Say what the matrices take of the disk; raise OutputError where they, and the hidden states of the pass, find no room."""
        shapes = gram_shapes({tensor.name: tensor.shape for tensor in self.source.tensors}, has_gradient=True)
        n_already = sum(path.stat().st_size for path in self.journal.job.work.rglob("*") if path.is_file())
        n_bytes = stored_bytes(shapes, has_gradient=True)
        states = kept_bytes(self.source, chunks, self.settings.max_memory_bytes)
        check_disk(writer.folder, n_bytes + states - n_already, "choose another disk with --job-folder, or give --no-compensate-sequence")
        self.settings.announce(f"error feedback: at most {n_bytes:,} bytes of matrices in {writer.folder} until it is done")


def _drifted(find: FindCurvature, drift: Drift, matrix: int) -> LossCurvature | None:
    curvature = find(matrix)
    return None if curvature is None else replace(curvature, drift=drift)
