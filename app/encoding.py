"""Groups to token ids and pixels: the only place that knows the chat template, the text template and the image recipe.

User text is tokenised with every added token switched off, so `<|im_end|>` in a caption is plain text; image placeholders
are expanded by our own count. Thread-safe: nothing here is written to after construction.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from tokenizers import Tokenizer
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from app.artifacts import Artifact, RewardModelConfig
from app.contracts import EncodedGroup, EncodedImage, Explanation, Group, Ids, RgbImage
from app.errors import ApiError, ArtifactInvalid, ImageRejected, InvalidRequest, ItemRejected
from app.images import shrink, shrunk_size

_Part = TypeVar("_Part")
TEXT_ONLY_FAMILIES = ("qwen2", "qwen3")  # model types of bases without a vision tower
FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", *TEXT_ONLY_FAMILIES)
_SLOTS = ("{prompt}", "{caption}")
_SLOT = "\ue000slot\ue000"  # private use: no template contains it
_ANY_CAPTION = "The"  # stands for all: what it shares with no caption at all is the prefix
_SEAM = 4  # tokens that joining two texts may add to the sum of theirs
_MAX_PROMPTS = 256  # whose truncation is remembered
_NUM_BYTES = 256  # byte-level tokenizers have a token for each
_NFC_GROWTH = 3  # the most that composing may lengthen UTF-8 (UAX 15); the tokenizer composes


@dataclass(frozen=True, slots=True)
class ChatFrame:
    """The chat around the user text, cut at special tokens so that no merge crosses a seam."""

    lead_ids: tuple[int, ...]  # up to and with the last special token before the text
    lead_text: str  # plain template text between that token and the user text
    trail_text: str
    trail_ids: tuple[int, ...]

    @property
    def is_empty(self) -> bool:
        return not (self.lead_ids or self.lead_text or self.trail_text or self.trail_ids)


class Encoder:
    """Encodes groups for one artifact. Implements `GroupEncoder`. Without `image_token_id` it takes text only."""

    def __init__(self, config: RewardModelConfig, tokenizer: Any, image_processor: Any, image_token_id: int | None) -> None:
        self._config = config
        self._plain = _plain_tokenizer(tokenizer)
        self.special_tokens: dict[str, int] = dict(tokenizer.get_added_vocab())  # their text, and the ids that no caption may become
        self._processor = image_processor
        self._image_token_id = image_token_id
        self._frame, self._template = _frame(config, tokenizer, with_image=self.takes_images)
        self._prompt_first = config.template.index("{prompt}") < config.template.index("{caption}")
        self._fit_prompt = lru_cache(_MAX_PROMPTS)(self._cut_prompt)  # prompts come again and again
        self._num_lead, self._num_between, self._num_trail = self._template_tokens()
        if image_token_id is not None and self._frame.lead_ids.count(image_token_id) != 1:
            raise ArtifactInvalid("the chat template does not place exactly one image before the text")

    @property
    def takes_images(self) -> bool:
        return self._image_token_id is not None

    @property
    def config(self) -> RewardModelConfig:
        return self._config

    def image_tokens(self, width: int, height: int) -> int:
        """How many tokens a picture of this size becomes; exact, without pixels. Raises ImageRejected for a sliver."""
        width, height = shrunk_size(width, height, self._config.image.long_edge)
        side, size = self._processor.patch_size * self._processor.merge_size, self._processor.size
        try:
            rows, columns = smart_resize(height, width, side, size["shortest_edge"], size["longest_edge"])
        except ValueError:
            raise ImageRejected("the image is too long and thin for the model", code="image_bad_dimensions") from None
        return int(rows * columns // side**2)

    def max_tokens(self, num_image_tokens: int, prompt: str | None, captions: Sequence[str]) -> int:
        """An upper bound of a group's tokens, without tokenising it: no token is shorter than a byte."""
        text = self._config.default_prompt if prompt is None else prompt
        middle = _max_tokens(text, self._config.max_prompt_tokens) + self._num_between  # prompt, and what parts it from the caption
        shared = self._num_lead + num_image_tokens + (middle if self._prompt_first else 0)
        each = self._num_trail + (0 if self._prompt_first else middle)
        return shared + sum(each + _max_tokens(caption, self._config.max_caption_tokens) for caption in captions)

    @property
    def lead_ids(self) -> Ids:
        """What every row begins with, before image, prompt and caption."""
        ids = self._frame.lead_ids
        count = len(ids) if self._image_token_id is None else ids.index(self._image_token_id)
        return np.asarray(ids[:count], dtype=np.int64)

    @property
    def max_row_tokens(self) -> int:
        """The most tokens one caption with its prompt and image can have, but for slivers."""
        config = self._config
        image = self._max_image_tokens() if self.takes_images else 0
        frame = self._num_lead + self._num_between + self._num_trail
        return frame + image + config.max_prompt_tokens + config.max_caption_tokens

    def _max_image_tokens(self) -> int:
        """Of a square; where the recipe leaves pictures at their size, of the processor's largest."""
        edge = self._config.image.long_edge
        if edge is not None:
            return self.image_tokens(edge, edge)
        return int(self._processor.size["longest_edge"] // (self._processor.patch_size * self._processor.merge_size) ** 2)

    def encode_image(self, image: RgbImage) -> EncodedImage:
        """Shrink by the artifact's recipe, then the published image processor (PIL backend, same pixels everywhere)."""
        recipe = self._config.image
        num_tokens = self.image_tokens(image.width, image.height)
        small = shrink(image.pixels, recipe.long_edge, recipe.resample)
        batch = self._processor(images=[small], return_tensors="np")
        time, rows, columns = (int(n) for n in batch["image_grid_thw"][0])
        patches = np.ascontiguousarray(batch["pixel_values"], dtype=np.float32)  # [t*h*w, patch values]
        if time * rows * columns // self._processor.merge_size**2 != num_tokens:
            raise RuntimeError(f"the image processor made another grid than {num_tokens} tokens: {(time, rows, columns)}")
        return EncodedImage(image.image_id, patches, (time, rows, columns), num_tokens)

    def encode(self, group: Group) -> tuple[EncodedGroup | None, list[ApiError | None]]:
        """Ids of every caption that can be scored, and one error or None a caption.

        The encoded group holds the captions without an error, in order; None if there are none. Raises InvalidRequest for
        a prompt that is no Unicode text.
        """
        prompt, truncated = self._fit_prompt(group.prompt)
        errors = self._caption_errors(prompt, group.captions)
        texts = [self.text(prompt, caption) for caption, error in zip(group.captions, errors, strict=True) if error is None]
        if not texts:
            return None, errors
        *rows, without, with_one = self._rows([*texts, self.text(prompt, ""), self.text(prompt, _ANY_CAPTION)], group.image)
        digest = hashlib.sha256(prompt.encode()).digest()
        key = (group.image.image_id if group.image else "", digest)
        common = without[: num_shared([without, with_one])]
        own = tuple(_num_leading(row, common) for row in rows)
        return EncodedGroup(key, group.image, tuple(rows), min(own), truncated, own), errors

    def explain(self, pieces: Sequence[EncodedGroup]) -> Explanation:
        """The chat of every caption as the model sees it, decoded from its ids."""
        rows = [row for piece in pieces for row in piece.rows]
        image = pieces[0].image
        pad = "" if self._image_token_id is None else str(self._plain.id_to_token(self._image_token_id))
        count = image.num_tokens if image else 0
        chats = [self._plain.decode(row.tolist(), skip_special_tokens=False) for row in rows]
        return Explanation(
            chats=[chat.replace(pad * count, f"{pad}*{count}") if count else chat for chat in chats],
            tokens=[len(row) for row in rows],
            pooled_index=[len(row) - 1 for row in rows],
            prefix_tokens=pieces[0].num_prefix,
            image_tokens=count,
            image_grid=list(image.grid_thw) if image else None,
        )

    def text(self, prompt: str, caption: str) -> str:
        """The user text of one caption, by the artifact's template. Braces in user text are plain text."""
        head, _, rest = self._template.partition("{prompt}")
        if "{caption}" in head:  # the caption may come first
            before, _, between = head.partition("{caption}")
            return f"{before}{caption}{between}{prompt}{rest}"
        between, _, after = rest.partition("{caption}")
        return f"{head}{prompt}{between}{caption}{after}"

    def _cut_prompt(self, prompt: str | None) -> tuple[str, bool]:
        """The recipe's truncation: encode, cut, decode."""
        text = self._config.default_prompt if prompt is None else prompt
        if not _is_unicode(text):
            raise InvalidRequest("the prompt has lone surrogates", field="prompt", code="invalid_unicode")
        ids = self._plain.encode(text, add_special_tokens=False).ids
        limit = self._config.max_prompt_tokens
        return (text, False) if len(ids) <= limit else (self._plain.decode(ids[:limit]), True)

    def _caption_errors(self, prompt: str, captions: Sequence[str]) -> list[ApiError | None]:
        valid = [_is_unicode(caption) for caption in captions]
        texts = [caption if fine else "" for caption, fine in zip(captions, valid, strict=True)]
        lengths = self._lengths(texts, self._config.max_caption_tokens)
        empty = [self._frame.is_empty and not self.text(prompt, text) for text in texts]
        return [self._caption_error(*found) for found in zip(range(len(texts)), valid, lengths, empty, strict=True)]

    def _lengths(self, texts: Sequence[str], limit: int) -> list[int]:
        """Tokens of each text by itself; of one that has no room to exceed the limit, an upper bound will do."""
        bounds = [_most_tokens(text) for text in texts]
        long = [index for index, bound in enumerate(bounds) if bound > limit]
        for index, row in zip(long, self._plain.encode_batch([texts[index] for index in long], add_special_tokens=False), strict=True):
            bounds[index] = len(row.ids)
        return bounds

    def _caption_error(self, index: int, valid: bool, length: int, empty: bool) -> ApiError | None:
        limit = self._config.max_caption_tokens
        if not valid:
            return ItemRejected("the caption has lone surrogates", code="invalid_unicode", index=index)
        if length > limit:
            return ItemRejected(f"the caption is longer than {limit} tokens", code="caption_too_long", index=index)
        if empty:
            return ItemRejected("prompt and caption are both empty; there is nothing to score", code="empty_text", index=index)
        return None

    def _template_tokens(self) -> tuple[int, int, int]:
        """Tokens before the first slot, between the slots and after the last, each with room for a seam; image tokens left out."""
        frame, template = self._frame, self._template
        first, second = ("{prompt}", "{caption}") if self._prompt_first else ("{caption}", "{prompt}")
        head, _, rest = template.partition(first)
        between, _, after = rest.partition(second)
        texts = [frame.lead_text + head, between, after + frame.trail_text]
        lead, middle, trail = (len(row.ids) + _SEAM for row in self._plain.encode_batch(texts, add_special_tokens=False))
        return len(frame.lead_ids) + lead, middle, trail + len(frame.trail_ids)

    def _rows(self, texts: Sequence[str], image: EncodedImage | None) -> tuple[Ids, ...]:
        frame = self._frame
        framed = [frame.lead_text + text + frame.trail_text for text in texts]
        lead = self._expand(frame.lead_ids, image)
        trail = np.asarray(frame.trail_ids, dtype=np.int64)
        encoded = self._plain.encode_batch(framed, add_special_tokens=False)
        return tuple(np.concatenate([lead, np.asarray(row.ids, dtype=np.int64), trail]) for row in encoded)

    def _expand(self, ids: tuple[int, ...], image: EncodedImage | None) -> Ids:
        count = image.num_tokens if image else 0
        lead = np.asarray(ids, dtype=np.int64)
        return np.repeat(lead, np.where(lead == self._image_token_id, count, 1))


def load_encoder(artifact: Artifact) -> Encoder:
    """Tokenizer and image processor of the artifact, read apart (the combined Qwen processor wants torchvision).

    A text-only base has no image processor; raw captions need no chat template.
    """
    path = artifact.processor_path
    base = _read_base_config(artifact)
    tokenizer = _read("tokenizer", path, lambda: AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False))
    _check_vocabulary(path, tokenizer, base)
    processor = None if base["image_token_id"] is None else _load_image_processor(path, base)
    if tokenizer.chat_template is None and artifact.config.caption_role == "user":
        raise ArtifactInvalid(f"{path}: no chat template")
    return _read("chat template", path, lambda: Encoder(artifact.config, tokenizer, processor, base["image_token_id"]))


