"""(bytes, error) of every choice of every item, and a budget → one choice per item: the least total error that fits.

A multiple-choice knapsack. The linear relaxation is solved exactly (lower convex hulls, cheapest error per byte first;
Sinha and Zoltners, Operations Research 27, 1979), which gives a bound that no allocation can beat and a good start.
Choices whose reduced cost exceeds the gap between the two are in no better solution and are dropped; what is left, a
few items, goes to an integer program (HiGHS through scipy). All is deterministic: limits are nodes, never seconds.
Knows integers and floats only: no tensors, types or files.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_NODES = 20_000  # of the branch and bound tree; reached only where the remaining gap is already tiny
_SLACK = 1e-9  # relative: what floating point may lose when a bound is compared

Ints = NDArray[np.int64]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Choice:
    """One way to treat an item: its cost in bytes and what it does to the result, in any one additive unit."""

    n_bytes: int
    error: float


@dataclass(frozen=True)
class Solution:
    """The index of the choice of each item, what they sum to, and how far from optimal that can be at most.

    lower_bound: no allocation within the budget has less error (the linear relaxation, or better where the integer
    program proved more). price: error per byte at the margin, the multiplier of the budget.
    """

    picks: tuple[int, ...]
    n_bytes: int
    error: float
    lower_bound: float
    price: float

    @property
    def gap(self) -> float:
        """How much less error an optimal allocation could have at most, relative to this one's."""
        return max(0.0, self.error - self.lower_bound) / self.error if self.error > 0 else 0.0


def reachable_bytes(items: Sequence[Sequence[Choice]]) -> tuple[int, int]:
    """Return the bytes of the smallest and of the largest allocation."""
    return sum(min(c.n_bytes for c in item) for item in items), sum(max(c.n_bytes for c in item) for item in items)


def total(items: Sequence[Sequence[Choice]], picks: Sequence[int]) -> tuple[int, float]:
    """Return the bytes and the error of an allocation; errors are added in the items' order."""
    chosen = [item[pick] for item, pick in zip(items, picks, strict=True)]
    return sum(c.n_bytes for c in chosen), float(sum(c.error for c in chosen))


def efficient(choices: Sequence[Choice]) -> list[int]:
    """Return the choices not beaten by one as small or smaller, smallest first; of equals the first."""
    kept: list[int] = []
    for i in sorted(range(len(choices)), key=lambda i: (choices[i].n_bytes, choices[i].error, i)):
        if not kept or choices[i].error < choices[kept[-1]].error:
            kept.append(i)
    return kept


