"""What is summed up while activations pass by: arrays only, no files, no models, no torch.

An engine (`activations.py` with llama.cpp, `layerwise.py` with torch) shows every weight's inputs to accumulators, and
on request its outputs, the gradients there, and attention probabilities. Which of these an accumulator wants is told
by the methods it has (the protocols below). Results are sums and counts, so that parts can be added. Names and row order
are the GGUF's. Accumulators that need more than a vector per weight have modules of their own (`curvature.py`,
`attention.py`, `sensitivity.py`). Source: tools/imatrix/imatrix.cpp (`IMatrixCollector`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from loopgguf.architectures import input_group, tensor_role
from loopgguf.errors import InputError

FloatArray = NDArray[np.float32]
EMBEDDING = "token_embd.weight"
HEAD = "output.weight"  # tied or not: as the head, the embeddings go by this name too
Key = tuple[str, int | None]  # a weight's or an input's name, and the number of the matrix (expert); None: it has one


# --- who listens to what ----------------------------------------------------------------------------------------------


class Accumulator(Protocol):
    """Takes activations: X (n_tokens, n_in) float32, the inputs of matrix `matrix` of the weight `name`.

    `matrix` is None for a plain weight, whose rows are then the positions of one chunk in order; else the expert's
    number: every expert is named on every call of the weight, with n_tokens = 0 where none was routed to it. X is only
    valid during the call.
    """

    def add(self, name: str, matrix: int | None, X: FloatArray) -> None: ...


@runtime_checkable
class OutputListener(Protocol):
    """Wants outputs: Y (n_tokens, n_out) float32 = X Wᵀ, without bias, rows of Y as those of the X shown right before.

    One that has `is_watched(name)` wants those of some weights only: an engine need not show it others.
    """

    def add_output(self, name: str, matrix: int | None, Y: FloatArray) -> None: ...


@runtime_checkable
class AttentionListener(Protocol):
    """Wants attention: A (n_head, n_queries, n_keys) float32, the probabilities of one chunk in layer `layer`."""

    def add_attention(self, layer: int, A: FloatArray) -> None: ...


@runtime_checkable
class GradientListener(Protocol):
    """Wants gradients, from the torch engine's backward pass: X (n_tokens, n_in) the inputs of the plain weight `name`
    and G (n_tokens, n_out) the gradients of the chunk's summed loss at its outputs. Of `token_embd.weight`, whose inputs are
    one-hot, X are its outputs: the rows looked up."""

    def add_gradient(self, name: str, X: Any, G: Any) -> None: ...


@runtime_checkable
class HeadListener(Protocol):
    """Wants the head: its inputs by `add` under the name `HEAD`, tied or not, whatever else is collected; and from the torch
    engine's backward pass, slab by slab of the vocabulary, X (n_tokens, n_embd) its inputs again and P (n_tokens, rows) the
    probabilities of the tokens from `start` on, of `n_vocab`. Slabs come in order for each chunk."""

    def add_probabilities(self, start: int, n_vocab: int, X: Any, P: Any) -> None: ...


@runtime_checkable
class ChunkListener(Protocol):
    """Wants to know which chunk follows: its number, and the positions at which its documents start, 0 first."""

    def begin_chunk(self, number: int, starts: Sequence[int]) -> None: ...


def document_starts(documents: NDArray[np.int32] | None) -> list[int]:
    """Return the positions at which the documents of a chunk start; documents: (n_ctx,) their numbers, None for one document."""
    return [0] if documents is None else [int(i) for i in np.flatnonzero(np.diff(documents, prepend=-1))]


@dataclass(frozen=True)
class HoldoutSplit:
    """Accumulators for the chunks numbered in `chunks`, and others for the rest."""

    train: Sequence[Accumulator]
    holdout: Sequence[Accumulator]
    chunks: frozenset[int]


def split_holdout(n_chunks: int, seed: int, share: float = 0.1) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the numbers of the chunks for (train, holdout), each sorted, disjoint: a tenth by seeded choice, at least one each.

    Raises InputError for fewer than two chunks.
    """
    if n_chunks < 2:
        raise InputError(f"calibration text for a held-out set: got {n_chunks} chunks, expected at least 2. Give more text or a smaller context")
    order = np.random.default_rng([seed, n_chunks]).permutation(n_chunks)
    n_holdout = min(max(round(n_chunks * share), 1), n_chunks - 1)
    return np.sort(order[n_holdout:]), np.sort(order[:n_holdout])


