"""The torch engine: a checkpoint folder run by transformers one block of decoder layers at a time, forward and backward.

`collect_from_checkpoint` shows accumulators what every linear is multiplied with; `collect_gradients` shows them the
gradients at the linears' outputs too, for labels drawn from the model's own distribution. Float32 throughout. Weights
are in memory for one block of layers, the head for one slab of the vocabulary; hidden states are in memory or on disk.
Torch and transformers are imported by the functions that need them, and no code from the folder runs.
"""

from __future__ import annotations

import math
import os
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loopgguf.accumulators import EMBEDDING, HEAD, Accumulator, Audience, HoldoutSplit, document_starts
from loopgguf.architectures import find_family, read_hyperparameters
from loopgguf.curvature import GramSums, gram_bytes, plan_passes
from loopgguf.documents import load_json
from loopgguf.errors import InputError
from loopgguf.hidden_states import HiddenStates, StateStorage, finished_layers
from loopgguf.loss import PassResult, first_scored, scored_targets, summarize_pass
from loopgguf.progress import Meter, Progress
from loopgguf.torch_model import VOCAB_SLAB, StreamedModel, WeightEdit, refuse_device

if TYPE_CHECKING:
    import torch

TokenArray = NDArray[np.int32]
OnLayer = Callable[[int], None]
OnProbabilities = Callable[["torch.Tensor"], None]

PHASE = "calibrate"
_LOSSES = "losses.npy"
_SUMS_AT_HEAD = "sums-at-head.npz"
DEFAULT_MAX_MEMORY_BYTES = 2 << 30
_ACTIVATIONS = 24  # floats per token that a backward pass keeps of a layer, in units of hidden + feed-forward size


# --- listening --------------------------------------------------------------------------------------------------------


class _Hooks:
    """The hooks on the layers' linears and attention that show an audience what passes; removed on exit."""

    def __init__(self, model: StreamedModel, layers: Sequence[int], audience: Audience, *, with_gradients: bool = False) -> None:
        import torch

        self.audience, self.with_gradients = audience, with_gradients
        self._handles: list[Any] = []
        for i in layers:
            for path, module in model.layers[i].named_modules():
                if isinstance(module, torch.nn.Linear):
                    name = model.names[f"model.layers.{i}.{path}.weight"]
                    rows = model.source_rows(name)
                    self._handles.append(module.register_forward_hook(self._linear(name, None if rows is None else torch.from_numpy(rows).to(model.device))))
            if audience.wants_attention:
                self._handles.append(model.layers[i].self_attn.register_forward_hook(self._attention(i)))

    def _linear(self, name: str, rows: torch.Tensor | None) -> Callable[..., None]:
        def in_gguf_order(values: torch.Tensor) -> torch.Tensor:
            flat = values.detach().reshape(-1, values.shape[-1])
            return flat if rows is None else flat[:, rows]

        def listen(module: Any, args: tuple[Any, ...], output: torch.Tensor) -> None:
            X = args[0].detach().reshape(-1, args[0].shape[-1])
            self.audience.add(name, None, X)
            if self.audience.wants_output(name):
                self.audience.add_output(name, None, in_gguf_order(output if module.bias is None else output - module.bias))
            if self.with_gradients:
                tell: Any = output.register_hook
                tell(lambda gradient: self.audience.add_gradient(name, X, in_gguf_order(gradient)))

        return listen

    def _attention(self, layer: int) -> Callable[..., None]:
        return lambda _module, _args, output: self.audience.add_attention(layer, output[1][0])

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()


