"""The steps of a layer as the serving forward calls them: linear layers prepacked for the CPU and fused with the step behind them.

torch reorders a layer's weight for oneDNN on every call; a prepacked layer has it in that order from the start. What follows a
product (SiLU, a product with another tensor, a residual) is done on its tiles before they are rounded. Elsewhere, and for layers
that are more than a matrix (unmerged LoRA), the same steps are plain torch. Inference only.
"""

from __future__ import annotations

import gc
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_EXPECTED_ROWS = 512  # tokens of a usual batch: what oneDNN chooses the order of the weight for
_PREPACKED_DTYPES = (torch.float32, torch.bfloat16)


class PrepackedLinear(nn.Module):
    """`x @ weight.T + bias` with the weight in oneDNN's own order. Takes the place of an `nn.Linear` and frees its weight."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _EXPECTED_ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return self._product(x, "none")

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the product."""
        return self._product(x, "swish")

    def combined(self, x: Tensor, other: Tensor, how: str) -> Tensor:
        """The product, multiplied by (`mul`) or added to (`add`) another tensor of its shape."""
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, how)
        return result

    def _product(self, x: Tensor, then: str) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, then, [], "")
        return result


def silu(linear: nn.Module, x: Tensor) -> Tensor:
    """SiLU(linear(x)), [tokens, out_features]."""
    return linear.silu(x) if isinstance(linear, PrepackedLinear) else F.silu(linear(x))


def times(linear: nn.Module, x: Tensor, other: Tensor) -> Tensor:
    """linear(x) * other, [tokens, out_features]."""
    result: Tensor = linear.combined(x, other, "mul") if isinstance(linear, PrepackedLinear) else linear(x).mul_(other)
    return result


def plus(linear: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """linear(x) + residual, [tokens, out_features]."""
    result: Tensor = linear.combined(x, residual, "add") if isinstance(linear, PrepackedLinear) else linear(x).add_(residual)
    return result


def norm(hidden: Tensor, layer: Any) -> Tensor:
    """Root-mean-square norm (arXiv 1910.07467) in float32, [tokens, hidden] in and out."""
    return F.rms_norm(hidden, layer.weight.shape, layer.weight, layer.variance_epsilon)


def rotate(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864, halves layout): [tokens, heads, head_dim] by [tokens, 1, head_dim / 2]."""
    half = tensor.shape[-1] // 2
    first, second = tensor[..., :half], tensor[..., half:]
    rotated = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    torch.mul(first, cos, out=rotated[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=rotated[..., half:]).addcmul_(first, sin)
    return rotated


def can_prepack(linear: nn.Module) -> bool:
    """Whether a layer is a plain matrix on a CPU that oneDNN has kernels for."""
    if type(linear) is not nn.Linear or linear.weight.device.type != "cpu" or linear.weight.dtype not in _PREPACKED_DTYPES:
        return False
    return _works(linear.weight.dtype)


@cache
def _works(dtype: torch.dtype) -> bool:
    """Whether this machine's torch has these operators, and they compute what they should. They are torch's own, and not documented."""
    if not torch._C._has_mkldnn:
        return False
    linear = nn.Linear(16, 16, dtype=dtype)
    x = torch.linspace(-1, 1, 32, dtype=dtype).view(2, 16)
    with torch.inference_mode():
        expected = linear(x)
        try:
            if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
                return False
            layer = PrepackedLinear(linear)
            found = (layer(x), layer.silu(x), layer.combined(x, x, "mul"), layer.combined(x, x, "add"))
        except (RuntimeError, AttributeError):
            return False
        wanted = (expected, F.silu(expected), expected * x, expected + x)
        return all(torch.allclose(one, other, rtol=0.02, atol=0.02) for one, other in zip(found, wanted, strict=True))


def prepack(module: nn.Module) -> int:
    """Replace every plain linear layer below `module` by its prepacked form, one at a time; returns how many.

    Each weight is freed before the next is packed, so memory grows by the largest of them and no more.
    """
    names = [name for name, layer in module.named_modules() if name and can_prepack(layer)]
    for name in names:
        parent_name, _, child = name.rpartition(".")
        parent: Any = module.get_submodule(parent_name)
        linear = parent.get_submodule(child)
        setattr(parent, child, PrepackedLinear(linear))
        del linear
    gc.collect()
    return len(names)
