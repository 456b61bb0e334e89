"""The text of a finished run, drawn again: which documents judged it, and which it learnt by.

In: a result's directory, its recipe and a tokenizer. Out: the same parts of the same documents.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from secateur.data.pool import Allotted, Amounts, Split, TextPool, judging_tokens
from secateur.errors import RecipeError
from secateur.facts import parse_json
from secateur.log import Progress
from secateur.model.stock import Tokenizer
from secateur.recipe import RECIPE_FILE, Recipe
from secateur.result_directory import RESULT_FILE


@dataclass(frozen=True, slots=True)
class TextFacts:
    """What `result.json` says of a run's text: see `CalibrationFacts`."""

    judged_hash: str = ""
    allotted: Mapping[str, tuple[int | None, ...]] = field(
        default_factory=dict[str, tuple[int | None, ...]]
    )


@dataclass(frozen=True, slots=True)
class _Result:
    calibration: TextFacts


def text_facts(directory: Path) -> TextFacts | None:
    """Return what a result says of its text; None for a model that no run made. Raises
    CheckpointError.
    """
    path = directory / RESULT_FILE
    return parse_json(_Result, path.read_bytes(), str(path)).calibration if path.is_file() else None


def run_text_again(
    directory: Path,
    recipe: Recipe,
    tokenizer: Tokenizer,
    progress: Progress,
    *,
    num_training_tokens: int = 0,
    least_held_out: int = 0,
    only: Collection[str] | None = None,
    key: str = "polish.num_tokens",
) -> Split:
    """Return the parts of a run's text. `recipe`: the run's, with `num_tokens` and
    `sequence_length`.

    `num_training_tokens`, `key`: to learn by, if more than the run's calibration, and what asks for
    them. `least_held_out`: blocks of a domain; more than the run's come from what it learnt by.
    `only`: the domains to read, None for all. Raises CalibrationError for text that is unreadable
    or too short, RecipeError for a recipe that no run wrote.
    """
    calibration, facts = recipe.calibration, text_facts(directory)
    if calibration.num_tokens is None:
        raise RecipeError(
            f"recipe {directory / RECIPE_FILE}: calibration.num_tokens is missing; use the "
            "recipe.yaml that the run wrote."
        )
    amounts = Amounts(
        num_tokens=calibration.num_tokens,
        num_training_tokens=num_training_tokens,
        num_judged_tokens=judging_tokens(recipe.output.evaluate),
        least_held_out=least_held_out,
    )
    allotted = (
        {}
        if facts is None
        else {name: Allotted(*numbers) for name, numbers in facts.allotted.items()}
    )
    if least_held_out:
        allotted = {name: Allotted(numbers.judged, None) for name, numbers in allotted.items()}
    assert calibration.sequence_length is not None, "a run writes it"
    pool = TextPool(calibration.sequence_length, tokenizer, recipe.seed, progress)
    return pool.split(calibration.domains, amounts, allotted=allotted, only=only, key=key)
