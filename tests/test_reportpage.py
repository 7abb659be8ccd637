"""reportpage.py: the arithmetic of charts and maps, and documents at the edge of what they can say."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loopgguf.reportpage import (
    BIT_STEPS,
    HEIGHT,
    MAX_MAP_CELLS,
    WIDTH,
    Axis,
    histogram_chart,
    layer_charts,
    measure_text,
    megabytes,
    render_html,
    render_markdown,
    role_rows,
    shared_prefix,
    short_labels,
    size_chart,
    type_map,
    weight_errors,
)

Document = dict[str, Any]


def tensor(name: str, role: str, layer: int | None, bits: float = 4.5, shape: tuple[int, ...] = (64, 256)) -> Document:
    n_bytes = int(math.prod(shape) * bits / 8)
    return {"name": name, "role": role, "layer": layer, "type": "Q4_K", "bpw": bits, "shape": list(shape), "n_bytes": n_bytes, "error": None}


def file(name: str = "a.gguf", n_bytes: int = 4_000_000, kld: float = 0.01, *, is_pareto: bool = True) -> Document:
    measured = {label: {"value": kld, "standard_error": None} for label in ("Mean PPL(base)", "Mean KLD", "99.0% KLD", "Same top p", "Mean PPL(Q)/PPL(base)")}
    tensors = [tensor("output.weight", "output", None), *(tensor(f"blk.{i}.{r}.weight", r, i) for i in (0, 2) for r in ("ffn_down", "attn_q", "attn_zoo"))]
    return {
        "name": name,
        "bytes": n_bytes,
        "bpw": 4.5,
        "is_pareto": is_pareto,
        "to_baseline": None,
        "measured": measured,
        "metadata": {},
        "kld_histogram": {"edges_nats": [1e-3, 1e-2, 1e-1], "counts": [3, 1] if kld else [0, 0], "n_below": 0 if kld else 4, "n_above": 0},
        "kld_by_chunk_nats": [kld],
        "kld_by_position": [{"first": 16, "last": 30, "mean_kld_nats": kld, "standard_error": None}],
        "sample": None,
        "layers": [],
        "collapse": None,
        "shards": [{"name": name, "bytes": n_bytes, "sha256": "0" * 64}],
        "tensors": [*tensors, tensor("output_norm.weight", "output_norm", None, 32.0, (256,))],
    }


def document(*files: Document) -> Document:
    return {
        "format": "loopgguf report",
        "schema_version": 1,
        "command": "",
        "versions": {"python": "3"},
        "baseline": "a.gguf",
        "notes": [],
        "tasks": [],
        "text": {"names": ["t.txt"], "n_chunks": 1, "n_ctx": 32, "n_scored": 15, "tokens_sha256": "0" * 64},
        "reference": {"name": "model", "shards": [{"name": "r.gguf", "bytes": 9, "sha256": "0" * 64}]},
        "sample": {"prompt": "Once", "n_tokens": 8, "reference": None},
        "files": list(files),
    }


@given(st.lists(st.floats(1e-7, 1e12), min_size=1, max_size=6), st.booleans())
def test_axis_holds_its_values_and_its_ticks(values: list[float], is_log: bool) -> None:
    """Catches points and ticks outside the chart, a division by zero for one value, and an axis without ticks."""
    axis = Axis(values, 60, 580, is_log=is_log)
    ticks = axis.ticks()
    assert all(60 <= axis(value) <= 580 for value in values)
    assert all(60 <= tick.at <= 580 for tick in ticks)
    assert 2 <= len(ticks) <= 60
    assert [tick.at for tick in ticks] == sorted(tick.at for tick in ticks)


def test_axis_is_what_its_ticks_say() -> None:
    """Catches a tick that stands at another number's place."""
    axis = Axis([0.003, 0.08], 0, 100, is_log=True)
    assert {tick.text: tick.at for tick in axis.ticks()} == {text: axis(float(text)) for text in ("0.002", "0.005", "0.01", "0.02", "0.05", "0.1")}
    assert (axis(0.002), axis(0.1)) == (0, 100)
    linear = Axis([2e9, 4e9], 0, 100)
    assert {tick.text for tick in linear.ticks(1e9)} == {"2", "2.5", "3", "3.5", "4"}
    assert Axis([0, 0], 0, 100, from_zero=True)(0) == 0


