"""The sequence: a checkpoint is run beside the file that is being made of it, so that each layer is encoded for the inputs it
will get there.

Layer by layer, and inside a layer input by input (queries, keys and values; attention output; gate and up; down), the
linears of one input are encoded once its drift is known, and what comes after sees what they have become. Torch runs both,
float32, the file's weights read from the part that is written so far. Hidden states of the two models are kept, and the
weights of one layer of each; to reach an input, its layer is run from the start as far as there. Encodes nothing itself.
Torch is imported by the functions that need it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loopgguf.accumulators import document_starts, refuse_non_finite, split_holdout, to_numpy
from loopgguf.architectures import input_group
from loopgguf.compensate import column_parts
from loopgguf.curvature import add_outer, whole
from loopgguf.drift import Drift, Moments, are_enough
from loopgguf.hidden_states import HiddenStates, StateStorage
from loopgguf.layerwise import DEFAULT_MAX_MEMORY_BYTES, torch_settings
from loopgguf.progress import Meter, Progress
from loopgguf.torch_model import FindTensor, StreamedModel

if TYPE_CHECKING:
    import torch

TokenArray = NDArray[np.int32]
OnInput = Callable[[Sequence[str], Drift | None], None]

TOKENS_PER_COLUMN = 16  # of the widest input, where the text has so many: of 4, 8 and 16 the best measured; time grows with them
PHASE = "sequence"
_BLOCK = 512  # rows of a product at a time: bounds its memory


def pick_chunks(n_chunks: int, n_ctx: int, n_in: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the numbers of the chunks that drifts of n_in columns are measured on, for use and held out: evenly spread over those of
    `accumulators.split_holdout`, a tenth of them held out."""
    n = math.ceil(TOKENS_PER_COLUMN * n_in / n_ctx)
    train, holdout = split_holdout(n_chunks, seed)
    return _spread(train, n), _spread(holdout, math.ceil(n / 10))


def _spread(numbers: NDArray[np.int64], n: int) -> list[int]:
    return [int(numbers[i]) for i in np.linspace(0, len(numbers) - 1, min(n, len(numbers))).astype(int)]


