"""The knapsack: exact against brute force, never over the budget, bounds that hold."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loopgguf.allocation import Choice, convex_hull, efficient, improve, reachable_bytes, smallest_budget, solve, total

choices = st.builds(Choice, st.integers(1, 40).map(lambda n: 32 * n), st.floats(0, 10))
problems = st.lists(st.lists(choices, min_size=1, max_size=5), min_size=1, max_size=5)


def brute_force(items: list[list[Choice]], budget_bytes: int) -> float:
    """The textbook: try everything."""
    fitting = (total(items, picks) for picks in itertools.product(*(range(len(item)) for item in items)))
    return min(error for n_bytes, error in fitting if n_bytes <= budget_bytes)


@settings(max_examples=150, deadline=None)
@given(problems, st.floats(0, 1))
def test_equals_brute_force_and_never_exceeds_the_budget(items: list[list[Choice]], share: float) -> None:
    """Would catch a bound that is none, a dropped choice of the optimum, or one byte too many."""
    low, high = reachable_bytes(items)
    budget = low + int(share * (high - low))
    solution = solve(items, budget)
    best = brute_force(items, budget)
    assert solution.n_bytes <= budget
    assert (solution.n_bytes, solution.error) == total(items, solution.picks)
    assert solution.error == pytest.approx(best, rel=1e-6, abs=1e-9)
    assert solution.lower_bound <= best * (1 + 1e-9) + 1e-12


@settings(max_examples=60, deadline=None)
@given(problems, st.floats(0, 1), st.floats(0, 1))
def test_more_budget_is_never_estimated_worse(items: list[list[Choice]], a: float, b: float) -> None:
    """Would catch a clean-up that ends in another optimum of the relaxation."""
    low, high = reachable_bytes(items)
    smaller, larger = sorted(low + int(share * (high - low)) for share in (a, b))
    assert solve(items, larger).error <= solve(items, smaller).error * (1 + 1e-6) + 1e-9


def test_a_choice_off_the_hull_is_taken_when_only_it_fits() -> None:
    """The Lagrangian alone would leave 90 bytes unspent: the middle choice lies above the hull."""
    items = [[Choice(10, 10.0), Choice(90, 9.0), Choice(110, 0.0)]]
    assert convex_hull(items[0]) == [0, 2]
    assert solve(items, 100).picks == (1,)


def test_the_greedy_start_is_improved_by_the_integer_program() -> None:
    """Greedy takes the steep small step and cannot afford the large one; the optimum is the reverse."""
    items = [[Choice(0, 10.0), Choice(60, 3.0)], [Choice(0, 10.0), Choice(100, 0.0)]]
    solution = solve(items, 100)
    assert (solution.picks, solution.error) == ((0, 1), 10.0)
    assert solution.gap == pytest.approx(0.0, abs=1e-6)


def test_efficient_drops_the_dominated_and_keeps_the_first_of_equals() -> None:
    """Would catch ties broken by chance: plans must not depend on the order of a sort."""
    assert efficient([Choice(20, 1.0), Choice(10, 1.0), Choice(10, 1.0), Choice(30, 0.5), Choice(40, 0.6)]) == [1, 3]


def test_a_model_of_hundreds_of_tensors_and_twenty_types_is_solved_to_a_tiny_gap() -> None:
    """Would catch an integer program that is handed the whole problem instead of the few choices that matter."""
    generator = np.random.default_rng(1)
    bpw = np.sort(generator.uniform(1.5, 16, 20))
    shapes = [2**17] * 2 + [2**14] * 128 + [2**15] * 161
    items = [
        [Choice(int(n * b / 8) // 32 * 32, float(s * n * 4.0**-b * generator.lognormal(0, 0.2))) for b in bpw]
        for n in shapes
        for s in [generator.lognormal(0, 1.5)]
    ]
    budget = int(sum(shapes) * 3.1 / 8) + 17
    solution = solve(items, budget)
    assert budget - 4096 < solution.n_bytes <= budget
    assert solution.gap < 1e-4
    assert solution == solve(items, budget)


# --- single changes ---------------------------------------------------------------------------------------------------


def test_the_worst_per_byte_is_improved_first() -> None:
    """Catches the largest gain taken before the cheapest, and a change that goes on when the target is reached."""
    items = [[Choice(32, 10.0), Choice(320, 1.0)], [Choice(32, 4.0), Choice(64, 0.5), Choice(96, 0.4)]]
    assert improve(items, (0, 0), 11.0, None) == (0, 1)
    assert improve(items, (0, 0), 10.0, None) == (1, 1)
    assert improve(items, (0, 0), 14.0, None) == (0, 0)


@settings(max_examples=80, deadline=None)
@given(problems, st.integers(0, 2000))
def test_improving_stays_within_its_room(items: list[list[Choice]], room: int) -> None:
    """Catches a change that does not fit, one that makes things worse, and an end while one still fits and helps."""
    start = tuple(0 for _ in items)
    picks = improve(items, start, -1.0, room)
    n_bytes, error = total(items, picks)
    before = total(items, start)
    assert n_bytes - before[0] <= room
    assert error <= before[1] + 1e-12
    left = room - (n_bytes - before[0])
    for item, pick in zip(items, picks, strict=True):
        assert not any(c.error < item[pick].error and c.n_bytes - item[pick].n_bytes <= left for c in item)


@settings(max_examples=60, deadline=None)
@given(problems, st.floats(0, 12))
def test_the_smallest_budget_reaches_its_error(items: list[list[Choice]], target: float) -> None:
    """Catches a bisection that ends on the wrong side, and a target beyond reach that it answers."""
    budget = smallest_budget(items, target)
    low, high = reachable_bytes(items)
    if budget is None:
        assert solve(items, high).error > target
    else:
        assert solve(items, budget).error <= target
        assert budget == low or solve(items, budget - max(2, int(2e-4 * budget))).error > target or budget - 2 < low
