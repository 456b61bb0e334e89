"""Plain facts that several packages state (sizes, losses, costs, batches), and records that are written as JSON."""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from secateur.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Method:
    """How units are chosen and readers repaired: plain numbers, and names as recipes have them."""

    score: str
    obs_batch: int | None
    compensate: str
    damping: float
    damping_factors: tuple[float, ...]
    target_mix: float
    weighting: str


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Batch:
    """Blocks of one domain. `held_out` ones feed the guard and the evaluation, never a statistic.

    `first_block`: the number of its first block among the domain's, of which a rank has only some.
    """

    domain: str
    held_out: bool
    ids_BT: Tensor
    first_block: int = 0


# Overlap of texts is counted in pieces of so many tokens.
NGRAM_TOKENS = 13


@dataclass(frozen=True, slots=True)
class Size:
    """`num_params`: all parameters, tied ones once. `num_bytes`: their storage."""

    num_params: int
    num_bytes: int

    @classmethod
    def of(cls, model: Any) -> "Size":
        """Count a model's parameters."""
        parameters = list(model.parameters())
        num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in parameters)
        return cls(sum(parameter.numel() for parameter in parameters), num_bytes)


@dataclass(frozen=True, slots=True)
class Loss:
    """Mean negative log-likelihood of a block's tokens 2..T given those before. The error is over blocks."""

    nats_per_token: float
    standard_error: float
    num_tokens: int

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats_per_token)


def geometric_mean_perplexity(losses: dict[str, Loss]) -> float:
    """exp of the mean over domains of nats per token: every domain counts the same, whatever its length."""
    return math.exp(sum(loss.nats_per_token for loss in losses.values()) / len(losses))


@dataclass(frozen=True, slots=True)
class Divergence:
    """KL(dense || pruned) in nats per token. The error is over blocks, `p95` over tokens."""

    mean: float
    standard_error: float
    p95: float
    top1_agreement: float
    num_tokens: int


@dataclass(frozen=True, slots=True)
class Outcome:
    """How much of the recipe's `target` went: the `share_gone` of what the dense model has of it, `total` for people.

    Of `latency` it is what the prices predict, not a second measurement.
    """

    target: str
    total: str
    share_gone: float


@dataclass(frozen=True, slots=True)
class Workload:
    """What each run does: `batch` prompts of `prompt_tokens` each, `new_tokens` (at least 2) written after each."""

    batch: int = 1
    prompt_tokens: int = 256
    new_tokens: int = 32
    repeats: int = 5


@dataclass(frozen=True, slots=True)
class Costs:
    """The least work of one model at one workload."""

    decode_bytes_per_token: float
    prefill_flops_per_token: float
    kv_cache_bytes_per_token: int


Kind = TypeVar("Kind")


@dataclass(frozen=True, slots=True)
class Record:
    """What one command found, as plain numbers. It is written to JSON, read back and rendered from one dataclass."""

    def plain(self) -> dict[str, Any]:
        """Return the fields as a mapping; a record adds what follows from them, or leaves out what was not measured."""
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        """Return the record as indented JSON."""
        return json.dumps(self.plain(), indent=2, default=lambda model: model.model_dump()) + "\n"

    @classmethod
    def from_json(cls: type[Kind], text: str | bytes, where: str) -> Kind:
        """Return the record that `to_json` wrote. Raises CheckpointError, naming `where`, if it did not."""
        return parse_json(cls, text, where)


def parse_json(kind: type[Kind], text: str | bytes, where: str) -> Kind:
    """Return the dataclass; keys that it has no field for are left out.

    Raises CheckpointError, naming `where` and the first field that is missing or wrong.
    """
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"{part}: " for part in first["loc"])
        raise CheckpointError(
            f"{where}: {field}{first['msg'].lower()}; it was changed or written by another version of secateur; "
            "make it anew."
        ) from None
