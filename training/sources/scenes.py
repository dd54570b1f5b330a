"""Descriptions of cartoons to prompts, as the published recipe words them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from training.sources.tables import Row, read_rows, split_of

INSTRUCTION = "Write a funny one-line caption for this New Yorker-style cartoon."
_LINES = {"canny": "Scene", "uncanny": "Twist", "location": "Location", "entities": "Entities"}


@dataclass(slots=True)
class Scenes:
    """Prompts by contest, without those contests whose fields are all empty; and the contests in the order of each split's files."""

    prompts: dict[str, str] = field(default_factory=dict)
    order: dict[str | None, list[str]] = field(default_factory=dict)


def read_scenes(paths: Sequence[Path]) -> Scenes:
    """Raises DataInvalid, also for a contest described twice."""
    scenes = Scenes()
    seen: dict[str, str] = {}
    for path in paths:
        order = scenes.order.setdefault(split_of(path), [])
        for row in read_rows(path):
            contest = str(row.whole("contest_number"))
            if contest in seen:
                raise row.fault(f"contest {contest} was described before, at {seen[contest]}")
            seen[contest] = row.where
            order.append(contest)
            if prompt := _prompt(row):
                scenes.prompts[contest] = prompt
    return scenes


def _prompt(row: Row) -> str | None:
    """The instruction and a line for each field that says something."""
    words = {word: ", ".join(text for text in row.texts(name) if text.strip()) for name, word in _LINES.items()}
    lines = [f"{word}: {text}" for word, text in words.items() if text]
    return "\n".join([INSTRUCTION, *lines]) if lines else None
