"""gate.py: when a file passes, and what a user's limits mean."""

from __future__ import annotations

from pathlib import Path

import pytest

from loopgguf.errors import UsageError
from loopgguf.evaluation import Measure
from loopgguf.gate import Gate, GateStep, Reading, below_gate_path, parse_percent


def reading(kld: float, percent: float) -> Reading:
    return Reading(Measure(kld, 0.001), Measure(percent, None))


def test_the_worst_number_decides() -> None:
    """Catches a gate of two limits that one of them passes, and a limit that was not given."""
    both = Gate(max_kld_nats=0.02, max_ppl_increase_percent=4.0)
    assert both.miss(reading(0.01, 8.0)) == 2
    assert both.miss(reading(0.06, 2.0)) == pytest.approx(3)
    assert Gate(max_kld_nats=0.02).miss(reading(0.01, 800.0)) == 0.5
    assert Gate(max_ppl_increase_percent=2.0).miss(reading(9.0, -1.0)) < 0


@pytest.mark.parametrize(("text", "percent"), [("2%", 2.0), (" 0.5 % ", 0.5), (".25", 0.25)])
def test_percentages_are_read(text: str, percent: float) -> None:
    """Catches a percent sign that makes a hundredth of it."""
    assert parse_percent(text, "--max-ppl-increase") == percent


@pytest.mark.parametrize("text", ["", "%", "-1%", "0", "2%%", "inf", "nan", "1e999"])
def test_other_percentages_are_refused(text: str) -> None:
    """Catches a limit of nothing, which every file passes or none."""
    with pytest.raises(UsageError, match="--max-ppl-increase: got"):
        parse_percent(text, "--max-ppl-increase")


def test_a_step_says_before_and_after() -> None:
    """Catches a log line that leaves out what a step was measured at."""
    step = GateStep("error feedback", reading(0.03, 2.0), reading(0.02, 1.0), 1234567, is_better=False)
    assert str(step) == (
        "error feedback: mean KLD 0.03 ± 0.001, perplexity 2 % → mean KLD 0.02 ± 0.001, perplexity 1 %; 1,234,567 bytes; not better, the file before is kept"
    )


def test_the_kept_file_lies_beside_the_output() -> None:
    """Catches a name that hides the file in another folder or doubles its ending."""
    assert below_gate_path(Path("a/b.Q4_K_M.gguf")) == Path("a/b.Q4_K_M.below-gate.gguf")
