"""What outlives a run: the user cache folder, by content key, and the job folder that a long run goes on from.

The cache holds imatrix files, BF16 references and vocabulary proofs, each named by the fingerprint of everything it
depends on, so that an entry is either exactly right or absent.

A command's job folder holds a `Job` for each of its stages: a folder that one process at a time holds (`lock`). `save`
writes each part of a state as `objects/SHA256.safetensors`, flushed, and then publishes a manifest as `CURRENT` in one
step; the one before stays as `PREVIOUS`, and what neither needs is removed. So a kill at any moment, or a damaged newest
state, loses one step.
No pickle: a part is named arrays, and facts are JSON.

What an engine and an accumulator must offer for that (`collection.py` brings them together):

* An accumulator is `Resumable`: `state()` returns all that it has summed up, exactly (float64 sums stay float64), as
  arrays by names of its own; `restore(arrays)` puts that, or some of it, back into an empty one.
* An engine calls back after each step, a chunk or a layer, and can be told where to go on. What it carries from step to
  step either comes with the call, as arrays (losses), or it keeps it itself in the job's `work` folder (hidden states),
  where a step counts as done when its file gets its final name, after the call has returned.
* A step done again after a kill must give the same bits, so nothing may depend on where the run was cut.

Knows nothing of models and statistics.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType, TracebackType
from typing import IO, Any, Protocol, Self

import platformdirs
from numpy.typing import NDArray

from loopgguf.container import flush_folder
from loopgguf.documents import parse_json
from loopgguf.errors import InputError, Interrupted, OutputError, UsageError
from loopgguf.progress import Progress
from loopgguf.safetensor import read_array, read_safetensors, write_safetensors

logger = logging.getLogger(__name__)

Arrays = Mapping[str, NDArray[Any]]

FORMAT = 1
CURRENT, PREVIOUS, LOCK, OBJECTS = "CURRENT", "PREVIOUS", "lock", "objects"
TEMPORARY = "CURRENT.tmp"
PUBLISHING = "PUBLISHING"  # is there while files of a finished job get their names
IMATRIX, SEARCH, GUARD, QUANTIZE, GATE = STAGES = "imatrix", "search", "guard", "quantize", "gate"  # of a command
WORK, SHARDS = "work", "shards"  # subfolders of an engine, and of results that are written as they come
ENGINE = "engine"  # the part of a state that is the engine's own
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_HASH_BYTES = 1 << 20


# --- cache --------------------------------------------------------------------------------------------------------------


def cache_folder() -> Path:
    """Return the folder for reusable results (`~/.cache/loopgguf` on Linux, honouring XDG_CACHE_HOME); it may not exist yet."""
    return Path(platformdirs.user_cache_dir("loopgguf", appauthor=False))


def content_key(*parts: object) -> str:
    """Return a short hash over JSON-able parts: the name of the cache entry that depends on exactly these."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def cache_path(kind: str, key: str, suffix: str) -> Path:
    """Return where the entry of this kind and key lies, or would lie; makes its folder."""
    folder = cache_folder() / kind
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"cannot make the cache folder {folder}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written") from error
    return folder / f"{key}{suffix}"


def write_cached(path: Path, content: bytes) -> None:
    """Write a small cache entry at once: whole, or not at all. Raises OutputError when it cannot be written."""
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as empty:
            temporary = Path(empty.name)  # of its own, for two runs may write one entry at a time
        try:
            with temporary.open("wb") as stream:
                stream.write(content)
                _flush(stream)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise OutputError(f"cannot write the cache entry {path}: {error.strerror}; set XDG_CACHE_HOME to a folder that can be written") from error


@dataclass(frozen=True)
class CacheKind:
    """What of one kind lies in the cache folder."""

    name: str
    n_files: int
    n_bytes: int


def list_cache() -> list[CacheKind]:
    """Return what the cache folder holds, by kind."""
    folder = cache_folder()
    kinds = sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    files = {kind: [path for path in kind.rglob("*") if path.is_file()] for kind in kinds}
    return [CacheKind(kind.name, len(paths), sum(path.stat().st_size for path in paths)) for kind, paths in files.items()]


