"""A YAML or JSON file of intent → a frozen Profile: which type a tensor of this role, in this layer, should have.

Checks every key and value and explains what it does not know; does not look at any model (`planner` applies the rules).
Only `yaml.safe_load`-style parsing, of small files. The shipped profiles lie in `loopgguf/profiles/`.
"""

from __future__ import annotations

import math
import re
import warnings
from collections import Counter
from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import yaml

from loopgguf.architectures import tensor_role
from loopgguf.errors import UsageError
from loopgguf.formats import FORMATS, GgmlType, parse_type
from loopgguf.presets import PRESETS, find_preset

PROFILE_FOLDER = Path(__file__).parent / "profiles"
MAX_PROFILE_BYTES = 64 * 1024

ROLES = (
    *("token_embd", "output", "attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "attn_gate"),
    *("attn_q_a", "attn_q_b", "attn_kv_a_mqa", "attn_kv_b", "attn_k_b", "attn_v_b", "ffn_gate", "ffn_up", "ffn_down"),
)
_PROFILE_KEYS = ("name", "description", "file_type", "default", "types", "protect_super_weights", "rules")
_RULE_KEYS = ("role", "layers", "match", "type", "floor", "ceiling")
_LAYER_KEYS = ("first", "last")

Extent = int | Fraction  # so many layers, or this part of them


@dataclass(frozen=True)
class Layers:
    """Which layers a rule is about: the `first` and the `last` ones, and closed ranges of numbers from 0."""

    first: Extent = 0
    last: Extent = 0
    ranges: tuple[tuple[int, int], ...] = ()

    def contains(self, layer: int, n_layer: int) -> bool:
        """Tell whether `layer` is meant; a part of the layers is rounded up, so that it is never none."""
        first, last = (math.ceil(extent * n_layer) if isinstance(extent, Fraction) else extent for extent in (self.first, self.last))
        return layer < first or layer >= n_layer - last or any(start <= layer <= stop for start, stop in self.ranges)


@dataclass(frozen=True)
class Rule:
    """Gives `type` to the tensors that meet all of its conditions; an empty condition is met by all.

    Without a `type` it bounds the types that a plan by size may choose: none of fewer bits than `floor`, none of more
    than `ceiling`; all such rules that apply count.

    A role also covers the experts and the shared expert (`ffn_down` → `ffn_down_exps`, `ffn_down_shexp`), `token_embd`
    the per-layer embeddings too.
    """

    type: GgmlType | None
    roles: tuple[str, ...] = ()
    layers: Layers | None = None
    match: str = ""
    floor: GgmlType | None = None
    ceiling: GgmlType | None = None

    def applies(self, name: str, n_layer: int, *, is_tied: bool) -> bool:
        """Tell whether the rule is about this tensor of a model of `n_layer` layers. Tied token embeddings are the output too."""
        role = tensor_role(name)
        kind = role.kind.removesuffix("_exps").removesuffix("_shexp")
        kinds = {kind, "output"} if is_tied and kind == "token_embd" else {kind.removeprefix("per_layer_")}
        if self.roles and kinds.isdisjoint(self.roles):
            return False
        if self.layers is not None and (role.layer is None or not self.layers.contains(role.layer, n_layer)):
            return False
        return re.search(self.match, name) is not None

    def __str__(self) -> str:
        roles = "/".join(self.roles[:3]) + ("/…" if len(self.roles) > 3 else "")
        parts = [roles, "some layers" if self.layers else "", self.match]
        return " ".join(part for part in parts if part) or "all"


@dataclass(frozen=True)
class Profile:
    """An intent by rules: the first with a type that applies decides, else `default`; `file_type` goes to `general.file_type`.

    types: the only ones that a plan by size may choose from; empty: all that are worth it. protect_super_weights: as if
    it had been asked for.
    """

    name: str
    description: str
    rules: tuple[Rule, ...]
    default: GgmlType
    file_type: int
    types: tuple[GgmlType, ...] = ()
    protect_super_weights: bool = False


# --- parsing ----------------------------------------------------------------------------------------------------------


def _show(value: object) -> str:
    """Return a short text of a scalar, or the name of a container's type: never a hostile file's megabytes."""
    return repr(value)[:60] if isinstance(value, str | int | float | bool | None) else f"a {type(value).__name__}"


def _check_keys(data: object, known: Collection[str], where: str) -> Mapping[str, object]:
    if not isinstance(data, dict):
        raise UsageError(f"{where}: got {_show(data)}, expected a mapping with the keys {', '.join(known)}")
    for key in data:
        if key not in known:
            raise UsageError(f"unknown key in {where}: got {_show(key)}, expected one of {', '.join(known)}")
    return data


def _text(data: Mapping[str, object], key: str, where: str, default: str | None = None) -> str:
    value = data.get(key, default)
    if not isinstance(value, str):
        raise UsageError(f"{key} in {where}: got {_show(value)}, expected a text")
    return value


def _type(data: Mapping[str, object], key: str, where: str) -> GgmlType:
    try:
        return parse_type(_text(data, key, where))
    except UsageError as error:
        raise UsageError(f"{key} in {where}: {error}") from None


def _flag(data: Mapping[str, object], key: str, where: str) -> bool:
    value = data.get(key, False)
    if not isinstance(value, bool):
        raise UsageError(f"{key} in {where}: got {_show(value)}, expected true or false")
    return value


def _types(value: object, where: str) -> tuple[GgmlType, ...]:
    if not isinstance(value, list):
        raise UsageError(f"types in {where}: got {_show(value)}, expected a list of ggml types such as [IQ4_XS, Q5_K, Q6_K]")
    types = tuple(_type({"types": item}, "types", where) for item in value)
    twice = next((t for t in types if types.count(t) > 1), None)
    if twice is not None:
        raise UsageError(f"types in {where}: got {twice.name} twice, expected each once. Remove one")
    return types


def _extent(value: object, where: str) -> Extent:
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    match = re.fullmatch(r"(\d{1,5})(?:/(\d{1,5}))?", text)
    if match and match[2] is None:
        return int(match[1])
    if match and 0 < int(match[1]) <= int(match[2]):
        return Fraction(int(match[1]), int(match[2]))
    raise UsageError(f"layers in {where}: got {_show(value)}, expected a count such as 2 or a part such as 1/8")


def _range(value: object, where: str) -> tuple[int, int]:
    text = str(value) if isinstance(value, str | int) and not isinstance(value, bool) else ""
    match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", text)
    start, stop = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if start > stop:
        raise UsageError(f"layers in {where}: got {_show(value)}, expected a number, a range such as 0-3, a list of them, or first: and last:")
    return start, stop


def _layers(value: object, where: str) -> Layers:
    if isinstance(value, dict):
        keys = _check_keys(value, _LAYER_KEYS, f"layers of {where}")
        return Layers(first=_extent(keys.get("first", 0), where), last=_extent(keys.get("last", 0), where))
    items = value if isinstance(value, list) else [value]
    return Layers(ranges=tuple(_range(item, where) for item in items))


def _roles(value: object, where: str) -> tuple[str, ...]:
    items = value if isinstance(value, list) else [value]
    for item in items:
        if item not in ROLES:
            raise UsageError(f"role in {where}: got {_show(item)}, expected one of {', '.join(ROLES)}. For other tensors use match: with a regular expression")
    return tuple(items)


def check_regex(pattern: str, where: str) -> str:
    """Return `pattern` if Python's `re` accepts it, else raise UsageError saying where and why it does not."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # a pattern that a later Python will read otherwise
            re.compile(pattern)
    except (re.error, OverflowError, RecursionError, FutureWarning) as error:
        raise UsageError(f"bad regular expression in {where}: got {pattern[:80]!r}: {error}") from None
    return pattern


def _rule(data: object, where: str) -> Rule:
    keys = _check_keys(data, _RULE_KEYS, where)
    verdict = keys.keys() & {"type", "floor", "ceiling"}
    if keys.keys() <= {"type"}:
        raise UsageError(f"{where}: got no condition, expected role, layers or match. A type for all tensors is the profile's default")
    if "type" in verdict and len(verdict) > 1:
        raise UsageError(f"{where}: got {', '.join(sorted(verdict))}, expected a type, or a floor and a ceiling for plans by size. Make two rules of it")
    floor, ceiling = (_type(keys, key, where) if key in keys else None for key in ("floor", "ceiling"))
    if floor is not None and ceiling is not None and FORMATS[floor].bpw > FORMATS[ceiling].bpw:
        raise UsageError(f"{where}: got the floor {floor.name} above the ceiling {ceiling.name}, expected it at or below. Swap them")
    return Rule(
        type=None if verdict and "type" not in verdict else _type(keys, "type", where),
        roles=_roles(keys["role"], where) if "role" in keys else (),
        layers=_layers(keys["layers"], where) if "layers" in keys else None,
        match=check_regex(_text(keys, "match", where, ""), where),
        floor=floor,
        ceiling=ceiling,
    )


def _file_type(label: str, where: str) -> int:
    try:
        return find_preset(label).file_type
    except UsageError:
        raise UsageError(f"file_type in {where}: got {label[:60]!r}, expected the preset that the profile is nearest to: {', '.join(PRESETS)}") from None


class _Loader(yaml.SafeLoader):
    """The safe loader, which besides refuses a key given twice; PyYAML would silently keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, object]:
        counts = Counter(key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode))
        twice = next((key for key, n in counts.items() if n > 1), None)
        if twice is not None:
            raise yaml.YAMLError(f"key {twice[:60]!r} twice in one mapping")
        return super().construct_mapping(node, deep=deep)


