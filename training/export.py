"""`python -m training.export RUN --out ARTIFACT --pairs TABLE`: a checkpoint of a run becomes an artifact that is proven to serve.

Everything is written beside the target and renamed once a fresh process has loaded it and found the scores of training.
"""

from __future__ import annotations

import gc
import json
import logging
import math
import os
import re
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import httpx
import torch
import typer
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from peft import PeftModel
from pydantic import ValidationError
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table
from rich.text import Text
from safetensors import SafetensorError
from transformers.utils.logging import disable_progress_bar

from app.artifacts import (
    ADAPTER_NAME,
    HEAD_NAME,
    PROCESSOR_NAME,
    Artifact,
    Calibration,
    Golden,
    RewardModelConfig,
    ScoreDistribution,
    base_sha256,
    file_sha256,
    find_base,
    open_artifact,
    write_config,
    write_golden,
)
from app.contracts import Group
from app.encoding import Encoder
from app.errors import PunchlineError, StartRefused
from app.golden import make_golden
from app.heads import save_head
from app.model import RewardModel, resolve_device
from app.scoring import score_plain, score_shared
from training.batches import draw
from training.checkpoints import Checkpoint, Checkpoints, find_fault
from training.collation import leave_out_unfit, read_image
from training.golden import Proof, choose_inputs, prove_in_fresh_process, widened_tolerance
from training.loop import weights_of
from training.model_card import CardFacts, read_evaluation, write_card
from training.pairs import DataInvalid, Pair, read_pairs
from training.recipe import Recipe
from training.report import Evaluation
from training.scorers import weights_sha256
from training.tracking import METRICS_NAME
from training.train import RUN_NAME, TRAIN_TABLE
from training.trainee import OWN_BASE, Trainee, describe, load_trained, make_trainee

