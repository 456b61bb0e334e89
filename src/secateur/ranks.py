"""Ranks: processes that share one run. Each has the whole model and its own part of the text.

Upper half: how ranks find each other, end together, and report the end once. Lower half: what they
exchange. In one process every function returns its input.
"""

import io
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.distributed.rendezvous import rendezvous

from secateur.errors import RankError, RecipeError, SecateurError, shortened

# Limits for all ranks to start, and for waiting on one rank's result. A dead process is noticed at
# once; these are for a machine that vanishes and leaves its connections open.
START, TIMEOUT = timedelta(minutes=10), timedelta(hours=2)
# How often a waiting rank looks, and how long a launcher may take to reap a dead process.
LOOK_SECONDS, REAP_SECONDS = 0.1, 2.0


@dataclass(frozen=True, slots=True)
class _Group:
    """`store`: small values that every rank can read, even when another rank is gone."""

    store: c10d.Store
    rank: int
    size: int


_groups: list[_Group] = []  # the group that `joined` made, if any
_joins = [0]


def launched_size() -> int:
    """Return how many ranks the launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def rank_device() -> torch.device:
    """Return this rank's device: the GPU of its local rank, or the CPU without GPUs."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


@contextmanager
def joined() -> Iterator[None]:
    """Join the ranks that the launcher started, until the block ends; all leave together.

    Does nothing in one process, or if there is a process group already. After an exception the
    connections stay open until the process ends; otherwise the others would report a lost rank
    before this one says why it ends. Raises RankError if not all ranks start.
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
        store = c10d.PrefixStore(f"secateur-{_joins[0]}", store)  # not an earlier group's values
        store.set(f"process-{rank}", f"{socket.gethostname()} {os.getpid()}")
        _groups.append(_Group(store, rank, size))
        backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        raise RankError(
            f"ranks: the {launched_size()} ranks did not find each other ({_first_line(error)}); "
            "start them with torchrun or accelerate launch, all on one network."
        ) from None
    yield
    meet("end")  # no time limit: the first rank may be saving
    dist.barrier()
    dist.destroy_process_group()
    _groups.clear()


def meet(name: str) -> None:
    """Wait for every rank, however long one works alone. Raises RankError if one, or the store, is
    lost.
    """
    if _groups:
        group = _groups[0]
        group.store.add(f"meet-{name}", 1)
        # Polls, so that signals are handled.
        while not _call(lambda: group.store.add(f"meet-{name}", 0) >= group.size):
            time.sleep(LOOK_SECONDS)
            if _call(lost_ranks):
                raise RankError(lost_text())


def is_alive(process: int) -> bool:
    """Whether the process runs; a zombie does not."""
    try:
        return psutil.Process(process).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
    except psutil.AccessDenied:  # another user's
        return True


def lost_ranks() -> list[int]:
    """Return this machine's ranks whose process ended without `last_word`."""
    lost = []
    for group in _groups:
        for rank in range(group.size):
            if rank != group.rank and not group.store.check([f"ended-{rank}"]):
                host, number = group.store.get(f"process-{rank}").decode().rsplit(" ", 1)
                if host == socket.gethostname() and not is_alive(int(number)):
                    lost.append(rank)
    return lost


def lost_text(reason: str = "") -> str:
    """Return the sentence on a lost rank; waits for a launcher to reap it, to name it."""
    lost: list[int] = []
    until = time.monotonic() + REAP_SECONDS
    try:
        while _groups and not lost and time.monotonic() < until:
            lost = lost_ranks()
            time.sleep(LOOK_SECONDS)
    except RuntimeError:
        reason = reason or "the launcher is gone too"
    size = _groups[0].size if _groups else dist.get_world_size()
    which = f"{', '.join(map(str, lost))} of {size}" if lost else f"one of {size} no longer answers"
    why = f" ({reason})" if reason and not lost else ""
    return (
        f"rank {which} was lost{why}, so all ranks end and nothing half-written is left; look for "
        "why in its own output (out of memory, a signal, its machine), then run the same command "
        "again, which goes on."
    )


def last_word(sentence: str) -> str | None:
    """Return what this rank prints as it ends; None if another rank prints it.

    That is the sentence, or that a rank was lost, if this is why a launcher ends this one.
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


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


T = TypeVar("T")
Item = TypeVar("Item")

# Tensors up to this many numbers share a buffer; larger ones are sent without a copy.
SMALL_TENSOR = 1 << 16

_alone = [False]
_lists: list[int] = [0]  # lists worked through `in_turns`


def size() -> int:
    """Return the number of ranks; 1 without any."""
    if _alone[0] or not dist.is_initialized():
        return 1
    return dist.get_world_size()


def rank() -> int:
    """Return this rank's number, from 0."""
    return 0 if size() == 1 else dist.get_rank()


def is_first() -> bool:
    """Whether this rank writes, prints and decides; true for a process without others."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """Within the block this rank works as one process, whatever the others do."""
    before = _alone[0]
    _alone[0] = True
    try:
        yield
    finally:
        _alone[0] = before


def own_part(items: list[Item]) -> list[Item]:
    """Return this rank's part of a list: item i belongs to rank i mod the number of ranks."""
    return items[rank() :: size()]


