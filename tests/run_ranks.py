"""Several ranks on this machine, by torchrun or as forks, with gloo, and what they printed."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from warm import WarmProcesses

FORKED = Path(__file__).with_name("forked_ranks.py")


def run_forked_ranks(warm: WarmProcesses, num_ranks: int, *arguments: object) -> tuple[int, str, str]:
    """Run the ranks as forks of a warm process; return exit status, standard output and standard error."""
    done = warm.run([sys.executable, FORKED, num_ranks, *arguments], env=dict(os.environ))
    return done.returncode, done.stdout, done.stderr


def start_ranks(num_ranks: int, *arguments: object) -> subprocess.Popen[str]:
    """Start `torchrun --nproc-per-node NUM_RANKS ARGUMENTS` on a free port."""
    return _launched(["--nproc-per-node", num_ranks, "--master-port", _free_port(), *arguments], None)


def run_machines(directories: list[Path], *arguments: object, timeout: float = 3600) -> None:
    """Run one rank per directory to its end, each by a launcher of its own that works there, as on several machines."""
    port, size = _free_port(), len(directories)
    where = f"--nproc-per-node 1 --master-addr 127.0.0.1 --master-port {port} --nnodes {size} --node-rank".split()
    launchers = [_launched([*where, number, *arguments], place) for number, place in enumerate(directories)]
    for launcher in launchers:
        _, stderr = launcher.communicate(timeout=timeout)
        assert launcher.returncode == 0, stderr


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _launched(launch: list[object], directory: Path | None) -> subprocess.Popen[str]:
    command, pipe = [sys.executable, "-m", "torch.distributed.run", *map(str, launch)], subprocess.PIPE
    return subprocess.Popen(command, env=dict(os.environ), cwd=directory, stdout=pipe, stderr=pipe, text=True)


def run_ranks(num_ranks: int, *arguments: object, timeout: float = 3600) -> tuple[int, str, str]:
    """Run it to its end; return exit status, standard output and standard error."""
    with start_ranks(num_ranks, *arguments) as process:
        try:
            stdout, stderr = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
    return process.returncode, stdout, stderr
