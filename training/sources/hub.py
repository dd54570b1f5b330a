"""The layout of the public New Yorker dataset: in a folder, or fetched from the Hub into its cache. Opens no table."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from training.pairs import DataInvalid
from training.sources.newyorker import Tables

Fetch = Callable[[str, str | None], Path]  # dataset id and revision to a folder
_RATINGS = ("ranking", "1_rating")
_SCENES = ("gpt4o_description", "2_gpt4o_description")
_CARTOONS = ("cartoons", "3_cartoons")


def newyorker_tables(
    places: Sequence[str], revision: str | None, scenes: Sequence[Path], cartoons: Path | None, fetch: Fetch | None = None
) -> Tables:
    """Where everything lies. A folder in the dataset's layout, or the dataset's id, brings its own descriptions and cartoons."""
    if len(places) == 1 and not Path(places[0]).exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", places[0]):
        root = (fetch or fetch_dataset)(places[0], revision)
        if _inside(root, _RATINGS) is None:
            raise DataInvalid(f"{places[0]}: the dataset has no folder {' or '.join(_RATINGS)}")
    elif revision is not None:
        raise DataInvalid("a revision needs one dataset id (owner/name) that is no local path")
    else:
        root = Path(places[0])
    ratings = _inside(root, _RATINGS)
    if len(places) > 1 or ratings is None:
        return Tables([Path(place) for place in places], scenes, cartoons)
    own_scenes = _inside(root, _SCENES)
    return Tables([ratings], scenes or ([own_scenes] if own_scenes else []), cartoons or _inside(root, _CARTOONS))


def _inside(root: Path, names: Sequence[str]) -> Path | None:
    return next((root / name for name in names if (root / name).is_dir()), None)


def fetch_dataset(name: str, revision: str | None) -> Path:
    """A snapshot of a dataset repository. Raises DataInvalid when it cannot be had."""
    from huggingface_hub import snapshot_download  # only those who name a Hub id wait for it
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = [f"{folder}/*" for folder in (*_RATINGS, *_SCENES, *_CARTOONS)]
    try:
        return Path(snapshot_download(name, repo_type="dataset", revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        raise DataInvalid(f"{name}: neither a local path nor a dataset the Hub gives ({type(error).__name__})") from None
