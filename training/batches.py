"""Which pairs meet in which forward: a pure function of keys, sizes and seed. Knows neither text nor tensors."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

_Key = TypeVar("_Key", bound=tuple[str, ...])


def plan_epoch(keys: Sequence[_Key], *, pairs_per_image: int, batch_size: int, seed: str) -> list[tuple[int, ...]]:
    """Batches of `batch_size` indices into `keys`, every index at most once, in an order that only the seed decides.

    Indices of one key (image, prompt, contest) come in bundles of `pairs_per_image`, which share a forward; what is left of a
    key is bundled with what is left of others. The last, incomplete batch is left out: another epoch draws another one.
    """
    rng = random.Random(seed)  # noqa: S311 (an order, not a secret)
    bundles: list[list[int]] = []
    rest: list[list[int]] = []
    for members in _by_key(keys):
        rng.shuffle(members)
        cut = len(members) - len(members) % pairs_per_image
        bundles += [members[start : start + pairs_per_image] for start in range(0, cut, pairs_per_image)]
        rest.append(members[cut:])
    rng.shuffle(rest)
    left = [index for members in rest for index in members]
    bundles += [left[start : start + pairs_per_image] for start in range(0, len(left), pairs_per_image)]
    rng.shuffle(bundles)
    bundles.sort(key=lambda bundle: len(bundle) < pairs_per_image)  # the one short bundle last, or it would cut others apart
    order = [index for bundle in bundles for index in bundle]
    return [tuple(order[start : start + batch_size]) for start in range(0, len(order) - batch_size + 1, batch_size)]


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The batches of every optimiser step for each of `num_processes`, over as many epochs as the steps take.

    A step is `num_accumulated` batches a process; an epoch's last batches that make no whole step are left out.
    """

    keys: Sequence[tuple[str, ...]]
    pairs_per_image: int
    batch_size: int
    num_accumulated: int
    num_processes: int
    seed: int

    @property
    def pairs_per_step(self) -> int:
        return self.batch_size * self.num_accumulated * self.num_processes

    @property
    def steps_per_epoch(self) -> int:
        return len(self.keys) // self.pairs_per_step

    def batches(self, process: int, first_step: int, num_steps: int) -> Iterator[tuple[int, ...]]:
        """The batches of one process in order, from the step after `first_step` (steps done) to `num_steps`."""
        for epoch in range(first_step // self.steps_per_epoch, -(-num_steps // self.steps_per_epoch)):
            seed = f"{self.seed} epoch {epoch}"
            planned = plan_epoch(self.keys, pairs_per_image=self.pairs_per_image, batch_size=self.batch_size, seed=seed)
            for place in range(self.steps_per_epoch):
                if first_step <= epoch * self.steps_per_epoch + place < num_steps:
                    start = place * self.num_accumulated * self.num_processes
                    yield from planned[start + process : start + self.num_accumulated * self.num_processes : self.num_processes]


def draw(num_all: int, num_wanted: int | None, seed: str) -> list[int]:
    """Sorted indices of a sample without replacement; all of them when no fewer are wanted."""
    if num_wanted is None or num_wanted >= num_all:
        return list(range(num_all))
    return sorted(random.Random(seed).sample(range(num_all), num_wanted))  # noqa: S311


def _by_key(keys: Sequence[_Key]) -> list[list[int]]:
    members: dict[_Key, list[int]] = {}
    for index, key in enumerate(keys):
        members.setdefault(key, []).append(index)
    return [members[key] for key in sorted(members)]