class _Pass:
    """What forward and backward passes share: the model, the chunks, who listens, where hidden states are kept."""

    def __init__(
        self,
        model: StreamedModel,
        chunks: TokenArray,
        documents: TokenArray | None,
        audience: Audience,
        storage: StateStorage,
        progress: Progress | None,
        *,
        process_output: bool,
    ) -> None:
        self.model, self.chunks, self.documents, self.audience, self.storage = model, chunks, documents, audience, storage
        self.process_output = process_output and not model.is_tied
        model.refuse_tokens(chunks)
        self.numbers: Sequence[int] = range(len(chunks))  # of the chunks in the whole text
        self.meter = Meter(progress, PHASE, chunks.size, n_steps=0)  # how many, the kind of pass says

    def starts(self, c: int) -> list[int]:
        """Return the positions at which documents start in chunk c."""
        return document_starts(None if self.documents is None else self.documents[c])

    def begin(self, c: int) -> None:
        """Tell the audience that chunk c follows."""
        self.audience.begin_chunk(self.numbers[c], self.starts(c))

    def show_head(self, X: torch.Tensor) -> None:
        """Show the inputs X (n_ctx, n_embd) of the head: to all where that was asked for, else to those that always want them."""
        if self.process_output:
            self.audience.add(HEAD, None, X)
        else:
            self.audience.add_head(X)

    def run_block(self, layers: Sequence[int], c: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the states (n_ctx, n_embd) of chunk c after these layers, whose weights are in memory."""
        arguments = self.model.arguments(self.chunks.shape[1], self.starts(c))
        hidden = hidden.to(self.model.device)[None]
        for i in layers:
            hidden = self.model.layers[i](hidden, **arguments[i])
        return hidden[0]

    def embed(self) -> HiddenStates:
        states = self.storage.new(self.label("border", 0))
        for c, chunk in enumerate(self.chunks):
            states.write(c, self.model.embed(chunk))
        states.publish()
        return states

    def label(self, kind: str, layer: int) -> str:
        return f"{kind}-{layer}-of-{len(self.model.layers)}"


# --- the head ---------------------------------------------------------------------------------------------------------


class _Scores:
    """ln Σ exp(logit) of every token and the logit of its scored target, gathered slab by slab of the vocabulary."""

    def __init__(self, chunks: TokenArray, documents: TokenArray | None, device: str) -> None:
        import torch

        self.n_ctx = chunks.shape[1]
        self.first = first_scored(self.n_ctx)
        self.is_scored = scored_targets(chunks, documents).reshape(-1)
        self.targets = torch.from_numpy(chunks[:, self.first + 1 :].astype(np.int64)).to(device)
        self.log_total = torch.full(chunks.shape, -math.inf, dtype=torch.float64, device=device)
        self.at_target = torch.full(self.targets.shape, math.nan, dtype=torch.float64, device=device)

    def add(self, c: int, start: int, logits: torch.Tensor, first: int = 0) -> None:
        """Add the logits (tokens from `first`, rows from `start` of the vocabulary) of chunk c."""
        import torch

        total = self.log_total[c, first : first + len(logits)]
        total.copy_(torch.logaddexp(total, torch.logsumexp(logits, dim=1).to(torch.float64)))
        scored = logits[self.first - first : self.n_ctx - 1 - first]
        position = torch.nonzero((self.targets[c] >= start) & (self.targets[c] < start + logits.shape[1]))[:, 0]
        self.at_target[c, position] = scored[position, self.targets[c, position] - start].to(torch.float64)

    def losses(self) -> NDArray[np.float64]:
        """Return −ln p of every scored token, float64."""
        losses: NDArray[np.float64] = (self.log_total[:, self.first : self.n_ctx - 1] - self.at_target).cpu().numpy()
        scored: NDArray[np.float64] = losses.reshape(-1)[self.is_scored]
        return scored


class _Labels:
    """Labels drawn from the model's own distribution, one uniform number per token, and the gradient of −ln p(label).

    The numbers depend on the seed and the chunk's number alone, so labels are the same in whatever order things run.
    """

    def __init__(self, scores: _Scores, numbers: Sequence[int], seed: int, device: str) -> None:
        import torch

        self.scores = scores
        draws = [np.random.default_rng([seed, number]).random(scores.n_ctx) for number in numbers]
        self.left = torch.from_numpy(np.stack(draws)).to(device)  # the part of the draw that the slabs so far have not used up
        self.is_open = torch.ones(self.left.shape, dtype=torch.bool, device=device)

    def gradient(self, c: int, logits: torch.Tensor, rows: torch.Tensor, *, is_last: bool, tell: OnProbabilities | None = None) -> torch.Tensor:
        """Return what a slab adds to the gradient at the head's input: softmax · rows, less the row of a label that lies in it.

        tell: is shown the slab's probabilities, (n_tokens, rows) float64.
        """
        import torch

        p = torch.exp(logits.to(torch.float64) - self.scores.log_total[c][:, None])
        if tell is not None:
            tell(p)
        total = p.sum(dim=1)
        here = self.is_open[c] & ((self.left[c] < total) | is_last)
        token = torch.nonzero(here)[:, 0]
        running = p[token].cumsum(dim=1)
        label = torch.searchsorted(running, self.left[c][token][:, None], right=True)[:, 0].clamp(max=p.shape[1] - 1)
        self.left[c] -= total
        self.is_open[c] &= ~here
        p[token, label] -= 1
        return p.to(torch.float32) @ rows


# --- forward ----------------------------------------------------------------------------------------------------------


class _ForwardPass(_Pass):
    """Every layer in turn over all chunks, then the perplexity."""

    def run(self, on_layer: OnLayer | None) -> PassResult:
        n_layers = len(self.model.layers)
        done = len(finished_layers(self.storage.folder)) if self.storage.folder else 0
        self.meter.n_steps = len(self.chunks) * (n_layers + self.model.n_head_slabs)
        found = self.storage.find(self.label("hidden", done))
        done = 0 if found is None else done
        states = self.embed() if found is None else found
        self.meter.reach(len(self.chunks) * done)
        for i in range(done, n_layers):
            states = self.run_layer(i, states, on_layer)
        self.model.forget()
        with self.model.norm() as norm:
            if self.process_output or self.audience.wants_head:
                for c in range(len(self.chunks)):
                    self.begin(c)
                    self.show_head(norm(states.read(c).to(self.model.device)))
            return summarize_pass(self.score(states, norm))

    def run_layer(self, i: int, states: HiddenStates, on_layer: OnLayer | None) -> HiddenStates:
        after = self.storage.next(states, self.label("hidden", i + 1))
        with self.model.block([i]), _Hooks(self.model, [i], self.audience):
            for c in range(len(self.chunks)):
                self.begin(c)
                after.write(c, self.run_block([i], c, states.read(c)))
                self.meter.step()
        if on_layer is not None:
            on_layer(i)
        after.publish()  # only now is the layer done: what the caller saved of it must never be counted twice
        if after is not states:
            self.storage.drop(states)
        return after

    def score(self, states: HiddenStates, norm: Callable[[torch.Tensor], torch.Tensor]) -> NDArray[np.float64]:
        scores = _Scores(self.chunks, self.documents, self.model.device)
        for start, rows in self.model.head_slabs():
            for c in range(len(self.chunks)):
                hidden = norm(states.read(c)[scores.first :].to(self.model.device))
                scores.add(c, start, hidden @ rows.T, scores.first)
                self.meter.step()
        return scores.losses()


# --- backward ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GradientPlan:
    """How a gradient pass fits into memory: the blocks of layers that are in it together.

    is_whole: everything fits at once, and no hidden states are kept. stored_bytes: of hidden states at the blocks'
    borders, which go to disk where they do not fit.
    """

    blocks: tuple[range, ...]
    is_whole: bool
    stored_bytes: int


def plan_gradient_pass(folder: Path, n_chunks: int, n_ctx: int, *, max_memory_bytes: int = DEFAULT_MAX_MEMORY_BYTES, n_gram_sets: int = 2) -> GradientPlan:
    """Return the plan of `collect_gradients` for these numbers; n_gram_sets: how many `GramSums` listen (0: none)."""
    config = load_json(folder / "config.json")
    family = find_family(config)
    sizes = read_hyperparameters(family, config)
    dimensions = sizes.dimensions
    shapes = {w.gguf: tuple(dimensions[d] for d in w.shape) for w in family.weights if "{layer}" in w.gguf and len(w.shape) > 1}
    shapes = {name.format(layer=0): shape for name, shape in shapes.items()}
    per_layer = 4 * sum(math.prod(shape) for shape in shapes.values()) + n_gram_sets * gram_bytes(shapes, has_gradient=True)
    per_layer += 4 * _ACTIVATIONS * n_ctx * (sizes.n_embd + sizes.n_ff)
    head_bytes = 4 * sizes.n_vocab * sizes.n_embd + 16 * n_ctx * min(sizes.n_vocab, VOCAB_SLAB)
    vocabulary = (sizes.n_vocab, sizes.n_embd)
    kept_bytes = n_gram_sets * gram_bytes({EMBEDDING: vocabulary, HEAD: vocabulary}, has_gradient=True)  # until the end
    if per_layer * sizes.n_layer + head_bytes + kept_bytes <= max_memory_bytes:
        return GradientPlan((range(sizes.n_layer),), True, 0)
    blocks = tuple(plan_passes([per_layer] * sizes.n_layer, max_memory_bytes - kept_bytes))
    return GradientPlan(blocks, False, 4 * n_chunks * n_ctx * sizes.n_embd * (len(blocks) + 2))


def _constant(gradient: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda _after: gradient


class _GradientPass(_Pass):
    """Forward to the labels and back, block by block, or chunk by chunk where the whole model is in memory."""

    def __init__(self, *args: Any, numbers: Sequence[int], label_seed: int, on_layer: OnLayer | None, process_output: bool) -> None:
        super().__init__(*args, process_output=process_output)
        self.numbers, self.label_seed, self.on_layer = numbers, label_seed, on_layer
        self._losses: NDArray[np.float64] | None = None

    def backward(self, layers: Sequence[int], c: int, hidden: torch.Tensor, gradient_of: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """Run the layers on the states before them and return the gradient there; `gradient_of` tells it for those after them."""
        import torch

        self.begin(c)
        with torch.enable_grad():
            before = hidden.to(self.model.device).requires_grad_(True)
            after = self.run_block(layers, c, before)
        torch.autograd.backward(after, gradient_of(after.detach()))
        assert before.grad is not None
        return before.grad

    def head_listener(self, start: int, X: torch.Tensor) -> OnProbabilities | None:
        """Return what shows the audience a slab of the head's probabilities; None where nobody wants it."""
        if not self.audience.wants_head:
            return None
        return lambda P: self.audience.add_probabilities(start, self.model.sizes.n_vocab, X, P)

    def through_norm(self, norm: Callable[[torch.Tensor], torch.Tensor], hidden: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        import torch

        with torch.enable_grad():
            before = hidden.detach().requires_grad_(True)
            after = norm(before)
        torch.autograd.backward(after, gradient)
        assert before.grad is not None
        return before.grad

    def finish(self, layers: Sequence[int]) -> None:
        for i in reversed(layers):
            if self.on_layer is not None:
                self.on_layer(i)

    # the whole model in memory

    def run_whole(self) -> PassResult:
        layers = range(len(self.model.layers))
        self.meter.n_steps = 3 * len(self.chunks)
        losses = []
        with ExitStack() as stack:
            stack.enter_context(self.model.block(layers))
            norm = stack.enter_context(self.model.norm())
            stack.enter_context(_Hooks(self.model, layers, self.audience, with_gradients=True))
            slabs = list(self.model.head_slabs())
            for c in range(len(self.chunks)):
                scores = _Scores(self.chunks[c : c + 1], None if self.documents is None else self.documents[c : c + 1], self.model.device)

                def gradient_of(after: torch.Tensor, c: int = c, scores: _Scores = scores) -> torch.Tensor:
                    normed = norm(after)
                    self.show_head(normed)
                    for start, rows in slabs:
                        scores.add(0, start, normed @ rows.T)
                    labels, total = _Labels(scores, [self.numbers[c]], self.label_seed, self.model.device), None
                    for start, rows in slabs:
                        part = labels.gradient(0, normed @ rows.T, rows, is_last=start == slabs[-1][0], tell=self.head_listener(start, normed))
                        total = part if total is None else total.add_(part)
                    assert total is not None
                    return self.through_norm(norm, after, total)

                embedded = self.model.embed(self.chunks[c])
                gradient = self.backward(layers, c, embedded, gradient_of)
                self.audience.add_gradient(EMBEDDING, embedded.detach().to(self.model.device), gradient)
                losses.append(scores.losses())
                self.meter.step(3)
        self.finish(layers)
        return summarize_pass(np.concatenate(losses))

    # block by block

    def run_streamed(self, blocks: Sequence[range]) -> PassResult:
        self.meter.n_steps = len(self.chunks) * (4 * len(self.model.layers) + 2 * self.model.n_head_slabs)
        found = [(i, states) for i, block in enumerate(blocks) if (states := self.storage.find(self.label("gradient", block.start)))][:1]
        left, gradients = (blocks[: found[0][0]], found[0][1]) if found else (blocks, None)
        borders = self.before_blocks(left)
        gradients = gradients or self.storage.find(self.label("tail", blocks[-1].stop))
        if gradients is None:
            gradients = self.after_head(blocks[-1], borders[-1])
        else:
            self.take_up_head()
        self.meter.reach(self.meter.n_steps - 3 * len(self.chunks) * sum(map(len, left)))
        for block, border in zip(reversed(left), reversed(borders), strict=True):
            gradients = self.run_block_backward(block, border, gradients)
        for c in range(len(self.chunks)):
            self.begin(c)
            embedded, gradient = (values.to(self.model.device) for values in (self.model.embed(self.chunks[c]), gradients.read(c)))
            self.audience.add_gradient(EMBEDDING, embedded, gradient)
        assert self._losses is not None
        return summarize_pass(self._losses)

    def before_blocks(self, blocks: Sequence[range]) -> list[HiddenStates]:
        """Return the states before each of the blocks: those that a job left, or new ones."""
        borders: list[HiddenStates] = []
        for i in range(len(blocks)):
            found = self.storage.find(self.label("border", blocks[i].start))
            borders.append(found or (self.run_block_forward(blocks[i - 1], borders[-1]) if i else self.embed()))
        return borders

    def run_block_forward(self, block: range, before: HiddenStates) -> HiddenStates:
        after = self.storage.new(self.label("border", block.stop))
        with self.model.block(block):
            for c in range(len(self.chunks)):
                after.write(c, self.run_block(block, c, before.read(c)))
                self.meter.step(len(block))
        after.publish()
        return after

    def after_head(self, block: range, border: HiddenStates) -> HiddenStates:
        """Return the gradients at the output of the last block, and keep the losses of the scored tokens and the sums so far."""
        last = self.storage.find(self.label("border", block.stop)) or self.run_block_forward(block, border)
        with self.model.norm() as norm:
            self._losses, gradients = self.differentiate_head(last, norm)
        if self.storage.folder is not None:
            losses, sums = self._losses, dict[str, Any](self.audience.state())
            _save(self.storage.folder / _LOSSES, lambda stream: np.save(stream, losses))
            _save(self.storage.folder / _SUMS_AT_HEAD, lambda stream: np.savez(stream, **sums))
        gradients.publish()
        self.storage.drop(last)
        return gradients

    def take_up_head(self) -> None:
        """Go on from what a job kept in its folder when the head was done: the losses, and what the audience summed up of it."""
        folder = self.storage.folder
        assert folder is not None
        try:
            self._losses = np.load(folder / _LOSSES, allow_pickle=False)
            with (folder / _SUMS_AT_HEAD).open("rb") as stream, np.load(stream, allow_pickle=False) as sums:
                kept = dict(sums)
        except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise InputError(f"job folder {folder} is damaged: got no readable {_LOSSES} and {_SUMS_AT_HEAD}. Start anew with --no-resume") from error
        self.audience.restore(kept)

    def differentiate_head(self, states: HiddenStates, norm: Callable[[torch.Tensor], torch.Tensor]) -> tuple[NDArray[np.float64], HiddenStates]:
        """Return the losses of the scored tokens and the gradients at the last layer's output."""
        gradients = self.storage.new(self.label("tail", len(self.model.layers)))
        scores = _Scores(self.chunks, self.documents, self.model.device)

        def normed(c: int) -> torch.Tensor:
            return norm(states.read(c).to(self.model.device))

        for start, rows in self.model.head_slabs():
            for c in range(len(self.chunks)):
                scores.add(c, start, normed(c) @ rows.T)
                self.meter.step()
        labels = _Labels(scores, self.numbers, self.label_seed, self.model.device)
        for start, rows in self.model.head_slabs():
            is_last = start + len(rows) == self.model.sizes.n_vocab
            for c in range(len(self.chunks)):
                X = normed(c)
                self.begin(c)
                if start == 0:
                    self.show_head(X)
                part = labels.gradient(c, X @ rows.T, rows, is_last=is_last, tell=self.head_listener(start, X))
                gradients.write(c, part if start == 0 else part.add_(gradients.read(c).to(self.model.device)))
                self.meter.step()
        for c in range(len(self.chunks)):
            hidden, gradient = states.read(c).to(self.model.device), gradients.read(c).to(self.model.device)
            gradients.write(c, self.through_norm(norm, hidden.clone(), gradient))
        return scores.losses(), gradients

    def run_block_backward(self, block: range, border: HiddenStates, gradients: HiddenStates) -> HiddenStates:
        """Show the block's activations and gradients and return the gradients before it."""
        before = self.storage.next(gradients, self.label("gradient", block.start))
        with self.model.block(block), _Hooks(self.model, block, self.audience, with_gradients=True):
            for c in range(len(self.chunks)):
                gradient = gradients.read(c).to(self.model.device)
                before.write(c, self.backward(block, c, border.read(c).clone(), _constant(gradient)))
                self.meter.step(3 * len(block))
        self.finish(block)
        before.publish()
        for states in {id(s): s for s in (border, gradients) if s is not before}.values():
            self.storage.drop(states)
        return before


# --- doors ------------------------------------------------------------------------------------------------------------


def _save(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write a part of a job, durably: what is published after it relies on it."""
    with path.open("wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def torch_settings(n_threads: int, device: str) -> Iterator[None]:
    """Run without gradients on `n_threads` threads; leaves torch as it was. Raises UsageError for a device that is not there."""
    import torch

    refuse_device(device)
    n_before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        with torch.no_grad():
            yield
    finally:
        torch.set_num_threads(n_before)


def collect_from_checkpoint(
    folder: Path,
    chunks: TokenArray,
    accumulators: Sequence[Accumulator],
    *,
    n_threads: int,
    split: HoldoutSplit | None = None,
    documents: TokenArray | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    process_output: bool = False,
    max_memory_bytes: int = DEFAULT_MAX_MEMORY_BYTES,
    edits: Sequence[WeightEdit] = (),
    on_layer: OnLayer | None = None,
    work: Path | None = None,
) -> PassResult:
    """Return the perplexity of running chunks (n_chunks, n_ctx) int32 through a checkpoint folder, in float32.

    The accumulators get the inputs of every linear of the decoder layers under its GGUF name, and what else they listen
    to; with `process_output` also of an untied head. split: others, by the chunk's number. documents:
    (n_chunks, n_ctx) int32 numbers the documents of each chunk; attention stays inside them. Hidden states of all chunks
    above `max_memory_bytes` go to a temporary file. on_layer(i) is called when layer i has been shown to the end. work: a job
    folder in which every finished layer's states are kept, so that the same call goes on after `finished_layers(work)`.
    Raises InputError for a folder that is incomplete, unsupported or damaged, OutputError when the disk is too small.
    """
    audience = Audience(accumulators, split)
    with torch_settings(n_threads, device):
        model = StreamedModel(folder, attention="eager" if audience.wants_attention else "sdpa", device=device, edits=edits)
        storage = StateStorage((*chunks.shape, model.sizes.n_embd), max_memory_bytes, work)
        run = _ForwardPass(model, chunks, documents, audience, storage, progress, process_output=process_output)
        try:
            return run.run(on_layer)
        finally:
            storage.close()


def collect_gradients(
    folder: Path,
    chunks: TokenArray,
    accumulators: Sequence[Accumulator],
    *,
    n_threads: int,
    label_seed: int,
    numbers: Sequence[int] | None = None,
    split: HoldoutSplit | None = None,
    documents: TokenArray | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    max_memory_bytes: int = DEFAULT_MAX_MEMORY_BYTES,
    process_output: bool = False,
    plan: GradientPlan | None = None,
    on_layer: OnLayer | None = None,
    work: Path | None = None,
) -> PassResult:
    """Return the perplexity of chunks (n_chunks, n_ctx) int32, after a backward pass that shows the gradients of each.

    The loss of a chunk is −Σ ln p(y_t) over all its tokens, labels y_t drawn from the model's own distribution with
    `label_seed`. The accumulators get inputs, outputs and attention as in `collect_from_checkpoint`, layer by layer from
    the last to the first, and `add_gradient` for every linear of the layers and for `token_embd.weight`. numbers: of the
    chunks in the whole calibration text, for the split and the labels (default: their places here). plan: default that
    of `plan_gradient_pass`. Other arguments and errors as there.
    """
    audience = Audience(accumulators, split)
    both = [*accumulators, *(split.train if split else ()), *(split.holdout if split else ())]
    n_gram_sets = sum(isinstance(a, GramSums) for a in both)
    plan = plan or plan_gradient_pass(folder, *chunks.shape, max_memory_bytes=max_memory_bytes, n_gram_sets=n_gram_sets)
    numbers = range(len(chunks)) if numbers is None else numbers
    with torch_settings(n_threads, device):
        model = StreamedModel(folder, attention="eager" if audience.wants_attention else "sdpa", device=device)
        storage = StateStorage((*chunks.shape, model.sizes.n_embd), max_memory_bytes, work)
        how: dict[str, Any] = {"numbers": numbers, "label_seed": label_seed, "on_layer": on_layer, "process_output": process_output}
        run = _GradientPass(model, chunks, documents, audience, storage, progress, **how)
        try:
            return run.run_whole() if plan.is_whole and work is None else run.run_streamed(plan.blocks)
        finally:
            storage.close()
