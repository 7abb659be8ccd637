"""corpus.py: every kind of calibration text is read strictly, and what is wrong is named by file and row."""

from __future__ import annotations

import gzip
import io
import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from loopgguf import corpus
from loopgguf.chat import Conversation
from loopgguf.corpus import find_parts, read_document, read_rows, read_text
from loopgguf.errors import InputError, UsageError


@pytest.fixture
def write(tmp_path: Path):
    def write_text(content: str | bytes, name: str = "text.txt") -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_text


def contents(*paths: Path) -> list[object]:
    parts, _ = find_parts(paths)
    return [row.content for part in parts for row in read_rows(part, Counter())]


# --- texts ------------------------------------------------------------------------------------------------------------


def test_one_closing_newline_is_dropped_as_llama_cpp_does(write):
    """Catches a last token that llama-imatrix does not have (common/arg.cpp, --file)."""
    assert read_document(write("a\n\n")).text == "a\n"


def test_line_ends_and_byte_order_mark_are_normalised_and_said(write):
    """Catches Windows files that calibrate the model on `\\r`, and silent changes."""
    document = read_document(write(b"\xef\xbb\xbfone\r\ntwo\r\n"))
    assert document.text == "one\ntwo"
    assert [note.split(": ")[0] for note in document.notes] == ["text.txt"] * 2
    assert "byte order mark" in document.notes[0] and "2 CRLF" in document.notes[1]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b" \n\t\n", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b"fine \xff\xfe", "offset 5, expected UTF-8"),
        (b"a\0b\x9c", "0x9c"),
        (b"GGUF\3\0", "a zero byte at offset 5.* binary"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git-lfs pointer"),
    ],
)
def test_unusable_text_is_refused_by_name(write, content: bytes, said: str):
    """Catches an imatrix of nothing, and mojibake as calibration."""
    with pytest.raises(InputError, match=said) as caught:
        read_document(write(content, "bad.txt"))
    assert "bad.txt" in str(caught.value)


def test_missing_file_and_folder_are_refused(tmp_path: Path):
    """Catches a traceback where a path is wrong."""
    with pytest.raises(InputError, match="cannot read calibration text"):
        read_text(find_parts([tmp_path / "none.txt"])[0][0], Counter())
    with pytest.raises(InputError, match="no calibration text in the folder"):
        find_parts([tmp_path])
    with pytest.raises(UsageError, match="no calibration text"):
        find_parts([])


def test_a_document_too_large_is_refused(write, monkeypatch: pytest.MonkeyPatch):
    """Catches a file of many GB that is read into memory."""
    monkeypatch.setattr(corpus, "MAX_TEXT_BYTES", 1000)
    with pytest.raises(InputError, match=r"text.txt: got more than"):
        read_document(write("x" * 1001))


