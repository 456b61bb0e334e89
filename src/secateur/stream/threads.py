"""How many threads a run computes with on a processor: as many as are fastest beside what else runs there.

In: something to compute. Out: a number. Products are shared out over threads, so that another number may
change the last bits of a result; with the same number they are the same.
"""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn

from secateur.model.bind import Arch
from secateur.store import Services
from secateur.stream.walk import CPU_BATCH_TOKENS, Batch, Walk

# The user's own number, which stands.
VARIABLE = "OMP_NUM_THREADS"
# Timed runs of each number, by turns with the others.
REPEATS = 4
# Half of the threads may take so much longer before fewer are not tried.
SLOWER = 1.2


def choose_threads(model: nn.Module, arch: Arch, services: Services) -> None:
    """Let torch compute with as many threads as make a layer fastest now; a run that goes on has those it began with.

    Nothing changes if the environment says how many.
    """
    if VARIABLE in os.environ or torch.get_num_threads() == 1:
        return

    def timed() -> int:
        walk = Walk(model, arch, [Batch("", True, torch.zeros(1, CPU_BATCH_TOKENS, dtype=torch.int64))])
        with walk.layer(0):
            return fastest_threads(partial(walk.through, 0, walk.hidden_BTD[0]))

    count = services.store.value("threads", timed, is_input=True)
    torch.set_num_threads(count)
    services.log.write({"event": "threads", "count": count})


def fastest_threads(compute: Callable[[], object], clock: Callable[[], float] = time.perf_counter) -> int:
    """Return with how many threads `compute` takes least: all that torch has, a half, a quarter, ... or one.

    On cores that others use, threads that wait for each other are slower than fewer ones.
    """
    most = torch.get_num_threads()
    chosen, count = most, most // 2
    with threads_kept():
        while count >= 1:
            seconds = dict.fromkeys((chosen, count), 0.0)
            for number in [*seconds] * REPEATS:
                torch.set_num_threads(number)
                compute()  # so that its threads exist
                start = clock()
                compute()
                seconds[number] += clock() - start
            if seconds[count] > SLOWER * seconds[chosen]:
                break
            if seconds[count] < seconds[chosen]:
                chosen = count
            count //= 2
    return chosen


@contextmanager
def threads_kept() -> Iterator[None]:
    """Give torch the number of threads behind the block that it has before it."""
    before = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(before)
