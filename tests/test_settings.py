"""Settings: defaults that load, and every fault named before anything starts."""

from __future__ import annotations

import inspect
import json
import os
from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from app.errors import SettingsInvalid
from app.settings import DECODABLE, MAX_PIXELS, PREFIX, Settings, load_settings

KEY, SECOND = "correct-horse-battery-staple", "another-key-for-the-rotation"


class Environment:
    """PUNCHLINE_* variables of one test."""

    def set(self, **values: str) -> None:
        os.environ.update({PREFIX + name.upper(): value for name, value in values.items()})


@pytest.fixture
def environment() -> Iterator[Environment]:
    """Our variables only, and none of them left behind."""
    before = dict(os.environ)
    yield Environment()
    os.environ.clear()
    os.environ.update(before)


def fault(**flags: Any) -> str:
    with pytest.raises(SettingsInvalid) as caught:
        load_settings(**flags)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_the_defaults_load() -> None:
    settings = load_settings()
    for name, field in Settings.model_fields.items():
        assert getattr(settings, name) == field.default


@pytest.mark.parametrize("name", Settings.model_fields)
def test_every_default_is_within_its_own_range_and_described(name: str) -> None:
    field = Settings.model_fields[name]
    assert field.description
    assert field.description[0].isupper()
    assert field.description.endswith(".")
    assert field.default is None or getattr(load_settings(**{name: field.default}), name) == field.default


@pytest.mark.parametrize("name", [name for name, field in Settings.model_fields.items() if field.annotation in (int, float)])
def test_every_number_has_a_range(name: str) -> None:
    bounds = {type(bound).__name__ for bound in Settings.model_fields[name].metadata}
    assert bounds & {"Ge", "Gt"}
    assert bounds & {"Le", "Lt"}


@pytest.mark.parametrize("variable", ["PUNCHLINE_MAX_BATHC", "punchline_max_bathc", "PUNCHLINE_", "Punchline_Api-Key"])
def test_a_typo_in_the_environment_is_named(environment: Environment, variable: str) -> None:
    os.environ[variable] = "1"
    assert fault() == f"unknown setting {variable}; see `punchline serve --help`"


def test_every_typo_is_named(environment: Environment) -> None:
    environment.set(b_typo="1", a_typo="1", port="1")
    assert "PUNCHLINE_A_TYPO, PUNCHLINE_B_TYPO" in fault()


def test_what_clients_are_told_is_not_the_servers(environment: Environment) -> None:
    environment.set(client_url="http://127.0.0.1:8000", client_anything="1", port="1")
    assert load_settings().port == 1
    assert not {name for name in Settings.model_fields if name.startswith("client_")}
    environment.set(clients_url="1")
    assert "PUNCHLINE_CLIENTS_URL" in fault()


def test_variables_of_others_are_none_of_ours(environment: Environment) -> None:
    os.environ["PUNCH_LINE_PORT"] = os.environ["PORT"] = "1"
    assert load_settings().port == 8000


def test_an_unknown_flag_is_named() -> None:
    assert fault(max_bathc=1).startswith("PUNCHLINE_MAX_BATHC: ")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "-1"),
        ("port", "65536"),
        ("port", "eighty"),
        ("port", "8000.5"),
        ("device", "tpu"),
        ("device", "cuda:"),
        ("device", "cuda:0\nx"),
        ("dtype", "float16"),
        ("lora", "yes"),
        ("offline", "maybe"),
        ("log_level", "INFO "),
        ("keep_alive_s", "0"),
        ("body_timeout_s", "0"),
        ("body_timeout_s", "nan"),
        ("body_timeout_s", "inf"),
        ("max_image_aspect", "0.5"),
        ("max_image_aspect", "nan"),
        ("max_image_pixels", str(MAX_PIXELS + 1)),
        ("max_captions", "0"),
        ("max_batch_tokens", "1e4"),
        ("default_timeout_ms", "0"),
        ("num_encode_threads", "0"),
        ("image_store_bytes", "-1"),
        ("num_threads", "1" * 5000),
    ],
)
def test_a_value_out_of_its_range_is_named_and_not_shown(environment: Environment, name: str, value: str) -> None:
    environment.set(**{name: value})
    text = fault()
    assert text.startswith(f"PUNCHLINE_{name.upper()}: ")
    assert len(text) < 200


def test_every_fault_is_named_at_once(environment: Environment) -> None:
    environment.set(port="-1", device="tpu")
    assert {part.partition(":")[0] for part in fault().split("; ")} == {"PUNCHLINE_PORT", "PUNCHLINE_DEVICE"}


