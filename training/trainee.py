"""What a recipe trains: a base with LoRA (or all its weights) and a head that scores zero, and the encoder that will serve it."""

from __future__ import annotations

import os
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from app.artifacts import PROCESSOR_NAME, Artifact, RewardModelConfig, find_base
from app.bases import load_backbone, read_base_config
from app.encoding import Encoder, load_encoder
from app.errors import ArtifactInvalid
from app.heads import Head, new_head
from app.model import RewardModel
from training.recipe import Lora, Model, Recipe, RecipeInvalid, Regularisation

OWN_BASE = "./base"  # where an artifact keeps a base that was trained itself
_PROCESSOR_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
)


@dataclass(frozen=True)
class Trainee:
    """One model in two views, PEFT's (which saves the adapter) and the one that scores, with its encoder."""

    model: RewardModel
    encoder: Encoder
    peft: PeftModel | None
    base_path: Path
    config: RewardModelConfig  # of the artifact it will become, without what only the export knows

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}


def make_trainee(recipe: Recipe, run: Path) -> Trainee:
    """Load the base and put adapter and head on it; the processor's files are copied into the run's folder.

    Raises ArtifactInvalid naming the file at fault. The adapter's random half is drawn from torch's generator.
    """
    base_path = find_base(recipe.model.base, recipe.model.revision)
    copy_processor(base_path, run / PROCESSOR_NAME)
    config = describe(recipe, base_path)
    artifact = Artifact(run, config, base_path, ())
    encoder = load_encoder(artifact)
    backbone = load_backbone(artifact, getattr(torch, recipe.model.dtype))
    peft = None if recipe.lora is None else add_lora(backbone, recipe.lora)
    head = trainable_head(recipe, config.score_head_shape[1])
    model = RewardModel(backbone if peft is None else peft.get_base_model(), head)
    drop_embeddings(model.backbone.get_input_embeddings(), recipe.regularisation)
    if recipe.run.gradient_checkpointing:
        model.backbone.activation_checkpointing_enable({"use_reentrant": False})
    return Trainee(model, encoder, peft, base_path, config)


def add_lora(backbone: Any, lora: Lora) -> PeftModel:
    """A fresh adapter whose weights are float32; everything else is frozen. Raises RecipeInvalid for targets that are not there."""
    targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=targets, bias="none")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft 0.21 asks transformers 5.23 so
        try:
            return get_peft_model(backbone, config)
        except ValueError as error:
            raise RecipeInvalid(f"lora.targets: {str(error).splitlines()[0]}") from None


def trainable_head(recipe: Recipe, hidden_size: int) -> Head:
    """A new head; the bias of its last layer stays 0 unless the loss has centring, the only part of it that sees a constant.

    In a difference of two scores it cancels: its gradient would be what rounding leaves, which Adam scales up to whole steps.
    """
    head = new_head(recipe.head, hidden_size).requires_grad_(True)
    if head.last.bias is not None and not recipe.loss.centring:
        head.last.bias.requires_grad_(False)
    return head


def drop_embeddings(layer: nn.Module, wanted: Regularisation) -> None:
    """Dropout on what the embedding layer gives, while it trains: whole tokens, then single values. Image tokens come later."""

    def drop(module: nn.Module, arguments: tuple[Any, ...], embedded: Tensor) -> Tensor:
        if not module.training:
            return embedded
        kept = torch.rand(embedded.shape[:-1], device=embedded.device) >= wanted.token_dropout
        return nn.functional.dropout(embedded * kept.unsqueeze(-1), wanted.embedding_dropout)

    if wanted.token_dropout or wanted.embedding_dropout:
        layer.register_forward_hook(drop)


def describe(recipe: Recipe, base_path: Path) -> RewardModelConfig:
    """The artifact's configuration as far as the recipe decides it."""
    model: Model = recipe.model
    return RewardModelConfig(
        base_model_name=model.base if recipe.lora else OWN_BASE,
        score_head_shape=(1, read_base_config(base_path).get_text_config().hidden_size),
        head=recipe.head,
        kind="lora_head" if recipe.lora else "full_head",
        base_model_revision=model.revision if recipe.lora else None,
        template=model.template,
        default_prompt=model.default_prompt,
        prompt_policy=model.prompt_policy,
        caption_role=model.caption_role,
        max_prompt_tokens=model.max_prompt_tokens,
        max_caption_tokens=model.max_caption_tokens,
        image=model.image,
        pooling="last_token",
        dtype=model.dtype,
    )


def copy_processor(base_path: Path, target: Path) -> None:
    """Tokenizer, chat template and image processor, byte for byte as the base ships them; files that are there already stay.

    Raises ArtifactInvalid for one that is there and differs. Several processes may do this at once.
    """
    target.mkdir(parents=True, exist_ok=True)
    for path in (path for pattern in _PROCESSOR_FILES for path in base_path.glob(pattern)):
        if not (target / path.name).exists():
            partial = target / f".{path.name}.{os.getpid()}"
            shutil.copyfile(path, partial)
            partial.replace(target / path.name)
        elif (target / path.name).read_bytes() != path.read_bytes():
            raise ArtifactInvalid(f"{path}: not the file the run in {target.parent} began with")


def load_trained(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Put trained weights back, every one of them and no other. Raises ValueError naming the first that does not fit."""
    own = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if strange := sorted(set(own) ^ set(tensors)):
        raise ValueError(f"{len(strange)} weights are missing or unknown, first {strange[0]}")
    with torch.no_grad():
        for name, parameter in own.items():
            if parameter.shape != tensors[name].shape:
                raise ValueError(f"{name}: expected {list(parameter.shape)}, found {list(tensors[name].shape)}")
            parameter.copy_(tensors[name])
