"""What a checkpoint folder says about itself → `general.*` keys: README front matter, folder name, generation settings.

The heuristics (a name's parts, base models, size labels) are those of gguf-py's `Metadata`, which llama.cpp's converter
uses; here its input is read safely and its output is checked. None of it decides how the model computes, so what cannot
be carried is left out and said in a note, never an error. Nothing else of the README is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

from loopgguf.container import Value, ValueType, array, string, uint32
from loopgguf.documents import load_json
from loopgguf.errors import InputError

MAX_FRONT_MATTER_BYTES = 1 << 18

# Metadata's attribute → key, in the converter's order
_AUTHORSHIP = {name: f"general.{name}" for name in ("name", "author", "version", "organization", "finetune", "basename", "description", "quantized_by")}
_ORIGIN = {
    "size_label": "general.size_label",
    "license": "general.license",
    "license_name": "general.license.name",
    "license_link": "general.license.link",
    **{name: f"general.{name}" for name in ("url", "doi", "uuid", "repo_url")},
    **{f"source_{name}": f"general.source.{name}" for name in ("url", "doi", "uuid", "repo_url")},
}
_LISTS = {"base_models": "general.base_model", "datasets": "general.dataset"}
_LIST_FIELDS = ("name", "author", "version", "organization", "description", "url", "doi", "uuid", "repo_url")

# generation_config.json's key → general.sampling.*, in the converter's order; the first of several names wins
_SAMPLING: tuple[tuple[str, ValueType, tuple[str, ...]], ...] = (
    ("sequence", ValueType.STRING, ("sequence",)),
    ("top_k", ValueType.INT32, ("top_k",)),
    ("top_p", ValueType.FLOAT32, ("top_p",)),
    ("min_p", ValueType.FLOAT32, ("min_p",)),
    ("xtc_probability", ValueType.FLOAT32, ("xtc_probability",)),
    ("xtc_threshold", ValueType.FLOAT32, ("xtc_threshold",)),
    ("temp", ValueType.FLOAT32, ("temperature",)),
    ("penalty_last_n", ValueType.INT32, ("penalty_last_n",)),
    ("penalty_repeat", ValueType.FLOAT32, ("penalty_repeat", "repetition_penalty")),
    ("mirostat", ValueType.INT32, ("mirostat",)),
    ("mirostat_tau", ValueType.FLOAT32, ("mirostat_tau",)),
    ("mirostat_eta", ValueType.FLOAT32, ("mirostat_eta",)),
)


def _is_text(value: object) -> bool:
    """Tell whether a value is text that a GGUF can hold (JSON and YAML can spell lone surrogates)."""
    return isinstance(value, str) and value.encode("utf-8", "replace").decode() == value


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and -(2**31) <= value < 2**31


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


_IS_TYPE: Mapping[ValueType, Callable[[object], bool]] = {ValueType.STRING: _is_text, ValueType.INT32: _is_integer, ValueType.FLOAT32: _is_number}


class _Keys:
    """Collects keys and, for each value of a wrong type, a note."""

    def __init__(self, file_name: str) -> None:
        self.file_name = file_name
        self.values: dict[str, Value] = {}
        self.notes: list[str] = []

    def skip(self, what: str, got: object) -> None:
        self.notes.append(f"{self.file_name}: {what} is not carried: got {got!r:.60}")

    def text(self, key: str, value: object) -> None:
        """Keep a text; nothing at all for a missing or empty one, as the converter does."""
        if value is None or value == "":
            return
        if _is_text(value):
            self.values[key] = string(str(value))
        else:
            self.skip(key, value)

    def texts(self, key: str, values: object) -> None:
        items = values if isinstance(values, list) else []
        kept = [item for item in items if _is_text(item)]
        for item in items:
            if not _is_text(item):
                self.skip(f"an entry of {key}", item)
        if kept:
            self.values[key] = array(ValueType.STRING, kept)

    def typed(self, key: str, value_type: ValueType, value: object) -> None:
        if value is None or value == "":
            return
        if _IS_TYPE[value_type](value):
            self.values[key] = Value(value_type, float(value) if value_type is ValueType.FLOAT32 else value)  # type: ignore[arg-type]
        else:
            self.skip(key, value)


class _Loader(yaml.SafeLoader):
    """Plain data only, and no aliases: a few lines of them can stand for gigabytes."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("it has aliases")
        return super().compose_node(parent, index)


