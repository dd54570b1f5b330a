"""How clients of rerankers ask: pairs of a query and documents. Of ours the image is the query, the captions are the documents."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pydantic import Field, model_validator
from pydantic_core import PydanticCustomError

from app.api.dialects.asked import Asked, Asking, Item, Scored, activated, placed
from app.api.dialects.engines import listed
from app.api.dialects.pictures import is_picture, needed
from app.api.dialects.wire import Engine, OneSide, Peer, Side, Sides
from app.api.schemas import IMAGE_EXAMPLE, Text
from app.errors import InvalidRequest

_PAIRS = (("text_1", "text_2"), ("data_1", "data_2"), ("queries", "documents"), ("queries", "items"))


class PairsRequest(Engine):
    """vLLM's `/score`: one query with several documents, or as many queries as documents, under one of four pairs of names."""

    text_1: Sides | None = Field(None, examples=[IMAGE_EXAMPLE])
    text_2: Sides | None = Field(None, examples=[["Nice day."]])
    data_1: Sides | None = None
    data_2: Sides | None = None
    queries: Sides | None = None
    documents: Sides | None = None
    items: Sides | None = None
    instruction: Text | None = Field(None, description="The prompt, if not the artifact's own.")

    @model_validator(mode="after")
    def _one_pair(self) -> PairsRequest:
        given = {name for pair in _PAIRS for name in pair if getattr(self, name) is not None}
        if given not in [set(pair) for pair in _PAIRS]:
            raise PydanticCustomError("one_form", "send one of " + ", ".join(" and ".join(pair) for pair in _PAIRS))
        return self

    @property
    def pair(self) -> tuple[str, str]:
        return next(pair for pair in _PAIRS if all(getattr(self, name) is not None for name in pair))


class RerankRequest(Engine):
    """`documents`: as vLLM, Jina, Cohere and infinity; `texts`: as text-embeddings-inference."""

    query: OneSide = Field(examples=[IMAGE_EXAMPLE])
    documents: Sides | None = Field(None, examples=[["Nice day.", "It is about the iceberg."]])
    texts: list[Text] | None = None
    top_n: int | None = Field(None, ge=0, description="Only so many, the best; 0: all.")
    return_documents: bool | None = None
    return_text: bool | None = None
    raw_scores: bool | None = None
    instruction: Text | None = Field(None, description="The prompt, if not the artifact's own.")

    @model_validator(mode="after")
    def _one_form(self) -> RerankRequest:
        if (self.documents is None) == (self.texts is None):
            raise PydanticCustomError("one_form", "send either documents or texts")
        if self.raw_scores is not None and self.use_activation is not None and self.raw_scores == self.use_activation:
            raise PydanticCustomError("contradiction", "raw_scores and use_activation contradict each other")
        return self


class PredictRequest(Peer):
    """text-embeddings-inference: a text, a pair, or a list of lists of one or two texts. The first of a pair is the image."""

    inputs: Text | list[Text] | list[list[Text]] = Field(examples=[[[IMAGE_EXAMPLE, "Nice day."]]])
    raw_scores: bool | None = Field(None, description="true: the score; else its sigmoid, as there.")

    @model_validator(mode="after")
    def _pairs(self) -> PredictRequest:
        for each in self.sequences:
            if not 1 <= len(each) <= 2:
                raise PydanticCustomError("sequence_length", "one text, or a pair of them")
        return self

    @property
    def is_batch(self) -> bool:
        return isinstance(self.inputs, list) and (not self.inputs or isinstance(self.inputs[0], list))

    @property
    def sequences(self) -> list[list[str]]:
        if isinstance(self.inputs, str):
            return [[self.inputs]]
        return [list(each) for each in self.inputs] if self.is_batch else [[str(each) for each in self.inputs]]


def read_score(told: PairsRequest, asking: Asking) -> Asked:
    """Raises InvalidRequest unless there is one query, or one a document."""
    first, second = told.pair
    ones: list[Side] = getattr(told, first)
    others: list[Side] = getattr(told, second)
    if len(ones) not in (1, len(others)):
        raise InvalidRequest("1 and 1, 1 and N, or N and N", field=first)
    names = [first] if len(ones) == 1 else [f"{first}[{index}]" for index in range(len(ones))]
    queries = [_looked_at(each, name, may_be_picture=asking.takes_images) for each, name in zip(ones, names, strict=True)]
    repeats = len(others) if len(ones) == 1 else 1
    items = [
        _item(
            query, _looked_at(document, f"{second}[{index}]", may_be_picture=False), (name, f"{second}[{index}]"), told.instruction, asking
        )
        for index, (query, name, document) in enumerate(zip(queries * repeats, names * repeats, others, strict=True))
    ]

    def answer(scored: Scored) -> dict[str, Any]:
        values = [activated(score, use=told.use_activation is True) for score in scored.scores]
        return listed([{"index": index, "object": "score", "score": value} for index, value in enumerate(values)], scored, "score")

    return Asked(items, answer)


