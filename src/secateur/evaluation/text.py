"""Evaluation text, by domain and from WikiText-2, and how well a model predicts it."""

import re
from collections.abc import Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from secateur.data.blocks import NGRAM_TOKENS, Blocks, JudgedText, LearningText, ngram_overlap
from secateur.data.pool import MOST_COUNTED, TextPool
from secateur.data.retokenised import retokenised
from secateur.data.rows import read_rows
from secateur.errors import CalibrationError, RecipeError
from secateur.facts import Loss
from secateur.formats.run_text import run_text_again, text_facts
from secateur.log import Progress
from secateur.model.bind import Arch
from secateur.model.config import replaced
from secateur.model.kept_tokens import Trim
from secateur.recipe import RECIPE_FILE, Calibration, Domain, load_recipe, parse_recipe
from secateur.result_directory import RESULT_FILE
from secateur.stream.losses import domain_losses, predicted_tokens

HUB = "hub"
DEFAULT_BLOCK_LENGTH = 2048
SEED = 0  # for text that no recipe describes
# The title of an article of WikiText; those of its sections have more signs.
TITLE = re.compile(r"\s*= [^=]+ =\s*")
# The share of n-grams from which a reader is told: boilerplate of the same kind has as many.
TOLD_OVERLAP = 0.02
# A trim counts in the dense tokenizer, in which text has fewer tokens.
COUNTED_BY_A_TRIM = MOST_COUNTED * 5 // 4


def has_recipe(directory: Path) -> bool:
    """Whether a model's directory says which text its run had."""
    return (directory / RECIPE_FILE).is_file()


