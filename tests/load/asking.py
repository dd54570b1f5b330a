"""Seeded scoring requests of every form, and what is wrong with an answer to one."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from tests.load.truth import DEFAULT_PROMPT, UNSCORABLE, Picture, draw, expected, fingerprint_of
from tests.load.wire import Answer, post

_WORDS = ["the", "a", "cat", "dog", "laughs", "at", "its", "own", "mirror", "again", "while", "nobody", "else", "does", "office", "42"]
_WORDS += ["über", "猫", "🙂", "‽", "naïve", "z̆"]
_PROMPTS = (None, None, DEFAULT_PROMPT, "Describe it.", "Describe it. ", "Who laughs last?")
_BOUNDARY = "oracle-boundary-7d1"


@dataclass(frozen=True, slots=True)
class AskedGroup:
    picture: Picture
    prompt: str | None
    captions: tuple[str, ...]

    def expected(self, model: str) -> list[float | None]:
        return expected(self.picture, self.prompt, self.captions, model)


@dataclass(frozen=True, slots=True)
class Asked:
    """One scoring request. `form`: base64, id, multipart or groups."""

    request_id: str
    form: str
    groups: tuple[AskedGroup, ...]
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def num_items(self) -> int:
        return sum(len(group.captions) for group in self.groups)

    def as_bytes(self) -> bytes:
        if self.form == "multipart":
            return post("/score", f"multipart/form-data; boundary={_BOUNDARY}", self._multipart(), self.request_id)
        return post("/score", "application/json", json.dumps(self._json()).encode(), self.request_id)

    def _json(self) -> dict[str, Any]:
        fields = [_fields(group, by_id=self.form == "id") for group in self.groups]
        if self.form == "groups":
            return {"groups": [{"id": f"g{index}", **own} for index, own in enumerate(fields)], **self.options}
        return {**fields[0], **self.options}

    def _multipart(self) -> bytes:
        group = self.groups[0]
        texts = [("caption", caption) for caption in group.captions] + [(name, str(value)) for name, value in self.options.items()]
        texts += [] if group.prompt is None else [("prompt", group.prompt)]
        parts = [f'Content-Disposition: form-data; name="{name}"\r\n\r\n{text}'.encode() for name, text in texts]
        parts.append(b'Content-Disposition: form-data; name="image"; filename="x"\r\n\r\n' + group.picture.data)
        return b"".join(b"--%s\r\n%s\r\n" % (_BOUNDARY.encode(), part) for part in parts) + f"--{_BOUNDARY}--\r\n".encode()

    def faults(self, answer: Answer, model: str = "") -> list[str]:
        """What is wrong with a 200, one line an item; nothing if it is right to the last bit."""
        data = answer.json()
        given = data["groups"] if self.form == "groups" else [data]
        if (data["request_id"], answer.header("x-request-id")) != (self.request_id, self.request_id):
            return [f"{self.request_id}: answered as {data['request_id']}"] * self.num_items
        if {data["model_fingerprint"], answer.header("x-model-fingerprint")} != {fingerprint_of(model)}:
            return [f"{self.request_id}: signed by another model"] * self.num_items
        if len(given) != len(self.groups):
            return [f"{self.request_id}: {len(given)} groups for {len(self.groups)}"] * self.num_items
        return [fault for index, own in enumerate(zip(self.groups, given, strict=True)) for fault in self._group_faults(index, *own, model)]

    def _group_faults(self, index: int, group: AskedGroup, given: dict[str, Any], model: str) -> list[str]:
        wanted = group.expected(model)
        if len(given["scores"]) != len(wanted) or given["image_id"] != group.picture.image_id:
            return [f"{self.request_id}: group {index} has another shape or picture"] * len(wanted)
        if self.form == "groups" and given["id"] != f"g{index}":
            return [f"{self.request_id}: group {index} is called {given['id']}"] * len(wanted)
        pairs = enumerate(zip(wanted, given["scores"], strict=True))
        return [f"{self.request_id}: caption {place} of group {index}" for place, (want, got) in pairs if want != got]


def _fields(group: AskedGroup, *, by_id: bool) -> dict[str, Any]:
    image = group.picture.image_id if by_id else _base64(group.picture)
    prompt = {} if group.prompt is None else {"prompt": group.prompt}
    return {"image": image, **prompt, "captions": list(group.captions)}


@cache
def _base64(picture: Picture) -> str:
    return base64.b64encode(picture.data).decode()


@dataclass(slots=True)
class Asker:
    """Makes requests from a seed: sizes from 1 to `max_captions`, twins inside and across requests, every form."""

    seed: int = 0
    max_captions: int = 64
    num_pictures: int = 24
    forms: Sequence[str] = ("base64", "id", "multipart", "groups")
    share_unscorable: float = 0.05  # of the requests hold a caption that gets null
    options: dict[str, Any] = field(default_factory=dict)
    random: random.Random = field(init=False)
    pictures: list[Picture] = field(init=False)
    _known: list[str] = field(init=False)
    _number: int = 0

    def __post_init__(self) -> None:
        self.random = random.Random(self.seed)
        self.pictures = [draw(self.seed * 1000 + number) for number in range(self.num_pictures)]
        self._known = [self._fresh_caption() for _ in range(200)]

    def next(self, name: str = "r") -> Asked:
        """The next request; `name` begins its id."""
        self._number += 1
        form = self.random.choice(list(self.forms))
        num_groups = self.random.randint(1, 4) if form == "groups" else 1
        is_odd = self.random.random() < self.share_unscorable
        groups = tuple(self._group(self.random.randint(1, max(1, self.max_captions // num_groups)), is_odd) for _ in range(num_groups))
        return Asked(f"{name}-{self._number}", form, groups, {**self.options, **({"on_item_error": "null"} if is_odd else {})})

    def of(self, captions: Sequence[str], name: str = "r", **options: Any) -> Asked:
        """A request with these very captions."""
        self._number += 1
        group = AskedGroup(self.random.choice(self.pictures), None, tuple(captions))
        return Asked(f"{name}-{self._number}", "base64", (group,), {**self.options, **options})

    def uploads(self) -> list[bytes]:
        """What makes every picture known by its id."""
        return [
            post("/images", "application/octet-stream", each.data, f"up-{index}", method="PUT") for index, each in enumerate(self.pictures)
        ]

    def unique_captions(self, count: int) -> tuple[str, ...]:
        return tuple(self._fresh_caption() for _ in range(count))

    def _group(self, num_captions: int, is_odd: bool) -> AskedGroup:
        captions = [self._caption() for _ in range(num_captions)]
        if is_odd:
            captions[self.random.randrange(num_captions)] += f" {UNSCORABLE}"
        return AskedGroup(self.random.choice(self.pictures), self.random.choice(_PROMPTS), tuple(captions))

    def _caption(self) -> str:
        return self.random.choice(self._known) if self.random.random() < 0.3 else self._fresh_caption()

    def _fresh_caption(self) -> str:
        words = " ".join(self.random.choices(_WORDS, k=self.random.randint(0, 4)))
        return f"{words} {self.random.getrandbits(32):x}"
