"""Damage of every kind to a written file is found and named, and the child process that loads it fails in one line."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tiny_llama import write_tiny_llama

from loopgguf import ggml, verify
from loopgguf.container import Layout, PartFile, Value, ValueType, plan_layout, read_gguf, string, write_gguf
from loopgguf.errors import QualityError
from loopgguf.formats import GgmlType, tensor_bytes
from loopgguf.pipeline import Job, TensorLog, execute
from loopgguf.planner import PlanRow
from loopgguf.source import Tensor
from loopgguf.verify import Verification, speak, verify_file

# name → (shape, type in the file); every source is BF16 but the norm
TENSORS = {
    "token_embd.weight": ((64, 256), GgmlType.BF16),
    "blk.0.attn_q.weight": ((32, 256), GgmlType.Q4_K),
    "blk.0.ffn_down_exps.weight": ((3, 32, 256), GgmlType.Q8_0),
    "output_norm.weight": ((250,), GgmlType.F32),  # 1000 bytes, padded to 1024
}


@dataclass(frozen=True)
class Written:
    """A file as the pipeline leaves it, and what `verify_file` is told about it."""

    path: Path
    layout: Layout
    tensors: tuple[Tensor, ...]
    logs: Mapping[str, TensorLog]

    def verify(self, n_threads: int = 2) -> Verification:
        return verify_file(self.path, self.layout, self.tensors, self.logs, n_threads=n_threads)


def source_tensor(name: str, shape: tuple[int, ...]) -> Tensor:
    ggml_type = GgmlType.F32 if len(shape) == 1 else GgmlType.BF16
    rows = np.random.default_rng(len(name)).normal(size=(int(np.prod(shape[:-1])), shape[-1])).astype(np.float32)
    packed: NDArray[np.uint8] = ggml.encode_rows(ggml_type, rows)
    return Tensor(name, shape, ggml_type, lambda start, stop: packed[start:stop])


@pytest.fixture
def written(tmp_path: Path) -> Written:
    tensors = tuple(source_tensor(name, shape) for name, (shape, _) in TENSORS.items())
    layout = plan_layout({"general.architecture": string("llama")}, [(name, ggml_type, shape) for name, (shape, ggml_type) in TENSORS.items()])
    with PartFile(tmp_path / "model.gguf", layout.total_bytes) as part:
        part.write_at(0, layout.header)
        rows = [PlanRow(t.name, t.shape, t.type, TENSORS[t.name][1], tensor_bytes(TENSORS[t.name][1], t.shape), "test") for t in tensors]
        jobs = [Job(tensor, row, part, info) for tensor, row, info in zip(tensors, rows, layout.tensors, strict=True)]
        logs = execute(jobs, lambda _name: None, n_threads=1, max_buffer_bytes=1 << 20)
        part.publish()
    return Written(part.target, layout, tensors, logs)


def damage(written: Written, offset: int, data: bytes) -> None:
    with written.path.open("r+b") as stream:
        stream.seek(offset)
        stream.write(data)


def offset_of(written: Written, name: str) -> int:
    return next(info.offset for info in written.layout.tensors if info.name == name)


# --- the bytes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("slab_bytes", [64 << 10, 700])
def test_sound_file_passes(written: Written, monkeypatch: pytest.MonkeyPatch, slab_bytes: int) -> None:
    """Catches a check that refuses a sound file, slabs that cut a block, and tensors left out of the comparison."""
    monkeypatch.setattr(verify, "_SLAB_BYTES", slab_bytes)
    told: list[tuple[str, int, int]] = []
    verify_file(written.path, written.layout, written.tensors, written.logs, n_threads=1, progress=lambda *step: told.append(step))
    digest = hashlib.sha256(written.path.read_bytes()).hexdigest()
    assert written.verify() == Verification(4, sum(info.n_bytes for info in written.layout.tensors), 4, digest)
    assert told == [("verify", i, 4) for i in range(1, 5)]


def test_every_byte_is_validated(written: Written, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches slabs that skip a part of a tensor: what is read adds up to every payload, once."""
    seen: dict[str, list[tuple[int, int]]] = {name: [] for name in TENSORS}
    read = verify._read

    def spy(fd: int, info: verify.TensorInfo, start: int, n_bytes: int) -> NDArray[np.uint8]:
        seen[info.name].append((start, start + n_bytes))
        return read(fd, info, start, n_bytes)

    monkeypatch.setattr(verify, "_SLAB_BYTES", 1000)
    monkeypatch.setattr(verify, "_read", spy)
    monkeypatch.setattr(verify, "_check_encoded", lambda *_: None)
    monkeypatch.setattr(verify, "_check_copied", lambda *_: None)
    written.verify(n_threads=1)
    for info in written.layout.tensors:
        stops = [0, *(stop for _, stop in seen[info.name])]
        assert [start for start, _ in seen[info.name]] == stops[:-1]
        assert stops[-1] == info.n_bytes


@pytest.mark.parametrize(
    ("name", "damaging", "message"),
    [
        ("blk.0.attn_q.weight", b"\x00\x7c", "NaN, an infinity or an invalid Q4_K block"),  # the first block's scale: F16 infinity
        ("token_embd.weight", b"\xc0\x7f", "NaN, an infinity or an invalid BF16 block"),
        ("output_norm.weight", b"\x00\x00\xc0\x7f", "NaN, an infinity or an invalid F32 block"),
    ],
)
def test_value_that_is_not_finite_is_found(written: Written, name: str, damaging: bytes, message: str) -> None:
    """Catches a type whose rows are not validated."""
    damage(written, offset_of(written, name), damaging)
    with pytest.raises(QualityError, match=rf"tensor {name}: got a {message}"):
        written.verify()


