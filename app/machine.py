"""What this process may use of its machine: processors and memory within the container's limits, and which allocator serves it.

Linux tells all of it in files; where they are missing, the answer is what Python knows. Knows neither torch nor models.
"""

from __future__ import annotations

import ctypes
import gc
import math
import os
import re
import sys
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup")
_NEVER = 1_000_000  # times that the younger were looked at
_DONT_NEED = 4  # of madvise(2)
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # of mallopt(3)
_LARGE_BLOCK, _LARGEST_BLOCK = 128 << 10, 32 << 20  # bytes: where glibc begins to map a block by itself, and as far as it raises that
_GLIBC = re.compile(r"/libc(\.so\.6|-2\.\d+\.so)$", re.MULTILINE)
_OTHER_ALLOCATORS = ("tcmalloc", "jemalloc", "mimalloc")


def num_processors(cgroup: Path = _CGROUP) -> int:
    """Processors this process may run on at once: its affinity, and the container's quota, whichever is less."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota, _, period = _read(cgroup / "cpu.max").partition(" ")
    if quota.isdigit() and period.strip().isdigit():
        allowed = min(allowed, math.ceil(int(quota) / int(period)))
    return max(1, allowed)


def available_bytes(cgroup: Path = _CGROUP, meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Memory this process may still take before the machine or its container runs out; None where nobody tells."""
    found = [line.split()[1] for line in _read(meminfo).splitlines() if line.startswith("MemAvailable:")]
    free = int(found[0]) * 1024 if found else None
    limit, used = _read(cgroup / "memory.max").strip(), _read(cgroup / "memory.current").strip()
    if limit.isdigit() and used.isdigit():
        left = max(0, int(limit) - int(used) + _reclaimable(cgroup))
        free = left if free is None else min(free, left)
    return free


def allocator(maps: Path = Path("/proc/self/maps")) -> str:
    """Which memory allocator this process runs on: tcmalloc, jemalloc, mimalloc, glibc, or `system`."""
    loaded = _read(maps)
    for name in _OTHER_ALLOCATORS:
        if name in loaded:
            return name
    return "glibc" if sys.platform == "linux" and _GLIBC.search(loaded) else "system"


def peak_bytes() -> int | None:
    """Most memory this process had resident since `reset_peak`, or since it began; None where nobody tells."""
    found = [line.split()[1] for line in _read(Path("/proc/self/status")).splitlines() if line.startswith("VmHWM:")]
    return int(found[0]) * 1024 if found else None


def resident_bytes() -> int | None:
    """Memory this process has resident now."""
    found = [line.split()[1] for line in _read(Path("/proc/self/status")).splitlines() if line.startswith("VmRSS:")]
    return int(found[0]) * 1024 if found else None


def reset_peak() -> bool:
    """Forget the peak so far (proc(5): 5 to clear_refs); False where the kernel does not let us."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def mapped_files(maps: Path = Path("/proc/self/maps")) -> list[tuple[int, int]]:
    """Address ranges, first and behind the last byte, where files are mapped into memory, whatever they are called. Sorted."""
    fields = [line.split(maxsplit=5) for line in _read(maps).splitlines()]
    ranges = [parts[0].split("-") for parts in fields if len(parts) > 5 and parts[5].startswith("/")]
    return sorted((int(first, 16), int(behind, 16)) for first, behind in ranges)


class MappedFiles:
    """Where files were mapped into this process's memory when this was made."""

    def __init__(self) -> None:
        self._ranges = mapped_files()
        self._firsts = [first for first, _ in self._ranges]

    def hold(self, address: int, num_bytes: int) -> bool:
        """Whether all these bytes are a file's."""
        place = bisect_right(self._firsts, address) - 1
        return place >= 0 and address + num_bytes <= self._ranges[place][1]

    def forget(self, address: int, num_bytes: int) -> None:
        """Give back the pages of what will not be read again; nothing happens to other memory."""
        if self.hold(address, num_bytes):
            forget_pages(address, num_bytes)


def forget_pages(address: int, num_bytes: int) -> bool:
    """Give back the whole pages of a part of a mapped file that nobody reads again; the file still holds them (madvise(2)).

    Only for addresses within `mapped_files`: elsewhere the content would be lost. Returns whether it was done.
    """
    page = os.sysconf("SC_PAGE_SIZE")
    first, behind = -(-address // page) * page, (address + num_bytes) // page * page
    if behind <= first:
        return False
    return bool(ctypes.CDLL(None).madvise(ctypes.c_void_p(first), ctypes.c_size_t(behind - first), _DONT_NEED) == 0)


def give_back() -> bool:
    """Free memory that the allocator keeps in whole pages goes back to the system (malloc_trim(3)); False where it has no such call.

    What a server uses of its heap stays the same over requests without end; the gaps between slowly become more.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return trim is not None and bool(trim(ctypes.c_size_t(0)))


def keep_large_blocks_apart() -> bool:
    """Each block of 128 KiB or more is mapped by itself, and what is free at the heap's end goes back; False where nobody can be told.

    By itself glibc raises that limit with every large block that is freed, up to 32 MiB: files, bodies and pictures then lie between
    what stays, and the gaps they leave become more. To be called first of all (mallopt(3)).
    """
    return _told((_M_MMAP_THRESHOLD, _LARGE_BLOCK), (_M_TRIM_THRESHOLD, _LARGE_BLOCK))


def keep_large_blocks_at_hand() -> bool:
    """The opposite, for a process that computes in this memory: intermediate results would have to be paged in every time."""
    return _told((_M_MMAP_THRESHOLD, _LARGEST_BLOCK), (_M_TRIM_THRESHOLD, 2 * _LARGEST_BLOCK))


def share_one_heap() -> bool:
    """Threads that start from now on have no heap of their own; cannot be undone. False where nobody can be told."""
    return _told((_M_ARENA_MAX, 1))


def _told(*what: tuple[int, int]) -> bool:
    tell = getattr(ctypes.CDLL(None), "mallopt", None) if allocator() == "glibc" else None
    return tell is not None and all(tell(*each) for each in what)


def quiet_collector() -> Callable[[], None]:
    """Keep Python's collector of cycles from stopping everybody for tenths of a second; returns what undoes it.

    What is there now, models and routes, is left out of its looks, and at what has become old it never looks by itself: whoever
    calls this calls `gc.collect` now and then. Without cycles memory is given back at once, as always.
    """
    before = gc.get_threshold()
    gc.collect()
    gc.freeze()
    gc.set_threshold(before[0], before[1], _NEVER)

    def undo() -> None:
        gc.unfreeze()
        gc.set_threshold(*before)

    return undo


def _reclaimable(cgroup: Path) -> int:
    """Cached file pages, which count as used and are given up at once."""
    lines = dict(line.split() for line in _read(cgroup / "memory.stat").splitlines() if len(line.split()) == 2)
    return int(lines.get("inactive_file", 0))


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""
