"""Measured files side by side: sizes, paired differences from a baseline, and which of them no other beats.

Takes what `evaluation.py` measured and reads the files' headers; runs and renders nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from loopgguf.container import read_shards
from loopgguf.errors import UsageError
from loopgguf.evaluation import PairedComparison, Quality, compare_paired


@dataclass(frozen=True)
class ComparedFile:
    """A measured file: the name it goes by, its exact bytes over all shards, and the bits per weight of its tensors.

    `to_baseline` is None for the baseline itself. `is_pareto`: no other file is as small and as close, and better in one.
    """

    name: str
    path: Path
    n_bytes: int
    bpw: float
    quality: Quality
    to_baseline: PairedComparison | None
    is_pareto: bool


def file_size(path: Path) -> tuple[int, float]:
    """Return the bytes of a GGUF, all its shards together, and the bits per weight of its tensors."""
    files = read_shards(path)
    n_weights = sum(math.prod(tensor.shape) for file in files for tensor in file.tensors)
    n_bits = sum(8 * tensor.n_bytes for file in files for tensor in file.tensors)
    return sum(file.size_bytes for file in files), n_bits / n_weights


def short_names(paths: Sequence[Path]) -> list[str]:
    """Return the file names; the whole path where two are of one name. Raises UsageError for a file given twice."""
    for i, path in enumerate(paths):
        if path.resolve() in [other.resolve() for other in paths[:i]]:
            raise UsageError(f"files to compare: got {path} twice, expected different files")
    names = [path.name for path in paths]
    return [str(path) if names.count(path.name) > 1 else path.name for path in paths]


def find_baseline(name: str | None, paths: Sequence[Path]) -> int:
    """Return the index of the file that `name` (a path, a file name, or that without `.gguf`) means; the first for None."""
    if name is None:
        return 0
    found = [i for i, path in enumerate(paths) if name in (str(path), path.name, path.stem)]
    if len(found) != 1:
        raise UsageError(f"--baseline: got {name}, expected one of the files to compare: {', '.join(str(path) for path in paths)}")
    return found[0]


def pareto(points: Sequence[tuple[float, float]]) -> list[bool]:
    """Return of each point whether no other is at most as large in both coordinates and smaller in one."""
    return [not any(q != p and q[0] <= p[0] and q[1] <= p[1] for q in points) for p in points]


def compare_measured(paths: Sequence[Path], qualities: Sequence[Quality], baseline: int = 0) -> tuple[ComparedFile, ...]:
    """Return the files sorted by size, each against `paths[baseline]` by paired differences over chunks."""
    sizes = [file_size(path) for path in paths]
    best = pareto([(n_bytes, quality.mean_kld_nats.value) for (n_bytes, _), quality in zip(sizes, qualities, strict=True)])
    rows = [
        ComparedFile(name, path, n_bytes, bpw, quality, None if i == baseline else compare_paired(quality, qualities[baseline]), best[i])
        for i, (name, path, (n_bytes, bpw), quality) in enumerate(zip(short_names(paths), paths, sizes, qualities, strict=True))
    ]
    return tuple(sorted(rows, key=lambda row: row.n_bytes))
