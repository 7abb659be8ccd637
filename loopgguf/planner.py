"""(tensors, metadata, intent) → Plan: one row per tensor with its type, exact bytes and the reason. Pure functions.

Four intents: a preset of llama-quantize (`plan_preset`), a profile of rules (`plan_profile`), the best file of a size
(`plan_size`, on measured errors), a plain conversion (`plan_conversion`). All share llama-quantize's order: what is
never quantized, then forced types, then overrides, then the intent, then the fallback for rows that are no whole
blocks. Whatever cannot work is refused here, before any work.
Reads no weights and writes nothing. Sources: llama-quant.cpp (`llama_tensor_get_type`), conversion/base.py.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property

from loopgguf.allocation import Choice, Solution, efficient, reachable_bytes, smallest_budget, solve, total
from loopgguf.architectures import tensor_role
from loopgguf.container import Metadata, Shape, plan_layout, uint32
from loopgguf.errors import UsageError
from loopgguf.errortable import DEFAULT_TYPES, Basis, ErrorTable, Request, TypeDamage, candidate_types
from loopgguf.formats import (
    FLOAT_TYPES,
    FORMATS,
    GGUF_ALIGNMENT,
    IMATRIX_IGNORED,
    INTEGER_TYPES,
    QUANTIZED_TYPES,
    GgmlType,
    fallback_type,
    fits_row,
    padded,
    parse_type,
    tensor_bytes,
)
from loopgguf.presets import PRESETS, Preset, choose_types, find_preset, is_embedding, read_facts, requires_imatrix, why_kept
from loopgguf.profile import Profile, Rule, check_regex
from loopgguf.source import Tensor

OUTPUT = "output.weight"
MAX_NAMED = 3  # tensors that an error names before it only counts

HasImportance = Callable[[str], bool]
_INFORMATION = frozenset({"estimated_error", "explanation"})  # fields of a row that do not change a byte of the file


# --- the plan ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PlanRow:
    """What becomes of one tensor. `reason`: the rule that chose the type; `fallback`: why not `wanted`, or ''."""

    name: str
    shape: Shape
    source_type: GgmlType
    type: GgmlType
    n_bytes: int
    reason: str
    fallback: str = ""
    uses_imatrix: bool = False
    wanted: GgmlType | None = None  # the type that the reason asked for, where a fallback was needed
    estimated_error: float | None = None  # of a plan by size, in the error table's unit
    explanation: str = ""  # of a plan by size: what the neighbouring types would save or cost

    @property
    def n_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def is_encoded(self) -> bool:
        """Whether the bytes are made anew, not copied."""
        return self.type is not self.source_type


@dataclass(frozen=True)
class Plan:
    """One row per tensor in file order, the intent it came from, and the value of `general.file_type`."""

    intent: str  # "profile balanced" or "preset Q4_K_M"
    file_type: int
    rows: tuple[PlanRow, ...]

    @property
    def tensor_bytes(self) -> int:
        return sum(row.n_bytes for row in self.rows)

    @property
    def n_weights(self) -> int:
        return sum(row.n_weights for row in self.rows)

    @property
    def reasons(self) -> Mapping[str, int]:
        """How many tensors each rule decided, in the order of the rows: overrides that were given among them."""
        return Counter(row.reason for row in self.rows)

    @property
    def without_importance(self) -> tuple[str, ...]:
        """Tensors encoded in a type that heeds an imatrix, but without data for them."""
        return tuple(row.name for row in self.rows if row.is_encoded and _heeds_importance(row.type) and not row.uses_imatrix)

    @property
    def hash(self) -> str:
        """A sha256 over everything that decides the bytes: the intent and each row."""
        return hashlib.sha256(to_json(self).encode()).hexdigest()


def to_json(plan: Plan) -> str:
    """Return what decides the bytes as canonical JSON: sorted keys, no spaces, types by name; estimates are left out."""

    def plain(items: list[tuple[str, object]]) -> dict[str, object]:
        return {key: value.name if isinstance(value, GgmlType) else value for key, value in items if key not in _INFORMATION}

    return json.dumps(asdict(plan, dict_factory=plain), sort_keys=True, separators=(",", ":"), ensure_ascii=True)


def bits_per_weight(plan: Plan) -> float:
    """Return 8 × the bytes of all tensors, norms included, over the number of weights, as llama-quantize prints it."""
    return 8 * plan.tensor_bytes / max(plan.n_weights, 1)


def file_bytes(plan: Plan, metadata: Metadata) -> int:
    """Return the exact size of the one file that holds this metadata and the planned tensors."""
    return plan_layout(metadata, [(row.name, row.type, row.shape) for row in plan.rows]).total_bytes


def label_of(file_type: int) -> str:
    """Return the name of the preset that a value of `general.file_type` stands for."""
    return next((preset.name for preset in PRESETS.values() if preset.file_type == file_type), "MIXED")


def nearest_label(plan: Plan) -> str:
    """Return the name of the preset that `general.file_type` of the plan stands for."""
    return label_of(plan.file_type)


def summarize_fallbacks(plan: Plan) -> str | None:
    """Return one line on what fallbacks cost and what would not need any; None when nothing fell back.

    For example `181 of 211 tensors fall back: 4.94 instead of 4.51 bpw. Types that fit rows of 576: Q4_0, …`.
    """
    fallen = [row for row in plan.rows if row.wanted is not None]
    if not fallen:
        return None
    n_bits_wanted = 8 * plan.tensor_bytes - sum(8 * row.n_bytes - FORMATS[row.wanted].bpw * row.n_weights for row in fallen if row.wanted is not None)
    without = n_bits_wanted / plan.n_weights
    n_candidates = sum(row.type not in FLOAT_TYPES or row.wanted is not None for row in plan.rows)
    widths = ", ".join(str(n) for n in sorted({row.shape[-1] for row in fallen}))
    fitting = [t.name for t in sorted(QUANTIZED_TYPES) if all(fits_row(t, row.shape[-1]) for row in fallen)]
    return (
        f"{len(fallen)} of {n_candidates} tensors fall back: {bits_per_weight(plan):.2f} instead of {without:.2f} bpw. "
        f"Types that fit rows of {widths}: {', '.join(fitting) or 'F16, BF16, F32'}"
    )


# --- rules on top of the intent ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Override:
    """`REGEX=TYPE`: gives `type` to the tensors in whose name `pattern` is found."""

    pattern: str
    type: GgmlType

    def __str__(self) -> str:
        return f"--tensor-type {self.pattern}={self.type.name}"


def parse_overrides(texts: Iterable[str]) -> tuple[Override, ...]:
    """Return the overrides of `--tensor-type REGEX=TYPE …` in their order.

    A pattern is searched in the name with Python's `re`, unanchored, as llama-quantize does with std::regex: write
    `^blk\\.3\\.ffn_down\\.weight$` to mean one tensor. The FIRST match wins, as in llama-quantize. Raises UsageError
    for a text without `=`, an empty or bad pattern, an unknown type, or a pattern given twice.
    """
    overrides: list[Override] = []
    for text in texts:
        pattern, equals, type_name = text.rpartition("=")
        if not equals or not pattern or not type_name:
            raise UsageError(f"--tensor-type: got {text[:80]!r}, expected REGEX=TYPE such as attn_v=Q6_K")
        check_regex(pattern, "--tensor-type")
        if any(pattern == other.pattern for other in overrides):
            raise UsageError(f"--tensor-type: got the pattern {pattern[:80]!r} twice, expected each once (the first match wins). Remove one")
        try:
            overrides.append(Override(pattern, parse_type(type_name)))
        except UsageError as error:
            raise UsageError(f"--tensor-type {text[:80]}: {error}") from None
    return tuple(overrides)


@dataclass(frozen=True)
class TypeRules:
    """What the user asks for on top of a preset or a profile, under llama-quantize's names."""

    overrides: tuple[Override, ...] = ()
    output_type: GgmlType | None = None
    token_embedding_type: GgmlType | None = None
    pure: bool = False
    leave_output: bool = False
    allow_requantize: bool = False


