"""Clients of a Punchline server for training runs: every score checked, or an error, never a default. Needs httpx and tenacity only."""

from __future__ import annotations

from app.client.answers import Comparison, GroupScores, Ranked
from app.client.blocking import RewardClient
from app.client.concurrent import AsyncRewardClient
from app.client.errors import BadAnswer, ImageUnknown, ModelChanged, NoCaption, Refused, RewardError, Unanswered
from app.client.requests import Group, Limits

__all__ = [
    "AsyncRewardClient",
    "BadAnswer",
    "Comparison",
    "Group",
    "GroupScores",
    "ImageUnknown",
    "Limits",
    "ModelChanged",
    "NoCaption",
    "Ranked",
    "Refused",
    "RewardClient",
    "RewardError",
    "Unanswered",
]
