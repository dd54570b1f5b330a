"""Punchline: preference scores for captions, over HTTP."""

__version__ = "0.1.0"
