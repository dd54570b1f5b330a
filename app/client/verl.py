"""Rewards for verl: `compute_score` for its reward loop, `compute_score_batch` for managers that ask for many at once.

Loaded by path or as `pkg://app.client.verl`, maybe twice and without a place in `sys.modules`: what is shared lies elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from app.client.columns import source_of
from app.client.environment import Told, blocking_client_for, client_for, told
from app.client.rollouts import Plan, Reward, Row, planned


async def compute_score(
    data_source: str,
    solution_str: str,
    ground_truth: Any,
    extra_info: Mapping[str, Any] | None = None,
    *,
    reward_router_address: str | None = None,
    reward_model_tokenizer: Any = None,
    **options: Any,
) -> dict[str, float]:
    """The score of one completion, and 1.0 in `tagged` if it had a whole tag. `options` are `reward_kwargs`, as of `environment.Told`.

    The picture is `extra_info["reward_image"]` or `["image"]`, else `ground_truth["image"]`; verl passes address and tokenizer of a reward
    model of its own, if it has one. Raises RewardError when there is no score, ValueError, TypeError.
    """
    found = _told(options)
    plan = planned([_row(solution_str, ground_truth, extra_info)], found.rules)
    (reward,) = plan.rewards(await client_for(found).score_groups(plan.groups, on_item_error=plan.rules.on_item_error))
    return _answer(reward)


def compute_score_batch(
    data_sources: Sequence[str],
    solution_strs: Sequence[str],
    ground_truths: Sequence[Any],
    extra_infos: Sequence[Mapping[str, Any] | None] | None = None,
    **options: Any,
) -> list[dict[str, float]]:
    """As `compute_score`, for each of them; what is of one picture goes together. Blocks, and may be called where an event loop runs."""
    found = _told(options)
    infos = [None] * len(solution_strs) if extra_infos is None else extra_infos
    plan = planned([_row(*each) for each in zip(solution_strs, ground_truths, infos, strict=True)], found.rules)
    return [_answer(reward) for reward in _asked(found, plan)]


def _asked(found: Told, plan: Plan) -> list[Reward]:
    return plan.rewards(blocking_client_for(found).score_groups(plan.groups, on_item_error=plan.rules.on_item_error))


def _told(options: Mapping[str, Any]) -> Told:
    found = told(**options)
    if found.rules.may_give_none:
        raise ValueError("verl takes a number for every completion: `missing` and `refused` cannot be none")
    return found


def _row(completion: str, ground_truth: Any, extra_info: Mapping[str, Any] | None) -> Row:
    info = extra_info or {}
    truth = ground_truth if isinstance(ground_truth, Mapping) else {}
    named = (info.get("reward_image"), info.get("image"), truth.get("image"))
    return Row(completion, source_of(next((image for image in named if image is not None), None)), info.get("reward_prompt"))


def _answer(reward: Reward) -> dict[str, float]:
    """Numbers only and always the same ones, since verl makes columns of them."""
    if reward.score is None:
        raise ValueError("no score for a completion, and no rule says what it gets")
    return {"score": reward.score, "tagged": float(reward.said.tagged)}
