"""`--model` and `--text` of every benchmark: short names for the models, made when they are first asked for.

`demo` is committed and small; it has no attention sinks and no massive activations, so what helps or hurts on it may do
the opposite elsewhere. `smollm2` is a real model from the package index, `smollm2-wide` the same function in shapes
that every ggml type fits (see `real_model.py`). Anything else is a path: a checkpoint folder or a full-precision GGUF.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from loopgguf.calibration import default_text
from loopgguf.errors import InputError, LoopggufError

DEMO_MODEL = Path(__file__).resolve().parents[1] / "tests" / "models" / "demo-llama"
NAMES = ("demo", "smollm2", "smollm2-wide")


def add_options(parser: argparse.ArgumentParser, *, model: str = "demo") -> None:
    """Add `--model` (may be given several times) and `--text FILE…` to a benchmark's parser."""
    parser.add_argument("--model", action="append", metavar="NAME|PATH", help=f"{', '.join(NAMES)}, or a path; may be given again (default {model})")
    parser.add_argument("--text", nargs="+", action="extend", type=Path, metavar="FILE", help="texts to measure on (default: the held-out text that ships)")
    parser.set_defaults(default_model=model)


def resolve_models(options: argparse.Namespace) -> dict[str, Path]:
    """Return the models asked for, name to path, in order. Raises InputError for one that cannot be had."""
    return {name: resolve_model(name) for name in options.model or [options.default_model]}


def resolve_model(name: str) -> Path:
    """Return the path that a model's name stands for; makes the real one in the user's cache if needed, reporting on standard error."""
    if name == "demo":
        return DEMO_MODEL
    if name in NAMES:
        from real_model import ensure_model

        with contextlib.redirect_stdout(sys.stderr):
            return ensure_model(widen=name == "smollm2-wide")
    path = Path(name)
    if not path.exists():
        raise InputError(f"model {name}: got no such file or folder, expected {', '.join(NAMES)} or a path")
    return path


def resolve_or_exit(name: str) -> Path:
    """Return what `resolve_model` does; end the program with the error's line and exit code where it raises."""
    try:
        return resolve_model(name)
    except LoopggufError as error:
        print(error, file=sys.stderr)
        sys.exit(error.exit_code)


def resolve_texts(options: argparse.Namespace) -> Sequence[Path]:
    """Return the texts to measure on, each by itself: those given, else the one that ships with the package."""
    return options.text or [default_text("heldout")]
