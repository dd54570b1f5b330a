"""What data sets call a picture: a path, bytes, `{"bytes", "path"}`, a PIL image, a data URL, an id, or a list of one of these."""

from __future__ import annotations

import base64
import binascii
import hashlib
from collections.abc import Hashable, Mapping
from typing import Any

from app.client.pictures import Source


def source_of(value: Any) -> Source:
    """What a client takes; None where there is no picture. Raises ValueError."""
    if isinstance(value, Mapping):
        return source_of(_stored(value))
    if isinstance(value, list | tuple):
        if len(value) > 1:
            raise ValueError(f"captions are of one picture, and this row has {len(value)}")
        return source_of(value[0]) if value else None
    if isinstance(value, str):
        return _named(value)
    return bytes(value) if isinstance(value, bytearray | memoryview) else value


def _stored(value: Mapping[str, Any]) -> Any:
    """Of a data set that keeps its pictures encoded."""
    found = value.get("bytes") or value.get("path")
    if found is None:
        raise ValueError("a picture that is a mapping has `bytes` or a `path`")
    return found


def _named(value: str) -> Source:
    if value.startswith(("http://", "https://")):
        raise ValueError("web addresses are not fetched: a picture is a path, its bytes, a PIL image, a data URL or an id")
    if not value.startswith("data:"):
        return value
    head, comma, body = value.partition(",")
    if not comma or not head.endswith(";base64"):
        raise ValueError("a data URL begins with data:image/..;base64,")
    try:
        return base64.b64decode(body, validate=True)
    except binascii.Error as error:
        raise ValueError(f"a data URL that is no base64: {error}") from None


def same(source: Source) -> Hashable:
    """Equal for equal pictures, also where a data set decodes each row anew. Of the rest only what is the same object is the same."""
    if source is None or isinstance(source, str | bytes):
        return source
    mode, pixels = getattr(source, "mode", None), getattr(source, "tobytes", None)
    if mode not in ("L", "RGB", "RGBA") or not callable(pixels):  # others have palettes, too
        return id(source)
    return mode, source.size, hashlib.sha256(pixels()).digest(), repr(source.info)  # type: ignore[union-attr]
