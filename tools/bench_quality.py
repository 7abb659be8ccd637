"""How close quantized files are to the model they were made from: a table per model and text, presets and profiles side by side.

    python tools/bench_quality.py [--model demo|smollm2|smollm2-wide|PATH]… [--text FILE…] [--chunks N]
        [--types Q4_0,Q4_K_M] [--profiles balanced] [--at-size-of Q4_K_M,…] [--compensate fast|full] [--weights-only]
        [--blocks|--pure [--output-tensor-type TYPE]] [--texts DIR] [--files a.gguf,b.gguf] [--compare balanced=Q4_K_M,…] [--markdown] [--json FILE]

All files of a model are made with one imatrix, from the calibration text that ships unless `--calibration` gives
others. The presets' files are loopgguf's own: their tensors are byte for byte those of llama.cpp's quantizer with the
same importances, which `tests/test_same_bytes.py` and `tests/test_real.py` prove. So a preset's row is llama.cpp's
figure. (Importances of zero are raised a little first, as in every file that loopgguf makes.)

KLD is KL(reference ‖ file) in nats a token; ± is one standard error. `--compare A=B` adds, to A's row, the ratio of its
mean KLD to B's, with the paired standard error over chunks: below 1, A is closer to the reference. `--at-size-of B`
plans a file no larger than B's and compares it with B, and with the best of the measured presets that are as small
where that is another; with `--compensate MODE` each preset's types are encoded with error
feedback too, as B+MODE, and compared with B: the same bytes on both sides. `--blocks` gives all linears of the blocks the
type and leaves embedding and head at BF16, `--pure` gives these the type too (Q2_K where ggml cannot encode the type without an
imatrix), but the head another with `--output-tensor-type`; `--weights-only` measures each file decoded to F32, so that
llama.cpp's rounding of activations is in neither side. `--texts DIR` takes calibration and texts from a folder by
`texts.py`. Each text is measured by itself. Nothing is tuned here and no file is chosen by these figures.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import models
import texts
from rich.console import Console

from loopgguf import report
from loopgguf.comparison import file_size
from loopgguf.container import read_shards
from loopgguf.encode import Order
from loopgguf.errors import LoopggufError, UsageError
from loopgguf.evaluation import PairedComparison, Quality, compare_paired
from loopgguf.feedback import Compensate
from loopgguf.formats import IMATRIX_REQUIRED_BY_GGML, GgmlType, parse_type
from loopgguf.opening import default_threads
from loopgguf.planner import OUTPUT, TypeRules, plan_conversion
from loopgguf.presets import find_preset
from loopgguf.publish import publish
from loopgguf.source import open_source
from loopgguf.workflow import ImatrixRequest, QuantizeRequest, Settings, compare, compute_imatrix, quantize, reference_gguf

DEFAULT_TYPES, DEFAULT_PROFILES = "Q4_0,IQ4_NL,Q4_K_M,Q5_K_M,Q3_K_M", "balanced"
SIZE = "size-of-"  # begins the name of a file that is planned for a preset's exact size
COLUMNS = ("file", "bytes", "bpw", *report.MEASURED_COLUMNS)


@dataclass(frozen=True)
class Candidate:
    """A finished file: the preset, profile or file name it goes by, its exact bytes, and the bits per weight of its tensors."""

    name: str
    path: Path
    n_bytes: int
    bpw: float


@dataclass(frozen=True)
class Row:
    """What was measured of a file, and how it compares with other files, by their names."""

    candidate: Candidate
    quality: Quality
    comparisons: Mapping[str, PairedComparison] = field(default_factory=dict)


@dataclass(frozen=True)
class Section:
    """The rows of one model on one text, and what they were measured against."""

    model: str
    text: str
    reference: str
    imatrix: str
    rows: tuple[Row, ...]


# --- making and measuring ---------------------------------------------------------------------------------------------


def note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def split(names: str) -> list[str]:
    """Return the parts of a list with commas; empty for none."""
    return [name for name in names.split(",") if name]


def as_candidate(name: str, path: Path) -> Candidate:
    return Candidate(name, path, *file_size(path))


def block_rules(model: Path) -> TypeRules:
    """Return the rules that leave embedding and head, where it is a tensor of its own, at BF16."""
    return TypeRules(pure=True, output_type=GgmlType.BF16 if has_head(model) else None, token_embedding_type=GgmlType.BF16)


def has_head(model: Path) -> bool:
    """Tell whether a model's head is a tensor of its own; where it is not, an option for its type is refused."""
    return any(tensor.name == OUTPUT for tensor in open_source(model).tensors)


