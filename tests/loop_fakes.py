"""What the tests of the loop add to `tests.fakes`: captions that name their own fault, a device and an encoder that can be held."""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from app.admission import Admission
from app.batching import Batcher
from app.contracts import EncodedGroup, EncodedImage, Explanation, Group, Ids, RgbImage, Scorer, Scores
from app.errors import ApiError, OutOfMemory, Unavailable
from app.metrics import Metrics
from tests.fakes import CAPTION_END, FakeEncoder, oracle_score, sample

PATIENCE_S = 20.0  # only a broken test waits so long
RAISE, NAN, INFINITE, SHORT, BUSY = "<raise>", "<nan>", "<inf>", "<short>", "<busy>"  # captions that meet this fault on the device
UNREADY, HUGE = "<unready>", "<huge>"  # cannot be made ready; does not fit into memory with anything else, nor alone


def group_of(key: str, *captions: str, num_prefix: int = 5) -> EncodedGroup:
    """A group whose rows are `num_prefix` ids, the bytes of a caption, and an end: a caption costs its bytes plus one."""
    rows = tuple(np.array([300] * num_prefix + [*caption.encode(), CAPTION_END], dtype=np.int64) for caption in captions)
    image = EncodedImage(key, np.zeros((1, 1), np.float32), (1, 1, 1), 1)
    return EncodedGroup((key, b""), image, rows, num_prefix)


def expected(group: EncodedGroup) -> tuple[float, ...]:
    return tuple(oracle_score(group, row) for row in group.rows)


def caption_of(row: Ids, num_prefix: int) -> str:
    return bytes(row[num_prefix:-1].tolist()).decode()


class FaultyScorer:
    """The oracle, except that a caption which names a fault meets it. Keeps its calls.

    More than `max_rows` captions at a time do not fit into its memory.
    """

    def __init__(self, *, max_rows: int = 1000) -> None:
        self.calls: list[tuple[EncodedGroup, ...]] = []  # on the device
        self.prepared: list[tuple[EncodedGroup, ...]] = []
        self._max_rows = max_rows

    def prepare(self, groups: Sequence[EncodedGroup]) -> tuple[EncodedGroup, ...]:
        self.prepared.append(tuple(groups))
        if UNREADY in captions_of(groups):
            raise ValueError("a caption that cannot be made ready")
        return tuple(groups)

    def score(self, prepared: tuple[EncodedGroup, ...]) -> list[Scores]:
        self.calls.append(prepared)
        self._wait(prepared)
        captions = captions_of(prepared)
        if BUSY in captions:
            raise Unavailable("out of memory", retry_after_s=7)
        if RAISE in captions:
            raise ValueError("a poisoned caption")
        if HUGE in captions or len(captions) > self._max_rows:
            raise OutOfMemory("the device is full")
        return [_scores(group) for group in prepared]

    def _wait(self, groups: Sequence[EncodedGroup]) -> None:
        """The device is never busy."""


def captions_of(groups: Sequence[EncodedGroup]) -> list[str]:
    return [caption_of(row, group.num_prefix) for group in groups for row in group.rows]


def _scores(group: EncodedGroup) -> Scores:
    captions = [caption_of(row, group.num_prefix) for row in group.rows]
    faults = {NAN: float("nan"), INFINITE: float("-inf")}
    values = [faults.get(caption, oracle_score(group, row)) for caption, row in zip(captions, group.rows, strict=True)]
    return Scores(tuple(values[:-1] if SHORT in captions else values), sum(map(len, group.rows)), group.num_tokens)


