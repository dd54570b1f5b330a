"""What is computed once, remembered and doubted: the scorer over a fake backend whose scores show whose prefix and picture were used."""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.caches import ByteBoundedCache
from app.contracts import EncodedGroup, EncodedImage, Ids, Scores
from app.errors import OutOfMemory
from app.metrics import Metrics
from app.reuse import Caches, Computed, KeptPrefix, ReusingScorer, Share
from tests.fakes import sample

KeysValues = tuple[str, tuple[int, ...]]  # picture and ids it was computed from
FakeShare = Share[str, KeysValues]
FINGERPRINT = "f" * 64
SCORE_BYTES, FEATURE_BYTES = 100, 50
ROUNDING = 2**-40
LEAD = np.arange(900, 909)  # what prompts that begin with `long` begin with, whatever the picture
quick = settings(max_examples=60, deadline=None, derandomize=True)


def oracle(picture: str, ids: Sequence[int]) -> float:
    """Nobody's guess, and exact in float64."""
    digest = hashlib.sha256(f"{picture}:{[int(each) for each in ids]}".encode()).digest()
    return int.from_bytes(digest[:4], "big") / 2**32


@dataclass(slots=True)
class FakeBackend:
    """Scores come from the very prefix and features it was handed; `rounding`: their last bits from company and position too."""

    rounding: bool = False
    unsound: dict[bytes, float] = field(default_factory=dict)  # rows that get such a score
    fault: Exception | None = None  # of the next call
    meanwhile: Callable[[], None] = lambda: None  # what another thread does while the next forward runs
    forwards: list[tuple[FakeShare, ...]] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)
    num_tokens: int = 0
    staged: list[str] = field(default_factory=list)
    used: list[str] = field(default_factory=list)  # of the pictures staged
    max_staged: int = 1000  # pictures there is room for in each batch

    def stage(self, image: EncodedImage) -> str:
        if len(self.staged) == self.max_staged:
            raise OutOfMemory("no room for a copy")
        self.staged.append(image.image_id)
        return f"staged {image.image_id}"

    def image_features(self, image: EncodedImage, staged: str | None) -> str:
        self._fail()
        assert staged in (None, f"staged {image.image_id}")
        self.used += [] if staged is None else [image.image_id]
        self.pictures.append(image.image_id)
        return f"{image.image_id} gone wrong" if image.patches.any() else image.image_id

    def forward(self, shares: Sequence[FakeShare]) -> list[Computed[KeysValues]]:
        self._fail()
        self.forwards.append(tuple(shares))
        meanwhile, self.meanwhile = self.meanwhile, lambda: None
        meanwhile()
        return [self._answer(share, place) for place, share in enumerate(shares)]

    def agree(self, first: Any, second: Any, *, exact: bool) -> bool:
        return bool(first == second)

    @property
    def num_rows(self) -> int:
        return sum(len(share.rows) for shares in self.forwards for share in shares)

    def _fail(self) -> None:
        fault, self.fault = self.fault, None
        if fault is not None:
            raise fault

    def _answer(self, share: FakeShare, place: int) -> Computed[KeysValues]:
        assert all(np.array_equal(row[: share.num_prefix], share.prefix_ids) and len(row) > share.num_prefix for row in share.rows)
        prefix = share.kept
        if prefix is None:
            picture, known = ("", ()) if share.lead is None else share.lead.keys_values
            assert (share.image is None or picture != "") == (share.features is None)
            ids = (*known, *share.prefix_ids[len(known) :].tolist())
            prefix = KeptPrefix(share.prefix_ids, (share.features or picture, ids), 10 * share.num_prefix)
            self.num_tokens += share.num_prefix - len(known)
        split = min(share.num_prefix, len(prefix.ids))
        self.num_tokens += sum(len(row) - split for row in share.rows)
        scores = [self._score(prefix.keys_values, split, row) for row in share.rows]
        if self.rounding:
            scores = [score + ROUNDING * (len(self.forwards[-1]) + 7 * len(scores) + 31 * place + at) for at, score in enumerate(scores)]
        return Computed(tuple(scores), prefix)

    def _score(self, keys_values: KeysValues, split: int, row: Ids) -> float:
        picture, ids = keys_values
        return self.unsound.get(row.tobytes(), oracle(picture, [*ids[:split], *row[split:].tolist()]))


class OpenCache(ByteBoundedCache[Any]):
    """A cache that lets a test see every key it was asked to keep, and every key it was asked for."""

    def __init__(self, name: str, max_bytes: int, num_bytes: Callable[[Any], int], metrics: Metrics) -> None:
        super().__init__(name, max_bytes, num_bytes, metrics)
        self.kept: dict[str, Any] = {}
        self.asked: list[str] = []

    def put(self, key: str, value: Any) -> None:
        self.kept[key] = value
        super().put(key, value)

    def get(self, key: str) -> Any:
        self.asked.append(key)
        return super().get(key)


@dataclass(slots=True)
class World:
    """A scorer, and what stands around it."""

    backend: FakeBackend
    metrics: Metrics
    features: OpenCache
    prefixes: OpenCache
    scores: OpenCache
    scorer: ReusingScorer[str, KeysValues]

    def score(self, *groups: EncodedGroup) -> list[Scores]:
        return self.scorer.score(self.scorer.prepare(groups))

    def beside(self, fingerprint: str) -> World:
        """Another model over the same caches and backend."""
        caches: Caches[str, KeysValues] = Caches(self.features, self.prefixes, self.scores)
        scorer = ReusingScorer(self.backend, caches, fingerprint=fingerprint, metrics=self.metrics, score_tolerance=1e-6, lead_ids=LEAD)
        return replace(self, scorer=scorer)

    def counted(self, name: str, cache: str) -> float:
        return sample(self.metrics, name, cache=cache)

    def audits(self, cache: str) -> tuple[float, float]:
        """Audits, and those that failed."""
        return self.counted("reward_cache_audits_total", cache), self.counted("reward_cache_audit_mismatches_total", cache)


