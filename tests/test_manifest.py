"""manifest.py: the digest beside a file is the one sha256sum reads, and another file's is refused."""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from loopgguf.errors import InputError
from loopgguf.manifest import manifest_line, manifest_path, read_manifest


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="no sha256sum")
@pytest.mark.parametrize("name", ["a.gguf", "a b*.gguf", "ä\\n.gguf", "two\nlines.gguf"])
def test_sha256sum_accepts_it(tmp_path: Path, name: str) -> None:
    """Catches a manifest in a form of our own: a wrong number of blanks, an unescaped name, another encoding."""
    path = tmp_path / name
    path.write_bytes(b"weights")
    manifest_path(path).write_bytes(manifest_line(path, hashlib.sha256(b"weights").hexdigest()))
    subprocess.run(["sha256sum", "--strict", "--check", manifest_path(path).name], cwd=tmp_path, check=True, capture_output=True)
    assert read_manifest(path) == hashlib.sha256(b"weights").hexdigest()
    path.write_bytes(b"weighty")
    assert subprocess.run(["sha256sum", "--check", manifest_path(path).name], cwd=tmp_path, check=False, capture_output=True).returncode == 1


def test_forms_of_other_tools_are_read(tmp_path: Path) -> None:
    """Catches a refusal of `sha256sum --binary`, of capital digits, or of a file without a line break at its end."""
    path = tmp_path / "a.gguf"
    assert read_manifest(path) is None
    for text in (f"{'AB' * 32}  a.gguf\n", f"{'ab' * 32} *a.gguf"):
        manifest_path(path).write_text(text, encoding="utf-8")
        assert read_manifest(path) == "ab" * 32


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (f"{'ab' * 32}  b.gguf\n", "expected that of a.gguf"),
        ("", "expected one line"),
        (f"{'ab' * 31}  a.gguf\n", "expected one line"),
        (f"{'ab' * 32}  a.gguf\n{'ab' * 32}  b.gguf\n", "expected one line"),
    ],
)
def test_anything_else_is_refused(tmp_path: Path, text: str, words: str) -> None:
    """Catches a check that passes because the manifest says nothing of the file."""
    manifest_path(tmp_path / "a.gguf").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        read_manifest(tmp_path / "a.gguf")