MAX_SCORED_PAIRS = 256  # of the table: golden items are chosen among them, and their scores make the distribution
_CAPTIONS_AT_ONCE = 16
_BASE_FILES = ("config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json")
_CHECKPOINT = re.compile(r"step-\d{7,}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
app = typer.Typer(add_completion=False)


class ExportRefused(StartRefused):
    """What was asked for cannot be exported: the run, the checkpoint, the base or the target is at fault."""


class ExportFailed(PunchlineError):
    """The artifact could not be written or sent; a half-written one was removed."""

    exit_code = 4


class Hub(Protocol):
    """Where an artifact is sent. Returns the address it can be seen at; raises ExportFailed."""

    def upload(self, folder: Path, repo: str) -> str: ...


class HuggingFaceHub:
    """The Hugging Face Hub, under the account that `hf auth login` left. One commit replaces whatever the repository held."""

    def __init__(self, api: HfApi | None = None) -> None:
        self._api = api or HfApi()

    def upload(self, folder: Path, repo: str) -> str:
        message = f"Punchline artifact {folder.name}"
        try:
            address = self._api.create_repo(repo, exist_ok=True)
            self._api.upload_folder(repo_id=repo, folder_path=folder, commit_message=message, delete_patterns="*")
        except (HfHubHTTPError, HFValidationError, httpx.HTTPError, OSError, ValueError) as error:
            raise ExportFailed(f"{folder} is whole, but could not be sent to {repo} ({_reason(error)})") from error
        return str(address)


@dataclass(frozen=True, slots=True)
class Run:
    """A run's folder as it was read, and the checkpoint of it that is exported."""

    path: Path
    recipe: Recipe
    description: dict[str, Any]  # run.json
    checkpoint: Checkpoint
    metrics: tuple[dict[str, Any], ...]  # metrics.jsonl up to the checkpoint


@dataclass(frozen=True, slots=True)
class Source:
    """Everything that goes into an artifact, each part checked."""

    run: Run
    base_path: Path
    config: RewardModelConfig  # but what only scoring finds out
    table: Path
    pairs: Sequence[Pair]
    evaluation: Evaluation | None


@app.command()
def main(
    run: Annotated[Path, typer.Argument(help="A folder written by training.train.")],
    out: Annotated[Path, typer.Option(help="The artifact: a directory that does not exist yet.")],
    pairs: Annotated[Path, typer.Option(help="Pairs whose captions become golden items and the score distribution: the validation table.")],
    checkpoint: Annotated[str | None, typer.Option(help="step-0000100; without it the newest whole one.")] = None,
    evaluation: Annotated[
        Path | None, typer.Option(help="report.json of training.evaluate on an earlier export of this checkpoint.")
    ] = None,
    description: Annotated[str, typer.Option(help="One sentence that servers log and show.")] = "",
    name: Annotated[str | None, typer.Option(help="Title of the model card; without it the name of the repository or directory.")] = None,
    embed_base: Annotated[
        bool, typer.Option("--embed-base", help="Copy the base into the artifact, so that it needs nothing else.")
    ] = False,
    push: Annotated[str | None, typer.Option(help="Send the artifact to this Hub repository: owner/name.")] = None,
) -> None:
    """Write an artifact that `punchline serve` loads, and prove that it scores as in training."""
    logging.basicConfig(format="%(name)s: %(message)s")
    disable_progress_bar()  # transformers' own would tear ours
    console = Console(stderr=True)
    try:
        if push is not None:
            _check_repo(push)
        title = name or push or out.name
        options = {"checkpoint": checkpoint, "evaluation": evaluation, "description": description, "embed_base": embed_base}
        export_artifact(run, out, pairs=pairs, name=title, repo=push, console=console, **options)  # type: ignore[arg-type]
        if push is not None:
            console.print(f"sent to {push_artifact(out, push, HuggingFaceHub())}", soft_wrap=True, highlight=False, markup=False)
    except PunchlineError as error:
        console.print(Text.assemble(("refused:", "red"), f" {error}"), soft_wrap=True, highlight=False)
        raise typer.Exit(getattr(error, "exit_code", 3)) from None


def export_artifact(
    run: Path,
    out: Path,
    *,
    checkpoint: str | None = None,
    pairs: Path,
    evaluation: Path | None = None,
    description: str = "",
    name: str | None = None,
    repo: str | None = None,
    embed_base: bool = False,
    console: Console,
    prove: Callable[[Path], Proof] = prove_in_fresh_process,
) -> Path:
    """Write the artifact of a checkpoint to the new directory `out`; nothing is left of one that fails.

    `name` is the card's title and `repo` where the card says it can be loaded from.
    Raises ExportRefused, DataInvalid or ArtifactInvalid for an input at fault, ExportFailed when writing fails.
    """
    if out.exists() or out.is_symlink():
        raise ExportRefused(f"{out}: exists already")
    source = open_source(run, checkpoint, pairs, evaluation, description, embed_base=embed_base)
    with _writing(out) as partial:
        golden, config = _write_parts(source, partial, console)
        gc.collect()  # PEFT's cycles hold the weights, and the fresh process needs their room
        torch.cuda.empty_cache()
        console.print("loading the artifact in a fresh process", highlight=False)
        proof = prove(partial)
        write_golden(partial, widened_tolerance(golden, proof.differences))
        write_card(partial, CardFacts(name or out.name, repo, config, source.run.metrics, source.evaluation, proof))
        write_config(partial, config)
        open_artifact(str(partial.resolve()), offline=True)
        partial.rename(out)
    console.print(_summary(out, source, golden, proof))
    return out


def push_artifact(artifact: Path, repo: str, hub: Hub) -> str:
    """Send a whole artifact to a Hub repository. Raises ExportRefused for one that only this machine could load, ExportFailed."""
    _check_repo(repo)
    config = open_artifact(str(artifact.resolve()), offline=True).config  # a bare name could be that of a bundled artifact
    if not config.base_model_name.startswith("./") and Path(config.base_model_name).is_dir():
        raise ExportRefused(f"{artifact}: its base {config.base_model_name} is a directory of this machine; export it with --embed-base")
    return hub.upload(artifact, repo)


def open_source(run: Path, checkpoint: str | None, pairs: Path, evaluation: Path | None, description: str, *, embed_base: bool) -> Source:
    """Read and check every input before the model is loaded."""
    opened = open_run(run, checkpoint)
    report = None if evaluation is None else _read_report(evaluation, opened)
    table = read_pairs(pairs)
    model = opened.recipe.model
    base_path = find_base(model.base, model.revision)
    expected, found = opened.description["base_sha256"], base_sha256(base_path)
    if expected != found:
        raise ExportRefused(f"{base_path}: not the base this run began with: expected sha256 {expected}, found {found}")
    drawn = [table[index] for index in draw(len(table), MAX_SCORED_PAIRS, f"{opened.recipe.run.seed} {pairs.name}")]
    config = describe(opened.recipe, base_path).model_copy(
        update={
            **name_base(opened.recipe, base_path, embed_base=embed_base),
            "description": description,
            "training": _provenance(opened, base_path, pairs, report),
            "calibration": Calibration(temperature=(report and report.pairs.temperature.value) or 1.0),
        }
    )
    return Source(opened, base_path, config, pairs, drawn, report)


def _read_report(path: Path, run: Run) -> Evaluation:
    """Figures that can be this artifact's: not of a server, whose weights nobody here has seen, and not of the pairs it learned."""
    report = read_evaluation(path)
    if report.target.kind == "server":
        raise ExportRefused(f"{path}: measured the server {report.target.name}; evaluate the artifact itself, by its directory")
    if report.target.weights_sha256 is None:
        raise ExportRefused(f"{path}: does not say which weights it measured; evaluate {report.target.name} again")
    trained_on = run.description["data"].get(TRAIN_TABLE, {}).get("sha256")
    for name, table in report.inputs.items():
        if table.sha256 == trained_on:
            raise ExportRefused(f"{path}: its {name} {table.path} are the training table of {run.path}; evaluate on pairs it never saw")
    return report


def open_run(run: Path, checkpoint: str | None) -> Run:
    """A run's recipe, one of its checkpoints, and its metrics so far. Raises ExportRefused."""
    path = run / RUN_NAME
    try:
        description = json.loads(path.read_bytes())
        recipe = Recipe.model_validate_json(json.dumps(description["recipe"]))
        if not {"base_sha256", "data", "versions"} <= set(description):
            raise KeyError("base_sha256, data, versions")
    except OSError as error:
        raise ExportRefused(f"{run}: not a training run, {RUN_NAME} cannot be read ({error.strerror})") from None
    except (ValidationError, ValueError, KeyError, TypeError) as error:
        raise ExportRefused(f"{path}: not the description of a training run ({_first_line(error)})") from None
    chosen = _choose_checkpoint(run / "checkpoints", checkpoint)
    return Run(run, recipe, description, chosen, tuple(_read_metrics(run / METRICS_NAME, chosen.step)))


def _choose_checkpoint(folder: Path, name: str | None) -> Checkpoint:
    checkpoints = Checkpoints(folder, 1)
    if name is None:
        if newest := checkpoints.newest():
            return newest
        raise ExportRefused(f"{folder}: no whole checkpoint")
    if not _CHECKPOINT.fullmatch(name) or not (folder / name).is_dir():
        known = ", ".join(each.path.name for each in checkpoints.all()) or "none"
        raise ExportRefused(f"{folder / name}: no such checkpoint; there are {known}")
    if fault := find_fault(folder / name):
        raise ExportRefused(f"{folder / name}: a broken checkpoint: {fault}")
    return Checkpoint(int(name.removeprefix("step-")), folder / name)


def _read_metrics(path: Path, last_step: int) -> Iterator[dict[str, Any]]:
    """The lines of steps that the checkpoint has taken; a run that goes on may be writing later ones."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ExportRefused(f"{path}: cannot be read ({_reason(error)})") from None
    for number, line in enumerate(lines, start=1):
        try:
            values = json.loads(line)
            step = int(values["step"])
        except (ValueError, KeyError, TypeError):
            if number == len(lines):
                return  # half a line of a killed or a living process
            raise ExportRefused(f"{path}, line {number}: no metrics of a step") from None
        if step <= last_step:
            yield values


def name_base(recipe: Recipe, base_path: Path, *, embed_base: bool) -> dict[str, Any]:
    """How the artifact finds its base: within itself, or where the recipe found it, on the commit it was found at."""
    if recipe.lora is None:
        return {}  # its trained base is its own
    if embed_base:
        return {"base_model_name": OWN_BASE, "base_model_revision": None, "base_model_sha256": base_sha256(base_path)}
    local = Path(recipe.model.base).expanduser().is_dir()
    commit = base_path.name if base_path.parent.name == "snapshots" and _COMMIT.fullmatch(base_path.name) else None
    return {
        "base_model_name": str(base_path.resolve()) if local else recipe.model.base,
        "base_model_revision": None if local else commit or recipe.model.revision,
        "base_model_sha256": base_sha256(base_path),
    }


def _provenance(run: Run, base_path: Path, pairs: Path, evaluation: Evaluation | None) -> dict[str, Any]:
    """Where the weights come from; every figure is one of a file."""
    model = run.recipe.model
    return {
        "recipe": run.description["recipe"],
        "data": run.description["data"],
        "seed": run.recipe.run.seed,
        "versions": run.description["versions"],
        "step": run.checkpoint.step,
        "base": {"name": model.base, "revision": model.revision, "sha256": run.description["base_sha256"]},
        "golden_pairs": {"table": pairs.name, "sha256": file_sha256(pairs)},
        "metrics": {
            "training": next((line for line in reversed(run.metrics) if "loss" in line), None),
            "validation": next((line for line in reversed(run.metrics) if "validation_loss" in line), None),
            "evaluation": None if evaluation is None else _headline(evaluation),
        },
    }


def _headline(evaluation: Evaluation) -> dict[str, Any]:
    pairs = evaluation.pairs
    figures = {"accuracy": pairs.agreement.pooled, "accuracy_over_contests": pairs.agreement.macro}
    values: dict[str, Any] = {
        name: {"value": each.value, "interval": [each.interval.low, each.interval.high] if each.interval else None}
        for name, each in figures.items()
    }
    return values | {
        "num_pairs": pairs.coverage.num_scored,
        "num_contests": pairs.agreement.pooled.num_contests,
        "loss": pairs.agreement.outcomes.loss,
        "temperature": pairs.temperature.value,
        "ignored": evaluation.ignored,
        "evaluated_fingerprint": evaluation.target.fingerprint,
        "inputs": {name: table.sha256 for name, table in evaluation.inputs.items()},
    }


def _write_parts(source: Source, partial: Path, console: Console) -> tuple[Golden, RewardModelConfig]:
    """Everything but the card. The golden scores are the trainee's own, so that a fault in writing shows when they are read back."""
    trainee = _load_trainee(source.run, partial)
    config = _write_model(source, trainee, partial)
    _check_evaluated(source, Artifact(partial, config, trainee.base_path if trainee.peft else partial / OWN_BASE, ()))
    torch.backends.cudnn.allow_tf32 = False  # the patch embedding is a convolution: float32 means float32
    model = trainee.model.eval().requires_grad_(False).to(torch.device(resolve_device("auto")))
    pairs = _usable(trainee.encoder, source)
    folder = source.table.parent
    score = lambda groups: [scores.values for scores in score_plain(model, groups)]  # noqa: E731
    golden = make_golden(trainee.encoder, score, choose_inputs(trainee.encoder, pairs, folder), partial)
    write_golden(partial, golden)
    scores = score_captions(model, trainee.encoder, pairs, folder, console)
    if not all(map(math.isfinite, scores)):
        raise ExportRefused(f"{source.run.checkpoint.path}: its scores are not finite")
    distribution = ScoreDistribution(mean=statistics.fmean(scores), std=statistics.stdev(scores))
    return golden, write_config(partial, config.model_copy(update={"score_distribution": distribution}))


def _load_trainee(run: Run, partial: Path) -> Trainee:
    """The trained model in float32, its processor copied to `partial` and found to be the one of the run."""
    exact = run.recipe.model_copy(update={"model": run.recipe.model.model_copy(update={"dtype": "float32"})})
    trainee = make_trainee(exact, partial)
    ours, theirs = (_digests(root / PROCESSOR_NAME) for root in (partial, run.path))
    if different := sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name)):
        raise ExportRefused(f"{trainee.base_path / different[0]}: not the file this run was trained with")
    try:
        load_trained(trainee.model, weights_of(run.checkpoint.path))
    except (OSError, ValueError, SafetensorError) as error:
        raise ExportRefused(f"{run.checkpoint.path}: does not fit the run's recipe ({_reason(error)})") from None
    return trainee


