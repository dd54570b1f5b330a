"""The loaded model against the scores it had at export, through the real queue and device."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from PIL import Image

from app import startcheck
from app.artifacts import Artifact, Golden, GoldenItem
from app.errors import ApiError, ArtifactInvalid
from app.golden import GoldenCase, GoldenInput, asked_prompt, encode_captions, tolerance_of
from app.images import ImageLimits
from app.metrics import Metrics
from app.service import GroupRequest, ScoringService
from app.startcheck import Finding, Scored

if TYPE_CHECKING:
    from app.encoding import Encoder

TIMEOUT_S = 600.0
_PROBE_CAPTIONS = ("A short one.", "Something else entirely, and at more length.", "A short one.")


@dataclass(frozen=True, slots=True)
class SelfTestReport:
    """What a self-test saw. `golden` compares with stored scores; `probe` is all an artifact without them allows."""

    passed: bool
    kind: Literal["golden", "probe"]
    num_scores: int
    max_error: float
    tolerance: float
    message: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class SelfTest:
    """Runs the artifact's golden items through a service. Their pictures are held: nothing depends on the folder any more."""

    def __init__(self, artifact: Artifact, dtype: Literal["float32", "bfloat16"], service: ScoringService, metrics: Metrics) -> None:
        self.golden = artifact.golden()
        self.pictures = _pictures(artifact, self.golden) if self.golden else [_probe_picture() if service.takes_images else None]
        self._config = artifact.config
        self._dtype = dtype
        self._service = service
        self._metrics = metrics
        self.scored: tuple[Scored, ...] = ()  # by the last run, one an item
        self.findings: tuple[Finding, ...] = ()

    @property
    def asked(self) -> Sequence[GoldenItem | GoldenInput]:
        """What is scored: the golden items, or the probe."""
        return self.golden.items if self.golden else [GoldenInput(None, _PROBE_CAPTIONS, asked_prompt(self._config))]

    @property
    def tolerance(self) -> float:
        """What a score may differ by from one run to the next. Of the probe's scores after a run."""
        return (self.golden.tolerance if self.golden else self._probe_tolerance())[self._dtype]

    @property
    def least(self) -> float:
        """What is more than nothing, in whichever format."""
        return self.golden.tolerance["float32"] if self.golden else 0.0

    def cases(self, encoder: Encoder, limits: ImageLimits) -> list[GoldenCase]:
        """The items as the device sees them, with golden scores, or those of the probe's last run. Raises ArtifactInvalid."""
        expected = [item.scores for item in self.golden.items] if self.golden else [item.found for item in self.scored]
        asked = zip(self.asked, self.pictures, expected, strict=True)
        return [
            GoldenCase(number, encode_captions(encoder, item, data, f"golden item {number}", limits), tuple(scores))
            for number, (item, data, scores) in enumerate(asked)
        ]

    async def run(self) -> SelfTestReport:
        """Score and compare. Raises ApiError when scoring itself fails."""
        found = [await self._score(item, data) for item, data in zip(self.asked, self.pictures, strict=True)]
        report = self._probed(found[0]) if self.golden is None else self._compared(self.golden, found)
        self._metrics.golden_error.labels(self._service.model).set(report.max_error)
        self._metrics.golden_tolerance.labels(self._service.model).set(self.tolerance)
        return report

    def failed(self, error: ApiError) -> SelfTestReport:
        """The report of a run that raised."""
        kind: Literal["golden", "probe"] = "golden" if self.golden else "probe"
        return SelfTestReport(False, kind, 0, 0.0, self.tolerance, f"could not score ({error.code}: {error.message})")

    def _compared(self, golden: Golden, found: Sequence[tuple[float, ...]]) -> SelfTestReport:
        tolerance = golden.tolerance[self._dtype]
        scored = self.scored = tuple(Scored(tuple(item.scores), scores) for item, scores in zip(golden.items, found, strict=True))
        self.findings = startcheck.of_scores(scored, tolerance, self.least)
        fault = next((finding for finding in self.findings if not finding.passed), None)
        errors = [abs(here - there) for item in scored for here, there in zip(item.found, item.expected, strict=True)]
        message = self.findings[0].message if fault is None else str(fault)
        return SelfTestReport(fault is None, "golden", len(errors), max(errors), tolerance, message)

    def _probed(self, found: tuple[float, ...]) -> SelfTestReport:
        """Without golden scores: equal captions must score equal bits, different ones must differ."""
        self.scored = (Scored(found, found),)
        first, _, again = found
        matter = startcheck.captions_matter(self.scored, 0.0)
        self.findings = (startcheck.bits(first, again), matter)
        fault = next((finding for finding in self.findings if not finding.passed), None)
        message = str(fault) if fault else "no golden scores in the artifact; `punchline convert` adds them"
        return SelfTestReport(fault is None, "probe", len(_PROBE_CAPTIONS), abs(first - again), 0.0, message)

    def _probe_tolerance(self) -> dict[Literal["float32", "bfloat16"], float]:
        return tolerance_of([score for item in self.scored for score in item.found] or [0.0])

    async def _score(self, item: GoldenItem | GoldenInput, data: bytes | None) -> tuple[float, ...]:
        request = GroupRequest(tuple(item.captions), image=data, prompt=item.prompt, fresh=True)
        result = (await self._service.score([request], timeout_s=TIMEOUT_S, counted=False))[0]
        return tuple(score for score in result.scores if score is not None)


def _pictures(artifact: Artifact, golden: Golden) -> list[bytes | None]:
    return [None if item.image is None else read_golden_image(artifact, item.image) for item in golden.items]


def read_golden_image(artifact: Artifact, name: str) -> bytes:
    """The bytes of a golden picture; its name was checked with `golden.json`. Raises ArtifactInvalid when it has gone since."""
    path = artifact.root / name
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactInvalid(f"{path}: cannot be read ({error.strerror})") from None


def _probe_picture() -> bytes:
    ramp = np.linspace(0, 255, 168 * 112 * 3).astype(np.uint8).reshape(112, 168, 3)
    stream = io.BytesIO()
    Image.fromarray(ramp).save(stream, "PNG")
    return stream.getvalue()
