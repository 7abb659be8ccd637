"""A real model, SmolLM2-135M-Instruct: what the demo model cannot show. Runs when it is in the user's cache, or with `--real`.

Its rows of 576 fit no block of 256, so nearly every type falls back; its embeddings are tied and large; it has a chat
template. The widened one is the same function in rows of 768. The tests marked slow as well need `--slow`.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from upstream import differing, llama_quantize

from loopgguf.calibration import load_chunks
from loopgguf.chat import find_template
from loopgguf.container import read_gguf
from loopgguf.errors import UsageError
from loopgguf.formats import GgmlType
from loopgguf.llama import Model
from loopgguf.planner import TypeRules, plan_preset, plan_profile, summarize_fallbacks
from loopgguf.presets import PRESETS
from loopgguf.profile import load_profile
from loopgguf.source import open_source
from loopgguf.statistics import load_imatrix, sanitize_importance
from loopgguf.workflow import ImatrixRequest, QuantizeRequest, Settings, compute_imatrix, convert, evaluate, quantize

pytestmark = pytest.mark.real

SETTINGS = Settings(n_threads=2)
QUICK = {"Q8_0", "Q4_0", "IQ4_NL", "Q4_K_M", "Q3_K_M"}
UNSUPPORTED = {"NVFP4"}  # llama-quantize lists it but has no default type for it
NO_FALLBACK = {"Q1_0"}  # its blocks of 128 do not fit rows of 576, and upstream has no type to fall back to: it throws
FLOATS = {"F32", "F16", "BF16"}


def _cases(names: list[str], quick: set[str]) -> list[object]:
    return [pytest.param(name, marks=() if name in quick else pytest.mark.slow) for name in names]


@pytest.fixture(scope="session")
def smollm2_gguf(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(smollm2, tmp_path_factory.mktemp("smollm2") / "smollm2-BF16.gguf", "bf16", settings=SETTINGS).paths[0]


@pytest.fixture(scope="session")
def smollm2_wide_gguf(smollm2_wide: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(smollm2_wide, tmp_path_factory.mktemp("wide") / "smollm2-wide-BF16.gguf", "bf16", settings=SETTINGS).paths[0]


@pytest.fixture(scope="session")
def smollm2_imatrix(smollm2_gguf: Path) -> Path:
    return compute_imatrix(smollm2_gguf, smollm2_gguf.with_name("imatrix.gguf"), ImatrixRequest(n_samples=4), SETTINGS).path


@pytest.fixture(scope="session")
def smollm2_wide_imatrix(smollm2_wide_gguf: Path) -> Path:
    return compute_imatrix(smollm2_wide_gguf, smollm2_wide_gguf.with_name("imatrix.gguf"), ImatrixRequest(n_samples=4), SETTINGS).path


# --- conversion -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm2", "smollm2-wide"])
def test_conversion_equals_upstream(name: str, request: pytest.FixtureRequest) -> None:
    """A key that differs from llama.cpp's converter, q and k rows in another order, a head written although it is tied."""
    from check_converter import differences, digest_file, read_golden

    gguf = request.getfixturevalue(f"{name.replace('-', '_')}_gguf")
    assert differences(digest_file(gguf), read_golden()[name]) == []


def test_statistics_of_folder_and_gguf_agree(smollm2: Path, smollm2_imatrix: Path, tmp_path: Path) -> None:
    """A decoder layer that torch runs differently, which shows only where activations are massive, as in real models."""
    ours = compute_imatrix(smollm2, tmp_path / "folder.imatrix.gguf", ImatrixRequest(n_samples=4), SETTINGS).statistics
    theirs = load_imatrix(smollm2_imatrix)
    assert ours.columns.keys() == theirs.columns.keys()
    for name in ours.columns:
        a, b = (statistics.importance(name) for statistics in (ours, theirs))
        assert a is not None and b is not None
        assert np.dot(a.ravel(), b.ravel()) / (np.linalg.norm(a) * np.linalg.norm(b)) > 0.999, name


