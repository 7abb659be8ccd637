"""Conversations → text by a model's own chat template, in a child process with limits on memory, time and output.

A template is a program that came with a model. It is compiled and run only in `python -m loopgguf.chat`, a process
without our environment variables, in jinja2's immutable sandbox: jinja2 computes constants while it compiles, so
compiling is as dangerous as running. The conventions are those of transformers (utils/chat_template_utils.py), except
that the date is always the same, that unsafe attributes are errors rather than empty, and that no generation prompt is
added. Does not tokenize. Windows has no limit on memory and processor time, only on the time that passes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from loopgguf.errors import InputError

if TYPE_CHECKING:
    from jinja2 import Environment, Template

    from loopgguf.container import Metadata

_NAMED_TOKENS = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
_SHOWN = 200  # characters of a template's own words in our messages
_KILLED = (-9, -24)  # SIGKILL and SIGXCPU, how RLIMIT_CPU ends a process


@dataclass(frozen=True)
class ChatTemplate:
    """A jinja2 template, the name of the model it came with, and the texts of the special tokens it may write."""

    name: str
    source: str
    special_tokens: Mapping[str, str]


@dataclass(frozen=True)
class Conversation:
    """Messages as a template takes them (`role`, `content`, …), the tools they may call, and where they were read."""

    where: str
    messages: Sequence[Mapping[str, object]]
    tools: Sequence[object] | None = None


@dataclass(frozen=True)
class Limits:
    """What one call of the child may use: bytes of memory and of output, seconds on the processor and in all."""

    max_memory_bytes: int = 512 << 20
    max_output_bytes: int = 256 << 20
    max_rendered_chars: int = 16 << 20  # of one conversation
    cpu_seconds: int = 10
    wall_seconds: int = 60


_DEFAULT_LIMITS = Limits()


def find_template(metadata: Metadata, name: str) -> ChatTemplate | None:
    """Return the default chat template in the metadata of a GGUF, or None where it has none; `name` is for messages."""
    if "tokenizer.chat_template" not in metadata:
        return None
    tokens = metadata["tokenizer.ggml.tokens"].data if "tokenizer.ggml.tokens" in metadata else []
    specials = {}
    for variable, key in _NAMED_TOKENS.items():
        token = metadata.get(f"tokenizer.ggml.{key}_token_id")
        if token is not None and isinstance(token.data, int) and isinstance(tokens, list) and token.data < len(tokens):
            specials[variable] = str(tokens[token.data])
    return ChatTemplate(name, str(metadata["tokenizer.chat_template"].data), specials)


def render(template: ChatTemplate, conversations: Sequence[Conversation], limits: Limits = _DEFAULT_LIMITS) -> list[str]:
    """Return the text of each conversation, as the template writes it, without a generation prompt.

    Raises InputError naming template and conversation when the template is malformed, refuses the conversation, tries
    to leave the sandbox, or needs more than `limits`.
    """
    if not conversations:
        return []
    request = {
        "source": template.source,
        "special_tokens": dict(template.special_tokens),
        "conversations": [{"messages": _without_nulls(c.messages), "tools": c.tools} for c in conversations],
        "limits": asdict(limits),
    }
    lines, cause = _run_child(json.dumps(request).encode(), limits)
    if cause:
        where = conversations[min(len(lines), len(conversations) - 1)].where
        raise InputError(f"chat template of {template.name} cannot render {where}: {cause}. Leave the row out, or give rows with `text`")
    assert len(lines) == len(conversations), (len(lines), len(conversations))
    return [json.loads(line) for line in lines]


def _run_child(request: bytes, limits: Limits) -> tuple[list[bytes], str]:
    """Return the lines that the child wrote, and in words why it failed, empty when it did not.

    It talks through files, whose size can be limited from inside; in a folder of its own and with -P, so that nothing
    lying in the current folder is imported.
    """
    command = [sys.executable, "-P", "-s", "-X", "utf8", "-m", "loopgguf.chat"]
    with (
        tempfile.TemporaryDirectory(prefix="loopgguf-chat-") as folder,
        tempfile.TemporaryFile() as requests,
        tempfile.TemporaryFile() as output,
        tempfile.TemporaryFile() as errors,
    ):
        requests.write(request)
        requests.seek(0)
        try:
            run = subprocess.run(
                command, stdin=requests, stdout=output, stderr=errors, cwd=folder, env=_environment_variables(), timeout=limits.wall_seconds, check=False
            )
            status: int | None = run.returncode
        except subprocess.TimeoutExpired:
            status = None
        output.seek(0)
        lines = output.read().split(b"\n")[:-1]  # what follows the last line end was cut off
        return lines, "" if status == 0 else _cause(status, errors, limits)


def _environment_variables() -> dict[str, str]:
    kept = {name: os.environ[name] for name in ("SYSTEMROOT", "TMPDIR") if name in os.environ}
    return {**kept, "PYTHONPATH": str(Path(__file__).parent.parent), "PYTHONDONTWRITEBYTECODE": "1"}


def _without_nulls(messages: Sequence[Mapping[str, object]]) -> list[dict[str, object]]:
    """Drop keys without a value, as transformers does: parquet gives every message every key."""
    return [{key: value for key, value in message.items() if value is not None} for message in messages]


def _cause(status: int | None, errors: IO[bytes], limits: Limits) -> str:
    """Return in words why the child ended with `status` (None: it was stopped)."""
    errors.seek(0)
    said = errors.read(1 << 20).decode("utf-8", "replace").strip().splitlines()
    last = "".join(c if c.isprintable() else " " for c in (said[-1] if said else ""))
    if status is None:
        return f"it took more than {limits.wall_seconds} s"
    if status in _KILLED:
        return f"it took more than {limits.cpu_seconds} s of processor time"
    if status < 0:
        return f"it crashed with signal {-status}"
    if last.startswith("MemoryError"):
        return f"it needs more than {limits.max_memory_bytes >> 20} MiB of memory"
    if last.startswith("OSError: [Errno 27]"):  # EFBIG
        return f"it writes more than {limits.max_output_bytes >> 20} MiB"
    return last[:_SHOWN].rstrip(" .") or f"it ended with status {status}"


# --- in the child -----------------------------------------------------------------------------------------------------


def _limit_process(limits: Limits) -> None:
    """Lower this process's limits; nothing can raise them again."""
    if sys.platform == "win32":
        return
    import resource

    wanted = {
        resource.RLIMIT_AS: limits.max_memory_bytes,
        resource.RLIMIT_DATA: limits.max_memory_bytes,
        resource.RLIMIT_CPU: limits.cpu_seconds,
        resource.RLIMIT_FSIZE: limits.max_output_bytes,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: 0,
    }
    for kind, value in wanted.items():
        _, hard = resource.getrlimit(kind)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(kind, (value, value))


