"""Rewards for TRL's GRPOTrainer: `caption_reward`, told by the environment, or `reward_function` of a client. Needs nothing of TRL."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, TypeAlias

from app.client.columns import source_of
from app.client.completions import Completion
from app.client.concurrent import AsyncRewardClient
from app.client.environment import client_for, told
from app.client.pictures import Source
from app.client.rollouts import Missing, Refused, Reward, Row, Rules, planned

Rewards: TypeAlias = list[float | None]
RewardFunction: TypeAlias = Callable[..., Coroutine[Any, Any, Rewards]]
_IMAGE_COLUMNS = ("reward_image", "image", "images")  # the first: for policies that see no pictures, whose trainer must not see one either


async def caption_reward(completions: Sequence[Completion], **columns: Any) -> Rewards:
    """As TRL calls it, with every column of the data set. Raises RewardError when there are no scores, so that the run stops."""
    found = told()
    return await _rewards(client_for(found), found.rules, "caption_reward", completions, columns)


def reward_function(
    client: AsyncRewardClient, *, missing: Missing = "whole", refused: Refused = "raise", name: str = "caption_reward"
) -> RewardFunction:
    """A reward function of this client. TRL logs it under its `name`. It cannot be pickled; `caption_reward` can. Raises ValueError."""
    rules = Rules(missing, refused)

    async def reward(completions: Sequence[Completion], **columns: Any) -> Rewards:
        return await _rewards(client, rules, name, completions, columns)

    reward.__name__ = reward.__qualname__ = name
    return reward


async def _rewards(
    client: AsyncRewardClient, rules: Rules, name: str, completions: Sequence[Completion], columns: Mapping[str, Any]
) -> Rewards:
    """None for rows of another task, which have no picture in a column of pictures, and where a rule says so; TRL leaves those out."""
    pictures, text_only = _pictures(columns, len(completions)), not any(columns.get(column) is not None for column in _IMAGE_COLUMNS)
    prompts = columns.get("reward_prompt") or [None] * len(completions)
    given = enumerate(zip(completions, pictures, prompts, strict=True))
    rows = {place: Row(*each) for place, each in given if text_only or each[1] is not None}
    plan = planned(list(rows.values()), rules)
    found = plan.rewards(await client.score_groups(plan.groups, on_item_error=rules.on_item_error))
    by_place = dict(zip(rows, found, strict=True))
    _log(name, [by_place.get(place) for place in range(len(completions))], columns)
    return [by_place[place].score if place in by_place else None for place in range(len(completions))]


def _pictures(columns: Mapping[str, Any], num_rows: int) -> list[Source]:
    """Of each row the first there is: in the columns, or in the messages of its prompt, where TRL puts them for policies that see."""
    given = [columns[name] for name in _IMAGE_COLUMNS if columns.get(name) is not None]
    if (prompts := columns.get("prompts")) is not None:
        given.append([_shown(prompt) for prompt in prompts])
    rows = zip(*given, strict=True) if given else [()] * num_rows
    return [next((found for value in row if (found := source_of(value)) is not None), None) for row in rows]


def _shown(prompt: str | Sequence[Mapping[str, Any]]) -> list[Any]:
    """The pictures in a prompt."""
    contents = [] if isinstance(prompt, str) else [message.get("content") for message in prompt]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    return [part["image"] for part in parts if part.get("type") == "image" and part.get("image") is not None]


def _log(name: str, rewards: Sequence[Reward | None], columns: Mapping[str, Any]) -> None:
    """The captions beside TRL's completions; how many had no tag, and how many got no score, as shares of the rows of this task."""
    if (log_extra := columns.get("log_extra")) is not None:
        log_extra(f"{name}_caption", [reward and reward.said.caption for reward in rewards])
    own = [reward for reward in rewards if reward is not None]
    if (log_metric := columns.get("log_metric")) is not None and own:
        log_metric(f"{name}/untagged", sum(not reward.said.tagged for reward in own) / len(own))
        log_metric(f"{name}/unscored", sum(reward.score is None for reward in own) / len(own))
