"""The models of the API: strict, frozen, and documented field by field."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from app.api import schemas
from app.api.schemas import (
    Answer,
    CompareRequest,
    GroupAnswer,
    Message,
    Options,
    RankRequest,
    ScoreGroup,
    ScoreRequest,
    Strict,
    json_schema,
)

REQUESTS: dict[type[Strict], dict[str, Any]] = {
    Options: {},
    Message: {"role": "user", "content": "x"},
    ScoreGroup: {"captions": ["x"]},
    ScoreRequest: {"captions": ["x"]},
    CompareRequest: {"a": "x", "b": "y"},
    RankRequest: {"captions": ["x"]},
}


def test_the_table_holds_every_request_model() -> None:
    found = {kind for _, kind in inspect.getmembers(schemas, inspect.isclass) if issubclass(kind, Strict)}
    assert found - {Strict} == set(REQUESTS)


@pytest.mark.parametrize("model", REQUESTS)
def test_the_smallest_request_is_taken_and_frozen(model: type[Strict]) -> None:
    asked = model.model_validate(REQUESTS[model])
    with pytest.raises(ValidationError, match="frozen"):
        asked.prompt = "x"  # type: ignore[attr-defined]


@pytest.mark.parametrize("model", REQUESTS)
def test_a_field_nobody_knows_is_refused(model: type[Strict]) -> None:
    with pytest.raises(ValidationError, match="extra_forbidden"):
        model.model_validate({**REQUESTS[model], "caption_s": []})


@pytest.mark.parametrize("model", REQUESTS)
@pytest.mark.parametrize("value", ["\ud800", "x\udfffy", b"bytes", bytearray(b"x"), 1, 1.5, True, ["x"], {"x": 1}])
def test_no_text_field_takes_anything_but_text(model: type[Strict], value: Any) -> None:
    names = [name for name, field in model.model_fields.items() if "str" in str(field.annotation) and "list" not in str(field.annotation)]
    for name in names:
        with pytest.raises(ValidationError):
            model.model_validate({**REQUESTS[model], name: value})
    assert names or model is Options


def test_captions_may_be_called_responses_and_a_prompt_messages() -> None:
    said = [{"role": "user", "content": "Why?"}]
    asked = ScoreRequest.model_validate({"groups": [{"responses": ["x"], "messages": said}]})
    assert asked.groups is not None
    assert (asked.groups[0].captions, [message.model_dump() for message in asked.groups[0].messages or []]) == (["x"], said)
    for body in (
        {"captions": ["x"], "responses": ["x"]},
        {"captions": ["x"], "prompt": "x", "messages": said},
        {"captions": ["x"], "messages": []},
    ):
        for model in (ScoreRequest, ScoreGroup, RankRequest):
            with pytest.raises(ValidationError):
                model.model_validate(body)


@pytest.mark.parametrize("ids", [["a", "b"], ["a", None, None], [None, "a"], ["", "a"]])
def test_ids_are_the_callers_own(ids: list[str | None]) -> None:
    asked = ScoreRequest.model_validate({"groups": [{"id": name, "captions": ["x"]} for name in ids]})
    assert [group.id for group in asked.groups or []] == ids


def test_two_equal_ids_are_refused() -> None:
    with pytest.raises(ValidationError, match="two groups have the same id"):
        ScoreRequest.model_validate({"groups": [{"id": "a", "captions": ["x"]}] * 2})


def test_answers_refuse_fields_they_do_not_document() -> None:
    kinds = [kind for _, kind in inspect.getmembers(schemas, inspect.isclass) if issubclass(kind, Answer)]
    assert GroupAnswer in kinds
    assert all(kind.model_config["extra"] == "forbid" for kind in kinds)


def test_components_hold_every_model_a_schema_refers_to() -> None:
    found = json_schema(ScoreRequest, RankRequest)
    assert set(found) == {"ScoreRequest", "ScoreGroup", "RankRequest", "Message"}
    assert found["ScoreRequest"]["additionalProperties"] is False
    assert all(issubclass(kind, BaseModel) for kind in REQUESTS)
