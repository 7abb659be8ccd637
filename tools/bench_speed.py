"""How fast llama.cpp multiplies by weights of each type here, and whether the profile `cpu-fast` has picked the fast ones.

    python tools/bench_speed.py [--threads N]

Tokens per second of a matrix product with 10⁹ weights, one token at a time and 64 at a time (see `speed.py`), measured
now. `cpu-fast` marks the profile's types.
"""

from __future__ import annotations

import argparse
import os
import sys

from loopgguf.errortable import DEFAULT_TYPES
from loopgguf.formats import FORMATS
from loopgguf.opening import default_threads
from loopgguf.profile import load_profile
from loopgguf.speed import PROMPT_TOKENS, measure_speed


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=default_threads())
    options = parser.parse_args()
    fast = load_profile("cpu-fast").types
    print(f"{options.threads} threads, load {os.getloadavg()[0]:.1f}; tok/s of 10⁹ weights")
    print(f"{'type':8} {'bpw':>7} {'1 token':>9} {PROMPT_TOKENS:>4} tokens")
    for ggml_type in sorted(DEFAULT_TYPES, key=lambda t: FORMATS[t].bpw):
        speed = measure_speed(ggml_type, n_threads=options.threads)
        mark = "  cpu-fast" if ggml_type in fast else ""
        print(f"{ggml_type.name:8} {FORMATS[ggml_type].bpw:>7.4g} {speed.generation / 1e9:>9.2f} {speed.prompt / 1e9:>11.2f}{mark}", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
