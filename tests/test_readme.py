"""The README says what is there: every module in the tree, every command and option that it names, every exit code."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loopgguf import cli, errors

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
USAGE = re.search(r"```\n(loopgguf imatrix .*?)```", README, re.DOTALL)


def test_the_tree_names_every_module() -> None:
    """A module that a reader looks for in vain, or one that is gone."""
    named = set(re.findall(r"^  (\w+\.py) ", README, re.MULTILINE))
    assert named == {path.name for path in (ROOT / "loopgguf").glob("*.py")}


@pytest.mark.parametrize("command", ["imatrix", "quantize", "plan", "convert", "evaluate", "compare", "inspect", "profiles"])
def test_commands_have_the_options_that_are_named(command: str) -> None:
    """An option that was renamed, or never built."""
    assert USAGE is not None
    text = " ".join(line for line in re.split(r"\n(?=loopgguf)", USAGE[1]) if line.startswith(f"loopgguf {command}"))
    shown = CliRunner().invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"}).output
    assert text
    for option in re.findall(r"(?<![\w-])--?[a-z][\w-]*", text):
        assert option in shown, option


def test_exit_codes_are_the_errors_own() -> None:
    """A table that drifts from the code."""
    codes = {int(code) for code in re.findall(r"\b(\d+)\b", " ".join(re.findall(r"^\| ([\d, ]+) \|", README, re.MULTILINE)))}
    kinds = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.LoopggufError)]
    assert {kind.exit_code for kind in kinds} <= codes
    assert cli.EXIT_TERMINATED in codes
