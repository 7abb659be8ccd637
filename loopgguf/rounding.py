"""Which code is best: error feedback inside a block, and descents over the codes of whole rows, as compiled loops.

A row of weights t is to be met by ŵ = sign · scale · point + offset (`grids.py`), its error e = ŵ − t costing eᵀ H e.
`round_block` goes through a block from left to right and hands each unit's error to the columns after it through U,
H⁻¹ = Uᵀ U (GPTQ, arXiv 2210.17323); `descend` moves one unit at a time to what is best given all others, until none
moves. The columns of a codebook unit are chosen as a whole, point and signs together, with the even number of negatives
that some types demand. Rows have nothing to do with each other but for the coupling that a descent is given.
Knows no bytes and no files. Compiled by numba when first used, which keeps it for the next time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np
from numba import njit
from numpy.typing import NDArray

from loopgguf import ggml
from loopgguf.ggml import ByteArray, FloatArray
from loopgguf.grids import Codes, Grid, pack, read_scales, unpack

Matrix = NDArray[np.floating[Any]]
Indices = NDArray[np.uint16]

VISITED_COLUMNS = 128  # of a descent at once: a constant, as the widths of `compensate.py`
UNCOPIED = 10**6  # multiplications of a product of few columns: a constant too

_F = TypeVar("_F", bound=Callable[..., Any])


def _compiled(loop: _F) -> _F:
    """Return a loop compiled for the types of its arguments; numba's own decorator says nothing to a type checker."""
    return cast(_F, njit(nogil=True, cache=True)(loop))


@_compiled
def nearest_level(x: Any, levels: Any, is_uniform: Any) -> Any:
    """Return the place of the level nearest to x among ascending ones, which are 1 apart where `is_uniform`."""
    n = len(levels)
    if is_uniform:
        return min(max(int(np.rint(x - levels[0])), 0), n - 1)
    best = 0
    for k in range(1, n):
        if x > 0.5 * (levels[k - 1] + levels[k]):
            best = k
    return best


