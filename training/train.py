"""`python -m training.train RECIPE --data DIR --out RUN`, also under `accelerate launch`: from pairs to checkpoints."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer
from accelerate import Accelerator, DistributedDataParallelKwargs
from accelerate.utils import ProjectConfiguration, set_seed
from pydantic import ValidationError
from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from app.artifacts import base_sha256, file_sha256
from app.errors import PunchlineError
from training.batches import StepPlan, draw
from training.checkpoints import Checkpoints
from training.collation import Collator, Fitting, leave_out_unfit
from training.loop import Course, Training, TrainingFailed
from training.pairs import DataInvalid, Pair, read_pairs
from training.recipe import Recipe, RecipeInvalid, load_recipe
from training.tracking import TRACKER_FOLDER, Tracker, choose_trackers
from training.trainee import Trainee, make_trainee

RUN_NAME = "run.json"
TRAIN_TABLE = "pairs_train.parquet"
VALIDATION_TABLE = "pairs_validation.parquet"
_LIBRARIES = ("torch", "transformers", "peft", "accelerate", "tokenizers", "pillow")
_VALIDATION_BUNDLE = 4  # validation pairs of one image that share a forward

app = typer.Typer(add_completion=False)


@app.command()
def main(
    recipe: Annotated[
        str, typer.Argument(help="A recipe file, or the name of one in the package: humor_20k, hh_rlhf_7b, newyorker_text, demo.")
    ],
    data: Annotated[Path, typer.Option(help="A folder written by training.prepare.")],
    out: Annotated[Path, typer.Option(help="The run's folder: checkpoints, metrics, logs.")],
    resume: Annotated[bool, typer.Option(help="Go on from the newest whole checkpoint, or begin if there is none.")] = False,
    changes: Annotated[list[str] | None, typer.Option("--set", help="Change a value: optimiser.learning_rate=1e-4. Repeatable.")] = None,
    trackers: Annotated[str, typer.Option(help="auto (TensorBoard, and W&B where installed), none, or names.")] = "auto",
) -> None:
    """Train LoRA and a head on preference pairs."""
    logging.basicConfig(format="%(name)s: %(message)s")
    console = Console(stderr=True)
    try:
        train(load_recipe(recipe, changes or ()), data, out, resume=resume, trackers=choose_trackers(trackers), console=console)
    except PunchlineError as error:
        code, reason = getattr(error, "exit_code", 3), str(error)
    except OSError as error:  # a full disk, a file where a folder should be
        code, reason = TrainingFailed.exit_code, f"{error.filename or out}: {error.strerror or type(error).__name__}"
    else:
        return
    console.print(f"refused: {reason}", soft_wrap=True, highlight=False, markup=False)
    raise typer.Exit(code) from None


def train(recipe: Recipe, data: Path, run: Path, *, resume: bool, trackers: Sequence[str], console: Console) -> None:
    """The whole run. Raises RecipeInvalid, DataInvalid, ArtifactInvalid before the first step, TrainingFailed or CheckpointFailed later."""
    _quiet()
    refuse_other_run(run, recipe, resume=resume)
    tables = {name: data / name for name in (TRAIN_TABLE, VALIDATION_TABLE) if (data / name).exists() or name == TRAIN_TABLE}
    rows = {name: read_pairs(path) for name, path in tables.items()}
    accelerator = make_accelerator(recipe, run, trackers, some_without_picture=any(pair.image is None for pair in rows[TRAIN_TABLE]))
    if not accelerator.is_main_process:
        console = Console(quiet=True)
    set_seed(recipe.run.seed)
    with accelerator.main_process_first():
        trainee = make_trainee(recipe, run)
    chosen = {name: choose_pairs(recipe, trainee, path, rows[name], console) for name, path in tables.items()}
    if VALIDATION_TABLE not in chosen:
        console.print(f"no {VALIDATION_TABLE}: nothing is validated during training", highlight=False)
    course = make_course(recipe, trainee, data, chosen, accelerator.num_processes)
    training = Training(recipe, trainee, course, accelerator, run)
    set_seed(recipe.run.seed, device_specific=True)  # dropout differs from device to device
    description = describe_run(recipe, trainee, tables, chosen, accelerator) | {"left_out_each_epoch": course.num_left_out}
    first_step = enter_run(run, description, training, accelerator)
    accelerator.init_trackers("punchline", config=flatten(recipe.model_dump(mode="json")))
    with Tracker(accelerator, run, first_step=first_step, num_steps=training.num_steps, console=console) as tracker:
        training.fit(first_step, tracker)
    console.print(f"{training.num_steps} steps done; checkpoints in {run / 'checkpoints'}", soft_wrap=True, highlight=False)


def make_accelerator(recipe: Recipe, run: Path, trackers: Sequence[str], *, some_without_picture: bool) -> Accelerator:
    """Devices as `accelerate launch` gave them; alone, the first GPU or the CPU."""
    run.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(
        mixed_precision=recipe.run.mixed_precision,
        gradient_accumulation_steps=recipe.run.num_accumulated,
        log_with=list(trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(run), logging_dir=str(run / TRACKER_FOLDER)),
        # the adapter of a vision tower has no gradient in a batch without pictures
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=some_without_picture)],
    )
    if accelerator.gradient_accumulation_steps != recipe.run.num_accumulated:
        raise RecipeInvalid("ACCELERATE_GRADIENT_ACCUMULATION_STEPS is set and differs from run.num_accumulated; unset it")
    if accelerator.distributed_type == "FSDP":
        refuse_unsharded(recipe, is_fsdp2=accelerator.is_fsdp2)
    return accelerator


def refuse_unsharded(recipe: Recipe, *, is_fsdp2: bool) -> None:
    """What FSDP would do wrongly in silence, or refuse in words of its own. Raises RecipeInvalid."""
    if not is_fsdp2:
        raise RecipeInvalid("FSDP version 1 clips the gradients of each shard by itself; launch with --fsdp_version 2")
    if recipe.regularisation.averaging:
        raise RecipeInvalid("regularisation.averaging keeps whole weights on every device; leave it out under FSDP")
    if recipe.model.dtype != "float32":
        raise RecipeInvalid("FSDP shards weights of one format only: set model.dtype to float32 (run.mixed_precision may be bf16)")


@dataclass(frozen=True)
class Chosen:
    """The pairs of one table that are used, and what became of the others."""

    pairs: list[Pair]
    num_in_table: int
    num_drawn: int
    fitting: Fitting

    def as_dict(self) -> dict[str, Any]:
        left_out = dict(sorted(self.fitting.left_out.items()))
        return {"in_table": self.num_in_table, "drawn": self.num_drawn, "used": len(self.pairs), "left_out": left_out} | {
            "contests": len({pair.contest for pair in self.pairs}),
            "with_cut_prompt": self.fitting.num_cut_prompts,
        }


def choose_pairs(recipe: Recipe, trainee: Trainee, path: Path, table: Sequence[Pair], console: Console) -> Chosen:
    """Draw the recipe's number of pairs across the table, then leave out those that do not fit the model. Raises DataInvalid."""
    wanted = recipe.data.max_pairs if path.name == TRAIN_TABLE else recipe.data.max_validation_pairs
    drawn = [table[index] for index in draw(len(table), wanted, f"{recipe.run.seed} {path.name}")]
    refuse_wrong_sort(recipe, trainee, path, drawn)
    fitting = leave_out_unfit(trainee.encoder, drawn, path.parent, recipe.data.max_tokens)
    chosen = Chosen(fitting.pairs, len(table), len(drawn), fitting)
    console.print(f"{path.name}: {chosen.as_dict()}", soft_wrap=True, highlight=False)
    if not fitting.pairs:
        raise DataInvalid(f"{path}: no pair fits the model: {dict(fitting.left_out)}")
    return chosen


