"""Where a client that sends no picture of its own may put it: in a label, in metadata, in the prompt's text."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.api.bodies import num_structural, parse_json
from app.api.dialects.asked import placed
from app.api.dialects.chats import picture_in
from app.errors import InvalidJson, InvalidRequest, TooManyItems

WAYS = (
    "this model needs an image: put it in the label or the metadata, as JSON with `image`, `image_url`, `image_b64` or `image_id`, or "
    "`<image:sha256:..>` in the prompt, by an id that PUT /images gave"
)
_KEYS = ("image", "image_url", "image_b64", "image_id")
_HEX = re.compile(r"[0-9a-f]{64}")
_MAX_VALUES = 2000  # of a label in JSON; there may be one with every caption
_STARTS = ("data:", "sha256:")
_BASE64 = re.compile(r"[A-Za-z0-9+/]{64,}={0,2}")
_ADDRESSES = ("http://", "https://")


@dataclass(frozen=True, slots=True)
class Named:
    """What a label says: the picture, and the prompt where the reward model is to see another than its own."""

    image: str | None = None
    prompt: str | None = None


def named_in(places: Sequence[tuple[str, Any]], prompt_text: str) -> Named:
    """The first picture that one of the places (name, value) has, else the one that the prompt's text names.

    Raises RequestError for what is meant as a picture and is none.
    """
    found = [_of(value, name) for name, value in places]
    image = next((each.image for each in found if each.image is not None), None)
    if image is None:
        image = picture_in(prompt_text)
    return Named(image, next((each.prompt for each in found if each.prompt is not None), None))


def needed(image: str | None, where: str, *, takes_images: bool) -> str | None:
    """The picture, if there must be one. Raises InvalidRequest (`image_missing`) that names the ways to send it."""
    if image is None and takes_images:
        raise InvalidRequest(WAYS, field=where, code="image_missing")
    return image


def is_picture(text: str) -> bool:
    """Whether a text that may be a picture is meant as one: an id, a `data:` URL, an address, or base64 of some length."""
    return text.startswith((*_STARTS, *_ADDRESSES)) or _BASE64.fullmatch(text) is not None


def _of(value: Any, where: str) -> Named:
    if isinstance(value, str):
        return _of_text(value.strip(), where)
    if not isinstance(value, dict):
        return Named()
    given = {key: _text(value[key], f"{where}.{key}") for key in _KEYS if value.get(key) is not None}
    if _HEX.fullmatch(given.get("image_id", "")):
        given["image_id"] = "sha256:" + given["image_id"]
    if len(set(given.values())) > 1:
        raise InvalidRequest(f"{' and '.join(given)} name different images", field=where, code="several_images")
    prompt = value.get("prompt")
    return Named(next(iter(given.values()), None), None if prompt is None else _text(prompt, f"{where}.prompt"))


def _of_text(text: str, where: str) -> Named:
    """A label may be the picture itself, or JSON; any other text is the trainer's own affair."""
    if text.startswith(_STARTS):
        return Named(_text(text, where))
    if not text.startswith("{"):
        return Named()
    encoded = text.encode("utf-8", "surrogatepass")
    if num_structural(encoded) > _MAX_VALUES:
        raise TooManyItems(f"a label holds more than {_MAX_VALUES} values", field=where)
    try:
        with placed(where):
            told = parse_json(encoded)
    except InvalidJson:
        return Named()
    return _of(told, where) if isinstance(told, dict) else Named()


def _text(value: Any, where: str) -> str:
    """OpenAI's clients wrap an address as `{"url": ..}`."""
    text = value.get("url") if isinstance(value, dict) else value
    if not isinstance(text, str):
        raise InvalidRequest("an image is base64, a data: URL or an id; a prompt is a text", field=where)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InvalidRequest("the text has lone surrogates", field=where, code="invalid_unicode") from None
    return text
