"""What stands around the texts of a request: a chat, a dialogue or a bare template, rendered with slots and cut into runs.

A run is either ids, special tokens among them, or plain text with slots; it ends where special tokens stand, so that no merge of the
tokenizer crosses a seam. What a user writes is put into slots and never looked at for special tokens.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from app.artifacts import RewardModelConfig
from app.contracts import Role
from app.errors import ArtifactInvalid

Part: TypeAlias = str | int  # of a text run: text of the template, or the number of a slot
Ids: TypeAlias = tuple[int, ...]
_SLOT = "\ue000{}\ue000"  # private use: no template contains it
_FIND_SLOT = re.compile("\ue000(\\d+)\ue000")
_NAMED_SLOTS = {"{prompt}": 0, "{caption}": 1}
_FIND_NAMED = re.compile("({prompt}|{caption})")
_SPEAKERS: dict[Role, str] = {"user": "Human", "assistant": "Assistant"}
_DIALOGUE_BEGINS, _DIALOGUE_ENDS = "\n\nHuman:", "\n\nAssistant:"  # of hh-rlhf (arXiv 2204.05862)
REASONING_ENDS, RESPONSE_BEGINS = "</think>", "<tool_response>"  # what some chat templates take a turn apart at, or take for no question
# What chat templates do to the ends of a turn, least first; two probes tell them apart.
_TRIMS_OF_CHATS: dict[str, Callable[[str], str]] = {
    "verbatim": lambda text: text,
    "newlines before": lambda text: text.lstrip("\n"),
    "newlines behind": lambda text: text.rstrip("\n"),
    "newlines": lambda text: text.strip("\n"),
    "space before": str.lstrip,
    "space behind": str.rstrip,
    "space": str.strip,
}
_TRIMS = _TRIMS_OF_CHATS | {  # how a response follows "Assistant:"
    "behind a space": lambda text: f" {text}",
    "behind a space of its own": lambda text: text if not text or text.startswith(" ") else f" {text}",
}
_PROBES = ("\n {} \n", " \n{}\n ")


@dataclass(frozen=True, slots=True)
class TextRun:
    """Plain text of the template with slots between."""

    parts: tuple[Part, ...]

    def filled(self, contents: Sequence[str]) -> str:
        """The text with every slot's content in its place."""
        return "".join(part if isinstance(part, str) else contents[part] for part in self.parts)


@dataclass(frozen=True, slots=True)
class Frame:
    """One way to set contents: the last slot is the caption's, those before it are the prompt's."""

    runs: tuple[Ids | TextRun, ...]
    num_slots: int
    trims: tuple[str, ...] = ()  # of each slot, what the template does to the ends of its text; empty: nothing
    takes_apart: frozenset[int] = frozenset()  # slots whose text the template would read more out of than words

    @property
    def caption_slot(self) -> int:
        return self.num_slots - 1

    @property
    def caption_run(self) -> int:
        """Where the caption stands."""
        return next(number for number, run in enumerate(self.runs) if isinstance(run, TextRun) and self.caption_slot in run.parts)

    @property
    def around_caption(self) -> tuple[TextRun, TextRun]:
        """What stands before the caption in its run, and what behind it."""
        run = self.runs[self.caption_run]
        parts = run.parts if isinstance(run, TextRun) else ()
        place = parts.index(self.caption_slot)
        return TextRun(parts[:place]), TextRun(parts[place + 1 :])

    @property
    def first_ids(self) -> Ids:
        """What every row of this frame begins with."""
        first = self.runs[0]
        return () if isinstance(first, TextRun) else first

    def would_change(self, slot: int, text: str) -> bool:
        """Whether the template makes something else of this text, and perhaps of the turns beside it."""
        return slot in self.takes_apart and (REASONING_ENDS in text or text.lstrip().startswith(RESPONSE_BEGINS))

    def trimmed(self, slot: int, text: str) -> str:
        """As the template would leave it."""
        return _TRIMS[self.trims[slot]](text) if self.trims else text


