"""What a published method hands back: the model without the removed parts, and its repairs."""

from dataclasses import dataclass

from transformers import PreTrainedModel


@dataclass
class Pruned:
    """`num_parameters`: what remains, of all parameters, a tied embedding once.

    `repair`: what the method itself does against the damage: "none", "bias", "LoRA (not run)".
    `notes`: settings that differ from the published ones.
    """

    model: PreTrainedModel
    num_parameters: int
    repair: str
    notes: str = ""


def count_parameters(model: PreTrainedModel) -> int:
    """All parameters of `model`; one tensor used twice (a tied head) counts once."""
    return sum(parameter.numel() for parameter in model.parameters())
