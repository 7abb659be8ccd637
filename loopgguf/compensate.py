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

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from scipy import linalg

from loopgguf import ggml
from loopgguf.drift import Drift
from loopgguf.formats import FORMATS, GgmlType, row_bytes
from loopgguf.grids import find_grid
from loopgguf.super_weights import Pins, encode_rows, pins_between, restore_missed_rows

if TYPE_CHECKING:
    from loopgguf.rounding import Rounding

FloatArray = NDArray[np.float32]
Matrix = NDArray[np.floating[Any]]

COLUMN_BLOCK = 256  # columns encoded at once, a super-block; 32-wide types are fed back after each 32
ROW_BLOCK = 32  # rows encoded at once when errors are handed from row to row
SLAB_ROWS = 256  # of a product that nothing else depends on: bounds its memory

Encode = Callable[[FloatArray, int], tuple[ggml.ByteArray, FloatArray]]
"""(rows (n, width) float32, first column) → the packed rows (n, bytes) and what they decode to, (n, width) float32."""


@dataclass(frozen=True)
class Damping:
    """How far a measured covariance is trusted: `amount` of its mean diagonal is added (λI), or it is shrunk by that
    part towards its own diagonal (`to_diagonal`), which leaves the importances as they are."""

    amount: float = 0.05
    to_diagonal: bool = False


def damped(H: Matrix, damping: Damping | None) -> Matrix:
    """Return H (n, n) made safe to invert, in its own precision; dead columns (zero diagonal) get the mean of the others. None:
    H itself."""
    if damping is None:
        return H
    result = H.copy()
    _damp(result, damping)
    return result


def _damp(H: Matrix, damping: Damping) -> None:
    """Do so in place."""
    diagonal = np.diag(H).copy()
    mean = _mean_diagonal(H) or 1.0
    if damping.to_diagonal:
        H *= H.dtype.type(1 - damping.amount)
    added = damping.amount * (diagonal if damping.to_diagonal else mean)
    H[np.diag_indices(len(H))] += np.where(diagonal > 0, added, mean)


def _mean_diagonal(H: Matrix) -> float:
    return float(np.diag(H).mean(dtype=np.float64))


def feedback_factor(H: Matrix, damping: Damping | None = None) -> NDArray[np.float64]:
    """Return U (n, n) float64, upper triangular, with H⁻¹ = Uᵀ U, for a positive definite H, which is damped first where asked for.

    H read backwards is L Lᵀ, and U is L⁻¹ read backwards: one triangular inversion instead of an inverse and a second
    factorization, both in the one buffer that is returned. Double precision, because a few channels hold nearly all of H.
    Raises numpy.linalg.LinAlgError when H is not positive definite.
    """
    backwards = np.array(H[::-1, ::-1], np.float64, order="F")
    if damping is not None:
        _damp(backwards, damping)
    L, info = linalg.lapack.dpotrf(backwards, lower=1, overwrite_a=1)
    if info:
        raise np.linalg.LinAlgError(f"not positive definite in row {info}")
    inverse, info = linalg.lapack.dtrtri(L, lower=1, overwrite_c=1)
    assert info == 0, info
    return np.asarray(inverse[::-1, ::-1])


def _blocks(n: int, width: int) -> list[slice]:
    return [slice(start, min(start + width, n)) for start in range(0, n, width)]


def _carries(U: NDArray[np.float64], width: int) -> list[FloatArray]:
    """Return, for each block of `width` columns, the matrix (width, start) float32 that turns the errors of all columns before
    it into its own change."""
    blocks = _blocks(len(U), width)
    carries = [np.empty((b.stop - b.start, b.start), np.float32) for b in blocks]
    for i, b in enumerate(blocks):
        handed_on = linalg.solve_triangular(U[b, b], U[b, b.stop :], lower=False)
        for later, carry in zip(blocks[i + 1 :], carries[i + 1 :], strict=True):
            carry[:, b] = handed_on[:, later.start - b.stop : later.stop - b.stop].T
    return carries


