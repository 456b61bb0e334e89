"""SliceGPT as published: the residual stream rotated to its principal components and sliced.

Ashkboos et al., arXiv 2401.15024; official code github.com/microsoft/TransformerCompression. Each
residual connection keeps a matrix of its own between two bases. No stock Llama config holds one,
and folding them away would need one basis for the whole stream, so a result stays in memory.
"""

from typing import Any

import torch
from pruned import Pruned, count_parameters
from torch import Tensor, nn
from transformers import PreTrainedModel

# Of the mean of the diagonal, as in the official `pca_calc`.
DAMPING = 0.01


class MeanSquareNorm(nn.Module):
    """x / sqrt(sum(x^2) / D + eps) with D the dense width; a stock norm divides by the sliced one."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.width, self.eps = width, eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x over its root mean square, in x's dtype."""
        x32 = x.float()
        return (x32 * torch.rsqrt(x32.square().sum(-1, keepdim=True) / self.width + self.eps)).to(x.dtype)


class SlicedLayer(nn.Module):
    """A Llama layer whose two residual connections change the basis."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.self_attn, self.mlp = layer.self_attn, layer.mlp
        self.input_layernorm, self.post_attention_layernorm = layer.input_layernorm, layer.post_attention_layernorm
        self.attention_basis: nn.Module = nn.Identity()
        self.mlp_basis: nn.Module = nn.Identity()

    def forward(self, hidden_states: Tensor, **keywords: Any) -> Tensor:
        """Return the layer's output in the basis of the next layer."""
        added, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **keywords)
        hidden_states = self.attention_basis(hidden_states) + added
        added = self.mlp(self.post_attention_layernorm(hidden_states))
        return self.mlp_basis(hidden_states) + added


def principal_basis(hidden: list[Tensor]) -> Tensor:
    """Return the eigenvectors of sum x'x, damped, by falling eigenvalue; (D, D) in float64.

    Officially all is float64. Products of two bfloat16 numbers are exact in float32, so for such a
    stream each block is summed there, in half the time.
    """
    exact = torch.float32 if hidden[0].dtype == torch.bfloat16 else torch.float64
    gram = torch.zeros(hidden[0].shape[-1], hidden[0].shape[-1], dtype=torch.float64)
    with torch.autocast("cpu", enabled=False):
        for x in hidden:
            x_TD = x.flatten(0, -2).to(exact)
            gram += x_TD.T @ x_TD
    gram.diagonal().add_(DAMPING * gram.diagonal().mean())
    return torch.linalg.eigh(gram).eigenvectors.flip(1)


class RotatedEmbedding(nn.Module):
    """The dense embedding, its mean taken off, then taken to the sliced basis."""

    def __init__(self, embedding: Any, basis_DS: Tensor) -> None:
        super().__init__()
        self.embedding = embedding
        centred_DS = basis_DS - basis_DS.mean(0, keepdim=True)
        self.basis = _basis_change(torch.eye(len(basis_DS), dtype=torch.float64), centred_DS, embedding.weight.dtype)

    def forward(self, ids: Tensor) -> Tensor:
        """Return (E x - mean) Q for each token."""
        return self.basis(self.embedding(ids))


