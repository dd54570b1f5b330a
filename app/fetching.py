"""Images by address, from hosts the operator names, each over a connection of its own. Knows HTTP as a client does, no image.

Off unless hosts are named. No redirect is followed, nothing is unpacked, no proxy, no cookie, nothing kept by address.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import h11

from app import __version__
from app.admission import jittered_s
from app.dialling import READ_BYTES, Dialler, Origin
from app.errors import (
    ApiError,
    ImageFetchFailed,
    ImageFetchTimeout,
    ImageRejected,
    ImageTooLarge,
    Overloaded,
    RequestError,
    SettingsInvalid,
    TooManyItems,
    UrlNotAllowed,
)
from app.metrics import Metrics
from app.settings import Settings
from app.turns import Turns

log = logging.getLogger("punchline")
_ADDRESS = re.compile(r"(https?)://([a-z0-9.-]{1,253})(?::([0-9]{1,5}))?([/?][!-\[\]-~]*)?", re.IGNORECASE | re.ASCII)
_MAX_ADDRESS = 8192  # characters
_PORTS = {"http": 80, "https": 443}
_AT_ONCE, _MAX_WAITING = 8, 64  # images of one host, so that one that hangs is waited for by nobody else; those at once among them
_RETRY_S = 2.0
_MAX_HEAD, _HEAD_BYTES = 8192, 2048  # bytes of an answer's head; those read at once, as a head of short lines is slow to parse
_MAX_INTERIM = 2  # answers before the answer
_MIN_CHUNK, _FREE_CHUNKS = 256, 1000  # bytes a chunk on average, beyond the first ones
_REDIRECTS = {301, 302, 303, 307, 308}
_LATER = {408, 425, 429}  # 4xx that say nothing of the address
_ELSEWHERE = "the address is not one that images are fetched from"


def is_address(text: str) -> bool:
    """Whether an image field is meant as a web address."""
    return text[:8].lower().startswith(("http://", "https://"))


@dataclass(frozen=True, slots=True)
class Target:
    """What is asked of whom."""

    origin: Origin
    path: str

    def head(self) -> h11.Request:
        host, port = self.origin.host, self.origin.port
        headers = [
            ("Host", host if port == _PORTS[self.origin.scheme] else f"{host}:{port}"),
            ("Accept", "image/*"),
            ("Accept-Encoding", "identity"),
            ("User-Agent", f"punchline/{__version__}"),
            ("Connection", "close"),
        ]
        return h11.Request(method="GET", target=self.path, headers=headers)


def _no_room() -> Overloaded:
    return Overloaded("the images of other requests fill the room for them", retry_after_s=jittered_s(_RETRY_S))


class Held:
    """What the fetched images of one request take of the room for all of them."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self.num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Raises ImageTooLarge beyond what a body could have brought, Overloaded where there is no room; then none is held any more."""
        if self.num_bytes + num_bytes > self._fetcher.max_request_bytes:
            raise ImageTooLarge(f"the images of one request are larger than {self._fetcher.max_request_bytes} bytes together")
        if self._fetcher.held_bytes + num_bytes > self._fetcher.max_held_bytes:
            self.give_back()
            raise _no_room()
        self.num_bytes += num_bytes
        self._fetcher.held_bytes += num_bytes

    def give_back(self) -> None:
        self._fetcher.held_bytes -= self.num_bytes
        self.num_bytes = 0


def fetcher_of(settings: Settings, metrics: Metrics, dialler: Dialler | None = None) -> Fetcher | None:
    """None where no hosts are named. Raises SettingsInvalid."""
    origins = frozenset(Origin(*each) for each in settings.image_origins)
    if not origins:
        return None
    dialler = dialler or Dialler()
    if any(origin.scheme == "https" for origin in origins):
        try:
            dialler.tls  # noqa: B018 (made now)
        except OSError as error:
            raise SettingsInvalid(f"the certificates for PUNCHLINE_IMAGE_HOSTS cannot be read ({type(error).__name__})") from None
    return Fetcher(
        origins,
        max_bytes=settings.max_image_bytes,
        max_request_bytes=settings.max_body_bytes,
        max_held_bytes=settings.max_pending_body_bytes,
        max_images=settings.max_groups,
        timeout_s=settings.image_fetch_timeout_s,
        metrics=metrics,
        dialler=dialler,
    )


