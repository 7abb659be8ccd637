"""`--model` and `--text` of every benchmark: short names for the models, made when they are first asked for.

`demo` is committed and small; it has no attention sinks and no massive activations, so what helps or hurts on it may do
the opposite elsewhere. `smollm2` is a real model from the package index, `smollm2-wide` the same function in shapes
that every ggml type fits (see `real_model.py`). `synthetic-4GB`, of any size, has random weights: for speed and memory
alone (see `synthetic_model.py`). Anything else is a path: a checkpoint folder or a full-precision GGUF.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from loopgguf.calibration import default_text
from loopgguf.errors import InputError, LoopggufError
from loopgguf.formats import parse_size

DEMO_MODEL = Path(__file__).resolve().parents[1] / "tests" / "models" / "demo-llama"
NAMES = ("demo", "smollm2", "smollm2-wide")
SYNTHETIC = "synthetic-"
SCRATCH = Path(tempfile.gettempdir()) / "loopgguf-models"


def add_model_option(parser: argparse.ArgumentParser, *default: str, names: Sequence[str] = NAMES) -> None:
    """Add `--model`, which may be given several times, to a benchmark's parser."""
    known = f"{', '.join(names)}, or a path; may be given again"
    parser.add_argument("--model", action="append", metavar="NAME|PATH", help=f"{known} (default {' and '.join(default)})")
    parser.set_defaults(default_models=list(default))


def add_text_option(parser: argparse.ArgumentParser, *, default: Literal["calibration", "heldout"] = "heldout") -> None:
    """Add `--text FILE…` to a benchmark's parser."""
    ships = {"calibration": "calibration text", "heldout": "held-out text"}[default]
    parser.add_argument("--text", nargs="+", action="extend", type=Path, metavar="FILE", help=f"texts to measure on (default: the {ships} that ships)")
    parser.set_defaults(default_text=default)


def add_scratch_option(parser: argparse.ArgumentParser) -> None:
    """Add `--folder` and `--vocab`, of models that are made or converted, to a benchmark's parser."""
    parser.add_argument("--folder", type=Path, default=SCRATCH, metavar="DIR", help="where models that are made or converted are kept")
    parser.add_argument("--vocab", type=int, default=128_000, help="tokens of a synthetic model's vocabulary (default 128000)")


def model_names(options: argparse.Namespace) -> list[str]:
    """Return the names asked for, in order."""
    return list(options.model or options.default_models)


def resolve_models(options: argparse.Namespace) -> dict[str, Path]:
    """Return the models asked for, name to path, in order. Raises InputError for one that cannot be had."""
    return {name: resolve_model(name) for name in model_names(options)}


@dataclass(frozen=True)
class Forms:
    """A model in the forms that a benchmark compares: as a checkpoint folder (None: there is none), as a BF16 GGUF, and an
    imatrix of random importances, for speed alone."""

    checkpoint: Path | None
    gguf: Path
    imatrix: Path


def resolve_forms(name: str, options: argparse.Namespace) -> Forms:
    """Return a model in all its forms, converted now; a synthetic one is made once. Raises InputError as `resolve_model`."""
    from synthetic_model import find_or_make, make_gguf, make_imatrix

    if name.startswith(SYNTHETIC):
        made = find_or_make(options.folder, parse_size(name.removeprefix(SYNTHETIC)), options.vocab)
        return Forms(made.checkpoint, made.gguf, made.imatrix)
    path = resolve_model(name)
    options.folder.mkdir(parents=True, exist_ok=True)
    stem = path.resolve().name.removesuffix(".gguf")
    gguf, imatrix = path, options.folder / f"{stem}.imatrix.gguf"
    if path.is_dir():
        gguf = options.folder / f"{stem}-BF16.gguf"
        make_gguf(path, gguf)
    make_imatrix(gguf, imatrix)
    return Forms(path if path.is_dir() else None, gguf, imatrix)


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
    return options.text or [default_text(options.default_text)]
