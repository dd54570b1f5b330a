"""A base as the Hub ships it, a table of pairs with pictures, and a recipe: everything a training run needs, tiny."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from tests.tiny import CORPUS, picture, write_base
from training.demo.tokenizer import ImageSizes, save_processor, train_tokenizer
from training.pairs import Pair, write_pairs
from training.recipe import Recipe
from training.train import train

WORDS = ("penguin", "umbrella", "office", "iceberg", "octopus", "Friday", "caption", "nobody", "told", "funny")
SIZES = ((56, 56), (84, 56), (56, 112), (112, 84))
QUIET = Console(quiet=True)


@dataclass(frozen=True)
class TinyRun:
    """Where base and data of a run lie."""

    base: Path
    data: Path

    def recipe(self, **sections: dict[str, Any]) -> Recipe:
        """LoRA in float32; `sections` replace single values."""
        values: dict[str, dict[str, Any]] = {
            "model": {"base": str(self.base), "dtype": "float32"},
            "lora": {"r": 4, "alpha": 8.0},
            "data": {},
            "optimiser": {"learning_rate": 5e-3},
            "run": {"seed": 3, "batch_size": 4, "num_accumulated": 2, "save_every": 2, "validate_every": 4},
        }
        for name, changes in sections.items():
            values[name] = values.get(name, {}) | changes
        return Recipe.model_validate(values)

    def train(self, out: Path, *, resume: bool = False, **sections: dict[str, Any]) -> None:
        train(self.recipe(**sections), self.data, out, resume=resume, trackers=(), console=QUIET)


def write_tiny_run(root: Path, *, num_train: int = 48, num_validation: int = 10, num_images: int = 6) -> TinyRun:
    torch.manual_seed(1)
    base, data = root / "base", root / "data"
    tokenizer = train_tokenizer(CORPUS, 420)
    write_base(base, tokenizer)
    save_processor(tokenizer, ImageSizes(28 * 28 * 2, 28 * 28 * 64, 14, 2), base)
    (data / "images").mkdir(parents=True)
    for number in range(num_images):
        (data / image_name(number)).write_bytes(picture(*SIZES[number % len(SIZES)], seed=number))
    rng = random.Random(5)
    write_pairs(data / "pairs_train.parquet", make_pairs(num_train, num_images, rng))
    write_pairs(data / "pairs_validation.parquet", make_pairs(num_validation, num_images, rng))
    return TinyRun(base, data)


def make_pairs(count: int, num_images: int, rng: random.Random) -> list[Pair]:
    """The chosen caption always names the umbrella: something to learn."""
    return [
        Pair(
            pair_id=str(number),
            contest=f"contest {number % num_images}",
            image=image_name(number % num_images),
            prompt=None if number % 3 else "Look closely.",
            chosen=f"The {rng.choice(WORDS)} and the umbrella {rng.choice(WORDS)} {number}.",
            rejected=" ".join(rng.choices(WORDS, k=rng.randint(1, 6))) + ".",
            mean_gap=0.5,
        )
        for number in range(count)
    ]


def make_text_pairs(count: int, *, seed: str) -> list[Pair]:
    """The same captions without pictures, all to one prompt."""
    pairs = make_pairs(count, 4, random.Random(seed))
    return [replace(pair, image=None, prompt=None) for pair in pairs]


def image_name(number: int) -> str:
    return f"images/{number}.png"
