"""What a request to quantize comes to: a plan, and the importance it is executed with, whichever way it is given.

A preset, a profile, a size or a saved plan; the imatrix is given, made before, or made now. Writes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from loopgguf.calibration import Chunks
from loopgguf.checkpoint import StopRequest
from loopgguf.compensate import COLUMN_BLOCK
from loopgguf.encode import Order, Reuse
from loopgguf.errors import UsageError
from loopgguf.errortable import FEEDBACK_GAINS, ErrorTable, Request, Sampling, measure_errors, tilted
from loopgguf.evaluation import Measure
from loopgguf.feedback import Compensate
from loopgguf.formats import GgmlType
from loopgguf.gate import Gate
from loopgguf.importance import (
    ImatrixRequest,
    Importance,
    calibration_chunks,
    find_sensitivities,
    given_importance,
    made_importance,
    planned_importance,
    stored_sensitivities,
)
from loopgguf.opening import Settings, model_name
from loopgguf.planfile import check_plan, imatrix_digest, load_plan
from loopgguf.planner import (
    OUTPUT,
    Override,
    Plan,
    SizedPlan,
    TypeRules,
    budget_for_kld,
    describe_sized,
    meant_for_kld,
    plan_preset,
    plan_profile,
    plan_size,
    size_problem,
)
from loopgguf.presets import read_facts
from loopgguf.profile import load_profile
from loopgguf.protection import DEFAULT_COVERAGE, NOTHING_FOUND, Protection, known_mask, known_super_weights, plan_protection, refuse_bad_coverage
from loopgguf.publish import total_bytes
from loopgguf.sensitivity import Sensitivities
from loopgguf.source import Source
from loopgguf.super_weights import Mask

DEFAULT_PROFILE = "balanced"
GATE_BYTES = 1024  # of a size that was asked for, kept for the metadata that a search, a guard, or a gate and its recovery, add


@dataclass(frozen=True)
class Search:
    """How long to look for a better plan of the same size, and on which selection text (default: the one that ships)."""

    minutes: float
    files: tuple[str | Path, ...] = ()


@dataclass(frozen=True)
class KindGuard:
    """Kinds of tensors go without error feedback where it makes the file worse on a selection text: that of `files`, default the
    one that ships."""

    files: tuple[str | Path, ...] = ()


@dataclass(frozen=True)
class QuantizeRequest:
    """What to make of a model: a preset, a size, a saved plan or a profile, the rules on top, and which imatrix weighs the columns."""

    profile: str | Path | None = None  # None: `balanced`; with a size: no profile
    quant_type: str | None = None
    size_bytes: int | None = None
    target_bpw: float | None = None  # of the whole file
    target_kld_nats: float | None = None  # that the smallest such file is estimated at
    plan: Path | None = None
    exact_errors: bool = False
    use_gradients: bool = True  # a checkpoint's, for the errors that a plan by size rests on
    rules: TypeRules = field(default_factory=TypeRules)
    imatrix: Path | None = None
    use_imatrix: bool = True
    calibration: ImatrixRequest = field(default_factory=ImatrixRequest)
    compensate: Compensate = Compensate.OFF
    compensate_columns: int | None = None  # of a Gram matrix that feedback takes together, a multiple of 256; None: all
    compensate_sequence: bool | None = None  # each layer for the inputs that it gets in the file; None: where that is cheap
    guard: KindGuard | None = None
    search: Search | None = None
    gate: Gate | None = None  # what the finished file must reach
    protect_super_weights: bool = False
    super_weight_coverage: float = DEFAULT_COVERAGE
    super_weight_budget_bytes: int = 0  # that raised types may cost, for the mask's sake
    keep_split: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class Resolved:
    """What a request comes to: the plan, the importance it is executed with (None where it needs none), notes."""

    plan: Plan
    importance: Importance | None = None
    notes: tuple[str, ...] = ()
    sized: SizedPlan | None = None
    protection: Protection | None = None
    selection: Chunks | None = None  # the text that the plan was chosen on, where it was, or what goes without feedback
    plain_kinds: frozenset[str] = frozenset()  # of tensors that go without feedback
    reuse: Reuse | None = None
    predicted_kld_nats: Measure | None = None  # of the file with plain encoders, from others that were measured on that text

    def order(self, request: QuantizeRequest) -> Order:
        """Return what is to be written."""
        inputs = [path for path in (request.imatrix, request.plan, request.profile, *request.calibration.files) if path is not None]
        return Order(
            plan=self.plan,
            importance=self.importance,
            imatrix=request.imatrix,
            compensate=request.compensate,
            compensate_columns=request.compensate_columns,
            compensate_sequence=request.compensate_sequence,
            plain_kinds=self.plain_kinds,
            reuse=self.reuse,
            calibration=request.calibration,
            protection=self.protection,
            keep_split=request.keep_split,
            selection=self.selection,
            predicted_kld_nats=self.predicted_kld_nats if request.compensate is Compensate.OFF else None,
            inputs=tuple(Path(path) for path in inputs),
        )


def resolve(source: Source, request: QuantizeRequest, settings: Settings) -> Resolved:
    """Return the plan of a request, whichever way it is given, and the importance it needs.

    A dry run makes no imatrix: it plans with the one made before, or with what one would cover. Raises UsageError for
    what cannot be met, InputError for a bad imatrix, plan or calibration text.
    """
    if not _wants_protection(request):
        return _resolve(source, request, settings)
    _refuse_protection(request)
    return _protect(source, request, settings)


def _wants_protection(request: QuantizeRequest) -> bool:
    """Tell whether super weights are to be protected, by the request or by its profile."""
    return request.protect_super_weights or (request.profile is not None and load_profile(request.profile).protect_super_weights)


def _refuse_protection(request: QuantizeRequest) -> None:
    """Raise UsageError where protection contradicts the rest of a request."""
    refuse_bad_coverage(request.super_weight_coverage)
    if not request.use_imatrix:
        raise UsageError(
            "--protect-super-weights (or a profile that asks for it) and --no-imatrix contradict each other: a weight is protected by its importance. "
            "Give one of them"
        )
    if request.super_weight_budget_bytes and is_sized(request):
        raise UsageError("--super-weight-budget and a size contradict each other: the size says what the file may take. Give one of them")


def refuse_feedback_options(request: QuantizeRequest) -> None:
    """Raise UsageError where feedback cannot take that many columns together, or there is none and no gate that may turn it on."""
    n, is_off = request.compensate_columns, request.compensate is Compensate.OFF and request.gate is None
    for option, is_given in (("--compensate-columns", n is not None), ("--[no-]compensate-sequence", request.compensate_sequence is not None)):
        if is_given and is_off:
            raise UsageError(f"{option} says how error feedback goes: give --compensate auto, fast or full too, or leave it out")
    if n is not None and (n < COLUMN_BLOCK or n % COLUMN_BLOCK):
        raise UsageError(f"--compensate-columns: got {n}, expected a multiple of {COLUMN_BLOCK}, in which blocks of weights stay whole. Give 4096, for example")


def is_sized(request: QuantizeRequest) -> bool:
    """Tell whether a request's types are solved for, by a size or by an estimated KLD."""
    return request.size_bytes is not None or request.target_bpw is not None or request.target_kld_nats is not None


