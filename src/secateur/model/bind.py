"""A model's architecture: its decoder layers, head and groups, as `structure` finds them."""

from dataclasses import dataclass
from itertools import combinations
from typing import Any

from torch import Tensor, nn

from secateur.errors import ArchError, advice
from secateur.model.group import Group
from secateur.model.guesses import EXPERT_CHANNELS, EXPERTS
from secateur.model.modules import Logits, ScaledHead, head_at, linears_for_conv
from secateur.model.structure import layer_output, of_layer, structure_of, text_config

__all__ = ["EXPERTS", "EXPERT_CHANNELS", "Arch", "bind", "decoder_layers", "head_of", "head_width", "text_config"]


def head_width(config: Any) -> int:
    """Return head_dim; it follows from hidden_size if the config does not state it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


@dataclass(frozen=True, slots=True)
class Arch:
    """A model's architecture. `groups` lists every layer's groups, layer by layer.

    `family`: the model type. `attention`, `middle`: within a layer, and None if layers differ.
    `mlp_adds_directly`: what MLPs give is added to the stream as it is. `params_per_layer`: all
    parameters of each layer. `omits`: what cannot be cut, and why. `num_outputs`: of a layer; 0 if it
    gives hidden states alone.
    """

    family: str
    backbone: str
    layers: str
    head: str
    attention: str | None
    middle: str | None
    mlp_adds_directly: bool
    groups: tuple[Group, ...]
    num_layers: int
    params_per_layer: tuple[int, ...]
    logits: Logits | None
    omits: dict[str, str]
    num_outputs: int

    def layer_output(self, hidden: Tensor) -> Any:
        """Return hidden states in the form in which the backbone expects a layer's output."""
        return layer_output(hidden, self.num_outputs)

    def select(self, names: tuple[str, ...]) -> tuple[Group, ...]:
        """Return the groups of these names. Raises ArchError if the model has no such group."""
        known = {group.name for group in self.groups}
        for name in names:
            if name in self.omits and name not in known:
                raise ArchError(f"remove.groups: a model of type {self.family} cannot lose {name}: {self.omits[name]}.")
            if name not in known:
                raise ArchError(
                    f"remove.groups: a model of type {self.family} has no group '{name}'; it has "
                    f"{', '.join(sorted(known)) or 'none'}; {advice(name, known)}"
                )
        chosen = tuple(group for group in self.groups if group.name in names)
        for name, other in combinations(names, 2):
            first, second = (next(group for group in chosen if group.name == n) for n in (name, other))
            if first.parts.module == second.parts.module:
                raise ArchError(f"remove.groups: {name} and {other} cut the same {first.parts.module}; choose one.")
        return chosen


def bind(model: Any) -> Arch:
    """Return the model's architecture, with real sizes. Works on the meta device.

    GPT-2's linears become `TransposedLinear`, which saves the same. Raises ArchError if the model
    cannot be run layer by layer.
    """
    structure = structure_of(model)
    linears_for_conv(model.get_submodule(structure.layers))
    layers, config = list(model.get_submodule(structure.layers).children()), text_config(model)
    offers = [structure.offers[index] for index in structure.twin_layer]
    return Arch(
        family=model.config.model_type,
        backbone=structure.backbone,
        layers=structure.layers,
        head=structure.head,
        attention=structure.attention,
        middle=structure.middle,
        mlp_adds_directly=all(each.adds_directly for layer in offers for each in layer),
        groups=tuple(
            each.group(layer, index, of_layer(config, index))
            for index, layer in enumerate(layers)
            for each in offers[index]
        ),
        num_layers=len(layers),
        params_per_layer=tuple(sum(p.numel() for p in layer.parameters()) for layer in layers),
        logits=structure.logits,
        omits=structure.omits,
        num_outputs=structure.num_outputs,
    )


def head_of(model: nn.Module, arch: Arch) -> nn.Module:
    """Return what maps the last hidden state to logits: the head and the model's scaling."""
    head = head_at(model, arch.head)
    return head if arch.logits is None else ScaledHead(head, arch.logits)


def decoder_layers(model: nn.Module, arch: Arch) -> list[nn.Module]:
    """Return the model's decoder layers in order."""
    return list(model.get_submodule(arch.layers).children())
