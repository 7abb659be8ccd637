"""reportfile.py: the JSON says what was measured, the three files come together, and hostile names stay text."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from chromium import find_chromium, headless
from tiny_llama import write_tiny_llama

from loopgguf.container import read_gguf
from loopgguf.errors import OutputError
from loopgguf.evaluation import MIN_SCORED_FOR_TAIL, quantile_label
from loopgguf.reportfile import kld_by_position, kld_histogram, report_paths, write_document
from loopgguf.workflow import ComparisonResult, Settings, compare, write_report

HOSTILE = "</script></style><img src=x onerror=\"document.title='hacked'\">'{{7*7}}|`*\x00\u202e"
VOID = {"meta", "link", "br", "hr", "img", "input"}


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> ComparisonResult:
    """Two random one-layer models, measured against a third on a text of the folder."""
    folder = tmp_path_factory.mktemp("models")
    paths = [write_tiny_llama(folder / f"{name}.gguf", noise=noise) for name, noise in (("reference", 0.0), ("near", 0.01), ("far", 0.05))]
    text = folder / "text.txt"
    text.write_text("abcde edcba bad cab ace " * 40, encoding="utf-8")
    return compare(paths[1:], paths[0], [text], levels=("tensor", "layer"), ctx_size=32, n_chunks=6, settings=Settings(n_threads=1))


@pytest.fixture(scope="module")
def document(result: ComparisonResult, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    paths = write_report(result, tmp_path_factory.mktemp("report") / "r", command="loopgguf compare near.gguf far.gguf", settings=Settings(n_threads=1))
    return json.loads(paths[0].read_text(encoding="utf-8"))


# --- the JSON ---------------------------------------------------------------------------------------------------------


def test_the_json_says_what_was_measured(result: ComparisonResult, document: dict[str, Any]) -> None:
    """Catches numbers of another file, a hash of something else, bins that lose tokens, and a schema without its version."""
    assert (document["format"], document["schema_version"]) == ("loopgguf report", 1)
    assert document["command"] == "loopgguf compare near.gguf far.gguf"
    assert document["text"]["n_scored"] == result.files[0].quality.n_scored
    for file, entry in zip(result.files, document["files"], strict=True):
        assert entry["name"] == file.name
        assert entry["measured"]["Mean KLD"]["value"] == file.quality.mean_kld_nats.value
        assert entry["shards"] == [{"name": file.name, "bytes": file.n_bytes, "sha256": hashlib.sha256(file.path.read_bytes()).hexdigest()}]
        assert sum(tensor["n_bytes"] for tensor in entry["tensors"]) == sum(tensor.n_bytes for tensor in read_gguf(file.path).tensors)
        assert np.mean(entry["kld_by_chunk_nats"]) == pytest.approx(file.quality.mean_kld_nats.value, rel=1e-5)
        assert isinstance(entry["sample"], str)
    for fidelity, entry in zip(result.fidelities, document["files"], strict=True):
        assert [layer["cosine"]["value"] for layer in entry["layers"]] == [layer.cosine.value for layer in fidelity.layers]
        errors = {tensor["name"]: tensor["error"]["relative_error"] for tensor in entry["tensors"] if tensor["error"] is not None}
        assert errors == {tensor.name: tensor.relative_error for tensor in fidelity.tensors}
    attn_q = next(tensor for tensor in document["files"][0]["tensors"] if tensor["name"] == "blk.0.attn_q.weight")
    assert (attn_q["layer"], attn_q["role"], attn_q["type"], attn_q["shape"]) == (0, "attn_q", "F32", [32, 32])
    assert result.files[0].quality.n_scored < MIN_SCORED_FOR_TAIL
    assert "omitted" in document["files"][0]["measured"][quantile_label(99.9)]


def test_no_number_per_token_is_kept(result: ComparisonResult, document: dict[str, Any]) -> None:
    """Catches a report that grows with the text."""

    def longest(value: object) -> int:
        parts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
        return max([len(parts) if isinstance(value, list) else 0, *(longest(part) for part in parts)])

    assert longest(document) < result.files[0].quality.n_scored


def test_histogram_counts_every_token() -> None:
    """Catches tokens outside the bins that are lost, negative ones (rounding of a KLD of 0) above all."""
    kld = np.array([[-1e-9, 0, 1e-7], [1.5e-3, 99, 1e3]], np.float32)
    histogram = kld_histogram(kld)
    assert len(histogram["edges_nats"]) == len(histogram["counts"]) + 1
    assert (histogram["n_below"], histogram["n_above"]) == (2 + (np.float32(1e-7) < 1e-7), 1)
    assert sum(histogram["counts"]) + histogram["n_below"] + histogram["n_above"] == 6
    at = next(i for i, edge in enumerate(histogram["edges_nats"]) if edge > 1.5e-3) - 1
    assert histogram["counts"][at] == 1


def test_positions_are_those_of_the_context(result: ComparisonResult) -> None:
    """Catches positions counted from the first scored one, gaps, and means over the wrong axis."""
    quality = result.files[0].quality
    ranges = kld_by_position(quality)
    assert (ranges[0]["first"], ranges[-1]["last"]) == (16, 30)
    assert [part["first"] for part in ranges[1:]] == [part["last"] + 1 for part in ranges[:-1]]
    assert ranges[3]["mean_kld_nats"] == pytest.approx(quality.token_kld_nats[:, 3].mean(), rel=1e-6)


# --- the files --------------------------------------------------------------------------------------------------------


def test_three_files_or_none(document: dict[str, Any], tmp_path: Path) -> None:
    """Catches a report of two runs in one, and one that replaces a file without being asked."""
    (tmp_path / "r.md").write_text("precious", encoding="utf-8")
    with pytest.raises(OutputError, match=r"r\.md already exists"):
        write_document(document, tmp_path / "r")
    assert [path.name for path in tmp_path.iterdir()] == ["r.md"]
    paths = write_document(document, tmp_path / "r", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.html", "r.json", "r.md"]
    before = [path.read_bytes() for path in paths]
    assert [path.read_bytes() for path in write_document(document, tmp_path / "r", overwrite=True)] == before


def test_names_of_a_report() -> None:
    """Catches `model-2.5bpw` losing what looks like a suffix, and NAME.json.json."""
    assert [path.name for path in report_paths(Path("x/model-2.5bpw"))] == ["model-2.5bpw.json", "model-2.5bpw.md", "model-2.5bpw.html"]
    assert [str(path) for path in report_paths(Path("x/a.html"))] == ["x/a.json", "x/a.md", "x/a.html"]


# --- the page ---------------------------------------------------------------------------------------------------------


class Checker(HTMLParser):
    """Notes elements, attributes and the text of each kind of element, and fails where tags do not match."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.text = ""
        self.in_code = ""

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += [(name, value or "") for name, value in attributes]

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("script", "style"):
            self.in_code += data
        else:
            self.text += data


