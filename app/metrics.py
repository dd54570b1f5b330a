"""Every metric of the server with its buckets, in one registry of its own. Labels come from fixed lists."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_SCORES = (-16, -8, -4, -3, -2, -1.5, -1, -0.5, -0.25, 0, 0.25, 0.5, 1, 1.5, 2, 3, 4, 8, 16)
_SPREADS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)


class Metrics:
    """One attribute a metric; names follow Prometheus' base units, counters end in `_total`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._http()
        self._work()
        self._state()

    def _http(self) -> None:
        self.http_duration = self._histogram(
            "http_server_request_duration_seconds", "Time from request line to last byte.", _SECONDS,
            ("http_request_method", "http_route", "http_response_status_code"),
        )  # fmt: skip
        self.http_active = self._gauge("http_server_active_requests", "Requests being answered.", ("http_route",))
        self.requests = self._counter(
            "reward_requests_total", "Scoring requests by outcome: ok, client_error, rejected, failed, cancelled.", ("endpoint", "outcome")
        )
        self.errors = self._counter("reward_errors_total", "Error answers by code.", ("endpoint", "code"))

    def _work(self) -> None:
        self.items = self._counter(
            "reward_items_total", "Captions by outcome: scored, null (no score, by itself), failed (with its request).", ("outcome",)
        )
        self.scores = self._histogram("reward_score", "Scores sent.", _SCORES)
        self.group_stddev = self._histogram(
            "reward_group_score_stddev", "Spread of the scores of one group; none means no learning signal.", _SPREADS
        )
        self.nonfinite = self._counter("reward_nonfinite_total", "Scores that were NaN or infinite; none is ever sent.")
        self.stage_duration = self._histogram(
            "reward_stage_duration_seconds", "Time by stage: decode, encode, queue, forward.", _SECONDS, ("stage",)
        )
        self.batch_items = self._histogram("reward_batch_items", "Captions in a batch.", _COUNTS)
        self.batch_tokens = self._histogram("reward_batch_tokens", "Tokens computed in a batch.", _TOKENS)
        self.batches = self._counter("reward_batches_total", "Batches by outcome: ok, split, failed.", ("outcome",))
        self.out_of_memory = self._counter("reward_out_of_memory_total", "Batches that did not fit into the memory of the device.")
        self.device_busy = self._counter("reward_device_busy_seconds_total", "Time the device worked on batches; the rest it was idle.")
        self.tokens = self._counter(
            "reward_tokens_total", "Tokens by kind: requested (one forward a caption), computed, cached (known from earlier).", ("kind",)
        )
        self.rejected = self._counter(
            "reward_rejected_total", "Requests refused with 503 by error code: overloaded, draining, deadline_exceeded.", ("code",)
        )
        self.cache_lookups = self._counter("reward_cache_lookups_total", "Cache lookups.", ("cache", "result"))
        self.cache_audits = self._counter(
            "reward_cache_audits_total", "Hits computed again by cache: features, prefixes, scores.", ("cache",)
        )
        self.cache_audit_mismatches = self._counter(
            "reward_cache_audit_mismatches_total",
            "Audited hits (features, prefixes, scores) that were not what is computed now; alert on any.",
            ("cache",),
        )

    def _state(self) -> None:
        self.queue_items = self._gauge("reward_queue_items", "Captions admitted and not yet answered.")
        self.queue_tokens = self._gauge("reward_queue_tokens", "Tokens admitted and not yet answered.")
        self.queue_oldest_age = self._gauge("reward_queue_oldest_age_seconds", "Age of the job that waits longest for the device.")
        self.cache_bytes = self._gauge("reward_cache_bytes", "Memory a cache holds.", ("cache",))
        self.cache_entries = self._gauge("reward_cache_entries", "Entries a cache holds.", ("cache",))
        self.golden_error = self._gauge("reward_golden_last_error", "Largest golden score error of the last self-test.")
        self.ready = self._gauge("reward_ready", "1 while golden scores match and nothing is draining.")
        self.model_info = self._gauge("reward_model_info", "What is loaded.", ("fingerprint", "base", "dtype", "device", "version"))

    def _histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=buckets)

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)
