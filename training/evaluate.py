"""`python -m training.evaluate TARGET --pairs pairs_test.parquet --out DIR`: how well a reward model agrees with the crowd.

TARGET is an artifact directory, a Hub id, `demo`, or the URL of a running server. Writes report.json and report.html.
"""

from __future__ import annotations

import random
import re
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Annotated, Any, Literal, TypeVar

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers.utils.logging import disable_progress_bar

from app.artifacts import file_sha256
from app.errors import PunchlineError
from training.controls import (
    CAPTION_ONLY,
    LENGTH,
    SHUFFLED,
    Control,
    NoDerangement,
    compared,
    length_margins,
    shuffle_images,
    skipped,
)
from training.pairs import DataInvalid, Pair, RatedCaption, read_captions, read_pairs
from training.report import (
    AS_SERVED,
    HTML_NAME,
    JSON_NAME,
    CaptionFigures,
    Coverage,
    Evaluation,
    Input,
    PairFigures,
    Reliability,
    as_table,
    write_report,
)
from training.scorers import GroupScorer, Item, Outcome, Refusal, Target, open_local, open_remote, score_items
from training.statistics import (
    Bootstrap,
    Floats,
    Pool,
    agreement,
    best_of,
    bradley_terry_loss,
    by_contest,
    by_sigma,
    calibration,
    compare_bands,
    fit_temperature,
    histogram,
    rank_bands,
)

DRAWS_OF = (2, 4, 8, 16)  # the n of best-of-n
_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
_LIBRARIES = ("punchline", "numpy", "torch", "transformers", "peft", "tokenizers", "pillow", "httpx", "pyarrow", "matplotlib")
_Row = TypeVar("_Row", Pair, RatedCaption)
Begin = Callable[[str, int], Callable[[int], None]]  # what is scored and how many captions it has, to the report of each step


class BadArguments(PunchlineError):
    """The command line contradicts itself; one line that says how."""

    exit_code = 2


class NotWritten(PunchlineError):
    """The figures are there and the disk takes no report."""

    exit_code = 1


@dataclass(frozen=True, slots=True)
class Options:
    """How the tables are read and the figures made."""

    group_size: int = 16
    seed: int = 0
    num_draws: int = 2000
    captions_per_contest: int = 200
    ignore_images: bool = False
    ignore_prompts: bool = False
    controls: bool = True

    @property
    def bootstrap(self) -> Bootstrap:
        return Bootstrap(self.seed, self.num_draws)


@dataclass(frozen=True, slots=True)
class Tables:
    """The tables of an evaluation, read."""

    pairs_path: Path
    pairs: list[Pair]
    captions_path: Path | None
    captions: list[RatedCaption]

    @property
    def inputs(self) -> dict[str, Input]:
        found = {"pairs": _input(self.pairs_path, self.pairs)}
        return found | ({"captions": _input(self.captions_path, self.captions)} if self.captions_path else {})


@dataclass(frozen=True, slots=True)
class PlacedPair:
    """A pair with the two items that have to be scored for it."""

    pair: Pair
    chosen: Item
    rejected: Item

    @property
    def items(self) -> tuple[Item, Item]:
        return self.chosen, self.rejected

    def changed(self, **parts: Any) -> PlacedPair:
        """Both items with another image or prompt."""
        return replace(self, chosen=replace(self.chosen, **parts), rejected=replace(self.rejected, **parts))


def read_tables(pairs: Path, captions: Path | None) -> Tables:
    """Raises DataInvalid naming file and row."""
    return Tables(pairs, read_pairs(pairs), captions, read_captions(captions) if captions else [])