class Audience:
    """The accumulators that an engine shows things to, by what they want; those of a split by the chunk that runs."""

    def __init__(self, accumulators: Sequence[Accumulator], split: HoldoutSplit | None = None) -> None:
        self._always, self._split = list(accumulators), split
        self._everyone = both = [*self._always, *(split.train if split else ()), *(split.holdout if split else ())]
        self._output_listeners = [a for a in both if isinstance(a, OutputListener)]
        self.wants_attention = any(isinstance(a, AttentionListener) for a in both)
        self.wants_gradients = any(isinstance(a, GradientListener) for a in both)
        self.wants_head = any(isinstance(a, HeadListener) for a in both)
        self._active: list[Accumulator] = []
        self.begin_chunk(0)

    def wants_output(self, name: str) -> bool:
        """Tell whether anyone wants the outputs of this weight."""
        return any(a.is_watched(name) if hasattr(a, "is_watched") else True for a in self._output_listeners)

    def begin_chunk(self, number: int, starts: Sequence[int] = (0,)) -> None:
        """What follows belongs to chunk `number`, whose documents start at `starts`."""
        self._active = list(self._always)
        if self._split is not None:
            self._active += self._split.holdout if number in self._split.chunks else self._split.train
        for accumulator in self._active:
            if isinstance(accumulator, ChunkListener):
                accumulator.begin_chunk(number, starts)

    def add(self, name: str, matrix: int | None, X: Any) -> None:
        """Show inputs: a numpy array, or a torch tensor on any device, which only those that can use it get as it is."""
        plain: FloatArray | None = None
        for accumulator in self._active:
            if getattr(accumulator, "takes_tensors", False):
                accumulator.add(name, matrix, X)
            else:
                plain = to_numpy(X) if plain is None else plain
                accumulator.add(name, matrix, plain)

    def add_head(self, X: Any) -> None:
        """Show the head's inputs to those alone that always want them."""
        for accumulator in self._active:
            if isinstance(accumulator, HeadListener):
                accumulator.add(HEAD, None, X)

    def add_output(self, name: str, matrix: int | None, Y: Any) -> None:
        Y = to_numpy(Y)
        for accumulator in self._active:
            if isinstance(accumulator, OutputListener):
                accumulator.add_output(name, matrix, Y)

    def add_attention(self, layer: int, A: Any) -> None:
        A = to_numpy(A)
        for accumulator in self._active:
            if isinstance(accumulator, AttentionListener):
                accumulator.add_attention(layer, A)

    def add_gradient(self, name: str, X: Any, G: Any) -> None:
        for accumulator in self._active:
            if isinstance(accumulator, GradientListener):
                accumulator.add_gradient(name, X, G)

    def add_probabilities(self, start: int, n_vocab: int, X: Any, P: Any) -> None:
        for accumulator in self._active:
            if isinstance(accumulator, HeadListener):
                accumulator.add_probabilities(start, n_vocab, X, P)

    def state(self) -> dict[str, NDArray[Any]]:
        """Return what all accumulators whose sums can be put back hold, as named arrays for `restore`."""
        return {f"{i}/{label}": value for i, a in enumerate(self._everyone) if isinstance(a, Sums) for label, value in a.state().items()}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Put back a `state` of an audience of the same accumulators."""
        for label, value in state.items():
            number, _, rest = label.partition("/")
            accumulator = self._everyone[int(number)]
            assert isinstance(accumulator, Sums)
            accumulator.restore({rest: value})


def to_numpy(values: Any) -> NDArray[Any]:
    """Return a numpy array as it is, a torch tensor as an array: a view where it lies in host memory."""
    result: NDArray[Any] = values.detach().cpu().numpy() if hasattr(values, "cpu") else values
    return result


class Sums:
    """Arrays by what they are, weight and matrix; they can be taken out and put back, to the bit, when a job is resumed."""

    def __init__(self) -> None:
        self._arrays: dict[tuple[str, str, int | None], Any] = {}

    def _accumulate(self, what: str, key: Key, value: Any) -> None:
        before = self._arrays.get((what, *key))
        self._arrays[what, *key] = value if before is None else before + value

    def _by_key(self, what: str) -> dict[Key, Any]:
        found = {(name, matrix): value for (w, name, matrix), value in self._arrays.items() if w == what}
        return dict(sorted(found.items(), key=lambda item: (item[0][0], -1 if item[0][1] is None else item[0][1])))

    def _stacked(self, what: str) -> dict[str, NDArray[Any]]:
        """Return the arrays of each weight, (n_matrices, …), by its name."""
        stacks: dict[str, list[Any]] = {}
        for (name, _), value in self._by_key(what).items():
            stacks.setdefault(name, []).append(value)
        return {name: np.stack(values) for name, values in stacks.items()}

    def state(self, layer: int | None = None) -> dict[str, NDArray[Any]]:
        """Return what was summed so far (of one layer only) as named arrays; `restore` of an equal accumulator takes them."""
        mine = {key: value for key, value in self._arrays.items() if layer is None or tensor_role(key[1]).layer == layer}
        return {f"{what}/{'' if matrix is None else matrix}/{name}": to_numpy(value) for (what, name, matrix), value in mine.items()}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Go on from a `state`."""
        for label, value in state.items():
            what, matrix, name = label.split("/", 2)
            self._arrays[what, name, int(matrix) if matrix else None] = value


