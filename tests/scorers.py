"""A reusing scorer around a backend, with caches of given sizes."""

from __future__ import annotations

from typing import Any

from app.caches import ByteBoundedCache
from app.contracts import Ids
from app.metrics import Metrics
from app.reuse import Backend, Caches, KeptPrefix, ReusingScorer

MIB = 1 << 20


def reusing(
    backend: Backend[Any, Any],
    *,
    metrics: Metrics | None = None,
    max_bytes: tuple[int, int, int] = (MIB,) * 3,
    fingerprint: str = "f" * 64,
    score_tolerance: float = 1e-4,
    deterministic: bool = False,
    audit_every: int = 0,
    lead_ids: Ids | None = None,
) -> ReusingScorer[Any, Any]:
    """`max_bytes`: of features, which count their own, of prefixes, and of scores, which count 100 each."""
    metrics = metrics or Metrics()
    caches: Caches[Any, Any] = Caches(
        features=ByteBoundedCache[Any]("features", max_bytes[0], lambda features: features.nbytes, metrics),
        prefixes=ByteBoundedCache[KeptPrefix[Any]]("prefixes", max_bytes[1], lambda kept: kept.num_bytes, metrics),
        scores=ByteBoundedCache[float]("scores", max_bytes[2], lambda _: 100, metrics),
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