def world(*, max_bytes: int | tuple[int, int, int] = 1 << 20, backend: FakeBackend | None = None, **options: Any) -> World:
    """`max_bytes`: of features, prefixes, scores."""
    metrics, backend = Metrics(), backend or FakeBackend()
    sizes = (max_bytes,) * 3 if isinstance(max_bytes, int) else max_bytes
    features = OpenCache("features", sizes[0], lambda each: FEATURE_BYTES, metrics)
    prefixes = OpenCache("prefixes", sizes[1], lambda prefix: prefix.num_bytes, metrics)
    scores = OpenCache("scores", sizes[2], lambda each: SCORE_BYTES, metrics)
    caches: Caches[str, KeysValues] = Caches(features, prefixes, scores)
    options = {"fingerprint": FINGERPRINT, "score_tolerance": 1e-6, "lead_ids": LEAD} | options
    return World(backend, metrics, features, prefixes, scores, ReusingScorer(backend, caches, metrics=metrics, **options))


def common_of(picture: str, prompt: str) -> list[int]:
    """The ids that captions of this picture and prompt may begin with; without either there are none."""
    if not picture and not prompt:
        return []
    own = random.Random(f"{picture} {prompt}").choices(range(5), k=3 + 2 * len(prompt))
    return [*LEAD.tolist(), *own] if prompt.startswith("long") else own


def group(picture: str, prompt: str, captions: Sequence[str], *, fresh: bool = False) -> EncodedGroup:
    """Letters are tokens. A caption that begins with `-` merges into the prompt's last token, with `=` into two, with `#` into nine."""
    common, rows, own = common_of(picture, prompt), [], []
    for caption in captions:
        merged = {"-": 1, "=": 2, "#": 9}.get(caption[:1], 0)
        own.append(max(min(1, len(common)), len(common) - merged))
        rows.append(
            np.asarray([*common[: own[-1]], *(1000 * (place == 0) + ord(char) for place, char in enumerate(caption))], dtype=np.int64)
        )
    image = EncodedImage(picture, np.zeros((4, 1), np.float32), (1, 2, 2), 1) if picture else None
    return EncodedGroup((picture, prompt.encode()), image, tuple(rows), min(own), row_prefixes=tuple(own), fresh=fresh)


def wanted(group: EncodedGroup) -> tuple[float, ...]:
    return tuple(oracle(group.key[0], row.tolist()) for row in group.rows)


def values(scores: Sequence[Scores]) -> list[tuple[float, ...]]:
    return [each.values for each in scores]


def costs(scores: Scores) -> tuple[int, int, int]:
    return scores.num_tokens, scores.num_computed_tokens, scores.num_cached_tokens


both = pytest.mark.parametrize("deterministic", [False, True], ids=["together", "alone"])


# Hits


@both
def test_a_score_that_is_known_is_not_computed_again(deterministic: bool) -> None:
    here, asked = world(deterministic=deterministic), group("cat", "ab", ["x", "yy", "x"])
    first, second = here.score(asked), here.score(asked)
    assert values(first) == values(second) == [wanted(asked)]
    assert here.backend.num_rows == 2  # of three captions, two are equal
    assert here.backend.num_tokens == 7 + 1 + 2
    assert costs(first[0]) == (8 + 9 + 8, 7 + 1 + 2, 0)
    assert costs(second[0]) == (8 + 9 + 8, 0, 7 + 1 + 2)
    assert here.backend.pictures == ["cat"]


@both
def test_a_known_prefix_computes_the_suffixes_of_new_captions_only(deterministic: bool) -> None:
    here = world(deterministic=deterministic)
    here.score(group("cat", "ab", ["x", "yy"]))
    before = here.backend.num_tokens
    asked = group("cat", "ab", ["zzz", "x"])
    (scores,) = here.score(asked)
    assert scores.values == wanted(asked)
    assert here.backend.num_tokens - before == 3
    assert costs(scores) == (10 + 8, 3, 7 + 1)
    (share,) = here.backend.forwards[-1]
    assert share.kept is not None
    assert share.features is None
    assert here.backend.pictures == ["cat"]


@both
def test_a_known_picture_is_not_looked_at_again_for_another_prompt(deterministic: bool) -> None:
    here = world(deterministic=deterministic)
    groups = [group("cat", prompt, ["x"]) for prompt in ("a", "b", "c")]
    assert values(here.score(groups[0], groups[1])) == [wanted(each) for each in groups[:2]]
    assert values(here.score(groups[2])) == [wanted(groups[2])]
    assert here.backend.pictures == ["cat"]


def test_equal_rows_of_one_batch_are_computed_once_and_paid_by_the_first_group() -> None:
    here = world()
    groups = [
        group("cat", "ab", ["x", "yy"]),
        group("cat", "ab", ["yy", "zzz"]),
        group("dog", "ab", ["x"]),
        group("cat", "ab", ["x", "yy"]),
    ]
    found = here.score(*groups)
    assert values(found) == [wanted(each) for each in groups]
    assert [costs(each) for each in found] == [(17, 10, 0), (19, 3, 0), (8, 8, 0), (17, 0, 0)]
    assert here.backend.num_tokens == 21
    assert len(here.backend.forwards) == 1
    assert sorted(here.backend.pictures) == ["cat", "dog"]


def test_without_a_picture_nothing_is_looked_at() -> None:
    here, asked = world(), group("", "ab", ["x"])
    assert values(here.score(asked)) == values(here.score(asked)) == [wanted(asked)]
    assert here.backend.pictures == []
    assert here.features.asked == []


def test_the_same_text_with_another_picture_is_another_row() -> None:
    """Placeholders are equal ids in both rows: only the picture tells them apart."""
    here = world()
    cat = group("cat", "ab", ["x"])
    dog = replace(cat, key=("dog", cat.key[1]), image=EncodedImage("dog", np.zeros((4, 1), np.float32), (1, 2, 2), 1))
    for _ in range(2):
        assert values(here.score(cat, dog)) == [wanted(cat), wanted(dog)]
    assert wanted(cat) != wanted(dog)


