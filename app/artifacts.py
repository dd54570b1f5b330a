"""The reward model on disk: its layout, its configuration, its hashes. Reads and writes; loads no weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from app.errors import ArtifactInvalid
from app.layouts import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    HERE,
    LAYOUTS,
    Kind,
    KindLayout,
    chat_recipe,
    holds_tokenizer,
    processor_files,
    published_config,
)

CONFIG_NAME = "reward_model_config.json"
HEAD_NAME = "reward_head.safetensors"
PICKLED_HEAD_NAME = "reward_head.pt"
ADAPTER_NAME = "backbone_adapter"
PROCESSOR_NAME = "processor"
GOLDEN_NAME = "golden.json"
DEMO_PATH = Path(__file__).parent / "demo"
BUNDLED = {"demo": DEMO_PATH, "newyorker": DEMO_PATH.with_name("newyorker")}
TEMPLATE = "{prompt}\n\nCandidate caption: {caption}\n\nJudge how funny this caption is for the cartoon."
DEFAULT_PROMPT = "Write a funny one-line caption for this New Yorker-style cartoon."
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_SHOWN = 60  # characters of a wrong value in an error
_Model = TypeVar("_Model", bound=BaseModel)
_NOT_SCORING = {"files", "training", "description", "score_distribution"} | {  # the base itself is in the fingerprint
    "base_model_name",
    "base_model_revision",
    "base_model_sha256",
}
_RECIPE = {
    "template", "default_prompt", "prompt_policy", "caption_role", "max_prompt_tokens", "max_caption_tokens", "max_tokens",
    "image", "pooling",
}  # fmt: skip
_LATER = ("head", "max_tokens")  # keys that configurations did not always have; image.alpha is another
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".pt2"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ImageRecipe(_Strict):
    """How a picture is made ready for the image processor, in training and serving alike."""

    long_edge: int | None = Field(448, ge=28, description="Larger pictures are shrunk to this long edge; null: native size.")
    resample: Literal["lanczos", "bicubic", "bilinear"] = "lanczos"
    exif_transpose: bool = False
    alpha: Literal["drop", "white"] = Field("drop", description="Of an RGBA picture: left out, or laid on white as qwen_vl_utils does.")


class Calibration(_Strict):
    """P(a preferred to b) = sigmoid(margin / temperature)."""

    temperature: float = Field(1.0, gt=0)


class HeadSpec(_Strict):
    """How the last hidden state becomes the score; what a linear head without bias does not need is left at its default.

    two_layer is Linear(hidden, width), activation, Linear(width, 1), with SiLU the head of BaseReward (arXiv 2509.16127).
    """

    layers: Literal["linear", "two_layer"] = "linear"
    bias: bool = Field(False, description="In every layer. The last one's moves all scores alike, and no win probability.")
    width: int | None = Field(None, ge=1, description="Values between the two layers; two_layer only, and required there.")
    activation: Literal["silu", "gelu", "relu", "tanh"] = Field("silu", description="Between the two layers; gelu is the exact one.")

    @model_validator(mode="after")
    def _fits_its_layers(self) -> Self:
        if self.layers == "two_layer" and self.width is None:
            raise ValueError("a two_layer head needs its width")
        if self.layers == "linear" and (self.width is not None or self.activation != "silu"):
            raise ValueError("a linear head has neither width nor activation")
        return self


class ScoreDistribution(_Strict):
    mean: float
    std: float = Field(ge=0)


class RewardModelConfig(_Strict):
    """`reward_model_config.json`. The two required keys are the published humor-r1 layout; the rest defaults to its recipe."""

    base_model_name: str = Field(description="Hub id, directory, or `./x` relative to the artifact.")
    score_head_shape: tuple[int, int] = Field(description="[1, hidden]")
    head: HeadSpec = HeadSpec()
    schema_version: Literal[1] = 1
    kind: Kind = Field("lora_head", description="Where the parts lie: see `app.layouts`.")
    description: str = ""
    base_model_revision: str | None = None
    base_model_sha256: str | None = Field(None, description="`base_sha256` of the base the adapter was trained on.")
    template: str = TEMPLATE
    default_prompt: str | None = Field(DEFAULT_PROMPT, description="null: every request brings its own.")
    prompt_policy: Literal["request", "fixed"] = Field("request", description="fixed: only the default prompt is allowed.")
    caption_role: Literal["user", "assistant", "dialogue", "raw"] = Field(
        "user",
        description="user: prompt and caption are the user's turn of a chat; assistant: the caption is the assistant's turn behind the "
        "prompt's or behind messages; dialogue: as that, in hh-rlhf's plain form; raw: the template by itself. The last two are text-only.",
    )
    max_prompt_tokens: int | None = Field(160, ge=1, description="Longer prompts are cut, as in training, and the answer says so.")
    max_caption_tokens: int | None = Field(80, ge=1, description="Longer captions are refused.")
    max_tokens: int | None = Field(None, ge=1, description="A caption with all before it, image included, that is longer is refused.")
    image: ImageRecipe = ImageRecipe()
    pooling: Literal["last_token"] = "last_token"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    files: dict[str, str] = Field(default_factory=dict, description="sha256 of every other file of the artifact, by path.")
    training: dict[str, Any] = Field(default_factory=dict)
    calibration: Calibration = Calibration()
    score_distribution: ScoreDistribution | None = None

    @field_validator("kind")
    @classmethod
    def _carries_its_trained_base(cls, value: Kind, info: ValidationInfo) -> Kind:
        base, place = info.data.get("base_model_name", ""), LAYOUTS[value].base
        if place is not None and not place.fullmatch(base):
            raise ValueError(f"{value} keeps its weights in the artifact; expected base_model_name {place.shown!r}, not {_short(base)}")
        return value

    @model_validator(mode="after")
    def _has_its_slots(self) -> Self:
        wanted = {"{prompt}": 1, "{caption}": int(self.caption_role in ("user", "raw"))}
        if {slot: self.template.count(slot) for slot in wanted} != wanted:
            said = (
                "{prompt} and {caption} once each"
                if wanted["{caption}"]
                else "{prompt} once, and no {caption}, which has a turn of its own"
            )
            raise ValueError(f"template must contain {said}")
        return self

    @model_validator(mode="after")
    def _is_bounded(self) -> Self:
        if self.max_tokens is None and None in (self.max_prompt_tokens, self.max_caption_tokens):
            raise ValueError("without max_tokens both max_prompt_tokens and max_caption_tokens are needed")
        if self.prompt_policy == "fixed" and self.default_prompt is None:
            raise ValueError("prompt_policy fixed needs a default_prompt")
        return self


_ASSUMABLE = tuple(
    name
    for name in RewardModelConfig.model_fields
    # an absent head is no guess: the head's tensors must be those of a linear one
    if name not in {"base_model_name", "score_head_shape", "head", "max_tokens", "description", "files", "training", "score_distribution"}
)


class GoldenItem(_Strict):
    """Captions of one picture with the scores they had at export."""

    image: str | None = Field(pattern=r"^golden/[^/\\]+$", description="Relative to the artifact.")
    prompt: str | None = None
    captions: list[str] = Field(min_length=1)
    scores: list[float]
    ids_sha256: list[str] | None = Field(None, description="Of the token ids of every caption, from schema 2 on.")
    pixels_sha256: str | None = Field(None, description="Of the picture as the vision tower sees it, from schema 2 on.")

    @model_validator(mode="after")
    def _one_score_a_caption(self) -> Self:
        if len(self.scores) != len(self.captions):
            raise ValueError(f"{len(self.captions)} captions with {len(self.scores)} scores")
        if self.ids_sha256 is not None and len(self.ids_sha256) != len(self.captions):
            raise ValueError(f"{len(self.captions)} captions with {len(self.ids_sha256)} digests of ids")
        return self


class GoldenPicture(_Strict):
    """A small picture in a mode that is made RGB in a way of its own, and what the vision tower sees of it."""

    mode: str = Field(min_length=1, description="RGBA, say; only for people.")
    data: str = Field(pattern=r"^(?:[A-Za-z0-9+/]{4})*(?:[A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$", description="The file, base64.")
    pixels_sha256: str


class Golden(_Strict):
    """`golden.json`: what the loaded model must reproduce, and how closely in which number format."""

    schema_version: Literal[1, 2] = 1
    tolerance: dict[Literal["float32", "bfloat16"], float]
    items: list[GoldenItem] = Field(min_length=1)
    recipe_sha256: str | None = Field(None, description="Of everything in the configuration that decides over ids and pixels.")
    made_with: dict[str, str] | None = Field(None, description="Versions that pixels may depend on.")
    pictures: list[GoldenPicture] = Field([], description="One of each mode that is not plain RGB; they are not scored.")

    @field_validator("tolerance")
    @classmethod
    def _both_positive(cls, value: dict[str, float]) -> dict[str, float]:
        if set(value) != {"float32", "bfloat16"} or min(value.values()) <= 0:
            raise ValueError("tolerance needs a positive number for float32 and one for bfloat16")
        return value

    @model_validator(mode="after")
    def _whole(self) -> Self:
        digests = [item.ids_sha256 and (item.image is None or item.pixels_sha256) for item in self.items]
        if self.schema_version == 2 and not (all(digests) and self.recipe_sha256 and self.made_with):
            raise ValueError("schema 2 needs recipe_sha256, made_with, and digests of ids and pixels with every item")
        return self


@dataclass(frozen=True, slots=True)
class Artifact:
    """An opened artifact: its configuration, where its parts lie, and what had to be assumed."""

    root: Path
    config: RewardModelConfig
    base_path: Path
    assumed: tuple[str, ...]

    @property
    def layout(self) -> KindLayout:
        return LAYOUTS[self.config.kind]

    @property
    def has_adapter(self) -> bool:
        return self.layout.adapter is not None

    @property
    def adapter_path(self) -> Path:
        return self.root / (self.layout.adapter or ADAPTER_NAME)

    @property
    def processor_path(self) -> Path:
        """Of tokenizer, chat template and image processor; a published adapter without them leaves them to its base."""
        return self.base_path if self.borrows_processor else self.root / self.layout.processor

    @property
    def borrows_processor(self) -> bool:
        """Whether tokenizer and chat template are the base's own files."""
        return self.has_adapter and self.layout.is_published_as_is and not holds_tokenizer(self.root)

    @property
    def head_path(self) -> Path:
        """The file with the head's tensors; the folder where they are among the base's."""
        if self.layout.head is not None:
            return self.root / self.layout.head
        if self.layout.head_prefix:
            return self.base_path
        path = self.root / HEAD_NAME
        return path if path.exists() else self.root / PICKLED_HEAD_NAME

    def golden(self) -> Golden | None:
        """The golden items, their pictures all there, or None for an artifact that ships none. Raises ArtifactInvalid."""
        path = self.root / GOLDEN_NAME
        if not path.exists():
            return None
        golden = _read_model(path, Golden)
        for name in (item.image for item in golden.items if item.image is not None):
            if not (self.root / name).is_file():
                raise ArtifactInvalid(f"{self.root / name}: missing golden image")
        return golden


