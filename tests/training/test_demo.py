"""The demo's world, its base's lessons, its bounds, and its whole path at a toy length."""

from __future__ import annotations

import io
import json
import random
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image
from pydantic import ValidationError
from rich.console import Console

from app.artifacts import Artifact, open_artifact
from app.contracts import Group
from app.encoding import load_encoder
from app.images import decode_image
from app.model import load_model
from app.scoring import score_shared
from tests.tiny import LIMITS
from training.demo.__main__ import main, missed, replace_artifact
from training.demo.base import Lesson, Naming, Report, build_base, fit_loss, pad_rows, patches_by_matmul, probe_loss, round_to_bfloat16
from training.demo.build import DemoBuilder, Figures, draw_png
from training.demo.captions import SUBJECT_WORDS
from training.demo.drawings import all_ideas
from training.demo.examination import Judged, shuffle_away
from training.demo.pictures import vary
from training.demo.tokenizer import train_tokenizer
from training.demo.world import WORLD, Bounds, World, load_world
from training.golden import prove
from training.recipe import Recipe, RecipeInvalid, load_recipe

DEMO = load_world()
RECIPE = load_recipe("demo")
TOY = load_recipe("demo", ["optimiser.num_warmup_steps=0"])  # two steps are no time to warm up in
JUDGED = Judged(accuracy=0.95, by_fault={"subject": 0.95}, num_pairs=10)
FIGURES = Figures(1, 1, Naming(1.0, 1.0, 1.0, 1.0), JUDGED, replace(JUDGED, accuracy=0.6))
BOUNDS = Bounds(min_accuracy=0.9, max_shuffled_accuracy=0.65, max_artifact_bytes=100, pairs_per_picture=1)


class Quiet:
    """Keeps the names of the steps that were shown, and how many reports each had."""

    def __init__(self) -> None:
        self.shown: dict[str, int] = {}

    @contextmanager
    def showing(self, what: str, total: int) -> Iterator[Report]:
        self.shown[what] = 0

        def report(loss: float) -> None:
            self.shown[what] += 1

        yield report
        assert self.shown[what] == total


def test_the_shipped_world_is_whole_and_shows_real_scenes() -> None:
    assert {cartoon.scene.idea for cartoon in DEMO.cartoons} <= set(all_ideas())
    assert sum(DEMO.preferences.shares.values()) == pytest.approx(1.0)
    assert sum(DEMO.base.text.mrope_section) == DEMO.base.text.hidden_size // DEMO.base.text.num_attention_heads // 2
    assert 0.10 <= DEMO.preferences.shares["bland"] <= 0.15


def test_the_shipped_pairs_make_whole_steps() -> None:
    """2,100 pictures with 8 pairs each are 350 steps of 12 bundles of 4."""
    num_pairs = DEMO.preferences.num_pictures * DEMO.preferences.pairs_per_picture
    assert num_pairs == 350 * RECIPE.run.batch_size
    assert DEMO.preferences.pairs_per_picture % RECIPE.data.pairs_per_image == 0


@pytest.mark.parametrize("path", ["", "drawing", "base", "base.seeing", "preferences", "bounds"])
def test_an_unknown_key_is_refused_by_name(path: str) -> None:
    content = tomllib.loads(WORLD.read_text())
    part = content
    for name in filter(None, path.split(".")):
        part = part[name]
    part["learning_rat"] = 1
    with pytest.raises(ValidationError, match="learning_rat"):
        World.model_validate(content)


def test_cartoons_are_small_and_the_same_every_time() -> None:
    for cartoon in DEMO.cartoons:
        data = draw_png(cartoon)
        assert len(data) < 60_000
        assert data == draw_png(cartoon)


@pytest.mark.parametrize(
    ("figures", "num_bytes", "words"),
    [
        (replace(FIGURES, judged=replace(JUDGED, accuracy=0.89)), 100, "below 0.9"),
        (replace(FIGURES, shuffled=replace(JUDGED, accuracy=0.66)), 100, "above 0.65"),
        (FIGURES, 101, "more than 100"),
    ],
)
def test_a_missed_bound_is_named(figures: Figures, num_bytes: int, words: str) -> None:
    (fault,) = missed(figures, num_bytes, BOUNDS)
    assert words in fault


