"""What must hold before a server is ready, each check a small function with a finding. Knows golden items, weights and the queue; no HTTP.

The letters and numbers name a check in `/info`, in the line that refuses a start, and in the table of planted faults.
Where golden items were scored anyway their scores are judged again instead of computing anything anew.
"""

from __future__ import annotations

import base64
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, combinations
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageFile

from app.artifacts import Golden, GoldenItem, RewardModelConfig, recipe_sha256
from app.contracts import EncodedGroup, Group, GroupEncoder, RgbImage
from app.errors import ApiError
from app.golden import GoldenCase, GoldenInput, asked_prompt, encode_picture, ids_sha256, pixel_libraries, pixels_sha256
from app.lanes import Queue
from app.preference import probability
from app.settings import MAX_PIXELS

if TYPE_CHECKING:
    from app.encoding import Encoder
    from app.model import RewardModel

_MAX_SHIFT = 1 / 3  # of the tolerance: errors of rounding cancel, those of a fault point one way
_NUM_WINNERS = 8
_ORDINARY = "a"  # a caption that fits everywhere
_BLANK_SIDE = 56  # pixels: as few image tokens as a picture can have
_NUM_NEIGHBOURS = 2
MAX_LIVE_S = 5.0  # a 3B model on a CPU would take longer; its golden scores must do there


@dataclass(frozen=True, slots=True)
class Finding:
    """What one check saw."""

    check: str
    passed: bool
    message: str

    def __str__(self) -> str:
        return f"check {self.check}: {self.message}"


@dataclass(frozen=True, slots=True)
class Scored:
    """The scores of one golden item: as they must be, and as they were found."""

    expected: tuple[float, ...]
    found: tuple[float, ...]


def of_artifact(config: RewardModelConfig) -> Iterator[Finding]:
    """What can be said of the artifact's own records. Its hashes were compared when it was opened."""
    yield files(config)
    yield versions(config)


def of_model(model: RewardModel) -> Iterator[Finding]:
    """What can be said of the weights in memory."""
    yield pillow()
    yield adapter(model)
    yield weights(model)
    yield evaluation(model)


def of_encoding(golden: Golden, cases: Sequence[GoldenCase], encoder: Encoder) -> Iterator[Finding]:
    """What can be said of texts and pictures before they are scored."""
    yield ids(golden, cases)
    yield pixels(golden, cases)
    yield modes(golden, encoder)


def of_scores(items: Sequence[Scored], tolerance: float, least: float) -> tuple[Finding, ...]:
    """What golden scores say, the largest difference first."""
    return (
        near(items, tolerance),
        shift(items, tolerance),
        order(items, tolerance),
        winners(items, tolerance),
        captions_matter(items, least),
    )


def recipe(golden: Golden, config: RewardModelConfig) -> Finding:
    """Templates, budgets and the image recipe are those the golden items were made with: scores need not notice each of them."""
    if golden.recipe_sha256 is None:
        return Finding("A1 recipe", True, "not recorded in golden.json")
    found = recipe_sha256(config)
    passed = found == golden.recipe_sha256
    what = "as at export" if passed else "not what the golden items were made with"
    return Finding("A1 recipe", passed, f"templates, budgets and image recipe are {what}")


def files(config: RewardModelConfig) -> Finding:
    """Whether anything vouches for the bytes. The published layout records no hashes, so that alone is no reason to refuse."""
    number = len(config.files)
    return Finding(
        "A2 files", True, f"{number} files have the sha256 recorded" if number else "no sha256 recorded: nothing vouches for the files"
    )


def versions(config: RewardModelConfig) -> Finding:
    """Which libraries are others than those it was trained with. Scores decide whether that matters."""
    recorded = config.training.get("versions")
    if not isinstance(recorded, dict) or not recorded:
        return Finding("A3 versions", True, "not recorded")
    other = [f"{name} {installed(name)}, trained with {recorded[name]}" for name in sorted(recorded) if installed(name) != recorded[name]]
    return Finding("A3 versions", True, "; ".join(other) or "those it was trained with")