@dataclass(frozen=True, slots=True)
class Hub:
    """How the Hub may be used: not at all beyond its cache, or only for exact commits."""

    offline: bool = False
    require_pinned: bool = False


def open_artifact(
    model: str,
    *,
    base_model: str | None = None,
    offline: bool = False,
    require_pinned: bool = False,
    said: Mapping[str, Any] | None = None,
    in_company: bool = False,
) -> Artifact:
    """Find the artifact and its base, check layout and hashes. Raises ArtifactInvalid with one line.

    `in_company`: the base is meant for others beside it, and left aside by an artifact that carries its own.
    `said`: what somebody knows of a published folder that has no configuration of ours.
    `require_pinned`: a Hub id without a commit is refused, for what a branch or a tag names may change between two starts.
    """
    hub = Hub(offline, require_pinned)
    root = find_artifact(model, hub)
    config, guessed = read_config(root, said or {})
    check_layout(root, config)
    check_hashes(root, config)
    assumed = tuple(f"{name}={_show(getattr(config, name))}" for name in guessed)
    if in_company and LAYOUTS[config.kind].base is not None:
        base_model = None
    artifact = Artifact(root, config, base_of(root, config, base_model, hub), assumed)
    artifact.golden()
    return artifact


def find_artifact(model: str, hub: Hub) -> Path:
    """The folder of a bundled model, a directory or a Hub id. Raises ArtifactInvalid."""
    return BUNDLED.get(model) or _find(model, None, hub, "model")


