"""Golden items of an export: which captions they hold, and the proof by a fresh process that an artifact reproduces them.

`python -m training.golden ARTIFACT` is that process: it knows the artifact on disk and nothing of the run it came from.
"""

from __future__ import annotations

import gc
import json
import math
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer
from transformers.utils.logging import disable_progress_bar

from app.artifacts import Artifact, Golden, open_artifact
from app.contracts import EncodedGroup
from app.encoding import Encoder, load_encoder
from app.errors import ApiError, ArtifactInvalid, PunchlineError
from app.golden import GOLDEN_LIMITS, GoldenInput, encode_golden, long_prompt
from app.images import probe_image
from app.model import load_model, resolve_device
from app.scoring import score_shared
from training.pairs import Pair

NumberFormat = Literal["float32", "bfloat16"]
NUM_ITEMS, NUM_CAPTIONS = 3, 12
_MAX_SHARE = 0.01  # of the golden scores' spread that float32 may differ by, however close the scores are
_ROOM = 3.0  # another device's kernels may round this many times as far as this one's
_MAX_ROUNDED = 0.25  # of the golden scores' spread: a bfloat16 that rounds further tells captions apart by chance
_MIN_ROUNDED = 0.1  # what it may always differ by


def choose_inputs(encoder: Encoder, pairs: Sequence[Pair], folder: Path) -> list[GoldenInput]:
    """Captions of pictures across the table: one item with the default prompt, one with its pair's own, one with a prompt that is cut.

    The long prompt makes a changed budget change a score. Only pictures that a server takes by default are chosen; a text-only
    model gets none. Every item begins in its own third of its scene's pairs, since a table may have one scene only; with too few
    of its own it is filled up with captions of the others. Raises ArtifactInvalid.
    """
    scenes: dict[str | None, list[Pair]] = {}
    for pair in pairs:
        scenes.setdefault(pair.image if encoder.takes_images else pair.prompt, []).append(pair)
    takes = [key for key in scenes if not encoder.takes_images or (key is not None and _server_takes(folder / key))]
    if not takes:
        raise ArtifactInvalid(f"{folder}: no pair with a picture that a server takes, so there is nothing to check the artifact with")
    keys = [takes[place * (len(takes) - 1) // (NUM_ITEMS - 1)] for place in range(NUM_ITEMS)]
    keys[1] = next((key for key in takes if _own_prompt(scenes[key])), keys[1])
    items = []
    for number, (key, prompt) in enumerate(zip(keys, _prompts(encoder, _own_prompt(scenes[keys[1]])), strict=True)):
        own = scenes[key]
        start = number * len(own) // NUM_ITEMS
        captions = tuple(dict.fromkeys(_captions_of([*own[start:], *own[:start], *pairs])))[:NUM_CAPTIONS]
        items.append(GoldenInput(folder / str(key) if encoder.takes_images else None, captions, prompt))
    return items


def widened_tolerance(golden: Golden, differences: dict[NumberFormat, float]) -> Golden:
    """Room for what bfloat16 was seen to round to. float32 is never widened: there a difference is a fault.

    Raises ArtifactInvalid where bfloat16 rounds so far that it is another model.
    """
    found, limit = differences["bfloat16"], max(_MIN_ROUNDED, _MAX_ROUNDED * _spread(golden))
    if not found <= limit:
        raise ArtifactInvalid(
            f"golden scores in bfloat16 differ by {found:.2e}, expected at most {limit:.2e}, "
            f"a quarter of their spread: this model cannot be served in bfloat16"
        )
    wanted = min(limit, max(golden.tolerance["bfloat16"], _ROOM * found))
    return golden.model_copy(update={"tolerance": golden.tolerance | {"bfloat16": wanted}})


@dataclass(frozen=True, slots=True)
class Proof:
    """What a process that knew only the artifact found: largest golden differences, and the fingerprint it would serve under."""

    differences: dict[NumberFormat, float]
    fingerprint: str
    dtype: str
    device: str
    takes_images: bool


def prove_in_fresh_process(artifact: Path) -> Proof:
    """Run this module by itself on an artifact. Raises ArtifactInvalid with the line that process ended with."""
    command = [sys.executable, "-m", "training.golden", str(artifact)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603 (our own module)
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    if done.returncode != 0:
        reason = lines[-1] if lines else "it said nothing"
        raise ArtifactInvalid(f"a fresh process could not load the artifact (exit code {done.returncode}): {reason}")
    return Proof(**json.loads(done.stdout))


def prove(root: Path) -> Proof:
    """Load and score as a server would, in both formats. Raises ArtifactInvalid where float32 misses a golden score."""
    artifact = open_artifact(str(root.resolve()), offline=True)  # a bare name could be that of a bundled artifact
    golden = artifact.golden()
    if golden is None:
        raise ArtifactInvalid(f"{root}: no golden scores")
    encoder = load_encoder(artifact)
    groups = list(_encode(encoder, artifact, golden))
    prints: dict[str, str] = {}
    differences: dict[NumberFormat, float] = {}
    formats: tuple[NumberFormat, ...] = ("float32", "bfloat16")
    for dtype in formats:
        loaded = load_model(artifact, dtype=dtype)
        found = [score for group in groups for score in score_shared(loaded.model, [group])[0].values]
        differences[dtype] = _largest_difference(golden, found)
        prints[dtype] = loaded.fingerprint
        del loaded
        gc.collect()  # before the next one is loaded: there may be no room for two
    limit = min(golden.tolerance["float32"], _MAX_SHARE * _spread(golden))
    if not differences["float32"] <= limit:
        raise ArtifactInvalid(f"{root}: golden scores in float32 differ by {differences['float32']:.2e}, expected at most {limit:.0e}")
    device = resolve_device("auto")
    served: NumberFormat = "float32" if device == "cpu" else artifact.config.dtype
    return Proof(differences, prints[served], served, device, encoder.takes_images)


def _spread(golden: Golden) -> float:
    return statistics.pstdev(score for item in golden.items for score in item.scores)


def _largest_difference(golden: Golden, found: Sequence[float]) -> float:
    expected = [score for item in golden.items for score in item.scores]
    if not all(map(math.isfinite, found)):
        raise ArtifactInvalid("a golden score is not finite")
    return max(abs(ours - theirs) for ours, theirs in zip(found, expected, strict=True))


def _encode(encoder: Encoder, artifact: Artifact, golden: Golden) -> Iterator[EncodedGroup]:
    for number, item in enumerate(golden.items):
        image = None if item.image is None else artifact.root / item.image
        yield encode_golden(encoder, GoldenInput(image, tuple(item.captions), item.prompt), f"golden item {number}")[0]


def _prompts(encoder: Encoder, own: str | None) -> tuple[str | None, str | None, str | None]:
    """The default prompt, one of the pairs' own, and one over the budget; all the default where the model allows no other."""
    if encoder.config.prompt_policy == "fixed":
        return None, None, None
    limit = encoder.config.max_prompt_tokens
    return None, own, None if limit is None else long_prompt(limit)


def _own_prompt(pairs: Iterable[Pair]) -> str | None:
    return next((pair.prompt for pair in pairs if pair.prompt is not None), None)


def _captions_of(pairs: Iterable[Pair]) -> list[str]:
    return [caption for pair in pairs for caption in (pair.chosen, pair.rejected)]


def _server_takes(path: Path) -> bool:
    """Whether the picture is within a server's default limits, by its header."""
    try:
        probe_image(path.read_bytes(), GOLDEN_LIMITS)
    except (OSError, ApiError):
        return False
    return True


def main(artifact: Annotated[Path, typer.Argument(help="The artifact's directory.")]) -> None:
    """Score the golden items of an artifact and print the differences as JSON."""
    disable_progress_bar()  # a refusal is one line
    try:
        typer.echo(json.dumps(asdict(prove(artifact))))
    except PunchlineError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(3) from None


if __name__ == "__main__":
    typer.run(main)
