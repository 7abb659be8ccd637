"""progress.py: what a bar is told adds up, and the speed is that of this run."""

from __future__ import annotations

import pytest

from loopgguf import progress
from loopgguf.progress import Meter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    return now


def test_speed_and_perplexity_by_hand(clock: list[float]):
    """Catches a speed in steps, and a perplexity shown where none is known."""
    seen: list[tuple[str, int, int]] = []
    meter = Meter(lambda *step: seen.append(step), "reading", n_tokens=8000, n_steps=4)
    clock[0] += 2
    meter.step()
    clock[0] += 2
    meter.step(3, perplexity=12.3456)
    assert seen == [("reading: 1,000 tok/s", 1, 4), ("reading: 2,000 tok/s, perplexity 12.35", 4, 4)]


def test_what_an_earlier_run_did_is_done_but_not_fast(clock: list[float]):
    """Catches a resumed pass that claims the speed of two, or whose bar never reaches its end."""
    seen: list[tuple[str, int, int]] = []
    meter = Meter(lambda *step: seen.append(step), "reading", n_tokens=8000, n_steps=4)
    meter.reach(3)
    clock[0] += 1
    meter.step()
    assert seen == [("reading: 2,000 tok/s", 4, 4)]


def test_reaching_what_was_counted_changes_nothing(clock: list[float]):
    """Catches steps that are counted twice."""
    seen: list[tuple[str, int, int]] = []
    meter = Meter(lambda *step: seen.append(step), "reading", n_tokens=8000, n_steps=4)
    clock[0] += 1
    meter.step(2)
    meter.reach(2)
    clock[0] += 1
    meter.step(2)
    assert seen[-1] == ("reading: 4,000 tok/s", 4, 4)


def test_nobody_listens():
    """Catches a pass that needs a bar."""
    Meter(None, "reading", 10, 1).step()