def run_sequence(
    folder: Path,
    chunks: TokenArray,
    written: FindTensor,
    on_input: OnInput,
    *,
    wants: Callable[[str], bool],
    seed: int,
    n_threads: int,
    max_columns: int | None = None,
    documents: TokenArray | None = None,
    device: str = "cpu",
    max_memory_bytes: int = DEFAULT_MAX_MEMORY_BYTES,
    progress: Progress | None = None,
) -> None:
    """Go through a checkpoint folder's layers, and tell `on_input` the drift of every input that is read by a weight that `wants`
    it, with the names of these weights; None for one of which there are too few tokens to know it.

    chunks: (n_chunks, n_ctx) int32, of which `pick_chunks` are run. written: the tensors that the file has so far, by GGUF
    name; after `on_input` it has those it was told of. max_columns: as in `compensate.compensate`. documents: as in
    `layerwise.collect_from_checkpoint`, with the errors of which it raises.
    """
    with torch_settings(n_threads, device), ExitStack() as stack:
        models = [StreamedModel(folder, attention="sdpa", device=device, written=find) for find in (lambda _name: None, written)]
        n_chunks, n_ctx = chunks.shape
        widest = column_parts(max(shape[-1] for shape in models[0].shapes(0).values()), max_columns)[0]
        train, holdout = pick_chunks(n_chunks, n_ctx, widest.stop, seed)
        numbers = [*train, *holdout]
        starts = [document_starts(None if documents is None else documents[c]) for c in numbers]
        sides = [stack.enter_context(_side(model, chunks[numbers], starts, max_memory_bytes // 2)) for model in models]
        _Sequence(sides, len(train), wants, on_input, max_columns, Meter(progress, PHASE, len(numbers) * n_ctx, 0)).run()


class DriftSums:
    """Sums up E[x̃ x̃ᵀ] and E[(x − x̃) x̃ᵀ] of one input over tokens, float32, in blocks of columns `parts`: what lies between two of
    them is left out. Two square matrices per block, on the device of what is added."""

    def __init__(self, parts: Sequence[slice]) -> None:
        self.parts, self.n_tokens = parts, 0
        self._sums: list[tuple[torch.Tensor, torch.Tensor]] = []

    def add(self, X: torch.Tensor, Y: torch.Tensor) -> None:
        """Add the inputs X (n_tokens, n_in) that the model has, and those that the file so far has, Y."""
        self._sums = self._sums or [(_zeros(Y, part), _zeros(Y, part)) for part in self.parts]
        for part, (second, cross) in zip(self.parts, self._sums, strict=True):
            add_outer(second, Y[:, part], Y[:, part])
            _add_product(cross, X[:, part] - Y[:, part], Y[:, part])
        self.n_tokens += len(X)

    def take(self) -> tuple[Moments, ...]:
        """Return the means, by block, which take the memory of the sums, and forget those."""
        taken, n = self._sums, self.n_tokens
        self._sums, self.n_tokens = [], 0
        for second, cross in taken:
            second /= n
            cross /= n
        return tuple(Moments(part, whole(second), to_numpy(cross), n) for part, (second, cross) in zip(self.parts, taken, strict=True))


def _zeros(X: torch.Tensor, part: slice) -> torch.Tensor:
    n = part.stop - part.start
    return X.new_zeros((n, n))


def _add_product(total: torch.Tensor, X: torch.Tensor, Y: torch.Tensor) -> None:
    """total += Xᵀ Y in place, some rows at a time."""
    for start in range(0, len(total), _BLOCK):
        total[start : start + _BLOCK] += X[:, start : start + _BLOCK].T @ Y


class _Reached(Exception):
    """Ends the run of a layer where an input is known."""

    def __init__(self, X: torch.Tensor) -> None:
        super().__init__()
        self.X = X


class _Side:
    """One of the two models, and its hidden states before the layer that is at work."""

    def __init__(self, model: StreamedModel, chunks: TokenArray, starts: Sequence[Sequence[int]], states: HiddenStates) -> None:
        self.model, self.starts, self.states, self.n_ctx = model, starts, states, chunks.shape[1]
        model.refuse_tokens(chunks)
        for c, chunk in enumerate(chunks):
            states.write(c, model.embed(chunk))

    def run(self, layer: int, c: int) -> torch.Tensor:
        arguments = self.model.arguments(self.n_ctx, self.starts[c])[layer]
        after: torch.Tensor = self.model.layers[layer](self.states.read(c).to(self.model.device)[None], **arguments)
        return after[0]

    def input_of(self, layer: int, c: int, paths: Sequence[str]) -> torch.Tensor:
        """Return what the modules at these paths of the layer are given of chunk c, (n_ctx, n_in)."""

        def stop(_module: Any, args: tuple[torch.Tensor, ...]) -> None:
            raise _Reached(args[0])

        handles = [self.model.layers[layer].get_submodule(path).register_forward_pre_hook(stop) for path in paths]
        try:
            self.run(layer, c)
        except _Reached as reached:
            return reached.X.reshape(-1, reached.X.shape[-1])
        finally:
            for handle in handles:
                handle.remove()
        raise AssertionError(f"layer {layer} runs without {', '.join(paths)}")

    def advance(self, layer: int, c: int) -> None:
        self.states.write(c, self.run(layer, c))


@contextmanager
def _side(model: StreamedModel, chunks: TokenArray, starts: Sequence[Sequence[int]], max_memory_bytes: int) -> Iterator[_Side]:
    storage = StateStorage((*chunks.shape, model.sizes.n_embd), max_memory_bytes, None)
    try:
        yield _Side(model, chunks, starts, storage.new(PHASE))
    finally:
        storage.close()


class _Sequence:
    """Both models side by side: the checkpoint's, and the file's as far as it is written."""

    def __init__(self, sides: Sequence[_Side], n_train: int, wants: Callable[[str], bool], on_input: OnInput, max_columns: int | None, meter: Meter) -> None:
        self.sides, self.n_train, self.wants, self.on_input, self.max_columns, self.meter = sides, n_train, wants, on_input, max_columns, meter
        self.model = sides[0].model
        self.n_chunks = len(sides[0].starts)

    def run(self) -> None:
        wanted = [self.wanted_inputs(layer) for layer in range(len(self.model.layers))]
        n_layers = max((layer + 1 for layer, inputs in enumerate(wanted) if inputs), default=0)
        measured = sum(self.can_be_known(layer, weights) for layer, inputs in enumerate(wanted) for weights in inputs)
        self.meter.n_steps = self.n_chunks * (max(n_layers - 1, 0) + measured)
        for layer in range(n_layers):
            for weights in wanted[layer]:
                drift = self.measure(layer, weights) if self.can_be_known(layer, weights) else None
                for side in self.sides:
                    side.model.forget()  # the encoders need the memory
                self.on_input(list(weights), drift)
            if layer + 1 < n_layers:
                self.advance(layer)

    def parts_of(self, layer: int, name: str) -> list[slice]:
        """Return the blocks of columns in which the drift of a weight's input is measured."""
        return column_parts(self.model.shapes(layer)[name][-1], self.max_columns)

    def can_be_known(self, layer: int, weights: Mapping[str, str]) -> bool:
        """Tell whether there are enough tokens for the drift of what these weights read."""
        return any(are_enough(self.n_train * self.sides[0].n_ctx, part) for part in self.parts_of(layer, next(iter(weights))))

    def advance(self, layer: int) -> None:
        with self.weights_of(layer):
            for c in range(self.n_chunks):
                for side in self.sides:
                    side.advance(layer, c)
                self.meter.step()

    def wanted_inputs(self, layer: int) -> list[Mapping[str, str]]:
        """Return, for each input of a layer that is wanted, in the order they are run, the weights that read it and want it, with
        their modules' paths."""
        prefix, groups = f"model.layers.{layer}.", dict[str, dict[str, str]]()
        for weight in self.model.family.weights:
            name, group = weight.gguf.format(layer=layer), input_group(weight.gguf.format(layer=layer))
            if "{layer}" in weight.gguf and group is not None and self.wants(name):
                groups.setdefault(group, {})[name] = weight.hf.format(layer=layer).removeprefix(prefix).removesuffix(".weight")
        return list(groups.values())

    def measure(self, layer: int, weights: Mapping[str, str]) -> Drift:
        """Return the drift of the input of these weights, given with their modules' paths."""
        name, paths = next(iter(weights)), list(weights.values())
        sums = [DriftSums(self.parts_of(layer, name)) for _ in ("train", "holdout")]
        with self.weights_of(layer):
            for c in range(self.n_chunks):
                X, Y = (side.input_of(layer, c, paths) for side in self.sides)
                refuse_non_finite(name, to_numpy((X + Y).sum(0)))
                sums[c >= self.n_train].add(X, Y)
                self.meter.step()
        train, holdout = (part.take() for part in sums)
        return Drift(train, holdout)

    @contextmanager
    def weights_of(self, layer: int) -> Iterator[None]:
        """Give both models the layer's weights for the time of the block: those that the file has by now are read anew."""
        with ExitStack() as stack:
            for side in self.sides:
                stack.enter_context(side.model.block([layer]))
            yield
