"""What a trainer's process is told: every fault named by its variable, arguments over the environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from app.client.environment import PREFIX, Told, blocking_client_for, client_for, new_client, told

URL = "http://rewards:8000"


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def tell(**values: str) -> None:
    os.environ.update({PREFIX + name.upper(): value for name, value in values.items()})


def test_an_address_is_enough() -> None:
    tell(url=URL)
    assert told() == Told(URL)
    assert told().urls == [URL]


def test_without_an_address_nothing_is_guessed() -> None:
    with pytest.raises(ValueError, match="PUNCHLINE_CLIENT_URL"):
        told()


def test_everything_can_be_told() -> None:
    tell(
        url="http://a, http://b/",
        api_key="key",
        deadline_s="30",
        attempt_s="1.5",
        fingerprint="f",
        missing="none",
        refused="-5",
        run_id="grpo-7",
        model="humor",
    )
    found = told()
    assert found == Told("http://a, http://b/", "key", 30.0, 1.5, "f", "none", -5.0, "grpo-7", "humor")
    assert (found.terms["run_id"], found.terms["model"]) == ("grpo-7", "humor")
    assert found.urls == ["http://a", "http://b/"]
    assert found.rules.may_give_none
    assert "key'" not in repr(found)


def test_arguments_win_and_none_is_no_argument() -> None:
    tell(url=URL, missing="raise", deadline_s="30")
    assert told(url="http://other", missing="whole", deadline_s=None) == Told("http://other", missing="whole", deadline_s=30.0)


def test_an_empty_variable_is_as_none() -> None:
    tell(url=URL, api_key="", deadline_s="")
    assert told() == Told(URL)


@pytest.mark.parametrize("name", ["PUNCHLINE_CLIENT_ULR", "PUNCHLINE_CLIENT_", "punchline_client_url", "PUNCHLINE_CLIENT_DEADLINE"])
def test_a_typo_is_named(name: str) -> None:
    tell(url=URL)
    os.environ[name] = "1"
    with pytest.raises(ValueError, match=rf"unknown {name};"):
        told()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("url", "rewards:8000"),
        ("url", ","),
        ("url", "http://a,http://a"),
        ("run_id", "a/b"),
        ("deadline_s", "soon"),
        ("deadline_s", "0"),
        ("deadline_s", "-1"),
        ("deadline_s", "nan"),
        ("attempt_s", "inf"),
        ("missing", "hole"),
        ("missing", "nan"),
        ("refused", "whole"),
    ],
)
def test_a_bad_value_is_named(name: str, value: str) -> None:
    tell(**{"url": URL} | {name: value})
    with pytest.raises(ValueError, match=PREFIX + name.upper()):
        told()


@pytest.mark.parametrize("given", [{"url": "rewards"}, {"missing": "hole"}, {"deadline_s": "30"}, {"attempt_s": 0}])
def test_a_bad_argument_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r".+"):
        told(**{"url": URL} | given)


def test_an_unknown_argument_is_refused() -> None:
    with pytest.raises(TypeError, match="ulr"):
        told(url=URL, ulr="http://a")


def test_variables_of_the_server_are_none_of_the_clients() -> None:
    os.environ["PUNCHLINE_MODEL"] = "demo"
    tell(url=URL)
    assert told() == Told(URL)


def test_one_client_for_what_was_told_the_same() -> None:
    assert client_for(told(url=URL)) is client_for(told(url=URL)) is not client_for(told(url="http://b"))
    assert blocking_client_for(told(url=URL)) is blocking_client_for(told(url=URL))
    assert new_client(told(url=URL)) is not client_for(told(url=URL))
