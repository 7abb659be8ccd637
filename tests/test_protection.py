"""A model's super weights from end to end: found where one was planted, kept beside the imatrix, protected in the file."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from upstream import differing

from loopgguf import ggml
from loopgguf.container import read_gguf
from loopgguf.errors import InputError, OutputError, UsageError
from loopgguf.feedback import Compensate
from loopgguf.formats import GgmlType
from loopgguf.opening import Settings
from loopgguf.planner import Plan, PlanRow, TypeRules, parse_overrides
from loopgguf.protection import (
    Protection,
    load_found,
    load_mask,
    plan_protection,
    protection_paths,
    refuse_bad_coverage,
    refuse_existing_protection,
    save_protection,
    select_mask,
)
from loopgguf.report import super_weight_lines
from loopgguf.safetensor import write_safetensors
from loopgguf.source import Source, Tensor, open_source
from loopgguf.statistics import Columns, Statistics
from loopgguf.super_weights import Found, Mask, Pin, Spike, SuperWeight
from loopgguf.verify import decode_row
from loopgguf.workflow import ImatrixRequest, QuantizeRequest, compute_imatrix, convert, evaluate, quantize, search_super_weights

T = GgmlType
DOWN = "blk.1.ffn_down.weight"
FEW = ImatrixRequest(n_samples=8)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


# --- models in memory -------------------------------------------------------------------------------------------------


def _tensor(name: str, values: np.ndarray) -> Tensor:
    packed = ggml.encode_rows(T.BF16, np.ascontiguousarray(values.reshape(-1, values.shape[-1]), np.float32))
    return Tensor(name, values.shape, T.BF16, lambda start, stop: packed[start:stop])


def _source(*tensors: Tensor) -> Source:
    return Source(Path("model.gguf"), False, {}, tensors, (), "of a test", take_fingerprint=lambda: "of a test")


def _model(seed: int = 0) -> tuple[Source, Statistics]:
    """A plain weight, experts, and one that the imatrix does not know."""
    generator = np.random.default_rng(seed)
    plain, experts, unknown = (generator.normal(size=shape).astype(np.float32) for shape in ((40, 256), (3, 16, 256), (8, 256)))
    source = _source(_tensor(DOWN, plain), _tensor("blk.1.ffn_down_exps.weight", experts), _tensor("token_embd.weight", unknown))
    columns = {t.name: Columns(generator.gamma(0.5, size=(t.n_matrices, 256)).astype(np.float32), np.full(t.n_matrices, 4)) for t in source.tensors[:2]}
    return source, Statistics(columns, ("text",), 1, 4)


def _values(tensor: Tensor) -> np.ndarray:
    return ggml.decode_rows(tensor.type, tensor.read_rows(0, tensor.n_rows))


def _found(source: Source, *places: tuple[str, int | None, int, int]) -> Found:
    weights = []
    for name, matrix, row, column in places:
        tensor = next(t for t in source.tensors if t.name == name)
        value = float(_values(tensor)[(matrix or 0) * (tensor.n_rows // tensor.n_matrices) + row, column])
        weights.append(SuperWeight(name, matrix, 1, Spike(row, column, value, 100.0, 90.0, -50.5, 80.0, 0.99), 1, 1234.5))
    return Found(tuple(weights), 12.5, 100, ("text",), True)


# --- the mask ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("coverage", [0.0, 0.002, 0.01])
def test_the_mask_is_the_naive_one(coverage: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slabs that shift a place, the first expert's importance for all, weights without importance in the mask or its share."""
    monkeypatch.setattr("loopgguf.protection._SLAB_WEIGHTS", 1500)
    source, statistics = _model()
    mask = select_mask(source, statistics, coverage, Settings())
    scores = []
    for tensor in source.tensors[:2]:
        importance = statistics.columns[tensor.name].sum_squares / np.float32(4)
        scores.append(np.abs(_values(tensor)) * np.sqrt(np.repeat(importance, tensor.n_rows // tensor.n_matrices, axis=0)))
    n = round(coverage * sum(s.size for s in scores))
    threshold = np.sort(np.concatenate([s.ravel() for s in scores]))[::-1][n] if n else np.inf
    expected = {t.name: np.flatnonzero(s > threshold).tolist() for t, s in zip(source.tensors, scores, strict=False)}
    assert {name: places.tolist() for name, places in mask.indices.items()} == {name: places for name, places in expected.items() if places}
    assert mask.n_weights == n


def test_a_coverage_that_is_none() -> None:
    """10 (percent?) taken as ten times all weights."""
    for coverage in (-0.1, 0.5, float("nan")):
        with pytest.raises(UsageError, match="--super-weight-coverage"):
            refuse_bad_coverage(coverage)


# --- files ------------------------------------------------------------------------------------------------------------


def _saved(tmp_path: Path) -> tuple[Source, Found, Mask, Path]:
    source, statistics = _model()
    found = _found(source, (DOWN, None, 3, 7), ("blk.1.ffn_down_exps.weight", 2, 5, 255))
    mask = select_mask(source, statistics, 0.001, Settings())
    save_protection(found, mask, protection_paths(tmp_path / "a.imatrix.gguf")[0])
    return source, found, mask, tmp_path / "a.imatrix.gguf"


def test_files_come_back(tmp_path: Path) -> None:
    """A field lost or rounded on the way; a file of an older search overwritten unasked."""
    source, found, mask, imatrix = _saved(tmp_path)
    paths = protection_paths(imatrix)
    assert [path.name for path in paths] == ["a.imatrix.super-weights.json", "a.imatrix.super-weights.safetensors"]
    assert load_found(paths[0], source) == found
    loaded = load_mask(paths[1], source)
    assert loaded.coverage == mask.coverage and {n: p.tolist() for n, p in loaded.indices.items()} == {n: p.tolist() for n, p in mask.indices.items()}
    with pytest.raises(OutputError, match="super-weights"):
        save_protection(found, mask, paths[0])
    assert save_protection(found, None, paths[0], overwrite=True) == paths[:1]
    with pytest.raises(UsageError, match=r"\.json"):
        refuse_existing_protection(paths[1], overwrite=True)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda data: data["weights"][0].update(value=1.5), "another model's super weights"),
        (lambda data: data["weights"][0].update(row=40), "no such weight"),
        (lambda data: data["weights"][0].update(column=-1), "no such weight"),
        (lambda data: data["weights"][1].update(matrix=3), "no such weight"),
        (lambda data: data["weights"][0].update(name="blk.9.ffn_down.weight"), "no such weight"),
        (lambda data: data["weights"][0].update(row="3"), "row of a super weight"),
        (lambda data: data["weights"][0].update(row=True), "row of a super weight"),
        (lambda data: data["weights"][0].pop("share"), "share of a super weight"),
        (lambda data: data.update(weights=[1]), "lists of weights"),
        (lambda data: data.update(weights=None), "lists of weights"),
        (lambda data: data.update(is_complete=1), "is_complete"),
        (lambda data: data.update({"loopgguf.super-weights": "2"}), "'1'"),
        (lambda data: data.pop("n_tokens"), "n_tokens"),
    ],
)
def test_a_damaged_list(tmp_path: Path, change: Callable[[dict[str, object]], object], culprit: str) -> None:
    """A traceback, or another model's weights pinned in this one."""
    source, _, _, imatrix = _saved(tmp_path)
    path = protection_paths(imatrix)[0]
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(InputError, match=culprit) as caught:
        load_found(path, source)
    assert path.name in str(caught.value)


