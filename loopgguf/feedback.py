"""Error feedback for a whole model: finds the curvature of every weight, layer by layer, and says what each encoder is told.

A checkpoint folder is run forwards and backwards over the calibration text: a linear's weight is encoded under the mix of
H and H_w and judged by H_w on the tenth of the text that was held out, the head too; the token embeddings, whose input is
one-hot, go by G0, the covariance of the gradient at their output, and where they are the head too by the sum of both
uses. A GGUF has no backward pass: there H alone decides, in which keys and values weigh the first token `SINK`-fold,
because nearly every head of a trained model attends to it. An expert's few tokens are joined by those of all experts of
its layer. A layer's matrices are given away as soon as they are complete. Encodes nothing itself (see `compensate.py` and `pipeline.py`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from enum import StrEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loopgguf.accumulators import EMBEDDING, HEAD, split_holdout
from loopgguf.activations import collect_grams_from_checkpoint, collect_grams_from_gguf
from loopgguf.architectures import input_group, tensor_role
from loopgguf.calibration import Chunks
from loopgguf.compensate import FAST, FULL, Effort, FloatArray, LossCurvature, mixed
from loopgguf.curvature import Gram, GramSet
from loopgguf.errors import InputError
from loopgguf.formats import QUANTIZED_TYPES
from loopgguf.grams import find_grams, load_grams
from loopgguf.layerwise import DEFAULT_MAX_MEMORY_BYTES, plan_gradient_pass
from loopgguf.loss import PassResult
from loopgguf.planner import PlanRow
from loopgguf.progress import Progress
from loopgguf.source import Source

SEED = 0  # of the held-out chunks and of the labels
MIN_TOKENS_PER_COLUMN = 8  # below it a covariance is noise: the plain encoder's bytes stay
SINK = 500.0  # times the first token counts for keys and values where no gradient says what it is worth
_SINK_KINDS = ("attn_k", "attn_v", "attn_qkv")
AUTO_FULL_WEIGHTS = 2_000_000_000  # up to which `auto` takes the time for `full`


class Compensate(StrEnum):
    """How hard error feedback tries: not at all, around the encoder and briefly over single codes, thoroughly with the best damping
    for each tensor, or (auto) the latter for models up to two billion weights and the former for larger ones."""

    OFF = "off"
    AUTO = "auto"
    FAST = "fast"
    FULL = "full"

    def effort(self, n_weights: int) -> Effort:
        is_full = self is Compensate.FULL or (self is Compensate.AUTO and n_weights <= AUTO_FULL_WEIGHTS)
        return FULL if is_full else FAST


def may_have_feedback(row: PlanRow, *, is_tied: bool, has_gradients: bool) -> bool:
    """Tell whether a pass gives matrices to encode a tensor with error feedback: one with an imatrix, the head, embeddings that
    are the head too, or with gradients any."""
    if _is_of_vocabulary(row):
        return row.name == HEAD or is_tied or has_gradients
    return row.uses_imatrix


def _is_of_vocabulary(row: PlanRow) -> bool:
    """Tell whether a tensor is a quantized head or embedding, which need no imatrix."""
    return row.name in (EMBEDDING, HEAD) and row.is_encoded and row.type in QUANTIZED_TYPES


@dataclass(frozen=True)
class Feedback:
    """What the encoders of one layer are told: its matrices on the tokens for use and on those held out."""

    train: GramSet
    holdout: GramSet

    def curvature(self, row: PlanRow, *, is_tied: bool) -> Callable[[int], LossCurvature | None] | None:
        """Return what gives, by its number, the curvature of each matrix of a tensor; None where it is left to the plain encoder."""
        if _is_of_vocabulary(row):
            return self._of_vocabulary(row, is_tied=is_tied)
        if not row.uses_imatrix:
            return None
        return (lambda matrix: self._of_weight(row)) if len(row.shape) == 2 else self._of_experts(row)

    def _of_vocabulary(self, row: PlanRow, *, is_tied: bool) -> Callable[[int], LossCurvature | None] | None:
        if row.name == EMBEDDING and not is_tied:
            return (lambda matrix: self._of_lookup(row)) if EMBEDDING in self.train.outputs else None
        if (input_group(HEAD), None) not in self.train.inputs:
            return None
        return lambda matrix: self._of_weight(row) if row.name == HEAD else self._of_tied(row)

    def _of_tied(self, row: PlanRow) -> LossCurvature | None:
        """Return the sum of both uses of the embeddings, which are commensurable: both are of the same loss, per token.

        As a lookup row i costs f_i eᵀ G0 e, as the head r_i / mean r · eᵀ H_w e. How often a token occurs, f_i, and how
        uncertain its prediction is, r_i, go together so closely that one sum serves all rows: Σ f is 1, Σ r / mean r is n_out.
        """
        as_head = self._of_weight(replace(row, name=HEAD))
        if as_head is None or HEAD not in self.train.weighted:
            return as_head
        train, held_out = (grams.outputs[EMBEDDING].mean + row.shape[-2] * grams.weighted[HEAD].mean for grams in (self.train, self.holdout))
        return replace(as_head, objective=train, held_out=held_out)

    def _of_lookup(self, row: PlanRow) -> LossCurvature | None:
        """Return G0; how often tokens occur cannot change a code, for it is constant along a row, but it weighs the verdict."""
        train, holdout = self.train.outputs[EMBEDDING], self.holdout.outputs.get(EMBEDDING)
        if holdout is None or not _are_enough(train, holdout):
            return None
        _check_size(train, row)
        return LossCurvature(mixed(train.mean), holdout.mean, row_curvature=self._row_curvature(row))

    def _of_weight(self, row: PlanRow) -> LossCurvature | None:
        key = (input_group(row.name) or row.name, None)
        gram, held_out = self.train.inputs.get(key), self.holdout.inputs.get(key)
        if gram is None or held_out is None or not _are_enough(gram, held_out):
            return None
        _check_size(gram, row)
        if row.name in self.train.weighted:
            return self._with_gradients(row, gram)
        return LossCurvature(mixed(self._with_sink(self.train, row.name, gram)), self._with_sink(self.holdout, row.name, held_out))

    def _with_gradients(self, row: PlanRow, gram: Gram) -> LossCurvature:
        name, train, holdout = row.name, self.train, self.holdout
        r, has_rows = self._row_curvature(row), name in train.outputs
        return LossCurvature(
            mixed(gram.mean, train.weighted[name].mean),
            held_out=holdout.weighted[name].mean,
            H_O=train.outputs[name].mean if has_rows else None,
            held_out_O=holdout.outputs[name].mean if has_rows else None,
            row_curvature=r / max(float(r.mean()), 1e-30),
        )

    def _row_curvature(self, row: PlanRow) -> NDArray[np.float64]:
        r = self.train.curvature[row.name].mean.astype(np.float64)
        if len(r) != row.shape[-2]:
            raise InputError(
                f"curvature of {row.name}: got {len(r)} rows, expected {row.shape[-2]}. The matrices beside the imatrix do not fit; make them anew"
            )
        return r

    @staticmethod
    def _with_sink(grams: GramSet, name: str, gram: Gram) -> FloatArray:
        """Return H; for keys and values with the first token `SINK`-fold."""
        first = grams.first.get(input_group(name) or name)
        if tensor_role(name).kind not in _SINK_KINDS or first is None:
            return gram.mean
        return gram.mean + first.outer * np.float32((SINK - 1) / max(gram.n_tokens, 1))

    def _of_experts(self, row: PlanRow) -> Callable[[int], LossCurvature | None]:
        """Return what gives an expert's H, shrunk towards that of all experts of its layer as if one more token a column were theirs."""
        group = input_group(row.name) or row.name
        whole = functools.cache(lambda: (_shared(self.train, group), _shared(self.holdout, group)))

        def find(matrix: int) -> LossCurvature | None:
            train, holdout = whole()
            if train is None or holdout is None or not _are_enough(train, holdout):
                return None
            _check_size(train, row)
            return LossCurvature(mixed(_shrunk(self.train.inputs.get((group, matrix)), train)), _shrunk(self.holdout.inputs.get((group, matrix)), holdout))

        return find


