"""New Yorker caption contest ratings to preference pairs: captions kept or counted out, cartoons and scenes joined, pairs sampled.

Knows nothing of where the tables come from, nor of the files of the output.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from training.pairs import DataInvalid, Pair, RatedCaption
from training.sampling import PairRule, interleave, sample_pairs, split_contests
from training.sources.cartoons import Cartoons, read_cartoons
from training.sources.pictures import PictureFolder
from training.sources.prepared import Prepared, Progress, Split, followed, in_order
from training.sources.scenes import read_scenes
from training.sources.tables import Row, find_tables, read_rows, splits_of

EMPTY = "caption is empty"
NOT_FINITE = "mean, votes or standard error is missing or not finite"
NO_ERROR = "standard error is zero, negative or missing"
TWICE = "caption stands twice in its contest"


@dataclass(frozen=True, slots=True)
class Tables:
    """Where ratings, descriptions and cartoons lie: files, or folders of them."""

    ratings: Sequence[Path]
    scenes: Sequence[Path] = ()
    cartoons: Path | None = None


@dataclass(frozen=True, slots=True)
class Options:
    """What is kept and how many pairs are made of it."""

    seed: int
    shares: Mapping[str, float]  # of the contests, by split; used when the files' names say no split
    min_votes: int = 10
    min_captions: int = 20
    min_sigma: float = 3.0
    max_pairs: int = 1_000
    max_held_out_pairs: int = 500
    use_scenes: bool = True  # False: every prompt is the model's default; the descriptions still say which cartoon is whose

    @property
    def too_few_votes(self) -> str:
        return f"fewer than {self.min_votes} votes"

    @property
    def too_few_captions(self) -> str:
        return f"contest has fewer than {self.min_captions} captions left"

    def rule(self, split: str) -> PairRule:
        return PairRule(self.min_sigma, self.max_pairs if split == "train" else self.max_held_out_pairs)


@dataclass(slots=True)
class _Contest:
    """The rows of one contest: those good by themselves, and the count of the others."""

    num_rows: int = 0
    captions: list[RatedCaption] = field(default_factory=list)
    dropped: Counter[str] = field(default_factory=Counter)


_Contests = dict[tuple[str, str], _Contest]  # by (split, contest)


def prepare_newyorker(tables: Tables, options: Options, pictures: PictureFolder, progress: Progress) -> Prepared:
    """Pairs and captions by split. Raises DataInvalid for a row that is no rating, and for a contest in two splits."""
    paths = find_tables(tables.ratings)
    scene_paths = find_tables(tables.scenes) if tables.scenes else []
    scenes = read_scenes(scene_paths)
    cartoons = read_cartoons(tables.cartoons, scenes.order, pictures) if tables.cartoons else None
    contests = _in_splits(_read(paths, options, progress), options)
    prompts = scenes.prompts if options.use_scenes else {}
    splits = _sampled(contests, prompts, cartoons, options, progress)
    inputs = [*paths, *scene_paths, *(cartoons.inputs if cartoons else ())]
    remarks = [*_remarks(contests, splits, prompts), *(cartoons.remarks if cartoons else ())]
    return Prepared(in_order(splits), inputs, rated=True, remarks=remarks)


def _read(paths: Sequence[Path], options: Options, progress: Progress) -> _Contests:
    """The rows of all files; the split is "" when no name says one."""
    splits = splits_of(paths) or {}
    contests: _Contests = defaultdict(_Contest)
    for path in paths:
        for row in followed(read_rows(path), progress.begin(f"reading {path.name}", None)):
            contest = str(row.whole("contest_number"))
            found = contests[splits.get(path, ""), contest]
            found.num_rows += 1
            caption = _rating(row, contest, options)
            if isinstance(caption, str):
                found.dropped[caption] += 1
            else:
                found.captions.append(caption)
    return contests


def _rating(row: Row, contest: str, options: Options) -> RatedCaption | str:
    """The row as a rated caption, or why it is none. Raises DataInvalid when a column is missing or holds the wrong kind of value."""
    caption, mean, votes, rank = row.text("caption"), row.real("mean"), row.real("votes"), row.whole("rank")
    error = _standard_error(row)
    if caption is None or not caption.strip():
        return EMPTY
    if mean is None or votes is None or not all(math.isfinite(number) for number in (mean, votes, error or 0.0)):
        return NOT_FINITE
    if not votes.is_integer():
        raise row.fault("votes must be a whole number")
    if votes < options.min_votes:
        return options.too_few_votes
    if error is None or error <= 0:
        return NO_ERROR
    return RatedCaption(contest, None, None, caption, mean, error, int(votes), rank)


def _standard_error(row: Row) -> float | None:
    """`std` where there is one, else `precision`, which is the standard error of the mean and not its inverse."""
    std = row.real("std") if "std" in row.values else None
    if std is not None or ("std" in row.values and "precision" not in row.values):
        return std
    return row.real("precision")


def _in_splits(contests: _Contests, options: Options) -> _Contests:
    """Every contest in one split: the files', else one drawn by the shares. Raises DataInvalid for a contest in two."""
    if any(split == "" for split, _ in contests):
        placed = split_contests((contest for _, contest in contests), options.shares, options.seed)
        return {(placed[contest], contest): found for (_, contest), found in contests.items()}
    seen: dict[str, str] = {}
    for split, contest in contests:
        if (other := seen.setdefault(contest, split)) != split:
            raise DataInvalid(f"contest {contest} is in the {other} and the {split} ratings; a held-out contest must not be trained on")
    return contests


