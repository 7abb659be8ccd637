"""The command line: parse → call → print → exit code. No logic; heavy imports inside commands, so `--help` is instant.

Tables and results go to standard output, progress and notes to standard error. Exit codes: 0 done; 1 the result does
not pass its checks; 2 the request cannot be met; 3 bad input; 4 the output cannot be written; 75 stopped, and the same
command goes on; 130 interrupted.
"""

from __future__ import annotations

import io
import json
import logging
import math
import shlex
import signal
import sys
from contextlib import ExitStack
from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated

import typer

from loopgguf.errors import LoopggufError, UsageError, one_line
from loopgguf.version import __version__

if TYPE_CHECKING:
    from rich.console import Console

    from loopgguf.gate import Gate
    from loopgguf.pipeline import WriteResult
    from loopgguf.planner import TypeRules
    from loopgguf.super_weights import Found
    from loopgguf.workflow import ComparisonResult, QuantizeRequest, Settings

EXIT_TERMINATED = 143

app = typer.Typer(
    name="loopgguf",
    help="Turns a language model's checkpoint into the best GGUF of a given size, on an ordinary machine.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "token_normalize_func": lambda name: name.replace("_", "-")},
)


MAX_BPW = 32.0


class OutType(StrEnum):
    """What `convert` writes; `auto` keeps the checkpoint's own type."""

    AUTO = "auto"
    F32 = "f32"
    F16 = "f16"
    BF16 = "bf16"
    Q8_0 = "q8_0"


class ImatrixForm(StrEnum):
    """The forms of an imatrix file."""

    GGUF = "gguf"
    DAT = "dat"


class CompensateMode(StrEnum):
    """`feedback.Compensate`, without importing it."""

    OFF = "off"
    AUTO = "auto"
    FAST = "fast"
    FULL = "full"


class Device(StrEnum):
    """Where torch runs a checkpoint folder."""

    CPU = "cpu"
    CUDA = "cuda"


