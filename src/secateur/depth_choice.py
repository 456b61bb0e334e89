"""Which whole layers to remove: what each is worth, measured, and a greedy choice.

In: a model and calibration batches, of which held-out ones take no part; the narrow FFN readers that `narrow_readers`
makes. Out: KL(dense || narrow model without a layer) by layer; the layers to remove, chosen one at a time. The model is
not changed.

Letters: B blocks of a batch, T tokens of a block, P positions that predict a token (T - 1), D hidden size, L layers.
"""

from collections.abc import Collection, Iterator, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.arch import Arch, decoder_layers, head_of
from secateur.depth import readers_replaced
from secateur.errors import NumericsError, RecipeError
from secateur.kl import KL_POSITIONS, token_divergences
from secateur.progress import Progress, silent
from secateur.stats import totals
from secateur.walk import LAYERS_AT_ONCE, Batch, Walk, forwards_replaced


def layer_kl(
    model: nn.Module,
    arch: Arch,
    batches: list[Batch],
    removed: Collection[int] = (),
    asked: Collection[int] | None = None,
    readers: Mapping[int, Tensor] | None = None,
) -> Float[Tensor, " L"]:
    """Return KL(dense || model without `removed` and without layer i) per layer i, in nats per token.

    Mean over all calibration tokens, over the whole vocabulary; infinite for the layers in `removed`, and where not
    `asked` for (None: all are). `readers`: weights that the FFN readers of some layers have there, but not in the dense
    model. One walk per batch carries a stream for each i, which branches off there: for all of them L^2 / 2 runs of a
    layer and 2 L of the head. Raises NumericsError naming layer and domain if a divergence is not finite.
    """
    asked = sorted(set(range(arch.num_layers) if asked is None else asked) - set(removed))
    sums_L = torch.zeros(arch.num_layers, dtype=torch.float64)
    num_tokens = 0
    for batch in (batch for batch in batches if not batch.held_out):
        num_tokens += batch.ids_BT[:, 1:].numel()
        divergences = _divergences(model, arch, batch, removed, asked, readers or {})
        for index, divergence_P in zip(asked, divergences, strict=True):
            if not torch.isfinite(divergence_P).all():
                raise NumericsError(
                    f"KL without layer {index}, domain {batch.domain}: a divergence is not finite; use the model in "
                    f"bfloat16 or float32 and check its weights."
                )
            sums_L[index] += divergence_P.cpu().double().sum()
    total = totals({"kl": sums_L, "tokens": num_tokens})
    costs_L = torch.full_like(sums_L, torch.inf)
    costs_L[asked] = total["kl"][asked] / total["tokens"]
    return costs_L


def choose_layers(
    model: nn.Module,
    arch: Arch,
    batches: list[Batch],
    num_remove: int,
    *,
    readers: Mapping[int, Tensor] | None = None,
    protected: Collection[int] = (),
    progress: Progress = silent,
) -> dict[int, float]:
    """Return the layers to remove, in the order chosen: each time the one whose removal now costs the least KL.

    By layer KL(dense || model with `readers`, without it and those before it). Every beginning of the order is the
    choice for that many layers. Of the layers that stay the ones that added least when last measured are measured anew,
    a few at a time, until the next would, adding as much as it did then, cost more than the best of these. That is
    exact where what a layer adds never shrinks; where it does, another layer of about that cost may be taken (LOG).
    Raises RecipeError if so many layers cannot go. Source of the laziness: Minoux 1978, accelerated greedy.
    """
    allowed = min(len(set(range(arch.num_layers)) - set(protected)), arch.num_layers - 1)
    if not 0 <= num_remove <= allowed:
        raise RecipeError(
            f"depth: {num_remove} of {arch.num_layers} layers cannot be removed; with {len(set(protected))} protected, "
            f"ask for 0 to {allowed}."
        )
    chosen: dict[int, float] = {}
    # By layer what it adds to the KL of those that have gone; before any has, to that of none: taken to be nothing.
    added: dict[int, float] = dict.fromkeys(set(range(arch.num_layers)) - set(protected), -torch.inf)
    before = 0.0
    for done in range(num_remove):
        progress("choose layers", done, num_remove)
        anew: dict[int, float] = {}
        while True:
            waiting = sorted(added.keys() - anew.keys(), key=lambda index: (added[index], index))
            if not waiting or (anew and min(anew.values()) < before + added[waiting[0]]):
                break
            asked = waiting[:LAYERS_AT_ONCE] if chosen else waiting
            costs = layer_kl(model, arch, batches, chosen, asked, readers).tolist()
            anew |= {index: costs[index] for index in asked}
        added |= {index: cost - before for index, cost in anew.items()}
        cheapest = min(anew, key=lambda index: (anew[index], index))
        chosen[cheapest] = before = anew[cheapest]
        del added[cheapest]
    progress("choose layers", num_remove, num_remove)
    return chosen


def _divergences(
    model: nn.Module,
    arch: Arch,
    batch: Batch,
    removed: Collection[int],
    asked: list[int],
    readers: Mapping[int, Tensor],
) -> Iterator[Float[Tensor, " P"]]:
    """Yield, for each layer asked for, the divergence at every position of the model without it and `removed`."""
    dense, pruned = Walk(model, arch, [batch]), Walk(model, arch, [batch])
    for index in range(arch.num_layers):
        dense.advance(index)
        if index in removed:
            continue
        # The last stream is the one that has skipped nothing asked for; what enters the layer is what skips it.
        streams, skipping, is_last = pruned.hidden_BTD, pruned.hidden_BTD[-1], index == asked[-1]
        if is_last:
            streams.pop()
        with readers_replaced(model, arch, {index: readers[index]} if index in readers else {}):
            pruned.advance(index)
        if index in asked:
            streams.insert(len(streams) if is_last else len(streams) - 1, skipping)
    head = head_of(model, arch)
    with torch.inference_mode():
        states_PD = states_for_head(model, arch, batch, dense.hidden_BTD[0])
        # In the model's own dtype, which holds them exactly; once for all streams.
        dense_PV = torch.cat([head(piece_PD) for piece_PD in states_PD.split(KL_POSITIONS)])
    for hidden_BTD in pruned.hidden_BTD:
        states_PD = states_for_head(model, arch, batch, hidden_BTD)
        yield token_divergences(dense_PV, nn.Identity(), states_PD, head)


@torch.inference_mode()
def states_for_head(model: nn.Module, arch: Arch, batch: Batch, hidden_BTD: Tensor) -> Float[Tensor, "P D"]:
    """Return what the head reads of a stream that has left the layers: the backbone runs with them bypassed."""
    with forwards_replaced(decoder_layers(model, arch), lambda *_, **__: arch.layer_output(hidden_BTD)):
        final_BTD = model.get_submodule(arch.backbone)(batch.ids_BT, use_cache=False).last_hidden_state
    return final_BTD[:, :-1].flatten(0, 1)
