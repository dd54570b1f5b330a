"""The vision tower on one picture: of Qwen2.5-VL our own forward without waste or host synchronisation, else transformers' own.

One picture at a time, so that its features never depend on what else is scored. The slow twin is transformers' `get_image_features`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from cachetools import LRUCache
from torch import Tensor

from app.layers import norm, plus, rotate, silu, times
from app.transfer import on_device
from app.varlen import Segments, attend

GridThw: TypeAlias = tuple[int, int, int]  # patches in time, height, width
_OWN_FAMILY = "qwen2_5_vl"
_MAX_GRID_BYTES = 16 << 20  # of the geometry of pictures' shapes that is kept: 0.3 MB each for a picture of 256 tokens


@dataclass(frozen=True, slots=True)
class Grid:
    """What the shape of a picture alone decides. Windows of equal size stand together: attention cannot tell in which order they come."""

    order: Tensor  # [merged tokens] which merged token stands where
    restore: Tensor  # [merged tokens] the way back
    cos: Tensor  # [patches, 1, head_dim / 2] float32, in window order
    sin: Tensor
    windows: Segments
    whole: Segments

    @property
    def num_bytes(self) -> int:
        bounds = (each for segments in (self.windows, self.whole) for each in (segments.cu_query, segments.cu_key))
        return sum(tensor.nbytes for tensor in (self.order, self.restore, self.cos, self.sin, *bounds))


class VisionTower:
    """Computes a picture's features from transformers' `Qwen2_5_VisionTransformerPretrainedModel`."""

    def __init__(self, tower: Any, *, max_grid_bytes: int = _MAX_GRID_BYTES) -> None:
        self._tower = tower
        self._blocks = [(block, number in tower.fullatt_block_indexes) for number, block in enumerate(tower.blocks)]
        self.merge_size = int(tower.spatial_merge_size)
        self._grids: LRUCache[GridThw, Grid] = LRUCache(max_grid_bytes, getsizeof=lambda grid: grid.num_bytes)
        weight = tower.patch_embed.proj.weight
        self._inverse = tower.rotary_pos_emb.inv_freq.float().cpu()  # read back once: to read is to wait for the device
        self._patch_weight = weight.view(weight.shape[0], -1)  # a convolution whose stride is its kernel is a product

    def shortened(self) -> VisionTower:
        """The same with one block of each kind: through windows, and over the whole picture."""
        tower = VisionTower(self._tower)
        tower._blocks = list({is_whole: (block, is_whole) for block, is_whole in self._blocks}.values())
        return tower

    @property
    def num_patch_values(self) -> int:
        """Values of a patch."""
        return int(self._patch_weight.shape[1])

    @property
    def num_values_per_token(self) -> int:
        """Of the tensors of a block that are there at once, for each merged token."""
        config = self._tower.config
        return int(self.merge_size**2 * (3 * config.intermediate_size + 8 * config.hidden_size))

    def features(self, patches: Tensor, grid_thw: GridThw) -> Tensor:
        """[patches, values] float32 to [merged tokens, hidden of the text model] in the model's format.

        Raises ValueError for a film, and for patches that are not the grid's.
        """
        _check_picture(patches, grid_thw)
        grid = self._grid(grid_thw)
        hidden = F.linear(patches.to(self._patch_weight.dtype), self._patch_weight)  # [patches, width]
        unit = self.merge_size**2
        hidden = hidden.view(-1, unit, hidden.shape[-1])[grid.order].view(-1, hidden.shape[-1])
        for block, is_whole in self._blocks:
            hidden = _block(block, hidden, grid, grid.whole if is_whole else grid.windows)
        merger = self._tower.merger
        merged = merger.mlp(norm(hidden, merger.ln_q).view(-1, unit * hidden.shape[-1]))
        features: Tensor = merged[grid.restore]
        return features

    def _grid(self, grid_thw: GridThw) -> Grid:
        grid = self._grids.get(grid_thw)
        if grid is None:
            grid = self._make_grid(grid_thw)
            if grid.num_bytes <= self._grids.maxsize:
                self._grids[grid_thw] = grid
        return grid

    def _make_grid(self, grid_thw: GridThw) -> Grid:
        config, device = self._tower.config, self._patch_weight.device
        side = config.window_size // self.merge_size // config.patch_size
        windows = windows_of(grid_thw, self.merge_size, side)
        order = torch.cat(windows)
        unit = self.merge_size**2
        positions = patch_positions(grid_thw, self.merge_size)  # [patches, 2]
        angles = (positions[..., None].float() * self._inverse).flatten(1)  # [patches, head_dim / 2]: rows, then columns
        angles = angles.view(-1, unit, angles.shape[-1])[order].view(-1, 1, angles.shape[-1])
        scaling = self._tower.rotary_pos_emb.attention_scaling
        return Grid(
            order=on_device(order, device),
            restore=on_device(torch.argsort(order), device),
            cos=on_device(angles.cos() * scaling, device),
            sin=on_device(angles.sin() * scaling, device),
            windows=Segments.of([len(window) * unit for window in windows], None, device),
            whole=Segments.of([math.prod(grid_thw)], None, device),
        )


class PlainTower:
    """A picture's features by transformers' own `get_image_features`, for families whose tower we have no forward of.

    Of one with DeepStack the features of its intermediate layers stand beside those of its end: [merged tokens, (1 + layers) * hidden].
    """

    def __init__(self, backbone: Any) -> None:
        self._backbone = backbone
        self._patch_weight = backbone.visual.patch_embed.proj.weight
        self.merge_size = int(backbone.visual.spatial_merge_size)

    def shortened(self) -> PlainTower:
        """Itself: the forward is transformers' and has no shorter form."""
        return self

    @property
    def num_patch_values(self) -> int:
        """Values of a patch."""
        return int(self._patch_weight[0].numel())

    @property
    def num_values_per_token(self) -> int:
        """Of the tensors of a block that are there at once, for each merged token."""
        widened = next(self._backbone.visual.blocks[0].mlp.children()).out_features
        return int(self.merge_size**2 * (widened + 8 * len(self._patch_weight)))

    def features(self, patches: Tensor, grid_thw: GridThw) -> Tensor:
        """[patches, values] float32 to [merged tokens, hidden of the text model or more] in the model's format.

        Raises ValueError for a film, and for patches that are not the grid's.
        """
        _check_picture(patches, grid_thw)
        found = self._backbone.get_image_features(patches, torch.tensor([grid_thw], device=patches.device))
        return torch.cat([features for (features,) in layers_of(found)], dim=1)


