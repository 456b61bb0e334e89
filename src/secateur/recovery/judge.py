"""Held-out KL and loss by domain."""

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import chain, islice

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from secateur.data.blocks import Block, Text
from secateur.errors import NumericsError
from secateur.facts import Verdict, Verdicts, standard_error
from secateur.log import Progress, silent
from secateur.model.bind import Arch, head_of
from secateur.stream.losses import compare_tokens, head_inputs, loss_of, merged, sums_of

# So much further from the dense model, over few held-out answers, is no move.
LEAST_MOVE = 0.02


class Judge:
    """Judges models by held-out blocks, of which it has what the dense model's head reads, and the
    head.
    """

    def __init__(
        self,
        dense: PreTrainedModel,
        arch: Arch,
        text: Mapping[str, Text],
        progress: Progress = silent,
        *,
        asked: bool = True,
    ) -> None:
        """Ask the dense model; unless `asked`, `states` are to be filled before anything is
        judged.
        """
        self.text = {domain: list(blocks) for domain, blocks in text.items()}
        self.head = head_of(dense, arch)  # moves with the dense model
        all_blocks = [*chain.from_iterable(self.text.values())] if asked else []
        states = head_inputs(dense, arch, all_blocks, progress, "judge dense")
        self.states = {
            domain: list(islice(states, len(blocks))) for domain, blocks in self.text.items()
        }

    @property
    def answers(self) -> frozenset[str]:
        """The domains of which a mask names what counts: the dense model's answers."""
        return frozenset(
            name
            for name, blocks in self.text.items()
            if any(block.counted_T is not None for block in blocks)
        )

    def own_head(self) -> None:
        """Copy the head, so that the dense model may be cut, freed or sharded."""
        self.head = copy.deepcopy(self.head)

    def dense(self) -> Verdicts:
        """Return the dense model's own verdicts: a KL of zero, and its loss."""
        return self._verdicts(lambda _, states_PD: self.head(states_PD))

    def verdicts(self, logits_of: Callable[[Tensor], Tensor]) -> Verdicts:
        """Return each domain's verdict. `logits_of`: (B, T) ids to (B, T, V) logits.

        Raises NumericsError naming the domain if a divergence is not finite.
        """
        return self._verdicts(lambda ids_T, _: logits_of(ids_T[None])[0, :-1])

    @torch.no_grad()
    def _verdicts(self, logits_of: Callable[[Tensor, Tensor], Tensor]) -> Verdicts:
        verdicts, device = Verdicts(), next(self.head.parameters()).device
        for domain, blocks in self.text.items():
            figures = list[tuple[Tensor, ...]]()
            for block, states in zip(blocks, self.states[domain], strict=True):
                states_PD = states.to(device)
                logits_PV = logits_of(block.ids_T, states_PD).to(device)
                next_P = block.ids_T[1:].to(device)
                figures.append(compare_tokens(states_PD, self.head, logits_PV, next_P))
            verdicts[domain] = verdict_of(domain, blocks, figures)
        return verdicts


def verdict_of(
    domain: str, blocks: Sequence[Block], figures: Sequence[tuple[Tensor, ...]]
) -> Verdict:
    """Return what `compare_tokens` gives over a domain's blocks. Raises NumericsError if it is not
    finite.
    """
    kl_NP, reverse_NP, same_NP, nats_NP = zip(*figures, strict=True)

    def counted(values_NP: Sequence[Tensor]) -> Float[Tensor, " K"]:
        parts = [block.counted(values_P) for values_P, block in zip(values_NP, blocks, strict=True)]
        return torch.cat(parts).cpu().double()

    kl_K = counted(kl_NP)
    if not bool(kl_K.isfinite().all()):
        raise NumericsError(
            f"KL, domain {domain}: a divergence is not finite; one model gives no finite logits."
        )
    of_documents = merged(map(sums_of, kl_NP, blocks)).values()
    return Verdict(
        kl=max(float(kl_K.mean()), 0.0),  # rounding may leave it a hair below zero
        standard_error=standard_error(
            [total for total, _ in of_documents], [count for _, count in of_documents]
        ),
        nats_per_token=loss_of(
            map(sums_of, nats_NP, blocks), f"judge, domain {domain}"
        ).nats_per_token,
        top1_agreement=float(counted(same_NP).mean()),
        num_tokens=kl_K.numel(),
        reverse_kl=max(float(counted(reverse_NP).mean()), 0.0),
    )


def objective(
    verdicts: Verdicts | None,
    kl_share: float,
    answers: Collection[str],
    before: Verdicts,
) -> float:
    """Return what judges a training: kl_share * KL + (1 - kl_share) * nats per token, means.

    `answers`: domains of what the dense model says: KL alone, where `kl_share` is not 0, in both
    directions, so that neither a model that only grows surer passes nor one that grows vague.
    Infinite without verdicts, and for a model that `moved_away` from the one `before`.
    """
    if verdicts is None or moved_away(before, verdicts, answers):
        return math.inf
    whole = answers if kl_share > 0 else ()
    values = [
        verdict.both_ways
        if name in whole
        else kl_share * verdict.kl + (1 - kl_share) * verdict.nats_per_token
        for name, verdict in verdicts.items()
    ]
    return sum(values) / len(values)


def moved_away(before: Verdicts, after: Verdicts, answers: Collection[str]) -> list[str]:
    """Return the domains of answers on which a model is further from the dense one than it was, by
    `LEAST_MOVE`.
    """
    return [
        name
        for name in sorted(answers)
        if after[name].both_ways > (1 + LEAST_MOVE) * before[name].both_ways
    ]
