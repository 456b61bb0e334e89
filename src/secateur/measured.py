"""The records of what was measured on finished models: by `evaluate`, by `bench`, and by `compare` on a grid of runs.

In: figures. Out: frozen dataclasses, which are written as JSON, read back, and rendered for people.
"""

import dataclasses
import math
import statistics
from dataclasses import dataclass, field
from typing import Any

from secateur.facts import Costs, Divergence, Size, Workload
from secateur.json_file import Record

EVALUATION_FILE, BENCH_FILE = "evaluation.json", "bench.json"

# What a task is plotted by: the last of these that it has. Every metric is in the tables.
PLOTTED_METRICS = ("exact_match,none", "acc,none", "acc_norm,none")


@dataclass(frozen=True, slots=True)
class Quality:
    """How well a model predicts tokens 2..T of every block, given those before. The error is over blocks.

    `num_bytes`: UTF-8 bytes of the predicted tokens as text, end-of-text tokens counting none.
    `bits_per_byte`: nats_per_token / ln 2 x num_tokens / num_bytes, comparable across tokenizers.
    """

    nats_per_token: float
    standard_error: float
    perplexity: float
    bits_per_byte: float
    num_tokens: int
    num_bytes: int
    block_nats: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class TaskResults:
    """lm-evaluation-harness's results. `sources`: by task, where its rows came from if not from the hub.

    `results`: task -> "metric,filter" -> value, the standard error under "metric_stderr,filter". `more`: the other keys
    of the harness's own mapping, which lie beside these in the file and are not read back.
    """

    results: dict[str, dict[str, Any]]
    sources: dict[str, str]
    lm_eval_version: str
    more: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TaskScore:
    """One metric of one task, or a difference of two. `error`: its standard error, None where there is none."""

    value: float
    error: float | None

    def text(self, sign: str = "") -> str:
        """Return the score for people. `sign`: "+" for a difference."""
        return f"{self.value:{sign}.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


Scores = dict[str, dict[str, TaskScore]]  # task -> "metric,filter" -> score


def task_metrics(results: dict[str, Any]) -> list[str]:
    """Return the metrics ("acc,none") of one task's results in the harness's shape."""
    return [key for key in results if "," in key and "_stderr," not in key]


def task_scores(results: dict[str, dict[str, Any]]) -> Scores:
    """Return every task's scores out of the harness's results."""

    def score(of: dict[str, Any], metric: str) -> TaskScore:
        error = of.get(metric.replace(",", "_stderr,", 1))
        return TaskScore(of[metric], error if isinstance(error, float) else None)

    return {task: {metric: score(of, metric) for metric in task_metrics(of)} for task, of in results.items()}


@dataclass(frozen=True, slots=True)
class Measured:
    """What `secateur evaluate` measured of one model."""

    domains: dict[str, Quality]
    wikitext2: Quality | None = None
    tasks: TaskResults | None = None

    @property
    def scores(self) -> Scores:
        """The tasks' scores, none where no task was asked."""
        return {} if self.tasks is None else task_scores(self.tasks.results)


@dataclass(frozen=True, slots=True)
class Change:
    """Pruned minus dense, and its standard error over the same blocks."""

    nats_per_token: float
    standard_error: float


@dataclass(frozen=True, slots=True)
class TaskChange:
    """Pruned minus dense; the error is None for groups and for metrics that are no mean over questions."""

    difference: float
    standard_error: float | None


