"""What an error of the device means: no memory, which smaller batches may mend, or a fault that stays. Knows words of torch and CUDA."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from app.errors import DeviceBroken, OutOfMemory

_NO_MEMORY = (
    "out of memory",  # CUDA's runtime and driver, and flash-attn in their words
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "ALLOCATION_FAILED",  # cuDNN 9: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED and its kind
    "cudaErrorMemoryAllocation",
    "DefaultCPUAllocator",
    "could not create a primitive",  # oneDNN
)
# Once one of these was raised, every later call fails or, worse, answers: the context is lost (CUDA's own words, cuBLAS', cuDNN's).
_BROKEN = (
    "device-side assert",
    "illegal memory access",
    "illegal instruction",
    "misaligned address",
    "unspecified launch failure",
    "launch timed out",
    "invalid program counter",
    "hardware stack error",
    "CUBLAS_STATUS_EXECUTION_FAILED",
    "CUBLAS_STATUS_INTERNAL_ERROR",
    "CUDNN_STATUS_EXECUTION_FAILED",
    "uncorrectable",  # ECC, NVLink
)
_ADDRESS = re.compile(r"0x[0-9a-fA-F]+")
_MAX_WORDS = 200


def means_no_memory(error: BaseException) -> bool:
    """Whether an error is one of those that torch and what it calls raise when memory runs out; most have no class of their own."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)


def means_broken(error: BaseException) -> bool:
    """Whether nothing the device computes from now on can be believed. Not so of memory that ran out.

    torch's class for errors of the accelerator counts whatever it says: a fault that is not known to pass is not believed to.
    """
    if means_no_memory(error):
        return False
    return isinstance(error, torch.AcceleratorError) or (isinstance(error, RuntimeError) and any(words in str(error) for words in _BROKEN))


@contextmanager
def faults_named() -> Iterator[None]:
    """Whatever is raised when memory runs out becomes OutOfMemory, and a fault that stays DeviceBroken. Other errors pass."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if means_broken(error):
            raise DeviceBroken(f"the device broke: {_first_line(error)}") from None
        if not means_no_memory(error):
            raise
        _release()
        raise OutOfMemory("there is no memory left for this batch") from None


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines() or [type(error).__name__]
    return _ADDRESS.sub("0x..", lines[0])[:_MAX_WORDS]


def _release() -> None:
    if torch.cuda.is_available():
        with suppress(RuntimeError):  # what comes next will say what is wrong
            torch.cuda.empty_cache()
