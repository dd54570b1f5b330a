"""The demo's base model: a tiny Qwen2.5-VL that learns to see and to name drawn scenes, then is rounded to bfloat16.

Knows nothing of preferences. Stage one trains the vision tower with linear probes on its mean feature (words come much
later without them); stage two trains the whole model on next words.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from app.contracts import EncodedImage, Group, Ids
from app.encoding import Encoder
from training.demo.captions import TEMPLATES, make_caption, name_scene, slots_of
from training.demo.drawings import Idea
from training.demo.pictures import PatchGrid, Pictures, to_patches, vary
from training.demo.places import PLACES
from training.demo.seeds import stream
from training.demo.subjects import SUBJECTS
from training.demo.twists import TWISTS
from training.demo.world import Base, Phase
from training.optimisation import Optimisation

_IGNORED = -100  # a label that costs nothing
_MAX_NAME_TOKENS = 8
_PARTS = ("subject", "twist", "place")
_NAMES: tuple[tuple[str, ...], ...] = (tuple(SUBJECTS), tuple(TWISTS), tuple(PLACES))
_NUM_NAMES = sum(map(len, _NAMES))
Report = Callable[[float], None]  # takes the loss of each step


@dataclass(frozen=True)
class Lesson:
    """A row of ids, where the words to be learned begin, and what its caption says of each part (None: nothing)."""

    row: Ids
    start: int
    said: tuple[str | None, ...] = (None, None, None)


@dataclass(frozen=True)
class Naming:
    """How often the base names the subject, the twist, the place, and all three."""

    subject: float
    twist: float
    place: float
    everything: float


def build_base(base: Base, tokenizer: Any) -> Qwen2_5_VLForConditionalGeneration:
    """Random weights in the recipe's shapes."""
    ids = {name: tokenizer.convert_tokens_to_ids(f"<|{name}|>") for name in ("vision_start", "vision_end", "image_pad", "video_pad")}
    text = base.text.model_dump()
    rope = {"rope_type": "default", "rope_theta": text.pop("rope_theta"), "mrope_section": list(text.pop("mrope_section"))}
    text |= {"vocab_size": len(tokenizer), "rope_parameters": rope, "initializer_range": base.initializer_range}
    text |= {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    vision = base.vision.model_dump() | {"out_hidden_size": base.text.hidden_size, "initializer_range": base.initializer_range}
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        vision_start_token_id=ids["vision_start"],
        vision_end_token_id=ids["vision_end"],
        image_token_id=ids["image_pad"],
        video_token_id=ids["video_pad"],
        tie_word_embeddings=True,
    )
    model = Qwen2_5_VLForConditionalGeneration(config)
    nn.init.normal_(model.model.visual.patch_embed.proj.weight, std=base.patch_initializer_range)
    return model


