"""What is summed up while activations pass by: arrays only, no files, no models, no torch.

An engine (`activations.py` with llama.cpp, `layerwise.py` with torch) shows every weight's inputs to accumulators, and
on request its outputs, the gradients there, and attention probabilities. Which of these an accumulator wants is told
by the methods it has (the protocols below). Results are sums and counts, so that parts can be added; `GramSet` and
`GramStatistics` hold those that error feedback needs. Names and row order are the GGUF's.
Sources: tools/imatrix/imatrix.cpp (`IMatrixCollector`), GuidedQuant (arXiv 2505.07004), YAQA (arXiv 2505.22988).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from loopgguf.architectures import input_group, tensor_role
from loopgguf.errors import InputError

FloatArray = NDArray[np.float32]
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
    """Wants outputs: Y (n_tokens, n_out) float32 = X Wᵀ, without bias, rows of Y as those of the X shown right before."""

    def add_output(self, name: str, matrix: int | None, Y: FloatArray) -> None: ...


@runtime_checkable
class AttentionListener(Protocol):
    """Wants attention: A (n_head, n_queries, n_keys) float32, the probabilities of one chunk in layer `layer`."""

    def add_attention(self, layer: int, A: FloatArray) -> None: ...


@runtime_checkable
class GradientListener(Protocol):
    """Wants gradients, from the torch engine's backward pass: X (n_tokens, n_in) the inputs of the plain weight `name`
    and G (n_tokens, n_out) the gradients of the chunk's summed loss at its outputs. X is None for `token_embd.weight`."""

    def add_gradient(self, name: str, X: Any, G: Any) -> None: ...


@runtime_checkable
class HeadListener(Protocol):
    """Wants the head, from the torch engine's backward pass, slab by slab of the vocabulary: X (n_tokens, n_embd) its inputs
    and P (n_tokens, rows) the probabilities of the tokens from `start` on, of `n_vocab`. Slabs come in order for each chunk."""

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


def plan_passes(bytes_per_layer: Sequence[int], max_memory_bytes: int) -> list[range]:
    """Return the blocks of layers whose matrices fit in `max_memory_bytes` together: one pass over the text for each.

    A layer that does not fit alone is a block of its own; the caller tells the user. bytes_per_layer: `gram_bytes`.
    """
    blocks: list[range] = []
    start, used = 0, 0
    for layer, n_bytes in enumerate(bytes_per_layer):
        if layer > start and used + n_bytes > max_memory_bytes:
            blocks.append(range(start, layer))
            start, used = layer, 0
        used += n_bytes
    if bytes_per_layer:
        blocks.append(range(start, len(bytes_per_layer)))
    return blocks


def gram_shapes(shapes: Mapping[str, tuple[int, ...]], *, has_gradient: bool) -> dict[str, tuple[int, ...]]:
    """Return the weights, by name with their shapes, of which Gram matrices are kept: the layers', with gradients the embedding."""
    return {name: shape for name, shape in shapes.items() if len(shape) > 1 and (name.startswith("blk.") or (has_gradient and name == EMBEDDING))}


def gram_bytes(shapes: Mapping[str, Sequence[int]], *, has_gradient: bool) -> int:
    """Return the bytes of the square float32 matrices that `GramSums` keeps of these weights, for one set (train or holdout).

    shapes: by GGUF name, (n_out, n_in) or (n_experts, n_out, n_in). What is stored on disk, packed, is half of it.
    """
    inputs = {input_group(name) or name: math.prod(shape[:-2]) * shape[-1] ** 2 for name, shape in shapes.items()}
    total = sum(inputs.values())
    if has_gradient:
        total += sum(shape[-1] ** 2 for shape in shapes.values())
        total += sum(shape[-2] ** 2 for name, shape in shapes.items() if has_output_gram(name))
    return 4 * total


