"""Depth: whole decoder layers as units. What each is worth, which to remove, and the removal itself.

In: a model and calibration batches. Out: KL(dense || model without a layer) for every layer; the layers to remove,
chosen one at a time; the same model with fewer layers, an ordinary one of its family. A removed layer's linear part can
be folded into the layer before it. Held-out batches judge that patch and take no part in the rest.

Letters: B blocks of a batch, T tokens (of a block), P positions that predict a token (T - 1), D hidden size, L layers,
F reader inputs.
"""

from collections.abc import Collection, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.arch import Arch, bind, decoder_layers, head_of, linear
from secateur.arch_numbers import text_config
from secateur.compensate import Guard, guard, held_out_errors, held_out_sums
from secateur.errors import ArchError, NumericsError, RecipeError
from secateur.gram import Gram
from secateur.kl import KL_POSITIONS, token_divergences
from secateur.progress import Progress, silent
from secateur.ranks import from_first, sum_by_name, sum_tensors
from secateur.score import damped_gram
from secateur.walk import Batch, Walk, forwards_replaced


def layer_kl(model: nn.Module, arch: Arch, batches: list[Batch], removed: Collection[int] = ()) -> Float[Tensor, " L"]:
    """Return KL(dense || model without `removed` and without layer i) per layer i, in nats per token.

    Mean over all calibration tokens, over the whole vocabulary; infinite for the layers in `removed`. One walk per
    batch carries all L streams at once, stream i branching off at layer i: L^2 / 2 runs of a layer and 2 L of the head.
    Raises NumericsError naming layer and domain if a divergence is not finite.
    """
    kept = [index for index in range(arch.num_layers) if index not in removed]
    sums_L = torch.zeros(arch.num_layers, dtype=torch.float64)
    num_tokens = 0
    for batch in (batch for batch in batches if not batch.held_out):
        num_tokens += batch.ids_BT[:, 1:].numel()
        for index, divergence_P in zip(kept, _divergences(model, arch, batch, kept), strict=True):
            if not torch.isfinite(divergence_P).all():
                raise NumericsError(
                    f"KL without layer {index}, domain {batch.domain}: a divergence is not finite; use the model in "
                    f"bfloat16 or float32 and check its weights."
                )
            sums_L[index] += divergence_P.double().sum().cpu()
    total = sum_by_name({"kl": sums_L, "tokens": num_tokens})
    sums_L = total["kl"]
    sums_L[list(removed)] = torch.inf
    return sums_L / total["tokens"]


def choose_layers(
    model: nn.Module,
    arch: Arch,
    batches: list[Batch],
    num_remove: int,
    *,
    protected: Collection[int] = (),
    progress: Progress = silent,
) -> dict[int, float]:
    """Return the layers to remove, in the order chosen: each time the one whose removal now costs the least KL.

    By layer KL(dense || model without it and those before it), as `layer_kl` measures it anew each time. Every
    beginning of the order is the choice for that many layers.
    Raises RecipeError if so many layers cannot go.
    """
    allowed = min(len(set(range(arch.num_layers)) - set(protected)), arch.num_layers - 1)
    if not 0 <= num_remove <= allowed:
        raise RecipeError(
            f"depth: {num_remove} of {arch.num_layers} layers cannot be removed; with {len(set(protected))} protected, "
            f"ask for 0 to {allowed}."
        )
    chosen: dict[int, float] = {}
    for done in range(num_remove):
        progress("choose layers", done, num_remove)
        costs = layer_kl(model, arch, batches, chosen).tolist()
        candidates = set(range(arch.num_layers)) - {*protected, *chosen}
        cheapest = min(candidates, key=lambda index: (costs[index], index))
        chosen[cheapest] = costs[cheapest]
    progress("choose layers", num_remove, num_remove)
    return chosen


