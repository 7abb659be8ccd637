"""sequence.py: what each input has become in the file, against the whole model with the file's weights in it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny_checkpoint import LLAMA3_ROPE

from loopgguf import ggml
from loopgguf.accumulators import HoldoutSplit, split_holdout
from loopgguf.architectures import input_group
from loopgguf.curvature import GramSums
from loopgguf.drift import Drift, Moments
from loopgguf.errors import InputError
from loopgguf.formats import GgmlType
from loopgguf.layerwise import collect_from_checkpoint
from loopgguf.sequence import TOKENS_PER_COLUMN, DriftSums, pick_chunks, run_sequence
from loopgguf.source import Tensor
from loopgguf.torch_model import StreamedModel

SEED = 0
N_LAYERS, N_VOCAB, N_HEAD, N_HEAD_KV = 3, 300, 4, 2
SIZES = {"vocab_size": N_VOCAB, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": N_LAYERS, "num_attention_heads": N_HEAD}
SIZES |= {"num_key_value_heads": N_HEAD_KV, "max_position_embeddings": 64, "bos_token_id": 0, "eos_token_id": 1}
TOKENS = np.random.default_rng(6).integers(0, N_VOCAB, (5, 24)).astype(np.int32)
LINEARS = {"attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj"}
LINEARS |= {"ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}
OTHERS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
INPUTS = (("attn_q", "attn_k", "attn_v"), ("attn_output",), ("ffn_gate", "ffn_up"), ("ffn_down",))
ORDER = [[f"blk.{layer}.{kind}.weight" for kind in kinds] for layer in range(N_LAYERS) for kinds in INPUTS]

Seen = list[tuple[list[str], Drift]]


def save_model(folder: Path, family: str = "Llama", **options: object) -> Path:
    """Write a checkpoint of random weights, of which biases and norms are random too."""
    import torch
    import transformers

    torch.manual_seed(5)
    model = getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**SIZES, **options, initializer_range=0.2))
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape)
        assert bool(parameter.any()), name
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("sequence") / "llama")


def run(folder: Path, tokens: np.ndarray = TOKENS, on_input: Callable[[Sequence[str], Drift], object] | None = None, **options: object) -> Seen:
    """Run the sequence and return what it tells; by default of all weights, of a file that has none yet."""
    seen: Seen = []

    def take(names: Sequence[str], drift: Drift) -> None:
        seen.append((list(names), drift))
        if on_input is not None:
            on_input(names, drift)

    how: dict[str, object] = {"written": lambda _name: None, "wants": lambda _name: True, "seed": SEED, "n_threads": 1, **options}
    run_sequence(folder, tokens, on_input=take, **how)  # type: ignore[arg-type]
    return seen


class File:
    """Stands for a GGUF that is being written of a folder: what it has by now, in its own row order."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        self.is_permuted = type(self.model).__name__ in ("LlamaForCausalLM", "MistralForCausalLM")
        self.weights = {name: parameter.detach().numpy().copy() for name, parameter in self.model.state_dict().items() if name != "lm_head.weight"}
        self.tensors: dict[str, Tensor] = {}

    def hf_name(self, name: str) -> str:
        if name == "token_embd.weight":
            return "model.embed_tokens.weight"
        _, layer, kind, end = name.split(".")
        return f"model.layers.{layer}.{(LINEARS | OTHERS)[kind]}.{end}"

    def reordered(self, name: str, values: np.ndarray, *, to_gguf: bool) -> np.ndarray:
        """Return rows in the GGUF's order, where pairs that are rotated together lie side by side, or in the checkpoint's."""
        n_head = {"attn_q": N_HEAD, "attn_k": N_HEAD_KV}.get(name.split(".")[-2])
        if not self.is_permuted or n_head is None:
            return values
        shape = (n_head, 2, -1) if to_gguf else (n_head, len(values) // n_head // 2, 2)
        return np.ascontiguousarray(values.reshape(*shape, *values.shape[1:]).swapaxes(1, 2)).reshape(values.shape)

    def write(self, names: Sequence[str], ggml_type: GgmlType = GgmlType.Q4_0) -> None:
        for name in names:
            rows = self.reordered(name, self.weights[self.hf_name(name)], to_gguf=True)
            packed = ggml.encode_rows(ggml_type, np.ascontiguousarray(rows.reshape(-1, rows.shape[-1]), np.float32))
            self.tensors[name] = Tensor(name, rows.shape, ggml_type, lambda start, stop, packed=packed: packed[start:stop])  # type: ignore[misc]

    def copy(self) -> Mapping[str, Tensor]:
        return dict(self.tensors)

    def inputs(self, written: Mapping[str, Tensor], tokens: np.ndarray, documents: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Return what each linear of the whole model gets of tokens (n_chunks, n_ctx), (n_chunks, n_ctx, n_in), by GGUF name,
        when it has these weights; each document of a chunk is run by itself."""
        import torch

        state = {name: torch.from_numpy(values.copy()) for name, values in self.weights.items()}
        for name, tensor in written.items():
            decoded = ggml.decode_rows(tensor.type, tensor.read_rows(0, tensor.n_rows)).reshape(tensor.shape)
            state[self.hf_name(name)] = torch.from_numpy(self.reordered(name, decoded, to_gguf=False))
        self.model.load_state_dict(state, strict=False)  # the head is of no interest here
        found: dict[str, list[np.ndarray]] = {}
        hooks = [
            self.model.get_submodule(f"model.layers.{layer}.{path}").register_forward_pre_hook(
                lambda _, args, name=f"blk.{layer}.{kind}.weight": found.setdefault(name, []).append(args[0][0].detach().numpy().copy())
            )
            for layer in range(N_LAYERS)
            for kind, path in LINEARS.items()
        ]
        for c, chunk in enumerate(tokens):
            ends = [] if documents is None else np.flatnonzero(np.diff(documents[c])) + 1
            for part in np.split(chunk, ends):
                with torch.no_grad():
                    self.model(torch.from_numpy(part.astype(np.int64))[None])
        for hook in hooks:
            hook.remove()
        return {name: np.concatenate(parts).reshape(*tokens.shape, -1) for name, parts in found.items()}


def assert_close(got: np.ndarray, expected: np.ndarray, scale: float, what: str) -> None:
    """Within 1e-4 of the inputs' mean squares: small differences of large numbers are compared."""
    np.testing.assert_allclose(got, expected, atol=1e-4 * scale, rtol=0, err_msg=what)


def assert_is_drift(drift: Drift, X: np.ndarray, Y: np.ndarray, what: str) -> None:
    """Compare with the means over the tokens of the chunks that are run, in double precision."""
    for part, numbers in zip((drift.train, drift.holdout), pick_chunks(len(X), X.shape[1], 1000, SEED), strict=True):
        x, y = (Z[numbers].reshape(-1, Z.shape[-1]).astype(np.float64) for Z in (X, Y))
        [got] = part
        assert got.columns == slice(0, x.shape[1]) and got.second.dtype == got.cross.dtype == np.float32
        second = y.T @ y / len(y)
        scale = float(np.diag(second).max())
        assert_close(got.second, second, scale, f"second of {what}")
        assert_close(got.cross, (x - y).T @ y / len(y), scale, f"cross of {what}")


# --- sums and chunks ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def _few_tokens_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loopgguf.drift.MIN_TOKENS_PER_COLUMN", 0)


def test_sums_are_the_means():
    """Catches the inputs of the two models mixed up, a transposed product, slabs that count alike though they differ in length,
    blocks of columns mixed up, and sums that stay for the next input."""
    import torch

    generator = np.random.default_rng(0)
    sums = DriftSums([slice(0, 3), slice(3, 8)])
    for _ in range(2):
        slabs = [tuple(generator.normal(size=(n, 8)).astype(np.float32) for _ in range(2)) for n in (7, 1, 30)]
        before = [(X.copy(), Y.copy()) for X, Y in slabs]
        for X, Y in slabs:
            sums.add(torch.from_numpy(X), torch.from_numpy(Y))
        assert all(np.array_equal(X, x) and np.array_equal(Y, y) for (X, Y), (x, y) in zip(slabs, before, strict=True))
        X, Y = (np.concatenate(parts).astype(np.float64) for parts in zip(*slabs, strict=True))
        taken = sums.take()
        assert [moments.columns for moments in taken] == [slice(0, 3), slice(3, 8)]
        for part, moments in zip(sums.parts, taken, strict=True):
            assert isinstance(moments, Moments) and moments.second.dtype == np.float32
            np.testing.assert_allclose(moments.second, Y[:, part].T @ Y[:, part] / len(Y), atol=1e-5)
            np.testing.assert_allclose(moments.cross, (X - Y)[:, part].T @ Y[:, part] / len(Y), atol=1e-5)


@given(st.integers(2, 1000), st.integers(1, 20_000), st.integers(0, 99))
def test_chunks_are_picked_from_both_sets(n_chunks: int, n_in: int, seed: int):
    """Catches a chunk that is run twice or in both sets, one that the matrices hold out and this uses, only the beginning of a text,
    and fewer tokens than rows are wide, or more than it takes."""
    picked, n_wanted = pick_chunks(n_chunks, 512, n_in, seed), TOKENS_PER_COLUMN * n_in / 512
    for numbers, all_, n in zip(picked, split_holdout(n_chunks, seed), (n_wanted, n_wanted / 10), strict=True):
        assert numbers == sorted(set(numbers)) and set(numbers) <= set(all_.tolist())
        assert len(numbers) == len(all_) or n <= len(numbers) < n + 1.2
        assert numbers[0] == all_[0] and (len(numbers) == 1 or numbers[-1] == all_[-1])
        places = np.searchsorted(all_, numbers)
        assert len(numbers) < 3 or np.diff(places).max() - np.diff(places).min() <= 1


def test_one_chunk_is_too_few(llama: Path):
    """Catches a drift without a verdict, and a traceback."""
    with pytest.raises(InputError, match="got 1 chunks, expected at least 2"):
        run(llama, TOKENS[:1])


def test_tokens_that_the_model_does_not_have_are_refused(llama: Path):
    """Catches embeddings read from behind the matrix: where matrices lie beside an imatrix, no other pass has looked."""
    tokens = TOKENS.copy()
    tokens[1, 3] = N_VOCAB
    with pytest.raises(InputError, match="token ids: got up to 300, expected less than vocab_size 300"):
        run(llama, tokens)


@pytest.mark.parametrize("is_in_file", [False, True])
def test_inputs_that_are_not_finite_name_a_weight_that_sees_them(tmp_path: Path, is_in_file: bool):
    """Catches a traceback of a factorization, out of a thread that encodes."""
    from safetensors.torch import load_file, save_file

    save_model(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    file = File(tmp_path)
    if is_in_file:
        file.weights["model.layers.1.mlp.up_proj.weight"][0, 0] = np.inf
        file.write(["blk.1.ffn_up.weight"], GgmlType.F32)
    else:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
        save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"activations of blk\.1\.ffn_down\.weight: got a NaN or infinite input in column 0"):
        run(tmp_path, written=file.tensors.get)


# --- what it tells --------------------------------------------------------------------------------------------------------


def test_a_file_without_weights_has_no_drift(llama: Path):
    """Catches inputs out of order or left out, two models that differ in anything but the file's weights, and a second moment
    that is not H of the same tokens."""
    seen = run(llama)
    assert [names for names, _ in seen] == ORDER
    sums, (train, holdout) = (GramSums(), GramSums()), pick_chunks(len(TOKENS), 24, 96, SEED)
    collect_from_checkpoint(llama, TOKENS, [], n_threads=1, split=HoldoutSplit([sums[0]], [sums[1]], frozenset(holdout)))
    assert sorted([*train, *holdout]) == list(range(len(TOKENS)))
    for grams, parts in zip([s.take() for s in sums], zip(*[(drift.train, drift.holdout) for _, drift in seen], strict=True), strict=True):
        for (names, _), [moments] in zip(seen, parts, strict=True):
            H = grams.inputs[input_group(names[0]) or "", None].mean
            assert not moments.cross.any()
            assert_close(moments.second, H, float(np.diag(H).max()), names[0])


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("Llama", {"rope_parameters": LLAMA3_ROPE, "attention_bias": True, "mlp_bias": True}),
        ("Mistral", {"sliding_window": 8}),
        ("Qwen2", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 32}),
    ],
)
def test_every_input_is_that_of_a_model_with_the_files_weights(family: str, options: dict[str, object], tmp_path: Path):
    """Catches weights that stay the checkpoint's, in the layer at work or those after it, ones that are seen too early, rows that
    are not put back into the checkpoint's order, embeddings and biases too, and a family whose norms, biases or windows are lost."""
    file = File(save_model(tmp_path, family, **options))
    file.write(["token_embd.weight"])
    one_dimensional = [name for name in file.weights if name.startswith("model.layers") and file.weights[name].ndim == 1]
    names = {file.hf_name(f"blk.{i}.{kind}.{end}"): f"blk.{i}.{kind}.{end}" for i in range(3) for kind in LINEARS | OTHERS for end in ("weight", "bias")}
    file.write([names[hf] for hf in one_dimensional], GgmlType.F32)
    states: list[Mapping[str, Tensor]] = []

    def write(told: Sequence[str], _drift: Drift) -> None:
        states.append(file.copy())
        file.write(told)

    seen = run(tmp_path, written=file.tensors.get, on_input=write)
    assert [told for told, _ in seen] == ORDER and len(file.tensors) == 1 + len(one_dimensional) + 7 * N_LAYERS
    original = file.inputs({}, TOKENS)
    for (told, drift), state in zip(seen, states, strict=True):
        now = file.inputs(state, TOKENS)
        assert all(np.array_equal(now[told[0]], now[name]) for name in told)
        assert drift.train[0].cross.any(), told
        assert_is_drift(drift, original[told[0]], now[told[0]], told[0])