def convex_hull(choices: Sequence[Choice]) -> list[int]:
    """Return the efficient choices on the lower convex hull of error over bytes, smallest first."""
    hull: list[int] = []
    for i in efficient(choices):
        while len(hull) > 1 and _slope(choices, hull[-2], hull[-1]) >= _slope(choices, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _slope(choices: Sequence[Choice], a: int, b: int) -> float:
    """Error per byte between two efficient choices, negative."""
    return (choices[b].error - choices[a].error) / (choices[b].n_bytes - choices[a].n_bytes)


@dataclass(frozen=True)
class _Relaxation:
    picks: tuple[int, ...]  # whole steps only, and then what else still fits
    bound: float
    price: float


def _relax(items: Sequence[Sequence[Choice]], budget_bytes: int) -> _Relaxation:
    """Solve the linear relaxation: take the hulls' steps by error saved per byte until one no longer fits."""
    hulls = [convex_hull(item) for item in items]
    steps = sorted((_slope(items[i], a, b), i, step, b) for i, hull in enumerate(hulls) for step, (a, b) in enumerate(itertools.pairwise(hull)))
    picks = [hull[0] for hull in hulls]
    left = budget_bytes - total(items, picks)[0]
    bound, price = None, 0.0
    stopped = set[int]()
    for slope, i, _, b in steps:
        extra = items[i][b].n_bytes - items[i][picks[i]].n_bytes
        if i not in stopped and extra <= left:
            picks[i], left = b, left - extra
            continue
        if bound is None:  # the one step that the relaxation takes in part
            bound, price = total(items, picks)[1] + slope * left, -slope
        stopped.add(i)  # a later step of the same item would skip this one
    return _Relaxation(tuple(picks), total(items, picks)[1] if bound is None else bound, price)


def _fill(items: Sequence[Sequence[Choice]], picks: Sequence[int], budget_bytes: int) -> tuple[int, ...]:
    """Spend what is left on the single changes that save most error, hull or not, until none fits."""
    filled = list(picks)
    left = budget_bytes - total(items, picks)[0]
    while True:
        gains = [
            (items[i][k].error - items[i][pick].error, i, k)
            for i, pick in enumerate(filled)
            for k in range(len(items[i]))
            if items[i][k].n_bytes - items[i][pick].n_bytes <= left and items[i][k].error < items[i][pick].error
        ]
        if not gains:
            return tuple(filled)
        _, i, k = min(gains)
        left -= items[i][k].n_bytes - items[i][filled[i]].n_bytes
        filled[i] = k


def solve(items: Sequence[Sequence[Choice]], budget_bytes: int, max_nodes: int = MAX_NODES) -> Solution:
    """Return the allocation of least error whose bytes are at most `budget_bytes`, proven optimal where `gap` is 0.

    items: each with at least one choice; errors finite and from 0. The budget must be reachable (`reachable_bytes`).
    """
    assert reachable_bytes(items)[0] <= budget_bytes, (reachable_bytes(items), budget_bytes)
    relaxation = _relax(items, budget_bytes)
    picks = _fill(items, relaxation.picks, budget_bytes)
    n_bytes, error = total(items, picks)
    if error <= relaxation.bound * (1 + _SLACK):
        return Solution(picks, n_bytes, error, min(relaxation.bound, error), relaxation.price)
    better, bound = _clean_up(items, picks, relaxation, budget_bytes, max_nodes)
    n_bytes, error = total(items, better)
    return Solution(better, n_bytes, error, min(bound, error), relaxation.price)


def _clean_up(
    items: Sequence[Sequence[Choice]], picks: tuple[int, ...], relaxation: _Relaxation, budget_bytes: int, max_nodes: int
) -> tuple[tuple[int, ...], float]:
    """Return the best allocation found by the integer program, never worse than `picks`, and a lower bound.

    In units of the gap: excess_ij = error + price · bytes − the item's least such sum. Every allocation's error is
    bound + Σ excess + price · (unspent bytes), so a choice whose excess alone exceeds the gap is in no better one.
    """
    gap = total(items, picks)[1] - relaxation.bound
    kept: list[tuple[int, int, float]] = []  # item, choice, excess
    for i, item in enumerate(items):
        sums = [c.error + relaxation.price * c.n_bytes for c in item]
        least = min(sums)
        kept += [(i, k, sums[k] - least) for k in efficient(item) if sums[k] - least <= gap * (1 + _SLACK) or k == picks[i]]
    found = _integer_program(items, kept, relaxation.price, gap, budget_bytes, max_nodes)
    if found is None:
        return picks, relaxation.bound
    candidate, bound = found
    n_bytes, error = total(items, candidate)
    is_better = n_bytes <= budget_bytes and error < total(items, picks)[1]
    return (candidate if is_better else picks), relaxation.bound + bound


def _integer_program(
    items: Sequence[Sequence[Choice]], kept: Sequence[tuple[int, int, float]], price: float, gap: float, budget_bytes: int, max_nodes: int
) -> tuple[tuple[int, ...], float] | None:
    """Minimise Σ excess + price · unspent bytes over the kept choices; return the picks and a lower bound on that, or None.

    Costs are counted from each item's smallest kept choice and in units of their common divisor, so that HiGHS sees
    small integers; the objective is in units of the gap.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import coo_array

    n_items = len(items)
    of_item: Ints = np.array([i for i, _, _ in kept], np.int64)
    n_bytes: Ints = np.array([items[i][k].n_bytes for i, k, _ in kept], np.int64)
    smallest: Ints = np.full(n_items, np.iinfo(np.int64).max)
    np.minimum.at(smallest, of_item, n_bytes)
    extra = n_bytes - smallest[of_item]
    unit = max(1, int(np.gcd.reduce(extra)))
    room = (budget_bytes - int(smallest.sum())) // unit
    excess: Floats = np.array([e for _, _, e in kept], np.float64)
    objective = (excess - price * extra) / gap
    constant = price * (budget_bytes - int(smallest.sum())) / gap
    columns = np.arange(len(kept))
    one_each = coo_array((np.ones(len(kept)), (of_item, columns)), shape=(n_items, len(kept))).tocsr()
    within = LinearConstraint((extra // unit)[None, :].astype(np.float64), -np.inf, float(room))
    result = milp(
        objective,
        integrality=np.ones(len(kept)),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), within],
        options={"node_limit": max_nodes, "mip_rel_gap": 1e-7},
    )
    if result.x is None:
        return None
    picks = [0] * n_items
    for column in np.flatnonzero(result.x > 0.5):
        i, k, _ = kept[int(column)]
        picks[i] = k
    bound = result.mip_dual_bound
    return tuple(picks), 0.0 if bound is None or not np.isfinite(bound) else max(0.0, (bound + constant) * gap)
