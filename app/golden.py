"""Golden items: captions encoded as a server would, what they scored at export, and how they are written. Loads no model."""

from __future__ import annotations

import base64
import hashlib
import io
import platform
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from app.artifacts import Golden, GoldenItem, GoldenPicture, RewardModelConfig, recipe_sha256
from app.contracts import EncodedGroup, EncodedImage, Group, Ids
from app.errors import ApiError, ArtifactInvalid
from app.images import ImageLimits, decode_image

if TYPE_CHECKING:
    from app.encoding import Encoder

GOLDEN_TOLERANCE: dict[Literal["float32", "bfloat16"], float] = {"float32": 1e-4, "bfloat16": 0.1}  # of scores that spread by 1 or less
_QUESTION = "What would you say about this?"
_MAX_SHARE = 0.01  # of the spread, in float32: where all scores are close, a smaller difference swaps captions
_MIN_TOLERANCE = 2e-5  # what another machine's float32 may round to
_TOKENS_A_SENTENCE = 5  # at least: four words or numbers and a stop, which no tokenizer joins
_PICTURE_SHAPE = (56, 84, 3)  # rows, columns, colours
_ORIENTATION, _QUARTER_TURN = 0x0112, 6  # of EXIF
_PIXEL_LIBRARIES = ("pillow", "numpy", "transformers")  # another version may round a pixel otherwise
# What a server takes by default: it must be able to score its own golden items.
GOLDEN_LIMITS = ImageLimits(max_bytes=10 << 20, max_pixels=16_000_000, min_side=16, max_aspect=100, formats=("JPEG", "PNG", "WEBP"))


@dataclass(frozen=True, slots=True)
class GoldenInput:
    """One picture and its captions, to be scored into a golden item. A text-only model has no picture."""

    image: Path | None
    captions: tuple[str, ...]
    prompt: str | None = None


@dataclass(frozen=True, slots=True)
class GoldenCase:
    """A golden item as the device sees it, and what it must score."""

    number: int
    group: EncodedGroup
    scores: tuple[float, ...]


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
        item = GoldenItem(image=name, prompt=given.prompt, captions=list(given.captions), scores=list(values))
        items.append(with_digests(item, group))
    return Golden(
        schema_version=2,
        tolerance=tolerance_of([score for item in items for score in item.scores]),
        items=items,
        recipe_sha256=recipe_sha256(encoder.config),
        made_with=pixel_libraries(),
        pictures=make_pictures(encoder) if encoder.takes_images else [],
    )


def make_pictures(encoder: Encoder) -> list[GoldenPicture]:
    """One of each mode that is not plain RGB: with alpha, with a palette that has a transparent colour, grey, CMYK, turned by EXIF."""
    height, width, _ = _PICTURE_SHAPE
    plain = Image.fromarray(np.linspace(0, 255, height * width * 3).astype(np.uint8).reshape(_PICTURE_SHAPE))
    clear = plain.copy()
    clear.putalpha(Image.linear_gradient("L").resize(plain.size))
    turned = Image.Exif()
    turned[_ORIENTATION] = _QUARTER_TURN
    files = {
        "RGBA": _written(clear, "PNG"),
        "palette": _written(plain.quantize(16), "PNG", transparency=3),
        "grey": _written(plain.convert("L"), "PNG"),
        "CMYK": _written(plain.convert("CMYK"), "JPEG"),
        "RGB, turned": _written(plain, "JPEG", exif=turned),
    }
    return [
        GoldenPicture(mode=mode, data=base64.b64encode(data).decode(), pixels_sha256=pixels_sha256(encode_picture(encoder, data)))
        for mode, data in files.items()
    ]


