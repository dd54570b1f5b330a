"""What HTTP, queue and encoding cost: one fake scorer behind Punchline, bare FastAPI and LitServe, against calling it directly.

Each server is a process of its own on loopback; while one is measured the others are stopped. Punchline is whole but for the model
and its canary: `punchline serve` of the bundled demo, whose scorer gives way to the fake. The others take the same JSON and check nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fastapi
import httpx
import numpy as np
import uvicorn
from PIL import Image

try:
    import litserve  # type: ignore[import-untyped]
except ModuleNotFoundError:
    raise SystemExit("overhead: LitServe is not installed: pip install 'punchline[bench]'") from None

HOST = "127.0.0.1"
NUM_CAPTIONS = 8
NUM_BODIES = 64  # different requests, sent in turn
NUM_WARM_UP = 20
MAX_BATCH = 64  # requests that LitServe may put into one call
BATCH_WAIT_S = 0.001  # how long LitServe gathers; with 0, its default, its worker never sleeps
START_S = 180.0
VOCABULARY = "the a my our duck king robot office moat raise door says never again without but it had been told to wait here"
WORDS = tuple(VOCABULARY.split())
DIRECT = "direct call"
Rows = Sequence[Sequence[Any]]  # the captions of one group, as text or as token ids


class Refused(Exception):
    """Nothing can be measured or trusted; the message is one line for whoever started it."""


@dataclass(slots=True)
class FakeScorer:
    """Takes its time and gives each caption its length. One call at a time, as a device would. Does what Punchline's `Scorer` does."""

    delay_s: float
    _device: threading.Lock = field(default_factory=threading.Lock)

    def values(self, groups: Sequence[Rows]) -> list[list[float]]:
        """A value per caption of each group; the delay is that of the call, whatever is in it."""
        with self._device:
            if self.delay_s:
                time.sleep(self.delay_s)
            return [[float(len(row)) for row in rows] for rows in groups]

    def prepare(self, groups: Sequence[Any]) -> Sequence[Any]:
        """The host's share of a forward: none here."""
        return groups

    def score(self, prepared: Sequence[Any]) -> list[Any]:
        """`values` of encoded groups as Punchline's batcher wants them."""
        from app.contracts import Scores

        found = self.values([group.rows for group in prepared])
        return [
            Scores(tuple(values), sum(len(row) for row in group.rows), group.num_tokens)
            for group, values in zip(prepared, found, strict=True)
        ]