def _read_front_matter(folder: Path) -> tuple[dict[str, object], str]:
    """Return the YAML mapping at the head of README.md, empty if there is none, and a note when it cannot be read."""
    path = folder / "README.md"
    if not path.is_file():
        return {}, ""
    with path.open("rb") as stream:
        raw = stream.read(MAX_FRONT_MATTER_BYTES)
    lines = raw.decode("utf-8", "replace").splitlines()
    if not lines or lines[0] != "---":
        return {}, ""
    if "---" not in lines[1:]:
        return {}, f"README.md: front matter is not carried: it does not end within {MAX_FRONT_MATTER_BYTES} bytes"
    # `- no` is Norwegian here, not false; tabs are a common slip
    text = "".join(f"{line}\n" for line in lines[1 : lines.index("---", 1)]).replace("- no\n", '- "no"\n').replace("\t", "  ")
    try:
        card = yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # impossible dates are ValueErrors
        return {}, f"README.md: front matter is not carried: not valid YAML ({' '.join(str(error).split())[:80]})"
    if card is None:
        return {}, ""
    if not isinstance(card, dict):
        return {}, f"README.md: front matter is not carried: got a {type(card).__name__}, expected a mapping"
    return card, ""


def _hub_id(folder: Path) -> str | None:
    """Return `organization/name` of a folder in the Hub's cache (`models--org--name/snapshots/REVISION`)."""
    parts = folder.parent.parent.name.split("--")
    return "/".join(parts[1:]) if folder.parent.name == "snapshots" and parts[0] == "models" and len(parts) == 3 else None


def _authorship(keys: _Keys, card: dict[str, object], folder: Path, name_or_path: object, n_parameters: int) -> None:
    import gguf

    hub_id = _hub_id(folder)
    model_id = hub_id if hub_id is not None else name_or_path
    found = gguf.Metadata.apply_metadata_heuristic(
        gguf.Metadata(), card, {"_name_or_path": model_id} if _is_text(model_id) else None, None if hub_id else folder, n_parameters
    )
    if found.name is None:
        found.name = folder.name
    if found.size_label is None:
        found.size_label = gguf.size_label(n_parameters, n_parameters, 0, 0)
    if isinstance(found.license, list):
        found.license = ",".join(str(item) for item in found.license)
    for attribute, key in (_AUTHORSHIP | _ORIGIN).items():
        keys.text(key, getattr(found, attribute))
    for attribute, key in _LISTS.items():
        _entries(keys, key, getattr(found, attribute))
    keys.texts("general.tags", found.tags)
    keys.texts("general.languages", found.languages)


def _entries(keys: _Keys, key: str, entries: list[object] | None) -> None:
    """Keep the base models or data sets: their count and what is known of each."""
    if entries is None:
        return
    keys.values[f"{key}.count"] = uint32(len(entries))
    for i, entry in enumerate(entries):
        for field in _LIST_FIELDS:
            keys.text(f"{key}.{i}.{field}", entry.get(field) if isinstance(entry, dict) else None)


def _sampling(folder: Path) -> _Keys:
    keys = _Keys("generation_config.json")
    path = folder / keys.file_name
    if not path.is_file():
        return keys
    try:
        settings = load_json(path)
    except InputError:
        keys.notes.append(f"{keys.file_name} is not carried: not a JSON object")
        return keys
    for name, value_type, spellings in _SAMPLING:
        keys.typed(f"general.sampling.{name}", value_type, next((settings[s] for s in spellings if s in settings), None))
    return keys


def read_model_card(folder: Path, name_or_path: object, n_parameters: int) -> tuple[dict[str, Value], tuple[str, ...]]:
    """Return the `general.*` keys about a checkpoint's origin, in the converter's order, and a note for each thing left out.

    folder: the checkpoint's, resolved. name_or_path: `_name_or_path` of config.json or None. n_parameters: weights in
    all tensors. Upstream names a model in the Hub's cache by its revision; here it gets the repository's name.
    """
    sampling = _sampling(folder)
    keys = _Keys("README.md")
    card, note = _read_front_matter(folder)
    _authorship(keys, card, folder, name_or_path, n_parameters)
    return sampling.values | keys.values, (*sampling.notes, *((note,) if note else ()), *keys.notes)
