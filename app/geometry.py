"""Shapes of published Qwen2.5-VL models, artifacts with random weights in them, and the padded batch everybody starts with.

Knows nothing of speed: it makes what `punchline bench` and `training.bench` measure.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from app.artifacts import CONFIG_NAME, DEMO_PATH, HEAD_NAME, PROCESSOR_NAME, RewardModelConfig, write_config
from app.contracts import EncodedImage, Ids
from app.errors import ArtifactInvalid

_BLOCK = 4_194_301  # random numbers drawn for one matrix and repeated; prime, so that no two rows are equal
SHARD_BYTES = 1 << 30
_SCALE = 0.8  # of 1/sqrt(fan in): hidden states neither vanish nor explode over 36 layers
_MIN_PIXELS, _MAX_PIXELS = 3136, 12_845_056  # of the published processor
_SPECIAL_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shapes of a Qwen2.5-VL; the defaults are those of 3B with its layers counted by the caller."""

    layers: int
    vision_layers: int
    hidden: int = 2048
    heads: int = 16
    kv_heads: int = 2
    intermediate: int = 11008
    vocabulary: int = 151936
    vision_hidden: int = 1280
    vision_heads: int = 16
    vision_intermediate: int = 3420
    mrope_section: tuple[int, int, int] = (16, 24, 24)
    tied: bool = True  # no language-model head of its own on disk

    @property
    def image_token_id(self) -> int:
        """Where a test puts it that makes its own tokens."""
        return self.vocabulary - 1

    def shortened(self, layers: int | None, vision_layers: int | None) -> Geometry:
        """Fewer layers of the same shape."""
        return replace(self, layers=layers or self.layers, vision_layers=vision_layers or self.vision_layers)


# https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct, config.json; table 1 of arXiv 2502.13923
GEOMETRIES = {
    "qwen2.5-vl-3b": Geometry(36, 32),
    "qwen2.5-vl-7b": Geometry(28, 32, hidden=3584, heads=28, kv_heads=4, intermediate=18944, vocabulary=152064, tied=False),
}


def base_config(geometry: Geometry, special_tokens: dict[str, int]) -> Qwen2_5_VLConfig:
    """The base's configuration; full attention in every eighth vision layer as published, in the last of a short tower."""
    return Qwen2_5_VLConfig(
        text_config={
            "hidden_size": geometry.hidden,
            "num_hidden_layers": geometry.layers,
            "num_attention_heads": geometry.heads,
            "num_key_value_heads": geometry.kv_heads,
            "intermediate_size": geometry.intermediate,
            "vocab_size": geometry.vocabulary,
            "max_position_embeddings": 128000,
            "rms_norm_eps": 1e-6,
            "bos_token_id": None,  # nothing is generated
            "eos_token_id": None,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(geometry.mrope_section)},
        },
        vision_config={
            "depth": geometry.vision_layers,
            "hidden_size": geometry.vision_hidden,
            "intermediate_size": geometry.vision_intermediate,
            "num_heads": geometry.vision_heads,
            "patch_size": 14,
            "temporal_patch_size": 2,
            "spatial_merge_size": 2,
            "window_size": 112,
            "out_hidden_size": geometry.hidden,
            "fullatt_block_indexes": [*range(7, geometry.vision_layers, 8)] or [geometry.vision_layers - 1],
        },
        tie_word_embeddings=geometry.tied,
        **special_tokens,
    )


def write_artifact(
    geometry: Geometry, root: Path, report: Callable[[float], None] = lambda share: None, *, shard_bytes: int = SHARD_BYTES
) -> Path:
    """A `full_head` artifact with random bfloat16 weights, which `punchline serve --model ROOT` serves; returns `root`.

    Tokenizer, chat template and image processor are the bundled demo's, the latter with the published size limits. `report`
    hears the share that is written. A folder that holds a whole artifact is left as it is.
    """
    if (root / CONFIG_NAME).exists():
        return root
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_base(geometry, partial / "base", report, shard_bytes)
    _write_processor(partial / PROCESSOR_NAME)
    generator = torch.Generator().manual_seed(1)
    save_file({"weight": torch.randn(1, geometry.hidden, generator=generator) / geometry.hidden**0.5}, partial / HEAD_NAME)
    names = {"base_model_name": "./base", "score_head_shape": (1, geometry.hidden), "kind": "full_head"}
    text = f"Random weights in the shapes of a Qwen2.5-VL with {geometry.layers} and {geometry.vision_layers} layers: for timing only."
    write_config(partial, RewardModelConfig.model_validate(names | {"description": text}))
    return partial.rename(root)


