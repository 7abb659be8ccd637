"""layerwise.py: one block of layers at a time gives what the whole model at once gives, forward and backward."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from loopgguf.accumulators import (
    AttentionMass,
    Columns,
    ColumnSums,
    GramSet,
    GramSums,
    HoldoutSplit,
    OutputMeans,
    Spikes,
    merge_grams,
    split_holdout,
    summarize_layer,
)
from loopgguf.architectures import input_group, rope_source_rows, tensor_role
from loopgguf.calibration import default_text, load_chunks
from loopgguf.errors import InputError, OutputError, UsageError
from loopgguf.layerwise import GradientPlan, WeightEdit, collect_from_checkpoint, collect_gradients, finished_layers, plan_gradient_pass
from loopgguf.llama import Model

THREADS = 1


def squares(X: np.ndarray) -> np.ndarray:
    return (X.astype(np.float64) ** 2).sum(axis=0)


@pytest.fixture(scope="module")
def chunks(demo_gguf: Path) -> np.ndarray:
    """Four chunks of 128 tokens of the default text in the demo vocabulary."""
    with Model(demo_gguf, vocab_only=True) as model:
        return load_chunks(model, [default_text("calibration")], 128, 4).tokens


# --- forward ------------------------------------------------------------------------------------------------------------


def run_checkpoint(folder: Path, chunks: np.ndarray, **options: object) -> tuple[dict[str, Columns], object]:
    sums = ColumnSums()
    result = collect_from_checkpoint(folder, chunks, [sums], n_threads=THREADS, **options)  # type: ignore[arg-type]
    return sums.columns(), result


@pytest.fixture(scope="module")
def torch_pass(demo_model: Path, chunks: np.ndarray):
    seen = []
    columns, result = run_checkpoint(demo_model, chunks, process_output=True, progress=lambda *step: seen.append(step))
    return columns, result, seen


LINEARS = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output"}
LINEARS |= {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}


def assert_equals_whole_model(folder: Path, chunks: np.ndarray, columns: dict[str, Columns], perplexity: float) -> None:
    """Run all chunks through the whole model at once and compare the inputs of its linears."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    inputs: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0]}))
    with torch.no_grad():
        logits = model(torch.from_numpy(chunks).long()).logits
    head = inputs.pop("lm_head")
    if "output.weight" in columns:
        np.testing.assert_allclose(columns["output.weight"].sum_squares[0], squares(head.flatten(0, 1).numpy()), rtol=1e-4)
    assert len(inputs) == len(set(columns) - {"output.weight"})
    for hf, X in inputs.items():
        layer, kind = hf.removeprefix("model.layers.").split(".", 1)
        got = columns[f"blk.{layer}.{LINEARS[kind]}.weight"]
        assert got.counts.tolist() == [chunks.size]
        np.testing.assert_allclose(got.sum_squares[0], squares(X.flatten(0, 1).numpy()), rtol=1e-4, err_msg=hf)
    first = chunks.shape[1] // 2
    targets = torch.from_numpy(chunks[:, first + 1 :]).long().flatten()
    nll = torch.nn.functional.cross_entropy(logits[:, first:-1].flatten(0, 1), targets)
    assert perplexity == pytest.approx(float(nll.exp()), rel=1e-5)


def test_layer_by_layer_equals_the_whole_model(demo_model: Path, chunks: np.ndarray, torch_pass):
    """Catches wrong positions, masks or rope buffers, a layer's weights mixed up, and a wrong perplexity."""
    columns, result, seen = torch_pass
    assert_equals_whole_model(demo_model, chunks, columns, result.perplexity)
    assert "output.weight" in columns
    assert seen[-1][1] == seen[-1][2] == len(seen)


LLAMA3 = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {"rope_parameters": LLAMA3, "attention_bias": True, "mlp_bias": True}),
        ("Mistral", {"sliding_window": 8}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 16}),
    ],
)
def test_every_family_equals_its_whole_model(family: str, options: dict[str, object], tmp_path: Path):
    """Catches a family whose buffers, biases, norms, windows or tied head are lost on the way through single layers."""
    import torch
    import transformers

    torch.manual_seed(5)
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{family}Config")(**sizes, **options, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, initializer_range=0.2)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    tokens = np.random.default_rng(6).integers(0, 300, (2, 32)).astype(np.int32)
    columns, result = run_checkpoint(tmp_path, tokens, process_output=True)
    assert_equals_whole_model(tmp_path, tokens, columns, result.perplexity)


def test_spilled_hidden_states_change_nothing(demo_model: Path, chunks: np.ndarray, torch_pass):
    """Catches chunks that come back from the temporary file in another order."""
    columns, result = run_checkpoint(demo_model, chunks, hidden_limit_bytes=0)
    assert result == torch_pass[1]
    assert all((c.sum_squares == torch_pass[0][name].sum_squares).all() for name, c in columns.items())


@pytest.fixture
def broken(demo_model: Path, tmp_path: Path) -> Path:
    """A copy of the demo folder to damage."""
    return Path(shutil.copytree(demo_model, tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps(config | changes), encoding="utf-8")


def test_tied_head_is_the_embedding(broken: Path, chunks: np.ndarray):
    """Catches a tied model that is scored with a head it does not have, and `output.weight` collected for it."""
    edit_config(broken, tie_word_embeddings=True)
    columns, result = run_checkpoint(broken, chunks[:1], process_output=True)
    assert "output.weight" not in columns
    assert result.perplexity > 100


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architectures": ["NewForCausalLM"]}, "NewForCausalLM"),
        ({"model_type": "new", "auto_map": {"AutoConfig": "code.NewConfig"}}, "config.json"),
        ({"model_type": "qwen2"}, "got 'qwen2', a Qwen2ForCausalLM"),
        ({"num_hidden_layers": 7}, "model.layers.6.* is missing"),
        ({"vocab_size": 64}, "token ids: got up to"),
        ({"intermediate_size": 640}, r"weights of model.layers.0.\* in .* do not fit config.json"),
        ({"hidden_size": "wide"}, "hidden_size in config.json"),
        ({"attention_dropout": "much"}, "transformers cannot build"),
    ],
)
def test_unfit_config_is_refused(broken: Path, chunks: np.ndarray, changes: dict[str, object], said: str):
    """Catches code of the folder run, another class computed in silence, and tracebacks from inside transformers."""
    edit_config(broken, **changes)
    (broken / "code.py").write_text("raise SystemExit('code of the model was run')", encoding="utf-8")
    with pytest.raises(InputError, match=said):
        run_checkpoint(broken, chunks)


def test_damaged_weights_are_refused(broken: Path, chunks: np.ndarray):
    """Catches tracebacks of safetensors, a pickle that is opened, and an index that leads out of the folder."""
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(InputError, match=r"model\.safetensors"):
        run_checkpoint(broken, chunks)
    weights.rename(broken / "pytorch_model.bin")
    with pytest.raises(InputError, match="only as pickle"):
        run_checkpoint(broken, chunks)
    (broken / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": "../x.safetensors"}}), encoding="utf-8")
    with pytest.raises(InputError, match=r"got '../x\.safetensors'"):
        run_checkpoint(broken, chunks)


def test_nan_weights_name_the_weight_that_sees_them(broken: Path, chunks: np.ndarray):
    """Catches an imatrix made of a damaged model."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(broken / "model.safetensors")
    tensors["model.layers.2.mlp.up_proj.weight"][0, 0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"activations of blk\.2\.ffn_down\.weight"):
        run_checkpoint(broken, chunks)
