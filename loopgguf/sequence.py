"""The sequence: a checkpoint is run beside the file that is being made of it, so that each layer is encoded for the inputs it
will get there.

Layer by layer, and inside a layer input by input (queries, keys and values; attention output; gate and up; down), the
linears of one input are encoded once its drift is known, and what comes after sees what they have become. Torch runs both,
float32, the file's weights read from the part that is written so far. Hidden states of the two models are kept, and the
weights of one layer of each; to reach an input, its layer is run from the start as far as there. Encodes nothing itself.
Torch is imported by the functions that need it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loopgguf.accumulators import document_starts, refuse_non_finite, split_holdout, to_numpy
from loopgguf.architectures import input_group
from loopgguf.compensate import column_parts
from loopgguf.drift import Drift, Moments
from loopgguf.hidden_states import HiddenStates, StateStorage
from loopgguf.layerwise import DEFAULT_MAX_MEMORY_BYTES, torch_settings
from loopgguf.progress import Meter, Progress
from loopgguf.torch_model import FindTensor, StreamedModel

if TYPE_CHECKING:
    import torch

TokenArray = NDArray[np.int32]
OnInput = Callable[[Sequence[str], Drift], None]

N_CHUNKS = 48  # of the calibration text, evenly spread: more of them measured no better
PHASE = "sequence"


def pick_chunks(n_chunks: int, seed: int) -> tuple[list[int], list[int]]:
    """Return the numbers of the chunks that a drift is measured on, for use and held out: evenly spread over those of
    `accumulators.split_holdout`, `N_CHUNKS` together at most."""
    train, holdout = split_holdout(n_chunks, seed)
    n_holdout = min(len(holdout), max(1, N_CHUNKS // 10))
    return _spread(train, N_CHUNKS - n_holdout), _spread(holdout, n_holdout)


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
    it, with the names of these weights.

    chunks: (n_chunks, n_ctx) int32, of which `pick_chunks` are run. written: the tensors that the file has so far, by GGUF
    name; after `on_input` it has those it was told of. max_columns: as in `compensate.compensate`. documents: as in
    `layerwise.collect_from_checkpoint`, with the errors of which it raises.
    """
    train, holdout = pick_chunks(len(chunks), seed)
    numbers = [*train, *holdout]
    with torch_settings(n_threads, device), ExitStack() as stack:
        starts = [document_starts(None if documents is None else documents[c]) for c in numbers]
        sides = [
            stack.enter_context(_side(StreamedModel(folder, attention="sdpa", device=device, written=find), chunks[numbers], starts, max_memory_bytes // 2))
            for find in (lambda _name: None, written)
        ]
        _Sequence(sides, len(train), wants, on_input, max_columns, Meter(progress, PHASE, len(numbers) * chunks.shape[1], 0)).run()


class DriftSums:
    """Sums up H̃ and C of one input over tokens, float32, in blocks of columns `parts`: what lies between two of them is left out.

    Two square matrices per block; numpy arrays or torch tensors alike, which stay on their device.
    """

    def __init__(self, parts: Sequence[slice]) -> None:
        self.parts, self.n_tokens = parts, 0
        self._sums: list[tuple[Any, Any]] = []

    def add(self, X: Any, Y: Any) -> None:
        """Add the inputs X (n_tokens, n_in) that the model has, and those that the file so far has, Y."""
        new = [(Y[:, part].T @ Y[:, part], (X[:, part] - Y[:, part]).T @ Y[:, part]) for part in self.parts]
        if self._sums:
            for (second, cross), (more_second, more_cross) in zip(self._sums, new, strict=True):
                second += more_second
                cross += more_cross
        else:
            self._sums = new
        self.n_tokens += len(X)

    def take(self) -> tuple[Moments, ...]:
        """Return the means, by block, and forget the sums."""
        taken, n_tokens = self._sums, self.n_tokens
        self._sums, self.n_tokens = [], 0
        return tuple(Moments(part, *(to_numpy(total / n_tokens) for total in both)) for part, both in zip(self.parts, taken, strict=True))


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
        self.meter.n_steps = self.n_chunks * (n_layers + sum(map(len, wanted)))
        for layer in range(n_layers):
            for weights in wanted[layer]:
                self.on_input(list(weights), self.measure(layer, weights))
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
        name, paths, sums = next(iter(weights)), list(weights.values()), list[DriftSums]()
        with self.weights_of(layer):
            for c in range(self.n_chunks):
                X, Y = (side.input_of(layer, c, paths) for side in self.sides)
                refuse_non_finite(name, to_numpy((X + Y).sum(0)))
                if not sums:
                    parts = column_parts(X.shape[1], self.max_columns)
                    sums = [DriftSums(parts), DriftSums(parts)]
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
