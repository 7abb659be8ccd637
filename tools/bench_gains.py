"""What error feedback makes of the errors of each type, by kind of weight: held-out errors as a part of the plain encoder's.

    python tools/bench_gains.py --imatrix PATH [--model smollm2-wide] [--layers 1,8,16,24] [--rows 256] [--types Q2_K,…] [--effort full]

PATH has Gram matrices with gradients beside it (`loopgguf imatrix --gram --gradient`). Of each weight that many rows in a
run are encoded; where rows hand errors to one another, under their part of H_O. `errortable.py` has the medians, for a plan
by size must know how good a type will be after feedback.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import models
import numpy as np
from threadpoolctl import threadpool_limits

from loopgguf import ggml
from loopgguf.accumulators import EMBEDDING, HEAD
from loopgguf.architectures import tensor_role
from loopgguf.compensate import FAST, FULL, Damping, Effort, LossCurvature, encode_guarded
from loopgguf.errortable import DEFAULT_TYPES
from loopgguf.feedback import Feedback, stored_feedback
from loopgguf.formats import FLOAT_TYPES, GgmlType, fits_row
from loopgguf.importance import given_importance
from loopgguf.planner import PlanRow
from loopgguf.presets import requires_imatrix
from loopgguf.source import Tensor, open_source
from loopgguf.statistics import sanitize_importance


def cut(curvature: LossCurvature, rows: slice) -> LossCurvature:
    """Return what is known of some rows of a weight."""
    r = curvature.row_curvature
    sides = [None if H is None else np.ascontiguousarray(H[rows, rows]) for H in (curvature.H_O, curvature.held_out_O)]
    return replace(curvature, H_O=sides[0], held_out_O=sides[1], row_curvature=None if r is None else r[rows])


def gains(
    tensor: Tensor, feedback: Feedback, importance: ggml.FloatArray | None, types: list[GgmlType], n_rows: int, effort: Effort, *, is_tied: bool
) -> Iterator[tuple[GgmlType, float]]:
    """Yield each type with the held-out error after feedback, as a part of the plain encoder's, on rows from the middle of a weight."""
    start = max(0, tensor.n_rows // 2 - n_rows // 2)
    rows = slice(start, min(start + n_rows, tensor.n_rows))
    W = ggml.decode_rows(tensor.type, tensor.read_rows(rows.start, rows.stop))
    row = PlanRow(tensor.name, tensor.shape, tensor.type, types[0], 0, "", uses_imatrix=importance is not None)
    find = feedback.curvature(row, is_tied=is_tied)
    curvature = None if find is None else find(0)
    if curvature is None:
        return
    for ggml_type in types:
        if fits_row(ggml_type, tensor.n_in) and (importance is not None or not requires_imatrix(tensor.name, ggml_type)):
            yield ggml_type, encode_guarded(W, ggml_type, importance, cut(curvature, rows), effort).held_out_ratio


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2-wide")
    parser.add_argument("--imatrix", type=Path, required=True)
    parser.add_argument("--layers", default="1,8,16,24")
    parser.add_argument("--rows", type=int, default=256)
    parser.add_argument("--types", help="with commas (default: all that a plan by size may use)")
    parser.add_argument("--effort", choices=["fast", "full"], default="full", help="full: with one damping, for speed")
    options = parser.parse_args()
    source = open_source(models.resolve_or_exit(options.model))
    feedback, imatrix = stored_feedback(options.imatrix), given_importance(source, options.imatrix)
    types = [GgmlType[name] for name in options.types.split(",")] if options.types else [t for t in DEFAULT_TYPES if t not in FLOAT_TYPES]
    effort = FAST if options.effort == "fast" else replace(FULL, dampings=(Damping(0.1),))
    layers = {int(layer) for layer in options.layers.split(",")}
    found: dict[tuple[str, GgmlType], list[float]] = defaultdict(list)
    assert feedback is not None
    is_tied = all(tensor.name != HEAD for tensor in source.tensors)
    with threadpool_limits(1, "blas"):
        for tensor in source.tensors:
            role = tensor_role(tensor.name)
            if len(tensor.shape) < 2 or not (role.layer in layers or tensor.name in (EMBEDDING, HEAD)):
                continue
            importance = imatrix(tensor.name)
            vector = None if importance is None else sanitize_importance(importance)[0][0]
            line = []
            for ggml_type, gain in gains(tensor, feedback, vector, types, options.rows, effort, is_tied=is_tied):
                found[role.kind, ggml_type].append(gain)
                line.append(f"{ggml_type.name} {gain:.3f}")
            print(tensor.name, ", ".join(line), flush=True)
    kinds = sorted({kind for kind, _ in found})
    print(f"\n| type | {' | '.join(kinds)} |\n|---|{'---:|' * len(kinds)}")
    for ggml_type in types:
        cells = [f"{np.median(found[kind, ggml_type]):.2f}" if (kind, ggml_type) in found else "" for kind in kinds]
        print(f"| {ggml_type.name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
