"""A reusing scorer around an engine, with caches of given sizes."""

from __future__ import annotations

from typing import Any

from app.caches import ByteBoundedCache
from app.contracts import Ids
from app.metrics import Metrics
from app.reuse import Backend, Caches, KeptPrefix, ReusingScorer


def reusing(
    backend: Backend[Any, Any],
    *,
    metrics: Metrics | None = None,
    feature_bytes: int = 1 << 24,
    prefix_bytes: int = 1 << 26,
    score_bytes: int = 1 << 20,
    fingerprint: str = "f" * 64,
    score_tolerance: float = 1e-4,
    deterministic: bool = False,
    audit_every: int = 0,
    lead_ids: Ids | None = None,
) -> ReusingScorer[Any, Any]:
    """Features count their own bytes, a score 100."""
    metrics = metrics or Metrics()
    caches: Caches[Any, Any] = Caches(
        features=ByteBoundedCache[Any]("features", feature_bytes, lambda features: features.nbytes, metrics),
        prefixes=ByteBoundedCache[KeptPrefix[Any]]("prefixes", prefix_bytes, lambda kept: kept.num_bytes, metrics),
        scores=ByteBoundedCache[float]("scores", score_bytes, lambda _: 100, metrics),
    )
    return ReusingScorer(
        backend,
        caches,
        fingerprint=fingerprint,
        metrics=metrics,
        score_tolerance=score_tolerance,
        deterministic=deterministic,
        audit_every=audit_every,
        lead_ids=lead_ids,
    )
