"""Train a small Llama like tests/models/demo-llama from any folder of text, on a CPU.

The recipe: a byte-level BPE of 4096 tokens behind Llama 3's pre-tokenizer, a Llama of 6.8M parameters in which every
row is a multiple of 256, so that every ggml type applies, and one pass over the text with AdamW, cosine decay and
bfloat16 autocast. The model is for tests of a quantizer: it writes English-looking prose and knows nothing.

    python tools/train_demo_model.py TEXT_FOLDER MODEL_FOLDER            one pass over the text
    python tools/train_demo_model.py TEXT_FOLDER MODEL_FOLDER --steps 50 to try it

An interrupted run continues from MODEL_FOLDER/training.pt when the same command is given again. Not here: downloading
text, more than one device, and anything that makes a good language model.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import random
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer

# Llama 3's split: contractions, words with one leading sign, up to three digits, runs of signs, line ends, spaces
PRE_TOKENIZER = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BOS, EOS = "<|begin_of_text|>", "<|end_of_text|>"
BOS_ID, EOS_ID = 0, 1
N_HELD_OUT_TOKENS = 65_536
MIN_LEARNING_RATE_FRACTION = 0.05
LOG_EVERY, SAVE_EVERY = 20, 250


@dataclass(frozen=True)
class Recipe:
    """What decides the result; the defaults are those of tests/models/demo-llama."""

    steps: int = 0  # 0: one pass over the text
    batch: int = 16  # sequences of a step
    length: int = 256  # tokens of a sequence
    vocab: int = 4096
    context: int = 512  # max_position_embeddings
    learning_rate: float = 2e-3  # peak
    warm_up: int = 100  # steps
    weight_decay: float = 0.1  # of matrices only
    gradient_norm: float = 1.0
    seed: int = 0


# --- text -------------------------------------------------------------------------------------------------------------


def read_documents(folder: Path, seed: int) -> list[str]:
    """Return the text files under `folder`, shuffled; a file that is not UTF-8 is skipped and named."""
    documents = []
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            print(f"skipped, not UTF-8: {path}")
            continue
        if text.strip() and "\0" not in text:
            documents.append(text)
    if not documents:
        raise SystemExit(f"no UTF-8 text in {folder}: give a folder of text files")
    random.Random(seed).shuffle(documents)
    return documents


def train_tokenizer(documents: list[str], n_vocab: int) -> Tokenizer:
    """Return a byte-level BPE of exactly `n_vocab` tokens, or fewer when the text has not that many pairs to merge."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS}:1 $B:1", special_tokens=[(BOS, BOS_ID)])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(documents, trainers.BpeTrainer(vocab_size=n_vocab, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False))
    return tokenizer


def encode(tokenizer: Tokenizer, documents: list[str]) -> torch.Tensor:
    """Return all documents as one row of token ids, (n_tokens,) int64, each one begun by BOS and closed by EOS."""
    import torch

    ids: list[int] = []
    for encoding in tokenizer.encode_batch(documents):
        ids += [*encoding.ids, EOS_ID]
    return torch.tensor(ids)


def split_held_out(tokens: torch.Tensor, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the tokens to train on and those held out: the last 65,536, or a tenth of a small text."""
    n_held_out = min(N_HELD_OUT_TOKENS, max(len(tokens) // 10, length + 1))
    if len(tokens) < 2 * n_held_out:
        raise SystemExit(f"the text has {len(tokens)} tokens, expected at least {2 * n_held_out}: add text")
    return tokens[:-n_held_out], tokens[-n_held_out:]


def batches(tokens: torch.Tensor, recipe: Recipe, n_steps: int) -> Iterator[torch.Tensor]:
    """Yield (batch, length + 1) token ids per step: every window of the text once in random order, then over again."""
    import torch

    order = torch.Generator().manual_seed(recipe.seed)
    windows = tokens[: (len(tokens) - 1) // recipe.length * recipe.length + 1].unfold(0, recipe.length + 1, recipe.length)
    chosen = torch.cat([torch.randperm(len(windows), generator=order) for _ in range(math.ceil(n_steps * recipe.batch / len(windows)))])
    for step in range(n_steps):
        yield windows[chosen[step * recipe.batch : (step + 1) * recipe.batch]]


# --- training ---------------------------------------------------------------------------------------------------------


def make_model(recipe: Recipe) -> Any:
    """Return the untrained Llama, float32; hidden, KV and FFN sizes are multiples of 256 or fill their head exactly."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=recipe.vocab,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=recipe.context,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=BOS_ID,
        eos_token_id=EOS_ID,
    )
    return LlamaForCausalLM(config)


