"""The one door to forward passes: run calibration chunks through a model and show what every weight is multiplied with.

Two engines, one kind of listener (`accumulators.Audience`). `collect_from_gguf` lets llama.cpp run a GGUF and watches
its graph, as llama-imatrix does; it is in this module. `collect_from_checkpoint` and `collect_gradients` are the torch
engine of `layerwise.py`. `collect_grams_…` hand the Gram matrices of one layer at a time to a sink. What is summed up
is the accumulators' affair.

Sources: tools/imatrix/imatrix.cpp (what is collected, perplexity), ggml/include/ggml.h (struct ggml_tensor).
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopgguf import ggml
from loopgguf.accumulators import EMBEDDING, HEAD, Accumulator, Audience, HoldoutSplit, document_starts
from loopgguf.architectures import tensor_role
from loopgguf.curvature import GramSet, GramSums, gram_bytes, plan_passes
from loopgguf.errors import InputError
from loopgguf.formats import GgmlType
from loopgguf.layerwise import DEFAULT_MAX_MEMORY_BYTES, PHASE, collect_from_checkpoint, collect_gradients
from loopgguf.llama import Context, Model, max_sequences
from loopgguf.loss import MAX_NATS, PassResult, first_scored, score_tokens, scored_targets, summarize_pass
from loopgguf.progress import Meter, Progress
from loopgguf.torch_model import WeightEdit

__all__ = ["GramSink", "collect_from_checkpoint", "collect_from_gguf", "collect_gradients", "collect_grams_from_checkpoint", "collect_grams_from_gguf"]

FloatArray = NDArray[np.float32]
TokenArray = NDArray[np.int32]
GramSink = Callable[[int | None, GramSet, GramSet], None]  # layer (None: what belongs to none), train, holdout

MIN_ROWS = 16  # llama-imatrix ignores smaller batches of a plain matmul
ATTENTION = b"kq_soft_max"  # llama-graph.cpp's name of the node
SCORE_EVERY = 4  # chunks: what statistics need is done before the head, whose logits only the perplexity looks at


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
    """libggml with what watching needs declared, and the numbers this version gives the operations."""

    library: Any
    mul_mat: int
    mul_mat_id: int
    soft_max: int


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
    # the operations come first in their enum and all stand before number 64 in every version so far
    numbers = {library.ggml_op_name(i): i for i in range(64)} if expected == got else {}
    if not {b"MUL_MAT", b"MUL_MAT_ID", b"SOFT_MAX"} <= numbers.keys():
        raise InputError(
            f"libggml {ggml.library_version()}: got tensors of {got} bytes, expected {expected}. Install the llama-cpp-python version in constraints.txt"
        )
    return _Watch(library, numbers[b"MUL_MAT"], numbers[b"MUL_MAT_ID"], numbers[b"SOFT_MAX"])


def _is_on_host(tensor: GgmlTensor) -> bool:
    buffer = tensor.buffer or (GgmlTensor.from_address(tensor.view_src).buffer if tensor.view_src else None)
    return not buffer or bool(watch_library().library.ggml_backend_buffer_is_host(buffer))


@lru_cache(maxsize=1 << 16)
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
    if _is_on_host(tensor):
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
    """The eval callback: asks for the matmuls of weights and passes on their inputs, and what else the audience wants.

    An exception must not leave a ctypes callback; it is kept in `error`, ends the graph, and is raised by the caller.
    """

    def __init__(self, audience: Audience, *, process_output: bool, wants: Callable[[str], bool] | None, edits: Sequence[WeightEdit] = ()) -> None:
        self.audience, self.process_output, self.wants_weight, self.edits = audience, process_output, wants, edits
        self.watch = watch_library()
        self.error: BaseException | None = None
        self._computed: tuple[int, int, int] | None = None  # the address of the inputs that were looked at last, their weight's matrices,
        self._slabs: list[tuple[int | None, FloatArray]] = []  # and what they were cut into
        self._n_seen, self._n_of_whole_graph, self._needs_logits = 0, 0, True  # nodes that were wanted, in this chunk and in one that ran to its end

    def begin_chunk(self, number: int, starts: Sequence[int], *, needs_logits: bool) -> None:
        """What the graph computes from now on is of chunk `number`, whose documents start at `starts`.

        needs_logits: else the graph ends with the last node that is wanted, once a chunk has shown which that is.
        """
        self._computed, self._slabs = None, []
        self._n_of_whole_graph = self._n_of_whole_graph or self._n_seen
        self._n_seen, self._needs_logits = 0, needs_logits
        self.audience.begin_chunk(number, starts)

    def __call__(self, address: int, ask: bool) -> bool:
        try:
            node = GgmlTensor.from_address(address)
            if ask:
                return self.wants(node)
            self.collect(node)
            self._n_seen += 1
        except BaseException as error:  # noqa: BLE001  (raised again in `collect_from_gguf`; Ctrl-C arrives here too)
            self.error = self.error or error
            return False
        return self._needs_logits or self._n_seen != self._n_of_whole_graph

    def wants(self, node: GgmlTensor) -> bool:
        """Tell whether llama-imatrix would collect the input of this node, or it is attention that somebody wants."""
        if node.op == self.watch.soft_max:
            return self.audience.wants_attention and node.name.startswith(ATTENTION)
        if node.op != self.watch.mul_mat and node.op != self.watch.mul_mat_id:
            return False
        weight = GgmlTensor.from_address(node.src[0])
        name = strip_name(weight.name)
        if self.wants_weight is not None and not self.wants_weight(name):
            return False
        if node.op == self.watch.mul_mat_id:
            return True
        X = GgmlTensor.from_address(node.src[1])
        if not (X.ne[1] >= MIN_ROWS and X.type == GgmlType.F32 and (name.startswith("blk.") or self._wants_head(name))):
            return False
        if self._computed == (node.src[1], weight.ne[2], weight.ne[3]) and not self.audience.wants_output(name):
            for matrix, slab in self._slabs:  # k and v after q: their input is there already, so the graph need not stop once more
                self.audience.add(name, matrix, slab)
            self._n_seen += 1
            return False
        return True

    def _wants_head(self, name: str) -> bool:
        """Tell whether a weight is the head, which may be the embeddings, and anybody wants its input."""
        return (name == HEAD and self.process_output) or (name in (HEAD, EMBEDDING) and self.audience.wants_head)

    def collect(self, node: GgmlTensor) -> None:
        if node.op == self.watch.soft_max:
            n_queries = node.ne[1]  # keys beyond them are padding of the cache
            self.audience.add_attention(int(node.name.rpartition(b"-")[2]), read_tensor(node, "<f4")[0][..., :n_queries])
            return
        weight, inputs = GgmlTensor.from_address(node.src[0]), GgmlTensor.from_address(node.src[1])
        name = strip_name(weight.name)
        if inputs.type != GgmlType.F32:
            raise InputError(f"activations of {name}: got ggml type {inputs.type}, expected F32. This architecture is not supported by the imatrix pass")
        for edit in self.edits:
            if edit.name == name:
                self._edit(node, inputs, edit)
        split = self._splitter(node, weight)
        if name == EMBEDDING or (name == HEAD and not self.process_output):
            self.audience.add_head(read_tensor(inputs, "<f4").reshape(-1, inputs.ne[0]))
            return
        outputs = split(read_tensor(node, "<f4")) if self.audience.wants_output(name) else None
        self._computed, self._slabs = (node.src[1], weight.ne[2], weight.ne[3]), list(split(read_tensor(inputs, "<f4")))
        for matrix, slab in self._slabs:
            self.audience.add(name, matrix, slab)
            if outputs is not None:
                self.audience.add_output(name, matrix, next(outputs)[1])

    def _edit(self, node: GgmlTensor, inputs: GgmlTensor, edit: WeightEdit) -> None:
        """Change the output, before the graph goes on, to what it would be with the edited weight."""
        if not _is_on_host(node):
            raise InputError(f"output of {edit.name}: got it in a device's memory, expected host memory to change it in. Run on the CPU")
        assert edit.original is not None
        change, X, Y = np.float32(edit.value - edit.original), read_tensor(inputs, "<f4"), read_tensor(node, "<f4")
        if node.op == self.watch.mul_mat_id:
            token, used = np.nonzero(read_tensor(GgmlTensor.from_address(node.src[2]), "<i4")[0, 0] == edit.matrix)
            Y[0][token, used, edit.row] += change * X[0][token, used % X.shape[2], edit.column]
        else:
            Y[..., edit.row] += change * X[..., edit.column]

    def _splitter(self, node: GgmlTensor, weight: GgmlTensor) -> Callable[[FloatArray], Iterator[tuple[int | None, FloatArray]]]:
        """Return what cuts inputs or outputs of a node into those of its matrices."""
        if node.op == self.watch.mul_mat_id:
            expert_ids, n_experts = read_tensor(GgmlTensor.from_address(node.src[2]), "<i4")[0, 0], weight.ne[2]
            return lambda values: iter(split_experts(values[0], expert_ids, n_experts))
        return lambda values: split_matrices(values, (weight.ne[3], weight.ne[2]))


def _score(pool: ThreadPoolExecutor, n_parts: int, logits: FloatArray, targets: TokenArray) -> NDArray[np.float64]:
    """Return the losses of the tokens, computed in single precision by as many threads as there are parts."""
    edges = np.linspace(0, len(targets), n_parts + 1).astype(int).tolist()
    parts = pool.map(lambda a, b: score_tokens(logits[a:b], targets[a:b], precision=np.float32), edges[:-1], edges[1:])
    return np.concatenate(list(parts))


class _RunningLoss:
    """The perplexity so far, from the sums of the losses of each chunk that are scored."""

    def __init__(self, losses: Sequence[NDArray[np.float64]], is_scored: NDArray[np.bool_]) -> None:
        self.losses, self.is_scored = losses, is_scored
        self._total, self._n = 0.0, 0
        for i in range(len(losses)):
            self.count(i)

    def count(self, i: int) -> None:
        """Add the losses of chunk i."""
        scored = self.losses[i][self.is_scored[i]]
        self._total, self._n = self._total + float(scored.sum()), self._n + len(scored)

    @property
    def perplexity(self) -> float:
        return math.exp(min(self._total / max(self._n, 1), MAX_NATS))


def _refuse_many(starts: Sequence[Sequence[int]]) -> None:
    """Raise InputError when a chunk holds more documents than llama.cpp keeps apart."""
    number, n = max(enumerate(map(len, starts)), key=lambda item: item[1])
    if n > max_sequences():
        raise InputError(
            f"calibration text: got {n} documents in chunk {number}, expected at most the {max_sequences()} that llama.cpp keeps apart. "
            "Use longer documents, or a smaller context with -c"
        )


def collect_from_gguf(
    path: Path,
    chunks: TokenArray,
    accumulators: Sequence[Accumulator],
    *,
    n_threads: int,
    split: HoldoutSplit | None = None,
    documents: TokenArray | None = None,
    progress: Progress | None = None,
    process_output: bool = False,
    wants: Callable[[str], bool] | None = None,
    edits: Sequence[WeightEdit] = (),
    losses: list[NDArray[np.float64]] | None = None,
    on_chunk: Callable[[int], None] | None = None,
    score_every: int = 1,
) -> PassResult:
    """Return the perplexity of running chunks (n_chunks, n_ctx) int32 through a GGUF that `container.read_shards` has passed.

    The accumulators get the inputs of every weight that llama-imatrix collects: the matmuls of the layers, per expert
    where there are experts; with `process_output` also an untied head; and what else they listen to, gradients apart.
    split: others, by the chunk's number. documents: (n_chunks, n_ctx) int32 numbers the documents of each chunk; attention
    stays inside them (a recurrent model has no way to: None). wants: only weights of which it is true. edits: weights of
    the feed-forward network changed for the time of the pass, with their `original` values. losses: of the
    chunks that are done, one array each; the pass goes on after them and appends, calling on_chunk(number) after each,
    which is how a job is resumed. score_every: take the losses of every so many-th chunk alone, and spare the others the head,
    which has a fifth of the weights of SmolLM2-135M. Raises InputError when llama.cpp cannot run the model or something is not finite.
    """
    n_chunks, n_ctx = chunks.shape
    first = first_scored(n_ctx)
    starts = [document_starts(None if documents is None else documents[i]) for i in range(n_chunks)]
    _refuse_many(starts)
    audience = Audience(accumulators, split)
    watcher = _Watcher(audience, process_output=process_output, wants=wants, edits=edits)
    losses = [] if losses is None else losses
    meter = Meter(progress, PHASE, chunks.size, n_chunks)
    meter.reach(len(losses))
    is_scored = scored_targets(chunks, documents) & (np.arange(n_chunks) % score_every == 0)[:, None]
    running = _RunningLoss(losses, is_scored)
    with ExitStack() as stack:
        model = stack.enter_context(Model(path))
        assert documents is None or not model.is_recurrent
        context = stack.enter_context(Context(model, n_ctx, n_threads=n_threads, n_sequences=max(map(len, starts)), callback=watcher))
        pool = stack.enter_context(ThreadPoolExecutor(n_threads))
        for i in range(len(losses), n_chunks):
            needs_logits = i % score_every == 0
            watcher.begin_chunk(i, starts[i], needs_logits=needs_logits)
            logits = context.decode(chunks[i], sequences=starts[i])
            if watcher.error is not None:
                raise watcher.error
            targets = chunks[i, first + 1 :]
            losses.append(_score(pool, n_threads, logits[first : n_ctx - 1], targets) if needs_logits else np.zeros(len(targets)))
            running.count(i)
            if on_chunk is not None:
                on_chunk(i)
            meter.step(perplexity=running.perplexity)
    return summarize_pass(np.stack(losses)[is_scored])


# --- Gram matrices ------------------------------------------------------------------------------------------------------


def collect_grams_from_gguf(
    path: Path,
    chunks: TokenArray,
    accumulators: Sequence[Accumulator],
    *,
    sink: GramSink,
    holdout: Sequence[int],
    shapes: Mapping[str, Sequence[int]],
    n_threads: int,
    documents: TokenArray | None = None,
    max_memory_bytes: int = DEFAULT_MAX_MEMORY_BYTES,
    progress: Progress | None = None,
    process_output: bool = False,
    wanted: Collection[int | None] | None = None,
) -> PassResult:
    """Return the perplexity, after giving `sink` the matrices H of every layer, one pass per block that fits into memory, and
    with the first block that of the head (None).

    shapes: of the model's weights by name; holdout: the numbers of the chunks of the second set. The accumulators listen
    to the first pass. How many there are: len(`gguf_passes(shapes, max_memory_bytes)`); those without a layer that is `wanted`
    (None: all are; the head goes with the first) are left out. The progress counts all passes.
    """
    blocks = [
        block
        for number, block in enumerate(gguf_passes(shapes, max_memory_bytes))
        if wanted is None or not {*block, *([None] if number == 0 else [])}.isdisjoint(wanted)
    ]
    n_steps = len(blocks) * len(chunks)
    results = []
    for number, block in enumerate(blocks):

        def is_of_block(name: str, layers: range = block) -> bool:
            return tensor_role(name).layer in layers or (name in (HEAD, EMBEDDING) and layers.start == 0)

        def counted(phase: str, done: int, _total: int, before: int = number * len(chunks)) -> None:
            if progress is not None:
                progress(phase, before + done, n_steps)

        train, rest = GramSums(is_of_block), GramSums(is_of_block)
        result = collect_from_gguf(
            path,
            chunks,
            accumulators if number == 0 else (),
            n_threads=n_threads,
            split=HoldoutSplit([train], [rest], frozenset(holdout)),
            documents=documents,
            progress=counted,
            process_output=process_output,
            wants=None if number == 0 else is_of_block,
            score_every=SCORE_EVERY if number == 0 else n_steps,  # nobody asks later passes for their perplexity
        )
        results.append(result)
        for layer in block:
            sink(layer, train.take(layer), rest.take(layer))
        if block.start == 0:
            sink(None, train.take(), rest.take())
    return results[0]


def gguf_passes(shapes: Mapping[str, Sequence[int]], max_memory_bytes: int) -> list[range]:
    """Return the blocks of layers whose matrices H, of both sets, fit into memory together: one pass for each."""
    layers: dict[int, dict[str, Sequence[int]]] = {}
    for name, shape in shapes.items():
        layer = tensor_role(name).layer
        if layer is not None and name.endswith(".weight") and len(shape) > 1:
            layers.setdefault(layer, {})[name] = shape
    return plan_passes([2 * gram_bytes(layers.get(i, {}), has_gradient=False) for i in range(max(layers, default=-1) + 1)], max_memory_bytes)


def collect_grams_from_checkpoint(
    folder: Path,
    chunks: TokenArray,
    accumulators: Sequence[Accumulator],
    *,
    sink: GramSink,
    holdout: Sequence[int],
    label_seed: int | None,
    n_threads: int,
    documents: TokenArray | None = None,
    device: str = "cpu",
    max_memory_bytes: int = DEFAULT_MAX_MEMORY_BYTES,
    progress: Progress | None = None,
    process_output: bool = False,
    work: Path | None = None,
) -> PassResult:
    """Return the perplexity, after giving `sink` the matrices of every layer as it is finished, so that nothing is stored.

    holdout: the numbers of the chunks of the second set. label_seed: with it gradients are run, layers come from the
    last to the first, and the sets hold H, H_w, H_O, G0 and curvatures; None: a forward pass, H alone. At the end the
    sink gets what belongs to no layer (None): the head and G0. Other arguments and errors as `collect_from_checkpoint`; with `work` the
    sink gets only what `finished_layers(work)` does not name.
    """
    train, rest = GramSums(), GramSums()
    split = HoldoutSplit([train], [rest], frozenset(holdout))

    def on_layer(layer: int) -> None:
        sink(layer, train.take(layer), rest.take(layer))

    common: dict[str, Any] = {"n_threads": n_threads, "split": split, "documents": documents, "device": device, "progress": progress}
    common |= {"max_memory_bytes": max_memory_bytes, "on_layer": on_layer, "process_output": process_output, "work": work}
    if label_seed is None:
        result = collect_from_checkpoint(folder, chunks, accumulators, **common)
    else:
        result = collect_gradients(folder, chunks, accumulators, label_seed=label_seed, **common)
    sink(None, train.take(), rest.take())
    return result
