"""Kinds of tensors that measured KLD takes error feedback from: which bytes the file has, what is said, and what is left behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import pytest

from loopgguf import guard, workflow
from loopgguf.checkpoint import GUARD, job_folder
from loopgguf.errors import Interrupted, UsageError
from loopgguf.evaluation import Measure, PairedComparison, Quality, compare_paired, mean_measure
from loopgguf.feedback import Compensate
from loopgguf.importance import ImatrixRequest
from loopgguf.intent import KindGuard
from loopgguf.source import open_source
from loopgguf.workflow import QuantizeRequest, Settings, quantize

pytestmark = pytest.mark.usefixtures("empty_cache")

SETTINGS = Settings(n_threads=1)
LOSER, UNCLEAR = "attn_v", "attn_q"


@pytest.fixture
def request_(texts: dict[str, Path]) -> QuantizeRequest:
    calibration = ImatrixRequest((texts["calibration"],), ctx_size=64, n_samples=60)
    return QuantizeRequest(quant_type="Q4_0", calibration=calibration, compensate=Compensate.FAST, guard=KindGuard((texts["selection"],)))


def judge(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let feedback harm `LOSER`, perhaps `UNCLEAR`, and serve all other kinds; return the kinds that are measured, as they come."""
    tried: list[str] = []
    real_try = guard._Guard._try

    def remember(self: guard._Guard, kind: str, *rest: object) -> guard.KindOutcome:
        tried.append(kind)
        return real_try(self, kind, *rest)  # type: ignore[arg-type]

    def compare(with_feedback: object, without: object) -> SimpleNamespace:
        return SimpleNamespace(
            mean_kld_difference_nats={LOSER: Measure(0.001, 0.0001), UNCLEAR: Measure(0.001, 0.0009)}.get(tried[-1], Measure(-0.001, 0.0001))
        )

    monkeypatch.setattr(guard._Guard, "_try", remember)
    monkeypatch.setattr(guard, "compare_paired", compare)
    return tried


def payloads(path: Path) -> dict[str, bytes]:
    return {tensor.name: np.ascontiguousarray(tensor.read_rows(0, tensor.n_rows)).tobytes() for tensor in open_source(path).tensors}


