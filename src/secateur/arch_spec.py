"""Family specs: one YAML file per family in `archs/`, and the one that a model type belongs to.

In: a config's `model_type`. Out: the spec as its YAML states it; `arch.bind` checks it against real modules. In the
YAML a segment's width is a number, `kv` (head_dim), `q` (head_dim x query heads per KV head), or `kv x NAME`: as many
segments of one head as the config's NAME says.
"""

from functools import cache
from importlib import resources

import yaml
from pydantic import BaseModel, ConfigDict, Field

from secateur.errors import ArchError, nearest

SegmentSpecs = tuple[int | str, ...]


class GroupSpec(BaseModel):
    """One group as its YAML states it. Modules are named relative to a decoder layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    unit: str
    num_units: str  # the config key that holds the number of units, or "KEY / KEY"
    writers: dict[str, SegmentSpecs] = Field(min_length=1)
    reader: dict[str, SegmentSpecs] = Field(min_length=1, max_length=1)
    # The attribute of a module that holds the number of units, where a half-cut model needs it to run.
    count: str | None = None
    bias_switch: dict[str, tuple[str, ...]] = Field(default={}, max_length=1)


class HiddenSpec(BaseModel):
    """The residual stream as its YAML states it: everything that is as wide as the model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    embedding: str
    norm: str  # the last one, which the head reads
    readers: dict[str, tuple[str, ...]] = Field(min_length=1)  # within a layer: norm -> the linears that read it
    writers: tuple[str, ...] = Field(min_length=1)  # within a layer
    writer_norms: tuple[str, ...] = ()  # within a layer: norms over what a writer gives
    norm_adds_one: bool = False  # where norms multiply by 1 + weight
    embedding_scales: tuple[str, ...] = ()  # the embedding's attributes that hold the square root of hidden_size


class ArchSpec(BaseModel):
    """One family as its YAML states it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model_types: tuple[str, ...] = Field(min_length=1)
    backbone: str
    layers: str
    head: str
    attention: str  # within a layer
    middle: str  # the module of a layer whose input is the residual stream between attention and MLP
    mlp_adds_directly: bool = True  # not where its output is normalised before it joins the residual stream
    heads_divide_hidden_size: bool = False  # where the config class refuses other numbers of attention heads
    hidden: HiddenSpec | None = None  # where hidden width can be cut
    groups: dict[str, GroupSpec]


@cache
def load_specs() -> dict[str, ArchSpec]:
    """Read every spec in `archs/`, keyed by family (the file's name)."""
    files = sorted(resources.files("secateur.archs").iterdir(), key=lambda file: file.name)
    texts = {
        file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
        for file in files
        if file.name.endswith(".yaml")
    }
    return {family: ArchSpec.model_validate(yaml.safe_load(text)) for family, text in texts.items()}


def find_spec(model_type: str) -> tuple[str, ArchSpec]:
    """Return (family, spec) for a config's `model_type`. Raises ArchError naming the nearest supported family."""
    families = {model_type: family for family, spec in load_specs().items() for model_type in spec.model_types}
    if model_type not in families:
        raise ArchError(
            f"model family '{model_type}' is not supported; supported: {', '.join(sorted(families))}; "
            f"the nearest is '{nearest(model_type, families)}'."
        )
    return families[model_type], load_specs()[families[model_type]]
