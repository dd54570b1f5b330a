"""Tiny random reward models in exactly the layouts that others publish, written by the libraries their cards name; and the cards' recipes.

The recipes know nothing of Punchline: plain transformers and peft, one text after the other.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoImageProcessor,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen3Config,
    Qwen3ForSequenceClassification,
)

from tests.tiny import CORPUS, HIDDEN, enliven, write_base, write_text_base
from training.demo.tokenizer import ImageSizes, save_processor, train_tokenizer

Message = dict[str, str]
# As Qwen3's template treats what reward models see of it: no system turn of its own; an answer to the last question gets an empty
# reasoning before it, or the one that is in it, and loses its newlines in front.
THINKING_TEMPLATE = (
    "{%- set last = namespace(user=0) %}{%- for message in messages %}{%- if message.role == 'user' %}{%- set last.user = loop.index0 %}"
    "{%- endif %}{%- endfor %}"
    "{%- for message in messages %}{%- set content = message.content %}{%- if message.role == 'assistant' %}{%- set thought = '' %}"
    "{%- if '</think>' in content %}{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
    "{%- if loop.index0 > last.user %}"
    "{{- '<|im_start|>assistant\\n<think>\\n' + thought + '\\n</think>\\n\\n' + content.lstrip('\\n') + '<|im_end|>\\n' }}"
    "{%- else %}{{- '<|im_start|>assistant\\n' + content + '<|im_end|>\\n' }}{%- endif %}"
    "{%- else %}{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}"
)


@dataclass(frozen=True)
class Asked:
    """What a recipe is asked for, in the words of the chat it is about."""

    messages: Sequence[Message]  # the last one is the user's
    answer: str
    picture: bytes | None = None


def write_seq_cls_adapter(root: Path, *, seed: int = 0, **lora: Any) -> Path:
    """A SEQ_CLS adapter as peft saves it, as for usama10/qwen-7b-reward-model; its base in `root/base`. Returns the adapter's folder."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer(None)
    write_text_base(root / "base", tokenizer)
    tokenizer.save_pretrained(root / "base")
    model = AutoModelForSequenceClassification.from_pretrained(root / "base", num_labels=1, dtype=torch.float32)
    options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "bias": "none"} | lora
    adapted = get_peft_model(model, LoraConfig(task_type="SEQ_CLS", **options))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
            if "modules_to_save" in name:
                parameter.normal_(std=HIDDEN**-0.5)
    adapted.save_pretrained(root / "adapter")
    tokenizer.save_pretrained(root / "adapter")
    return root / "adapter"


def score_seq_cls_adapter(adapter: Path, asked: Asked) -> float:
    """The card's usage: a dialogue as plain text, the one logit."""
    base = json.loads((adapter / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    model = PeftModel.from_pretrained(
        AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32), str(adapter)
    ).eval()
    with torch.inference_mode():
        return float(model(**tokenizer(dialogue(asked), return_tensors="pt", truncation=True, max_length=512)).logits[0, 0])


def dialogue(asked: Asked) -> str:
    """hh-rlhf's form."""
    turns = [*asked.messages, {"role": "assistant", "content": asked.answer}]
    return "".join(f"\n\n{'Human' if turn['role'] == 'user' else 'Assistant'}: {turn['content']}" for turn in turns)


def write_seq_cls(root: Path, *, seed: int = 0, template: str = THINKING_TEMPLATE, num_labels: int = 1, **changes: Any) -> Path:
    """A whole checkpoint as `AutoModelForSequenceClassification` saves it, as Skywork-Reward-V2 on Qwen3."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer(template)
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 24}
    config = Qwen3Config(
        **sizes,
        intermediate_size=96,
        vocab_size=len(tokenizer),
        max_position_embeddings=4096,
        num_labels=num_labels,
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        **changes,
    )
    model = Qwen3ForSequenceClassification(config)
    enliven(model)
    model.save_pretrained(root)
    tokenizer.save_pretrained(root)
    return root


def score_seq_cls(folder: Path, asked: Asked) -> float:
    """The card's usage: the chat template over the whole conversation, tokenised again, the one logit."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32, num_labels=1).eval()
    chat = [*asked.messages, {"role": "assistant", "content": asked.answer}]
    text = tokenizer.apply_chat_template(chat, tokenize=False)
    with torch.inference_mode():
        return float(model(**tokenizer(text, return_tensors="pt")).logits[0][0])


def write_value_head(root: Path, *, seed: int = 0) -> Path:
    """A whole Qwen2.5-VL with `value_head.safetensors`, as Skywork-VL-Reward-7B: trl's head, saved by LLaMA-Factory."""
    torch.manual_seed(seed)
    tokenizer = _tokenizer(None)
    write_base(root, tokenizer)
    save_processor(tokenizer, ImageSizes(28 * 28 * 2, 28 * 28 * 64, 14, 2), root)
    weight = torch.randn(1, HIDDEN) / HIDDEN**0.5
    save_file({"v_head.summary.weight": weight, "v_head.summary.bias": torch.tensor([0.75])}, root / "value_head.safetensors")
    return root


def score_value_head(folder: Path, asked: Asked) -> float:
    """The card's usage: picture and question are the user's turn, the answer the assistant's; the head at the last token."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    processor = AutoImageProcessor.from_pretrained(folder, backend="pil")
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    content = [{"type": "image"}, {"type": "text", "text": asked.messages[0]["content"]}]
    later = [*asked.messages[1:], {"role": "assistant", "content": asked.answer}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}, *later], tokenize=False, add_generation_prompt=False)
    seen = processor(images=[_to_rgb(Image.open(io.BytesIO(asked.picture or b"")))], return_tensors="pt")
    count = int(seen["image_grid_thw"][0].prod()) // processor.merge_size**2
    inputs = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * count), return_tensors="pt")
    types = (inputs["input_ids"] == model.config.image_token_id).int()
    head = load_file(folder / "value_head.safetensors")
    with torch.inference_mode():
        hidden = model(**inputs, **seen, mm_token_type_ids=types, output_hidden_states=True).hidden_states[-1]
        values = hidden @ head["v_head.summary.weight"].T + head["v_head.summary.bias"]
    return float(values[0, inputs["attention_mask"].sum() - 1, 0])


def _to_rgb(image: Image.Image) -> Image.Image:
    """As qwen_vl_utils loads a picture, with which the card does."""
    if image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.split()[3])
    return white


def _tokenizer(template: str | None) -> Qwen2Tokenizer:
    tokenizer = train_tokenizer((*CORPUS, "\n\nHuman: Why?\n\nAssistant: Because.", "<think>\n\n</think>"), 440)
    tokenizer.add_tokens(["<think>", "</think>"])  # Qwen3's, which are not special there either
    if template is not None:
        tokenizer.chat_template = template
    return tokenizer


@dataclass(frozen=True)
class PublishedKind:
    """One published layout: how it is written, what must be said of it, and what its card computes."""

    write: Callable[[Path], Path]
    score: Callable[[Path, Asked], float]
    said: dict[str, Any]
    takes_images: bool = False


PUBLISHED = {
    "seq_cls_adapter": PublishedKind(write_seq_cls_adapter, score_seq_cls_adapter, {"caption_role": "dialogue", "max_tokens": 512}),
    "seq_cls": PublishedKind(write_seq_cls, score_seq_cls, {}),
    "value_head": PublishedKind(write_value_head, score_value_head, {}, takes_images=True),
}