def _check_size(gram: Gram, row: PlanRow) -> None:
    if len(gram.total) != row.shape[-1]:
        raise InputError(
            f"Gram matrix of {row.name}: got {len(gram.total)} columns, expected {row.shape[-1]}. Those beside the imatrix are of another model; make them anew"
        )


def stored_feedback(imatrix: Path | None) -> Feedback | None:
    """Return the matrices that lie beside an imatrix, read when they are asked for; None where there are none.

    Raises InputError as `grams.load_grams`.
    """
    if imatrix is None or not find_grams(imatrix):
        return None
    grams = load_grams(imatrix)
    return Feedback(grams.train, grams.holdout)


def _shared(grams: GramSet, group: str) -> Gram | None:
    """Return what all experts of a layer saw together."""
    parts = [gram for (name, _), gram in grams.inputs.items() if name == group]
    return Gram(np.sum([gram.total for gram in parts], axis=0), sum(gram.n_tokens for gram in parts)) if parts else None


def _shrunk(own: Gram | None, shared: Gram) -> FloatArray:
    if own is None:
        return shared.mean
    n = len(shared.total)
    return (own.total + n * shared.mean) / np.float32(own.n_tokens + n)


def _are_enough(train: Gram, holdout: Gram) -> bool:
    return holdout.n_tokens > 0 and train.n_tokens >= MIN_TOKENS_PER_COLUMN * len(train.total)


