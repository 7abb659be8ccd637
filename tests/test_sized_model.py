"""By size from end to end on the demo model: the file has the planned bytes, and `--plan` makes the same file again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from upstream import differing

from loopgguf.architectures import tensor_role
from loopgguf.cli import main
from loopgguf.container import read_gguf
from loopgguf.errortable import FEEDBACK_GAINS
from loopgguf.feedback import Compensate
from loopgguf.importance import ImatrixRequest
from loopgguf.workflow import QuantizeRequest, compute_imatrix, quantize

PROFILE = "{default: Q4_0, types: [Q4_0, Q5_0, Q8_0]}"  # quick to encode, and no imatrix needed


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("p.yaml").write_text(PROFILE, encoding="utf-8")


def run(*arguments: object) -> int:
    try:
        main([str(a) for a in arguments])
    except SystemExit as ended:
        return int(ended.code or 0)
    return 0


def sha256(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def test_a_plan_is_executed_to_the_byte_and_a_size_makes_the_same_file(demo_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch a plan that foresees another size than the writer makes, or two ways to one file that differ."""
    options = (demo_gguf, "--size", "4.5MB", "--profile", "p.yaml", "--no-imatrix")
    assert run("plan", *options, "-o", "plan.json", "--save-tensor-types", "types.txt", "--explain") == 0
    printed = capsys.readouterr().out
    assert "ffn_down" in printed and "nats" in printed and "prompt tok/s" in printed and "tok/s: of 10⁹ weights" in " ".join(printed.split())
    planned = json.loads(Path("plan.json").read_text(encoding="utf-8"))
    assert set(planned["speeds"]) == {row["type"] for row in planned["rows"] if len(row["shape"]) > 1}
    assert run("quantize", demo_gguf, "-o", "a.gguf", "--plan", "plan.json") == 0
    assert run("quantize", *options, "-o", "b.gguf") == 0
    assert Path("a.gguf").stat().st_size == planned["total_bytes"] <= 4_500_000
    assert sha256("a.gguf") == sha256("b.gguf")
    assert len({tensor.type for tensor in read_gguf(Path("a.gguf")).tensors}) > 2
    pins = [part for line in Path("types.txt").read_text(encoding="utf-8").split() for part in ("--tensor-type", line)]
    assert run("quantize", demo_gguf, "-o", "c.gguf", "--quant-type", "Q4_0", "--no-imatrix", *pins) == 0
    assert differing(Path("a.gguf"), Path("c.gguf")) == []


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (("--size", "1MB"), 2, "size: got 1,000,000 bytes, expected "),
        (("--target-bpw", "40"), 2, "--target-bpw: got 40"),
        (("--size", "4MB", "--target-bpw", "4"), 2, "--size 4MB and --target-bpw 4.0 contradict"),
        (("--size", "much"), 2, "not a size"),
        (("--plan", "plan.json", "--pure"), 2, "--plan already says every type"),
        (("--plan", "plan.json"), 3, "plan.json"),
    ],
)
def test_what_cannot_be_is_one_line(demo_gguf: Path, options: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch a traceback, or a file left behind."""
    rest = () if "--plan" in options else ("--profile", "p.yaml", "--no-imatrix")
    assert run("quantize", demo_gguf, "-o", "x.gguf", *options, *rest) == code
    assert message in capsys.readouterr().err.replace("\n", " ")
    assert not Path("x.gguf").exists()


def test_a_changed_plan_is_refused(demo_gguf: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Would catch bytes made under a plan that no longer is what it was."""
    assert run("plan", demo_gguf, "--quant-type", "Q4_0", "--no-imatrix", "-o", "plan.json") == 0
    text = Path("plan.json").read_text(encoding="utf-8")
    Path("plan.json").write_text(text.replace("attn_q", "attn_x"), encoding="utf-8")
    assert run("quantize", demo_gguf, "-o", "x.gguf", "--plan", "plan.json") == 3
    assert "hash in plan.json" in capsys.readouterr().err


def test_matrices_beside_the_imatrix_say_what_errors_cost(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Would catch a backward pass for what the matrices tell already, or files with error feedback planned by errors without it."""
    text = ImatrixRequest(n_samples=4, ctx_size=128, gram=True, gradient=True)
    imatrix = compute_imatrix(demo_model, Path("demo.imatrix.gguf"), text).path
    monkeypatch.setattr("loopgguf.intent.find_sensitivities", lambda *_: pytest.fail("a pass of its own"))
    request = QuantizeRequest(size_bytes=4_500_000, profile=Path("p.yaml"), imatrix=imatrix, dry_run=True)
    plain, feedback = (quantize(demo_model, Path("x.gguf"), replace(request, compensate=c)).plan for c in (Compensate.OFF, Compensate.FAST))
    same = [(a, b) for a, b in zip(plain.rows, feedback.rows, strict=True) if a.estimated_error and b.estimated_error and a.type is b.type]
    assert len(same) > 10 and {"token_embd", "output"} <= {tensor_role(row.name).kind for row in plain.rows if row.estimated_error}
    for a, b in same:
        assert b.estimated_error == pytest.approx(FEEDBACK_GAINS[tensor_role(a.name).kind] * a.estimated_error)
