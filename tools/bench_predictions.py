"""How well estimated errors foretell the KLD: single tensors replaced, estimated and measured.

    python tools/bench_predictions.py [--model demo|smollm2|smollm2-wide|FOLDER]… [--text FILE…] [--types Q2_K,Q3_K,Q4_0] [--pairs 84]
        [--chunks 8] [--ctx-size 256] [--calibration FILE…] [--imatrix FILE] [--texts DIR] [--svg FILE]

Of as many pairs (tensor, type), the tensors in turn, the weights are encoded as that type with the imatrix, decoded, and put
into an F32 GGUF, which llama.cpp runs beside the F32 reference: so activations are rounded on neither side, and the mean KLD
is that of these weights alone. Beside it stand the planner's estimate with gradients, the one without, and the mean squared
error of the weights. Spearman's rank correlation of each with the measured KLD is what the bars are about: 0.9 with
gradients, 0.7 without. `--texts DIR` takes the calibration, and the selection to measure on, from a folder by `texts.py`.
`--svg` draws the measured over the estimated KLD.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import models
import numpy as np
import texts
from bench_imatrix import load_tokens
from scipy.stats import spearmanr

from loopgguf import ggml
from loopgguf.architectures import tensor_role
from loopgguf.container import TensorInfo, read_gguf
from loopgguf.errors import LoopggufError
from loopgguf.errortable import ErrorTable, Request
from loopgguf.evaluation import Measure, measure_quality
from loopgguf.formats import GgmlType, fits_row, parse_type
from loopgguf.importance import Importance, given_importance, made_importance
from loopgguf.intent import ImatrixRequest, QuantizeRequest, measure_table
from loopgguf.opening import Settings, default_threads
from loopgguf.planner import TypeRules, free_requests
from loopgguf.source import Source, open_source
from loopgguf.statistics import sanitize_importance
from loopgguf.workflow import convert

BARS = {"gradients": 0.9, "prior": 0.7}
ESTIMATES = (*BARS, "squared error")


@dataclass(frozen=True)
class Pair:
    """A tensor as a type: the estimates by name, and the mean KLD of the model with it, in nats."""

    tensor: str
    type: GgmlType
    estimates: dict[str, float]
    measured: Measure


def choose(requests: Sequence[Request], types: Sequence[GgmlType], n_pairs: int) -> list[tuple[str, GgmlType]]:
    """Return pairs of the tensors in a seeded order, round after round, each with the next type that fits it."""
    order = np.random.default_rng(0).permutation(len(requests))
    rounds = [(requests[i], types[(place + turn) % len(types)]) for turn in range(len(types)) for place, i in enumerate(order)]
    return [(request.tensor.name, t) for request, t in rounds if fits_row(t, request.tensor.n_in)][:n_pairs]


def tables(
    source: Source, requests: Sequence[Request], types: Sequence[GgmlType], importance: Importance, calibration: ImatrixRequest
) -> dict[str, ErrorTable]:
    """Return the planner's two tables of errors, by what they rest on."""
    asked = [Request(request.tensor, tuple(t for t in types if fits_row(t, request.tensor.n_in))) for request in requests]
    return {
        name: measure_table(source, asked, importance, QuantizeRequest(calibration=calibration, use_gradients=name == "gradients"), Settings()) for name in BARS
    }


def replaced(weights: np.ndarray, ggml_type: GgmlType, importance: np.ndarray | None) -> np.ndarray:
    """Return matrices (n_matrices, n_rows, n_in) float32 as they are after encoding and decoding."""
    of = sanitize_importance(importance)[0] if importance is not None else [None] * len(weights)
    return np.stack([ggml.decode_rows(ggml_type, ggml.encode_rows(ggml_type, matrix, of[i])) for i, matrix in enumerate(weights)])


def view(path: Path, tensor: TensorInfo) -> np.ndarray:
    """Return the F32 weights of a tensor of a GGUF, to be written to in place, (n_matrices, n_rows, n_in)."""
    shape = (int(np.prod(tensor.shape[:-2])), *tensor.shape[-2:])
    return np.memmap(path, np.float32, "r+", tensor.offset, shape)


def measure_pairs(
    reference: Path, candidate: Path, chosen: Sequence[tuple[str, GgmlType]], estimates: dict[str, ErrorTable], importance: Importance, tokens: np.ndarray
) -> list[Pair]:
    """Measure one pair after another in the file `candidate`, a copy of the reference, and print it."""
    tensors = {tensor.name: tensor for tensor in read_gguf(reference).tensors}
    pairs = []
    for name, ggml_type in chosen:
        original, patched = view(reference, tensors[name]), view(candidate, tensors[name])
        patched[:] = replaced(np.array(original), ggml_type, importance(name))
        squared = float(np.square(patched - original).mean(dtype=np.float64))
        patched.flush()
        measured = measure_quality(candidate, reference, tokens, n_threads=default_threads()).mean_kld_nats
        patched[:] = original
        patched.flush()
        damages = {kind: table.rows[name].damage(ggml_type) for kind, table in estimates.items()}
        found = {kind: damage.estimated_error for kind, damage in damages.items() if damage is not None}
        pairs.append(Pair(name, ggml_type, {**found, "squared error": squared}, measured))
        print(
            f"{name:28} {ggml_type.name:8} {found['gradients']:.3e} {found['prior']:.3e} {squared:.3e} {measured.value:.3e} ± {measured.standard_error:.1e}",
            flush=True,
        )
    return pairs