def run(scorer: GroupScorer, tables: Tables, options: Options, arguments: Mapping[str, Any], begin: Begin) -> Evaluation:
    """All figures. Raises DataInvalid for tables that the model has no place for, before anything is scored."""
    began = time.monotonic()
    check_fit(scorer.target, tables.pairs_path, tables.pairs, options)
    if tables.captions_path:
        check_fit(scorer.target, tables.captions_path, tables.captions, options)
    pairs = measure_pairs(scorer, tables.pairs_path, tables.pairs, options, begin)
    captions = measure_captions(scorer, tables.captions_path, tables.captions, options, begin) if tables.captions_path else None
    return Evaluation(
        target=scorer.target,
        inputs=tables.inputs,
        arguments=arguments,
        versions={"python": python_version()} | {name: version(name) for name in _LIBRARIES},
        finished=datetime.now(UTC).isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - began, 3),
        pairs=pairs,
        captions=captions,
    )


def check_fit(target: Target, path: Path, rows: Sequence[_Row], options: Options) -> None:
    """Raises DataInvalid for an empty table and for a row the model has no place for; a server says itself what it takes."""
    if not rows:
        raise DataInvalid(f"{path}: no rows")
    if target.takes_images and options.ignore_images:
        raise BadArguments("--ignore-images is for models that take no image; this one does")
    for number, row in enumerate(rows, start=1):
        if target.takes_images and row.image is None:
            raise DataInvalid(f"{path}, row {number}: no image, and the model needs one")
        if target.takes_images is False and row.image is not None and not options.ignore_images:
            raise DataInvalid(f"{path}, row {number}: has an image, and the model takes none; --ignore-images scores the text alone")
        if target.fixed_prompt and not options.ignore_prompts and row.prompt not in (None, target.default_prompt):
            raise DataInvalid(f"{path}, row {number}: has a prompt, and the model has a fixed one; --ignore-prompts scores with that")


def measure_pairs(scorer: GroupScorer, path: Path, pairs: Sequence[Pair], options: Options, begin: Begin) -> PairFigures:
    """Every figure of a table of pairs. Raises DataInvalid when none of them can be scored."""
    placed = _placed(path, pairs, options)
    outcomes = _score(scorer, placed, options, begin, "pairs")
    margins = _margins(placed, outcomes)
    scored = np.isfinite(margins)
    if not scored.any():
        raise DataInvalid(f"{path}: the model refuses every pair, the first caption because {_first_refusal(outcomes)}")
    kept = [each.pair for each, is_scored in zip(placed, scored, strict=True) if is_scored]
    found, contests, bootstrap = margins[scored], [pair.contest for pair in kept], options.bootstrap
    return PairFigures(
        coverage=_coverage(placed, outcomes, margins),
        agreement=agreement(found, contests, bootstrap),
        contests=tuple(by_contest(found, contests)),
        buckets=tuple(by_sigma(found, [pair.sigma_gap for pair in kept], contests, bootstrap)),
        margins=histogram(found),
        reliability=_reliability(found, scorer.target.temperature),
        temperature=fit_temperature(found),
        controls=_controls(scorer, placed, margins, options, begin) if options.controls else (),
    )


def measure_captions(scorer: GroupScorer, path: Path, captions: Sequence[RatedCaption], options: Options, begin: Begin) -> CaptionFigures:
    """Best-of-n over a drawn sample of every contest, and the rank bands, which are scored whole."""
    items = [Item(*_place(path, caption, options), caption.caption) for caption in captions]
    rows_of = _rows_by_pool(captions, items)
    ranks = np.array([caption.rank for caption in captions], dtype=np.int64)
    ranks += int(ranks.min() == 0)  # some sources count from 0
    sampled = {key: _sample(key[0], rows, options) for key, rows in rows_of.items()}
    wanted = {row for rows in sampled.values() for row in rows}
    for rows in rows_of.values():
        inside = np.any(list(rank_bands(ranks[rows]).values()), axis=0)
        wanted |= set(np.asarray(rows)[inside].tolist())
    asked = [items[row] for row in sorted(wanted)]
    outcomes = score_items(scorer, asked, options.group_size, begin("captions", len(set(asked))))
    scores = np.array([_score_of(outcomes.get(item)) for item in items])
    ratings = np.array([caption.mean for caption in captions])
    drawn = [_pool(key[0], [row for row in rows if np.isfinite(scores[row])], scores, ratings, ranks) for key, rows in sampled.items()]
    whole = [_pool(key[0], rows, scores, ratings, ranks) for key, rows in rows_of.items()]
    return CaptionFigures(
        num_rated=len(captions),
        num_scored=int(np.isfinite(scores).sum()),
        refused=_refused(outcomes),
        max_sampled=options.captions_per_contest,
        best_of=tuple(found for n in DRAWS_OF if (found := best_of(drawn, n, options.bootstrap))),
        bands=tuple(compare_bands(whole, options.bootstrap)),
    )


