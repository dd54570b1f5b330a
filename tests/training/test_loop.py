"""The product's loop against a plain one, against itself interrupted, and against what must stop it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.reference_loop import ReferenceLoop
from tests.training.tiny_run import QUIET, TinyRun, write_tiny_run
from training.batches import StepPlan
from training.checkpoints import CheckpointFailed, Checkpoints
from training.collation import Collator
from training.loop import AVERAGED_NAME, TRAINED_NAME, TrainingFailed, weights_of
from training.pairs import DataInvalid, Pair, read_pairs, write_pairs
from training.preference import bradley_terry_loss, score_pairs
from training.recipe import RecipeInvalid
from training.train import choose_pairs, key_of, make_accelerator, make_course, refuse_unsharded, train
from training.trainee import Trainee, make_trainee


def metrics_of(run: Path, name: str = "loss") -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def weights_in(run: Path, step: int, name: str = TRAINED_NAME) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / f"step-{step:07d}" / name)


def planned_steps(tiny: TinyRun, pairs_per_image: int, num_steps: int) -> list[list[list[Pair]]]:
    """The pairs of each step as the product meets them: order is the recipe's business, not the model's."""
    recipe = tiny.recipe()
    pairs = read_pairs(tiny.data / "pairs_train.parquet")
    plan = StepPlan(
        [key_of(pair) for pair in pairs], pairs_per_image, recipe.run.batch_size, recipe.run.num_accumulated, 1, recipe.run.seed
    )
    batches = [[pairs[index] for index in batch] for batch in plan.batches(0, 0, num_steps)]
    return [batches[start : start + 2] for start in range(0, len(batches), 2)]


@pytest.mark.parametrize("pairs_per_image", [1, 4])
def test_the_first_ten_losses_are_those_of_a_plain_padded_loop(tiny: TinyRun, tmp_path: Path, pairs_per_image: int) -> None:
    """Sharing image and prompt changes the cost, not the numbers; the first loss is ln 2, the head being zero."""
    tiny.train(tmp_path, data={"pairs_per_image": pairs_per_image}, run={"max_steps": 10})
    plain = ReferenceLoop(tiny.base, tiny.data, seed=3, r=4, alpha=8, learning_rate=5e-3)
    expected = plain.train(planned_steps(tiny, pairs_per_image, 10))
    found = metrics_of(tmp_path)
    assert len(found) == 10
    assert found[0] == pytest.approx(math.log(2), abs=1e-4)
    assert found == pytest.approx(expected, rel=1e-3, abs=1e-4)
    assert found[-1] < 0.5


def test_gradients_equal_those_of_padded_separate_sequences(tiny: TinyRun, tmp_path: Path) -> None:
    """Every trained parameter of LoRA and head, relative 1e-4; the head is set off zero so that all of them have one."""
    pairs = read_pairs(tiny.data / "pairs_train.parquet")[:12]
    plain = ReferenceLoop(tiny.base, tiny.data, seed=3, r=4, alpha=8, learning_rate=5e-3)
    trainee = seeded_trainee(tiny, tmp_path)
    disturb(trainee, plain)
    plain.backward(pairs)
    batch = Collator(trainee.encoder, pairs, tiny.data).collate(range(len(pairs)))
    assert len(batch.groups) < len(pairs)  # pairs of one picture and prompt share it
    bradley_terry_loss(score_pairs(trainee.model, batch.groups).margins).backward()  # type: ignore[no-untyped-call]
    expected = plain.gradients()
    found = {name.removeprefix("backbone."): each.grad for name, each in trainee.trainable().items()}
    found["head"] = found.pop("head.linear.weight")
    assert set(found) == set(expected)
    for name, gradient in found.items():
        assert gradient is not None
        assert expected[name].norm() > 0, name
        assert (gradient - expected[name]).norm() <= 1e-4 * expected[name].norm(), name


def seeded_trainee(tiny: TinyRun, folder: Path, **sections: dict[str, Any]) -> Trainee:
    torch.manual_seed(3)
    return make_trainee(tiny.recipe(**sections), folder)


def disturb(trainee: Trainee, plain: ReferenceLoop) -> None:
    """The same random weights in both: a fresh adapter (B = 0) and head (0) would leave most gradients zero."""
    generator = torch.Generator().manual_seed(11)
    own = trainee.trainable()
    theirs = {name.removeprefix("base_model.model."): each for name, each in plain.model.named_parameters()}
    with torch.no_grad():
        for name in sorted(own):
            own[name].copy_(torch.randn(own[name].shape, generator=generator) * 0.1)
            target = plain.head.weight if name == "head.linear.weight" else theirs[name.removeprefix("backbone.")]
            target.copy_(own[name])


def test_gradient_checkpointing_changes_no_loss(tiny: TinyRun, tmp_path: Path) -> None:
    for name, run in (("without", {}), ("with", {"gradient_checkpointing": True})):
        tiny.train(tmp_path / name, run={"max_steps": 4} | run)
    backbone = seeded_trainee(tiny, tmp_path, run={"gradient_checkpointing": True}).model.backbone
    assert all(layer.gradient_checkpointing for layer in (*backbone.language_model.layers, *backbone.visual.blocks))
    assert metrics_of(tmp_path / "with") == pytest.approx(metrics_of(tmp_path / "without"), rel=1e-5)


def test_accumulated_batches_are_one_step(tiny: TinyRun, tmp_path: Path) -> None:
    """Two batches of 4 and one of 8 hold the same pairs in an epoch of one step: same gradient, same update of the head.

    Adam's first step moves by the sign of the gradient alone.
    """
    pairs = read_pairs(tiny.data / "pairs_train.parquet")[:8]
    data = tmp_path / "data"
    (data / "images").mkdir(parents=True)
    for name in {str(pair.image) for pair in pairs}:
        (data / name).write_bytes((tiny.data / name).read_bytes())
    write_pairs(data / "pairs_train.parquet", pairs)
    small = TinyRun(tiny.base, data)
    small.train(tmp_path / "two", run={"batch_size": 4, "num_accumulated": 2, "max_steps": 1})
    small.train(tmp_path / "one", run={"batch_size": 8, "num_accumulated": 1, "max_steps": 1})
    one, two = weights_in(tmp_path / "one", 1), weights_in(tmp_path / "two", 1)
    assert metrics_of(tmp_path / "one", "grad_norm") == pytest.approx(metrics_of(tmp_path / "two", "grad_norm"), rel=1e-4)
    torch.testing.assert_close(one["head.linear.weight"].sign(), two["head.linear.weight"].sign())


def test_resumed_is_uninterrupted_to_the_bit(tiny: TinyRun, tmp_path: Path) -> None:
    """Also with dropout, whose random numbers are part of the state; stopped in the second epoch (an epoch has 6 steps)."""
    sections = {"lora": {"dropout": 0.2}, "regularisation": {"token_dropout": 0.1, "embedding_dropout": 0.1, "averaging": 0.9}}
    tiny.train(tmp_path / "whole", run={"max_steps": 10}, **sections)
    tiny.train(tmp_path / "cut", run={"max_steps": 10}, **sections)
    remove_checkpoint(tmp_path / "cut", 10)  # as a kill before it was written would leave the folder
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 11, "lo')
    tiny.train(tmp_path / "cut", resume=True, run={"max_steps": 10}, **sections)
    assert metrics_of(tmp_path / "cut") == metrics_of(tmp_path / "whole")
    assert metrics_of(tmp_path / "cut", "validation_loss") == metrics_of(tmp_path / "whole", "validation_loss")
    for name in (TRAINED_NAME, AVERAGED_NAME):
        whole, cut = weights_in(tmp_path / "whole", 10, name), weights_in(tmp_path / "cut", 10, name)
        assert all(torch.equal(whole[each], cut[each]) for each in whole)


def remove_checkpoint(run: Path, step: int) -> None:
    folder = run / "checkpoints" / f"step-{step:07d}"
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_a_whole_run_resumed_does_nothing(tiny: TinyRun, tmp_path: Path) -> None:
    tiny.train(tmp_path, run={"max_steps": 2})
    before = (tmp_path / "metrics.jsonl").read_text()
    tiny.train(tmp_path, resume=True, run={"max_steps": 2})
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_a_folder_with_a_run_is_not_overwritten(tiny: TinyRun, tmp_path: Path) -> None:
    tiny.train(tmp_path, run={"max_steps": 2})
    with pytest.raises(TrainingFailed, match="--resume"):
        tiny.train(tmp_path, run={"max_steps": 2})
    with pytest.raises(TrainingFailed, match="recipe changed"):
        tiny.train(tmp_path, resume=True, run={"max_steps": 4})


def test_checkpoints_of_another_shape_are_refused(tiny: TinyRun, tmp_path: Path) -> None:
    tiny.train(tmp_path, run={"max_steps": 2})
    description = json.loads((tmp_path / "run.json").read_text())
    description["recipe"]["lora"]["r"] = 8
    (tmp_path / "run.json").write_text(json.dumps(description))
    with pytest.raises(CheckpointFailed, match="does not fit this run"):
        tiny.train(tmp_path, resume=True, lora={"r": 8}, run={"max_steps": 2})


def test_a_loss_that_is_not_finite_stops_before_the_weights_change(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(TrainingFailed, match="not finite"):
        tiny.train(tmp_path, optimiser={"learning_rate": 1e38}, run={"max_steps": 9, "save_every": 1})
    found = metrics_of(tmp_path)
    newest = Checkpoints(tmp_path / "checkpoints", 3).newest()
    assert newest is not None
    assert newest.step == len(found)
    assert all(map(math.isfinite, found))


def test_every_weight_is_trained_without_lora(tiny: TinyRun, tmp_path: Path) -> None:
    recipe = tiny.recipe().model_copy(update={"lora": None})
    trainee = make_trainee(recipe, tmp_path)
    assert all(parameter.requires_grad for parameter in trainee.model.parameters())
    assert trainee.config.kind == "full_head"
    train(recipe.model_copy(update={"run": recipe.run.model_copy(update={"max_steps": 3})}), tiny.data, tmp_path / "run", **silent())
    losses = metrics_of(tmp_path / "run")
    assert losses[0] == pytest.approx(math.log(2), abs=1e-4)
    assert losses[-1] < losses[0]


def silent() -> dict[str, Any]:
    return {"resume": False, "trackers": (), "console": QUIET}


def test_a_margin_asked_of_a_pair_by_hand(tiny: TinyRun, tmp_path: Path) -> None:
    """The first step has all scores zero: a margin of 2 * 0.5 asked of each pair costs log(1 + e)."""
    tiny.train(tmp_path, loss={"margin_per_gap": 2.0}, run={"max_steps": 1})
    assert metrics_of(tmp_path) == pytest.approx([math.log(1 + math.e)], abs=1e-4)


def test_centring_reaches_the_loop(tiny: TinyRun, tmp_path: Path) -> None:
    """Its arithmetic is in test_preference; here it must change the second step's loss and not the first's."""
    tiny.train(tmp_path / "plain", run={"max_steps": 3})
    tiny.train(tmp_path / "centred", loss={"centring": 5.0}, run={"max_steps": 3})
    plain, centred = metrics_of(tmp_path / "plain"), metrics_of(tmp_path / "centred")
    assert plain[0] == centred[0]
    assert plain[2] != centred[2]


def test_the_average_is_validated_and_exported_the_weights_are_trained(tiny: TinyRun, tmp_path: Path) -> None:
    """Averaging changes no training loss, only what is validated and what a checkpoint stands for."""
    run = {"max_steps": 8, "validate_every": 8}
    tiny.train(tmp_path / "plain", run=run)
    tiny.train(tmp_path / "averaged", run=run, regularisation={"averaging": 0.99})
    assert metrics_of(tmp_path / "averaged") == metrics_of(tmp_path / "plain")
    assert metrics_of(tmp_path / "averaged", "validation_loss") != metrics_of(tmp_path / "plain", "validation_loss")
    last = tmp_path / "averaged" / "checkpoints" / "step-0000008"
    chosen, averaged = weights_of(last), load_file(last / AVERAGED_NAME)
    assert all(torch.equal(chosen[name], averaged[name]) for name in averaged)
    plain = weights_of(tmp_path / "plain" / "checkpoints" / "step-0000008")
    assert plain.keys() == chosen.keys()
    assert not torch.equal(plain["head.linear.weight"], chosen["head.linear.weight"])


@pytest.mark.parametrize(
    ("pair", "sections", "named"),
    [
        (Pair("seven", "a", None, None, "funny", "told"), {"loss": {"margin_per_gap": 1.0}}, "margin_per_gap"),
        (Pair("seven", "a", None, "Why?", "funny", "told", mean_gap=1.0), {"model": {"prompt_policy": "fixed"}}, "prompt_policy"),
    ],
)
def test_pairs_of_the_wrong_sort_are_named_before_the_first_step(
    tiny: TinyRun, tmp_path: Path, pair: Pair, sections: dict[str, Any], named: str
) -> None:
    others = [Pair(str(number), "a", None, None, f"funny {number}", "told", mean_gap=1.0) for number in range(8)]
    write_pairs(tmp_path / "pairs_train.parquet", [*others, pair])
    with pytest.raises(DataInvalid, match=rf"pair seven .*{named}"):
        train(tiny.recipe(**sections), tmp_path, tmp_path / "run", **silent())


def test_a_broken_picture_is_found_before_the_first_step(tiny: TinyRun, tmp_path: Path) -> None:
    """Its header is whole; only its body is cut off."""
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "0.png").write_bytes((tiny.data / "images" / "0.png").read_bytes()[:-40])
    write_pairs(
        tmp_path / "pairs_train.parquet", [Pair(str(number), "a", "images/0.png", None, f"funny {number}", "told") for number in range(8)]
    )
    with pytest.raises(DataInvalid, match=r"images/0\.png"):
        train(tiny.recipe(), tmp_path, tmp_path / "run", **silent())


def test_a_run_that_ends_while_it_warms_up_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    with pytest.raises(RecipeInvalid, match="only 6 steps"):
        tiny.train(tmp_path, optimiser={"num_warmup_steps": 6})


def test_a_refused_command_leaves_the_run_as_it_was(tiny: TinyRun, tmp_path: Path) -> None:
    """Also its processor, which another base would bring along."""
    tiny.train(tmp_path / "run", run={"max_steps": 2})
    other = write_tiny_run(tmp_path / "other", num_train=8)
    (other.base / "tokenizer_config.json").write_text((other.base / "tokenizer_config.json").read_text() + " ")
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    for resume in (False, True):
        with pytest.raises(TrainingFailed):
            other.train(tmp_path / "run", resume=resume)
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before


def test_checkpoints_of_nobody_knows_what_are_not_entered(tiny: TinyRun, tmp_path: Path) -> None:
    tiny.train(tmp_path, run={"max_steps": 2})
    (tmp_path / "run.json").unlink()
    with pytest.raises(TrainingFailed, match=r"no run\.json"):
        tiny.train(tmp_path, resume=True, run={"max_steps": 2})


@pytest.mark.parametrize("text", ["{", "[1]", '"x"'])
def test_a_broken_run_file_is_one_line(tiny: TinyRun, tmp_path: Path, text: str) -> None:
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(TrainingFailed, match=r"run\.json"):
        tiny.train(tmp_path, resume=True)


def test_another_number_of_processes_is_refused(tiny: TinyRun, tmp_path: Path) -> None:
    tiny.train(tmp_path, run={"max_steps": 2})
    description = json.loads((tmp_path / "run.json").read_text())
    description["devices"]["num_processes"] = 2
    (tmp_path / "run.json").write_text(json.dumps(description))
    with pytest.raises(TrainingFailed, match="devices changed"):
        tiny.train(tmp_path, resume=True, run={"max_steps": 2})


def test_what_fsdp_would_do_wrongly_is_refused(tiny: TinyRun) -> None:
    with pytest.raises(RecipeInvalid, match="fsdp_version 2"):
        refuse_unsharded(tiny.recipe(), is_fsdp2=False)
    with pytest.raises(RecipeInvalid, match=r"model\.dtype"):
        refuse_unsharded(tiny.recipe(model={"dtype": "bfloat16"}), is_fsdp2=True)
    with pytest.raises(RecipeInvalid, match="averaging"):
        refuse_unsharded(tiny.recipe(regularisation={"averaging": 0.9}), is_fsdp2=True)
    refuse_unsharded(tiny.recipe(), is_fsdp2=True)


def test_pairs_that_do_not_fit_are_counted_and_left_out(tiny: TinyRun, tmp_path: Path) -> None:
    long = "umbrella " * 200
    pairs = [Pair(str(number), "a", None, None, f"funny {number}", long if number < 3 else "told") for number in range(12)]
    write_pairs(tmp_path / "pairs_train.parquet", pairs)
    trainee = seeded_trainee(tiny, tmp_path)
    chosen = choose_pairs(tiny.recipe(), trainee, tmp_path / "pairs_train.parquet", pairs, QUIET)
    assert chosen.as_dict()["left_out"] == {"caption_too_long": 3}
    assert [pair.pair_id for pair in chosen.pairs] == [str(number) for number in range(3, 12)]


def test_max_tokens_counts_the_whole_chat(tiny: TinyRun, tmp_path: Path) -> None:
    """Text and image tokens together: a limit at the longest chat of the table leaves nothing out, one below it something."""
    trainee = seeded_trainee(tiny, tmp_path)
    table = tiny.data / "pairs_train.parquet"
    rows = read_pairs(table)
    batch = Collator(trainee.encoder, rows, tiny.data).collate(range(48))
    longest = max(len(row) for group in batch.groups for row in group.rows)
    assert choose_pairs(tiny.recipe(data={"max_tokens": longest}), trainee, table, rows, QUIET).fitting.left_out == {}
    left_out = choose_pairs(tiny.recipe(data={"max_tokens": longest - 1}), trainee, table, rows, QUIET).fitting.left_out
    assert set(left_out) == {"longer than data.max_tokens"}


def test_too_few_pairs_for_one_step(tiny: TinyRun, tmp_path: Path) -> None:
    write_pairs(tmp_path / "pairs_train.parquet", [Pair(str(number), "a", None, None, f"funny {number}", "told") for number in range(7)])
    with pytest.raises(DataInvalid, match="7 pairs are fewer than the 8 of one step"):
        train(tiny.recipe(), tmp_path, tmp_path / "run", **silent())


def test_a_course_covers_an_epoch_once(tiny: TinyRun, tmp_path: Path) -> None:
    recipe = tiny.recipe()
    trainee = seeded_trainee(tiny, tmp_path)
    accelerator = make_accelerator(recipe, tmp_path, (), some_without_picture=False)
    chosen = {
        name: choose_pairs(recipe, trainee, tiny.data / name, read_pairs(tiny.data / name), QUIET)
        for name in ("pairs_train.parquet", "pairs_validation.parquet")
    }
    course = make_course(recipe, trainee, tiny.data, chosen, accelerator.num_processes)
    seen = [index for batch in course.plan.batches(0, 0, course.plan.steps_per_epoch) for index in batch]
    assert sorted(seen) == list(range(48))
    assert sorted(index for batch in course.validation_batches for index in batch) == list(range(10))
