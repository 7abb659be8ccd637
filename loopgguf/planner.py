"""(tensors, statistics, intent) → Plan. STUB: dataclasses only for now."""

from __future__ import annotations

from dataclasses import dataclass

from loopgguf.container import Shape
from loopgguf.formats import GgmlType


@dataclass(frozen=True)
class PlanRow:
    """What becomes of one tensor. `reason`: the rule that chose the type; `fallback`: why not the chosen one, or ''."""

    name: str
    shape: Shape
    source_type: GgmlType
    type: GgmlType
    n_bytes: int
    reason: str
    fallback: str = ""
    uses_imatrix: bool = False


@dataclass(frozen=True)
class Plan:
    """One row per tensor in file order, the intent it came from, and the value of `general.file_type`."""

    intent: str  # "profile balanced" or "preset Q4_K_M"
    file_type: int
    rows: tuple[PlanRow, ...]

    @property
    def tensor_bytes(self) -> int:
        return sum(row.n_bytes for row in self.rows)
