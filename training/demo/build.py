"""The demo artifact from its recipe, step by step: pictures, processor, base, reward model, cartoons, golden scores.

Writes one directory; knows nothing of bounds, of printing, or of where the directory ends up.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from transformers import AutoModel, AutoTokenizer

from app.artifacts import (
    ADAPTER_NAME,
    DEFAULT_PROMPT,
    HEAD_NAME,
    PROCESSOR_NAME,
    TEMPLATE,
    Artifact,
    Golden,
    GoldenItem,
    ImageRecipe,
    RewardModelConfig,
    ScoreDistribution,
    base_sha256,
    open_artifact,
    write_config,
    write_golden,
)
from app.contracts import Group
from app.encoding import Encoder, load_encoder
from app.heads import save_head
from app.images import ImageLimits, decode_image
from app.model import RewardModel, load_model
from app.scoring import score_plain
from training.demo.base import BaseTrainer, Naming, Report, build_base, round_to_bfloat16
from training.demo.captions import BLAND_TEMPLATES, make_caption, name_scene, split_ideas
from training.demo.drawings import all_ideas, render
from training.demo.pictures import Pictures, draw_pictures, gather
from training.demo.recipe import Cartoon, Recipe
from training.demo.reward import Examination, Judged, adapt, save_adapter, train_reward
from training.demo.seeds import stream
from training.demo.tokenizer import CHAT_TEMPLATE, ImageSizes, save_processor, train_tokenizer

BASE_NAME = "base"
_CARTOON_SCALE = 3.0  # 504 x 336
_HELD_OUT_SEED = 1_000_000  # of the first held-out drawing: no drawing is seen twice
_TOLERANCE: dict[str, float] = {"float32": 1e-4, "bfloat16": 0.5}
_LIMITS = ImageLimits(max_bytes=1 << 20, max_pixels=1 << 20, min_side=28, max_aspect=10, formats=("PNG",))
_LIBRARIES = ("torch", "transformers", "peft", "tokenizers", "pillow")


class Progress(Protocol):
    """Shows how far a named step is; returns what each finished piece of it calls with its loss (0 if it has none)."""

    def begin(self, what: str, total: int) -> Report: ...


@dataclass(frozen=True)
class Figures:
    """What the finished artifact measures on held-out ideas."""

    num_base_parameters: int
    num_trained_parameters: int
    naming: Naming
    judged: Judged
    shuffled: Judged


class DemoBuilder:
    """Builds one artifact in `root`. Call the steps in the order of `build`."""

    def __init__(self, recipe: Recipe, root: Path, progress: Progress) -> None:
        self._recipe = recipe
        self._root = root
        self._progress = progress
        shown = {cartoon.scene.idea for cartoon in recipe.cartoons}
        self._ideas, self._held_out_ideas = split_ideas(all_ideas(), recipe.drawing.num_held_out_ideas, recipe.seed, shown)

    def build(self) -> Figures:
        """Everything, in order; raises if the written artifact does not load."""
        torch.manual_seed(self._recipe.seed)
        pictures, held_out = self.draw()
        self.write_processor()
        naming = self.make_base(pictures, held_out)
        encoder = load_encoder(self._artifact())
        adapted = adapt(AutoModel.from_pretrained(self._root / BASE_NAME, dtype=torch.float32), self._recipe.reward.lora)
        report = self._progress.begin("preferences", self._recipe.reward.phase.num_steps)
        train_reward(adapted.model, encoder, pictures, self._recipe.reward, self._recipe.seed, report)
        save_adapter(adapted, self._root / ADAPTER_NAME)
        save_head(adapted.model.head, self._root / HEAD_NAME)
        judged, shuffled = self.examine(adapted.model, encoder, held_out)
        trained = sum(parameter.numel() for parameter in adapted.model.parameters() if parameter.requires_grad)
        total = sum(parameter.numel() for parameter in adapted.model.parameters())
        figures = Figures(total - trained, trained, naming, judged, shuffled)
        self.write_cartoons()
        self.seal(encoder, figures)
        return figures

    def draw(self) -> tuple[Pictures, Pictures]:
        """Pictures to train on and pictures of ideas never trained on."""
        drawing = self._recipe.drawing
        num_seen = len(self._ideas) * drawing.pictures_per_idea
        num_held_out = len(self._held_out_ideas) * drawing.held_out_pictures_per_idea
        report = self._progress.begin("drawing", num_seen + num_held_out)
        drawn = []
        for ideas, copies, seed in (
            (self._ideas, drawing.pictures_per_idea, 0),
            (self._held_out_ideas, drawing.held_out_pictures_per_idea, _HELD_OUT_SEED),
        ):
            for picture in draw_pictures(ideas, copies, seed, drawing):
                drawn.append(picture)
                report(0.0)
        return gather(drawn[:num_seen]), gather(drawn[num_seen:])

    def write_processor(self) -> None:
        """Tokenizer and image processor; the merges are learned from the caption language."""
        tokenizer = train_tokenizer(self._corpus(), self._recipe.tokenizer.vocab_size)
        vision = self._recipe.base.vision
        side = vision.patch_size * vision.spatial_merge_size
        sizes = ImageSizes(side**2 * 4, self._recipe.drawing.long_edge**2, vision.patch_size, vision.spatial_merge_size)
        save_processor(tokenizer, sizes, self._root / PROCESSOR_NAME)

    def make_base(self, pictures: Pictures, held_out: Pictures) -> Naming:
        """Train the base, round it to bfloat16, save it, and measure what was saved."""
        recipe = self._recipe
        tokenizer = AutoTokenizer.from_pretrained(self._root / PROCESSOR_NAME)
        model = build_base(recipe.base, tokenizer)
        model.config.save_pretrained(self._root / BASE_NAME)
        trainer = BaseTrainer(model, load_encoder(self._artifact()), recipe.base, set(self._ideas), recipe.drawing.max_shift, recipe.seed)
        trainer.learn_to_see(pictures, self._progress.begin("seeing", recipe.base.seeing.num_steps))
        trainer.learn_to_read(pictures, self._progress.begin("reading", recipe.base.reading.num_steps))
        round_to_bfloat16(model)
        naming = trainer.measure_naming(held_out, tokenizer)
        model.to(torch.bfloat16).save_pretrained(self._root / BASE_NAME)
        return naming

    def examine(self, model: RewardModel, encoder: Encoder, held_out: Pictures) -> tuple[Judged, Judged]:
        """Held-out pairs with the right pictures and with shuffled ones; their wrong captions may describe any idea."""
        recipe = self._recipe
        exam = Examination(encoder, held_out, all_ideas(), recipe.reward, recipe.bounds.num_pairs, recipe.seed)
        return exam.judge(model), exam.judge_shuffled(model)

    def write_cartoons(self) -> None:
        """The pictures people see, and beside them the captions of the recipe, best first."""
        folder = self._root / "cartoons"
        folder.mkdir(parents=True, exist_ok=True)
        for cartoon in self._recipe.cartoons:
            (folder / f"{cartoon.name}.png").write_bytes(draw_png(cartoon))
        captions = {f"{cartoon.name}.png": list(cartoon.captions) for cartoon in self._recipe.cartoons}
        (folder / "captions.json").write_text(json.dumps(captions, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")

    def seal(self, encoder: Encoder, figures: Figures) -> None:
        """Golden scores by the slow path of the artifact as it loads, then the final configuration with every hash."""
        write_config(self._root, self._config())
        model = load_model(open_artifact(str(self._root)), device="cpu", dtype="float32").model
        items = [self._golden_item(cartoon, encoder, model) for cartoon in self._recipe.cartoons]
        write_golden(self._root, Golden.model_validate({"tolerance": _TOLERANCE, "items": items}))
        scores = torch.tensor([score for item in items for score in item.scores])
        distribution = ScoreDistribution(mean=scores.mean().item(), std=scores.std().item())
        provenance: dict[str, Any] = {"recipe": self._recipe.model_dump(mode="json"), "metrics": asdict(figures)}
        provenance |= {"data": "drawn by training.demo", "versions": {name: version(name) for name in _LIBRARIES}}
        write_config(self._root, self._config().model_copy(update={"training": provenance, "score_distribution": distribution}))
        for path in self._root.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # safetensors writes files that only their owner can read
        open_artifact(str(self._root))

    def _golden_item(self, cartoon: Cartoon, encoder: Encoder, model: RewardModel) -> GoldenItem:
        name = f"golden/{cartoon.name}.png"
        (self._root / "golden").mkdir(exist_ok=True)
        data = draw_png(cartoon)
        (self._root / name).write_bytes(data)
        image = encoder.encode_image(decode_image(data, _LIMITS, exif_transpose=False))
        group, _ = encoder.encode(Group(cartoon.captions, image=image))
        if group is None or len(group.rows) != len(cartoon.captions):
            raise ValueError(f"a caption of cartoon {cartoon.name} cannot be encoded")
        (scores,) = score_plain(model, [group])
        return GoldenItem(image=name, captions=list(cartoon.captions), scores=list(scores.values))

    def _corpus(self) -> list[str]:
        rng = stream("corpus", self._recipe.seed)
        number = self._recipe.tokenizer.num_captions
        frame = TEMPLATE.format(prompt=DEFAULT_PROMPT, caption="") + self._recipe.base.naming_prompt + CHAT_TEMPLATE
        captions = [make_caption(rng.choice(self._ideas), rng) for _ in range(number)]
        bland = [make_caption(rng.choice(self._ideas), rng, rng.choice(BLAND_TEMPLATES)) for _ in range(number // 10)]
        return [*captions, *bland, *map(name_scene, self._ideas), *[frame] * (number // 20)]

    def _artifact(self) -> Artifact:
        """The artifact in the making, for the parts that are read before it is whole."""
        return Artifact(self._root, self._config(), self._root / BASE_NAME, ())

    def _config(self) -> RewardModelConfig:
        base = self._root / BASE_NAME
        return RewardModelConfig(
            base_model_name=f"./{BASE_NAME}",
            score_head_shape=(1, self._recipe.base.text.hidden_size),
            schema_version=1,
            kind="lora_head",
            description="Demo: prefers captions that fit the drawn cartoon and say what is odd about it. No sense of humor.",
            base_model_revision=None,
            base_model_sha256=base_sha256(base) if any(base.glob("*.safetensors")) else None,
            template=TEMPLATE,
            default_prompt=DEFAULT_PROMPT,
            prompt_policy="request",
            caption_role="user",
            max_prompt_tokens=160,
            max_caption_tokens=80,
            image=ImageRecipe(long_edge=self._recipe.drawing.long_edge),
            pooling="last_token",
            dtype="float32",
        )


def draw_png(cartoon: Cartoon) -> bytes:
    """The cartoon at its large size, with a palette: flat colours need no more."""
    stream = io.BytesIO()
    render(cartoon.scene, _CARTOON_SCALE).quantize(128, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
    return stream.getvalue()
