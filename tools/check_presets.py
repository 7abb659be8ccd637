"""Compares the presets' per-tensor types with the snapshots of llama.cpp's own test, model by model.

    python tools/check_presets.py LLAMA_CPP_FOLDER

LLAMA_CPP_FOLDER: llama.cpp's source tree, for example `vendor/llama.cpp` of the llama-cpp-python source distribution
(`pip download --no-binary :all: --no-deps llama-cpp-python==0.3.36`). The snapshots (`tests/snapshots/*.schema`) name
tensors and types but no shapes; what matters of a shape is whether its rows divide into blocks and whether it is a
stack of matrices, which is derived here. Exit code 1 when anything differs.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path

from loopgguf.architectures import tensor_order, tensor_role
from loopgguf.formats import fallback_type, parse_type
from loopgguf.presets import ModelFacts, choose_types, find_preset

# rows that are no multiple of 256, by snapshot and role; all others are
NARROW_ROWS: dict[str, dict[str, int]] = {
    "deepseek-v3.1": {"attn_k_b": 128},
    "glm-4.6v": {"ffn_down": 10944, "ffn_down_exps": 1408, "ffn_down_shexp": 1408},
    "gpt-oss-120b": dict.fromkeys(("token_embd", "output", "attn_q", "attn_k", "attn_v", "ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"), 2880),
    "nvidia-nemotron-3-nano-30b-a3b": {
        **dict.fromkeys(("token_embd", "output", "attn_q", "attn_k", "attn_v", "ssm_in", "ffn_up_exps", "ffn_up_shexp"), 2688),
        "ffn_down_exps": 1856,
        "ffn_down_shexp": 3712,
    },
}
STACKED = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps", "attn_k_b", "attn_v_b")


def read_snapshot(path: Path) -> tuple[ModelFacts, dict[str, tuple[str, dict[str, str]]]]:
    """Return the model's facts and, by preset, its default type and the tensors that differ from it."""
    text = path.read_text(encoding="utf-8")
    numbers = {key: int(n) for key, n in re.findall(r"(n_\w+)=(\d+)", text)}
    facts = ModelFacts("llama" if "llama" in path.stem else "other", numbers["n_layer"], numbers["n_head"], numbers["n_head_kv"], numbers.get("n_expert", 0))
    sections: dict[str, tuple[str, dict[str, str]]] = {}
    for line in text.splitlines():
        if match := re.fullmatch(r"\[(\w+)\] (\w+)", line):
            sections[match[1]] = (match[2], {})
            current = sections[match[1]][1]
        elif line and not line.startswith("#"):
            name, ggml_type = line.rsplit(" ", 1)
            current[name] = ggml_type
    return facts, sections


def shape_of(name: str, narrow: Mapping[str, int]) -> tuple[int, ...]:
    kind = tensor_role(name).kind
    matrix = (1024, narrow.get(kind, 4096))
    return (4, *matrix) if kind in STACKED else matrix


def check(path: Path) -> int:
    """Print the differences of one snapshot and return their number."""
    facts, sections = read_snapshot(path)
    names = sorted({name for _, overrides in sections.values() for name in overrides}, key=tensor_order)
    tensors = [(name, shape_of(name, NARROW_ROWS.get(path.stem, {}))) for name in names]
    n_wrong = 0
    for section, (default, overrides) in sections.items():
        chosen = choose_types(facts, find_preset(section), tensors, has_imatrix=False)
        for name, shape in tensors:
            expected = parse_type(overrides.get(name, default))
            got = chosen[name] if find_preset(section).is_float else fallback_type(chosen[name], shape[-1])
            if got is not expected:
                n_wrong += 1
                print(f"  {section} {name}: got {got.name}, expected {expected.name}")
    print(f"{path.stem}: {len(sections)} presets x {len(names)} tensors, {n_wrong} differ")
    return n_wrong


def main(arguments: list[str]) -> int:
    if len(arguments) != 1 or not (snapshots := sorted(Path(arguments[0], "tests", "snapshots").glob("*.schema"))):
        print(__doc__)
        return 2
    return min(1, sum(check(path) for path in snapshots))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
