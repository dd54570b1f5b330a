"""The reward function as TRL calls it, against the whole HTTP stack: rows to groups, pictures, what a failure does.

TRL 1.16.0 (PyPI), `trl/trainer/grpo_trainer.py`, `_calculate_rewards`, is what these tests imitate:

    keys = [key for key in inputs[0] if key not in ["prompt", "completion", "completion_ids"]]
    reward_kwargs = {key: [example[key] for example in inputs] for key in keys}
    reward_kwargs["trainer_state"] = self.state
    reward_kwargs["log_extra"] = self._log_completion_extra
    reward_kwargs["log_metric"] = self._log_metric
    ...
    elif is_async_callable(reward_func):  # Separate async reward funcs to run them in parallel later
    ...
    output = await func(prompts=prompts, completions=completions, completion_ids=completion_ids_list, **reward_kwargs)
    output = [r if r is not None else torch.nan for r in output]
    ...
    async_results = asyncio.run_coroutine_threadsafe(_run_async_funcs(), self.async_loop).result()

and its command line, `trl/scripts/grpo.py`: `"any dotted import path (e.g., `'my_lib.rewards.custom_reward'`)"`, read by
`module_path, func_name = func_name.rsplit(".", 1)`, `importlib.import_module(module_path)`, `getattr(module, func_name)`.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import io
import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app.client import AsyncRewardClient, BadAnswer, NoCaption, Refused, Unanswered
from app.client.environment import client_for, told
from app.client.trl import RewardFunction, caption_reward, reward_function
from tests.client.both import Script, broken, refusing
from tests.fakes import MAX_CAPTION_TOKENS, expected_scores, picture
from tests.wire.server import Wire, wire

CARTOON, OTHER = picture(64, 48, seed=0), picture(64, 48, seed=1)
TOO_LONG = "x" * (MAX_CAPTION_TOKENS + 1)
VARIABLE = "PUNCHLINE_CLIENT_URL"


@pytest.fixture
def server() -> Iterator[Wire]:
    with wire() as found:
        yield found


@pytest.fixture
def address(server: Wire) -> Iterator[str]:
    """The address in the environment, as for `--reward_funcs app.client.trl.caption_reward`."""
    os.environ[VARIABLE] = url_of(server)
    yield os.environ[VARIABLE]
    del os.environ[VARIABLE]


def url_of(server: Wire) -> str:
    return "http://{}:{}".format(*server.address)


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def decoded(data: bytes) -> Image.Image:
    """As a data set does, anew for each row."""
    return Image.open(io.BytesIO(data)).convert("RGB")


@dataclass(frozen=True)
class Asked:
    """A reward function and its client, which has to be closed where a loop ends."""

    client: AsyncRewardClient
    function: RewardFunction


def called(asked: Asked, completions: Sequence[Any], **columns: Any) -> list[float | None]:
    """As TRL does, with everything that it passes."""
    columns.setdefault("prompts", ["Say something."] * len(completions))
    columns.setdefault("completion_ids", [[1]] * len(completions))

    async def call() -> list[float | None]:
        async with asked.client:
            return await asked.function(completions=completions, trainer_state=object(), **columns)

    return asyncio.run(call())


def made(client: AsyncRewardClient, **options: Any) -> Asked:
    return Asked(client, reward_function(client, **options))


def ready() -> Asked:
    return Asked(client_for(told()), caption_reward)


def of(server: Wire, **options: Any) -> Asked:
    return made(AsyncRewardClient(url_of(server)), **options)


def test_it_is_what_trl_takes_for_a_coroutine_function() -> None:
    funny = reward_function(AsyncRewardClient("http://any"), name="funny")
    for function, name in ((caption_reward, "caption_reward"), (funny, "funny")):
        assert inspect.iscoroutinefunction(function)
        assert inspect.isfunction(function)
        assert function.__name__ == name
    assert pickle.loads(pickle.dumps(caption_reward)) is caption_reward


def test_the_command_line_finds_it_by_its_dotted_path(address: str) -> None:
    module_path, _, name = "app.client.trl.caption_reward".rpartition(".")
    assert getattr(importlib.import_module(module_path), name) is caption_reward
    assert called(ready(), ["a", "b"], image=[decoded(CARTOON)] * 2) == expected_scores(png(decoded(CARTOON)), ["a", "b"])


def test_rows_of_a_step_are_one_request_and_come_back_in_order() -> None:
    """Equal pictures that a data set decoded for each row anew, two prompts of four completions each, mixed in order.

    A request is counted once its answer has left, so that the counts are read after the end.
    """
    pictures = [decoded(data) for data in (CARTOON, OTHER, CARTOON, CARTOON, OTHER, OTHER, CARTOON, OTHER)]
    completions = [f"caption {number}" for number in range(8)]
    with wire() as server:
        found = called(of(server), completions, image=pictures)
    assert found == [expected_scores(png(image), [text])[0] for image, text in zip(pictures, completions, strict=True)]
    assert server.served.metric("reward_requests_total", endpoint="/score", outcome="ok") == 1
    assert server.served.metric("reward_requests_total", endpoint="/images", outcome="ok") == 2


@pytest.mark.parametrize("column", ["image", "images", "reward_image"])
@pytest.mark.parametrize("form", ["bytes", "mapping", "path", "PIL"])
def test_every_column_and_form_of_a_picture(column: str, form: str, server: Wire, tmp_path: Path) -> None:
    path = tmp_path / "cartoon.png"
    path.write_bytes(CARTOON)
    value: Any = {"bytes": CARTOON, "mapping": {"bytes": CARTOON, "path": None}, "path": str(path), "PIL": decoded(CARTOON)}[form]
    image = png(decoded(CARTOON)) if form == "PIL" else CARTOON
    columns = {column: [[value] if column == "images" else value] * 2}
    assert called(of(server), ["a", "b"], **columns) == expected_scores(image, ["a", "b"])


def test_what_the_reward_model_sees_goes_before_what_the_policy_sees(server: Wire) -> None:
    found = called(of(server), ["a", "b"], image=[OTHER] * 2, reward_image=[CARTOON] * 2, reward_prompt=["Be brief.", None])
    assert found == [*expected_scores(CARTOON, ["a"], "Be brief."), *expected_scores(CARTOON, ["b"])]


def test_pictures_in_the_messages_of_the_prompts(server: Wire) -> None:
    parts = [{"type": "image", "image": decoded(CARTOON)}, {"type": "text", "text": "Say something."}]
    prompts = [[{"role": "system", "content": "You are funny."}, {"role": "user", "content": parts}]] * 2
    completions = [[{"role": "assistant", "content": text}] for text in ("a", "<caption>b</caption>")]
    assert called(of(server), completions, prompts=prompts) == expected_scores(png(decoded(CARTOON)), ["a", "b"])


def test_a_text_only_reward_model_is_asked_without_a_picture() -> None:
    function = made(AsyncRewardClient("http://any", transport=Script()))
    assert called(function, ["a", "bb"]) == [1.0, 2.0]
    assert called(function, ["a", "bb"], image=None) == [1.0, 2.0]


def test_rows_of_another_task_have_no_picture_and_get_none(server: Wire) -> None:
    noted: dict[str, Any] = {}
    columns = {"image": [None, CARTOON, None], "log_extra": noted.__setitem__, "log_metric": noted.__setitem__}
    assert called(of(server), ["x", "a", "y"], **columns) == [None, *expected_scores(CARTOON, ["a"]), None]
    assert noted == {
        "caption_reward_caption": [None, "a", None],
        "caption_reward/untagged": 1.0,
        "caption_reward/unscored": 0.0,
    }
    assert called(of(server), ["x", "y"], image=[None, None], log_metric=noted.__setitem__) == [None, None]
    assert called(of(server), ["x", "y"], images=[[], None]) == [None, None]


def test_a_column_without_a_picture_hides_none_in_another(server: Wire) -> None:
    """A merged data set has every column in every row. Only one that is looked at must have one picture a row."""
    shown = [{"role": "user", "content": [{"type": "image", "image": CARTOON}]}]
    several = [[CARTOON, OTHER]] * 2
    for columns in (
        {"image": [None] * 2, "images": [[CARTOON]] * 2},
        {"reward_image": [None, CARTOON], "image": [CARTOON] * 2},
        {"image": [None] * 2, "prompts": [shown] * 2},
        {"reward_image": [CARTOON] * 2, "images": several},
    ):
        assert called(of(server), ["a", "b"], **columns) == called(of(server), ["a", "b"], image=[CARTOON] * 2)


def test_an_empty_step(server: Wire) -> None:
    assert called(of(server), [], image=[]) == []
    assert called(of(server), []) == []


def test_what_trl_logs(server: Wire) -> None:
    noted: dict[str, Any] = {}
    completions = ["plain", "so <caption>tagged</caption>", "", TOO_LONG]
    function = of(server, name="funny", refused="none")
    found = called(function, completions, image=[CARTOON] * 4, log_extra=noted.__setitem__, log_metric=noted.__setitem__)
    assert found == [*expected_scores(CARTOON, ["plain", "tagged", ""]), None]
    assert noted == {"funny_caption": ["plain", "tagged", "", TOO_LONG], "funny/untagged": 0.75, "funny/unscored": 0.25}


def test_a_completion_without_a_tag_is_never_a_zero(server: Wire) -> None:
    completions = ["plain", "so <caption>tagged</caption>"]
    scores = expected_scores(CARTOON, ["plain", "tagged"])
    assert 0.0 not in scores
    assert called(of(server), completions, image=[CARTOON] * 2) == scores
    assert called(of(server, missing="none"), completions, image=[CARTOON] * 2) == [None, scores[1]]
    assert called(of(server, missing=-5), completions, image=[CARTOON] * 2) == [-5.0, scores[1]]
    with pytest.raises(NoCaption):
        called(of(server, missing="raise"), completions, image=[CARTOON] * 2)


@pytest.mark.parametrize(
    ("step", "error"),
    [
        (refusing(422, "invalid_request"), Refused),
        (refusing(500, "nonfinite_score"), Refused),
        (broken(OSError("nothing a transport may raise")), OSError),
        (lambda told: told | {"groups": []}, BadAnswer),
        (lambda told: told | {"groups": [told["groups"][0] | {"scores": [None]}]}, BadAnswer),
    ],
)
def test_a_failure_stops_the_run(step: Any, error: type[Exception]) -> None:
    function = made(AsyncRewardClient("http://any", transport=Script(step)))
    with pytest.raises(error):
        called(function, ["a"])


def test_a_completion_the_model_refuses_stops_the_run_unless_a_rule_says_what_it_gets(server: Wire) -> None:
    with pytest.raises(Refused, match="caption_too_long"):
        called(of(server), ["a", TOO_LONG], image=[CARTOON] * 2)
    assert called(of(server, refused=-3.0), ["a", TOO_LONG], image=[CARTOON] * 2) == [*expected_scores(CARTOON, ["a"]), -3.0]


def test_a_row_with_two_pictures_or_columns_of_another_length_are_the_callers_mistake(server: Wire) -> None:
    with pytest.raises(ValueError, match="one picture"):
        called(of(server), ["a"], images=[[CARTOON, OTHER]])
    with pytest.raises(ValueError, match="zip"):
        called(of(server), ["a", "b"], image=[CARTOON])


def test_nobody_there_is_unanswered() -> None:
    with pytest.raises(Unanswered):
        called(made(AsyncRewardClient("http://127.0.0.1:9", deadline_s=0.1)), ["a"])


def test_without_an_address_the_first_call_says_so() -> None:
    with pytest.raises(ValueError, match=VARIABLE):
        asyncio.run(caption_reward(["a"]))


def test_a_loop_of_trls_kind_and_another_one(address: str) -> None:
    """TRL runs one loop in a daemon thread for all calls; evaluation by hand runs another."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    try:
        for number in range(3):
            text = f"caption {number}"
            found = asyncio.run_coroutine_threadsafe(caption_reward([text], image=[CARTOON]), loop).result(30)
            assert found == called(ready(), [text], image=[CARTOON]) == expected_scores(CARTOON, [text])
    finally:
        asyncio.run_coroutine_threadsafe(ready().client.aclose(), loop).result(30)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


