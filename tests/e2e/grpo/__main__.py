"""Two runs of TRL's GRPOTrainer over a live server, the second one with the server killed three times: `python -m tests.e2e.grpo`."""

from __future__ import annotations

import json
import math
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers
import trl

from tests.e2e.grpo.policy import fitted, load_tokenizer
from tests.e2e.grpo.restarts import Restarted
from tests.e2e.grpo.run import NUM_GENERATIONS, NUM_PROMPTS, NUM_STEPS, RewardLog, train

NUM_COMPARED = 10  # steps at the beginning, and at the end
KILLS = (5, 25, 45)  # the calls in which the server dies


def main(out: Path) -> None:
    """Prints the figures and writes them to a file."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    tokenizer = load_tokenizer()
    policy = fitted(tokenizer)
    with open(out / "server.log", "w", encoding="utf-8") as log, Restarted("--deterministic", log=log) as server:
        undisturbed = train(policy, tokenizer, server, out / "undisturbed")
        disturbed = train(policy, tokenizer, server, out / "disturbed", KILLS)
    found = figures(undisturbed, disturbed, server.num_kills)
    (out / "figures.json").write_text(json.dumps(found, indent=1), encoding="utf-8")
    tell(found, undisturbed)


def figures(undisturbed: RewardLog, disturbed: RewardLog, num_kills: int) -> dict[str, float | bool]:
    means = undisturbed.means()
    first, last = mean_and_error(means[:NUM_COMPARED]), mean_and_error(means[-NUM_COMPARED:])
    return {
        "num_steps": len(means),
        "num_rewards": sum(map(len, undisturbed.rewards)),
        "first": first[0],
        "first_error": first[1],
        "last": last[0],
        "last_error": last[1],
        "rise_in_errors": (last[0] - first[0]) / math.hypot(first[1], last[1]),
        "num_kills": num_kills,
        "same_captions": undisturbed.captions == disturbed.captions,
        "same_rewards": undisturbed.rewards == disturbed.rewards,
        "num_different": sum(a != b for a, b in zip(flat(undisturbed), flat(disturbed), strict=True)),
    }


def mean_and_error(means: Sequence[float]) -> tuple[float, float]:
    """Of the mean over steps, by how much the steps differ."""
    return statistics.fmean(means), statistics.stdev(means) / math.sqrt(len(means))


def flat(log: RewardLog) -> list[float | None]:
    return [reward for rewards in log.rewards for reward in rewards]


def tell(found: dict[str, float | bool], log: RewardLog) -> None:
    print(f"TRL {trl.__version__}, {NUM_STEPS} steps of {NUM_PROMPTS} drawn cartoons x {NUM_GENERATIONS} captions, on the CPU")
    for name, steps in (("first", slice(None, NUM_COMPARED)), ("last", slice(-NUM_COMPARED, None))):
        print(
            f"mean reward of the {name} {NUM_COMPARED} steps {found[name]:.3f} +- {found[name + '_error']:.3f}, e.g. {example(log, steps)}"
        )
    print(f"the rise is {found['rise_in_errors']:.1f} times its standard error")
    print(
        f"the same run with the server killed in the middle of {found['num_kills']} calls: "
        f"{found['num_different']} of {found['num_rewards']} rewards differ, captions the same: {found['same_captions']}"
    )


def example(log: RewardLog, steps: slice) -> str:
    """The caption in the middle of those steps' rewards."""
    rows = [pair for step in zip(log.rewards[steps], log.captions[steps], strict=True) for pair in zip(*step, strict=True)]
    score, caption = sorted(rows)[len(rows) // 2]
    return f"{score:.2f} for {caption.strip()!r}"


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as kept:
        main(Path(sys.argv[1] if len(sys.argv) > 1 else kept))
