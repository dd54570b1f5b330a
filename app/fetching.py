"""Pictures by address: from hosts the operator names, over public addresses only, each connection to the address that was checked.

Off unless hosts are named. No redirect is followed, nothing is unpacked, no proxy, no cookie. Knows HTTP as a client does, no picture.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from types import TracebackType
from typing import Any, Self

import httpcore

from app import __version__
from app.errors import (
    ApiError,
    ImageFetchFailed,
    ImageFetchTimeout,
    ImageRejected,
    ImageTooLarge,
    Overloaded,
    RequestError,
    TooManyItems,
    UrlNotAllowed,
)
from app.metrics import Metrics
from app.settings import Settings

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]  # a host's addresses, as text

_ADDRESS = re.compile(r"(https?)://([a-z0-9.-]{1,253})(?::([0-9]{1,5}))?([/?][!-\[\]-~]*)?", re.IGNORECASE)
_MAX_ADDRESS = 2048  # characters
_PORTS = {"http": 80, "https": 443}
_EMBEDDING = (IPv6Network("64:ff9b::/96"), IPv6Network("64:ff9b:1::/48"), IPv6Network("2002::/16"), IPv6Network("2001::/32"))
_MAX_TRIED = 3  # addresses of a host, one after the other
_AT_ONCE, _OF_ONE_REQUEST = 16, 4  # connections
_IDLE_S = 20.0
_HEADERS = [("Accept", "image/*"), ("Accept-Encoding", "identity"), ("User-Agent", f"punchline/{__version__}")]
_ELSEWHERE = "the address is not one that images are fetched from"


def is_address(text: str) -> bool:
    """Whether an image field is meant as a web address."""
    return text[:8].lower().startswith(("http://", "https://"))


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, and none that stands for an address within."""
    found = ip_address(address.partition("%")[0])
    if isinstance(found, IPv6Address):
        if found.ipv4_mapped is not None:
            return _is_global(found.ipv4_mapped)
        if any(found in network for network in _EMBEDDING):
            return False
    return _is_global(found)


def _is_global(address: IPv4Address | IPv6Address) -> bool:
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def is_own(address: str) -> bool:
    """Whether packets to an address would never leave this machine. Sends none."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            return bool(probe.getsockname()[0] == address)
    except OSError:
        return False  # no way there at all


async def resolve(host: str, port: int) -> Sequence[str]:
    """By the system's resolver. Raises OSError."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(each[4][0]) for each in found))


