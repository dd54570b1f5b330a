"""What this process computes on: device, cores, threads, vector instructions, torch, memory allocator. Measures nothing."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from app.machine import allocator, available_bytes, num_processors

_FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "amx_fp16", "sve", "bf16", "i8mm")  # what decides a matrix product's speed


@dataclass(frozen=True, slots=True)
class Hardware:
    """One machine as torch sees it."""

    device: str  # "cpu", "cuda:0"
    name: str  # of the processor or the GPU
    num_cores: int  # this process may run on
    num_threads: int  # torch's, for one operation
    vectors: tuple[str, ...]  # instruction sets of the processor
    torch_version: str
    allocator: str
    memory_bytes: int  # of the device

    @property
    def line(self) -> str:
        """The same in one line, for a table's foot."""
        memory = f"{self.memory_bytes / 2**30:.0f} GiB"
        software = f"torch {self.torch_version}, {self.allocator}"
        if self.device.startswith("cuda"):
            return f"{self.name} ({memory}), {self.num_cores} cores, {software}"
        vectors = " ".join(self.vectors) or "no known vector instructions"
        return f"{self.name}, {self.num_cores} cores, {self.num_threads} threads, {vectors}, {memory}, {software}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"vectors": list(self.vectors)}


def find_hardware(device: torch.device) -> Hardware:
    """The machine behind a torch device."""
    on_gpu = device.type == "cuda"
    return Hardware(
        device=str(device),
        name=torch.cuda.get_device_name(device) if on_gpu else _processor_name(),
        num_cores=num_processors(),
        num_threads=torch.get_num_threads(),
        vectors=vector_instructions(_read("/proc/cpuinfo")),
        torch_version=str(torch.__version__),
        allocator=f"cuda {torch.cuda.memory.get_allocator_backend()}" if on_gpu else allocator(),
        memory_bytes=torch.cuda.get_device_properties(device).total_memory if on_gpu else _memory_bytes(),
    )


def describe_hardware(device: torch.device) -> str:
    """What ran, in one line."""
    return find_hardware(device).line


def vector_instructions(cpuinfo: str) -> tuple[str, ...]:
    """The instruction sets that matter, from the text of /proc/cpuinfo; without it, what torch was dispatched to."""
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", cpuinfo, re.MULTILINE)
    if found is None:
        return (str(torch.backends.cpu.get_cpu_capability()).lower(),)
    here = set(found[1].split())
    return tuple(flag for flag in _FLAGS if flag in here)


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _processor_name() -> str:
    found = re.search(r"^model name\s*:\s*(.*\S)\s*$", _read("/proc/cpuinfo"), re.MULTILINE)
    return found[1] if found else platform.processor() or platform.machine()


def _read(path: str) -> str:
    """A file of the kernel's, empty on systems without it."""
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def free_bytes(device: torch.device) -> int | None:
    """Memory of the device that this process may still take; None where nobody tells."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
