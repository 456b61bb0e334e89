"""Calibration text that the dense model writes itself: what it holds likely, whatever it was trained on.

In: a calibration set whose sampled domains have a size and no ids yet, the dense model, a seed. Out: the set with these
domains filled in. Sampled tokens are the blocks as they are: nothing is decoded and tokenised again.

B blocks sampled together, N blocks, T tokens of a block.
"""

from collections.abc import Callable
from dataclasses import replace
from random import Random
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.calibration import CalibrationSet, DomainBlocks, content_hash
from secateur.errors import CalibrationError, NumericsError
from secateur.in_memory import eval_mode
from secateur.progress import Progress, silent

# Blocks written side by side, each with its keys and values in memory.
BATCH_BLOCKS = 16
# Under which a model returns its keys and values and takes them: since transformers 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")


def with_sampled(
    calibration: CalibrationSet,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
    progress: Progress = silent,
) -> CalibrationSet:
    """Return the set with every sampled domain written by `model`; the set itself if there is none.

    Held-out blocks are the first that are written. Raises what `sample_blocks` raises.
    """
    if not any(domain.calibration_NT.is_meta for domain in calibration.domains):
        return calibration
    domains = [
        _sampled(domain, model, tokenizer, seed, progress) if domain.calibration_NT.is_meta else domain
        for domain in calibration.domains
    ]
    return replace(calibration, domains=tuple(domains), content_hash=content_hash(domains))


def _sampled(
    domain: DomainBlocks, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int, progress: Progress
) -> DomainBlocks:
    num_held_out, (num_blocks, length) = len(domain.held_out_NT), domain.calibration_NT.shape
    stage, own_seed = f"sample {domain.name}", Random(f"{seed}:{domain.name}").getrandbits(63)
    num_tokens = (num_held_out + num_blocks) * length
    progress(stage, 0, num_tokens)

    def tokens_done(num_done: int) -> None:
        progress(stage, num_done, num_tokens)

    ids_NT = sample_blocks(model, tokenizer, num_held_out + num_blocks, length, own_seed, tokens_done)
    return replace(domain, held_out_NT=ids_NT[:num_held_out], calibration_NT=ids_NT[num_held_out:])


def sample_blocks(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    num_blocks: int,
    length: int,
    seed: int,
    tokens_done: Callable[[int], None] = lambda num_tokens: None,
) -> Int64[Tensor, "N T"]:
    """Sample blocks from the model's own distribution, temperature 1, beginning after the token that begins a text.

    That token (the tokenizer's begin-of-text token, or else its end-of-text token) is not part of the block, as no
    other domain has it. A text that ends within a block is followed by another, as in packed blocks. Only tokens that
    the tokenizer knows are drawn, on the CPU, so that one seed means the same draws on any device. `tokens_done` hears
    how many tokens there are so far.

    Raises CalibrationError if the tokenizer has neither token, NumericsError if the model gives no finite logits.
    """
    start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if not isinstance(start, int):
        raise CalibrationError(
            "sampled domain: the tokenizer names no begin-of-text and no end-of-text token to begin with; "
            "set one in its tokenizer_config.json, or leave the domain out."
        )
    generator, batches, done = torch.Generator().manual_seed(seed), list[Tensor](), 0
    with torch.inference_mode(), eval_mode(model):
        for first in range(0, num_blocks, BATCH_BLOCKS):
            ids_B1 = torch.full((min(BATCH_BLOCKS, num_blocks - first), 1), start)
            cache, drawn = dict[str, Any](), list[Tensor]()
            for _ in range(length):
                output = model(ids_B1.to(model.device), use_cache=True, **cache)
                name = next(each for each in CACHE_NAMES if each in output)
                cache = {name: output[name]}
                ids_B1 = _draw(output.logits[:, -1, : len(tokenizer)], generator)
                drawn.append(ids_B1)
                done += len(ids_B1)
                tokens_done(done)
            batches.append(torch.cat(drawn, dim=1))
    # Cloned outside, so that they are ordinary tensors.
    return torch.cat(batches).clone()


def _draw(logits_BV: Tensor, generator: torch.Generator) -> Int64[Tensor, "B 1"]:
    probabilities_BV = logits_BV.float().softmax(dim=-1).cpu()
    if not torch.isfinite(probabilities_BV).all():
        raise NumericsError(
            "sampled domain: the dense model gives no finite logits; use the model in bfloat16 or float32 and check "
            "its weights."
        )
    return torch.multinomial(probabilities_BV, 1, generator=generator)
