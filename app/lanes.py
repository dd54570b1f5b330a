"""The lane of each model through the one batch loop: its end of the queue, and behind the device thread its own scorer.

A group belongs to the model in whose lane it was put. Knows neither HTTP nor torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from app.batching import Batcher
from app.contracts import EncodedGroup, Job, Scorer, Scores
from app.errors import DeviceBroken, OutOfMemory


class Queue(Protocol):
    """Where groups wait for the device: a batcher, or a model's lane into it."""

    @property
    def alive(self) -> bool: ...

    def submit(self, group: EncodedGroup, deadline: float) -> Job: ...

    async def idle(self) -> None: ...

    def give_up(self, fault: DeviceBroken) -> None: ...


class Lane:
    """One model's end of the queue: what is submitted here is scored by it and by no other."""

    def __init__(self, batcher: Batcher, model: str) -> None:
        self._batcher = batcher
        self._model = model

    @property
    def alive(self) -> bool:
        return self._batcher.alive

    def submit(self, group: EncodedGroup, deadline: float) -> Job:
        """As the batcher's."""
        return self._batcher.submit(replace(group, model=self._model), deadline)

    async def idle(self) -> None:
        """Wait until nothing is queued or computed, of any model."""
        await self._batcher.idle()

    def give_up(self, fault: DeviceBroken) -> None:
        """The device is every model's: no further number of any can be believed."""
        self._batcher.give_up(fault)


class RoomyScorer(Scorer, Protocol):
    """A scorer that keeps something on the device and can give it up."""

    def make_room(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Own:
    """What of a batch is one model's."""

    model: str
    places: tuple[int, ...]  # of its groups in the batch
    prepared: Any


class LanesScorer:
    """Implements `Scorer`: gives each model its own groups of a batch, one model after the other.

    Raises KeyError for a group that came in by no lane.
    """

    def __init__(self, scorers: Mapping[str, RoomyScorer]) -> None:
        """`scorers`: by the names of the lanes."""
        self._scorers = dict(scorers)

    def prepare(self, groups: Sequence[EncodedGroup]) -> tuple[_Own, ...]:
        """Each model's groups made ready, in the order in which the models first come."""
        places: dict[str, list[int]] = {}
        for place, group in enumerate(groups):
            places.setdefault(group.model, []).append(place)
        return tuple(
            _Own(model, tuple(own), self._scorers[model].prepare([groups[place] for place in own])) for model, own in places.items()
        )

    def score(self, prepared: Sequence[_Own]) -> list[Scores]:
        """Scores of every group, in the batch's order. Raises OutOfMemory after every model gave up what it kept on the device."""
        found: dict[int, Scores] = {}
        try:
            for own in prepared:
                found |= zip(own.places, self._scorers[own.model].score(own.prepared), strict=True)
        except OutOfMemory:
            for scorer in self._scorers.values():
                scorer.make_room()
            raise
        return [found[place] for place in range(len(found))]
