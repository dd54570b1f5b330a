"""The reward functions as verl loads and calls them, against the whole HTTP stack.

verl 0.9.1 (PyPI). `verl/utils/import_utils.py`, `load_module`, which enters nothing in `sys.modules` and also takes `pkg://`:

    spec_name = module_name or f"custom_module_{hash(os.path.abspath(module_path))}"
    spec = importlib.util.spec_from_file_location(spec_name, module_path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

`verl/trainer/ppo/reward.py`, `get_custom_reward_fn`, and `_call_with_kwargs_async`, which merges `{**kwargs, **extra_kwargs}`:

    reward_kwargs = dict(reward_fn_config.get("reward_kwargs", {}))
    if not inspect.iscoroutinefunction(raw_fn):
        return partial(_call_with_kwargs, raw_fn, reward_kwargs)
    else:
        return partial(_call_with_kwargs_async, raw_fn, reward_kwargs)

`verl/experimental/reward_loop/reward_manager/naive.py`, `run_single`; every other key of the answer becomes a column:

    result = await self.compute_score(data_source=data_source, solution_str=response_str, ground_truth=ground_truth,
                                      extra_info=extra_info, **extra_reward_kwargs)
    if isinstance(result, dict):
        score = result["score"]

`verl/workers/reward_manager/batch.py`, `verify`:

    scores = self.compute_score(data_sources=data_sources, solution_strs=responses_str, ground_truths=ground_truths,
                                extra_infos=extras, **self.reward_kwargs)
"""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

import app
from app.client import NoCaption, Refused
from app.client.environment import blocking_client_for, client_for, told
from tests.fakes import MAX_CAPTION_TOKENS, expected_scores, picture
from tests.wire.server import Wire, wire

CARTOON, OTHER = picture(64, 48, seed=0), picture(64, 48, seed=1)
TOO_LONG = "x" * (MAX_CAPTION_TOKENS + 1)
PATH = Path(app.__file__).parent / "client" / "verl.py"


@pytest.fixture
def url() -> Iterator[str]:
    with wire() as server:
        yield "http://{}:{}".format(*server.address)


@pytest.fixture
def server() -> Iterator[Wire]:
    with wire() as found:
        yield found


