"""`python -m tests.load.serve_oracle`: the oracle server, its memory arranged as `punchline serve` does it on a GPU, before all imports."""

from __future__ import annotations

from app.machine import keep_large_blocks_apart, share_one_heap

if __name__ == "__main__":
    keep_large_blocks_apart()
    share_one_heap()
    from tests.load.oracle_server import main

    main()
