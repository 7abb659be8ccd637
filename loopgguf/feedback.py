"""Error feedback for a whole model: collects the curvature of every weight and says what each encoder is told.

One pass forwards and backwards over the calibration text (`layerwise.collect_gradients`); a tenth of its chunks is held
out and judges. The weight of a linear is encoded under the mix of H and H_w and judged by H_w on held-out tokens; the
token embeddings, whose input is one-hot, by G0, the covariance of the gradient at their output. Encodes nothing itself
(see `compensate.py` and `pipeline.py`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from loopgguf.accumulators import EMBEDDING, HoldoutSplit, split_holdout
from loopgguf.architectures import input_group
from loopgguf.calibration import Chunks
from loopgguf.compensate import FAST, FULL, Effort, LossCurvature, Matrix
from loopgguf.curvature import Gram, GramStatistics, GramSums, gram_bytes, gram_shapes
from loopgguf.errors import UsageError
from loopgguf.formats import QUANTIZED_TYPES
from loopgguf.layerwise import collect_gradients
from loopgguf.loss import PassResult
from loopgguf.planner import PlanRow
from loopgguf.progress import Progress
from loopgguf.source import Source

SEED = 0  # of the held-out chunks and of the labels
MIN_TOKENS_PER_COLUMN = 8  # below it a covariance is noise: the plain encoder's bytes stay


class Compensate(StrEnum):
    """How hard error feedback tries: not at all, around the encoder, or down to single codes with the best damping for each tensor."""

    OFF = "off"
    FAST = "fast"
    FULL = "full"


_EFFORTS = {Compensate.FAST: FAST, Compensate.FULL: FULL}


@dataclass(frozen=True)
class Feedback:
    """What the encoders are told: the Gram matrices of a model, how hard to try, and the pass that found them."""

    grams: GramStatistics
    effort: Effort
    run: PassResult

    def curvature(self, row: PlanRow, *, is_tied: bool) -> Callable[[], LossCurvature] | None:
        """Return what gives the curvature of a tensor that may be encoded with feedback; None for the plain encoder.

        A tied embedding is the head too, which G0 says nothing of, and a stack of experts has no matrices yet.
        """
        is_encoded = row.uses_imatrix or (row.name == EMBEDDING and not is_tied and row.is_encoded and row.type in QUANTIZED_TYPES)
        if not is_encoded or len(row.shape) != 2 or not _is_known(self.grams, row.name):
            return None
        return lambda: loss_curvature(self.grams, row.name)


def refuse_without_gradients(source: Source) -> None:
    """Raise UsageError for a source that has no backward pass: every one but a checkpoint folder."""
    if not source.is_checkpoint:
        raise UsageError("--compensate needs gradients, which only a checkpoint folder gives: give the folder instead of the GGUF, or --compensate off")


def _refuse_too_large(n_bytes: int) -> None:
    """Raise UsageError when the Gram matrices, which are all kept in memory, do not fit in three quarters of it."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if n_bytes > 0.75 * total:
        raise UsageError(
            f"--compensate keeps {n_bytes:,} bytes of matrices in memory for this model, the machine has {total:,}: use a larger one, or leave it out"
        )


def collect_feedback(
    source: Source, chunks: Chunks, compensate: Compensate, *, n_threads: int, device: str = "cpu", progress: Progress | None = None
) -> Feedback:
    """Run the calibration chunks through a checkpoint and back, and keep its Gram matrices in memory.

    Raises UsageError for a GGUF source; else as `layerwise.collect_gradients`.
    """
    refuse_without_gradients(source)
    shapes = gram_shapes({tensor.name: tensor.shape for tensor in source.tensors}, has_gradient=True)
    _refuse_too_large(2 * gram_bytes(shapes, has_gradient=True))
    _, holdout = split_holdout(chunks.n_chunks, SEED)
    train, held_out = GramSums(), GramSums()
    split = HoldoutSplit([train], [held_out], frozenset(int(i) for i in holdout))
    run = collect_gradients(
        source.path, chunks.tokens, [], n_threads=n_threads, label_seed=SEED, split=split, documents=chunks.documents, device=device, progress=progress
    )
    grams = GramStatistics(train.take(), held_out.take(), tuple(sorted(split.chunks)), SEED, SEED, chunks.fingerprint)
    return Feedback(grams, _EFFORTS[compensate], run)


def _is_known(grams: GramStatistics, name: str) -> bool:
    """Tell whether enough tokens were seen of a weight, in both sets; of a head or of experts none are."""
    what, key = ("outputs", name) if name == EMBEDDING else ("inputs", (input_group(name) or name, None))
    gram, held_out = getattr(grams.train, what).get(key), getattr(grams.holdout, what).get(key)
    return gram is not None and held_out is not None and held_out.n_tokens > 0 and gram.n_tokens >= MIN_TOKENS_PER_COLUMN * len(gram.total)


def loss_curvature(grams: GramStatistics, name: str) -> LossCurvature:
    """Return what an error in a known weight costs."""
    train, holdout = grams.train, grams.holdout
    if name == EMBEDDING:
        return LossCurvature(H=_mean(train.outputs[name]), held_out=_mean(holdout.outputs[name]))
    r = train.curvature[name].mean.astype(np.float64)
    has_rows = name in train.outputs
    return LossCurvature(
        H=_mean(train.inputs[input_group(name) or name, None]),
        held_out=_mean(holdout.weighted[name]),
        H_w=_mean(train.weighted[name]),
        H_O=_mean(train.outputs[name]) if has_rows else None,
        held_out_O=_mean(holdout.outputs[name]) if has_rows else None,
        row_curvature=r / max(float(r.mean()), 1e-30),
    )


def _mean(gram: Gram) -> Matrix:
    return gram.mean.astype(np.float64)
