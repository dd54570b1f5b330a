"""Groups to token ids and pixels: texts in their slots, and the image recipe.

User text is tokenised with special tokens switched off, so `<|im_end|>` in a caption is plain text; image placeholders
are expanded by our own count. Thread-safe: nothing here is written to after construction.
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from app.artifacts import Artifact, RewardModelConfig
from app.contracts import MAX_TURNS, Conversation, EncodedGroup, EncodedImage, Explanation, Group, Ids, RgbImage, Role
from app.errors import ApiError, ArtifactInvalid, ImageRejected, InvalidRequest, ItemRejected
from app.framing import REASONING_ENDS, RESPONSE_BEGINS, Frame, Framer, TextRun
from app.images import shrink, shrunk_size
from app.layouts import PUBLISHED_AS_IS
from app.tokens import PlainTokenizer

_Part = TypeVar("_Part")
TEXT_ONLY_FAMILIES = ("qwen2", "qwen3")  # model types of bases without a vision tower
FAMILIES = ("qwen2_5_vl", "qwen2_vl", "qwen3_vl", *TEXT_ONLY_FAMILIES)
_ANY_CAPTION = "The"  # stands for all: what it shares with no caption at all is the prefix
_SEAM = 4  # tokens that joining two texts may add to the sum of theirs
_MAX_PROMPTS = 256  # whose truncation is remembered
_MAX_SHAPES = 2 * MAX_TURNS  # with and without a system's turn
_MAX_SHOWN_TURNS = 4
_WORTH_COUNTING = 1 << 14  # tokens of a bound
_NO_TEXT = b"\xff"  # no UTF-8 begins so: what is hashed behind it is no prompt that somebody could write
_SEQUENCE_CLASSIFIERS = ("seq_cls", "seq_cls_adapter")
_NUM_BYTES = 256  # byte-level tokenizers have a token for each


@dataclass(frozen=True, slots=True)
class _Setting:
    """What a group's captions stand in: ids, then text before the caption, the caption, text behind it, ids again."""

    frame: Frame
    contents: tuple[str, ...]  # of the prompt's slots
    before: Ids
    head: str
    tail: str
    behind: Ids
    truncated: bool = False

    def trimmed(self, caption: str) -> str:
        """The caption as the template leaves it."""
        return self.frame.trimmed(self.frame.caption_slot, caption)


@dataclass(frozen=True, slots=True)
class _Costs:
    """Tokens of a frame's template: those that all captions share, and those that each has of its own."""

    shared: int
    own: int
    shared_slots: tuple[int, ...]  # of the prompt's
    own_slots: tuple[int, ...]


