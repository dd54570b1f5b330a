"""The reward model on disk: its layout, its configuration, its hashes. Reads and writes; loads no weights."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TypeVar

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator, model_validator

from app.errors import ArtifactInvalid

CONFIG_NAME = "reward_model_config.json"
HEAD_NAME = "reward_head.safetensors"
PICKLED_HEAD_NAME = "reward_head.pt"
ADAPTER_NAME = "backbone_adapter"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
PROCESSOR_NAME = "processor"
GOLDEN_NAME = "golden.json"
DEMO_PATH = Path(__file__).parent / "demo"
BUNDLED = {"demo": DEMO_PATH, "newyorker": DEMO_PATH.with_name("newyorker")}
TEMPLATE = "{prompt}\n\nCandidate caption: {caption}\n\nJudge how funny this caption is for the cartoon."
DEFAULT_PROMPT = "Write a funny one-line caption for this New Yorker-style cartoon."
_OWN_FOLDER = re.compile(r"\./[A-Za-z0-9][A-Za-z0-9._-]*")  # one folder directly in the artifact
_COMMIT = re.compile(r"[0-9a-f]{40}")
_MAX_SHOWN = 60  # characters of a wrong value in an error
_Model = TypeVar("_Model", bound=BaseModel)
_NOT_SCORING = {"files", "training", "description", "score_distribution"} | {  # the base itself is in the fingerprint
    "base_model_name",
    "base_model_revision",
    "base_model_sha256",
}
_RECIPE = {"template", "default_prompt", "prompt_policy", "caption_role", "max_prompt_tokens", "max_caption_tokens", "image", "pooling"}
PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt", ".pt2"}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ImageRecipe(_Strict):
    """How a picture is made ready for the image processor, in training and serving alike."""

    long_edge: int | None = Field(448, ge=28, description="Larger pictures are shrunk to this long edge; null: native size.")
    resample: Literal["lanczos", "bicubic", "bilinear"] = "lanczos"
    exif_transpose: bool = False


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
    kind: Literal["lora_head", "full_head"] = Field(
        "lora_head", description="lora_head: an adapter on a base; full_head: every weight trained, the base a folder of the artifact."
    )
    description: str = ""
    base_model_revision: str | None = None
    base_model_sha256: str | None = Field(None, description="`base_sha256` of the base the adapter was trained on.")
    template: str = TEMPLATE
    default_prompt: str = DEFAULT_PROMPT
    prompt_policy: Literal["request", "fixed"] = Field("request", description="fixed: only the default prompt is allowed.")
    caption_role: Literal["user", "raw"] = Field(
        "user", description="user: the text is the user's turn of a chat; raw: the text by itself, for text-only bases."
    )
    max_prompt_tokens: int = Field(160, ge=1, description="Longer prompts are cut, as in training, and the answer says so.")
    max_caption_tokens: int = Field(80, ge=1, description="Longer captions are refused.")
    image: ImageRecipe = ImageRecipe()
    pooling: Literal["last_token"] = "last_token"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    files: dict[str, str] = Field(default_factory=dict, description="sha256 of every other file of the artifact, by path.")
    training: dict[str, Any] = Field(default_factory=dict)
    calibration: Calibration = Calibration()
    score_distribution: ScoreDistribution | None = None

    @field_validator("kind")
    @classmethod
    def _carries_its_trained_base(cls, value: str, info: ValidationInfo) -> str:
        base = info.data.get("base_model_name", "")
        if value == "full_head" and not _OWN_FOLDER.fullmatch(base):
            raise ValueError(f"full_head keeps its weights in the artifact; expected base_model_name './folder', not {_short(base)}")
        return value

    @field_validator("template")
    @classmethod
    def _has_both_slots(cls, value: str) -> str:
        if value.count("{prompt}") != 1 or value.count("{caption}") != 1:
            raise ValueError("template must contain {prompt} and {caption} once each")
        return value


_ASSUMABLE = tuple(
    name
    for name in RewardModelConfig.model_fields
    # an absent head is no guess: the head's tensors must be those of a linear one
    if name not in {"base_model_name", "score_head_shape", "head", "description", "files", "training", "score_distribution"}
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


class Golden(_Strict):
    """`golden.json`: what the loaded model must reproduce, and how closely in which number format."""

    schema_version: Literal[1, 2] = 1
    tolerance: dict[Literal["float32", "bfloat16"], float]
    items: list[GoldenItem] = Field(min_length=1)
    recipe_sha256: str | None = Field(None, description="Of everything in the configuration that decides over ids and pixels.")
    made_with: dict[str, str] | None = Field(None, description="Versions that pixels may depend on.")

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
    def adapter_path(self) -> Path:
        return self.root / ADAPTER_NAME

    @property
    def processor_path(self) -> Path:
        return self.root / PROCESSOR_NAME

    @property
    def head_path(self) -> Path:
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
class _Hub:
    """How the Hub may be used: not at all beyond its cache, or only for exact commits."""

    offline: bool = False
    require_pinned: bool = False


def open_artifact(model: str, *, base_model: str | None = None, offline: bool = False, require_pinned: bool = False) -> Artifact:
    """Find the artifact and its base, check layout and hashes. Raises ArtifactInvalid with one line.

    `require_pinned`: a Hub id without a commit is refused, for what a branch or a tag names may change between two starts.
    """
    hub = _Hub(offline, require_pinned)
    root = BUNDLED.get(model) or _find(model, None, hub, "model")
    config = _read_model(root / CONFIG_NAME, RewardModelConfig)
    _check_layout(root, config)
    _check_hashes(root, config)
    assumed = tuple(f"{name}={_show(getattr(config, name))}" for name in _ASSUMABLE if name not in config.model_fields_set)
    artifact = Artifact(root, config, _find_base(root, config, base_model, hub), assumed)
    artifact.golden()
    return artifact


def describe_artifact(model: str, *, offline: bool = False) -> tuple[Path, RewardModelConfig]:
    """Where an artifact lies and what its configuration says; nothing else is checked."""
    root = BUNDLED.get(model) or _find(model, None, _Hub(offline), "model")
    return root, _read_model(root / CONFIG_NAME, RewardModelConfig)


def write_config(root: Path, config: RewardModelConfig) -> RewardModelConfig:
    """Hash every file of the artifact into `files` and write the configuration; the last step of an export.

    Everything becomes readable to all: safetensors writes for the owner only, and a container runs as somebody else.
    """
    for path in root.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    files = {name: file_sha256(root / name) for name in _listed_files(root, config)}
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
    return _digest({path.name: digest for path, digest in _hash_all([base_path / "config.json", *base_path.glob("*.safetensors")])})


def fingerprint(artifact: Artifact, base_digest: str, runtime: dict[str, str]) -> str:
    """SHA-256 over everything that can change a score: recipe, files, base, and how this process computes."""
    plain = {"head"} if artifact.config.head == HeadSpec() else set()  # the only head there was before there was a key for it
    config = artifact.config.model_dump(mode="json", exclude=_NOT_SCORING | plain)
    scoring = [artifact.root / name for name in _own_files(artifact.root) if not name.startswith("golden") and not name.endswith(".md")]
    files = {str(path.relative_to(artifact.root)): digest for path, digest in _hash_all(scoring)}
    return _digest({"config": config, "files": files, "base": base_digest, "runtime": runtime})


def recipe_sha256(config: RewardModelConfig) -> str:
    """SHA-256 over what makes ids and pixels of a request, as the configuration says it."""
    return _digest(config.model_dump(mode="json", include=_RECIPE))


def find_base(name: str, revision: str | None = None, *, offline: bool = False) -> Path:
    """The directory of a base model, by path or pinned Hub id, with weights that can be loaded safely. Raises ArtifactInvalid."""
    return _checked_base_folder(_find(name, revision, _Hub(offline), "base model"))


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def _hash_all(paths: Iterable[Path]) -> list[tuple[Path, str]]:
    paths = sorted(paths)
    with ThreadPoolExecutor(4) as pool:
        return list(zip(paths, pool.map(file_sha256, paths), strict=True))


def _listed_files(root: Path, config: RewardModelConfig) -> list[str]:
    """The files whose hashes the configuration lists: the artifact's own, and its base if that was trained."""
    base = [] if config.kind == "lora_head" else _find_files(root, f"{config.base_model_name}/**/*")
    return sorted([*_own_files(root), *base])


