"""What llama.cpp computes for a model type: YAML files in `families/`.

What a model consists of is no fact of these files: `model.structure` finds it in the modules.
"""

from functools import cache
from importlib import resources
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, TypeAdapter


class GgufSpec(BaseModel):
    """What llama.cpp computes for an architecture. `takes`, `same`, `at_most`: what it assumes.

    A key that the config lacks counts as None; a dot leads into a mapping. Not handled: images;
    experts in some layers only, unless in all but the first few.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

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


_FILE = TypeAdapter(dict[str, dict[Literal["gguf"], GgufSpec]])


@cache
def gguf_specs() -> dict[str, GgufSpec]:
    """Return what is known, by model type."""
    files = sorted(resources.files("secateur.formats.families").iterdir(), key=lambda file: file.name)
    texts = [file.read_text(encoding="utf-8") for file in files if file.name.endswith(".yaml")]
    return {key: row["gguf"] for text in texts for key, row in _FILE.validate_python(yaml.safe_load(text)).items()}
