"""The routes: read, ask the service, answer. Everything they know of scoring is the service's one method."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import PlainTextResponse, Response

from app.api.answers import JsonAnswer
from app.api.card import Card, ModelCard
from app.api.leaving import unless_gone
from app.api.middleware import exchange_of
from app.api.requests import check_fingerprint, group_request, model_of, read_image, read_params, read_request, run_id_of, timeout_s
from app.api.schemas import (
    CAPTIONS_EXAMPLE,
    IMAGE_EXAMPLE,
    RUN_ID,
    CompareAnswer,
    CompareRequest,
    ErrorAnswer,
    Explanation,
    GroupAnswer,
    GroupsAnswer,
    ImageAnswer,
    ItemError,
    Options,
    Pair,
    RankAnswer,
    RankedCaption,
    RankRequest,
    ScoreAnswer,
    ScoreRequest,
    SelfTestAnswer,
    StatusAnswer,
    Usage,
)
from app.errors import InvalidRequest, NotReady
from app.preference import compare, rank
from app.service import GroupRequest, GroupResult, OnItemError
from app.settings import Settings

ERRORS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorAnswer, "description": "The body cannot be read."},
    401: {"model": ErrorAnswer, "description": "A key is needed."},
    403: {"model": ErrorAnswer, "description": "An image's address is not one that images are fetched from."},
    404: {"model": ErrorAnswer, "description": "`image_unknown`: send the image's bytes. `model_unknown`: none of this name is served."},
    412: {"model": ErrorAnswer, "description": "Another model is loaded than `expect_fingerprint`."},
    413: {"model": ErrorAnswer, "description": "Larger than a limit."},
    415: {"model": ErrorAnswer, "description": "Neither JSON nor multipart, or an image format that is not allowed."},
    422: {"model": ErrorAnswer, "description": "Not of the documented shape, or a caption or image that cannot be scored."},
    500: {"model": ErrorAnswer, "description": "The forward pass failed."},
    502: {"model": ErrorAnswer, "description": "The host of an image that was named by its address failed."},
    503: {"model": ErrorAnswer, "description": "Overloaded, draining or too late; `Retry-After` says when to come back."},
    504: {"model": ErrorAnswer, "description": "The device, or the host of an image, did not answer in time."},
}
_NOT_NOW: dict[int | str, dict[str, Any]] = {503: {"model": ErrorAnswer, "description": "Not so, or not now."}}
_STATE_ERRORS: dict[int | str, dict[str, Any]] = {401: ERRORS[401], **_NOT_NOW}
_JSON_ERROR = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorAnswer"}}}, "description": "A key is needed."}


_RUN = {"type": "string", "pattern": RUN_ID}
_RUN_HEADER = {"name": "X-Run-Id", "in": "header", "schema": _RUN, "description": "As the field run_id, which must not differ from it."}


def _body(model: str, form: dict[str, Any], required: Sequence[str], examples: dict[str, Any]) -> dict[str, Any]:
    """A route's two request bodies; each example is a whole request that the model takes."""
    shown = {name: {"value": value} for name, value in examples.items()}
    json = {"schema": {"$ref": f"#/components/schemas/{model}"}, "examples": shown}
    schema = {"type": "object", "properties": form, "required": list(required), "additionalProperties": False}
    content = {"application/json": json, "multipart/form-data": {"schema": schema}}
    return {"requestBody": {"required": True, "content": content}, "parameters": [_RUN_HEADER]}


_GROUP_EXAMPLE = {"image": IMAGE_EXAMPLE, "captions": CAPTIONS_EXAMPLE}
_PAIR_EXAMPLE = {"image": IMAGE_EXAMPLE, "a": CAPTIONS_EXAMPLE[0], "b": CAPTIONS_EXAMPLE[1]}
_FILE = {"type": "string", "format": "binary"}
_TEXT = {"type": "string"}
_CAPTIONS = {"type": "array", "items": _TEXT, "minItems": 1, "description": "Repeat the part once a caption."}
_FORM_OPTIONS = {"model": _TEXT, "expect_fingerprint": _TEXT, "timeout_ms": {"type": "integer", "minimum": 1}, "run_id": _RUN}
_SCORE_BODY = _body(
    "ScoreRequest",
    {
        "image": _FILE,
        "prompt": _TEXT,
        "caption": _CAPTIONS,
        "on_item_error": {"type": "string", "enum": ["fail", "null"]},
        "explain": {"type": "boolean"},
        **_FORM_OPTIONS,
    },
    ["caption"],
    {"one group": _GROUP_EXAMPLE, "several groups": {"groups": [{"id": "step-7/0", **_GROUP_EXAMPLE}]}},
)
_COMPARE_BODY = _body(
    "CompareRequest", {"image": _FILE, "prompt": _TEXT, "a": _TEXT, "b": _TEXT, **_FORM_OPTIONS}, ["a", "b"], {"a pair": _PAIR_EXAMPLE}
)
_RANK_BODY = _body(
    "RankRequest", {"image": _FILE, "prompt": _TEXT, "caption": _CAPTIONS, **_FORM_OPTIONS}, ["caption"], {"one group": _GROUP_EXAMPLE}
)
_IMAGE_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/octet-stream": {"schema": _FILE},
            "multipart/form-data": {"schema": {"type": "object", "properties": {"image": _FILE}, "required": ["image"]}},
        },
    }
}


