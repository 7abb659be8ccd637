"""Error feedback around any encoder: what one block of weights loses, the weights after it make good. Arrays only.

The curvature of the loss in a linear y = W x is about H_O ⊗ H, with H = E[x xᵀ] over its inputs and H_O = E[g gᵀ] over
the gradients at its outputs. Given a block that is already encoded, the best change of what is still free follows from
the Cholesky factor of the inverse: along a row through H (GPTQ, arXiv 2210.17323; LDLQ, arXiv 2307.13304), from row to
row through H_O (YAQA, arXiv 2505.22988). The encoder is a black box that turns a block of columns into bytes and says
what they decode to, so every ggml type works, and the bytes are plain ggml blocks. Knows no files and no statistics.

The order of operations is fixed by the widths below, which belong to the format version: near-ties cascade, so another
width or another number of threads must not change the arithmetic of a block.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from loopgguf import ggml
from loopgguf.formats import FORMATS, GgmlType, row_bytes
from loopgguf.super_weights import Pins, encode_pinned_rows, pins_between

FloatArray = NDArray[np.float32]
Matrix = NDArray[np.float64]

COLUMN_BLOCK = 256  # columns encoded at once, a super-block; 32-wide types are fed back after each 32
ROW_BLOCK = 32  # rows encoded at once when errors are handed from row to row

Encode = Callable[[FloatArray, int], tuple[ggml.ByteArray, FloatArray]]
"""(rows (n, width) float32, first column) → the packed rows (n, bytes) and what they decode to, (n, width) float32."""


@dataclass(frozen=True)
class Damping:
    """How far a measured covariance is trusted: `amount` of its mean diagonal is added (λI), or it is shrunk by that
    part towards its own diagonal (`to_diagonal`), which leaves the importances as they are."""

    amount: float = 0.05
    to_diagonal: bool = False


def damped(H: Matrix, damping: Damping) -> Matrix:
    """Return H (n, n) made safe to invert; dead columns (zero diagonal) get the mean of the others."""
    diagonal = np.diag(H)
    mean = float(diagonal.mean()) or 1.0
    result = H * (1 - damping.amount) if damping.to_diagonal else H.copy()
    added = damping.amount * diagonal if damping.to_diagonal else np.full(len(H), damping.amount * mean)
    result[np.diag_indices(len(H))] += np.where(diagonal > 0, added, mean)
    return result


def feedback_factor(H: Matrix) -> Matrix:
    """Return U (n, n), upper triangular, with H⁻¹ = Uᵀ U, for a positive definite H.

    H = R Rᵀ with R upper (a Cholesky factor of the matrix read backwards), and U = R⁻¹: one triangular inversion
    instead of an inverse and a second factorization. Raises numpy.linalg.LinAlgError when H is not positive definite.
    """
    R = np.ascontiguousarray(linalg.cholesky(H[::-1, ::-1], lower=True)[::-1, ::-1])
    inverse, info = linalg.lapack.dtrtri(R, lower=0)
    assert info == 0, info
    return np.asarray(np.triu(inverse))


def _carry(U: Matrix, start: int, stop: int) -> Matrix:
    """Return the matrix (stop − start, n − stop) that turns a block's error into the change of what comes after it."""
    return np.asarray(linalg.solve_triangular(U[start:stop, start:stop], U[start:stop, stop:], lower=False))


def ggml_encoder(ggml_type: GgmlType, importance: FloatArray | None, pins: Pins | None = None, originals: FloatArray | None = None) -> Encode:
    """Return libggml's own encoder of a type, weighing column j by importance (n_in,)[j]; pinned weights keep their value in `originals`."""

    def encode(rows: FloatArray, first: int) -> tuple[ggml.ByteArray, FloatArray]:
        if not ggml.rows_are_encodable(rows):  # ggml would abort the process
            raise np.linalg.LinAlgError("feedback made the weights that are still to come too large to encode")
        weights = None if importance is None else np.ascontiguousarray(importance[first : first + rows.shape[1]])
        packed = ggml.encode_rows(ggml_type, np.ascontiguousarray(rows), weights)
        if pins and weights is not None:
            encode_pinned_rows(ggml_type, rows, weights, pins, packed, first, originals)
        return packed, ggml.decode_rows(ggml_type, packed)

    return encode


