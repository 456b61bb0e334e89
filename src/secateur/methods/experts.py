"""Mixtures of experts: whole experts as units, or the channels inside them.

Of whole experts go those that the router needs least, with their rows of the router. One observer
serves all families: it notes the arguments of the experts' module and calls it again for one expert
at a time. The router chooses among the remaining experts, which are then refitted by least squares:
stacks are read one expert at a time, readers are fitted to the tokens of each.

Of channels each expert keeps the same number, chosen on the tokens routed to it. An expert with few
tokens is also measured on tokens that chose other experts: its Gram matrix is shrunk towards the
one over a random sample of the layer's tokens, in which each domain has its share. A guard on
held-out text judges the layer's refit as a whole.

T tokens, k experts per token, D hidden size, E experts, F channels of an expert, K channels that
stay.
"""

import dataclasses
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.errors import NumericsError
from secateur.facts import PerDomain
from secateur.methods.compensate import (
    GUARD_STEPS,
    Guard,
    HeldOutError,
    held_out_errors,
    least_squares,
    sums_of,
)
from secateur.methods.scores import ExpertInputs, Routing, scored
from secateur.methods.select import StepResult, Task, greedy_obs, log_line, units_at_once
from secateur.model.group import Experts, Group, Mixture, cut
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


def experts_of(walk: Walk, group: Group) -> Mixture:
    """Return the layer's experts."""
    return group.experts.of(walk.layers[group.layer])


def expert_calls(walk: Walk, group: Group) -> Iterator[tuple[Batch, Tensor, Any, Tensor]]:
    """Yield each batch, the layer's output, and the experts' call and output of the tokens that
    count.

    Experts see each token by itself. The walk moves to the layer's middle.
    """
    seen: list[Any] = []
    module = experts_of(walk, group).module
    with module.register_forward_hook(lambda _, inputs, output: seen.append((inputs, output))):
        for batch, behind_BTD in walk.run(group.layer, to_middle=True):
            call, output = seen.pop()
            yield batch, behind_BTD, tuple(map(batch.counted, call)), batch.counted(output)


class HeldOut(NamedTuple):
    """A held-out batch: the experts' call now, their output before the cut, the wanted output."""

    domain: str
    call: ExpertCall
    own_TD: Tensor
    target_TD: Tensor


def put_readers(experts: Mixture, readers_DF: list[Tensor], held_out: list[HeldOut]) -> Guard:
    """Put in the share of the new readers that held-out text likes best, one for all experts."""
    plain, module = experts.readers.clone(), experts.module
    refitted = torch.stack(readers_DF).to(plain)
    masked = [module.forward(*block.call) for block in held_out]
    experts.readers.copy_(refitted)
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for each, cut_TD in zip(held_out, masked, strict=True):
        given_TD = module.forward(*each.call) - cut_TD
        parts.setdefault(each.domain, []).append((each.own_TD, each.target_TD - cut_TD, given_TD))
    judged = best_step(held_out_errors(sums_of(parts)))
    experts.readers.copy_(torch.lerp(plain.float(), refitted.float(), judged.step).to(plain))
    return judged


def best_step(errors: dict[str, HeldOutError]) -> Guard:
    """Choose the step of 1, 1/2, 1/4, 0 with the least relative error, averaged over domains.

    Unlike `compensate.guard` it lets one domain's error rise: a single step serves a whole layer's
    experts, and a slight loss in one domain would undo the gain in all others (LOG, 2026-11-26).
    """
    by_step = {
        step: {name: error.of(step) for name, error in errors.items()}
        for step in (*GUARD_STEPS, 0.0)
    }
    before = by_step[0.0]

    def rise(step: float) -> float:
        rises = (
            after / before[name] if before[name] else 1 + after
            for name, after in by_step[step].items()
        )
        return sum(rises, start=0.0)

    step = min(by_step, key=rise)  # the largest of equals
    return Guard(step, before, by_step[step])


# Passes over all experts: five gain only 0.5% of the loss at 50% of the experts (LOG, 2026-11-26).
NUM_SWEEPS = 2
PIECE_TOKENS = 2048


class Wanted(NamedTuple):
    """The wanted output for a batch's tokens; `own_TD`: the output so far, if held out."""

    target_TD: Tensor
    own_TD: Tensor | None


