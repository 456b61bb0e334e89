"""What a step has measured is freed as the step ends, and a run's freed memory serves its next tensors."""

import ctypes
import gc
import os
import sys

import pytest
import torch
from warm import WarmProcesses

from secateur.pruning import loop
from secateur.stream.statistics import Gram, Statistics
from tests.families import tiny_family
from tests.model.test_exactness import prune_tiny, random_calibration
from tests.models import tiny_llama


@pytest.mark.parametrize("group", ["ffn", "kv_heads", "expert_ffn", "experts"])
def test_no_statistics_outlive_their_group(group: str, monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[object] = []

    def count() -> None:
        # The caller has just finished a layer.
        left.extend(each for each in gc.get_objects() if type(each) in (Statistics, Gram))

    monkeypatch.setattr(loop, "release_freed", count)
    model = tiny_family("mixtral") if "expert" in group else tiny_llama()
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            prune_tiny(model, random_calibration(), groups=(group,), remove=0.2 if group == "ffn" else 0.1)
    finally:
        gc.enable()
    assert not left


# A process of its own: glibc gives large tensors of a thread, where tests may run, memory by another way.
PAGES = """
import resource
import torch
from secateur.stream.device import keeping_freed

def pages_cleared(num_tensors):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(num_tensors):
        torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with keeping_freed():
    print(pages_cleared(1))
    print(pages_cleared(5))
print(pages_cleared(5))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="the C library is not glibc")
def test_freed_memory_serves_the_next_tensors_of_a_run_alone(warm: WarmProcesses) -> None:
    done = warm.run([sys.executable, "-c", PAGES], env=dict(os.environ))
    first, inside, behind = map(int, done.stdout.split())
    assert 5 * inside < first and behind > 4 * first
