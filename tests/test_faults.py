"""What is left when the disk fails, at any place: one clear line, no file under its final name, and a run that goes on."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from faults import Disk
from tiny_llama import write_tiny_llama

from loopgguf import journal as journal_module
from loopgguf import publish
from loopgguf.checkpoint import cache_path, write_cached
from loopgguf.container import write_file
from loopgguf.errors import InputError, OutputError
from loopgguf.importance import ImatrixRequest
from loopgguf.intent import QuantizeRequest
from loopgguf.journal import Journal
from loopgguf.opening import Settings
from loopgguf.statistics import load_imatrix
from loopgguf.workflow import compute_imatrix, quantize

REQUEST = QuantizeRequest(quant_type="Q8_0", use_imatrix=False)
N_PLACES = 50


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty folder and cache; every finished tensor is saved at once; llama.cpp is not asked (other tests do)."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(publish, "Journal", partial(Journal, min_seconds=0))
    monkeypatch.setattr(journal_module, "MAX_SHARE", float("inf"))
    monkeypatch.setattr(publish, "speak", lambda *_args, **_kwargs: "hello")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf")


def run(model: Path) -> bytes:
    quantize(model, Path("x.gguf"), REQUEST, Settings(n_threads=1))
    assert sorted(path.name for path in Path().iterdir()) == ["x.gguf", "x.gguf.sha256"]
    raw = Path("x.gguf").read_bytes()
    for path in Path().iterdir():
        path.unlink()
    return raw


def refuse(model: Path, monkeypatch: pytest.MonkeyPatch, disk: Disk, whole: bytes = b"") -> OutputError | InputError | None:
    """Run on a disk that fails; return the error, after which nothing may be there but what is gone on with, or None.

    whole: bytes that the model may have under its name, where nothing can be renamed back.
    """
    with monkeypatch.context() as patch:
        disk.install(patch)
        try:
            quantize(model, Path("x.gguf"), REQUEST, Settings(n_threads=1))
        except (OutputError, InputError) as error:
            assert "\n" not in str(error) and error.exit_code in (3, 4)
            left = {path.name for path in Path().iterdir()}
            if whole and left == {"x.gguf", "x.loopgguf-job"} and Path("x.gguf").read_bytes() == whole:
                return error
            assert left <= {"x.gguf.part", "x.loopgguf-job"}, left
            assert left in (set(), {"x.loopgguf-job"}) or left == {"x.gguf.part", "x.loopgguf-job"}
            return error
    return None


@pytest.mark.parametrize("preallocates", [True, False])
def test_a_disk_that_is_full_at_any_byte(model: Path, monkeypatch: pytest.MonkeyPatch, preallocates: bool) -> None:
    """Catches half a model under its name, a traceback, a leftover that nobody goes on with, and one that spoils the next run."""
    whole = run(model)
    with monkeypatch.context() as patch:
        total = Disk(preallocates=preallocates).install(patch)
        run(model)
    assert total.written > len(whole)
    errors = []
    for place in range(N_PLACES):
        error = refuse(model, monkeypatch, Disk(room=total.written * place // N_PLACES, preallocates=preallocates))
        assert isinstance(error, OutputError) and "free some space" in str(error)
        errors.append(str(error))
        assert run(model) == whole
    assert any("job folder" in error for error in errors)
    assert any("reserve space" in error for error in errors) == preallocates
    assert any("cannot write x.gguf.part" in error for error in errors) != preallocates
    assert any("finished tensors are kept in x.loopgguf-job" in error for error in errors)


def test_short_writes(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches bytes that a short write left out, which a disk is free to do at any size."""
    whole = run(model)
    with monkeypatch.context() as patch:
        disk = Disk(longest_write=1000).install(patch)
        assert run(model) == whole
    assert disk.calls["pwrite"] > len(whole) / 1000