def test_an_empty_batch_computes_nothing() -> None:
    here = world()
    assert here.score() == []
    assert here.backend.forwards == []


def test_preparing_counts_no_lookup_and_computes_nothing() -> None:
    """So that it may run while the batch before is on the device; what that one learns is found all the same."""
    here, asked = world(), group("cat", "ab", ["x", "yy"])
    first, second = here.scorer.prepare([asked]), here.scorer.prepare([asked])
    assert (here.scores.asked, here.prefixes.asked, here.features.asked, here.backend.forwards) == ([], [], [], [])
    assert here.scorer.score(first)[0].num_computed_tokens == 10
    assert here.scorer.score(second)[0].num_computed_tokens == 0
    assert here.scorer.score(first)[0].values == wanted(asked)


# What is not kept


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@both
def test_nothing_is_kept_of_a_batch_with_a_score_that_is_not_finite(bad: float, deterministic: bool) -> None:
    here = world(deterministic=deterministic)
    broken, fine = group("cat", "ab", ["x", "yy"]), group("dog", "ab", ["x"])
    here.backend.unsound = {broken.rows[1].tobytes(): bad}
    found = here.score(broken, fine)
    assert np.array_equal(found[0].values, [wanted(broken)[0], bad], equal_nan=True)
    assert values(found[1:]) == [wanted(fine)]
    assert (here.scores.kept, here.prefixes.kept) == ({}, {})  # what stood beside it is in doubt as well
    here.backend.unsound = {}
    again = here.score(broken, fine)
    assert values(again) == [wanted(broken), wanted(fine)]
    assert (costs(again[0])[1:], costs(again[1])[1:]) == ((10, 0), (8, 0))


@pytest.mark.parametrize(
    "fault", [OutOfMemory("no memory"), RuntimeError("broken"), ValueError("wrong")], ids=lambda fault: type(fault).__name__
)
@pytest.mark.parametrize("is_late", [False, True], ids=["features", "forward"])
@both
def test_a_failure_reaches_the_caller_and_nothing_is_kept_of_it(fault: Exception, is_late: bool, deterministic: bool) -> None:
    here, asked = world(deterministic=deterministic), group("cat" if not is_late else "", "ab", ["x"])
    here.backend.fault = fault
    with pytest.raises(type(fault), match=str(fault)):
        here.score(asked)
    assert (here.scores.kept, here.prefixes.kept, here.features.kept) == ({}, {}, {})
    (scores,) = here.score(asked)
    assert (scores.values, scores.num_cached_tokens) == (wanted(asked), 0)


@both
def test_features_that_make_a_score_not_finite_are_not_kept(deterministic: bool) -> None:
    class Blinded(FakeBackend):
        def _score(self, keys_values: KeysValues, split: int, row: Ids) -> float:
            return math.nan if len(self.pictures) == 1 else FakeBackend._score(self, keys_values, split, row)

    here, asked = world(backend=Blinded(), deterministic=deterministic), group("cat", "ab", ["x"])
    assert math.isnan(here.score(asked)[0].values[0])
    assert (here.features.kept, here.prefixes.kept, here.scores.kept) == ({}, {}, {})
    assert values(here.score(asked)) == [wanted(asked)]
    assert here.backend.pictures == ["cat", "cat"]


@both
def test_a_picture_of_several_prompts_is_looked_at_once_in_a_batch_whatever_is_kept(deterministic: bool) -> None:
    here = world(max_bytes=0, deterministic=deterministic)
    groups = [group("cat", "a", ["x"]), group("cat", "b", ["x"]), group("cat", "c", ["x"], fresh=True)]
    for times in (1, 2):
        assert values(here.score(*groups)) == [wanted(each) for each in groups]
        assert here.backend.pictures == ["cat"] * times


@both
def test_fresh_groups_neither_read_nor_write(deterministic: bool) -> None:
    here = world(deterministic=deterministic)
    usual, fresh = group("cat", "ab", ["x", "yy"]), group("cat", "ab", ["x", "yy"], fresh=True)
    for _ in range(2):
        (scores,) = here.score(fresh)
        assert (scores.values, costs(scores)[1:]) == (wanted(usual), (10, 0))
    caches = (here.scores, here.prefixes, here.features)
    assert [(each.kept, each.asked) for each in caches] == [({}, [])] * 3
    assert here.score(usual)[0].num_cached_tokens == 0
    kept = [dict(each.kept) for each in caches]
    here.backend.unsound = {usual.rows[0].tobytes(): 5.0}  # only a new computation would see it
    found = here.score(fresh, usual)
    assert values(found) == [(5.0, wanted(usual)[1]), wanted(usual)]
    assert [costs(each)[1:] for each in found] == [(10, 0), (0, 10)]
    assert [each.kept for each in caches] == kept


def test_a_backend_that_forgets_a_row_is_an_error() -> None:
    class Forgetful(FakeBackend):
        def forward(self, shares: Sequence[FakeShare]) -> list[Computed[KeysValues]]:
            return [Computed(each.scores[1:], each.prefix) for each in FakeBackend.forward(self, shares)]

    here = world(backend=Forgetful())
    with pytest.raises(RuntimeError, match="returned 1 scores for 2 rows"):
        here.score(group("cat", "ab", ["x", "yy"]))
    assert here.scores.kept == {}


# Prefixes of other lengths


@both
def test_a_kept_prefix_may_be_longer_or_shorter_than_the_one_needed(deterministic: bool) -> None:
    usual, merging, both_of = group("cat", "ab", ["x"]), group("cat", "ab", ["=y", "-y"]), group("cat", "ab", ["u", "=v", "-w"])
    for first, second, third in itertools.permutations([usual, merging, both_of]):
        here = world(deterministic=deterministic)
        for asked in (first, second, third, first):
            assert values(here.score(asked)) == [wanted(asked)]
        assert values(here.score(first, second, third)) == [wanted(first), wanted(second), wanted(third)]


