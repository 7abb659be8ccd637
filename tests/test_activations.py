"""activations.py: both engines show the inputs that the weights really get; oracles are numpy and the whole model at once."""

from __future__ import annotations

import ctypes
import itertools
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tiny_llama import write_tiny_llama

from loopgguf import ggml
from loopgguf.accumulators import ColumnSums, HoldoutSplit, Spikes
from loopgguf.activations import (
    GgmlTensor,
    _Watcher,
    collect_from_checkpoint,
    collect_from_gguf,
    collect_grams_from_checkpoint,
    collect_grams_from_gguf,
    gguf_passes,
    read_tensor,
    split_experts,
    split_matrices,
    strip_name,
)
from loopgguf.attention import AttentionMass
from loopgguf.calibration import default_text, load_chunks
from loopgguf.container import GgufFile, float32, read_gguf, string, uint32, write_gguf
from loopgguf.curvature import GramSet, GramSums
from loopgguf.errors import InputError
from loopgguf.formats import GgmlType
from loopgguf.llama import Model
from loopgguf.torch_model import WeightEdit

THREADS = 1  # the engines' threads spin at barriers, which makes them slow beside other processes


class Recorder:
    """An accumulator that keeps copies of everything it is shown."""

    def __init__(self) -> None:
        self.slabs: dict[tuple[str, int | None], list[np.ndarray]] = {}

    def add(self, name: str, matrix: int | None, X: np.ndarray) -> None:
        self.slabs.setdefault((name, matrix), []).append(X.copy())

    def all(self, name: str, matrix: int | None = None) -> np.ndarray:
        return np.concatenate(self.slabs[name, matrix])


class OutputMeans:
    """An accumulator of the mean output of every matrix."""

    def __init__(self) -> None:
        self.slabs: dict[tuple[str, int | None], list[np.ndarray]] = {}

    def add(self, name: str, matrix: int | None, X: np.ndarray) -> None: ...

    def add_output(self, name: str, matrix: int | None, Y: np.ndarray) -> None:
        self.slabs.setdefault((name, matrix), []).append(Y.copy())

    def means(self) -> dict[tuple[str, int | None], np.ndarray]:
        return {key: np.concatenate(slabs).mean(axis=0) for key, slabs in self.slabs.items()}


def squares(X: np.ndarray) -> np.ndarray:
    return (X.astype(np.float64) ** 2).sum(axis=0)


@pytest.fixture(scope="module")
def demo_tensors(demo_gguf: Path):
    file = read_gguf(demo_gguf)
    return lambda name: read_floats(file, name)


def read_floats(file: GgufFile, name: str) -> np.ndarray:
    info = next(t for t in file.tensors if t.name == name)
    packed = np.fromfile(file.path, np.uint8, info.n_bytes, offset=info.offset)
    n_rows = int(np.prod(info.shape[:-1], dtype=int))
    return ggml.decode_rows(info.type, packed.reshape(n_rows, -1)).reshape(info.shape)


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float = 1e-5) -> np.ndarray:
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * weight


# --- pieces -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "name"),
    [
        (b"blk.0.attn_k.weight", "blk.0.attn_k.weight"),
        (b"CUDA0#blk.0.attn_k.weight#0", "blk.0.attn_k.weight"),
        (b"CUDA0#blk.0.attn_k.weight", "blk.0.attn_k.weight"),
    ],
)
def test_strip_name(raw: bytes, name: str):
    """Catches an imatrix full of device copies' names, which matches no weight (imatrix.cpp, filter_tensor_name)."""
    assert strip_name(raw) == name


def test_read_tensor_follows_strides():
    """Catches expert ids read as if they were contiguous: they are a view of the sorted list of all experts."""
    backing = np.arange(40, dtype=np.int32).reshape(5, 8)
    tensor = GgmlTensor(type=GgmlType.I32, ne=(2, 5, 1, 1), nb=(4, 32, 160, 160), data=backing.ctypes.data)
    got = read_tensor(tensor, "<i4")
    assert got.shape == (1, 1, 5, 2)
    assert (got[0, 0] == backing[:, :2]).all()
    assert ctypes.sizeof(GgmlTensor) == 336


