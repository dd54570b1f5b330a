"""Base models on disk: families whose forward we know, names of weights old and new, loaded with every weight accounted for."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModel

from app.artifacts import Artifact
from app.encoding import FAMILIES
from app.errors import ArtifactInvalid

UNUSED_BASE_KEYS = {"lm_head.weight"}
# Names within a whole model, old (`visual`, `model`) and new (`model.visual`, `model.language_model`), to those within the backbone; the
# first that matches counts. transformers 5.23 takes `model.visual` of a base for a part of the language model; peft knows none of them.
_OLD_AND_NEW = {r"^model\.visual\.": "visual.", r"^model\.language_model\.": "language_model.", r"^model\.": "language_model."}
_WHOLE_MODEL = {r"^model\.": ""}  # families that never had other names
BACKBONE_NAMES = {
    "qwen2_5_vl": _OLD_AND_NEW,
    "qwen2_vl": _OLD_AND_NEW,
    "qwen3_vl": _WHOLE_MODEL,
    "qwen2": _WHOLE_MODEL,
    "qwen3": _WHOLE_MODEL,
}
_VISION_ACTIVATIONS = {"qwen2_5_vl": "silu", "qwen2_vl": "quick_gelu", "qwen3_vl": "gelu_pytorch_tanh"}
_NUM_NAMED = 3  # keys that a refusal names
_MAX_REASON = 300  # characters of a library's own words
_GROWING_ROPES = ("dynamic", "longrope")  # their frequencies depend on the length of the whole


def load_backbone(artifact: Artifact, dtype: torch.dtype) -> Any:
    """The base without language-model head, every weight accounted for."""
    path = artifact.base_path
    config = read_base_config(path)
    key_mapping = _key_mapping(path, config.model_type)
    unused = UNUSED_BASE_KEYS | head_keys(artifact)
    try:
        backbone, info = AutoModel.from_pretrained(
            path,
            config=config,
            dtype=dtype,
            attn_implementation="sdpa",
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            key_mapping=key_mapping,
            output_loading_info=True,
        )
    except Exception as error:  # whatever the libraries raise, the base is at fault
        raise ArtifactInvalid(f"{path}: base model cannot be loaded ({reason_of(error)})") from None
    for fault in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"):
        if found := sorted(map(str, set(map(_name, info.get(fault, ()))) - unused)):
            raise ArtifactInvalid(f"{path}: {len(found)} {fault.replace('_', ' ')} in the base weights, first {first_of(found)}")
    return backbone


def fitting_backbone(artifact: Artifact, dtype: torch.dtype, place: torch.device, free: int | None) -> Any:
    """`load_backbone`, for a device with `free` bytes, None where nobody tells. Raises ArtifactInvalid, with both numbers, before it reads.

    A system that runs out of memory would kill this process without a word.
    """
    needed = weights_bytes(artifact.base_path, dtype, UNUSED_BASE_KEYS | head_keys(artifact))
    if free is not None and needed > free:
        raise ArtifactInvalid(f"{artifact.base_path}: {_gib(needed)} of weights in {dtype}, {place} has {_gib(free)} of memory left")
    return load_backbone(artifact, dtype)


def weights_bytes(path: Path, dtype: torch.dtype, unused: Collection[str] = UNUSED_BASE_KEYS) -> int:
    """What the weights of a base take in a number format, from the headers of its files. Raises ArtifactInvalid."""
    count = 0
    for shard in shards(path):
        try:
            with safe_open(shard, framework="pt") as stream:
                shapes = [stream.get_slice(name).get_shape() for name in stream.keys() if name not in unused]  # noqa: SIM118 (no mapping)
        except Exception as error:
            raise ArtifactInvalid(f"{shard}: cannot be read ({reason_of(error)})") from None
        count += sum(torch.Size(shape).numel() for shape in shapes)
    return count * dtype.itemsize


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"


def head_keys(artifact: Artifact) -> set[str]:
    """Names that a head has among the weights of its base: of a sequence-classification checkpoint."""
    layout = artifact.layout
    return {f"{layout.head_prefix}{name}" for name in ("weight", "bias")} if layout.head is None and layout.head_prefix else set()


def read_head_tensors(artifact: Artifact) -> dict[str, Tensor]:
    """The tensors of a head that lies among others, by their bare names. Raises ArtifactInvalid."""
    prefix = artifact.layout.head_prefix
    tensors = {}
    for path in [artifact.head_path] if artifact.layout.head is not None else shards(artifact.base_path):
        for name in tensor_names(path):
            if name.startswith(prefix):
                with safe_open(path, framework="pt") as stream:
                    tensors[name.removeprefix(prefix)] = stream.get_tensor(name)
    return tensors


def _key_mapping(path: Path, family: str) -> dict[str, str] | None:
    """What transformers must be told of the names in a base, None where it knows them itself. Raises ArtifactInvalid for double ones."""
    names_of = {shard: tensor_names(shard) for shard in sorted(path.glob("*.safetensors"))}
    names = [name for shard in shards(path) for name in names_of.get(shard, ())]
    refuse_doubles(path, [backbone_name(name, family) for name in names])
    return BACKBONE_NAMES[family] if any(name.startswith("model.visual.") for name in names) else None


def shards(path: Path) -> list[Path]:
    """The files that transformers reads: the one whole file if there is one, else those the index names."""
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        return [whole] if whole.exists() else sorted(path.glob("*.safetensors"))
    try:
        found = sorted(set(json.loads(index.read_bytes())["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise ArtifactInvalid(f"{index}: cannot be read as an index of weights") from None
    return [path / str(name) for name in found]


def backbone_name(name: str, family: str) -> str:
    """A weight's name within the backbone, whichever of its published names it has on disk."""
    for pattern, replacement in BACKBONE_NAMES[family].items():
        renamed, matched = re.subn(pattern, replacement, name)
        if matched:
            return renamed
    return name


