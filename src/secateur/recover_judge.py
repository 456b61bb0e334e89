"""The judge of a recovery: held-out KL to the dense model and held-out loss, domain by domain.

In: held-out blocks and, once, the dense model. Out: what a model's logits on those blocks are worth. Of the dense model
only its head and the hidden states before it are kept.

P: positions of a block that predict a token of it; V: words.
"""

import copy
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.arch import Arch, head_of
from secateur.kl import KL_POSITIONS, final_states, summarise, token_divergences_and_agreements
from secateur.progress import Progress, silent
from secateur.recover_record import Verdict, Verdicts, mean_kl, mean_nats

# From blocks of ids to logits at every position, blocks x tokens x words.
LogitsOf = Callable[[Tensor], Tensor]


class Judge:
    """Holds the held-out blocks and what the dense model made of them."""

    def __init__(
        self,
        dense: PreTrainedModel,
        arch: Arch,
        held_out_NT: dict[str, Int64[Tensor, "M T"]],
        progress: Progress = silent,
    ) -> None:
        self.held_out_NT = held_out_NT
        self._head = head_of(dense, arch)  # on whatever device the dense model goes to later
        self._states: dict[str, list[Tensor]] = {}
        num_blocks = sum(len(blocks) for blocks in held_out_NT.values())
        progress("judge dense", 0, num_blocks)
        for domain, blocks in held_out_NT.items():
            self._states[domain] = [final_states(dense, arch, ids_T[None]) for ids_T in blocks]
            progress("judge dense", sum(map(len, self._states.values())), num_blocks)

    def keep_head(self) -> None:
        """Copy the head, so that the dense model may be taken apart."""
        self._head = copy.deepcopy(self._head)

    def dense(self) -> Verdicts:
        """Return the dense model's own verdicts: a KL of zero, and its loss."""
        return self._verdicts(lambda domain, number, _: self._head(self._states[domain][number].to(self._device())))

    @torch.no_grad()
    def verdicts(self, logits_of: LogitsOf) -> Verdicts:
        """Return each domain's verdict. Raises NumericsError naming the domain if a divergence is not finite."""
        return self._verdicts(lambda _, __, ids_T: logits_of(ids_T[None])[0, :-1])

    def _device(self) -> torch.device:
        return next(self._head.parameters()).device

    @torch.no_grad()
    def _verdicts(self, logits_of: Callable[[str, int, Tensor], Tensor]) -> Verdicts:
        found: Verdicts = {}
        for domain, blocks in self.held_out_NT.items():
            divergences, agreements, losses = [], [], []
            for number, (ids_T, states_PD) in enumerate(zip(blocks, self._states[domain], strict=True)):
                logits_PV = logits_of(domain, number, ids_T).to(self._device())
                states_PD = states_PD.to(self._device())
                divergence_P, agrees_P = token_divergences_and_agreements(
                    states_PD, self._head, logits_PV, nn.Identity()
                )
                divergences.append(divergence_P)
                agreements.append(agrees_P)
                losses.append(next_token_losses(logits_PV, ids_T[1:].to(logits_PV.device)))
            summary = summarise(domain, divergences, agreements)
            # Rounding may leave a divergence a hair below zero.
            kl = max(summary.mean, 0.0)
            nats = float(torch.cat(losses).double().mean())
            found[domain] = Verdict(kl, summary.standard_error, nats, summary.top1_agreement, summary.num_tokens)
        return found


def objective(verdicts: Verdicts, kl_share: float) -> float:
    """Return what the training makes small, on this text: kl_share * KL + (1 - kl_share) * nats per token, means."""
    return kl_share * mean_kl(verdicts) + (1 - kl_share) * mean_nats(verdicts)


def domain_weights(verdicts: Verdicts, weighting: str) -> dict[str, float]:
    """Return what each domain's loss counts: 1 (`shares`), or its KL over the mean of all domains' (`lost`)."""
    mean = mean_kl(verdicts)
    if weighting == "shares" or mean == 0:
        return dict.fromkeys(verdicts, 1.0)
    return {domain: verdict.kl / mean for domain, verdict in verdicts.items()}


def next_token_losses(logits_PV: Float[Tensor, "P V"], next_P: Int64[Tensor, " P"]) -> Float[Tensor, " P"]:
    """Return -log q(next token) at every position, in nats; softmax in float32, by slices of positions."""
    pieces = zip(logits_PV.split(KL_POSITIONS), next_P.split(KL_POSITIONS), strict=True)
    return torch.cat([nn.functional.cross_entropy(piece.float(), ids, reduction="none") for piece, ids in pieces])
