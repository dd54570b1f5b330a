"""Models put together wrongly, and what refuses each: `python -m tests.planted` prints the table.

A fault of files is hashed anew, as whoever made it would have done, so that hashes alone do not find it; a fault of memory stands for
one of code or environment. Each must be refused before a server is ready. The untouched artifact, which must become ready, is the
control.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image, ImageChops, ImageFile
from torch import nn

from app.artifacts import CONFIG_NAME, GOLDEN_NAME, HeadSpec, RewardModelConfig, open_artifact, write_config
from app.converting import GoldenInput, convert
from app.encoding import load_encoder
from app.errors import StartRefused
from app.main import started
from app.model import RewardModel, load_model
from app.served import Parts
from app.settings import Settings
from tests.tiny import HIDDEN, copy_artifact, edit_json, edit_tensors, give_head, picture, write_published

CAPTIONS = ("the penguin", "an iceberg", "nobody told the octopus", "the penguin brought an umbrella to the office", "casual Friday", "")
_ADAPTER, _ADAPTER_CONFIG = "backbone_adapter/adapter_model.safetensors", "backbone_adapter/adapter_config.json"
_HEAD, _BASE, _PIXELS = "reward_head.safetensors", "../base/model.safetensors", "processor/preprocessor_config.json"
_CHECK = re.compile(r"check ([A-E]\d+[\w ]*):")


@dataclass(frozen=True, slots=True)
class Planted:
    """One fault: of the files of an artifact, or of what is in memory once they were loaded. `expected` is what must find it."""

    expected: str
    on_disk: Callable[[Path], object] | None = None
    in_memory: Callable[[RewardModel], object] | None = None
    lora: Literal["merged", "unmerged"] = "merged"
    rehash: bool = True


def make_artifact(folder: Path, head: HeadSpec | None = None) -> Path:
    """A random tiny model in the published layout, converted: with golden pictures, one of which its EXIF turns."""
    published = write_published(folder / "published")
    if head is not None:
        give_head(published, head)
    edit_json(published / CONFIG_NAME, image={"exif_transpose": True})
    (folder / "upright.png").write_bytes(picture(300, 200))
    (folder / "turned.jpg").write_bytes(picture(200, 300, seed=1, kind="JPEG"))
    with Image.open(folder / "turned.jpg") as image:
        exif = image.getexif()
        exif[0x0112] = 6
        image.save(folder / "turned.jpg", exif=exif)
    inputs = [GoldenInput(folder / "upright.png", CAPTIONS), GoldenInput(folder / "turned.jpg", CAPTIONS[:3], "Be kind.")]
    shutil.copytree(published.parent / "base", folder / "base")
    edit_json(published / CONFIG_NAME, base_model_name=str(folder / "base"))
    return convert(str(published), folder / "artifact", base_model=None, inputs=inputs, offline=True, progress=lambda step: None)


async def refusal(artifact: Path, work: Path, fault: Planted, copy: Callable[[Path, Path], Path] = copy_artifact) -> str | None:
    """The line that refuses the start of a copy with the fault in it; None if it became ready."""
    root = copy(artifact, work)
    if fault.on_disk is not None:
        fault.on_disk(root)
    if fault.rehash:
        _hash_anew(root)
    with _switches():
        try:
            await _start(root, fault)
        except StartRefused as error:
            return str(error)
    return None


async def _start(root: Path, fault: Planted) -> None:
    settings = Settings(model=str(root), offline=True, lora=fault.lora, device="cpu", canary_s=0)
    opened = open_artifact(settings.model, offline=True)
    encoder = load_encoder(opened)
    loaded = load_model(opened, device="cpu", dtype=settings.dtype, lora=settings.lora)
    if fault.in_memory is not None:
        with torch.no_grad():
            fault.in_memory(loaded.model)
    async with started(settings, [Parts(settings.model, opened, encoder, loaded)]) as runtime:
        if not runtime.ready:
            raise StartRefused("not ready")


def _hash_anew(root: Path) -> None:
    edit_json(root / CONFIG_NAME, files={})
    write_config(root, RewardModelConfig.model_validate_json((root / CONFIG_NAME).read_bytes()))


@contextmanager
def _switches() -> Iterator[None]:
    """Switches of the whole process go back to where they were."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before


def check_of(line: str) -> str:
    """The name of the start-up check in a refusal, else the refusal itself without its path."""
    found = _CHECK.search(line)
    return found[1] if found else re.sub(r"^\S*/", "", line)


# Faults of files