class Audience:
    """The accumulators that an engine shows things to, by what they want; those of a split by the chunk that runs."""

    def __init__(self, accumulators: Sequence[Accumulator], split: HoldoutSplit | None = None) -> None:
        self._always, self._split = list(accumulators), split
        both = [*self._always, *(split.train if split else ()), *(split.holdout if split else ())]
        self.wants_outputs = any(isinstance(a, OutputListener) for a in both)
        self.wants_attention = any(isinstance(a, AttentionListener) for a in both)
        self.wants_gradients = any(isinstance(a, GradientListener) for a in both)
        self.wants_head = any(isinstance(a, HeadListener) for a in both)
        self._active: list[Accumulator] = []
        self.begin_chunk(0)

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
    if not np.isfinite(values).all():
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
            with np.errstate(over="ignore", invalid="ignore"):  # reported right below
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


# --- Gram matrices ----------------------------------------------------------------------------------------------------

EMBEDDING = "token_embd.weight"
_OUTPUT_KINDS = frozenset({"attn_q", "attn_k", "attn_v", "attn_output", "ffn_down"})
_BLOCK = 512  # rows of a matrix that are added to at a time: bounds the product's memory, and skips what symmetry gives


def has_output_gram(name: str) -> bool:
    """Tell whether H_O is kept of a weight: q, k, v, o and down, whose outputs are hidden-sized or smaller."""
    return tensor_role(name).kind in _OUTPUT_KINDS


@dataclass(frozen=True)
class Gram:
    """Σ_t w_t x_t x_tᵀ: `total` (n, n) float32, symmetric, and the number of tokens it was summed over (not Σ w_t)."""

    total: FloatArray
    n_tokens: int

    @property
    def mean(self) -> FloatArray:
        """The matrix per token, H; zeros when no token was seen."""
        return self.total / np.float32(max(self.n_tokens, 1))


@dataclass(frozen=True)
class FirstToken:
    """The first token of every document: `total` (n_in,) float32 = Σ w x and `weight` = Σ w (w is 1 in the plain H).

    Where every document starts with the same BOS, x is the same in all, and their part of a Gram's `total` is exactly
    `outer`; else that of the mean. A chunk of text cut as llama-imatrix cuts it is one document. To weigh the attention
    sink c-fold, add (c − 1) · outer to `total`; to leave it out, subtract it.
    """

    total: FloatArray
    weight: float

    @property
    def mean(self) -> FloatArray:
        """The input at the first token, (n_in,)."""
        return self.total / np.float32(self.weight or 1.0)

    @property
    def outer(self) -> FloatArray:
        """total totalᵀ / weight, (n_in, n_in)."""
        return np.outer(self.total, self.mean)

    @property
    def trace(self) -> float:
        """The trace of `outer`."""
        return float(np.dot(self.total.astype(np.float64), self.mean))


@dataclass(frozen=True)
class Curvature:
    """Σ g_i² over tokens per output row: `total` (n_out,) float64; r_i = total / n_tokens."""

    total: NDArray[np.float64]
    n_tokens: int

    @property
    def mean(self) -> FloatArray:
        """r_i = E[g_i²], (n_out,) float32."""
        return (self.total / max(self.n_tokens, 1)).astype(np.float32)


@dataclass(frozen=True)
class GramSet:
    """What error feedback needs, summed over one set of chunks; empty maps where it was not collected.

    inputs: H by (input group, matrix); an expert that saw no token is absent. first: first tokens by input group.
    weighted: H_w by weight, with w_t = mean over outputs of g_ti². first_weighted: those in H_w, by weight.
    outputs: H_O = Σ g gᵀ by weight (q, k, v, o, down), and G0 under `token_embd.weight`. curvature: by weight.
    g is the gradient of −Σ_t ln p(y_t) of a chunk, labels y_t drawn from the model's own distribution, so the
    KL divergence per token that an error E of a weight makes is about ½ Σ_i (r_i / mean r) e_iᵀ H_w e_i (both as means).
    """

    inputs: Mapping[Key, Gram] = field(default_factory=dict)
    first: Mapping[str, FirstToken] = field(default_factory=dict)
    weighted: Mapping[str, Gram] = field(default_factory=dict)
    first_weighted: Mapping[str, FirstToken] = field(default_factory=dict)
    outputs: Mapping[str, Gram] = field(default_factory=dict)
    curvature: Mapping[str, Curvature] = field(default_factory=dict)