FORKED = """
import asyncio, os, sys
from app.client.environment import client_for, told
from app.client.trl import caption_reward
loop = asyncio.new_event_loop()
def ask(text):
    return loop.run_until_complete(caption_reward([text], image=[sys.argv[1]]))
ask("before")
child = os.fork()
if child == 0:
    loop = asyncio.new_event_loop()
print(ask("child" if child == 0 else "parent"), flush=True)
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
print(sorted({"torch", "trl", "transformers", "PIL", "numpy"} & set(sys.modules)))
"""


def test_after_a_fork_and_with_nothing_else_loaded(address: str, tmp_path: Path) -> None:
    path = tmp_path / "cartoon.png"
    path.write_bytes(CARTOON)
    command = [sys.executable, "-c", FORKED, str(path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True, cwd=Path(__file__).parents[2])
    *scores, loaded = run.stdout.splitlines()
    assert sorted(scores) == sorted(str(expected_scores(CARTOON, [name])) for name in ("child", "parent"))
    assert loaded == "[]"


def test_a_step_in_which_nothing_is_scored_asks_nobody() -> None:
    script = Script()
    for rule, expected in (("none", None), (-5.0, -5.0)):
        asked = made(AsyncRewardClient("http://any", transport=script), missing=rule)
        assert called(asked, ["no tag", "<caption>never closed"]) == [expected, expected]
    assert script.asked == []


def test_two_loops_at_the_same_time(address: str) -> None:
    """One client, a loop in each of four threads."""

    def ask(thread: int) -> list[float | None]:
        return [called(ready(), [f"{thread} {number}"], image=[CARTOON])[0] for number in range(5)]

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(ask, range(4)))
    assert found == [expected_scores(CARTOON, [f"{thread} {number}" for number in range(5)]) for thread in range(4)]
