"""`punchline bench` from its options to its exit code: what to measure, the artifact to measure it on, what is printed.

Exit code 1 where scores disagree with the plain way, where a way did not compute what its name says, or where deterministic
scores are not.
"""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rich.console import Console, RenderableType
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from app.bench.conversations import AS_USUAL, CONVERSATION_TOKENS, RESPONSE_TOKENS, Wanted
from app.bench.noise_run import NoiseRun, run_noise
from app.bench.plot import check_plot, write_plot
from app.bench.report import Report
from app.bench.run import Plan, run_ways
from app.bench.tables import WIDTH, noise_tables, tables_of
from app.errors import SettingsInvalid
from app.geometry import GEOMETRIES, Geometry, Limits, write_artifact
from app.settings import Settings, load_settings

Dtype = Literal["auto", "float32", "bfloat16"]
_ANY_MODEL = "demo"  # before there is one: the other settings are the same for all
_GROUPS, _CONCURRENCY = "1,2,8,16,64", "1,4,16,64"
_TIMEOUT_MS = 600_000
_MAX_QUEUE_TOKENS, _MAX_QUEUE_ITEMS = 1 << 24, 1 << 16  # 64 clients at once are the bench's own doing
_MAX_TEXT_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Options:
    """As typed. Raises SettingsInvalid for what contradicts itself."""

    geometry: str | None = None
    layers: int | None = None
    vision_layers: int | None = None
    artifact: str | None = None
    dtype: Dtype = "auto"
    groups: str | None = None  # else `_GROUPS`
    rounds: int = 3
    concurrency: str | None = None  # else `_CONCURRENCY`
    as_json: bool = False
    plot: Path | None = None
    noise: bool = False
    work: Path | None = None
    conversation_tokens: int | None = None
    response_tokens: int | None = None

    @property
    def wanted(self) -> Wanted:
        return Wanted(self.conversation_tokens, self.response_tokens)

    @property
    def limits(self) -> Limits:
        """Of a text-only artifact that is made."""
        return Limits(self.conversation_tokens or CONVERSATION_TOKENS, self.response_tokens or RESPONSE_TOKENS)

    def __post_init__(self) -> None:
        if self.geometry is not None and self.artifact is not None:
            raise SettingsInvalid("--geometry makes an artifact and --artifact names one; choose one of them")
        if self.geometry is None and (self.layers or self.vision_layers or self.work):
            raise SettingsInvalid("--layers, --vision-layers and --work belong to --geometry")
        if self.noise and self.plot is not None:
            raise SettingsInvalid("--noise measures nothing that --plot could draw")
        if self.noise and not (self.groups is None and self.concurrency is None):
            raise SettingsInvalid("--noise measures groups of 16 captions without load; --groups and --concurrency do not belong to it")
        if self.noise and self.wanted != AS_USUAL:
            raise SettingsInvalid(
                "--noise measures captions of images; --conversation-tokens and --response-tokens belong to conversations"
            )


def bench(options: Options, geometries: dict[str, Geometry] | None = None) -> int:
    """Measure, print, and return the exit code."""
    max_captions = bench_settings(options.artifact or _ANY_MODEL, options.dtype).max_captions
    sizes = read_numbers("--groups", _GROUPS if options.groups is None else options.groups)
    if options.groups is None:
        sizes = tuple(size for size in sizes if size <= max_captions)
    levels = read_numbers("--concurrency", _CONCURRENCY if options.concurrency is None else options.concurrency, none=True)
    if options.plot is not None:
        check_plot(options.plot)
    if not options.noise and max(sizes) > max_captions:
        raise SettingsInvalid(f"--groups {max(sizes)}: a request has at most {max_captions} captions (PUNCHLINE_MAX_CAPTIONS)")
    with _progress() as (report, announce), _artifact(options, geometries or GEOMETRIES, report) as (model, name):
        settings = bench_settings(model, options.dtype)
        if options.noise:
            noise = run_noise(settings, options.rounds, report)
        else:
            found = run_ways(Plan(name, settings, sizes, options.rounds, levels, wanted=options.wanted), report, announce)
    return show_noise(noise, name, options) if options.noise else show(found, options)


def show(report: Report, options: Options) -> int:
    """Print, then draw: what was measured is not lost for want of a place for its picture. Returns the exit code."""
    _print(tables_of(report), report.as_dict() if options.as_json else None)
    if options.plot is not None:
        write_plot(report, options.plot)
    return 1 if report.disagreeing or report.misnamed else 0


