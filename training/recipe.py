"""The recipe of a training run: one TOML file, every value checked, unknown keys refused. Knows neither torch nor data."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from app.artifacts import DEFAULT_PROMPT, TEMPLATE, HeadSpec, ImageRecipe
from app.errors import StartRefused

RECIPES = Path(__file__).parent / "recipes"
_Decay = Annotated[float, Field(ge=0, lt=1)]


class RecipeInvalid(StartRefused):
    """The recipe has a value that is unknown, missing, out of range or in conflict with another."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


def _with_both_slots(template: str) -> str:
    if template.count("{prompt}") != 1 or template.count("{caption}") != 1:
        raise ValueError("template must contain {prompt} and {caption} once each")
    return template


class Model(_Strict):
    """The base, and how a caption becomes what it reads; the artifact says the same."""

    base: str = Field(description="Hub id or directory of the base model, its tokenizer and image processor.")
    revision: str | None = Field(None, description="Commit of a Hub base; a branch may move.")
    dtype: Literal["float32", "bfloat16"] = Field("bfloat16", description="Format of the frozen weights; without LoRA use float32.")
    template: Annotated[str, AfterValidator(_with_both_slots)] = TEMPLATE
    default_prompt: str = DEFAULT_PROMPT
    prompt_policy: Literal["request", "fixed"] = "request"
    caption_role: Literal["user", "raw"] = "user"
    max_prompt_tokens: int = Field(160, ge=1)
    max_caption_tokens: int = Field(80, ge=1)
    image: ImageRecipe = ImageRecipe()


class Lora(_Strict):
    """A low-rank adapter (Hu et al. 2021, arXiv 2106.09685) on the linear layers."""

    r: int = Field(ge=1)
    alpha: float = Field(gt=0)
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | tuple[str, ...] = Field(
        "all-linear", description="Layer names as PEFT takes them; all-linear includes the vision tower."
    )


class Data(_Strict):
    """Which pairs, and how those of one image come together."""

    max_pairs: int | None = Field(None, ge=1, description="At most this many training pairs, drawn across contests.")
    max_validation_pairs: int | None = Field(1000, ge=1, description="The same for the pairs measured during training.")
    pairs_per_image: int = Field(1, ge=1, description="So many pairs of one image and prompt go into a batch together and share them.")
    max_tokens: int | None = Field(
        None, ge=8, description="Pairs with a longer chat are left out and counted, as those whose caption is over budget always are."
    )


class Loss(_Strict):
    """`-log sigmoid(chosen - rejected - margin_per_gap * gap) + centring * mean((chosen + rejected)^2)`."""

    centring: float = Field(0.0, ge=0, description="Weight of the pull of scores towards 0 (Eisenstein et al. 2023, arXiv 2312.09244).")
    margin_per_gap: float = Field(
        0.0, ge=0, description="Margin asked per unit of the crowd's gap (Touvron et al. 2023, arXiv 2307.09288)."
    )


class Regularisation(_Strict):
    """What keeps a model trained from nothing, or on few contests, from learning its captions by heart."""

    token_dropout: float = Field(0.0, ge=0, lt=1, description="Share of text tokens whose embedding is set to zero in training.")
    embedding_dropout: float = Field(0.0, ge=0, lt=1, description="Dropout on the embeddings of text tokens.")
    averaging: float = Field(
        0.0, ge=0, lt=1, description="Decay of the moving average of the trained weights, which is validated and exported; 0: none."
    )


class Optimiser(_Strict):
    """AdamW (Loshchilov and Hutter 2019, arXiv 1711.05101) and its schedule, counted in optimiser steps."""

    learning_rate: float = Field(gt=0)
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    num_warmup_steps: int = Field(0, ge=0)
    final_share: float = Field(0.0, ge=0, le=1, description="Share of the peak rate that cosine and linear end at.")
    weight_decay: float = Field(0.0, ge=0)
    betas: tuple[_Decay, _Decay] = (0.9, 0.999)
    eps: float = Field(1e-8, gt=0)
    max_grad_norm: float = Field(1.0, gt=0)

    @model_validator(mode="after")
    def _ends_as_its_schedule_can(self) -> Self:
        if self.schedule == "constant" and self.final_share:
            raise ValueError("final_share has no meaning in a constant schedule")
        return self


class Run(_Strict):
    """Length, batches, precision, and what is kept."""

    seed: int = Field(ge=0, lt=1 << 32)
    num_epochs: int = Field(1, ge=1)
    max_steps: int | None = Field(None, ge=1, description="Stop after so many steps, however many epochs that is.")
    batch_size: int = Field(ge=1, description="Pairs in one forward on one device.")
    num_accumulated: int = Field(1, ge=1, description="Forwards whose gradients are summed into one step.")
    mixed_precision: Literal["no", "bf16"] = "no"
    gradient_checkpointing: bool = False
    save_every: int = Field(50, ge=1, description="Steps between checkpoints; the last step is always kept.")
    max_checkpoints: int = Field(3, ge=1)
    validate_every: int = Field(50, ge=1)


class Recipe(_Strict):
    """Everything that shapes a run except where data and output lie. Without `lora` every weight of the base is trained."""

    model: Model
    head: HeadSpec = HeadSpec()
    lora: Lora | None = None
    data: Data = Data()
    loss: Loss = Loss()
    regularisation: Regularisation = Regularisation()
    optimiser: Optimiser
    run: Run

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.run.batch_size % self.data.pairs_per_image:
            raise ValueError(f"run.batch_size {self.run.batch_size} is not a multiple of data.pairs_per_image {self.data.pairs_per_image}")
        if self.lora is None and self.model.dtype != "float32":
            raise ValueError("without lora the base itself is trained, and needs model.dtype float32 (run.mixed_precision may be bf16)")
        return self


def load_recipe(name: str, changes: Sequence[str] = ()) -> Recipe:
    """A recipe file, or one of the package by its bare name; `changes` are `section.key=value`, the value as in TOML.

    Raises RecipeInvalid with one line that names the file and every value at fault.
    """
    path = Path(name) if name.endswith(".toml") else RECIPES / f"{name}.toml"
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        known = ", ".join(sorted(each.stem for each in RECIPES.glob("*.toml")))
        raise RecipeInvalid(f"{path}: cannot be read ({error.strerror}); the package has {known}") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeInvalid(f"{path}: {error}") from None
    for change in changes:
        _apply(values, change)
    try:
        return Recipe.model_validate_json(json.dumps(values, default=str))
    except ValidationError as error:
        raise RecipeInvalid(f"{path}: {'; '.join(map(_fault, error.errors(include_url=False)))}") from None


def _apply(values: dict[str, Any], change: str) -> None:
    """`optimiser.learning_rate=1e-4` into the nested dictionary."""
    name, equals, text = change.partition("=")
    *sections, key = name.strip().split(".")
    if not equals or not key or not all(sections):
        raise RecipeInvalid(f"--set {change}: expected section.key=value")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        raise RecipeInvalid(f"--set {change}: {text.strip()!r} is no TOML value; text needs quotes") from None
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise RecipeInvalid(f"--set {change}: {section} is no section")
    values[key] = value


def _fault(item: Any) -> str:
    where = ".".join(map(str, item["loc"]))
    text = item["msg"].removeprefix("Value error, ")
    return f"{where}: {text}" if where else text
