"""A process with `fault.c` preloaded: it prunes again and again, and each time another writing call fails.

Arguments: model, recipe (JSON), an empty directory, which calls count (those on paths in it that begin with this), the
first call to fail, every how many calls one fails, the error (an errno name, or SHORT for a write that writes half and
a disk that is full from then on).
A bit of what a failed run leaves in its store flips before the run goes on. Prints one JSON line per failing call, and
at the end how many writing calls a run has.
"""

import ctypes
import errno
import json
import random
import shutil
import sys
from hashlib import sha256
from pathlib import Path

from damage import flip_a_bit
from little import leave_out
from recipes import grouped

import secateur
import secateur.report.report
from secateur.store import place_beside

FAULTS = ctypes.CDLL(None)
LOADED_BY = ("model.safetensors", "config.json", "tokenizer.json", "result.json")


def digest(out: Path) -> str:
    """Return a hash of the weights and the config."""
    return sha256((out / "model.safetensors").read_bytes() + (out / "config.json").read_bytes()).hexdigest()


def main() -> None:
    """Run."""
    model, recipe, place = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
    counted, first, step, number = sys.argv[4], int(sys.argv[5]), int(sys.argv[6]), getattr(errno, sys.argv[7], -1)
    leave_out()
    out = place / "out"

    def prune(*, fail_at: int) -> str:
        """Return what went wrong, by the class of the exception."""
        FAULTS.fault_arm(f"{place}/{counted}".encode(), fail_at, number)
        try:
            secateur.prune(model, grouped(recipe), out=out)
            return ""
        except secateur.SecateurError as error:
            return str(error)
        finally:
            FAULTS.fault_disarm()

    prune(fail_at=-1)
    num_calls, expected = FAULTS.fault_count(), digest(out)
    shutil.rmtree(out)
    for fail_at in range(first, num_calls + 1, step):
        said = prune(fail_at=fail_at)
        left = sorted(path.name for path in place.iterdir())
        is_there = out.exists()
        whole = is_there and digest(out) == expected and all((out / name).is_file() for name in LOADED_BY)
        flipped = not is_there and flip_a_bit(place_beside(out), random.Random(fail_at))
        again = "" if is_there else prune(fail_at=-1)
        found = {"call": fail_at, "said": said, "left": left, "there": is_there, "whole": whole, "again": again}
        found["flipped"] = flipped
        found["same"], found["after"] = digest(out) == expected, sorted(path.name for path in place.iterdir())
        print(json.dumps(found), flush=True)
        for path in place.iterdir():
            shutil.rmtree(path)
    print(json.dumps({"num_calls": num_calls}), flush=True)


if __name__ == "__main__":
    main()
