"""How long a plan by size takes once errors are known: a synthetic 7B of 291 tensors and 20 types, at several sizes.

python tools/bench_planner.py [--tensors N] [--sizes N]
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from loopgguf.allocation import Choice, solve
from loopgguf.formats import FORMATS, QUANTIZED_TYPES, GgmlType, padded, tensor_bytes

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


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tensors", type=int, default=291)
    parser.add_argument("--sizes", type=int, default=12, help="how many sizes between 1.8 and 8 bits per weight")
    options = parser.parse_args()
    items = synthetic(options.tensors, 0)
    n_weights = sum(max(c.n_bytes for c in item) for item in items) / 2
    print(f"{len(items)} tensors, {len(items[0])} types, {n_weights:,.0f} weights")
    print("   bpw  seconds      gap   bytes left")
    for bpw in np.geomspace(1.8, 8, options.sizes):
        budget = int(bpw * n_weights / 8)
        start = time.perf_counter()
        solution = solve(items, budget)
        print(f"{bpw:6.2f} {time.perf_counter() - start:8.2f} {solution.gap:8.1e} {budget - solution.n_bytes:12,}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
