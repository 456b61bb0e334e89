"""Blocks of text that the dense model writes itself, for domains whose text is sampled."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from random import Random
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor

from secateur.data.blocks import Blocks, JudgedText, LearningText
from secateur.errors import CalibrationError, NumericsError
from secateur.log import Progress, silent
from secateur.model.checkpoint import Tokenizer, eval_mode
from secateur.model.modules import CausalLM

# Blocks sampled together; each has its KV cache in memory.
BATCH_BLOCKS = 16
# The KV cache's name since transformers 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")


def with_sampled(
    text: LearningText,
    judged: JudgedText,
    model: CausalLM,
    tokenizer: Tokenizer,
    seed: int,
    progress: Progress = silent,
    dense_ids: Int64[Tensor, " K"] | None = None,
) -> tuple[LearningText, JudgedText]:
    """Return both texts with every sampled domain written by `model`.

    The order is judged, held out, learning; blocks are a document each. `dense_ids`, errors: as in
    `sample_blocks`.
    """
    domains, judging = list(text.domains), dict(judged.blocks)
    for index, domain in enumerate(domains):
        if not domain.blocks.is_meta:
            continue
        own_judged = judging[domain.name]
        num_judged = 0 if own_judged is domain.held_out else len(own_judged)
        first, num_all = num_judged + len(domain.held_out), num_judged + len(domain.held_out) + len(domain.blocks)
        own_seed, tell = Random(f"{seed}:{domain.name}").getrandbits(63), partial(progress, f"sample {domain.name}")
        length = text.sequence_length
        written = Blocks.of(sample_blocks(model, tokenizer, num_all, length, own_seed, tell, dense_ids))
        domains[index] = replace(domain, held_out=written[num_judged:first], blocks=written[first:])
        judging[domain.name] = written[:num_judged] if num_judged else domains[index].held_out
    return replace(text, domains=tuple(domains)), replace(judged, blocks=judging)


def sample_blocks(
    model: CausalLM,
    tokenizer: Tokenizer,
    num_blocks: int,
    length: int,
    seed: int,
    progress: Callable[[int, int], None] = lambda num_done, num_tokens: None,
    dense_ids: Int64[Tensor, " K"] | None = None,
) -> Int64[Tensor, "N T"]:
    """Sample blocks from the model's own distribution at temperature 1.

    Sampling starts after the begin-of-text token (or else the end-of-text token), which is not part
    of the block. A text that ends within a block is followed by another. Only tokens that the
    tokenizer knows are drawn, on the CPU, so that a seed gives the same draws on any device.
    `progress` gets (tokens so far, all tokens). `dense_ids`: the model's ids of the tokenizer's tokens,
    if the model has more; no other token is drawn.

    Raises CalibrationError without such a token, NumericsError if a logit is not finite.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if not isinstance(start, int):
        advice = "set one in its tokenizer_config.json, or leave the domain out"
        raise CalibrationError(
            f"sampled domain: the tokenizer has no begin-of-text and no end-of-text token; {advice}."
        )
    generator, batches, num_done = torch.Generator().manual_seed(seed), list[Tensor](), 0
    progress(num_done, num_blocks * length)
    with torch.inference_mode(), eval_mode(model):
        for first in range(0, num_blocks, BATCH_BLOCKS):
            ids_B1 = torch.full((min(BATCH_BLOCKS, num_blocks - first), 1), start)
            cache, drawn = dict[str, Any](), list[Tensor]()
            for _ in range(length):
                fed_B1 = ids_B1 if dense_ids is None else dense_ids[ids_B1]
                output = model(fed_B1.to(model.device), use_cache=True, **cache)
                name = next(each for each in CACHE_NAMES if each in output)
                cache = {name: output[name]}
                logits_BV = output.logits[:, -1] if dense_ids is None else output.logits[:, -1, dense_ids]
                ids_B1 = _draw(logits_BV[:, : len(tokenizer)], generator)
                drawn.append(ids_B1)
                num_done += len(ids_B1)
                progress(num_done, num_blocks * length)
            batches.append(torch.cat(drawn, dim=1))
    # Cloned outside inference mode to get ordinary tensors.
    return torch.cat(batches).clone()


def _draw(logits_BV: Tensor, generator: torch.Generator) -> Int64[Tensor, "B 1"]:
    probabilities_BV = logits_BV.float().softmax(dim=-1).cpu()
    if not torch.isfinite(probabilities_BV).all():
        advice = "use the model in bfloat16 or float32 and check its weights"
        raise NumericsError(f"sampled domain: the dense model gives no finite logits; {advice}.")
    return torch.multinomial(probabilities_BV, 1, generator=generator)
