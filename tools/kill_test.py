"""Kill `loopgguf imatrix` and `loopgguf quantize` many times, go on each time, and compare the bytes with those of a run that nobody killed.

    python tools/kill_test.py [--kills 100] [--per-phase 10] [--seed 0]

The commands run on a synthetic model of a few megabytes (Gram matrices with gradients beside the imatrix; a plan by size and error
feedback). At least ten kills (SIGKILL) hit named points of each phase, evenly spread over those that an uninterrupted run comes by;
the rest come at random moments. After each kill a file under a final name must be whole; after going on, every file must have the
bytes of the uninterrupted run, and none may be left over. Prints a line per phase; exit code 1 when any kill cost a byte.
POSIX only: a run is forked from a process that has imported everything.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from synthetic_model import make_checkpoint
from transformers import LlamaForCausalLM

from loopgguf import cli, encode, errortable, importance, intent, journal, pipeline, planner, publish, verify
from loopgguf.errortable import Sampling
from loopgguf.formats import GgmlType
from loopgguf.grams import GramWriter
from loopgguf.journal import Journal
from loopgguf.progress import Meter

PHASES = ("calibration", "Gram", "error table", "sequence", "encoding", "writing", "job state", "verify", "publish")
RANDOM = "at random"
MODEL_BYTES, VOCAB = 4_500_000, 2000
QUICK_TYPES = (GgmlType.Q4_0, GgmlType.Q5_0, GgmlType.Q8_0)  # to choose from; others take seconds to build their tables
IMPORTED = LlamaForCausalLM  # here and now, so that no run takes the seconds
TEXT = ("-c", "64", "--samples", "4", "-t", "1", "--max-memory", "24MiB")  # so little that passes go layer by layer
COMMANDS = {
    "imatrix": ("imatrix", "model", "--gram", "--gradient", *TEXT, "-o", "x.imatrix.gguf"),
    "quantize": ("quantize", "model", "--target-bpw", "6.5", "--compensate", "fast", *TEXT, "-o", "x.gguf"),
}
PATIENCE_SECONDS = 600


@dataclass(frozen=True)
class Kill:
    """When a command is killed: as it comes by a point of a phase for the n-th time, or after so many seconds."""

    command: str
    phase: str
    n: int = 0
    seconds: float = 0.0


# --- in the forked process --------------------------------------------------------------------------------------------


class Points:
    """Counts the points that a run comes by, and ends the process, as a power cut would, at one of them."""

    def __init__(self, kill: Kill | None) -> None:
        self.kill, self.counts, self.stage = kill, Counter[str](), ""

    def reach(self, phase: str) -> None:
        self.counts[phase] += 1
        if self.kill is not None and (phase, self.counts[phase]) == (self.kill.phase, self.kill.n):
            os.kill(os.getpid(), signal.SIGKILL)

    @contextmanager
    def during(self, stage: str) -> Any:
        before, self.stage = self.stage, stage
        yield
        self.stage = before

    def around(self, owner: object, name: str, phase: str | Callable[[], str], stage: str | None = None) -> None:
        """Make what is called `name` come by a point before and after."""
        real = getattr(owner, name)

        def call(*arguments: Any, **more: Any) -> Any:
            self.reach(phase if isinstance(phase, str) else phase())
            with self.during(self.stage if stage is None else stage):
                result = real(*arguments, **more)
            self.reach(phase if isinstance(phase, str) else phase())
            return result

        setattr(owner, name, call)

    def install(self) -> None:
        """Put points everywhere, save after every tensor, and measure errors on few rows."""
        publish.Journal = partial(Journal, min_seconds=0)  # type: ignore[misc, assignment]
        journal.MAX_SHARE = float("inf")
        intent.Sampling = partial(Sampling, share=0.001, min_rows=16)  # type: ignore[misc, assignment]
        planner.DEFAULT_TYPES = QUICK_TYPES
        self.around(Meter, "step", lambda: self.stage or "calibration")
        self.around(importance, "_run_grams", "Gram", stage="Gram")
        self.around(encode, "run_feedback", "Gram", stage="Gram")
        self.around(encode, "run_sequence", "sequence", stage="sequence")
        self.around(GramWriter, "__call__", "Gram")
        self.around(errortable, "_save", "error table")
        self.around(pipeline, "_run", "encoding")
        self.around(verify, "_check_values", "verify")
        self.around(publish, "verify_file", "verify")
        self.around(publish, "speak", "verify")
        self.around(publish, "_publish_all", "publish", stage="publish")
        self.around(Journal, "finish", "publish", stage="publish")
        for name in ("replace", "fsync", "unlink", "rmdir"):
            self.around(os, name, lambda: "publish" if self.stage == "publish" else "job state")
        real = os.pwrite

        def pwrite(fd: int, data: memoryview, offset: int) -> int:
            half = len(data) // 2
            real(fd, data[:half], offset)
            self.reach("writing")
            return half + real(fd, data[half:], offset + half)

        os.pwrite = pwrite  # type: ignore[assignment]


def _run_forked(folder: Path, command: str, kill: Kill | None) -> None:
    """Be the command: never returns."""
    os.setsid()
    os.chdir(folder / "work")
    os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
    log = os.open(folder / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    points = Points(kill)
    points.install()
    code = 1
    try:
        cli.main(list(COMMANDS[command]))
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        (folder / "counts").write_text(repr(dict(points.counts)), encoding="utf-8")
        sys.stdout.flush()
        os._exit(code)


# --- in this process --------------------------------------------------------------------------------------------------


def run(folder: Path, command: str, kill: Kill | None = None) -> tuple[int, float]:
    """Run a command in a folder, killed or not; return its exit status (negative: by that signal), and seconds."""
    start, seconds = time.monotonic(), kill.seconds if kill is not None and kill.phase == RANDOM else PATIENCE_SECONDS
    pid = os.fork()
    if pid == 0:
        _run_forked(folder, command, kill)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), time.monotonic() - start
        if time.monotonic() - start > seconds:
            os.kill(pid, signal.SIGKILL)
            seconds = PATIENCE_SECONDS
        time.sleep(0.002)


def digests(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file that a run left in its folder, the model apart."""
    files = [path for path in (folder / "work").rglob("*") if path.is_file() and not path.is_relative_to(folder / "work" / "model")]
    return {path.relative_to(folder / "work").as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def make_folder(scratch: Path, name: str, model: Path, cache: Path | None = None) -> Path:
    """Return a new folder to run in: a link to the model, and a cache with nothing but the proof of its tokenizer."""
    folder = scratch / name
    (folder / "work").mkdir(parents=True)
    (folder / "work" / "model").symlink_to(model, target_is_directory=True)
    if cache is not None:
        shutil.copytree(cache / "loopgguf" / "vocabulary", folder / "cache" / "loopgguf" / "vocabulary")
    return folder


@dataclass(frozen=True)
class Whole:
    """What uninterrupted runs come to: files, points and seconds by command."""

    files: dict[str, dict[str, str]]
    points: dict[str, dict[str, int]]
    seconds: dict[str, float]
    cache: Path


def run_whole(scratch: Path, model: Path) -> Whole:
    """Run each command once to its end, and once more to see that its bytes are always the same."""
    found = Whole({}, {}, {}, scratch / "whole-imatrix" / "cache")
    for command in COMMANDS:
        for again in (False, True):
            cache = found.cache if again or command != "imatrix" else None
            folder = make_folder(scratch, f"whole-{command}{'-again' * again}", model, cache)
            status, found.seconds[command] = run(folder, command)
            if status != 0 or found.files.setdefault(command, digests(folder)) != digests(folder):
                sys.exit(f"{command} ends with {status}, or other bytes than before:\n{(folder / 'log').read_text(encoding='utf-8')[-2000:]}")
        found.points[command] = eval((folder / "counts").read_text(encoding="utf-8"))
    return found


def choose_kills(whole: Whole, n_kills: int, per_phase: int, seed: int) -> list[Kill]:
    """Return `per_phase` kills at evenly spread points of each phase, and the rest at random moments."""
    kills = []
    for phase in PHASES:
        points = [(command, n) for command in COMMANDS for n in range(1, whole.points[command].get(phase, 0) + 1)]
        wanted = min(per_phase, len(points))
        chosen = [points[(2 * i + 1) * len(points) // (2 * wanted)] for i in range(wanted)]
        kills += [Kill(command, phase, n) for command, n in chosen]
    dice = random.Random(seed)
    for _ in range(n_kills - len(kills)):
        command = dice.choice(list(COMMANDS))
        kills.append(Kill(command, RANDOM, seconds=dice.random() * whole.seconds[command]))
    return kills


def survives(scratch: Path, model: Path, whole: Whole, kill: Kill) -> str:
    """Kill a run and go on; return what is wrong, or nothing."""
    folder = make_folder(scratch, "killed", model, whole.cache)
    expected = whole.files[kill.command]
    try:
        status, _ = run(folder, kill.command, kill)
        if status != -signal.SIGKILL and not (kill.phase == RANDOM and status == 0):
            return f"ended with {status} instead of being killed"
        partial_files = [name for name, digest in digests(folder).items() if name in expected and digest != expected[name]]
        if partial_files:
            return f"partial under their final names: {', '.join(partial_files)}"
        if status != 0:
            status, _ = run(folder, kill.command)
        if status != 0 and "already exists" not in (folder / "log").read_text(encoding="utf-8").splitlines()[-1]:  # else it was finished
            return f"going on ended with {status}: {(folder / 'log').read_text(encoding='utf-8').strip().splitlines()[-1]}"
        differing = [name for name in sorted({*expected, *digests(folder)}) if digests(folder).get(name) != expected.get(name)]
        return f"other or left over: {', '.join(differing)}" if differing else ""
    finally:
        shutil.rmtree(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--per-phase", type=int, default=10, help="kills at named points of each phase; the rest are at random moments")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    start = time.monotonic()
    n_done, n_fine, n_bad = Counter[str](), Counter[str](), 0
    with tempfile.TemporaryDirectory(prefix="loopgguf-kills-") as name:
        scratch = Path(name)
        model = scratch / "model"
        make_checkpoint(model, MODEL_BYTES, VOCAB)
        whole = run_whole(scratch, model)
        for kill in choose_kills(whole, options.kills, options.per_phase, options.seed):
            problem = survives(scratch, model, whole, kill)
            n_done[kill.phase] += 1
            print(f"{n_done.total()} of {options.kills} kills, {time.monotonic() - start:.0f} s", end="\r", file=sys.stderr, flush=True)
            n_fine[kill.phase] += not problem
            if problem:
                n_bad += 1
                print(f"FAILED {kill}: {problem}", flush=True)
    print(f"{'phase':<12} {'points':>7} {'kills':>6} {'same bytes':>11}")
    for phase in (*PHASES, RANDOM):
        n_points = sum(points.get(phase, 0) for points in whole.points.values())
        print(f"{phase:<12} {n_points or '':>7} {n_done[phase]:>6} {n_fine[phase]:>11}")
    print(f"{'all':<12} {'':>7} {n_done.total():>6} {n_fine.total():>11}   in {time.monotonic() - start:.0f} s")
    return 1 if n_bad else 0


if __name__ == "__main__":
    sys.exit(main())