def _adapter(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], object]:
    return lambda root: edit_tensors(root / _ADAPTER, change)


def _head(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Path], object]:
    return lambda root: edit_tensors(root / _HEAD, lambda tensors: tensors.update(weight=change(tensors["weight"]).contiguous()))


def _head_as(root: Path, **changes: Any) -> None:
    edit_json(root / CONFIG_NAME, head=TWO_LAYERS.model_copy(update=changes).model_dump())


def _without_bias(root: Path) -> None:
    edit_tensors(root / _HEAD, lambda tensors: [tensors.pop(name) for name in ("0.bias", "2.bias")])
    _head_as(root, bias=False)


def _swapped_layers(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {name.translate(str.maketrans("02", "20")): tensor for name, tensor in tensors.items()}


def _config(**changes: Any) -> Callable[[Path], object]:
    return lambda root: edit_json(root / CONFIG_NAME, **changes)


def _half_of(tensors: dict[str, torch.Tensor]) -> None:
    for name in sorted(tensors)[: len(tensors) // 2]:
        del tensors[name]


def _another_run(tensors: dict[str, torch.Tensor]) -> None:
    torch.manual_seed(1)
    for tensor in tensors.values():
        tensor.normal_(std=0.05)


def _untrained(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.zero_()


def _base_of_another_revision(root: Path) -> None:
    edit_tensors(root / _BASE, lambda tensors: [tensor.mul_(1.01) for tensor in tensors.values() if tensor.dim() > 1])


def _unrecorded(change: Callable[[Path], object]) -> Callable[[Path], object]:
    """A fault of the base whose hash was recorded anew as well."""

    def plant(root: Path) -> None:
        change(root)
        edit_json(root / CONFIG_NAME, base_model_sha256=None)

    return plant


def _double_bos(root: Path) -> None:
    """The chat begins with a token more than in training."""
    path = root / "processor/chat_template.jinja"
    path.write_text("<|endoftext|>" + path.read_text())


def _no_system_turn(root: Path) -> None:
    path = root / "processor/chat_template.jinja"
    path.write_text(path.read_text().replace("You are a helpful assistant.", ""))


def _swapped_channels(root: Path) -> None:
    with Image.open(root / "golden/0.png") as image:
        red, green, blue = image.split()
        Image.merge("RGB", (blue, green, red)).save(root / "golden/0.png")


def _lost_exif(root: Path) -> None:
    """As if nobody read the picture's orientation."""
    (turned,) = (root / "golden").glob("1.*")
    with Image.open(turned) as image:
        image.save(turned, exif=Image.Exif(), quality="keep")


def _golden_picture(mode: str, change: Callable[[Image.Image], Image.Image]) -> Callable[[Path], None]:
    """As if whoever reads such files made other pixels of them."""

    def planted(root: Path) -> None:
        pictures = json.loads((root / GOLDEN_NAME).read_bytes())["pictures"]
        (found,) = (each for each in pictures if each["mode"] == mode)
        stream = io.BytesIO()
        with Image.open(io.BytesIO(base64.b64decode(found["data"]))) as image:
            change(image).save(stream, "PNG")
        found["data"] = base64.b64encode(stream.getvalue()).decode()
        edit_json(root / GOLDEN_NAME, pictures=pictures)

    return planted


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


# Faults of memory


def _layers(model: RewardModel) -> list[BaseTunerLayer]:
    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _disabled(model: RewardModel) -> None:
    for layer in _layers(model):
        layer.enable_adapters(False)


def _second_adapter(model: RewardModel) -> None:
    for layer in _layers(model):
        layer._active_adapter = ["default", "second"]


def _merged_twice(model: RewardModel) -> None:
    for layer in _layers(model):
        layer.get_base_layer().weight += layer.get_delta_weight("default")  # type: ignore[operator, union-attr]


def _rounded_to(rounding: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[RewardModel], object]:
    def plant(model: RewardModel) -> None:
        for parameter in model.backbone.parameters():
            parameter.copy_(rounding(parameter))

    return plant


def _int8(weight: torch.Tensor) -> torch.Tensor:
    step = weight.abs().max() / 127
    return (weight / step).round() * step if step else weight


def scoring(change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[RewardModel], object]:
    """A head that does something more with its scores."""

    def plant(model: RewardModel) -> None:
        inner = model.head
        model.head = _Changed(inner, change).eval()  # type: ignore[assignment]

    return plant


class _Changed(nn.Module):
    def __init__(self, inner: nn.Module, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.inner, self.device, self.change = inner, inner.device, change

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.change(self.inner(hidden))


def _activated_first(model: RewardModel) -> None:
    first, activation, last = cast(nn.Sequential, model.head.stack)
    model.head.layers = nn.Sequential(activation, first, last).eval()


def _calls(count: list[int]) -> int:
    count[0] += 1
    return count[0]


def _drifting() -> Callable[[RewardModel], object]:
    count = [0]
    return scoring(lambda scores: scores + 1e-6 * _calls(count))


def _blind(model: RewardModel) -> None:
    model.backbone.visual.merger.mlp[-1].weight.zero_()
    model.backbone.visual.merger.mlp[-1].bias.zero_()


def _nan_in_buffer(model: RewardModel) -> None:
    model.backbone.language_model.rotary_emb.inv_freq[0] = float("nan")


PLANTED: dict[str, Planted] = {
    # the adapter
    "no adapter": Planted("adapter", lambda root: shutil.rmtree(root / "backbone_adapter")),
    "adapter of another run": Planted("D15 scores", _adapter(_another_run)),
    "half the LoRA modules dropped": Planted("missing adapter keys", _adapter(_half_of)),
    "lora_B zeroed": Planted("all zero", _adapter(_untrained)),
    "lora_alpha doubled": Planted("D15 scores", lambda root: edit_json(root / _ADAPTER_CONFIG, lora_alpha=16)),
    "adapter disabled": Planted("B7 adapter", in_memory=_disabled, lora="unmerged"),
    "a second adapter on": Planted("B7 adapter", in_memory=_second_adapter, lora="unmerged"),
    "adapter merged twice": Planted("D15 scores", in_memory=_merged_twice, lora="unmerged"),
    "a byte of the adapter flipped": Planted("expected sha256", lambda root: _flip_byte(root / _ADAPTER), rehash=False),
    # the head
    "head initialised anew": Planted("all zero", _head(torch.zeros_like)),
    "head of another run": Planted("D15 scores", _head(lambda weight: torch.randn(weight.shape, generator=torch.Generator()) / 8)),
    "head transposed": Planted("expected weight", _head(torch.t)),
    "head of two labels": Planted("expected weight", _head(lambda weight: torch.cat([weight, -weight]))),
    "sign flipped": Planted("D15 scores", _head(torch.neg)),
    "a sigmoid added": Planted("D15 scores", in_memory=scoring(torch.sigmoid)),
    "scores shifted by less than the tolerance": Planted("D15 shift", in_memory=scoring(lambda scores: scores + 6e-5)),
    "scores in another order": Planted("D15 scores", in_memory=scoring(lambda scores: scores.flip(0))),
    "scores that drift from call to call": Planted("D19 twice", in_memory=_drifting()),
    "a score that is not a number": Planted("nonfinite_score", in_memory=scoring(lambda scores: scores * float("nan"))),
    # the base
    "base of another revision": Planted("another base", _base_of_another_revision),
    "base of another revision, its hash not recorded": Planted("D15 scores", _unrecorded(_base_of_another_revision)),
    "base with another rope": Planted("D15 scores", _unrecorded(lambda root: _edit_rope(root / "../base/config.json"))),
    "weights rounded to float16": Planted("D15 scores", in_memory=_rounded_to(lambda weight: weight.half().float())),
    "weights rounded to int8": Planted("D15 scores", in_memory=_rounded_to(_int8)),
    "a buffer that is not finite": Planted("B9 weights", in_memory=_nan_in_buffer),
    "training mode": Planted("B10 evaluation", in_memory=lambda model: model.train()),
    "gradients collected": Planted("B10 evaluation", in_memory=lambda model: model.requires_grad_(True)),
    "a vision tower that sees nothing": Planted("D15 scores", in_memory=_blind),
    # texts and pictures
    "a chat without its system turn": Planted("C11 ids", _no_system_turn),
    "a double beginning of text": Planted("C11 ids", _double_bos),
    "another template": Planted("A1 recipe", _config(template="{prompt} {caption}")),
    "another default prompt": Planted("A1 recipe", _config(default_prompt="Other.")),
    "budget of tokens halved": Planted("A1 recipe", _config(max_prompt_tokens=80, max_caption_tokens=40)),
    "EXIF ignored, by the recipe": Planted("A1 recipe", _config(image={"exif_transpose": False})),
    "EXIF ignored, by whoever reads the file": Planted("C13 pixels", _lost_exif),
    "channels swapped": Planted("C13 pixels", _swapped_channels),
    "pictures resized by another filter": Planted("C13 pixels", lambda root: edit_json(root / _PIXELS, resample=2)),
    "other pixel statistics": Planted("C13 pixels", lambda root: edit_json(root / _PIXELS, image_mean=[0.0, 0.0, 0.0])),
    "alpha laid on white, by whoever reads the file": Planted("C13 modes", _golden_picture("RGBA", _on_white)),
    "CMYK turned over": Planted("C13 modes", _golden_picture("CMYK", lambda image: ImageChops.invert(image.convert("RGB")))),
    "a palette's transparent colour taken away": Planted(
        "C13 modes", _golden_picture("palette", lambda image: _on_white(image.convert("RGBA")))
    ),
    # the environment
    "half pictures let through": Planted("C14 pillow", in_memory=lambda model: setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)),
    "no limit on pixels": Planted("C14 pillow", in_memory=lambda model: setattr(Image, "MAX_IMAGE_PIXELS", None)),
}


TWO_LAYERS = HeadSpec(layers="two_layer", width=24, bias=True)
PLANTED_IN_TWO_LAYERS: dict[str, Planted] = {  # of an artifact with such a head
    "another activation than in training": Planted("D15 scores", lambda root: _head_as(root, activation="gelu")),
    "bias dropped": Planted("D15 scores", _without_bias),
    "last bias dropped": Planted("D15 scores", lambda root: edit_tensors(root / _HEAD, lambda tensors: tensors["2.bias"].zero_())),
    "first bias dropped": Planted("D15 scores", lambda root: edit_tensors(root / _HEAD, lambda tensors: tensors["0.bias"].zero_())),
    "bias not mentioned": Planted("expected the tensors", lambda root: _head_as(root, bias=False)),
    "head not mentioned": Planted("expected the one tensor 'weight'", lambda root: edit_json(root / CONFIG_NAME, without=("head",))),
    "layers swapped": Planted("expected 0.weight", lambda root: edit_tensors(root / _HEAD, _swapped_layers)),
    "layers in another order": Planted("D15 scores", in_memory=_activated_first),
    "first layer of another run": Planted(
        "D15 scores", lambda root: edit_tensors(root / _HEAD, lambda tensors: tensors["0.weight"].normal_(std=0.1))
    ),
    "sign of the last layer flipped": Planted(
        "D15 scores", lambda root: edit_tensors(root / _HEAD, lambda tensors: tensors["2.weight"].neg_())
    ),
}


def _flip_byte(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def _edit_rope(path: Path) -> None:
    text = path.read_text()
    if text.count("10000.0") == 0:
        raise ValueError("no rope_theta to change")
    path.write_text(text.replace("10000.0", "500000.0"))


async def _table() -> int:
    """Every fault, and the number of those that reached ready; one line each."""
    from rich.console import Console
    from rich.table import Table

    from tests.planted_kinds import PLANTED_IN_KINDS, copy_kind, make_kind

    sorts: list[tuple[str, Callable[[Path], Path], Callable[[Path, Path], Path], dict[str, Planted]]] = [
        ("lora_head", make_artifact, copy_artifact, PLANTED),
        ("two layers", partial(make_artifact, head=TWO_LAYERS), copy_artifact, PLANTED_IN_TWO_LAYERS),
        *((kind, partial(make_kind, kind), copy_kind, faults) for kind, faults in PLANTED_IN_KINDS.items()),
    ]
    table, num_ready = Table("model", "fault", "caught by", title_justify="left"), 0
    for sort, make, copy, faults in sorts:
        with tempfile.TemporaryDirectory() as name:
            artifact = make(Path(name))
            if await refusal(artifact, Path(name) / "control", Planted("nothing"), copy) is not None:
                raise RuntimeError(f"the untouched artifact is refused ({sort})")
            for number, (fault, planted) in enumerate(faults.items()):
                line = await refusal(artifact, Path(name) / str(number), planted, copy)
                num_ready += line is None
                table.add_row(sort, fault, "REACHED READY" if line is None else check_of(line)[:90])
    Console(width=150).print(table)
    num_faults = sum(len(faults) for *_, faults in sorts)
    sizes = f"hidden size {HIDDEN}, 2 layers, float32"
    print(f"reached ready: {num_ready} of {num_faults} planted faults ({sizes}); the untouched models: ready")
    return num_ready


if __name__ == "__main__":
    logging.disable(logging.CRITICAL)
    sys.exit(1 if asyncio.run(_table()) else 0)
