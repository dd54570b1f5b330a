"""Taking turns, holding scores against the plain way, and the arithmetic of rows."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from app.bench.conversations import AS_USUAL, Conversations
from app.bench.flops import Shapes, shared_flops
from app.bench.loopback import Client, Loopback, serving
from app.bench.ways import (
    COLD,
    HTTP_COLD,
    HTTP_WARM,
    PADDED,
    PLAIN,
    WARM,
    WAYS,
    Contestants,
    Estimate,
    Row,
    Run,
    largest,
    measure_ways,
    sampled,
    score_padded,
    spread_of,
)
from app.bench.workload import Workload, part_of, renamed
from app.contracts import EncodedGroup, Scorer, Scores
from app.encoding import load_encoder
from app.geometry import Limits, write_artifact
from app.model import load_model
from app.scoring import score_plain
from app.settings import Settings
from tests.test_geometry import TINY, TINY_TEXT
from tests.tiny import LIMITS

SEEDS = itertools.count()


@pytest.fixture(scope="module")
def loopback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    artifact: Path = write_artifact(TINY, tmp_path_factory.mktemp("ways") / "artifact")
    with serving(Settings(model=str(artifact), device="cpu", dtype="float32", num_threads=1)) as found:
        yield found


@pytest.fixture
def who(loopback: Loopback) -> Iterator[Contestants]:
    artifact = loopback.runtime.first.artifact
    baseline = load_model(artifact, device="cpu", dtype="float32").model
    workload = Workload(load_encoder(artifact), LIMITS, seed=next(SEEDS))  # the server remembers pictures of earlier tests
    with Client(loopback) as client:
        yield Contestants(
            baseline, loopback.runtime.first.scorer, client, workload, Shapes.of(baseline.backbone.config), torch.device("cpu"), lambda: 1e9
        )


def test_every_way_scores_as_the_plain_one(who: Contestants) -> None:
    told: list[str] = []
    announced: list[tuple[int, str]] = []
    measured = measure_ways(who, [1, 4], 2, told.append, lambda text: announced.append((len(told), text)))
    assert [(row.way, row.num_captions) for row in measured.rows] == [(way, size) for size in (1, 4) for way in WAYS]
    assert all(len(row.runs) == 2 and row.difference is not None and row.difference < 1e-4 for row in measured.rows)
    assert measured.spread is not None
    assert measured.spread > 1e-3
    assert all(row.is_as_named for row in measured.rows)
    turns = [text for text in told if text.startswith("round")]
    assert [text.partition(": ")[2] for text in turns[:6]] == list(WAYS)
    assert [text.partition(": ")[2] for text in turns[12:18]] == [*WAYS[2:], PLAIN, PADDED]  # in the second round the plain ways are last
    ((place, text),) = announced
    assert told[place] == turns[0]  # after the warm-up, before anything is measured
    assert " for 2 rounds of groups of 1, 4 (" in text


@pytest.fixture(scope="module")
def text_loopback(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Loopback]:
    artifact: Path = write_artifact(TINY_TEXT, tmp_path_factory.mktemp("ways") / "artifact", limits=Limits(400, 64))
    with serving(Settings(model=str(artifact), device="cpu", dtype="float32", num_threads=1)) as found:
        yield found


@pytest.fixture
def talking(text_loopback: Loopback) -> Iterator[Contestants]:
    """Contestants over a text-only model."""
    artifact, scorer = text_loopback.runtime.first.artifact, text_loopback.runtime.first.scorer
    baseline = load_model(artifact, device="cpu", dtype="float32").model
    source = Conversations(load_encoder(artifact), AS_USUAL, seed=next(SEEDS))
    shapes = Shapes.of(baseline.backbone.config)
    with Client(text_loopback) as client:
        yield Contestants(baseline, scorer, client, source, shapes, torch.device("cpu"), lambda: 1e9)


def test_every_way_scores_responses_as_the_plain_one(talking: Contestants) -> None:
    """Tokens by hand: 8 times 464 by themselves, 400 once and 8 times 64 cold, 8 times 64 warm; over HTTP the same."""
    measured = measure_ways(talking, [1, 8], 2, lambda _: None)
    assert [(row.way, row.num_captions) for row in measured.rows] == [(way, size) for size in (1, 8) for way in WAYS]
    assert all(row.difference is not None and row.difference < 1e-4 for row in measured.rows)
    assert all(row.is_as_named for row in measured.rows)
    assert measured.spread is not None
    assert measured.spread > 1e-3
    found = {row.way: {run.num_computed_tokens for run in row.runs} for row in measured.rows if row.num_captions == 8}
    assert found == {PLAIN: {3712}, PADDED: {3712}, COLD: {912}, WARM: {512}, HTTP_COLD: {912}, HTTP_WARM: {512}}
    assert {run.num_tokens for row in measured.rows if row.num_captions == 8 for run in row.runs} == {3712}


def test_a_wrong_score_of_a_response_is_seen(talking: Contestants) -> None:
    measured = measure_ways(replace(talking, scorer=WrongScorer(talking.scorer, 0.5)), [3], 1, lambda _: None)
    cold = measured.find(COLD, 3)
    assert cold is not None
    assert cold.difference == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize(("knows", "misnamed"), [(False, {WARM}), (True, {COLD, WARM})])
def test_a_known_conversation_is_not_cold_and_a_new_one_not_warm(talking: Contestants, knows: bool, misnamed: set[str]) -> None:
    measured = measure_ways(replace(talking, scorer=ForgetfulScorer(talking.scorer, knows)), [3], 1, lambda _: None)
    assert {row.way for row in measured.rows if not row.is_as_named} == misnamed


def test_what_is_known_is_saved(who: Contestants) -> None:
    """Of the direct ways and of the server alike: cold computes prefix and captions, warm the captions."""
    measured = measure_ways(who, [4], 1, lambda _: None)
    runs = {way: row.runs[0] for way in WAYS if (row := measured.find(way, 4)) is not None}
    assert runs[PLAIN].num_computed_tokens == runs[PLAIN].num_tokens
    assert runs[PADDED].num_computed_tokens > runs[PADDED].num_tokens
    for cold, warm in ((COLD, WARM), (HTTP_COLD, HTTP_WARM)):
        assert runs[cold].num_computed_tokens < runs[cold].num_tokens / 2
        assert runs[warm].num_computed_tokens < runs[cold].num_computed_tokens / 2
        assert runs[cold].num_cached_tokens < runs[warm].num_cached_tokens
    assert runs[WARM].flops < runs[COLD].flops < runs[PLAIN].flops < runs[PADDED].flops


@dataclass(frozen=True, slots=True)
class WrongScorer:
    """Adds a little to the last caption of every group."""

    inner: Scorer
    error: float

    def prepare(self, groups: Sequence[EncodedGroup]) -> Any:
        return self.inner.prepare(groups)

    def score(self, prepared: Any) -> list[Scores]:
        return [replace(found, values=(*found.values[:-1], found.values[-1] + self.error)) for found in self.inner.score(prepared)]


def test_a_wrong_score_is_seen(who: Contestants) -> None:
    measured = measure_ways(replace(who, scorer=WrongScorer(who.scorer, 0.5)), [3], 1, lambda _: None)
    cold, served = measured.find(COLD, 3), measured.find(HTTP_COLD, 3)
    assert cold is not None
    assert cold.difference == pytest.approx(0.5, abs=1e-3)
    assert served is not None
    assert served.difference is not None
    assert served.difference < 1e-4


def test_without_a_baseline_nothing_is_compared(who: Contestants) -> None:
    measured = measure_ways(replace(who, baseline=None), [2], 1, lambda _: None)
    assert [row.way for row in measured.rows] == [COLD, WARM, HTTP_COLD, HTTP_WARM]
    assert measured.spread is None
    assert {row.difference for row in measured.rows} == {None}


def test_the_padded_batch_scores_as_the_plain_way(who: Contestants) -> None:
    assert who.baseline is not None
    groups = [who.workload.encode(who.workload.request(count)) for count in (3, 2)]
    padded, plain = score_padded(who.baseline, groups), score_plain(who.baseline, groups)
    for one, other in zip(padded, plain, strict=True):
        assert one.values == pytest.approx(other.values, abs=1e-4)
        assert one.num_tokens == other.num_tokens
    longest = max(len(row) for group in groups for row in group.rows)
    assert [scores.num_computed_tokens for scores in padded] == [3 * longest, 2 * longest]


@dataclass(frozen=True, slots=True)
class ForgetfulScorer:
    """Knows nothing of earlier groups, or (`knows`) everything of this one."""

    inner: Scorer
    knows: bool

    def prepare(self, groups: Sequence[EncodedGroup]) -> Any:
        if self.knows:
            self.inner.score(self.inner.prepare([part_of(group, 0, 1) for group in groups]))
        return self.inner.prepare(groups if self.knows else [renamed(group, f"again-{next(SEEDS)}") for group in groups])

    def score(self, prepared: Any) -> list[Scores]:
        return self.inner.score(prepared)


@pytest.mark.parametrize(("knows", "misnamed"), [(False, {WARM}), (True, {COLD, WARM})])
def test_a_row_that_is_not_cold_or_not_warm_is_seen(who: Contestants, knows: bool, misnamed: set[str]) -> None:
    """Knowing everything, a warm group computes a caption less than it should."""
    measured = measure_ways(replace(who, scorer=ForgetfulScorer(who.scorer, knows)), [3], 1, lambda _: None)
    assert {row.way for row in measured.rows if not row.is_as_named} == misnamed


def test_a_known_beginning_is_no_work_of_a_cold_group(who: Contestants) -> None:
    measured = measure_ways(who, [2], 1, lambda _: None)
    cold = measured.find(COLD, 2)
    assert cold is not None
    (run,) = cold.runs
    num_prefix = run.num_tokens - run.num_computed_tokens  # a beginning is known, and the rest of the prefix saved once
    assert num_prefix > 0
    group = who.workload.encode(who.workload.request(2))
    assert run.flops < shared_flops(who.shapes, group, num_known=0)


def test_what_a_run_will_take_by_hand() -> None:
    assert (
        Estimate(60.0, 45.0).told(3, (1, 8))
        == "about 3 minutes for 3 rounds of groups of 1, 8 (2 minutes of it for the ways that share nothing)"
    )
    assert Estimate(20.0, 0.0).told(1, (8,)) == "about 20 s for 1 round of groups of 8"


def test_rows_are_medians_with_their_spread() -> None:
    each = ((2.0, 200.0, 0.1), (4.0, 50.0, None), (1.0, 1000.0, 0.3))
    runs = tuple(Run(seconds, rate, 10, 5, 0, 100, difference and (difference,)) for seconds, rate, difference in each)
    row = Row(COLD, 8, runs)
    assert (row.seconds, row.fastest_s, row.slowest_s, row.difference) == (2.0, 1.0, 4.0, 0.3)
    assert (row.share_of_rate, row.rate) == (0.25, 200.0)  # of 0.25, 0.5 and 0.1


def test_each_way_is_held_against_the_rate_of_its_own_moment(who: Contestants) -> None:
    rates = itertools.count(1)
    measured = measure_ways(replace(who, rate_now=lambda: float(next(rates))), (1,), 1, lambda _: None)
    assert [row.rate for row in measured.rows] == [1.5 + 2 * place for place in range(len(WAYS))]


def test_the_spread_is_within_groups() -> None:
    """Variances 2 and 8: their mean is 5, with two degrees of freedom in the first it is 4. Single captions count only among themselves."""
    assert spread_of([(0.0, 2.0), (10.0, 14.0), (100.0,)]) == pytest.approx(math.sqrt(5))
    assert spread_of([(0.0, 2.0**0.5, 8.0**0.5), (10.0, 14.0)]) == pytest.approx(2.0)
    assert spread_of([(0.0,), (2.0,)]) == pytest.approx(math.sqrt(2))
    assert spread_of([(1.0,)]) is None
    assert spread_of([]) is None


@given(st.integers(1, 64), st.integers(0, 5), st.integers(1, 8))
def test_sampled_captions_are_far_apart(size: int, number: int, num_sampled: int) -> None:
    places = sampled(size, number, num_sampled)
    assert len(set(places)) == len(places) == min(num_sampled, size)
    assert all(0 <= place < size for place in places)
    around = [*places, places[0] + size]
    assert min(after - before for before, after in itertools.pairwise(around)) >= size // len(places)


def test_sampled_captions_change_from_round_to_round() -> None:
    assert [sampled(8, number, 3) for number in range(3)] == [[0, 2, 5], [1, 3, 6], [2, 4, 7]]
    assert {place for number in range(8) for place in sampled(8, number, 1)} == set(range(8))


def test_what_is_no_number_is_far_away() -> None:
    assert largest((1.0, 2.0), (1.5, 2.25)) == 0.5
    assert largest((1.0, 2.0), (1.0, math.nan)) == math.inf
