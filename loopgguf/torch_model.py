"""A checkpoint folder as a torch model whose weights come and go: built by transformers, filled layer by layer.

The model is built on the meta device; a block of layers, the final norm or a slab of the head is given its weights as
float32 for as long as it is used. Weights are read when asked for and never mapped. Torch and transformers are imported
by the functions that need them, and no code from the folder runs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from loopgguf import ggml
from loopgguf.accumulators import EMBEDDING
from loopgguf.architectures import Hyperparameters, find_family, read_hyperparameters, rope_source_rows
from loopgguf.documents import load_json
from loopgguf.errors import InputError, UsageError
from loopgguf.safetensor import StoredTensor, read_weights
from loopgguf.source import Tensor

if TYPE_CHECKING:
    import torch

TokenArray = NDArray[np.int32]
FindTensor = Callable[[str], Tensor | None]

VOCAB_SLAB = 16384  # rows of the head that are float32 in memory at a time; labels do not depend on it


def refuse_device(device: str) -> None:
    """Raise UsageError for a device that this machine's torch does not have."""
    if device == "cpu":
        return
    import torch

    if device.partition(":")[0] != "cuda" or not torch.cuda.is_available():
        has = "cpu or cuda" if torch.cuda.is_available() else "cpu (torch finds no CUDA GPU here, or was installed without CUDA)"
        raise UsageError(f"--device: got {device}, expected {has}. Leave the option out to run on the CPU")


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
class Checkpoint:
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


class StreamedModel:
    """A model whose weights come and go: embedding rows, blocks of layers, the final norm, slabs of the head.

    written: the weight of a GGUF, by name, that stands in for the checkpoint's, of the layers and the token embeddings; asked
    whenever one is loaded, and None where there is none.
    """

    def __init__(self, folder: Path, *, attention: str, device: str, edits: Sequence[WeightEdit] = (), written: FindTensor = lambda _name: None) -> None:
        config = load_json(folder / "config.json")
        self.family = find_family(config)
        self.sizes: Hyperparameters = read_hyperparameters(self.family, config)  # refuses what transformers would trip over
        self.checkpoint = Checkpoint(folder, config, read_weights(folder).tensors)
        self.module = _build_model(folder, config, attention=attention, device=device)
        self.device, self.edits, self.written = device, edits, written
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

    def refuse_tokens(self, chunks: TokenArray) -> None:
        """Raise InputError for token ids that the embeddings do not have."""
        n_vocab = self.sizes.n_vocab
        if not 0 <= int(chunks.min()) <= int(chunks.max()) < n_vocab:
            raise InputError(f"token ids: got up to {int(chunks.max())}, expected less than vocab_size {n_vocab} of {self.checkpoint.folder / 'config.json'}")
        self.refuse_shape("model.embed_tokens.weight")

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
            stored = self._read(prefix + name)
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

    def _read(self, name: str) -> torch.Tensor:
        """Return a weight in the checkpoint's order: as it is stored there, or as it is written, decoded."""
        import torch

        gguf = self.names.get(name)
        written = None if gguf is None else self.written(gguf)
        if gguf is None or written is None:
            return self.checkpoint.read(name)
        decoded = torch.from_numpy(ggml.decode_rows(written.type, written.read_rows(0, written.n_rows))).reshape(written.shape)
        rows = self.source_rows(gguf)
        return decoded if rows is None else torch.empty_like(decoded).index_copy_(0, torch.from_numpy(rows), decoded)

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
        import torch

        written = self.written(EMBEDDING)
        if written is None:
            return self.checkpoint.read_rows("model.embed_tokens.weight", tokens)
        distinct, places = np.unique(tokens, return_inverse=True)
        rows = np.concatenate([ggml.decode_rows(written.type, written.read_rows(row, row + 1)) for row in distinct.tolist()])
        return torch.from_numpy(rows[places])

    @property
    def n_head_slabs(self) -> int:
        return math.ceil(self.sizes.n_vocab / VOCAB_SLAB)

    def head_slabs(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first row, rows as float32) of the output matrix."""
        import torch

        self.refuse_shape(self.head_name)
        for start in range(0, self.sizes.n_vocab, VOCAB_SLAB):
            yield start, self.checkpoint.read(self.head_name, start, start + VOCAB_SLAB).to(self.device, torch.float32)

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