def _write_model(source: Source, trainee: Trainee, partial: Path) -> RewardModelConfig:
    """Head, and adapter or trained base; the configuration names the base that is really there."""
    config = source.config
    save_head(trainee.model.head, partial / HEAD_NAME)
    if trainee.peft is None:
        trainee.model.backbone.save_pretrained(partial / OWN_BASE)
        return config.model_copy(update={"base_model_sha256": base_sha256(partial / OWN_BASE)})
    _save_adapter(trainee.peft, config.base_model_name, partial / ADAPTER_NAME)
    if config.base_model_name == OWN_BASE:
        _copy_base(source.base_path, partial / OWN_BASE)
    return config


def _check_evaluated(source: Source, written: Artifact) -> None:
    """Figures of other weights are not this artifact's."""
    if source.evaluation is None:
        return
    target, found = source.evaluation.target, weights_sha256(written)
    if target.weights_sha256 != found:
        raise ExportRefused(
            f"the evaluation of {target.name} measured other weights than those of {source.run.checkpoint.path}: "
            f"expected sha256 {target.weights_sha256}, found {found}"
        )


def _save_adapter(peft: PeftModel, base_name: str, folder: Path) -> None:
    """PEFT's two files, equal bytes for equal weights: it keeps the layers' names in a set. Its empty model card is left out."""
    config = peft.peft_config["default"]
    config.base_model_name_or_path = base_name
    if not isinstance(config.target_modules, str):
        config.target_modules = sorted(config.target_modules)
    peft.save_pretrained(str(folder), save_embedding_layers=False)  # else it looks for a vocabulary that never changed
    (folder / "README.md").unlink(missing_ok=True)


