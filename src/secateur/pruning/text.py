"""The text of a run: one pool, whose documents judge, guard or teach, before a trim and after it.

In: an opened model. Out: what the run learns by, and what judges it.
"""

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from secateur.data.blocks import JudgedText, LearningText
from secateur.data.pool import Allotted, Amounts, Learning, Split, TextPool, judging_tokens
from secateur.data.sampled import with_sampled
from secateur.log import Progress
from secateur.model.modules import CausalLM
from secateur.pruning.open import Opened, tokenizer_of
from secateur.pruning.resolve import Resolved
from secateur.pruning.resolve_parts import text_for
from secateur.recipe import Recipe


class Drawn(NamedTuple):
    """What a run learns by and what judges it. `allotted`: whose the documents are, by domain that is read."""

    learning: LearningText
    judged: JudgedText
    allotted: dict[str, Allotted]

    def written(self, opened: Opened, model: CausalLM, progress: Progress) -> "Drawn":
        """Return the text with what the dense model writes, of tokens that stay."""
        dense_ids = None if opened.trim is None else torch.tensor(opened.trim.kept.dense_ids)
        tokenizer, seed = tokenizer_of(opened), opened.recipe.seed
        learning, judged = with_sampled(self.learning, self.judged, model, tokenizer, seed, progress, dense_ids)
        return Drawn(learning, judged, self.allotted)


@dataclass(slots=True)
class RunText:
    """A run's documents, read once. Ranks share what the first one draws, which alone may ask.

    `recipe`: with its text filled in. `num_judged_tokens`: of each domain. `must_judge`: a text that
    is too short for these is an error.
    """

    opened: Opened
    recipe: Recipe
    pool: TextPool
    num_judged_tokens: int
    must_judge: bool
    _before: Split | None = field(default=None, init=False)

    def learning(self) -> Learning:
        """Return what a dense model may learn by before it is trimmed, and hold those documents to that."""
        if self._before is None:
            calibration = self.recipe.calibration
            read = {name: domain for name, domain in calibration.domains.items() if not domain.sampled}
            self._before = self._split(self.recipe.filled(calibration={"domains": read}), self.opened)
        return self._before.learning

    def drawn(self, opened: Opened, resolved: Resolved) -> Drawn:
        """Return the text of the run, in the tokens that stay."""
        split = self._split(resolved.recipe, opened, resolved.recipe.polish.num_tokens or 0)
        return Drawn(split.learning.text, split.judged, split.allotted)

    def _split(self, recipe: Recipe, opened: Opened, num_training_tokens: int = 0) -> Split:
        assert recipe.calibration.num_tokens is not None
        amounts = Amounts(
            num_tokens=recipe.calibration.num_tokens,
            num_training_tokens=num_training_tokens,
            num_judged_tokens=self.num_judged_tokens,
            num_rounds=recipe.choose.rounds if recipe.calibration.rotate else 1,
        )
        allotted = {} if self._before is None else self._before.allotted
        return self.pool.split(
            recipe.calibration, amounts, tokenizer_of(opened), allotted=allotted, must_judge=self.must_judge
        )


def run_text(opened: Opened, progress: Progress, *, num_judged_blocks: int | None = None) -> RunText:
    """Return the text of a run, of which nothing is read yet; `opened` is dense.

    `num_judged_blocks`: that each domain must have to judge by; None: by the recipe, if there are so many.
    """
    recipe = opened.recipe
    calibration, _ = text_for(recipe, opened.arch.select(recipe.remove.group_names), opened.model.config)
    recipe = recipe.filled(calibration=calibration)
    pool = TextPool(recipe.calibration, tokenizer_of(opened), recipe.seed, progress)
    if num_judged_blocks is not None:
        return RunText(opened, recipe, pool, num_judged_blocks * pool.length, must_judge=True)
    return RunText(opened, recipe, pool, judging_tokens(recipe.output.evaluate), must_judge=False)
