"""LoRA adapters on disk: plain ones only, every tensor in its place, merged into the base or beside it."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import nn

from app.artifacts import Artifact
from app.bases import BACKBONE_NAMES, backbone_name, first_of, reason_of, refuse_doubles, tensor_names
from app.errors import ArtifactInvalid
from app.layouts import ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME

_PEFT_PREFIX = "base_model.model."
_HARMLESS_INITS = (True, False, "gaussian", "orthogonal", "eva")  # the others change the base's weights as well
_HEADS_OF_SEQ_CLS = {"classifier", "score"}  # what peft adds to modules_to_save for that task
_LORA_KEYS = (".lora_A.weight", ".lora_B.weight")


def checked_adapter(artifact: Artifact) -> dict[str, Any]:
    """The adapter's configuration; configuration and tensors were looked at."""
    config = adapter_config(artifact)
    _check_adapter_file(artifact.adapter_path / ADAPTER_WEIGHTS_NAME)
    return config


def adapter_config(artifact: Artifact) -> dict[str, Any]:
    """`adapter_config.json` of a plain LoRA; what peft would ignore or what changes the base is refused."""
    path = artifact.adapter_path / ADAPTER_CONFIG_NAME
    try:
        config = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactInvalid(f"{path}: cannot be read ({reason_of(error)})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ArtifactInvalid(f"{path}: expected peft_type 'LORA', found {found!r}")
    if config.get("init_lora_weights", True) not in _HARMLESS_INITS:
        raise ArtifactInvalid(
            f"{path}: init_lora_weights {config['init_lora_weights']!r} changes the base; convert the adapter to plain LoRA"
        )
    known = {field.name for field in fields(LoraConfig)}
    if unknown := sorted(name for name, value in config.items() if name not in known and value):
        raise ArtifactInvalid(f"{path}: peft {version('peft')} does not know {', '.join(unknown)}")
    return config


def _check_adapter_file(path: Path) -> None:
    """Every tensor readable, finite and not all zero."""
    names = tensor_names(path)
    if not names:
        raise ArtifactInvalid(f"{path}: holds no tensors")
    with safe_open(path, framework="pt") as stream:
        for name in names:
            tensor = stream.get_tensor(name)
            if not torch.isfinite(tensor).all():
                raise ArtifactInvalid(f"{path}: {name} is not finite")
            if ".lora_" in name and not tensor.any():
                raise ArtifactInvalid(f"{path}: {name} is all zero; this adapter changes nothing there and was not trained")


def with_adapter(backbone: Any, artifact: Artifact, *, merge: bool) -> Any:
    """The backbone with the artifact's adapter in it, or beside its layers. Raises ArtifactInvalid for one that does not fit."""
    path = artifact.adapter_path
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found missing adapter keys")  # a refusal in `check_adapter`
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft 0.21 asks transformers 5.23 so
            peft_model = PeftModel.from_pretrained(
                as_trained(backbone, artifact),
                str(path),
                adapter_name="default",
                is_trainable=False,
                config=without_head(LoraConfig.from_pretrained(str(path))),
                key_mapping=None if _is_classifier(artifact) else BACKBONE_NAMES[backbone.config.model_type],
            )
    except ArtifactInvalid as error:
        raise ArtifactInvalid(f"{path / ADAPTER_CONFIG_NAME}: {error}") from None
    except Exception as error:
        raise ArtifactInvalid(f"{path}: adapter does not fit the base ({reason_of(error)})") from None
    check_adapter(peft_model, artifact)
    # peft holds the adapter in float32, so merging sums in float32 and rounds once to the base's format; a test proves it
    adapted = peft_model.merge_and_unload() if merge else peft_model.get_base_model()
    return adapted.model if _is_classifier(artifact) else adapted


class _Classifier(nn.Module):
    """A backbone where transformers' sequence classifiers have it: names and patterns of an adapter mean what they meant in training."""

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.model = backbone
        self.config = backbone.config


def as_trained(backbone: Any, artifact: Artifact) -> Any:
    """The module whose names the adapter of an artifact was trained on, but for a head."""
    return _Classifier(backbone) if _is_classifier(artifact) else backbone


def _is_classifier(artifact: Artifact) -> bool:
    return artifact.config.kind == "seq_cls_adapter"


def without_head(config: LoraConfig) -> LoraConfig:
    """For the base without its head: the head of a SEQ_CLS adapter, which peft saves with it, is read apart."""
    if others := sorted(set(config.modules_to_save or ()) - _HEADS_OF_SEQ_CLS):
        raise ArtifactInvalid(f"modules_to_save {', '.join(others)}: expected plain LoRA, and at most its head beside it")
    config.task_type = config.modules_to_save = None
    return config


def check_adapter(peft_model: PeftModel, artifact: Artifact) -> None:
    """PEFT only warns about missing keys and says nothing of others; here each is a refusal."""
    path = artifact.adapter_path / ADAPTER_WEIGHTS_NAME
    apart = artifact.layout.head_prefix
    in_file = (name for name in tensor_names(path) if not apart or not name.startswith(apart))
    names = [peft_name(name, peft_model, artifact) for name in in_file]
    refuse_doubles(path, names)
    expected, found = set(get_peft_model_state_dict(peft_model, save_embedding_layers=False)), set(names)
    for what, wrong in (("missing", expected - found), ("unexpected", found - expected)):
        if wrong:
            raise ArtifactInvalid(f"{path}: {len(wrong)} {what} adapter keys, first {first_of(wrong)}")
    _check_patterns(peft_model, artifact)
    strange = [name for name in expected if not name.endswith(_LORA_KEYS)]
    layers = [module for module in peft_model.modules() if isinstance(module, LoraLayer)]
    if strange or any(type(layer) is not LoraLinear or layer.lora_variant for layer in layers):
        raise ArtifactInvalid(f"{path}: expected plain LoRA on linear layers, found {min(strange, default='a variant of it')}")


def peft_name(name: str, peft_model: PeftModel, artifact: Artifact) -> str:
    """What an adapter's tensor is called in memory, whichever of its published names it has on disk."""
    if _is_classifier(artifact):
        return name
    return _PEFT_PREFIX + backbone_name(name.removeprefix(_PEFT_PREFIX), peft_model.get_base_model().config.model_type)


def _check_patterns(peft_model: PeftModel, artifact: Artifact) -> None:
    """A rank or an alpha for layers that are none does nothing, of which peft only warns."""
    config, names = peft_model.peft_config["default"], [name for name, each in peft_model.named_modules() if isinstance(each, LoraLayer)]
    for what in ("rank_pattern", "alpha_pattern"):
        for pattern in getattr(config, what) or {}:
            if not any(re.match(rf"(.*\.)?({pattern})$", name.removeprefix(_PEFT_PREFIX)) for name in names):
                raise ArtifactInvalid(f"{artifact.adapter_path / ADAPTER_CONFIG_NAME}: {what} for {pattern!r}, which is no layer with LoRA")
