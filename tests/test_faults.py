"""Errors of the device by their words: no memory, broken for good, or neither."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from app.errors import DeviceBroken, OutOfMemory
from app.faults import faults_named, means_broken, means_no_memory


def failing(error: Exception) -> Callable[[], object]:
    def fail() -> None:
        raise error

    return fail


NO_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    MemoryError("Unable to allocate 8.00 EiB"),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported at some other API call"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error (flash_fwd_launch_template.h:117): out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
    ),
    RuntimeError("could not create a primitive"),
]
BROKEN = [
    torch.AcceleratorError("CUDA error: device-side assert triggered\nCompile with `TORCH_USE_CUDA_DSA`"),
    torch.AcceleratorError("CUDA error: something new"),
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("CUDA error (flash_fwd_launch_template.h:117): unspecified launch failure"),
    RuntimeError("CUDA error: misaligned address"),
    RuntimeError("CUDA error: the launch timed out and was terminated"),
    RuntimeError("CUDA error: uncorrectable ECC error encountered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
]
NEITHER = [
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_SUPPORTED when calling `cublasGemmEx`"),
]


@pytest.mark.parametrize("error", [*NO_MEMORY, *BROKEN, *NEITHER, ValueError("out of memory")], ids=lambda error: str(error)[:60])
def test_errors_are_known_by_their_words(error: Exception) -> None:
    assert means_no_memory(error) == (error in NO_MEMORY)
    assert means_broken(error) == (error in BROKEN)


@pytest.mark.parametrize(("errors", "kind"), [(NO_MEMORY, OutOfMemory), (BROKEN, DeviceBroken), (NEITHER, RuntimeError)])
def test_each_kind_has_one_name(errors: list[Exception], kind: type[Exception]) -> None:
    for error in errors:
        with pytest.raises(kind) as caught, faults_named():
            raise error
        assert type(caught.value) is kind


def test_no_address_is_told() -> None:
    with pytest.raises(DeviceBroken, match=r"^the device broke: an illegal memory access at 0x\.\.$"), faults_named():
        raise RuntimeError("an illegal memory access at 0x7f00dead\nand a second line")
