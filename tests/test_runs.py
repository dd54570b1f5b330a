"""Runs: what of their scores looks like reward hacking, how little is kept of them, and who makes room for whom."""

from __future__ import annotations

import json
import math
import pickle
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.runs import ESTABLISHED, LIMITS, MAX_TEXTS, STD_RATIOS, Run, Runs, edges_for
from app.tallies import Expected

EXPECTED = Expected(0.0, 1.0)
Groups = Iterable[tuple[Sequence[str], Sequence[float | None]]]


def told(groups: Groups, expected: Expected | None = EXPECTED) -> Run:
    run = Run("run", expected)
    for number, (captions, scores) in enumerate(groups):
        run.observe(captions, scores, 100.0 + number)
    return run


def codes(run: Run) -> set[str]:
    return {finding.code for finding in run.findings()}


def texts(source: random.Random, num: int) -> list[str]:
    """Captions nobody wrote before, of 20 to 80 characters."""
    return [f"{source.getrandbits(64):016x} ".ljust(source.randrange(20, 80), "x") for _ in range(num)]


def healthy(num: int = 200, size: int = 8, seed: int = 0, score: Callable[[random.Random, str], float] | None = None) -> Iterator[Any]:
    source = random.Random(seed)
    for _ in range(num):
        captions = texts(source, size)
        yield captions, [score(source, caption) if score else source.gauss(0, 1) for caption in captions]


def test_a_healthy_run_has_no_findings() -> None:
    run = told(healthy())
    assert run.findings() == []
    found = run.as_dict()
    assert (found["total"]["captions"], found["total"]["groups"], found["early"]) == (1600, 200, False)
    assert found["recent"]["groups"] == 136
    assert (found["total"]["first_seen_s"], found["total"]["last_seen_s"]) == (100.0, 299.0)


HACKED: dict[str, Groups] = {
    "no_spread": [([f"{number} {each}" for each in range(8)], [1.0] * 8) for number in range(40)],
    "length": list(healthy(score=lambda source, caption: source.gauss(0, 0.5) + len(caption) / 20 - 2)),
    "drift": list(healthy(score=lambda source, _: source.gauss(3.4, 1))),
    "outside": list(healthy(score=lambda source, _: source.gauss(0, 2))),
    "std_ratio": list(healthy(score=lambda source, _: source.gauss(0, 0.05))),
    "spread_fell": [*healthy(), *healthy(400, seed=1, score=lambda source, _: source.gauss(0, 0.15))],
    "duplicates": [([f"{number}"] * 4 + [f"{number} {each}" for each in range(4)], [0.5] * 4 + [-1, 0, 1, 2]) for number in range(40)],
    "repeats": [(["the moat", "penguins", f"{number:08d}", f"{number:07d}!"], [0.1, 0.4, -1, 1]) for number in range(40)],
}  # fmt: skip


@pytest.mark.parametrize("code", HACKED)
def test_what_looks_like_reward_hacking_is_said_with_its_value_and_limit(code: str) -> None:
    run = told(HACKED[code])
    (finding,) = [finding for finding in run.findings() if finding.code == code]
    assert abs(finding.value) > finding.limit or code in {"std_ratio", "spread_fell"}
    is_share = code in {"no_spread", "outside", "duplicates", "repeats", "spread_fell"}
    shown = f"{100 * finding.value:.0f} %" if is_share else f"{abs(finding.value):.2g}"
    assert shown in finding.text
    assert "limit" in finding.text
    assert run.summary()["findings"] == [each.code for each in run.findings()]


def test_signs_that_go_the_other_way_are_named_so() -> None:
    shorter = told(healthy(score=lambda source, caption: source.gauss(0, 0.5) - len(caption) / 20 + 2))
    below = told(healthy(score=lambda source, _: source.gauss(-5, 1)))
    assert "fall with length: r = -" in shorter.findings()[0].text
    assert "5.0 σ below" in next(finding.text for finding in below.findings() if finding.code == "drift")


def test_every_danger_by_itself_raises_its_own_finding_and_few_others() -> None:
    assert codes(told(HACKED["length"])) == {"length"}
    assert codes(told(HACKED["duplicates"])) == {"duplicates"}
    assert codes(told(HACKED["repeats"])) == {"repeats"}
    assert codes(told(HACKED["drift"])) == {"drift", "outside"}
    assert codes(told(HACKED["outside"])) == {"outside"}


