"""Noise by hand, and a scorer whose scores depend on company, which must be seen."""

from __future__ import annotations

import io
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from app.artifacts import open_artifact
from app.bench.noise import (
    GROUP_SIZE,
    Noise,
    NoiseReport,
    Price,
    Subject,
    Truth,
    companies,
    make_groups,
    measure_noise,
    price_of,
    proven,
    subjects_of,
    summarise,
)
from app.bench.noise_run import run_noise
from app.bench.tables import WIDTH, noise_tables
from app.bench.workload import Workload, part_of
from app.contracts import EncodedGroup, Scorer, Scores
from app.encoding import load_encoder
from app.errors import ScoringFailed
from app.geometry import write_artifact
from app.model import load_model
from app.scoring import score_plain
from app.settings import Settings
from tests.test_geometry import TINY
from tests.tiny import LIMITS

TRUTH = Truth(1, 0.0)


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_artifact(TINY, tmp_path_factory.mktemp("noise") / "artifact")


@pytest.fixture(scope="module")
def groups(artifact: Path) -> list[EncodedGroup]:
    return make_groups(Workload(load_encoder(open_artifact(str(artifact), offline=True)), LIMITS), 2)


class LengthScorer:
    """A score is the length of its row, and a little more for each group of its batch that stands before it."""

    def __init__(self, error: float = 0.0) -> None:
        self._error = error
        self.batches: list[list[EncodedGroup]] = []

    def prepare(self, groups: Sequence[EncodedGroup]) -> Any:
        return groups

    def score(self, prepared: Any) -> list[Scores]:
        self.batches.append(list(prepared))
        return [Scores(tuple(len(row) + self._error * place for row in group.rows), 0, 0) for place, group in enumerate(prepared)]


def subjects(groups: Sequence[EncodedGroup]) -> list[Subject]:
    lengths = [tuple(float(len(row)) for row in group.rows[:GROUP_SIZE]) for group in groups]
    return [Subject(groups[0], groups[1], lengths[0]), Subject(groups[1], groups[2], lengths[1])]


def measured(usual: Scorer, deterministic: Scorer, groups: Sequence[EncodedGroup]) -> NoiseReport:
    return measure_noise(usual, deterministic, subjects(groups), TRUTH, torch.device("cpu"), lambda _: None)


def test_noise_by_hand() -> None:
    """Two companies of three captions: one changes the order of the first two and moves the last by 1/4, the other nothing."""
    found = summarise([(0.0, 1.0, 5.0)], [[(0.0, 1.0, 5.0), (1.0, 0.5, 5.25)]])
    assert (found.num_scores, found.num_pairs, found.num_moved) == (6, 6, 3)
    assert (found.largest, found.largest_move) == (1.0, 1.0)
    assert found.flips_per_10_000 == pytest.approx(10_000 / 6)
    assert found.spread == pytest.approx(7**0.5)
    assert found.as_dict()["largest_over_spread"] == pytest.approx(1 / 7**0.5)


def test_a_tie_that_was_none_is_a_flip() -> None:
    assert summarise([(0.0, 1.0)], [[(1.0, 1.0)]]).flips_per_10_000 == 10_000


def test_who_was_not_asked_counts_nowhere() -> None:
    """The second company saw the last caption alone: no pair of it, one score, which moved."""
    found = summarise([(0.0, 1.0, 5.0)], [[(0.0, 1.0, 5.0), (None, None, 5.5)]])
    assert (found.num_captions, found.num_scores, found.num_pairs, found.num_moved) == (3, 4, 3, 1)
    assert (found.largest, found.largest_move) == (0.5, 0.5)


def test_how_far_company_moves_a_score_is_not_how_far_it_is_from_float32() -> None:
    """All companies are 1 off, and differ by 1/8 among themselves."""
    found = summarise([(0.0, 4.0)], [[(1.0, 5.0), (1.125, 5.0), (1.0, None)]])
    assert (found.largest, found.largest_move, found.num_moved) == (1.125, 0.125, 1)


def test_companies_differ_in_size_place_and_cache() -> None:
    found = companies()
    assert len(found) == len(set(found)) == 14
    assert {each.size for each in found} == {1, 2, 4, 8, 16}
    assert {each.stranger for each in found} == {"", "first", "last"}


def test_every_caption_is_asked_behind_a_known_prefix_and_both_ends_behind_a_new_one() -> None:
    for company in companies():
        asked = {start + number for start in company.starts for number in range(company.size)}
        if company.warm and not company.stranger:
            assert asked == set(range(GROUP_SIZE))
        elif not company.stranger:
            assert {0, GROUP_SIZE - 1} <= asked
        else:
            assert len(asked) == 8


