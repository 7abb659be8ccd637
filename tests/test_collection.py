"""collection.py: a pass that was killed or stopped ends with the same bytes as one that was not."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from loopgguf.accumulators import ColumnSums, Spikes, split_holdout
from loopgguf.attention import AttentionMass
from loopgguf.checkpoint import Job
from loopgguf.collection import GramRequest, Pass, run_checkpoint, run_gguf, run_gguf_grams
from loopgguf.curvature import GramSet
from loopgguf.errors import InputError, Interrupted
from loopgguf.grams import GramHeader, GramWriter, find_grams, load_grams

FINGERPRINT = {"source": "x", "calibration": "y"}
CHUNKS = np.random.default_rng(4).integers(3, 500, (5, 32)).astype(np.int32)
HEADER = GramHeader((1,), 0, 5, "y")

RUN = """
import sys
from pathlib import Path
import numpy as np
from loopgguf.accumulators import ColumnSums, Spikes
from loopgguf.checkpoint import Job
from loopgguf.collection import Pass, run_checkpoint, run_gguf
from loopgguf.errors import Interrupted

model, folder, out, chunks = Path(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]), np.load(sys.argv[4])
collectors = {"columns": ColumnSums(moments=True), "spikes": Spikes()}
try:
    with Job(folder, {"source": "x"}) as job:
        how = Pass(n_threads=1, progress=lambda *step: print(*step[1:], flush=True))
        if model.is_dir():
            result = run_checkpoint(model, chunks, collectors, job, how)
        else:
            result = run_gguf(model, chunks, collectors, job, how, save_seconds=0)
        arrays = sorted((a + b, v.tobytes()) for a, c in collectors.items() for b, v in c.state().items())
        out.write_text(repr((result, arrays)), encoding="utf-8")
        job.finish()
except Interrupted as error:
    print(error, flush=True)
    sys.exit(error.exit_code)
"""


def start(model: Path, folder: Path) -> subprocess.Popen[str]:
    np.save(folder / "chunks.npy", np.concatenate([CHUNKS] * 3))
    arguments = [model, folder / "job", folder / "out", folder / "chunks.npy"]
    return subprocess.Popen([sys.executable, "-c", RUN, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, encoding="utf-8")


def kill_and_resume(model: Path, tmp_path: Path, n_kills: int, most_lines: int) -> None:
    whole, cut, dice = tmp_path / "whole", tmp_path / "cut", random.Random(1)
    whole.mkdir(), cut.mkdir()
    start(model, whole).communicate(timeout=120)
    for _ in range(n_kills):
        child = start(model, cut)
        assert child.stdout is not None
        for _, _line in zip(range(dice.randint(1, most_lines)), child.stdout, strict=False):
            pass
        time.sleep(dice.random() * 0.02)
        child.kill()
        child.communicate(timeout=120)
    child = start(model, cut)
    child.communicate(timeout=120)
    assert child.returncode == 0
    assert (cut / "out").read_bytes() == (whole / "out").read_bytes()
    assert not (cut / "job").exists()


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_gguf_pass_killed_at_random_moments(demo_gguf: Path, tmp_path: Path):
    """Catches a chunk that counts twice or never, and losses that are forgotten."""
    kill_and_resume(demo_gguf, tmp_path, 4, 5)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_checkpoint_pass_killed_at_random_moments(demo_model: Path, tmp_path: Path):
    """Catches a layer that counts twice or never."""
    kill_and_resume(demo_model, tmp_path, 4, 40)


@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM to a child")
def test_gguf_pass_stops_after_the_chunk(demo_gguf: Path, tmp_path: Path):
    """Catches a stop that loses the chunks since the last save."""
    child = start(demo_gguf, tmp_path)
    assert child.stdout is not None
    child.stdout.readline()
    child.send_signal(signal.SIGTERM)
    said = child.communicate(timeout=120)[0]
    assert child.returncode == 75
    assert "interrupted after chunk" in said and "of 15" in said


class Killed(Exception):
    """Stands for the end of the process."""


def killed_at(n: int):
    """Return a progress callback that ends everything at its n-th call."""
    left = [n]

    def progress(_phase: str, _done: int, _total: int) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise Killed

    return progress


def collectors() -> dict[str, ColumnSums | Spikes | AttentionMass]:
    return {"columns": ColumnSums(moments=True), "spikes": Spikes(), "attention": AttentionMass()}


def states(found: dict[str, ColumnSums | Spikes | AttentionMass]) -> dict[tuple[str, str], bytes]:
    return {(name, label): array.tobytes() for name, collector in found.items() for label, array in collector.state().items()}


def run_torch(model: Path, folder: Path, progress=None, **how):
    found = collectors()
    with Job(folder / "job", FINGERPRINT) as job:
        result = run_checkpoint(model, CHUNKS, found, job, Pass(n_threads=2, progress=progress), **how)
        job.finish()
    return result, states(found)


def test_checkpoint_pass_goes_on_after_its_layers(demo_model: Path, tmp_path: Path):
    """Catches statistics of an unfinished layer that are kept, and finished layers that run again."""
    expected = run_torch(demo_model, tmp_path / "whole")
    for n in (8, 13, 5):
        with pytest.raises(Killed):
            run_torch(demo_model, tmp_path / "cut", killed_at(n))
    calls: list[tuple[int, int]] = []
    assert run_torch(demo_model, tmp_path / "cut", lambda _phase, done, total: calls.append((done, total))) == expected
    assert len(calls) < len(CHUNKS) * 6


@pytest.mark.parametrize("label_seed", [None, 5])
def test_gram_matrices_are_whole_after_a_kill(demo_model: Path, tmp_path: Path, label_seed: int | None):
    """Catches matrices of a layer that are missing, or that count some chunks twice."""
    grams = GramRequest(split_holdout(len(CHUNKS), 0)[1].tolist(), label_seed)

    def run(folder: Path, progress=None):
        found = collectors()
        with Job(folder / "job", FINGERPRINT) as job:
            writer = GramWriter(job.shards, HEADER)
            how = Pass(n_threads=2, progress=progress, max_memory_bytes=30 << 20)
            result = run_checkpoint(demo_model, CHUNKS, found, job, how, grams, writer)
            writer.publish(folder / "m.imatrix.gguf")
            job.finish()
        return result, states(found), [path.read_bytes() for path in find_grams(folder / "m.imatrix.gguf")]

    expected = run(tmp_path / "whole")
    assert len(expected[2]) > 1
    for n in (12, 17):
        with pytest.raises(Killed):
            run(tmp_path / "cut", killed_at(n))
    assert run(tmp_path / "cut") == expected
    loaded = load_grams(tmp_path / "cut" / "m.imatrix.gguf")
    assert bool(loaded.train.weighted) == (label_seed is not None)
    assert all(gram.n_tokens == 4 * 32 for gram in loaded.train.inputs.values())


def test_checkpoint_pass_stops_between_layers(demo_model: Path, tmp_path: Path):
    """Catches a stop in the middle of a layer, and one that waits for the end."""
    calls: list[int] = []
    with pytest.raises(Interrupted, match="after 1 layers; saved in"), Job(tmp_path / "job", FINGERPRINT) as job:

        def progress(_phase: str, done: int, _total: int) -> None:
            calls.append(done)
            job.should_stop |= done == 2

        run_checkpoint(demo_model, CHUNKS, collectors(), job, Pass(n_threads=2, progress=progress))
    assert calls == [1, 2, 3, 4, 5, 6]


def test_a_job_without_the_statistics_of_a_finished_layer_is_refused(demo_model: Path, tmp_path: Path):
    """Catches an imatrix with a hole, when the engine's states are newer than what was saved."""
    with pytest.raises(Killed):
        run_torch(demo_model, tmp_path, killed_at(12))
    with Job(tmp_path / "job", FINGERPRINT) as job:
        state = job.load()
        assert state is not None
        job.save(type(state)(1, {**state.parts, "columns": {}}))
    with pytest.raises(InputError, match=r"got no columns of layer 0, which is finished.*--no-resume"):
        run_torch(demo_model, tmp_path)


