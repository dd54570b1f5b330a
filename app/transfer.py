"""Copies from the host to the device that the host does not wait for. Knows tensors; not what they are for.

On the CPU there is nothing to copy.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


def on_device(host: Tensor | NDArray[Any], device: torch.device) -> Tensor:
    """Through pinned memory to a GPU: a copy from any other would make the host wait."""
    tensor = host if isinstance(host, Tensor) else torch.from_numpy(np.ascontiguousarray(host))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@dataclass(frozen=True, slots=True)
class Staged:
    """A tensor on its way to the device."""

    tensor: Tensor
    arrived: torch.cuda.Event | None  # on the stream that copies it; None where nothing is copied

    def take(self) -> Tensor:
        """For the current stream, which waits until it has arrived; the host does not."""
        if self.arrived is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.arrived)
            self.tensor.record_stream(stream)  # its memory is not given away before this stream has read it
        return self.tensor


class Stager:
    """Copies beside what a GPU computes, on a stream of its own. One thread stages, another may take."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]

    def stage(self, host: NDArray[Any]) -> Staged:
        """Begin the copy. Raises what torch raises when memory runs out."""
        if self._stream is None:
            return Staged(on_device(host, self._device), None)
        with torch.cuda.stream(self._stream):
            tensor = on_device(host, self._device)
            arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
            arrived.record(self._stream)
        return Staged(tensor, arrived)
