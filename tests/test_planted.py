"""A model that was put together wrongly never becomes ready, and the refusal names what saw it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from app.errors import DeviceBroken
from tests.planted import PLANTED, PLANTED_IN_TWO_LAYERS, TWO_LAYERS, Planted, make_artifact, refusal, scoring
from tests.planted_kinds import PLANTED_IN_KINDS, copy_kind, make_kind

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


@pytest.fixture(scope="module")
def two_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_artifact(tmp_path_factory.mktemp("two_layers"), TWO_LAYERS)


async def test_the_untouched_two_layer_head_becomes_ready(two_layers: Path, tmp_path: Path) -> None:
    assert await refusal(two_layers, tmp_path, Planted("nothing")) is None


@pytest.mark.parametrize("name", PLANTED_IN_TWO_LAYERS)
async def test_a_fault_planted_in_a_two_layer_head_is_refused(two_layers: Path, tmp_path: Path, name: str) -> None:
    line = await refusal(two_layers, tmp_path, PLANTED_IN_TWO_LAYERS[name])
    assert line is not None, "it became ready"
    assert PLANTED_IN_TWO_LAYERS[name].expected in line


@pytest.fixture(scope="module")
def kinds(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: make_kind(name, tmp_path_factory.mktemp(name)) for name in PLANTED_IN_KINDS}


@pytest.mark.parametrize("kind", PLANTED_IN_KINDS)
async def test_the_untouched_kind_becomes_ready(kinds: dict[str, Path], tmp_path: Path, kind: str) -> None:
    assert await refusal(kinds[kind], tmp_path, Planted("nothing"), copy_kind) is None


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, faults in PLANTED_IN_KINDS.items() for name in faults])
async def test_a_fault_planted_in_a_published_kind_is_refused(kinds: dict[str, Path], tmp_path: Path, kind: str, name: str) -> None:
    line = await refusal(kinds[kind], tmp_path, PLANTED_IN_KINDS[kind][name], copy_kind)
    assert line is not None, "it became ready"
    assert PLANTED_IN_KINDS[kind][name].expected in line


async def test_a_device_that_breaks_during_the_start_is_no_fault_of_the_model(artifact: Path, tmp_path: Path) -> None:
    """Exit code 5, not 3: the artifact may be in order, and starting again may help."""

    def broken(scores: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("CUDA error: device-side assert triggered")

    with pytest.raises(DeviceBroken, match="device-side assert"):
        await refusal(artifact, tmp_path, Planted("nothing", in_memory=scoring(broken)))


def test_there_are_as_many_as_were_promised() -> None:
    assert len(PLANTED) >= 24
