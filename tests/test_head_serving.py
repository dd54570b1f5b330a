"""Heads with a bias and of two layers in the forward that serves: engine, shared and plain way against torch's own layers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor, nn

from app.artifacts import HeadSpec, open_artifact
from app.contracts import EncodedGroup
from app.converting import convert
from app.model import RewardModel
from app.scoring import score_plain, score_shared
from tests.scorers import reusing
from tests.test_engine import Asked, World, error, flat, mixes, quick, run, world_of
from tests.tiny import give_head, write_published, write_text_only

HEADS = {
    "linear with bias": HeadSpec(bias=True),
    "two layers": HeadSpec(layers="two_layer", width=24),
    "two layers with bias": HeadSpec(layers="two_layer", width=64, bias=True, activation="gelu"),
}
KINDS = ("vision", "chat")
Worlds = Callable[[str, str, Literal["float32", "bfloat16"]], World]


@pytest.fixture(scope="module")
def worlds(tmp_path_factory: pytest.TempPathFactory) -> Worlds:
    """By head, kind and format."""
    folder = tmp_path_factory.mktemp("heads")

    @cache
    def root_of(head: str, kind: str) -> Path:
        place = folder / head.replace(" ", "_") / kind
        root = write_published(place) if kind == "vision" else write_text_only(place)
        give_head(root, HEADS[head])
        return root

    return cache(lambda head, kind, dtype: world_of(root_of(head, kind), dtype))


@quick
@given(head=st.sampled_from(sorted(HEADS)), kind=st.sampled_from(KINDS), first=mixes(), second=mixes())
def test_any_mix_gives_the_scores_of_one_forward_a_caption(
    worlds: Worlds, head: str, kind: str, first: list[Asked], second: list[Asked]
) -> None:
    world = worlds(head, kind, "float32")
    scorer = reusing(world.engine)
    for asked in (first, second, first):
        groups = world.groups(asked)
        expected = score_plain(world.plain, groups)
        assert error(run(scorer, groups), expected) <= 1e-5
        assert error(score_shared(world.plain, groups), expected) <= 1e-5


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", HEADS)
def test_the_score_is_that_of_torch_on_the_last_hidden_state(worlds: Worlds, head: str, kind: str) -> None:
    """The layers by hand, in float64, from the file alone."""
    world = worlds(head, kind, "float32")
    (group,) = world.groups([(0, ("the penguin", "x", "nobody told the octopus"), None)])
    (plain,) = score_plain(world.plain, [group])
    tensors = {name: tensor.double() for name, tensor in world.plain.head.stack.state_dict().items()}
    hidden = hidden_of(world.plain, group)
    if "weight" in tensors:
        expected = hidden @ tensors["weight"].T + tensors["bias"]
    else:
        inner = hidden @ tensors["0.weight"].T + tensors.get("0.bias", 0)
        between = nn.functional.gelu(inner) if "gelu" in str(world.plain.head.spec) else nn.functional.silu(inner)
        expected = between @ tensors["2.weight"].T + tensors.get("2.bias", 0)
    np.testing.assert_allclose(plain.values, expected.squeeze(-1).numpy(), atol=1e-5)
    assert np.ptp(plain.values) > 5e-3


def hidden_of(model: RewardModel, group: EncodedGroup) -> Tensor:
    """[rows, hidden] float64: what reaches the head of the plain way."""
    seen: list[Tensor] = []
    handle = model.head.register_forward_hook(lambda module, arguments, scores: seen.append(arguments[0].double()))
    score_plain(model, [group])
    handle.remove()
    return torch.cat(seen)


@pytest.mark.parametrize("head", HEADS)
def test_the_head_is_float32_in_a_bfloat16_model(worlds: Worlds, head: str) -> None:
    world, exact = worlds(head, "vision", "bfloat16"), worlds(head, "vision", "float32")
    groups = world.groups([(0, ("the penguin", "x"), None)])
    assert {parameter.dtype for parameter in world.model.head.parameters()} == {torch.float32}
    found = flat(run(reusing(world.engine), groups))
    assert (found.astype(np.float32) == found).all()
    assert (torch.tensor(found).bfloat16().double().numpy() != found).any()
    assert np.abs(found - flat(score_plain(exact.plain, groups))).max() <= 0.1


@pytest.mark.parametrize("head", HEADS)
def test_convert_keeps_the_head(tmp_path: Path, head: str) -> None:
    published = write_published(tmp_path / "published")
    give_head(published, HEADS[head])
    written = convert(str(published), tmp_path / "full", base_model=None, inputs=[], offline=True, progress=lambda step: None)
    assert open_artifact(str(written)).config.head == HEADS[head]
    before, after = (load_file(root / "reward_head.safetensors") for root in (published, written))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