@pytest.mark.parametrize("call", ["pwrite", "fsync", "replace", "open"])
@pytest.mark.parametrize(("number", "lasts"), [(errno.EIO, False), (errno.EROFS, True)])
def test_a_call_that_fails(model: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, lasts: bool) -> None:
    """Catches an error of one single call that is swallowed, that leaves the model under its name, or that a next run stumbles over.

    EROFS at the first `open` is a read-only folder, for root too.
    """
    whole = run(model)
    with monkeypatch.context() as patch:
        calls = Disk().install(patch).calls
        run(model)
    assert calls[call] > 3
    for first in sorted({*range(1, calls[call] + 1, max(1, calls[call] // 12)), calls[call]}):
        error = refuse(model, monkeypatch, Disk(fails={call: number}, first_failure=first, lasts=lasts), whole if call == "replace" and lasts else b"")
        assert error is not None and os.strerror(number) in str(error), (call, first)
        assert run(model) == whole


def test_small_files_and_cache_entries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches half a plan or imatrix under its name, and leftovers of a cache that nobody sees."""
    entry = cache_path("errors", "key", ".json")
    for disk in (Disk(room=50), Disk(room=50, preallocates=False), Disk(fails={"fsync": errno.EIO}), Disk(fails={"replace": errno.EIO})):
        with monkeypatch.context() as patch:
            disk.install(patch)
            with pytest.raises(OutputError, match="plan"):
                write_file(Path("plan.json"), bytes(100))
            with pytest.raises(OutputError, match=r"cannot write the cache entry .*; set XDG_CACHE_HOME"):
                write_cached(entry, bytes(100))
        assert list(Path().iterdir()) == [] and list(entry.parent.iterdir()) == []


def test_an_imatrix_on_a_full_disk(demo_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches statistics of hours lost because they could not be saved: the pass goes on where its state is."""
    text = ImatrixRequest(n_samples=3, ctx_size=64)
    compute_imatrix(demo_gguf, Path("whole.imatrix.gguf"), text)
    with monkeypatch.context() as patch, pytest.raises(OutputError, match="free some space"):
        Disk(fails={"posix_fallocate": errno.ENOSPC}).install(patch)
        compute_imatrix(demo_gguf, Path("x.imatrix.gguf"), text)
    assert not Path("x.imatrix.gguf").exists() and Path("x.imatrix.loopgguf-job").exists()
    calls: list[str] = []
    compute_imatrix(demo_gguf, Path("x.imatrix.gguf"), text, Settings(progress=lambda phase, _done, _total: calls.append(phase)))
    assert not any(phase.startswith("calibrate") for phase in calls)
    assert Path("x.imatrix.gguf").read_bytes() == Path("whole.imatrix.gguf").read_bytes()
    assert load_imatrix(Path("x.imatrix.gguf")).n_chunks == 3


def test_a_clock_that_jumps(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches saves that never come, or a job refused, because the clock of the machine was set back by a year."""
    whole = run(model)
    now, jumps = time.time, [0]

    def jump() -> float:
        jumps[0] += 1
        return now() + (-1) ** jumps[0] * 3e7

    monkeypatch.setattr(time, "time", jump)
    error = refuse(model, monkeypatch, Disk(fails={"pwrite": errno.EIO}, first_failure=6))
    assert error is not None and "finished tensors are kept" in str(error)
    assert run(model) == whole


@pytest.mark.skipif(os.name == "nt", reason="no closed descriptors to give")
@pytest.mark.parametrize("closed", ["a pipe without a reader", "no descriptor"])
def test_a_closed_standard_output(model: Path, closed: str) -> None:
    """Catches a finished model lost, or a traceback, because nobody listens: `loopgguf quantize … | head -1`."""
    command = [sys.executable, "-m", "loopgguf.cli", "quantize", str(model), "--quant-type", "Q8_0", "--no-imatrix", "-o", "x.gguf"]
    if closed == "no descriptor":
        done = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *command], stderr=subprocess.PIPE, text=True, encoding="utf-8", check=False)
    else:
        reading, writing = os.pipe()
        os.close(reading)
        done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, encoding="utf-8", check=False)
        os.close(writing)
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr, done.stderr
    assert sorted(path.name for path in Path().iterdir()) == ["x.gguf", "x.gguf.sha256"]
