"""The loaded model against the scores it had at export, through the real queue and device."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from app.artifacts import Artifact, Golden, GoldenItem
from app.errors import ArtifactInvalid
from app.metrics import Metrics
from app.service import GroupRequest, ScoringService

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
    """Runs the artifact's golden items through a service."""

    def __init__(self, artifact: Artifact, dtype: Literal["float32", "bfloat16"], service: ScoringService, metrics: Metrics) -> None:
        self._artifact = artifact
        self._golden = artifact.golden()
        self._dtype = dtype
        self._service = service
        self._metrics = metrics

    async def run(self) -> SelfTestReport:
        """Score and compare. Raises ApiError when scoring itself fails."""
        report = await (self._probe() if self._golden is None else self._compare(self._golden))
        self._metrics.golden_error.set(report.max_error)
        return report

    async def _compare(self, golden: Golden) -> SelfTestReport:
        errors: list[float] = []
        for item in golden.items:
            scores = await self._score(self._request(item))
            errors += [abs(found - expected) for found, expected in zip(scores, item.scores, strict=True)]
        worst, tolerance = max(errors), golden.tolerance[self._dtype]
        passed = worst <= tolerance
        message = f"{len(errors)} golden scores, largest difference {worst:.2e}, tolerance {tolerance:.0e}"
        return SelfTestReport(passed, "golden", len(errors), worst, tolerance, message)

    async def _probe(self) -> SelfTestReport:
        """Without golden scores: equal captions must score equal bits, different ones must differ."""
        request = GroupRequest(_PROBE_CAPTIONS, image=_probe_picture() if self._service.takes_images else None, fresh=True)
        first, other, again = await self._score(request)
        passed = first == again and first != other
        message = "no golden scores in the artifact; `punchline convert` adds them" if passed else "the model ignores its captions"
        return SelfTestReport(passed, "probe", len(_PROBE_CAPTIONS), abs(first - again), 0.0, message)

    async def _score(self, request: GroupRequest) -> list[float]:
        result = (await self._service.score([request], timeout_s=TIMEOUT_S))[0]
        return [score for score in result.scores if score is not None]

    def _request(self, item: GoldenItem) -> GroupRequest:
        image = None if item.image is None else read_golden_image(self._artifact, item.image)
        return GroupRequest(tuple(item.captions), image=image, prompt=item.prompt, fresh=True)


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