def checked(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def hostile(document: dict[str, Any]) -> dict[str, Any]:
    """Return the document with hostile text in every place that a model, a file or a text may fill."""
    changed: dict[str, Any] = json.loads(json.dumps(document))
    changed["command"] = changed["baseline"] = changed["reference"]["name"] = HOSTILE
    number = {"value": 50.0, "standard_error": None}
    accuracies = [{"accuracy_percent": number, "difference_percent": number} for _ in changed["files"]]
    changed["tasks"] = [{"name": HOSTILE, "kind": "last word", "n_items": 1, "reference_percent": number, "accuracies": accuracies}]
    changed["notes"], changed["text"]["names"] = [HOSTILE], [HOSTILE]
    changed["sample"] |= {"reference": HOSTILE + "\n\n# heading\n```\n", "prompt": HOSTILE}
    for file in changed["files"]:
        file |= {"name": HOSTILE, "sample": HOSTILE, "metadata": {HOSTILE: HOSTILE}}
        file["shards"][0]["name"] = file["measured"][quantile_label(99.9)]["omitted"] = HOSTILE
        for tensor in file["tensors"]:
            tensor |= {"name": HOSTILE, "role": HOSTILE if tensor["role"] != "attn_q" else "attn_q"}
    return changed


@pytest.mark.parametrize("change", [lambda document: document, hostile], ids=["as it is", "hostile"])
@pytest.mark.parametrize("n_files", [1, 2])
def test_the_page_is_well_formed_and_alone(document: dict[str, Any], tmp_path: Path, n_files: int, change: Callable[[Any], Any]) -> None:
    """Catches markup that a name brings in, a tag that is not closed, an id given twice, and anything loaded from elsewhere."""
    paths = write_document(change({**document, "files": document["files"][:n_files]}), tmp_path / "r")
    page = checked(paths[2].read_text(encoding="utf-8"))
    assert page.seen.count("script") == page.seen.count("style") == 1
    assert not {"img", "link", "iframe", "object", "embed", "base", "form", "a"} & set(page.seen)
    assert not [name for name, _ in page.attributes if name.startswith("on") or name in ("src", "href", "srcset", "action", "xlink:href")]
    assert any(value.startswith("default-src 'none'") for name, value in page.attributes if name == "content")
    assert not [value for _, value in page.attributes if "url(" in value or re.search(r"https?:", value)]
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttp", re.sub(r"^\s*//.*$", "", page.in_code, flags=re.MULTILINE))
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert {value for name, value in page.attributes if name in ("aria-controls", "aria-labelledby")} <= set(ids)
    assert "\x00" not in page.text and "\u202e" not in page.text
    if change is hostile:
        assert "<img src=x onerror=" in page.text and "{{7*7}}" in page.text


def test_markdown_says_hostile_names_as_text(document: dict[str, Any], tmp_path: Path) -> None:
    """Catches HTML, a table cell or a code block that a name or a generated text opens."""
    text = write_document(hostile(document), tmp_path / "r")[1].read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if not line.startswith("    ")]
    assert not [line for line in lines if re.search(r"<[a-z/!]", line)]
    assert not [line for line in lines if line.startswith(("# heading", "```"))]
    for n_columns, start in ((9, "| file | bytes | bpw"), (6, "| role | tensors"), (6, "| task | questions"), (3, "| file | bytes | sha256")):
        at = next(i for i, line in enumerate(lines) if line.startswith(start))
        assert len(re.findall(r"(?<!\\)\|", lines[at + 2])) == n_columns + 1, lines[at + 2]


