"""What training minimises, from what the head reads to nats, without logits of all positions.

In: two models' last hidden states and heads. Out: the loss, with its gradient. Logits, a block's
largest tensor where there are many words, exist for `HEAD_POSITIONS` positions at a time.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.model.bind import Arch, head_of
from secateur.model.modules import forwards_replaced
from secateur.recovery.weights import HEAD_POSITIONS
from secateur.stream.losses import states_of

CACHED_POSITIONS = 8  # at a time in float32 on a processor; more do not fit the cache of a core

# What a head reads at the predicting positions, and the head.
Teacher = tuple[Float[Tensor, "P E"], nn.Module]


def distillation_loss(
    states_PD: Float[Tensor, "P D"],
    head: nn.Module,
    next_P: Int[Tensor, " P"],
    teacher: Teacher | None,
    *,
    kl_share: float = 1.0,
    reverse: bool = False,
) -> Float[Tensor, ""]:
    """Return mean_P of s * KL(p || q) - (1 - s) * log q(next), in nats.

    s: `kl_share`; q = softmax(head(states)); p: the same of `teacher`, which gets no gradient.
    `reverse`: KL(q || p) in place of KL(p || q). `teacher` None: plain cross-entropy.

    Source: Hinton, Vinyals, Dean, arXiv 1503.02531, section 2, at a temperature of 1; reversed: Gu
    et al., arXiv 2306.08543, section 2.1, of each token's distribution.
    """
    share = 0.0 if teacher is None else kl_share
    teacher = teacher if share > 0 else None
    return _Distillation.apply(states_PD, head, next_P, teacher, share, reverse, *head.parameters())


class _Distillation(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states_PD: Tensor,
        head: nn.Module,
        next_P: Tensor,
        teacher: Teacher | None,
        share: float,
        reverse: bool,
        *weights: Tensor,
    ) -> Tensor:
        """Return the loss; compute its gradients on the way, slice by slice."""
        trained = [weight for weight in weights if weight.requires_grad]
        of_states_PD = torch.empty_like(states_PD)
        of_weights = [torch.zeros_like(weight) for weight in trained]
        total = states_PD.new_zeros((), dtype=torch.float64)
        for start in range(0, len(states_PD), HEAD_POSITIONS):
            part = slice(start, start + HEAD_POSITIONS)
            with torch.enable_grad():
                states_SD = states_PD[part].detach().requires_grad_()
                logits_SV = head(states_SD)
            dense_SV = None if teacher is None else teacher[1](teacher[0][part])
            nats, gradient_SV = _loss_and_gradient(
                logits_SV.detach(), next_P[part], dense_SV, share, len(states_PD), reverse=reverse
            )
            total += nats
            of_states_PD[part], *gradients = torch.autograd.grad(
                logits_SV, (states_SD, *trained), gradient_SV
            )
            for gradient, more in zip(of_weights, gradients, strict=True):
                gradient += more
        ctx.save_for_backward(of_states_PD, *of_weights)
        return (total / len(states_PD)).float()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Scale the saved gradients, in place: autograd refuses a second call."""
        of_states_PD, *of_weights = (
            gradient.mul_(outer.to(gradient.dtype)) for gradient in ctx.saved_tensors
        )
        gradients = iter(of_weights)
        return of_states_PD, *(
            next(gradients) if is_trained else None for is_trained in ctx.needs_input_grad[1:]
        )


def _loss_and_gradient(
    logits_SV: Tensor,
    next_S: Tensor,
    dense_SV: Tensor | None,
    share: float,
    num_positions: int,
    *,
    reverse: bool,
) -> tuple[Tensor, Tensor]:
    """Return the sum of losses, and the gradient of their mean over `num_positions`, in the logits'
    dtype.
    """
    gradient_SV = torch.empty_like(logits_SV)
    total = logits_SV.new_zeros((), dtype=torch.float64)
    rows = CACHED_POSITIONS if logits_SV.device.type == "cpu" else len(logits_SV)
    for start in range(0, len(logits_SV), rows):
        part = slice(start, start + rows)
        logits, next_R1 = logits_SV[part].float(), next_S[part, None]
        gradient, log_sum = _softmax(logits)
        loss_R = (share - 1) * (logits.gather(1, next_R1)[:, 0] - log_sum)
        if dense_SV is not None:
            dense = dense_SV[part].float()
            p, dense_log_sum = _softmax(dense)
            if reverse:
                # log p - log q
                log_ratio = (dense - logits).add_((log_sum - dense_log_sum)[:, None])
                divergence_R = -torch.linalg.vecdot(gradient, log_ratio)
                # The slope of KL(q || p) is q (log q - log p - KL), that of the cross-entropy q -
                # next.
                gradient.mul_((1 - share) - share * (log_ratio + divergence_R[:, None]))
            else:
                divergence_R = torch.linalg.vecdot(p, dense - logits) - dense_log_sum + log_sum
                gradient.sub_(p, alpha=share)  # q - p: the slope of KL(p || q)
            loss_R += share * divergence_R
        gradient.scatter_add_(1, next_R1, logits.new_full(next_R1.shape, share - 1))
        total += loss_R.double().sum()
        gradient_SV[part] = gradient.mul_(1 / num_positions)
    return total, gradient_SV


