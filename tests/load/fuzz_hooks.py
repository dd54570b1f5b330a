"""What schemathesis is told of this API, for `scenarios/fuzzing.py`: a valid request should come as far as the scores.

Valid by the schema is any text for an image, any fingerprint, and captions beside groups; nearly all of them are refused before anything
else is looked at. So requests that are meant to be valid name a picture the server has, or none in a form, and either captions or groups.
"""

from __future__ import annotations

import os
from typing import Any

import schemathesis
from schemathesis.generation import GenerationMode

_IMAGE_ID = os.environ.get("FUZZ_IMAGE_ID", "")


@schemathesis.hook
def map_case(context: Any, case: Any) -> Any:
    """Requests that are not meant to be valid stay as they are."""
    meta = case.meta
    if isinstance(case.body, dict) and meta is not None and meta.generation.mode == GenerationMode.POSITIVE:
        case.body = _made_reachable(case.body, case.media_type == "multipart/form-data")
    return case


def _made_reachable(body: dict[str, Any], is_form: bool) -> dict[str, Any]:
    changed = {name: value for name, value in body.items() if name not in ("expect_fingerprint", "timeout_ms")}
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