_MODEL_HELP = "A Hugging Face folder (config.json, safetensors, tokenizer files) or an F32/F16/BF16 GGUF (the first shard of a split one)."
ModelArgument = Annotated[Path, typer.Argument(metavar="MODEL", help=_MODEL_HELP)]
OutputOption = Annotated[
    Path | None, typer.Option("-o", "--output", "--outfile", "--output-file", help="Output file; derived from the model's name when left out.")
]
TextOption = Annotated[
    list[Path] | None,
    typer.Option(
        "-f",
        "--file",
        metavar="TEXT",
        help="Text: .txt, .json, .jsonl, .parquet, a folder, - for standard input, hf:owner/name[:config][:split], wikitext2 or c4; may be given "
        "several times. Default: the text that ships with loopgguf.",
    ),
]
ThreadsOption = Annotated[int | None, typer.Option("-t", "--threads", min=1, max=1024, help="CPU threads. Default: all.")]
ContextOption = Annotated[int, typer.Option("-c", "--ctx-size", min=16, help="Tokens of a chunk.")]
SamplesOption = Annotated[int, typer.Option("--samples", "--chunks", min=1, help="Chunks of calibration text to use at most.")]
ParseSpecialOption = Annotated[bool, typer.Option("--parse-special", help="Read special tokens spelled in the text as such; in conversations they always are.")]
SeedOption = Annotated[int, typer.Option("--seed", help="Chooses documents where there are more than asked for; a .txt alone is used from its start.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="Where torch runs a checkpoint folder; llama.cpp runs a GGUF on the CPU.")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", "--force", help="Replace an existing output.")]
ResumeOption = Annotated[bool, typer.Option("--resume/--no-resume", help="Go on with an unfinished run of the same request, or throw it away.")]
JobFolderOption = Annotated[
    Path | None, typer.Option("--job-folder", help="Where an unfinished run is kept. Default: the output's name and .loopgguf-job; gone when finished.")
]
KeepJobOption = Annotated[bool, typer.Option("--keep-job", help="Leave the job folder there when the run is finished.")]
FullHashOption = Annotated[
    bool, typer.Option("--full-hash", help="Go on only with the very bytes of the model, not just files of the same size, time and header; reads them all.")
]
PreTokenizerOption = Annotated[
    str | None, typer.Option("--pre-tokenizer", metavar="NAME", help="llama.cpp's name of the pre-tokenizer, where it cannot be told from the tokenizer.")
]
MemoryOption = Annotated[
    str, typer.Option("--max-memory", metavar="SIZE", help="Memory for hidden states, Gram matrices and gradients: MiB, or a size with a unit such as 4GiB.")
]
BufferOption = Annotated[str, typer.Option("--max-buffer-size", metavar="SIZE", help="Memory for rows in flight: MiB, or a size with a unit such as 64MiB.")]
ProfileOption = Annotated[
    str | None, typer.Option("--profile", help="Name of a profile, or a YAML/JSON file. Default: balanced; with a size: none, all tensors are free.")
]
QuantTypeOption = Annotated[str | None, typer.Option("--quant-type", "--outtype", "--ftype", help="One of llama-quantize's presets instead, such as Q4_K_M.")]
SizeOption = Annotated[str | None, typer.Option("--size", metavar="SIZE", help="The best file of at most this size, such as 3.2GB: types are chosen by error.")]
BpwOption = Annotated[float | None, typer.Option("--target-bpw", metavar="BITS", help="The same, in bits per weight of the whole file.")]
TargetKldOption = Annotated[
    float | None, typer.Option("--target-kld", metavar="NATS", help="The smallest file whose estimated mean KLD is at most this; a checkpoint folder only.")
]
ExactOption = Annotated[bool, typer.Option("--exact-errors", help="Measure errors on all rows rather than on a sample.")]
ImatrixOption = Annotated[
    Path | None, typer.Option("--imatrix", help="Importance matrix (GGUF or .dat). Default: made from the calibration text, or the one made before.")
]
NoImatrixOption = Annotated[bool, typer.Option("--no-imatrix", help="Quantize without an importance matrix.")]
TensorTypeOption = Annotated[
    list[str] | None,
    typer.Option("--tensor-type", metavar="REGEX=TYPE", help="Type of the tensors whose name matches; the first match wins. May be given several times."),
]
PureOption = Annotated[bool, typer.Option("--pure", help="One type for all tensors of a preset.")]
OutputTypeOption = Annotated[str | None, typer.Option("--output-tensor-type", help="Type of output.weight.")]
EmbeddingTypeOption = Annotated[str | None, typer.Option("--token-embedding-type", help="Type of the token embeddings.")]
LeaveOutputOption = Annotated[bool, typer.Option("--leave-output-tensor", help="Keep output.weight as it is.")]
RequantizeOption = Annotated[bool, typer.Option("--allow-requantize", help="Accept a source that is quantized already.")]
CompensateOption = Annotated[
    CompensateMode,
    typer.Option(
        "--compensate", help="Error feedback around the encoder and briefly over single codes (fast), or thoroughly (full); auto: full up to 2 billion weights."
    ),
]
ReferenceOption = Annotated[Path, typer.Option("--reference", metavar="MODEL", help="The model it was made from: a folder or a full-precision GGUF.")]
EvaluatedChunksOption = Annotated[int | None, typer.Option("--chunks", min=1, help="Chunks of text to use at most. Default: all.")]
TaskOption = Annotated[
    list[Path] | None,
    typer.Option("--task", metavar="FILE.jsonl", help="Questions with right answers: multiple choice, or last words. May be given several times."),
]
MaxKldOption = Annotated[
    float | None,
    typer.Option("--max-kld", metavar="NATS", help="Quality gate: mean KLD on the selection text at most this, else the file is made better."),
]
MaxPplOption = Annotated[str | None, typer.Option("--max-ppl-increase", metavar="2%", help="Quality gate: perplexity at most so much above the model's.")]
MaxSizeOption = Annotated[
    str | None, typer.Option("--max-size", metavar="SIZE", help="How large a file may become to pass its gate. Default: --size, else no limit.")
]
SelectionOption = Annotated[
    list[Path] | None,
    typer.Option(
        "--selection-file", metavar="TEXT", help="Text that gate, guard and search measure on, in neither calibration nor report. Default: one that ships."
    ),
]
SearchOption = Annotated[
    float | None,
    typer.Option("--search-minutes", metavar="N", help="With a size: look so long for a plan of lower measured KLD, on the selection text."),
]
LevelsOption = Annotated[
    str | None,
    typer.Option("--levels", metavar="tensor,layer", help="Measure the error of each tensor's weights, and of each block's output on the same text, too."),
]
ReportOption = Annotated[Path | None, typer.Option("--report", metavar="NAME", help="Write NAME.json, NAME.md and NAME.html too.")]
CoverageOption = Annotated[
    float | None,
    typer.Option("--super-weight-coverage", help="Part of all weights in the mask: the largest |w|·√importance. Default: 0.0001, 0.01 %.", show_default=False),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


# --- printing ---------------------------------------------------------------------------------------------------------


def _console(*, stderr: bool = False) -> Console:
    """Return a console that never folds a table's lines when the output is a file or a pipe."""
    from rich.console import Console

    console = Console(stderr=stderr, highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 200
    return console


class _ProgressBars:
    """One bar with an ETA per phase, on standard error; plain silence when that is no terminal."""

    def __init__(self, stack: ExitStack) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description:<40}"), BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("ETA"), TimeRemainingColumn())
        console = _console(stderr=True)
        self._bars = stack.enter_context(Progress(*columns, console=console, transient=True, disable=not console.is_terminal))
        self._task = self._bars.add_task("", total=None)
        self._done, self._total = 0, -1

    def __call__(self, phase: str, done: int, total: int) -> None:
        if total != self._total or done < self._done:  # a new phase, maybe of as many steps, starts its own clock
            self._bars.remove_task(self._task)
            self._task = self._bars.add_task(phase, total=total)
        self._done, self._total = done, total
        self._bars.update(self._task, description=phase, completed=done)


def _settings(
    stack: ExitStack,
    threads: int | None,
    *,
    overwrite: bool = False,
    max_buffer: str = "",
    max_memory: str = "",
    pre_tokenizer: str | None = None,
    device: Device = Device.CPU,
    job_folder: Path | None = None,
    resume: bool = True,
    keep_job: bool = False,
    full_hash: bool = False,
) -> Settings:
    from loopgguf.formats import parse_size
    from loopgguf.layerwise import DEFAULT_MAX_MEMORY_BYTES
    from loopgguf.opening import DEFAULT_MAX_BUFFER_BYTES, Settings, default_threads

    return Settings(
        n_threads=threads or default_threads(),
        max_buffer_bytes=parse_size(max_buffer, bare_unit_bytes=1 << 20) if max_buffer else DEFAULT_MAX_BUFFER_BYTES,
        max_memory_bytes=parse_size(max_memory, bare_unit_bytes=1 << 20) if max_memory else DEFAULT_MAX_MEMORY_BYTES,
        overwrite=overwrite,
        pre_tokenizer=pre_tokenizer,
        device=device.value,
        job_folder=job_folder,
        resume=resume,
        keep_job=keep_job,
        full_hash=full_hash,
        progress=_ProgressBars(stack),
        announce=lambda line: _print_notes((line,)),
    )


def _print_notes(notes: tuple[str, ...]) -> None:
    console = _console(stderr=True)
    for note in notes:
        console.print(f"note: {one_line(note)}", markup=False)


def _print_json(value: object) -> None:
    _console().print_json(json.dumps(value))


def _print_written(result: WriteResult, *, verbose: bool) -> None:
    from loopgguf import report

    console = _console()
    if verbose:
        console.print(report.plan_table(result.plan))
        console.print()
    console.print(report.plan_types(result.plan))
    console.print()
    for line in report.written_lines(result):
        console.print(line, markup=False)


def _measured(
    candidates: list[Path],
    reference: Path,
    files: list[Path] | None,
    *,
    baseline: str | None = None,
    ctx_size: int,
    chunks: int | None,
    threads: int | None,
    tasks: list[Path] | None,
    levels: str | None,
    name: Path | None,
    overwrite: bool,
) -> ComparisonResult:
    """Measure files; the name of the report that will be written is checked before the work."""
    from loopgguf.fidelity import parse_levels
    from loopgguf.opening import refuse_same_file
    from loopgguf.reportfile import refuse_existing_report, report_paths
    from loopgguf.workflow import compare

    if name is not None:
        refuse_existing_report(name, overwrite=overwrite)
        for path in report_paths(name):
            refuse_same_file(path, [*candidates, reference, *(files or ()), *(tasks or ())])
    with ExitStack() as stack:
        result = compare(
            candidates,
            reference,
            tuple(files or ()),
            baseline=baseline,
            tasks=tuple(tasks or ()),
            levels=parse_levels(levels) if levels is not None else (),
            ctx_size=ctx_size,
            n_chunks=chunks,
            settings=_settings(stack, threads),
        )
    _print_notes(result.notes)
    return result


def _write_report(result: ComparisonResult, name: Path | None, threads: int | None, *, overwrite: bool) -> None:
    """Write the report that was asked for; last, so that nothing measured is lost when it cannot be written."""
    from loopgguf.workflow import write_report

    if name is None:
        return
    with ExitStack() as stack:
        paths = write_report(result, name, command=_State.command, settings=_settings(stack, threads, overwrite=overwrite))
    _print_notes((f"report: wrote {', '.join(str(path) for path in paths)}",))


def _print_tasks(result: ComparisonResult) -> None:
    from loopgguf import report

    if result.tasks:
        _console().print()
        _console().print(report.tasks_table(result.tasks, [file.name for file in result.files]))


def _print_levels(result: ComparisonResult) -> None:
    """Print what was measured below the level of tokens, and whether files of few bits still write."""
    from loopgguf import report

    console = _console()
    for file, collapse in zip(result.files, result.collapses, strict=True):
        if collapse is not None:
            console.print()
            console.print(f"{file.name}: {collapse.verdict}", markup=False)
    for file, fidelity in zip(result.files, result.fidelities, strict=True):
        for table in report.fidelity_tables(fidelity, file.name if len(result.files) > 1 else ""):
            console.print()
            console.print(table)


def _rules(tensor_type: list[str] | None, output_type: str | None, embedding_type: str | None, **flags: bool) -> TypeRules:
    from loopgguf.formats import parse_type
    from loopgguf.planner import TypeRules, parse_overrides

    return TypeRules(
        overrides=parse_overrides(tensor_type or ()),
        output_type=parse_type(output_type) if output_type else None,
        token_embedding_type=parse_type(embedding_type) if embedding_type else None,
        **flags,
    )


def _request(
    profile: str | None,
    quant_type: str | None,
    size: str | None,
    target_bpw: float | None,
    target_kld: float | None,
    imatrix: Path | None,
    plan: Path | None,
    rules: TypeRules,
    *,
    use_imatrix: bool,
) -> QuantizeRequest:
    """Return the request; raise UsageError when two options say what to make, or the imatrix is given and refused."""
    from loopgguf.formats import parse_size
    from loopgguf.workflow import QuantizeRequest

    intents = {"--quant-type": quant_type, "--size": size, "--target-bpw": target_bpw, "--target-kld": target_kld, "--plan": plan}
    given = [f"{flag} {value}" for flag, value in intents.items() if value is not None]
    given += [f"--profile {profile}"] if profile is not None and (quant_type or plan) else []
    if len(given) > 1:
        raise UsageError(f"{given[0]} and {given[1]} contradict each other: give one of them")
    if imatrix is not None and not use_imatrix:
        raise UsageError("--imatrix and --no-imatrix contradict each other: give one of them")
    if target_bpw is not None and not 0 < target_bpw <= MAX_BPW:
        raise UsageError(f"--target-bpw: got {target_bpw}, expected more than 0 and at most {MAX_BPW} bits per weight")
    if target_kld is not None and not 0 < target_kld < math.inf:
        raise UsageError(f"--target-kld: got {target_kld:g}, expected a mean KLD in nats above 0, such as 0.05")
    if plan is not None and (rules != type(rules)() or not use_imatrix):
        raise UsageError("--plan already says every type: leave out the options that choose types, or plan again with them")
    size_bytes = parse_size(size) if size is not None else None
    return QuantizeRequest(profile, quant_type, size_bytes, target_bpw, target_kld, plan, rules=rules, imatrix=imatrix, use_imatrix=use_imatrix)


def _coverage(given: float | None, option: str, *, wanted: bool) -> float:
    from loopgguf.protection import DEFAULT_COVERAGE

    if given is not None and not wanted:
        raise UsageError(f"--super-weight-coverage says how large the mask of {option} is: give both, or neither")
    return DEFAULT_COVERAGE if given is None else given


def _super_budget(given: str | None, *, wanted: bool) -> int:
    from loopgguf.formats import parse_size

    if given is not None and not wanted:
        raise UsageError("--super-weight-budget says what --protect-super-weights may take: give both, or neither")
    return 0 if given is None or given.strip() == "0" else parse_size(given)


def _gate(max_kld: float | None, max_ppl_increase: str | None, max_size: str | None, files: list[Path] | None, *, has_other_use: bool) -> Gate | None:
    from loopgguf.formats import parse_size
    from loopgguf.gate import Gate, parse_percent

    percent = parse_percent(max_ppl_increase, "--max-ppl-increase") if max_ppl_increase is not None else None
    gate = Gate(max_kld, percent, parse_size(max_size) if max_size is not None else None, tuple(files or ()))
    return None if gate == Gate(files=gate.files if has_other_use else ()) else gate


def _print_found(found: Found) -> None:
    from loopgguf import report

    console = _console()
    if found.weights:
        console.print(report.super_weight_table(found))
        console.print()
    for line in report.super_weight_summary(found):
        console.print(line, markup=False)


# --- commands ---------------------------------------------------------------------------------------------------------


@app.command()
def imatrix(
    model: Annotated[Path | None, typer.Argument(metavar="[MODEL]", help=_MODEL_HELP + " Not needed to merge files given with --in-file.")] = None,
    output: OutputOption = None,
    file: TextOption = None,
    ctx_size: ContextOption = 512,
    samples: SamplesOption = 512,
    process_output: Annotated[bool, typer.Option("--process-output", help="Collect the output head's input too.")] = False,
    gram: Annotated[bool, typer.Option("--gram", help="Write Gram matrices beside the imatrix too, for error feedback.")] = False,
    gradient: Annotated[bool, typer.Option("--gradient", help="With --gram: those weighted by gradients too. A checkpoint folder only.")] = False,
    attention: Annotated[bool, typer.Option("--attention", help="Write beside the imatrix what attention each position receives; slower.")] = False,
    super_weights: Annotated[
        bool, typer.Option("--super-weights", help="Look for super weights in the same pass, and write them and the mask beside the imatrix.")
    ] = False,
    super_weight_coverage: CoverageOption = None,
    parse_special: ParseSpecialOption = False,
    seed: SeedOption = 0,
    in_file: Annotated[list[Path] | None, typer.Option("--in-file", help="An imatrix whose sums are added; may be given several times.")] = None,
    output_format: Annotated[
        ImatrixForm | None, typer.Option("--output-format", help="Default: dat for a name that ends in .dat, else gguf.", case_sensitive=False)
    ] = None,
    resume: ResumeOption = True,
    job_folder: JobFolderOption = None,
    keep_job: KeepJobOption = False,
    full_hash: FullHashOption = False,
    device: DeviceOption = Device.CPU,
    max_memory: MemoryOption = "2048",
    threads: ThreadsOption = None,
    overwrite: OverwriteOption = False,
    pre_tokenizer: PreTokenizerOption = None,
) -> None:
    """Compute the importance matrix of MODEL on calibration text, as a file llama-quantize reads too; or merge such files."""
    from loopgguf import report
    from loopgguf.workflow import ImatrixRequest, Settings, compute_imatrix, merge_imatrices

    request = ImatrixRequest(
        files=tuple(file or ()),
        ctx_size=ctx_size,
        n_samples=samples,
        process_output=process_output,
        parse_special=parse_special,
        seed=seed,
        gram=gram or gradient,
        gradient=gradient,
        attention=attention,
        super_weights=super_weights,
        super_weight_coverage=_coverage(super_weight_coverage, "--super-weights", wanted=super_weights),
        in_files=tuple(in_file or ()),
        output_format=output_format.value if output_format else None,
    )
    if model is None:
        if not in_file:
            raise UsageError("nothing to do: got neither a MODEL nor --in-file, expected one of them")
        path, merged = merge_imatrices(in_file, output, request, Settings(overwrite=overwrite))
        _console().print(f"wrote {path}: {len(merged.columns)} tensors of {len(in_file)} files, {merged.n_chunks} chunks", markup=False)
        return
    with ExitStack() as stack:
        settings = _settings(
            stack,
            threads,
            overwrite=overwrite,
            pre_tokenizer=pre_tokenizer,
            device=device,
            max_memory=max_memory,
            job_folder=job_folder,
            resume=resume,
            keep_job=keep_job,
            full_hash=full_hash,
        )
        result = compute_imatrix(model, output, request, settings)
    _print_notes(result.notes)
    run, console = result.run, _console()
    console.print(report.shares_table(result.chunks.shares))
    console.print()
    console.print(
        f"perplexity {run.perplexity:.4f} ± {run.standard_error:.4f} over {run.n_tokens:,} scored tokens of {', '.join(result.chunks.names)}", markup=False
    )
    if result.super_weights is not None:
        _print_found(result.super_weights)
    console.print(f"wrote {result.path}: {len(result.statistics.columns)} tensors, {result.chunks.n_chunks} chunks of {ctx_size} tokens", markup=False)


@app.command("super-weights")
def super_weights(
    model: ModelArgument,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE.json", help="Write them as JSON, and the mask's indices beside it as .safetensors.")
    ] = None,
    imatrix_file: ImatrixOption = None,
    no_imatrix: Annotated[bool, typer.Option("--no-imatrix", help="Leave out the mask, which needs an importance matrix.")] = False,
    super_weight_coverage: CoverageOption = None,
    file: TextOption = None,
    ctx_size: ContextOption = 512,
    samples: SamplesOption = 512,
    parse_special: ParseSpecialOption = False,
    seed: SeedOption = 0,
    device: DeviceOption = Device.CPU,
    max_memory: MemoryOption = "2048",
    threads: ThreadsOption = None,
    overwrite: OverwriteOption = False,
    pre_tokenizer: PreTokenizerOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show the single weights of MODEL that it cannot do without, with its perplexity without each, and the mask."""
    from loopgguf import report
    from loopgguf.workflow import ImatrixRequest, search_super_weights

    if imatrix_file is not None and no_imatrix:
        raise UsageError("--imatrix and --no-imatrix contradict each other: give one of them")
    with ExitStack() as stack:
        result = search_super_weights(
            model,
            ImatrixRequest(tuple(file or ()), ctx_size, samples, parse_special=parse_special, seed=seed),
            output,
            imatrix=imatrix_file,
            use_imatrix=not no_imatrix,
            coverage=_coverage(super_weight_coverage, "an imatrix", wanted=not no_imatrix),
            settings=_settings(stack, threads, overwrite=overwrite, pre_tokenizer=pre_tokenizer, device=device, max_memory=max_memory),
        )
    _print_notes(result.notes)
    if as_json:
        _print_json(report.super_weights_json(result.found, result.mask))
        return
    _print_found(result.found)
    if result.mask is not None:
        _console().print()
        _console().print(report.mask_table(result.mask))
    if result.paths:
        _console().print(f"wrote {', '.join(map(str, result.paths))}", markup=False)


@app.command()
def quantize(
    model: ModelArgument,
    output: OutputOption = None,
    profile: ProfileOption = None,
    quant_type: QuantTypeOption = None,
    size: SizeOption = None,
    target_bpw: BpwOption = None,
    target_kld: TargetKldOption = None,
    plan_file: Annotated[Path | None, typer.Option("--plan", metavar="FILE", help="Execute a plan that `loopgguf plan` wrote.")] = None,
    exact_errors: ExactOption = False,
    imatrix_file: ImatrixOption = None,
    no_imatrix: NoImatrixOption = False,
    file: TextOption = None,
    ctx_size: ContextOption = 512,
    samples: SamplesOption = 512,
    parse_special: ParseSpecialOption = False,
    seed: SeedOption = 0,
    tensor_type: TensorTypeOption = None,
    pure: PureOption = False,
    output_tensor_type: OutputTypeOption = None,
    token_embedding_type: EmbeddingTypeOption = None,
    leave_output_tensor: LeaveOutputOption = False,
    allow_requantize: RequantizeOption = False,
    compensate: CompensateOption = CompensateMode.OFF,
    compensate_columns: Annotated[
        int | None,
        typer.Option(
            "--compensate-columns",
            metavar="N",
            help="Error feedback takes at most so many columns of a weight together (a multiple of 256), for less memory and time where rows are long "
            "(ffn_down of large models). Two such blocks forgo a fifth of what feedback gains there, six two fifths. Default: all.",
        ),
    ] = None,
    compensate_sequence: Annotated[
        bool | None,
        typer.Option(
            "--compensate-sequence/--no-compensate-sequence",
            help="Error feedback goes input by input, each weight encoded for what the layers before it have become: lower KLD, for another pass over the "
            "text and, without matrices beside an imatrix, room for them on the disk. Default: for checkpoint folders with such matrices or up to 2 billion "
            "weights.",
            show_default=False,
        ),
    ] = None,
    compensate_guard: Annotated[
        bool,
        typer.Option(
            "--compensate-guard",
            help="Measure, on the selection text, which kinds of tensors are worse with error feedback (paired t test, 5 %), and leave it out there.",
        ),
    ] = False,
    protect_super_weights: Annotated[
        bool,
        typer.Option("--protect-super-weights", help="Look for super weights, keep them through per-row importance, raise a type where that is not enough."),
    ] = False,
    super_weight_coverage: CoverageOption = None,
    super_weight_budget: Annotated[
        str | None,
        typer.Option("--super-weight-budget", metavar="SIZE", help="Bytes that raised types may take for the mask's sake. Default: 0.", show_default=False),
    ] = None,
    max_kld: MaxKldOption = None,
    max_ppl_increase: MaxPplOption = None,
    max_size: MaxSizeOption = None,
    search_minutes: SearchOption = None,
    selection_file: SelectionOption = None,
    keep_split: Annotated[bool, typer.Option("--keep-split", help="Write one file per shard of a split source.")] = False,
    max_buffer_size: BufferOption = "256",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, to the byte, and write nothing.")] = False,
    resume: ResumeOption = True,
    job_folder: JobFolderOption = None,
    keep_job: KeepJobOption = False,
    full_hash: FullHashOption = False,
    device: DeviceOption = Device.CPU,
    max_memory: MemoryOption = "2048",
    threads: ThreadsOption = None,
    overwrite: OverwriteOption = False,
    pre_tokenizer: PreTokenizerOption = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Print a line per tensor.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Turn MODEL into a quantized GGUF by a size, a profile, a preset or a plan; verified before it gets its name."""
    from loopgguf import report
    from loopgguf.feedback import Compensate
    from loopgguf.intent import KindGuard, Search
    from loopgguf.workflow import ImatrixRequest
    from loopgguf.workflow import quantize as run

    rules = _rules(tensor_type, output_tensor_type, token_embedding_type, pure=pure, leave_output=leave_output_tensor, allow_requantize=allow_requantize)
    request = replace(
        _request(profile, quant_type, size, target_bpw, target_kld, imatrix_file, plan_file, rules, use_imatrix=not no_imatrix),
        calibration=ImatrixRequest(tuple(file or ()), ctx_size, samples, parse_special=parse_special, seed=seed),
        exact_errors=exact_errors,
        compensate=Compensate(compensate),
        compensate_columns=compensate_columns,
        compensate_sequence=compensate_sequence,
        guard=KindGuard(tuple(selection_file or ())) if compensate_guard else None,
        protect_super_weights=protect_super_weights,
        super_weight_coverage=_coverage(super_weight_coverage, "--protect-super-weights", wanted=protect_super_weights),
        super_weight_budget_bytes=_super_budget(super_weight_budget, wanted=protect_super_weights),
        search=Search(search_minutes, tuple(selection_file or ())) if search_minutes is not None else None,
        gate=_gate(max_kld, max_ppl_increase, max_size, selection_file, has_other_use=compensate_guard or search_minutes is not None),
        keep_split=keep_split,
        dry_run=dry_run,
    )
    with ExitStack() as stack:
        settings = _settings(
            stack,
            threads,
            overwrite=overwrite,
            max_buffer=max_buffer_size,
            pre_tokenizer=pre_tokenizer,
            device=device,
            max_memory=max_memory,
            job_folder=job_folder,
            resume=resume,
            keep_job=keep_job,
            full_hash=full_hash,
        )
        result = run(model, output, request, settings)
    _print_notes(result.notes)
    if as_json:
        _print_json(report.written_json(result))
    else:
        _print_written(result, verbose=verbose or dry_run)


@app.command()
def plan(
    model: ModelArgument,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="Write the plan as JSON, for `quantize --plan`.")] = None,
    save_tensor_types: Annotated[
        Path | None, typer.Option("--save-tensor-types", metavar="FILE", help="Write the types as llama-quantize's --tensor-type-file.")
    ] = None,
    profile: ProfileOption = None,
    quant_type: QuantTypeOption = None,
    size: SizeOption = None,
    target_bpw: BpwOption = None,
    target_kld: TargetKldOption = None,
    exact_errors: ExactOption = False,
    imatrix_file: ImatrixOption = None,
    no_imatrix: NoImatrixOption = False,
    file: TextOption = None,
    ctx_size: ContextOption = 512,
    samples: SamplesOption = 512,
    parse_special: ParseSpecialOption = False,
    seed: SeedOption = 0,
    tensor_type: TensorTypeOption = None,
    pure: PureOption = False,
    output_tensor_type: OutputTypeOption = None,
    token_embedding_type: EmbeddingTypeOption = None,
    leave_output_tensor: LeaveOutputOption = False,
    allow_requantize: RequantizeOption = False,
    compensate: CompensateOption = CompensateMode.OFF,
    device: DeviceOption = Device.CPU,
    max_memory: MemoryOption = "2048",
    threads: ThreadsOption = None,
    overwrite: OverwriteOption = False,
    pre_tokenizer: PreTokenizerOption = None,
    explain: Annotated[
        bool, typer.Option("--explain", help="Say of each tensor what the next smaller and larger type would do, and how fast types are here.")
    ] = False,
) -> None:
    """Say what MODEL would become, tensor by tensor and to the byte, with the reason of each type."""
    from loopgguf import report
    from loopgguf.container import refuse_existing
    from loopgguf.feedback import Compensate
    from loopgguf.planfile import save_plan
    from loopgguf.planfile import save_tensor_types as save_types
    from loopgguf.workflow import ImatrixRequest, make_plan

    for path in (output, save_tensor_types):
        if path is not None:
            refuse_existing(path, overwrite=overwrite)
    rules = _rules(tensor_type, output_tensor_type, token_embedding_type, pure=pure, leave_output=leave_output_tensor, allow_requantize=allow_requantize)
    request = replace(
        _request(profile, quant_type, size, target_bpw, target_kld, imatrix_file, None, rules, use_imatrix=not no_imatrix),
        calibration=ImatrixRequest(tuple(file or ()), ctx_size, samples, parse_special=parse_special, seed=seed),
        exact_errors=exact_errors,
        compensate=Compensate(compensate),
        dry_run=True,
    )
    with ExitStack() as stack:
        result = make_plan(model, request, _settings(stack, threads, pre_tokenizer=pre_tokenizer, device=device, max_memory=max_memory), measures_speed=explain)
    if output is not None:
        save_plan(result.saved, output, overwrite=overwrite)
    if save_tensor_types is not None:
        save_types(result.saved.plan, save_tensor_types, overwrite=overwrite)
    _print_notes(result.notes)
    console = _console()
    console.print(report.plan_table(result.saved.plan, explain=explain))
    console.print()
    console.print(report.plan_types(result.saved.plan, result.saved.speeds))
    if result.saved.speeds:
        console.print(report.SPEED_NOTE, markup=False)
    console.print()
    console.print(
        f"{result.saved.plan.intent}: {report.size_line(result.saved.plan, result.saved.total_bytes)}, plan {result.saved.plan.hash[:12]}", markup=False
    )