def _written(image: Image.Image, form: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    image.save(stream, form, **options)
    return stream.getvalue()


def encode_picture(encoder: Encoder, data: bytes, limits: ImageLimits = GOLDEN_LIMITS) -> EncodedImage:
    """A picture file as the vision tower sees it, by the recipe of the artifact. Raises ImageRejected."""
    recipe = encoder.config.image
    image = decode_image(data, limits, exif_transpose=recipe.exif_transpose, alpha=recipe.alpha)
    return encoder.encode_image(image)


def with_digests(item: GoldenItem, group: EncodedGroup) -> GoldenItem:
    """The item with the digests of what its captions and its picture are encoded to."""
    pixels = None if group.image is None else pixels_sha256(group.image)
    return item.model_copy(update={"ids_sha256": [ids_sha256(row) for row in group.rows], "pixels_sha256": pixels})


def ids_sha256(row: Ids) -> str:
    """Of the ids as little-endian 64-bit integers."""
    return hashlib.sha256(row.astype("<i8").tobytes()).hexdigest()


def pixels_sha256(image: EncodedImage) -> str:
    """Of the grid and the float32 values the vision tower sees."""
    grid = np.asarray(image.grid_thw, dtype="<i8").tobytes()
    return hashlib.sha256(grid + image.patches.astype("<f4").tobytes()).hexdigest()


def pixel_libraries() -> dict[str, str]:
    """What pixels may depend on beside the recipe."""
    return {"machine": platform.machine()} | {name: version(name) for name in _PIXEL_LIBRARIES}


def tolerance_of(scores: Sequence[float]) -> dict[Literal["float32", "bfloat16"], float]:
    """Rounding grows with the scores, so wide ones may differ by more; in float32 by no share of their spread that matters."""
    spread = statistics.pstdev(scores)
    scale = max(1.0, spread)
    exact = GOLDEN_TOLERANCE["float32"] * scale
    if len(scores) > 1:
        exact = max(_MIN_TOLERANCE, min(exact, _MAX_SHARE * spread))
    return {"float32": exact, "bfloat16": GOLDEN_TOLERANCE["bfloat16"] * scale}


def asked_prompt(config: RewardModelConfig) -> str | None:
    """The model's own prompt, as None, or one to ask a model that has none."""
    return None if config.default_prompt is not None else _QUESTION


def long_prompt(max_prompt_tokens: int) -> str:
    """A prompt of more tokens than the budget, and only a few times as many: a changed budget changes its scores."""
    return " ".join(f"Detail {number} seems odd." for number in range(max_prompt_tokens // _TOKENS_A_SENTENCE + 1))


def encode_golden(encoder: Encoder, given: GoldenInput, name: str) -> tuple[EncodedGroup, bytes]:
    """One golden input as the server would encode it, and the bytes of its picture; `name` is what errors call it."""
    try:
        data = None if given.image is None else given.image.read_bytes()
    except OSError as error:
        raise ArtifactInvalid(f"{name}: golden picture cannot be read ({error.strerror})") from None
    return encode_captions(encoder, given, data, name), data or b""


def encode_captions(
    encoder: Encoder, given: GoldenInput | GoldenItem, data: bytes | None, name: str, limits: ImageLimits = GOLDEN_LIMITS
) -> EncodedGroup:
    """The captions of an item with the bytes of its picture, as a server would encode them. Raises ArtifactInvalid."""
    config = encoder.config
    if config.prompt_policy == "fixed" and given.prompt not in (None, config.default_prompt):
        raise ArtifactInvalid(f"{name}: golden prompt is not the one fixed prompt of this model")
    if (data is None) == encoder.takes_images:
        raise ArtifactInvalid(f"{name}: this model {'needs an' if encoder.takes_images else 'takes no'} image")
    try:
        pixels = None if data is None else encode_picture(encoder, data, limits)
        group, errors = encoder.encode(Group(tuple(given.captions), given.prompt, pixels))
    except ApiError as error:
        raise ArtifactInvalid(f"{name}: golden item cannot be scored: {error.message}") from None
    if fault := next(filter(None, errors), None):
        raise ArtifactInvalid(f"{name}: golden caption {fault.index} cannot be scored: {fault.message}")
    if group is None:
        raise ArtifactInvalid(f"{name}: golden item without captions")
    return group
