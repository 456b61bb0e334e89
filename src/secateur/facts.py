"""What is counted and measured as plain numbers, which all rooms share, and JSON records of it."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from secateur.errors import CheckpointError

# A number for each domain of a text, by its name.
PerDomain = dict[str, float]


def standard_error(sums_D: Sequence[float], tokens_D: Sequence[int]) -> float | None:
    """Return the standard error of a mean over tokens, r = sum_d s_d / sum_d n_d, drawn document by
    document.

    `sums_D`, `tokens_D`: s_d and n_d, what document d adds up to, and its tokens. Tokens of one
    document are alike, so the documents are the draws, and both sums of the ratio vary with them.
    To first order

        r - R = sum_d (s_d - R n_d) / sum_d n_d

    around the ratio R of all text. The D terms are independent with mean 0, so the variance is D /
    (D - 1) sum_d (s_d - r n_d)^2 / (sum_d n_d)^2, where D - 1 is for the r that takes R's place.
    Documents of equal length give the standard error of the mean of their means. None for fewer
    than two documents: they say nothing of others.

    Source: Cochran, Sampling Techniques, 1977, section 6.3: the ratio estimator, of clusters.
    """
    num_documents, num_tokens = len(tokens_D), sum(tokens_D)
    if num_documents < 2:
        return None
    ratio = math.fsum(sums_D) / num_tokens
    squares = math.fsum(
        (total - ratio * count) ** 2 for total, count in zip(sums_D, tokens_D, strict=True)
    )
    return math.sqrt(num_documents / (num_documents - 1) * squares) / num_tokens


@dataclass(frozen=True, slots=True)
class Loss:
    """Mean negative log-likelihood of tokens 2..T of all blocks. The error is over documents.

    `document_nats`, `document_tokens`: sums over each document, whose ratio it is; empty where they
    were not kept. `standard_error`: see the function; None if it is unknown.
    """

    nats_per_token: float
    standard_error: float | None
    num_tokens: int
    document_nats: tuple[float, ...] = ()
    document_tokens: tuple[int, ...] = ()

    @classmethod
    def of(cls, nats_D: Sequence[float], tokens_D: Sequence[int]) -> "Loss":
        """Return the loss of sums over documents: all nats over all tokens."""
        num_tokens = sum(tokens_D)
        error = standard_error(nats_D, tokens_D)
        return cls(
            math.fsum(nats_D) / num_tokens, error, num_tokens, tuple(nats_D), tuple(tokens_D)
        )

    @property
    def perplexity(self) -> float:
        """exp(nats per token)."""
        return math.exp(self.nats_per_token)


Parsed = TypeVar("Parsed")


@dataclass(frozen=True, slots=True)
class Record:
    """A command's result as plain numbers: written to JSON and read back."""

    def __repr__(self) -> str:
        """Name what shows it: its numbers would fill a screen."""
        return f"<{type(self).__name__}: secateur.table shows it, .to_json() has every number>"

    def to_json(self) -> str:
        """Return the record as indented JSON."""
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    @classmethod
    def from_json(cls: type[Parsed], text: str | bytes, where: str) -> Parsed:
        """Return the record that `to_json` wrote. Raises CheckpointError, naming `where`."""
        return parse_json(cls, text, where)


def parse_json(kind: type[Parsed], text: str | bytes, where: str) -> Parsed:
    """Return the dataclass; unknown keys are ignored.

    Raises CheckpointError, naming `where` and the first field that is missing or wrong.
    """
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        field = "".join(f"{part}: " for part in first["loc"])
        raise CheckpointError(
            f"{where}: {field}{first['msg'].lower()}; it was changed or written by another version "
            "of secateur; make it again."
        ) from None


@dataclass(frozen=True, slots=True)
class Verdict:
    """A domain's KL(dense || model) with its error over documents, nats per token and agreement.

    `reverse_kl`: KL(model || dense). A model that grows vague raises it, one that grows too sure
    the other.
    """

    kl: float
    standard_error: float | None
    nats_per_token: float
    top1_agreement: float
    num_tokens: int
    reverse_kl: float

    @property
    def both_ways(self) -> float:
        """The mean of KL in both directions, half of Jeffreys' divergence."""
        return (self.kl + self.reverse_kl) / 2


Verdicts = dict[str, Verdict]


def mean_kl(verdicts: Verdicts) -> float:
    """Return the mean over domains of KL, in nats per token; domains count equally."""
    return sum(verdict.kl for verdict in verdicts.values()) / len(verdicts)


def mean_nats(of: Mapping[str, Loss | Verdict]) -> float:
    """Return the mean over domains of nats per token, ln of the geometric-mean perplexity."""
    return sum(domain.nats_per_token for domain in of.values()) / len(of)


def geometric_mean_perplexity(losses: Mapping[str, Loss]) -> float:
    """Return exp(mean over domains of nats per token); domains count equally."""
    return math.exp(mean_nats(losses))


