"""Every command from the outside: its success, its exit codes, and one clear line for every bad input."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import numpy as np
import pytest
from command_line import Run, refused
from faults import Disk

from loopgguf import cli
from loopgguf.calibration import default_text
from loopgguf.checkpoint import Job
from loopgguf.container import read_gguf
from loopgguf.errors import UsageError
from loopgguf.intent import QuantizeRequest
from loopgguf.statistics import Columns, Statistics, load_imatrix, save_imatrix

DEFAULT_CALIBRATION, DEFAULT_HELDOUT = str(default_text("calibration")), str(default_text("heldout"))


def _short_text(tmp_path: Path, demo_model: Path) -> Path:
    text = tmp_path / "short.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    return text


# --- the commands -----------------------------------------------------------------------------------------------------


def test_help_is_instant_and_complete() -> None:
    """A heavy import at the top of a module that the command line touches: numpy, torch, transformers, llama_cpp."""
    code = (
        "import sys\nfrom loopgguf import cli\ntry:\n cli.main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch','transformers','numpy','llama_cpp') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True)
    assert done.stdout.rstrip().endswith("[]")
    for command in ("imatrix", "quantize", "convert", "evaluate", "compare", "inspect", "profiles"):
        assert command in done.stdout


def test_gguf_input_never_imports_torch(demo_gguf: Path, tmp_path: Path) -> None:
    """Two to three seconds of imports, and hundreds of megabytes, for a command that needs neither."""
    code = (
        "import sys\nfrom loopgguf import cli\ntry:\n cli.main(sys.argv[1:])\nexcept SystemExit as e: assert not e.code, e.code\n"
        "print([m for m in ('torch','transformers') if m in sys.modules])"
    )
    arguments = ["quantize", str(demo_gguf), "-o", str(tmp_path / "x.gguf"), "--quant-type", "Q4_0", "--no-imatrix"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.stdout.rstrip().endswith("[]"), done.stderr


def test_the_whole_job(run: Run, demo_model: Path, tmp_path: Path) -> None:
    """imatrix → quantize (which takes it again from the cache the second time) → evaluate → inspect, as a user types them."""
    text = _short_text(tmp_path, demo_model)
    made = run("imatrix", demo_model, "-f", text, "-c", 128, "--samples", 4, "-o", "demo.imatrix.gguf")
    assert made.code == 0 and "perplexity" in made.out
    assert run("imatrix", demo_model, "-f", text, "-c", 128, "-o", "demo.imatrix.gguf").code == 4

    written = run("quantize", demo_model, "-o", "demo.gguf", "--imatrix", "demo.imatrix.gguf")
    assert written.code == 0 and "bits per weight" in written.out and "wrote demo.gguf" in written.out
    metadata = read_gguf(Path("demo.gguf")).metadata
    assert metadata["quantize.imatrix.file"].data == "demo.imatrix.gguf"
    assert metadata["quantize.imatrix.dataset"].data == "short.txt"
    assert metadata["loopgguf.intent"].data == "profile balanced"
    assert not any(str(tmp_path) in str(value.data) for value in metadata.values()), "a path of this machine leaked into the file"

    measured = run("evaluate", "demo.gguf", "--reference", demo_model, "-f", text, "-c", 128, "--chunks", 2, "--json")
    assert measured.code == 0
    quality = json.loads(measured.out)
    assert quality["n_scored"] == 2 * 63
    assert 0 < quality["measured"]["Mean KLD"]["value"] < 1
    assert "20000" in quality["measured"]["99.9% KLD"]["omitted"]

    shown = run("inspect", "demo.gguf", "--tensors")
    assert shown.code == 0 and "IQ4_XS" in shown.out and "general.architecture" in shown.out
    shown = run("inspect", "demo.imatrix.gguf")
    assert shown.code == 0 and "attn_q" in shown.out and "CosSim" in shown.out


def test_files_are_compared(run: Run, demo_gguf: Path, demo_model: Path, tmp_path: Path) -> None:
    """A table without its baseline or its mark, a file given twice, and a baseline that is none of the files."""
    for quant_type in ("Q2_K", "Q8_0"):
        assert run("quantize", demo_gguf, "--quant-type", quant_type, "--no-imatrix", "-o", f"{quant_type}.gguf").code == 0
    measuring = ("--reference", demo_gguf, "-f", _short_text(tmp_path, demo_model), "-c", 64, "--chunks", 3)
    shown = run("compare", "Q8_0.gguf", "Q2_K.gguf", *measuring, "--baseline", "Q2_K")
    assert shown.code == 0
    heading, columns, *lines = shown.out.splitlines()
    assert "93 scored tokens, 3 chunks of 64, of short.txt" in heading and "mean KLD ÷ Q2_K.gguf's [95 %]" in columns
    assert [line.split()[0] for line in lines] == ["Q2_K.gguf", "Q8_0.gguf"]
    assert "baseline" in lines[0] and "[0.0" in lines[1] and all(line.rstrip().endswith("*") for line in lines)
    found = json.loads(run("compare", "Q8_0.gguf", "Q2_K.gguf", *measuring, "--json").out)
    assert (found["baseline"], [file["name"] for file in found["files"]]) == ("Q8_0.gguf", ["Q2_K.gguf", "Q8_0.gguf"])
    assert found["files"][0]["to_baseline"]["mean_kld_ratio_interval"][0] > 1 and found["files"][1]["to_baseline"] is None
    for arguments, word in ((("Q2_K.gguf", "Q2_K.gguf"), "Q2_K.gguf twice"), (("Q2_K.gguf", "--baseline", "Q3"), "--baseline: got Q3")):
        refused = run("compare", *arguments, *measuring)
        assert refused.code == 2 and word in refused.error


def test_levels_are_shown(run: Run, demo_gguf: Path) -> None:
    """A level that the table, the JSON or the report forgets, or that is shown unasked; a typo that measures nothing."""
    assert run("quantize", demo_gguf, "--quant-type", "Q4_0", "--no-imatrix", "-o", "a.gguf").code == 0
    measuring = ("a.gguf", "--reference", demo_gguf, "-c", 64, "--chunks", 2)
    shown = run("evaluate", *measuring, "--levels", "tensor,layer", "--report", "r")
    lines = [line.split() for line in shown.out.splitlines()]
    assert shown.code == 0 and [line[0] for line in lines[-6:]] == ["0", "1", "2", "3", "4", "5"]
    (down,) = (line for line in lines if line[:2] == ["ffn_down", "6"])
    assert down[2] == "4.5" and down[-1] == "Q4_0"
    found = json.loads(run("evaluate", *measuring, "--levels", "layer", "--json").out)
    assert found["tensors"] == [] and [layer["layer"] for layer in found["layers"]] == [0, 1, 2, 3, 4, 5]
    (file,) = json.loads(run("compare", *measuring, "--levels", "tensor", "--json").out)["files"]
    assert len(file["tensors"]) == 44 and file["layers"] == [] and file["collapse"] is None
    assert "## Outputs of blocks: a.gguf" in Path("r.md").read_text(encoding="utf-8")
    assert "weights by role" not in run("evaluate", *measuring).out
    refused = run("evaluate", *measuring, "--levels", "tensors")
    assert refused.code == 2 and "--levels: got tensors" in refused.error


def test_a_gate_is_passed_or_its_best_file_kept(run: Run, demo_gguf: Path) -> None:
    """A gate that the command forgets, steps that it does not tell, and an exit code of success below the gate."""
    asked = ("quantize", demo_gguf, "--no-imatrix", "--tensor-type", ".=Q8_0")  # no tensor is left to be raised
    done = run(*asked, "--quant-type", "Q8_0", "--max-ppl-increase", "3%", "-o", "a.gguf", "--json")
    found = json.loads(done.out)
    assert done.code == 0 and found["gate"]["max_ppl_increase_percent"] == 3.0 and len(found["gate"]["steps"]) == 1
    assert found["gate"]["texts"] == ["selection.txt"] and found["collapse"] is None
    exact = Path("a.gguf").stat().st_size  # nothing of error feedback's key fits
    missed = run(*asked, "--quant-type", "Q8_0", "--max-kld", "1e-9", "--max-size", exact, "-o", "b.gguf")
    assert missed.code == 1 and "b.below-gate.gguf" in missed.error and "note: gate: as planned: mean KLD" in missed.err
    assert Path("b.below-gate.gguf").exists() and not Path("b.gguf").exists()


def test_low_bits_are_warned_of_and_checked(run: Run, demo_gguf: Path, demo_model: Path, tmp_path: Path) -> None:
    """A file of two bits that is written without a word, and one that repeats itself and passes for good."""
    text = _short_text(tmp_path, demo_model)
    low = run(
        "quantize", demo_gguf, "--quant-type", "IQ1_S", "--token-embedding-type", "Q2_K", "--output-tensor-type", "Q2_K", "-f", text, "-c", 64, "-o", "l.gguf"
    )
    assert low.code == 0 and "bits per weight: a 7B model had" in low.err and "--size" in low.err
    assert "generated text has" in low.out
    shown = run("evaluate", "l.gguf", "--reference", demo_gguf, "-f", text, "-c", 64, "--chunks", 2)
    assert shown.code == 0 and "l.gguf: generated text has" in shown.out


def test_tasks_are_answered(run: Run, demo_gguf: Path, tmp_path: Path) -> None:
    """A task whose numbers stand beside another file's name, or that the report and the JSON forget."""
    task = tmp_path / "words.jsonl"
    task.write_text('{"text": "Once upon a time"}\n{"text": "He went to the sea"}\n', encoding="utf-8")
    assert run("quantize", demo_gguf, "--quant-type", "Q8_0", "--no-imatrix", "-o", "a.gguf").code == 0
    measuring = ("a.gguf", "--reference", demo_gguf, "-c", 64, "--chunks", 2, "--task", task)
    shown = run("evaluate", *measuring, "--report", "r")
    assert shown.code == 0 and shown.out.splitlines()[-1].startswith("words.jsonl (last word)          2  a.gguf")
    for found in (json.loads(run("compare", *measuring, "--json").out), json.loads(Path("r.json").read_text(encoding="utf-8"))):
        assert [(entry["name"], entry["n_items"], len(entry["accuracies"])) for entry in found["tasks"]] == [("words.jsonl", 2, 1)]
    assert "words.jsonl (last word) | 2 | a.gguf |" in Path("r.md").read_text(encoding="utf-8")
    task.write_text("not JSON", encoding="utf-8")
    refused = run("evaluate", *measuring)
    assert refused.code == 3 and "line 1 of" in refused.error