class GatedScorer(FaultyScorer):
    """Every batch waits on the device until the test lets it go; the halves of a batch that failed run at once.

    Make it on the event loop.
    """

    def __init__(self, *, max_rows: int = 1000) -> None:
        super().__init__(max_rows=max_rows)
        self._loop = asyncio.get_running_loop()
        self._entered: asyncio.Queue[tuple[EncodedGroup, ...]] = asyncio.Queue()
        self._tickets: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._let_go: set[int] = set()  # ids of rows: groups that were cut keep them

    def _wait(self, groups: Sequence[EncodedGroup]) -> None:
        ids = {id(row) for group in groups for row in group.rows}
        if not ids <= self._let_go:
            self._loop.call_soon_threadsafe(self._entered.put_nowait, tuple(groups))
            self._tickets.get(timeout=PATIENCE_S)
            self._let_go |= ids

    @property
    def num_entered(self) -> int:
        """Batches that have come to the device and that no test has looked at."""
        return self._entered.qsize()

    async def entered(self) -> tuple[EncodedGroup, ...]:
        """The next batch that has come to the device."""
        return await asyncio.wait_for(self._entered.get(), PATIENCE_S)

    def let_go(self, num_batches: int = 1) -> None:
        for _ in range(num_batches):
            self._tickets.put(None)


class HeldEncoder(FakeEncoder):
    """Keeps what it was asked, and waits in any method that the test holds."""

    def __init__(self, *, takes_images: bool = True) -> None:
        super().__init__(takes_images=takes_images)
        self.decoded: list[str] = []  # image ids, one an `encode_image`
        self.encoded: list[Group] = []
        self.reached: list[str] = []  # methods, in order
        self.threads: set[str] = set()
        self._holds: dict[str, threading.Event] = {}

    def hold(self, method: str) -> threading.Event:
        """From now on the method waits for this event."""
        return self._holds.setdefault(method, threading.Event())

    def image_tokens(self, width: int, height: int) -> int:
        self._pass("image_tokens")
        return super().image_tokens(width, height)

    def encode_image(self, image: RgbImage) -> EncodedImage:
        self.decoded.append(image.image_id)
        self._pass("encode_image")
        return super().encode_image(image)

    def encode(self, group: Group) -> tuple[EncodedGroup | None, list[ApiError | None]]:
        self.encoded.append(group)
        self._pass("encode")
        return super().encode(group)

    def explain(self, pieces: Sequence[EncodedGroup]) -> Explanation:
        self._pass("explain")
        return super().explain(pieces)

    def _pass(self, method: str) -> None:
        self.reached.append(method)
        self.threads.add(threading.current_thread().name)
        if method in self._holds and not self._holds[method].wait(PATIENCE_S):
            raise RuntimeError(f"nobody released {method}")


@dataclass
class FakeClock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


class Clock(Protocol):
    def __call__(self) -> float: ...


@dataclass
class Bench:
    """A running batcher and what it was built from."""

    batcher: Batcher
    admission: Admission
    metrics: Metrics

    def sample(self, name: str, **labels: str) -> float:
        return sample(self.metrics, name, **labels)

    @property
    def queued(self) -> tuple[float, float]:
        """Captions and tokens admitted and not given back."""
        return self.sample("reward_queue_items"), self.sample("reward_queue_tokens")


@asynccontextmanager
async def batching(
    scorer: Scorer,
    *,
    max_batch_tokens: int = 1000,
    max_items: int = 1000,
    max_tokens: int = 100_000,
    clock: Clock = time.monotonic,
    max_lone_failures: int = 1_000_000,
) -> AsyncIterator[Bench]:
    metrics = Metrics()
    admission = Admission(max_items=max_items, max_tokens=max_tokens, metrics=metrics)
    batcher = Batcher(
        scorer,
        max_batch_tokens=max_batch_tokens,
        admission=admission,
        metrics=metrics,
        clock=clock,
        max_lone_failures=max_lone_failures,
    )
    async with batcher:
        yield Bench(batcher, admission, metrics)


async def until(reached: Callable[[], bool]) -> None:
    """Let threads and tasks run until something is so; fails instead of waiting for ever."""
    async with asyncio.timeout(PATIENCE_S):
        while not reached():  # noqa: ASYNC110 (what threads do sets no event)
            await asyncio.sleep(0.001)


async def turns(count: int = 20) -> None:
    """Let everything that is ready on the event loop run."""
    for _ in range(count):
        await asyncio.sleep(0)