def remove_layers(model: nn.Module, arch: Arch, layers: Collection[int]) -> Arch:
    """Remove whole layers in place and return the architecture bound anew; the old one is stale.

    What is left is numbered without gaps, in the modules (a KV cache goes by their `layer_idx`) and in the config: its
    number of layers and every list that has one entry per layer, as `layer_types`.

    Raises RecipeError if a layer is not there or none would stay, ArchError if the config is one of per-layer widths.
    """
    config: Any = text_config(model)
    missing = sorted(set(layers) - set(range(arch.num_layers)))
    if missing or len(set(layers)) == arch.num_layers:
        raise RecipeError(
            f"depth: cannot remove layers {sorted(set(layers))}; the model has layers 0 to {arch.num_layers - 1}, and "
            f"one must stay."
        )
    if getattr(config, "is_heterogeneous", False):
        raise ArchError("depth: the config has per_layer_config; remove layers before widths differ per layer.")
    kept = [index for index in range(arch.num_layers) if index not in layers]
    modules: list[Any] = [decoder_layers(model, arch)[index] for index in kept]
    for number, layer in enumerate(modules):
        for module in layer.modules():
            if hasattr(module, "layer_idx"):
                module.layer_idx = number
    parent, _, name = arch.layers.rpartition(".")
    setattr(model.get_submodule(parent), name, nn.ModuleList(modules))
    config.num_hidden_layers = len(kept)
    for key, values in config.to_dict().items():
        if "layer" in key and isinstance(values, list) and len(values) == arch.num_layers:
            setattr(config, key, [values[index] for index in kept])
    return bind(model)


@torch.no_grad()
def fold_patch(model: nn.Module, arch: Arch, layer: int, batches: list[Batch], damping: float) -> Guard:
    """Let the layer before `layer` give what is linear in what `layer` adds. Call it before `remove_layers`.

    With x the input of the previous layer's FFN reader, W its weight and d what `layer` adds to the hidden state, the
    new weight is argmin |x W' + d - x V'|^2 + ridge |V - W|^2 over V, that is W' + (G + ridge I)^-1 x'd with G = x'x
    and ridge = damping * mean(diag G). Sums in float32, solved in float64; no new module, no new bias. The guard's
    errors are shares of |d|^2 on held-out batches, by domain: 1 means that nothing of the layer is given back. Without
    held-out batches the whole step is taken.

    Raises RecipeError for the first layer, which has none before it, ArchError where the family norms what its reader
    gives, NumericsError if the system is indefinite.
    """
    if not 0 < layer < arch.num_layers:
        raise RecipeError(
            f"depth: layer {layer} cannot be folded into the one before it; use 1 to {arch.num_layers - 1}."
        )
    (group,) = (group for group in arch.select(("ffn",)) if group.layer == layer - 1)
    reader = linear(decoder_layers(model, arch)[layer - 1], group.reader.module)
    from_first(lambda: _check_added_as_it_is(Walk(model, arch, batches[:1]), layer - 1, reader))
    gram = Gram(reader.in_features, reader.weight.device)
    cross_FD = reader.weight.new_zeros(reader.in_features, reader.out_features, dtype=torch.float32)
    held_out: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for batch in batches:
        x_TF, added_TD = _input_and_gain(model, arch, reader, layer, batch)
        if batch.held_out:
            held_out.setdefault(batch.domain, []).append((x_TF, added_TD))
        else:
            gram.add_product(x_TF)
            cross_FD += x_TF.float().T @ added_TD
    sum_tensors([*gram.blocks, cross_FD])
    change_FD = from_first(lambda: _solve(damped_gram(gram, damping), cross_FD, layer))
    # The guard judges what will be stored, rounding included.
    change_DF = (reader.weight + change_FD.T).to(reader.weight.dtype) - reader.weight.float()
    judged = _judge(held_out, change_DF)
    reader.weight += judged.step * change_DF
    return judged


