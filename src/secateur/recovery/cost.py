"""What a recovery costs: tokens, FLOPs, memory, disk; and seconds, from one timed step.

In: both models (on the meta device, but for seconds), settings, text. Out: a `Cost`.
FLOPs are those of matrix products. Memory is estimated from shapes, without the interpreter.
T: tokens of a block; "forward": one pass of one model over all positions, head included.
"""

import time
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.facts import Size
from secateur.methods.prices import prefill_flops_per_token
from secateur.recipe import RecoverySettings
from secateur.recovery.judge import distillation_loss, teacher_log_p
from secateur.recovery.pair import Candidates, RecoveryText
from secateur.report.measured import Cost

# Activations that a layer stores per token for backward, in hidden sizes: inputs of norms and
# linears, queries, keys, values; gate, up and product of the MLP at three to four each.
ACTIVATION_WIDTHS = 20


def cost_of(
    candidates: Candidates,
    settings: RecoverySettings,
    text: RecoveryText,
    seconds_per_flop: tuple[float, float] | None = None,
) -> Cost:
    """Return the cost of training on the whole text.

    `seconds_per_flop`: of the teacher and of training, from `time_a_step`; None: no seconds.
    """
    pruned, teacher, length = candidates.pruned_shape, candidates.teacher_shape, text.sequence_length
    tokens = text.num_tokens, text.num_held_out_tokens
    flops = predict_flops(pruned, teacher, settings, *tokens, length)
    seconds = {}
    if seconds_per_flop is not None:
        seconds = {
            part: sum(a * b for a, b in zip(ours, seconds_per_flop, strict=True)) for part, ours in flops.items()
        }
    size = Size.of(pruned)
    # Checkpoints of weights and two moments: the best, the last, one being written; the result.
    scratch_bytes = 3 * 4 * (size.num_params + 2 * _num_trained(pruned, settings)) + size.num_bytes
    total = {part: sum(ours) for part, ours in flops.items()}
    return Cost(*tokens, total, _peak_bytes(pruned, Size.of(teacher), settings, length), scratch_bytes, seconds)


def predict_flops(
    pruned: PreTrainedModel,
    teacher: PreTrainedModel,
    settings: RecoverySettings,
    num_tokens: int,
    num_held_out_tokens: int,
    length: int,
) -> dict[str, tuple[float, float]]:
    """Return FLOPs by part of the work: (of the teacher, of the pruned model).

    training: the teacher once, unless kl_share is 0. The pruned model three times: forward,
    gradient of inputs, gradient of weights; the last one only where weights are trained (none with
    LoRA, no head with `layers`). Once more with gradient checkpointing.
    judge: the teacher once, the pruned model before, after and at every evaluation.
    """
    (small_layers, small), (_, big) = (_forward(model, length) for model in (pruned, teacher))
    passes = 2 + settings.gradient_checkpointing
    gradients = {"lora": 0.0, "layers": small_layers, "full": small}[settings.train]
    asked = big if settings.kl_share > 0 else 0.0
    return {
        "training": (num_tokens * asked, num_tokens * (passes * small + gradients)),
        "judge": (num_held_out_tokens * big, num_held_out_tokens * (2 + settings.evaluations) * small),
    }


def time_a_step(
    pruned: PreTrainedModel, teacher: PreTrainedModel, settings: RecoverySettings, ids_BT: Tensor
) -> tuple[float, float]:
    """Return seconds per FLOP of the teacher's forward and of a training step, the second of two.

    The pruned model is used up: its weights become float32 and get gradients.
    """
    length, dtype = ids_BT.shape[1], pruned.dtype
    next_P = ids_BT[:, 1:].flatten()
    (_, small), (_, big) = (_forward(model, length) for model in (pruned, teacher))
    for parameter in pruned.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    teaching = training = 0.0
    for _ in range(2):
        start = time.perf_counter()
        log_p_PV = teacher_log_p(teacher, ids_BT, settings.temperature)
        middle = time.perf_counter()
        with torch.autocast(ids_BT.device.type, dtype, enabled=dtype == torch.bfloat16):
            logits_PV = pruned(input_ids=ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
        weight_P = torch.ones(len(next_P))
        distillation_loss(logits_PV, next_P, log_p_PV, weight_P, temperature=settings.temperature).backward()
        teaching, training = middle - start, time.perf_counter() - middle
    return teaching / (ids_BT.numel() * big), training / (ids_BT.numel() * 3 * small)


def _forward(model: PreTrainedModel, length: int) -> tuple[float, float]:
    """Return FLOPs per token of a block: of the layers, and with the head at every position."""
    head: Any = model.get_output_embeddings()
    at_each = 2 * head.weight.numel()
    layers = prefill_flops_per_token(model, length) - at_each / length
    return layers, layers + at_each


def _num_trained(model: PreTrainedModel, settings: RecoverySettings) -> int:
    """Return how many of the model's own parameters are trained; LoRA trains none of them."""
    if settings.train == "lora":
        return 0
    words: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    frozen = {module.weight for module in words} if settings.train == "layers" else set()
    return Size.of(model).num_params - sum(weight.numel() for weight in frozen)


def _peak_bytes(pruned: PreTrainedModel, dense: Size, settings: RecoverySettings, length: int) -> int:
    """Return the bytes of training, page cache not counted.

    The teacher; float32 weights; float32 gradients and two moments of what is trained; activations;
    three matrices of logits.
    """
    config: Any = pruned.config.get_text_config()
    states = 4 * Size.of(pruned).num_params + 12 * _num_trained(pruned, settings)
    tokens = settings.blocks_per_device * length
    layers = 1 if settings.gradient_checkpointing else config.num_hidden_layers
    activations = tokens * ACTIVATION_WIDTHS * config.hidden_size * layers * pruned.dtype.itemsize
    return dense.num_bytes + states + activations + 3 * 4 * tokens * config.vocab_size
