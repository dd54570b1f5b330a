"""The hardware line: what is in it, and what stands there when the system says nothing."""

from __future__ import annotations

import json

import torch

from app.hardware import Hardware, describe_hardware, find_hardware, vector_instructions

CPU = Hardware("cpu", "Some CPU", 4, 2, ("avx2", "amx_bf16"), "2.13.0", "tcmalloc", 24 << 30)


def test_the_line_of_a_cpu() -> None:
    assert CPU.line == "Some CPU, 4 cores, 2 threads, avx2 amx_bf16, 24 GiB, torch 2.13.0, tcmalloc"


def test_the_line_of_a_gpu_names_no_vectors() -> None:
    gpu = Hardware("cuda:0", "NVIDIA H200", 16, 8, ("avx2",), "2.13.0", "cuda native", 139 << 30)
    assert gpu.line == "NVIDIA H200 (139 GiB), 16 cores, torch 2.13.0, cuda native"


def test_this_machine() -> None:
    found = find_hardware(torch.device("cpu"))
    assert (found.device, found.num_threads, found.torch_version) == ("cpu", torch.get_num_threads(), str(torch.__version__))
    assert found.num_cores >= 1
    assert found.memory_bytes > 0
    assert json.loads(json.dumps(found.as_dict()))["allocator"] == found.allocator
    assert describe_hardware(torch.device("cpu")) == found.line


def test_vector_instructions_of_both_families() -> None:
    intel = "model name : X\nflags\t\t: fpu avx2 avx512f amx_bf16 avx512_bf16 rdpid\n"
    assert vector_instructions(intel) == ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    assert vector_instructions("Features\t: fp asimd sve bf16\n") == ("sve", "bf16")
    assert vector_instructions("flags : fpu\n") == ()


def test_without_cpuinfo_torch_is_asked() -> None:
    assert vector_instructions("") == (torch.backends.cpu.get_cpu_capability().lower(),)
