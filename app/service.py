"""Score groups without HTTP: resolve the image, admit, decode and encode off the event loop, queue, check, answer."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal, TypeVar

import numpy as np

from app.admission import Admission, Reservation
from app.caches import Audit, ByteBoundedCache
from app.contracts import Conversation, EncodedGroup, EncodedImage, Explanation, Group, GroupEncoder, Job
from app.errors import (
    ApiError,
    DeadlineExceeded,
    ImageTooLarge,
    ImageUnknown,
    InvalidRequest,
    ItemRejected,
    Overloaded,
    RequestError,
    TooManyTokens,
    Unavailable,
)
from app.fetching import Fetcher, is_address
from app.images import ImageLimits, decode_image, image_id, probe_image, read_image_field
from app.lanes import Queue
from app.metrics import CLIENT_GONE, Metrics, outcome_of
from app.monitors import RunMonitors
from app.planning import split_group
from app.preference import spread

if TYPE_CHECKING:
    from collections.abc import Iterator

    from app.artifacts import RewardModelConfig

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.25, 2.0  # between two attempts of a request that waits for room
OnItemError = Literal["fail", "null"]
_Done = TypeVar("_Done")


@dataclass(frozen=True, slots=True)
class GroupRequest:
    """One group as a client sent it. `image` is raw bytes, base64, a `data:` URL, a web address or an image id."""

    captions: tuple[str, ...]
    image: bytes | str | None = None
    prompt: str | Conversation | None = None
    field: str = ""  # where it stands in the request, "groups[2]"; names the fault in errors
    caption_fields: tuple[str, ...] = ()  # where each caption stands; empty: in `captions` of the field
    is_part: bool = False  # others of its group were left out, so that it is none that came alone
    fresh: bool = False  # compute it whatever is cached


@dataclass(frozen=True, slots=True)
class GroupResult:
    """One score or one error a caption, in order, and what they cost."""

    scores: tuple[float | None, ...]
    errors: tuple[ApiError | None, ...]
    image_id: str | None
    num_tokens: int
    num_computed_tokens: int
    num_cached_tokens: int
    truncated_prompt: bool
    explanation: Explanation | None = None


@dataclass(slots=True)
class Timing:
    """Seconds spent by stage, for `Server-Timing`."""

    seconds: dict[str, float] = field(default_factory=dict)

    def add(self, stage: str, seconds: float) -> None:
        self.seconds[stage] = max(self.seconds.get(stage, 0.0), seconds)


@dataclass(frozen=True, slots=True)
class StoredImage:
    image_id: str
    width: int
    height: int
    num_tokens: int


@dataclass(frozen=True, slots=True)
class _Prepared:
    """A group ready for the queue."""

    pieces: tuple[EncodedGroup, ...]  # of distinct captions, consecutive; empty when every caption has an error
    places: tuple[int, ...]  # of each caption without an error among the rows of all pieces
    num_repeated_tokens: int  # in rows that are there already
    errors: tuple[ApiError | None, ...]
    image_id: str | None
    explanation: Explanation | None


class ScoringService:
    """The one way from a request to a model's scores; every route, the self-test and the command line go through it."""

    def __init__(
        self,
        *,
        config: RewardModelConfig,
        encoder: GroupEncoder,
        batcher: Queue,
        admission: Admission,
        limits: ImageLimits,
        image_store: ByteBoundedCache[bytes],
        pixel_cache: ByteBoundedCache[EncodedImage],
        pool: Executor,
        max_batch_tokens: int,
        metrics: Metrics,
        monitors: RunMonitors,
        audit_every: int = 0,
        correct: Callable[[EncodedImage, EncodedImage], None] = lambda wrong, right: None,
        model: str = "",
        fetcher: Fetcher | None = None,
    ) -> None:
        """`model`: its name in metrics. `fetcher`: gets images by their addresses; without one they are refused.

        `correct`: called with kept pixels that were wrong and the right ones; whatever was made of the former must go as well.
        """
        self.model = model
        self._config = config
        self._encoder = encoder
        self._batcher = batcher
        self._admission = admission
        self._limits = limits
        self._image_store = image_store
        self._pixel_cache = pixel_cache
        self._pool = pool
        self._max_batch_tokens = max_batch_tokens
        self._metrics = metrics
        self._correct = correct
        self._fetcher = fetcher
        self.monitors = monitors
        self._pixel_audit = Audit("pixels", audit_every, metrics, model)
        self._begin_series()

    async def score(
        self,
        requests: Sequence[GroupRequest],
        *,
        timeout_s: float,
        on_item_error: OnItemError = "fail",
        explain: bool = False,
        timing: Timing | None = None,
        counted: bool = True,
        caller: str = "",
        holds: bool = False,
        run_id: str | None = None,
    ) -> list[GroupResult]:
        """Score every group, in order.

        All or nothing by default: the first caption that cannot be scored raises its ItemRejected. With "null" such a caption
        gets None and its error. Raises ApiError; DeadlineExceeded after `timeout_s` seconds. What is not `counted` is nobody's:
        golden captions are in no count of captions and in no distribution of scores. `caller`: whose share of the queue it takes.
        `holds`: a full queue is waited for until the deadline, for callers that give up after few refusals.
        `run_id`: the training run whose monitors see the scores.
        """
        timing = timing or Timing()

        async def attempt(asked: Sequence[GroupRequest], left_s: float) -> list[GroupResult]:
            return await self._score(asked, left_s, on_item_error, explain, timing, caller)

        work = self._with_images(requests, timeout_s, timing, attempt, caller=caller, holds=holds)
        if not counted:
            return await work
        with self._receiving(sum(len(request.captions) for request in requests)):
            results = await work
            for result in results:
                self._observe(result.scores)
        if run_id is not None:
            for request, result in zip(requests, results, strict=True):
                about = None if request.is_part else (result.image_id, request.prompt)
                self.monitors.observe(run_id, request.captions, result.scores, about, self.model)
        return results

    async def _score(
        self, requests: Sequence[GroupRequest], timeout_s: float, on_item_error: OnItemError, explain: bool, timing: Timing, caller: str
    ) -> list[GroupResult]:
        num_captions = sum(len(request.captions) for request in requests)
        with self._admission.reserve(num_captions, caller) as reservation, _deadline_named():
            deadline = time.monotonic() + timeout_s
            async with asyncio.timeout(timeout_s):
                prepared = await self._prepare_all(requests, reservation, timing, explain)
                if on_item_error == "fail":
                    _raise_first(requests, prepared)
                jobs = await self._run(prepared, deadline)
        self._metrics.tokens.labels(self.model, "requested").inc(sum(group.num_repeated_tokens for group in prepared))
        _note_times(jobs, timing)
        return [_result(group, own) for group, own in zip(prepared, jobs, strict=True)]

    async def _with_images(
        self,
        requests: Sequence[GroupRequest],
        timeout_s: float,
        timing: Timing,
        work: Callable[[Sequence[GroupRequest], float], Awaitable[list[GroupResult]]],
        *,
        caller: str,
        holds: bool,
    ) -> list[GroupResult]:
        """`work(requests, seconds left)` with images in place of their addresses, asked once each, however often the work is tried.

        Before captions take of the queue, which a host that hangs must not fill. Raises what Fetcher.fetch raises, DeadlineExceeded.
        """
        deadline = time.monotonic() + timeout_s
        try_out = self._hold if holds else _once
        wanted = self._addresses(requests)
        if self._fetcher is None or not wanted:
            return await try_out(lambda left_s: work(requests, left_s), timeout_s)
        num_captions = sum(len(request.captions) for request in requests)
        with self._fetcher.holding() as held:

            async def fetch(left_s: float) -> dict[str, bytes]:
                with self._admission.reserve(num_captions, caller):
                    pass  # what would be refused is not fetched first
                async with asyncio.timeout(left_s):
                    return await fetcher.fetch(wanted, held, caller)

            fetcher = self._fetcher
            with _deadline_named(), _measured(self._metrics, timing, "fetch"):
                found = await try_out(fetch, timeout_s)
            asked = [
                replace(request, image=found[request.image]) if isinstance(request.image, str) and request.image in found else request
                for request in requests
            ]
            return await try_out(lambda left_s: work(asked, left_s), max(0.0, deadline - time.monotonic()))

    def _addresses(self, requests: Sequence[GroupRequest]) -> dict[str, str]:
        """Where each web address comes first; none for a model that takes no image."""
        wanted: dict[str, str] = {}
        for request in requests if self.takes_images else ():
            if isinstance(request.image, str) and is_address(request.image):
                wanted.setdefault(request.image, request.field)
        return wanted

    async def _hold(self, attempt: Callable[[float], Awaitable[_Done]], timeout_s: float) -> _Done:
        """Attempts as long as there is no room, ever more seldom, since each may decode and encode; the last refusal is raised."""
        deadline, wait_s = time.monotonic() + timeout_s, _FIRST_WAIT_S
        while True:
            try:
                return await attempt(max(0.0, deadline - time.monotonic()))
            except Overloaded:
                left_s = deadline - time.monotonic()
                if left_s < _FIRST_WAIT_S:
                    raise
                await asyncio.sleep(min(wait_s * random.uniform(0.5, 1.0), left_s / 2))  # noqa: S311 (not all of them at once)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    def count_left_out(self, num_captions: int) -> None:
        """Captions that were received and that nobody will ask scores for."""
        self._metrics.items_received.labels(self.model).inc(num_captions)
        self._metrics.items.labels(self.model, "null").inc(num_captions)

    @contextmanager
    def refusing(self, num_captions: int, model: str | None = None) -> Iterator[None]:
        """For what is looked at before scores are asked for: captions that are refused there were received all the same.

        `model`: whose captions they are, if not this one's.
        """
        label = self.model if model is None else model
        try:
            yield
        except ApiError as error:
            self._metrics.items_received.labels(label).inc(num_captions)
            self._metrics.items.labels(label, outcome_of(error.status)).inc(num_captions)
            raise

    @property
    def takes_images(self) -> bool:
        return self._encoder.takes_images

    async def add_image(self, data: bytes, *, timeout_s: float, caller: str = "") -> StoredImage:
        """Check, keep and prepare an image so that requests can name it by id. It waits for an encode thread like a caption.

        Raises ImageRejected and its kin, Overloaded, DeadlineExceeded after `timeout_s` seconds.
        """
        if not self.takes_images:
            raise InvalidRequest("this model takes no image", field="image")
        with self._naming_refusals(), self._admission.reserve(1, caller), _deadline_named():
            async with asyncio.timeout(timeout_s):
                return await asyncio.get_running_loop().run_in_executor(self._pool, self._add_image, data)

    def _add_image(self, data: bytes) -> StoredImage:
        width, height = probe_image(data, self._limits)
        encoded = self._encode_image(data, image_id(data))
        if not (self._image_store.takes(data) or self._pixel_cache.takes(encoded)):
            raise ImageTooLarge("this server keeps no image of this size; send its bytes with each request", code="image_not_kept")
        return StoredImage(encoded.image_id, width, height, encoded.num_tokens)

    @contextmanager
    def _receiving(self, num_captions: int) -> Iterator[None]:
        """Every caption is counted once: here when its request gets no scores, else with its score.

        Between two turns of the event loop, where metrics are read, received = those with an outcome + active.
        """
        self._metrics.items_received.labels(self.model).inc(num_captions)
        self._metrics.items_active.labels(self.model).inc(num_captions)
        try:
            with self._naming_refusals():
                yield
        except BaseException as error:
            self._metrics.items.labels(self.model, outcome_of(_status(error))).inc(num_captions)
            raise
        finally:
            self._metrics.items_active.labels(self.model).dec(num_captions)

    @contextmanager
    def _naming_refusals(self) -> Iterator[None]:
        try:
            yield
        except Unavailable as error:
            self._metrics.rejected.labels(error.code).inc()
            raise

    async def _run(self, prepared: Sequence[_Prepared], deadline: float) -> list[list[Job]]:
        """Queue every piece and wait for all. Whoever leaves, by error, deadline or cancellation, leaves no job behind."""
        jobs: list[list[Job]] = [[] for _ in prepared]
        try:
            for group, own in zip(prepared, jobs, strict=True):
                own.extend(self._batcher.submit(piece, deadline) for piece in group.pieces)
            await asyncio.gather(*(job.future for own in jobs for job in own))
        finally:
            _abandon(jobs)
        return jobs

    async def _prepare_all(
        self, requests: Sequence[GroupRequest], reservation: Reservation, timing: Timing, explain: bool
    ) -> list[_Prepared]:
        """On the encode threads. Waits for all before it raises the first error, so that nothing goes on behind it."""
        loop, waiting = asyncio.get_running_loop(), dict(enumerate(requests))

        def prepare(number: int) -> _Prepared:
            return self._prepare(waiting.pop(number), reservation, timing, explain)

        try:
            work = [loop.run_in_executor(self._pool, prepare, number) for number in range(len(requests))]
            done = await asyncio.gather(*work, return_exceptions=True)
        finally:
            waiting.clear()  # what nobody waits for any more stands in the threads' queue until its turn, and must hold no pictures
        for outcome in done:
            if isinstance(outcome, BaseException):
                raise outcome
        return [outcome for outcome in done if not isinstance(outcome, BaseException)]

    def _prepare(self, request: GroupRequest, reservation: Reservation, timing: Timing, explain: bool) -> _Prepared:
        """On an encode thread: cost first, then pixels and ids."""
        with _located(request.field):
            self._check_prompt(request.prompt)
            with _measured(self._metrics, timing, "decode"):
                image, bound = self._image(request, reservation)
            with _measured(self._metrics, timing, "encode"):
                group, errors = self._encoder.encode(Group(request.captions, request.prompt, image))
                distinct, places, num_repeated = _distinct(group) if group else (None, (), 0)
                pieces = self._split(replace(distinct, fresh=request.fresh)) if distinct else ()
            reservation.settle(bound, sum(piece.num_tokens for piece in pieces))
            explanation = self._encoder.explain([group]) if explain and group else None
            return _Prepared(pieces, places, num_repeated, tuple(errors), image.image_id if image else None, explanation)

    def _check_prompt(self, prompt: str | Conversation | None) -> None:
        if prompt is not None and self._config.prompt_policy == "fixed" and prompt != self._config.default_prompt:
            raise InvalidRequest("this model was trained with one fixed prompt; leave it out", field="prompt", code="prompt_not_allowed")

    def _image(self, request: GroupRequest, reservation: Reservation) -> tuple[EncodedImage | None, int]:
        """Admit by what the header costs, then decode; a known image is neither decoded nor resized again.

        Returns the image and the tokens that were reserved, an upper bound.
        """
        if (request.image is None) == self.takes_images:
            raise InvalidRequest("this model needs an image" if request.image is None else "this model takes no image", field="image")
        if request.image is None:
            bound = self._encoder.max_tokens(0, request.prompt, request.captions)
            reservation.add_tokens(bound)
            return None, bound
        source = request.image if isinstance(request.image, bytes) else read_image_field(request.image, self._limits)
        name = source if isinstance(source, str) else image_id(source)
        known = self._known_pixels(name, source)
        num_tokens = known.num_tokens if known else self._encoder.image_tokens(*probe_image(self._bytes(source), self._limits))
        bound = self._encoder.max_tokens(num_tokens, request.prompt, request.captions)
        reservation.add_tokens(bound)
        return known or self._encode_image(self._bytes(source), name), bound

    def _known_pixels(self, name: str, source: bytes | str) -> EncodedImage | None:
        """A picture that was decoded before; every so often it is decoded again, where its bytes are at hand, and compared."""
        known = self._pixel_cache.get(name)
        if known is None or not self._pixel_audit.is_due():
            return known
        data = source if isinstance(source, bytes) else self._image_store.get(name)
        if data is None:
            return known
        fresh = self._decoded(data)
        agrees = np.array_equal(known.patches, fresh.patches)
        self._pixel_audit.record(agrees=agrees)
        if not agrees:
            self._correct(known, fresh)
        self._pixel_cache.put(name, fresh)
        return fresh

    def _decoded(self, data: bytes) -> EncodedImage:
        recipe = self._config.image
        return self._encoder.encode_image(decode_image(data, self._limits, exif_transpose=recipe.exif_transpose, alpha=recipe.alpha))

    def _bytes(self, source: bytes | str) -> bytes:
        data = source if isinstance(source, bytes) else self._image_store.get(source)
        if data is None:
            raise ImageUnknown("no image with this id is held; send its bytes")
        return data

    def _encode_image(self, data: bytes, name: str) -> EncodedImage:
        """Decoded and resized once, however many ask at the same time."""
        encoded = self._pixel_cache.get_or_make(name, lambda: self._decoded(data))
        self._image_store.put(name, data)
        return encoded

    def _split(self, group: EncodedGroup) -> tuple[EncodedGroup, ...]:
        try:
            return tuple(split_group(group, self._max_batch_tokens))
        except ValueError as error:
            raise TooManyTokens(str(error)) from None

    def _observe(self, scores: Sequence[float | None]) -> None:
        found = [score for score in scores if score is not None]
        self._metrics.items.labels(self.model, "scored").inc(len(found))
        self._metrics.items.labels(self.model, "null").inc(len(scores) - len(found))
        histogram = self._metrics.scores.labels(self.model)
        for score in found:
            histogram.observe(score)
        self._metrics.score_magnitudes.labels(self.model, "positive").inc(sum(score for score in found if score > 0))
        self._metrics.score_magnitudes.labels(self.model, "negative").inc(-sum(score for score in found if score < 0))
        if len(found) > 1:
            self._metrics.group_stddev.labels(self.model).observe(spread(found))

    def _begin_series(self) -> None:
        """At 0: of a series that begins with its first count nobody can tell that it grew."""
        metrics = self._metrics
        for metric in (metrics.items_received, metrics.items_active, metrics.scores, metrics.group_stddev, metrics.nonfinite):
            metric.labels(self.model)
        for sign in ("positive", "negative"):
            metrics.score_magnitudes.labels(self.model, sign)


