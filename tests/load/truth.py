"""What every answer must be, computed from raw bytes: shares no line with the server, its encoder or its fakes."""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image

DEFAULT_PROMPT = "Say something funny."
UNSCORABLE = "cannot be scored"  # a caption with these words is refused as one item
MAX_CAPTION_BYTES = 80
_WORDS = [value.to_bytes(8, "little") for value in range(259)]  # every id as the int64 it is hashed as
_IMAGE_PAD, _PROMPT_END, _CAPTION_END = _WORDS[256:]


@dataclass(frozen=True, slots=True)
class Picture:
    """An encoded picture, its size and its id."""

    data: bytes
    width: int
    height: int
    image_id: str


def draw(seed: int) -> Picture:
    """A small picture, another for each seed."""
    random = np.random.default_rng(seed)
    width, height = int(random.integers(32, 160)), int(random.integers(32, 160))
    blocks = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((width, height))
    stream = io.BytesIO()
    blocks.save(stream, ("PNG", "JPEG", "WEBP")[seed % 3])
    data = stream.getvalue()
    return Picture(data, width, height, "sha256:" + hashlib.sha256(data).hexdigest())


def expected(picture: Picture | None, prompt: str | None, captions: tuple[str, ...], model: str = "") -> list[float | None]:
    """One score a caption, None for one that no model of this kind scores. `model` is the name the server was given."""
    start = hashlib.sha256(model.encode())
    if picture is not None:
        start.update(picture.image_id.encode() + _IMAGE_PAD * (-(-picture.width // 32) * -(-picture.height // 32)))
    start.update(_ids(prompt or DEFAULT_PROMPT) + _PROMPT_END)
    return [_score(start.copy(), caption) for caption in captions]


def _score(digest: hashlib._Hash, caption: str) -> float | None:
    if UNSCORABLE in caption or len(caption.encode()) > MAX_CAPTION_BYTES:
        return None
    digest.update(_ids(caption) + _CAPTION_END)
    return int.from_bytes(digest.digest()[:6], "big") / 2**48


def _ids(text: str) -> bytes:
    return b"".join(map(_WORDS.__getitem__, text.encode()))


@cache
def fingerprint_of(model: str) -> str:
    """What a server of this name signs with."""
    return hashlib.sha256(model.encode()).hexdigest() if model else "f" * 64
