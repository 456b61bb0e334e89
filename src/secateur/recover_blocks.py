"""Block-wise recovery: every pruned layer trained to give what the dense layers in its place give, one at a time.

In: the pruned model, the dense one, token blocks, which dense layers each pruned layer stands for. Out: the pruned
model, its layers trained where held-out text says that it helped. Only one layer at a time has float32 weights,
gradients and optimizer states; of the rest only hidden states are there, and weights that are not mapped from files.

B: blocks of a batch, T: tokens of a block, D: hidden size.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.arch import Arch, decoder_layers
from secateur.errors import NumericsError
from secateur.memory import peak_bytes, release_freed
from secateur.progress import Progress, silent
from secateur.recover_recipe import BlockSettings
from secateur.recover_store import LayerStore
from secateur.walk import Batch, Walk

Errors = dict[str, float]


@dataclass(frozen=True, slots=True)
class Pair:
    """The pruned model and the dense one. `layers`: the dense model's layers that the pruned model still has."""

    pruned: nn.Module
    pruned_arch: Arch
    dense: nn.Module
    dense_arch: Arch
    layers: tuple[int, ...]

    def span(self, index: int) -> range:
        """Return the dense layers that pruned layer `index` stands for: itself and removed ones that followed it.

        Removed layers before the first one that stayed are the first one's too.
        """
        start = self.layers[index] if index else 0
        is_last = index + 1 == len(self.layers)
        return range(start, self.dense_arch.num_layers if is_last else self.layers[index + 1])


def recover_blocks(
    pair: Pair,
    batches: Sequence[Batch],
    weights: dict[str, float],
    settings: BlockSettings,
    store: LayerStore,
    log: Callable[[dict[str, Any]], None] = lambda line: None,
    progress: Progress = silent,
) -> int:
    """Train the pruned model's layers in place, first to last, and return how many changed.

    Each is trained on the pruned stream, so it sees what the layers before it now give. Its target is
    m * dense(dense stream) + (1 - m) * dense(pruned stream), where dense() are the layers in its place and m is
    `settings.dense_stream`; its loss the mean over tokens of w_d * |y - target|^2 / |target|^2, `weights` by domain.
    A layer keeps its old weights where the mean over domains of that error on held-out text did not fall. A layer
    that already gives its target is left alone, so an uncut model does not change at all.

    Finished layers are in `store` and are not trained again. Raises NumericsError naming the layer.
    """
    stage, num_layers = "recover, blocks", pair.pruned_arch.num_layers
    pruned, dense = (
        Walk(model, arch, list(batches))
        for model, arch in ((pair.pruned, pair.pruned_arch), (pair.dense, pair.dense_arch))
    )
    num_changed = 0
    progress(stage, 0, num_layers)
    for index, layer in enumerate(decoder_layers(pair.pruned, pair.pruned_arch)):
        start = time.perf_counter()
        targets = _targets(pruned, dense, pair.span(index), settings.dense_stream)
        line = store.load(index, layer)
        if line is None:
            line = _recover_layer(pruned, index, layer, targets, weights, settings)
            line |= {"seconds": round(time.perf_counter() - start, 3), "peak_bytes": peak_bytes()}
            store.save(index, layer, line)
            store.load(index, layer)  # mapped from there, so that finished layers fill no memory
        log({"event": "recover_block", "layer": index, **line})
        num_changed += bool(line["held"])
        pruned.advance(index)
        release_freed()
        progress(stage, index + 1, num_layers)
    return num_changed


def _targets(pruned: Walk, dense: Walk, span: range, dense_stream: float) -> list[Tensor]:
    """Return what the layer is to give, per batch, and move the dense stream through `span` where it is asked."""
    own, standing = list(pruned.hidden_BTD), dense.hidden_BTD
    if dense_stream < 1:
        dense.hidden_BTD = own
        for index in span:
            dense.advance(index)
        own, dense.hidden_BTD = dense.hidden_BTD, standing
        if dense_stream == 0:
            return own
    for index in span:
        dense.advance(index)
    if dense_stream == 1:
        return list(dense.hidden_BTD)
    pairs = zip(dense.hidden_BTD, own, strict=True)
    return [
        torch.lerp(own_BTD.float(), dense_BTD.float(), dense_stream).to(own_BTD.dtype) for dense_BTD, own_BTD in pairs
    ]