def _copy_base(base_path: Path, target: Path) -> None:
    target.mkdir()
    for path in sorted({path for pattern in _BASE_FILES for path in base_path.glob(pattern)}):
        shutil.copyfile(path, target / path.name)


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in folder.glob("*") if path.is_file()}


def _usable(encoder: Encoder, source: Source) -> list[Pair]:
    """The drawn pairs that the model takes whole. Raises DataInvalid for a table of another kind than the model's."""
    if not encoder.takes_images and any(pair.image for pair in source.pairs):
        raise DataInvalid(f"{source.table}: has pictures, and {source.run.recipe.model.base} is a text-only base")
    allowed = (None, encoder.config.default_prompt)
    strange = [pair.pair_id for pair in source.pairs if pair.prompt not in allowed] if encoder.config.prompt_policy == "fixed" else []
    if strange:
        raise DataInvalid(f"{source.table}, pair {strange[0]}: has a prompt, and model.prompt_policy is fixed")
    fitting = leave_out_unfit(encoder, source.pairs, source.table.parent, None)
    if not fitting.pairs:
        raise DataInvalid(f"{source.table}: no pair fits the model: {dict(fitting.left_out)}")
    return fitting.pairs


def score_captions(model: RewardModel, encoder: Encoder, pairs: Sequence[Pair], folder: Path, console: Console) -> list[float]:
    """The score of every distinct caption of the pairs, through the forward that serves."""
    together: dict[tuple[str | None, str | None], dict[str, None]] = {}
    for pair in pairs:
        together.setdefault((pair.image, pair.prompt), {}).update({pair.chosen: None, pair.rejected: None})
    scores: list[float] = []
    for (image, prompt), captions in track(together.items(), "scoring captions", console=console, transient=True):
        pixels = None if image is None else read_image(encoder, folder / image)
        for start in range(0, len(captions), _CAPTIONS_AT_ONCE):
            group, _ = encoder.encode(Group(tuple(captions)[start : start + _CAPTIONS_AT_ONCE], prompt, pixels))
            scores += score_shared(model, [group])[0].values if group else ()
    return scores


