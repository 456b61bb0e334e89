"""Peak memory of one generation, as torch's allocator counts it: the same on every machine, interpreter left out.

In: a model and a workload. Out: bytes. Allocations outside torch (a compiler's, a BLAS library's scratch) are not seen.
"""

import json
import os
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from transformers import PreTrainedModel

from secateur.bench import Runner, transformers_runner
from secateur.facts import Workload
from secateur.ideal import kv_cache_bytes_per_token

PROFILED_TOKENS = 4


def peak_model_bytes(model: PreTrainedModel, workload: Workload, *, compiled: bool = False) -> int:
    """Return weights and buffers, plus the most that a run has allocated beyond them, cache included.

    The prompt and the first few new tokens are measured; the cache of the tokens after those is added to it.
    """
    measured = replace(workload, new_tokens=min(workload.new_tokens, PROFILED_TOKENS))
    runner = transformers_runner(model, measured, compiled=compiled)
    resident = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    run = _cuda_bytes(runner, model.device) if model.device.type == "cuda" else _cpu_bytes(runner)
    later_tokens = workload.batch * (workload.new_tokens - measured.new_tokens)
    return resident + run + later_tokens * kv_cache_bytes_per_token(model)


def _cuda_bytes(runner: Runner, device: torch.device) -> int:
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    runner()
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_bytes(runner: Runner) -> int:
    # Resident memory would not do: what an earlier run freed but the C library kept hides what this one needs.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes to the user's terminal
    with tempfile.TemporaryDirectory(prefix="secateur-bench-") as scratch:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            runner()
        trace = Path(scratch, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_bytes())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")