def _placed(path: Path, pairs: Sequence[Pair], options: Options) -> list[PlacedPair]:
    places = [_place(path, pair, options) for pair in pairs]
    return [PlacedPair(pair, Item(*place, pair.chosen), Item(*place, pair.rejected)) for pair, place in zip(pairs, places, strict=True)]


def _place(path: Path, row: Pair | RatedCaption, options: Options) -> tuple[Path | None, str | None]:
    """The image and prompt a caption is scored with."""
    image = None if row.image is None or options.ignore_images else path.parent / row.image
    return image, None if options.ignore_prompts else row.prompt


def _score(scorer: GroupScorer, placed: Sequence[PlacedPair], options: Options, begin: Begin, what: str) -> dict[Item, Outcome]:
    items = list(dict.fromkeys(item for each in placed for item in each.items))
    return score_items(scorer, items, options.group_size, begin(what, len(items)))


def _margins(placed: Sequence[PlacedPair], outcomes: Mapping[Item, Outcome]) -> Floats:
    """NaN for a pair with a caption that has no score."""
    return np.array([_score_of(outcomes[each.chosen]) - _score_of(outcomes[each.rejected]) for each in placed], dtype=np.float64)


def _score_of(outcome: Outcome | None) -> float:
    return outcome if isinstance(outcome, float) else float("nan")


def _coverage(placed: Sequence[PlacedPair], outcomes: Mapping[Item, Outcome], margins: Floats) -> Coverage:
    scored = np.isfinite(margins)
    unscored = tuple(each.pair.pair_id for each, is_scored in zip(placed, scored, strict=True) if not is_scored)
    return Coverage(len(placed), int(scored.sum()), len(outcomes), _refused(outcomes), unscored)


def _refused(outcomes: Mapping[Item, Outcome]) -> dict[str, int]:
    return dict(Counter(outcome.code for outcome in outcomes.values() if isinstance(outcome, Refusal)).most_common())


def _first_refusal(outcomes: Mapping[Item, Outcome]) -> str:
    return next(outcome.message for outcome in outcomes.values() if isinstance(outcome, Refusal))


def _reliability(margins: Floats, served: float) -> tuple[Reliability, ...]:
    """Raw margins, the artifact's own temperature where it has one, and the fitted one where there is one."""
    fitted = fit_temperature(margins).value
    named = [("raw margins", 1.0), (AS_SERVED, served if served != 1.0 else None), ("fitted", fitted)]
    return tuple(
        Reliability(name, value, calibration(margins, value), bradley_terry_loss(margins / value))
        for name, value in named
        if value is not None
    )


def _controls(scorer: GroupScorer, placed: Sequence[PlacedPair], margins: Floats, options: Options, begin: Begin) -> tuple[Control, ...]:
    contests = [each.pair.contest for each in placed]
    by_length = length_margins([(each.pair.chosen, each.pair.rejected) for each in placed])
    variants = {
        LENGTH: by_length,
        CAPTION_ONLY: _caption_only(scorer, placed, options, begin),
        SHUFFLED: _shuffled(scorer, placed, options, begin),
    }
    return tuple(
        skipped(name, found) if isinstance(found, str) else compared(name, margins, found, contests, options.bootstrap)
        for name, found in variants.items()
    )


