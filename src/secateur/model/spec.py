"""Family specs: one YAML file per family, in `families/` or in an installed package; and the one of a model type.

In: a config's `model_type`. Out: the spec as its YAML states it; `arch.bind` checks it against real modules. In the
YAML a segment's width is a number, `kv` (head_dim), `q` (head_dim x query heads per KV head), or `kv x NAME`: as many
segments of one head as the config's NAME says. `like: FAMILY` takes everything from another file but what is said anew;
of its groups those named null are left out. `gguf` and `serving` are not taken: nobody checked them for the new one.
"""

from functools import cache
from importlib import resources
from importlib.metadata import EntryPoint
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, model_validator

from secateur.errors import ArchError, PluginError, nearest
from secateur.plugins import FAMILY_GROUP, load, plugins, where

SegmentSpecs = tuple[int | str, ...]


class GroupSpec(BaseModel):
    """One group as its YAML states it. Modules are named relative to a decoder layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: str
    # The config key that holds the number of units; or "KEY / KEY"; or "KEY or 4 x KEY" where the first may be None.
    num_units: str
    writers: dict[str, SegmentSpecs] = Field(min_length=1)
    reader: dict[str, SegmentSpecs] = Field(min_length=1, max_length=1)
    # The attribute of a module that holds the number of units, where a half-cut model needs it to run.
    count: str | None = None
    bias_switch: dict[str, tuple[str, ...]] = Field(default={}, max_length=1)
    in_some_layers: bool = False  # only layers that have the reader have the group
    # The module whose config a half-cut layer needs to itself, where its forward reads numbers of heads from there.
    local_config: str | None = None
    unless: dict[str, str] = {}  # config keys (dotted: within a mapping) that, where true, forbid the group -> why


class GgufSpec(BaseModel):
    """What llama.cpp computes under an architecture's name. `takes`, `same`, `at_most` name what it takes for granted.

    A config key that a config lacks counts as None; a dot leads into a mapping. Not handled: images; experts in some of
    the layers only, unless in all but the first few.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    architecture: str
    takes: dict[str, Any] = {}  # config key -> its value
    same: dict[str, str] = {}  # config key -> the key that has the same value
    at_most: dict[str, int] = {}  # config key -> its largest value
    eps: str | float = "rms_norm_eps"  # the key of the norms' epsilon, or its value; `rms_norm_eps` alone: RMS norms
    scales: dict[str, str] = {}  # config key -> the `add_` method of gguf's writer
    interleaved_rotary: bool = False  # rotates channels 2i and 2i+1, not i and i + head_dim/2: rows of q and k move
    full_width_heads: bool = False  # query heads * head_dim must be the hidden size
    norm_offset: int = 0  # what transformers adds to the weights of norms and llama.cpp does not
    window_period: int = 0  # all layers but each such last one have a sliding window; 0: none has
    rotary_period: int = 0  # all layers but each such last one have rotary positions; 0: all have
    # Attention is scaled by head_dim, but by hidden_size / heads in the model of so many layers.
    largest_num_layers: int | None = None
    fused_gate: str = ""  # the file keeps an expert's gate and input in one matrix of that name, llama.cpp apart
    alternating_gate: bool = False  # their rows take turns
    transposed: tuple[str, ...] = ()  # modules that hold their weight transposed
    fused_qkv: bool = False  # the file keeps q, k and v apart, llama.cpp in one matrix
    latent_attention: bool = False  # keys and values of all heads are read off one latent vector, DeepSeek's MLA
    # Another architecture that computes the same with widths of each layer's own: `deci` is that of Nemotron's pruned
    # Llamas, `openelm` has norms of queries and keys.
    per_layer: "GgufSpec | None" = None


class VllmSpec(BaseModel):
    """A family whose class is in vLLM's registry of models."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    reads_head_dim: bool  # its modelling takes head_dim from the config, and not hidden_size / heads


class LogitsSpec(BaseModel):
    """What happens to the head's output, by the config keys that say how much: x * multiply / divide, then the cap.

    cap: y = cap * tanh(x / cap), where the config has one.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    multiply: str | None = None
    divide: str | None = None
    cap: str | None = None


