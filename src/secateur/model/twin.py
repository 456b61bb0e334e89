"""A small random model of the same type as another, on which everything is tried before a weight is
cut.

In: a model, which may be on meta. Out: its twin: the same class, config and kinds of layers, of
small sizes, in float32 with random weights, and proved to run. A twin has the layers up to the last
new kind.
"""

import copy
import math
import re
from collections.abc import Iterator
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from secateur.errors import ArchError, one_line
from secateur.model.guesses import heads_of
from secateur.model.modules import text_model
from secateur.model.stock import BAD_VALUE, quiet_transformers

TWIN_TOKENS, TWIN_BLOCKS = 12, 2
# A model of fewer parameters is its own twin; a twin has at most so many.
SMALL_MODEL, LARGEST_TWIN = 2_000_000, 400_000_000
MOST_EXPERTS, MOST_LAYERS = 8, 1000
MOST_TOKENS = 512
# What torch and transformers raise where a guess makes shapes that do not fit.
WRONG_GUESS = BAD_VALUE
# So many sizes that fail alike do not fail for their size.
SAME_PROBLEM = 8

_LAYERS = re.compile(r"(num_hidden|num|n|num_decoder|decoder)_layers?|depth|num_blocks")
_KEPT = re.compile(
    r".*(token_id|_ids?|positions?|patch_size|window.*|chunk.*|kernel.*|topk_group|n_groups?|interval|period"
    r"|offset|stride|length|factor|first_k.*|theta|seed|channels|min_.*|max_.*|d_conv|temporal_.*|.*merge_size)"
)
WIDTHS = re.compile("intermediate|ffn|inner")
_HEADS = re.compile(r".*(heads?|n_head|kv_groups)")
_HEAD_SIZES = re.compile(
    r".*(head_dim|rotary_dim|rope_dim|rope_head_dim|nope_head_dim|head_size|d_kv|d_state|state_size)"
)


def twins(stock: Any, config: Any, num_params: int, num_layers: int) -> Iterator[PreTrainedModel]:
    """Yield twins, of several sizes, of a model of class `stock`, with its first `num_layers`
    layers.

    Raises ArchError behind the last one.
    """
    problems: list[str] = []
    # Towers of images and sound are deep, as configs name layers of theirs, else shallow, else
    # whole with their tokens.
    towers = (
        (MOST_LAYERS, MOST_TOKENS),
        (num_layers, MOST_TOKENS),
        (num_layers, math.inf),
        (MOST_LAYERS, MOST_TOKENS),
    )
    for number, kind in enumerate(towers):
        for sizes in _scales(config, num_params):
            try:
                with quiet_transformers(), torch.random.fork_rng(devices=[]):
                    torch.manual_seed(0)
                    small = (
                        shrunk(config, num_layers, *kind, *sizes)
                        if sizes
                        else copy.deepcopy(config)
                    )
                    if number < 3:  # the last ones need not be read back by transformers
                        small = type(small).from_dict(small.to_dict())
                    with torch.device("meta"):
                        size = stock._from_config(small).num_parameters()
                    if size > LARGEST_TWIN:
                        continue
                    built = randomised(stock._from_config(small, dtype=torch.float32).eval())
                    if not run(built).isfinite().all():
                        raise ValueError("it gives no finite numbers")
            except (*WRONG_GUESS, ImportError) as error:
                problems.append(one_line(error))
                if problems.count(problems[-1]) >= SAME_PROBLEM:
                    break
                continue
            yield built
    raise ArchError(
        f"model type '{config.model_type}': no small model of it can be run to try cuts on "
        f"({(problems or [''])[0]})."
    )


