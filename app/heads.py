"""Scalar heads: the last hidden state to one number, computed in float32. Knows their files, and what must be refused."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from app.artifacts import HeadSpec
from app.errors import ArtifactInvalid

log = logging.getLogger("punchline")
_ACTIVATIONS: dict[str, type[nn.Module]] = {"silu": nn.SiLU, "gelu": nn.GELU, "relu": nn.ReLU, "tanh": nn.Tanh}


class Head(nn.Module, ABC):
    """One number a row, in float32 whatever the backbone's format (bf16 scores tie within a group).

    A bias of the last layer moves all scores of a model alike: margins and win probabilities do not see it.
    """

    def __init__(self, spec: HeadSpec, in_features: int) -> None:
        super().__init__()
        self.spec = spec
        self.in_features = in_features

    @property
    @abstractmethod
    def stack(self) -> nn.Module:
        """The layers, whose state has the names of the file."""

    @property
    @abstractmethod
    def last(self) -> nn.Linear:
        """The layer that gives the score."""

    @property
    def device(self) -> torch.device:
        return self.last.weight.device

    def forward(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] of any float format to [rows] float32; autocast is kept out."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.stack(hidden.float()).squeeze(-1)  # type: ignore[no-any-return]


class LinearHead(Head):
    """score = weight @ hidden, plus a bias where the spec has one."""

    def __init__(self, hidden_size: int, *, bias: bool = False) -> None:
        super().__init__(HeadSpec(bias=bias), hidden_size)
        self.linear = nn.Linear(hidden_size, 1, bias=bias, dtype=torch.float32)
        _start_at_zero(self.linear)

    @property
    def stack(self) -> nn.Module:
        return self.linear

    @property
    def last(self) -> nn.Linear:
        return self.linear


class TwoLayerHead(Head):
    """score = last(activation(first(hidden))). Only the last layer begins at zero: with both there the gradient of each would be zero."""

    def __init__(self, hidden_size: int, spec: HeadSpec) -> None:
        super().__init__(spec, hidden_size)
        if spec.width is None:
            raise ValueError("a two_layer head needs its width")
        first = nn.Linear(hidden_size, spec.width, bias=spec.bias, dtype=torch.float32)
        last = nn.Linear(spec.width, 1, bias=spec.bias, dtype=torch.float32)
        _start_at_zero(last)
        self.layers = nn.Sequential(first, _ACTIVATIONS[spec.activation](), last)

    @property
    def stack(self) -> nn.Module:
        return self.layers

    @property
    def last(self) -> nn.Linear:
        return cast(nn.Linear, self.layers[-1])


def new_head(spec: HeadSpec, hidden_size: int) -> Head:
    """A head that scores everything 0, so that training starts at ln 2; a first layer is drawn from torch's generator."""
    return LinearHead(hidden_size, bias=spec.bias) if spec.layers == "linear" else TwoLayerHead(hidden_size, spec)


def head_spec_of(tensors: Mapping[str, Tensor], where: str = "head") -> HeadSpec:
    """Layers, bias and width by names and shapes. The activation cannot be seen in them: the caller must know it, or say it was assumed.

    Raises ArtifactInvalid for names of neither sort of head.
    """
    names = set(tensors)
    sorts: dict[Literal["linear", "two_layer"], set[str]] = {"linear": {"weight"}, "two_layer": {"0.weight", "2.weight"}}
    for layers, weights in sorts.items():
        biases = {name.replace("weight", "bias") for name in weights}
        if names in (weights, weights | biases):
            return HeadSpec(layers=layers, bias=names != weights, width=None if layers == "linear" else _width(tensors["0.weight"], where))
    raise ArtifactInvalid(f"{where}: expected the tensors of a linear or of a two-layer head, found {_names(tensors)}")