@_compiled
def own_costs(metrics: Any, columns: Any, is_diagonal: Any) -> Any:
    """Return pᵀ M p of every point for each unit of each run, (n_runs, units a run, n_points); with `is_diagonal` of M's diagonal.

    metrics: (n_runs, step, step), M of each run of columns that are chosen together. columns: (unit, n_points), the points.
    """
    unit, n_points = columns.shape
    costs = np.zeros((len(metrics), metrics.shape[1] // unit, n_points))
    for b in range(costs.shape[0]):
        for u in range(costs.shape[1]):
            for j in range(unit):
                for k in range(unit):
                    m = metrics[b, u * unit + j, u * unit + k]
                    if j == k or not is_diagonal:
                        for p in range(n_points):
                            costs[b, u, p] += m * columns[j, p] * columns[k, p]
    return costs


@_compiled
def nearest_point(force: Any, own: Any, columns: Any) -> Any:
    """Return (point p, its cost) of the least pᵀ M p − 2 p · force, force = M x: the point nearest to x.

    own: pᵀ M p of every point. The loops go over all points at once, so that they become vector instructions.
    """
    costs = own.copy()
    for j in range(len(force)):
        for p in range(len(costs)):
            costs[p] -= 2 * force[j] * columns[j, p]
    best = np.argmin(costs)
    return best, costs[best]


@_compiled
def nearest_turned(force: Any, own: Any, columns: Any) -> Any:
    """Return (point, column, cost) of the same where one column, the one that costs least, takes the other sign; M is a
    diagonal, x ≥ 0."""
    costs, least = own.copy(), np.full(len(own), np.inf)
    for j in range(len(force)):
        for p in range(len(costs)):
            product = force[j] * columns[j, p]
            costs[p] -= 2 * product
            least[p] = min(least[p], product)
    costs += 4 * least  # (p + x)² − (p − x)² = 4 p x
    best = np.argmin(costs)
    return best, np.argmin(force * columns[:, best]), costs[best]


@_compiled
def choose_signed(x: Any, M: Any, own: Any, columns: Any, has_parity: Any, index: Any, negative: Any) -> None:
    """Set the points `index` and signs of the columns x: signs of x itself, one of them turned where their number must be even."""
    n, unit = len(x), len(columns)
    is_odd = False
    force = np.empty(n)
    for j in range(n):
        negative[j] = x[j] < 0
        is_odd ^= x[j] < 0
        force[j] = M[j, j] * abs(x[j])
    turned, turned_column, turned_point, loss = -1, -1, -1, np.inf
    for u in range(n // unit):
        part = force[u * unit : (u + 1) * unit]
        point, cost = nearest_point(part, own[u], columns)
        index[u] = point
        if has_parity and is_odd:
            point, column, other = nearest_turned(part, own[u], columns)
            if other - cost < loss:
                turned, turned_column, turned_point, loss = u, column, point, other - cost
    if turned >= 0:
        index[turned] = turned_point
        negative[turned * unit + turned_column] ^= True


@_compiled
def round_scalar_block(T: Any, U: Any, scale: Any, offset: Any, levels: Any, is_uniform: Any, place: Any) -> None:
    """Choose the places of a block's levels, all (n, width); T are the weights to meet, and ends as what was met."""
    n, width = T.shape
    for i in range(n):
        for j in range(width):
            s, o, w = scale[i, j], offset[i, j], T[i, j]
            if s != 0:
                place[i, j] = nearest_level((w - o) / s, levels, is_uniform)
            T[i, j] = s * levels[place[i, j]] + o
            carried = (w - T[i, j]) / U[j, j]
            for k in range(j + 1, width):
                T[i, k] -= carried * U[j, k]


@_compiled
def choose(x: Any, M: Any, own: Any, columns: Any, has_signs: Any, has_parity: Any, index: Any, negative: Any) -> None:
    """Set the points `index` and the signs of a run of columns x that are chosen together: under the diagonal of the metric M
    where there are signs, else under the whole of it. own: `own_costs` of the run."""
    if has_signs:
        choose_signed(x, M, own, columns, has_parity, index, negative)
    else:
        index[0] = nearest_point(M @ x, own[0], columns)[0]


@_compiled
def _values(scale: Any, columns: Any, index: Any, negative: Any, out: Any) -> None:
    """Set `out` to what a run of columns is without its offset."""
    unit = len(columns)
    for j in range(len(out)):
        v = scale * columns[j % unit, index[j // unit]]
        out[j] = -v if negative[j] else v


@_compiled
def round_unit_block(
    T: Any, U: Any, metrics: Any, inverses: Any, own: Any, scale: Any, offset: Any, columns: Any, has_signs: Any, has_parity: Any, index: Any, negative: Any
) -> None:
    """The same for codes of several columns. metrics, inverses, own: U_bb⁻¹ U_bb⁻ᵀ, U_bb⁻¹ and `own_costs` of each run of
    columns chosen together."""
    n, width = T.shape
    unit, step = len(columns), metrics.shape[1]
    met, missed = np.empty(step), np.empty(step)
    for i in range(n):
        for b in range(width // step):
            first, stop = b * step, (b + 1) * step
            s, o = scale[i, first], offset[i, first]
            mine, signs = index[i, first // unit : stop // unit], negative[i, first:stop]
            if s != 0:
                choose((T[i, first:stop] - o) / s, metrics[b], own[b], columns, has_signs, has_parity, mine, signs)
            _values(s, columns, mine, signs, met)
            missed[:] = T[i, first:stop] - (met + o)
            T[i, first:stop] -= missed
            for j in range(step):
                carried = 0.0
                for k in range(j + 1):
                    carried += missed[k] * inverses[b, k, j]
                for k in range(stop, width):
                    T[i, k] -= carried * U[first + j, k]


@_compiled
def _spread(G: Any, i: Any, before: Any, coupling: Any) -> None:
    """Let the rows after row i know how its gradient changed: what row i did, they feel through the coupling of rows."""
    for k in range(i + 1, len(G)):
        part = coupling[k, i] / coupling[i, i]
        if part != 0:
            for j in range(G.shape[1]):
                G[k, j] += part * (G[i, j] - before[j])


@_compiled
def visit_scalar(G: Any, H: Any, coupling: Any, scale: Any, levels: Any, is_uniform: Any, place: Any, change: Any) -> Any:
    """Move each level of a block of columns where that lowers tr(C E H Eᵀ), C (n, n) the coupling of rows; return how many moved.

    All (n, width): G = C E H, which is kept up for what is still to be visited, `scale`, `place` and `change`, that of E.
    H: (width, width), the block's part.
    """
    n, width = G.shape
    n_moves = 0
    for i in range(n):
        before = G[i].copy()
        for j in range(width):
            s = scale[i, j]
            if s == 0:
                continue
            level, curvature = levels[place[i, j]], coupling[i, i] * H[j, j]
            q = nearest_level(level - G[i, j] / (curvature * s), levels, is_uniform)
            step = s * (levels[q] - level)
            if step * (G[i, j] + G[i, j] + step * curvature) < 0:
                place[i, j] = q
                change[i, j] = step
                step *= coupling[i, i]
                for k in range(width):
                    G[i, k] += step * H[j, k]
                n_moves += 1
        _spread(G, i, before, coupling)
    return n_moves


@_compiled
def _gain(g: Any, M: Any, curvature: Any, now: Any, then: Any) -> Any:
    """Return by how much tr(C E H Eᵀ) changes when a run of columns goes from `now` to `then`."""
    gain = 0.0
    for j in range(len(now)):
        part = 2 * g[j]
        for k in range(len(now)):
            part += curvature * M[j, k] * (then[k] - now[k])
        gain += (then[j] - now[j]) * part
    return gain


@_compiled
def _step_down(g: Any, inverse: Any, curvature: Any, now: Any, wish: Any) -> None:
    """Set `wish` to what a run of columns would best be if it could be anything: a Newton step from `now`."""
    for j in range(len(now)):
        wish[j] = now[j]
        for k in range(len(now)):
            wish[j] -= inverse[j, k] * g[k] / curvature


@_compiled
def visit_units(
    G: Any,
    H: Any,
    coupling: Any,
    metrics: Any,
    inverses: Any,
    own: Any,
    scale: Any,
    columns: Any,
    has_signs: Any,
    has_parity: Any,
    index: Any,
    negative: Any,
    change: Any,
) -> Any:
    """The same for codes of several columns. metrics, inverses, own: H_bb, H_bb⁻¹ and `own_costs` of each run of columns
    chosen together."""
    n, width = G.shape
    unit, step = len(columns), metrics.shape[1]
    now, then, wish = np.empty(step), np.empty(step), np.empty(step)
    mine, signs = np.empty(step // unit, index.dtype), np.zeros(step, negative.dtype)
    n_moves = 0
    for i in range(n):
        before, c = G[i].copy(), coupling[i, i]
        for b in range(width // step):
            first, stop = b * step, (b + 1) * step
            s, old, old_signs = scale[i, first], index[i, first // unit : stop // unit], negative[i, first:stop]
            if s == 0:
                continue
            _values(s, columns, old, old_signs, now)
            _step_down(G[i, first:stop], inverses[b], c, now, wish)
            choose(wish / s, metrics[b], own[b], columns, has_signs, has_parity, mine, signs)
            _values(s, columns, mine, signs, then)
            if _gain(G[i, first:stop], metrics[b], c, now, then) < 0:
                old[:] = mine
                old_signs[:] = signs
                for j in range(step):
                    change[i, first + j] = then[j] - now[j]
                    part = c * change[i, first + j]
                    for k in range(width):
                        G[i, k] += part * H[first + j, k]
                n_moves += 1
        _spread(G, i, before, coupling)
    return n_moves


# --- on packed rows ---------------------------------------------------------------------------------------------------


class Rounding:
    """The loops above for one type and one H (n_in, n_in), on packed rows; in single precision, which halves what they read."""

    def __init__(self, grid: Grid, H: Matrix) -> None:
        self.grid, self.H = grid, np.ascontiguousarray(H, np.float32)
        levels = grid.points[:, 0].astype(np.float32)
        self._order = (np.argsort(levels, kind="stable") if grid.unit == 1 else np.arange(len(levels))).astype(np.uint16)
        self._levels, self._place_of = levels[self._order], np.argsort(self._order).astype(np.uint16)
        self._is_uniform = bool((np.diff(self._levels) == 1).all())
        self._columns = np.ascontiguousarray(grid.points.T, np.float64)
        self._signed = (grid.sign_places is not None, grid.has_parity)
        self._step = 8 if grid.has_parity else grid.unit
        self._metrics = _diagonal_blocks(self.H, self._step).astype(np.float64)
        self._inverses = np.linalg.inv(self._metrics)
        self._own = self._own_costs(self._metrics)

    def decode(self, packed: ByteArray) -> FloatArray:
        """Return what packed rows decode to, (n, n_in) float32."""
        return ggml.decode_rows(self.grid.type, np.ascontiguousarray(packed))

    def round_block(self, packed: ByteArray, target: FloatArray, U: Matrix) -> ByteArray:
        """Return a block's packed rows with codes chosen from left to right.

        target (n, width) float32: the weights they are to meet. U (width, width): the block's part of U.
        """
        scales, T = read_scales(self.grid, packed), target.astype(np.float64)
        place, negative = self._unpack(packed)
        if self.grid.unit == 1:
            round_scalar_block(T, U, scales.scale, scales.offset, self._levels, self._is_uniform, place)
        else:
            inverses = np.linalg.inv(_diagonal_blocks(U, self._step))
            metrics = inverses @ inverses.transpose(0, 2, 1)
            own = self._own_costs(metrics)
            round_unit_block(T, U, metrics, inverses, own, scales.scale, scales.offset, self._columns, *self._signed, place, negative)
        return self._pack(place, negative, packed)

    def descend(self, packed: ByteArray, EC: FloatArray, coupling: FloatArray, max_sweeps: int) -> tuple[ByteArray, int]:
        """Return packed rows with single codes moved until none is better elsewhere, or `max_sweeps` are done, and the moves.

        EC (n_in, n): Eᵀ C of these rows, C the coupling of all rows and E the error; it is overwritten. coupling (n, n): C among
        these. A block of columns is visited at a time, under half the gradient H Eᵀ C of tr(C E H Eᵀ) as it then is. Sweeps go
        to and fro: what has changed since a block's last visit are then only the blocks on one side of it, and itself.
        """
        scale, (place, negative) = read_scales(self.grid, packed).scale, self._unpack(packed)
        blocks = [slice(start, start + VISITED_COLUMNS) for start in range(0, len(EC), VISITED_COLUMNS)]
        G, changed, n_moves = np.zeros_like(EC), EC, 0
        for sweep in range(max_sweeps):
            before, latest = n_moves, np.zeros_like(EC)
            for block in blocks[:: -1 if sweep % 2 else 1]:
                since = slice(None) if sweep == 0 else slice(block.start, None) if sweep % 2 else slice(block.stop)
                _add_product(self.H[block, since], changed[since], G[block])
                change = np.zeros((len(packed), len(G[block])), np.float32)
                n_moves += self._visit(block, G[block].T.copy(), coupling, scale[:, block].copy(), place, negative[:, block], change)
                latest[block] = change.T @ coupling
                changed[block] += latest[block]
            if n_moves == before:
                break
            changed = latest
        return self._pack(place, negative, packed), n_moves

    def _visit(
        self, block: slice, G: FloatArray, coupling: FloatArray, scale: FloatArray, place: Indices, negative: NDArray[np.bool_], change: FloatArray
    ) -> int:
        """Move the codes of a block of columns, which are changed in place, and set `change`; return how many moved."""
        H = self.H[block, block].copy()  # rows side by side become vector instructions
        if self.grid.unit == 1:
            return int(visit_scalar(G, H, coupling, scale, self._levels, self._is_uniform, place[:, block], change))
        runs, units = (slice(block.start // width, block.stop // width) for width in (self._step, self.grid.unit))
        parts = (self._metrics[runs], self._inverses[runs], self._own[runs])
        return int(visit_units(G, H, coupling, *parts, scale, self._columns, *self._signed, place[:, units], negative, change))

    def _own_costs(self, metrics: Matrix) -> Matrix:
        """Return what each point costs by itself in each run of columns; nothing for scalar types."""
        if self.grid.unit == 1:
            return np.empty((0, 0, 0))
        costs: Matrix = own_costs(metrics, self._columns, self._signed[0])
        return costs

    def _unpack(self, packed: ByteArray) -> tuple[Indices, NDArray[np.bool_]]:
        """Return the codes as places in the order of `_order`, and their signs as an array in any case: the loops take no None."""
        codes = unpack(self.grid, packed)
        none = np.zeros((len(packed), codes.index.shape[1] * self.grid.unit), np.bool_)
        return self._place_of[codes.index], none if codes.is_negative is None else codes.is_negative

    def _pack(self, place: Indices, negative: NDArray[np.bool_], packed: ByteArray) -> ByteArray:
        return pack(self.grid, Codes(self._order[place], negative), packed)


def _add_product(A: FloatArray, B: FloatArray, out: FloatArray) -> None:
    """Add A (n, k) times B (k, m) to `out`. OpenBLAS copies A into another order first, which few columns of B do not make up
    for, but for products of 10⁶ multiplications it has kernels that need no copy (on processors with AVX-512)."""
    k = UNCOPIED // len(A) // B.shape[1]
    for part in [slice(start, start + k) for start in range(0, len(B), k)] if k >= VISITED_COLUMNS else [slice(None)]:
        out += A[:, part] @ B[part]


def _diagonal_blocks(M: Matrix, width: int) -> Matrix:
    """Return the blocks on the diagonal of M, (n / width, width, width)."""
    return np.stack([M[i : i + width, i : i + width] for i in range(0, len(M), width)])
