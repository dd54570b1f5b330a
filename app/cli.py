"""The command line: serve, score, compare, info, selftest, convert, bench. Tables for people, `--json` for programs."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer
from pydantic import SecretStr
from rich.console import Console
from rich.table import Table

from app import __version__
from app.errors import ApiError, DeviceBroken, DeviceFault, DeviceHung, StartRefused
from app.machine import keep_large_blocks_apart
from app.preference import compare as compare_scores
from app.preference import rank as rank_scores
from app.remote import remote_info, remote_post, remote_selftest
from app.settings import Settings, load_settings

# plain help: in a narrow terminal rich would cut the names of variables, and take the defaults for markup
app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    help="Preference scores for captions.",
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
out = Console()
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Url = Annotated[str | None, typer.Option(help="Ask a running server instead of loading a model; sends the first of PUNCHLINE_API_KEY.")]
Model = Annotated[str | None, typer.Option(help="A directory, a Hub id, `demo` or `newyorker`.")]
Base = Annotated[str | None, typer.Option("--base-model", help="Where the base model lies.")]
Prompt = Annotated[str | None, typer.Option(help="The instruction the captions answer.")]
Role = Annotated[
    Literal["assistant", "dialogue", "raw"] | None, typer.Option(help="Of a published folder that does not say it: what a caption is.")
]
Template = Annotated[str | None, typer.Option(help="As above: the prompt's text, or with --caption-role raw the whole.")]
MaxTokens = Annotated[int | None, typer.Option(min=1, help="As above: the longest text, image included.")]
_NO_IMAGE = Path("-")


def _checked_image(image: Path) -> Path:
    if image != _NO_IMAGE and not image.is_file():
        raise typer.BadParameter(f"file {str(image)!r} does not exist")
    return image


Image = Annotated[Path, typer.Argument(callback=_checked_image, help="The picture; - for a text-only model.")]


def main() -> None:
    """Entry point: a refused start is one line and exit code 3, a broken device 5, a refused request 1."""
    try:
        app()  # a wrong usage is typer's to show, exit code 2; an interrupt is exit code 130
    except StartRefused as error:
        _complain(str(error))
        sys.exit(StartRefused.exit_code)
    except DeviceBroken as error:
        _complain(str(error))
        leave(DeviceBroken.exit_code)
    except (DeviceFault, DeviceHung) as error:
        _complain(error.message)
        leave(DeviceBroken.exit_code)
    except ApiError as error:
        where = f" ({error.field})" if error.field else ""
        _complain(f"{error.code}: {error.message}{where}")
        sys.exit(1)


def _complain(text: str) -> None:
    """On stderr as it is; one that takes nothing must not change the exit code."""
    try:
        err.print(f"punchline: {text}", markup=False, highlight=False, soft_wrap=True)
    except (OSError, ValueError):
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 (what it still holds would fail again at exit)


def _one_of(url: str | None, *local: str | None) -> None:
    """A server answers with the model it has: naming another beside its address would be ignored."""
    if url and any(local):
        raise typer.BadParameter("--url asks a running server; it cannot be told a --model or --base-model")


def _option_type(annotation: Any) -> Any:
    """The field's type as the command line understands it."""
    inner = [part for part in get_args(annotation) if part is not type(None)] if get_origin(annotation) is not Literal else []
    plain = inner[0] if inner else annotation
    return str if plain is SecretStr else plain


