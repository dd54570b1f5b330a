"""The start-up self-test through the real queue: right scores pass, wrong ones refuse the start."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from app.artifacts import CONFIG_NAME, Golden, GoldenItem, RewardModelConfig, open_artifact, write_config, write_golden
from app.converting import GoldenInput, convert
from app.errors import StartRefused
from app.main import Runtime, running
from app.selftest import SelfTestReport, read_golden_image
from app.settings import Settings
from tests.tiny import HIDDEN, copy_artifact, edit_json, edit_tensors, picture

pytestmark = pytest.mark.anyio
CAPTIONS = ("the penguin", "an iceberg", "nobody told the octopus", "")


@pytest.fixture(scope="module")
def full(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("full")
    (folder / "golden.png").write_bytes(picture(300, 200))
    inputs = [GoldenInput(folder / "golden.png", CAPTIONS), GoldenInput(folder / "golden.png", CAPTIONS[:2], "Be kind.")]
    return convert(str(published), folder / "artifact", base_model=None, inputs=inputs, offline=True, progress=lambda step: None)


@pytest.fixture
def copy(full: Path, tmp_path: Path) -> Path:
    shutil.copytree(full, tmp_path / "artifact")
    return tmp_path / "artifact"


async def report_of(root: Path, **settings: object) -> SelfTestReport:
    async with running(Settings(model=str(root), offline=True, **settings)) as runtime:  # type: ignore[arg-type]
        assert runtime.ready
        assert runtime.first.last_report is not None
        return runtime.first.last_report


def golden_of(root: Path) -> Golden:
    golden = open_artifact(str(root)).golden()
    assert golden is not None
    return golden


def rewrite(root: Path, golden: Golden | None = None, **changes: object) -> None:
    """Change an artifact and hash it anew, so that nothing but the self-test can tell."""
    if golden is not None:
        write_golden(root, golden)
    edit_json(root / CONFIG_NAME, files={}, **changes)
    write_config(root, RewardModelConfig.model_validate_json((root / CONFIG_NAME).read_bytes()))


@pytest.mark.parametrize("lora", ["merged", "unmerged"])
async def test_the_golden_scores_are_reproduced(full: Path, lora: str) -> None:
    report = await report_of(full, lora=lora)
    assert (report.passed, report.kind, report.num_scores) == (True, "golden", 6)
    assert report.max_error <= 1e-5
    assert report.tolerance == 1e-4


async def test_the_golden_scores_are_reproduced_in_bfloat16(full: Path) -> None:
    report = await report_of(full, dtype="bfloat16")
    assert report.passed
    assert 0 < report.max_error <= 0.1


async def test_a_published_artifact_is_probed(published: Path) -> None:
    report = await report_of(published)
    assert (report.passed, report.kind, report.num_scores) == (True, "probe", 3)
    assert "punchline convert" in report.message


@pytest.mark.parametrize("item", [0, 1])
async def test_one_wrong_golden_score_refuses_the_start(copy: Path, item: int) -> None:
    golden = golden_of(copy)
    golden.items[item].scores[1] += 2e-4
    rewrite(copy, golden)
    with pytest.raises(
        StartRefused, match=r"self-test failed: check D15 scores: 6 golden scores, largest difference (2\.0|1\.9)\de-04, tolerance 1e-04"
    ):
        await report_of(copy)


PLANTED = {
    "lora_alpha doubled": lambda root: edit_json(root / "backbone_adapter/adapter_config.json", lora_alpha=16),
    "head with another sign": lambda root: edit_tensors(root / "reward_head.safetensors", lambda tensors: tensors["weight"].neg_()),
    "head of another run": lambda root: edit_tensors(root / "reward_head.safetensors", lambda tensors: tensors["weight"].normal_()),
    "adapter of another run": lambda root: edit_tensors(
        root / "backbone_adapter/adapter_model.safetensors", lambda tensors: [tensor.normal_(std=0.05) for tensor in tensors.values()]
    ),
    "another template": lambda root: edit_json(root / CONFIG_NAME, template="{prompt} {caption}"),
    "another default prompt": lambda root: edit_json(root / CONFIG_NAME, default_prompt="Other."),
    "a smaller picture": lambda root: edit_json(root / CONFIG_NAME, image={"long_edge": 100}),
    "a chat without its system turn": lambda root: cut_system_turn(root / "processor/chat_template.jinja"),
    "other pixel statistics": lambda root: edit_json(root / "processor/preprocessor_config.json", image_mean=[0.0, 0.0, 0.0]),
    "channels swapped": lambda root: swap_channels(root / "golden/0.png"),
}


def cut_system_turn(path: Path) -> None:
    text = path.read_text()
    assert "You are a helpful assistant." in text
    path.write_text(text.replace("You are a helpful assistant.", ""))


def swap_channels(path: Path) -> None:
    with Image.open(path) as image:
        red, green, blue = image.split()
        Image.merge("RGB", (blue, green, red)).save(path)


@pytest.mark.parametrize("fault", PLANTED)
async def test_a_planted_fault_is_caught(copy: Path, fault: str) -> None:
    PLANTED[fault](copy)
    rewrite(copy)
    with pytest.raises(StartRefused, match="self-test failed"):
        await report_of(copy)


async def test_a_golden_item_that_cannot_be_scored_refuses_the_start(copy: Path) -> None:
    rewrite(copy, Golden(tolerance={"float32": 1e-4, "bfloat16": 0.1}, items=golden_of(copy).items), max_caption_tokens=1)
    with pytest.raises(StartRefused, match=r"golden item 0: golden caption 0 cannot be scored: the caption is longer than 1 tokens"):
        await report_of(copy)


async def test_a_model_that_ignores_its_captions_refuses_the_start(published: Path, tmp_path: Path) -> None:
    """Without golden scores the probe still sees a head that gives everything the same score."""
    root = copy_artifact(published, tmp_path)
    torch.save({"weight": torch.full((1, HIDDEN), 1e-30)}, root / "reward_head.pt")
    edit_tensors(tmp_path / "base/model.safetensors", silence)
    with pytest.raises(StartRefused, match="ignores its captions"):
        await report_of(root)


def silence(tensors: dict[str, torch.Tensor]) -> None:
    """Zero the language model's last norm: every hidden state is zero."""
    (name,) = (name for name in tensors if name.endswith("model.norm.weight"))
    tensors[name].zero_()


