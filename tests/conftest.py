"""Fixtures shared by the tests: the tiny published artifact, opened once."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from app.artifacts import Artifact, open_artifact
from app.encoding import Encoder, load_encoder
from app.model import LoadedModel, load_model
from tests.tiny import VisionFamily, write_published


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny models are faster so, and never wait for a busy core. A server that ran before took more, which rounds otherwise.

    Afterwards too: a module's fixtures are made before those of its first test.
    """
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def quiet_machine() -> None:
    """No settings from outside."""
    torch.set_num_threads(1)
    for name in [name for name in os.environ if name.startswith("PUNCHLINE_")]:
        del os.environ[name]


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="session")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny artifact in the published two-key layout. Do not write into it."""
    return write_published(tmp_path_factory.mktemp("published"))


@pytest.fixture(scope="session")
def published_of(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[VisionFamily], Path]:
    """By family, the directory of a tiny artifact in the published layout. Do not write into it."""

    @cache
    def root(family: VisionFamily) -> Path:
        return published if family == "qwen2_5_vl" else write_published(tmp_path_factory.mktemp(family), family=family)

    return root


@pytest.fixture(scope="session")
def artifact(published: Path) -> Artifact:
    return open_artifact(str(published))


@pytest.fixture(scope="session")
def encoder(artifact: Artifact) -> Encoder:
    return load_encoder(artifact)


@pytest.fixture(scope="session")
def loaded(artifact: Artifact) -> LoadedModel:
    return load_model(artifact)
