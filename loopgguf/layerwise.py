"""The torch engine: a checkpoint folder run by transformers one block of decoder layers at a time, forward and backward.

`collect_from_checkpoint` shows accumulators what every linear is multiplied with; `collect_gradients` shows them the
gradients at the linears' outputs too, for labels drawn from the model's own distribution. Float32 throughout. Weights
are in memory for one block of layers, the head for one slab of the vocabulary; hidden states are in memory or on disk.
Torch and transformers are imported by the functions that need them, and no code from the folder runs.
"""

from __future__ import annotations

import errno
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loopgguf.accumulators import (
    EMBEDDING,
    Accumulator,
    Audience,
    GramSums,
    HoldoutSplit,
    PassResult,
    document_starts,
    first_scored,
    gram_bytes,
    plan_passes,
    scored_targets,
    summarize_pass,
)
from loopgguf.architectures import Hyperparameters, find_family, read_hyperparameters, rope_source_rows
from loopgguf.documents import load_json
from loopgguf.errors import InputError, OutputError, UsageError
from loopgguf.progress import Meter, Progress
from loopgguf.safetensor import StoredTensor, read_weights

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float32]
TokenArray = NDArray[np.int32]
OnLayer = Callable[[int], None]
OnProbabilities = Callable[["torch.Tensor"], None]

PHASE = "calibrate"
HEAD = "output.weight"
DEFAULT_MAX_MEMORY_BYTES = 2 << 30
_VOCAB_SLAB = 16384  # rows of the head that are float32 in memory at a time; labels do not depend on it
_ACTIVATIONS = 24  # floats per token that a backward pass keeps of a layer, in units of hidden + feed-forward size


# --- weights on disk --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class WeightEdit:
    """One weight of a layer set to another value for the time of a pass: GGUF name, row and column in the GGUF's order.

    matrix: the expert's number (None: the weight is one matrix). original: the value it has, which the llama.cpp engine
    needs, for it corrects the output instead.
    """

    name: str
    row: int
    column: int
    value: float
    matrix: int | None = None
    original: float | None = None


@dataclass(frozen=True)
class _Checkpoint:
    """A folder's config.json and where its weights lie; rows are read when asked for and never mapped."""

    folder: Path
    config: dict[str, object]
    tensors: Mapping[str, StoredTensor]

    def locate(self, name: str) -> tuple[StoredTensor, Any]:
        """Return where a tensor lies and its torch dtype. Raises InputError when it is missing, or neither F32, F16 nor BF16."""
        import torch

        stored = self.tensors.get(name)
        if stored is None:
            raise InputError(f"tensor {name} is missing in {self.folder}: convert the model to a BF16 GGUF and compute the imatrix from that")
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}.get(stored.dtype)
        if dtype is None:
            raise InputError(f"type of {name} in {stored.path}: got {stored.dtype}, expected F32, F16 or BF16. Give the original checkpoint instead")
        return stored, dtype

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows start…stop of a tensor as stored."""
        import torch

        stored, dtype = self.locate(name)
        shape = (len(range(stored.shape[0])[start:stop]), *stored.shape[1:])
        n_row_bytes = stored.n_bytes // stored.shape[0]
        raw = np.fromfile(stored.path, np.uint8, shape[0] * n_row_bytes, offset=stored.offset + start * n_row_bytes)
        return torch.from_numpy(raw).view(dtype).reshape(shape)

    def read_rows(self, name: str, rows: NDArray[np.integer[Any]]) -> torch.Tensor:
        """Return the given rows of a matrix as float32, each read by itself."""
        import torch

        stored, dtype = self.locate(name)
        n_row_bytes = stored.n_bytes // stored.shape[0]
        distinct, places = np.unique(rows, return_inverse=True)
        raw = np.empty((len(distinct), n_row_bytes), np.uint8)
        with stored.path.open("rb", buffering=0) as stream:
            for place, row in enumerate(distinct):
                stream.seek(stored.offset + int(row) * n_row_bytes)
                stream.readinto(raw[place].data)
        return torch.from_numpy(raw).view(dtype).to(torch.float32)[torch.from_numpy(places)]


def _build_model(folder: Path, config: dict[str, object], *, attention: str, device: str) -> Any:
    """Return the folder's model with all parameters on the meta device and its computed buffers on `device`."""
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation=attention, trust_remote_code=False)
    except (StrictDataclassError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"transformers cannot build the model of {folder / 'config.json'}: {' '.join(str(error).split())}") from error
    got, classes = type(model).__name__, find_family(config).classes
    if got not in classes:
        raise InputError(
            f"model_type in {folder / 'config.json'}: got {config.get('model_type')!r}, a {got}, expected {' or '.join(classes)} as in architectures"
        )
    _compute_buffers(model, device)
    return model.eval().requires_grad_(False)