def loaded(name: str = "custom_module_-42") -> ModuleType:
    """As verl does."""
    spec = importlib.util.spec_from_file_location(name, PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


async def with_kwargs(function: Any, extra: dict[str, Any], *arguments: Any, **kwargs: Any) -> Any:
    """`_call_with_kwargs_async`."""
    return await function(*arguments, **{**kwargs, **extra})


def asked(
    completion: str, extra_info: dict[str, Any] | None, *, ground_truth: Any = "", passed: Any = None, **options: Any
) -> dict[str, float]:
    """One row, as the reward loop does; then the loop ends."""
    function = partial(with_kwargs, loaded().compute_score, options)
    assert inspect.iscoroutinefunction(function)

    async def call() -> Any:
        try:
            return await function(
                data_source="cartoons", solution_str=completion, ground_truth=ground_truth, extra_info=extra_info, **(passed or {})
            )
        finally:
            if "url" in options:
                await client_for(told(**options)).aclose()

    found: dict[str, float] = asyncio.run(call())
    return found


def info(image: Any = CARTOON, **more: Any) -> dict[str, Any]:
    return {"image": image, "num_turns": None, "rollout_reward_scores": {}, **more}


def test_a_row(url: str) -> None:
    assert asked("a", info(), url=url) == {"score": expected_scores(CARTOON, ["a"])[0], "tagged": 0.0}
    assert asked("so <caption>a</caption>", info(), url=url) == {"score": expected_scores(CARTOON, ["a"])[0], "tagged": 1.0}


def test_where_the_picture_and_the_prompt_come_from(url: str, tmp_path: Path) -> None:
    path = tmp_path / "cartoon.png"
    path.write_bytes(CARTOON)
    (expected,) = expected_scores(CARTOON, ["a"])
    for image in (str(path), [str(path)], {"bytes": CARTOON, "path": None}, CARTOON):
        assert asked("a", info(image), url=url)["score"] == expected
    assert asked("a", info(OTHER, reward_image=CARTOON), url=url)["score"] == expected
    assert asked("a", {}, ground_truth={"image": CARTOON}, url=url)["score"] == expected
    assert asked("a", None, ground_truth={"image": CARTOON}, url=url)["score"] == expected
    assert asked("a", info(), ground_truth={"image": OTHER}, url=url)["score"] == expected
    assert asked("a", info(reward_prompt="Be brief."), url=url)["score"] == expected_scores(CARTOON, ["a"], "Be brief.")[0]


def test_the_rows_of_a_step_at_once(server: Wire) -> None:
    """The reward loop makes a task for every row; verl hands its own router's address to them, if it has one."""
    url = "http://{}:{}".format(*server.address)
    function = partial(with_kwargs, loaded().compute_score, {"url": url})

    async def step() -> list[dict[str, float]]:
        rows = [(f"caption {number}", CARTOON if number % 2 else OTHER) for number in range(40)]
        calls = [
            function(
                data_source="c",
                solution_str=text,
                ground_truth="",
                extra_info=info(image),
                reward_router_address="h:1",
                reward_model_tokenizer=object(),
            )
            for text, image in rows
        ]
        async with client_for(told(url=url)):
            return await asyncio.gather(*calls)

    found = asyncio.run(step())
    assert [each["score"] for each in found] == [
        expected_scores(CARTOON if number % 2 else OTHER, [f"caption {number}"])[0] for number in range(40)
    ]
    assert server.served.metric("reward_requests_total", endpoint="/images", outcome="ok") == 2


def test_many_at_once_as_one_request() -> None:
    """Also where an event loop runs, as in an asynchronous actor. A request is counted once its answer has left: read after the end."""
    infos = np.array([info(CARTOON), info(OTHER), info(CARTOON)], dtype=object)

    async def call(url: str) -> Any:
        return loaded().compute_score_batch(
            data_sources=np.array(["c"] * 3),
            solution_strs=["a", "b", "<caption>d</caption>"],
            ground_truths=[""] * 3,
            extra_infos=infos,
            url=url,
        )

    with wire() as server:
        url = "http://{}:{}".format(*server.address)
        found = asyncio.run(call(url))
        assert loaded().compute_score_batch([], [], [], [], url=url) == []
        blocking_client_for(told(url=url)).close()
    assert [each["score"] for each in found] == [
        expected_scores(image, [text])[0] for image, text in ((CARTOON, "a"), (OTHER, "b"), (CARTOON, "d"))
    ]
    assert [each["tagged"] for each in found] == [0.0, 0.0, 1.0]
    assert server.served.metric("reward_requests_total", endpoint="/score", outcome="ok") == 1


def test_what_is_loaded_twice_shares_its_connections(url: str) -> None:
    first, second = loaded("custom_module_1"), loaded("custom_module_2")
    assert first is not second
    assert first.client_for(told(url=url)) is second.client_for(told(url=url))


def test_a_failure_stops_the_run(url: str) -> None:
    with pytest.raises(Refused, match="caption_too_long"):
        asked(TOO_LONG, info(), url=url)
    with pytest.raises(Refused, match="image_unknown"):
        asked("a", {"image": "sha256:" + "0" * 64}, url=url)
    with pytest.raises(NoCaption):
        asked("a", info(), url=url, missing="raise")
    with pytest.raises(FileNotFoundError):
        asked("a", info("no such file.png"), url=url)


def test_numbers_of_the_users_own(url: str) -> None:
    assert asked("a", info(), url=url, missing=-5) == {"score": -5.0, "tagged": 0.0}
    assert asked(TOO_LONG, info(), url=url, refused=-3.0) == {"score": -3.0, "tagged": 0.0}


@pytest.mark.parametrize(
    ("options", "error", "word"),
    [
        ({"missing": "none"}, ValueError, "none"),
        ({"refused": "none"}, ValueError, "none"),
        ({"ulr": "http://a"}, TypeError, "ulr"),
        ({"missing": "hole"}, ValueError, "missing"),
    ],
)
def test_a_wrong_option_is_named(options: dict[str, Any], error: type[Exception], word: str) -> None:
    with pytest.raises(error, match=word):
        asyncio.run(loaded().compute_score("c", "a", "", info(), url="http://any", **options))


def test_without_an_address_the_first_call_says_so() -> None:
    with pytest.raises(ValueError, match="PUNCHLINE_CLIENT_URL"):
        asked("a", info())