def _divergences(model: nn.Module, arch: Arch, batch: Batch, kept: list[int]) -> Iterator[Float[Tensor, " P"]]:
    """Yield, for each kept layer, the divergence at every position of the kept layers without it from all layers."""
    dense, pruned = Walk(model, arch, [batch]), Walk(model, arch, [batch])
    for index in range(arch.num_layers):
        dense.advance(index)
        if index in kept:
            # The last stream is the one that has skipped nothing of `kept`; what enters the layer is what skips it.
            skipping_BTD = pruned.hidden_BTD[-1]
            pruned.advance(index)
            pruned.hidden_BTD.insert(-1, skipping_BTD)
    head = head_of(model, arch)
    with torch.inference_mode():
        states_PD = states_for_head(model, arch, batch, dense.hidden_BTD[0])
        # In the model's own dtype, which holds them exactly; once for all streams.
        dense_PV = torch.cat([head(piece_PD) for piece_PD in states_PD.split(KL_POSITIONS)])
    for hidden_BTD in pruned.hidden_BTD[:-1]:
        states_PD = states_for_head(model, arch, batch, hidden_BTD)
        yield token_divergences(dense_PV, nn.Identity(), states_PD, head)


@torch.inference_mode()
def states_for_head(model: nn.Module, arch: Arch, batch: Batch, hidden_BTD: Tensor) -> Float[Tensor, "P D"]:
    """Return what the head reads of a stream that has left the layers: the backbone runs with them bypassed."""
    with forwards_replaced(decoder_layers(model, arch), lambda *_, **__: arch.layer_output(hidden_BTD)):
        final_BTD = model.get_submodule(arch.backbone)(batch.ids_BT, use_cache=False).last_hidden_state
    return final_BTD[:, :-1].flatten(0, 1)


def _check_added_as_it_is(walk: Walk, index: int, reader: nn.Linear) -> None:
    """Raise ArchError if a norm stands between the reader's output and the hidden state that it is added to."""
    walk.hidden_BTD = [torch.zeros_like(hidden_BTD) for hidden_BTD in walk.hidden_BTD]

    def with_reader_giving(value: float) -> Tensor:
        def give(_: nn.Module, __: tuple[Tensor, ...], output: Tensor) -> Tensor:
            return torch.full_like(output, value)

        handle = reader.register_forward_hook(give)
        try:
            ((_, output_BTD),) = walk.run(index)
        finally:
            handle.remove()
        return output_BTD

    added_BTD = with_reader_giving(2.0) - with_reader_giving(0.0)
    if not torch.allclose(added_BTD, torch.full_like(added_BTD, 2.0), rtol=0.02):
        raise ArchError("depth: this family norms what an FFN gives, so a layer cannot be folded; remove it without.")


def _input_and_gain(
    model: nn.Module, arch: Arch, reader: nn.Linear, layer: int, batch: Batch
) -> tuple[Float[Tensor, "T F"], Float[Tensor, "T D"]]:
    """Return the previous layer's reader inputs, and what `layer` adds to the hidden state, in float32."""
    walk = Walk(model, arch, [batch])
    for index in range(layer - 1):
        walk.advance(index)
    seen: list[Tensor] = []
    handle = reader.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    try:
        walk.advance(layer - 1)
    finally:
        handle.remove()
    before_BTD = walk.hidden_BTD[0]
    walk.advance(layer)
    return seen[0].flatten(0, 1), (walk.hidden_BTD[0].float() - before_BTD.float()).flatten(0, 1)


def _solve(hessian_FF: Float[Tensor, "F F"], cross_FD: Float[Tensor, "F D"], layer: int) -> Float[Tensor, "F D"]:
    factor, failed = torch.linalg.cholesky_ex(hessian_FF)
    if failed:
        raise NumericsError(f"fold of layer {layer}: least squares has no solution; raise damping or use more tokens.")
    return torch.cholesky_solve(cross_FD.to(factor), factor).float()


def _judge(held_out: dict[str, list[tuple[Tensor, Tensor]]], change_DF: Float[Tensor, "D F"]) -> Guard:
    sums = {}
    for domain, parts in held_out.items():
        added_TD = torch.cat([added_TD for _, added_TD in parts])
        given_TD = torch.cat([x_TF.float() @ change_DF.T for x_TF, _ in parts])
        sums[domain] = held_out_sums(added_TD, given_TD, float(added_TD.square().sum()))
    return guard(held_out_errors(sums))