def ggml_encoder(ggml_type: GgmlType, importance: FloatArray | None, pins: Pins | None = None, originals: FloatArray | None = None, start: int = 0) -> Encode:
    """Return libggml's own encoder of a type, weighing column j by importance (n_in,)[j]; pinned weights keep their value in
    `originals` (n, n_in). start: where among these columns the encoder's first one is."""

    def encode(rows: FloatArray, first: int) -> tuple[ggml.ByteArray, FloatArray]:
        first += start
        if not ggml.rows_are_encodable(rows):  # ggml would abort the process
            raise np.linalg.LinAlgError("feedback made the weights that are still to come too large to encode")
        weights = None if importance is None else np.ascontiguousarray(importance[first : first + rows.shape[1]])
        packed = encode_rows(ggml_type, np.ascontiguousarray(rows), weights, pins or {}, first, originals)
        return packed, ggml.decode_rows(ggml_type, packed)

    return encode


@dataclass(frozen=True)
class Effort:
    """How hard feedback tries.

    dampings: those tried on a sample of rows; the best of them encodes the tensor. sweeps: 0 hands errors from block to
    block around the encoder; else single codes are then moved, with the scales that the encoder found, each in the light of
    all others of its block of rows, so many times at most; `sweeps_of_k` says so of K types, for whose encoders a sweep's
    products of matrices take as long as the encoder itself. is_thorough: the codes inside a block of columns are chosen one
    after the other too, and in the end as many sweeps go over all rows, each in the light of all others. max_columns: of H at
    once, as `compensate` says; None: all.
    """

    dampings: tuple[Damping, ...]
    sweeps: int = 0
    sweeps_of_k: int = 0
    is_thorough: bool = False
    max_columns: int | None = None

    def sweeps_for(self, ggml_type: GgmlType) -> int:
        """Return how many sweeps a type gets at most."""
        return self.sweeps_of_k if ggml_type.name.endswith("_K") else self.sweeps


class Columns:
    """Feedback along the rows: everything that depends on H and the width of a block alone, computed once for many rows.

    damping: of H, unless it is damped already. keeps_factors: for codes inside a block that are chosen one after the other.
    """

    def __init__(self, H: Matrix, width: int, damping: Damping | None = None, *, keeps_factors: bool = False) -> None:
        self.width = width
        U = feedback_factor(H, damping)
        self._carries = _carries(U, width)
        self._factors = [np.ascontiguousarray(U[b, b]) for b in _blocks(len(H), width)] if keeps_factors else []

    def encode(self, W: FloatArray, encode: Encode, out: ggml.ByteArray, rounding: Rounding | None = None) -> FloatArray:
        """Encode W (n, n_in) block by block into `out` (n, row bytes); return what it decodes to, (n, n_in) float32.

        rounding: to choose the codes inside a block one after the other; None leaves them as the encoder chose them.
        """
        missed, decoded, position = np.empty(W.shape[::-1], np.float32), np.empty_like(W), 0
        for b, carry in enumerate(self._carries):
            columns = slice(b * self.width, (b + 1) * self.width)
            target = np.ascontiguousarray(W[:, columns] + (carry @ missed[: columns.start]).T)
            packed, decoded[:, columns] = encode(target, columns.start)
            if rounding is not None:
                packed = rounding.round_block(packed, target, self._factors[b])
                decoded[:, columns] = rounding.decode(packed)
            out[:, position : position + packed.shape[1]] = packed
            position += packed.shape[1]
            missed[columns] = (decoded[:, columns] - target).T  # columns first: what BLAS multiplies fastest by few rows
        return decoded


