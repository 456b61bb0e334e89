"""Loss: nats per token on token blocks, domain by domain.

In: a model and blocks that no statistic has seen. Out: mean loss, its standard error and the token count per domain.
Perplexity is exp(nats per token). The head runs on slices of positions, so that no full matrix of logits is held.
"""

import math
from collections.abc import Callable
from itertools import islice

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from secateur.arch import Arch, head_of
from secateur.errors import NumericsError
from secateur.facts import Loss
from secateur.memory import release_freed
from secateur.progress import Progress, silent
from secateur.ranks import size, spread
from secateur.walk import Batch, Walk

# Positions per slice of logits: 64 x 150k words x float32 is 38 MB.
HEAD_POSITIONS = 64
# Tokens that go through the layers together, so that weights which are not in memory come once for all of them.
TOKENS_AT_ONCE = 1 << 15


def domain_losses(
    model: nn.Module, arch: Arch, blocks_NT: dict[str, Tensor], progress: Progress = silent, stage: str = "evaluate"
) -> dict[str, Loss]:
    """Return each domain's loss; ranks share the blocks and all get the numbers that one process would get.

    Raises NumericsError naming the domain if a loss is not finite.
    """
    losses: dict[str, Loss] = {}
    blocks = [ids_T for domain_NT in blocks_NT.values() for ids_T in domain_NT]
    # Every rank is to have some.
    at_once = min(max(1, TOKENS_AT_ONCE // len(blocks[0])), -(-len(blocks) // size()))
    pieces = [blocks[start : start + at_once] for start in range(0, len(blocks), at_once)]
    done, steps = 0, len(pieces) * arch.num_layers

    def one_more() -> None:
        nonlocal done
        done = min(done + size(), steps)
        progress(stage, done, steps)

    progress(stage, 0, steps)
    found = spread(lambda piece: _mean_losses(model, arch, piece, one_more), pieces)
    all_values = (value for values in found for value in values)
    for domain, domain_NT in blocks_NT.items():
        values = list(islice(all_values, len(domain_NT)))
        mean = sum(values) / len(values)
        if not math.isfinite(mean):
            raise NumericsError(f"{stage}, domain {domain}: the loss is {mean}; the model gives no finite logits.")
        losses[domain] = Loss(mean, standard_error(values), domain_NT[:, 1:].numel())
    release_freed()
    return losses


def standard_error(values: list[float]) -> float:
    """Return the standard error of the mean, 0 for a single value."""
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1) / len(values))


def _mean_losses(model: nn.Module, arch: Arch, blocks: list[Tensor], layer_done: Callable[[], None]) -> list[float]:
    """Return each block's mean loss. All go through a layer before the next one is run, each as it would by itself."""
    backbone, device = model.get_submodule(arch.backbone), next(model.parameters()).device
    batches = [Batch("", True, ids_T[None].to(device)) for ids_T in blocks]
    walk = Walk(model, arch, batches)
    for index in range(arch.num_layers):
        walk.advance(index)
        layer_done()
    found = []
    for position, batch in enumerate(batches):
        final_TD = walk.leave(backbone, position)[0]
        found.append(float(_position_losses(head_of(model, arch), final_TD, batch.ids_BT[0]).mean()))
    return found


@torch.inference_mode()
def block_losses(model: nn.Module, arch: Arch, ids_1T: Int64[Tensor, "1 T"]) -> Float[Tensor, " P"]:
    """Return -log p(token t+1 | tokens up to t) for every position of one block, in nats; P = T - 1."""
    ids_1T = ids_1T.to(next(model.parameters()).device)
    final_TD = model.get_submodule(arch.backbone)(ids_1T, use_cache=False).last_hidden_state[0]
    return _position_losses(head_of(model, arch), final_TD, ids_1T[0])


@torch.inference_mode()
def _position_losses(head: nn.Module, final_TD: Tensor, ids_T: Tensor) -> Float[Tensor, " P"]:
    parts = [
        nn.functional.cross_entropy(head(piece_PD).float(), targets_P, reduction="none")
        for piece_PD, targets_P in zip(
            final_TD[:-1].split(HEAD_POSITIONS), ids_T[1:].split(HEAD_POSITIONS), strict=True
        )
    ]
    return torch.cat(parts)