def _protect(source: Source, request: QuantizeRequest, settings: Settings) -> Resolved:
    """Return the plan with what protects the super weights; a plan by size is solved again around the types that they need."""
    resolved = _resolve(source, request, settings)
    found, origin = known_super_weights(
        source, request.imatrix, lambda: calibration_chunks(source, request.calibration, settings), settings, may_run=not request.dry_run
    )
    if found is None:
        note = "super weights: a dry run does not look for them; types may be raised when they are found"
        return replace(resolved, notes=(*resolved.notes, note), protection=Protection(NOTHING_FOUND, Mask({}, request.super_weight_coverage)))
    importance = resolved.importance
    statistics = importance.statistics if importance is not None else None
    mask = Mask({}, request.super_weight_coverage)
    if statistics is not None:
        mask = known_mask(source, statistics, request.imatrix, request.super_weight_coverage, settings)
    notes = [f"super weights: {len(found.weights)}, {origin}"]
    protection = Protection(found, mask)
    raised: dict[str, GgmlType] = {}
    rules = request.rules
    while True:
        get = resolved.importance or (lambda _name: None)
        plan, protection, said = plan_protection(source, resolved.plan, protection, get, request.super_weight_budget_bytes)
        raised |= protection.raised
        if not (is_sized(request) and protection.raised):
            break
        rules = with_pins(rules, plan, protection.raised)
        resolved = _resolve(source, replace(request, rules=rules), settings)
    return replace(resolved, plan=plan, notes=(*resolved.notes, *notes, *said), protection=replace(protection, raised=raised))


def with_pins(rules: TypeRules, plan: Plan, names: Collection[str]) -> TypeRules:
    """Return the rules with the types that these tensors have in a plan asked for by name."""
    pins = (Override(f"^{re.escape(row.name)}$", row.type) for row in plan.rows if row.name in names)
    return replace(rules, overrides=(*pins, *rules.overrides))


def _resolve(source: Source, request: QuantizeRequest, settings: Settings) -> Resolved:
    if request.plan is not None:
        return _resolve_saved(source, request.plan, request, settings)
    given = given_importance(source, request.imatrix) if request.imatrix is not None else None
    if is_sized(request):
        return _resolve_size(source, request, given, settings)
    if given is not None or not request.use_imatrix:
        return Resolved(_plan(source, request, given), given, given.notes if given is not None else ())
    # what cannot be met is refused before an imatrix is made; one that turns out to lack a tensor is planned with as it is
    preview = _plan(source, request, planned_importance(source))
    if not any(row.uses_imatrix for row in preview.rows):
        return Resolved(preview)
    made = made_importance(source, request.calibration, settings, dry_run=request.dry_run)
    return Resolved(_plan(source, request, made), made, made.notes)