def show_noise(noise: NoiseRun, name: str, options: Options) -> int:
    """Print; returns the exit code."""
    shown = noise_tables(noise.report, noise.hardware, f"{name}: {noise.heading}")
    _print(shown, noise.as_dict(name) if options.as_json else None)
    return 0 if noise.report.holds else 1


def bench_settings(model: str, dtype: Dtype, *, deterministic: bool | None = None) -> Settings:
    """The environment's settings for a server that refuses nothing the bench asks."""
    return load_settings(
        model=model,
        models="",
        dtype=None if dtype == "auto" else dtype,
        deterministic=deterministic,
        max_timeout_ms=_TIMEOUT_MS,
        max_queue_tokens=_MAX_QUEUE_TOKENS,
        max_queue_items=_MAX_QUEUE_ITEMS,
        max_prompt_bytes=_MAX_TEXT_BYTES,
        max_caption_bytes=_MAX_TEXT_BYTES,
    )


def read_numbers(option: str, text: str, *, none: bool = False) -> tuple[int, ...]:
    """`1,8,16`, ascending and each once; with `none` the empty text is none. Raises SettingsInvalid."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isascii() and part.isdigit() and int(part) for part in parts) or not (parts or none):
        raise SettingsInvalid(f"{option} {text!r}: expected positive numbers with commas, like 1,8,16")
    return tuple(sorted({int(part) for part in parts}))


@contextmanager
def _artifact(options: Options, geometries: dict[str, Geometry], report: Callable[[str], None]) -> Iterator[tuple[str, str]]:
    """Where the artifact lies and what the table calls it; one that is made goes with its temporary folder."""
    if options.geometry is None:
        name = options.artifact or "demo"
        yield name, name
        return
    geometry = _geometry(options, geometries)
    folder = f"{options.geometry}-{geometry.layers}" + (f"-{geometry.vision_layers}" if geometry.takes_images else "")
    limits = None if geometry.takes_images else options.limits
    with _folder(options.work) as work:
        root = write_artifact(geometry, work / folder, lambda share: report(f"writing random weights, {share:.0%}"), limits=limits)
        yield str(root), options.geometry


def _geometry(options: Options, geometries: dict[str, Geometry]) -> Geometry:
    """As short as asked. Raises SettingsInvalid for one that is not there or has not what an option speaks of."""
    name = str(options.geometry)
    if name not in geometries:
        raise SettingsInvalid(f"--geometry {name}: expected one of {', '.join(geometries)}")
    geometry = geometries[name]
    if geometry.takes_images and options.wanted != AS_USUAL:
        raise SettingsInvalid(f"--geometry {name} takes images; --conversation-tokens and --response-tokens belong to text-only models")
    if not geometry.takes_images and (options.vision_layers is not None or options.noise):
        raise SettingsInvalid(f"--geometry {name} is text-only; --vision-layers and --noise belong to models that take images")
    for option, asked, has in (
        ("--layers", options.layers, geometry.layers),
        ("--vision-layers", options.vision_layers, geometry.vision_layers),
    ):
        if asked is not None and asked > has:
            raise SettingsInvalid(f"{option} {asked}: {name} has {has}")
    return geometry.shortened(options.layers, options.vision_layers)


@contextmanager
def _folder(work: Path | None) -> Iterator[Path]:
    if work is not None:
        work.mkdir(parents=True, exist_ok=True)
        yield work
        return
    with tempfile.TemporaryDirectory(prefix="punchline-bench-") as name:
        yield Path(name)


@contextmanager
def _progress() -> Iterator[tuple[Callable[[str], None], Callable[[str], None]]]:
    """One line on stderr that says what is being done, and lines that stay."""
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("starting", total=None)
        yield (
            lambda text: progress.update(task, description=text),
            lambda text: progress.console.print(text, markup=False, highlight=False, soft_wrap=True),
        )


def _print(shown: RenderableType, told: object | None) -> None:
    if told is None:
        console = Console()
        Console(width=max(console.width, WIDTH)).print(shown, highlight=False, soft_wrap=False)
    else:
        print(json.dumps(_finite(told), indent=2, allow_nan=False))


def _finite(told: Any) -> Any:
    """JSON knows no infinity and no NaN, which are null: the difference to a score that is no number, say."""
    if isinstance(told, dict):
        return {name: _finite(value) for name, value in told.items()}
    if isinstance(told, list | tuple):
        return [_finite(value) for value in told]
    return None if isinstance(told, float) and not math.isfinite(told) else told
