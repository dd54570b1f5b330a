"""The tree of errors is the one its module draws; codes and statuses are what clients were promised."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass

import pytest

from app import errors
from app.errors import (
    ApiError,
    BodyTimeout,
    DeviceHung,
    HeadTimeout,
    ImageFetchFailed,
    ImageFetchTimeout,
    PunchlineError,
    RequestError,
    StartRefused,
    Unavailable,
)

ENTRY = re.compile(r"(?P<lead>[│├└─ ]*)(?P<name>[A-Z]\w+)(?:\s+(?P<status>[0-9]{3}))?")


@dataclass(frozen=True)
class Drawn:
    """One name of the drawing, and the name it hangs from."""

    name: str
    parent: str | None
    status: int | None


def drawing() -> list[Drawn]:
    """Every class of the module's docstring. Two columns of leaves may share a line; a leaf hangs from the name above it."""
    tree = (errors.__doc__ or "").partition("\n\n")[2].splitlines()
    found: list[Drawn] = []
    above: list[tuple[int, str]] = []  # column of each name on the path to the line in hand
    for line in tree:
        for at, match in enumerate(_names(line)):
            column = match.start("name")
            if at == 0:
                above = [entry for entry in above if entry[0] < column]
                parent = above[-1][1] if above else None
                above.append((column, match["name"]))
            else:  # the second column hangs from the same parent
                parent = found[-1].parent
            found.append(Drawn(match["name"], parent, int(match["status"]) if match["status"] else None))
    return found


def _names(line: str) -> list[re.Match[str]]:
    """The class names of a line; words of its explanation are no classes."""
    return [match for match in ENTRY.finditer(line) if isinstance(getattr(errors, match["name"], None), type)]


CLASSES = {
    name: kind for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, PunchlineError)
}  # fmt: skip
API = [kind for kind in CLASSES.values() if issubclass(kind, ApiError)]


def test_the_drawing_is_the_tree() -> None:
    drawn = {entry.name: entry.parent for entry in drawing()}
    real = {name: (None if kind is PunchlineError else kind.__bases__[0].__name__) for name, kind in CLASSES.items()}
    assert drawn == real
    assert len(drawn) == len(drawing())


def test_the_drawn_statuses_are_the_real_ones() -> None:
    with_status = [entry for entry in drawing() if entry.status is not None]
    assert {entry.name: entry.status for entry in with_status} == {entry.name: CLASSES[entry.name].status for entry in with_status}  # type: ignore[attr-defined]
    leaves = [kind.__name__ for kind in API if issubclass(kind, RequestError) and kind is not RequestError]
    assert set(leaves) <= {entry.name for entry in with_status}


def test_every_error_has_one_parent() -> None:
    assert all(len(kind.__bases__) == 1 for kind in CLASSES.values())


STABLE = {
    "internal_error": 500,
    "bad_request": 400,
    "bad_http": 400,
    "invalid_json": 400,
    "duplicate_key": 400,
    "too_deep": 400,
    "multipart_invalid": 400,
    "unauthorized": 401,
    "url_not_allowed": 403,
    "not_found": 404,
    "image_unknown": 404,
    "model_unknown": 404,
    "method_not_allowed": 405,
    "head_timeout": 408,
    "body_timeout": 408,
    "model_changed": 412,
    "body_too_large": 413,
    "too_many_items": 413,
    "too_many_tokens": 413,
    "caption_too_large": 413,
    "image_too_large": 413,
    "unsupported_media_type": 415,
    "image_format_not_allowed": 415,
    "head_too_large": 431,
    "invalid_request": 422,
    "image_decode_failed": 422,
    "caption_rejected": 422,
    "unavailable": 503,
    "overloaded": 503,
    "draining": 503,
    "not_ready": 503,
    "deadline_exceeded": 503,
    "device_fault": 503,
    "image_fetch_failed": 502,
    "image_fetch_timeout": 504,
    "device_hung": 504,
    "scoring_failed": 500,
    "nonfinite_score": 500,
    "out_of_memory": 500,
}


def test_codes_are_stable_and_no_two_errors_share_one() -> None:
    """A client branches on these: removing or renaming one is a new version of the API."""
    assert {kind.code: kind.status for kind in API} == STABLE
    assert len({kind.code for kind in API}) == len(API)
    assert all(re.fullmatch(r"[a-z]+(_[a-z]+)*", code) for code in STABLE)


@pytest.mark.parametrize("kind", API)
def test_a_status_is_its_branchs(kind: type[ApiError]) -> None:
    if issubclass(kind, RequestError):
        assert 400 <= kind.status < 500
        assert kind.status != 429, "trainers never retry 4xx; overload is 503"
        assert kind.retryable == (kind in {BodyTimeout, HeadTimeout})
    elif issubclass(kind, Unavailable):
        assert (kind.status, kind.retryable) == (503, True)
    elif issubclass(kind, ImageFetchFailed):
        assert (kind.status, kind.retryable) == (504 if kind is ImageFetchTimeout else 502, True)
    else:
        assert kind.status == (504 if kind is DeviceHung else 500)


@pytest.mark.parametrize("kind", API)
def test_only_what_passes_says_when_to_come_back(kind: type[ApiError]) -> None:
    headers = kind("words").headers
    assert headers.get("Retry-After", "").isdecimal() == issubclass(kind, Unavailable)
    assert int(headers.get("Retry-After", "1")) >= 1


@pytest.mark.parametrize("seconds", [1, 30])
def test_unavailable_carries_whole_seconds(seconds: int) -> None:
    assert Unavailable("later", retry_after_s=seconds).headers == {"Retry-After": str(seconds)}


def test_an_error_keeps_its_place_and_its_own_code() -> None:
    error = errors.ImageRejected("words", field="groups[2].image", index=3, code="animated_not_allowed", headers={"Connection": "close"})
    assert (str(error), error.message, error.field, error.index) == ("words", "words", "groups[2].image", 3)
    assert (error.code, errors.ImageRejected.code) == ("animated_not_allowed", "image_decode_failed")
    assert error.headers == {"Connection": "close"}
    assert errors.ImageRejected("words").field == "image"
    assert errors.InvalidRequest("words").field is None


def test_two_errors_share_no_headers() -> None:
    first, second = errors.InvalidRequest("a"), errors.InvalidRequest("b")
    first.headers["X"] = "y"
    assert second.headers == {}


@pytest.mark.parametrize("kind", [kind for kind in CLASSES.values() if issubclass(kind, StartRefused)])
def test_a_refused_start_is_exit_code_3(kind: type[StartRefused]) -> None:
    assert kind.exit_code == 3
    assert not issubclass(kind, ApiError)
    assert str(kind("one line")) == "one line"