_Choice = tuple[GgmlType, str]  # a type and the reason for it


def _first_match(overrides: Sequence[Override], name: str) -> Override | None:
    return next((override for override in overrides if re.search(override.pattern, name)), None)


def _forced_type(rules: TypeRules, name: str, is_tied: bool) -> _Choice | None:
    """What `--token-embedding-type` and `--output-tensor-type` say about this tensor."""
    override = _first_match(rules.overrides, name)
    is_named = override is not None and name == "per_layer_token_embd.weight"  # a large table of its own: a pattern wins there
    if rules.token_embedding_type is not None and is_embedding(name) and not is_named:
        return rules.token_embedding_type, "--token-embedding-type"
    if rules.output_type is None:
        return None
    is_tied_head = is_tied and is_embedding(name) and override is None and not rules.pure
    return (rules.output_type, "--output-tensor-type") if name == OUTPUT or is_tied_head else None


def _pin(rules: TypeRules, name: str, is_tied: bool) -> _Choice | None:
    """What the user asked for this very tensor, in llama-quantize's order; None leaves it to the intent."""
    forced = _forced_type(rules, name, is_tied)
    override = _first_match(rules.overrides, name)
    return forced or ((override.type, str(override)) if override is not None else None)


def _refuse_contradictions(rules: TypeRules, names: Sequence[str]) -> None:
    is_tied = OUTPUT not in names
    if rules.leave_output and rules.output_type is not None:
        raise UsageError("--leave-output-tensor and --output-tensor-type contradict each other: give one of them")
    if rules.leave_output and is_tied:
        raise UsageError(f"--leave-output-tensor: the model has no {OUTPUT}, its token embeddings are the output: use --token-embedding-type BF16 instead")


