"""The text of a run: one pool, whose documents judge, guard or teach, before a trim and after it.

In: an opened model. Out: what the run learns by, and what judges it.
"""

from dataclasses import dataclass, field, replace
from typing import NamedTuple

from secateur.data.answers import Answers, Speaker, Written, with_answers
from secateur.data.blocks import JudgedText, LearningText, ngram_overlap
from secateur.data.forms import closing_of_turn
from secateur.data.pool import Allotted, Amounts, Learning, Split, TextPool, judging_tokens
from secateur.errors import CalibrationError, RecipeError
from secateur.log import Progress
from secateur.pruning.open import Opened, tokenizer_of
from secateur.pruning.resolve import Resolved, checked, text_for
from secateur.recipe import SHARE_OF_ANSWERS, Domain, Recipe
from secateur.recovery.text import answers_of
from secateur.report.records import CalibrationFacts
from secateur.store import Services
from secateur.vocabulary.retokenised import in_tokens_of

# The domain of what the dense model answers to prompts that come with secateur.
ANSWERS = "answers"


class Drawn(NamedTuple):
    """What a run learns by and what judges it. `allotted`: whose the documents are, by domain that
    is read.
    """

    learning: LearningText
    judged: JudgedText
    allotted: dict[str, Allotted]

    def written(self, opened: Opened, answers: Answers) -> "Drawn":
        """Return the text with what the dense model answers, in the tokens that stay.

        `answers`: in the dense model's. All ranks call it together.
        """
        told = None
        if opened.trim is not None:
            told = in_tokens_of(opened.trim.dense_tokenizer, opened.trim.tokenizer)
        return Drawn(*with_answers(self.learning, self.judged, answers, told), self.allotted)

    def facts(self) -> CalibrationFacts:
        """Return hashes, token counts by domain, and the overlap of judging and learning text."""
        learning, judged = self.learning, self.judged.blocks
        return CalibrationFacts(
            content_hash=learning.content_hash,
            sequence_length=learning.sequence_length,
            num_tokens={domain.name: domain.calibration.num_tokens for domain in learning.domains},
            num_held_out_tokens={
                name: blocks.num_tokens for name, blocks in learning.held_out.items()
            },
            held_out_overlap=ngram_overlap(
                {domain.name: domain.blocks.ids_NT for domain in learning.domains},
                {name: blocks.ids_NT for name, blocks in judged.items()},
            ),
            num_judged_tokens={name: blocks.num_tokens for name, blocks in judged.items()},
            judged_hash=self.judged.content_hash,
            allotted={name: tuple(numbers) for name, numbers in self.allotted.items()},
        )


@dataclass(slots=True)
class RunText:
    """A run's documents, read once. Ranks share what the first one draws, which alone may ask.

    `opened`: with the recipe's text filled in. `num_tokens`: of all domains. `num_judged_tokens`:
    of each. `must_judge`: a text that is too short for these is an error.
    """

    opened: Opened
    pool: TextPool
    num_tokens: int
    num_judged_tokens: int
    must_judge: bool
    _before: Split | None = field(default=None, init=False)
    _written: Written = field(default_factory=Written, init=False)

    def answers(self, dense: Opened, services: Services) -> Answers:
        """Return what the dense model answers, in its own tokens. All ranks call it together.

        `dense`: with weights where it computes.
        """
        tokenizer, recipe = tokenizer_of(replace(dense, trim=None)), self.opened.recipe
        num_tokens = 3 * self.num_tokens + (recipe.polish.num_tokens or 0)
        speaker = Speaker(dense.model, dense.arch, tokenizer, str(recipe.seed), self.pool.length)
        return answers_of(
            recipe, speaker, num_tokens, services.store, services.progress, self._written
        )

    def learning(self) -> Learning:
        """Return what a dense model may learn by before it is trimmed, and hold those documents to
        that.
        """
        if self._before is None:
            self._before = self._split(self.opened.recipe, self.opened, self.num_tokens)
        return self._before.learning

    def drawn(self, opened: Opened, resolved: Resolved) -> Drawn:
        """Return the text of the run, in the tokens that stay."""
        split = self._split(
            resolved.recipe, opened, resolved.num_tokens, resolved.recipe.polish.num_tokens or 0
        )
        return Drawn(split.learning.text, split.judged, split.allotted)

    def _split(
        self, recipe: Recipe, opened: Opened, num_tokens: int, num_training_tokens: int = 0
    ) -> Split:
        amounts = Amounts(
            num_tokens=num_tokens,
            num_training_tokens=num_training_tokens,
            num_judged_tokens=self.num_judged_tokens,
        )
        allotted = {} if self._before is None else self._before.allotted
        return self.pool.split(
            recipe.calibration.domains,
            amounts,
            tokenizer_of(opened),
            allotted=allotted,
            must_judge=self.must_judge,
        )