def num_shared(rows: Sequence[Ids]) -> int:
    """Length of the longest common prefix, short enough to leave every row one token of its own (an empty row shares nothing)."""
    limit = max(min(len(row) for row in rows) - 1, 0)
    first = rows[0]
    for row in rows[1:]:
        differs = np.flatnonzero(first[:limit] != row[:limit])
        limit = int(differs[0]) if len(differs) else limit
    return limit


def _num_leading(row: Ids, common: Ids) -> int:
    """How many leading ids a row has in common with the prefix; at least one stays its own."""
    length = min(len(row) - 1, len(common))
    differs = np.flatnonzero(row[:length] != common[:length])
    return int(differs[0]) if len(differs) else length


def positions(row: Ids, image: EncodedImage | None, image_token_id: int | None, merge_size: int) -> Ids:
    """Three-axis rotary positions of one whole sequence: [3, length] (time, height, width).

    Text advances all axes by one; an image spans its merged grid and the text after it goes on behind the largest
    position (Qwen2-VL, arXiv 2409.12191, section 2.1). For pictures that is the same in all our families, whose films differ:
    a test holds it equal to the `get_rope_index` of each in transformers.
    """
    length = len(row)
    if image is None:
        return np.tile(np.arange(length, dtype=np.int64), (3, 1))
    time, rows, columns = image.grid_thw[0], image.grid_thw[1] // merge_size, image.grid_thw[2] // merge_size
    start = int(np.argmax(row == image_token_id))
    grid = np.indices((time, rows, columns), dtype=np.int64).reshape(3, -1) + start
    after = length - start - image.num_tokens
    resume = start + max(rows, columns)
    return np.concatenate([np.tile(np.arange(start), (3, 1)), grid, np.tile(np.arange(after), (3, 1)) + resume], axis=1)