def describe_feedback(source: Source, compensate: Compensate, stored: Feedback | None, *, is_sequential: bool) -> str:
    """Return in a line what error feedback will do with a model."""
    effort = "thoroughly, down to single codes" if compensate.effort(source.n_weights) is FULL else "around the encoder, briefly over single codes"
    if stored is not None:
        basis = f"the matrices beside the imatrix, with{'' if stored.train.weighted else 'out'} gradients"
    else:
        basis = "gradients from a backward pass" if source.is_checkpoint else "inputs alone: a GGUF gives no gradients, a checkpoint folder would"
    sequence = "; each layer for the inputs it gets in the file" if is_sequential else ""
    return f"error feedback: {effort}, under {basis}{sequence}"


def kept_bytes(source: Source, chunks: Chunks, max_memory_bytes: int) -> int:
    """Return how many bytes of hidden states `run_feedback` keeps at most to go on from; 0 for a pass that starts anew, because
    it does not go layer by layer."""
    return plan_gradient_pass(source.path, *chunks.tokens.shape, max_memory_bytes=max_memory_bytes).stored_bytes if source.is_checkpoint else 0


def run_feedback(
    source: Source,
    chunks: Chunks,
    tell: Callable[[int | None, Feedback], None],
    *,
    n_threads: int,
    device: str = "cpu",
    max_memory_bytes: int = DEFAULT_MAX_MEMORY_BYTES,
    progress: Progress | None = None,
    work: Path | None = None,
    wanted: Collection[int | None] | None = None,
) -> PassResult:
    """Run the calibration chunks through a model, and `tell` the matrices of one layer after another, then (None) those of none.

    work: a folder for the `kept_bytes` of a pass that has any; the layers that it has finished there
    (`hidden_states.finished_layers`) are not told again. wanted: layers whose matrices are needed, default all; others are told
    where it costs nothing. Raises as `activations.collect_grams_from_checkpoint` and `activations.collect_grams_from_gguf`.
    """
    _, holdout = split_holdout(chunks.n_chunks, SEED)

    def sink(layer: int | None, train: GramSet, rest: GramSet) -> None:
        tell(layer, Feedback(train, rest))

    if source.is_checkpoint:
        return collect_grams_from_checkpoint(
            source.path,
            chunks.tokens,
            [],
            sink=sink,
            holdout=holdout.tolist(),
            label_seed=SEED,
            n_threads=n_threads,
            documents=chunks.documents,
            device=device,
            max_memory_bytes=max_memory_bytes,
            progress=progress,
            work=work,
        )
    return collect_grams_from_gguf(
        source.path,
        chunks.tokens,
        [],
        sink=sink,
        holdout=holdout.tolist(),
        shapes={tensor.name: tensor.shape for tensor in source.tensors},
        n_threads=n_threads,
        documents=chunks.documents,
        max_memory_bytes=max_memory_bytes,
        progress=progress,
        wanted=wanted,
    )
