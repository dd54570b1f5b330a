"""What earlier work is good for: equal rows computed once, known prefixes, pictures and scores not computed again.

Implements `Scorer` over a `Backend`; knows neither torch nor HTTP. Keys are content: fingerprint, SHA-256 of the image, token ids,
and how often something was found wrong before; a client's own names appear nowhere. Every so many hits one is computed all the same
and compared.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Protocol, TypeVar

import numpy as np

from app.caches import Audit, ByteBoundedCache
from app.contracts import EncodedGroup, EncodedImage, Ids, Scores
from app.errors import OutOfMemory
from app.metrics import Metrics
from app.parts import Part, Places, WrongPictures, parts_of

_Features = TypeVar("_Features")
_KeysValues = TypeVar("_KeysValues")
_MIN_LEAD = 8  # tokens: to save fewer is not worth a call of attention in every layer


@dataclass(frozen=True, slots=True)
class KeptPrefix(Generic[_KeysValues]):
    """The keys and values of a prefix, and the ids they belong to."""

    ids: Ids
    keys_values: _KeysValues
    num_bytes: int

    def fits(self, ids: Ids) -> bool:
        """Whether it is of these ids, as far as both go: what stands behind a token never changes its keys and values."""
        length = min(len(self.ids), len(ids))
        return bool(np.array_equal(self.ids[:length], ids[:length]))


@dataclass(frozen=True, slots=True)
class Share(Generic[_Features, _KeysValues]):
    """Rows of one image and prompt for the backend to compute."""

    prefix_ids: Ids
    rows: tuple[Ids, ...]  # whole; each begins with the prefix
    image: EncodedImage | None
    features: _Features | None  # of the image; None without one, or where the kept prefix or the lead holds it already
    kept: KeptPrefix[_KeysValues] | None
    lead: KeptPrefix[_KeysValues] | None = None  # of the first ids of a prefix that is not kept

    @property
    def num_prefix(self) -> int:
        return len(self.prefix_ids)


@dataclass(frozen=True, slots=True)
class Computed(Generic[_KeysValues]):
    """A share's scores, in the order of its rows, and its prefix to be kept."""

    scores: tuple[float, ...]
    prefix: KeptPrefix[_KeysValues]


class Backend(Protocol[_Features, _KeysValues]):
    """What computes. Called from one thread, but for `stage`."""

    def stage(self, image: EncodedImage) -> Any:
        """Send a picture's pixels ahead, for `image_features` to find. Called from any thread; raises OutOfMemory."""

    def image_features(self, image: EncodedImage, staged: Any | None) -> _Features:
        """`staged`: what `stage` gave for this picture; None where it was not asked or had no room."""

    def forward(self, shares: Sequence[Share[_Features, _KeysValues]]) -> list[Computed[_KeysValues]]: ...

    def agree(self, first: Any, second: Any, *, exact: bool) -> bool:
        """Whether features, or keys and values, computed twice are the same: bit for bit, or but for rounding."""


@dataclass(frozen=True, slots=True)
class Caches(Generic[_Features, _KeysValues]):
    """What is kept between batches, each bounded by bytes."""

    features: ByteBoundedCache[_Features]
    prefixes: ByteBoundedCache[KeptPrefix[_KeysValues]]
    scores: ByteBoundedCache[float]


@dataclass(frozen=True, slots=True)
class PreparedBatch:
    """Groups made ready for the device: what is distinct in them, and where each caption finds its score."""

    groups: tuple[EncodedGroup, ...]
    parts: tuple[Part, ...]
    places: Places
    staged: dict[str, Any]  # by image id, pictures on their way to the device; whoever takes one takes it out
    era: int  # how often something was found wrong before


@dataclass(slots=True)
class _Outcome:
    """A part on the device: scores by row, and what was known before."""

    scores: list[float | None]
    is_known: list[bool]
    num_prefix: int
    num_new_prefix: int = 0  # of these tokens, how many were computed now
    num_elsewhere: int = 0  # of these tokens, how many another part of the batch pays for


@dataclass(slots=True)
class _AtHand(Generic[_Features, _KeysValues]):
    """What belongs to the batch on the device alone."""

    staged: dict[str, Any] = field(default_factory=dict)
    made: dict[str, _Features] = field(default_factory=dict)  # pictures computed in it
    made_lead: KeptPrefix[_KeysValues] | None = None  # computed in it
    is_doubtful: bool = False  # whether it found something wrong


