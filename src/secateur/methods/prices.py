"""What layers and tokens take of a model's parameters, and the least costs of a model."""

import math
from typing import Any

from torch import nn

from secateur.errors import RecipeError
from secateur.facts import Costs, Workload
from secateur.methods.budget import Prices
from secateur.model.bind import Arch, head_width, num_kv_heads


def weight_size(model: Any) -> float:
    """Return the root mean square of the weights in matrices, embedding and head left out."""
    words = (model.get_input_embeddings(), model.get_output_embeddings())
    left_out = {id(parameter) for module in words for parameter in module.parameters()}
    matrices = [each for each in model.parameters() if each.dim() > 1 and id(each) not in left_out]
    squares = sum(each.double().square().sum().item() for each in matrices)
    return math.sqrt(squares / sum(each.numel() for each in matrices))


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
        num_query_channels += layer.num_attention_heads * head_width(layer)
        num_kv_channels += num_kv_heads(layer) * head_width(layer)
    return num_query_channels, num_kv_channels


DEFAULT_SEQUENCE_LENGTH = 512


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


def token_prices(model: Any, num_tokens: int) -> int:
    """Return the parameters of tokens: their rows of embedding and head."""
    embedding, head = model.get_input_embeddings(), _head(model)
    own = 0 if head.weight is embedding.weight else head.in_features
    return num_tokens * (embedding.embedding_dim + own + (head.bias is not None))


def prices_of(arch: Arch, model: nn.Module) -> Prices:
    """Return the parameters of each layer and of the whole model."""
    return Prices(arch.params_per_layer, sum(parameter.numel() for parameter in model.parameters()))
