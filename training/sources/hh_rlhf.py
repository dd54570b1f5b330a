"""Dialogue pairs in the layout of Anthropic's hh-rlhf to preference pairs: what two dialogues share is the prompt. Text only."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path

from training.pairs import Pair
from training.sampling import digest, interleave, split_contests
from training.sources.prepared import Prepared, Progress, Split, followed, in_order
from training.sources.tables import Row, find_tables, read_rows, splits_of

HUMAN = "\n\nHuman:"
ASSISTANT = "\n\nAssistant:"
NO_DIALOGUE = "a dialogue does not begin with '\\n\\nHuman:'"
NOTHING_SHARED = "the dialogues share no beginning up to '\\n\\nAssistant:'"
EQUAL = "the answers are equal"
EMPTY = "an answer is empty"
TWICE = "the same pair again"


def prepare_hh_rlhf(places: Sequence[Path], shares: Mapping[str, float], seed: int, progress: Progress) -> Prepared:
    """Pairs by split. Raises DataInvalid for a row that is no pair of texts."""
    paths = find_tables(places, (".jsonl", ".jsonl.gz", ".parquet"))
    named = splits_of(paths)
    splits: dict[str, Split] = defaultdict(Split)
    for path in paths:
        for row in followed(read_rows(path), progress.begin(f"reading {path.name}", None)):
            pair = _pair(row)
            contest = digest(row.where) if isinstance(pair, str) else pair.contest
            split = splits[named[path] if named else split_contests([contest], shares, seed)[contest]]
            split.num_rows += 1
            if isinstance(pair, str):
                split.dropped[pair] += 1
            else:
                split.pairs.append(pair)
    going_on = sum(HUMAN in pair.chosen or HUMAN in pair.rejected for split in splits.values() for pair in split.pairs)
    for split in splits.values():
        split.pairs = _ordered(split, seed)
    remarks = (
        [f"pairs whose dialogues part before the last turn, so an answer goes on with further turns: {going_on:,}"] if going_on else []
    )
    return Prepared(in_order(splits), paths, remarks=remarks)


def _pair(row: Row) -> Pair | str:
    """The row as a pair, or why it is none."""
    chosen, rejected = row.text("chosen"), row.text("rejected")
    if chosen is None or rejected is None:
        raise row.fault("chosen and rejected must be text, found null")
    if not (chosen.startswith(HUMAN) and rejected.startswith(HUMAN)):
        return NO_DIALOGUE
    end = _end_of_prompt(chosen, rejected)
    return NOTHING_SHARED if end is None else _checked(chosen[:end], chosen[end:], rejected[end:])


def _end_of_prompt(chosen: str, rejected: str) -> int | None:
    """Where the last turn of the assistant begins that both dialogues reach with the same words."""
    at = chosen.rfind(ASSISTANT)
    while at >= 0:
        if rejected.startswith(chosen[: at + len(ASSISTANT)]):
            return at + len(ASSISTANT)
        at = chosen.rfind(ASSISTANT, 0, at)
    return None


def _checked(prompt: str, chosen: str, rejected: str) -> Pair | str:
    if not (chosen.strip() and rejected.strip()):
        return EMPTY
    if chosen.strip() == rejected.strip():
        return EQUAL
    return Pair(digest(prompt, chosen, rejected), digest(prompt), None, prompt, chosen, rejected)


def _ordered(split: Split, seed: int) -> list[Pair]:
    """Repeats counted out, dialogues in seeded order."""
    different = {pair.pair_id: pair for pair in split.pairs}
    if repeats := len(split.pairs) - len(different):
        split.dropped[TWICE] += repeats
    by_contest: dict[str, list[Pair]] = defaultdict(list)
    for pair in different.values():
        by_contest[pair.contest].append(pair)
    return interleave(by_contest, seed)
