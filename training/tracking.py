"""What a run says while it goes: a progress bar, one JSON line a step, and the trackers accelerate knows. Decides nothing."""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import is_wandb_available
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from training.recipe import RecipeInvalid

METRICS_NAME = "metrics.jsonl"
TRACKER_FOLDER = "logs"
_SHOWN = 50  # steps the shown means run over
_SPEED_PERIOD_S = 3600  # a step may take longer than rich's own half minute
log = logging.getLogger("punchline.training")


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimiser step, means over all its pairs on all devices."""

    loss: float
    accuracy: float  # share of pairs with a margin above 0
    margin: float
    grad_norm: float  # before clipping
    learning_rate: float
    pairs_per_s: float


@dataclass(frozen=True, slots=True)
class ValidationMetrics:
    """The validation pairs under the weights of one step."""

    validation_loss: float
    validation_accuracy: float
    validation_margin: float
    validation_num_pairs: int


def choose_trackers(wanted: str) -> list[str]:
    """Names for accelerate: `auto` is TensorBoard, and W&B where it is installed. Raises RecipeInvalid for one that is not there."""
    if wanted == "auto":
        return ["tensorboard", *(["wandb"] if is_wandb_available() else [])]
    names = [name.strip() for name in wanted.split(",") if name.strip() not in ("", "none")]
    there = sorted(map(str, get_available_trackers()))
    if absent := sorted(set(names) - set(there)):
        raise RecipeInvalid(f"--trackers {', '.join(absent)}: not installed or not known; there are {', '.join(there)}")
    return names


class Tracker:
    """Owns the bar and `metrics.jsonl`; only the main process writes."""

    def __init__(self, accelerator: Accelerator, run: Path, *, first_step: int, num_steps: int, console: Console) -> None:
        self._accelerator = accelerator
        self._path = run / METRICS_NAME
        self._recent: deque[StepMetrics] = deque(maxlen=_SHOWN)
        columns = (
            *(TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[figures]}")),
            *(TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn()),
        )
        self._bar = Progress(*columns, console=console, disable=not accelerator.is_main_process, speed_estimate_period=_SPEED_PERIOD_S)
        self._task = self._bar.add_task("training", total=num_steps, completed=first_step, figures="")
        if accelerator.is_main_process:
            forget_after(self._path, first_step)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bar.stop()
        try:
            self._accelerator.end_training()
        except OSError as fault:
            log.warning("a tracker could not be closed (%s)", fault.strerror)  # must not hide what ended the run

    def step(self, step: int, metrics: StepMetrics) -> None:
        self._recent.append(metrics)
        self._write(step, asdict(metrics))
        means = {name: sum(getattr(each, name) for each in self._recent) / len(self._recent) for name in ("loss", "accuracy", "margin")}
        figures = "  ".join(f"{name} {value:.3f}" for name, value in means.items())
        self._bar.update(self._task, completed=step, figures=f"{figures}  {metrics.pairs_per_s:.1f} pairs/s")

    def validation(self, step: int, metrics: ValidationMetrics) -> None:
        self._write(step, asdict(metrics))
        if self._accelerator.is_main_process:
            self._bar.console.print(
                f"step {step}: validation accuracy {metrics.validation_accuracy:.4f}, loss {metrics.validation_loss:.4f}, "
                f"margin {metrics.validation_margin:.3f} ({metrics.validation_num_pairs} pairs)"
            )

    def _write(self, step: int, values: dict[str, Any]) -> None:
        self._accelerator.log(values, step=step)
        if self._accelerator.is_main_process:
            with self._path.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps({"step": step} | values) + "\n")


def forget_after(path: Path, step: int) -> None:
    """Drop the lines of steps that a resumed run will take again, and a last line that was cut off."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except ValueError:
            log.warning("%s: a line that was cut off is dropped", path)
            continue
        if values["step"] <= step:
            kept.append(line + "\n")
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept), encoding="utf-8")
    os.replace(partial, path)