def compensate(
    W: FloatArray,
    ggml_type: GgmlType,
    H: Matrix,
    *,
    importance: FloatArray,
    damping: Damping | None = None,
    H_O: Matrix | None = None,
    sweeps: int = 0,
    is_thorough: bool = False,
    max_columns: int | None = None,
    pins: Pins | None = None,
) -> tuple[ggml.ByteArray, FloatArray]:
    """Return W encoded with error feedback: packed rows (n_out, row bytes) uint8, and what they decode to, float32.

    W: (n_out, n_in) float32. H: (n_in, n_in). importance: (n_in,) float32 > 0, for the encoder inside. damping: of H; None
    where that is done (`damped`). H_O: (n_out, n_out), damped already, to hand errors from row to row as well, in blocks of
    `ROW_BLOCK`; None leaves the rows to themselves. sweeps, is_thorough: as in `Effort`. max_columns: a multiple of 256; of an
    H with more, only blocks of about equal size on its diagonal are used, each damped and factorized by itself, and the
    columns of each are encoded as if there were no others. pins: weights that the encoder keeps (single codes may move
    later). Raises numpy.linalg.LinAlgError when a matrix is not positive definite.
    """
    n_out, n_in = W.shape
    packed, E = np.empty((n_out, row_bytes(ggml_type, n_in)), np.uint8), np.empty_like(W)
    blocks_of_rows = row_blocks(n_out, H_O)
    for part in column_parts(n_in, max_columns):
        own, W_part, E_part = H[part, part], W[:, part], E[:, part]
        out = packed[:, row_bytes(ggml_type, part.start) : row_bytes(ggml_type, part.stop)]
        columns = Columns(own, FORMATS[ggml_type].block, damping, keeps_factors=is_thorough)
        rounding = _rounding(ggml_type, own, damping) if sweeps else None
        for rows, coupling, carry in blocks_of_rows:
            target = W_part[rows] if carry is None else W_part[rows] + carry @ E_part[: rows.start]
            encode = ggml_encoder(ggml_type, importance, pins_between(pins or {}, rows.start, rows.stop), W[rows], part.start)
            E_part[rows] = columns.encode(target, encode, out[rows], rounding if is_thorough else None) - target
            if rounding is not None:
                out[rows], _ = rounding.descend(out[rows], E_part[rows].T @ coupling, coupling, sweeps)
                E_part[rows] = rounding.decode(out[rows]) - target
        if rounding is not None and is_thorough and H_O is not None:
            _descend_both(W_part, out, E_part, rounding, H_O, sweeps)
        del columns, rounding  # the matrices of the next part need not lie beside them
    return packed, ggml.decode_rows(ggml_type, packed, E)


def column_parts(n_in: int, max_columns: int | None) -> list[slice]:
    """Return the columns that feedback takes together: all, or as few parts as can be, of about equal size, in whole super-blocks."""
    n_parts = 1 if max_columns is None else math.ceil(n_in / max_columns)
    return _blocks(n_in, COLUMN_BLOCK * math.ceil(n_in / (COLUMN_BLOCK * n_parts)))


def _rounding(ggml_type: GgmlType, H: Matrix, damping: Damping | None) -> Rounding | None:
    """Return what moves single codes of a type; None where it has no grid."""
    from loopgguf.rounding import Rounding  # here, because numba takes its time to be imported

    grid = find_grid(ggml_type)
    return None if grid is None else Rounding(grid, damped(H, damping))


def row_blocks(n_out: int, H_O: Matrix | None) -> list[tuple[slice, FloatArray, FloatArray | None]]:
    """Return, for each block of rows, how its rows go together when those after it make good what they can, (n, n) float32,
    and the matrix that turns the errors of all rows before it into its own change, (n, start); None where rows are left to themselves."""
    if H_O is None:
        return [(rows, np.eye(rows.stop - rows.start, dtype=np.float32), None) for rows in _blocks(n_out, SLAB_ROWS)]
    U, blocks = feedback_factor(H_O), _blocks(n_out, ROW_BLOCK)
    inverses = (np.linalg.inv(U[rows, rows]) for rows in blocks)
    couplings = [(inverse @ inverse.T).astype(np.float32) for inverse in inverses]
    return list(zip(blocks, couplings, _carries(U, ROW_BLOCK), strict=True))


