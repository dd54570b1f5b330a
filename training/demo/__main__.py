"""`python -m training.demo --out app/demo`: regenerate the bundled demo model; fails if it misses the recipe's bounds."""

from __future__ import annotations

import shutil
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from training.demo.base import Report
from training.demo.build import DemoBuilder, Figures
from training.demo.recipe import RECIPES, Bounds, load_recipe


def main(
    out: Annotated[Path, typer.Option(help="Where the artifact goes; replaced only when the new one holds the bounds.")],
    recipe: Annotated[Path, typer.Option(help="The recipe file.")] = RECIPES / "demo.toml",
    threads: Annotated[int, typer.Option(help="Threads torch computes with.", min=1)] = 2,
) -> None:
    """Draw, train and write the demo artifact."""
    torch.set_num_threads(threads)
    disable_progress_bar()  # transformers' own would tear ours
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft 0.21 asks transformers so
    console = Console()
    loaded = load_recipe(recipe)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    started = time.monotonic()
    with _Bars(console) as bars:
        figures = DemoBuilder(loaded, partial, bars).build()
    num_bytes = sum(path.stat().st_size for path in partial.rglob("*") if path.is_file())
    console.print(_table(figures, num_bytes, (time.monotonic() - started) / 60))
    if faults := missed(figures, num_bytes, loaded.bounds):
        console.print(f"[red]refused:[/red] {'; '.join(faults)}; the attempt lies in {partial}")
        raise typer.Exit(1)
    shutil.rmtree(out, ignore_errors=True)
    partial.rename(out)
    console.print(f"written to {out}")


def missed(figures: Figures, num_bytes: int, bounds: Bounds) -> list[str]:
    """Which bounds the artifact does not hold, in words."""
    checks = {
        f"accuracy {figures.judged.accuracy:.3f} is below {bounds.min_accuracy}": figures.judged.accuracy < bounds.min_accuracy,
        f"shuffled accuracy {figures.shuffled.accuracy:.3f} is above {bounds.max_shuffled_accuracy}": figures.shuffled.accuracy
        > bounds.max_shuffled_accuracy,
        f"{num_bytes:,} bytes are more than {bounds.max_artifact_bytes:,}": num_bytes > bounds.max_artifact_bytes,
    }
    return [fault for fault, is_missed in checks.items() if is_missed]


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
    """One progress bar a step, with a running mean of its loss. Implements `training.demo.build.Progress`."""

    def __init__(self, console: Console) -> None:
        columns = (
            TextColumn("{task.description:12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[loss]}"),
        )
        self._bars = Progress(*columns, console=console)

    def __enter__(self) -> _Bars:
        self._bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._bars.stop()

    def begin(self, what: str, total: int) -> Report:
        task = self._bars.add_task(what, total=total, loss="")
        mean = 0.0
        seen = 0

        def report(loss: float) -> None:
            nonlocal mean, seen
            seen += 1
            mean += (loss - mean) / min(seen, 50)
            self._bars.update(task, advance=1, loss=f"loss {mean:.3f}" if loss else "")

        return report


if __name__ == "__main__":
    typer.run(main)