def _recover_layer(
    walk: Walk,
    index: int,
    layer: nn.Module,
    targets: list[Tensor],
    weights: dict[str, float],
    settings: BlockSettings,
) -> dict[str, Any]:
    before = _errors(walk, index, targets)
    old = {name: parameter.data for name, parameter in layer.named_parameters()}
    if not any(before.values()) or not old:
        return {"error_before": before, "error_after": before, "held": False, "loss": []}
    dtype = next(iter(old.values())).dtype
    for parameter in layer.parameters():
        parameter.data = parameter.data.to(torch.float32, copy=True)  # or steps would change `old` too
        parameter.requires_grad_(True)
    losses = _train(walk, index, layer, targets, weights, settings, dtype)
    for name, parameter in layer.named_parameters():
        parameter.grad = None
        parameter.requires_grad_(False)
        parameter.data = parameter.data.to(old[name].dtype)
    after = _errors(walk, index, targets)
    held = _mean(after) < _mean(before)
    if not held:
        for name, parameter in layer.named_parameters():
            parameter.data = old[name]
    return {"error_before": before, "error_after": after, "held": held, "loss": losses}


def _train(
    walk: Walk,
    index: int,
    layer: nn.Module,
    targets: list[Tensor],
    weights: dict[str, float],
    settings: BlockSettings,
    dtype: torch.dtype,
) -> list[float]:
    """Return the losses, one per step: Adam, cosine schedule after a tenth of warming up, gradients clipped to 1."""
    used = [(batch, place) for place, batch in enumerate(walk.batches) if not batch.held_out]
    num_steps = len(used) * settings.epochs
    optimizer = torch.optim.AdamW(layer.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cosine(step, num_steps))
    losses = []
    for batch, place in used * settings.epochs:
        # Copies, since tensors made in inference mode cannot take part in a gradient.
        hidden_BTD, target_BTD = walk.hidden_BTD[place].clone(), targets[place].clone()
        args, kwargs = _cloned(walk.arguments(index, hidden_BTD))
        with torch.autocast(hidden_BTD.device.type, dtype, enabled=dtype == torch.bfloat16):
            output = layer(hidden_BTD, *args, **kwargs)
        loss = weights[batch.domain] * relative_error(_hidden(output), target_BTD)
        loss.backward()
        nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    if not all(map(math.isfinite, losses)):
        raise NumericsError(f"recover, layer {index}: the loss is not finite; lower recover.blocks.learning_rate.")
    return losses


def cosine(step: int, num_steps: int) -> float:
    """Return the share of the learning rate: up in a tenth of the steps, then half a cosine down to nothing."""
    num_warm = max(1, num_steps // 10)
    if step < num_warm:
        return (step + 1) / (num_warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - num_warm) / max(1, num_steps - num_warm)))


def relative_error(output_BTD: Float[Tensor, "B T D"], target_BTD: Float[Tensor, "B T D"]) -> Float[Tensor, ""]:
    """Return the mean over tokens of |output - target|^2 / |target|^2, in float32.

    By token, since what reads the stream norms every token: a few of huge norm would otherwise be all that counts.
    """
    target_BTD = target_BTD.float()
    errors_BT = (output_BTD.float() - target_BTD).square().sum(-1)
    return (errors_BT / target_BTD.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)).mean()


def _errors(walk: Walk, index: int, targets: list[Tensor]) -> Errors:
    """Return each domain's error on held-out text with the weights as they would be stored."""
    sums: Errors = {}
    counts: dict[str, int] = {}
    for place, batch in enumerate(walk.batches):
        if batch.held_out:
            output_BTD = walk.through(index, walk.hidden_BTD[place])
            error = float(relative_error(output_BTD, targets[place])) * len(batch.ids_BT)
            sums[batch.domain] = sums.get(batch.domain, 0.0) + error
            counts[batch.domain] = counts.get(batch.domain, 0) + len(batch.ids_BT)
    return {domain: total / counts[domain] for domain, total in sums.items()}


def _mean(errors: Errors) -> float:
    return sum(errors.values()) / len(errors)


def _hidden(output: Any) -> Tensor:
    return output[0] if isinstance(output, tuple) else output


def _cloned(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: _cloned(each) for key, each in value.items()}
    return tuple(map(_cloned, value)) if isinstance(value, tuple) else value
