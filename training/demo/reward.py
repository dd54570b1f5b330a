"""Phase two of the demo: LoRA and a scalar head on the frozen base, by preference pairs over drawn pictures."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from app.contracts import EncodedGroup, EncodedImage, RgbImage
from app.encoding import Encoder
from app.heads import LinearHead
from app.model import RewardModel
from training.demo.base import Report, make_optimisation
from training.demo.captions import FAULTS, Fault, Pair, make_pairs
from training.demo.drawings import Idea
from training.demo.pictures import Pictures
from training.demo.recipe import Lora, Reward
from training.demo.seeds import stream
from training.preference import bradley_terry_loss, encode_pairs, measure_margins, score_pairs

_GROUPS_PER_BATCH = 24


@dataclass(frozen=True)
class Judged:
    """Pairwise accuracy: overall and by what was wrong with the rejected caption."""

    accuracy: float
    by_fault: dict[Fault, float]
    num_pairs: int


@dataclass(frozen=True)
class Adapted:
    """One model in two views: PEFT's, which saves the adapter, and the one that scores."""

    peft: PeftModel
    model: RewardModel


def adapt(backbone: Any, lora: Lora) -> Adapted:
    """LoRA on every linear layer, vision tower included, and a head of zeros: training starts at ln 2."""
    config = LoraConfig(r=lora.r, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules="all-linear", bias="none")
    peft = get_peft_model(backbone, config)
    head = LinearHead(backbone.config.get_text_config().hidden_size)
    return Adapted(peft, RewardModel(peft.get_base_model(), head))


def train_reward(model: RewardModel, encoder: Encoder, pictures: Pictures, recipe: Reward, seed: int, report: Report) -> None:
    """Fresh pairs at every step, several a picture; wrong captions describe only ideas that training may show."""
    rng = stream("reward", seed)
    known = set(pictures.ideas)
    optimisation = make_optimisation(recipe.phase, trainable(model))
    model.train()
    for _ in range(recipe.phase.num_steps):
        groups = []
        for index in rng.sample(range(len(pictures)), recipe.phase.batch_size):
            pairs = make_pairs(pictures.ideas[index], recipe.pairs_per_picture, recipe.shares, known, rng)
            groups.append(encode_pairs(encoder, encode_picture(encoder, pictures, index), None, as_texts(pairs)))
        loss = bradley_terry_loss(score_pairs(model, groups).margins)
        optimisation.step(loss)
        report(loss.item())


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def encode_picture(encoder: Encoder, pictures: Pictures, index: int) -> EncodedImage:
    """The artifact's own image recipe; the picture already has the size it shrinks to."""
    pixels = pictures.pixels[index].permute(1, 2, 0).contiguous().numpy()
    return encoder.encode_image(RgbImage(f"picture {index}", pixels))


def as_texts(pairs: Sequence[Pair]) -> list[tuple[str, str]]:
    return [(pair.chosen, pair.rejected) for pair in pairs]


class Examination:
    """Pairs of held-out pictures, judged with the right pictures and with shuffled ones."""

    def __init__(self, encoder: Encoder, pictures: Pictures, known: Sequence[Idea], recipe: Reward, num_pairs: int, seed: int) -> None:
        self._encoder = encoder
        rng = stream("examination", seed)
        self._pairs = [make_pairs(idea, num_pairs, recipe.shares, set(known), rng) for idea in pictures.ideas]
        self._images = [encode_picture(encoder, pictures, index) for index in range(len(pictures))]
        self._others = shuffle_away(pictures.ideas, rng)

    def judge(self, model: RewardModel) -> Judged:
        return self._judge(model, self._images)

    def judge_shuffled(self, model: RewardModel) -> Judged:
        """The same captions with pictures of other ideas: near chance, unless the text gives the answer away."""
        return self._judge(model, [self._images[other] for other in self._others])

    def _judge(self, model: RewardModel, images: Sequence[EncodedImage]) -> Judged:
        groups: list[EncodedGroup] = []
        for image, pairs in zip(images, self._pairs, strict=True):
            groups.append(encode_pairs(self._encoder, image, None, as_texts(pairs)))
        margins = measure_margins(model, groups, _GROUPS_PER_BATCH)
        faults = [pair.fault for pairs in self._pairs for pair in pairs]
        right: dict[Fault, list[bool]] = {fault: [] for fault in FAULTS}
        for fault, margin in zip(faults, margins, strict=True):
            right[fault].append(margin > 0)
        by_fault = {fault: sum(hits) / len(hits) for fault, hits in right.items() if hits}
        return Judged(sum(margin > 0 for margin in margins) / len(margins), by_fault, len(margins))


def shuffle_away(ideas: Sequence[Idea], rng: random.Random) -> list[int]:
    """For each picture the index of another one with another idea; every picture is used once."""
    order = sorted(range(len(ideas)), key=lambda index: ideas[index])
    most = max(sum(idea == other for other in ideas) for idea in set(ideas))
    shift = rng.randint(most, len(ideas) - most)
    others = [0] * len(ideas)
    for position, index in enumerate(order):
        others[index] = order[(position + shift) % len(order)]
    return others


def save_adapter(adapted: Adapted, folder: Path) -> None:
    """PEFT's two files, the base named relative to the artifact; PEFT's empty model card is left out."""
    adapted.peft.peft_config["default"].base_model_name_or_path = "./base"
    adapted.peft.save_pretrained(str(folder), save_embedding_layers=False)  # else it looks for a vocabulary that never changed
    (folder / "README.md").unlink(missing_ok=True)