def _own_files(root: Path) -> list[str]:
    """Every file that belongs to the artifact, relative, without the configuration itself, the base and example pictures."""
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
    found = "" if item["type"] in ("json_invalid", "missing") else f", found {_short(item['input'])}"
    return f"{where}: {item['msg'].removeprefix('Value error, ')}{found}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + ".."


def _find(name: str, revision: str | None, hub: _Hub, what: str) -> Path:
    """A directory as it is, else a pinned Hub snapshot."""
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


def _find_base(root: Path, config: RewardModelConfig, override: str | None, hub: _Hub) -> Path:
    if override and config.kind == "full_head":
        raise ArtifactInvalid(f"{root / CONFIG_NAME}: a full_head artifact carries its trained base; expected no other, found {override}")
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


def _locate_base(root: Path, config: RewardModelConfig, override: str | None, hub: _Hub) -> Path:
    """The override, else the configured base; a relative one is a folder of the artifact and never a Hub id."""
    if override:
        return _find(override, None, hub, "base model")
    if not config.base_model_name.startswith("./"):
        return _find(config.base_model_name, config.base_model_revision, hub, "base model")
    base = root / config.base_model_name
    if not base.is_dir():
        raise ArtifactInvalid(f"{base}: missing; it should hold the base model")
    return base


def _check_layout(root: Path, config: RewardModelConfig) -> None:
    _check_adapter_files(root / ADAPTER_NAME, config)
    if not (root / PROCESSOR_NAME).is_dir():
        raise ArtifactInvalid(f"{root / PROCESSOR_NAME}: missing; it holds tokenizer, image processor and chat template")
    heads = [name for name in (HEAD_NAME, PICKLED_HEAD_NAME) if (root / name).is_file()]
    if not heads:
        raise ArtifactInvalid(f"{root / HEAD_NAME}: missing; a reward model without its head scores noise")
    for path in sorted(root.rglob("*")):
        if path.suffix.lower() in PICKLES and path != root / PICKLED_HEAD_NAME:
            raise ArtifactInvalid(f"{path}: pickled files are not loaded; only {PICKLED_HEAD_NAME} of the published layout is")
    _refuse_remote_code(root / PROCESSOR_NAME)


def _check_adapter_files(folder: Path, config: RewardModelConfig) -> None:
    if config.kind == "full_head":
        if folder.exists():
            raise ArtifactInvalid(f"{folder}: expected no adapter in a full_head artifact; its base holds every trained weight")
        return
    for path in (folder / "adapter_config.json", folder / ADAPTER_WEIGHTS_NAME):
        if not path.is_file():
            raise ArtifactInvalid(f"{path}: missing")


def _refuse_remote_code(folder: Path) -> None:
    for path in sorted(folder.glob("*.json")):
        if b'"auto_map"' in path.read_bytes():
            raise ArtifactInvalid(f"{path}: auto_map asks to run the model's own code, which Punchline never does")


def _check_hashes(root: Path, config: RewardModelConfig) -> None:
    if not config.files:
        return
    present = set(_listed_files(root, config))
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