GUESSABLE = [
    "changemechangeme",
    "x" * 24,
    "abcdeabcdeabcdeabcde",
    "Change-Me_changeme_12",
    "punchline-api-key-2026",
    "PASSWORDPASSWORD",
    "default.secret.key",
]
CONTRADICTIONS: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    ({"max_batch_tokens": 4096, "max_queue_tokens": 4095}, ("max_batch_tokens", "max_queue_tokens")),
    ({"max_captions": 65, "max_queue_items": 64}, ("max_captions", "max_queue_items")),
    ({"default_timeout_ms": 1001, "max_timeout_ms": 1000}, ("default_timeout_ms", "max_timeout_ms")),
    ({"max_image_bytes": 2049, "max_body_bytes": 2048}, ("max_image_bytes", "max_body_bytes")),
    ({"max_body_bytes": 2049, "max_pending_body_bytes": 2048}, ("max_body_bytes", "max_pending_body_bytes")),
    ({"default_timeout_ms": 1001, "drain_s": 1}, ("default_timeout_ms", "drain_s")),
    ({"header_timeout_s": 10.5, "keep_alive_s": 10}, ("header_timeout_s", "keep_alive_s")),
    ({"image_formats": ""}, ("image_formats",)),
    ({"image_formats": " , ,"}, ("image_formats",)),
    ({"image_formats": "PNG,TIFF"}, ("image_formats", *sorted(DECODABLE))),
    ({"image_formats": "PNG;JPEG"}, ("image_formats",)),
    ({"api_key": "changeme"}, ("api_key", "16")),
    ({"api_key": f"{KEY},default"}, ("api_key", "16")),
    ({"api_key": "x" * 15 + "\n"}, ("api_key", "16")),
    ({"api_key": ""}, ("api_key", "no key")),
    ({"api_key": " , \n"}, ("api_key", "no key")),
    ({"api_key": "sixteen-letters-é"}, ("api_key", "ASCII")),
    ({"api_key": "a key with spaces in it"}, ("api_key", "spaces")),
    ({"api_key": "a-key-with-a-\x00-inside"}, ("api_key", "printable")),
    *(({"api_key": key}, ("api_key", "guessed", "openssl")) for key in GUESSABLE),
    ({"api_key": f"{KEY},{GUESSABLE[0]}"}, ("api_key", "guessed")),
    ({"require_auth": True}, ("require_auth", "api_key")),
    ({"models": "a=one,nameless"}, ("models", "name=ARTIFACT", "'nameless'")),
    ({"models": "a=one,a=two"}, ("models", "same name")),
    ({"model": "a b=one"}, ("model", "name=ARTIFACT")),
]


@pytest.mark.parametrize(("flags", "words"), CONTRADICTIONS)
def test_a_contradiction_names_both_sides_and_no_secret(flags: dict[str, Any], words: tuple[str, ...]) -> None:
    text = fault(**flags)
    assert all(word in text for word in words)
    assert "True" not in text
    key = flags.get("api_key", "").strip(" ,\n")
    assert not key or key not in text


def test_the_table_of_contradictions_covers_every_check() -> None:
    """Each `raise ValueError` of the validators is met by a row above."""
    source = inspect.getsource(Settings)
    assert source.count("raise ValueError") == len({fault(**flags) for flags, _ in CONTRADICTIONS})


@pytest.mark.parametrize(
    "flags",
    [
        {"max_batch_tokens": 4096, "max_queue_tokens": 4096},
        {"max_captions": 64, "max_queue_items": 64},
        {"default_timeout_ms": 1000, "max_timeout_ms": 1000},
        {"max_image_bytes": 2048, "max_body_bytes": 2048},
        {"default_timeout_ms": 1000, "drain_s": 1},
        {"header_timeout_s": 10.0, "keep_alive_s": 10},
        {"require_auth": True, "api_key": KEY},
        {"api_key": "abcdefabcdefabcd"},
        {"api_key": "4929174460318825"},
        {"api_key": "production-secret-key"},
        {"api_key": "punchline-key-b1946ac92492d234"},
        {"image_formats": "png, WebP ,"},
        {"max_image_pixels": MAX_PIXELS},
        {"device": "cuda:1"},
    ],
)
def test_what_only_touches_a_limit_loads(flags: dict[str, Any]) -> None:
    settings = load_settings(**flags)
    for name, value in flags.items():
        found = getattr(settings, name)
        assert (found.get_secret_value() if name == "api_key" else found) == value


