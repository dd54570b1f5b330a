"""Captions that came one a request, put together again as the groups they were sampled in. Knows digests and numbers, no captions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(slots=True)
class Group:
    """The scored captions about one picture and prompt; at least one. `digests`: of their texts."""

    digests: list[int]
    lengths: list[int]
    scores: list[float]
    began_s: float
    ended_s: float

    def add(self, other: Group) -> None:
        self.digests += other.digests
        self.lengths += other.lengths
        self.scores += other.scores
        self.ended_s = max(self.ended_s, other.ended_s)

    def num_twins(self) -> int:
        """Captions whose text another one has as well."""
        if len(set(self.digests)) == len(self.digests):
            return 0
        return len(self.digests) - sum([count == 1 for count in Counter(self.digests).values()])


class OpenGroups:
    """Groups that captions may still join, the one begun first at the front.

    One is whole when it has `max_captions`, when `open_s` have passed since its first, or when more than `max_open` are open.
    Nobody says how large a group is to be: a picture that comes back within that time joins its old group.
    """

    def __init__(self, *, max_captions: int = 64, max_open: int = 128, open_s: float = 60.0) -> None:
        self._max_captions = max_captions
        self._max_open = max_open
        self._open_s = open_s
        self._groups: dict[int, Group] = {}

    def join(self, about: int, group: Group) -> list[Group]:
        """Adds to the open group about the same, or opens it. Returns the group that became whole, if one did."""
        known = self._groups.get(about)
        if known is None:
            self._groups[about] = known = group
        else:
            known.add(group)
        if len(known.scores) >= self._max_captions:
            return [self._groups.pop(about)]
        return [self._groups.pop(next(iter(self._groups)))] if len(self._groups) > self._max_open else []

    def due(self, now_s: float) -> list[Group]:
        """Takes out those whose time has passed."""
        over = []
        for about, group in self._groups.items():
            if now_s - group.began_s < self._open_s:
                break
            over.append(about)
        return [self._groups.pop(about) for about in over]

    def __iter__(self) -> Iterator[Group]:
        return iter(self._groups.values())

    def __len__(self) -> int:
        return len(self._groups)
