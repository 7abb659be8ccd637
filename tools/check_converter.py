"""Compares `loopgguf convert` of the real model with llama.cpp's own converter: every key both write, every tensor byte.

    python tools/check_converter.py                             # against the digests kept in tests/golden
    python tools/check_converter.py LLAMA_CPP_FOLDER [--write]  # against the converter itself; --write keeps its digests

LLAMA_CPP_FOLDER: llama.cpp's source tree, for example `vendor/llama.cpp` of the llama-cpp-python source distribution
(`pip download --no-binary :all: --no-deps llama-cpp-python==0.3.36`): the converter is in no wheel. Its code runs in a
process of its own. Exit code 1 when anything differs.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import models

from loopgguf.container import Value, read_gguf
from loopgguf.workflow import convert

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden" / "converter.json"
NAMES = ("smollm2", "smollm2-wide")
OURS_ONLY = {"general.quantized_by", "loopgguf.intent", "loopgguf.plan_hash", "loopgguf.version"}
MAX_CHARACTERS = 200  # of a value that is kept as it is

Digest = dict[str, dict[str, Any]]


def digest_value(value: Value) -> list[object]:
    """Return a metadata value's type, its items' type, and the value itself or, when it is long, its sha256."""
    text = json.dumps(value.data, ensure_ascii=True)
    short = value.data if len(text) <= MAX_CHARACTERS else f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"
    return [value.type.name, value.item_type.name if value.item_type is not None else None, short]


def digest_file(path: Path) -> Digest:
    """Return what must be equal of two conversions: metadata by key; type, shape and sha256 of each tensor by name."""
    gguf, tensors = read_gguf(path), {}
    with path.open("rb") as stream:
        for info in gguf.tensors:
            stream.seek(info.offset)
            tensors[info.name] = [info.type.name, list(info.shape), hashlib.sha256(stream.read(info.n_bytes)).hexdigest()]
    return {"metadata": {key: digest_value(value) for key, value in gguf.metadata.items()}, "tensors": tensors}


def differences(ours: Digest, theirs: Digest) -> list[str]:
    """Return a line for each key and tensor that is not the same in both, but for the keys that only we are meant to write."""
    lines = []
    for kind in ("metadata", "tensors"):
        a, b = ours[kind], theirs[kind]
        for name in sorted((a.keys() | b.keys()) - OURS_ONLY):
            if a.get(name) != b.get(name):
                lines.append(f"{kind} {name}: got {a.get(name, 'nothing')}, llama.cpp writes {b.get(name, 'nothing')}")
    return lines


def digest_ours(model: Path, folder: Path) -> Digest:
    """Return the digest of what `loopgguf convert` writes, through `folder`."""
    target = folder / "ours.gguf"
    convert(model, target, "bf16")
    return digest_file(target)


def digest_upstream(model: Path, llama_cpp: Path, folder: Path) -> Digest:
    """Return the digest of what llama.cpp's converter writes, through `folder`."""
    target = folder / "theirs.gguf"
    command = [sys.executable, str(llama_cpp / "convert_hf_to_gguf.py"), str(model), "--outfile", str(target), "--outtype", "bf16"]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode != 0:
        raise SystemExit(f"{' '.join(command)}: exit code {done.returncode}\n{done.stderr[-2000:]}")
    return digest_file(target)


def read_golden() -> dict[str, Digest]:
    """Return the digests of llama.cpp's conversions, by the model's name."""
    golden: dict[str, Digest] = json.loads(GOLDEN.read_text(encoding="utf-8"))
    return golden


def write_golden(digests: Mapping[str, Digest]) -> None:
    """Keep the digests, a line per key and tensor."""
    blocks = []
    for name, digest in digests.items():
        kinds = []
        for kind, entries in digest.items():
            lines = ",\n".join(f"   {json.dumps(key)}: {json.dumps(entry)}" for key, entry in entries.items())
            kinds.append(f"  {json.dumps(kind)}: {{\n{lines}\n  }}")
        blocks.append(f" {json.dumps(name)}: {{\n" + ",\n".join(kinds) + "\n }")
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("llama_cpp", nargs="?", type=Path, metavar="LLAMA_CPP_FOLDER")
    parser.add_argument("--write", action="store_true", help="keep the converter's digests in tests/golden")
    options = parser.parse_args()
    if options.write and options.llama_cpp is None:
        parser.error("--write needs LLAMA_CPP_FOLDER")
    theirs, n_wrong = {} if options.llama_cpp else read_golden(), 0
    for name in NAMES:
        with tempfile.TemporaryDirectory(prefix="loopgguf-") as scratch:
            model = models.resolve_model(name)
            if options.llama_cpp:
                theirs[name] = digest_upstream(model, options.llama_cpp, Path(scratch))
            found = differences(digest_ours(model, Path(scratch)), theirs[name])
        print(f"{name}: {len(theirs[name]['metadata'])} keys, {len(theirs[name]['tensors'])} tensors, {len(found)} differ")
        print("".join(f"  {line}\n" for line in found), end="")
        n_wrong += len(found)
    if options.write:
        write_golden(theirs)
    return min(1, n_wrong)


if __name__ == "__main__":
    sys.exit(main())
