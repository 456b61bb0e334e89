"""Held-out KL and loss by domain."""

import copy
import math
from collections.abc import Callable, Collection, Mapping
from itertools import islice

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.data.blocks import Text, blocks_of
from secateur.errors import NumericsError
from secateur.facts import Verdict, Verdicts
from secateur.log import Progress, silent
from secateur.model.bind import Arch, head_of
from secateur.recovery.loss import CACHED_POSITIONS
from secateur.stream.losses import (
    Sums,
    compare_tokens,
    head_inputs,
    loss_of,
    summarise,
    sums_of,
    token_divergences,
)

# So much further from the dense model, over few held-out answers, is no move.
LEAST_MOVE = 0.02


class Judge:
    """Judges models by held-out blocks, of which it has what the dense model's head reads, and the head."""

    def __init__(
        self,
        dense: PreTrainedModel,
        arch: Arch,
        text: Mapping[str, Text],
        progress: Progress = silent,
        *,
        asked: bool = True,
    ) -> None:
        """Ask the dense model; unless `asked`, `states` are to be filled before anything is judged."""
        self.text = {domain: blocks_of(blocks) for domain, blocks in text.items()}
        self.head = head_of(dense, arch)  # moves with the dense model
        self.states: dict[str, list[Tensor]] = {domain: [] for domain in self.text}
        if asked:
            blocks = [block for blocks in self.text.values() for block in blocks]
            states = head_inputs(dense, arch, blocks, progress, "judge dense")
            self.states = {domain: list(islice(states, len(blocks))) for domain, blocks in self.text.items()}

    @property
    def answers(self) -> frozenset[str]:
        """The domains of which a mask names what counts: the dense model's answers."""
        return frozenset(
            name for name, blocks in self.text.items() if any(block.counted_T is not None for block in blocks)
        )

    def own_head(self) -> None:
        """Copy the head, so that the dense model may be cut, freed or sharded."""
        self.head = copy.deepcopy(self.head)

    def dense(self) -> Verdicts:
        """Return the dense model's own verdicts: a KL of zero, and its loss."""
        return self._verdicts(lambda domain, number, _: self.head(self.states[domain][number].to(self._device())))

    @torch.no_grad()
    def verdicts(self, logits_of: Callable[[Tensor], Tensor]) -> Verdicts:
        """Return each domain's verdict. `logits_of`: (B, T) ids to (B, T, V) logits.

        Raises NumericsError naming the domain if a divergence is not finite.
        """
        return self._verdicts(lambda _, __, ids_T: logits_of(ids_T[None])[0, :-1])

    def _device(self) -> torch.device:
        return next(self.head.parameters()).device

    @torch.no_grad()
    def _verdicts(self, logits_of: Callable[[str, int, Tensor], Tensor]) -> Verdicts:
        verdicts: Verdicts = {}
        for domain, blocks in self.text.items():
            divergences, agreements, reverse, sums = [], [], list[Tensor](), list[Sums]()
            for number, (block, states_PD) in enumerate(zip(blocks, self.states[domain], strict=True)):
                logits_PV = logits_of(domain, number, block.ids_T).to(self._device())
                states_PD = states_PD.to(self._device())
                divergence_P, agrees_P = compare_tokens(states_PD, self.head, logits_PV, nn.Identity())
                divergences.append(divergence_P)
                agreements.append(agrees_P)
                reverse.append(block.counted(token_divergences(logits_PV, nn.Identity(), states_PD, self.head)))
                next_P = block.ids_T[1:].to(logits_PV.device)
                slices = zip(logits_PV.split(CACHED_POSITIONS), next_P.split(CACHED_POSITIONS), strict=True)
                losses = [nn.functional.cross_entropy(part.float(), ids, reduction="none") for part, ids in slices]
                sums.append(sums_of(torch.cat(losses), block))
            summary = summarise(domain, blocks, divergences, agreements)
            kl = max(summary.mean, 0.0)  # rounding may leave it a hair below zero
            nats = loss_of(sums, f"judge, domain {domain}").nats_per_token
            verdicts[domain] = Verdict(
                kl=kl,
                standard_error=summary.standard_error,
                nats_per_token=nats,
                top1_agreement=summary.top1_agreement,
                num_tokens=summary.num_tokens,
                reverse_kl=max(float(torch.cat(reverse).double().mean()), 0.0),
            )
        return verdicts


def unless_diverged(judged: Callable[[], Verdicts]) -> Verdicts | None:
    """Return the verdicts, None if the model's logits are not finite: its training has diverged."""
    try:
        return judged()
    except NumericsError:
        return None


def objective(
    verdicts: Verdicts | None,
    kl_share: float,
    answers: Collection[str] = (),
    before: Verdicts | None = None,
) -> float:
    """Return what judges a training: kl_share * KL + (1 - kl_share) * nats per token, means.

    `answers`: domains of what the dense model says: KL alone, where `kl_share` is not 0, in both
    directions, so that neither a model that only grows surer passes nor one that grows vague. Infinite
    without verdicts, and for a model that `moved_away` from the one `before`.
    """
    if verdicts is None or (before is not None and moved_away(before, verdicts, answers)):
        return math.inf
    whole = answers if kl_share > 0 else ()
    values = [
        verdict.both_ways if name in whole else kl_share * verdict.kl + (1 - kl_share) * verdict.nats_per_token
        for name, verdict in verdicts.items()
    ]
    return sum(values) / len(values)


def moved_away(before: Verdicts, after: Verdicts, answers: Collection[str]) -> list[str]:
    """Return the domains of answers on which a model is further from the dense one than it was, by `LEAST_MOVE`."""
    return [name for name in sorted(answers) if after[name].both_ways > (1 + LEAST_MOVE) * before[name].both_ways]
