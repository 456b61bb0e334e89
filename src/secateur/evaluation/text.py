"""Evaluation text, by domain and from WikiText-2, and how well a model predicts it."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from huggingface_hub import constants
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from secateur.data.calibration import CalibrationSet, build_calibration, judging_tokens
from secateur.data.rows import read_rows
from secateur.errors import CalibrationError, NumericsError, RecipeError
from secateur.log import Progress
from secateur.model.bind import Arch
from secateur.model.token_bytes import num_bytes
from secateur.ranks import spread
from secateur.recipe import Calibration, Domain
from secateur.recipe_file import RECIPE_FILE, load_recipe, parse_recipe
from secateur.report.measured import Quality
from secateur.report.records import Summary
from secateur.stream.losses import Blocks, block_losses, per_token, standard_error

HUB = "hub"
DEFAULT_BLOCK_LENGTH = 2048
SEED = 0  # for text that no recipe describes
# How much of a text models see before they write on, how much they write, and of how many domains.
START_TOKENS, SAMPLE_TOKENS, SAMPLED_DOMAINS = 32, 60, 3


def recipe_blocks(
    directory: Path, tokenizer: PreTrainedTokenizerBase, progress: Progress
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return the blocks that judged the run that made `directory`, and notes.

    A note says if the text has changed. Text sampled from the dense model is left out, with a note,
    as that model is not available. Raises RecipeError without a recipe, CalibrationError for
    unreadable text.
    """
    path = directory / RECIPE_FILE
    if not path.is_file():
        raise RecipeError(
            f"{directory}: has no recipe.yaml, so its held-out text is unknown; say what to evaluate on with "
            "--domain NAME[=FILE], --wikitext2 or --tasks."
        )
    recipe = parse_recipe(load_recipe(path), f"recipe {path}")
    if (num_tokens := recipe.calibration.num_tokens) is None:
        raise RecipeError(f"recipe {path}: calibration.num_tokens is missing; use the recipe.yaml that the run wrote.")
    facts = recipe.calibration, num_tokens, tokenizer, recipe.seed, progress
    judging, rounds = judging_tokens(recipe.output.evaluate), recipe.choose.rounds
    built = build_calibration(*facts, num_judged_tokens=judging, num_rounds=rounds)
    blocks = {name: blocks_NT for name, blocks_NT in built.judged.items() if not blocks_NT.is_meta}
    sampled = ", ".join(domain.name for domain in built.domains if domain.name not in blocks)
    if sampled:
        note = f"text sampled from the dense model is left out ({sampled}), and so its hash is not compared."
        return blocks, (*built.notes, note)
    return blocks, (*built.notes, *_changes(directory, built))


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
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Return `num_blocks` blocks per domain, and notes on what was left out.

    Raises CalibrationError for missing text.
    """
    alike = {name: domain.model_copy(update={"share": 1.0}) for name, domain in domains.items()}
    calibration = Calibration(domains=alike, sequence_length=sequence_length)
    # A calibration set holds one block in ten out; here all serve evaluation.
    num_calibration = math.ceil(num_blocks * 0.9)
    num_tokens = num_calibration * len(domains) * sequence_length
    built = build_calibration(calibration, num_tokens, tokenizer, SEED, progress, key="the number of blocks")
    drawn = {domain.name: torch.cat([domain.held_out_NT, domain.calibration_NT]) for domain in built.domains}
    return {name: blocks_NT[:num_blocks] for name, blocks_NT in drawn.items()}, built.notes


def greedy(model: Any, ids_BT: Tensor, num_tokens: int, *, end: Any = None, **options: Any) -> Tensor:
    """Return the blocks with `num_tokens` likeliest tokens behind them, or up to a token of `end`.

    The model's own settings (sampling, a repetition penalty, its end of text) take no part.
    """
    asked = {"max_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0, **options}
    with patch.object(model, "generation_config", GenerationConfig(eos_token_id=end)):
        return model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **asked)


@torch.inference_mode()
def continuation(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, start: str) -> str:
    """Return what the model writes after `start`, greedily: SAMPLE_TOKENS tokens, or up to its end of text."""
    ids_1T = tokenizer(start, return_tensors="pt", verbose=False)["input_ids"].to(model.device)
    own: Any = model.generation_config
    written_1T = greedy(model, ids_1T, SAMPLE_TOKENS, end=own and own.eos_token_id)
    return str(tokenizer.decode(written_1T[0, ids_1T.shape[1] :], skip_special_tokens=True))


def sample_starts(blocks_NT: Mapping[str, Blocks], tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    """Return the first words of the first block of some domains; none of a domain that begins blank."""
    first = {name: domain_NT[0][:START_TOKENS] for name, domain_NT in list(blocks_NT.items())[:SAMPLED_DOMAINS]}
    # A character that the next token would have completed is left out.
    starts = {name: str(tokenizer.decode(ids_T, skip_special_tokens=True)) for name, ids_T in first.items()}
    return {name: start.rstrip("\ufffd") for name, start in starts.items() if start.strip("\ufffd \n\t")}


def measure_quality(
    model: nn.Module,
    arch: Arch,
    tokenizer: PreTrainedTokenizerBase,
    domain: str,
    blocks_NT: Blocks,
    block_done: Callable[[], None],
    num_tokens: list[int] | None = None,
) -> Quality:
    """Return the quality on one domain; ranks share the blocks. `block_done`: called per own block.

    `num_tokens`: of each block, in nats per which the quality is, if not the blocks' own; see
    `per_token`. Raises NumericsError naming the domain if a loss is not finite.
    """

    def mean_loss(ids_T: Tensor) -> float:
        value = float(block_losses(model, arch, ids_T[None]).mean())
        block_done()
        return value

    values, counts = spread(mean_loss, list(blocks_NT)), [len(ids_T) - 1 for ids_T in blocks_NT]
    if num_tokens is not None:
        values, counts = per_token(values, counts, num_tokens), num_tokens
    mean = sum(values) / len(values)
    if not math.isfinite(mean):
        raise NumericsError(f"evaluate, domain {domain}: the loss is {mean}; the model gives no finite logits.")
    total, error = sum(counts), standard_error(values)
    in_bytes = num_bytes(tokenizer, blocks_NT)
    bits_per_byte = mean / math.log(2) * total / in_bytes
    return Quality(mean, error, math.exp(mean), bits_per_byte, total, in_bytes, tuple(values))


def _changes(directory: Path, built: CalibrationSet) -> tuple[str, ...]:
    path = directory / "result.json"
    if not path.is_file():
        return (f"{path} is missing, so it is not known whether this text is what the run held out.",)
    used = Summary.from_json(path.read_bytes(), str(path)).calibration.content_hash
    if used == built.content_hash:
        return ()
    return (
        "the recipe's text is not what it was when the run was made (installed packages or files changed: sha256 "
        f"{built.content_hash[:16]}, then {used[:16]}), so the model may have been calibrated on some of it.",
    )


def wikitext_blocks(
    source: str, block_length: int | None, tokenizer: PreTrainedTokenizerBase, config: Any
) -> Int64[Tensor, "N L"]:
    """Return the test split as blocks. `source`: a file of rows, or `hub`.

    Files: .jsonl .json .csv .parquet .txt .raw. `block_length`: None for 2048, or the model's
    number of positions if that is smaller. Raises CalibrationError if the rows cannot be read or
    are less than one block, or if a block is longer than the model.
    """
    longest = getattr(config, "max_position_embeddings", None) or DEFAULT_BLOCK_LENGTH
    length = block_length or min(DEFAULT_BLOCK_LENGTH, longest)
    check_length("--wikitext2-length", length, config)
    rows = _hub_rows() if source == HUB else _file_rows(Path(source))
    ids = tokenizer("\n\n".join(rows), verbose=False)["input_ids"]
    num_blocks = len(ids) // length
    if num_blocks == 0:
        raise CalibrationError(
            f"WikiText-2 rows {source}: {len(ids):,} tokens are less than one block of {length}; "
            "give the whole test split, or a shorter --wikitext2-length."
        )
    return torch.tensor(ids[: num_blocks * length]).view(num_blocks, length)


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