@pytest.mark.parametrize("n_slots", [1, 2])
def test_split_experts_is_imatrix_cpps_double_loop(n_slots: int):
    """Catches up/gate (one input for all experts) confused with down (one input per slot), and unreached experts left out."""
    rng = np.random.default_rng(2)
    X = rng.standard_normal((6, n_slots, 3)).astype(np.float32)
    ids = np.array([[0, 2], [2, 0], [4, 2], [0, 4], [2, 4], [4, 0]], np.int32)
    sums, counts = np.zeros((5, 3)), np.zeros(5)
    for slot in range(ids.shape[1]):
        for row in range(ids.shape[0]):
            counts[ids[row, slot]] += 1
            sums[ids[row, slot]] += X[row, slot % n_slots].astype(np.float64) ** 2
    parts = dict(split_experts(X, ids, 5))
    assert list(parts) == [0, 1, 2, 3, 4]
    assert [len(part) for part in parts.values()] == counts.tolist()
    np.testing.assert_allclose([squares(part) for part in parts.values()], sums, rtol=1e-6)


def test_split_matrices():
    """Catches heads of a stacked weight mixed, and a batch dimension of inputs dropped under a plain weight."""
    X = np.arange(3 * 4 * 2, dtype=np.float32).reshape(1, 3, 4, 2)
    [(matrix, flat)] = split_matrices(X, (1, 1))
    assert matrix is None and flat.shape == (12, 2)
    stacked = dict(split_matrices(X, (1, 3)))
    assert list(stacked) == [0, 1, 2] and (stacked[1] == X[0, 1]).all()


# --- llama.cpp ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama_pass(demo_gguf: Path, chunks: np.ndarray):
    recorder, sums, seen = Recorder(), ColumnSums(), []
    result = collect_from_gguf(demo_gguf, chunks, [recorder, sums], n_threads=THREADS, progress=lambda *step: seen.append(step))
    return recorder, sums.columns(), result, seen


def test_llama_cpp_collects_what_llama_imatrix_does(llama_pass, chunks: np.ndarray):
    """Catches lost weights, attention's own products taken for weights, and the head collected without being asked."""
    _, columns, result, seen = llama_pass
    kinds = ("attn_k", "attn_output", "attn_q", "attn_v", "ffn_down", "ffn_gate", "ffn_up")
    assert sorted(columns) == sorted(f"blk.{i}.{kind}.weight" for i in range(6) for kind in kinds)
    assert all(c.counts.tolist() == [chunks.size] for c in columns.values())  # the last layer sees all tokens too
    assert result.n_tokens == 4 * (128 - 1 - 64)
    assert [step[1:] for step in seen] == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert seen[-1][0].endswith(f" tok/s, perplexity {result.perplexity:.4g}")
    assert seen[0][0] != seen[-1][0]


def test_first_layer_equals_numpy(llama_pass, chunks: np.ndarray, demo_tensors):
    """Catches inputs read from the wrong operand or at the wrong stride: blk.0's q, k, v read the normalised embedding."""
    recorder, columns, _, _ = llama_pass
    X = rms_norm(demo_tensors("token_embd.weight")[chunks.reshape(-1)], demo_tensors("blk.0.attn_norm.weight"))
    for kind in "qkv":
        np.testing.assert_allclose(recorder.all(f"blk.0.attn_{kind}.weight"), X, atol=1e-4)
        np.testing.assert_allclose(columns[f"blk.0.attn_{kind}.weight"].sum_squares[0], squares(X), rtol=1e-5)


def test_sums_equal_float64_sums_of_the_same_inputs(llama_pass):
    """Catches accumulation error beyond 1e-4 on any column of any weight."""
    recorder, columns, _, _ = llama_pass
    for name, c in columns.items():
        np.testing.assert_allclose(c.sum_squares[0], squares(recorder.all(name)), rtol=1e-5)


def test_process_output_adds_the_head(demo_gguf: Path, chunks: np.ndarray):
    """Catches a flag that does nothing."""
    sums = ColumnSums()
    collect_from_gguf(demo_gguf, chunks[:1], [sums], n_threads=THREADS, process_output=True)
    assert "output.weight" in sums.columns()


