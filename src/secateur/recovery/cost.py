"""What a recovery costs: tokens, floating-point operations, memory, disk; and, from one timed step, seconds.

In: both models (the meta device will do, but for seconds), settings, token counts. Out: a `Cost`. Operations are those
of matrix products, as `ideal` counts them; memory is an estimate from shapes, the interpreter not counted.

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
from secateur.report.measured import Cost

# What a layer keeps of a token for its gradient, in hidden sizes: inputs of norms and linears, queries, keys, values,
# the MLP's gate, up and product at three to four hidden sizes each.
ACTIVATION_WIDTHS = 20


def predict_cost(
    pruned: PreTrainedModel,
    teacher: PreTrainedModel,
    settings: RecoverySettings,
    num_tokens: int,
    num_held_out_tokens: int,
    length: int,
    seconds_per_flop: tuple[float, float] | None = None,
) -> Cost:
    """Return the cost of a run in which nothing stops early. `seconds_per_flop`: of teacher and training, if timed."""
    flops = predict_flops(pruned, teacher, settings, num_tokens, num_held_out_tokens, length)
    size, dense = Size.of(pruned), Size.of(teacher)
    seconds = {}
    if seconds_per_flop is not None:
        seconds = {
            part: sum(a * b for a, b in zip(ours, seconds_per_flop, strict=True)) for part, ours in flops.items()
        }
    return Cost(
        num_tokens,
        num_held_out_tokens,
        {part: sum(ours) for part, ours in flops.items()},
        _peak_bytes(pruned, size, dense, settings, length),
        # Checkpoints of weights and two moments: the best, the last, one being written; the finished weights.
        3 * 4 * (size.num_params + 2 * _num_trained(pruned, settings)) + size.num_bytes,
        seconds,
    )


def predict_flops(
    pruned: PreTrainedModel,
    teacher: PreTrainedModel,
    settings: RecoverySettings,
    num_tokens: int,
    num_held_out_tokens: int,
    length: int,
) -> dict[str, tuple[float, float]]:
    """Return operations by part of the work: (of the teacher, of the pruned model).

    training: the teacher once, where it is asked; the pruned model three times (forward, gradient of inputs, gradient
    of weights), twice where weights are frozen (all with LoRA, the head with `layers`), once more with gradient
    checkpointing. judge: the teacher once, the pruned model before, after and on the way.
    """
    logits = settings
    (small_layers, small), (_, big) = (_forward(model, length) for model in (pruned, teacher))
    passes = 2 + logits.gradient_checkpointing
    gradients = {"lora": 0.0, "layers": small_layers, "full": small}[logits.train]
    asked = big if logits.kl_share > 0 else 0.0
    return {
        "training": (num_tokens * asked, num_tokens * (passes * small + gradients)),
        "judge": (num_held_out_tokens * big, num_held_out_tokens * (2 + logits.evaluations) * small),
    }


def time_a_step(
    pruned: PreTrainedModel, teacher: PreTrainedModel, settings: RecoverySettings, ids_BT: Tensor
) -> tuple[float, float]:
    """Return seconds per operation of the teacher's forward and of a training step, the second of two runs each.

    The pruned model is used up: its weights are float32 afterwards and have gradients.
    """
    length = ids_BT.shape[1]
    logits = settings
    next_P = ids_BT[:, 1:].flatten()
    (_, small), (_, big) = (_forward(model, length) for model in (pruned, teacher))
    dtype = pruned.dtype
    for parameter in pruned.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)

    def train() -> None:
        with torch.autocast(ids_BT.device.type, dtype, enabled=dtype == torch.bfloat16):
            logits_PV = pruned(input_ids=ids_BT, use_cache=False).logits[:, :-1].flatten(0, 1)
        loss = distillation_loss(logits_PV, next_P, log_p_PV, torch.ones(len(next_P)), temperature=logits.temperature)
        loss.backward()

    timings = []
    for _ in range(2):
        start = time.perf_counter()
        log_p_PV = teacher_log_p(teacher, ids_BT, logits.temperature)
        middle = time.perf_counter()
        train()
        timings.append((middle - start, time.perf_counter() - middle))
    teaching, training = timings[-1]
    return teaching / (ids_BT.numel() * big), training / (ids_BT.numel() * 3 * small)


def _forward(model: PreTrainedModel, length: int) -> tuple[float, float]:
    """Return operations per token of a block: of the layers, and with the head at every position."""
    head: Any = model.get_output_embeddings()
    at_each = 2 * head.weight.numel()
    layers = prefill_flops_per_token(model, length) - at_each / length
    return layers, layers + at_each


def _num_trained(model: PreTrainedModel, logits: RecoverySettings) -> int:
    """Return how many stored numbers are trained; low-rank additions are not stored ones."""
    if logits.train == "lora":
        return 0
    words: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    frozen = {module.weight for module in words} if logits.train == "layers" else set()
    return Size.of(model).num_params - sum(weight.numel() for weight in frozen)


def _peak_bytes(pruned: PreTrainedModel, size: Size, dense: Size, logits: RecoverySettings, length: int) -> int:
    """Return the training's bytes; pages of files, which the system gives up when it must, are not counted.

    The teacher, weights, gradients and two moments in float32 (of the additions alone with LoRA, not of embedding and
    head with `layers`) instead of the stored weights, activations, and three matrices of logits of a forward pass.
    """
    config: Any = pruned.config.get_text_config()
    states = 4 * size.num_params + 12 * _num_trained(pruned, logits)
    tokens = logits.blocks_per_device * length
    layers = 1 if logits.gradient_checkpointing else config.num_hidden_layers
    activations = tokens * ACTIVATION_WIDTHS * config.hidden_size * layers * pruned.dtype.itemsize
    matrices = 3 * 4 * tokens * config.vocab_size
    return dense.num_bytes + states + activations + matrices
