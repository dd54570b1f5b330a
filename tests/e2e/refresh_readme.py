"""`python -m tests.e2e.refresh_readme`: run the README's console blocks against a fresh server and write what they print.

For a maintainer who changed the demo or an answer; read the difference before committing it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.e2e.server import environment, started
from tests.e2e.test_readme import ADDRESS, README, ROOT, SEVERAL, steps


def main() -> None:
    text = README
    variables = {**environment(), "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "COLUMNS": "100"}
    with started() as server, started("--models", "newyorker=newyorker") as several:
        for step in steps():
            command = step.command.replace(ADDRESS, (several if SEVERAL.search(step.command) else server).url)
            done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=ROOT, env=variables, check=True)
            found = "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())
            text = text.replace(f"{step.command}\n{step.output}", f"{step.command}\n{found}", 1)
    (ROOT / "README.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