def shrunk(
    config: Any, num_layers: int, in_towers: int, tokens: int | float, by_heads: int, by_width: int
) -> Any:
    """Return the config with heads divided by one number, head sizes by the other, widths by both.

    Proportions stay, so that what must divide another still does. Lists with an entry for every
    layer are cut to `num_layers`, in configs that are not of the text to `in_towers`. `tokens`: the
    most; without a limit, what is not of the text keeps its widths.
    """
    config = copy.deepcopy(config)
    values, text = vars(config), config.get_text_config(decoder=True)
    depth = next(
        (
            value
            for key, value in values.items()
            if _LAYERS.fullmatch(key) and isinstance(value, int)
        ),
        getattr(config, "num_hidden_layers", 0),  # of some types the length of a list
    )
    tops = [
        value
        for key, value in values.items()
        if re.search("per_tok|top_?k", key) and isinstance(value, int)
    ]
    most_chosen = max(
        [2 * (values.get("n_group") or 1), *tops]
    )  # each group of experts is ranked by two
    smaller = partial(
        _smaller,
        num_layers=num_layers,
        by_heads=by_heads,
        by_width=by_width,
        chosen=most_chosen,
        tokens=tokens,
    )
    own = config.to_dict()["per_layer_config"] if config.is_heterogeneous else {}
    for key, value in values.items():
        if isinstance(value, PreTrainedConfig):
            holds_text = any(part is text for part in (value, *vars(value).values()))
            scales = (by_heads, by_width) if holds_text or tokens < math.inf else (1, 1)
            values[key] = shrunk(
                value, num_layers if holds_text else in_towers, in_towers, tokens, *scales
            )
        elif isinstance(value, dict):
            values[key] = _sections(key, value, by_width)
        elif isinstance(value, (list, tuple)) and len(value) == depth > num_layers:
            values[key] = type(value)(value[:num_layers])
        elif not key.startswith("_"):
            values[key] = smaller(key, value)
    if own:  # layers that have sizes of their own
        kept = {index: sizes for index, sizes in own.items() if int(index) < num_layers}
        config.per_layer_config = {
            index: {key: smaller(key, n) for key, n in kept[index].items()} for index in kept
        }
    _keep_tokens_inside(values)
    return config


def randomised(model: PreTrainedModel) -> PreTrainedModel:
    """Give every parameter noise that is large enough to move the logits. Vectors stay near their
    start.
    """
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, dtype=parameter.dtype)
            if parameter.ndim > 1 and parameter.numel() > max(parameter.shape):
                parameter.copy_(noise / math.sqrt(parameter.shape[-1]))
            else:
                parameter.add_(0.1 * noise)
    return model


def token_ids(model: PreTrainedModel) -> Tensor:
    """Return random tokens that no special meaning is likely to have."""
    size = len(cast(Tensor, model.get_input_embeddings().weight))
    return torch.randint(
        min(20, size // 2),
        size - 1,
        (TWIN_BLOCKS, TWIN_TOKENS),
        generator=torch.Generator().manual_seed(0),
    )


@torch.no_grad()
def run(model: PreTrainedModel, ids_BT: Tensor | None = None) -> Tensor:
    """Return the logits of these tokens, by default of `token_ids`."""
    return text_model(model)(
        input_ids=token_ids(model) if ids_BT is None else ids_BT, use_cache=False
    ).logits


def _scales(config: Any, num_params: int) -> Iterator[tuple[int, int] | None]:
    """Yield divisors of heads and of head sizes to try; None first if the model is small."""
    if num_params <= SMALL_MODEL:
        yield None
    sizes = config.get_text_config(decoder=True).per_layer_config[0]
    _, keys, _ = heads_of(sizes) or (1, 1, 1)
    fewer = next(
        (number for number in (16, 8, 4, 2) if keys % number == 0 and keys // number >= 2), 1
    )
    for by_width in (8, 4, 1, 2, 16):  # 1: some models have lists of parts of a head in their code
        for by_heads in dict.fromkeys((fewer, 4, 1)):
            yield by_heads, by_width


def _smaller(
    key: str,
    value: Any,
    *,
    num_layers: int,
    by_heads: int,
    by_width: int,
    chosen: int,
    tokens: int | float,
) -> Any:
    if type(value) is not int or value < 2:
        return value
    if _LAYERS.fullmatch(key) or key.endswith("_layers"):
        return min(value, num_layers)
    if "vocab" in key and "size" in key:
        return min(value, tokens)
    if "expert" in key and "per_tok" not in key and "size" not in key and "top" not in key:
        return min(value, max(MOST_EXPERTS, 2 * chosen))
    if _KEPT.fullmatch(key):
        return value
    if _HEADS.fullmatch(key):
        return max(1, value // by_heads)
    if _HEAD_SIZES.fullmatch(key) and value <= 1024:
        return max(1, value // by_width)
    if value < 64:
        return value
    smaller = max(8, value // (by_heads * by_width))
    return -(-smaller // 16) * 16 if WIDTHS.search(key) else smaller


def _sections(name: Any, value: Any, by_width: int) -> Any:
    if "section" in str(name) and isinstance(value, list):
        return [max(1, part // by_width) for part in value]
    return (
        {key: _sections(key, part, by_width) for key, part in value.items()}
        if isinstance(value, dict)
        else value
    )


def _keep_tokens_inside(values: dict[str, Any]) -> None:
    size = values.get("vocab_size")
    if not isinstance(size, int):
        return
    for key, value in values.items():
        if key.endswith("token_id") and isinstance(value, int) and value >= size:
            values[key] = size - 1 if re.search("image|video|audio", key) else 0