def _is_unicode(text: str) -> bool:
    """Whether the text can be UTF-8: no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _max_tokens(text: str, limit: int) -> int:
    """Longer texts are cut or refused."""
    return min(_most_tokens(text), limit)


def _most_tokens(text: str) -> int:
    """No text has more tokens than bytes, composed as the tokenizer does it."""
    return len(text) if text.isascii() else _NFC_GROWTH * len(text.encode("utf-8", "replace"))


def _read(what: str, path: Path, load: Callable[[], _Part]) -> _Part:
    """Whatever a library raises over a file of the artifact, the file is at fault."""
    try:
        return load()
    except ArtifactInvalid as error:
        raise ArtifactInvalid(f"{path}: {error}") from None
    except Exception as error:
        raise ArtifactInvalid(f"{path}: {what} cannot be read ({type(error).__name__})") from None


def _read_base_config(artifact: Artifact) -> dict[str, Any]:
    """The base's configuration, its `image_token_id` None for a text-only base."""
    path = artifact.base_path / "config.json"
    config: dict[str, Any] = _read("configuration", path, lambda: json.loads(path.read_bytes()))
    family = config.get("model_type") if isinstance(config, dict) else None
    if family not in FAMILIES:
        raise ArtifactInvalid(f"{path}: expected one of {FAMILIES}, found {family!r}")
    if family in TEXT_ONLY_FAMILIES:
        return config | {"image_token_id": None}
    if not isinstance(config.get("image_token_id"), int):
        raise ArtifactInvalid(f"{path}: no image_token_id; not a vision-language base")
    if artifact.config.caption_role == "raw":
        raise ArtifactInvalid(f"{path}: caption_role raw expects a text-only base, found {family}")
    return config


