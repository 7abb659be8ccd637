"""A plan by size, made better by measuring: where estimates rank kinds of tensors wrongly, swaps of the same bytes set it right.

The first swap is for llama-quantize's best preset within the size. Every other plans the size anew with the estimated errors
of one kind of tensor taken for twice or for half what they are: its tensors get larger types and others pay for them, or
the other way round. Both files are run on selection text, a few chunks first, which drops most swaps early, then chunks
that this swap has not seen; it stays where the mean KLD falls by more than `CERTAIN` paired standard errors, for one
standard error would let a sixth of all idle swaps pass. In the end the plan must beat the one it began with on chunks that
no swap has seen, or the latter is kept. Trials are written with plain encoders, and only what changed is encoded again. All
that was measured also says how far estimates are off as a whole, so that the KLD of the plan that stays is predicted in
nats. Where a KLD was asked for and not a size, the plan is in the end made again for other sizes, until a file measures no
more and little less.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loopgguf.architectures import tensor_role
from loopgguf.calibration import Chunks
from loopgguf.checkpoint import SEARCH, Job, State, content_key, open_stage
from loopgguf.encode import Reuse
from loopgguf.errors import Interrupted, UsageError
from loopgguf.errortable import ErrorTable, Tilt, tilted
from loopgguf.evaluation import Measure, Quality, compare_paired, measure_qualities
from loopgguf.feedback import Compensate
from loopgguf.intent import QuantizeRequest, Resolved, is_sized, measure_table, with_pins
from loopgguf.opening import Settings, model_fields, model_name
from loopgguf.pipeline import WriteResult
from loopgguf.planfile import SavedPlan, load_plan, save_plan
from loopgguf.planner import Plan, SizedPlan, SizeProblem, budget_for_kld, plan_preset, plan_size, size_problem
from loopgguf.profile import load_profile
from loopgguf.publish import publish, total_bytes
from loopgguf.recovery import selection_chunks
from loopgguf.source import Source
from loopgguf.splits import tokens_sha256

SEARCH_CTX = 256
MIN_CHUNKS = 12
FACTORS = (2.0, 0.5)
CERTAIN = 2.5  # paired standard errors
MAX_AIMS = 6  # files that are written to find the size of a KLD
CLOSE = 0.98  # of a KLD that was asked for: enough
AIM = 0.99  # of it, as what falls short by little is made once more

Tokens = NDArray[np.int32]


def refuse_search(request: QuantizeRequest) -> None:
    """Raise UsageError where a search contradicts the rest of a request."""
    assert request.search is not None
    if not is_sized(request):
        raise UsageError("--search-minutes looks for a better plan of the same size: give --size or --target-bpw too, or leave it out")
    if request.keep_split:
        raise UsageError("--keep-split and --search-minutes contradict each other: a search runs single files. Give one of them")
    if not 0 < request.search.minutes < float("inf"):
        raise UsageError(f"--search-minutes: got {request.search.minutes:g}, expected a number above 0")


def search_chunks(source: Source, request: QuantizeRequest, settings: Settings) -> Chunks:
    """Return the text that swaps are measured on; raises UsageError where it is too short, or as `recovery.selection_chunks`."""
    assert request.search is not None
    chunks = selection_chunks(source, request, request.search.files, settings, SEARCH_CTX)
    if len(chunks.tokens) < MIN_CHUNKS:
        raise UsageError(
            f"--search-minutes: got {len(chunks.tokens)} chunks of {SEARCH_CTX} tokens of selection text, expected at least {MIN_CHUNKS}. "
            "Give more with --selection-file"
        )
    return chunks


@dataclass(frozen=True)
class Swap:
    """One swap that was tried: what was changed, by how much the mean KLD rose on the last chunks it saw, and whether it stays."""

    what: str
    difference_nats: Measure
    is_kept: bool

    def __str__(self) -> str:
        error = "" if self.difference_nats.standard_error is None else f" ± {self.difference_nats.standard_error:.2g}"
        return f"{self.what}: mean KLD {self.difference_nats.value:+.3g}{error}, {'kept' if self.is_kept else 'dropped'}"


@dataclass(frozen=True)
class _File:
    """A written file, and what came of writing it."""

    path: Path
    result: WriteResult

    @property
    def plan(self) -> Plan:
        return self.result.plan


def search_plan(source: Source, resolved: Resolved, request: QuantizeRequest, reference: Path, chunks: Chunks, settings: Settings, folder: Path) -> Resolved:
    """Return the request's plan made better by swaps, with a note on each that was kept and on the end.

    reference: the full-precision GGUF. chunks: `search_chunks`. folder: the command's job folder, in which trial files lie
    while they are measured, at most three at a time, and where the plan that was found stays for a run that goes on, until
    `drop_stage`. Raises Interrupted when the user stops it, of which nothing is kept; else as `publish.publish`.
    """
    assert resolved.sized is not None and request.search is not None
    fingerprint = {
        **model_fields(source, settings),
        "plan": resolved.plan.hash,
        "selection text": tokens_sha256(chunks.tokens),
        "search-minutes": request.search.minutes,
    }
    with open_stage(folder, SEARCH, fingerprint, resume=settings.resume) as job:
        found, state = job.shards / "plan.json", job.load()
        if state is None:
            state = State(1, facts=_search(source, resolved, request, reference, chunks, settings, job, found))
            job.save(state)
        plan, said, predicted = load_plan(found).plan, state.facts["notes"], state.facts["predicted"]
    assert isinstance(said, list) and (predicted is None or isinstance(predicted, list))
    return replace(resolved, plan=plan, notes=(*resolved.notes, *said), selection=chunks, predicted_kld_nats=Measure(*predicted) if predicted else None)


def _search(
    source: Source, resolved: Resolved, request: QuantizeRequest, reference: Path, chunks: Chunks, settings: Settings, job: Job, found: Path
) -> dict[str, object]:
    """Search, write the plan to `found`, and return what there is to say of it and the KLD it is predicted, [nats, error] or None."""
    assert resolved.sized is not None and request.search is not None
    try:
        shutil.rmtree(job.work)  # a killed run's
        search = _Search(source, resolved, resolved.sized, request, reference, chunks.tokens, settings, job)
        plan = search.run(time.monotonic() + 60 * request.search.minutes)
        if request.target_kld_nats is not None:
            plan = search.aim(plan, request.target_kld_nats)
    finally:
        shutil.rmtree(job.work, ignore_errors=True)
    save_plan(SavedPlan(plan, model_name(source.path), resolved.sized.total_bytes, None), found, overwrite=True)
    notes = [*(f"search: {swap}" for swap in search.swaps if swap.is_kept), search.verdict]
    if search.aimed is not None:
        return {"notes": [*notes, search.aimed[0]], "predicted": [search.aimed[1].value, search.aimed[1].standard_error]}
    predicted = predict(search.measured, search.estimate(plan))
    if predicted is None:
        return {"notes": notes, "predicted": None}
    factor = predicted.value / search.estimate(plan)
    how = "" if request.compensate is Compensate.OFF else " with plain encoders"  # which trials are written with
    notes.append(f"search: files{how} have {factor:.3g} times their estimated KLD; {predicted.value:.4g} ± {predicted.standard_error:.2g} nats are predicted")
    return {"notes": notes, "predicted": [predicted.value, predicted.standard_error]}


@dataclass(eq=False)
class _Search:
    """The best file so far, the tilt of the errors that it was planned with, and all swaps that were tried."""

    source: Source
    resolved: Resolved
    sized: SizedPlan
    request: QuantizeRequest
    reference: Path
    tokens: Tokens
    settings: Settings
    job: Job
    swaps: list[Swap] = field(default_factory=list)
    measured: list[tuple[float, float]] = field(default_factory=list)  # estimated and measured mean KLD of a file on some chunks
    verdict: str = ""
    aimed: tuple[str, Measure] | None = None  # what came of the search for a KLD, and the KLD that was measured
    n_written: int = 0
    tilt: Tilt = field(default_factory=dict)
    tried: set[str] = field(default_factory=set)  # plans that are no better than the best there is

    def __post_init__(self) -> None:
        importance, request = self.resolved.importance, self.request
        profile = load_profile(request.profile) if request.profile is not None else None
        has = importance.has if importance is not None else None
        rules, protection = request.rules, self.resolved.protection
        if protection is not None:  # no swap may take from a super weight the type that keeps it
            asked = {row.name for row in self.resolved.plan.rows if row.reason.startswith("--")} - protection.raised.keys()
            rules = with_pins(rules, self.resolved.plan, ({weight.name for weight in protection.found.weights} | protection.raised.keys()) - asked)
        self.problem: SizeProblem = size_problem(self.source.tensors, self.source.metadata, rules, has, profile)
        self.table = measure_table(self.source, self.problem.requests, importance, request, self.settings)
        order = np.random.default_rng(0).permutation(len(self.tokens))
        n_last = max(len(order) // 4, 3)
        self.unseen, self.pool = self.tokens[order[:n_last]], self.tokens[order[n_last:]]
        self.first = self.best = self._write(self.resolved.plan, None)

    def run(self, deadline: float) -> Plan:
        """Try swaps until none is left or time is up; return the plan that the last chunks confirm."""
        for what, plan, tilt in self._swaps():
            if time.monotonic() > deadline:
                break
            self._try(what, plan, tilt)
        n_kept = sum(swap.is_kept for swap in self.swaps)
        if not n_kept:
            n = len(self.swaps)
            self.verdict = f"search: {n} swaps tried, none is better than the plan" if n else "search: no swap changed the plan before the time was up"
            return self.first.plan
        difference = self._difference(self.best, self.first, self.unseen)
        is_better = _is_certain(difference)
        what = f"mean KLD {difference.value:+.3g} ± {difference.standard_error or 0:.2g} on chunks no swap has seen"
        self.verdict = f"search: {len(self.swaps)} swaps tried, {n_kept} kept, {what}{'' if is_better else ': not confirmed, the first plan stays'}"
        return self.best.plan if is_better else self.first.plan

    def aim(self, plan: Plan, target_nats: float) -> Plan:
        """Return the plan of the smallest file that was seen to have at most this mean KLD; of the best file where none has.

        plan: of the first or the best file. Each file tells by how much estimates are off at its size, and so the next size.
        Raises UsageError where that is out of reach.
        """
        is_searched = plan is self.best.plan
        table, file = tilted(self.table, self.tilt if is_searched else {}), self.best if is_searched else self.first
        seen = [(file, self._kld(file))]
        while len(seen) < MAX_AIMS and not CLOSE * target_nats <= seen[-1][1].value <= target_nats:
            before, kld = seen[-1]
            wanted = self._plan_for(target_nats, kld.value / _estimate(table, before.plan), table)
            if any(_types(wanted) == _types(found.plan) for found, _ in seen):
                break  # no file is between, or none is smaller
            file = self._write(wanted, before)
            before.path.unlink()
            seen.append((file, self._kld(file)))

        def rank(found: tuple[_File, Measure]) -> tuple[bool, float]:
            is_above = found[1].value > target_nats
            return is_above, found[1].value if is_above else found[0].result.total_bytes

        file, kld = min(seen, key=rank)
        error = f" ± {kld.standard_error:.2g}" if kld.standard_error is not None else ""
        missed = f"; {target_nats:g} was not reached" if kld.value > target_nats else ""
        self.aimed = f"target: mean KLD {kld.value:.4g}{error} on selection text, with plain encoders, by {len(seen)} files{missed}", kld
        return file.plan

    def _plan_for(self, target_nats: float, factor: float, table: ErrorTable) -> Plan:
        """Return the plan of the smallest file with this KLD, where files have `factor` times their estimate."""
        try:
            budget_bytes = budget_for_kld(self.problem, table, AIM * target_nats / factor, self._file_bytes)
        except UsageError as error:
            raise UsageError(f"--target-kld {target_nats:g}: files have {factor:.3g} times their estimated KLD, so it is out of reach ({error})") from None
        return self._searched(plan_size(self.problem, table, budget_bytes, self._file_bytes).plan)

    def _searched(self, plan: Plan) -> Plan:
        """Return a plan with what was asked for as its intent, whatever size it was solved for."""
        return replace(plan, intent=f"{self.resolved.plan.intent}, searched")

    def _kld(self, file: _File) -> Measure:
        """Return the mean KLD of a file on the chunks of swaps."""
        return self._measure([file], self.pool)[0].mean_kld_nats

    def _swaps(self) -> Iterator[tuple[str, Plan, Tilt]]:
        """Yield what each swap is, its plan, and its tilt."""
        preset = self._preset()
        if preset is not None:
            yield preset[0], preset[1], self.tilt
        for kind, factor in self._tilts():
            tilt = {**self.tilt, kind: self.tilt.get(kind, 1.0) * factor}
            plan = plan_size(self.problem, tilted(self.table, tilt), self.sized.budget_bytes, self._file_bytes, self.sized.kept_bytes).plan
            yield f"{kind} {'up' if factor > 1 else 'down'}", plan, tilt

    def _preset(self) -> tuple[str, Plan] | None:
        """Return llama-quantize's best preset within the size, what it is and as a plan; None where there is none."""
        if self.sized.best_preset is None:
            return None
        what, problem = f"preset {self.sized.best_preset[0]}", self.problem
        preset = plan_preset(problem.tensors, problem.metadata, self.sized.best_preset[0], problem.rules, problem.has_importance)
        types = {row.name: row.type for row in preset.rows}
        plan = problem.plan(what, {request.tensor.name: types[request.tensor.name] for request in problem.requests}, f"{what}, measured")
        return (what, plan) if self._file_bytes(plan) + self.sized.kept_bytes <= self.sized.budget_bytes else None

    def _tilts(self) -> Iterator[tuple[str, float]]:
        """Yield (kind, factor), those of the largest estimated error first; a round after each that kept one."""
        errors: dict[str, float] = {}
        for row in self.table.rows.values():
            kind = tensor_role(row.name).kind
            errors[kind] = errors.get(kind, 0.0) + max(damage.estimated_error for damage in row.damages)
        while True:
            before = sum(swap.is_kept for swap in self.swaps)
            for kind in sorted(errors, key=lambda kind: -errors[kind]):
                for factor in FACTORS:
                    yield kind, factor
            if sum(swap.is_kept for swap in self.swaps) == before:
                return

    def _try(self, what: str, plan: Plan, tilt: Tilt) -> None:
        key = content_key(*_types(plan).items())
        if key in self.tried or _types(plan) == _types(self.best.plan):
            return
        trial = self._write(self._searched(plan), self.best)
        chunks = np.roll(self.pool, len(self.swaps) * (len(self.pool) // 3), axis=0)
        few, rest = chunks[: len(chunks) // 3], chunks[len(chunks) // 3 :]
        difference = self._difference(trial, self.best, few)
        if difference.value < 0:
            difference = self._difference(trial, self.best, rest)
        is_kept = difference.value < 0 and _is_certain(difference)
        self.swaps.append(Swap(what, difference, is_kept))
        self.settings.announce(f"search: {self.swaps[-1]}")
        loser = self.best if is_kept else trial
        if loser is not self.first:
            loser.path.unlink()
        if is_kept:
            self.best, self.tilt, self.tried = trial, tilt, set()
        else:
            self.tried.add(key)

    def _difference(self, a: _File, b: _File, tokens: Tokens) -> Measure:
        """Return the mean KLD of a less that of b, in nats."""
        qualities = self._measure([a, b], tokens)
        self.measured += [(self.estimate(file.plan), quality.mean_kld_nats.value) for file, quality in zip((a, b), qualities, strict=True)]
        return compare_paired(*qualities).mean_kld_difference_nats

    def estimate(self, plan: Plan) -> float:
        """Return the estimated KLD of a plan, whatever the tilt that it was made with."""
        return _estimate(self.table, plan)

    def _measure(self, files: Sequence[_File], tokens: Tokens) -> list[Quality]:
        progress = self.job.stopping(self.settings.progress, self._interrupted)
        return measure_qualities([file.path for file in files], self.reference, tokens, n_threads=self.settings.n_threads, progress=progress)

    def _interrupted(self, *_: int) -> str:
        return f"interrupted at swap {len(self.swaps) + 1} of the search, of which nothing is kept: the same command searches anew"

    def _file_bytes(self, plan: Plan) -> int:
        return total_bytes(self.source, replace(self.resolved.order(self.request), plan=plan))

    def _write(self, plan: Plan, like: _File | None) -> _File:
        """Write a plan with plain encoders, taking over what it shares with a file."""
        reuse = Reuse.of(like.result, like.path, plan) if like is not None else None
        order = replace(self.resolved.order(self.request), plan=plan, compensate=Compensate.OFF, reuse=reuse)
        path = self.job.work / f"{self.n_written}.gguf"
        self.n_written += 1
        settings = replace(self.settings, job_folder=None, resume=False, overwrite=True, keep_job=False)
        try:
            return _File(path, publish(self.source, order, path, settings, ()))
        except Interrupted:
            raise Interrupted(self._interrupted()) from None


def _is_certain(difference: Measure) -> bool:
    return difference.standard_error is not None and difference.value < -CERTAIN * difference.standard_error


def _estimate(table: ErrorTable, plan: Plan) -> float:
    damages = (table.rows[row.name].damage(row.type) for row in plan.rows if row.name in table.rows)
    return sum(damage.estimated_error for damage in damages if damage is not None)


def predict(measured: Sequence[tuple[float, float]], estimate: float) -> Measure | None:
    """Return the KLD that a file of this estimate is predicted to have, from (estimated, measured) of others.

    One factor for all, the geometric mean of measured ÷ estimated; the error is the spread of single files about it, over
    plans and chunks. None where fewer than three were measured, or estimates are 0.
    """
    logs = np.log([kld / estimated for estimated, kld in measured if estimated > 0 and kld > 0])
    if len(logs) < 3:
        return None
    predicted = estimate * float(np.exp(logs.mean()))
    return Measure(predicted, predicted * float(logs.std(ddof=1)))


def _types(plan: Plan) -> dict[str, str]:
    return {row.name: row.type.name for row in plan.rows}