AnyTower: TypeAlias = VisionTower | PlainTower


def has_own_forward(backbone: Any) -> bool:
    """Whether a picture goes through our forward of the tower."""
    return bool(backbone.config.model_type == _OWN_FAMILY)


def tower_of(backbone: Any) -> AnyTower:
    return VisionTower(backbone.visual) if has_own_forward(backbone) else PlainTower(backbone)


def layers_of(found: Any) -> list[Sequence[Tensor]]:
    """What `get_image_features` returned: of the tower's end, then of each layer of DeepStack, every picture's [merged tokens, hidden]."""
    return [found.pooler_output, *(getattr(found, "deepstack_features", None) or ())]


def _check_picture(patches: Tensor, grid_thw: GridThw) -> None:
    if grid_thw[0] != 1 or len(patches) != math.prod(grid_thw):
        raise ValueError(f"expected the patches of one picture of grid {grid_thw}, found {len(patches)}")


def _block(block: Any, hidden: Tensor, grid: Grid, segments: Segments) -> Tensor:
    attention = block.attn
    heads = attention.num_heads
    projected = attention.qkv(norm(hidden, block.norm1))
    query, key, value = projected.view(len(hidden), 3, heads, -1).unbind(1)  # each [patches, heads, head_dim]
    query, key = (rotate(tensor.float(), grid.cos, grid.sin).to(hidden.dtype) for tensor in (query, key))
    attended, _ = attend(query, key, value, segments, causal=False, scale=attention.scaling)
    hidden = plus(attention.proj, attended.reshape(len(hidden), -1), hidden)
    inner = norm(hidden, block.norm2)
    gated = times(block.mlp.up_proj, inner, silu(block.mlp.gate_proj, inner))
    return plus(block.mlp.down_proj, gated, hidden)


def windows_of(grid_thw: GridThw, merge_size: int, side: int) -> list[Tensor]:
    """The merged tokens of every `side` x `side` window, larger windows first; each [tokens of the window]."""
    time, rows, columns = grid_thw[0], grid_thw[1] // merge_size, grid_thw[2] // merge_size
    index = torch.arange(time * rows * columns).view(time, rows, columns)
    windows = [tile.flatten() for frame in index for band in frame.split(side, 0) for tile in band.split(side, 1)]
    return sorted(windows, key=len, reverse=True)


def patch_positions(grid_thw: GridThw, merge_size: int) -> Tensor:
    """Row and column of every patch in the processor's order, where the patches of a merged token follow each other. [patches, 2]."""
    time, rows, columns = grid_thw
    where = torch.stack(torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij"), dim=-1)  # [rows, columns, 2]
    blocks = where.view(rows // merge_size, merge_size, columns // merge_size, merge_size, 2)
    return blocks.transpose(1, 2).reshape(-1, 2).repeat(time, 1)