class PublicNetwork(httpcore.AsyncNetworkBackend):
    """Connects to a host by an address that was looked at: what the name stands for a moment later does not matter."""

    def __init__(self, inner: httpcore.AsyncNetworkBackend | None = None, find: Resolve = resolve) -> None:
        self._inner = inner or httpcore.AnyIOBackend()
        self._find = find

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,  # noqa: ASYNC109 (httpcore's)
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Raises UrlNotAllowed if the host has any address that is not public: it would be chance which one answers."""
        addresses = await self._find(host, port)
        if not addresses or not all(is_public(address) and not is_own(address) for address in addresses):
            raise UrlNotAllowed("the host of this address is not on the public internet")
        *others, last = addresses[:_MAX_TRIED]
        for address in others:
            with suppress(httpcore.ConnectError, httpcore.ConnectTimeout):
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
        return await self._inner.connect_tcp(last, port, timeout, local_address, socket_options)

    async def connect_unix_socket(self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None) -> Any:  # noqa: ASYNC109
        raise UrlNotAllowed(_ELSEWHERE)

    async def sleep(self, seconds: float) -> None:
        await self._inner.sleep(seconds)


class Held:
    """What the fetched pictures of one request take of the room for all of them."""

    def __init__(self, fetcher: Fetcher) -> None:
        self._fetcher = fetcher
        self.num_bytes = 0

    def take(self, num_bytes: int) -> None:
        """Raises ImageTooLarge beyond what a body could have brought, Overloaded where there is no room."""
        self.num_bytes += num_bytes
        self._fetcher.held_bytes += num_bytes
        if self.num_bytes > self._fetcher.max_request_bytes:
            raise ImageTooLarge(f"the images of one request are larger than {self._fetcher.max_request_bytes} bytes together")
        if self._fetcher.held_bytes > self._fetcher.max_held_bytes:
            raise Overloaded("the images of other requests fill the room for them")

    def give_back(self) -> None:
        self._fetcher.held_bytes -= self.num_bytes
        self.num_bytes = 0


def fetcher_of(settings: Settings, metrics: Metrics, network: httpcore.AsyncNetworkBackend | None = None) -> Fetcher | None:
    """None where no hosts are named."""
    if not settings.image_origins:
        return None
    return Fetcher(
        settings.image_origins,
        max_bytes=settings.max_image_bytes,
        max_request_bytes=settings.max_body_bytes,
        max_held_bytes=settings.max_pending_body_bytes,
        max_pictures=settings.max_groups,
        timeout_s=settings.image_fetch_timeout_s,
        metrics=metrics,
        network=network,
    )


class Fetcher:
    """Gets pictures for one event loop. An async context manager, which closes its connections."""

    def __init__(
        self,
        origins: frozenset[str],
        *,
        max_bytes: int,
        max_request_bytes: int,
        max_held_bytes: int,
        max_pictures: int,
        timeout_s: float,
        metrics: Metrics,
        network: httpcore.AsyncNetworkBackend | None = None,
    ) -> None:
        """`origins`: `https://host:port`, lower-case. Limits are of one picture, of one request, of all requests together."""
        self.origins = origins
        self.max_bytes = max_bytes
        self.max_request_bytes = max_request_bytes
        self.max_held_bytes = max_held_bytes
        self.max_pictures = max_pictures
        self.held_bytes = 0
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._at_once = asyncio.Semaphore(_AT_ONCE)
        self._pool = httpcore.AsyncConnectionPool(
            max_connections=_AT_ONCE,
            max_keepalive_connections=_AT_ONCE,
            keepalive_expiry=_IDLE_S,
            network_backend=network or PublicNetwork(),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self._pool.aclose()

    @contextmanager
    def holding(self) -> Iterator[Held]:
        """Room for the pictures of one request, given back at the end."""
        held = Held(self)
        try:
            yield held
        finally:
            held.give_back()

    async def fetch(self, wanted: Mapping[str, str], held: Held) -> dict[str, bytes]:
        """The bytes behind each address of one request; `wanted` says where each stands, "groups[2]".

        Raises UrlNotAllowed, TooManyItems before anything is asked; ImageTooLarge, ImageRejected (`image_fetch_refused`),
        ImageFetchFailed, ImageFetchTimeout, Overloaded. The first error ends the others.
        """
        for address, field in wanted.items():
            with self._noted(field):
                self.checked(address)
        if len(wanted) > self.max_pictures:
            raise TooManyItems(f"at most {self.max_pictures} images of a request are fetched", field="image")
        turns = asyncio.Semaphore(_OF_ONE_REQUEST)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {address: group.create_task(self._one(address, field, held, turns)) for address, field in wanted.items()}
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return {address: task.result() for address, task in tasks.items()}

    def checked(self, address: str) -> str:
        """The address as it is asked for. Raises UrlNotAllowed for any that is not plainly one of an allowed host."""
        match = _ADDRESS.fullmatch(address.partition("#")[0]) if len(address) <= _MAX_ADDRESS else None
        if match is None:
            raise UrlNotAllowed(_ELSEWHERE)
        scheme, host, port, target = match[1].lower(), match[2].lower(), match[3], match[4] or "/"
        if f"{scheme}://{host}:{int(port) if port else _PORTS[scheme]}" not in self.origins:
            raise UrlNotAllowed(_ELSEWHERE)
        return f"{scheme}://{host}{f':{int(port)}' if port else ''}{target if target[0] == '/' else '/' + target}"

    async def _one(self, address: str, field: str, held: Held, turns: asyncio.Semaphore) -> bytes:
        async with turns, self._at_once:
            with self._noted(field):
                try:
                    async with asyncio.timeout(self._timeout_s):
                        data = await self._get(self.checked(address), held)
                except (TimeoutError, httpcore.TimeoutException):
                    raise ImageFetchTimeout(f"the image did not arrive within {self._timeout_s:g} s") from None
                except (OSError, httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol) as error:
                    raise ImageFetchFailed(f"the host of the image cannot be asked ({type(error).__name__})") from None
                self._metrics.image_fetches.labels("ok").inc()
                return data

    async def _get(self, address: str, held: Held) -> bytes:
        limits = dict.fromkeys(("connect", "read", "write", "pool"), self._timeout_s)
        async with self._pool.stream("GET", address, headers=_HEADERS, extensions={"timeout": limits}) as response:
            self._check(response)
            data = bytearray()
            async for chunk in response.aiter_stream():
                if len(data) + len(chunk) > self.max_bytes:
                    raise ImageTooLarge(f"the image is larger than {self.max_bytes} bytes")
                held.take(len(chunk))
                data += chunk
            return bytes(data)

    def _check(self, response: httpcore.Response) -> None:
        """Raises for every answer but a whole one, as it is."""
        headers = {name.lower(): value for name, value in response.headers}
        if 300 <= response.status < 400:
            raise UrlNotAllowed("the host of the image sends elsewhere, and redirects are not followed")
        if 400 <= response.status < 500:
            raise ImageRejected(f"the host of the image answered {response.status}", code="image_fetch_refused")
        if response.status != 200:
            raise ImageFetchFailed(f"the host of the image answered {response.status}")
        if headers.get(b"content-encoding", b"identity").lower() != b"identity":
            raise ImageFetchFailed("the host of the image answered in an encoding that was not asked for")
        if int(headers.get(b"content-length", b"0")) > self.max_bytes:
            raise ImageTooLarge(f"the image is larger than {self.max_bytes} bytes")

    @contextmanager
    def _noted(self, field: str) -> Iterator[None]:
        """Put the group's place before the field of an error, and count it."""
        try:
            yield
        except ApiError as error:
            if isinstance(error, RequestError | ImageFetchFailed):  # a busy server is no fault of a field
                error.field = f"{field}.{error.field}" if field else error.field
            self._metrics.image_fetches.labels(error.code).inc()
            raise
