"""general.* keys from README.md, generation_config.json and the folder's name; all of it untrusted."""

from __future__ import annotations

import json
import time
from pathlib import Path

import gguf
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from loopgguf.container import Value, ValueType, plan_layout
from loopgguf.modelcard import read_model_card

CARD = """---
license: [apache-2.0, mit]
license_link: https://example.org/licence
language:
- en
- no
tags: [a, b]
pipeline_tag: text-generation
base_model: org/Base-Model-7B
datasets:
- https://huggingface.co/org/words
---
# license: gpl
"""


def read(folder: Path, card: str | None = None, settings: object = None, name_or_path: object = None) -> tuple[dict[str, object], tuple[str, ...]]:
    folder.mkdir(parents=True, exist_ok=True)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")
    if settings is not None:
        (folder / "generation_config.json").write_text(json.dumps(settings), encoding="utf-8")
    values, notes = read_model_card(folder, name_or_path, 1_500_000)
    plan_layout(values, [])  # must be writable
    return {key: value.data for key, value in values.items()}, notes


def test_keys_of_a_card(tmp_path: Path) -> None:
    """Licence, languages and ancestry must survive; `no` is Norwegian, not false."""
    values, notes = read(tmp_path / "Tiny-Words-2M-Instruct-v1.1", CARD)
    assert values == {
        "general.name": "Tiny Words 2M Instruct v1.1",
        "general.version": "v1.1",
        "general.finetune": "Instruct",
        "general.basename": "Tiny-Words",
        "general.size_label": "2M",
        "general.license": "apache-2.0,mit",
        "general.license.link": "https://example.org/licence",
        "general.base_model.count": 1,
        "general.base_model.0.name": "Base Model 7B",
        "general.base_model.0.organization": "Org",
        "general.base_model.0.repo_url": "https://huggingface.co/org/Base-Model-7B",
        "general.dataset.count": 1,
        "general.dataset.0.name": "Words",
        "general.dataset.0.organization": "Org",
        "general.dataset.0.repo_url": "https://huggingface.co/org/words",
        "general.tags": ["a", "b", "text-generation"],
        "general.languages": ["en", "no"],
    }
    assert notes == ()


def test_without_a_card(tmp_path: Path) -> None:
    """A bare folder still gets a name and a size."""
    assert read(tmp_path / "demo-llama")[0] == {"general.name": "Demo Llama", "general.size_label": "1.5M"}
    assert read(tmp_path / "x", "# no front matter\n")[0]["general.size_label"] == gguf.size_label(1_500_000, 1_500_000, 0, 0)


def test_name_in_the_hub_cache(tmp_path: Path) -> None:
    """Upstream names such a model after its revision, forty hexadecimal digits."""
    folder = tmp_path / "models--org--Tiny-Words-2M" / "snapshots" / "0f3c9a"
    values, _ = read(folder)
    assert (values["general.name"], values["general.organization"]) == ("Tiny Words 2M", "Org")


def test_sampling_settings(tmp_path: Path) -> None:
    """Recommended samplers keep their exact types; one of a wrong type is left out and said."""
    folder = tmp_path / "m"
    values, notes = read(folder, settings={"temperature": 1, "top_k": 20, "top_p": 0.5, "repetition_penalty": 1.25, "min_p": "low", "mirostat": 2.5})
    sampling = {key: value for key, value in values.items() if ".sampling." in key}
    assert list(sampling.items()) == [
        ("general.sampling.top_k", 20),
        ("general.sampling.top_p", 0.5),
        ("general.sampling.temp", 1.0),
        ("general.sampling.penalty_repeat", 1.25),
    ]
    types = read_model_card(folder, None, 1)[0]
    assert types["general.sampling.top_k"] == Value(ValueType.INT32, 20) and types["general.sampling.temp"].type is ValueType.FLOAT32
    assert [note.split(":")[1].strip() for note in notes] == ["general.sampling.min_p is not carried", "general.sampling.mirostat is not carried"]


@pytest.mark.parametrize("raw", [b"{", b"[]", b"\xff", b"[" * 100_000])
def test_broken_generation_config(tmp_path: Path, raw: bytes) -> None:
    """Sampler hints do not stop a conversion, and their loss is said."""
    (tmp_path / "generation_config.json").write_bytes(raw)
    assert read_model_card(tmp_path, None, 1)[1] == ("generation_config.json is not carried: not a JSON object",)


@pytest.mark.parametrize(
    ("front", "message"),
    [
        ("license: [a", "not valid YAML"),
        ("a: !!python/object/apply:os.system ['true']", "not valid YAML"),
        ("version: 2024-99-99", "not valid YAML"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("- a\n- b", "got a list"),
        ("license: 7", "general.license is not carried: got 7"),
        ("author: {a: b}", "general.author is not carried"),
        ('author: "\\ud800"', "general.author is not carried"),
        ("tags: [a, 7]", "an entry of general.tags is not carried: got 7"),
        ("base_model: [{name: 7}]", "general.base_model.0.name is not carried"),
        ("[" * 20_000, "not valid YAML"),
    ],
)
def test_hostile_cards(tmp_path: Path, front: str, message: str) -> None:
    """A README from the internet runs nothing, stops nothing and loses nothing silently."""
    values, notes = read(tmp_path / "Model", f"---\n{front}\n---\n")
    assert len(notes) == 1 and message in notes[0] and "\n" not in notes[0] and len(notes[0]) < 300
    assert values["general.name"] == "Model"


def test_aliases_do_not_explode(tmp_path: Path) -> None:
    """Nine lines of aliases stand for a billion strings; printing one of them would take all memory."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    started = time.monotonic()
    read(tmp_path / "m", "---\n" + "\n".join(lines) + "\nlicense: *a9\nbase_model: *a9\n---\n")
    assert time.monotonic() - started < 5


def test_endless_front_matter(tmp_path: Path) -> None:
    """A front matter of gigabytes is not read; the rest of the README never is."""
    assert "does not end" in read(tmp_path / "m", "---\n" + "tags: [a]\n" * 100_000)[1][0]


_SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["org/Name-7B-chat", "https://huggingface.co/a/b", "-/-", "/"])
)
_FIELDS = st.sampled_from(["name", "license", "tags", "language", "base_model", "datasets", "version", "model_type", "size_label", "finetune", "url"])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(card=st.dictionaries(_FIELDS, _SCALARS | st.lists(_SCALARS, max_size=3) | st.dictionaries(_FIELDS, _SCALARS, max_size=2)), name=_SCALARS)
def test_any_card_gives_writable_keys(tmp_path: Path, card: dict[str, object], name: object) -> None:
    """Whatever types a card has, the keys can be written and nothing is raised (JSON is YAML)."""
    read(tmp_path / "m", f"---\n{json.dumps(card)}\n---\n", name_or_path=name)
