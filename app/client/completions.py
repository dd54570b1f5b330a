"""From what a policy wrote to the caption in it: the last whole `<caption>..</caption>`. Knows no server."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

_TAGGED = re.compile(r"<caption>((?:(?!</?caption>).)*)</caption>", re.DOTALL | re.IGNORECASE)
_OPENED = re.compile(r"<caption>", re.IGNORECASE)

Completion: TypeAlias = "str | Sequence[Mapping[str, Any]]"


@dataclass(frozen=True, slots=True)
class Said:
    """`caption`: without white space around it, maybe empty. If not `tagged`: all that was said, or what follows a tag never closed."""

    caption: str
    tagged: bool


def read_completion(completion: Completion) -> Said:
    """Of several captions the last one: those before it are drafts. Raises TypeError for what is no completion."""
    text = text_of(completion)
    if found := _TAGGED.findall(text):
        return Said(found[-1].strip(), tagged=True)
    return Said(_OPENED.split(text)[-1].strip(), tagged=False)


def text_of(completion: Completion) -> str:
    """The text itself, or of messages what the assistant said last; pictures and tool calls say nothing. Raises TypeError."""
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping) or not all(isinstance(message, Mapping) for message in completion):
        raise TypeError("a completion is a text or a list of messages")
    spoken = [message.get("content") for message in completion if message.get("role", "assistant") == "assistant"]
    return _content(spoken[-1]) if spoken else ""


def _content(content: Any) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.get("text") or "" for part in content if part.get("type") == "text")
