"""The pictures of prepared data: checked by their header under the server's limits, then copied. Decodes nothing."""

from __future__ import annotations

import hashlib
from pathlib import Path

from app.errors import RequestError
from app.images import ImageLimits, probe_image

# The server's defaults: what it refuses must not be trained on.
LIMITS = ImageLimits(max_bytes=10 << 20, max_pixels=16_000_000, min_side=16, max_aspect=100, formats=("JPEG", "PNG", "WEBP"))
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


class PictureRejected(Exception):
    """A picture the server would refuse; the text says why."""


class PictureFolder:
    """The `images` folder of an output, made when the first picture arrives."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.num_bytes: dict[str, int] = {}  # by relative path

    def add(self, data: bytes, name: str | None = None) -> str:
        """Keep a picture under a name without suffix, or under its content's; the path relative to the output. Raises PictureRejected."""
        try:
            probe_image(data, LIMITS)
        except RequestError as error:
            raise PictureRejected(error.message) from None
        image = f"images/{name or hashlib.sha256(data).hexdigest()[:32]}{_suffix(data)}"
        if image not in self.num_bytes:
            path = self._root / image
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
            self.num_bytes[image] = len(data)
        return image


def _suffix(data: bytes) -> str:
    """By content: a PNG called .jpg is a PNG."""
    if data.startswith(b"\xff\xd8"):
        return ".jpg"
    return ".png" if data.startswith(b"\x89PNG") else ".webp"