@pytest.mark.parametrize(
    ("indices", "metadata", "culprit"),
    [
        ({DOWN: np.array([3, 2])}, {}, "rising"),
        ({DOWN: np.array([-1, 2])}, {}, "rising"),
        ({DOWN: np.array([2, 40 * 256])}, {}, "another model's mask"),
        ({DOWN: np.array([2.0])}, {}, "I64"),
        ({"blk.7.ffn_down.weight": np.array([2])}, {}, "blk.7"),
        ({DOWN: np.array([2])}, {"loopgguf.super-weights": "0"}, "coverage"),
        ({DOWN: np.array([2])}, {"loopgguf.super-weight-coverage": "many"}, "coverage"),
        ({DOWN: np.array([2])}, {"loopgguf.super-weight-coverage": "1.2.3"}, "coverage"),
        ({DOWN: np.array([2])}, {"loopgguf.super-weight-coverage": "e-"}, "coverage"),
    ],
)
def test_a_damaged_mask(tmp_path: Path, indices: dict[str, np.ndarray], metadata: dict[str, str], culprit: str) -> None:
    """Indices outside of a tensor, or of another model."""
    path = tmp_path / "x.super-weights.safetensors"
    with path.open("wb") as stream:
        write_safetensors(stream.write, indices, {"loopgguf.super-weights": "1", "loopgguf.super-weight-coverage": "0.0001", **metadata})
    with pytest.raises(InputError, match=culprit):
        load_mask(path, _model()[0])


