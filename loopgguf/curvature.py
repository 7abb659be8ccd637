"""Gram matrices of inputs and gradients, summed up while a pass goes on: what error feedback needs to know of a weight.

H of the inputs; with gradients H_w, weighted by what the loss makes of each token, H_O and G0 of the gradients, and the
curvature of rows. `GramSums` accumulates, `GramSet` and `GramStatistics` hold the sums of some layers or all of them.
Arrays only, no files (`grams.py` has those), no torch. Names and row order are the GGUF's.
Sources: GuidedQuant (arXiv 2505.07004), YAQA (arXiv 2505.22988).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopgguf.accumulators import EMBEDDING, HEAD, FloatArray, Key, Sums, refuse_non_finite, to_numpy
from loopgguf.architectures import input_group, tensor_role
from loopgguf.errors import InputError

_OUTPUT_KINDS = frozenset({"attn_q", "attn_k", "attn_v", "attn_output", "ffn_down"})
_BLOCK = 512  # rows of a matrix that are added to at a time: bounds the product's memory, and skips what symmetry gives


# --- how much of it there is --------------------------------------------------------------------------------------------


def has_output_gram(name: str) -> bool:
    """Tell whether H_O is kept of a weight: q, k, v, o and down, whose outputs are hidden-sized or smaller."""
    return tensor_role(name).kind in _OUTPUT_KINDS


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
    """Return the weights, by name with their shapes, of which Gram matrices are kept: the layers', the head, with gradients the
    embedding. A model without a head of its own has the embedding for it."""
    layers = {name: shape for name, shape in shapes.items() if len(shape) > 1 and name.startswith("blk.")}
    return {**layers, HEAD: shapes.get(HEAD, shapes[EMBEDDING]), **({EMBEDDING: shapes[EMBEDDING]} if has_gradient else {})}


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


# --- sums ---------------------------------------------------------------------------------------------------------------


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
    outputs: H_O = Σ g gᵀ by weight (q, k, v, o, down), and G0 under `token_embd.weight`. curvature: by weight; that of a
    row of the embedding is how often its token occurs, by the model's own probabilities, which are smoother than counts.
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


def add_outer(total: Any, X: Any, Y: Any) -> None:
    """total[upper blocks] += Xᵀ Y in place, for a product that is symmetric; numpy arrays or torch tensors alike."""
    for start in range(0, total.shape[0], _BLOCK):
        total[start : start + _BLOCK, start:] += X[:, start : start + _BLOCK].T @ Y[:, start:]


def whole(total: Any) -> FloatArray:
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

    def _outer(self, what: str, key: Key, X: Any, Y: Any, *, is_new: bool = True) -> None:
        """Add Xᵀ Y; is_new: of tokens that are not counted yet."""
        total = self._arrays.get((what, *key))
        if total is None:
            n = X.shape[1]
            total = self._arrays[what, *key] = X.new_zeros((n, n)) if hasattr(X, "new_zeros") else np.zeros((n, n), np.float32)
        add_outer(total, X, Y)
        self._accumulate(f"{what} tokens", key, np.array(len(X) if is_new else 0, np.int64))

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

        `token_embd.weight` has no inputs: X are the rows looked up, of which no notice is taken. Raises InputError naming
        the weight when a gradient is not finite.
        """
        if not self._wants(name):
            return
        squares = G * G
        curvature = to_numpy(squares.sum(0)).astype(np.float64)
        if not np.isfinite(curvature).all():
            raise InputError(f"gradients of {name}: got NaN or infinity, expected finite numbers. The weights are damaged")
        if name != EMBEDDING:
            self._add_rows(name, 0, len(curvature), curvature, len(G))
            self._add_weighted(name, X, squares.mean(1))
        if name == EMBEDDING or has_output_gram(name):
            self._outer("outputs", (name, None), G, G)

    def add_probabilities(self, start: int, n_vocab: int, X: Any, P: Any) -> None:
        """Add inputs X (n_tokens, n_embd) of the head and the probabilities P (n_tokens, rows) of the tokens from `start` on.

        A squared gradient at a logit is p (1 − p) in expectation over the label, so no label's chance is in it.
        """
        if not self._wants(HEAD):
            return
        squares, n_new = P * (1 - P), len(X) if start == 0 else 0
        self._add_rows(HEAD, start, n_vocab, to_numpy(squares.sum(0)), n_new)
        self._add_rows(EMBEDDING, start, n_vocab, to_numpy(P.sum(0)), n_new)
        weights = squares.sum(1) / n_vocab
        self._add_weighted(HEAD, X, weights.to(X.dtype) if hasattr(X, "to") else weights.astype(X.dtype), is_new=start == 0)

    def _add_rows(self, name: str, start: int, n_rows: int, curvature: NDArray[np.float64], n_new: int) -> None:
        """Add curvatures of the rows from `start` on, of n_rows, summed over tokens of which n_new are not counted yet."""
        whole = self._arrays.setdefault(("curvature", name, None), np.zeros(n_rows))
        whole[start : start + len(curvature)] += curvature
        self._accumulate("curvature tokens", (name, None), np.array(n_new, np.int64))

    def _add_weighted(self, name: str, X: Any, weights: Any, *, is_new: bool = True) -> None:
        self._outer("weighted", (name, None), X * weights[:, None], X, is_new=is_new)
        w = weights[self._starts]
        self._add_first("first_weighted", name, (X[self._starts] * w[:, None]).sum(0), float(w.sum()))

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
                yield key, Gram(whole(total), int(tokens[what][key]))

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


# --- at a glance --------------------------------------------------------------------------------------------------------


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
