"""Channels inside experts: each expert keeps the same number, chosen on the tokens routed to it.

An expert with few tokens is also measured on tokens that chose other experts: its Gram matrix is
shrunk towards the one over a random sample of the layer's tokens, in which each domain has its
share. A guard on held-out text judges the layer's refit as a whole.

T tokens, D hidden size, E experts, F channels of an expert, K channels that stay.
"""

import random
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.errors import NumericsError
from secateur.methods.compensate import Method, least_squares
from secateur.methods.experts import FEW_TOKENS_PER_CHANNEL, Call, HeldOut, counted_call, put_readers
from secateur.methods.select import Task, greedy_obs, log_line, units_at_once
from secateur.model.group import Group, Stacks, channel_inputs, cut_expert_channels, num_channels, reader_of
from secateur.stream.statistics import Gram, InOrder, damped_gram, decided, domain_weight, of_all_ranks, sum_over_ranks
from secateur.stream.walk import Batch, Walk

# An expert with few tokens of its own borrows from this many, or as many as there are.
NUM_SAMPLED = 2048

Drawn = tuple[Tensor, Tensor]
"""Tokens of one domain: the random number of each, ascending, and its hidden state."""


@dataclass(slots=True)
class _Observed:
    """Per expert: pooled Gram matrix, token count. `drawn`: of the current domain, on this rank.

    `samples`: by domain, hidden states of tokens sampled from all ranks.
    """

    grams: list[Gram]
    num_tokens_E: Tensor
    energy: dict[str, float] = field(default_factory=dict)
    drawn: list[Drawn] = field(default_factory=list)
    samples: dict[str, Tensor] = field(default_factory=dict)
    held_out: dict[str, list[Call]] = field(default_factory=dict)


@torch.no_grad()
def prune_expert_channels(task: Task) -> tuple[Int64[Tensor, "E K"], dict[str, Any]]:
    """Prune a layer's experts; return kept channels, log line. NumericsError if not finite."""
    group, num_keep, layer = task.group, task.num_keep, task.layer
    stacks, module = group.experts.stacks, layer.get_submodule(group.experts.module)
    num_experts, num_units = len(module.get_parameter(stacks.down)), num_channels(module, stacks)
    seen = _observe(task.walk, group, task.method.weighting, task.shares, task.seed)
    line = log_line(group, num_keep, num_units, seen.energy)
    keep_EK = torch.arange(num_units).repeat(num_experts, 1)
    if num_keep < num_units:
        found = [decided(partial(_narrower, task, module, expert, seen)) for expert in range(num_experts)]
        keep_EK, refits = torch.stack([keep_K for keep_K, _ in found]), [each for _, each in found if each is not None]
        calls = [(domain, call) for domain, each in seen.held_out.items() for call in each]
        held_out = [HeldOut(domain, call, own, own) for domain, call in calls for own in [module.forward(*call)]]
        cut_expert_channels(layer, group, keep_EK)
        line |= asdict(put_readers(module, stacks, refits, held_out)) if refits else {}
    return keep_EK, line


def _narrower(task: Task, module: nn.Module, expert: int, seen: _Observed) -> tuple[Int64[Tensor, " K"], Tensor | None]:
    """Return an expert's kept channels and its refitted reader; None without least squares."""
    stacks, method = task.group.experts.stacks, task.method
    gram, weight_DF = _shrunk(module, stacks, expert, seen), reader_of(module, stacks, expert)
    if task.keep is not None:
        keep_K = task.keep[expert].to(weight_DF.device)
    else:
        keep_K = _select(weight_DF, gram, task.num_keep, method, task.seed + expert)
    refits = method.compensate == "least_squares"
    return keep_K, least_squares(weight_DF, gram, keep_K, method.damping).weight_HS if refits else None


def _observe(walk: Walk, group: Group, weighting: str, shares: dict[str, float], seed: int) -> _Observed:
    stacks, module = group.experts.stacks, walk.layers[group.layer].get_submodule(group.experts.module)
    num_experts, size = len(module.get_parameter(stacks.down)), num_channels(module, stacks)
    device = module.get_parameter(stacks.down).device
    # In float32: the Gram matrices take most of the memory.
    pooled, current = ([Gram(size, device, torch.float32) for _ in range(num_experts)] for _ in range(2))
    seen = _Observed(pooled, torch.zeros(num_experts, dtype=torch.long))
    calls: list[Call] = []
    domains = InOrder(shares)

    def pool_ended(begins: str) -> None:
        for domain in domains.begin(begins):
            _fold(seen, current, domain, group, weighting, shares[domain])

    with module.register_forward_pre_hook(lambda _, inputs: calls.append(inputs)):
        for batch, _ in walk.run(group.layer, to_middle=True):
            call = counted_call(batch, calls.pop())
            if batch.held_out:
                seen.held_out.setdefault(batch.domain, []).append(call)
                continue
            domain = batch.domain
            pool_ended(domain)
            seen.drawn = [_lowest([*seen.drawn, _numbered(batch, call[0], seed)], shares[domain])]
            seen.energy[domain] = seen.energy.get(domain, 0.0) + _add(module, stacks, call, current, seen)
    pool_ended("")
    sum_over_ranks(seen.num_tokens_E)
    return seen


