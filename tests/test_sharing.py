"""Models on one base: its weights are in memory once, and each model scores bit for bit as it does alone."""

from __future__ import annotations

import gc
import shutil
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora import LoraLayer

from app.artifacts import Artifact, open_artifact
from app.encoding import load_encoder
from app.engine import Engine
from app.layers import PrepackedLinear, prepack
from app.model import LoadedModel, load_model
from app.scoring import score_plain, score_shared
from app.sharing import SharedBases, with_same_weights
from tests.scorers import reusing
from tests.tiny import copy_artifact, edit_json, encode, load_whole, write_published, write_sibling

CAPTIONS = ("the penguin", "an iceberg, they said", "nobody told the octopus", "")


@pytest.fixture(scope="module")
def roots(published: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three artifacts on one base, one of which names a copy of it."""
    folder = tmp_path_factory.mktemp("siblings")
    shutil.copytree(published.parent / "base", folder / "copy")
    second = write_sibling(published, folder / "second", seed=11, image={"long_edge": 224})
    third = write_sibling(published, folder / "third", seed=12)
    edit_json(third / "reward_model_config.json", base_model_name=str(folder / "copy"))
    return [published, second, third]


def load_together(roots: Sequence[Path], **options: Any) -> list[LoadedModel]:
    artifacts = [open_artifact(str(root), offline=True) for root in roots]
    bases = SharedBases(artifacts)
    return [load_model(artifact, bases=bases, **({"lora": "auto"} | options)) for artifact in artifacts]


def own_tensors(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    """What a base brings, by its name in it; adapter and head left out."""
    backbone = loaded.model.backbone
    tensors = dict(backbone.named_parameters()) | dict(backbone.named_buffers())
    return {name.replace(".base_layer", ""): tensor for name, tensor in tensors.items() if ".lora_" not in name}


def places(loaded: LoadedModel) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in own_tensors(loaded).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_tensor_of_the_base_is_there_once(roots: list[Path], dtype: str) -> None:
    first, second, third = load_together(roots, dtype=dtype)
    alone = load_model(open_artifact(str(roots[0]), offline=True), lora="unmerged", dtype=dtype)  # type: ignore[arg-type]
    assert places(first) == places(second) == places(third)
    assert places(first).keys() == places(alone).keys()
    assert not set(places(first).values()) & set(places(alone).values())
    adapters = [
        {tensor.data_ptr() for name, tensor in each.model.backbone.named_parameters() if ".lora_" in name} for each in (first, second)
    ]
    assert adapters[0]
    assert not adapters[0] & adapters[1]


def test_a_packed_weight_is_there_once_and_the_plain_one_is_gone(roots: list[Path]) -> None:
    models = load_together(roots)
    weights = [weakref.ref(each) for name, each in models[0].model.backbone.named_parameters() if name.endswith("base_layer.weight")]
    assert weights
    backbones = [each.model.backbone for each in models]
    packed = prepack(*backbones)
    gc.collect()
    assert [each() for each in weights if each() is not None] == []
    bases = [[layer.base_layer for layer in backbone.modules() if isinstance(layer, LoraLayer)] for backbone in backbones]
    assert all(isinstance(layer, PrepackedLinear) for layer in bases[0])
    assert [list(map(id, each)) for each in bases] == [list(map(id, bases[0]))] * 3
    assert packed == len({id(layer) for backbone in backbones for layer in backbone.modules() if isinstance(layer, PrepackedLinear)})
    engines = [Engine(each.model) for each in models]
    assert {engine.num_prepacked for engine in engines} == {sum(isinstance(layer, PrepackedLinear) for layer in backbones[0].modules())}


def test_each_scores_bit_for_bit_as_alone(roots: list[Path]) -> None:
    """By the plain way, by the packed forward of training, and by the engine that serves, all in float32."""
    together = load_together(roots)
    alone = [load_whole(root, lora="unmerged")[1] for root in roots]
    groups = [
        [
            encode(load_encoder(open_artifact(str(root), offline=True)), (120, 80), seed, CAPTIONS, prompt)
            for seed, prompt in enumerate((None, "Be kind."))
        ]
        for root in roots
    ]
    for score in (score_plain, score_shared):
        for one, other, own in zip(together, alone, groups, strict=True):
            assert score(one.model, own) == score(other.model, own)
    prepack(*(each.model.backbone for each in together))
    served = [reusing(Engine(each.model)) for each in together]
    expected = [reusing(Engine(each.model)) for each in alone]
    for _ in range(2):  # the second time with what is kept
        for one, other, own in zip(served, expected, groups, strict=True):
            assert one.score(one.prepare(own)) == other.score(other.prepare(own))


def test_their_fingerprints_are_those_of_unmerged_ones(roots: list[Path]) -> None:
    together = load_together(roots)
    alone = [load_whole(root, lora="unmerged")[1] for root in roots]
    assert [each.fingerprint for each in together] == [each.fingerprint for each in alone]
    assert len({each.fingerprint for each in together}) == 3
    assert {each.lora for each in together} == {"unmerged"}


def test_what_is_merged_shares_nothing(roots: list[Path]) -> None:
    first, second, _ = load_together(roots, lora="merged")
    assert {first.lora, second.lora} == {"merged"}
    assert not set(places(first).values()) & set(places(second).values())


def test_alone_on_its_base_an_adapter_is_merged(roots: list[Path], tmp_path: Path) -> None:
    other = write_published(tmp_path / "other", seed=5)
    first, stranger, second = load_together([roots[0], other, roots[1]])
    assert [first.lora, stranger.lora, second.lora] == ["unmerged", "merged", "unmerged"]
    assert stranger.fingerprint == load_whole(other)[1].fingerprint
    assert not set(places(first).values()) & set(places(stranger).values())


def test_another_base_is_not_taken_for_the_same(roots: list[Path], tmp_path: Path) -> None:
    changed = copy_artifact(roots[0], tmp_path)
    edit_json(tmp_path / "base" / "config.json", note="trained a little more")
    artifacts: list[Artifact] = [open_artifact(str(root), offline=True) for root in (roots[0], changed)]
    bases = SharedBases(artifacts)
    assert not any(bases.is_shared(artifact) for artifact in artifacts)


def test_a_copy_around_the_same_weights_is_a_tree_of_its_own(loaded: LoadedModel) -> None:
    backbone = loaded.model.backbone
    copied = with_same_weights(backbone)
    assert not set(map(id, backbone.modules())) & set(map(id, copied.modules()))
    for one, other in ((backbone.named_parameters(), copied.named_parameters()), (backbone.named_buffers(), copied.named_buffers())):
        assert [(name, id(tensor)) for name, tensor in one] == [(name, id(tensor)) for name, tensor in other]