def test_a_shorter_prefix_is_paid_for_as_it_was_computed() -> None:
    here = world()
    assert costs(here.score(group("cat", "ab", ["=y"]))[0]) == (7, 7, 0)  # kept: five of the prompt's seven tokens
    before = here.backend.num_tokens
    (scores,) = here.score(group("cat", "ab", ["x"]))
    assert here.backend.num_tokens - before == scores.num_computed_tokens == 3
    assert scores.num_cached_tokens == 5


def test_a_prefix_that_is_much_too_short_is_lengthened_once_for_all_who_come_later() -> None:
    """Of the prompt's eleven tokens a caption that merges leaves two. Only the nine behind them are computed, and the picture is not."""
    here = world()
    assert costs(here.score(group("cat", "abcd", ["#y"]))[0]) == (4, 4, 0)
    before, asked = here.backend.num_tokens, group("cat", "abcd", ["x", "yy"])
    (scores,) = here.score(asked)
    assert (scores.values, costs(scores)) == (wanted(asked), (25, 9 + 1 + 2, 2))
    assert here.backend.num_tokens - before == scores.num_computed_tokens
    ((share,),) = here.backend.forwards[1:]
    assert share.lead is not None
    assert (share.kept, share.features, len(share.lead.ids)) == (None, None, 2)
    (later,) = here.score(group("cat", "abcd", ["zzz"]))
    assert costs(later) == (14, 3, 11)
    (merged,) = here.score(group("cat", "abcd", ["#zz"]))  # the longer one serves the short as well
    assert (merged.values, costs(merged)) == (wanted(group("cat", "abcd", ["#zz"])), (5, 3, 2))
    assert here.backend.pictures == ["cat"]
    ((kept),) = here.prefixes.kept.values()
    assert len(kept.ids) == 11


def test_a_prefix_that_lacks_little_is_used_as_it_is() -> None:
    here = world()
    here.score(group("cat", "abcd", ["=y"]))
    assert costs(here.score(group("cat", "abcd", ["x"]))[0]) == (12, 3, 9)
    assert here.backend.forwards[-1][0].kept is not None


def test_a_longer_prefix_with_a_score_that_is_not_finite_is_not_kept() -> None:
    here, asked = world(), group("cat", "abcd", ["x"])
    here.score(group("cat", "abcd", ["#y"]))
    here.backend.unsound = {asked.rows[0].tobytes(): math.nan}
    assert math.isnan(here.score(asked)[0].values[0])
    ((kept),) = here.prefixes.kept.values()
    assert len(kept.ids) == 2


def test_alone_no_prefix_is_built_on_what_is_kept_of_another_length() -> None:
    """Its bits would depend on what came before: there the key holds the length."""
    here = world(backend=FakeBackend(rounding=True), deterministic=True)
    long, short = group("cat", "abcd", ["x"]), group("cat", "abcd", ["#y"])
    found = values(here.score(short)) + values(here.score(long))
    assert found == [
        *values(world(backend=FakeBackend(rounding=True), deterministic=True).score(short)),
        *values(world(backend=FakeBackend(rounding=True), deterministic=True).score(long)),
    ]
    assert [share.lead for shares in here.backend.forwards for share in shares] == [None] * 4
    assert sorted(len(kept.ids) for kept in here.prefixes.kept.values()) == [2, 11]


@both
def test_what_all_groups_begin_with_is_computed_once_and_paid_once(deterministic: bool) -> None:
    here = world(deterministic=deterministic)
    cat, dog = group("cat", "long", ["x"]), group("dog", "long", ["x"])
    found = here.score(cat, dog)
    assert values(found) == [wanted(cat), wanted(dog)]
    assert [costs(each) for each in found] == [(21, 21, 0), (21, 12, 0)]
    assert here.backend.num_tokens == 33
    (bird,) = here.score(group("bird", "long", ["x"]))
    assert costs(bird) == (21, 12, 9)


# Pictures sent ahead


@both
def test_pictures_that_are_not_known_are_staged_once_each(deterministic: bool) -> None:
    here = world(deterministic=deterministic)
    groups = [group("cat", "a", ["x"]), group("cat", "b", ["x"]), group("dog", "a", ["x"]), group("", "a", ["x"])]
    prepared = here.scorer.prepare(groups)
    assert sorted(here.backend.staged) == ["cat", "dog"]
    assert values(here.scorer.score(prepared)) == [wanted(each) for each in groups]
    assert sorted(here.backend.used) == ["cat", "dog"]
    assert prepared.staged == {}
    assert values(here.scorer.score(prepared)) == [wanted(each) for each in groups]
    assert sample(here.metrics, "reward_cache_lookups_total", cache="features", result="hit") == 0


@pytest.mark.parametrize("kept", ["features", "prefixes", "scores"])
def test_a_picture_is_not_staged_while_one_cache_makes_it_needless(kept: str) -> None:
    sizes = {"features": (1 << 20, 0, 0), "prefixes": (0, 1 << 20, 0), "scores": (0, 0, 1 << 20)}
    here, asked = world(max_bytes=sizes[kept]), group("cat", "ab", ["x"])
    here.score(asked)
    here.score(asked)
    assert here.backend.staged == ["cat"]
    here.scorer.prepare([group("cat", "ab", ["x", "yy"])])
    assert here.backend.staged == ["cat"] * (2 if kept == "scores" else 1)
    here.score(replace(asked, fresh=True))
    assert here.backend.used[-1] == "cat"
    assert here.backend.pictures == ["cat"] * 2


def test_what_finds_no_room_is_copied_when_the_device_wants_it() -> None:
    here = world(backend=FakeBackend(max_staged=1))
    groups = [group("cat", "a", ["x"]), group("dog", "a", ["x"])]
    assert values(here.score(*groups)) == [wanted(each) for each in groups]
    assert (here.backend.staged, here.backend.used, sorted(here.backend.pictures)) == (["cat"], [], ["cat", "dog"])


