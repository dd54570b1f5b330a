"""The training loop: batches in, steps out, checkpoints beside. A step fits on one screen; knows no files but its run's folder."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import load_file, save_file
from torch import Tensor

from app.errors import PunchlineError
from training.averaging import Average
from training.batches import StepPlan
from training.checkpoints import Checkpoint, CheckpointFailed, Checkpoints
from training.collation import Batch, Collator
from training.optimisation import make_optimiser, make_schedule
from training.preference import PairScores, pack_pairs, preference_loss, split_pairs
from training.recipe import Loss, Recipe
from training.tracking import StepMetrics, Tracker, ValidationMetrics
from training.trainee import Trainee, load_trained

TRAINED_NAME = "trained.safetensors"
AVERAGED_NAME = "averaged.safetensors"


class TrainingFailed(PunchlineError):
    """The run cannot go on; checkpoints written before are whole."""

    exit_code = 4


@dataclass(frozen=True)
class Course:
    """Where the pairs come from: the training plan over its collator, and the validation pairs in batches."""

    collator: Collator
    plan: StepPlan
    num_steps: int
    validation: Collator | None
    validation_batches: Sequence[Sequence[int]]

    @property
    def num_left_out(self) -> int:
        """Pairs that an epoch does not come to, other ones in every epoch: they make no whole step."""
        return len(self.plan.keys) - self.plan.steps_per_epoch * self.plan.pairs_per_step


class Training:
    """One run on one or more devices. `fit` trains from the newest checkpoint it was given to the last step."""

    def __init__(self, recipe: Recipe, trainee: Trainee, course: Course, accelerator: Accelerator, run: Path) -> None:
        self._recipe = recipe
        self._trainee = trainee
        self._course = course
        self._accelerator = accelerator
        self.checkpoints = Checkpoints(run / "checkpoints", recipe.run.max_checkpoints)
        self.num_steps = course.num_steps
        optimiser = make_optimiser(list(trainee.trainable().values()), recipe.optimiser, accelerator.device)
        self._model, self._optimiser = accelerator.prepare(trainee.model, optimiser)
        self._parameters = [parameter for parameter in self._model.parameters() if parameter.requires_grad]  # sharded, perhaps
        decay = recipe.regularisation.averaging
        self._average = Average(trainee.trainable(), decay) if decay else None
        self._schedule = make_schedule(optimiser, recipe.optimiser, self.num_steps)
        accelerator.register_for_checkpointing(self._schedule)
        accelerator.register_save_state_pre_hook(_save_no_weights)  # the trained ones are saved by name, the base is not
        accelerator.register_load_state_pre_hook(_load_no_weights)

    def fit(self, first_step: int, tracker: Tracker) -> None:
        """Raises TrainingFailed when a loss is not finite, CheckpointFailed when one cannot be written."""
        run, accelerator = self._recipe.run, self._accelerator
        batches = self._course.collator.ahead(self._course.plan.batches(accelerator.process_index, first_step, self.num_steps))
        self._model.train()
        for step in range(first_step + 1, self.num_steps + 1):
            began = time.monotonic()
            sums = torch.zeros(3, device=accelerator.device)
            for _ in range(run.num_accumulated):
                with accelerator.accumulate(self._model):
                    scores, gaps = self._score(next(batches))
                    loss = preference_loss(scores, asked=_asked(gaps, self._recipe.loss), centring=self._recipe.loss.centring)
                    accelerator.backward(loss)
                sums += torch.stack([loss.detach(), (scores.margins > 0).float().mean(), scores.margins.detach().mean()])
            loss_, accuracy, margin = accelerator.reduce(sums / run.num_accumulated, "mean").tolist()
            norm = float(accelerator.clip_grad_norm_(self._parameters, self._recipe.optimiser.max_grad_norm) or 0.0)
            if not math.isfinite(loss_ + norm):
                raise TrainingFailed(f"step {step}: loss {loss_} with gradient norm {norm} is not finite; nothing of it was kept")
            rate = float(self._schedule.get_last_lr()[0])
            self._optimiser.step()
            self._schedule.step()
            self._optimiser.zero_grad()
            if self._average is not None:
                self._average.update(step)
            speed = self._course.plan.pairs_per_step / (time.monotonic() - began)
            tracker.step(step, StepMetrics(loss_, accuracy, margin, norm, rate, speed))
            last = step == self.num_steps
            if last or step % run.validate_every == 0:
                self._validate(step, tracker)
            if last or step % run.save_every == 0:
                self.save(step)

    def save(self, step: int) -> None:
        """A checkpoint of this step; every process takes part, the main one seals it."""
        accelerator = self._accelerator
        state = accelerator.get_state_dict(self._model)  # whole on the main process, also when it is sharded
        if accelerator.num_processes > 1:
            self._save_together(step, state)
            return
        with self.checkpoints.writing(step) as folder:
            self._write(folder, state)

    def resume(self, checkpoint: Checkpoint) -> None:
        """Weights, optimiser, schedule and random numbers as they were. Raises CheckpointFailed when they do not fit the recipe."""
        numbers = checkpoint.path / f"random_states_{self._accelerator.process_index}.pkl"
        if not numbers.exists():  # accelerate would go on with others and say nothing
            raise CheckpointFailed(f"{numbers}: missing; this run had another number of processes")
        try:
            if self._accelerator.distributed_type != "FSDP":
                load_trained(self._trainee.model, load_file(checkpoint.path / TRAINED_NAME))
            if self._average is not None:
                self._average.load(load_file(checkpoint.path / AVERAGED_NAME))
            self._accelerator.load_state(str(checkpoint.path))
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            raise CheckpointFailed(f"{checkpoint.path}: does not fit this run ({error})") from error

    def _save_together(self, step: int, state: dict[str, Tensor]) -> None:
        """Several processes write into one folder, which the main one made and will seal."""
        accelerator = self._accelerator
        if accelerator.is_main_process:
            with self.checkpoints.writing(step) as folder:
                folders = [str(folder)]
                _broadcast(folders)
                self._write(folder, state)
                accelerator.wait_for_everyone()
        else:
            folders = [""]
            _broadcast(folders)
            self._accelerator.save_state(folders[0])
            accelerator.wait_for_everyone()
        accelerator.wait_for_everyone()

    def _write(self, folder: Path, state: dict[str, Tensor]) -> None:
        wanted = self._trainee.trainable()
        save_file({name: state[name].detach().cpu().contiguous() for name in wanted}, folder / TRAINED_NAME)
        if self._average is not None:
            save_file({name: tensor.cpu() for name, tensor in self._average.tensors.items()}, folder / AVERAGED_NAME)
        self._accelerator.save_state(str(folder))

    def _score(self, batch: Batch) -> tuple[PairScores, Tensor | None]:
        packed = pack_pairs(self._trainee.model, batch.groups, self._accelerator.device)
        scores = split_pairs(self._model(packed), packed)
        gaps = None if None in batch.gaps else torch.tensor(batch.gaps, device=scores.chosen.device)
        return scores, gaps

    def _validate(self, step: int, tracker: Tracker) -> None:
        if self._course.validation is not None:
            with nullcontext() if self._average is None else self._average.in_place():
                tracker.validation(step, self._measure(self._course.validation, self._course.validation_batches))
            self._model.train()

    @torch.no_grad()
    def _measure(self, collator: Collator, batches: Sequence[Sequence[int]]) -> ValidationMetrics:
        """Every process takes every n-th batch; one without a batch of its own runs the last again and counts nothing."""
        self._model.eval()
        world, process = self._accelerator.num_processes, self._accelerator.process_index
        places = [round_ * world + process for round_ in range(math.ceil(len(batches) / world))]
        own = collator.ahead([batches[min(place, len(batches) - 1)] for place in places])
        sums = torch.zeros(4, dtype=torch.float64, device=self._accelerator.device)
        for place, batch in zip(places, own, strict=True):
            margins = self._score(batch)[0].margins.double()
            if place < len(batches):
                losses = torch.nn.functional.softplus(-margins)
                sums += torch.stack([losses.sum(), (margins > 0).double().sum(), margins.sum(), torch.ones_like(margins).sum()])
        loss, wins, margin, count = self._accelerator.reduce(sums, "sum").tolist()
        return ValidationMetrics(loss / count, wins / count, margin / count, int(count))


def weights_of(checkpoint: Path) -> dict[str, Tensor]:
    """The weights a checkpoint stands for: the average where one was kept, else those of its last step."""
    averaged = checkpoint / AVERAGED_NAME
    return load_file(averaged if averaged.exists() else checkpoint / TRAINED_NAME)


def _asked(gaps: Tensor | None, loss: Loss) -> Tensor | None:
    if loss.margin_per_gap == 0 or gaps is None:  # a training table without gaps was refused
        return None
    return gaps * loss.margin_per_gap


def _save_no_weights(models: list[Any], weights: list[Any], folder: str) -> None:
    weights.clear()


def _load_no_weights(models: list[Any], folder: str) -> None:
    models.clear()


def _broadcast(values: list[str]) -> None:
    torch.distributed.broadcast_object_list(values, src=0)