def test_what_another_input_wrote_changes_the_next_one(llama: Path):
    """Catches a test above that could not tell: of two models that differ in one input's weights, the inputs before it must be
    equal to the bit and those after it must not."""
    half, all_ = File(llama), File(llama)
    place = 6  # gate and up of the second layer

    def write_half(names: Sequence[str], _drift: Drift) -> None:
        half.write([name for name in names if names != ORDER[place]])

    before, after = (
        run(llama, written=file.tensors.get, on_input=on_input) for file, on_input in ((half, write_half), (all_, lambda names, _: all_.write(names)))
    )
    same = [np.array_equal(a.train[0].cross, b.train[0].cross) for (_, a), (_, b) in zip(before, after, strict=True)]
    assert same == [True] * (place + 1) + [False] * (len(ORDER) - place - 1)


def test_only_what_is_wanted_is_run(llama: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches layers that are run for nothing, weights that are told and not wanted, another drift than that of the whole
    sequence, and a progress that does not end where it says."""
    wanted = {"blk.0.attn_k.weight", "blk.1.ffn_up.weight", "blk.1.attn_norm.weight", "blk.1.attn_q.bias", "token_embd.weight"}
    loaded: list[int] = []
    steps: list[tuple[str, int, int]] = []
    block = StreamedModel.block
    monkeypatch.setattr(StreamedModel, "block", lambda self, layers: (loaded.extend(layers), block(self, layers))[1])
    file = File(llama)
    file.write(["token_embd.weight", *(name for names in ORDER for name in names)])
    seen = run(llama, written=file.tensors.get, wants=wanted.__contains__, progress=lambda *step: steps.append(step))
    assert [names for names, _ in seen] == [["blk.0.attn_k.weight"], ["blk.1.ffn_up.weight"]]
    assert set(loaded) == {0, 1}
    assert [done for _, done, _ in steps] == list(range(1, 3 * len(TOKENS) + 1)) and steps[-1][1] == steps[-1][2]
    assert all("sequence" in phase and "tok/s" in phase for phase, _, _ in steps)
    original, now = file.inputs({}, TOKENS), file.inputs(file.tensors, TOKENS)
    for [name], drift in seen:
        assert_is_drift(drift, original[name], now[name], name)
    loaded.clear()
    assert run(llama, wants=lambda _name: False) == [] and loaded == []


def test_inputs_of_too_few_tokens_are_not_run(llama: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches a layer that is run as far as there for a drift that no weight can heed, and weights that nobody is told to encode."""
    monkeypatch.setattr("loopgguf.drift.MIN_TOKENS_PER_COLUMN", 1)
    tokens = TOKENS[:, :20]  # 4 × 20 for use: enough for 64 columns, too few for 96
    steps: list[int] = []
    seen = run(llama, tokens, progress=lambda _phase, done, _total: steps.append(done))
    assert [names for names, _ in seen] == ORDER
    assert [found is None for _, found in seen] == [False, False, False, True] * N_LAYERS
    assert len(steps) == len(tokens) * (3 * N_LAYERS + N_LAYERS - 1)


def test_both_models_run_on_the_device(llama: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches a sequence that stays on the CPU: where torch has no CUDA, one that goes to the GPU ends with torch's own error."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a torch without CUDA")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
        run(llama, device="cuda")


def test_documents_of_a_chunk_are_kept_apart(llama: Path):
    """Catches tokens that attend to another document's, in one of the two models, and chunks that get each other's documents."""
    documents = np.zeros(TOKENS.shape, np.int32)
    documents[0, 5:], documents[2, 9:], documents[2, 10:] = 1, 1, 2
    documents[4, 20:] = 1
    file = File(llama)
    file.write(["token_embd.weight", *ORDER[0], *ORDER[3]])
    state = file.copy()
    seen = {names[0]: drift for names, drift in run(llama, written=file.tensors.get, documents=documents)}
    original, now = (file.inputs(written, TOKENS, documents) for written in ({}, state))
    together = file.inputs(state, TOKENS)["blk.1.attn_output.weight"]
    assert np.abs(together - now["blk.1.attn_output.weight"]).max() > 0.1
    for name in ("blk.0.attn_output.weight", "blk.1.attn_q.weight", "blk.2.ffn_down.weight"):
        assert_is_drift(seen[name], original[name], now[name], name)


def test_columns_that_go_together_are_measured_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Catches moments of other blocks of columns than feedback takes, and large inputs whose whole matrix is kept."""
    monkeypatch.setattr("loopgguf.compensate.COLUMN_BLOCK", 32)
    folder = save_model(tmp_path)
    file = File(folder)
    file.write(["token_embd.weight"])
    how = {"written": file.tensors.get, "wants": {"blk.0.ffn_down.weight", "blk.0.attn_q.weight"}.__contains__}
    whole, parts = run(folder, **how), run(folder, **how, max_columns=64)
    widths = [[moments.columns for moments in drift.holdout] for _, drift in parts]
    assert widths == [[slice(0, 64)], [slice(0, 64), slice(64, 96)]]
    for (_, all_), (_, some) in zip(whole, parts, strict=True):
        for moments in some.train:
            assert_close(moments.second, all_.train[0].second[moments.columns, moments.columns], float(all_.train[0].second.max()), "second")
            assert_close(moments.cross, all_.train[0].cross[moments.columns, moments.columns], float(all_.train[0].second.max()), "cross")


def test_memory_decides_nothing(llama: Path):
    """Catches hidden states of the two models in one file, and other numbers where they lie on the disk."""
    file = File(llama)
    file.write(["token_embd.weight", *ORDER[1]])
    in_memory, on_disk = (run(llama, written=file.tensors.get, max_memory_bytes=memory) for memory in (1 << 30, 1))
    for (_, a), (_, b) in zip(in_memory, on_disk, strict=True):
        assert np.array_equal(a.train[0].cross, b.train[0].cross) and np.array_equal(a.holdout[0].second, b.holdout[0].second)


def test_an_error_of_the_encoder_comes_out(llama: Path):
    """Catches errors that are swallowed with the exception that ends a layer's run, and torch left as the sequence needs it."""
    import torch

    def fail(names: Sequence[str], _drift: Drift) -> None:
        if names == ORDER[5]:
            raise KeyboardInterrupt

    n_threads = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt):
        run(llama, on_input=fail, n_threads=n_threads + 1)
    assert torch.get_num_threads() == n_threads and torch.is_grad_enabled()