RoutedTokens = tuple[Tensor, ...]
"""A domain's tokens on this rank: the arguments of the experts' module, and the residual of each, T
x D.
"""


@torch.no_grad()
def refit_experts(
    walk: Walk,
    group: Group,
    wanted: list[Wanted],
    damping: float,
    weighting: str,
    shares: PerDomain,
) -> Guard:
    """Refit the readers of the layer's experts towards `wanted`, one entry per batch.

    In turns, for expert j over its tokens t, with router weight g and reader input x:
    dW_j = argmin sum_t w_d(t) |e_t - g_tj x_tj dW'|^2 + ridge_j |dW|^2,  e_t -= g_tj x_tj dW_j',
    e: wanted minus given; w_d = q_d / energy of domain d's wanted output (`tokens`: one for all);
    ridge_j as in `least_squares`, times 10 F / n_j if n_j < 10 F tokens. No residual: no change.
    """
    experts = experts_of(walk, group)

    # By domain, tokens as the router sends them to the experts left, and the energy of what is
    # wanted.
    by_domain: dict[str, list[RoutedTokens]] = {}
    energy, held_out = PerDomain(), list[HeldOut]()
    for (batch, _, call, given_TD), (target_TD, own_TD) in zip(
        expert_calls(walk, group), wanted, strict=True
    ):
        if own_TD is not None:
            held_out.append(HeldOut(batch.domain, call, own_TD, target_TD))
            continue
        target_TD = target_TD.float()
        by_domain.setdefault(batch.domain, []).append((*call, target_TD - given_TD.float()))
        energy[batch.domain] = energy.get(batch.domain, 0.0) + float(target_TD.square().sum())
    tokens = {
        name: tuple(map(torch.cat, zip(*by_domain[name], strict=True)))
        for name in sorted(by_domain)
    }
    by_domain.clear()

    # Refit the experts in turns.
    energy = totals(energy)
    total = sum(energy.values())
    weights = {
        name: domain_weight(weighting, shares[name] * total, energy[name]) for name in tokens
    }
    readers_DF = [experts.reader(expert) for expert in range(len(experts.readers))]
    for _ in range(NUM_SWEEPS):
        for expert, reader_DF in enumerate(readers_DF):
            readers_DF[expert] = _refit(experts, expert, reader_DF, tokens, weights, damping)
    return put_readers(experts, readers_DF, held_out)


def _refit(
    experts: Mixture,
    expert: int,
    reader_DF: Float[Tensor, "D F"],
    tokens: dict[str, RoutedTokens],
    weights: PerDomain,
    damping: float,
) -> Float[Tensor, "D F"]:
    """Return one expert's new reader, and subtract what it adds from the residuals."""
    size, device = experts.num_channels, reader_DF.device
    gram = Gram(size, device)
    cross_FD = gram.blocks[0].new_zeros(size, len(reader_DF))
    num_tokens = torch.zeros(1, dtype=torch.int64)

    def pieces() -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
        """Yield a domain, the residuals of its tokens, and for a piece of the expert's its rows and
        reader inputs.
        """
        for domain, (hidden_TD, chosen_Tk, weights_Tk, left_TD) in tokens.items():
            routed = torch.where(chosen_Tk == expert)
            for rows, places in zip(*(index.split(PIECE_TOKENS) for index in routed), strict=True):
                inputs_TF = experts.inputs(expert, hidden_TD[rows]).float()
                yield domain, left_TD, rows, inputs_TF * weights_Tk[rows, places, None].float()

    for domain, left_TD, rows, x_TF in pieces():
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
    for _, left_TD, rows, x_TF in pieces():
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
    module, num_experts = experts_of(walk, group).module, group.num_units
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
        f"layer {group.layer}, {group.reader.module}, domain {domain}: an expert gives NaN or "
        "infinite numbers; use the model in bfloat16 or float32 and check its weights."
    )


def keep_experts(
    scores_E: Float[Tensor, " E"], num_keep: int, experts: Experts
) -> Int64[Tensor, " K"]:
    """Return the sorted indices of the highest scores, the same number in each router group."""
    size, per_group = len(scores_E) // experts.num_groups, num_keep // experts.num_groups
    return torch.cat(
        [
            number * size + keep_highest(part, per_group)
            for number, part in enumerate(scores_E.split(size))
        ]
    )


