"""The plain data everyone speaks, and the two protocols that fakes implement.

Nothing here knows HTTP, torch or transformers; arrays are NumPy and are never written to after construction.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from app.errors import ApiError

Ids = NDArray[np.int64]
Role: TypeAlias = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class RgbImage:
    """A decoded picture at its own size, and the id of the bytes it came from."""

    image_id: str  # "sha256:<hex>" of the encoded bytes
    pixels: NDArray[np.uint8]  # [height, width, 3]

    @property
    def width(self) -> int:
        return int(self.pixels.shape[1])

    @property
    def height(self) -> int:
        return int(self.pixels.shape[0])


@dataclass(frozen=True, slots=True, weakref_slot=True)
class EncodedImage:
    """The pixels the vision tower sees."""

    image_id: str
    patches: NDArray[np.float32]  # [t*h*w, channels * temporal patch * patch * patch]
    grid_thw: tuple[int, int, int]  # patches in time, height, width
    num_tokens: int  # t*h*w / merge^2

    @property
    def num_bytes(self) -> int:
        return self.patches.nbytes


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side of a conversation says."""

    role: Role
    content: str


MAX_TURNS = 64  # of a conversation
Conversation: TypeAlias = tuple[Turn, ...]  # what the captions answer; its last turn is the user's


@dataclass(frozen=True, slots=True)
class Group:
    """What a client asks for: the candidates for one image and one prompt."""

    captions: tuple[str, ...]
    prompt: str | Conversation | None = None  # None: the artifact's default prompt
    image: EncodedImage | None = None  # None: a text-only reward model


@dataclass(frozen=True, slots=True)
class EncodedGroup:
    """A group as token ids. Every row holds the whole chat of one caption; rows of a group share a long prefix."""

    key: tuple[str, bytes]  # (image id, prompt digest): groups of one model with equal keys may share their prefix
    image: EncodedImage | None
    rows: tuple[Ids, ...]  # one [length] array a caption, image placeholders expanded
    num_prefix: int  # leading ids that all rows share with any other caption of this image and prompt
    truncated_prompt: bool = False
    row_prefixes: tuple[int, ...] = ()  # the same for each row by itself, whatever its company; empty: all `num_prefix`
    fresh: bool = False  # compute it whatever is kept from earlier batches, and keep nothing of it
    model: str = ""  # the one that scores it; the model's lane writes it, and nobody else

    @property
    def num_tokens(self) -> int:
        """At most this many tokens are computed when the group runs by itself."""
        return self.num_prefix + sum(len(row) - self.num_prefix for row in self.rows)


@dataclass(frozen=True, slots=True)
class Scores:
    """The scores of one group, in the order of its captions, and what they cost."""

    values: tuple[float, ...]
    num_tokens: int  # tokens of the separate forwards this replaces
    num_computed_tokens: int  # tokens this group added to the batch
    num_cached_tokens: int = 0  # tokens that were not computed because an earlier batch had


@dataclass(frozen=True, slots=True)
class Explanation:
    """What the model sees of a group: the text of the ids themselves, not of the request."""

    chats: list[str]  # one a caption; a run of image tokens is shortened to `<|image_pad|>*n`
    tokens: list[int]
    pooled_index: list[int]
    prefix_tokens: int
    image_tokens: int
    image_grid: list[int] | None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Scorer(Protocol):
    """Scores encoded groups in two steps, so that the host prepares a batch while the device works on the one before.

    `prepare` does what needs no device, and begins copies to it. It is called from one thread, `score` from another; both may raise.
    Scores may be NaN, which the caller refuses. `OutOfMemory` asks the caller for smaller batches, `DeviceBroken` to call no more.
    """

    def prepare(self, groups: Sequence[EncodedGroup]) -> Any: ...

    def score(self, prepared: Any) -> list[Scores]: ...


class GroupEncoder(Protocol):
    """Turns pictures and text into what the scorer takes. Called from several threads at once."""

    @property
    def takes_images(self) -> bool: ...

    def image_tokens(self, width: int, height: int) -> int: ...

    def max_tokens(self, num_image_tokens: int, prompt: str | Conversation | None, captions: Sequence[str]) -> int: ...

    def encode_image(self, image: RgbImage) -> EncodedImage: ...

    def explain(self, pieces: Sequence[EncodedGroup]) -> Explanation: ...

    def encode(self, group: Group) -> tuple[EncodedGroup | None, list[ApiError | None]]: ...


@dataclass(slots=True, eq=False)
class Job:
    """An encoded group that waits for the device, with its future and its deadline (monotonic seconds)."""

    group: EncodedGroup
    future: asyncio.Future[Scores]
    deadline: float
    arrived: float
    started: float = 0.0  # when its batch went to the device
    finished: float = 0.0

    @property
    def num_items(self) -> int:
        return len(self.group.rows)
