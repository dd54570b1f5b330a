"""Every metric of the server with its buckets, in one registry of its own. Labels come from fixed lists, `model` from the settings; only
`run` is what clients say, of the few runs that are kept."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, PlatformCollector, ProcessCollector

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
_COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
_TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536)
_SCORES = (-16, -8, -4, -3, -2, -1.5, -1, -0.5, -0.25, 0, 0.25, 0.5, 1, 1.5, 2, 3, 4, 8, 16)
_SPREADS = (0.0, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10)
UNKNOWN_MODEL = "_unknown"  # label of captions for a model that is not served
CLIENT_GONE = 499  # nginx's number for it; nothing is sent, only counted


def outcome_of(status: int) -> str:
    """What became of a request, by the status of its answer."""
    if status < 400:
        return "ok"
    if status == CLIENT_GONE:
        return "cancelled"
    if status == 503:
        return "rejected"
    return "client_error" if status < 500 else "failed"


class Metrics:
    """One attribute a metric; names follow Prometheus' base units, counters end in `_total`."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        self._http()
        self._work()
        self._scored()
        self._runs()
        self._state()

    def _http(self) -> None:
        self.http_duration = self._histogram(
            "http_server_request_duration_seconds", "Time from request line to last byte.", _SECONDS,
            ("http_request_method", "http_route", "http_response_status_code"),
        )  # fmt: skip
        self.http_active = self._gauge("http_server_active_requests", "Requests being answered.", ("http_route",))
        self.lost_log_lines = self._counter("reward_lost_log_lines_total", "Lines that the log did not take, as on a full disk.")
        self.refused_connections = self._counter(
            "http_server_refused_connections_total",
            "Connections ended by the server: bad_http, head_too_large, head_timeout, idle, too_many, write_timeout.",
            ("reason",),
        )
        self.http_body_bytes = self._gauge("http_server_body_bytes", "Bytes of request bodies held, over all requests.")
        self.requests_received = self._counter(
            "reward_requests_received_total",
            "Requests for scores, images and self-tests; always those with an outcome plus the active ones.",
            ("endpoint",),
        )
        self.requests = self._counter(
            "reward_requests_total",
            "Requests for scores, images and self-tests by outcome: ok, client_error, rejected, failed, cancelled.",
            ("endpoint", "outcome"),
        )
        self.requests_by_key = self._counter(
            "http_server_requests_by_key_total", "Requests that showed a key, by the first 8 hex digits of its SHA-256.", ("key_hash",)
        )
        self.errors = self._counter("reward_errors_total", "Error answers by code.", ("endpoint", "code"))

    def _work(self) -> None:
        self.items_received = self._counter(
            "reward_items_received_total",
            "Captions of requests that could be read; always those with an outcome plus the active ones.",
            ("model",),
        )
        self.items_active = self._gauge("reward_active_items", "Captions received that have no outcome yet.", ("model",))
        self.items = self._counter(
            "reward_items_total",
            "Captions by outcome: scored, null (no score, by itself), client_error, rejected, failed, cancelled (as their request).",
            ("model", "outcome"),
        )
        self.image_fetches = self._counter(
            "reward_image_fetches_total", "Images asked for at their addresses, by outcome: ok, or the code of the error.", ("outcome",)
        )
        self.wasted_items = self._counter("reward_wasted_items_total", "Captions computed for clients that had left or no longer waited.")
        self.stage_duration = self._histogram(
            "reward_stage_duration_seconds", "Time by stage: fetch, decode, encode, queue, forward.", _SECONDS, ("stage",)
        )
        self.batch_items = self._histogram("reward_batch_items", "Captions in a batch.", _COUNTS)
        self.batch_tokens = self._histogram("reward_batch_tokens", "Tokens computed in a batch.", _TOKENS)
        self.batches = self._counter("reward_batches_total", "Batches by outcome: ok, split, failed.", ("outcome",))
        self.out_of_memory = self._counter("reward_out_of_memory_total", "Batches that did not fit into the memory of the device.")
        self.device_faults = self._counter(
            "reward_device_faults_total", "Faults that end the process, by kind: sticky, hang, memory, died, drift.", ("kind",)
        )
        self.device_busy = self._counter("reward_device_busy_seconds_total", "Time the device worked on batches; the rest it was idle.")
        self.tokens = self._counter(
            "reward_tokens_total",
            "Tokens by kind: requested (one forward a caption), computed, cached (known from earlier).",
            ("model", "kind"),
        )
        self.rejected = self._counter(
            "reward_rejected_total", "Requests refused with 503 by error code: overloaded, draining, deadline_exceeded.", ("code",)
        )
        self.cache_lookups = self._counter("reward_cache_lookups_total", "Cache lookups.", ("model", "cache", "result"))
        self.cache_audits = self._counter(
            "reward_cache_audits_total", "Hits computed again by cache: pixels, features, prefixes, scores.", ("model", "cache")
        )
        self.cache_audit_mismatches = self._counter(
            "reward_cache_audit_mismatches_total",
            "Audited hits (pixels, features, prefixes, scores) that were not what is computed now; alert on any.",
            ("model", "cache"),
        )

    def _scored(self) -> None:
        self.scores = self._histogram("reward_score", "Scores sent.", _SCORES, ("model",))
        self.score_magnitudes = self._counter(
            "reward_score_magnitude_total",
            "Magnitudes of the scores sent, by sign: positive, negative; less one another, their sum.",
            ("model", "sign"),
        )
        self.group_stddev = self._histogram(
            "reward_group_score_stddev", "Spread of the scores of one group; none means no learning signal.", _SPREADS, ("model",)
        )
        self.nonfinite = self._counter("reward_nonfinite_total", "Scores that were NaN or infinite; none is ever sent.", ("model",))

    def _runs(self) -> None:
        """Of training runs that requests name; `run` is one of the few that are kept, and its series go when it is forgotten."""
        run = ("run",)
        self.run_scores = self._histogram("reward_run_score", "Scores of a run.", _SCORES, run)
        self.run_spread = self._histogram("reward_run_group_score_stddev", "Spread of the scores of each group of a run.", _SPREADS, run)
        self.run_flat_groups = self._counter(
            "reward_run_flat_groups_total", "Groups of a run, of those in the histogram of spreads, whose scores have none.", run
        )
        self.run_duplicates = self._counter(
            "reward_run_duplicate_captions_total", "Captions of a run that stand in their group more than once.", run
        )
        self.run_repeats = self._counter("reward_run_repeated_captions_total", "Captions of a run that stood in an earlier group.", run)
        self.run_outside = self._counter(
            "reward_run_outside_captions_total",
            "Captions of a run with a score more than 3 standard deviations from the mean of the artifact's score distribution.",
            run,
        )
        self.run_unusable = self._counter(
            "reward_run_unusable_scores_total", "Scores of a run beyond float32, which are in no other metric of the run.", run
        )
        self.run_mean = self._gauge("reward_run_score_mean", "Mean score of the last groups of a run.", run)
        self.run_length_correlation = self._gauge(
            "reward_run_length_correlation",
            "Correlation of score and characters in the last groups of a run, over all if each came by itself; NaN while few or unknown.",
            run,
        )
        self.run_drift = self._gauge(
            "reward_run_drift_sigmas",
            "Mean of the last groups of a run, in standard deviations from the mean of the artifact's score distribution; NaN if unknown.",
            run,
        )
        self.run_std_ratio = self._gauge(
            "reward_run_std_ratio",
            "Standard deviation of the last groups of a run over that of the artifact's score distribution; NaN if unknown.",
            run,
        )
        self.runs = self._gauge("reward_runs", "Training runs that are watched.")
        self.runs_forgotten = self._counter("reward_runs_forgotten_total", "Training runs that made room for others.")
        self.run_faults = self._counter(
            "reward_run_monitor_faults_total", "Groups that a run's monitor failed to count; they were answered, and the log says why."
        )

    @property
    def of_runs(self) -> tuple[Histogram | Counter | Gauge, ...]:
        """All that have series of a run."""
        return (
            *(self.run_scores, self.run_spread, self.run_mean, self.run_length_correlation, self.run_drift, self.run_std_ratio),
            *(self.run_flat_groups, self.run_duplicates, self.run_repeats, self.run_outside, self.run_unusable),
        )

    def _state(self) -> None:
        self.queue_items = self._gauge("reward_queue_items", "Captions admitted and not yet answered.")
        self.queue_tokens = self._gauge("reward_queue_tokens", "Tokens admitted and not yet answered.")
        self.queue_oldest_age = self._gauge("reward_queue_oldest_age_seconds", "Age of the job that waits longest for the device.")
        self.cache_bytes = self._gauge("reward_cache_bytes", "Memory a cache holds.", ("model", "cache"))
        self.cache_max_bytes = self._gauge("reward_cache_max_bytes", "Memory a cache may hold.", ("model", "cache"))
        self.cache_entries = self._gauge("reward_cache_entries", "Entries a cache holds.", ("model", "cache"))
        self.heartbeat = self._gauge(
            "reward_batcher_heartbeat_timestamp_seconds", "When both threads of the batch loop were last seen alive; alert when it is old."
        )
        self.draining = self._gauge("reward_draining", "1 from the signal to stop on.")
        self.golden_error = self._gauge(
            "reward_golden_last_error", "Largest golden score error when last looked at, by self-test or canary.", ("model",)
        )
        self.golden_drift = self._gauge(
            "reward_golden_drift", "Score of a golden item when the canary last looked, minus what it must be.", ("model", "case")
        )
        self.golden_tolerance = self._gauge("reward_golden_tolerance", "What a golden score may differ by.", ("model",))
        self.golden_success = self._gauge(
            "reward_golden_last_success_timestamp_seconds",
            "When the canary last found a golden score right; 0 while it is switched off.",
            ("model",),
        )
        self.ready = self._gauge("reward_ready", "1 while golden scores match and nothing is draining.")
        self.model_info = self._gauge(
            "reward_model_info", "What is loaded.", ("model", "fingerprint", "base", "dtype", "device", "version")
        )

    def _histogram(self, name: str, text: str, buckets: Sequence[float], labels: Sequence[str] = ()) -> Histogram:
        return Histogram(name, text, labels, registry=self.registry, buckets=buckets)

    def _counter(self, name: str, text: str, labels: Sequence[str] = ()) -> Counter:
        return Counter(name, text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str, labels: Sequence[str] = ()) -> Gauge:
        return Gauge(name, text, labels, registry=self.registry)
