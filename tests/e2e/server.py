"""A real `punchline serve` in a process of its own, on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

ADDRESS = re.compile(r" on (http://\S+)")


@dataclass
class Server:
    url: str
    process: subprocess.Popen[str]

    def stop(self) -> int:
        """SIGTERM; returns the exit code."""
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=60)


@contextmanager
def started(*flags: str, log: IO[str] | None = None) -> Iterator[Server]:
    """Start a server, wait for the line that names its address, stop it afterwards. Its log goes to ours, or to a file."""
    command = [sys.executable, "-m", "app.cli", "serve", "--port", "0", "--num-threads", "1", "--drain-notice-s", "0", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log or sys.stderr, text=True, env=environment())
    try:
        yield Server(_address(process), process)
    finally:
        if process.poll() is None:
            process.kill()
        process.wait(timeout=60)
        if process.stdout:
            process.stdout.close()


def environment() -> dict[str, str]:
    """This process's, without our settings; Python writes its output at once."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PUNCHLINE_")}
    return {**kept, "PYTHONUNBUFFERED": "1"}


def _address(process: subprocess.Popen[str]) -> str:
    if process.stdout is None:
        raise RuntimeError("no output to read")
    for line in process.stdout:
        if match := ADDRESS.search(line):
            return match[1]
    raise RuntimeError(f"the server left with {process.wait()} before it listened")
