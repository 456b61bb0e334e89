"""Losses on token blocks, domain by domain: nats per token, and KL to the dense model."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from typing import TypeVar

import numpy
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor, nn

from secateur.errors import NumericsError
from secateur.facts import Batch, Divergence, Loss
from secateur.log import Progress, silent
from secateur.model.bind import Arch, decoder_layers, head_of
from secateur.ranks import size, spread
from secateur.stream.device import release_freed
from secateur.stream.walk import Walk, forwards_replaced

T = TypeVar("T")

# A domain's blocks of token ids; of different lengths where a text is given in other tokens.
Blocks = Tensor | Sequence[Tensor]

# Positions per slice of logits: 64 x 150k words x float32 is 38 MB.
HEAD_POSITIONS = 64
# Tokens that pass the layers together, so that each layer is onloaded once for all of them.
TOKENS_AT_ONCE = 1 << 15


def domain_losses(
    model: nn.Module,
    arch: Arch,
    blocks_NT: Mapping[str, Blocks],
    progress: Progress = silent,
    stage: str = "evaluate",
    num_tokens: Mapping[str, list[int]] | None = None,
) -> dict[str, Loss]:
    """Return each domain's loss; ranks share the blocks, and all get the numbers of one process.

    `num_tokens`: by domain and block, in nats per which the losses are; see `per_token`. Raises
    NumericsError naming the domain if a loss is not finite.
    """
    losses: dict[str, Loss] = {}
    blocks = [ids_T for domain_NT in blocks_NT.values() for ids_T in domain_NT]

    def mean_losses(piece: list[Tensor], states: Iterator[Tensor]) -> list[float]:
        return [float(_position_losses(model, arch, *each).mean()) for each in zip(states, piece, strict=True)]

    in_head = sum(weight.numel() for weight in head_of(model, arch).parameters())
    as_layers = max(1, round(in_head * arch.num_layers / max(1, sum(arch.params_per_layer))))
    all_values = chain.from_iterable(_by_layers(model, arch, blocks, mean_losses, progress, stage, as_layers))
    for domain, domain_NT in blocks_NT.items():
        values = list(islice(all_values, len(domain_NT)))
        counts = [len(ids_T) - 1 for ids_T in domain_NT]
        if num_tokens is not None:
            values, counts = per_token(values, counts, num_tokens[domain]), num_tokens[domain]
        mean = sum(values) / len(values)
        if not math.isfinite(mean):
            raise NumericsError(f"{stage}, domain {domain}: the loss is {mean}; the model gives no finite logits.")
        losses[domain] = Loss(mean, standard_error(values), sum(counts), tuple(values))
    release_freed()
    return losses


def per_token(means: list[float], counts: list[int], num_tokens: list[int]) -> list[float]:
    """Return each block's part in the nats per token, for blocks of other numbers of tokens.

    `means`: nats per predicted token of each block, which has `counts`. `num_tokens`: tokens that
    share out the same nats, as those of the dense tokenizer. With the ratio r = all nats / all
    tokens, block b has r + (nats_b - r tokens_b) / mean tokens: their mean is r, and their spread
    is that of a ratio's linear expansion.
    """
    nats = [mean * count for mean, count in zip(means, counts, strict=True)]
    ratio, tokens = sum(nats) / sum(num_tokens), sum(num_tokens) / len(num_tokens)
    return [ratio + (a - ratio * b) / tokens for a, b in zip(nats, num_tokens, strict=True)]


def standard_error(values: list[float]) -> float:
    """Return the standard error of the mean, 0 for a single value."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1) / len(values))


def head_inputs(
    model: nn.Module, arch: Arch, blocks: Sequence[Tensor], progress: Progress = silent, stage: str = "evaluate"
) -> Iterator[Float[Tensor, "P D"]]:
    """Yield `final_states` of each block, on the CPU; ranks share the blocks, and all get all."""
    found = _by_layers(model, arch, list(blocks), lambda _, states: [each.cpu() for each in states], progress, stage)
    return chain.from_iterable(found)


