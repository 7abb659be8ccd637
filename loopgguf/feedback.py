"""Error feedback for a whole model: collects the curvature of every weight and says what each encoder is told.

One pass forwards and backwards over the calibration text (`layerwise.collect_gradients`); a tenth of its chunks is held
out and judges. The weight of a linear is encoded under the mix of H and H_w and judged by H_w on held-out tokens; the
token embeddings, whose input is one-hot, by G0, the covariance of the gradient at their output. Encodes nothing itself
(see `compensate.py` and `pipeline.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from loopgguf.accumulators import EMBEDDING, GramSet, GramStatistics, GramSums, HoldoutSplit, PassResult, split_holdout
from loopgguf.architectures import input_group
from loopgguf.calibration import Chunks
from loopgguf.compensate import FAST, FULL, Damping, LossCurvature, Matrix
from loopgguf.errors import UsageError
from loopgguf.formats import QUANTIZED_TYPES
from loopgguf.layerwise import collect_gradients
from loopgguf.planner import PlanRow
from loopgguf.source import Source

Progress = Callable[[str, int, int], None]

SEED = 0  # of the held-out chunks and of the labels
MIN_TOKENS_PER_COLUMN = 8  # below it a covariance is noise: the plain encoder's bytes stay


class Compensate(StrEnum):
    """How hard error feedback tries: not at all, one damping for all tensors, or the best of several for each."""

    OFF = "off"
    FAST = "fast"
    FULL = "full"


_DAMPINGS: dict[Compensate, tuple[Damping, ...]] = {Compensate.FAST: FAST, Compensate.FULL: FULL}


@dataclass(frozen=True)
class Feedback:
    """What the encoders are told: the Gram matrices of a model, the dampings to try, and the pass that found them."""

    grams: GramStatistics
    dampings: tuple[Damping, ...]
    run: PassResult

    def curvature(self, row: PlanRow, *, is_tied: bool) -> Callable[[], LossCurvature | None] | None:
        """Return what gives the curvature of a tensor that may be encoded with feedback; None for the plain encoder.

        A tied embedding is the head too, which G0 says nothing of, and a stack of experts has no matrices yet.
        """
        is_encoded = row.uses_imatrix or (row.name == EMBEDDING and not is_tied and row.is_encoded and row.type in QUANTIZED_TYPES)
        if not is_encoded or len(row.shape) != 2:
            return None
        return lambda: loss_curvature(self.grams, row.name)


def refuse_without_gradients(source: Source) -> None:
    """Raise UsageError for a source that has no backward pass: every one but a checkpoint folder."""
    if not source.is_checkpoint:
        raise UsageError("--compensate needs gradients, which only a checkpoint folder gives: give the folder instead of the GGUF, or --compensate off")


def collect_feedback(source: Source, chunks: Chunks, compensate: Compensate, *, n_threads: int, progress: Progress | None = None) -> Feedback:
    """Run the calibration chunks through a checkpoint and back, and keep its Gram matrices in memory.

    Raises UsageError for a GGUF source; else as `layerwise.collect_gradients`.
    """
    refuse_without_gradients(source)
    _, holdout = split_holdout(chunks.n_chunks, SEED)
    train, held_out = GramSums(), GramSums()
    split = HoldoutSplit([train], [held_out], frozenset(int(i) for i in holdout))
    run = collect_gradients(source.path, chunks.tokens, [], n_threads=n_threads, label_seed=SEED, split=split, progress=progress)
    grams = GramStatistics(train.take(), held_out.take(), tuple(sorted(split.chunks)), SEED, SEED, chunks.fingerprint)
    return Feedback(grams, _DAMPINGS[compensate], run)


def _mean(grams: GramSet, what: str, key: object) -> Matrix | None:
    gram = getattr(grams, what).get(key)
    return None if gram is None or gram.n_tokens == 0 else gram.mean.astype(np.float64)


def loss_curvature(grams: GramStatistics, name: str) -> LossCurvature | None:
    """Return what an error in weight `name` costs; None where too little was seen of it, or nothing (a head, experts)."""
    if name == EMBEDDING:
        return _embedding_curvature(grams)
    key = (input_group(name) or name, None)
    H, H_w = _mean(grams.train, "inputs", key), _mean(grams.train, "weighted", name)
    held_out = _mean(grams.holdout, "weighted", name)
    if H is None or H_w is None or held_out is None or grams.train.inputs[key].n_tokens < MIN_TOKENS_PER_COLUMN * len(H):
        return None
    r = grams.train.curvature[name].mean.astype(np.float64)
    return LossCurvature(
        H=H,
        held_out=held_out,
        H_w=H_w,
        H_O=_mean(grams.train, "outputs", name),
        held_out_O=_mean(grams.holdout, "outputs", name),
        row_curvature=r / max(float(r.mean()), 1e-30),
    )


def _embedding_curvature(grams: GramStatistics) -> LossCurvature | None:
    G0, held_out = _mean(grams.train, "outputs", EMBEDDING), _mean(grams.holdout, "outputs", EMBEDDING)
    if G0 is None or held_out is None or grams.train.outputs[EMBEDDING].n_tokens < MIN_TOKENS_PER_COLUMN * len(G0):
        return None
    return LossCurvature(H=G0, held_out=held_out)