def check_room(folder: Path, num_bytes: int) -> None:
    """Before gigabytes are written. Raises ArtifactInvalid when the disk would be full before they are."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes:
        raise ArtifactInvalid(f"{folder}: {num_bytes / 2**30:.1f} GiB of random weights do not fit, {free / 2**30:.1f} GiB are free")


def pad_rows(rows: Sequence[Ids], images: Sequence[EncodedImage | None], image_token_id: int | None) -> dict[str, Tensor]:
    """What the published collator makes: every caption a row with its own picture, padded right. On the CPU."""
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)  # [rows, longest]
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = torch.from_numpy(row)
        mask[number, : len(row)] = 1
    batch = {"input_ids": ids, "attention_mask": mask}
    seen = [image for image in images if image is not None]
    if seen:
        batch["mm_token_type_ids"] = torch.eq(ids, -1 if image_token_id is None else image_token_id).int()
        batch["pixel_values"] = torch.from_numpy(np.concatenate([image.patches for image in seen]))
        batch["image_grid_thw"] = torch.tensor([image.grid_thw for image in seen])
    return batch


def _write_base(geometry: Geometry, path: Path, report: Callable[[float], None], shard_bytes: int) -> None:
    """Configuration and shards; never more than one shard in memory."""
    path.mkdir()
    demo = json.loads((DEMO_PATH / "base" / "config.json").read_bytes())
    config = base_config(geometry, {name: demo[name] for name in _SPECIAL_TOKENS})
    config.architectures, config.dtype = ["Qwen2_5_VLForConditionalGeneration"], "bfloat16"
    config.save_pretrained(path)
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    shapes = {_published_name(name): each.shape for name, each in model.named_parameters() if name != "lm_head.weight" or not geometry.tied}
    whole, done = 2 * sum(shape.numel() for shape in shapes.values()), 0
    places: dict[str, str] = {}
    check_room(path, whole)
    for number, shard in enumerate(_shards(shapes, shard_bytes), start=1):
        name = f"model-{number:05d}.safetensors"
        save_file(shard, path / name, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, name)
        done += sum(weight.nbytes for weight in shard.values())
        report(done / whole)
    index = {"metadata": {"total_size": whole}, "weight_map": places}
    (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def _published_name(name: str) -> str:
    """A weight's name on disk, which is older than transformers' own."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def _shards(shapes: dict[str, torch.Size], shard_bytes: int) -> Iterator[dict[str, Tensor]]:
    """Weights in groups of at least so many bytes; each is the caller's only copy."""
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        shard[name] = _weight(name, shape, generator)
        if sum(weight.nbytes for weight in shard.values()) >= shard_bytes:
            yield shard
            shard = {}
    if shard:
        yield shard


def _weight(name: str, shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Norms one, biases zero, matrices random: a block of numbers repeated, since drawing billions takes minutes."""
    if len(shape) == 1:
        return torch.full(shape, 0.0 if name.endswith("bias") else 1.0, dtype=torch.bfloat16)
    count, fan_in = shape.numel(), math.prod(shape[1:])
    block = (torch.randn(min(count, _BLOCK), generator=generator) * (_SCALE / fan_in**0.5)).to(torch.bfloat16)
    weight = torch.empty(count, dtype=torch.bfloat16)
    for start in range(0, count, len(block)):
        weight[start : start + len(block)] = block[: count - start]
    return weight.view(shape)


def _write_processor(path: Path) -> None:
    shutil.copytree(DEMO_PATH / PROCESSOR_NAME, path)
    name = path / "preprocessor_config.json"
    config: dict[str, Any] = json.loads(name.read_bytes())
    config["size"] = {"shortest_edge": _MIN_PIXELS, "longest_edge": _MAX_PIXELS}
    name.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
