"""What an imatrix says, in numbers: llama-imatrix's `--show-statistics`, coverage of experts, two imatrices compared.

Arrays in, numbers out; `report.py` shows them. Everything is about mean x² per input column, the importance that
llama-quantize uses. Source: tools/imatrix/imatrix.cpp (`compute_statistics`, `compute_cossim`, `show_statistics`).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from loopgguf.architectures import tensor_role
from loopgguf.statistics import Columns, Statistics

Vector = NDArray[np.float64]

ACTIVE = 1e-5  # a column whose mean x² is above it is active (imatrix.cpp)
TOP_SHARE = 0.01  # of the columns, whose overlap is compared
# Of two imatrices of every other chunk of one text. Measured on the demo model, in chunks of 512 tokens: 3 against 3
# 0.93 and 93 %, 12 against 12 0.95 and 92 %, 54 against 54 0.99 and 97 %. First half against second: 0.58.
ENOUGH_RANK_CORRELATION, ENOUGH_OVERLAP = 0.99, 0.95
TOO_LITTLE_RANK_CORRELATION, TOO_LITTLE_OVERLAP = 0.9, 0.8


# --- one imatrix --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorSummary:
    """llama-imatrix's columns for one weight: of mean x² over the columns of all matrices that saw a token.

    layer: None for a weight of no layer. total: Σ(Act²). active: share above 1e-5. entropy_bits: of the columns' shares
    of the total, and entropy_share of its maximum. zd: share of columns more than one deviation above the mean.
    cosine: of Σx² with the same weight's one layer before; 0 where there is none.
    """

    name: str
    layer: int | None
    kind: str
    n_columns: int
    n_tokens: int
    total: float
    least: float
    largest: float
    mean: float
    deviation: float
    active: float
    entropy_bits: float
    entropy_share: float
    zd: float
    cosine: float


@dataclass(frozen=True)
class LayerAverage:
    """Averages over a layer's weights, each counting by its columns: Σ(Act²), ZD and cosine similarity."""

    layer: int
    total: float
    zd: float
    cosine: float


@dataclass(frozen=True)
class ExpertCoverage:
    """How often the experts of one weight were reached, in tokens each; `starved`: reached less than a tenth of the mean."""

    name: str
    counts: tuple[int, ...]

    @property
    def n_unreached(self) -> int:
        return sum(n == 0 for n in self.counts)

    @property
    def n_starved(self) -> int:
        return sum(n < 0.1 * sum(self.counts) / len(self.counts) for n in self.counts)


def _means(columns: Columns) -> Vector:
    """Return mean x² per column of the matrices that saw a token, (n_reached, n_in)."""
    reached = columns.counts > 0
    means: Vector = columns.sum_squares[reached].astype(np.float64) / columns.counts[reached, None]
    return means


def _cosine(a: Vector, b: Vector) -> float:
    scale = math.sqrt(float(a @ a)) * math.sqrt(float(b @ b))
    return float(a @ b) / scale if scale else 0.0


def _summarize(name: str, columns: Columns, before: Columns | None) -> TensorSummary:
    role, values = tensor_role(name), _means(columns).ravel()
    total, deviation = float(values.sum()), float(values.std())
    shares = values[values > 0] / total if total > 0 else values[:0]
    entropy = float(-(shares * np.log2(shares)).sum())
    sums, sums_before = (None if c is None else c.sum_squares.astype(np.float64).ravel() for c in (columns, before))
    return TensorSummary(
        name=name,
        layer=role.layer,
        kind=role.kind,
        n_columns=len(values),
        n_tokens=int(columns.counts.sum()),
        total=total,
        least=float(values.min()),
        largest=float(values.max()),
        mean=float(values.mean()),
        deviation=deviation,
        active=float((values > ACTIVE).mean()),
        entropy_bits=entropy,
        entropy_share=entropy / math.log2(len(values)) if len(values) > 1 else 0.0,
        zd=float((values > values.mean() + deviation).mean()) if deviation > 0 else 0.0,
        cosine=_cosine(sums, sums_before) if sums is not None and sums_before is not None and len(sums) == len(sums_before) else 0.0,
    )


def summarize_tensors(statistics: Statistics) -> list[TensorSummary]:
    """Return llama-imatrix's `--show-statistics`, a row per weight, in its order: by kind of weight, then the largest total first."""
    rows = []
    for name, columns in statistics.columns.items():
        layer = tensor_role(name).layer
        before = None if layer is None else statistics.columns.get(name.replace(f"blk.{layer}.", f"blk.{layer - 1}.", 1))
        rows.append(_summarize(name, columns, before))
    return sorted(rows, key=lambda row: (row.kind, -row.total, row.name))


def average_layers(rows: Sequence[TensorSummary]) -> list[LayerAverage]:
    """Return the averages per layer, in order of the layers; weights of no layer are left out."""
    layers: dict[int, list[TensorSummary]] = defaultdict(list)
    for row in rows:
        if row.layer is not None:
            layers[row.layer].append(row)

    def average(members: Sequence[TensorSummary], what: str) -> float:
        return float(np.average([getattr(row, what) for row in members], weights=[row.n_columns for row in members]))

    return [LayerAverage(n, average(members, "total"), average(members, "zd"), average(members, "cosine")) for n, members in sorted(layers.items())]


