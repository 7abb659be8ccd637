"""Fixtures that several test files share, and `--slow`."""

from __future__ import annotations

from pathlib import Path

import pytest

from loopgguf.container import PartFile, plan_layout, uint32
from loopgguf.source import open_source

FILE_TYPE_BF16 = 32  # llama_ftype of llama.h


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests marked slow, which take minutes")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--slow") or config.getoption("-m"):
        return
    for item in items:
        if "slow" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="slow; run with --slow"))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """The checkpoint folder of a trained Llama of 6.8M parameters."""
    return Path(__file__).parent / "models" / "demo-llama"


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
