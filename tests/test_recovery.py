"""recovery.py: the steps and their order, what is encoded again, and what is left behind when the gate cannot be reached."""

from __future__ import annotations

import hashlib
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from loopgguf import intent, pipeline, publish, recovery
from loopgguf.calibration import Chunks
from loopgguf.checkpoint import Job
from loopgguf.container import read_gguf
from loopgguf.encode import Reuse
from loopgguf.errors import Interrupted, OutputError, QualityError, UsageError
from loopgguf.feedback import Compensate
from loopgguf.formats import FLOAT_TYPES, GgmlType
from loopgguf.gate import CheckedResult, Gate
from loopgguf.importance import ImatrixRequest
from loopgguf.intent import Resolved, resolve
from loopgguf.manifest import read_manifest
from loopgguf.planner import TypeRules, parse_overrides
from loopgguf.source import open_source
from loopgguf.workflow import QuantizeRequest, Settings, compare, quantize

pytestmark = pytest.mark.usefixtures("empty_cache")

SETTINGS = Settings(n_threads=1)


@pytest.fixture
def request_(texts: dict[str, Path]) -> QuantizeRequest:
    return QuantizeRequest(
        quant_type="Q4_0",
        use_imatrix=False,
        calibration=ImatrixRequest((texts["calibration"],), ctx_size=64, n_samples=40),
        gate=Gate(max_kld_nats=10.0, files=(texts["selection"],)),
    )


def gated(request: QuantizeRequest, **limits: float | int | None) -> QuantizeRequest:
    assert request.gate is not None
    return replace(request, gate=replace(request.gate, **limits))


def types_of(path: Path) -> dict[str, GgmlType]:
    return {tensor.name: tensor.type for tensor in read_gguf(path).tensors}


def test_a_good_file_passes_as_it_is(model: Path, request_: QuantizeRequest, texts: dict[str, Path], tmp_path: Path) -> None:
    """Catches recovery of a file that needs none, other weights than without a gate, files left beside it, and a selection text that
    a later evaluation does not know of."""
    result = quantize(model, tmp_path / "out.gguf", request_, SETTINGS)
    assert isinstance(result, CheckedResult)
    assert result.gate is not None
    assert [step.step for step in result.gate.steps] == ["as planned"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "out.gguf.sha256"]
    quantize(model, tmp_path / "plain.gguf", replace(request_, gate=None), SETTINGS)
    ours, plain = (open_source(tmp_path / name) for name in ("out.gguf", "plain.gguf"))
    assert all(np.array_equal(a.read_rows(0, a.n_rows), b.read_rows(0, b.n_rows)) for a, b in zip(ours.tensors, plain.tensors, strict=True))
    renamed = tmp_path / "renamed.txt"
    renamed.write_bytes(texts["selection"].read_bytes())
    notes = compare([tmp_path / "out.gguf", tmp_path / "plain.gguf"], model, [renamed], n_chunks=None, settings=SETTINGS).notes
    assert [note for note in notes if "selection text" in note] == [
        "renamed.txt is also the selection text of out.gguf: its figures flatter; evaluate on other text"
    ]