@pytest.mark.parametrize("name", [name for name, (shape, _) in TENSORS.items()])
def test_wrong_bytes_are_found(written: Written, name: str) -> None:
    """Catches rows at the wrong place: zeros are valid in every type, but not what was encoded or copied."""
    info = next(info for info in written.layout.tensors if info.name == name)
    damage(written, info.offset, bytes(info.n_bytes))
    with pytest.raises(QualityError, match=rf"tensor {name}: rows \d+ to \d+ read back"):
        written.verify()


def test_one_flipped_bit_in_the_sampled_rows_is_found(written: Written) -> None:
    """Catches a tolerance so wide that only gross damage shows."""
    name = "blk.0.attn_q.weight"
    row_bytes = 144
    at = offset_of(written, name) + 16 * row_bytes + 16  # row 16 is the first sampled; behind its scales
    byte = written.path.read_bytes()[at]
    damage(written, at, bytes([byte ^ 1]))
    with pytest.raises(QualityError, match=rf"tensor {name}: rows 16 to 23 read back with relative error .* expected .* as encoded"):
        written.verify()


def drop_last_byte(written: Written) -> None:
    written.path.write_bytes(written.path.read_bytes()[:-1])


def truncate(written: Written) -> None:
    written.path.write_bytes(written.path.read_bytes()[:-2000])


def rename_tensor(written: Written) -> None:
    damage(written, written.layout.header.index(b"blk.0.attn_q") + 11, b"k")


def change_metadata(written: Written) -> None:
    damage(written, written.layout.header.index(b"llama"), b"gemma")


def empty(written: Written) -> None:
    written.path.write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_last_byte, "size of .*: got"),
        (truncate, r"does not read back: .*data of 'blk.*truncated"),
        (rename_tensor, r"tensor blk\.0\.attn_q\.weight in .*: got"),
        (change_metadata, "header of .*: got other metadata"),
        (empty, "does not read back"),
    ],
)
def test_other_structure_is_found(written: Written, spoil: Callable[[Written], None], message: str) -> None:
    """Catches a file that is sound GGUF, or nearly, but not the one that was planned."""
    spoil(written)
    with pytest.raises(QualityError, match=message) as caught:
        written.verify()
    assert "\n" not in str(caught.value)


# --- it speaks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("speak") / "tiny.gguf")


def test_speaks_in_a_child_as_it_would_here(tiny: Path) -> None:
    """Catches a child that loses the prompt, and positions that run apart after the prompt: one batch of all tokens must agree."""
    text = speak(tiny, "abc é", 6)
    assert text == verify.generate(tiny, "abc é", 6, 1) != ""
    with verify.Model(tiny) as model, verify.Context(model, 64, n_threads=1) as context:
        prompt = model.tokenize("abc é")
        said: list[int] = []
        while len(said) < 6 and model.eos not in said:
            said.append(int(context.decode(prompt + said)[-1].argmax()))
        assert text == b"".join(model.token_text(token) for token in said).decode("utf-8", "replace")


def test_split_file_speaks_by_links_to_its_parts(tiny: Path, tmp_path: Path) -> None:
    """Catches a child that resolves the link to a part and then looks for shards under the part's name."""
    file, data = read_gguf(tiny), tiny.read_bytes()
    payload = {info.name: np.frombuffer(data[info.offset :][: info.n_bytes], np.float32).reshape(info.shape) for info in file.tensors}
    names = list(payload)
    for number, chosen in enumerate((names[:4], names[4:])):
        keys = {
            "split.no": Value(ValueType.UINT16, number),
            "split.count": Value(ValueType.UINT16, 2),
            "split.tensors.count": Value(ValueType.INT32, len(names)),
        }
        part = tmp_path / f"part{number}"
        write_gguf(part, (dict(file.metadata) if number == 0 else {}) | keys, [(name, GgmlType.F32, payload[name]) for name in chosen])
        (tmp_path / f"tiny-{number + 1:05d}-of-00002.gguf").symlink_to(part)
    assert speak(tmp_path / "tiny-00001-of-00002.gguf", "abc", 3) == verify.generate(tiny, "abc", 3, 1)


def refusal(path: Path, **limits: float) -> str:
    with pytest.raises(QualityError) as caught:
        speak(path, "abc", 4, **limits)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


def test_file_that_does_not_load_is_refused(tiny: Path, tmp_path: Path) -> None:
    """Catches a truncated file passing, and the loader's reason being lost."""
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(tiny.read_bytes()[:-4096])
    message = refusal(cut)
    assert message.startswith("the written file cut.gguf does not run in llama.cpp")
    assert "data of " in message and "(truncated?)" in message


def test_logits_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    """Catches a model that loads and answers token 0 for ever because everything is NaN."""
    assert "got NaN or infinity" in refusal(write_tiny_llama(tmp_path / "broken.gguf", broken=True))


@pytest.mark.skipif("sys.platform != 'linux'", reason="RLIMIT_DATA bounds mapped memory on Linux only")
def test_memory_limit_holds(tiny: Path) -> None:
    """Catches a limit that is not set: 8 MiB are not enough even to load."""
    assert "with 8 MiB of memory" in refusal(tiny, memory_limit_bytes=8 << 20)


def test_time_limit_holds(tiny: Path) -> None:
    """Catches a child that hangs the whole run."""
    assert "got no answer in 0.01 s" in refusal(tiny, time_limit_seconds=0.01)


def test_module_in_the_current_folder_is_not_imported(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches code running from the folder the user happens to be in."""
    (tmp_path / "llama_cpp.py").write_text("raise SystemExit('hijacked')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert speak(tiny, "abc", 2) == verify.generate(tiny, "abc", 2, 1)
