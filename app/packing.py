"""Encoded groups to one sequence without padding: equal rows once, groups of one image and prompt as one group.

Training and serving both pack here. Knows nothing of weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from app.attention import GroupSpan, Layout
from app.contracts import EncodedGroup, EncodedImage, Ids
from app.encoding import num_shared, positions

Key = tuple[str, bytes]  # (image id, prompt digest)


@dataclass(frozen=True, slots=True)
class Packed:
    """Tensors of one forward, and the way back from its rows to the captions that asked."""

    input_ids: Tensor  # [tokens]
    position_ids: Tensor  # [3, 1, tokens]; equal axes without an image
    pooled_index: Tensor  # [rows] the last token of each row
    layout: Layout
    pixel_values: Tensor | None  # [patches, values] of the distinct images
    image_grid_thw: Tensor | None  # [images, 3]
    image_slots: tuple[int, ...]  # which image stands in which packed group, in packed order
    rows_of: tuple[tuple[int, ...], ...]  # for each group given, the row of each caption
    num_computed: tuple[int, ...]  # for each group given, the tokens it added

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])


@dataclass(slots=True)
class _Merged:
    """Groups that share image and prompt: their distinct rows."""

    image: EncodedImage | None
    rows: dict[bytes, Ids] = field(default_factory=dict)


def pack(groups: Sequence[EncodedGroup], *, image_token_id: int | None, merge_size: int, device: torch.device) -> Packed:
    """Pack groups into one sequence `[prefix | suffix_1 | ... | suffix_N]` a distinct (image, prompt).

    The order is the content's own, not the order of asking: the same captions give the same bits whichever is named first.
    `image_token_id` is None for a text-only model. Raises ValueError for an image that does not lie whole in its prefix.
    """
    merged: dict[Key, _Merged] = {}
    for group in groups:
        entry = merged.setdefault(group.key, _Merged(group.image))
        for row in group.rows:
            entry.rows.setdefault(row.tobytes(), row)
    builder = _Builder(image_token_id, merge_size)
    row_number: dict[tuple[Key, bytes], int] = {}
    prefix_costs: dict[Key, int] = {}
    for key, entry in sorted(merged.items(), key=lambda item: item[0]):
        rows = sorted(entry.rows.items())
        for digest, _ in rows:
            row_number[key, digest] = len(row_number)
        prefix_costs[key] = builder.add([row for _, row in rows], entry.image)
    rows_of = tuple(tuple(row_number[group.key, row.tobytes()] for row in group.rows) for group in groups)
    return builder.build(device, rows_of, _num_added(groups, rows_of, prefix_costs, builder.row_costs))


def _num_added(
    groups: Sequence[EncodedGroup], rows_of: Sequence[Sequence[int]], prefix_costs: dict[Key, int], row_costs: Sequence[int]
) -> tuple[int, ...]:
    """A prefix and a row count for the group that asked for them first."""
    unpaid = dict(prefix_costs)
    seen: set[int] = set()
    added = []
    for group, rows in zip(groups, rows_of, strict=True):
        fresh = set(rows) - seen
        seen |= fresh
        added.append(unpaid.pop(group.key, 0) + sum(row_costs[row] for row in fresh))
    return tuple(added)


class _Builder:
    """Collects the pieces of the packed sequence."""

    def __init__(self, image_token_id: int | None, merge_size: int) -> None:
        self._image_token_id = image_token_id
        self._merge_size = merge_size
        self._ids: list[Ids] = []
        self._positions: list[Ids] = []
        self._spans: list[GroupSpan] = []
        self._images: dict[str, EncodedImage] = {}
        self._slots: list[int] = []
        self._pooled: list[int] = []
        self._length = 0
        self.row_costs: list[int] = []

    def add(self, rows: list[Ids], image: EncodedImage | None) -> int:
        """Append one merged group; returns the length of its prefix."""
        shared = num_shared(rows)
        if image is not None:
            self._add_image(rows[0][:shared], image)
        where = [positions(row, image, self._image_token_id, self._merge_size) for row in rows]
        self._ids += [rows[0][:shared], *(row[shared:] for row in rows)]
        self._positions += [where[0][:, :shared], *(place[:, shared:] for place in where)]
        lengths = tuple(len(row) - shared for row in rows)
        self._spans.append(GroupSpan(self._length, shared, lengths))
        ends = self._length + shared + np.cumsum(lengths) - 1
        self._pooled += ends.tolist()
        self._length += shared + sum(lengths)
        self.row_costs += lengths
        return shared

    def _add_image(self, prefix: Ids, image: EncodedImage) -> None:
        if int((prefix == self._image_token_id).sum()) != image.num_tokens:
            raise ValueError("the image does not lie whole in the shared prefix")
        self._images.setdefault(image.image_id, image)
        self._slots.append(list(self._images).index(image.image_id))

    def build(self, device: torch.device, rows_of: tuple[tuple[int, ...], ...], num_computed: tuple[int, ...]) -> Packed:
        images = list(self._images.values())
        return Packed(
            input_ids=torch.from_numpy(np.concatenate(self._ids)).to(device),
            position_ids=torch.from_numpy(np.concatenate(self._positions, axis=1)).unsqueeze(1).to(device),
            pooled_index=torch.tensor(self._pooled, device=device),
            layout=Layout.of(tuple(self._spans), device),
            pixel_values=torch.from_numpy(np.concatenate([i.patches for i in images])).to(device) if images else None,
            image_grid_thw=torch.tensor([i.grid_thw for i in images], device=device) if images else None,
            image_slots=tuple(self._slots),
            rows_of=rows_of,
            num_computed=num_computed,
        )
