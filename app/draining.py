"""uvicorn with our beginning and end: the port, how a server stops so that nothing accepted is lost, and leaves when its device broke.

Knows signals and deadlines; not what is served.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import signal
import socket
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import uvicorn

from app.batching import Batcher
from app.errors import DeviceBroken, SettingsInvalid
from app.machine import give_back, quiet_collector
from app.settings import Settings

log = logging.getLogger("punchline")
_LAST_S = 5  # before the drain ends: what has not come to the device is told to go elsewhere
_TIDY_S = 30.0  # between two collections of old cycles
_MAX_TIDYING = 0.001  # of the time
_FLUSH_S = 2  # for answers that are written already to leave


class DrainingServer(uvicorn.Server):
    """Stops in steps, and leaves the exit code to its caller.

    SIGTERM: not ready at once; for `notice_s` everything is still taken and answered, each with `Connection: close`, because
    load balancers and clients learn late; then the port closes, and for `drain_s` what was accepted is answered. Shortly before
    their end what has not come to the device is refused with 503, at their end what is left. SIGINT: the same without the notice.
    A second signal ends the notice and refuses what waits; what runs is finished.

    uvicorn's own handlers raise the signal again after the drain, which would kill the process before its batches are done.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        batcher: Batcher,
        *,
        notice_s: float,
        drain_s: float,
        begin: Callable[[], None],
        announce: Callable[[socket.socket], None],
        prove: Callable[[socket.socket], Awaitable[None]] | None = None,
    ) -> None:
        """`announce` is told the socket once the server answers and signals are minded, `begin` that it is to stop.

        `prove` looks before that whether the answers are right; what it raises ends `serve`, and the port with it.
        """
        config.timeout_graceful_shutdown = math.ceil(drain_s + _FLUSH_S)
        super().__init__(config)
        self._batcher = batcher
        self._notice_s = notice_s
        self._drain_s = drain_s
        self._begin = begin
        self._announce = announce
        self._prove = prove
        self._is_told = False
        self._timers: list[asyncio.TimerHandle] = []
        self._undo: Callable[[], None] = lambda: None  # of what was changed in this process
        self.fault: DeviceBroken | None = None  # why it left by itself

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if not (self.started and sockets):
            return
        if self._prove is not None:
            await self._prove(sockets[0])
        self._undo = quiet_collector()
        self._announce(sockets[0])

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        tasks = [asyncio.create_task(self._leave_when_broken()), asyncio.create_task(tidy_seldom(_TIDY_S))]
        try:
            await super().serve(sockets)
        finally:
            self._batcher.refuse_all()  # what was accepted is answered; what nobody waits for must not hold up the end
            self._undo()
            for task in tasks:
                task.cancel()
            for timer in self._timers:
                timer.cancel()

    async def _leave_when_broken(self) -> None:
        self.fault = await self._batcher.broken()
        self.config.timeout_graceful_shutdown = _FLUSH_S
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        loop.add_signal_handler(signal.SIGHUP, log.warning, "SIGHUP: nothing is reloaded; restart to change the model or the settings")
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                loop.remove_signal_handler(number)

    def _stop(self, number: signal.Signals) -> None:
        if self._is_told:
            log.info("%s again: what waits is refused, what runs is finished", number.name)
            self._close()
            self._batcher.refuse_waiting()
            return
        notice_s = self._notice_s if number == signal.SIGTERM else 0
        log.info("%s: not ready any more; the port closes in %g s, after that what was accepted is answered", number.name, notice_s)
        self._is_told = True
        self._begin()
        self._later(notice_s, self._close)

    def _close(self) -> None:
        """Close the port, and answer what was accepted within `drain_s`."""
        if self.should_exit:
            return
        self.should_exit = True
        self._later(max(self._drain_s - _LAST_S, self._drain_s / 2), self._batcher.refuse_waiting)
        self._later(self._drain_s, self._batcher.refuse_all)

    def _later(self, seconds: float, call: Callable[[], None]) -> None:
        self._timers.append(asyncio.get_running_loop().call_later(seconds, call))


def tidy() -> None:
    """Free cycles that have become old, and give back what is free."""
    gc.collect()
    give_back()


async def tidy_seldom(
    seconds: float,
    work: Callable[[], object] = tidy,
    clock: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
) -> None:
    """Until cancelled. Nobody is served meanwhile: tenths of a second with a thousand connections, so that the next time comes after
    `seconds`, or after a thousand times what the last took.
    """
    pause_s = seconds
    while True:
        await sleep(pause_s)
        began = clock()
        work()
        pause_s = max(seconds, (clock() - began) / _MAX_TIDYING)


def bind(settings: Settings) -> socket.socket:
    """Take the port before minutes of loading; nothing is accepted until the model is ready."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)  # asyncio sets TCP_NODELAY only where TCP is named
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        raise SettingsInvalid(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from None
    return listener