@app.command()
def convert(
    model: ModelArgument,
    output: OutputOption = None,
    outtype: Annotated[OutType, typer.Option("--outtype", help="Type of the matrices; vectors and norms are F32.", case_sensitive=False)] = OutType.BF16,
    max_buffer_size: BufferOption = "256",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan, to the byte, and write nothing.")] = False,
    resume: ResumeOption = True,
    job_folder: JobFolderOption = None,
    threads: ThreadsOption = None,
    overwrite: OverwriteOption = False,
    pre_tokenizer: PreTokenizerOption = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Print a line per tensor.")] = False,
) -> None:
    """Turn a checkpoint folder into a full-precision (or Q8_0) GGUF, as llama.cpp's converter does."""
    from loopgguf.workflow import convert as run

    with ExitStack() as stack:
        settings = _settings(stack, threads, overwrite=overwrite, max_buffer=max_buffer_size, pre_tokenizer=pre_tokenizer, job_folder=job_folder, resume=resume)
        result = run(model, output, outtype.value, dry_run=dry_run, settings=settings)
    _print_notes(result.notes)
    _print_written(result, verbose=verbose or dry_run)


@app.command()
def evaluate(
    candidate: Annotated[Path, typer.Argument(metavar="OUT.gguf", help="The GGUF to measure.")],
    reference: ReferenceOption,
    file: TextOption = None,
    ctx_size: ContextOption = 512,
    chunks: EvaluatedChunksOption = None,
    task: TaskOption = None,
    levels: LevelsOption = None,
    report_name: ReportOption = None,
    overwrite: OverwriteOption = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure a GGUF against the model it was made from: perplexity, KLD and same top p on held-out text."""
    from loopgguf import report

    result = _measured(
        [candidate], reference, file, ctx_size=ctx_size, chunks=chunks, threads=threads, tasks=task, levels=levels, name=report_name, overwrite=overwrite
    )
    quality, more = result.files[0].quality, {"tasks": report.tasks_json(result.tasks), **report.fidelity_json(result.fidelities[0])}
    more["collapse"] = report.collapse_json(result.collapses[0])
    if as_json:
        _print_json({"candidate": candidate.name, "reference": reference.name, "texts": list(result.chunks.names), **report.quality_json(quality), **more})
    else:
        _console().print(report.quality_table(quality, f"{candidate.name} against {reference.name}: {report.scored_text(quality, result.chunks.names)}"))
        _print_tasks(result)
        _print_levels(result)
    _write_report(result, report_name, threads, overwrite=overwrite)


@app.command()
def compare(
    candidates: Annotated[list[Path], typer.Argument(metavar="A.gguf B.gguf…", help="The GGUFs to measure, of one model.")],
    reference: ReferenceOption,
    file: TextOption = None,
    ctx_size: ContextOption = 512,
    chunks: EvaluatedChunksOption = None,
    baseline: Annotated[str | None, typer.Option("--baseline", metavar="NAME", help="The file the others are compared with. Default: the first.")] = None,
    task: TaskOption = None,
    levels: LevelsOption = None,
    report_name: ReportOption = None,
    overwrite: OverwriteOption = False,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure GGUFs of one model side by side on held-out text: a line each, sorted by size, with paired differences."""
    from loopgguf import report

    result = _measured(
        candidates,
        reference,
        file,
        baseline=baseline,
        ctx_size=ctx_size,
        chunks=chunks,
        threads=threads,
        tasks=task,
        levels=levels,
        name=report_name,
        overwrite=overwrite,
    )
    if as_json:
        heading = {"reference": reference.name, "baseline": result.baseline, "texts": list(result.chunks.names)}
        parts = zip(report.compared_json(result.files), result.fidelities, result.collapses, strict=True)
        files = [{**file, **report.fidelity_json(fidelity), "collapse": report.collapse_json(collapse)} for file, fidelity, collapse in parts]
        _print_json({**heading, "files": files, "tasks": report.tasks_json(result.tasks)})
    else:
        title = f"against {reference.name}: {report.scored_text(result.files[0].quality, result.chunks.names)}"
        _console().print(report.compared_table(result.files, result.baseline, title))
        _print_tasks(result)
        _print_levels(result)
    _write_report(result, report_name, threads, overwrite=overwrite)


@app.command()
def inspect(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF model (the first shard of a split one) or an imatrix.")],
    other: Annotated[Path | None, typer.Argument(metavar="[OTHER]", help="A second imatrix of the same model, to compare with.")] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="Print a line per tensor of a model.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Show a GGUF or an imatrix: header, types with counts and bytes, bits per weight, statistics; or compare two imatrices."""
    from loopgguf import report

    if other is not None:
        comparison = report.compare_imatrices(file, other)
        if as_json:
            _print_json(report.comparison_json(comparison))
            return
        _console().print(report.comparison_table(comparison))
        for line in report.comparison_lines(comparison):
            _console().print(line, markup=False)
        return
    inspection, console = report.inspect_file(file), _console()
    if as_json:
        _print_json(report.inspection_json(inspection))
        return
    for gguf in inspection.files[:1]:
        console.print(report.metadata_table(gguf))
        console.print()
    if inspection.statistics is not None:
        for part in (*report.imatrix_report(inspection.statistics), *report.sink_tables(inspection.layers)):
            console.print(part)
            console.print()
        return
    if tensors:
        console.print(report.tensor_table(inspection.files))
        console.print()
    console.print(report.file_types(inspection.files))
    console.print(f"{len(inspection.files)} file(s), {sum(f.size_bytes for f in inspection.files):,} bytes")


@app.command()
def verify(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="A GGUF (the first shard of a split one).")],
    against: Annotated[Path | None, typer.Option("--against", metavar="MODEL", help="The model it was made from: every weight is compared.")] = None,
    threads: ThreadsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a finished GGUF again: its structure, every value, that llama.cpp runs it, and its weights against the model's."""
    from loopgguf import report
    from loopgguf.workflow import check_again

    with ExitStack() as stack:
        result = check_again(file, against, _settings(stack, threads))
    if as_json:
        _print_json(report.recheck_json(result))
        return
    console = _console()
    if result.relative_errors:
        console.print(report.recheck_table(result))
    console.print(report.recheck_line(result), markup=False)


@app.command()
def cache(clear: Annotated[str | None, typer.Option("--clear", metavar="KIND", help="Delete all entries of a kind.")] = None) -> None:
    """Show what the user cache folder holds, or delete a kind of it; all of it can be made again."""
    from loopgguf import report
    from loopgguf.checkpoint import cache_folder, clear_cache, list_cache

    if clear is not None:
        gone = clear_cache(clear)
        _console().print(f"deleted {gone.n_files} files, {gone.n_bytes:,} bytes of {gone.name}", markup=False)
        return
    table = report.table("kind", "files", "bytes", title=str(cache_folder()), numbers=("files", "bytes"))
    for kind in list_cache():
        table.add_row(kind.name, str(kind.n_files), f"{kind.n_bytes:,}")
    _console().print(table)


@app.command()
def profiles() -> None:
    """List the profiles that ship with loopgguf."""
    from loopgguf import report
    from loopgguf.profile import load_profile, profile_names

    result = report.table("profile", "what it is for")
    for profile in map(load_profile, profile_names()):
        result.add_row(profile.name, profile.description)
    _console().print(result)


def _print_version(asked: bool) -> None:
    if asked:
        _console().print(f"loopgguf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error, and log messages.")] = False,
) -> None:
    logging.basicConfig(level=logging.DEBUG if debug else logging.WARNING, format="%(name)s: %(message)s")
    _State.debug = debug