def _refuse_idle(rules: TypeRules, pins: Mapping[str, _Choice], names: Sequence[str], kept: Mapping[str, str]) -> None:
    """Raise UsageError for a wish that no tensor fulfils: silently ignoring it would make another file than asked for."""
    in_effect = {reason for _, reason in pins.values()}
    for override in rules.overrides:
        if str(override) in in_effect:
            continue
        matching = [name for name in names if re.search(override.pattern, name)]
        if not matching:
            raise UsageError(f"{override}: the pattern matches no tensor of the model. Names are like blk.0.attn_v.weight; --dry-run lists them")
        unkept = [name for name in matching if name not in kept]
        why = f"an option given before decides about {unkept[0]}: {pins[unkept[0]][1]}" if unkept else f"{matching[0]} is never quantized ({kept[matching[0]]})"
        raise UsageError(f"{override}: the pattern changes no tensor, for {why}. Remove it or change its pattern")
    flags = {"--output-tensor-type": rules.output_type, "--token-embedding-type": rules.token_embedding_type}
    for flag, ggml_type in flags.items():
        if ggml_type is not None and flag not in in_effect:
            raise UsageError(f"{flag} {ggml_type.name}: no tensor of the model takes it (tied embeddings, or another option decides). Remove it")


# --- putting rows together --------------------------------------------------------------------------------------------


def _heeds_importance(ggml_type: GgmlType) -> bool:
    return ggml_type in QUANTIZED_TYPES and ggml_type not in IMATRIX_IGNORED


def _kept_type(tensor: Tensor) -> GgmlType:
    """A tensor that is not quantized stays as it is, but half-precision norms and the like become F32, which loses nothing."""
    return GgmlType.F32 if tensor.type in FLOAT_TYPES and _is_always_f32(tensor.name, tensor.shape) else tensor.type


def _row(tensor: Tensor, choice: _Choice, has_importance: HasImportance | None) -> PlanRow:
    wanted, reason = choice
    try:
        ggml_type = fallback_type(wanted, tensor.n_in)
    except UsageError as error:
        raise UsageError(f"tensor {tensor.name}: {error}") from None
    has_data = has_importance is not None and has_importance(tensor.name)
    return PlanRow(
        name=tensor.name,
        shape=tensor.shape,
        source_type=tensor.type,
        type=ggml_type,
        n_bytes=tensor_bytes(ggml_type, tensor.shape),
        reason=reason,
        fallback="" if ggml_type is wanted else f"rows of {tensor.n_in} are no multiple of {FORMATS[wanted].block}, as {wanted.name} needs",
        uses_imatrix=has_data and ggml_type is not tensor.type and _heeds_importance(ggml_type),
        wanted=None if ggml_type is wanted else wanted,
    )


def with_type(row: PlanRow, ggml_type: GgmlType, reason: str, *, has_importance: bool) -> PlanRow:
    """Return the row of a plan with another type, which must fit it, and the reason for it."""
    uses_imatrix = has_importance and ggml_type is not row.source_type and _heeds_importance(ggml_type)
    n_bytes = tensor_bytes(ggml_type, row.shape)
    return replace(
        row, type=ggml_type, n_bytes=n_bytes, reason=reason, fallback="", wanted=None, uses_imatrix=uses_imatrix, estimated_error=None, explanation=""
    )


def _named(rows: Sequence[PlanRow]) -> str:
    names = ", ".join(f"{row.name} ({row.type.name})" for row in rows[:MAX_NAMED])
    return names + (f" and {len(rows) - MAX_NAMED} more" if len(rows) > MAX_NAMED else "")


def _refuse_unmeetable(plan: Plan, *, allow_requantize: bool, preset_name: str = "") -> Plan:
    """Return the plan if every row can be encoded; else raise UsageError naming the tensors and the way out."""
    encoded = [row for row in plan.rows if row.is_encoded]
    again = [row for row in encoded if row.source_type in QUANTIZED_TYPES]
    if again and not allow_requantize:
        raise UsageError(
            f"the source is already quantized: {again[0].name} is {again[0].source_type.name}, and {len(again)} tensors would be quantized again. "
            f"Start from an F16, BF16 or F32 model, or pass --allow-requantize and accept the loss"
        )
    blind = [row for row in encoded if not row.uses_imatrix and requires_imatrix(row.name, row.type, preset_name)]
    if blind:
        remedy = "run without --no-imatrix, give an --imatrix that covers them, or choose other types (--tensor-type)"
        raise UsageError(f"{_named(blind)} cannot be encoded without imatrix data: {remedy}")
    return plan


