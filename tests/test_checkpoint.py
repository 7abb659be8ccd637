"""checkpoint.py: a job goes on from where it was, to the bit, or says why not."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from loopgguf import checkpoint
from loopgguf.checkpoint import (
    CURRENT,
    ENGINE,
    IMATRIX,
    LOCK,
    OBJECTS,
    PREVIOUS,
    QUANTIZE,
    CacheKind,
    Job,
    State,
    Steps,
    cache_path,
    clear_cache,
    content_key,
    job_folder,
    list_cache,
    open_stage,
    sweep,
    was_publishing,
)
from loopgguf.errors import InputError, Interrupted, OutputError, UsageError

FINGERPRINT = {"source": "a" * 64, "n_ctx": 512, "texts": ["a.txt"]}
N_STEPS = 40

# a run whose result depends on every bit of its state: a sum in float64, a random generator, an engine's own array
RUN = """
import json, sys, time
from pathlib import Path
import numpy as np
from loopgguf.checkpoint import ENGINE, Job, Steps
from loopgguf.errors import Interrupted

class Sum:
    def __init__(self): self.total = np.zeros(1000)
    def state(self): return {"total": self.total}
    def restore(self, arrays): self.total = arrays["total"].copy()

folder, out, n_steps = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
rng, total, walk = np.random.default_rng(7), Sum(), np.zeros(5, np.float32)
try:
    with Job(folder, {"seed": 7}) as job:
        steps = Steps(job, {"sums": total}, unit="step")
        begun = steps.begin()
        first = 0
        if begun is not None:
            first, walk = begun.n_steps, begun.parts[ENGINE]["walk"].copy()
            rng.bit_generator.state = json.loads(begun.parts[ENGINE]["random"].tobytes())
        for i in range(first, n_steps):
            total.total += rng.standard_normal(1000)
            walk = np.sin(walk + rng.standard_normal(5).astype(np.float32))
            print(i, flush=True)
            time.sleep(0.004)
            steps.finished(i + 1, n_steps, lambda: {"walk": walk, "random": np.frombuffer(json.dumps(rng.bit_generator.state).encode(), np.uint8)})
        out.write_bytes(total.total.tobytes() + walk.tobytes())
        job.finish()
