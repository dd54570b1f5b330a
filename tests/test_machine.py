"""What a process may use of its machine, from files a test writes; what changes the allocator runs in a process of its own."""

from __future__ import annotations

import gc
import mmap
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest

from app.machine import (
    allocator,
    available_bytes,
    forget_pages,
    mapped_files,
    num_processors,
    peak_bytes,
    quiet_collector,
    reset_peak,
    resident_bytes,
)

MIB = 1 << 20
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="Linux tells it in files")
on_glibc = pytest.mark.skipif(allocator() != "glibc", reason="another allocator")


def write(folder: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (folder / name.replace("_", ".")).write_text(text)
    return folder


# Processors


@pytest.mark.parametrize(
    ("quota", "allowed"),
    [
        ("150000 100000\n", 2),
        ("100000 100000\n", 1),
        ("100001 100000\n", 2),
        ("1000 100000\n", 1),
        ("50000 25000\n", 2),
        ("250000 50000", 5),
    ],
)
def test_a_quota_is_rounded_up(tmp_path: Path, quota: str, allowed: int) -> None:
    """One and a half processors are two threads, of which one waits at times; less than one is one."""
    assert num_processors(write(tmp_path, cpu_max=quota)) == min(allowed, num_processors(tmp_path / "missing"))


def test_a_quota_of_one_is_seen(tmp_path: Path) -> None:
    assert num_processors(write(tmp_path, cpu_max="100000 100000\n")) == 1


@pytest.mark.parametrize("quota", ["max 100000\n", "max\n", "", "none of this", "-1 100000"])
def test_without_a_quota_it_is_the_affinity(tmp_path: Path, quota: str) -> None:
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert num_processors(write(tmp_path, cpu_max=quota)) == num_processors(tmp_path / "missing") == allowed


@on_linux
def test_a_process_bound_to_one_processor_has_one() -> None:
    program = """
import os
from app.machine import num_processors
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
print(num_processors())
"""
    assert child(program) == "1"


# Memory


MEMINFO = "MemTotal:       8000000 kB\nMemFree:         100000 kB\nMemAvailable:    2000000 kB\nBuffers:  5 kB\n"


def test_memory_of_a_machine_without_a_container(tmp_path: Path) -> None:
    meminfo = write(tmp_path, meminfo=MEMINFO) / "meminfo"
    assert available_bytes(tmp_path, meminfo) == 2_000_000 * 1024
    assert available_bytes(write(tmp_path, memory_max="max\n", memory_current="5\n"), meminfo) == 2_000_000 * 1024


@pytest.mark.parametrize(
    ("limit", "used", "stat", "left"),
    [
        (1000, 400, "", 600),
        (1000, 400, "anon 300\ninactive_file 100\nactive_file 50\n", 700),  # cached pages are given up
        (1000, 1200, "", 0),
        (1000, 1200, "inactive_file 300\nslab", 100),
        (10**15, 0, "", 2_000_000 * 1024),  # the machine has less than the container may take
    ],
)
def test_memory_of_a_container(tmp_path: Path, limit: int, used: int, stat: str, left: int) -> None:
    write(tmp_path, meminfo=MEMINFO, memory_max=f"{limit}\n", memory_current=f"{used}\n", memory_stat=stat)
    assert available_bytes(tmp_path, tmp_path / "meminfo") == left
    if limit == 1000:
        assert available_bytes(tmp_path, tmp_path / "missing") == left


@pytest.mark.parametrize("meminfo", ["", "MemTotal: 8 kB\n"])
def test_where_nobody_tells_nothing_is_claimed(tmp_path: Path, meminfo: str) -> None:
    assert available_bytes(tmp_path, write(tmp_path, meminfo=meminfo) / "meminfo") is None
    write(tmp_path, memory_max="1000")  # how much is used, is not said
    assert available_bytes(tmp_path, tmp_path / "meminfo") is None


@on_linux
def test_this_machine_tells() -> None:
    assert num_processors() >= 1
    left = available_bytes()
    assert left is not None
    assert left > 0


@on_linux
def test_peak_and_resident_memory_follow_what_is_taken() -> None:
    program = """
from app.machine import peak_bytes, reset_peak, resident_bytes
before = resident_bytes()
block = bytearray(b"x") * (200 << 20)
held, high = resident_bytes(), peak_bytes()
del block
was_reset = reset_peak()
print(*[each >> 20 for each in (held - before, high - before, resident_bytes() - before, peak_bytes() - before)], was_reset)
"""
    held, high, freed, again, was_reset = child(program).split()
    assert int(held) >= 190
    assert int(high) >= int(held)
    assert int(freed) < 50
    assert (int(again) < 50) == (was_reset == "True")


@on_linux
def test_the_peak_is_no_less_than_what_is_resident() -> None:
    peak, resident = peak_bytes(), resident_bytes()
    assert peak is not None
    assert resident is not None
    assert 0 < resident <= peak + MIB  # the kernel counts in batches
    assert reset_peak() in (True, False)


# Allocators


@pytest.mark.parametrize(
    ("maps", "expected"),
    [
        ("7f00-7f01 r-xp 00000000 08:01 5 /usr/lib/x86_64-linux-gnu/libtcmalloc_minimal.so.4\n7f02 /lib/libc.so.6\n", "tcmalloc"),
        ("7f02 /lib/x86_64-linux-gnu/libc.so.6\n7f00 /usr/lib/libjemalloc.so.2\n", "jemalloc"),
        ("7f00 /usr/lib/libmimalloc.so.2\n", "mimalloc"),
        ("7f00 /usr/lib/x86_64-linux-gnu/libc.so.6\n", "glibc" if sys.platform == "linux" else "system"),
        ("7f00-7f01 r-xp 0 08:01 5 /lib/x86_64-linux-gnu/libc-2.31.so\n", "glibc" if sys.platform == "linux" else "system"),
        ("7f00 /lib/ld-musl-x86_64.so.1\n", "system"),
        ("", "system"),
    ],
)
def test_the_allocator_is_the_one_that_is_loaded(tmp_path: Path, maps: str, expected: str) -> None:
    assert allocator(write(tmp_path, maps=maps) / "maps") == expected


def test_nobody_to_ask_is_the_systems_own(tmp_path: Path) -> None:
    assert allocator(tmp_path / "missing") == "system"


# Pages of mapped files


@on_linux
def test_ranges_of_mapped_files(tmp_path: Path) -> None:
    maps = "7f20-7f30 r--p 0 08:01 5 /hub/blobs/0a1b\n1000-2000 rw-p 0 08:01 5 /b c/two.safetensors (deleted)\n"
    maps += "9-a rw-p 0 00:00 0 [heap]\n7-8 rw-p 0 00:00 0\n"
    assert mapped_files(write(tmp_path, maps=maps) / "maps") == [(0x1000, 0x2000), (0x7F20, 0x7F30)]
    assert mapped_files(tmp_path / "missing") == []


@on_linux
def test_pages_of_a_mapped_file_are_given_back_and_still_hold_the_file(tmp_path: Path) -> None:
    program = f"""
import ctypes, mmap
from app.machine import forget_pages, mapped_files, resident_bytes
with open({str(tmp_path / "big.weights")!r}, "rb") as stream:
    mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
((first, behind),) = [place for place in mapped_files() if place[1] - place[0] == len(mapped)]
total, before = sum(mapped[::4096]), resident_bytes()
done = forget_pages(first + 1, behind - first - 2)  # not the first page, nor the last
after = resident_bytes()
print(done, (before - after) >> 20, sum(mapped[::4096]) == total)
"""
    (tmp_path / "big.weights").write_bytes(os.urandom(1 << 16) * 1600)  # 100 MiB
    done, fewer, is_equal = child(program).split()
    assert (done, is_equal) == ("True", "True")
    assert int(fewer) >= 90


@on_linux
def test_less_than_a_page_is_left_alone() -> None:
    assert not forget_pages(mmap.PAGESIZE + 1, mmap.PAGESIZE)
    assert not forget_pages(mmap.PAGESIZE, mmap.PAGESIZE - 1)
    assert not forget_pages(mmap.PAGESIZE, 0)


def child(program: str) -> str:
    """What a process of its own prints."""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return run.stdout.strip()


class Node:
    itself: Node


def test_the_collector_leaves_alone_what_was_there() -> None:
    threshold = gc.get_threshold()
    undo = quiet_collector()
    try:
        assert gc.get_freeze_count() > 0
        assert gc.get_threshold()[0] == threshold[0]
        assert gc.get_threshold()[2] > threshold[2]
        cycle = Node()
        cycle.itself = cycle
        gone = weakref.ref(cycle)
        del cycle
        gc.collect(0)
        assert gone() is None
    finally:
        undo()
    assert gc.get_freeze_count() == 0
    assert gc.get_threshold() == threshold


def test_what_is_free_goes_back_to_the_system() -> None:
    """Forty mebibytes in blocks of 64 KiB, of which every hundredth stays: the heap cannot shrink, its pages can."""
    program = """
import ctypes
from app.machine import allocator, give_back, resident_bytes
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
blocks = [libc.malloc(ctypes.c_size_t(65536)) for _ in range(640)]
for block in blocks:
    ctypes.memset(block, 1, 65536)
for number, block in enumerate(blocks):
    if number % 100:
        libc.free(ctypes.c_void_p(block))
before = resident_bytes()
print(allocator() if allocator() != "glibc" or before is None else give_back() and before - resident_bytes() > 20 << 20)
"""
    assert child(program) in ("True", "system", "tcmalloc", "jemalloc", "mimalloc")


PEAK = """
import ctypes
from app.machine import keep_large_blocks_apart, keep_large_blocks_at_hand, resident_bytes
told = {told}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
def block(size):
    found = libc.malloc(ctypes.c_size_t(size))
    ctypes.memset(found, 1, size)
    return ctypes.c_void_p(found)
before = resident_bytes()
libc.free(block(16 << 20))  # the limit rises to its size
body = block(8 << 20)
stays = block(1 << 10)  # on top of it
libc.free(body)
print(told, resident_bytes() - before < 4 << 20)
"""


@on_glibc
def test_a_body_between_blocks_that_stay_goes_back_to_the_system() -> None:
    assert child(PEAK.format(told="keep_large_blocks_apart()")) == "True True"
    assert child(PEAK.format(told="None")) == "None False"  # what glibc does by itself
    assert child(PEAK.format(told="keep_large_blocks_apart() and keep_large_blocks_at_hand()")) == "True False"


@on_glibc
def test_threads_share_the_heap() -> None:
    """In one of their own they would begin at an address of its own, far from the heap's."""
    program = """
import ctypes, threading
from app.machine import share_one_heap
told = {told}
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_size_t
found = []
def take():
    found.extend(libc.malloc(ctypes.c_size_t(3000)) for _ in range(2000))
thread = threading.Thread(target=take)
thread.start()
thread.join()
ranges = [line.split()[0].split("-") for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]")]
print(told, all(any(int(low, 16) <= each < int(high, 16) for low, high in ranges) for each in found))
"""
    assert child(program.format(told="share_one_heap()")) == "True True"
    assert child(program.format(told="None")) == "None False"
