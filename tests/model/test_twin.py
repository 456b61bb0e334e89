"""The sizes of twins: what becomes smaller in the configs of well-known checkpoints, and what stays."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from shown import assert_shown
from transformers import CONFIG_MAPPING, PreTrainedConfig

from secateur.model.twin import MOST_LAYERS, MOST_TOKENS, SMALL_MODEL, _scales, shrunk

CONFIGS = sorted((Path(__file__).parent / "public_configs").glob("*.json"))


def config_of(file: Path) -> Any:
    sizes = dict(json.loads(file.read_text())["config"])
    return CONFIG_MAPPING[sizes.pop("model_type")](**sizes)


def changes(before: dict[str, Any], after: dict[str, Any], place: str = "") -> list[str]:
    """Return a line for each key that has another value."""
    lines = []
    for key, value in after.items():
        old = before.get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            lines += changes(old, value, f"{place}{key}.")
        elif value != old:
            short = f"{len(old)} entries" if isinstance(old, (list, tuple)) and len(old) > 8 else old
            lines.append(f"    {place}{key}: {short} -> {value}")
    return lines


def test_what_becomes_smaller_in_a_twin_and_what_stays() -> None:
    lines = []
    for file in CONFIGS:
        config = config_of(file)
        first, *others = scales = list(_scales(config, SMALL_MODEL + 1))
        small = shrunk(config, 2, MOST_LAYERS, MOST_TOKENS, *first)
        lines += [f"{file.stem}: {scales}", *changes(config.to_dict(), small.to_dict())]
        assert len(set(scales)) == len(scales) > 2 and others[-1][1] == 16
    assert_shown("twins", "\n".join(lines))


@pytest.mark.parametrize(
    "name", ["gemma-3-4b", "mistral-small-3.1-24b", "qwen2.5-vl-7b", "qwen3-vl-8b", "llama-4-scout"]
)
def test_towers_of_images_are_as_deep_as_they_are_wanted(name: str) -> None:
    config = config_of(next(file for file in CONFIGS if file.stem == name))
    shallow, whole = (shrunk(config, 3, 3, tokens, 2, 4) for tokens in (MOST_TOKENS, math.inf))
    lines = [
        f"{part}\n" + "\n".join(changes(config.to_dict(), each.to_dict()))
        for part, each in (("shallow", shallow), ("whole", whole))
    ]
    assert_shown(f"towers/{name}", "\n".join(lines))


def test_a_small_model_is_its_own_twin_first() -> None:
    config = config_of(CONFIGS[0])
    assert [next(iter(_scales(config, size))) for size in (SMALL_MODEL, SMALL_MODEL + 1)] == [
        None,
        next(_scales(config, 10**9)),
    ]


def test_lists_by_layer_are_cut_whatever_the_config_calls_its_depth() -> None:
    class Own(PreTrainedConfig):
        n_layers: int = 6
        kinds: list[str] | None = None

    config = Own(kinds=["a", "b", "a", "b", "a", "b"])
    small = shrunk(config, 2, MOST_LAYERS, MOST_TOKENS, 1, 1)
    assert (small.n_layers, small.kinds) == (2, ["a", "b"])