class _State:
    """Whether `--debug` was given, and the command as it was typed; all that outlives parsing."""

    debug = False
    command = ""


def _stop(_signal: int, _frame: FrameType | None) -> None:
    """End as after an interrupt, so that nothing is left behind; a job that can be resumed has its own way."""
    raise SystemExit(EXIT_TERMINATED)


def _refuse_remote_code(arguments: list[str]) -> None:
    """Raise UsageError for the flag by which other tools run a model's own Python."""
    if any(word.partition("=")[0].replace("_", "-") == "--trust-remote-code" for word in arguments):
        raise UsageError(
            "--trust-remote-code: loopgguf never runs code that comes with a model, so there is nothing to trust. Leave the option out; "
            "a model that cannot do without its code converts to GGUF elsewhere, and the GGUF is read here"
        )


def main(arguments: list[str] | None = None) -> None:
    """Run one command and exit with its code; a failure of the user's input is one line on standard error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a console that lacks a sign must not end a finished job
    signal.signal(signal.SIGTERM, _stop)
    words = sys.argv[1:] if arguments is None else arguments
    _State.command = shlex.join(["loopgguf", *words])
    try:
        _refuse_remote_code(words)
        app(arguments)
    except LoopggufError as error:
        if _State.debug:
            raise
        _console(stderr=True).print(f"error: {error}", markup=False)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
