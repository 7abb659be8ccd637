"""Tokenizers of some hundred tokens, trained on the torture text in a second: byte-level BPE, and SentencePiece."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from loopgguf.pre_tokenizers import PRE_TOKENIZERS
from loopgguf.proof import TORTURE_TEXT
from loopgguf.vocabulary import Vocabulary

LLAMA_CONFIG = {"model_type": "llama", "bos_token_id": 1, "eos_token_id": 2}
N_BPE = 700
N_SPM = 1200
EDIT = Callable[[dict[str, Any]], None]


def data(vocabulary: Vocabulary, key: str) -> Any:
    return vocabulary.metadata[f"tokenizer.ggml.{key}"].data


def edit_json(path: Path, edit: EDIT) -> None:
    parsed = json.loads(path.read_text(encoding="utf-8"))
    edit(parsed)
    path.write_text(json.dumps(parsed), encoding="utf-8")


def train_byte_level(steps: tuple[str, ...], *, normalizer: normalizers.Normalizer | None = None, ignore_merges: bool = False) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    splits = [pre_tokenizers.Split(Regex(step), "isolated") for step in steps]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(vocab_size=N_BPE - 20, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    tokenizer.train_from_iterator(TORTURE_TEXT, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False)])
    return tokenizer


@functools.cache
def _llama3_json() -> str:
    return train_byte_level(PRE_TOKENIZERS["llama-bpe"], ignore_merges=True).to_str()


def write_byte_level(folder: Path) -> Path:
    """Write a byte-level tokenizer.json with Llama 3's splits and its tokenizer_config.json; return the folder."""
    (folder / "tokenizer.json").write_text(_llama3_json(), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}}), encoding="utf-8")
    return folder


@functools.cache
def _sentencepiece_bytes(**options: object) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text("\n".join(TORTURE_TEXT), encoding="utf-8")
        settings = {
            "model_type": "bpe",
            "byte_fallback": True,
            "character_coverage": 0.98,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "vocab_size": N_SPM - 20,
            "split_digits": True,
            "minloglevel": 2,
            **options,
        }
        sentencepiece.SentencePieceTrainer.train(input=str(text), model_prefix=str(Path(scratch) / "tokenizer"), **settings)
        return (Path(scratch) / "tokenizer.model").read_bytes()


def write_sentencepiece(folder: Path, **options: object) -> Path:
    """Write a BPE tokenizer.model with byte fallback and no normalization, as Llama 2's is; return its path."""
    path = folder / "tokenizer.model"
    path.write_bytes(_sentencepiece_bytes(**options))
    return path


def converted_from_sentencepiece(model: Path) -> Tokenizer:
    """A tokenizer.json as transformers converts a BPE tokenizer.model: all splits of a piece are merges, by its score."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocab = {processor.id_to_piece(i): i for i in range(processor.vocab_size())}
    splits = [
        (text[:i], text[i:], processor.get_score(token))
        for text, token in vocab.items()
        for i in range(1, len(text))
        if text[:i] in vocab and text[i:] in vocab
    ]
    merges = [(left, right) for left, right, score in sorted(splits, key=lambda split: (-split[2], vocab[split[0]], vocab[split[1]]))]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", 1)])
    return tokenizer
