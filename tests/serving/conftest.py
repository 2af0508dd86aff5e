"""A tiny int8 model, as a folder, as a model in this process, and behind a server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import Served, save_int8, serving

import sq_cpu


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_int8(tmp_path_factory.mktemp("serving") / "int8")


@pytest.fixture(scope="session")
def model(checkpoint: Path) -> Any:
    """The model that the server has, fused."""
    made = sq_cpu.load(checkpoint)
    sq_cpu.fuse(made)
    return made


@pytest.fixture(scope="session")
def server(checkpoint: Path) -> Iterator[Served]:
    with serving(checkpoint) as served:
        yield served
        assert served.metric("vllm:kv_cache_usage_perc") == 0
        assert served.stop() == 0
        assert len(served.said) == 1, served.said
