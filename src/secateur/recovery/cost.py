"""What a recovery costs: tokens, FLOPs, memory, disk.

In: both models, which may be on the meta device, settings, text. Out: a `Cost`.
FLOPs are those of matrix products. Memory is estimated from shapes, without the interpreter.
T: tokens of a block; "forward": one pass of one model over all positions, head included.
"""

from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.facts import Size
from secateur.methods.prices import prefill_flops_per_token
from secateur.recipe import RecoverySettings
from secateur.recovery.loss import HEAD_POSITIONS
from secateur.recovery.pair import Candidates, RecoveryText, blocks_per_step
from secateur.recovery.weights import autocasts, words_of
from secateur.report.measured import Cost

# Numbers that a layer stores per token for backward: float32 ones in hidden sizes (the stream, inputs
# of norms and linears, queries, keys, values), and four in the FFN's, as autograd was seen to store.
STREAM_WIDTHS, FFN_WIDTHS = 10, 4
TRAIN_DENSE = "train_dense"
# FLOPs per token of a block: of the layers, and with the head at every position.
Forward = tuple[float, float]


def cost_of(candidates: Candidates, settings: RecoverySettings, text: RecoveryText) -> Cost:
    """Return the cost of training on the whole text."""
    pruned, teacher, length = candidates.pruned_shape, candidates.teacher_shape, text.sequence_length
    tokens = text.num_tokens, text.num_held_out_tokens
    small, big = forward_flops(pruned, length), forward_flops(teacher, length)
    flops = predict_flops(small, big, settings, *tokens)
    trained = [pruned]
    if settings.train_dense:
        alone = predict_flops(big, big, without_teacher(settings), *tokens)
        flops[TRAIN_DENSE] = (0.0, alone["training"][1] + alone["judge"][1])
        trained.append(teacher)
    size = Size.of(pruned)
    # Checkpoints of weights and two moments: the best, the last, one being written; the result.
    states = max(Size.of(model).num_params + 2 * num_trained(model, settings) for model in trained)
    scratch_bytes = 3 * 4 * states + size.num_bytes
    total = {part: sum(ours) for part, ours in flops.items()}
    on_cpu = not torch.cuda.is_available()
    most = max(
        training_bytes(model, Size.of(model).num_params, num_trained(model, settings), settings, length, on_cpu=on_cpu)
        for model in trained
    )
    peak = Size.of(teacher).num_bytes + most
    return Cost(*tokens, total, peak, scratch_bytes)


def predict_flops(
    pruned: Forward, teacher: Forward, settings: RecoverySettings, num_tokens: int, num_held_out_tokens: int
) -> dict[str, tuple[float, float]]:
    """Return FLOPs by part of the work: (of the teacher, of the pruned model).

    training: the teacher once, unless kl_share is 0. The pruned model three times: forward,
    gradient of inputs, gradient of weights; the last one only where weights are trained (none with
    LoRA, no head with `layers`). Once more with gradient checkpointing.
    judge: the teacher once, the pruned model before, after and at every evaluation.
    """
    (small_layers, small), (_, big) = pruned, teacher
    passes = 2 + settings.gradient_checkpointing
    gradients = {"lora": 0.0, "layers": small_layers, "full": small}[settings.train]
    asked = big if settings.kl_share > 0 else 0.0
    return {
        "training": (num_tokens * asked, num_tokens * (passes * small + gradients)),
        "judge": (num_held_out_tokens * big, num_held_out_tokens * (2 + settings.evaluations) * small),
    }


def without_teacher(settings: RecoverySettings) -> RecoverySettings:
    """Return settings for the same steps of cross-entropy alone, as the dense model takes them."""
    return settings.model_copy(update={"kl_share": 0.0})


def forward_flops(model: PreTrainedModel, length: int) -> Forward:
    """Return FLOPs per token of a block: of the layers, and with the head at every position."""
    head: Any = model.get_output_embeddings()
    at_each = 2 * head.weight.numel()
    layers = prefill_flops_per_token(model, length) - at_each / length
    return layers, layers + at_each


def num_trained(model: PreTrainedModel, settings: RecoverySettings) -> int:
    """Return how many of the model's own parameters are trained; LoRA trains none of them."""
    if settings.train == "lora":
        return 0
    frozen = words_of(model) if settings.train == "layers" else set()
    return Size.of(model).num_params - sum(weight.numel() for weight in frozen)


def training_bytes(
    model: PreTrainedModel, num_params: int, trained: int, settings: RecoverySettings, length: int, *, on_cpu: bool
) -> int:
    """Return the bytes of training a model like this one with `num_params` parameters, of which some are `trained`.

    float32 weights and two float32 moments of what is trained, the rest as it is stored; and the
    larger of a step and of the best weights, which are read (low-rank additions: merged) at the end.
    A step: gradients, copies in the model's dtype if that is a lower one, activations; logits of
    both models and their gradient for a slice of positions, on accelerators in float32 too.
    """
    config: Any = model.config.get_text_config()
    item, low = model.dtype.itemsize, autocasts(model.dtype, on_cpu=on_cpu)
    tokens = min(settings.blocks_per_device, blocks_per_step(settings.batch_tokens, length)) * length
    layers = 1 if settings.gradient_checkpointing else config.num_hidden_layers
    step = trained * (4 + (item if low else 0))
    step += tokens * layers * (4 * STREAM_WIDTHS * config.hidden_size + item * FFN_WIDTHS * _ffn_width(config))
    step += min(tokens, HEAD_POSITIONS) * (item * 3 + (0 if on_cpu else 4 * 4)) * config.vocab_size
    if settings.train == "lora":  # float32 copies of what linears read; additions, gradients, moments
        hidden_size, width = config.hidden_size, _ffn_width(config)
        step += 4 * tokens * layers * (6 * hidden_size + width)
        step += 16 * settings.lora_rank * config.num_hidden_layers * (11 * hidden_size + 3 * width)
    weights = 4 * trained + (item if low else 4) * (num_params - trained)
    return weights + 8 * trained + max(step, item * num_params if settings.train == "lora" else weights)


def _ffn_width(config: Any) -> int:
    """Return the widest layer's FFN, or four hidden sizes where the config has another name for it."""
    sizes = config.to_dict()  # attributes that vary over layers cannot be read
    layers = [sizes, *(sizes.get("per_layer_config") or {}).values()]
    return max(each.get("intermediate_size") or 0 for each in layers) or 4 * config.hidden_size
