"""What one unit costs of a target (parameters, FLOPs, cache bytes, latency), and what a model needs at the least."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

from torch import nn

from secateur.errors import RecipeError
from secateur.facts import Costs, Workload
from secateur.methods.budget import Prices
from secateur.model.bind import Arch, decoder_layers
from secateur.model.group import Group, linear


def least_costs(model: Any, workload: Workload) -> Costs:
    """Return bytes per decoded token, operations per prompt token and cache bytes per token of context."""
    return Costs(
        decode_bytes_per_token(model, workload),
        prefill_flops_per_token(model, workload.prompt_tokens),
        kv_cache_bytes_per_token(model),
    )


def kv_cache_bytes_per_token(model: Any) -> int:
    """Return what one token of context keeps in the cache: 2 (K and V) * L * KV heads * head_dim * bytes per value."""
    _, num_kv_channels = _attention(model)
    return 2 * num_kv_channels * model.dtype.itemsize


def decode_bytes_per_token(model: Any, workload: Workload) -> float:
    """Return the bytes read per decoded token: (weights + B * embedding row) / B + cache of the context.

    Every weight is read once for the whole batch; of the embedding only the B rows looked up, unless it is tied to the
    head, which is read whole. Tied weights count once. The context is its mean over the N - 1 measured steps: the step
    after the i-th new token attends to T + i tokens, so T + N / 2.
    """
    embedding, head = model.get_input_embeddings().weight, _head(model).weight
    assert isinstance(embedding, nn.Parameter)
    weights = sum(
        parameter.nbytes for parameter in model.parameters() if parameter is not embedding or head is embedding
    )
    row = embedding.nbytes / len(embedding)
    mean_context = workload.prompt_tokens + workload.new_tokens / 2
    return weights / workload.batch + row + mean_context * kv_cache_bytes_per_token(model)


def prefill_flops_per_token(model: Any, prompt_tokens: int) -> float:
    """Return the operations per prompt token: 2 * weights of linears + attention + head / T.

    Attention: every head multiplies each query with the keys up to its own and the weights with their values,
    4 * head_dim operations per pair; a token attends to (T + 1) / 2 tokens on average. The head runs at the last
    position only, as generation does it.
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
    """Return query and KV channels of all layers together: heads * head_dim, by each layer's own config."""
    config: Any = model.config.get_text_config()
    layers = config.per_layer_config if config.is_heterogeneous else [config] * config.num_hidden_layers
    num_query_channels = num_kv_channels = 0
    for layer in layers:
        head_dim = getattr(layer, "head_dim", None) or layer.hidden_size // layer.num_attention_heads
        num_query_channels += layer.num_attention_heads * head_dim
        num_kv_channels += _num_kv_heads(layer) * head_dim
    return num_query_channels, num_kv_channels


def _num_kv_heads(config: Any) -> int:
    """Return the number of KV heads; families without grouped queries have as many as query heads."""
    if getattr(config, "multi_query", False):  # Falcon
        return config.num_kv_heads if config.new_decoder_architecture else 1
    return getattr(config, "num_key_value_heads", None) or config.num_attention_heads


DEFAULT_SEQUENCE_LENGTH = 512
# The group whose units are kept in the cache, by the name that every family's spec gives it.
CACHED_GROUP = "kv_heads"
PICOSECONDS, PICOSECONDS_PER_MS = 1e12, 10**9


@runtime_checkable
class Seconds(Protocol):
    """Seconds per decoded token: of the dense model, of one of its layers, of one unit of each group by its name."""

    total: float
    per_layer: float
    per_unit: dict[str, float]


def prices_of(
    target: str, arch: Arch, groups: tuple[Group, ...], model: Any, *, prompt_tokens: int, seconds: Seconds | None
) -> Prices:
    """Return what the dense model costs of `target`, and a unit of each of these groups.

    parameters: weights and biases; all of the model's, tied ones once.
    flops: per token of a prompt of `prompt_tokens`, see `ideal.prefill_flops_per_token`.
    kv_bytes: per token of context, see `ideal.kv_cache_bytes_per_token`.
    latency: the measured `seconds`, in picoseconds per decoded token.

    Raises RecipeError if a group has no price, or if the seconds of `latency` are not there.
    """
    return PRICES[target](arch, groups, model, prompt_tokens, seconds)


