"""Large pages for the arrays of a CPU step. Knows nothing of jax: it must act before anything is allocated."""

from __future__ import annotations

import os
import sys

# XLA on a CPU takes its temporary arrays from malloc anew at every step. With glibc's defaults each goes back to the system and
# costs a page fault per 4 KB when it returns: 427 ms a step of the quickstart's model against 263 ms with these (benchmarks/LOG.md).
TUNABLES = "glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=42949672960:glibc.malloc.top_pad=268435456"


def relaunch_with_large_pages() -> None:
    """Starts this very command again with glibc keeping memory in large pages, as glibc reads its settings at process start only.

    Does nothing where GLIBC_TUNABLES is set already (also by this function), and elsewhere than on Linux.
    """
    if sys.platform != "linux" or "GLIBC_TUNABLES" in os.environ:
        return
    os.environ["GLIBC_TUNABLES"] = TUNABLES
    os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
