"""What is sent: groups of captions cut to what a server takes at a time, and the JSON of every route."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from app.client.pictures import Picture, Source, read_picture

OnItemError = Literal["fail", "null"]
Prompt = str | Sequence[Mapping[str, str]] | None  # a text; the messages of a conversation, each with role and content; the model's own


@dataclass(frozen=True, slots=True)
class Group:
    """Captions of one picture, or of one conversation. `prompt` None: the model's own."""

    image: Source
    captions: Sequence[str]
    prompt: Prompt = None


@dataclass(frozen=True, slots=True)
class Limits:
    """What a server takes at a time; these are its defaults."""

    groups: int = 16
    captions: int = 256


@dataclass(frozen=True, slots=True)
class Part:
    """Captions of a group that go into one request. `group`, `first`: where they belong."""

    group: int
    first: int
    picture: Picture | None
    captions: tuple[str, ...]
    prompt: Prompt

    @property
    def image_id(self) -> str | None:
        return self.picture.image_id if self.picture else None

    @property
    def size(self) -> tuple[int, str | None]:
        """What an answer to it must have: so many scores, of this picture."""
        return len(self.captions), self.image_id

    def as_json(self) -> dict[str, Any]:
        return (
            {"captions": self.captions}
            | ({"image": self.image_id} if self.picture else {})
            | ({"prompt" if isinstance(self.prompt, str) else "messages": self.prompt} if self.prompt is not None else {})
        )


@dataclass(frozen=True, slots=True)
class Request:
    """One POST, the same for every attempt but for its id and the time it has."""

    route: str
    body: Mapping[str, Any]
    pictures: tuple[Picture, ...]
    request_id: str = field(default_factory=lambda: uuid.uuid4().hex)

    @property
    def image_id(self) -> str | None:
        """That decides which server is asked first."""
        return self.pictures[0].image_id if self.pictures else None

    @property
    def headers(self) -> dict[str, str]:
        return {"X-Request-Id": self.request_id, "Content-Type": "application/json"}

    def as_json(self, left_s: float, fingerprint: str | None, model: str | None = None) -> bytes:
        """The body of an attempt that has this long, to be answered by the model of this fingerprint only; by any where it is None.

        `model`: the name of the one that is asked.

        In ASCII: half a surrogate pair in a caption is for the server to refuse, as that caption's fault.
        """
        options = {"timeout_ms": max(1, int(1000 * left_s)), "expect_fingerprint": fingerprint, "model": model}
        given = {name: value for name, value in options.items() if value is not None}
        return json.dumps({**self.body, **given}).encode("ascii")


def parts_of(groups: Sequence[Group], limits: Limits) -> list[Part]:
    """Every caption in one part. Raises OSError for a picture that cannot be read, TypeError for captions that are no list of texts."""
    return [part for number, group in enumerate(groups) for part in _cut(number, group, limits)]


def _cut(number: int, group: Group, limits: Limits) -> Iterator[Part]:
    captions = checked_texts(group.captions)
    picture = read_picture(group.image)
    for first in range(0, len(captions), limits.captions):
        yield Part(number, first, picture, captions[first : first + limits.captions], checked_prompt(group.prompt))


def checked_prompt(prompt: Prompt) -> Prompt:
    """Raises TypeError for what is neither a text nor messages; what they say is the server's to judge."""
    if prompt is None or isinstance(prompt, str):
        return prompt
    if isinstance(prompt, Mapping) or not all(isinstance(message, Mapping) for message in prompt):
        raise TypeError("a prompt is a text, or a list of messages with role and content")
    return [dict(message) for message in prompt]


def checked_texts(captions: Sequence[str]) -> tuple[str, ...]:
    """Raises TypeError: a text is a sequence of texts, too, and each of its letters would be scored."""
    if isinstance(captions, str | bytes) or not all(isinstance(caption, str) for caption in captions):
        raise TypeError("captions are a list of texts")
    return tuple(captions)


def score_request(parts: Sequence[Part], on_item_error: OnItemError) -> Request:
    groups = [part.as_json() | {"id": str(place)} for place, part in enumerate(parts)]
    pictures = {part.picture.image_id: part.picture for part in parts if part.picture}
    return Request("/score", {"groups": groups, "on_item_error": on_item_error}, tuple(pictures.values()))


def single_request(route: str, part: Part, fields: Mapping[str, Any]) -> Request:
    """Of `/compare` and `/rank`, which take one picture."""
    named = {name: value for name, value in part.as_json().items() if name != "captions"}
    return Request(route, named | dict(fields), (part.picture,) if part.picture else ())
