"""The machine's limit: the best rate of a large matrix product in the same number format, plain and with weights prepacked."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from app.bench.flops import Shapes

_NUM_ROWS = {"cpu": 512, "cuda": 8192}  # of the product: about a cold group of 8, and what keeps a GPU busy
_MIN_S, _MIN_REPEATS = 0.5, 5  # each shape is repeated for this long, and this often at least
_NOW_S = 0.2  # the same for the rate of this moment


@dataclass(frozen=True, slots=True)
class Rate:
    """Floating-point operations a second."""

    plain: float
    prepacked: float | None  # None on a GPU, which packs nothing, and where oneDNN has no kernel

    @property
    def best(self) -> float:
        return max(self.plain, self.prepacked or 0.0)

    def __or__(self, other: Rate) -> Rate:
        """The better of two measurements: on a noisy machine one alone may be too low."""
        packed = [rate for rate in (self.prepacked, other.prepacked) if rate is not None]
        return Rate(max(self.plain, other.plain), max(packed, default=None))


def measure_rate(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Rate:
    """Best of several repetitions of the best of the text layer's shapes."""
    products = [product for shape in sorted(set(shapes.linears)) for product in _products(shape, dtype, device)]
    plain, prepacked = ([each.best_rate(device) for each in products if each.is_prepacked == kind] for kind in (False, True))
    return Rate(max(plain), max(prepacked, default=None))


def rate_now(shapes: Shapes, dtype: torch.dtype, device: torch.device) -> Callable[[], float]:
    """How fast the machine multiplies at the moment of the call, in floating-point operations a second.

    A shared machine may change its rate by the second; a way is held against the rate of its own seconds. The median of the largest of
    the text layer's products, repeated for a fifth of a second.
    """
    product = _products(max(shapes.linears, key=math.prod), dtype, device)[-1]
    _timed(product.work, device)
    return lambda: product.flops / statistics.median(_repeated(product.work, device, _NOW_S))


@dataclass(frozen=True, slots=True)
class _Product:
    work: Callable[[], Tensor]
    flops: int
    is_prepacked: bool

    def best_rate(self, device: torch.device) -> float:
        return self.flops / best_seconds(self.work, device)


def _products(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> list[_Product]:
    """Of one weight, [outer, inner]: the plain one, then the prepacked one where there is one."""
    inner, outer = shape
    num_rows, generator = _NUM_ROWS[device.type], torch.Generator().manual_seed(0)
    rows = torch.randn(num_rows, inner, generator=generator).to(device, dtype)
    weight = (torch.randn(outer, inner, generator=generator) / inner**0.5).to(device, dtype)
    packed = prepacked_product(rows, weight) if device.type == "cpu" else None
    works = [_plain_product(rows, weight), *([] if packed is None else [packed])]
    return [_Product(work, 2 * num_rows * inner * outer, bool(place)) for place, work in enumerate(works)]


def prepacked_product(rows: Tensor, weight: Tensor) -> Callable[[], Tensor] | None:
    """`rows @ weight.T` with the weight in the layout oneDNN likes best for so many rows; None where torch has none."""
    if not torch._C._has_mkldnn:
        return None
    if rows.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows.shape[0])
    return lambda: torch.ops.mkldnn._linear_pointwise(rows, packed, None, "none", [], "")


def best_seconds(work: Callable[[], object], device: torch.device) -> float:
    """The fastest of many repetitions, after one to warm up."""
    _timed(work, device)
    return min(_repeated(work, device, _MIN_S))


def _repeated(work: Callable[[], object], device: torch.device, min_s: float) -> list[float]:
    """Seconds of each repetition."""
    began = time.perf_counter()
    seconds: list[float] = []
    while len(seconds) < _MIN_REPEATS or time.perf_counter() - began < min_s:
        seconds.append(_timed(work, device))
    return seconds


def _plain_product(rows: Tensor, weight: Tensor) -> Callable[[], Tensor]:
    return lambda: F.linear(rows, weight)


def _timed(work: Callable[[], object], device: torch.device) -> float:
    began = time.perf_counter()
    with torch.inference_mode():
        work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - began