def block_width(ggml_type: GgmlType) -> int:
    """Return how many columns of this type are encoded before their error is fed back: one ggml block."""
    return FORMATS[ggml_type].block


class Columns:
    """Feedback along the rows: everything that depends on H and the width alone, computed once for many rows."""

    def __init__(self, H: Matrix, width: int) -> None:
        self.width, self.n_in = width, len(H)
        U = feedback_factor(H)
        self._carries = [_carry(U, start, min(start + width, self.n_in)).astype(np.float32) for start in range(0, self.n_in, width)]

    def encode(self, W: FloatArray, encode: Encode, out: ggml.ByteArray) -> FloatArray:
        """Encode W (n, n_in) block by block into `out` (n, row bytes); return what it decodes to, (n, n_in) float32."""
        target, decoded, position = W.astype(np.float32), np.empty_like(W), 0
        for start, carry in zip(range(0, self.n_in, self.width), self._carries, strict=True):
            stop = min(start + self.width, self.n_in)
            packed, decoded[:, start:stop] = encode(target[:, start:stop], start)
            out[:, position : position + packed.shape[1]] = packed
            position += packed.shape[1]
            target[:, stop:] += (decoded[:, start:stop] - target[:, start:stop]) @ carry
        return decoded


def compensate(
    W: FloatArray,
    ggml_type: GgmlType,
    H: Matrix,
    *,
    importance: FloatArray,
    H_O: Matrix | None = None,
    pins: Pins | None = None,
) -> tuple[ggml.ByteArray, FloatArray]:
    """Return W encoded with error feedback: packed rows (n_out, row bytes) uint8, and what they decode to, float32.

    W: (n_out, n_in) float32. H: (n_in, n_in), damped already (`damped`). importance: (n_in,) float32 > 0, for the
    encoder inside. H_O: (n_out, n_out), damped, to hand errors from row to row as well, in blocks of `ROW_BLOCK`; None
    leaves the rows to themselves. pins: weights that keep their value. Raises numpy.linalg.LinAlgError when a matrix is not positive definite.
    """
    n_out, n_in = W.shape
    columns, encode = Columns(H, block_width(ggml_type)), ggml_encoder(ggml_type, importance, pins, W)
    packed = np.empty((n_out, row_bytes(ggml_type, n_in)), np.uint8)
    if H_O is None:
        return packed, columns.encode(W, encode, packed)
    U = feedback_factor(H_O)
    target, decoded = W.astype(np.float32), np.empty_like(W)
    for start in range(0, n_out, ROW_BLOCK):
        stop = min(start + ROW_BLOCK, n_out)
        encode = ggml_encoder(ggml_type, importance, pins_between(pins or {}, start, stop), W[start:stop])
        decoded[start:stop] = columns.encode(target[start:stop], encode, packed[start:stop])
        target[stop:] += _carry(U, start, stop).astype(np.float32).T @ (decoded[start:stop] - target[start:stop])
    return packed, decoded


# --- choosing and accepting -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossCurvature:
    """What calibration says about one linear: how much an error in each direction costs.

    H (n_in, n_in) = E[x xᵀ]; H_w the same with each token weighted by its squared gradient, or None without gradients;
    H_O (n_out, n_out) = E[g gᵀ], or None to leave the rows to themselves; row_curvature (n_out,) = E[g_i²], or None.
    held_out (n_in, n_in) and held_out_O (n_out, n_out): H_w (without gradients H) and H_O of tokens that took no part in
    any of these.
    """

    H: Matrix
    held_out: Matrix
    H_w: Matrix | None = None
    H_O: Matrix | None = None
    held_out_O: Matrix | None = None
    row_curvature: NDArray[np.float64] | None = None

    def objective(self) -> Matrix:
        """Return what feedback along the rows minimises: H_w and H in equal parts, each of mean diagonal 1; H alone
        without gradients. H alone buys precision on ordinary tokens with errors at the ones that all others attend to."""
        parts = [M / np.diag(M).mean() for M in (self.H, self.H_w) if M is not None and np.diag(M).mean() > 0]
        return np.asarray(sum(parts) / len(parts)) if parts else np.eye(len(self.H))

    def estimate(self, E: FloatArray) -> float:
        """Return what an encoding's error E (n_out, n_in) costs on held-out tokens: tr(H_O E H Eᵀ), or Σ_i r_i e_iᵀ H e_i
        where nothing is known of how rows go together."""
        if self.held_out_O is None:
            return weighted_error(E, self.held_out, self.row_curvature)
        return float(np.einsum("ij,ij->", self.held_out_O.astype(np.float32) @ E, E @ self.held_out.astype(np.float32), dtype=np.float64))