def refuse_wrong_sort(recipe: Recipe, trainee: Trainee, path: Path, pairs: Sequence[Pair]) -> None:
    """Pairs the recipe cannot train on, or that the server would never be asked. Raises DataInvalid naming the first."""
    model = recipe.model
    for pair in pairs:
        if pair.image is not None and not trainee.encoder.takes_images:
            raise DataInvalid(f"{path}: pair {pair.pair_id} has pictures, and {model.base} is a text-only base")
        if model.prompt_policy == "fixed" and pair.prompt not in (None, model.default_prompt):
            raise DataInvalid(f"{path}: pair {pair.pair_id} has a prompt of its own, and model.prompt_policy is fixed")
        if recipe.loss.margin_per_gap and pair.mean_gap is None and path.name == TRAIN_TABLE:
            raise DataInvalid(f"{path}: pair {pair.pair_id} has no gap of the crowd's means, which loss.margin_per_gap needs")


def make_course(recipe: Recipe, trainee: Trainee, data: Path, chosen: dict[str, Chosen], num_processes: int) -> Course:
    """Plan every step. Raises DataInvalid when the pairs make no whole one, RecipeInvalid when the run ends while it warms up."""
    pairs = chosen[TRAIN_TABLE].pairs
    plan = StepPlan(
        keys=[key_of(pair) for pair in pairs],
        pairs_per_image=recipe.data.pairs_per_image,
        batch_size=recipe.run.batch_size,
        num_accumulated=recipe.run.num_accumulated,
        num_processes=num_processes,
        seed=recipe.run.seed,
    )
    if plan.steps_per_epoch == 0:
        raise DataInvalid(f"{data / TRAIN_TABLE}: {len(pairs)} pairs are fewer than the {plan.pairs_per_step} of one step")
    num_steps = recipe.run.max_steps or recipe.run.num_epochs * plan.steps_per_epoch
    if recipe.optimiser.num_warmup_steps >= num_steps:
        raise RecipeInvalid(f"optimiser.num_warmup_steps {recipe.optimiser.num_warmup_steps}: the run has only {num_steps} steps")
    held_out = chosen.get(VALIDATION_TABLE)
    if held_out is None:
        return Course(Collator(trainee.encoder, pairs, data), plan, num_steps, None, ())
    validation = Collator(trainee.encoder, held_out.pairs, data)
    batches = in_batches(held_out.pairs, recipe.run.batch_size)
    return Course(Collator(trainee.encoder, pairs, data), plan, num_steps, validation, batches)


