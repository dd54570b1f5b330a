"""Texts that are split and tokenised in pieces have the ids of the whole; where that is not known of a tokenizer they stay whole."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from app.artifacts import open_artifact
from app.tokens import PlainTokenizer

HEAD, TAIL = "Look at the cartoon.\n\nCandidate caption: ", "\n\nJudge how funny this caption is."
# What words begin, end or change with: letters that compose, contractions, digits, runs of spaces and line ends, marks, control tokens.
PIECES = [
    *"aXz sST'",
    *(" a", " X", "b c", " Zo", "n't", "'s", "'Re", "'ll x", "it's e"),
    *("  ", "\n", "\r\n", " \n ", "\t", "\u00a0", "\u2003"),
    *("!", "...", " ?!\n", "-", "(", "12", "7", "٣"),
    *("\u0301", "e\u0301", "é", "가", "ᄀ", "ᅡ", "漢字", "🦆", "👩\u200d💻", "ﬁ", "ſ", "ı"),
    *("<|im_end|>", "<think>", "</think>", "<|im_start|> a b"),
]
texts = st.lists(st.sampled_from(PIECES), max_size=9).map("".join)
PATTERNS = {
    "qwen": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    "gpt-2 split": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
    "gpt-2": None,
}


ORDINARY = ("<think>", "</think>", "Zo")


def demo() -> Any:
    return AutoTokenizer.from_pretrained(open_artifact("demo").processor_path, local_files_only=True)


def wrapped(tokenizer: Tokenizer) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def greedy(pattern: str | None) -> Any:
    """A tokenizer that merges any two bytes of those that begin, end or change a word: one that a wrong split cut apart has other ids.

    Without a pattern in GPT-2's own form. Three added tokens are ordinary ones, one is special.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    merges = [(first, second) for first in "abceXZzosSTtn'Ġ" for second in "abceXZzosSTtn'Ġ"]
    for first, second in merges:
        vocabulary.setdefault(first + second, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    written = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pattern is None)
    split = [] if pattern is None else [pre_tokenizers.Split(Regex(pattern), "isolated")]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*split, written]) if split else written
    tokenizer.add_special_tokens(["<|im_end|>"])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ORDINARY])
    return wrapped(tokenizer)


TOKENIZERS = {
    (name, keeps): PlainTokenizer(tokenizer, keeps_ordinary=keeps)
    for name, tokenizer in {"demo": demo(), **{name: greedy(pattern) for name, pattern in PATTERNS.items()}}.items()
    for keeps in (False, True)
}
DEMO = TOKENIZERS["demo", False]


@pytest.mark.parametrize("which", TOKENIZERS)
@given(head=texts, tail=texts, captions=st.lists(texts, max_size=4))
@example(head="say it's eX yo", tail="b c", captions=["\u0301", "'s", "  ", ""])
@example(head="a b", tail=" c d", captions=["\u0301x", "\n"])
@example(head=HEAD, tail=TAIL, captions=["Fine.\n", "it's", "no \n\n", "é\u0301"])
@example(head="so <think> a b<thi", tail="nk> a b </think>", captions=["", " Zo a"])
@settings(max_examples=200, deadline=None)
def test_pieces_have_the_ids_of_the_whole(which: tuple[str, bool], head: str, tail: str, captions: list[str]) -> None:
    plain = TOKENIZERS[which]
    assert plain.can_split
    found = plain.between(head, captions, tail)
    assert [row.tolist() for row in found] == [plain.ids(f"{head}{caption}{tail}").tolist() for caption in captions]


@pytest.mark.parametrize("name", PATTERNS)
def test_ordinary_tokens_are_tokens_only_where_they_are_kept(name: str) -> None:
    """Else the property would have nothing to go wrong at."""
    kept, plain = TOKENIZERS[name, True], TOKENIZERS[name, False]
    assert (kept.count("<think>"), kept.count("<|im_end|>") > 1) == (1, True)
    assert plain.count("<think>") > 1


class Counting(PlainTokenizer):
    """Counts the characters that are tokenised."""

    num_characters = 0

    def batch(self, texts: Sequence[str]) -> list[Any]:
        self.num_characters += sum(map(len, texts))
        return super().batch(texts)


def test_what_all_captions_stand_in_is_tokenised_once() -> None:
    plain = Counting(demo(), keeps_ordinary=False)
    captions = ["No comment.", "Still waiting.", "Who let him in?"] * 8
    rows = plain.between(HEAD, captions, TAIL)
    assert [row.tolist() for row in rows] == [plain.ids(HEAD + caption + TAIL).tolist() for caption in captions]
    beside = len(" caption: ") + len("\n\nJudge")  # a caption: up to where the text may be split
    assert plain.num_characters == len(HEAD) + len(TAIL) - beside + sum(len(caption) + beside for caption in captions)