def test_bounds_that_hold_say_nothing() -> None:
    assert missed(FIGURES, 100, BOUNDS) == []


def test_a_folder_that_is_no_artifact_is_not_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(typer.BadParameter, match=r"holds no reward_model_config\.json"):
        main(out=tmp_path, threads=torch.get_num_threads())
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize("there", [True, False])
def test_a_finished_artifact_takes_the_place_of_another(there: bool, tmp_path: Path) -> None:
    out, partial = tmp_path / "demo", tmp_path / ".demo.partial"
    for folder in (partial, out) if there else (partial,):
        folder.mkdir()
        (folder / folder.name).write_text("x")
    replace_artifact(out, partial)
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["demo", "demo/.demo.partial"]


def test_rows_are_padded_right_and_only_the_lesson_is_labelled() -> None:
    ids, labels = pad_rows([Lesson(np.array([5, 6, 7]), 1), Lesson(np.array([8, 9]), 1)])
    assert ids.tolist() == [[5, 6, 7], [8, 9, 0]]
    assert labels.tolist() == [[-100, 6, 7], [-100, 9, -100]]


def test_an_ignorant_probe_costs_the_logarithms_of_the_name_counts() -> None:
    """Equal logits: ln 12 + ln 10 + ln 8."""
    loss = probe_loss(torch.zeros(2, 30), [("cat", "cake", "moon"), (None, "crown", "office")])
    assert loss.item() == pytest.approx(np.log(12) + np.log(10) + np.log(8), rel=1e-5)


def test_fit_loss_counts_only_what_a_caption_mentions() -> None:
    """Equal odds cost ln 2 a part; the unmentioned part costs nothing, whatever its logit."""
    logits = torch.tensor([[0.0, 50.0, 0.0], [0.0, 0.0, -50.0]])
    loss = fit_loss(logits, [(True, None, False), (False, True, None)])
    assert loss.item() == pytest.approx(np.log(2))
    assert fit_loss(logits, [(None, None, None)] * 2).item() == 0.0


def test_varied_pictures_keep_their_shape_and_their_colours() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (3, 3, 56, 84), dtype=np.uint8))
    varied = vary(pixels, max_shift=4, rng=random.Random(0))
    assert varied.shape == pixels.shape
    assert not torch.equal(varied, pixels.float())
    assert torch.equal(vary(pixels, max_shift=4, rng=random.Random(0)), varied)
    assert set(varied.unique().tolist()) <= set(pixels.unique().float().tolist())


def test_shuffling_gives_every_picture_another_idea() -> None:
    ideas = [idea for idea in all_ideas()[:20] for _ in range(3)]
    others = shuffle_away(ideas, random.Random(0))
    assert sorted(others) == list(range(60))
    assert all(ideas[index] != ideas[other] for index, other in enumerate(others))


def test_the_base_has_the_real_structure_and_rounds_to_bfloat16() -> None:
    torch.manual_seed(0)
    model = build_base(DEMO.base, train_tokenizer(list(SUBJECT_WORDS), 300))
    assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
    vision = model.config.vision_config
    assert 0 < len(vision.fullatt_block_indexes) < vision.depth
    round_to_bfloat16(model)
    assert all(torch.equal(value, value.to(torch.bfloat16).float()) for value in model.parameters())


def test_patches_by_matmul_are_the_convolution() -> None:
    torch.manual_seed(0)
    model = build_base(DEMO.base, train_tokenizer(list(SUBJECT_WORDS), 300)).eval()
    tower = model.model.visual
    patches, grid = torch.randn(96, 1176), torch.tensor([[1, 8, 12]])
    with torch.no_grad():
        expected = tower(patches, grid_thw=grid).pooler_output
        with patches_by_matmul(tower):
            found = tower(patches, grid_thw=grid).pooler_output
        assert torch.equal(tower(patches, grid_thw=grid).pooler_output, expected)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def toy_world() -> World:
    """Two steps of everything; one batch of pictures a step of preferences."""
    short = {"num_steps": 2, "batch_size": 4}
    return DEMO.model_copy(
        update={
            "drawing": DEMO.drawing.model_copy(update={"scales": (1.0,), "pictures_per_idea": 1, "held_out_pictures_per_idea": 1}),
            "base": DEMO.base.model_copy(
                update={name: getattr(DEMO.base, name).model_copy(update=short) for name in ("seeing", "reading")},
            ),
            "preferences": DEMO.preferences.model_copy(update={"num_pictures": 12}),
            "bounds": DEMO.bounds.model_copy(update={"pairs_per_picture": 1}),
        }
    )


