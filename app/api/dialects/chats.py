"""The caption, the prompt and the picture's id in the text of a whole chat, as trainers send it. Knows no dialect.

A policy writes captions to be scored well. So what it wrote is taken whole: nothing in it may pass for the end of a prompt or
name another picture, and where nobody can tell what it wrote the text is refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from app.errors import InvalidRequest

MAX_STRIPPED = 65_536  # characters; longer completions are refused for their length, with their ends
_ENDS = ("<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "</s>", "<eos>", "<pad>", "<end_of_turn>", "<turn|>")
_SPECIAL = re.compile(r"<([|｜])[^\s<>|｜]{1,40}\1>")  # as models write their own: <|return|>, <｜end▁of▁sentence｜>
_MAX_SPECIAL = 44
_NO_THOUGHT = "<think>\n\n</think>\n\n"  # which templates put before an answer without one
_PICTURE = re.compile(r"<image:(sha256:[0-9a-f]{64})>")
_BEGIN = r"(?:<\|begin_of_text\|>|<\|endoftext\|>|<bos>|<s>)?"
_MIN_KEPT = 32  # characters of a prompt whose beginning was cut
_MAX_TRIES = 64
_SPELT = {  # a picture's token in a prompt, and what becomes of it in the text of the tokens
    pad: re.compile(pattern)
    for pad, pattern in (
        ("<|image_pad|>", r"(?:<\|image_pad\|>)++"),
        ("<|video_pad|>", r"(?:<\|video_pad\|>)++"),
        ("<start_of_image>", r"\n\n<start_of_image>(?:<image_soft_token>)++<end_of_image>\n\n"),
        ("<image>", r"<img>(?:<IMG_CONTEXT>)++</img>|(?:<image>)++"),
    )
}
_PADS = re.compile("|".join(map(re.escape, _SPELT)))


@dataclass(frozen=True, slots=True)
class Template:
    """How a chat is written. `single`: up to the assistant's turn after one of the user's, whose words are its group `said`."""

    turn: str
    assistant: str
    single: re.Pattern[str]


def _template(turn: str, after_role: str, end: str, *, model: str = "assistant") -> Template:
    """`end`: of a turn, with what follows it. No turn's words hold the beginning or the end of one."""
    start, stop = re.escape(turn), re.escape(end)
    words = f"(?:(?!{start}|{re.escape(end.strip())}).)*+"
    system, user, assistant = (start + role + re.escape(after_role) for role in ("system", "user", model))
    single = f"{_BEGIN}(?:{system}{words}{stop})?{user}(?P<said>{words}){stop}{assistant}"
    return Template(turn, turn + model + after_role, re.compile(single, re.DOTALL))


_TEMPLATES = (
    _template("<|im_start|>", "\n", "<|im_end|>\n"),
    _template("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>"),
    _template("<start_of_turn>", "\n", "<end_of_turn>\n", model="model"),
    _template("<|turn>", "\n", "<turn|>\n", model="model"),
)


def split_chat(text: str, prompt: str | None = None) -> tuple[str, str]:
    """The prompt's part of a chat's text, and the caption after it without the tokens that end a turn.

    The text begins with its `prompt`: as it is, with the tokens of its picture spelt out, or cut at its beginning as trainers cut what is
    too long. Where no prompt was sent it is a chat of one user's turn and one assistant's, from its first character on.
    Raises InvalidRequest: `caption_unclear`, which no policy can bring about, or `several_turns`, of which any may be the policy's own.
    """
    end = _end_of(prompt, text) if prompt else _end_of_single_turn(text)
    if end is None or any(_lacks_marker(template, text, end) for template in _TEMPLATES):
        message = "what of this text is the caption is not clear: it begins with no prompt that was sent, and is no chat of one turn each"
        raise InvalidRequest(message, code="caption_unclear")
    return text[:end], without_end(text[end:])


def _lacks_marker(template: Template, text: str, end: int) -> bool:
    """Whether the prompt was sent without the marker of the assistant's turn, which stands before the caption then."""
    last = text.rfind(template.turn, 0, end)
    return last >= 0 and not text.startswith(template.assistant, last) and text.startswith(template.assistant, end)


def _end_of(prompt: str, text: str) -> int | None:
    if text.startswith(prompt):
        return len(prompt)
    end = _end_spelt_out(prompt, text)
    return _end_of_cut(prompt, text) if end is None else end


def _end_spelt_out(prompt: str, text: str) -> int | None:
    """Where the prompt ends in a text that has a picture's tokens spelt out."""
    end = begin = 0
    for pad in [*_PADS.finditer(prompt), None]:
        words = prompt[begin : pad.start() if pad else None]
        if not text.startswith(words, end):
            return None
        end += len(words)
        if pad:
            spelt = _SPELT[pad[0]].match(text, end)
            if spelt is None:
                return None
            begin, end = pad.end(), spelt.end()
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
    """Raises InvalidRequest (`several_turns`)."""
    for template in _TEMPLATES:
        if found := template.single.match(text):
            end = found.end()
            if template.turn in text[end:]:
                raise InvalidRequest("a chat of several turns, of which any may be the policy's own", code="several_turns")
            return end + len(_NO_THOUGHT) if text.startswith(_NO_THOUGHT, end) else end
    return None


def split_or_none(text: str, prompt: str | None, *, may_fail: bool) -> tuple[str, str | None]:
    """As `split_chat`; None for the caption where the policy may have written a turn, and that `may_fail`."""
    try:
        return split_chat(text, prompt)
    except InvalidRequest as error:
        if not may_fail or error.code != "several_turns":
            raise
        return "", None


def without_end(caption: str) -> str:
    """A completion without the special tokens that end it, and the blanks around those.

    Of tokens we do not know one kind is taken for the end, and no more. A completion that is far too long stays as it is.
    """
    if len(caption) > MAX_STRIPPED:
        return caption
    kept, end, unknown = len(caption), _before_blanks(caption, len(caption)), ""
    while token := _special_before(caption, end):
        if token not in _ENDS and token != (unknown or token):
            break
        unknown = unknown if token in _ENDS else token
        kept = end = _before_blanks(caption, end - len(token))
    return caption[:kept]


def _before_blanks(text: str, end: int) -> int:
    while end and text[end - 1].isspace():
        end -= 1
    return end


def _special_before(text: str, end: int) -> str:
    """The special token that a text has before `end`; empty if there is none."""
    for token in _ENDS:
        if text.endswith(token, 0, end):
            return token
    first = max(0, end - _MAX_SPECIAL)
    begin = max(text.rfind("<|", first, end), text.rfind("<｜", first, end))
    return text[begin:end] if begin >= 0 and _SPECIAL.fullmatch(text, begin, end) else ""


def last_user(prompt: str) -> str:
    """What the user said in a prompt of one turn; all of it where it is no chat. Raises InvalidRequest (`several_turns`)."""
    if not any(template.turn in prompt for template in _TEMPLATES):
        return prompt
    for template in _TEMPLATES:
        found = template.single.match(prompt)
        if found and template.turn not in prompt[found.end() :]:
            return found["said"]
    raise InvalidRequest("a prompt that is no chat of one turn, of which something would be left out", code="several_turns")


def picture_in(prompt: str) -> str | None:
    """The id of `<image:sha256:..>` in a prompt. Raises InvalidRequest where it names several."""
    found = set(_PICTURE.findall(prompt))
    if len(found) > 1:
        raise InvalidRequest("the prompt names more than one image", code="several_images")
    return found.pop() if found else None


def without_picture(prompt: str) -> str:
    """A prompt's words."""
    return _PICTURE.sub("", prompt)
