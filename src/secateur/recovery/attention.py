"""Attention in training on processors, by products of blocks.

torch's kernel for processors goes over small tiles one head at a time. Here the query heads of a KV
head are one product, and no block is computed that lies behind the diagonal. On one core of an AMD
EPYC that is half of the kernel's time (LOG, 2026-11-28, late).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

BLOCK = 64  # queries at a time: with more, more products lie behind the diagonal


def attention_in_training(recomputed: bool) -> AbstractContextManager[Any]:
    """Return `CausalInBlocks`, or nothing if the backward pass computes layers again: torch leaves modes there."""
    return nullcontext() if recomputed else CausalInBlocks()


class CausalInBlocks(TorchFunctionMode):
    """While it is entered, causal `scaled_dot_product_attention` on a processor is `causal_attention`."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call what was called, or `causal_attention` in its place."""
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention and _is_plain(*args, **kwargs):
            return causal_attention(*args[:3], scale=kwargs.get("scale"))
        return func(*args, **kwargs)


def _is_plain(query: Tensor, key: Tensor, value: Tensor, *positional: Any, **kwargs: Any) -> bool:
    """Return whether this is attention of each token to itself and those before it, and nothing else."""
    batch, num_heads, length = query.shape[:3] if query.ndim == 4 else (0, 0, 0)
    groups = key.shape[1] if kwargs.get("enable_gqa") and key.ndim == 4 else num_heads
    same = key.shape[:3] == value.shape[:3] == (batch, groups, length)
    other = positional or kwargs.get("attn_mask") is not None or kwargs.get("dropout_p")
    return bool(kwargs.get("is_causal") and same and not other) and query.device.type == "cpu"


def causal_attention(
    query: Float[Tensor, "B H T D"],
    key: Float[Tensor, "B G T D"],
    value: Float[Tensor, "B G T E"],
    scale: float | None = None,
) -> Float[Tensor, "B H T E"]:
    """Return softmax(scale * query key^T over tokens up to the own one) value, with its gradient.

    Each of the G key heads serves H / G neighbouring query heads. `scale` None: 1 / sqrt(D). Under
    autocast all are computed in its dtype, as torch's function does.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    return _Causal.apply(query, key, value, scale)


class _Causal(torch.autograd.Function):
    """Nothing of T x T numbers is kept: the backward pass computes each block's probabilities again.

    N = B * G; Q = H / G query heads of a key head; S queries of a block, K keys up to its last.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        """Return the attention."""
        batch, num_heads, length, _ = query.shape
        query_NQTD = (query * scale).reshape(batch * key.shape[1], -1, length, query.shape[-1])
        key_NTD, value_NTE = key.flatten(0, 1), value.flatten(0, 1)
        out_NQTE = value.new_empty(*query_NQTD.shape[:3], value.shape[-1])
        for start in range(0, length, BLOCK):
            rows, last = slice(start, start + BLOCK), min(start + BLOCK, length)
            weight_NPK = _probabilities(query_NQTD, key_NTD, start, last)
            out_NPE = torch.bmm(weight_NPK, value_NTE[:, :last])
            out_NQTE[:, :, rows] = out_NPE.unflatten(1, (-1, last - start))
        ctx.save_for_backward(query_NQTD, key_NTD, value_NTE, out_NQTE)
        ctx.scale = scale
        return out_NQTE.view(batch, num_heads, length, -1)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Return the gradients: with P the probabilities, dS = P * (dP - sum of dP P over keys)."""
        query_NQTD, key_NTD, value_NTE, out_NQTE = ctx.saved_tensors
        batch, length = outer.shape[0], outer.shape[2]
        outer_NQTE = outer.reshape(out_NQTE.shape)
        sum_NQT1 = (outer_NQTE * out_NQTE).sum(-1, keepdim=True)
        of_query, of_key, of_value = map(torch.zeros_like, (query_NQTD, key_NTD, value_NTE))
        for start in range(0, length, BLOCK):
            rows, last = slice(start, start + BLOCK), min(start + BLOCK, length)
            weight_NPK = _probabilities(query_NQTD, key_NTD, start, last)
            outer_NPE = outer_NQTE[:, :, rows].flatten(1, 2)
            of_value[:, :last].baddbmm_(weight_NPK.mT, outer_NPE)
            of_score_NPK = torch.bmm(outer_NPE, value_NTE[:, :last].mT)
            of_score_NPK.sub_(sum_NQT1[:, :, rows].flatten(1, 2)).mul_(weight_NPK)
            of_query_NPD = torch.bmm(of_score_NPK, key_NTD[:, :last])
            of_query[:, :, rows] = of_query_NPD.unflatten(1, (-1, last - start))
            of_key[:, :last].baddbmm_(of_score_NPK.mT, query_NQTD[:, :, rows].flatten(1, 2))
        of_query.mul_(ctx.scale)
        return *(
            gradient.view(batch, -1, length, gradient.shape[-1]) for gradient in (of_query, of_key, of_value)
        ), None


def _probabilities(query_NQTD: Tensor, key_NTD: Tensor, start: int, last: int) -> Tensor:
    """Return what the queries from `start` to `last` give to each key up to `last`, N x (Q S) x K."""
    num_rows = last - start
    query_NPD = query_NQTD[:, :, start:last].flatten(1, 2)
    score_NQSK = torch.bmm(query_NPD, key_NTD[:, :last].mT).unflatten(1, (-1, num_rows))
    later_SS = score_NQSK.new_full((num_rows, num_rows), float("-inf")).triu_(1)
    score_NQSK[..., start:] += later_SS
    return score_NQSK.softmax(-1).flatten(1, 2)
