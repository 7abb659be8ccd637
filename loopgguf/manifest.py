"""`NAME.gguf.sha256`: the digest of a finished file beside it, in the form of sha256sum, whose `-c` checks it too."""

from __future__ import annotations

import re
from pathlib import Path

from loopgguf.errors import InputError

_LINE = re.compile(r"(\\?)([0-9a-fA-F]{64}) [ *](.+)\n?")
_MAX_BYTES = 1 << 16


def manifest_path(path: Path) -> Path:
    """Return where the manifest of a file lies."""
    return path.with_name(path.name + ".sha256")


def _escaped(name: str) -> tuple[str, str]:
    """Return the mark in front of an escaped line, or none, and the name as sha256sum writes it: a line break would end the line."""
    escaped = name.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r")
    return "\\" if escaped != name else "", escaped


def manifest_line(path: Path, digest: str) -> bytes:
    """Return the manifest of a file with this SHA-256."""
    mark, name = _escaped(path.name)
    return f"{mark}{digest}  {name}\n".encode("utf-8", "surrogateescape")


def read_manifest(path: Path) -> str | None:
    """Return the SHA-256 that the manifest beside `path` says the file has; None where there is no manifest.

    Raises InputError when it is no manifest of one file, or of another file.
    """
    manifest = manifest_path(path)
    try:
        with manifest.open("rb") as stream:
            text = stream.read(_MAX_BYTES).decode("utf-8", "surrogateescape")
    except FileNotFoundError:
        return None
    except OSError as error:
        raise InputError(f"cannot read {manifest}: {error.strerror}. Check its permissions, or remove it") from error
    match = _LINE.fullmatch(text)
    if match is None:
        raise InputError(f"manifest {manifest}: got {text!r:.80}, expected one line of a SHA-256 and {path.name}. Remove it, or make it with sha256sum")
    if (match[1], match[3]) != _escaped(path.name):
        raise InputError(f"manifest {manifest}: got the digest of {match[3]!r:.80}, expected that of {path.name}. Remove it, or make it with sha256sum")
    return match[2].lower()
