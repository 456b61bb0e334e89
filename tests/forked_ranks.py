"""Ranks as forks of one process that has torch imported: python forked_ranks.py NUM_RANKS SCRIPT ARGUMENTS.

They find each other as those of torchrun do, without a launcher's imports and their own. If one fails the others are
ended, and so is this process.
"""

import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

import torch.distributed  # noqa: F401  # once, for all ranks


def run_rank(rank: int, num_ranks: int, port: int, script: str, arguments: list[str]) -> int:
    """Run a script, or `-m MODULE`, as one rank; return its exit status."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    sys.argv = [script, *arguments]
    try:
        if script == "-m":
            sys.argv = arguments
            runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
        else:
            sys.path.insert(0, str(Path(script).parent))
            runpy.run_path(script, run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main(num_ranks: int, script: str, arguments: list[str]) -> int:
    """Run the ranks; return the first exit status that is not 0, if any."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children: set[int] = set()
    for rank in range(num_ranks):
        child = os.fork()
        if child == 0:
            status = run_rank(rank, num_ranks, port, script, arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        children.add(child)
    failed = 0
    while children:
        child, status = os.wait()
        children.discard(child)
        if status and not failed:
            failed = abs(os.waitstatus_to_exitcode(status))
            for other in children:
                os.kill(other, signal.SIGTERM)
    return failed


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), sys.argv[2], sys.argv[3:]))