@dataclass(frozen=True)
class Encoding:
    """Packed rows (n_out, row bytes), who made them, and their held-out error as a part of the plain encoder's."""

    packed: ggml.ByteArray
    damping: Damping | None  # None: the plain encoder's bytes, for feedback did not do better
    way: str  # `PLAIN`, "columns", or "columns and rows"; with `FAILED` where feedback could not be tried to the end
    held_out_ratio: float


PLAIN = "plain"
FAILED = "feedback failed"
ROW_DAMPING = Damping(0.3)  # gradients come from few tokens
FAST = (Damping(0.1),)
FULL = (Damping(0.01), Damping(0.05), Damping(0.1), Damping(0.3), Damping(0.1, to_diagonal=True), Damping(0.3, to_diagonal=True))
PROBE_ROWS = 128  # on which dampings are compared


def encode_guarded(
    W: FloatArray, ggml_type: GgmlType, importance: FloatArray | None, curvature: LossCurvature, dampings: tuple[Damping, ...] = FAST, pins: Pins | None = None
) -> Encoding:
    """Return the best of the plain encoding, the one with feedback along the rows, and that with feedback from row to
    row as well, judged by the held-out matrices.

    W: (n_out, n_in) float32. importance: (n_in,) float32 > 0 for the plain encoder, an imatrix, or None. dampings: those
    tried on a sample of rows; the best of them encodes the tensor. pins: weights that keep their value. Where feedback cannot be computed (a matrix that is not
    positive definite, weights that run away) the plain encoding stays, and `way` says so.
    """
    plain = ggml.encode_rows(ggml_type, W, importance)
    if pins and importance is not None:
        encode_pinned_rows(ggml_type, W, importance, pins, plain)
    best = Encoding(plain, None, PLAIN, 1.0)
    plain_error = curvature.estimate(ggml.decode_rows(ggml_type, plain) - W)
    if not plain_error > 0:  # exact already, or held-out tokens that say nothing
        return best
    objective = curvature.objective()
    inner = np.maximum(np.diag(objective), 1e-6 * np.diag(objective).mean()).astype(np.float32)
    try:
        damping = _best_damping(W, ggml_type, inner, objective, curvature, dampings)
        H = damped(objective, damping)
        for way, H_O in (("columns", None), ("columns and rows", curvature.H_O)):
            if way == "columns" or H_O is not None:
                packed, decoded = compensate(W, ggml_type, H, importance=inner, H_O=None if H_O is None else damped(H_O, ROW_DAMPING), pins=pins)
                ratio = curvature.estimate(decoded - W) / plain_error
                best = Encoding(packed, damping, way, ratio) if ratio < best.held_out_ratio else best
    except np.linalg.LinAlgError:
        return replace(best, way=f"{best.way} ({FAILED})")
    return best


def _best_damping(
    W: FloatArray, ggml_type: GgmlType, importance: FloatArray, objective: Matrix, curvature: LossCurvature, dampings: tuple[Damping, ...]
) -> Damping:
    """Return the damping whose feedback along a sample of rows has the least held-out error."""
    if len(dampings) == 1:
        return dampings[0]
    rows = np.ascontiguousarray(W[:: max(1, len(W) // PROBE_ROWS)])
    errors = [weighted_error(compensate(rows, ggml_type, damped(objective, d), importance=importance)[1] - rows, curvature.held_out) for d in dampings]
    return dampings[int(np.argmin(errors))]


def weighted_error(E: FloatArray, H: Matrix, row_weights: NDArray[np.float64] | None = None) -> float:
    """Return Σ_i r_i e_iᵀ H e_i of an error E (n_out, n_in): what the held-out matrices say of an encoding."""
    per_row = np.einsum("ij,ij->i", E @ H.astype(np.float32), E, dtype=np.float64)
    return float(per_row.sum() if row_weights is None else per_row @ row_weights)
