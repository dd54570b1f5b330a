"""The table of dialects: path, whose it is, how a body is read. A row more is a dialect more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from app.api.dialects.asked import Asked, Asking
from app.api.dialects.engines import ChatsRequest, PoolingRequest, VectorRequest, read_classify, read_embeddings, read_pooling
from app.api.dialects.pairs import (
    PairsRequest,
    PredictRequest,
    RerankRequest,
    read_predict,
    read_rerank,
    read_rerank_v2,
    read_score,
)
from app.api.dialects.trainers import GetRewardRequest, RmRequest, read_get_reward, read_rm
from app.api.dialects.wire import Peer


@dataclass(frozen=True, slots=True)
class Dialect:
    """`patience_s`: how long its clients wait for an answer before they try again, which is how long a full queue may make them wait;
    None: what other requests get. `params`: query parameters of its own; `refused` for trainers, who can say it nowhere else."""

    path: str
    of: str
    body: type[Peer]
    read: Callable[[Any, Asking], Asked]
    patience_s: float | None = None
    params: frozenset[str] = frozenset()


DIALECTS = (
    Dialect("/get_reward", "OpenRLHF", GetRewardRequest, read_get_reward, patience_s=150, params=frozenset({"refused"})),
    Dialect("/rm", "slime", RmRequest, read_rm, patience_s=100, params=frozenset({"format", "refused"})),
    Dialect("/classify", "vLLM, verl", ChatsRequest, read_classify, patience_s=100, params=frozenset({"refused"})),
    Dialect("/v1/embeddings", "verl with SGLang", VectorRequest, read_embeddings, patience_s=100, params=frozenset({"refused"})),
    Dialect("/pooling", "vLLM", PoolingRequest, read_pooling),
    Dialect("/v1/score", "vLLM", PairsRequest, read_score),
    Dialect("/rerank", "vLLM, infinity, text-embeddings-inference", RerankRequest, read_rerank),
    Dialect("/v1/rerank", "vLLM, Jina", RerankRequest, read_rerank),
    Dialect("/v2/rerank", "vLLM, Cohere", RerankRequest, read_rerank_v2),
    Dialect("/predict", "text-embeddings-inference", PredictRequest, read_predict),
)
PATHS = frozenset(dialect.path for dialect in DIALECTS)
