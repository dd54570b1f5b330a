"""Answers as bytes: strict JSON, and one shape for every error of the tree."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from app import errors
from app.api.answers import JsonAnswer, error_answer
from app.api.schemas import CompareAnswer, Pair, Usage
from app.errors import ApiError, ItemRejected, Overloaded


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, [1.0, math.nan], {"a": {"b": math.inf}}])
def test_no_number_leaves_that_json_cannot_hold(value: Any) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        JsonAnswer(value)


@pytest.mark.parametrize("place", ["a", "margin", "probability_a"])
def test_a_model_with_nan_does_not_become_null(place: str) -> None:
    numbers = {"a": 0.0, "margin": 0.0, "probability_a": 0.5, place: math.nan}
    answer = CompareAnswer(
        preferred="a",
        probability_a=numbers["probability_a"],
        margin=numbers["margin"],
        scores=Pair(a=numbers["a"], b=0.0),
        image_id=None,
        usage=Usage(captions=2, tokens=2, computed_tokens=2, cached_tokens=0),
        model_fingerprint="f",
        request_id="r",
    )
    with pytest.raises(ValueError, match="not JSON compliant"):
        JsonAnswer(answer)


@pytest.mark.parametrize("value", [0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0, 1 / 3, 2**-53])
def test_floats_come_back_to_the_last_bit(value: float) -> None:
    found = json.loads(bytes(JsonAnswer([value]).body))[0]
    assert (found, math.copysign(1, found)) == (value, math.copysign(1, value))


def test_text_is_utf8_and_not_escaped() -> None:
    assert JsonAnswer({"caption": "é 🐧"}).body == '{"caption": "é 🐧"}'.encode()


def _api_errors(kind: type[ApiError]) -> list[type[ApiError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in _api_errors(child))]


@pytest.mark.parametrize("kind", _api_errors(ApiError))
def test_every_error_has_the_one_shape(kind: type[ApiError]) -> None:
    answer = error_answer(kind("words"), "an-id")
    body = json.loads(bytes(answer.body))
    assert set(body) == {"error"}
    assert body["error"].pop("field", kind.default_field) == kind.default_field
    assert body["error"] == {"code": kind.code, "message": "words", "retryable": kind.retryable, "request_id": "an-id"}
    assert (answer.status_code, answer.media_type) == (kind.status, "application/json")
    assert ("retry-after" in answer.headers) == issubclass(kind, errors.Unavailable)


def test_place_and_headers_of_an_error() -> None:
    error = ItemRejected("words", field="groups[1].captions[0]", index=0, code="caption_too_long")
    body = json.loads(bytes(error_answer(error, "an-id").body))
    assert (body["error"]["field"], body["error"]["index"], body["error"]["code"]) == ("groups[1].captions[0]", 0, "caption_too_long")
    assert error_answer(Overloaded("full", retry_after_s=7), "an-id").headers["Retry-After"] == "7"