def refuse_doubles(path: Path, names: Sequence[str]) -> None:
    """One of two weights for the same place would be dropped, and nobody could say which."""
    if double := sorted(name for name, times in Counter(names).items() if times > 1):
        raise ArtifactInvalid(f"{path}: {len(double)} weights under two names, first {first_of(double)}")


def first_of(names: Collection[str]) -> str:
    return ", ".join(sorted(names)[:_NUM_NAMED])


def read_base_config(path: Path) -> Any:
    """The base's configuration, of a family whose forward we know and without tricks that change it."""
    name = path / "config.json"
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ArtifactInvalid(f"{name}: cannot be read ({reason_of(error)})") from None
    if config.model_type not in FAMILIES:
        raise ArtifactInvalid(f"{name}: expected one of {FAMILIES}, found {config.model_type!r}")
    if getattr(config, "quantization_config", None) is not None:
        raise ArtifactInvalid(f"{name}: expected full-precision weights, found a quantised base")
    text = config.get_text_config()
    if any(kind != "full_attention" for kind in getattr(text, "layer_types", None) or ()):  # Qwen3-VL knows no other kind
        raise ArtifactInvalid(f"{name}: expected full attention in every layer, found sliding windows")
    activations = [(text, "silu")]
    if config.model_type in _VISION_ACTIVATIONS:
        activations.append((config.vision_config, _VISION_ACTIVATIONS[config.model_type]))
    for part, expected in activations:
        if part.hidden_act != expected:
            raise ArtifactInvalid(f"{name}: expected hidden_act {expected!r}, found {part.hidden_act!r}")
    if (rope := text.rope_parameters["rope_type"]) in _GROWING_ROPES:
        raise ArtifactInvalid(f"{name}: rope_type {rope!r} makes a prefix depend on what follows it; expected one with fixed frequencies")
    return config


def tensor_names(path: Path) -> list[str]:
    """Names in a safetensors file. Raises ArtifactInvalid for one that is cut off or no safetensors at all."""
    try:
        with safe_open(path, framework="pt") as stream:
            return sorted(stream.keys())
    except Exception as error:
        raise ArtifactInvalid(f"{path}: cannot be read ({reason_of(error)})") from None


def _name(key: Any) -> str:
    return str(key[0]) if isinstance(key, tuple) else str(key)


def reason_of(error: Exception) -> str:
    """What a library's error says, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((line for line in lines if "mismatch" in line and "torch.Size" in line), lines[0] if lines else "")
    return f"{type(error).__name__}: {line[:_MAX_REASON]}" if line else type(error).__name__
