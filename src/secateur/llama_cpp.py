"""llama.cpp through llama-cpp-python, where it is installed. In: a GGUF file. Out: a loaded model on the CPU."""

import importlib.util
from pathlib import Path
from typing import Any

import torch

from secateur.errors import CheckpointError


def have_llama_cpp() -> bool:
    """Say whether llama-cpp-python is installed."""
    return importlib.util.find_spec("llama_cpp") is not None


def require_llama_cpp(what: str) -> None:
    """Raise CheckpointError, saying that `what` needs it, if llama-cpp-python is not installed."""
    if not have_llama_cpp():
        raise CheckpointError(f'{what} needs llama-cpp-python; run: pip install "secateur[llama-cpp]"')


def open_llama_cpp(file: Path, num_context: int, *, all_logits: bool) -> Any:
    """Load a GGUF file on as many threads as torch uses; `all_logits` keeps those of every position.

    Raises CheckpointError if llama.cpp refuses the file.
    """
    import llama_cpp  # pyright: ignore[reportMissingImports]  # a package that few have

    threads = torch.get_num_threads()
    try:
        return llama_cpp.Llama(
            str(file),
            n_ctx=num_context,
            n_gpu_layers=0,
            n_threads=threads,
            n_threads_batch=threads,
            logits_all=all_logits,
            verbose=False,
        )
    except ValueError as error:
        raise CheckpointError(f"{file}: llama.cpp cannot load it ({error}).") from None
