"""Random tiny reward models on disk: a Qwen2.5-VL exactly in the published humor-r1 layout, and a text-only Qwen2."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Model,
    Qwen2Tokenizer,
)

from app.artifacts import RewardModelConfig, open_artifact, write_config
from app.contracts import EncodedGroup, Group
from app.encoding import Encoder, load_encoder
from app.images import ImageLimits, decode_image
from app.model import LoadedModel, load_model
from training.demo.tokenizer import ImageSizes, save_processor, train_tokenizer

HIDDEN = 64
CORPUS = (
    "Write a funny one-line caption for this New Yorker-style cartoon.",
    "Candidate caption: It says it is here about the iceberg.",
    "Judge how funny this caption is for the cartoon.",
    "You are a helpful assistant. system user assistant",
    "The penguin brought an umbrella to the office. Nobody told the octopus about casual Friday.",
)
TEXT_CHAT_TEMPLATE = (  # of Qwen2.5: content is a string
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LIMITS = ImageLimits(max_bytes=10 << 20, max_pixels=16_000_000, min_side=16, max_aspect=100, formats=("JPEG", "PNG", "WEBP"))


def write_published(root: Path, *, seed: int = 0, lora_targets: str = "all-linear") -> Path:
    """Base in `root/base`, artifact in `root/artifact`; returns the artifact. The configuration has only the two published keys."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(CORPUS, 420)
    base, artifact = root / "base", root / "artifact"
    write_base(base, tokenizer)
    save_processor(tokenizer, ImageSizes(28 * 28 * 2, 28 * 28 * 64, 14, 2), artifact / "processor")
    write_adapter(artifact, Qwen2_5_VLModel.from_pretrained(base, dtype=torch.float32), lora_targets)
    torch.save({"weight": torch.randn(1, HIDDEN) / HIDDEN**0.5}, artifact / "reward_head.pt")
    config = {"base_model_name": str(base), "score_head_shape": [1, HIDDEN]}
    (artifact / "reward_model_config.json").write_text(json.dumps(config))
    return artifact


def write_sibling(artifact: Path, target: Path, *, seed: int, **changes: Any) -> Path:
    """Another artifact on the base of a published one, with an adapter and a head of its own. `changes` go to the configuration."""
    torch.manual_seed(seed)
    shutil.copytree(artifact / "processor", target / "processor")
    write_adapter(target, Qwen2_5_VLModel.from_pretrained(artifact.parent / "base", dtype=torch.float32))
    torch.save({"weight": torch.randn(1, HIDDEN) / HIDDEN**0.5}, target / "reward_head.pt")
    config = json.loads((artifact / "reward_model_config.json").read_bytes())
    (target / "reward_model_config.json").write_text(json.dumps(config | changes))
    return target


def write_adapter(artifact: Path, backbone: Any, targets: str = "all-linear") -> None:
    """A random LoRA that changes something."""
    adapted = get_peft_model(backbone, LoraConfig(r=4, lora_alpha=8, target_modules=targets, bias="none"))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    adapted.save_pretrained(artifact / "backbone_adapter")


def write_text_only(
    root: Path,
    *,
    kind: Literal["lora_head", "full_head"] = "lora_head",
    caption_role: Literal["user", "raw"] = "user",
    seed: int = 0,
    **changes: Any,
) -> Path:
    """A text-only reward model with its base in `root/artifact/base`, hashed; returns the artifact. `changes` go to the configuration."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(CORPUS, 420)
    tokenizer.chat_template = TEXT_CHAT_TEMPLATE if caption_role == "user" else None
    artifact = root / "artifact"
    tokenizer.save_pretrained(artifact / "processor")
    write_text_base(artifact / "base", tokenizer)
    if kind == "lora_head":
        write_adapter(artifact, Qwen2Model.from_pretrained(artifact / "base", dtype=torch.float32))
    save_file({"weight": torch.randn(1, HIDDEN) / HIDDEN**0.5}, artifact / "reward_head.safetensors")
    recipe = {"template": "{prompt}{caption}"} if caption_role == "raw" else {}
    names = {"base_model_name": "./base", "score_head_shape": (1, HIDDEN), "kind": kind, "caption_role": caption_role}
    write_config(artifact, RewardModelConfig.model_validate(names | recipe | changes))
    return artifact


def write_text_base(path: Path, tokenizer: Qwen2Tokenizer) -> None:
    """A random Qwen2 of two layers, saved as language models are: with its head, tied."""
    model = Qwen2ForCausalLM(
        Qwen2Config(
            hidden_size=HIDDEN,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            intermediate_size=96,
            vocab_size=len(tokenizer),
            max_position_embeddings=4096,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        )
    )
    enliven(model)
    model.save_pretrained(path)


def enliven(model: torch.nn.Module) -> None:
    """Matrices livelier than the 0.02 of initialisation, so that differences would show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)