def installed(name: str) -> str:
    """A library's version, `none` if it is not there."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def adapter(model: RewardModel) -> Finding:
    """Nothing switched an adapter off, or a second one on."""
    parts = [module for module in _modules(model) if isinstance(getattr(module, "disable_adapters", None), bool)]
    off = [module for module in parts if module.disable_adapters]
    many = [module for module in parts if len(module.active_adapters) != 1]
    if off or many:
        return Finding(
            "B7 adapter", False, f"{len(off)} of {len(parts)} adapted layers have it switched off, {len(many)} have not exactly one"
        )
    return Finding("B7 adapter", True, f"one adapter on in {len(parts)} layers" if parts else "merged, or none")


def weights(model: RewardModel) -> Finding:
    """Every weight is there, every buffer finite. That the weights are finite was seen while they were loaded."""
    device = model.device
    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta or tensor.device.type != device.type:
            return Finding("B9 weights", False, f"{name} is on {tensor.device}, expected {device}")
    for name, tensor in model.named_buffers():
        if not bool(tensor.isfinite().all()):
            return Finding("B9 weights", False, f"{name} is not finite")
    return Finding("B9 weights", True, f"all on {device}")


def evaluation(model: RewardModel) -> Finding:
    """Nothing drops out: no module trains, nothing collects gradients."""
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        return Finding("B10 evaluation", False, f"{len(training)} modules are in training mode, first {training[0]}")
    if any(parameter.requires_grad for parameter in model.parameters()):
        return Finding("B10 evaluation", False, "a weight collects gradients")
    return Finding("B10 evaluation", True, "no module in training mode")


def ids(golden: Golden, cases: Sequence[GoldenCase]) -> Finding:
    """Texts become exactly the ids they were at export: template, special tokens, budgets."""
    if any(item.ids_sha256 is None for item in golden.items):
        return Finding("C11 ids", True, "not recorded in golden.json")
    for item, case in zip(golden.items, cases, strict=True):
        for index, (expected, row) in enumerate(zip(item.ids_sha256 or (), case.group.rows, strict=True)):
            if ids_sha256(row) != expected:
                return Finding("C11 ids", False, f"caption {index} of golden item {case.number} becomes other ids than at export")
    return Finding("C11 ids", True, f"{sum(len(case.group.rows) for case in cases)} captions become the ids they had at export")


def pixels(golden: Golden, cases: Sequence[GoldenCase]) -> Finding:
    """Pictures become exactly the pixels they were at export. Another version of a library may round: then scores must do."""
    other = [case.number for item, case in zip(golden.items, cases, strict=True) if _other_pixels(item.pixels_sha256, case.group)]
    if golden.made_with is None:
        return Finding("C13 pixels", True, "not recorded in golden.json")
    if not other:
        return Finding(
            "C13 pixels", True, f"{sum(case.group.image is not None for case in cases)} pictures have the pixels they had at export"
        )
    changed = _changed_libraries(golden)
    return Finding("C13 pixels", bool(changed), f"golden item {other[0]} has other pixels than at export {changed}".rstrip())


def modes(golden: Golden, encoder: Encoder) -> Finding:
    """The same for a picture in each mode that is not plain RGB: alpha, palettes, grey, CMYK, EXIF."""
    if not golden.pictures:
        return Finding("C13 modes", True, "not recorded in golden.json")
    try:
        found = [pixels_sha256(encode_picture(encoder, base64.b64decode(each.data))) for each in golden.pictures]
    except ApiError as error:
        return Finding("C13 modes", False, f"a picture of golden.json cannot be read ({error.message})")
    other = [each.mode for each, digest in zip(golden.pictures, found, strict=True) if digest != each.pixels_sha256]
    if not other:
        return Finding("C13 modes", True, f"{len(golden.pictures)} modes of pictures have the pixels they had at export")
    changed = _changed_libraries(golden)
    return Finding("C13 modes", bool(changed), f"pictures have other pixels than at export: {', '.join(other)} {changed}".rstrip())


def _changed_libraries(golden: Golden) -> str:
    here = pixel_libraries()
    return "; ".join(
        f"{name} {there} there, {here.get(name)} here" for name, there in (golden.made_with or {}).items() if here.get(name) != there
    )


def specials(encoder: Encoder) -> Finding:
    """Captions that spell control tokens become ordinary text: as many control ids in their rows as in any other's, images included."""
    texts, control = sorted(encoder.special_tokens), list(encoder.special_tokens.values())
    image = encoder.encode_image(_blank()) if encoder.takes_images else None
    group, errors = encoder.encode(Group((_ORDINARY, *texts), asked_prompt(encoder.config), image))
    spelt = [text for text, error in zip((_ORDINARY, *texts), errors, strict=True) if error is None]
    if group is None or spelt[:1] != [_ORDINARY]:
        return Finding("C12 special", False, "not even an ordinary caption can be encoded")
    counts = [int(np.isin(row, control).sum()) for row in group.rows]
    taken = [text for text, count in zip(spelt, counts, strict=True) if count != counts[0]]
    if taken:
        return Finding("C12 special", False, f"a caption that spells {taken[0]} gets it as a control token")
    return Finding(
        "C12 special", True, f"{len(spelt) - 1} of {len(texts)} captions that spell control tokens are ordinary text, none is a token"
    )


