"""Peak memory of this process or its GPU since a moment."""

from __future__ import annotations

import threading
from dataclasses import dataclass

import torch

from app.machine import resident_bytes

_WATCH_S = 0.005


@dataclass(frozen=True, slots=True)
class Peak:
    """The most that a stretch of work took at once, beyond what was held before it; mapped files count."""

    all_bytes: int
    weights_bytes: int

    @property
    def over_weights(self) -> float:
        """Share of the weights that was needed on top of them."""
        return self.all_bytes / self.weights_bytes - 1


class PeakMemory:
    """Watches a `with` block from a thread of its own.

    The kernel's high-water mark alone does not do: a server that starts resets it for measurements of its own.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._done = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="memory watch", daemon=True)
        self._before = self._most = held_now(device)

    def __enter__(self) -> PeakMemory:
        self._watcher.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._watcher.join()

    def peak(self, weights_bytes: int) -> Peak | None:
        """None where the system does not tell."""
        if self._most is None or self._before is None:
            return None
        return Peak(self._most - self._before, weights_bytes)

    def _watch(self) -> None:
        while self._most is not None and not self._done.wait(_WATCH_S):
            self._most = max(self._most, held_now(self._device) or 0)


def held_now(device: torch.device) -> int | None:
    """By this process on its GPU, else in main memory; None where the system does not tell."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else resident_bytes()