def test_a_deadline_that_is_asked_for_may_be_longer_than_a_drain() -> None:
    """`max_timeout_ms` is a limit, not what requests get: holding it under `drain_s` would make every stop as long as the longest
    request anyone may ask for. A request that asked for more than is left when a server stops gets its 503 at the drain's end,
    as tests/e2e/test_draining.py shows; the reliability page would rather refuse the start."""
    settings = load_settings(max_timeout_ms=600_000, drain_s=10)
    assert settings.max_timeout_ms > settings.drain_s * 1000


def test_flags_win_over_the_environment_and_the_environment_over_defaults(environment: Environment) -> None:
    environment.set(port="9000", model="from-environment")
    os.environ.update({"punchline_offline": "true"})
    settings = load_settings(port=9001, model=None)
    assert (settings.port, settings.model, settings.offline, settings.host) == (9001, "from-environment", True, "127.0.0.1")


def test_an_empty_variable_is_no_setting(environment: Environment) -> None:
    environment.set(port="", api_key="", base_model="")
    settings = load_settings()
    assert (settings.port, settings.api_key, settings.base_model) == (8000, None, None)


def test_names_of_formats_and_keys_are_read_leniently() -> None:
    settings = load_settings(image_formats=" png,WebP, ,", api_key=f" {KEY} ,\n{SECOND}\n")
    assert settings.formats == ("PNG", "WEBP")
    assert settings.api_keys == (KEY, SECOND)
    assert load_settings().api_keys == ()


def test_no_way_of_showing_settings_shows_a_key() -> None:
    settings = load_settings(api_key=f"{KEY},{SECOND}")
    shown = [json.dumps(settings.redacted()), repr(settings), str(settings), settings.model_dump_json(), f"{settings!r:>10}"]
    assert not any(secret in text for text in shown for secret in (KEY, SECOND))
    assert settings.redacted()["api_key"] == "***"
    assert load_settings().redacted()["api_key"] is None
    assert set(settings.redacted()) == set(Settings.model_fields)


def test_settings_are_frozen() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_settings().port = 1  # type: ignore[misc]


def test_the_flags_of_serve_are_the_settings() -> None:
    import typer

    from app.cli import app

    serve = typer.main.get_command(app).commands["serve"]  # type: ignore[attr-defined]
    flags = {option.name: option for option in serve.params}
    assert set(flags) - {"help"} == set(Settings.model_fields)
    for name, field in Settings.model_fields.items():
        assert flags[name].default is None, "an absent flag must leave the environment its say"
        assert f"--{name.replace('_', '-')}" in flags[name].opts
        assert PREFIX + name.upper() in flags[name].help
        assert str(field.description) in flags[name].help


def test_more_runs_than_a_scrape_can_bear_are_refused() -> None:
    assert Settings(max_runs=128).max_runs == 128
    with pytest.raises(ValueError, match="max_runs"):
        Settings(max_runs=129)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        ({}, {"demo": "demo"}),
        ({"model": "humor=/models/humor"}, {"humor": "/models/humor"}),
        ({"model": "/models/step=7"}, {"/models/step=7": "/models/step=7"}),
        ({"model": "./step=7"}, {"./step=7": "./step=7"}),
        ({"models": "a=one, org/b.c-d_e = two=2 ,"}, None),
        ({"models": "a=one, org/b.c-d_e=two=2 ,"}, {"demo": "demo", "a": "one", "org/b.c-d_e": "two=2"}),
        ({"model": "x=one", "models": "y=owner/name@main"}, {"x": "one", "y": "owner/name@main"}),
        ({"model": "demo", "models": "demo=other"}, None),
        ({"models": "=one"}, None),
        ({"models": "a="}, None),
        ({"models": f"{'a' * 65}=one"}, None),
        ({"models": f"{'a' * 64}=one"}, {"demo": "demo", "a" * 64: "one"}),
        ({"models": "a~b=one"}, None),
        ({"models": "-a=one"}, None),
        ({"model": "=one"}, None),
        ({"model": "a="}, None),
    ],
)
def test_every_model_has_a_name_of_its_own(flags: dict[str, Any], found: dict[str, str] | None) -> None:
    """None: refused."""
    if found is None:
        assert fault(**flags).startswith("model")
    else:
        assert list(load_settings(**flags).artifacts.items()) == list(found.items())
