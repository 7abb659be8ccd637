"""A Plan as a file: `plan.json`, which `quantize --plan` executes to the byte, and llama-quantize's `--tensor-type-file`.

The JSON is read strictly: every key known and of its kind, sizes recomputed, the hash as written. Whether a plan is of a
given model is a question of its own (`check_plan`). Encodes nothing and chooses nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from loopgguf.container import write_file
from loopgguf.documents import load_json
from loopgguf.errors import InputError, UsageError
from loopgguf.formats import FORMATS, GgmlType, fits_row, tensor_bytes
from loopgguf.planner import Plan, PlanRow
from loopgguf.source import Tensor
from loopgguf.speed import Speed

PLAN_FORMAT = "loopgguf plan 1"
_DOCUMENT_KEYS = {
    "format": str,
    "model": str,
    "intent": str,
    "file_type": int,
    "total_bytes": int,
    "imatrix_sha256": (str, type(None)),
    "hash": str,
    "speeds": dict,
    "rows": list,
}
_ROW_KEYS = {
    "name": str,
    "shape": list,
    "source_type": str,
    "type": str,
    "n_bytes": int,
    "reason": str,
    "fallback": str,
    "uses_imatrix": bool,
    "wanted": (str, type(None)),
    "estimated_error": (int, float, type(None)),
    "explanation": str,
}
_SPEED_KEYS = {"generation": (int, float), "prompt": (int, float)}
Importance = Callable[[str], NDArray[np.float32] | None]


@dataclass(frozen=True)
class SavedPlan:
    """A plan as it was written: of which model (a name, for messages), the file's exact bytes, and which imatrix it counts on.

    speeds: of its types on the machine that planned, where they were measured; for readers, nothing depends on them.
    """

    plan: Plan
    model: str
    total_bytes: int
    imatrix_sha256: str | None
    speeds: Mapping[GgmlType, Speed] = field(default_factory=dict)


def imatrix_digest(plan: Plan, importance: Importance) -> str | None:
    """Return a sha256 over the importances that the plan's rows are encoded with; None where no row uses any."""
    used = [row.name for row in plan.rows if row.uses_imatrix]
    digest = hashlib.sha256()
    for name in used:
        values = importance(name)
        assert values is not None, name
        digest.update(name.encode() + b"\0" + np.ascontiguousarray(values, np.float32).tobytes())
    return digest.hexdigest() if used else None


def _row_document(row: PlanRow) -> dict[str, object]:
    values = {key: getattr(row, key) for key in _ROW_KEYS}
    return {key: value.name if isinstance(value, GgmlType) else value for key, value in values.items()}


def save_plan(saved: SavedPlan, path: Path, *, overwrite: bool = False) -> None:
    """Write `plan.json`, a line per tensor. Raises OutputError when it exists or cannot be written."""
    plan = saved.plan
    head = {
        "format": PLAN_FORMAT,
        "model": saved.model,
        "intent": plan.intent,
        "file_type": plan.file_type,
        "total_bytes": saved.total_bytes,
        "imatrix_sha256": saved.imatrix_sha256,
        "hash": plan.hash,
        "speeds": {ggml_type.name: asdict(speed) for ggml_type, speed in saved.speeds.items()},
    }
    lines = [f" {json.dumps(key)}: {json.dumps(value)}," for key, value in head.items()]
    rows = ",\n".join("  " + json.dumps(_row_document(row)) for row in plan.rows)
    write_file(path, "\n".join(["{", *lines, ' "rows": [', rows, " ]", "}", ""]).encode(), overwrite=overwrite)


def save_tensor_types(plan: Plan, path: Path, *, overwrite: bool = False) -> None:
    """Write the plan's quantized tensors as llama-quantize's `--tensor-type-file`: one anchored `regex=type` a line.

    Tensors that llama-quantize never quantizes are left out. Raises OutputError when it exists or cannot be written.
    """
    lines = [f"^{re.escape(row.name)}$={row.type.name.lower()}\n" for row in plan.rows if not row.reason.startswith("kept: ")]
    write_file(path, "".join(lines).encode(), overwrite=overwrite)


# --- reading ----------------------------------------------------------------------------------------------------------


def _refuse(where: str, got: object, expected: str) -> NoReturn:
    raise InputError(f"{where}: got {got!r:.120}, expected {expected}. Make the plan again with `loopgguf plan`")


