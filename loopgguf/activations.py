"""The one door to forward passes: run calibration chunks through a model and show what every weight is multiplied with.

Two engines, one kind of listener. `collect_from_gguf` lets llama.cpp run a GGUF and watches its graph, as llama-imatrix
does. `collect_from_checkpoint` runs a Hugging Face folder through transformers, one decoder layer in memory at a time,
in float32; torch and transformers are imported by it alone, and no code from the folder runs. Each calls
`accumulator.add(GGUF name, matrix, X)`; what is summed up is the accumulator's affair (`statistics.ColumnSums`).

Sources: tools/imatrix/imatrix.cpp (what is collected, perplexity), ggml/include/ggml.h (struct ggml_tensor).
"""

from __future__ import annotations

import ctypes
import errno
import logging
import math
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from loopgguf import ggml
from loopgguf.architectures import find_family, read_hyperparameters
from loopgguf.documents import load_json
from loopgguf.errors import InputError, OutputError
from loopgguf.formats import GgmlType
from loopgguf.llama import Context, Model
from loopgguf.safetensor import StoredTensor, read_weights

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)

FloatArray = NDArray[np.float32]
TokenArray = NDArray[np.int32]
Progress = Callable[[str, int, int], None]

PHASE = "running calibration text"
HEAD = "output.weight"
MIN_ROWS = 16  # llama-imatrix ignores smaller batches of a plain matmul
HIDDEN_LIMIT_BYTES = 1 << 30
_LOGIT_SLAB = 64  # rows of logits turned into float64 at a time
_VOCAB_SLAB = 16384  # rows of the head that are float32 in memory at a time


class Accumulator(Protocol):
    """Takes activations: X (n_tokens, n_in) float32, the inputs of matrix `matrix` of the weight `name`.

    `matrix` is None for a plain weight, else the expert's number; every expert is named on every call of the weight,
    with n_tokens = 0 where none was routed to it. X is only valid during the call.
    """

    def add(self, name: str, matrix: int | None, X: FloatArray) -> None: ...


@dataclass(frozen=True)
class PassResult:
    """Perplexity of a calibration pass with its standard error, as llama-imatrix prints it, over `n_tokens` scored tokens."""

    perplexity: float
    standard_error: float
    n_tokens: int


def first_scored(n_ctx: int) -> int:
    """Return the first position of a chunk whose prediction is scored (imatrix.cpp: the second half, with context)."""
    return n_ctx // 2


def score_tokens(logits: FloatArray, targets: TokenArray) -> NDArray[np.float64]:
    """Return −ln p of each target (n_tokens,) under logits (n_tokens, n_vocab), in nats, float64."""
    nll = np.empty(len(targets))
    for start in range(0, len(targets), _LOGIT_SLAB):
        slab = logits[start : start + _LOGIT_SLAB].astype(np.float64)
        slab -= slab.max(axis=1, keepdims=True)
        at_target = slab[np.arange(len(slab)), targets[start : start + _LOGIT_SLAB]]
        nll[start : start + _LOGIT_SLAB] = np.log(np.exp(slab, out=slab).sum(axis=1)) - at_target
    return nll


def summarize_pass(nll: NDArray[np.float64]) -> PassResult:
    """Return the perplexity of token losses in nats; raises InputError when they are not finite."""
    if not np.isfinite(nll).all():
        raise InputError("logits of the calibration pass: got NaN or infinity, expected finite numbers. The weights are damaged")
    perplexity = math.exp(min(float(nll.mean()), 700.0))
    standard_error = perplexity * math.sqrt(float(nll.var()) / max(len(nll) - 1, 1))
    return PassResult(perplexity, standard_error, len(nll))


def _announce(accumulators: Sequence[Accumulator], name: str, matrix: int | None, X: FloatArray) -> None:
    for accumulator in accumulators:
        accumulator.add(name, matrix, X)


# --- llama.cpp ----------------------------------------------------------------------------------------------------------


class GgmlTensor(ctypes.Structure):
    """`struct ggml_tensor` of ggml.h on 64-bit machines; `watch_library` checks its size."""

    _fields_ = [
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
        ("op", ctypes.c_int),
        ("op_params", ctypes.c_int32 * 16),
        ("flags", ctypes.c_int32),
        ("src", ctypes.c_void_p * 10),
        ("view_src", ctypes.c_void_p),
        ("view_offs", ctypes.c_size_t),
        ("data", ctypes.c_void_p),
        ("name", ctypes.c_char * 64),
        ("extra", ctypes.c_void_p),
        ("padding", ctypes.c_char * 8),
    ]


