"""Bradley-Terry training on groups of preference pairs, through the packing and pooling that serve.

A group holds the captions of one image and prompt: the chosen ones first, the rejected ones second, in the same order.
Knows nothing of where pairs come from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from app.contracts import EncodedGroup, EncodedImage, Group
from app.encoding import Encoder
from app.model import RewardModel
from app.packing import Packed, pack


@dataclass(frozen=True, slots=True)
class PairScores:
    """Scores of pairs, [pairs] float32 each."""

    chosen: Tensor
    rejected: Tensor

    @property
    def margins(self) -> Tensor:
        return self.chosen - self.rejected


def encode_pairs(encoder: Encoder, image: EncodedImage | None, prompt: str | None, pairs: Sequence[tuple[str, str]]) -> EncodedGroup:
    """Pairs (chosen, rejected) of one image as one group. Raises the ApiError of the first caption that cannot be scored."""
    captions = (*(chosen for chosen, _ in pairs), *(rejected for _, rejected in pairs))
    group, errors = encoder.encode(Group(captions, prompt, image))
    for error in errors:
        if error is not None:
            raise error
    if group is None:
        raise ValueError("a group needs at least one pair")
    return group


def pack_pairs(model: RewardModel, groups: Sequence[EncodedGroup], device: torch.device) -> Packed:
    """The one packing of training and serving."""
    return pack(groups, image_token_id=model.image_token_id, merge_size=model.merge_size, device=device)


def split_pairs(scores: Tensor, packed: Packed) -> PairScores:
    """[rows] scores of packed pairs back to chosen and rejected, group after group."""
    chosen: list[int] = []
    rejected: list[int] = []
    for rows in packed.rows_of:
        half = len(rows) // 2
        chosen += rows[:half]
        rejected += rows[half:]
    return PairScores(scores[torch.tensor(chosen, device=scores.device)], scores[torch.tensor(rejected, device=scores.device)])


def score_pairs(model: RewardModel, groups: Sequence[EncodedGroup]) -> PairScores:
    """One packed forward over all groups; differentiable."""
    packed = pack_pairs(model, groups, model.device)
    return split_pairs(model(packed), packed)


def bradley_terry_loss(margins: Tensor) -> Tensor:
    """Mean of -log sigmoid(chosen - rejected): ln 2 where the model has no opinion (Bradley and Terry, 1952)."""
    return -F.logsigmoid(margins).mean()


def preference_loss(scores: PairScores, *, asked: Tensor | None = None, centring: float = 0.0) -> Tensor:
    """Bradley-Terry loss of the margins less what is `asked` of each ([pairs]), plus the centring term.

    Centring is `centring * mean((chosen + rejected)^2)` (Eisenstein et al. 2023, arXiv 2312.09244): differences cannot see it.
    """
    margins = scores.margins if asked is None else scores.margins - asked
    loss = bradley_terry_loss(margins)
    return loss if centring == 0 else loss + centring * (scores.chosen + scores.rejected).square().mean()


@torch.no_grad()
def measure_margins(model: RewardModel, groups: Sequence[EncodedGroup], groups_per_batch: int) -> list[float]:
    """chosen - rejected of every pair, group after group. A pair counts as right only above 0: a tie is wrong."""
    model.eval()
    margins: list[float] = []
    for start in range(0, len(groups), groups_per_batch):
        margins += score_pairs(model, groups[start : start + groups_per_batch]).margins.tolist()
    return margins
