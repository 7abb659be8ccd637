"""How the inputs of linears drift while a model is quantized, and the weights that make up for it. Arrays only.

When a layer is encoded those before it have been already: where the model has an input x, the file so far has x̃. Of all
weights, those nearest to W x on x̃ in the mean square are W + W C H̃⁻¹, with C = E[(x − x̃) x̃ᵀ] and H̃ = E[x̃ x̃ᵀ] (the
asymmetric term of GPTAQ, arXiv 2504.02692, and Qronos, arXiv 2505.11695). Error feedback then aims at a point on the way
to them: the whole way made a real model worse, though each layer's outputs came nearer (tools/EXPERIMENTS.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

FloatArray = NDArray[np.float32]

MIN_TOKENS_PER_COLUMN = 8  # below which weights stay: 4 brought a real model nothing, 8 and 16 did
STEP = 0.5  # of the way to the weights that a drift asks for: 0.25 measured alike, 1 worse than 0
DAMPING = 0.1  # of the mean diagonal of H̃, added before it is inverted
_SLAB_ROWS = 256  # of weights that are aimed anew at once: bounds the memory


def are_enough(n_tokens: int, columns: slice) -> bool:
    """Tell whether a drift of so many columns is known from n_tokens."""
    return bool(n_tokens >= MIN_TOKENS_PER_COLUMN * (columns.stop - columns.start))


@dataclass(frozen=True)
class Moments:
    """Of a block of columns: `second` = E[x̃ x̃ᵀ] and `cross` = E[(x − x̃) x̃ᵀ], both (n, n) float32, over n_tokens."""

    columns: slice
    second: FloatArray
    cross: FloatArray
    n_tokens: int


@dataclass(frozen=True)
class Drift:
    """The moments of an input on tokens for use, and on tokens held out, by block of columns."""

    train: Sequence[Moments]
    holdout: Sequence[Moments]

    def aim(self, W: FloatArray) -> FloatArray:
        """Return the weights (n_out, n_in) float32 to aim at: moved towards those that make up for the drift, in each block of
        columns where that brings the outputs nearer to the model's on held-out tokens too; W itself where it does so in none."""
        target = W
        for train, held_out in zip(self.train, self.holdout, strict=True):
            if not are_enough(train.n_tokens, train.columns):
                continue
            step = _step(W[:, train.columns], train)
            if _is_better(W[:, train.columns], step, held_out):
                target = W.copy() if target is W else target
                target[:, train.columns] += step
        return target


def _step(W: FloatArray, moments: Moments) -> FloatArray:
    """Return STEP · W C (H̃ + λI)⁻¹, (n_out, n)."""
    second = np.array(moments.second, np.float64, order="F")  # which LAPACK factorizes in place
    second[np.diag_indices(len(second))] += DAMPING * (np.trace(second) / len(second) or 1.0)
    factor = linalg.cho_factor(second, lower=True, overwrite_a=True, check_finite=False)
    result = np.empty_like(W)
    for start in range(0, len(W), _SLAB_ROWS):
        rows = slice(start, start + _SLAB_ROWS)
        result[rows] = STEP * linalg.cho_solve(factor, (W[rows] @ moments.cross).T.astype(np.float64), check_finite=False).T
    return result


def _is_better(W: FloatArray, step: FloatArray, held_out: Moments) -> bool:
    """Tell whether E|W x − (W + D) x̃|² is less than E|W x − W x̃|²: tr(D H̃ Dᵀ) < 2 tr(W C Dᵀ)."""
    gain = 0.0
    for start in range(0, len(W), _SLAB_ROWS):
        rows = slice(start, start + _SLAB_ROWS)
        gain += float(np.einsum("ij,ij->", 2 * (W[rows] @ held_out.cross) - step[rows] @ held_out.second, step[rows], dtype=np.float64))
    return gain > 0
