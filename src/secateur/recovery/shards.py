"""Sharded training (FSDP): what the launcher asks for, and weights that leave and enter shards."""

import copy
import os
from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from secateur.errors import RecipeError
from secateur.stream.offload import forget_weights

FSDP_SWITCH = "ACCELERATE_USE_FSDP"  # set by `accelerate launch` with FSDP


def wants_shards() -> bool:
    """Say whether the launcher asked for FSDP. Raises RecipeError if it asked for version 1."""
    if os.environ.get(FSDP_SWITCH, "false").lower() != "true" or os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise RecipeError(f"FSDP: the launcher asks for version {version}, allowed is 2; set fsdp_version to 2.")
    return True


def let_cpu_shard(arguments: TrainingArguments) -> None:
    """Let accelerate shard over processes without GPUs too.

    It looks for FSDP only in a state of several GPUs; gloo has every collective that FSDP2 needs.
    """
    from accelerate.utils import DistributedType

    state = arguments.distributed_state
    if state is not None and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def handed_over(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy that takes over the weights, so that sharding the copy frees them; frozen ones stay frozen."""
    taken = {id(each): nn.Parameter(each.data, requires_grad=each.requires_grad) for each in model.parameters()}
    copied = copy.deepcopy(model, cast(dict[int, Any], taken))
    forget_weights(model)
    return copied


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter whole and on the host; every process must ask for all."""
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        data = parameter.detach()
        yield name, (data.full_tensor() if isinstance(data, DTensor) else data).cpu()