def _other_pixels(expected: str | None, group: EncodedGroup) -> bool:
    return expected is not None and (group.image is None or pixels_sha256(group.image) != expected)


def pillow() -> Finding:
    """Switches of the whole process, which any imported library may have turned."""
    if ImageFile.LOAD_TRUNCATED_IMAGES:
        return Finding("C14 pillow", False, "PIL.ImageFile.LOAD_TRUNCATED_IMAGES is on: half a picture would be scored")
    if Image.MAX_IMAGE_PIXELS is None or Image.MAX_IMAGE_PIXELS > MAX_PIXELS:
        return Finding("C14 pillow", False, f"PIL.Image.MAX_IMAGE_PIXELS is {Image.MAX_IMAGE_PIXELS}, expected at most {MAX_PIXELS}")
    return Finding("C14 pillow", True, "truncated files and bombs are refused")


def near(items: Sequence[Scored], tolerance: float) -> Finding:
    """No score is farther from its golden one than the tolerance."""
    errors = _errors(items)
    worst = max(map(abs, errors), default=0.0)
    passed = all(abs(error) <= tolerance for error in errors)
    return Finding("D15 scores", passed, f"{len(errors)} golden scores, largest difference {worst:.2e}, tolerance {tolerance:.0e}")


def shift(items: Sequence[Scored], tolerance: float) -> Finding:
    """The mean error is small: rounding goes both ways. A few scores may lean one way by chance, so they are allowed more."""
    errors = _errors(items)
    limit = tolerance * max(_MAX_SHIFT, 1 / math.sqrt(len(errors)))
    found = statistics.fmean(errors)
    return Finding("D15 shift", abs(found) <= limit, f"mean difference {found:+.2e}, expected at most {limit:.1e} either way")


def order(items: Sequence[Scored], tolerance: float) -> Finding:
    """Any two scores farther apart than the tolerance keep their order, over all pictures.

    A rank correlation over all would count near ties, which rounding may swap, and says less.
    """
    expected = [score for item in items for score in item.expected]
    found = [score for item in items for score in item.found]
    pairs = [(a, b) for a, b in combinations(range(len(expected)), 2) if abs(expected[a] - expected[b]) > tolerance]
    swapped = [(a, b) for a, b in pairs if (expected[a] - expected[b]) * (found[a] - found[b]) <= 0]
    return Finding("D15 order", not swapped, f"{len(pairs) - len(swapped)} of {len(pairs)} pairs of golden scores keep their order")


def winners(items: Sequence[Scored], tolerance: float) -> Finding:
    """The clearest pairs of one picture have their winner, and comparing them the other way round mirrors the answer exactly."""
    pairs = [(item, a, b) for item in items for a, b in combinations(range(len(item.expected)), 2)]
    clear = [pair for pair in pairs if _margin(*pair) > tolerance]
    easy = sorted(clear, key=lambda pair: _margin(*pair), reverse=True)[:_NUM_WINNERS]
    lost = sum((item.expected[a] - item.expected[b]) * (item.found[a] - item.found[b]) < 0 for item, a, b in easy)
    margins = [item.found[a] - item.found[b] for item, a, b in easy]
    crooked = sum(probability(margin) != 1 - probability(-margin) for margin in margins)
    return Finding(
        "D20 winners", not lost and not crooked, f"{len(easy) - lost} of {len(easy)} clear pairs have their winner; {crooked} not mirrored"
    )


def _margin(item: Scored, a: int, b: int) -> float:
    return abs(item.expected[a] - item.expected[b])


