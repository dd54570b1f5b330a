"""What schemathesis is told of this API, for `scenarios/fuzzing.py`: a valid request should come as far as the scores.

Valid by the schema is any text for an image, any fingerprint, and captions beside groups; nearly all of them are refused before anything
else is looked at. So requests that are meant to be valid name a picture the server has, or none in a form, and either captions or groups.
In other systems' dialects the picture stands where they have it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import schemathesis
from schemathesis.generation import GenerationMode

_IMAGE_ID = os.environ.get("FUZZ_IMAGE_ID", "")


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    """Requests that are not meant to be valid stay as they are."""
    meta = case.meta
    if isinstance(case.body, dict) and meta is not None and meta.generation.mode == GenerationMode.POSITIVE:
        if "X-Run-Id" in (case.headers or {}):  # a request that names two runs is refused
            case.body.pop("run_id", None)
        for named in (case.body, case.query or {}):  # the oracle's is the only model there is
            named.pop("model", None)
        in_dialect = _DIALECTS.get(case.operation.path)
        case.body = in_dialect(case.body) if in_dialect else _made_reachable(case.body, case.media_type == "multipart/form-data")
    return case


_PROMPT = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def _rewards(body: dict[str, Any]) -> dict[str, Any]:
    num = len(body["query"])
    return {"query": [_PROMPT + query for query in body["query"]], "prompts": [_PROMPT] * num, "labels": [_IMAGE_ID] * num}


def _chats(body: dict[str, Any]) -> dict[str, Any]:
    return {"input": _PROMPT + (body["input"] if isinstance(body.get("input"), str) else "a"), "label": _IMAGE_ID}


def _pairs(body: dict[str, Any]) -> dict[str, Any]:
    others = next((body[name] for name in ("text_2", "data_2", "documents", "items") if isinstance(body.get(name), str)), "a")
    return {"text_1": _IMAGE_ID, "text_2": others}


def _reranking(body: dict[str, Any]) -> dict[str, Any]:
    texts = body["texts"] if isinstance(body.get("texts"), list) else ["a", "b"]
    return {"query": _IMAGE_ID, "texts": texts, **{name: body[name] for name in ("top_n", "raw_scores", "return_text") if name in body}}


_DIALECTS: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
    "/get_reward": _rewards,
    "/rm": lambda body: {**body, "label": _IMAGE_ID, "prompt": "a"},
    **dict.fromkeys(("/classify", "/v1/embeddings", "/pooling"), _chats),
    "/v1/score": _pairs,
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), _reranking),
    "/predict": lambda body: {**body, "inputs": [[_IMAGE_ID, "a"]]},
}


def _made_reachable(body: dict[str, Any], is_form: bool) -> dict[str, Any]:
    changed = {name: value for name, value in body.items() if name not in ("expect_fingerprint", "timeout_ms", "model", "messages")}
    if is_form:
        changed.pop("image", None)
    elif changed.get("image") is not None:
        changed["image"] = _IMAGE_ID
    if changed.get("captions") is not None:
        changed.pop("groups", None)
    elif isinstance(changed.get("groups"), list):
        changed["groups"] = [_made_reachable(group, is_form) if isinstance(group, dict) else group for group in changed["groups"]]
        changed.pop("image", None)
        changed.pop("prompt", None)
    return changed
