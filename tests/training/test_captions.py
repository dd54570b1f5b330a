"""The caption language: what a caption says, and that the text alone gives nothing away."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Collection

import pytest

from training.demo.captions import (
    BLAND_TEMPLATES,
    FAULTS,
    ODD_WORDS,
    PLACE_WORDS,
    SUBJECT_WORDS,
    TEMPLATES,
    WITH_WORDS,
    Fault,
    Pair,
    make_caption,
    make_pair,
    make_pairs,
    name_scene,
    split_ideas,
    spoil,
    templates_with,
)
from training.demo.drawings import Idea, all_ideas

IDEAS = all_ideas()
TRAIN, HELD_OUT = split_ideas(IDEAS, 120, seed=7)
SHARES: dict[Fault, float] = {"subject": 0.22, "place": 0.22, "twist": 0.22, "everything": 0.22, "bland": 0.12}
WRONG: tuple[Fault, ...] = ("subject", "place", "twist", "everything")


def said(text: str, words: dict[str, tuple[str, ...]]) -> set[str]:
    """Which names of a dictionary a caption uses."""
    return {name for name, ways in words.items() if any(re.search(rf"\b{re.escape(way)}\b", text, re.IGNORECASE) for way in ways)}


def pairs_of(fault: Fault, number: int, ideas: list[Idea] = TRAIN) -> list[tuple[Idea, Pair]]:
    rng = random.Random(1)
    drawn = [rng.choice(ideas) for _ in range(number)]
    return [(idea, make_pair(idea, fault, set(ideas), rng)) for idea in drawn]


def test_the_dictionaries_name_every_idea_and_no_word_twice() -> None:
    for words in (SUBJECT_WORDS, PLACE_WORDS, WITH_WORDS, ODD_WORDS):
        everything = [way.lower() for ways in words.values() for way in set(ways)]
        repeated = [way for way, count in Counter(everything).items() if count > 1]
        assert all(sum(way in {w.lower() for w in ways} for ways in words.values()) == 1 for way in repeated)
    assert {idea.subject for idea in IDEAS} == set(SUBJECT_WORDS)
    assert {idea.place for idea in IDEAS} == set(PLACE_WORDS)
    assert {idea.twist for idea in IDEAS} == set(WITH_WORDS) == set(ODD_WORDS)


@pytest.mark.parametrize("template", [*TEMPLATES, *BLAND_TEMPLATES])
def test_every_template_reads_well(template: str) -> None:
    rng = random.Random(0)
    for idea in rng.sample(IDEAS, 40):
        text = make_caption(idea, rng, template)
        assert "{" not in text
        assert "  " not in text
        assert text[0].isupper()
        assert text[-1] in ".?!"
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]", text, re.IGNORECASE), text
        assert not re.search(r"[.?!] [a-z]", text), text
        assert len(text) <= 130


def test_captions_say_what_the_picture_shows_and_nothing_else() -> None:
    rng = random.Random(2)
    for _ in range(400):
        idea = rng.choice(IDEAS)
        text = make_caption(idea, rng)
        assert said(text, SUBJECT_WORDS) <= {idea.subject}
        assert said(text, PLACE_WORDS) <= {idea.place}
        assert said(text, WITH_WORDS) | said(text, ODD_WORDS) <= {idea.twist}


@pytest.mark.parametrize("fault", FAULTS)
def test_the_rejected_caption_has_its_fault_and_the_chosen_one_has_none(fault: Fault) -> None:
    for idea, pair in pairs_of(fault, 200):
        wrong = {
            "subject": said(pair.rejected, SUBJECT_WORDS) - {idea.subject},
            "place": said(pair.rejected, PLACE_WORDS) - {idea.place},
            "twist": (said(pair.rejected, WITH_WORDS) | said(pair.rejected, ODD_WORDS)) - {idea.twist},
        }
        if fault == "bland":
            assert not any(wrong.values())
            assert not said(pair.rejected, WITH_WORDS) | said(pair.rejected, ODD_WORDS)
            assert said(pair.chosen, WITH_WORDS) | said(pair.chosen, ODD_WORDS) == {idea.twist}
        elif fault == "everything":
            assert any(wrong.values())
        else:
            assert wrong[fault], pair
            assert not any(found for name, found in wrong.items() if name != fault), pair


@pytest.mark.parametrize("fault", WRONG)
def test_length_tells_nothing(fault: Fault) -> None:
    pairs = [pair for _, pair in pairs_of(fault, 3000)]
    longer = sum((len(pair.chosen) > len(pair.rejected)) + 0.5 * (len(pair.chosen) == len(pair.rejected)) for pair in pairs)
    assert abs(longer / len(pairs) - 0.5) < 0.03


@pytest.mark.parametrize("fault", WRONG)
def test_words_tell_nothing(fault: Fault) -> None:
    """The best single word (of those in at least 1 % of the pairs) is no better than luck allows over that many words."""
    pairs = [pair for _, pair in pairs_of(fault, 4000)]
    chosen = Counter(word for pair in pairs for word in set(pair.chosen.split()) - set(pair.rejected.split()))
    rejected = Counter(word for pair in pairs for word in set(pair.rejected.split()) - set(pair.chosen.split()))
    for word in set(chosen) | set(rejected):
        total = chosen[word] + rejected[word]
        if total >= 40:
            assert abs(chosen[word] - rejected[word]) < 4.5 * total**0.5, (word, chosen[word], rejected[word])


def test_wrong_captions_of_training_never_describe_a_held_out_idea() -> None:
    rng = random.Random(3)
    known: Collection[Idea] = set(TRAIN)
    for fault in WRONG:
        for idea in rng.sample(TRAIN, 100):
            other = spoil(idea, fault, known, rng)
            assert other in known
            differs = {name for name in ("subject", "place", "twist") if getattr(other, name) != getattr(idea, name)}
            assert differs == ({"subject", "place", "twist"} if fault == "everything" else {fault})


def test_the_split_is_disjoint_complete_and_repeatable() -> None:
    assert not set(TRAIN) & set(HELD_OUT)
    assert sorted([*TRAIN, *HELD_OUT]) == sorted(IDEAS)
    assert len(HELD_OUT) == 120
    assert split_ideas(IDEAS, 120, seed=7) == (TRAIN, HELD_OUT)
    assert split_ideas(IDEAS, 120, seed=8)[1] != HELD_OUT
    for name in ("subject", "place", "twist"):
        assert {getattr(idea, name) for idea in TRAIN} == {getattr(idea, name) for idea in IDEAS}


def test_named_ideas_are_always_held_out() -> None:
    shown = {TRAIN[0], TRAIN[5], HELD_OUT[0]}
    train, held_out = split_ideas(IDEAS, 120, seed=7, always=shown)
    assert shown <= set(held_out)
    assert not shown & set(train)
    assert len(held_out) == 120


def test_faults_come_in_their_shares() -> None:
    rng = random.Random(4)
    pairs = make_pairs(TRAIN[0], 4000, SHARES, set(TRAIN), rng)
    counts = Counter(pair.fault for pair in pairs)
    assert all(abs(counts[fault] / 4000 - share) < 0.03 for fault, share in SHARES.items())


def test_a_fault_only_uses_templates_it_shows_in() -> None:
    assert all("{place}" in template for template in templates_with("place"))
    assert all("{with}" in template or "{odd}" in template for template in templates_with("twist"))
    assert templates_with("everything") == TEMPLATES


def test_names_are_plain() -> None:
    assert name_scene(Idea("cat", "moon", "top hat")) == "cat, top hat, moon"
