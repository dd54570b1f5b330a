"""Shapes of published Qwens, with vision and without, artifacts with random weights in them, and the padded batch everybody begins with.

Knows nothing of speed: it makes what `punchline bench` and `training.bench` measure.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from app.artifacts import CONFIG_NAME, DEMO_PATH, HEAD_NAME, PROCESSOR_NAME, RewardModelConfig, write_config
from app.contracts import EncodedImage, Ids
from app.errors import ArtifactInvalid

_BLOCK = 4_194_301  # random numbers drawn for one matrix and repeated; prime, so that no two rows are equal
SHARD_BYTES = 1 << 30
_SCALE = 0.8  # of 1/sqrt(fan in): hidden states neither vanish nor explode over 36 layers
_MIN_PIXELS, _MAX_PIXELS = 3136, 12_845_056  # of the published processor
_SPECIAL_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_DIALOGUE = "\n\nHuman: {prompt}\n\nAssistant: {caption}"  # of hh-rlhf, without a chat template
_TEXT_ONLY_PARTS = shutil.ignore_patterns("preprocessor_config.json")
_WHOLE_MODELS: dict[str, Any] = {
    "qwen2_5_vl": Qwen2_5_VLForConditionalGeneration,
    "qwen2": Qwen2ForCausalLM,
    "qwen3": Qwen3ForCausalLM,
}
_TEXT_CONFIGS: dict[str, Any] = {"qwen2": Qwen2Config, "qwen3": Qwen3Config}
_MAX_POSITIONS = {"qwen2": 32768, "qwen3": 40960}


@dataclass(frozen=True, slots=True)
class Geometry:
    """Shapes of a Qwen; the defaults are those of Qwen2.5-VL-3B with its layers counted by the caller.

    A family without vision has no vision layers, and nothing else of vision counts.
    """

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
    family: Literal["qwen2_5_vl", "qwen2", "qwen3"] = "qwen2_5_vl"
    head_dim: int | None = None  # None: the heads divide the hidden size

    @property
    def takes_images(self) -> bool:
        return self.family == "qwen2_5_vl"

    @property
    def image_token_id(self) -> int:
        """Where a test puts it that makes its own tokens."""
        return self.vocabulary - 1

    def shortened(self, layers: int | None, vision_layers: int | None) -> Geometry:
        """Fewer layers of the same shape."""
        return replace(self, layers=layers or self.layers, vision_layers=vision_layers or self.vision_layers)


@dataclass(frozen=True, slots=True)
class Limits:
    """The longest texts that a text-only artifact must take, in tokens."""

    prompt: int
    caption: int


# https://huggingface.co/Qwen/Qwen2.5-VL-3B-Instruct and -7B-Instruct, config.json; table 1 of arXiv 2502.13923
# https://huggingface.co/Qwen/Qwen2.5-0.5B-Instruct, -1.5B-Instruct and -7B-Instruct, config.json; table 1 of arXiv 2412.15115
# https://huggingface.co/Qwen/Qwen3-0.6B and -8B, config.json; table 1 of arXiv 2505.09388
GEOMETRIES = {
    "qwen2.5-vl-3b": Geometry(36, 32),
    "qwen2.5-vl-7b": Geometry(28, 32, hidden=3584, heads=28, kv_heads=4, intermediate=18944, vocabulary=152064, tied=False),
    "qwen2.5-0.5b": Geometry(24, 0, hidden=896, heads=14, intermediate=4864, family="qwen2"),
    "qwen2.5-1.5b": Geometry(28, 0, hidden=1536, heads=12, intermediate=8960, family="qwen2"),
    "qwen2.5-7b": Geometry(28, 0, hidden=3584, heads=28, kv_heads=4, intermediate=18944, vocabulary=152064, tied=False, family="qwen2"),
    "qwen3-0.6b": Geometry(28, 0, hidden=1024, kv_heads=8, intermediate=3072, family="qwen3", head_dim=128),
    "qwen3-8b": Geometry(36, 0, hidden=4096, heads=32, kv_heads=8, intermediate=12288, tied=False, family="qwen3", head_dim=128),
}


def base_config(geometry: Geometry, special_tokens: dict[str, int]) -> Any:
    """The base's configuration as transformers has it for the family; `special_tokens` are those of vision."""
    return _vision_config(geometry, special_tokens) if geometry.takes_images else _text_config(geometry)


