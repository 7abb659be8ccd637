"""The virtual environment that the scripts in this folder run in: made once, from pinned versions. Standard library only."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
CONSTRAINTS = ROOT / "constraints.txt"
_STAMP = VENV / "loopgguf-installed"


def run(*command: str | Path, **options: object) -> None:
    """Run a command, showing it; exit with its code when it fails."""
    print("$", " ".join(str(part) for part in command), flush=True)
    code = subprocess.run([str(part) for part in command], check=False, **options).returncode  # type: ignore[call-overload]
    if code != 0:
        sys.exit(f"failed with exit code {code}: {' '.join(str(part) for part in command)}")


def ensure_environment() -> None:
    """Make `.venv` and install the project with its development tools, unless this was done for the same pins."""
    if sys.version_info < (3, 11):  # noqa: UP036 - this script is what tells users of an older Python
        sys.exit(f"Python 3.11 or newer is needed, this is {sys.version.split()[0]}")
    wanted = hashlib.sha256(CONSTRAINTS.read_bytes() + (ROOT / "pyproject.toml").read_bytes()).hexdigest()
    if _STAMP.exists() and _STAMP.read_text(encoding="utf-8") == wanted:
        return
    print("making .venv; llama-cpp-python may compile for some minutes the first time", flush=True)
    if not PYTHON.exists():
        venv.create(VENV, with_pip=True)
    torch_pin = next(line for line in CONSTRAINTS.read_text(encoding="utf-8").splitlines() if line.startswith("torch=="))
    pip = (PYTHON, "-m", "pip", "--disable-pip-version-check", "install", "--quiet")
    run(*pip, torch_pin)  # alone and first: a pin that is asked for directly is what keeps a CPU build a CPU build
    run(*pip, "-c", CONSTRAINTS, "-e", f"{ROOT}[dev]")
    _STAMP.write_text(wanted, encoding="utf-8")


def enter_environment() -> None:
    """Go on in `.venv`'s Python with the same arguments, if this is another one."""
    ensure_environment()
    if Path(sys.prefix).resolve() != VENV.resolve():
        sys.exit(subprocess.run([str(PYTHON), *sys.argv], check=False).returncode)