def domains_ended(ended: str, begun: str, order: Iterable[str]) -> list[str]:
    """Return the domains that end when batches of `begun` follow those of `ended`; "" for none.

    In one process that is `ended`. A rank may have no batch of a domain, but all ranks must sum the
    same domains in the same `order`, the order of batches.
    """
    if size() == 1:
        return [ended] if ended else []
    names = list(order)
    return names[names.index(ended) if ended else 0 : names.index(begun) if begun else len(names)]


def sum_tensors(tensors: Sequence[Tensor]) -> None:
    """Sum every tensor over ranks, in place and in its own dtype, in equal order on all ranks."""
    if size() == 1:
        return
    small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() <= SMALL_TENSOR:
            small.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        else:
            _call(lambda tensor=tensor: dist.all_reduce(tensor))
    for group in small.values():
        flat = torch.cat([tensor.flatten() for tensor in group])
        _call(lambda flat=flat: dist.all_reduce(flat))
        for tensor, part in zip(
            group, flat.split([tensor.numel() for tensor in group]), strict=True
        ):
            tensor.copy_(part.view_as(tensor))


def gathered(value: T) -> list[T]:
    """Return every rank's value, by rank."""
    if size() == 1:
        return [value]
    parts: list[Any] = [None] * size()
    _call(lambda: dist.all_gather_object(parts, _packed(value)))
    return [_unpacked(part) for part in parts]


def from_first(compute: Callable[[], T]) -> T:
    """Return on every rank what `compute` returns on the first one, which alone runs it.

    All ranks raise a SecateurError that it raises.
    """
    if size() == 1:
        return compute()
    message: list[Any] = [None]
    if is_first():
        try:
            message = [_packed(compute())]
        except SecateurError as error:
            message = [error]
    _call(lambda: dist.broadcast_object_list(message, src=0))
    if isinstance(message[0], SecateurError):
        raise message[0]
    return _unpacked(message[0])


def spread(function: Callable[[Item], T], items: list[Item]) -> list[T]:
    """Return [function(item) for item in items]; each rank does its `own_part`."""
    results: list[Any] = [None] * len(items)
    for number, part in enumerate(gathered([function(item) for item in own_part(items)])):
        results[number :: size()] = part
    return results


def in_turns(function: Callable[[Item], T], items: list[Item]) -> list[T]:
    """Return [function(item) for item in items]; a free rank takes the next item.

    Each item is done as by one process. Without a store of our own: as `spread` does.
    """
    if size() == 1:
        return [function(item) for item in items]
    _lists[0] += 1
    name, results = str(_lists[0]), dict[int, T]()
    own = own_part([*range(len(items))])
    with alone():
        if not _groups:
            results = {number: function(items[number]) for number in own}
        while _groups and (turn := _groups[0].store.add(f"turn-{name}", 1) - 1) < len(items):
            results[turn] = function(items[turn])
    meet(name)
    all_of_them = {number: result for part in gathered(results) for number, result in part.items()}
    return [all_of_them[number] for number in range(len(items))]


def check_same(values: Mapping[str, str]) -> None:
    """Raise RankError naming the first fact that differs between ranks, and such a rank."""
    for number, part in enumerate(gathered(dict(values))):
        for name, value in values.items():
            if part[name] != value:
                raise RankError(
                    f"rank {number}: its {name} is not that of rank {rank()}; give every rank the "
                    "same files and the same installed packages."
                )


def _call(collective: Callable[[], T]) -> T:
    """Return what a collective, or a question to the store, gives."""
    try:
        return collective()
    except RuntimeError as error:  # gloo raises it plain, nccl as a DistBackendError
        raise RankError(lost_text(_first_line(error))) from error


def _packed(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _unpacked(packed: bytes) -> Any:
    def place(storage: Any, location: str) -> Any:
        return storage.cuda(rank_device()) if location.startswith("cuda") else storage

    return torch.load(io.BytesIO(packed), map_location=place, weights_only=False)


def device_called(name: str | None) -> torch.device:
    """Return this process's device. None: a CUDA or ROCm GPU if torch finds one, else the CPU.

    With several ranks each has the GPU of its local rank. Raises RecipeError for unknown devices.
    """
    if name is None:
        return rank_device()
    try:
        device = torch.empty(
            1, device=torch.device(name)
        ).device  # with its number, as tensors say it
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = shortened(_first_line(error)).rstrip(".")
        raise RecipeError(
            f"machine.device: torch finds no '{name}' here ({reason}); give cpu, cuda, cuda:1, "
            "mps, or leave it out."
        ) from None
    if device.type == "meta":
        raise RecipeError(
            "machine.device: 'meta' holds no numbers; give cpu, cuda, cuda:1, mps, or leave it out."
        )
    if size() > 1 and device.type == "cuda":
        if torch.device(name).index is not None:
            raise RecipeError(
                f"machine.device: '{name}' cannot be that of {size()} ranks; give cuda, and each "
                "takes its own."
            )
        return rank_device()
    return device