def _resolve_size(source: Source, request: QuantizeRequest, given: Importance | None, settings: Settings) -> Resolved:
    """Measure what every type does to every tensor, and solve for the size."""
    if request.target_kld_nats is not None and not (source.is_checkpoint and request.use_gradients):
        raise UsageError(
            f"--target-kld: {source.path.name} gives no gradients, without which errors are no KLD in nats. Give the checkpoint folder, or a --size and "
            "--max-kld, which measures"
        )
    importance = given or (made_importance(source, request.calibration, settings) if request.use_imatrix else None)
    profile = load_profile(request.profile) if request.profile is not None else None
    problem = size_problem(source.tensors, source.metadata, request.rules, importance.has if importance is not None else None, profile)

    def measure_file(plan: Plan) -> int:
        return total_bytes(source, Resolved(plan, importance).order(request))

    table = measure_table(source, problem.requests, importance, request, settings)
    if request.target_kld_nats is not None:
        budget_bytes = budget_for_kld(problem, table, request.target_kld_nats, measure_file)
    else:
        budget_bytes = request.size_bytes if request.size_bytes is not None else int((request.target_bpw or 0.0) * source.n_weights / 8)
    has_more_metadata = any(part is not None for part in (request.gate, request.search, request.guard))
    sized = plan_size(problem, table, budget_bytes, measure_file, GATE_BYTES if has_more_metadata and request.target_kld_nats is None else 0)
    if request.target_kld_nats is not None:
        sized = meant_for_kld(sized, request.target_kld_nats, measure_file)
    notes = (*(importance.notes if importance is not None else ()), *describe_sized(sized, table))
    return Resolved(sized.plan, importance, notes, sized)


def measure_table(source: Source, requests: Sequence[Request], importance: Importance | None, request: QuantizeRequest, settings: Settings) -> ErrorTable:
    """Return what types do to weights, under the importance and the gradients of a request: those beside its imatrix, or for a
    checkpoint folder those of a pass. With error feedback they are what it leaves of them."""
    gradients = _find_gradients(source, request, settings) if request.use_gradients else None
    with StopRequest() as stop:
        table = measure_errors(
            requests,
            importance.statistics if importance is not None else None,
            source_fingerprint=source.fingerprint,
            n_layer=read_facts(source.metadata).n_layer,
            is_tied=all(tensor.name != OUTPUT for tensor in source.tensors),
            gradients=gradients,
            sampling=Sampling(is_exact=request.exact_errors),
            n_threads=settings.n_threads,
            progress=stop.stopping(settings.progress, _interrupted),
        )
    has_feedback = request.compensate is not Compensate.OFF and importance is not None
    return tilted(table, FEEDBACK_GAINS) if has_feedback and gradients is not None else table


def _find_gradients(source: Source, request: QuantizeRequest, settings: Settings) -> Sensitivities | None:
    stored = stored_sensitivities(request.imatrix)
    return find_sensitivities(source, request.calibration, settings) if stored is None and source.is_checkpoint else stored


def _interrupted(done: int, total: int) -> str:
    return f"interrupted after the errors of {done} of {total} tensors; they are kept in the cache. Run the same command again to go on"


def _resolve_saved(source: Source, path: Path, request: QuantizeRequest, settings: Settings) -> Resolved:
    """Read a plan, and see that it is of this model, that the importance is the one it was made with, and its size exact."""
    saved = load_plan(path)
    check_plan(saved, source.tensors, model_name(source.path))
    if not any(row.uses_imatrix for row in saved.plan.rows):
        return Resolved(saved.plan)
    importance = given_importance(source, request.imatrix) if request.imatrix is not None else made_importance(source, request.calibration, settings)
    without = next((row.name for row in saved.plan.rows if row.uses_imatrix and not importance.has(row.name)), None)
    if without is not None or (saved.imatrix_sha256 is not None and imatrix_digest(saved.plan, importance) != saved.imatrix_sha256):
        raise UsageError(f"{path} was made with another imatrix than {importance.origin.name}: give the same one with --imatrix, or plan again")
    return Resolved(saved.plan, importance, importance.notes)


def _plan(source: Source, request: QuantizeRequest, importance: Importance | None) -> Plan:
    has_importance = importance.has if importance is not None else None
    if request.quant_type is not None:
        return plan_preset(source.tensors, source.metadata, request.quant_type, request.rules, has_importance)
    return plan_profile(source.tensors, source.metadata, load_profile(request.profile or DEFAULT_PROFILE), request.rules, has_importance)
