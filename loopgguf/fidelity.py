"""A GGUF against its reference below the level of tokens: the weights of every tensor, and the output of every block.

Tensors are decoded slab by slab beside the reference's; blocks are compared on the same tokens through llama.cpp's eval
callback, so that what is measured includes all that the blocks before have lost. What a token makes of it is
`evaluation.py`'s affair. Judges nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from loopgguf import ggml
from loopgguf.activations import GgmlTensor, read_tensor
from loopgguf.errors import InputError, UsageError
from loopgguf.evaluation import Measure, mean_measure
from loopgguf.formats import FORMATS, INTEGER_TYPES, GgmlType
from loopgguf.llama import Context, Model
from loopgguf.loss import first_scored
from loopgguf.progress import Progress
from loopgguf.source import Source, Tensor, open_source

FloatArray = NDArray[np.float32]

LEVELS = ("tensor", "layer")  # besides that of the model, which is always measured
ERROR_QUANTILES_PERCENT = (50.0, 90.0, 99.0, 100.0)
BLOCK_OUTPUT = b"l_out-"  # llama.cpp's name of what a block adds to the stream, before its number
_SLAB_WEIGHTS = 1 << 18
_N_BINS = 1 << 15  # of |error|: the upper 16 bits of its float32, that is 2⁷ bins for each power of two


@dataclass(frozen=True)
class TensorFidelity:
    """How far the decoded weights ŵ of a tensor are from the reference's w.

    mae: mean |ŵ − w|, in the unit of the weights, as the quantiles of |ŵ − w| by percent (within 0.4 %; 100 is the exact
    maximum). relative_error: ‖ŵ − w‖² / ‖w‖²; snr_db: the same as a signal-to-noise ratio, None where nothing is lost.
    """

    name: str
    type: GgmlType
    n_weights: int
    bpw: float
    mae: float
    relative_error: float
    snr_db: float | None
    abs_error_quantiles: Mapping[float, float]


@dataclass(frozen=True)
class LayerFidelity:
    """How close the output of a block is to the reference's, both models having run the same tokens from the start.

    cosine: mean over tokens of the cosine similarity; relative_error: ‖ŷ − y‖² / ‖y‖². Standard errors are over chunks.
    """

    layer: int
    cosine: Measure
    relative_error: Measure


@dataclass(frozen=True)
class Fidelity:
    """What was measured of one file; empty where a level was not asked for. Tensors that are copies of the reference's are not among them."""

    tensors: tuple[TensorFidelity, ...] = ()
    layers: tuple[LayerFidelity, ...] = ()


def parse_levels(text: str) -> tuple[str, ...]:
    """Return the levels named in a list with commas; raise UsageError for one that is not known."""
    levels = tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    unknown = [level for level in levels if level not in LEVELS]
    if unknown or not levels:
        raise UsageError(f"--levels: got {', '.join(unknown) or 'none'}, expected some of {', '.join(LEVELS)}, with commas between")
    return levels


# --- tensors ----------------------------------------------------------------------------------------------------------


class _Errors:
    """Sums over the errors of one tensor, slab by slab; what is kept does not grow with the tensor."""

    def __init__(self) -> None:
        self.n = 0
        self.absolute = self.squared = self.energy = self.largest = 0.0
        self._counts = np.zeros(_N_BINS, np.int64)

    def add(self, rows: FloatArray, decoded: FloatArray) -> None:
        error = np.abs(decoded - rows)
        self.n += error.size
        self.absolute += float(error.sum(dtype=np.float64))
        self.squared += float(np.square(error, dtype=np.float64).sum())
        self.energy += float(np.square(rows, dtype=np.float64).sum())
        self.largest = max(self.largest, float(error.max()))
        self._counts += np.bincount(error.ravel().view(np.uint32) >> 16, minlength=_N_BINS)

    def quantile(self, percent: float) -> float:
        """Return the middle of the bin of |error| that holds the quantile."""
        if percent == 100.0:
            return self.largest
        place = int(np.searchsorted(np.cumsum(self._counts), percent / 100 * self.n))
        middle = float(np.array(place << 16 | 1 << 15, np.uint32).view(np.float32)) if place else 0.0
        return min(middle, self.largest)


def snr_db(relative_error: float) -> float | None:
    """Return a relative error ‖ŵ − w‖² / ‖w‖² as a signal-to-noise ratio in decibels; None where nothing is lost."""
    return -10 * math.log10(relative_error) if relative_error else None


