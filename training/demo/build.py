"""The demo artifact, step by step: pictures, base, data folder, then the product's own training and export, then an examination.

Works in one folder and writes one artifact; knows nothing of bounds, of printing, or of where the artifact ends up.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import tempfile
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoTokenizer

from app.artifacts import (
    ADAPTER_NAME,
    HEAD_NAME,
    PROCESSOR_NAME,
    Artifact,
    open_artifact,
    write_config,
    write_golden,
)
from app.encoding import Encoder, load_encoder
from app.golden import GoldenInput, long_prompt, make_golden
from app.layouts import ADAPTER_WEIGHTS_NAME
from app.model import RewardModel, load_model
from app.scoring import score_plain
from training.demo.base import BaseTrainer, Naming, Report, build_base, round_to_bfloat16
from training.demo.captions import BLAND_TEMPLATES, make_caption, name_scene, split_ideas
from training.demo.drawings import Scene, all_ideas, render
from training.demo.examination import Examination, Judged
from training.demo.pictures import Pictures, draw_pictures, gather
from training.demo.posing import Posed, write_data
from training.demo.seeds import stream
from training.demo.tokenizer import CHAT_TEMPLATE, ImageSizes, save_processor, train_tokenizer
from training.demo.world import Cartoon, World
from training.export import export_artifact, open_run
from training.golden import prove, widened_tolerance
from training.model_card import CardFacts, write_card
from training.recipe import Recipe, RecipeInvalid
from training.train import VALIDATION_TABLE, train
from training.trainee import OWN_BASE, copy_processor, describe

DATA_NAME, RUN_NAME = "data", "run"
CARTOONS_NAME = "cartoons"
_TITLE = "Punchline's demo model"
_CARTOON_SCALE = 3.0  # 504 x 336
_HELD_OUT_SEED = 1_000_000  # of the first held-out drawing: no drawing is seen twice


class Progress(Protocol):
    """Shows how far a named step is; the block calls the report with the loss of each finished piece (0 if it has none)."""

    def showing(self, what: str, total: int) -> AbstractContextManager[Report]: ...


@dataclass(frozen=True)
class Figures:
    """What the finished artifact measures on held-out ideas."""

    num_base_parameters: int
    num_trained_parameters: int
    naming: Naming
    judged: Judged
    shuffled: Judged


class DemoBuilder:
    """Builds one artifact; base, data and run lie in `work`, where the recipe expects them."""

    def __init__(self, world: World, recipe: Recipe, work: Path, progress: Progress, console: Console) -> None:
        if recipe.model.base != OWN_BASE or recipe.model.image.long_edge is None:
            raise RecipeInvalid(f"the demo's recipe needs model.base {OWN_BASE!r} and a number for model.image.long_edge")
        self._world = world
        self._recipe = recipe
        self._long_edge = recipe.model.image.long_edge
        self._work = work
        self._progress = progress
        self._console = console
        shown = {cartoon.scene.idea for cartoon in world.cartoons}
        self._ideas, self._held_out_ideas = split_ideas(all_ideas(), world.drawing.num_held_out_ideas, world.seed, shown)

    def build(self, out: Path) -> Figures:
        """Everything, in order. `out` must not exist; raises if the written artifact does not load."""
        torch.manual_seed(self._world.seed)
        pictures, held_out = self.draw()
        naming = self.write_base(pictures, held_out)
        posed = write_data(self._work / DATA_NAME, self._world, set(self._ideas), pictures, held_out)
        self.train_and_export(out)
        return self.finish(out, naming, posed)

    def draw(self) -> tuple[Pictures, Pictures]:
        """Pictures to train on and pictures of ideas never trained on."""
        drawing = self._world.drawing
        seen = [Scene(idea, copy) for idea in self._ideas for copy in range(drawing.pictures_per_idea)]
        copies = range(_HELD_OUT_SEED, _HELD_OUT_SEED + drawing.held_out_pictures_per_idea)
        held_out = [Scene(idea, copy) for idea in self._held_out_ideas for copy in copies]
        drawn = []
        with self._progress.showing("drawing", len(seen) + len(held_out)) as report:
            for picture in draw_pictures([*seen, *held_out], drawing.scales, self._recipe.model.image):
                drawn.append(picture)
                report(0.0)
        return gather(seen, drawn[: len(seen)]), gather(held_out, drawn[len(seen) :])

    def write_base(self, pictures: Pictures, held_out: Pictures) -> Naming:
        """A base as the Hub ships one: train it, round it to bfloat16, save it, and measure what was saved."""
        world, folder = self._world, self._work / OWN_BASE
        self._write_processor(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        model = build_base(world.base, tokenizer)
        model.config.save_pretrained(folder)
        trainer = BaseTrainer(model, self._read_encoder(folder), world.base, set(self._ideas), world.drawing.max_shift, world.seed)
        with self._progress.showing("seeing", world.base.seeing.num_steps) as report:
            trainer.learn_to_see(pictures, report)
        with self._progress.showing("reading", world.base.reading.num_steps) as report:
            trainer.learn_to_read(pictures, report)
        round_to_bfloat16(model)
        naming = trainer.measure_naming(held_out, tokenizer)
        model.to(torch.bfloat16).save_pretrained(folder)
        return naming

    def train_and_export(self, out: Path) -> None:
        """The product's path. Inside the folder the recipe's base has the same name on every machine."""
        data, run = Path(DATA_NAME), Path(RUN_NAME)
        with contextlib.chdir(self._work):
            train(self._recipe, data, run, resume=False, trackers=(), console=self._console)
            export_artifact(
                run,
                out,
                pairs=data / VALIDATION_TABLE,
                description=self._world.description,
                name=_TITLE,
                embed_base=True,
                console=self._console,
            )

    def finish(self, out: Path, naming: Naming, posed: list[Posed]) -> Figures:
        """Examine the artifact as it loads, then add what is the demo's own and seal it again."""
        opened = open_artifact(str(out.resolve()), offline=True)  # the bare name is that of the bundled one
        encoder, model = load_encoder(opened), load_model(opened, device="cpu", dtype="float32").model
        exam = Examination(encoder, self._work / DATA_NAME, posed, self._world.seed)
        num_trained = count_values(out / ADAPTER_NAME / ADAPTER_WEIGHTS_NAME) + count_values(out / HEAD_NAME)
        num_base = sum(map(count_values, opened.base_path.glob("*.safetensors")))
        figures = Figures(num_base, num_trained, naming, exam.judge(model), exam.judge_shuffled(model))
        write_cartoons(out / CARTOONS_NAME, self._world.cartoons)
        self._seal(opened, encoder, model, figures)
        return figures

    def _seal(self, opened: Artifact, encoder: Encoder, model: RewardModel, figures: Figures) -> None:
        """The shown cartoons replace the export's golden items, in the card too; world and figures join the provenance."""
        root = opened.root
        shutil.rmtree(root / "golden")
        score = lambda groups: [scores.values for scores in score_plain(model, groups)]  # noqa: E731
        golden = make_golden(encoder, score, self._golden_inputs(root), root)
        training: dict[str, Any] = {name: value for name, value in opened.config.training.items() if name != "golden_pairs"}
        training["metrics"] |= {"demo": asdict(figures)}
        config = opened.config.model_copy(update={"training": training | {"world": self._world.model_dump(mode="json")}})
        write_golden(root, golden)
        write_config(root, config)
        proof = prove(root)
        write_golden(root, widened_tolerance(golden, proof.differences))
        write_card(root, CardFacts(_TITLE, None, opened.config, open_run(self._work / RUN_NAME, None).metrics, None, proof))
        write_config(root, config)
        open_artifact(str(root), offline=True)

    def _golden_inputs(self, root: Path) -> list[GoldenInput]:
        """Every cartoon with its own captions and those of the one before, and the first once more under a prompt over the budget: a
        changed budget changes its scores.
        """
        cartoons = self._world.cartoons
        shown = [
            (root / CARTOONS_NAME / f"{cartoon.name}.png", cartoon.captions + before.captions)
            for before, cartoon in zip((cartoons[-1], *cartoons), cartoons, strict=False)
        ]
        cut = GoldenInput(*shown[0], prompt=long_prompt(self._recipe.model.max_prompt_tokens))
        return [*(GoldenInput(image, captions) for image, captions in shown), cut]

    def _write_processor(self, folder: Path) -> None:
        """Tokenizer and image processor; the merges are learned from the caption language."""
        tokenizer = train_tokenizer(self._corpus(), self._world.tokenizer.vocab_size)
        vision = self._world.base.vision
        side = vision.patch_size * vision.spatial_merge_size
        save_processor(tokenizer, ImageSizes(side**2 * 4, self._long_edge**2, vision.patch_size, vision.spatial_merge_size), folder)

    def _corpus(self) -> list[str]:
        rng = stream("corpus", self._world.seed)
        number, model = self._world.tokenizer.num_captions, self._recipe.model
        frame = model.template.format(prompt=model.default_prompt, caption="") + self._world.base.naming_prompt + CHAT_TEMPLATE
        captions = [make_caption(rng.choice(self._ideas), rng) for _ in range(number)]
        bland = [make_caption(rng.choice(self._ideas), rng, rng.choice(BLAND_TEMPLATES)) for _ in range(number // 10)]
        return [*captions, *bland, *map(name_scene, self._ideas), *[frame] * (number // 20)]

    def _read_encoder(self, base: Path) -> Encoder:
        """The encoder the artifact will serve with; of the base it needs no weights."""
        with tempfile.TemporaryDirectory() as folder:
            copy_processor(base, Path(folder) / PROCESSOR_NAME)
            return load_encoder(Artifact(Path(folder), describe(self._recipe, base), base, ()))


def write_cartoons(folder: Path, cartoons: tuple[Cartoon, ...]) -> None:
    """The pictures people see, and beside them their captions, best first."""
    folder.mkdir()
    for cartoon in cartoons:
        (folder / f"{cartoon.name}.png").write_bytes(draw_png(cartoon))
    captions = {f"{cartoon.name}.png": list(cartoon.captions) for cartoon in cartoons}
    (folder / "captions.json").write_text(json.dumps(captions, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def draw_png(cartoon: Cartoon) -> bytes:
    """The cartoon at its large size, with a palette: flat colours need no more."""
    stream = io.BytesIO()
    render(cartoon.scene, _CARTOON_SCALE).quantize(128, dither=Image.Dither.NONE).save(stream, "PNG", optimize=True)
    return stream.getvalue()


def count_values(path: Path) -> int:
    """Of all tensors in a safetensors file."""
    return sum(tensor.numel() for tensor in load_file(path).values())
