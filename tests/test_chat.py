"""chat.py: templates give what transformers gives, and a hostile one gives an error and nothing else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from loopgguf.chat import ChatTemplate, Conversation, Limits, find_template, render
from loopgguf.container import ValueType, array, string, uint32
from loopgguf.errors import InputError

USER = {"role": "user", "content": "What is 2+2?"}
ASSISTANT = {"role": "assistant", "content": "4 <é>"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"b": 1, "a": 2}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"a": 2}}}]}

CHATML = """{%- for message in messages %}
    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}"""
ALTERNATING = """{{ bos_token }}{% for m in messages %}
{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]{% else %}{% generation %} {{ m.content }}{{ eos_token }}{% endgeneration %}{% endif %}
{% endfor %}"""
TOOLED = """{% set ns = namespace(n=0) %}{% if tools is defined and tools %}{{ tools | tojson(indent=2) }}{% endif %}
{%- for m in messages %}{% set ns.n = ns.n + 1 %}
{%- if m.content is defined %}{{ ns.n }}{{ m.content }}{% else %}{{ m.tool_calls[0].function | tojson }}{% continue %}{% endif %}
{%- if ns.n > 2 %}{% break %}{% endif %}
{%- endfor %}{{ unk_token }}"""


def template(source: str) -> ChatTemplate:
    return ChatTemplate("evil", source, {"bos_token": "<s>", "eos_token": "</s>"})


def chat(*messages: dict[str, object], tools: list[object] | None = None, row: int = 1) -> Conversation:
    return Conversation(f"a.jsonl, line {row}", messages, tools)


def test_templates_give_what_transformers_gives():
    """Catches a filter, a global, a tag or a setting for whitespace that differs from what templates are written for."""
    utils = pytest.importorskip("transformers.utils.chat_template_utils")
    for source, conversations in [
        (CHATML, [chat(USER, ASSISTANT), chat(USER)]),
        (ALTERNATING, [chat(USER, ASSISTANT, USER)]),
        (TOOLED, [chat(USER, CALL, ASSISTANT, USER, tools=TOOLS), chat(USER, CALL)]),
    ]:
        ours = render(template(source), conversations)
        for text, conversation in zip(ours, conversations, strict=True):
            messages = [{k: v for k, v in message.items() if v is not None} for message in conversation.messages]
            theirs, _ = utils.render_jinja_template([messages], tools=conversation.tools, chat_template=source, bos_token="<s>", eos_token="</s>")
            assert [text] == theirs


def test_a_conversation_by_hand():
    """Catches a generation prompt, a lost line end, and escaped characters."""
    assert render(template(CHATML), [chat(USER, ASSISTANT)]) == ["<|im_start|>user\nWhat is 2+2?<|im_end|>\n<|im_start|>assistant\n4 <é><|im_end|>\n"]
    assert render(template(CHATML), []) == []


def test_the_date_is_always_the_same():
    """Catches calibration tokens, and so a fingerprint, that change from one day to the next."""
    assert render(template("{{ strftime_now('%d %b %Y') }}"), [chat(USER)]) == ["26 Jul 2024"]


def test_many_conversations_are_one_process():
    """Catches a process per conversation, which would take a minute for a thousand."""
    start = time.monotonic()
    texts = render(template(CHATML), [chat({"role": "user", "content": str(i)}) for i in range(1000)])
    assert texts[999] == "<|im_start|>user\n999<|im_end|>\n"
    assert time.monotonic() - start < 10


def test_the_template_of_a_model_is_found():
    """Catches special tokens of the wrong id, and a model without a template."""
    metadata = {
        "tokenizer.ggml.tokens": array(ValueType.STRING, ["<unk>", "<s>", "</s>"]),
        "tokenizer.ggml.bos_token_id": uint32(1),
        "tokenizer.ggml.eos_token_id": uint32(2),
        "tokenizer.ggml.padding_token_id": uint32(7),
    }
    assert find_template(metadata, "m") is None
    found = find_template({**metadata, "tokenizer.chat_template": string(CHATML)}, "m")
    assert found == ChatTemplate("m", CHATML, {"bos_token": "<s>", "eos_token": "</s>"})


def test_the_refused_conversation_is_named():
    """Catches an error that leaves the user to guess which of a thousand rows the template does not take."""
    rows = [chat(USER, ASSISTANT, row=1), chat(USER, row=2), chat(ASSISTANT, USER, row=3), chat(USER, row=4)]
    with pytest.raises(InputError, match=r"chat template of evil cannot render a.jsonl, line 3: TemplateError: roles must alternate"):
        render(template(ALTERNATING), rows)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{{ ''.__class__.__mro__ }}", "SecurityError: access to attribute '__class__'"),
        ("{{ ''.__class__ }}", "SecurityError"),
        ("{{ ''['__class__'] }}", "SecurityError"),
        ("{{ '' | attr('__class__') }}", "SecurityError"),
        ("{{ messages | map(attribute='__class__') | list }}", "SecurityError"),
        ("{{ '{0.__class__}'.format('') }}", "SecurityError"),
        ("{{ cycler.__init__.__globals__.os.popen('touch escaped').read() }}", "SecurityError"),
        ("{{ raise_exception.__globals__ }}", "SecurityError"),
        ("{{ self._TemplateReference__context }}", "SecurityError"),
        ("{{ messages.append(1) }}", "SecurityError"),
        ("{% include '/etc/passwd' %}", "no loader"),
        ("{% if %}", "TemplateSyntaxError"),
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages[0].none.none }}", "UndefinedError"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
        ("{{ " + "(" * 3000 + "1" + ")" * 3000 + " }}", "RecursionError"),
        ("{% for i in range(10 ** 9) %}{% endfor %}", "Range too big"),
        ("{{ raise_exception('a\x1b[31mb\nc') }}", "TemplateError: a [31mb c. Leave"),
        ("{{ 'A' * 300000000 }}", "more than 512 MiB of memory"),
        ("{% set x %}{% for i in range(99999) %}{{ 'A' * 9999 }}{% endfor %}{% endset %}", "more than 512 MiB of memory"),
        ("{% for i in range(99999) %}{{ 'A' * 999 }}{% endfor %}", "writes more than"),
        ("{{ 'A' * 17000000 }}", "writes more than"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "of processor time"),
        ("{% set x = 9 ** 9999999 %}", "of processor time"),
    ],
)
def test_a_hostile_template_is_refused_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, said: str):
    """Catches an escape from the sandbox, an endless template, and one that takes all memory."""
    monkeypatch.chdir(tmp_path)
    start = time.monotonic()
    # Only the endless ones meet the clock: on a slow machine a second may pass before memory runs out.
    limits = Limits(cpu_seconds=1) if "processor time" in said else Limits()
    with pytest.raises(InputError, match=r"chat template of evil cannot render a.jsonl, line 1: ") as caught:
        render(template(source), [chat(USER)], limits)
    assert said in str(caught.value)
    assert str(caught.value).isprintable()
    assert time.monotonic() - start < 20
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_many_conversations_make_together_is_limited():
    """Catches a disk filled by a template that stays under the limit of one conversation."""
    with pytest.raises(InputError, match="writes more than 1 MiB"):
        render(template("{{ 'A' * 300000 }}"), [chat(USER)] * 9, Limits(max_output_bytes=1 << 20))


def test_a_child_that_hangs_is_stopped():
    """Catches a wait for ever where the processor time is not what passes."""
    with pytest.raises(InputError, match=r"took more than 0.01 s"):
        render(template(CHATML), [chat(USER)], Limits(wall_seconds=0.01))


def test_the_child_neither_sees_our_secrets_nor_imports_what_lies_about(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches tokens in the environment of a process that runs a model's code, and a jinja2.py in the current folder."""
    from loopgguf import chat as module

    monkeypatch.setenv("HF_TOKEN", "secret")
    assert "HF_TOKEN" not in module._environment_variables()
    (tmp_path / "jinja2.py").write_text("raise SystemExit('imported')", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert render(template("x"), [chat(USER)]) == ["x"]


def test_the_module_is_light():
    """Catches jinja2, numpy or torch imported by every command, and into the small memory of the child."""
    code = "import sys, loopgguf.chat; print([m for m in ('jinja2', 'numpy', 'torch', 'llama_cpp') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, encoding="utf-8", check=True, env=os.environ)
    assert json.loads(done.stdout) == []
