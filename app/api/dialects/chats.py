"""The caption, the prompt and the picture's id in the text of a whole chat, as trainers send it. Knows no dialect.

A policy writes captions to be scored well. So what it wrote is taken whole: nothing in it may pass for the end of a prompt or
name another picture, and where nobody can tell what it wrote the text is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from app.errors import InvalidRequest

MAX_STRIPPED = 65_536  # characters; longer completions are refused for their length, with their ends
_PADS = re.compile(r"(<\|image_pad\|>|<image_soft_token>|<\|image\|>|<image>)\1*+")
_BEGINS = ("<|begin_of_text|>", "<|endoftext|>", "<bos>", "<s>")
_ENDS = ("</s>", "<eos>", "<pad>", "<end_of_turn>", "<turn|>")
_SPECIAL = re.compile(r"<([|｜])[^\s<>|｜]{1,40}\1>")  # as models write their own: <|im_end|>, <｜end▁of▁sentence｜>
_MAX_SPECIAL = 44
_NO_THOUGHT = "<think>\n\n</think>\n\n"  # which templates put before an answer without one
_PICTURE = re.compile(r"<image:(sha256:[0-9a-f]{64})>")
_MIN_KEPT = 32  # characters of a prompt whose beginning was cut
_MAX_TRIES = 64


@dataclass(frozen=True, slots=True)
class Template:
    """How a chat's turns begin."""

    turn: str
    user: str
    assistant: str

    def begins(self, text: str) -> bool:
        """Whether a text is a chat of this template from its first character on."""
        for begin in _BEGINS:
            text = text.removeprefix(begin)
        return text.startswith(self.turn)


_TEMPLATES = (
    Template("<|im_start|>", "<|im_start|>user\n", "<|im_start|>assistant\n"),
    Template("<|start_header_id|>", "<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    Template("<start_of_turn>", "<start_of_turn>user\n", "<start_of_turn>model\n"),
    Template("<|turn>", "<|turn>user\n", "<|turn>model\n"),
)


def split_chat(text: str, prompt: str | None = None) -> tuple[str, str]:
    """The prompt's part of a chat's text, and the caption after it without the tokens that end a turn.

    The text begins with its `prompt`: as it is, with the tokens of its picture spelt out, or cut at its beginning as trainers cut what is
    too long. Without a prompt that shows where its turns end, the text is a chat of one user's turn and one assistant's.
    Raises InvalidRequest (`caption_unclear`) where it is neither: of several turns any may be the policy's own.
    """
    end = _end_of(prompt, text) if prompt else None
    if end is None and (prompt is None or not any(template.assistant in prompt for template in _TEMPLATES)):
        end = _end_of_single_turn(text)
    if end is None:
        message = (
            "nobody can tell what of this text is the caption: it begins with no prompt that was sent, and is no chat of one turn each"
        )
        raise InvalidRequest(message, code="caption_unclear")
    return text[:end], without_end(text[end:])


def _end_of(prompt: str, text: str) -> int | None:
    if text.startswith(prompt):
        return len(prompt)
    end = _end_spelt_out(prompt, text)
    return _end_of_cut(prompt, text) if end is None else end


def _end_spelt_out(prompt: str, text: str) -> int | None:
    """Where the prompt ends in a text that has a picture's token any number of times where the prompt has it."""
    end = begin = 0
    for pads in [*_PADS.finditer(prompt), None]:
        words = prompt[begin : pads.start() if pads else None]
        if not text.startswith(words, end):
            return None
        end += len(words)
        if pads:
            spelt = _PADS.match(text, end)
            if spelt is None or spelt[1] != pads[1]:
                return None
            begin, end = pads.end(), spelt.end()
    return end


def _end_of_cut(prompt: str, text: str) -> int | None:
    """Where the text begins with an end of the prompt that still has its last turn."""
    last = max(prompt.rfind(template.assistant) for template in _TEMPLATES)
    begins = 0
    for _ in range(_MAX_TRIES):
        begins = prompt.find(text[:_MIN_KEPT], begins + 1)
        if begins < 0 or begins > last:
            return None
        if text.startswith(prompt[begins:]):
            return len(prompt) - begins
    return None


def _end_of_single_turn(text: str) -> int | None:
    for template in _TEMPLATES:
        if template.begins(text) and text.count(template.user) == text.count(template.assistant) == 1:
            end = text.index(template.assistant) + len(template.assistant)
            if text.index(template.user) < end:
                return end + len(_NO_THOUGHT) if text.startswith(_NO_THOUGHT, end) else end
    return None


def split_or_none(text: str, prompt: str | None, *, may_fail: bool) -> tuple[str, str | None]:
    """As `split_chat`; None for a caption that is not clear, where it `may_fail`."""
    try:
        return split_chat(text, prompt)
    except InvalidRequest:
        if not may_fail:
            raise
        return "", None


def without_end(caption: str) -> str:
    """A completion without the special tokens that end it, and the blanks around those. One that is far too long stays as it is."""
    if len(caption) > MAX_STRIPPED:
        return caption
    kept, end = len(caption), _before_blanks(caption, len(caption))
    while (begin := _begin_of_special(caption, end)) is not None:
        kept = end = _before_blanks(caption, begin)
    return caption[:kept]


def _before_blanks(text: str, end: int) -> int:
    while end and text[end - 1].isspace():
        end -= 1
    return end


def _begin_of_special(text: str, end: int) -> int | None:
    """Where the special token begins that a text has before `end`."""
    for token in _ENDS:
        if text.endswith(token, 0, end):
            return end - len(token)
    begin = max(text.rfind("<|", max(0, end - _MAX_SPECIAL), end), text.rfind("<｜", max(0, end - _MAX_SPECIAL), end))
    return begin if begin >= 0 and _SPECIAL.fullmatch(text, begin, end) else None


def last_user(prompt: str) -> str:
    """What the user said in a prompt of one turn; all of it where it is no chat. Raises InvalidRequest (`several_turns`)."""
    for template in _TEMPLATES:
        if template.begins(prompt) and template.user in prompt:
            if prompt.count(template.user) > 1:
                raise InvalidRequest("a prompt of several turns, of which one would be scored", code="several_turns")
            said = prompt.partition(template.user)[2]
            return without_end(said.partition(template.assistant)[0])
    return prompt


def picture_in(prompt: str) -> str | None:
    """The id of `<image:sha256:..>` in a prompt. Raises InvalidRequest where it names several."""
    found = set(_PICTURE.findall(prompt))
    if len(found) > 1:
        raise InvalidRequest("the prompt names more than one image", code="several_images")
    return found.pop() if found else None


def without_picture(prompt: str) -> str:
    """A prompt's words."""
    return _PICTURE.sub("", prompt)