@dataclass(frozen=True, slots=True)
class Differences:
    """Pruned minus dense, over the same blocks or questions. What was not measured is None."""

    domains: dict[str, Change]
    wikitext2: Change | None = None
    tasks: dict[str, dict[str, TaskChange]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation(Record):
    """`evaluation.json`. `pruned`: the model that was asked for; `dense`, `kl`, `differences`: where another was given.

    `model`, `against`: what the two are called. `kl`: of the pruned model from the dense one, by domain.
    """

    model: str
    against: str | None
    settings: dict[str, Any]
    notes: tuple[str, ...]
    dense: Measured | None = None
    pruned: Measured
    kl: dict[str, Divergence] | None = None
    differences: Differences | None = None
    versions: dict[str, str]

    @property
    def models(self) -> dict[str, Measured]:
        """The measured models by what they are called in tables, dense first."""
        return {"pruned": self.pruned} if self.dense is None else {"dense": self.dense, "pruned": self.pruned}

    def plain(self) -> dict[str, Any]:
        """Return the fields as a mapping, without what was not measured."""
        data = {key: value for key, value in dataclasses.asdict(self).items() if key == "against" or value is not None}
        for part in ("dense", "pruned", "differences"):
            if part in data:
                data[part] = {key: value for key, value in data[part].items() if value is not None}
        for which in self.models:
            if "tasks" in data[which]:
                data[which]["tasks"] |= data[which]["tasks"].pop("more")
        return data


@dataclass(frozen=True, slots=True)
class Speed:
    """Medians over repeats, and (lowest, highest) of them. All tokens of a batch count.

    `prefill`: prompt tokens per second until the first new token; `decode`: new tokens per second after the first.
    """

    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    first_token_seconds: float
    prefill_range: tuple[float, float]
    decode_range: tuple[float, float]
    first_token_range: tuple[float, float]
    batch: int
    prompt_tokens: int
    new_tokens: int
    repeats: int


@dataclass(frozen=True, slots=True)
class Ratio:
    """Speed of one model over that of another: median over repeats of the ratio within each, and the extremes."""

    median: float
    lowest: float
    highest: float


@dataclass(frozen=True, slots=True)
class BenchSettings:
    """How a bench runs. `compiled`: through torch.compile. llama.cpp runs on the CPU, one prompt at a time, in f16."""

    engine: str = "transformers"
    device: str = "cpu"
    compiled: bool = False


@dataclass(frozen=True, slots=True)
class ModelFigures:
    """One model's figures. `peak_bytes`: weights and the most a run allocates; None where the engine does not say."""

    model: str
    dtype: str
    size: Size
    costs: Costs
    speed: Speed
    peak_bytes: int | None


@dataclass(frozen=True, slots=True)
class SpeedUp:
    """How much faster the pruned model is: measured, the ideal of the same run, and the share of the ideal reached."""

    measured: Ratio
    ideal: float
    share_of_ideal: float


@dataclass(frozen=True, slots=True)
class BenchResult(Record):
    """`bench.json`. `dense`, `prefill` and `decode` are None unless a dense model was given."""

    settings: BenchSettings
    num_threads: int
    workload: Workload
    pruned: ModelFigures
    dense: ModelFigures | None
    prefill: SpeedUp | None
    decode: SpeedUp | None
    versions: dict[str, str]

    @property
    def models(self) -> dict[str, ModelFigures]:
        """The timed models by what they are called in tables, dense first."""
        return {"model": self.pruned} if self.dense is None else {"dense": self.dense, "pruned": self.pruned}

    @property
    def speed_ups(self) -> dict[str, SpeedUp]:
        """The speed-up by phase, nothing where there was no dense model."""
        return {name: up for name, up in (("prefill", self.prefill), ("decode", self.decode)) if up is not None}


@dataclass(frozen=True, slots=True)
class FoundCell:
    """One finished cell of a study. `tasks`: by task, the harness's numbers. `seconds`: of the pruning alone."""

    method: str
    ratio: float
    seed: int
    remove_reached: float
    seconds: float
    nats_per_token: dict[str, float]
    tasks: dict[str, dict[str, float]]
    num_tokens: dict[str, int] = field(default_factory=dict)

    @property
    def perplexity(self) -> float:
        """Geometric mean over domains."""
        return math.exp(statistics.mean(self.nats_per_token.values()))


@dataclass(frozen=True, slots=True)
class Comparison(Record):
    """`results.json`: every cell of a study's grid, the dense model's first in each seed."""

    cells: tuple[FoundCell, ...]
    versions: dict[str, str]
