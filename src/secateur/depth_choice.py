"""Which whole layers to remove: what each is worth, measured, and a greedy choice.

In: a model and calibration batches, of which held-out ones take no part. Out: KL(dense || model without a layer) by
layer; the layers to remove, chosen one at a time. The model is not changed.

Letters: B blocks of a batch, T tokens of a block, P positions that predict a token (T - 1), D hidden size, L layers.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.arch import Arch, decoder_layers, head_of
from secateur.depth import fitted_readers, readers_replaced
from secateur.errors import NumericsError, RecipeError
from secateur.kl import KL_POSITIONS, token_divergences
from secateur.progress import Progress, silent
from secateur.ranks import sum_by_name
from secateur.walk import Batch, Walk, forwards_replaced

# Layers measured together when choosing goes on: a few share their walk, many would be measured for nothing.
LAYERS_AT_ONCE = 4
# A patch gives back up to half of a layer's KL (LOG, 2026-11-25), so half of what is measured without is a lower bound.
LEFT_BY_A_PATCH = 0.5


@dataclass(frozen=True, slots=True)
class Folded:
    """Layers that are out already, and what it takes to have them so.

    `readers`: by layer the weight of its FFN's reader, into which what follows it has been folded.
    """

    removed: tuple[int, ...] = ()
    readers: dict[int, Tensor] = field(default_factory=dict[int, Tensor])

    def without(self, layer: int, before: int, weight: Tensor | None) -> "Folded":
        """Return the same without one more layer, folded with this weight into the one `before` it if there is any."""
        readers = {index: reader for index, reader in self.readers.items() if index != layer}
        if weight is not None:
            readers[before] = weight
        return Folded((*self.removed, layer), readers)

    def kept(self, arch: Arch) -> list[int]:
        """Return the layers that stay."""
        return [index for index in range(arch.num_layers) if index not in self.removed]


@dataclass(frozen=True, slots=True)
class Patching:
    """How layers are patched while they are weighed: the batches that patches are fitted to, and the damping."""

    batches: list[Batch]
    damping: float


def layer_kl(
    model: nn.Module,
    arch: Arch,
    batches: list[Batch],
    gone: Folded | Collection[int] = (),
    asked: Collection[int] | None = None,
    patches: Mapping[int, Tensor] | None = None,
) -> Float[Tensor, " L"]:
    """Return KL(dense || model without `gone` and without layer i) per layer i, in nats per token.

    Mean over all calibration tokens, over the whole vocabulary; infinite for the layers in `gone`, and where not
    `asked` for (None: all are). `patches`: by layer i the weight of the FFN reader before it, once i is folded into it.
    One walk per batch carries a stream for each i, which branches off there: for all of them L^2 / 2 runs of a layer
    and 2 L of the head. Raises NumericsError naming layer and domain if a divergence is not finite.
    """
    gone = gone if isinstance(gone, Folded) else Folded(tuple(gone))
    asked = sorted(set(range(arch.num_layers) if asked is None else asked) - set(gone.removed))
    sums_L = torch.zeros(arch.num_layers, dtype=torch.float64)
    num_tokens = 0
    for batch in (batch for batch in batches if not batch.held_out):
        num_tokens += batch.ids_BT[:, 1:].numel()
        for index, divergence_P in zip(
            asked, _divergences(model, arch, batch, gone, asked, patches or {}), strict=True
        ):
            if not torch.isfinite(divergence_P).all():
                raise NumericsError(
                    f"KL without layer {index}, domain {batch.domain}: a divergence is not finite; use the model in "
                    f"bfloat16 or float32 and check its weights."
                )
            sums_L[index] += divergence_P.double().sum().cpu()
    total = sum_by_name({"kl": sums_L, "tokens": num_tokens})
    costs_L = torch.full_like(sums_L, torch.inf)
    costs_L[asked] = total["kl"][asked] / total["tokens"]
    return costs_L


def choose_layers(
    model: nn.Module,
    arch: Arch,
    batches: list[Batch],
    num_remove: int,
    *,
    patching: Patching | None = None,
    protected: Collection[int] = (),
    progress: Progress = silent,
) -> dict[int, float]:
    """Return the layers to remove, in the order chosen: each time the one whose removal now costs the least KL.

    By layer KL(dense || model without it and those before it), with `patching` once each is folded into the layer
    before. Every beginning of the order is the choice for that many layers. What a layer adds to the KL grows, as a
    rule, with what has gone; so of those that stay the ones that added least when last measured are measured anew, a
    few at a time, until none can cost less than the best of these.
    Raises RecipeError if so many layers cannot go. Source of the laziness: Minoux 1978, accelerated greedy.
    """
    allowed = min(len(set(range(arch.num_layers)) - set(protected)), arch.num_layers - 1)
    if not 0 <= num_remove <= allowed:
        raise RecipeError(
            f"depth: {num_remove} of {arch.num_layers} layers cannot be removed; with {len(set(protected))} protected, "
            f"ask for 0 to {allowed}."
        )
    chosen: dict[int, float] = {}
    if not num_remove:
        return chosen
    progress("choose layers", 0, num_remove)
    first = layer_kl(model, arch, batches).tolist()
    factor = LEFT_BY_A_PATCH if patching else 1.0
    added = {index: factor * first[index] for index in range(arch.num_layers) if index not in protected}
    gone, before = Folded(), 0.0
    for done in range(num_remove):
        best = _next(model, arch, batches, gone, before, added, patching)
        chosen[best.layer] = before = best.cost
        kept = gone.kept(arch)
        gone = gone.without(best.layer, kept[kept.index(best.layer) - 1], best.patch)
        del added[best.layer]
        progress("choose layers", done + 1, num_remove)
    return chosen


@dataclass(frozen=True, slots=True)
class _Best:
    layer: int
    cost: float
    patch: Tensor | None


def _next(
    model: nn.Module,
    arch: Arch,
    batches: list[Batch],
    gone: Folded,
    before: float,
    added: dict[int, float],
    patching: Patching | None,
) -> _Best:
    """Return the cheapest layer to take out next, and note in `added` what each measured one adds to `before`."""
    waiting, best = set(added), _Best(-1, torch.inf, None)
    while waiting:
        asked = sorted(waiting, key=lambda index: (added[index], index))[:LAYERS_AT_ONCE]
        if best.cost < before + added[asked[0]]:
            break
        patches = {}
        if patching:
            patches = fitted_readers(
                model, arch, patching.batches, gone.kept(arch), gone.readers, asked, patching.damping
            )
        costs = layer_kl(model, arch, batches, gone, asked, patches).tolist()
        for index in sorted(asked):
            added[index] = costs[index] - before
            if (costs[index], index) < (best.cost, best.layer):
                best = _Best(index, costs[index], patches.get(index))
        waiting -= set(asked)
    return best


def _divergences(
    model: nn.Module, arch: Arch, batch: Batch, gone: Folded, asked: list[int], patches: Mapping[int, Tensor]
) -> Iterator[Float[Tensor, " P"]]:
    """Yield, for each layer asked for, the divergence at every position of the model without it and `gone`."""
    walk = Walk(model, arch, [batch])
    full_BTD = walk.hidden_BTD[0]
    for index in range(arch.num_layers):
        walk.advance(index)
    head = head_of(model, arch)
    with torch.inference_mode():
        states_PD = states_for_head(model, arch, batch, walk.hidden_BTD[0])
        # In the model's own dtype, which holds them exactly; once for all streams.
        dense_PV = torch.cat([head(piece_PD) for piece_PD in states_PD.split(KL_POSITIONS)])
    kept, streams = gone.kept(arch), []
    ahead_BTD = full_BTD  # what enters the next layer, and what comes behind it if it is left out
    with readers_replaced(model, arch, gone.readers):
        for index, following in zip(kept, [*kept[1:], arch.num_layers], strict=True):
            streams = [walk.through(index, stream_BTD) for stream_BTD in streams]
            if index in asked:
                streams.append(ahead_BTD)
            if index < asked[-1]:
                entering_BTD, full_BTD = full_BTD, walk.through(index, full_BTD)
                ahead_BTD = full_BTD
                if following in patches:
                    with readers_replaced(model, arch, {index: patches[following]}):
                        ahead_BTD = walk.through(index, entering_BTD)
    for hidden_BTD in streams:
        states_PD = states_for_head(model, arch, batch, hidden_BTD)
        yield token_divergences(dense_PV, nn.Identity(), states_PD, head)


@torch.inference_mode()
def states_for_head(model: nn.Module, arch: Arch, batch: Batch, hidden_BTD: Tensor) -> Float[Tensor, "P D"]:
    """Return what the head reads of a stream that has left the layers: the backbone runs with them bypassed."""
    with forwards_replaced(decoder_layers(model, arch), lambda *_, **__: arch.layer_output(hidden_BTD)):
        final_BTD = model.get_submodule(arch.backbone)(batch.ids_BT, use_cache=False).last_hidden_state
    return final_BTD[:, :-1].flatten(0, 1)
