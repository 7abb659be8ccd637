"""A checkpoint folder or a GGUF → a stream of Tensor(name, shape, type, rows). STUB: dataclasses only for now."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loopgguf.container import Shape, Value
from loopgguf.formats import GgmlType

ReadRows = Callable[[int, int], NDArray[np.uint8]]


@dataclass(frozen=True)
class Tensor:
    """A weight under its GGUF name: row-major shape (last dimension is the row), stored type, and where its rows are.

    `read_rows(start, stop)` returns rows of the tensor seen as (n_rows, n_in), packed in `type`, as
    (stop - start, row bytes) uint8, C-contiguous; thread-safe. It is the GGUF's row order (q/k already permuted).
    """

    name: str
    shape: Shape
    type: GgmlType
    read_rows: ReadRows = field(repr=False, compare=False)
    shard: int = 0

    @property
    def n_in(self) -> int:
        return self.shape[-1]

    @property
    def n_rows(self) -> int:
        return int(np.prod(self.shape[:-1], dtype=np.int64))

    @property
    def n_matrices(self) -> int:
        """How many matrices are stacked in it: the experts of a 3-D tensor, else 1."""
        return self.shape[0] if len(self.shape) == 3 else 1


@dataclass(frozen=True)
class Source:
    """A model on disk: `metadata` as its GGUF has (or will have) it, tensors by layer then name, its origin."""

    path: Path
    is_checkpoint: bool
    metadata: Mapping[str, Value]
    tensors: tuple[Tensor, ...]
    files: tuple[Path, ...]
    fingerprint: str
