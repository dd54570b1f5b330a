"""What stands for a picture: a path, bytes, a PIL image, or the id of bytes that a server was sent before."""

from __future__ import annotations

import hashlib
import io
import os
import re
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

_ID = re.compile(r"sha256:[0-9a-f]{64}")


class Saveable(Protocol):
    """A PIL image, as far as this package needs to know one."""

    def save(self, fp: Any, format: str) -> None: ...  # noqa: A002 (PIL's name)


Source: TypeAlias = "str | os.PathLike[str] | bytes | Saveable | None"


@dataclass(frozen=True, slots=True)
class Picture:
    """Content and its name. Without bytes only a server that has them can score it."""

    image_id: str
    data: bytes | None


def read_picture(source: Source) -> Picture | None:
    """None for None, which stands for no picture. A PIL image is sent as PNG, which loses nothing.

    Raises OSError for a file that cannot be read, TypeError for anything else than what is named above.
    """
    if source is None:
        return None
    if isinstance(source, str) and _ID.fullmatch(source):
        return Picture(source, None)
    if isinstance(source, str | os.PathLike):
        with open(source, "rb") as file:
            return _of(file.read())
    if isinstance(source, bytes | bytearray | memoryview):
        return _of(bytes(source))
    if callable(getattr(source, "save", None)):
        stream = io.BytesIO()
        source.save(stream, "PNG")
        return _of(stream.getvalue())
    raise TypeError(f"a picture is a path, bytes, a PIL image or an id `sha256:..`, not {type(source).__name__}")


def _of(data: bytes) -> Picture:
    return Picture("sha256:" + hashlib.sha256(data).hexdigest(), data)
