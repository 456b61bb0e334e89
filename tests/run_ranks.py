"""Several ranks on this machine: torchrun with gloo, and what it printed."""

import os
import socket
import subprocess
import sys


def start_ranks(num_ranks: int, *arguments: object) -> subprocess.Popen[str]:
    """Start `torchrun --nproc-per-node NUM_RANKS ARGUMENTS` on a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc-per-node", num_ranks, "--master-port", port, *arguments]
    command = [sys.executable, *map(str, launch)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=dict(os.environ), stdout=pipe, stderr=pipe, text=True)


def run_ranks(num_ranks: int, *arguments: object, timeout: float = 600) -> tuple[int, str, str]:
    """Run it to its end; return exit status, standard output and standard error."""
    with start_ranks(num_ranks, *arguments) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return process.returncode, stdout, stderr
