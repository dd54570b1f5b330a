"""One GRPO run of TRL against a live server: which rewards every step got, and what the trainer made of them."""

from __future__ import annotations

import asyncio
import copy
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PreTrainedTokenizerBase, PrinterCallback, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from app.client import AsyncRewardClient
from app.client.trl import reward_function
from tests.e2e.grpo.policy import prompt_for, scenes
from tests.e2e.grpo.restarts import Restarted
from training.demo.drawings import render

NUM_STEPS, NUM_GENERATIONS, NUM_PROMPTS = 60, 8, 8
SCALE = 3.0  # of the drawings, as those of the package


@dataclass
class RewardLog:
    """Of every call: the captions, and what the server said."""

    captions: list[list[str]] = field(default_factory=list)
    rewards: list[list[float | None]] = field(default_factory=list)

    def means(self) -> list[float]:
        return [statistics.fmean(map(float, rewards)) for rewards in self.rewards]  # type: ignore[arg-type]


def train(
    policy: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerBase, server: Restarted, out: Path, kills: Sequence[int] = ()
) -> RewardLog:
    """The rewards of the run. In the calls named by `kills` the server dies while it is asked."""
    log = RewardLog()
    trainer = GRPOTrainer(
        model=copy.deepcopy(policy),
        processing_class=tokenizer,
        reward_funcs=_recorded(log, server, kills),
        args=_arguments(out),
        train_dataset=_cartoons(),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    check_against_trl(log, trainer.state.log_history)
    return log


def check_against_trl(log: RewardLog, history: Sequence[dict[str, Any]]) -> None:
    """What TRL took for its rewards is what the server said. Raises ValueError."""
    took = [float(entry["rewards/caption_reward/mean"]) for entry in history if "rewards/caption_reward/mean" in entry]
    if len(took) != len(log.rewards) or not all(abs(one - other) < 1e-4 for one, other in zip(took, log.means(), strict=True)):
        raise ValueError("TRL's log has other rewards than the reward function gave")


def _recorded(log: RewardLog, server: Restarted, kills: Sequence[int]) -> Any:
    """The reward function of the package, looked over the shoulder."""
    reward = reward_function(AsyncRewardClient(server.url, deadline_s=300))

    async def caption_reward(completions: list[str], **columns: Any) -> list[float | None]:
        asked = asyncio.ensure_future(reward(completions, **columns))
        if len(log.rewards) in kills:
            await asyncio.sleep(0.01)  # it is on its way
            if asked.done():
                raise RuntimeError("the call was answered before the server could be killed")
            server.kill()
            await asyncio.to_thread(server.start)
        log.rewards.append(await asked)
        log.captions.append(completions)
        return log.rewards[-1]

    return caption_reward


def _cartoons() -> Dataset:
    """The policy reads what is in the picture, the reward model sees it."""
    drawn = scenes()
    pictures = [render(scene, SCALE) for scene in drawn]
    return Dataset.from_dict({"prompt": [prompt_for(scene.idea) for scene in drawn], "reward_image": pictures})


def _arguments(out: Path) -> GRPOConfig:
    return GRPOConfig(
        output_dir=str(out),
        max_steps=NUM_STEPS,
        per_device_train_batch_size=NUM_PROMPTS * NUM_GENERATIONS,
        num_generations=NUM_GENERATIONS,
        max_completion_length=32,
        learning_rate=3e-4,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=5,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        bf16=False,
        disable_tqdm=True,
        seed=1,
    )
