"""One model of a server: opened, loaded and built, with its own caches, lane and golden scores, and every check of it before it is ready.

Knows nothing of the models beside it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from concurrent.futures import Executor
from dataclasses import dataclass, field

import torch

from app import __version__, startcheck
from app.admission import Admission
from app.artifacts import Artifact
from app.budgets import Budgets
from app.caches import ByteBoundedCache
from app.canary import Canary
from app.contracts import EncodedImage
from app.encoding import Encoder
from app.engine import Engine
from app.errors import ApiError, ArtifactInvalid, DeviceFault, DeviceHung, ScoringFailed
from app.fetching import Fetcher
from app.golden import GOLDEN_TOLERANCE, GoldenCase
from app.images import image_limits
from app.lanes import Lane
from app.metrics import Metrics
from app.model import LoadedModel
from app.monitors import RunMonitors
from app.reuse import Caches, KeptPrefix, ReusingScorer
from app.selftest import TIMEOUT_S, SelfTest, SelfTestReport
from app.service import ScoringService
from app.settings import Settings
from app.startcheck import Finding

log = logging.getLogger("punchline")
TensorScorer = ReusingScorer[torch.Tensor, torch.Tensor]
_SCORE_BYTES, _ENTRY_BYTES = 700, 1000  # of a score, and of an entry beside its tensors: keys and places in the cache


@dataclass(frozen=True, slots=True)
class Parts:
    """A model in memory, under the name that requests give it."""

    name: str
    artifact: Artifact
    encoder: Encoder
    loaded: LoadedModel


@dataclass(frozen=True, slots=True)
class Common:
    """What all models of a server have in common."""

    settings: Settings
    budgets: Budgets  # its caches are those of all models together
    admission: Admission
    metrics: Metrics
    monitors: RunMonitors
    pool: Executor
    image_store: ByteBoundedCache[bytes]
    num_models: int = 1
    fetcher: Fetcher | None = None


@dataclass(slots=True)
class ServedModel:
    """A model that answers, once it is proved."""

    name: str
    artifact: Artifact
    encoder: Encoder
    loaded: LoadedModel
    engine: Engine
    scorer: TensorScorer
    lane: Lane
    service: ScoringService
    selftest: SelfTest
    last_report: SelfTestReport | None = None
    findings: list[Finding] = field(default_factory=list)  # of the start
    num_golden_tokens: list[int] = field(default_factory=list)  # of every golden item, or of the probe
    canary: Canary | None = None

    @property
    def parts(self) -> Parts:
        return Parts(self.name, self.artifact, self.encoder, self.loaded)

    @property
    def is_right(self) -> bool:
        """Golden items went through the real queue and matched, lately as well."""
        return self.last_report is not None and self.last_report.passed and (self.canary is None or self.canary.is_well)

    @property
    def smallest_case(self) -> int:
        """The golden item that costs least."""
        return min(range(len(self.num_golden_tokens)), key=self.num_golden_tokens.__getitem__)

    async def run_selftest(self) -> SelfTestReport:
        """Golden scores, now. Raises ApiError when scoring itself fails."""
        try:
            self.last_report = await self.selftest.run()
        except ScoringFailed as error:  # golden captions that get no score are as wrong as those that get another one
            self.last_report = self.selftest.failed(error)
            raise
        return self.last_report


def check_parts(parts: Parts) -> list[Finding]:
    """What can be said of a model as it was loaded: its engine packs layers into modules of their own. Raises ArtifactInvalid."""
    findings = held(parts.artifact, startcheck.of_artifact(parts.artifact.config))
    return findings + held(parts.artifact, startcheck.of_model(parts.loaded.model))


def build(parts: Parts, engine: Engine, scorer: TensorScorer, lane: Lane, common: Common) -> ServedModel:
    """A model's service around its scorer."""
    settings, metrics, config, loaded = common.settings, common.metrics, parts.artifact.config, parts.loaded
    metrics.model_info.labels(parts.name, loaded.fingerprint, config.base_model_name, loaded.dtype, loaded.device, __version__).set(1)
    pixel_bytes = settings.pixel_cache_bytes // common.num_models
    service = ScoringService(
        config=config,
        encoder=parts.encoder,
        batcher=lane,
        admission=common.admission,
        limits=image_limits(settings),
        image_store=common.image_store,
        pixel_cache=ByteBoundedCache[EncodedImage]("pixels", pixel_bytes, lambda image: image.num_bytes, metrics, parts.name),
        pool=common.pool,
        max_batch_tokens=common.budgets.max_batch_tokens,
        metrics=metrics,
        monitors=common.monitors,
        audit_every=settings.cache_audit_every,
        correct=scorer.correct,
        model=parts.name,
        fetcher=common.fetcher,
    )
    selftest = SelfTest(parts.artifact, loaded.dtype, service, metrics)
    return ServedModel(parts.name, parts.artifact, parts.encoder, loaded, engine, scorer, lane, service, selftest)


