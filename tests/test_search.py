"""A plan made better by measuring: swaps are judged on chunks they have not seen, and the first plan stays where nothing is certain."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from tiny_llama import write_tiny_llama

from loopgguf import search
from loopgguf.architectures import tensor_role
from loopgguf.container import read_gguf
from loopgguf.errors import UsageError
from loopgguf.errortable import Basis, ErrorRow, ErrorTable, TypeDamage
from loopgguf.evaluation import Measure
from loopgguf.formats import GgmlType
from loopgguf.importance import ImatrixRequest
from loopgguf.intent import GATE_BYTES, Search
from loopgguf.search import tilted
from loopgguf.workflow import QuantizeRequest, Settings, quantize

SETTINGS = Settings(n_threads=1)
SIZE = 33_000


@pytest.fixture(autouse=True)
def empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> QuantizeRequest:
    """A size between the types, with two texts of random letters in which no run of one occurs in the other."""
    folder = tmp_path_factory.mktemp("texts")
    for seed, name in enumerate(("calibration", "selection")):
        (folder / f"{name}.txt").write_text("".join(np.random.default_rng(seed).choice([*"abcde fghij"], 6000)), encoding="utf-8")
    calibration = ImatrixRequest((folder / "calibration.txt",), ctx_size=64, n_samples=40)
    return QuantizeRequest(size_bytes=SIZE, use_imatrix=False, calibration=calibration, search=Search(10, (folder / "selection.txt",)))


def types_of(path: Path) -> dict[str, GgmlType]:
    return {tensor.name: tensor.type for tensor in read_gguf(path).tensors}


def judge(monkeypatch: pytest.MonkeyPatch, *differences: Measure) -> list[np.ndarray]:
    """Let the comparisons come to `differences`, the last one for all that follow; return the tokens that they are made on."""
    seen: list[np.ndarray] = []

    def difference(self: object, a: object, b: object, tokens: np.ndarray) -> Measure:
        seen.append(tokens)
        return differences[min(len(seen), len(differences)) - 1]

    monkeypatch.setattr(search._Search, "_difference", difference)
    return seen


BETTER, WORSE, UNSURE = Measure(-1.0, 0.1), Measure(1.0, 0.1), Measure(-1.0, 0.9)


def test_nothing_certain_leaves_the_plan(model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches swaps that stay by chance, and trial files that stay for good."""
    first = quantize(model, tmp_path / "first.gguf", replace(request_, search=None, size_bytes=SIZE - GATE_BYTES), SETTINGS)
    seen = judge(monkeypatch, UNSURE)
    result = quantize(model, tmp_path / "out.gguf", request_, SETTINGS)
    assert len(seen) > 2
    assert types_of(tmp_path / "out.gguf") == types_of(tmp_path / "first.gguf")
    assert any("none is better than the plan" in note for note in result.notes)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.gguf{end}" for name in ("first", "out") for end in ("", ".sha256")]
    assert result.total_bytes <= SIZE and first.total_bytes <= SIZE


def test_a_swap_that_is_certain_stays_and_is_confirmed(model: Path, request_: QuantizeRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a swap that is judged on the chunks that chose it, a confirmation on chunks that swaps have seen, and a larger file."""
    seen = judge(monkeypatch, BETTER, BETTER, WORSE)
    with monkeypatch.context() as patch:
        patch.setattr(search, "FACTORS", (64.0,))
        result = quantize(model, tmp_path / "out.gguf", request_, SETTINGS)
    few, rest = ({tuple(chunk) for chunk in tokens} for tokens in seen[:2])
    assert few.isdisjoint(rest)
    used = set().union(*({tuple(chunk) for chunk in tokens} for tokens in seen[:-1]))
    assert used.isdisjoint({tuple(chunk) for chunk in seen[-1]}), "the last chunks are new to all swaps"
    assert any("not confirmed" in note for note in result.notes)  # the last comparison says that it is worse

    monkeypatch.setattr(search._Search, "_swaps", lambda self: iter([("attn_q", 64.0)]))
    judge(monkeypatch, BETTER)
    better = quantize(model, tmp_path / "better.gguf", request_, SETTINGS)
    assert any("1 kept" in note and "not confirmed" not in note for note in better.notes)
    assert types_of(tmp_path / "better.gguf") != types_of(tmp_path / "out.gguf")
    assert better.total_bytes <= SIZE
    text = read_gguf(tmp_path / "better.gguf").metadata["loopgguf.selection.dataset"].data
    assert text == "selection.txt"


def test_a_real_search_ends(model: Path, request_: QuantizeRequest, tmp_path: Path) -> None:
    """Catches measurements that are mixed up: of two files, of chunks, of the reference."""
    result = quantize(model, tmp_path / "out.gguf", request_, SETTINGS)
    assert any(note.startswith("search: ") and "swaps tried" in note for note in result.notes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"size_bytes": None, "quant_type": "Q4_0"}, "give --size or --target-bpw"),
        ({"search": Search(0)}, "expected a number above 0"),
        ({"keep_split": True}, "--keep-split"),
    ],
)
def test_requests_that_contradict_themselves(model: Path, request_: QuantizeRequest, tmp_path: Path, change: dict[str, object], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        quantize(model, tmp_path / "out.gguf", replace(request_, **change), SETTINGS)
    assert not list(tmp_path.iterdir())


def test_too_little_text(model: Path, request_: QuantizeRequest, tmp_path: Path) -> None:
    """Catches a search whose confirmation rests on a chunk or two."""
    assert request_.search is not None
    short = tmp_path / "short.txt"
    short.write_text(Path(request_.search.files[0]).read_text(encoding="utf-8")[:1500], encoding="utf-8")
    with pytest.raises(UsageError, match="expected at least 12"):
        quantize(model, tmp_path / "out.gguf", replace(request_, search=Search(1, (short,))), SETTINGS)


def test_tilt() -> None:
    """Catches a factor on another kind of tensor, or on what is not the estimate."""
    damage = TypeDamage(GgmlType.Q4_0, 1.0, 2.0, 3.0)
    rows = {name: ErrorRow(name, 1, 1, Basis.PRIOR, (damage,)) for name in ("blk.0.attn_q.weight", "blk.0.ffn_up.weight")}
    table = tilted(ErrorTable(rows), {"attn_q": 2.0})
    assert {tensor_role(name).kind: row.damages[0] for name, row in table.rows.items()} == {"attn_q": replace(damage, estimated_error=6.0), "ffn_up": damage}
