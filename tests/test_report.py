"""report.py: what is shown of an imatrix."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from loopgguf.accumulators import Columns
from loopgguf.compensate import Damping
from loopgguf.errors import InputError
from loopgguf.pipeline import FeedbackLog
from loopgguf.report import (
    bar,
    compare_imatrices,
    comparison_json,
    comparison_lines,
    comparison_table,
    feedback_line,
    imatrix_json,
    imatrix_report,
    importance_chart,
    inspect_file,
    inspection_json,
)
from loopgguf.statistics import Statistics, save_imatrix
from loopgguf.summary import LayerAverage


def shown(*parts: object) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=200)
    for part in parts:
        console.print(part)
    return stream.getvalue()


def some(seed: int = 0, n_layers: int = 2) -> Statistics:
    rng = np.random.default_rng(seed)
    found = {"blk.0.ffn_up_exps.weight": Columns(rng.random((4, 8), np.float32), np.array([0, 100, 900, 48]))}
    found |= {f"blk.{i}.attn_q.weight": Columns(rng.random((1, 8), np.float32), np.array([512])) for i in range(n_layers)}
    return Statistics(found, ("a.txt",), 1, 512)


def test_an_imatrix_is_shown_whole():
    """Catches a table that is left out, and experts of which nobody is told."""
    text = shown(*imatrix_report(some()))
    for heading in ("Σ(Act²)", "E (norm)", "CosSim", "μΣ(Act²)", "Most and least important layers", "Coverage of experts"):
        assert heading in text
    line = next(line for line in text.splitlines() if line.startswith("blk.0.ffn_up_exps"))
    assert line.split()[1:7] == ["4", "1", "1", "0", "262", "900"]
    assert "Coverage of experts" not in shown(*imatrix_report(Statistics({"output.weight": Columns(np.ones((1, 4), np.float32), np.array([1]))}, (), 1, 512)))


def test_bars_are_as_long_as_their_share():
    """Catches a bar of nothing for a half, and one that is longer than its place."""
    assert (bar(0), bar(1, 4), bar(2, 4), bar(0.5, 4), bar(0.28125, 4)) == ("", "████", "████", "██", "█▏")


def chart(*totals: float) -> list[str]:
    return shown(importance_chart([LayerAverage(i, total, 0, 0) for i, total in enumerate(totals)])).splitlines()


def test_the_chart_shows_both_ends():
    """Catches a chart of 80 lines, one in the order of layers, and bars that vanish beside one huge layer."""
    lines = chart(*range(1, 21))
    assert [line.split()[0] for line in lines[2:]] == ["19", "18", "17", "16", "15", "…", "4", "3", "2", "1", "0"]
    assert lines[2].count("█") == 32 and lines[3].count("█") == 30
    lines = chart(1, 1e6, 1e3, 0)
    assert "logarithmic" in lines[0]
    assert [line.count("█") for line in lines[2:]] == [32, 17, 3, 0]


def test_two_imatrices_are_compared(tmp_path: Path):
    """Catches a comparison without verdict, and one of different models."""
    paths = [tmp_path / f"{name}.imatrix.gguf" for name in "abc"]
    save_imatrix(some(), paths[0])
    save_imatrix(some(n_layers=3), paths[1])
    save_imatrix(Statistics({"other.weight": Columns(np.ones((1, 4), np.float32), np.array([1]))}, (), 1, 512), paths[2])
    comparison = compare_imatrices(paths[0], paths[1])
    assert "only in the second: blk.2.attn_q.weight" in comparison_lines(comparison)
    assert "enough text" in comparison_lines(comparison)[-1]
    assert "rank correlation" in shown(comparison_table(comparison))
    assert json.loads(json.dumps(comparison_json(comparison)))["verdict"].startswith("enough text")
    with pytest.raises(InputError, match="got none in common"):
        compare_imatrices(paths[0], paths[2])


def test_an_inspection_is_json(tmp_path: Path, demo_gguf: Path):
    """Catches numbers that are no JSON, and a legacy imatrix that is taken for a model."""
    save_imatrix(some(), tmp_path / "x.dat")
    found = json.loads(json.dumps(inspection_json(inspect_file(tmp_path / "x.dat"))))
    assert found == json.loads(json.dumps(imatrix_json(inspect_file(tmp_path / "x.dat").statistics)))
    assert found["datasets"] == ["a.txt"] and len(found["tensors"]) == 3
    model = json.loads(json.dumps(inspection_json(inspect_file(demo_gguf))))
    assert model["n_bytes"] == demo_gguf.stat().st_size
    assert {"name": "output_norm.weight", "type": "F32", "shape": [256], "n_bytes": 1024, "file": demo_gguf.name} in model["tensors"]


def test_feedback_is_told_in_a_line() -> None:
    """Catches ways that are counted wrongly, and weights that make up for a drift said of a file without any."""
    logs = [FeedbackLog("columns", 0.25, Damping(0.1)), FeedbackLog("columns", 0.75, Damping(0.1)), FeedbackLog("plain", 1.0, None)]
    line = "error feedback: columns 2, plain 1 of 3 matrices; estimated error on held-out tokens 0.667 × the plain encoder's"
    assert feedback_line(logs) == line
    assert feedback_line([replace(logs[0], is_aimed=True), *logs[1:]]) == f"{line}; 1 make up for the drift of their inputs, and their error is from there"
