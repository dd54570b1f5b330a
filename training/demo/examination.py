"""The demo's examination: held-out pairs before the right pictures and before shuffled ones. Knows no training."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from app.contracts import EncodedImage
from app.encoding import Encoder
from app.model import RewardModel
from training.collation import read_image
from training.demo.captions import FAULTS, Fault
from training.demo.drawings import Idea, Scene
from training.demo.posing import Posed, image_path
from training.demo.seeds import stream
from training.preference import encode_pairs, measure_margins

_GROUPS_PER_BATCH = 24


@dataclass(frozen=True)
class Judged:
    """Pairwise accuracy: overall and by what was wrong with the rejected caption."""

    accuracy: float
    by_fault: dict[Fault, float]
    num_pairs: int


class Examination:
    """Pairs of held-out pictures, the pictures read from the data folder."""

    def __init__(self, encoder: Encoder, folder: Path, posed: Sequence[Posed], seed: int) -> None:
        self._encoder = encoder
        self._posed: dict[Scene, list[Posed]] = {}
        for each in posed:
            self._posed.setdefault(each.scene, []).append(each)
        self._images = [read_image(encoder, folder / image_path(scene)) for scene in self._posed]
        self._others = shuffle_away([scene.idea for scene in self._posed], stream("shuffling", seed))

    def judge(self, model: RewardModel) -> Judged:
        return self._judge(model, self._images)

    def judge_shuffled(self, model: RewardModel) -> Judged:
        """The same captions with pictures of other ideas: near chance, unless the text gives the answer away."""
        return self._judge(model, [self._images[other] for other in self._others])

    def _judge(self, model: RewardModel, images: Sequence[EncodedImage]) -> Judged:
        together = list(self._posed.values())
        texts = [[(each.pair.chosen, each.pair.rejected) for each in some] for some in together]
        groups = [encode_pairs(self._encoder, image, None, some) for image, some in zip(images, texts, strict=True)]
        margins = measure_margins(model, groups, _GROUPS_PER_BATCH)
        right: dict[Fault, list[bool]] = {fault: [] for fault in FAULTS}
        for each, margin in zip((each for some in together for each in some), margins, strict=True):
            right[each.fault].append(margin > 0)
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