def pure_rules(model: Path, preset: str, output_type: GgmlType | None) -> TypeRules:
    """Return the rules that give all tensors the type of a preset, but the head another if one is asked for; embedding and head,
    which have no imatrix, go without types for which ggml needs one."""
    least = GgmlType.Q2_K if find_preset(preset).default in IMATRIX_REQUIRED_BY_GGML else None
    return TypeRules(pure=True, output_type=output_type or (least if has_head(model) else None), token_embedding_type=least)


def make_requests(model: Path, options: argparse.Namespace) -> dict[str, QuantizeRequest]:
    """Return the presets and profiles asked for, by name."""
    rules = block_rules(model) if options.blocks else TypeRules()
    common = QuantizeRequest(imatrix=options.imatrix, calibration=ImatrixRequest(tuple(options.calibration or ())), rules=rules)
    ours = replace(common, compensate=options.compensate)
    presets = dict.fromkeys([*split(options.types), *split(options.at_size_of)])
    requests = {
        name: replace(common, quant_type=name, rules=pure_rules(model, name, options.output_tensor_type) if options.pure else rules) for name in presets
    }
    if options.compensate is not Compensate.OFF:
        requests |= {f"{name}+{options.compensate}": replace(requests[name], compensate=options.compensate) for name in split(options.types)}
    return requests | {name: replace(ours, profile=name) for name in split(options.profiles)}


def make(model: Path, name: str, request: QuantizeRequest, folder: Path, options: argparse.Namespace) -> Candidate:
    """Quantize a model by one request; the first that needs an imatrix makes it, the others take it from the cache."""
    start = time.perf_counter()
    path = folder / f"{model.stem}-{name}.gguf"
    quantize(model, path, request, Settings(n_threads=options.threads, overwrite=True))
    candidate = as_candidate(name, path)
    note(f"  made {path.name}: {candidate.n_bytes:,} bytes, {time.perf_counter() - start:.0f} s")
    return candidate


def make_candidates(model: Path, folder: Path, options: argparse.Namespace) -> list[Candidate]:
    """Quantize a model as every preset and profile asked for, and at the sizes of presets; files that were given come first."""
    given, requests = list(map(Path, split(options.files))), make_requests(model, options)
    counts = Counter([*(path.stem for path in given), *(Path(name).stem for name in requests)])
    if doubled := [name for name, count in counts.items() if count > 1]:
        raise UsageError(f"--files: got {', '.join(doubled)} twice, expected names that neither another file nor a type or profile has: rename one")
    candidates = {path.stem: as_candidate(path.stem, path) for path in given}
    for name, request in requests.items():
        candidates[Path(name).stem] = make(model, Path(name).stem, request, folder, options)
        if name in split(options.at_size_of):
            sized = replace(request, quant_type=None, size_bytes=candidates[name].n_bytes, compensate=options.compensate)
            candidates[f"{SIZE}{name}"] = make(model, f"{SIZE}{name}", sized, folder, options)
    return list(candidates.values())


def make_grams(model: Path, folder: Path, options: argparse.Namespace) -> Path:
    """Return an imatrix with Gram matrices and gradients beside it, from one pass for all files that take them."""
    start = time.perf_counter()
    request = ImatrixRequest(tuple(options.calibration or ()), gram=True, gradient=True)
    path = compute_imatrix(model, folder / f"{model.stem}.imatrix.gguf", request, Settings(n_threads=options.threads, overwrite=True)).path
    note(f"  made {path.name} with Gram matrices: {time.perf_counter() - start:.0f} s")
    return path


def imatrix_text(candidates: Sequence[Candidate]) -> str:
    """Return what the files' imatrix was made from, as they say themselves."""
    for candidate in candidates:
        metadata = read_shards(candidate.path)[0].metadata
        if "quantize.imatrix.dataset" in metadata:
            return f"{metadata['quantize.imatrix.dataset'].data}, {metadata['quantize.imatrix.chunks_count'].data} chunks"
    return "none"


def decode_weights(candidate: Candidate, model: Path, folder: Path) -> Path:
    """Write a file's weights as F32 into a folder, and return that file; a given file may be called what a made one is, so it goes by its candidate's name."""
    source, decoded = open_source(candidate.path), folder / f"{model.stem}-{candidate.name}.decoded.gguf"
    plan = plan_conversion(source.tensors, source.metadata, "f32", allow_requantize=True)
    publish(source, Order(plan), decoded, Settings(overwrite=True), ())
    return decoded