@pytest.mark.parametrize("name", ["../outside.png", "golden/../../outside.png", "/etc/passwd", "golden/deep/0.png", "", "golden\\0.png"])
async def test_golden_pictures_outside_are_refused(copy: Path, name: str) -> None:
    (copy.parent / "outside.png").write_bytes(picture(40, 40))
    item = GoldenItem.model_construct(image=name, prompt=None, captions=["a"], scores=[0.0])
    write_golden(copy, Golden.model_construct(tolerance={"float32": 1.0, "bfloat16": 1.0}, items=[item]))
    edit_json(copy / CONFIG_NAME, files={})
    with pytest.raises(StartRefused, match=r"golden.json: items.0.image: String should match pattern"):
        await report_of(copy)


async def test_a_golden_picture_that_went_away(copy: Path) -> None:
    opened = open_artifact(str(copy))
    (copy / "golden/0.png").unlink()
    with pytest.raises(StartRefused, match=r"golden/0\.png: cannot be read"):
        read_golden_image(opened, "golden/0.png")


async def test_it_can_run_again_while_serving(full: Path) -> None:
    async with running(Settings(model=str(full), offline=True)) as runtime:
        first, second = await runtime.first.selftest.run(), await runtime.first.selftest.run()
        assert first == second == runtime.first.last_report
        assert isinstance(runtime, Runtime)
