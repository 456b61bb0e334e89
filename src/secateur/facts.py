"""Plain facts that several packages state: sizes, losses, divergences, what a target lost, what a workload costs."""

import math
from dataclasses import dataclass
from typing import Any

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
