"""The command line as tests run it: what a command printed, and the code it exited with."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from loopgguf.container import TensorInfo, read_gguf

Run = Callable[..., "Outcome"]


class Outcome:
    """What a command printed and the code it exited with."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def error(self) -> str:
        """The one line of the error; fails when there is none or a traceback."""
        lines = [line for line in self.err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, self.err
        assert "Traceback" not in self.err
        return lines[0]


def refused(outcome: Outcome, code: int, *words: object) -> None:
    """One line with all of these words, the documented code, and nothing written into the current folder."""
    assert outcome.code == code, outcome.err
    for word in words:
        assert str(word) in outcome.error, outcome.error
    left = [path for path in Path.cwd().rglob("*") if path.suffix in (".gguf", ".part")]
    assert left == []


@dataclass(frozen=True)
class Place:
    """What a case is made of: a checkpoint folder to break, a GGUF of one layer to break, and a folder for other files."""

    model: Path
    gguf: Path
    scratch: Path
    run: Run
    monkeypatch: pytest.MonkeyPatch

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.scratch / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    def edit_config(self, **changes: object) -> Path:
        path = self.model / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
        return self.model

    def patch(self, offset: int, raw: bytes) -> Path:
        """Overwrite bytes of the GGUF."""
        with self.gguf.open("r+b") as stream:
            stream.seek(offset)
            stream.write(raw)
        return self.gguf

    def tensor(self, name: str = "blk.0.ffn_down.weight") -> TensorInfo:
        return next(info for info in read_gguf(self.gguf).tensors if info.name == name)
