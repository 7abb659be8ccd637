"""What a finished file must reach, what it did reach, and by which steps: limits and readings, without running anything."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from loopgguf.collapse import CollapseCheck
from loopgguf.errors import UsageError
from loopgguf.evaluation import Measure, Quality
from loopgguf.pipeline import WriteResult


@dataclass(frozen=True)
class Gate:
    """Limits that the measured numbers of a file must not exceed (None: no limit), and how large recovery may make it.

    files: the selection text that it is measured on; default the one that ships.
    """

    max_kld_nats: float | None = None
    max_ppl_increase_percent: float | None = None
    max_size_bytes: int | None = None
    files: tuple[str | Path, ...] = ()

    def miss(self, reading: Reading) -> float:
        """Return how many times its limit the worst number is: at most 1 passes."""
        pairs = ((reading.mean_kld_nats, self.max_kld_nats), (reading.ppl_increase_percent, self.max_ppl_increase_percent))
        return max(measure.value / limit for measure, limit in pairs if limit is not None)

    def __str__(self) -> str:
        limits = [f"mean KLD at most {self.max_kld_nats:g}"] if self.max_kld_nats is not None else []
        limits += [f"perplexity at most {self.max_ppl_increase_percent:g} % higher"] if self.max_ppl_increase_percent is not None else []
        return ", ".join(limits)


@dataclass(frozen=True)
class Reading:
    """What was measured of a file on the selection text: mean KLD in nats, and how much higher the perplexity is, in percent."""

    mean_kld_nats: Measure
    ppl_increase_percent: Measure

    def __str__(self) -> str:
        return ", ".join(
            f"{name} {measure.value:.4g}{'' if measure.standard_error is None else f' ± {measure.standard_error:.2g}'}{unit}"
            for name, measure, unit in (("mean KLD", self.mean_kld_nats, ""), ("perplexity", self.ppl_increase_percent, " %"))
        )


@dataclass(frozen=True)
class GateStep:
    """One step towards the gate: what was done, the best file before and this one after, and whether this one is the best now."""

    step: str
    before: Reading | None  # None: the first file
    after: Reading
    total_bytes: int
    is_better: bool

    def __str__(self) -> str:
        before = f"{self.before} → " if self.before is not None else ""
        return f"{self.step}: {before}{self.after}; {self.total_bytes:,} bytes{'' if self.is_better else '; not better, the file before is kept'}"


@dataclass(frozen=True)
class GateResult:
    """A gate that was passed, on which text, and the steps it took."""

    gate: Gate
    texts: tuple[str, ...]
    n_scored: int
    steps: tuple[GateStep, ...]


@dataclass(frozen=True)
class CheckedResult(WriteResult):
    """A published model that was run beside its reference too: through a gate, for collapse, or both."""

    gate: GateResult | None = None
    collapse: CollapseCheck | None = None


def read_quality(quality: Quality) -> Reading:
    """Return the numbers of a measurement that gates are about."""
    ratio = quality.perplexity_ratio
    error = None if ratio.standard_error is None else 100 * ratio.standard_error
    return Reading(quality.mean_kld_nats, Measure(100 * (ratio.value - 1), error))


def parse_percent(text: str, option: str) -> float:
    """Return a percentage above 0, given with or without its sign; raise UsageError for anything else."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*%?\s*", text)
    if match is None or not 0 < float(match[1]) < math.inf:
        raise UsageError(f"{option}: got {text!r}, expected a percentage above 0 such as 2%")
    return float(match[1])


def below_gate_path(output: Path) -> Path:
    """Return where the best file is kept when it does not pass: NAME.below-gate.gguf."""
    return output.with_name(f"{output.name.removesuffix('.gguf')}.below-gate.gguf")
