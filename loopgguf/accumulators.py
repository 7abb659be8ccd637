"""What is summed up while activations pass by: arrays only, no files, no models, no torch.

An engine (`activations.py` with llama.cpp, `layerwise.py` with torch) shows every weight's inputs to accumulators, and
on request its outputs, the gradients there, and attention probabilities. Which of these an accumulator wants is told
by the methods it has (the protocols below). Results are sums and counts, so that parts can be added; `GramSet` and
`GramStatistics` hold those that error feedback needs. Names and row order are the GGUF's.
Sources: tools/imatrix/imatrix.cpp (`IMatrixCollector`), GuidedQuant (arXiv 2505.07004), YAQA (arXiv 2505.22988).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True)
class HoldoutSplit:
    """Accumulators for the chunks numbered in `chunks`, and others for the rest."""

    train: Sequence[Accumulator]
    holdout: Sequence[Accumulator]
    chunks: frozenset[int]