def test_what_was_staged_for_nothing_is_let_go() -> None:
    here, asked = world(), group("cat", "ab", ["x"])
    first, second = here.scorer.prepare([asked]), here.scorer.prepare([asked])
    here.backend.fault = OutOfMemory("full")
    with pytest.raises(OutOfMemory):
        here.scorer.score(first)
    assert first.staged == {}
    here.score(asked)
    assert values(here.scorer.score(second)) == [wanted(asked)]
    assert second.staged == {}


def test_a_kept_prefix_of_other_ids_under_the_same_key_is_never_used(caplog: pytest.LogCaptureFixture) -> None:
    here, asked = world(), group("cat", "ab", ["x"])
    here.score(asked)
    ((key, kept),) = here.prefixes.kept.items()
    other = replace(kept, ids=kept.ids + 1, keys_values=("dog", (9, 9)))
    here.prefixes.put(key, other)
    later = group("cat", "ab", ["yy"])
    with caplog.at_level(logging.ERROR):
        (scores,) = here.score(later)
    assert scores.values == wanted(later)
    assert here.audits("prefixes")[1] == 1
    assert "prefixes" in caplog.text
    assert here.prefixes.kept[key].keys_values == ("cat", tuple(kept.ids.tolist()))


@given(st.lists(st.integers(0, 1), max_size=4), st.lists(st.integers(0, 1), max_size=4))
def test_a_prefix_fits_as_far_as_both_go(ids: list[int], other: list[int]) -> None:
    kept = KeptPrefix(np.asarray(ids, dtype=np.int64), "", 0)
    assert kept.fits(np.asarray(other, dtype=np.int64)) == all(a == b for a, b in zip(ids, other, strict=False))


# Audits


@both
def test_every_nth_hit_is_computed_again(deterministic: bool) -> None:
    here, asked = world(deterministic=deterministic, audit_every=3), group("cat", "ab", ["x", "yy"])
    here.score(asked)
    found = [here.score(asked)[0].num_computed_tokens for _ in range(6)]
    assert found == [0, 1, 2, 0, 7 + 1, 2]  # scores: hits 3, 6, 9 and 12; the prefix was hit for the third time at 9
    assert [here.audits(cache) for cache in ("scores", "prefixes", "features")] == [(4, 0), (1, 0), (0, 0)]
    assert here.backend.num_rows == 2 + 4


def test_no_audits_unless_asked_for() -> None:
    here, asked = world(audit_every=0), group("cat", "ab", ["x"])
    here.score(asked)
    (key,) = here.scores.kept
    here.scores.put(key, 5.0)
    assert [here.score(asked)[0].values for _ in range(20)] == [(5.0,)] * 20
    assert here.audits("scores") == (0, 0)


@both
def test_a_wrong_score_is_counted_and_replaced(caplog: pytest.LogCaptureFixture, deterministic: bool) -> None:
    here, asked = world(deterministic=deterministic, audit_every=2), group("cat", "ab", ["x"])
    here.score(asked)
    (key,) = here.scores.kept
    here.scores.put(key, 5.0)
    with caplog.at_level(logging.ERROR):
        assert values(here.score(asked)) == [(5.0,)]
        assert values(here.score(asked)) == [wanted(asked)]
    assert here.audits("scores") == (1, 1)
    assert here.scores.kept[key] == wanted(asked)[0]
    assert "scores" in caplog.text
    assert [here.score(asked)[0].values for _ in range(4)] == [wanted(asked)] * 4
    assert here.audits("scores") == (3, 1)


@both
def test_a_kept_prefix_of_other_ids_casts_doubt_on_all(deterministic: bool) -> None:
    here, asked = world(deterministic=deterministic), group("cat", "ab", ["x", "yy"])
    here.score(asked)
    for key, prefix in list(here.prefixes.kept.items()):
        here.prefixes.put(key, replace(prefix, ids=prefix.ids + 1))
    for key in list(here.scores.kept):
        here.scores.put(key, 5.0)
    more = group("cat", "ab", ["x", "yy", "new"])
    assert values(here.score(more)) == [wanted(more)]
    assert here.audits("prefixes") == (1, 1) if not deterministic else here.audits("prefixes")[1] >= 1


@both
def test_one_wrong_score_casts_doubt_on_all(deterministic: bool) -> None:
    here, asked = world(deterministic=deterministic, audit_every=2), group("cat", "ab", ["x", "yy"])
    here.score(asked)
    for key in list(here.scores.kept):
        here.scores.put(key, 5.0)
    assert values(here.score(asked)) == [wanted(asked)]  # the one that was not looked at as well, in this very batch
    assert values(here.score(asked)) == [wanted(asked)]
    assert here.audits("scores") == (2, 1)


@pytest.mark.parametrize(("deterministic", "off", "is_wrong"), [(False, 1e-7, 0), (False, 1e-5, 1), (True, 1e-7, 1), (True, 0.0, 0)])
def test_the_tolerance_of_scores_is_none_where_bits_must_agree(deterministic: bool, off: float, is_wrong: int) -> None:
    here, asked = world(deterministic=deterministic, audit_every=1), group("cat", "ab", ["x"])
    here.score(asked)
    ((key, kept),) = here.scores.kept.items()
    here.scores.put(key, kept + off)
    here.score(asked)
    assert here.audits("scores") == (1, is_wrong)


@both
def test_a_wrong_prefix_is_counted_and_replaced(deterministic: bool) -> None:
    here = world(deterministic=deterministic, audit_every=1)
    here.score(group("cat", "ab", ["x"]))
    ((key, kept),) = here.prefixes.kept.items()
    here.prefixes.put(key, replace(kept, keys_values=("dog", kept.keys_values[1])))
    later = group("cat", "ab", ["yy"])
    (scores,) = here.score(later)
    assert (scores.values, costs(scores)[1:]) == (wanted(later), (9, 0))
    assert here.audits("prefixes") == (1, 1)
    assert here.prefixes.kept[key].keys_values == kept.keys_values
    # all that was kept is forgotten, and the batch computed again: its own is all there is
    assert [here.counted("reward_cache_entries", cache) for cache in ("features", "prefixes", "scores")] == [1, 1, 1]
    again = group("cat", "ab", ["zzz"])
    assert here.score(again)[0].values == wanted(again)
    assert here.audits("prefixes") == (2, 1)


