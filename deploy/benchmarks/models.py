"""What two models on one base cost in a batch: each its own forward, as served, against one forward over all their groups.

The one forward has one adapter, so that a mixed one could only gain less. On the demo's shapes, in one process, by turns, medians of CPU
seconds. Each model's scores are held against the same model's alone.
"""

from __future__ import annotations

import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors.torch import load_file, save_file

from app.artifacts import ADAPTER_NAME, CONFIG_NAME, DEMO_PATH, GOLDEN_NAME, RewardModelConfig, open_artifact, write_config
from app.bench.workload import Workload
from app.budgets import Budgets
from app.contracts import EncodedGroup, Scores
from app.engine import Engine
from app.golden import GOLDEN_LIMITS
from app.hardware import describe_hardware
from app.lanes import LanesScorer
from app.layers import prepack
from app.layouts import ADAPTER_WEIGHTS_NAME
from app.main import load_parts
from app.metrics import Metrics
from app.served import build_scorer
from app.settings import Settings

NAMES = ("first", "second")
_MAX_DIFFERENCE = 1e-3  # of a model's score alone and in company, float32
_BUDGETS = Budgets(max_batch_tokens=65536, batch_bytes=0, prefix_cache_bytes=1 << 30, feature_cache_bytes=1 << 30)


@dataclass
class Row:
    """One sort of batch: a group of each model."""

    num_captions: int
    warm: bool
    apart: list[float] = field(default_factory=list)
    together: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        return statistics.median(self.apart) / statistics.median(self.together)


def main(
    sizes: Annotated[str, typer.Option(help="Captions in a group, with commas.")] = "1,8,16",
    rounds: Annotated[int, typer.Option(help="Turns of both ways.", min=1)] = 15,
) -> None:
    """Measure on this machine."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        places = {NAMES[0]: DEMO_PATH, NAMES[1]: write_sibling(Path(folder) / NAMES[1])}
        settings = Settings(
            model=f"{NAMES[0]}={places[NAMES[0]]}", models=f"{NAMES[1]}={places[NAMES[1]]}", score_cache_bytes=0, offline=True
        )
        parts = load_parts(settings, {name: open_artifact(str(place), offline=True) for name, place in places.items()})
        prepack(*(each.loaded.model.backbone for each in parts))
        scorers = {each.name: build_scorer(each, Engine(each.loaded.model), settings, _BUDGETS, Metrics(), len(parts)) for each in parts}
        rows, worst = measure(scorers, Workload(parts[0].encoder, GOLDEN_LIMITS), [int(size) for size in sizes.split(",")], rounds)
    print_table(rows, worst, rounds)
    if not worst <= _MAX_DIFFERENCE:
        sys.exit(f"models: a score in company is {worst:.1e} beside the same model's alone")


def write_sibling(root: Path) -> Path:
    """The demo with another adapter on the same base."""
    shutil.copytree(DEMO_PATH, root)
    (root / GOLDEN_NAME).unlink()
    name = root / ADAPTER_NAME / ADAPTER_WEIGHTS_NAME
    save_file({key: tensor.flip(0).contiguous() for key, tensor in load_file(name).items()}, name, metadata={"format": "pt"})
    config = RewardModelConfig.model_validate_json((root / CONFIG_NAME).read_bytes())
    write_config(root, config.model_copy(update={"files": {}}))
    return root


def measure(scorers: dict[str, Any], workload: Workload, sizes: Sequence[int], rounds: int) -> tuple[list[Row], float]:
    """Every sort of batch in every round, one round more than asked for: the first one warms up and is forgotten."""
    lanes, worst = LanesScorer(scorers), 0.0
    rows = [Row(size, warm) for size in sizes for warm in (False, True)]
    for number in range(rounds + 1):
        for cold, warm in zip(rows[::2], rows[1::2], strict=True):
            for way in ("apart", "together"):
                known = [workload.request(cold.num_captions) for _ in NAMES]
                for row in (cold, warm):
                    asked = known if row is cold else [workload.request(row.num_captions, each) for each in known]
                    groups = [replace(workload.encode(each), model=name) for each, name in zip(asked, NAMES, strict=True)]
                    scorer = lanes if way == "apart" else scorers[NAMES[0]]
                    seconds, scores = timed(lambda scorer=scorer, groups=groups: scorer.score(scorer.prepare(groups)))  # type: ignore[misc]
                    if number:
                        getattr(row, way).append(seconds)
                    if way == "apart":
                        worst = max(worst, difference(scorers, groups, scores))
    return rows, worst


def difference(scorers: dict[str, Any], groups: Sequence[EncodedGroup], found: Sequence[Scores]) -> float:
    """The largest between scores in company and the same model's alone, computed anew. What is no number is infinitely far away."""
    worst = 0.0
    for group, scores in zip(groups, found, strict=True):
        own = scorers[group.model]
        (alone,) = own.score(own.prepare([replace(group, fresh=True)]))
        apart = [abs(one - other) for one, other in zip(scores.values, alone.values, strict=True)]
        worst = max([worst, *(each if math.isfinite(each) else math.inf for each in apart)])
    return worst


def timed(work: Callable[[], list[Scores]]) -> tuple[float, list[Scores]]:
    began = time.process_time()
    found = work()
    return time.process_time() - began, found


def print_table(rows: Sequence[Row], worst: float, rounds: int) -> None:
    print(f"two models on the demo's base, one group of each, float32, one thread, medians of {rounds} rounds, CPU time")
    print(f"{'captions':>8s}  {'':4s}  {'a forward each ms':>18s}  {'one forward ms':>15s}  {'ratio':>6s}")
    for row in rows:
        apart, together = (1000 * statistics.median(each) for each in (row.apart, row.together))
        print(f"{row.num_captions:8d}  {'warm' if row.warm else 'cold':4s}  {apart:18.1f}  {together:15.1f}  {row.ratio:6.2f}")
    print(f"largest difference to the same model alone {worst:.1e}")
    print(describe_hardware(torch.device("cpu")))


if __name__ == "__main__":
    typer.run(main)
