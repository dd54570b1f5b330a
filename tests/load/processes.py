"""Oracle servers in processes of their own, and what the machine says of them."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from app.machine import num_processors
from tests.e2e.server import environment
from tests.load.wire import Pool

_ADDRESS = re.compile(rb"http://[\d.]+:(\d+)")
_START_S = 60.0


@dataclass(slots=True)
class Oracle:
    """A running server."""

    process: asyncio.subprocess.Process
    port: int
    folder: Path  # for its temporary files

    def pool(self) -> Pool:
        return Pool(self.port)

    def signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    async def wait(self, timeout_s: float = 90.0) -> int | None:
        """Its exit code; None if it does not leave."""
        try:
            return await asyncio.wait_for(self.process.wait(), timeout_s)
        except TimeoutError:
            return None

    @property
    def resident_bytes(self) -> int:
        pages = int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")

    @property
    def num_files(self) -> int:
        """Open file descriptors, sockets among them."""
        return len(os.listdir(f"/proc/{self.process.pid}/fd"))

    @property
    def num_threads(self) -> int:
        return len(os.listdir(f"/proc/{self.process.pid}/task"))

    @property
    def num_left_files(self) -> int:
        return sum(1 for path in self.folder.rglob("*") if path.is_file())


@asynccontextmanager
async def oracle(*flags: str, core: int | None = None, port: int = 0, **settings: str) -> AsyncIterator[Oracle]:
    """Start one, wait until it listens, kill it afterwards if it still runs. `core`: the one it may run on."""
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as log:
        own = {f"PUNCHLINE_{name.upper()}": value for name, value in settings.items()}
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "tests.load.serve_oracle", *flags,
            stdout=asyncio.subprocess.PIPE,
            stderr=log,
            env={**environment(), "PUNCHLINE_PORT": str(port), "TMPDIR": folder, **own},
        )  # fmt: skip
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        try:
            yield Oracle(process, await _port(process, log), Path(folder))
        finally:
            if process.returncode is None:
                with suppress(ProcessLookupError):
                    process.kill()
            await process.wait()


async def _port(process: asyncio.subprocess.Process, log: IO[bytes]) -> int:
    if process.stdout is None:
        raise RuntimeError("no output to read")
    line = await asyncio.wait_for(process.stdout.readline(), _START_S)
    found = _ADDRESS.search(line)
    if found is None:
        log.seek(0)
        raise RuntimeError(f"the oracle did not start: {log.read()[-2000:].decode()}")
    return int(found[1])


def free_port() -> int:
    """A port nobody listens on now."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        return int(taken.getsockname()[1])


def hardware_line() -> str:
    """What ran, without loading torch."""
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*:\s*(.+)", cpuinfo.read_text()) if cpuinfo.exists() else None
    name = found[1].strip() if found else platform.machine()
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    return f"{name}, {num_processors()} cores, {memory:.0f} GiB, Python {platform.python_version()}; server and load share it, loopback"
