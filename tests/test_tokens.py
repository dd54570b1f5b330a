"""Texts that are cut and tokenised in pieces have the ids of the whole; tokenizers for which that is not known are not cut."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
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
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


def demo() -> Any:
    return AutoTokenizer.from_pretrained(open_artifact("demo").processor_path, local_files_only=True)


def greedy(pattern: str) -> PreTrainedTokenizerFast:
    """A tokenizer that merges every pair of bytes it may, longest last: a word that a seam cut apart would have other ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: number for number, letter in enumerate(alphabet)}
    merges = []
    for first in "abceXZzosSTtn'Ġ":
        for second in "abceXZzosSTtn'Ġ":
            merges.append((first, second))
            vocabulary.setdefault(first + second, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<|im_end|>"])


TOKENIZERS = {"demo": demo(), **{name: greedy(pattern) for name, pattern in PATTERNS.items()}}


@pytest.mark.parametrize("name", TOKENIZERS)
@given(head=texts, tail=texts, captions=st.lists(texts, max_size=4))
@example(head="say it's eX yo", tail="b c", captions=["\u0301", "'s", "  ", ""])
@example(head="a b", tail=" c d", captions=["\u0301x", "\n"])
@example(head=HEAD, tail=TAIL, captions=["Fine.\n", "it's", "no \n\n", "é\u0301"])
@settings(max_examples=300, deadline=None)
def test_pieces_have_the_ids_of_the_whole(name: str, head: str, tail: str, captions: list[str]) -> None:
    plain = PlainTokenizer(TOKENIZERS[name], keeps_ordinary=False)
    assert plain.can_cut
    found = plain.between(head, captions, tail)
    assert [row.tolist() for row in found] == [plain.ids(f"{head}{caption}{tail}").tolist() for caption in captions]


def test_what_all_captions_stand_in_is_tokenised_once() -> None:
    counted: list[int] = []

    class Counting(PlainTokenizer):
        def batch(self, texts: Any) -> list[Any]:
            counted.append(sum(map(len, texts)))
            return super().batch(texts)

    plain = Counting(TOKENIZERS["demo"], keeps_ordinary=False)
    captions = ["No comment.", "Still waiting.", "Who let him in?"] * 8
    rows = plain.between(HEAD, captions, TAIL)
    assert [row.tolist() for row in rows] == [plain.ids(HEAD + caption + TAIL).tolist() for caption in captions]
    own = len("caption: ") + len("\n\nJudge")  # what stands between the seams next to a caption
    assert counted == [len(HEAD) - len(" caption: ") + len(TAIL) - len("\n\nJudge") + sum(len(caption) + own + 1 for caption in captions)]


def changed(**state: Any) -> PlainTokenizer:
    """The demo's tokenizer with something else in its file."""
    told = json.loads(TOKENIZERS["demo"].backend_tokenizer.to_str())
    for path, value in state.items():
        *parents, last = path.split("__")
        place = told
        for parent in parents:
            place = place[int(parent) if parent.isdecimal() else parent]
        place[last] = value
    return PlainTokenizer(PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(told))), keeps_ordinary=True)


@pytest.mark.parametrize(
    "state",
    [
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Lowercase"}},
        {"model__dropout": 0.5},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
        {"pre_tokenizer__pretokenizers__0__pattern": {"Regex": "\\s+|\\S+"}},
        {"pre_tokenizer__pretokenizers__0__behavior": "MergedWithNext"},
        {"pre_tokenizer__pretokenizers__1__add_prefix_space": True},
        {"pre_tokenizer__pretokenizers__1__use_regex": True},
    ],
)
def test_a_tokenizer_whose_words_are_not_known_is_not_cut(state: dict[str, Any]) -> None:
    plain = changed(**state)
    assert not plain.can_cut
    assert plain._seams("two words ", " and more") == (0, len(" and more"))


@pytest.mark.parametrize("flag", [None, "lstrip", "rstrip", "single_word", "space"])
def test_an_added_token_that_takes_spaces_stops_the_cut(flag: str | None) -> None:
    told = json.loads(TOKENIZERS["demo"].backend_tokenizer.to_str())
    added = {
        **told["added_tokens"][0],
        "id": len(told["model"]["vocab"]) + len(told["added_tokens"]),
        "content": "<think>",
        "special": False,
    }
    added |= {"content": "two words"} if flag == "space" else {} if flag is None else {flag: True}
    told["added_tokens"].append(added)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(told)))
    assert PlainTokenizer(tokenizer, keeps_ordinary=True).can_cut is (flag is None)
    assert PlainTokenizer(tokenizer, keeps_ordinary=False).can_cut  # there it is text like any other


def test_gpt_2s_own_form_is_known() -> None:
    tokenizer = Tokenizer(models.BPE(vocab={letter: n for n, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert PlainTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer), keeps_ordinary=True).can_cut
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    assert not PlainTokenizer(PreTrainedTokenizerFast(tokenizer_object=tokenizer), keeps_ordinary=True).can_cut


def test_ids_are_int64_and_nothing_is_nothing() -> None:
    plain = PlainTokenizer(TOKENIZERS["demo"], keeps_ordinary=False)
    (row,) = plain.between("", [""], "")
    assert row.dtype == np.int64
    assert not len(row)