# --- what a quantization does -----------------------------------------------------------------------------------------


def _plan(source: Source, ggml_type: GgmlType, reason: str = "by hand") -> Plan:
    rows = [PlanRow(t.name, t.shape, t.type, ggml_type, 8 * 84, reason, uses_imatrix=t.name.startswith("blk.")) for t in source.tensors]
    return Plan("a test", 0, tuple(rows))


def test_pins_are_rows_of_the_whole_tensor() -> None:
    """An expert's row taken for the first expert's; a super weight that is lost where the mask has the row too."""
    source, _ = _model()
    experts = source.tensors[1]
    mask = Mask({experts.name: np.array([0, 5, 16 * 256 + 1, (2 * 16 + 5) * 256 + 9])}, 0.0001)
    protection = Protection(_found(source, (experts.name, 2, 5, 255), (experts.name, 2, 5, 254)), mask)
    assert protection.pins(experts) == {0: Pin((), (0, 5)), 16: Pin((), (1,)), 37: Pin((255, 254), (9,))}
    assert protection.pins(source.tensors[0]) == {}


def test_a_type_is_raised_for_a_super_weight_alone() -> None:
    """A type raised where none was needed, not far enough, or for the mask without a budget; one that the user asked for."""
    source, statistics = _model()
    values = _values(source.tensors[0])
    values[3] = np.linspace(-1, 1, 256)  # no grid of two bits has these
    values[3, 200] = 0.83
    source = _source(_tensor(DOWN, values), *source.tensors[1:])
    mask = select_mask(source, statistics, 0.01, Settings())
    protection = Protection(_found(source, (DOWN, None, 3, 200)), mask)
    even = Statistics({**statistics.columns, DOWN: Columns(np.ones((1, 256), np.float32), np.ones(1, np.int64))}, (), 1, 1)
    plan, told, notes = plan_protection(source, _plan(source, T.IQ2_XXS), protection, even.importance, 0)
    row = plan.rows[0]
    assert row.type is not T.IQ2_XXS and "super weight" in row.reason and told.raised == {DOWN: T.IQ2_XXS} and not notes
    assert plan.rows[1:] == _plan(source, T.IQ2_XXS).rows[1:]
    again, told, _ = plan_protection(source, plan, protection, even.importance, 0)
    assert again == plan and told.raised == {}
    asked, told, notes = plan_protection(source, _plan(source, T.IQ2_XXS, "--tensor-type down=IQ2_XXS"), protection, even.importance, 0)
    assert asked.rows[0].type is T.IQ2_XXS and not told.raised and "asked for by --tensor-type" in notes[0]
    exact, told, notes = plan_protection(source, _plan(source, T.BF16), protection, even.importance, 0)
    assert exact == _plan(source, T.BF16) and not notes


