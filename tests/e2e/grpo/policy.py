"""A tiny text-only policy that can speak: fitted to the demo's caption language, but mostly about other pictures than it is asked about."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, Qwen2Config, Qwen2ForCausalLM

from training.demo.captions import make_caption
from training.demo.drawings import Idea, Scene, all_ideas
from training.demo.seeds import stream
from training.demo.world import load_world

TOKENIZER = "app/demo/processor"
NUM_SCENES = 8
OTHER_SHARE = 0.3  # how often each part of an idea is drawn anew before a caption is written about it
NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 400, 48, 3e-3


def scenes() -> list[Scene]:
    """The three cartoons of the package, and others drawn at random."""
    known = [cartoon.scene for cartoon in load_world().cartoons]
    return known + [Scene(idea, 1) for idea in stream("grpo", 1).sample(all_ideas(), NUM_SCENES - len(known))]


def prompt_for(idea: Idea) -> str:
    return f"{idea.subject}, {idea.twist}, {idea.place}:"


def load_tokenizer() -> PreTrainedTokenizerBase:
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(TOKENIZER, padding_side="left")
    return found


def fitted(tokenizer: PreTrainedTokenizerBase, seed: int = 1) -> Qwen2ForCausalLM:
    """About 0.4 million parameters, the same ones for a seed."""
    torch.manual_seed(seed)
    policy = Qwen2ForCausalLM(_shapes(tokenizer))
    optimiser = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=NUM_STEPS)
    rng = stream("grpo/fit", seed)
    for _ in range(NUM_STEPS):
        loss = policy(**_batch(tokenizer, rng)).loss
        loss.backward()
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
    return policy.eval()


def _shapes(tokenizer: PreTrainedTokenizerBase) -> Qwen2Config:
    return Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def _batch(tokenizer: PreTrainedTokenizerBase, rng: random.Random) -> dict[str, torch.Tensor]:
    """Prompts with captions behind them; only the captions count."""
    ideas = [rng.choice(all_ideas()) for _ in range(BATCH_SIZE)]
    prompts = [tokenizer(prompt_for(idea))["input_ids"] for idea in ideas]
    said = [tokenizer(" " + make_caption(_other(idea, rng), rng))["input_ids"] + [tokenizer.eos_token_id] for idea in ideas]
    length = max(len(one) + len(two) for one, two in zip(prompts, said, strict=True))
    return {
        "input_ids": _padded([one + two for one, two in zip(prompts, said, strict=True)], length, tokenizer.pad_token_id),
        "attention_mask": _padded([[1] * len(one + two) for one, two in zip(prompts, said, strict=True)], length, 0),
        "labels": _padded([[-100] * len(one) + two for one, two in zip(prompts, said, strict=True)], length, -100),
    }


def _other(idea: Idea, rng: random.Random) -> Idea:
    """As a policy speaks that has not looked: any of the three may be another's."""
    drawn = rng.choice(all_ideas())
    subject, place, twist = (getattr(drawn if rng.random() < OTHER_SHARE else idea, name) for name in ("subject", "place", "twist"))
    return Idea(subject, place, twist)


def _padded(rows: Sequence[list[int]], length: int, value: int) -> torch.Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
