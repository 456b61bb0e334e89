"""What can be cut, found in the modules themselves: structure proposes, proof disposes.

In: a model, which may be on meta. Out: its architecture, and what each layer offers. Shapes propose
groups, one guess after another. Each guess is cut in a random twin of the model (see `twin`), and
stays only if the module gives what it gives with the removed units silenced. The config key of a
width is the one that changes exactly the group's tensors when the twin is built anew. What fails is
not offered, and `omits` says why.
"""

import copy
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from inspect import signature
from itertools import combinations, permutations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from secateur.errors import ArchError, advice
from secateur.model.group import DOWN, Experts, Group, Mixture, Rows, Stacks, cut
from secateur.model.guesses import (
    EXPERT_CHANNELS,
    EXPERTS,
    FFN,
    KV_HEADS,
    QUERY_HEADS,
    SHARED,
    Unrouted,
    channel_guesses,
    expert_channels_in,
    head_guesses,
    heads_of,
    silence,
    sized,
    some_of,
    some_units,
    stacks_of,
)
from secateur.model.modeling_per_layer import PerLayerModel
from secateur.model.modules import (
    Logits,
    ScaledHead,
    forwards_replaced,
    head_at,
    linears_for_conv,
    shapes_of,
    silent_attention,
    text_model,
)
from secateur.model.stock import layer_config, quiet_transformers
from secateur.model.twin import WIDTHS, WRONG_GUESS, run, token_ids, twins

# In which a layer's groups are cut: each reads what is left of those before.
ORDER = (KV_HEADS, QUERY_HEADS, SHARED, FFN, EXPERTS, EXPERT_CHANNELS)
# The config's key, and what modules call the number of units.
HEAD_KEYS = {
    KV_HEADS: ("num_key_value_heads", "num_key_value_heads"),
    QUERY_HEADS: ("num_attention_heads", "num_key_value_groups"),
}
# A key that counts more units at once, as the number of shared experts does, leaves no choice of
# widths.
MOST_PER_KEY = 4
# What outputs call the cache of keys and values since transformers 5.24, and before.
CACHE_NAMES = ("cache", "past_key_values")
CLOSE = 1e-4


