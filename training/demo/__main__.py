"""`python -m training.demo --out app/demo`: regenerate the bundled demo model; fails if it misses the bounds of its world."""

from __future__ import annotations

import contextlib
import logging
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text
from transformers.utils.logging import disable_progress_bar

from app.artifacts import CONFIG_NAME
from app.errors import PunchlineError
from training.demo.base import Report
from training.demo.build import DemoBuilder, Figures
from training.demo.world import WORLD, Bounds, load_world
from training.recipe import load_recipe


def main(
    out: Annotated[Path, typer.Option(help="Where the artifact goes; replaced only when the new one holds the bounds.")],
    keep: Annotated[Path | None, typer.Option(help="Leave base, data and run in this new folder.")] = None,
    world: Annotated[Path, typer.Option(help="What is drawn, schooled, asked and demanded.")] = WORLD,
    threads: Annotated[int, typer.Option(help="Threads torch computes with.", min=1)] = 2,
) -> None:
    """Draw, school, train, export and examine the demo artifact."""
    logging.basicConfig(format="%(name)s: %(message)s")
    torch.set_num_threads(threads)
    disable_progress_bar()  # transformers' own would tear ours
    console = Console(stderr=True)
    if keep is not None and keep.exists():
        raise typer.BadParameter(f"{keep} exists already", param_hint="--keep")
    out = out.resolve()
    if out.exists() and not (out / CONFIG_NAME).is_file():
        raise typer.BadParameter(f"{out} is there and holds no {CONFIG_NAME}, so it is not replaced", param_hint="--out")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    loaded, started = load_world(world), time.monotonic()
    try:
        with _folder(keep) as work:
            figures = DemoBuilder(loaded, load_recipe("demo"), work, _Bars(console), console).build(partial)
    except PunchlineError as error:
        _refuse(console, str(error))
        raise typer.Exit(getattr(error, "exit_code", 3)) from None
    num_bytes = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    Console().print(_table(figures, num_bytes, (time.monotonic() - started) / 60))
    if faults := missed(figures, num_bytes, loaded.bounds):
        _refuse(console, f"{'; '.join(faults)}; the attempt lies in {partial}")
        raise typer.Exit(1)
    replace_artifact(out, partial)
    console.print(f"written to {out}", soft_wrap=True, highlight=False, markup=False)


def replace_artifact(out: Path, partial: Path) -> None:
    """Put a finished artifact where another may be: there is no moment in which both are lost."""
    aside = out.with_name(f".{out.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    if out.exists():
        out.rename(aside)
    partial.rename(out)
    shutil.rmtree(aside, ignore_errors=True)


def _refuse(console: Console, reason: str) -> None:
    console.print(Text.assemble(("refused:", "red"), f" {reason}"), soft_wrap=True, highlight=False)


def missed(figures: Figures, num_bytes: int, bounds: Bounds) -> list[str]:
    """Which bounds the artifact does not hold, in words."""
    checks = {
        f"accuracy {figures.judged.accuracy:.3f} is below {bounds.min_accuracy}": figures.judged.accuracy < bounds.min_accuracy,
        f"shuffled accuracy {figures.shuffled.accuracy:.3f} is above {bounds.max_shuffled_accuracy}": figures.shuffled.accuracy
        > bounds.max_shuffled_accuracy,
        f"{num_bytes:,} bytes are more than {bounds.max_artifact_bytes:,}": num_bytes > bounds.max_artifact_bytes,
    }
    return [fault for fault, is_missed in checks.items() if is_missed]


@contextlib.contextmanager
def _folder(keep: Path | None) -> Iterator[Path]:
    """The folder to work in, absolute: the one to keep, or one that is removed."""
    if keep is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    else:
        keep.mkdir(parents=True)
        yield keep.resolve()


def _table(figures: Figures, num_bytes: int, minutes: float) -> Table:
    table = Table("figure", "value", title="demo model, on held-out ideas")
    naming = (figures.naming.subject, figures.naming.twist, figures.naming.place, figures.naming.everything)
    rows = {
        "parameters: base + trained on preferences": f"{figures.num_base_parameters:,} + {figures.num_trained_parameters:,}",
        "base names subject / twist / place / all": " / ".join(f"{share:.3f}" for share in naming),
        f"pairwise accuracy ({figures.judged.num_pairs:,} pairs)": f"{figures.judged.accuracy:.3f}",
        "same captions, shuffled pictures": f"{figures.shuffled.accuracy:.3f}",
    }
    for fault, accuracy in figures.judged.by_fault.items():
        rows[f"  fault {fault}: right pictures / shuffled"] = f"{accuracy:.3f} / {figures.shuffled.by_fault[fault]:.3f}"
    rows |= {"artifact bytes": f"{num_bytes:,}", "minutes": f"{minutes:.1f}"}
    for name, value in rows.items():
        table.add_row(name, value)
    return table


class _Bars:
    """A progress bar a step, with a running mean of its loss. Implements `training.demo.build.Progress`."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextlib.contextmanager
    def showing(self, what: str, total: int) -> Iterator[Report]:
        done = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        with Progress(TextColumn("{task.description:8}"), *done, TextColumn("{task.fields[loss]}"), console=self._console) as bars:
            task = bars.add_task(what, total=total, loss="")
            mean, seen = 0.0, 0

            def report(loss: float) -> None:
                nonlocal mean, seen
                seen += 1
                mean += (loss - mean) / min(seen, 50)
                bars.update(task, advance=1, loss=f"loss {mean:.3f}" if loss else "")

            yield report


if __name__ == "__main__":
    typer.run(main)
