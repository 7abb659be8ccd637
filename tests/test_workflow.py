"""The main line: same source and plan, same bytes, from either kind of source; splits; dry runs to the byte."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from upstream import differing

from loopgguf.container import Value, ValueType, plan_layout, read_gguf, read_shards, shard_path
from loopgguf.errors import OutputError, QualityError
from loopgguf.feedback import Compensate
from loopgguf.ggml import GgmlType
from loopgguf.grams import find_grams, load_grams
from loopgguf.manifest import manifest_path
from loopgguf.planner import TypeRules
from loopgguf.report import inspect_file, inspection_json, sink_tables
from loopgguf.source import open_source
from loopgguf.workflow import ImatrixRequest, QuantizeRequest, Settings, check_again, compute_imatrix, convert, evaluate, quantize

WITHOUT = QuantizeRequest(quant_type="Q4_K_M", use_imatrix=False)


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_same_bytes_for_any_number_of_threads_and_buffer(demo_model: Path) -> None:
    """A slab boundary or a race that shows in the file."""
    files = []
    for i, settings in enumerate((Settings(n_threads=1), Settings(n_threads=2), Settings(n_threads=5, max_buffer_bytes=1 << 16))):
        files.append(quantize(demo_model, Path(f"{i}.gguf"), WITHOUT, settings).paths[0])
    assert len({_sha256(path) for path in files}) == 1


def test_folder_and_its_conversion_make_the_same_tensors(demo_model: Path) -> None:
    """A permutation or a rounding that only one of the two ways has."""
    converted = convert(demo_model, Path("demo-bf16.gguf")).paths[0]
    direct = quantize(demo_model, Path("a.gguf"), WITHOUT).paths[0]
    detour = quantize(converted, Path("b.gguf"), WITHOUT).paths[0]
    assert differing(direct, detour) == []


def test_dry_run_is_exact_and_writes_nothing(demo_model: Path, tmp_path: Path) -> None:
    """An estimate where a size to the byte was promised."""
    planned = quantize(demo_model, Path("x.gguf"), QuantizeRequest(quant_type="Q5_K_M", use_imatrix=False, dry_run=True))
    assert not Path("x.gguf").exists()
    written = quantize(demo_model, Path("x.gguf"), QuantizeRequest(quant_type="Q5_K_M", use_imatrix=False))
    assert written.paths[0].stat().st_size == planned.total_bytes == written.total_bytes
    assert written.plan.hash == planned.plan.hash


def test_dry_run_is_exact_with_an_imatrix_still_to_be_made(demo_model: Path) -> None:
    """Metadata about the imatrix that a dry run forgets."""
    request = QuantizeRequest(quant_type="Q4_K_M", calibration=ImatrixRequest(n_samples=2))
    planned = quantize(demo_model, Path("x.gguf"), replace(request, dry_run=True))
    written = quantize(demo_model, Path("x.gguf"), request)
    assert (written.total_bytes, written.plan.hash) == (planned.total_bytes, planned.plan.hash)


def test_output_that_is_another_input(demo_model: Path) -> None:
    """--overwrite that replaces the imatrix, or a tokenizer, by the model made from it."""
    made = compute_imatrix(demo_model, Path("a.imatrix.gguf"), ImatrixRequest(n_samples=2)).path
    before = made.read_bytes()
    with pytest.raises(OutputError, match="is the input"):
        quantize(demo_model, made, QuantizeRequest(quant_type="Q4_0", imatrix=made), Settings(overwrite=True))
    assert made.read_bytes() == before


def test_the_file_says_what_it_is(demo_model: Path) -> None:
    """Loaders that guess the type, and files whose origin nobody can tell."""
    metadata = read_gguf(quantize(demo_model, Path("x.gguf"), WITHOUT).paths[0]).metadata
    assert metadata["general.file_type"].data == 15
    assert metadata["general.quantization_version"].data == 2
    assert metadata["loopgguf.intent"].data == "preset Q4_K_M"
    assert not any(key.startswith("quantize.imatrix") for key in metadata)


@pytest.mark.parametrize("outtype", ["f32", "f16", "bf16", "q8_0"])
def test_conversions_measure_as_close_as_they_should(demo_model: Path, outtype: str) -> None:
    """A conversion that loads and speaks but is not the same model."""
    path = convert(demo_model, Path(f"{outtype}.gguf"), outtype).paths[0]
    quality = evaluate(path, demo_model, n_chunks=4, ctx_size=256).quality
    assert quality.mean_kld_nats.value < {"f32": 1e-4, "f16": 1e-4, "bf16": 1e-9, "q8_0": 1e-3}[outtype]


def test_split_sources(demo_gguf: Path, tmp_path: Path) -> None:
    """Shards merged in the wrong order, or shards of the output that llama.cpp does not find."""
    source = open_source(demo_gguf)
    halves = [source.tensors[:20], source.tensors[20:]]
    for number, tensors in enumerate(halves):
        split = {"split.no": Value(ValueType.UINT16, number), "split.count": Value(ValueType.UINT16, 2)}
        split["split.tensors.count"] = Value(ValueType.INT32, len(source.tensors))
        layout = plan_layout({**source.metadata, **split} if number == 0 else split, [(t.name, t.type, t.shape) for t in tensors])
        raw = bytearray(layout.total_bytes)
        raw[: len(layout.header)] = layout.header
        for info, tensor in zip(layout.tensors, tensors, strict=True):
            raw[info.offset : info.offset + info.n_bytes] = tensor.read_rows(0, tensor.n_rows).tobytes()
        shard_path(Path("model.gguf"), number + 1, 2).write_bytes(raw)
    whole = quantize(demo_gguf, Path("whole.gguf"), WITHOUT).paths[0]
    merged = quantize(Path("model-00001-of-00002.gguf"), Path("merged.gguf"), WITHOUT)
    assert differing(merged.paths[0], whole) == []
    assert not any(key.startswith("split.") for key in read_gguf(merged.paths[0]).metadata)
    kept = quantize(Path("model-00001-of-00002.gguf"), Path("kept.gguf"), QuantizeRequest(quant_type="Q8_0", use_imatrix=False, keep_split=True))
    assert [path.name for path in kept.paths] == ["kept-00001-of-00002.gguf", "kept-00002-of-00002.gguf"]
    shards = read_shards(kept.paths[0])
    assert [len(file.tensors) for file in shards] == [20, len(source.tensors) - 20]
    assert kept.sample_text


def test_requantizing_is_asked_for(demo_model: Path) -> None:
    """A quality trap that users fall into without a word."""
    small = quantize(demo_model, Path("small.gguf"), QuantizeRequest(quant_type="Q8_0", use_imatrix=False)).paths[0]
    again = QuantizeRequest(quant_type="Q4_0", use_imatrix=False, rules=TypeRules(allow_requantize=True))
    assert quantize(small, Path("smaller.gguf"), again).plan.rows[0].source_type is GgmlType.Q8_0


def test_nothing_is_published_that_does_not_verify(demo_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A damaged file that gets its name before anybody looks."""
    from loopgguf import pipeline

    execute = pipeline._run

    def damage(slab: pipeline._Slab) -> pipeline.TensorLog:
        sampled = execute(slab)
        if slab.job.row.name == "blk.3.ffn_down.weight":
            slab.job.part.write_at(slab.job.info.offset + slab.job.info.n_bytes // 2, b"\x55" * 600)
        return sampled

    monkeypatch.setattr(pipeline, "_run", damage)
    with pytest.raises(QualityError, match=r"blk\.3\.ffn_down\.weight"):
        quantize(demo_model, Path("x.gguf"), WITHOUT)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("x.gguf")] == []


