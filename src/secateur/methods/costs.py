"""The least costs of a model, by its shapes: bytes and operations of a token."""

from typing import Any

from torch import nn

from secateur.facts import Costs, Workload
from secateur.model.bind import head_width, num_kv_heads


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