def _with_settings(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command one option for every setting; the environment and the defaults stay with `load_settings`."""

    @functools.wraps(command)
    def run(**flags: Any) -> None:
        command(load_settings(**flags))

    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_option_type(field.annotation) | None, typer.Option(help=_help(name, field))],
        )
        for name, field in Settings.model_fields.items()
    ]
    run.__signature__ = inspect.Signature(options)  # type: ignore[attr-defined]
    run.__annotations__ = {option.name: option.annotation for option in options}
    return run


def _help(name: str, field: Any) -> str:
    default = "" if field.default is None else f" [default: {field.default}]"
    return f"{field.description}{default} (PUNCHLINE_{name.upper()})"


@app.command()
@_with_settings
def serve(settings: Settings) -> None:
    """Serve a reward model over HTTP until SIGTERM."""
    _log_to_stderr(settings.log_level)
    _quiet_libraries()
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # while it loads, too; once it serves the log says that nothing is reloaded
    keep_large_blocks_apart()
    from app.serving import serve as run  # torch loads only for commands that need it

    asyncio.run(run(settings))
    if any(thread.name == "device" for thread in threading.enumerate()):  # the drain ended before its batch did
        leave(0)


@app.command()
def score(
    image: Image,
    captions: list[str],
    prompt: Prompt = None,
    model: Model = None,
    base_model: Base = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Score captions of one picture, best first."""
    _one_of(url, model, base_model)
    route, local = ("/score", _local_score) if as_json else ("/rank", _local_rank)
    body = {"captions": captions, **_named(prompt=prompt)}
    answer = remote_post(url, route, _picture(image), body, _key()) if url else local(image, captions, prompt, model, base_model)
    if as_json:
        out.print_json(data=answer)
        return
    table = Table("rank", "score", "vs best", "caption")
    for place in answer["ranking"]:
        table.add_row(str(place["rank"]), f"{place['score']:.4f}", f"{place['win_probability']:.3f}", _literal(captions[place["index"]]))
    out.print(table)
    _print_model(answer)


@app.command()
def compare(
    image: Image,
    a: str,
    b: str,
    prompt: Prompt = None,
    model: Model = None,
    base_model: Base = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Say which of two captions of one picture is preferred."""
    _one_of(url, model, base_model)
    answer = (
        remote_post(url, "/compare", _picture(image), {"a": a, "b": b, **_named(prompt=prompt)}, _key())
        if url
        else _local_compare(image, a, b, prompt, model, base_model)
    )
    if as_json:
        out.print_json(data=answer)
        return
    table = Table("", "score", "P(preferred)", "caption")
    for name, caption, chance in (("a", a, answer["probability_a"]), ("b", b, 1 - answer["probability_a"])):
        mark = "*" if answer["preferred"] == name else ""
        table.add_row(name + mark, f"{answer['scores'][name]:.4f}", f"{chance:.3f}", _literal(caption))
    out.print(table)
    _print_model(answer)


@app.command()
def info(
    model: Annotated[str | None, typer.Argument(help="A directory, a Hub id, `demo` (if none is named) or `newyorker`.")] = None,
    base_model: Base = None,
    caption_role: Role = None,
    template: Template = None,
    max_tokens: MaxTokens = None,
    url: Url = None,
    as_json: Json = False,
) -> None:
    """Say what a folder is and what would stop it from being served, without loading it; or what a server has loaded."""
    _one_of(url, model, base_model)
    said = _named(caption_role=caption_role, template=template, max_tokens=max_tokens)
    card = remote_info(url, _key()) if url else _local_info(model or "demo", base_model, said)
    if as_json:
        out.print_json(data=card)
    else:
        table = Table("", "", show_header=False)
        for name, value in card.items():
            table.add_row(name, _literal(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
        out.print(table)
    if stops := card.get("stops"):
        _complain(f"would not be served: {stops[0]}" + (f" (and {len(stops) - 1} more)" if stops[1:] else ""))
        sys.exit(StartRefused.exit_code)


@app.command()
def selftest(model: Model = None, base_model: Base = None, url: Url = None, as_json: Json = False) -> None:
    """Score the golden items and compare with what they had at export; exit code 3 when they differ."""
    _one_of(url, model, base_model)
    report = remote_selftest(url, _key()) if url else _local_selftest(model, base_model)
    if as_json:
        out.print_json(data=report)
    else:
        out.print("passed" if report["passed"] else "FAILED", report["message"], markup=False)
    if not report["passed"]:
        sys.exit(StartRefused.exit_code)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="The published artifact: a directory or a Hub id.")],
    target: Annotated[Path, typer.Argument(help="A directory that does not exist yet.")],
    base_model: Base = None,
    golden: Annotated[
        Path | None, typer.Option(help="JSON lines of {image, captions, prompt?} (a text-only model: no image) to become golden items.")
    ] = None,
    offline: Annotated[bool, typer.Option(help="Never ask the Hub.")] = False,
    caption_role: Role = None,
    template: Template = None,
    max_tokens: MaxTokens = None,
) -> None:
    """Write the full artifact: safetensors head, every default spelt out, hashes, golden scores."""
    from app.converting import convert as run
    from app.converting import read_inputs

    _log_to_stderr("warning")
    _quiet_libraries()
    with err.status("opening") as status:
        inputs = read_inputs(golden) if golden else []
        said = _named(caption_role=caption_role, template=template, max_tokens=max_tokens)
        run(source, target, base_model=base_model, inputs=inputs, offline=offline, progress=status.update, said=said)
    out.print(f"wrote {target}; check it with: punchline selftest --model {target}", markup=False)


@app.command()
def bench(
    geometry: Annotated[
        Literal["qwen2.5-vl-3b", "qwen2.5-vl-7b", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b", "qwen3-0.6b", "qwen3-8b"] | None,
        typer.Option(help="Measure random weights in these shapes, no download; those without vl are text-only."),
    ] = None,
    layers: Annotated[int | None, typer.Option(min=1, help="Text layers, if not all.")] = None,
    vision_layers: Annotated[int | None, typer.Option(min=1, help="Vision layers, if not all.")] = None,
    artifact: Annotated[str | None, typer.Option(help="Measure this artifact, named as for serve; else the demo.")] = None,
    dtype: Annotated[Literal["auto", "float32", "bfloat16"], typer.Option(help="Number format, as for serve.")] = "auto",
    groups: Annotated[str | None, typer.Option(help="Captions (responses) in a group, with commas; else 1,2,8,16,64.")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Turns of every way; with --noise, groups.")] = 3,
    concurrency: Annotated[str | None, typer.Option(help="Clients at once, with commas; else 1,4,16,64; empty: no load.")] = None,
    as_json: Json = False,
    plot: Annotated[Path | None, typer.Option(help="Draw captions a second into this .png or .svg.")] = None,
    noise: Annotated[
        bool, typer.Option("--noise", help="Measure how scores move with their company instead, and what determinism costs.")
    ] = False,
    work: Annotated[Path | None, typer.Option(help="Keep the random artifact here for the next run.")] = None,
    conversation_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Text-only models: tokens that a group's responses share; else 400, or what the artifact takes."),
    ] = None,
    response_tokens: Annotated[
        int | None, typer.Option(min=1, help="Text-only models: tokens of each response's own; else 64, or what the artifact takes.")
    ] = None,
) -> None:
    """Measure every way to score a group on this machine, checked against the plain way; exit code 1 when scores disagree."""
    _log_to_stderr("warning")
    _quiet_libraries()
    from app.bench.command import Options
    from app.bench.command import bench as run

    measured = (geometry, layers, vision_layers, artifact, dtype, groups, rounds, concurrency)
    options = Options(*measured, as_json, plot, noise, work, conversation_tokens, response_tokens)
    if code := run(options):
        sys.exit(code)


@app.callback(invoke_without_command=True)
def _version(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        out.print(__version__)
        raise typer.Exit


def _local_score(image: Path, captions: list[str], prompt: str | None, model: str | None, base_model: str | None) -> dict[str, Any]:
    from app.service import GroupRequest

    request = GroupRequest(tuple(captions), image=None if image == _NO_IMAGE else image.read_bytes(), prompt=prompt)

    async def ask() -> dict[str, Any]:
        from app.main import running

        with _loading() as settings_of:
            async with running(settings_of(model, base_model)) as runtime:
                (result,) = await runtime.first.service.score([request], timeout_s=runtime.settings.max_timeout_ms / 1000)
                temperature = runtime.first.artifact.config.calibration.temperature
                return {
                    "scores": list(result.scores),
                    "image_id": result.image_id,
                    "model_fingerprint": runtime.first.loaded.fingerprint,
                    "temperature": temperature,
                }

    return asyncio.run(ask())


def _local_rank(image: Path, captions: list[str], prompt: str | None, model: str | None, base_model: str | None) -> dict[str, Any]:
    """As `/rank` answers: with the artifact's own temperature."""
    answer = _local_score(image, captions, prompt, model, base_model)
    return answer | {"ranking": [asdict(place) for place in rank_scores(answer["scores"], answer["temperature"])]}


def _local_compare(image: Path, a: str, b: str, prompt: str | None, model: str | None, base_model: str | None) -> dict[str, Any]:
    answer = _local_score(image, [a, b], prompt, model, base_model)
    found = compare_scores(answer["scores"][0], answer["scores"][1], answer["temperature"])
    return {
        "preferred": found.preferred,
        "probability_a": found.probability_a,
        "margin": found.margin,
        "scores": dict(zip("ab", answer["scores"], strict=True)),
        "model_fingerprint": answer["model_fingerprint"],
    }


def _local_info(model: str, base_model: str | None, said: dict[str, Any]) -> dict[str, Any]:
    _quiet_libraries()
    from app.inspecting import inspect_artifact

    return inspect_artifact(model, base_model=base_model, said=said).as_dict()


def _local_selftest(model: str | None, base_model: str | None) -> dict[str, Any]:
    async def ask() -> dict[str, Any]:
        from app.main import running

        with _loading() as settings_of:
            async with running(settings_of(model, base_model)) as runtime:
                return (await runtime.first.selftest.run()).as_dict()

    return asyncio.run(ask())


@contextmanager
def _loading() -> Iterator[Callable[[str | None, str | None], Settings]]:
    """A spinner while a model loads and scores; hands out settings for the command's own flags."""
    _log_to_stderr("warning")
    _quiet_libraries()
    with err.status("loading the model"):
        yield lambda model, base_model: load_settings(**_named(model=model, base_model=base_model), models="")


def _log_to_stderr(level: str) -> None:
    logging.basicConfig(level=level.upper(), stream=sys.stderr, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    for noisy in ("httpx", "huggingface_hub", "transformers", "python_multipart", "uvicorn.error"):
        logging.getLogger(noisy).setLevel("ERROR" if noisy != "uvicorn.error" else level.upper())


def _quiet_libraries() -> None:
    """No progress bars or load reports of the libraries: a refused start is one line, ours."""
    from huggingface_hub.utils.tqdm import disable_progress_bars
    from transformers.utils import logging as transformers_logging

    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    disable_progress_bars()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def _picture(image: Path) -> Path | None:
    """What is sent or read; a text-only model has none."""
    return None if image == _NO_IMAGE else image


def _named(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def _key() -> str | None:
    """The key to send to `--url`: the first of PUNCHLINE_API_KEY."""
    return next(iter(load_settings().api_keys), None)


def leave(code: int) -> None:
    """At once: a thread that hangs on the device cannot be ended, and would keep the interpreter or crash it on its way out."""
    try:
        logging.shutdown()
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):  # a full disk, a closed pipe
                stream.flush()
    finally:
        os._exit(code)


def _literal(text: str) -> str:
    """User text in a table: no markup, control characters visible."""
    shown = "".join(character if character.isprintable() else repr(character)[1:-1] for character in text)
    return shown.replace("[", r"\[")


def _print_model(answer: dict[str, Any]) -> None:
    out.print(f"model {answer['model_fingerprint'][:12]}", style="dim", highlight=False)


if __name__ == "__main__":
    main()
