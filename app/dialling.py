"""Connections to hosts on the public internet: a name is looked up once, and what is connected to is the address that was looked at."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address
from itertools import zip_longest
from typing import Any

import httpx

from app.errors import UrlNotAllowed

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]  # a host's addresses, as text
Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Connect = Callable[..., Awaitable[Streams]]  # asyncio.open_connection

# Beside what `ipaddress` says, whose tables differ between versions of Python: what stands for another address or for no host of the
# internet, and the address under which one cloud's own services answer everywhere.
_EXCEPT = tuple(
    map(
        IPv6Network,
        ("64:ff9b::/96", "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16", "fec0::/10"),
    )
)
_EXCEPT_4 = tuple(map(IPv4Network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "240.0.0.0/4")))
_MAX_TRIED, _MAX_ADDRESSES = 3, 64  # addresses of a host: that are tried, one after the other; that it may have
_NO_WAY = {errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EACCES}
_NOBODYS = {socket.AF_INET: "192.0.2.1", socket.AF_INET6: "2001:db8::1"}  # bound to only where the kernel lets any address be
READ_BYTES = 16384  # at once, so that nobody's answer keeps the event loop for long


@dataclass(frozen=True, slots=True)
class Origin:
    """Who is asked: a scheme, http or https, a name in lower case, and a port."""

    scheme: str
    host: str
    port: int


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, and none that stands for an address within."""
    found = ip_address(address.partition("%")[0])
    if isinstance(found, IPv6Address):
        if found.ipv4_mapped is not None:
            return is_public(str(found.ipv4_mapped))
        return _is_global(found) and not any(found in network for network in _EXCEPT)
    return _is_global(found) and not any(found in network for network in _EXCEPT_4)


def _is_global(address: IPv4Address | IPv6Address) -> bool:
    return address.is_global and not (address.is_multicast or address.is_reserved or address.is_unspecified)


def is_own(address: str) -> bool:
    """Whether packets to an address would never leave this machine. Sends none."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect((address, 9))
            if probe.getsockname()[0] == address:
                return True
        # A second address of a network is reached from the first one; but nothing else lets a socket be bound to it.
        return _can_bind(family, address) and not _can_bind(family, _NOBODYS[family])
    except OSError as error:
        if error.errno in _NO_WAY:
            return False
        raise  # out of file descriptors, say: then nothing is known


def _can_bind(family: socket.AddressFamily, address: str) -> bool:
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.bind((address, 0))
            return True
    except OSError as error:
        if error.errno in _NO_WAY:
            return False
        raise


def _alternating(addresses: Sequence[str]) -> list[str]:
    """The families by turns, in the order of each: where one of them leads nowhere, the other is tried."""
    first = [address for address in addresses if (":" in address) == (":" in addresses[0])]
    other = [address for address in addresses if address not in first]
    return [address for pair in zip_longest(first, other) for address in pair if address is not None]


class Resolver:
    """The system's. A lookup cannot be stopped, so each name has one at a time, on a thread that nobody waits for at the end."""

    def __init__(
        self, look: Callable[..., Any] = socket.getaddrinfo, start: Callable[[threading.Thread], None] = threading.Thread.start
    ) -> None:
        self._look = look
        self._start = start
        self._asked: dict[tuple[str, int], asyncio.Future[list[str]]] = {}

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        """Raises OSError."""
        key, loop = (host, port), asyncio.get_running_loop()
        asked = self._asked.get(key)
        if asked is None:
            asked = self._asked[key] = loop.create_future()
            try:
                self._start(threading.Thread(target=self._run, args=(loop, key), name="resolve", daemon=True))
            except RuntimeError as error:
                self._end(key, OSError(f"no thread to look the name up on ({error})"))
        return await asyncio.shield(asked)

    def _run(self, loop: asyncio.AbstractEventLoop, key: tuple[str, int]) -> None:
        outcome: list[str] | OSError
        try:
            found = self._look(*key, type=socket.SOCK_STREAM)
            outcome = list(dict.fromkeys(str(each[4][0]) for each in found))
        except Exception as error:  # whatever it is: who asks for this name later must not wait for this lookup
            outcome = OSError(f"the name cannot be looked up ({type(error).__name__})")
        with suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(self._end, key, outcome)

    def _end(self, key: tuple[str, int], outcome: list[str] | OSError) -> None:
        future = self._asked.pop(key)
        if isinstance(outcome, OSError):
            future.set_exception(outcome)
            future.exception()  # looked at: whoever asked may have left
        else:
            future.set_result(outcome)


class Dialler:
    """Opens connections."""

    def __init__(self, find: Resolve | None = None, connect: Connect = asyncio.open_connection) -> None:
        self._find = find or Resolver()
        self._connect = connect

    @cached_property
    def tls(self) -> ssl.SSLContext:
        """Made once: it takes tens of milliseconds. Raises OSError where the certificates that are named cannot be read."""
        context = httpx.create_ssl_context()
        context.set_alpn_protocols(["http/1.1"])
        return context

    async def open(self, origin: Origin, timeout_s: float) -> Streams:
        """A connection to one of the host's addresses, which share the time. The certificate must be the name's.

        Raises UrlNotAllowed if any of them is not public, since it would be chance which one answers; OSError, TimeoutError.
        """
        ends = time.monotonic() + timeout_s
        addresses = await self._find(origin.host, origin.port)
        if not 0 < len(addresses) <= _MAX_ADDRESSES:
            raise OSError(f"the name has {len(addresses)} addresses")
        if not all(is_public(address) and not is_own(address) for address in addresses):
            raise UrlNotAllowed("the host of this address is not on the public internet")
        security: dict[str, Any] = {"ssl": self.tls, "server_hostname": origin.host} if origin.scheme == "https" else {}
        *others, last = _alternating(addresses)[:_MAX_TRIED]
        for number, address in enumerate(others):
            try:
                async with asyncio.timeout((ends - time.monotonic()) / (len(others) + 1 - number)):
                    return await self._connect(address, origin.port, limit=READ_BYTES, **security)
            except OSError:  # TimeoutError too
                continue
        return await self._connect(last, origin.port, limit=READ_BYTES, **security)
