"""Pairs to encoded groups, some batches ahead of the device. Knows no model; pictures and text go through the serving encoder."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from cachetools import LRUCache

from app.contracts import EncodedGroup, EncodedImage, Group
from app.encoding import Encoder
from app.errors import ApiError
from app.images import ImageLimits, decode_image
from training.pairs import DataInvalid, Pair
from training.preference import encode_pairs

_LIMITS = ImageLimits(max_bytes=64 << 20, max_pixels=100_000_000, min_side=16, max_aspect=100, formats=("JPEG", "PNG", "WEBP"))
_CHECKED_AT_ONCE = 256
_NUM_AHEAD = 2


@dataclass(frozen=True, slots=True)
class Batch:
    """The pairs of one forward: groups whose rows are chosen first and rejected second, and each pair's crowd gap in that order."""

    groups: tuple[EncodedGroup, ...]
    gaps: tuple[float | None, ...]


class Collator:
    """Encodes chosen pairs of one table. Pictures are kept up to `max_cached_bytes`."""

    def __init__(self, encoder: Encoder, pairs: Sequence[Pair], folder: Path, *, max_cached_bytes: int = 1 << 30) -> None:
        self.pairs = pairs
        self._encoder = encoder
        self._folder = folder
        self._images: LRUCache[str, EncodedImage] = LRUCache(max_cached_bytes, getsizeof=lambda image: image.num_bytes)

    def collate(self, indices: Sequence[int]) -> Batch:
        """One group for each image and prompt among the pairs. Raises DataInvalid for a pair that cannot be encoded."""
        together: dict[tuple[str | None, str | None], list[Pair]] = {}
        for index in indices:
            pair = self.pairs[index]
            together.setdefault((pair.image, pair.prompt), []).append(pair)
        groups = tuple(self._encode(*key, members) for key, members in together.items())
        return Batch(groups, tuple(pair.mean_gap for members in together.values() for pair in members))

    def ahead(self, batches: Iterable[Sequence[int]]) -> Iterator[Batch]:
        """The batches in order, the next ones encoded while the last is used."""
        coming: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="collation") as pool:
            for batch in batches:
                coming.append(pool.submit(self.collate, batch))
                if len(coming) > _NUM_AHEAD:
                    yield coming.popleft().result()
            while coming:
                yield coming.popleft().result()

    def _encode(self, image: str | None, prompt: str | None, pairs: Sequence[Pair]) -> EncodedGroup:
        try:
            return encode_pairs(self._encoder, self._image(image), prompt, [(pair.chosen, pair.rejected) for pair in pairs])
        except ApiError as error:
            raise DataInvalid(f"pair {pairs[0].pair_id}: {error.message}") from None

    def _image(self, name: str | None) -> EncodedImage | None:
        if name is None:
            return None
        if name not in self._images:
            encoded = read_image(self._encoder, self._folder / name)
            if encoded.num_bytes > self._images.maxsize:
                return encoded
            self._images[name] = encoded
        return self._images[name]


def read_image(encoder: Encoder, path: Path) -> EncodedImage:
    """A picture file through the serving path. Raises DataInvalid naming the file."""
    try:
        recipe = encoder.config.image
        return encoder.encode_image(decode_image(path.read_bytes(), _LIMITS, exif_transpose=recipe.exif_transpose, alpha=recipe.alpha))
    except OSError as error:
        raise DataInvalid(f"{path}: cannot be read ({error.strerror})") from None
    except ApiError as error:
        raise DataInvalid(f"{path}: {error.message}") from None


@dataclass(frozen=True, slots=True)
class Fitting:
    """The pairs a model takes whole, how many others were left out for which reason, and how many keep only a cut prompt."""

    pairs: list[Pair]
    left_out: Counter[str]
    num_cut_prompts: int


def leave_out_unfit(encoder: Encoder, pairs: Sequence[Pair], folder: Path, max_tokens: int | None) -> Fitting:
    """Find the pairs whose captions the model takes whole.

    A chat is as long as its text plus its image tokens. Every picture is decoded once, so that a broken one stops the run
    here and not hours later. A prompt over the model's budget is cut, as in serving. Raises DataInvalid.
    """
    image_tokens: dict[str | None, int] = {None: 0}
    for name in sorted({pair.image for pair in pairs if pair.image is not None}):
        image_tokens[name] = read_image(encoder, folder / name).num_tokens
    by_prompt: dict[str | None, list[Pair]] = {}
    for pair in pairs:
        by_prompt.setdefault(pair.prompt, []).append(pair)
    unfit: dict[str, str] = {}
    num_cut = 0
    for prompt, members in by_prompt.items():
        for start in range(0, len(members), _CHECKED_AT_ONCE):
            some = members[start : start + _CHECKED_AT_ONCE]
            found, is_cut = _find_unfit(encoder, prompt, some, image_tokens, max_tokens)
            unfit |= found
            num_cut += is_cut * (len(some) - len(found))
    kept = [pair for pair in pairs if pair.pair_id not in unfit]
    return Fitting(kept, Counter(unfit.values()), num_cut)


def _find_unfit(
    encoder: Encoder, prompt: str | None, pairs: Sequence[Pair], image_tokens: dict[str | None, int], max_tokens: int | None
) -> tuple[dict[str, str], bool]:
    """Reasons by pair id, and whether the prompt is cut."""
    captions = tuple(caption for pair in pairs for caption in (pair.chosen, pair.rejected))
    group, errors = encoder.encode(Group(captions, prompt))
    lengths = iter(map(len, group.rows if group else ()))
    found: dict[str, str] = {}
    for number, error in enumerate(errors):
        pair = pairs[number // 2]
        if error is not None:
            found.setdefault(pair.pair_id, error.code)
        elif next(lengths) + image_tokens[pair.image] > (max_tokens or float("inf")):
            found.setdefault(pair.pair_id, "longer than data.max_tokens")
    return found, bool(group and group.truncated_prompt)
