"""Kinds of reward models on disk: where each keeps base, adapter, head and tokenizer, and how a published folder is told apart.

Looks at the names of files and at JSON, never at the name of a model. What a published folder does not say is named as assumed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from safetensors import safe_open

from app.errors import ArtifactInvalid

Kind: TypeAlias = Literal["lora_head", "full_head", "seq_cls_adapter", "seq_cls", "value_head"]
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
VALUE_HEAD_NAME = "value_head.safetensors"
HERE = "."  # the artifact's own folder
_MAX_ASSUMED_TOKENS = 8192  # of a caption with all before it, where nothing says what the model was trained on
_TOKENIZER_NAMES = ("tokenizer.json", "tokenizer_config.json")
_PROCESSOR_NAMES = {
    *_TOKENIZER_NAMES, "vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json",
    "chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """What `base_model_name` must be where the weights are the artifact's own."""

    pattern: str
    shown: str

    def fullmatch(self, name: str) -> bool:
        return re.fullmatch(self.pattern, name) is not None


@dataclass(frozen=True, slots=True)
class KindLayout:
    """Where the parts of one kind lie, relative to the artifact."""

    said: str
    base: Place | None  # None: the base lies elsewhere and has an adapter
    adapter: str | None
    processor: str
    head: str | None  # its file; None: in reward_head.safetensors or .pt
    head_prefix: str = ""  # of the head's tensors in that file; `score.weight` in the base's own shards for seq_cls

    @property
    def is_published_as_is(self) -> bool:
        """Whether everything lies in one folder, as its makers wrote it."""
        return self.processor == HERE


_OWN_FOLDER = Place(r"\./[A-Za-z0-9][A-Za-z0-9._-]*", "./folder")
_OWN = Place(r"\.", HERE)
LAYOUTS: Mapping[Kind, KindLayout] = {
    "lora_head": KindLayout("an adapter on a base, with a head beside it (humor-r1)", None, "backbone_adapter", "processor", None),
    "full_head": KindLayout("a base trained whole, a folder of the artifact, with a head beside it", _OWN_FOLDER, None, "processor", None),
    "seq_cls_adapter": KindLayout(
        "a SEQ_CLS adapter of peft on a base, the head among its tensors", None, HERE, HERE, ADAPTER_WEIGHTS_NAME, "base_model.model.score."
    ),
    "seq_cls": KindLayout("a whole sequence-classification checkpoint with one label", _OWN, None, HERE, None, "score."),
    "value_head": KindLayout("a whole checkpoint with a value head beside it", _OWN, None, HERE, VALUE_HEAD_NAME, "v_head.summary."),
}
PUBLISHED_AS_IS = frozenset(kind for kind, layout in LAYOUTS.items() if layout.is_published_as_is)


def published_config(root: Path, said: Mapping[str, Any]) -> dict[str, Any]:
    """What a published folder without a configuration of ours says, as one; `said`: what somebody knows of it beside.

    Raises ArtifactInvalid for what is no reward model, and for an adapter of which nobody says how its texts were written.
    """
    kind = kind_of(root)
    base = HERE
    if kind == "seq_cls_adapter":
        base = _json(root / ADAPTER_CONFIG_NAME).get("base_model_name_or_path") or ""
        if missing := sorted({"caption_role", "max_tokens"} - said.keys()):
            raise ArtifactInvalid(
                f"{root}: a SEQ_CLS adapter on {base!r}; nothing in it says how texts were written in training: say so once, with "
                f"punchline convert, {' and '.join(f'--{name}'.replace('_', '-') for name in missing)}"
            )
    recipe = chat_recipe(root)
    if said.get("caption_role") == "raw":
        recipe["template"] = "{prompt}{caption}"
    return {"kind": kind, "base_model_name": base} | head_facts(root, kind) | recipe | dict(said)


