"""`python -m training.demo.clustering WORK`: what it costs to train on several pairs of a picture in one forward, and what it saves.

Every run trains on exactly the same pairs for the same number of steps; only which of them meet in a batch differs.
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from app.errors import PunchlineError
from training.batches import plan_epoch
from training.collation import Collator
from training.demo.build import DATA_NAME
from training.demo.seeds import stream
from training.pairs import DataInvalid, Pair, read_pairs, write_pairs
from training.preference import pack_pairs
from training.recipe import Recipe, load_recipe
from training.tracking import METRICS_NAME
from training.train import TRAIN_TABLE, VALIDATION_TABLE, key_of, train
from training.trainee import OWN_BASE, make_trainee

SIZES = (1, 2, 4, 8)  # pairs of a picture together
_NUM_COUNTED = 20  # batches over which the tokens of a pair are counted
_NUM_WARMUP = 5  # steps that the speed leaves out


@dataclass(frozen=True, slots=True)
class Trial:
    """One run: accuracy on the whole validation table, and the pairs a second of its median step."""

    accuracy: float
    pairs_per_s: float


@dataclass(frozen=True, slots=True)
class Setting:
    """All runs with so many pairs of a picture together."""

    pairs_per_image: int
    tokens_per_pair: float
    trials: list[Trial]


def main(
    work: Annotated[Path, typer.Argument(help="The folder that `python -m training.demo --keep` left.", exists=True, file_okay=False)],
    steps: Annotated[int, typer.Option(help="Steps of each run.", min=10)] = 120,
    seeds: Annotated[int, typer.Option(help="Runs of each setting.", min=1)] = 2,
    threads: Annotated[int, typer.Option(help="Threads torch computes with.", min=1)] = 2,
) -> None:
    """Train the demo's preferences with 1, 2, 4 and 8 pairs of a picture together, and compare."""
    torch.set_num_threads(threads)
    console = Console(stderr=True)
    try:
        with tempfile.TemporaryDirectory() as folder:
            data = Path(folder) / DATA_NAME
            num_pairs = steps * load_recipe("demo").run.batch_size
            copy_pairs(work / DATA_NAME, data, num_pairs, pairs_per_picture=max(SIZES))
            settings = [measure(work / OWN_BASE, data, size, steps, range(seeds), console) for size in SIZES]
    except PunchlineError as error:
        console.print(Text.assemble(("refused:", "red"), f" {error}"), soft_wrap=True, highlight=False)
        raise typer.Exit(getattr(error, "exit_code", 3)) from None
    Console().print(as_table(settings, num_pairs))


def copy_pairs(source: Path, target: Path, num_pairs: int, *, pairs_per_picture: int) -> None:
    """A data folder of as many training pairs, all of the same number of pictures with `pairs_per_picture` each. Raises DataInvalid."""
    by_picture: dict[tuple[str, str, str], list[Pair]] = {}
    for pair in read_pairs(source / TRAIN_TABLE):
        by_picture.setdefault(key_of(pair), []).append(pair)
    full = [pairs[:pairs_per_picture] for pairs in by_picture.values() if len(pairs) >= pairs_per_picture]
    wanted = num_pairs // pairs_per_picture
    if len(full) < wanted:
        raise DataInvalid(
            f"{source / TRAIN_TABLE}: {len(full)} pictures with {pairs_per_picture} pairs, and {num_pairs} pairs need {wanted}"
        )
    chosen = [pair for pairs in stream("clustering", num_pairs).sample(full, wanted) for pair in pairs]
    held_out = read_pairs(source / VALIDATION_TABLE)
    for name in {pair.image for pair in [*chosen, *held_out] if pair.image is not None}:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, target / name)
    write_pairs(target / TRAIN_TABLE, chosen)
    write_pairs(target / VALIDATION_TABLE, held_out)


def measure(base: Path, data: Path, pairs_per_image: int, steps: int, seeds: Sequence[int], console: Console) -> Setting:
    """Every run of one setting."""
    trials = []
    for seed in seeds:
        console.print(f"{pairs_per_image} pairs of a picture together, seed {seed}", highlight=False)
        with tempfile.TemporaryDirectory() as run:
            recipe = recipe_of(base, pairs_per_image, steps, seed)
            train(recipe, data, Path(run), resume=False, trackers=(), console=console)
            trials.append(read_trial(Path(run) / METRICS_NAME))
    return Setting(pairs_per_image, count_tokens(recipe_of(base, pairs_per_image, steps, 0), data), trials)


def recipe_of(base: Path, pairs_per_image: int, steps: int, seed: int) -> Recipe:
    """The demo's recipe with one change that matters."""
    own = {"model.base": json.dumps(str(base.resolve())), "data.pairs_per_image": pairs_per_image, "run.seed": seed}
    length = {"run.max_steps": steps, "run.save_every": steps, "run.validate_every": steps, "data.max_validation_pairs": 1_000_000}
    return load_recipe("demo", [f"{name}={value}" for name, value in (own | length).items()])


def read_trial(metrics: Path) -> Trial:
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    accuracies = [line["validation_accuracy"] for line in lines if "validation_accuracy" in line]
    speeds = [line["pairs_per_s"] for line in lines if "pairs_per_s" in line]
    return Trial(accuracies[-1], statistics.median(speeds[_NUM_WARMUP:]))


def count_tokens(recipe: Recipe, data: Path) -> float:
    """Tokens that go through the model for one pair, over the first batches of an epoch."""
    pairs = read_pairs(data / TRAIN_TABLE)
    size = recipe.run.batch_size
    keys = [key_of(pair) for pair in pairs]
    batches = plan_epoch(keys, pairs_per_image=recipe.data.pairs_per_image, batch_size=size, seed="tokens")[:_NUM_COUNTED]
    with tempfile.TemporaryDirectory() as folder:
        trainee = make_trainee(recipe, Path(folder))
    collator = Collator(trainee.encoder, pairs, data)
    packed = [pack_pairs(trainee.model, collator.collate(batch).groups, torch.device("cpu")).num_tokens for batch in batches]
    return sum(packed) / (size * len(batches))


def as_table(settings: Sequence[Setting], num_pairs: int) -> Table:
    table = Table(title=f"the same {num_pairs:,} pairs in every run; accuracy on held-out ideas", title_justify="left")
    for name in ("pairs of a picture together", "tokens a pair", "pairs a second", "accuracy", "lowest .. highest"):
        table.add_column(name, justify="right")
    for setting in settings:
        accuracies = [trial.accuracy for trial in setting.trials]
        table.add_row(
            str(setting.pairs_per_image),
            f"{setting.tokens_per_pair:.1f}",
            f"{statistics.mean(trial.pairs_per_s for trial in setting.trials):.1f}",
            f"{statistics.mean(accuracies):.3f}",
            f"{min(accuracies):.3f} .. {max(accuracies):.3f}",
        )
    return table


if __name__ == "__main__":
    typer.run(main)
