"""Mutants of valid files through every parser of a stranger's file; `tools/fuzz.py` gives them many more of the same."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import fuzz
import pytest
from fuzz_targets import MAX_SEED_BYTES, PARSERS, STAGES, Finding, Parser, Recorder, Seed, check_one, lay_out
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loopgguf.errors import InputError


@pytest.mark.parametrize("name", PARSERS)
def test_seeds_are_valid_and_small(name: str, tmp_path: Path) -> None:
    """A fuzzer whose seeds are refused by the first check, and that tests nothing behind it."""
    seeds = PARSERS[name].seeds()
    for seed, folder in zip(seeds, lay_out(tmp_path, seeds), strict=True):
        with Recorder(PARSERS[name]) as recorder:
            assert check_one(PARSERS[name], folder, seed, seed.valid)
        assert recorder.passed
        assert len(seed.valid) < MAX_SEED_BYTES


@pytest.mark.parametrize("name", PARSERS)
def test_mutants_are_read_or_refused_in_one_line(tmp_path: Path, name: str) -> None:
    """An exception of another class, a warning, a message of several lines, or a file left behind, whatever a stranger's file says."""
    seeds = PARSERS[name].seeds()
    folders = lay_out(tmp_path, seeds)

    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(rng=st.randoms(use_true_random=False), which=st.integers(0, len(seeds) - 1))
    def check(rng: Random, which: int) -> None:
        check_one(PARSERS[name], folders[which], seeds[which], seeds[which].mutate(rng))

    check()


def test_mutants_depend_on_their_number_alone() -> None:
    """A finding whose number and seed do not give its bytes again."""
    for parser in PARSERS.values():
        seeds = parser.seeds()
        assert [fuzz.make_mutant(parser, seeds, 0, n) for n in (5, 6)] == [fuzz.make_mutant(parser, parser.seeds(), 0, n) for n in (5, 6)]


# --- the fuzzer itself --------------------------------------------------------------------------------------------------


def _litter(path: Path) -> None:
    (path.parent / "x.part").write_text("half", encoding="utf-8")


def _raise(error: Exception) -> Callable[[Path], None]:
    def parse(_: Path) -> None:
        raise error

    return parse


@pytest.mark.parametrize(
    ("parse", "said"),
    [
        (_raise(KeyError("x")), "KeyError: 'x'"),
        (_raise(RecursionError("deep")), "RecursionError"),
        (_raise(InputError("x" * 5000)), "message of 5000 characters"),
        (_litter, "left behind.*x.part"),
    ],
)
def test_what_is_a_finding(tmp_path: Path, parse: Callable[[Path], None], said: str) -> None:
    """A fuzzer that takes every exception for a refusal and so finds nothing."""
    seed = Seed("a.bin", b"x", lambda _: b"x")
    with pytest.raises(Finding, match=said):
        check_one(Parser("fake", lambda: [seed], parse, ()), tmp_path, seed, b"x")


def test_what_is_none(tmp_path: Path) -> None:
    """A refusal that is counted as a finding, or as accepted."""
    seed = Seed("a.bin", b"x", lambda _: b"x")
    assert check_one(Parser("fake", lambda: [seed], lambda _: None, ()), tmp_path, seed, b"x") is True
    assert check_one(Parser("fake", lambda: [seed], _raise(InputError("no")), ()), tmp_path, seed, b"x") is False


def _crash(counters: list[int]) -> None:
    counters[0] = 3
    os.abort()


def _hang(counters: list[int]) -> None:
    counters[0] = 4
    time.sleep(60)


@pytest.mark.parametrize(("work", "number", "said"), [(_crash, 3, "ended with -6"), (_hang, 4, "more than 0.5 s")])
def test_a_worker_that_crashes_or_hangs_is_noticed(monkeypatch: pytest.MonkeyPatch, work: Callable[..., None], number: int, said: str) -> None:
    """A crash in C, or an endless loop, that ends the fuzzer or is passed over."""
    monkeypatch.setattr(fuzz, "MAX_SECONDS", 0.5)
    context = multiprocessing.get_context("spawn")
    counters = context.RawArray("q", 2)
    counters[0] = -1
    process = context.Process(target=work, args=(counters,))
    process.start()
    assert said in fuzz._watch(process, counters)
    assert counters[0] == number


def test_a_run_counts_what_passed_each_stage(tmp_path: Path) -> None:
    """Shares that do not fall from stage to stage, inputs that are not counted, a run whose mutants are all alike."""
    result = fuzz.fuzz(PARSERS["imatrix-dat"], 200, 0, tmp_path)
    assert result.n_inputs == 200 and result.is_good
    assert 200 >= result.passed[0] >= result.passed[1] >= result.passed[2] >= result.passed[3] > 0
    assert len(result.passed) == len(STAGES) and result.passed[3] < 150
    assert not fuzz.Result("x", 200, 1, result.passed, 1.0).is_good
    assert not fuzz.Result("x", 1000, 0, (1000, 199, 0, 0), 1.0).is_good
