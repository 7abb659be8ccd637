"""A kill in each phase of both commands, and the same bytes after going on: a small run of tools/kill_test.py."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
N_PHASES = 9


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_one_kill_in_each_phase() -> None:
    """Catches a phase whose work is lost, done twice, or stumbled over when its run was killed; the tool itself kills a hundred times."""
    command = [sys.executable, str(ROOT / "tools" / "kill_test.py"), "--kills", str(N_PHASES), "--per-phase", "1"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", timeout=900, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = [line.split() for line in done.stdout.splitlines()]
    assert rows[-1][:3] == ["all", str(N_PHASES), str(N_PHASES)]
