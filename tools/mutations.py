"""Mutations of valid files that keep most of their structure, so that most mutants get past the first checks.

Pure functions of a random generator (`random.Random`, or hypothesis's) and a seed: of bytes, of a tree as JSON holds it,
and of binary files as a list of fields, whose lengths and counts then lie. Knows no parser; `fuzz_targets.py` has the seeds.
"""

from __future__ import annotations

import copy
import json
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any

INTEGERS = (-(2**63), -(2**31), -1, 0, 1, 2, 3, 7, 8, 31, 32, 63, 64, 127, 128, 255, 256, 4096, 65535, 2**20, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**53, 2**62)
INTEGERS += (2**63 - 1, 2**63, 2**64 - 32, 2**64 - 1)
FLOATS = (float("nan"), float("inf"), float("-inf"), -0.0, -1.0, 0.5, 1e-45, 65504.0, 65520.0, 1e30, 3.4e38)
TEXTS = ("", " ", "a", "\0", "\n", "\x1b[31m", "é", "漢字", "\ud800", "../x", "/etc/passwd", "a" * 300, "blk.0.attn_q.weight", "Q4_K", "-1", "1/0")
_TOKENS = (b"\0", b"\xff", b"\xff" * 4, b'"', b"{", b"[", b"]", b"}", b",", b":", b"\\u", b"\n", b"null", b"NaN", b"1e999", b"&a", b"*a", b"\xef\xbb\xbf")


# --- bytes --------------------------------------------------------------------------------------------------------------


def _spot(rng: Random, raw: bytes) -> int:
    return rng.randrange(len(raw) + 1)


def _flip(rng: Random, raw: bytes) -> bytes:
    at = _spot(rng, raw)
    return raw[:at] + bytes((raw[at] ^ 1 << rng.randrange(8),)) + raw[at + 1 :] if at < len(raw) else raw


def _overwrite(rng: Random, raw: bytes) -> bytes:
    at, size = _spot(rng, raw), rng.choice((1, 2, 4, 8))
    number = rng.choice(INTEGERS) % 256**size
    return raw[:at] + number.to_bytes(size, "little") + raw[at + size :]


def _insert(rng: Random, raw: bytes) -> bytes:
    at = _spot(rng, raw)
    return raw[:at] + rng.choice(_TOKENS) * rng.choice((1, 1, 1, 64)) + raw[at:]


def _cut_out(rng: Random, raw: bytes) -> bytes:
    at = _spot(rng, raw)
    return raw[:at] + raw[at + rng.choice((1, 2, 4, 8, 32)) :]


def _repeat(rng: Random, raw: bytes) -> bytes:
    at, size, to = _spot(rng, raw), rng.choice((1, 4, 8, 32, 128)), _spot(rng, raw)
    return raw[:to] + raw[at : at + size] + raw[to:]


def _truncate(rng: Random, raw: bytes) -> bytes:
    return raw[: _spot(rng, raw)]


_BYTE_EDITS: Sequence[Callable[[Random, bytes], bytes]] = (_flip, _flip, _overwrite, _overwrite, _insert, _cut_out, _repeat, _truncate)