def _descend_both(W: FloatArray, packed: ggml.ByteArray, E: FloatArray, rounding: Rounding, H_O: Matrix, sweeps: int) -> None:
    """Move single codes of all rows where that lowers tr(H_O E H Eᵀ); `packed` is changed in place, and E set to its error."""
    for rows in _blocks(len(W), SLAB_ROWS):
        E[rows] = rounding.decode(packed[rows]) - W[rows]
    coupling = H_O.astype(np.float32, copy=False)
    for _ in range(sweeps):
        n_moves = 0
        for rows in _blocks(len(W), ROW_BLOCK):
            packed[rows], n = rounding.descend(packed[rows], E.T @ coupling[:, rows], np.ascontiguousarray(coupling[rows, rows]), 1)
            E[rows] = rounding.decode(packed[rows]) - W[rows]
            n_moves += n
        if n_moves == 0:
            return


# --- choosing and accepting -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LossCurvature:
    """What calibration says about one linear: how much an error in each direction costs.

    objective (n_in, n_in): what feedback along the rows minimises, `mixed` from E[x xᵀ] and the same with each token
    weighted by its squared gradient. H_O (n_out, n_out) = E[g gᵀ], or None to leave the rows to themselves; row_curvature
    (n_out,) = E[g_i²], or None. held_out (n_in, n_in) and held_out_O (n_out, n_out): the weighted one (without gradients
    the plain) and H_O of tokens that took no part in any of these. drift: of the inputs, in the file so far; None where it is not
    known, or there is none. All matrices are float32: they are the most of the memory.
    """

    objective: Matrix
    held_out: Matrix
    H_O: Matrix | None = None
    held_out_O: Matrix | None = None
    row_curvature: NDArray[np.float64] | None = None
    drift: Drift | None = None

    def estimate(self, E: FloatArray) -> float:
        """Return what an encoding's error E (n_out, n_in) costs on held-out tokens: tr(H_O E H Eᵀ), or Σ_i r_i e_iᵀ H e_i
        where nothing is known of how rows go together."""
        if self.held_out_O is None:
            return weighted_error(E, self.held_out, self.row_curvature)
        slabs = _blocks(len(E), SLAB_ROWS)
        return sum(float(np.einsum("ij,ij->", self.held_out_O[rows] @ E, E[rows] @ self.held_out, dtype=np.float64)) for rows in slabs)


def mixed(*parts: Matrix) -> Matrix:
    """Return the mean of matrices (n, n), each scaled to a mean diagonal of 1; those of zeros are left out.

    H alone buys precision on ordinary tokens with errors at the ones that all others attend to; H_w alone knows few tokens.
    """
    used = [M for M in parts if _mean_diagonal(M) > 0]
    result = np.zeros_like(parts[0]) if used else np.eye(len(parts[0]), dtype=parts[0].dtype)
    for M in used:
        result += M * M.dtype.type(1 / (len(used) * _mean_diagonal(M)))
    return result


@dataclass(frozen=True)
class Encoding:
    """Packed rows (n_out, row bytes), who made them, and their held-out error as a part of the plain encoder's."""

    packed: ggml.ByteArray
    damping: Damping | None  # None: the plain encoder's bytes, for feedback did not do better
    way: str  # `PLAIN`, "columns", or "columns and rows"; with `FAILED` where feedback could not be tried to the end
    held_out_ratio: float
    is_aimed: bool = False  # at weights that make up for the drift of the inputs


PLAIN = "plain"
FAILED = "feedback failed"
ROW_DAMPING = Damping(0.3)  # gradients come from few tokens
FAST = Effort((Damping(0.1),), sweeps=3, sweeps_of_k=2)
FULL = Effort(
    (Damping(0.03), Damping(0.1), Damping(0.3), Damping(0.1, to_diagonal=True), Damping(0.3, to_diagonal=True)), sweeps=8, sweeps_of_k=8, is_thorough=True
)
PROBE_ROWS = 128  # on which dampings are compared


