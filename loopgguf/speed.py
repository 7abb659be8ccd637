"""How fast this processor multiplies by weights of each type: measured in libggml's own kernels, as llama.cpp runs them.

A matrix of a type is multiplied by one token, which is what generating text does and memory bounds, and by many, as a
prompt does, which arithmetic bounds. Weights are stored as llama.cpp stores them when it loads a file: repacked where the
processor has such kernels for the type. Information only: no type is chosen by it. Measured once per machine and kept in
the user's cache folder. Sources: ggml-backend.h, ggml-cpu.h, llama-model.cpp (`select_weight_buft`).
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loopgguf import ggml
from loopgguf.checkpoint import cache_path, content_key, write_cached
from loopgguf.formats import GgmlType, row_bytes
from loopgguf.llama import keep_errors

N_IN = 2048
PROMPT_TOKENS = 64
_GENERATION_BYTES = 64 << 20  # of weights: more than processors cache
_PROMPT_ROWS = 2048
_ROW_MULTIPLE = 64  # of the rows of real weights; of others (repack.cpp: not by eights) llama.cpp repacks none
_SECONDS = 0.5  # that a product is repeated: on a busy machine some runs of many are not disturbed
_VERSION = 3  # of the numbers in the cache

_CPU_DEVICE = 0  # ggml_backend_dev_type of ggml-backend.h
_TYPE_F32 = int(GgmlType.F32)
_MAX_TENSORS = 8  # of one ggml context: inputs, products that were tried

ByteArray = NDArray[np.uint8]
FloatArray = NDArray[np.float32]


@dataclass(frozen=True)
class Speed:
    """Weights × tokens per second: one token at a time, and many tokens at once. Of n weights, n / that is the seconds a token takes."""

    generation: float
    prompt: float


class _InitParams(ctypes.Structure):
    """`struct ggml_init_params` of ggml.h."""

    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool)]


_ExtraBuffers = ctypes.CFUNCTYPE(ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)
_PTR, _INT, _SIZE = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_init": (_PTR, [_InitParams]),
    "ggml_free": (None, [_PTR]),
    "ggml_tensor_overhead": (_SIZE, []),
    "ggml_graph_overhead": (_SIZE, []),
    "ggml_new_tensor_2d": (_PTR, [_PTR, ctypes.c_int, _INT, _INT]),
    "ggml_mul_mat": (_PTR, [_PTR, _PTR, _PTR]),
    "ggml_new_graph": (_PTR, [_PTR]),
    "ggml_build_forward_expand": (None, [_PTR, _PTR]),
    "ggml_backend_dev_by_type": (_PTR, [ctypes.c_int]),
    "ggml_backend_dev_init": (_PTR, [_PTR, ctypes.c_char_p]),
    "ggml_backend_dev_backend_reg": (_PTR, [_PTR]),
    "ggml_backend_dev_buffer_type": (_PTR, [_PTR]),
    "ggml_backend_dev_supports_op": (ctypes.c_bool, [_PTR, _PTR]),
    "ggml_backend_reg_get_proc_address": (_PTR, [_PTR, ctypes.c_char_p]),
    "ggml_backend_free": (None, [_PTR]),
    "ggml_backend_cpu_set_n_threads": (None, [_PTR, ctypes.c_int]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (_PTR, [_PTR, _PTR]),
    "ggml_backend_buffer_free": (None, [_PTR]),
    "ggml_backend_tensor_set": (None, [_PTR, _PTR, _SIZE, _SIZE]),
    "ggml_backend_tensor_get": (None, [_PTR, _PTR, _SIZE, _SIZE]),
    "ggml_backend_graph_compute": (ctypes.c_int, [_PTR, _PTR]),
}


@cache
def _library() -> Any:
    """Return libggml with the signatures of the functions used here."""
    lib = ggml.library()
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class Product:
    """Rows of packed weights times activations, ready to be computed again and again; a context manager.

    packed: (n_rows, row bytes) uint8 of `ggml_type`. X: (n_tokens, n_in) float32.
    """

    def __init__(self, ggml_type: GgmlType, packed: ByteArray, X: FloatArray, *, n_threads: int) -> None:
        assert packed.flags.c_contiguous and X.dtype == np.float32 and X.flags.c_contiguous
        lib = self._lib = _library()
        keep_errors()
        self._device = lib.ggml_backend_dev_by_type(_CPU_DEVICE)
        self._plain = lib.ggml_backend_dev_buffer_type(self._device)
        (n_tokens, n_in), n_rows = X.shape, len(packed)
        self._shape = n_tokens, n_rows
        with ExitStack() as stack:
            self._backend = lib.ggml_backend_dev_init(self._device, None)
            stack.callback(lib.ggml_backend_free, self._backend)
            lib.ggml_backend_cpu_set_n_threads(self._backend, n_threads)
            inputs = self._context(stack)
            x = lib.ggml_new_tensor_2d(inputs, _TYPE_F32, n_in, n_tokens)
            W, self._result = self._weights(stack, inputs, x, (int(ggml_type), n_in, n_rows))
            self._graph = lib.ggml_new_graph(inputs)
            lib.ggml_build_forward_expand(self._graph, self._result)
            stack.callback(lib.ggml_backend_buffer_free, lib.ggml_backend_alloc_ctx_tensors_from_buft(inputs, self._plain))
            lib.ggml_backend_tensor_set(W, packed.ctypes.data, 0, packed.nbytes)
            lib.ggml_backend_tensor_set(x, X.ctypes.data, 0, X.nbytes)
            self._stack = stack.pop_all()

    def _context(self, stack: ExitStack) -> int:
        """Return a ggml context for the descriptions of a few tensors and a graph, freed with `stack`."""
        size = _MAX_TENSORS * self._lib.ggml_tensor_overhead() + self._lib.ggml_graph_overhead()
        context = self._lib.ggml_init(_InitParams(size, None, True))
        stack.callback(self._lib.ggml_free, context)
        return int(context)

    def _weights(self, stack: ExitStack, inputs: int, x: int, shape: tuple[int, int, int]) -> tuple[int, int]:
        """Return the weights, (type, n_in, n_rows), in the first kind of memory whose kernels can multiply them, and the product with x."""
        lib = self._lib
        for kind in self._weight_buffers():
            with ExitStack() as trial:
                context = self._context(trial)
                W = lib.ggml_new_tensor_2d(context, *shape)
                trial.callback(lib.ggml_backend_buffer_free, lib.ggml_backend_alloc_ctx_tensors_from_buft(context, kind))
                product = lib.ggml_mul_mat(inputs, W, x)
                if kind == self._plain or lib.ggml_backend_dev_supports_op(self._device, product):
                    stack.push(trial.pop_all())
                    return W, product
        raise AssertionError("the last kind of memory is plain")

    def _weight_buffers(self) -> list[int]:
        """Return the kinds of memory that may hold weights, those that repack first, as llama.cpp tries them."""
        lib = self._lib
        address = lib.ggml_backend_reg_get_proc_address(lib.ggml_backend_dev_backend_reg(self._device), b"ggml_backend_dev_get_extra_bufts")
        kinds: list[int] = []
        extra = _ExtraBuffers(address)(self._device) if address else None
        while extra and extra[len(kinds)]:
            kinds.append(extra[len(kinds)])
        return [*kinds, self._plain]

    def compute(self) -> None:
        """Multiply."""
        status = self._lib.ggml_backend_graph_compute(self._backend, self._graph)
        assert status == 0, status

    def result(self) -> FloatArray:
        """Return what `compute` left: (n_tokens, n_rows) float32."""
        Y = np.empty(self._shape, np.float32)
        self._lib.ggml_backend_tensor_get(self._result, Y.ctypes.data, 0, Y.nbytes)
        return Y

    def __enter__(self) -> Product:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def _measure(ggml_type: GgmlType, n_rows: int, n_tokens: int, n_threads: int) -> float:
    """Return weights × tokens per second of a product with random bytes: the best of many, for other work only slows it."""
    generator = np.random.default_rng(0)
    packed = generator.integers(0, 256, (n_rows, row_bytes(ggml_type, N_IN)), np.uint8)
    X = generator.standard_normal((n_tokens, N_IN), np.float32)
    seconds: list[float] = []
    with Product(ggml_type, packed, X, n_threads=n_threads) as product:
        product.compute()
        while not seconds or sum(seconds) < _SECONDS:
            start = time.perf_counter()
            product.compute()
            seconds.append(time.perf_counter() - start)
    return n_rows * N_IN * n_tokens / min(seconds)


def measure_speed(ggml_type: GgmlType, *, n_threads: int) -> Speed:
    """Return how fast this machine multiplies by weights of a type; a second or so."""
    n_rows = _GENERATION_BYTES // row_bytes(ggml_type, N_IN) // _ROW_MULTIPLE * _ROW_MULTIPLE
    return Speed(_measure(ggml_type, n_rows, 1, n_threads), _measure(ggml_type, _PROMPT_ROWS, PROMPT_TOKENS, n_threads))


def known_speeds(types: Iterable[GgmlType], *, n_threads: int) -> Mapping[GgmlType, Speed]:
    """Return the speed of each of these types, measured now or, on this machine, before."""
    key = content_key(_VERSION, ggml.library_version(), platform.node(), platform.machine(), os.cpu_count(), n_threads)
    path = cache_path("speed", key, ".json")
    try:
        kept = {name: Speed(float(values["generation"]), float(values["prompt"])) for name, values in json.loads(path.read_text(encoding="utf-8")).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # absent or damaged: it can be made again
        kept = {}
    wanted = sorted(set(types))
    missing = [t for t in wanted if t.name not in kept]
    for ggml_type in missing:
        kept[ggml_type.name] = measure_speed(ggml_type, n_threads=n_threads)
    if missing:
        write_cached(path, json.dumps({name: asdict(speed) for name, speed in sorted(kept.items())}).encode())
    return {t: kept[t.name] for t in wanted}
