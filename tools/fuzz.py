"""Gives mutants of valid files to every parser of a stranger's file, in a supervised process, and says what got how far.

    python tools/fuzz.py --mutations 200000 --seed 0            # all parsers, one after the other
    python tools/fuzz.py --mutations 20000 --parser tokenizer   # one of them
    python tools/fuzz.py --atheris --seconds 600                # by coverage instead, for as long as asked (pip install 'loopgguf[fuzz]')

A finding is an exception other than `LoopggufError`, a warning, a message that is not one printable line, a file left
behind, a crash, more than 5 s or more than 512 MiB for one input of some kilobytes; it is saved with its bytes. The same
seed and number give the same mutant, whatever ran before. Exits with 1 when there are findings, or when fewer than a
fifth of the mutants got past the header, for then nothing was tested.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fuzz_targets import PARSERS, STAGES, Finding, Parser, Recorder, Seed, check_one, lay_out

MAX_SECONDS = 5.0  # for one input
MAX_START_SECONDS = 120.0
MAX_MEMORY_BYTES = 512 << 20  # above what the process has when it starts
MIN_SHARE_PAST_HEADER = 0.2
_STARTING = -1
_NUMBER, _FOUND, _FIRST_STAGE = 0, 1, 2  # places in the counters that worker and supervisor share
_SPAWN = multiprocessing.get_context("spawn")


def make_mutant(parser: Parser, seeds: Sequence[Seed], seed: int, number: int) -> tuple[int, bytes]:
    """Return which of the parser's seeds mutant `number` is of, and its bytes."""
    rng = random.Random(f"{parser.name} {seed} {number}")
    which = number % len(seeds)
    return which, seeds[which].mutate(rng)


def save_finding(folder: Path, parser: Parser, number: int, file_name: str, mutant: bytes, cause: str) -> None:
    """Keep a mutant and what it did."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{parser.name}-{number}-{file_name}").write_bytes(mutant)
    (folder / f"{parser.name}-{number}.cause.txt").write_text(cause + "\n", encoding="utf-8")


# --- the worker ---------------------------------------------------------------------------------------------------------


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    limit = pages * resource.getpagesize() + MAX_MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _work(name: str, seed: int, start: int, stop: int, counters: Any, findings: Path) -> None:
    """Check mutants start…stop, telling in `counters` which is next, how many findings there were, how many passed each stage."""
    warnings.simplefilter("error")
    warnings.simplefilter("ignore", ResourceWarning)  # llama_cpp leaves /dev/null open
    parser = PARSERS[name]
    seeds = parser.seeds()
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as scratch, Recorder(parser) as recorder:
        folders = lay_out(Path(scratch), seeds)
        for valid, folder in zip(seeds, folders, strict=True):
            if not check_one(parser, folder, valid, valid.valid):
                raise SystemExit(f"{name}: the seed {valid.file_name} is refused")
        _limit_memory()
        for number in range(start, stop):
            counters[_NUMBER] = number
            which, mutant = make_mutant(parser, seeds, seed, number)
            recorder.passed.clear()
            try:
                if check_one(parser, folders[which], seeds[which], mutant):
                    recorder.passed.add(STAGES[-1])
            except Finding as finding:
                counters[_FOUND] += 1
                save_finding(findings, parser, number, seeds[which].file_name, mutant, str(finding))
            deepest = max((STAGES.index(label) for label in recorder.passed), default=-1)
            for i in range(deepest + 1):
                counters[_FIRST_STAGE + i] += 1
    counters[_NUMBER] = stop


# --- the supervisor -----------------------------------------------------------------------------------------------------


def _watch(process: BaseProcess, counters: Any) -> str:
    """Wait for a worker; return in words why it did not get through, empty when it did."""
    number, since = int(counters[_NUMBER]), time.monotonic()
    while True:
        process.join(timeout=0.1)
        if process.exitcode is not None:
            return "" if process.exitcode == 0 else f"the process ended with {process.exitcode}"
        if counters[_NUMBER] != number:
            number, since = int(counters[_NUMBER]), time.monotonic()
        limit = MAX_START_SECONDS if number == _STARTING else MAX_SECONDS
        if time.monotonic() - since > limit:
            process.kill()
            process.join()
            return f"it took more than {limit:g} s"


@dataclass(frozen=True)
class Result:
    """How a parser did: inputs, findings, inputs past each stage, seconds."""

    parser: str
    n_inputs: int
    n_findings: int
    passed: tuple[int, ...]
    seconds: float

    @property
    def is_good(self) -> bool:
        return self.n_findings == 0 and self.passed[STAGES.index("header")] >= MIN_SHARE_PAST_HEADER * self.n_inputs


def fuzz(parser: Parser, n_mutants: int, seed: int, findings: Path) -> Result:
    """Check that many mutants of a parser's seeds; a worker that dies or hangs is a finding, and another goes on behind it."""
    counters = _SPAWN.RawArray("q", _FIRST_STAGE + len(STAGES))
    began, at = time.monotonic(), 0
    while at < n_mutants:
        counters[_NUMBER] = _STARTING
        process = _SPAWN.Process(target=_work, args=(parser.name, seed, at, n_mutants, counters, findings))
        process.start()
        cause = _watch(process, counters)
        if cause and counters[_NUMBER] == _STARTING:
            raise SystemExit(f"{parser.name}: {cause} before the first input; its seeds must be valid")
        at = int(counters[_NUMBER])
        if cause:
            seeds = parser.seeds()
            which, mutant = make_mutant(parser, seeds, seed, at)
            save_finding(findings, parser, at, seeds[which].file_name, mutant, cause)
            counters[_FOUND] += 1
            at += 1
    return Result(parser.name, n_mutants, int(counters[_FOUND]), tuple(counters[_FIRST_STAGE:]), time.monotonic() - began)