def test_standard_input_is_one_document(monkeypatch: pytest.MonkeyPatch):
    """Catches `-f -` that looks for a file named `-`, and a second one that finds nothing left."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\r\ntwo\n"), encoding="utf-8"))
    document = read_text(find_parts(["-"])[0][0], Counter())
    assert (document.name, document.text) == ("stdin", "one\ntwo")
    with pytest.raises(UsageError, match="twice"):
        find_parts(["-", "-"])


# --- rows -------------------------------------------------------------------------------------------------------------

MESSAGES = [{"role": "user", "content": "hi"}]
ROWS = [{"text": "one", "id": 3}, {"prompt": "a", "completion": "b"}, {"messages": MESSAGES, "text": "not this", "tools": None}]


def jsonl(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def check_rows(read: list[object], where: str) -> None:
    assert read == ["one", "ab", Conversation(where, MESSAGES)]


def test_json_lines_of_every_form(write):
    """Catches a column that is not looked at; blank lines and a byte order mark are no rows."""
    check_rows(contents(write("\ufeff" + jsonl(*ROWS[:2]) + "\n \n" + jsonl(ROWS[2]), "a.jsonl")), "a.jsonl, line 5")
    assert contents(write('"just a text"\n', "b.jsonl")) == ["just a text"]


def test_json_list_and_json_lines_under_its_name(write):
    """Catches the many .json files on the hub that hold a row a line."""
    check_rows(contents(write(json.dumps(ROWS, indent=1), "a.json")), "a.json, item 3")
    check_rows(contents(write(jsonl(*ROWS), "b.json")), "b.json, line 3")
    assert contents(write('["x", "y"]', "c.json")) == ["x", "y"]


def test_packed_lines_are_unpacked(write):
    """Catches c4, whose files are .json.gz, and a damaged one."""
    packed = gzip.compress(jsonl(*ROWS).encode())
    check_rows(contents(write(packed, "a.json.gz")), "a.json.gz, line 3")
    for damaged in (packed[:-9], packed[:20] + b"\xff\xff" + packed[22:], b"{}"):
        with pytest.raises(InputError, match=r"cannot unpack a.jsonl.gz"):
            contents(write(damaged, "a.jsonl.gz"))


def test_prompt_and_completion_as_messages(write):
    """Catches the conversational form of prompt and completion glued as Python lists."""
    (chat,) = contents(write(jsonl({"prompt": MESSAGES, "completion": [{"role": "assistant", "content": "yo"}]}), "a.jsonl"))
    assert isinstance(chat, Conversation) and [m["role"] for m in chat.messages] == ["user", "assistant"]


def test_empty_rows_are_passed_over_and_counted(write):
    """Catches empty documents in the samples, and a silent loss."""
    path, skipped = write(jsonl({"text": " "}, {"text": None}, {"messages": []}, {"text": "x"}), "a.jsonl"), Counter[str]()
    assert [row.content for row in read_rows(find_parts([path])[0][0], skipped)] == ["x"]
    assert skipped == {"a.jsonl": 3}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "bad row in a.jsonl, line 2: got Expecting"),
        ("[1]", "got a list, expected an object or a text"),
        ("17", "got a number, expected an object"),
        ('{"text": 5}', "got a number as text"),
        ('{"body": "x", "id": 3}', "no usable column in a.jsonl, line 2: got body, id, expected messages, text"),
        ('{"prompt": "x"}', "no usable column in a.jsonl, line 2: got prompt"),
        ('{"prompt": "x", "completion": ["y"]}', "got a list as completion"),
        ('{"messages": "hi"}', "got a text as messages"),
        ('{"messages": [{"from": "user"}]}', "message 1 without a role"),
        ('{"messages": [{"role": "user"}], "tools": "x"}', "a text as tools"),
        ('{"text": "\\ud800"}', "half a surrogate pair at character 0"),
        ('{"messages": [{"role": "user", "content": "a\\udfff"}]}', "half a surrogate pair"),
        ('{"text": "a", "text": "b"}', "'text' twice"),
        ("[" * 100_000, "bad row in a.jsonl, line 2"),
        ('{"text": ' + "1" * 5000 + "}", "bad row in a.jsonl, line 2"),
        (b'{"text": "\xff"}', "encoding of a.jsonl, line 2: got byte 0xff at offset 10, expected UTF-8"),
        (b"\0\0\0", "bad row in a.jsonl, line 2"),
    ],
)
def test_bad_rows_are_named(write, line: str | bytes, said: str):
    """Catches a traceback, a row that is silently passed over, and an error that does not say where."""
    raw = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(InputError) as caught:
        contents(write(b'{"text": "fine"}\n' + raw + b"\n", "a.jsonl"))
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_endless_line_is_refused_before_it_is_read(write, monkeypatch: pytest.MonkeyPatch):
    """Catches a line of 1 GB that takes all memory."""
    monkeypatch.setattr(corpus, "MAX_LINE_BYTES", 1000)
    with pytest.raises(InputError, match=r"a.jsonl, line 1: got more than"):
        contents(write('{"text": "' + "x" * 2000, "a.jsonl"))
    monkeypatch.setattr(corpus, "MAX_TEXT_BYTES", 1000)
    with pytest.raises(InputError, match=r"a.json: got more than"):
        contents(write('["' + "x" * 2000 + '"]', "a.json"))


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.txt"])
def test_an_empty_file_is_refused(write, name: str):
    """Catches a source that gives nothing without a word."""
    with pytest.raises(InputError, match=f"{name}: got (no rows|an empty file)"):
        part = find_parts([write("", name)])[0][0]
        assert read_text(part, Counter()) if part.is_text else list(read_rows(part, Counter()))


def test_pointer_in_place_of_rows_is_told(write):
    """Catches `git clone` without git-lfs, read as bad JSON."""
    with pytest.raises(InputError, match=r"a.jsonl is a git-lfs pointer"):
        contents(write("version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "a.jsonl"))


# --- parquet ----------------------------------------------------------------------------------------------------------


def write_parquet(path: Path, rows: list[dict[str, object]], group: int = 2) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=group)
    return path


def test_parquet_of_every_form(tmp_path: Path):
    """Catches rows lost between row groups, and the null keys that parquet gives to every message."""
    texts = [{"id": i, "text": f"text {i}"} for i in range(2500)]
    assert contents(write_parquet(tmp_path / "a.parquet", texts, 1000)) == [row["text"] for row in texts]
    assert contents(write_parquet(tmp_path / "b.parquet", [{"prompt": "a", "completion": "b"}])) == ["ab"]
    rows = [{"messages": MESSAGES}, {"messages": [{"role": "user", "content": "x", "name": "n"}]}]
    chats = contents(write_parquet(tmp_path / "c.parquet", rows))
    assert [chat.where for chat in chats if isinstance(chat, Conversation)] == ["c.parquet, row 1", "c.parquet, row 2"]


def test_bad_parquet_is_named(tmp_path: Path, write):
    """Catches a traceback of pyarrow, and a file without text that gives nothing."""
    with pytest.raises(InputError, match=r"no usable column in a.parquet: got body, expected messages, text"):
        contents(write_parquet(tmp_path / "a.parquet", [{"body": "x"}]))
    with pytest.raises(InputError, match=r"bad row in b.parquet, row 2: got bytes as text") as caught:
        contents(write_parquet(tmp_path / "b.parquet", [{"text": None}, {"text": b"x"}]))
    whole = (tmp_path / "a.parquet").read_bytes()
    for damaged in (b"", b"PAR1", whole[:-20], b"PAR1" + bytes(90) + whole[94:]):
        with pytest.raises(InputError, match=r"d.parquet"):
            contents(write(damaged, "d.parquet"))
    assert "\n" not in str(caught.value)


def test_parquet_without_pyarrow_says_what_to_install(write, monkeypatch: pytest.MonkeyPatch):
    """Catches an ImportError where an optional package is missing."""
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"pip install 'loopgguf\[parquet\]'"):
        contents(write(b"PAR1", "a.parquet"))


# --- folders ----------------------------------------------------------------------------------------------------------


def test_folder_is_read_in_order_with_its_subfolders(tmp_path: Path, write):
    """Catches an order that depends on the file system, hidden files, and files of other kinds passed over silently."""
    for name in ("set/b.jsonl", "set/a/z.txt", "set/a/y.json", "set/.git/x.txt", "set/.hidden.txt", "set/README.md"):
        write("x", name)
    parts, notes = find_parts([tmp_path / "set"])
    assert [(part.name, part.source, part.kind) for part in parts] == [
        ("set/a/y.json", "set", "json"),
        ("set/a/z.txt", "set", "text"),
        ("set/b.jsonl", "set", "jsonl"),
    ]
    assert notes == ["set: 1 files of other kinds passed over"]


@pytest.mark.parametrize("to", ["outside.txt", "other"])
def test_links_out_of_a_folder_are_refused(tmp_path: Path, write, to: str):
    """Catches a data set that reads /etc/passwd into an imatrix."""
    write("x", "set/a.txt")
    write("secret", "outside.txt")
    write("secret", "other/b.txt")
    (tmp_path / "set" / "link.txt").symlink_to(tmp_path / to)
    with pytest.raises(InputError, match=r"link.txt is a link that leads out of the folder"):
        find_parts([tmp_path / "set"])


def test_links_inside_a_folder_do_not_go_round(tmp_path: Path, write):
    """Catches an endless walk."""
    write("x", "set/a.txt")
    (tmp_path / "set" / "again").symlink_to(tmp_path / "set")
    assert [part.name for part in find_parts([tmp_path / "set"])[0]] == ["set/a.txt"]


def test_a_file_wins_over_a_data_set_of_its_name(write, monkeypatch: pytest.MonkeyPatch):
    """Catches a download where a file of that name lies in the current folder."""
    monkeypatch.chdir(write("mine", "c4").parent)
    assert [(part.name, part.kind, part.is_remote) for part in find_parts([Path("c4")])[0]] == [("c4", "text", False)]
