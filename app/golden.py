"""Golden items for whoever writes an artifact: captions encoded as a server would, and the scores of a model. Loads no model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from app.artifacts import Golden, GoldenItem
from app.contracts import EncodedGroup, Group
from app.encoding import Encoder
from app.errors import ApiError, ArtifactInvalid
from app.images import ImageLimits, decode_image

GOLDEN_TOLERANCE: dict[Literal["float32", "bfloat16"], float] = {"float32": 1e-4, "bfloat16": 0.1}  # of scores that spread by 1 or less
_MAX_SHARE = 0.01  # of the spread, in float32: where all scores are close, a smaller difference swaps captions
_MIN_TOLERANCE = 2e-5  # what another machine's float32 may round to
_TOKENS_A_SENTENCE = 5  # at least: four words or numbers and a stop, which no tokenizer joins
# What a server takes by default: it must be able to score its own golden items.
GOLDEN_LIMITS = ImageLimits(max_bytes=10 << 20, max_pixels=16_000_000, min_side=16, max_aspect=100, formats=("JPEG", "PNG", "WEBP"))


@dataclass(frozen=True, slots=True)
class GoldenInput:
    """One picture and its captions, to be scored into a golden item. A text-only model has no picture."""

    image: Path | None
    captions: tuple[str, ...]
    prompt: str | None = None


def make_golden(
    encoder: Encoder, score: Callable[[Sequence[EncodedGroup]], Iterable[Sequence[float]]], inputs: Sequence[GoldenInput], root: Path
) -> Golden:
    """Copy the pictures into `golden/` and score their captions. Raises ArtifactInvalid for what cannot be scored."""
    if not inputs:
        raise ArtifactInvalid("no golden inputs: captions to score, with their picture")
    items = []
    for number, given in enumerate(inputs):
        group, data = encode_golden(encoder, given, str(given.image or f"golden item {number}"))
        name = None if given.image is None else f"golden/{number}{given.image.suffix}"
        if name is not None:
            (root / "golden").mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)
        (values,) = score([group])
        items.append(GoldenItem(image=name, prompt=given.prompt, captions=list(given.captions), scores=list(values)))
    return Golden(tolerance=tolerance_of([score for item in items for score in item.scores]), items=items)


def tolerance_of(scores: Sequence[float]) -> dict[Literal["float32", "bfloat16"], float]:
    """Rounding grows with the scores, so wide ones may differ by more; in float32 by no share of their spread that matters."""
    spread = statistics.pstdev(scores)
    scale = max(1.0, spread)
    exact = GOLDEN_TOLERANCE["float32"] * scale
    if len(scores) > 1:
        exact = max(_MIN_TOLERANCE, min(exact, _MAX_SHARE * spread))
    return {"float32": exact, "bfloat16": GOLDEN_TOLERANCE["bfloat16"] * scale}


def long_prompt(max_prompt_tokens: int) -> str:
    """A prompt of more tokens than the budget, and only a few times as many: a changed budget changes its scores."""
    return " ".join(f"Detail {number} seems odd." for number in range(max_prompt_tokens // _TOKENS_A_SENTENCE + 1))


def encode_golden(encoder: Encoder, given: GoldenInput, name: str) -> tuple[EncodedGroup, bytes]:
    """One golden input as the server would encode it, and the bytes of its picture; `name` is what errors call it."""
    config = encoder.config
    if config.prompt_policy == "fixed" and given.prompt not in (None, config.default_prompt):
        raise ArtifactInvalid(f"{name}: golden prompt is not the one fixed prompt of this model")
    if (given.image is None) == encoder.takes_images:
        raise ArtifactInvalid(f"{name}: this model {'needs an' if encoder.takes_images else 'takes no'} image")
    try:
        data = b"" if given.image is None else given.image.read_bytes()
        image = None if given.image is None else decode_image(data, GOLDEN_LIMITS, exif_transpose=config.image.exif_transpose)
        group, errors = encoder.encode(Group(given.captions, given.prompt, None if image is None else encoder.encode_image(image)))
    except OSError as error:
        raise ArtifactInvalid(f"{name}: golden picture cannot be read ({error.strerror})") from None
    except ApiError as error:
        raise ArtifactInvalid(f"{name}: golden item cannot be scored: {error.message}") from None
    if fault := next(filter(None, errors), None):
        raise ArtifactInvalid(f"{name}: golden caption {fault.index} cannot be scored: {fault.message}")
    if group is None:
        raise ArtifactInvalid(f"{name}: golden item without captions")
    return group, data
