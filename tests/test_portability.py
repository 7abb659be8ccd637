"""Kept by reading the sources: UTF-8 at every text file, paths that are joined by pathlib, and names that every system takes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(path for folder in ("loopgguf", "tests", "tools") for path in (ROOT / folder).glob("*.py"))
TEXT_CALLS = {"read_text", "write_text", "open", "TextIOWrapper", "fdopen", "NamedTemporaryFile"}
FOLDERS = {"folder", "path", "directory", "root", "parent"}
BINARY_BY_DEFAULT = {"NamedTemporaryFile"}
MODE = re.compile("[rwaxbt+]{1,3}")
CHILD_CALLS = {"run", "Popen", "check_output"}
ILLEGAL = re.compile(r'[<>:"|?*\\\x00-\x1f]|[. ]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE)


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call, ast.expr | None]]:
    """Yield name, call, and what a method is called on."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            yield node.func.attr, node, node.func.value
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            yield node.func.id, node, None


def is_text(name: str, call: ast.Call, owner: ast.expr | None) -> bool:
    """Tell whether a call opens, reads or writes a file as text."""
    if name in ("read_text", "write_text"):
        return owner is not None  # else a function of ours
    if name == "open" and isinstance(owner, ast.Name) and owner.id in ("os", "gzip", "page"):  # a descriptor, bytes, a browser's page
        return False
    given = [*call.args[:2], *(keyword.value for keyword in call.keywords if keyword.arg == "mode")]
    modes = [value.value for value in given if isinstance(value, ast.Constant) and isinstance(value.value, str) and MODE.fullmatch(value.value)]
    return not any("b" in mode for mode in modes or ["rb" if name in BINARY_BY_DEFAULT else "r"])


def violations(source: str) -> list[str]:
    """Return what is wrong with a module, a line each."""
    tree, found = ast.parse(source), []
    for name, call, owner in calls(tree):
        given = {keyword.arg for keyword in call.keywords}
        if name in TEXT_CALLS and is_text(name, call, owner) and "encoding" not in given and None not in given:
            found.append(f"{call.lineno}: {name} without encoding")
        if name in CHILD_CALLS and "text" in given and "encoding" not in given:
            found.append(f"{call.lineno}: {name} with text and without encoding")
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr) and is_joined_path(node):
            found.append(f"{node.lineno}: a path joined with / in an f-string")
    return found


def is_joined_path(node: ast.JoinedStr) -> bool:
    """Tell whether an f-string is `{folder}/name`, with a folder by its name."""
    first, rest = node.values[0], node.values[1:]
    is_folder = isinstance(first, ast.FormattedValue) and isinstance(first.value, ast.Name) and first.value.id in FOLDERS
    return is_folder and bool(rest) and isinstance(rest[0], ast.Constant) and str(rest[0].value).startswith("/")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_a_module_reads_and_writes_alike_everywhere(path: Path) -> None:
    """Catches what works here and fails on Windows: the locale's encoding, and paths put together with slashes."""
    assert violations(path.read_text(encoding="utf-8")) == []


def test_the_rules_catch_what_they_are_for() -> None:
    """Catches rules that let everything pass."""
    bad = ['open("x")', 'Path("x").open()', 'p.open("w")', "p.read_text()", 'p.write_text("x")', "subprocess.run(c, text=True)", 'f"{folder}/x"']
    good = ['open("x", "rb")', 'p.open("wb")', 'p.open("w", encoding="utf-8")', 'os.open("x", 0)', 'f"{folder.name}/x"', "subprocess.run(c)"]
    assert all(violations(line) for line in bad)
    assert not any(violations(line) for line in good)


def test_names_that_are_written_are_legal_everywhere() -> None:
    """Catches a colon, a trailing dot or a device's name in a file that we make: Windows refuses it, or writes somewhere else."""
    from loopgguf import checkpoint, grams, manifest, protection, reportfile
    from loopgguf.container import part_path, shard_path

    path = Path("model.gguf")
    names = {checkpoint.CURRENT, checkpoint.PREVIOUS, checkpoint.TEMPORARY, checkpoint.LOCK, checkpoint.OBJECTS, checkpoint.WORK, checkpoint.SHARDS}
    names |= {*checkpoint.STAGES, checkpoint.job_folder(path).name, part_path(path).name, manifest.manifest_path(path).name}
    names |= {shard_path(path, 1, 3).name, grams.gram_path(Path("x.imatrix.gguf"), 1, 3).name}
    names |= {found.name for found in (*protection.protection_paths(Path("x.imatrix.gguf")), *reportfile.report_paths(Path("report")))}
    names |= {f"{checkpoint.content_key('a')}.json", "layer-00001", "no-layer", "hidden-1-of-3.f32"}
    assert [name for name in sorted(names) if ILLEGAL.search(name)] == []
    assert all(ILLEGAL.search(name) for name in ("a:b", "a?", "a.", "nul", "COM1.gguf", "a\tb"))
