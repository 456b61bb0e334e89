"""Family specs: one YAML file per family, in `families/` or in an installed package.

In: a config's `model_type`. Out: the spec as its YAML states it; `bind` checks it against real
modules. In the YAML a segment's width is a number, `kv` (head_dim), `q` (head_dim x query heads per
KV head), or `kv x NAME`: as many segments of one head as the config's NAME says. `like: FAMILY`
inherits everything from another file except what is stated anew, and the groups set to null. `gguf`
and `serving` are never inherited: nobody checked them for the new family.
"""

from functools import cache
from importlib import resources
from importlib.metadata import EntryPoint
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from secateur.errors import ArchError, PluginError, advice
from secateur.plugins import FAMILY_GROUP, load, plugins, where

SegmentSpecs = tuple[int | str, ...]


class _Spec(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class GroupSpec(_Spec):
    """One group as its YAML states it. Module names are relative to a decoder layer."""

    unit: str
    # Config key of the number of units, "KEY / KEY", or "KEY or 4 x KEY" if the first may be None.
    num_units: str
    writers: dict[str, SegmentSpecs] = Field(min_length=1)
    reader: dict[str, SegmentSpecs] = Field(min_length=1, max_length=1)
    # The module attribute that holds the number of units, if a half-cut model needs it to run.
    count: str | None = None
    bias_switch: dict[str, tuple[str, ...]] = Field(default={}, max_length=1)
    in_some_layers: bool = False  # the group exists only in layers that have the reader
    # The module whose forward reads head counts from its config, so a cut layer needs its own.
    local_config: str | None = None
    # Config keys (dotted: within a mapping) that forbid the group if they are true -> why.
    unless: dict[str, str] = {}


class GgufSpec(_Spec):
    """What llama.cpp computes for an architecture. `takes`, `same`, `at_most`: what it assumes.

    A key that the config lacks counts as None; a dot leads into a mapping. Not handled: images;
    experts in some layers only, unless in all but the first few.
    """

    architecture: str
    takes: dict[str, Any] = {}  # config key -> its value
    same: dict[str, str] = {}  # config key -> the key that has the same value
    at_most: dict[str, int] = {}  # config key -> its largest value
    # The key or value of the norms' epsilon. Only `rms_norm_eps` means RMS norms.
    eps: str | float = "rms_norm_eps"
    scales: dict[str, str] = {}  # config key -> the `add_` method of gguf's writer
    # Rotates channels 2i and 2i+1, not i and i + head_dim/2, so rows of q and k are permuted.
    interleaved_rotary: bool = False
    full_width_heads: bool = False  # query heads * head_dim must be the hidden size
    norm_offset: int = 0  # transformers adds it to norm weights, llama.cpp does not
    window_period: int = 0  # every n-th layer has no sliding window, the others do; 0: none do
    rotary_period: int = 0  # every n-th layer has no rotary positions; 0: all do
    # The model of this depth scales attention by hidden_size / heads, not head_dim.
    largest_num_layers: int | None = None
    # The matrix that holds an expert's gate and input together; llama.cpp stores two.
    fused_gate: str = ""
    alternating_gate: bool = False  # their rows alternate
    transposed: tuple[str, ...] = ()  # modules that store their weight transposed
    fused_qkv: bool = False  # q, k and v are separate here, one matrix in llama.cpp
    latent_attention: bool = False  # DeepSeek's MLA: one latent vector holds all keys and values
    # The architecture that computes the same with per-layer widths: `deci` (Nemotron's pruned
    # Llamas), or `openelm`, which has query and key norms.
    per_layer: "GgufSpec | None" = None


class VllmSpec(_Spec):
    """A family whose class is in vLLM's model registry."""

    reads_head_dim: bool  # head_dim comes from the config, not from hidden_size / heads
    ran: bool = False  # a pruned model of the family was run: tests/formats/test_vllm.py


class LogitsSpec(_Spec):
    """What follows the head, by config keys: x * multiply / divide, then the cap.

    cap: y = cap * tanh(x / cap), if the config has one.
    """

    multiply: str | None = None
    divide: str | None = None
    cap: str | None = None


class ChannelsSpec(_Spec):
    """The experts' weight stacks and their channels; names are relative to the experts' module."""

    num_units: str | None = None  # config key; null if other modules share it: no cut
    writer: str = "gate_up_proj"
    writer_bias: str | None = None
    down: str = "down_proj"
    # Rows of gate and up alternate (the module's own _apply_gate); else two halves and act_fn.
    alternating: bool = False
    transposed: bool = False  # inputs x outputs


class ExpertsSpec(_Spec):
    """A layer's experts, modules within a layer. Layers without this module have none."""

    experts: str  # every parameter of this module has the experts on axis 0
    router: str
    router_rows: tuple[str, ...] = ("weight",)  # the router's tensors with one row per expert
    num_units: str  # config key
    top_k: str  # config key
    # Attributes, dotted from the layer, that hold the number of experts.
    counts: tuple[str, ...] = Field(min_length=1)
    # Config keys, if the router first chooses groups of experts: how many exist, how many it takes.
    num_groups: str | None = None
    top_k_groups: str | None = None
    channels: ChannelsSpec = ChannelsSpec()
    # Every expert gets all tokens, times its routing weight, which is mostly zero.
    weighted_inputs: bool = False


class ArchSpec(_Spec):
    """One family as its YAML states it."""

    model_types: tuple[str, ...] = Field(min_length=1)
    gguf: dict[str, GgufSpec] = {}  # by model type; the YAML may give one for all
    serving: dict[Literal["vllm"], VllmSpec] = {}  # by server that loads safetensors
    backbone: str
    layers: str
    head: str
    attention: str | None  # within a layer; null if layers differ in kind
    # The module that reads the residual stream between attention and MLP; null in parallel blocks.
    middle: str | None
    # False if the MLP's output is normalised or scaled before it is added; or a config key.
    mlp_adds_directly: bool | str = True
    logits: LogitsSpec | None = None
    layers_give_tuples: bool = False  # hidden states first
    heads_divide_hidden_size: bool = False  # the config class refuses other head counts
    groups: dict[str, GroupSpec]
    experts: ExpertsSpec | None = None
    omits: dict[str, str] = {}  # groups that cannot be pruned -> why

    @model_validator(mode="before")
    @classmethod
    def _spread_gguf(cls, data: Any) -> Any:
        if "architecture" in (row := data.get("gguf") or {}):
            return data | {"gguf": dict.fromkeys(data.get("model_types", ()), row)}
        return data

    @model_validator(mode="after")
    def _check(self) -> "ArchSpec":
        if unknown := sorted(set(self.gguf) - set(self.model_types)):
            raise ValueError(f"gguf: {unknown[0]} is no model type of the file; use {', '.join(self.model_types)}.")
        if self.middle is not None and self.attention is None:
            raise ValueError("middle: needs an attention before it; set it to null.")
        return self


@cache
def load_specs() -> dict[str, ArchSpec]:
    """Read every spec in `families/` and in registered packages, keyed by family (the file's name).

    Raises PluginError if a package's family or model type exists already, or its file is wrong.
    """
    raw = _files("secateur.model.families")
    specs = {family: ArchSpec.model_validate(_inherited(data, raw)) for family, data in raw.items()}
    for point in plugins(FAMILY_GROUP, ()).values():
        package = load(point, lambda found: hasattr(found, "__path__"), "a package with *.yaml files in it")
        try:
            added = _files(package.__name__)
            read = {family: ArchSpec.model_validate(_inherited(data, raw | added)) for family, data in added.items()}
        except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise PluginError(f"{where(point)}: a YAML file is wrong ({reason}); see docs/extend.md.") from error
        _check_new(point, read, specs)
        raw, specs = raw | added, specs | read
    return specs


def _check_new(point: EntryPoint, added: dict[str, ArchSpec], known: dict[str, ArchSpec]) -> None:
    types = {model_type: family for family, spec in known.items() for model_type in spec.model_types}
    for family, spec in added.items():
        if family in known:
            raise PluginError(f"{where(point)}: there is a family '{family}' already; give the file another name.")
        for model_type in spec.model_types:
            if model_type in types:
                taken = f"model type '{model_type}' of family '{family}' is family '{types[model_type]}' already"
                raise PluginError(f"{where(point)}: {taken}; leave it out.")
            types[model_type] = family


def _files(package: str) -> dict[str, Any]:
    files = sorted(resources.files(package).iterdir(), key=lambda file: file.name)
    found = [file for file in files if file.name.endswith(".yaml")]
    return {file.name.removesuffix(".yaml"): yaml.safe_load(file.read_text(encoding="utf-8")) for file in found}


def find_spec(model_type: str) -> tuple[str, ArchSpec]:
    """Return (family, spec) for a `model_type`. Raises ArchError naming the nearest one."""
    families = {model_type: family for family, spec in load_specs().items() for model_type in spec.model_types}
    if model_type not in families:
        raise ArchError(
            f"model family '{model_type}' is not supported; supported: {', '.join(sorted(families))}; "
            f"{advice(model_type, families, 'none is like it;')} docs/extend.md says how to add one."
        )
    return families[model_type], load_specs()[families[model_type]]


def _inherited(data: dict[str, Any], raw: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a file's data, completed by the family that it is `like`."""
    if "like" not in data:
        return data
    base = {key: value for key, value in _inherited(raw[data["like"]], raw).items() if key not in ("gguf", "serving")}
    groups = {name: group for name, group in (base["groups"] | data.get("groups", {})).items() if group is not None}
    return base | {key: value for key, value in data.items() if key != "like"} | {"groups": groups}
