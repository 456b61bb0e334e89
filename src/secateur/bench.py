"""Bench: how fast models read a prompt and write tokens, several models taking turns so that drift hits all alike.

In: runners (a call that generates once and says when each token came) and a workload. Out: a `Speed` per model and the
paired speed-up. Greedy, with a key-value cache. Runners here are transformers models; `bench_llama_cpp` has another.
"""

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from secateur.device import now
from secateur.facts import Workload
from secateur.measured import Ratio, Speed
from secateur.progress import Progress

# Seconds from the start of one generation to each of its tokens, the first one after the whole prompt.
Runner = Callable[[], list[float]]


def take_turns(runners: list[Runner], repeats: int, progress: Progress, stage: str) -> list[list[list[float]]]:
    """Run every runner once unmeasured, then in turn `repeats` times; return [runner][repeat] -> seconds per token."""
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
    """Return the medians and ranges of `runs` (seconds to each token, per repeat)."""
    prefill, decode = prefill_rates(runs, workload), decode_rates(runs, workload)
    first = [run[0] for run in runs]
    return Speed(
        prefill_tokens_per_second=statistics.median(prefill),
        decode_tokens_per_second=statistics.median(decode),
        first_token_seconds=statistics.median(first),
        prefill_range=(min(prefill), max(prefill)),
        decode_range=(min(decode), max(decode)),
        first_token_range=(min(first), max(first)),
        batch=workload.batch,
        prompt_tokens=workload.prompt_tokens,
        new_tokens=workload.new_tokens,
        repeats=len(runs),
    )


def prefill_rates(runs: list[list[float]], workload: Workload) -> list[float]:
    """Return prompt tokens per second of each run: batch * prompt_tokens / time to the first token."""
    return [workload.batch * workload.prompt_tokens / run[0] for run in runs]


def decode_rates(runs: list[list[float]], workload: Workload) -> list[float]:
    """Return new tokens per second of each run: batch * (new_tokens - 1) / time from the first token to the last."""
    return [workload.batch * (len(run) - 1) / (run[-1] - run[0]) for run in runs]


def paired_ratio(rates: list[float], against: list[float]) -> Ratio:
    """Return how much faster `rates` are than `against`, repeat by repeat."""
    ratios = [rate / other for rate, other in zip(rates, against, strict=True)]
    return Ratio(statistics.median(ratios), min(ratios), max(ratios))


def prompt_ids(workload: Workload, vocab_size: int) -> list[int]:
    """Return the token ids of the prompt, the same for every model of that vocabulary; no text is needed for timing."""
    return [position * 7919 % vocab_size for position in range(workload.prompt_tokens)]


def transformers_runner(model: PreTrainedModel, workload: Workload, *, compiled: bool = False) -> Runner:
    """Return a runner of `generate`; `compiled` if the model was compiled, which needs a cache that does not grow."""
    row = torch.tensor(prompt_ids(workload, model.config.get_text_config().vocab_size), device=model.device)
    ids_BT = row.expand(workload.batch, -1).contiguous()
    options = {"cache_implementation": "static", "disable_compile": True} if compiled else {}
    return lambda: _generate(model, ids_BT, workload.new_tokens, options)


class _Clock(StoppingCriteria):
    """Never stops; notes when each token is known, which `generate` tells a stopping criterion once per token."""

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
    with _plain_generation(model):
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


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    # The model's own settings (end of text, repetition penalty) would stop or slow a run.
    own = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = own
