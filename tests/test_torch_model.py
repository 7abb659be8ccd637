"""torch_model.py: a folder that does not fit what is expected of it is refused by name; edits and devices, seen from a pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from loopgguf import ggml
from loopgguf.accumulators import Columns, ColumnSums
from loopgguf.architectures import rope_source_rows
from loopgguf.errors import InputError, UsageError
from loopgguf.formats import GgmlType
from loopgguf.layerwise import collect_from_checkpoint
from loopgguf.loss import PassResult
from loopgguf.source import Tensor, open_source
from loopgguf.torch_model import StreamedModel, WeightEdit

THREADS = 1


def run_checkpoint(folder: Path, chunks: np.ndarray, **options: object) -> tuple[dict[str, Columns], PassResult]:
    sums = ColumnSums()
    result = collect_from_checkpoint(folder, chunks, [sums], n_threads=THREADS, **options)  # type: ignore[arg-type]
    return sums.columns(), result


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


# --- edits and devices ----------------------------------------------------------------------------------------------------


def test_an_edit_changes_one_weight_in_the_ggufs_order(demo_model: Path, chunks: np.ndarray):
    """Catches an edit of the checkpoint's row where the GGUF's was meant, or one that stays in memory for the next layer."""
    row = 3
    source = int(rope_source_rows(0, 256, 64)[row])
    assert source != row

    class Outputs:
        def __init__(self) -> None:
            self.seen: dict[str, list[np.ndarray]] = {}

        def add(self, name: str, matrix: int | None, X: np.ndarray) -> None:
            pass

        def add_output(self, name: str, matrix: int | None, Y: np.ndarray) -> None:
            self.seen.setdefault(name, []).append(Y.copy())

    plain, edited = Outputs(), Outputs()
    collect_from_checkpoint(demo_model, chunks[:1, :32], [plain], n_threads=THREADS)
    edits = [WeightEdit("blk.0.attn_q.weight", row, 5, 50.0)]
    collect_from_checkpoint(demo_model, chunks[:1, :32], [edited], n_threads=THREADS, edits=edits)
    differs = np.abs(plain.seen["blk.0.attn_q.weight"][0] - edited.seen["blk.0.attn_q.weight"][0]).max(axis=0) > 1e-3
    assert np.flatnonzero(differs).tolist() == [row]
    assert np.abs(plain.seen["blk.0.attn_k.weight"][0] - edited.seen["blk.0.attn_k.weight"][0]).max() < 1e-6


def state_of(model: StreamedModel, layer: int) -> dict[str, np.ndarray]:
    with model.block([layer]):
        return {name: values.numpy().copy() for name, values in model.layers[layer].state_dict().items()}


def test_weights_of_a_file_stand_in_for_the_checkpoints(demo_model: Path, chunks: np.ndarray):
    """Catches weights in the GGUF's row order, of another layer, or of the file as it was when it was asked first; embeddings of
    other tokens; and a file that changes what it does not have."""
    source = {tensor.name: tensor for tensor in open_source(demo_model).tensors}
    has: dict[str, Tensor] = {}

    def write(name: str, ggml_type: GgmlType) -> np.ndarray:
        """Let the file have a tensor, and return its rows, (n_rows, n_in)."""
        tensor = source[name]
        packed = ggml.encode_rows(ggml_type, ggml.decode_rows(tensor.type, tensor.read_rows(0, tensor.n_rows)))
        has[name] = Tensor(name, tensor.shape, ggml_type, lambda start, stop: packed[start:stop])
        return ggml.decode_rows(ggml_type, packed)

    asked: list[str] = []
    plain, model = (
        StreamedModel(demo_model, attention="sdpa", device="cpu", written=find)
        for find in (lambda _name: None, lambda name: (asked.append(name), has.get(name))[1])
    )
    before = state_of(plain, 1)
    assert all(np.array_equal(values, before[name]) for name, values in state_of(model, 1).items())
    assert np.array_equal(model.embed(chunks[0]), plain.embed(chunks[0]))
    expected = dict(before)
    for kind, path, n_head in (("attn_q", "self_attn.q_proj", 4), ("attn_k", "self_attn.k_proj", 2), ("attn_v", "self_attn.v_proj", 0)):
        rows = write(f"blk.1.{kind}.weight", GgmlType.Q4_0)
        pairs = rows.reshape(n_head, 32, 2, -1).swapaxes(1, 2) if n_head else rows  # llama.cpp rotates neighbours, Hugging Face halves
        expected[f"{path}.weight"] = pairs.reshape(rows.shape)
    expected["input_layernorm.weight"] = write("blk.1.attn_norm.weight", GgmlType.F32)[0]
    embeddings = write("token_embd.weight", GgmlType.Q8_0)
    got = state_of(model, 1)
    assert all(np.array_equal(got[name], values) for name, values in expected.items()) and set(got) == set(expected)
    assert all(np.abs(got[f"self_attn.{name}_proj.weight"] - before[f"self_attn.{name}_proj.weight"]).max() > 1e-4 for name in "qkv")
    assert np.array_equal(model.embed(chunks[0]), embeddings[chunks[0]]) and not np.array_equal(model.embed(chunks[0]), plain.embed(chunks[0]))
    assert all(np.array_equal(values, state_of(plain, 0)[name]) for name, values in state_of(model, 0).items())
    has.clear()
    assert all(np.array_equal(values, before[name]) for name, values in state_of(model, 1).items())
    assert {"blk.0.ffn_down.weight", "blk.1.ffn_norm.weight", "token_embd.weight"} <= set(asked)


def test_an_unknown_device(demo_model: Path, chunks: np.ndarray):
    """Catches a traceback of torch, or a silent fall back to the CPU."""
    with pytest.raises(UsageError, match="--device: got mps, expected cpu"):
        run_checkpoint(demo_model, chunks, device="mps")