def measure(candidates: Sequence[Candidate], paths: Sequence[Path], reference: Path, text: Path, options: argparse.Namespace) -> list[Row]:
    """Measure all files on one text, run from `paths`; the reference is run once for all."""
    start = time.perf_counter()

    def tell(phase: str, done: int, total: int) -> None:
        if done * 10 // total > (done - 1) * 10 // total:
            note(f"    {phase}: {done} of {total}, {time.perf_counter() - start:.0f} s")

    result = compare(paths, reference, (text,), n_chunks=options.chunks, settings=Settings(n_threads=options.threads, progress=tell))
    note(f"  {len(candidates)} files on {text.name}: {time.perf_counter() - start:.0f} s")
    measured = {file.path: file.quality for file in result.files}
    return [Row(candidate, measured[path]) for candidate, path in zip(candidates, paths, strict=True)]


def best_of_size(rows: Sequence[Row], presets: Sequence[str], preset: str) -> str:
    """Return the preset with the least mean KLD of those whose files are no larger than that of `preset`."""
    limit = next(row.candidate.n_bytes for row in rows if row.candidate.name == preset)
    fitting = [row for row in rows if row.candidate.name in presets and row.candidate.n_bytes <= limit]
    return min(fitting, key=lambda row: row.quality.mean_kld_nats.value).candidate.name


def add_comparisons(rows: Sequence[Row], pairs: Mapping[str, str], options: argparse.Namespace) -> tuple[Row, ...]:
    """Return the rows with the comparisons that `pairs` (name to baseline) asks for, and those of files by size with the best preset."""
    by_name = {row.candidate.name: row.quality for row in rows}
    baselines = {name: [baseline] for name, baseline in pairs.items()}
    for preset in split(options.at_size_of):
        baselines[f"{SIZE}{preset}"].append(best_of_size(rows, [*split(options.types), *split(options.at_size_of)], preset))
    return tuple(replace(row, comparisons={name: compare_paired(row.quality, by_name[name]) for name in baselines.get(row.candidate.name, ())}) for row in rows)


def run_model(name: str, model: Path, pairs: Mapping[str, str], folder: Path, options: argparse.Namespace) -> Iterator[Section]:
    """Make a model's files and measure them on each text; yield the results of a text as soon as they are there."""
    note(f"{name}: {model}")
    reference, notes = reference_gguf(options.reference or model, Settings(n_threads=options.threads))
    for line in notes:
        note(f"  {line}")
    if options.compensate is not Compensate.OFF and options.imatrix is None:
        options = argparse.Namespace(**{**vars(options), "imatrix": make_grams(model, folder, options)})
    candidates = make_candidates(model, folder, options)
    unknown = ({*pairs, *pairs.values()}) - {candidate.name for candidate in candidates}
    if unknown:
        raise UsageError(f"--compare: got {', '.join(sorted(unknown))}, expected names among {', '.join(c.name for c in candidates)}")
    paths = [decode_weights(candidate, model, folder) if options.weights_only else candidate.path for candidate in candidates]
    for text in models.resolve_texts(options):
        rows = measure(candidates, paths, reference, text, options)
        reference_type = next(t.type.name for t in read_shards(reference)[0].tensors if len(t.shape) > 1)
        yield Section(name, text.name, reference_type, imatrix_text(candidates), add_comparisons(rows, pairs, options))


# --- showing ----------------------------------------------------------------------------------------------------------


def cells(row: Row) -> list[str]:
    """Return the texts of a table's line."""
    candidate = row.candidate
    ratios = [f"{report.with_error(comparison.mean_kld_ratio, 3)} × {name}" for name, comparison in row.comparisons.items()]
    return [
        candidate.name,
        f"{candidate.n_bytes:,}",
        f"{candidate.bpw:.3f}",
        *report.measured_cells(row.quality),
        ", ".join(ratios),
    ]


def title(section: Section) -> str:
    quality = section.rows[0].quality
    scored = f"{quality.n_scored:,} scored tokens ({quality.n_chunks} chunks of {quality.n_ctx}) of {section.text}"
    reference = f"{section.reference} reference with perplexity {quality.reference_perplexity.value:.3f}"
    return f"{section.model}: {scored}, against the {reference}; imatrix from {section.imatrix}"


def columns(section: Section) -> list[str]:
    """Return the headers; that of the comparison only where there is one."""
    return [*COLUMNS, *(["mean KLD compared"] if any(row.comparisons for row in section.rows) else [])]


