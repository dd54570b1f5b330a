"""One golden item through the port, as a client sends it: key, parser, queue, device, JSON. Knows addresses and scores."""

from __future__ import annotations

import base64
import json
import socket
from typing import TYPE_CHECKING, Any

import httpx

from app.errors import ArtifactInvalid
from app.startcheck import MAX_LIVE_S, Finding

if TYPE_CHECKING:
    from app.main import Runtime
    from app.served import ServedModel
    from app.settings import Settings

_CHECK = "D15 http"
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 (recognised, not chosen)
_MAX_SHOWN = 200  # characters of an answer that is none


async def prove_over_http(runtime: Runtime, listener: socket.socket) -> None:
    """Ask every model for the scores of its smallest golden item; the server is not ready before they are right. Raises ArtifactInvalid."""
    for model in runtime.models.values():
        finding = await _find(runtime, model, address_of(listener))
        model.findings.append(finding)
        if not finding.passed:
            raise ArtifactInvalid(f"{model.artifact.root}: self-test failed: {finding}")
    runtime.awaits_proof = False


def address_of(listener: socket.socket) -> str:
    """Where this machine reaches a listening socket."""
    host, port = listener.getsockname()[:2]
    host = _ANY.get(host, host)
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def _find(runtime: Runtime, model: ServedModel, address: str) -> Finding:
    number = model.smallest_case
    scored = model.selftest.scored[number]
    body, chosen = _request(runtime.settings, model, number)
    cost_s = model.num_golden_tokens[number] / runtime.admission.tokens_per_s if runtime.admission.tokens_per_s else 0.0
    if cost_s > MAX_LIVE_S:
        return Finding(_CHECK, True, f"not run: about {cost_s:.0f} s on this machine")
    if not chosen or len(body) > runtime.settings.max_body_bytes:
        return Finding(_CHECK, True, "not run: the settings refuse a golden item of this size over HTTP")
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=runtime.settings.max_timeout_ms / 1000 + 5) as client:
            answer = await client.post(f"{address}/score", content=body, headers=_headers(runtime))
    except httpx.HTTPError as error:
        return Finding(_CHECK, False, f"the server does not answer on {address} ({type(error).__name__})")
    return judge(answer, [scored.expected[index] for index in chosen], model.selftest.tolerance, model.loaded.fingerprint)


def judge(answer: httpx.Response, expected: list[float], tolerance: float, fingerprint: str) -> Finding:
    """Whether an answer of `/score` holds these scores, signed by this model."""
    if answer.status_code != httpx.codes.OK:
        return Finding(_CHECK, False, f"a golden item was answered with {answer.status_code}: {answer.text[:_MAX_SHOWN]}")
    if answer.headers.get("x-model-fingerprint") != fingerprint:
        return Finding(_CHECK, False, "the answer is signed by another model: something else listens on this port")
    scores = answer.json()["scores"]
    if len(scores) != len(expected) or not all(isinstance(score, float) for score in scores):
        return Finding(_CHECK, False, f"{len(expected)} golden captions, answered with {len(scores)} scores or with something else")
    errors = [abs(one - other) for one, other in zip(scores, expected, strict=True)]
    worst, passed = max(errors), all(error <= tolerance for error in errors)  # what is no number is within nothing
    return Finding(_CHECK, passed, f"{len(scores)} golden scores over HTTP, largest difference {worst:.2e}, tolerance {tolerance:.0e}")


def _request(settings: Settings, model: ServedModel, number: int) -> tuple[bytes, list[int]]:
    """The body, and which captions of the item are in it: those that the settings let through."""
    item, picture = model.selftest.asked[number], model.selftest.pictures[number]
    fitting = [index for index, caption in enumerate(item.captions) if len(caption.encode()) <= settings.max_caption_bytes]
    chosen = fitting[: settings.max_captions]
    if item.prompt is not None and len(item.prompt.encode()) > settings.max_prompt_bytes:
        chosen = []
    body: dict[str, Any] = {
        "model": model.name,
        "captions": [item.captions[index] for index in chosen],
        "timeout_ms": settings.max_timeout_ms,
    }
    if item.prompt is not None:
        body["prompt"] = item.prompt
    if picture is not None:
        body["image"] = base64.b64encode(picture).decode()
    return json.dumps(body).encode(), chosen


def _headers(runtime: Runtime) -> dict[str, str]:
    keys = runtime.settings.api_keys
    return {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {keys[0]}"} if keys else {})