@dataclass(frozen=True)
class GramStatistics:
    """The Gram matrices of a model or of some of its layers, on the chunks for use and on those held out.

    holdout_chunks: the numbers of the latter. seed: of that choice; label_seed: of the labels (None: no gradients).
    fingerprint: of the calibration tokens.
    """

    train: GramSet
    holdout: GramSet
    holdout_chunks: tuple[int, ...]
    seed: int
    label_seed: int | None
    fingerprint: str


def _add_outer(total: Any, X: Any, Y: Any) -> None:
    """total[upper blocks] += Xᵀ Y in place, for a product that is symmetric; numpy arrays or torch tensors alike."""
    for start in range(0, total.shape[0], _BLOCK):
        total[start : start + _BLOCK, start:] += X[:, start : start + _BLOCK].T @ Y[:, start:]


def _whole(total: Any) -> FloatArray:
    """Return a matrix of which the upper blocks were summed as a symmetric numpy array; the memory is reused where possible."""
    matrix: FloatArray = to_numpy(total)
    for start in range(0, len(matrix), _BLOCK):
        stop = start + _BLOCK
        diagonal = matrix[start:stop, start:stop]
        diagonal[:] = np.triu(diagonal) + np.triu(diagonal, 1).T
        matrix[stop:, start:stop] = matrix[start:stop, stop:].T
    return matrix


class GramSums(Sums):
    """An accumulator of Gram matrices, float32: H and, in a backward pass, H_w, H_O, G0 and the curvature of rows.

    wants: which weights, by name (default all): where memory does not hold the matrices of all layers, those of one
    block of layers (`plan_passes`). Weights that share an input share one H, taken from the first of them that is seen.
    The sums are symmetric only after `take`.
    """

    takes_tensors = True

    def __init__(self, wants: Callable[[str], bool] | None = None) -> None:
        super().__init__()
        self._wants = wants or (lambda _name: True)
        self._source: dict[Key, str] = {}  # whose inputs stand for those of the group
        self._starts: list[int] = [0]

    def begin_chunk(self, number: int, starts: Sequence[int]) -> None:
        """Take down which positions of the slabs to come are the first of a document."""
        self._starts = list(starts)

    def _outer(self, what: str, key: Key, X: Any, Y: Any) -> None:
        total = self._arrays.get((what, *key))
        if total is None:
            n = X.shape[1]
            total = self._arrays[what, *key] = X.new_zeros((n, n)) if hasattr(X, "new_zeros") else np.zeros((n, n), np.float32)
        _add_outer(total, X, Y)
        self._accumulate(f"{what} tokens", key, np.array(len(X), np.int64))

    def add(self, name: str, matrix: int | None, X: Any) -> None:
        """Add inputs X (n_tokens, n_in) of matrix `matrix` of weight `name`: a numpy array or a torch tensor.

        Raises InputError naming the weight and column when an activation is not finite.
        """
        group = input_group(name) or name
        if not len(X) or not self._wants(name) or self._source.setdefault((group, matrix), name) != name:
            return
        refuse_non_finite(name, to_numpy(X.sum(0)))
        self._outer("inputs", (group, matrix), X, X)
        if matrix is None:
            x = X[self._starts]
            self._add_first("first", group, x.sum(0), float(len(x)))

    def add_gradient(self, name: str, X: Any, G: Any) -> None:
        """Add the inputs X (n_tokens, n_in) of weight `name` and the gradients G (n_tokens, n_out) at its outputs.

        For `token_embd.weight` X is None and G is the gradient at the embedding's output. Raises InputError naming the
        weight when a gradient is not finite.
        """
        if not self._wants(name):
            return
        squares = G * G
        curvature = to_numpy(squares.sum(0)).astype(np.float64)
        if not np.isfinite(curvature).all():
            raise InputError(f"gradients of {name}: got NaN or infinity, expected finite numbers. The weights are damaged")
        key = (name, None)
        self._accumulate("curvature", key, curvature)
        self._accumulate("curvature tokens", key, np.array(len(G), np.int64))
        if X is not None:
            weights = squares.mean(1)
            self._outer("weighted", key, X * weights[:, None], X)
            w = weights[self._starts]
            self._add_first("first_weighted", name, (X[self._starts] * w[:, None]).sum(0), float(w.sum()))
        if X is None or has_output_gram(name):
            self._outer("outputs", key, G, G)

    def _add_first(self, what: str, name: str, total: Any, weight: float) -> None:
        self._accumulate(what, (name, None), to_numpy(total).astype(np.float64))
        self._accumulate(f"{what} weight", (name, None), np.array(weight))

    def take(self, layer: int | None = None) -> GramSet:
        """Return what was summed of one layer (None: of everything), and forget it, so that its memory can be used again."""
        mine = {key: self._arrays.pop(key) for key in list(self._arrays) if layer is None or tensor_role(key[1]).layer == layer}
        parts = Sums()
        parts._arrays = mine
        kept = {what: parts._by_key(what) for what in ("inputs", "weighted", "outputs", "curvature", "first", "first_weighted")}
        tokens = {what: parts._by_key(f"{what} tokens") for what in ("inputs", "weighted", "outputs", "curvature")}
        weights = {what: parts._by_key(f"{what} weight") for what in ("first", "first_weighted")}

        def grams(what: str) -> Iterator[tuple[Key, Gram]]:
            for key, total in kept[what].items():
                yield key, Gram(_whole(total), int(tokens[what][key]))

        def firsts(what: str) -> dict[str, FirstToken]:
            return {key[0]: FirstToken(total.astype(np.float32), float(weights[what][key])) for key, total in kept[what].items()}

        return GramSet(
            inputs=dict(grams("inputs")),
            first=firsts("first"),
            weighted={key[0]: gram for key, gram in grams("weighted")},
            first_weighted=firsts("first_weighted"),
            outputs={key[0]: gram for key, gram in grams("outputs")},
            curvature={key[0]: Curvature(total, int(tokens["curvature"][key])) for key, total in kept["curvature"].items()},
        )


