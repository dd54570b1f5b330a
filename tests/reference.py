"""The published usage recipe with nothing of ours: transformers, peft, torch, pillow and json alone.

    python tests/reference.py ARTIFACT IMAGE CAPTION... [--prompt TEXT] [--base PATH] [--dtype float32]

prints `{"scores": [..]}`, one forward a caption. Everything else in this repository is held against it.
"""

from __future__ import annotations

import argparse
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from PIL import Image, ImageOps
from safetensors.torch import load_file
from transformers import AutoImageProcessor, AutoModel, AutoTokenizer

DEFAULTS = {  # of the published checkpoint, whose configuration does not say them
    "template": "{prompt}\n\nCandidate caption: {caption}\n\nJudge how funny this caption is for the cartoon.",
    "default_prompt": "Write a funny one-line caption for this New Yorker-style cartoon.",
    "max_prompt_tokens": 160,
    "image": {"long_edge": 448, "resample": "lanczos", "exif_transpose": False},
}


@dataclass(frozen=True)
class Reference:
    """A loaded reward model and the recipe it was trained with."""

    model: Any
    head: torch.Tensor  # [1, hidden] float32
    tokenizer: Any
    processor: Any
    recipe: dict[str, Any]
    image_token_id: int

    @torch.inference_mode()
    def score(self, image: Path, captions: list[str], prompt: str | None = None) -> list[float]:
        vision = self.processor(images=[self.open_image(image)], return_tensors="pt")
        num_image_tokens = int(vision["image_grid_thw"].prod()) // self.processor.merge_size**2
        return [self.score_one(self.ids(caption, prompt, num_image_tokens), vision) for caption in captions]

    def open_image(self, path: Path) -> Image.Image:
        recipe = DEFAULTS["image"] | self.recipe["image"]
        image: Image.Image = Image.open(path)
        image = ImageOps.exif_transpose(image) if recipe["exif_transpose"] else image
        image = image.convert("RGB")
        if recipe["long_edge"] is not None and max(image.size) > recipe["long_edge"]:
            image.thumbnail((recipe["long_edge"], recipe["long_edge"]), Image.Resampling[recipe["resample"].upper()])
        return image

    def ids(self, caption: str, prompt: str | None, num_image_tokens: int) -> torch.Tensor:
        prompt = self.recipe["default_prompt"] if prompt is None else prompt
        cut = self.tokenizer.encode(prompt, add_special_tokens=False)
        if len(cut) > self.recipe["max_prompt_tokens"]:
            prompt = self.tokenizer.decode(cut[: self.recipe["max_prompt_tokens"]])
        before, after = self.recipe["template"].split("{caption}")
        text = before.replace("{prompt}", prompt) + caption + after.replace("{prompt}", prompt)
        turn = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
        chat = self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=False)
        pad = self.tokenizer.convert_ids_to_tokens(self.image_token_id)
        return self.tokenizer(chat.replace(pad, pad * num_image_tokens, 1), return_tensors="pt")["input_ids"]

    def score_one(self, ids: torch.Tensor, vision: Any) -> float:
        hidden = self.model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=(ids == self.image_token_id).int(),
            pixel_values=vision["pixel_values"],
            image_grid_thw=vision["image_grid_thw"],
        ).last_hidden_state
        return float(hidden[0, -1].float() @ self.head[0])


def load(artifact: Path, base: str | None = None, dtype: torch.dtype = torch.float32) -> Reference:
    config = json.loads((artifact / "reward_model_config.json").read_text())
    named = config["base_model_name"]
    base = base or (str(artifact / named) if named.startswith("./") else named)
    backbone = AutoModel.from_pretrained(base, dtype=dtype)
    model = PeftModel.from_pretrained(backbone, str(artifact / "backbone_adapter")).eval()
    return Reference(
        model=model,
        head=load_head(artifact).float(),
        tokenizer=AutoTokenizer.from_pretrained(artifact / "processor"),
        processor=AutoImageProcessor.from_pretrained(artifact / "processor", backend="pil"),
        recipe=DEFAULTS | config,
        image_token_id=backbone.config.image_token_id,
    )


def load_head(artifact: Path) -> torch.Tensor:
    path = artifact / "reward_head.safetensors"
    if path.exists():
        return load_file(path)["weight"]
    return torch.load(artifact / "reward_head.pt", weights_only=True)["weight"]  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description="Score captions by the published recipe, one forward each.")
    parser.add_argument("artifact", type=Path)
    parser.add_argument("image", type=Path)
    parser.add_argument("captions", nargs="+")
    parser.add_argument("--prompt")
    parser.add_argument("--base")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    given = parser.parse_args()
    logging.getLogger("transformers").setLevel("ERROR")
    reference = load(given.artifact, given.base, getattr(torch, given.dtype))
    print(json.dumps({"scores": reference.score(given.image, given.captions, given.prompt)}))


if __name__ == "__main__":
    main()