def _make_environment() -> Environment:
    """Return the sandbox that templates are written for: transformers' settings, filters and globals."""
    from datetime import datetime

    from jinja2 import TemplateError, nodes
    from jinja2.exceptions import SecurityError
    from jinja2.ext import Extension, loopcontrols
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """`{% generation %}` marks the assistant's words; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012 - as the base class has it

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    class Sandbox(ImmutableSandboxedEnvironment):
        """Refuses loudly: an unsafe attribute is an error even where its value would not be used."""

        def unsafe_undefined(self, obj: object, attribute: str) -> Any:
            raise SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} is unsafe")

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: object, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def strftime_now(layout: str) -> str:
        return datetime(2024, 7, 26).strftime(layout)  # a fixed day: the same conversations are the same tokens tomorrow

    environment = Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": raise_exception, "strftime_now": strftime_now}
    return environment


def _render_one(template: Template, conversation: Mapping[str, object], special_tokens: Mapping[str, str], max_chars: int) -> str:
    pieces, n_chars = [], 0
    for piece in template.generate(**conversation, documents=None, add_generation_prompt=False, **special_tokens):
        pieces.append(piece)
        n_chars += len(piece)
        if n_chars > max_chars:
            raise ValueError(f"it writes more than {max_chars} characters")
    return "".join(pieces)


def _tell_error(kind: type[BaseException], error: BaseException, _trace: object) -> None:
    """Write an error that ends the process as one line, in place of a traceback."""
    sys.stderr.write(f"{kind.__name__}: {' '.join(str(error).split())[:1000]}\n")


def _serve(requests: IO[bytes], output: IO[bytes]) -> None:
    """Read one request, write each conversation's text as a line of JSON; what goes wrong ends the process."""
    request = json.loads(requests.read())
    limits = Limits(**request["limits"])
    environment = _make_environment()
    _limit_process(limits)
    template = environment.from_string(request["source"])
    for conversation in request["conversations"]:
        text = _render_one(template, conversation, request["special_tokens"], limits.max_rendered_chars)
        output.write(json.dumps(text).encode() + b"\n")
        output.flush()


if __name__ == "__main__":
    sys.excepthook = _tell_error
    _serve(sys.stdin.buffer, sys.stdout.buffer)