def test_a_batch_that_finds_a_wrong_entry_gives_no_score_that_was_made_of_it() -> None:
    here = world(audit_every=2)
    here.score(group("cat", "ab", ["x"]))
    ((key, kept),) = here.prefixes.kept.items()
    here.prefixes.put(key, replace(kept, keys_values=("dog", kept.keys_values[1])))
    spoiled = group("cat", "ab", ["yy"])
    assert values(here.score(spoiled)) != [wanted(spoiled)]  # nobody looked
    asked = group("cat", "ab", ["yy", "zzz"])  # one is known, of the wrong prefix; for the other the prefix is looked at
    assert values(here.score(asked)) == [wanted(asked)]
    assert here.audits("prefixes") == (1, 1)


@pytest.mark.parametrize(
    ("kept", "off", "agrees"), [(8.0, 4e-6, True), (8.0, 9e-6, False), (-8.0, 4e-6, True), (0.5, 0.9e-6, True), (0.5, 1.5e-6, False)]
)
def test_the_tolerance_of_scores_grows_with_them_beyond_one(
    caplog: pytest.LogCaptureFixture, kept: float, off: float, agrees: bool
) -> None:
    here, asked = world(audit_every=1, model="m"), group("cat", "ab", ["x"])
    (row,) = asked.rows
    here.backend.unsound = {row.tobytes(): kept}
    here.score(asked)
    here.backend.unsound = {row.tobytes(): kept + off}
    with caplog.at_level(logging.ERROR):
        assert values(here.score(asked)) == [(kept if agrees else kept + off,)]
    assert (f"{kept} was kept, {kept + off} is computed now" in caplog.text) is not agrees
    assert sample(here.metrics, "reward_cache_audits_total", cache="scores", model="m") == 1


def test_rows_of_one_name_that_begin_otherwise_are_an_error() -> None:
    one, other = group("cat", "ab", ["x"]), group("cat", "long", ["x"])
    with pytest.raises(ValueError, match=r"^rows of one image and prompt begin with different ids$"):
        world().score(one, replace(other, key=one.key, num_prefix=one.num_prefix))


def test_an_audit_that_agrees_changes_no_bit() -> None:
    here = world(audit_every=1)
    asked = group("cat", "ab", ["x"])
    here.score(asked)
    ((key, kept),) = here.scores.kept.items()
    here.scores.put(key, kept * (1 + 1e-9))
    assert values(here.score(asked)) == [(kept * (1 + 1e-9),)]
    assert here.audits("scores") == (1, 0)


@both
def test_wrong_features_are_counted_and_replaced(deterministic: bool) -> None:
    here = world(deterministic=deterministic, audit_every=1)
    here.score(group("cat", "ab", ["x"]))
    (key,) = here.features.kept
    here.features.put(key, "dog")
    other = group("cat", "c", ["x"])
    assert values(here.score(other)) == [wanted(other)]
    assert here.audits("features") == (1, 1)
    assert here.features.kept[key] == "cat"


def test_a_fresh_result_that_is_not_finite_takes_nothing_kept_away() -> None:
    here, asked = world(audit_every=1), group("cat", "ab", ["x"])
    here.score(asked)
    here.backend.unsound = {asked.rows[0].tobytes(): math.nan}
    assert math.isnan(here.score(asked)[0].values[0])
    assert list(here.scores.kept.values()) == list(wanted(asked))


# Any history


captions = st.lists(st.sampled_from(["x", "yy", "zzz", "xy", "-x", "-yy", "=x", "#", "#yy"]), min_size=1, max_size=5)
plain_captions = st.lists(st.sampled_from(["x", "yy", "zzz", "xy", "u"]), min_size=1, max_size=5)
pictures, prompts = st.sampled_from(["cat", "dog", ""]), st.sampled_from(["", "a", "ab", "long", "long one"])


def histories(
    texts: st.SearchStrategy[list[str]], prompts: st.SearchStrategy[str] = prompts
) -> st.SearchStrategy[list[list[EncodedGroup]]]:
    groups = st.builds(lambda *parts: group(*parts[:3], fresh=parts[3]), pictures, prompts, texts, st.booleans())
    return st.lists(st.lists(groups, max_size=4), max_size=6)


cache_sizes = st.tuples(st.sampled_from([0, 50, 1000]), st.sampled_from([0, 75, 130, 300, 10_000]), st.sampled_from([0, 100, 300, 10_000]))


@quick
@given(history=histories(captions), max_bytes=cache_sizes, deterministic=st.booleans(), audit_every=st.integers(0, 3))
def test_no_history_changes_a_score_and_every_token_is_counted(
    history: list[list[EncodedGroup]], max_bytes: tuple[int, int, int], deterministic: bool, audit_every: int
) -> None:
    """Tiny caches that lose things, audits, merging captions, fresh groups: always the oracle's scores and the backend's tokens."""
    here = world(max_bytes=max_bytes, deterministic=deterministic, audit_every=audit_every)
    for batch in history:
        before = here.backend.num_tokens
        found = here.score(*batch)
        assert values(found) == [wanted(each) for each in batch]
        assert sum(each.num_computed_tokens for each in found) == here.backend.num_tokens - before
        for scores, asked in zip(found, batch, strict=True):
            assert scores.num_tokens == sum(len(row) for row in asked.rows)
            assert 0 <= scores.num_computed_tokens + scores.num_cached_tokens <= scores.num_tokens
    assert [here.audits(cache)[1] for cache in ("features", "prefixes", "scores")] == [0, 0, 0]


