"""The JSON files of a checkpoint folder, read strictly: bounded, UTF-8, no key twice. What a key means is told elsewhere."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

from loopgguf.container import refuse_pointer
from loopgguf.errors import InputError

JsonObject = dict[str, object]

MAX_JSON_BYTES = 100_000_000


def _unique(pairs: list[tuple[str, object]]) -> JsonObject:
    result = dict(pairs)
    if len(result) != len(pairs):
        counts = Counter(name for name, _ in pairs)
        raise ValueError(f"{next(name for name, n in counts.items() if n > 1)!r:.80} twice")
    return result


def parse_json(text: str) -> object:
    """Return what `text` spells. Raises ValueError when it is no JSON, is nested too deeply, or names a key twice."""
    try:
        return json.loads(text, object_pairs_hook=_unique)  # numbers of thousands of digits are ValueErrors too
    except RecursionError as error:
        raise ValueError(str(error)) from error


def parse_object(raw: bytes, where: str) -> JsonObject:
    """Return the JSON object in `raw`; `where` names it in the InputError raised when it is no such thing."""
    try:
        parsed = parse_json(raw.decode("utf-8"))
    except ValueError as error:  # broken UTF-8 too
        raise InputError(f"malformed JSON in {where}: got {error!s:.120}, expected a JSON object. Download the file again") from error
    if not isinstance(parsed, dict):
        raise InputError(f"malformed JSON in {where}: got a {type(parsed).__name__}, expected an object. Download the file again")
    return parsed


def read_whole(path: Path, max_bytes: int) -> bytes:
    """Return the bytes of a small file. Raises InputError when it cannot be read, is no file (a device never ends), larger
    than `max_bytes`, or a git-lfs pointer."""
    try:
        if path.exists() and not path.is_file():
            raise InputError(f"cannot read {path}: got a folder or a device, expected a file. Check the path")
        with path.open("rb") as stream:
            raw = stream.read(max_bytes + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}. Check the path and its permissions") from error
    if len(raw) > max_bytes:
        raise InputError(f"{path} is too large: got more than {max_bytes} bytes, expected at most that. Check that it is the right file")
    refuse_pointer(path, raw)
    return raw


def load_json(path: Path) -> JsonObject:
    """Return the JSON object in `path`. Raises InputError as `read_whole`, and when it is no UTF-8 JSON object or names a key twice."""
    return parse_object(read_whole(path, MAX_JSON_BYTES), str(path))
