"""Scores put back where their captions stood."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from app.client.answers import GroupScores
from app.client.errors import BadAnswer
from app.client.requests import Group, Part


def joined(groups: Sequence[Group], found: Iterable[tuple[Part, GroupScores]]) -> list[GroupScores]:
    """One result a group, whatever parts it was cut into; of no captions, no scores. Raises BadAnswer if a part is missing."""
    whole = [GroupScores((), (), None, ()) for _ in groups]
    for part, each in sorted(found, key=lambda pair: (pair[0].group, pair[0].first)):
        before = whole[part.group]
        if part.first != len(before.scores):
            raise BadAnswer("a part of a group is missing")
        warnings = tuple(dict.fromkeys(before.warnings + each.warnings))
        whole[part.group] = GroupScores(before.scores + each.scores, before.errors + each.errors, each.image_id, warnings)
    if any(len(each.scores) != len(group.captions) for each, group in zip(whole, groups, strict=True)):
        raise BadAnswer("a part of a group is missing")
    return whole


def only_scores(group: GroupScores) -> list[float]:
    """Where none may be missing. Raises BadAnswer."""
    scores = [score for score in group.scores if score is not None]
    if len(scores) != len(group.scores):
        raise BadAnswer("a caption without a score")
    return scores
