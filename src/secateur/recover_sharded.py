"""FSDP: both models of a recovery in shards, one per process, and the trained one whole again afterwards.

In: models with all their weights in every process, an accelerator whose launcher asked for FSDP. Out: the models in
shards; parameters put together again, by name. FSDP2 only; version 1 is refused.
"""

import copy
import os
from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from secateur.errors import RecipeError
from secateur.on_disk import forget_weights

FSDP_SWITCH = "ACCELERATE_USE_FSDP"  # what `accelerate launch` sets for its config's FSDP


def wants_shards() -> bool:
    """Say whether the launcher asked for FSDP, over several processes. Raises RecipeError if it asked for version 1."""
    if os.environ.get(FSDP_SWITCH, "false").lower() != "true" or os.environ.get("WORLD_SIZE", "1") == "1":
        return False
    version = os.environ.get("FSDP_VERSION", "1")
    if version != "2":
        raise RecipeError(f"FSDP: the launcher asks for version {version}, allowed is 2; set fsdp_version to 2.")
    return True


def let_cpu_shard(arguments: TrainingArguments) -> None:
    """Let accelerate shard over processes without accelerators too, where it would copy the model to each of them.

    It looks for FSDP only in a state of several GPUs; gloo has every collective that FSDP2 needs.
    """
    from accelerate.utils import DistributedType

    state = arguments.distributed_state
    if state is not None and state.distributed_type == DistributedType.MULTI_CPU:
        state.distributed_type = DistributedType.MULTI_GPU


def save_whole(accelerator: Any) -> None:
    """Have checkpoints written whole, which torch reads back as tensors alone; those in shards it unpickles."""
    plugin = accelerator.state.fsdp_plugin
    plugin.state_dict_config = plugin.optim_state_dict_config = None  # or those of the launcher's type would stay
    plugin.set_state_dict_type("FULL_STATE_DICT")


def handed_over(model: PreTrainedModel) -> PreTrainedModel:
    """Return a copy that takes over the model's weights, so that sharding the copy frees them; the model keeps none."""
    taken = {id(parameter): nn.Parameter(parameter.data) for parameter in model.parameters()}
    copied = copy.deepcopy(model, cast(dict[int, Any], taken))
    forget_weights(model)
    return copied


def shard(model: nn.Module, accelerator: Any) -> nn.Module:
    """Return a model that is only asked, in shards."""
    from accelerate.utils import fsdp2_prepare_model

    return fsdp2_prepare_model(accelerator, model)


def whole_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter whole and in ordinary memory, one at a time; every process must ask for all of them."""
    from torch.distributed.tensor import DTensor

    for name, parameter in model.named_parameters():
        data = parameter.detach()
        yield name, (data.full_tensor() if isinstance(data, DTensor) else data).cpu()
