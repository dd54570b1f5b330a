"""Scalar heads: the last hidden state to one number, computed in float32."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from app.errors import ArtifactInvalid

log = logging.getLogger("punchline")


class LinearHead(nn.Module):
    """score = weight @ hidden, without bias; float32 whatever the backbone's format (bf16 scores tie within a group)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, 1, bias=False, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)  # training starts at loss ln 2

    def forward(self, hidden: Tensor) -> Tensor:
        """[rows, hidden] of any float format to [rows] float32; autocast is kept out."""
        with torch.autocast(hidden.device.type, enabled=False):
            return self.linear(hidden.float()).squeeze(-1)  # type: ignore[no-any-return]


def load_head(path: Path, shape: tuple[int, int]) -> LinearHead:
    """Read `reward_head.safetensors`, or the published `reward_head.pt` without running any pickled code.

    Raises ArtifactInvalid naming the file, the expected and the found.
    """
    tensors = _read(path)
    if set(tensors) != {"weight"}:
        raise ArtifactInvalid(f"{path}: expected the one tensor 'weight', found {sorted(map(str, tensors)) or 'none'}")
    weight = tensors["weight"]
    if tuple(weight.shape) != shape or shape[0] != 1:
        raise ArtifactInvalid(f"{path}: expected weight {list(shape)} with one row, found {list(weight.shape)}")
    if not weight.is_floating_point():
        raise ArtifactInvalid(f"{path}: expected floating-point weight, found {weight.dtype}")
    if not torch.isfinite(weight).all():
        raise ArtifactInvalid(f"{path}: weight is not finite")
    if not weight.any():
        raise ArtifactInvalid(f"{path}: weight is all zero; every caption would score the same")
    head = LinearHead(shape[1])
    with torch.no_grad():
        head.linear.weight.copy_(weight.float())
    return head


def save_head(head: LinearHead, path: Path) -> None:
    """Write `{"weight": [1, hidden]}` as float32 safetensors."""
    save_file({"weight": head.linear.weight.detach().float().cpu().contiguous()}, path)


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
