"""The README's table of errors is what users meet: every row is produced here, and its line and exit code are compared."""

from __future__ import annotations

import errno
import json
import os
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from command_line import Place, Run
from tiny_llama import write_tiny_llama

from loopgguf import errors
from loopgguf.accumulators import Columns
from loopgguf.container import read_gguf, uint32, write_gguf
from loopgguf.safetensor import INDEX_NAME
from loopgguf.statistics import Statistics, save_imatrix

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `error: (.+?)` \| (\d+) \|", README, re.MULTILINE)
LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n"


Case = Callable[[Place], list[object]]
Q4_0 = ("--quant-type", "Q4_0", "--no-imatrix", "-o", "x.gguf")


def _quantize(model: object, *options: object) -> list[object]:
    return ["quantize", model, *(options or Q4_0)]


def _without(name: str) -> Case:
    def case(place: Place) -> list[object]:
        (place.model / name).unlink()
        return ["convert", place.model]

    return case


def _pickle(place: Place) -> list[object]:
    (place.model / "model.safetensors").rename(place.model / "pytorch_model.bin")
    return ["convert", place.model]


def _lfs_pointer(place: Place) -> list[object]:
    (place.model / "tokenizer.json").write_text(LFS_POINTER, encoding="utf-8")
    return ["convert", place.model]


def _link(place: Place) -> list[object]:
    secret = place.write("secret.txt", "my key")
    (place.model / "chat_template.jinja").symlink_to(secret)
    return ["convert", place.model]


def _index(place: Place) -> list[object]:
    (place.model / INDEX_NAME).write_text(json.dumps({"weight_map": {"a": "../a.safetensors"}}), encoding="utf-8")
    return ["convert", place.model]


def _truncated_shard(place: Place) -> list[object]:
    path = place.model / "model.safetensors"
    os.truncate(path, path.stat().st_size - 1)
    return ["convert", place.model]


def _pre_tokenizer(place: Place) -> list[object]:
    path = place.model / "tokenizer.json"
    parsed = json.loads(path.read_text(encoding="utf-8"))
    parsed["pre_tokenizer"]["pretokenizers"][0]["pattern"] = {"Regex": "[a-m]+"}
    path.write_text(json.dumps(parsed), encoding="utf-8")
    return ["convert", place.model]


def _removed_type(place: Place) -> list[object]:
    raw = place.gguf.read_bytes()
    name = b"blk.0.attn_q.weight"
    return _quantize(place.patch(raw.index(name) + len(name) + 4 + 2 * 8, struct.pack("<I", 31)))


def _truncated_gguf(place: Place) -> list[object]:
    os.truncate(place.gguf, place.gguf.stat().st_size - 100)
    return _quantize(place.gguf)


def _requantize(place: Place) -> list[object]:
    place.run(*_quantize(place.gguf, "--quant-type", "Q8_0", "--no-imatrix", "-o", place.scratch / "q8.gguf"))
    return _quantize(place.scratch / "q8.gguf")


def _imatrix(place: Place, name: str, value: float) -> Path:
    path = place.scratch / "a.imatrix.gguf"
    columns = Columns(np.full((1, 32), value, np.float32), np.array([512]))
    save_imatrix(Statistics({name: columns}, ("a.txt",), 1, 512), path)
    return path


def _with_imatrix(place: Place, path: Path, quant_type: str = "Q4_0") -> list[object]:
    return _quantize(place.gguf, "--quant-type", quant_type, "--imatrix", path, "-o", "x.gguf")


def _weight(place: Place, value: float, quant_type: str) -> list[object]:
    place.patch(place.tensor().offset, struct.pack("<f", value))
    return _quantize(place.gguf, "--quant-type", quant_type, "--no-imatrix", "-o", "x.gguf")


def _profile(place: Place) -> list[object]:
    return _quantize(place.gguf, "--profile", place.write("mine.yaml", "default: Q4_K\nrulez: []"), "--no-imatrix")


def _edited_plan(place: Place) -> list[object]:
    path = place.scratch / "plan.json"
    place.run("plan", place.gguf, "--quant-type", "Q4_0", "--no-imatrix", "-o", path)
    path.write_text(path.read_text(encoding="utf-8").replace("preset Q4_0", "preset Q4_1"), encoding="utf-8")
    return _quantize(place.gguf, "--plan", path)


def _text(name: str, content: str | bytes) -> Case:
    return lambda place: ["imatrix", place.gguf, "-f", place.write(name, content)]


def _template(place: Place) -> list[object]:
    (place.model / "chat_template.jinja").write_text("{{ cycler.__init__ }}", encoding="utf-8")
    return ["imatrix", place.model, "-f", place.write("a.jsonl", json.dumps({"messages": [{"role": "user", "content": "Hi"}]}))]


def _existing(place: Place) -> list[object]:
    return _quantize(place.gguf, *Q4_0[:-1], place.write("x.bin", "precious"))


def _full_disk(place: Place) -> list[object]:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    place.monkeypatch.setattr(os, "posix_fallocate", full)
    return _quantize(place.gguf)