def test_reports_are_written(run: Run, demo_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A report of another run, one that replaces a file or an input unasked, and an error only after the work."""
    assert run("quantize", demo_gguf, "--quant-type", "Q8_0", "--no-imatrix", "-o", "a.gguf").code == 0
    arguments = ("evaluate", "a.gguf", "--reference", demo_gguf, "-c", 64, "--chunks", 2, "--report", "it's")
    done = run(*arguments)
    assert done.code == 0 and "wrote it's.json, it's.md, it's.html" in done.err
    document = json.loads(Path("it's.json").read_text(encoding="utf-8"))
    assert document["command"] == f"""loopgguf evaluate a.gguf --reference {demo_gguf} -c 64 --chunks 2 --report 'it'"'"'s'"""
    assert [file["name"] for file in document["files"]] == ["a.gguf"]
    with monkeypatch.context() as patch:
        Disk(fails={"posix_fallocate": errno.ENOSPC}).install(patch)
        failed = run(*arguments[:-1], "r")
    assert failed.code == 4 and "Mean KLD" in failed.out, "what was measured is lost with the report"
    Path("it's.json").unlink()
    again = run(*arguments)
    assert again.code == 4 and "it's.md already exists" in again.error and not Path("it's.json").exists()
    text = tmp_path / "text.json"
    text.write_text(json.dumps([{"text": "Words, and more words. " * 99}]), encoding="utf-8")
    refused = run("compare", "a.gguf", "--reference", demo_gguf, "-f", text, "--report", tmp_path / "text", "--overwrite")
    assert refused.code == 4 and "text.json is the input" in refused.error


def test_quantize_makes_its_own_imatrix_once(run: Run, demo_gguf: Path, tmp_path: Path, demo_model: Path) -> None:
    """Calibrating again for each file of the same model, or taking the imatrix of another text."""
    text = tmp_path / "text.txt"
    text.write_text("It was a bright cold day, and the clocks were striking. " * 120, encoding="utf-8")
    first = run("quantize", demo_gguf, "-f", text, "--quant-type", "Q4_K_S")
    assert first.code == 0 and "imatrix: made from text.txt" in first.err
    again = run("quantize", demo_gguf, "-f", text, "--quant-type", "q5_k_s")
    assert again.code == 0 and "imatrix: taken from" in again.err
    text.write_text("Another text altogether, about ships and the sea they sail. " * 120, encoding="utf-8")
    other = run("quantize", demo_gguf, "-f", text, "--quant-type", "Q4_K_S", "--overwrite")
    assert other.code == 0 and "imatrix: made from" in other.err


def test_convert_and_json_and_profiles(run: Run, demo_model: Path) -> None:
    """Commands that are only ever imported, never run."""
    assert run("convert", demo_model, "--outtype", "Q8_0", "-o", "x.gguf").code == 0
    planned = run("quantize", demo_model, "--quant-type", "Q4_0", "--dry-run", "--json")
    assert planned.code == 0 and json.loads(planned.out)["dry_run"] is True
    listed = run("profiles")
    assert listed.code == 0 and all(name in listed.out for name in ("balanced", "attention-high", "compression-max", "quality", "cpu-fast", "singular-bit"))


def test_super_weights_are_listed_and_protected(run: Run, demo_gguf: Path) -> None:
    """A table where JSON was asked for, files beside the imatrix that the next command does not see, outcomes that are not told."""
    made = run("imatrix", demo_gguf, "--super-weights", "--samples", 2, "-c", 128, "-o", "a.imatrix.gguf")
    assert made.code == 0 and "no super weights" in made.out
    listed = run("super-weights", demo_gguf, "--imatrix", "a.imatrix.gguf", "--json")
    found = json.loads(listed.out)
    assert found["weights"] == [] and found["mask"]["n"] == 472 and found["measured_perplexity"] > 1
    assert "taken from a.imatrix.super-weights.json" in listed.err
    table = run("super-weights", demo_gguf, "--imatrix", "a.imatrix.gguf")
    assert "no super weights" in table.out and "blk.5.ffn_down.weight" in table.out
    stored = run("super-weights", demo_gguf, "--imatrix", "a.imatrix.gguf", "-o", "b.super-weights.json")
    assert stored.code == 0 and "b.super-weights.json" in stored.out
    for name in ("super-weights.json", "super-weights.safetensors"):
        assert Path(f"b.{name}").read_bytes() == Path(f"a.imatrix.{name}").read_bytes()
    again = run("super-weights", demo_gguf, "--imatrix", "a.imatrix.gguf", "-o", "b.super-weights.json")
    assert again.code == 4 and "b.super-weights.json already exists" in again.error
    arguments = ("quantize", demo_gguf, "--quant-type", "Q2_K", "--imatrix", "a.imatrix.gguf", "--protect-super-weights", "-o", "a.gguf")
    written = run(*arguments, "--json")
    assert json.loads(written.out)["super_weights"]["mask"]["n"] == 472
    raised = run(*arguments, "--overwrite", "--super-weight-budget", "200kB")
    assert "super-weight mask: 472 weights" in raised.out and Path("a.gguf").stat().st_size <= json.loads(written.out)["total_bytes"] + 200_000


def test_underscores_in_option_names(run: Run, demo_gguf: Path) -> None:
    """Users of other tools type `--quant_type`."""
    assert run("quantize", demo_gguf, "--quant_type", "Q8_0", "--dry_run").code == 0


# --- what is refused --------------------------------------------------------------------------------------------------


def test_missing_config(run: Run, broken_model: Path) -> None:
    """A traceback instead of the name of the file that is missing."""
    (broken_model / "config.json").unlink()
    refused(run("quantize", broken_model), 3, "config.json")


def test_unknown_architecture(run: Run, broken_model: Path) -> None:
    """`KeyError: 'architectures'` shown to a user."""
    config = json.loads((broken_model / "config.json").read_text(encoding="utf-8"))
    config["architectures"] = ["StarshipForCausalLM"]
    (broken_model / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused(run("convert", broken_model), 3, "StarshipForCausalLM", "LlamaForCausalLM")


def test_pickle_only_folder(run: Run, broken_model: Path) -> None:
    """Unpickling what a stranger wrote, or a message that does not say how to go on."""
    (broken_model / "model.safetensors").rename(broken_model / "pytorch_model.bin")
    refused(run("convert", broken_model), 3, "pytorch_model.bin", "safetensors")


def test_truncated_shard(run: Run, broken_model: Path) -> None:
    """A download that stopped: the tail of the weights would be read as zeros or crash late."""
    path = broken_model / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1000)
    refused(run("convert", broken_model), 3, "model.safetensors")


def test_index_that_leaves_the_folder(run: Run, broken_model: Path) -> None:
    """An index entry with `../` that reads files outside of the model."""
    weight_map = {"model.embed_tokens.weight": "../elsewhere.safetensors"}
    (broken_model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    (broken_model / "model.safetensors").unlink()
    refused(run("convert", broken_model), 3, "../elsewhere.safetensors", "model.safetensors.index.json")


def test_nan_weights(run: Run, broken_model: Path) -> None:
    """NaN that becomes a block scale and a file that says nothing but `!!!!`."""
    path = broken_model / "model.safetensors"
    raw = bytearray(path.read_bytes())
    raw[-2:] = b"\xc0\x7f"
    path.write_bytes(raw)
    refused(run("quantize", broken_model, "--quant-type", "Q4_0", "--no-imatrix"), 3, "NaN", ".weight")


def test_imatrix_of_another_model(run: Run, demo_model: Path) -> None:
    """A silent quantization without importance."""
    columns = {"blk.0.attn_q.weight": Columns(np.ones((1, 64), np.float32), np.ones(1, np.float32))}
    save_imatrix(Statistics(columns, ("x.txt",), 1, 512), Path("other.imatrix.dat"))
    refused(run("quantize", demo_model, "--imatrix", "other.imatrix.dat"), 3, "blk.0.attn_q.weight", "another model")


@pytest.mark.parametrize("text", ["", "  \n", "too short"])
def test_empty_calibration_text(run: Run, demo_model: Path, text: str) -> None:
    """An imatrix of nothing, or a division by zero."""
    Path("empty.txt").write_text(text, encoding="utf-8")
    refused(run("imatrix", demo_model, "-f", "empty.txt"), 3, "empty.txt")


def test_disk_full(run: Run, demo_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A truncated file under its final name."""

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    refused(run("quantize", demo_gguf, "--quant-type", "Q4_0", "--no-imatrix", "-o", "x.gguf"), 4, "x.gguf.part", "No space left", "free some space")


def test_unwritable_output(run: Run, demo_gguf: Path) -> None:
    """`basic_ios::clear: iostream error`."""
    Path("file").write_text("not a folder", encoding="utf-8")
    refused(run("quantize", demo_gguf, "--quant-type", "Q4_0", "--no-imatrix", "-o", "file/x.gguf"), 4, "file/x.gguf")


def test_existing_output_is_kept(run: Run, demo_gguf: Path) -> None:
    """Hours of work, or somebody else's file, overwritten without asking."""
    Path("x.bin").write_text("precious", encoding="utf-8")
    refused(run("quantize", demo_gguf, "--quant-type", "Q4_0", "--no-imatrix", "-o", "x.bin"), 4, "x.bin", "--overwrite")
    assert Path("x.bin").read_text(encoding="utf-8") == "precious"


@pytest.mark.parametrize("link", ["same", "hard", "symbolic"])
def test_output_that_is_the_input(run: Run, demo_gguf: Path, tmp_path: Path, link: str) -> None:
    """llama-quantize once truncated its own input this way."""
    source = tmp_path / "source.gguf"
    shutil.copy(demo_gguf, source)
    target = source
    if link != "same":
        target = tmp_path / "link.gguf"
        (os.link if link == "hard" else os.symlink)(source, target)
    before = source.read_bytes()
    refused(run("quantize", source, "--quant-type", "Q4_0", "--no-imatrix", "-o", target, "--overwrite"), 4, "is the input")
    assert source.read_bytes() == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--quant-type", "Q9_X"], ["Q9_X", "Q4_K_M"]),
        (["--quant-type", "IQ2_XXS", "--no-imatrix"], ["imatrix"]),
        (["--profile", "unheard-of"], ["unheard-of", "balanced"]),
        (["--profile", "balanced", "--quant-type", "Q4_0"], ["--profile", "--quant-type"]),
        (["--tensor-type", "nothing_matches=Q8_0"], ["nothing_matches"]),
        (["--tensor-type", "attn_v"], ["REGEX=TYPE"]),
        (["--tensor-type", "attn_(v=Q8_0"], ["attn_(v"]),
        (["--max-buffer-size", "lots"], ["lots"]),
        (["--imatrix", "a.gguf", "--no-imatrix"], ["--no-imatrix"]),
        (["--protect-super-weights", "--no-imatrix"], ["--protect-super-weights", "--no-imatrix"]),
        (["--protect-super-weights", "--super-weight-coverage", "0.5"], ["--super-weight-coverage", "0.5"]),
        (["--super-weight-coverage", "0.001"], ["--protect-super-weights"]),
        (["--super-weight-budget", "1MB"], ["--protect-super-weights"]),
        (["--protect-super-weights", "--super-weight-budget", "much"], ["much"]),
        (["--protect-super-weights", "--super-weight-budget", "1MB", "--size", "4MB"], ["--super-weight-budget", "size"]),
        (["--max-size", "4MB"], ["--max-size", "--max-kld"]),
        (["--max-kld", "0"], ["--max-kld", "above 0"]),
        (["--max-ppl-increase", "little"], ["--max-ppl-increase", "little", "2%"]),
        (["--max-kld", "0.01", "--selection-file", DEFAULT_CALIBRATION, "--quant-type", "Q4_0"], ["calibration.txt", "the calibration text"]),
        (["--max-kld", "0.01", "--selection-file", DEFAULT_HELDOUT, "--quant-type", "Q4_0"], ["heldout.txt", "the held-out text"]),
        (["--target-kld", "0.05", "--no-imatrix"], ["--target-kld", "gradients", "checkpoint folder"]),
        (["--target-kld", "-1"], ["--target-kld", "above 0"]),
        (["--target-kld", "0.05", "--size", "4MB"], ["--target-kld", "--size"]),
        (["--profile", "singular-bit", "--no-imatrix"], ["--protect-super-weights", "--no-imatrix"]),
    ],
)
def test_contradicting_or_unknown_requests(run: Run, demo_gguf: Path, arguments: list[str], words: list[str]) -> None:
    """A request that is half obeyed, in silence."""
    refused(run("quantize", demo_gguf, *arguments), 2, *words)


