"""A device whose every right answer is known: a score is a fraction of SHA-256 of model, image and ids. It can be told to fail.

A batch takes `a + b * captions` seconds of sleep, so that the capacity is known. A caption that names a fault meets it; a plan
names faults by the number of the batch. Above it the real `ReusingScorer`, so that its caches are under test as well.
"""

from __future__ import annotations

import hashlib
import random
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TextIO

import numpy as np

from app.caches import ByteBoundedCache
from app.contracts import EncodedGroup, EncodedImage, Ids, Scores
from app.errors import DeviceBroken, OutOfMemory
from app.metrics import Metrics
from app.reuse import Caches, Computed, KeptPrefix, PreparedBatch, ReusingScorer, Share
from app.settings import Settings

STICKY, HANG, RAISE, NAN, SHORT, HUGE, DIE = "<sticky>", "<hang>", "<raise>", "<nan>", "<short>", "<huge>", "<die>"
FAULTS = (STICKY, HANG, RAISE, NAN, SHORT, HUGE, DIE)
GARBAGE = 0.5  # what a broken device says
_PLANT_EVERY = 8  # batches that could be mixed up, between two that are
OracleShare = Share[str, str]


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds that a batch takes on the device."""

    a_s: float
    b_s: float


@dataclass(frozen=True, slots=True)
class FaultPlan:
    """Which batches fail as a whole, and pass when they are tried again: those of several groups only, where nobody is at fault."""

    seed: int = 0
    share: float = 0.0  # of the batches

    def fault_of(self, batch: int) -> Exception | None:
        draw = random.Random(f"{self.seed}:{batch}")
        if draw.random() >= self.share:
            return None
        return draw.choice([OutOfMemory("the device is full"), ValueError("a passing fault")])


class OracleBackend:
    """Implements `Backend`. Scores come from the very prefix and features it was handed: a kept one of another shows."""

    def __init__(self, model: str) -> None:
        self._model = model.encode()

    def stage(self, image: EncodedImage) -> str:
        return image.image_id

    def image_features(self, image: EncodedImage, staged: str | None) -> str:
        return staged or image.image_id

    def forward(self, shares: Sequence[OracleShare]) -> list[Computed[str]]:
        return [self._compute(share) for share in shares]

    def agree(self, first: Any, second: Any, *, exact: bool) -> bool:
        return bool(first == second)

    def _compute(self, share: OracleShare) -> Computed[str]:
        seen = share.kept.keys_values if share.kept else share.features or ""
        known = share.kept.ids if share.kept else share.prefix_ids
        scores = tuple(self._score(seen, np.concatenate([known[: len(row)], row[len(known) :]])) for row in share.rows)
        return Computed(scores, KeptPrefix(share.prefix_ids, seen, share.prefix_ids.nbytes))

    def _score(self, image_id: str, row: Ids) -> float:
        digest = hashlib.sha256(self._model + image_id.encode() + row.tobytes()).digest()
        return int.from_bytes(digest[:6], "big") / 2**48


class OracleDevice:
    """Implements `Scorer`."""

    def __init__(self, scorer: ReusingScorer[str, str], cost: Cost, plan: FaultPlan, plant: str | None, journal: TextIO | None) -> None:
        self._scorer = scorer
        self._journal = journal
        self._cost = cost
        self._plan = plan
        self._plant = plant
        self._num_batches = 0
        self._num_chances = 0
        self._is_broken = False

    def prepare(self, groups: Sequence[EncodedGroup]) -> PreparedBatch:
        return self._scorer.prepare(groups)

    def score(self, prepared: PreparedBatch) -> list[Scores]:
        captions = [_captions(group) for group in prepared.groups]
        self._note(captions)
        time.sleep(self._cost.a_s + self._cost.b_s * sum(map(len, captions)))
        self._num_batches += 1
        self._meet({caption for own in captions for caption in own})
        fault = self._plan.fault_of(self._num_batches)
        if fault is not None and len(captions) > 1:
            raise fault
        if isinstance(fault, ValueError) and self._plant == "lone-faults":
            raise fault
        scores = [_spoiled(own, given) for own, given in zip(captions, self._scorer.score(prepared), strict=True)]
        return self._planted(scores)

    def _note(self, captions: Sequence[Sequence[str]]) -> None:
        """When each caption came to the device, by the clock that all processes of a machine share."""
        if self._journal is not None:
            began = time.monotonic()
            self._journal.writelines(f"{began:.6f}\t{caption}\n" for own in captions for caption in own)
            self._journal.flush()

    def _meet(self, captions: set[str]) -> None:
        if STICKY in captions:
            self._is_broken = True
            if self._plant == "unrecognised":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            raise DeviceBroken("an illegal memory access was encountered")
        if HANG in captions:
            threading.Event().wait()
        if DIE in captions:
            raise SystemExit("the device thread ends")
        if RAISE in captions:
            raise ValueError("a poisoned caption")
        if HUGE in captions:
            raise OutOfMemory("the device is full")

    def _planted(self, scores: list[Scores]) -> list[Scores]:
        if self._is_broken:  # a broken device does not always say so again
            return [replace(each, values=(GARBAGE,) * len(each.values)) for each in scores]
        mixed = _mixed_up(scores, self._plant)
        if mixed == [each.values for each in scores]:  # nobody beside it to be mixed up with
            return scores
        self._num_chances += 1
        if self._num_chances % _PLANT_EVERY != 1:
            return scores
        return [replace(each, values=values) for each, values in zip(scores, mixed, strict=True)]


def _mixed_up(scores: Sequence[Scores], plant: str | None) -> list[tuple[float, ...]]:
    """The scores' values as the planted defect would leave them."""
    values = [each.values for each in scores]
    if plant == "swap-rows":
        values[0] = values[0][::-1]
    if plant == "neighbour" and len(values) > 1:
        values[0] = (values[1][0], *values[0][1:])
    return values


def build_device(
    settings: Settings, metrics: Metrics, model: str, cost: Cost, plan: FaultPlan, plant: str | None, journal: TextIO | None = None
) -> OracleDevice:
    """The device under the real scorer with its caches, each of a few MiB."""
    caches: Caches[str, str] = Caches(
        features=ByteBoundedCache[str]("features", 1 << 20, len, metrics),
        prefixes=ByteBoundedCache[KeptPrefix[str]]("prefixes", 1 << 20, lambda kept: kept.num_bytes + 1000, metrics),
        scores=ByteBoundedCache[float]("scores", min(settings.score_cache_bytes, 4 << 20), lambda _: 700, metrics),
    )
    scorer = ReusingScorer(
        OracleBackend(model), caches, fingerprint=model, metrics=metrics, score_tolerance=0.0, audit_every=settings.cache_audit_every
    )
    return OracleDevice(scorer, cost, plan, plant, journal)


def _captions(group: EncodedGroup) -> list[str]:
    return [bytes(row[group.num_prefix : -1].tolist()).decode() for row in group.rows]


def _spoiled(captions: Sequence[str], scores: Scores) -> Scores:
    """What the captions that name a fault make of their group's scores."""
    values = [float("nan") if caption == NAN else value for caption, value in zip(captions, scores.values, strict=True)]
    return replace(scores, values=tuple(values[:-1] if SHORT in captions else values))
