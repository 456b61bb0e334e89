"""Tokenizers and models without some tokens, for tests of what compares them with the dense ones."""

from typing import Any

import torch

from secateur.model.vocabulary import _bytes_by_symbol


def bytes_of(tokenizer: Any, ids_T: torch.Tensor) -> bytes:
    """Return the bytes that the tokens spell, whole characters or not; special tokens spell their names."""
    added, found = tokenizer.get_added_vocab(), b""
    symbols = _bytes_by_symbol() if "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder) else None
    for piece in tokenizer.convert_ids_to_tokens(ids_T.tolist()):
        if piece not in added and symbols is not None:
            found += bytes(symbols[symbol] for symbol in piece)
        elif piece not in added and piece.startswith("<0x") and len(piece) == 6:
            found += bytes([int(piece[3:5], 16)])
        else:
            found += piece.encode()
    return found
