"""Mixtures of experts: whole experts as units, or the channels inside them.

Of whole experts go those that the router needs least, with their rows of the router. One observer
serves all families: it notes the arguments of the experts' module and calls it again for one expert
at a time. The router chooses among the remaining experts, which are then refitted by least squares:
stacks are read one expert at a time, readers are fitted to the tokens of each.

Of channels each expert keeps the same number, chosen on the tokens routed to it. An expert with few
tokens is also measured on tokens that chose other experts: its Gram matrix is shrunk towards the one
over a random sample of the layer's tokens, in which each domain has its share. A guard on held-out
text judges the layer's refit as a whole.

T tokens, k experts per token, D hidden size, E experts, F channels of an expert, K channels that stay.
"""

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.errors import NumericsError
from secateur.methods.compensate import (
    GUARD_STEPS,
    Guard,
    HeldOutError,
    held_out_errors,
    least_squares,
    sums_of,
)
from secateur.methods.scores import ExpertInputs, Routing, scored
from secateur.methods.select import Task, greedy_obs, log_line, units_at_once
from secateur.model.group import (
    Experts,
    Group,
    Stacks,
    channel_inputs,
    cut,
    num_channels,
    reader_of,
)
from secateur.stream.statistics import (
    Gram,
    InOrder,
    damped_gram,
    decided,
    domain_weight,
    keep_highest,
    of_all_ranks,
    sum_dtype,
    sum_over_ranks,
    totals,
)
from secateur.stream.walk import Batch, Walk

# An expert with fewer tokens per channel than this is regularised more.
FEW_TOKENS_PER_CHANNEL = 10

ExpertCall = tuple[Tensor, Tensor, Tensor]
"""The arguments of the experts' module: hidden states T x D, chosen experts and weights T x k."""


def experts_module(walk: Walk, group: Group) -> nn.Module:
    """Return the module that holds the layer's experts."""
    return walk.layers[group.layer].get_submodule(group.experts.module)


def expert_calls(walk: Walk, group: Group) -> Iterator[tuple[Batch, Tensor, Any, Tensor]]:
    """Yield each batch, the layer's output, and the experts' call and output of the tokens that count.

    Experts see each token by itself. The walk moves to the layer's middle.
    """
    seen: list[Any] = []
    with experts_module(walk, group).register_forward_hook(lambda _, inputs, output: seen.append((inputs, output))):
        for batch, behind_BTD in walk.run(group.layer, to_middle=True):
            call, output = seen.pop()
            yield batch, behind_BTD, tuple(batch.counted(part) for part in call), batch.counted(output)


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A held-out batch: the experts' call now, their output before the cut, the wanted output."""

    domain: str
    call: ExpertCall
    own_TD: Tensor
    target_TD: Tensor


def put_readers(module: nn.Module, stacks: Stacks, readers_DF: list[Tensor], held_out: list[HeldOut]) -> Guard:
    """Put in the share of the new readers that held-out text likes best, one for all experts."""
    plain = module.get_parameter(stacks.down).clone()
    refitted = torch.stack([weight.T if stacks.transposed else weight for weight in readers_DF]).to(plain)
    masked = [module.forward(*block.call) for block in held_out]
    module.get_parameter(stacks.down).copy_(refitted)
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for each, cut_TD in zip(held_out, masked, strict=True):
        given_TD = module.forward(*each.call) - cut_TD
        parts.setdefault(each.domain, []).append((each.own_TD, each.target_TD - cut_TD, given_TD))
    judged = best_step(held_out_errors(sums_of(parts)))
    module.get_parameter(stacks.down).copy_(torch.lerp(plain.float(), refitted.float(), judged.step).to(plain))
    return judged


