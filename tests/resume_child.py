"""A process that prunes in children of its own, forked after all imports, so that each can be killed at any instant.

Reads one JSON object per line: `model`, `recipe`, `out`, and `kill_after`, the seconds after which the child gets
SIGKILL, or null. Answers with one line: exit status (-9 if killed) and seconds.
"""

import json
import os
import signal
import sys
import time
import traceback

from little import leave_out
from recipes import grouped

import secateur
import secateur.report.report
from secateur.model.checkpoint import load_model, open_checkpoint


def run(asked: dict[str, object]) -> None:
    """Prune in this process and leave it."""
    status = 1
    try:
        secateur.prune(asked["model"], grouped(asked["recipe"]), out=asked["out"])
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Answer until the input ends."""
    leave_out()
    for line in sys.stdin:
        asked = json.loads(line)
        load_model(open_checkpoint(asked["model"]))  # so that the children find every module imported
        start = time.monotonic()
        child = os.fork()
        if not child:
            run(asked)
        while True:
            done, status = os.waitpid(child, os.WNOHANG)
            seconds = time.monotonic() - start
            if done:
                break
            if asked["kill_after"] is not None and seconds > asked["kill_after"]:
                os.kill(child, signal.SIGKILL)
            time.sleep(0.002)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status), "seconds": seconds}), flush=True)


if __name__ == "__main__":
    main()