def summarize_experts(statistics: Statistics) -> list[ExpertCoverage]:
    """Return how often each expert was reached, for every weight that has several."""
    return [ExpertCoverage(name, tuple(c.counts.tolist())) for name, c in sorted(statistics.columns.items()) if c.counts.size > 1]


# --- two imatrices ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TensorComparison:
    """How alike two imatrices weigh the columns of one weight: means over the matrices that both reached.

    cosine: of mean x². rank_correlation: Spearman's. top_overlap: share of the top 1 % of columns (at least one) that
    both have in it. n_matrices: how many were compared; n_only_one: reached by one of the two.
    """

    name: str
    cosine: float
    rank_correlation: float
    top_overlap: float
    n_matrices: int
    n_only_one: int


@dataclass(frozen=True)
class Comparison:
    """Two imatrices compared per weight, the least alike first, and the weights that only one of them has."""

    tensors: tuple[TensorComparison, ...]
    only_first: tuple[str, ...]
    only_second: tuple[str, ...]


def rank(values: Vector) -> Vector:
    """Return the rank of each value from 0, equal values sharing the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: Vector = (np.cumsum(counts) - (counts + 1) / 2)[place]
    return ranks


def rank_correlation(a: Vector, b: Vector) -> float:
    """Return Spearman's rank correlation of two vectors; 1 for equal ranks, 0 when one is constant."""
    ranks_a, ranks_b = rank(a), rank(b)
    if (ranks_a == ranks_b).all():
        return 1.0
    return _cosine(ranks_a - ranks_a.mean(), ranks_b - ranks_b.mean())


def top_overlap(a: Vector, b: Vector) -> float:
    """Return the share of the largest 1 % of `a`'s columns (at least one) that are among the largest of `b`; ties by column."""
    n = max(1, round(TOP_SHARE * len(a)))
    tops = [set(np.argsort(-values, kind="stable")[:n].tolist()) for values in (a, b)]
    return len(tops[0] & tops[1]) / n


def _compare(name: str, a: Columns, b: Columns) -> TensorComparison | None:
    if a.sum_squares.shape != b.sum_squares.shape:
        return None
    both, either = (a.counts > 0) & (b.counts > 0), (a.counts > 0) | (b.counts > 0)
    pairs = [(a.sum_squares[i].astype(np.float64) / a.counts[i], b.sum_squares[i].astype(np.float64) / b.counts[i]) for i in np.flatnonzero(both)]
    if not pairs:
        return TensorComparison(name, 0.0, 0.0, 0.0, 0, int(either.sum()))
    cosine, correlation, overlap = (float(np.mean([measure(x, y) for x, y in pairs])) for measure in (_cosine, rank_correlation, top_overlap))
    return TensorComparison(name, cosine, correlation, overlap, len(pairs), int(either.sum() - both.sum()))


def compare_statistics(first: Statistics, second: Statistics) -> Comparison:
    """Return how alike two imatrices of one model are, per weight; a weight of unlike shape counts as each one's own."""
    compared: Mapping[str, TensorComparison | None] = {
        name: _compare(name, first.columns[name], second.columns[name]) for name in sorted(first.columns.keys() & second.columns.keys())
    }
    tensors = [c for c in compared.values() if c is not None]
    alone = [tuple(n for n in sorted(mine.columns) if compared.get(n) is None) for mine in (first, second)]
    return Comparison(tuple(sorted(tensors, key=lambda c: (c.rank_correlation, c.name))), *alone)


def judge(comparison: Comparison) -> str:
    """Return in a line whether the calibration text is enough: whether other text of its kind says the same.

    Judged by the rank correlation that nine of ten weights reach, and the mean overlap of top columns. The two
    must come from different samples of the same mixture, such as every other document: one half of a text against the
    other compares topics. Merged, they are then more exact than either.
    """
    if not comparison.tensors:
        return "nothing to compare: the two have no weight in common"
    correlation = float(np.quantile([c.rank_correlation for c in comparison.tensors], 0.1))
    overlap = float(np.mean([c.top_overlap for c in comparison.tensors]))  # of few columns each: only their mean is steady
    measured = f"the rank correlation is at least {correlation:.3f} in nine of ten weights, the overlap of the top 1 % {100 * overlap:.0f} % on average"
    if correlation >= ENOUGH_RANK_CORRELATION and overlap >= ENOUGH_OVERLAP:
        return f"enough text: {measured}; more of this kind would change little"
    if correlation >= TOO_LITTLE_RANK_CORRELATION and overlap >= TOO_LITTLE_OVERLAP:
        return f"nearly enough text: {measured}; twice as much would still sharpen it (merge the two with --in-file)"
    return f"not enough text: {measured}; use several times as much, or text nearer to what the model is for"
