"""The measured rate and the memory that is watched: that they measure what they say, not how much it is."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from app.bases import weights_bytes
from app.bench.flops import Shapes
from app.bench.limit import Rate, measure_rate, prepacked_product, rate_now
from app.bench.memory import Peak, PeakMemory
from app.geometry import base_config
from app.hardware import free_bytes
from tests.test_geometry import SPECIAL, TINY

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_prepacked_product_is_the_product(dtype: torch.dtype) -> None:
    rows, weight = torch.randn(32, 64).to(dtype), torch.randn(48, 64).to(dtype)
    product = prepacked_product(rows, weight)
    if product is None:
        pytest.skip("this torch has no oneDNN kernel for it")
    expected = nn.functional.linear(rows.float(), weight.float())
    with torch.inference_mode():
        assert torch.allclose(product().float(), expected, atol=1e-4 if dtype == torch.float32 else 0.2)


def test_the_rate_is_the_better_of_both() -> None:
    found = measure_rate(Shapes.of(base_config(TINY, SPECIAL)), torch.float32, CPU)
    assert found.plain > 0
    assert found.best == max(found.plain, found.prepacked or 0)
    assert Rate(2.0, None).best == 2.0
    assert Rate(2.0, 3.0) | Rate(4.0, 1.0) == Rate(4.0, 3.0)
    assert Rate(2.0, None) | Rate(1.0, None) == Rate(2.0, None)


def test_the_rate_of_now_is_measured_anew_at_each_call() -> None:
    now = rate_now(Shapes.of(base_config(TINY, SPECIAL)), torch.float32, CPU)
    found = {now() for _ in range(3)}
    assert all(rate > 0 for rate in found)
    assert len(found) > 1


def test_weights_are_counted_without_the_unused_head(tmp_path: Path) -> None:
    save_file({"a": torch.zeros(3, 5), "lm_head.weight": torch.zeros(1000)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(7)}, tmp_path / "model-2.safetensors")
    assert (weights_bytes(tmp_path, torch.bfloat16), weights_bytes(tmp_path, torch.float32)) == (44, 88)


def test_a_peak_is_seen_after_it_has_gone() -> None:
    num_bytes, seen = 256 << 20, threading.Event()
    with PeakMemory(CPU) as memory:
        block = np.ones(num_bytes, dtype=np.uint8)
        while (peak := memory.peak(num_bytes)) is not None and peak.all_bytes < num_bytes // 2:
            seen.wait(0.01)
        del block
    peak = memory.peak(num_bytes)
    if peak is None:
        pytest.skip("this system does not tell")
    assert -0.5 < peak.over_weights < 0.5


def test_a_share_of_the_weights_by_hand() -> None:
    assert Peak(all_bytes=115, weights_bytes=100).over_weights == pytest.approx(0.15)


def test_free_memory_of_the_cpu() -> None:
    free = free_bytes(CPU)
    assert free is None or free > 0
