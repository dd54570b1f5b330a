"""Random tiny reward models on disk: a base that sees exactly in the published humor-r1 layout, and a text-only one, of any family."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    PreTrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

from app.artifacts import HeadSpec, RewardModelConfig, open_artifact, write_config
from app.contracts import EncodedGroup, Group
from app.encoding import Encoder, load_encoder
from app.heads import new_head, save_head
from app.images import ImageLimits, decode_image
from app.model import LoadedModel, load_model
from training.demo.tokenizer import ImageSizes, save_processor, train_tokenizer

HIDDEN = 64
VisionFamily = Literal["qwen2_5_vl", "qwen2_vl", "qwen3_vl"]
TextFamily = Literal["qwen2", "qwen3"]
VISION_FAMILIES: tuple[VisionFamily, ...] = get_args(VisionFamily)
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


def write_published(root: Path, *, seed: int = 0, lora_targets: str = "all-linear", family: VisionFamily = "qwen2_5_vl") -> Path:
    """Base in `root/base`, artifact in `root/artifact`; returns the artifact. The configuration has only the two published keys."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(CORPUS, 420)
    base, artifact = root / "base", root / "artifact"
    write_base(base, tokenizer, family)
    patch = 16 if family == "qwen3_vl" else 14
    save_processor(tokenizer, ImageSizes((2 * patch) ** 2 * 2, (2 * patch) ** 2 * 64, patch, 2), artifact / "processor")
    write_adapter(artifact, AutoModel.from_pretrained(base, dtype=torch.float32), lora_targets)
    torch.save({"weight": torch.randn(1, HIDDEN) / HIDDEN**0.5}, artifact / "reward_head.pt")
    config = {"base_model_name": str(base), "score_head_shape": [1, HIDDEN]}
    (artifact / "reward_model_config.json").write_text(json.dumps(config))
    return artifact


def give_head(artifact: Path, spec: HeadSpec, *, seed: int = 0) -> None:
    """Another random head in place of the artifact's: the file as the library would save it, and what the configuration says of it."""
    torch.manual_seed(seed)
    head = new_head(spec, HIDDEN)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=HIDDEN**-0.5)
    (artifact / "reward_head.pt").unlink(missing_ok=True)
    save_head(head, artifact / "reward_head.safetensors")
    edit_json(artifact / "reward_model_config.json", head=spec.model_dump(), files={})


def write_sibling(artifact: Path, target: Path, *, seed: int, **changes: Any) -> Path:
    """Another artifact on the base of a published one, with an adapter and a head of its own. `changes` go to the configuration."""
    torch.manual_seed(seed)
    shutil.copytree(artifact / "processor", target / "processor")
    write_adapter(target, AutoModel.from_pretrained(artifact.parent / "base", dtype=torch.float32))
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
    family: TextFamily = "qwen2",
    **changes: Any,
) -> Path:
    """A text-only reward model with its base in `root/artifact/base`, hashed; returns the artifact. `changes` go to the configuration."""
    torch.manual_seed(seed)
    tokenizer = train_tokenizer(CORPUS, 420)
    tokenizer.chat_template = TEXT_CHAT_TEMPLATE if caption_role == "user" else None
    artifact = root / "artifact"
    tokenizer.save_pretrained(artifact / "processor")
    write_text_base(artifact / "base", tokenizer, family)
    if kind == "lora_head":
        write_adapter(artifact, AutoModel.from_pretrained(artifact / "base", dtype=torch.float32))
    save_file({"weight": torch.randn(1, HIDDEN) / HIDDEN**0.5}, artifact / "reward_head.safetensors")
    recipe = {"template": "{prompt}{caption}"} if caption_role == "raw" else {}
    names = {"base_model_name": "./base", "score_head_shape": (1, HIDDEN), "kind": kind, "caption_role": caption_role}
    write_config(artifact, RewardModelConfig.model_validate(names | recipe | changes))
    return artifact