def head_from(tensors: Mapping[str, Tensor], spec: HeadSpec, shape: tuple[int, int], where: str) -> Head:
    """The head of `weight`, `bias`, or of `0.weight`, `0.bias`, `2.weight`, `2.bias` as nn.Sequential names them; shape is [1, hidden].

    Raises ArtifactInvalid with `where`, the expected and the found, for any tensor that is missing, unknown, of another shape, not
    finite in float32, and for a layer all zero.
    """
    if shape[0] != 1 or shape[1] < 1:
        raise ArtifactInvalid(f"{where}: expected a head with one row, [1, hidden], found the shape {list(shape)}")
    with torch.device("meta"):  # nothing is drawn or allocated for a size that the tensors may not have
        head = new_head(spec, shape[1])
    own = head.stack.state_dict()
    if set(tensors) != set(own):
        expected = "the one tensor 'weight'" if len(own) == 1 else f"the tensors {sorted(own)}"
        raise ArtifactInvalid(f"{where}: expected {expected}, found {_names(tensors)}")
    checked = {name: _checked(name, tensors[name], tuple(own[name].shape), where) for name in own}
    head.stack.load_state_dict(checked, assign=True)
    return head


def load_head(path: Path, shape: tuple[int, int], spec: HeadSpec | None = None) -> Head:
    """Read `reward_head.safetensors`, or the published `reward_head.pt` without running any pickled code; a linear one without spec.

    Raises ArtifactInvalid naming the file, the expected and the found.
    """
    return head_from(_read(path), spec or HeadSpec(), shape, str(path))


def save_head(head: Head, path: Path) -> None:
    """Write the layers' tensors as float32 safetensors; of a linear head without bias `{"weight": [1, hidden]}`."""
    save_file({name: tensor.detach().float().cpu().contiguous() for name, tensor in head.stack.state_dict().items()}, path)


def _start_at_zero(last: nn.Linear) -> None:
    for parameter in last.parameters():
        nn.init.zeros_(parameter)


def _checked(name: str, tensor: Tensor, shape: tuple[int, ...], where: str) -> Tensor:
    """The tensor in float32, or a refusal. A bias may be zero, a weight that is gives every caption the same score."""
    if tuple(tensor.shape) != shape:
        rows = " with one row" if len(shape) == 2 and shape[0] == 1 else ""
        raise ArtifactInvalid(f"{where}: expected {name} {list(shape)}{rows}, found {list(tensor.shape)}")
    if not tensor.is_floating_point() or tensor.layout != torch.strided:
        raise ArtifactInvalid(f"{where}: expected floating-point {name}, found {tensor.dtype} ({tensor.layout})")
    exact = tensor.detach().float()  # checked as it will be used: float64 may leave the range of float32 at either end
    if not torch.isfinite(exact).all():
        raise ArtifactInvalid(f"{where}: {name} is not finite")
    if name.endswith("weight") and not exact.any():
        raise ArtifactInvalid(f"{where}: {name} is all zero; every caption would score the same")
    return exact.clone(memory_format=torch.contiguous_format)  # of its own: the file may still be mapped


def _width(first: Tensor, where: str) -> int:
    if first.ndim != 2 or not first.numel():
        raise ArtifactInvalid(f"{where}: expected 0.weight [width, hidden], found {list(first.shape)}")
    return first.shape[0]


def _names(tensors: Mapping[str, Tensor]) -> str:
    return str(sorted(map(str, tensors)) or "none")


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        log.warning("%s: a pickled head, read without running its code; `punchline convert` rewrites it as safetensors", path)
    except (OSError, SafetensorError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ArtifactInvalid(f"{path}: cannot be read ({type(error).__name__})") from None
    except Exception as error:  # weights_only refuses with pickle.UnpicklingError and others
        raise ArtifactInvalid(f"{path}: refused to unpickle ({type(error).__name__})") from None
    if not isinstance(loaded, dict) or not all(isinstance(value, Tensor) for value in loaded.values()):
        raise ArtifactInvalid(f"{path}: expected a dictionary of tensors, found {type(loaded).__name__}")
    return loaded
