"""encode.py: a checkpoint folder in sequence, from its gradients or from matrices made before; stopped, killed, damaged, and on a full disk."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NoReturn

import numpy as np
import pytest
from stops import Killed, isolate, left, stop_at, take_down_encoded
from tiny_checkpoint import LLAMA_CONFIG, random_weights, write_checkpoint
from tiny_tokenizers import N_BPE, write_byte_level

from loopgguf import encode as encode_module
from loopgguf import guard, publish
from loopgguf.checkpoint import GUARD, Job, StopRequest, job_folder
from loopgguf.container import PartFile, read_gguf
from loopgguf.curvature import GramSet
from loopgguf.drift import Drift
from loopgguf.encode import Reuse
from loopgguf.errors import InputError, Interrupted, OutputError, UsageError
from loopgguf.evaluation import Measure
from loopgguf.feedback import Compensate
from loopgguf.formats import GgmlType
from loopgguf.grams import GramWriter
from loopgguf.importance import ImatrixRequest
from loopgguf.intent import KindGuard, QuantizeRequest, resolve
from loopgguf.opening import Settings
from loopgguf.pipeline import WriteResult
from loopgguf.planner import TypeRules, parse_overrides, with_type
from loopgguf.source import Tensor, open_source
from loopgguf.workflow import compute_imatrix, quantize

pytestmark = pytest.mark.usefixtures("alone")

N_LAYERS, N_FED = 3, 7 * 3  # weights of layers
CONFIG = LLAMA_CONFIG | {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": N_LAYERS, "head_dim": 16}
CONFIG |= {"vocab_size": N_BPE, "bos_token_id": 1, "eos_token_id": 2}
LITTLE = 1 << 20  # bytes of memory: the gradient pass goes layer by layer
ONE = Settings(n_threads=1)
FINISHED, UNFINISHED = ["x.gguf", "x.gguf.sha256"], ["x.gguf.part", "x.loopgguf-job"]
TEXT = ImatrixRequest(ctx_size=64, n_samples=20)


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    isolate(monkeypatch, tmp_path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of three layers with small random weights, and a tokenizer."""
    generator = np.random.default_rng(0)
    values = {w: generator.normal(0.0 if a.ndim > 1 else 1.0, 0.2, a.shape).astype("<f4") for w, (_, a) in random_weights(CONFIG).items()}
    weights = {w: ("BF16", (v.view("<u4") >> 16).astype("<u2")) for w, v in values.items()}
    return write_byte_level(write_checkpoint(tmp_path_factory.mktemp("sequence") / "tiny", CONFIG, weights))


