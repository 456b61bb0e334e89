"""Layers of different widths: derive the config from a pruned model's tensors.

Equal widths give the family's plain config. Different widths give `per_layer_config` in
transformers' form, and a class that saves and loads it.
"""

from statistics import multimode
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from secateur.errors import one_line
from secateur.model.bind import CLOSE, Arch, bind, decoder_layers, text_config
from secateur.model.group import Group, cut, linear
from secateur.model.guesses import some_of
from secateur.model.modeling_per_layer import (
    PerLayerModel,
    is_per_layer,
    per_layer_class,
    per_layer_config_class,
)
from secateur.model.modules import linears_for_conv, shapes_of
from secateur.model.stock import quiet_transformers
from secateur.model.twin import WRONG_GUESS, run, twins

NUM_QUERIES, NUM_KEYS = "num_attention_heads", "num_key_value_heads"


def widths_of(layer: nn.Module, group: Group) -> dict[str, Any]:
    """Return the widths of the layer's group under the config's names, read from its modules.

    Channels: the reader's inputs. Query heads: the reader's inputs / head_dim. KV heads: half of
    the writers' rows / head_dim that are not for queries. The group of KV heads tells both.
    """
    if not group.head_dim:
        return {
            group.config_key: round(group.num_units_left(layer) / group.per_key),
            **dict(group.settings),
        }
    if group.config_key != NUM_KEYS:
        return {}
    num_heads = linear(layer, group.reader.module).in_features // group.head_dim
    made = sum(linear(layer, axis.module).out_features for axis in group.writers) // group.head_dim
    return {NUM_QUERIES: num_heads, NUM_KEYS: (made - num_heads) // 2, "head_dim": group.head_dim}


def commonest(widths: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the most frequent width of each name. The larger one wins a tie."""
    names = sorted({name for layer in widths for name in layer})
    return {
        name: max(multimode(layer[name] for layer in widths if name in layer)) for name in names
    }


def record_widths(model: PreTrainedModel, arch: Arch) -> None:
    """Derive the config from the layers as they are, and set a class that saves and loads it.

    Layers of one width: the plain config and the stock class. Else `per_layer_config`, the class
    `PerLayer...` and, in each layer, its own config and counts. Parameters are not copied.
    """
    layers = decoder_layers(model, arch)
    config: Any = text_config(model)
    widths: list[dict[str, Any]] = [{} for _ in layers]
    for group in arch.groups:
        widths[group.layer] |= widths_of(layers[group.layer], group)
    stock, native = type(model), dict[str, Any]()
    if is_per_layer(config):
        stock = stock.__bases__[1]
        config.__class__ = stock.config_class
    elif config.is_heterogeneous:
        native = config.to_dict()["per_layer_config"]
    config.per_layer_config = None
    for settings in (model.config, config):
        vars(settings).pop("auto_map", None)  # names the source's code
    if {layer.get(NUM_QUERIES) for layer in widths} == {getattr(config, NUM_QUERIES, None)}:
        for layer in widths:
            layer.pop("head_dim", None)  # the config states or derives it already
    base = commonest(widths)
    for name, width in base.items():
        setattr(config, name, width)
    own = {int(index): layer for index, layer in native.items()}
    different = (
        index
        for index, layer in enumerate(widths)
        if index in own or not layer.items() <= base.items()
    )
    # transformers leaves out what the config says of all layers.
    config.per_layer_config = {
        index: own.get(index, {}) | widths[index] for index in different
    } or None
    differs = config.is_heterogeneous and not native  # a native class builds such layers itself
    assert config is model.config or not differs, (
        "resolve refuses layers of different widths inside a larger class"
    )
    model.__class__ = stock
    if differs:
        model.__class__ = per_layer_class(stock)
        config.__class__ = per_layer_config_class(type(config))
    with quiet_transformers(), torch.device("meta"):
        built: Any = type(model)._from_config(model.config)
    linears_for_conv(built)
    for index, pair in enumerate(zip(layers, decoder_layers(built, arch), strict=True)):
        _adopt(*pair, index)


@torch.no_grad()
def why_not_per_layer(model: PreTrainedModel, arch: Arch, names: tuple[str, ...]) -> str | None:
    """Return why layers of different widths cannot be loaded again, as a twin is from its config
    and tensors.

    `names`: of the groups that are cut. None: they can be.
    """
    if isinstance(model, PerLayerModel):
        return None
    stock = type(model)
    if getattr(transformers, stock.__name__, None) is not stock:
        return f"{stock.__name__} is no class of transformers"
    try:
        twin = next(twins(stock, model.config, model.num_parameters(), arch.num_layers))
        own = bind(twin)
        # One layer of each group is narrower than the others.
        for group in {group.name: group for group in own.groups if group.name in names}.values():
            cut(decoder_layers(twin, own)[group.layer], group, some_of(group))
        record_widths(twin, own)
        # Nothing is written: of several ranks only the first would.
        with quiet_transformers():
            config = type(twin.config).from_dict(twin.config.to_dict())
            loaded = type(twin).from_pretrained(
                None, config=config, state_dict=twin.state_dict(), dtype=torch.float32
            )
        if not torch.allclose(run(loaded), run(twin), atol=CLOSE, rtol=CLOSE):
            return "loaded again, it is another model"
    except WRONG_GUESS as error:
        return one_line(error).partition(". ")[0]
    return None


def _adopt(layer: nn.Module, built: nn.Module, index: int) -> None:
    """Give every module of the layer the attributes that building it from its config gives."""
    for name, module in built.named_modules():
        ours = layer.get_submodule(name)
        assert type(ours) is type(module), f"layer {index}: {name} is a {type(ours).__name__}"
        for key, value in vars(module).items():
            if not key.startswith("_") and key != "training":
                setattr(ours, key, value)
    assert shapes_of(layer) == shapes_of(built), (
        f"layer {index}: its tensors and its config disagree"
    )
