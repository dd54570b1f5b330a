"""Put a running scorer on a port: uvicorn around the application, the card of what is loaded, a line to try it with."""

from __future__ import annotations

import asyncio
import logging
import shlex
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from typing import Any

import uvicorn
from fastapi import FastAPI

from app import __version__
from app.api import create_app
from app.api.card import Card
from app.errors import SettingsInvalid
from app.main import Runtime, running
from app.selftest import SelfTestReport
from app.settings import Settings

log = logging.getLogger("punchline")
_EVERYWHERE = {"0.0.0.0", "::"}  # noqa: S104 (recognised, not chosen)
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "pillow", "fastapi")


async def serve(settings: Settings) -> None:
    """Load, self-test, then listen until told to stop; every accepted request is answered. Raises StartRefused."""
    listener = bind(settings)
    try:
        async with running(settings) as runtime:
            config = uvicorn.Config(
                application(runtime),
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=settings.keep_alive_s,
                timeout_graceful_shutdown=settings.drain_s,
            )
            await _Server(config, runtime).serve(sockets=[listener])
    finally:
        listener.close()


class _Server(uvicorn.Server):
    """uvicorn with our beginning and end: the address is told once it answers and signals are minded.

    SIGTERM and SIGINT make the server unready and drain it, and the process leaves with 0: uvicorn's own handlers raise the
    signal again after the drain, which would kill the process before its batches are done.
    """

    def __init__(self, config: uvicorn.Config, runtime: Runtime) -> None:
        super().__init__(config)
        self._runtime = runtime

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started and sockets:
            _announce(self._runtime, sockets[0])

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, number)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _stop(self, number: signal.Signals) -> None:
        log.info("%s: answering what was accepted, then leaving", number.name)
        self._runtime.draining = True
        self.handle_exit(number, None)


def application(runtime: Runtime) -> FastAPI:
    """The ASGI application of a running scorer."""
    return create_app(runtime.service, runtime.settings, model_card(runtime), runtime.metrics)


def model_card(runtime: Runtime) -> Card:
    """The live view the state routes are given."""

    async def run_selftest() -> SelfTestReport:
        runtime.last_report = await runtime.selftest.run()
        return runtime.last_report

    return Card(
        fingerprint=runtime.loaded.fingerprint,
        temperature=runtime.artifact.config.calibration.temperature,
        registry=runtime.metrics.registry,
        describe=lambda: describe(runtime),
        is_ready=lambda: runtime.ready,
        is_alive=lambda: runtime.batcher.alive,
        run_selftest=run_selftest,
    )


def describe(runtime: Runtime) -> dict[str, Any]:
    """What `/info` shows: the model, how it runs, what was assumed, the effective settings."""
    config = runtime.artifact.config
    return {
        "version": __version__,
        "model": {
            "name": runtime.settings.model,
            "fingerprint": runtime.loaded.fingerprint,
            **config.model_dump(mode="json", exclude={"files"}),
            "assumed": list(runtime.artifact.assumed),
        },
        "runtime": {
            "device": runtime.loaded.device,
            "dtype": runtime.loaded.dtype,
            "lora": runtime.settings.lora,
            "deterministic": runtime.settings.deterministic,
            "hardware": runtime.hardware.as_dict(),
            "prepacked_layers": runtime.engine.num_prepacked,
            "budgets": runtime.budgets.as_dict(),
            "libraries": {name: version(name) for name in _LIBRARIES},
        },
        "selftest": runtime.last_report.as_dict() if runtime.last_report else None,
        "ready": runtime.ready,
        "warnings": warnings(runtime.settings),
        "settings": runtime.settings.redacted(),
    }


def warnings(settings: Settings) -> list[str]:
    """What an operator should know about these settings."""
    if settings.host not in _LOOPBACK and not settings.api_keys:
        return [f"listening on {settings.host} without PUNCHLINE_API_KEY: anyone who reaches this port can use it"]
    return []


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


def _announce(runtime: Runtime, listener: socket.socket) -> None:
    host, port = listener.getsockname()[:2]
    address = f"http://{'127.0.0.1' if host in _EVERYWHERE else host}:{port}"
    log.info("settings: %s", runtime.settings.redacted())
    for warning in warnings(runtime.settings):
        log.warning("%s", warning)
    print(f"\nPunchline {__version__} serves {runtime.settings.model} on {address}  ({runtime.loaded.fingerprint[:12]})\n", flush=True)
    print(f"Try it:\n{_try_line(runtime, address)}\n", flush=True)


def _try_line(runtime: Runtime, address: str) -> str:
    """A curl line that works as printed: two golden captions of the artifact, or its card if it has none."""
    golden = runtime.artifact.golden()
    key = ["-H", "Authorization: Bearer YOUR_KEY"] if runtime.settings.api_keys else []
    item = golden.items[0] if golden else None
    if item is None or item.image is None:
        return shlex.join(["curl", *key, f"{address}/info"])
    ranked = sorted(zip(item.scores, item.captions, strict=True))
    parts = [
        "-F",
        f"image=@{runtime.artifact.root / item.image}",
        "--form-string",
        f"a={ranked[-1][1]}",
        "--form-string",
        f"b={ranked[0][1]}",
    ]
    return shlex.join(["curl", *key, f"{address}/compare", *parts])