def mutate_bytes(rng: Random, raw: bytes) -> bytes:
    """Return `raw` with one to three small changes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        raw = rng.choice(_BYTE_EDITS)(rng, raw)
    return raw


def mutate_text(rng: Random, text: str) -> str:
    """Return another text: a strange one, or this one with a change."""
    if rng.random() < 0.5:
        return rng.choice(TEXTS)
    at = rng.randrange(len(text) + 1)
    return text[:at] + rng.choice(TEXTS) + text[at + rng.choice((0, 1, 4)) :]


# --- trees --------------------------------------------------------------------------------------------------------------


def _nest(rng: Random) -> object:
    nested: object = 0
    for _ in range(rng.choice((3, 200))):
        nested = [nested]
    return nested


def _strange_value(rng: Random) -> object:
    kinds: Sequence[Callable[[], object]] = (
        lambda: None,
        lambda: rng.random() < 0.5,
        lambda: rng.choice(INTEGERS),
        lambda: rng.choice(INTEGERS),
        lambda: rng.choice(FLOATS),
        lambda: rng.choice(TEXTS),
        lambda: rng.choice(TEXTS),
        lambda: rng.choice(([], {}, [None], [[]], {"": 0}, {"a": {"b": []}})),
        lambda: _nest(rng),
    )
    return rng.choice(kinds)()


def _parents(tree: object) -> list[Any]:
    """Return all objects and lists in a tree that are not empty."""
    found, rest = [], [tree]
    while rest:
        node = rest.pop()
        if isinstance(node, dict | list) and node:
            found.append(node)
            rest += node.values() if isinstance(node, dict) else node
    return found


def _mutate_value(rng: Random, value: object) -> object:
    if isinstance(value, bool) or rng.random() < 0.3:
        return _strange_value(rng)
    if isinstance(value, int):
        return rng.choice((value + 1, value - 1, -value, value * 2, str(value), float(value), rng.choice(INTEGERS)))
    if isinstance(value, float):
        return rng.choice((value * 2, -value, str(value), *FLOATS))
    if isinstance(value, str):
        return mutate_text(rng, value)
    return _strange_value(rng)


def _edit_object(rng: Random, node: dict[str, Any]) -> None:
    key, edit = rng.choice(list(node)), rng.randrange(6)
    if edit == 0:
        del node[key]
    elif edit == 1:
        node[mutate_text(rng, key)] = node.pop(key)
    elif edit == 2:
        node[mutate_text(rng, key)] = copy.deepcopy(node[key])
    else:
        node[key] = _mutate_value(rng, node[key])


def _edit_list(rng: Random, node: list[Any]) -> None:
    at, edit = rng.randrange(len(node)), rng.randrange(6)
    if edit == 0:
        del node[at]
    elif edit == 1:
        node.insert(at, copy.deepcopy(node[at]))
    elif edit == 2:
        other = rng.randrange(len(node))
        node[at], node[other] = node[other], node[at]
    else:
        node[at] = _mutate_value(rng, node[at])


def mutate_tree(rng: Random, tree: Any) -> Any:
    """Return a copy of a tree of objects, lists and scalars with one to three nodes changed, added, renamed or gone."""
    tree = copy.deepcopy(tree)
    for _ in range(rng.choice((1, 1, 2, 3))):
        parents = _parents(tree)
        if not parents:
            return _strange_value(rng)
        node = rng.choice(parents)
        (_edit_object if isinstance(node, dict) else _edit_list)(rng, node)
    return tree


_PAIR = re.compile(r'"[^"]*": [^,{}\[\]]*, ')


def spell_json(rng: Random, tree: object) -> bytes:
    """Return a tree as JSON, now and then with a key given twice or a broken byte."""
    text = json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    pairs = _PAIR.findall(text) if rng.random() < 0.05 else ()
    if pairs:
        pair = rng.choice(pairs)
        text = text.replace(pair, pair * 2, 1)
    raw = text.encode("utf-8", "surrogatepass")
    return mutate_bytes(rng, raw) if rng.random() < 0.1 else raw


# --- fields of binary files ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """A part of a binary file. kind: a number's struct format; "text" with a length before it, in the format `length`;
    "raw" bytes; "pad", zeros up to a multiple of `value`."""

    kind: str
    value: Any
    length: str = "<Q"


def _pack_number(kind: str, value: int | float) -> bytes:
    if kind[-1] in "fd":
        return struct.pack(kind, value)
    size = struct.calcsize(kind)
    return (int(value) % 256**size).to_bytes(size, "little")


def pack(fields: Sequence[Field]) -> bytes:
    """Return the bytes of a file."""
    raw = b""
    for field in fields:
        if field.kind == "pad":
            raw += bytes(-len(raw) % field.value)
        elif field.kind == "raw":
            raw += field.value
        elif field.kind == "text":
            raw += _pack_number(field.length, len(field.value)) + field.value
        else:
            raw += _pack_number(field.kind, field.value)
    return raw


def _mutate_field(rng: Random, field: Field) -> Field:
    if field.kind == "pad":
        return replace(field, value=rng.choice((1, 8, 64)))
    if field.kind == "raw":
        return replace(field, value=mutate_bytes(rng, field.value))
    if field.kind == "text":
        if rng.random() < 0.3:  # a length that is not the text's
            return Field("raw", _pack_number(field.length, rng.choice((*INTEGERS, len(field.value) + 1))) + field.value)
        return replace(field, value=mutate_text(rng, field.value.decode("utf-8", "replace")).encode("utf-8", "surrogatepass"))
    if field.kind[-1] in "fd":
        return replace(field, value=rng.choice(FLOATS))
    return replace(field, value=rng.choice((field.value + 1, field.value - 1, *INTEGERS)))


def mutate_fields(rng: Random, fields: Sequence[Field]) -> bytes:
    """Return the bytes of a file with one or two fields changed, doubled, gone or in another place, now and then bytes too."""
    fields = list(fields)
    for _ in range(rng.choice((1, 1, 2))):
        at, edit = rng.randrange(len(fields)), rng.randrange(12)
        if edit == 0 and len(fields) > 1:
            del fields[at]
        elif edit == 1:
            fields.insert(at, fields[at])
        elif edit == 2:
            other = rng.randrange(len(fields))
            fields[at], fields[other] = fields[other], fields[at]
        else:
            fields[at] = _mutate_field(rng, fields[at])
    raw = pack(fields)
    return mutate_bytes(rng, raw) if rng.random() < 0.1 else raw
