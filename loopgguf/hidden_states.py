"""The residual stream of all chunks between two steps of a pass: in memory, in temporary files, or in a job's folder.

In a job's folder what a step left has its name only once it is whole, which is how a pass finds where to go on.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import numpy as np

from loopgguf.errors import OutputError

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)


class HiddenStates:
    """The residual stream of all chunks at one place of the model, float32: in memory, or in a file."""

    def __init__(self, shape: tuple[int, int, int], file: IO[bytes] | None, path: Path | None = None) -> None:
        self.shape, self.n_bytes, self.path = shape, 4 * math.prod(shape), path
        self._chunk_bytes = self.n_bytes // shape[0]
        self._file = file
        self._memory = np.empty(shape, np.float32) if file is None else None

    def read(self, i: int) -> torch.Tensor:
        """Return the states of chunk i, (n_ctx, n_embd); to be written to only through `write`."""
        import torch

        if self._memory is not None:
            return torch.from_numpy(self._memory[i])
        assert self._file is not None
        with _explained(self.path and self.path.parent):
            self._file.seek(i * self._chunk_bytes)
            raw = bytearray(self._file.read(self._chunk_bytes))
        return torch.frombuffer(raw, dtype=torch.float32).reshape(self.shape[1:])

    def write(self, i: int, values: torch.Tensor) -> None:
        if self._memory is not None:
            self._memory[i] = values.detach().cpu().numpy()
            return
        assert self._file is not None
        with _explained(self.path and self.path.parent):
            self._file.seek(i * self._chunk_bytes)
            self._file.write(np.ascontiguousarray(values.detach().cpu().numpy()).data)

    def publish(self) -> None:
        """Flush the file to disk and give it the name that tells that it is whole."""
        if self.path is not None and self._file is not None:
            with _explained(self.path and self.path.parent):
                self._file.flush()
                os.fsync(self._file.fileno())
                self.path.with_suffix(".part").replace(self.path)

    def close(self, *, remove: bool = False) -> None:
        if self._file is not None:
            self._file.close()
        self._memory = None
        if remove and self.path is not None:
            for path in (self.path, self.path.with_suffix(".part")):
                path.unlink(missing_ok=True)

    @property
    def is_in_memory(self) -> bool:
        return self._file is None


@contextmanager
def _explained(folder: Path | None) -> Iterator[None]:
    """folder: of the job; None for the temporary one."""
    try:
        yield
    except OSError as error:
        place, remedy = (tempfile.gettempdir(), "set TMPDIR") if folder is None else (folder, "choose another job folder")
        raise OutputError(f"cannot spill hidden states to {place}: {error.strerror}; free some space or {remedy}") from error


class StateStorage:
    """Keeps hidden states: in memory up to a limit, in unnamed temporary files above it; or all in a job's folder."""

    def __init__(self, shape: tuple[int, int, int], limit_bytes: int, folder: Path | None) -> None:
        self.shape, self.folder, self._left = shape, folder, limit_bytes
        self._open: list[HiddenStates] = []

    def new(self, label: str) -> HiddenStates:
        """Return room for the states `label`; raises OutputError when the disk is too small."""
        n_bytes = 4 * math.prod(self.shape)
        if self.folder is None and n_bytes <= self._left:
            self._left -= n_bytes
            states = HiddenStates(self.shape, None)
        else:
            states = self._on_disk(label, n_bytes)
        self._open.append(states)
        return states

    def _on_disk(self, label: str, n_bytes: int) -> HiddenStates:
        place = self.folder or Path(tempfile.gettempdir())
        with _explained(self.folder):
            if shutil.disk_usage(place).free < n_bytes:
                raise OSError(errno.ENOSPC, f"{n_bytes} bytes needed")
            logger.info("hidden states: %d bytes in %s", n_bytes, place)
            if self.folder is None:
                return HiddenStates(self.shape, tempfile.TemporaryFile(prefix="loopgguf-hidden-"))
            path = self.folder / f"{label}.f32"
            return HiddenStates(self.shape, path.with_suffix(".part").open("w+b"), path)

    def find(self, label: str) -> HiddenStates | None:
        """Return whole states that a job left in the folder, None when there are none."""
        path = self.folder / f"{label}.f32" if self.folder else None
        if path is None or not path.exists() or path.stat().st_size != 4 * math.prod(self.shape):
            return None
        states = HiddenStates(self.shape, path.open("rb"), path)
        self._open.append(states)
        return states

    def next(self, states: HiddenStates, label: str) -> HiddenStates:
        """Return where the states after these go: the same place, unless a job may have to go back to them."""
        return states if self.folder is None else self.new(label)

    def drop(self, states: HiddenStates) -> None:
        if states.is_in_memory:
            self._left += states.n_bytes
        states.close(remove=True)
        self._open.remove(states)

    def close(self) -> None:
        for states in self._open:
            states.close()


_DONE = re.compile(r"(hidden|gradient)-(\d+)-of-(\d+)\.f32")


def finished_layers(work: Path) -> range:
    """Return the layers that a pass with this job folder has finished: those it will not run, or not show, again.

    The statistics of exactly these are to be restored; what was saved of others belongs to a step that did not end.
    """
    found = [match for path in work.iterdir() if (match := _DONE.fullmatch(path.name))]
    gradients = [int(match[2]) for match in found if match[1] == "gradient"]
    if gradients:
        return range(min(gradients), int(found[0][3]))
    return range(max((int(match[2]) for match in found), default=0)) if found else range(0)