def _plan(
    intent: str,
    file_type: int,
    tensors: Sequence[Tensor],
    rules: TypeRules,
    has_importance: HasImportance | None,
    choose_rest: Callable[[Mapping[str, str], Mapping[str, _Choice]], Mapping[str, _Choice]],
    architecture: str,
    preset_name: str = "",
) -> Plan:
    """Settle what is kept and what is pinned, let `choose_rest(kept, pins)` choose the types of all others, make the rows."""
    names = [tensor.name for tensor in tensors]
    _refuse_contradictions(rules, names)
    kept = {
        tensor.name: why
        for tensor in tensors
        if (why := "integers" if tensor.type in INTEGER_TYPES else why_kept(tensor.name, tensor.shape, architecture, leave_output=rules.leave_output))
    }
    wishes = {name: _pin(rules, name, OUTPUT not in names) for name in names if name not in kept}
    pins = {name: pin for name, pin in wishes.items() if pin is not None}
    _refuse_idle(rules, pins, names, kept)
    choices = {**choose_rest(kept, pins), **pins, **{t.name: (_kept_type(t), f"kept: {kept[t.name]}") for t in tensors if t.name in kept}}
    plan = Plan(intent, file_type, tuple(_row(tensor, choices[tensor.name], has_importance) for tensor in tensors))
    return _refuse_unmeetable(plan, allow_requantize=rules.allow_requantize, preset_name=preset_name)


# --- the three intents ------------------------------------------------------------------------------------------------


def plan_preset(
    tensors: Sequence[Tensor], metadata: Metadata, preset: Preset | str, rules: TypeRules | None = None, has_importance: HasImportance | None = None
) -> Plan:
    """Return what llama-quantize would make of the model under a preset, tensor by tensor.

    tensors: in file order, by layer and then name (which the mixtures count by). has_importance: tells whether imatrix
    data exist for a tensor; None when there is no imatrix at all, which some presets answer with larger types.
    Differs from llama-quantize only where that ignores a wish in silence: under F16, BF16 and F32 overrides apply here,
    so does `output_type` to tied embeddings, and an option that changes nothing is refused; and half-precision norms
    become F32. Raises UsageError for anything that cannot be met.
    """
    preset = find_preset(preset) if isinstance(preset, str) else preset
    rules = rules or TypeRules()
    facts = read_facts(metadata)

    def choose_rest(kept: Mapping[str, str], pins: Mapping[str, _Choice]) -> Mapping[str, _Choice]:
        reason = f"preset {preset.name}" + (" --pure" if rules.pure else "")
        rest = [tensor.name for tensor in tensors if tensor.name not in kept and tensor.name not in pins]
        if rules.pure:
            return dict.fromkeys(rest, (preset.default, reason))
        shapes = [(tensor.name, tensor.shape) for tensor in tensors]
        types = choose_types(facts, preset, shapes, has_imatrix=has_importance is not None, pinned={*kept, *pins})
        return {name: (types[name], reason) for name in rest}

    intent = _intent(f"preset {preset.name}", rules)
    return _plan(intent, preset.file_type, tensors, rules, has_importance, choose_rest, facts.architecture, preset.name)


def plan_profile(
    tensors: Sequence[Tensor], metadata: Metadata, profile: Profile, rules: TypeRules | None = None, has_importance: HasImportance | None = None
) -> Plan:
    """Return the plan of a profile: the first rule that applies decides, else the default; overrides win over both.

    Arguments as for `plan_preset`. Raises UsageError for anything that cannot be met, `--pure` among it.
    """
    rules = rules or TypeRules()
    if rules.pure:
        raise UsageError(f"--pure makes all tensors of one type, profile {profile.name} mixes them: use --quant-type with --pure, or leave one out")
    facts = read_facts(metadata)
    is_tied = all(tensor.name != OUTPUT for tensor in tensors)

    def choose(name: str) -> _Choice:
        for number, rule in enumerate(profile.rules, 1):
            if rule.type is not None and rule.applies(name, facts.n_layer, is_tied=is_tied):
                return rule.type, f"profile {profile.name}, rule {number}: {rule}"
        return profile.default, f"profile {profile.name}, default"

    def choose_rest(kept: Mapping[str, str], pins: Mapping[str, _Choice]) -> Mapping[str, _Choice]:
        return {tensor.name: choose(tensor.name) for tensor in tensors if tensor.name not in kept and tensor.name not in pins}

    return _plan(_intent(f"profile {profile.name}", rules), profile.file_type, tensors, rules, has_importance, choose_rest, facts.architecture)