class _MetricsText(PlainTextResponse):
    media_type = CONTENT_TYPE_LATEST


class Routes:
    """The handlers, given what they need once."""

    def __init__(self, settings: Settings, card: Card) -> None:
        self._settings = settings
        self._card = card

    def router(self) -> APIRouter:
        """All routes, ready to be included."""
        router = APIRouter(default_response_class=JsonAnswer)
        scoring: dict[str, Any] = {"methods": ["POST"], "responses": ERRORS, "tags": ["scoring"]}
        router.add_api_route(
            "/score", self.score, response_model=ScoreAnswer | GroupsAnswer, openapi_extra=_SCORE_BODY, summary="Score captions", **scoring
        )
        router.add_api_route(
            "/compare",
            self.compare,
            response_model=CompareAnswer,
            openapi_extra=_COMPARE_BODY,
            summary="Which of two is preferred",
            **scoring,
        )
        router.add_api_route(
            "/rank", self.rank, response_model=RankAnswer, openapi_extra=_RANK_BODY, summary="Captions, best first", **scoring
        )
        router.add_api_route(
            "/images",
            self.put_image,
            methods=["PUT"],
            response_model=ImageAnswer,
            openapi_extra=_IMAGE_BODY,
            responses=ERRORS,
            tags=["scoring"],
            summary="Send an image once, name it by id afterwards",
        )
        state: dict[str, Any] = {"responses": _NOT_NOW, "tags": ["state"]}  # of the two that need no key
        router.add_api_route("/livez", self.livez, response_model=StatusAnswer, summary="The process and its batch loop live", **state)
        router.add_api_route("/readyz", self.readyz, response_model=StatusAnswer, summary="Golden scores matched, not draining", **state)
        for path, handler in (("/livez", self.livez), ("/readyz", self.readyz)):
            router.add_api_route(path, handler, methods=["HEAD"], include_in_schema=False)  # as `wget --spider` asks
        state["responses"] = _STATE_ERRORS
        router.add_api_route("/info", self.info, summary="What is loaded", response_model=dict[str, Any], **state)
        failed = {500: {"model": SelfTestAnswer | ErrorAnswer, "description": "Other scores than the golden ones, or none."}}
        state["responses"] = _STATE_ERRORS | failed | {status: ERRORS[status] for status in (404, 422)}  # of `model`
        router.add_api_route(
            "/selftest", self.selftest, methods=["POST"], response_model=SelfTestAnswer, summary="Golden scores, now", **state
        )
        state["responses"] = {401: _JSON_ERROR}  # a model would be documented as of the answer's own type
        router.add_api_route("/metrics", self.metrics, summary="Prometheus metrics", response_class=_MetricsText, **state)
        return router

    async def score(self, request: Request) -> Response:
        """One group gives `scores`; several in `groups` give `groups`, in the same order."""
        asked, image = await read_request(request, ScoreRequest, self._settings)
        lists = [asked.captions or [], *(group.captions for group in asked.groups or [])]
        with self._checks(request, asked, sum(map(len, lists))) as (model, deadline):
            wanted, run_id = self._groups(asked, image), run_id_of(request, asked.run_id)
        results = await self._score(request, model, wanted, deadline, run_id, asked.on_item_error, asked.explain)
        if asked.groups is None:
            return JsonAnswer(ScoreAnswer(**_group_fields(results[0], asked.on_item_error), **self._signature(request)))
        answers = [
            GroupAnswer(**_group_fields(result, asked.on_item_error), **({} if group.id is None else {"id": group.id}))
            for group, result in zip(asked.groups, results, strict=True)
        ]
        return JsonAnswer(GroupsAnswer(groups=answers, **self._signature(request)))

    async def compare(self, request: Request) -> Response:
        """Both captions are scored alone, so there is no position bias: swapping them mirrors the answer exactly."""
        asked, image = await read_request(request, CompareRequest, self._settings)
        with self._checks(request, asked, 2) as (model, deadline):
            wanted = group_request(asked, (asked.a, asked.b), image, "", self._settings, ("a", "b"))
            run_id = run_id_of(request, asked.run_id)
        (result,) = await self._score(request, model, [wanted], deadline, run_id)
        score_a, score_b = _all_scores(result)
        found = compare(score_a, score_b, model.temperature)
        return JsonAnswer(
            CompareAnswer(
                preferred=found.preferred,
                probability_a=found.probability_a,
                margin=found.margin,
                scores=Pair(a=score_a, b=score_b),
                **_common_fields(result),
                **self._signature(request),
            )
        )

    async def rank(self, request: Request) -> Response:
        """Best first; equal scores share a rank and are marked."""
        asked, image = await read_request(request, RankRequest, self._settings)
        with self._checks(request, asked, len(asked.captions)) as (model, deadline):
            wanted, run_id = group_request(asked, asked.captions, image, "", self._settings), run_id_of(request, asked.run_id)
        (result,) = await self._score(request, model, [wanted], deadline, run_id)
        ranking = [
            RankedCaption(
                rank=place.rank,
                index=place.index,
                caption=asked.captions[place.index],
                score=place.score,
                win_probability=place.win_probability,
                tied=place.tied,
            )
            for place in rank(_all_scores(result), model.temperature)
        ]
        return JsonAnswer(RankAnswer(ranking=ranking, **_common_fields(result), **self._signature(request)))

    async def put_image(self, request: Request) -> Response:
        """Raw bytes or a multipart part named `image`; checked and decoded now, so that later requests only name it, to any model.

        `tokens` are those of the first model that takes images.
        """
        data, caller = await read_image(request, self._settings), exchange_of(request.scope).caller
        service = self._card.models.seeing.service
        stored = await unless_gone(request, service.add_image(data, timeout_s=self._settings.default_timeout_ms / 1000, caller=caller))
        return JsonAnswer(
            ImageAnswer(
                image_id=stored.image_id,
                width=stored.width,
                height=stored.height,
                tokens=stored.num_tokens,
                request_id=exchange_of(request.scope).request_id,
            )
        )

    async def selftest(self, request: Request, model: str | None = None) -> Response:
        """Scores the artifact's golden items through the real queue and compares; of every model, unless one is named."""
        read_params(request, {"model"})
        models = list(self._card.models) if model is None else [self._card.models.named(model)]
        reports = {each.name: await each.run_selftest() for each in models}
        shown = next((each for each in models if not reports[each.name].passed), models[0])
        report = reports[shown.name]
        several = {} if len(models) == 1 else {"models": {name: each.as_dict() for name, each in reports.items()}}
        exchange_of(request.scope).fingerprint = shown.fingerprint
        answer = SelfTestAnswer(**report.as_dict(), **several, **self._signature(request))
        return JsonAnswer(answer, status_code=200 if report.passed else 500)

    async def livez(self) -> Response:
        """503 once the batch loop is dead: restart the process."""
        if not self._card.alive:
            raise NotReady("the batch loop is not running")
        return JsonAnswer(StatusAnswer(status="alive"))

    async def readyz(self) -> Response:
        """503 until golden scores matched and while draining: send traffic elsewhere."""
        if not self._card.ready:
            raise NotReady("not ready")
        return JsonAnswer(StatusAnswer(status="ready"))

    async def info(self) -> Response:
        """The model card of what is loaded, and the effective settings."""
        return JsonAnswer(self._card.as_dict())

    async def metrics(self) -> Response:
        """Prometheus' text format."""
        return _MetricsText(generate_latest(self._card.registry))

    @contextmanager
    def _checks(self, request: Request, asked: Options, num_captions: int) -> Iterator[tuple[ModelCard, float]]:
        """For what can still be wrong with a request that could be read; gives its model and the seconds until its deadline."""
        model = model_of(request, self._card.models, asked.model, num_captions)
        with model.service.refusing(num_captions):
            check_fingerprint(asked, model.fingerprint)
            yield model, timeout_s(asked, self._settings)

    def _groups(self, asked: ScoreRequest, image: bytes | None) -> list[GroupRequest]:
        if asked.groups is None:
            return [group_request(asked, asked.captions or [], image, "", self._settings)]
        if image is not None:
            raise InvalidRequest("a file goes with captions, not with groups", field="image")
        return [group_request(group, group.captions, None, f"groups[{index}]", self._settings) for index, group in enumerate(asked.groups)]

    async def _score(
        self,
        request: Request,
        model: ModelCard,
        groups: list[GroupRequest],
        deadline: float,
        run_id: str | None,
        on_item_error: OnItemError = "fail",
        explain: bool = False,
    ) -> list[GroupResult]:
        exchange = exchange_of(request.scope)
        work = model.service.score(
            groups,
            timeout_s=deadline,
            on_item_error=on_item_error,
            explain=explain,
            timing=exchange.timing,
            caller=exchange.caller,
            run_id=run_id,
        )
        return await unless_gone(request, work)

    def _signature(self, request: Request) -> dict[str, str]:
        exchange = exchange_of(request.scope)
        return {"model_fingerprint": exchange.fingerprint, "request_id": exchange.request_id}


def _common_fields(result: GroupResult) -> dict[str, Any]:
    usage = Usage(
        captions=len(result.scores),
        tokens=result.num_tokens,
        computed_tokens=result.num_computed_tokens,
        cached_tokens=result.num_cached_tokens,
    )
    warnings = {"warnings": ["prompt_truncated"]} if result.truncated_prompt else {}
    return {"image_id": result.image_id, "usage": usage, **warnings}


def _group_fields(result: GroupResult, on_item_error: OnItemError) -> dict[str, Any]:
    fields = {"scores": list(result.scores), **_common_fields(result)}
    if on_item_error == "null":
        fields["errors"] = [error and ItemError(code=error.code, message=error.message) for error in result.errors]
    if result.explanation is not None:
        fields["explain"] = Explanation(**result.explanation.as_dict())
    return fields


def _all_scores(result: GroupResult) -> list[float]:
    return [score for score in result.scores if score is not None]