async def _once(attempt: Callable[[float], Awaitable[_Done]], timeout_s: float) -> _Done:
    return await attempt(timeout_s)


def _status(error: BaseException) -> int:
    """What the client gets of it; whoever cancels waits no more."""
    if isinstance(error, asyncio.CancelledError):
        return CLIENT_GONE
    return error.status if isinstance(error, ApiError) else ApiError.status


def _distinct(group: EncodedGroup) -> tuple[EncodedGroup, tuple[int, ...], int]:
    """The group with each of its rows once, where in it each row is, and how many tokens are left out.

    Equal captions have one score, in whatever pieces the group is cut.
    """
    firsts: dict[bytes, int] = {}  # of each row that differs, where it comes first
    same_as = [firsts.setdefault(row.tobytes(), index) for index, row in enumerate(group.rows)]
    kept = list(firsts.values())
    place_of = {index: place for place, index in enumerate(kept)}
    rows, own = tuple(group.rows[index] for index in kept), tuple(group.row_prefixes[index] for index in kept if group.row_prefixes)
    places = tuple(place_of[index] for index in same_as)
    return replace(group, rows=rows, row_prefixes=own), places, sum(map(len, group.rows)) - sum(map(len, rows))


def _result(prepared: _Prepared, jobs: Sequence[Job]) -> GroupResult:
    done = [job.future.result() for job in jobs]
    distinct = [value for scores in done for value in scores.values]
    values = iter([distinct[place] for place in prepared.places])
    return GroupResult(
        scores=tuple(next(values) if error is None else None for error in prepared.errors),
        errors=prepared.errors,
        image_id=prepared.image_id,
        num_tokens=prepared.num_repeated_tokens + sum(item.num_tokens for item in done),
        num_computed_tokens=sum(item.num_computed_tokens for item in done),
        num_cached_tokens=sum(item.num_cached_tokens for item in done),
        truncated_prompt=any(piece.truncated_prompt for piece in prepared.pieces),
        explanation=prepared.explanation,
    )


