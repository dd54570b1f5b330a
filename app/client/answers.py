"""What servers answer, read with distrust: an answer that is not one to the question is an error, never scores."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from app.client.errors import BadAnswer, ImageUnknown, ModelChanged, Refused, RewardError

_RETRYABLE = frozenset({408, 425, 429, 502, 503, 504})  # whatever the body says, or where a proxy answers in its place
_MAX_WORDS = 200  # of a body that is no JSON, in a message


class Again(Exception):
    """An attempt that another may follow. `wait_s`: what the server asked for."""

    def __init__(self, why: RewardError, wait_s: float | None = None) -> None:
        super().__init__(str(why))
        self.why = why
        self.wait_s = wait_s


@dataclass(frozen=True, slots=True)
class GroupScores:
    """Of one group, in the order of its captions. `scores[i]` is None where `errors[i]` says why; by default that raises instead."""

    scores: tuple[float | None, ...]
    errors: tuple[str | None, ...]
    image_id: str | None
    warnings: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """Which of two captions is preferred, and how likely."""

    preferred: Literal["a", "b", "tie"]
    probability_a: float
    margin: float
    score_a: float
    score_b: float


@dataclass(frozen=True, slots=True)
class Ranked:
    """One caption of a ranking, the best first. `index`: where it stood in what was asked."""

    rank: int
    index: int
    caption: str
    score: float
    win_probability: float
    tied: bool


def read_answer(status: int, body: bytes, retry_after: str | None) -> dict[str, Any]:
    """The JSON of a success. Raises Refused, ImageUnknown or ModelChanged; Again where another attempt may do; BadAnswer."""
    try:
        told = json.loads(body, parse_constant=_no_number)
    except ValueError:
        told = None
    if status == 200:
        if not isinstance(told, dict):
            raise BadAnswer("a success that is no JSON object")
        return told
    fault = told.get("error") if isinstance(told, dict) else None
    fault = fault if isinstance(fault, dict) else {}
    message, code = str(fault.get("message") or _words(body)), str(fault.get("code", f"http_{status}"))
    if code == "model_changed":
        raise ModelChanged(message)
    kind = ImageUnknown if code == "image_unknown" else Refused
    refused = kind(message, status=status, code=code, field=_text(fault.get("field")), index=_index(fault.get("index")))
    if status in _RETRYABLE or fault.get("retryable") is True or (status >= 500 and not fault):
        raise Again(refused, _seconds(retry_after))
    raise refused


def check_request(told: dict[str, Any], request_id: str) -> None:
    """Raises BadAnswer if it answers another request."""
    if told.get("request_id") != request_id:
        raise BadAnswer(f"asked as request {request_id}, answered as {told.get('request_id')}")


def read_scores(told: Any, num_captions: int, image_id: str | None, *, may_fail: bool) -> GroupScores:
    """Raises BadAnswer unless there is a finite score, or where it `may_fail` a reason, for each caption of this picture."""
    scores, errors = _list(told, "scores"), told.get("errors") or [None] * num_captions
    if len(scores) != num_captions or not isinstance(errors, list) or len(errors) != num_captions:
        raise BadAnswer(f"asked for {num_captions} scores, got {len(scores)}")
    if told.get("image_id") != image_id:
        raise BadAnswer(f"asked about {image_id}, answered about {told.get('image_id')}")
    reasons = tuple(None if error is None else _reason(error) for error in errors)
    for place, (score, reason) in enumerate(zip(scores, reasons, strict=True)):
        if score is None and may_fail and reason is not None:
            continue
        if reason is not None:
            raise BadAnswer(f"caption {place} has an error, and it was not to fail alone: {reason}")
        _finite(score, f"score {place}")
    found = tuple(None if score is None else float(score) for score in scores)
    warnings = told.get("warnings")
    return GroupScores(found, reasons, image_id, tuple(map(str, warnings)) if isinstance(warnings, list) else ())


def read_groups(told: dict[str, Any], asked: Sequence[tuple[int, str | None]], *, may_fail: bool) -> list[GroupScores]:
    """`asked`: captions and picture of each group. Raises BadAnswer."""
    groups = _list(told, "groups")
    if len(groups) != len(asked):
        raise BadAnswer(f"asked for {len(asked)} groups, got {len(groups)}")
    for place, group in enumerate(groups):
        if not isinstance(group, dict) or group.get("id") != str(place):
            raise BadAnswer("the groups come in another order than they were asked for")
    return [read_scores(group, *each, may_fail=may_fail) for group, each in zip(groups, asked, strict=True)]


def read_comparison(told: dict[str, Any], image_id: str | None) -> Comparison:
    """Raises BadAnswer where the parts of the answer contradict each other."""
    scores = told.get("scores")
    if not isinstance(scores, dict) or told.get("image_id") != image_id:
        raise BadAnswer("no comparison of these captions of this picture")
    a, b, margin, probability = (_finite(value, "a number") for value in (*_pair(scores), told.get("margin"), told.get("probability_a")))
    preferred = "tie" if margin == 0 else "a" if margin > 0 else "b"
    if not math.isclose(margin, a - b, rel_tol=1e-9, abs_tol=1e-12) or told.get("preferred") != preferred or not 0 <= probability <= 1:
        raise BadAnswer("scores, margin and preference contradict each other")
    return Comparison(preferred, probability, margin, a, b)  # type: ignore[arg-type]


def read_ranking(told: dict[str, Any], captions: Sequence[str], image_id: str | None) -> list[Ranked]:
    """Raises BadAnswer unless every caption is there once, the best first."""
    rows = _list(told, "ranking")
    if told.get("image_id") != image_id or not all(isinstance(row, dict) for row in rows):
        raise BadAnswer("no ranking of this picture's captions")
    if sorted(str(row.get("index")) for row in rows) != sorted(map(str, range(len(captions)))):
        raise BadAnswer(f"a ranking of other captions than the {len(captions)} asked for")
    ranked = [_ranked(row) for row in rows]
    scores = [each.score for each in ranked]
    if any(each.caption != captions[each.index] for each in ranked) or scores != sorted(scores, reverse=True):
        raise BadAnswer("a ranking that is none of these captions")
    return ranked


def _ranked(row: dict[str, Any]) -> Ranked:
    """Its index was compared already."""
    rank, probability = _index(row.get("rank")), _finite(row.get("win_probability"), "a probability")
    if rank is None or not 0 <= probability <= 1:
        raise BadAnswer("a ranking without ranks, or with a probability that is none")
    score = _finite(row.get("score"), "a score")
    return Ranked(rank, int(row["index"]), str(row.get("caption")), score, probability, row.get("tied") is True)


def _no_number(name: str) -> float:
    raise ValueError(name)


def _finite(value: Any, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise BadAnswer(f"{what} is {value!r}, no finite number")
    return float(value)


def _pair(scores: dict[str, Any]) -> tuple[Any, Any]:
    return scores.get("a"), scores.get("b")


def _list(told: Any, name: str) -> list[Any]:
    found = told.get(name) if isinstance(told, dict) else None
    if not isinstance(found, list):
        raise BadAnswer(f"an answer without `{name}`")
    return found


def _reason(error: Any) -> str:
    return f"{error.get('code')}: {error.get('message')}" if isinstance(error, dict) else str(error)


def _words(body: bytes) -> str:
    return body[:_MAX_WORDS].decode("utf-8", "replace")


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _index(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _seconds(retry_after: str | None) -> float | None:
    """Of `Retry-After` in seconds; a date is left to the client's own patience."""
    try:
        seconds = float(retry_after or "")
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds >= 0 else None