def _by_layers(
    model: nn.Module,
    arch: Arch,
    blocks: list[Tensor],
    finish: Callable[[list[Tensor], Iterator[Tensor]], list[T]],
    progress: Progress,
    stage: str,
    head_steps: int = 0,
) -> list[list[T]]:
    """Return what `finish` makes of blocks and what the head reads of each, for pieces of the text.

    The blocks of a piece all pass one layer before the next, each block separately. `head_steps`:
    of the progress in `finish`, where a layer is one.
    """
    # Every rank should get some.
    at_once = min(max(1, TOKENS_AT_ONCE // max(map(len, blocks))), -(-len(blocks) // size()))
    pieces = [blocks[start : start + at_once] for start in range(0, len(blocks), at_once)]
    done, steps = 0, len(pieces) * (arch.num_layers + head_steps)
    progress(stage, 0, steps)

    def moved(by: int) -> None:
        nonlocal done
        done = min(done + by * size(), steps)
        progress(stage, done, steps)

    def head_read(walk: Walk) -> Iterator[Tensor]:
        for number, pair in enumerate(zip(walk.batches, walk.hidden_BTD, strict=True)):
            yield states_for_head(model, arch, *pair)
            before, after = (head_steps * each // len(walk.batches) for each in (number, number + 1))
            if after > before:
                moved(after - before)

    def passed(piece: list[Tensor]) -> list[T]:
        device = next(model.parameters()).device
        batches = [Batch("", True, ids_T[None].to(device)) for ids_T in piece]
        walk = Walk(model, arch, batches)
        for index in range(arch.num_layers):
            walk.advance(index)
            moved(1)
        return finish(piece, head_read(walk))

    return spread(passed, pieces)


@torch.inference_mode()
def block_losses(model: nn.Module, arch: Arch, ids_1T: Int64[Tensor, "1 T"]) -> Float[Tensor, " P"]:
    """Return -log p(token t+1 | tokens 0..t) in nats for every position of a block; P = T - 1."""
    return _position_losses(model, arch, final_states(model, arch, ids_1T), ids_1T[0])


@torch.inference_mode()
def _position_losses(model: nn.Module, arch: Arch, states_PD: Tensor, ids_T: Tensor) -> Float[Tensor, " P"]:
    head, targets_P = head_of(model, arch), ids_T[1:].to(states_PD.device)
    pieces = zip(states_PD.split(HEAD_POSITIONS), targets_P.split(HEAD_POSITIONS), strict=True)
    return torch.cat([nn.functional.cross_entropy(head(x_SD).float(), y_S, reduction="none") for x_SD, y_S in pieces])


@torch.inference_mode()
def states_for_head(model: nn.Module, arch: Arch, batch: Batch, hidden_BTD: Tensor) -> Float[Tensor, "P D"]:
    """Return the head's input from a stream that has left the layers, which are bypassed."""
    with forwards_replaced(decoder_layers(model, arch), lambda *_, **__: arch.layer_output(hidden_BTD)):
        final_BTD = model.get_submodule(arch.backbone)(batch.ids_BT, use_cache=False).last_hidden_state
    return final_BTD[:, :-1].flatten(0, 1)


# Positions per slice of logits: 2 models x 64 x 150k words x float32 is 77 MB.
KL_POSITIONS = 64
# Rows of logits at a time in float32: four times as fast on a CPU as 64 (12 MB each).
CACHED_ROWS = 8


@dataclass(frozen=True, slots=True)
class DenseStates:
    """The dense model's head, and its last hidden states per domain and block."""

    head: nn.Module
    states_NPD: dict[str, list[Tensor]]


@torch.inference_mode()
def final_states(model: nn.Module, arch: Arch, ids_1T: Int64[Tensor, "1 T"]) -> Float[Tensor, "P D"]:
    """Return the head's input at every position that predicts a token of the block; P = T - 1."""
    ids_1T = ids_1T.to(next(model.parameters()).device)
    return model.get_submodule(arch.backbone)(ids_1T, use_cache=False).last_hidden_state[0, :-1]


@torch.inference_mode()
def token_divergences(
    dense_PD: Float[Tensor, "P D"], dense_head: nn.Module, pruned_PD: Float[Tensor, "P E"], pruned_head: nn.Module
) -> Float[Tensor, " P"]:
    """Return sum_v p(v) (log p(v) - log q(v)) per position, p: the dense model, q: the pruned one.

    The softmax runs in float32 on the models' logits. A model against itself gives 0 everywhere.
    """
    pairs = _logit_slices(dense_PD, dense_head, pruned_PD, pruned_head)
    return torch.cat([_divergences(*pair) for pair in pairs])


@torch.inference_mode()
def compare_tokens(
    dense_PD: Float[Tensor, "P D"], dense_head: nn.Module, pruned_PD: Float[Tensor, "P E"], pruned_head: nn.Module
) -> tuple[Float[Tensor, " P"], Bool[Tensor, " P"]]:
    """Return `token_divergences`, and whether both models rank the same token first."""
    divergences, agreements = [], []
    for dense_SV, pruned_SV in _logit_slices(dense_PD, dense_head, pruned_PD, pruned_head):
        divergences.append(_divergences(dense_SV, pruned_SV))
        agreements.append(dense_SV.argmax(-1) == pruned_SV.argmax(-1))
    return torch.cat(divergences), torch.cat(agreements)


def _logit_slices(
    dense_PD: Tensor, dense_head: nn.Module, pruned_PD: Tensor, pruned_head: nn.Module
) -> Iterator[tuple[Tensor, Tensor]]:
    for dense_SD, pruned_SD in zip(dense_PD.split(KL_POSITIONS), pruned_PD.split(KL_POSITIONS), strict=True):
        yield dense_head(dense_SD), pruned_head(pruned_SD)


def _divergences(dense_SV: Tensor, pruned_SV: Tensor) -> Tensor:
    """Return the divergence per row of logits, in pieces that fit the CPU's cache."""
    divergences = []
    for dense_RV, pruned_RV in zip(dense_SV.split(CACHED_ROWS), pruned_SV.split(CACHED_ROWS), strict=True):
        log_p, log_q = dense_RV.float().log_softmax(-1), pruned_RV.float().log_softmax(-1)
        divergences.append(torch.linalg.vecdot(log_p.exp(), log_p - log_q))
    return torch.cat(divergences)


def summarise(domain: str, divergences_NP: list[Tensor], agreements_NP: list[Tensor]) -> Divergence:
    """Return the figures over a domain's blocks. Raises NumericsError if one is not finite."""
    all_tokens = torch.cat(divergences_NP).cpu().double()
    if not bool(all_tokens.isfinite().all()):
        raise NumericsError(f"KL, domain {domain}: a divergence is not finite; one model gives no finite logits.")
    block_means = torch.stack([block.cpu().double().mean() for block in divergences_NP])
    error = float(block_means.std()) / math.sqrt(len(block_means)) if len(block_means) > 1 else 0.0
    return Divergence(
        mean=float(all_tokens.mean()),
        standard_error=error,
        p95=float(numpy.quantile(all_tokens.cpu().numpy(), 0.95)),
        top1_agreement=float(torch.cat(agreements_NP).cpu().double().mean()),
        num_tokens=all_tokens.numel(),
    )
