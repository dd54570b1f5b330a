"""The demo's world: what is drawn, how its base is schooled, which pairs are posed, and what the model must reach.

Read from one TOML file whose unknown keys are refused. How preferences are trained is a recipe like any other, and not here.
"""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from training.demo.captions import Fault
from training.demo.drawings import Idea, Scene

WORLD = Path(__file__).parent / "world.toml"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Drawing(_Strict):
    """Which pictures are drawn."""

    scales: tuple[float, ...] = Field(min_length=1)  # drawn at one of these, then shrunk as every picture is
    num_held_out_ideas: int = Field(ge=1)
    pictures_per_idea: int = Field(ge=1)
    held_out_pictures_per_idea: int = Field(ge=1)
    max_shift: int = Field(ge=0)  # pixels a training picture is moved by


class TokenizerSize(_Strict):
    vocab_size: int = Field(ge=300)
    num_captions: int = Field(ge=1)  # written for the merges to be learned from


class VisionSize(_Strict):
    hidden_size: int
    intermediate_size: int
    depth: int
    num_heads: int
    fullatt_block_indexes: tuple[int, ...]
    window_size: int
    patch_size: int
    spatial_merge_size: int


class TextSize(_Strict):
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    mrope_section: tuple[int, int, int]
    rope_theta: float
    max_position_embeddings: int


class Phase(_Strict):
    """One optimiser run: AdamW, linear warmup, cosine decay to a tenth."""

    num_steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    learning_rate: float = Field(gt=0)
    num_warmup_steps: int = Field(ge=0)
    weight_decay: float = Field(ge=0)
    max_grad_norm: float = Field(gt=0)


class Base(_Strict):
    """The base model: its shapes, and its schooling in seeing and naming."""

    initializer_range: float
    patch_initializer_range: float  # of the patch embedding, which sums over a thousand values
    vision: VisionSize
    text: TextSize
    seeing: Phase  # the vision tower with linear probes, which are thrown away
    reading: Phase  # the whole model: names, captions, and which parts of a caption fit
    naming_prompt: str
    naming_share: float = Field(ge=0, le=1)  # of the rows; the others are captions
    wrong_share: float = Field(ge=0, lt=1)  # how often each part of such a caption is drawn anew


class Preferences(_Strict):
    """The pairs of the training table."""

    num_pictures: int = Field(ge=1)  # drawn among all training pictures
    pairs_per_picture: int = Field(ge=1)
    shares: dict[Fault, float]  # of the faults of the rejected captions


class Bounds(_Strict):
    """What the command must reach, or it fails."""

    min_accuracy: float
    max_shuffled_accuracy: float
    max_artifact_bytes: int
    pairs_per_picture: int = Field(ge=1)  # of the held-out pictures


class Cartoon(_Strict):
    """A picture that is shipped, with captions from best to worst."""

    name: str = Field(pattern=r"^[a-z-]+$")
    subject: str
    place: str
    twist: str
    seed: int
    captions: tuple[str, ...] = Field(min_length=2)

    @property
    def scene(self) -> Scene:
        return Scene(Idea(self.subject, self.place, self.twist), self.seed)


class World(_Strict):
    seed: int
    description: str  # of the artifact, in one sentence
    drawing: Drawing
    tokenizer: TokenizerSize
    base: Base
    preferences: Preferences
    bounds: Bounds
    cartoons: tuple[Cartoon, ...]


def load_world(path: Path = WORLD) -> World:
    """Raises pydantic.ValidationError naming every key that is unknown, missing or out of range."""
    return World.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
