"""The cost of one unit in each target, and the least costs of a model."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from secateur.errors import RecipeError
from secateur.facts import Costs, Workload
from secateur.methods.budget import Prices
from secateur.model.bind import Arch
from secateur.model.group import Group


def least_costs(model: Any, workload: Workload) -> Costs:
    """Return bytes per decoded token, FLOPs per prompt token and cache bytes per token."""
    flops = prefill_flops_per_token(model, workload.prompt_tokens)
    return Costs(decode_bytes_per_token(model, workload), flops, kv_cache_bytes_per_token(model))


def kv_cache_bytes_per_token(model: Any) -> int:
    """Return 2 (K and V) * L * KV heads * head_dim * bytes per value."""
    _, num_kv_channels = _attention(model)
    return 2 * num_kv_channels * model.dtype.itemsize


def decode_bytes_per_token(model: Any, workload: Workload) -> float:
    """Return bytes per decoded token: (weights + B * embedding row) / B + cache of the context.

    Every weight is read once per batch, tied ones too; of an embedding that is not the head, only B
    rows are. The context is its mean over the measured steps: step i attends to T + i tokens, so
    T + N / 2.
    """
    embedding, head = model.get_input_embeddings().weight, _head(model).weight
    assert isinstance(embedding, nn.Parameter)
    weights = sum(each.nbytes for each in model.parameters() if each is not embedding or head is embedding)
    row = embedding.nbytes / len(embedding)
    mean_context = workload.prompt_tokens + workload.new_tokens / 2
    return weights / workload.batch + row + mean_context * kv_cache_bytes_per_token(model)


def prefill_flops_per_token(model: Any, prompt_tokens: int) -> float:
    """Return the operations per prompt token: 2 * weights of linears + attention + head / T.

    Attention multiplies each query with the keys up to its own, and the weights with their values:
    4 * head_dim operations per pair. A token attends to (T + 1) / 2 tokens on average. As in
    generation, the head runs at the last position only.
    """
    head = _head(model)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    num_query_channels, _ = _attention(model)
    attention = 4 * num_query_channels * (prompt_tokens + 1) / 2
    return 2 * sum(linear.weight.numel() for linear in linears) + attention + 2 * head.weight.numel() / prompt_tokens


def _head(model: Any) -> nn.Linear:
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head


def _attention(model: Any) -> tuple[int, int]:
    """Return the query and KV channels of all layers: heads * head_dim by each layer's config."""
    config: Any = model.config.get_text_config()
    layers = config.per_layer_config if config.is_heterogeneous else [config] * config.num_hidden_layers
    num_query_channels = num_kv_channels = 0
    for layer in layers:
        head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        num_query_channels += layer.num_attention_heads * head_dim
        num_kv_channels += _num_kv_heads(layer) * head_dim
    return num_query_channels, num_kv_channels


def _num_kv_heads(config: Any) -> int:
    """Return the number of KV heads: that of query heads in families without grouped queries."""
    if getattr(config, "multi_query", False):  # Falcon
        return config.num_kv_heads if config.new_decoder_architecture else 1
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


DEFAULT_SEQUENCE_LENGTH = 512
# The group whose units are in the cache, by its name in every family's spec.
CACHED_GROUP = "kv_heads"
PICOSECONDS, PICOSECONDS_PER_MS = 1e12, 10**9


@dataclass(frozen=True, slots=True)
class Seconds:
    """Seconds per decoded token: of the dense model, of one layer, of one unit by group name."""

    total: float
    per_layer: float
    per_unit: dict[str, float]


def prices_of(target: str, arch: Arch, groups: tuple[Group, ...], model: Any, seconds: Seconds | None = None) -> Prices:
    """Return the dense model's cost of `target`, and that of a unit of each of these groups.

    parameters: weights and biases; the total counts tied ones once.
    kv_bytes: per token of context, see `kv_cache_bytes_per_token`.
    latency: the measured `seconds`, in picoseconds per decoded token.
    Raises RecipeError if a group has no price.
    """
    return PRICES[target](arch, groups, model, seconds)


def sequence_length(asked: int | None, config: Any) -> int:
    """Return the tokens of a block. Raises RecipeError if the model has fewer positions."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = asked or min(DEFAULT_SEQUENCE_LENGTH, longest or DEFAULT_SEQUENCE_LENGTH)
    if longest is not None and length > longest:
        raise RecipeError(
            f"calibration.sequence_length: {length} is longer than the model's {longest} positions; "
            f"set it to at most {longest}."
        )
    return length


def token_prices(target: str, model: Any, num_tokens: int) -> int:
    """Return what tokens cost: their rows of embedding and head.

    Raises RecipeError for a target in which tokens have no price.
    """
    embedding, head = model.get_input_embeddings(), _head(model)
    if target != "parameters":
        raise RecipeError(
            f"remove.vocabulary: tokens have no price in target {target}; use parameters, or leave it out."
        )
    own = 0 if head.weight is embedding.weight else head.in_features
    return num_tokens * (embedding.embedding_dim + own + (head.bias is not None))


def parameter_prices(arch: Arch, groups: tuple[Group, ...], model: nn.Module) -> Prices:
    """Return prices in parameters."""
    per_unit = {(group.layer, group.name): group.params_per_unit for group in groups}
    total = sum(parameter.numel() for parameter in model.parameters())
    return Prices(per_unit, arch.params_per_layer, total, "parameters")


def kv_byte_prices(arch: Arch, groups: tuple[Group, ...], model: Any) -> Prices:
    """Return prices in bytes of KV cache per token. Raises RecipeError for a group not cached."""
    for group in groups:
        if group.name != CACHED_GROUP:
            raise RecipeError(
                f"remove.groups: {group.name} has nothing in the KV cache, so target kv_bytes cannot be met by it; "
                f"use groups: [{CACHED_GROUP}] alone."
            )
    # The writers make queries, keys and values; the reader has as many inputs as there are queries.
    bytes_of = {
        g.layer: (sum(sum(axis.segments) for axis in g.writers) - g.width) * model.dtype.itemsize for g in groups
    }
    units_of = {group.layer: group.num_units for group in groups}
    per_unit = {(layer, CACHED_GROUP): price for layer, price in bytes_of.items()}
    per_layer = tuple(bytes_of.get(layer, 0) * units_of.get(layer, 0) for layer in range(arch.num_layers))
    return Prices(per_unit, per_layer, kv_cache_bytes_per_token(model), "bytes of KV cache per token")


def _latency_prices(measured: Seconds | None, arch: Arch, groups: tuple[Group, ...]) -> Prices:
    if measured is None:
        raise RecipeError(
            "remove.target: latency plans with seconds that prune and inspect measure; use another target here."
        )

    def whole(seconds: float) -> int:
        return max(1, round(seconds * PICOSECONDS))

    per_unit = {(g.layer, g.name): whole(measured.per_unit[g.name]) for g in groups}
    per_layer = (whole(measured.per_layer),) * arch.num_layers
    return Prices(per_unit, per_layer, whole(measured.total), "ms per decoded token", PICOSECONDS_PER_MS)


# By the recipe's `target`. `recipe.TargetName` repeats the names.
PRICES: dict[str, Callable[[Arch, tuple[Group, ...], Any, Seconds | None], Prices]] = {
    "parameters": lambda arch, groups, model, _: parameter_prices(arch, groups, model),
    "kv_bytes": lambda arch, groups, model, _: kv_byte_prices(arch, groups, model),
    "latency": lambda arch, groups, model, seconds: _latency_prices(seconds, arch, groups),
}