@dataclass(frozen=True, slots=True)
class Call:
    """A module's call in the twin: what it was given, and what it gave."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Any

    @property
    def given(self) -> Tensor:
        """The first tensor that the module gave."""
        return _tensors(self.output)[0]

    @torch.no_grad()
    def again(self, module: nn.Module) -> Tensor:
        """Return the first tensor that the module gives for the same arguments."""
        args, kwargs = copy.deepcopy((self.args, self.kwargs))
        return _tensors(module.forward(*args, **kwargs))[0]


@dataclass(frozen=True, slots=True)
class Arch:
    """A model's architecture. `groups` lists every layer's groups, layer by layer.

    `family`: the model type. `attention`, `middle`: within a layer, and None if layers differ.
    `mlp_adds_directly`: what MLPs give is added to the stream as it is. `params_per_layer`: all
    parameters of each layer. `omits`: what cannot be cut, and why. `num_outputs`: of a layer; 0 if
    it gives hidden states alone. `carried`: arguments of a layer that are outputs of the layer
    before it, and which ones. `by_text`: arguments that depend on the text. `caches`: it keeps keys
    and values while it writes.
    """

    family: str
    backbone: str
    layers: str
    head: str = ""
    attention: str | None = None
    middle: str | None = None
    mlp_adds_directly: bool = True
    groups: tuple[Group, ...] = ()
    num_layers: int = 0
    params_per_layer: tuple[int, ...] = ()
    logits: Logits | None = None
    omits: dict[str, str] = field(default_factory=dict[str, str])
    num_outputs: int = 0
    carried: tuple[tuple[str, int], ...] = ()
    by_text: frozenset[str] = frozenset()
    caches: bool = False

    @property
    def is_chain(self) -> bool:
        """Whether all that a layer is given besides hidden states follows from the shape of a
        text.
        """
        return not self.carried and not self.by_text

    def layer_output(self, hidden: Tensor) -> Any:
        """Return hidden states in the form in which the backbone expects a layer's output."""
        return (hidden, *[None] * (self.num_outputs - 1)) if self.num_outputs else hidden

    def enter(
        self, layers: list[nn.Module], run: Callable[[], Any]
    ) -> tuple[Any, list[dict[str, Any]]]:
        """Return what layers are given if none computes: the first one's hidden states, and all
        else by name.

        What depends on the text goes with the hidden states, see `step`. `run`: runs the backbone.
        Raises ValueError if layers do not run once each.
        """
        entered: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

        def bypass(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            entered.append((hidden, args, kwargs))
            return self.layer_output(hidden)

        with forwards_replaced(layers, bypass):
            run()
        given = [
            dict(zip(list(signature(layer.forward).parameters)[1:], args, strict=False)) | kwargs
            for layer, (_, args, kwargs) in zip(layers, entered, strict=True)
        ]
        hidden = entered[0][0]
        if self.by_text:
            hidden.own = {
                i: {key: each[key] for key in self.by_text & each.keys()}
                for i, each in enumerate(given)
            }
        return hidden, given

    def step(self, layer: nn.Module, index: int, hidden: Any, given: dict[str, Any]) -> Any:
        """Return the hidden states that layer `index` gives; `own`: what later layers get of this
        text.
        """
        own: dict[int, dict[str, Any]] = dict(getattr(hidden, "own", {}))
        output = layer(hidden, **given | own.pop(index, {}))
        states: Any = output[0] if isinstance(output, tuple) else output
        if not self.is_chain:
            passed_on = {key: output[place] for key, place in self.carried}
            states.own = own | {index + 1: own.get(index + 1, {}) | passed_on}
        return states

    @property
    def ffns(self) -> tuple[Group, ...]:
        """The groups of plain FFNs: none where all are of experts."""
        return tuple(group for group in self.groups if group.name == "ffn")

    def select(self, names: tuple[str, ...]) -> tuple[Group, ...]:
        """Return the groups of these names. Raises ArchError if the model has no such group, or
        none at all.
        """
        known = {group.name for group in self.groups}
        if names and not known:
            why = "; ".join(f"{name}: {reason}" for name, reason in self.omits.items())
            raise ArchError(
                f"a model of type {self.family} has no units that can go: {why}; trim its tokens."
            )
        for name in names:
            if name in self.omits and name not in known:
                raise ArchError(
                    f"remove.groups: a model of type {self.family} cannot lose {name}: "
                    f"{self.omits[name]}."
                )
            if name not in known:
                raise ArchError(
                    f"remove.groups: a model of type {self.family} has no group '{name}'; it has "
                    f"{', '.join(sorted(known))}; {advice(name, known)}"
                )
        chosen = tuple(group for group in self.groups if group.name in names)
        first_module = {group.name: group.reader.module for group in reversed(chosen)}
        for name, other in combinations(names, 2):
            if first_module[name] == first_module[other]:
                raise ArchError(
                    f"remove.groups: {name} and {other} cut the same {first_module[name]}; choose "
                    "one."
                )
        return chosen


def text_config(model: nn.Module) -> Any:
    """Return the config of the language model, which may be part of a larger model."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def places(model: Any) -> tuple[str, str]:
    """Return the names of the backbone and its list of decoder layers.

    The backbone is the innermost module that holds both the embedding of tokens and such a list; of
    the lists in it that lie in no other the least deep one (towers of images are modules of their
    own), then that with most parameters. Raises ArchError without one, or without a head.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding, head = (
        names.get(part)
        for part in (model.get_input_embeddings(), text_model(model).get_output_embeddings())
    )
    lists = {
        name: module
        for module, name in names.items()
        if isinstance(module, nn.ModuleList) and len(module)
    }
    outer = [name for name in lists if not any(name.startswith(f"{other}.") for other in lists)]
    if not outer or not head or not embedding:
        missing = "head" if outer and embedding else "list of decoder layers"
        raise ArchError(
            f"model type '{model.config.model_type}': this {type(model).__name__} has no {missing}."
        )
    backbone, inside = embedding, list[str]()
    while not inside:
        backbone = backbone.rpartition(".")[0]
        inside = [name for name in outer if not backbone or name.startswith(f"{backbone}.")]
    sizes = {name: sum(each.numel() for each in lists[name].parameters()) for name in inside}
    return backbone, max(inside, key=lambda name: (-name.count("."), sizes[name]))


def bind(model: Any) -> Arch:
    """Return the model's architecture, with real sizes. Works on the meta device.

    GPT-2's linears become `TransposedLinear`, which saves the same. Raises ArchError if the model
    cannot be run layer by layer.
    """
    arch, offers = structure_of(model)
    linears_for_conv(model.get_submodule(arch.layers))
    layers, config = decoder_layers(model, arch), text_config(model)
    return replace(
        arch,
        groups=tuple(
            sized(offer, layer, index, layer_config(config, index))
            for index, layer in enumerate(layers)
            for offer in offers[index]
        ),
        num_layers=len(layers),
        params_per_layer=tuple(sum(p.numel() for p in layer.parameters()) for layer in layers),
    )


def decoder_layers(model: nn.Module, arch: Arch) -> list[nn.Module]:
    """Return the model's decoder layers in order."""
    return list(model.get_submodule(arch.layers).children())


def head_of(model: nn.Module, arch: Arch) -> nn.Module:
    """Return what maps the last hidden state to logits: the head and the model's scaling."""
    head = head_at(model, arch.head)
    return head if arch.logits is None else ScaledHead(head, arch.logits)


@torch.no_grad()
def kv_cache_bytes_per_token(model: Any) -> int:
    """Return the bytes of keys and values that the model's own cache holds per token; 0 if it keeps
    none.
    """
    ids_1T = torch.zeros(1, 4, dtype=torch.long, device=model.device)
    output = model(ids_1T, attention_mask=torch.ones_like(ids_1T), use_cache=True)
    cache = next((output[name] for name in output if name in CACHE_NAMES), None)
    states = (
        getattr(layer, name, None)
        for layer in getattr(cache, "layers", ())
        for name in ("keys", "values")
    )
    return sum(tensor.nbytes for tensor in states if tensor is not None) // ids_1T.numel()


_KNOWN: dict[tuple[type, str], tuple[Arch, list[list[Group]]]] = {}


def structure_of(model: PreTrainedModel) -> tuple[Arch, list[list[Group]]]:
    """Return the model's architecture without its groups, and what each layer offers.

    The same config is looked at once in a process.

    Raises ArchError if the model cannot be run layer by layer.
    """
    stock, config = type(model), model.config
    if isinstance(model, PerLayerModel):  # what its layers are does not depend on their widths
        stock, config = stock.__bases__[1], copy.deepcopy(config)
        config.__class__, config.per_layer_config = type(config).__bases__[0], None
    key = stock, str({**config.to_dict(), "_name_or_path": ""})
    if key not in _KNOWN:
        _KNOWN[key] = _Finder(model, stock, config).find()
    return _KNOWN[key]


class _Finder:
    """Looks at one model's twin."""

    def __init__(self, model: PreTrainedModel, stock: Any, config: Any) -> None:
        self.arch = Arch(model.config.model_type, *places(model))
        kinds = [
            _kind(layer, shapes=stock is type(model)) for layer in decoder_layers(model, self.arch)
        ]
        self.twin_layer = tuple(kinds.index(kind) for kind in kinds)
        num_layers = max(2, max(self.twin_layer) + 1)
        self.twin: Any = next(twins(stock, config, model.num_parameters(), num_layers))
        linears_for_conv(self.twin)
        self.config = text_config(self.twin)
        self.layers = decoder_layers(self.twin, self.arch)
        # In how many layers a parameter is.
        self.num_owners = Counter(
            parameter for layer in self.layers for parameter in layer.parameters()
        )
        self.why: dict[str, str] = {}

    def find(self) -> tuple[Arch, list[list[Group]]]:
        """Return what is proved."""
        self._run()
        self._find_walk()
        self._find_logits()
        self._find_middle()
        own = {index: self._offers(index) for index in sorted(set(self.twin_layer))}
        offers = self._stored([own[index] for index in self.twin_layer[: len(self.layers)]])
        names = {offer.name for layer in offers for offer in layer}
        omits = {name: why for name, why in self.why.items() if name not in names}
        if not names:
            omits.setdefault(FFN, "no channels between two linears stand alone")
        adds = (
            self._adds(index, offer)
            for index, layer in enumerate(offers)
            for offer in layer
            if offer.kind != "heads"
        )
        arch = replace(self.arch, omits=omits, mlp_adds_directly=all(adds))
        return arch, [offers[index] for index in self.twin_layer]

    # What runs, and how.

    def _run(self) -> None:
        """Run the twin, and note the first call of every module, in order."""
        self.calls: dict[nn.Module, Call] = {}

        def note(module: nn.Module, *call: Any) -> None:
            self.calls.setdefault(module, Call(*copy.deepcopy(call)))

        with ExitStack() as stack:
            for module in self.twin.modules():
                stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
            self.logits = run(self.twin)
        with suppress(*WRONG_GUESS):
            self.arch = replace(self.arch, caches=kv_cache_bytes_per_token(self.twin) > 0)

    @torch.no_grad()
    def _find_walk(self) -> None:
        """Find what layers are given by the text, and what they pass on, each to the next.

        Raises ArchError unless one after the other, by turns on two texts as in `stream.walk`, they
        are the model.
        """
        texts, first = (
            (token_ids(self.twin), token_ids(self.twin).flip(0)),
            self.calls[self.layers[0]].output,
        )
        self.arch = replace(
            self.arch, num_outputs=len(first) if isinstance(first, (tuple, list)) else 0
        )

        def entered(ids: Tensor) -> tuple[Any, list[dict[str, Any]]]:
            return self.arch.enter(self.layers, partial(run, self.twin, ids))

        try:
            (_, given), (_, others) = map(entered, texts)
        except TypeError:
            raise self._refused("layers are called by keywords alone") from None
        except ValueError:
            raise self._refused("layers do not run once each, in order") from None
        by_text = (
            key
            for one, other in zip(given, others, strict=True)
            for key in one
            if not _equal(one[key], other[key])
        )
        self.arch = replace(self.arch, by_text=frozenset(by_text))

        # What the layer before it gave, a layer is not given where none computes anything.
        carried: dict[str, int] = {}
        calls = [self.calls[layer] for layer in self.layers]
        for bypassed, call, before in zip(given[1:], calls[1:], calls, strict=False):
            own = dict(zip(bypassed, call.args[1:], strict=False)) | call.kwargs
            carried |= {
                key: place
                for place, output in enumerate(before.output if self.arch.num_outputs else ())
                for key, value in own.items()
                if not _equal(value, bypassed[key]) and _equal(value, output)
            }
        self.arch = replace(self.arch, carried=tuple(carried.items()))

        # Walk.
        streams = [entered(ids)[0] for ids in texts]
        try:
            for index, layer in enumerate(self.layers):
                streams = [self.arch.step(layer, index, hidden, given[index]) for hidden in streams]
            for ids, hidden in zip(texts, streams, strict=True):
                with forwards_replaced(
                    self.layers, partial(_given, self.arch.layer_output(hidden))
                ):
                    walked = run(self.twin, ids)
                if hidden.shape[:2] != ids.shape or not _near(walked, run(self.twin, ids)):
                    raise ValueError
        except WRONG_GUESS:
            raise self._refused("layers pass on more than one hidden state") from None

    def _refused(self, why: str) -> ArchError:
        return ArchError(
            f"model type '{self.twin.config.model_type}' cannot be walked layer by layer: {why}."
        )

    @torch.no_grad()
    def _find_logits(self) -> None:
        """Find the head, and what follows it, by the config's numbers: x * a, x / a, a tanh(x / a),
        a tanh(b x / a).
        """
        backbone = self.twin.get_submodule(self.arch.backbone)
        numbers = [
            float(value)
            for value in vars(self.config).values()
            if type(value) in (int, float) and value
        ]
        scales = [scale for number in (1.0, *numbers) for scale in ((number, 1.0), (1.0, number))]
        forms = [Logits(*scale, cap) for cap in (None, *map(abs, numbers)) for scale in scales]
        with suppress(*WRONG_GUESS):
            # Called alone, as the walk calls it.
            states = backbone(token_ids(self.twin), use_cache=False).last_hidden_state
            name = "+".join(self._behind(backbone))
            plain = head_at(self.twin, name)(states)
            for form in forms:
                if torch.allclose(
                    ScaledHead(nn.Identity(), form)(plain), self.logits, atol=1e-5, rtol=1e-5
                ):
                    self.arch = replace(
                        self.arch, head=name, logits=form if form != forms[0] else None
                    )
                    return
        raise self._refused("what follows the head is not known")

    def _behind(self, backbone: nn.Module) -> list[str]:
        """Return the names of the modules that the language model calls beside the one with the
        backbone.
        """
        names = {module: name for name, module in self.twin.named_modules()}
        beside = {
            child for child in text_model(self.twin).children() if backbone not in child.modules()
        }
        return [names[module] for module in self.calls if module in beside]

    def _find_middle(self) -> None:
        """Find the attention, and the module that reads the stream behind it, if all layers have
        them.
        """
        if not self.arch.is_chain:  # a silent attention has nothing to pass on
            return
        children = dict(self.layers[0].named_children())
        for middle, attention in permutations(children, 2):
            if all(self._is_middle(layer, attention, middle) for layer in self.layers):
                self.arch = replace(self.arch, attention=attention, middle=middle)
                return

    def _is_middle(self, layer: nn.Module, attention: str, middle: str) -> bool:
        """Say whether, with that silent, the input of `middle` instead of the layer's gives the
        same.
        """
        with suppress(*WRONG_GUESS):
            silenced, reader = layer.get_submodule(attention), layer.get_submodule(middle)
            whole, hidden = self.calls[layer], self.calls[reader].args[0]
            moved = replace(whole, args=(hidden, *whole.args[1:]))
            if isinstance(self.calls[silenced].output, tuple) and not _equal(hidden, whole.args[0]):
                with forwards_replaced([silenced], silent_attention):
                    return _near(moved.again(layer), whole.given)
        return False

    # What can be cut.

    def _offers(self, index: int) -> list[Group]:
        """Return what the layer's modules can lose without changing more than the units' own
        part.
        """
        layer = self.layers[index]
        offers = list(self._expert_offers(index))
        by_module = _linears(layer)
        linears = (pair for own in by_module.values() for pair in own.items())
        wide = {
            name: linear for name, linear in linears if linear.in_features != linear.out_features
        }
        # Writer and reader may lie in modules of their own, as in BERT.
        for place, between in [*by_module.items(), ("", wide)]:
            call = self.calls.get(layer.get_submodule(place))
            if call is None or (between is wide and offers):
                continue
            if place and len(_tensors((call.args, call.kwargs))) > 1:
                continue  # FFNs are given hidden states alone
            name = SHARED if offers or "shared" in place else FFN
            proved = [
                guess
                for guess in channel_guesses(between, name)
                if self._holds(index, place, guess)
            ]
            if len(proved) > 1:
                self.why[name] = (
                    f"layer {index}: {place or 'the layer'} has several pairs of linears that "
                    "could be it"
                )
            else:
                offers += proved
        for name, count in Counter(offer.name for offer in offers).items():
            if count > 1:
                self.why[name] = f"layer {index} has {count} of them, side by side"
                offers = [offer for offer in offers if offer.name != name]
        return offers + list(self._head_offers(index))

    def _holds(self, index: int, place: str, guess: Group) -> bool:
        """Say whether the module at `place`, cut at random, gives what it gives with those units
        silent.
        """
        module = self.layers[index].get_submodule(place)
        if any(self.num_owners[parameter] > 1 for parameter in module.parameters()):
            return False
        try:
            call = self.calls[module]  # attention to what an encoder gives does not run
            whole, masked = (copy.deepcopy(self.layers[index]) for _ in range(2))
            group = sized(guess, whole, index, self.config)
            keep = some_of(group)
            silence(masked, group, keep)
            cut(whole, group, keep)
            silent, without = (call.again(layer.get_submodule(place)) for layer in (masked, whole))
            return not _near(silent, call.given) and _near(without, silent)
        except WRONG_GUESS:
            return False

    @torch.no_grad()
    def _adds(self, index: int, group: Group) -> bool:
        """Say whether what the group's module gives is added to the stream as it is."""
        if isinstance(group.parts, Experts) and group.parts.weighted_inputs:
            return True
        layer: Any = self.layers[index]
        call, module = self.calls[layer], layer.get_submodule(group.reader.module)
        step = torch.randn(call.given.shape, generator=torch.Generator().manual_seed(index))
        with (
            module.register_forward_hook(lambda _, __, output: output + step.view_as(output)),
            suppress(*WRONG_GUESS),
        ):
            return _near(call.again(layer) - call.given, step)
        return False

    def _expert_offers(self, index: int) -> Iterator[Group]:
        # In a twin a table's integers are no experts' numbers, and no proof sees it.
        stored = (tensor for layer in self.layers for tensor in layer.state_dict().values())
        if any(tensor.ndim > 1 and not tensor.is_floating_point() for tensor in stored):
            self.why[EXPERTS] = "a stored table says which experts read a token"
            return
        for place, module in self.layers[index].named_modules():
            own = dict(module.named_parameters())
            sizes = {len(tensor) for tensor in own.values()}
            if module not in self.calls or DOWN not in own or len(sizes) > 1:
                continue
            given, num_experts = _tensors(self.calls[module].args), len(own[DOWN])
            # Else the experts are given hidden states, chosen experts and their weights.
            weighted = (
                len(given) == 1 and len(given[0]) == num_experts * token_ids(self.twin).numel()
            )
            stacks = stacks_of(module, transposed=weighted)
            channels = expert_channels_in(place, stacks)
            if not (weighted or _reads(module, stacks, given)) or not self._holds(
                index, place, channels
            ):
                self.why[EXPERTS] = f"{place}: how its stacks are read is not known"
                continue
            if weighted:  # an expert that a token is not sent to reads zeros
                sent = given[0].unflatten(0, (num_experts, -1)).any(-1)
                chosen = int(sent.sum(0).max())
            else:
                chosen = given[-1].shape[-1]
                yield channels
            reader = Rows(f"{place}.{DOWN}", 0, (1,))
            experts = Experts(reader, stacks, weighted_inputs=weighted)
            yield Group(EXPERTS, "experts", "expert", experts, at_least=chosen)

    def _head_offers(self, index: int) -> Iterator[Group]:
        layer, config = self.layers[index], layer_config(self.config, index)
        for place, linears in _linears(layer).items():
            module = layer.get_submodule(place)
            for guess in head_guesses(linears, config):
                key, count = HEAD_KEYS[guess.name]
                counts = tuple(
                    f"{place}.{key}" for key in (count, "config") if hasattr(module, key)
                )
                offer = replace(guess, config_key=key, counts=counts)
                # None of one head can go, which needs no proof.
                if self._sized(offer, index).num_units == 1 or self._holds(index, place, offer):
                    yield offer
                else:
                    self.why[guess.name] = (
                        "the attention does not give the same without a head and with a silent one"
                    )
        for name in (KV_HEADS, QUERY_HEADS):
            self.why.setdefault(
                name, "no linears make queries, keys and values by heads of one width"
            )

    # What a config can say, and transformers reads back.

    def _stored(self, offers: list[list[Group]]) -> list[list[Group]]:
        """Return the offers that a config can say, with its keys, and that reload as what was
        cut.
        """
        kept: list[dict[str, Group]] = [{} for _ in offers]
        for name in sorted(ORDER):
            left = {
                index: offer
                for index, layer in enumerate(offers)
                for offer in layer
                if offer.name == name
            }
            while left and (added := self._say(name, left)):
                for index, offer in added.items():
                    kept[index][name] = offer
                    del left[index]
        for layer in kept:
            if KV_HEADS not in layer:
                layer.pop(QUERY_HEADS, None)
        return [[layer[name] for name in ORDER if name in layer] for layer in kept]

    def _sized(self, offer: Group, index: int) -> Group:
        return sized(offer, self.layers[index], index, layer_config(self.config, index))

    def _say(self, name: str, offers: dict[int, Group]) -> dict[int, Group]:
        """Return the offers whose numbers one key of the config says, by layer; empty if none
        does.
        """
        index, offer = next(iter(offers.items()))
        first = self._sized(offer, index)
        self.why[name] = "no key of the config says how many there are"
        if first.num_units == 1 and first.kind == "heads":
            return dict(offers)
        if len(some_of(first)) == first.num_units:
            self.why[name] = f"the router needs all {first.num_units}"
            return {}
        for changes in self._changes(first):
            if (built := self._built(changes)) is None:
                continue
            said = {
                index: self._said(offer, index, built, changes) for index, offer in offers.items()
            }
            done = {index: offer for index, offer in said.items() if offer is not None}
            if done and self._reloads(done, built, name):
                return done
        return {}

    def _changes(self, group: Group) -> Iterator[dict[str, Any]]:
        """Yield changes of the config that could give fewer units."""
        values, units = vars(self.config), group.num_units
        if group.kind == "heads" and (sizes := heads_of(self.config)):
            queries, keys, width = sizes
            fewer, fewer_keys = (queries // keys, 1) if group.name == KV_HEADS else (keys, keys)
            yield {
                "num_attention_heads": fewer,
                "num_key_value_heads": fewer_keys,
                "head_dim": width,
            }
            return
        fewer = len(some_of(group))
        whole = {key: value for key, value in values.items() if type(value) is int and value > 1}
        for key, value in sorted(
            whole.items(), key=lambda item: item[1] != units
        ):  # the most likely ones first
            if value == 2 * units or units % value == 0:
                yield {key: max(1, value * fewer // units)}
        named = [key for key in values if WIDTHS.search(key)]
        yield from ({key: fewer} for key in named if values[key] is None)
        switches = [
            key for key, value in values.items() if value is True
        ]  # one may derive the width from the key
        yield from (
            {key: fewer, switch: False} for key in named if key in whole for switch in switches
        )

    def _built(self, changes: dict[str, Any]) -> Any:
        """Return the model, on meta, of the changed config as transformers reads it back; None if
        it builds none.
        """
        config = copy.deepcopy(self.twin.config)
        inner: Any = config.get_text_config(decoder=True)
        try:
            for key, value in changes.items():
                setattr(inner, key, value)
            with quiet_transformers(), torch.device("meta"):
                built = type(self.twin)._from_config(type(config).from_dict(config.to_dict()))
        except WRONG_GUESS:
            return None
        linears_for_conv(built)
        return built if shapes_of(built).keys() == shapes_of(self.twin).keys() else None

    def _said(self, offer: Group, index: int, built: Any, changes: dict[str, Any]) -> Group | None:
        """Return the offer with what building from the changed config says of it; None if it says
        nothing.
        """
        ours, theirs = self.layers[index], decoder_layers(built, self.arch)[index]
        group = self._sized(offer, index)
        left = group.num_units_left(theirs)
        if left == group.num_units:
            return None
        if group.kind == "heads":
            odd = (
                self.config.hidden_size // 2 + 1
            )  # some classes refuse numbers that do not divide the hidden size
            refused = (
                self._built({"num_attention_heads": odd, "num_key_value_heads": odd, "head_dim": 2})
                is None
            )
            return replace(
                offer, divides=(1, 1) if refused else None
            )  # `sized` gives it the layer's numbers
        (key, value), *settings = changes.items()
        before, per_key = getattr(self.config, key), 1.0
        if settings and left != value:
            return None
        if type(before) is int and not settings:
            per_key = (group.num_units - left) / (before - value)
            # A width that is rounded up to a multiple of the key is not as many times the key.
            if per_key > MOST_PER_KEY or not math.isclose(
                per_key, group.num_units / before, rel_tol=0.1
            ):
                return None
        offer = replace(offer, config_key=key, per_key=per_key, settings=tuple(settings))
        if group.kind != "experts":
            return offer
        before, after, own = shapes_of(ours), shapes_of(theirs), f"{group.reader.module}."
        rows = (
            name for name in after if after[name] != before.get(name) and not name.startswith(own)
        )
        parts = replace(group.experts, router_rows=tuple(rows))
        return replace(offer, parts=parts, counts=_attributes(ours, theirs, group.num_units, left))

    def _reloads(self, offers: dict[int, Group], built: Any, name: str) -> bool:
        """Say whether the cut twin, loaded into what its config builds, equals the one with silent
        units.
        """
        # What is in no layer is not copied: a tower may be large.
        shared = {id(each): each for each in self.twin.parameters() if each not in self.num_owners}
        whole, masked = (copy.deepcopy(self.twin, dict(shared)) for _ in range(2))
        layers, silent, smaller = (
            decoder_layers(model, self.arch) for model in (whole, masked, built)
        )
        unrouted: list[tuple[Tensor, Tensor]] = []
        try:
            for index, offer in offers.items():
                group = self._sized(offer, index)
                keep = some_units(group, group.num_units_left(smaller[index]))
                cut(layers[index], group, keep)
                unrouted += silence(silent[index], group, keep)
            ours, theirs = shapes_of(whole), shapes_of(built)
            if ours != theirs:
                other = next(name for name in theirs if ours.get(name) != theirs[name])
                other = other.removeprefix(f"{self.arch.layers}.")
                self.why[name] = f"the config key that says it also says the size of {other}"
                return False
            self.why[name] = "loaded again, it is not the model that was cut"
            with quiet_transformers(), torch.random.fork_rng(devices=[]):
                loaded: Any = type(self.twin)._from_config(built.config, dtype=torch.float32).eval()
            loaded.load_state_dict(whole.state_dict())
            with Unrouted(unrouted):
                expected = run(masked)
            again = (run(model) for model in (loaded, whole))
            return not _near(expected, self.logits) and all(
                _near(logits, expected) for logits in again
            )
        except WRONG_GUESS:
            return False


@torch.no_grad()
def _reads(module: Any, stacks: Stacks, given: list[Tensor]) -> bool:
    """Say whether an expert's output is the reader times `Mixture.inputs`, up to a constant."""
    experts = Mixture(module, stacks)
    try:
        hidden, chosen, weights = (tensor[:6] for tensor in given)
        one = torch.ones_like(weights[:, :1])
        output = module.forward(hidden, torch.zeros_like(chosen[:, :1]), one)
        rest = output - experts.inputs(0, hidden) @ experts.reader(0).T
        return _near(rest, rest[:1].expand_as(rest)) and not _near(output, rest)
    except WRONG_GUESS:
        return False


def _linears(layer: nn.Module) -> dict[str, dict[str, nn.Linear]]:
    """Return the linears in each module, by their names in the layer."""
    linears: dict[str, dict[str, nn.Linear]] = defaultdict(dict)
    for name, module in layer.named_modules():
        if isinstance(module, nn.Linear):
            linears[name.rpartition(".")[0]][name] = module
    return linears


def _attributes(ours: nn.Module, theirs: nn.Module, before: int, after: int) -> tuple[str, ...]:
    """Return the attributes of the layer's modules that hold the number of units."""
    others = dict(theirs.named_modules())
    return tuple(
        f"{name}.{key}".removeprefix(".")
        for name, module in ours.named_modules()
        for key, value in vars(module).items()
        if type(value) is int and value == before and vars(others[name]).get(key) == after
    )


def _kind(layer: nn.Module, *, shapes: bool) -> tuple[Any, ...]:
    """Return what tells kinds of layers apart: the class, and the names of tensors, with shapes or
    not.
    """
    tensors = shapes_of(layer)
    return (type(layer).__name__, *(tensors.items() if shapes else tensors))


def _given(value: Any, *_: Any, **__: Any) -> Any:
    return value


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _equal(one: Any, other: Any) -> bool:
    ours, theirs = _tensors(one), _tensors(other)
    return len(ours) == len(theirs) and all(map(torch.equal, ours, theirs))


def _near(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(
        one.float(), other.float(), atol=CLOSE, rtol=CLOSE
    )