def test_steps_come_in_order_until_the_gate_is_passed(model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches bits spent before feedback was tried, tensors encoded again though nothing of them changed, a tensor that a rule pins
    and recovery raises, steps that say nothing of before and after, and feedback over more columns than
    was said."""
    encoded: list[list[str]] = []
    n_columns: set[int | None] = set()
    real = pipeline.execute

    def watched(jobs, *arguments, **options):  # type: ignore[no-untyped-def]
        encoded.append([job.row.name for job in jobs if job.row.type is not job.tensor.type])
        n_columns.update(job.effort.max_columns for job in jobs if job.curvature is not None)
        return real(jobs, *arguments, **options)

    monkeypatch.setattr("loopgguf.encode.execute", watched)
    said: list[str] = []
    request = gated(request_, max_kld_nats=0.06)
    request = replace(request, rules=TypeRules(overrides=parse_overrides(["attn_q=Q4_0"])), compensate_columns=256)
    result = quantize(model, tmp_path / "out.gguf", request, replace(SETTINGS, announce=said.append))
    assert n_columns == {256}
    assert isinstance(result, CheckedResult)
    assert result.gate is not None
    steps = result.gate.steps
    assert [step.step.split(" for ")[0] for step in steps[:3]] == ["as planned", "error feedback", "larger types"]
    assert steps[-1].after.mean_kld_nats.value <= 0.06
    assert steps[0].before is None
    assert [line.split(":")[0] for line in said if line.startswith("gate")] == ["gate"] * len(steps)
    types = types_of(tmp_path / "out.gguf")
    assert types["blk.0.attn_q.weight"] is GgmlType.Q4_0
    n_free = sum(ggml_type is not GgmlType.F32 for ggml_type in types.values())
    last = [names for names in encoded if names][-1]
    assert 0 < len(last) < n_free
    assert "blk.0.attn_q.weight" not in last
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "out.gguf.sha256"]


def test_half_precision_comes_last(model: Path, request_: QuantizeRequest, tmp_path: Path) -> None:
    """Catches a gate between what Q8_0 and F16 reach that recovery gives up on."""
    request = replace(gated(request_, max_kld_nats=1e-4), quant_type="Q8_0", compensate=Compensate.FULL)
    result = quantize(model, tmp_path / "out.gguf", request, SETTINGS)
    assert isinstance(result, CheckedResult)
    assert result.gate is not None
    assert {step.step.split(" for ")[0] for step in result.gate.steps[1:]} == {"half precision"}
    assert GgmlType.F16 in types_of(tmp_path / "out.gguf").values()
    assert FLOAT_TYPES.isdisjoint({row.type for row in result.plan.rows if row.is_encoded} - {GgmlType.F16})


def test_what_cannot_pass_is_kept_aside(model: Path, request_: QuantizeRequest, tmp_path: Path) -> None:
    """Catches a file below the gate under its final name, hours of work thrown away, and a size that is exceeded."""
    request = gated(request_, max_kld_nats=1e-9, max_size_bytes=28_000)
    with pytest.raises(QualityError, match=r"not reached within 28,000 bytes. The best file is kept as .*out\.below-gate\.gguf") as failure:
        quantize(model, tmp_path / "out.gguf", request, SETTINGS)
    assert failure.value.exit_code == 1
    kept = tmp_path / "out.below-gate.gguf"
    assert sorted(path.name for path in tmp_path.iterdir()) == [kept.name, f"{kept.name}.sha256"]
    assert read_manifest(kept) == hashlib.sha256(kept.read_bytes()).hexdigest()
    assert kept.stat().st_size <= 28_000
    assert len(read_gguf(kept).tensors) == 12
    with pytest.raises(OutputError, match="below-gate"):  # the next run does not throw it away either
        quantize(model, tmp_path / "out.gguf", request, SETTINGS)
    with pytest.raises(QualityError, match="no tensor is left that may be raised"):
        quantize(model, tmp_path / "other.gguf", replace(gated(request_, max_kld_nats=1e-12), quant_type="Q8_0"), SETTINGS)


@pytest.mark.parametrize("step", [1, 2])
def test_a_run_that_was_stopped_is_no_obstacle(model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Catches a file kept aside by a run that did not end which the same command refuses to replace, a stop that names a folder
    from which nothing goes on, and what a trial leaves behind; and a file of another run that is replaced."""
    request, output = gated(request_, max_kld_nats=0.06), tmp_path / "out.gguf"
    measure, n_measured = recovery.measure_quality, [0]

    def stopped(*arguments, progress, **options):  # type: ignore[no-untyped-def]
        n_measured[0] += 1
        if n_measured[0] == step:
            signal.raise_signal(signal.SIGINT)
        return measure(*arguments, progress=progress, **options)

    with monkeypatch.context() as patch:
        patch.setattr(recovery, "measure_quality", stopped)
        with pytest.raises(Interrupted, match=rf"at file {step} of the gate; the same command begins with the first again"):
            quantize(model, output, request, SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.below-gate.gguf", "out.below-gate.gguf.sha256", "out.loopgguf-job"]
    quantize(model, output, request, SETTINGS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.gguf", "out.gguf.sha256"]
    with pytest.raises(OutputError, match=r"out\.gguf already exists"):
        quantize(model, output, request, SETTINGS)


def test_a_signal_that_comes_too_late_for_a_trial(model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stop while a file is verified, after which nothing of it can be stopped, that is forgotten with its job."""
    verify = publish._verify
    monkeypatch.setattr(publish, "_verify", lambda *arguments: (verify(*arguments), signal.raise_signal(signal.SIGINT))[0])
    with pytest.raises(Interrupted, match="at file 1 of the gate"):
        quantize(model, tmp_path / "out.gguf", request_, SETTINGS)


def test_thorough_feedback_takes_nothing_over(model: Path, request_: QuantizeRequest) -> None:
    """Catches a step of thorough feedback that takes over the bytes of a file with less of it, and so changes nothing."""
    source, tried = open_source(model), []
    resolved = resolve(source, replace(request_, compensate=Compensate.OFF), SETTINGS)
    order = replace(resolved.order(request_), reuse=Reuse({}, {}))
    steps = SimpleNamespace(source=source, passes=False, fits=lambda _: True, attempt=lambda _, it: tried.append(it), steps=[SimpleNamespace(is_better=True)])
    further = recovery._Recovery._add_feedback(steps, order)  # type: ignore[arg-type]
    assert [(it.compensate, it.reuse) for it in tried] == [(Compensate.FULL, None)] and further is tried[0]


def test_an_estimated_kld_promises_no_size(model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a gate that may not make a file larger than the one that an estimate came to, and room for its keys kept of no size."""
    source, sized = replace(open_source(model), is_checkpoint=True), replace(request_, quant_type=None, size_bytes=30_000)
    resolved = resolve(source, replace(sized, use_gradients=False), SETTINGS)
    assert resolved.sized is not None
    least = resolved.sized.reachable_bytes[0] - resolved.sized.kept_bytes
    monkeypatch.setattr(intent, "find_sensitivities", lambda *_: None)
    monkeypatch.setattr(intent, "budget_for_kld", lambda *_: least)
    by_kld = replace(sized, size_bytes=None, target_kld_nats=1.0)
    smallest = resolve(source, by_kld, SETTINGS)
    assert smallest.sized is not None
    assert smallest.sized.total_bytes == smallest.sized.budget_bytes == least

    def max_bytes(found: Resolved, request: QuantizeRequest) -> int | None:
        assert request.gate is not None
        chunks = Chunks(np.zeros((1, 2), np.int32), (), "", 1)
        with Job(tmp_path / "job", {}) as job:
            return recovery._Recovery(source, found, request, request.gate, tmp_path / "x.gguf", model, chunks, SETTINGS, job).max_bytes

    assert max_bytes(smallest, by_kld) is None
    assert max_bytes(resolved, sized) == 30_000


def test_a_size_is_a_promise(model: Path, request_: QuantizeRequest, tmp_path: Path) -> None:
    """Catches a plan that fills its size to the byte, so that the keys of a gate exceed it; and recovery that grows beyond it."""
    request = replace(gated(request_, max_kld_nats=1e-9), quant_type=None, size_bytes=30_000)
    with pytest.raises(QualityError, match="not reached within 30,000 bytes"):
        quantize(model, tmp_path / "out.gguf", request, SETTINGS)
    assert 29_000 - 1024 < (tmp_path / "out.below-gate.gguf").stat().st_size <= 30_000


def test_contradictions_are_refused_before_any_work(model: Path, request_: QuantizeRequest, texts: dict[str, Path], tmp_path: Path) -> None:
    """Catches a gate without limits, one measured on the calibration text, and a limit that the plan itself exceeds."""
    cases = {
        "--max-size and --selection-file say how": gated(request_, max_kld_nats=None, max_size_bytes=30_000),
        "--max-kld: got -1": gated(request_, max_kld_nats=-1.0),
        "--keep-split and a quality gate": replace(request_, keep_split=True),
        "--pure and a quality gate": replace(request_, rules=TypeRules(pure=True)),
        r"\d+% of it is in the calibration text": replace(request_, gate=Gate(max_kld_nats=1.0, files=(texts["calibration"],))),
        "--max-size: got 1,000 bytes": gated(request_, max_size_bytes=1000),
    }
    for message, request in cases.items():
        with pytest.raises(UsageError, match=message):
            quantize(model, tmp_path / "out.gguf", request, SETTINGS)
    assert not list(tmp_path.iterdir())