def _text_config(geometry: Geometry) -> Any:
    head_dim = {} if geometry.head_dim is None else {"head_dim": geometry.head_dim}
    return _TEXT_CONFIGS[geometry.family](
        hidden_size=geometry.hidden,
        num_hidden_layers=geometry.layers,
        num_attention_heads=geometry.heads,
        num_key_value_heads=geometry.kv_heads,
        intermediate_size=geometry.intermediate,
        vocab_size=geometry.vocabulary,
        max_position_embeddings=_MAX_POSITIONS[geometry.family],
        rms_norm_eps=1e-6,
        bos_token_id=None,  # nothing is generated
        eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=geometry.tied,
        **head_dim,
    )


def _vision_config(geometry: Geometry, special_tokens: dict[str, int]) -> Qwen2_5_VLConfig:
    """Full attention in every eighth vision layer as published, in the last of a short tower."""
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
    geometry: Geometry,
    root: Path,
    report: Callable[[float], None] = lambda share: None,
    *,
    limits: Limits | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """A `full_head` artifact with random bfloat16 weights, which `punchline serve --model ROOT` serves; returns `root`.

    Tokenizer, chat template and image processor are the bundled demo's, the latter with the published size limits; text-only
    geometries take a raw dialogue. `report` hears the share that is written. A folder that holds a whole artifact is left as it
    is, but for `limits` that differ. `limits` None: those of the configuration's defaults.
    """
    if (root / CONFIG_NAME).exists():
        _set_limits(root, limits)
        return root
    partial = root.with_name(root.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    _write_base(geometry, partial / "base", report, shard_bytes)
    _write_processor(geometry, partial / PROCESSOR_NAME)
    generator = torch.Generator().manual_seed(1)
    save_file({"weight": torch.randn(1, geometry.hidden, generator=generator) / geometry.hidden**0.5}, partial / HEAD_NAME)
    write_config(partial, _artifact_config(geometry, limits))
    return partial.rename(root)


def _artifact_config(geometry: Geometry, limits: Limits | None) -> RewardModelConfig:
    layers = f"{geometry.layers} and {geometry.vision_layers}" if geometry.takes_images else f"{geometry.layers}"
    fields: dict[str, Any] = {
        "base_model_name": "./base",
        "score_head_shape": (1, geometry.hidden),
        "kind": "full_head",
        "description": f"Random weights in the shapes of a {geometry.family} with {layers} layers: for timing only.",
    }
    recipe = {} if geometry.takes_images else {"caption_role": "raw", "template": _DIALOGUE}
    return RewardModelConfig.model_validate(fields | recipe | _limit_fields(limits))


def _limit_fields(limits: Limits | None) -> dict[str, int]:
    """Never less than usual: a server's self-test has texts of its own."""
    if limits is None:
        return {}
    asked = {"max_prompt_tokens": limits.prompt, "max_caption_tokens": limits.caption}
    return {name: max(number, RewardModelConfig.model_fields[name].default) for name, number in asked.items()}


def _set_limits(root: Path, limits: Limits | None) -> None:
    """Of an artifact that an earlier run wrote for texts of other lengths."""
    config = RewardModelConfig.model_validate_json((root / CONFIG_NAME).read_bytes())
    changed = config.model_copy(update=_limit_fields(limits))
    if changed != config:
        write_config(root, changed)


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
    whole_model = _WHOLE_MODELS[geometry.family]
    config.architectures, config.dtype = [whole_model.__name__], "bfloat16"
    config.save_pretrained(path)
    with torch.device("meta"):
        model = whole_model(config)
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


def _write_processor(geometry: Geometry, path: Path) -> None:
    if not geometry.takes_images:
        shutil.copytree(DEMO_PATH / PROCESSOR_NAME, path, ignore=_TEXT_ONLY_PARTS)
        return
    shutil.copytree(DEMO_PATH / PROCESSOR_NAME, path)
    name = path / "preprocessor_config.json"
    config: dict[str, Any] = json.loads(name.read_bytes())
    config["size"] = {"shortest_edge": _MIN_PIXELS, "longest_edge": _MAX_PIXELS}
    name.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
