"""WikiText-2 perplexity as the pruning literature computes it (the code of GPTQ, SparseGPT and Wanda).

In: the rows of the raw test split. Out: exp of the mean over blocks of the mean negative log-likelihood of a block's
tokens 2..L. The rows are joined by blank lines, tokenised at once with the special tokens that the tokenizer adds by
itself, and cut into blocks of L tokens; what is left after the last whole block is dropped.
"""

from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants
from jaxtyping import Int64
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from secateur.errors import CalibrationError
from secateur.text_files import read_rows

HUB = "hub"
DEFAULT_BLOCK_LENGTH = 2048


def wikitext_blocks(
    source: str, block_length: int | None, tokenizer: PreTrainedTokenizerBase, config: Any
) -> Int64[Tensor, "N L"]:
    """Return the test split as blocks. `source`: a file of rows (.jsonl .json .csv .parquet .txt .raw), or `hub`.

    `block_length`: None for 2048, or the model's number of positions if that is smaller.

    Raises CalibrationError if the rows cannot be read, are fewer than one block, or a block is longer than the model.
    """
    longest = getattr(config, "max_position_embeddings", None) or DEFAULT_BLOCK_LENGTH
    length = block_length or min(DEFAULT_BLOCK_LENGTH, longest)
    if length > longest:
        raise CalibrationError(
            f"--wikitext2-length: {length} is longer than the model's {longest} positions; give at most {longest}."
        )
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
        return _line_rows(path)
    rows: list[Any] = [row.get("text") if isinstance(row, dict) else row for _, row in read_rows(path)]
    if not all(isinstance(row, str) for row in rows):
        raise CalibrationError(f"--wikitext2 {path}: every row needs a `text` column with a string in it.")
    return rows


def _line_rows(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8") as lines:
            # As the data set has its rows: a line with its line end, or nothing for a blank line.
            return [line if line.strip() else "" for line in lines]
    except (OSError, UnicodeDecodeError) as error:
        raise CalibrationError(f"--wikitext2 {path}: cannot be read ({error}); give a text file in UTF-8.") from None


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
