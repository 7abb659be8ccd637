"""collapse.py: loops, lost letters and broken bytes are told from text, beside what the reference does."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_llama import write_tiny_llama

from loopgguf.collapse import CollapseCheck, check_collapse, describe_writing, judge_writing

GOOD = ("The keeper climbed the stairs, wound the clock and wrote down the wind.", "A lichen is a fungus that shelters an alga; neither looks like it.")


def test_good_text_beside_good_text_is_no_collapse() -> None:
    """Catches a limit that ordinary text exceeds, and a verdict without its numbers."""
    check = judge_writing(GOOD[::-1], GOOD)
    assert not check.is_collapsed
    assert "has not collapsed: repeated 0% (reference 0%)" in check.verdict


@pytest.mark.parametrize(
    ("texts", "reason"),
    [
        ((" the sea and" * 12, GOOD[1]), "repeats what came before"),
        ((GOOD[0], "a" * 60), "bits a character"),
        (("", ""), "0.00 bits a character"),
        ((GOOD[0], GOOD[1][:-4] + "\ufffd\ufffd\ufffd\x07"), "is no text"),
    ],
)
def test_collapse_is_seen(texts: tuple[str, ...], reason: str) -> None:
    """Catches a loop, a single letter, silence, and bytes that are no UTF-8."""
    check = judge_writing(texts, GOOD)
    assert any(reason in line for line in check.reasons), check
    assert check.verdict.startswith("generated text has collapsed: ")


def test_a_reference_that_loops_excuses_a_loop() -> None:
    """Catches a small model's own habit that is blamed on its file."""
    loop = (" the sea and" * 12,) * 2
    assert not judge_writing(loop, loop).is_collapsed


def test_repetition_does_not_cross_texts() -> None:
    """Catches answers to two prompts that begin alike, taken for a loop."""
    assert describe_writing([GOOD[0], GOOD[0]]).repeated == 0.0


def test_models_are_run(tmp_path: Path) -> None:
    """Catches a check of one file against itself, and answers to fewer prompts than there are."""
    reference = write_tiny_llama(tmp_path / "reference.gguf")
    check = check_collapse(reference, reference, n_threads=1)
    assert isinstance(check, CollapseCheck)
    assert len(check.texts) == 3
    assert check.writing == check.reference