@quick
@given(
    history=histories(plain_captions, st.sampled_from(["", "a", "ab"])),
    max_bytes=cache_sizes,
    deterministic=st.booleans(),
    audit_every=st.integers(0, 3),
)
def test_computed_and_cached_are_what_a_cold_batch_computes(
    history: list[list[EncodedGroup]], max_bytes: tuple[int, int, int], deterministic: bool, audit_every: int
) -> None:
    """Where groups of several prompts begin alike, what is kept of the beginning saves each of them its own."""
    here = world(max_bytes=max_bytes, deterministic=deterministic, audit_every=audit_every)
    for batch in history:
        cold = world(deterministic=deterministic).score(*batch)
        found = here.score(*batch)
        assert sum(each.num_cached_tokens for each in cold) == 0
        assert [each.num_computed_tokens + each.num_cached_tokens for each in found] == [each.num_computed_tokens for each in cold]


@quick
@given(history=histories(captions), max_bytes=cache_sizes)
def test_two_fingerprints_share_no_entry(history: list[list[EncodedGroup]], max_bytes: tuple[int, int, int]) -> None:
    here = world(max_bytes=max_bytes)
    other = here.beside("e" * 64)
    for batch in history:
        before = here.backend.num_tokens
        mine = here.score(*batch)
        assert sum(each.num_computed_tokens for each in mine) == here.backend.num_tokens - before
        theirs = other.score(*batch)
        assert values(mine) == values(theirs) == [wanted(each) for each in batch]
    assert all(key.startswith((FINGERPRINT, "e" * 64)) for cache in (here.features, here.prefixes, here.scores) for key in cache.kept)


def test_another_fingerprint_finds_nothing() -> None:
    here, asked = world(), group("cat", "ab", ["x", "yy"])
    here.score(asked)
    other = here.beside("e" * 64)
    assert [costs(other.score(asked)[0])[1:] for _ in range(2)] == [(10, 0), (0, 10)]
    assert here.backend.pictures == ["cat", "cat"]
    assert [len(cache.kept) for cache in (here.features, here.prefixes, here.scores)] == [2, 2, 4]


# Bits


@dataclass(slots=True)
class Asked:
    """Every score a caption ever got."""

    seen: dict[tuple[str, bytes], set[float]] = field(default_factory=dict)

    def note(self, batch: Sequence[EncodedGroup], found: Sequence[Scores]) -> None:
        for asked, scores in zip(batch, found, strict=True):
            for row, value in zip(asked.rows, scores.values, strict=True):
                self.seen.setdefault((asked.key[0], row.tobytes()), set()).add(value)

    def wavering(self) -> Iterator[tuple[str, bytes]]:
        return (name for name, scores in self.seen.items() if len(scores) > 1)


@quick
@given(histories=st.lists(histories(captions), min_size=2, max_size=3), max_bytes=cache_sizes, audit_every=st.integers(0, 2))
def test_alone_bits_depend_on_nothing_else(
    histories: list[list[list[EncodedGroup]]], max_bytes: tuple[int, int, int], audit_every: int
) -> None:
    """The backend rounds by company and position; a score must not move between histories, batches and cache states."""
    asked = Asked()
    for history in histories:
        here = world(backend=FakeBackend(rounding=True), max_bytes=max_bytes, deterministic=True, audit_every=audit_every)
        for batch in history:
            asked.note(batch, here.score(*batch))
        assert here.audits("scores")[1] == here.audits("prefixes")[1] == 0
    assert list(asked.wavering()) == []


def test_together_bits_do_depend_on_company() -> None:
    """The fake above would show it: the same caption by itself and in company, without a cache."""
    here, asked = world(backend=FakeBackend(rounding=True), max_bytes=0), Asked()
    for batch in ([group("cat", "a", ["x"])], [group("cat", "a", ["x", "yy"])]):
        asked.note(batch, here.score(*batch))
    assert len(list(asked.wavering())) == 1


@quick
@given(batch=st.lists(st.builds(group, pictures, prompts, captions), min_size=1, max_size=4), chance=st.randoms(use_true_random=False))
def test_together_the_order_of_asking_changes_no_bit(batch: list[EncodedGroup], chance: random.Random) -> None:
    """Groups and captions in any order: the same batch to the backend."""
    turned = []
    for asked in chance.sample(batch, len(batch)):
        order = chance.sample(range(len(asked.rows)), len(asked.rows))
        turned.append(
            replace(asked, rows=tuple(asked.rows[at] for at in order), row_prefixes=tuple(asked.row_prefixes[at] for at in order))
        )
    asked = Asked()
    for groups in (batch, turned):
        asked.note(groups, world(backend=FakeBackend(rounding=True)).score(*groups))
    assert list(asked.wavering()) == []


def test_a_mended_picture_is_not_undone_by_the_rest_of_its_batch() -> None:
    here = world(audit_every=2)
    here.score(group("cat", "a", ["x"]))
    (key,) = here.features.kept
    here.features.put(key, "dog")
    here.score(group("cat", "b", ["x"]))  # hit 1, not audited
    batch = [group("cat", "c", ["x"]), group("cat", "d", ["x"])]  # hit 2 is audited and found wrong
    scored = here.score(*batch)
    assert here.audits("features") == (1, 1)
    assert here.features.kept[key] == "cat"
    assert values(scored) == [wanted(each) for each in batch]


def test_a_picture_of_two_prompts_is_looked_at_once_in_a_batch_whatever_the_cache_holds() -> None:
    here = world(max_bytes=0)
    here.score(group("cat", "a", ["x"]), group("cat", "b", ["x"]))
    assert here.backend.pictures == ["cat"]


def test_when_memory_runs_out_what_is_kept_on_the_device_is_given_up() -> None:
    here = world()
    here.score(group("cat", "a", ["x"]))
    here.backend.fault = OutOfMemory("full")
    with pytest.raises(OutOfMemory):
        here.score(group("dog", "a", ["x"]))
    sizes = {cache: here.counted("reward_cache_entries", cache) for cache in ("features", "prefixes", "scores")}
    assert sizes == {"features": 0, "prefixes": 0, "scores": 1}
    again = group("cat", "a", ["x", "y"])
    assert here.score(again)[0].values == wanted(again)