class Fetcher:
    """Gets images, for one event loop."""

    def __init__(
        self,
        origins: frozenset[Origin],
        *,
        max_bytes: int,
        max_request_bytes: int,
        max_held_bytes: int,
        max_images: int,
        timeout_s: float,
        metrics: Metrics,
        dialler: Dialler,
    ) -> None:
        """Limits are of one image, of one request, of all requests together; `timeout_s` is for one image, once it is its turn."""
        self.max_bytes = max_bytes
        self.max_request_bytes = max_request_bytes
        self.max_held_bytes = max_held_bytes
        self.held_bytes = 0
        self._origins = origins
        self._max_images = max_images
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._dialler = dialler
        self._turns: defaultdict[Origin, Turns] = defaultdict(lambda: Turns(_AT_ONCE))
        self._num_waiting: Counter[tuple[Origin, str]] = Counter()  # and being fetched, by caller

    @contextmanager
    def holding(self) -> Iterator[Held]:
        """Room for the images of one request, given back at the end: when nothing refers to them any more."""
        held = Held(self)
        try:
            yield held
        finally:
            held.give_back()

    async def fetch(self, wanted: Mapping[str, str], held: Held, caller: str = "") -> dict[str, bytes]:
        """The bytes behind each address of one request; `wanted` says where each stands, "groups[2]".

        Raises UrlNotAllowed and TooManyItems before anything is asked; ImageTooLarge, ImageRejected (`image_fetch_refused`),
        ImageFetchFailed, ImageFetchTimeout, Overloaded. The first error ends the others. No error holds on to what was fetched.
        """
        found: dict[str, bytes | ApiError] = {}
        targets: dict[str, Target] = {}
        for address, field in wanted.items():
            try:
                targets[address] = self.target(address)
                if len(targets) > self._max_images:
                    raise TooManyItems(f"at most {self._max_images} images of a request are fetched", field="image")
            except RequestError as error:
                found[address] = self._noted(error, field)
                break
        else:
            self._check_room(targets, caller)
            found = await self._all(wanted, targets, held, caller)
        failed = [each for each in found.values() if isinstance(each, ApiError)]
        if failed:
            found.clear()
            held.give_back()
            raise failed.pop(0)
        return {address: each for address, each in found.items() if isinstance(each, bytes)}

    def _check_room(self, targets: Mapping[str, Target], caller: str) -> None:
        """Callers share the places of a host. Who has not used up his share comes in whole, however much he asks for. Raises Overloaded."""
        if self.held_bytes >= self.max_held_bytes:
            raise self._noted(_no_room(), "")
        for origin in {target.origin for target in targets.values()}:
            callers = {name for (host, name), number in self._num_waiting.items() if host == origin and number}
            if self._num_waiting[origin, caller] >= _MAX_WAITING / len(callers | {caller}):
                error = Overloaded("too many images of this host are waited for", retry_after_s=jittered_s(_RETRY_S))
                raise self._noted(error, "")

    def target(self, address: str) -> Target:
        """Raises UrlNotAllowed for any address that is not plainly one of an allowed host."""
        match = _ADDRESS.fullmatch(address.partition("#")[0]) if len(address) <= _MAX_ADDRESS else None
        if match is None:
            raise UrlNotAllowed(_ELSEWHERE)
        scheme, path = match[1].lower(), match[4] or "/"
        origin = Origin(scheme, match[2].lower(), int(match[3]) if match[3] else _PORTS[scheme])
        if origin not in self._origins:
            raise UrlNotAllowed(_ELSEWHERE)
        return Target(origin, path if path[0] == "/" else f"/{path}")

    async def _all(self, wanted: Mapping[str, str], targets: Mapping[str, Target], held: Held, caller: str) -> dict[str, bytes | ApiError]:
        """Until the first error; whoever still runs then, or when the caller leaves, is stopped."""
        found: dict[str, bytes | ApiError] = {}

        async def one(address: str) -> None:
            found[address] = await self._one(targets[address], wanted[address], held, caller)

        tasks = {asyncio.create_task(one(address)) for address in wanted}
        own = Counter((target.origin, caller) for target in targets.values())
        self._num_waiting += own
        try:
            left = tasks
            while left and not any(isinstance(each, ApiError) for each in found.values()):
                _, left = await asyncio.wait(left, return_when=asyncio.FIRST_COMPLETED)
        finally:
            self._num_waiting -= own
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        if unforeseen := [each for each in outcomes if isinstance(each, Exception)]:
            raise unforeseen[0]
        return found

    async def _one(self, target: Target, field: str, held: Held, caller: str) -> bytes | ApiError:
        try:
            async with self._turns[target.origin].of(caller):
                data = await self._in_time(target, held)
        except ApiError as error:
            return self._noted(error, field)
        self._metrics.image_fetches.labels("ok").inc()
        return data

    async def _in_time(self, target: Target, held: Held) -> bytes:
        try:
            async with asyncio.timeout(self._timeout_s):
                reader, writer = await self._dialler.open(target.origin, self._timeout_s)
                try:
                    return await self._ask(reader, writer, target, held)
                finally:
                    writer.transport.abort()
        except ApiError:
            raise
        except TimeoutError:
            raise ImageFetchTimeout(f"the image did not arrive within {self._timeout_s:g} s") from None
        except (OSError, EOFError, h11.ProtocolError) as error:
            error.__traceback__ = None  # the reader keeps its error, whose frames would keep what has arrived
            raise ImageFetchFailed(f"the host of the image cannot be asked ({type(error).__name__})") from None
        except Exception as error:
            log.exception("an image could not be fetched")
            raise ImageFetchFailed(f"the host of the image cannot be asked ({type(error).__name__})") from None

    async def _ask(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: Target, held: Held) -> bytes:
        wire = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MAX_HEAD)
        writer.write((wire.send(target.head()) or b"") + (wire.send(h11.EndOfMessage()) or b""))
        await writer.drain()
        data, num_interim, num_chunks, num_taken, at_once = bytearray(), 0, 0, 0, _HEAD_BYTES
        while True:
            event = wire.next_event()
            if event is h11.NEED_DATA:
                wire.receive_data(await reader.read(at_once))
                await asyncio.sleep(0)  # what has arrived is read without a pause
            elif isinstance(event, h11.InformationalResponse):
                num_interim += 1
            elif isinstance(event, h11.Response):
                num_taken, at_once = self._check(event), READ_BYTES
                held.take(num_taken)  # all of it at once: of two that do not fit together, one should come through
            elif isinstance(event, h11.Data):
                num_chunks += 1
                if len(data) + len(event.data) > self.max_bytes:
                    raise ImageTooLarge(f"the image is larger than {self.max_bytes} bytes")
                data += event.data
                held.take(max(0, len(data) - num_taken))
                num_taken = max(num_taken, len(data))
            elif isinstance(event, h11.EndOfMessage):
                return bytes(data)
            else:
                raise ImageFetchFailed("the host of the image ended the conversation")
            if num_interim > _MAX_INTERIM or num_chunks > _FREE_CHUNKS + len(data) // _MIN_CHUNK:
                raise ImageFetchFailed("the host of the image answers in crumbs")

    def _check(self, response: h11.Response) -> int:
        """How long it says it is, 0 if it comes in chunks. Raises for every answer but a whole one, as it is."""
        status, headers = response.status_code, list(response.headers)
        if status in _REDIRECTS:
            raise UrlNotAllowed("the host of the image sends elsewhere, and redirects are not followed")
        if 400 <= status < 500 and status not in _LATER:
            raise ImageRejected(f"the host of the image answered {status}", code="image_fetch_refused")
        if status != 200:
            raise ImageFetchFailed(f"the host of the image answered {status}")
        if any(name == b"content-encoding" and value.lower() != b"identity" for name, value in headers):
            raise ImageFetchFailed("the host of the image answered in an encoding that was not asked for")
        if not any(name in (b"content-length", b"transfer-encoding") for name, _ in headers):
            raise ImageFetchFailed("the host of the image does not say how long it is")
        announced = max((int(value) for name, value in headers if name == b"content-length"), default=0)
        if announced > self.max_bytes:
            raise ImageTooLarge(f"the image is larger than {self.max_bytes} bytes")
        return announced

    def _noted(self, error: ApiError, field: str) -> ApiError:
        """The error with the group's place before its field, counted, and without the frames it came through, which hold bytes."""
        if isinstance(error, RequestError | ImageFetchFailed):  # a busy server is no fault of a field
            error.field = f"{field}.{error.field}" if field else error.field
        self._metrics.image_fetches.labels(error.code).inc()
        error.__traceback__ = error.__context__ = None
        return error
