"""What is measured of a text-only model: conversations that nobody has seen, with responses, each of exactly so many tokens.

Lengths are found through the artifact's own encoder, whatever stands around the texts; knows neither templates nor clocks.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from app.bench.workload import WORDS, Request, encode_whole
from app.contracts import EncodedGroup, Group
from app.encoding import Encoder
from app.errors import InvalidRequest, SettingsInvalid

CONVERSATION_TOKENS, RESPONSE_TOKENS = 400, 64
_FIRST, _END = "a", "."  # every text begins with the one, a conversation ends with the other: what merges at a seam is the same in all
_MIN_WORDS = 4  # that a tokenizer has whole: with fewer, texts would soon come again
_MAX_DRAWS = 100


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens of a conversation, which its responses share, and of each response's own."""

    conversation: int
    response: int


@dataclass(frozen=True, slots=True)
class Wanted:
    """Lengths as asked for. None: 400 and 64, less where the artifact takes no longer text."""

    conversation: int | None = None
    response: int | None = None


AS_USUAL = Wanted()


class Conversations:
    """Responses to conversations. Implements `Source`.

    Raises SettingsInvalid for an artifact that takes no such texts, and for lengths that it would cut or refuse.
    """

    def __init__(self, encoder: Encoder, wanted: Wanted, seed: int = 0) -> None:
        config = encoder.config
        if config.prompt_policy == "fixed":
            raise SettingsInvalid("the artifact has one prompt for all (prompt_policy fixed): no conversation would be new")
        self._encoder = encoder
        self._wanted = wanted
        self._random = random.Random(seed)  # noqa: S311 (texts, not secrets)
        self._seen: set[str] = set()
        self._words = whole_words(encoder)
        conversation, response = _FIRST + _END, _FIRST  # the shortest
        shortest = lengths_of(encode_whole(encoder, Group((response,), conversation)))
        self._num_words = Lengths(
            _num_words(
                "--conversation-tokens", wanted.conversation, CONVERSATION_TOKENS, shortest.conversation, config.max_prompt_tokens - 1
            ),
            _num_words("--response-tokens", wanted.response, RESPONSE_TOKENS, shortest.response, config.max_caption_tokens),
        )
        self._lengths = Lengths(shortest.conversation + self._num_words.conversation - 1, shortest.response + self._num_words.response - 1)
        self.encode(self.request(2))

    @property
    def notes(self) -> tuple[str, ...]:
        """Which lengths are less than usual, as nobody asked for them and the artifact takes no longer text."""
        usual = self._wanted.conversation or CONVERSATION_TOKENS, self._wanted.response or RESPONSE_TOKENS
        pairs = zip(("conversations", "responses"), (self._lengths.conversation, self._lengths.response), usual, strict=True)
        return tuple(
            f"the artifact takes no longer texts: {what} of {found} tokens, not {less}" for what, found, less in pairs if found < less
        )

    def request(self, num_captions: int, known: Request | None = None) -> Request:
        """New responses to a new conversation, or to that of a known request."""
        prompt = self._new_text(self._num_words.conversation, _END) if known is None else known.prompt
        return Request(None, tuple(self._new_text(self._num_words.response) for _ in range(num_captions)), prompt)

    def encode(self, request: Request) -> EncodedGroup:
        """What the scorer takes. Raises ApiError for what the artifact would refuse, and for other lengths than were asked for."""
        group = encode_whole(self._encoder, Group(request.captions, request.prompt))
        if (found := lengths_of(group)) != self._lengths:
            raise InvalidRequest(f"the artifact's tokenizer made {found} of what should be {self._lengths}")
        return group

    def num_unknown(self, group: EncodedGroup) -> int:
        """All of the prefix but what every group of the model begins with."""
        return group.num_prefix - len(self._encoder.lead_ids)

    def _new_text(self, num_words: int, end: str = "") -> str:
        """Raises SettingsInvalid where so few words have all been said."""
        for _ in range(_MAX_DRAWS):
            text = " ".join([_FIRST, *self._random.choices(self._words, k=num_words - 1)]) + end
            if text not in self._seen:
                self._seen.add(text)
                return text
        raise SettingsInvalid(f"of {num_words} words the bench cannot make so many different texts; ask for more tokens")


def lengths_of(group: EncodedGroup) -> Lengths:
    """Raises InvalidRequest for responses of several lengths."""
    own = {len(row) - group.num_prefix for row in group.rows}
    if len(own) > 1:
        raise InvalidRequest(f"responses of several lengths: {sorted(own)} tokens")
    return Lengths(group.num_prefix, own.pop())


def whole_words(encoder: Encoder) -> Sequence[str]:
    """Those of the bench's words that the artifact's tokenizer has as one token. Raises SettingsInvalid for too few of them."""
    bare, *longer = encode_whole(encoder, Group((_FIRST, *(f"{_FIRST} {word}" for word in WORDS)), _FIRST + _END)).rows
    words = [word for word, row in zip(WORDS, longer, strict=True) if len(row) == len(bare) + 1]
    if len(words) < _MIN_WORDS:
        raise SettingsInvalid(f"the artifact's tokenizer has {len(words)} of the bench's words whole, {_MIN_WORDS} are needed")
    return words


def _num_words(option: str, asked: int | None, usual: int, shortest: int, max_words: int) -> int:
    """Words that make so many tokens; `shortest`: the tokens of one word with all that stands around it."""
    num_words = (usual if asked is None else asked) - shortest + 1
    if num_words < 1:
        raise SettingsInvalid(f"{option} {asked or usual}: with its template the artifact makes {shortest} tokens of a single word")
    if num_words > max_words and asked is not None:
        raise SettingsInvalid(f"{option} {asked}: the artifact takes at most {shortest + max_words - 1}")
    return min(num_words, max_words)
