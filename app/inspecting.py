"""What a folder is and what would stop it from being served, found from names, shapes and JSON: no weight is read.

Every check runs, whatever the ones before it found; a server stops at the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from peft import LoraConfig, PeftModel
from transformers import AutoModel

from app.adapters import adapter_config, as_trained, check_adapter, peft_name, without_head
from app.artifacts import Artifact, Hub, RewardModelConfig, base_of, check_hashes, check_layout, find_artifact, read_config
from app.bases import UNUSED_BASE_KEYS, backbone_name, first_of, head_keys, read_base_config, shards
from app.encoding import load_encoder
from app.errors import ArtifactInvalid
from app.heads import new_head
from app.layouts import ADAPTER_WEIGHTS_NAME, LAYOUTS, tensor_shapes

_Found = TypeVar("_Found")


@dataclass(slots=True)
class Inspection:
    """What was found, and everything that would stop a server."""

    path: Path | None = None
    config: RewardModelConfig | None = None
    assumed: tuple[str, ...] = ()
    stops: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For people and programs."""
        shown: dict[str, Any] = {"path": None if self.path is None else str(self.path)}
        if self.config is not None:
            shown |= {"what": LAYOUTS[self.config.kind].said, **self.config.model_dump(mode="json"), "assumed": list(self.assumed)}
        return shown | {"stops": self.stops}

    def holding(self, check: Callable[[], _Found]) -> _Found | None:
        """What a check gives, or None with its refusal among the stops."""
        try:
            return check()
        except ArtifactInvalid as error:
            if str(error) not in self.stops:
                self.stops.append(str(error))
            return None


def inspect_artifact(
    model: str, *, base_model: str | None = None, offline: bool = False, said: Mapping[str, Any] | None = None
) -> Inspection:
    """Look at an artifact, a published reward model, or what is neither. Raises nothing for what is wrong with it."""
    found, hub = Inspection(), Hub(offline)
    root = found.path = found.holding(lambda: find_artifact(model, hub))
    if root is None or (read := found.holding(lambda: read_config(root, said or {}))) is None:
        return found
    config, guessed = read
    found.config, found.assumed = config, tuple(guessed)
    found.holding(lambda: check_layout(root, config))
    found.holding(lambda: check_hashes(root, config))
    base = found.holding(lambda: base_of(root, config, base_model, hub))
    if base is None:
        return found
    artifact = Artifact(root, config, base, ())
    for check in (Artifact.golden, load_encoder, _check_head):
        found.holding(lambda check=check: check(artifact))  # type: ignore[misc]
    backbone = found.holding(lambda: _outlined(artifact))
    if backbone is not None:
        found.holding(lambda: _check_base(artifact, backbone))
        if artifact.has_adapter:
            found.holding(lambda: _check_adapter(artifact, backbone))
    return found


def _outlined(artifact: Artifact) -> Any:
    """The backbone with shapes and no weights."""
    config = read_base_config(artifact.base_path)
    with torch.device("meta"):
        return AutoModel.from_config(config)


def _check_base(artifact: Artifact, backbone: Any) -> None:
    """Names and shapes of the weights against those that the base's configuration asks for. Raises ArtifactInvalid."""
    path, family = artifact.base_path, backbone.config.model_type
    shapes = {name: shape for shard in shards(path) for name, shape in tensor_shapes(shard).items()}
    found = {backbone_name(name, family): shape for name, shape in shapes.items() if name not in UNUSED_BASE_KEYS | head_keys(artifact)}
    _compare(path, "base weights", {name: list(each.shape) for name, each in backbone.state_dict().items()}, found)


def _check_adapter(artifact: Artifact, backbone: Any) -> None:
    """Names and shapes of the adapter against those that its configuration makes of the base. Raises ArtifactInvalid."""
    adapter_config(artifact)
    path = artifact.adapter_path
    with torch.device("meta"):
        try:
            adapted = PeftModel(as_trained(backbone, artifact), without_head(LoraConfig.from_pretrained(str(path))), adapter_name="default")
        except (ValueError, TypeError, KeyError) as error:
            raise ArtifactInvalid(f"{path}: adapter does not fit the base ({type(error).__name__}: {error})") from None
    check_adapter(adapted, artifact)
    ranks = {name.replace(".default", ""): list(each.shape) for name, each in adapted.state_dict().items() if ".lora_" in name}
    found = {
        peft_name(name, adapted, artifact): shape for name, shape in tensor_shapes(path / ADAPTER_WEIGHTS_NAME).items() if ".lora_" in name
    }
    _compare(path / ADAPTER_WEIGHTS_NAME, "adapter", ranks, found)


def _check_head(artifact: Artifact) -> None:
    """Names and shapes of a head's tensors against the configuration; a pickled head is not opened. Raises ArtifactInvalid."""
    layout, shape = artifact.layout, list(artifact.config.score_head_shape)
    hidden = read_base_config(artifact.base_path).get_text_config().hidden_size
    if shape != [1, hidden]:
        raise ArtifactInvalid(f"{artifact.head_path}: expected score_head_shape [1, {hidden}] for this base, found {shape}")
    if artifact.head_path.suffix == ".pt":
        return
    files = [artifact.head_path] if artifact.head_path.suffix else shards(artifact.base_path)
    shapes = {name: each for path in files for name, each in tensor_shapes(path).items() if name.startswith(layout.head_prefix)}
    with torch.device("meta"):
        wanted = new_head(artifact.config.head, hidden).stack.state_dict()
    _compare(artifact.head_path, "head", {layout.head_prefix + name: list(each.shape) for name, each in wanted.items()}, shapes)


def _compare(path: Path, what: str, expected: Mapping[str, list[int]], found: Mapping[str, list[int]]) -> None:
    for fault, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            raise ArtifactInvalid(f"{path}: {len(names)} {fault} keys in the {what}, first {first_of(names)}")
    if wrong := sorted(name for name in expected if expected[name] != found[name]):
        raise ArtifactInvalid(f"{path}: {wrong[0]} is {found[wrong[0]]}, expected {expected[wrong[0]]}")
