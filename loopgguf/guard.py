"""Error feedback by kind of tensor, made sure of by measuring: a kind loses it where the file is seen to be further off with it.

Held-out matrices accept or refuse feedback tensor by tensor (`compensate.py`), which is a layer's view of the loss. Here
the whole file is written with feedback, and then once for each kind (queries, keys, …) with the plain encoder's bytes for
that kind alone, all other tensors taken over; both are run on some chunks of selection text. A kind goes without feedback in
the file that is published where the mean KLD is higher with it by a one-sided paired t test over chunks, at `LEVEL`. The
burden of proof lies on dropping it, for held-out tokens have accepted it already: the sign of a mean alone would drop half of
all kinds to which feedback does nothing, and with them those to which it does a little good. Each kind has a test of its own,
without a correction for their number, as a kind that is dropped by chance costs no more than what it was worth, which is
little, or chance would not have hidden it. Pairs of kinds are not tried.

In sequence the tensors that a trial takes over make up for the kind as it is with feedback, which speaks for keeping it; where
one is dropped, the file that is published is encoded anew, for other inputs, and is not measured again.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from scipy.special import stdtrit

from loopgguf.architectures import tensor_role
from loopgguf.calibration import Chunks
from loopgguf.checkpoint import GUARD, Job, State, open_stage
from loopgguf.encode import Order, Reuse, encoding_fields, find_basis
from loopgguf.errors import Interrupted, UsageError
from loopgguf.evaluation import Measure, Quality, compare_paired, measure_quality
from loopgguf.feedback import Compensate
from loopgguf.intent import QuantizeRequest, Resolved
from loopgguf.opening import Settings
from loopgguf.pipeline import WriteResult
from loopgguf.publish import publish
from loopgguf.recovery import selection_chunks
from loopgguf.source import Source
from loopgguf.splits import tokens_sha256

N_CHUNKS = 16  # of the selection text, evenly spread: a kind's effect shows on few, for pairs of files differ by little else
MIN_CHUNKS = 4  # below which a difference has hardly an error bar
LEVEL = 0.05  # how often a kind that feedback neither serves nor harms is dropped


def refuse_guard(request: QuantizeRequest) -> None:
    """Raise UsageError where a guard contradicts the rest of a request."""
    if request.compensate is Compensate.OFF:
        raise UsageError("--compensate-guard measures what error feedback is worth: give --compensate auto, fast or full too, or leave it out")
    if request.keep_split:
        raise UsageError("--keep-split and --compensate-guard contradict each other: a guard runs single files. Give one of them")


def guard_chunks(source: Source, request: QuantizeRequest, settings: Settings) -> Chunks:
    """Return the text that kinds are measured on; raises UsageError where it is too short, or as `recovery.selection_chunks`."""
    assert request.guard is not None
    chunks = selection_chunks(source, request, request.guard.files, settings)
    n_chunks, n_ctx = chunks.tokens.shape
    if n_chunks < MIN_CHUNKS:
        raise UsageError(
            f"--compensate-guard: got {n_chunks} chunks of {n_ctx} tokens of selection text, expected at least {MIN_CHUNKS}. Give more with --selection-file"
        )
    return chunks


@dataclass(frozen=True)
class KindOutcome:
    """How much higher the mean KLD is with feedback for one kind of tensor than without, in nats, the mean over n_chunks paired
    chunks, and whether the kind keeps it."""

    kind: str
    difference_nats: Measure
    n_chunks: int

    @property
    def is_kept(self) -> bool:
        error = self.difference_nats.standard_error
        return error is None or self.difference_nats.value <= float(stdtrit(self.n_chunks - 1, 1 - LEVEL)) * error

    def __str__(self) -> str:
        error = "" if self.difference_nats.standard_error is None else f" ± {self.difference_nats.standard_error:.2g}"
        return f"feedback for {self.kind}: mean KLD {self.difference_nats.value:+.3g}{error}, {'kept' if self.is_kept else 'left to the plain encoder'}"


def guard_kinds(source: Source, resolved: Resolved, request: QuantizeRequest, reference: Path, chunks: Chunks, settings: Settings, folder: Path) -> Resolved:
    """Return the request resolved so that kinds of tensors which feedback harms go without it, and a note on each kind.

    reference: the full-precision GGUF. chunks: `guard_chunks`. folder: the command's job folder, in which at most two
    files lie while they are measured; the one with feedback stays to be taken over, until `drop_stage`. What was found stays
    for a run that goes on. Raises Interrupted when the user stops it, of which nothing is kept; else as `publish.publish`.
    """
    spread = np.linspace(0, len(chunks.tokens) - 1, min(N_CHUNKS, len(chunks.tokens))).astype(int)
    order = resolved.order(request)
    basis = find_basis(source, order, settings)
    fingerprint = {**encoding_fields(source, order, basis, settings), "selection text": tokens_sha256(chunks.tokens)}
    with open_stage(folder, GUARD, fingerprint, resume=settings.resume) as job:
        state, reuse = job.load(), None
        if state is None:
            shutil.rmtree(job.work)  # a killed run's
            guard = _Guard(source, order, reference, replace(chunks, tokens=chunks.tokens[spread]), settings, job)
            try:
                outcomes, reuse = guard.run()
            except BaseException:
                shutil.rmtree(job.work, ignore_errors=True)  # of which nothing is gone on with
                raise
            plain = [outcome.kind for outcome in outcomes if not outcome.is_kept]
            state = State(1, facts={"plain": plain, "notes": [str(outcome) for outcome in outcomes]})
            job.save(state)
        plain_kinds, said = state.facts["plain"], state.facts["notes"]
    assert isinstance(plain_kinds, list) and isinstance(said, list)
    if basis.is_sequential and plain_kinds:  # what comes after those kinds is encoded for other inputs then, also where a run goes on
        reuse = None
    return replace(resolved, plain_kinds=frozenset(plain_kinds), reuse=reuse, notes=(*resolved.notes, *said), selection=chunks)


@dataclass(eq=False)
class _Guard:
    """The file with feedback wherever held-out matrices accept it, and what others are measured against."""

    source: Source
    order: Order
    reference: Path
    chunks: Chunks
    settings: Settings
    job: Job

    def run(self) -> tuple[list[KindOutcome], Reuse]:
        """Return the outcome of each kind that feedback changed, and the tensors that the final file takes over."""
        fed = self.job.work / "feedback.gguf"
        result = self._write(fed, self.order)
        kinds = sorted({tensor_role(name).kind for name, log in result.logs.items() if any(part.damping is not None for part in log.feedback)})
        with_all = self._measure(fed) if kinds else None
        outcomes = [self._try(kind, fed, result, with_all) for kind in kinds if with_all is not None]
        return outcomes, _without(Reuse.of(result, fed, result.plan), {outcome.kind for outcome in outcomes if not outcome.is_kept})

    def _try(self, kind: str, fed: Path, result: WriteResult, with_all: Quality) -> KindOutcome:
        trial = self.job.work / "trial.gguf"
        self._write(trial, replace(self.order, plain_kinds=frozenset({kind}), reuse=_without(Reuse.of(result, fed, result.plan), {kind})))
        outcome = KindOutcome(kind, compare_paired(with_all, self._measure(trial)).mean_kld_difference_nats, with_all.n_chunks)
        trial.unlink()
        self.settings.announce(f"guard: {outcome}")
        return outcome

    def _write(self, path: Path, order: Order) -> WriteResult:
        announce = self.settings.announce if order.reuse is None else (lambda line: None)  # a trial has nothing new to say
        settings = replace(self.settings, job_folder=None, resume=False, overwrite=True, keep_job=False, announce=announce)
        try:
            return publish(self.source, order, path, settings, ())
        except Interrupted:
            raise Interrupted(self._interrupted()) from None

    def _measure(self, path: Path) -> Quality:
        progress = self.job.stopping(self.settings.progress, self._interrupted)
        return measure_quality(path, self.reference, self.chunks.tokens, n_threads=self.settings.n_threads, progress=progress)

    def _interrupted(self, *_: int) -> str:
        return "interrupted in the guard of error feedback, of which nothing is kept: the same command measures anew"


def _without(reuse: Reuse, kinds: set[str]) -> Reuse:
    """Return what is taken over but for the tensors of some kinds."""
    return replace(reuse, tensors={name: tensor for name, tensor in reuse.tensors.items() if tensor_role(name).kind not in kinds})
