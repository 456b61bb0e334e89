"""How fast transformers and llama.cpp read prompts and generate tokens, and peak memory.

Models take turns, so that drift hits all of them alike.
"""

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from jaxtyping import Int64
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from secateur.facts import Workload
from secateur.formats.save import open_llama_cpp
from secateur.log import Progress
from secateur.methods.prices import kv_cache_bytes_per_token
from secateur.report.measured import Ratio, Speed
from secateur.stream.device import now

# Returns the seconds from the start to each new token; the first follows the whole prompt.
Runner = Callable[[], list[float]]
PROFILED_TOKENS = 4


def take_turns(runners: list[Runner], repeats: int, progress: Progress, stage: str) -> list[list[list[float]]]:
    """Warm up, then run all in turn `repeats` times; return [runner][repeat] -> token times."""
    progress(stage, 0, repeats)
    for runner in runners:
        runner()
    measured: list[list[list[float]]] = [[] for _ in runners]
    for done in range(1, repeats + 1):
        for runner, runs in zip(runners, measured, strict=True):
            runs.append(runner())
        progress(stage, done, repeats)
    return measured


def speed(runs: list[list[float]], workload: Workload) -> Speed:
    """Return medians and ranges of `runs` (seconds to each token, per repeat)."""
    prefill, decode = prefill_rates(runs, workload), decode_rates(runs, workload)
    first = [run[0] for run in runs]
    return Speed(
        *(statistics.median(prefill), statistics.median(decode), statistics.median(first)),
        *((min(prefill), max(prefill)), (min(decode), max(decode)), (min(first), max(first))),
        *(workload.batch, workload.prompt_tokens, workload.new_tokens, len(runs)),
    )


def prefill_rates(runs: list[list[float]], workload: Workload) -> list[float]:
    """Return prompt tokens/s per run: batch * prompt_tokens / time to the first token."""
    return [workload.batch * workload.prompt_tokens / run[0] for run in runs]


def decode_rates(runs: list[list[float]], workload: Workload) -> list[float]:
    """Return new tokens/s per run: batch * (new_tokens - 1) / time from first token to last."""
    return [workload.batch * (len(run) - 1) / (run[-1] - run[0]) for run in runs]


def paired_ratio(rates: list[float], against: list[float]) -> Ratio:
    """Return how much faster `rates` are than `against`, repeat by repeat."""
    ratios = [rate / other for rate, other in zip(rates, against, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def prompt_ids(workload: Workload, vocab_size: int) -> list[int]:
    """Return the prompt's token ids, the same for all models; timing needs no real text."""
    return [position * 7919 % vocab_size for position in range(workload.prompt_tokens)]


def transformers_runner(model: PreTrainedModel, workload: Workload, *, compiled: bool = False) -> Runner:
    """Return a runner of `generate`. `compiled`: the model is, so it needs a static cache."""
    row = torch.tensor(prompt_ids(workload, model.config.get_text_config().vocab_size), device=model.device)
    ids_BT = row.expand(workload.batch, -1).contiguous()
    options = {"cache_implementation": "static", "disable_compile": True} if compiled else {}
    return lambda: _generate(model, ids_BT, workload.new_tokens, options)


class _Clock(StoppingCriteria):
    """Never stops; records when each token is known, since `generate` calls it once per token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.times.append(now(input_ids.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


@torch.inference_mode()
def _generate(
    model: PreTrainedModel, ids_BT: Int64[Tensor, "B T"], new_tokens: int, options: dict[str, Any]
) -> list[float]:
    clock, generate = _Clock(), getattr(model, "generate")  # noqa: B009  # its type takes no arguments beyond tensors
    # The model's own settings (end of text, repetition penalty) could stop or slow a run.
    with patch.object(model, "generation_config", GenerationConfig()):
        start = now(model.device)
        generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
            **options,
        )
    assert len(clock.times) == new_tokens
    return [seconds - start for seconds in clock.times]


def peak_model_bytes(model: PreTrainedModel, workload: Workload, *, compiled: bool = False) -> int:
    """Return weights, buffers and the most that a run allocates beyond them, with the cache.

    Prompt and first new tokens are measured; the cache of later tokens is added.
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
    # Not resident memory: pages that the C library retains hide what this run needs.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or the profiler writes to the user's terminal
    with tempfile.TemporaryDirectory(prefix="secateur-bench-") as scratch:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            runner()
        trace = Path(scratch, "trace.json")
        profiler.export_chrome_trace(str(trace))
        events = json.loads(trace.read_bytes())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event["name"] == "[memory]")


def llama_cpp_runner(file: Path, workload: Workload) -> Runner:
    """Load the file and return a runner of greedy generation with the same prompt."""
    assert workload.batch == 1
    model = open_llama_cpp(file, workload.prompt_tokens + workload.new_tokens, all_logits=False)
    ids = prompt_ids(workload, model.n_vocab())

    def run() -> list[float]:
        model.reset()
        start, times, pending = time.perf_counter(), list[float](), ids
        for _ in range(workload.new_tokens):
            model.eval(pending)
            pending = [model.sample(temp=0.0)]
            times.append(time.perf_counter() - start)
        return times

    return run