def test_imatrix_of_folder_and_gguf_agree(demo_model: Path, demo_gguf: Path) -> None:
    """One engine that counts other tokens, other columns or another model than the other."""
    request = ImatrixRequest(n_samples=4, ctx_size=128)
    ours = compute_imatrix(demo_model, Path("a.imatrix.gguf"), request).statistics
    theirs = compute_imatrix(demo_gguf, Path("b.imatrix.gguf"), request).statistics
    assert ours.columns.keys() == theirs.columns.keys()
    for name in ours.columns:
        a, b = ours.importance(name), theirs.importance(name)
        assert a is not None and b is not None
        assert abs(a / b - 1).mean() < 0.01, name


def test_gram_matrices_lie_beside_the_imatrix(demo_model: Path, demo_gguf: Path) -> None:
    """Matrices of other tokens than the imatrix beside them: the diagonal of H must be its mean squares."""
    request = ImatrixRequest(n_samples=4, ctx_size=128, gradient=True, gram=True, process_output=True)
    for model, wanted in ((demo_model, request), (demo_gguf, replace(request, gradient=False))):
        made = compute_imatrix(model, Path(f"{model.name}.imatrix.gguf"), wanted)
        grams = load_grams(made.path)
        for group, weight in (("blk.2.ffn_norm", "blk.2.ffn_up.weight"), ("output_norm", "output.weight")):
            total = grams.train.inputs[group, None].total + grams.holdout.inputs[group, None].total
            assert np.allclose(np.diag(total), made.statistics.columns[weight].sum_squares[0], rtol=1e-3)
        assert ("blk.2.ffn_up.weight" in grams.train.weighted) == wanted.gradient
        [shown] = sink_tables(inspect_file(made.path).layers)
        assert shown.row_count == 6