def measure_tensor(candidate: Tensor, reference: Tensor) -> TensorFidelity:
    """Return how far a tensor's weights are from the reference's; raises InputError for other shapes or values that are not finite."""
    if candidate.shape != reference.shape:
        raise InputError(f"shape of {candidate.name}: got {candidate.shape}, expected {reference.shape} as in the reference. Give the model it was made from")
    sums, step = _Errors(), max(1, _SLAB_WEIGHTS // reference.n_in)
    for start in range(0, reference.n_rows, step):
        stop = min(start + step, reference.n_rows)
        sums.add(*(ggml.decode_rows(tensor.type, tensor.read_rows(start, stop)) for tensor in (reference, candidate)))
    if not math.isfinite(sums.squared + sums.energy):
        raise InputError(f"tensor {candidate.name}: got NaN or infinite weights, expected finite ones in both files. `loopgguf verify` says which is damaged")
    relative = sums.squared / sums.energy if sums.energy else float(sums.squared > 0)
    quantiles = {percent: sums.quantile(percent) for percent in ERROR_QUANTILES_PERCENT}
    bpw = FORMATS[candidate.type].bpw
    return TensorFidelity(candidate.name, candidate.type, sums.n, bpw, sums.absolute / sums.n, relative, snr_db(relative), quantiles)


def measure_tensors(candidate: Source, reference: Source, *, n_threads: int, progress: Progress | None = None) -> tuple[TensorFidelity, ...]:
    """Return the errors of all tensors of a file that are not copies of the reference's, in the file's order.

    Memory is bounded by a slab of rows for each thread. Raises InputError for a tensor that only one of them has.
    """
    known = {tensor.name: tensor for tensor in reference.tensors}
    if odd := known.keys() ^ {tensor.name for tensor in candidate.tensors}:
        raise InputError(f"tensors of {candidate.path}: {min(odd)} is in only one of it and {reference.path}, expected the same in both")
    tensors = [tensor for tensor in candidate.tensors if tensor.type not in INTEGER_TYPES]
    measured = []
    with ThreadPoolExecutor(n_threads) as pool:
        for n_done, result in enumerate(pool.map(lambda tensor: measure_tensor(tensor, known[tensor.name]), tensors), 1):
            if result.relative_error or result.type is not known[result.name].type:
                measured.append(result)
            if progress is not None:
                progress("errors of tensors", n_done, len(tensors))
    return tuple(measured)


# --- blocks -----------------------------------------------------------------------------------------------------------


class _BlockWatch:
    """The eval callback: gives `take` the number and the output (n_tokens, n_embd) of each block, as a view.

    The last block computes only the tokens whose logits are asked for, so of each only as many are given: the last ones.
    An exception must not leave a ctypes callback; it is kept in `error`, and ends the graph.
    """

    def __init__(self, n_tokens: int) -> None:
        self.n_tokens = n_tokens
        self.take: Callable[[int, FloatArray], None] = lambda layer, output: None
        self.error: BaseException | None = None

    def __call__(self, address: int, ask: bool) -> bool:
        try:
            node = GgmlTensor.from_address(address)
            is_output = node.name.startswith(BLOCK_OUTPUT) and node.name[len(BLOCK_OUTPUT) :].isdigit() and node.type == GgmlType.F32
            if not ask:
                self.take(int(node.name[len(BLOCK_OUTPUT) :]), read_tensor(node, "<f4")[0, 0, -self.n_tokens :])
        except BaseException as error:  # noqa: BLE001  (raised again in `_Blocks.run`; Ctrl-C arrives here too)
            self.error = self.error or error
            return False
        return not ask or is_output


class _Blocks:
    """One GGUF whose blocks can be watched; a context manager."""

    def __init__(self, path: Path, n_ctx: int, n_threads: int) -> None:
        self.path, self._stack, self._first = path, ExitStack(), first_scored(n_ctx)
        self._watch = _BlockWatch(n_ctx - self._first)
        try:
            model = self._stack.enter_context(Model(path))
            self._context = self._stack.enter_context(Context(model, n_ctx, n_threads=n_threads, callback=self._watch))
        except BaseException:
            self._stack.close()
            raise

    def run(self, chunk: NDArray[np.int32], take: Callable[[int, FloatArray], None]) -> None:
        """Run a chunk and give `take` each block's output at the scored positions."""
        self._watch.take = take
        self._context.decode(chunk, first_logits=self._first)
        if self._watch.error is not None:
            raise self._watch.error

    def __enter__(self) -> _Blocks:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def compare_outputs(candidate: FloatArray, reference: FloatArray) -> tuple[float, float]:
    """Return (mean cosine similarity over tokens, ‖ŷ − y‖² / ‖y‖²) of outputs (n_tokens, n_embd); alike zeros are alike."""
    ours, theirs = candidate.astype(np.float64), reference.astype(np.float64)
    dot, a, b = (np.einsum("te,te->t", x, y) for x, y in ((ours, theirs), (ours, ours), (theirs, theirs)))
    scale = np.sqrt(a * b)
    cosine = np.where(scale > 0, dot / np.where(scale > 0, scale, 1.0), (a == b).astype(np.float64))
    lost, energy = float(np.square(ours - theirs).sum()), float(b.sum())
    return float(cosine.mean()), lost / energy if energy else float(lost > 0)


def measure_layers(
    candidates: Sequence[Path], reference: Path, tokens: NDArray[np.int32], *, n_threads: int, progress: Progress | None = None
) -> list[tuple[LayerFidelity, ...]]:
    """Return for each of the GGUFs how close its blocks' outputs are to those of the GGUF `reference`, in their order.

    tokens: (n_chunks, n_ctx) int32, as `evaluation.measure_qualities` takes them; the second half of each chunk is
    compared. Of the reference one chunk's outputs are held: n_ctx / 2 × n_embd float32 for each block. Raises InputError
    for files whose blocks differ, or of which llama.cpp names no output.
    """
    scores: list[dict[int, list[tuple[float, float]]]] = [{} for _ in candidates]
    with ExitStack() as stack:
        base, *ours = (stack.enter_context(_Blocks(path, tokens.shape[1], n_threads)) for path in (reference, *candidates))
        for number, chunk in enumerate(tokens, 1):
            expected: dict[int, FloatArray] = {}
            base.run(chunk, lambda layer, output, held=expected: held.__setitem__(layer, output.copy()))  # type: ignore[misc]
            if not expected:
                raise InputError(f"blocks of {reference}: llama.cpp names no output of them for this architecture. Leave `layer` out of --levels")
            for blocks, found in zip(ours, scores, strict=True):
                blocks.run(chunk, _comparer(blocks.path, expected, found))
            if progress is not None:
                progress("outputs of blocks", number, len(tokens))
    return [tuple(_layer(layer, found[layer]) for layer in sorted(found)) for found in scores]


def _comparer(path: Path, expected: Mapping[int, FloatArray], found: dict[int, list[tuple[float, float]]]) -> Callable[[int, FloatArray], None]:
    """Return what compares the outputs of one chunk's blocks and appends to `found`."""

    def compare(layer: int, output: FloatArray) -> None:
        if layer not in expected or expected[layer].shape != output.shape:
            raise InputError(f"block {layer} of {path}: its output is not shaped as the reference's. Give the model it was made from as reference")
        found.setdefault(layer, []).append(compare_outputs(output, expected[layer]))

    return compare


def _layer(layer: int, chunks: Sequence[tuple[float, float]]) -> LayerFidelity:
    cosines, errors = np.array(chunks).T
    return LayerFidelity(layer, mean_measure(cosines), mean_measure(errors))


def measure_fidelities(
    candidates: Sequence[Path], reference: Path, tokens: NDArray[np.int32], levels: Sequence[str], *, n_threads: int, progress: Progress | None = None
) -> list[Fidelity]:
    """Return what the levels that were asked for say of each GGUF, in their order; raises as `measure_tensors` and `measure_layers`."""
    tensors: list[tuple[TensorFidelity, ...]] = [() for _ in candidates]
    layers: list[tuple[LayerFidelity, ...]] = [() for _ in candidates]
    if "tensor" in levels:
        source = open_source(reference)
        tensors = [measure_tensors(open_source(path), source, n_threads=n_threads, progress=progress) for path in candidates]
    if "layer" in levels:
        layers = measure_layers(candidates, reference, tokens, n_threads=n_threads, progress=progress)
    return [Fidelity(*parts) for parts in zip(tensors, layers, strict=True)]