def _caption_only(scorer: GroupScorer, placed: Sequence[PlacedPair], options: Options, begin: Begin) -> Floats | str:
    """Margins without image and prompt, or why there are none."""
    if scorer.target.kind == "server":
        return "only in process: over HTTP a model that takes images scores no caption without one"
    blank = [each.changed(image=None, prompt=None) for each in placed]
    if all(each.chosen.image is None and each.chosen.prompt in (None, scorer.target.default_prompt) for each in placed):
        return "the pairs have neither image nor prompt: this is the model itself"
    return _margins(blank, _score(scorer, blank, options, begin, CAPTION_ONLY))


def _shuffled(scorer: GroupScorer, placed: Sequence[PlacedPair], options: Options, begin: Begin) -> Floats | str:
    """Margins with every image replaced, NaN for pairs without one; or why there are none. Images are told apart by content."""
    shown = [each for each in placed if each.chosen.image is not None]
    if not shown:
        return "the pairs have no image"
    digests = {path: file_sha256(path) for path in dict.fromkeys(each.chosen.image for each in shown) if path is not None}
    contests_of = {digest: set[str]() for digest in digests.values()}
    for each in shown:
        contests_of[_digest(digests, each)].add(each.pair.contest)
    try:
        others = shuffle_images({digest: frozenset(names) for digest, names in contests_of.items()}, options.seed)
    except NoDerangement as error:
        return str(error)
    path_of = {digest: path for path, digest in digests.items()}
    moved = {each.pair.pair_id: each.changed(image=path_of[others[_digest(digests, each)]]) for each in shown}
    margins = _margins(list(moved.values()), _score(scorer, list(moved.values()), options, begin, SHUFFLED))
    found = dict(zip(moved, margins.tolist(), strict=True))
    return np.array([found.get(each.pair.pair_id, float("nan")) for each in placed])


def _digest(digests: Mapping[Path, str], placed: PlacedPair) -> str:
    return "" if placed.chosen.image is None else digests[placed.chosen.image]


def _input(path: Path, rows: Iterable[Pair | RatedCaption]) -> Input:
    contests = [row.contest for row in rows]
    return Input(str(path), file_sha256(path), len(contests), len(set(contests)))


_PoolKey = tuple[str, Path | None, str | None]


def _rows_by_pool(captions: Sequence[RatedCaption], items: Sequence[Item]) -> dict[_PoolKey, list[int]]:
    """Rows that compete with each other: of one contest, image and prompt."""
    rows: dict[_PoolKey, list[int]] = {}
    for row, (caption, item) in enumerate(zip(captions, items, strict=True)):
        rows.setdefault((caption.contest, item.image, item.prompt), []).append(row)
    return rows


def _sample(contest: str, rows: Sequence[int], options: Options) -> list[int]:
    rng = random.Random(f"best of n/{options.seed}/{contest}")  # noqa: S311 (a sample, not a secret)
    return sorted(rng.sample(rows, min(options.captions_per_contest, len(rows))))


def _pool(contest: str, rows: Sequence[int], scores: Floats, ratings: Floats, ranks: Any) -> Pool:
    places = np.asarray(rows, dtype=np.int64)
    return Pool(contest, scores[places], ratings[places], ranks[places])


