"""(bytes, error) of every choice of every item, and a budget → one choice per item: the least total error that fits.

A multiple-choice knapsack. The linear relaxation is solved exactly (lower convex hulls, cheapest error per byte first;
Sinha and Zoltners, Operations Research 27, 1979), which gives a bound that no allocation can beat and a good start.
Choices whose reduced cost exceeds the gap between the two are in no better solution and are dropped; the few dozen
items that keep more than one go through a dynamic program over (bytes, reduced cost) whose states are dropped when one
is no better than another in both, or when the bound says so (as Pisinger's MCKNAP, EJOR 83, 1995). Exact, and the same
every time. Knows integers and floats only: no tensors, types or files.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

MAX_STATES = 1_000_000  # of the dynamic program; a model has thousands. Beyond it the best are kept, and the gap says so
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

    lower_bound: no allocation within the budget has less error. price: error per byte at the margin, the multiplier of
    the budget.
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


def improve(items: Sequence[Sequence[Choice]], picks: Sequence[int], target_error: float, room_bytes: int | None) -> tuple[int, ...]:
    """Return an allocation after the single changes that save most error per byte, one after another, until its error is at
    most `target_error` or no other change saves any within `room_bytes` (None: any number) more bytes."""
    improved = list(picks)
    error, room = total(items, picks)[1], float("inf") if room_bytes is None else room_bytes
    while error > target_error:
        changes = [
            (-saved / more if more > 0 else -float("inf"), i, k, more, saved)
            for i, (item, pick) in enumerate(zip(items, improved, strict=True))
            for k, choice in enumerate(item)
            if (saved := item[pick].error - choice.error) > 0 and (more := choice.n_bytes - item[pick].n_bytes) <= room
        ]
        if not changes:
            break
        _, i, k, more, saved = min(changes)
        improved[i], room, error = k, room - more, error - saved
    return tuple(improved)


def solve(items: Sequence[Sequence[Choice]], budget_bytes: int, max_states: int = MAX_STATES) -> Solution:
    """Return the allocation of least error whose bytes are at most `budget_bytes`, proven optimal where `gap` is 0.

    items: each with at least one choice; errors finite and from 0. The budget must be reachable (`reachable_bytes`).
    """
    assert reachable_bytes(items)[0] <= budget_bytes, (reachable_bytes(items), budget_bytes)
    relaxation = _relax(items, budget_bytes)
    picks, is_proven = _fill(items, relaxation.picks, budget_bytes), False
    gap = total(items, picks)[1] - relaxation.bound
    if gap > relaxation.bound * _SLACK:
        better, is_proven = _clean_up(items, relaxation.price, gap, budget_bytes, max_states)
        if better is not None and total(items, better)[1] < total(items, picks)[1]:
            picks = better
    n_bytes, error = total(items, picks)
    return Solution(picks, n_bytes, error, error if is_proven else min(relaxation.bound, error), relaxation.price)


def smallest_budget(items: Sequence[Sequence[Choice]], target_error: float, tolerance: float = 1e-4) -> int | None:
    """Return a budget for which `solve` finds an error of at most `target_error`, and `tolerance` (relative) less does not; None
    where no budget does."""
    low, high = reachable_bytes(items)
    if solve(items, high).error > target_error:
        return None
    if solve(items, low).error <= target_error:
        return low
    while high - low > max(1, tolerance * low):
        middle = (low + high) // 2
        low, high = (low, middle) if solve(items, middle).error <= target_error else (middle, high)
    return high


def _excesses(item: Sequence[Choice], price: float, gap: float) -> list[tuple[int, int, float]]:
    """Return (choice, bytes, excess) of the choices that may be in an allocation better than one of this gap.

    excess = error + price · bytes, less the item's least such sum. Every allocation's error is the relaxation's bound
    + Σ excess + price · unspent bytes, so a choice whose excess alone exceeds the gap is in no better one.
    """
    sums = [choice.error + price * choice.n_bytes for choice in item]
    least = min(sums)
    return [(k, item[k].n_bytes, sums[k] - least) for k in efficient(item) if sums[k] - least <= gap * (1 + _SLACK)]


def _clean_up(items: Sequence[Sequence[Choice]], price: float, gap: float, budget_bytes: int, max_states: int) -> tuple[tuple[int, ...] | None, bool]:
    """Return the best allocation whose Σ excess + price · unspent bytes is at most `gap` (None: there is none), and whether that is proven.

    Item by item, each state is the bytes and the excess of the choices so far. A state with no fewer bytes and no less
    excess − price · bytes than another ends no better, whatever follows.
    """
    options = [_excesses(item, price, gap) for item in items]
    order = sorted(range(len(items)), key=lambda i: len(options[i]))  # those with one choice first
    least, most = ([pick(n_bytes for _, n_bytes, _ in options[i]) for i in range(len(items))] for pick in (min, max))
    to_come, at_most = sum(least), sum(most)
    n_bytes: Ints = np.zeros(1, np.int64)
    excess: Floats = np.zeros(1)
    steps: list[tuple[Ints, Ints]] = []  # of each item, by state: the state before, and the number of the option
    is_proven = True
    for i in order:
        to_come, at_most = to_come - least[i], at_most - most[i]
        more_bytes = np.array([n for _, n, _ in options[i]], np.int64)
        more_excess = np.array([e for _, _, e in options[i]])
        n_bytes, excess = np.add.outer(n_bytes, more_bytes).ravel(), np.add.outer(excess, more_excess).ravel()
        unspent = np.maximum(0, budget_bytes - at_most - n_bytes)
        alive = np.flatnonzero((n_bytes + to_come <= budget_bytes) & (excess + price * unspent <= gap * (1 + _SLACK)))
        value = excess[alive] - price * n_bytes[alive]
        alive = alive[np.lexsort((value, n_bytes[alive]))]
        value = excess[alive] - price * n_bytes[alive]
        alive = alive[np.diff(np.minimum.accumulate(value), prepend=np.inf) < 0]
        if len(alive) > max_states:
            alive, is_proven = np.sort(alive[np.argsort(excess[alive], kind="stable")[:max_states]]), False
        steps.append((alive // len(options[i]), alive % len(options[i])))
        n_bytes, excess = n_bytes[alive], excess[alive]
    if not len(n_bytes):
        return None, is_proven
    state = int(np.argmin(excess + price * (budget_bytes - n_bytes)))
    picks = [0] * len(items)
    for i, (before, option) in zip(reversed(order), reversed(steps), strict=True):
        picks[i], state = options[i][int(option[state])][0], int(before[state])
    return tuple(picks), is_proven
