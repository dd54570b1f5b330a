"""Bases of several models in one process: each in memory once, under as many trees of modules as there are models on it."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch

from app.artifacts import Artifact, base_sha256
from app.bases import fitting_backbone
from app.hardware import free_bytes

Free = Callable[[torch.device], int | None]  # memory that is left there


class SharedBases:
    """Loads the bases of artifacts that are served together. Let go of it before the weights are packed, or they stay in memory twice."""

    def __init__(self, artifacts: Sequence[Artifact]) -> None:
        """Reads the whole of every base, to tell which are the same."""
        paths = [artifact.base_path.resolve() for artifact in artifacts]
        self._digests = {path: base_sha256(path) for path in set(paths)}
        self._num_models = Counter(self._digests[path] for path in paths)
        self._loaded: dict[tuple[str, torch.dtype, torch.device], Any] = {}

    def digest(self, artifact: Artifact) -> str:
        """SHA-256 of an artifact's base."""
        return self._digests[artifact.base_path.resolve()]

    def is_shared(self, artifact: Artifact) -> bool:
        """Whether another artifact stands on the same base."""
        return self._num_models[self.digest(artifact)] > 1

    def take(self, artifact: Artifact, dtype: torch.dtype, device: torch.device, free: Free = free_bytes) -> Any:
        """A tree of modules of the artifact's own, on the device, with the weights of everybody who took this base.

        Weights must not be changed in place: an adapter is put beside them. Raises ArtifactInvalid.
        """
        key = (self.digest(artifact), dtype, device)
        if key not in self._loaded:
            backbone = fitting_backbone(artifact, dtype, device, free(device)).requires_grad_(False)
            # here, and not tree by tree: a buffer that moves is another one
            self._loaded[key] = backbone.to(device) if device.type == "cuda" else backbone
        return with_same_weights(self._loaded[key])


def with_same_weights(backbone: Any) -> Any:
    """A copy of the modules around the very same parameters and buffers."""
    return copy.deepcopy(backbone, {id(tensor): tensor for tensor in chain(backbone.parameters(), backbone.buffers())})