@pytest.mark.parametrize("options", [{}, {"gram": True}, {"gram": True, "gradient": True}])
def test_attention_lies_beside_the_imatrix(demo_model: Path, demo_gguf: Path, options: dict[str, bool]) -> None:
    """Attention that is collected and never stored or shown, by one of the engines or together with Gram matrices."""
    shares = []
    request = ImatrixRequest(n_samples=2, ctx_size=64, attention=True, **options)
    for model in (demo_model, demo_gguf)[: 1 if request.gradient else 2]:
        made = compute_imatrix(model, Path(f"{model.name}.imatrix.gguf"), request)
        inspected = inspect_file(made.path)
        shares.append([layer.attention_share for layer in inspected.layers])
        assert len(shares[-1]) == 6 and all(share is not None and 0.01 < share < 0.9 for share in shares[-1])
        [shown] = sink_tables(inspected.layers)
        assert [column.header for column in shown.columns][:2] == ["layer", "attention"]
        told = inspection_json(inspected)["first_token"]
        assert isinstance(told, list) and told[3]["attention_share"] == shares[-1][3]
        with pytest.raises(OutputError, match=r"attention\.safetensors|gram-"):
            made.path.unlink()
            compute_imatrix(model, made.path, request)
    np.testing.assert_allclose(shares[0], shares[-1], atol=0.02)


@pytest.mark.parametrize(
    ("gradient", "max_memory", "passes"),
    [
        (False, 2 << 30, "one pass over the text"),
        (True, 2 << 30, "one pass over the text, forward and back"),
        (True, 40 << 20, "one pass over the text forward, then one forward and back in 6 blocks of layers"),
    ],
)
def test_gram_matrices_take_the_disk_that_was_announced(demo_model: Path, gradient: bool, max_memory: int, passes: str) -> None:
    """Hidden states that nobody was told of, or a figure far from what is used."""
    said: list[str] = []
    used = [0]

    def measure(_phase: str, _done: int, _total: int) -> None:
        used.append(sum(path.stat().st_size for path in Path("a.imatrix.loopgguf-job").glob("imatrix/work/*-of-*")))

    settings = Settings(max_memory_bytes=max_memory, progress=measure, announce=said.append)
    made = compute_imatrix(demo_model, Path("a.imatrix.gguf"), ImatrixRequest(n_samples=16, ctx_size=128, gram=True, gradient=gradient), settings)
    matrices = sum(path.stat().st_size for path in find_grams(made.path))
    figures = [int(figure.replace(",", "")) for figure in re.findall(r"([\d,]{4,}) bytes", said[0])]
    assert len(said) == 1 and said[0].endswith(f"; {passes}")
    assert matrices <= figures[0] <= 1.2 * matrices
    states = figures[1] if len(figures) > 1 else 0
    assert 0.8 * states <= max(used) <= states


def test_the_passes_that_memory_needs_are_announced(demo_gguf: Path) -> None:
    """A job of hours that was thought to take minutes."""
    said: list[str] = []
    settings = Settings(max_memory_bytes=2 * 4 * (3 * 256**2 + 768**2) * 4, announce=said.append)
    compute_imatrix(demo_gguf, Path("a.imatrix.gguf"), ImatrixRequest(n_samples=2, ctx_size=64, gram=True), settings)
    assert said[0].endswith("; 2 passes over the text, as memory does not hold the matrices of all layers")


def test_error_feedback_lowers_the_kld(demo_model: Path) -> None:
    """Feedback that is collected, chosen, and then never reaches the file; or is of another tensor."""
    calibration = ImatrixRequest(n_samples=16, ctx_size=256)
    plain = QuantizeRequest(quant_type="Q4_0", calibration=calibration)
    a = quantize(demo_model, Path("a.gguf"), plain)
    b = quantize(demo_model, Path("b.gguf"), replace(plain, compensate=Compensate.FAST))
    assert abs(a.total_bytes - b.total_bytes) <= 64  # the header says that it was compensated
    assert sum(log.feedback[0].way != "plain" for log in b.logs.values() if log.feedback) > 20
    kld = [evaluate(path, demo_model, n_chunks=4, ctx_size=256).quality.mean_kld_nats.value for path in (*a.paths, *b.paths)]
    assert kld[1] < 0.8 * kld[0]