def _compute_buffers(model: Any, device: str) -> None:
    """Compute what no checkpoint holds (rope frequencies): the model's own initialisation, and proof that it filled all."""
    import torch

    for module in model.modules():
        buffers = {name: b for name, b in module.named_buffers(recurse=False) if b.is_meta}
        for name, buffer in buffers.items():
            module.register_buffer(name, torch.full_like(buffer, math.nan, device="cpu"), persistent=False)
        if buffers:
            model._init_weights(module)
        for name, buffer in list(module.named_buffers(recurse=False)):
            if not bool(torch.isfinite(buffer).all()):
                raise InputError(f"buffer {name} of {type(module).__name__} is not computed by this version of transformers; compute the imatrix from a GGUF")
            module.register_buffer(name, buffer.to(device), persistent=False)


class _Model:
    """A model whose weights come and go: embedding rows, blocks of layers, the final norm, slabs of the head."""

    def __init__(self, folder: Path, *, attention: str, device: str, edits: Sequence[WeightEdit] = ()) -> None:
        config = load_json(folder / "config.json")
        self.family = find_family(config)
        self.sizes: Hyperparameters = read_hyperparameters(self.family, config)  # refuses what transformers would trip over
        self.checkpoint = _Checkpoint(folder, config, read_weights(folder).tensors)
        self.module = _build_model(folder, config, attention=attention, device=device)
        self.device, self.edits = device, edits
        self.layers = self.module.base_model.layers
        self.is_tied = bool(self.module.config.tie_word_embeddings)
        self.head_name = "model.embed_tokens.weight" if self.is_tied else "lm_head.weight"
        self.names = {w.hf.format(layer=i): w.gguf.format(layer=i) for w in self.family.weights for i in range(len(self.layers))}
        self._permuted = frozenset(w.gguf.format(layer=i) for w in self.family.weights if w.permuted for i in range(len(self.layers)))
        self._memory: dict[tuple[int, str], torch.Tensor] = {}
        self._arguments: dict[tuple[int, ...], list[dict[str, Any]]] = {}

    def refuse_shape(self, name: str) -> None:
        stored, expected = self.checkpoint.tensors.get(name), (self.sizes.n_vocab, self.sizes.n_embd)
        if stored is not None and stored.shape != expected:
            raise InputError(f"shape of {name} in {stored.path}: got {stored.shape}, expected {expected} as config.json says. Download the checkpoint again")

    def source_rows(self, name: str) -> NDArray[np.intp] | None:
        """Return which rows of the checkpoint's weight are the GGUF's rows; None: the same ones."""
        if name not in self._permuted:
            return None
        n_rows = (self.sizes.n_head if "attn_q" in name else self.sizes.n_head_kv) * self.sizes.head_dim
        return rope_source_rows(0, n_rows, self.sizes.head_dim)

    def shapes(self, layer: int) -> dict[str, tuple[int, ...]]:
        """Return the shape of every matrix of a layer, by GGUF name."""
        sizes, weights = self.sizes.dimensions, self.family.weights
        return {w.gguf.format(layer=layer): tuple(sizes[d] for d in w.shape) for w in weights if "{layer}" in w.gguf and len(w.shape) > 1}

    def _load(self, module: Any, prefix: str, place: int) -> None:
        """Give a meta module its weights as float32, in the memory of its place where they fit: the heap would not give it back.

        Raises InputError for a missing weight or a wrong shape.
        """
        import torch

        state = {}
        for name in module.state_dict():
            stored = self.checkpoint.read(prefix + name)
            memory = self._memory.get((place, name))
            if memory is None or memory.shape != stored.shape:
                memory = self._memory[place, name] = torch.empty(stored.shape, dtype=torch.float32, device=self.device)
            memory.copy_(stored)
            state[name] = memory
            self._edit(self.names.get(prefix + name), memory)
        try:
            module.load_state_dict(state, assign=True)
        except RuntimeError as error:  # torch's own words hold both shapes
            raise InputError(f"weights of {prefix}* in {self.checkpoint.folder} do not fit config.json: {' '.join(str(error).split())}") from error
        module.requires_grad_(False)

    def _edit(self, name: str | None, weight: torch.Tensor) -> None:
        for edit in self.edits:
            if edit.name == name:
                rows = self.source_rows(edit.name)
                weight[edit.row if rows is None else int(rows[edit.row]), edit.column] = edit.value

    @contextmanager
    def block(self, layers: Sequence[int]) -> Iterator[None]:
        """Give these layers their weights for the time of the block."""
        try:
            for place, i in enumerate(layers):
                self._load(self.layers[i], f"model.layers.{i}.", place)
            yield
        finally:
            for i in layers:
                self.layers[i].to("meta")

    def forget(self) -> None:
        """Give the memory of the layers' weights back."""
        self._memory.clear()

    @contextmanager
    def norm(self) -> Iterator[Callable[[torch.Tensor], torch.Tensor]]:
        """Give the final norm for the time of the block."""
        self._load(self.module.base_model.norm, "model.norm.", -1)
        yield self.module.base_model.norm
        self.module.base_model.norm.to("meta")

    def embed(self, tokens: TokenArray) -> torch.Tensor:
        """Return the embeddings of one chunk, (n_ctx, n_embd) on the host; only the rows in use are read."""
        return self.checkpoint.read_rows("model.embed_tokens.weight", tokens)

    @property
    def n_head_slabs(self) -> int:
        return math.ceil(self.sizes.n_vocab / _VOCAB_SLAB)

    def head_slabs(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first row, rows as float32) of the output matrix."""
        import torch

        self.refuse_shape(self.head_name)
        for start in range(0, self.sizes.n_vocab, _VOCAB_SLAB):
            yield start, self.checkpoint.read(self.head_name, start, start + _VOCAB_SLAB).to(self.device, torch.float32)

    def arguments(self, n_ctx: int, starts: Sequence[int]) -> list[dict[str, Any]]:
        """Return what each layer gets besides the hidden states of a chunk whose documents start at `starts`.

        Masks and positions, as the model's own forward says: it runs on zeros with layers that only take down their
        arguments. Positions count from each start, and transformers masks documents from one another by that.
        """
        import torch

        key = (n_ctx, *starts)
        if key not in self._arguments:
            taken: list[dict[str, Any]] = []

            def record(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
                taken.append(kwargs)
                return hidden

            positions = np.arange(n_ctx)
            for start in starts:
                positions[start:] = np.arange(n_ctx - start)
            norm = self.module.base_model.norm  # may be without weights now
            for layer in self.layers:
                layer.forward = record
            norm.forward = lambda hidden: hidden
            try:
                zeros = torch.zeros(1, n_ctx, self.sizes.n_embd, device=self.device)
                with torch.device(self.device):
                    self.module.base_model(inputs_embeds=zeros, position_ids=torch.from_numpy(positions).to(self.device)[None], use_cache=False)
            finally:
                for module in (*self.layers, norm):
                    del module.forward
            if len(self._arguments) >= 16:
                self._arguments.clear()
            self._arguments[key] = taken
        return self._arguments[key]


# --- hidden states ----------------------------------------------------------------------------------------------------


class _HiddenStates:
    """The residual stream of all chunks at one place of the model, float32: in memory, or in a file."""

    def __init__(self, shape: tuple[int, int, int], file: IO[bytes] | None, path: Path | None = None) -> None:
        self.shape, self.n_bytes, self.path = shape, 4 * math.prod(shape), path
        self._chunk_bytes = self.n_bytes // shape[0]
        self._file = file
        self._memory = np.empty(shape, np.float32) if file is None else None

    def read(self, i: int) -> torch.Tensor:
        """Return the states of chunk i, (n_ctx, n_embd); to be written to only through `write`."""
        import torch

        if self._memory is not None:
            return torch.from_numpy(self._memory[i])
        assert self._file is not None
        with _explained(self.path and self.path.parent):
            self._file.seek(i * self._chunk_bytes)
            raw = bytearray(self._file.read(self._chunk_bytes))
        return torch.frombuffer(raw, dtype=torch.float32).reshape(self.shape[1:])

    def write(self, i: int, values: torch.Tensor) -> None:
        if self._memory is not None:
            self._memory[i] = values.detach().cpu().numpy()
            return
        assert self._file is not None
        with _explained(self.path and self.path.parent):
            self._file.seek(i * self._chunk_bytes)
            self._file.write(np.ascontiguousarray(values.detach().cpu().numpy()).data)

    def publish(self) -> None:
        """Flush the file to disk and give it the name that tells that it is whole."""
        if self.path is not None and self._file is not None:
            with _explained(self.path and self.path.parent):
                self._file.flush()
                os.fsync(self._file.fileno())
                self.path.with_suffix(".part").replace(self.path)

    def close(self, *, remove: bool = False) -> None:
        if self._file is not None:
            self._file.close()
        self._memory = None
        if remove and self.path is not None:
            self.path.unlink(missing_ok=True)

    @property
    def is_in_memory(self) -> bool:
        return self._file is None


@contextmanager
def _explained(folder: Path | None) -> Iterator[None]:
    """folder: of the job; None for the temporary one."""
    try:
        yield
    except OSError as error:
        place, remedy = (tempfile.gettempdir(), "set TMPDIR") if folder is None else (folder, "choose another job folder")
        raise OutputError(f"cannot spill hidden states to {place}: {error.strerror}; free some space or {remedy}") from error


class _Storage:
    """Keeps hidden states: in memory up to a limit, in unnamed temporary files above it; or all in a job's folder."""

    def __init__(self, shape: tuple[int, int, int], limit_bytes: int, folder: Path | None) -> None:
        self.shape, self.folder, self._left = shape, folder, limit_bytes
        self._open: list[_HiddenStates] = []

    def new(self, label: str) -> _HiddenStates:
        """Return room for the states `label`; raises OutputError when the disk is too small."""
        n_bytes = 4 * math.prod(self.shape)
        if self.folder is None and n_bytes <= self._left:
            self._left -= n_bytes
            states = _HiddenStates(self.shape, None)
        else:
            states = self._on_disk(label, n_bytes)
        self._open.append(states)
        return states

    def _on_disk(self, label: str, n_bytes: int) -> _HiddenStates:
        place = self.folder or Path(tempfile.gettempdir())
        with _explained(self.folder):
            if shutil.disk_usage(place).free < n_bytes:
                raise OSError(errno.ENOSPC, f"{n_bytes} bytes needed")
            logger.info("hidden states: %d bytes in %s", n_bytes, place)
            if self.folder is None:
                return _HiddenStates(self.shape, tempfile.TemporaryFile(prefix="loopgguf-hidden-"))
            path = self.folder / f"{label}.f32"
            return _HiddenStates(self.shape, path.with_suffix(".part").open("w+b"), path)

    def find(self, label: str) -> _HiddenStates | None:
        """Return whole states that a job left in the folder, None when there are none."""
        path = self.folder / f"{label}.f32" if self.folder else None
        if path is None or not path.exists() or path.stat().st_size != 4 * math.prod(self.shape):
            return None
        states = _HiddenStates(self.shape, path.open("rb"), path)
        self._open.append(states)
        return states

    def next(self, states: _HiddenStates, label: str) -> _HiddenStates:
        """Return where the states after these go: the same place, unless a job may have to go back to them."""
        return states if self.folder is None else self.new(label)

    def drop(self, states: _HiddenStates) -> None:
        if states.is_in_memory:
            self._left += states.n_bytes
        states.close(remove=True)
        self._open.remove(states)

    def close(self) -> None:
        for states in self._open:
            states.close()