@pytest.mark.parametrize("head", ["a b" + "\n" * 5000, "漢" * 5000, ""])
@pytest.mark.parametrize("tail", ["\n" * 5000 + "a b", "漢" * 5000, ""])
def test_a_text_is_searched_only_next_to_the_caption(head: str, tail: str) -> None:
    assert DEMO._split_points(head, tail) == (0, len(tail))
    (row,) = DEMO.between(head, ["one two"], tail)
    assert row.tolist() == DEMO.ids(f"{head}one two{tail}").tolist()


def test_split_points_of_a_long_head_are_places_in_the_whole() -> None:
    head = "two words " * 1000
    assert DEMO._split_points(head, head) == (len(head) - len(" words "), len("two"))


def changed(**state: Any) -> PlainTokenizer:
    """The demo's tokenizer with something else in its file."""
    told = json.loads(demo().backend_tokenizer.to_str())
    for path, value in state.items():
        *parents, last = [int(step) if step.isdecimal() else step for step in path.split("__")]
        place = told
        for parent in parents:
            place = place[parent]
        place[last] = value
    return PlainTokenizer(wrapped(Tokenizer.from_str(json.dumps(told))), keeps_ordinary=True)


DIGITS = {"type": "Digits", "individual_digits": True}


@pytest.mark.parametrize(
    "state",
    [
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Lowercase"}},
        {"model__dropout": 0.5},
        {"model": {"type": "WordLevel", "vocab": {"a": 0, "?": 1}, "unk_token": "?"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [DIGITS]}},
        {"pre_tokenizer__pretokenizers__0__pattern": {"Regex": "\\s+|\\S+"}},
        {"pre_tokenizer__pretokenizers__0__behavior": "MergedWithNext"},
        {"pre_tokenizer__pretokenizers__0__invert": True},
        {"pre_tokenizer__pretokenizers__1": DIGITS},
        {"pre_tokenizer__pretokenizers__1__add_prefix_space": True},
        {"pre_tokenizer__pretokenizers__1__use_regex": True},
    ],
)
def test_a_tokenizer_whose_pre_tokens_are_not_known_is_given_whole_texts(state: dict[str, Any]) -> None:
    plain = changed(**state)
    assert not plain.can_split
    assert plain._split_points("two words ", " and more") == (0, len(" and more"))
    (row,) = plain.between("two words ", ["a 1 2"], " and more")
    if "model__dropout" not in state:
        assert row.tolist() == plain.ids("two words a 1 2 and more").tolist()


def test_three_steps_are_not_two() -> None:
    steps = json.loads(demo().backend_tokenizer.to_str())["pre_tokenizer"]["pretokenizers"]
    assert not changed(pre_tokenizer={"type": "Sequence", "pretokenizers": [*steps, DIGITS]}).can_split


@pytest.mark.parametrize("flag", [None, "lstrip", "rstrip", "single_word", "space"])
def test_an_added_token_that_takes_spaces_keeps_texts_whole(flag: str | None) -> None:
    tokenizer = with_added(**({"content": "two words"} if flag == "space" else {} if flag is None else {flag: True}))
    assert PlainTokenizer(tokenizer, keeps_ordinary=True).can_split is (flag is None)
    assert PlainTokenizer(tokenizer, keeps_ordinary=False).can_split  # there it is text like any other


def test_a_special_token_that_hides_an_ordinary_one_keeps_texts_whole() -> None:
    """In the whole text the special one is found first, and what lies in it is text; a piece would not hold the whole of it."""
    tokenizer = with_added(content="<think>")
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|end of <think>|>"]})
    plain = PlainTokenizer(tokenizer, keeps_ordinary=True)
    assert not plain.can_split
    (row,) = plain.between("say <|end of <think>|> a", ["b"], "")
    assert row.tolist() == plain.ids("say <|end of <think>|> ab").tolist()


def with_added(**flags: Any) -> Any:
    """The demo's tokenizer with one more token that is not special."""
    told = json.loads(demo().backend_tokenizer.to_str())
    number = len(told["model"]["vocab"]) + len(told["added_tokens"])
    told["added_tokens"].append({**told["added_tokens"][0], "id": number, "content": "<think>", "special": False, **flags})
    return wrapped(Tokenizer.from_str(json.dumps(told)))


def test_ids_are_int64_and_nothing_is_nothing() -> None:
    (row,) = DEMO.between("", [""], "")
    assert row.dtype == np.int64
    assert not len(row)


def test_a_cut_text_keeps_tokens_that_look_special() -> None:
    """What a user writes is text, and cutting it must not take words out of it."""
    assert DEMO.cut("say <|im_end|> and more", DEMO.count("say <|im_end|>")) == ("say <|im_end|>", True)
    assert DEMO.cut("say it", 50) == ("say it", False)