# --- by coverage ----------------------------------------------------------------------------------------------------------


def fuzz_by_coverage(names: Sequence[str], seconds: int, findings: Path) -> bool:
    """Give each parser its share of the time under atheris; return whether nothing was found."""
    findings.mkdir(parents=True, exist_ok=True)
    program, share = Path(__file__).with_name("fuzz_coverage.py"), str(max(1, seconds // len(names)))
    codes = {name: subprocess.run([sys.executable, str(program), name, share, str(findings)], check=False).returncode for name in names}
    print("\n".join(f"{name:<14} {'nothing found' if code == 0 else f'ended with {code}, see {findings}'}" for name, code in codes.items()))
    return not any(codes.values())


# --- the command ----------------------------------------------------------------------------------------------------------


def print_header() -> None:
    """Print what the columns are: inputs, findings, and which share of the inputs got past each stage."""
    print(f"{'parser':<14} {'inputs':>9} {'findings':>9}" + "".join(f" {stage:>13}" for stage in STAGES) + f" {'seconds':>8}", flush=True)


def print_row(result: Result) -> None:
    """Print how one parser did."""
    shares = "".join(f" {n / result.n_inputs:>12.1%} " for n in result.passed)
    print(f"{result.parser:<14} {result.n_inputs:>9,} {result.n_findings:>9,}{shares} {result.seconds:>7.0f}", flush=True)


def print_causes(folder: Path) -> None:
    """Print the causes in a folder of findings, the most frequent first."""
    causes = Counter(path.read_text(encoding="utf-8").strip()[:200] for path in folder.glob("*.cause.txt"))
    for cause, n in causes.most_common(20):
        print(f"{n:>6} × {cause}")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--mutations", type=int, default=20_000, metavar="N", help="inputs for each parser")
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--parser", action="append", choices=sorted(PARSERS), help="may be given several times; default: all")
    options.add_argument("--findings", type=Path, default=Path("fuzz-findings"), metavar="FOLDER", help="where mutants that did harm are kept")
    options.add_argument("--atheris", action="store_true", help="mutate by coverage with atheris instead")
    options.add_argument("--seconds", type=int, default=600, metavar="N", help="with --atheris: for how long in all")
    given = options.parse_args()
    if given.atheris:
        sys.exit(0 if fuzz_by_coverage(given.parser or list(PARSERS), given.seconds, given.findings) else 1)
    results = []
    print_header()
    for name in given.parser or PARSERS:
        results.append(fuzz(PARSERS[name], given.mutations, given.seed, given.findings))
        print_row(results[-1])
    print_causes(given.findings)
    sys.exit(0 if all(result.is_good for result in results) else 1)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