def test_the_budget_is_kept_and_used() -> None:
    """A file that grows by more than was allowed, or a budget that buys nothing."""
    source, statistics = _model()
    protection = Protection(_found(source), select_mask(source, statistics, 0.01, Settings()))
    plan = replace(_plan(source, T.Q2_K), rows=tuple(replace(r, n_bytes=int(np.prod(r.shape[:-1])) * 84) for r in _plan(source, T.Q2_K).rows))
    sizes = []
    for budget in (0, 2000, 1_000_000):
        raised, told, _ = plan_protection(source, plan, protection, statistics.importance, budget)
        sizes.append(raised.tensor_bytes - plan.tensor_bytes)
        assert sizes[-1] <= budget and len(told.raised) == sum(a.type is not b.type for a, b in zip(raised.rows, plan.rows, strict=True))
    assert 0 == sizes[0] < sizes[1] < sizes[2]


def test_requests_that_contradict_themselves(demo_model: Path) -> None:
    """Options that are silently ignored."""
    base = QuantizeRequest(quant_type="Q2_K", protect_super_weights=True)
    for request, culprit in (
        (replace(base, use_imatrix=False), "--no-imatrix"),
        (replace(base, super_weight_coverage=2.0), "--super-weight-coverage"),
        (replace(base, quant_type=None, size_bytes=10**7, super_weight_budget_bytes=9), "--super-weight-budget"),
    ):
        with pytest.raises(UsageError, match=culprit):
            quantize(demo_model, Path("x.gguf"), request)


def test_nothing_is_found_in_the_demo_model(demo_model: Path) -> None:
    """A detector that sees spikes everywhere; in the same pass as the imatrix, whose bytes must not change."""
    made = compute_imatrix(demo_model, Path("a.imatrix.gguf"), replace(FEW, super_weights=True))
    assert made.super_weights is not None and made.super_weights.weights == () and made.super_weights.is_complete
    plain = compute_imatrix(demo_model, Path("b.imatrix.gguf"), FEW)
    assert made.path.read_bytes() == plain.path.read_bytes() and plain.super_weights is None
    with pytest.raises(OutputError, match="super-weights"):
        Path("a.imatrix.gguf").unlink()
        compute_imatrix(demo_model, Path("a.imatrix.gguf"), replace(FEW, super_weights=True))


def test_the_mask_protects_and_says_so(demo_model: Path) -> None:
    """A mask that is not used, or that changes bytes of tensors outside of it; a dry run that looks for weights."""
    imatrix = compute_imatrix(demo_model, Path("a.imatrix.gguf"), replace(FEW, super_weights=True)).path
    request = QuantizeRequest(quant_type="Q2_K", imatrix=imatrix)
    plain = quantize(demo_model, Path("plain.gguf"), request)
    result = quantize(demo_model, Path("kept.gguf"), replace(request, protect_super_weights=True))
    assert result.super_weights == () and any("taken from a.imatrix.super-weights.json" in note for note in result.notes)
    mask = load_mask(Path("a.imatrix.super-weights.safetensors"), open_source(demo_model))
    logs = {name: log.mask for name, log in result.logs.items() if log.mask is not None}
    assert {name: log.n for name, log in logs.items()} == {name: len(places) for name, places in mask.indices.items()}
    assert sum(log.n_kept for log in logs.values()) > 1.5 * sum(log.n_kept_plain for log in logs.values())
    assert "super-weight mask: 472 weights" in super_weight_lines(result)[0] and super_weight_lines(plain) == []
    changed = {line.partition(":")[0] for line in differing(plain.paths[0], result.paths[0])}
    assert changed and changed <= set(mask.indices)
    dry = quantize(demo_model, Path("dry.gguf"), QuantizeRequest(quant_type="Q2_K", protect_super_weights=True, calibration=FEW, dry_run=True))
    assert any("dry run does not look" in note for note in dry.notes)


# --- a planted one ----------------------------------------------------------------------------------------------------


def _kept(path: Path, place: tuple[int, int]) -> float:
    info = next(t for t in read_gguf(path).tensors if t.name == DOWN)
    return float(decode_row(path, info, place[0])[place[1]])


