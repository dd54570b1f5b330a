"""Noise by hand, and a scorer whose scores depend on company, which must be seen."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from app.artifacts import open_artifact
from app.bench.noise import GROUP_SIZE, Noise, NoiseReport, Price, Subject, companies, make_groups, measure_noise, measure_price, summarise
from app.bench.noise_run import run_noise
from app.bench.workload import Workload
from app.contracts import EncodedGroup, Scores
from app.encoding import load_encoder
from app.geometry import write_artifact
from app.settings import Settings
from tests.test_geometry import TINY
from tests.tiny import LIMITS


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(TINY, tmp_path_factory.mktemp("noise") / "artifact")


@pytest.fixture(scope="module")
def groups(artifact: Path) -> list[EncodedGroup]:
    return make_groups(Workload(load_encoder(open_artifact(str(artifact), offline=True)), LIMITS), 2)


class LengthScorer:
    """A score is the length of its row, and a little more for each group of its batch that stands before it."""

    def __init__(self, error: float) -> None:
        self._error = error
        self.num_seen: dict[str, int] = {}

    def prepare(self, groups: Sequence[EncodedGroup]) -> Any:
        return groups

    def score(self, prepared: Any) -> list[Scores]:
        for group in prepared:
            self.num_seen[group.key[0]] = self.num_seen.get(group.key[0], 0) + len(group.rows)
        return [Scores(tuple(len(row) + self._error * place for row in group.rows), 0, 0) for place, group in enumerate(prepared)]


def subjects_of(groups: Sequence[EncodedGroup]) -> list[Subject]:
    lengths = [tuple(float(len(row)) for row in group.rows[:GROUP_SIZE]) for group in groups]
    return [Subject(groups[0], groups[1], lengths[0]), Subject(groups[1], groups[2], lengths[1])]


def test_noise_by_hand() -> None:
    """Two companies of three captions: one changes the order of the first two and moves the last, the other nothing."""
    found = summarise([(0.0, 1.0, 5.0)], [[(0.0, 1.0, 5.0), (1.0, 0.5, 5.25)]])
    assert (found.num_scores, found.num_pairs, found.num_moved) == (6, 6, 3)
    assert found.largest == 1.0
    assert found.flips_per_10_000 == pytest.approx(10_000 / 6)
    assert found.spread == pytest.approx(7**0.5)
    assert found.as_dict()["largest_over_spread"] == pytest.approx(1 / 7**0.5)


def test_a_tie_that_was_none_is_a_flip() -> None:
    assert summarise([(0.0, 1.0)], [[(1.0, 1.0)]]).flips_per_10_000 == 10_000


def test_companies_differ_in_size_place_and_cache() -> None:
    found = companies()
    assert len(found) == len(set(found)) == 14
    assert {each.size for each in found} == {1, 2, 4, 8, 16}
    assert {each.stranger for each in found} == {"", "first", "last"}


def test_scores_that_stay_are_no_noise(groups: list[EncodedGroup]) -> None:
    found = measure_noise(LengthScorer(0.0), subjects_of(groups), lambda _: None)
    assert (found.num_scores, found.largest, found.num_moved) == (2 * 14 * GROUP_SIZE, 0.0, 0)


def test_scores_that_depend_on_company_are_seen(groups: list[EncodedGroup]) -> None:
    """Behind a stranger stand 2 of the 14 companies."""
    found = measure_noise(LengthScorer(0.25), subjects_of(groups), lambda _: None)
    assert (found.largest, found.num_moved) == (0.25, 2 * GROUP_SIZE)


def test_no_picture_is_known_unless_it_should_be(groups: list[EncodedGroup]) -> None:
    """A name is used by one cold batch, or by one warm company: at most its captions, the one that made it known, and no other."""
    scorer = LengthScorer(0.0)
    measure_noise(scorer, subjects_of(groups), lambda _: None)
    assert max(scorer.num_seen.values()) == GROUP_SIZE + 1
    assert list(scorer.num_seen.values()).count(GROUP_SIZE + 1) == 2 * 7


def test_the_price_is_a_ratio_of_times(groups: list[EncodedGroup]) -> None:
    found = measure_price(LengthScorer(0.0), LengthScorer(0.0), subjects_of(groups), torch.device("cpu"))
    assert found.cold > 0
    assert found.warm > 0


def test_determinism_holds_only_if_nothing_moved() -> None:
    noise = Noise(1, 1, 0.0, 0.0, 0.0, 1.0, 0)
    moved = Noise(1, 1, 0.1, 0.1, 0.0, 1.0, 1)
    assert NoiseReport(moved, noise, Price(1.0, 1.0)).holds
    assert not NoiseReport(noise, moved, Price(1.0, 1.0)).holds


def test_a_whole_run_in_bfloat16(artifact: Path) -> None:
    found = run_noise(Settings(model=str(artifact), device="cpu", dtype="bfloat16", num_threads=1), 1, lambda _: None)
    assert found.report.deterministic.num_moved == 0
    assert found.report.usual.largest > 0
    assert found.report.usual.num_scores == 14 * GROUP_SIZE
    told = found.as_dict("tiny")
    assert told["deterministic_holds"] is True
    assert set(told["noise"]) == {"usual", "deterministic"}