def _intent(base: str, rules: TypeRules) -> str:
    """Return the intent in the words of the command line."""
    parts = [base, *(str(override) for override in rules.overrides)]
    for flag, value in (("--output-tensor-type", rules.output_type), ("--token-embedding-type", rules.token_embedding_type)):
        parts += [f"{flag} {value.name}"] if value is not None else []
    return " ".join([*parts, *(["--pure"] if rules.pure else []), *(["--leave-output-tensor"] if rules.leave_output else [])])


# --- the best file of a size ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SizedPlan:
    """A plan within a budget, and what is known about how good it is.

    solution: over the tensors that were free. reachable_bytes: the smallest and the largest file under the same rules.
    best_preset: of llama-quantize's presets that fit the budget under the same rules, name and estimated error of the
    best; taken as it is (`is_preset`) should it be estimated better.
    """

    plan: Plan
    budget_bytes: int
    total_bytes: int
    reachable_bytes: tuple[int, int]
    solution: Solution
    best_preset: tuple[str, float] | None
    is_preset: bool = False
    kept_bytes: int = 0  # of the budget, for metadata to come


@dataclass(frozen=True)
class SizeProblem:
    """A model, the rules about it, and what is therefore free: each free tensor with the types it may have.

    profile: its rules with a `type` pin tensors, its floors and ceilings narrow their types, its `types` those of all
    tensors; its default means nothing when a size is asked for.
    """

    tensors: Sequence[Tensor]
    metadata: Metadata
    rules: TypeRules
    has_importance: HasImportance | None
    profile: Profile | None
    requests: tuple[Request, ...]

    def plan(self, intent: str, types: Mapping[str, GgmlType], reason: str) -> Plan:
        """Return the plan that gives the free tensors these types."""
        dominant = max(
            PRESETS.values(), key=lambda preset: sum(r.tensor.n_rows * r.tensor.n_in for r in self.requests if types[r.tensor.name] is preset.default)
        )

        def choose_rest(_kept: Mapping[str, str], _pins: Mapping[str, _Choice]) -> Mapping[str, _Choice]:
            return {**{name: (ggml_type, reason) for name, ggml_type in types.items()}, **self._profile_pins()}

        architecture = read_facts(self.metadata).architecture
        return _plan(_intent(intent, self.rules), dominant.file_type, self.tensors, self.rules, self.has_importance, choose_rest, architecture)

    def _profile_pins(self) -> Mapping[str, _Choice]:
        return {} if self.profile is None else _profile_pins(self.profile, self.tensors, read_facts(self.metadata).n_layer)

    def _items(self, table: ErrorTable) -> list[list[Choice]]:
        """Return the choices of each free tensor, in the order of its request's types, as the solver wants them."""
        return [
            [Choice(_padded_bytes(request.tensor, t, self.metadata), damage.estimated_error) for t, damage in measured_types(request, table)]
            for request in self.requests
        ]


def _padded_bytes(tensor: Tensor, ggml_type: GgmlType, metadata: Metadata) -> int:
    alignment = metadata.get("general.alignment", uint32(GGUF_ALIGNMENT)).data  # as `plan_layout` pads
    assert isinstance(alignment, int)
    return padded(tensor_bytes(ggml_type, tensor.shape), alignment)


def measured_types(request: Request, table: ErrorTable) -> list[tuple[GgmlType, TypeDamage]]:
    """Return the types of a request that hold its weights, each with what it does to them."""
    row = table.rows[request.tensor.name]
    return [(t, damage) for t in request.types if (damage := row.damage(t)) is not None]


def _profile_pins(profile: Profile, tensors: Sequence[Tensor], n_layer: int) -> dict[str, _Choice]:
    """Return what the rules with a type say, for the tensors that one of them is about."""
    is_tied = all(tensor.name != OUTPUT for tensor in tensors)
    pins: dict[str, _Choice] = {}
    for number, rule in enumerate(profile.rules, 1):
        for tensor in tensors:
            if rule.type is not None and tensor.name not in pins and rule.applies(tensor.name, n_layer, is_tied=is_tied):
                pins[tensor.name] = rule.type, f"profile {profile.name}, rule {number}: {rule}"
    return pins