def captions_matter(items: Sequence[Scored], least: float) -> Finding:
    """Swapping two captions of a picture swaps scores that differ. Nothing to see where each picture has one."""
    widest = max((max(item.found) - min(item.found) for item in items if len(item.found) > 1), default=math.inf)
    message = f"captions of one picture score up to {widest:.2e} apart" if widest > least else "the model ignores its captions"
    return Finding("D17 captions", widest > least, message)


@dataclass(frozen=True, slots=True)
class Margins:
    """What counts as different, and what fits into a batch."""

    noise: float  # what company may do to a score; 0 where it may do nothing
    least: float  # more than this is a difference
    max_tokens: int


async def live(
    batcher: Queue,
    encoder: GroupEncoder,
    item: GoldenItem | GoldenInput,
    scored: Scored,
    *,
    margins: Margins,
    deadline: float,
    tokens_per_s: float,
) -> list[Finding]:
    """Three small batches through the queue: a short caption of a blank picture alone, beside long ones, and alone again.

    `scored` is what the item scored with its own picture. Raises ApiError when scoring fails.
    """
    alone, beside, chosen = _rehearsal(encoder, item)
    cost_s = (2 * alone.num_tokens + beside.num_tokens) / tokens_per_s if tokens_per_s else 0.0
    if cost_s > MAX_LIVE_S:
        return [Finding("D17 D18 D19", True, f"not run: about {cost_s:.0f} s on this machine")]
    if beside.num_tokens > margins.max_tokens:
        return [Finding("D17 D18 D19", True, f"not run: a batch has room for {margins.max_tokens} tokens, these want {beside.num_tokens}")]
    first = (await batcher.submit(alone, deadline).future).values
    company = (await batcher.submit(beside, deadline).future).values
    again = (await batcher.submit(alone, deadline).future).values
    findings = [bits(first[0], again[0]), companions(first[0], company, margins.noise)]
    if encoder.takes_images:
        findings.append(image_matters([scored.found[index] for index in chosen], company, margins.least))
    return findings


def bits(first: float, again: float) -> Finding:
    """The same batch twice gives the same bits: nothing drops out, nothing is left behind."""
    return Finding("D19 twice", first == again, f"the same batch twice differs by {abs(first - again):.1e}")


def companions(alone: float, company: Sequence[float], tolerance: float) -> Finding:
    """A caption scores the same beside longer ones, and the same bits as its double there."""
    difference = abs(alone - company[0])
    if company[0] != company[-1]:
        return Finding("D18 company", False, "equal captions of one request have unequal scores")
    return Finding(
        "D18 company", difference <= tolerance, f"beside longer captions one differs by {difference:.1e}, tolerance {tolerance:.0e}"
    )


def image_matters(pictured: Sequence[float], blank: Sequence[float], least: float) -> Finding:
    """A blank picture moves some score."""
    moved = max(abs(a - b) for a, b in zip(pictured, blank, strict=False))
    return Finding(
        "D17 image", moved > least, f"a blank picture moves a score by {moved:.2e}" if moved > least else "the model ignores its picture"
    )


def _rehearsal(encoder: GroupEncoder, item: GoldenItem | GoldenInput) -> tuple[EncodedGroup, EncodedGroup, list[int]]:
    """The shortest caption alone; it, the longest ones and it again; which captions those are."""
    by_length = sorted(range(len(item.captions)), key=lambda index: len(item.captions[index]))
    chosen = [by_length[0], *by_length[1:][-_NUM_NEIGHBOURS:]]
    texts = tuple(item.captions[index] for index in chosen)
    image = encoder.encode_image(_blank()) if encoder.takes_images else None
    alone, beside = (_fresh(encoder, Group(captions, item.prompt, image)) for captions in (texts[:1], (*texts, texts[0])))
    return alone, beside, chosen


def _fresh(encoder: GroupEncoder, asked: Group) -> EncodedGroup:
    group, _ = encoder.encode(asked)
    if group is None or len(group.rows) != len(asked.captions):
        raise RuntimeError("a caption that was scored cannot be encoded any more")
    return replace(group, fresh=True)


def _blank() -> RgbImage:
    return RgbImage("startcheck:blank", np.full((_BLANK_SIDE, _BLANK_SIDE, 3), 255, np.uint8))


def _errors(items: Sequence[Scored]) -> list[float]:
    return [found - expected for item in items for found, expected in zip(item.found, item.expected, strict=True)]


def _modules(model: RewardModel) -> Iterator[Any]:
    yield from model.modules()
