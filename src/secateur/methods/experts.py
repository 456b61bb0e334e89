"""Experts as units: remove those that the router needs least, with their rows of the router.

One observer serves all families: it notes the arguments of the experts' module and calls it again
for one expert at a time. The router chooses among the remaining experts, which are then refitted.

T tokens, k experts per token, D hidden size, E experts.
"""

import dataclasses
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.errors import NumericsError
from secateur.methods.expert_refit import Wanted, counted_call, refit_experts
from secateur.methods.scores import ExpertInputs, Routing, scored
from secateur.methods.select import Task, log_line
from secateur.model.group import Experts, Group
from secateur.model.stacks import cut_experts
from secateur.stream.statistics import keep_highest, totals
from secateur.stream.walk import Walk

# With a refit, experts are removed in this many steps (LOG, 2026-11-26).
NUM_STEPS = 4


def observe_routing(
    walk: Walk, group: Group, *, to_middle: bool, target_mix: float = 0.0, keep: bool = False
) -> tuple[dict[str, Routing], list[Wanted]]:
    """Return each domain's routing on the pruned stream, without held-out text, and what is wanted.

    The walk stands before the layer. norms_j = sum over tokens t that chose expert j of
    g_j(t) |f_j(t)|, with g the router's weight and f the output; energy_j the same of the squares.
    With `keep` also each batch's expert output, moved by `target_mix` of the drift behind the layer
    (dense minus pruned stream), whose dense stream must have moved already. Raises NumericsError,
    naming layer and domain, if a norm is not finite.
    """
    module, num_experts = walk.layers[group.layer].get_submodule(group.experts.module), group.num_units
    seen: list[Any] = []
    found: dict[str, Routing] = {}
    wanted: list[Wanted] = []
    with module.register_forward_hook(lambda _, inputs, output: seen.append((inputs, output))):
        for position, (batch, behind_BTD) in enumerate(walk.run(group.layer, to_middle=to_middle)):
            call, output = seen.pop()
            call, output_TD = counted_call(batch, call), batch.counted(output)
            if keep:
                target_TD = output_TD
                if target_mix:
                    drift_TD = batch.counted(walk.dense_BTD[position] - behind_BTD)
                    target_TD = output_TD + target_mix * drift_TD
                wanted.append(Wanted(target_TD, output_TD if batch.held_out else None))
            if batch.held_out:
                continue
            if group.experts.weighted_inputs:
                new = _routing_of_weighted(call[0], output_TD, num_experts)
            else:
                hidden_TD, chosen_Tk, weights_Tk = call
                new = _routing(module, hidden_TD, chosen_Tk, weights_Tk, num_experts)
            if not bool(new.norms_E.isfinite().all()):
                raise NumericsError(
                    f"layer {group.layer}, {group.experts.module}, domain {batch.domain}: an expert gives NaN or "
                    f"infinite numbers; use the model in bfloat16 or float32 and check its weights."
                )
            found[batch.domain] = found[batch.domain].plus(new) if batch.domain in found else new
    total = totals({name: torch.stack(dataclasses.astuple(each)).cpu() for name, each in found.items()})
    device = next(module.parameters()).device
    return {name: Routing(*sums_3E.to(device)) for name, sums_3E in total.items()}, wanted


def keep_experts(scores_E: Float[Tensor, " E"], num_keep: int, experts: Experts) -> Int64[Tensor, " K"]:
    """Return the sorted indices of the highest scores, the same number in each router group."""
    size, each = len(scores_E) // experts.num_groups, num_keep // experts.num_groups
    return torch.cat([number * size + keep_highest(part, each) for number, part in enumerate(scores_E.split(size))])