_OBJECT_BYTES = 32  # sizeof(struct ggml_object), which ggml_tensor_overhead() counts too


@dataclass(frozen=True)
class _Watch:
    """libggml with what watching needs declared, and the numbers this version gives the two operations."""

    library: Any
    mul_mat: int
    mul_mat_id: int


@cache
def watch_library() -> _Watch:
    """Return libggml ready for watching; raises InputError when its tensors are not laid out as known here."""
    library = ggml.library()
    library.ggml_tensor_overhead.restype = ctypes.c_size_t
    library.ggml_op_name.restype, library.ggml_op_name.argtypes = ctypes.c_char_p, [ctypes.c_int]
    library.ggml_nbytes.restype, library.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    library.ggml_backend_buffer_is_host.restype, library.ggml_backend_buffer_is_host.argtypes = ctypes.c_bool, [ctypes.c_void_p]
    library.ggml_backend_tensor_get.restype = None
    library.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    expected, got = ctypes.sizeof(GgmlTensor), int(library.ggml_tensor_overhead()) - _OBJECT_BYTES
    # the operations come first in their enum and both stand before number 64 in every version so far
    numbers = {library.ggml_op_name(i): i for i in range(64)} if expected == got else {}
    if b"MUL_MAT" not in numbers or b"MUL_MAT_ID" not in numbers:
        raise InputError(
            f"libggml {ggml.library_version()}: got tensors of {got} bytes, expected {expected}. Install the llama-cpp-python version in constraints.txt"
        )
    return _Watch(library, numbers[b"MUL_MAT"], numbers[b"MUL_MAT_ID"])


def strip_name(raw: bytes) -> str:
    """Return a weight's name without the device marks of a copy: `CUDA0#blk.0.attn_k.weight#0` → `blk.0.attn_k.weight`."""
    name = raw.decode("utf-8", "replace")
    _, mark, rest = name.partition("#")
    return rest.partition("#")[0] if mark else name


def read_tensor(tensor: GgmlTensor, dtype: str) -> NDArray[Any]:
    """Return a tensor's values as an array of ggml's dimensions reversed, 4-D, strided like the tensor.

    A view into host memory, valid until the graph goes on; a copy where the data lies on a device.
    """
    library = watch_library().library
    shape, strides = tuple(reversed(tensor.ne)), tuple(reversed(tensor.nb))
    n_bytes = int(library.ggml_nbytes(ctypes.byref(tensor)))
    buffer = tensor.buffer or (GgmlTensor.from_address(tensor.view_src).buffer if tensor.view_src else None)
    if not buffer or library.ggml_backend_buffer_is_host(buffer):
        memory: Any = (ctypes.c_char * n_bytes).from_address(tensor.data)
    else:
        memory = (ctypes.c_char * n_bytes)()
        library.ggml_backend_tensor_get(ctypes.byref(tensor), memory, 0, n_bytes)
    return np.ndarray(shape, dtype, memory, 0, strides)