class BaseTrainer:
    """Trains one base model on drawn pictures. Rows of text come from the artifact's own encoder."""

    def __init__(
        self, model: Qwen2_5_VLForConditionalGeneration, encoder: Encoder, recipe: Base, known: Collection[Idea], max_shift: int, seed: int
    ) -> None:
        self._model = model
        self._encoder = encoder
        self._recipe = recipe
        self._known = known
        self._max_shift = max_shift
        self._grid = PatchGrid(recipe.vision.patch_size, recipe.vision.spatial_merge_size)
        self._rng = stream("base", seed)

    def learn_to_see(self, pictures: Pictures, report: Report) -> None:
        """The vision tower alone: one linear probe names subject, twist and place from the mean image token."""
        tower = self._model.model.visual
        probe = nn.Linear(self._recipe.text.hidden_size, _NUM_NAMES)
        optimisation = make_optimisation(self._recipe.seeing, [*tower.parameters(), *probe.parameters()])
        with patches_by_matmul(tower):
            for batch in self._batches(pictures, self._recipe.seeing):
                features = tower(to_patches(batch.pixels, self._grid), grid_thw=self._grids(batch.pixels)).pooler_output
                means = features.view(len(batch), -1, features.shape[-1]).mean(1)  # [pictures, hidden]
                loss = probe_loss(probe(means), [names_of(idea) for idea in batch.ideas])
                optimisation.step(loss)
                report(loss.item())

    def learn_to_read(self, pictures: Pictures, report: Report) -> None:
        """The whole model: next words of names and of fitting captions, and, on the last token, what picture and caption say.

        The latter by linear probes, thrown away too: they leave the base able to compare, not to prefer.
        """
        probes = ComparingProbes(self._recipe.text.hidden_size)
        optimisation = make_optimisation(self._recipe.reading, [*self._model.parameters(), *probes.parameters()])
        middle = self._recipe.text.num_hidden_layers // 2
        with patches_by_matmul(self._model.model.visual):
            for batch in self._batches(pictures, self._recipe.reading):
                image = self._placeholder(batch.pixels)
                lessons = [self._lesson(idea, image) for idea in batch.ideas]
                ids, labels = pad_rows(lessons)
                states = self._model.model(**self._inputs(batch.pixels, ids), output_hidden_states=True).hidden_states
                last = (range(len(lessons)), [len(lesson.row) - 1 for lesson in lessons])
                compared = probes(states[middle][last], states[-1][last], batch.ideas, [lesson.said for lesson in lessons])
                loss = self._next_word_loss(states[-1], labels) + compared
                optimisation.step(loss)
                report(loss.item())

    @torch.inference_mode()
    def measure_naming(self, pictures: Pictures, tokenizer: Any, batch_size: int = 60) -> Naming:
        """Greedy names against the truth, on pictures as they are."""
        hits = []
        for start in range(0, len(pictures), batch_size):
            batch = pictures.batch(range(start, min(start + batch_size, len(pictures))))
            hits += [_name_hits(said, idea) for said, idea in zip(self._say(batch.pixels, tokenizer), batch.ideas, strict=True)]
        return Naming(*torch.tensor(hits, dtype=torch.float64).mean(0).tolist())

    def _batches(self, pictures: Pictures, phase: Phase) -> Iterator[Pictures]:
        self._model.train()
        for _ in range(phase.num_steps):
            batch = pictures.batch(self._rng.sample(range(len(pictures)), phase.batch_size))
            yield Pictures(batch.scenes, vary(batch.pixels, self._max_shift, self._rng))

    def _lesson(self, idea: Idea, image: EncodedImage) -> Lesson:
        if self._rng.random() < self._recipe.naming_share:
            return self._row(name_scene(idea), self._recipe.naming_prompt, image)
        told = self._misremember(idea)
        template = self._rng.choice(TEMPLATES)
        lesson = self._row(make_caption(told, self._rng, template), None, image)
        said = tuple(getattr(told, part) if part in slots_of(template) else None for part in _PARTS)
        return replace(lesson, said=said, start=lesson.start if told == idea else len(lesson.row))

    def _misremember(self, idea: Idea) -> Idea:
        """The idea with each part wrong at the recipe's rate; only ideas that training may show."""
        while True:
            wrong = {
                part: self._rng.choice(names)
                for part, names in zip(_PARTS, _NAMES, strict=True)
                if self._rng.random() < self._recipe.wrong_share
            }
            told = replace(idea, **wrong)
            if told in self._known:
                return told

    def _row(self, text: str, prompt: str | None, image: EncodedImage) -> Lesson:
        encoded, errors = self._encoder.encode(Group((text,), prompt=prompt, image=image))
        if encoded is None:
            raise ValueError(f"text of the recipe cannot be encoded: {errors[0]}")
        return Lesson(encoded.rows[0], encoded.num_prefix)

    def _say(self, pixels: Tensor, tokenizer: Any) -> list[str]:
        """What the model calls each picture."""
        self._model.eval()
        lesson = self._row("x", self._recipe.naming_prompt, self._placeholder(pixels))
        ids = torch.from_numpy(lesson.row[: lesson.start]).expand(len(pixels), -1)
        said = self._model.generate(max_new_tokens=_MAX_NAME_TOKENS, do_sample=False, **self._inputs(pixels, ids))
        return [tokenizer.decode(line[lesson.start :]).partition("\n")[0] for line in said]

    def _next_word_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Mean over the labelled tokens, each predicted from the one before."""
        wanted = labels[:, 1:] != _IGNORED
        logits = self._model.lm_head(hidden[:, :-1][wanted])  # [labelled, vocabulary]
        return F.cross_entropy(logits, labels[:, 1:][wanted])

    def _inputs(self, pixels: Tensor, ids: Tensor) -> dict[str, Tensor]:
        """Without `mm_token_type_ids` transformers would leave out the three-axis positions and say nothing."""
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self._model.config.image_token_id).int(),
            "pixel_values": to_patches(pixels, self._grid),
            "image_grid_thw": self._grids(pixels),
        }

    def _grids(self, pixels: Tensor) -> Tensor:
        return torch.tensor([self._grid.grid_thw(*pixels.shape[-2:])] * len(pixels))

    def _placeholder(self, pixels: Tensor) -> EncodedImage:
        """Stands for each picture of a batch where only its token count matters."""
        height, width = pixels.shape[-2:]
        empty = np.empty((0, 0), dtype=np.float32)
        return EncodedImage("", empty, self._grid.grid_thw(height, width), self._grid.num_tokens(height, width))


class ComparingProbes(nn.Module):
    """Linear probes on a row's last token: at mid depth what the picture shows and what the caption says, at the end whether they agree.

    Two layers lie between, in which the model can multiply the one by the other.
    """

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.shown = nn.Linear(hidden_size, _NUM_NAMES)
        self.said = nn.Linear(hidden_size, _NUM_NAMES)
        self.agrees = nn.Linear(hidden_size, len(_PARTS))

    def forward(self, middle: Tensor, end: Tensor, ideas: Sequence[Idea], said: Sequence[Sequence[str | None]]) -> Tensor:
        """The loss of [rows, hidden] states at both depths."""
        shown = [names_of(idea) for idea in ideas]
        fits = [[None if word is None else word == name for word, name in zip(*row, strict=True)] for row in zip(said, shown, strict=True)]
        contents = probe_loss(self.shown(middle), shown) + probe_loss(self.said(middle), said)
        return contents + fit_loss(self.agrees(end), fits)


def round_to_bfloat16(model: nn.Module) -> None:
    """Every weight to the nearest bfloat16, kept as float32: what is trained on top is what will be loaded."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16).float())


