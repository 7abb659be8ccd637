"""Strict reading of JSON files."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from loopgguf.documents import load_json, parse_json, read_whole
from loopgguf.errors import InputError


def test_json_files(tmp_path: Path) -> None:
    """Hostile JSON ends in one line, whatever the parser raises for it."""
    path = tmp_path / "config.json"
    for raw in (b"[" * 100_000, b"{", b"\xff\xfe{\x00}\x00", b'{"a": ' + b"9" * 10_000 + b"}", b'{"a":1,"a":2}', b"null"):
        path.write_bytes(raw)
        with pytest.raises(InputError, match=r"malformed JSON in .*config\.json"):
            load_json(path)
    with pytest.raises(InputError, match="cannot read"):
        load_json(tmp_path / "none.json")


def test_what_never_ends_is_not_read(tmp_path: Path) -> None:
    """Would catch an index that is a link to /dev/zero, which takes all memory, and a limit that looks at the size alone."""
    (tmp_path / "index.json").symlink_to("/dev/zero")
    for path in (tmp_path / "index.json", tmp_path):
        with pytest.raises(InputError, match="got a folder or a device, expected a file"):
            load_json(path)
    (tmp_path / "a.json").write_bytes(b"0123456789")
    assert read_whole(tmp_path / "a.json", 10) == b"0123456789"
    with pytest.raises(InputError, match="got more than 9 bytes"):
        read_whole(tmp_path / "a.json", 9)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    """Would catch "malformed JSON" for a clone without its large files: the user is to run `git lfs pull`."""
    (tmp_path / "config.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"config\.json is a git-lfs pointer"):
        load_json(tmp_path / "config.json")


def test_key_twice_is_found_in_linear_time() -> None:
    """Would catch a search that is quadratic in the number of keys: minutes for a hostile header of a few MB."""
    names = [f'"{i}":0' for i in range(100_000)]
    start = time.monotonic()
    with pytest.raises(ValueError, match="'99999' twice"):
        parse_json("{" + ",".join([*names, names[-1]]) + "}")
    assert time.monotonic() - start < 10
