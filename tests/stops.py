"""Runs that are stopped where a test wants it, and what they leave."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from loopgguf import journal as journal_module
from loopgguf import pipeline, publish
from loopgguf.journal import Journal
from loopgguf.pipeline import TensorLog


class Killed(BaseException):
    """Stands for the end of the process: nothing but the file system knows of it."""


def isolate(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Work in an empty folder and cache; every finished tensor is saved at once; llama.cpp is not asked (other tests do)."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    monkeypatch.setattr(publish, "Journal", partial(Journal, min_seconds=0))
    monkeypatch.setattr(journal_module, "MAX_SHARE", float("inf"))
    monkeypatch.setattr(publish, "speak", lambda *_args, **_kwargs: "hello")


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