def probe_loss(logits: Tensor, names: Sequence[Sequence[str | None]]) -> Tensor:
    """Sum over the parts of the mean cross entropy of their names; `logits` is [rows, subjects + twists + places].

    A part without a name (None) costs nothing.
    """
    losses = []
    for part, (known, scores) in enumerate(zip(_NAMES, torch.split(logits, [len(names) for names in _NAMES], dim=-1), strict=True)):
        truths = torch.tensor([_IGNORED if row[part] is None else known.index(row[part]) for row in names])
        cost = F.cross_entropy(scores, truths, ignore_index=_IGNORED, reduction="sum")
        losses.append(cost / max(1, int((truths != _IGNORED).sum())))
    return torch.stack(losses).sum()


def names_of(idea: Idea) -> tuple[str, str, str]:
    return idea.subject, idea.twist, idea.place


def fit_loss(logits: Tensor, fits: Sequence[Sequence[bool | None]]) -> Tensor:
    """Binary cross entropy a part of the caption, over the parts it has; `logits` is [rows, parts]."""
    known = torch.tensor([[fit is not None for fit in row] for row in fits])
    truths = torch.tensor([[float(fit or 0) for fit in row] for row in fits])
    losses = F.binary_cross_entropy_with_logits(logits, truths, reduction="none")
    return (losses * known).sum() / known.sum().clamp(min=1)


def pad_rows(lessons: Sequence[Lesson]) -> tuple[Tensor, Tensor]:
    """Ids and labels, [rows, longest]. Rows are padded on the right: attention is causal and padding carries no label."""
    longest = max(len(lesson.row) for lesson in lessons)
    ids = np.zeros((len(lessons), longest), dtype=np.int64)
    labels = np.full_like(ids, _IGNORED)
    for index, lesson in enumerate(lessons):
        ids[index, : len(lesson.row)] = lesson.row
        labels[index, lesson.start : len(lesson.row)] = lesson.row[lesson.start :]
    return torch.from_numpy(ids), torch.from_numpy(labels)


@contextlib.contextmanager
def patches_by_matmul(tower: Any) -> Iterator[None]:
    """The patch embedding as the matrix product it is: a Conv3d whose stride is its kernel is slow to differentiate on a CPU."""
    convolution = tower.patch_embed
    tower.patch_embed = _MatmulPatches(convolution)
    try:
        yield
    finally:
        tower.patch_embed = convolution


class _MatmulPatches(nn.Module):
    def __init__(self, convolution: Any) -> None:
        super().__init__()
        self.proj = convolution.proj

    def forward(self, patches: Tensor) -> Tensor:
        return F.linear(patches, self.proj.weight.flatten(1))


def make_optimisation(phase: Phase, parameters: Iterable[nn.Parameter]) -> Optimisation:
    return Optimisation(
        parameters,
        num_steps=phase.num_steps,
        learning_rate=phase.learning_rate,
        num_warmup_steps=phase.num_warmup_steps,
        weight_decay=phase.weight_decay,
        max_grad_norm=phase.max_grad_norm,
    )


def _name_hits(said: str, idea: Idea) -> tuple[bool, bool, bool, bool]:
    names = [name.strip() for name in said.split(",")]
    hits = [name == truth for name, truth in zip([*names, "", "", ""], (idea.subject, idea.twist, idea.place), strict=False)]
    return hits[0], hits[1], hits[2], all(hits)