def read_rerank(told: RerankRequest, asking: Asking) -> Asked:
    """vLLM's and Jina's, with the documents unless they are not wanted."""
    return _rerank(told, asking, shows_documents=told.return_documents is not False)


def read_rerank_v2(told: RerankRequest, asking: Asking) -> Asked:
    """Cohere's, without the documents unless they are wanted."""
    return _rerank(told, asking, shows_documents=told.return_documents is True)


def _rerank(told: RerankRequest, asking: Asking, *, shows_documents: bool) -> Asked:
    name = "documents" if told.texts is None else "texts"
    documents = told.documents or [] if told.texts is None else [Side(bare=text) for text in told.texts]
    query = _looked_at(told.query, "query", may_be_picture=asking.takes_images)
    items = [
        _item(query, _looked_at(each, f"{name}[{index}]", may_be_picture=False), ("query", f"{name}[{index}]"), told.instruction, asking)
        for index, each in enumerate(documents)
    ]
    # text-embeddings-inference gives sigmoids unless raw scores are asked for, the others what `use_activation` says
    use = told.use_activation is True or told.raw_scores is False or (told.texts is not None and told.raw_scores is None)

    def answer(scored: Scored) -> Any:
        order = sorted(range(len(items)), key=lambda index: -scored.scores[index])[: told.top_n or None]
        ranks = [(index, activated(scored.scores[index], use=use)) for index in order]
        if told.texts is not None:
            return [{"index": index, **({"text": told.texts[index]} if told.return_text else {}), "score": value} for index, value in ranks]
        results = [
            {"index": index, **({"document": _shown(documents[index])} if shows_documents else {}), "relevance_score": value}
            for index, value in ranks
        ]
        return {"id": f"rerank-{scored.request_id}", "object": "rerank", "model": scored.model, "usage": scored.usage, "results": results}

    return Asked(items, answer)


def read_predict(told: PredictRequest, asking: Asking) -> Asked:
    """A single text is a caption by itself, which only a text-only model scores."""
    items = []
    for index, each in enumerate(told.sequences):
        where = f"inputs[{index}]" if told.is_batch else "inputs"
        query = _looked_at(Side(bare=each[0]) if len(each) == 2 else Side(), where, may_be_picture=asking.takes_images)
        items.append(_item(query, _Shown(None, each[-1]), (where, where), None, asking))

    def answer(scored: Scored) -> Any:
        predictions = [[{"label": "LABEL_0", "score": activated(score, use=not told.raw_scores)}] for score in scored.scores]
        return predictions if told.is_batch else predictions[0]

    return Asked(items, answer)


@dataclass(frozen=True, slots=True)
class _Shown:
    """One side, looked at once however many pairs it is in: its picture and its words."""

    picture: str | None
    words: str | None


def _looked_at(side: Side, where: str, *, may_be_picture: bool) -> _Shown:
    with placed(where):
        if may_be_picture and side.bare is not None and is_picture(side.bare):
            return _Shown(side.bare, None)
        return _Shown(side.picture, side.words)


def _item(query: _Shown, document: _Shown, names: tuple[str, str], instruction: str | None, asking: Asking) -> Item:
    """One of the two shows the picture, its words are the prompt then; the other's words are the caption.

    A text-only model takes the query's words for the prompt. Raises InvalidRequest.
    """
    if query.picture is not None and document.picture is not None:
        raise InvalidRequest("query and document both have an image; a score is of one image and one text", field=names[1])
    of_image, of_caption, where = (query, document, names[1]) if document.picture is None else (document, query, names[0])
    if of_caption.words is None:
        raise InvalidRequest("there is no text to score", field=where)
    image = needed(of_image.picture, names[0], takes_images=asking.takes_images)
    if of_image.words is not None and instruction is not None:
        raise InvalidRequest("the prompt is there twice: as instruction, and as words of the query", field="instruction")
    return Item(of_caption.words, where, image, of_image.words if instruction is None else instruction)


def _shown(document: Side) -> dict[str, Any]:
    """As it was sent: Jina's clients read `text`, vLLM's `multi_modal` too."""
    if document.picture is None:
        return {"text": document.words}
    return {"text": document.words, "multi_modal": [part.model_dump(exclude_none=True) for part in document.content or []]}
