"""A calibration pass as a job: which engine runs, what is saved after each step, and how it goes on after a kill.

Brings together the engines of `activations.py`, the accumulators, the job folder of `checkpoint.py` and the Gram matrices'
shards of `grams.py`. Decides no statistics and publishes nothing. What can be gone on with: the llama.cpp engine after
each chunk that was saved; the torch engine after each decoder layer, with Gram matrices and gradients too. Two things
start anew, each as one step: Gram matrices from a GGUF, and gradients of a model that fits into memory whole.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from loopgguf.accumulators import EMBEDDING, Accumulator
from loopgguf.activations import (
    SCORE_EVERY,
    collect_from_checkpoint,
    collect_from_gguf,
    collect_grams_from_checkpoint,
    collect_grams_from_gguf,
    gguf_passes,
)
from loopgguf.architectures import tensor_role
from loopgguf.checkpoint import ENGINE, Job, Resumable, Steps
from loopgguf.curvature import GramSet
from loopgguf.errors import InputError
from loopgguf.grams import GramWriter
from loopgguf.hidden_states import finished_layers
from loopgguf.layerwise import DEFAULT_MAX_MEMORY_BYTES, plan_gradient_pass
from loopgguf.loss import PassResult
from loopgguf.progress import Progress

TokenArray = NDArray[np.int32]

SAVE_SECONDS = 10.0  # between two saves of the llama.cpp engine, whose chunks may take milliseconds


class Collector(Accumulator, Resumable, Protocol):
    """An accumulator whose sums can be saved and put back."""


@dataclass(frozen=True)
class Pass:
    """How to run: nothing here but device and documents changes what is collected.

    documents: (n_chunks, n_ctx) numbers those of each chunk, attention stays inside them.
    """

    n_threads: int
    process_output: bool = False
    device: str = "cpu"
    max_memory_bytes: int = DEFAULT_MAX_MEMORY_BYTES
    documents: TokenArray | None = None
    progress: Progress | None = None


@dataclass(frozen=True)
class GramRequest:
    """Which Gram matrices: the numbers of the chunks held out, and with label_seed those of the gradients too."""

    holdout: Sequence[int]
    label_seed: int | None = None


@dataclass(frozen=True)
class GramCost:
    """What a pass with Gram matrices takes besides the matrices: bytes of hidden states in the job folder at their most, and
    how often the text is run, in words."""

    hidden_bytes: int
    passes: str


def plan_grams(path: Path, n_chunks: int, n_ctx: int, shapes: Mapping[str, Sequence[int]], how: Pass, *, has_gradient: bool) -> GramCost:
    """Return the cost of Gram matrices of a GGUF or a checkpoint folder; shapes: of all its weights."""
    if not path.is_dir():
        n_passes = len(gguf_passes(shapes, how.max_memory_bytes))
        return GramCost(
            0, "one pass over the text" if n_passes == 1 else f"{n_passes} passes over the text, as memory does not hold the matrices of all layers"
        )
    if not has_gradient:
        return GramCost(2 * 4 * n_chunks * n_ctx * shapes[EMBEDDING][-1], "one pass over the text")
    plan = plan_gradient_pass(path, n_chunks, n_ctx, max_memory_bytes=how.max_memory_bytes)
    if plan.is_whole:
        return GramCost(0, "one pass over the text, forward and back")
    return GramCost(plan.stored_bytes, f"one pass over the text forward, then one forward and back in {len(plan.blocks)} blocks of layers")


# --- llama.cpp ----------------------------------------------------------------------------------------------------------


def run_gguf(path: Path, chunks: TokenArray, collectors: Mapping[str, Collector], job: Job, how: Pass, *, save_seconds: float = SAVE_SECONDS) -> PassResult:
    """Return the perplexity of running chunks through a GGUF; the collectors have then seen all of them, in this run or before.

    Raises Interrupted when asked to stop, after the chunk that runs; other errors as `collect_from_gguf`.
    """
    steps = Steps(job, collectors, unit="chunk", min_seconds=save_seconds)
    begun = steps.begin()
    losses: list[NDArray[np.float64]] = [] if begun is None else list(begun.parts[ENGINE]["losses"])

    def on_chunk(number: int) -> None:
        steps.finished(number + 1, len(chunks), lambda: {"losses": np.stack(losses)})

    return collect_from_gguf(
        path,
        chunks,
        list(collectors.values()),
        n_threads=how.n_threads,
        documents=how.documents,
        process_output=how.process_output,
        progress=how.progress,
        losses=losses,
        on_chunk=on_chunk,
        score_every=SCORE_EVERY,
    )


def run_gguf_grams(
    path: Path,
    chunks: TokenArray,
    collectors: Mapping[str, Collector],
    job: Job,
    how: Pass,
    grams: GramRequest,
    writer: GramWriter,
    shapes: Mapping[str, Sequence[int]],
) -> PassResult:
    """Return the perplexity, after writing H of every layer; shapes: of the model's weights. Starts anew after a stop."""
    return collect_grams_from_gguf(
        path,
        chunks,
        list(collectors.values()),
        sink=writer,
        holdout=grams.holdout,
        shapes=shapes,
        n_threads=how.n_threads,
        documents=how.documents,
        max_memory_bytes=how.max_memory_bytes,
        progress=_stop_at_once(job, how.progress),
        process_output=how.process_output,
    )