def build_scorer(parts: Parts, engine: Engine, settings: Settings, budgets: Budgets, metrics: Metrics, num_models: int = 1) -> TensorScorer:
    """The scorer of a model, its caches of the sizes that the budgets say, or of its share of them."""
    name, num_score_bytes = parts.name, settings.score_cache_bytes // num_models
    caches = Caches(
        features=ByteBoundedCache[torch.Tensor](
            "features", budgets.feature_cache_bytes // num_models, lambda features: features.nbytes, metrics, name
        ),
        prefixes=ByteBoundedCache[KeptPrefix[torch.Tensor]](
            "prefixes", budgets.prefix_cache_bytes // num_models, lambda kept: kept.num_bytes + _ENTRY_BYTES, metrics, name
        ),
        scores=ByteBoundedCache[float]("scores", num_score_bytes, lambda _: _SCORE_BYTES, metrics, name),
    )
    return ReusingScorer(
        engine,
        caches,
        fingerprint=parts.loaded.fingerprint,
        metrics=metrics,
        score_tolerance=GOLDEN_TOLERANCE[parts.loaded.dtype],
        deterministic=settings.deterministic,
        audit_every=settings.cache_audit_every,
        lead_ids=parts.encoder.lead_ids,
        model=name,
    )


async def prove(model: ServedModel, common: Common) -> list[GoldenCase]:
    """Every check of the start, what costs least first. Returns what may be asked again. Raises ArtifactInvalid at the first that fails.

    Raises DeviceFault, DeviceHung, which are no fault of the artifact's.
    """
    selftest, artifact, encoder, limits = model.selftest, model.artifact, model.encoder, image_limits(common.settings)
    model.findings += held(artifact, [startcheck.specials(encoder)])
    if selftest.golden is not None:
        model.findings += held(artifact, [startcheck.recipe(selftest.golden, artifact.config)])
        model.findings += held(artifact, startcheck.of_encoding(selftest.golden, selftest.cases(encoder, limits), encoder))
    try:
        model.last_report = await selftest.run()
        model.findings += held(artifact, selftest.findings)
        cases = selftest.cases(encoder, limits)
        model.num_golden_tokens = [case.group.num_tokens for case in cases]
        model.findings += held(artifact, await _rehearse(model, common))
    except (DeviceFault, DeviceHung):
        raise
    except ApiError as error:
        raise ArtifactInvalid(f"{artifact.root}: self-test could not score ({error.code}: {error.message})") from error
    log.info("self-test passed: %s", model.last_report.message)
    return cases


async def _rehearse(model: ServedModel, common: Common) -> list[Finding]:
    selftest, budgets, number = model.selftest, common.budgets, model.smallest_case
    return await startcheck.live(
        model.lane,
        model.encoder,
        selftest.asked[number],
        selftest.scored[number],
        margins=startcheck.Margins(
            noise=0.0 if common.settings.deterministic else selftest.tolerance, least=selftest.least, max_tokens=budgets.max_batch_tokens
        ),
        deadline=time.monotonic() + TIMEOUT_S,
        tokens_per_s=common.admission.tokens_per_s,
    )


def held(artifact: Artifact, findings: Iterable[Finding]) -> list[Finding]:
    """The findings, one after the other. Raises ArtifactInvalid at the first that failed."""
    kept = []
    for finding in findings:
        kept.append(finding)
        if not finding.passed:
            raise ArtifactInvalid(f"{artifact.root}: self-test failed: {finding}")
    return kept