def test_a_real_browser_shows_tabs_and_tooltips_and_asks_for_nothing(document: dict[str, Any], tmp_path: Path) -> None:
    """Catches tabs and tooltips that do not work, a script that its own policy blocks, a name that runs, a page wider than a
    phone, and every request but the file's own."""
    executable = find_chromium()
    if executable is None:
        pytest.skip("no Chromium or Chrome on this machine: the page is not opened in a browser (install one, such as Debian's chromium)")
    plain, evil = (write_document(change, tmp_path / name)[2] for name, change in (("plain", document), ("evil", hostile(document))))
    visible = "[...document.querySelectorAll('[role=tabpanel]')].filter(e => e.offsetHeight > 0).map(e => e.id).join()"
    with headless(executable, tmp_path / "profile") as page:
        page.open(plain)
        assert page.run(visible) == "part-quality"
        for tab in ("tokens", "types", "samples", "origin", "quality"):
            page.click(f"#tab-{tab}")
            assert page.run(visible) == f"part-{tab}"
            assert page.run(f"document.getElementById('tab-{tab}').getAttribute('aria-selected')") == "true"
        page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight")
        assert page.run(visible) == "part-tokens"
        page.click("#tab-types")
        page.hover(".map .cell")
        assert page.run("document.getElementById('tip').hidden") is False
        assert page.run("document.getElementById('tip').textContent").startswith("blk.0.attn_q.weight: F32, 32 bits per weight, 32 × 32, 4,096 bytes")
        page.click("#tab-quality")
        page.hover(".mark .target")
        assert "mean KLD" in page.run("document.getElementById('tip').textContent")
        light = page.run("getComputedStyle(document.body).backgroundColor")
        page.open(plain, width=390, height=844, dark=True)
        assert page.run("getComputedStyle(document.body).backgroundColor") != light
        for tab in ("tokens", "types", "samples", "origin", "quality"):
            page.click(f"#tab-{tab}")
            assert page.run("document.documentElement.scrollWidth") <= 390, tab
        page.open(evil)
        page.click("#tab-types")
        page.hover(".map .cell")
        assert "<img src=x onerror=" in page.run("document.getElementById('tip').textContent")
        assert page.run("document.images.length") == 0
        assert page.run("document.title").startswith("2 files against </script>")
        assert page.complaints == []
        assert page.requests == [plain.as_uri(), plain.as_uri(), evil.as_uri()]
