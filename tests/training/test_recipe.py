"""Recipes: the shipped ones load and say what their sources say; every wrong value is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from training.recipe import RECIPES, RecipeInvalid, load_recipe

SHIPPED = sorted(path.stem for path in RECIPES.glob("*.toml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_load(name: str) -> None:
    assert load_recipe(name) == load_recipe(str(RECIPES / f"{name}.toml"))


def test_humor_20k_is_the_published_run() -> None:
    recipe = load_recipe("humor_20k")
    assert recipe.lora is not None
    assert (recipe.lora.r, recipe.lora.alpha, recipe.lora.targets) == (32, 32, "all-linear")
    optimiser = recipe.optimiser
    assert (optimiser.learning_rate, optimiser.schedule, optimiser.num_warmup_steps) == (2e-4, "constant", 0)
    assert (optimiser.weight_decay, optimiser.max_grad_norm) == (0, 1)
    assert (recipe.run.batch_size, recipe.run.num_accumulated, recipe.run.num_epochs) == (4, 8, 1)
    assert (recipe.run.mixed_precision, recipe.model.dtype, recipe.model.image.long_edge) == ("bf16", "bfloat16", 448)
    assert recipe.data.max_pairs == 20_000
    assert 20_000 // (4 * 8) == 625  # the steps its card names


def test_hh_rlhf_7b_is_the_published_run() -> None:
    recipe = load_recipe("hh_rlhf_7b")
    assert recipe.lora is not None
    assert (recipe.lora.r, recipe.lora.alpha) == (32, 64)
    optimiser = recipe.optimiser
    assert (optimiser.learning_rate, optimiser.schedule, optimiser.num_warmup_steps) == (1e-5, "cosine", 100)
    assert (recipe.run.batch_size, recipe.run.num_accumulated, recipe.data.max_tokens) == (4, 4, 512)
    assert (recipe.model.caption_role, recipe.model.template) == ("raw", "{prompt}{caption}")


def test_changes_are_toml_values() -> None:
    recipe = load_recipe("humor_20k", ["run.seed=7", 'model.base = "./base"', "lora.dropout=0.1", "loss.centring=0.01"])
    assert (recipe.run.seed, recipe.model.base, recipe.loss.centring) == (7, "./base", 0.01)
    assert recipe.lora is not None
    assert recipe.lora.dropout == 0.1


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        (["run.sed=1"], "run.sed"),
        (["speed.seed=1"], "speed"),
        (["run.seed=-1"], "run.seed"),
        (['run.seed="1"'], "run.seed"),
        (["run.seed=true"], "run.seed"),
        (["optimiser.learning_rate=0"], "optimiser.learning_rate"),
        (["optimiser.learning_rate=nan"], "optimiser.learning_rate"),
        (["optimiser.betas=[0.9, 1.0]"], "optimiser.betas"),
        (["optimiser.final_share=0.1"], "final_share"),
        (["run.seed=4294967296"], "run.seed"),
        (['model.template="{prompt}"'], "model.template"),
        (['optimiser.schedule="step"'], "optimiser.schedule"),
        (["lora.dropout=1.0"], "lora.dropout"),
        (["data.pairs_per_image=3"], "multiple of data.pairs_per_image"),
        (["model.image.long_edge=8"], "model.image.long_edge"),
        (["run.batch_size=4.5"], "run.batch_size"),
        (["run.seed"], "section.key=value"),
        (["run.seed=x"], "no TOML value"),
        (["run.seed.deep=1"], "no section"),
        (["=1"], "section.key=value"),
        (["run.seed=-1", "run.batch_size=0"], "run.batch_size"),
    ],
)
def test_a_wrong_value_is_named_in_one_line(changes: list[str], named: str) -> None:
    with pytest.raises(RecipeInvalid) as refused:
        load_recipe("humor_20k", changes)
    assert named in str(refused.value)
    assert "\n" not in str(refused.value)


def test_training_every_weight_needs_float32(tmp_path: Path) -> None:
    text = (RECIPES / "humor_20k.toml").read_text()
    without = tmp_path / "full.toml"
    without.write_text(text.replace("[lora]", "[other]"))
    with pytest.raises(RecipeInvalid, match="other"):
        load_recipe(str(without))
    start, end = text.index("[lora]"), text.index("[data]")
    without.write_text(text[:start] + text[end:])
    with pytest.raises(RecipeInvalid, match="float32"):
        load_recipe(str(without))
    assert load_recipe(str(without), ['model.dtype="float32"']).lora is None


def test_files_that_are_no_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeInvalid, match="humor_20k"):
        load_recipe("humour")
    broken = tmp_path / "broken.toml"
    broken.write_text("[run\n")
    with pytest.raises(RecipeInvalid, match="broken"):
        load_recipe(str(broken))
