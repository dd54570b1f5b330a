"""`python -m training.bench`: pairs a second of shared-prefix training against two padded sequences a pair, same gradients.

Random weights in the true shapes; both ways in one process and one run, taking turns. Prints no ratio when gradients disagree.
"""

from __future__ import annotations

import json
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen2_5_VLModel
from transformers.utils.logging import disable_progress_bar

from app.contracts import EncodedGroup, EncodedImage, Ids
from app.geometry import GEOMETRIES, Geometry, base_config, pad_rows
from app.hardware import describe_hardware
from app.heads import LinearHead
from app.model import RewardModel
from training.preference import bradley_terry_loss, pack_pairs, score_pairs
from training.recipe import Lora
from training.trainee import add_lora

_SYSTEM_TOKENS, _PROMPT_TOKENS, _CAPTION_TOKENS = 16, 60, (25, 45)  # of the published template with a described cartoon
_PATCH_VALUES = 3 * 2 * 14 * 14
_MAX_DIFFERENCE = 1e-3  # of the gradients' norm, in float32; both ways round differently


@dataclass(frozen=True, slots=True)
class Timing:
    """One line of the table; seconds are medians over the rounds."""

    pairs_per_image: int
    num_padded_tokens: int
    num_shared_tokens: int
    padded_s: float
    shared_s: float
    slowest_ratio: float  # the least favourable of the rounds
    gradient_difference: float  # relative, of all trained weights together

    @property
    def ratio(self) -> float:
        return self.padded_s / self.shared_s

    @property
    def agrees(self) -> bool:
        return self.gradient_difference <= _MAX_DIFFERENCE


