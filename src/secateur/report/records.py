"""Records of what each verb returns, as plain numbers, and a result directory read back.

First what runs and inspections tell, then what is measured on finished models: evaluation, speed,
recovery.
"""

import math
import statistics
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from secateur.errors import CheckpointError
from secateur.facts import (
    Ancestor,
    Costs,
    Judgement,
    Loss,
    OwnAnswers,
    Parsed,
    Record,
    Size,
    Trained,
    TrainingRecord,
    Verdicts,
    Workload,
    parse_json,
    standard_error,
)
from secateur.log import LOG_FILE
from secateur.methods.budget import GroupProfile
from secateur.recipe import RECIPE_FILE, Recipe, as_recipe
from secateur.result_directory import BENCH_FILE, EVALUATION_FILE, RESULT_FILE

RECOVERY_FILE = "recovery.json"

NOT_TOLD_APART = "not measurably different"


@dataclass(frozen=True, slots=True, kw_only=True)
class Quality(Loss):
    """How well a model predicts text.

    `num_bytes`: of text that the predicted tokens stand for; end-of-text tokens are none.
    `bits_per_byte`: nats_per_token / ln 2 x num_tokens / num_bytes, comparable across tokenizers.
    """

    num_bytes: int
    bits_per_byte: float

    @classmethod
    def on(cls, num_bytes: int, loss: Loss) -> "Quality":
        """Return the quality of a loss on so many bytes."""
        bits_per_byte = loss.nats_per_token / math.log(2) * loss.num_tokens / num_bytes
        return cls(**asdict(loss), num_bytes=num_bytes, bits_per_byte=bits_per_byte)


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
    """A metric of a task, or a difference of two. `error`: the standard error; None for groups and
    what is no mean.
    """

    value: float
    error: float | None

    def text(self, sign: str = "") -> str:
        """Return the score as text. `sign`: "+" for a difference."""
        return f"{self.value:{sign}.3f}" + ("" if self.error is None else f" ± {self.error:.3f}")


Scores = dict[str, dict[str, TaskScore]]  # task -> "metric,filter" -> score


def task_metrics(results: dict[str, Any]) -> list[str]:
    """Return the metrics ("acc,none") in one task's results."""
    return [key for key in results if "," in key and "_stderr," not in key]


def _score(results: dict[str, Any], metric: str) -> TaskScore:
    error = results.get(metric.replace(",", "_stderr,", 1))
    return TaskScore(results[metric], error if isinstance(error, float) else None)


@dataclass(frozen=True, slots=True)
class Measured:
    """What `secateur evaluate` measured on one model. `other_text`: of other sources than any
    run's.
    """

    domains: dict[str, Quality]
    other_text: Quality
    tasks: TaskResults | None = None

    @property
    def scores(self) -> Scores:
        """The tasks' scores; empty without tasks."""
        results = {} if self.tasks is None else self.tasks.results
        return {
            task: {metric: _score(of, metric) for metric in task_metrics(of)}
            for task, of in results.items()
        }


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


def change(dense: Loss, pruned: Loss) -> Change:
    """Return pruned minus dense, document by document: what documents have in common cancels."""
    differences = [
        after - before
        for before, after in zip(dense.document_nats, pruned.document_nats, strict=True)
    ]
    error = standard_error(differences, dense.document_tokens)
    return Change(pruned.nats_per_token - dense.nats_per_token, error)


def mean_change(changes: Collection[Change]) -> Change:
    """Return the mean over domains, which count equally and share no document: errors add as
    squares.
    """
    errors = [change.standard_error for change in changes if change.standard_error is not None]
    error = math.hypot(*errors) / len(changes) if len(errors) == len(changes) else None
    return Change(statistics.mean(change.nats_per_token for change in changes), error)


