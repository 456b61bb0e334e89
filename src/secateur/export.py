"""`secateur.export`: a checkpoint directory as a GGUF file, which appears complete, and checked where llama.cpp is."""

from dataclasses import dataclass
from pathlib import Path

from secateur.checkpoint import open_checkpoint
from secateur.gguf_check import GgufCheck, check_gguf
from secateur.gguf_export import check_exportable, export_gguf
from secateur.gguf_metadata import context_length
from secateur.gguf_rules import gguf_family
from secateur.json_file import Record
from secateur.llama_cpp import have_llama_cpp, require_llama_cpp
from secateur.progress import Progress, silent
from secateur.staged_file import check_file, staged_file


@dataclass(frozen=True, slots=True)
class Export(Record):
    """The written file. `context_length`: for how many tokens it is right. `check` is None where it was not run."""

    file: str
    type_name: str
    num_bytes: int
    context_length: int
    check: GgufCheck | None


def export(
    model: str | Path,
    gguf: str | Path,
    *,
    type_name: str | None = None,
    check: bool | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Export:
    """Write a model, its tokenizer and chat template as a GGUF file for llama.cpp; it appears complete or not at all.

    `model`: a local directory, a hub id or `smollm2-135m`. `gguf`: the file to write. `type_name`: f32, f16, bf16 or
    q8_0 (the option --type), by default the weights' own. `check`: whether llama.cpp must agree with transformers
    before the file appears; None: where it is installed. `overwrite`: replace the file if it exists. `progress`: called
    with (stage, done, total).

    Returns an `Export`: the file, its type and bytes, and what the check found.

    Raises a SecateurError, one sentence, for everything that a user can correct: CheckpointError for a model that
    llama.cpp cannot run, RecipeError for options.
    """
    file = Path(gguf)
    if check:
        require_llama_cpp("export --check")
    check_file(file, overwrite=overwrite)
    checkpoint = open_checkpoint(model)
    type_name = check_exportable(checkpoint, type_name)
    with staged_file(file, overwrite=overwrite) as staged:
        export_gguf(checkpoint, staged, type_name, progress)
        num_bytes, found = staged.stat().st_size, None
        if have_llama_cpp() if check is None else check:
            progress("check", 0, 1)
            found = check_gguf(staged, checkpoint, type_name)
            progress("check", 1, 1)
    length = context_length(checkpoint.config, gguf_family(checkpoint))
    return Export(str(file), type_name, num_bytes, length, found)