def main(
    layers: Annotated[int, typer.Option(help="Text layers of Qwen2.5-VL-3B's 36.", min=1)] = 2,
    vision_layers: Annotated[int, typer.Option(help="Vision layers of its 32.", min=1)] = 2,
    pairs: Annotated[int, typer.Option(help="Pairs in one forward and backward.", min=1)] = 8,
    rounds: Annotated[int, typer.Option(help="Turns each way takes.", min=1)] = 3,
    image_tokens: Annotated[str, typer.Option(help="Rows x columns of the merged image grid; 448 x 308 pixels are 11x16.")] = "11x16",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Measure on this machine."""
    disable_progress_bar()
    grid = read_grid(image_tokens)
    sizes = [count for count in (1, 2, 4, 8) if pairs % count == 0]
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    console = Console(stderr=True)
    console.print("building random weights in the shapes of Qwen2.5-VL-3B")
    geometry = GEOMETRIES["qwen2.5-vl-3b"].shortened(layers, vision_layers)
    model = build_model(geometry).to(device)
    timings = []
    with Progress(console=console, transient=True) as progress:
        task = progress.add_task("measuring", total=len(sizes) * (rounds + 1) * 2)
        for pairs_per_image in sizes:
            work = make_groups(pairs, pairs_per_image, grid, geometry.image_token_id)
            timings.append(measure(model, work, pairs_per_image, rounds, lambda: progress.advance(task)))
    hardware = f"{describe_hardware(device)}; {layers} text and {vision_layers} vision layers, float32, {pairs} pairs, {rounds} rounds"
    if as_json:
        print(json.dumps({"hardware": hardware, "timings": [as_dict(each) for each in timings]}, indent=2))
    else:
        Console().print(table_of(timings, pairs, hardware))
    if not all(each.agrees for each in timings):
        raise typer.Exit(1)


def read_grid(text: str) -> tuple[int, int]:
    """`11x16` as rows and columns."""
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise typer.BadParameter(f"{text!r}: expected rows x columns, like 11x16", param_hint="--image-tokens")
    return int(match[1]), int(match[2])


def as_dict(timing: Timing) -> dict[str, Any]:
    """A line for machines; without its ratios when the gradients disagree."""
    told = asdict(timing) | {"ratio": timing.ratio}
    return told if timing.agrees else told | {"ratio": None, "slowest_ratio": None}


def build_model(geometry: Geometry) -> RewardModel:
    """Random weights with LoRA of the published rank on every linear layer, off zero so that every gradient counts."""
    torch.manual_seed(0)
    config = base_config(geometry, _special_tokens(geometry))
    peft = add_lora(Qwen2_5_VLModel(config), Lora(r=32, alpha=32))
    model = RewardModel(peft.get_base_model(), LinearHead(geometry.hidden))
    model.head.requires_grad_(True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or name.startswith("head"):
                parameter.normal_(std=0.02)
    return model.train()


def _special_tokens(geometry: Geometry) -> dict[str, int]:
    """The last of the vocabulary; the groups below have no tokenizer."""
    last = geometry.vocabulary - 1
    return {"image_token_id": geometry.image_token_id, "vision_start_token_id": last - 1, "vision_end_token_id": last - 2}


def make_groups(num_pairs: int, pairs_per_image: int, grid: tuple[int, int], image_token_id: int) -> list[EncodedGroup]:
    """Random pictures and tokens in the lengths of real ones."""
    rng, values = random.Random(num_pairs), np.random.default_rng(0)  # noqa: S311
    groups = []
    for number in range(num_pairs // pairs_per_image):
        patches = values.standard_normal((grid[0] * grid[1] * 4, _PATCH_VALUES), dtype=np.float32)
        image = EncodedImage(f"image {number}", patches, (1, grid[0] * 2, grid[1] * 2), grid[0] * grid[1])
        lead = [rng.randrange(100, 400) for _ in range(_SYSTEM_TOKENS)]
        prompt = [rng.randrange(100, 400) for _ in range(_PROMPT_TOKENS)]
        prefix = [*lead, *[image_token_id] * image.num_tokens, *prompt]
        rows: list[Ids] = []
        for caption in range(2 * pairs_per_image):
            suffix = [caption + 1, *(rng.randrange(100, 400) for _ in range(rng.randint(*_CAPTION_TOKENS) - 1))]
            rows.append(np.array(prefix + suffix, dtype=np.int64))
        groups.append(EncodedGroup((image.image_id, b""), image, tuple(rows), len(prefix)))
    return groups


def measure(model: RewardModel, groups: Sequence[EncodedGroup], pairs_per_image: int, rounds: int, report: Callable[[], None]) -> Timing:
    """Both ways once to compare gradients, then in turns against the clock."""
    padded, num_padded = pad_groups(model, groups)
    ways: tuple[Callable[[], Tensor], ...] = (
        lambda: bradley_terry_loss(padded_margins(model, padded)),
        lambda: bradley_terry_loss(score_pairs(model, groups).margins),
    )
    gradients = []
    for way in ways:
        seconds_of(way, model)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]))
        report()
    difference = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    seconds: tuple[list[float], list[float]] = ([], [])
    for _ in range(rounds):
        for way, times in zip(ways, seconds, strict=True):
            times.append(seconds_of(way, model))
            report()
    return Timing(
        pairs_per_image=pairs_per_image,
        num_padded_tokens=num_padded,
        num_shared_tokens=pack_pairs(model, groups, model.device).num_tokens,
        padded_s=statistics.median(seconds[0]),
        shared_s=statistics.median(seconds[1]),
        slowest_ratio=min(padded_s / shared_s for padded_s, shared_s in zip(*seconds, strict=True)),
        gradient_difference=difference,
    )


def seconds_of(way: Callable[[], Tensor], model: nn.Module) -> float:
    """Forward and backward, the device's work included."""
    model.zero_grad()
    began = time.perf_counter()
    way().backward()  # type: ignore[no-untyped-call]
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def pad_groups(model: RewardModel, groups: Sequence[EncodedGroup]) -> tuple[dict[str, Tensor], int]:
    """What the published collator makes, chosen and rejected in turn, and how many tokens that is."""
    rows, images = [], []
    for group in groups:
        half = len(group.rows) // 2
        for chosen, rejected in zip(group.rows[:half], group.rows[half:], strict=True):
            rows += [chosen, rejected]
            images += [group.image, group.image]
    batch = pad_rows(rows, images, model.image_token_id)
    return {name: value.to(model.device) for name, value in batch.items()}, batch["input_ids"].numel()


def padded_margins(model: RewardModel, batch: dict[str, Tensor]) -> Tensor:
    """[pairs], pooled at the last token of each row."""
    backbone: Any = model.backbone
    hidden = backbone(**batch, use_cache=False).last_hidden_state
    last = batch["attention_mask"].sum(1) - 1
    scores: Tensor = model.head(hidden[torch.arange(len(last), device=hidden.device), last])
    return scores[0::2] - scores[1::2]


def table_of(timings: Sequence[Timing], pairs: int, hardware: str) -> Table:
    table = Table(title="training: shared prefix against two padded sequences a pair", caption=hardware)
    for name in ("pairs an image", "tokens padded", "shared", "pairs/s padded", "shared", "ratio", "worst round", "gradients differ by"):
        table.add_column(name, justify="right")
    for each in timings:
        ratios = (f"{each.ratio:.2f}", f"{each.slowest_ratio:.2f}") if each.agrees else ("refused", "refused")
        speeds = (f"{pairs / each.padded_s:.2f}", f"{pairs / each.shared_s:.2f}")
        tokens = (f"{each.num_padded_tokens:,}", f"{each.num_shared_tokens:,}")
        table.add_row(str(each.pairs_per_image), *tokens, *speeds, *ratios, f"{each.gradient_difference:.1e}")
    return table


if __name__ == "__main__":
    typer.run(main)