def make_optimizer(model: Any, recipe: Recipe) -> torch.optim.AdamW:
    """Return AdamW with weight decay on the matrices and none on the norms."""
    import torch

    groups = [
        {"params": [p for p in model.parameters() if p.ndim == 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in model.parameters() if p.ndim == 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.95))


def learning_rate(step: int, n_steps: int, recipe: Recipe) -> float:
    """Return the rate of a step: linear warm-up, then a cosine down to 5 % of the peak."""
    warm_up = min(recipe.warm_up, n_steps // 5)
    if step < warm_up:
        return recipe.learning_rate * (step + 1) / warm_up
    cosine = (1 + math.cos(math.pi * (step - warm_up) / max(1, n_steps - warm_up))) / 2
    return recipe.learning_rate * (MIN_LEARNING_RATE_FRACTION + (1 - MIN_LEARNING_RATE_FRACTION) * cosine)


def loss_of(model: Any, windows: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy in nats per token of (n, length + 1) token ids, computed under bfloat16 autocast."""
    import torch

    with torch.autocast("cpu", torch.bfloat16):
        logits = model(windows[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), windows[:, 1:].flatten())


def training_step(model: Any, optimizer: torch.optim.AdamW, windows: torch.Tensor, rate: float, gradient_norm: float) -> float:
    """Take one step and return its loss in nats per token."""
    import torch

    for group in optimizer.param_groups:
        group["lr"] = rate
    loss = loss_of(model, windows)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), gradient_norm)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return float(loss.detach())


def train(model: Any, tokens: torch.Tensor, recipe: Recipe, checkpoint: Path) -> None:
    """Train the model in place for `recipe.steps`, continuing from `checkpoint` when it is of this very run."""
    optimizer = make_optimizer(model, recipe)
    n_steps = recipe.steps
    identity = run_identity(tokens, recipe)
    first = load_checkpoint(checkpoint, model, optimizer, identity)
    model.train()
    start, losses = time.perf_counter(), []
    for step, windows in enumerate(batches(tokens, recipe, n_steps)):
        if step < first:
            continue
        losses.append(training_step(model, optimizer, windows, learning_rate(step, n_steps, recipe), recipe.gradient_norm))
        done = step + 1
        if done % LOG_EVERY == 0 or done == n_steps:
            seconds = (time.perf_counter() - start) / (done - first)
            mean, minutes = sum(losses) / len(losses), seconds * (n_steps - done) / 60
            print(f"step {done}/{n_steps}: {mean:.3f} nats per token, {seconds:.2f} s a step, {minutes:.1f} min left", flush=True)
            losses = []
        if done % SAVE_EVERY == 0 and done < n_steps:
            save_checkpoint(checkpoint, model, optimizer, identity, done)


def run_identity(tokens: torch.Tensor, recipe: Recipe) -> str:
    """Return a hash of what a checkpoint must agree with to be continued: the tokens and the recipe."""
    return hashlib.sha256(tokens.numpy().tobytes() + json.dumps(asdict(recipe), sort_keys=True).encode()).hexdigest()


def save_checkpoint(path: Path, model: Any, optimizer: torch.optim.AdamW, identity: str, step: int) -> None:
    import torch

    part = path.with_suffix(".part")
    torch.save({"identity": identity, "step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, part)
    part.replace(path)


def load_checkpoint(path: Path, model: Any, optimizer: torch.optim.AdamW, identity: str) -> int:
    """Return the step to go on from: 0 without a checkpoint, and an error with one of another run."""
    import torch

    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    if state["identity"] != identity:
        raise SystemExit(f"{path} is of another text or recipe: delete it to start anew")
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    print(f"continuing from step {state['step']}")
    return int(state["step"])


def evaluate(model: Any, tokens: torch.Tensor, length: int) -> float:
    """Return the mean cross-entropy of the held-out tokens in nats per token."""
    import torch

    windows = tokens[: (len(tokens) - 1) // length * length + 1].unfold(0, length + 1, length)
    model.eval()
    with torch.inference_mode():
        losses = [float(loss_of(model, part)) * len(part) for part in windows.split(16)]
    return sum(losses) / len(windows)


# --- the whole --------------------------------------------------------------------------------------------------------


def save(folder: Path, model: Any, tokenizer: Tokenizer, recipe: Recipe) -> None:
    """Write the checkpoint folder, weights in bfloat16, and the tokenizer's three files."""
    import torch

    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    roles = {"bos_token": BOS, "eos_token": EOS}
    settings = roles | {"model_max_length": recipe.context, "clean_up_tokenization_spaces": False, "tokenizer_class": "PreTrainedTokenizerFast"}
    for name, content in (("special_tokens_map.json", roles), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def run(text: Path, folder: Path, recipe: Recipe) -> None:
    """Train on the text and write the model."""
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "model.safetensors").exists():
        raise SystemExit(f"{folder} already holds a model: delete it or give another folder")
    documents = read_documents(text, recipe.seed)
    tokenizer = train_tokenizer(documents, recipe.vocab)
    tokens, held_out = split_held_out(encode(tokenizer, documents), recipe.length)
    n_pass = math.ceil((len(tokens) - 1) // recipe.length / recipe.batch)
    recipe = replace(recipe, steps=recipe.steps or n_pass, vocab=tokenizer.get_vocab_size())
    print(f"{len(documents)} files, {tokenizer.get_vocab_size()} tokens in the vocabulary, {len(tokens)} to train on, {len(held_out)} held out")
    model = make_model(recipe)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters; {recipe.steps} steps, {recipe.steps / n_pass:.2f} passes over the text")
    checkpoint = folder / "training.pt"
    train(model, tokens, recipe, checkpoint)
    print(f"held out: {evaluate(model, held_out, recipe.length):.3f} nats per token")
    save(folder, model, tokenizer, recipe)
    checkpoint.unlink(missing_ok=True)
    print(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description="Train a small Llama for tests from a folder of text.")
    parser.add_argument("text", type=Path, metavar="TEXT_FOLDER", help="folder of UTF-8 text files, searched in depth")
    parser.add_argument("folder", type=Path, metavar="MODEL_FOLDER", help="where to write the model")
    parser.add_argument("--steps", type=int, default=Recipe.steps, help="training steps (default: one pass over the text)")
    parser.add_argument("--batch", type=int, default=Recipe.batch, help="sequences of a step (default: %(default)s)")
    parser.add_argument("--length", type=int, default=Recipe.length, help="tokens of a sequence (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=Recipe.learning_rate, help="peak learning rate (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=Recipe.seed, help="of the shuffles and the weights (default: %(default)s)")
    options = parser.parse_args()
    if not options.text.is_dir():
        parser.error(f"{options.text} is not a folder")
    run(
        options.text,
        options.folder,
        Recipe(steps=options.steps, batch=options.batch, length=options.length, learning_rate=options.learning_rate, seed=options.seed),
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
