"""A real `punchline serve` on one port, that can be killed and started again."""

from __future__ import annotations

import socket
from contextlib import ExitStack
from typing import IO, Self

from tests.e2e.server import Server, started


class Restarted:
    """The same address all the time. `num_kills` counts."""

    def __init__(self, *flags: str, log: IO[str] | None = None) -> None:
        self._flags = (*flags, "--port", str(_free_port()))
        self._log = log
        self._running = ExitStack()
        self._server: Server | None = None
        self.num_kills = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._flags[-1]}"

    def start(self) -> None:
        """Returns when it listens."""
        self._server = self._running.enter_context(started(*self._flags, log=self._log))

    def kill(self) -> None:
        """SIGKILL: nothing is answered, nothing is closed in order."""
        if self._server is not None:
            self._server.process.kill()
            self.num_kills += 1
        self._running.close()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()


def _free_port() -> int:
    """Below those that the system gives to connections, so that it is still free when the server comes back."""
    for port in range(18000, 19000):
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as tried:
            tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if tried.connect_ex(("127.0.0.1", port)) != 0:
                return port
    raise RuntimeError("no port is free")
