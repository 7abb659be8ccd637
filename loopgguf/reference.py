"""The full-precision GGUF that files of a model are measured against: the model itself, or a conversion kept in the cache."""

from __future__ import annotations

from pathlib import Path

from loopgguf.checkpoint import cache_path, content_key
from loopgguf.encode import Order
from loopgguf.formats import QUANTIZED_TYPES, GgmlType
from loopgguf.opening import Settings, open_model
from loopgguf.planner import plan_conversion
from loopgguf.publish import publish, total_bytes
from loopgguf.source import Source
from loopgguf.version import __version__


def _cached(source: Source) -> Path:
    return cache_path("reference", content_key(__version__, source.fingerprint), ".gguf")


def known_reference(source: Source) -> Path | None:
    """Return the full-precision GGUF of a model where there is one already, without making it."""
    if not source.is_checkpoint:
        return source.path
    return path if (path := _cached(source)).exists() else None


def reference_gguf(model: Path, settings: Settings | None = None) -> tuple[Path, list[str]]:
    """Return a full-precision GGUF of `model`: itself if it is one, else a conversion kept in the cache folder, whose
    size is announced before."""
    settings = settings or Settings()
    source, notes = open_model(model, settings)
    if not source.is_checkpoint:
        return model, [*notes, *_quantized_reference(source)]
    path = _cached(source)
    if path.exists():
        return path, [*notes, f"reference: {path} ({path.stat().st_size:,} bytes), converted before from the same checkpoint"]
    is_float32 = any(tensor.type is GgmlType.F32 and len(tensor.shape) > 1 for tensor in source.tensors)
    order = Order(plan_conversion(source.tensors, source.metadata, "f32" if is_float32 else "auto"))
    settings.announce(f"reference: {model} is converted to {path}, {total_bytes(source, order):,} bytes on disk, and kept for the next run")
    publish(source, order, path, settings, notes)
    return path, notes


def _quantized_reference(source: Source) -> list[str]:
    """Say it when a reference is not full precision: what is measured against it is not the loss to the original."""
    quantized = sum(tensor.type in QUANTIZED_TYPES for tensor in source.tensors)
    return [f"reference: {quantized} tensors of {source.path.name} are quantized themselves: the figures leave out what that cost"] if quantized else []