except Interrupted as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def start(folder: Path, out: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", RUN, str(folder), str(out), str(N_STEPS)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8"
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("whole")
    child = start(folder / "job", folder / "out")
    assert child.communicate(timeout=60)[1] == ""
    assert not (folder / "job").exists()
    return (folder / "out").read_bytes()


def lines_until(child: subprocess.Popen[str], n: int) -> list[int]:
    assert child.stdout is not None
    return [int(line) for _, line in zip(range(n), child.stdout, strict=False)]


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_at_random_moments_it_ends_with_the_same_bytes(tmp_path: Path, expected: bytes):
    """Catches a state that is published before it is whole, a step lost or done twice, and bits lost on the way."""
    dice, last = random.Random(5), -1
    for _ in range(8):
        child = start(tmp_path / "job", tmp_path / "out")
        steps = lines_until(child, dice.randint(2, 6))
        assert steps[0] >= last  # the step that was running is done again, and at most one before it
        time.sleep(dice.random() * 0.008)
        child.kill()
        rest = child.communicate(timeout=60)[0].split()
        last = int(rest[-1]) - 1 if rest else steps[-1] - 1
    child = start(tmp_path / "job", tmp_path / "out")
    assert child.communicate(timeout=60)[1] == ""
    assert (tmp_path / "out").read_bytes() == expected


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to a child")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_first_signal_finishes_the_step_and_saves(tmp_path: Path, expected: bytes, number: signal.Signals):
    """Catches a lost step, a wrong exit code, and a result that differs after going on."""
    child = start(tmp_path / "job", tmp_path / "out")
    lines_until(child, 5)
    child.send_signal(number)
    said, warned = child.communicate(timeout=60)
    assert child.returncode == 75
    assert f"saved in {tmp_path / 'job'}. Run the same command again" in said
    assert "stopping after this step" in warned
    child = start(tmp_path / "job", tmp_path / "out")
    first = lines_until(child, 1)[0]
    assert first == len(said.split("interrupted")[0].split()) + 5
    child.communicate(timeout=60)
    assert (tmp_path / "out").read_bytes() == expected


BUSY = """
import sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from loopgguf.checkpoint import Job
with Job(Path(sys.argv[1]), {}), ThreadPoolExecutor(1) as pool:
    step = pool.submit(time.sleep, 300)
    print("busy", flush=True)
    step.result()
"""


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT to a child")
def test_second_signal_stops_at_once(tmp_path: Path):
    """Catches a run that cannot be stopped while a step takes hours, for it waits for its threads."""
    command = [sys.executable, "-c", BUSY, str(tmp_path / "job")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, encoding="utf-8") as child:
        assert child.stdout is not None and child.stderr is not None
        assert child.stdout.readline() == "busy\n"
        child.send_signal(signal.SIGINT)
        assert "once more stops at once" in child.stderr.readline()
        child.send_signal(signal.SIGINT)
        assert child.wait(timeout=60) == -signal.SIGINT


def test_signals_are_given_back(tmp_path: Path):
    """Catches a program that cannot be interrupted any more once a job has ended in it."""
    before = signal.getsignal(signal.SIGINT)
    with Job(tmp_path / "job", FINGERPRINT) as job:
        signal.raise_signal(signal.SIGINT)
        assert job.should_stop
    assert signal.getsignal(signal.SIGINT) is before


# --- states -------------------------------------------------------------------------------------------------------------


def state(n: int) -> State:
    return State(n, {"sums": {"x": np.full(3, n, np.float64)}, "constant": {"y": np.arange(4, dtype=np.int32)}}, {"seed": 2**100, "n": n})


def test_a_state_comes_back_exactly_and_two_are_kept(tmp_path: Path):
    """Catches lost dtypes and large numbers, and a folder that grows with every step."""
    folder = tmp_path / "job"
    with Job(folder, FINGERPRINT) as job:
        assert job.load() is None
        for n in range(1, 6):
            job.save(state(n))
        assert len(list((folder / OBJECTS).iterdir())) == 3  # two sums; what does not change is stored once
    with Job(folder, FINGERPRINT) as job:
        got = job.load()
        assert got is not None
        assert (got.n_steps, got.facts) == (5, {"seed": 2**100, "n": 5})
        assert got.parts["sums"]["x"].dtype == np.float64
        assert got.parts["constant"]["y"].tolist() == [0, 1, 2, 3]


def test_finished_or_empty_jobs_leave_nothing(tmp_path: Path):
    """Catches job folders left behind by bad input and by finished runs."""
    with Job(tmp_path / "deep" / "job", FINGERPRINT) as job:
        job.save(state(1))
        job.finish()
    assert not (tmp_path / "deep" / "job").exists()
    with pytest.raises(InputError), Job(tmp_path / "job", FINGERPRINT):
        raise InputError("a bad model")
    assert not (tmp_path / "job").exists()


def damage(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def newest_object(folder: Path, n: int) -> Path:
    wanted = np.full(3, n, np.float64).tobytes()
    return next(path for path in (folder / OBJECTS).iterdir() if wanted in path.read_bytes())


@pytest.mark.parametrize("what", ["object", "missing object", "manifest", "empty manifest", "no manifest"])
def test_a_damaged_newest_state_is_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str):
    """Catches a run that goes on from garbage, or that is lost for one bad sector."""
    folder = tmp_path / "job"
    with Job(folder, FINGERPRINT) as job:
        for n in (1, 2):
            job.save(state(n))
    match what:
        case "object":
            damage(newest_object(folder, 2))
        case "missing object":
            newest_object(folder, 2).unlink()
        case "manifest":
            damage(folder / CURRENT)
        case "empty manifest":
            (folder / CURRENT).write_bytes(b"")
        case _:  # killed between the two renames
            (folder / CURRENT).unlink()
    with Job(folder, FINGERPRINT) as job:
        got = job.load()
        assert got is not None
        assert (got.n_steps, got.parts["sums"]["x"].tolist()) == (1, [1, 1, 1])
        job.save(state(2))
        again = job.load()
        assert again is not None and again.n_steps == 2
    assert ("damaged" in caplog.text) == (what != "no manifest")


def test_a_job_with_no_whole_state_is_refused(tmp_path: Path):
    """Catches hours of work that silently start from the beginning."""
    folder = tmp_path / "job"
    with Job(folder, FINGERPRINT) as job:
        for n in (1, 2):
            job.save(state(n))
    for n in (1, 2):
        damage(newest_object(folder, n))
    with Job(folder, FINGERPRINT) as job, pytest.raises(InputError, match=r"no state that is whole.*--no-resume"):
        job.load()
    damage(folder / CURRENT)
    damage(folder / PREVIOUS)
    with pytest.raises(InputError, match=r"no readable state.*--no-resume"):
        Job(folder, FINGERPRINT).__enter__()
    with Job(folder, FINGERPRINT, resume=False) as job:
        assert job.load() is None


def test_another_fingerprint_names_its_fields(tmp_path: Path):
    """Catches two calibrations mixed in one imatrix, and a refusal that does not say what changed."""
    folder = tmp_path / "job"
    with Job(folder, FINGERPRINT) as job:
        job.save(state(1))
    other = {**FINGERPRINT, "n_ctx": 1024, "gradient": True}
    with pytest.raises(UsageError) as caught:
        Job(folder, other).__enter__()
    said = str(caught.value)
    assert "n_ctx (was 512, is 1024)" in said and "gradient (was nothing, is True)" in said
    assert "source" not in said and "texts" not in said
    assert "--no-resume" in said and "--job-folder" in said
    assert (folder / CURRENT).exists()
    with Job(folder, other, resume=False) as job:
        assert job.load() is None
        job.save(state(3))
    with Job(folder, other) as job:
        assert job.load() is not None


def test_what_an_engine_had_before_its_first_step_is_of_this_job_only(tmp_path: Path):
    """Catches hidden states of one text that are taken for another's, and those that a stop throws away."""
    folder = tmp_path / "job"
    with pytest.raises(Interrupted), Job(folder, FINGERPRINT) as job:
        (job.work / "border").write_bytes(b"x")
        job.should_stop = True
        job.stop_if_asked("0 layers")
    with pytest.raises(UsageError, match="n_ctx"):
        Job(folder, {**FINGERPRINT, "n_ctx": 1024}).__enter__()
    with pytest.raises(InputError), Job(folder, FINGERPRINT) as job:
        assert (job.work / "border").exists() and job.load() is None
        raise InputError("a bad model")
    assert not folder.exists()


@pytest.mark.skipif(os.name == "nt", reason="no fork")
def test_a_folder_in_use_is_refused_and_free_when_its_owner_is_dead(tmp_path: Path):
    """Catches two runs that write one folder, and a lock that outlives a killed run."""
    child = start(tmp_path / "job", tmp_path / "out")
    lines_until(child, 2)
    with pytest.raises(UsageError, match=f"in use by process {child.pid}"):
        Job(tmp_path / "job", {"seed": 7}).__enter__()
    child.kill()
    child.communicate(timeout=60)
    assert (tmp_path / "job" / LOCK).exists()
    with Job(tmp_path / "job", {"seed": 7}) as job:
        assert job.load() is not None


def test_other_folders_and_files_are_refused(tmp_path: Path):
    """Catches a user's folder that is taken for a job's and emptied."""
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UsageError, match=r"has other content \(thesis.txt\)"):
        Job(tmp_path / "mine", FINGERPRINT, resume=False).__enter__()
    with pytest.raises(UsageError, match="is a file"):
        Job(tmp_path / "mine" / "thesis.txt", FINGERPRINT).__enter__()
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_disk_that_cannot_be_written_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches a traceback for a full disk, and the good state lost to it."""
    folder = tmp_path / "job"
    with Job(folder, FINGERPRINT) as job:
        job.save(state(1))

        def full(descriptor: int) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(OutputError, match=f"cannot write to job folder {folder}: No space left on device; free some space"):
            job.save(state(2))
        monkeypatch.undo()
        got = job.load()
        assert got is not None and got.n_steps == 1


# --- steps --------------------------------------------------------------------------------------------------------------


class Sum:
    """The smallest accumulator there is."""

    def __init__(self) -> None:
        self.total = np.zeros(1)

    def state(self) -> dict[str, np.ndarray]:
        return {"total": self.total}

    def restore(self, arrays: dict[str, np.ndarray]) -> None:
        self.total = arrays["total"]


def test_steps_save_when_due_and_last(tmp_path: Path):
    """Catches a save per chunk of a fast model, and a last step that is not saved."""
    total = Sum()
    with Job(tmp_path / "job", FINGERPRINT) as job:
        steps, saved = Steps(job, {"sum": total}, unit="chunk", min_seconds=3600), []
        assert steps.begin() is None
        for i in range(4):
            total.total += 1
            steps.finished(i + 1, 4, lambda: saved.append(1) or {"nll": np.zeros(2)})
        assert len(saved) == 1
        total.total += 100
        begun = steps.begin()
        assert begun is not None
        assert (begun.n_steps, total.total.tolist(), sorted(begun.parts)) == (4, [4], [ENGINE, "sum"])


def test_steps_stop_when_asked(tmp_path: Path):
    """Catches a request to stop that waits for the next save, or is not saved."""
    with Job(tmp_path / "job", FINGERPRINT) as job:
        steps = Steps(job, {"sum": Sum()}, unit="chunk", min_seconds=3600)
        steps.finished(1, 4)
        job.should_stop = True
        with pytest.raises(Interrupted, match="after chunk 2 of 4") as caught:
            steps.finished(2, 4)
        assert caught.value.exit_code == 75
        got = job.load()
        assert got is not None and got.n_steps == 2


# --- cache --------------------------------------------------------------------------------------------------------------


def test_content_keys_tell_parts_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches an entry that is taken for another one's, and a cache outside the user's folder."""
    assert content_key("a", "b") != content_key("ab") != content_key(["a", "b"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = cache_path("imatrix", "key", ".gguf")
    assert path.name == "key.gguf" and path.parent.is_dir()


def test_the_cache_is_listed_and_cleared_by_kind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A folder that grows unseen, or a clearing that takes more than its kind."""
    monkeypatch.setattr(checkpoint, "cache_folder", lambda: tmp_path)
    assert list_cache() == []
    for kind, size in (("imatrix", 3), ("reference", 5)):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "x").write_bytes(bytes(size))
    assert list_cache() == [CacheKind("imatrix", 1, 3), CacheKind("reference", 1, 5)]
    assert clear_cache("reference") == CacheKind("reference", 1, 5)
    assert list_cache() == [CacheKind("imatrix", 1, 3)]
    with pytest.raises(UsageError, match="got 'reference', expected one of imatrix"):
        clear_cache("reference")


# --- the folder of a command ------------------------------------------------------------------------------------------


def test_stages_lie_in_one_folder_that_goes_with_the_last(tmp_path: Path):
    """Catches a folder that stays behind, one that goes with another stage's work in it, and a user's folder that is taken for one."""
    folder = job_folder(tmp_path / "x.gguf")
    assert folder.name == "x.loopgguf-job"
    with open_stage(folder, IMATRIX, {"text": 1}) as job:
        job.save(state(1))
    with open_stage(folder, QUANTIZE, {"plan": 2}) as job:
        job.save(state(2))
        job.finish()
    assert [path.name for path in folder.iterdir()] == [IMATRIX]
    with open_stage(folder, IMATRIX, {"text": 1}) as job:
        assert job.load() is not None
        job.finish()
    assert not folder.exists()
    folder.mkdir()
    (folder / "thesis.txt").write_text("x", encoding="utf-8")
    with pytest.raises(UsageError, match=r"has other content \(thesis.txt\)"), open_stage(folder, IMATRIX, {}):
        raise AssertionError


def test_a_finished_job_that_is_kept(tmp_path: Path):
    """Catches a kept job whose files would be replaced by the next run without being asked."""
    with open_stage(tmp_path / "job", IMATRIX, {}, keep=True) as job:
        job.save(state(3))
        job.begin_publishing()
        assert was_publishing(tmp_path / "job", IMATRIX)
        job.finish()
    assert not was_publishing(tmp_path / "job", IMATRIX)
    with open_stage(tmp_path / "job", IMATRIX, {}) as job:
        got = job.load()
        assert got is not None and got.n_steps == 3


@pytest.mark.parametrize("name", [PREVIOUS, CURRENT])
def test_a_job_that_is_killed_while_it_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    """Catches a state that is damaged by its removal, and a folder that nothing ever removes."""
    folder, unlink = tmp_path / "job", Path.unlink

    def killed(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok=missing_ok)
        if path.name == name:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), open_stage(folder, IMATRIX, {}) as job:
        for n in (1, 2):
            job.save(state(n))
        job.begin_publishing()
        patch.setattr(Path, "unlink", killed)
        patch.setattr(shutil, "rmtree", lambda *_args, **_kwargs: None)  # the process is dead
        job.finish()
    sweep(folder)
    assert folder.exists() == was_publishing(folder, IMATRIX) == (name == PREVIOUS)
    with open_stage(folder, IMATRIX, {}) as job:
        got = job.load()
        assert (got.n_steps if got is not None else 0) == (2 if name == PREVIOUS else 0)


def test_a_job_in_use_is_not_swept_away(tmp_path: Path):
    """Catches the folder of another run, which has just begun, removed under its feet."""
    with open_stage(tmp_path / "job", QUANTIZE, {}) as job:
        unlinked = [(job.folder / name).unlink(missing_ok=True) for name in (CURRENT, PREVIOUS)]
        sweep(tmp_path / "job")
        assert unlinked and (job.folder / LOCK).exists()