def _checked(data: object, keys: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return the mapping if it has exactly these keys with values of these kinds."""
    if not isinstance(data, dict):
        _refuse(where, data, "a mapping")
    if data.keys() != keys.keys():
        wrong = sorted(data.keys() ^ keys.keys())
        _refuse(f"keys of {where}", wrong[0], f"exactly {', '.join(keys)}")
    for key, kind in keys.items():
        is_flag = isinstance(data[key], bool)
        if not isinstance(data[key], kind) or (is_flag and kind is not bool):
            kinds = kind if isinstance(kind, tuple) else (kind,)
            _refuse(f"{key} in {where}", data[key], " or ".join("null" if k is type(None) else k.__name__ for k in kinds))
    return data


def _type(name: str, where: str) -> GgmlType:
    if name not in GgmlType.__members__:
        _refuse(where, name, "the name of a ggml type")
    return GgmlType[name]


def _parse_row(data: object, where: str) -> PlanRow:
    values = _checked(data, _ROW_KEYS, where)
    where = f"{where} ({values['name']!r:.80})"
    shape = values["shape"]
    if not 1 <= len(shape) <= 4 or not all(isinstance(n, int) and not isinstance(n, bool) and 0 < n < 2**40 for n in shape):
        _refuse(f"shape in {where}", shape, "one to four positive sizes")
    ggml_type = _type(values["type"], f"type in {where}")
    if not fits_row(ggml_type, shape[-1]):
        _refuse(f"type in {where}", ggml_type.name, f"one whose blocks fit rows of {shape[-1]}, not of {FORMATS[ggml_type].block}")
    if values["n_bytes"] != tensor_bytes(ggml_type, shape):
        _refuse(f"n_bytes in {where}", values["n_bytes"], str(tensor_bytes(ggml_type, shape)))
    estimate = values["estimated_error"]
    if estimate is not None and not math.isfinite(estimate):
        _refuse(f"estimated_error in {where}", estimate, "a finite number")
    wanted = values["wanted"]
    types = {
        "type": ggml_type,
        "source_type": _type(values["source_type"], f"source_type in {where}"),
        "wanted": None if wanted is None else _type(wanted, f"wanted in {where}"),
    }
    return PlanRow(**{**values, **types, "shape": tuple(shape)})


def _parse_speed(data: object, where: str) -> Speed:
    values = _checked(data, _SPEED_KEYS, where)
    if not all(0 < value < math.inf for value in values.values()):
        _refuse(where, values, "numbers above 0")
    return Speed(**values)


def load_plan(path: Path) -> SavedPlan:
    """Return the plan in `path`. Raises InputError naming the key for anything unknown, missing, of another kind, or changed."""
    data = load_json(path)
    if isinstance(data, dict):
        data.setdefault("speeds", {})  # which older plans do not have
    values = _checked(data, _DOCUMENT_KEYS, str(path))
    if values["format"] != PLAN_FORMAT:
        _refuse(f"format in {path}", values["format"], repr(PLAN_FORMAT))
    rows = tuple(_parse_row(row, f"row {i} of {path}") for i, row in enumerate(values["rows"], 1))
    if not 0 <= values["file_type"] < 2**32:
        _refuse(f"file_type in {path}", values["file_type"], "a number of 32 bits")
    plan = Plan(values["intent"], values["file_type"], rows)
    if plan.hash != values["hash"]:
        _refuse(f"hash in {path}", values["hash"], f"{plan.hash}, that of its rows (edited by hand? use --tensor-type instead)")
    speeds = {_type(name, f"speeds in {path}"): _parse_speed(speed, f"speed of {name:.80} in {path}") for name, speed in values["speeds"].items()}
    return SavedPlan(plan, values["model"], values["total_bytes"], values["imatrix_sha256"], speeds)


def check_plan(saved: SavedPlan, tensors: Sequence[Tensor], model: str) -> None:
    """Raise UsageError naming the first tensor in which the plan and the model differ."""
    planned = [(row.name, row.shape, row.source_type) for row in saved.plan.rows]
    found = [(tensor.name, tensor.shape, tensor.type) for tensor in tensors]
    if planned == found:
        return
    at = next((i for i, (a, b) in enumerate(zip(planned, found, strict=False)) if a != b), min(len(planned), len(found)))

    def show(items: Sequence[tuple[str, tuple[int, ...], GgmlType]]) -> str:
        return "no tensor" if at >= len(items) else f"{items[at][0]} ({'×'.join(map(str, items[at][1]))} {items[at][2].name})"

    raise UsageError(f"the plan is of another model, {saved.model}: its tensor {at + 1} is {show(planned)}, that of {model} is {show(found)}. Plan this model")
