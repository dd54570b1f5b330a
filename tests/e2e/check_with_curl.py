"""Ask a running demo server through curl and hold its numbers to the golden scores of the artifact.

python -m tests.e2e.check_with_curl http://127.0.0.1:8000
"""

from __future__ import annotations

import json
import math
import subprocess
import sys

from app.artifacts import DEMO_PATH, GOLDEN_NAME, Golden, GoldenItem

TOLERANCE = 1e-4


def curl(url: str, *arguments: str) -> dict:
    """One curl call that must answer 200 with JSON."""
    done = subprocess.run(["curl", "-fsS", url, *arguments], capture_output=True, text=True, check=True, timeout=60)
    return json.loads(done.stdout)


def check_score(url: str, item: GoldenItem) -> None:
    captions = [part for caption in item.captions for part in ("--form-string", f"caption={caption}")]
    answer = curl(f"{url}/score", *shared(item), *captions)
    worst = max(abs(found - expected) for found, expected in zip(answer["scores"], item.scores, strict=True))
    print(f"/score   {item.image}: {len(item.scores)} scores, largest difference {worst:.1e}")
    if worst > TOLERANCE:
        raise SystemExit(f"expected {item.scores}, found {answer['scores']}")


def check_compare(url: str, item: GoldenItem) -> None:
    """The two best: close enough that a wrong probability shows."""
    (second, runner_up), (best, winner) = sorted(pairs(item))[-2:]
    answer = curl(f"{url}/compare", *shared(item), "--form-string", f"a={runner_up}", "--form-string", f"b={winner}")
    expected = 1 / (1 + math.exp(best - second))
    print(f"/compare {item.image}: preferred {answer['preferred']}, probability_a {answer['probability_a']:.4f}, expected {expected:.4f}")
    if answer["preferred"] != "b" or abs(answer["probability_a"] - expected) > TOLERANCE:
        raise SystemExit(f"wrong comparison: {answer}")


def shared(item: GoldenItem) -> tuple[str, ...]:
    """The picture, and the prompt if the item has one."""
    prompt = () if item.prompt is None else ("--form-string", f"prompt={item.prompt}")
    return ("-F", f"image=@{DEMO_PATH / str(item.image)}", *prompt)


def pairs(item: GoldenItem) -> list[tuple[float, str]]:
    return list(zip(item.scores, item.captions, strict=True))


def main() -> None:
    golden = Golden.model_validate_json((DEMO_PATH / GOLDEN_NAME).read_bytes())
    for item in golden.items:
        check_score(sys.argv[1], item)
        check_compare(sys.argv[1], item)


if __name__ == "__main__":
    main()
