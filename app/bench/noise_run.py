"""One run of `punchline bench --noise`: the float32 scores first, then both modes of the scorer in turn, over one loaded model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from app.artifacts import Artifact, open_artifact
from app.bases import read_base_config, weights_bytes
from app.bench.flops import Shapes
from app.bench.loopback import serving
from app.bench.noise import NoiseReport, Subject, Truth, make_groups, measure_noise, subjects_of
from app.bench.report import counted, shape_of
from app.bench.run import MIN_FREE
from app.bench.workload import Workload
from app.contracts import Scorer
from app.encoding import load_encoder
from app.errors import SettingsInvalid
from app.hardware import Hardware, find_hardware, free_bytes
from app.images import image_limits
from app.main import Runtime
from app.metrics import Metrics
from app.model import load_model, resolve_device, resolve_dtype
from app.served import build_scorer
from app.settings import Settings

_NO_SCORES = {"score_cache_bytes": 0}  # a kept score would be told again in every company


@dataclass(frozen=True, slots=True)
class NoiseRun:
    """What was found, and on what."""

    report: NoiseReport
    hardware: Hardware
    heading: str

    def as_dict(self, name: str) -> dict[str, Any]:
        """Everything the table shows."""
        modes = {"usual": self.report.usual.as_dict(), "deterministic": self.report.deterministic.as_dict()}
        found = {"model": name, "subject": self.heading, "hardware": self.hardware.as_dict(), "float32": asdict(self.report.truth)}
        price = asdict(self.report.price)
        return found | {"noise": modes, "price_of_determinism": price, "deterministic_holds": self.report.holds}


def run_noise(settings: Settings, num_groups: int, report: Callable[[str], None]) -> NoiseRun:
    """Never more than one copy of the model at once. Raises StartRefused, ApiError."""
    artifact = open_artifact(settings.model, base_model=settings.base_model, offline=settings.offline)
    device = torch.device(resolve_device(settings.device))
    shapes = Shapes.of(read_base_config(artifact.base_path))
    _check_memory(artifact, settings, device)
    subjects, truth = _float32_subjects(artifact, settings, num_groups, report)
    report("starting the server")
    with serving(settings.model_copy(update={"deterministic": False, **_NO_SCORES})) as loopback:
        runtime = loopback.runtime
        found = measure_noise(runtime.first.scorer, deterministic_scorer(runtime), subjects, truth, device, report)
        shape = shape_of(shapes.layers, shapes.hidden, shapes.vision_layers)
        heading = f"{shape}, {runtime.first.loaded.dtype} against float32, {counted(num_groups, 'group')} of 16 captions"
        return NoiseRun(found, find_hardware(device), heading)


def deterministic_scorer(runtime: Runtime) -> Scorer:
    """As the server would have it with PUNCHLINE_DETERMINISTIC, over the model that is loaded already."""
    settings = runtime.settings.model_copy(update={"deterministic": True})
    return build_scorer(runtime.first.parts, runtime.first.engine, settings, runtime.budgets, Metrics())


def _float32_subjects(
    artifact: Artifact, settings: Settings, num_groups: int, report: Callable[[str], None]
) -> tuple[list[Subject], Truth]:
    """The model is gone when this returns."""
    report("loading the model in float32")
    encoder = load_encoder(artifact)
    if not encoder.takes_images:
        raise SettingsInvalid(f"{artifact.root}: --noise measures captions of images, this model takes none")
    groups = make_groups(Workload(encoder, image_limits(settings)), num_groups)
    loaded = load_model(artifact, device=settings.device, dtype="float32", lora=settings.lora)
    return subjects_of(loaded.model, groups, report)


def _check_memory(artifact: Artifact, settings: Settings, device: torch.device) -> None:
    """Before minutes of work. Raises SettingsInvalid."""
    number = resolve_dtype(settings.dtype, artifact.config.dtype, device)
    needed = max(weights_bytes(artifact.base_path, torch.float32), weights_bytes(artifact.base_path, getattr(torch, number)))
    free = free_bytes(device)
    if free is not None and free < MIN_FREE * needed:
        sizes = f"{MIN_FREE * needed / 2**30:.1f} GiB, free are {free / 2**30:.1f} GiB"
        raise SettingsInvalid(f"--noise loads the model in float32, then in {number}: {sizes}")