def read_config(root: Path, said: Mapping[str, Any]) -> tuple[RewardModelConfig, tuple[str, ...]]:
    """The configuration and what of it nobody said: of a published folder without one of ours, what its kind commonly means."""
    path = root / CONFIG_NAME
    if path.exists() or (root / ADAPTER_NAME).is_dir():
        if said:
            raise ArtifactInvalid(f"{path}: says already what {', '.join(sorted(said))} would")
        config = _read_model(path, RewardModelConfig)
        return config, tuple(name for name in _ASSUMABLE if name not in config.model_fields_set)
    try:
        config = RewardModelConfig.model_validate(published_config(root, said))
    except ValidationError as error:
        raise ArtifactInvalid(f"{root}: {'; '.join(map(_fault, error.errors(include_url=False)))}") from None
    known = (config.model_fields_set - chat_recipe(root).keys()) | said.keys()
    return config, tuple(name for name in (*_ASSUMABLE, "max_tokens") if name not in known)


def write_config(root: Path, config: RewardModelConfig) -> RewardModelConfig:
    """Hash every file of the artifact into `files` and write the configuration; the last step of an export.

    Everything becomes readable to all: safetensors writes for the owner only, and a container runs as somebody else.
    """
    for path in root.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    files = {name: file_sha256(root / name) for name in listed_files(root, config)}
    config = config.model_copy(update={"files": files})
    text = json.dumps(config.model_dump(mode="json"), indent=2, ensure_ascii=False)
    (root / CONFIG_NAME).write_text(text + "\n", encoding="utf-8")
    return config