def clear_cache(kind: str) -> CacheKind:
    """Delete all of one kind from the cache folder, and return what it was. Raises UsageError for a kind that is not there."""
    kinds = {found.name: found for found in list_cache()}
    if kind not in kinds:
        raise UsageError(f"kind of cache entry: got {kind!r}, expected one of {', '.join(kinds) or 'none: the cache is empty'}")
    shutil.rmtree(cache_folder() / kind)
    return kinds[kind]


# --- files --------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        remedy = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "check its permissions"
        raise OutputError(f"cannot write to job folder {path}: {error.strerror}; {remedy} or choose another folder with --job-folder") from error


def _flush(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, as hex."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while piece := stream.read(_HASH_BYTES):
            digest.update(piece)
    return digest.hexdigest()


# --- state --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class State:
    """How far a job is: `n_steps` finished steps, the arrays to go on with by part, and JSON-able facts.

    Each part is one file: a part that does not change from step to step is stored once.
    """

    n_steps: int
    parts: Mapping[str, Arrays] = field(default_factory=dict)
    facts: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class _Manifest:
    fingerprint: Mapping[str, object]
    n_steps: int
    parts: Mapping[str, str]  # SHA-256 of each part's file
    facts: Mapping[str, object]

    def encode(self) -> bytes:
        """Return the manifest as one line of JSON, and the line's own SHA-256 on a second."""
        entries = {"format": FORMAT, "fingerprint": self.fingerprint, "n_steps": self.n_steps, "parts": self.parts, "facts": self.facts}
        line = json.dumps(entries, sort_keys=True, allow_nan=False)
        return f"{line}\n{hashlib.sha256(line.encode()).hexdigest()}\n".encode()

    @staticmethod
    def decode(raw: bytes) -> _Manifest:
        """Return the manifest in `raw`. Raises ValueError when it is not whole or of another format."""
        line, _, digest = raw.decode("utf-8").partition("\n")
        if hashlib.sha256(line.encode()).hexdigest() != digest.strip():
            raise ValueError("its checksum is wrong")
        entries = parse_json(line)
        if not isinstance(entries, dict) or entries.get("format") != FORMAT:
            raise ValueError("its format is not known to this version")
        return _Manifest(entries["fingerprint"], entries["n_steps"], entries["parts"], entries["facts"])


# --- lock ---------------------------------------------------------------------------------------------------------------


def _try_lock(stream: IO[bytes]) -> None:
    """Lock an open file for this process; raises OSError when another one holds it. The system frees it when we die."""
    if sys.platform == "win32":
        import msvcrt

        stream.seek(1 << 20)  # behind the text, which others may read
        msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        import fcntl

        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _lock(path: Path) -> IO[bytes]:
    """Return the lock file, open and locked, with our process id in it; raises UsageError when a live process holds it."""
    while True:
        stream = path.open("a+b")
        try:
            _try_lock(stream)
        except OSError as error:
            stream.seek(0)
            owner = stream.read(32).decode("ascii", "replace").strip()
            stream.close()
            raise UsageError(
                f"job folder {path.parent} is in use by process {owner or '?'}: wait for it, or choose another folder with --job-folder"
            ) from error
        if path.exists() and os.fstat(stream.fileno()).st_ino == path.stat().st_ino:
            break
        stream.close()  # its last owner has removed it meanwhile
    try:
        stream.truncate(0)
        stream.write(f"{os.getpid()}\n".encode("ascii"))
        stream.flush()
    except OSError:
        stream.close()
        raise
    return stream


# --- job ----------------------------------------------------------------------------------------------------------------


class StopRequest:
    """While the context lasts, the first SIGINT or SIGTERM sets `should_stop`: what runs ends its step and raises Interrupted.
    The second ends the process at once, whatever its threads do: what is finished survives any death (main thread only)."""

    def __init__(self) -> None:
        self.should_stop = False
        self._handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._handlers = {number: signal.signal(number, self._on_signal) for number in STOP_SIGNALS}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
            outer = getattr(handler, "__self__", None)
            if isinstance(outer, StopRequest) and self.should_stop:  # what came too late for us is for what we are a part of
                outer.should_stop = True

    def stopping(self, progress: Progress | None, interrupted: Callable[[int, int], str]) -> Progress:
        """Return a progress callback that passes on what it is told and then, where the user has asked to stop, raises Interrupted.

        interrupted: (done, total) → what is kept of the work, and how to go on.
        """

        def wrapped(phase: str, done: int, total: int) -> None:
            if progress is not None:
                progress(phase, done, total)
            if self.should_stop:
                raise Interrupted(interrupted(done, total))

        return wrapped

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.should_stop:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
        self.should_stop = True
        logger.warning("stopping after this step; once more stops at once")


class Job(StopRequest):
    """A run that can be stopped and goes on: use it as a context, `load` first, `save` after each step, `finish` at the end.

    folder: made when missing; a folder with other content is refused. fingerprint: JSON-able fields that say exactly
    what the result depends on (source, calibration, settings, versions). resume: go on from what the folder holds; when
    False, that is thrown away. keep: leave the folder there when the job is finished. Entering raises UsageError when
    another live process holds the folder, it is no job folder, or its fingerprint differs (naming the fields);
    OutputError when it cannot be written.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, object], *, resume: bool = True, keep: bool = False) -> None:
        super().__init__()
        self.folder, self.resume, self.keep = folder, resume, keep
        self.fingerprint: Mapping[str, object] = json.loads(json.dumps(fingerprint))
        self._lock: IO[bytes] | None = None

    def __enter__(self) -> Self:
        _refuse_foreign(self.folder, {CURRENT, PREVIOUS, TEMPORARY, PUBLISHING, LOCK, OBJECTS, WORK, SHARDS})
        with _explained(self.folder):
            (self.folder / OBJECTS).mkdir(parents=True, exist_ok=True)
            self._lock = _lock(self.folder / LOCK)
        try:
            if not self.resume:
                self.clear()
            self._compare()
            if next(self._manifests(), None) is None:  # an engine's own files must never be taken for those of another job
                with _explained(self.folder):
                    self._publish(_Manifest(self.fingerprint, 0, {}, {}).encode())
        except BaseException:
            self._release()
            raise
        return super().__enter__()

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        super().__exit__(kind, error, trace)
        if not self._is_worth_keeping(error):
            shutil.rmtree(self.folder, ignore_errors=True)
        self._release()

    def _is_worth_keeping(self, error: BaseException | None) -> bool:
        """Tell whether there is something to go on from: finished steps, or what a stopped engine had before its first."""
        if not _has_state(self.folder):
            return False
        newest = next(self._manifests(), None)
        has_begun = isinstance(error, Interrupted | KeyboardInterrupt) and any(self.work.iterdir())
        return newest is None or newest.n_steps > 0 or has_begun

    @property
    def work(self) -> Path:
        """The folder in which an engine keeps what it goes on from; it exists."""
        return self._subfolder(WORK)

    @property
    def shards(self) -> Path:
        """The folder for results that are written as they come; it exists."""
        return self._subfolder(SHARDS)

    def _subfolder(self, name: str) -> Path:
        with _explained(self.folder):
            (self.folder / name).mkdir(exist_ok=True)
        return self.folder / name

    def _release(self) -> None:
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def _compare(self) -> None:
        """Raise UsageError naming the fields in which the newest manifest's fingerprint is not ours."""
        manifest = next(self._manifests(), None)
        if manifest is None:
            if _has_state(self.folder):
                raise InputError(f"job folder {self.folder} is damaged: got no readable state. Start anew with --no-resume")
            return
        before, now = manifest.fingerprint, self.fingerprint
        changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        if changed:
            fields = ", ".join(f"{name} (was {_short(before.get(name))}, is {_short(now.get(name))})" for name in changed)
            raise UsageError(
                f"job folder {self.folder} holds an unfinished run that differs in {fields}: repeat that command to go on with it, "
                "start anew with --no-resume, or choose another folder with --job-folder"
            )

    def _manifests(self) -> Iterator[_Manifest]:
        """Yield what can be read of CURRENT and PREVIOUS, the newest first."""
        for name in (CURRENT, PREVIOUS):
            path = self.folder / name
            try:
                yield _Manifest.decode(path.read_bytes())
            except FileNotFoundError:
                continue
            except (OSError, ValueError, KeyError) as error:
                logger.warning("job state %s is damaged (%s), the one before is used", path, error)

    def _object(self, digest: str) -> Path:
        return self.folder / OBJECTS / f"{digest}.safetensors"

    def load(self) -> State | None:
        """Return the newest state that is whole, or None for a new job.

        Every byte of it is checked against its SHA-256; a damaged state is skipped with a warning, and InputError is
        raised when none is left.
        """
        damaged = False
        for manifest in self._manifests():
            if manifest.n_steps == 0:
                return None
            try:
                return State(manifest.n_steps, {name: self._read(digest) for name, digest in manifest.parts.items()}, manifest.facts)
            except (InputError, OSError) as error:
                damaged = True
                logger.warning("job state of step %d in %s is damaged (%s), the one before is used", manifest.n_steps, self.folder, error)
        if damaged:
            raise InputError(f"job folder {self.folder} is damaged: got no state that is whole. Start anew with --no-resume")
        return None

    def _read(self, digest: str) -> dict[str, NDArray[Any]]:
        path = self._object(digest)
        if not path.is_file() or file_sha256(path) != digest:
            raise InputError(f"checksum of {path}: got another one, expected that of its name. Start anew with --no-resume")
        return {name: read_array(stored) for name, stored in read_safetensors(path)[1].items()}

    def save(self, state: State) -> None:
        """Make `state` the one that the job goes on from, durably. Raises OutputError when it cannot be written."""
        with _explained(self.folder):
            parts = {name: self._store(arrays) for name, arrays in sorted(state.parts.items())}
            flush_folder(self.folder / OBJECTS)
            self._publish(_Manifest(self.fingerprint, state.n_steps, parts, state.facts).encode())
            self._collect_garbage()

    def _store(self, arrays: Arrays) -> str:
        """Write arrays as an object, unless it is there, and return its SHA-256."""
        digest, temporary = hashlib.sha256(), self.folder / OBJECTS / "writing.tmp"

        def write(piece: memoryview) -> None:
            digest.update(piece)
            stream.write(piece)

        with temporary.open("wb") as stream:
            write_safetensors(write, arrays)
            _flush(stream)
        temporary.replace(self._object(digest.hexdigest()))
        return digest.hexdigest()

    def _publish(self, manifest: bytes) -> None:
        temporary, current = self.folder / TEMPORARY, self.folder / CURRENT
        with temporary.open("wb") as stream:
            stream.write(manifest)
            _flush(stream)
        if current.exists():
            current.replace(self.folder / PREVIOUS)  # killed right here, the job goes on from PREVIOUS
        temporary.replace(current)
        flush_folder(self.folder)

    def _collect_garbage(self) -> None:
        kept = {self._object(digest) for manifest in self._manifests() for digest in manifest.parts.values()}
        for path in (self.folder / OBJECTS).iterdir():
            if path not in kept:
                path.unlink()

    def stop_if_asked(self, done: str) -> None:
        """Raise Interrupted when the user has asked to stop; `done` says how far the job is. Call it after `save`."""
        if self.should_stop:
            raise Interrupted(f"interrupted after {done}; saved in {self.folder}. Run the same command again to go on")

    def begin_publishing(self) -> None:
        """Take down that this job's files get their names now: when it is killed before `finish`, those that have one are its own."""
        with _explained(self.folder):
            (self.folder / PUBLISHING).touch()
            flush_folder(self.folder)

    def finish(self) -> None:
        """Let the folder go when the context ends, unless it is to be kept: the result is published. Call it last."""
        if not self.keep:
            self.clear()
        with _explained(self.folder):
            (self.folder / PUBLISHING).unlink(missing_ok=True)

    def clear(self) -> None:
        """Forget the state and everything that was kept for it."""
        with _explained(self.folder):
            for name in (PREVIOUS, CURRENT, TEMPORARY):  # in this order: what is cut short leaves the newest, or none
                (self.folder / name).unlink(missing_ok=True)
            for name in (OBJECTS, WORK, SHARDS):
                shutil.rmtree(self.folder / name, ignore_errors=True)
            (self.folder / OBJECTS).mkdir()


def _refuse_foreign(folder: Path, own: Collection[str]) -> None:
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"job folder {folder} is a file: choose another folder with --job-folder")
    foreign = {path.name for path in folder.iterdir()}.difference(own) if folder.exists() else set()
    if foreign:
        raise UsageError(f"job folder {folder} has other content ({min(foreign)}): choose another folder with --job-folder")