def sequence_length(asked: int | None, config: Any) -> int:
    """Return the tokens of a calibration block. Raises RecipeError if the model has fewer positions."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None)
    length = asked or min(DEFAULT_SEQUENCE_LENGTH, longest or DEFAULT_SEQUENCE_LENGTH)
    if longest is not None and length > longest:
        raise RecipeError(
            f"calibration.sequence_length: {length} is longer than the model's {longest} positions; set it to at most "
            f"{longest}."
        )
    return length


def parameter_prices(arch: Arch, groups: tuple[Group, ...], model: nn.Module) -> Prices:
    """Return prices in parameters."""
    per_unit = {(group.layer, group.name): group.params_per_unit for group in groups}
    total = sum(parameter.numel() for parameter in model.parameters())
    return Prices(per_unit, arch.params_per_layer, total, "parameters")


def flop_prices(arch: Arch, groups: tuple[Group, ...], model: Any, prompt_tokens: int) -> Prices:
    """Return prices in operations per prompt token.

    A unit: 2 * weights of its rows and columns. One of attention also 4 * its query channels * (T + 1) / 2, for the
    products of queries with keys and of weights with values at the mean context of a prompt of T tokens. Biases, as
    all that is no matrix product, are free.
    """
    layers = decoder_layers(model, arch)
    per_unit = {}
    for group in groups:
        layer = layers[group.layer]
        weights = sum(sum(axis.segments) * linear(layer, axis.module).in_features for axis in group.writers)
        weights += group.width * linear(layer, group.reader.module).out_features
        per_unit[group.layer, group.name] = 2 * weights
        if arch.is_in_attention(group):
            per_unit[group.layer, group.name] += 2 * group.width * (prompt_tokens + 1)
    # Several groups may say how to cut one layer's attention; its query channels are the same in all.
    query_channels = {g.layer: g.num_units * g.width for g in arch.groups if arch.is_in_attention(g)}
    per_layer = tuple(
        2 * sum(module.weight.numel() for module in layer.modules() if isinstance(module, nn.Linear))
        + 2 * query_channels.get(index, 0) * (prompt_tokens + 1)
        for index, layer in enumerate(layers)
    )
    total = round(prefill_flops_per_token(model, prompt_tokens))
    return Prices(per_unit, per_layer, total, "FLOPs per prompt token")


def kv_byte_prices(arch: Arch, groups: tuple[Group, ...], model: Any) -> Prices:
    """Return prices in bytes of KV cache per token of context: of a unit, its keys and values.

    Raises RecipeError naming the group that is in the cache if another one is among them.
    """
    for group in groups:
        if group.name != CACHED_GROUP:
            raise RecipeError(
                f"remove.groups: {group.name} has nothing in the KV cache, so target kv_bytes cannot be met by it; "
                f"use groups: [{CACHED_GROUP}] alone."
            )
    # The writers make queries, keys and values, of which the reader's inputs are as many as the queries.
    bytes_of = {
        g.layer: (sum(sum(axis.segments) for axis in g.writers) - g.width) * model.dtype.itemsize for g in groups
    }
    units_of = {group.layer: group.num_units for group in groups}
    total = kv_cache_bytes_per_token(model)
    return Prices(
        {(layer, CACHED_GROUP): price for layer, price in bytes_of.items()},
        tuple(bytes_of.get(layer, 0) * units_of.get(layer, 0) for layer in range(arch.num_layers)),
        total,
        "bytes of KV cache per token",
    )


def _latency_prices(measured: Seconds | None, arch: Arch, groups: tuple[Group, ...]) -> Prices:
    if measured is None:
        raise RecipeError(
            "remove.target: latency plans with measured seconds; `secateur inspect` with this recipe "
            "measures them, put what "
            "it shows under prices."
        )
    for group in groups:
        if group.name not in measured.per_unit:
            raise RecipeError(
                f"prices.per_unit: has no seconds for {group.name}, only for {', '.join(measured.per_unit)}; leave "
                f"prices out to have them measured."
            )

    def whole(seconds: float) -> int:
        return max(1, round(seconds * PICOSECONDS))

    return Prices(
        {(g.layer, g.name): whole(measured.per_unit[g.name]) for g in groups},
        (whole(measured.per_layer),) * arch.num_layers,
        whole(measured.total),
        "ms per decoded token",
        PICOSECONDS_PER_MS,
    )


# By the recipe's `target`, whose names `recipe.TargetName` repeats.
PRICES: dict[str, Callable[[Arch, tuple[Group, ...], Any, int, Seconds | None], Prices]] = {
    "parameters": lambda arch, groups, model, *_: parameter_prices(arch, groups, model),
    "flops": lambda arch, groups, model, prompt_tokens, _: flop_prices(arch, groups, model, prompt_tokens),
    "kv_bytes": lambda arch, groups, model, *_: kv_byte_prices(arch, groups, model),
    "latency": lambda arch, groups, model, prompt_tokens, seconds: _latency_prices(seconds, arch, groups),
}
