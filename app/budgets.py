"""How the memory that loading left is shared out: room for the largest batch first, then the caches. Pure arithmetic."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from app.errors import SettingsInvalid

_RESERVE = 0.1  # of what is left: for others on the machine, and for what nobody counted
_MAX_BATCH_SHARE = 0.5  # of what is left may go to the largest batch
_PREFIX_SHARE, _FEATURE_SHARE = 0.6, 0.1  # of what the batch leaves
_MAX_PREFIX_BYTES, _MAX_FEATURE_BYTES = 16 << 30, 2 << 30  # unless somebody asks for more
_MAX_SHARED_BYTES = 2 << 30  # of each, where the memory is the machine's own and others need it too
_LITTLE_BYTES = 64 << 20  # where nobody tells how much is left


@dataclass(frozen=True, slots=True)
class Budgets:
    """Bytes and tokens a server works within, on its device."""

    max_batch_tokens: int
    batch_bytes: int  # what the largest batch takes
    prefix_cache_bytes: int
    feature_cache_bytes: int

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


def share_out(
    *,
    left_bytes: int | None,
    bytes_per_token: int,
    max_batch_tokens: int,
    min_batch_tokens: int,
    prefix_cache_bytes: int | None,
    feature_cache_bytes: int | None,
    on_host: bool,
) -> Budgets:
    """Budgets within `left_bytes` (None: unknown) of a device or, `on_host`, of the machine itself.

    Caches that are set are taken as they are, before the batch.
    Raises SettingsInvalid when not even one caption with its prompt and image (`min_batch_tokens`) would fit.
    """
    if left_bytes is None:
        kept = [_LITTLE_BYTES if size is None else size for size in (prefix_cache_bytes, feature_cache_bytes)]
        return Budgets(max_batch_tokens, max_batch_tokens * bytes_per_token, *kept)
    usable = int(left_bytes * (1 - _RESERVE)) - (prefix_cache_bytes or 0) - (feature_cache_bytes or 0)
    tokens = min(max_batch_tokens, int(max(0, usable) * _MAX_BATCH_SHARE) // max(1, bytes_per_token))
    if tokens < min(min_batch_tokens, max_batch_tokens):
        settled = (("PREFIX", prefix_cache_bytes), ("FEATURE", feature_cache_bytes))
        taken = "".join(f", less PUNCHLINE_{name}_CACHE_BYTES={size}" for name, size in settled if size)
        raise SettingsInvalid(
            f"{left_bytes >> 20} MiB are left beside the model and its other caches{taken}: "
            f"room for {tokens} tokens in a batch, and one caption may need {min_batch_tokens}"
        )
    batch_bytes = tokens * bytes_per_token
    rest = max(0, usable - batch_bytes)
    most = (_MAX_SHARED_BYTES, _MAX_SHARED_BYTES) if on_host else (_MAX_PREFIX_BYTES, _MAX_FEATURE_BYTES)
    return Budgets(
        max_batch_tokens=tokens,
        batch_bytes=batch_bytes,
        prefix_cache_bytes=min(most[0], int(rest * _PREFIX_SHARE)) if prefix_cache_bytes is None else prefix_cache_bytes,
        feature_cache_bytes=min(most[1], int(rest * _FEATURE_SHARE)) if feature_cache_bytes is None else feature_cache_bytes,
    )
