"""imatrix: collect, load, check coverage, save. STUB: dataclasses only for now."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Columns:
    """Σx² per input column of one weight: sum_squares (n_matrices, n_in), counts (n_matrices,) of token rows, float32."""

    sum_squares: NDArray[np.float32]
    counts: NDArray[np.float32]


@dataclass(frozen=True)
class Statistics:
    """What calibration text says about the inputs of each weight, by GGUF tensor name."""

    columns: Mapping[str, Columns]
    datasets: tuple[str, ...]
    n_chunks: int
    chunk_size: int

    def importance(self, name: str) -> NDArray[np.float32] | None:
        """Return mean x² per column, (n_matrices, n_in) float32, exactly as llama-quantize normalises it; None if unseen."""
        raise NotImplementedError