class ReusingScorer(Generic[_Features, _KeysValues]):
    """Implements `Scorer`: computes what is new, remembers it, and hands every caption its score.

    `deterministic`: every prefix and every row is computed by itself, so that its bits depend on nothing else: company, position
    or what is kept. `audit_every`: of so many hits of a cache one is computed again and compared (0: none).
    """

    def __init__(
        self,
        backend: Backend[_Features, _KeysValues],
        caches: Caches[_Features, _KeysValues],
        *,
        fingerprint: str,
        metrics: Metrics,
        score_tolerance: float,
        deterministic: bool = False,
        audit_every: int = 0,
        lead_ids: Ids | None = None,
        model: str = "",
    ) -> None:
        """`model`: its name in metrics.

        `lead_ids`: what every group of this model begins with, before its image and prompt; computed once."""
        self._lead_ids = lead_ids if lead_ids is not None and len(lead_ids) >= _MIN_LEAD else None
        self._lead: KeptPrefix[_KeysValues] | None = None
        self._at_hand: _AtHand[_Features, _KeysValues] = _AtHand()
        self._wrong = WrongPictures()
        self._lock = threading.Lock()
        self._era = 0
        self._backend = backend
        self._caches = caches
        self._fingerprint = fingerprint
        self._deterministic = deterministic
        self._score_tolerance = 0.0 if deterministic else score_tolerance
        self._audits = {name: Audit(name, audit_every, metrics, model) for name in ("features", "prefixes", "scores")}

    def prepare(self, groups: Sequence[EncodedGroup]) -> PreparedBatch:
        """Find what is distinct, and send ahead the pictures that are not known yet.

        The order is the content's own: the same captions give the same bits whichever is named first.
        """
        era = self._era  # before pictures are corrected: what is found wrong from here on makes the batch be done again
        groups = self._wrong.corrected(groups)
        parts, places = parts_of(groups, scope=f"{self._fingerprint}:{era}", alone=self._deterministic)
        return PreparedBatch(tuple(groups), parts, places, self._staged(parts), era)

    def score(self, prepared: PreparedBatch) -> list[Scores]:
        """Scores of every group, in order. Nothing is kept of a batch with a score that is not finite.

        Raises OutOfMemory, after it gave up what it kept on the device: the caller's smaller batches may need the room.
        """
        self._at_hand = _AtHand(prepared.staged)
        try:
            scores = self._score(prepared)
            while self._at_hand.is_doubtful or prepared.era != self._era:  # what was made of something wrong is wrong as well
                if self._at_hand.is_doubtful:
                    self.forget()
                prepared.staged.clear()
                prepared = self.prepare(prepared.groups)
                self._at_hand = _AtHand(prepared.staged)
                scores = self._score(prepared)
            return scores
        except OutOfMemory:
            self.make_room()
            raise
        finally:
            if self._at_hand.is_doubtful:
                self.forget()
            prepared.staged.clear()
            self._at_hand = _AtHand()

    def correct(self, wrong: EncodedImage, right: EncodedImage) -> None:
        """A picture was wrong that groups were encoded with: they get the right one, and nothing is kept. Safe across threads."""
        self._wrong.add(wrong, right)
        self.forget()

    def forget(self) -> None:
        """Something that was kept is wrong, or what it was made of: keep nothing. Safe across threads.

        Keys hold the era: what a batch of an earlier one still keeps is found by nobody.
        """
        with self._lock:
            self._era += 1
        self.make_room()
        self._caches.scores.clear()

    def make_room(self) -> None:
        """Keep nothing on the device. Safe across threads."""
        self._lead = None
        self._caches.prefixes.clear()
        self._caches.features.clear()

    def _score(self, prepared: PreparedBatch) -> list[Scores]:
        outcomes = [self._known(part) for part in prepared.parts]
        missing = [index for index, outcome in enumerate(outcomes) if not all(outcome.is_known)]
        todo = [self._share(prepared.parts[index], outcomes[index]) for index in missing]
        results = self._computed([share for share, _ in todo])
        sound = all(math.isfinite(score) for computed in results for score in computed.scores)
        for index, (share, doubted), computed in zip(missing, todo, results, strict=True):
            self._learn(prepared.parts[index], outcomes[index], share, doubted, computed, sound=sound)
        return _Bill(prepared, outcomes).scores()

    def _staged(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Pictures on their way to the device by the time it wants them. Where there is no room they wait on the host instead."""
        images = {part.image.image_id: part.image for part in parts if part.image is not None and self._is_to_be_seen(part)}
        try:
            return {image_id: self._backend.stage(image) for image_id, image in images.items()}
        except OutOfMemory:
            return {}

    def _is_to_be_seen(self, part: Part) -> bool:
        """As far as is known now: what is kept may be gone by the time of the batch, or have come. Counts as no lookup."""
        caches = self._caches
        is_kept = caches.prefixes.holds(part.key) or caches.features.holds(part.image_key)
        return part.fresh or not (is_kept or all(map(caches.scores.holds, part.score_keys)))

    def _known(self, part: Part) -> _Outcome:
        """The scores that are kept; what is due for an audit counts as unknown and is compared later."""
        if part.fresh:
            return _Outcome([None] * len(part.rows), [False] * len(part.rows), num_prefix=len(part.prefix_ids))
        found = [self._caches.scores.get(key) for key in part.score_keys]
        is_known = [value is not None and not self._audits["scores"].is_due() for value in found]
        return _Outcome(found, is_known, num_prefix=len(part.prefix_ids))

    def _share(self, part: Part, outcome: _Outcome) -> tuple[Share[_Features, _KeysValues], KeptPrefix[_KeysValues] | None]:
        """What the backend shall compute, and a kept prefix that is computed again to be compared."""
        rows = tuple(row for row, known in zip(part.rows, outcome.is_known, strict=True) if not known)
        if part.fresh:
            outcome.num_new_prefix = len(part.prefix_ids)
            features = self._made_now(part.image) if part.image is not None else None
            return Share(part.prefix_ids, rows, part.image, features, None, self._fresh_lead(part, outcome)), None
        kept = self._caches.prefixes.get(part.key)
        if kept is not None and not kept.fits(part.prefix_ids):
            self._audits["prefixes"].record(agrees=False, what="of other ids")
            self._at_hand.is_doubtful, kept = True, None
        doubted = None
        if kept is not None and self._audits["prefixes"].is_due():
            kept, doubted = None, kept
        if kept is not None:
            return self._behind(part, rows, kept, outcome), None
        outcome.num_new_prefix = len(part.prefix_ids)
        features = self._features(part, part.image) if part.image is not None else None
        lead = self._lead_of(part, outcome) if doubted is None else self._fresh_lead(part, outcome)  # an audit doubts the beginning, too
        return Share(part.prefix_ids, rows, part.image, features, None, lead), doubted

    def _behind(self, part: Part, rows: tuple[Ids, ...], kept: KeptPrefix[_KeysValues], outcome: _Outcome) -> Share[_Features, _KeysValues]:
        """Rows behind a kept prefix. One that is too short is lengthened first, unless what its rows then compute each is next to nothing,
        less than `_MIN_LEAD` together and less than the prefix, which is what the batch was planned to compute.

        Never where bits must not depend on what is kept: there a key holds the length of its prefix.
        """
        num_missing = len(part.prefix_ids) - len(kept.ids)
        if num_missing * len(rows) < max(1, min(_MIN_LEAD, len(part.prefix_ids))):
            return Share(part.prefix_ids, rows, part.image, None, kept)
        outcome.num_new_prefix = num_missing
        return Share(part.prefix_ids, rows, part.image, None, None, lead=kept)

    def _lead_of(self, part: Part, outcome: _Outcome) -> KeptPrefix[_KeysValues] | None:
        """What is known of the beginning of a prefix. Whoever asks first pays for it."""
        lead = self._lead  # once: other threads may take it away
        if lead is not None and self._begins_with_lead(part):
            outcome.num_new_prefix -= len(lead.ids)
            return lead
        return self._fresh_lead(part, outcome)

    def _fresh_lead(self, part: Part, outcome: _Outcome) -> KeptPrefix[_KeysValues] | None:
        """The beginning computed in this batch, once; a kept one is held against it."""
        if self._lead_ids is None or not self._begins_with_lead(part):
            return None
        if self._at_hand.made_lead is None:
            (computed,) = self._backend.forward([Share(self._lead_ids, (), None, None, None)])
            self._at_hand.made_lead, kept = computed.prefix, self._lead
            if kept is not None:
                self._compare("prefixes", kept.keys_values, computed.prefix.keys_values)
        else:
            outcome.num_elsewhere = len(self._lead_ids)
            outcome.num_new_prefix -= len(self._lead_ids)
        return self._at_hand.made_lead

    def _begins_with_lead(self, part: Part) -> bool:
        ids = self._lead_ids
        return ids is not None and len(part.prefix_ids) > len(ids) and np.array_equal(part.prefix_ids[: len(ids)], ids)

    def _features(self, part: Part, image: EncodedImage) -> _Features:
        if image.image_id in self._at_hand.made:
            return self._at_hand.made[image.image_id]
        kept = self._caches.features.get(part.image_key)
        if kept is not None and not self._audits["features"].is_due():
            return kept
        fresh = self._made_now(image)
        if kept is not None:
            self._compare("features", kept, fresh)
        return fresh

    def _made_now(self, image: EncodedImage) -> _Features:
        """Computed in this batch, once however many prompts ask about the picture."""
        made = self._at_hand.made
        if image.image_id not in made:
            made[image.image_id] = self._backend.image_features(image, self._at_hand.staged.pop(image.image_id, None))
        return made[image.image_id]

    def _computed(self, shares: Sequence[Share[_Features, _KeysValues]]) -> list[Computed[_KeysValues]]:
        if not self._deterministic:
            return self._backend.forward(shares) if shares else []
        return [self._computed_alone(share) for share in shares]

    def _computed_alone(self, share: Share[_Features, _KeysValues]) -> Computed[_KeysValues]:
        """The prefix by itself, unless there is none, then row after row by itself."""
        prefix = share.kept
        if prefix is None and share.num_prefix:
            (alone,) = self._backend.forward([replace(share, rows=())])
            prefix = alone.prefix
        each = [self._backend.forward([replace(share, rows=(row,), features=None, kept=prefix)])[0] for row in share.rows]
        return Computed(tuple(score for computed in each for score in computed.scores), prefix or each[-1].prefix)

    def _learn(
        self,
        part: Part,
        outcome: _Outcome,
        share: Share[_Features, _KeysValues],
        doubted: KeptPrefix[_KeysValues] | None,
        computed: Computed[_KeysValues],
        *,
        sound: bool,
    ) -> None:
        """Take the scores over, compare what was doubted, keep what is sound: all scores of the batch were finite."""
        if len(computed.scores) != len(share.rows):
            raise RuntimeError(f"the model returned {len(computed.scores)} scores for {len(share.rows)} rows")
        sound = sound and not part.fresh
        if doubted is not None:
            self._compare("prefixes", doubted.keys_values, computed.prefix.keys_values)
        if share.kept is None:
            if sound:
                self._keep(part, share, computed.prefix)
                if self._at_hand.made_lead is not None:
                    self._lead = self._at_hand.made_lead
        else:
            outcome.num_prefix = min(outcome.num_prefix, len(share.kept.ids))
        fresh = iter(computed.scores)
        for index, (key, known) in enumerate(zip(part.score_keys, outcome.is_known, strict=True)):
            if not known:
                self._take(outcome, index, key, next(fresh), sound=sound)

    def _keep(self, part: Part, share: Share[_Features, _KeysValues], prefix: KeptPrefix[_KeysValues]) -> None:
        if share.num_prefix:
            self._caches.prefixes.put(part.key, prefix)
        if share.image is not None and share.features is not None:
            self._caches.features.put(part.image_key, share.features)

    def _compare(self, cache: str, kept: Any, fresh: Any) -> None:
        agrees = self._backend.agree(kept, fresh, exact=self._deterministic)
        self._audits[cache].record(agrees=agrees)
        self._at_hand.is_doubtful |= not agrees

    def _take(self, outcome: _Outcome, index: int, key: str, score: float, *, sound: bool) -> None:
        kept = outcome.scores[index]
        if kept is not None and math.isfinite(score):
            agrees = abs(kept - score) <= self._score_tolerance * max(1.0, abs(kept))
            self._audits["scores"].record(agrees=agrees, what=f"{kept} was kept, {score} is computed now")
            self._at_hand.is_doubtful |= not agrees
            score = kept if agrees else score  # looking again must not change an answer: equal captions keep equal bits
        outcome.scores[index] = score
        if sound:
            self._caches.scores.put(key, score)


class _Bill:
    """Who pays for what: a prefix and a row count for the first group that asked for them."""

    def __init__(self, batch: PreparedBatch, outcomes: Sequence[_Outcome]) -> None:
        self._batch = batch
        self._outcomes = outcomes
        self._paid: set[tuple[int, int | None]] = set()

    def scores(self) -> list[Scores]:
        return [self._of(group, places) for group, places in zip(self._batch.groups, self._batch.places, strict=True)]

    def _of(self, group: EncodedGroup, places: Sequence[tuple[int, int]]) -> Scores:
        computed = cached = 0
        for part, row in places:
            for item in ((part, None), (part, row)):
                if item not in self._paid:
                    self._paid.add(item)
                    num_tokens, num_new = self._cost(*item)
                    computed, cached = computed + num_new, cached + num_tokens - num_new
        values = tuple(self._score(part, row) for part, row in places)
        return Scores(values, sum(map(len, group.rows)), computed, cached)

    def _cost(self, part: int, row: int | None) -> tuple[int, int]:
        """Tokens of a prefix (None) or of a row behind it, and how many of them were computed now."""
        outcome = self._outcomes[part]
        if row is None:
            return outcome.num_prefix - outcome.num_elsewhere, outcome.num_new_prefix
        num_tokens = len(self._batch.parts[part].rows[row]) - outcome.num_prefix
        return num_tokens, 0 if outcome.is_known[row] else num_tokens

    def _score(self, part: int, row: int) -> float:
        score = self._outcomes[part].scores[row]
        if score is None:
            raise RuntimeError("a row was left without a score")
        return score
