"""layerwise.py: one block of layers at a time gives what the whole model at once gives, forward and backward."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tiny_checkpoint import LLAMA3_ROPE

from loopgguf.accumulators import Columns, ColumnSums, HoldoutSplit, Spikes, split_holdout
from loopgguf.architectures import input_group, rope_source_rows, tensor_role
from loopgguf.attention import AttentionMass
from loopgguf.curvature import GramSet, GramSums, summarize_layer
from loopgguf.errors import InputError
from loopgguf.hidden_states import finished_layers
from loopgguf.layerwise import GradientPlan, collect_from_checkpoint, collect_gradients, plan_gradient_pass
from loopgguf.sensitivity import SensitivitySums

THREADS = 1


def squares(X: np.ndarray) -> np.ndarray:
    return (X.astype(np.float64) ** 2).sum(axis=0)


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
    assert all("tok/s" in phase and "perplexity" not in phase for phase, _, _ in seen)  # which is known at the end only


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True}),
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


# --- backward -----------------------------------------------------------------------------------------------------------

SEED = 11


def sample_labels(logits: np.ndarray, number: int) -> np.ndarray:
    """Draw a label for every token by inverting the distribution over the whole vocabulary, in float64."""
    p = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    draws = np.random.default_rng([SEED, number]).random(len(logits))
    return (np.cumsum(p / p.sum(axis=1, keepdims=True), axis=1) <= draws[:, None]).sum(axis=1)


def whole_model_gradients(folder: Path, chunks: np.ndarray, permuted: bool) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """Return (inputs, gradients at the outputs) per chunk of every linear and of the embedding, from autograd on the whole model;
    of the head its inputs and the probabilities."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    seen: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
    kept: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def keep(name: str):
        def hook(_module, args, output):
            output.retain_grad()
            kept[name] = (args[0], output)

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) or name == "model.embed_tokens":
            module.register_forward_hook(keep(name))
    for number, chunk in enumerate(chunks):
        with torch.enable_grad():
            logits = model(torch.from_numpy(chunk.astype(np.int64))[None]).logits[0]
            labels = torch.from_numpy(sample_labels(logits.detach().numpy(), number))
            torch.nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
        for hf, (X, Y) in kept.items():
            if hf == "lm_head":
                seen.setdefault("output.weight", []).append((X.detach()[0].numpy(), torch.softmax(Y.detach()[0].double(), 1).numpy()))
                continue
            G = Y.grad[0].numpy()
            name = "token_embd.weight"
            if hf != "model.embed_tokens":
                layer, kind = hf.removeprefix("model.layers.").split(".", 1)
                name = f"blk.{layer}.{LINEARS[kind]}.weight"
                X = X.detach()[0].numpy()
                if permuted and LINEARS[kind] in ("attn_q", "attn_k"):
                    head_dim = model.config.head_dim
                    G = G[:, rope_source_rows(0, G.shape[1], head_dim)]
            seen.setdefault(name, []).append((X, G))
        model.zero_grad()
        kept.clear()
    return seen


def assert_close(got: np.ndarray, expected: np.ndarray, name: str) -> None:
    """Within 1e-5 of the largest entry of the matrix."""
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max(), rtol=0, err_msg=name)


def assert_equals_head(grams: GramSet, X: np.ndarray, P: np.ndarray) -> None:
    """Compare what is known of the head with its inputs and the probabilities; p (1 − p) is a squared gradient for the expected label."""
    squares, X = P * (1 - P), X.astype(np.float64)
    assert grams.weighted["output.weight"].n_tokens == grams.inputs["output_norm", None].n_tokens == len(X)
    assert_close(grams.inputs["output_norm", None].mean, X.T @ X / len(X), "H of the head")
    assert_close(grams.weighted["output.weight"].mean, (X * squares.mean(axis=1)[:, None]).T @ X / len(X), "H_w of the head")
    assert_close(grams.curvature["output.weight"].mean, squares.mean(axis=0), "r of the head")
    assert_close(grams.curvature["token_embd.weight"].mean, P.mean(axis=0), "frequencies of tokens")