def _numbered(batch: Batch, hidden_TD: Float[Tensor, "T D"], seed: int) -> Drawn:
    """Give each token a random number by seed, domain and place: any rank gives the same."""
    place = random.Random(f"{seed}:{batch.domain}:{batch.first_block}").getrandbits(63)
    generator = torch.Generator().manual_seed(place)
    return torch.rand(len(hidden_TD), generator=generator, dtype=torch.float64), hidden_TD


def _lowest(parts: list[Drawn], share: float) -> Drawn:
    """Return the tokens of the lowest numbers, as many as are a domain's share of the sample."""
    numbers_T, hidden_TD = (torch.cat(each) for each in zip(*parts, strict=True))
    order = numbers_T.argsort()[: max(1, round(share * NUM_SAMPLED))]
    return numbers_T[order], hidden_TD[order.to(hidden_TD.device)]


def _add(module: Any, stacks: Stacks, call: Call, current: list[Gram], seen: _Observed) -> float:
    """Add a call's tokens to the experts that they chose; return the output energy of these."""
    hidden_TD, chosen_Tk, weights_Tk = call
    energy = 0.0
    for expert in chosen_Tk.unique().tolist():
        tokens, places = torch.where(chosen_Tk == expert)
        # Routers of some families give float32 weights beside bfloat16 experts, so both become float32.
        x_TF = channel_inputs(module, stacks, expert, hidden_TD[tokens]).float() * weights_Tk[tokens, places, None]
        current[expert].add_product(x_TF)
        seen.num_tokens_E[expert] += len(tokens)
        energy += float((x_TF @ reader_of(module, stacks, expert).T).square().sum())
    return energy


def _fold(seen: _Observed, current: list[Gram], domain: str, group: Group, weighting: str, share: float) -> None:
    total = torch.tensor([seen.energy.get(domain, 0.0)], dtype=torch.float64)
    sum_over_ranks(total, *current)
    energy = seen.energy[domain] = float(total)
    if not energy < float("inf"):
        raise NumericsError(
            f"layer {group.layer}, {group.experts.module}, domain {domain}: an expert gives NaN or infinite numbers; "
            f"use the model in bfloat16 or float32 and check its weights."
        )
    # No two ranks have the same lowest number.
    parts = of_all_ranks({float(each[0][0]): each for each in seen.drawn})
    seen.samples[domain] = _lowest(list(parts.values()), share)[1]
    seen.drawn = []
    for mine, theirs in zip(seen.grams, current, strict=True):
        mine.merge(theirs, domain_weight(weighting, share, energy))
        theirs.clear()


def _shrunk(module: Any, stacks: Stacks, expert: int, seen: _Observed) -> Gram:
    """Return (1 - a) G / tr G + a P / tr P with P the Gram matrix on the sample, a = n0 / (n0 + n).

    n tokens chose the expert, n0 is its number of channels. Return G itself from 10 n0 tokens on.
    The sample: `NUM_SAMPLED` of the layer's tokens at random, each domain by its share; all tokens
    of a domain that has fewer.
    """
    own, size = seen.grams[expert], seen.grams[expert].size
    num_tokens = int(seen.num_tokens_E[expert])
    if num_tokens >= FEW_TOKENS_PER_CHANNEL * size:
        return own
    sample_TD = torch.cat(list(seen.samples.values()))
    everyone, mixed = (Gram(size, own.device, torch.float32) for _ in range(2))
    everyone.add_product(channel_inputs(module, stacks, expert, sample_TD))
    share = size / (size + num_tokens)
    for gram, weight in ((own, 1 - share), (everyone, share)):
        trace = float(gram.diagonal().sum())
        mixed.merge(gram, weight / trace if trace > 0 else 0.0)
    return mixed


def _select(
    weight_DF: Float[Tensor, "D F"], gram: Gram, num_keep: int, method: Method, seed: int
) -> Int64[Tensor, " K"]:
    if method.score == "random":
        order = torch.randperm(gram.size, generator=torch.Generator().manual_seed(seed))
        return order[:num_keep].sort().values.to(weight_DF.device)
    columns_U1 = torch.arange(gram.size, device=weight_DF.device)[:, None]
    hessian = damped_gram(gram, method.damping)
    return greedy_obs(weight_DF, hessian, columns_U1, num_keep, units_at_once(gram.size, 1)).keep
