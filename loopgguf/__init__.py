"""loopgguf: a language model's checkpoint → the best GGUF of a given size. The public API is the names below."""

from __future__ import annotations

from typing import TYPE_CHECKING

from loopgguf.version import __version__

__all__ = ["ImatrixRequest", "QuantizeRequest", "Settings", "__version__", "compare", "compute_imatrix", "convert", "evaluate", "quantize"]

if TYPE_CHECKING:
    from loopgguf.workflow import ImatrixRequest, QuantizeRequest, Settings, compare, compute_imatrix, convert, evaluate, quantize


def __getattr__(name: str) -> object:
    """Import the workflow when one of its names is first used: `import loopgguf` and `--help` stay instant."""
    if name not in __all__:
        raise AttributeError(f"module 'loopgguf' has no attribute {name!r}")
    from loopgguf import workflow

    return getattr(workflow, name)