def test_nothing_is_said_of_a_few_groups() -> None:
    groups = [([f"{number}"] * 8, [50.0] * 8) for number in range(LIMITS["min_groups"] - 1)]
    assert told(groups).as_dict()["early"] is True
    assert codes(told(groups)) == set()
    assert {"no_spread", "drift", "duplicates"} <= codes(told([*groups, *groups[:1]]))


def test_without_a_score_distribution_drift_is_unknown_and_never_0() -> None:
    run = told(HACKED["drift"], expected=None)
    assert codes(run) == set()
    found = run.as_dict()
    assert found["expected"] is None
    assert {found["recent"][name] for name in ("drift", "std_ratio", "outside_share")} == {None}
    assert found["histogram"]["edges"] == list(edges_for(None))


def test_captions_one_at_a_time_have_no_spread_and_are_watched_all_the_same() -> None:
    source = random.Random(0)
    captions = texts(source, 200)
    run = told(([caption], [len(caption) / 10]) for caption in captions)
    found = run.as_dict()["recent"]
    assert (found["group_spread"], found["flat_share"], found["length_correlation"]) == (None, None, None)
    assert found["length_correlation_overall"] == pytest.approx(1)
    assert codes(run) >= {"length", "drift"}
    assert "over all captions" in next(finding.text for finding in run.findings() if finding.code == "length")


def one_by_one(groups: Groups, now_s: float = 0.0, mixed: int = 16) -> Run:
    """As slime sends them: every caption by itself, those of `mixed` pictures at a time in any order."""
    run, source, listed = Run("run", EXPECTED), random.Random(0), list(enumerate(groups))
    for first in range(0, len(listed), mixed):
        sent = [(number, *pair) for number, (texts, scores) in listed[first : first + mixed] for pair in zip(texts, scores, strict=True)]
        source.shuffle(sent)
        for number, text, score in sent:
            run.observe([text], [score], now_s, number)
    return run


@pytest.mark.parametrize("code", ["no_spread", "length", "duplicates"])
def test_signs_within_groups_are_seen_in_captions_sent_one_at_a_time(code: str) -> None:
    together, apart = told(HACKED[code]), one_by_one(HACKED[code])
    assert codes(apart) == codes(together)
    assert apart.total.num_groups == together.total.num_groups
    assert apart.total.spread == pytest.approx(together.total.spread)
    assert (apart.total.num_duplicates, apart.total.num_repeats) == (together.total.num_duplicates, together.total.num_repeats)
    assert apart.counts == together.counts


def test_one_text_for_every_picture_is_found_in_captions_sent_one_at_a_time() -> None:
    run = one_by_one([(["the moat"] * 4, [0.1, 0.2, 0.3, 0.4])] * 200)
    assert {"duplicates", "repeats"} <= codes(run)


def test_open_groups_are_in_all_that_is_shown() -> None:
    run = one_by_one(healthy(5, size=4))
    found = run.as_dict()
    assert (found["open_groups"], found["total"]["groups"], found["total"]["captions"], found["recent"]["groups"]) == (5, 5, 20, 5)
    assert sum(point["captions"] for point in found["history"]) == sum(found["histogram"]["counts"]) == 20
    assert found["total"]["compared_groups"] == 5
    assert [tally.num_captions for tally in run.close(60.0)] == [4] * 5
    closed = run.as_dict()
    assert closed["total"]["mean"] == pytest.approx(found["total"]["mean"])
    assert (closed["open_groups"], closed["total"]["groups"]) == (0, 5)


def test_a_group_sent_one_by_one_has_the_very_numbers_of_one_sent_together() -> None:
    (captions, scores), *_ = healthy(1)
    together, apart = told([(captions, scores)]), Run("run", EXPECTED)
    for text, score in zip(captions, scores, strict=True):
        apart.observe([text], [score], 100.0, 1)
    assert apart.total == together.total


def test_no_caption_is_kept_in_an_open_group() -> None:
    run = Run("run")
    run.observe(["a secret caption"], [1.0], 0.0, 1)
    assert "secret" not in repr(pickle.dumps(run))


def test_open_groups_are_bounded() -> None:
    run = Run("run", EXPECTED)
    for number in range(50_000):
        run.observe([f"{number}"], [0.5], number / 1000, number % 1000)
    assert len(run._open) <= 128
    assert len(pickle.dumps(run)) < 256 << 10


def test_a_run_as_narrow_as_a_tenth_is_more_than_a_bar() -> None:
    run = told(healthy(score=lambda source, _: source.gauss(0.4, 0.1)))
    assert sum(count > 0 for count in run.counts) >= 4