def fuse_norms(model: PreTrainedModel, *, tied: bool) -> None:
    """Move the norms' weights into the linears behind them; the head gets weights of its own.

    As officially, each embedding loses its mean, which changes a model with RMS norms a little.
    `tied`: embedding, head and last norm stay as they are.
    """
    width, eps = model.config.hidden_size, model.config.rms_norm_eps
    if not tied:
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.data.clone())
        model.config.tie_word_embeddings = False
        embedding = model.get_input_embeddings().weight
        embedding.data = (embedding.data.double() - embedding.data.double().mean(-1, keepdim=True)).to(embedding.dtype)
        _fuse(model.model.norm, model.lm_head)
        model.model.norm = MeanSquareNorm(width, eps)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        _fuse(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        _fuse(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        layer.input_layernorm, layer.post_attention_layernorm = MeanSquareNorm(width, eps), MeanSquareNorm(width, eps)


def _fuse(norm: Any, *linears: Any) -> None:
    for linear in linears:
        weight = linear.weight.data.double() * norm.weight.data.double()
        linear.weight = nn.Parameter(weight.to(linear.weight.dtype))


def _set(linear: Any, weight: Tensor) -> None:
    linear.weight = nn.Parameter(weight.to(linear.weight.dtype).contiguous())
    linear.out_features, linear.in_features = weight.shape


def _read_in(basis_DS: Tensor, *linears: Any) -> None:
    """Let linears read the sliced stream x Q: W becomes W Q."""
    for linear in linears:
        _set(linear, linear.weight.data.double() @ basis_DS)


def _write_in(basis_DS: Tensor, linear: Any) -> None:
    """Let a linear write to the sliced stream: W becomes Q'W, its bias Q'b."""
    _set(linear, basis_DS.T @ linear.weight.data.double())
    if linear.bias is not None:
        linear.bias = nn.Parameter((basis_DS.T @ linear.bias.data.double()).to(linear.bias.dtype))


def _basis_change(before_DS: Tensor, after_DS: Tensor, dtype: torch.dtype) -> nn.Linear:
    """Return x -> x Q_before' Q_after as a linear."""
    linear = nn.Linear(before_DS.shape[1], after_DS.shape[1], bias=False)
    _set(linear, after_DS.T @ before_DS)
    return linear.to(dtype)


@torch.no_grad()
def layer_calls(model: PreTrainedModel, blocks_NT: Tensor) -> tuple[list[Tensor], dict[str, Any]]:
    """Return the first layer's inputs, block by block, and its other arguments."""
    inputs: list[Tensor] = []
    others: dict[str, Any] = {}

    class Enough(Exception):
        pass

    def note(_: nn.Module, positional: tuple[Tensor, ...], keywords: dict[str, Any]) -> None:
        inputs.append(positional[0])
        others.update(keywords)
        raise Enough

    handle = model.model.layers[0].register_forward_pre_hook(note, with_kwargs=True)
    for ids_T in blocks_NT:
        try:
            model.model(ids_T[None], use_cache=False)
        except Enough:
            pass
    handle.remove()
    return inputs, others


@torch.no_grad()
def rotate_and_slice(model: PreTrainedModel, blocks_NT: Tensor, width: int, *, tied: bool = False) -> None:
    """Slice the stream to `width` dimensions, layer by layer on the sliced stream, in place.

    The stream behind the last layer keeps all dimensions, as the official default
    (`do_slice_head=False`). The official random rotation inside the sliced basis changes no output
    and is left out. `tied`: embedding and head keep the dense basis.
    """
    hidden, others = layer_calls(model, blocks_NT)
    if tied:
        hidden = [x - x.mean(-1, keepdim=True) for x in hidden]
    dtype = model.lm_head.weight.dtype
    full_DD = principal_basis(hidden)
    basis_DS = full_DD[:, :width]
    embedding: Any = model.model.embed_tokens
    if tied:
        model.model.embed_tokens = RotatedEmbedding(embedding, basis_DS)
    else:
        embedding.weight = nn.Parameter((embedding.weight.data.double() @ basis_DS).to(dtype))
        embedding.embedding_dim = width
    layers: Any = model.model.layers
    for index, stock in enumerate(layers):
        layer, last = SlicedLayer(stock), index == len(layers) - 1
        layers[index] = layer
        attention, mlp = layer.self_attn, layer.mlp
        _read_in(basis_DS, attention.q_proj, attention.k_proj, attention.v_proj)
        for place, x in enumerate(hidden):
            sliced = x @ basis_DS.to(x.dtype)
            added, _ = attention(hidden_states=layer.input_layernorm(sliced), **others)
            hidden[place] = added + sliced @ basis_DS.T.to(x.dtype)
        middle_DS = principal_basis(hidden)[:, :width]
        layer.attention_basis = _basis_change(basis_DS, middle_DS, dtype)
        _write_in(middle_DS, attention.o_proj)
        _read_in(middle_DS, mlp.gate_proj, mlp.up_proj)
        for place, x in enumerate(hidden):
            sliced = x @ middle_DS.to(x.dtype)
            added = mlp(layer.post_attention_layernorm(sliced))
            hidden[place] = added + sliced @ middle_DS.T.to(x.dtype)
        full_DD = torch.eye(len(basis_DS), dtype=torch.float64) if tied and last else principal_basis(hidden)
        basis_DS = full_DD if last else full_DD[:, :width]
        layer.mlp_basis = _basis_change(middle_DS, basis_DS, dtype)
        _write_in(basis_DS, mlp.down_proj)
    if not tied:
        _read_in(basis_DS, model.lm_head)


def width_for(model: PreTrainedModel, share: float, *, tied: bool) -> int:
    """Return the sliced width at which the count of parameters is nearest to 1 - `share`.

    With V words, D dimensions, L layers and R parameters per layer and dimension that read or write
    the stream, d remain of D in: V d (embedding) + V D (head) + L R d + (2 L - 1) d^2 + d D, and
    (D - d) more rows of the last `down_proj`. `tied`: V D + D d + D instead of V d + V D.
    """
    config, layer = model.config, model.model.layers[0]
    dense, vocabulary, num_layers = config.hidden_size, config.vocab_size, len(model.model.layers)
    attention, mlp = layer.self_attn, layer.mlp
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj)
    biases = sum(linear.bias.numel() for linear in linears if linear.bias is not None) * num_layers
    per_dimension = sum(linear.out_features for linear in linears)
    per_dimension += attention.o_proj.in_features + mlp.down_proj.in_features

    def remaining(width: int) -> int:
        streams = num_layers * per_dimension * width + mlp.down_proj.in_features * (dense - width)
        shortcuts = (2 * num_layers - 1) * width**2 + width * dense
        words = vocabulary * dense + dense * width + dense if tied else vocabulary * (width + dense)
        return words + streams + shortcuts + biases

    wanted = (1 - share) * count_parameters(model)
    return min(range(1, dense + 1), key=lambda width: abs(remaining(width) - wanted))


def sliced(model: PreTrainedModel, blocks_NT: Tensor, share: float, *, tied: bool) -> Pruned:
    """Slice to the width at which `share` of all parameters is gone; `tied`: see `slicegpt_tied`."""
    dense, was_tied = model.config.hidden_size, model.config.tie_word_embeddings
    assert was_tied or not tied, "only a tied embedding can stay tied"
    width = width_for(model, share, tied=tied)
    fuse_norms(model, tied=tied)
    rotate_and_slice(model, blocks_NT, width, tied=tied)
    head = "; the tied head became one of its own" if was_tied and not tied else ""
    notes = f"{width} of {dense} dimensions ({1 - width / dense:.0%} sliced){head}; no stock config stores it"
    return Pruned(model, count_parameters(model), "none", notes)


def prune(model: PreTrainedModel, blocks_NT: Tensor, share: float, seed: int) -> Pruned:
    """Slice to the width at which `share` of all parameters is gone. Nothing is random.

    A tied head gets weights of its own, as officially: its basis is another than the embedding's.
    For a small model with many words that costs much of what slicing gains.
    """
    return sliced(model, blocks_NT, share, tied=False)
