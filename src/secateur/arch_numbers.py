"""What a config says of widths: how many units, how wide a head, how many rows of a segment.

In: a config, an expression of a family's spec. Out: numbers. A key that the config lacks is an ArchError.
"""

from typing import Any

from torch import nn

from secateur.arch_spec import SegmentSpecs
from secateur.errors import ArchError

Segments = tuple[int, ...]


def text_config(model: nn.Module) -> Any:
    """Return the config of the language model: the model's own, or the part that a larger model has for it."""
    config: Any = model.config
    return config.get_text_config()


def layer_configs(config: Any) -> list[Any]:
    """Return each layer's own config: of a model with per-layer widths they differ."""
    per_layer = getattr(config, "per_layer_config", None)
    return [config] * config.num_hidden_layers if per_layer is None else list(per_layer)


def count_of(expression: str, config: Any, where: str, family: str) -> int:
    """Return the number that "KEY", "KEY / KEY" or "KEY or 4 x KEY" stands for.

    Raises ArchError if the config has no such number.
    """
    key, _, instead = expression.partition(" or ")
    if instead and getattr(config, key, None) is None:
        factor, _, key = instead.partition(" x ")
        return int(factor) * _number(key, config, where, family)
    numbers = [_number(name, config, where, family) for name in key.split(" / ")]
    return numbers[0] if len(numbers) == 1 else numbers[0] // numbers[1]


def head_width(config: Any) -> int:
    """Return head_dim, which follows from hidden_size where the config does not say it."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def segments_of(specs: SegmentSpecs, config: Any) -> Segments:
    """Return rows per unit, segment by segment. Raises ArchError if a segment is none of those of `arch_spec`."""
    segments: list[int] = []
    for spec in specs:
        if isinstance(spec, int):
            segments.append(spec)
            continue
        width, _, repeat = spec.partition(" x ")
        if width not in ("kv", "q") or (repeat and not hasattr(config, repeat)):
            raise ArchError(
                f"spec: segment '{spec}' is no number, 'kv', 'q', or one of these with ' x ' and a config key."
            )
        queries = config.num_attention_heads // config.num_key_value_heads if width == "q" else 1
        segments += [head_width(config) * queries] * (getattr(config, repeat) if repeat else 1)
    return tuple(segments)


def _number(key: str, config: Any, where: str, family: str) -> int:
    number = getattr(config, key, None)
    if not isinstance(number, int):
        raise ArchError(f"{where}: config has no number '{key}', which family {family} needs.")
    return number
