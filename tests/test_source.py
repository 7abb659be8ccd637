"""From a checkpoint folder or a GGUF to tensors and metadata.

While this was written, llama.cpp's converter (run with its pre-tokenizer check replaced) was compared on the demo model
and on small Llama, Llama 3.1, Mistral, Qwen2 and Qwen3 checkpoints: tied and untied, with biases, sharded, with model
cards, old and new spelling, linear and yarn ropes, BF16, F16 and F32. All tensors' bytes, names and order, all keys,
their types and order were equal (but for Qwen2's tokens, where transformers adds its own to the borrowed vocabulary).
Llama 3.1's rope factors were compared for 270 settings: 267 equal, 3 of them (head dimension 96, frequency factors 2 and
8) differ in the last bit of one factor. What differs on purpose:

* `general.file_type` is written with the output, not here.
* 2-D weights keep their own stored types; upstream casts all of them to the type of the first one.
* A model in the Hub's cache is named after its repository; upstream takes the revision, forty digits.
* Embedding models (`{arch}.pooling_type`) and rerankers of the Qwen3 classes get no special keys.
* What upstream drops or lets pass is refused: activations other than SiLU, partial rotation, unknown rope types.
* Cards: values of a wrong type are left out with a note; upstream stops with a traceback, or writes them.
"""

from __future__ import annotations

import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_checkpoint import LLAMA_CONFIG, Stored, pack_safetensors, random_weights, write_checkpoint

from loopgguf import source as source_module
from loopgguf.architectures import tensor_order
from loopgguf.container import Value, ValueType, plan_layout, read_gguf, string, uint32, write_gguf
from loopgguf.errors import InputError, UsageError
from loopgguf.formats import GgmlType
from loopgguf.source import Source, Tensor, open_source