class Encoder:
    """Encodes groups for one artifact. Implements `GroupEncoder`. Without `image_token_id` it takes text only."""

    def __init__(
        self,
        config: RewardModelConfig,
        tokenizer: Any,
        image_processor: Any,
        image_token_id: int | None,
        *,
        unread_id: int | None = None,
    ) -> None:
        """`unread_id`: transformers' sequence classification pools the last token that is none of these, its base's padding."""
        self._config = config
        self._plain = PlainTokenizer(tokenizer, keeps_ordinary=config.kind in PUBLISHED_AS_IS)
        self.special_tokens = self._plain.special_tokens
        self._processor = image_processor
        self._image_token_id = image_token_id
        self._framer = Framer(config, tokenizer, with_image=self.takes_images, unread_id=unread_id)
        self._of_text = self._framer.of_text()
        self._of_roles = lru_cache(_MAX_SHAPES)(self._frame_or_fault)
        self._fit_prompt = lru_cache(_MAX_PROMPTS)(self._plain.cut)  # prompts come again and again
        self._costs = lru_cache(_MAX_SHAPES)(self._template_tokens)
        if image_token_id is not None and self._of_text.first_ids.count(image_token_id) != 1:
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

    def max_tokens(self, num_image_tokens: int, prompt: str | Conversation | None, captions: Sequence[str]) -> int:
        """An upper bound of a group's tokens, without tokenising a small one: no token is shorter than a byte.

        The tokens of a large one are counted. Raises InvalidRequest for a prompt that this model does not take.
        """
        bound = self._bound(num_image_tokens, prompt, captions, _most_tokens)
        if bound > _WORTH_COUNTING:  # as bytes it might be more than a queue holds, and be none of it
            bound = self._bound(num_image_tokens, prompt, captions, self._plain.count)
        return bound

    def _bound(
        self, num_image_tokens: int, prompt: str | Conversation | None, captions: Sequence[str], size_of: Callable[[str], int]
    ) -> int:
        """Tokens of a group by the sizes of its texts; longer ones than the limits are cut or refused."""
        frame, contents = self._contents(prompt)
        costs, config = self._costs(frame), self._config
        said = [size_of(text) for text in contents]
        if isinstance(prompt, str | None):
            said = [_at_most(size, config.max_prompt_tokens) for size in said]
        shared = costs.shared + num_image_tokens + sum(said[slot] for slot in costs.shared_slots)
        each = costs.own + sum(said[slot] for slot in costs.own_slots)
        rows = (each + _at_most(size_of(caption), config.max_caption_tokens) for caption in captions)
        return shared + sum(_at_most(row, config.max_tokens) for row in rows)

    @property
    def lead_ids(self) -> Ids:
        """What the rows of a prompt that is a text begin with, before image, prompt and caption; empty where that is the prompt."""
        ids = self._of_text.first_ids
        count = len(ids) if self._image_token_id is None else ids.index(self._image_token_id)
        return np.asarray(ids[:count], dtype=np.int64)

    @property
    def max_row_tokens(self) -> int:
        """The most tokens one caption with its prompt and image can have, but for slivers."""
        config = self._config
        if config.max_tokens is not None:
            return config.max_tokens
        image = self._max_image_tokens() if self.takes_images else 0
        costs = self._costs(self._of_text)
        return costs.shared + costs.own + image + (config.max_prompt_tokens or 0) + (config.max_caption_tokens or 0)

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
        a prompt that is no Unicode text, or that this model does not take.
        """
        setting = self._setting(group)
        errors = self._caption_errors(setting, group.captions)
        sound = [caption for caption, error in zip(group.captions, errors, strict=True) if error is None]
        *rows, without, with_one = self._rows(setting, [*sound, "", _ANY_CAPTION])
        rows, errors = self._within(rows, errors, len(without))
        if not rows:
            return None, errors
        key = (group.image.image_id if group.image else "", _digest(setting, is_text=setting.frame is self._of_text))
        common = without[: num_shared([without, with_one])]
        own = tuple(_num_leading(row, common) for row in rows)
        return EncodedGroup(key, group.image, tuple(rows), min(own), setting.truncated, own), errors

    def explain(self, pieces: Sequence[EncodedGroup]) -> Explanation:
        """The chat of every caption as the model sees it, decoded from its ids."""
        rows = [row for piece in pieces for row in piece.rows]
        image = pieces[0].image
        pad = "" if self._image_token_id is None else self._plain.text_of(self._image_token_id)
        count = image.num_tokens if image else 0
        chats = [self._plain.decode(row.tolist()) for row in rows]
        return Explanation(
            chats=[chat.replace(pad * count, f"{pad}*{count}") if count else chat for chat in chats],
            tokens=[len(row) for row in rows],
            pooled_index=[len(row) - 1 for row in rows],
            prefix_tokens=pieces[0].num_prefix,
            image_tokens=count,
            image_grid=list(image.grid_thw) if image else None,
        )

    def _contents(self, prompt: str | Conversation | None) -> tuple[Frame, tuple[str, ...]]:
        """How a prompt is set, and the text of each of its slots. Raises InvalidRequest."""
        text = self._config.default_prompt if prompt is None else prompt
        if text is None:
            raise InvalidRequest("this model needs a prompt", field="prompt", code="missing_field")
        if not isinstance(text, str):
            return self._of_conversation(self._roles(text)), tuple(turn.content for turn in text)
        if self._config.caption_role != "dialogue" or not self._framer.is_dialogue(text):
            return self._of_text, (text,)
        try:
            frame, opened = self._framer.of_dialogue(text)
        except ValueError as error:
            raise InvalidRequest(str(error), field="prompt", code="prompt_unclear") from None
        return frame, (opened,)

    def _of_conversation(self, roles: tuple[Role, ...]) -> Frame:
        found = self._of_roles(roles)
        if isinstance(found, str):
            shown = ", ".join(roles[:_MAX_SHOWN_TURNS])
            message = f"this model's chat template takes no conversation of {shown} ({found})"
            raise InvalidRequest(message, field="messages", code="messages_not_allowed")
        return found

    def _frame_or_fault(self, roles: tuple[Role, ...]) -> Frame | str:
        """What failed once would fail again, at the same cost."""
        try:
            return self._framer.of_roles(roles)
        except Exception as error:  # a template may raise whatever it likes at turns it does not know
            return type(error).__name__

    def _roles(self, conversation: Conversation) -> tuple[Role, ...]:
        """Of the turns of a conversation that this model takes. Raises InvalidRequest."""
        roles = tuple(turn.role for turn in conversation)
        if not self._framer.takes_conversations:
            raise InvalidRequest("this model takes a prompt, not messages", field="messages", code="messages_not_allowed")
        if self._config.template != "{prompt}" or self._config.max_prompt_tokens is not None:
            message = "this model's template writes, or cuts, the words of a prompt; a conversation would get round it"
            raise InvalidRequest(message, field="messages", code="messages_not_allowed")
        if len(roles) > MAX_TURNS:
            raise InvalidRequest(f"a conversation has at most {MAX_TURNS} turns", field="messages")
        spoken = roles[1:] if roles[:1] == ("system",) else roles
        if spoken != ("user", "assistant") * (len(spoken) // 2) + ("user",):
            raise InvalidRequest("expected turns of user and assistant in turn, the last one the user's", field="messages")
        if self._config.caption_role == "dialogue" and len(spoken) < len(roles):
            raise InvalidRequest("the dialogues of this model have no system turn", field="messages")
        return roles

    def _setting(self, group: Group) -> _Setting:
        frame, contents = self._contents(group.prompt)
        field = "prompt" if isinstance(group.prompt, str | None) else "messages"
        if not all(map(_is_unicode, contents)):
            raise InvalidRequest(f"the {field} has lone surrogates", field=field, code="invalid_unicode")
        if any(frame.would_change(slot, text) for slot, text in enumerate(contents)):
            message = f"this model's chat template reads more than words out of {REASONING_ENDS} or {RESPONSE_BEGINS}"
            raise InvalidRequest(message, field=field, code="prompt_unclear")
        truncated = False
        if field == "prompt" and self._config.max_prompt_tokens is not None:
            text, truncated = self._fit_prompt(contents[0], self._config.max_prompt_tokens)
            contents = (text,)
        filled = [frame.trimmed(slot, text) for slot, text in enumerate((*contents, ""))]
        place = frame.caption_run
        head, tail = frame.around_caption
        return _Setting(
            frame,
            contents,
            self._expand(self._run_ids(frame.runs[:place], filled), group.image),
            head.filled(filled),
            tail.filled(filled),
            self._run_ids(frame.runs[place + 1 :], filled),
            truncated,
        )

    def _run_ids(self, runs: Sequence[tuple[int, ...] | TextRun], filled: Sequence[str]) -> Ids:
        """Runs that hold no caption."""
        ids = [self._plain.ids(run.filled(filled)) if isinstance(run, TextRun) else np.asarray(run, dtype=np.int64) for run in runs]
        return np.concatenate([*ids, np.zeros(0, dtype=np.int64)])

    def _caption_errors(self, setting: _Setting, captions: Sequence[str]) -> list[ApiError | None]:
        valid = [_is_unicode(caption) for caption in captions]
        texts = [caption if fine else "" for caption, fine in zip(captions, valid, strict=True)]
        limit = self._config.max_caption_tokens
        lengths = [0] * len(texts) if limit is None else self._lengths(texts, limit)
        is_bare = len(setting.frame.runs) == 1
        empty = [is_bare and not (setting.head or setting.trimmed(text) or setting.tail) for text in texts]
        apart = [setting.frame.would_change(setting.frame.caption_slot, text) for text in texts]
        return [self._caption_error(*found) for found in zip(range(len(texts)), valid, lengths, empty, apart, strict=True)]

    def _lengths(self, texts: Sequence[str], limit: int) -> list[int]:
        """Tokens of each text by itself; of one that has no room to exceed the limit, an upper bound will do."""
        bounds = [_most_tokens(text) for text in texts]
        long = [index for index, bound in enumerate(bounds) if bound > limit]
        for index, row in zip(long, self._plain.batch([texts[index] for index in long]), strict=True):
            bounds[index] = len(row)
        return bounds

    def _caption_error(self, index: int, valid: bool, length: int, empty: bool, apart: bool) -> ApiError | None:
        limit = self._config.max_caption_tokens
        if not valid:
            return ItemRejected("the caption has lone surrogates", code="invalid_unicode", index=index)
        if limit is not None and length > limit:
            return ItemRejected(f"the caption is longer than {limit} tokens", code="caption_too_long", index=index)
        if empty:
            return ItemRejected("prompt and caption are both empty; there is nothing to score", code="empty_text", index=index)
        if apart:
            message = f"this model's chat template takes a turn apart at {REASONING_ENDS} or {RESPONSE_BEGINS}; send the words alone"
            return ItemRejected(message, code="caption_unclear", index=index)
        return None

    def _within(self, rows: Sequence[Ids], errors: Sequence[ApiError | None], num_without: int) -> tuple[list[Ids], list[ApiError | None]]:
        """Rows of at most the model's tokens, and the errors of all captions. Raises InvalidRequest where no caption could fit."""
        most = self._config.max_tokens
        if most is None:
            return list(rows), list(errors)
        if num_without > most:
            message = f"image and prompt have {num_without} tokens without a caption, the model takes {most} in all"
            raise InvalidRequest(message, field="prompt", code="prompt_too_long")
        kept, found, given = [], list(errors), iter(rows)
        for index, error in enumerate(errors):
            if error is not None:
                continue
            row = next(given)
            if len(row) <= most:
                kept.append(row)
            else:
                message = f"the caption with all before it has {len(row)} tokens, the model takes {most}"
                found[index] = ItemRejected(message, code="caption_too_long", index=index)
        return kept, found

    def _template_tokens(self, frame: Frame) -> _Costs:
        """Tokens of the template before what captions have of their own and of their own, each text with room for its seams."""
        shared = own = 0
        slots: tuple[list[int], list[int]] = ([], [])
        is_own = False
        for run in frame.runs:
            for number, part in enumerate(run.parts if isinstance(run, TextRun) else (run,)):
                count = _SEAM if number else 0
                is_own = is_own or part == frame.caption_slot
                if isinstance(part, str):
                    count += self._plain.count(part)
                elif isinstance(part, tuple):
                    count += len(part)
                elif part != frame.caption_slot:
                    slots[is_own].append(part)
                shared, own = (shared, own + count) if is_own else (shared + count, own)
        return _Costs(shared, own, tuple(slots[False]), tuple(slots[True]))

    def _rows(self, setting: _Setting, captions: Sequence[str]) -> tuple[Ids, ...]:
        texts = [setting.trimmed(caption) for caption in captions]
        rows = self._plain.between(setting.head, texts, setting.tail)
        return tuple(np.concatenate([setting.before, row, setting.behind]) for row in rows)

    def _expand(self, ids: Ids, image: EncodedImage | None) -> Ids:
        count = image.num_tokens if image else 0
        return np.repeat(ids, np.where(ids == self._image_token_id, count, 1))


