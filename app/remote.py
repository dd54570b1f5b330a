"""The command line's `--url`: the same answers from a running server."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx

from app.errors import ApiError

TIMEOUT_S = 150.0


def remote_post(url: str, route: str, image: Path | None, fields: dict[str, Any], key: str | None) -> dict[str, Any]:
    """POST fields, and a picture unless the model is text-only, as multipart. Raises ApiError with the server's code and message."""
    parts: list[tuple[str, Any]] = [] if image is None else [("image", (image.name, image.read_bytes()))]
    for name, value in fields.items():
        values = value if isinstance(value, list) else [value]
        parts += [({"captions": "caption"}.get(name, name), (None, text.encode())) for text in values]
    return _send("POST", url, route, key, files=parts)


def remote_info(url: str, key: str | None) -> dict[str, Any]:
    """The card of what a server has loaded."""
    return _send("GET", url, "/info", key)


def remote_selftest(url: str, key: str | None) -> dict[str, Any]:
    """Golden scores on a running server, now."""
    return _send("POST", url, "/selftest", key, accept=500)


def _send(method: str, url: str, route: str, key: str | None, *, accept: int | None = None, **arguments: Any) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    if not url.startswith(("http://", "https://")):
        raise ApiError(f"{url} is no address; it begins with http:// or https://", code="bad_url")
    try:
        answer = httpx.request(method, url.rstrip("/") + route, headers=headers, timeout=TIMEOUT_S, **arguments)
        body = answer.json()
    except httpx.HTTPError as error:
        raise ApiError(f"{url} does not answer ({type(error).__name__})", code="unreachable") from None
    except ValueError:  # bytes that are no text included
        raise ApiError(f"{url} answered something else than JSON", code="bad_answer") from None
    if not isinstance(body, dict):
        raise ApiError(f"{url} answered HTTP {answer.status_code} and something else than a JSON object", code="bad_answer")
    if answer.is_error and not (answer.status_code == accept and "error" not in body):
        fault = body.get("error")
        fault = fault if isinstance(fault, dict) else {}
        raise ApiError(
            str(fault.get("message", f"HTTP {answer.status_code}")), code=str(fault.get("code", "error")), field=fault.get("field")
        )
    return body