def _damaged(place: Place) -> list[object]:
    place.patch(place.tensor().offset, struct.pack("<f", float("nan")))
    return ["verify", place.gguf]


# by the beginning of the row's line, as far as it is the same for all models
CASES: dict[str, Case] = {
    "no model at": lambda place: _quantize(place.scratch / "nowhere"),
    "no config.json in": _without("config.json"),
    "unknown architecture in config.json: got": lambda place: ["convert", place.edit_config(architectures=["StarshipForCausalLM"])],
    "quantization_config in config.json": lambda place: [
        "convert",
        place.edit_config(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}),
    ],
    "… has its weights only as pickle": _pickle,
    "--trust-remote-code": lambda place: ["convert", place.model, "--trust_remote_code"],
    "… is a git-lfs pointer": _lfs_pointer,
    "… is a link to": _link,
    "missing tensor": lambda place: ["convert", place.edit_config(num_hidden_layers=99)],
    "missing shard": lambda place: _quantize(_first_of_two(place)),
    "shard of": _index,
    "malformed safetensors": _truncated_shard,
    "no tokenizer in": _without("tokenizer.json"),
    "unknown pre-tokenizer in": _pre_tokenizer,
    "malformed GGUF: magic": lambda place: _quantize(place.patch(0, b"<!do")),
    "malformed GGUF: version": lambda place: _quantize(place.patch(4, struct.pack(">I", 3))),
    "malformed GGUF: type of tensor": _removed_type,
    "malformed GGUF: data of": _truncated_gguf,
    "the source is already quantized": _requantize,
    "imatrix of another model": lambda place: _with_imatrix(place, _imatrix(place, "blk.7.attn_q.weight", 1)),
    "malformed imatrix": lambda place: _with_imatrix(place, place.write("a.imatrix.dat", b"\1\0\0\0\xff\xff\xff\xff")),
    "sums of squares of": lambda place: _with_imatrix(place, _imatrix(place, "blk.0.attn_q.weight", float("nan"))),
    "… cannot be encoded without imatrix data": lambda place: _quantize(place.model, "--quant-type", "IQ2_XXS", "--no-imatrix"),
    "tensor … holds NaN": lambda place: _weight(place, float("nan"), "Q4_0"),
    "tensor … holds a value beyond": lambda place: _weight(place, 1e5, "F16"),
    "size: got": lambda place: _quantize(place.gguf, "--size", "1kB", "--no-imatrix"),
    "--tensor-type": lambda place: _quantize(place.gguf, *Q4_0, "--tensor-type", "starship=Q8_0"),
    "unknown quantization preset": lambda place: _quantize(place.gguf, "--quant-type", "Q9_X"),
    "unknown profile": lambda place: _quantize(place.gguf, "--profile", "balancd"),
    "unknown key in": _profile,
    "hash in": _edited_plan,
    "calibration text": _text("a.txt", "  \n"),
    "encoding of": _text("a.txt", b"caf\xe9"),
    "bad row in": _text("a.jsonl", '{"text": 7}\n'),
    "chat template of": _template,
    "output … already exists": _existing,
    "output … is the input": lambda place: _quantize(place.gguf, *Q4_0[:-1], place.gguf, "--overwrite"),
    "cannot create": lambda place: _quantize(place.gguf, *Q4_0[:-1], place.write("file", "not a folder") / "x.gguf"),
    "cannot reserve space for": _full_disk,
    "tensor …: got a NaN": _damaged,
}


def _first_of_two(place: Place) -> Path:
    path = place.scratch / "tiny-00001-of-00002.gguf"
    metadata = read_gguf(place.gguf).metadata
    write_gguf(path, {**metadata, "split.no": uint32(0), "split.count": uint32(2), "split.tensors.count": uint32(1)}, [])
    return path


def test_the_table_and_the_cases_are_the_same_list() -> None:
    """A row that nobody has seen happen, or a case that users are not told of."""
    assert len(ROWS) == len(CASES) >= 30
    for line, _ in ROWS:
        assert [beginning for beginning in CASES if line.startswith(beginning)], line


@pytest.mark.parametrize(("line", "code"), ROWS, ids=[line for line, _ in ROWS])
def test_every_row_happens(run: Run, broken_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, code: str) -> None:
    """A line that the README promises and no command prints, another exit code, an output that is left behind."""
    case = CASES[max((beginning for beginning in CASES if line.startswith(beginning)), key=len)]
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    place = Place(broken_model, write_tiny_llama(scratch / "tiny.gguf"), scratch, run, monkeypatch)
    done = run(*case(place))
    assert done.code == int(code), done.err
    pattern = ".*".join(re.escape(part) for part in f"error: {line}".split("…"))
    assert re.match(pattern, done.error), (pattern, done.error)
    assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize("text", ["a\nb", "a\rb", "\x1b[31mred", "half \ud800", "nul \0", "tab\t", "right-to-left \u202e"])
def test_a_message_is_one_printable_line(text: str) -> None:
    """A file name or a key that breaks the line in two, or that moves the cursor of the terminal it is printed on."""
    message = str(errors.InputError(f"got {text}, expected é 漢字"))
    assert message.isprintable() and message.endswith("expected é 漢字")