def _digest(setting: _Setting, *, is_text: bool) -> bytes:
    """Of all that captions share. A prompt that is a text has its own digest; anything else is hashed with its frame."""
    if is_text:
        return hashlib.sha256(setting.contents[0].encode()).digest()
    runs = [list(run.parts) if isinstance(run, TextRun) else run for run in setting.frame.runs]
    told = json.dumps([runs, setting.frame.trims, setting.contents])
    return hashlib.sha256(_NO_TEXT + told.encode()).digest()


def load_encoder(artifact: Artifact) -> Encoder:
    """Tokenizer and image processor of the artifact, read apart (the combined Qwen processor wants torchvision).

    A text-only base has no image processor; raw captions need no chat template.
    """
    path = artifact.processor_path
    base = _read_base_config(artifact)
    tokenizer = _read("tokenizer", path, lambda: AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False))
    _check_vocabulary(path, tokenizer, base)
    if added := tokenizer("")["input_ids"]:
        raise ArtifactInvalid(
            f"{path}: the tokenizer puts tokens of its own around a text ({added}), which the model's chat or text has not"
        )
    processor = None if base["image_token_id"] is None else _load_image_processor(path, base)
    if tokenizer.chat_template is None and artifact.config.caption_role in ("user", "assistant"):
        raise ArtifactInvalid(f"{path}: no chat template")
    unread = base.get("pad_token_id") if artifact.config.kind in _SEQUENCE_CLASSIFIERS else None
    image_token = base["image_token_id"]
    return _read("chat template", path, lambda: Encoder(artifact.config, tokenizer, processor, image_token, unread_id=unread))


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


def _at_most(size: int, limit: int | None) -> int:
    return size if limit is None else min(size, limit)


def _most_tokens(text: str) -> int:
    """No text has more tokens than bytes, composed as the tokenizer does it."""
    return len(text) if text.isascii() else len(unicodedata.normalize("NFC", text).encode("utf-8", "replace"))


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
    if artifact.config.caption_role in ("raw", "dialogue"):
        role = artifact.config.caption_role
        raise ArtifactInvalid(f"{path}: caption_role {role} expects a text-only base, found {family}")
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