# --- torch --------------------------------------------------------------------------------------------------------------


def run_checkpoint(
    folder: Path,
    chunks: TokenArray,
    collectors: Mapping[str, Collector],
    job: Job,
    how: Pass,
    grams: GramRequest | None = None,
    writer: GramWriter | None = None,
) -> PassResult:
    """Return the perplexity of running chunks through a checkpoint folder, with Gram matrices given to `writer` if asked for.

    The collectors have then seen all layers, in this run or before. Raises Interrupted when asked to stop, after the
    layer (with gradients: the block of layers) that runs; other errors as `collect_from_checkpoint`.
    """
    assert (grams is None) == (writer is None)
    has_gradient = grams is not None and grams.label_seed is not None
    if has_gradient and plan_gradient_pass(folder, *chunks.shape, max_memory_bytes=how.max_memory_bytes).is_whole:
        return _run_grams(folder, chunks, collectors, how, grams, writer, _stop_at_once(job, how.progress), None)
    steps = Steps(job, collectors, unit="layer")
    finished = set(finished_layers(job.work))
    _restore(steps, job, collectors, finished)
    if writer is not None:
        writer.require(sorted(finished))

    def on_layer(layer: int) -> None:
        finished.add(layer)
        steps.finished(len(finished), 0, may_stop=False)  # the engine ends the step after this, by publishing its states

    progress = stop_between_steps(job, how.progress, lambda: f"{len(finished)} layers")
    if grams is not None:
        return _run_grams(folder, chunks, collectors, how, grams, writer, progress, job.work, on_layer)
    return collect_from_checkpoint(
        folder,
        chunks,
        list(collectors.values()),
        n_threads=how.n_threads,
        documents=how.documents,
        device=how.device,
        progress=progress,
        process_output=how.process_output,
        max_memory_bytes=how.max_memory_bytes,
        on_layer=on_layer,
        work=job.work,
    )


def _run_grams(
    folder: Path,
    chunks: TokenArray,
    collectors: Mapping[str, Collector],
    how: Pass,
    grams: GramRequest | None,
    writer: GramWriter | None,
    progress: Progress,
    work: Path | None,
    on_layer: Callable[[int], None] | None = None,
) -> PassResult:
    assert grams is not None and writer is not None

    def sink(layer: int | None, train: GramSet, holdout: GramSet) -> None:
        writer(layer, train, holdout)
        if layer is not None and on_layer is not None:
            on_layer(layer)

    return collect_grams_from_checkpoint(
        folder,
        chunks,
        list(collectors.values()),
        sink=sink,
        holdout=grams.holdout,
        label_seed=grams.label_seed,
        n_threads=how.n_threads,
        documents=how.documents,
        device=how.device,
        max_memory_bytes=how.max_memory_bytes,
        progress=progress,
        process_output=how.process_output,
        work=work,
    )


def _layer_of(label: str) -> int | None:
    """Return the layer of an accumulator's array: `squares/0/blk.3.attn_q.weight` and `mass//3` → 3."""
    name = label.split("/", 2)[2]
    return int(name) if name.isdigit() else tensor_role(name).layer


def _restore(steps: Steps, job: Job, collectors: Mapping[str, Collector], finished: set[int]) -> None:
    """Put back what the collectors saw of the finished layers, and of no other: those run again."""
    steps.begin(keep=lambda label: _layer_of(label) in finished)
    for name, collector in collectors.items():
        missing = finished - {layer for label in collector.state() if (layer := _layer_of(label)) is not None}
        if missing:
            raise InputError(f"job folder {job.folder} is damaged: got no {name} of layer {min(missing)}, which is finished. Start anew with --no-resume")


# --- stopping -----------------------------------------------------------------------------------------------------------


def _stop_at_once(job: Job, progress: Progress | None) -> Progress:
    """Return a progress callback that ends a pass which is one single step, when the user has asked to stop."""
    return job.stopping(progress, lambda *_: "interrupted: this pass is one step and nothing of it is kept. Run the same command again to start anew")


def stop_between_steps(job: Job, progress: Progress | None, describe: Callable[[], str]) -> Progress:
    """Return a progress callback that ends a pass, when the user has asked to stop, as soon as the engine has published a step
    in the job's `work` folder. describe: says how far the job is."""
    before: set[str] = set()

    def wrapped(phase: str, done: int, total: int) -> None:
        nonlocal before
        if progress is not None:
            progress(phase, done, total)
        published = {path.name for path in job.work.iterdir() if path.suffix != ".part"}
        if job.should_stop and published != before:
            job.stop_if_asked(describe())
        elif not job.should_stop:
            before = published

    return wrapped
