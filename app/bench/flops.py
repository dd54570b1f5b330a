"""How many floating-point operations the matrix products of each way take: the work its answer needs, not what a kernel wastes.

A product of [m, k] by [k, n] counts 2mkn. Attention counts the (query, key) pairs that are seen, 4 * head_dim * heads each
(appendix B of arXiv 2203.15556, with grouped keys). Element-wise work counts nothing. `torch.utils.flop_counter` agrees in a test.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from app.contracts import EncodedGroup
from app.errors import SettingsInvalid

Grid = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Shapes:
    """The sizes of a Qwen that its matrix products have; those of vision are 0 where there is none."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vision_hidden: int = 0
    vision_layers: int = 0
    num_full_layers: int = 0  # vision layers that look at the whole picture
    vision_intermediate: int = 0
    window: int = 0  # side of a vision window in merged patches
    merge: int = 0
    patch_values: int = 0

    @classmethod
    def of(cls, config: Any) -> Shapes:
        """From a transformers configuration of the family `qwen2_5_vl`, or of a text-only one. Raises SettingsInvalid for another."""
        text, vision = config.get_text_config(), getattr(config, "vision_config", None)
        if vision is not None and config.model_type != "qwen2_5_vl":
            raise SettingsInvalid(
                f"the bench counts the work of a Qwen2.5-VL or of a text-only model, this one's base is {config.model_type!r}"
            )
        shapes = cls(
            hidden=text.hidden_size,
            layers=text.num_hidden_layers,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
            intermediate=text.intermediate_size,
        )
        if vision is None:
            return shapes
        return replace(
            shapes,
            vision_hidden=vision.hidden_size,
            vision_layers=vision.depth,
            num_full_layers=len([index for index in vision.fullatt_block_indexes if index < vision.depth]),
            vision_intermediate=vision.intermediate_size,
            window=vision.window_size // vision.patch_size // vision.spatial_merge_size,
            merge=vision.spatial_merge_size,
            patch_values=vision.in_channels * vision.temporal_patch_size * vision.patch_size**2,
        )

    @property
    def linears(self) -> tuple[tuple[int, int], ...]:
        """(in, out) of one text layer's matrices."""
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        attention = ((self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden))
        return (*attention, *((self.hidden, self.intermediate),) * 2, (self.intermediate, self.hidden))

    @property
    def weights_per_layer(self) -> int:
        return sum(rows * columns for rows, columns in self.linears)


def plain_flops(shapes: Shapes, group: EncodedGroup) -> int:
    """One forward a caption: picture, every token through every layer."""
    return sum(_forward(shapes, len(row), _triangle(len(row))) + _vision_of(shapes, group) for row in group.rows)


def padded_flops(shapes: Shapes, group: EncodedGroup) -> int:
    """Every caption a row as long as the longest, with its own picture."""
    longest = max(map(len, group.rows))
    return len(group.rows) * (_forward(shapes, longest, _triangle(longest)) + _vision_of(shapes, group))


def shared_flops(shapes: Shapes, group: EncodedGroup, *, num_known: int) -> int:
    """Each caption's own tokens and those of the prefix that are not known yet; of the last layer only keys, values and pooled tokens.

    The picture is looked at unless the whole prefix is known.
    """
    prefix, lengths = group.num_prefix, [len(row) for row in group.rows]
    own = [length - prefix for length in lengths]
    num_tokens = sum(own) + prefix - num_known
    num_pairs = sum(_triangle(count) + count * prefix for count in own) + _triangle(prefix) - _triangle(num_known)
    body = (shapes.layers - 1) * _layer(shapes, num_tokens, num_pairs)
    vision = _vision_of(shapes, group) if num_known < prefix else 0
    return body + _last_layer(shapes, num_tokens, lengths) + vision + _head(shapes, len(own))


def vision_flops(shapes: Shapes, grid: Grid) -> int:
    """Patch embedding, blocks with windows, merger."""
    time, rows, columns = grid
    num_patches, width = time * rows * columns, shapes.vision_hidden
    linear = 4 * width**2 + 3 * width * shapes.vision_intermediate
    num_windowed = shapes.vision_layers - shapes.num_full_layers
    windowed = time * window_pairs(rows // shapes.merge, columns // shapes.merge, shapes.window, shapes.merge**2)
    num_pairs = num_windowed * windowed + shapes.num_full_layers * time * (rows * columns) ** 2
    merged = width * shapes.merge**2
    merger = num_patches // shapes.merge**2 * (merged**2 + merged * shapes.hidden)
    return 2 * (num_patches * (shapes.patch_values * width + shapes.vision_layers * linear) + merger) + 4 * num_pairs * width


def window_pairs(rows: int, columns: int, window: int, patches_each: int) -> int:
    """(query, key) pairs of one windowed layer and frame; windows at the far edges are smaller."""
    heights = [min(window, rows - start) for start in range(0, rows, window)]
    widths = [min(window, columns - start) for start in range(0, columns, window)]
    return sum((height * width * patches_each) ** 2 for height, width in product(heights, widths))


def _vision_of(shapes: Shapes, group: EncodedGroup) -> int:
    return 0 if group.image is None else vision_flops(shapes, group.image.grid_thw)


def _forward(shapes: Shapes, num_tokens: int, num_pairs: int) -> int:
    return shapes.layers * _layer(shapes, num_tokens, num_pairs) + _head(shapes, 1)


def _layer(shapes: Shapes, num_tokens: int, num_pairs: int) -> int:
    return 2 * num_tokens * shapes.weights_per_layer + 4 * num_pairs * shapes.heads * shapes.head_dim


def _last_layer(shapes: Shapes, num_tokens: int, lengths: Sequence[int]) -> int:
    """Keys and values of all tokens, the rest of the pooled ones alone; a pooled token sees its whole row."""
    keys_values = 2 * shapes.hidden * shapes.kv_heads * shapes.head_dim
    pooled = 2 * len(lengths) * (shapes.weights_per_layer - keys_values)
    return 2 * num_tokens * keys_values + pooled + 4 * sum(lengths) * shapes.heads * shapes.head_dim


def _head(shapes: Shapes, num_rows: int) -> int:
    return 2 * num_rows * shapes.hidden


def _triangle(length: int) -> int:
    return length * (length + 1) // 2
