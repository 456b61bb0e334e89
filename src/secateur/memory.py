"""Resident memory of this process."""

import ctypes
import resource
import sys
from functools import cache


def peak_bytes() -> int:
    """Return the highest resident set size so far in bytes, file-backed pages included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def release_freed() -> None:
    """Hand memory that was freed back to the system, where the C library keeps it otherwise (glibc).

    Matrices of a few megabytes come from the heap, whose holes stay resident: without this a prune of a small model
    holds a tenth more than it uses.
    """
    trim = _malloc_trim()
    if trim is not None:
        trim(0)


@cache
def _malloc_trim() -> "ctypes._NamedFuncPointer | None":
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)
