"""Turn a published artifact into a full one: safetensors head, hashes, the base's identity, golden scores."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app.artifacts import (
    ADAPTER_NAME,
    DEMO_PATH,
    HEAD_NAME,
    PICKLES,
    PROCESSOR_NAME,
    Artifact,
    RewardModelConfig,
    base_sha256,
    listed_files,
    open_artifact,
    write_config,
    write_golden,
)
from app.encoding import load_encoder
from app.errors import ArtifactInvalid
from app.golden import GoldenInput, asked_prompt, long_prompt, make_golden
from app.heads import save_head
from app.layouts import processor_files
from app.model import load_model
from app.scoring import score_plain

_CAPTIONS = (
    "And this is where we keep the interns.",
    "He says he is only here for the free coffee.",
    "Honestly, I expected something bigger.",
    "Meet your new manager.",
    "",
    "It was fine until somebody read the manual, and then of course everybody had an opinion about it.",
    "Meet your new manager!",
    "No.",
    "¿Y esto es lo que llaman progreso? 太好了。",
    "Ha" * 20,
    "1. First\n2. Second\n\n3. Third, and that is all there is to say about any of it.",
    "We tried turning it off and on again, but it only got bigger.",
    "I told them the meeting could have been an email.",
)
_MORE_CAPTIONS = (  # for a model without pictures, which has fewer prompts
    "Thank you for asking; I would rather not say.",
    "Yes, of course!",
    "Please hold the line. Your call is important to us. Please hold the line.",
    "It depends on what you mean by that, and on who is asking.",
    "There are three reasons: money, money and the weather.",
)

_OTHER_PROMPT = "Somebody left this on my desk this morning. Please tell me what it is, and what I am supposed to do about it."


class _InputLine(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    image: str | None = None
    captions: list[str] = Field(min_length=1)
    prompt: str | None = None


def convert(
    source: str,
    target: Path,
    *,
    base_model: str | None,
    inputs: Sequence[GoldenInput],
    offline: bool,
    progress: Callable[[str], None],
    said: Mapping[str, Any] | None = None,
) -> Path:
    """Write the full artifact of `source` to the new directory `target`. Raises ArtifactInvalid; leaves nothing half-written.

    `said`: what is known of a published folder that does not say it itself, by keys of the configuration.

    Golden scores are computed in float32 by one forward a caption, the reference every other way is held against.
    """
    if target.exists() or target.is_symlink():
        raise ArtifactInvalid(f"{target}: exists already")
    artifact = open_artifact(source, base_model=base_model, offline=offline, said=said)
    partial = target.with_name(f".{target.name}.{os.getpid()}.partial")
    try:
        progress("loading the model in float32")
        loaded = load_model(artifact, dtype="float32")
        progress("copying files")
        _copy_parts(artifact, partial)
        if not artifact.layout.is_published_as_is:
            save_head(loaded.model.head, partial / HEAD_NAME)
        progress("scoring the golden items")
        score = lambda groups: [scores.values for scores in score_plain(loaded.model, groups)]  # noqa: E731
        encoder = load_encoder(artifact)
        wanted = inputs or default_inputs(artifact.config, with_images=encoder.takes_images)
        write_golden(partial, make_golden(encoder, score, wanted, partial))
        progress("hashing")
        write_config(partial, _full_config(artifact))
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def default_inputs(config: RewardModelConfig, *, with_images: bool) -> list[GoldenInput]:
    """The three drawn cartoons of the package with plain captions: enough to notice another model, template or recipe.

    One prompt is longer than the model's budget, so that a changed budget changes a golden score. A text-only model gets no
    picture and no empty caption: there, with an empty prompt, nothing might be left to score.
    """
    own, limit = asked_prompt(config), config.max_prompt_tokens
    longer = own if config.prompt_policy == "fixed" else _OTHER_PROMPT if limit is None else long_prompt(limit)
    prompts = (own, longer, own)
    if not with_images:
        return [GoldenInput(None, tuple(filter(None, _CAPTIONS + _MORE_CAPTIONS)), prompt) for prompt in prompts[:2]]
    pictures = sorted((DEMO_PATH / "cartoons").glob("*.png"))
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
    return GoldenInput(None if row.image is None else path.parent / row.image, tuple(row.captions), row.prompt)


def _copy_parts(artifact: Artifact, target: Path) -> None:
    target.mkdir(parents=True)
    if artifact.layout.is_published_as_is:
        for name in listed_files(artifact.root, artifact.config):
            shutil.copy2(artifact.root / name, target / name)
        for path in processor_files(artifact.base_path) if artifact.borrows_processor else ():
            shutil.copy2(path, target / path.name)
        return
    for part in (ADAPTER_NAME, PROCESSOR_NAME) if artifact.has_adapter else (PROCESSOR_NAME,):
        shutil.copytree(artifact.root / part, target / part, ignore=shutil.ignore_patterns(".*", "*.md"))
    if artifact.config.base_model_name.startswith("./"):
        pickles = shutil.ignore_patterns(".*", *(f"*{suffix}" for suffix in PICKLES))
        shutil.copytree(artifact.base_path, target / artifact.config.base_model_name, ignore=pickles)


def _full_config(artifact: Artifact) -> RewardModelConfig:
    """The configuration with the base's identity; writing it spells out every default, so that nothing is assumed any more."""
    return artifact.config.model_copy(update={"base_model_sha256": base_sha256(artifact.base_path)})
