"""One route for every row of the table: read the body, ask the service, answer as the dialect does. There is no other way to score."""

from __future__ import annotations

import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from app.api.answers import JsonAnswer
from app.api.card import ModelCard, Models
from app.api.dialects.asked import Asked, Asking, Item, Scored, grouped
from app.api.dialects.table import DIALECTS, Dialect
from app.api.dialects.wire import Engine, Peer
from app.api.leaving import unless_gone
from app.api.middleware import exchange_of
from app.api.requests import (
    check_caption_size,
    check_fingerprint,
    check_prompt_size,
    model_of,
    read_json,
    read_options,
    run_id_of,
    timeout_s,
)
from app.api.schemas import Options
from app.errors import ApiError, CaptionTooLarge, InvalidRequest, TooManyItems
from app.service import GroupRequest, GroupResult, OnItemError
from app.settings import Settings


class DialectRoutes:
    """The handlers, given what they need once."""

    def __init__(self, settings: Settings, models: Models, errors: dict[int | str, dict[str, Any]]) -> None:
        """`errors`: what the schema says of answers other than scores."""
        self._settings = settings
        self._models = models
        self._errors = errors
        self._since = int(time.time())

    def router(self) -> APIRouter:
        """All routes, ready to be included."""
        router = APIRouter(default_response_class=JsonAnswer, tags=["dialects"])
        for dialect in DIALECTS:
            router.add_api_route(
                dialect.path,
                self._handler(dialect),
                methods=["POST"],
                name=dialect.path,
                summary=f"As {dialect.of}",
                responses=self._errors,
                response_model=Any,
                openapi_extra=_body(dialect),
            )
        state: dict[int | str, dict[str, Any]] = {code: answer for code, answer in self._errors.items() if code == 401}
        router.add_api_route("/v1/models", self.models, response_model=dict[str, Any], responses=state, summary="As OpenAI")
        return router

    async def models(self) -> Response:
        """The models that are loaded, the first one first, each with its fingerprint."""
        same = {"object": "model", "created": self._since, "owned_by": "punchline"}
        data = [{"id": model.name, **same, "root": model.name, "fingerprint": model.fingerprint} for model in self._models]
        return JsonAnswer({"object": "list", "data": data})

    def _handler(self, dialect: Dialect) -> Any:
        async def handle(request: Request) -> Response:
            return await self._answer(request, dialect)

        return handle

    async def _answer(self, request: Request, dialect: Dialect) -> Response:
        options, params = read_options(request, dialect.params)

        def read(told: Peer) -> tuple[ModelCard, Asking, Asked]:
            model = model_of(request, self._models, self._wanted_model(told, options))
            asking = Asking(model.service.takes_images, self._settings.max_captions, params)
            return model, asking, dialect.read(told, asking)

        model, asking, asked = await read_json(request, dialect.body, self._settings, read)
        with model.service.refusing(len(asked.items)):
            check_fingerprint(options, model.fingerprint)
            deadline, run_id = self._deadline(options, dialect), run_id_of(request, options.run_id)
            requests, places = self._requests(asked, asking.refused)
        model.service.count_left_out(len(asked.items) - len(places))
        rule: OnItemError = "fail" if asking.refused is None else "null"
        holds = dialect.patience_s is not None
        results = await self._score(request, model, requests, deadline, rule, run_id, holds=holds) if requests else []
        return JsonAnswer(asked.answer(self._scored(request, model, asked, results, places, asking.refused)))

    def _wanted_model(self, told: Peer, options: Options) -> str | None:
        """By the address, or by the body where several are served: else its `model` is whatever its client writes.

        Raises InvalidRequest where they differ.
        """
        named = told.model if isinstance(told, Engine) and len(self._models) > 1 else None
        if named is not None and options.model is not None and named != options.model:
            raise InvalidRequest("the body names another model than the address", field="model")
        return named if options.model is None else options.model

    def _deadline(self, options: Options, dialect: Dialect) -> float:
        """No longer than a stopping server takes to answer what it accepted."""
        if options.timeout_ms is None and dialect.patience_s is not None:
            return min(dialect.patience_s, self._settings.max_timeout_ms / 1000, self._settings.drain_s)
        return timeout_s(options, self._settings)

    def _requests(self, asked: Asked, refused: float | None) -> tuple[list[GroupRequest], list[int]]:
        """A group for each image and prompt, and where in the request each of its captions stands, group after group."""
        if len(asked.items) > self._settings.max_captions:
            raise TooManyItems(f"at most {self._settings.max_captions} captions a request", field=asked.items[-1].where)
        wanted = [place for place, item in enumerate(asked.items) if self._is_wanted(item, refused)]
        groups = grouped(asked.items, wanted)
        if len(groups) > self._settings.max_groups:
            raise TooManyItems(f"at most {self._settings.max_groups} images or prompts a request", field=asked.items[-1].where)
        is_part = len(wanted) < len(asked.items)
        requests = [_request([asked.items[place] for place in group], is_part=is_part) for group in groups]
        return requests, [place for group in groups for place in group]

    def _is_wanted(self, item: Item, refused: float | None) -> bool:
        """Whether the service is asked about it. Raises CaptionTooLarge, unless there is a number for captions that are `refused`."""
        check_prompt_size(item.prompt, item.where, self._settings)
        if item.caption is None:
            return False
        try:
            check_caption_size(item.caption, item.where, self._settings)
        except CaptionTooLarge:
            if refused is None:
                raise
            return False
        return True

    async def _score(
        self,
        request: Request,
        model: ModelCard,
        requests: list[GroupRequest],
        deadline: float,
        rule: OnItemError,
        run_id: str | None,
        *,
        holds: bool,
    ) -> list[GroupResult]:
        exchange = exchange_of(request.scope)
        work = model.service.score(
            requests,
            timeout_s=deadline,
            on_item_error=rule,
            timing=exchange.timing,
            caller=exchange.caller,
            holds=holds,
            run_id=run_id,
        )
        return await unless_gone(request, work)

    def _scored(
        self, request: Request, model: ModelCard, asked: Asked, results: list[GroupResult], places: list[int], refused: float | None
    ) -> Scored:
        """`refused` stands for what has no score; there is none without it, since one caption then fails all."""
        found = dict(zip(places, (score for result in results for score in result.scores), strict=True))
        scores = [refused if found.get(place) is None else found[place] for place in range(len(asked.items))]
        return Scored(
            scores=tuple(_number(score) for score in scores),
            num_tokens=sum(result.num_tokens for result in results),
            model=model.name,
            request_id=exchange_of(request.scope).request_id,
            created=int(time.time()),
        )


def _number(score: float | None) -> float:
    if score is None:
        raise ApiError("a caption without a score", code="internal_shape")
    return score


def _request(items: list[Item], *, is_part: bool) -> GroupRequest:
    """Items of one image and prompt, each with a caption."""
    first = items[0]
    wheres, captions = tuple(item.where for item in items), tuple(item.caption for item in items if item.caption is not None)
    return GroupRequest(captions, first.image, first.prompt, field=first.where, caption_fields=wheres, is_part=is_part)


def _body(dialect: Dialect) -> dict[str, Any]:
    schema = {"$ref": f"#/components/schemas/{dialect.body.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}