def evaluate(
    target: Annotated[str, typer.Argument(help="Artifact directory, Hub id (`owner/name@revision`), `demo`, or http(s)://server.")],
    pairs: Annotated[Path, typer.Option(help="Table of pairs, as `python -m training.prepare` writes it.")],
    out: Annotated[Path, typer.Option(help="Folder for report.html and report.json.")],
    captions: Annotated[Path | None, typer.Option(help="Table of rated captions: adds best-of-n and rank bands.")] = None,
    api_key: Annotated[str | None, typer.Option(help="Key of the server.")] = None,
    base_model: Annotated[str | None, typer.Option(help="Where the base model lies, if not where the artifact says.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    dtype: Annotated[Literal["auto", "float32", "bfloat16"] | None, typer.Option(help="Number format of the backbone.")] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Never ask the Hub.")] = False,
    max_batch_tokens: Annotated[int | None, typer.Option(min=64, help="Tokens that go to the device together. [default: 8192]")] = None,
    group_size: Annotated[int, typer.Option(min=1, help="Captions of one image and prompt that are scored together.")] = 16,
    captions_per_contest: Annotated[int, typer.Option(min=2, help="Rated captions sampled from each contest for best-of-n.")] = 200,
    draws: Annotated[int, typer.Option(min=100, help="Draws of the bootstrap over contests.")] = 2000,
    seed: Annotated[int, typer.Option(help="Seed of bootstrap, samples and shuffled images.")] = 0,
    ignore_images: Annotated[bool, typer.Option("--ignore-images", help="Score text alone; for models that take no image.")] = False,
    ignore_prompts: Annotated[bool, typer.Option("--ignore-prompts", help="Score with the model's default prompt.")] = False,
    controls: Annotated[bool, typer.Option(help="Also score without images and with shuffled ones.")] = True,
) -> None:
    """How well a reward model agrees with the crowd, with controls, calibration and intervals over contests."""
    arguments = {name: str(value) if isinstance(value, Path) else value for name, value in locals().items() if name != "api_key"}
    options = Options(group_size, seed, draws, captions_per_contest, ignore_images, ignore_prompts, controls)
    local = {"base_model": base_model, "device": device, "dtype": dtype, "offline": offline or None, "max_batch_tokens": max_batch_tokens}
    tables = read_tables(pairs, captions)  # before minutes of loading
    _make_folder(out)
    opened = _open(target, api_key, {name: value for name, value in local.items() if value is not None})
    console = Console(stderr=True)
    with opened as scorer, _bars(console) as bars:
        evaluation = run(scorer, tables, options, arguments, _begin(bars))
    _write(out, evaluation)
    console.print(as_table(evaluation))
    console.print(f"written to {out / HTML_NAME} and {out / JSON_NAME}", highlight=False, soft_wrap=True, markup=False)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadArguments(f"--out {out}: cannot be written ({error.strerror})") from None


def _write(out: Path, evaluation: Evaluation) -> None:
    try:
        write_report(out, evaluation)
    except OSError as error:
        raise NotWritten(f"{out}: the report could not be written ({error.strerror}); what was there is as it was") from None


def _open(target: str, api_key: str | None, local: Mapping[str, Any]) -> AbstractContextManager[GroupScorer]:
    """Raises BadArguments for options that the kind of target has no use for."""
    if target.startswith(("http://", "https://")):
        if local:
            raise BadArguments(f"--{next(iter(local)).replace('_', '-')} is for a model in this process, and {target} is a server")
        return open_remote(target, api_key)
    if api_key is not None:
        raise BadArguments(f"--api-key is for a server, and {target} is an artifact")
    if not _DEVICE.fullmatch(local.get("device", "auto")):
        raise BadArguments("--device must be auto, cpu, cuda or cuda:N")
    return nullcontext(open_local(target, **local))


def _bars(console: Console) -> Progress:
    columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    return Progress(*columns, console=console)


def _begin(bars: Progress) -> Begin:
    def begin(what: str, total: int) -> Callable[[int], None]:
        task = bars.add_task(what, total=total)
        return lambda num_captions: bars.advance(task, num_captions)

    return begin


def main(arguments: Sequence[str] | None = None) -> None:
    """A refusal is one line; exit code 3 for a model or table that cannot be used, 2 for the command line, 1 for the rest."""
    disable_progress_bar()  # transformers' own would tear ours
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command()(evaluate)
    try:
        app(args=None if arguments is None else list(arguments))
    except PunchlineError as error:
        Console(stderr=True).print(f"evaluate: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(getattr(error, "exit_code", 1))


if __name__ == "__main__":
    main()
