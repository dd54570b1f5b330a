"""The composition root: everything is built here, opened and closed in one `async with`."""

from __future__ import annotations

import logging
import time
from collections.abc import AsyncIterator, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field

import torch

from app import __version__, startcheck
from app.admission import Admission
from app.artifacts import Artifact, open_artifact
from app.batching import Batcher
from app.budgets import Budgets, share_out
from app.caches import ByteBoundedCache
from app.canary import Canary
from app.contracts import EncodedImage
from app.encoding import Encoder, load_encoder
from app.engine import Engine
from app.errors import ApiError, ArtifactInvalid, DeviceFault, DeviceHung, OutOfMemory, SettingsInvalid
from app.golden import GOLDEN_TOLERANCE, GoldenCase
from app.hardware import Hardware, find_hardware
from app.images import ImageLimits, check_limits
from app.layers import compiled_steps
from app.machine import available_bytes, num_processors
from app.metrics import Metrics
from app.model import LoadedModel, load_model
from app.monitors import RunMonitors, expected_of
from app.reuse import Caches, KeptPrefix, ReusingScorer
from app.selftest import TIMEOUT_S, SelfTest, SelfTestReport
from app.service import ScoringService
from app.settings import Settings
from app.startcheck import Finding

log = logging.getLogger("punchline")
TensorScorer = ReusingScorer[torch.Tensor, torch.Tensor]
_PRACTICE_TOKENS, _MIN_PRACTICE_TOKENS = 1024, 64  # of the batch that is measured on a CPU, where the whole would take a minute
_MAX_GPU_BATCH_S, _MAX_CPU_BATCH_S = 60.0, 600.0  # a batch that takes longer will not come back
_PATIENCE = 4  # times what a full batch would take at the speed of the self-test
_SCORE_BYTES, _ENTRY_BYTES = 700, 1000  # of a score, and of an entry beside its tensors: keys and places in the cache


@dataclass(slots=True)
class Runtime:
    """A loaded, checked and running scorer; what the HTTP layer and the command line are given."""

    settings: Settings
    artifact: Artifact
    loaded: LoadedModel
    engine: Engine
    scorer: TensorScorer
    budgets: Budgets
    hardware: Hardware
    service: ScoringService
    batcher: Batcher
    selftest: SelfTest
    metrics: Metrics
    admission: Admission
    last_report: SelfTestReport | None = None
    findings: list[Finding] = field(default_factory=list)  # of the start
    num_golden_tokens: list[int] = field(default_factory=list)  # of every golden item, or of the probe
    awaits_proof: bool = False  # nobody is told of readiness before a golden item went through the port
    canary: Canary | None = None
    draining: bool = False

    @property
    def ready(self) -> bool:
        """Golden items went through the real queue and matched, lately as well, the loop is alive, and nobody asked to stop."""
        is_right = self.last_report is not None and self.last_report.passed and (self.canary is None or self.canary.is_well)
        return is_right and self.batcher.alive and not self.draining and not self.awaits_proof

    @property
    def smallest_case(self) -> int:
        """The golden item that costs least."""
        return min(range(len(self.num_golden_tokens)), key=self.num_golden_tokens.__getitem__)

    def begin_drain(self) -> None:
        """Not ready from now on; everything is still answered."""
        self.draining = True
        if self.canary is not None:
            self.canary.stop()


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Runtime]:
    """Load, start, self-test; on leaving, answer everything accepted. Raises StartRefused."""
    artifact = open_artifact(
        settings.model, base_model=settings.base_model, offline=settings.offline, require_pinned=settings.require_pinned
    )
    if artifact.assumed:
        log.warning("%s says little about itself; assumed: %s", artifact.root, ", ".join(artifact.assumed))
    if artifact.config.description:
        log.info("%s", artifact.config.description)
    torch.set_num_threads(settings.num_threads or num_processors())
    encoder = load_encoder(artifact)  # before the weights: a broken processor is refused at once
    check_limits(image_limits(settings), encoder)
    loaded = load_model(
        artifact,
        device=settings.device,
        dtype=settings.dtype,
        lora=settings.lora,
        switches={"compile": settings.compile, "deterministic": settings.deterministic},
        leave_mapped=True,  # the engine packs most of it, which copies as well
    )
    async with started(settings, artifact, encoder, loaded) as runtime:
        yield runtime


