"""The settings of a server: the only reader of its environment. A typo, a contradiction or a bad range stops the start."""

from __future__ import annotations

import os
import re
from typing import Any, Literal, Self

from pydantic import Field, SecretStr, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from app.errors import SettingsInvalid

PREFIX = "PUNCHLINE_"
CLIENT_PREFIX = "PUNCHLINE_CLIENT_"  # what trainers' processes are told, who may share a shell or a container with the server
MIN_KEY_CHARACTERS = 16
MIN_DISTINCT_CHARACTERS = 6  # of a key; 24 times the same letter is long and no secret
MAX_PIXELS = 89_478_485  # above it Pillow warns of a bomb
DECODABLE = {"JPEG", "PNG", "WEBP", "BMP", "GIF"}
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,63}")
_LABEL = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
_HOST = re.compile(rf"(?:(https?)://)?({_LABEL}(?:\.{_LABEL})*)(?::([0-9]{{1,5}}))?")
_GUESSABLE = re.compile(r"(?:(?:change[-_]?me|default|password|secret|punchline|api|key)[-_.]?)+\d{0,4}", re.IGNORECASE)


class Settings(BaseSettings):
    """Read from `PUNCHLINE_*` and from the flags of `punchline serve`; flags win."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, frozen=True, extra="forbid", env_ignore_empty=True)

    model: str = Field(
        "demo",
        description="The artifact to serve: a directory, a Hub id (`owner/name@revision`), `demo` or `newyorker`; or name=ARTIFACT.",
    )
    models: str = Field(
        "",
        description="Further artifacts to serve beside it: name=ARTIFACT,name=ARTIFACT; a request names the one it wants as `model`.",
    )
    base_model: str | None = Field(None, description="Where the base model lies, if not where the artifacts say; of every model.")
    offline: bool = Field(False, description="Never ask the Hub; serve from local files and its cache only.")
    require_pinned: bool = Field(
        False, description="Refuse a model or base that is a Hub id without its commit (`owner/name@` and 40 hex digits)."
    )
    device: str = Field("auto", description="Where to compute: auto, cpu, cuda or cuda:N.", pattern=r"^(auto|cpu|cuda(:\d+)?)$")
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="Number format of the backbone; auto takes the artifact's on a GPU and float32 on a CPU."
    )
    lora: Literal["auto", "merged", "unmerged"] = Field(
        "auto",
        description="Fold each adapter into its base at load, or keep it apart, so that models share a base; auto: apart where they can.",
    )
    num_threads: int = Field(
        0, ge=0, le=512, description="Threads of the matrix library; 0 takes the processors this process or its container may use."
    )
    deterministic: bool = Field(
        False, description="Make a score independent, bit for bit, of what it is scored beside and of what is cached; slower."
    )
    compile: bool = Field(
        False, description="Compile the steps between matrix products at start (a minute); needs a C++ compiler, on a GPU Triton too."
    )

    host: str = Field("127.0.0.1", description="Address to listen on.")
    port: int = Field(8000, ge=0, le=65535, description="Port to listen on; 0 takes a free one and logs it.")
    api_key: SecretStr | None = Field(
        None,
        description="Key every route but the probes and the playground asks for, as `Authorization: Bearer`; commas separate several.",
    )
    public_metrics: bool = Field(False, description="Answer /metrics without a key.")
    require_auth: bool = Field(False, description="Refuse to start without a key.")
    keep_alive_s: int = Field(75, ge=5, le=3600, description="How long an idle connection stays open; keep it above your clients' pools.")
    header_timeout_s: float = Field(10.0, gt=0, le=600, description="Time for the head of a request to arrive, once connected or begun.")
    max_header_bytes: int = Field(65536, ge=1024, le=1 << 20, description="Size of a request's target and headers together.")
    write_timeout_s: float = Field(30.0, gt=0, le=600, description="Time for a client to take an answer.")
    max_connections: int = Field(
        4096, ge=1, le=1 << 20, description="Open connections; above it idle ones are closed, then new ones refused with 503."
    )
    drain_notice_s: float = Field(
        5.0, ge=0, le=600, description="How long a server told to stop (SIGTERM) still takes requests, not ready, so that balancers learn."
    )
    drain_s: int = Field(60, ge=1, le=3600, description="How long a stopping server may then take to answer what it accepted.")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="How much to log.")

    max_body_bytes: int = Field(32 << 20, ge=1024, le=1 << 30, description="Largest request body.")
    body_timeout_s: float = Field(30.0, gt=0, le=600, description="Time for a request body to arrive.")
    min_body_rate: int = Field(
        16384, ge=0, le=1 << 30, description="Bytes a second at which a body must arrive after its first 5 s, or it is refused; 0: any."
    )
    max_pending_body_bytes: int = Field(
        512 << 20, ge=1024, le=1 << 40, description="Memory for bodies of all requests not yet answered; more is refused with 503."
    )
    max_groups: int = Field(16, ge=1, le=1024, description="Groups (images) in one request.")
    max_captions: int = Field(256, ge=1, le=4096, description="Captions in one request, over all its groups.")
    max_caption_bytes: int = Field(8192, ge=16, le=1 << 20, description="Size of one caption, UTF-8.")
    max_prompt_bytes: int = Field(16384, ge=16, le=1 << 20, description="Size of one prompt, UTF-8.")
    max_image_bytes: int = Field(10 << 20, ge=1024, le=1 << 30, description="Size of one encoded image.")
    max_image_pixels: int = Field(16_000_000, ge=4096, le=MAX_PIXELS, description="Width times height, read before decoding.")
    min_image_side: int = Field(16, ge=1, le=4096, description="Shortest side of an image, pixels.")
    max_image_aspect: float = Field(100.0, ge=1, le=200, description="Longest side over shortest side of an image.")
    image_formats: str = Field("JPEG,PNG,WEBP", description="Formats that are decoded, comma-separated.")

    image_hosts: str = Field(
        "",
        description="Hosts whose images are fetched by address, comma-separated: img.example.com, host:8443, http://host for plain HTTP.",
    )
    image_fetch_timeout_s: float = Field(5.0, gt=0, le=600, description="Time for one image to come from its host.")

    max_batch_tokens: int = Field(8192, ge=64, le=1 << 22, description="Tokens that go to the device together.")
    max_batch_s: float | None = Field(
        None, gt=0, le=86_400, description="A batch that takes longer hangs: the process leaves; unset: 60 s on a GPU, 600 s on a CPU."
    )
    max_queue_tokens: int = Field(65536, ge=64, le=1 << 24, description="Tokens admitted and not yet answered; more is refused with 503.")
    max_queue_items: int = Field(4096, ge=1, le=1 << 20, description="Captions admitted and not yet answered; more is refused with 503.")
    default_timeout_ms: int = Field(10_000, ge=1, le=600_000, description="Deadline of a request that names none.")
    max_timeout_ms: int = Field(120_000, ge=1, le=600_000, description="Longest deadline a request may ask for.")
    num_encode_threads: int = Field(2, ge=1, le=64, description="Threads that decode images and tokenise.")

    image_store_bytes: int = Field(256 << 20, ge=0, le=1 << 40, description="Memory for uploaded image bytes, so clients can send ids.")
    pixel_cache_bytes: int = Field(256 << 20, ge=0, le=1 << 40, description="Memory for decoded and resized images.")
    feature_cache_bytes: int | None = Field(
        None, ge=0, le=1 << 44, description="Device memory for what the vision tower made of images; unset: a share of what loading left."
    )
    prefix_cache_bytes: int | None = Field(
        None, ge=0, le=1 << 44, description="Device memory for keys and values of prefixes; unset: a share of what loading left."
    )
    score_cache_bytes: int = Field(32 << 20, ge=0, le=1 << 40, description="Memory for scores already computed.")
    canary_s: float = Field(
        30.0, ge=0, le=120, description="How often a golden item is scored while serving; wrong three times running ends it; 0: never."
    )
    cache_audit_every: int = Field(1000, ge=0, le=1 << 30, description="Of so many cache hits one is computed again and compared; 0: none.")
    max_runs: int = Field(
        32, ge=1, le=128, description="Training runs (X-Run-Id) whose scores are watched; beyond, the one idle longest is forgotten."
    )

    @property
    def artifacts(self) -> dict[str, str]:
        """What is served: the artifact of each name, the first model first. One that is given no name has its artifact's."""
        first, separator, rest = self.model.partition("=")
        is_named = bool(separator) and "/" not in first  # `runs/step=7` is a directory
        further = [entry.strip().partition("=") for entry in self.models.split(",") if entry.strip()]
        return {first if is_named else self.model: rest if is_named else self.model} | {name: place for name, _, place in further}

    @property
    def formats(self) -> tuple[str, ...]:
        return tuple(name.strip().upper() for name in self.image_formats.split(",") if name.strip())

    @property
    def image_origins(self) -> frozenset[tuple[str, str, int]]:
        """Scheme, name and port of every host that images are fetched from. Raises ValueError for what is none."""
        return frozenset(_origin(entry.strip()) for entry in self.image_hosts.split(",") if entry.strip())

    @property
    def api_keys(self) -> tuple[str, ...]:
        text = self.api_key.get_secret_value() if self.api_key else ""
        return tuple(key.strip() for key in text.split(",") if key.strip())

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._check_models()
        self._check_sizes()
        self.image_origins  # noqa: B018 (raises)
        self._check_times()
        self._check_keys()
        return self

    def _check_models(self) -> None:
        """A name is in requests and in labels of metrics, and stands for one model."""
        entries = [entry.strip() for entry in self.models.split(",") if entry.strip()]
        for entry in entries:
            name, separator, place = entry.partition("=")
            if not separator or not place or not MODEL_NAME.fullmatch(name):
                raise ValueError(f"models: expected name=ARTIFACT, the name at most 64 letters, digits and ._-/, found {entry!r}")
        if len(self.artifacts) < 1 + len(entries):
            raise ValueError("models: two models have the same name")
        first, place = next(iter(self.artifacts.items()))
        if first != self.model and not (place and MODEL_NAME.fullmatch(first)):
            raise ValueError(f"model: expected name=ARTIFACT, the name at most 64 letters, digits and ._-, found {self.model!r}")

    def _check_sizes(self) -> None:
        if self.max_batch_tokens > self.max_queue_tokens:
            raise ValueError("max_batch_tokens is larger than max_queue_tokens: such a batch could never gather")
        if self.max_captions > self.max_queue_items:
            raise ValueError("max_captions is larger than max_queue_items: such a request could never be admitted")
        if self.max_body_bytes > self.max_pending_body_bytes:
            raise ValueError("max_body_bytes is larger than max_pending_body_bytes: such a body could never be held")
        if self.max_image_bytes > self.max_body_bytes:
            raise ValueError("max_image_bytes is larger than max_body_bytes: such an image could never arrive")
        if not self.formats or not DECODABLE.issuperset(self.formats):
            raise ValueError(f"image_formats must name one or more of {', '.join(sorted(DECODABLE))}")

    def _check_times(self) -> None:
        """What is accepted last, when the notice ends and the port closes, has `drain_s` and no more."""
        if self.default_timeout_ms > self.max_timeout_ms:
            raise ValueError("default_timeout_ms is larger than max_timeout_ms")
        if self.default_timeout_ms > self.drain_s * 1000:
            raise ValueError("default_timeout_ms is longer than drain_s: a stopping server would cut requests that are in time")
        if self.header_timeout_s > self.keep_alive_s:
            raise ValueError("header_timeout_s is longer than keep_alive_s: who never asks would stay longer than who has asked")

    def _check_keys(self) -> None:
        if self.api_key is not None and not self.api_keys:
            raise ValueError("api_key is set and holds no key")
        if any(len(key) < MIN_KEY_CHARACTERS for key in self.api_keys):
            raise ValueError(f"api_key must have at least {MIN_KEY_CHARACTERS} characters")
        if not all(key.isascii() and key.isprintable() and " " not in key for key in self.api_keys):
            raise ValueError("api_key must be printable ASCII without spaces, or no client could send it")
        if any(len(set(key)) < MIN_DISTINCT_CHARACTERS or _GUESSABLE.fullmatch(key) for key in self.api_keys):
            raise ValueError(
                "api_key can be guessed: too few different characters, or words anyone would try; `openssl rand -hex 32` makes one"
            )
        if self.require_auth and not self.api_keys:
            raise ValueError("require_auth is set and api_key is not")

    def redacted(self) -> dict[str, Any]:
        """The effective values, secrets masked: for the log and `/info`."""
        values = self.model_dump(mode="json")
        values["api_key"] = "***" if self.api_key else None
        return values