_LOSSES = "losses.npy"
_DONE = re.compile(r"(hidden|gradient)-(\d+)-of-(\d+)\.f32")


def finished_layers(work: Path) -> range:
    """Return the layers that a pass with this job folder has finished: those it will not run, or not show, again.

    The statistics of exactly these are to be restored; what was saved of others belongs to a step that did not end.
    """
    found = [match for path in work.iterdir() if (match := _DONE.fullmatch(path.name))]
    gradients = [int(match[2]) for match in found if match[1] == "gradient"]
    if gradients:
        return range(min(gradients), int(found[0][3]))
    return range(max((int(match[2]) for match in found), default=0)) if found else range(0)


# --- listening --------------------------------------------------------------------------------------------------------


class _Hooks:
    """The hooks on the layers' linears and attention that show an audience what passes; removed on exit."""

    def __init__(self, model: _Model, layers: Sequence[int], audience: Audience, *, with_gradients: bool = False) -> None:
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
        self, model: _Model, chunks: TokenArray, documents: TokenArray | None, audience: Audience, storage: _Storage, progress: Progress | None
    ) -> None:
        self.model, self.chunks, self.documents, self.audience, self.storage = model, chunks, documents, audience, storage
        n_vocab = model.sizes.n_vocab
        if not 0 <= int(chunks.min()) <= int(chunks.max()) < n_vocab:
            raise InputError(f"token ids: got up to {int(chunks.max())}, expected less than vocab_size {n_vocab} of {model.checkpoint.folder / 'config.json'}")
        model.refuse_shape("model.embed_tokens.weight")
        self.numbers: Sequence[int] = range(len(chunks))  # of the chunks in the whole text
        self.meter = Meter(progress, PHASE, chunks.size, n_steps=0)  # how many, the kind of pass says

    def starts(self, c: int) -> list[int]:
        """Return the positions at which documents start in chunk c."""
        return document_starts(None if self.documents is None else self.documents[c])

    def begin(self, c: int) -> None:
        """Tell the audience that chunk c follows."""
        self.audience.begin_chunk(self.numbers[c], self.starts(c))

    def run_block(self, layers: Sequence[int], c: int, hidden: torch.Tensor) -> torch.Tensor:
        """Return the states (n_ctx, n_embd) of chunk c after these layers, whose weights are in memory."""
        arguments = self.model.arguments(self.chunks.shape[1], self.starts(c))
        hidden = hidden.to(self.model.device)[None]
        for i in layers:
            hidden = self.model.layers[i](hidden, **arguments[i])
        return hidden[0]

    def embed(self) -> _HiddenStates:
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

    def run(self, *, process_output: bool, on_layer: OnLayer | None) -> PassResult:
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
            if process_output and not self.model.is_tied:
                for c in range(len(self.chunks)):
                    self.begin(c)
                    self.audience.add(HEAD, None, norm(states.read(c).to(self.model.device)))
            return summarize_pass(self.score(states, norm))

    def run_layer(self, i: int, states: _HiddenStates, on_layer: OnLayer | None) -> _HiddenStates:
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

    def score(self, states: _HiddenStates, norm: Callable[[torch.Tensor], torch.Tensor]) -> NDArray[np.float64]:
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
    head_bytes = 4 * sizes.n_vocab * sizes.n_embd + 16 * n_ctx * min(sizes.n_vocab, _VOCAB_SLAB)
    if per_layer * sizes.n_layer + head_bytes <= max_memory_bytes:
        return GradientPlan((range(sizes.n_layer),), True, 0)
    blocks = tuple(plan_passes([per_layer] * sizes.n_layer, max_memory_bytes))
    return GradientPlan(blocks, False, 4 * n_chunks * n_ctx * sizes.n_embd * (len(blocks) + 2))