def _within_bounds(types: Sequence[GgmlType], name: str, bounds: Sequence[Rule]) -> tuple[GgmlType, ...]:
    """Return the types between the floors and ceilings; raise UsageError where none is."""
    low = max((FORMATS[rule.floor].bpw for rule in bounds if rule.floor is not None), default=0.0)
    high = min((FORMATS[rule.ceiling].bpw for rule in bounds if rule.ceiling is not None), default=math.inf)
    kept = tuple(t for t in types if low <= FORMATS[t].bpw <= high)
    if not kept:
        raise UsageError(
            f"tensor {name}: got the types {', '.join(t.name for t in types)}, expected one of {low:g} to {high:g} bits, as the profile asks. Widen its limits"
        )
    return kept


def free_requests(
    tensors: Sequence[Tensor], metadata: Metadata, rules: TypeRules, has_importance: HasImportance | None, profile: Profile | None = None
) -> tuple[Request, ...]:
    """Return the tensors whose type no rule and no profile names, each with the types it may have; arguments as for `plan_preset`."""
    facts = read_facts(metadata)
    is_tied = all(tensor.name != OUTPUT for tensor in tensors)
    pinned = _profile_pins(profile, tensors, facts.n_layer) if profile is not None else {}
    types = profile.types if profile is not None and profile.types else DEFAULT_TYPES
    limits = [rule for rule in profile.rules if rule.type is None] if profile is not None else []
    requests: list[Request] = []

    def choose_rest(kept: Mapping[str, str], pins: Mapping[str, _Choice]) -> Mapping[str, _Choice]:
        for tensor in tensors:
            if not {tensor.name}.isdisjoint((*kept, *pins, *pinned)):
                continue
            possible = candidate_types(tensor, types, has_importance=has_importance is not None and has_importance(tensor.name))
            bounds = [rule for rule in limits if rule.applies(tensor.name, facts.n_layer, is_tied=is_tied)]
            requests.append(Request(tensor, _within_bounds(possible, tensor.name, bounds)))
        return {**{r.tensor.name: (r.tensor.type, "free") for r in requests}, **pinned}

    _plan("size", 0, tensors, rules, has_importance, choose_rest, facts.architecture)
    return tuple(requests)


def size_problem(
    tensors: Sequence[Tensor],
    metadata: Metadata,
    rules: TypeRules | None = None,
    has_importance: HasImportance | None = None,
    profile: Profile | None = None,
) -> SizeProblem:
    """Return what has to be measured (`requests`) and solved to plan a size; arguments as for `plan_preset`.

    Raises UsageError for rules that cannot be met.
    """
    rules = rules or TypeRules()
    if rules.pure:
        raise UsageError("--pure makes all tensors of one type, a size is met by mixing them: use --quant-type with --pure, or leave one out")
    requests = free_requests(tensors, metadata, rules, has_importance, profile)
    if not requests:
        raise UsageError("a size was asked for, but the rules given (--tensor-type and the like) leave no tensor free. Leave one of them out")
    return SizeProblem(tensors, metadata, rules, has_importance, profile, requests)


@dataclass(frozen=True)
class _Frame:
    """What a size problem comes to for the solver, and back: choices, plans drawn from picks, and the bytes around them."""

    problem: SizeProblem
    table: ErrorTable
    measure_file: Callable[[Plan], int]

    @cached_property
    def items(self) -> list[list[Choice]]:
        return self.problem._items(self.table)

    @cached_property
    def choices(self) -> list[list[GgmlType]]:
        return [[t for t, _ in measured_types(request, self.table)] for request in self.problem.requests]

    @cached_property
    def ends(self) -> tuple[list[int], list[int]]:
        """The picks of the smallest and of the largest file."""
        sizes = [[choice.n_bytes for choice in item] for item in self.items]
        return [item.index(min(item)) for item in sizes], [item.index(max(item)) for item in sizes]

    def draw(self, picks: Sequence[int], intent: str, reason: str = "") -> Plan:
        names = [request.tensor.name for request in self.problem.requests]
        return self.problem.plan(intent, {n: types[k] for n, types, k in zip(names, self.choices, picks, strict=True)}, reason)

    def reachable_bytes(self, intent: str) -> tuple[int, int]:
        smallest, largest = (self.measure_file(self.draw(picks, intent)) for picks in self.ends)
        return smallest, largest

    def fixed_bytes(self, intent: str) -> int:
        """What a file has besides the choices; the header's size depends on them only in whether it names an imatrix."""
        return max(size - total(self.items, picks)[0] for size, picks in zip(self.reachable_bytes(intent), self.ends, strict=True))


def _size_intent(budget_bytes: int) -> str:
    return f"size {budget_bytes} bytes"