@torch.no_grad()
def prune_experts(task: Task) -> StepResult:
    """Measure, select, cut and, with `compensate: least_squares`, refit one layer's experts.

    With a refit they go in NUM_STEPS steps, each measured anew, because a refit changes their
    worth. Returns the kept indices and the log line, of the first measurement and the last refit.
    `routed_share_kept`: by domain, the share of the router's choices that fell on kept experts.
    """
    walk, method, layer, experts = task.walk, task.method, task.layer, task.group.experts
    num_units, num_keep = task.group.num_units_left(layer), task.num_keep
    group = dataclasses.replace(task.group, num_units=num_units)

    # If the router's weight acts inside an expert, this least squares does not apply.
    refits = (
        method.compensate == "least_squares"
        and num_keep < num_units
        and not experts.weighted_inputs
    )
    first, wanted = observe_routing(walk, group, target_mix=method.target_mix, keep=refits)
    keep, verdict = torch.arange(num_units, device=experts.of(layer).readers.device), {}
    for step, num_left in enumerate(
        _steps(num_units, num_keep, experts.num_groups) if refits else [num_keep]
    ):
        now = dataclasses.replace(group, num_units=len(keep))
        if num_left < len(keep):
            routing = observe_routing(walk, now)[0] if step else first
            inputs = ExpertInputs(routing, task.shares, method.weighting, task.seed + step)
            scores_E = decided(partial(scored, method.score, inputs))
            if task.keep is not None:  # only the order in which the others go is left to choose
                scores_E = scores_E.masked_fill(
                    torch.isin(keep, task.keep.to(keep.device)), torch.inf
                )
            stays = keep_experts(scores_E, num_left, experts)
            cut(layer, now, stays)
            keep = keep[stays]
        if refits:
            refit = refit_experts(walk, now, wanted, method.damping, method.weighting, task.shares)
            verdict = dataclasses.asdict(refit)
    output_energy = {domain: float(routing.energy_E.sum()) for domain, routing in first.items()}
    shares = {
        d: float(routing.num_tokens_E[keep].sum() / routing.num_tokens_E.sum())
        for d, routing in first.items()
    }
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
        output_TD = module.forward(
            hidden_TD[tokens], alone, torch.ones_like(weights_Tk[tokens, :1])
        )
        norms[expert] = (
            torch.linalg.vector_norm(output_TD.float(), dim=-1) * weights_Tk[tokens, places].float()
        )
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
    sums = (
        torch.stack([norms_T.to(dtype).pow(power).sum() for norms_T in norms_TE])
        for power in (1, 2)
    )
    return torch.stack([num_tokens_E.to(dtype), *sums])


# An expert with few tokens of its own borrows from this many, or as many as there are.
NUM_SAMPLED = 2048

SampledTokens = tuple[Tensor, Tensor]
"""Tokens of one domain: the random number of each, ascending, and its hidden state."""


@dataclass(slots=True)
class _Observed:
    """What is known of a layer's experts. `grams`: of each, pooled over domains.

    `drawn`: of the current domain, on this rank. `samples`: by domain, hidden states of tokens
    sampled from all ranks.
    """

    experts: Mixture
    grams: list[Gram]
    num_tokens_E: Tensor
    energy: PerDomain = field(default_factory=dict)
    drawn: list[SampledTokens] = field(default_factory=list)
    samples: dict[str, Tensor] = field(default_factory=dict)
    held_out: list[tuple[str, ExpertCall]] = field(default_factory=list)


@torch.no_grad()
def prune_expert_channels(task: Task) -> StepResult:
    """Prune a layer's experts; return kept channels, log line. NumericsError if not finite."""
    group, num_keep, experts = task.group, task.num_keep, experts_of(task.walk, task.group)
    num_experts, num_units = len(experts.readers), experts.num_channels
    seen = _observe_channels(task)
    line = log_line(group, num_keep, num_units, seen.energy)
    keep_EK = torch.arange(num_units).repeat(num_experts, 1)
    if num_keep < num_units:
        narrowed = [
            decided(partial(_narrower, task, expert, seen)) for expert in range(num_experts)
        ]
        keep_EK = torch.stack([keep_K for keep_K, _ in narrowed])
        refits = [reader for _, reader in narrowed if reader is not None]
        own = [experts.module.forward(*call) for _, call in seen.held_out]
        held_out = [
            HeldOut(*each, own_TD, own_TD) for each, own_TD in zip(seen.held_out, own, strict=True)
        ]
        cut(task.layer, group, keep_EK)
        line |= dataclasses.asdict(put_readers(experts, refits, held_out)) if refits else {}
    return keep_EK, line


