"""llama.cpp's own quantizer through llama-cpp-python: the oracle that our bytes are compared with."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from pathlib import Path

import llama_cpp.llama_cpp as binding
import numpy as np
from llama_cpp._logger import set_verbose

from loopgguf.container import read_gguf


def llama_quantize(
    source: Path, target: Path, ftype: int, importances: Mapping[str, np.ndarray] | None = None, *, pure: bool = False, n_threads: int = 2, **fields: object
) -> None:
    """Quantize a GGUF with `llama_model_quantize`; importances are the normalised values, (n_matrices, n_in) float32."""
    set_verbose(False)
    params = binding.llama_model_quantize_default_params()
    params.nthread, params.ftype, params.pure = n_threads, ftype, pure
    for name, value in fields.items():
        setattr(params, name, value)
    names = list(importances or {})
    arrays = [np.ascontiguousarray(importances[name], np.float32) for name in names] if importances else []
    data = (binding.llama_model_imatrix_data * (len(names) + 1))()
    for item, name, array in zip(data, names, arrays, strict=False):
        item.name, item.size = name.encode(), array.size
        item.data = array.ctypes.data_as(type(item.data))
    if importances is not None:
        params.imatrix = ctypes.cast(data, type(params.imatrix))
    status = binding.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    assert status == 0, f"llama_model_quantize returned {status}"


def payloads(path: Path) -> dict[str, tuple[str, bytes]]:
    """Return the type and bytes of every tensor of a GGUF, by name."""
    raw = path.read_bytes()
    return {t.name: (t.type.name, raw[t.offset : t.offset + t.n_bytes]) for t in read_gguf(path).tensors}


def differing(ours: Path, theirs: Path) -> list[str]:
    """Return a line per tensor that is not the same type and bytes in both files."""
    a, b = payloads(ours), payloads(theirs)
    lines = [f"{name}: only in one file" for name in a.keys() ^ b.keys()]
    for name in sorted(a.keys() & b.keys()):
        if a[name] != b[name]:
            lines.append(f"{name}: {a[name][0]} {len(a[name][1])} bytes, upstream {b[name][0]} {len(b[name][1])} bytes")
    return lines
