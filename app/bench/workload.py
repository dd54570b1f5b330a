"""What is measured: drawn cartoons, one prompt, captions of known lengths, as requests and as encoded groups. Knows no clock.

`Source` is what a measurement asks for; `conversations` has the one for text-only models.
"""

from __future__ import annotations

import io
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from PIL import Image, ImageDraw

from app.contracts import EncodedGroup, EncodedImage, Group
from app.encoding import Encoder
from app.errors import InvalidRequest
from app.images import ImageLimits, decode_image

SIZE = (448, 308)  # a New Yorker cartoon at the recipe's long edge: 176 image tokens
PROMPT = (
    "Look at the cartoon and at the caption that is to stand under it for the weekend. A good caption is what an animal in the "
    "image would have said, and it is funny without an explanation. It is hard to get it right."
)
# Words that a tokenizer has whole, the demo's too: a caption of n words is n tokens.
_VOCABULARY = (
    "a an the and about again all always am another anyone are as ask asks at away balloons beach birthday briefcase bunny but by cake "
    "can car cat consultant crown day dinosaur dog elephant emperor enough escape ever every explain for forest fridge friend frog gets "
    "ghost grizzly guitar hard has hat he help here hired holding how if in interview is it juggling just kitchen know last lawyer left "
    "library like lost mammoth meant message metaphor moon more mother mountain natural never new news next no nobody normal not noticed "
    "octopus odd of office on one or out peace penguin phantom playing policy promised puppy quiet rabbit raise raptor robot said says "
    "sea see show since skateboard slug snail snow space spot spotlight squid stage still stove string sun sunglasses talks that them "
    "theater therapist thinks this those three time to toad told tomcat top trees turn umbrella under up used walks wants was way we "
    "wearing week weekend well went what when why will with without woods work would years you"
)
WORDS = tuple(_VOCABULARY.split())


@dataclass(frozen=True, slots=True)
class Request:
    """A group as a client has it."""

    image: bytes | None  # None: for a text-only model
    captions: tuple[str, ...]
    prompt: str = PROMPT


class Source(Protocol):
    """Makes groups that no cache has seen: the same ones for the same seed, others with every call."""

    def request(self, num_captions: int, known: Request | None = None) -> Request:
        """New captions: of a new picture or conversation, or of that of a known request."""

    def encode(self, request: Request) -> EncodedGroup:
        """What the scorer takes. Raises ApiError for what the artifact would refuse."""

    def num_unknown(self, group: EncodedGroup) -> int:
        """Prefix tokens of a new group that a scorer cannot have computed earlier, whatever it kept; at least."""

    @property
    def notes(self) -> tuple[str, ...]:
        """What whoever reads the numbers must know of the groups."""


class Workload:
    """Captions of cartoons. Implements `Source`."""

    notes: tuple[str, ...] = ()

    def __init__(self, encoder: Encoder, limits: ImageLimits, seed: int = 0, size: tuple[int, int] = SIZE) -> None:
        self._encoder = encoder
        self._limits = limits
        self._random = random.Random(seed)  # noqa: S311 (pictures, not secrets)
        self._size = size

    def request(self, num_captions: int, known: Request | None = None) -> Request:
        """New captions for a new picture, or for that of a known request."""
        image = draw_image(self._random.getrandbits(32), self._size) if known is None else known.image
        return Request(image, self.captions(num_captions))

    def captions(self, count: int) -> tuple[str, ...]:
        """Captions of 10, 13, .. 31 words, in turn."""
        return tuple(" ".join(self._random.choices(WORDS, k=10 + 3 * (number % 8))) for number in range(count))

    def encode(self, request: Request) -> EncodedGroup:
        """What the scorer takes. Raises ApiError for what the artifact would refuse."""
        if request.image is None:
            raise InvalidRequest("a cartoon has an image")
        return self.encode_for(self.encode_image(request.image), request.captions, request.prompt)

    def num_unknown(self, group: EncodedGroup) -> int:
        """The picture's tokens; what stands before it is the same in every group."""
        return 0 if group.image is None else group.image.num_tokens

    def encode_image(self, data: bytes) -> EncodedImage:
        recipe = self._encoder.config.image
        rgb = decode_image(data, self._limits, exif_transpose=recipe.exif_transpose, alpha=recipe.alpha)
        return self._encoder.encode_image(rgb)

    def encode_for(self, image: EncodedImage | None, captions: Sequence[str], prompt: str = PROMPT) -> EncodedGroup:
        return encode_whole(self._encoder, Group(tuple(captions), prompt, image))


def encode_whole(encoder: Encoder, asked: Group) -> EncodedGroup:
    """Every caption of it. Raises ApiError for the first that the artifact would refuse."""
    group, errors = encoder.encode(asked)
    fault = next((error for error in errors if error is not None), None)
    if group is None or fault is not None:
        raise fault or InvalidRequest("nothing to score")
    return group


def draw_image(seed: int, size: tuple[int, int] = SIZE) -> bytes:
    """A PNG of shapes and noise, different for every seed."""
    width, height = size
    chance = random.Random(seed)  # noqa: S311
    picture = Image.new("RGB", size, (250, 250, 245))
    canvas = ImageDraw.Draw(picture)
    for _ in range(40):
        x, y, radius = chance.randrange(width), chance.randrange(height), chance.randrange(5, 60)
        colour = (chance.randrange(256), chance.randrange(256), chance.randrange(256))
        draw = chance.choice((canvas.ellipse, canvas.rectangle))
        draw((x - radius, y - radius, x + radius, y + radius), outline=colour, width=3)
    noise = np.random.default_rng(seed).integers(-12, 13, (height, width, 1))
    stream = io.BytesIO()
    Image.fromarray((np.asarray(picture).astype(np.int64) + noise).clip(0, 255).astype(np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def renamed(group: EncodedGroup, tag: str) -> EncodedGroup:
    """The same pixels and ids under a name no cache knows: a scorer must compute it all again."""
    image_id, digest = group.key
    image = None if group.image is None else replace(group.image, image_id=f"{image_id}#{tag}")
    return replace(group, key=(f"{image_id}#{tag}", digest), image=image)


def reopened(group: EncodedGroup, tag: str) -> EncodedGroup:
    """The same under a name no cache knows, its picture under the old one: a prefix to compute again, from features that may be kept."""
    image_id, digest = group.key
    return replace(group, key=(f"{image_id}#{tag}", digest))


def part_of(group: EncodedGroup, start: int, stop: int) -> EncodedGroup:
    """Some of a group's captions."""
    return replace(group, rows=group.rows[start:stop], row_prefixes=group.row_prefixes[start:stop])
