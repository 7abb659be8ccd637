"""Every preset makes the bytes that llama-quantize makes, tensor by tensor, with the same imatrix and without one."""

from __future__ import annotations

from pathlib import Path

import pytest
from upstream import differing, llama_quantize

from loopgguf.errors import UsageError
from loopgguf.planner import TypeRules, parse_overrides
from loopgguf.presets import PRESETS
from loopgguf.statistics import load_imatrix
from loopgguf.workflow import ImatrixRequest, QuantizeRequest, Settings, compute_imatrix, quantize

# building the tables of these and searching their grids takes from seconds to a minute
SLOW = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M"}
UNSUPPORTED = {"NVFP4"}  # llama-quantize lists it but has no default type for it
NEED_IMATRIX = {"IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "Q2_K_S"}

CASES = [pytest.param(name, marks=pytest.mark.slow if name in SLOW else ()) for name in PRESETS if name not in UNSUPPORTED]


@pytest.fixture(scope="module")
def demo_imatrix(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("imatrix") / "demo.imatrix.gguf"
    return compute_imatrix(demo_gguf, path, ImatrixRequest(n_samples=8)).path


def _compare(
    source: Path, folder: Path, name: str, request: QuantizeRequest, imatrix: Path | None, max_buffer_bytes: int = 256 << 20, **fields: object
) -> None:
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    statistics = load_imatrix(imatrix) if imatrix else None
    importances = {n: statistics.importance(n) for n in statistics.columns} if statistics else None
    result = quantize(source, ours, request, Settings(n_threads=2, max_buffer_bytes=max_buffer_bytes))
    assert not any(log.n_floored for log in result.logs.values()), "equality is only promised where nothing had to be sanitised"
    llama_quantize(source, theirs, PRESETS[name].file_type, importances, **fields)
    assert differing(ours, theirs) == []


@pytest.mark.parametrize("name", CASES)
def test_preset_with_imatrix(name: str, demo_gguf: Path, demo_imatrix: Path, tmp_path: Path) -> None:
    """A wrong type rule, a wrong normalisation of the imatrix, or a slab that changes an encoder's view of a row."""
    _compare(demo_gguf, tmp_path, name, QuantizeRequest(quant_type=name, imatrix=demo_imatrix), demo_imatrix)


@pytest.mark.parametrize("name", [case for case in CASES if case.values[0] not in NEED_IMATRIX])
def test_preset_without_imatrix(name: str, demo_gguf: Path, tmp_path: Path) -> None:
    """Rules that depend on there being an imatrix, and encoders that use another search without one."""
    _compare(demo_gguf, tmp_path, name, QuantizeRequest(quant_type=name, use_imatrix=False), None)


@pytest.mark.parametrize("name", sorted(NEED_IMATRIX & set(PRESETS)))
def test_preset_that_needs_an_imatrix_is_refused_without(name: str, demo_gguf: Path, tmp_path: Path) -> None:
    """llama.cpp aborts the process, or fails after writing half a file."""
    with pytest.raises(UsageError, match="imatrix"):
        quantize(demo_gguf, tmp_path / "x.gguf", QuantizeRequest(quant_type=name, use_imatrix=False))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["Q4_0", "Q5_1", "Q3_K_M", "Q6_K", "IQ4_XS", pytest.param("IQ3_XXS", marks=pytest.mark.slow)])
def test_slabs_of_a_few_rows(name: str, demo_gguf: Path, demo_imatrix: Path, tmp_path: Path) -> None:
    """An encoder that looks beyond its row: no tensor of the demo model is larger than the default slab."""
    _compare(demo_gguf, tmp_path, name, QuantizeRequest(quant_type=name, imatrix=demo_imatrix), demo_imatrix, max_buffer_bytes=1 << 18)


def test_pure(demo_gguf: Path, demo_imatrix: Path, tmp_path: Path) -> None:
    """--pure that still mixes types, or that forces the types of norms."""
    request = QuantizeRequest(quant_type="Q4_K_M", imatrix=demo_imatrix, rules=TypeRules(pure=True))
    _compare(demo_gguf, tmp_path, "Q4_K_M", request, demo_imatrix, pure=True)


def test_forced_types(demo_gguf: Path, demo_imatrix: Path, tmp_path: Path) -> None:
    """Forced output and embedding types that lose against the preset's own rules."""
    from loopgguf.formats import GgmlType

    rules = TypeRules(output_type=GgmlType.Q8_0, token_embedding_type=GgmlType.Q5_K)
    request = QuantizeRequest(quant_type="Q3_K_M", imatrix=demo_imatrix, rules=rules)
    _compare(demo_gguf, tmp_path, "Q3_K_M", request, demo_imatrix, output_tensor_type=8, token_embedding_type=13)


def test_leave_output(demo_gguf: Path, demo_imatrix: Path, tmp_path: Path) -> None:
    """An output tensor that is encoded although it should be left."""
    request = QuantizeRequest(quant_type="Q4_K_S", imatrix=demo_imatrix, rules=TypeRules(leave_output=True))
    _compare(demo_gguf, tmp_path, "Q4_K_S", request, demo_imatrix, quantize_output_tensor=False)


def test_overrides_win(demo_gguf: Path, demo_imatrix: Path, tmp_path: Path) -> None:
    """An override that is ignored, as upstream does when it is the base type or comes with --pure."""
    rules = TypeRules(overrides=parse_overrides([r"ffn_down=Q8_0", r"^blk\.0\.attn_v\.weight$=Q4_K"]))
    result = quantize(demo_gguf, tmp_path / "x.gguf", QuantizeRequest(quant_type="Q4_K_M", imatrix=demo_imatrix, rules=rules))
    types = {row.name: row.type.name for row in result.plan.rows}
    assert {types[f"blk.{i}.ffn_down.weight"] for i in range(6)} == {"Q8_0"}
    assert types["blk.0.attn_v.weight"] == "Q4_K"