def correlation(pairs: Sequence[Pair], estimate: str) -> float:
    """Return Spearman's correlation of an estimate with the measured KLD."""
    return float(spearmanr([pair.estimates[estimate] for pair in pairs], [pair.measured.value for pair in pairs]).statistic)


def show(name: str, pairs: Sequence[Pair]) -> None:
    """Print the correlations, and by kind of tensor how much of the measured KLD is foretold with gradients."""
    print(f"\n{name}: {len(pairs)} pairs, Spearman " + ", ".join(f"{estimate} {correlation(pairs, estimate):.3f}" for estimate in ESTIMATES))
    ratios = defaultdict(list)
    for pair in pairs:
        ratios[tensor_role(pair.tensor).kind].append(pair.estimates["gradients"] / pair.measured.value)
    print("estimated ÷ measured, median: " + ", ".join(f"{kind} {statistics.median(values):.2f} ({len(values)})" for kind, values in sorted(ratios.items())))


def draw(pairs: Sequence[Pair], path: Path) -> None:
    """Write a scatter plot, both axes logarithmic, with the line on which they are equal."""
    points = np.log10([(pair.estimates["gradients"], pair.measured.value) for pair in pairs])
    low, high = np.floor(points.min()), np.ceil(points.max())
    scaled = 40 + 400 * (points - low) / (high - low)
    ticks = "".join(
        f'<text x="{40 + 400 * (k - low) / (high - low):.0f}" y="465" text-anchor="middle">1e{k:.0f}</text>'
        f'<text x="35" y="{444 - 400 * (k - low) / (high - low):.0f}" text-anchor="end">1e{k:.0f}</text>'
        for k in np.arange(low, high + 1)
    )
    dots = "".join(
        f'<circle cx="{x:.1f}" cy="{480 - y:.1f}" r="3"><title>{pair.tensor} {pair.type.name}</title></circle>'
        for pair, (x, y) in zip(pairs, scaled, strict=True)
    )
    path.write_text(
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 460 490" font-family="sans-serif" font-size="11">'
        '<rect width="460" height="490" fill="white"/><path d="M40 40V440H440M40 440L440 40" fill="none" stroke="gray"/>'
        f'<text x="240" y="482" text-anchor="middle">estimated KLD, nats</text><text x="45" y="30">measured KLD, nats</text>{ticks}'
        f'<g fill="steelblue" fill-opacity="0.7">{dots}</g></svg>\n',
        encoding="utf-8",
    )


def bench_model(name: str, folder: Path, options: argparse.Namespace) -> bool:
    """Print the pairs and the correlations of one model; return whether they reach the bars."""
    start = time.perf_counter()
    source = open_source(models.resolve_model(name))
    calibration = ImatrixRequest(tuple(options.calibration or ()))
    importance = given_importance(source, options.imatrix) if options.imatrix else made_importance(source, calibration, Settings())
    requests = free_requests(source.tensors, source.metadata, TypeRules(), importance.has)
    types = [parse_type(text) for text in options.types.split(",")]
    chosen = choose(requests, types, options.pairs)
    estimates = tables(source, requests, types, importance, calibration)
    reference, candidate = folder / f"{name}-F32.gguf", folder / f"{name}-replaced.gguf"
    convert(source.path, reference, "f32", settings=Settings(overwrite=True))
    shutil.copyfile(reference, candidate)
    tokens = np.concatenate([load_tokens(reference, [text], options.ctx_size, options.chunks) for text in models.resolve_texts(options)])
    print(f"{name}: {len(tokens)} chunks of {options.ctx_size} tokens; estimated with gradients, without, squared error, measured", flush=True)
    pairs = measure_pairs(reference, candidate, chosen, estimates, importance, tokens)
    show(name, pairs)
    print(f"{time.perf_counter() - start:.0f} s")
    if options.svg is not None:
        draw(pairs, options.svg)
    return all(correlation(pairs, estimate) >= bar for estimate, bar in BARS.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    models.add_model_option(parser, "demo")
    models.add_text_option(parser)
    parser.add_argument("--types", default="Q2_K,Q3_K,Q4_0", help="with commas")
    parser.add_argument("--pairs", type=int, default=84)
    parser.add_argument("--chunks", type=int, default=8, help="of each text")
    parser.add_argument("-c", "--ctx-size", type=int, default=256)
    parser.add_argument(
        "--calibration", nargs="+", type=Path, metavar="FILE", help="for gradients, and for the imatrix unless one is given (default: what ships)"
    )
    parser.add_argument("--imatrix", type=Path)
    parser.add_argument("--texts", type=Path, metavar="DIR", help="a folder of texts to calibrate and measure on, see texts.py")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw measured over estimated")
    options = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory(prefix="loopgguf-predictions-") as scratch:
            if options.texts is not None:
                cut = texts.cut_splits(options.texts, Path(scratch) / "texts")
                options.calibration, options.text = options.calibration or cut.calibration, options.text or cut.selection
            reached = [bench_model(name, Path(scratch), options) for name in models.model_names(options)]
    except LoopggufError as error:
        print(f"bench_predictions: {error}", file=sys.stderr)
        return error.exit_code
    return 0 if all(reached) else 1


if __name__ == "__main__":
    sys.exit(main())