def write_text_base(path: Path, tokenizer: Qwen2Tokenizer, family: TextFamily = "qwen2") -> None:
    """A random base, saved as language models are: with its head, tied. A Qwen3's heads together are wider than its states."""
    common = {
        "hidden_size": HIDDEN,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 96,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
    }
    model: Any
    if family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(num_hidden_layers=2, **common))
    else:
        model = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=3, head_dim=32, **common))
    enliven(model)
    model.save_pretrained(path)


def enliven(model: torch.nn.Module) -> None:
    """Matrices livelier than the 0.02 of initialisation, norms not all one and biases not all zero, so that differences would show."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(4.0)
            else:
                parameter.add_(torch.randn(parameter.shape), alpha=0.2)


def write_base(path: Path, tokenizer: Any, family: VisionFamily = "qwen2_5_vl") -> None:
    """A random base that sees, with the real structure of its family, saved whole: with its language-model head, tied."""
    ids = tokenizer.convert_tokens_to_ids
    config, build = _VISION_BASES[family]
    names = {"image_token_id": "image_pad", "video_token_id": "video_pad"}
    names |= {"vision_start_token_id": "vision_start", "vision_end_token_id": "vision_end"}
    special = {name: ids(f"<|{text}|>") for name, text in names.items()}
    ends = {"pad_token_id": ids("<|endoftext|>"), "bos_token_id": ids("<|endoftext|>"), "eos_token_id": ids("<|im_end|>")}
    model = build(config({"vocab_size": len(tokenizer)} | ends, special))
    enliven(model)
    model.save_pretrained(path)


_TEXT_PART = {
    "hidden_size": HIDDEN,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
    "max_position_embeddings": 4096,
}
_VISION_PART = {"num_heads": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _qwen2_5_vl(text: dict[str, Any], special: dict[str, int]) -> PreTrainedConfig:
    """Window attention in one of two vision layers."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    sizes = {"depth": 2, "hidden_size": 48, "intermediate_size": 64, "out_hidden_size": HIDDEN, "patch_size": 14}
    return Qwen2_5_VLConfig(
        text_config=_TEXT_PART | {"num_hidden_layers": 2, "rope_parameters": rope} | text,
        vision_config=_VISION_PART | sizes | {"window_size": 56, "fullatt_block_indexes": [1]},
        tie_word_embeddings=True,
        **special,
    )


def _qwen2_vl(text: dict[str, Any], special: dict[str, int]) -> PreTrainedConfig:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
    return Qwen2VLConfig(
        text_config=_TEXT_PART | {"num_hidden_layers": 3, "rope_parameters": rope} | text,
        vision_config=_VISION_PART | {"depth": 3, "embed_dim": 48, "mlp_ratio": 2, "hidden_size": HIDDEN, "patch_size": 14},
        tie_word_embeddings=True,
        **special,
    )


def _qwen3_vl(text: dict[str, Any], special: dict[str, int]) -> PreTrainedConfig:
    """DeepStack of two vision layers behind two of three text layers; axes of positions interleaved; heads wider than the states."""
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [6, 5, 5], "mrope_interleaved": True}
    sizes = {"depth": 3, "hidden_size": 48, "intermediate_size": 64, "out_hidden_size": HIDDEN, "patch_size": 16}
    return Qwen3VLConfig(
        text_config=_TEXT_PART | {"num_hidden_layers": 3, "head_dim": 32, "rope_parameters": rope} | text,
        vision_config=_VISION_PART | sizes | {"num_position_embeddings": 36, "deepstack_visual_indexes": [0, 1]},
        tie_word_embeddings=True,
        **special,
    )


_VISION_BASES: dict[VisionFamily, tuple[Callable[..., PreTrainedConfig], Callable[[Any], Any]]] = {
    "qwen2_5_vl": (_qwen2_5_vl, Qwen2_5_VLForConditionalGeneration),
    "qwen2_vl": (_qwen2_vl, Qwen2VLForConditionalGeneration),
    "qwen3_vl": (_qwen3_vl, Qwen3VLForConditionalGeneration),
}


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
