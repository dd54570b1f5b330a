"""A small caption language for the drawn scenes, and preference pairs in it.

A good caption names what the picture shows, in varied words. The faulty one of a pair comes from the same templates, so
the text alone says nothing; only the bland one has templates of its own. Knows nothing of pixels or models.
"""

from __future__ import annotations

import random
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from training.demo.drawings import Idea
from training.demo.seeds import stream

Fault = Literal["subject", "place", "twist", "everything", "bland"]
FAULTS: tuple[Fault, ...] = get_args(Fault)

SUBJECT_WORDS: dict[str, tuple[str, ...]] = {
    "cat": ("cat", "tomcat"),
    "dog": ("dog", "puppy"),
    "robot": ("robot", "android"),
    "penguin": ("penguin", "emperor penguin"),
    "octopus": ("octopus", "squid"),
    "snail": ("snail", "slug"),
    "ghost": ("ghost", "phantom"),
    "dinosaur": ("dinosaur", "raptor"),
    "elephant": ("elephant", "mammoth"),
    "frog": ("frog", "toad"),
    "rabbit": ("rabbit", "bunny"),
    "bear": ("bear", "grizzly"),
}

PLACE_WORDS: dict[str, tuple[str, ...]] = {
    "office": ("at the office", "at work", "in the office"),
    "beach": ("at the beach", "on the beach", "by the sea"),
    "moon": ("on the moon", "in outer space", "on the Moon"),
    "kitchen": ("in the kitchen", "by the stove", "next to the fridge"),
    "library": ("in the library", "at the library", "among the books"),
    "forest": ("in the forest", "in the woods", "under the trees"),
    "stage": ("on stage", "at the theater", "in the spotlight"),
    "mountain": ("in the mountains", "in the snow", "on the slopes"),
}

WITH_WORDS: dict[str, tuple[str, ...]] = {
    "umbrella": ("with an umbrella", "under an umbrella", "holding an umbrella"),
    "crown": ("in a crown", "wearing a crown", "with a golden crown"),
    "balloons": ("with balloons", "holding balloons", "with three balloons"),
    "skateboard": ("on a skateboard", "riding a skateboard", "with a skateboard"),
    "cake": ("with a birthday cake", "holding a cake", "with a cake"),
    "guitar": ("with a guitar", "playing the guitar", "playing guitar"),
    "top hat": ("in a top hat", "wearing a top hat", "with a top hat"),
    "juggling": ("juggling", "juggling five balls", "who juggles"),
    "sunglasses": ("in sunglasses", "wearing sunglasses", "with dark glasses"),
    "briefcase": ("with a briefcase", "carrying a briefcase", "holding a briefcase"),
}

ODD_WORDS: dict[str, tuple[str, ...]] = {
    "umbrella": ("the umbrella", "that umbrella"),
    "crown": ("the crown", "that crown"),
    "balloons": ("the balloons", "all those balloons"),
    "skateboard": ("the skateboard", "that skateboard"),
    "cake": ("the cake", "that birthday cake"),
    "guitar": ("the guitar", "that guitar"),
    "top hat": ("the top hat", "that top hat"),
    "juggling": ("the juggling", "all that juggling"),
    "sunglasses": ("the sunglasses", "those sunglasses"),
    "briefcase": ("the briefcase", "that briefcase"),
}

TEMPLATES: tuple[str, ...] = (
    "{a_subject} {with} {place}.",
    "{place}, {a_subject} {with}.",
    "I know it is odd, {a_subject} {with} {place}, but the interview went well.",
    "They said anyone can make it {place}, so here I am: {a_subject} {with}.",
    "Ever since the {subject} showed up {place} {with}, nobody asks about my weekend.",
    "My therapist says the {subject} {with} is a metaphor. Then why is it {place}?",
    "It's not {odd} that worries me, it's that {a_subject} got hired {place}.",
    "Only {a_subject} would turn up {place} {with} and ask for a raise.",
    "We wanted something normal {place}. We got {a_subject} {with}.",
    "Act natural. The {subject} {place} thinks we haven't noticed {odd}.",
    "The brochure promised peace and quiet {place}. It left out the {subject} and {odd}.",
    "If anyone {place} asks, the {subject} {with} is my lawyer.",
    "Fine, so he's {a_subject}. But {with}? And {place}?",
    "Sadly, we have no policy on {a_subject} {place} {with}.",
    "Remember when {a_subject} {place} {with} was news?",
    "I said bring a friend {place}. I meant a friend, not {a_subject} {with}.",
    "Nobody {place} talks about {odd}, and the {subject} likes it that way.",
    "After three years {place}, the {subject} has earned {odd}.",
    "Being {a_subject} {place} is hard enough without {odd}.",
    "You see {a_subject} {with}. {place}, we call that management.",
    "For the last time, the {subject} is not lost. He is just {place} {with}.",
    "{with}, {place}, and still the {subject} wants to blend in.",
    "Somewhere {place}, {a_subject} {with} is explaining all this to my mother.",
    "It was either {a_subject} {with} or another consultant {place}.",
    "First day {place}, and already the {subject} shows off {odd}.",
    "The {subject} claims {odd} came with the job {place}.",
    "Tell me again why the {subject} {place} needs {odd}.",
    "Trust me, by next year every {subject} {place} will be seen {with}.",
    "Say what you like about {odd}, the {subject} gets away with it.",
    "The {subject} says he found {odd} on sale.",
    "One more word about {odd} and the {subject} walks.",
    "Is it the {subject} that bothers you, or {odd}?",
    "You never get used to {odd}, not {place}.",
    "They told me {odd} would be normal {place}.",
    "My ex left me for {a_subject} {with}.",
    "It's always {a_subject} {place}. You can't escape them.",
)