def job_folder(output: Path) -> Path:
    """Return where a command that makes `output` keeps its unfinished work, where nothing else is said."""
    return output.with_name(output.name.removesuffix(".gguf") + ".loopgguf-job")


@contextlib.contextmanager
def open_stage(folder: Path, stage: str, fingerprint: Mapping[str, object], *, resume: bool = True, keep: bool = False) -> Iterator[Job]:
    """Open the job of one stage (of `STAGES`) of what a command does, a folder of its own in the command's job folder, which
    goes when nothing is left in it. Raises as `Job`."""
    _refuse_foreign(folder, STAGES)
    try:
        with Job(folder / stage, fingerprint, resume=resume, keep=keep) as job:
            yield job
    finally:
        with contextlib.suppress(OSError):  # another stage's work is in it
            folder.rmdir()


def drop_stage(folder: Path, stage: str) -> None:
    """Remove a stage that other stages have made use of, when all of them are finished."""
    if (folder / stage).exists():
        with open_stage(folder, stage, {}, resume=False) as job:
            job.clear()


def _has_state(folder: Path) -> bool:
    return any((folder / name).exists() for name in (CURRENT, PREVIOUS))


def was_publishing(folder: Path, stage: str) -> bool:
    """Tell whether a job was killed while its files got their names: what lies there is to be replaced by the same."""
    return (folder / stage / PUBLISHING).exists() and _has_state(folder / stage)