def budget_for_kld(problem: SizeProblem, table: ErrorTable, target_nats: float, measure_file: Callable[[Plan], int]) -> int:
    """Return the bytes of the smallest file whose estimated KLD is at most `target_nats`, for `plan_size`; within a ten-thousandth.

    Raises UsageError where a tensor's error is no estimate of the KLD in nats, or where no file reaches the target.
    """
    without = [name for name, row in table.rows.items() if row.basis is not Basis.GRADIENTS]
    if without:
        raise UsageError(
            f"--target-kld: got no gradients for {len(without)} of {len(table.rows)} tensors ({without[0]} among them), expected them for all: without, errors "
            "are no KLD in nats. Give the checkpoint folder, or a --size and --max-kld, which measures"
        )
    frame = _Frame(problem, table, measure_file)
    room = smallest_budget(frame.items, target_nats)
    if room is None:
        least = sum(min(choice.error for choice in item) for item in frame.items)
        raise UsageError(f"--target-kld: got {target_nats:g}, expected at least {least:.3g}, the estimate of the best file under these rules")
    return room + frame.fixed_bytes(_size_intent(10 * room))


def plan_size(problem: SizeProblem, table: ErrorTable, budget_bytes: int, measure_file: Callable[[Plan], int], kept_bytes: int = 0) -> SizedPlan:
    """Return the plan of least estimated error whose file has at most `budget_bytes`, exact to the byte.

    table: the measured errors of `problem.requests`. measure_file: the exact bytes of the finished file (or files) of a
    plan, header and padding included. kept_bytes: of the budget, kept for metadata that `measure_file` does not know.
    Raises UsageError naming the reachable interval when the budget is outside it.
    """
    frame, intent = _Frame(problem, table, measure_file), _size_intent(budget_bytes)
    items, choices, reason = frame.items, frame.choices, f"least error within {budget_bytes:,} bytes"
    smallest, largest = frame.reachable_bytes(intent)
    reachable = smallest + kept_bytes, largest + kept_bytes
    if not reachable[0] <= budget_bytes <= reachable[1]:
        raise UsageError(
            f"size: got {budget_bytes:,} bytes, expected {reachable[0]:,} to {reachable[1]:,}, which is what this model can be under these rules. "
            f"Ask for a size between, or change the rules"
        )
    room = max(budget_bytes - kept_bytes - frame.fixed_bytes(intent), reachable_bytes(items)[0])
    solution = solve(items, room)
    preset, is_preset = _best_preset(problem, items, choices, room), False
    if preset is not None and preset[1].error < solution.error * (1 - _TIE):
        solution, is_preset = preset[1], True
        reason = f"preset {preset[0]}, estimated better than the solver's plan"
    plan = _explain(frame.draw(solution.picks, intent, reason), problem, table, solution)
    total_bytes = measure_file(plan)
    assert total_bytes + kept_bytes <= budget_bytes, (total_bytes, kept_bytes, budget_bytes)
    best = (preset[0], preset[1].error) if preset is not None else None
    return SizedPlan(plan, budget_bytes, total_bytes, reachable, solution, best, is_preset, kept_bytes)


def meant_for_kld(sized: SizedPlan, target_nats: float, measure_file: Callable[[Plan], int]) -> SizedPlan:
    """Return a plan whose size followed from a KLD with that for its intent: what was asked for, and what the file will say of itself."""
    plan = replace(sized.plan, intent=sized.plan.intent.replace(_size_intent(sized.budget_bytes), f"target KLD {target_nats:g}", 1))
    return replace(sized, plan=plan, total_bytes=measure_file(plan))


def describe_sized(sized: SizedPlan, table: ErrorTable) -> list[str]:
    """Return what a user should know of a plan by size, a line each."""
    bases = Counter(row.basis.value for row in table.rows.values())
    rests_on = "gradients" if set(bases) == {"gradients"} else f"a prior per kind of tensor for {bases['prior']} of {len(table.rows)} tensors (no gradients)"
    solution = sized.solution
    lines = [
        f"size: {sized.total_bytes:,} of {sized.budget_bytes:,} bytes; reachable are {sized.reachable_bytes[0]:,} to {sized.reachable_bytes[1]:,}",
        f"estimated error {solution.error:.4g} nats per token, at most {100 * solution.gap:.2g} % above the best allocation; it rests on {rests_on}",
    ]
    if sized.best_preset is not None:
        lines.append(f"llama-quantize's best preset within the same size: {sized.best_preset[0]}, estimated error {sized.best_preset[1]:.4g}")
    return lines


_TIE = 1e-6  # relative: a difference of estimates that says nothing