def _sampled(
    contests: _Contests, prompts: Mapping[str, str], cartoons: Cartoons | None, options: Options, progress: Progress
) -> dict[str, Split]:
    """Drop what only the whole contest can decide, sample pairs, interleave them."""
    pairs: dict[str, dict[str, list[Pair]]] = defaultdict(dict)
    splits: dict[str, Split] = defaultdict(Split)
    advance = progress.begin("sampling pairs", len(contests))
    for (name, contest), found in sorted(contests.items(), key=lambda entry: int(entry[0][1])):
        split = splits[name]
        split.num_rows += found.num_rows
        split.dropped += found.dropped
        kept = _kept(contest, found.captions, cartoons, split.dropped, options)
        kept = [replace(caption, prompt=prompts.get(contest)) for caption in kept]
        split.captions += kept
        pairs[name][contest] = sample_pairs(kept, options.rule(name), options.seed)
        advance(1)
    for name, split in splits.items():
        split.pairs = interleave(pairs[name], options.seed)
    return splits


def _kept(
    contest: str, captions: Sequence[RatedCaption], cartoons: Cartoons | None, dropped: Counter[str], options: Options
) -> list[RatedCaption]:
    """The captions of a contest that stay, with their picture, best rank first; the others are counted in `dropped`."""
    different = _without_repeats(captions)
    if repeats := len(captions) - len(different):
        dropped[TWICE] += repeats
    if not different:
        return []
    if len(different) < options.min_captions:
        dropped[options.too_few_captions] += len(different)
        return []
    image, why_none = cartoons.place(contest) if cartoons else (None, "")
    if why_none:
        dropped[why_none] += len(different)
        return []
    return [replace(caption, image=image) for caption in different]


def _without_repeats(captions: Iterable[RatedCaption]) -> list[RatedCaption]:
    """One caption for each text, outer whitespace and case aside: the one with most votes, then the better rank."""
    kept: dict[str, RatedCaption] = {}
    for caption in sorted(captions, key=lambda each: (-each.votes, each.rank, each.caption)):
        kept.setdefault(caption.caption.strip().casefold(), caption)
    return sorted(kept.values(), key=lambda each: (each.rank, each.caption))


def _remarks(contests: _Contests, splits: Mapping[str, Split], prompts: Mapping[str, str]) -> list[str]:
    """What the counts do not say: which contests gave nothing, and which go without their scene."""
    kept = {caption.contest: caption.prompt for split in splits.values() for caption in split.captions}
    gone = [contest for _, contest in contests if contest not in kept]
    plain = [contest for contest, prompt in kept.items() if prompt is None] if prompts else []
    remarks = [f"no caption is left of contests {', '.join(gone)}"] if gone else []
    return [*remarks, f"no description, so the model's default prompt: contests {', '.join(plain)}"] if plain else remarks
