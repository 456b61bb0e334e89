"""A trim carried out: tokens leave the model, and what that does to text is measured, judged and
told.
"""

import dataclasses
import math
from collections.abc import Mapping

from secateur.errors import RecipeError
from secateur.pruning.run import LossPairs, Run, text_losses
from secateur.report.records import VocabularyFacts, change, mean_change
from secateur.stream.losses import predicted_tokens
from secateur.vocabulary.kept import Trim, keep_tokens
from secateur.vocabulary.retokenised import retokenised
from secateur.vocabulary.tokenizer import scripts_left

# A trim that costs a domain more nats per dense token, or in the mean more than so many times what
# its counts foretold, is not written; means below the least are not told apart.
BEARABLE_NATS, BEARABLE_TIMES, TOLD_NATS = 0.5, 2.0, 0.05


def without_tokens(run: Run, trim: Trim, *, force: bool) -> Run:
    """Cut the tokens that go out of the model, in place, and judge that alone on the guard's text.

    Raises RecipeError, unless `force`, if it costs too much: see `BEARABLE_NATS`.
    """
    held_out = retokenised(run.held_out, trim.tokenizer, trim.dense_tokenizer)
    run = dataclasses.replace(run, dense_tokens=predicted_tokens(held_out))
    before = text_losses(run, "with all tokens", held_out)
    dense_losses = {name: loss.nats_per_token for name, loss in before.items()}
    keep_tokens(run.model, trim.kept)
    after = text_losses(run, "without tokens", run.held_out)
    trimmed = {name: (before[name], after[name]) for name in before}
    if (refusal := too_dear(trimmed, trim)) is not None:
        if not force:
            raise RecipeError(
                f"{refusal}, so nothing is written; keep more tokens, name domains of what the "
                "model is to read, or write it all the same with --force."
            )
        run.services.log.note(f"{refusal}; it was written all the same, as --force says.")
    return dataclasses.replace(run, dense_losses=dense_losses, trimmed=trimmed)


def too_dear(trimmed: LossPairs, trim: Trim) -> str | None:
    """Return what a trim costs, as the start of a sentence, if that is too much; None if it is not.

    `trimmed`: each domain's losses before and behind it, of the same documents.
    """
    changes = {name: change(before, after) for name, (before, after) in trimmed.items()}
    mean = mean_change(changes.values())
    worst = max(changes, key=lambda name: changes[name].nats_per_token)
    lost, error = mean.nats_per_token, mean.standard_error or 0.0
    foretold = math.inf if trim.foretold is None else trim.foretold
    is_surprise = lost > TOLD_NATS and lost - 2 * error > BEARABLE_TIMES * foretold
    if changes[worst].nats_per_token <= BEARABLE_NATS and not is_surprise:
        return None
    told = "" if trim.foretold is None else f", where the counts foretold {foretold:.2f}"
    num_dense, num_kept = trim.kept.num_dense, trim.kept.num_kept
    return (
        f"remove.vocabulary: with {num_kept:,} of its {num_dense:,} tokens the model loses "
        f"{lost:.2f} nats per token of held-out text ({worst} "
        f"{changes[worst].nats_per_token:.2f}){told}"
    )


def vocabulary_facts(
    trim: Trim, num_tokens: Mapping[str, tuple[int, int]], trimmed: LossPairs
) -> VocabularyFacts:
    """Return what the trim did.

    `num_tokens`: those predicted of each domain's held-out text, in both tokenizers. `trimmed`:
    each domain's losses before and behind the trim, before anything else goes.
    """
    return VocabularyFacts(
        num_before=trim.kept.num_dense,
        num_after=trim.kept.num_kept,
        by_domain=dict(num_tokens),
        scripts=scripts_left(trim.dense_tokenizer, trim.kept),
        nats={
            name: (dense.nats_per_token, cut.nats_per_token)
            for name, (dense, cut) in trimmed.items()
        },
        foretold=trim.foretold,
    )