def _load_image_processor(path: Path, base: dict[str, Any]) -> Any:
    """The image processor, which cuts patches of the size the base's vision tower takes."""
    processor = _read(
        "image processor",
        path,
        lambda: AutoImageProcessor.from_pretrained(path, backend="pil", local_files_only=True, trust_remote_code=False),
    )
    vision = base.get("vision_config", {})
    pairs = (("patch_size", "patch_size"), ("merge_size", "spatial_merge_size"), ("temporal_patch_size", "temporal_patch_size"))
    for ours, theirs in pairs:
        found, expected = getattr(processor, ours), vision.get(theirs, getattr(processor, ours))
        if found != expected:
            raise ArtifactInvalid(f"{path}: image processor of another base: expected {ours} {expected}, found {found}")
    return processor


def _check_vocabulary(path: Path, tokenizer: Any, base: dict[str, Any]) -> None:
    """Ids the base has embeddings for."""
    if len(tokenizer) - len(tokenizer.get_added_vocab()) < _NUM_BYTES:  # transformers makes an empty one when its file is missing
        raise ArtifactInvalid(f"{path}: tokenizer without a vocabulary")
    num_known = base.get("text_config", base).get("vocab_size", len(tokenizer))
    if len(tokenizer) > num_known:
        raise ArtifactInvalid(f"{path}: tokenizer of another base: expected at most {num_known} tokens, found {len(tokenizer)}")