def parse_profile(text: str, where: str, name: str = "") -> Profile:
    """Return the profile that `text`, YAML or JSON, describes; `where` names it in errors, `name` is used if it gives none.

    Raises UsageError for anything unknown, contradictory or malformed, naming the key and what is known.
    """
    try:
        data = yaml.load(text, _Loader)  # a SafeLoader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UsageError(f"cannot parse {where}: {reason}. Expected YAML or JSON with the keys {', '.join(_PROFILE_KEYS)}") from None
    keys = _check_keys(data, _PROFILE_KEYS, where)
    rules = keys.get("rules", [])
    if not isinstance(rules, list):
        raise UsageError(f"rules in {where}: got {_show(rules)}, expected a list of mappings with the keys {', '.join(_RULE_KEYS)}")
    default = _type(keys, "default", where)
    return Profile(
        name=_text(keys, "name", where, name),
        description=_text(keys, "description", where, ""),
        rules=tuple(_rule(rule, f"rule {i} of {where}") for i, rule in enumerate(rules, 1)),
        default=default,
        file_type=_file_type(_text(keys, "file_type", where, default.name), where),
        types=_types(keys.get("types", []), where),
        protect_super_weights=_flag(keys, "protect_super_weights", where),
    )


def profile_names() -> list[str]:
    """Return the names of the shipped profiles."""
    return sorted(path.stem for path in PROFILE_FOLDER.glob("*.yaml"))


def load_profile(name_or_path: str | Path) -> Profile:
    """Return the shipped profile of that name, or the one in that YAML or JSON file.

    Raises UsageError when there is neither, the file is too large or no UTF-8, or its content is not a profile.
    """
    shipped = str(name_or_path) in profile_names()
    path = PROFILE_FOLDER / f"{name_or_path}.yaml" if shipped else Path(name_or_path)
    if not path.is_file():
        raise UsageError(f"unknown profile: got {str(name_or_path)!r}, expected one of {', '.join(profile_names())} or the path of a YAML or JSON file")
    where = f"profile {name_or_path}"
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_PROFILE_BYTES + 1)
        text = raw.decode("utf-8")
    except OSError as error:
        raise UsageError(f"cannot read {where}: {error.strerror}") from error
    except UnicodeDecodeError:
        raise UsageError(f"{where}: got bytes that are no text, expected UTF-8") from None
    if len(raw) > MAX_PROFILE_BYTES:
        raise UsageError(f"{where}: got more than {MAX_PROFILE_BYTES} bytes, expected a small file of rules")
    return parse_profile(text, where, path.stem)