def _narrower(
    task: Task, expert: int, seen: _Observed
) -> tuple[Int64[Tensor, " K"], Tensor | None]:
    """Return an expert's kept channels and its refitted reader; None without least squares."""
    method, gram, weight_DF = task.method, _shrunk(expert, seen), seen.experts.reader(expert)
    if task.keep is not None:
        keep_K = task.keep[expert].to(weight_DF.device)
    elif method.score == "random":
        generator = torch.Generator().manual_seed(task.seed + expert)
        order = torch.randperm(gram.size, generator=generator)
        keep_K = order[: task.num_keep].sort().values.to(weight_DF.device)
    else:
        columns_U1 = torch.arange(gram.size, device=weight_DF.device)[:, None]
        hessian, batch = damped_gram(gram, method.damping), units_at_once(gram.size, 1)
        keep_K = greedy_obs(weight_DF, hessian, columns_U1, task.num_keep, batch).keep
    refits = method.compensate == "least_squares"
    return keep_K, least_squares(weight_DF, gram, keep_K, method.damping) if refits else None


def _observe_channels(task: Task) -> _Observed:
    shares, experts = task.shares, experts_of(task.walk, task.group)
    size, num_experts, device = experts.num_channels, len(experts.readers), experts.readers.device
    # In float32: the Gram matrices take most of the memory.
    pooled, current = (
        [Gram(size, device, torch.float32) for _ in range(num_experts)] for _ in range(2)
    )
    seen = _Observed(experts, pooled, torch.zeros(num_experts, dtype=torch.long))

    def fold(domain: str) -> None:
        """Pool the domain that has ended."""
        total = torch.tensor([seen.energy.get(domain, 0.0)], dtype=torch.float64)
        sum_over_ranks(total, *current)
        energy = seen.energy[domain] = float(total)
        if not energy < float("inf"):
            raise _not_finite(task.group, domain)
        seen.samples[domain] = _lowest(of_all_ranks(seen.drawn), shares[domain])[1]
        seen.drawn = []
        for mine, theirs in zip(pooled, current, strict=True):
            mine.merge(theirs, domain_weight(task.method.weighting, shares[domain], energy))
            theirs.clear()

    domains = InOrder(shares, fold)
    for batch, _, call, _ in expert_calls(task.walk, task.group):
        domain = batch.domain
        if batch.held_out:
            seen.held_out.append((domain, call))
            continue
        domains.begin(domain)
        seen.drawn = [_lowest([*seen.drawn, _numbered(batch, call[0], task.seed)], shares[domain])]
        seen.energy[domain] = seen.energy.get(domain, 0.0) + _add_tokens(call, current, seen)
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


def _add_tokens(call: ExpertCall, current: list[Gram], seen: _Observed) -> float:
    """Add a call's tokens to the experts that they chose; return the output energy of these."""
    hidden_TD, chosen_Tk, weights_Tk = call
    energy = 0.0
    for expert in chosen_Tk.unique().tolist():
        tokens, places = torch.where(chosen_Tk == expert)
        # Routers of some families give float32 weights beside bfloat16 experts, so both become
        # float32.
        inputs_TF = seen.experts.inputs(expert, hidden_TD[tokens]).float()
        x_TF = inputs_TF * weights_Tk[tokens, places, None]
        current[expert].add_product(x_TF)
        seen.num_tokens_E[expert] += len(tokens)
        energy += float((x_TF @ seen.experts.reader(expert).T).square().sum())
    return energy


def _shrunk(expert: int, seen: _Observed) -> Gram:
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
    everyone.add_product(seen.experts.inputs(expert, sample_TD))
    share = size / (size + num_tokens)
    for gram, weight in ((own, 1 - share), (everyone, share)):
        trace = float(gram.diagonal().sum())
        mixed.merge(gram, weight / trace if trace > 0 else 0.0)
    return mixed
