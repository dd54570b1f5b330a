"""What the monitors of training runs show, as JSON behind the key: the list, and the numbers of one run, which its page draws."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from starlette.responses import Response

from app.api.answers import JsonAnswer
from app.api.schemas import ErrorAnswer, RunAnswer, RunsAnswer
from app.errors import NotFound
from app.runs import Runs

_ERRORS: dict[int | str, dict[str, Any]] = {401: {"model": ErrorAnswer, "description": "A key is needed."}}
_UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": ErrorAnswer, "description": "No such run is kept."}}


class RunRoutes:
    """The handlers. `runs` is only read."""

    def __init__(self, runs: Runs) -> None:
        self._runs = runs

    def router(self) -> APIRouter:
        router = APIRouter(default_response_class=JsonAnswer)
        shown: dict[str, Any] = {"tags": ["runs"]}
        router.add_api_route("/runs", self.kept, response_model=RunsAnswer, responses=_ERRORS, summary="Training runs kept", **shown)
        router.add_api_route(
            "/runs/{run_id}/statistics",
            self.statistics,
            response_model=RunAnswer,
            responses=_ERRORS | _UNKNOWN,
            summary="What the page of a run shows, as numbers",
            **shown,
        )
        return router

    async def kept(self) -> Response:
        """The one active last first."""
        return JsonAnswer({"runs": [run.summary() for run in self._runs.all()]})

    async def statistics(self, run_id: str) -> Response:
        """All of a run so far, its last groups, its history, and what there is to look at."""
        run = self._runs.find(run_id)
        if run is None:
            raise NotFound("no such run is kept; runs begin with the first scores that name them")
        return JsonAnswer(run.as_dict())
