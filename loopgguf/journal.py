"""Which tensors of a file that is being written are finished, so that a run that was stopped goes on after them.

The bytes lie in the part files, which outlive the run; the journal is the state of a job: of each finished tensor the log and
the SHA-256 of its bytes. A tensor is named only after its bytes are flushed, and its bytes are read again and compared before
it is believed, so a kill at any moment, a lost write or a damaged part costs the tensors that it hit and no others.
Encodes nothing and publishes nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from loopgguf.checkpoint import Job, State, file_sha256
from loopgguf.collection import stop_between_steps
from loopgguf.compensate import Damping
from loopgguf.container import Layout, PartFile, TensorInfo, part_path
from loopgguf.manifest import manifest_path
from loopgguf.pipeline import FeedbackLog, SampledError, TensorLog
from loopgguf.progress import Progress
from loopgguf.super_weights import MaskLog

logger = logging.getLogger(__name__)

Parts = Sequence[tuple[PartFile, Layout]]

SAVE_SECONDS = 5.0  # between two saves, at least
MAX_SHARE = 0.05  # of the time, which saves may take on a slow disk

_TENSORS, _VERIFIED, _PUBLISHED = "tensors", "verified", "published"


def _from_json(entries: Mapping[str, Any]) -> TensorLog:
    def feedback(values: Mapping[str, Any]) -> FeedbackLog:
        damping = None if values["damping"] is None else Damping(**values["damping"])
        return FeedbackLog(values["way"], values["held_out_ratio"], damping, values["is_aimed"])

    return TensorLog(
        sampled=None if entries["sampled"] is None else SampledError(**entries["sampled"]),
        n_floored=entries["n_floored"],
        feedback=tuple(map(feedback, entries["feedback"])),
        mask=None if entries["mask"] is None else MaskLog(**entries["mask"]),
        sha256=entries["sha256"],
    )


class Journal:
    """The finished tensors of part files, by name in `logs`: `finished` after each, `save` where nothing may be lost.

    state: where the job was left, or None. `logs` begins with the tensors that were finished then and lie whole in the parts;
    those that do not are warned of. `n_saved` of them outlive this run.
    """

    def __init__(self, job: Job, parts: Parts, state: State | None = None, *, n_threads: int = 1, min_seconds: float = SAVE_SECONDS) -> None:
        self.job, self.parts, self._min_seconds = job, parts, min_seconds
        self._n_tensors = sum(len(layout.tensors) for _, layout in parts)
        self.logs = {} if state is None else self._read_back(state, n_threads)
        self.n_saved = len(self.logs)
        self._due = time.monotonic() + min_seconds

    def _read_back(self, state: State, n_threads: int) -> dict[str, TensorLog]:
        if state.facts.get(_PUBLISHED):
            return {}
        kept = {name: _from_json(entries) for name, entries in _entries(state, _TENSORS).items()}
        places = [(part, info) for part, layout in self.parts for info in layout.tensors if info.name in kept]

        def is_whole(place: tuple[PartFile, TensorInfo]) -> bool:
            part, info = place
            return part.has_gone_on and part.sha256(info.offset, info.n_bytes) == kept[info.name].sha256

        with ThreadPoolExecutor(n_threads) as pool:
            whole = list(pool.map(is_whole, places))
        found = {info.name: kept[info.name] for (_, info), is_fine in zip(places, whole, strict=True) if is_fine}
        if found:
            logger.info("going on after %d of %d tensors", len(found), self._n_tensors)
        if len(found) < len(kept):
            names = ", ".join(str(part.path) for part, _ in self.parts)
            logger.warning("%d of %d finished tensors are gone or damaged in %s and are encoded again", len(kept) - len(found), len(kept), names)
        return found

    def finished(self, name: str, log: TensorLog) -> None:
        """Take down a finished tensor, and save when it is time to."""
        self.logs[name] = log
        if time.monotonic() >= self._due:
            self.save()

    @property
    def should_stop(self) -> bool:
        """Whether the user has asked to stop."""
        return self.job.should_stop

    def stop_if_asked(self) -> None:
        """Raise Interrupted, after saving, when the user has asked to stop."""
        if self.job.should_stop:
            self.save()
        self.job.stop_if_asked(self._describe())

    def save(self) -> None:
        """Make all finished tensors outlive this run, and the parts with them. Raises OutputError."""
        if len(self.logs) > self.n_saved:
            self._publish({})

    def verified(self, digests: Mapping[str, str]) -> None:
        """Take down that the parts are finished and checked and about to get their names; digests: SHA-256 by name of the output."""
        self._publish({_VERIFIED: dict(digests)})

    def _publish(self, facts: Mapping[str, object]) -> None:
        start = time.monotonic()
        for part, _ in self.parts:
            part.sync()
        self._save(facts)
        for part, _ in self.parts:
            part.is_kept = True
        now = time.monotonic()
        self._due = now + max(self._min_seconds, (now - start) / MAX_SHARE)

    def _save(self, facts: Mapping[str, object]) -> None:
        tensors = {name: asdict(log) for name, log in self.logs.items()}
        self.job.save(State(max(len(tensors), 1), facts={_TENSORS: tensors, **facts}))
        self.n_saved = len(self.logs)

    def stopping(self, progress: Progress | None, *, between_steps: bool) -> Progress:
        """Return a progress callback that ends a pass over text when the user has asked to stop: between two steps that are kept in
        the job folder, or at once, where it keeps none."""
        if between_steps:
            return stop_between_steps(self.job, progress, self._describe)

        def wrapped(phase: str, done: int, total: int) -> None:
            if progress is not None:
                progress(phase, done, total)
            self.stop_if_asked()

        return wrapped

    def _describe(self) -> str:
        return f"{len(self.logs)} of {self._n_tensors} tensors"

    def finish(self) -> None:
        """Let the job go: the parts have their names. What is kept of one that is to be kept says so, and no longer that they may be taken back."""
        if self.job.keep:
            self._save({_PUBLISHED: True})
        self.job.finish()

    def give_up(self) -> None:
        """Forget everything, so that neither parts nor job are left behind: going on would end in the same way."""
        self.job.clear()
        for part, _ in self.parts:
            part.is_kept = False


def take_back(state: State, targets: Sequence[Path]) -> None:
    """Make files parts again that an earlier run had given their names when it was killed: it goes on from there, with all of them."""
    verified = _entries(state, _VERIFIED)
    for target in targets:
        if target.name in verified and target.is_file() and not target.is_symlink() and file_sha256(target) == verified[target.name]:
            manifest_path(target).unlink(missing_ok=True)
            target.replace(part_path(target))


def _entries(state: State, name: str) -> Mapping[str, Any]:
    found = state.facts.get(name, {})
    assert isinstance(found, dict)
    return found
