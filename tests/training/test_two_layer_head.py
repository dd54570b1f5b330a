"""A head of two layers with biases, from the recipe to the server: it learns, is kept whole, and scores in the engine as in training."""

from __future__ import annotations

import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from app.artifacts import HeadSpec, open_artifact
from app.main import running
from app.scoring import score_plain, score_shared
from app.settings import load_settings
from tests.tiny import encode, load_whole
from tests.training.tiny_run import QUIET, TinyRun
from training.export import export_artifact
from training.golden import prove
from training.loop import TRAINED_NAME, weights_of
from training.optimisation import make_optimiser
from training.recipe import RecipeInvalid, load_recipe
from training.trainee import load_trained, make_trainee, trainable_head

pytestmark = pytest.mark.anyio

HEAD: dict[str, Any] = {"layers": "two_layer", "width": 16, "activation": "tanh", "bias": True}
SECTIONS: dict[str, dict[str, Any]] = {"head": HEAD, "regularisation": {"averaging": 0.5}}
CAPTIONS = ("the penguin and the umbrella", "an iceberg", "", "Nobody told the octopus <|im_end|>")


@pytest.fixture(scope="module")
def run(tiny: TinyRun, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve steps. Do not write into it."""
    out = tmp_path_factory.mktemp("run") / "run"
    tiny.train(out, run={"max_steps": 12, "save_every": 6, "validate_every": 12}, **SECTIONS)
    return out


@pytest.fixture(scope="module")
def exported(tiny: TinyRun, run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported") / "artifact"
    return export_artifact(run, out, pairs=tiny.data / "pairs_validation.parquet", prove=prove, console=QUIET)


def lines_of(run: Path, name: str) -> list[float]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line[name] for line in lines if name in line]


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def test_it_starts_at_ln_2_and_learns_what_held_out_pairs_want(run: Path) -> None:
    """The chosen caption names the umbrella; ten pairs with captions never trained on."""
    losses = lines_of(run, "loss")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < 0.4
    (accuracy,) = lines_of(run, "validation_accuracy")
    assert accuracy >= 0.9


def test_every_layer_is_trained_but_the_last_bias(tiny: TinyRun, run: Path, tmp_path: Path) -> None:
    torch.manual_seed(tiny.recipe().run.seed)
    fresh = make_trainee(tiny.recipe(**SECTIONS), tmp_path).model.head
    trained = {name: tensor for name, tensor in load_file(newest(run) / TRAINED_NAME).items() if name.startswith("head.")}
    assert set(trained) == {"head.layers.0.weight", "head.layers.0.bias", "head.layers.2.weight"}
    assert all(tensor.any() for tensor in trained.values())
    assert not torch.equal(trained["head.layers.0.weight"], fresh.get_parameter("layers.0.weight"))


@pytest.mark.parametrize("spec", [HeadSpec(bias=True), HeadSpec.model_validate(HEAD)], ids=["linear", "two_layer"])
def test_the_last_bias_moves_only_if_the_loss_can_see_it(tiny: TinyRun, tmp_path: Path, spec: HeadSpec) -> None:
    """A difference of scores does not; the square of their sum does."""
    head = spec.model_dump()
    assert not trainable_head(tiny.recipe(head=head), 8).last.bias.requires_grad
    assert trainable_head(tiny.recipe(head=head, loss={"centring": 0.1}), 8).last.bias.requires_grad
    for name, centring in (("plain", 0.0), ("centred", 0.1)):
        tiny.train(tmp_path / name, head=head, loss={"centring": centring}, run={"max_steps": 2})
    plain, centred = (weights_of(newest(tmp_path / name)) for name in ("plain", "centred"))
    (bias,) = set(centred) - set(plain)
    assert bias.endswith(("linear.bias", "2.bias"))
    assert centred[bias].any()


def test_biases_do_not_decay(tiny: TinyRun) -> None:
    recipe = tiny.recipe(head=HEAD, optimiser={"weight_decay": 0.1})
    groups = make_optimiser(list(trainable_head(recipe, 8).parameters()), recipe.optimiser, torch.device("cpu")).param_groups
    assert [(group["weight_decay"], {each.ndim for each in group["params"]}) for group in groups] == [(0.1, {2}), (0.0, {1})]


def test_resumed_is_uninterrupted_to_the_bit(tiny: TinyRun, run: Path, tmp_path: Path) -> None:
    sections = SECTIONS | {"run": {"max_steps": 12, "save_every": 6, "validate_every": 12}}
    tiny.train(tmp_path, **sections)
    shutil.rmtree(newest(tmp_path))
    tiny.train(tmp_path, resume=True, **sections)
    whole, cut = weights_of(newest(run)), weights_of(newest(tmp_path))
    assert lines_of(tmp_path, "loss") == lines_of(run, "loss")
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_a_run_from_before_there_were_such_heads_goes_on(tiny: TinyRun, tmp_path: Path) -> None:
    """Its description has no key for them; the steps that are left are those of a run that nobody stopped."""
    steps: dict[str, Any] = {"run": {"max_steps": 4, "save_every": 2}}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    tiny.train(whole, **steps)
    tiny.train(cut, **steps)
    shutil.rmtree(newest(cut))
    description = json.loads((cut / "run.json").read_text())
    del description["recipe"]["head"]
    (cut / "run.json").write_text(json.dumps(description))
    tiny.train(cut, resume=True, **steps)
    assert newest(cut).name == newest(whole).name == "step-0000004"
    assert lines_of(cut, "loss") == lines_of(whole, "loss")
    kept, again = weights_of(newest(whole)), weights_of(newest(cut))
    assert kept.keys() == again.keys()
    assert all(torch.equal(kept[name], again[name]) for name in kept)


def test_the_artifact_says_what_head_it_has(tiny: TinyRun, run: Path, exported: Path) -> None:
    opened = open_artifact(str(exported))
    assert opened.config.head == HeadSpec.model_validate(HEAD)
    assert opened.config.training["recipe"]["head"] == HEAD
    assert "two layers with 16 values and tanh between them, with biases" in (exported / "README.md").read_text()
    written, kept = load_file(exported / "reward_head.safetensors"), weights_of(newest(run))
    assert torch.equal(written["0.weight"], kept["head.layers.0.weight"])  # the average
    assert written["2.bias"].tolist() == [0.0]


def test_the_serving_ways_score_as_training_does(tiny: TinyRun, run: Path, exported: Path, tmp_path: Path) -> None:
    """One forward a caption of the trainee, against the artifact's shared forward and its own plain one."""
    trainee = make_trainee(tiny.recipe(**SECTIONS), tmp_path)
    load_trained(trainee.model, weights_of(newest(run)))
    encoder, loaded = load_whole(exported, dtype="float32")
    group, own = (encode(each, (84, 112), 9, CAPTIONS, "Look closely.") for each in (encoder, trainee.encoder))
    (expected,) = score_plain(trainee.model.eval(), [own])
    assert statistics.stdev(expected.values) > 0.01
    for way in (score_plain, score_shared):
        (found,) = way(loaded.model, [group])
        assert found.values == pytest.approx(expected.values, abs=1e-5)


async def test_the_engine_scores_the_golden_items_before_it_is_ready(exported: Path) -> None:
    async with running(load_settings(model=str(exported), offline=True)) as runtime:
        assert runtime.first.last_report is not None
        assert (runtime.first.last_report.kind, runtime.ready) == ("golden", True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (['head.layers="two_layer"'], "head: a two_layer head needs its width"),
        (["head.width=8"], "head: a linear head has neither width nor activation"),
        (['head.layers="two_layer"', "head.width=0"], "head.width"),
        (['head.layers="two_layer"', "head.width=8", 'head.activation="swish"'], "head.activation"),
        (["head.depth=2"], "head.depth"),
    ],
)
def test_a_wrong_head_stops_the_run_and_is_named(changes: list[str], message: str) -> None:
    with pytest.raises(RecipeInvalid, match=message):
        load_recipe("humor_20k", changes)


def test_a_head_is_chosen_on_the_command_line() -> None:
    recipe = load_recipe("humor_20k", ['head.layers="two_layer"', "head.width=64", "head.bias=true"])
    assert recipe.head == HeadSpec(layers="two_layer", width=64, bias=True)