def write_base(path: Path, tokenizer: object) -> None:
    """A random Qwen2.5-VL of two layers with the real structure: window attention, merger, three-axis rotary."""
    ids = tokenizer.convert_tokens_to_ids  # type: ignore[attr-defined]
    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": HIDDEN,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 96,
            "vocab_size": len(tokenizer),  # type: ignore[arg-type]
            "max_position_embeddings": 4096,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
            "pad_token_id": ids("<|endoftext|>"),
            "bos_token_id": ids("<|endoftext|>"),
            "eos_token_id": ids("<|im_end|>"),
        },
        vision_config={
            "depth": 2,
            "hidden_size": 48,
            "intermediate_size": 64,
            "num_heads": 4,
            "patch_size": 14,
            "window_size": 56,
            "out_hidden_size": HIDDEN,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "fullatt_block_indexes": [1],
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    enliven(model)
    model.save_pretrained(path)


def picture(width: int, height: int, seed: int = 0, kind: str = "PNG", mode: str = "RGB") -> bytes:
    """Encoded noise in blocks: pictures that differ at every size."""
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (8, 8, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(blocks).resize((width, height), Image.Resampling.BILINEAR).convert(mode).save(stream, kind)
    return stream.getvalue()


def copy_artifact(artifact: Path, target: Path) -> Path:
    """A private copy of an artifact and the base beside it, to be damaged; the copy's configuration names the copied base."""
    shutil.copytree(artifact.parent / "base", target / "base")
    shutil.copytree(artifact, target / "artifact")
    edit_json(target / "artifact" / "reward_model_config.json", base_model_name=str(target / "base"))
    return target / "artifact"


def edit_json(path: Path, *, without: tuple[str, ...] = (), **changes: object) -> None:
    """Change keys of a JSON file in place."""
    value = json.loads(path.read_bytes())
    path.write_text(json.dumps({name: item for name, item in (value | changes).items() if name not in without}))


def edit_tensors(path: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change a safetensors file in place: `change` edits the dictionary of its tensors."""
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def load_whole(artifact: Path, **options: Any) -> tuple[Encoder, LoadedModel]:
    """What a server loads."""
    opened = open_artifact(str(artifact), offline=True)
    return load_encoder(opened), load_model(opened, **options)


def encode(encoder: Encoder, size: tuple[int, int], seed: int, captions: Sequence[str], prompt: str | None = None) -> EncodedGroup:
    """A group of a random picture; every caption must be one that can be scored."""
    image = encoder.encode_image(decode_image(picture(*size, seed), LIMITS, exif_transpose=False))
    return _encoded(encoder, Group(tuple(captions), prompt, image))


def encode_text(encoder: Encoder, captions: Sequence[str], prompt: str | None = None) -> EncodedGroup:
    """A group without a picture; every caption must be one that can be scored."""
    return _encoded(encoder, Group(tuple(captions), prompt))


def _encoded(encoder: Encoder, asked: Group) -> EncodedGroup:
    group, errors = encoder.encode(asked)
    if group is None or any(errors):
        raise ValueError(f"cannot be scored: {errors}")
    return group