def load_settings(**flags: Any) -> Settings:
    """Settings from flags over environment over defaults. Raises SettingsInvalid naming every fault."""
    known = {PREFIX + name.upper() for name in Settings.model_fields}
    ours = [name for name in os.environ if name.upper().startswith(PREFIX) and not name.upper().startswith(CLIENT_PREFIX)]
    if unknown := sorted(name for name in ours if name.upper() not in known):
        raise SettingsInvalid(f"unknown setting {', '.join(unknown)}; see `punchline serve --help`")
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        raise SettingsInvalid("; ".join(_fault(item) for item in error.errors(include_input=False, include_url=False))) from None


def _origin(entry: str) -> tuple[str, str, int]:
    match = _HOST.fullmatch(entry.lower()) if entry.isascii() else None
    if match is None or len(match[2]) > 253 or not 0 < int(match[3] or 1) < 65536:
        raise ValueError(f"image_hosts: expected a host, or host:port, https:// or http:// before it, found {entry!r}")
    scheme = match[1] or "https"
    return scheme, match[2], int(match[3] or (80 if scheme == "http" else 443))


def _fault(item: Any) -> str:
    where = ".".join(str(part) for part in item["loc"])
    text = str(item["msg"]).removeprefix("Value error, ")
    return f"{PREFIX}{where.upper()}: {text}" if where else text