@dataclass(frozen=True, slots=True)
class Differences:
    """Pruned minus dense, over the same documents or questions. None: not measured."""

    domains: dict[str, Change]
    other_text: Change
    tasks: Scores | None


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Evaluation(Record):
    """`evaluation.json`. `pruned`: the evaluated model. `kl`: KL(dense || pruned) by domain.

    `model`, `against`: names of the two. Without `against`: no `dense`, `kl` and `differences`.
    """

    model: str
    against: str | None
    notes: tuple[str, ...]
    dense: Measured | None
    pruned: Measured
    kl: Verdicts | None
    differences: Differences | None
    versions: dict[str, str]
    own_answers: OwnAnswers | None  # of a chat model, with `against`

    @property
    def models(self) -> dict[str, Measured]:
        """The measured models by their names in tables, dense first; one alone is `model`."""
        return (
            {"model": self.pruned}
            if self.dense is None
            else {"dense": self.dense, "pruned": self.pruned}
        )


@dataclass(frozen=True, slots=True)
class Spread:
    """Median and extremes over repeats: of a figure, or of one model's speed over another's within
    each repeat.
    """

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
        return f"{self.median:.2f}x {spread}" if self.is_told else f"{NOT_TOLD_APART} {spread}"


@dataclass(frozen=True, slots=True)
class Speed:
    """Tokens per second, of all of a batch.

    `prefill`: prompt tokens up to the first new token. `decode`: new tokens after the first.
    """

    prefill: Spread
    decode: Spread


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
    """`bench.json`. `models`: dense and pruned, or one `model`. `speed_ups`: by phase, of two
    models.

    `notes`: sentences on what the figures do not say.
    """

    device: str
    num_threads: int
    workload: Workload
    models: dict[str, ModelFigures]
    speed_ups: dict[str, SpeedUp]
    versions: dict[str, str]
    notes: tuple[str, ...]


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
    `num_held_out_tokens`: to guard alone, never trained on. `seconds`: of this process. `judged`:
    the dense, the pruned and the recovered model on what judges; the verdicts are on what guards.
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
    judged: dict[str, Judgement]


