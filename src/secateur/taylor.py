"""Taylor scores: how much the loss would change, to first order, if a unit's weights were zero. Higher score = keep.

In: a model, groups and calibration batches. Out: one number per unit of every group. Unlike the other scores it needs
gradients, and those need the whole model: one forward keeps what entered each layer, then the loss's gradient goes
back through the layers one at a time, so that the weight gradients of one layer are all that there is at once. Kept are
num_layers x tokens x hidden_size numbers; a caller short of memory gives fewer tokens. The model stays as it was: no
gradient, hook or flag is left behind.

Letters: B blocks of a batch, T tokens of a block, D hidden size, R rows (or columns) on the units' axis, F units.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from secateur.arch import Arch, Group, Segments, decoder_layers, head_of, linear
from secateur.errors import NumericsError
from secateur.stats import sum_over_ranks, totals
from secateur.walk import Arguments, Batch, at_hand

# Positions per slice of logits: 64 x 150k words x float32, logits and their gradient, is 77 MB.
HEAD_POSITIONS = 64

# What every layer is called with besides the hidden states, by the shape of a batch.
_Calls = dict[tuple[int, ...], list[Arguments]]


@dataclass(slots=True)
class _Pass:
    """One batch: what entered each layer that the gradient has not reached, and the gradient on its way down."""

    inputs_BTD: list[Tensor]
    calls: list[Arguments]
    gradient_BTD: Tensor


def taylor_scores(
    model: nn.Module, arch: Arch, groups: tuple[Group, ...], batches: list[Batch]
) -> dict[tuple[int, str], Tensor]:
    """Return s_j = sum over all weights w of unit j of |w * dL/dw|, per (layer, group name).

    L is the mean next-token cross-entropy over all calibration tokens (held-out batches take no part), so gradients
    are summed over blocks first and only then multiplied and made absolute. A unit's weights are its rows of every
    writer, biases included, and its columns of the reader. Gradients are summed over batches in float32, whatever the
    model's dtype, and divided by the number of tokens last, so that they do not underflow in half precision.

    Raises NumericsError naming the domain if a loss is not finite, or layer and module if a gradient is not.
    Source: Ma et al., LLM-Pruner, arXiv 2305.11627, section 3.2, the element-wise importance without its second-order
    term, summed over the group; as their code's `param_first` does, which has no biases to count.
    """
    layers, calls = decoder_layers(model, arch), _Calls()
    batches = [batch for batch in batches if not batch.held_out]
    num_tokens = totals({"tokens": sum(batch.ids_BT[:, 1:].numel() for batch in batches)})["tokens"]
    scores: dict[tuple[int, str], Tensor] = {}
    with _frozen(model), torch.enable_grad():
        passes = [_forward(model, arch, batch, calls) for batch in batches]
        for index in reversed(range(min(group.layer for group in groups), arch.num_layers)):
            mine = [group for group in groups if group.layer == index]
            with at_hand(layers[index]) as layer:
                gradients = _backward(layer, index, mine, passes)
                for group in mine:
                    scores[index, group.name] = _unit_sums(layer, group, gradients) / num_tokens
    return scores


@contextmanager
def _frozen(model: nn.Module) -> Iterator[None]:
    """Within the context no parameter requires a gradient; afterwards those that did do again."""
    wanted = {parameter: parameter.requires_grad for parameter in model.parameters()}
    model.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in wanted.items():
            parameter.requires_grad_(flag)


def _forward(model: nn.Module, arch: Arch, batch: Batch, calls: _Calls) -> _Pass:
    """Run the backbone; the graph begins where the last layer ends, because nothing before it requires a gradient.

    `calls` is filled once per shape and layer, as in the walk: masks differ per layer in some families.
    """
    entered: list[Tensor] = []
    noted: list[Arguments] = []
    left: list[Tensor] = []

    def note(_: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        entered.append(inputs[0])
        noted.append((inputs[1:], keywords))

    def begin_graph(_: nn.Module, __: tuple[Any, ...], output: Any) -> Any:
        left.append((output[0] if isinstance(output, tuple) else output).detach().requires_grad_())
        return arch.layer_output(left[0])

    layers = decoder_layers(model, arch)
    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    handles.append(layers[-1].register_forward_hook(begin_graph))
    try:
        final_BTD = model.get_submodule(arch.backbone)(batch.ids_BT, use_cache=False).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    (gradient_BTD,) = torch.autograd.grad(final_BTD, left[0], _final_gradient(head_of(model, arch), final_BTD, batch))
    return _Pass(entered, calls.setdefault(tuple(batch.ids_BT.shape), noted), gradient_BTD)


def _final_gradient(head: nn.Module, final_BTD: Float[Tensor, "B T D"], batch: Batch) -> Float[Tensor, "B T D"]:
    """Return the gradient of the summed cross-entropy in what the head reads, slice by slice of positions."""
    gradient_BTD, loss = torch.zeros_like(final_BTD), 0.0
    for final_TD, ids_T, gradient_TD in zip(final_BTD.detach(), batch.ids_BT, gradient_BTD, strict=True):
        slices = (part.split(HEAD_POSITIONS) for part in (final_TD[:-1], ids_T[1:], gradient_TD[:-1]))
        for piece, targets, into in zip(*slices, strict=True):
            piece = piece.detach().requires_grad_()
            nats = nn.functional.cross_entropy(head(piece).float(), targets, reduction="sum")
            into.copy_(*torch.autograd.grad(nats, piece))
            loss += float(nats.detach())
    if not torch.isfinite(torch.tensor(loss)):
        raise NumericsError(
            f"taylor score, domain {batch.domain}: the loss is {loss}; use the model in bfloat16 or float32 and check "
            f"its weights."
        )
    return gradient_BTD


def _backward(layer: nn.Module, index: int, groups: list[Group], passes: list[_Pass]) -> dict[str, Tensor]:
    """Move every pass's gradient down through the layer; return the groups' weight gradients, summed over passes."""
    parameters = _unit_parameters(layer, groups)
    sums = {name: torch.zeros_like(parameter, dtype=torch.float32) for name, parameter in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    for each in passes:
        input_BTD = each.inputs_BTD.pop().detach().requires_grad_()
        args, kwargs = each.calls[index]
        output = layer(input_BTD, *args, **kwargs)
        output = output[0] if isinstance(output, tuple) else output
        below, *found = torch.autograd.grad(output, [input_BTD, *parameters.values()], each.gradient_BTD)
        each.gradient_BTD = below
        for total, gradient in zip(sums.values(), found, strict=True):
            total += gradient
    sum_over_ranks(*sums.values())
    for name, parameter in parameters.items():
        parameter.requires_grad_(False)
        if not torch.isfinite(sums[name]).all():
            raise NumericsError(
                f"layer {index}, {name.rpartition('.')[0]}: the gradient holds NaN or infinite numbers; use the model "
                f"in bfloat16 or float32 and check its weights."
            )
    return sums


def _unit_parameters(layer: nn.Module, groups: list[Group]) -> dict[str, nn.Parameter]:
    """Return what belongs to units: writers whole, and the reader's weight. The reader's bias belongs to none."""
    names = [f"{axis.module}.{kind}" for group in groups for axis in group.writers for kind in ("weight", "bias")]
    names += [f"{group.reader.module}.weight" for group in groups]
    known = dict(layer.named_parameters())
    return {name: known[name] for name in names if name in known}


@torch.no_grad()
def _unit_sums(layer: nn.Module, group: Group, gradients: dict[str, Tensor]) -> Float[Tensor, " F"]:
    """Return sum |w * gradient| over each unit's weights."""
    reader = linear(layer, group.reader.module)
    num_units = reader.in_features // sum(group.reader.segments)
    columns_R = (reader.weight * gradients[f"{group.reader.module}.weight"]).abs().sum(dim=0)
    total_F = _per_unit(columns_R, group.reader.segments, num_units)
    for axis in group.writers:
        writer = linear(layer, axis.module)
        rows_R = (writer.weight * gradients[f"{axis.module}.weight"]).abs().sum(dim=1)
        if writer.bias is not None:
            rows_R += (writer.bias * gradients[f"{axis.module}.bias"]).abs()
        total_F += _per_unit(rows_R, axis.segments, num_units)
    return total_F


def _per_unit(values_R: Float[Tensor, " R"], segments: Segments, num_units: int) -> Float[Tensor, " F"]:
    """Sum the values of the rows that each unit owns, segment by segment; see `cut.rows_of`."""
    parts = values_R.split([width * num_units for width in segments])
    return torch.stack([part.view(num_units, -1).sum(dim=1) for part in parts]).sum(dim=0)
