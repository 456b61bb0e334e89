"""What a recovery costs: tokens, FLOPs, memory, disk; and seconds, from one timed step or layer.

In: both models (on the meta device, but for seconds), settings, text. Out: a `Cost`.
FLOPs are those of matrix products. Memory is estimated from shapes, without the interpreter.
T: tokens of a block; "forward": one pass of one model over all positions, head included.
"""

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaModel, PreTrainedModel

from secateur.facts import Size
from secateur.methods.prices import prefill_flops_per_token
from secateur.model.bind import bind, head_of
from secateur.recipe import RecoverySettings
from secateur.recovery.attention import switched
from secateur.recovery.loss import HEAD_POSITIONS, loss_in_forward, states_of
from secateur.recovery.pair import Candidates, RecoveryText, blocks_per_step
from secateur.recovery.weights import autocasts, words_of
from secateur.report.measured import Cost
from secateur.stream.device import best_seconds, now

# Numbers that a layer stores per token for backward: float32 ones in hidden sizes (the stream, inputs
# of norms and linears, queries, keys, values), and four in the FFN's, as autograd was seen to store.
STREAM_WIDTHS, FFN_WIDTHS = 10, 4
TRAIN_DENSE = "train_dense"
HEAD_SIZE = 64  # of the layer that is timed
# FLOPs per token of a block: of the layers, and with the head at every position.
Forward = tuple[float, float]


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
    small, big = forward_flops(pruned, length), forward_flops(teacher, length)
    flops = predict_flops(small, big, settings, *tokens)
    trained = [pruned]
    if settings.train_dense:
        alone = predict_flops(big, big, without_teacher(settings), *tokens)
        flops[TRAIN_DENSE] = (0.0, alone["training"][1] + alone["judge"][1])
        trained.append(teacher)
    seconds = {}
    if seconds_per_flop is not None:
        seconds = {
            part: sum(a * b for a, b in zip(ours, seconds_per_flop, strict=True)) for part, ours in flops.items()
        }
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
    return Cost(*tokens, total, peak, scratch_bytes, seconds)


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


def time_a_step(
    pruned: PreTrainedModel, teacher: PreTrainedModel, ids_BT: Tensor, attention: str | None
) -> tuple[float, float]:
    """Return seconds per FLOP of the teacher's forward and of a training step, the second of two.

    The pruned model is used up: its weights become float32 and get gradients. The teacher's head
    counts to the step, which has it.
    """
    length, dtype = ids_BT.shape[1], pruned.dtype
    (_, small), (_, big) = (forward_flops(model, length) for model in (pruned, teacher))
    for parameter in pruned.parameters():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    arch = bind(teacher)
    head, teaching, training = head_of(teacher, arch), 0.0, 0.0
    with loss_in_forward(pruned, bind(pruned), 1.0), switched(pruned, attention), switched(teacher, attention):
        for _ in range(2):
            start = now(ids_BT.device)
            with torch.no_grad():
                dense_PE = states_of(teacher, arch, ids_BT)
            middle = now(ids_BT.device)
            with torch.autocast(ids_BT.device.type, dtype, enabled=dtype == torch.bfloat16):
                loss: Any = pruned(ids_BT, learns=True, teacher=(dense_PE, head))
            loss.backward()
            teaching, training = middle - start, now(ids_BT.device) - middle
    return teaching / (ids_BT.numel() * big), training / (ids_BT.numel() * 3 * small)


@functools.cache  # a study asks for every cell
@torch.no_grad()
def layer_rate(device: torch.device, dtype: torch.dtype, width: int, num_tokens: int) -> float:
    """Return the products' operations per second in the forward pass of a Llama layer of random weights.

    Attention, norms and other moves are in its time: at a width of 576 it runs at 0.6 times the
    rate of a product. A training step has about the same rate: LOG, 2026-11-29, late.
    """
    sizes: dict[str, int] = {"hidden_size": width, "intermediate_size": 8 * width // 3, "head_dim": HEAD_SIZE}
    heads = dict.fromkeys(("num_attention_heads", "num_key_value_heads"), max(1, width // HEAD_SIZE))
    with torch.random.fork_rng(devices=[]):  # a run's random numbers are its own
        model: Any = LlamaModel(LlamaConfig(**sizes, **heads, num_hidden_layers=1, vocab_size=8))
    model = model.to(device, dtype)
    ids_BT = torch.zeros(1, num_tokens, dtype=torch.long, device=device)
    num_params = sum(weight.numel() for weight in model.layers.parameters())
    return 2 * num_params * num_tokens / best_seconds(lambda: model(ids_BT, use_cache=False).last_hidden_state)


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


# Bytes that training moves beside its layers' work: per logit; per trained parameter and step.
LOGIT_BYTES, PARAMETER_BYTES = 60, 40


def polish_work(
    settings: RecoverySettings, dense: PreTrainedModel, num_params: int, held_out: int, length: int
) -> tuple[float, float]:
    """Return FLOPs of a polish, and the bytes that it moves beside its layers.

    The dense model once over all text, training, and `held_out` tokens that judge.
    `num_params`: of the pruned model, whose layers are taken to be smaller in proportion.
    """
    config: Any = dense.config.get_text_config()
    tokens, (layers, whole) = settings.num_tokens, forward_flops(dense, length)
    left = layers * num_params / Size.of(dense).num_params
    flops = predict_flops((left, left + whole - layers), (layers, whole), settings, tokens, held_out)
    steps = tokens / settings.batch_tokens
    moved = LOGIT_BYTES * tokens * config.vocab_size + PARAMETER_BYTES * num_trained(dense, settings) * steps
    return sum(map(sum, flops.values())), float(moved)
