"""Evaluation text by domain, and how well a model predicts it."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedTokenizerBase

from secateur.data.blocks import (
    JUDGED_BLOCK,
    NGRAM_TOKENS,
    Blocks,
    JudgedText,
    LearningText,
    block_length,
    ngram_overlap,
)
from secateur.data.pool import MOST_COUNTED, TextPool
from secateur.data.sources import documents, shipped
from secateur.errors import RecipeError
from secateur.facts import Loss
from secateur.log import Progress
from secateur.model.bind import Arch
from secateur.model.checkpoint import Checkpoint
from secateur.recipe import Domain, recipe_in
from secateur.recovery.text import run_text_again, text_facts
from secateur.result_directory import RESULT_FILE
from secateur.stream.losses import domain_losses, predicted_tokens
from secateur.vocabulary.kept import Trim
from secateur.vocabulary.retokenised import retokenised

SEED = 0  # for text that no recipe describes
# The share of n-grams from which a reader is told: boilerplate of the same kind has as many.
TOLD_OVERLAP = 0.02
# A trim counts in the dense tokenizer, in which text has fewer tokens.
COUNTED_BY_A_TRIM = MOST_COUNTED * 5 // 4


class Judged(NamedTuple):
    """Blocks of the dense tokenizer by domain: of documents that no cell learns by, and others.

    `content_hash`: of the first, and of what the study calibrates on.
    """

    held_out: Mapping[str, Blocks]
    others: Mapping[str, Blocks]
    content_hash: str


def text_to_judge(
    checkpoint: Checkpoint,
    domains: dict[str, Domain] | None,
    num_blocks: int,
    sequence_length: int | None,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    *,
    is_needed: bool,
) -> tuple[dict[str, Blocks], tuple[str, ...]]:
    """Return blocks by domain, and notes: of `domains`, or what judged the run that made the model.

    `is_needed`: a model that no run made is an error, RecipeError, not one without text. Other
    errors: as for `named_blocks` and `recipe_blocks`.
    """
    directory = checkpoint.directory
    if domains is None:
        has_text = is_needed or recipe_in(directory) is not None
        return recipe_blocks(directory, tokenizer, progress) if has_text else ({}, ())
    sequence_length = block_length(
        sequence_length, checkpoint.config, "--sequence-length", default=JUDGED_BLOCK
    )
    return named_blocks(domains, num_blocks, sequence_length, tokenizer, progress, directory)


def prompts_to_judge(source: Domain, checkpoint: Checkpoint) -> tuple[tuple[str, ...], str]:
    """Return prompts of `source` that the run of a model did not ask, and a note that says so.

    As many as come with secateur. Raises CalibrationError for unreadable text, RecipeError if the
    run asked all of them.
    """
    # A run writes its recipe into the directory of its result.
    asked, directory = set[str](), checkpoint.directory
    if (recipe := recipe_in(directory)) is not None:
        for domain in recipe.calibration.answered.values():
            asked.update(documents("answers", domain, None, SEED))
    given = dict.fromkeys(documents("prompts", source, None, SEED))
    prompts = tuple(prompt for prompt in given if prompt not in asked)
    if not prompts:
        raise RecipeError(
            f"--prompts: the run that made {directory} had all {len(given)} of them to ask; give "
            "others."
        )
    prompts = prompts[: len(shipped("prompts.yaml"))]
    note = f"own answers are to {len(prompts)} prompts of {', '.join(source.files or ())}"
    if num_asked := len(asked & given.keys()):
        note += f"; {num_asked} that the run had to ask are left out"
    return prompts, f"{note}."


def recipe_blocks(
    directory: Path, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> tuple[dict[str, Blocks], tuple[str, ...]]:
    """Return the blocks that judged the run that made `directory`, and notes.

    A note says if the text has changed. What the dense model answers is left out, with a note,
    as that model is not available. Raises RecipeError without a recipe, CalibrationError for
    unreadable text.
    """
    recipe = recipe_in(directory)
    if recipe is None:
        raise RecipeError(
            f"{directory}: has no recipe.yaml, so its held-out text is unknown; say what to "
            "evaluate on with --domain NAME[=FILE] or --tasks."
        )
    split = run_text_again(directory, recipe, tokenizer, progress)
    judged, notes = split.judged, (*split.notes, *split.judged.notes)
    blocks = {name: part for name, part in judged.blocks.items() if not part.is_meta}
    answers = ", ".join(name for name in judged.blocks if name not in blocks)
    if answers:
        note = (
            f"answers of the dense model are left out ({answers}), and so the hash of the text is "
            "not compared."
        )
        return blocks, (*notes, note)
    return blocks, (*notes, *_changes(directory, judged))


def named_blocks(
    domains: dict[str, Domain],
    num_blocks: int,
    sequence_length: int,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    directory: Path | None = None,
) -> tuple[dict[str, Blocks], tuple[str, ...]]:
    """Return `num_blocks` blocks per domain, and notes on what was left out.

    `directory`: of a model, whose run's documents come last. A note says what of the blocks its run
    has learnt by all the same. Raises CalibrationError for missing text.
    """
    pool = TextPool(sequence_length, tokenizer, SEED, progress)
    learning = None if directory is None else _run_learnt(directory, domains, tokenizer, progress)
    if learning is None:
        return pool.draw(domains, num_blocks), pool.notes
    text, used = learning
    blocks, notes = pool.draw(domains, num_blocks, used), pool.notes
    overlap = ngram_overlap(
        {domain.name: domain.blocks.ids_NT for domain in text.domains if not domain.blocks.is_meta},
        {name: part.ids_NT for name, part in blocks.items()},
    )
    shares = ", ".join(
        f"{name} {share:.0%}" for name, share in overlap.items() if share and share > TOLD_OVERLAP
    )
    if shares:
        notes += (
            f"the run learnt by text that has {NGRAM_TOKENS}-grams of this one ({shares}), which "
            "flatters the model.",
        )
    return blocks, notes


def _run_learnt(
    directory: Path,
    domains: dict[str, Domain],
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
) -> tuple[LearningText, set[bytes]] | None:
    """Return what the run that made a model learnt by, and the digests of all documents that it
    used.

    Only its domains of the sources of `domains` are looked at. None if there are none, or no run.
    """
    if text_facts(directory) is None or (recipe := recipe_in(directory)) is None:
        return None
    sources = [domain.source for domain in domains.values()]
    files = any(key == "files" for key, _ in sources)
    same = {
        name: domain
        for name, domain in recipe.calibration.domains.items()
        if not domain.answers
        and (domain.source in sources or (files and domain.source[0] == "files"))
    }
    if not same or recipe.calibration.num_tokens is None:
        return None
    split = run_text_again(
        directory,
        recipe,
        tokenizer,
        progress,
        num_training_tokens=recipe.polish.num_tokens or 0,
        only=same,
    )
    counted = 0 if recipe.remove.vocabulary is None else COUNTED_BY_A_TRIM
    return split.learning.text, split.learning.digests(counted)


def losses_of_dense_tokens(
    model: nn.Module, arch: Arch, text: Mapping[str, Blocks], trim: Trim | None, progress: Progress
) -> dict[str, Loss]:
    """Return the losses on text of the dense tokenizer, by domain, in nats per its tokens.

    `trim`: what the model lacks of the dense vocabulary; None if it has all.
    """
    if trim is None:
        return domain_losses(model, arch, text, progress)
    own = retokenised(text, trim.dense_tokenizer, trim.tokenizer)
    return domain_losses(model, arch, own, progress, num_tokens=predicted_tokens(text))


def _changes(directory: Path, judged: JudgedText) -> Iterator[str]:
    known = text_facts(directory)
    if known is None:
        yield (
            f"{directory / RESULT_FILE} is missing, so it is not known whether this text is what "
            "the run held out."
        )
    elif known.judged_hash != judged.content_hash:
        yield (
            "the recipe's text is not what it was when the run was made (installed packages or "
            f"files changed: sha256 {judged.content_hash[:16]}, then {known.judged_hash[:16]}), so "
            "the model may have been calibrated on some of it."
        )
