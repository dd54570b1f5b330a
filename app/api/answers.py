"""Answers as bytes: strict JSON without NaN, and the one error shape."""

from __future__ import annotations

import json
from typing import Any

from pydantic import BaseModel
from starlette.responses import JSONResponse

from app.api.schemas import ErrorAnswer, ErrorBody
from app.errors import ApiError


class JsonAnswer(JSONResponse):
    """JSON of a model's set fields; a number that is not finite raises instead of leaving."""

    def render(self, content: Any) -> bytes:
        plain = content.model_dump(mode="json", exclude_unset=True) if isinstance(content, BaseModel) else content
        return json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(", ", ": ")).encode()


def error_answer(error: ApiError, request_id: str) -> JsonAnswer:
    """The one error shape, with the error's own headers (`Retry-After`, `WWW-Authenticate`, ...)."""
    place = {name: value for name, value in (("field", error.field), ("index", error.index)) if value is not None}
    body = ErrorBody(code=error.code, message=error.message, retryable=error.retryable, request_id=request_id, **place)
    return JsonAnswer(ErrorAnswer(error=body), status_code=error.status, headers=error.headers)
