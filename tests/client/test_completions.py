"""Which caption a completion holds, in every form trainers give it, and what becomes of it where there is none."""

from __future__ import annotations

from typing import Any

import pytest

from app.client.completions import Said, read_completion, text_of


@pytest.mark.parametrize(
    ("text", "caption", "tagged"),
    [
        ("It is only Tuesday.", "It is only Tuesday.", False),
        ("  It is\nonly Tuesday. \n", "It is\nonly Tuesday.", False),
        ("", "", False),
        ("<caption>It is only Tuesday.</caption>", "It is only Tuesday.", True),
        ("I think of days. <caption>\n It is\nonly  Tuesday. </caption> Done.", "It is\nonly  Tuesday.", True),
        ("<CAPTION>loud</Caption>", "loud", True),
        ("<caption></caption>", "", True),
        ("<caption> \n </caption>", "", True),
        ("<caption>draft</caption> no: <caption>final</caption>", "final", True),
        ("<caption>draft</caption> no: <caption>never clo", "draft", True),
        ("so: <caption>never clo", "never clo", False),
        ("so: <caption>one <caption>two", "two", False),
        ("<caption>outer <caption>inner</caption></caption>", "inner", True),
        ("closed</caption>, never opened", "closed</caption>, never opened", False),
        ("<caption>a</caption> b</caption>", "a", True),
        ("</caption>x<caption>", "", False),
        ("<caption >a</caption>", "<caption >a</caption>", False),
        ("<caption>a < b & <i>c</i></caption>", "a < b & <i>c</i>", True),
        ("<caption>ünïcödé \U0001f427 \ud800</caption>", "ünïcödé \U0001f427 \ud800", True),
    ],
)
def test_the_last_whole_tag_is_the_caption(text: str, caption: str, tagged: bool) -> None:
    assert read_completion(text) == Said(caption, tagged)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "text", ["<caption>" * 100_000, "<caption>x</caption" * 50_000, "</caption>" * 100_000, "<caption>" + "x" * 1_000_000]
)
def test_no_completion_takes_long_to_read(text: str) -> None:
    """A reading that is quadratic in the length would run into the timeout of the test."""
    assert not read_completion(text).tagged


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        ([{"role": "assistant", "content": "said"}], "said"),
        ([{"content": "said"}], "said"),
        ([], ""),
        ([{"role": "assistant", "content": None, "tool_calls": []}], ""),
        ([{"role": "assistant", "tool_calls": []}], ""),
        ([{"role": "tool", "content": "4"}], ""),
        ([{"role": "assistant", "content": [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]}], "one two"),
        ([{"role": "assistant", "content": [{"type": "image", "image": object()}, {"type": "text", "text": "two"}]}], "two"),
        ([{"role": "assistant", "content": "first"}, {"role": "tool", "content": "4"}, {"role": "assistant", "content": "last"}], "last"),
        ([{"role": "assistant", "content": "said"}, {"role": "user", "content": "asked"}], "said"),
    ],
)
def test_messages_say_what_the_assistant_said_last(messages: list[dict[str, Any]], text: str) -> None:
    assert text_of(messages) == text
    assert text_of(tuple(messages)) == text


@pytest.mark.parametrize("completion", [["a", "b"], {"role": "assistant", "content": "x"}, [1], None, 3])
def test_what_is_no_completion_is_the_callers_mistake(completion: Any) -> None:
    with pytest.raises(TypeError):
        text_of(completion)
