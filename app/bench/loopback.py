"""The whole server in a thread of this process, on a port of the loopback interface, and a client that asks it.

Whoever starts it gets the running server's own parts as well, so that direct calls and HTTP share one loaded model. They are his
alone while he asks nothing over HTTP: there is no canary, which would use them while he times a call.
"""

from __future__ import annotations

import asyncio
import gc
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
import torch
import uvicorn

from app.bases import weights_bytes
from app.bench.memory import Peak, PeakMemory
from app.bench.workload import Request
from app.contracts import Scores
from app.errors import ScoringFailed
from app.machine import num_processors, quiet_collector
from app.main import Runtime, running
from app.model import resolve_device
from app.serving import config_of
from app.settings import Settings

HOST = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class Startup:
    """What it cost until the server was ready: everything, from opening the artifact to the self-test."""

    seconds: float
    peak: Peak | None  # None where the system does not tell


@dataclass(frozen=True, slots=True)
class Loopback:
    """A server that answers, and its insides."""

    runtime: Runtime
    url: str
    startup: Startup

    @property
    def headers(self) -> dict[str, str]:
        """The settings may come from an environment with a key."""
        keys = self.runtime.settings.api_keys
        return {"Authorization": f"Bearer {keys[0]}"} if keys else {}


class _Server(uvicorn.Server):
    """uvicorn that says when it answers, its collector of cycles quiet until it ends; `punchline serve` lets it look now and then."""

    def __init__(self, config: uvicorn.Config, found: Future[Loopback], loopback: Loopback) -> None:
        super().__init__(config)
        self._found = found
        self._loopback = loopback
        self._undo: Callable[[], None] = lambda: None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._undo = quiet_collector()
        self._found.set_result(self._loopback)

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().serve(sockets)
        finally:
            self._undo()
            gc.collect()


@contextmanager
def serving(settings: Settings) -> Iterator[Loopback]:
    """Load, self-test and serve until left; then drain. Raises StartRefused as `punchline serve` would.

    torch keeps its number of threads for each thread by itself: the caller's is made that of the server's.
    """
    settings = settings.model_copy(update={"canary_s": 0.0})
    torch.set_num_threads(settings.num_threads or num_processors())
    found: Future[Loopback] = Future()
    stop = threading.Event()
    thread = threading.Thread(target=_run, args=(settings, found, stop), name="loopback server")
    thread.start()
    try:
        yield found.result()
    finally:
        stop.set()
        thread.join()


def _run(settings: Settings, found: Future[Loopback], stop: threading.Event) -> None:
    try:
        asyncio.run(_serve(settings, found, stop))
    except BaseException as error:
        if found.done():
            raise
        found.set_exception(error)


async def _serve(settings: Settings, found: Future[Loopback], stop: threading.Event) -> None:
    async with AsyncExitStack() as stack:
        with PeakMemory(torch.device(resolve_device(settings.device))) as memory:
            began = time.perf_counter()
            runtime = await stack.enter_async_context(running(settings))
            seconds = time.perf_counter() - began
        peak = memory.peak(weights_bytes(runtime.first.artifact.base_path, getattr(torch, runtime.first.loaded.dtype)))
        # the protocol is named because asyncio turns Nagle's delay off only for sockets that name it: else 40 ms an answer
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listener:
            listener.bind((HOST, 0))
            url = f"http://{HOST}:{listener.getsockname()[1]}"
            server = _Server(config_of(runtime), found, Loopback(runtime, url, Startup(seconds, peak)))
            serve = asyncio.create_task(server.serve(sockets=[listener]))
            await asyncio.wait({serve, asyncio.create_task(asyncio.to_thread(stop.wait))}, return_when=asyncio.FIRST_COMPLETED)
            server.should_exit = True
            await serve


class Client:
    """Asks a loopback server, one request after the other."""

    def __init__(self, loopback: Loopback) -> None:
        self._timeout_ms = loopback.runtime.settings.max_timeout_ms
        timeout = httpx.Timeout(self._timeout_ms / 1000 + 5)
        self._http = httpx.Client(base_url=loopback.url, headers=loopback.headers, timeout=timeout)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def send_bytes(self, request: Request) -> tuple[Scores, str | None]:
        """Image, prompt and captions in one form. Returns the scores and the image's id; a text-only model has none, and takes JSON."""
        if request.image is None:
            return self.send_id(None, request), None
        fields = {"prompt": request.prompt, "caption": list(request.captions), "timeout_ms": str(self._timeout_ms)}
        answer = self._http.post("/score", data=fields, files={"image": ("cartoon.png", request.image, "image/png")})
        told = read_answer(answer)
        return scores_of(told), str(told["image_id"])

    def send_id(self, image_id: str | None, request: Request) -> Scores:
        """The image by its id, or none."""
        return scores_of(read_answer(self._http.post("/score", json=json_body(image_id, request, self._timeout_ms))))


def json_body(image_id: str | None, request: Request, timeout_ms: int) -> dict[str, Any]:
    image = {} if image_id is None else {"image": image_id}
    return image | {"prompt": request.prompt, "captions": list(request.captions), "timeout_ms": timeout_ms}


def read_answer(answer: httpx.Response) -> dict[str, Any]:
    """The body of a success. Raises ScoringFailed with what the server said instead."""
    return checked(answer.status_code, answer.json())


def checked(status: int, told: dict[str, Any]) -> dict[str, Any]:
    """The same of a status and a parsed body."""
    if status != httpx.codes.OK:
        raise ScoringFailed(f"the server answered {status}: {told.get('error', {}).get('message', 'no reason')}")
    return told


def scores_of(told: dict[str, Any]) -> Scores:
    usage = told["usage"]
    return Scores(tuple(told["scores"]), usage["tokens"], usage["computed_tokens"], usage["cached_tokens"])