def split_matrices(X: FloatArray, n_matrices: tuple[int, int]) -> Iterator[tuple[int | None, FloatArray]]:
    """Yield (matrix, X (n_tokens, n_in)) of a MUL_MAT input (ne3, ne2, ne1, n_in) and a weight of (ne3, ne2) matrices.

    A weight that is one matrix takes all rows; stacked ones (multi-head latent attention) take their own slices.
    """
    if n_matrices == (1, 1):
        yield None, X.reshape(-1, X.shape[-1])
        return
    n3, n2 = n_matrices
    for matrix in range(n3 * n2):
        yield matrix, X[matrix // n2 :: n3, matrix % n2 :: n2].reshape(-1, X.shape[-1])


def split_experts(X: FloatArray, expert_ids: TokenArray, n_experts: int) -> Iterator[tuple[int, FloatArray]]:
    """Yield (expert, X (n_tokens, n_in)) for every expert of a MUL_MAT_ID, reached or not.

    X: (n_tokens, n_slots, n_in), where n_slots is 1 when all experts of a token read the same input (up and gate), else
    the number of experts used (down). expert_ids: (n_tokens, n_used). Source: imatrix.cpp (`i11 = idx % ne1`).
    """
    n_slots = X.shape[1]
    for expert in range(n_experts):
        token, used = np.nonzero(expert_ids == expert)
        yield expert, X[token, used % n_slots]


class _Watcher:
    """The eval callback: asks for the matmuls of weights and passes on their inputs.

    An exception must not leave a ctypes callback; it is kept in `error`, ends the graph, and is raised by the caller.
    """

    def __init__(self, accumulators: Sequence[Accumulator], *, process_output: bool) -> None:
        self.accumulators, self.process_output = accumulators, process_output
        self.watch = watch_library()
        self.error: BaseException | None = None

    def __call__(self, address: int, ask: bool) -> bool:
        try:
            node = GgmlTensor.from_address(address)
            if ask:
                return self.wants(node)
            self.collect(node)
        except BaseException as error:  # noqa: BLE001  (raised again in `collect_from_gguf`; Ctrl-C arrives here too)
            self.error = self.error or error
            return False
        return True

    def wants(self, node: GgmlTensor) -> bool:
        """Tell whether llama-imatrix would collect the input of this node."""
        if node.op == self.watch.mul_mat_id:
            return True
        if node.op != self.watch.mul_mat:
            return False
        X = GgmlTensor.from_address(node.src[1])
        name = strip_name(GgmlTensor.from_address(node.src[0]).name)
        return X.ne[1] >= MIN_ROWS and X.type == GgmlType.F32 and (name.startswith("blk.") or (self.process_output and name == HEAD))

    def collect(self, node: GgmlTensor) -> None:
        weight, inputs = GgmlTensor.from_address(node.src[0]), GgmlTensor.from_address(node.src[1])
        name = strip_name(weight.name)
        if inputs.type != GgmlType.F32:
            raise InputError(f"activations of {name}: got ggml type {inputs.type}, expected F32. This architecture is not supported by the imatrix pass")
        X = read_tensor(inputs, "<f4")
        if node.op == self.watch.mul_mat_id:
            expert_ids = read_tensor(GgmlTensor.from_address(node.src[2]), "<i4")[0, 0]
            parts: Iterator[tuple[int | None, FloatArray]] = iter(split_experts(X[0], expert_ids, weight.ne[2]))
        else:
            parts = split_matrices(X, (weight.ne[3], weight.ne[2]))
        for matrix, slab in parts:
            _announce(self.accumulators, name, matrix, slab)


def collect_from_gguf(
    path: Path,
    chunks: TokenArray,
    accumulators: Sequence[Accumulator],
    *,
    n_threads: int,
    progress: Progress | None = None,
    process_output: bool = False,
) -> PassResult:
    """Return the perplexity of running chunks (n_chunks, n_ctx) int32 through a GGUF that `container.read_shards` has passed.

    The accumulators get the inputs of every weight that llama-imatrix collects: the matmuls of the layers, per expert
    where there are experts; with `process_output` also an untied head. Raises InputError when llama.cpp cannot run the
    model or something is not finite.
    """
    n_chunks, n_ctx = chunks.shape
    first = first_scored(n_ctx)
    watcher = _Watcher(accumulators, process_output=process_output)
    nll = []
    with Model(path) as model, Context(model, n_ctx, n_threads=n_threads, callback=watcher) as context:
        for i, chunk in enumerate(chunks):
            logits = context.decode(chunk)
            if watcher.error is not None:
                raise watcher.error
            nll.append(score_tokens(logits[first : n_ctx - 1], chunk[first + 1 :]))
            if progress is not None:
                progress(PHASE, i + 1, n_chunks)
    return summarize_pass(np.concatenate(nll))


# --- transformers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Checkpoint:
    """A folder's config.json and where its weights lie; rows are read when asked for and never mapped."""

    folder: Path
    config: dict[str, object]
    tensors: Mapping[str, StoredTensor]

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return rows start…stop of a tensor as stored. Raises InputError when it is missing, or neither F32, F16 nor BF16."""
        import torch

        stored = self.tensors.get(name)
        if stored is None:
            raise InputError(f"tensor {name} is missing in {self.folder}: convert the model to a BF16 GGUF and compute the imatrix from that")
        dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}.get(stored.dtype)
        if dtype is None:
            raise InputError(f"type of {name} in {stored.path}: got {stored.dtype}, expected F32, F16 or BF16. Give the original checkpoint instead")
        shape = (len(range(stored.shape[0])[start:stop]), *stored.shape[1:])
        n_row_bytes = stored.n_bytes // stored.shape[0]
        raw = np.fromfile(stored.path, np.uint8, shape[0] * n_row_bytes, offset=stored.offset + start * n_row_bytes)
        return torch.from_numpy(raw).view(dtype).reshape(shape)


class _HiddenStates:
    """The residual stream of all chunks, float32: in memory up to a limit, in an unnamed temporary file above it."""

    def __init__(self, shape: tuple[int, int, int], limit_bytes: int) -> None:
        n_bytes = 4 * math.prod(shape)
        self.shape, self.chunk_bytes = shape[1:], n_bytes // shape[0]
        self._file: IO[bytes] | None = None
        self._memory: FloatArray | None = None
        if n_bytes <= limit_bytes:
            self._memory = np.empty(shape, np.float32)
            return
        with self._explained():
            if shutil.disk_usage(tempfile.gettempdir()).free < n_bytes:
                raise OSError(errno.ENOSPC, f"{n_bytes} bytes needed")
            self._file = tempfile.TemporaryFile(prefix="loopgguf-hidden-")
        logger.info("hidden states: %d bytes spilled to a temporary file in %s", n_bytes, tempfile.gettempdir())

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OutputError(f"cannot spill hidden states to {tempfile.gettempdir()}: {error.strerror}; free some space or set TMPDIR") from error

    def read(self, i: int) -> FloatArray:
        if self._memory is not None:
            values: FloatArray = self._memory[i]
            return values
        assert self._file is not None
        with self._explained():
            self._file.seek(i * self.chunk_bytes)
            return np.frombuffer(bytearray(self._file.read(self.chunk_bytes)), np.float32).reshape(self.shape)

    def write(self, i: int, values: FloatArray) -> None:
        if self._memory is not None:
            self._memory[i] = values
            return
        assert self._file is not None
        with self._explained():
            self._file.seek(i * self.chunk_bytes)
            self._file.write(np.ascontiguousarray(values).tobytes())

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def _build_model(folder: Path, config: dict[str, object]) -> Any:
    """Return the folder's model with all parameters on the meta device and its computed buffers in memory."""
    import torch
    import transformers
    from huggingface_hub.errors import StrictDataclassError

    try:
        settings = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(settings, dtype=torch.float32, attn_implementation="sdpa", trust_remote_code=False)
    except (StrictDataclassError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise InputError(f"transformers cannot build the model of {folder / 'config.json'}: {' '.join(str(error).split())}") from error
    got, classes = type(model).__name__, find_family(config).classes
    if got not in classes:
        raise InputError(
            f"model_type in {folder / 'config.json'}: got {config.get('model_type')!r}, a {got}, expected {' or '.join(classes)} as in architectures"
        )
    _compute_buffers(model)
    return model.eval()


def _compute_buffers(model: Any) -> None:
    """Compute what no checkpoint holds (rope frequencies): the model's own initialisation, and proof that it filled all."""
    import torch

    for module in model.modules():
        buffers = {name: b for name, b in module.named_buffers(recurse=False) if b.is_meta}
        for name, buffer in buffers.items():
            module.register_buffer(name, torch.full_like(buffer, math.nan, device="cpu"), persistent=False)
        if buffers:
            model._init_weights(module)
        for name, buffer in module.named_buffers(recurse=False):
            if not bool(torch.isfinite(buffer).all()):
                raise InputError(f"buffer {name} of {type(module).__name__} is not computed by this version of transformers; compute the imatrix from a GGUF")


def _load(module: Any, prefix: str, checkpoint: _Checkpoint, memory: dict[str, torch.Tensor]) -> None:
    """Give a meta module its weights as float32, in the tensors of `memory` where they fit.

    Raises InputError for a missing weight or a wrong shape.
    """
    import torch

    for name in module.state_dict():
        stored = checkpoint.read(prefix + name)
        if name not in memory or memory[name].shape != stored.shape:
            memory[name] = torch.empty(stored.shape, dtype=torch.float32)
        memory[name].copy_(stored)
    try:
        module.load_state_dict({name: memory[name] for name in module.state_dict()}, assign=True)
    except RuntimeError as error:  # torch's own words hold both shapes
        raise InputError(f"weights of {prefix}* in {checkpoint.folder} do not fit config.json: {' '.join(str(error).split())}") from error


@contextmanager
def _materialized(module: Any, prefix: str, checkpoint: _Checkpoint, memory: dict[str, torch.Tensor]) -> Iterator[None]:
    """Give a module its weights for the time of the block. One `memory` for all layers: the heap would not give it back."""
    _load(module, prefix, checkpoint, memory)
    try:
        yield
    finally:
        module.to("meta")


def _layer_arguments(model: Any, n_ctx: int) -> list[dict[str, Any]]:
    """Return what each decoder layer gets besides the hidden states: masks and positions of one chunk of `n_ctx` tokens.

    The model's own forward says so: it runs once on zeros with layers that only take down their arguments.
    """
    import torch

    arguments: list[dict[str, Any]] = []

    def record(hidden: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        arguments.append(kwargs)
        return hidden

    layers = model.base_model.layers
    for layer in layers:
        layer.forward = record
    try:
        model.base_model(inputs_embeds=torch.zeros(1, n_ctx, model.config.hidden_size), use_cache=False)
    finally:
        for layer in layers:
            del layer.forward
    return arguments


def _weight_names(config: dict[str, object], n_layers: int) -> dict[str, str]:
    """Return the GGUF name of every weight of the checkpoint."""
    weights = find_family(config).weights
    return {weight.hf.format(layer=i): weight.gguf.format(layer=i) for weight in weights for i in range(n_layers)}


def _watch_linears(layer: Any, prefix: str, names: Mapping[str, str], accumulators: Sequence[Accumulator]) -> list[Any]:
    """Hook the inputs of a layer's linears to the accumulators and return the hooks' handles."""
    import torch

    def listener(name: str) -> Callable[[Any, tuple[Any, ...]], None]:
        return lambda _module, args: _announce(accumulators, name, None, args[0].reshape(-1, args[0].shape[-1]).numpy())

    linears = [(f"{prefix}{path}.weight", module) for path, module in layer.named_modules() if isinstance(module, torch.nn.Linear)]
    return [module.register_forward_pre_hook(listener(names[hf_name])) for hf_name, module in linears]


class _CheckpointPass:
    """One pass of chunks through a checkpoint folder: embedding, layers, head, each with only its own weights in memory."""

    def __init__(self, folder: Path, chunks: TokenArray, accumulators: Sequence[Accumulator], progress: Progress | None, hidden_limit_bytes: int) -> None:
        config = load_json(folder / "config.json")
        read_hyperparameters(find_family(config), config)  # refuses what transformers would trip over
        self.checkpoint = _Checkpoint(folder, config, read_weights(folder).tensors)
        self.model = _build_model(folder, config)
        self.chunks, self.accumulators, self.progress = chunks, accumulators, progress
        self.n_vocab, n_hidden = self.model.config.vocab_size, self.model.config.hidden_size
        if not 0 <= int(chunks.min()) <= int(chunks.max()) < self.n_vocab:
            raise InputError(f"token ids: got up to {int(chunks.max())}, expected less than vocab_size {self.n_vocab} of {folder / 'config.json'}")
        self.layers = self.model.base_model.layers
        self.head_name = "model.embed_tokens.weight" if self.model.config.tie_word_embeddings else "lm_head.weight"
        self.n_done, self.n_steps = 0, len(chunks) * (len(self.layers) + math.ceil(self.n_vocab / _VOCAB_SLAB))
        self.hidden = _HiddenStates((*chunks.shape, n_hidden), hidden_limit_bytes)

    def step(self) -> None:
        self.n_done += 1
        if self.progress is not None:
            self.progress(PHASE, self.n_done, self.n_steps)

    def refuse_shape(self, name: str) -> None:
        stored, expected = self.checkpoint.tensors.get(name), (self.n_vocab, self.hidden.shape[1])
        if stored is not None and stored.shape != expected:
            raise InputError(f"shape of {name} in {stored.path}: got {stored.shape}, expected {expected} as config.json says. Download the checkpoint again")

    def embed(self) -> None:
        import torch

        embedding = self.model.get_input_embeddings()
        self.refuse_shape("model.embed_tokens.weight")
        table = self.checkpoint.read("model.embed_tokens.weight")  # as stored: only the rows in use become float32
        embedding.load_state_dict({"weight": table}, assign=True)
        for i, chunk in enumerate(self.chunks):
            self.hidden.write(i, embedding(torch.from_numpy(chunk.astype(np.int64))).to(torch.float32).numpy())
        embedding.to("meta")

    def run_layer(self, i: int, names: Mapping[str, str], arguments: dict[str, Any], memory: dict[str, torch.Tensor]) -> None:
        import torch

        prefix, layer = f"model.layers.{i}.", self.layers[i]
        with _materialized(layer, prefix, self.checkpoint, memory):
            hooks = _watch_linears(layer, prefix, names, self.accumulators)
            for c in range(len(self.chunks)):
                self.hidden.write(c, layer(torch.from_numpy(self.hidden.read(c))[None], **arguments)[0].numpy())
                self.step()
            for hook in hooks:
                hook.remove()

    def score(self, norm: Any) -> NDArray[np.float64]:
        """Return −ln p of every scored token, the head applied in slabs of the vocabulary so that it is never float32 whole."""
        import torch

        n_ctx = self.chunks.shape[1]
        first = first_scored(n_ctx)
        targets = torch.from_numpy(self.chunks[:, first + 1 :].astype(np.int64))
        log_total = torch.full(targets.shape, -math.inf, dtype=torch.float64)
        at_target = torch.full(targets.shape, math.nan, dtype=torch.float64)
        self.refuse_shape(self.head_name)
        for start in range(0, self.n_vocab, _VOCAB_SLAB):
            rows = self.checkpoint.read(self.head_name, start, start + _VOCAB_SLAB).to(torch.float32)
            for c in range(len(self.chunks)):
                logits = norm(torch.from_numpy(self.hidden.read(c)))[first : n_ctx - 1] @ rows.T
                log_total[c] = torch.logaddexp(log_total[c], torch.logsumexp(logits, dim=1).to(torch.float64))
                position = torch.nonzero((targets[c] >= start) & (targets[c] < start + len(rows)))[:, 0]
                at_target[c, position] = logits[position, targets[c, position] - start].to(torch.float64)
                self.step()
        nll: NDArray[np.float64] = (log_total - at_target).reshape(-1).numpy()
        return nll

    def run(self, *, process_output: bool) -> PassResult:
        import torch

        norm = self.model.base_model.norm
        names = _weight_names(self.checkpoint.config, len(self.layers))
        self.embed()
        with _materialized(norm, "model.norm.", self.checkpoint, {}):
            memory: dict[str, torch.Tensor] = {}
            for i, arguments in enumerate(_layer_arguments(self.model, self.chunks.shape[1])):
                self.run_layer(i, names, arguments, memory)
            memory.clear()
            if process_output and not self.model.config.tie_word_embeddings:
                for c in range(len(self.chunks)):
                    _announce(self.accumulators, HEAD, None, norm(torch.from_numpy(self.hidden.read(c))).numpy())
            return summarize_pass(self.score(norm))


@contextmanager
def _torch_settings(n_threads: int) -> Iterator[None]:
    """Run without gradients on `n_threads` threads; leaves torch as it was."""
    import torch

    n_before = torch.get_num_threads()
    torch.set_num_threads(n_threads)
    try:
        with torch.inference_mode():
            yield
    finally:
        torch.set_num_threads(n_before)


def collect_from_checkpoint(
    folder: Path,
    chunks: TokenArray,
    accumulators: Sequence[Accumulator],
    *,
    n_threads: int,
    progress: Progress | None = None,
    process_output: bool = False,
    hidden_limit_bytes: int = HIDDEN_LIMIT_BYTES,
) -> PassResult:
    """Return the perplexity of running chunks (n_chunks, n_ctx) int32 through a checkpoint folder, in float32.

    The accumulators get the inputs of every linear of the decoder layers under its GGUF name; with `process_output` also
    of an untied head. Hidden states of all chunks above `hidden_limit_bytes` go to a temporary file. Raises InputError
    for a folder that is incomplete, unsupported or damaged, OutputError when the temporary file does not fit.
    """
    with _torch_settings(n_threads):
        run = _CheckpointPass(folder, chunks, accumulators, progress, hidden_limit_bytes)
        try:
            return run.run(process_output=process_output)
        finally:
            run.hidden.close()
