"""Records of what was measured on finished models: evaluation, speed, comparison, recovery."""

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.facts import (
    Costs,
    Judgement,
    Loss,
    OwnAnswers,
    Record,
    Size,
    Trained,
    TrainingRecord,
    Verdicts,
    Workload,
    standard_error,
)

RECOVERY_FILE = "recovery.json"

ALIKE = "not measurably different"


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a model predicts tokens 2..T of every block. The standard error is over documents.

    `num_bytes`: bytes of text that the predicted tokens stand for; end-of-text tokens are none.
    `bits_per_byte`: nats_per_token / ln 2 x num_tokens / num_bytes, comparable across tokenizers.
    """

    nats_per_token: float
    standard_error: float | None
    perplexity: float
    bits_per_byte: float
    num_tokens: int
    num_bytes: int
    document_nats: tuple[float, ...]
    document_tokens: tuple[int, ...]

    @classmethod
    def of(cls, loss: Loss, num_bytes: int) -> "Quality":
        """Return the quality of a loss on so many bytes."""
        return cls(
            nats_per_token=loss.nats_per_token,
            standard_error=loss.standard_error,
            perplexity=loss.perplexity,
            bits_per_byte=loss.nats_per_token / math.log(2) * loss.num_tokens / num_bytes,
            num_tokens=loss.num_tokens,
            num_bytes=num_bytes,
            document_nats=tuple(loss.document_nats),
            document_tokens=tuple(loss.document_tokens),
        )


@dataclass(frozen=True, slots=True)
class TaskResults:
    """lm-evaluation-harness's results. `sources`: by task, where rows not from the hub came from.

    `results`: task -> "metric,filter" -> value, the standard error under "metric_stderr,filter".
    `more`: the harness's other keys; they are written to the file and not read back.
    """

    results: dict[str, dict[str, Any]]
    sources: dict[str, str]
    lm_eval_version: str
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TaskScore:
    """A metric of a task, or a difference of two. `error`: the standard error; None for groups and what is no mean."""

    value: float
    error: float | None

    def text(self, sign: str = "") -> str:
        """Return the score as text. `sign`: "+" for a difference."""
        return f"{self.value:{sign}.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


Scores = dict[str, dict[str, TaskScore]]  # task -> "metric,filter" -> score


def task_metrics(results: dict[str, Any]) -> list[str]:
    """Return the metrics ("acc,none") in one task's results."""
    return [key for key in results if "," in key and "_stderr," not in key]


def task_scores(results: dict[str, dict[str, Any]]) -> Scores:
    """Return every task's scores from the harness's results."""

    def score(of: dict[str, Any], metric: str) -> TaskScore:
        error = of.get(metric.replace(",", "_stderr,", 1))
        return TaskScore(of[metric], error if isinstance(error, float) else None)

    return {task: {metric: score(of, metric) for metric in task_metrics(of)} for task, of in results.items()}


@dataclass(frozen=True, slots=True)
class Measured:
    """What `secateur evaluate` measured on one model. `other_text`: of other sources than any run's."""

    domains: dict[str, Quality]
    other_text: Quality
    tasks: TaskResults | None = None

    @property
    def scores(self) -> Scores:
        """The tasks' scores; empty without tasks."""
        return {} if self.tasks is None else task_scores(self.tasks.results)


@dataclass(frozen=True, slots=True)
class Change:
    """Pruned minus dense, and its standard error over the same documents; None if it is unknown."""

    nats_per_token: float
    standard_error: float | None

    def text(self) -> str:
        """Return the difference with its error."""
        return f"{self.nats_per_token:+.3f}{plus_minus(self.standard_error)}"


def plus_minus(error: float | None) -> str:
    """Return what follows a mean: its error, and nothing if it is unknown or rounds to 0."""
    return f" ± {error:.3f}" if error and round(error, 3) else ""


def change(dense: Loss | Quality, pruned: Loss | Quality) -> Change:
    """Return pruned minus dense, document by document: what documents have in common cancels."""
    differences = [after - before for before, after in zip(dense.document_nats, pruned.document_nats, strict=True)]
    error = standard_error(differences, dense.document_tokens)
    return Change(pruned.nats_per_token - dense.nats_per_token, error)


