"""The group of ranks: how several processes of one run find each other, end together, and say once how it ended.

In: what torchrun or `accelerate launch` puts into the environment. Out: a torch.distributed process group, gloo for
what lies in ordinary memory and nccl for what lies on a GPU. One process has no group, and nothing here does anything.

A rank that ends by itself says so in the group's store before its connections close, so that the others can tell it
from one that was lost.
"""

import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from secateur.errors import RankError

# How long all ranks may take to start, and how long one may work alone while the others wait for what it finds. A
# process that dies is noticed at once; this is for a machine that vanishes and leaves its connections open.
START, TIMEOUT = timedelta(minutes=10), timedelta(hours=2)
# How often a waiting rank looks, and how long a launcher may take to bury a dead process.
LOOK_SECONDS, BURIAL_SECONDS = 0.1, 2.0


@dataclass(frozen=True, slots=True)
class _Group:
    """`store`: small values that every rank can read, even when another is gone."""

    store: c10d.Store
    rank: int
    size: int


_groups: list[_Group] = []  # the one that `joined` made, if any
_joins = [0]


def launched_size() -> int:
    """Return how many ranks the launcher has started, 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank_device() -> torch.device:
    """Return where this rank computes: the GPU of its local rank, or the CPU on a machine without GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextmanager
def joined() -> Iterator[None]:
    """Make this process one of the ranks that the launcher started, until the block ends; all leave together.

    Nothing happens in one process, nor where a process group is there already. After an exception the connections stay
    open until the process ends: closed, they would have the others report a lost rank before this one says why it ends.
    Raises RankError if not all ranks start.
    """
    if launched_size() == 1 or dist.is_initialized():
        yield
        return
    on_gpu = rank_device().type == "cuda"
    if on_gpu:
        torch.cuda.set_device(rank_device())
    try:
        store, rank, size = next(iter(rendezvous("env://", timeout=START)))
        _joins[0] += 1
        store = c10d.PrefixStore(f"secateur-{_joins[0]}", store)  # what an earlier group left there is not for this one
        store.set(f"process-{rank}", f"{socket.gethostname()} {os.getpid()}")
        _groups.append(_Group(store, rank, size))
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"ranks: the {launched_size()} ranks did not find each other ({_first_line(error)}); start them with "
            f"torchrun or accelerate launch, all on one network."
        ) from None
    yield
    meet("end")  # without a limit: the first rank may be saving
    dist.barrier()
    dist.destroy_process_group()
    _groups.clear()


def meet(name: str) -> None:
    """Wait until every rank is here, however long one works by itself. Raises RankError if one is lost meanwhile."""
    if _groups:
        group = _groups[0]
        group.store.add(f"meet-{name}", 1)
        wait_until(lambda: group.store.add(f"meet-{name}", 0) >= group.size)


def next_turn(name: str) -> int | None:
    """Return the number of the next item of a list that no rank has taken yet; None where no store counts."""
    return _groups[0].store.add(f"turn-{name}", 1) - 1 if _groups else None


def wait_until(is_so: Callable[[], bool]) -> None:
    """Look again and again, so that a signal is heard. Raises RankError if a rank is lost or the store is gone."""
    while not _asked(is_so):
        time.sleep(LOOK_SECONDS)
        if _asked(lambda: bool(lost_ranks())):
            raise RankError(lost_text())


def _asked(is_so: Callable[[], bool]) -> bool:
    try:
        return is_so()
    except RuntimeError as error:
        raise RankError(lost_text(_first_line(error))) from None


def lost_ranks() -> list[int]:
    """Return the ranks of this machine whose process is gone without having said that it ends."""
    lost = []
    for group in _groups:
        for rank in range(group.size):
            if rank != group.rank and not group.store.check([f"ended-{rank}"]):
                host, number = group.store.get(f"process-{rank}").decode().rsplit(" ", 1)
                if host == socket.gethostname() and not _is_alive(int(number)):
                    lost.append(rank)
    return lost


def lost_text(reason: str = "") -> str:
    """Return the sentence on a lost rank, after looking for which one for as long as a launcher takes to bury it."""
    lost: list[int] = []
    until = time.monotonic() + BURIAL_SECONDS
    try:
        while _groups and not lost and time.monotonic() < until:
            lost = lost_ranks()
            time.sleep(LOOK_SECONDS)
    except RuntimeError:
        reason = reason or "the launcher is gone too"
    size = _groups[0].size if _groups else dist.get_world_size()
    which = f"{', '.join(map(str, lost))} of {size}" if lost else f"one of {size} no longer answers"
    said = f" ({reason})" if reason and not lost else ""
    return (
        f"rank {which} was lost{said}, so all ranks end and nothing half-written is left; look for why in its own "
        f"output (out of memory, a signal, its machine), then run the same command again "
        f"(prune with --resume goes on)."
    )


def last_word(sentence: str) -> str | None:
    """Return what this rank, which is about to end, is to tell people; None if another rank tells it.

    The sentence itself, or that a rank was lost, where that is why a launcher ends this one.
    """
    if not _groups:
        return sentence if int(os.environ.get("RANK", "0")) == 0 else None
    group = _groups[0]
    try:
        group.store.set(f"ended-{group.rank}", "")
        lost = lost_ranks()
        return None if group.store.add("said", 1) > 1 else lost_text() if lost else sentence
    except RuntimeError:  # the store went with the launcher
        return sentence if group.rank == 0 else None


def _is_alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    if stat.is_file():  # a dead process that nobody has buried yet is a zombie
        return stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[0] != "Z"
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
