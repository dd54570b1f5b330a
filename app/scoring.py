"""Encoded groups to scores through transformers: `score_shared`, one packed forward as in training, and `score_plain`, the slow twin.

A server scores through `app.engine`, which is held against both.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from app.contracts import EncodedGroup, Scores
from app.model import RewardModel
from app.packing import pack


@torch.inference_mode()
def score_shared(model: RewardModel, groups: Sequence[EncodedGroup]) -> list[Scores]:
    """One forward: every prefix and every distinct caption computed once, equal captions given the same number."""
    packed = pack(groups, image_token_id=model.image_token_id, merge_size=model.merge_size, device=model.device)
    values = model(packed).tolist()
    if len(values) != len(packed.pooled_index):
        raise RuntimeError(f"the model returned {len(values)} scores for {len(packed.pooled_index)} rows")
    return [
        Scores(tuple(values[row] for row in rows), sum(len(row) for row in group.rows), computed)
        for group, rows, computed in zip(groups, packed.rows_of, packed.num_computed, strict=True)
    ]


@torch.inference_mode()
def score_plain(model: RewardModel, groups: Sequence[EncodedGroup]) -> list[Scores]:
    """One forward a caption, exactly as the published usage recipe: the reference every fast path is held against."""
    return [_plain(model, group) for group in groups]


def _plain(model: RewardModel, group: EncodedGroup) -> Scores:
    pixels = grid = None
    if group.image is not None:
        pixels = torch.from_numpy(group.image.patches).to(model.device)
        grid = torch.tensor([group.image.grid_thw], device=model.device)
    values = []
    for row in group.rows:
        ids = torch.from_numpy(row).unsqueeze(0).to(model.device)  # [1, tokens]
        values.append(model.forward_plain(ids, pixels, grid).item())
    num_tokens = sum(len(row) for row in group.rows)
    return Scores(tuple(values), num_tokens, num_tokens)