@dataclass(frozen=True)
class LayerSummary:
    """How a layer's statistics are shared out: the sink and the outlier channels at a glance.

    attention_share: of the attention of all heads, the part that first tokens received (None: not collected).
    input_shares: of H's trace, by input group. weighted_shares: of H_w's trace, by kind of weight (`attn_k`).
    diagonal_ratios: max/mean of diag(H), by input group without its layer (`attn_norm`, `ffn_down`).
    """

    layer: int
    attention_share: float | None
    input_shares: Mapping[str, float]
    weighted_shares: Mapping[str, float]
    diagonal_ratios: Mapping[str, float]


def summarize_layer(layer: int, grams: GramSet, attention: FloatArray | None = None) -> LayerSummary:
    """Return the summary of one layer of `grams`; attention: the share of each head that first tokens received, (n_head,)."""
    mine = {key: gram for key, gram in grams.inputs.items() if tensor_role(key[0]).layer == layer and key[1] is None}
    diagonals = {group: gram.total.diagonal().astype(np.float64) for (group, _), gram in mine.items()}
    weighted = {name: first for name, first in grams.first_weighted.items() if tensor_role(name).layer == layer}
    return LayerSummary(
        layer,
        None if attention is None else float(attention.mean()),
        {tensor_role(group).kind: _share(grams.first[group].trace, diagonal.sum()) for group, diagonal in diagonals.items()},
        {tensor_role(name).kind: _share(first.trace, np.trace(grams.weighted[name].total, dtype=np.float64)) for name, first in weighted.items()},
        {tensor_role(group).kind: float(diagonal.max() / max(diagonal.mean(), np.finfo(np.float64).tiny)) for group, diagonal in diagonals.items()},
    )


def _share(part: float, whole: float) -> float:
    return float(part / whole) if whole else 0.0


# --- the loss ---------------------------------------------------------------------------------------------------------

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
