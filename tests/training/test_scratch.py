"""A text-only base from nothing, and a preference run on top of it that the serving path loads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.training.tiny_run import QUIET, WORDS, make_text_pairs
from training.pairs import write_pairs
from training.recipe import Recipe, RecipeInvalid
from training.scratch import BASES, TextBase, read_base, write_base
from training.train import train

TINY = TextBase(
    seed=1, vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
)


@pytest.mark.parametrize("path", sorted(BASES.glob("*.toml")), ids=lambda path: path.stem)
def test_shipped_shapes_are_valid(path: Path) -> None:
    assert read_base(path).hidden_size % read_base(path).num_attention_heads == 0


def test_a_base_as_the_hub_ships_one(tmp_path: Path) -> None:
    write_base(TINY, [" ".join(WORDS)] * 20, tmp_path / "base")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config["model_type"] == "qwen2"
    assert (config["hidden_size"], config["vocab_size"]) == (32, len(AutoTokenizer.from_pretrained(tmp_path / "base")))
    assert (tmp_path / "base" / "model.safetensors").exists()
    with pytest.raises(RecipeInvalid, match="exists already"):
        write_base(TINY, list(WORDS), tmp_path / "base")


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    captions = [" ".join(WORDS)] * 20
    for name in ("one", "two"):
        write_base(TINY, captions, tmp_path / name)
    one, two = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("line", ["hidden_size = 4", "speed = 1", 'seed = "1"', "["])
def test_wrong_shapes_are_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "base.toml"
    path.write_text((BASES / "newyorker_text.toml").read_text().replace("seed = 7", "") + line + "\n")
    with pytest.raises(RecipeInvalid, match=r"base\.toml"):
        read_base(path)


def test_every_weight_learns_on_captions_alone(tmp_path: Path) -> None:
    """The whole decoder and the head, no picture anywhere: the umbrella is found."""
    write_base(TINY, [" ".join(WORDS)] * 20, tmp_path / "base")
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        write_pairs(tmp_path / "data" / f"pairs_{split}.parquet", make_text_pairs(64, seed=split))
    recipe = Recipe.model_validate(
        {
            "model": {"base": str(tmp_path / "base"), "dtype": "float32", "caption_role": "raw", "template": "{prompt}{caption}<|im_end|>"},
            "data": {"pairs_per_image": 8},
            "optimiser": {"learning_rate": 5e-3},
            "run": {"seed": 1, "batch_size": 16, "max_steps": 12, "validate_every": 12},
        }
    )
    train(recipe, tmp_path / "data", tmp_path / "run", resume=False, trackers=(), console=QUIET)
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["validation_accuracy"] > 0.9