@pytest.fixture(scope="module")
def made(folder: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An imatrix of the folder, and Gram matrices with gradients beside it."""
    text, place = replace(TEXT, files=(texts["calibration"],), gram=True, gradient=True), tmp_path_factory.mktemp("imatrix")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        return compute_imatrix(folder, place / "tiny.imatrix.gguf", text, ONE).path


@pytest.fixture(scope="module")
def request_(made: Path, texts: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> QuantizeRequest:
    """In sequence, from a pass of its own: no matrices lie beside the imatrix."""
    imatrix = Path(shutil.copy2(made, tmp_path_factory.mktemp("alone")))
    return QuantizeRequest(quant_type="Q4_0", imatrix=imatrix, calibration=replace(TEXT, files=(texts["calibration"],)), compensate=Compensate.FAST)


@pytest.fixture(scope="module")
def whole(folder: Path, request_: QuantizeRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run writes."""
    place = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        return quantize(folder, place / "whole.gguf", request_, ONE).paths[0]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return take_down_encoded(monkeypatch)


def payloads(path: Path) -> dict[str, bytes]:
    return {tensor.name: np.ascontiguousarray(tensor.read_rows(0, tensor.n_rows)).tobytes() for tensor in open_source(path).tensors}


def aimed(result: WriteResult) -> set[str]:
    return {name for name, log in result.logs.items() if any(part.is_aimed for part in log.feedback)}


def counting(steps: list[str], settings: Settings = ONE, act: Callable[[str, int], object] = lambda _phase, _done: None) -> Settings:
    """Return settings that take down the phase of each step, and let `act(phase, its steps so far)` see it."""

    def progress(phase: str, _done: int, _total: int) -> None:
        steps.append(phase.split(":")[0])
        act(steps[-1], steps.count(steps[-1]))

    return replace(settings, progress=progress)


def die() -> NoReturn:
    raise Killed


def dying(patch: pytest.MonkeyPatch) -> None:
    """Let a run that ends by `Killed` leave all on the disk that a process leaves there."""

    def leave(job: Job, *error: object) -> None:
        StopRequest.__exit__(job, *error)  # type: ignore[arg-type]
        job._release()

    def let_go(part: PartFile, kind: type[BaseException] | None, *_: object) -> None:
        if kind is Killed:
            part._unlock()
        else:
            part.close()

    patch.setattr(Job, "__exit__", leave)
    patch.setattr(PartFile, "__exit__", let_go)


def at(phase: str, n: int, stop: Callable[[], object] = die) -> Callable[[str, int], object]:
    return lambda now, so_far: stop() if (now, so_far) == (phase, n) else None


# --- what it makes ------------------------------------------------------------------------------------------------------


def test_same_bytes_for_any_number_of_threads_and_memory(folder: Path, request_: QuantizeRequest, encoded: list[str]) -> None:
    """Catches inputs that are encoded before those that they depend on, a tensor encoded twice or left out, and bytes that
    depend on who came first; and nothing that makes up for anything."""
    said: list[str] = []
    results = []
    for i, settings in enumerate((replace(ONE, announce=said.append), Settings(n_threads=2), Settings(n_threads=1, max_memory_bytes=LITTLE))):
        encoded.clear()
        results.append(quantize(folder, Path(f"{i}.gguf"), request_, settings))
        assert sorted(encoded) == sorted(results[0].logs)
        layers = [name.split(".")[1] for name in encoded if name.startswith("blk") and "norm" not in name]
        assert layers == sorted(layers) and len(layers) == N_FED
    assert len({result.paths[0].read_bytes() for result in results}) == 1
    assert len(aimed(results[0])) > N_FED // 2 and not {"token_embd.weight", "output.weight"} & aimed(results[0])
    assert any(line.endswith("; each layer for the inputs it gets in the file") for line in said)
    layerwise = quantize(folder, Path("layerwise.gguf"), replace(request_, compensate_sequence=False), ONE)
    ours, theirs = payloads(Path("0.gguf")), payloads(Path("layerwise.gguf"))
    assert not aimed(layerwise) and {name for name in ours if ours[name] != theirs[name]} == aimed(results[0])


def test_the_sequence_is_told_of_what_the_file_has(folder: Path, request_: QuantizeRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a sequence on another text, columns or documents than the rest, inputs of which it does not see what was written before,
    and tensors that it is given in another type or shape than the file's."""
    seen: list[tuple[list[str], set[str]]] = []
    found: dict[str, Tensor] = {}
    real = encode_module.run_sequence

    def watched(path: Path, tokens: np.ndarray, written: Callable[[str], Tensor | None], on_input: Callable[..., None], **how: object) -> None:
        assert path == folder and tokens.shape == (20, 64) and how["max_columns"] == 256 and how["seed"] == 0 and how["documents"] is not None

        def on_input_(names: Sequence[str], drift: Drift) -> None:
            now = {tensor.name: tensor for tensor in map(written, logs) if tensor is not None}
            seen.append((list(names), set(now)))
            on_input(names, drift)
            found.update((name, tensor) for name in logs if (tensor := written(name)) is not None)

        real(path, tokens, written, on_input_, **how)  # type: ignore[arg-type]

    logs = [tensor.name for tensor in open_source(folder).tensors]
    monkeypatch.setattr(encode_module, "run_sequence", watched)
    text = request_.calibration.files[0].read_text(encoding="utf-8")
    documents = Path("documents.jsonl")
    documents.write_text("".join(json.dumps({"text": text[i : i + 90]}) + "\n" for i in range(0, len(text), 90)), encoding="utf-8")
    request = replace(request_, compensate_columns=256, calibration=replace(request_.calibration, files=(documents,)))
    quantize(folder, Path("x.gguf"), request, ONE)
    in_layers = {name for name in logs if name.startswith("blk") and "norm" not in name}
    before = set(logs) - in_layers
    for names, has in seen:
        assert has == before
        before |= set(names)
    assert before == set(logs) and len(seen) == 4 * N_LAYERS
    file = {tensor.name: tensor for tensor in open_source(Path("x.gguf")).tensors}
    assert {(t.name, t.shape, t.type) for t in found.values()} == {(t.name, t.shape, t.type) for t in file.values()}


def test_matrices_made_before_save_the_gradient_pass(folder: Path, made: Path, request_: QuantizeRequest, whole: Path) -> None:
    """Catches a pass for matrices that lie there, other bytes than those of a pass over the same text, and matrices in the job folder."""
    steps: list[str] = []
    result = quantize(folder, Path("x.gguf"), replace(request_, imatrix=made), replace(counting(steps), keep_job=True))
    assert "calibrate" not in steps and "sequence" in steps and aimed(result)
    assert payloads(Path("x.gguf")) == payloads(whole)
    assert list(job_folder(Path("x.gguf")).glob("**/matrices")) == []


@pytest.mark.parametrize("what", ["a pass", "matrices", "no imatrix"])
def test_without_the_sequence_nothing_of_it_runs(folder: Path, made: Path, request_: QuantizeRequest, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    """Catches a second pass over the text, or room for all matrices, that was opted out of, or that no layer's weights have any use of;
    and a text that must be there though nothing of it is run."""
    monkeypatch.setattr(encode_module, "run_sequence", lambda *_, **__: pytest.fail("ran"))
    said: list[str] = []
    without = replace(request_, compensate_sequence=False)
    ways = {
        "a pass": without,
        "matrices": replace(without, imatrix=made, calibration=ImatrixRequest((Path("no.txt"),))),
        "no imatrix": replace(request_, imatrix=None, use_imatrix=False),
    }
    result = quantize(folder, Path("x.gguf"), ways[what], replace(ONE, announce=said.append))
    assert sum(bool(log.feedback) for log in result.logs.values()) == (2 if what == "no imatrix" else N_FED + 2)
    assert not any("matrices in" in line or "each layer" in line for line in said)
    assert left() == FINISHED


def test_a_sequence_that_is_not_asked_for_is_of_small_models(folder: Path, made: Path, request_: QuantizeRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches 100 GB of matrices for a large model that nobody asked for, a sequence that is left out silently, and none
    where they lie there, or it was asked for."""
    monkeypatch.setattr(encode_module, "AUTO_SEQUENCE_WEIGHTS", 1000)
    for change, is_sequential in (({}, False), ({"imatrix": made}, True), ({"compensate_sequence": True}, True)):
        steps: list[str] = []
        said: list[str] = []
        quantize(folder, Path("x.gguf"), replace(request_, **change), replace(counting(steps), overwrite=True, announce=said.append))
        assert ("sequence" in steps) == is_sequential, change
        assert any("not in sequence" in line for line in said) != is_sequential, change


def test_a_sequence_without_layers_or_feedback_is_refused(folder: Path, demo_gguf: Path, request_: QuantizeRequest) -> None:
    """Catches options that are asked for and change nothing."""
    off = replace(request_, compensate=Compensate.OFF)
    for model, request, what in (
        (demo_gguf, QuantizeRequest(quant_type="Q4_0", compensate=Compensate.FAST, compensate_sequence=True), "is a GGUF, of which layers cannot be run"),
        (folder, replace(off, compensate_sequence=True), r"--\[no-\]compensate-sequence says how error feedback goes"),
        (folder, replace(off, compensate_sequence=False), r"--\[no-\]compensate-sequence says how error feedback goes"),
    ):
        with pytest.raises(UsageError, match=what):
            quantize(model, Path("x.gguf"), request, ONE)


def test_too_little_text_for_a_verdict_is_said(folder: Path, made: Path, request_: QuantizeRequest) -> None:
    """Catches a traceback, and a file of which nobody knows what it makes up for."""
    request = replace(request_, imatrix=made, calibration=replace(request_.calibration, n_samples=1))
    with pytest.raises(InputError, match="got 1 chunks, expected at least 2"):
        quantize(folder, Path("x.gguf"), request, ONE)
    assert Path("x.gguf").exists() is False


# --- stopped and killed ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [2 << 30, LITTLE])
def test_killed_in_the_sequence(folder: Path, request_: QuantizeRequest, whole: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    """Catches a gradient pass that is run again, a tensor that is encoded twice, and a drift that depends on where the run was cut:
    between two inputs, and between two weights of one."""
    settings = replace(ONE, max_memory_bytes=memory)
    n_left = len(read_gguf(whole).tensors)
    for n in (12, 6, 4):
        steps: list[str] = []
        with monkeypatch.context() as patch, pytest.raises(Killed):
            dying(patch)
            stop_at(patch, n, die)
            quantize(folder, Path("x.gguf"), request_, counting(steps, settings))
        assert left() == UNFINISHED and ("calibrate" in steps) == (n == 12)
        n_left -= n - 1
    steps.clear()
    encoded.clear()
    result = quantize(folder, Path("x.gguf"), request_, counting(steps, settings))
    assert Path("x.gguf").read_bytes() == whole.read_bytes() and left() == FINISHED
    assert len(encoded) == n_left and "calibrate" not in steps
    assert len(aimed(result)) > N_FED // 2


@pytest.mark.parametrize(("memory", "late"), [(2 << 30, 15), (LITTLE, 150)])
def test_killed_in_the_gradient_pass(folder: Path, request_: QuantizeRequest, whole: Path, monkeypatch: pytest.MonkeyPatch, memory: int, late: int) -> None:
    """Catches matrices of half a pass taken for all, layers that are run again though the job folder has them, and one whose
    matrices are counted twice or are gone."""
    settings, steps = replace(ONE, max_memory_bytes=memory), list[str]()
    for n in (late, 3):
        steps.clear()
        with monkeypatch.context() as patch, pytest.raises(Killed):
            dying(patch)
            quantize(folder, Path("x.gguf"), request_, counting(steps, settings, at("calibrate", n)))
        assert "sequence" not in steps and left() == UNFINISHED
    steps.clear()
    quantize(folder, Path("x.gguf"), request_, counting(steps, settings))
    assert Path("x.gguf").read_bytes() == whole.read_bytes() and left() == FINISHED
    assert steps.count("calibrate") < 40 if memory == LITTLE else steps.count("calibrate") == TEXT.n_samples


def test_killed_before_the_first_encoded_tensor(folder: Path, request_: QuantizeRequest, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches hours of gradients lost because only norms were finished yet."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying(patch)
        stop_at(patch, 8, die)
        quantize(folder, Path("x.gguf"), request_, ONE)
    steps: list[str] = []
    quantize(folder, Path("x.gguf"), request_, counting(steps))
    assert "calibrate" not in steps and Path("x.gguf").read_bytes() == whole.read_bytes()


def test_damaged_tensors_are_encoded_again(folder: Path, request_: QuantizeRequest, whole: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tensor that is encoded for inputs of which it has itself changed something, for those of a damaged file, or without
    feedback; of the first layer, when others after it are finished."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying(patch)
        stop_at(patch, 28, die)
        quantize(folder, Path("x.gguf"), request_, ONE)
    damaged = ["blk.0.attn_k.weight", "blk.1.ffn_up.weight", "token_embd.weight"]
    infos = {tensor.name: tensor for tensor in read_gguf(whole).tensors}
    with Path("x.gguf.part").open("r+b") as stream:
        for name in damaged:
            stream.seek(infos[name].offset)
            stream.write(bytes(infos[name].n_bytes))
    encoded.clear()
    steps: list[str] = []
    result = quantize(folder, Path("x.gguf"), request_, counting(steps))
    assert Path("x.gguf").read_bytes() == whole.read_bytes()
    assert set(damaged) < set(encoded) and len(encoded) == len(infos) - 27 + 3 and "calibrate" not in steps
    assert result.logs["blk.1.ffn_up.weight"].feedback


@pytest.mark.parametrize("damage", [Path.unlink, lambda shard: os.truncate(shard, 1000)], ids=["gone", "cut short"])
def test_damaged_matrices_are_collected_again(
    folder: Path, request_: QuantizeRequest, whole: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    """Catches a layer that silently goes without feedback, and a job that cannot go on and says that it can."""
    steps: list[str] = []
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying(patch)
        stop_at(patch, 12, die)
        quantize(folder, Path("x.gguf"), request_, ONE)
    [shard] = job_folder(Path("x.gguf")).glob("**/matrices/layer-00001")
    damage(shard)
    quantize(folder, Path("x.gguf"), request_, counting(steps))
    assert Path("x.gguf").read_bytes() == whole.read_bytes() and steps.count("calibrate") == TEXT.n_samples
    assert "are damaged and are collected again" in caplog.text


def test_an_error_among_the_matrices_costs_no_finished_layer(folder: Path, request_: QuantizeRequest, whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a pass of hours that is thrown away because nothing was encoded before it."""
    steps: list[str] = []
    little = replace(ONE, max_memory_bytes=LITTLE)
    write = GramWriter.__call__

    def full(writer: GramWriter, layer: int | None, train: GramSet, holdout: GramSet) -> None:
        if layer == 0:
            raise OutputError("cannot write: no space left on device")
        write(writer, layer, train, holdout)

    with monkeypatch.context() as patch, pytest.raises(OutputError, match=r"finished tensors are kept in .*: the same command goes on"):
        patch.setattr(GramWriter, "__call__", full)
        quantize(folder, Path("x.gguf"), request_, little)
    assert left() == UNFINISHED
    quantize(folder, Path("x.gguf"), request_, counting(steps, little))
    assert Path("x.gguf").read_bytes() == whole.read_bytes() and 0 < steps.count("calibrate") < 2 * TEXT.n_samples


@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM to oneself")
@pytest.mark.parametrize(("phase", "n"), [("sequence", 150), ("calibrate", 11)])
def test_stopped_on_the_way(folder: Path, request_: QuantizeRequest, whole: Path, monkeypatch: pytest.MonkeyPatch, phase: str, n: int) -> None:
    """Catches a stop that waits for the end, one that loses what is finished, and one that does not say how to go on."""
    steps: list[str] = []
    with pytest.raises(Interrupted, match=r"interrupted after \d+ of \d+ tensors; saved in x\.loopgguf-job.*same command again"):
        quantize(folder, Path("x.gguf"), request_, counting(steps, ONE, at(phase, n, lambda: signal.raise_signal(signal.SIGTERM))))
    assert steps.count(phase) == n and left() == UNFINISHED
    steps.clear()
    quantize(folder, Path("x.gguf"), request_, counting(steps))
    assert Path("x.gguf").read_bytes() == whole.read_bytes() and left() == FINISHED
    assert ("calibrate" in steps) == (phase == "calibrate")


def test_a_job_is_of_one_of_both_ways(folder: Path, request_: QuantizeRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches tensors of a file in sequence among others that know nothing of one another."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying(patch)
        stop_at(patch, 14, die)
        quantize(folder, Path("x.gguf"), request_, ONE)
    with pytest.raises(UsageError, match=r"differs in sequence \(was True, is False\)"):
        quantize(folder, Path("x.gguf"), replace(request_, compensate_sequence=False), ONE)
    text = replace(request_.calibration, n_samples=19)
    with pytest.raises(UsageError, match=r"differs in calibration text \("):
        quantize(folder, Path("x.gguf"), replace(request_, calibration=text), ONE)


def test_the_text_belongs_to_a_job_with_matrices_too(folder: Path, made: Path, request_: QuantizeRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a drift that is measured on one text for some tensors and on another for the rest, where matrices say nothing of it."""
    request = replace(request_, imatrix=made)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        dying(patch)
        stop_at(patch, 14, die)
        quantize(folder, Path("x.gguf"), request, ONE)
    with pytest.raises(UsageError, match=r"differs in calibration text \("):
        quantize(folder, Path("x.gguf"), replace(request, calibration=replace(request.calibration, n_samples=19)), ONE)


# --- room ---------------------------------------------------------------------------------------------------------------


def test_a_disk_without_room_for_the_matrices_is_refused_first(folder: Path, made: Path, request_: QuantizeRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a pass of hours that ends on a full disk, an error that does not say how to go without, and leftovers."""
    steps: list[str] = []
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1 << 60, 0, 700_000))  # type: ignore[attr-defined]
    with pytest.raises(OutputError, match=r"disk space for Gram matrices in .*: got 700,000 bytes free, .*or give --no-compensate-sequence"):
        quantize(folder, Path("x.gguf"), request_, counting(steps))
    assert "calibrate" not in steps and left() == []
    quantize(folder, Path("x.gguf"), replace(request_, compensate_sequence=False), ONE)
    quantize(folder, Path("y.gguf"), replace(request_, imatrix=made), ONE)


def test_the_matrices_take_the_disk_that_was_announced(folder: Path, request_: QuantizeRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a figure that is too small, or far from what is used, and hidden states that stay for the whole sequence."""
    said, used, kept = list[str](), list[int](), list[str]()

    def look(phase: str, _n: int) -> None:
        if phase == "sequence":
            work = next(job_folder(Path("x.gguf")).glob("*/work"))
            used.append(sum(path.stat().st_size for path in work.glob("matrices/*")))
            kept.extend(path.name for path in work.iterdir() if path.suffix == ".f32")

    quantize(folder, Path("x.gguf"), request_, counting([], replace(ONE, max_memory_bytes=LITTLE, announce=said.append), look))
    [line] = [line for line in said if " bytes of matrices in " in line]
    figure = int(line.split("at most ")[1].split(" ")[0].replace(",", ""))
    assert 0.5 * figure < used[0] <= figure and len(set(used)) == 1 and kept == []


# --- files that are made of others ----------------------------------------------------------------------------------------


def test_a_guarded_file_is_the_same_after_a_stop(folder: Path, request_: QuantizeRequest, texts: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches weights taken over that were encoded for the inputs of a file with feedback everywhere: they are not those of a run
    that goes on, and make up for what is not there."""

    def compare(_with: object, _without: object) -> SimpleNamespace:
        worse = "attn_v" in tried[-1]
        return SimpleNamespace(mean_kld_difference_nats=Measure(0.001 if worse else -0.001, 0.0001))

    tried: list[str] = []
    real_try = guard._Guard._try
    monkeypatch.setattr(guard._Guard, "_try", lambda self, kind, *rest: (tried.append(kind), real_try(self, kind, *rest))[1])
    monkeypatch.setattr(guard, "compare_paired", compare)
    monkeypatch.setattr(guard._Guard, "_measure", lambda *_: SimpleNamespace(n_chunks=4))
    rules = TypeRules(overrides=parse_overrides(["ffn|attn_q|token_embd|^output=F16"]))  # of the others there is no need
    request = replace(request_, guard=KindGuard((texts["selection"],)), rules=rules)
    result = quantize(folder, Path("whole.gguf"), request, ONE)
    assert not result.logs["blk.1.attn_v.weight"].feedback and result.logs["blk.1.attn_k.weight"].feedback
    n_tried = len(tried)
    assert set(tried) == {"attn_k", "attn_v", "attn_output"}
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr("loopgguf.workflow.publish", lambda *_, **__: die())
        quantize(folder, Path("x.gguf"), request, ONE)
    assert (job_folder(Path("x.gguf")) / GUARD).is_dir()
    quantize(folder, Path("x.gguf"), request, ONE)
    assert len(tried) == 2 * n_tried and payloads(Path("x.gguf")) == payloads(Path("whole.gguf"))


def test_what_is_taken_over_is_seen_by_what_is_encoded_again(folder: Path, request_: QuantizeRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a larger type that is encoded for the checkpoint's inputs, because the tensors before it are taken over from another
    file, and such tensors that are encoded again."""
    resolved = resolve(open_source(folder), request_, ONE)
    order, name = resolved.order(request_), "blk.1.ffn_up.weight"
    first = publish.publish(open_source(folder), order, Path("first.gguf"), ONE, ())
    plan = replace(order.plan, rows=tuple(with_type(row, GgmlType.Q5_0, "", has_importance=True) if row.name == name else row for row in order.plan.rows))
    seen: list[tuple[list[str], Drift]] = []
    real = encode_module.run_sequence

    def watched(path: Path, tokens: np.ndarray, written: Callable[[str], Tensor | None], on_input: Callable[..., None], **how: object) -> None:
        def on_input_(names: Sequence[str], drift: Drift) -> None:
            seen.append((list(names), drift))
            on_input(names, drift)

        real(path, tokens, written, on_input_, **how)  # type: ignore[arg-type]

    monkeypatch.setattr(encode_module, "run_sequence", watched)
    again = publish.publish(open_source(folder), order, Path("again.gguf"), ONE, ())
    [whole] = [drift for names, drift in seen if name in names]
    seen.clear()
    reuse = Reuse.of(first, Path("first.gguf"), plan)
    raised = publish.publish(open_source(folder), replace(order, plan=plan, reuse=reuse), Path("raised.gguf"), ONE, ())
    [(names, drift)] = seen
    assert names == [name] and np.array_equal(drift.train[0].cross, whole.train[0].cross) and drift.train[0].cross.any()
    ours, theirs = payloads(Path("raised.gguf")), payloads(Path("first.gguf"))
    assert {tensor for tensor in ours if ours[tensor] != theirs[tensor]} == {name} and theirs == payloads(Path("again.gguf"))
    assert aimed(raised) == aimed(first) == aimed(again) and name in aimed(raised)