@given(st.lists(st.tuples(st.integers(10**6, 10**7), st.floats(1e-4, 1), st.text("abc", min_size=1, max_size=30)), min_size=1, max_size=9))
def test_labels_stay_inside(points: list[tuple[int, float, str]]) -> None:
    """Catches a label beside the last file that is cut off."""
    chart = size_chart([file(name, n_bytes, kld) for n_bytes, kld, name in points])
    assert chart is not None
    for mark in (mark for series in chart.series for mark in series.marks):
        assert 0 <= mark.x <= WIDTH and 0 <= mark.y <= HEIGHT
        width = 9.5 * len(mark.label)
        assert mark.label_x - width >= 0 if mark.anchor == "end" else mark.label_x + width <= WIDTH


def test_labels_do_not_cover_one_another() -> None:
    """Catches the names of files of almost one size written over one another."""
    chart = size_chart([file(f"name-{i}.gguf", 4_000_000, 0.01 + 0.0001 * i) for i in range(3)])
    assert chart is not None
    heights = sorted(mark.label_y for series in chart.series for mark in series.marks if mark.label)
    assert len(heights) == 3 and min(b - a for a, b in pairwise(heights)) >= 14
    crowd = size_chart([file(f"name-{i}.gguf", 4_000_000, 0.01) for i in range(40)])
    assert crowd is not None
    heights = sorted(mark.label_y for series in crowd.series for mark in series.marks if mark.label)
    assert 1 < len(heights) < 40 and min(b - a for a, b in pairwise(heights)) >= 14


def test_pareto_line_goes_through_the_marked_files_alone() -> None:
    """Catches a line through a file that another beats."""
    files = [file("a", 1_000_000, 0.5), file("b", 2_000_000, 0.9, is_pareto=False), file("c", 3_000_000, 0.1)]
    chart = size_chart(files)
    assert chart is not None
    line, *points = chart.series
    marks = [series.marks[0] for series in points]
    assert line.path == f"{marks[0].x},{marks[0].y} {marks[2].x},{marks[2].y}"
    assert marks[0].x < marks[1].x < marks[2].x and marks[1].y < marks[0].y < marks[2].y


def test_map_of_types() -> None:
    """Catches layers that are missing in between, roles in no order, vectors coloured as weights, and a map of millions of cells."""
    shown = type_map(file())
    assert shown.layers == (0, 2)
    assert [role for role, _ in shown.rows] == ["attn_q", "ffn_down", "attn_zoo"]
    assert [role for role, _ in shown.rest] == ["output"]
    assert shown.left_out == "1 vectors (norms, biases), 1,024 bytes, are not in the map."
    cell = shown.rows[0][1][1]
    assert cell is not None and (BIT_STEPS[cell.step][1], cell.text) == ("≤ 4.5", "4.5")
    assert cell.tip == "blk.2.attn_q.weight: Q4_K, 4.5 bits per weight, 64 × 256, 9,216 bytes"
    n = math.isqrt(MAX_MAP_CELLS) + 1
    many = type_map({"tensors": [tensor(f"blk.{i}.r{i}.weight", f"r{i}", i) for i in range(n)]})
    assert many.rows == () and f"{n} roles in {n} layers" in many.left_out


def test_short_labels() -> None:
    """Catches eleven files called `Meta-Llama-3.1-8B-Instr…`, and two that cannot be told apart."""
    assert short_labels(["Llama-3.1-8B-Q4_K_M.gguf", "Llama-3.1-8B-Q4_0.gguf", "Llama-3.1-8B-IQ2_M.gguf"]) == ["Q4_K_M", "Q4_0", "IQ2_M"]
    assert short_labels(["Llama-3.1-8B-Q4_K_M.gguf"]) == ["Llama-3.1-8B-Q4_K_M"]
    assert short_labels(["x/a.gguf", "y/a.gguf", "b.gguf"]) == ["x/a", "y/a", "b"]
    assert short_labels(["a-" + "b" * 99])[0].endswith("b…")