def test_only_the_kind_that_loses_goes_without(model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a kind judged by another's file, one dropped by chance, feedback lost or kept for the wrong tensors, files left behind."""
    plain, fed, guarded = (tmp_path / f"{name}.gguf" for name in ("plain", "fed", "guarded"))
    quantize(model, plain, replace(request_, compensate=Compensate.OFF, guard=None), SETTINGS)
    unguarded = quantize(model, fed, replace(request_, guard=None), SETTINGS)
    tried = judge(monkeypatch)
    result = quantize(model, guarded, request_, SETTINGS)
    kinds = {name.split(".")[-2] for name, log in unguarded.logs.items() if any(part.damping is not None for part in log.feedback)}
    assert tried == sorted(kinds) and {LOSER, UNCLEAR} < kinds
    name = f"blk.0.{LOSER}.weight"
    assert payloads(fed)[name] != payloads(plain)[name]
    assert payloads(guarded) == payloads(fed) | {name: payloads(plain)[name]}
    assert not result.logs[name].feedback
    said = [note for note in result.notes if note.startswith("feedback for")]
    assert len(said) == len(kinds) and f"feedback for {LOSER}: mean KLD +0.001 ± 0.0001, left to the plain encoder" in said
    assert f"feedback for {UNCLEAR}: mean KLD +0.001 ± 0.0009, kept" in said
    assert not any("not tried" in note and LOSER in note for note in result.notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(f"{p.name}{end}" for p in (plain, fed, guarded) for end in ("", ".sha256"))


@pytest.mark.parametrize(("n_chunks", "quantile"), [(4, 2.353), (16, 1.753), (1000, 1.646)])
def test_a_kind_is_dropped_where_students_t_says_so(n_chunks: int, quantile: float) -> None:
    """Catches a normal quantile on a handful of chunks, a two-sided one, and the wrong degrees of freedom; quantiles from a printed table."""
    below, above = (guard.KindOutcome("attn_v", Measure(1e-4 * t, 1e-4), n_chunks) for t in (quantile - 0.001, quantile + 0.001))
    assert below.is_kept and not above.is_kept


def test_neutral_kinds_are_dropped_as_often_as_the_level_says() -> None:
    """Catches a test of another level than it says: feedback that does nothing, 16 chunks of 4,000 files."""
    differences = np.random.default_rng(0).normal(0, 1e-4, (4000, 16))
    dropped = [not guard.KindOutcome("attn_v", mean_measure(d), len(d)).is_kept for d in differences]
    assert 0.04 < np.mean(dropped) < 0.06


def test_equal_files_keep_feedback() -> None:
    """Catches a kind that is dropped for a difference of nothing, which has no error."""
    assert guard.KindOutcome("attn_v", Measure(0.0, 0.0), 16).is_kept


def test_measured_differences_decide(model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the sign of the difference: feedback that makes the file worse kept, and the other dropped; and what feedback
    does said anew for each kind."""
    seen: list[PairedComparison] = []

    def turned(with_feedback: Quality, without: Quality) -> PairedComparison:
        """Compare the other way round for every second kind, so that some are sure to have feedback that harms."""
        a, b = (without, with_feedback) if len(seen) % 2 else (with_feedback, without)
        seen.append(compare_paired(a, b))
        return seen[-1]

    monkeypatch.setattr(guard, "compare_paired", turned)
    announced: list[str] = []
    result = quantize(model, tmp_path / "out.gguf", request_, replace(SETTINGS, announce=announced.append))
    said = [note for note in result.notes if note.startswith("feedback for")]
    kept = [note.endswith("kept") for note in said]
    assert len(said) == len(seen) and not all(kept) and any(kept)
    assert [line for line in announced if line.startswith("guard: ")] == [f"guard: {line}" for line in said]
    assert sum(line.startswith("error feedback: ") for line in announced) == 2  # of the file with all kinds, and of the last
    for comparison, is_kept in zip(seen, kept, strict=True):
        value, error = comparison.mean_kld_difference_nats.value, comparison.mean_kld_difference_nats.standard_error
        assert error is not None and is_kept == (value / error < 2.5)


def test_a_text_too_short_to_tell_is_refused(model: Path, request_: QuantizeRequest, texts: dict[str, Path], tmp_path: Path) -> None:
    """Catches kinds judged by a difference without an error bar, after an hour of work."""
    short = tmp_path / "short.txt"
    short.write_text(texts["selection"].read_text(encoding="utf-8")[:1200], encoding="utf-8")
    with pytest.raises(UsageError, match=r"--compensate-guard: got \d chunks? of 512 tokens of selection text, expected at least 4"):
        quantize(model, tmp_path / "out.gguf", replace(request_, guard=KindGuard((short,))), SETTINGS)


def test_what_was_found_outlives_a_stop(model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches hours of measuring done again because the last file was not finished, and a file that then has feedback everywhere."""
    output, finished = tmp_path / "out.gguf", tmp_path / "finished.gguf"
    tried = judge(monkeypatch)
    quantize(model, finished, request_, SETTINGS)
    n_tried = len(tried)

    def stop(*rest: object, **more: object) -> NoReturn:
        raise Interrupted("stopped")

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(workflow, "publish", stop)
        quantize(model, output, request_, SETTINGS)
    assert len(tried) == 2 * n_tried and (job_folder(output) / GUARD).is_dir()
    other = replace(request_, calibration=replace(request_.calibration, n_samples=40))
    with pytest.raises(UsageError, match="calibration text"):  # another's verdict
        quantize(model, output, other, SETTINGS)
    quantize(model, output, request_, SETTINGS)
    assert len(tried) == 2 * n_tried
    assert payloads(output) == payloads(finished)
    assert not job_folder(output).exists()


def test_a_stop_in_the_guard_leaves_nothing(model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a whole file that stays in the job folder of a run that says nothing is kept."""
    measure = guard._Guard._measure

    def stopped(self: guard._Guard, path: Path) -> object:
        self.job.should_stop = True
        return measure(self, path)

    monkeypatch.setattr(guard._Guard, "_measure", stopped)
    with pytest.raises(Interrupted, match="of which nothing is kept"):
        quantize(model, tmp_path / "out.gguf", request_, SETTINGS)
    assert not list(tmp_path.iterdir())


def test_contradictions_are_refused(model: Path, request_: QuantizeRequest, tmp_path: Path) -> None:
    """Catches a guard that measures nothing, or shards it cannot run, after an hour of work."""
    for change, what in (({"compensate": Compensate.OFF}, "--compensate-guard measures"), ({"keep_split": True}, "--keep-split and --compensate-guard")):
        with pytest.raises(UsageError, match=what):
            quantize(model, tmp_path / "out.gguf", replace(request_, **change), SETTINGS)