@pytest.mark.parametrize("tied", [True, False])
def test_the_head_shows_its_input_to_matrices_alone(tied: bool, tmp_path: Path):
    """Catches a tied head that error feedback knows nothing of, or a head that an imatrix then has data for unasked."""
    path = write_tiny_llama(tmp_path / "tiny.gguf", tied=tied)
    tokens = np.arange(32, dtype=np.int32)[None] + 3
    sums, grams = ColumnSums(), GramSums()
    collect_from_gguf(path, tokens, [sums, grams], n_threads=THREADS)
    head = grams.take().inputs["output_norm", None]
    assert not {"output.weight", "token_embd.weight"} & set(sums.columns())
    assert head.n_tokens == 32
    np.testing.assert_allclose(np.trace(head.mean), len(head.total), rtol=1e-3)  # the norm before it has weights of one


def test_an_accumulators_error_ends_the_pass(demo_gguf: Path, chunks: np.ndarray):
    """Catches an exception swallowed by ctypes, after which half of the sums are missing."""

    class Failing:
        def add(self, name: str, matrix: int | None, X: np.ndarray) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        collect_from_gguf(demo_gguf, chunks, [Failing()], n_threads=THREADS)


def test_a_gguf_needs_no_torch(demo_gguf: Path):
    """Catches an import that costs every command on a GGUF three seconds."""
    code = (
        "import sys, pathlib, numpy as np; from loopgguf.activations import collect_from_gguf; from loopgguf.accumulators import ColumnSums;"
        f"collect_from_gguf(pathlib.Path({str(demo_gguf)!r}), np.ones((1, 16), np.int32), [ColumnSums()], n_threads=1);"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent.parent)


# --- experts ------------------------------------------------------------------------------------------------------------

N_EMBD, N_FF, N_EXPERT, N_USED, N_HEAD, N_VOCAB = 64, 32, 8, 2, 4, 100