def head_facts(root: Path, kind: Kind) -> dict[str, Any]:
    """Shape and bias of the linear head of a published folder, from the names of its tensors. Raises ArtifactInvalid."""
    layout = LAYOUTS[kind]
    shapes = {}
    for path in [root / layout.head] if layout.head else sorted(root.glob("*.safetensors")):
        for name, shape in tensor_shapes(path).items():
            if name.startswith(layout.head_prefix):
                shapes[name.removeprefix(layout.head_prefix)] = shape
    if "weight" not in shapes:
        raise ArtifactInvalid(f"{root}: no {layout.head_prefix}weight among its tensors; a reward model without its head scores noise")
    return {"score_head_shape": tuple(shapes["weight"]), "head": {"bias": "bias" in shapes}}


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Names and shapes in a safetensors file, from its head alone. Raises ArtifactInvalid for one that cannot be read."""
    try:
        with safe_open(path, framework="np") as stream:
            return {name: list(stream.get_slice(name).get_shape()) for name in stream.keys()}  # noqa: SIM118 (no mapping)
    except Exception as error:  # safetensors raises its own and Rust's
        raise ArtifactInvalid(f"{path}: cannot be read ({type(error).__name__})") from None


def chat_recipe(root: Path) -> dict[str, Any]:
    """What published checkpoints mean as long as nobody says otherwise: the answer is the assistant's turn of the chat template."""
    config = _json(root / "config.json") if (root / "config.json").is_file() else {}
    text = config.get("text_config", config)
    longest = text.get("max_position_embeddings", _MAX_ASSUMED_TOKENS) if isinstance(text, dict) else _MAX_ASSUMED_TOKENS
    number = config.get("dtype", config.get("torch_dtype"))
    return {
        "caption_role": "assistant",
        "template": "{prompt}",
        "default_prompt": None,
        "max_prompt_tokens": None,
        "max_caption_tokens": None,
        "max_tokens": min(longest, _MAX_ASSUMED_TOKENS) if isinstance(longest, int) else _MAX_ASSUMED_TOKENS,
        "image": {"long_edge": None, "alpha": "white"},  # as qwen_vl_utils loads pictures, with which their cards do
        "dtype": number if number in ("float32", "bfloat16") else "bfloat16",
    }


def kind_of(root: Path) -> Kind:
    """The kind of a published folder, by its files. Raises ArtifactInvalid, saying what it is instead."""
    if (root / ADAPTER_CONFIG_NAME).is_file():
        task = _json(root / ADAPTER_CONFIG_NAME).get("task_type")
        if task != "SEQ_CLS" and (root / VALUE_HEAD_NAME).is_file():
            raise ArtifactInvalid(
                f"{root}: an adapter for the task {task!r} with a value head beside it; merge it into its base, then it is served"
            )
        if task != "SEQ_CLS":
            raise ArtifactInvalid(f"{root}: an adapter for the task {task!r}, which has no reward head; expected SEQ_CLS")
        return "seq_cls_adapter"
    if not (root / "config.json").is_file():
        raise ArtifactInvalid(f"{root}: no reward model: neither reward_model_config.json nor the files of a published one")
    if (root / VALUE_HEAD_NAME).is_file():
        return "value_head"
    made = _json(root / "config.json").get("architectures") or []
    if any(str(name).endswith("ForSequenceClassification") for name in made):
        return "seq_cls"
    raise ArtifactInvalid(f"{root}: {', '.join(map(str, made)) or 'a base model'} without a reward head; its scores would be noise")


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder has a tokenizer of its own."""
    return any((folder / name).is_file() for name in _TOKENIZER_NAMES)


def processor_files(folder: Path) -> list[Path]:
    """Those of tokenizer, chat template and image processor, among others."""
    return sorted(path for path in folder.iterdir() if path.name in _PROCESSOR_NAMES and path.is_file())


def _json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise ArtifactInvalid(f"{path}: cannot be read ({type(error).__name__})") from None
    if not isinstance(value, dict):
        raise ArtifactInvalid(f"{path}: expected an object, found {type(value).__name__}")
    return value
