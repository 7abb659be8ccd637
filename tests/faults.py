"""A disk that fails when it is told to: one seam under all that is written, so that such tests run as root too."""

from __future__ import annotations

import errno
import io
import os
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

import pytest

_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Disk:
    """What the disk does from `install` on.

    room: bytes that can still be written, None: any number; a write that fits in part is short, the next fails. preallocates:
    whether space can be reserved, which takes room at once. longest_write: bytes that one call writes at most. fails: errno by
    the name of a call (open, posix_fallocate, pwrite, fsync, replace), at its `first_failure`-th use, and if it `lasts` from
    then on. `written` and `calls` count what happened.
    """

    room: int | None = None
    preallocates: bool = True
    longest_write: int | None = None
    fails: dict[str, int] = field(default_factory=dict)
    first_failure: int = 1
    lasts: bool = True
    written: int = 0
    calls: Counter[str] = field(default_factory=Counter)
    _reserved: set[tuple[int, int]] = field(default_factory=set)  # device and inode of files whose space is taken already

    def install(self, monkeypatch: pytest.MonkeyPatch) -> Disk:
        self._patch(monkeypatch, "fsync")
        self._patch(monkeypatch, "replace")
        self._patch(monkeypatch, "posix_fallocate", self._fallocate)
        self._patch(monkeypatch, "pwrite", self._pwrite)
        real_open, real_stream = os.open, io.open

        def open_(path: Any, flags: int, *rest: Any, **more: Any) -> int:
            if flags & _WRITING:
                self._call("open")
            return real_open(path, flags, *rest, **more)

        def stream(file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
            if not set(mode) & set("wax+") or isinstance(file, int):  # of a pipe
                return real_stream(file, mode, *rest, **more)
            self._call("open")
            return _Stream(real_stream(file, mode, *rest, **more), self)

        monkeypatch.setattr(os, "open", open_)
        monkeypatch.setattr(io, "open", stream)  # pathlib's way
        monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 60, 0, 1 << 60))  # type: ignore[attr-defined]
        return self

    def _patch(self, monkeypatch: pytest.MonkeyPatch, name: str, instead: Callable[..., Any] | None = None) -> None:
        real = getattr(os, name)

        def call(*arguments: Any, **more: Any) -> Any:
            self._call(name)
            return real(*arguments, **more) if instead is None else instead(real, *arguments)

        monkeypatch.setattr(os, name, call)

    def _call(self, name: str) -> None:
        self.calls[name] += 1
        if name in self.fails and (self.calls[name] == self.first_failure or (self.lasts and self.calls[name] > self.first_failure)):
            raise _error(self.fails[name])

    def take(self, n_bytes: int) -> int:
        """Return how many of so many bytes fit; raises OSError when none does."""
        fitting = n_bytes if self.room is None else min(n_bytes, self.room - self.written)
        if n_bytes and fitting <= 0:
            raise _error(errno.ENOSPC)
        self.written += fitting
        return fitting

    def _fallocate(self, real: Callable[..., None], fd: int, offset: int, n_bytes: int) -> None:
        if not self.preallocates:
            raise _error(errno.EOPNOTSUPP)
        if self.room is not None and self.room - self.written < n_bytes:
            raise _error(errno.ENOSPC)
        self.written += n_bytes
        status = os.fstat(fd)
        self._reserved.add((status.st_dev, status.st_ino))
        real(fd, offset, n_bytes)

    def _pwrite(self, real: Callable[..., int], fd: int, data: memoryview, offset: int) -> int:
        data = data[: self.longest_write]
        status = os.fstat(fd)
        if (status.st_dev, status.st_ino) not in self._reserved:
            data = data[: self.take(len(data))]
        return real(fd, data, offset)


class _Stream:
    """A file object whose bytes go through the disk."""

    def __init__(self, stream: IO[Any], disk: Disk) -> None:
        self._stream, self._disk = stream, disk

    def write(self, data: Any) -> int:
        size = len(memoryview(data).cast("B")) if not isinstance(data, str) else len(data.encode())
        if self._disk.take(size) < size:
            raise _error(errno.ENOSPC)
        return self._stream.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.close()


def _error(number: int) -> OSError:
    return OSError(number, os.strerror(number))
