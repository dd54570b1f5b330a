"""A model that was put together wrongly never becomes ready, and the refusal names what saw it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.planted import PLANTED, Planted, make_artifact, refusal

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("planted"))


@pytest.mark.parametrize("lora", ["merged", "unmerged"])
async def test_the_untouched_artifact_becomes_ready(artifact: Path, tmp_path: Path, lora: str) -> None:
    assert await refusal(artifact, tmp_path, Planted("nothing", lora=lora)) is None  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PLANTED)
async def test_a_planted_fault_is_refused(artifact: Path, tmp_path: Path, name: str) -> None:
    line = await refusal(artifact, tmp_path, PLANTED[name])
    assert line is not None, "it became ready"
    assert PLANTED[name].expected in line


def test_there_are_as_many_as_were_promised() -> None:
    assert len(PLANTED) >= 24