def best_step(errors: dict[str, HeldOutError]) -> Guard:
    """Choose the step of 1, 1/2, 1/4, 0 with the least relative error, averaged over domains.

    Unlike `compensate.guard` it lets one domain's error rise: a single step serves a whole layer's
    experts, and a slight loss in one domain would undo the gain in all others (LOG, 2026-11-26).
    """
    by_step = {step: {name: error.of(step) for name, error in errors.items()} for step in (*GUARD_STEPS, 0.0)}
    before = by_step[0.0]

    def rise(step: float) -> float:
        rises = (after / before[name] if before[name] else 1 + after for name, after in by_step[step].items())
        return sum(rises, start=0.0)

    step = min(by_step, key=rise)  # the largest of equals
    return Guard(step, before, by_step[step])


# Passes over all experts: five gain only 0.5% of the loss at 50% of the experts (LOG, 2026-11-26).
NUM_SWEEPS = 2
PIECE_TOKENS = 2048


@dataclass(slots=True)
class Wanted:
    """The wanted output for a batch's tokens; `own_TD`: the output so far, if held out."""

    target_TD: Tensor
    own_TD: Tensor | None


@dataclass(slots=True)
class _Tokens:
    """A domain's tokens on this rank: the experts' calls, the residual of each (T x D), the wanted energy."""

    calls: list[ExpertCall] = field(default_factory=list)
    left: list[Tensor] = field(default_factory=list)
    energy: float = 0.0

    def joined(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return hidden states, chosen experts, weights and residuals of all batches."""
        hidden, chosen, weights = (torch.cat(parts) for parts in zip(*self.calls, strict=True))
        return hidden, chosen, weights, torch.cat(self.left)


@torch.no_grad()
def refit_experts(
    walk: Walk,
    group: Group,
    wanted: list[Wanted],
    damping: float,
    weighting: str,
    shares: dict[str, float],
) -> Guard:
    """Refit the readers of the layer's experts towards `wanted`, one entry per batch.

    In turns, for expert j over its tokens t, with router weight g and reader input x:
    dW_j = argmin sum_t w_d(t) |e_t - g_tj x_tj dW'|^2 + ridge_j |dW|^2,  e_t -= g_tj x_tj dW_j',
    e: wanted minus given; w_d = q_d / energy of domain d's wanted output (`tokens`: one for all);
    ridge_j as in `least_squares`, times 10 F / n_j if n_j < 10 F tokens. No residual: no change.
    """
    stacks, module = group.experts.stacks, experts_module(walk, group)
    tokens, held_out = _as_routed_now(walk, group, wanted)
    energy = totals({name: torch.tensor([each.energy], dtype=torch.float64) for name, each in tokens.items()})
    total = sum(map(float, energy.values()))
    weights = {name: domain_weight(weighting, shares[name] * total, float(energy[name])) for name in tokens}
    parts = {domain: pieces.joined() for domain, pieces in sorted(tokens.items())}
    tokens.clear()
    num_experts = len(module.get_parameter(stacks.down))
    readers_DF = [reader_of(module, stacks, expert) for expert in range(num_experts)]
    for _ in range(NUM_SWEEPS):
        for expert, reader_DF in enumerate(readers_DF):
            readers_DF[expert] = _refit(module, stacks, expert, reader_DF, parts, weights, damping)
    return put_readers(module, stacks, readers_DF, held_out)


def _as_routed_now(walk: Walk, group: Group, wanted: list[Wanted]) -> tuple[dict[str, _Tokens], list[HeldOut]]:
    """Return by domain the router's choices among the experts left, and held-out batches."""
    tokens: dict[str, _Tokens] = {}
    held_out = []
    for (batch, _, call, given_TD), want in zip(expert_calls(walk, group), wanted, strict=True):
        if want.own_TD is not None:
            held_out.append(HeldOut(batch.domain, call, want.own_TD, want.target_TD))
            continue
        domain = tokens.setdefault(batch.domain, _Tokens())
        domain.calls.append(call)
        domain.left.append(want.target_TD.float() - given_TD.float())
        domain.energy += float(want.target_TD.float().square().sum())
    return tokens, held_out


def _refit(
    module: nn.Module,
    stacks: Stacks,
    expert: int,
    reader_DF: Float[Tensor, "D F"],
    parts: dict[str, tuple[Tensor, Tensor, Tensor, Tensor]],
    weights: dict[str, float],
    damping: float,
) -> Float[Tensor, "D F"]:
    """Return one expert's new reader, and subtract what it adds from the residuals."""
    size, device = num_channels(module, stacks), reader_DF.device
    gram = Gram(size, device)
    cross_FD = gram.blocks[0].new_zeros(size, len(reader_DF))
    num_tokens = torch.zeros(1, dtype=torch.int64)
    routed = {domain: torch.where(chosen_Tk == expert) for domain, (_, chosen_Tk, _, _) in parts.items()}

    def pieces(domain: str):
        hidden_TD, _, weights_Tk, _ = parts[domain]
        for rows, places in zip(*(index.split(PIECE_TOKENS) for index in routed[domain]), strict=True):
            inputs_TF = channel_inputs(module, stacks, expert, hidden_TD[rows])
            yield rows, inputs_TF.float() * weights_Tk[rows, places, None].float()

    for domain, (_, _, _, left_TD) in parts.items():
        for rows, x_TF in pieces(domain):
            num_tokens += len(rows)
            x_TF = x_TF * weights[domain] ** 0.5
            gram.add_product(x_TF)
            cross_FD += x_TF.T @ (left_TD[rows] * weights[domain] ** 0.5)
    sum_over_ranks(num_tokens, cross_FD, gram)
    if not num_tokens or not float(gram.diagonal().sum()):
        return reader_DF
    damping *= max(1.0, FEW_TOKENS_PER_CHANNEL * size / int(num_tokens))
    everything = torch.arange(size, device=device)
    new_DF = decided(partial(least_squares, reader_DF, gram, everything, damping, cross_FD, 1.0))
    for domain, (_, _, _, left_TD) in parts.items():
        for rows, x_TF in pieces(domain):
            left_TD[rows] -= x_TF @ (new_DF - reader_DF).T
    return new_DF


# With a refit, experts are removed in this many steps (LOG, 2026-11-26).
NUM_STEPS = 4


def observe_routing(
    walk: Walk, group: Group, *, target_mix: float = 0.0, keep: bool = False
) -> tuple[dict[str, Routing], list[Wanted]]:
    """Return each domain's routing on the pruned stream, without held-out text, and what is wanted.

    The walk stands before the layer. norms_j = sum over tokens t that chose expert j of
    g_j(t) |f_j(t)|, with g the router's weight and f the output; energy_j the same of the squares.
    With `keep` also each batch's expert output, moved by `target_mix` of the drift behind the layer
    (dense minus pruned stream), whose dense stream must have moved already. Raises NumericsError,
    naming layer and domain, if a norm is not finite.
    """
    module, num_experts = experts_module(walk, group), group.num_units
    routing: dict[str, Tensor] = {}
    wanted: list[Wanted] = []
    for position, (batch, behind_BTD, call, output_TD) in enumerate(expert_calls(walk, group)):
        if keep:
            target_TD = output_TD
            if target_mix:
                drift_TD = batch.counted(walk.dense_BTD[position] - behind_BTD)
                target_TD = output_TD + target_mix * drift_TD
            wanted.append(Wanted(target_TD, output_TD if batch.held_out else None))
        if batch.held_out:
            continue
        if group.experts.weighted_inputs:
            sums_3E = _routing_of_weighted(call[0], output_TD, num_experts)
        else:
            sums_3E = _routing(module, call, num_experts)
        if not bool(sums_3E[1].isfinite().all()):
            raise _not_finite(group, batch.domain)
        routing[batch.domain] = routing.get(batch.domain, 0.0) + sums_3E

    # The sums over all ranks.
    total = totals({name: sums_3E.cpu() for name, sums_3E in routing.items()})
    device = next(module.parameters()).device
    return {name: Routing(*sums_3E.to(device)) for name, sums_3E in total.items()}, wanted


def _not_finite(group: Group, domain: str) -> NumericsError:
    return NumericsError(
        f"layer {group.layer}, {group.experts.module}, domain {domain}: an expert gives NaN or infinite numbers; "
        f"use the model in bfloat16 or float32 and check its weights."
    )


def keep_experts(scores_E: Float[Tensor, " E"], num_keep: int, experts: Experts) -> Int64[Tensor, " K"]:
    """Return the sorted indices of the highest scores, the same number in each router group."""
    size, per_group = len(scores_E) // experts.num_groups, num_keep // experts.num_groups
    return torch.cat(
        [number * size + keep_highest(part, per_group) for number, part in enumerate(scores_E.split(size))]
    )


@torch.no_grad()
def prune_experts(task: Task) -> tuple[Int64[Tensor, " K"], dict[str, Any]]:
    """Measure, select, cut and, with `compensate: least_squares`, refit one layer's experts.

    With a refit they go in NUM_STEPS steps, each measured anew, because a refit changes their
    worth. Returns the kept indices and the log line, of the first measurement and the last refit.
    `routed_share_kept`: by domain, the share of the router's choices that fell on kept experts.
    """
    walk, method, layer, experts = task.walk, task.method, task.layer, task.group.experts
    num_units, num_keep = task.group.num_units_left(layer), task.num_keep
    group = dataclasses.replace(task.group, num_units=num_units)

    def scores_of(routing: dict[str, Routing], seed: int) -> Tensor:
        inputs = ExpertInputs(routing, task.shares, method.weighting, seed)
        return decided(lambda: scored(method.score, inputs))

    # If the router's weight acts inside an expert, this least squares does not apply.
    refits = method.compensate == "least_squares" and num_keep < num_units and not experts.weighted_inputs
    first, wanted = observe_routing(walk, group, target_mix=method.target_mix, keep=refits)
    first_scores_E = scores_of(first, task.seed)
    keep, verdict = torch.arange(num_units, device=first_scores_E.device), {}
    for step, num_left in enumerate(_steps(num_units, num_keep, experts.num_groups) if refits else [num_keep]):
        now = dataclasses.replace(group, num_units=len(keep))
        scores_E = first_scores_E
        if step:
            scores_E = scores_of(observe_routing(walk, now)[0], task.seed + step)
        if num_left < len(keep):
            if task.keep is not None:  # only the order in which the others go is left to choose
                scores_E = scores_E.masked_fill(torch.isin(keep, task.keep.to(keep.device)), torch.inf)
            stays = keep_experts(scores_E, num_left, experts)
            cut(layer, now, stays)
            keep = keep[stays]
        if refits:
            refit = refit_experts(walk, now, wanted, method.damping, method.weighting, task.shares)
            verdict = dataclasses.asdict(refit)
    output_energy = {domain: float(routing.energy_E.sum()) for domain, routing in first.items()}
    shares = {d: float(routing.num_tokens_E[keep].sum() / routing.num_tokens_E.sum()) for d, routing in first.items()}
    line = log_line(group, len(keep), num_units, output_energy) | {"routed_share_kept": shares}
    return keep, line | verdict


def _steps(num_units: int, num_keep: int, num_groups: int) -> list[int]:
    """Return the numbers of experts left after each step, equal in every group, no repeats."""
    size, num_removed = num_units // num_groups, (num_units - num_keep) // num_groups
    taken = dict.fromkeys(-(-num_removed * step // NUM_STEPS) for step in range(1, NUM_STEPS + 1))
    return [num_groups * (size - num_taken) for num_taken in taken]


def _routing(module: nn.Module, call: ExpertCall, num_experts: int) -> Float[Tensor, "3 E"]:
    """Return per expert the fields of `Routing`, of a call's tokens."""
    hidden_TD, chosen_Tk, weights_Tk = call
    norms = [torch.zeros(0, device=hidden_TD.device)] * num_experts
    for expert in chosen_Tk.unique().tolist():
        tokens, places = torch.where(chosen_Tk == expert)
        alone = torch.full_like(tokens, expert)[:, None]
        # Call forward, because the module's hook would note this call too.
        output_TD = module.forward(hidden_TD[tokens], alone, torch.ones_like(weights_Tk[tokens, :1]))
        norms[expert] = torch.linalg.vector_norm(output_TD.float(), dim=-1) * weights_Tk[tokens, places].float()
    return _sums(torch.tensor([len(norms_T) for norms_T in norms], device=hidden_TD.device), norms)


def _routing_of_weighted(
    inputs_XD: Float[Tensor, "X D"], outputs_XD: Float[Tensor, "X D"], num_experts: int
) -> Float[Tensor, "3 E"]:
    """As `_routing` if each expert sees all tokens (X = E T) times its weight, mostly 0."""
    chosen_ET = (inputs_XD != 0).any(dim=-1).view(num_experts, -1)
    norms_ET = torch.linalg.vector_norm(outputs_XD.float(), dim=-1).view(num_experts, -1)
    return _sums(chosen_ET.sum(dim=1), list(norms_ET))


def _sums(num_tokens_E: Int64[Tensor, " E"], norms_TE: list[Tensor]) -> Float[Tensor, "3 E"]:
    dtype = sum_dtype(num_tokens_E.device)
    sums = (torch.stack([norms_T.to(dtype).pow(power).sum() for norms_T in norms_TE]) for power in (1, 2))
    return torch.stack([num_tokens_E.to(dtype), *sums])


# An expert with few tokens of its own borrows from this many, or as many as there are.
NUM_SAMPLED = 2048

SampledTokens = tuple[Tensor, Tensor]
"""Tokens of one domain: the random number of each, ascending, and its hidden state."""


@dataclass(slots=True)
class _Observed:
    """Per expert: pooled Gram matrix, token count. `drawn`: of the current domain, on this rank.

    `samples`: by domain, hidden states of tokens sampled from all ranks.
    """

    grams: list[Gram]
    num_tokens_E: Tensor
    energy: dict[str, float] = field(default_factory=dict)
    drawn: list[SampledTokens] = field(default_factory=list)
    samples: dict[str, Tensor] = field(default_factory=dict)
    held_out: list[tuple[str, ExpertCall]] = field(default_factory=list)


@torch.no_grad()
def prune_expert_channels(task: Task) -> tuple[Int64[Tensor, "E K"], dict[str, Any]]:
    """Prune a layer's experts; return kept channels, log line. NumericsError if not finite."""
    group, num_keep = task.group, task.num_keep
    stacks, module = group.experts.stacks, experts_module(task.walk, group)
    num_experts, num_units = len(module.get_parameter(stacks.down)), num_channels(module, stacks)
    seen = _observe_channels(task)
    line = log_line(group, num_keep, num_units, seen.energy)
    keep_EK = torch.arange(num_units).repeat(num_experts, 1)
    if num_keep < num_units:
        narrowed = [decided(partial(_narrower, task, module, expert, seen)) for expert in range(num_experts)]
        keep_EK = torch.stack([keep_K for keep_K, _ in narrowed])
        refits = [reader for _, reader in narrowed if reader is not None]
        own = [module.forward(*call) for _, call in seen.held_out]
        held_out = [HeldOut(*each, own_TD, own_TD) for each, own_TD in zip(seen.held_out, own, strict=True)]
        cut(task.layer, group, keep_EK)
        line |= dataclasses.asdict(put_readers(module, stacks, refits, held_out)) if refits else {}
    return keep_EK, line


def _narrower(task: Task, module: nn.Module, expert: int, seen: _Observed) -> tuple[Int64[Tensor, " K"], Tensor | None]:
    """Return an expert's kept channels and its refitted reader; None without least squares."""
    stacks, method = task.group.experts.stacks, task.method
    gram, weight_DF = _shrunk(module, stacks, expert, seen), reader_of(module, stacks, expert)
    if task.keep is not None:
        keep_K = task.keep[expert].to(weight_DF.device)
    elif method.score == "random":
        order = torch.randperm(gram.size, generator=torch.Generator().manual_seed(task.seed + expert))
        keep_K = order[: task.num_keep].sort().values.to(weight_DF.device)
    else:
        columns_U1 = torch.arange(gram.size, device=weight_DF.device)[:, None]
        hessian, batch = damped_gram(gram, method.damping), units_at_once(gram.size, 1)
        keep_K = greedy_obs(weight_DF, hessian, columns_U1, task.num_keep, batch).keep
    refits = method.compensate == "least_squares"
    return keep_K, least_squares(weight_DF, gram, keep_K, method.damping) if refits else None


def _observe_channels(task: Task) -> _Observed:
    group, shares = task.group, task.shares
    stacks, module = group.experts.stacks, experts_module(task.walk, group)
    readers_EDF, size = module.get_parameter(stacks.down), num_channels(module, stacks)
    num_experts, device = len(readers_EDF), readers_EDF.device
    # In float32: the Gram matrices take most of the memory.
    pooled, current = ([Gram(size, device, torch.float32) for _ in range(num_experts)] for _ in range(2))
    seen = _Observed(pooled, torch.zeros(num_experts, dtype=torch.long))
    domains = InOrder(shares, lambda domain: _pool_domain(task, seen, current, domain))
    for batch, _, call, _ in expert_calls(task.walk, group):
        domain = batch.domain
        if batch.held_out:
            seen.held_out.append((domain, call))
            continue
        domains.begin(domain)
        seen.drawn = [_lowest([*seen.drawn, _numbered(batch, call[0], task.seed)], shares[domain])]
        seen.energy[domain] = seen.energy.get(domain, 0.0) + _add_tokens(module, stacks, call, current, seen)
    domains.begin("")
    sum_over_ranks(seen.num_tokens_E)
    return seen


def _numbered(batch: Batch, hidden_TD: Float[Tensor, "T D"], seed: int) -> SampledTokens:
    """Give each token a random number by seed, domain and place: any rank gives the same."""
    place = random.Random(f"{seed}:{batch.domain}:{batch.first_block}").getrandbits(63)
    generator = torch.Generator().manual_seed(place)
    return torch.rand(len(hidden_TD), generator=generator, dtype=torch.float64), hidden_TD


def _lowest(parts: list[SampledTokens], share: float) -> SampledTokens:
    """Return the tokens of the lowest numbers, as many as are a domain's share of the sample."""
    numbers_T, hidden_TD = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    order = numbers_T.argsort()[: max(1, round(share * NUM_SAMPLED))]
    return numbers_T[order], hidden_TD[order.to(hidden_TD.device)]


def _add_tokens(module: Any, stacks: Stacks, call: ExpertCall, current: list[Gram], seen: _Observed) -> float:
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


def _pool_domain(task: Task, seen: _Observed, current: list[Gram], domain: str) -> None:
    total = torch.tensor([seen.energy.get(domain, 0.0)], dtype=torch.float64)
    sum_over_ranks(total, *current)
    energy = seen.energy[domain] = float(total)
    if not energy < float("inf"):
        raise _not_finite(task.group, domain)
    share = task.shares[domain]
    seen.samples[domain] = _lowest(of_all_ranks(seen.drawn), share)[1]
    seen.drawn = []
    for mine, theirs in zip(seen.grams, current, strict=True):
        mine.merge(theirs, domain_weight(task.method.weighting, share, energy))
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