def refuse_non_finite(name: str, values: FloatArray) -> None:
    """Raise InputError naming the weight and the column when per-column values are not all finite."""
    if not math.isfinite(values.sum(dtype=np.float64)):  # in one pass: NaN and infinity outlive any sum, and float32 overflows none in float64
        column = int(np.flatnonzero(~np.isfinite(values))[0])
        raise InputError(f"activations of {name}: got a NaN or infinite input in column {column}, expected finite ones. The weights are damaged")


# --- per column -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Columns:
    """Σx² per input column of one weight: sum_squares (n_matrices, n_in) float32, counts (n_matrices,) int64 of token rows.

    sums and max_abs: Σx and max |x| of the same columns where they were collected. A file that keeps one count for
    several matrices (legacy .dat) gives one row of n_matrices · n_in, which `statistics.check_coverage` splits.
    """

    sum_squares: FloatArray
    counts: NDArray[np.int64]
    sums: FloatArray | None = None
    max_abs: FloatArray | None = None


_cached_group = lru_cache(maxsize=1 << 16)(input_group)  # asked for every matmul of every chunk


class _Slab:
    """Remembers the squares of the slab that was summed last, for the next weights of its input group: q, k and v see the same X."""

    def __init__(self) -> None:
        self._group: tuple[str | None, int | None, int] | None = None
        self._names: set[str] = set()
        self.squares: NDArray[np.float64] = np.empty(0)

    def is_same(self, name: str, matrix: int | None, X: FloatArray) -> bool:
        """Tell whether X, inputs of a weight, are those of the call before; a name that comes again starts a new slab."""
        group = (_cached_group(name), matrix, X.__array_interface__["data"][0])
        if group == self._group and group[0] is not None and name not in self._names:
            self._names.add(name)
            return True
        self._group, self._names = group, {name}
        return False


