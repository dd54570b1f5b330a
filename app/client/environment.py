"""What a trainer is told about its reward server: `PUNCHLINE_CLIENT_*`, and arguments, which win. A typo raises and is named."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from math import isfinite
from typing import Any

from app.client.blocking import RewardClient
from app.client.calls import base_urls, check_run_id
from app.client.concurrent import AsyncRewardClient
from app.client.rollouts import Missing, Refused, Rules

PREFIX = "PUNCHLINE_CLIENT_"
_NUM_REQUESTS = 256  # for trainers that ask about one caption at a time: the server puts what is of one picture together again


@dataclass(frozen=True, slots=True)
class Told:
    """Where to ask, how long, and what becomes of completions that cannot be scored. `url`: several with commas. Raises ValueError."""

    url: str
    api_key: str | None = field(default=None, repr=False)
    deadline_s: float = 300.0
    attempt_s: float = 60.0
    fingerprint: str | None = None
    missing: Missing = "whole"
    refused: Refused = "raise"
    run_id: str | None = None
    model: str | None = None

    def __post_init__(self) -> None:
        base_urls(self.urls)
        check_run_id(self.run_id)
        Rules(self.missing, self.refused)
        for name, value in (("deadline_s", self.deadline_s), ("attempt_s", self.attempt_s)):
            if not isinstance(value, int | float) or not isfinite(value) or value <= 0:
                raise ValueError(f"{name} is seconds, more than 0, not {value!r}")

    @property
    def urls(self) -> list[str]:
        return [url.strip() for url in self.url.split(",") if url.strip()]

    @property
    def rules(self) -> Rules:
        return Rules(self.missing, self.refused)

    @property
    def terms(self) -> dict[str, Any]:
        """Of a client, threaded or not."""
        return {name: getattr(self, name) for name in ("api_key", "deadline_s", "attempt_s", "fingerprint", "run_id", "model")}


def told(**given: Any) -> Told:
    """Arguments that are not None over the environment over the defaults. Raises ValueError that names the variable or argument."""
    values = _read(os.environ) | {name: value for name, value in given.items() if value is not None}
    if "url" not in values:
        raise ValueError(f"{PREFIX}URL is not set: the address of the reward server, such as http://127.0.0.1:8000")
    return Told(**values)


def _read(variables: Mapping[str, str]) -> dict[str, Any]:
    """An empty variable is as none."""
    names = {PREFIX + each.name.upper(): each.name for each in fields(Told)}
    ours = {name: text for name, text in variables.items() if name.upper().startswith(PREFIX)}
    if unknown := sorted(ours.keys() - names.keys()):
        raise ValueError(f"unknown {', '.join(unknown)}; there are {', '.join(names)}")
    values = {name: _READERS.get(names[name], str)(text) for name, text in ours.items() if text}
    for name, value in values.items():
        _try_alone(name, names[name], value)
    return {names[name]: value for name, value in values.items()}


def _try_alone(name: str, argument: str, value: Any) -> None:
    """So that the variable is named whose value is wrong."""
    try:
        Told(**({"url": "http://any"} | {argument: value}))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _number(text: str) -> float | str:
    """Or the text, which may be one of the words that stand for a rule."""
    try:
        return float(text)
    except ValueError:
        return text


_READERS: dict[str, Callable[[str], Any]] = dict.fromkeys(("deadline_s", "attempt_s", "missing", "refused"), _number)


def new_client(found: Told) -> AsyncRewardClient:
    return AsyncRewardClient(found.urls, num_requests=_NUM_REQUESTS, **found.terms)


@cache
def client_for(found: Told) -> AsyncRewardClient:
    """One for the whole process: it keeps apart what belongs to an event loop, and starts anew after a fork."""
    return new_client(found)


@cache
def blocking_client_for(found: Told) -> RewardClient:
    """As `client_for`, where there is no event loop to wait in."""
    return RewardClient(found.urls, **found.terms)
