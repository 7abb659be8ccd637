"""Writes the blocks of README.md that are generated, never typed: what commands print, and the quality tables.

    python tools/readme.py [NAME…]     # write these blocks anew (default: all; the real model's tables take many minutes)
    python tools/readme.py --check     # only check that each block is well formed and can be generated

A block lies between `<!-- begin:NAME -->` and `<!-- end:NAME -->`, each alone on its line; NAME is a key of GENERATORS.
What a block says is what the named commands print on this machine, with whatever they measure.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DEMO_MODEL = ROOT / "tests" / "models" / "demo-llama"
MARKER = re.compile(r"^<!-- (begin|end):([\w-]+) -->$", re.MULTILINE)

QUICKSTART = (
    "loopgguf imatrix demo-llama",
    "loopgguf quantize demo-llama --imatrix demo-llama.imatrix.gguf -o demo-llama-balanced.gguf",
    "loopgguf evaluate demo-llama-balanced.gguf --reference demo-llama",
    "loopgguf inspect demo-llama-balanced.gguf",
)
FOUR_BITS = "--types Q3_K_M,IQ4_NL,Q4_0,Q4_K_M,Q5_K_M --profiles balanced,attention-high"
TWO_BITS = "--types IQ2_M,Q2_K,IQ3_XXS --profiles compression-max"
DEMO_TABLE = "--types IQ2_M,Q2_K,IQ3_XXS,Q3_K_M,IQ4_NL,Q4_0,Q4_K_M,Q5_K_M --profiles singular-bit,compression-max,balanced,cpu-fast,attention-high,quality"


def output_of(command: list[str], **options: object) -> str:
    """Return what a command prints, without spaces at line ends; end the program with its error when it fails."""
    done = subprocess.run(command, stdout=subprocess.PIPE, encoding="utf-8", check=False, **options)  # type: ignore[call-overload]
    if done.returncode != 0:
        sys.exit(f"{shlex.join(command)}: exit code {done.returncode}")
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def quickstart() -> str:
    """Return the main commands as a user types them, with what they print, run in an empty folder with an empty cache."""
    blocks = []
    with tempfile.TemporaryDirectory(prefix="loopgguf-readme-") as name:
        folder = Path(name)
        (folder / "demo-llama").symlink_to(DEMO_MODEL)
        environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)}
        for line in QUICKSTART:
            command = [sys.executable, "-m", "loopgguf.cli", *shlex.split(line)[1:]]
            blocks.append(f"$ {line}\n{output_of(command, cwd=folder, env=environment)}")
    *shown, inspected = blocks
    text = "\n\n".join(shown)
    return f"```console\n{text}\n```\n\n<details><summary>loopgguf inspect</summary>\n\n```console\n{inspected}\n```\n\n</details>"


def quality(*arguments: str) -> str:
    """Return the tables of one or more runs of the quality benchmark, with the commands that made them."""
    blocks = []
    for line in arguments:
        blocks.append(output_of([sys.executable, str(ROOT / "tools" / "bench_quality.py"), *shlex.split(line), "--markdown"]))
        blocks.append(f"Made by `python tools/bench_quality.py {line} --markdown`.")
    return "\n\n".join(blocks)


GENERATORS: dict[str, Callable[[], str]] = {
    "quickstart": quickstart,
    "quality-demo": lambda: quality(f"--model demo {DEMO_TABLE}"),
    "quality-smollm2": lambda: quality(f"--model smollm2 {FOUR_BITS}"),
    "quality-smollm2-wide": lambda: quality(f"--model smollm2-wide {TWO_BITS}"),
}


def find_blocks(text: str) -> dict[str, tuple[int, int]]:
    """Return where the content of each block begins and ends, by name; end the program at a marker that is out of place."""
    blocks: dict[str, tuple[int, int]] = {}
    begun: re.Match[str] | None = None
    for marker in MARKER.finditer(text):
        kind, name = marker.groups()
        is_expected = name not in blocks if kind == "begin" and begun is None else kind == "end" and begun is not None and begun[2] == name
        if name not in GENERATORS:
            sys.exit(f"block {name} in {README.name}: got an unknown name, expected one of {', '.join(GENERATORS)}")
        if not is_expected:
            sys.exit(f"marker {marker[0]} in {README.name}: expected each block once, begun and then ended, none inside another")
        if begun is not None:
            blocks[name] = (begun.end(), marker.start())
        begun = marker if kind == "begin" else None
    if begun is not None:
        sys.exit(f"marker {begun[0]} in {README.name}: got no end, expected <!-- end:{begun[2]} --> after it")
    return blocks


def replace_block(text: str, name: str, content: str) -> str:
    start, end = find_blocks(text)[name]
    return f"{text[:start]}\n{content}\n{text[end:]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(GENERATORS)} (default: all that the README has)")
    parser.add_argument("--check", action="store_true", help="change nothing; only check the markers")
    options = parser.parse_args()
    blocks = find_blocks(README.read_text(encoding="utf-8"))
    if missing := set(options.names) - blocks.keys():
        sys.exit(f"{README.name} has no block {', '.join(sorted(missing))}: got {', '.join(blocks) or 'none'}")
    for name in [] if options.check else options.names or blocks:
        content = GENERATORS[name]()  # the README is read again afterwards: someone may edit it meanwhile
        README.write_text(replace_block(README.read_text(encoding="utf-8"), name, content), encoding="utf-8")
        print(f"{README.name}: {name}, {len(content.splitlines())} lines")


if __name__ == "__main__":
    main()