@contextmanager
def _writing(out: Path) -> Iterator[Path]:
    """A hidden folder beside the target, removed whatever happens; the block renames it when it is done."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
    except (OSError, SafetensorError, torch.OutOfMemoryError) as error:
        raise ExportFailed(f"{out}: could not be written ({_reason(error)}); nothing of it was kept") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _summary(out: Path, source: Source, golden: Golden, proof: Proof) -> Table:
    table = Table("", title=escape(f"exported to {out}"), show_header=False)
    table.add_column(overflow="fold")
    num_bytes = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    table.add_row("step", str(source.run.checkpoint.step))
    table.add_row("golden scores", str(sum(len(item.scores) for item in golden.items)))
    for name, difference in proof.differences.items():
        table.add_row(f"  largest difference, {name}", f"{difference:.2e}")
    table.add_row("temperature", _temperature(source))
    table.add_row("bytes", f"{num_bytes:,}")
    table.add_row(f"fingerprint, {proof.dtype} on {proof.device}", proof.fingerprint)
    return table


def _temperature(source: Source) -> str:
    if source.evaluation is None:
        return "not calibrated: no evaluation"
    fitted = source.evaluation.pairs.temperature
    return f"not calibrated: {fitted.refused}" if fitted.value is None else f"{fitted.value:.4g}"


def _check_repo(repo: str) -> None:
    if not _REPO.fullmatch(repo):
        raise ExportRefused(f"{repo}: not the name of a Hub repository, which is owner/name")


def _reason(error: BaseException) -> str:
    """The operating system's own words when there are any."""
    return error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = str(error).splitlines()
    return lines[0][:200] if lines else type(error).__name__


if __name__ == "__main__":
    app()
