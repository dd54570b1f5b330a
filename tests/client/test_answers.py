"""Answers that are none: each is an error, whatever a careless client would have read in it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from app.client import BadAnswer, Group, Refused
from app.client.answers import read_comparison, read_ranking
from tests.client.both import Kind, Script, asking, both

PICTURE = b"a picture"
Change = Callable[[dict[str, Any]], Any]


def scores(*values: Any) -> Change:
    return lambda told: told | {"groups": [told["groups"][0] | {"scores": list(values)}]}


WRONG: dict[str, Change] = {
    "a score too few": scores(1.0),
    "a score too many": scores(1.0, 2.0, 3.0),
    "none": scores(None, 2.0),
    "not a number": scores(math.nan, 2.0),
    "endless": scores(math.inf, 2.0),
    "a text": scores("1.0", 2.0),
    "a truth": scores(True, 2.0),
    "a list": scores([1.0], 2.0),
    "no scores": lambda told: told | {"groups": [{}]},
    "no groups": lambda told: {name: value for name, value in told.items() if name != "groups"},
    "a group too many": lambda told: told | {"groups": told["groups"] * 2},
    "another group": lambda told: told | {"groups": [told["groups"][0] | {"id": "7"}]},
    "another picture": lambda told: told | {"groups": [told["groups"][0] | {"image_id": "sha256:" + "1" * 64}]},
    "no picture": lambda told: told | {"groups": [told["groups"][0] | {"image_id": None}]},
    "another request's": lambda told: told | {"request_id": "0" * 32},
    "no request's": lambda told: {name: value for name, value in told.items() if name != "request_id"},
    "an error that was to fail": lambda told: told | {"groups": [told["groups"][0] | {"errors": [{"code": "x", "message": "y"}, None]}]},
    "a list of groups": lambda told: httpx.Response(200, content=json.dumps([told])),
    "a number": lambda told: httpx.Response(200, content="0.5"),
    "a page": lambda told: httpx.Response(200, content="<html>login</html>"),
    "nothing": lambda told: httpx.Response(200, content=""),
}


@both
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_a_wrong_answer_gives_no_scores(kind: Kind, change: Change) -> None:
    script = Script(change)
    with asking(kind, transport=script) as asked, pytest.raises(BadAnswer):
        asked.score(PICTURE, ["a", "bb"])
    assert len(script.posts) == 1


@both
def test_groups_in_another_order_give_no_scores(kind: Kind) -> None:
    script = Script(lambda told: told | {"groups": told["groups"][::-1]})
    with asking(kind, transport=script) as asked, pytest.raises(BadAnswer, match="order"):
        asked.score_groups([Group(b"1", ["a"]), Group(b"2", ["b"])])


@both
def test_a_caption_that_may_fail_is_none_and_says_why(kind: Kind) -> None:
    error = {"code": "caption_too_long", "message": "the caption is longer than 8 tokens"}
    script = Script(lambda told: told | {"groups": [told["groups"][0] | {"scores": [None, 2.0], "errors": [error, None]}]})
    with asking(kind, transport=script) as asked:
        (found,) = asked.score_groups([Group(PICTURE, ["a", "bb"])], on_item_error="null")
    assert found.scores == (None, 2.0)
    assert found.errors == ("caption_too_long: the caption is longer than 8 tokens", None)
    assert script.posts[0]["on_item_error"] == "null"


@both
@pytest.mark.parametrize("values", [(None, 2.0), (math.nan, 2.0)])
def test_none_without_a_reason_is_no_answer_even_then(kind: Kind, values: Any) -> None:
    with asking(kind, transport=Script(scores(*values))) as asked, pytest.raises(BadAnswer):
        asked.score_groups([Group(PICTURE, ["a", "bb"])], on_item_error="null")


@both
def test_a_refusal_names_what_the_server_named(kind: Kind) -> None:
    fault = {"code": "caption_too_long", "message": "too long", "retryable": False, "field": "groups[0].captions[1]", "index": 1}
    script = Script(lambda _: httpx.Response(422, json={"error": fault}))
    with asking(kind, transport=script) as asked, pytest.raises(Refused) as found:
        asked.score(PICTURE, ["a", "b" * 99])
    assert (found.value.status, found.value.code, found.value.field, found.value.index) == (
        422,
        "caption_too_long",
        "groups[0].captions[1]",
        1,
    )


COMPARED = {"preferred": "a", "probability_a": 0.75, "margin": 1.5, "scores": {"a": 2.0, "b": 0.5}, "image_id": None}


@pytest.mark.parametrize(
    "change",
    [
        {"preferred": "b"},
        {"margin": 1.0},
        {"margin": None},
        {"probability_a": 1.5},
        {"probability_a": math.nan},
        {"scores": {"a": 2.0}},
        {"scores": None},
        {"image_id": "sha256:x"},
    ],
)
def test_a_comparison_that_contradicts_itself(change: dict[str, Any]) -> None:
    assert read_comparison(COMPARED, None).preferred == "a"
    with pytest.raises(BadAnswer):
        read_comparison(COMPARED | change, None)


def row(rank: int, index: int, caption: str, score: float) -> dict[str, Any]:
    return {"rank": rank, "index": index, "caption": caption, "score": score, "win_probability": 0.5, "tied": False}


FIRST, SECOND = row(1, 1, "b", 2.0), row(2, 0, "a", 1.0)


@pytest.mark.parametrize(
    "ranking",
    [
        [FIRST],
        [FIRST, FIRST],
        [SECOND, FIRST],
        [FIRST, SECOND | {"caption": "c"}],
        [FIRST, SECOND | {"score": math.inf}],
        [FIRST, SECOND | {"win_probability": None}],
        [FIRST, SECOND | {"win_probability": 1.5}],
        [FIRST, SECOND | {"rank": None}],
        [FIRST, {name: value for name, value in SECOND.items() if name != "rank"}],
        [FIRST, {name: value for name, value in SECOND.items() if name != "caption"}],
        [FIRST, 0.5],
        None,
    ],
)
def test_a_ranking_of_something_else(ranking: Any) -> None:
    assert [each.index for each in read_ranking({"ranking": [FIRST, SECOND], "image_id": None}, ("a", "b"), None)] == [1, 0]
    with pytest.raises(BadAnswer):
        read_ranking({"ranking": ranking, "image_id": None}, ("a", "b"), None)