def test_scores_that_stay_are_no_noise(groups: list[EncodedGroup]) -> None:
    """Of each group 80 scores warm, 2 + 4 + 8 + 16 + 16 cold, 32 beside a stranger."""
    found = measured(LengthScorer(), LengthScorer(), groups)
    for noise in (found.usual, found.deterministic):
        assert (noise.num_captions, noise.num_scores, noise.largest, noise.num_moved) == (2 * GROUP_SIZE, 2 * 158, 0.0, 0)


def test_scores_that_depend_on_company_are_seen(groups: list[EncodedGroup]) -> None:
    """Behind a stranger stand the first 8 captions of each group, with its prefix new and known."""
    found = measured(LengthScorer(), LengthScorer(0.25), groups)
    assert (found.usual.largest, found.usual.num_moved) == (0.0, 0)
    assert (found.deterministic.largest_move, found.deterministic.num_moved) == (0.25, 2 * 8)
    assert not found.holds


def test_no_prefix_is_known_unless_it_should_be(groups: list[EncodedGroup]) -> None:
    """Of each group one name is asked again and again, every other in one batch; timed cold batches have new pictures, too."""
    scorer = LengthScorer()
    measured(scorer, LengthScorer(), groups)
    names = Counter(group.key[0] for batch in scorer.batches for group in batch)
    assert sorted(names.values(), reverse=True)[:2] == [1 + 16 + 8 + 4 + 2 + 1 + 2] * 2
    assert set(names.values()) == {1, 34}
    pictures = Counter(group.image.image_id for batch in scorer.batches for group in batch if group.image is not None)
    cold_of_8 = [batch[0] for batch in scorer.batches if len(batch) == 1 and len(batch[0].rows) == 8 and names[batch[0].key[0]] == 1]
    assert len(cold_of_8) == 2 * 2
    assert all(group.image is not None and pictures[group.image.image_id] == 1 for group in cold_of_8)


def test_what_is_no_number_ends_it(groups: list[EncodedGroup]) -> None:
    with pytest.raises(ScoringFailed, match="no finite number"):
        measured(LengthScorer(), LengthScorer(math.nan), groups)


def test_the_price_is_a_ratio_of_medians(groups: list[EncodedGroup]) -> None:
    assert price_of({False: [1.0, 2.0, 9.0], True: [1.0]}, {False: [4.0, 3.0, 8.0], True: [1.5]}) == Price(2.0, 1.5, 3)
    found = measured(LengthScorer(), LengthScorer(), groups).price
    assert found.num_batches == 2 * 2
    assert min(found.cold, found.warm) > 0


def test_float32_is_the_truth_only_where_the_plain_way_says_the_same() -> None:
    assert proven([1e-6, 2e-5]) == Truth(2, 2e-5)
    with pytest.raises(ScoringFailed, match=r"differs from one a caption by 2\.0e-04"):
        proven([1e-6, 2e-4])


def test_the_truth_is_the_plain_way(artifact: Path, groups: list[EncodedGroup]) -> None:
    """Of every caption, not only of those that a run holds against it."""
    model = load_model(open_artifact(str(artifact), offline=True), device="cpu", dtype="float32").model
    found, truth = subjects_of(model, groups, lambda _: None)
    assert truth.num_proven == 2 * 2
    for subject, group in zip(found, groups[:2], strict=True):
        assert subject.expected == pytest.approx(score_plain(model, [part_of(group, 0, GROUP_SIZE)])[0].values, abs=1e-5)


def test_determinism_holds_only_if_nothing_moved() -> None:
    noise = Noise(1, 1, 1, 0.0, 0.0, 0.0, 1.0, 0, 0.0)
    moved = Noise(1, 1, 1, 0.1, 0.1, 0.0, 1.0, 1, 0.1)
    assert NoiseReport(moved, noise, Price(1.0, 1.0, 1), TRUTH).holds
    assert not NoiseReport(noise, moved, Price(1.0, 1.0, 1), TRUTH).holds


def test_a_whole_run_in_bfloat16(artifact: Path) -> None:
    found = run_noise(Settings(model=str(artifact), device="cpu", dtype="bfloat16", num_threads=1), 1, lambda _: None)
    assert found.report.deterministic.num_moved == 0
    assert found.report.usual.largest > 0
    assert found.report.usual.num_moved > 0
    assert found.report.usual.num_scores == found.report.deterministic.num_scores == 158
    told = found.as_dict("tiny")
    assert told["deterministic_holds"] is True
    assert set(told["noise"]) == {"usual", "deterministic"}
    assert told["float32"]["num_proven"] == 2
    stream = io.StringIO()
    Console(width=WIDTH, file=stream).print(noise_tables(found.report, found.hardware, found.heading), highlight=False)
    for line in ("their scores compared with float32 158 158", "pairs of scores whose order was compared 987 987", "2 captions by one of"):
        assert line in " ".join(stream.getvalue().split())