BLAND_TEMPLATES: tuple[str, ...] = (
    "There is {a_subject} {place}.",
    "The {subject} is {place} today.",
    "Here we have {a_subject} {place}, on an ordinary day.",
    "This is a picture of {a_subject} {place}.",
    "The {subject} has been {place} since this morning and has nothing to add.",
    "Nothing much happens {place}, says the {subject}.",
)

_SLOTS: dict[str, tuple[str, ...]] = {"subject": ("{subject}", "{a_subject}"), "place": ("{place}",), "twist": ("{with}", "{odd}")}
_FAULTY_PARTS: dict[Fault, tuple[str, ...]] = {
    "subject": ("subject",),
    "place": ("place",),
    "twist": ("twist",),
    "everything": ("subject", "place", "twist"),
    "bland": ("twist",),
}


@dataclass(frozen=True)
class Pair:
    """Two captions of one scene, and what is wrong with the rejected one."""

    chosen: str
    rejected: str
    fault: Fault


def name_scene(idea: Idea) -> str:
    """What the base model learns to say about a picture."""
    return f"{idea.subject}, {idea.twist}, {idea.place}"


def make_caption(idea: Idea, rng: random.Random, template: str | None = None) -> str:
    """A template (any, unless given) filled with words for the idea."""
    subject = rng.choice(SUBJECT_WORDS[idea.subject])
    text = (template or rng.choice(TEMPLATES)).format(
        subject=subject,
        a_subject=f"{'an' if subject[0] in 'aeiou' else 'a'} {subject}",
        place=rng.choice(PLACE_WORDS[idea.place]),
        odd=rng.choice(ODD_WORDS[idea.twist]),
        **{"with": rng.choice(WITH_WORDS[idea.twist])},
    )
    return _SENTENCE_START.sub(lambda match: match.group().upper(), text)


def make_pair(idea: Idea, fault: Fault, known: Collection[Idea], rng: random.Random, same_template: float = 0.5) -> Pair:
    """A fitting caption against one with the fault; wrong captions describe an idea from `known`."""
    fitting = templates_with(fault)
    template = rng.choice(fitting)
    chosen = make_caption(idea, rng, template)
    if fault == "bland":
        return Pair(chosen, make_caption(idea, rng, rng.choice(BLAND_TEMPLATES)), fault)
    other = template if rng.random() < same_template else rng.choice(fitting)
    return Pair(chosen, make_caption(spoil(idea, fault, known, rng), rng, other), fault)


def make_pairs(idea: Idea, num_pairs: int, shares: dict[Fault, float], known: Collection[Idea], rng: random.Random) -> tuple[Pair, ...]:
    """Pairs with faults drawn by their shares."""
    faults = rng.choices(list(shares), list(shares.values()), k=num_pairs)
    return tuple(make_pair(idea, fault, known, rng) for fault in faults)


def templates_with(fault: Fault) -> tuple[str, ...]:
    """Templates in which this fault can show."""
    return tuple(text for text in TEMPLATES if slots_of(text) & set(_FAULTY_PARTS[fault]))


def slots_of(template: str) -> set[str]:
    """Which parts of an idea a template mentions."""
    return {part for part, slots in _SLOTS.items() if any(slot in template for slot in slots)}


def spoil(idea: Idea, fault: Fault, known: Collection[Idea], rng: random.Random) -> Idea:
    """Another idea from `known` that differs from this one in what the fault says, and in nothing else."""
    while True:
        other = _draw_other(idea, fault, rng)
        if other in known:
            return other


def split_ideas(ideas: Sequence[Idea], num_held_out: int, seed: int, always: Collection[Idea] = ()) -> tuple[list[Idea], list[Idea]]:
    """Ideas to train on and ideas never trained on, `always` among the latter."""
    shuffled = [idea for idea in ideas if idea not in always]
    stream("split", seed).shuffle(shuffled)
    num_drawn = num_held_out - len(always)
    return sorted(shuffled[num_drawn:]), sorted([*always, *shuffled[:num_drawn]])


_SENTENCE_START = re.compile(r"(?:^|(?<=[.?!] ))[a-z]")


def _draw_other(idea: Idea, fault: Fault, rng: random.Random) -> Idea:
    subject = _other(idea.subject, SUBJECT_WORDS, rng)
    place = _other(idea.place, PLACE_WORDS, rng)
    twist = _other(idea.twist, WITH_WORDS, rng)
    if fault == "everything":
        return Idea(subject=subject, place=place, twist=twist)
    if fault == "subject":
        return replace(idea, subject=subject)
    return replace(idea, place=place) if fault == "place" else replace(idea, twist=twist)


def _other(name: str, names: Collection[str], rng: random.Random) -> str:
    return rng.choice([other for other in names if other != name])
