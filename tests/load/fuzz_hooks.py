"""What schemathesis is told of this API, for `scenarios/fuzzing.py`: a valid request should come as far as the scores.

Valid by the schema is any text for an image and any fingerprint; nearly all of them are refused before anything else is looked at. So
requests that are meant to be valid name no fingerprint and no time limit, about half of them a picture the server has, and forms none.
"""

from __future__ import annotations

import os
from typing import Any

import schemathesis
from schemathesis.generation import GenerationMode

_IMAGE_ID = os.environ.get("FUZZ_IMAGE_ID", "")


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    """Valid requests, of which every second keeps its picture as it was made up."""
    meta = case.meta
    if isinstance(case.body, dict) and meta is not None and meta.generation.mode == GenerationMode.POSITIVE:
        case.body = _made_reachable(case.body, case.media_type == "multipart/form-data")
    return case


def _made_reachable(body: dict[str, Any], is_form: bool) -> dict[str, Any]:
    changed = {name: value for name, value in body.items() if name not in ("expect_fingerprint", "timeout_ms")}
    if is_form:
        changed.pop("image", None)
    elif changed.get("image") is not None and len(str(body)) % 2:
        changed["image"] = _IMAGE_ID
    if isinstance(changed.get("groups"), list):
        changed["groups"] = [_made_reachable(group, is_form) if isinstance(group, dict) else group for group in changed["groups"]]
    return changed