@pytest.fixture(scope="module")
def moe_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random one-layer Qwen3-MoE in F32 without a tokenizer."""
    rng = np.random.default_rng(3)
    d = N_EMBD // N_HEAD
    shapes = {
        "token_embd.weight": (N_VOCAB, N_EMBD),
        "output.weight": (N_VOCAB, N_EMBD),
        "output_norm.weight": (N_EMBD,),
        "blk.0.attn_norm.weight": (N_EMBD,),
        "blk.0.attn_q.weight": (N_EMBD, N_EMBD),
        "blk.0.attn_k.weight": (N_EMBD, N_EMBD),
        "blk.0.attn_v.weight": (N_EMBD, N_EMBD),
        "blk.0.attn_output.weight": (N_EMBD, N_EMBD),
        "blk.0.attn_q_norm.weight": (d,),
        "blk.0.attn_k_norm.weight": (d,),
        "blk.0.ffn_norm.weight": (N_EMBD,),
        "blk.0.ffn_gate_inp.weight": (N_EXPERT, N_EMBD),
        "blk.0.ffn_gate_exps.weight": (N_EXPERT, N_FF, N_EMBD),
        "blk.0.ffn_up_exps.weight": (N_EXPERT, N_FF, N_EMBD),
        "blk.0.ffn_down_exps.weight": (N_EXPERT, N_EMBD, N_FF),
    }
    keys = {"block_count": 1, "context_length": 64, "embedding_length": N_EMBD, "feed_forward_length": N_FF, "expert_feed_forward_length": N_FF}
    keys |= {"attention.head_count": N_HEAD, "attention.head_count_kv": N_HEAD, "attention.key_length": d, "attention.value_length": d}
    keys |= {"expert_count": N_EXPERT, "expert_used_count": N_USED, "vocab_size": N_VOCAB}
    metadata = {"general.architecture": string("qwen3moe"), "tokenizer.ggml.model": string("none")}
    metadata |= {f"qwen3moe.{key}": uint32(value) for key, value in keys.items()}
    metadata |= {"qwen3moe.attention.layer_norm_rms_epsilon": float32(1e-6), "qwen3moe.rope.freq_base": float32(10000)}
    path = tmp_path_factory.mktemp("moe") / "moe.gguf"
    write_gguf(path, metadata, [(n, GgmlType.F32, (rng.standard_normal(s) * s[-1] ** -0.5).astype(np.float32)) for n, s in shapes.items()])
    return path


def test_experts_get_their_own_sums_and_counts(moe_gguf: Path):
    """Catches experts mixed up: numpy routes the router's own inputs and computes each expert's inputs again."""
    tokens = np.random.default_rng(4).integers(0, N_VOCAB, (2, 32)).astype(np.int32)
    recorder, sums, grams, outputs = Recorder(), ColumnSums(), GramSums(), OutputMeans()
    collect_from_gguf(moe_gguf, tokens, [recorder, sums, grams, outputs], n_threads=THREADS)
    columns, H, means = sums.columns(), grams.take(0).inputs, outputs.means()
    file = read_gguf(moe_gguf)
    X = recorder.all("blk.0.ffn_gate_inp.weight")
    chosen = np.argsort(-(X @ read_floats(file, "blk.0.ffn_gate_inp.weight").T), axis=1)[:, :N_USED]
    W_gate, W_up = (read_floats(file, f"blk.0.ffn_{kind}_exps.weight") for kind in ("gate", "up"))
    for expert in range(N_EXPERT):
        mine = X[(chosen == expert).any(axis=1)]
        gate = mine @ W_gate[expert].T
        down = gate / (1 + np.exp(-gate)) * (mine @ W_up[expert].T)
        for kind, inputs in (("gate", mine), ("up", mine), ("down", down)):
            c = columns[f"blk.0.ffn_{kind}_exps.weight"]
            assert c.counts[expert] == len(mine)
            np.testing.assert_allclose(c.sum_squares[expert], squares(inputs), rtol=1e-4, atol=1e-6)
            group = "blk.0.ffn_down_exps" if kind == "down" else "blk.0.ffn_norm"
            np.testing.assert_allclose(H[group, expert].total, inputs.T @ inputs, atol=1e-4 * np.abs(inputs).max() ** 2 * len(inputs))
        np.testing.assert_allclose(means["blk.0.ffn_up_exps.weight", expert], (mine @ W_up[expert].T).mean(axis=0), atol=1e-4)
    assert columns["blk.0.ffn_down_exps.weight"].counts.sum() == tokens.size * N_USED


def test_a_weight_of_one_expert_set_to_zero(moe_gguf: Path):
    """Catches an edit of all experts, or of another than the one named."""
    file, name, matrix, row, column = read_gguf(moe_gguf), "blk.0.ffn_down_exps.weight", 2, 3, 4
    original = float(read_floats(file, name)[matrix, row, column])
    tokens = np.random.default_rng(5).integers(0, N_VOCAB, (1, 32)).astype(np.int32)
    outputs, recorder = [], Recorder()
    for edits in ([], [WeightEdit(name, row, column, 0.0, matrix, original)]):
        means = OutputMeans()
        collect_from_gguf(moe_gguf, tokens, [recorder, means], n_threads=THREADS, edits=edits)
        outputs.append({expert: np.concatenate(slabs).sum(axis=0) for (weight, expert), slabs in means.slabs.items() if weight == name})
    X = recorder.slabs[name, matrix][0]
    change = {expert: outputs[1][expert] - before for expert, before in outputs[0].items()}
    assert [(expert, int(i)) for expert, values in change.items() for i in np.flatnonzero(np.abs(values) > 1e-9)] == [(matrix, row)]
    np.testing.assert_allclose(change[matrix][row], -original * X[:, column].sum(), rtol=1e-3)


def test_unreached_experts_are_counted_zero(moe_gguf: Path):
    """Catches counts that have fewer entries than the model has experts."""
    sums = ColumnSums()
    collect_from_gguf(moe_gguf, np.full((1, 16), 7, np.int32), [sums], n_threads=THREADS)
    counts = sums.columns()["blk.0.ffn_up_exps.weight"].counts
    assert len(counts) == N_EXPERT and counts.sum() == 16 * N_USED
    assert (counts == 0).any()


# --- both engines -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def f32_gguf(demo_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = read_gguf(demo_gguf)
    path = tmp_path_factory.mktemp("f32") / "f32.gguf"
    write_gguf(path, file.metadata, [(t.name, GgmlType.F32, read_floats(file, t.name)) for t in file.tensors])
    return path


def test_engines_agree_on_f32(demo_model: Path, f32_gguf: Path, chunks: np.ndarray):
    """Catches names, columns, rows (llama.cpp's rope order), heads or positions permuted between the engines."""
    seen = []
    for collect, path in ((collect_from_checkpoint, demo_model), (collect_from_gguf, f32_gguf)):
        sums, outputs, spikes, attention = ColumnSums(moments=True), OutputMeans(), Spikes(), AttentionMass()
        result = collect(path, chunks, [sums, outputs, spikes, attention], n_threads=THREADS, process_output=True)
        seen.append((sums.columns(), outputs.means(), spikes.extremes(), attention.layers(), result.perplexity))
    torch, llama = seen
    assert set(torch[0]) == set(llama[0]) and "output.weight" in torch[0]
    for name, c in llama[0].items():
        scale = np.sqrt(c.sum_squares / c.counts[0])  # of one input of the column
        assert (torch[0][name].counts == c.counts).all()
        np.testing.assert_allclose(torch[0][name].sum_squares, c.sum_squares, rtol=2e-3, err_msg=name)
        np.testing.assert_allclose(torch[0][name].sums / c.counts[0] / scale, c.sums / c.counts[0] / scale, atol=2e-3, err_msg=name)
        np.testing.assert_allclose(torch[0][name].max_abs / scale, c.max_abs / scale, atol=2e-2, err_msg=name)
    for key in set(torch[1]) - {("output.weight", None)}:
        spread = np.abs(llama[1][key]).mean()
        np.testing.assert_allclose(torch[1][key] / spread, llama[1][key] / spread, atol=0.02, err_msg=key[0])
    for key, e in llama[2].items():
        assert (torch[2][key].layer, torch[2][key].column, torch[2][key].row) == (e.layer, e.column, e.row)
        assert torch[2][key].inputs[e.column] == pytest.approx(e.inputs[e.column], rel=2e-3)
        assert torch[2][key].outputs[e.row] == pytest.approx(e.outputs[e.row], rel=2e-3)
    assert len(llama[3]) == 6
    for layer, shares in llama[3].items():
        assert shares.positions.shape == (4, 128)
        np.testing.assert_allclose(shares.positions.sum(axis=1), 1, rtol=1e-4)
        np.testing.assert_allclose(shares.first, shares.positions[:, 0])
        np.testing.assert_allclose(torch[3][layer].positions, shares.positions, atol=2e-3)
    assert torch[4] == pytest.approx(llama[4], rel=1e-3)


def test_documents_do_not_see_each_other(demo_model: Path, f32_gguf: Path, chunks: np.ndarray):
    """Catches attention across the edge of a document, positions that go on, and a score for a document's first token; both engines agree."""
    tokens, edges = chunks[:2], (0, 24, 57, 128)
    documents = np.zeros_like(tokens)
    documents[1] = np.repeat([0, 1, 2], np.diff(edges))
    packed, alone, torch, firsts = ColumnSums(), ColumnSums(), ColumnSums(), GramSums()
    result = collect_from_gguf(f32_gguf, tokens, [packed, firsts], n_threads=THREADS, documents=documents)
    assert result.n_tokens == 2 * 63  # the last edge lies before the half that is scored
    collect_from_gguf(f32_gguf, tokens[:1], [alone], n_threads=THREADS)
    for a, b in itertools.pairwise(edges):
        collect_from_gguf(f32_gguf, tokens[1:, a:b], [alone], n_threads=THREADS)
    same = collect_from_checkpoint(demo_model, tokens, [torch], n_threads=THREADS, documents=documents)
    assert result.perplexity == pytest.approx(same.perplexity, rel=1e-3)
    for name, c in packed.columns().items():
        assert c.counts == alone.columns()[name].counts == tokens.size
        np.testing.assert_allclose(c.sum_squares, alone.columns()[name].sum_squares, rtol=2e-4, err_msg=name)
        np.testing.assert_allclose(c.sum_squares, torch.columns()[name].sum_squares, rtol=2e-3, err_msg=name)
    assert firsts.take().first["blk.3.ffn_down"].weight == 1 + 3
    documents[1, 100:] = 3
    assert collect_from_gguf(f32_gguf, tokens, [], n_threads=THREADS, documents=documents).n_tokens == 2 * 63 - 1


def test_more_documents_than_llama_cpp_keeps_apart(f32_gguf: Path):
    """Catches a crash inside llama.cpp, or documents that see each other."""
    documents = np.arange(512, dtype=np.int32)[None]
    with pytest.raises(InputError, match=r"got 512 documents in chunk 0, expected at most the 256 .* smaller context with -c"):
        collect_from_gguf(f32_gguf, np.full((1, 512), 5, np.int32), [], n_threads=THREADS, documents=documents)


def test_a_weight_set_to_another_value_is_alike_in_both_engines(demo_model: Path, f32_gguf: Path, chunks: np.ndarray):
    """Catches an edit of the wrong row or column, one that the layers above do not see, and one that stays in the file."""
    name, row, column = "blk.1.ffn_down.weight", 3, 5
    original = float(read_floats(read_gguf(f32_gguf), name)[row, column])
    edit = WeightEdit(name, row, column, 0.75, original=original)
    seen = []
    for collect, path in ((collect_from_checkpoint, demo_model), (collect_from_gguf, f32_gguf), (collect_from_gguf, None)):
        spikes, sums = Spikes(), ColumnSums()
        edits = [edit] if path is not None else []
        result = collect(path or f32_gguf, chunks[:1], [spikes, sums], n_threads=THREADS, edits=edits)
        seen.append((spikes.extremes()[name, None].outputs, sums.columns()["blk.5.ffn_up.weight"].sum_squares, result.perplexity))
    torch, llama, plain = seen
    np.testing.assert_allclose(torch[0], llama[0], atol=2e-3 * np.abs(llama[0]).max())
    np.testing.assert_allclose(torch[1], llama[1], rtol=5e-3)
    assert torch[2] == pytest.approx(llama[2], rel=1e-3)
    assert np.flatnonzero(plain[0] != llama[0]).tolist() == [row]
    assert abs(plain[2] - llama[2]) > 1e-5


def collect_grams(collect, path: Path, chunks: np.ndarray, **options: object) -> tuple[dict, dict]:
    train: dict[int | None, GramSet] = {}
    holdout: dict[int | None, GramSet] = {}

    def sink(layer: int | None, a: GramSet, b: GramSet) -> None:
        assert layer not in train
        train[layer], holdout[layer] = a, b

    collect(path, chunks, [], sink=sink, n_threads=THREADS, **options)
    return train, holdout


def test_gram_matrices_of_both_engines(demo_model: Path, f32_gguf: Path, chunks: np.ndarray):
    """Catches layers that get no pass, or two, and matrices of the held-out chunks among the others."""
    shapes = {t.name: t.shape for t in read_gguf(f32_gguf).tensors}
    per_layer = 2 * 4 * (3 * 256**2 + 768**2)
    assert gguf_passes(shapes, 4 * per_layer) == [range(4), range(4, 6)]
    llama = collect_grams(collect_grams_from_gguf, f32_gguf, chunks, holdout=[1], shapes=shapes, max_memory_bytes=4 * per_layer)
    torch = collect_grams(collect_grams_from_checkpoint, demo_model, chunks, holdout=[1], label_seed=None)
    for by_torch, by_llama, n_chunks in zip(torch, llama, (3, 1), strict=True):
        for layer in range(6):
            assert set(by_torch[layer].inputs) == set(by_llama[layer].inputs)
            assert len(by_llama[layer].inputs) == 4
            for key, gram in by_llama[layer].inputs.items():
                assert gram.n_tokens == by_torch[layer].inputs[key].n_tokens == n_chunks * 128
                scale = np.sqrt(np.outer(gram.mean.diagonal(), gram.mean.diagonal()))
                np.testing.assert_allclose(by_torch[layer].inputs[key].mean / scale, gram.mean / scale, atol=2e-3)
                assert by_llama[layer].first[key[0]].weight == n_chunks


def test_gram_matrices_equal_stored_activations(llama_pass, demo_gguf: Path, chunks: np.ndarray):
    """Catches blocks of the triangle left out or added twice: H = XᵀX / n to 1e-5, the two sets without a common chunk."""
    recorder = llama_pass[0]
    train, rest = GramSums(), GramSums()
    collect_from_gguf(demo_gguf, chunks, [], n_threads=THREADS, split=HoldoutSplit([train], [rest], frozenset({2})))
    for grams, numbers in ((train.take(), [0, 1, 3]), (rest.take(), [2])):
        assert len(grams.inputs) == 25
        for (group, _), gram in grams.inputs.items():
            if group == "output_norm":
                continue
            weight = {"attn_norm": "attn_k", "ffn_norm": "ffn_up"}.get(group.split(".")[2], group.split(".")[2])
            slabs = recorder.slabs[f"blk.{group.split('.')[1]}.{weight}.weight", None]
            X = np.concatenate([slabs[i] for i in numbers]).astype(np.float64)
            H = X.T @ X / len(X)
            np.testing.assert_allclose(gram.mean / H.diagonal().max(), H / H.diagonal().max(), atol=1e-5)
            np.testing.assert_allclose(gram.mean.diagonal(), H.diagonal(), rtol=1e-5)
            np.testing.assert_allclose(grams.first[group].total, sum(slabs[i][0] for i in numbers), rtol=1e-5, atol=1e-6)


def test_a_pass_goes_on_where_it_stopped(demo_gguf: Path, chunks: np.ndarray):
    """Catches a resumed pass that counts a chunk twice, forgets one, or differs in a bit."""
    whole, losses = ColumnSums(), []
    result = collect_from_gguf(demo_gguf, chunks, [whole], n_threads=THREADS, losses=losses)

    class Stop(Exception):
        pass

    def stop(number: int) -> None:
        if number == 1:
            raise Stop

    first, begun = ColumnSums(), []
    with pytest.raises(Stop):
        collect_from_gguf(demo_gguf, chunks, [first], n_threads=THREADS, losses=begun, on_chunk=stop)
    assert len(begun) == 2
    second = ColumnSums()
    second.restore(first.state())
    assert collect_from_gguf(demo_gguf, chunks, [second], n_threads=THREADS, losses=begun) == result
    for name, c in whole.columns().items():
        assert (second.columns()[name].sum_squares == c.sum_squares).all()


@pytest.mark.parametrize("weights", [None, ("blk.5.attn_q.weight", "blk.5.attn_k.weight")])
def test_a_chunk_without_a_score_ends_with_the_last_weight(
    demo_gguf: Path, chunks: np.ndarray, monkeypatch: pytest.MonkeyPatch, weights: tuple[str, ...] | None
):
    """Catches a graph that ends before a weight was seen (attn_k takes attn_q's inputs without a stop of its own), one that runs on to the
    head for nobody, and perplexities of logits that were never computed."""
    asked: list[int] = []  # nodes of each chunk's graph
    begin_chunk, wanted = _Watcher.begin_chunk, _Watcher.wants

    def begin(self: _Watcher, *args: object, **how: object) -> None:
        asked.append(0)
        begin_chunk(self, *args, **how)

    def count(self: _Watcher, node: object) -> bool:
        asked[-1] += 1
        return wanted(self, node)

    monkeypatch.setattr(_Watcher, "begin_chunk", begin)
    monkeypatch.setattr(_Watcher, "wants", count)
    how = {"n_threads": THREADS, "wants": None if weights is None else weights.__contains__}
    sums, losses = (ColumnSums(), ColumnSums()), ([], [])
    collect_from_gguf(demo_gguf, chunks, [sums[0]], losses=losses[0], **how)
    result = collect_from_gguf(demo_gguf, chunks, [sums[1]], losses=losses[1], score_every=3, **how)
    whole = asked[0]
    assert asked == [*[whole] * 5, asked[5], asked[5], whole]
    assert (asked[5] < whole) == (weights is None)
    assert (losses[0][0] == losses[1][0]).all() and (losses[0][3] == losses[1][3]).all()
    assert result.perplexity == pytest.approx(np.exp(np.concatenate([losses[0][0], losses[0][3]]).mean()))
    for name, c in sums[0].columns().items():
        assert (sums[1].columns()[name].sum_squares == c.sum_squares).all() and (sums[1].columns()[name].counts == c.counts).all()


@pytest.mark.slow
def test_engines_agree_on_bf16(demo_model: Path, demo_gguf: Path):
    """Catches more than the rounding of activations to BF16 inside llama.cpp: 1 % on every column, of enough tokens to average it."""
    with Model(demo_gguf, vocab_only=True) as model:
        tokens = load_chunks(model, [default_text("calibration")], 512, 32).tokens
    by_torch, by_llama = ColumnSums(), ColumnSums()
    collect_from_checkpoint(demo_model, tokens, [by_torch], n_threads=2)
    collect_from_gguf(demo_gguf, tokens, [by_llama], n_threads=2)
    for name, c in by_llama.columns().items():
        np.testing.assert_allclose(by_torch.columns()[name].sum_squares, c.sum_squares, rtol=0.01, err_msg=name)
