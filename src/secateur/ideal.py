"""The ideal: what a model must read and compute at the least, and so how much faster a smaller one can become.

In: a causal LM (the meta device will do) and the lengths of a run. Out: bytes and floating-point operations. Writing
one token is bound by the bytes that must be read for it, reading a prompt by its operations. Not counted: norms,
activation functions, softmax, what a program does beside its matrix products. Not handled: experts, sliding windows.

B prompts, T prompt tokens, N new tokens, L layers, V vocabulary.
"""

from typing import Any

from torch import nn

from secateur.facts import Costs, Workload


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
