"""One run of `punchline bench --noise`: the float32 scores first, then both modes of the server's scorer beside each other."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from app.artifacts import Artifact, open_artifact
from app.bench.flops import Shapes
from app.bench.loopback import serving
from app.bench.memory import free_bytes, weights_bytes
from app.bench.noise import NoiseReport, Subject, make_groups, measure_noise, measure_price, subjects_of
from app.bench.run import MIN_FREE, scorer_of
from app.bench.workload import Workload
from app.encoding import load_encoder
from app.errors import SettingsInvalid
from app.hardware import Hardware, find_hardware
from app.main import image_limits
from app.model import load_model, read_base_config, resolve_device, resolve_dtype
from app.settings import Settings


@dataclass(frozen=True, slots=True)
class NoiseRun:
    """What was found, and on what."""

    report: NoiseReport
    hardware: Hardware
    heading: str

    def as_dict(self, name: str) -> dict[str, Any]:
        """Everything the table shows."""
        price = {"cold": self.report.price.cold, "warm": self.report.price.warm}
        modes = {"usual": self.report.usual.as_dict(), "deterministic": self.report.deterministic.as_dict()}
        found = {"model": name, "subject": self.heading, "hardware": self.hardware.as_dict()}
        return found | {"noise": modes, "price_of_determinism": price, "deterministic_holds": self.report.holds}


def run_noise(settings: Settings, num_groups: int, report: Callable[[str], None]) -> NoiseRun:
    """Never more than two copies of the model at once. Raises StartRefused, ApiError."""
    artifact = open_artifact(settings.model, base_model=settings.base_model, offline=settings.offline)
    device = torch.device(resolve_device(settings.device))
    _check_memory(artifact, settings, device)
    subjects = _float32_subjects(artifact, settings, num_groups, report)
    report("starting two servers, one of them deterministic")
    usual_settings, fixed_settings = (settings.model_copy(update={"deterministic": fixed}) for fixed in (False, True))
    with serving(usual_settings) as usual, serving(fixed_settings) as fixed:
        scorers = scorer_of(usual.runtime), scorer_of(fixed.runtime)
        moving, still = (measure_noise(scorer, subjects, report) for scorer in scorers)
        report("measuring the price of determinism")
        price = measure_price(*scorers, subjects, device)
        shapes = Shapes.of(read_base_config(artifact.base_path))
        shape = f"{shapes.layers} text layers of {shapes.hidden}, {shapes.vision_layers} vision layers"
        heading = f"{shape}, {usual.runtime.loaded.dtype} against float32, {num_groups} groups of 16 captions"
        return NoiseRun(NoiseReport(moving, still, price), find_hardware(device), heading)


def _float32_subjects(artifact: Artifact, settings: Settings, num_groups: int, report: Callable[[str], None]) -> list[Subject]:
    """The model is gone when this returns."""
    report("loading the model in float32")
    encoder = load_encoder(artifact)
    if not encoder.takes_images:
        raise SettingsInvalid(f"{artifact.root}: the bench measures captions of images, this model takes none")
    groups = make_groups(Workload(encoder, image_limits(settings)), num_groups)
    loaded = load_model(artifact, device=settings.device, dtype="float32", lora=settings.lora)
    return subjects_of(loaded.model, groups, report)


def _check_memory(artifact: Artifact, settings: Settings, device: torch.device) -> None:
    """Before minutes of work. Raises SettingsInvalid."""
    number = resolve_dtype(settings.dtype, artifact.config.dtype, device)
    needed = max(weights_bytes(artifact.base_path, "float32"), 2 * weights_bytes(artifact.base_path, number))
    free = free_bytes(device)
    if free is not None and free < MIN_FREE * needed:
        sizes = f"{MIN_FREE * needed / 2**30:.1f} GiB, free are {free / 2**30:.1f} GiB"
        raise SettingsInvalid(f"--noise holds the model once in float32, then twice in {number}: {sizes}")
