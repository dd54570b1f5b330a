"""What a client raises instead of a score. Nothing here is ever turned into a number."""

from __future__ import annotations


class RewardError(Exception):
    """No scores; why is in the message."""


class Refused(RewardError):
    """The server said no, and would say so again."""

    def __init__(self, message: str, *, status: int, code: str, field: str | None = None, index: int | None = None) -> None:
        super().__init__(f"{code}: {message}" + (f" ({field})" if field else ""))
        self.status = status
        self.code = code
        self.field = field
        self.index = index


class ImageUnknown(Refused):
    """The server has no such picture; with its bytes at hand the client sends them and asks again."""


class ModelChanged(RewardError):
    """Another model answers than the one this client began with, or was told to expect."""


class BadAnswer(RewardError):
    """The answer is no answer to what was asked: a wrong number of scores, one that is not finite, another picture or request."""


class Unanswered(RewardError):
    """The deadline passed, or would have, before any server gave scores; the last reason is the cause."""


class NoCaption(RewardError):
    """A completion without a caption in it, where the rule for that is to raise."""