def recipe_blocks(
    directory: Path, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> tuple[dict[str, Blocks], tuple[str, ...]]:
    """Return the blocks that judged the run that made `directory`, and notes.

    A note says if the text has changed. What the dense model answers is left out, with a note,
    as that model is not available. Raises RecipeError without a recipe, CalibrationError for
    unreadable text.
    """
    path = directory / RECIPE_FILE
    if not has_recipe(directory):
        raise RecipeError(
            f"{directory}: has no recipe.yaml, so its held-out text is unknown; say what to evaluate on with "
            "--domain NAME[=FILE], --wikitext2 or --tasks."
        )
    recipe = parse_recipe(load_recipe(path), f"recipe {path}")
    if recipe.calibration.num_tokens is None:
        raise RecipeError(f"recipe {path}: calibration.num_tokens is missing; use the recipe.yaml that the run wrote.")
    split = run_text_again(directory, recipe, tokenizer, progress)
    judged, notes = split.judged, (*split.notes, *split.judged.notes)
    blocks = {name: part for name, part in judged.blocks.items() if not part.is_meta}
    answers = ", ".join(name for name in judged.blocks if name not in blocks)
    if answers:
        note = f"answers of the dense model are left out ({answers}), and so the hash of the text is not compared."
        return blocks, (*notes, note)
    return blocks, (*notes, *_changes(directory, judged))


def check_length(option: str, length: int, config: Any) -> None:
    """Raise CalibrationError, naming the option, if a model has fewer positions than a block."""
    longest = getattr(config, "max_position_embeddings", None)
    if longest is not None and length > longest:
        raise CalibrationError(
            f"{option}: {length} is longer than the model's {longest} positions; give at most {longest}."
        )


def named_blocks(
    domains: dict[str, Domain],
    num_blocks: int,
    sequence_length: int,
    tokenizer: PreTrainedTokenizerBase,
    progress: Progress,
    directory: Path | None = None,
) -> tuple[dict[str, Blocks], tuple[str, ...]]:
    """Return `num_blocks` blocks per domain, and notes on what was left out.

    `directory`: of a model, whose run's documents come last. A note says what of the blocks its run has
    learnt by all the same. Raises CalibrationError for missing text.
    """
    pool = TextPool(Calibration(sequence_length=sequence_length), tokenizer, SEED, progress)
    learning = None if directory is None else _run_learnt(directory, domains, tokenizer, progress)
    if learning is None:
        return pool.draw(domains, num_blocks), pool.notes
    text, used = learning
    blocks = pool.draw(domains, num_blocks, used)
    overlap = ngram_overlap(
        {each.name: each.blocks.ids_NT for each in text.domains if not each.blocks.is_meta},
        {name: part.ids_NT for name, part in blocks.items()},
    )
    shares = ", ".join(f"{name} {share:.0%}" for name, share in overlap.items() if share and share > TOLD_OVERLAP)
    note = f"the run learnt by text that has {NGRAM_TOKENS}-grams of this one ({shares}), which flatters the model."
    return blocks, (*pool.notes, *((note,) if shares else ()))


def _run_learnt(
    directory: Path, domains: dict[str, Domain], tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> tuple[LearningText, set[bytes]] | None:
    """Return what the run that made a model learnt by, and the digests of all documents that it used.

    Only its domains of the sources of `domains` are looked at. None if there are none, or no run.
    """
    path = directory / RECIPE_FILE
    if text_facts(directory) is None or not has_recipe(directory):
        return None
    recipe = parse_recipe(load_recipe(path), f"recipe {path}")
    asked = [domain.source for domain in domains.values()]
    files = any(key == "files" for key, _ in asked)
    same = {
        name: domain
        for name, domain in recipe.calibration.domains.items()
        if not domain.answers and (domain.source in asked or (files and domain.source[0] == "files"))
    }
    if not same or recipe.calibration.num_tokens is None:
        return None
    split = run_text_again(
        directory, recipe, tokenizer, progress, num_training_tokens=recipe.polish.num_tokens or 0, only=same
    )
    counted = 0 if recipe.remove.vocabulary is None else COUNTED_BY_A_TRIM
    return split.learning.text, split.learning.digests(counted)


def greedy(model: Any, ids_BT: Tensor, num_tokens: int, **options: Any) -> Tensor:
    """Return the blocks with `num_tokens` likeliest tokens behind them.

    The model's own settings (sampling, a repetition penalty, its end of text) take no part.
    """
    asked = {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0, **options}
    with replaced(vars(model), "generation_config", GenerationConfig()):
        return model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **asked)


def losses_of_dense_tokens(
    model: nn.Module, arch: Arch, text: Mapping[str, Blocks], trim: Trim | None, progress: Progress
) -> dict[str, Loss]:
    """Return the losses on text of the dense tokenizer, by domain, in nats per its tokens.

    `trim`: what the model lacks of the dense vocabulary; None if it has all.
    """
    if not text or trim is None:
        return domain_losses(model, arch, text, progress) if text else {}
    counts = {name: predicted_tokens(blocks) for name, blocks in text.items()}
    own = retokenised(text, trim.dense_tokenizer, trim.tokenizer)
    return domain_losses(model, arch, own, progress, num_tokens=counts)


def _changes(directory: Path, judged: JudgedText) -> tuple[str, ...]:
    facts = text_facts(directory)
    if facts is None:
        path = directory / RESULT_FILE
        return (f"{path} is missing, so it is not known whether this text is what the run held out.",)
    if facts.judged_hash == judged.content_hash:
        return ()
    return (
        "the recipe's text is not what it was when the run was made (installed packages or files changed: sha256 "
        f"{judged.content_hash[:16]}, then {facts.judged_hash[:16]}), so the model may have been calibrated on some "
        "of it.",
    )


def wikitext_blocks(source: str, block_length: int | None, tokenizer: PreTrainedTokenizerBase, config: Any) -> Blocks:
    """Return the test split as blocks, whose documents are its articles. `source`: a file of rows, or `hub`.

    Files: .jsonl .json .csv .parquet .txt .raw. `block_length`: None for 2048, or the model's
    number of positions if that is smaller. Raises CalibrationError if the rows cannot be read or
    are less than one block, or if a block is longer than the model.
    """
    longest = getattr(config, "max_position_embeddings", None) or DEFAULT_BLOCK_LENGTH
    length = block_length or min(DEFAULT_BLOCK_LENGTH, longest)
    check_length("--wikitext2-length", length, config)
    rows = _hub_rows() if source == HUB else _file_rows(Path(source))
    encoded = tokenizer("\n\n".join(rows), return_offsets_mapping=True, verbose=False)
    ids, places = encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]
    num_blocks = len(ids) // length
    if num_blocks == 0:
        raise CalibrationError(
            f"WikiText-2 rows {source}: {len(ids):,} tokens are less than one block of {length}; "
            "give the whole test split, or a shorter --wikitext2-length."
        )
    rows_end = accumulate((len(row) + 2 for row in rows), initial=0)
    titles = [place for row, place in zip(rows, rows_end, strict=False) if TITLE.fullmatch(row)]
    articles_T = torch.searchsorted(torch.tensor(titles, dtype=torch.int64), torch.tensor(places), right=True)
    parts = (each[: num_blocks * length].view(num_blocks, length) for each in (torch.tensor(ids), articles_T))
    return Blocks(*parts)


def _file_rows(path: Path) -> list[str]:
    if not path.is_file():
        raise CalibrationError(f"--wikitext2 {path}: there is no such file; give the rows of the raw test split.")
    if path.suffix in (".txt", ".raw"):
        try:
            with path.open(encoding="utf-8") as lines:
                # Rows as in the data set: a line with its line end, or "" for a blank line.
                return [line if line.strip() else "" for line in lines]
        except (OSError, UnicodeDecodeError) as error:
            raise CalibrationError(
                f"--wikitext2 {path}: cannot be read ({error}); give a text file in UTF-8."
            ) from None
    rows: list[Any] = [row.get("text") if isinstance(row, dict) else row for _, row in read_rows(path)]
    if not all(isinstance(row, str) for row in rows):
        raise CalibrationError(f"--wikitext2 {path}: every row needs a `text` column with a string in it.")
    return rows


def _hub_rows() -> list[str]:
    where = "--wikitext2 hub"
    try:
        import datasets
        from datasets.exceptions import DatasetsError
    except ImportError:
        raise CalibrationError(f"{where}: needs the package datasets; install secateur[evaluate].") from None
    try:
        return list(datasets.load_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split="test")["text"])
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        reason = "HF_HUB_OFFLINE=1" if constants.HF_HUB_OFFLINE else " ".join(str(error).split())
        raise CalibrationError(f"{where}: cannot be loaded ({reason}); give a file of its rows instead.") from None
