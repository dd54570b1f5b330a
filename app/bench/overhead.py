"""What HTTP, queue and encoding add to the scorer: 8 captions of a known image through the server and through its scorer, in turn.

The client is a process of its own (`caller`); the scorer is called here, while the client waits. Measured on the smallest model at
hand: on a large one the noise of the forward is longer than what is looked for.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np
import torch

from app.bench import caller
from app.bench.loopback import Client, Loopback, checked, json_body, scores_of
from app.bench.ways import timed
from app.bench.workload import Workload
from app.contracts import EncodedGroup, Scorer, Scores
from app.errors import ScoringFailed

NUM_CAPTIONS = 8
_WARM_UP = 20
_END_S = 2.0  # for a client to see that nobody asks any more


@dataclass(frozen=True, slots=True)
class Overhead:
    """Wall time over HTTP less that of the scorer called directly, and the latter."""

    model: str
    num_repeats: int
    p50_ms: float
    p99_ms: float
    scorer_p50_ms: float


class CallerProcess:
    """The client's side of its pipes."""

    def __init__(self, process: subprocess.Popen[str], path: str) -> None:
        self._process = process
        self._path = path

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def returncode(self) -> int | None:
        """None while it runs."""
        return self._process.poll()

    def send(self, line: Any) -> None:
        """Raises ScoringFailed if the process has ended."""
        stdin = self._process.stdin
        try:
            if stdin is not None:
                stdin.write(json.dumps(line) + "\n")
                stdin.flush()
        except OSError:
            raise self._ended() from None

    def ask(self, body: dict[str, Any]) -> tuple[float, Scores]:
        """Seconds as the client saw them. Raises ScoringFailed for anything but a success."""
        self.send(body)
        line = self._process.stdout.readline() if self._process.stdout is not None else ""
        if not line.endswith("\n"):
            raise self._ended()
        told = json.loads(line)
        if "fault" in told:
            raise ScoringFailed(f"the bench's client could not ask {self._path}: {told['fault']}")
        return float(told["seconds"]), scores_of(checked(told["status"], told["body"]))

    def _ended(self) -> ScoringFailed:
        return ScoringFailed(f"the bench's client ended by itself, exit code {_ended_with(self._process)}")


@contextmanager
def calling(url: str, headers: dict[str, str], timeout_s: float) -> Iterator[CallerProcess]:
    """A client process with a connection of its own; gone on leaving, whatever happened. It ends as well when this process does."""
    where = httpx.URL(url)
    command = [sys.executable, "-I", caller.__file__]
    pipe = subprocess.PIPE  # in a session of its own: Ctrl-C is for us, who then end it
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, encoding="utf-8", start_new_session=True) as process:  # noqa: S603
        try:
            found = CallerProcess(process, url)
            found.send({"host": where.host, "port": where.port, "path": "/score", "headers": headers, "timeout_s": timeout_s})
            yield found
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """By closing what it reads; by force where that is not enough."""
    try:
        process.communicate(timeout=_END_S)
    except (subprocess.TimeoutExpired, OSError):
        process.kill()
    except KeyboardInterrupt:
        process.kill()
        raise


def _ended_with(process: subprocess.Popen[str]) -> int | None:
    try:
        return process.wait(_END_S)
    except subprocess.TimeoutExpired:
        return None


def measure_overhead(loopback: Loopback, scorer: Scorer, workload: Workload, num_repeats: int) -> Overhead:
    """Pairs of requests with captions of equal lengths, none asked before; who is first changes from pair to pair."""
    timeout_ms = loopback.runtime.settings.max_timeout_ms
    first = workload.request(1)
    encoded = workload.encode(first).image
    with Client(loopback) as client:
        _, image_id = client.send_bytes(first)
    served, direct = [], []
    with calling(loopback.url, loopback.headers, timeout_ms / 1000 + 5) as process:
        for number in range(_WARM_UP + num_repeats):
            body = json_body(image_id, workload.request(NUM_CAPTIONS, first), timeout_ms)
            group = workload.encode_for(encoded, workload.captions(NUM_CAPTIONS))
            if number % 2:
                direct.append(_direct(scorer, group, loopback))
            served.append(process.ask(body))
            if not number % 2:
                direct.append(_direct(scorer, group, loopback))
    return summarise(loopback.runtime.settings.model, served[_WARM_UP:], direct[_WARM_UP:])


def _direct(scorer: Scorer, group: EncodedGroup, loopback: Loopback) -> tuple[float, Scores]:
    return timed(lambda: scorer.score(scorer.prepare([group]))[0], torch.device(loopback.runtime.loaded.device))


def summarise(model: str, served: list[tuple[float, Scores]], direct: list[tuple[float, Scores]]) -> Overhead:
    """Raises ScoringFailed where both did not compute as many tokens: their difference would be no overhead."""
    tokens = [[scores.num_computed_tokens for _, scores in side] for side in (served, direct)]
    if sorted(tokens[0])[len(served) // 2] != sorted(tokens[1])[len(direct) // 2]:
        raise ScoringFailed("the server and its scorer computed different numbers of tokens for groups of equal lengths")
    over = 1000 * (np.array([seconds for seconds, _ in served]) - np.array([seconds for seconds, _ in direct]))
    p50, p99 = (float(value) for value in np.percentile(over, [50, 99]))
    return Overhead(model, len(over), p50, p99, 1000 * float(np.median([seconds for seconds, _ in direct])))
