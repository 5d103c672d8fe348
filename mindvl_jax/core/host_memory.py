"""Large pages for the arrays of a CPU step. Imports no jax: it must run before anything is allocated."""

from __future__ import annotations

import os
import sys

# XLA on a CPU allocates its temporary arrays by malloc at every step. By default glibc returns them to the system, so
# each costs a page fault per 4 KB again: 427 ms a step of the quickstart's model, 263 ms with these settings
# (benchmarks/LOG.md).
TUNABLES = (
    "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=42949672960"
    ":glibc.malloc.top_pad=268435456"
)


def relaunch_with_large_pages() -> None:
    """Restart this command with glibc set to keep memory in large pages; glibc reads its settings at process start
    only.

    Does nothing if GLIBC_TUNABLES is set (also by this function) or the system is not Linux.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])


def physical_memory() -> int:
    """Bytes of memory of this machine; 0 where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return 0