class Framer:
    """Makes frames for one artifact: one for a prompt that is a text, one for each sequence of roles in a conversation."""

    def __init__(self, config: RewardModelConfig, tokenizer: Any, *, with_image: bool, unread_id: int | None = None) -> None:
        """`unread_id`: at the end of a row it is left out; see `Encoder`."""
        self._unread_id = unread_id
        self._config = config
        self._tokenizer = tokenizer
        self._with_image = with_image
        added = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
        self._find_special = re.compile("(" + "|".join(map(re.escape, added)) + ")") if added else re.compile("(?!)")

    @property
    def takes_conversations(self) -> bool:
        return self._config.caption_role in ("assistant", "dialogue")

    def of_text(self) -> Frame:
        """For a prompt that is one text: two slots, prompt and caption. Raises ArtifactInvalid."""
        template = self._config.template
        match self._config.caption_role:
            case "raw":
                return Frame(self._cut(_FIND_NAMED.sub(lambda found: _SLOT.format(_NAMED_SLOTS[found[0]]), template)), 2)
            case "user":
                chat = self._chat(["user"])
                (run_of_text,) = (run for run in chat.runs if isinstance(run, TextRun))
                inner = tuple(_NAMED_SLOTS.get(part, part) for part in _FIND_NAMED.split(template) if part)
                parts = tuple(one for part in run_of_text.parts for one in (inner if part == 0 else (part,)))
                return Frame(tuple(TextRun(parts) if run is run_of_text else run for run in chat.runs), 2)
            case _:
                return self._with_template(self.of_roles(["user"]))

    def of_roles(self, roles: Sequence[Role]) -> Frame:
        """For a conversation with turns of these roles, the caption an assistant's turn behind them. Raises ArtifactInvalid."""
        if self._config.caption_role == "dialogue":
            spoken = [f"\n\n{_SPEAKERS[role]}: {_SLOT.format(number)}" for number, role in enumerate([*roles, "assistant"])]
            return Frame(self._cut("".join(spoken)), len(roles) + 1)
        return self._chat([*roles, "assistant"])

    def of_dialogue(self, text: str) -> tuple[Frame, str]:
        """For a dialogue written out up to where the assistant speaks, and what goes into its slot.

        A space parts `Assistant:` from the response, the prompt's or else the response's own. Raises ValueError.
        """
        opened = text.removesuffix(" ")
        if not opened.endswith(_DIALOGUE_ENDS):
            raise ValueError(f"a dialogue that begins with {_DIALOGUE_BEGINS!r} ends with {_DIALOGUE_ENDS!r}, where the response follows")
        trim = "behind a space of its own" if opened == text else "behind a space"
        return Frame((TextRun((0, 1)),), 2, ("verbatim", trim)), opened

    @staticmethod
    def is_dialogue(text: str) -> bool:
        """Whether it is a dialogue written out, not the words of one turn."""
        return text.startswith(_DIALOGUE_BEGINS)

    def _with_template(self, frame: Frame) -> Frame:
        """The prompt's turn as the artifact's template writes it."""
        before, _, after = self._config.template.partition("{prompt}")
        inner = tuple(part for part in (before, 0, after) if part != "")
        runs = tuple(
            TextRun(tuple(one for part in run.parts for one in (inner if part == 0 else (part,)))) if isinstance(run, TextRun) else run
            for run in frame.runs
        )
        trims = frame.trims if inner == (0,) or not frame.trims else ("verbatim", *frame.trims[1:])
        return Frame(runs, frame.num_slots, trims, frame.takes_apart)

    def _chat(self, roles: Sequence[Role]) -> Frame:
        slots = [_SLOT.format(number) for number in range(len(roles))]
        chat = self._rendered(roles, slots)
        found = [int(number) for number in _FIND_SLOT.findall(chat)]
        if found != list(range(len(roles))):
            where = "the user text" if roles == ["user"] else f"every turn of {', '.join(roles)}"
            raise ArtifactInvalid(f"the chat template does not place {where} exactly once")
        trims, apart = [], set()
        for number, slot in enumerate(slots):
            trims.append(self._trim_of(roles, slots, number, chat))
            marked = (f"{slot}{REASONING_ENDS}{slot}", f"{RESPONSE_BEGINS}{slot}{RESPONSE_BEGINS.replace('<', '</')}")
            if not all(self._keeps(roles, slots, number, chat, text) for text in marked):
                apart.add(number)
        return Frame(self._cut(chat), len(roles), tuple(trims), frozenset(apart))

    def _trim_of(self, roles: Sequence[Role], slots: Sequence[str], number: int, chat: str) -> str:
        """What the template does to the ends of a turn's text."""
        for name, trim in _TRIMS_OF_CHATS.items():
            probes = [probe.format(slots[number]) for probe in _PROBES]
            if all(self._said(roles, slots, number, probe) == chat.replace(slots[number], trim(probe)) for probe in probes):
                return name
        raise ArtifactInvalid(f"the chat template changes the text of a turn ({roles[number]}) in a way that is not known")

    def _keeps(self, roles: Sequence[Role], slots: Sequence[str], number: int, chat: str, text: str) -> bool:
        """Whether a turn's text comes out as it went in."""
        return self._said(roles, slots, number, text) == chat.replace(slots[number], text)

    def _said(self, roles: Sequence[Role], slots: Sequence[str], number: int, text: str) -> str:
        """The chat with another text in one of its turns."""
        return self._rendered(roles, [text if place == number else slot for place, slot in enumerate(slots)])

    def _rendered(self, roles: Sequence[Role], texts: Sequence[str]) -> str:
        pictured = roles.index("user") if self._with_image and "user" in roles else None
        turns = []
        for number, (role, text) in enumerate(zip(roles, texts, strict=True)):
            content = [{"type": "image"}, {"type": "text", "text": text}] if number == pictured else text
            turns.append({"role": role, "content": content})
        return str(self._tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=False))

    def _cut(self, text: str) -> tuple[Ids | TextRun, ...]:
        """A rendered text with slots: stretches between special tokens that hold a slot stay text, all else becomes ids."""
        runs: list[Ids | TextRun] = []
        fixed = ""
        for piece in self._find_special.split(text):
            slots = _FIND_SLOT.split(piece)  # text and numbers in turn
            if len(slots) == 1:
                fixed += piece
                continue
            if fixed:
                runs.append(self._ids(fixed))
            fixed = ""
            runs.append(TextRun(tuple(int(part) if odd % 2 else part for odd, part in enumerate(slots) if part or odd % 2)))
        last = self._read(self._ids(fixed))
        return (*runs, last) if last else tuple(runs)

    def _read(self, ids: Ids) -> Ids:
        """Without padding at the end: nothing before it can see it."""
        count = len(ids)
        while count and ids[count - 1] == self._unread_id:
            count -= 1
        return ids[:count]

    def _ids(self, text: str) -> Ids:
        """Template text to ids, special tokens recognised."""
        return tuple(self._tokenizer.encode(text, add_special_tokens=False)) if text else ()
