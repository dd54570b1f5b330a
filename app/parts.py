"""What is distinct in a batch: rows of one image and prompt stand together, each once, and each caption knows where its score will be.

The order is the content's own, so that the same captions give the same bits whichever is named first. Keys are content: SHA-256 of the
image, digest of the prompt, token ids. What was encoded with a picture that turned out to be wrong gets the right one.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, TypeAlias

import numpy as np

from app.contracts import EncodedGroup, EncodedImage, Ids

Key: TypeAlias = tuple[str, bytes]  # (image id, prompt digest)
Places: TypeAlias = tuple[tuple[tuple[int, int], ...], ...]  # for each group, part and row of each caption


@dataclass(frozen=True, slots=True)
class Part:
    """The distinct rows of one image and prompt in a batch."""

    key: str  # of its prefix
    fresh: bool
    image: EncodedImage | None
    prefix_ids: Ids
    rows: tuple[Ids, ...]
    image_key: str
    score_keys: tuple[str, ...]


class _Name(NamedTuple):
    """What rows must have in common to stand together; its order is the batch's."""

    key: Key
    num_prefix: int
    fresh: bool


def parts_of(groups: Sequence[EncodedGroup], *, scope: str, alone: bool) -> tuple[tuple[Part, ...], Places]:
    """The parts of a batch, and the place of every caption of every group in them.

    `scope`: what all keys begin with: of the model, and of what may be known together. `alone`: every row stands behind its own prefix,
    whatever its company; else behind the one that all of its part share. Raises ValueError for rows of one image and prompt that begin
    differently.
    """
    names = _names_alone(groups) if alone else _names_together(groups)
    distinct: dict[_Name, dict[bytes, Ids]] = {}
    image_of: dict[_Name, EncodedImage | None] = {}
    for group, own in zip(groups, names, strict=True):
        for row, name in zip(group.rows, own, strict=True):
            distinct.setdefault(name, {}).setdefault(row.tobytes(), row)
            image_of[name] = group.image
    parts = []
    place: dict[tuple[_Name, bytes], tuple[int, int]] = {}
    for index, name in enumerate(sorted(distinct)):
        contents = sorted(distinct[name])
        place |= {(name, content): (index, row) for row, content in enumerate(contents)}
        parts.append(_part(name, image_of[name], [distinct[name][content] for content in contents], scope, alone=alone))
    places = tuple(
        tuple(place[name, row.tobytes()] for row, name in zip(group.rows, own, strict=True))
        for group, own in zip(groups, names, strict=True)
    )
    return tuple(parts), places


def _part(name: _Name, image: EncodedImage | None, rows: Sequence[Ids], scope: str, *, alone: bool) -> Part:
    image_id, prompt = name.key
    prefix = rows[0][: name.num_prefix]
    if not all(np.array_equal(row[: name.num_prefix], prefix) for row in rows):
        raise ValueError("rows of one image and prompt begin with different ids")
    image_key = f"{scope}:{image_id}"
    key = f"{image_key}:{prompt.hex()}"
    if alone:  # the bits of a row depend on where it leaves its prefix
        key = of_rows = f"{key}:{name.num_prefix}"
    else:
        of_rows = image_key
    return Part(
        key=key,
        fresh=name.fresh,
        image=image,
        prefix_ids=prefix,
        rows=tuple(rows),
        image_key=image_key,
        score_keys=tuple(f"{of_rows}:{hashlib.sha256(row.tobytes()).hexdigest()}" for row in rows),
    )


def _names_together(groups: Sequence[EncodedGroup]) -> list[list[_Name]]:
    """Rows of one image and prompt stand together, behind the prefix that all of them share; those that use nothing kept by themselves."""
    shortest: dict[tuple[Key, bool], int] = {}
    for group in groups:
        same = group.key, group.fresh
        shortest[same] = min(group.num_prefix, shortest.get(same, group.num_prefix))
    return [[_Name(group.key, shortest[group.key, group.fresh], group.fresh)] * len(group.rows) for group in groups]


def _names_alone(groups: Sequence[EncodedGroup]) -> list[list[_Name]]:
    """Every row behind its own prefix, whatever its company."""
    return [[_Name(group.key, own, group.fresh) for own in group.row_prefixes or [group.num_prefix] * len(group.rows)] for group in groups]


class WrongPictures:
    """Those that were found wrong, and what they should have been: a group that waits may have been encoded with one.

    They are told apart by identity, and known as long as anybody has them. Safe across threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pairs: list[tuple[weakref.ref[EncodedImage], EncodedImage]] = []

    def add(self, wrong: EncodedImage, right: EncodedImage) -> None:
        with self._lock:
            self._pairs.append((weakref.ref(wrong), right))

    def corrected(self, groups: Sequence[EncodedGroup]) -> Sequence[EncodedGroup]:
        """The groups, with the right picture where one has a wrong one."""
        with self._lock:
            self._pairs = [pair for pair in self._pairs if pair[0]() is not None]
            pairs = list(self._pairs)
        for wrong, right in pairs:
            groups = [replace(group, image=right) if group.image is not None and group.image is wrong() else group for group in groups]
        return groups