def sweep(folder: Path) -> None:
    """Remove from a command's job folder what is left of jobs that were finished, and killed before they were gone."""
    for stage in (folder / name for name in STAGES):
        if (stage / LOCK).exists() and not _has_state(stage):
            with contextlib.suppress(UsageError), Job(stage, {}):  # else it has just begun
                pass
    with contextlib.suppress(OSError):
        folder.rmdir()


def _short(value: object) -> str:
    text = "nothing" if value is None else str(value)
    return text if len(text) <= 40 else text[:39] + "…"


# --- steps --------------------------------------------------------------------------------------------------------------


class Resumable(Protocol):
    """Something that sums up and can be put back: see the module's text."""

    def state(self) -> Arrays: ...
    def restore(self, arrays: Arrays) -> None: ...


class Steps:
    """What an engine tells of its progress: keeps the job's state together with that of the accumulators, by their names.

    A step is saved when `min_seconds` have passed since the last save, and always the last one and when the user asks
    to stop; 0: every step.
    """

    def __init__(self, job: Job, accumulators: Mapping[str, Resumable], *, unit: str = "step", min_seconds: float = 0.0) -> None:
        assert ENGINE not in accumulators
        self._job, self._accumulators, self._unit, self._min_seconds = job, accumulators, unit, min_seconds
        self._saved = time.monotonic()

    def begin(self, keep: Callable[[str], bool] | None = None) -> State | None:
        """Return the state to go on from, with the accumulators put back; None: from the start.

        keep: which of an accumulator's arrays are put back, by name; default all. Raises InputError for a job folder
        whose states are all damaged.
        """
        state = self._job.load()
        if state is None:
            return None
        for name, accumulator in self._accumulators.items():
            accumulator.restore({label: array for label, array in state.parts[name].items() if keep is None or keep(label)})
        logger.info("going on after %s %d", self._unit, state.n_steps)
        return state

    def finished(self, n_steps: int, n_total: int, arrays: Arrays | Callable[[], Arrays] | None = None, *, may_stop: bool = True) -> None:
        """Take down that `n_steps` of `n_total` steps are finished, with the engine's own arrays (or what makes them).

        may_stop: raise Interrupted, after saving, when the user has asked to stop.
        """
        due = time.monotonic() - self._saved >= self._min_seconds
        if due or n_steps == n_total or self._job.should_stop:
            parts = {name: accumulator.state() for name, accumulator in self._accumulators.items()}
            self._job.save(State(n_steps, {**parts, ENGINE: (arrays() if callable(arrays) else arrays) or {}}))
            self._saved = time.monotonic()
        if may_stop:
            self._job.stop_if_asked(f"{self._unit} {n_steps} of {n_total}")