def test_a_sign_that_has_gone_is_said_no_more() -> None:
    run = told([*HACKED["length"], *healthy(200, seed=5)])
    assert codes(run) == set()
    assert run.as_dict()["total"]["length_correlation"] > 0.4


def test_captions_without_a_score_are_left_out() -> None:
    run = told([(["a", "bb", "ccc"], [1.0, None, 3.0]), (["x"], [None])])
    found = run.as_dict()["total"]
    assert (found["captions"], found["groups"], found["mean"], found["mean_length"]) == (2, 1, 2.0, 2.0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39, -1.7e308])
def test_what_no_float32_holds_is_counted_and_goes_no_further(bad: float) -> None:
    run = told([(["a", "b", "c"], [1.0, bad, 3.0]), (["d"], [bad])])
    found = run.as_dict()
    assert (found["unusable_scores"], found["total"]["captions"], found["total"]["mean"]) == (2, 2, 2.0)
    assert json.loads(json.dumps(found, allow_nan=False)) == found


@settings(deadline=None)
@given(st.lists(st.lists(st.tuples(st.text(max_size=3), st.none() | st.floats()), min_size=1, max_size=9), max_size=40), st.booleans())
def test_whatever_comes_the_numbers_are_finite(groups: list[list[tuple[str, float | None]]], knows: bool) -> None:
    pairs = [([text for text, _ in group], [score for _, score in group]) for group in groups]
    run = told(pairs, EXPECTED if knows else None)
    json.dumps([run.as_dict(), run.summary()], allow_nan=False)
    assert sum(run.counts) == run.total.num_captions


@settings(deadline=None)
@given(st.lists(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=6), max_size=60))
def test_duplicates_and_repeats_are_counted_as_a_list_of_all_captions_would(groups: list[list[str]]) -> None:
    run, before = Run("run"), set[str]()
    num_duplicates = num_repeats = 0
    for group in groups:
        run.observe(group, [0.5] * len(group), 1.0)
        num_duplicates += sum(group.count(text) > 1 for text in group)
        num_repeats += sum(text in before for text in group)
        before |= set(group)
    assert (run.total.num_duplicates, run.total.num_repeats) == (num_duplicates, num_repeats)


def test_256_equal_captions_are_one_flat_group() -> None:
    found = told([(["same"] * 256, [0.1] * 256)]).as_dict()["total"]
    assert (found["duplicate_share"], found["repeat_share"], found["flat_share"], found["group_spread"]) == (1.0, 0.0, 1.0, 0.0)
    assert found["length_correlation"] is None


@settings(deadline=None)
@given(st.lists(st.floats(-30, 30), min_size=1, max_size=50), st.none() | st.just(Expected(2.0, 1.5)))
def test_the_histogram_counts_every_score_up_to_its_edge(scores: list[float], expected: Expected | None) -> None:
    run = told([(["x"] * len(scores), scores)], expected)
    for place, edge in enumerate(run.edges):
        assert sum(run.counts[: place + 1]) == sum(score <= edge for score in scores)
    assert list(run.edges) == sorted(set(run.edges))


def test_a_run_of_any_length_takes_as_much_memory_as_a_short_one() -> None:
    run = Run("run", EXPECTED)
    sizes = []
    for number in range(20_000):
        run.observe([f"caption {number} {each}" for each in range(4)], [0.1 * each + number % 7 for each in range(4)], float(number))
        if number in (3_000, 6_000, 12_000, 19_999):
            sizes.append(len(pickle.dumps(run)))
    assert max(sizes) < 64 << 10
    assert max(sizes) < 1.2 * min(sizes[1:])
    assert len(run._texts) == MAX_TEXTS
    assert "caption 1" not in repr(pickle.dumps(run)), "no caption is kept"
    assert 64 <= len(run.history) <= 128


def test_a_repeat_is_forgotten_after_many_other_captions() -> None:
    run = told([(["one", "two"], [0, 1])])
    for number in range(MAX_TEXTS):
        run.observe([f"{number}"], [0.0], 1.0)
    run.observe(["one", "two"], [0, 1], 1.0)
    assert run.total.num_repeats == 0


def test_a_text_that_comes_again_and_again_is_remembered() -> None:
    run = told([])
    for number in range(5 * MAX_TEXTS):
        run.observe([f"{number}", "one"] if number % 500 == 0 else [f"{number}"], [0.0, 1.0][: 2 if number % 500 == 0 else 1], 1.0)
    assert run.total.num_repeats == 5 * MAX_TEXTS // 500