def assert_equals_autograd(grams: GramSet, seen: dict[str, list[tuple[np.ndarray, np.ndarray]]], numbers: list[int]) -> None:
    assert_equals_head(grams, *(np.concatenate([slab[part] for slab in (seen["output.weight"][i] for i in numbers)]) for part in (0, 1)))
    for name in set(seen) - {"output.weight"}:
        slabs = seen[name]
        G = np.concatenate([slabs[i][1] for i in numbers]).astype(np.float64)
        if name == "token_embd.weight" or not any(kind in name for kind in ("ffn_gate", "ffn_up")):
            assert grams.outputs[name].n_tokens == len(G)
            assert_close(grams.outputs[name].mean, G.T @ G / len(G), f"H_O or G0 of {name}")
        else:
            assert name not in grams.outputs
        if name == "token_embd.weight":
            continue
        assert_close(grams.curvature[name].mean, (G**2).mean(axis=0), f"r of {name}")
        X = np.concatenate([slabs[i][0] for i in numbers]).astype(np.float64)
        w = (G**2).mean(axis=1)
        assert_close(grams.weighted[name].mean, (X * w[:, None]).T @ X / len(X), f"H_w of {name}")
        assert_close(grams.inputs[input_group(name), None].mean, X.T @ X / len(X), f"H of {name}")
        first = np.array([w[i * len(slabs[0][0])] for i in range(len(numbers))])
        x = np.stack([slabs[i][0][0] for i in numbers])
        # a first token attends to itself alone, so its query's gradient is zero but for rounding
        assert grams.first_weighted[name].weight == pytest.approx(first.sum(), rel=1e-3, abs=1e-9 * w.max())
        np.testing.assert_allclose(grams.first_weighted[name].total, first @ x, atol=1e-4 * (w.max() + first.max()) * np.abs(x).max(), err_msg=name)
    assert set(grams.weighted) == set(seen) - {"token_embd.weight"}


WHOLE, STREAMED = "whole", "streamed"


def gradient_plan(mode: str, n_layers: int) -> GradientPlan:
    if mode == WHOLE:
        return GradientPlan((range(n_layers),), True, 0)
    return GradientPlan(tuple(range(i, min(i + 2, n_layers)) for i in range(0, n_layers, 2)), False, 0)


