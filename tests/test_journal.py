"""journal.py and publishing: a quantization that was stopped or killed anywhere goes on, to the same bytes."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

import pytest
from stops import Killed, isolate, left, stop_at, take_down_encoded
from tiny_llama import write_tiny_llama

from loopgguf.checkpoint import CURRENT, Job, job_folder
from loopgguf.compensate import Damping
from loopgguf.container import PartFile, part_path, plan_layout, read_gguf
from loopgguf.errors import InputError, Interrupted, OutputError, QualityError, UsageError
from loopgguf.feedback import Compensate
from loopgguf.formats import GgmlType
from loopgguf.importance import ImatrixRequest
from loopgguf.intent import QuantizeRequest
from loopgguf.journal import Journal
from loopgguf.manifest import manifest_path
from loopgguf.opening import Settings
from loopgguf.pipeline import FeedbackLog, SampledError, TensorLog
from loopgguf.source import open_source
from loopgguf.super_weights import MaskLog
from loopgguf.workflow import check_again, compute_imatrix, quantize

REQUEST = QuantizeRequest(quant_type="Q8_0", use_imatrix=False)
FEEDBACK = (FeedbackLog("columns", 1 / 3, Damping(0.3), is_aimed=True), FeedbackLog("plain", 1.0, None))
LOG = TensorLog(SampledError(3, 9, 0.1 + 0.2), 7, FEEDBACK, MaskLog(3, 2, 1, 0.1, 0.2, 0.3))


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    isolate(monkeypatch, tmp_path)
    return tmp_path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "tiny.gguf")


@pytest.fixture
def whole(model: Path) -> bytes:
    """What an uninterrupted run writes."""
    return quantize(model, Path("whole.gguf"), REQUEST).paths[0].read_bytes()


FINISHED = ["x.gguf", "x.gguf.sha256"]
LITTLE = 30 << 20  # bytes of memory: a gradient pass of the demo model goes layer by layer
UNFINISHED = ["x.gguf.part", "x.loopgguf-job"]


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return take_down_encoded(monkeypatch)


def raising(error: BaseException) -> Callable[[], NoReturn]:
    def stop() -> NoReturn:
        raise error

    return stop


# --- going on ---------------------------------------------------------------------------------------------------------


def test_logs_come_back_exactly(tmp_path: Path) -> None:
    """Catches an error of a resumed tensor that differs in the last bit, against which the file is then checked."""
    layout = plan_layout({}, [("w", GgmlType.F32, (2, 4))])
    with Job(tmp_path / "job", {}) as job, PartFile(tmp_path / "a", layout.total_bytes) as part:
        log = replace(LOG, sha256=part.sha256(layout.tensors[0].offset, layout.tensors[0].n_bytes))
        Journal(job, [(part, layout)], min_seconds=0).finished("w", log)
        part.is_kept = True
    with Job(tmp_path / "job", {}) as job, PartFile(tmp_path / "a", layout.total_bytes, goes_on=True) as part:
        assert Journal(job, [(part, layout)], job.load()).logs == {"w": log}


@pytest.mark.parametrize("n", [1, 2, 7, 12])
def test_a_killed_run_goes_on(model: Path, whole: bytes, encoded: list[str], monkeypatch: pytest.MonkeyPatch, n: int) -> None:
    """Catches a tensor encoded twice, one left out, and bytes that depend on where the run was cut."""
    encoded.clear()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, n, raising(Killed()))
        quantize(model, Path("x.gguf"), REQUEST, Settings(n_threads=1))
    assert left() == (UNFINISHED if n > 1 else [])
    n_all, before = len(read_gguf(model).tensors), set(encoded)
    encoded.clear()
    result = quantize(model, Path("x.gguf"), REQUEST)
    assert Path("x.gguf").read_bytes() == whole and left() == FINISHED
    assert len(encoded) == n_all - (n - 1)
    assert set(encoded) | before == result.logs.keys() and list(result.logs) == [row.name for row in result.plan.rows]


@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM to oneself")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_ends_the_tensor_and_says_how_to_go_on(
    model: Path, whole: bytes, encoded: list[str], monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    """Catches a stop that loses finished tensors, waits for the end, or leaves a model under its name."""
    with monkeypatch.context() as patch, pytest.raises(Interrupted, match=r"after [3-9] of 12 tensors; saved in x\.loopgguf-job.*same command again") as caught:
        stop_at(patch, 3, lambda: signal.raise_signal(number))
        quantize(model, Path("x.gguf"), REQUEST, Settings(n_threads=1))
    assert caught.value.exit_code == 75 and left() == UNFINISHED
    encoded.clear()
    quantize(model, Path("x.gguf"), REQUEST)
    assert Path("x.gguf").read_bytes() == whole and 0 < len(encoded) < 10


@pytest.mark.skipif(os.name == "nt", reason="no SIGTERM to oneself")
def test_a_stop_while_errors_are_measured(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the errors of finished tensors lost, or a stop that waits for the whole table."""
    request = QuantizeRequest(target_bpw=9, use_imatrix=False)
    whole = quantize(model, Path("whole.gguf"), request, Settings(n_threads=1)).paths[0].read_bytes()
    shutil.rmtree(Path("cache") / "loopgguf" / "errors")

    def stop(phase: str, done: int, _total: int) -> None:
        if phase == "measure errors" and done == 3:
            signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Interrupted, match="after the errors of 3 of 9 tensors; they are kept in the cache"):
        quantize(model, Path("x.gguf"), request, Settings(n_threads=1, progress=stop))
    assert left() == [] and len(list((Path("cache") / "loopgguf" / "errors").iterdir())) == 3
    quantize(model, Path("x.gguf"), request, Settings(n_threads=1))
    assert Path("x.gguf").read_bytes() == whole


