"""T10: schemathesis draws requests from our OpenAPI schema, valid and not. No answer is our fault, or of another shape than promised."""

from __future__ import annotations

import asyncio
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from app.api.dialects.table import PATHS
from tests.load.processes import Oracle, oracle
from tests.load.scenario import Report, Run, Scenario, settled
from tests.load.truth import draw
from tests.load.wire import Pool, post

_HERE = Path(__file__).parent.parent
_SEED = 20
_SHORT = 30  # requests an operation; enough for each of the scoring routes to score some
_SCORING = ("/score", "/compare", "/rank", *sorted(PATHS))


async def run(run: Run) -> Report:
    report = Report()
    async with oracle(*run.server_plant("odd-status"), core=run.core) as server:
        pool, picture = server.pool(), draw(10)
        sent = await pool.ask(post("/images", "application/octet-stream", picture.data, "fuzz", method="PUT"))
        found = await _fuzz(server, sent.json()["image_id"], int(run.pick(_SHORT, 3000)))
        after = await settled(server)
        alive = await _answers(pool)
        pool.close()
    cases, failures = found["test_cases"]["generated"], found["failures"]
    report.add_zero("failures of schemathesis", sum(each["count"] for each in failures), cases)
    report.add("errors while it ran", len(found["errors"]), not found["errors"])
    report.add("operations it tested", f"{found['operations']['tested']} of {found['operations']['total']}", _is_whole(found))
    scored = {route: sum(value for name, value in after.items() if _is_scored(name, route)) for route in _SCORING}
    report.add("of its requests were scored", int(sum(scored.values())), sum(scored.values()) > 0)
    never = [route for route, value in scored.items() if not value]
    report.add("scoring routes of which none was", ", ".join(never) or 0, not never)
    codes = {name.split('"')[1] for name, value in after.items() if name.startswith("reward_errors_total") and value}
    report.add("error codes met", len(codes), len(codes) > 5)
    ours = sorted(codes & {"internal_error", "internal_shape", "scoring_failed", "overloaded", "device_fault", "not_ready", "draining"})
    report.add("error codes that are our fault", ", ".join(ours) or 0, not ours)
    report.add("the server answers afterwards", alive, alive)
    report.shown += [f"{each['title']}: {', '.join(each['operations'])}" for each in failures] + [str(each) for each in found["errors"]]
    return report


async def _fuzz(server: Oracle, image_id: str, max_examples: int) -> dict[str, Any]:
    """What its own report says. Raises RuntimeError when there is none."""
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "report.json"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "schemathesis.cli", "--config-file", str(_HERE / "schemathesis.toml"), "--no-color",
            "run", f"http://127.0.0.1:{server.port}/openapi.json",
            "--max-examples", str(max_examples), "--seed", str(_SEED),
            "--generation-database", "none", "--continue-on-failure", "--suppress-health-check", "all",
            "--report", "json", "--report-json-path", str(told),
            cwd=folder,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            env={
                **os.environ,
                "PYTHONPATH": str(_HERE.parent.parent),
                "SCHEMATHESIS_HOOKS": "tests.load.fuzz_hooks",
                "FUZZ_IMAGE_ID": image_id,
            },
        )  # fmt: skip
        output, _ = await process.communicate()
        if not told.exists():
            raise RuntimeError(f"schemathesis made no report: {output.decode()[-2000:]}")
        found: dict[str, Any] = json.loads(told.read_bytes())
        if found["failures"]:
            print(output.decode()[-6000:], file=sys.stderr)
        return found


def _is_whole(found: dict[str, Any]) -> bool:
    return bool(found["complete"]) and found["operations"]["tested"] == found["operations"]["total"]


def _is_scored(name: str, route: str) -> bool:
    return name.startswith("reward_requests_total") and '"ok"' in name and f'"{route}"' in name


async def _answers(pool: Pool) -> bool:
    answer = await pool.ask(b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n")
    return answer.status == 200


FUZZING = Scenario(
    "T10", "schemathesis: requests drawn from the OpenAPI schema, valid and not", {"odd-status": "failures of schemathesis"}, run
)
