"""torch_model.py: a folder that does not fit what is expected of it is refused by name; edits and devices, seen from a pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from loopgguf.accumulators import Columns, ColumnSums
from loopgguf.architectures import rope_source_rows
from loopgguf.errors import InputError, UsageError
from loopgguf.layerwise import collect_from_checkpoint
from loopgguf.loss import PassResult
from loopgguf.torch_model import WeightEdit

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


def test_an_unknown_device(demo_model: Path, chunks: np.ndarray):
    """Catches a traceback of torch, or a silent fall back to the CPU."""
    with pytest.raises(UsageError, match="--device: got mps, expected cpu"):
        run_checkpoint(demo_model, chunks, device="mps")
