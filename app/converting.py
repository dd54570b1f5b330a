"""Turn a published artifact into a full one: safetensors head, hashes, the base's identity, golden scores."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.artifacts import (
    ADAPTER_NAME,
    DEMO_PATH,
    HEAD_NAME,
    PICKLES,
    PROCESSOR_NAME,
    Artifact,
    Golden,
    GoldenItem,
    RewardModelConfig,
    base_sha256,
    open_artifact,
    write_config,
    write_golden,
)
from app.contracts import EncodedGroup, Group
from app.encoding import Encoder, load_encoder
from app.errors import ApiError, ArtifactInvalid
from app.heads import save_head
from app.images import ImageLimits, decode_image
from app.model import load_model
from app.scoring import score_plain

GOLDEN_TOLERANCE: dict[Literal["float32", "bfloat16"], float] = {"float32": 1e-4, "bfloat16": 0.1}
# What a server takes by default: it must be able to score its own golden items.
_LIMITS = ImageLimits(max_bytes=10 << 20, max_pixels=16_000_000, min_side=16, max_aspect=100, formats=("JPEG", "PNG", "WEBP"))
_CAPTIONS = (
    "And this is where we keep the interns.",
    "He says he is only here for the free coffee.",
    "Honestly, I expected something bigger.",
    "Meet your new manager.",
    "",
    "It was fine until somebody read the manual, and then of course everybody had an opinion about it.",
)
_LONG_PROMPT = " ".join(["Scene: a drawing.", *(f"Detail {number}: something odd." for number in range(80))])


@dataclass(frozen=True, slots=True)
class GoldenInput:
    """One picture and its captions, to be scored into a golden item."""

    image: Path
    captions: tuple[str, ...]
    prompt: str | None = None


class _InputLine(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    image: str
    captions: list[str] = Field(min_length=1)
    prompt: str | None = None


def convert(
    source: str, target: Path, *, base_model: str | None, inputs: Sequence[GoldenInput], offline: bool, progress: Callable[[str], None]
) -> Path:
    """Write the full artifact of `source` to the new directory `target`. Raises ArtifactInvalid; leaves nothing half-written.

    Golden scores are computed in float32 by one forward a caption, the reference every other way is held against.
    """
    if target.exists() or target.is_symlink():
        raise ArtifactInvalid(f"{target}: exists already")
    artifact = open_artifact(source, base_model=base_model, offline=offline)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        progress("loading the model in float32")
        loaded = load_model(artifact, dtype="float32")
        progress("copying files")
        _copy_parts(artifact, partial)
        save_head(loaded.model.head, partial / HEAD_NAME)
        progress("scoring the golden items")
        score = lambda groups: [scores.values for scores in score_plain(loaded.model, groups)]  # noqa: E731
        wanted = inputs or default_inputs(fixed_prompt=artifact.config.prompt_policy == "fixed")
        write_golden(partial, make_golden(load_encoder(artifact), score, wanted, partial))
        progress("hashing")
        write_config(partial, _full_config(artifact))
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def make_golden(
    encoder: Encoder, score: Callable[[Sequence[EncodedGroup]], Iterable[Sequence[float]]], inputs: Sequence[GoldenInput], root: Path
) -> Golden:
    """Copy the pictures into `golden/` and score their captions. Raises ArtifactInvalid for what cannot be scored."""
    if not inputs:
        raise ArtifactInvalid("no golden inputs: a picture with captions to score")
    (root / "golden").mkdir(parents=True, exist_ok=True)
    items = []
    for number, given in enumerate(inputs):
        group, data = _encode_golden(encoder, given)
        name = f"golden/{number}{given.image.suffix}"
        (root / name).write_bytes(data)
        (values,) = score([group])
        items.append(GoldenItem(image=name, prompt=given.prompt, captions=list(given.captions), scores=list(values)))
    return Golden(tolerance=GOLDEN_TOLERANCE, items=items)


def _encode_golden(encoder: Encoder, given: GoldenInput) -> tuple[EncodedGroup, bytes]:
    """One golden input as the server would encode it, and the bytes of its picture."""
    config = encoder.config
    if config.prompt_policy == "fixed" and given.prompt not in (None, config.default_prompt):
        raise ArtifactInvalid(f"{given.image}: golden prompt is not the one fixed prompt of this model")
    try:
        data = given.image.read_bytes()
        decoded = decode_image(data, _LIMITS, exif_transpose=config.image.exif_transpose)
        group, errors = encoder.encode(Group(given.captions, given.prompt, encoder.encode_image(decoded)))
    except OSError as error:
        raise ArtifactInvalid(f"{given.image}: golden picture cannot be read ({error.strerror})") from None
    except ApiError as error:
        raise ArtifactInvalid(f"{given.image}: golden item cannot be scored: {error.message}") from None
    if fault := next(filter(None, errors), None):
        raise ArtifactInvalid(f"{given.image}: golden caption {fault.index} cannot be scored: {fault.message}")
    if group is None:
        raise ArtifactInvalid(f"{given.image}: golden item without captions")
    return group, data


def default_inputs(*, fixed_prompt: bool = False) -> list[GoldenInput]:
    """The three drawn cartoons of the package with plain captions: enough to notice another model, template or recipe.

    One prompt is longer than any budget, so that a changed budget changes a golden score.
    """
    pictures = sorted((DEMO_PATH / "cartoons").glob("*.png"))
    prompts = (None, None if fixed_prompt else _LONG_PROMPT, None)
    return [GoldenInput(path, _CAPTIONS, prompt) for path, prompt in zip(pictures, prompts, strict=True)]


def read_inputs(path: Path) -> list[GoldenInput]:
    """Golden inputs from JSON lines of `{"image": path, "captions": [..], "prompt"?: ..}`. Raises ArtifactInvalid by line."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ArtifactInvalid(f"{path}: cannot be read ({type(error).__name__})") from None
    return [_read_input(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]


def _read_input(line: str, path: Path, number: int) -> GoldenInput:
    try:
        row = _InputLine.model_validate_json(line)
    except ValidationError:
        raise ArtifactInvalid(f'{path}:{number}: expected {{"image": .., "captions": [..]}}') from None
    return GoldenInput(path.parent / row.image, tuple(row.captions), row.prompt)


def _copy_parts(artifact: Artifact, target: Path) -> None:
    target.mkdir(parents=True)
    for part in (ADAPTER_NAME, PROCESSOR_NAME):
        shutil.copytree(artifact.root / part, target / part, ignore=shutil.ignore_patterns(".*", "*.md"))
    if artifact.config.base_model_name.startswith("./"):
        pickles = shutil.ignore_patterns(".*", *(f"*{suffix}" for suffix in PICKLES))
        shutil.copytree(artifact.base_path, target / artifact.config.base_model_name, ignore=pickles)


def _full_config(artifact: Artifact) -> RewardModelConfig:
    """The configuration with the base's identity; writing it spells out every default, so that nothing is assumed any more."""
    return artifact.config.model_copy(update={"base_model_sha256": base_sha256(artifact.base_path)})