class ColumnSums(Sums):
    """An accumulator of Σx² per input column and of token counts, as llama-imatrix keeps them; with `moments` Σx and max |x| too.

    Each slab is summed in float32, the slabs in float64, so the result hardly depends on how tokens were grouped.
    """

    def __init__(self, *, moments: bool = False) -> None:
        super().__init__()
        self.moments = moments
        self._slab = _Slab()

    def add(self, name: str, matrix: int | None, X: FloatArray) -> None:
        """Add a slab X (n_tokens, n_in) float32 of inputs of matrix `matrix` (None: the only one) of weight `name`.

        n_tokens may be 0: an expert that exists and was not reached. Raises InputError naming the weight and column
        when an activation is not finite.
        """
        key = (name, matrix or 0)
        if not self._slab.is_same(name, matrix, X):
            with np.errstate(over="ignore", invalid="ignore"):
                squares = np.einsum("ij,ij->j", X, X)
                refuse_non_finite(name, squares)
            self._slab.squares = squares.astype(np.float64)
        self._accumulate("squares", key, self._slab.squares)
        self._accumulate("counts", key, np.array(len(X), np.int64))
        if self.moments:
            self._accumulate("sums", key, X.sum(axis=0).astype(np.float64))
            largest = np.maximum(X.max(axis=0, initial=0), -X.min(axis=0, initial=0))
            self._arrays["max", *key] = np.maximum(self._arrays.get(("max", *key), 0), largest)

    def columns(self) -> dict[str, Columns]:
        """Return what was summed so far, by weight, sorted by name."""
        stacks = {what: self._stacked(what) for what in ("squares", "counts", "sums", "max")}
        optional = ("sums", "max") if self.moments else ()
        return {
            name: Columns(squares.astype(np.float32), stacks["counts"][name], *(stacks[what][name].astype(np.float32) for what in optional))
            for name, squares in stacks["squares"].items()
        }


# --- spikes -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extremes:
    """The largest activations around one ffn_down, signed: at each input column (n_in,) and at each output row (n_out,)."""

    layer: int | None
    inputs: FloatArray
    outputs: FloatArray

    @property
    def column(self) -> int:
        """The input column of the largest |x|."""
        return int(np.abs(self.inputs).argmax())

    @property
    def row(self) -> int:
        """The output row of the largest |y|."""
        return int(np.abs(self.outputs).argmax())


def _largest(X: FloatArray) -> FloatArray:
    """Return each column's value of the largest magnitude, with its sign; zeros for no rows."""
    if not len(X):
        return np.zeros(X.shape[1], np.float32)
    top, bottom = X.max(axis=0), X.min(axis=0)
    largest: FloatArray = np.where(top >= -bottom, top, bottom)
    return largest


class Spikes(Sums):
    """An accumulator of the largest input and output of every ffn_down (*The Super Weight in Large Language Models*)."""

    @staticmethod
    def is_watched(name: str) -> bool:
        """Tell whether a weight is the down projection of a feed-forward network: plain, of experts, or shared."""
        return tensor_role(name).kind in ("ffn_down", "ffn_down_exps", "ffn_down_shexp")

    def _keep(self, what: str, name: str, matrix: int | None, X: FloatArray) -> None:
        if not self.is_watched(name):
            return
        key, new = (what, name, matrix), _largest(X)
        old = self._arrays.get(key)
        self._arrays[key] = new if old is None else np.where(np.abs(new) > np.abs(old), new, old)

    def add(self, name: str, matrix: int | None, X: FloatArray) -> None:
        """Look at inputs X (n_tokens, n_in) of matrix `matrix` of weight `name`."""
        self._keep("inputs", name, matrix, X)

    def add_output(self, name: str, matrix: int | None, Y: FloatArray) -> None:
        """Look at outputs Y (n_tokens, n_out)."""
        self._keep("outputs", name, matrix, Y)

    def extremes(self) -> dict[Key, Extremes]:
        """Return what was seen, by weight and matrix."""
        inputs, outputs = self._by_key("inputs"), self._by_key("outputs")
        return {key: Extremes(tensor_role(key[0]).layer, value, outputs[key]) for key, value in inputs.items()}