def encode_guarded(
    W: FloatArray, ggml_type: GgmlType, importance: FloatArray | None, curvature: LossCurvature, effort: Effort = FAST, pins: Pins | None = None
) -> Encoding:
    """Return W with feedback along the rows and from row to row; where the held-out matrices say that this is no better
    than the plain encoding, along the rows alone; and where that is no better either, the plain encoding.

    W: (n_out, n_in) float32. importance: (n_in,) float32 > 0 for the plain encoder, an imatrix, or None. pins: weights to
    keep; a row whose super weight feedback loses takes the plain encoder's bytes. Where the inputs have drifted, feedback aims at
    `drift.Drift.aim` of W, and its error is measured from there; the plain encoding's is from W. Where feedback cannot be
    computed (a matrix that is not positive definite, weights that run away) the plain encoding stays, and `way` says so.
    """
    pins = pins or {}
    plain = Encoding(encode_rows(ggml_type, W, importance, pins), None, PLAIN, 1.0)
    plain_error = curvature.estimate(ggml.decode_rows(ggml_type, plain.packed) - W)
    if not plain_error > 0:  # exact already, or held-out tokens that say nothing
        return plain
    try:
        target = _aim(W, curvature.drift, pins)
        objective = curvature.objective
        inner = np.maximum(np.diag(objective), 1e-6 * np.diag(objective).mean()).astype(np.float32)
        ways = {"columns and rows": damped(mixed(curvature.H_O), ROW_DAMPING)} if curvature.H_O is not None else {}
        damping = _best_damping(target, ggml_type, inner, curvature, effort)
        for way, H_O in {**ways, "columns": None}.items():
            packed, decoded = compensate(
                target,
                ggml_type,
                objective,
                importance=inner,
                damping=damping,
                H_O=H_O,
                sweeps=effort.sweeps_for(ggml_type),
                is_thorough=effort.is_thorough,
                max_columns=effort.max_columns,
                pins=pins,
            )
            if restore_missed_rows(ggml_type, W, pins, packed, plain.packed):
                decoded = ggml.decode_rows(ggml_type, packed)
            ratio = curvature.estimate(decoded - target) / plain_error
            if ratio < 1:
                return Encoding(packed, damping, way, ratio, is_aimed=target is not W)
    except np.linalg.LinAlgError:
        return replace(plain, way=f"{PLAIN} ({FAILED})")
    return plain


def _aim(W: FloatArray, drift: Drift | None, pins: Pins) -> FloatArray:
    """Return the weights to encode; W itself where nothing asks for others. What is pinned stays."""
    target = W if drift is None else drift.aim(W)
    if target is not W:
        for row, pin in pins.items():
            columns = [*pin.super_columns, *pin.mask_columns]
            target[row, columns] = W[row, columns]
    return target


def _best_damping(W: FloatArray, ggml_type: GgmlType, importance: FloatArray, curvature: LossCurvature, effort: Effort) -> Damping:
    """Return the damping whose feedback along a sample of rows, around the encoder, has the least held-out error."""
    if len(effort.dampings) == 1:
        return effort.dampings[0]
    rows = np.ascontiguousarray(W[:: max(1, len(W) // PROBE_ROWS)])

    def error(damping: Damping) -> float:
        _, decoded = compensate(rows, ggml_type, curvature.objective, importance=importance, damping=damping, max_columns=effort.max_columns)
        return weighted_error(decoded - rows, curvature.held_out)

    return min(effort.dampings, key=error)


def weighted_error(E: FloatArray, H: Matrix, row_weights: NDArray[np.float64] | None = None) -> float:
    """Return Σ_i r_i e_iᵀ H e_i of an error E (n_out, n_in): what the held-out matrices say of an encoding."""
    weights, H = np.ones(len(E)) if row_weights is None else row_weights, H.astype(np.float32, copy=False)
    slabs = _blocks(len(E), SLAB_ROWS)
    return sum(float(np.einsum("ij,ij->i", E[rows] @ H, E[rows], dtype=np.float64) @ weights[rows]) for rows in slabs)
