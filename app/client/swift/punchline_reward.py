"""The plug-in for ms-swift: `--external_plugins` this file, `--reward_funcs punchline`. The environment says where the server is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from swift.rewards import AsyncORM, orms

from app.client.columns import source_of
from app.client.completions import Completion
from app.client.environment import new_client, told
from app.client.rollouts import Row, planned


class CaptionReward(AsyncORM):  # type: ignore[misc]
    """One number a completion. Raises RewardError when there are none, so that the run stops."""

    def __init__(self, args: Any = None, **kwargs: Any) -> None:
        """Raises ValueError for what the environment says wrong, and for a rule that would give none: ms-swift sums none as 0."""
        super().__init__(args, **kwargs)
        found = told()
        if found.rules.may_give_none:
            raise ValueError("ms-swift takes none for 0: the rules for missing and refused captions cannot be none")
        self._rules = found.rules
        self._client = new_client(found)

    async def __call__(
        self,
        completions: Sequence[Completion],
        images: Sequence[Any] | None = None,
        reward_image: Sequence[Any] | None = None,
        reward_prompt: Sequence[str | None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """ms-swift runs an event loop for each call, so that connections end with it."""
        none = [None] * len(completions)
        pictures = reward_image or images or none
        rows = [Row(*each) for each in zip(completions, map(source_of, pictures), reward_prompt or none, strict=True)]
        plan = planned(rows, self._rules)
        async with self._client as client:
            found = await client.score_groups(plan.groups, on_item_error=self._rules.on_item_error)
        return [reward.score for reward in plan.rewards(found)]


orms["punchline"] = CaptionReward
