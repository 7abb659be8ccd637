"""libllama inside llama-cpp-python through its C API: load a GGUF, tokenize, run tokens, watch the graph.

The low-level API only: the high-level `Llama` class compiles the file's chat template in-process when it loads a
file, which a hostile file can abuse. Settings that change numerics are fixed here so that two runs always agree:
F16 KV cache, flash attention off, no weight repacking (`use_extra_bufts`), unified memory mapping.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

# OpenMP threads that spin while they wait take the cores from everything else on the machine, ours included;
# libgomp reads this when it is loaded
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import llama_cpp.llama_cpp as binding

from loopgguf.container import read_shards
from loopgguf.errors import InputError
from loopgguf.runnable import check_runnable

EvalCallback = Callable[[int, bool], bool]

_GGML_TYPE_F16 = 1
_FLASH_ATTENTION_DISABLED = 0
_LOG_LEVEL_ERROR = 4  # ggml_log_level of ggml.h

_errors: deque[str] = deque(maxlen=4)  # what llama.cpp last complained about


def _keep_error(level: int, text: bytes, _data: object) -> None:
    """Keep llama.cpp's error lines for our messages and drop the rest; llama-cpp-python's own logger drops errors."""
    if level == _LOG_LEVEL_ERROR:
        _errors.append(text.decode("utf-8", "replace").strip())


_LOG_CALLBACK = binding.llama_log_callback(_keep_error)  # alive as long as llama.cpp may call it


def keep_errors() -> None:
    """Have llama.cpp and ggml print nothing from now on: what they complain about is kept for our messages."""
    binding.llama_log_set(_LOG_CALLBACK, None)
    _errors.clear()


def _cause() -> str:
    """Return what llama.cpp said first since the last call, in brackets, or nothing."""
    first = _errors[0] if _errors else ""
    _errors.clear()
    return f" ({first})" if first else ""


class Model:
    """A loaded GGUF; a context manager. Raises InputError for one that `container.read_shards`, `check_runnable` or llama.cpp refuses."""

    def __init__(self, path: Path, *, vocab_only: bool = False) -> None:
        check_runnable(read_shards(path)[0])
        keep_errors()
        binding.llama_backend_init()
        params = binding.llama_model_default_params()
        params.vocab_only = vocab_only
        params.n_gpu_layers = 0
        params.use_extra_bufts = False
        self.pointer = binding.llama_model_load_from_file(os.fsencode(path), params)
        if not self.pointer:
            raise InputError(f"llama.cpp cannot load {path}{_cause()}: an architecture, tokenizer or type it does not know, or damaged data")
        self.vocab = binding.llama_model_get_vocab(self.pointer)
        self.n_vocab = int(binding.llama_vocab_n_tokens(self.vocab))
        self.adds_bos = bool(binding.llama_vocab_get_add_bos(self.vocab))
        self.bos = int(binding.llama_vocab_bos(self.vocab))
        self.eos = int(binding.llama_vocab_eos(self.vocab))
        # a recurrent state runs on over all tokens of a batch's sequence, and sequences of one batch are run apart and out of order
        self.is_recurrent = bool(binding.llama_model_is_recurrent(self.pointer) or binding.llama_model_is_hybrid(self.pointer))

    def tokenize(self, text: str, *, add_special: bool = True, parse_special: bool = False) -> list[int]:
        """Return the token ids of `text` as llama.cpp makes them."""
        raw = text.encode()
        size = len(raw) + 16
        buffer = (ctypes.c_int32 * size)()
        n = int(binding.llama_tokenize(self.vocab, raw, len(raw), buffer, size, add_special, parse_special))
        if n < 0:
            buffer = (ctypes.c_int32 * -n)()
            n = int(binding.llama_tokenize(self.vocab, raw, len(raw), buffer, -n, add_special, parse_special))
        return buffer[:n]

    def token_text(self, token: int) -> bytes:
        """Return the bytes a token stands for; empty for control tokens."""
        size = 64
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = int(binding.llama_token_to_piece(self.vocab, token, buffer, size, 0, False))
            if n >= 0:
                return buffer.raw[:n]
            size = -n

    def __enter__(self) -> Model:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.pointer:
            binding.llama_model_free(self.pointer)
            self.pointer = None


class _Batch:
    """A `llama_batch` of at most `n` tokens, each of one sequence, over arrays of ours: filling it costs no loop."""

    def __init__(self, n: int) -> None:
        self.token, self.position, self.sequence = (np.zeros(n, np.int32) for _ in range(3))
        self.logits = np.zeros(n, np.int8)
        self._n_sequences = np.ones(n, np.int32)
        self._pointers = self.sequence.ctypes.data + self.sequence.itemsize * np.arange(n, dtype=np.uintp)  # to each token's sequences
        members: dict[str, NDArray[Any]] = {
            "token": self.token,
            "pos": self.position,
            "n_seq_id": self._n_sequences,
            "seq_id": self._pointers,
            "logits": self.logits,
        }
        types = dict(binding.llama_batch._fields_)
        self.struct = binding.llama_batch(**{name: array.ctypes.data_as(types[name]) for name, array in members.items()})

    def fill(self, tokens: Sequence[int] | NDArray[np.int32], start: int, first_logits: int, sequences: Sequence[int]) -> None:
        n = self.struct.n_tokens = len(tokens)
        index, begins = np.arange(n), np.array(sequences)
        number = np.searchsorted(begins, index, side="right") - 1
        self.token[:n], self.sequence[:n], self.position[:n], self.logits[:n] = tokens, number, start + index - begins[number], index >= first_logits


def max_sequences() -> int:
    """Return how many sequences llama.cpp keeps apart in one batch at most."""
    return int(binding.llama_max_parallel_sequences())


class Context:
    """Runs tokens through a model; a context manager.

    n_ctx: tokens of a batch, of all its sequences together. n_sequences: how many there may be, at most
    `max_sequences()`. n_threads: CPU threads. callback: called as (address of a ggml_tensor, ask) for every node of the
    graph, as `cb_eval` of llama.h; it must not raise.
    """

    def __init__(self, model: Model, n_ctx: int, *, n_threads: int, n_sequences: int = 1, callback: EvalCallback | None = None) -> None:
        self.model, self.n_ctx = model, n_ctx
        params = binding.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = n_ctx
        params.n_seq_max = n_sequences
        params.kv_unified = n_sequences > 1  # one cache for all: a batch then stays one graph, its tokens in order
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k = params.type_v = _GGML_TYPE_F16
        params.flash_attn_type = _FLASH_ATTENTION_DISABLED
        params.no_perf = True
        self._callback = None
        if callback is not None:
            self._callback = binding.ggml_backend_sched_eval_callback(lambda tensor, ask, _data: callback(tensor, ask))
            params.cb_eval = self._callback
        self.pointer = binding.llama_init_from_model(model.pointer, params)
        if not self.pointer:
            raise InputError(f"llama.cpp cannot make a context of {n_ctx} tokens for this model{_cause()}: not enough memory, or a context it does not support")
        self._batch = _Batch(n_ctx)

    def decode(self, tokens: Sequence[int] | NDArray[np.int32], start: int = 0, first_logits: int = 0, sequences: Sequence[int] = (0,)) -> NDArray[np.float32]:
        """Run `tokens` as positions start… of their sequence; return logits (n_tokens − first_logits, n_vocab) float32.

        sequences: where each begins among the tokens, 0 first; none sees another, and each counts its own positions.
        Logits of the tokens before `first_logits` are not computed. The array is a view into llama.cpp's buffer, valid
        until the next call. start=0 forgets everything before. Raises InputError when llama.cpp cannot run them.
        """
        if start == 0:
            binding.llama_memory_clear(binding.llama_get_memory(self.pointer), True)
        n = len(tokens)
        assert 0 <= first_logits < n <= self.n_ctx, (first_logits, n)
        self._batch.fill(tokens, start, first_logits, sequences)
        status = binding.llama_decode(self.pointer, self._batch.struct)
        if status != 0:
            raise InputError(f"llama.cpp could not run {n} tokens (llama_decode returned {status}){_cause()}: not enough memory, or damaged weights")
        logits = binding.llama_get_logits(self.pointer)
        return np.ctypeslib.as_array(logits, (n - first_logits, self.model.n_vocab))

    def __enter__(self) -> Context:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.pointer:
            binding.llama_free(self.pointer)
            self.pointer = None