def test_damaged_tensors_are_encoded_again(
    model: Path, whole: bytes, encoded: list[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches a tensor that is believed because the journal names it: the disk lost its bytes, or somebody changed them."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 8, raising(Killed()))
        quantize(model, Path("x.gguf"), REQUEST)
    names = list(json.loads((job_folder(Path("x.gguf")) / "quantize" / CURRENT).read_text(encoding="utf-8").splitlines()[0])["facts"]["tensors"])
    info = next(tensor for tensor in read_gguf(Path("whole.gguf")).tensors if tensor.name == names[2])
    with Path("x.gguf.part").open("r+b") as stream:
        stream.seek(info.offset + info.n_bytes - 1)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([last[0] ^ 1]))
    encoded.clear()
    with caplog.at_level(logging.WARNING):
        quantize(model, Path("x.gguf"), REQUEST)
    assert names[2] in encoded and "1 of 7 finished tensors are gone or damaged" in caplog.text
    assert Path("x.gguf").read_bytes() == whole


def test_a_part_that_is_gone_or_of_another_size_is_made_anew(
    model: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Catches an output with holes where the part was before."""
    for change in (lambda path: path.unlink(), lambda path: os.truncate(path, 100), lambda path: path.write_bytes(bytes(len(whole) + 1))):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            stop_at(patch, 8, raising(Killed()))
            quantize(model, Path("x.gguf"), REQUEST)
        change(Path("x.gguf.part"))
        quantize(model, Path("x.gguf"), REQUEST, Settings(overwrite=True))
        assert Path("x.gguf").read_bytes() == whole
        Path("x.gguf").unlink()
        manifest_path(Path("x.gguf")).unlink()
    assert caplog.text.count("7 of 7 finished tensors") == 3


def test_padding_is_of_this_run(model: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches garbage between tensors, where a part that was damaged is gone on with: no digest covers it."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 8, raising(Killed()))
        quantize(model, Path("x.gguf"), REQUEST)
    raw = bytearray(Path("x.gguf.part").read_bytes())
    file = read_gguf(Path("whole.gguf"))
    covered = bytearray(len(raw))
    for info in file.tensors:
        covered[info.offset : info.offset + info.n_bytes] = b"\1" * info.n_bytes
    Path("x.gguf.part").write_bytes(bytes(0x55 if not is_covered else byte for byte, is_covered in zip(raw, covered, strict=True)))
    assert covered.count(0) > file.data_offset
    quantize(model, Path("x.gguf"), REQUEST)
    assert Path("x.gguf").read_bytes() == whole


def test_another_request_names_what_differs(model: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches tensors of two plans in one file, and a refusal that does not say what changed or what to do."""
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 4, raising(Killed()))
        quantize(model, Path("x.gguf"), REQUEST)
    with pytest.raises(UsageError, match=r"differs in metadata .*plan \(was [0-9a-f]+…?, is .*--no-resume, or .*--job-folder"):
        quantize(model, Path("x.gguf"), replace(REQUEST, quant_type="Q4_0"))
    os.utime(model, ns=(1, 1))
    with pytest.raises(UsageError, match=r"differs in model \("):
        quantize(model, Path("x.gguf"), REQUEST)
    with pytest.raises(UsageError, match=r"model's bytes \(was nothing, is"):
        quantize(model, Path("x.gguf"), REQUEST, Settings(full_hash=True))
    assert left() == UNFINISHED
    quantize(model, Path("x.gguf"), REQUEST, Settings(resume=False))
    assert Path("x.gguf").read_bytes() == whole and left() == FINISHED


def test_a_full_hash_sees_bytes_that_change_neither_size_nor_time(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches half a file of other weights, copied over with their times kept."""
    full = Settings(full_hash=True)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 4, raising(Killed()))
        quantize(model, Path("x.gguf"), REQUEST, full)
    times = model.stat()
    raw = bytearray(model.read_bytes())
    raw[-200] ^= 1
    model.write_bytes(raw)
    os.utime(model, ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(UsageError, match=r"differs in model's bytes \("):
        quantize(model, Path("x.gguf"), REQUEST, full)


def test_a_kept_job_stays_and_is_no_licence_to_overwrite(model: Path, whole: bytes, caplog: pytest.LogCaptureFixture) -> None:
    """Catches a published file that is taken back as a part, because the job folder is still there, and a warning that its
    tensors are damaged where they are only published."""
    keep = Settings(keep_job=True)
    quantize(model, Path("x.gguf"), REQUEST, keep)
    assert left() == [*FINISHED, "x.loopgguf-job"]
    with pytest.raises(OutputError, match="already exists"):
        quantize(model, Path("x.gguf"), REQUEST, keep)
    assert Path("x.gguf").read_bytes() == whole and left() == [*FINISHED, "x.loopgguf-job"]
    quantize(model, Path("x.gguf"), REQUEST, replace(keep, overwrite=True))
    assert Path("x.gguf").read_bytes() == whole
    assert not caplog.records


def test_two_runs_on_one_output(model: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches two writers on one job, and on one part file from two jobs."""
    said: list[str] = []

    def meanwhile() -> None:
        for settings in (Settings(), Settings(job_folder=Path("other"))):
            with pytest.raises((UsageError, OutputError)) as caught:
                quantize(model, Path("x.gguf"), REQUEST, settings)
            said.append(str(caught.value))

    stop_at(monkeypatch, 3, meanwhile)
    quantize(model, Path("x.gguf"), REQUEST)
    assert f"in use by process {os.getpid()}" in said[0] and "is being written by another run" in said[1]
    assert Path("x.gguf").read_bytes() == whole and left() == FINISHED and not Path("other").exists()


# --- publishing -------------------------------------------------------------------------------------------------------


def replacing(monkeypatch: pytest.MonkeyPatch, act: Callable[[Path, Path], bool]) -> None:
    """Let `act(old, new)` see every rename; what it raises comes before it, and after it where it returns True."""
    rename = os.replace

    def seen(old: str | Path, new: str | Path, **_: object) -> None:
        comes_after = act(Path(old), Path(new))
        rename(old, new)
        if comes_after:
            raise Killed

    monkeypatch.setattr(os, "replace", seen)


@pytest.mark.parametrize("name", FINISHED)
@pytest.mark.parametrize("after", [False, True])
def test_killed_around_the_renames(model: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch, name: str, after: bool) -> None:
    """Catches a finished file that the same command then refuses to touch, or one without its manifest."""

    def act(_old: Path, new: Path) -> bool:
        if new.name == name and not after:
            raise Killed
        return new.name == name and after

    take_back = PartFile.take_back
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PartFile, "take_back", lambda part: None)  # the process is dead
        replacing(patch, act)
        quantize(model, Path("x.gguf"), REQUEST)
    assert PartFile.take_back is take_back
    assert Path("x.loopgguf-job").exists() and (Path("x.gguf").exists() == (after or name != "x.gguf"))
    quantize(model, Path("x.gguf"), REQUEST)
    assert Path("x.gguf").read_bytes() == whole and left() == FINISHED


def test_a_failed_rename_takes_all_names_back(model: Path, whole: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a model without its manifest under its name, and one that is lost because the manifest could not be written."""

    def act(_old: Path, new: Path) -> bool:
        if new.name == "x.gguf.sha256":
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return False

    with monkeypatch.context() as patch, pytest.raises(OutputError, match=r"cannot publish x\.gguf\.sha256: Input/output error"):
        replacing(patch, act)
        quantize(model, Path("x.gguf"), REQUEST)
    assert left() == UNFINISHED
    quantize(model, Path("x.gguf"), REQUEST)
    assert Path("x.gguf").read_bytes() == whole and left() == FINISHED


def test_the_manifest_is_the_files(model: Path) -> None:
    """Catches a digest of other bytes than those under the name, and damage that a second check does not see."""
    path = quantize(model, Path("x.gguf"), REQUEST).paths[0]
    assert manifest_path(path).read_text(encoding="utf-8") == f"{hashlib.sha256(path.read_bytes()).hexdigest()}  x.gguf\n"
    assert check_again(path).n_manifests == 1
    raw = bytearray(path.read_bytes())
    raw[-33] ^= 1  # a weight's low bits: finite, and nothing but the digest can tell
    path.write_bytes(raw)
    with pytest.raises(QualityError, match=r"SHA-256 of x\.gguf: got .*, expected .* as in x\.gguf\.sha256"):
        check_again(path)
    manifest_path(path).unlink()
    assert check_again(path).n_manifests == 0


def test_an_old_manifest_never_lies_beside_a_new_file(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches `sha256sum -c` that fails for a good file, because a run was killed between two renames."""
    quantize(model, Path("x.gguf"), REQUEST)
    old = manifest_path(Path("x.gguf")).read_bytes()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(PartFile, "take_back", lambda part: None)
        replacing(patch, lambda _old, new: new.name == "x.gguf")
        quantize(model, Path("x.gguf"), replace(REQUEST, quant_type="Q4_0"), Settings(overwrite=True))
    assert Path("x.gguf").exists() and not manifest_path(Path("x.gguf")).exists()
    quantize(model, Path("x.gguf"), replace(REQUEST, quant_type="Q4_0"))
    assert check_again(Path("x.gguf")).n_manifests == 1 and manifest_path(Path("x.gguf")).read_bytes() != old


def test_a_manifest_of_somebody_else_is_not_overwritten(model: Path) -> None:
    """Catches the digest of a download lost, before any work is done."""
    manifest_path(Path("x.gguf")).write_text("theirs", encoding="utf-8")
    with pytest.raises(OutputError, match=r"x\.gguf\.sha256 already exists"):
        quantize(model, Path("x.gguf"), REQUEST)
    assert manifest_path(Path("x.gguf")).read_text(encoding="utf-8") == "theirs"


def test_a_source_that_changes_meanwhile_is_noticed(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a file of which one half is of the model before a download, and the other of the one after it."""
    with monkeypatch.context() as patch, pytest.raises(InputError, match=r"tiny\.gguf changed while it was read.*Run again"):
        stop_at(patch, 12, lambda: os.utime(model, ns=(5, 5)))
        quantize(model, Path("x.gguf"), REQUEST)
    assert not Path("x.gguf").exists()
    quantize(model, Path("x.gguf"), REQUEST, Settings(resume=False))
    with monkeypatch.context() as patch, pytest.raises(InputError, match="No such file"):
        stop_at(patch, 12, model.unlink)
        quantize(model, Path("y.gguf"), REQUEST)


@pytest.mark.parametrize("link", ["same", "hard", "symbolic"])
def test_a_part_that_is_the_input(tmp_path: Path, model: Path, link: str) -> None:
    """Catches a model called NAME.gguf.part, or a link of that name to one, that is emptied to write NAME.gguf."""
    part, before = part_path(Path("x.gguf")), model.read_bytes()
    source = model
    if link == "same":
        source = model.rename(part)
    else:
        (os.link if link == "hard" else os.symlink)(model, part)
    with pytest.raises(OutputError, match="is the input"):
        quantize(source, Path("x.gguf"), REQUEST)
    assert source.read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="links are followed")
def test_a_part_that_is_a_link_is_not_followed(tmp_path: Path, model: Path) -> None:
    """Catches a stranger's file emptied through a link that lay in the output's folder."""
    precious = tmp_path / "precious"
    precious.write_text("theirs", encoding="utf-8")
    part_path(Path("x.gguf")).symlink_to(precious)
    with pytest.raises(OutputError, match=r"cannot create x\.gguf\.part"):
        quantize(model, Path("x.gguf"), REQUEST)
    assert precious.read_text(encoding="utf-8") == "theirs"


# --- error feedback ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [2 << 30, LITTLE])
def test_error_feedback_goes_on(demo_model: Path, encoded: list[str], monkeypatch: pytest.MonkeyPatch, memory: int) -> None:
    """Catches layers that are encoded or run again, and matrices of a layer that are gone when its tensor is done again.

    memory: with little of it the gradient pass goes block by block and is gone on with too.
    """
    text = ImatrixRequest(n_samples=12, ctx_size=256)
    request = QuantizeRequest(quant_type="Q4_0", calibration=text, compensate=Compensate.FAST, compensate_sequence=False)
    one = Settings(n_threads=1, max_memory_bytes=memory)
    whole = quantize(demo_model, Path("whole.gguf"), request, one).paths[0].read_bytes()
    steps: list[int] = []
    kills = (12,) if memory > LITTLE else (12, 9)
    for n in kills:
        with monkeypatch.context() as patch, pytest.raises(Killed):
            stop_at(patch, n, raising(Killed()))
            quantize(demo_model, Path("x.gguf"), request, one)
    encoded.clear()
    counted = replace(one, progress=lambda phase, _done, _total: steps.append(1) if phase.startswith("calibrate") else None)
    result = quantize(demo_model, Path("x.gguf"), request, counted)
    assert Path("x.gguf").read_bytes() == whole and left() == FINISHED
    assert len(set(encoded)) == 57 - sum(n - 1 for n in kills)
    assert sum(len(log.feedback) for log in result.logs.values()) > 20
    if memory == LITTLE:
        assert len(steps) < 12 * 3 * 6, "finished layers were run again"


@pytest.mark.parametrize(("n", "n_chunks"), [(10, {24}), (45, {12})])
def test_error_feedback_from_a_gguf_goes_on(demo_gguf: Path, monkeypatch: pytest.MonkeyPatch, n: int, n_chunks: set[int]) -> None:
    """Catches a pass over the text for layers that are finished, or none for those that are not, and matrices of another block."""
    request = QuantizeRequest(quant_type="Q4_0", calibration=ImatrixRequest(n_samples=12, ctx_size=256), compensate=Compensate.FAST)
    one = Settings(n_threads=1, max_memory_bytes=2 * 4 * (3 * 256**2 + 768**2) * 4)
    whole = quantize(demo_gguf, Path("whole.gguf"), request, one).paths[0].read_bytes()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, n, raising(Killed()))
        quantize(demo_gguf, Path("x.gguf"), request, one)
    totals: set[int] = set()
    counted = replace(one, progress=lambda phase, _done, total: totals.add(total) if phase.startswith("calibrate") else None)
    result = quantize(demo_gguf, Path("x.gguf"), request, counted)
    assert Path("x.gguf").read_bytes() == whole and totals == n_chunks, "passes were run again"
    assert sum(len(log.feedback) for log in result.logs.values()) > 20


def test_a_damaged_tensor_of_a_finished_layer_brings_its_matrices_back(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a tensor that silently gets the plain encoder's bytes, for the pass has gone beyond its layer."""
    text = ImatrixRequest(n_samples=12, ctx_size=256)
    request = QuantizeRequest(quant_type="Q4_0", calibration=text, compensate=Compensate.FAST, compensate_sequence=False)
    one = Settings(n_threads=1, max_memory_bytes=LITTLE)
    whole = quantize(demo_model, Path("whole.gguf"), request, one).paths[0].read_bytes()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 30, raising(Killed()))
        quantize(demo_model, Path("x.gguf"), request, one)
    info = next(tensor for tensor in read_gguf(Path("whole.gguf")).tensors if tensor.name == "blk.5.ffn_up.weight")
    with Path("x.gguf.part").open("r+b") as stream:
        stream.seek(info.offset)
        stream.write(bytes(info.n_bytes))
    quantize(demo_model, Path("x.gguf"), request, one)
    assert Path("x.gguf").read_bytes() == whole


def test_columns_fed_back_together_reach_the_encoder_and_belong_to_the_job(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an option that changes nothing, or rows narrower than it says, and tensors of two widths in one file."""
    text = ImatrixRequest(n_samples=32, ctx_size=256, gram=True, gradient=True)  # of less, ffn_down has too few tokens a column
    made = compute_imatrix(demo_model, Path("demo.imatrix.gguf"), text).path
    request = QuantizeRequest(quant_type="Q4_0", imatrix=made, compensate=Compensate.FAST, compensate_sequence=False)
    narrow, one = replace(request, compensate_columns=512), Settings(n_threads=1)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        stop_at(patch, 4, raising(Killed()))
        quantize(demo_model, Path("narrow.gguf"), narrow, one)
    with pytest.raises(UsageError, match=r"differs in columns fed back together \(was 512, is nothing\)"):
        quantize(demo_model, Path("narrow.gguf"), request, one)
    files = [quantize(demo_model, path, how, one).paths[0] for path, how in ((Path("whole.gguf"), request), (Path("narrow.gguf"), narrow))]
    digests = [{tensor.name: hashlib.sha256(tensor.read_rows(0, tensor.n_rows)).digest() for tensor in open_source(path).tensors} for path in files]
    assert {name for name in digests[0] if digests[0][name] != digests[1][name]} == {f"blk.{layer}.ffn_down.weight" for layer in range(6)}


def test_columns_that_cannot_be_fed_back_together_are_refused(model: Path) -> None:
    """Catches a block of weights that is cut in two, and an option without effect."""
    refused = ((Compensate.OFF, 256, "give --compensate"), (Compensate.FAST, 300, "got 300, expected a multiple of 256"), (Compensate.FAST, 0, "got 0"))
    for compensate, n, what in refused:
        with pytest.raises(UsageError, match=what):
            quantize(model, Path("x.gguf"), replace(REQUEST, compensate=compensate, compensate_columns=n))
