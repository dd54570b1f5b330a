"""What HTTP, queue and encoding add to the scorer: 8 captions of a known image through the server and through its scorer, in turn.

Measured on the smallest model at hand: on a large one the noise of the forward is longer than what is looked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from app.bench.loopback import Client, Loopback
from app.bench.ways import timed
from app.bench.workload import Workload
from app.contracts import Scorer

NUM_CAPTIONS = 8
_WARM_UP = 10


@dataclass(frozen=True, slots=True)
class Overhead:
    """Wall time over HTTP less that of the scorer called directly, and the latter."""

    model: str
    num_repeats: int
    p50_ms: float
    p99_ms: float
    scorer_p50_ms: float


def measure_overhead(loopback: Loopback, scorer: Scorer, workload: Workload, num_repeats: int) -> Overhead:
    """Pairs of requests with captions of equal lengths, none asked before."""
    device = torch.device(loopback.runtime.loaded.device)
    image = workload.request(1)
    encoded = workload.encode_image(image.image)
    served, direct = [], []
    with Client(loopback) as client:
        _, image_id = client.send_bytes(image)
        for _ in range(_WARM_UP + num_repeats):
            request = workload.request(NUM_CAPTIONS, image.image)
            group = workload.encode_for(encoded, workload.captions(NUM_CAPTIONS))
            served.append(timed(lambda request=request: client.send_id(image_id, request), device)[0])  # type: ignore[misc]
            direct.append(timed(lambda group=group: scorer.score(scorer.prepare([group]))[0], device)[0])  # type: ignore[misc]
    over = 1000 * (np.array(served) - np.array(direct))[_WARM_UP:]
    p50, p99 = (float(value) for value in np.percentile(over, [50, 99]))
    scorer_p50 = float(np.median(direct[_WARM_UP:]))
    return Overhead(loopback.runtime.settings.model, num_repeats, p50, p99, 1000 * scorer_p50)
