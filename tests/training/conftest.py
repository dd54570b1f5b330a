"""What several modules of training's tests begin with."""

from __future__ import annotations

import pytest

from tests.training.tiny_run import TinyRun, write_tiny_run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyRun:
    return write_tiny_run(tmp_path_factory.mktemp("tiny"))