def test_the_whole_path_at_a_toy_length(tmp_path: Path) -> None:
    """Drawing, base, data, `training.train`, `training.export`: an artifact that loads, with the cartoons as its golden items.

    12 pictures with 8 pairs are 2 steps of 48; 120 held-out pictures have one question each.
    """
    work, out, progress = tmp_path / "work", tmp_path / "demo", Quiet()
    work.mkdir()
    figures = DemoBuilder(toy_world(), TOY, work, progress, Console(quiet=True)).build(out)
    assert progress.shown == {"drawing": 960, "seeing": 2, "reading": 2}
    assert figures.judged.num_pairs == figures.shuffled.num_pairs == 120
    opened = open_artifact(str(out), offline=True)
    assert (opened.assumed, opened.config.base_model_name, opened.config.description) == ((), "./base", DEMO.description)
    assert opened.config.training["recipe"] == TOY.model_dump(mode="json")
    assert opened.config.training["world"] == toy_world().model_dump(mode="json")
    assert opened.config.training["step"] == 2
    assert str(tmp_path) not in (out / "reward_model_config.json").read_text()
    found = prove(out)
    assert f"{found.differences['float32']:.1e} in float32" in (out / "README.md").read_text()
    check_golden(opened)


def test_a_recipe_for_another_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeInvalid, match=r"model\.base"):
        DemoBuilder(DEMO, load_recipe("demo", ['model.base="other/base"']), tmp_path, Quiet(), Console(quiet=True))


def check_golden(opened: Artifact) -> None:
    """Three cartoons under the default prompt, and the first under one that is cut; every score is found again."""
    golden, encoder = opened.golden(), load_encoder(opened)
    assert golden is not None
    model = load_model(opened, device="cpu", dtype="float32").model
    cuts = []
    for item in golden.items:
        assert item.image is not None
        image = encoder.encode_image(decode_image((opened.root / item.image).read_bytes(), LIMITS, exif_transpose=False))
        group, _ = encoder.encode(Group(tuple(item.captions), item.prompt, image))
        assert group is not None
        cuts.append(group.truncated_prompt)
        (scores,) = score_shared(model, [group])
        assert scores.values == pytest.approx(item.scores, abs=golden.tolerance["float32"])
    assert cuts == [False, False, False, True]
    penguin, dinosaur, octopus = (cartoon.captions for cartoon in DEMO.cartoons)
    assert [tuple(item.captions) for item in golden.items] == [
        penguin + octopus,
        dinosaur + penguin,
        octopus + dinosaur,
        penguin + octopus,
    ]


def test_the_shipped_artifact_is_whole_and_of_this_recipe() -> None:
    opened = open_artifact("demo", offline=True)
    assert opened.assumed == ()
    assert Recipe.model_validate_json(json.dumps(opened.config.training["recipe"])) == RECIPE  # newer keys stand at their defaults
    assert opened.config.training["world"] == DEMO.model_dump(mode="json")
    assert sum(path.stat().st_size for path in opened.root.rglob("*") if path.is_file()) <= DEMO.bounds.max_artifact_bytes
    captions = json.loads((opened.root / "cartoons" / "captions.json").read_text())
    assert captions == {f"{cartoon.name}.png": list(cartoon.captions) for cartoon in DEMO.cartoons}
    for cartoon in DEMO.cartoons:
        with Image.open(opened.root / "cartoons" / f"{cartoon.name}.png") as shipped, Image.open(io.BytesIO(draw_png(cartoon))) as drawn:
            assert np.array_equal(np.asarray(shipped.convert("RGB")), np.asarray(drawn.convert("RGB")))


def test_the_shipped_model_prefers_what_fits_each_cartoon() -> None:
    """Two captions of every cartoon fit, then come one with a single fault and one with nothing right."""
    opened = open_artifact("demo", offline=True)
    check_golden(opened)
    golden = opened.golden()
    assert golden is not None
    for item in golden.items[:3]:
        first, second, faulty, wrong = item.scores[:4]
        assert min(first, second) > faulty > wrong
