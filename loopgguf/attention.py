"""How much attention each position of a chunk receives, per layer and head: summed up, saved beside an imatrix, read again.

`NAME.imatrix.gguf` → `NAME.imatrix.attention.safetensors`, which holds for every layer `blk.N.positions` (n_head, n_ctx)
and `blk.N.first` (n_head,), both float32 and shares of all attention that was paid. Error feedback can weigh tokens by it
where there are no gradients (RSQ, arXiv 2503.01820), and the sink shows as a first token that holds most of it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loopgguf.accumulators import Sums
from loopgguf.architectures import tensor_role
from loopgguf.container import refuse_existing, write_file
from loopgguf.errors import InputError
from loopgguf.grams import imatrix_stem
from loopgguf.safetensor import read_array, read_safetensors, write_safetensors

FloatArray = NDArray[np.float32]

_ENTRY = re.compile(r"blk\.(\d{1,6})\.(positions|first)")


@dataclass(frozen=True)
class LayerAttention:
    """The shares of a layer's attention by head: at each position of a chunk, (n_head, n_ctx), rows summing to 1, and at
    the first tokens of documents, (n_head,): position 0 where a chunk is one document."""

    positions: FloatArray
    first: FloatArray


class AttentionMass(Sums):
    """An accumulator of the attention that each position of a chunk receives from all queries, per layer and head."""

    def __init__(self) -> None:
        super().__init__()
        self._starts: list[int] = [0]

    def begin_chunk(self, number: int, starts: Sequence[int]) -> None:
        """Take down which positions of the chunk to come are the first of a document."""
        self._starts = list(starts)

    def add(self, name: str, matrix: int | None, X: FloatArray) -> None:
        """Nothing: attention alone matters."""

    def add_attention(self, layer: int, A: FloatArray) -> None:
        """Add probabilities A (n_head, n_queries, n_keys) float32 of one chunk."""
        key = (f"blk.{layer}.attention", None)
        mass = A.sum(axis=1, dtype=np.float64)
        self._accumulate("mass", key, mass)
        self._accumulate("first", key, mass[:, self._starts].sum(axis=1))
        self._accumulate("queries", key, np.array(A.shape[1], np.int64))

    def layers(self) -> dict[int, LayerAttention]:
        """Return the shares by layer."""
        mass, first, queries = (self._by_key(what) for what in ("mass", "first", "queries"))
        found = {tensor_role(name).layer or 0: (name, matrix) for name, matrix in mass}
        return {
            layer: LayerAttention((mass[key] / queries[key]).astype(np.float32), (first[key] / queries[key]).astype(np.float32))
            for layer, key in sorted(found.items())
        }


def attention_path(imatrix: Path) -> Path:
    """Return where the attention of the pass that made an imatrix lies."""
    return imatrix.with_name(f"{imatrix_stem(imatrix)}.attention.safetensors")


def refuse_existing_attention(imatrix: Path, *, overwrite: bool) -> None:
    """Raise OutputError when there is a file beside an imatrix that may not be overwritten."""
    refuse_existing(attention_path(imatrix), overwrite=overwrite)


def save_attention(layers: Mapping[int, LayerAttention], imatrix: Path, *, overwrite: bool = False) -> None:
    """Write the shares beside an imatrix. Raises OutputError when the file exists and may not be overwritten, or cannot be written."""
    arrays = {f"blk.{layer}.{what}": getattr(shares, what) for layer, shares in layers.items() for what in ("positions", "first")}
    stream = io.BytesIO()
    write_safetensors(stream.write, arrays)
    write_file(attention_path(imatrix), stream.getvalue(), overwrite=overwrite)


def load_attention(imatrix: Path) -> dict[int, LayerAttention]:
    """Return the shares beside an imatrix by layer; none where there is no such file. Raises InputError for a malformed one."""
    path = attention_path(imatrix)
    if not path.exists():
        return {}
    found: dict[int, dict[str, FloatArray]] = {}
    for name, stored in read_safetensors(path)[1].items():
        match = _ENTRY.fullmatch(name)
        n_dims = {"positions": 2, "first": 1}[match[2]] if match else 0
        if match is None or stored.dtype != "F32" or len(stored.shape) != n_dims:
            raise _refuse(path, f"tensor {name!r:.120}", f"{stored.dtype} {stored.shape}", "F32 blk.N.positions (n_head, n_ctx) and blk.N.first (n_head,)")
        found.setdefault(int(match[1]), {})[match[2]] = read_array(stored)
    for layer, arrays in found.items():
        if len(arrays) != 2 or len(arrays["positions"]) != len(arrays["first"]) or not all(np.isfinite(array).all() for array in arrays.values()):
            raise _refuse(path, f"layer {layer}", {what: array.shape for what, array in arrays.items()}, "finite positions and first of the same heads")
    return {layer: LayerAttention(arrays["positions"], arrays["first"]) for layer, arrays in sorted(found.items())}


def _refuse(path: Path, what: str, got: object, expected: str) -> InputError:
    return InputError(f"{what} in {path}: got {got!s:.120}, expected {expected}. Make it again with `loopgguf imatrix --attention`")