def test_the_sequence_is_the_rule_and_can_be_left_out(run: Run, demo_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An option that changes nothing."""
    seen: list[bool | None] = []

    def quantize(_model: Path, _output: Path | None, request: QuantizeRequest, _settings: object) -> NoReturn:
        seen.append(request.compensate_sequence)
        raise UsageError("enough")

    monkeypatch.setattr("loopgguf.workflow.quantize", quantize)
    for options in ([], ["--no-compensate-sequence"], ["--compensate-sequence"]):
        refused(run("quantize", demo_gguf, "--compensate", "fast", *options), 2, "enough")
    assert seen == [None, False, True]


def test_a_gpu_that_is_not_there(run: Run, demo_model: Path, demo_gguf: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that is used instead without a word, or torch's own traceback after minutes."""
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for command in ("imatrix", "quantize", "plan"):
        refused(run(command, demo_model, "--device", "cuda"), 2, "--device: got cuda, expected cpu", "finds no CUDA GPU")
        refused(run(command, demo_gguf, "--device", "cuda"), 2, "is a GGUF, which llama.cpp runs on the CPU")


def test_notes_are_single_lines(capsys: pytest.CaptureFixture[str]) -> None:
    """A token's text in a note that breaks the line, or that moves the cursor of the user's terminal."""
    cli._print_notes(("token 'a\n\x1b[2J' is left out",))
    assert capsys.readouterr().err == "note: token 'a\\n\\x1b[2J' is left out\n"


def test_not_a_model(run: Run, tmp_path: Path) -> None:
    """A file of another kind, a missing one, and an empty folder."""
    (tmp_path / "text.gguf").write_text("hello", encoding="utf-8")
    refused(run("quantize", tmp_path / "text.gguf"), 3, "text.gguf")
    refused(run("quantize", tmp_path / "nowhere"), 3, "nowhere")
    (tmp_path / "empty").mkdir()
    refused(run("imatrix", tmp_path / "empty"), 3, "config.json")
    refused(run("inspect", tmp_path / "nowhere.gguf"), 3, "nowhere.gguf")


# --- imatrix files ----------------------------------------------------------------------------------------------------


def _imatrix(path: Path, value: float) -> Path:
    columns = {"blk.0.attn_q.weight": Columns(np.array([[value, 2.0, 3.0]], np.float32), np.array([1024]))}
    save_imatrix(Statistics(columns, (path.name,), 2, 512), path)
    return path


def test_imatrices_are_merged_without_a_model(run: Run, tmp_path: Path) -> None:
    """A merge that needs the model, a .dat that is a GGUF, and an input that is overwritten."""
    parts = [_imatrix(tmp_path / f"{n}.imatrix.gguf", n) for n in (1, 2)]
    merging = [word for part in parts for word in ("--in-file", part)]
    refused(run("imatrix", *merging, "-o", parts[0], "--overwrite"), 4, "is the input")
    refused(run("imatrix"), 2, "MODEL", "--in-file")
    done = run("imatrix", *merging)
    assert done.code == 0 and "wrote merged.imatrix.gguf: 1 tensors of 2 files, 4 chunks" in done.out
    assert load_imatrix(Path("merged.imatrix.gguf")).columns["blk.0.attn_q.weight"].sum_squares.tolist() == [[3, 4, 6]]
    assert run("imatrix", *merging, "-o", "sum.imatrix.dat").code == 0
    assert Path("sum.imatrix.dat").read_bytes()[:4] == b"\1\0\0\0"
    assert run("imatrix", *merging, "--output-format", "dat").code == 0
    assert Path("merged.imatrix.dat").read_bytes() == Path("sum.imatrix.dat").read_bytes()


def test_two_imatrices_are_compared(run: Run, tmp_path: Path) -> None:
    """A comparison without a verdict."""
    parts = [_imatrix(tmp_path / f"{n}.imatrix.gguf", n) for n in (1, 1.5)]
    done = run("inspect", *parts)
    assert done.code == 0 and "rank correlation" in done.out and "enough text: " in done.out
    assert json.loads(run("inspect", *parts, "--json").out)["tensors"][0]["rank_correlation"] == 1


def test_a_stopped_imatrix_goes_on(run: Run, demo_gguf: Path, demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C that loses what was done, a wrong exit code, and a run that goes on with other settings."""
    arguments = ("imatrix", demo_gguf, "-f", _short_text(tmp_path, demo_model), "-c", 64)
    assert run(*arguments, "-o", tmp_path / "whole.imatrix.gguf").code == 0
    monkeypatch.setattr(Job, "should_stop", property(lambda _job: True, lambda _job, _value: None), raising=False)
    refused(run(*arguments, "-o", "a.imatrix.gguf"), 75, "after chunk 1 of", "saved in a.imatrix.loopgguf-job")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path / "work")
    refused(run(*arguments, "--process-output", "-o", "a.imatrix.gguf"), 2, "process-output (was False, is True)", "--no-resume")
    assert run(*arguments, "-o", "a.imatrix.gguf").code == 0
    assert Path("a.imatrix.gguf").read_bytes() == (tmp_path / "whole.imatrix.gguf").read_bytes()
    assert not Path("a.imatrix.loopgguf-job").exists()
