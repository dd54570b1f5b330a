"""What is sent for a prompt that is a conversation."""

from __future__ import annotations

import json

import pytest

from app.client.requests import Group, Limits, parts_of, score_request
from app.client.rollouts import Row, Rules, planned

MESSAGES = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}, {"role": "user", "content": "And?"}]


def test_messages_are_sent_as_such_with_every_part_of_their_group() -> None:
    parts = parts_of([Group(None, ["a", "b", "c"], MESSAGES), Group(None, ["a"], "Why?"), Group(None, ["a"])], Limits(captions=2))
    body = json.loads(score_request(parts, "fail").as_json(1.0, None))
    assert [(group.get("messages"), group.get("prompt"), group["captions"]) for group in body["groups"]] == [
        (MESSAGES, None, ["a", "b"]),
        (MESSAGES, None, ["c"]),
        (None, "Why?", ["a"]),
        (None, None, ["a"]),
    ]


@pytest.mark.parametrize("prompt", [MESSAGES[0], ["Why?"], [("user", "Why?")]])
def test_what_is_neither_a_text_nor_messages_is_refused(prompt: object) -> None:
    with pytest.raises(TypeError, match="a prompt is a text, or a list of messages"):
        parts_of([Group(None, ["a"], prompt)], Limits())  # type: ignore[arg-type]


def test_rows_of_one_conversation_are_one_group() -> None:
    """Equal messages are; a text that spells them is another prompt."""
    said = [MESSAGES, [dict(message) for message in MESSAGES], MESSAGES[:1], json.dumps([MESSAGES]), None]
    plan = planned([Row("x", None, prompt) for prompt in said], Rules())
    assert plan.places == ((0, 1), (2,), (3,), (4,))
    assert plan.groups[0].prompt == MESSAGES