@torch.no_grad()
def prune_experts(task: Task) -> tuple[Int64[Tensor, " K"], dict[str, Any]]:
    """Measure, select, cut and, with `compensate: least_squares`, refit one layer's experts.

    With a refit they go in NUM_STEPS steps, each measured anew, because a refit changes their
    worth. Returns the kept indices and the log line, of the first measurement and the last refit.
    `routed_share_kept`: by domain, the share of the router's choices that fell on kept experts.
    """
    walk, method, layer, experts = task.walk, task.method, task.layer, task.group.experts
    num_units, num_keep = experts.num_units_left(layer), task.num_keep
    group = dataclasses.replace(task.group, num_units=num_units)

    def scores_of(routing: dict[str, Routing], seed: int) -> Tensor:
        inputs = ExpertInputs(routing, task.shares, method.weighting, seed)
        return task.decide(lambda: scored(method.score, inputs))

    # If the router's weight acts inside an expert, this least squares does not apply.
    refits = method.compensate == "least_squares" and num_keep < num_units and not experts.weighted_inputs
    first, wanted = observe_routing(walk, group, to_middle=True, target_mix=method.target_mix, keep=refits)
    first_scores_E = scores_of(first, task.seed)
    keep, verdict = torch.arange(num_units, device=first_scores_E.device), {}
    for step, num_left in enumerate(_steps(num_units, num_keep, experts.num_groups) if refits else [num_keep]):
        now = dataclasses.replace(group, num_units=len(keep))
        scores_E = first_scores_E
        if step:
            scores_E = scores_of(observe_routing(walk, now, to_middle=True)[0], task.seed + step)
        if num_left < len(keep):
            if task.keep is not None:  # only the order in which the others go is left to choose
                scores_E = scores_E.masked_fill(torch.isin(keep, task.keep.to(keep.device)), torch.inf)
            stays = keep_experts(scores_E, num_left, experts)
            cut_experts(layer, now, stays)
            keep = keep[stays]
        if refits:
            refit = refit_experts(walk, now, wanted, method.damping, method.weighting, task.shares, task.decide)
            verdict = dataclasses.asdict(refit)
    output_energy = {domain: float(each.energy_E.sum()) for domain, each in first.items()}
    shares = {d: float(each.num_tokens_E[keep].sum() / each.num_tokens_E.sum()) for d, each in first.items()}
    line = log_line(group, len(keep), num_units, output_energy, first_scores_E) | {"routed_share_kept": shares}
    return keep, line | verdict


def _steps(num_units: int, num_keep: int, num_groups: int) -> list[int]:
    """Return the numbers of experts left after each step, equal in every group, no repeats."""
    size, gone = num_units // num_groups, (num_units - num_keep) // num_groups
    taken = dict.fromkeys(-(-gone * step // NUM_STEPS) for step in range(1, NUM_STEPS + 1))
    return [num_groups * (size - each) for each in taken]


@torch.inference_mode()
def _routing(
    module: nn.Module,
    hidden_TD: Float[Tensor, "T D"],
    chosen_Tk: Int64[Tensor, "T k"],
    weights_Tk: Float[Tensor, "T k"],
    num_experts: int,
) -> Routing:
    norms = [torch.zeros(0, device=hidden_TD.device)] * num_experts
    for expert in chosen_Tk.unique().tolist():
        tokens, places = torch.where(chosen_Tk == expert)
        alone = torch.full_like(tokens, expert)[:, None]
        # Call forward, because the module's hook would note this call too.
        output_TD = module.forward(hidden_TD[tokens], alone, torch.ones_like(weights_Tk[tokens, :1]))
        norms[expert] = torch.linalg.vector_norm(output_TD.float(), dim=-1) * weights_Tk[tokens, places].float()
    return Routing.of(torch.tensor([len(each) for each in norms], device=hidden_TD.device), norms)


def _routing_of_weighted(
    inputs_XD: Float[Tensor, "X D"], outputs_XD: Float[Tensor, "X D"], num_experts: int
) -> Routing:
    """As `_routing` if each expert sees all tokens (X = E T) times its weight, mostly 0."""
    chosen_ET = (inputs_XD != 0).any(dim=-1).view(num_experts, -1)
    norms_ET = torch.linalg.vector_norm(outputs_XD.float(), dim=-1).view(num_experts, -1)
    return Routing.of(chosen_ET.sum(dim=1), list(norms_ET))
