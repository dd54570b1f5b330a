"""Conversations and responses of exactly as many tokens as asked, whatever stands around them; nothing seen twice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from app.artifacts import open_artifact
from app.bench.conversations import AS_USUAL, Conversations, Lengths, Wanted, lengths_of, whole_words
from app.bench.workload import WORDS, Request
from app.encoding import Encoder, load_encoder
from app.errors import InvalidRequest, SettingsInvalid
from app.geometry import Limits, write_artifact
from tests.test_geometry import TINY_TEXT
from tests.tiny import write_text_only

SEAMLESS = {"caption_role": "raw", "template": "{prompt}{caption}"}
CHATTY = {"caption_role": "user", "template": "Question: {prompt} Answer: {caption}\n\nHow good is it?"}


def encoder_of(root: Path) -> Encoder:
    return load_encoder(open_artifact(str(root), offline=True))


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Encoder:
    """Of the artifact that the bench writes."""
    return encoder_of(write_artifact(TINY_TEXT, tmp_path_factory.mktemp("conversations") / "artifact", limits=Limits(1000, 300)))


def small(root: Path, **changes: Any) -> Encoder:
    """Of an artifact whose tokenizer knows few words."""
    return encoder_of(write_text_only(root, kind="full_head", **changes))


@pytest.mark.parametrize(("conversation", "response"), [(400, 64), (1000, 300), (30, 8)])
def test_tokens_are_exactly_those_asked_for(encoder: Encoder, conversation: int, response: int) -> None:
    source = Conversations(encoder, Wanted(conversation, response))
    first = source.request(8)
    for request in (first, source.request(8, first), source.request(1)):
        group = source.encode(request)
        assert group.image is None
        assert not group.truncated_prompt
        assert group.num_prefix == conversation
        assert {len(row) for row in group.rows} == {conversation + response}
        assert set(group.row_prefixes) == {conversation}
    assert source.notes == ()


@pytest.mark.parametrize("recipe", [SEAMLESS, CHATTY], ids=["raw", "user"])
def test_whatever_stands_around_the_texts_is_counted(tmp_path: Path, recipe: dict[str, Any]) -> None:
    encoder = small(tmp_path, max_prompt_tokens=200, **recipe)
    source = Conversations(encoder, Wanted(150, 40))
    group = source.encode(source.request(8))
    assert (group.num_prefix, {len(row) for row in group.rows}) == (150, {190})


def test_an_artifact_of_short_texts_is_measured_with_those_and_says_so(tmp_path: Path) -> None:
    source = Conversations(small(tmp_path, max_prompt_tokens=100, max_caption_tokens=30, **SEAMLESS), AS_USUAL)
    group = source.encode(source.request(2))
    assert not group.truncated_prompt
    assert lengths_of(group) == Lengths(99, 31)  # the last token before the responses is each one's own
    assert source.notes == (
        "the artifact takes no longer texts: conversations of 99 tokens, not 400",
        "the artifact takes no longer texts: responses of 31 tokens, not 64",
    )


def test_lengths_that_were_asked_for_are_not_cut(tmp_path: Path) -> None:
    encoder = small(tmp_path, max_prompt_tokens=100, max_caption_tokens=30, **SEAMLESS)
    assert Conversations(encoder, Wanted(99, 31)).notes == ()
    with pytest.raises(SettingsInvalid, match="--conversation-tokens 100: the artifact takes at most 99"):
        Conversations(encoder, Wanted(conversation=100))
    with pytest.raises(SettingsInvalid, match="--response-tokens 32: the artifact takes at most 31"):
        Conversations(encoder, Wanted(response=32))


def test_less_than_a_word_is_refused(encoder: Encoder) -> None:
    with pytest.raises(SettingsInvalid, match=r"--conversation-tokens 5: with its template the artifact makes \d+ tokens of a single word"):
        Conversations(encoder, Wanted(conversation=5))


def test_one_prompt_for_all_is_no_new_conversation(tmp_path: Path) -> None:
    with pytest.raises(SettingsInvalid, match="no conversation would be new"):
        Conversations(small(tmp_path, prompt_policy="fixed", **SEAMLESS), AS_USUAL)


def test_nothing_comes_twice_and_everything_again_from_the_same_seed(encoder: Encoder) -> None:
    one, other = Conversations(encoder, AS_USUAL, seed=1), Conversations(encoder, AS_USUAL, seed=1)
    first, second = one.request(8), one.request(8)
    assert first.prompt != second.prompt
    assert len({*first.captions, *second.captions}) == 16
    assert (other.request(8), other.request(8)) == (first, second)
    known = one.request(8, first)
    assert (known.prompt, known.image) == (first.prompt, None)
    assert not set(known.captions) & set(first.captions)


def test_texts_too_short_to_be_new_are_refused(encoder: Encoder) -> None:
    """Of one word, which is always the same."""
    source = Conversations(encoder, AS_USUAL)
    shortest = source.encode(Request(None, ("a " * 63 + "dog",), source.request(1).prompt))
    assert lengths_of(shortest).response == 64
    with pytest.raises(SettingsInvalid, match="cannot make so many different texts"):
        Conversations(encoder, Wanted(response=1))


def test_what_a_cold_group_must_compute(encoder: Encoder, tmp_path: Path) -> None:
    """All of a raw conversation; of a chat not what every chat begins with, for it may be kept."""
    raw = Conversations(encoder, AS_USUAL)
    assert raw.num_unknown(raw.encode(raw.request(1))) == 400
    chat_encoder = small(tmp_path, **CHATTY)
    chat = Conversations(chat_encoder, Wanted(100, 20))
    assert len(chat_encoder.lead_ids) > 0
    assert chat.num_unknown(chat.encode(chat.request(1))) == 100 - len(chat_encoder.lead_ids)


def test_another_length_than_asked_for_is_no_group(encoder: Encoder) -> None:
    source = Conversations(encoder, AS_USUAL)
    request = source.request(2)
    with pytest.raises(InvalidRequest, match="of what should be"):
        source.encode(Request(None, tuple(f"{text} dog" for text in request.captions), request.prompt))
    with pytest.raises(InvalidRequest, match="several lengths"):
        source.encode(Request(None, (request.captions[0], "a dog"), request.prompt))


def test_only_words_of_one_token_are_used(encoder: Encoder, tmp_path: Path) -> None:
    assert whole_words(encoder) == list(WORDS)
    few = whole_words(small(tmp_path, **SEAMLESS))
    assert 4 <= len(few) < len(WORDS)
    assert set(few) < set(WORDS)
