"""summary.py: llama-imatrix's numbers, and how alike two imatrices are."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from loopgguf.accumulators import Columns
from loopgguf.statistics import Statistics
from loopgguf.summary import (
    TensorSummary,
    average_layers,
    compare_statistics,
    judge,
    rank,
    rank_correlation,
    summarize_experts,
    summarize_tensors,
    top_overlap,
)

GATE = "blk.1.ffn_gate_exps.weight"


def columns(rows: object, counts: list[int]) -> Columns:
    return Columns(np.array(rows, np.float32), np.array(counts))


def statistics(**named: Columns) -> Statistics:
    return Statistics({name.replace("__", "."): c for name, c in named.items()}, (), 1, 512)


def naive(columns: Columns) -> dict[str, float]:
    """The columns of `--show-statistics`, value by value as imatrix.cpp computes them."""
    values = []
    for row, count in zip(columns.sum_squares.tolist(), columns.counts.tolist(), strict=True):
        if count:
            values += [value / count for value in row]
    total, n = sum(values), len(values)
    mean = total / n
    deviation = math.sqrt(max(0.0, sum(v * v for v in values) / n - mean * mean))
    entropy = -sum(v / total * math.log2(v / total) for v in values if v > 0)
    zd = sum((v - mean) / deviation > 1 for v in values) / n
    active = 1 - sum(abs(v) <= 1e-5 for v in values) / n
    return {
        "total": total,
        "least": min(values),
        "largest": max(values),
        "mean": mean,
        "deviation": deviation,
        "active": active,
        "entropy_bits": entropy,
        "zd": zd,
    }


def test_columns_are_llama_imatrix_s():
    """Catches unreached experts that count as ones or zeros, and another deviation, entropy or ZD than upstream's."""
    rng = np.random.default_rng(0)
    c = columns(np.vstack([rng.gamma(0.3, 5, 30), rng.gamma(0.3, 5, 30), np.zeros(30)]), [7, 3, 0])
    c.sum_squares[0, :3] = 0
    [row] = summarize_tensors(Statistics({GATE: c}, (), 1, 512))
    for what, value in naive(c).items():
        assert getattr(row, what) == pytest.approx(value, rel=1e-5), what
    assert (row.layer, row.kind, row.n_columns, row.n_tokens) == (1, "ffn_gate_exps", 60, 10)
    assert row.entropy_share == pytest.approx(row.entropy_bits / math.log2(60))


def test_rows_come_in_upstream_s_order_with_cosines_of_the_layer_before():
    """Catches a cosine of means instead of sums, of the wrong layer (1 and 10), and another order."""
    found = {f"blk.{i}.attn_q.weight": columns([[1, i + 1]], [4]) for i in (0, 1, 9, 10)}
    found |= {"output.weight": columns([[5, 1]], [4]), "blk.0.attn_k.weight": columns([[3, 4]], [4]), "blk.1.attn_k.weight": columns([[4, 3]], [4])}
    rows = summarize_tensors(Statistics(found, (), 1, 512))
    assert [(row.kind, row.layer) for row in rows] == [("attn_k", 0), ("attn_k", 1), *(("attn_q", i) for i in (10, 9, 1, 0)), ("output", None)]
    cosines = {row.name: row.cosine for row in rows}
    assert cosines["blk.1.attn_k.weight"] == pytest.approx(24 / 25)
    assert cosines["blk.10.attn_q.weight"] == pytest.approx((1 + 10 * 11) / math.sqrt(101 * 122))
    assert cosines["blk.9.attn_q.weight"] == cosines["blk.0.attn_k.weight"] == cosines["output.weight"] == 0


def row(layer: int | None, n_columns: int, total: float, zd: float, cosine: float) -> TensorSummary:
    return TensorSummary("x", layer, "x", n_columns, 1, total, 0, 0, 0, 0, 0, 0, 0, zd, cosine)