def _raise_first(requests: Sequence[GroupRequest], prepared: Sequence[_Prepared]) -> None:
    for request, group in zip(requests, prepared, strict=True):
        for index, error in enumerate(group.errors):
            if error is not None and request.caption_fields:
                raise ItemRejected(error.message, code=error.code, field=request.caption_fields[index])
            if error is not None:
                where = f"{request.field}.captions[{index}]".lstrip(".")
                raise ItemRejected(error.message, code=error.code, field=where, index=index)


def _abandon(jobs: Sequence[Sequence[Job]]) -> None:
    """Nobody waits for these any more: the planner drops what has not begun; failures of siblings count as seen."""
    for job in (job for group in jobs for job in group):
        if not job.future.cancel() and not job.future.cancelled():
            job.future.exception()


def _note_times(jobs: Sequence[Sequence[Job]], timing: Timing) -> None:
    for job in (job for group in jobs for job in group):
        timing.add("queue", job.started - job.arrived)
        timing.add("forward", job.finished - job.started)


@contextmanager
def _deadline_named() -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise DeadlineExceeded("the deadline passed before the work was done") from None


@contextmanager
def _located(where: str) -> Iterator[None]:
    """Put the group's place before the field an error names; a busy server is no fault of a field."""
    try:
        yield
    except RequestError as error:
        error.field = f"{where}.{error.field}" if where and error.field else error.field or where or None
        raise


@contextmanager
def _measured(metrics: Metrics, timing: Timing, stage: str) -> Iterator[None]:
    began = time.monotonic()
    yield
    seconds = time.monotonic() - began
    metrics.stage_duration.labels(stage).observe(seconds)
    timing.add(stage, seconds)
