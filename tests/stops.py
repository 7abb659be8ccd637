"""Runs that are stopped where a test wants it, and what they leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from loopgguf import pipeline
from loopgguf.journal import Journal
from loopgguf.pipeline import TensorLog


def stop_at(monkeypatch: pytest.MonkeyPatch, n: int, stop: Callable[[], object]) -> None:
    """Call `stop` when the n-th tensor is finished, before the journal knows."""
    finished, count = Journal.finished, [0]

    def counted(journal: Journal, name: str, log: TensorLog) -> None:
        count[0] += 1
        if count[0] == n:
            stop()
        finished(journal, name, log)

    monkeypatch.setattr(Journal, "finished", counted)


def take_down_encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that the names of the slabs' tensors come into, as they are encoded."""
    names: list[str] = []
    run = pipeline._run
    monkeypatch.setattr(pipeline, "_run", lambda slab: (names.append(slab.job.row.name), run(slab))[1])
    return names


def left(name: str = "x") -> list[str]:
    """Return the names of what lies in the current folder and begins with a name."""
    return sorted(path.name for path in Path().iterdir() if path.name.startswith(f"{name}."))
