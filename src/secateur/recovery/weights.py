"""Weights in training: which learn, in which dtype, low-rank additions, shards (FSDP), the way
back, and their bytes.

In: a model and what a recipe or a launcher asks for. Out: a model to train; whole, merged weights.
Bytes are estimated from shapes, so for them a model may be on the meta device; the interpreter's
are left out.
"""

import copy
import importlib.util
import math
import os
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.errors import RecipeError
from secateur.facts import Size
from secateur.model.stock import quiet_transformers
from secateur.recipe import Recipe, RecoverySettings, Training
from secateur.stream.device import CPU, forget_weights, multiplies_in_software

HEAD_POSITIONS = 256  # of which both models' logits are there at a time
FSDP_SWITCH = "ACCELERATE_USE_FSDP"  # set by `accelerate launch` with FSDP
# Of low-rank additions. Twice as much was no better than training the layers' own weights (LOG,
# 2026-11-28, night).
LORA_RANK = 16


def weight_size(model: Any) -> float:
    """Return the root mean square of the weights in matrices, embedding and head left out."""
    words = words_of(model)
    matrices = [each for each in model.parameters() if each.dim() > 1 and each not in words]
    squares = sum(matrix.double().square().sum().item() for matrix in matrices)
    return math.sqrt(squares / sum(matrix.numel() for matrix in matrices))


def wants_shards() -> bool:
    """Say whether the launcher asked for FSDP. Raises RecipeError if it asked for version 1."""
    asked = os.environ.get(FSDP_SWITCH, "false").lower() == "true"
    if not asked or os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise RecipeError(
            f"FSDP: the launcher asks for version {version}, allowed is 2; set fsdp_version to 2."
        )
    return True


def let_cpu_shard(arguments: Any) -> None:
    """Let accelerate shard over processes without GPUs too. `arguments`: the Trainer's.

    It looks for FSDP only in a state of several GPUs; gloo has every collective that FSDP2 needs.
    """
    from accelerate.utils import DistributedType

    state = arguments.distributed_state
    if state is not None and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def handed_over(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy that takes over the weights, so that sharding the copy frees them; frozen ones
    stay frozen.
    """
    taken = {
        id(parameter): nn.Parameter(parameter.data, requires_grad=parameter.requires_grad)
        for parameter in model.parameters()
    }
    copied = copy.deepcopy(model, cast(dict[int, Any], taken))
    forget_weights(model)
    return copied


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter whole and on the host; every process must ask for all."""
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        data = parameter.detach()
        yield name, (data.full_tensor() if isinstance(data, DTensor) else data).cpu()


def autocasts(dtype: torch.dtype, *, on_cpu: bool) -> bool:
    """Say whether a model of this dtype computes in it while what trains is float32."""
    return dtype == torch.bfloat16 and not (on_cpu and multiplies_in_software(CPU, dtype))


def words_of(model: PreTrainedModel) -> set[nn.Parameter]:
    """Return the weights of embedding and head, one if they are tied."""
    modules: list[Any] = [model.get_input_embeddings(), model.get_output_embeddings()]
    return {module.weight for module in modules}


def prepare_weights(model: PreTrainedModel, train: str, *, float_all: bool) -> None:
    """Let what `train` names learn, and make it float32.

    The rest keeps its dtype, unless `float_all`: shards have one dtype, and so has a model without
    autocast.
    """
    # Adam's steps do not shrink with gradients: rare words would move as far as frequent ones.
    frozen = set() if train == "full" else words_of(model)
    if train == "lora":
        frozen |= {module.weight for module in model.modules() if isinstance(module, nn.Linear)}
    for parameter in model.parameters():
        parameter.requires_grad_(parameter not in frozen)
        if float_all or parameter not in frozen:  # not .float(): buffers keep their dtype
            # A copy: the old weights may be put back.
            parameter.data = parameter.data.to(torch.float32, copy=True)


def check_training(settings: Training, key: str) -> None:
    """Raise RecipeError, naming the recipe's `key`, if what training needs is missing."""
    if settings.train == "lora" and importlib.util.find_spec("peft") is None:
        raise RecipeError(
            f"{key}.train: lora needs the package peft; run pip install 'secateur[recover]'."
        )


def with_lora(model: PreTrainedModel) -> nn.Module:
    """Return the model with trainable low-rank additions to every linear but the head.

    W + 2 B A, B zero at first. Source: Hu et al., arXiv 2106.09685.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, lora_dropout=0.0, target_modules="all-linear"
    )
    with quiet_transformers():  # peft uses what transformers deprecates
        return get_peft_model(model, config)


def merge(model: Any) -> None:
    """Add low-rank additions to the weights, in float32 and in copies: the old weights may be put
    back.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            weight: Any = module.get_base_layer().weight
            dtype = weight.dtype
            weight.data = weight.data.float()
            module.merge()
            weight.data = weight.data.to(dtype)
    model.unload()


# Numbers that a layer stores per token for backward: float32 ones in hidden sizes (the stream,
# inputs of norms and linears, queries, keys, values), and four in the FFN's, as autograd was seen
# to store.
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
    model: PreTrainedModel,
    num_params: int,
    trained: int,
    settings: RecoverySettings,
    length: int,
    *,
    on_cpu: bool,
) -> int:
    """Return the bytes of training a model like this one with `num_params` parameters, of which
    some are `trained`.

    float32 weights and two float32 moments of what is trained, the rest as it is stored; and the
    larger of a step and of the weights that an interrupted training reads (low-rank additions:
    merged). A step: gradients, copies in the model's dtype if that is a lower one, activations;
    logits of both models and their gradient for a slice of positions, on accelerators in float32
    too.
    """
    config: Any = model.config.get_text_config()
    item, low = model.dtype.itemsize, autocasts(model.dtype, on_cpu=on_cpu)
    tokens = min(settings.blocks_per_device, settings.blocks_per_step(length)) * length
    layers = 1 if settings.gradient_checkpointing else config.num_hidden_layers
    hidden_size, width = config.hidden_size, _ffn_width(config)
    step = trained * (4 + (item if low else 0))
    step += tokens * layers * (4 * STREAM_WIDTHS * hidden_size + item * FFN_WIDTHS * width)
    step += min(tokens, HEAD_POSITIONS) * (item * 3 + (0 if on_cpu else 4 * 4)) * config.vocab_size
    weights = read = 4 * trained + (item if low else 4) * (num_params - trained)
    if settings.train == "lora":
        # Float32 copies of what linears read; additions, gradients, moments.
        step += 4 * tokens * layers * (6 * hidden_size + width)
        step += 16 * LORA_RANK * config.num_hidden_layers * (11 * hidden_size + 3 * width)
        read = item * num_params
    return weights + 8 * trained + max(step, read)


def _ffn_width(config: Any) -> int:
    """Return the widest layer's FFN, or four hidden sizes where the config has another name for
    it.
    """
    sizes = config.to_dict()  # attributes that vary over layers cannot be read
    layers = [sizes, *(sizes.get("per_layer_config") or {}).values()]
    widest = max(of_layer.get("intermediate_size") or 0 for of_layer in layers)
    return widest or 4 * config.hidden_size