def key_of(pair: Pair) -> tuple[str, str, str]:
    """What the pairs of a bundle have in common: they share a prefix, and their contest."""
    return pair.contest, pair.image or "", pair.prompt or ""


def in_batches(pairs: Sequence[Pair], batch_size: int) -> list[tuple[int, ...]]:
    """Every index once, pairs of one image side by side, the last batch as short as it comes."""
    order = sorted(range(len(pairs)), key=lambda index: key_of(pairs[index]))
    size = max(batch_size, _VALIDATION_BUNDLE)
    return [tuple(order[start : start + size]) for start in range(0, len(order), size)]


def describe_run(
    recipe: Recipe, trainee: Trainee, tables: dict[str, Path], chosen: dict[str, Chosen], accelerator: Accelerator
) -> dict[str, Any]:
    """What decides the run's outcome, for the run's folder and for the artifact."""
    return {
        "schema_version": 1,
        "recipe": recipe.model_dump(mode="json"),
        "base_sha256": base_sha256(trainee.base_path),
        "data": {name: {"sha256": file_sha256(path)} | chosen[name].as_dict() for name, path in tables.items()},
        "versions": {name: version(name) for name in _LIBRARIES},
        "devices": {"type": accelerator.device.type, "num_processes": accelerator.num_processes},
    }


def refuse_other_run(run: Path, recipe: Recipe, *, resume: bool) -> None:
    """Before anything is written: a folder that holds a run is only entered to go on with it. Raises TrainingFailed."""
    path = run / RUN_NAME
    if not path.exists():
        if Checkpoints(run / "checkpoints", 1).all():
            raise TrainingFailed(f"{run}: holds checkpoints and no {RUN_NAME} that says of what run; begin in another folder")
        return
    if not resume:
        raise TrainingFailed(f"{run}: holds a run already; --resume goes on with it")
    refuse_changes(path, {"recipe": recipe.model_dump(mode="json")})


def refuse_changes(path: Path, description: dict[str, Any]) -> None:
    """Raises TrainingFailed when the run's file says otherwise, or cannot be read."""
    try:
        found = dict(json.loads(path.read_bytes()))
    except (OSError, ValueError, TypeError) as error:
        raise TrainingFailed(f"{path}: cannot be read ({type(error).__name__})") from None
    found["recipe"] = with_newer_keys(found.get("recipe"))
    if different := sorted(key for key in description if found.get(key) != description[key]):
        raise TrainingFailed(f"{path}: another run: {', '.join(different)} changed since it began")


def with_newer_keys(recipe: Any) -> Any:
    """A recipe on disk with the keys that came after it at their defaults; what is no recipe stays what it is."""
    try:
        return Recipe.model_validate_json(json.dumps(recipe)).model_dump(mode="json")
    except ValidationError:
        return recipe


def enter_run(run: Path, description: dict[str, Any], training: Training, accelerator: Accelerator) -> int:
    """How many steps are done already: 0 for a new run. Raises TrainingFailed for another run than this."""
    path = run / RUN_NAME
    if path.exists():
        refuse_changes(path, description)
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        training.checkpoints.clear_partial()
        write_whole(path, json.dumps(description, indent=2, ensure_ascii=False) + "\n")
    checkpoint = training.checkpoints.newest()
    if checkpoint is None:
        return 0
    training.resume(checkpoint)
    return checkpoint.step


def write_whole(path: Path, text: str) -> None:
    """Replace a file in one step: a reader never sees half of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)


def flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as `section.key`, in the plain types trackers take."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict):
            flat |= flatten(value, f"{name}.")
        else:
            flat[name] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


def _quiet() -> None:
    disable_progress_bar()  # transformers' own would tear ours
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)  # peft 0.21 asks transformers so


if __name__ == "__main__":
    app()
