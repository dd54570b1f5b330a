"""What each step of the serving forward gains: the same groups through transformers, with prepacked layers, and through the engine.

Random weights in the true shapes; all steps in one process, by turns, medians. Every step is held against the first one's scores.
"""

from __future__ import annotations

import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer

from app.artifacts import open_artifact
from app.bench.workload import Workload
from app.caches import ByteBoundedCache
from app.contracts import EncodedGroup, Ids
from app.encoding import load_encoder
from app.engine import Engine
from app.geometry import GEOMETRIES, write_artifact
from app.golden import GOLDEN_LIMITS
from app.hardware import describe_hardware
from app.machine import num_processors
from app.metrics import Metrics
from app.model import load_model
from app.reuse import Caches, KeptPrefix, ReusingScorer
from app.scoring import score_shared

Score = Callable[[EncodedGroup], Sequence[float]]
_CACHE_BYTES = 1 << 30
_MAX_DIFFERENCE = {"float32": 1e-3, "bfloat16": 0.5}  # of two scores, as a share of the spread within a group


@dataclass
class Step:
    """One way, and what it took; `warm` only where a prefix can be kept."""

    name: str
    score: Score
    keeps: bool
    cold: list[float] = field(default_factory=list)
    warm: list[float] = field(default_factory=list)
    cold_difference: float = 0.0
    warm_difference: float | None = None  # of a step that keeps a prefix; None: not asked
    share_of_spread: float = 0.0  # the largest difference of both, of the standard deviation within its group

    def compare(self, values: Sequence[float], expected: Sequence[float], *, warm: bool) -> None:
        """What is no number is infinitely far away."""
        largest = max(abs(one - other) for one, other in zip(values, expected, strict=True))
        largest = largest if all(map(math.isfinite, values)) else math.inf
        if warm:
            self.warm_difference = max(self.warm_difference or 0.0, largest)
        else:
            self.cold_difference = max(self.cold_difference, largest)
        self.share_of_spread = max(self.share_of_spread, largest / statistics.stdev(expected))


def main(
    layers: Annotated[int, typer.Option(help="Text layers of Qwen2.5-VL-3B's 36.", min=1)] = 8,
    vision_layers: Annotated[int, typer.Option(help="Vision layers of its 32.", min=1)] = 8,
    dtype: Annotated[Literal["float32", "bfloat16"], typer.Option(help="Number format.")] = "bfloat16",
    captions: Annotated[int, typer.Option(help="Captions in a group.", min=2)] = 8,
    rounds: Annotated[int, typer.Option(help="Turns of every step.", min=1)] = 3,
) -> None:
    """Measure on this machine."""
    torch.set_num_threads(num_processors())
    with tempfile.TemporaryDirectory() as folder:
        root = write_artifact(GEOMETRIES["qwen2.5-vl-3b"].shortened(layers, vision_layers), Path(folder) / "artifact")
        artifact = open_artifact(str(root))
        encoder = load_encoder(artifact)
        untouched, prepacked = (load_model(artifact, device="cpu", dtype=dtype).model for _ in range(2))
        engine = Engine(prepacked)
        steps = [
            Step("one packed forward through transformers", lambda group: score_shared(untouched, [group])[0].values, keeps=False),
            Step("the same, linear layers prepacked", lambda group: score_shared(prepacked, [group])[0].values, keeps=False),
            Step("own forward: fused steps, merged attention, last layer reduced", _reusing(engine, None), keeps=True),
            Step("the same, the beginning of all groups kept", _reusing(engine, encoder.lead_ids), keeps=True),
        ]
        measure(steps, Workload(encoder, GOLDEN_LIMITS), captions, rounds)
    print_table(steps, f"{layers} text and {vision_layers} vision layers, {dtype}, groups of {captions}, {rounds} rounds, medians")
    if wrong := [step for step in steps if step.share_of_spread > _MAX_DIFFERENCE[dtype]]:
        found = ", ".join(f"{step.name}: {step.share_of_spread:.2g}" for step in wrong)
        sys.exit(f"steps: not the first step's scores, by shares of the spread over {_MAX_DIFFERENCE[dtype]:g}: {found}")


def _reusing(engine: Engine, lead_ids: Ids | None) -> Score:
    metrics = Metrics()
    caches: Caches[torch.Tensor, torch.Tensor] = Caches(
        ByteBoundedCache[torch.Tensor]("features", _CACHE_BYTES, lambda features: features.nbytes, metrics),
        ByteBoundedCache[KeptPrefix[torch.Tensor]]("prefixes", _CACHE_BYTES, lambda kept: kept.num_bytes, metrics),
        ByteBoundedCache[float]("scores", 0, lambda _: 1, metrics),
    )
    scorer = ReusingScorer(engine, caches, fingerprint="steps", metrics=metrics, score_tolerance=0.1, lead_ids=lead_ids)
    return lambda group: scorer.score(scorer.prepare([group]))[0].values


def measure(steps: Sequence[Step], workload: Workload, num_captions: int, rounds: int) -> None:
    """One round more than asked for; the first one warms up and is forgotten. The first step's scores are the measure of all."""
    for number in range(rounds + 1):
        cold = workload.encode(workload.request(num_captions))
        if cold.image is None:
            raise ValueError("the workload has pictures")
        warm = workload.encode_for(cold.image, workload.captions(num_captions))
        expected, expected_warm = (steps[0].score(group) for group in (cold, warm))  # not timed
        for step in steps:
            print(f"round {number} of {rounds}: {step.name}", file=sys.stderr)
            cold_s, values = timed(step.score, cold)
            step.compare(values, expected, warm=False)
            if number:
                step.cold.append(cold_s)
            if step.keeps:
                warm_s, values = timed(step.score, warm)
                step.compare(values, expected_warm, warm=True)
                step.warm += [warm_s] if number else []


def timed(score: Score, group: EncodedGroup) -> tuple[float, Sequence[float]]:
    began = time.perf_counter()
    values = score(group)
    return time.perf_counter() - began, values


def print_table(steps: Sequence[Step], title: str) -> None:
    print(title)
    print(f"{'step':66s} {'cold s':>8s} {'gain':>6s} {'warm s':>8s} {'cold differs':>13s} {'warm differs':>13s}")
    before = statistics.median(steps[0].cold)
    for step in steps:
        cold = statistics.median(step.cold)
        warm = f"{statistics.median(step.warm):8.3f}" if step.warm else f"{'':8s}"
        differs = "" if step.warm_difference is None else f"{step.warm_difference:13.1e}"
        print(f"{step.name:66s} {cold:8.3f} {before / cold:6.2f} {warm} {step.cold_difference:13.1e} {differs}".rstrip())
        before = cold
    print(describe_hardware(torch.device("cpu")))


if __name__ == "__main__":
    typer.run(main)
