"""The composition root: everything is built here, opened and closed in one `async with`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import torch

from app import __version__
from app.artifacts import Artifact, open_artifact
from app.batching import Admission, Batcher
from app.caches import ByteBoundedCache
from app.contracts import EncodedImage
from app.encoding import Encoder, load_encoder
from app.errors import ApiError, ArtifactInvalid
from app.images import ImageLimits
from app.metrics import Metrics
from app.model import LoadedModel, load_model
from app.scoring import SharedPrefixScorer
from app.selftest import SelfTest, SelfTestReport
from app.service import ScoringService
from app.settings import Settings

log = logging.getLogger("punchline")


@dataclass(slots=True)
class Runtime:
    """A loaded, checked and running scorer; what the HTTP layer and the command line are given."""

    settings: Settings
    artifact: Artifact
    loaded: LoadedModel
    service: ScoringService
    batcher: Batcher
    selftest: SelfTest
    metrics: Metrics
    last_report: SelfTestReport | None = None
    draining: bool = False

    @property
    def ready(self) -> bool:
        """A golden item went through the real queue and matched, the loop is alive, and nobody asked to stop."""
        return self.last_report is not None and self.last_report.passed and self.batcher.alive and not self.draining


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Runtime]:
    """Load, start, self-test; on leaving, answer everything accepted. Raises StartRefused."""
    artifact = open_artifact(settings.model, base_model=settings.base_model, offline=settings.offline)
    if artifact.assumed:
        log.warning("%s says little about itself; assumed: %s", artifact.root, ", ".join(artifact.assumed))
    if artifact.config.description:
        log.info("%s", artifact.config.description)
    if settings.num_threads:
        torch.set_num_threads(settings.num_threads)
    encoder = load_encoder(artifact)  # before the weights: a broken processor is refused at once
    loaded = load_model(artifact, device=settings.device, dtype=settings.dtype, lora=settings.lora)
    async with AsyncExitStack() as stack:
        runtime = await _assemble(settings, artifact, encoder, loaded, stack)
        await _prove(runtime)
        yield runtime
        runtime.draining = True


async def _assemble(settings: Settings, artifact: Artifact, encoder: Encoder, loaded: LoadedModel, stack: AsyncExitStack) -> Runtime:
    metrics = Metrics()
    metrics.model_info.labels(loaded.fingerprint, artifact.config.base_model_name, loaded.dtype, loaded.device, __version__).set(1)
    admission = Admission(max_items=settings.max_queue_items, max_tokens=settings.max_queue_tokens, metrics=metrics)
    pool = stack.enter_context(ThreadPoolExecutor(settings.num_encode_threads, thread_name_prefix="encode"))
    batcher = await stack.enter_async_context(
        Batcher(
            SharedPrefixScorer(loaded.model),
            max_batch_tokens=settings.max_batch_tokens,
            admission=admission,
            metrics=metrics,
        )
    )
    service = ScoringService(
        config=artifact.config,
        encoder=encoder,
        batcher=batcher,
        admission=admission,
        limits=image_limits(settings),
        image_store=ByteBoundedCache[bytes]("images", settings.image_store_bytes, len, metrics),
        pixel_cache=ByteBoundedCache[EncodedImage]("pixels", settings.pixel_cache_bytes, lambda image: image.num_bytes, metrics),
        pool=pool,
        max_batch_tokens=settings.max_batch_tokens,
        metrics=metrics,
    )
    runtime = Runtime(settings, artifact, loaded, service, batcher, SelfTest(artifact, loaded.dtype, service, metrics), metrics)
    metrics.ready.set_function(lambda: float(runtime.ready))
    return runtime


async def _prove(runtime: Runtime) -> None:
    try:
        runtime.last_report = await runtime.selftest.run()
    except ApiError as error:
        raise ArtifactInvalid(f"{runtime.artifact.root}: self-test could not score ({error.code}: {error.message})") from error
    if not runtime.last_report.passed:
        raise ArtifactInvalid(f"{runtime.artifact.root}: self-test failed: {runtime.last_report.message}")
    log.info("self-test passed: %s", runtime.last_report.message)


def image_limits(settings: Settings) -> ImageLimits:
    """The limits on encoded images that the settings name."""
    return ImageLimits(
        max_bytes=settings.max_image_bytes,
        max_pixels=settings.max_image_pixels,
        min_side=settings.min_image_side,
        max_aspect=settings.max_image_aspect,
        formats=settings.formats,
    )
