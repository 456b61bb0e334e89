"""The stacks of a layer's experts, one expert at a time, whichever way a family lays them out; and their new readers.

In: the module of all experts, the layout of its stacks. Out: one expert's matrices and what its reader gets. New
readers go in together, as far as held-out text allows.

Letters: T tokens, k experts per token, D hidden size, E experts, F channels of an expert, R rows of its writer.
"""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.arch_group import Stacks
from secateur.compensate import GUARD_STEPS, Guard, HeldOutError, held_out_errors, held_out_sums

# An expert with fewer tokens than this many per channel does not stand on them alone.
FEW_TOKENS_PER_CHANNEL = 10

Call = tuple[Tensor, Tensor, Tensor]
"""What the module of all experts is called with: hidden states T x D, chosen experts and their weights T x k."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """A held-out batch: how the experts are called now, what they gave before the cut, what they are to give."""

    domain: str
    call: Call
    own_TD: Tensor
    target_TD: Tensor


def stack(module: nn.Module, name: str) -> nn.Parameter:
    """Return the parameter that holds one kind of matrix of all experts."""
    return module.get_parameter(name)


def num_channels(module: nn.Module, stacks: Stacks) -> int:
    """Return how many channels every expert has."""
    return stack(module, stacks.down).shape[1 if stacks.transposed else 2]


def reader_of(module: nn.Module, stacks: Stacks, expert: int) -> Float[Tensor, "D F"]:
    """Return one expert's reader in float32."""
    weight = stack(module, stacks.down)[expert]
    return (weight.T if stacks.transposed else weight).float()


def channel_inputs(module: Any, stacks: Stacks, expert: int, hidden_TD: Float[Tensor, "T D"]) -> Float[Tensor, "T F"]:
    """Return what the expert's reader gets: act(gate) * up, or what the family makes of alternating rows."""
    both = hidden_TD @ _writer(module, stacks, expert).T
    if stacks.writer_bias is not None:
        both = both + stack(module, stacks.writer_bias)[expert]
    if stacks.alternating:
        return module._apply_gate(both)
    gate, up = both.chunk(2, dim=-1)
    return module.act_fn(gate) * up


def put_readers(module: nn.Module, stacks: Stacks, readers_DF: list[Tensor], held_out: list[HeldOut]) -> Guard:
    """Put in as much of the new readers as held-out text likes best; without held-out text all of it.

    One step for all experts of the layer: their outputs are summed before anything else sees them.
    """
    plain = stack(module, stacks.down).clone()
    refitted = torch.stack([weight.T if stacks.transposed else weight for weight in readers_DF]).to(plain)
    masked = [module.forward(*each.call) for each in held_out]
    stack(module, stacks.down).copy_(refitted)
    parts: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for each, cut in zip(held_out, masked, strict=True):
        given = module.forward(*each.call) - cut
        parts.setdefault(each.domain, []).append((each.own_TD, each.target_TD - cut, given))
    sums = {
        domain: held_out_sums(
            torch.cat([lost for _, lost, _ in pieces]).float(),
            torch.cat([given for _, _, given in pieces]).float(),
            float(torch.cat([own for own, _, _ in pieces]).float().square().sum()),
        )
        for domain, pieces in parts.items()
    }
    judged = best_step(held_out_errors(sums))
    stack(module, stacks.down).copy_(torch.lerp(plain.float(), refitted.float(), judged.step).to(plain))
    return judged


def best_step(errors: dict[str, HeldOutError]) -> Guard:
    """Choose the step of 1, 1/2, 1/4, 0 with the least error, as a share of what it was, mean over domains.

    Not as `compensate.guard`, which lets no domain's error rise: with one step for a whole layer's experts a hair of
    one domain would undo what all others gain (LOG, 2026-11-26).
    """
    steps = (*GUARD_STEPS, 0.0)
    by_step = {step: {name: error.of(step) for name, error in errors.items()} for step in steps}
    before = by_step[0.0]

    def rise(step: float) -> float:
        rises = (after / before[name] if before[name] else 1 + after for name, after in by_step[step].items())
        return sum(rises, start=0.0)

    step = min(steps, key=rise)  # the first, and largest, of equals
    return Guard(step, before, by_step[step])


def _writer(module: nn.Module, stacks: Stacks, expert: int) -> Float[Tensor, "R D"]:
    weight = stack(module, stacks.writer)[expert]
    return weight.T if stacks.transposed else weight
