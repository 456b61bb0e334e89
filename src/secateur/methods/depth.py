"""Which whole layers to remove: measure what each layer is worth, then choose greedily.

B blocks of a batch, T tokens of a block, P positions that predict a token (T - 1), D hidden size,
L layers. Held-out batches take no part in the choice.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.errors import NumericsError
from secateur.facts import PerDomain
from secateur.log import Progress, silent, steps
from secateur.methods.compensate import (
    Guard,
    guard,
    held_out_errors,
    least_squares,
    sums_of,
    weight_replaced,
)
from secateur.model.bind import Arch, bind, decoder_layers, head_of, text_config
from secateur.model.group import linear
from secateur.stream.losses import KL_POSITIONS, states_for_head, token_divergences
from secateur.stream.statistics import Gram, decided, keep_highest, sum_over_ranks, totals
from secateur.stream.walk import LAYERS_AT_ONCE, Batch, Walk, at_hand

# By layer, the weight of its FFN's reader.
Readers = dict[int, Tensor]
# By layer, KL to the dense model in nats per token.
LayerKL = dict[int, float]
# Keys of transformers' mixtures: the layers with an FFN, those with experts; how many come before
# experts.
LAYER_NUMBERS, FIRST_LAYERS = ("mlp_only_layers", "moe_layers"), ("first_k_dense_replace",)


def remove_layers(model: nn.Module, arch: Arch, layers: Collection[int]) -> Arch:
    """Remove whole layers in place and return the architecture bound anew; the old one is stale.

    The remaining layers are renumbered in the modules (a KV cache uses `layer_idx`) and in the
    config: the number of layers, every list with one entry per layer, as `layer_types`, and which
    layers have experts. One layer at least stays, and all have the same widths: `pruning.resolve`.
    """
    config: Any = text_config(model)
    kept = [index for index in range(arch.num_layers) if index not in layers]
    modules: list[Any] = [decoder_layers(model, arch)[index] for index in kept]
    for number, layer in enumerate(modules):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    parent, _, name = arch.layers.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(modules))

    # Give the config the layers that stay.
    new, known = {index: number for number, index in enumerate(kept)}, config.to_dict()
    # Experts in each `step`-th layer, dense ones between.
    if (step := known.get("decoder_sparse_step", 1)) > 1:
        between = {index for index in range(arch.num_layers) if (index + 1) % step}
        known["mlp_only_layers"] = sorted(between.union(known["mlp_only_layers"]))
        config.decoder_sparse_step = 1
    for key, value in known.items():
        if key in LAYER_NUMBERS and value is not None:
            setattr(config, key, [new[index] for index in value if index in new])
        elif key in FIRST_LAYERS and value is not None:
            setattr(config, key, sum(index < value for index in kept))
        elif "layer" in key and isinstance(value, list) and len(value) == arch.num_layers:
            setattr(config, key, [value[index] for index in kept])
    config.num_hidden_layers = len(kept)
    return bind(model)


@torch.no_grad()
def fold_patch(
    model: nn.Module, arch: Arch, layer: int, batches: list[Batch], damping: float
) -> Guard:
    """Fit the layer before `layer` to what `layer` adds. Call it before `remove_layers`.

    With x the input of the previous layer's FFN reader, W its weight and d what `layer` adds to the
    hidden state, the new weight is argmin |x W' + d - x V'|^2 + ridge |V - W|^2 over V:
    `least_squares` with every column and d as the drift, summed and solved in float64. No new
    module or bias. The guard's errors are shares of |d|^2 on held-out batches, by domain: 1 means
    that nothing is recovered. Without held-out batches the whole step is taken. There is a layer
    before `layer`, and the family adds what an MLP gives as it is. Raises NumericsError as
    `least_squares`.
    """
    # Sum what the reader sees, and what `layer` adds.
    layers = decoder_layers(model, arch)
    reader = _reader(arch, layers, layer - 1)
    with at_hand(layers[layer - 1]):
        gram = Gram(reader.in_features, reader.weight.device)
        cross_FD = gram.blocks[0].new_zeros(reader.in_features, reader.out_features)
    held_out: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for batch in batches:
        walk = Walk(model, arch, [batch])
        for index in range(layer - 1):
            walk.advance(index)
        x_TF, between_BTD = _reader_inputs(walk, layer - 1, walk.hidden_BTD[0])
        x_TF = batch.counted(x_TF)
        added_TD = batch.counted(walk.through(layer, between_BTD).float() - between_BTD.float())
        if batch.held_out:
            held_out.setdefault(batch.domain, []).append((x_TF, added_TD))
        else:
            gram.add_product(x_TF)
            cross_FD += x_TF.float().T @ added_TD

    # Fit the reader, as far as held-out text likes it.
    sum_over_ranks(gram, cross_FD)
    with at_hand(layers[layer - 1]):
        every_F = torch.arange(reader.in_features, device=reader.weight.device)
        new_DF = decided(
            partial(least_squares, reader.weight.float(), gram, every_F, damping, cross_FD, 1.0)
        )
        # The guard judges the weights as stored, rounding included.
        change_DF = new_DF.to(reader.weight.dtype) - reader.weight.float()
        given = {
            domain: [(added_TD, added_TD, x_TF.float() @ change_DF.T) for x_TF, added_TD in pieces]
            for domain, pieces in held_out.items()
        }
        judged = guard(held_out_errors(sums_of(given)))
        reader.weight += judged.step * change_DF
    return judged


@torch.no_grad()
def narrow_readers(
    model: nn.Module,
    arch: Arch,
    batches: list[Batch],
    shares: Sequence[Mapping[int, float]],
    damping: float | None,
    progress: Progress = silent,
) -> list[Readers]:
    """Return narrow models: by layer, the FFN reader's weight with some columns zero.

    `shares`: for each of these models, by layer, the share of columns that stays, those of the
    highest `wanda` score. They are refitted by least squares with this damping, all on the stream
    of the first narrow model, so that further ones cost little; None: not refitted. The model is
    not changed. Held-out batches take no part.
    """
    walk = Walk(model, arch, [batch for batch in batches if not batch.held_out])
    readers_by_cut: list[Readers] = [{} for _ in shares]
    for index in steps(progress, "fit narrow layers", range(arch.num_layers)):
        if any(index in share for share in shares):
            with walk.layer(index):
                reader = _reader(arch, walk.layers, index)
                gram = Gram(reader.in_features, reader.weight.device)
                for batch, hidden_BTD in zip(walk.batches, walk.hidden_BTD, strict=True):
                    gram.add_product(batch.counted(_reader_inputs(walk, index, hidden_BTD)[0]))
                sum_over_ranks(gram)
                for readers, of_cut in zip(readers_by_cut, shares, strict=True):
                    if index in of_cut:
                        readers[index] = decided(
                            partial(_narrow, reader.weight, gram, of_cut[index], damping)
                        )
        _advance(walk, index, readers_by_cut[0])
    return readers_by_cut


def narrow_kl(
    model: nn.Module,
    arch: Arch,
    batches: list[Batch],
    readers: Sequence[Readers],
    shares: PerDomain,
    progress: Progress = silent,
) -> list[float]:
    """Return KL(dense || model with FFN readers), in nats per token, for each set of readers.

    It is the mean of the domains by their shares. Raises NumericsError if it is not finite.
    """
    head, nothing = head_of(model, arch), torch.zeros(len(readers) + 1, dtype=torch.float64)
    by_domain = dict[str, Tensor]()
    for batch in steps(progress, "judge narrow layers", batches):
        walks = [Walk(model, arch, [batch]) for _ in range(1 + len(readers))]
        for index in range(arch.num_layers):
            for walk, of_cut in zip(walks, ({}, *readers), strict=True):
                _advance(walk, index, of_cut)
        states, *others = [
            states_for_head(model, arch, batch, walk.hidden_BTD[0]) for walk in walks
        ]
        kls = [
            float(token_divergences(states, head, other, head).double().sum()) for other in others
        ]
        sums_R1 = torch.tensor([*kls, len(states)], dtype=torch.float64)
        by_domain[batch.domain] = by_domain.get(batch.domain, nothing) + sums_R1
    counted = {name: sums_R1 for name, sums_R1 in totals(by_domain).items() if sums_R1[-1] > 0}
    total = sum(shares[name] for name in counted)
    kl_R = sum(
        (shares[name] / total * sums_R1[:-1] / sums_R1[-1] for name, sums_R1 in counted.items()),
        nothing[:-1],
    )
    if not bool(kl_R.isfinite().all()):
        raise NumericsError(
            "KL with narrow FFNs: it is not finite; use the model in bfloat16 or float32."
        )
    return kl_R.tolist()


def _narrow(
    weight_DF: Tensor, gram: Gram, share: float, damping: float | None
) -> Float[Tensor, "D F"]:
    scores_F = weight_DF.float().abs().sum(dim=0) * gram.diagonal().sqrt()
    keep = keep_highest(scores_F, max(1, round(share * len(scores_F))))
    kept_DS = weight_DF[:, keep]
    if damping is not None:
        kept_DS = least_squares(weight_DF.float(), gram, keep, damping).to(weight_DF.dtype)
    narrow_DF = torch.zeros_like(weight_DF)
    narrow_DF[:, keep] = kept_DS
    return narrow_DF


def _reader(arch: Arch, layers: list[nn.Module], index: int) -> nn.Linear:
    (group,) = (group for group in arch.select(("ffn",)) if group.layer == index)
    return linear(layers[index], group.reader.module)


def _advance(walk: Walk, index: int, readers: Readers) -> None:
    """Move the stream through a layer, with the weight of its FFN reader in `readers` if it has one
    there.
    """
    reader = _reader(walk.arch, walk.layers, index) if index in readers else None
    with nullcontext() if reader is None else weight_replaced(reader, readers[index]):
        walk.advance(index)


def _reader_inputs(walk: Walk, index: int, hidden_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """Return the FFN reader's inputs (tokens x F) and the layer's output for `hidden_BTD`."""
    seen, reader = list[Tensor](), _reader(walk.arch, walk.layers, index)
    with reader.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0])):
        leaving_BTD = walk.through(index, hidden_BTD)
    return seen[0].flatten(0, -2), leaving_BTD


def layer_kl(
    model: nn.Module,
    arch: Arch,
    batches: list[Batch],
    removed: Collection[int],
    candidates: list[int],
    readers: Readers,
) -> LayerKL:
    """Return KL(dense || model without `removed` and layer i) for each candidate i, in nats per
    token.

    Mean over all calibration tokens and the whole vocabulary. `readers`: the pruned model's FFN
    readers that differ. One walk per batch carries a stream per layer i, which branches off there:
    L^2 / 2 runs of a layer and 2 L of the head for all. Raises NumericsError, naming layer and
    domain, if a divergence is not finite.
    """
    candidates = sorted(candidates)
    sums_C = torch.zeros(len(candidates), dtype=torch.float64)
    num_tokens = 0
    for batch in (batch for batch in batches if not batch.held_out):
        divergences = [*_divergences(model, arch, batch, removed, candidates, readers)]
        num_tokens += len(divergences[0])
        for place, (index, divergence_P) in enumerate(zip(candidates, divergences, strict=True)):
            if not torch.isfinite(divergence_P).all():
                raise NumericsError(
                    f"KL without layer {index}, domain {batch.domain}: a divergence is not finite; "
                    "use the model in bfloat16 or float32 and check its weights."
                )
            sums_C[place] += divergence_P.cpu().double().sum()
    total = totals({"kl": sums_C, "tokens": num_tokens})
    return dict(zip(candidates, (total["kl"] / total["tokens"]).tolist(), strict=True))


def choose_layers(
    kl_without: Callable[[Collection[int], list[int]], LayerKL],
    layers: Collection[int],
    num_remove: int,
    progress: Progress,
) -> LayerKL:
    """Return those of `layers` to remove, in order, and the KL then: each time the cheapest one
    now.

    `kl_without`: `layer_kl`, by the layers that are gone and the candidates; the value is that
    without this layer and those before it. The first n are the choice for n layers. Only the layers
    that added least when last measured are measured again, until the next one would cost more than
    the best even if it added as little as then. That is exact if what a layer adds never shrinks;
    else another of about that cost may win. Source: Minoux 1978, accelerated greedy.
    """
    chosen: LayerKL = {}
    # By layer, what its removal adds to the KL of those removed before.
    added: LayerKL = dict.fromkeys(layers, -torch.inf)
    before = 0.0
    for _ in steps(progress, "choose layers", range(num_remove)):
        anew: LayerKL = {}
        while True:
            waiting = sorted(added.keys() - anew.keys(), key=lambda index: (added[index], index))
            if not waiting or (anew and min(anew.values()) < before + added[waiting[0]]):
                break
            candidates = waiting[:LAYERS_AT_ONCE] if chosen else waiting
            anew |= kl_without(chosen, candidates)
        added |= {index: cost - before for index, cost in anew.items()}
        cheapest = min(anew, key=lambda index: (anew[index], index))
        chosen[cheapest] = before = anew[cheapest]
        del added[cheapest]
    return chosen


def _divergences(
    model: nn.Module,
    arch: Arch,
    batch: Batch,
    removed: Collection[int],
    candidates: list[int],
    readers: Readers,
) -> Iterator[Float[Tensor, " P"]]:
    """Yield, per candidate, the divergence by position without it and `removed`."""
    dense, pruned = Walk(model, arch, [batch]), Walk(model, arch, [batch])
    for index in range(arch.num_layers):
        dense.advance(index)
        if index in removed:
            continue
        # The last stream has skipped no candidate; a layer's input is the stream without it.
        streams, is_last = pruned.hidden_BTD, index == candidates[-1]
        skipping = streams[-1]
        if is_last:
            streams.pop()
        _advance(pruned, index, readers)
        if index in candidates:
            streams.insert(len(streams) if is_last else len(streams) - 1, skipping)
    head = head_of(model, arch)
    with torch.inference_mode():
        states_PD = states_for_head(model, arch, batch, dense.hidden_BTD[0])
        # The model's own dtype holds the logits exactly.
        dense_PV = torch.cat([head(piece_PD) for piece_PD in states_PD.split(KL_POSITIONS)])
    for hidden_BTD in pruned.hidden_BTD:
        states_PD = states_for_head(model, arch, batch, hidden_BTD)
        yield token_divergences(dense_PV, nn.Identity(), states_PD, head)