# What turns out to be wrong, or is taken away, while others wait or run


def gone_wrong(asked: EncodedGroup) -> tuple[EncodedGroup, EncodedImage, EncodedImage]:
    """The same group encoded with other pixels under the same id, those pixels, and the right ones."""
    assert asked.image is not None
    wrong = replace(asked.image, patches=np.ones_like(asked.image.patches))
    return replace(asked, image=wrong), wrong, asked.image


@both
@pytest.mark.parametrize("when", ["waiting", "ready", "running"])
def test_what_was_encoded_with_a_wrong_picture_gets_the_right_one(deterministic: bool, when: str) -> None:
    here, asked = world(deterministic=deterministic), group("cat", "ab", ["x", "yy"])
    encoded, wrong, right = gone_wrong(asked)
    if when == "waiting":
        here.scorer.correct(wrong, right)
    ready = here.scorer.prepare([encoded, group("dog", "ab", ["x"])])
    if when == "ready":
        here.scorer.correct(wrong, right)
    if when == "running":
        here.backend.meanwhile = lambda: here.scorer.correct(wrong, right)
    assert values(here.scorer.score(ready)) == [wanted(asked), wanted(group("dog", "ab", ["x"]))]
    later = group("cat", "c", ["x"]), group("cat", "ab", ["new", "x"])
    assert [values(here.score(each)) for each in later] == [[wanted(each)] for each in later]


@both
def test_nothing_is_kept_of_a_batch_behind_a_prefix_of_wrong_pixels(deterministic: bool) -> None:
    """It has the right ones itself, and runs while the others are found wrong."""
    here, asked = world(deterministic=deterministic), group("cat", "ab", ["x"])
    encoded, wrong, right = gone_wrong(asked)
    here.score(encoded)
    here.backend.meanwhile = lambda: here.scorer.correct(wrong, right)
    later = group("cat", "ab", ["y"])
    assert [values(here.score(later)) for _ in range(2)] == [[wanted(later)]] * 2
    assert values(here.score(asked)) == [wanted(asked)]


def test_what_a_batch_keeps_after_all_was_forgotten_is_found_by_nobody() -> None:
    here, asked = world(), group("cat", "ab", ["x"])
    encoded, _, _ = gone_wrong(asked)
    ready = here.scorer.prepare([encoded])
    keys = {key for part in ready.parts for key in (part.key, part.image_key, *part.score_keys)}
    here.scorer.forget()
    assert keys.isdisjoint(key for part in here.scorer.prepare([asked]).parts for key in (part.key, part.image_key, *part.score_keys))


def test_only_what_was_encoded_with_the_wrong_pixels_is_changed_as_long_as_they_are_there() -> None:
    here, asked = world(), group("cat", "ab", ["x"])
    encoded, wrong, right = gone_wrong(asked)
    here.scorer.correct(replace(wrong), right)  # gone at once
    assert values(here.score(encoded)) != [wanted(asked)]
    here.scorer.correct(wrong, right)
    assert values(here.score(encoded)) == [wanted(asked)]
    alive = weakref.ref(wrong)
    here.backend.forwards.clear()
    del encoded, wrong
    assert values(here.score(asked)) == [wanted(asked)]
    assert alive() is None


class Fleeting:
    """A kept beginning that another thread takes away when it is looked at."""

    def __init__(self, prefix: KeptPrefix[KeysValues], backend: FleetingBackend) -> None:
        self.keys_values, self.num_bytes = prefix.keys_values, prefix.num_bytes
        self._ids, self._backend = prefix.ids, backend

    @property
    def ids(self) -> Ids:
        self._backend.take_away()
        return self._ids


@dataclass(slots=True)
class FleetingBackend(FakeBackend):
    """Every prefix without rows, as that of what all groups begin with, is fleeting."""

    take_away: Callable[[], None] = lambda: None

    def forward(self, shares: Sequence[FakeShare]) -> list[Computed[KeysValues]]:
        found: Any = FakeBackend.forward(self, shares)
        pairs = zip(shares, found, strict=True)
        return [each if share.rows else replace(each, prefix=Fleeting(each.prefix, self)) for share, each in pairs]


def test_the_beginning_may_be_taken_away_at_any_moment() -> None:
    """As encode threads do where pixels were wrong, and the device thread where another model's memory ran out."""
    backend = FleetingBackend()
    here = world(max_bytes=(1 << 20, 0, 0), backend=backend)
    first, second = group("cat", "longa", ["x"]), group("cat", "longb", ["x"])
    assert values(here.score(first)) == [wanted(first)]
    backend.take_away, before = here.scorer.make_room, backend.num_tokens
    (scores,) = here.score(second)
    assert scores.values == wanted(second)
    assert scores.num_computed_tokens == backend.num_tokens - before


@pytest.mark.parametrize("num_captions", [1, 7, 40])
def test_a_kept_prefix_that_is_too_short_costs_no_more_than_the_prefix(num_captions: int) -> None:
    """A planner counts the prefix once and every row behind it, whatever is kept."""
    here = world()
    here.score(group("cat", "abcd", ["=x"]))  # two tokens of the prompt merge into it
    before = here.backend.num_tokens
    asked = group("cat", "abcd", [chr(ord("A") + number) for number in range(num_captions)])
    (scores,) = here.score(asked)
    assert scores.values == wanted(asked)
    assert here.backend.num_tokens - before <= num_captions + 7
    assert scores.num_computed_tokens == here.backend.num_tokens - before


def test_what_uses_nothing_kept_stands_behind_its_own_prefix() -> None:
    """As it was planned: not behind the shorter one of a group beside it, where each of its rows would compute more."""
    here = world()
    usual, fresh = group("cat", "abcd", ["=x"]), group("cat", "abcd", ["y", "z", "yy", "zz"], fresh=True)
    scores = here.score(usual, fresh)
    assert values(scores) == [wanted(usual), wanted(fresh)]
    assert here.backend.num_tokens == usual.num_tokens + fresh.num_tokens
