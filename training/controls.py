"""Controls: what a judge that cannot know the answer makes of the same pairs. A model is worth what it is ahead of them.

Caption length alone, the caption without image and prompt, and every image in the place of another.
Knows no model; scores come from outside.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from training.statistics import Agreement, Bootstrap, Estimate, Floats, agreement, credit, difference

_ATTEMPTS = 100
_Image = TypeVar("_Image")
LENGTH, CAPTION_ONLY, SHUFFLED = "caption length", "caption only", "shuffled images"
MEANING = {
    LENGTH: "the shorter caption wins, counted in characters; no model",
    CAPTION_ONLY: "the model without image, every prompt the default one",
    SHUFFLED: "the model with every image replaced by one of another contest",
}


@dataclass(frozen=True, slots=True)
class Control:
    """A control on the pairs that it and the model can both judge, or why it was left out."""

    name: str
    meaning: str
    skipped: str | None = None
    agreement: Agreement | None = None  # strict: a tie is no win
    guessing: Estimate | None = None  # its accuracy where a tie counts one half
    difference: Estimate | None = None  # accuracy of the model minus the control's on the same pairs, a tie of either one half


class NoDerangement(ValueError):
    """The images cannot all be replaced by those of other contests."""


def compared(name: str, real: Floats, control: Floats, contests: Sequence[str], bootstrap: Bootstrap) -> Control:
    """The control beside the model. Margins are NaN where a pair could not be judged; such pairs are left out of both."""
    both = np.isfinite(real) & np.isfinite(control)
    if not both.any():
        return skipped(name, "no pair can be judged both ways")
    labels = np.asarray(contests)[both].tolist()
    return Control(
        name,
        MEANING[name],
        agreement=agreement(control[both], labels, bootstrap),
        guessing=bootstrap.mean(credit(control[both]), labels),
        difference=difference(real[both], control[both], labels, bootstrap),
    )


def skipped(name: str, reason: str) -> Control:
    return Control(name, MEANING[name], reason)


def length_margins(captions: Sequence[tuple[str, str]]) -> Floats:
    """Margins of (chosen, rejected) by the judge "shorter wins": characters of the rejected minus characters of the chosen."""
    return np.array([len(rejected) - len(chosen) for chosen, rejected in captions], dtype=np.float64)


def shuffle_images(contests_of: Mapping[_Image, frozenset[str]], seed: int) -> dict[_Image, _Image]:
    """For every image another one, used once each, that shares no contest with it: a derangement, the same for the same seed.

    Images are sorted by contest in a drawn order and moved on by at least the size of the largest contest. Raises NoDerangement when
    one contest holds more than half of the images, or when images that several contests share leave no way found.
    """
    rng = random.Random(f"shuffled images/{seed}")  # noqa: S311 (a permutation, not a secret)
    images = list(contests_of)
    sizes: dict[str, int] = {}
    for name in (name for names in contests_of.values() for name in names):
        sizes[name] = sizes.get(name, 0) + 1
    most = max(sizes.values(), default=0)
    if 2 * most > len(images) or not images:
        raise NoDerangement("one contest holds more than half of the images")
    for _ in range(_ATTEMPTS):
        order = _by_contest(contests_of, rng)
        shift = rng.randint(most, len(images) - most)
        others = {image: order[(place + shift) % len(order)] for place, image in enumerate(order)}
        if all(contests_of[image].isdisjoint(contests_of[other]) for image, other in others.items()):
            return others
    raise NoDerangement("contests share their images")


def _by_contest(contests_of: Mapping[_Image, frozenset[str]], rng: random.Random) -> list[_Image]:
    """Images contest by contest, contests in a drawn order."""
    names = sorted({min(names) for names in contests_of.values()})
    rng.shuffle(names)
    place = {name: number for number, name in enumerate(names)}
    return sorted(contests_of, key=lambda image: place[min(contests_of[image])])
