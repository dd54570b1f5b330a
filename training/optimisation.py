"""AdamW and the schedules of its learning rate. Knows no model and no data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from training.recipe import Optimiser


class Optimisation:
    """Owns optimiser and schedule; `step(loss)` is backward, clip, update, next rate."""

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        num_steps: int,
        learning_rate: float,
        num_warmup_steps: int = 0,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        final_share: float = 0.1,
    ) -> None:
        self._parameters = [parameter for parameter in parameters if parameter.requires_grad]
        self._max_grad_norm = max_grad_norm
        self._optimiser = torch.optim.AdamW(self._parameters, lr=learning_rate, weight_decay=weight_decay, betas=(0.9, 0.98))
        self._schedule = LambdaLR(self._optimiser, lambda step: rate_share(step, num_steps, num_warmup_steps, final_share))

    def step(self, loss: Tensor) -> float:
        """Returns the gradient norm before clipping; raises FloatingPointError rather than train on a non-finite loss."""
        if not torch.isfinite(loss):
            raise FloatingPointError("the training loss is not finite")
        self._optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self._parameters, self._max_grad_norm)
        self._optimiser.step()
        self._schedule.step()
        return float(norm)


def rate_share(step: int, num_steps: int, num_warmup_steps: int, final_share: float) -> float:
    """The share of the peak learning rate: up in a line, down along half a cosine to `final_share`."""
    if step < num_warmup_steps:
        return (step + 1) / (num_warmup_steps + 1)
    done = min(1.0, (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps))
    return final_share + (1 - final_share) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimiser(parameters: Sequence[nn.Parameter], recipe: Optimiser, device: torch.device) -> torch.optim.AdamW:
    """AdamW, fused where torch has such a kernel for the device. Vectors (norms, biases) do not decay."""
    matrices, vectors = ([each for each in parameters if (each.ndim > 1) == wanted] for wanted in (True, False))
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=recipe.learning_rate,
        betas=recipe.betas,
        eps=recipe.eps,
        weight_decay=recipe.weight_decay,
        fused=device.type in ("cuda", "cpu"),
    )


def make_schedule(optimiser: torch.optim.Optimizer, recipe: Optimiser, num_steps: int) -> LambdaLR:
    """The recipe's learning rate, one `step()` an optimiser step."""
    return LambdaLR(optimiser, lambda step: scheduled_share(recipe, step, num_steps))


def scheduled_share(recipe: Optimiser, step: int, num_steps: int) -> float:
    """The share of the peak rate after `step` steps: up in a line, then as the schedule says."""
    if step < recipe.num_warmup_steps or recipe.schedule == "cosine":
        return rate_share(step, num_steps, recipe.num_warmup_steps, recipe.final_share)
    if recipe.schedule == "constant":
        return 1.0
    done = min(1.0, (step - recipe.num_warmup_steps) / max(1, num_steps - recipe.num_warmup_steps))
    return 1 - (1 - recipe.final_share) * done