async def serve_punchline(port: int, delay_s: float) -> None:
    """The whole of `punchline serve` for the bundled demo, a line in the log for each request included.

    Once it has proved itself, the fake stands where the demo's scorer was.
    """
    from app.draining import DrainingServer, bind
    from app.main import running
    from app.serving import config_of
    from app.settings import Settings

    fake = FakeScorer(delay_s)
    settings = Settings(host=HOST, port=port, canary_s=0)  # the canary would take lengths for golden scores gone wrong, and end it
    logging.basicConfig(level=settings.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s %(message)s")
    with bind(settings) as listener:
        async with running(settings) as runtime:
            scorer: Any = runtime.first.scorer
            scorer.prepare, scorer.score = fake.prepare, fake.score  # that this is what answers shows in the scores, which are lengths
            server = DrainingServer(
                config_of(runtime), runtime.batcher, notice_s=0, drain_s=1, begin=runtime.begin_drain, announce=lambda taken: None
            )
            await server.serve(sockets=[listener])


async def serve_blocking_route(port: int, delay_s: float) -> None:
    """FastAPI as its own documentation has it for work that blocks: a plain function, run on its threads."""
    app, scorer = _bare_app(), FakeScorer(delay_s)

    @app.post("/score")
    def score(asked: dict[str, Any]) -> dict[str, Any]:
        return {"scores": scorer.values([asked["captions"]])[0]}

    await uvicorn.Server(_uvicorn(app, port)).serve()


async def serve_async_route(port: int, delay_s: float) -> None:
    """FastAPI at its quickest for one client: the scorer runs on the event loop, and everybody else waits."""
    app, scorer = _bare_app(), FakeScorer(delay_s)

    @app.post("/score")
    async def score(asked: dict[str, Any]) -> dict[str, Any]:
        return {"scores": scorer.values([asked["captions"]])[0]}

    await uvicorn.Server(_uvicorn(app, port)).serve()


def _bare_app() -> fastapi.FastAPI:
    app = fastapi.FastAPI()

    @app.get("/readyz")
    def ready() -> dict[str, str]:
        return {"status": "ready"}

    return app


def _uvicorn(app: Any, port: int) -> uvicorn.Config:
    """Without a line in the log for each request."""
    return uvicorn.Config(app, host=HOST, port=port, log_config=None, access_log=False, server_header=False)


class CaptionApi(litserve.LitAPI):  # type: ignore[misc]
    """The fake scorer behind LitServe, which unpickles this in its worker."""

    def __init__(self, delay_s: float) -> None:
        super().__init__(max_batch_size=MAX_BATCH, batch_timeout=BATCH_WAIT_S, api_path="/score")
        self._delay_s = delay_s

    def setup(self, device: str) -> None:
        self._scorer = FakeScorer(self._delay_s)

    def decode_request(self, request) -> list[str]:  # type: ignore[no-untyped-def]  # LitServe would take an annotation for FastAPI's
        return list(request["captions"])

    def predict(self, batch: list[list[str]]) -> list[list[float]]:
        return self._scorer.values(batch)

    def encode_response(self, output: list[float]) -> dict[str, Any]:
        return {"scores": output}


async def serve_litserve(port: int, delay_s: float) -> None:
    """LitServe with its batching on."""
    server = litserve.LitServer(CaptionApi(delay_s), accelerator="cpu", devices=1, healthcheck_path="/readyz")
    server.run(host=HOST, port=port, log_level="error", generate_client_file=False, access_log=False)


@dataclass(frozen=True, slots=True)
class Way:
    """A server that holds the fake scorer: its name in the table and what starts it."""

    name: str
    serve: Callable[[int, float], Any]


WAYS = {
    "punchline": Way("Punchline", serve_punchline),
    "fastapi": Way("FastAPI, def", serve_blocking_route),
    "fastapi-async": Way("FastAPI, async def", serve_async_route),
    "litserve": Way("LitServe", serve_litserve),
}


class ServerProcess:
    """One server in a process group of its own, so that it can be stopped and sent on with all its workers."""

    def __init__(self, key: str, delay_s: float, log: Path) -> None:
        self.port = _free_port()
        self._key, self._log = key, log
        command = [sys.executable, __file__, "--serve", key, "--port", str(self.port), "--delay-ms", str(delay_s * 1000)]
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PUNCHLINE_")}
        with log.open("wb") as stream:
            self._process = subprocess.Popen(command, stdout=stream, stderr=stream, env=inherited, start_new_session=True)  # noqa: S603

    def wait_until_ready(self) -> None:
        """Raises Refused with the last line it wrote when it ends or takes too long."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"http://{HOST}:{self.port}/readyz", trust_env=False).status_code == httpx.codes.OK:
                    return
            time.sleep(0.1)
        written = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines() or ["it wrote nothing"]
        raise Refused(f"the {self._key} server did not start: {written[-1]}")

    def signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def end(self) -> None:
        """SIGTERM, then SIGKILL, to the whole group."""
        self.signal(signal.SIGCONT)
        self.signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        self.signal(signal.SIGKILL)
        self._process.wait()


@contextlib.contextmanager
def running(delay_s: float) -> Iterator[dict[str, ServerProcess]]:
    """All servers, ready; ended on leaving, SIGTERM included."""
    old = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    servers: dict[str, ServerProcess] = {}
    with tempfile.TemporaryDirectory() as place:
        try:
            for key in WAYS:
                servers[key] = ServerProcess(key, delay_s, Path(place, f"{key}.log"))
            for server in servers.values():
                server.wait_until_ready()
            yield servers
        finally:
            for server in servers.values():
                server.end()
            signal.signal(signal.SIGTERM, old)


@contextlib.contextmanager
def alone(servers: dict[str, ServerProcess], key: str) -> Iterator[None]:
    """Only this server may run."""
    others = [server for name, server in servers.items() if name != key]
    for server in others:
        server.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for server in others:
            server.signal(signal.SIGCONT)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


@dataclass(slots=True)
class Cell:
    """What one way showed for one number of clients, over all rounds."""

    latencies_s: list[float] = field(default_factory=list)
    wall_s: float = 0.0

    def percentile_ms(self, percent: float) -> float:
        return float(np.percentile(self.latencies_s, percent)) * 1000

    @property
    def requests_per_s(self) -> float:
        return len(self.latencies_s) / self.wall_s


Table = dict[tuple[int, str], Cell]  # (clients, way): what was seen


def captions(number: int) -> list[str]:
    """Eight captions of about a dozen words, others for another number."""
    rng = random.Random(number)  # noqa: S311 (made-up text)
    return [" ".join(rng.choices(WORDS, k=8 + index)) for index in range(NUM_CAPTIONS)]


def picture() -> bytes:
    """The one image everybody is asked about."""
    stream = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (308, 448, 3), dtype=np.uint8)).save(stream, "PNG")
    return stream.getvalue()


def request_bytes(image_id: str) -> list[bytes]:
    """Whole HTTP requests, the same for every server."""
    bodies = [json.dumps({"image": image_id, "captions": captions(number)}).encode() for number in range(NUM_BODIES)]
    head = f"POST /score HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\nContent-Length: "
    return [f"{head}{len(body)}\r\n\r\n".encode() + body for body in bodies]


async def ask(port: int, requests: Sequence[bytes], num_requests: int, num_clients: int) -> tuple[list[float], float]:
    """Latencies of so many requests, and seconds altogether. Each client has a connection and sends its next after its answer."""
    left, latencies, answers = iter(range(num_requests)), [], []

    async def client() -> None:
        reader, writer = await asyncio.open_connection(HOST, port)
        with contextlib.closing(writer):
            for number in left:
                began = time.perf_counter()
                writer.write(requests[number % len(requests)])
                answers.append(await _read_answer(reader))
                latencies.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(num_clients)))
    wall = time.perf_counter() - began
    for answer in answers:
        _check(answer)
    return latencies, wall


async def _read_answer(reader: asyncio.StreamReader) -> bytes:
    """The body of one response; a lean client, so that what is measured is the server. Raises Refused."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = re.search(rb"content-length: *(\d+)", head, re.IGNORECASE)
    body = await reader.readexactly(int(length[1])) if length else b""
    if not head.startswith(b"HTTP/1.1 200 ") or length is None:
        raise Refused(f"a server answered {head.splitlines()[0].decode('latin-1')} {body[:200].decode('utf-8', 'replace')}")
    return body


def _check(answer: bytes) -> None:
    scores = json.loads(answer)["scores"]
    if len(scores) != NUM_CAPTIONS or not all(score > 0 and float(score).is_integer() for score in scores):
        raise Refused(f"a server gave {len(scores)} scores for {NUM_CAPTIONS} captions, or one that is no length: not the fake scorer's")


def call_directly(scorer: FakeScorer, num_requests: int) -> tuple[list[float], float]:
    """The yardstick: the same groups, no server, one caller."""
    groups, latencies = [captions(number) for number in range(NUM_BODIES)], []
    started = time.perf_counter()
    for number in range(num_requests):
        began = time.perf_counter()
        scorer.values([groups[number % NUM_BODIES]])
        latencies.append(time.perf_counter() - began)
    return latencies, time.perf_counter() - started


def measure(delay_s: float, *, num_requests: int, num_rounds: int, clients: Sequence[int]) -> Table:
    """Rounds in which every way has its turn, and another begins each time."""
    scorer, order = FakeScorer(delay_s), [DIRECT, *WAYS]
    table: Table = {(1, DIRECT): Cell()} | {(count, key): Cell() for count in clients for key in WAYS}
    with running(delay_s) as servers:
        requests = request_bytes(_known_image(servers["punchline"].port))
        for key, server in servers.items():
            with alone(servers, key):
                asyncio.run(ask(server.port, requests, NUM_WARM_UP, max(clients)))
        for index in range(num_rounds):
            print(f"scorer {delay_s * 1000:g} ms: round {index + 1} of {num_rounds}", file=sys.stderr, flush=True)
            for key in (order[index % len(order) :] + order)[: len(order)]:
                with alone(servers, key):
                    _turn(table, key, scorer, servers, requests, num_requests)
    return table


def _turn(
    table: Table, way: str, scorer: FakeScorer, servers: dict[str, ServerProcess], requests: Sequence[bytes], num_requests: int
) -> None:
    """One way, with each number of clients the table has for it."""
    for (clients, key), cell in table.items():
        if key == way:
            asked = (
                call_directly(scorer, num_requests)
                if way == DIRECT
                else asyncio.run(ask(servers[way].port, requests, num_requests, clients))
            )
            cell.latencies_s += asked[0]
            cell.wall_s += asked[1]


def _known_image(port: int) -> str:
    response = httpx.put(f"http://{HOST}:{port}/images", content=picture(), trust_env=False)
    if response.status_code != httpx.codes.OK:
        raise Refused(f"Punchline does not take the image: {response.text}")
    return str(response.json()["image_id"])


def as_text(tables: dict[float, Table]) -> str:
    """One table for all delays; the differences are to the direct call of the same delay, made by one caller."""
    rows = [["scorer", "clients", "", "p50 ms", "p99 ms", "requests/s", "p50 - direct", "p99 - direct"]]
    for delay_s, table in tables.items():
        direct = table[1, DIRECT]
        for (clients, key), cell in table.items():
            names = [f"{delay_s * 1000:g} ms", str(clients), WAYS[key].name if key in WAYS else key]
            p50, p99 = cell.percentile_ms(50), cell.percentile_ms(99)
            rows.append([*names, f"{p50:.2f}", f"{p99:.2f}", f"{cell.requests_per_s:,.0f}"])
            rows[-1] += ["", ""] if key == DIRECT else [f"{p50 - direct.percentile_ms(50):+.2f}", f"{p99 - direct.percentile_ms(99):+.2f}"]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    shown = [
        "  ".join(
            cell.ljust(width) if column == 2 else cell.rjust(width) for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    return "\n".join(line.rstrip() for line in shown)


def _machine() -> str:
    import torch

    from app.hardware import describe_hardware

    servers = ", ".join(f"{name} {version(name)}" for name in ("fastapi", "uvicorn", "litserve"))
    return f"{describe_hardware(torch.device('cpu'))}; {servers}"


def _numbers(text: str, name: str, kind: type[int] | type[float], lowest: int) -> list[Any]:
    try:
        found = [kind(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or len(set(found)) != len(found) or not all(lowest <= number < 10_000 for number in found):
        raise Refused(f"{name} {text!r}: different numbers from {lowest}, separated by commas")
    return found


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="overhead.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--delay-ms", default="0,5", metavar="MS,MS", help="how long the fake scorer takes a call (0,5)")
    parser.add_argument("--clients", default="1,16", metavar="N,N", help="clients at once, each waits for its answer (1,16)")
    parser.add_argument("--requests", type=int, default=500, metavar="N", help="of each way and number of clients in a round (500)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each way (5)")
    parser.add_argument("--serve", choices=tuple(WAYS), help=argparse.SUPPRESS)  # this script starts itself so, once a server
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Everything the command does. Raises Refused."""
    delays = [number / 1000 for number in _numbers(arguments.delay_ms, "--delay-ms", float, 0)]
    if arguments.serve:
        asyncio.run(WAYS[arguments.serve].serve(arguments.port, delays[0]))
        return
    clients = _numbers(arguments.clients, "--clients", int, 1)
    if arguments.requests < 1 or arguments.rounds < 1:
        raise Refused("--requests and --rounds are at least 1")
    tables = {
        delay_s: measure(delay_s, num_requests=arguments.requests, num_rounds=arguments.rounds, clients=clients) for delay_s in delays
    }
    print(as_text(tables))
    print(
        f"{NUM_CAPTIONS} captions of a known image; {arguments.requests} requests a line in each of {arguments.rounds} interleaved rounds;"
    )
    print(f"direct: one caller, one group a call; LitServe: up to {MAX_BATCH} requests a batch, gathered for {BATCH_WAIT_S * 1000:g} ms")
    print(_machine())


def main(argv: Sequence[str] | None = None) -> int:
    """0 when everything was measured, 1 with one line on stderr otherwise."""
    try:
        run(_arguments(argv))
    except (Refused, OSError, asyncio.IncompleteReadError) as error:
        print(f"overhead: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