# --- rows that no block of 256 fits -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "fallen"),
    [
        ("Q4_K_M", {("Q4_K", "Q5_0"): 166, ("Q6_K", "Q8_0"): 14}),
        ("Q5_K_M", {("Q5_K", "Q5_1"): 166, ("Q6_K", "Q8_0"): 14}),
        ("Q6_K", {("Q6_K", "Q8_0"): 180}),
        ("Q3_K_M", {("Q3_K", "Q4_0"): 120, ("Q4_K", "Q5_0"): 58, ("Q5_K", "Q5_1"): 2}),
        ("IQ4_XS", {("IQ4_XS", "IQ4_NL"): 180}),
        ("Q4_0", {}),
    ],
)
def test_fallback_chain(preset: str, fallen: dict[tuple[str, str], int], smollm2: Path) -> None:
    """A type that falls back to another one than upstream's, or a fallback that the plan does not show."""
    source = open_source(smollm2)
    plan = plan_preset(source.tensors, source.metadata, preset, has_importance=lambda name: name.startswith("blk."))
    rows = [row for row in plan.rows if row.wanted is not None and row.name != "token_embd.weight"]
    assert Counter((row.wanted.name, row.type.name) for row in rows if row.wanted) == fallen
    assert all(row.fallback == f"rows of 576 are no multiple of 256, as {row.wanted.name} needs" for row in rows if row.wanted)
    assert not any(row.fallback for row in plan.rows if row.shape[-1] == 1536), "rows of 1536 fit every type"


def test_fallbacks_in_one_line(smollm2: Path) -> None:
    """The cost of fallbacks left to the reader of a table, or reckoned from the wrong types."""
    source = open_source(smollm2)
    line = summarize_fallbacks(plan_preset(source.tensors, source.metadata, "Q4_K_M", has_importance=lambda name: name.startswith("blk.")))
    assert line is not None
    assert line.startswith("180 of 211 tensors fall back: 6.17 instead of 5.")
    assert line.endswith("Types that fit rows of 576: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, IQ4_NL, MXFP4, NVFP4, Q2_0")


def test_wide_rows_need_no_fallback(smollm2_wide: Path) -> None:
    """A widened model that does not do what it is for."""
    source = open_source(smollm2_wide)
    for preset in PRESETS:
        if preset not in UNSUPPORTED:
            plan = plan_preset(source.tensors, source.metadata, preset, TypeRules(), lambda _: True)
            assert summarize_fallbacks(plan) is None, preset


# --- tied embeddings --------------------------------------------------------------------------------------------------


def test_tied_embeddings_are_planned_as_the_output(smollm2: Path) -> None:
    """Embeddings in the low type of a lookup table although every logit is made with them: a fifth of this model."""
    source = open_source(smollm2)
    assert all(tensor.name != "output.weight" for tensor in source.tensors)
    types = {}
    for name in ("balanced", "compression-max"):
        plan = plan_profile(source.tensors, source.metadata, load_profile(name), has_importance=lambda name: name.startswith("blk."))
        types[name] = next(row for row in plan.rows if row.name == "token_embd.weight")
    assert types["balanced"].wanted is GgmlType.Q6_K and types["balanced"].type is GgmlType.Q8_0
    assert types["compression-max"].wanted is GgmlType.Q4_K and types["compression-max"].type is GgmlType.Q5_0


def test_output_type_of_tied_embeddings(smollm2_gguf: Path, smollm2_imatrix: Path, tmp_path: Path) -> None:
    """`--output-tensor-type` that is ignored, or refused, because there is no output.weight."""
    rules = TypeRules(output_type=GgmlType.Q5_0)
    ours = quantize(smollm2_gguf, tmp_path / "ours.gguf", QuantizeRequest(quant_type="Q4_0", imatrix=smollm2_imatrix, rules=rules), SETTINGS)
    assert {row.name: row.type for row in ours.plan.rows}["token_embd.weight"] is GgmlType.Q5_0


# --- the same bytes ---------------------------------------------------------------------------------------------------


