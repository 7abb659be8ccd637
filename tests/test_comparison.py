"""comparison.py: names, baselines, the Pareto mark against its definition, and the order of the files."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_llama import N_VOCAB, write_tiny_llama

from loopgguf.comparison import compare_measured, file_size, find_baseline, pareto, short_names
from loopgguf.errors import UsageError
from loopgguf.evaluation import measure_qualities
from loopgguf.workflow import convert

Points = list[tuple[int, int]]


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), max_size=8))
def test_pareto_is_its_definition(points: Points) -> None:
    """Catches a mark on a file that another beats, and none on one of two equal files."""

    def beats(q: tuple[int, int], p: tuple[int, int]) -> bool:
        return (q[0] < p[0] and q[1] <= p[1]) or (q[0] <= p[0] and q[1] < p[1])

    assert pareto(points) == [not any(beats(q, p) for q in points) for p in points]


def test_names_and_baselines() -> None:
    """Catches two files that cannot be told apart, and a baseline that is silently another file."""
    paths = [Path("x/a.gguf"), Path("y/a.gguf"), Path("b.gguf")]
    assert short_names(paths) == ["x/a.gguf", "y/a.gguf", "b.gguf"]
    assert [find_baseline(name, paths) for name in (None, "b", "b.gguf", "y/a.gguf")] == [0, 2, 2, 1]
    for name in ("a", "a.gguf", "c"):
        with pytest.raises(UsageError, match=rf"--baseline: got {name}, expected one of"):
            find_baseline(name, paths)
    with pytest.raises(UsageError, match=r"b\.gguf twice"):
        short_names([*paths, Path("x/../b.gguf")])


def test_files_are_sorted_by_size_and_paired_with_the_baseline(tmp_path: Path) -> None:
    """Catches numbers that change places with another file's when the rows are sorted."""
    reference = write_tiny_llama(tmp_path / "reference.gguf")
    near = write_tiny_llama(tmp_path / "near.gguf", noise=0.01)
    far = convert(write_tiny_llama(tmp_path / "far32.gguf", noise=0.05), tmp_path / "far.gguf", "f16").paths[0]
    tokens = np.random.default_rng(2).integers(3, N_VOCAB, (8, 16)).astype(np.int32)
    paths = [near, far]
    qualities = measure_qualities(paths, reference, tokens, n_threads=1)
    files = compare_measured(paths, qualities, baseline=0)
    assert [file.name for file in files] == ["far.gguf", "near.gguf"]
    assert [file.quality for file in files] == [qualities[1], qualities[0]]
    assert [file.n_bytes for file in files] == [far.stat().st_size, near.stat().st_size]
    assert (file_size(near)[1], files[1].to_baseline) == (32, None)
    assert [file.is_pareto for file in files] == [True, True]
    paired = files[0].to_baseline
    assert paired is not None and paired.mean_kld_ratio is not None and paired.mean_kld_ratio_interval is not None
    low, high = paired.mean_kld_ratio_interval
    assert 1 < low < paired.mean_kld_ratio.value < high
