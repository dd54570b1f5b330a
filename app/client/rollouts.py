"""From a trainer's rows to groups and back: rows with the same picture and prompt are one group. Knows no trainer and no server."""

from __future__ import annotations

import json
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Literal, TypeAlias

from app.client.answers import GroupScores
from app.client.columns import same
from app.client.completions import Completion, Said, read_completion
from app.client.errors import NoCaption
from app.client.pictures import Source
from app.client.requests import Group, OnItemError, Prompt

MAX_CAPTION_BYTES = 8192  # a server's default; one that is longer has its whole request refused

Missing: TypeAlias = 'Literal["whole", "raise", "none"] | float'
Refused: TypeAlias = 'Literal["raise", "none"] | float'


@dataclass(frozen=True, slots=True)
class Rules:
    """What becomes of a completion that cannot be scored as it should. A number is the user's own and stands in for the score.

    `missing`: without a whole tag; "whole" scores all that was said. `refused`: too long for the model, or no text.
    Raises ValueError for anything else.
    """

    missing: Missing = "whole"
    refused: Refused = "raise"

    def __post_init__(self) -> None:
        _check("missing", self.missing, ("whole", "raise", "none"))
        _check("refused", self.refused, ("raise", "none"))

    @property
    def on_item_error(self) -> OnItemError:
        return "fail" if self.refused == "raise" else "null"

    @property
    def may_give_none(self) -> bool:
        return "none" in (self.missing, self.refused)


@dataclass(frozen=True, slots=True)
class Row:
    """One completion, the picture it is about and the prompt for the reward model; None: its own."""

    completion: Completion
    image: Source = None
    prompt: Prompt = None


@dataclass(frozen=True, slots=True)
class Reward:
    """Of one row. `score` None: by a rule that says so, never by a failure."""

    score: float | None
    said: Said


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked for some rows. `places[g][c]`: the row of caption c of group g; `unasked`: what rows get that nobody is asked about."""

    rules: Rules
    said: tuple[Said, ...]
    groups: tuple[Group, ...]
    places: tuple[tuple[int, ...], ...]
    unasked: dict[int, float | None]

    def rewards(self, found: Sequence[GroupScores]) -> list[Reward]:
        """One for every row, in their order; `found` as the groups."""
        scores = dict(self.unasked)
        for places, group in zip(self.places, found, strict=True):
            for place, score in zip(places, group.scores, strict=True):
                scores[place] = _own(self.rules.refused) if score is None else score
        return [Reward(scores[place], said) for place, said in enumerate(self.said)]


def planned(rows: Sequence[Row], rules: Rules) -> Plan:
    """Raises NoCaption if the rules say so, TypeError for what is no completion."""
    said = tuple(read_completion(row.completion) for row in rows)
    unasked = _unasked(said, rules)
    places = _grouped(rows, [place for place in range(len(rows)) if place not in unasked])
    groups = tuple(Group(rows[each[0]].image, tuple(said[place].caption for place in each), rows[each[0]].prompt) for each in places)
    return Plan(rules, said, groups, places, unasked)


def _unasked(said: Sequence[Said], rules: Rules) -> dict[int, float | None]:
    """What rows get whose caption is not sent, by their place."""
    found: dict[int, float | None] = {}
    for place, each in enumerate(said):
        if not each.tagged and rules.missing != "whole":
            found[place] = _without_caption(rules.missing, place)
        elif rules.refused != "raise" and len(each.caption.encode("utf-8", "surrogatepass")) > MAX_CAPTION_BYTES:
            found[place] = _own(rules.refused)
    return found


def _grouped(rows: Sequence[Row], places: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """Places with the same picture and prompt together, in the order in which they come first."""
    known = {id(rows[place].image): rows[place].image for place in places}  # an object that several rows share is looked at once
    keys = {name: same(image) for name, image in known.items()}
    found: dict[Hashable, list[int]] = {}
    for place in places:
        prompt = rows[place].prompt
        said = prompt if prompt is None or isinstance(prompt, str) else json.dumps([prompt], default=str)
        found.setdefault((keys[id(rows[place].image)], type(prompt) is str, said), []).append(place)
    return tuple(map(tuple, found.values()))


def _without_caption(missing: Missing, place: int) -> float | None:
    if missing == "raise":
        raise NoCaption(f"completion {place} has no whole <caption>..</caption>, and the rule for that is to raise")
    return _own(missing)


def _own(rule: Missing | Refused) -> float | None:
    """The user's number, or None for "none"."""
    return None if isinstance(rule, str) else float(rule)


def _check(name: str, rule: object, words: tuple[str, ...]) -> None:
    number = isinstance(rule, int | float) and not isinstance(rule, bool) and isfinite(rule)
    if not number and rule not in words:
        raise ValueError(f"{name} is one of {', '.join(words)}, or a finite number, not {rule!r}")
