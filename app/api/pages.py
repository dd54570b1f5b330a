"""The files a browser is given: the pages of the playground, the API and training runs, and the drawn cartoons, read once.

Knows bytes, media types and the headers that confine a page; not what a score is. A path is looked up and never joined to a folder.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from app.artifacts import DEMO_PATH

WEB = Path(__file__).parents[1] / "web"
CARTOONS = DEMO_PATH / "cartoons"
PLACES = {
    "index.html": "/",
    "docs.html": "/docs",
    "runs.html": "/runs/",
    "run.html": "/runs/{run_id}",
}  # a run's page is the same for every run, and says nothing of any
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".json": "application/json",
    ".svg": "image/svg+xml",
    ".png": "image/png",
}
_CONFINED = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' blob: data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_HEADERS = {
    "Content-Security-Policy": _CONFINED,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, and asked for by its tag each time: after an update nobody mixes old files with new ones
}


@dataclass(frozen=True, slots=True)
class Page:
    """One file as it is answered."""

    path: str
    body: bytes
    media_type: str
    etag: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "etag", f'"{hashlib.sha256(self.body).hexdigest()[:32]}"')

    def route(self) -> Route:
        """Answers GET and HEAD."""
        return Route(self.path, self._answer, include_in_schema=False)

    async def _answer(self, request: Request) -> Response:
        headers = {**_HEADERS, "ETag": self.etag}
        if self._is_kept(request):
            return Response(status_code=304, headers=headers)
        return Response(self.body, media_type=self.media_type, headers=headers)

    def _is_kept(self, request: Request) -> bool:
        """What the browser holds is this very file."""
        tags = {tag.strip().removeprefix("W/") for tag in request.headers.get("if-none-match", "").split(",")}
        return self.etag in tags or "*" in tags


def read_pages() -> list[Page]:
    """Pages at their places, their parts under `/web/`, cartoons and their captions under `/cartoons/`."""
    parts = {PLACES.get(file.name, f"/web/{file.name}"): file for file in sorted(WEB.iterdir())}
    cartoons = {f"/cartoons/{file.name}": file for file in sorted(CARTOONS.iterdir())}
    return [Page(path, file.read_bytes(), MEDIA_TYPES[file.suffix]) for path, file in {**parts, **cartoons}.items()]