def test_gguf_matrices_are_written_and_a_stop_says_that_nothing_is_kept(demo_gguf: Path, tmp_path: Path):
    """Catches a promise to go on that cannot be kept."""
    shapes = {f"blk.0.{kind}.weight": (64, 64) for kind in ("attn_q", "attn_output")}
    grams = GramRequest([1])
    with Job(tmp_path / "job", FINGERPRINT) as job:
        writer = GramWriter(job.shards, HEADER)
        run_gguf_grams(demo_gguf, CHUNKS, collectors(), job, Pass(n_threads=2), grams, writer, shapes)
        writer.publish(tmp_path / "m.imatrix.gguf")
    loaded = load_grams(tmp_path / "m.imatrix.gguf")
    assert isinstance(loaded.train, GramSet)
    assert ("blk.0.attn_norm", None) in loaded.train.inputs
    assert not (tmp_path / "job").exists()
    with pytest.raises(Interrupted, match="nothing of it is kept"), Job(tmp_path / "job", FINGERPRINT) as job:
        job.should_stop = True
        run_gguf_grams(demo_gguf, CHUNKS, collectors(), job, Pass(n_threads=2), grams, GramWriter(job.shards, HEADER), shapes)


@pytest.mark.parametrize("documents", [None, np.arange(5 * 32, dtype=np.int32).reshape(5, 32) % 32 // 11])
def test_gguf_pass_is_the_same_with_and_without_a_job(demo_gguf: Path, tmp_path: Path, documents: np.ndarray | None):
    """Catches a job that changes what it only keeps, or that forgets the documents."""
    from loopgguf.activations import SCORE_EVERY, collect_from_gguf

    plain, found = collectors(), collectors()
    expected = collect_from_gguf(demo_gguf, CHUNKS, list(plain.values()), n_threads=2, documents=documents, score_every=SCORE_EVERY)
    with Job(tmp_path / "job", FINGERPRINT) as job:
        assert run_gguf(demo_gguf, CHUNKS, found, job, Pass(n_threads=2, documents=documents), save_seconds=0) == expected
    assert states(found) == states(plain)
