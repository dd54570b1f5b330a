"""`python -m training.prepare`: public preference data to the tables that training and evaluation read, with a report of what became of it.

The output folder appears whole or not at all. Knows the command line and the files; what a pair is lies with the sources.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress import Progress as Bars

from training.pairs import DataInvalid, write_captions, write_pairs
from training.sources.hh_rlhf import prepare_hh_rlhf
from training.sources.hub import newyorker_tables
from training.sources.jsonl import Lines, prepare_jsonl
from training.sources.newyorker import Options, prepare_newyorker
from training.sources.pictures import PictureFolder
from training.sources.prepared import Advance, Prepared, Progress, parse_shares
from training.sources.report import TOOL, markdown_of, report_of, table_of

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Preference pairs from public data.", pretty_exceptions_enable=False)
out_console = Console()
err_console = Console(stderr=True)

Build = Callable[[PictureFolder, Progress], Prepared]
Out = Annotated[Path, typer.Option(help="The folder to write.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace a folder that this command wrote before.")]
Seed = Annotated[int, typer.Option(help="Seed of the splits, of the sampling and of the order.")]
Shares = Annotated[str, typer.Option(help="Shares of train,validation,test by contest; used when no file's name begins with its split.")]


@app.command()
def newyorker(
    context: typer.Context,
    ratings: Annotated[list[str], typer.Argument(help="Rating tables, folders of them, or the id of a dataset on the Hub.")],
    out: Out,
    cartoons: Annotated[Path | None, typer.Option(help="A folder of <contest>.jpg|png|webp, or parquet files with images.")] = None,
    descriptions: Annotated[list[Path] | None, typer.Option(help="Tables of canny, uncanny, location, entities.")] = None,
    fixed_prompt: Annotated[bool, typer.Option("--fixed-prompt", help="No prompt in the pairs, whatever descriptions there are.")] = False,
    revision: Annotated[str | None, typer.Option(help="Commit of the Hub dataset.")] = None,
    min_votes: Annotated[int, typer.Option(min=0, help="Captions with fewer votes are dropped.")] = 10,
    min_captions: Annotated[int, typer.Option(min=2, help="Contests with fewer captions are dropped.")] = 20,
    min_sigma: Annotated[float, typer.Option(min=0, help="Least gap of the means, in pooled standard errors.")] = 3.0,
    max_pairs: Annotated[int, typer.Option(min=1, help="Most training pairs a contest.")] = 1_000,
    max_held_out_pairs: Annotated[int, typer.Option(min=1, help="Most validation and test pairs a contest.")] = 500,
    shares: Shares = "0.8,0.1,0.1",
    seed: Seed = 42,
    overwrite: Overwrite = False,
) -> None:
    """New Yorker caption contest: captions rated by a crowd, pairs that differ clearly."""
    options = Options(
        seed=seed,
        shares=parse_shares(shares),
        min_votes=min_votes,
        min_captions=min_captions,
        min_sigma=min_sigma,
        max_pairs=max_pairs,
        max_held_out_pairs=max_held_out_pairs,
        use_scenes=not fixed_prompt,
    )

    def build(pictures: PictureFolder, progress: Progress) -> Prepared:
        return prepare_newyorker(newyorker_tables(ratings, revision, descriptions or [], cartoons), options, pictures, progress)

    _command(context, build, out, seed, overwrite=overwrite)


@app.command("hh-rlhf")
def hh_rlhf(
    context: typer.Context,
    dialogues: Annotated[list[Path], typer.Argument(help="JSON lines (.jsonl, .jsonl.gz) or parquet files, or folders of them.")],
    out: Out,
    shares: Shares = "0.8,0.1,0.1",
    seed: Seed = 42,
    overwrite: Overwrite = False,
) -> None:
    """Whole dialogues in two columns, chosen and rejected; the beginning they share is the prompt."""
    wanted = parse_shares(shares)
    _command(context, lambda _, progress: prepare_hh_rlhf(dialogues, wanted, seed, progress), out, seed, overwrite=overwrite)


@app.command()
def jsonl(
    context: typer.Context,
    lines: Annotated[list[Path], typer.Argument(help="JSON lines of id, prompt, chosen, rejected and perhaps image.")],
    out: Out,
    images: Annotated[Path | None, typer.Option(help="The folder the image paths are relative to.")] = None,
    contest_key: Annotated[str, typer.Option(help="The key whose equal values mark dependent pairs, such as Category.")] = "id",
    shares: Shares = "0.8,0.1,0.1",
    seed: Seed = 42,
    overwrite: Overwrite = False,
) -> None:
    """Pairs as JSON lines, the layout of the public vision reward benchmarks."""
    wanted, source = parse_shares(shares), Lines(lines, images, contest_key)
    _command(context, lambda pictures, progress: prepare_jsonl(source, wanted, seed, pictures, progress), out, seed, overwrite=overwrite)


def _command(context: typer.Context, build: Build, out: Path, seed: int, *, overwrite: bool) -> None:
    arguments = {name: _plain(value) for name, value in context.params.items()}
    with _Bars(err_console) as bars:
        report = prepare(build, out, command=str(context.info_name), arguments=arguments, seed=seed, overwrite=overwrite, progress=bars)
    out_console.print(table_of(report))
    for remark in report["remarks"]:
        out_console.print(remark, style="yellow", markup=False, highlight=False)
    out_console.print(f"written to {out}", markup=False, highlight=False)


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return str(value) if isinstance(value, Path) else value


def prepare(
    build: Build, out: Path, *, command: str, arguments: Mapping[str, Any], seed: int, overwrite: bool, progress: Progress
) -> dict[str, Any]:
    """Build in a sibling folder, then rename: `out` is the old one or the whole new one, never half of either.

    Killed between the two renames the old one lies in `.NAME.old`, and the next run puts it back. Returns the report; raises DataInvalid.
    """
    _put_back(out)
    refuse_unless_free(out, overwrite=overwrite)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
    partial.mkdir(parents=True)
    try:
        pictures = PictureFolder(partial)
        prepared = build(pictures, progress)
        _refuse_inputs_inside(out, prepared)
        report = report_of(prepared, command, arguments, seed, pictures.num_bytes)
        _write(partial, prepared, report, progress)
        _replace(out, partial)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return report


def refuse_unless_free(out: Path, *, overwrite: bool) -> None:
    """Raises DataInvalid for a folder that holds anything; with `overwrite`, for one that this command did not write."""
    if out.name in ("", ".."):
        raise DataInvalid(f"{out}: give the output folder a name of its own")
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return
    if not overwrite:
        raise DataInvalid(f"{out}: it is not empty; --overwrite replaces it")
    if not _is_ours(out):
        raise DataInvalid(f"{out}: --overwrite replaces only a folder that `python -m {TOOL}` wrote, and this has no such report.json")


def _is_ours(out: Path) -> bool:
    try:
        report = json.loads((out / "report.json").read_bytes())
    except (OSError, ValueError):
        return False
    return isinstance(report, dict) and report.get("tool") == TOOL


def _refuse_inputs_inside(out: Path, prepared: Prepared) -> None:
    for path in prepared.inputs:
        if path.resolve().is_relative_to(out.resolve()):
            raise DataInvalid(f"{path}: an input lies in the output folder, which would be replaced")


def _write(folder: Path, prepared: Prepared, report: Mapping[str, Any], progress: Progress) -> None:
    if not any(split.pairs for split in prepared.splits.values()):
        raise DataInvalid(f"no pair is left; {_losses(prepared)}")
    advance = progress.begin("writing tables", len(prepared.splits))
    for name, split in prepared.splits.items():
        write_pairs(folder / f"pairs_{name}.parquet", split.pairs)
        if prepared.rated:
            write_captions(folder / f"captions_{name}.parquet", split.captions)
        advance(1)
    (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "report.md").write_text(markdown_of(report), encoding="utf-8")


def _losses(prepared: Prepared) -> str:
    """What became of the rows, in one line."""
    dropped: Counter[str] = Counter()
    for split in prepared.splits.values():
        dropped += split.dropped
    read = sum(split.num_rows for split in prepared.splits.values())
    return "; ".join([f"rows read: {read:,}", *(f"{reason}: {count:,}" for reason, count in sorted(dropped.items()))])


def _replace(out: Path, partial: Path) -> None:
    old = _old(out)
    if out.exists():
        out.rename(old)
    try:
        partial.rename(out)
    finally:
        _put_back(out)
    shutil.rmtree(old, ignore_errors=True)


def _old(out: Path) -> Path:
    return out.with_name(f".{out.name}.old")


def _put_back(out: Path) -> None:
    """The old folder where the new one never came."""
    if _old(out).exists():
        if out.exists():
            shutil.rmtree(_old(out), ignore_errors=True)
        else:
            _old(out).rename(out)


class _Bars:
    """One line a step on stderr. Implements `training.sources.prepared.Progress`."""

    def __init__(self, console: Console) -> None:
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self._bars = Bars(*columns, console=console)

    def __enter__(self) -> _Bars:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._finish()
        self._bars.stop()

    def begin(self, what: str, total: int | None) -> Advance:
        self._finish()
        task = self._bars.add_task(what, total=total)
        return lambda number: self._bars.advance(task, number)

    def _finish(self) -> None:
        """A step of unknown length was as long as it became."""
        for task in self._bars.tasks:
            if task.total is None:
                self._bars.update(task.id, total=task.completed)


def main() -> None:
    """Entry point: unusable data is one line and exit code 3."""
    try:
        app(prog_name=f"python -m {TOOL}")
    except DataInvalid as error:
        err_console.print(f"{TOOL}: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(DataInvalid.exit_code)
    except OSError as error:  # a full disk, a folder that may not be written
        err_console.print(f"{TOOL}: {error.filename}: {error.strerror}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(DataInvalid.exit_code)


if __name__ == "__main__":
    main()
