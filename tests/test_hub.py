"""hub.py: files of data sets, chosen by name and fetched through huggingface_hub from a server that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from loopgguf.errors import InputError, UsageError
from loopgguf.hub import SHORT_NAMES, Reference, choose_files, parse_reference

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_loopback"


def rows(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


DATASETS: dict[str, dict[str, bytes]] = {
    "owner/plain": {
        "README.md": b"# x",
        "data/train-00000-of-00002.jsonl": rows("one"),
        "data/train-00001-of-00002.jsonl": rows("two"),
        "data/test-0.jsonl": rows("t"),
    },
    "owner/many": {"en/train.jsonl": rows("hello"), "de/train.jsonl": rows("hallo"), "de/validation.jsonl": rows("pruefung")},
    "owner/gated": {"train.jsonl": rows("secret")},
    "owner/hostile": {"../../train.jsonl": rows("x")},
    "owner/broken": {"train.jsonl": b""},
}


class Hub(BaseHTTPRequestHandler):
    """/api/datasets/NAME[/revision/R] lists, /datasets/NAME/resolve/R/FILE gives; as huggingface.co answers."""

    def log_message(self, *_: Any) -> None:
        """Stay silent."""

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"X-Repo-Commit": COMMIT, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refusal(self, repo: str, revision: str) -> tuple[int, str] | None:
        if repo not in DATASETS:
            return 404, "RepoNotFound"
        if repo == "owner/gated" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return 403, "GatedRepo"
        return None if revision in ("main", "v1", COMMIT) else (404, "RevisionNotFound")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.server.seen.append(f"{self.command} {self.path}")  # type: ignore[attr-defined]
        is_list = self.path.startswith("/api/")
        path = self.path.partition("?")[0].removeprefix("/api").removeprefix("/datasets/")
        owner, name, *rest = path.split("/")
        repo, revision = f"{owner}/{name}", rest[1] if rest else "main"
        refusal = self.refusal(repo, revision)
        if refusal is not None:
            self.answer(refusal[0], X_Error_Code=refusal[1])
        elif is_list:
            listing = {"id": repo, "sha": COMMIT, "private": False, "siblings": [{"rfilename": file} for file in DATASETS[repo]]}
            self.answer(200, json.dumps(listing).encode(), Content_Type="application/json")
        elif repo == "owner/broken":
            self.answer(404, X_Error_Code="EntryNotFound")
        else:
            body = DATASETS[repo]["/".join(rest[2:])]
            self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"')


@pytest.fixture
def server() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.seen = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


SCRIPT = """
import sys, json
from collections import Counter
from loopgguf.corpus import find_parts, read_rows, read_text
from loopgguf.errors import LoopggufError
try:
    parts, notes = find_parts([sys.argv[1]])
    contents = [read_text(part, Counter()).text if part.is_text else [row.content for row in read_rows(part, Counter())] for part in parts]
    print(json.dumps({"parts": [part.name for part in parts], "notes": notes, "contents": contents}))
except LoopggufError as error:
    print(json.dumps({"error": str(error), "code": error.exit_code}))
