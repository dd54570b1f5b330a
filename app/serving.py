"""Put a running scorer on a port: uvicorn around the application, the card of what is loaded, a line to try it with."""

from __future__ import annotations

import logging
import os
import shlex
import socket
import sys
from dataclasses import asdict
from importlib.metadata import version
from ipaddress import ip_address
from typing import Any

import uvicorn
from fastapi import FastAPI

from app import __version__
from app.api import create_app
from app.api.card import Card, ModelCard, Models
from app.connections import guarded_config
from app.draining import DrainingServer, bind
from app.main import Runtime, running
from app.metrics import Metrics
from app.model import attention_ways
from app.proof import address_of, prove_over_http
from app.served import ServedModel
from app.settings import Settings

log = logging.getLogger("punchline")
_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "pillow", "fastapi")


async def serve(settings: Settings) -> None:
    """Load, self-test, then listen until told to stop; every accepted request is answered.

    Raises StartRefused, and DeviceBroken when nothing can be computed any more.
    """
    listener = bind(settings)
    try:
        async with running(settings) as runtime:
            runtime.awaits_proof = True
            _count_lost_lines(runtime.metrics)
            server = DrainingServer(
                config_of(runtime),
                runtime.batcher,
                notice_s=settings.drain_notice_s,
                drain_s=settings.drain_s,
                begin=runtime.begin_drain,
                prove=lambda taken: prove_over_http(runtime, taken),
                announce=lambda taken: _announce(runtime, taken),
            )
            await server.serve(sockets=[listener])
            if server.fault is not None:
                raise server.fault
    finally:
        listener.close()


def _count_lost_lines(metrics: Metrics) -> None:
    """A log that takes no line stops nothing, and is seen where it can be: by default logging tells of it on the stream that failed."""

    def lost(record: logging.LogRecord) -> None:
        metrics.lost_log_lines.inc()

    for handler in logging.getLogger().handlers:
        handler.handleError = lost  # type: ignore[method-assign]


def config_of(runtime: Runtime) -> uvicorn.Config:
    """How uvicorn serves a running scorer."""
    return guarded_config(application(runtime), runtime.settings, runtime.metrics, runtime.first.loaded.fingerprint)


def application(runtime: Runtime) -> FastAPI:
    """The ASGI application of a running scorer."""
    return create_app(runtime.settings, card_of(runtime), runtime.metrics)


def card_of(runtime: Runtime) -> Card:
    """The live view the routes are given."""
    return Card(
        models=Models(
            [
                ModelCard(
                    name=model.name,
                    fingerprint=model.loaded.fingerprint,
                    temperature=model.artifact.config.calibration.temperature,
                    service=model.service,
                    run_selftest=model.run_selftest,
                )
                for model in runtime.models.values()
            ]
        ),
        registry=runtime.metrics.registry,
        describe=lambda: describe(runtime),
        is_ready=lambda: runtime.ready,
        is_alive=lambda: runtime.batcher.alive,
        is_draining=lambda: runtime.draining,
    )


def describe(runtime: Runtime) -> dict[str, Any]:
    """What `/info` shows: the first model, how it runs, every model, the effective settings."""
    first = _described(runtime.first)
    return {
        "version": __version__,
        "model": first["model"],
        "runtime": {
            **first["runtime"],
            "deterministic": runtime.settings.deterministic,
            "compile": runtime.settings.compile,
            "hardware": runtime.hardware.as_dict(),
            "budgets": runtime.budgets.as_dict(),
            "libraries": {name: version(name) for name in _LIBRARIES},
        },
        "selftest": first["selftest"],
        "startcheck": first["startcheck"],
        "models": {name: _described(model) for name, model in runtime.models.items()},
        "ready": runtime.ready,
        "warnings": warnings(runtime),
        "settings": runtime.settings.redacted(),
    }


def _described(model: ServedModel) -> dict[str, Any]:
    """A model's card: what it is, what was assumed, how it is computed, what its checks said."""
    loaded = model.loaded
    return {
        "model": {
            "name": model.name,
            "fingerprint": loaded.fingerprint,
            "takes_images": loaded.model.takes_images,
            **model.artifact.config.model_dump(mode="json", exclude={"files"}),
            "assumed": list(model.artifact.assumed),
        },
        "runtime": {
            "device": loaded.device,
            "dtype": loaded.dtype,
            "lora": loaded.lora,
            "attention": attention_ways(loaded.model),
            "prepacked_layers": model.engine.num_prepacked,
        },
        "selftest": model.last_report.as_dict() if model.last_report else None,
        "startcheck": [asdict(finding) for finding in model.findings],
    }


def warnings(runtime: Runtime) -> list[str]:
    """What an operator should know about these settings."""
    return [*open_port(runtime.settings), *_small_batches(runtime)]


def open_port(settings: Settings) -> list[str]:
    """Whether everybody may use what others reach."""
    if not _is_loopback(settings.host) and not settings.api_keys:
        return [f"listening on {settings.host} without PUNCHLINE_API_KEY: anyone who reaches this port can use it"]
    return []


def _small_batches(runtime: Runtime) -> list[str]:
    """Models whose own limits allow captions that no batch holds."""
    held = runtime.budgets.max_batch_tokens
    return [
        f"{model.name}: a caption with its image and prompt may have {model.encoder.max_row_tokens:,} tokens, a batch holds {held:,} "
        "(PUNCHLINE_MAX_BATCH_TOKENS); one that has more is refused (too_many_tokens)"
        for model in runtime.models.values()
        if model.encoder.max_row_tokens > held
    ]


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _announce(runtime: Runtime, listener: socket.socket) -> None:
    address = address_of(listener)
    log.info("settings: %s", runtime.settings.redacted())
    for warning in warnings(runtime):
        log.warning("%s", warning)
    models = ", ".join(f"{model.name} ({model.loaded.fingerprint[:12]})" for model in runtime.models.values())
    head = f"Punchline {__version__} serves {models} on {address}"
    tell(f"\n{head}\n\nOpen {address}/ in a browser, or try it here:\n{_try_line(runtime, address)}\n")


def tell(text: str) -> None:
    """Print it. Output that takes nothing - a full disk, a closed pipe - is logged and given up: it must not stop a server."""
    try:
        print(text, flush=True)
    except (OSError, ValueError) as error:
        log.warning("standard output takes nothing more (%s)", error)
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (what it still holds would fail again at exit)


def _try_line(runtime: Runtime, address: str) -> str:
    """A curl line that works as printed: two golden captions of the artifact, or its card if it has none."""
    golden = runtime.first.selftest.golden
    key = ["-H", "Authorization: Bearer YOUR_KEY"] if runtime.settings.api_keys else []
    item = golden.items[0] if golden else None
    if item is None or item.image is None:
        return shlex.join(["curl", *key, f"{address}/info"])
    ranked = sorted(zip(item.scores, item.captions, strict=True))
    parts = [
        "-F",
        f"image=@{runtime.first.artifact.root / item.image}",
        "--form-string",
        f"a={ranked[-1][1]}",
        "--form-string",
        f"b={ranked[0][1]}",
    ]
    return shlex.join(["curl", *key, f"{address}/compare", *parts])