def write_golden(root: Path, golden: Golden) -> None:
    """Write `golden.json`; its pictures lie beside it under the names the items give."""
    (root / GOLDEN_NAME).write_text(json.dumps(golden.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's content, hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def base_sha256(base_path: Path) -> str:
    """One SHA-256 over the base model's configuration and weights: every `.safetensors` and `config.json`."""
    return _digest({path.name: digest for path, digest in _hash_all(base_files(base_path))})


def base_files(base_path: Path) -> list[Path]:
    """What `base_sha256` is of."""
    return [base_path / "config.json", *base_path.glob("*.safetensors")]


def fingerprint(artifact: Artifact, base_digest: str, runtime: dict[str, str]) -> str:
    """SHA-256 over everything that can change a score: recipe, files, base, and how this process computes."""
    config = _said(artifact.config, exclude=_NOT_SCORING)
    own = (name for name in _own_files(artifact.root, artifact.config) if not name.startswith("golden") and not name.endswith(".md"))
    hashed = base_files(artifact.base_path)
    scoring = [artifact.root / name for name in own if artifact.root / name not in hashed]
    files = {str(path.relative_to(artifact.root)): digest for path, digest in _hash_all(scoring)}
    if artifact.borrows_processor:
        files |= {f"base/{path.name}": digest for path, digest in _hash_all(processor_files(artifact.base_path))}
    return _digest({"config": config, "files": files, "base": base_digest, "runtime": runtime})


def recipe_sha256(config: RewardModelConfig) -> str:
    """SHA-256 over what makes ids and pixels of a request, as the configuration says it."""
    return _digest(_said(config, include=_RECIPE))


def _said(config: RewardModelConfig, **which: set[str]) -> dict[str, Any]:
    """The configuration as hashes see it: a key that came later counts from where it is used, so that older hashes stay."""
    plain = {name: RewardModelConfig.model_fields[name].default for name in _LATER}
    unused = {name for name, default in plain.items() if getattr(config, name) == default}
    shown = config.model_dump(mode="json", **which)  # type: ignore[arg-type]
    if "image" in shown and config.image.alpha == "drop":
        del shown["image"]["alpha"]
    return {name: value for name, value in shown.items() if name not in unused}


def find_base(name: str, revision: str | None = None, *, offline: bool = False) -> Path:
    """The directory of a base model, by path or pinned Hub id, with weights that can be loaded safely. Raises ArtifactInvalid."""
    return _checked_base_folder(_find(name, revision, Hub(offline), "base model"))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _hash_all(paths: Iterable[Path]) -> list[tuple[Path, str]]:
    paths = sorted(paths)
    with ThreadPoolExecutor(4) as pool:
        return list(zip(paths, pool.map(file_sha256, paths), strict=True))


def listed_files(root: Path, config: RewardModelConfig) -> list[str]:
    """The files whose hashes the configuration lists: the artifact's own, and its base if that was trained."""
    place = config.base_model_name
    base = _find_files(root, f"{place}/**/*") if LAYOUTS[config.kind].base is not None and place != HERE else []
    return sorted([*_own_files(root, config), *base])


def _own_files(root: Path, config: RewardModelConfig) -> list[str]:
    """Every file that belongs to the artifact, relative, without the configuration itself, the base and example pictures."""
    if LAYOUTS[config.kind].is_published_as_is:  # what its makers put beside it that is neither read nor kept does not count
        beside = (CONFIG_NAME, "*.md", *(f"*{suffix}" for suffix in PICKLES))
        found = _find_files(root, "*", "golden/**/*")
        return sorted(name for name in found if not any(fnmatch(name, pattern) for pattern in beside))
    parts = [HEAD_NAME, PICKLED_HEAD_NAME, GOLDEN_NAME, f"{ADAPTER_NAME}/**/*", f"{PROCESSOR_NAME}/**/*", "golden/**/*"]
    return sorted(_find_files(root, *parts))


def _find_files(root: Path, *parts: str) -> list[str]:
    found = (path for part in parts for path in root.glob(part) if path.is_file() and not path.name.startswith("."))
    return [path.relative_to(root).as_posix() for path in found]


def _read_model(path: Path, model: type[_Model]) -> _Model:
    try:
        return model.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactInvalid(f"{path}: missing") from None
    except OSError as error:
        raise ArtifactInvalid(f"{path}: cannot be read ({error.strerror})") from None
    except ValidationError as error:
        raise ArtifactInvalid(f"{path}: {'; '.join(map(_fault, error.errors(include_url=False)))}") from None


def _fault(item: Any) -> str:
    """Where, what was expected and what was found, in one line."""
    where = ".".join(map(str, item["loc"])) or "content"
    found = "" if item["type"] in ("json_invalid", "missing") or not item["loc"] else f", found {_short(item['input'])}"
    return f"{where}: {item['msg'].removeprefix('Value error, ')}{found}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + ".."


def _find(name: str, revision: str | None, hub: Hub, what: str) -> Path:
    """A directory as it is, else a pinned Hub snapshot."""
    if not name:
        raise ArtifactInvalid(f"no {what} is named; expected a directory or a Hub id (--base-model, for a base)")
    path = Path(os.path.expanduser(name))  # unlike Path.expanduser it raises for no name
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith(".") or name.count("/") != 1:
        raise ArtifactInvalid(f"{name}: {what} is neither a directory nor a Hub id (owner/name)")
    repo, _, pinned = name.partition("@")
    revision = pinned or revision
    if hub.require_pinned and not (revision and _COMMIT.fullmatch(revision)):
        raise ArtifactInvalid(
            f"{name}: {what} is not pinned to a commit (PUNCHLINE_REQUIRE_PINNED); expected owner/name@ and 40 hex digits"
        )
    try:
        return Path(snapshot_download(repo, revision=revision, local_files_only=hub.offline, ignore_patterns=["*.bin", "*.gguf", "*.onnx"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise ArtifactInvalid(
            f"{name}: {what} is no directory here, and could not be fetched from the Hub ({type(error).__name__})"
        ) from None


def base_of(root: Path, config: RewardModelConfig, override: str | None, hub: Hub) -> Path:
    if override and LAYOUTS[config.kind].base is not None:
        raise ArtifactInvalid(
            f"{root / CONFIG_NAME}: a {config.kind} artifact carries its trained base; expected no other, found {override}"
        )
    return _checked_base_folder(_locate_base(root, config, override, hub))


def _checked_base_folder(base: Path) -> Path:
    _refuse_remote_code(base)
    if not (base / "config.json").is_file():
        raise ArtifactInvalid(f"{base / 'config.json'}: missing; {base} is not a base model")
    if (base / "adapter_config.json").exists():  # transformers would follow it to yet another base
        raise ArtifactInvalid(f"{base / 'adapter_config.json'}: {base} is an adapter, not a base model")
    if not any(base.glob("*.safetensors")):
        raise ArtifactInvalid(f"{base}: no .safetensors weights; pickled weights are not loaded")
    return base


def _locate_base(root: Path, config: RewardModelConfig, override: str | None, hub: Hub) -> Path:
    """The override, else the configured base; a relative one is a folder of the artifact and never a Hub id."""
    if override:
        return _find(override, None, hub, "base model")
    if config.base_model_name == HERE:
        return root
    if not config.base_model_name.startswith("./"):
        return _find(config.base_model_name, config.base_model_revision, hub, "base model")
    base = root / config.base_model_name
    if not base.is_dir():
        raise ArtifactInvalid(f"{base}: missing; it should hold the base model")
    return base


def check_layout(root: Path, config: RewardModelConfig) -> None:
    layout = LAYOUTS[config.kind]
    _check_adapter_files(root, config)
    if layout.is_published_as_is:
        if layout.head is not None and not (root / layout.head).is_file():
            raise ArtifactInvalid(f"{root / layout.head}: missing; a reward model without its head scores noise")
        _refuse_remote_code(root)
        return
    if not (root / PROCESSOR_NAME).is_dir():
        raise ArtifactInvalid(f"{root / PROCESSOR_NAME}: missing; it holds tokenizer, image processor and chat template")
    heads = [name for name in (HEAD_NAME, PICKLED_HEAD_NAME) if (root / name).is_file()]
    if not heads:
        raise ArtifactInvalid(f"{root / HEAD_NAME}: missing; a reward model without its head scores noise")
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in PICKLES and path != root / PICKLED_HEAD_NAME:
            raise ArtifactInvalid(f"{path}: pickled files are not loaded; only {PICKLED_HEAD_NAME} of the published layout is")
    _refuse_remote_code(root / PROCESSOR_NAME)


def _check_adapter_files(root: Path, config: RewardModelConfig) -> None:
    layout = LAYOUTS[config.kind]
    if layout.adapter is None:
        for found in (root / ADAPTER_NAME, root / ADAPTER_CONFIG_NAME):
            if found.exists():
                raise ArtifactInvalid(f"{found}: expected no adapter in a {config.kind} artifact; its base holds every trained weight")
        return
    for path in (root / layout.adapter / ADAPTER_CONFIG_NAME, root / layout.adapter / ADAPTER_WEIGHTS_NAME):
        if not path.is_file():
            raise ArtifactInvalid(f"{path}: missing")


def _refuse_remote_code(folder: Path) -> None:
    for path in sorted(folder.glob("*.json")):
        if b'"auto_map"' in path.read_bytes():
            raise ArtifactInvalid(f"{path}: auto_map asks to run the model's own code, which Punchline never does")


def check_hashes(root: Path, config: RewardModelConfig) -> None:
    if not config.files:
        return
    present = set(listed_files(root, config))
    if absent := sorted(set(config.files) - present):
        raise ArtifactInvalid(f"{root / absent[0]}: missing, expected sha256 {config.files[absent[0]]}")
    if strange := sorted(present - set(config.files)):
        raise ArtifactInvalid(f"{root / strange[0]}: not in the list of files of {CONFIG_NAME}")
    for path, found in _hash_all(root / name for name in config.files):
        expected = config.files[str(path.relative_to(root).as_posix())]
        if found != expected:
            raise ArtifactInvalid(f"{path}: expected sha256 {expected}, found {found}")


def _show(value: Any) -> str:
    return json.dumps(value.model_dump() if isinstance(value, BaseModel) else value, ensure_ascii=False)
