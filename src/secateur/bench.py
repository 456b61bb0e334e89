"""Bench: how fast a model reads a prompt and writes tokens.

In: a model. Out: median prefill and decode tokens per second at batch 1, greedy, with a key-value cache.
"""

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.progress import Progress, silent

PROMPT_TOKENS, NEW_TOKENS, REPEATS = 256, 24, 3


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over repeats. `prefill`: prompt tokens per second; `decode`: new tokens per second after the first."""

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    prompt_tokens: int
    new_tokens: int
    repeats: int


@torch.inference_mode()
def bench(
    model: PreTrainedModel,
    *,
    prompt_tokens: int = PROMPT_TOKENS,
    new_tokens: int = NEW_TOKENS,
    repeats: int = REPEATS,
    progress: Progress = silent,
    stage: str = "bench",
) -> Speed:
    """Time `repeats` prompts of fixed token ids after one warm-up."""
    vocabulary = model.config.get_text_config().vocab_size
    ids_1T = (torch.arange(prompt_tokens, device=model.device) * 7919 % vocabulary)[None]
    progress(stage, 0, repeats)
    _one_run(model, ids_1T, 2)
    prefill, decode = [], []
    for done in range(1, repeats + 1):
        seconds_prefill, seconds_decode = _one_run(model, ids_1T, new_tokens)
        prefill.append(prompt_tokens / seconds_prefill)
        decode.append((new_tokens - 1) / seconds_decode)
        progress(stage, done, repeats)
    return Speed(statistics.median(prefill), statistics.median(decode), prompt_tokens, new_tokens, repeats)


def _one_run(model: PreTrainedModel, ids_1T: torch.Tensor, new_tokens: int) -> tuple[float, float]:
    """Return (seconds to the first token, seconds for the `new_tokens` - 1 after it)."""
    first = _generate_seconds(model, ids_1T, 1)
    return first, _generate_seconds(model, ids_1T, new_tokens) - first


def _generate_seconds(model: PreTrainedModel, ids_1T: torch.Tensor, new_tokens: int) -> float:
    start = _now(model)
    generate: Any = model.generate
    generate(
        ids_1T,
        attention_mask=torch.ones_like(ids_1T),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    return _now(model) - start


def _now(model: PreTrainedModel) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    return time.perf_counter()