def won_back(before: Verdicts, after: Verdicts) -> float:
    """Return the share of the KL to the dense model that was won back, below 0 if it rose; NaN if
    there was none.

    Cross-entropy alone also falls where a model learns the text and moves away from the dense one.
    """
    lost = mean_kl(before)
    return (lost - mean_kl(after)) / lost if lost > 0 else math.nan


@dataclass(frozen=True, slots=True)
class TrainingRecord:
    """What a training took, and its held-out verdicts. `held`: its weights were saved."""

    num_tokens: int
    seconds: float
    after: Verdicts
    held: bool


class Trained:
    """What the records of a polish and of a recovery have in common.

    `before`: the verdicts of the pruned model as it came; every KL is to the dense model.
    """

    __slots__ = ()
    dense: Verdicts
    before: Verdicts
    training: TrainingRecord

    @property
    def after(self) -> Verdicts:
        """The verdicts of the written model."""
        return self.training.after if self.training.held else self.before

    @property
    def headline(self) -> str:
        """How much nearer the training brought the model to the dense one."""
        if not self.training.held:
            return "held-out loss did not fall, so the weights are those from before the training"
        won = won_back(self.before, self.after)
        share = (
            f"KL to the dense model {mean_kl(self.before):.3f} -> {mean_kl(self.after):.3f} nats "
            "per token"
        )
        if won > 0:
            share += f", {won:.1%} won back"
        else:  # what it minimises fell all the same
            share += f", loss {mean_nats(self.before):.3f} -> {mean_nats(self.after):.3f}"
        return f"{share} with {self.training.num_tokens:,} tokens"


# Of an answer. More would cost as many steps again, and what differs shows by then.
ANSWER_TOKENS = 64


@dataclass(frozen=True, slots=True)
class AnswerPair:
    """What both models answer to a prompt, greedily."""

    prompt: str
    dense: str
    pruned: str


@dataclass(frozen=True, slots=True)
class OwnAnswers:
    """What pruning cost on the dense model's own answers. Nats are per token of the dense
    tokenizer.

    `standard_error`: of `nats_lost`, over prompts. `same_first`: the share of the answers' tokens
    that are the pruned model's first choice, too. `ended`: the share of a model's answers that end
    by themselves. `repeated`: the share of their runs of four tokens that were there before; both
    as (dense, pruned).
    """

    num_prompts: int
    num_tokens: int
    dense_nats: float
    nats: float
    standard_error: float
    same_first: float
    ended: tuple[float, float]
    repeated: tuple[float, float]
    shown: tuple[AnswerPair, ...]

    @property
    def nats_lost(self) -> float:
        """Nats per token of the pruned model less those of the dense one."""
        return self.nats - self.dense_nats


# What judges a model beside the text of its domains.
OTHER_TEXT, OWN_ANSWERS = "other text", "own answers"


@dataclass(frozen=True, slots=True)
class Judgement:
    """What a model lost, in nats per token of the dense tokenizer.

    `domains`: on text of the kinds that the run learnt by. `other`: on text of other sources.
    `answers`: on the dense model's own; None for that model, and where it was not asked.
    """

    domains: dict[str, Loss]
    other: Loss
    answers: OwnAnswers | None = None

    def lost(self, dense: "Judgement") -> dict[str, float]:
        """Return the nats per token that the dense model does not lose, by domain and by what else
        judges.
        """
        lost = {
            name: loss.nats_per_token - dense.domains[name].nats_per_token
            for name, loss in self.domains.items()
        }
        lost[OTHER_TEXT] = self.other.nats_per_token - dense.other.nats_per_token
        return lost if self.answers is None else {**lost, OWN_ANSWERS: self.answers.nats_lost}


@dataclass(frozen=True, slots=True)
class Size:
    """`num_params`: all parameters, tied ones once. `num_bytes`: their storage."""

    num_params: int
    num_bytes: int

    @classmethod
    def of(cls, model: Any) -> "Size":
        """Count a model's parameters."""
        counts = [(parameter.numel(), parameter.element_size()) for parameter in model.parameters()]
        return cls(sum(count for count, _ in counts), sum(count * size for count, size in counts))


@dataclass(frozen=True, slots=True)
class Workload:
    """What a run does: `batch` prompts of `prompt_tokens`, then `new_tokens` (>= 2) for each."""

    batch: int = 1
    prompt_tokens: int = 256
    new_tokens: int = 32
    repeats: int = 5


@dataclass(frozen=True, slots=True)
class Costs:
    """The least work of a model at a workload."""

    decode_bytes_per_token: float
    prefill_flops_per_token: float
    kv_cache_bytes_per_token: int


@dataclass(frozen=True, slots=True)
class Ancestor:
    """A model that a result was pruned from, as `result.json` names it.

    `name`: its hub id, or the last part of its path. `fingerprint`: see `model.identity`; None for
    a model in memory. The rest is as its own model card says, None or empty where that is not
    known. `license_link`: a URL, or a file that results carry along.
    """

    name: str
    fingerprint: str | None
    num_params: int
    hub_id: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