QWEN3 = LLAMA_CONFIG | {"architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
LAYER = "model.layers.0."


class FakeVocabulary(NamedTuple):
    metadata: dict[str, Value]
    notes: tuple[str, ...]


@pytest.fixture(autouse=True)
def vocabulary(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints here have no tokenizer files, but for the demo model's tests."""
    if "demo_model" in request.fixturenames:
        return

    def read(_folder: Path, _config: object, n_vocab: int, pre_tokenizer: str | None = None) -> FakeVocabulary:
        return FakeVocabulary({"tokenizer.ggml.model": string("gpt2"), "tokenizer.ggml.pre": string(pre_tokenizer or "found")}, (f"{n_vocab} tokens",))

    monkeypatch.setattr(source_module, "read_vocabulary", read)


def by_name(source: Source) -> dict[str, Tensor]:
    return {tensor.name: tensor for tensor in source.tensors}


def read_all(tensor: Tensor) -> np.ndarray:
    """Return the tensor's numbers as float32, in its shape."""
    raw = tensor.read_rows(0, tensor.n_rows)
    decode = {
        GgmlType.F32: lambda a: a.view(np.float32),
        GgmlType.F16: lambda a: a.view(np.float16).astype(np.float32),
        GgmlType.BF16: lambda a: widen(a.view(np.uint16)),
    }
    return decode[tensor.type](np.ascontiguousarray(raw)).reshape(tensor.shape)


def widen(bf16: np.ndarray) -> np.ndarray:
    return (bf16.astype(np.uint32) << 16).view(np.float32)


def permute(weight: np.ndarray, n_head: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k."""
    return weight.reshape(n_head, 2, weight.shape[0] // n_head // 2, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


# --- checkpoints ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_tensors_of_a_llama(tmp_path: Path, dtype: str) -> None:
    """A tensor under another's name, unpermuted, or in another type than stored makes a file that loads and babbles."""
    config = LLAMA_CONFIG | {"attention_bias": True, "mlp_bias": True}
    weights = random_weights(config, dtype)
    tensors = by_name(open_source(write_checkpoint(tmp_path, config, weights)))
    assert len(tensors) == len(weights)
    plain = {"BF16": widen, "F16": lambda a: a.astype(np.float32), "F32": lambda a: a}[dtype]
    for hf, gguf, n_head in [
        ("model.embed_tokens.weight", "token_embd.weight", 0),
        ("lm_head.weight", "output.weight", 0),
        ("model.norm.weight", "output_norm.weight", 0),
        ("model.layers.1.input_layernorm.weight", "blk.1.attn_norm.weight", 0),
        ("model.layers.1.post_attention_layernorm.weight", "blk.1.ffn_norm.weight", 0),
        ("model.layers.1.self_attn.q_proj.weight", "blk.1.attn_q.weight", 4),
        ("model.layers.1.self_attn.q_proj.bias", "blk.1.attn_q.bias", 4),
        ("model.layers.1.self_attn.k_proj.weight", "blk.1.attn_k.weight", 2),
        ("model.layers.1.self_attn.k_proj.bias", "blk.1.attn_k.bias", 2),
        ("model.layers.1.self_attn.v_proj.weight", "blk.1.attn_v.weight", 0),
        ("model.layers.1.self_attn.v_proj.bias", "blk.1.attn_v.bias", 0),
        ("model.layers.1.self_attn.o_proj.weight", "blk.1.attn_output.weight", 0),
        ("model.layers.1.mlp.gate_proj.weight", "blk.1.ffn_gate.weight", 0),
        ("model.layers.1.mlp.up_proj.weight", "blk.1.ffn_up.weight", 0),
        ("model.layers.1.mlp.down_proj.weight", "blk.1.ffn_down.weight", 0),
        ("model.layers.1.mlp.down_proj.bias", "blk.1.ffn_down.bias", 0),
    ]:
        expected = plain(weights[hf][1])
        tensor = tensors[gguf]
        assert tensor.type is (GgmlType[dtype] if expected.ndim == 2 else GgmlType.F32)
        assert np.array_equal(read_all(tensor), permute(expected, n_head) if n_head else expected), gguf


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_rows_of_a_permuted_tensor(tmp_path: Path, data: st.DataObject) -> None:
    """Slabs that begin or end inside a head must hold the rows that the whole tensor has there."""
    folder = tmp_path / "m"
    if not folder.exists():
        write_checkpoint(folder)
    for name in ("blk.0.attn_q.weight", "blk.1.attn_k.weight", "blk.1.ffn_up.weight"):
        tensor = by_name(open_source(folder))[name]
        start = data.draw(st.integers(0, tensor.n_rows))
        stop = data.draw(st.integers(start, tensor.n_rows))
        rows = tensor.read_rows(start, stop)
        assert rows.shape == (stop - start, 32) and rows.dtype == np.uint8 and rows.flags.c_contiguous
        assert np.array_equal(rows, tensor.read_rows(0, tensor.n_rows)[start:stop])


def test_tensors_of_a_qwen(tmp_path: Path) -> None:
    """Qwen's heads are rotated in halves by llama.cpp too: permuting them as Llama's would break the model."""
    weights = random_weights(QWEN3, optional=True)
    del weights["lm_head.weight"]
    tensors = by_name(open_source(write_checkpoint(tmp_path, QWEN3, weights)))
    assert "output.weight" not in tensors
    assert np.array_equal(read_all(tensors["blk.0.attn_q.weight"]), widen(weights[LAYER + "self_attn.q_proj.weight"][1]))
    assert np.array_equal(read_all(tensors["blk.0.attn_k.bias"]), widen(weights[LAYER + "self_attn.k_proj.bias"][1]))
    assert tensors["blk.0.attn_q_norm.weight"].shape == (8,)


def test_tied_checkpoint_that_stores_its_head(tmp_path: Path) -> None:
    """As upstream: a head that is stored is carried, for nobody has checked that it equals the embedding."""
    config = LLAMA_CONFIG | {"tie_word_embeddings": True}
    assert "output.weight" not in by_name(open_source(write_checkpoint(tmp_path / "a", config)))
    weights = random_weights(LLAMA_CONFIG)
    assert "output.weight" in by_name(open_source(write_checkpoint(tmp_path / "b", config, weights)))


def test_rope_factors_are_a_tensor(tmp_path: Path) -> None:
    """Without rope_freqs.weight a Llama 3.1 runs with Llama 3's rope, and long contexts fall apart."""
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    tensor = by_name(open_source(write_checkpoint(tmp_path, LLAMA_CONFIG | {"rope_scaling": scaling})))["rope_freqs.weight"]
    assert (tensor.shape, tensor.type, tensor.n_rows) == ((4,), GgmlType.F32, 1)
    factors = read_all(tensor)
    assert factors[0] == 1.0 and factors[-1] == 8.0 and tensor.read_rows(0, 1).shape == (1, 16)


def test_order_and_metadata(tmp_path: Path) -> None:
    """Keys, their order and the tensors' order are those of the converter."""
    source = open_source(write_checkpoint(tmp_path / "Tiny-chat", n_shards=3), pre_tokenizer="llama-bpe")
    assert [tensor.name for tensor in source.tensors] == sorted(by_name(source), key=tensor_order)
    assert [tensor.name for tensor in source.tensors][:4] == ["output.weight", "output_norm.weight", "token_embd.weight", "blk.0.attn_k.weight"]
    keys = list(source.metadata)
    assert keys[:2] == ["general.architecture", "general.type"] and keys[-3:] == ["general.quantization_version", "tokenizer.ggml.model", "tokenizer.ggml.pre"]
    assert source.metadata["general.quantization_version"] == uint32(2) and source.metadata["tokenizer.ggml.pre"] == string("llama-bpe")
    assert source.metadata["general.finetune"] == string("chat") and "general.file_type" not in keys
    assert source.notes == ("20 tokens",)
    assert source.is_checkpoint and [path.name for path in source.files][-1] == "model-00003-of-00003.safetensors"
    assert plan_layout(source.metadata, [(t.name, t.type, t.shape) for t in source.tensors]).total_bytes > 0


def test_demo_model_as_a_whole(demo_model: Path) -> None:
    """The real tokenizer reader and the real folder, once: counts and keys as upstream's converter gives them."""
    source = open_source(demo_model)
    assert len(source.tensors) == 57
    assert source.metadata["general.name"] == string("Demo Llama") and source.metadata["general.size_label"] == string("6.8M")
    assert source.metadata["llama.vocab_size"] == uint32(4096) and len(source.metadata["tokenizer.ggml.tokens"].data) == 4096
    assert source.metadata["tokenizer.ggml.pre"] == string("llama-bpe") and source.notes == ()


def test_checkpoint_and_its_gguf_are_the_same_stream(demo_model: Path, demo_gguf: Path) -> None:
    """Quantizing a folder must give what converting first and quantizing the GGUF gives."""
    folder, file = open_source(demo_model), open_source(demo_gguf)
    assert folder.tensors == file.tensors  # names, shapes, types, shards, order
    for a, b in zip(folder.tensors, file.tensors, strict=True):
        assert np.array_equal(a.read_rows(0, a.n_rows), b.read_rows(0, b.n_rows)), a.name
    assert file.metadata.keys() - folder.metadata.keys() == {"general.file_type"}
    assert not file.is_checkpoint


def test_buffers_of_old_checkpoints_are_skipped(tmp_path: Path) -> None:
    """Llama 1 and 2 checkpoints store inv_freq in F32 for every layer; it is no weight."""
    weights = random_weights(LLAMA_CONFIG) | {LAYER + "self_attn.rotary_emb.inv_freq": ("F32", np.ones(4, "<f4"))}
    assert "inv_freq" not in " ".join(by_name(open_source(write_checkpoint(tmp_path, weights=weights))))


def changed(name: str, stored: Stored | None) -> dict[str, Stored]:
    weights = random_weights(LLAMA_CONFIG)
    if stored is None:
        del weights[name]
    else:
        weights[name] = stored
    return weights


@pytest.mark.parametrize(
    ("name", "stored", "message"),
    [
        (LAYER + "mlp.up_proj.weight", None, r"missing tensor 'model\.layers\.0\.mlp\.up_proj\.weight'"),
        ("lm_head.weight", None, r"missing tensor 'lm_head\.weight'"),
        ("model.layers.2.mlp.up_proj.weight", ("F32", np.ones((24, 16), "<f4")), r"unknown tensor 'model\.layers\.2\.mlp\.up_proj\.weight' in .*\(1 such\)"),
        ("model.vision.weight", ("F32", np.ones((2, 2), "<f4")), r"unknown tensor 'model\.vision\.weight'"),
        ("model.embed_tokens.weight", ("F32", np.ones((21, 16), "<f4")), r"shape of tensor 'model\.embed_tokens\.weight'.*got \[21, 16\], expected \[20, 16\]"),
        ("model.norm.weight", ("F32", np.ones((16, 1), "<f4")), r"shape of tensor 'model\.norm\.weight'.*got \[16, 1\], expected \[16\]"),
        ("model.norm.weight", ("F32", np.ones(0, "<f4")), r"shape of tensor 'model\.norm\.weight'.*got \[0\]"),
        ("lm_head.weight", ("F8_E4M3", np.ones((20, 16), "u1")), r"dtype of tensor 'lm_head\.weight'.*got F8_E4M3, expected one of F32, F16, BF16"),
        ("lm_head.weight", ("I64", np.ones((20, 16), "<i8")), r"dtype of tensor 'lm_head\.weight'.*got I64"),
    ],
)
def test_weights_that_do_not_fit_the_config(tmp_path: Path, name: str, stored: Stored | None, message: str) -> None:
    """Found when the file is loaded, hours later, such things cost a night; a dropped tensor costs the model."""
    with pytest.raises(InputError, match=message):
        open_source(write_checkpoint(tmp_path, weights=changed(name, stored)))


@pytest.mark.parametrize(
    ("suffix", "scheme"),
    [
        ("self_attn.q_proj.qweight", "AWQ or GPTQ"),
        ("self_attn.q_proj.g_idx", "GPTQ"),
        ("self_attn.q_proj.weight_scale_inv", "FP8 in blocks"),
        ("mlp.experts.down_proj_blocks", "MXFP4"),
        ("self_attn.q_proj.weight.absmax", "bitsandbytes"),
        ("self_attn.q_proj.SCB", "bitsandbytes"),
        ("self_attn.q_proj.weight_packed", "compressed-tensors"),
    ],
)
def test_quantized_weights_are_named_whatever_the_config_says(tmp_path: Path, suffix: str, scheme: str) -> None:
    """`unknown tensor`, or a dtype, where the model is merely the wrong download: quantize_config.json of AutoGPTQ is no part of config.json."""
    weights = {**random_weights(LLAMA_CONFIG), LAYER + suffix: ("U8", np.ones(4, "u1"))}
    with pytest.raises(InputError, match=f"tensor '.*{suffix}' in .*: got weights quantized with {scheme}.*Give the original checkpoint"):
        open_source(write_checkpoint(tmp_path, weights=weights))


@pytest.mark.parametrize("name", ["chat_template.jinja", "README.md", "extra.safetensors", "additional_chat_templates/x.jinja"])
def test_links_out_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    """A cloned model whose chat template is a link to a private key, which then is part of every GGUF that is uploaded."""
    folder = write_checkpoint(tmp_path / "model")
    (tmp_path / "secret").write_text("-----BEGIN", encoding="utf-8")
    link = folder / name
    link.parent.mkdir(exist_ok=True)
    link.symlink_to(tmp_path / "secret")
    with pytest.raises(InputError, match=rf"{name} is a link to .*secret, outside of the checkpoint's folder"):
        open_source(folder)


def test_not_a_model(tmp_path: Path) -> None:
    """Each wrong path says what was expected there and what to give instead."""
    with pytest.raises(InputError, match=r"no model at .*nowhere"):
        open_source(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no config\.json in .*expected a Hugging Face checkpoint folder or a GGUF"):
        open_source(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(InputError, match="LoRA adapter"):
        open_source(tmp_path)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(InputError, match=r"Give the file itself, such as .*m\.gguf"):
        open_source(tmp_path)
    write_checkpoint(tmp_path / "c")
    with pytest.raises(InputError, match=r"one file of a checkpoint.*Give .*/c$"):
        open_source(tmp_path / "c" / "model.safetensors")
    (tmp_path / "c" / "config.json").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(InputError, match=r"config\.json is a git-lfs pointer"):
        open_source(tmp_path / "c")


# --- GGUF ----------------------------------------------------------------------------------------------------------------


def small_gguf(path: Path, **extra: Value) -> Path:
    metadata = {"general.architecture": string("llama"), "tokenizer.ggml.bad": Value(ValueType.STRING, "\udcff")} | extra
    experts = np.arange(2 * 3 * 32, dtype=np.float32).reshape(2, 3, 32)
    tensors = [
        ("token_embd.weight", GgmlType.F32, experts[0]),
        ("blk.10.ffn_up_exps.weight", GgmlType.F32, experts),
        ("blk.9.x.weight", GgmlType.F32, experts[1]),
    ]
    write_gguf(path, metadata, tensors)
    return path


def test_gguf_is_passed_on(tmp_path: Path) -> None:
    """Metadata of a GGUF is copied, unknown keys and broken UTF-8 included; experts are rows of matrices."""
    source = open_source(small_gguf(tmp_path / "m.gguf"))
    assert source.metadata == read_gguf(tmp_path / "m.gguf").metadata and not source.is_checkpoint
    assert [tensor.name for tensor in source.tensors] == ["token_embd.weight", "blk.9.x.weight", "blk.10.ffn_up_exps.weight"]
    experts = by_name(source)["blk.10.ffn_up_exps.weight"]
    assert (experts.n_matrices, experts.n_rows, experts.n_in) == (2, 6, 32)
    assert experts.read_rows(4, 5).view(np.float32)[0, 0] == 4 * 32


def test_split_gguf(tmp_path: Path) -> None:
    """Tensors of all shards are one stream that remembers its shards; split.* keys do not get into a whole file."""
    split = {"split.count": Value(ValueType.UINT16, 2), "split.tensors.count": Value(ValueType.INT32, 2)}
    for number, (name, value) in enumerate([("blk.1.x.weight", 1.0), ("blk.0.x.weight", 2.0)]):
        metadata = {"general.architecture": string("llama")} if number == 0 else {}
        rows = np.full((2, 4), value, np.float32)
        path = tmp_path / f"m-{number + 1:05d}-of-00002.gguf"
        write_gguf(path, metadata | split | {"split.no": Value(ValueType.UINT16, number)}, [(name, GgmlType.F32, rows)])
    source = open_source(tmp_path / "m-00001-of-00002.gguf")
    assert [(tensor.name, tensor.shard) for tensor in source.tensors] == [("blk.0.x.weight", 1), ("blk.1.x.weight", 0)]
    assert [read_all(tensor)[0, 0] for tensor in source.tensors] == [2.0, 1.0]
    assert source.metadata == {"general.architecture": string("llama")} and len(source.files) == 2


def test_gguf_that_is_no_model(tmp_path: Path) -> None:
    """An imatrix, an adapter or a vocabulary given as MODEL is named before any work."""
    with pytest.raises(InputError, match=r"general\.type in .*got 'imatrix'"):
        open_source(small_gguf(tmp_path / "i.gguf", **{"general.type": string("imatrix")}))
    with pytest.raises(InputError, match=r"general\.architecture in .*got 7"):
        open_source(small_gguf(tmp_path / "a.gguf", **{"general.architecture": uint32(7)}))
    write_gguf(tmp_path / "v.gguf", {"general.architecture": string("llama")}, [])
    with pytest.raises(InputError, match="holds no tensors"):
        open_source(tmp_path / "v.gguf")
    with pytest.raises(UsageError, match="--pre-tokenizer qwen2"):
        open_source(small_gguf(tmp_path / "m.gguf"), pre_tokenizer="qwen2")


# --- reading and fingerprints ---------------------------------------------------------------------------------------------


def test_reading_from_many_threads(tmp_path: Path) -> None:
    """A shared file position would mix the rows of threads."""
    tensor = by_name(open_source(write_checkpoint(tmp_path)))["blk.0.attn_q.weight"]
    whole = tensor.read_rows(0, tensor.n_rows)
    start = threading.Barrier(4)

    def read(thread: int) -> bool:
        start.wait()
        return all(np.array_equal(tensor.read_rows(row, row + 1)[0], whole[row]) for row in range(tensor.n_rows) for _ in range(thread + 5))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(read, range(4)))


def test_file_that_changes_under_us(tmp_path: Path) -> None:
    """A shard that is replaced while it is read must not give zeros or a traceback."""
    tensor = by_name(open_source(write_checkpoint(tmp_path)))["blk.1.ffn_down.weight"]
    os.truncate(tmp_path / "model.safetensors", 100)
    with pytest.raises(InputError, match=r"model\.safetensors shrank"):
        tensor.read_rows(0, tensor.n_rows)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"cannot read .*model\.safetensors"):
        tensor.read_rows(0, 1)


def test_fingerprint_follows_what_matters(tmp_path: Path) -> None:
    """A cached imatrix or conversion of another model must never be taken; the same one should be."""
    folder = write_checkpoint(tmp_path / "m")
    first = open_source(folder).fingerprint
    assert open_source(folder).fingerprint == first and len(first) == 64
    seen = {first, open_source(folder, pre_tokenizer="x").fingerprint}
    for change in (
        lambda: (folder / "tokenizer.json").write_text("{}", encoding="utf-8"),
        lambda: (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG | {"rope_theta": 2e4}), encoding="utf-8"),
        lambda: (folder / "model.safetensors").write_bytes(pack_safetensors(random_weights(LLAMA_CONFIG), {"__metadata__": {}})),
        lambda: os.utime(folder / "model.safetensors", ns=(1, 1)),
    ):
        change()
        found = open_source(folder).fingerprint
        assert found not in seen
        seen.add(found)


def test_fingerprint_of_a_gguf(tmp_path: Path) -> None:
    """Two files of the same size and time differ by their headers."""
    prints = set()
    for name in ("abc", "abd"):
        path = small_gguf(tmp_path / name / "m.gguf", **{"general.name": string(name)})
        os.utime(path, ns=(1, 1))
        prints.add(open_source(path).fingerprint)
    assert len(prints) == 2
