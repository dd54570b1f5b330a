"""The caption, the prompt and the picture's id in the text of a whole chat, as trainers send it. Knows no dialect.

A policy writes captions to be scored well. So what it wrote is taken whole: nothing in it may pass for the end of a prompt or
name another picture.
"""

from __future__ import annotations

import re

from app.errors import InvalidRequest

_TURNS = (  # of chat templates: where a user's turn begins, where an assistant's does
    ("<|im_start|>user\n", "<|im_start|>assistant\n"),
    ("<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>assistant<|end_header_id|>\n\n"),
    ("<start_of_turn>user\n", "<start_of_turn>model\n"),
    ("<|turn>user\n", "<|turn>model\n"),
)
_ENDS = re.compile(
    r"(?:\s*(?:<\|im_end\|>|<\|endoftext\|>|<\|eot_id\|>|<\|end_of_text\|>|<end_of_turn>|<turn\|>|<\|end\|>|</s>|<eos>|<pad>))+\s*\Z"
)
_PICTURE = re.compile(r"<image:(sha256:[0-9a-f]{64})>")


def split_chat(text: str, prompt: str | None = None) -> tuple[str, str]:
    """The prompt's part of a chat's text, and the caption after it without the tokens that end a turn.

    The part is `prompt` where the text begins with it. Where it does not, as when a picture's tokens were spelt out in the text, it
    has as many assistant's turns as the prompt. Without a prompt it ends with the first assistant's turn after the last user's; where
    there is none all of the text is the caption. Raises InvalidRequest (`caption_unclear`) where a prompt fits in no way.
    """
    if prompt and text.startswith(prompt):
        return prompt, without_end(text[len(prompt) :])
    end = _end_of_prompt(text, prompt or "")
    if end is None and prompt:
        message = "the text neither begins with its prompt nor has an assistant's turn, so nobody can tell what of it is the caption"
        raise InvalidRequest(message, code="caption_unclear")
    return text[: end or 0], without_end(text[end or 0 :])


def _end_of_prompt(text: str, prompt: str) -> int | None:
    """Where the caption's turn begins, by the template the prompt is written in, or that of the first turn in the text."""
    template = _template_of(prompt) or _template_of(text)
    if template is None:
        return None
    user, assistant = template
    num = prompt.count(assistant)
    begins = _nth(text, assistant, num) if num else text.find(assistant, max(0, text.rfind(user)))
    return begins + len(assistant) if begins >= 0 else None


def _template_of(text: str) -> tuple[str, str] | None:
    places = {text.find(assistant): (user, assistant) for user, assistant in _TURNS if assistant in text}
    return places[min(places)] if places else None


def _nth(text: str, part: str, num: int) -> int:
    """Where a part comes for the `num`th time; -1 if it does not so often."""
    begins = -1
    for _ in range(num):
        begins = text.find(part, begins + 1)
        if begins < 0:
            break
    return begins


def without_end(caption: str) -> str:
    """A completion without the special tokens that end it, and the blanks around those."""
    return _ENDS.sub("", caption)


def last_user(text: str) -> str:
    """What the user said last in a chat's text; all of it where it is no chat."""
    for user, assistant in _TURNS:
        begins = text.rfind(user)
        if begins >= 0:
            said = text[begins + len(user) :]
            return without_end(said.partition(assistant)[0])
    return text


def picture_in(prompt: str) -> str | None:
    """The id of `<image:sha256:..>` in a prompt. Raises InvalidRequest where it names several."""
    found = set(_PICTURE.findall(prompt))
    if len(found) > 1:
        raise InvalidRequest("the prompt names more than one image", code="several_images")
    return found.pop() if found else None