def test_error_feedback_from_a_gguf(demo_gguf: Path) -> None:
    """A source without gradients that silently gets the plain encoder's bytes."""
    said: list[str] = []
    request = QuantizeRequest(quant_type="Q4_0", calibration=ImatrixRequest(n_samples=16, ctx_size=256), compensate=Compensate.FAST)
    result = quantize(demo_gguf, Path("x.gguf"), request, Settings(announce=said.append))
    assert any("a GGUF gives no gradients" in line for line in said)
    assert sum(log.feedback[0].way == "columns" for log in result.logs.values() if log.feedback) > 20
    untried = [name for name, log in result.logs.items() if log.sampled is not None and not log.feedback]
    assert any(f"not tried on {len(untried)} of " in note and untried[0] in note for note in result.notes)


def test_error_feedback_from_matrices_made_before(demo_model: Path) -> None:
    """Matrices beside the imatrix that are not used, so that every file takes a backward pass of its own; or others than a pass gives."""
    text = ImatrixRequest(n_samples=16, ctx_size=256, gram=True, gradient=True)
    made = compute_imatrix(demo_model, Path("demo.imatrix.gguf"), text).path
    said: list[str] = []
    plain = QuantizeRequest(quant_type="Q4_0", compensate=Compensate.FAST, compensate_sequence=False)  # layers do not know of one another
    request = replace(plain, imatrix=made, calibration=replace(text, n_samples=1))
    stored = quantize(demo_model, Path("a.gguf"), request, Settings(announce=said.append))
    assert "error feedback: around the encoder, briefly over single codes, under the matrices beside the imatrix, with gradients" in said
    fresh = quantize(demo_model, Path("b.gguf"), replace(plain, calibration=text))
    ratios = [[log.held_out_ratio for name in sorted(r.logs) for log in r.logs[name].feedback] for r in (stored, fresh)]
    assert len(ratios[0]) > 20 and np.allclose(*ratios, rtol=0.02)


def test_the_device_reaches_every_pass_of_torch(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pass that stays on the CPU: where torch has no CUDA, one that goes to the GPU ends with torch's own error."""
    import torch

    if torch.cuda.is_available():
        pytest.skip("needs a torch without CUDA")
    text = ImatrixRequest(ctx_size=64, n_samples=2)
    made = compute_imatrix(demo_model, Path("a.imatrix.gguf"), text).path
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    on_gpu = Settings(device="cuda", overwrite=True)
    for run in (
        lambda: compute_imatrix(demo_model, Path("b.imatrix.gguf"), text, on_gpu),
        lambda: compute_imatrix(demo_model, Path("c.imatrix.gguf"), replace(text, gram=True, gradient=True), on_gpu),
        lambda: quantize(demo_model, Path("x.gguf"), QuantizeRequest(quant_type="Q4_0", imatrix=made, compensate=Compensate.FAST, calibration=text), on_gpu),
        lambda: quantize(demo_model, Path("x.gguf"), QuantizeRequest(size_bytes=4_000_000, imatrix=made, calibration=text), on_gpu),
    ):
        with pytest.raises((AssertionError, RuntimeError), match=r"CUDA|NVIDIA"):
            run()


def test_a_finished_file_is_checked_again(demo_model: Path, demo_gguf: Path) -> None:
    """Damage after the file was published, a file of another model, and errors that are not those of the weights."""
    path = quantize(demo_model, Path("a.gguf"), QuantizeRequest(quant_type="Q8_0", use_imatrix=False)).paths[0]
    assert check_again(path).relative_errors == {}
    found = check_again(path, demo_model)
    assert all((error == 0) == (ggml_type is GgmlType.F32) for ggml_type, error in found.relative_errors.values())
    assert max(error for _, error in found.relative_errors.values()) < 1e-4
    assert max(error for _, error in check_again(demo_gguf, demo_model).relative_errors.values()) == 0
    info = next(tensor for tensor in read_gguf(path).tensors if tensor.name == "blk.1.ffn_up.weight")
    with path.open("r+b") as stream:
        stream.seek(info.offset)
        stream.write(b"\x00\x7c")  # the first block scale: infinity
    with pytest.raises(QualityError, match=r"tensor blk\.1\.ffn_up\.weight: got a NaN, an infinity"):
        check_again(path)
    with path.open("r+b") as stream:
        stream.seek(info.offset)
        stream.write(b"\x00\x7b")  # finite and much too large
    manifest_path(path).unlink()  # which would tell as well, but not where
    with pytest.raises(QualityError, match=r"tensor blk\.1\.ffn_up\.weight: error is .* worse than zeros"):
        check_again(path, demo_model)
