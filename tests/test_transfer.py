"""Copies to the device: on a CPU nothing is copied; who takes what was staged waits for it on its own stream. `test_gpu` has the rest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from app.transfer import Staged, Stager, on_device
from app.varlen import Segments

CPU = torch.device("cpu")


def test_on_a_cpu_nothing_is_copied() -> None:
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    tensor = torch.from_numpy(array)
    assert on_device(tensor, CPU) is tensor
    staged = Stager(CPU).stage(array)
    assert staged.arrived is None
    for found in (on_device(array, CPU), staged.take()):
        assert found.data_ptr() == tensor.data_ptr()
        assert torch.equal(found, tensor)


def test_what_does_not_lie_in_order_is_put_in_order() -> None:
    array = np.arange(6, dtype=np.int64).reshape(2, 3).T
    found = on_device(array, CPU)
    assert found.is_contiguous()
    assert found.tolist() == [[0, 3], [1, 4], [2, 5]]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_stream_that_takes_a_copy_waits_for_it_and_the_host_does_not() -> None:
    device, array = torch.device("cuda"), np.arange(1 << 22, dtype=np.float32)
    stager = Stager(device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        staged = [stager.stage(array + number) for number in range(4)]
        doubled = [each.take() * 2 for each in staged]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for number, found in enumerate(doubled):
        assert torch.equal(found.cpu(), torch.from_numpy((array + number) * 2))
    assert all(isinstance(each, Staged) and each.arrived is not None and each.arrived.query() for each in staged)


class NoGpu(TorchFunctionMode):
    """Stands for a GPU that is not there: notes what is pinned and copied, and leaves it where it is."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, bool]] = []  # what was done, and whether the host goes on meanwhile

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        options = dict(kwargs or {})
        if options.pop("pin_memory", False) or func is Tensor.pin_memory:
            self.seen.append(("pinned", True))
            return args[0] if func is Tensor.pin_memory else func(*args, **options)
        if func is Tensor.to and torch.device("cuda") in args:
            self.seen.append(("copied", bool(options.get("non_blocking"))))
            return args[0]
        return func(*args, **options)


@pytest.mark.parametrize("what", ["an array", "a tensor", "bounds of segments"])
def test_what_goes_to_a_gpu_is_pinned_and_nobody_waits(what: str) -> None:
    """A copy from memory that is not pinned makes the host wait for the device, whatever `non_blocking` says."""
    device = torch.device("cuda")
    with NoGpu() as watched:
        if what == "bounds of segments":
            assert Segments.of([2, 3], None, device).cu_query.tolist() == [0, 2, 5]
        else:
            assert on_device(np.arange(3) if what == "an array" else torch.arange(3), device).tolist() == [0, 1, 2]
    assert watched.seen == [("pinned", True), ("copied", True)]
