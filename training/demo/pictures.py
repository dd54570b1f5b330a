"""Drawn scenes as tensors: rendered by worker processes, moved and mirrored for training, cut into patches.

Knows no captions and no model; the normalisation is the image processor's, and a test holds the patches equal to it.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from app.artifacts import ImageRecipe
from app.images import shrink
from training.demo.drawings import Idea, Scene, render
from training.demo.seeds import stream

_TEMPORAL_PATCH = 2  # a still picture is two equal frames to Qwen2.5-VL


@dataclass(frozen=True)
class Pictures:
    """Scenes and their pixels, all of one size."""

    scenes: tuple[Scene, ...]
    pixels: Tensor  # [pictures, 3, height, width] uint8

    def __len__(self) -> int:
        return len(self.scenes)

    @property
    def ideas(self) -> tuple[Idea, ...]:
        return tuple(scene.idea for scene in self.scenes)

    def batch(self, indices: Sequence[int]) -> Pictures:
        return Pictures(tuple(self.scenes[index] for index in indices), self.pixels[list(indices)])


@dataclass(frozen=True)
class PatchGrid:
    """How a picture is cut: `patch` pixels a side, `merge` x `merge` patches a token."""

    patch: int
    merge: int

    def num_tokens(self, height: int, width: int) -> int:
        return height * width // (self.patch * self.merge) ** 2

    def grid_thw(self, height: int, width: int) -> tuple[int, int, int]:
        return 1, height // self.patch, width // self.patch


def draw_pictures(scenes: Sequence[Scene], scales: Sequence[float], image: ImageRecipe) -> Iterator[NDArray[np.uint8]]:
    """Every scene in order, shrunk as the artifact shrinks; the same on any number of processes."""
    draw = functools.partial(draw_small, scales=scales, image=image)
    with ProcessPoolExecutor(os.cpu_count(), mp_context=multiprocessing.get_context("spawn")) as workers:
        yield from workers.map(draw, scenes, chunksize=64)


def draw_small(scene: Scene, scales: Sequence[float], image: ImageRecipe) -> NDArray[np.uint8]:
    """The picture the model sees, drawn at one of the scales: [height, width, 3]."""
    scale = stream("scale", scene).choice(scales)
    large = np.asarray(render(scene, scale))
    return np.asarray(shrink(large, image.long_edge, image.resample))


def gather(scenes: Sequence[Scene], drawn: Sequence[NDArray[np.uint8]]) -> Pictures:
    return Pictures(tuple(scenes), torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous())


def vary(pixels: Tensor, max_shift: int, rng: random.Random) -> Tensor:
    """Each picture mirrored or not and moved by up to `max_shift` pixels, edges repeated. Same shape."""
    height, width = pixels.shape[-2:]
    padded = torch.nn.functional.pad(pixels.float(), (max_shift,) * 4, mode="replicate")
    moved = []
    for picture in padded:
        top, left = rng.randint(0, 2 * max_shift), rng.randint(0, 2 * max_shift)
        cut = picture[:, top : top + height, left : left + width]
        moved.append(cut.flip(-1) if rng.random() < 0.5 else cut)
    return torch.stack(moved)


def to_patches(pixels: Tensor, grid: PatchGrid) -> Tensor:
    """Normalised patches in the vision tower's order: [pictures * patches, 3 * frames * patch * patch] float32."""
    mean = torch.tensor(OPENAI_CLIP_MEAN).view(3, 1, 1)
    std = torch.tensor(OPENAI_CLIP_STD).view(3, 1, 1)
    number, _, height, width = pixels.shape
    rows, columns = height // (grid.patch * grid.merge), width // (grid.patch * grid.merge)
    split = ((pixels.float() / 255 - mean) / std).view(number, 3, rows, grid.merge, grid.patch, columns, grid.merge, grid.patch)
    ordered = split.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)  # [n, rows, columns, merge, merge, 3, 1, patch, patch]
    frames = ordered.expand(*ordered.shape[:6], _TEMPORAL_PATCH, *ordered.shape[7:])
    return frames.reshape(number * rows * columns * grid.merge**2, -1)
