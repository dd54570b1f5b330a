"""Load, faults and restarts against real processes whose every right answer is known beforehand."""
