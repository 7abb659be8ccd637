"""Does a file still write, or has it collapsed: repetition, entropy and unknown bytes of what it says, beside its reference.

Few prompts, the likeliest token each time. A small reference repeats itself too, so what counts is the difference.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loopgguf.verify import speak

PROMPTS = ("Once upon a time", "The most important thing to know about water is", "User: Write one sentence about the sea.\nAssistant:")
N_TOKENS = 64  # of each answer
RUN = 12  # characters that count as repeated when they came before
MIN_REPEATED, MORE_REPEATED = 0.5, 0.25  # collapsed: at least so much, and so much more than the reference
LOST_ENTROPY_BITS = 1.0
MORE_UNKNOWN = 0.02
LOW_BPW = 2.5  # bits per weight below which files are warned of and checked


@dataclass(frozen=True)
class Writing:
    """How texts read, all characters together: the part in runs that came before in the same text, the entropy of a
    character in bits, and the part that is no text (bytes that are no UTF-8, control characters)."""

    repeated: float
    entropy_bits: float
    unknown: float


@dataclass(frozen=True)
class CollapseCheck:
    """What a file and its reference wrote after the prompts, and why it counts as collapsed; no reasons: it does not."""

    writing: Writing
    reference: Writing
    reasons: tuple[str, ...]
    texts: tuple[str, ...]

    @property
    def is_collapsed(self) -> bool:
        return bool(self.reasons)

    @property
    def verdict(self) -> str:
        """The check in a line."""
        if self.is_collapsed:
            return f"generated text has collapsed: {'; '.join(self.reasons)}"
        ours, theirs = self.writing, self.reference
        return (
            f"generated text has not collapsed: repeated {ours.repeated:.0%} (reference {theirs.repeated:.0%}), "
            f"{ours.entropy_bits:.2f} bits a character ({theirs.entropy_bits:.2f}), unknown {ours.unknown:.0%} ({theirs.unknown:.0%})"
        )


def _repeated(text: str) -> tuple[int, int]:
    """Return how many of the runs of RUN characters came before, and how many there are."""
    runs = [text[i : i + RUN] for i in range(len(text) - RUN + 1)]
    return len(runs) - len(set(runs)), len(runs)


def describe_writing(texts: Sequence[str]) -> Writing:
    """Return how the texts read; no characters have no entropy."""
    counts = Counter("".join(texts))
    n = sum(counts.values())
    if not n:
        return Writing(0.0, 0.0, 0.0)
    again, runs = map(sum, zip(*map(_repeated, texts), strict=True))
    unknown = sum(count for character, count in counts.items() if character == "\ufffd" or (not character.isprintable() and not character.isspace()))
    return Writing(again / runs if runs else 0.0, -sum(c / n * math.log2(c / n) for c in counts.values()), unknown / n)


def judge_writing(texts: Sequence[str], reference_texts: Sequence[str]) -> CollapseCheck:
    """Return whether texts have collapsed beside those of the reference after the same prompts."""
    ours, theirs = describe_writing(texts), describe_writing(reference_texts)
    reasons = []
    if ours.repeated >= max(MIN_REPEATED, theirs.repeated + MORE_REPEATED):
        reasons.append(f"{ours.repeated:.0%} repeats what came before, the reference {theirs.repeated:.0%}")
    if ours.entropy_bits < theirs.entropy_bits - LOST_ENTROPY_BITS:
        reasons.append(f"{ours.entropy_bits:.2f} bits a character, the reference {theirs.entropy_bits:.2f}")
    if ours.unknown > theirs.unknown + MORE_UNKNOWN:
        reasons.append(f"{ours.unknown:.0%} is no text, of the reference {theirs.unknown:.0%}")
    return CollapseCheck(ours, theirs, tuple(reasons), tuple(texts))


def low_bits_warning(bpw: float, *, is_sized: bool) -> str:
    """Return what files of so few bits per weight usually lose, and what is better at the same size, in a line.

    The losses are Artefact2's of Mistral-7B (exp of ln PPL ratios .92, .30 and .20), the gain that of `tools/EXPERIMENTS.md`.
    """
    advice = "" if is_sized else "; types chosen by measured error (--size, or --target-bpw) had 0.35 to 0.75 of the mean KLD of llama-quantize's presets there"
    return f"{bpw:.2f} bits per weight: a 7B model had 2.5, 1.35 and 1.23 times its perplexity at 1.8, 2.2 and 2.4 bits, smaller models lose more{advice}"


def write_texts(path: Path, *, n_threads: int) -> tuple[str, ...]:
    """Return what a GGUF says after each of PROMPTS; raises QualityError as `verify.speak`."""
    return tuple(speak(path, prompt, N_TOKENS, n_threads=n_threads) for prompt in PROMPTS)


def check_collapse(candidate: Path, reference: Path, *, n_threads: int) -> CollapseCheck:
    """Return whether a GGUF still writes as its reference does; raises QualityError when one does not run."""
    return judge_writing(*(write_texts(path, n_threads=n_threads) for path in (candidate, reference)))