def show(section: Section, *, markdown: bool) -> None:
    """Print a section as a table for a terminal, or as Markdown."""
    headers = columns(section)
    lines = [cells(row)[: len(headers)] for row in section.rows]
    if markdown:
        print(f"{title(section)}.\n")
        print(f"| {' | '.join(headers)} |\n|---|{'---:|' * (len(headers) - 1)}")
        for line in lines:
            print(f"| {' | '.join(line)} |")
        print(flush=True)
        return
    table = report.table(*headers, title=title(section), numbers=headers[1:])
    for line in lines:
        table.add_row(*line)
    Console(width=200, highlight=False, soft_wrap=True).print(table, "")


def to_json(section: Section) -> dict[str, object]:
    """Return a section as JSON-able values."""
    rows = [
        {
            "name": row.candidate.name,
            "bytes": row.candidate.n_bytes,
            "bpw": row.candidate.bpw,
            **report.quality_json(row.quality),
            "compared": [{"with": name, **asdict(comparison)} for name, comparison in row.comparisons.items()],
        }
        for row in section.rows
    ]
    return {"model": section.model, "text": section.text, "reference": section.reference, "imatrix": section.imatrix, "files": rows}


# --- the command ------------------------------------------------------------------------------------------------------


def parse_pairs(text: str) -> dict[str, str]:
    """Return `A=B,…` as a mapping from a file to its baseline. Raises UsageError for anything else."""
    pairs = {}
    for pair in split(text):
        name, equals, baseline = pair.partition("=")
        if not (name and equals and baseline):
            raise UsageError(f"--compare: got {pair!r}, expected NAME=BASELINE such as balanced=Q4_K_M")
        pairs[name] = baseline
    return pairs


def run(options: argparse.Namespace) -> None:
    pairs = {f"{SIZE}{name}": name for name in split(options.at_size_of)}
    if options.compensate is not Compensate.OFF:
        pairs |= {f"{name}+{options.compensate}": name for name in split(options.types)}
    pairs |= parse_pairs(options.compare)
    if options.output_tensor_type is not None and not options.pure:
        raise UsageError("--output-tensor-type: it says what the head is in pure files: give --pure too, or leave it out")
    sections: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory(prefix="loopgguf-quality-") as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if options.texts:
            cut = texts.cut_splits(options.texts, folder / "texts")
            options.calibration, options.text = options.calibration or list(cut.calibration), options.text or list(cut.verdict)
        for name, model in models.resolve_models(options).items():
            for section in run_model(name, model, pairs, folder, options):
                show(section, markdown=options.markdown)
                sections.append(to_json(section))
                if options.json:  # after each text: what took hours is not lost when a later one fails
                    options.json.write_text(json.dumps(sections, indent=1) + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    models.add_model_option(parser, "demo")
    models.add_text_option(parser)
    parser.add_argument("--types", default=DEFAULT_TYPES, help=f"presets, with commas (default {DEFAULT_TYPES})")
    parser.add_argument("--profiles", default=DEFAULT_PROFILES, help=f"profiles or their YAML files, with commas (default {DEFAULT_PROFILES})")
    parser.add_argument("--at-size-of", default="", metavar="TYPES", help="presets, with commas, for whose sizes files are planned and compared with them")
    parser.add_argument(
        "--compensate",
        type=Compensate,
        default=Compensate.OFF,
        help="error feedback in profiles and files by size, and in a second file of each preset, which is compared with it",
    )
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument("--blocks", action="store_true", help="the types for the linears of the blocks only, embedding and head at BF16")
    scope.add_argument("--pure", action="store_true", help="the types for all tensors, embedding and head too")
    parser.add_argument("--output-tensor-type", type=parse_type, metavar="TYPE", help="with --pure, another type for the head")
    parser.add_argument("--weights-only", action="store_true", help="measure the files' weights, decoded to F32")
    parser.add_argument("--texts", type=Path, metavar="DIR", help="a folder of texts to calibrate and measure on, see texts.py")
    parser.add_argument("--files", default="", help="finished GGUFs of the same model to measure too, with commas")
    parser.add_argument("--compare", default="", metavar="A=B,…", help="print the ratio of A's mean KLD to B's; they should be of the same size")
    parser.add_argument("--reference", type=Path, metavar="GGUF", help="measure against this full-precision file (default: the model, converted as it is)")
    parser.add_argument("--imatrix", type=Path, help="use this one instead of making one")
    parser.add_argument("--calibration", nargs="+", type=Path, metavar="FILE", help="make the imatrix from these texts (default: the one that ships)")
    parser.add_argument("--chunks", type=int, help="chunks of each text to measure on (default: all)")
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--keep", type=Path, metavar="DIR", help="keep the files made in this folder")
    parser.add_argument("--markdown", action="store_true", help="print Markdown tables")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    try:
        run(parser.parse_args())
    except LoopggufError as error:
        print(f"bench_quality: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
