"""Ranks: several processes that work on one run. Each has the whole model and its own part of the text.

In: numbers, tensors and work of this rank. Out: the same sums, results and decisions on every rank. In one process
every function here gives back what it got. What is decided is decided by the first rank and told to the others, so that
all cut the same model even where their processors round differently.
"""

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from secateur.errors import RankError, SecateurError
from secateur.ranks_group import lost_text, meet, next_turn, rank_device

T = TypeVar("T")
Item = TypeVar("Item")

# Tensors up to this many numbers travel in one buffer; larger ones by themselves, which costs no copy of them.
SMALL = 1 << 16

_alone = [False]
_lists: list[int] = [0]  # how many lists have been worked through in turns


def size() -> int:
    """Return the number of ranks, 1 without any."""
    if _alone[0] or not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size()


def rank() -> int:
    """Return this rank's number, from 0."""
    return 0 if size() == 1 else dist.get_rank()


def is_first() -> bool:
    """Say whether this is the rank that writes, prints and decides; so is every process without others."""
    return rank() == 0


@contextmanager
def alone() -> Iterator[None]:
    """Within the context this rank works as one process does, whatever the others do meanwhile."""
    before = _alone[0]
    _alone[0] = True
    try:
        yield
    finally:
        _alone[0] = before


def own_part(items: list[Item]) -> list[Item]:
    """Return this rank's part of a list: item i is that of rank i mod the number of ranks."""
    return items[rank() :: size()]


def domains_ended(ended: str, begun: str, order: Iterable[str]) -> list[str]:
    """Return the domains that are over when batches of `begun` follow those of `ended`; "" stands for none.

    In one process the one that ended. A rank also passes domains that have no batch on it, and all ranks must sum up
    the same domains in the same `order`, in which batches come.
    """
    if size() == 1:
        return [ended] if ended else []
    names = list(order)
    return names[names.index(ended) if ended else 0 : names.index(begun) if begun else len(names)]


def sum_tensors(tensors: Sequence[Tensor]) -> None:
    """Replace every tensor by its sum over ranks, in place and in its own dtype. The same order on every rank."""
    if size() == 1:
        return
    small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() <= SMALL:
            small.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        else:
            _call(lambda tensor=tensor: dist.all_reduce(tensor))
    for group in small.values():
        flat = torch.cat([tensor.flatten() for tensor in group])
        _call(lambda flat=flat: dist.all_reduce(flat))
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group]), strict=True):
            tensor.copy_(part.view_as(tensor))


def sum_by_name(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sums over ranks of numbers or small tensors by name; a rank may lack some of the names.

    Every rank adds in the order of ranks, so that all get the same bits.
    """
    if size() == 1:
        return dict(values)
    total: dict[str, Any] = {}
    for part in gathered(dict(values)):
        for name, value in part.items():
            total[name] = total[name] + value if name in total else value
    return total


def gathered(value: T) -> list[T]:
    """Return every rank's value, by rank."""
    if size() == 1:
        return [value]
    parts: list[Any] = [None] * size()
    _call(lambda: dist.all_gather_object(parts, _packed(value)))
    return [_unpacked(part) for part in parts]


def from_first(compute: Callable[[], T]) -> T:
    """Return on every rank what `compute` returns on the first one, the only one that runs it.

    A SecateurError that it raises is raised by all.
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
    """Return [function(item) for item in items], each item done by one rank, as `own_part` splits them."""
    results: list[Any] = [None] * len(items)
    for number, part in enumerate(gathered([function(item) for item in own_part(items)])):
        results[number :: size()] = part
    return results


def in_turns(function: Callable[[Item], T], items: list[Item]) -> list[T]:
    """Return [function(item) for item in items]; a rank that is done with one takes the next that none has taken.

    Each is done as by one process, and may take any time. Without a store of our own: as `spread` does.
    """
    if size() == 1:
        return [function(item) for item in items]
    _lists[0] += 1
    name, found, turn = str(_lists[0]), dict[int, T](), 0
    with alone():
        while (turn := next_turn(name)) is not None and turn < len(items):
            found[turn] = function(items[turn])
    if turn is None:
        with alone():
            mine = [function(item) for item in items[dist.get_rank() :: dist.get_world_size()]]
        found = dict(zip(range(rank(), len(items), size()), mine, strict=True))
    meet(name)
    all_of_them = {number: result for part in gathered(found) for number, result in part.items()}
    return [all_of_them[number] for number in range(len(items))]


def check_same(facts: Mapping[str, str]) -> None:
    """Raise RankError naming the first of the facts that is not the same on every rank, and a rank where it differs."""
    for number, part in enumerate(gathered(dict(facts))):
        for name, value in facts.items():
            if part[name] != value:
                raise RankError(
                    f"rank {number}: its {name} is not that of rank {rank()}; give every rank the same files and the "
                    f"same installed packages."
                )


def _call(collective: Callable[[], Any]) -> None:
    try:
        collective()
    except RuntimeError as error:  # gloo raises it plain, nccl as a DistBackendError
        raise RankError(lost_text((str(error).splitlines() or [""])[0])) from error


def _packed(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def _unpacked(packed: bytes) -> Any:
    def place(storage: Any, location: str) -> Any:
        return storage.cuda(rank_device()) if location.startswith("cuda") else storage

    return torch.load(io.BytesIO(packed), map_location=place, weights_only=False)
