"""Bradley-Terry training with nothing of ours: transformers, peft, torch and pillow, two padded sequences a pair.

What the published pipelines do, in the order they do it. The product's loop is held against its losses and gradients.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from peft import LoraConfig, get_peft_model
from PIL import Image
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

from training.pairs import Pair

PROMPT = "Write a funny one-line caption for this New Yorker-style cartoon."
TEXT = "{prompt}\n\nCandidate caption: {caption}\n\nJudge how funny this caption is for the cartoon."


class ReferenceLoop:
    """AdamW at a constant rate on LoRA and a head of zeros."""

    def __init__(self, base: Path, folder: Path, *, seed: int, r: int, alpha: int, learning_rate: float) -> None:
        set_seed(seed)
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.processor = AutoImageProcessor.from_pretrained(base, backend="pil")
        config = LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", bias="none")
        self.model = get_peft_model(AutoModel.from_pretrained(base, dtype=torch.float32), config)
        self.head = nn.Linear(self.model.config.get_text_config().hidden_size, 1, bias=False)
        nn.init.zeros_(self.head.weight)
        self.folder = folder
        self.parameters = [each for each in (*self.model.parameters(), *self.head.parameters()) if each.requires_grad]
        self.optimiser = torch.optim.AdamW(self.parameters, lr=learning_rate, weight_decay=0.0)

    def train(self, steps: Iterable[Sequence[Sequence[Pair]]]) -> list[float]:
        """One loss a step; a step is several batches of pairs."""
        losses = []
        for batches in steps:
            losses.append(sum(self.backward(batch, len(batches)) for batch in batches) / len(batches))
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimiser.step()
            self.optimiser.zero_grad()
        return losses

    def backward(self, pairs: Sequence[Pair], num_batches: int = 1) -> float:
        rewards = self.rewards([(pair, caption) for pair in pairs for caption in (pair.chosen, pair.rejected)])
        loss = -nn.functional.logsigmoid(rewards[0::2] - rewards[1::2]).mean()
        (loss / num_batches).backward()
        return loss.item()

    def rewards(self, rows: Sequence[tuple[Pair, str]]) -> Tensor:
        images = [self.open(pair) for pair, _ in rows]
        vision = self.processor(images=images, return_tensors="pt")
        counts = vision["image_grid_thw"].prod(-1) // self.processor.merge_size**2
        chats = [self.chat(pair, caption, int(count)) for (pair, caption), count in zip(rows, counts, strict=True)]
        batch = self.tokenizer(chats, return_tensors="pt", padding=True, padding_side="right")
        image_id = self.model.config.image_token_id
        hidden = self.model(**batch, **vision, mm_token_type_ids=(batch["input_ids"] == image_id).int()).last_hidden_state
        last = batch["attention_mask"].sum(1) - 1
        return self.head(hidden[torch.arange(len(rows)), last].float()).squeeze(-1)

    def chat(self, pair: Pair, caption: str, num_image_tokens: int) -> str:
        text = TEXT.format(prompt=pair.prompt or PROMPT, caption=caption)
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        chat: str = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=False)
        return chat.replace("<|image_pad|>", "<|image_pad|>" * num_image_tokens)

    def open(self, pair: Pair) -> Image.Image:
        image = Image.open(self.folder / str(pair.image)).convert("RGB")
        image.thumbnail((448, 448), Image.Resampling.LANCZOS)
        return image

    def gradients(self) -> dict[str, Tensor]:
        named: Any = {name.removeprefix("base_model.model."): each for name, each in self.model.named_parameters()}
        found = {name: each.grad for name, each in named.items() if each.grad is not None}
        return found | {"head": self.head.weight.grad}