def test_a_few_groups_among_captions_one_at_a_time_say_nothing_of_length() -> None:
    source = random.Random(0)
    run = told(healthy(128, size=1))
    for _ in range(5):
        captions = texts(source, 2)
        run.observe(captions, [len(caption) / 10 for caption in captions], 1.0)
    assert run.recent.within.correlation() == pytest.approx(1, abs=0.01)
    assert run.length_correlation is None
    assert "length" not in codes(run)


# Which runs are kept


def active(runs: Runs, run_id: str, num_groups: int = 1) -> None:
    for _ in range(num_groups):
        runs.active(run_id).observe(["a", "b"], [0.0, 1.0], float(next(CLOCK)))


CLOCK = iter(range(10**9))


def test_ten_thousand_ids_are_never_more_than_may_be() -> None:
    gone: list[str] = []
    runs = Runs(64, on_forgotten=gone.append)
    for number in range(10_000):
        active(runs, f"run-{number}")
        assert len(runs) <= 64
    assert len(gone) == 10_000 - 64
    assert {run.run_id for run in runs.all()} == {f"run-{number}" for number in range(10_000)} - set(gone)


def test_endless_new_ids_do_not_push_out_a_run_under_way() -> None:
    """Not even one that pauses."""
    runs = Runs(8)
    active(runs, "honest", ESTABLISHED + 1)
    for number in range(5_000):
        active(runs, f"flood-{number}", 1 + number % (ESTABLISHED - 1))
    assert runs.find("honest") is not None


def test_of_runs_under_way_the_one_idle_longest_goes() -> None:
    runs = Runs(4)
    for name in "abc":
        active(runs, name, ESTABLISHED + 1)
    active(runs, "a")
    active(runs, "e", ESTABLISHED + 1)
    assert [run.run_id for run in runs.all()] == ["e", "a", "c"]


def test_a_quarter_of_the_places_is_kept_for_newcomers() -> None:
    """Else a server full of runs under way would lose one to each of the first ids that somebody invents."""
    runs = Runs(32)
    for number in range(32):
        active(runs, f"honest-{number}", ESTABLISHED + 1)
    kept = [run.run_id for run in runs.all()]
    assert len(kept) == 24
    for number in range(1000):
        active(runs, f"flood-{number}")
    assert all(runs.find(run_id) for run_id in kept)
    assert len(runs) == 32


def test_captions_one_at_a_time_make_a_run_established_by_their_groups() -> None:
    runs = Runs(8)
    for number in range(4 * ESTABLISHED):
        runs.active("run").observe([f"{number}"], [0.0], 0.0, number // 8)
    assert "run" in runs._new
    for number in range(ESTABLISHED):
        runs.active("run").observe([f"{number}"], [0.0], 0.0, 100 + number)
    assert "run" in runs._established


def test_looking_at_a_run_keeps_it_no_longer_alive() -> None:
    runs = Runs(3)
    active(runs, "a", ESTABLISHED + 1)
    active(runs, "b", ESTABLISHED + 1)
    assert runs.find("a") is not None
    assert runs.find("nobody") is None
    active(runs, "c", ESTABLISHED + 1)
    assert runs.find("a") is None


@settings(deadline=None)
@given(st.integers(1, 9), st.lists(st.tuples(st.sampled_from("abcdefghijklmnop"), st.integers(1, ESTABLISHED + 2)), max_size=60))
def test_there_are_never_too_many_and_the_last_one_is_always_there(max_runs: int, turns: list[tuple[str, int]]) -> None:
    gone: list[str] = []
    runs = Runs(max_runs, on_forgotten=gone.append)
    begun: list[str] = []
    for name, num_groups in turns:
        begun += [] if runs.find(name) else [name]
        active(runs, name, num_groups)
        assert runs.all()[0].run_id == name
        assert len(runs.all()) == len(runs) == len(begun) - len(gone) <= max_runs


def test_limits_on_the_page_are_those_of_the_findings() -> None:
    limits = {finding.code: finding.limit for code in HACKED for finding in told(HACKED[code]).findings()}
    assert limits["no_spread"] == LIMITS["flat_share"]
    assert limits["length"] == LIMITS["length_correlation"]
    assert limits["drift"] == LIMITS["drift"]
    assert limits["outside"] == LIMITS["outside_share"]
    assert (limits["duplicates"], limits["repeats"]) == (LIMITS["duplicate_share"], LIMITS["repeat_share"])
    assert limits["std_ratio"] in STD_RATIOS
