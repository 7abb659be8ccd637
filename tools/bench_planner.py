"""How long a plan by size takes once errors are known, at several sizes.

    python tools/bench_planner.py [--model 7B|demo|smollm2|smollm2-wide|PATH]… [--tensors N] [--sizes N]

`7B` stands for made-up errors of 20 types in 291 tensors of a Llama of 7B parameters (or as many as `--tensors` says).
Of a real model errors are measured first, on sampled rows and without importance, which is not timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import models
import numpy as np

from loopgguf.allocation import Choice, solve
from loopgguf.errors import LoopggufError
from loopgguf.errortable import measure_errors
from loopgguf.formats import FORMATS, QUANTIZED_TYPES, GgmlType, padded, tensor_bytes
from loopgguf.opening import default_threads
from loopgguf.planner import measured_types, read_facts, size_problem
from loopgguf.source import open_source

MADE_UP = "7B"
PER_LAYER = ((4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096), (11008, 4096), (11008, 4096), (4096, 11008))


def synthetic(n_tensors: int, seed: int) -> list[list[Choice]]:
    """Return choices whose errors fall by four per bit, with noise, and differ between tensors by orders of magnitude."""
    generator = np.random.default_rng(seed)
    types = sorted(QUANTIZED_TYPES - {GgmlType.MXFP4, GgmlType.NVFP4, GgmlType.Q1_0, GgmlType.Q2_0, GgmlType.TQ1_0, GgmlType.TQ2_0} | {GgmlType.BF16})
    types = types[:20]
    shapes = [(32000, 4096), (32000, 4096), *(PER_LAYER[i % len(PER_LAYER)] for i in range(n_tensors - 2))]
    items = []
    for shape in shapes:
        scale = float(np.prod(shape)) * generator.lognormal(0, 1.5)
        items.append([Choice(padded(tensor_bytes(t, shape)), float(scale * 4.0 ** -FORMATS[t].bpw * generator.lognormal(0, 0.2))) for t in types])
    return items


def measured(path: Path) -> list[list[Choice]]:
    """Return the choices of a model's own tensors, by errors measured on sampled rows."""
    source = open_source(path)
    problem = size_problem(source.tensors, source.metadata)
    is_tied = all(tensor.name != "output.weight" for tensor in source.tensors)
    n_layer = read_facts(source.metadata).n_layer
    table = measure_errors(problem.requests, None, source_fingerprint=source.fingerprint, n_layer=n_layer, is_tied=is_tied, n_threads=default_threads())
    return [
        [Choice(padded(tensor_bytes(t, request.tensor.shape)), damage.estimated_error) for t, damage in measured_types(request, table)]
        for request in problem.requests
    ]


def bench(name: str, items: list[list[Choice]], n_sizes: int) -> None:
    """Print the seconds that each of several sizes takes."""
    n_weights = sum(max(c.n_bytes for c in item) for item in items) / 2  # in BF16, the largest type
    print(f"{name}: {len(items)} tensors, {max(map(len, items))} types, {n_weights:,.0f} weights")
    print("   bpw  seconds      gap   bytes left")
    least = 8 * sum(min(c.n_bytes for c in item) for item in items) / n_weights
    for bpw in np.geomspace(max(1.8, 1.01 * least), 8, n_sizes):
        budget = int(bpw * n_weights / 8)
        start = time.perf_counter()
        solution = solve(items, budget)
        print(f"{bpw:6.2f} {time.perf_counter() - start:8.2f} {solution.gap:8.1e} {budget - solution.n_bytes:12,}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    models.add_model_option(parser, MADE_UP, names=(MADE_UP, *models.NAMES))
    parser.add_argument("--tensors", type=int, default=291, help=f"of {MADE_UP}")
    parser.add_argument("--sizes", type=int, default=12, help="how many sizes, up to 8 bits per weight")
    options = parser.parse_args()
    try:
        for name in models.model_names(options):
            bench(name, synthetic(options.tensors, 0) if name == MADE_UP else measured(models.resolve_model(name)), options.sizes)
    except LoopggufError as error:
        print(f"bench_planner: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
