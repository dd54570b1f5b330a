"""Independent random streams by name: what one part draws never shifts what another part sees."""

from __future__ import annotations

import random


def stream(name: str, seed: object) -> random.Random:
    """The stream `name/seed`; the same on every machine and in every process."""
    return random.Random(f"{name}/{seed}")  # noqa: S311 (drawings, not secrets)