@pytest.mark.slow
def test_a_planted_weight_is_found_by_both_engines(planted_model: tuple[Path, tuple[int, int]]) -> None:
    """The detector misses the one weight that the model cannot do without, finds others, or a GGUF is searched without effect."""
    model, place = planted_model
    gguf = convert(model, Path("planted.gguf"), "f32").paths[0]
    for path in (model, gguf):
        found = search_super_weights(path, FEW, use_imatrix=False).found
        (weight,) = found.weights
        assert (weight.name, weight.matrix, weight.layer, weight.spike.row, weight.spike.column) == (DOWN, None, 1, *place)
        assert weight.spike.value == 1.0 and found.is_complete
        assert weight.measured_perplexity > 5 * found.measured_perplexity
    perplexities = [search_super_weights(path, FEW, use_imatrix=False).found.weights[0].measured_perplexity for path in (model, gguf)]
    assert perplexities[0] == pytest.approx(perplexities[1], rel=5e-3)
    again = search_super_weights(model, FEW, use_imatrix=False)
    assert "found before" in again.notes[-1]


@pytest.mark.slow
@pytest.mark.parametrize("ggml_type", ["Q2_K", "IQ2_XXS"])
def test_a_planted_weight_is_protected(planted_model: tuple[Path, tuple[int, int]], ggml_type: str) -> None:
    """A super weight that is off by more than 1 % in the file, or a report that says otherwise than the file."""
    model, place = planted_model
    imatrix = compute_imatrix(model, Path("a.imatrix.gguf"), replace(FEW, super_weights=True)).path
    rules = TypeRules(pure=True, token_embedding_type=T.Q4_K, output_type=T.Q4_K)
    request = QuantizeRequest(quant_type=ggml_type, rules=rules, imatrix=imatrix)
    plain = quantize(model, Path("plain.gguf"), request)
    result = quantize(model, Path("kept.gguf"), replace(request, protect_super_weights=True, super_weight_coverage=0.0))
    decoded = {path.name: _kept(path, place) for path in (*plain.paths, *result.paths)}
    assert result.super_weights is not None
    (kept,) = result.super_weights
    assert kept.decoded == decoded["kept.gguf"] and kept.miss <= 0.01
    assert kept.miss <= abs(decoded["plain.gguf"] - 1)
    assert (kept.type is not kept.type_before) == (abs(decoded["plain.gguf"] - 1) > 0.01)
    klds = [evaluate(path, model, n_chunks=4).quality.mean_kld_nats.value for path in (*plain.paths, *result.paths)]
    assert klds[1] <= klds[0] * 1.02


@pytest.mark.slow
def test_error_feedback_leaves_a_super_weight_alone(planted_model: tuple[Path, tuple[int, int]]) -> None:
    """Feedback that pushes other columns' errors into the one weight that must not move."""
    model, _ = planted_model
    rules = TypeRules(pure=True)
    request = QuantizeRequest(quant_type="Q3_K_M", rules=rules, calibration=ImatrixRequest(n_samples=12), compensate=Compensate.FAST)
    result = quantize(model, Path("kept.gguf"), replace(request, protect_super_weights=True))
    assert result.super_weights is not None and result.super_weights[0].miss <= 0.01


@pytest.mark.slow
def test_a_size_is_kept_with_a_raised_type(planted_model: tuple[Path, tuple[int, int]]) -> None:
    """A raised type that makes the file larger than was asked for."""
    model, place = planted_model
    request = QuantizeRequest(size_bytes=2_450_000, use_gradients=False, calibration=FEW, protect_super_weights=True)
    result = quantize(model, Path("kept.gguf"), request)
    assert result.total_bytes <= 2_450_000
    assert abs(_kept(result.paths[0], place) - 1) <= 0.01
    fixed = QuantizeRequest(quant_type="Q4_K_M", calibration=FEW, protect_super_weights=True)
    fixed = replace(fixed, rules=TypeRules(overrides=parse_overrides([r"blk\.1\.ffn_down=IQ2_XXS"])))
    assert any("asked for by" in note for note in quantize(model, Path("fixed.gguf"), fixed).notes)
