"""A file that must pass a gate: written, measured on the selection text, and made better in a fixed order until it passes.

The order: thorough error feedback where it was off or fast; then the tensors whose next type saves most estimated
error per byte, some at a time; then the worst in half precision. Every file is complete and verified, only what changed
is encoded again, and the best is kept aside until it passes, or for good. The calibration text, the text of this module
and the held-out text may not share content.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

from loopgguf.allocation import Choice, improve
from loopgguf.calibration import Chunks
from loopgguf.checkpoint import GATE, Job, State, job_folder, open_stage
from loopgguf.container import part_path
from loopgguf.encode import Order, Reuse
from loopgguf.errors import Interrupted, QualityError, UsageError
from loopgguf.errortable import ErrorTable, Request
from loopgguf.evaluation import measure_quality
from loopgguf.feedback import Compensate
from loopgguf.formats import FLOAT_TYPES, QUANTIZED_TYPES, GgmlType, tensor_bytes
from loopgguf.gate import CheckedResult, Gate, GateResult, GateStep, Reading, below_gate_path, read_quality
from loopgguf.importance import calibration_chunks
from loopgguf.intent import QuantizeRequest, Resolved, measure_table
from loopgguf.manifest import manifest_path
from loopgguf.opening import Settings, cut_text
from loopgguf.pipeline import WriteResult
from loopgguf.planner import Plan, free_requests, measured_types, with_type
from loopgguf.publish import check_outputs, move_published, publish, total_bytes
from loopgguf.source import Source
from loopgguf.splits import refuse_shared

SELECTION_CTX = 512
LEAST_SHARE = 0.7  # of the estimated error that one round of raising leaves at least: errors are estimates, bytes are not
AIM = 0.97  # of the limit, so that the last round does not end just above it

INTENT = "{}, raised to a quality gate"
REASON = "raised to reach the quality gate"

TypeFilter = Callable[[GgmlType], bool]


def refuse_gate(request: QuantizeRequest, gate: Gate) -> None:
    """Raise UsageError where a gate contradicts itself or the rest of a request."""
    if gate.max_kld_nats is None and gate.max_ppl_increase_percent is None:
        raise UsageError(
            "--max-size and --selection-file say how a gate is reached: give --max-kld or --max-ppl-increase too (for the text alone, or --search-minutes or "
            "--compensate-guard), or leave them out"
        )
    for option, limit in (("--max-kld", gate.max_kld_nats), ("--max-ppl-increase", gate.max_ppl_increase_percent)):
        if limit is not None and not 0 < limit < float("inf"):
            raise UsageError(f"{option}: got {limit:g}, expected a number above 0")
    for option, is_given in (("--keep-split", request.keep_split), ("--pure", request.rules.pure)):
        if is_given:
            raise UsageError(f"{option} and a quality gate contradict each other: recovery changes single tensors of one file. Give one of them")


def selection_chunks(source: Source, request: QuantizeRequest, files: tuple[str | Path, ...], settings: Settings, ctx_size: int = SELECTION_CTX) -> Chunks:
    """Return the text that files are chosen on; raise UsageError when it shares content with the calibration or the held-out text."""
    chunks = cut_text(source, files, "selection", ctx_size, None, settings)
    what = f"selection text {', '.join(chunks.names)}"
    refuse_shared(chunks.tokens, what, calibration_chunks(source, request.calibration, settings).tokens, "the calibration text")
    refuse_shared(chunks.tokens, what, cut_text(source, (), "heldout", ctx_size, None, settings).tokens, "the held-out text that reports are made on")
    return chunks


def pass_gate(
    source: Source, resolved: Resolved, request: QuantizeRequest, gate: Gate, output: Path, reference: Path, chunks: Chunks, settings: Settings
) -> CheckedResult:
    """Write `output` so that it passes the gate, and return it with the steps that it took.

    reference: the full-precision GGUF. chunks: of the selection text. Raises UsageError when the first plan is above
    `max_size_bytes` already, QualityError when the gate cannot be reached: the best file is then beside the output, as
    `below_gate_path` names it; all else as `publish.publish`.
    """
    order = replace(resolved.order(request), selection=chunks)
    with _open_gate(settings.job_folder or job_folder(output), below_gate_path(output)) as job:
        recovery = _Recovery(source, resolved, request, gate, output, reference, chunks, settings, job)
        for path, overwrite in ((output, settings.overwrite), (recovery.aside, recovery.may_overwrite), (recovery.trial, recovery.may_overwrite)):
            check_outputs(source, [path], order.inputs, overwrite=overwrite)
        if not recovery.fits(order):
            least = total_bytes(source, order)
            raise UsageError(f"{recovery.size_option}: got {recovery.max_bytes:,} bytes, expected at least the {least:,} of the plan. Plan a smaller file")
        recovery.run(order)
        if not recovery.passes:
            job.finish()
            raise QualityError(f"{recovery.why_not()}. The best file is kept as {recovery.aside}; {gate} was asked for, it has {recovery.reading}")
        move_published(recovery.aside, output)
        job.finish()
    steps = GateResult(gate, chunks.names, recovery.n_scored, tuple(recovery.steps))
    return CheckedResult(**{**vars(recovery.result), "paths": (output,)}, gate=steps)


@contextlib.contextmanager
def _open_gate(folder: Path, aside: Path) -> Iterator[Job]:
    """Open the stage of a gate, whose state says that the file kept aside is of a run that did not end: the next may replace it."""
    with open_stage(folder, GATE, {}) as job:
        try:
            yield job
        finally:
            if not aside.exists():
                job.finish()


@dataclass(eq=False)
class _Recovery:
    """What a gate asks of which model, the best file so far and how it was measured, and what can be tried next."""

    source: Source
    resolved: Resolved
    request: QuantizeRequest
    gate: Gate
    output: Path
    reference: Path
    chunks: Chunks
    settings: Settings
    job: Job
    steps: list[GateStep] = field(default_factory=list)
    is_stopped_by_size: bool = False
    result: WriteResult = field(init=False)
    reading: Reading = field(init=False)
    n_scored: int = field(init=False)

    @cached_property
    def may_overwrite(self) -> bool:
        """Whether files kept aside may be replaced: the user says so, or they are of a run that was stopped or killed."""
        return self.settings.overwrite or self.job.load() is not None

    @property
    def aside(self) -> Path:
        """Where the best file lies."""
        return below_gate_path(self.output)

    @property
    def trial(self) -> Path:
        """Where the next file lies until it is measured."""
        return self.aside.with_name(f"{self.aside.name.removesuffix('.gguf')}.trial.gguf")

    @property
    def max_bytes(self) -> int | None:
        """How large the file may become; a size that was asked for is a promise."""
        sized = self.resolved.sized if self.request.target_kld_nats is None else None  # a KLD promises no size
        budget = sized.budget_bytes if sized is not None else None
        return self.gate.max_size_bytes if self.gate.max_size_bytes is not None else budget

    @property
    def size_option(self) -> str:
        """The option that says so."""
        return "--max-size" if self.gate.max_size_bytes is not None else "--size"

    def run(self, order: Order) -> None:
        """Write and measure the file as it was asked for, then take the steps in their order until it passes."""
        self.attempt("as planned", order)
        order = self._add_feedback(order)
        self._raise(order, "larger types", lambda ggml_type: ggml_type in QUANTIZED_TYPES)
        self._raise(replace(order, plan=self.plan), "half precision", lambda ggml_type: ggml_type in FLOAT_TYPES)

    @property
    def passes(self) -> bool:
        return self.gate.miss(self.reading) <= 1

    @property
    def plan(self) -> Plan:
        return self.result.plan

    def fits(self, order: Order) -> bool:
        return self.max_bytes is None or total_bytes(self.source, order) <= self.max_bytes

    def why_not(self) -> str:
        """Return why recovery ended below the gate."""
        if self.is_stopped_by_size:
            return f"quality gate: not reached within {self.max_bytes:,} bytes"
        return "quality gate: not reached, and no tensor is left that may be raised"

    # --- one file -----------------------------------------------------------------------------------------------------

    def attempt(self, step: str, order: Order) -> None:
        """Write and measure a file; the better of it and the best so far is kept."""
        is_first = not self.steps
        path = self.aside if is_first else self.trial
        settings, is_written = replace(self.settings, overwrite=self.may_overwrite), False
        try:
            if is_first:
                self.job.save(State(1))
            else:  # a trial is not gone on with: what it would be depends on what was measured before it
                settings = replace(settings, job_folder=job_folder(path), resume=False, keep_job=False)
            result = publish(self.source, order, path, settings, ())
            is_written = True
            progress = self.job.stopping(self.settings.progress, self._interrupted)
            quality = measure_quality(path, self.reference, self.chunks.tokens, n_threads=self.settings.n_threads, progress=progress)
            reading = read_quality(quality)
            is_better = is_first or self.gate.miss(reading) < self.gate.miss(self.reading)
            self.steps.append(GateStep(step, None if is_first else self.reading, reading, result.total_bytes, is_better))
            self.settings.announce(f"gate: {self.steps[-1]}")
            if is_better:
                self.result, self.reading, self.n_scored = result, reading, quality.n_scored
                if not is_first:
                    move_published(path, self.aside)
        except Interrupted:
            if is_first and not is_written:  # its tensors are kept, and gone on with
                raise
            raise Interrupted(self._interrupted()) from None
        finally:
            for path in (self.trial, manifest_path(self.trial), part_path(self.trial)):
                path.unlink(missing_ok=True)
            shutil.rmtree(job_folder(self.trial), ignore_errors=True)

    def _interrupted(self, *_: int) -> str:
        return f"interrupted at file {len(self.steps) + 1} of the gate; the same command begins with the first again, and replaces {self.aside}"

    # --- the steps ----------------------------------------------------------------------------------------------------

    def _add_feedback(self, order: Order) -> Order:
        """Encode again with thorough error feedback, where it was not on; return the order that further steps go on from."""
        n_weights = self.source.n_weights
        is_on = order.compensate is not Compensate.OFF and order.compensate.effort(n_weights) is Compensate.FULL.effort(n_weights)
        fuller = replace(order, compensate=Compensate.FULL, reuse=None)  # what is taken over has less of it, or none
        if self.passes or is_on:
            return order
        if not self.fits(fuller):
            self.is_stopped_by_size = True
            return order
        self.attempt("error feedback", fuller)
        return fuller if self.steps[-1].is_better else order

    def _raise(self, order: Order, what: str, allowed: TypeFilter) -> None:
        """Raise the tensors that save most estimated error per byte, some at a time, until the file passes or none is left."""
        while not self.passes:
            plan = self._raised(order, allowed)
            if plan is None:
                return
            changed = [new.name for new, old in zip(plan.rows, order.plan.rows, strict=True) if new.type is not old.type]
            order = replace(order, plan=plan)
            if not self.fits(order):
                self.is_stopped_by_size = True
                return
            self.attempt(f"{what} for {len(changed)} tensors, {changed[0]} first", replace(order, reuse=Reuse.of(self.result, self.aside, plan)))

    def _raised(self, order: Order, allowed: TypeFilter) -> Plan | None:
        """Return the plan of an order with the worst tensors raised; None where none may be, or fits."""
        plan = replace(order.plan, intent=INTENT.format(self.resolved.plan.intent))
        rows = {row.name: row for row in plan.rows}
        names = [request.tensor.name for request in self.requests]
        choices = [_choices(request, self.table, rows[request.tensor.name].type, allowed) for request in self.requests]
        items = [[choice for _, choice in item] for item in choices]
        target = sum(item[0].error for item in items) * max(LEAST_SHARE, AIM / self.gate.miss(self.reading))
        most = self.max_bytes
        room = None if most is None else most - total_bytes(self.source, replace(order, plan=plan))
        stay = (0,) * len(items)
        picks = improve(items, stay, target, room)
        if picks == stay:
            self.is_stopped_by_size = improve(items, stay, target, None) != stay
            return None
        types = {name: item[pick][0] for name, item, pick in zip(names, choices, picks, strict=True) if pick}
        has = self.resolved.importance.has if self.resolved.importance is not None else lambda _: False
        raised = [with_type(row, types[row.name], REASON, has_importance=has(row.name)) if row.name in types else row for row in plan.rows]
        return replace(plan, rows=tuple(raised))

    @cached_property
    def requests(self) -> tuple[Request, ...]:
        """The tensors that may be raised: no rule of the user's names their type."""
        has = self.resolved.importance.has if self.resolved.importance is not None else None
        planned = {row.name: row.type for row in self.resolved.plan.rows}
        free = free_requests(self.source.tensors, self.source.metadata, self.request.rules, has)
        return tuple(replace(r, types=tuple(dict.fromkeys((planned[r.tensor.name], *r.types)))) for r in free)

    @cached_property
    def table(self) -> ErrorTable:
        """What every type would do to every tensor that may be raised; measured when it is first needed."""
        return measure_table(self.source, self.requests, self.resolved.importance, self.request, self.settings)


def _choices(request: Request, table: ErrorTable, now: GgmlType, allowed: TypeFilter) -> list[tuple[GgmlType, Choice]]:
    """Return the type a tensor has now, and those allowed, with their bytes and estimated errors."""
    errors = {ggml_type: damage.estimated_error for ggml_type, damage in measured_types(request, table)}
    types = [now, *(t for t in errors if t is not now and allowed(t))]
    return [(t, Choice(tensor_bytes(t, request.tensor.shape), errors.get(t, 0.0))) for t in types]
