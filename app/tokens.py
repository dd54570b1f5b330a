"""Text to token ids, control tokens switched off, and where a text may be cut so that its pieces have the tokens of the whole.

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

_WORDS = {  # how byte-level tokenizers split a text into words before they merge: Qwen's and GPT-2's
    "(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\\r\\n\\p{L}\\p{N}]?\\p{L}+|\\p{N}| ?[^\\s\\p{L}\\p{N}]+[\\r\\n]*|\\s*[\\r\\n]+|\\s+(?!\\S)|\\s+",
    "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+| ?[^\\s\\p{L}\\p{N}]+|\\s+(?!\\S)|\\s+",
}
_GPT_2 = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
_LAST_SEAM = re.compile("(?s:.*[A-Za-z])(?= [A-Za-z])")
_FIRST_SEAM = re.compile("[A-Za-z](?= [A-Za-z])")


class PlainTokenizer:
    """A copy of a tokenizer to which control tokens are ordinary text, and which adds none of its own."""

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
        self.can_cut = _can_cut(state)

    def ids(self, text: str) -> Ids:
        """[tokens] int64."""
        return np.asarray(self.backend.encode(text, add_special_tokens=False).ids, dtype=np.int64)

    def count(self, text: str) -> int:
        return len(self.backend.encode(text, add_special_tokens=False).ids)

    def batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text by itself."""
        return [np.asarray(found.ids, dtype=np.int64) for found in self.backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def between(self, head: str, texts: Sequence[str], tail: str) -> list[Ids]:
        """The ids of `head + text + tail` for each text. What lies before and behind two seams is tokenised once for all."""
        start, stop = self._seams(head, tail)
        before, *rows, behind = self.batch([head[:start], *(f"{head[start:]}{text}{tail[:stop]}" for text in texts), tail[stop:]])
        return [np.concatenate([before, row, behind]) for row in rows]

    def _seams(self, head: str, tail: str) -> tuple[int, int]:
        """Where the head's last seam is and the tail's first; its beginning and its end where there is none.

        A seam lies between an ASCII letter and a space before another. By the patterns of `_WORDS` a word ends there whatever stands
        before the letter, the next begins there whatever follows, and neither match looks across: a letter is only ever taken by
        a run of letters, which the space ends, and every match is made from its own beginning on. Composition (NFC) does not cross a space
        before a letter. Merges stay within a word.
        """
        if not self.can_cut:
            return 0, len(tail)
        last, first = _LAST_SEAM.match(head), _FIRST_SEAM.search(tail)
        return last.end() if last else 0, first.end() if first else len(tail)

    def cut(self, text: str, limit: int | None) -> tuple[str, bool]:
        """The text's first `limit` tokens, decoded, and whether there were more. None: no limit."""
        ids = self.backend.encode(text, add_special_tokens=False).ids
        return (text, False) if limit is None or len(ids) <= limit else (self.decode(ids[:limit]), True)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens shown."""
        return str(self.backend.decode(ids, skip_special_tokens=False))

    def text_of(self, token_id: int) -> str:
        """A single token, control tokens included."""
        return str(self.backend.id_to_token(token_id))


def _can_cut(state: dict[str, Any]) -> bool:
    """Whether a tokenizer's file says that it is one for which `_seams` holds: words by a known pattern, then merges, nothing random."""
    merges = state["model"]
    if merges.get("type") != "BPE" or merges.get("dropout") or state["normalizer"] not in (None, {"type": "NFC"}):
        return False
    ordinary = (token for token in state["added_tokens"] if not token["special"])
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] or " " in token["content"] for token in ordinary):
        return False
    return _splits_words(state["pre_tokenizer"] or {})


def _splits_words(step: dict[str, Any]) -> bool:
    """Whether texts are split into words by a known pattern, isolated, and then written as bytes."""
    if step.get("type") == "ByteLevel":
        return all(step.get(name) == value for name, value in _GPT_2.items())
    if step.get("type") != "Sequence" or len(step["pretokenizers"]) != 2:
        return False
    split, written = step["pretokenizers"]
    known = [{"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False} for words in _WORDS]
    return split in known and written.get("type") == "ByteLevel" and not (written["add_prefix_space"] or written["use_regex"])
