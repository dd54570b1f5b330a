"""`python -m tests.training.limited BYTES MODULE ARGUMENTS..`: run a module that cannot write a file larger than that."""

from __future__ import annotations

import resource
import runpy
import signal
import sys

if __name__ == "__main__":
    _, limit, module, *arguments = sys.argv
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing fails with an error instead
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
