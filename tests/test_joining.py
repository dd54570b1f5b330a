"""Captions that came alone are put together as they were sampled, and what is open is bounded in number, size and time."""

from __future__ import annotations

from app.joining import Group, OpenGroups


def alone(score: float, now_s: float = 0.0, digest: int = 0) -> Group:
    return Group([digest], [1], [score], now_s, now_s)


def scores(groups: list[Group]) -> list[list[float]]:
    return [group.scores for group in groups]


def test_captions_about_the_same_join_whatever_comes_between() -> None:
    groups = OpenGroups(max_captions=3)
    found = [groups.join(about, alone(score)) for about, score in ((1, 0.1), (2, 0.2), (1, 0.3), (2, 0.4))]
    assert found == [[], [], [], []]
    assert scores(groups.join(1, alone(0.5))) == [[0.1, 0.3, 0.5]]
    assert scores(list(groups)) == [[0.2, 0.4]]


def test_a_full_group_is_whole_and_the_next_caption_opens_another() -> None:
    groups = OpenGroups()
    whole = [group for number in range(130) for group in groups.join(1, alone(float(number)))]
    assert [len(group.scores) for group in whole] == [64, 64]
    assert scores(list(groups)) == [[128.0, 129.0]]


def test_time_counts_from_the_first_caption() -> None:
    groups = OpenGroups()
    groups.join(1, alone(0.1, now_s=0.0))
    groups.join(2, alone(0.2, now_s=30.0))
    groups.join(1, alone(0.3, now_s=59.0))
    assert groups.due(59.9) == []
    assert [(group.scores, group.began_s, group.ended_s) for group in groups.due(60.0)] == [([0.1, 0.3], 0.0, 59.0)]
    assert len(groups) == 1


def test_of_too_many_the_oldest_is_whole_first() -> None:
    groups = OpenGroups()
    whole = [group for number in range(1000) for group in groups.join(number, alone(float(number)))]
    assert len(groups) == 128
    assert [group.scores[0] for group in whole] == list(range(872))


def test_every_copy_has_its_twin() -> None:
    group = alone(0.0, digest=7)
    assert group.num_twins() == 0
    for digest in (8, 7, 9):
        group.add(alone(0.0, digest=digest))
    assert group.num_twins() == 2
