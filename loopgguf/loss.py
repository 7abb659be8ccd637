"""The loss of a calibration pass: which tokens are scored, −ln p of each, and the perplexity they come to.

Scored is the second half of every chunk, as llama-imatrix does it, and no document foretells the next. Arrays only.
Source: tools/imatrix/imatrix.cpp (`compute_imatrix`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopgguf.errors import InputError

FloatArray = NDArray[np.float32]

MAX_NATS = 700.0  # beyond it exp overflows
_LOGIT_SLAB = 16  # rows of logits worked on at a time: they stay in the cache


@dataclass(frozen=True)
class PassResult:
    """Perplexity of a calibration pass with its standard error, as llama-imatrix prints it, over `n_tokens` scored tokens."""

    perplexity: float
    standard_error: float
    n_tokens: int


def first_scored(n_ctx: int) -> int:
    """Return the first position of a chunk whose prediction is scored (imatrix.cpp: the second half, with context)."""
    return n_ctx // 2


def scored_targets(chunks: NDArray[np.int32], documents: NDArray[np.int32] | None) -> NDArray[np.bool_]:
    """Return which targets count, of the tokens after the first scored position, (n_chunks, n): no document foretells the next."""
    documents = np.zeros_like(chunks) if documents is None else documents
    first = first_scored(chunks.shape[1])
    same: NDArray[np.bool_] = documents[:, first + 1 :] == documents[:, first:-1]
    return same


def score_tokens(logits: FloatArray, targets: NDArray[np.int32], *, precision: type[np.floating[Any]] = np.float64) -> NDArray[np.float64]:
    """Return −ln p of each target (n_tokens,) under logits (n_tokens, n_vocab), in nats, float64.

    precision: of the exponentials; float32 is several times faster and good to 1e-6 nats or so.
    """
    nll = np.empty(len(targets))
    room = np.empty((min(_LOGIT_SLAB, len(targets)), logits.shape[1]), precision)
    for start in range(0, len(targets), _LOGIT_SLAB):
        slab = logits[start : start + _LOGIT_SLAB]
        shifted = np.subtract(slab, slab.max(axis=1, keepdims=True), out=room[: len(slab)], dtype=precision)
        at_target = shifted[np.arange(len(slab)), targets[start : start + _LOGIT_SLAB]].astype(np.float64)
        nll[start : start + _LOGIT_SLAB] = np.log(np.exp(shifted, out=shifted).sum(axis=1).astype(np.float64)) - at_target
    return nll


def summarize_pass(nll: NDArray[np.float64]) -> PassResult:
    """Return the perplexity of token losses in nats; raises InputError when they are not finite."""
    if not np.isfinite(nll).all():
        raise InputError("logits of the calibration pass: got NaN or infinity, expected finite numbers. The weights are damaged")
    perplexity = math.exp(min(float(nll.mean()), MAX_NATS))
    standard_error = perplexity * math.sqrt(float(nll.var()) / max(len(nll) - 1, 1))
    return PassResult(perplexity, standard_error, len(nll))