def _best_preset(problem: SizeProblem, items: Sequence[Sequence[Choice]], choices: Sequence[Sequence[GgmlType]], room: int) -> tuple[str, Solution] | None:
    """Return the preset of least estimated error among those that fit and whose types all were measured, as an allocation."""
    found: list[tuple[str, Solution]] = []
    for preset in PRESETS.values():
        try:
            plan = plan_preset(problem.tensors, problem.metadata, preset, problem.rules, problem.has_importance)
        except UsageError:  # it needs an imatrix, or rows of other lengths
            continue
        types = {row.name: row.type for row in plan.rows}
        wanted = [types[request.tensor.name] for request in problem.requests]
        if all(t in measured for t, measured in zip(wanted, choices, strict=True)):
            picks = tuple(measured.index(t) for t, measured in zip(wanted, choices, strict=True))
            n_bytes, error = total(items, picks)
            if n_bytes <= room:
                found.append((preset.name, Solution(picks, n_bytes, error, 0.0, 0.0)))
    return min(found, key=lambda item: item[1].error, default=None)


def _explain(plan: Plan, problem: SizeProblem, table: ErrorTable, solution: Solution) -> Plan:
    """Return the plan with each free tensor's estimated error, and in words what the next larger and smaller type would do."""
    requests = {request.tensor.name: request for request in problem.requests}

    def explained(row: PlanRow) -> PlanRow:
        if row.name not in requests:
            return row
        tensor = requests[row.name].tensor
        measured = measured_types(requests[row.name], table)
        sizes = [Choice(_padded_bytes(tensor, t, problem.metadata), damage.estimated_error) for t, damage in measured]
        at = next(k for k, (t, _) in enumerate(measured) if t is row.type)
        order = efficient(sizes)
        smaller = [k for k in order if sizes[k].n_bytes < sizes[at].n_bytes][-1:]
        larger = [k for k in order if sizes[k].n_bytes > sizes[at].n_bytes][:1]
        parts = [
            f"{measured[k][0].name}: {sizes[k].n_bytes - sizes[at].n_bytes:+,} bytes, {sizes[k].error - sizes[at].error:+.2g} nats" for k in (*smaller, *larger)
        ]
        return replace(row, estimated_error=sizes[at].error, explanation="; ".join(parts))

    return replace(plan, rows=tuple(explained(row) for row in plan.rows))


# --- plain conversion -------------------------------------------------------------------------------------------------

OUTTYPES = ("f32", "f16", "bf16", "q8_0", "auto")
_F32_KINDS = frozenset(
    (
        *("ffn_gate_inp", "ffn_gate_inp_shexp", "position_embd", "token_types", "ssm_conv1d", "ssm_conv1d_q", "ssm_conv1d_k", "ssm_conv1d_v"),
        *("shortconv.conv", "time_mix_first", "time_mix_w1", "time_mix_w2", "time_mix_decay_w1", "time_mix_decay_w2", "time_mix_lerp_fused"),
        *("posnet.norm1", "v.position_embd", "a.position_embd", "altup_correct_coef", "altup_predict_coef", "indexer.proj"),
    )
)


def _is_always_f32(name: str, shape: Shape) -> bool:
    """Tell whether llama.cpp's converter stores this tensor in F32 whatever the outtype: vectors, norms, biases, routers."""
    return len(shape) <= 1 or name.endswith("_norm.weight") or not name.endswith(".weight") or tensor_role(name).kind in _F32_KINDS


def _outtype(tensors: Iterable[Tensor], outtype: str) -> GgmlType:
    """Return the type an outtype stands for; `auto`: that of the first half-precision matrix, else F16."""
    lower = outtype.lower()
    if lower not in OUTTYPES:
        raise UsageError(f"unknown outtype: got {outtype!r}, expected one of {', '.join(OUTTYPES)}; for other types use `quantize --quant-type`")
    if lower != "auto":
        return GgmlType[lower.upper()]
    halves = (tensor.type for tensor in tensors if len(tensor.shape) > 1 and tensor.type in (GgmlType.F16, GgmlType.BF16))
    return next(halves, GgmlType.F16)


def plan_conversion(tensors: Sequence[Tensor], metadata: Metadata, outtype: str = "auto", *, allow_requantize: bool = False) -> Plan:
    """Return the plan of llama.cpp's converter: matrices in the outtype, vectors, norms and routers in F32.

    outtype: f32, f16, bf16, q8_0, or auto (as the weights are stored; F16 when they are F32, as upstream). `metadata`
    is not looked at. Raises UsageError for another outtype or a source that is quantized already.
    """
    target = _outtype(tensors, outtype)

    def choose(tensor: Tensor) -> _Choice:
        if tensor.type in INTEGER_TYPES:
            return tensor.type, "kept: integers"
        if _is_always_f32(tensor.name, tensor.shape):
            return GgmlType.F32, "always F32"
        return target, f"outtype {outtype.lower()}"

    rows = tuple(_row(tensor, choose(tensor), None) for tensor in tensors)
    return _refuse_unmeetable(Plan(f"outtype {target.name}", PRESETS[target.name].file_type, rows), allow_requantize=allow_requantize)