@pytest.mark.parametrize("mode", [WHOLE, STREAMED])
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
        ("Mistral", {"sliding_window": 8}),
        ("Qwen2", {}),
        ("Qwen3", {"head_dim": 16}),
    ],
)
def test_gradients_equal_autograd(family: str, options: dict[str, object], mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches a gradient lost between blocks or slabs, rows in the wrong order, a label that depends on the vocabulary's slabs."""
    import torch
    import transformers

    monkeypatch.setattr("loopgguf.torch_model.VOCAB_SLAB", 128)
    torch.manual_seed(5)
    sizes = {"vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{family}Config")(**sizes, **options, max_position_embeddings=64, bos_token_id=0, eos_token_id=1, initializer_range=0.1)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(tmp_path)
    tokens = np.random.default_rng(6).integers(0, 300, (4, 32)).astype(np.int32)
    seen = whole_model_gradients(tmp_path, tokens, permuted=family in ("Llama", "Mistral"))
    grams, layers = [GramSums(), GramSums()], []
    split = HoldoutSplit([grams[0]], [grams[1]], frozenset({2}))
    collect_gradients(tmp_path, tokens, [], n_threads=THREADS, label_seed=SEED, split=split, plan=gradient_plan(mode, 3), on_layer=layers.append)
    assert layers == [2, 1, 0]
    assert_equals_autograd(grams[0].take(), seen, [0, 1, 3])
    assert_equals_autograd(grams[1].take(), seen, [2])


def test_gradients_of_the_demo_model(demo_model: Path, chunks: np.ndarray):
    """Catches differences that only a trained model's scales show, and embeddings weighed by other rows than were looked up; in memory and block by block."""
    from safetensors.torch import load_file

    seen = whole_model_gradients(demo_model, chunks[:2, :64], permuted=True)
    rows = load_file(demo_model / "model.safetensors")["model.embed_tokens.weight"].float().numpy()
    looked_up = [((rows[chunks[c, :64]] ** 2).sum(axis=1), G) for c, (_, G) in enumerate(seen["token_embd.weight"])]
    for mode in (WHOLE, STREAMED):
        grams, sensitivity = GramSums(), SensitivitySums()
        result = collect_gradients(demo_model, chunks[:2, :64], [grams, sensitivity], n_threads=THREADS, label_seed=SEED, plan=gradient_plan(mode, 6))
        assert_equals_autograd(grams.take(), seen, [0, 1])
        found = sensitivity.take(1, "").sensitivity("token_embd.weight")
        assert found is not None
        assert_close(found.column_weights[0], np.concatenate([lengths[:, None] * G**2 for lengths, G in looked_up]).mean(axis=0), "looked-up rows")
        assert result.perplexity == pytest.approx(run_checkpoint(demo_model, chunks[:2, :64])[1].perplexity, rel=1e-5)


def test_chunks_of_a_larger_text_keep_their_labels(demo_model: Path, chunks: np.ndarray):
    """Catches labels and sets that depend on which other chunks are run: parts add up to the whole."""
    plan = gradient_plan(WHOLE, 6)

    def run(numbers: list[int]) -> GramSet:
        grams = GramSums(lambda name: "attn" in name)
        collect_gradients(demo_model, chunks[numbers, :32], [grams], n_threads=THREADS, label_seed=SEED, numbers=numbers, plan=plan)
        return grams.take()

    together, parts = run([0, 1, 2, 3]), [run([2, 0]), run([3, 1])]
    assert all(set(part.weighted) == set(together.weighted) for part in parts)
    for name, gram in together.weighted.items():
        assert sum(part.weighted[name].n_tokens for part in parts) == gram.n_tokens
        assert_close(sum(part.weighted[name].total for part in parts), gram.total, name)
        assert_close(sum(part.outputs[name].total for part in parts), together.outputs[name].total, name)


def test_plan_by_memory(demo_model: Path):
    """Catches a plan that ignores the matrices, or keeps hidden states that a whole model does not need."""
    assert plan_gradient_pass(demo_model, 8, 128, max_memory_bytes=1 << 30) == GradientPlan((range(6),), True, 0)
    small = plan_gradient_pass(demo_model, 8, 128, max_memory_bytes=1)
    assert small.blocks == tuple(range(i, i + 1) for i in range(6)) and not small.is_whole
    assert small.stored_bytes == 4 * 8 * 128 * 256 * 8
    fewer = plan_gradient_pass(demo_model, 8, 128, max_memory_bytes=100 << 20)
    assert 1 < len(fewer.blocks) < 6
    assert len(plan_gradient_pass(demo_model, 8, 128, max_memory_bytes=100 << 20, n_gram_sets=0).blocks) < len(fewer.blocks)


# --- documents, edits, attention ----------------------------------------------------------------------------------------


class Recorder:
    def __init__(self) -> None:
        self.slabs: dict[str, list[np.ndarray]] = {}

    def add(self, name: str, matrix: int | None, X: np.ndarray) -> None:
        self.slabs.setdefault(name, []).append(X.copy())


def test_documents_do_not_see_each_other(demo_model: Path, chunks: np.ndarray):
    """Catches attention across the edge of a document, positions that go on, and a score for a document's first token."""
    tokens = chunks[:2, :64]
    documents = np.zeros_like(tokens)
    documents[1, 24:] = 1
    packed, alone, first = Recorder(), Recorder(), GramSums()
    result = collect_from_checkpoint(demo_model, tokens, [packed, first], n_threads=THREADS, documents=documents)
    assert result.n_tokens == 2 * 31
    for piece in (tokens[1:, :24], tokens[1:, 24:]):
        collect_from_checkpoint(demo_model, piece, [alone], n_threads=THREADS)
    for name, (one, two) in alone.slabs.items():
        np.testing.assert_allclose(packed.slabs[name][1], np.concatenate([one, two]), atol=2e-4, err_msg=name)
    starts = first.take().first["blk.3.ffn_down"]
    assert starts.weight == 3
    slabs = packed.slabs["blk.3.ffn_down.weight"]
    np.testing.assert_allclose(starts.total, slabs[0][0] + slabs[1][0] + slabs[1][24], rtol=1e-5, atol=1e-6)
    edge = documents.copy()
    edge[1, 40:] = 2
    assert collect_from_checkpoint(demo_model, tokens, [], n_threads=THREADS, documents=edge).n_tokens == 2 * 31 - 1


def test_attention_is_what_eager_transformers_computes(demo_model: Path, chunks: np.ndarray):
    """Catches heads or positions mixed up, and mass that does not sum to one."""
    import torch
    from transformers import AutoModelForCausalLM

    attention = AttentionMass()
    collect_from_checkpoint(demo_model, chunks[:2, :32], [attention], n_threads=THREADS)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = model(torch.from_numpy(chunks[:2, :32].astype(np.int64)), output_attentions=True).attentions
    for layer, A in enumerate(expected):
        np.testing.assert_allclose(attention.layers()[layer].positions, A.mean(dim=(0, 2)).numpy(), atol=1e-5)


def test_layer_summary(demo_model: Path, chunks: np.ndarray):
    """Catches shares that are not shares: by hand from H, H_w and the attention of the same pass."""
    attention, grams = AttentionMass(), GramSums()
    collect_gradients(demo_model, chunks[:2, :32], [attention, grams], n_threads=THREADS, label_seed=1)
    taken = grams.take()
    summary = summarize_layer(2, taken, attention.layers()[2].first)
    assert summary.attention_share == pytest.approx(attention.layers()[2].positions[:, 0].mean())
    assert set(summary.weighted_shares) == {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"}
    H = taken.inputs["blk.2.ffn_down", None].mean.diagonal()
    assert summary.diagonal_ratios["ffn_down"] == pytest.approx(H.max() / H.mean(), rel=1e-5)
    assert all(0 <= share < 1 for share in (*summary.weighted_shares.values(), *summary.input_shares.values()))


# --- jobs ---------------------------------------------------------------------------------------------------------------


class Killed(Exception):
    pass


def test_a_forward_job_goes_on_after_its_last_layer(demo_model: Path, chunks: np.ndarray, tmp_path: Path):
    """Catches a resumed job that differs in a bit, or that counts the layer in which it was killed twice."""
    whole, saved = ColumnSums(), {}
    result = collect_from_checkpoint(demo_model, chunks, [whole], n_threads=THREADS)
    killed_at = {1, 4}

    def run() -> tuple[ColumnSums, object]:
        sums = ColumnSums()
        for layer in finished_layers(tmp_path):
            sums.restore(saved[layer])

        def save(layer: int) -> None:
            saved[layer] = sums.state(layer)
            if layer in killed_at:
                killed_at.remove(layer)
                raise Killed

        return sums, collect_from_checkpoint(demo_model, chunks, [sums], n_threads=THREADS, on_layer=save, work=tmp_path)

    for done in (range(1), range(4)):
        with pytest.raises(Killed):
            run()
        assert finished_layers(tmp_path) == done
    sums, resumed = run()
    assert resumed == result
    for name, c in whole.columns().items():
        assert (sums.columns()[name].sum_squares == c.sum_squares).all()
        assert (sums.columns()[name].counts == c.counts).all()


def test_a_gradient_job_goes_on_after_its_last_block(demo_model: Path, chunks: np.ndarray, tmp_path: Path):
    """Catches hidden states, labels or losses that are not those of an uninterrupted job, and a bar that ends elsewhere than at its end."""
    steps: list[tuple[int, int]] = []
    options = {
        "progress": lambda _phase, done, total: steps.append((done, total)),
        "n_threads": THREADS,
        "label_seed": SEED,
        "plan": gradient_plan(STREAMED, 6),
    }
    whole, saved = GramSums(), {}
    result = collect_gradients(demo_model, chunks[:2, :32], [whole], **options)
    killed_at = {5, 2}

    def run():
        grams = GramSums()
        done = finished_layers(tmp_path)

        def save(layer: int) -> None:
            assert layer not in done
            if layer in killed_at:
                killed_at.remove(layer)
                raise Killed
            saved[layer] = grams.take(layer)

        return collect_gradients(demo_model, chunks[:2, :32], [grams], on_layer=save, work=tmp_path, **options), grams.take()

    for done in (range(0), range(4, 6)):
        with pytest.raises(Killed):
            run()
        assert finished_layers(tmp_path) == done
    at_head = (tmp_path / "sums-at-head.npz").read_bytes()
    (tmp_path / "sums-at-head.npz").write_bytes(at_head[:100])
    with pytest.raises(InputError, match=r"is damaged: got no readable .*sums-at-head"):
        run()
    (tmp_path / "sums-at-head.npz").write_bytes(at_head)
    resumed, rest = run()
    assert resumed == result
    assert steps[-1][0] == steps[-1][1]
    expected = whole.take()
    for what in ("inputs", "weighted", "outputs"):
        got = {key: gram for part in (*saved.values(), rest) for key, gram in getattr(part, what).items()}
        assert set(got) == set(getattr(expected, what))
        for key, gram in getattr(expected, what).items():
            assert (got[key].total == gram.total).all(), (what, key)


def test_spikes_are_those_of_the_right_tensors(demo_model: Path, chunks: np.ndarray):
    """Catches spikes of weights other than ffn_down."""
    spikes = Spikes()
    collect_from_checkpoint(demo_model, chunks[:1], [spikes], n_threads=THREADS)
    assert [tensor_role(name).kind for name, _ in spikes.extremes()] == ["ffn_down"] * 6
    train, holdout = split_holdout(4, 0)
    assert len(holdout) == 1 and sorted([*train, *holdout]) == [0, 1, 2, 3]