def _compare(source: Path, folder: Path, preset: str, imatrix: Path) -> None:
    """Both get the importances that we encode with: the widened model's zeros are raised, which upstream does not do."""
    ours, theirs = folder / "ours.gguf", folder / "theirs.gguf"
    quantize(source, ours, QuantizeRequest(quant_type=preset, imatrix=imatrix), SETTINGS)
    statistics = load_imatrix(imatrix)
    importances = {name: sanitize_importance(statistics.importance(name))[0] for name in statistics.columns}
    llama_quantize(source, theirs, PRESETS[preset].file_type, importances)
    assert differing(ours, theirs) == []


def test_nothing_is_sanitised_on_narrow_rows(smollm2_imatrix: Path) -> None:
    """A comparison with upstream on importances that upstream would never get."""
    statistics = load_imatrix(smollm2_imatrix)
    assert sum(sanitize_importance(statistics.importance(name))[1] for name in statistics.columns) == 0


@pytest.mark.parametrize("preset", _cases([name for name in PRESETS if name not in UNSUPPORTED | NO_FALLBACK], QUICK))
def test_preset_on_narrow_rows(preset: str, smollm2_gguf: Path, smollm2_imatrix: Path, tmp_path: Path) -> None:
    """Types chosen before the fallback deciding differently from upstream's, which no model with whole blocks shows."""
    _compare(smollm2_gguf, tmp_path, preset, smollm2_imatrix)


def test_a_preset_without_a_fallback_is_refused(smollm2: Path) -> None:
    """A file whose rows do not hold whole blocks, or a traceback where upstream throws."""
    source = open_source(smollm2)
    with pytest.raises(UsageError, match="type Q1_0 has blocks of 128 weights and no fallback: got rows of 576"):
        plan_preset(source.tensors, source.metadata, "Q1_0", TypeRules(), None)


@pytest.mark.parametrize("preset", _cases(["Q2_K", "IQ2_M", "IQ3_XXS"], {"Q2_K"}))
def test_preset_on_wide_rows(preset: str, smollm2_wide_gguf: Path, smollm2_wide_imatrix: Path, tmp_path: Path) -> None:
    """Blocks of 256 in rows where a quarter of the weights and of the activations is zero."""
    _compare(smollm2_wide_gguf, tmp_path, preset, smollm2_wide_imatrix)


# --- the whole job ----------------------------------------------------------------------------------------------------


def test_balanced_file_is_close_and_answers(smollm2: Path, smollm2_imatrix: Path, tmp_path: Path) -> None:
    """A file that is fine on a toy and ruined on a model with attention sinks and massive activations."""
    from real_model import ANSWER, PROMPT, continue_greedily

    path = quantize(smollm2, tmp_path / "balanced.gguf", QuantizeRequest(imatrix=smollm2_imatrix), SETTINGS).paths[0]
    assert ANSWER in continue_greedily(path, PROMPT, 8)
    assert evaluate(path, smollm2, n_chunks=4, settings=SETTINGS).quality.mean_kld_nats.value < 0.1


# --- chat -------------------------------------------------------------------------------------------------------------


def test_chat_calibration_uses_the_template(smollm2: Path, smollm2_gguf: Path, tmp_path: Path) -> None:
    """Conversations whose markers are read as plain text, or a template rendered otherwise than transformers does."""
    from transformers import AutoTokenizer

    conversation = [
        {"role": "user", "content": "What is 17 + 25?"},
        {"role": "assistant", "content": "It's 42."},
        {"role": "user", "content": "And in words?"},
        {"role": "assistant", "content": "Forty-two."},
    ]
    rows = tmp_path / "chat.jsonl"
    rows.write_text((json.dumps({"messages": conversation}) + "\n") * 8, encoding="utf-8")
    metadata = read_gguf(smollm2_gguf).metadata
    template = find_template(metadata, "smollm2")
    with Model(smollm2_gguf, vocab_only=True) as vocabulary:
        chunks = load_chunks(vocabulary, [rows], 64, template=template)
    expected = AutoTokenizer.from_pretrained(smollm2).apply_chat_template(conversation, tokenize=False)
    ids = AutoTokenizer.from_pretrained(smollm2)(expected)["input_ids"]
    text = " ".join(map(str, chunks.tokens.ravel().tolist()))
    assert " ".join(map(str, ids[: 64 - 2])) in text
    assert vocabulary.bos in ids, "SmolLM2's template writes its BOS as <|im_start|>"
