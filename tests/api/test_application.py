"""`create_app`: the OpenAPI document is whole and true, and Starlette's own faults have our shape."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException

from app.api import schemas
from app.api.dialects.table import PATHS
from tests.fakes import Served, picture

pytestmark = pytest.mark.anyio

ROUTES = {
    ("get", "/runs"),
    ("get", "/runs/{run_id}/statistics"),
    ("post", "/score"),
    ("post", "/compare"),
    ("post", "/rank"),
    ("put", "/images"),
    ("post", "/selftest"),
    ("get", "/livez"),
    ("get", "/readyz"),
    ("get", "/info"),
    ("get", "/metrics"),
    ("get", "/v1/models"),
    *(("post", path) for path in PATHS),
}


async def document(served: Served) -> dict[str, Any]:
    return dict((await served.client.get("/openapi.json")).json())


def operations(openapi: dict[str, Any]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path, methods in openapi["paths"].items():
        for method, operation in methods.items():
            yield method, path, operation


def references(node: Any) -> Iterator[str]:
    if isinstance(node, dict):
        yield from (value for name, value in node.items() if name == "$ref")
        node = list(node.values())
    if isinstance(node, list):
        for inner in node:
            yield from references(inner)


async def test_openapi_lists_every_route(application: Served) -> None:
    openapi = await document(application)
    assert re.fullmatch(r"3\.1\.\d", openapi["openapi"])
    assert {"title", "version"} <= set(openapi["info"])
    assert {(method, path) for method, path, _ in operations(openapi)} == ROUTES
    ids = [operation["operationId"] for _, _, operation in operations(openapi)]
    assert len(set(ids)) == len(ids)
    assert all(operation["summary"] and operation["responses"]["200"] for _, _, operation in operations(openapi))


async def test_openapi_refers_only_to_what_it_holds(application: Served) -> None:
    openapi = await document(application)
    known = {f"#/components/schemas/{name}" for name in openapi["components"]["schemas"]}
    found = set(references(openapi))
    assert found <= known
    assert len(found) > 10


@pytest.mark.parametrize("path", ["/score", "/compare", "/rank", "/images", *sorted(PATHS)])
async def test_openapi_names_the_faults_of_every_scoring_route(application: Served, path: str) -> None:
    (operation,) = (await document(application))["paths"][path].values()
    assert {"200", "400", "401", "404", "413", "415", "422", "500", "503"} <= set(operation["responses"])
    for status, response in operation["responses"].items():
        schema = response["content"]["application/json"]["schema"]
        assert status == "200" or schema == {"$ref": "#/components/schemas/ErrorAnswer"}
    assert "multipart/form-data" in operation["requestBody"]["content"] or path in PATHS


async def test_openapi_examples_are_requests_that_are_answered(application: Served) -> None:
    openapi = await document(application)
    num_examples = 0
    for method, path, operation in operations(openapi):
        content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
        for example in content.get("examples", {}).values():
            body = _with_picture(example["value"])
            answer = await application.client.request(method, path, json=body)
            assert answer.status_code == 200, answer.text
            num_examples += 1
    assert num_examples == 4


def _with_picture(value: Any) -> Any:
    """The example with a picture the server holds in the place of its made-up id."""
    if isinstance(value, dict):
        return {name: _with_picture(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_with_picture(inner) for inner in value]
    return base64.b64encode(picture()).decode() if value == schemas.IMAGE_EXAMPLE else value


async def test_openapi_forms_name_the_parts_that_are_read(application: Served) -> None:
    openapi = await document(application)
    names: dict[str, type[schemas.Strict]] = {
        "/score": schemas.ScoreRequest,
        "/compare": schemas.CompareRequest,
        "/rank": schemas.RankRequest,
    }
    for path, model in names.items():
        form = openapi["paths"][path]["post"]["requestBody"]["content"]["multipart/form-data"]["schema"]
        parts = {"captions" if name == "caption" else name for name in form["properties"]}
        assert parts == set(model.model_fields) - {"groups", "messages"}  # of JSON alone
        assert form["additionalProperties"] is False


async def test_openapi_is_made_once(application: Served) -> None:
    first = application.app.openapi()
    assert application.app.openapi() is first


@pytest.mark.parametrize(("status", "code"), [(400, "bad_request"), (404, "not_found"), (405, "method_not_allowed"), (418, "bad_request")])
async def test_exceptions_of_starlette_have_our_shape(application: Served, status: int, code: str) -> None:
    async def broken() -> None:
        raise HTTPException(status, detail="echo of <input>", headers={"Allow": "POST"})

    application.app.router.routes.insert(0, APIRoute("/info", broken))
    answer = await application.client.get("/info")
    assert answer.status_code == (status if status != 418 else 400)
    assert answer.json()["error"]["code"] == code
    assert "<input>" not in answer.text
    assert "allow" in answer.headers or status == 404


async def test_a_route_that_nothing_would_count_is_none(application: Served) -> None:
    """As one whose name a line end follows, which a router's pattern lets pass."""
    application.app.add_api_route("/uncounted", application.app.openapi)
    for path in ("/uncounted", "/livez%0a", "/info%0A", "/runs/x%0a"):
        answer = await application.client.get(path)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found"), path
    answer = await application.client.post("/score%0a", json={"captions": ["x"]})
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "not_found")
    assert application.scorer.batches == []


async def test_an_error_nobody_foresaw_is_500_in_our_shape(application: Served) -> None:
    async def broken() -> None:
        raise KeyError("secret")

    application.app.router.routes.insert(0, APIRoute("/info", broken))
    answer = await application.client.get("/info")
    assert (answer.status_code, answer.json()["error"]["code"]) == (500, "internal_error")
    assert "secret" not in answer.text
    assert (await application.client.get("/livez")).status_code == 200