def _plain_tokenizer(tokenizer: Any) -> Tokenizer:
    """A copy of the tokenizer to which every added token is ordinary text."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    for token in state["added_tokens"]:
        token["special"] = True
    plain = Tokenizer.from_str(json.dumps(state))
    plain.encode_special_tokens = True
    plain.no_truncation()
    plain.no_padding()
    return plain


def _frame(config: RewardModelConfig, tokenizer: Any, *, with_image: bool) -> tuple[ChatFrame, str]:
    """What stands around the user text, and the template of that text.

    A raw text has no chat: the ends of its template are its frame, so that an end-of-text token written there is one.
    """
    if config.caption_role == "raw":
        before, slots, after = _partition_slots(config.template)
        if special := next((token for token in tokenizer.get_added_vocab() if token in slots), None):
            raise ArtifactInvalid(f"the template has {special} between prompt and caption, where it would be plain text")
        return _cut_frame(tokenizer, before, after), slots
    content = [{"type": "image"}, {"type": "text", "text": _SLOT}] if with_image else _SLOT
    chat = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=False)
    if chat.count(_SLOT) != 1:
        raise ArtifactInvalid("the chat template does not place the user text exactly once")
    before, _, after = chat.partition(_SLOT)
    return _cut_frame(tokenizer, before, after), config.template


def _partition_slots(template: str) -> tuple[str, str, str]:
    """A template before its first slot, from there to the end of its last, and after that."""
    start = min(template.index(slot) for slot in _SLOTS)
    end = max(template.index(slot) + len(slot) for slot in _SLOTS)
    return template[:start], template[start:end], template[end:]


def _cut_frame(tokenizer: Any, before: str, after: str) -> ChatFrame:
    special = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    cut = max((before.rfind(token) + len(token) for token in special if token in before), default=0)
    resume = min((after.find(token) for token in special if token in after), default=len(after))
    return ChatFrame(_ids(tokenizer, before[:cut]), before[cut:], after[:resume], _ids(tokenizer, after[resume:]))


def _ids(tokenizer: Any, text: str) -> tuple[int, ...]:
    """Template text to ids, special tokens recognised."""
    return tuple(tokenizer.encode(text, add_special_tokens=False)) if text else ()
