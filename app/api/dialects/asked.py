"""What every dialect's request comes to, and what its answer is made of. Knows no dialect."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from app.errors import InvalidRequest, RequestError
from app.preference import probability

_NUMBER = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_MAX_NUMBER = 3.4e38  # of a float32


@dataclass(frozen=True, slots=True)
class Item:
    """One caption to score, with what it is a caption of. `where` it stood in the request names it in errors."""

    caption: str | None  # None: not to be told from its prompt, and the request says what it gets
    where: str
    image: str | None = None  # as in our own API: base64, a `data:` URL or an id; None: a text-only model
    prompt: str | None = None  # None: the artifact's own


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of all items, in their order, and what an answer tells beside them."""

    scores: tuple[float, ...]
    num_tokens: int
    model: str
    request_id: str
    created: int  # seconds since 1970

    @property
    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.num_tokens, "total_tokens": self.num_tokens, "completion_tokens": 0}


@dataclass(frozen=True, slots=True)
class Asked:
    """The items of a request, and how its dialect answers them."""

    items: Sequence[Item]
    answer: Callable[[Scored], Any]


@dataclass(frozen=True, slots=True)
class Asking:
    """What a reader is told beside the body. `params`: the dialect's own query parameters."""

    takes_images: bool
    max_captions: int
    params: Mapping[str, str]

    @property
    def refused(self) -> float | None:
        """The client's own number for captions that cannot be scored; None: they fail the request. Raises InvalidRequest."""
        text = self.params.get("refused")
        if text is None:
            return None
        number = float(text) if _NUMBER.fullmatch(text) else math.nan
        if not abs(number) <= _MAX_NUMBER:
            raise InvalidRequest("refused is a number that a float32 holds", field="refused")
        return number


@contextmanager
def placed(where: str) -> Iterator[None]:
    """A fault that names no field is this one's."""
    try:
        yield
    except RequestError as error:
        error.field = error.field or where
        raise


def grouped(items: Sequence[Item], places: Sequence[int]) -> list[list[int]]:
    """The places of items with one image and prompt together, which share their prefix, in the order the groups first come."""
    found: dict[tuple[str | None, str | None], list[int]] = {}
    for place in places:
        found.setdefault((items[place].image, items[place].prompt), []).append(place)
    return list(found.values())


def activated(score: float, *, use: bool) -> float:
    """The raw score, or its sigmoid for clients that want numbers between 0 and 1."""
    return probability(score) if use else score
