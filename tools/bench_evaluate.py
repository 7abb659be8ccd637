"""How fast files are measured: tokens per second of an evaluation against the two models run bare.

    python tools/bench_evaluate.py [--model demo|smollm2|smollm2-wide|PATH]… [--text FILE…] [--type Q4_K_M] [--samples 16]
        [--ctx-size 512] [--rounds 5] [--threads N]

Bare: `llama_decode` of every chunk by the reference, then by the candidate, with the logits of the scored positions, at
none of which anybody looks. Beside it `measure_quality` of the same files, A B A B …; the figure is the median of the
rounds' ratios, the bar 0.9. The machine's load is printed: on a busy machine wall-clock ratios say little; `CPU`, the
ratio of processor times, then tells more. The first line says how much higher the peak of memory is with all chunks than
with one, beside the logits of a chunk, of which each model holds its own.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path

import models
import numpy as np
from bench_imatrix import load_tokens, seconds

from loopgguf.errors import LoopggufError
from loopgguf.evaluation import measure_quality
from loopgguf.llama import Context, Model
from loopgguf.loss import first_scored
from loopgguf.workflow import QuantizeRequest, Settings, quantize

BAR = 0.9
MIB = 2**20


def decode_bare(files: tuple[Path, Path], tokens: np.ndarray, n_threads: int) -> None:
    """Compute the logits that an evaluation scores, chunk by chunk with both models, and look at none."""
    n_ctx = tokens.shape[1]
    with ExitStack() as stack:
        loaded = [stack.enter_context(Model(path)) for path in files]
        contexts = [stack.enter_context(Context(model, n_ctx, n_threads=n_threads)) for model in loaded]
        for chunk in tokens:
            for context in contexts:
                context.decode(chunk, first_logits=first_scored(n_ctx))


def peak_bytes() -> int:
    """Return the most memory this process has had."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def bench_memory(files: tuple[Path, Path], tokens: np.ndarray, n_threads: int) -> None:
    """Print by how much more chunks raise the peak of memory; brings both files into the page cache."""
    reference, candidate = files
    measure_quality(candidate, reference, tokens[:1], n_threads=n_threads)
    after_one = peak_bytes()
    measure_quality(candidate, reference, tokens, n_threads=n_threads)
    with Model(reference, vocab_only=True) as vocabulary:
        logits_bytes = np.float32().nbytes * vocabulary.n_vocab * (tokens.shape[1] - first_scored(tokens.shape[1]))
    grown = (peak_bytes() - after_one) / MIB
    print(f"{len(tokens)} chunks take {grown:.1f} MiB more memory than one; the scored logits of a chunk are {logits_bytes / MIB:.1f} MiB for each model")


def bench_speed(files: tuple[Path, Path], tokens: np.ndarray, n_rounds: int, n_threads: int) -> float:
    """Print the table of rounds; return the median ratio of speeds."""
    reference, candidate = files
    print(f"{candidate.name} against {reference.name}, {len(tokens)} × {tokens.shape[1]} tokens, {n_threads} threads, load {os.getloadavg()[0]:.1f}")
    print(f"{'round':>6} {'bare tok/s':>12} {'evaluate tok/s':>15} {'ratio':>7} {'CPU':>7}")
    rounds = []
    for number in range(n_rounds):
        bare, bare_cpu = seconds(lambda: decode_bare(files, tokens, n_threads))
        measured, measured_cpu = seconds(lambda: measure_quality(candidate, reference, tokens, n_threads=n_threads))
        rounds.append((tokens.size / bare, tokens.size / measured, bare / measured, bare_cpu / measured_cpu))
        print(f"{number + 1:>6} {rounds[-1][0]:>12.1f} {rounds[-1][1]:>15.1f} {rounds[-1][2]:>7.3f} {rounds[-1][3]:>7.3f}", flush=True)
    of_bare, of_measured, ratio, of_cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
    print(f"{'median':>6} {of_bare:>12.1f} {of_measured:>15.1f} {ratio:>7.3f} {of_cpu:>7.3f}   bar {BAR}")
    return ratio


def bench_model(name: str, options: argparse.Namespace) -> float:
    """Print the figures of one model; return the ratio that the bar is about."""
    forms = models.resolve_forms(name, options)
    candidate = options.folder / f"{forms.gguf.stem}-{options.type}.gguf"
    quantize(forms.gguf, candidate, QuantizeRequest(quant_type=options.type, imatrix=forms.imatrix), Settings(overwrite=True))
    tokens = load_tokens(forms.gguf, models.resolve_texts(options), options.ctx_size, options.samples)
    bench_memory((forms.gguf, candidate), tokens, options.threads)
    return bench_speed((forms.gguf, candidate), tokens, options.rounds, options.threads)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    models.add_model_option(parser, "demo")
    models.add_text_option(parser)
    models.add_scratch_option(parser)
    parser.add_argument("--type", default="Q4_K_M", help="preset of the candidate")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("-c", "--ctx-size", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    try:
        ratios = [bench_model(name, options) for name in models.model_names(options)]
    except LoopggufError as error:
        print(f"bench_evaluate: {error}", file=sys.stderr)
        return error.exit_code
    return 0 if min(ratios) >= BAR else 1


if __name__ == "__main__":
    sys.exit(main())
