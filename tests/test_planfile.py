"""plan.json: what is written is read back; everything changed, missing or unknown is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from loopgguf.errors import InputError, OutputError, UsageError
from loopgguf.formats import GgmlType, tensor_bytes
from loopgguf.planfile import SavedPlan, check_plan, imatrix_digest, load_plan, save_plan, save_tensor_types
from loopgguf.planner import Plan, PlanRow, parse_overrides
from loopgguf.source import Tensor
from loopgguf.speed import Speed

T = GgmlType


def row(name: str, shape: tuple[int, ...], ggml_type: GgmlType, **more: object) -> PlanRow:
    return PlanRow(name, shape, T.BF16, ggml_type, tensor_bytes(ggml_type, shape), "size", **more)


ROWS = (
    row("token_embd.weight", (8, 256), T.Q6_K, estimated_error=0.25, explanation="Q8_0: +1 bytes, -0.1 nats"),
    replace(row("blk.0.attn_norm.weight", (256,), T.F32), reason="kept: one-dimensional"),
    row("blk.0.ffn_down.weight", (256, 96), T.Q4_0, wanted=T.Q3_K, fallback="rows of 96", uses_imatrix=True),
)
SAVED = SavedPlan(Plan("size 123 bytes", 15, ROWS), "demo", 4711, None, {T.Q4_0: Speed(2e9, 5e9)})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    save_plan(SAVED, tmp_path / "plan.json")
    return tmp_path / "plan.json"


def test_a_plan_survives_the_file(path: Path) -> None:
    """Would catch a field that is not written, or not read back as it was."""
    assert load_plan(path) == SAVED
    assert len(path.read_text(encoding="utf-8").splitlines()) == len(ROWS) + 12  # a line per tensor: diffs are readable


def test_a_plan_without_speeds_is_read(path: Path) -> None:
    """Catches plans refused that were made before speeds were measured: nothing depends on them."""
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text(encoding="utf-8")).items() if key != "speeds"}), encoding="utf-8")
    assert load_plan(path) == replace(SAVED, speeds={})


@pytest.mark.parametrize(
    ("keys", "value", "message"),
    [
        (("format",), "loopgguf plan 2", "format in .*loopgguf plan 1"),
        (("file_type",), True, "file_type in .*True"),
        (("file_type",), -1, "file_type in .*-1"),
        (("hash",), "00", "hash in .*edited by hand"),
        (("intent",), "preset Q4_0", "hash in"),
        (("extra",), 1, "keys of .*extra"),
        (("speeds", "Q4_X"), {"generation": 1, "prompt": 1}, "speeds in .*Q4_X"),
        (("speeds", "Q4_0"), {"generation": 1}, "keys of speed of Q4_0 .*prompt"),
        (("speeds", "Q4_0", "prompt"), 0, "speed of Q4_0 .*above 0"),
        (("rows",), {}, "rows in"),
        (("rows", 0), [], "row 1 of .*mapping"),
        (("rows", 1, "name"), 5, "name in row 2"),
        (("rows", 0, "type"), "Q6_X", r"type in row 1 .*token_embd\.weight.*Q6_X"),
        (("rows", 0, "type"), "Q5_K", "n_bytes in row 1"),
        (("rows", 2, "type"), "Q4_K", "type in row 3 .*rows of 96"),
        (("rows", 0, "shape"), [8, -256], "shape in row 1"),
        (("rows", 0, "shape"), [], "shape in row 1"),
        (("rows", 0, "n_bytes"), 1.5, "n_bytes in row 1"),
        (("rows", 0, "uses_imatrix"), 1, "uses_imatrix in row 1"),
        (("rows", 0, "estimated_error"), float("nan"), "estimated_error in row 1"),
        (("rows", 0, "surprise"), 1, "keys of row 1 .*surprise"),
    ],
)
def test_what_was_changed_is_named(path: Path, keys: tuple[str | int, ...], value: object, message: str) -> None:
    """Would catch a plan executed although somebody or something changed it."""
    document = json.loads(path.read_text(encoding="utf-8"))
    at = document
    for key in keys[:-1]:
        at = at[key]
    at[keys[-1]] = value
    path.write_text(json.dumps(document), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        load_plan(path)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"rows": 1, "rows": 2}', '{"format": "loopgguf plan 1"}'])
def test_what_is_no_plan_is_refused(path: Path, text: str) -> None:
    """Would catch a traceback for a file that is something else."""
    path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"plan\.json"):
        load_plan(path)


def tensors() -> list[Tensor]:
    return [Tensor(r.name, r.shape, r.source_type, lambda start, stop: np.empty(0, np.uint8)) for r in ROWS]


def test_a_plan_of_another_model_is_refused_at_the_first_difference() -> None:
    """Would catch bytes written under the plan of a sister model of equal names."""
    check_plan(SAVED, tensors(), "demo")
    changed = tensors()
    changed[2] = replace(changed[2], shape=(256, 128))
    with pytest.raises(UsageError, match=r"of another model, demo: its tensor 3 is blk\.0\.ffn_down\.weight \(256×96 BF16\), that of other is .*256×128"):
        check_plan(SAVED, changed, "other")
    with pytest.raises(UsageError, match=r"its tensor 3 is .* is no tensor"):
        check_plan(SAVED, tensors()[:2], "other")
    with pytest.raises(UsageError, match="is no tensor, that of other is extra"):
        check_plan(SAVED, [*tensors(), replace(changed[0], name="extra")], "other")


def test_the_imatrix_is_told_apart_by_what_is_used_of_it() -> None:
    """Would catch a plan executed under other importances, which makes other bytes."""
    ones, twos = np.ones((1, 96), np.float32), np.full((1, 96), 2, np.float32)
    assert imatrix_digest(SAVED.plan, lambda name: ones) != imatrix_digest(SAVED.plan, lambda name: twos)
    assert imatrix_digest(replace(SAVED.plan, rows=ROWS[:2]), lambda name: None) is None


def test_tensor_types_are_what_llama_quantize_reads(tmp_path: Path) -> None:
    """Would catch an unescaped dot or a missing anchor: `blk.1` would take `blk.11` along."""
    save_tensor_types(SAVED.plan, tmp_path / "types.txt")
    lines = (tmp_path / "types.txt").read_text(encoding="utf-8").split()
    assert lines == [r"^token_embd\.weight$=q6_k", r"^blk\.0\.ffn_down\.weight$=q4_0"]
    assert [o.type for o in parse_overrides(lines)] == [T.Q6_K, T.Q4_0]
    with pytest.raises(OutputError, match="already exists"):
        save_tensor_types(SAVED.plan, tmp_path / "types.txt")
    with pytest.raises(OutputError, match="cannot create"):
        save_plan(SAVED, tmp_path / "types.txt" / "plan.json")