def _constant(gradient: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda _after: gradient


class _GradientPass(_Pass):
    """Forward to the labels and back, block by block, or chunk by chunk where the whole model is in memory."""

    def __init__(self, *args: Any, numbers: Sequence[int], label_seed: int, on_layer: OnLayer | None) -> None:
        super().__init__(*args)
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
                    for start, rows in slabs:
                        scores.add(0, start, normed @ rows.T)
                    labels, total = _Labels(scores, [self.numbers[c]], self.label_seed, self.model.device), None
                    for start, rows in slabs:
                        part = labels.gradient(0, normed @ rows.T, rows, is_last=start == slabs[-1][0], tell=self.head_listener(start, normed))
                        total = part if total is None else total.add_(part)
                    assert total is not None
                    return self.through_norm(norm, after, total)

                gradient = self.backward(layers, c, self.model.embed(self.chunks[c]), gradient_of)
                self.audience.add_gradient(EMBEDDING, None, gradient)
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
        if gradients is None:
            gradients = self.after_head(blocks[-1], borders[-1])
        self.meter.reach(self.meter.n_steps - 3 * len(self.chunks) * sum(map(len, left)))
        for block, border in zip(reversed(left), reversed(borders), strict=True):
            gradients = self.run_block_backward(block, border, gradients)
        for c in range(len(self.chunks)):
            self.begin(c)
            self.audience.add_gradient(EMBEDDING, None, gradients.read(c).to(self.model.device))
        return summarize_pass(self.losses())

    def before_blocks(self, blocks: Sequence[range]) -> list[_HiddenStates]:
        """Return the states before each of the blocks: those that a job left, or new ones."""
        borders: list[_HiddenStates] = []
        for i in range(len(blocks)):
            found = self.storage.find(self.label("border", blocks[i].start))
            borders.append(found or (self.run_block_forward(blocks[i - 1], borders[-1]) if i else self.embed()))
        return borders

    def run_block_forward(self, block: range, before: _HiddenStates) -> _HiddenStates:
        after = self.storage.new(self.label("border", block.stop))
        with self.model.block(block):
            for c in range(len(self.chunks)):
                after.write(c, self.run_block(block, c, before.read(c)))
                self.meter.step(len(block))
        after.publish()
        return after

    def after_head(self, block: range, border: _HiddenStates) -> _HiddenStates:
        """Return the gradients at the output of the last block, and keep the losses of the scored tokens."""
        found = self.storage.find(self.label("tail", block.stop))
        if found is not None:
            return found
        last = self.storage.find(self.label("border", block.stop)) or self.run_block_forward(block, border)
        with self.model.norm() as norm:
            self._losses, gradients = self.differentiate_head(last, norm)
        if self.storage.folder is not None:
            np.save(self.storage.folder / _LOSSES, self._losses)
        gradients.publish()
        self.storage.drop(last)
        return gradients

    def losses(self) -> NDArray[np.float64]:
        """Return the losses of the scored tokens; a resumed job has them in its folder."""
        if self._losses is None:
            assert self.storage.folder is not None
            self._losses = np.load(self.storage.folder / _LOSSES, allow_pickle=False)
        return self._losses

    def differentiate_head(self, states: _HiddenStates, norm: Callable[[torch.Tensor], torch.Tensor]) -> tuple[NDArray[np.float64], _HiddenStates]:
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
                if self.audience.wants_head:
                    self.begin(c)
                part = labels.gradient(c, X @ rows.T, rows, is_last=is_last, tell=self.head_listener(start, X))
                gradients.write(c, part if start == 0 else part.add_(gradients.read(c).to(self.model.device)))
                self.meter.step()
        for c in range(len(self.chunks)):
            hidden, gradient = states.read(c).to(self.model.device), gradients.read(c).to(self.model.device)
            gradients.write(c, self.through_norm(norm, hidden.clone(), gradient))
        return scores.losses(), gradients

    def run_block_backward(self, block: range, border: _HiddenStates, gradients: _HiddenStates) -> _HiddenStates:
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


def refuse_device(device: str) -> None:
    """Raise UsageError for a device that this machine's torch does not have."""
    if device == "cpu":
        return
    import torch

    if device.partition(":")[0] != "cuda" or not torch.cuda.is_available():
        has = "cpu or cuda" if torch.cuda.is_available() else "cpu (torch finds no CUDA GPU here, or was installed without CUDA)"
        raise UsageError(f"--device: got {device}, expected {has}. Leave the option out to run on the CPU")


@contextmanager
def _torch_settings(n_threads: int, device: str) -> Iterator[None]:
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
    with _torch_settings(n_threads, device):
        model = _Model(folder, attention="eager" if audience.wants_attention else "sdpa", device=device, edits=edits)
        storage = _Storage((*chunks.shape, model.sizes.n_embd), max_memory_bytes, work)
        run = _ForwardPass(model, chunks, documents, audience, storage, progress)
        try:
            return run.run(process_output=process_output, on_layer=on_layer)
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
    with _torch_settings(n_threads, device):
        model = _Model(folder, attention="eager" if audience.wants_attention else "sdpa", device=device)
        storage = _Storage((*chunks.shape, model.sizes.n_embd), max_memory_bytes, work)
        run = _GradientPass(model, chunks, documents, audience, storage, progress, numbers=numbers, label_seed=label_seed, on_layer=on_layer)
        try:
            return run.run_whole() if plan.is_whole and work is None else run.run_streamed(plan.blocks)
        finally:
            storage.close()
