"""A result directory read back: what `prune` wrote there, and what `evaluate` and `bench` have added.

In: a directory. Out: a frozen `ResultFiles`. Weights are not read.
"""

from dataclasses import dataclass
from pathlib import Path

from secateur.errors import CheckpointError
from secateur.json_file import Kind, parse_json
from secateur.measured import BENCH_FILE, EVALUATION_FILE, BenchResult, Evaluation
from secateur.recipe import Recipe, load_recipe, parse_recipe
from secateur.recover_record import RECOVERY_FILE, RecoveryRecord
from secateur.runlog import LOG_FILE
from secateur.summary import RESULT_FILE, Summary

RECIPE_FILE = "recipe.yaml"


@dataclass(frozen=True, slots=True)
class GroupStep:
    """One line of the run log: what one group kept in one round, and its held-out errors by domain.

    `total`: units before this round. Errors are shares of the reader's output energy. `step` 0: compensation refused.
    """

    round: int
    layer: int
    group: str
    kept: int
    total: int
    seconds: float
    score_quantiles: tuple[float, ...]
    error_before: dict[str, float] | None = None
    error_after: dict[str, float] | None = None
    step: float | None = None


@dataclass(frozen=True, slots=True)
class RemovedLayer:
    """A layer that went as a whole, by its number in the dense model.

    `chosen`: its place in the order of choice. `kl`: nats per token without it and those chosen before it; none of both
    where the recipe named it. Errors: what its patch leaves of what it added, as shares, by domain; none where it was
    not patched.
    """

    layer: int
    chosen: int | None = None
    kl: float | None = None
    step: float | None = None
    error_before: dict[str, float] | None = None
    error_after: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class RoundEnd:
    """What a round had left, and its held-out nats per token by domain; `held`: the run did not go back behind it."""

    round: int
    num_params: int
    nats_per_token: dict[str, float]
    held: bool


@dataclass(frozen=True, slots=True)
class TrainingStep:
    """One step of a recovery: tokens trained on so far, and its loss."""

    step: int
    tokens: int
    loss: float


@dataclass(frozen=True, slots=True)
class ResultFiles:
    """Everything that a report tells of one run. `steps`: of rounds that held; `rounds`: none where nothing watched."""

    summary: Summary
    removed_layers: tuple[RemovedLayer, ...]
    steps: tuple[GroupStep, ...]
    rounds: tuple[RoundEnd, ...]
    recipe: Recipe
    recipe_text: str
    evaluation: Evaluation | None
    bench: BenchResult | None
    recovery: RecoveryRecord | None = None
    training: tuple[TrainingStep, ...] = ()


def read_result(directory: Path) -> ResultFiles:
    """Read a result directory. Raises CheckpointError or RecipeError for what is missing or unreadable."""
    found = Summary.from_json(_read(directory, RESULT_FILE), str(directory / RESULT_FILE))
    recipe_text = _read(directory, RECIPE_FILE)
    recipe = parse_recipe(load_recipe(directory / RECIPE_FILE), f"recipe {directory / RECIPE_FILE}")
    evaluation = _added(Evaluation, directory, EVALUATION_FILE)
    bench = _added(BenchResult, directory, BENCH_FILE)
    rounds = _events(directory, "round", RoundEnd)
    undone = {end.round for end in rounds if not end.held}
    steps = tuple(step for step in _events(directory, "group", GroupStep) if step.round not in undone)
    removed = _events(directory, "layer", RemovedLayer)
    recovery = _added(RecoveryRecord, directory, RECOVERY_FILE)
    training = _events(directory, "recover_step", TrainingStep)
    return ResultFiles(found, removed, steps, rounds, recipe, recipe_text, evaluation, bench, recovery, training)


def _added(kind: type[Kind], directory: Path, name: str) -> Kind | None:
    path = directory / name
    return parse_json(kind, _read(directory, name), str(path)) if path.exists() else None


@dataclass(frozen=True, slots=True)
class _Line:
    event: str


def _events(directory: Path, event: str, kind: type[Kind]) -> tuple[Kind, ...]:
    where = str(directory / LOG_FILE)
    lines = _read(directory, LOG_FILE).splitlines()
    return tuple(parse_json(kind, line, where) for line in lines if parse_json(_Line, line, where).event == event)


def _read(directory: Path, name: str) -> str:
    try:
        return (directory / name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise CheckpointError(
            f"{directory}: {name} cannot be read ({reason}); give a directory that secateur prune has written."
        ) from None
