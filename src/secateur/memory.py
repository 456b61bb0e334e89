"""Resident memory of this process, in bytes."""

import resource
import sys


def peak_bytes() -> int:
    """Return the highest resident set size so far, file-backed pages included."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