@asynccontextmanager
async def started(settings: Settings, artifact: Artifact, encoder: Encoder, loaded: LoadedModel) -> AsyncIterator[Runtime]:
    """What was loaded, checked and running. Raises StartRefused."""
    async with AsyncExitStack() as stack:
        findings = _held(artifact, startcheck.of_artifact(artifact.config))
        findings += _held(artifact, startcheck.of_model(loaded.model))  # as loaded: the engine packs layers into modules of its own
        runtime = await _assemble(settings, artifact, encoder, loaded, stack)
        runtime.findings += findings
        cases = await _prove(runtime, encoder)
        runtime.canary = await stack.enter_async_context(
            Canary(runtime.batcher, cases, tolerance=runtime.selftest.tolerance, every_s=settings.canary_s, metrics=runtime.metrics)
        )
        yield runtime
        runtime.begin_drain()


async def _assemble(settings: Settings, artifact: Artifact, encoder: Encoder, loaded: LoadedModel, stack: AsyncExitStack) -> Runtime:
    metrics = Metrics()
    metrics.model_info.labels(loaded.fingerprint, artifact.config.base_model_name, loaded.dtype, loaded.device, __version__).set(1)
    engine = Engine(loaded.model)
    if settings.compile:
        stack.enter_context(compiled_steps(torch.device(loaded.device)))
        log.info("compiling")
        measured_budgets(settings, engine, encoder, torch.device(loaded.device))  # compiles; what that takes is in no batch's budget
    budgets = measured_budgets(settings, engine, encoder, torch.device(loaded.device))
    log.info("memory: %s", budgets.as_dict())
    scorer = build_scorer(settings, engine, encoder, budgets, loaded, metrics)
    admission = Admission(max_items=settings.max_queue_items, max_tokens=settings.max_queue_tokens, metrics=metrics)
    pool = stack.enter_context(ThreadPoolExecutor(settings.num_encode_threads, thread_name_prefix="encode"))
    batcher = await stack.enter_async_context(
        Batcher(
            scorer,
            max_batch_tokens=budgets.max_batch_tokens,
            admission=admission,
            metrics=metrics,
            max_batch_s=settings.max_batch_s or (_MAX_GPU_BATCH_S if loaded.device.startswith("cuda") else _MAX_CPU_BATCH_S),
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
        max_batch_tokens=budgets.max_batch_tokens,
        metrics=metrics,
        monitors=RunMonitors(settings.max_runs, expected_of(artifact.config), metrics),
        audit_every=settings.cache_audit_every,
        forget=scorer.forget,
    )
    selftest = SelfTest(artifact, loaded.dtype, service, metrics)
    hardware = find_hardware(torch.device(loaded.device))
    runtime = Runtime(settings, artifact, loaded, engine, scorer, budgets, hardware, service, batcher, selftest, metrics, admission)
    metrics.ready.set_function(lambda: float(runtime.ready))
    metrics.draining.set_function(lambda: float(runtime.draining))
    return runtime


def measured_budgets(settings: Settings, engine: Engine, encoder: Encoder, device: torch.device) -> Budgets:
    """What a batch and the caches may take of the memory that loading left. Raises SettingsInvalid when nothing would fit."""
    tokens = settings.max_batch_tokens if device.type == "cuda" else min(settings.max_batch_tokens, _PRACTICE_TOKENS)
    bytes_per_token = 0
    while not bytes_per_token:
        try:
            bytes_per_token = engine.measure_bytes_per_token(tokens)
        except OutOfMemory:
            if tokens <= _MIN_PRACTICE_TOKENS:
                raise SettingsInvalid(f"the model leaves no memory for a batch of {tokens} tokens on {device}") from None
            tokens //= 2
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what practice left in torch's hands is free as well
    left = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_bytes()
    host_caches = settings.image_store_bytes + settings.pixel_cache_bytes + settings.score_cache_bytes
    if left is not None and device.type != "cuda":
        left = max(0, left - host_caches)
    return share_out(
        left_bytes=left,
        bytes_per_token=bytes_per_token,
        max_batch_tokens=settings.max_batch_tokens,
        min_batch_tokens=encoder.max_row_tokens,
        prefix_cache_bytes=settings.prefix_cache_bytes,
        feature_cache_bytes=settings.feature_cache_bytes,
        on_host=device.type != "cuda",
    )


def build_scorer(
    settings: Settings, engine: Engine, encoder: Encoder, budgets: Budgets, loaded: LoadedModel, metrics: Metrics
) -> TensorScorer:
    """The scorer of the device thread, its caches of the sizes that the budgets say."""
    caches = Caches(
        features=ByteBoundedCache[torch.Tensor]("features", budgets.feature_cache_bytes, lambda features: features.nbytes, metrics),
        prefixes=ByteBoundedCache[KeptPrefix[torch.Tensor]](
            "prefixes", budgets.prefix_cache_bytes, lambda kept: kept.num_bytes + _ENTRY_BYTES, metrics
        ),
        scores=ByteBoundedCache[float]("scores", settings.score_cache_bytes, lambda _: _SCORE_BYTES, metrics),
    )
    return ReusingScorer(
        engine,
        caches,
        fingerprint=loaded.fingerprint,
        metrics=metrics,
        score_tolerance=GOLDEN_TOLERANCE[loaded.dtype],
        deterministic=settings.deterministic,
        audit_every=settings.cache_audit_every,
        lead_ids=encoder.lead_ids,
    )


async def _prove(runtime: Runtime, encoder: Encoder) -> list[GoldenCase]:
    """Every check of the start, what costs least first. Returns what may be asked again. Raises ArtifactInvalid at the first that fails."""
    selftest, artifact, limits = runtime.selftest, runtime.artifact, image_limits(runtime.settings)
    runtime.findings += _held(artifact, [startcheck.specials(encoder)])
    if selftest.golden is not None:
        runtime.findings += _held(artifact, [startcheck.recipe(selftest.golden, artifact.config)])
        runtime.findings += _held(artifact, startcheck.of_encoding(selftest.golden, selftest.cases(encoder, limits)))
    try:
        runtime.last_report = await selftest.run()
        runtime.findings += _held(artifact, selftest.findings)
        cases = selftest.cases(encoder, limits)
        runtime.num_golden_tokens = [case.group.num_tokens for case in cases]
        runtime.findings += _held(artifact, await _rehearse(runtime, encoder))
    except (DeviceFault, DeviceHung):  # no fault of the artifact's
        raise await runtime.batcher.broken() from None
    except ApiError as error:
        raise ArtifactInvalid(f"{artifact.root}: self-test could not score ({error.code}: {error.message})") from error
    log.info("self-test passed: %s", runtime.last_report.message)
    _be_patient(runtime)
    return cases


def _be_patient(runtime: Runtime) -> None:
    """A full batch on a slow machine may take longer than any fixed limit; what was measured says how long."""
    speed = runtime.admission.tokens_per_s
    if runtime.settings.max_batch_s is None and speed:
        longest_s = _PATIENCE * runtime.budgets.max_batch_tokens / speed
        runtime.batcher.max_batch_s = max(runtime.batcher.max_batch_s, longest_s)


async def _rehearse(runtime: Runtime, encoder: Encoder) -> list[Finding]:
    selftest, budgets, number = runtime.selftest, runtime.budgets, runtime.smallest_case
    return await startcheck.live(
        runtime.batcher,
        encoder,
        selftest.asked[number],
        selftest.scored[number],
        margins=startcheck.Margins(
            noise=0.0 if runtime.settings.deterministic else selftest.tolerance, least=selftest.least, max_tokens=budgets.max_batch_tokens
        ),
        deadline=time.monotonic() + TIMEOUT_S,
        tokens_per_s=runtime.admission.tokens_per_s,
    )


def _held(artifact: Artifact, findings: Iterable[Finding]) -> list[Finding]:
    """The findings, one after the other. Raises ArtifactInvalid at the first that failed."""
    held = []
    for finding in findings:
        held.append(finding)
        if not finding.passed:
            raise ArtifactInvalid(f"{artifact.root}: self-test failed: {finding}")
    return held


def image_limits(settings: Settings) -> ImageLimits:
    """The limits on encoded images that the settings name."""
    return ImageLimits(
        max_bytes=settings.max_image_bytes,
        max_pixels=settings.max_image_pixels,
        min_side=settings.min_image_side,
        max_aspect=settings.max_image_aspect,
        formats=settings.formats,
    )