def mean_change(changes: Collection[Change]) -> Change:
    """Return the mean over domains, which count equally and share no document: errors add as squares."""
    errors = [each.standard_error for each in changes if each.standard_error is not None]
    error = math.hypot(*errors) / len(changes) if len(errors) == len(changes) else None
    return Change(statistics.mean(each.nats_per_token for each in changes), error)


@dataclass(frozen=True, slots=True)
class Differences:
    """Pruned minus dense, over the same documents or questions. None: not measured."""

    domains: dict[str, Change]
    other_text: Change
    tasks: Scores | None = None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Evaluation(Record):
    """`evaluation.json`. `pruned`: the evaluated model. `kl`: KL(dense || pruned) by domain.

    `model`, `against`: names of the two. Without `against`: no `dense`, `kl` and `differences`.
    """

    model: str
    against: str | None
    settings: dict[str, Any]
    notes: tuple[str, ...]
    dense: Measured | None = None
    pruned: Measured
    kl: Verdicts | None = None
    differences: Differences | None = None
    versions: dict[str, str]
    own_answers: OwnAnswers | None = None  # of a chat model, with `against`

    @property
    def models(self) -> dict[str, Measured]:
        """The measured models by their names in tables, dense first."""
        return {"pruned": self.pruned} if self.dense is None else {"dense": self.dense, "pruned": self.pruned}


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and extremes over repeats: of a figure, or of one model's speed over another's within each repeat."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Return the spread of a value per repeat."""
        return cls(statistics.median(values), min(values), max(values))

    @property
    def is_told(self) -> bool:
        """Whether all repeats agree which model is faster: the ratio 1 is not in the range."""
        return not self.lowest <= 1 <= self.highest

    def ratio_text(self) -> str:
        """Return a ratio with its range; of one that is not told from 1 the range alone."""
        spread = f"({self.lowest:.2f} to {self.highest:.2f})"
        return f"{self.median:.2f}x {spread}" if self.is_told else f"{ALIKE} {spread}"


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second, of all of a batch, and seconds.

    `prefill`: prompt tokens up to the first new token. `decode`: new tokens after the first.
    """

    prefill: Spread
    decode: Spread
    first_token_seconds: Spread


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """A timed model's figures."""

    model: str
    dtype: str
    size: Size
    costs: Costs
    speed: Speed


@dataclass(frozen=True, slots=True)
class SpeedUp:
    """Pruned over dense speed: measured, and the ideal."""

    measured: Spread
    ideal: float


@dataclass(frozen=True, slots=True, repr=False)
class BenchResult(Record):
    """`bench.json`. `models`: dense and pruned, or one `model`. `speed_ups`: by phase, of two models.

    `notes`: sentences on what the figures do not say.
    """

    device: str
    num_threads: int
    workload: Workload
    models: dict[str, ModelFigures]
    speed_ups: dict[str, SpeedUp]
    versions: dict[str, str]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class PolishRecord(Trained):
    """The training at the end of a prune. `settings`: as they were used.

    `num_held_out_tokens`: for judging only, never trained on.
    """

    settings: dict[str, Any]
    num_held_out_tokens: int
    dense: Verdicts
    before: Verdicts
    training: TrainingRecord


@dataclass(frozen=True, slots=True, repr=False)
class RecoveryRecord(Trained, Record):
    """`recovery.json`. `before`: the pruned model as it came; every KL is to the dense model.

    `calibration`, `settings`: the domains and the recipe's part on recovery that were used.
    `num_held_out_tokens`: to guard alone, never trained on. `seconds`: of this process. `judged`: the
    dense, the pruned and the recovered model on what judges; the verdicts are on what guards.
    """

    pruned: str
    teacher: str
    command: str
    calibration: dict[str, Any]
    settings: dict[str, Any]
    seed: int
    content_hash: str
    sequence_length: int
    num_held_out_tokens: int
    dense: Verdicts
    before: Verdicts
    training: TrainingRecord
    seconds: dict[str, float]
    peak_bytes: int
    reload_max_abs_difference: float
    notes: tuple[str, ...]
    versions: dict[str, str]
    judged: dict[str, Judgement] = field(default_factory=dict[str, Judgement])
