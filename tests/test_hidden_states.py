"""hidden_states.py: what is written is read again from wherever it lies, and only whole states of a job are found."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loopgguf.accumulators import Columns, ColumnSums
from loopgguf.errors import OutputError
from loopgguf.hidden_states import StateStorage, finished_layers
from loopgguf.layerwise import collect_from_checkpoint
from loopgguf.loss import PassResult

SHAPE = (3, 4, 5)
THREADS = 1


def run_checkpoint(folder: Path, chunks: np.ndarray, **options: object) -> tuple[dict[str, Columns], PassResult]:
    sums = ColumnSums()
    result = collect_from_checkpoint(folder, chunks, [sums], n_threads=THREADS, **options)  # type: ignore[arg-type]
    return sums.columns(), result


@pytest.mark.parametrize(("limit", "in_folder"), [(1 << 20, False), (0, False), (0, True)])
def test_states_are_read_as_they_were_written(tmp_path: Path, limit: int, in_folder: bool):
    """Catches chunks that are swapped or overlap on their way through a file."""
    import torch

    values = torch.from_numpy(np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32))
    storage = StateStorage(SHAPE, limit, tmp_path if in_folder else None)
    states = storage.new("border-0-of-2")
    for i in (2, 0, 1):
        states.write(i, values[i])
    assert states.is_in_memory == (limit > 0)
    assert all((states.read(i) == values[i]).all() for i in (1, 2, 0))
    storage.drop(states)
    assert list(tmp_path.iterdir()) == []


def test_memory_that_was_given_back_is_used_again():
    """Catches states that go to disk while there is room."""
    storage = StateStorage(SHAPE, 4 * 60, None)
    first = storage.new("a")
    assert first.is_in_memory
    storage.drop(first)
    assert storage.new("b").is_in_memory
    second = storage.new("c")
    assert not second.is_in_memory
    storage.close()


def test_only_whole_states_are_found(tmp_path: Path):
    """Catches a job that goes on from states of which half was written."""
    import torch

    storage = StateStorage(SHAPE, 0, tmp_path)
    states = storage.new("hidden-1-of-2")
    for i in range(3):
        states.write(i, torch.ones(SHAPE[1:]))
    assert storage.find("hidden-1-of-2") is None
    assert finished_layers(tmp_path) == range(0)
    states.publish()
    assert finished_layers(tmp_path) == range(1)
    found = storage.find("hidden-1-of-2")
    assert found is not None and (found.read(2) == 1).all()
    storage.close()
    assert StateStorage((4, 4, 5), 0, tmp_path).find("hidden-1-of-2") is None  # of another text


@pytest.mark.parametrize(
    ("names", "layers"),
    [
        ([], range(0)),
        (["border-0-of-6.f32", "hidden-3-of-6.f32"], range(3)),
        (["hidden-3-of-6.part"], range(0)),
        (["border-4-of-6.f32", "tail-6-of-6.f32"], range(0)),
        (["border-0-of-6.f32", "gradient-4-of-6.f32"], range(4, 6)),
    ],
)
def test_finished_layers(tmp_path: Path, names: list[str], layers: range):
    """Catches a backward job that counts its layers from the front, and states of the way forward taken for finished layers."""
    for name in names:
        (tmp_path / name).touch()
    assert finished_layers(tmp_path) == layers


def test_spilled_hidden_states_change_nothing(demo_model: Path, chunks: np.ndarray):
    """Catches chunks that come back from the temporary file in another order."""
    columns, result = run_checkpoint(demo_model, chunks, max_memory_bytes=0)
    expected, same = run_checkpoint(demo_model, chunks)
    assert result == same
    assert all((c.sum_squares == expected[name].sum_squares).all() for name, c in columns.items())


def test_no_room_for_hidden_states(demo_model: Path, chunks: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    """Catches a full disk found out after hours."""
    monkeypatch.setattr("shutil.disk_usage", lambda _path: type("Usage", (), {"free": 1000})())
    with pytest.raises(OutputError, match="cannot spill hidden states"):
        run_checkpoint(demo_model, chunks, max_memory_bytes=0)
