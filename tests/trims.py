"""Tokenizers and models without some tokens, for tests of what compares them with the dense ones."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from models import tiny_llama
from transformers import AutoModelForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from secateur.formats.save import save_checkpoint
from secateur.vocabulary.kept import KeptTokens, keep_tokens
from secateur.vocabulary.tokenizer import read_vocabulary, trimmed_tokenizer
from tests.vocabulary.test_tokenizer import NUM_PADDING, PROSE, made, some_kept


def bytes_of(tokenizer: Any, ids_T: torch.Tensor) -> bytes:
    """Return the bytes that the tokens spell, whole characters or not; special tokens spell their names."""
    added, found = tokenizer.get_added_vocab(), b""
    alphabet = {symbol: byte for byte, symbol in bytes_to_unicode().items()}
    symbols = alphabet if "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder) else None
    for piece in tokenizer.convert_ids_to_tokens(ids_T.tolist()):
        if piece not in added and symbols is not None:
            found += bytes(symbols[symbol] for symbol in piece)
        elif piece not in added and piece.startswith("<0x") and len(piece) == 6:
            found += bytes([int(piece[3:5], 16)])
        else:
            found += piece.encode()
    return found


@dataclass(frozen=True)
class TrimmedPair:
    """A dense model and one with about half of its tokens, saved; `kept`: those that stay."""

    dense: Path
    pruned: Path
    kept: KeptTokens
    dense_tokenizer: Any
    tokenizer: Any

    def models(self) -> tuple[Any, Any]:
        """Return the dense and the pruned model as stock transformers loads them."""
        return tuple(AutoModelForCausalLM.from_pretrained(each).eval() for each in (self.dense, self.pruned))

    def in_dense_tokens(self, ids_T: torch.Tensor) -> torch.Tensor:
        """Return the block in the dense tokenizer's tokens, for text of ASCII; its first token stays."""
        text = self.tokenizer.decode(ids_T[1:])
        return torch.tensor([self.kept.dense_ids[ids_T[0]], *self.dense_tokenizer(text)["input_ids"]])

    def dense_log_p(self, model: Any, ids_T: torch.Tensor) -> torch.Tensor:
        """Return the dense model's log probabilities over the kept tokens, (T - 1, kept), for ids of the pruned one."""
        dense_ids = torch.tensor(self.kept.dense_ids)
        with torch.no_grad():
            logits = model(dense_ids[ids_T][None]).logits[0, :-1]
        return logits[:, dense_ids].double().log_softmax(-1)


def trimmed_pair(
    directory: Path, *, tied: bool = False, noise: float = 0.0, share: float = 0.5, padding: int = 0, **sizes: Any
) -> TrimmedPair:
    """Save both models. `noise`: how far the pruned one's other weights are from the dense one's.

    `share`: of the tokens that stay. `padding`: how many of the dense model's 7 padding rows do.
    `sizes`: of the config.
    """
    tokenizer, _ = made("byte-level")
    dense = tiny_llama(tied=tied, vocab_size=len(tokenizer) + NUM_PADDING, **sizes)
    kept = some_kept(read_vocabulary(tokenizer, dense), 3, share)
    kept = replace(kept, dense_ids=(*kept.dense_ids, *range(len(tokenizer), len(tokenizer) + padding)))
    pruned, trimmed = copy.deepcopy(dense), trimmed_tokenizer(tokenizer, kept)
    keep_tokens(pruned, kept)
    with torch.no_grad():
        torch.manual_seed(5)
        for parameter in pruned.model.layers.parameters():
            parameter += noise * torch.randn_like(parameter)
    for name, model, own in (("dense", dense, tokenizer), ("pruned", pruned, trimmed)):
        (directory / name).mkdir(parents=True)
        options = {"carry_from": None, "kept": kept if name == "pruned" else None}
        save_checkpoint(model, own, directory / name, **options)
    return TrimmedPair(directory / "dense", directory / "pruned", kept, tokenizer, trimmed)


def prose_file(directory: Path) -> Path:
    """Write lines of prose in ASCII as one text."""
    file = directory / "prose.txt"
    file.write_text("\n".join(line for line in PROSE if line.isascii()), encoding="utf-8")
    return file
