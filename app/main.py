"""The composition root: everything is built here, opened and closed in one `async with`."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass

import torch

from app.admission import Admission
from app.artifacts import Artifact, open_artifact
from app.batching import Batcher
from app.budgets import Budgets, share_out
from app.caches import ByteBoundedCache
from app.canary import Canary
from app.encoding import Encoder, load_encoder
from app.engine import Engine
from app.errors import ArtifactInvalid, DeviceFault, DeviceHung, OutOfMemory, SettingsInvalid
from app.fetching import fetcher_of
from app.hardware import Hardware, find_hardware, free_bytes
from app.images import check_limits, image_limits
from app.lanes import Lane, LanesScorer
from app.layers import compiled_steps, prepack
from app.machine import keep_large_blocks_at_hand, num_processors, share_one_heap
from app.metrics import Metrics
from app.model import load_model
from app.monitors import RunMonitors, expected_of
from app.served import Common, Parts, ServedModel, build, build_scorer, check_parts, prove
from app.settings import Settings
from app.sharing import SharedBases

log = logging.getLogger("punchline")
_PRACTICE_TOKENS, _MIN_PRACTICE_TOKENS = 1024, 64  # of the batch that is measured on a CPU, where the whole would take a minute
_ENTRY_BYTES = 400  # of a stored image beside its own: millions of tiny ones would else take far more than they count
_MAX_GPU_BATCH_S, _MAX_CPU_BATCH_S = 60.0, 600.0  # a batch that takes longer will not come back
_PATIENCE = 4  # times what a full batch would take at the speed of the self-test


@dataclass(slots=True)
class Runtime:
    """Loaded, checked and running models on one device; what the HTTP layer and the command line are given."""

    settings: Settings
    models: Mapping[str, ServedModel]  # by name; the first is who answers a request that names none
    budgets: Budgets
    hardware: Hardware
    batcher: Batcher
    metrics: Metrics
    admission: Admission
    awaits_proof: bool = False  # nobody is told of readiness before a golden item went through the port
    draining: bool = False

    @property
    def first(self) -> ServedModel:
        return next(iter(self.models.values()))

    @property
    def ready(self) -> bool:
        """Every model's golden scores match, the loop is alive, and nobody asked to stop."""
        are_right = all(model.is_right for model in self.models.values())
        return are_right and self.batcher.alive and not self.draining and not self.awaits_proof

    def begin_drain(self) -> None:
        """Not ready from now on; everything is still answered."""
        self.draining = True
        for model in self.models.values():
            if model.canary is not None:
                model.canary.stop()


@asynccontextmanager
async def running(settings: Settings) -> AsyncIterator[Runtime]:
    """Load, start, self-test; on leaving, answer everything accepted. Raises StartRefused."""
    artifacts = {name: _opened(settings, name, place) for name, place in settings.artifacts.items()}
    torch.set_num_threads(settings.num_threads or num_processors())
    async with started(settings, load_parts(settings, artifacts)) as runtime:
        yield runtime


def _opened(settings: Settings, name: str, place: str) -> Artifact:
    with _naming(settings, name):
        artifact = open_artifact(
            place,
            base_model=settings.base_model,
            offline=settings.offline,
            require_pinned=settings.require_pinned,
            in_company=len(settings.artifacts) > 1,
        )
    if artifact.assumed:
        log.warning("%s says little about itself; assumed: %s", artifact.root, ", ".join(artifact.assumed))
    if artifact.config.description:
        log.info("%s", artifact.config.description)
    return artifact


def load_parts(settings: Settings, artifacts: Mapping[str, Artifact]) -> list[Parts]:
    """Every model's processor, then every model's weights: those of one base are shared. Raises ArtifactInvalid."""
    encoders: dict[str, Encoder] = {}
    for name, artifact in artifacts.items():
        with _naming(settings, name):
            encoders[name] = load_encoder(artifact)  # before the weights: a broken processor is refused at once
            check_limits(image_limits(settings), encoders[name])
    bases = SharedBases(list(artifacts.values())) if len(artifacts) > 1 else None
    found = []
    for name, artifact in artifacts.items():
        with _naming(settings, name):
            loaded = load_model(
                artifact,
                device=settings.device,
                dtype=settings.dtype,
                lora=settings.lora,
                switches={"compile": settings.compile, "deterministic": settings.deterministic},
                leave_mapped=True,  # the engine packs most of it, which copies as well
                bases=bases,
            )
        found.append(Parts(name, artifact, encoders[name], loaded))
    return found


@asynccontextmanager
async def started(settings: Settings, parts: Sequence[Parts]) -> AsyncIterator[Runtime]:
    """What was loaded, checked and running. Raises StartRefused."""
    async with AsyncExitStack() as stack:
        findings = {}
        for each in parts:
            with _naming(settings, each.name):
                findings[each.name] = check_parts(each)
        runtime, common = await _assemble(settings, parts, stack)
        for name, model in runtime.models.items():
            model.findings += findings[name]
            await _begin(runtime, model, common, stack)
        yield runtime
        runtime.begin_drain()


async def _begin(runtime: Runtime, model: ServedModel, common: Common, stack: AsyncExitStack) -> None:
    """Prove a model, then watch over it."""
    try:
        with _naming(runtime.settings, model.name):
            cases = await prove(model, common)
    except (DeviceFault, DeviceHung):
        raise await runtime.batcher.broken() from None
    _be_patient(runtime)
    model.canary = await stack.enter_async_context(
        Canary(
            model.lane,
            cases,
            tolerance=model.selftest.tolerance,
            every_s=runtime.settings.canary_s,
            metrics=runtime.metrics,
            model=model.name,
        )
    )