def test_layers_are_averaged_by_columns():
    """Catches plain means over weights of unlike width."""
    first, second = average_layers([row(1, 10, 4, 0.5, 1), row(0, 100, 10, 0.1, 0.5), row(0, 300, 50, 0.3, 0.9), row(None, 7, 99, 1, 1)])
    assert (first.layer, first.total, first.zd, first.cosine) == (0, pytest.approx(40), pytest.approx(0.25), pytest.approx(0.8))
    assert (second.layer, second.total) == (1, 4)


def test_experts_that_are_hardly_reached_are_counted():
    """Catches a mixture of experts of which half was never calibrated."""
    found = summarize_experts(statistics(a=columns([[1]] * 4, [0, 1, 99, 300]), b=columns([[1]], [5])))
    assert [(e.name, e.counts, e.n_unreached, e.n_starved) for e in found] == [("a", (0, 1, 99, 300), 1, 2)]


# --- comparing ----------------------------------------------------------------------------------------------------------

vectors = npst.arrays(np.float64, 12, elements=st.sampled_from([0.0, 1.0, 2.0, 5.0, 9.0]))


@given(vectors, vectors)
def test_rank_correlation_is_spearman_s(a: np.ndarray, b: np.ndarray):
    """Catches ties that are ranked by their place."""

    def naive_ranks(v: np.ndarray) -> list[float]:
        return [sum(x < y for x in v) + (sum(x == y for x in v) - 1) / 2 for y in v]

    assert rank(a).tolist() == naive_ranks(a)
    if len(set(a)) > 1 and len(set(b)) > 1:
        assert rank_correlation(a, b) == pytest.approx(np.corrcoef(naive_ranks(a), naive_ranks(b))[0, 1], abs=1e-12)


def test_overlap_of_top_columns_by_hand():
    """Catches an overlap of the smallest, or of none at all where 1 % is less than a column."""
    assert top_overlap(np.array([1.0, 9, 3]), np.array([0.0, 7, 8])) == 0
    a, b = np.arange(300.0), np.arange(300.0)
    b[297] = 0  # of a's top 3, b lacks one
    assert top_overlap(a, b) == pytest.approx(2 / 3)


def test_imatrices_are_compared_per_reached_matrix():
    """Catches sums compared instead of means, and experts that only one of the two reached."""
    a = statistics(same=columns([[1, 2, 3]], [1]), moe=columns([[1, 2], [5, 1], [3, 3]], [1, 1, 0]), shape=columns([[1, 2]], [1]), a=columns([[1]], [1]))
    b = statistics(same=columns([[2, 4, 6]], [2]), moe=columns([[2, 4], [0, 0], [1, 9]], [2, 0, 1]), shape=columns([[1, 2, 3]], [1]))
    compared = compare_statistics(a, b)
    assert (compared.only_first, compared.only_second) == (("a", "shape"), ("shape",))
    for tensor in compared.tensors:
        assert (tensor.cosine, tensor.rank_correlation, tensor.top_overlap) == (pytest.approx(1), 1, 1)
    assert {t.name: (t.n_matrices, t.n_only_one) for t in compared.tensors} == {"moe": (1, 2), "same": (1, 0)}


def noisy(seed: int, noise: float) -> Statistics:
    scale = np.random.default_rng(0).gamma(0.5, 4, (40, 400)) + 1e-3
    factors = np.exp(noise * np.random.default_rng(seed).standard_normal((40, 400)))
    return statistics(**{f"w{i}": columns([scale[i] * factors[i]], [1]) for i in range(40)})


@pytest.mark.parametrize(("noise", "said"), [(0.01, "enough text"), (0.05, "nearly enough text"), (1.5, "not enough text")])
def test_the_verdict_follows_the_noise(noise: float, said: str):
    """Catches a verdict that is the same for everything."""
    assert judge(compare_statistics(noisy(1, noise), noisy(2, noise))).startswith(said)


def test_nothing_in_common_has_a_verdict():
    """Catches a quantile of nothing."""
    assert judge(compare_statistics(statistics(a=columns([[1]], [1])), statistics(b=columns([[1]], [1])))).startswith("nothing to compare")
