"""Text to token ids, special tokens switched off, and where a text may be split so that its pieces have the tokens of the whole.

Thread-safe: nothing here is written to after construction.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from app.contracts import Ids

_PRE_TOKENS = (  # the patterns by which byte-level tokenizers split a text before they merge: Qwen's and GPT-2's
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
)
_GPT_2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_LAST_SPLIT = re.compile("(?s:.*[A-Za-z])(?= [A-Za-z])")
_FIRST_SPLIT = re.compile("[A-Za-z](?= [A-Za-z])")
_LOOKED_AT = 4096  # characters next to the caption: a text without such a place must not be searched at any length


class PlainTokenizer:
    """A copy of a tokenizer to which special tokens are ordinary text, and which adds none of its own."""

    def __init__(self, tokenizer: Any, *, keeps_ordinary: bool) -> None:
        """`keeps_ordinary`: added tokens that are not special and look like none (`<think>`, `<tool_call>`) stay tokens, as in the
        recipes of those who publish.
        """
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        self.special_tokens: dict[str, int] = {}  # their text, and the ids that no caption may become
        for token in state["added_tokens"]:
            if not keeps_ordinary or token["special"] or token["content"].startswith("<|"):
                token["special"] = True
                self.special_tokens[token["content"]] = token["id"]
        self.backend = Tokenizer.from_str(json.dumps(state))
        self.backend.encode_special_tokens = True
        self.backend.no_truncation()
        self.backend.no_padding()
        self.can_split = _can_split(state)

    def ids(self, text: str) -> Ids:
        """[tokens] int64."""
        return np.asarray(self.backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def count(self, text: str) -> int:
        return len(self.backend.encode(text, add_special_tokens=False).ids)

    def batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text by itself."""
        return [np.asarray(found.ids, dtype=np.int64) for found in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def between(self, head: str, texts: Sequence[str], tail: str) -> list[Ids]:
        """The ids of `head + text + tail` for each text; what of head and tail can be split off is tokenised once for all."""
        start, stop = self._split_points(head, tail)
        before, *rows, behind = self.batch([head[:start], *(f"{head[start:]}{text}{tail[:stop]}" for text in texts), tail[stop:]])
        return [np.concatenate([before, row, behind]) for row in rows]

    def _split_points(self, head: str, tail: str) -> tuple[int, int]:
        """Where the head may be split last and the tail first; the head's beginning and the tail's end where there is no such place.

        Between an ASCII letter and a space before another, by both patterns of `_PRE_TOKENS`: the letter is taken by a run of letters or
        a contraction, neither of which goes on over a space, so a pre-token ends there whatever stands before; the space begins one
        with the letter behind it, whatever follows; and there is no lookbehind. Composition (NFC) does not reach across a space that a
        letter follows, nor do merges leave their pre-token.
        """
        if not self.can_split:
            return 0, len(tail)
        skipped = max(0, len(head) - _LOOKED_AT)
        last, first = _LAST_SPLIT.match(head, skipped), _FIRST_SPLIT.search(tail, 0, _LOOKED_AT)
        return last.end() if last else 0, first.end() if first else len(tail)

    def cut(self, text: str, limit: int) -> tuple[str, bool]:
        """A text of at most `limit` tokens as it is, of a longer one its first tokens decoded; and whether it was longer."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return (text, False) if len(ids) <= limit else (self.decode(ids[:limit]), True)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens shown."""
        return str(self.backend.decode(ids, skip_special_tokens=False))

    def text_of(self, token_id: int) -> str:
        """A single token, special ones included."""
        return str(self.backend.id_to_token(token_id))


def _can_split(state: dict[str, Any]) -> bool:
    """Whether a tokenizer's file says that it is one for which `_split_points` holds: known pre-tokens, then merges, nothing random."""
    model = state["model"]
    if model.get("type") != "BPE" or model.get("dropout") or state["normalizer"] not in (None, {"type": "NFC"}):
        return False
    # Ordinary added tokens are looked for before anything else, and special ones hide those within them.
    ordinary = [token for token in state["added_tokens"] if not token["special"]]
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in ordinary):
        return False
    if ordinary and any(" " in token["content"] for token in state["added_tokens"]):
        return False
    return _has_known_pre_tokens(state["pre_tokenizer"] or {})


def _has_known_pre_tokens(step: dict[str, Any]) -> bool:
    """Whether texts are split by a known pattern, its matches isolated, and then written as bytes."""
    if step.get("type") == "ByteLevel":
        return all(step.get(name) == value for name, value in _GPT_2.items())
    if step.get("type") != "Sequence" or len(step["pretokenizers"]) != 2:
        return False
    split, written = step["pretokenizers"]
    known = [{"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False} for words in _PRE_TOKENS]
    return split in known and written.get("type") == "ByteLevel" and not (written["add_prefix_space"] or written["use_regex"])