def _softmax(logits_PV: Tensor) -> tuple[Tensor, Tensor]:
    """Return softmax(logits) and log sum_v exp(logits), from one exponential of each logit."""
    softmax_PV = logits_PV.softmax(-1)
    return softmax_PV, logits_PV.amax(-1) - softmax_PV.amax(-1).log()


def masked_loss(
    states_PD: Float[Tensor, "P D"],
    head: nn.Module,
    ids_BT: Int[Tensor, "B T"],
    teacher: Teacher | None,
    counted_BT: Bool[Tensor, "B T"],
    answers_B: Bool[Tensor, " B"],
    *,
    kl_share: float,
) -> Float[Tensor, ""]:
    """Return the mean over blocks of `distillation_loss` of the tokens of each that count.

    P = B * (T - 1) predicting positions. `answers_B`: which blocks are what the dense model says.
    Their target is its distribution alone, by KL(q || p): a model that cannot follow p everywhere
    stays as sure as p, where KL(p || q) would have it spread over all that p may say. The head
    reads no position that does not count.
    """
    losses: list[Tensor] = []
    size = ids_BT.shape[1] - 1
    for block, is_answer in enumerate(answers_B.tolist()):
        share = 1.0 if is_answer and kl_share > 0 else kl_share
        counted_P = counted_BT[block, 1:]
        part = slice(block * size, (block + 1) * size)
        own = None if teacher is None else (teacher[0][part][counted_P], teacher[1])
        next_P = ids_BT[block, 1:][counted_P]
        losses.append(
            distillation_loss(
                states_PD[part][counted_P], head, next_P, own, kl_share=share, reverse=is_answer
            )
        )
    return torch.stack(losses).mean()


@contextmanager
def loss_in_forward(
    model: PreTrainedModel, arch: Arch, kl_share: float, *, in_shards: bool
) -> Iterator[None]:
    """Inside, `model(ids, learns=True, teacher=...)` returns its loss; without `learns`, what it
    did.

    With a mask, `counted`, and `answers` by block it is `masked_loss`.

    It is a call of the model, and not of its parts, since copies on several devices are kept in
    step so. `in_shards`: as for `teacher_in_forward`. The stream is float32, though embeddings that
    do not learn may have another dtype.
    """
    embedding: Any = model.get_input_embeddings()
    plain, read = cast(Callable[..., Any], model.forward), _reader(model, arch, in_shards=in_shards)

    def forward(
        input_ids: Tensor,
        *,
        learns: bool = False,
        teacher: Teacher | None = None,
        counted: Tensor | None = None,
        answers: Tensor | None = None,
        **others: Any,
    ) -> Any:
        if not learns:
            return plain(input_ids=input_ids, **others)
        if counted is not None and answers is not None:
            return masked_loss(
                *read(input_ids), input_ids, teacher, counted, answers, kl_share=kl_share
            )
        return distillation_loss(
            *read(input_ids), input_ids[:, 1:].flatten(), teacher, kl_share=kl_share
        )

    in_float32 = embedding.register_forward_hook(lambda _, __, output: output.float())
    with in_float32, forwards_replaced([model], forward):
        yield


def teacher_in_forward(
    model: nn.Module, arch: Arch, *, in_shards: bool
) -> AbstractContextManager[None]:
    """Inside, `model(ids)` returns a `Teacher`.

    `in_shards`: one of whole logits, whose head does nothing. FSDP gathers the head's weights
    together with others', for one call of each.
    """
    return forwards_replaced([model], _reader(model, arch, in_shards=in_shards))


def _reader(model: nn.Module, arch: Arch, *, in_shards: bool) -> Callable[[Tensor], Teacher]:
    """Return what gives, of ids, what the head reads, and the head; `in_shards`: whole logits, and
    no head.
    """
    plain: Callable[..., Any] = model.forward

    def read(input_ids: Tensor) -> Teacher:
        if in_shards:
            logits_BTV = plain(input_ids=input_ids, use_cache=False).logits
            return logits_BTV[:, :-1].flatten(0, 1), nn.Identity()
        return states_of(model, arch, input_ids), head_of(model, arch)

    return read
