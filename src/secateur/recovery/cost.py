"""What a training takes: memory, disk.

In: models, which may be on the meta device, and settings. Out: bytes, estimated from shapes, without
the interpreter's.
"""

from typing import Any

from transformers import PreTrainedModel

from secateur.facts import Size
from secateur.recipe import Recipe, RecoverySettings
from secateur.recovery.loss import HEAD_POSITIONS
from secateur.recovery.text import blocks_per_step
from secateur.recovery.weights import autocasts, words_of

# Numbers that a layer stores per token for backward: float32 ones in hidden sizes (the stream, inputs
# of norms and linears, queries, keys, values), and four in the FFN's, as autograd was seen to store.
STREAM_WIDTHS, FFN_WIDTHS = 10, 4


def polish_settings(recipe: Recipe) -> RecoverySettings | None:
    """Return how a resolved recipe trains; None if it does not."""
    return RecoverySettings(**recipe.polish.model_dump()) if recipe.polish.num_tokens else None


def scratch_bytes(pruned: PreTrainedModel, settings: RecoverySettings) -> int:
    """Return the most bytes that a recovery writes beside its result.

    Checkpoints of weights and two moments: the last, one being written; and the result.
    """
    size = Size.of(pruned)
    states = size.num_params + 2 * num_trained(pruned, settings)
    return 2 * 4 * states + size.num_bytes


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
    larger of a step and of the weights that an interrupted training reads (low-rank additions: merged).
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
    return max(of_layer.get("intermediate_size") or 0 for of_layer in layers) or 4 * config.hidden_size
