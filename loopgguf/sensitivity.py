"""How the KLD bends at each weight, from a few chunks of a backward pass: diagonals only, a vector per weight side.

½ Σ_i r_i Σ_j h_j e_ij² estimates the KLD in nats per token that an error E of a weight makes, with r_i the row's mean
squared gradient over the weight's mean, and h = diag(H_w), H_w = Σ_t w_t x_t x_tᵀ / n_tokens, w_t the mean squared
gradient of token t (GuidedQuant, arXiv 2505.07004). Errors of plain encoders are nearly independent from column to
column, so the diagonal does; after error feedback they are not, and a factor for each kind of weight says what becomes of
them (`errortable.FEEDBACK_GAINS`).
Knows no types and decides nothing. Sums are small, so one pass serves any number of plans.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopgguf.accumulators import EMBEDDING, HEAD, refuse_non_finite, to_numpy
from loopgguf.architectures import tensor_role
from loopgguf.checkpoint import write_cached
from loopgguf.curvature import GramSet

FloatArray = NDArray[np.float32]

VERSION = 3  # of the numbers: part of their fingerprint in the cache
# An error of values is alike in all tokens that attention averages over, so it adds up where the formula, which takes
# tokens one by one, has it cancel: measured ÷ estimated is 1.9 on a real model and on the demo, and 0.8 to 1.2 for all others.
_COHERENCE = {"attn_v": 2.0}


@dataclass(frozen=True)
class Sensitivity:
    """How the KLD bends at one weight.

    row_weights: (n_matrices, n_out) float32, each row's mean squared gradient over its matrix's mean. column_weights:
    diag(H_w), (n_matrices, n_in) float32, per token and in nats. is_relative: errors count by the squared length of the
    row they are in, as those of token embeddings do where it is not known how often each is looked up: a norm follows, so a
    short row (a token hardly trained) has gradients as much larger as its errors are smaller.
    """

    row_weights: FloatArray
    column_weights: FloatArray
    is_relative: bool = False


@dataclass(frozen=True)
class Sensitivities:
    """Those of a model, by GGUF tensor name; `fingerprint` names the model, the text and the pass they come from."""

    by_name: Mapping[str, Sensitivity]
    fingerprint: str

    def sensitivity(self, name: str) -> Sensitivity | None:
        return self.by_name.get(name)


class SensitivitySums:
    """An accumulator of Σ g_i² by row and Σ w x_j² by column, in float64, for `layerwise.collect_gradients`."""

    takes_tensors = True

    def __init__(self) -> None:
        self._rows: dict[str, NDArray[np.float64]] = {}
        self._columns: dict[str, NDArray[np.float64]] = {}
        self._n_tokens: dict[str, int] = {}

    def add(self, name: str, matrix: int | None, X: Any) -> None:
        """Take no notice of inputs: they come again with their gradients."""

    def add_gradient(self, name: str, X: Any, G: Any) -> None:
        """Add inputs X (n_tokens, n_in) of weight `name` and the gradients G (n_tokens, n_out) at its output.

        Of the token embeddings X are the rows looked up, and the columns are those of G. Raises InputError for NaN and infinity.
        """
        squares = G * G
        rows = to_numpy(squares.sum(0)).astype(np.float64)
        columns = to_numpy((X * X).sum(1) @ squares if name == EMBEDDING else squares.mean(1) @ (X * X)).astype(np.float64)
        refuse_non_finite(name, columns.astype(np.float32))
        self._rows[name] = self._rows.get(name, 0.0) + rows
        self._columns[name] = self._columns.get(name, 0.0) + columns
        self._n_tokens[name] = self._n_tokens.get(name, 0) + len(G)

    def add_probabilities(self, start: int, n_vocab: int, X: Any, P: Any) -> None:
        """Add inputs X (n_tokens, n_embd) of the head and the probabilities P (n_tokens, rows) of the tokens from `start` on.

        A squared gradient at a logit is p (1 − p) in expectation over the label, so no label's chance is in it.
        """
        squares = P * (1 - P)
        rows, of_tokens = to_numpy(squares.sum(0)), squares.sum(1) / n_vocab
        whole = self._rows.setdefault(HEAD, np.zeros(n_vocab))
        whole[start : start + len(rows)] += rows
        columns = to_numpy(of_tokens @ (X * X).to(of_tokens.dtype) if hasattr(X, "to") else of_tokens @ (X * X)).astype(np.float64)
        self._columns[HEAD] = self._columns.get(HEAD, 0.0) + columns
        self._n_tokens[HEAD] = self._n_tokens.get(HEAD, 0) + (len(X) if start == 0 else 0)

    def take(self, n_vocab: int, fingerprint: str) -> Sensitivities:
        """Return what was summed. A row of the embeddings (n_vocab of them) counts as often as the average token occurs."""
        found = {}
        for name, rows in sorted(self._rows.items()):
            r = np.full(n_vocab, 1 / n_vocab) if name == EMBEDDING else rows / max(float(rows.mean()), np.finfo(np.float64).tiny)
            columns = self._columns[name] / self._n_tokens[name] * _COHERENCE.get(tensor_role(name).kind, 1.0)
            found[name] = Sensitivity(r.astype(np.float32)[None], columns.astype(np.float32)[None], is_relative=name == EMBEDDING)
        return Sensitivities(found, fingerprint)


def from_grams(grams: GramSet, fingerprint: str) -> Sensitivities:
    """Return the sensitivities that Gram matrices tell, read one at a time. A row of the embeddings counts as often as its token occurs."""
    found = {}
    for name, gram in grams.weighted.items():
        r, columns = grams.curvature[name].mean, gram.mean.diagonal() * np.float32(_COHERENCE.get(tensor_role(name).kind, 1.0))
        found[name] = Sensitivity((r / max(float(r.mean()), float(np.finfo(np.float32).tiny)))[None], columns[None])
    if EMBEDDING in grams.outputs and HEAD in grams.weighted:
        found[EMBEDDING] = Sensitivity(grams.curvature[EMBEDDING].mean[None], grams.outputs[EMBEDDING].mean.diagonal().copy()[None])
    return Sensitivities(found, fingerprint)


def save_sensitivities(sensitivities: Sensitivities, path: Path) -> None:
    """Write them as .npz beside nothing else, atomically."""
    arrays: dict[str, Any] = {}
    for name, found in sensitivities.by_name.items():
        arrays[f"rows/{name}"], arrays[f"columns/{name}"] = found.row_weights, found.column_weights
    stream = io.BytesIO()
    np.savez(stream, **arrays)
    write_cached(path, stream.getvalue())


def load_sensitivities(path: Path, fingerprint: str) -> Sensitivities | None:
    """Return what `save_sensitivities` wrote; None where there is no such file, or only a damaged one."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            names = [key.removeprefix("rows/") for key in arrays.files if key.startswith("rows/")]
            return Sensitivities(
                {name: Sensitivity(arrays[f"rows/{name}"], arrays[f"columns/{name}"], is_relative=name == EMBEDDING) for name in names}, fingerprint
            )
    except (FileNotFoundError, zipfile.BadZipFile, ValueError, KeyError, EOFError):
        return None