async def _assemble(settings: Settings, parts: Sequence[Parts], stack: AsyncExitStack) -> tuple[Runtime, Common]:
    metrics, device = Metrics(), torch.device(parts[0].loaded.device)
    if device.type == "cuda":
        share_one_heap()
    else:
        keep_large_blocks_at_hand()
    engines = _engines(parts)
    budgets = _budgets(settings, engines, parts, device, stack)
    scorers = {each.name: build_scorer(each, engines[each.name], settings, budgets, metrics, len(parts)) for each in parts}
    admission = Admission(max_items=settings.max_queue_items, max_tokens=settings.max_queue_tokens, metrics=metrics)
    batcher = await stack.enter_async_context(
        Batcher(
            LanesScorer(scorers),
            max_batch_tokens=budgets.max_batch_tokens,
            admission=admission,
            metrics=metrics,
            max_batch_s=settings.max_batch_s or (_MAX_GPU_BATCH_S if device.type == "cuda" else _MAX_CPU_BATCH_S),
        )
    )
    common = Common(
        settings=settings,
        budgets=budgets,
        admission=admission,
        metrics=metrics,
        monitors=_monitors(settings, parts, metrics),
        pool=stack.enter_context(ThreadPoolExecutor(settings.num_encode_threads, thread_name_prefix="encode")),
        image_store=ByteBoundedCache[bytes]("images", settings.image_store_bytes, lambda data: len(data) + _ENTRY_BYTES, metrics),
        num_models=len(parts),
        fetcher=fetcher_of(settings, metrics),
    )
    models = {each.name: build(each, engines[each.name], scorers[each.name], Lane(batcher, each.name), common) for each in parts}
    runtime = Runtime(settings, models, budgets, find_hardware(device), batcher, metrics, admission)
    metrics.ready.set_function(lambda: float(runtime.ready))
    metrics.draining.set_function(lambda: float(runtime.draining))
    return runtime, common


def _engines(parts: Sequence[Parts]) -> dict[str, Engine]:
    """Weights that models share are packed once, before any engine looks at them."""
    if len(parts) > 1:
        prepack(*(each.loaded.model.backbone for each in parts))
    return {each.name: Engine(each.loaded.model) for each in parts}


def _monitors(settings: Settings, parts: Sequence[Parts], metrics: Metrics) -> RunMonitors:
    first, *further = [(each.name, expected_of(each.artifact.config)) for each in parts]
    return RunMonitors(settings.max_runs, first[1], metrics, further=dict(further))


def _budgets(
    settings: Settings, engines: Mapping[str, Engine], parts: Sequence[Parts], device: torch.device, stack: AsyncExitStack
) -> Budgets:
    own = list(engines.values())
    max_row_tokens = max(each.encoder.max_row_tokens for each in parts)
    if settings.compile:
        stack.enter_context(compiled_steps(device))
        log.info("compiling")
        measured_budgets(settings, own, max_row_tokens, device)  # compiles; what that takes is in no batch's budget
    budgets = measured_budgets(settings, own, max_row_tokens, device)
    log.info("memory: %s", budgets.as_dict())
    return budgets


def measured_budgets(settings: Settings, engines: Sequence[Engine], max_row_tokens: int, device: torch.device) -> Budgets:
    """What a batch and the caches may take of the memory that loading left. Raises SettingsInvalid when nothing would fit.

    A batch is as large as the model that takes most for a token allows: a batch may be all its own.
    """
    bytes_per_token = max(_bytes_per_token(settings, engine, device) for engine in engines)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what practice left in torch's hands is free as well
    left = free_bytes(device)
    host_caches = settings.image_store_bytes + settings.pixel_cache_bytes + settings.score_cache_bytes
    if left is not None and device.type != "cuda":
        left = max(0, left - host_caches)
    return share_out(
        left_bytes=left,
        bytes_per_token=bytes_per_token,
        max_batch_tokens=settings.max_batch_tokens,
        min_batch_tokens=max_row_tokens,
        prefix_cache_bytes=settings.prefix_cache_bytes,
        feature_cache_bytes=settings.feature_cache_bytes,
        on_host=device.type != "cuda",
    )


def _bytes_per_token(settings: Settings, engine: Engine, device: torch.device) -> int:
    tokens = settings.max_batch_tokens if device.type == "cuda" else min(settings.max_batch_tokens, _PRACTICE_TOKENS)
    bytes_per_token = 0
    while not bytes_per_token:
        try:
            bytes_per_token = engine.measure_bytes_per_token(tokens)
        except OutOfMemory:
            if tokens <= _MIN_PRACTICE_TOKENS:
                raise SettingsInvalid(f"the model leaves no memory for a batch of {tokens} tokens on {device}") from None
            tokens //= 2
    return bytes_per_token


def _be_patient(runtime: Runtime) -> None:
    """A full batch on a slow machine may take longer than any fixed limit; what was measured says how long."""
    speed = runtime.admission.tokens_per_s
    if runtime.settings.max_batch_s is None and speed:
        longest_s = _PATIENCE * runtime.budgets.max_batch_tokens / speed
        runtime.batcher.max_batch_s = max(runtime.batcher.max_batch_s, longest_s)


@contextmanager
def _naming(settings: Settings, name: str) -> Iterator[None]:
    """Where there are several models, a refusal says which."""
    try:
        yield
    except ArtifactInvalid as error:
        if len(settings.artifacts) == 1:
            raise
        raise ArtifactInvalid(f"model {name}: {error}") from error.__cause__