class ChannelsSpec(BaseModel):
    """The stacks of experts as their YAML states them, named relative to the experts' module, and their channels."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    num_units: str | None = None  # config key; null where others share it, so that no channel can go
    writer: str = "gate_up_proj"
    writer_bias: str | None = None
    down: str = "down_proj"
    alternating: bool = False  # rows of gate and up side by side, the module's own _apply_gate; else halves and act_fn
    transposed: bool = False  # inputs x outputs


class ExpertsSpec(BaseModel):
    """A layer's experts as their YAML states them; layers without such a module have none. Modules within a layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    experts: str  # the module all of whose parameters have one entry per expert on axis 0
    router: str
    router_rows: tuple[str, ...] = ("weight",)  # the router's tensors with one row per expert
    num_units: str  # config key
    top_k: str  # config key
    counts: tuple[str, ...] = Field(min_length=1)  # attributes, dotted from the layer, that hold the number of experts
    # Config keys, where the router first chooses groups of experts: how many there are, how many it takes.
    num_groups: str | None = None
    top_k_groups: str | None = None
    channels: ChannelsSpec = ChannelsSpec()
    weighted_inputs: bool = False  # every expert gets all tokens, times its weight, which is zero for most


class ArchSpec(BaseModel):
    """One family as its YAML states it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_types: tuple[str, ...] = Field(min_length=1)
    gguf: dict[str, GgufSpec] = {}  # by model type; in the YAML also one for all of them
    serving: dict[Literal["vllm"], VllmSpec] = {}  # by server that loads the family's safetensors
    backbone: str
    layers: str
    head: str
    attention: str | None  # within a layer; null where layers differ in kind
    # The module of a layer whose input is the residual stream between attention and MLP; null where there is none, as
    # in blocks that run both side by side.
    middle: str | None
    # Whether the MLP's output joins the residual stream as it is: not where it is normalised or scaled before. A name
    # is a config key that says so.
    mlp_adds_directly: bool | str = True
    logits: LogitsSpec | None = None
    layers_give_tuples: bool = False  # the hidden states first
    heads_divide_hidden_size: bool = False  # where the config class refuses other numbers of attention heads
    groups: dict[str, GroupSpec]
    experts: ExpertsSpec | None = None
    omits: dict[str, str] = {}  # groups that the family cannot lose units of -> why

    @model_validator(mode="before")
    @classmethod
    def _spread_gguf(cls, data: Any) -> Any:
        if "architecture" in (row := data.get("gguf") or {}):
            return data | {"gguf": dict.fromkeys(data.get("model_types", ()), row)}
        return data

    @model_validator(mode="after")
    def _check_gguf(self) -> "ArchSpec":
        if unknown := sorted(set(self.gguf) - set(self.model_types)):
            raise ValueError(f"gguf: {unknown[0]} is no model type of the file; use {', '.join(self.model_types)}.")
        return self

    @model_validator(mode="after")
    def _check_middle(self) -> "ArchSpec":
        if self.middle is not None and self.attention is None:
            raise ValueError("middle: lies behind an attention, so that it needs one; set it to null.")
        return self


@cache
def load_specs() -> dict[str, ArchSpec]:
    """Read every spec in `families/` and in packages that register families, keyed by family (the file's name).

    Raises PluginError for a package whose family or model type is there already, or whose file is wrong.
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
                raise PluginError(
                    f"{where(point)}: model type '{model_type}' of family '{family}' is family '{types[model_type]}' "
                    f"already; leave it out."
                )
            types[model_type] = family


def _files(package: str) -> dict[str, Any]:
    files = sorted(resources.files(package).iterdir(), key=lambda file: file.name)
    texts = {
        file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
        for file in files
        if file.name.endswith(".yaml")
    }
    return {family: yaml.safe_load(text) for family, text in texts.items()}


def find_spec(model_type: str) -> tuple[str, ArchSpec]:
    """Return (family, spec) for a config's `model_type`. Raises ArchError naming the nearest one."""
    families = {model_type: family for family, spec in load_specs().items() for model_type in spec.model_types}
    if model_type not in families:
        raise ArchError(
            f"model family '{model_type}' is not supported; supported: {', '.join(sorted(families))}; "
            f"the nearest is '{nearest(model_type, families)}'; docs/extend.md says how to add one."
        )
    return families[model_type], load_specs()[families[model_type]]


def _inherited(data: dict[str, Any], raw: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return a file's data over that of the family it is `like`; its groups over those, without the ones named null."""
    if "like" not in data:
        return data
    base = {key: value for key, value in _inherited(raw[data["like"]], raw).items() if key not in ("gguf", "serving")}
    groups = {name: group for name, group in (base["groups"] | data.get("groups", {})).items() if group is not None}
    return base | {key: value for key, value in data.items() if key != "like"} | {"groups": groups}
