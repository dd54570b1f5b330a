"""`python -m training.scratch BASE.toml --captions TABLE --out DIR`: a small text-only base from nothing, as the Hub ships one.

A tokenizer learned from the captions, a chat template, random weights in the shapes of the file. Knows no preferences.
"""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Annotated

import torch
import typer
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from rich.console import Console
from transformers import Qwen2Config, Qwen2Model
from transformers.utils.logging import disable_progress_bar

from app.artifacts import DEFAULT_PROMPT, TEMPLATE
from training.demo.tokenizer import CHAT_TEMPLATE, train_tokenizer
from training.pairs import DataInvalid, read_captions
from training.recipe import RecipeInvalid

BASES = Path(__file__).parent / "bases"


class TextBase(BaseModel):
    """Shapes of a Qwen2 decoder, its tokenizer, and the seed of its weights."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    seed: int = Field(ge=0)
    vocab_size: int = Field(ge=300)
    hidden_size: int = Field(ge=8)
    intermediate_size: int = Field(ge=8)
    num_hidden_layers: int = Field(ge=1)
    num_attention_heads: int = Field(ge=1)
    num_key_value_heads: int = Field(ge=1)
    attention_dropout: float = Field(0.0, ge=0, lt=1)
    initializer_range: float = Field(0.02, gt=0)
    max_position_embeddings: int = Field(1024, ge=64)


def main(
    base: Annotated[Path, typer.Argument(help="The file with the shapes.")],
    captions: Annotated[Path, typer.Option(help="captions_train.parquet of training.prepare: the tokenizer learns from them.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
) -> None:
    """Write a base with random weights and a tokenizer of its own."""
    disable_progress_bar()
    console = Console(stderr=True)
    try:
        model = write_base(read_base(base), [row.caption for row in read_captions(captions)], out)
    except (RecipeInvalid, DataInvalid) as error:
        console.print(f"refused: {error}", soft_wrap=True, highlight=False, markup=False)  # a path may hold brackets
        raise typer.Exit(3) from None
    console.print(f"{out}: {sum(parameter.numel() for parameter in model.parameters()):,} parameters")


def read_base(path: Path) -> TextBase:
    """Raises RecipeInvalid naming every value at fault."""
    try:
        return TextBase.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise RecipeInvalid(f"{path}: {error}") from None
    except ValidationError as error:
        faults = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_url=False))
        raise RecipeInvalid(f"{path}: {faults}") from None


def write_base(base: TextBase, captions: list[str], out: Path) -> Qwen2Model:
    """Tokenizer and weights into a new folder. Raises RecipeInvalid when it exists."""
    if out.exists():
        raise RecipeInvalid(f"{out}: exists already")
    frame = TEMPLATE.format(prompt=DEFAULT_PROMPT, caption="") + CHAT_TEMPLATE
    tokenizer = train_tokenizer([*captions, *[frame] * (len(captions) // 100 + 1)], base.vocab_size)
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    tokenizer.save_pretrained(partial)
    torch.manual_seed(base.seed)
    shapes = base.model_dump(exclude={"seed", "vocab_size"})
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    model = Qwen2Model(Qwen2Config(vocab_size=len(tokenizer), tie_word_embeddings=True, use_sliding_window=False, **shapes, **ids))
    model.save_pretrained(partial)
    partial.rename(out)
    return model


if __name__ == "__main__":
    typer.run(main)