def test_bytes_by_role_add_up() -> None:
    """Catches vectors under a role's name, and shares of another total."""
    rows = role_rows(file())
    assert sum(row["n_bytes"] for row in rows) == sum(t["n_bytes"] for t in file()["tensors"])
    assert sum(row["share"] for row in rows) == pytest.approx(100)
    assert [row["n_tensors"] for row in rows] == [2, 2, 2, 1, 1]
    assert (rows[-1]["role"], rows[-1]["bpw"], rows[0]["share_of_largest"]) == ("vectors", 32, 100)


def test_numbers_as_text() -> None:
    """Catches an error that is made up, and a reason that is not said."""
    assert measure_text({"value": 1.23456, "standard_error": 0.5}, 2, " %") == "1.23 ± 0.50 %"
    assert measure_text({"value": 1.23456, "standard_error": None}, 2) == "1.23"
    assert measure_text({"omitted": "too few"}) == "left out: too few"
    assert [megabytes(n) for n in (999, 1500, 2_500_000, 3_210_000_000)] == ["999 B", "1.50 kB", "2.50 MB", "3.21 GB"]
    assert [shared_prefix(*texts) for texts in (("abc", "abd"), ("ab", "abc"), (None, "a"), ("", ""))] == [2, 2, 0, 0]


@pytest.mark.parametrize(
    "files", [[file(kld=0)], [file(kld=0), file("b.gguf", kld=0)], [file(), file("b.gguf", kld=0)], [file(f"{i}.gguf") for i in range(12)]]
)
def test_edges_of_what_a_report_can_say(files: list[Document]) -> None:
    """Catches log 0 for a file that equals its reference, a chart of nothing, one chunk, no sample, and more files than colours."""
    made = document(*files)
    assert (size_chart(files) is None) == (histogram_chart(files) is None) == all(f["measured"]["Mean KLD"]["value"] == 0 for f in files)
    page = render_html(made)
    assert "(nothing: see the notes)" in page and "nan" not in page and "None" not in page
    assert ('class="swatch other"' in page) == (len(files) > 8)
    assert "(nothing: see the notes)" in render_markdown(made)


# --- by block ---------------------------------------------------------------------------------------------------------


def measured_file(name: str = "a.gguf") -> Document:
    """A file with errors of its tensors and outputs of two blocks, the first of which lost nothing."""
    result = file(name)
    for i, entry in enumerate(result["tensors"]):
        if len(entry["shape"]) > 1:
            entry["error"] = {"mae": 0.1, "relative_error": 0.01 * i, "snr_db": 20.0 if i else None, "abs_error_quantiles": {"50": 0.1, "100": 0.2}}
    result["layers"] = [
        {"layer": layer, "cosine": {"value": 1 - lost, "standard_error": None}, "relative_error": {"value": lost, "standard_error": 0.001}}
        for layer, lost in ((0, 0.0), (2, 0.02))
    ]
    return result


def test_errors_by_layer_are_means_over_weights() -> None:
    """Catches a mean over tensors whatever their size, and tensors outside the layers among them."""
    shown = measured_file()
    shown["tensors"][1]["shape"] = [192, 256]
    expected = (3 * 0.01 * 1 + 0.01 * 2 + 0.01 * 3) / 5
    assert weight_errors(shown) == {0: pytest.approx(expected), 2: pytest.approx(0.01 * (4 + 5 + 6) / 3)}


def test_by_block_is_drawn_when_it_was_measured() -> None:
    """Catches an empty tab, a logarithm of 0, a file without numbers that shifts the colours, and tables that lack a row."""
    plain, measured = document(file()), document(file("b.gguf"), measured_file())
    assert "By block" not in render_html(plain)
    assert "Outputs of blocks" not in render_markdown(plain)
    charts = layer_charts(measured["files"])
    assert [chart.title for chart in charts] == ["Error of the weights by block", "Error of the blocks' outputs", "Cumulative similarity by depth"]
    assert [(series.name, series.colour, len(series.marks)) for series in charts[2].series] == [("a.gguf", "c1", 1)]
    page, text = render_html(measured), render_markdown(measured)
    assert "cosine similarity 0.980000" in page
    assert page.count("SNR 20.0 dB") == 6
    assert "| 2 | 0.980000 | 0.020000 ± 0.001000 |" in text
    assert "| output.weight | Q4_K | 0 | ∞ | 0.1 |" in text
