"""One run of the bench: start the server, load the model a second time as it is, measure everything, in one process."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from app.artifacts import open_artifact
from app.bases import read_base_config, weights_bytes
from app.bench.conversations import AS_USUAL, Conversations, Wanted
from app.bench.flops import Shapes
from app.bench.limit import measure_rate, rate_now
from app.bench.load import measure_load
from app.bench.loopback import Client, Loopback, serving
from app.bench.overhead import Overhead, measure_overhead
from app.bench.report import Report, Subject, Tokens, tokens_of
from app.bench.ways import Contestants, measure_ways
from app.bench.workload import Source, Workload
from app.contracts import Scorer
from app.encoding import load_encoder
from app.errors import SettingsInvalid
from app.hardware import find_hardware, free_bytes
from app.images import image_limits
from app.main import Runtime
from app.model import RewardModel, load_model
from app.settings import Settings

MIN_FREE = 1.1  # of the weights, for a second copy of them
_SMALLEST = "demo"  # the bundled model, whose forward is short
_NO_BASELINE = "no memory for a second copy of the model: neither plain way was measured, no ratio can be told"


@dataclass(frozen=True, slots=True)
class Plan:
    """What to measure."""

    name: str  # of the model, in the table
    settings: Settings
    sizes: tuple[int, ...]
    rounds: int
    levels: tuple[int, ...]
    num_pairs: int = 500  # of requests and direct calls that the overhead is the difference of
    wanted: Wanted = AS_USUAL  # of a text-only model


def run_ways(plan: Plan, report: Callable[[str], None], announce: Callable[[str], None] = lambda _: None) -> Report:
    """Everything but the noise; `announce` hears how long it will take. Raises StartRefused, ApiError."""
    report("starting the server")
    with serving(plan.settings) as loopback:
        runtime = loopback.runtime
        device = torch.device(runtime.first.loaded.device)
        shapes = Shapes.of(read_base_config(runtime.first.artifact.base_path))
        report("measuring the machine's matrix rate")
        dtype = getattr(torch, runtime.first.loaded.dtype)
        rate = measure_rate(shapes, dtype, device)
        report("loading the model a second time, as it is")
        baseline, load_s = load_baseline(runtime)
        workload = make_source(runtime, plan.wanted)
        tokens = count_tokens(workload)
        with Client(loopback) as client:
            who = Contestants(baseline, scorer_of(runtime), client, workload, shapes, device, rate_now(shapes, dtype, device))
            measured = measure_ways(who, plan.sizes, plan.rounds, report, announce)
        report("measuring the machine's matrix rate again")
        rate |= measure_rate(shapes, dtype, device)
        levels = measure_load(loopback, workload, plan.levels, report)
        report("measuring what HTTP, queue and encoding add")
        return Report(
            hardware=find_hardware(device),
            subject=Subject(
                plan.name,
                shapes.layers,
                shapes.vision_layers,
                shapes.hidden,
                runtime.first.loaded.dtype,
                runtime.first.loaded.fingerprint,
                tokens,
                plan.rounds,
            ),
            rate=rate,
            startup=loopback.startup,
            load_s=load_s,
            measured=measured,
            levels=tuple(levels),
            overhead=_overhead(plan, loopback),
            notes=(*workload.notes, *(() if baseline else (_NO_BASELINE,))),
        )


def load_baseline(runtime: Runtime) -> tuple[RewardModel | None, float | None]:
    """The same artifact as transformers loads it, and the seconds that took, hashes included; None where it does not fit."""
    device = torch.device(runtime.first.loaded.device)
    free, needed = free_bytes(device), weights_bytes(runtime.first.artifact.base_path, getattr(torch, runtime.first.loaded.dtype))
    if free is not None and free < MIN_FREE * needed:
        return None, None
    settings, began = runtime.settings, time.perf_counter()
    artifact = open_artifact(settings.model, base_model=settings.base_model, offline=settings.offline)
    loaded = load_model(artifact, device=runtime.first.loaded.device, dtype=runtime.first.loaded.dtype, lora=settings.lora)
    return loaded.model, time.perf_counter() - began


def make_source(runtime: Runtime, wanted: Wanted) -> Source:
    """By the artifact's own encoder. Raises SettingsInvalid for lengths that belong to text-only models, or do not fit the artifact."""
    encoder = load_encoder(runtime.first.artifact)
    if not encoder.takes_images:
        return Conversations(encoder, wanted)
    if wanted != AS_USUAL:
        raise SettingsInvalid(f"{runtime.first.artifact.root}: --conversation-tokens and --response-tokens belong to text-only models")
    return Workload(encoder, image_limits(runtime.settings))


def scorer_of(runtime: Runtime) -> Scorer:
    """The server's own, to be called while the server is idle."""
    return runtime.first.scorer


def count_tokens(workload: Source) -> Tokens:
    group = workload.encode(workload.request(8))
    return tokens_of(group.num_prefix, group.image.num_tokens if group.image else 0, [len(row) for row in group.rows])


def _overhead(plan: Plan, loopback: Loopback) -> Overhead:
    if plan.settings.model == _SMALLEST:
        return _overhead_of(loopback, plan.num_pairs)
    with serving(plan.settings.model_copy(update={"model": _SMALLEST, "base_model": None})) as small:
        return _overhead_of(small, plan.num_pairs)


def _overhead_of(loopback: Loopback, num_pairs: int) -> Overhead:
    runtime = loopback.runtime
    workload = Workload(load_encoder(runtime.first.artifact), image_limits(runtime.settings), seed=1)
    return measure_overhead(loopback, scorer_of(runtime), workload, num_pairs)
