"""The probe: a few blocks per domain that tell how far a change of weights moves the model's predictions.

In: a model and calibration batches. Out: KL(the model as it was when the probe was made || as it is now) by domain, in
nats per token over the whole vocabulary. The probe stands before a layer; only that layer and those after it are run.
"""

import math

import torch
from torch import Tensor, nn

from secateur.arch import Arch, head_of
from secateur.depth_choice import states_for_head
from secateur.errors import NumericsError
from secateur.kl import KL_POSITIONS, token_divergences
from secateur.stats import totals
from secateur.walk import Batch, Walk


class Probe:
    """Holds each block's hidden state before the layer where it stands, and the logits as they were: tokens x words.

    A probe costs one run of its blocks through the model; `kl` from layer i costs the layers from i on and the head.
    """

    def __init__(self, model: nn.Module, arch: Arch, batches: list[Batch], num_blocks: int) -> None:
        """Take the first `num_blocks` blocks of each domain among the batches that are not held out."""
        self.model, self.arch, self.position = model, arch, 0
        self._walk = Walk(model, arch, first_blocks(batches, num_blocks))
        self._head = head_of(model, arch)
        with torch.inference_mode():
            # In the model's own dtype, which holds them exactly.
            self._logits_PV = [
                torch.cat([self._head(piece_PD) for piece_PD in states_PD.split(KL_POSITIONS)])
                for states_PD in self._states()
            ]

    def advance(self) -> None:
        """Move past one layer, as it is now."""
        self._walk.advance(self.position)
        self.position += 1

    @torch.inference_mode()
    def kl(self) -> dict[str, float]:
        """Return each domain's divergence. Raises NumericsError naming layer and domain if one is not finite."""
        sums: dict[str, float] = {}
        counts: dict[str, int] = {}
        for batch, logits_PV, now_PD in zip(self._walk.batches, self._logits_PV, self._states(), strict=True):
            divergence_P = token_divergences(logits_PV, nn.Identity(), now_PD, self._head).cpu().double()
            sums[batch.domain] = sums.get(batch.domain, 0.0) + float(divergence_P.sum())
            counts[batch.domain] = counts.get(batch.domain, 0) + len(divergence_P)
        sums, counts = totals(sums), totals(counts)
        for domain, total in sums.items():
            if not math.isfinite(total):
                raise NumericsError(
                    f"KL of a change from layer {self.position} on, domain {domain}: it is not finite; use the "
                    f"model in bfloat16 or float32 and check its weights."
                )
        # Rounding may leave a divergence a hair below zero.
        return {domain: max(total / counts[domain], 0.0) for domain, total in sums.items()}

    def _states(self) -> list[Tensor]:
        standing = list(self._walk.hidden_BTD)
        for index in range(self.position, self.arch.num_layers):
            self._walk.advance(index)
        pairs = zip(self._walk.batches, self._walk.hidden_BTD, strict=True)
        states = [states_for_head(self.model, self.arch, batch, hidden_BTD) for batch, hidden_BTD in pairs]
        self._walk.hidden_BTD = standing
        return states


def first_blocks(batches: list[Batch], num_blocks: int, *, after: int = 0) -> list[Batch]:
    """Return `num_blocks` blocks of each domain behind its first `after`, of the batches that are not held out.

    Of a rank's batches those that hold some of them, so that all ranks together have the same blocks as one process.
    """
    chosen: list[Batch] = []
    for batch in (batch for batch in batches if not batch.held_out):
        start = max(after - batch.first_block, 0)
        stop = min(after + num_blocks - batch.first_block, len(batch.ids_BT))
        if stop > start:
            chosen.append(Batch(batch.domain, False, batch.ids_BT[start:stop], batch.first_block + start))
    return chosen
