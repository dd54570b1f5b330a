"""The steps of a layer as the serving forward calls them: linear layers prepacked for the CPU and fused with the step behind them.

torch reorders a layer's weight for oneDNN on every call; a prepacked layer has it in that order from the start. What follows a product
is done on its tiles before they are rounded, or behind it where that is quicker: with AMX. Elsewhere, and for layers that are more than
a matrix (unmerged LoRA), the same steps are plain torch, or compiled within `compiled_steps`. Inference only.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from app.errors import SettingsInvalid
from app.machine import MappedFiles

Step: TypeAlias = Callable[..., Tensor]
_EXPECTED_ROWS = 512  # tokens of a usual batch: what oneDNN chooses the order of the weight for
_PREPACKED_DTYPES = (torch.float32, torch.bfloat16)
_MIN_COMPILED_TOKENS = 2  # torch compiles a size of 0 or 1 anew
_MAX_REASON = 200  # characters of a compiler's own words
_compiled: dict[Step, Step] = {}  # each step's compiled form; like torch's number of threads it is the process's


class PrepackedLinear(nn.Module):
    """`x @ weight.T + bias` with the weight in oneDNN's own order. Takes the place of an `nn.Linear` and frees its weight."""

    def __init__(self, linear: nn.Linear, *, fuses: bool | None = None) -> None:
        """`fuses`: what follows is done on the product's tiles, else behind it; None: as is faster here."""
        super().__init__()
        self._fuses = not (linear.weight.dtype == torch.bfloat16 and _has_amx()) if fuses is None else fuses
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), _EXPECTED_ROWS)
        self.bias = None if linear.bias is None else linear.bias.detach().clone()  # it may lie in a mapped file

    def forward(self, x: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return self._product(x, "none")

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the product."""
        return self._product(x, "swish") if self._fuses else F.silu(self._product(x, "none"), inplace=True)

    def combined(self, x: Tensor, other: Tensor, how: str) -> Tensor:
        """The product, multiplied by (`mul`) or added to (`add`) another tensor of its shape."""
        if not self._fuses:
            product = self._product(x, "none")
            return product.mul_(other) if how == "mul" else product.add_(other)
        result: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self.weight, self.bias, how)
        return result

    def _product(self, x: Tensor, then: str) -> Tensor:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, then, [], "")
        return result


def silu(linear: nn.Module, x: Tensor) -> Tensor:
    """SiLU(linear(x)), [tokens, out_features]."""
    if isinstance(linear, PrepackedLinear):
        return linear.silu(x)
    return _step(_silu, x)(x, linear.weight, linear.bias) if type(linear) is nn.Linear else F.silu(linear(x))


def times(linear: nn.Module, x: Tensor, other: Tensor) -> Tensor:
    """linear(x) * other, [tokens, out_features]."""
    if isinstance(linear, PrepackedLinear):
        return linear.combined(x, other, "mul")
    return _step(_times, x, other)(x, linear.weight, linear.bias, other) if type(linear) is nn.Linear else linear(x).mul_(other)


def plus(linear: nn.Module, x: Tensor, residual: Tensor) -> Tensor:
    """linear(x) + residual, [tokens, out_features]."""
    if isinstance(linear, PrepackedLinear):
        return linear.combined(x, residual, "add")
    return _step(_plus, x, residual)(x, linear.weight, linear.bias, residual) if type(linear) is nn.Linear else linear(x).add_(residual)


def norm(hidden: Tensor, layer: Any) -> Tensor:
    """Root-mean-square norm (arXiv 1910.07467) of the last dimension in float32: [tokens, hidden] or [tokens, heads, head_dim]."""
    return _step(_norm, hidden)(hidden, layer.weight, layer.variance_epsilon)


def rotate(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864, halves layout): [tokens, heads, head_dim] by [tokens, 1, head_dim / 2]."""
    return _step(_rotate, tensor, cos, sin)(tensor, cos, sin)


def _silu(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.silu(F.linear(x, weight, bias))


def _times(x: Tensor, weight: Tensor, bias: Tensor | None, other: Tensor) -> Tensor:
    return F.linear(x, weight, bias).mul_(other)


def _plus(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    return F.linear(x, weight, bias).add_(residual)


def _norm(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(hidden, weight.shape, weight, epsilon)


def _rotate(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = tensor.shape[-1] // 2
    first, second = tensor[..., :half], tensor[..., half:]
    rotated = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    torch.mul(first, cos, out=rotated[..., :half]).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=rotated[..., half:]).addcmul_(first, sin)
    return rotated


def _rotate_for_compiler(tensor: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The same without writing into parts, which the compiler does itself."""
    first, second = tensor.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def _step(plain: Step, *by_token: Tensor) -> Step:
    """A step, compiled if it is to be, and then for any number of tokens: the first dimension of `by_token`, and no other, may change."""
    found = _compiled.get(plain)
    if found is None or len(by_token[0]) < _MIN_COMPILED_TOKENS:
        return plain
    for tensor in by_token:
        torch._dynamo.mark_dynamic(tensor, 0)
    return found


@contextmanager
def compiled_steps(device: torch.device) -> Iterator[None]:
    """Within, every model of this process runs its steps compiled, each when it is first met with new widths.

    Other numbers of tokens compile nothing. Raises SettingsInvalid when this machine cannot compile.
    """
    try:
        steps = _compile(device)
    except Exception as error:  # of dynamo, inductor, triton, the C++ compiler or the file system
        raise SettingsInvalid(f"PUNCHLINE_COMPILE: this machine cannot compile for {device} ({_reason(error)})") from None
    _compiled.update(steps)
    try:
        yield
    finally:
        _compiled.clear()


@torch.inference_mode()
def _compile(device: torch.device) -> dict[Step, Step]:
    """Every step's compiled form; the smallest norm shows that all a compiler needs is there."""
    bodies: dict[Step, Step] = {_silu: _silu, _times: _times, _plus: _plus, _norm: _norm, _rotate: _rotate_for_compiler}
    # dynamic=False: nothing but what `_step` marks may change. A kernel for all widths would fit those of another as well, and
    # which of two that fit is taken depends on what ran last. No processes of the compiler's own: they would stay.
    options: dict[str, Any] = {"compile_threads": 1}
    steps = {plain: torch.compile(body, dynamic=False, fullgraph=True, options=options) for plain, body in bodies.items()}
    hidden, weight = torch.linspace(-1, 1, 32, device=device).view(4, 8), torch.ones(8, device=device)
    if not torch.allclose(steps[_norm](hidden, weight, 1e-6), _norm(hidden, weight, 1e-6), atol=1e-5):
        raise RuntimeError("what it compiles computes something else")
    return steps


def _reason(error: Exception) -> str:
    """What is at fault in one line; torch wraps it into its own error, whose first line only says so."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip() and not line.endswith(" raised:")]
    return lines[0][:_MAX_REASON] if lines else type(error).__name__


def can_prepack(linear: nn.Module) -> bool:
    """Whether a layer is a plain matrix on a CPU that oneDNN has kernels for."""
    if type(linear) is not nn.Linear or linear.weight.device.type != "cpu" or linear.weight.dtype not in _PREPACKED_DTYPES:
        return False
    return _works(linear.weight.dtype)


@cache
def _has_amx() -> bool:
    """Whether this processor has AMX, where oneDNN's kernels for a product and what follows are slower than both steps, SiLU's by far."""
    return bool(torch.cpu._is_amx_tile_supported())


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


def prepack(*modules: nn.Module) -> int:
    """Replace every plain linear layer below the modules by its prepacked form, one at a time; returns how many forms there are.

    Layers of several modules with one weight get one form. Each weight is freed before the next is packed, so memory grows by the
    largest of them and no more; the pages of one that lies in a mapped file are given back.
    """
    mapped = MappedFiles()
    places = _places_of_weights(modules)
    for same in places:
        parent, child = same[0]
        linear: Any = parent.get_submodule(child)
        prepacked = PrepackedLinear(linear)
        for parent, child in same:
            setattr(parent, child, prepacked)
        mapped.forget(linear.weight.data_ptr(), linear.weight.nbytes)
        del linear
    gc.collect()
    return len(places)


def _places_of_weights(modules: Sequence[nn.Module]) -> list[list[tuple[nn.Module, str]]]:
    """For each weight and bias that can be prepacked, the parents of its layers and the layers' names there."""
    places: dict[tuple[int, int], list[tuple[nn.Module, str]]] = {}
    for module in modules:
        for name, layer in module.named_modules():
            if name and can_prepack(layer):
                parent, _, child = name.rpartition(".")
                places.setdefault((id(layer.weight), id(layer.bias)), []).append((module.get_submodule(parent), child))
    return list(places.values())