"""


@pytest.fixture
def read(server: ThreadingHTTPServer, tmp_path: Path):
    """Read a data set in a process of its own: huggingface_hub takes its settings from the environment when imported."""

    def run(item: str, **settings: str) -> dict[str, Any]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        own = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, item], env={**kept, **own, **settings}, capture_output=True, text=True, encoding="utf-8", check=False
        )
        assert done.returncode == 0, done.stderr
        assert done.stderr == "", "a progress bar or a warning on the terminal"
        return json.loads(done.stdout)

    return run


def test_a_split_is_read_and_then_found_in_the_cache(read, server: ThreadingHTTPServer):
    """Catches an endpoint, a cache or an offline switch that is not honoured, and a split mixed with another."""
    online = read("hf:owner/plain")
    assert online["contents"] == [["one"], ["two"]]
    assert online["parts"] == [f"hf:owner/plain data/train-0000{i}-of-00002.jsonl" for i in (0, 1)]
    assert online["notes"] == [f"hf:owner/plain: owner/plain at revision {COMMIT[:12]}"]
    assert not any("README" in line or "test-0" in line for line in server.seen)  # type: ignore[attr-defined]
    server.seen.clear()  # type: ignore[attr-defined]
    offline = read("hf:owner/plain", HF_HUB_OFFLINE="1")
    assert offline["contents"] == online["contents"] and offline["notes"][1:] == online["notes"]
    assert "only files in the cache" in offline["notes"][0]
    assert server.seen == []  # type: ignore[attr-defined]


def test_configuration_split_and_revision_are_asked_for(read, server: ThreadingHTTPServer):
    """Catches a part of the name that is dropped."""
    assert read("hf:owner/many@v1:de:validation")["contents"] == [["pruefung"]]
    assert any("/resolve/v1/de/validation.jsonl" in line for line in server.seen)  # type: ignore[attr-defined]
    assert read("hf:owner/plain:test")["contents"] == [["t"]]


def test_a_token_opens_a_gated_data_set(read):
    """Catches HF_TOKEN that is not sent, and an error that does not say what to do."""
    assert "is gated: got no access. Accept its terms on its page and set HF_TOKEN" in read("hf:owner/gated")["error"]
    assert read("hf:owner/gated", HF_TOKEN=TOKEN)["contents"] == [["secret"]]


@pytest.mark.parametrize(
    ("item", "settings", "said"),
    [
        ("hf:owner/none", {}, "was not found, or is private"),
        ("hf:owner/plain@old", {}, "has no revision old"),
        ("hf:owner/many", {}, "got none, expected one of de, en. Write hf:owner/many:NAME"),
        ("hf:owner/many:fr:train", {}, "configuration of hf:owner/many:fr:train: got fr, expected one of de, en"),
        ("hf:owner/plain:prod", {}, "split of hf:owner/plain:prod: got prod, expected one of test, train"),
        ("hf:owner/plain", {"HF_HUB_OFFLINE": "1"}, "is not in the cache, and HF_HUB_OFFLINE is set"),
        ("hf:owner/plain", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "at http://127.0.0.1:9 cannot be reached"),
        ("hf:owner/broken", {}, "lists a file that it does not have"),
        ("hf:owner/hostile", {}, "got a path that leads out of the data set"),
    ],
)
def test_what_cannot_be_had_is_one_line(read, item: str, settings: dict[str, str], said: str):
    """Catches a traceback, an error of several lines, and one that does not name the data set."""
    result = read(item, **settings)
    assert said in result["error"] and "\n" not in result["error"]
    assert result["code"] == 3


# --- names ------------------------------------------------------------------------------------------------------------


def test_references_are_parsed():
    """Catches a path taken for a data set, and a part of a name lost."""
    assert parse_reference("hf:a/b") == Reference("hf:a/b", "a/b")
    assert parse_reference("hf:a/b@r:c:train") == Reference("hf:a/b@r:c:train", "a/b", "r", ("c", "train"))
    assert parse_reference("c4") is SHORT_NAMES["c4"]
    assert parse_reference("text.txt") is None and parse_reference("a/b") is None
    for bad in ("hf:wikitext", "hf:a/b/c", "hf:a/b:c:d:e", "hf:", "hf:a/b:", "hf:a/../b"):
        with pytest.raises(UsageError, match=r"expected hf:owner/name\[@revision\]\[:config\]\[:split\]"):
            parse_reference(bad)


@pytest.mark.parametrize(
    ("names", "parts", "chosen"),
    [
        (["train.jsonl", "test.jsonl"], (), ["train.jsonl"]),
        (["a.jsonl", "b.jsonl"], (), ["a.jsonl", "b.jsonl"]),
        (["train.parquet", "train.jsonl", "dataset_infos.json"], (), ["train.parquet"]),
        (["data/train-0.parquet", "data/validation-0.parquet"], ("validation",), ["data/validation-0.parquet"]),
        (["code_small.parquet", "text_small.parquet"], ("text_small",), ["text_small.parquet"]),
        (["cfg/train/01.parquet", "cfg/train/00.parquet", "cfg/test/00.parquet"], ("cfg", "train"), ["cfg/train/00.parquet", "cfg/train/01.parquet"]),
        (
            ["en/c4-train.00-of-24.json.gz", "en/c4-validation.0.json.gz", "en.noclean/c4-train.0.json.gz"],
            ("en", "train"),
            ["en/c4-train.00-of-24.json.gz"],
        ),
        (
            ["wikitext-103-raw-v1/train-0.parquet", "wikitext-2-raw-v1/test-0.parquet", "wikitext-2-raw-v1/train-00000-of-00001.parquet"],
            SHORT_NAMES["wikitext2"].parts,
            ["wikitext-2-raw-v1/train-00000-of-00001.parquet"],
        ),
    ],
)
def test_files_are_chosen_as_data_sets_are_laid_out(names: list[str], parts: tuple[str, ...], chosen: list[str]):
    """Catches a split or configuration mixed with another, and the same rows read in two formats."""
    assert choose_files(names, Reference("x", "o/x", parts=parts)) == tuple(chosen)


def test_no_data_is_said():
    """Catches a data set with a loading script only, read as empty."""
    with pytest.raises(InputError, match="no data in x: expected"):
        choose_files(["x.py", "README.md", "dataset_infos.json"], Reference("x", "o/x"))