def run_text(
    opened: Opened, progress: Progress, *, num_judged_blocks: int | None = None
) -> RunText:
    """Return the text of a run, of which nothing is read yet; `opened` is dense.

    `num_judged_blocks`: that each domain must have to judge by; None: by the recipe, if there are
    so many.
    """
    calibration, _ = text_for(opened, opened.arch.select(opened.recipe.remove.group_names))
    opened = opened.filled(calibration=calibration)
    recipe = opened.recipe
    pool = TextPool(calibration["sequence_length"], tokenizer_of(opened), recipe.seed, progress)
    must_judge = num_judged_blocks is not None
    judged = (
        num_judged_blocks * pool.length if must_judge else judging_tokens(recipe.output.evaluate)
    )
    return RunText(opened, pool, calibration["num_tokens"], judged, must_judge)


def completed(opened: Opened) -> Opened:
    """Return `opened`, checked, with what its recipe leaves open: the groups, see `checked`, and
    domains of which `calibration.answers` are answers; the others share the rest.

    Where none of them has answers, one is added, to prompts that come with secateur. The same again
    changes nothing. Raises what `checked` does, CalibrationError for a chat template that fails,
    RecipeError without one for answers, and for a share of 0 beside prompts that are to be
    answered.
    """
    opened = checked(opened)
    calibration, share = opened.recipe.calibration, opened.recipe.calibration.answers
    answers, text = calibration.answered, calibration.of_text
    is_default = "domains" not in calibration.model_fields_set
    tokenizer = tokenizer_of(opened)
    chats = tokenizer.chat_template is not None
    can_answer = chats and opened.arch.caches
    if can_answer and opened.recipe.output.evaluate:
        try:
            closing_of_turn(
                tokenizer
            )  # the judge's prompts would fail after the dense model's text
        except CalibrationError as error:
            advice = "Or ask it nothing: set calibration.answers to 0 and output.evaluate to false."
            raise CalibrationError(f"{error} {advice}") from None
    if share is None and not answers and not (is_default and can_answer):
        return opened
    if share == 0:
        given = [name for name, domain in answers.items() if domain.source[0] != "answers"]
        if given or not text:
            raise RecipeError(
                f"calibration.answers: 0, but domain '{(given or list(answers))[0]}' is of "
                "answers; leave out one of them."
            )
        return opened.filled(calibration={"domains": text})
    if not can_answer:
        lack = (
            "the model keeps no keys and values while it writes"
            if chats
            else "its tokenizer has no chat template"
        )
        raise RecipeError(
            f"calibration.answers: {opened.name} answers nothing, as {lack}; leave answers out, or "
            "set them to 0."
        )
    if share is None and answers:
        return opened

    # Shares are relative to each other: those of the text stay as they are.
    share = SHARE_OF_ANSWERS if share is None else share
    if not answers and ANSWERS in text:
        raise RecipeError(
            f"calibration.domains.{ANSWERS}: is the name of what the model answers; choose another "
            "one."
        )
    answers = answers or {ANSWERS: Domain(answers=True)}
    of_text = sum(domain.share for domain in text.values())
    of_answers = sum(domain.share for domain in answers.values())
    factor = share / (1 - share) * of_text / of_answers if share < 1 and text else 1.0
    scaled = {
        name: domain.model_copy(update={"share": domain.share * factor})
        for name, domain in answers.items()
    }
    domains = {**(text if share < 1 else {}), **scaled}
    return opened.filled(calibration={"domains": domains, "answers": share})


def without_answers(resolved: Resolved) -> Resolved:
    """Return the run without what the model would answer, where its weights are not all in memory.

    Raises RecipeError if it was to answer prompts of the user, or nothing is left.
    """
    recipe = resolved.recipe
    answers, text = recipe.calibration.answered, recipe.calibration.of_text
    if not answers:
        return resolved
    if not text or any(domain.source[0] != "answers" for domain in answers.values()):
        raise RecipeError(
            f"calibration.domains.{next(iter(answers))}: the model's weights are not all in "
            "memory, and for each token of an answer all would move; give more memory, or set "
            "calibration.answers to 0 and give text."
        )
    note = (
        "calibration.answers: the model's weights are not all in its memory, so it answers nothing."
    )
    recipe = recipe.filled(calibration={"domains": text, "answers": None})
    return replace(resolved, recipe=recipe, warnings=(*resolved.warnings, note))