Losses = dict[str, Loss]


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes by part; `statistics` and `solve`: of the widest group. Weights on disk count none.

    `layer_choice`: bytes beside the weights while whole layers are chosen, before the first round.
    `polish`: all bytes while what is left trains, with its weights.
    """

    weights: int
    hidden_states: int
    statistics: int
    solve: int
    layer_choice: int = 0
    polish: int = 0

    @property
    def peak(self) -> int:
        """The largest sum: parts of one stage are freed before the next."""
        return max(self.weights + max(self._in_a_round, self.layer_choice), self.polish)

    @property
    def is_of_layer_choice(self) -> bool:
        """Whether the choice of layers is the peak."""
        return self.layer_choice > self._in_a_round

    @property
    def _in_a_round(self) -> int:
        return self.hidden_states + max(self.statistics, self.solve)


@dataclass(frozen=True, slots=True)
class GroupFacts:
    """A kind of group over some layers. `num_units`: in the first one. `num_keep`: mean units after
    a run.
    """

    name: str
    unit: str
    num_layers: int
    num_units: int
    num_keep: int
    params_per_unit: int
    num_params: int


@dataclass(frozen=True, slots=True, repr=False)
class Inspection(Record):
    """A model's structure and the outcome of a recipe's `remove`.

    `remove_asked`, `remove_reached`, `largest_remove`: shares of all parameters. `groups`: over the
    unprotected layers that stay. `possible`, `impossible`: groups that the family has, and those it
    cannot have, with the reason. `disk_bytes`: the most written. `num_token_params`: of all rows of
    embedding and head, tied ones once. `files`: bytes of a GGUF file by type without its tokenizer,
    of the dense model and of the result, by the widths that `uniform` gives; where a run measures
    widths they are rounded, and the bytes are near. `files_problem`: why there are none.
    """

    model: str
    family: str
    dtype: str
    size: Size
    num_layers: tuple[int, int]  # before, after
    groups: tuple[GroupFacts, ...]
    remove_asked: float
    remove_reached: float
    largest_remove: float
    align: int
    num_params_after: int
    num_bytes_after: int
    num_calibration_tokens: int
    memory: MemoryEstimate
    weights_on_disk: bool
    disk_bytes: int
    device: str
    warnings: tuple[str, ...]
    possible: tuple[GroupFacts, ...]
    impossible: dict[str, str]
    num_tokens: int
    num_token_params: int
    files: dict[str, tuple[int, int]]
    files_problem: str | None


@dataclass(frozen=True, slots=True)
class CalibrationFacts:
    """Which text the run saw, by domain.

    `held_out_overlap`: share of the judging text's 13-grams that the calibration text also has.
    `num_judged_tokens`: of the text that judges the run; `judged_hash`: of its blocks. `allotted`:
    by domain of documents, the first one that did not judge and the first one that the run learnt
    by.
    """

    content_hash: str
    sequence_length: int
    num_tokens: dict[str, int]
    num_held_out_tokens: dict[str, int]
    held_out_overlap: dict[str, float | None]
    num_judged_tokens: dict[str, int]
    judged_hash: str
    allotted: dict[str, tuple[int | None, ...]]


@dataclass(frozen=True, slots=True)
class VocabularyFacts:
    """A trimmed vocabulary; pairs are counts in the dense and in the trimmed tokenizer.

    `by_domain`: predicted tokens of the held-out text. `scripts`: tokens with letters of a script.
    `nats`: by domain, per token of the dense tokenizer, of the dense model with
    all its tokens and with those alone that stay. `foretold`: nats per token that the trim was to
    cost by the counts; None where nothing was counted.
    """

    num_before: int
    num_after: int
    by_domain: dict[str, tuple[int, int]]
    scripts: dict[str, tuple[int, int]]
    nats: dict[str, tuple[float, float]]
    foretold: float | None = None


@dataclass(frozen=True, slots=True, repr=False)
class Summary(Record):
    """Everything that a run reports in numbers.

    `like`: the result whose units went here too. `measured`: the name of the measurement that it
    was cut by. `loaded_by`: the class of transformers that reloaded it; None, as the figures of
    that reload, if nothing was saved. `remove_asked`, `remove_reached`: shares of all parameters.
    """

    model: str
    family: str
    command: str
    remove_asked: float
    remove_reached: float
    dense_size: Size
    pruned_size: Size
    num_layers: tuple[int, int]  # before, after
    widths: dict[str, tuple[int, int, int]]  # group -> units per layer before, least and most after
    calibration: CalibrationFacts
    dense_losses: Losses
    pruned_losses: Losses
    guard_refusals: int
    seconds: dict[str, float]
    peak_bytes: int
    reload_max_abs_difference: float | None
    loaded_by: str | None
    warnings: tuple[str, ...]
    versions: dict[str, str]
    device: str
    device_peak_bytes: int | None  # allocated there, where torch counts it
    polish: PolishRecord | None  # if it was trained; `pruned_losses` are of the model after that
    other_text: tuple[Loss, Loss] | None  # of other sources, dense and pruned, if it was judged
    own_answers: OwnAnswers | None  # of a model with a chat template, if it was judged
    vocabulary: VocabularyFacts | None  # if it was trimmed; losses are then per dense token
    like: Ancestor | None
    measured: str | None
    lineage: tuple[Ancestor, ...]  # the original model first
    # By stage of the progress: seconds as foretold at first, as foretold anew, and taken.
    foretold: dict[str, list[float]]
    files: dict[str, str] = field(
        default_factory=dict[str, str]
    )  # sha256 by path, of what the run wrote

    @property
    def has_layers_of_different_widths(self) -> bool:
        """Whether a group kept more units in one layer than in another."""
        return any(least != most for _, least, most in self.widths.values())


@dataclass(frozen=True, slots=True)
class SizeCost:
    """A smaller model: the share of all parameters that goes, and nats per token lost by what
    judges.

    `num_bytes`: of a GGUF file by type, where llama.cpp runs the family.
    """

    removed: float
    num_params: int
    lost: dict[str, float]
    num_bytes: dict[str, int] = field(default_factory=dict[str, int])


# A loss below this, in nats per token, is within the noise of what judges.
LEAST_NATS = 1e-3


def nats_at(probes: Sequence[SizeCost], judged: str, removed: float, units: float) -> float:
    """Return the nats lost at a share, by a power law between two probes, the nearest ones beyond
    all.

    nats = a x^p with x = -ln(1 - removed / units), where `units` is the share that all units are,
    and a and p are from both probes. Each equal part of what is left then adds the same to x, and
    none are lost where nothing goes.
    """
    pair = next((pair for pair in pairwise(probes) if removed <= pair[1].removed), probes[-2:])
    left, right, here = (
        -math.log1p(-share / units) for share in (pair[0].removed, pair[1].removed, removed)
    )
    before, after = (max(probe.lost[judged], LEAST_NATS) for probe in pair)
    power = math.log(after / before) / math.log(right / left)
    return before * (here / left) ** max(power, 0.0)


@dataclass(frozen=True, slots=True, repr=False)
class Measurement(Record):
    """What sizes of a model cost without a polish: `probes` were cut and judged, `sizes` are
    foretold from these.

    `band`: how far off the middle probe is foretold by the others, a mean share of its loss.
    `units`: the share of all parameters that the groups' units are. `pace`: of each probe, seconds
    per token of a prompt, and of what is written.
    """

    model: str
    command: str
    dense_size: Size
    calibration: CalibrationFacts
    probes: tuple[SizeCost, ...]
    sizes: tuple[SizeCost, ...]
    band: float
    units: float
    pace: tuple[tuple[float, float], ...]
    seconds: dict[str, float]
    warnings: tuple[str, ...]
    versions: dict[str, str]
    text_hash: str  # of what was measured on
    lineage: tuple[Ancestor, ...]
    profiles: tuple[
        tuple[int, str, GroupProfile], ...
    ]  # with layer and group, if widths by layer were asked for
    files: dict[str, str] = field(default_factory=dict[str, str])  # sha256 by path


@dataclass(frozen=True, slots=True)
class GroupStep:
    """What a group kept in a round, of `total` units before it."""

    round: int
    layer: int
    group: str
    kept: int
    total: int


@dataclass(frozen=True, slots=True)
class RemovedLayer:
    """A removed layer, by its number in the dense model.

    `chosen`: its place in the order of choice. `kl`: nats per token without it and those chosen
    before. Both are None for layers that the recipe names. Errors: what the patch leaves of what
    the layer added, as shares by domain; None without a patch.
    """

    layer: int
    chosen: int | None = None
    kl: float | None = None
    error_after: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class ResultFiles:
    """All that a report tells of a run."""

    summary: Summary
    removed_layers: tuple[RemovedLayer, ...]
    steps: tuple[GroupStep, ...]
    recipe: Recipe
    evaluation: Evaluation | None
    bench: BenchResult | None
    recovery: RecoveryRecord | None


def read_summary(directory: Path) -> Summary:
    """Read `result.json`. Raises CheckpointError if it is missing or damaged."""
    return Summary.from_json(_read(directory, RESULT_FILE), str(directory / RESULT_FILE))


def read_result(directory: Path) -> ResultFiles:
    """Read a result directory. Raises CheckpointError or RecipeError if it is incomplete."""
    summary = read_summary(directory)
    return ResultFiles(
        summary=summary,
        removed_layers=_events(directory, "layer", RemovedLayer),
        steps=_events(directory, "group", GroupStep),
        recipe=as_recipe(directory / RECIPE_FILE),
        evaluation=_added(Evaluation, directory, EVALUATION_FILE),
        bench=_added(BenchResult, directory, BENCH_FILE),
        recovery=_added(RecoveryRecord, directory, RECOVERY_FILE),
    )


def _added(kind: type[Parsed], directory: Path, name: str) -> Parsed | None:
    path = directory / name
    return parse_json(kind, _read(directory, name), str(path)) if path.exists() else None


@dataclass(frozen=True, slots=True)
class _Line:
    event: str


def _events(directory: Path, event: str, kind: type[Parsed]) -> tuple[Parsed, ...]:
    where = str(directory / LOG_FILE)
    lines = _read(directory, LOG_FILE).splitlines()
    return tuple(
        parse_json(kind, line, where)
        for line in lines
        if parse_json(_Line, line, where).event == event
    )


def _read(directory: Path, name: str) -> str:
    try:
        return (directory / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise CheckpointError(
            f"{directory}: {name} cannot be read ({reason}); give a directory that secateur prune "
            "has written."
        ) from None
