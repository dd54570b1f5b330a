"""Rows become groups and scores find their rows again; what no score was asked for gets what the rules say."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.client import NoCaption
from app.client.answers import GroupScores
from app.client.completions import read_completion
from app.client.rollouts import MAX_CAPTION_BYTES, Plan, Row, Rules, planned


def told_by_length(plan: Plan, refused: str = "never") -> list[GroupScores]:
    """A server that scores a caption by its length and its picture's, and cannot score one word."""
    return [
        GroupScores(
            tuple(None if text == refused else len(text) + 100.0 * len(str(group.image)) for text in group.captions),
            tuple("caption_too_long" if text == refused else None for text in group.captions),
            None,
            (),
        )
        for group in plan.groups
    ]


def scores(plan: Plan, refused: str = "never") -> list[float | None]:
    return [reward.score for reward in plan.rewards(told_by_length(plan, refused))]


rows = st.lists(
    st.builds(Row, st.text(max_size=5), st.sampled_from([None, "a.png", "bb.png", b"raw"]), st.sampled_from([None, "", "prompt"]))
)


@given(rows)
def test_every_row_gets_its_own_score(drawn: list[Row]) -> None:
    plan = planned(drawn, Rules())
    assert scores(plan) == [len(read_completion(row.completion).caption) + 100.0 * len(str(row.image)) for row in drawn]
    assert len({(str(group.image), group.prompt) for group in plan.groups}) == len(plan.groups)


def test_nothing_is_asked_about_nothing() -> None:
    plan = planned([], Rules())
    assert plan.groups == ()
    assert plan.rewards([]) == []


def test_rows_of_one_picture_go_together_wherever_they_stand() -> None:
    plan = planned([Row("1", "a"), Row("2", "b"), Row("3", "a"), Row("4", "a", "p"), Row("5", "b")], Rules())
    assert [(group.image, group.prompt, group.captions) for group in plan.groups] == [
        ("a", None, ("1", "3")),
        ("b", None, ("2", "5")),
        ("a", "p", ("4",)),
    ]


@pytest.mark.parametrize(("missing", "expected"), [("whole", 5.0 + 400), ("none", None), (-2, -2.0), (-2.5, -2.5), (0.0, 0.0)])
def test_without_a_tag(missing: Any, expected: float | None) -> None:
    plan = planned([Row("plain"), Row("<caption>in tags</caption>")], Rules(missing=missing))
    assert scores(plan) == [expected, 7.0 + 400]
    assert [reward.said.tagged for reward in plan.rewards(told_by_length(plan))] == [False, True]


def test_without_a_tag_it_may_raise_and_tells_no_text() -> None:
    with pytest.raises(NoCaption, match="completion 1") as caught:
        planned([Row("<caption>in tags</caption>"), Row("secret")], Rules(missing="raise"))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(("refused", "expected"), [("none", None), (-9.0, -9.0)])
def test_what_the_server_refuses(refused: Any, expected: float | None) -> None:
    """Also what is so long that a whole request would be refused for it: that is not sent."""
    plan = planned([Row("fine"), Row("bad"), Row("x" * (MAX_CAPTION_BYTES + 1)), Row("é" * MAX_CAPTION_BYTES)], Rules(refused=refused))
    assert [group.captions for group in plan.groups] == [("fine", "bad")]
    assert plan.rules.on_item_error == "null"
    assert scores(plan, refused="bad") == [4.0 + 400, expected, expected, expected]


def test_by_default_a_refusal_is_an_error() -> None:
    plan = planned([Row("x" * (MAX_CAPTION_BYTES + 1))], Rules())
    assert len(plan.groups) == 1
    assert plan.rules.on_item_error == "fail"


@pytest.mark.parametrize(
    "options", [{"missing": "hole"}, {"missing": None}, {"refused": "whole"}, {"refused": float("nan")}, {"missing": True}]
)
def test_a_rule_that_is_none_is_named(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        Rules(**options)


def test_fewer_groups_than_asked_for_are_no_scores() -> None:
    plan = planned([Row("1", "a"), Row("2", "b")], Rules())
    with pytest.raises(ValueError, match="zip"):
        plan.rewards(told_by_length(plan)[:1])
