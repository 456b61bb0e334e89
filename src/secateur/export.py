"""`secateur export`: a checkpoint directory as a GGUF file, which appears complete, and checked where llama.cpp is."""

from dataclasses import dataclass
from pathlib import Path

from secateur.checkpoint import open_checkpoint
from secateur.gguf_check import GgufCheck, check_gguf
from secateur.gguf_export import check_exportable, export_gguf
from secateur.gguf_metadata import context_length
from secateur.gguf_rules import gguf_family
from secateur.llama_cpp import have_llama_cpp, require_llama_cpp
from secateur.progress import Progress, silent
from secateur.staged_file import check_file, staged_file


@dataclass(frozen=True, slots=True)
class Export:
    """The written file. `context_length`: for how many tokens it is right. `check` is None where it was not run."""

    file: str
    type_name: str
    num_bytes: int
    context_length: int
    check: GgufCheck | None


def export(
    model: str | Path,
    file: str | Path,
    *,
    type_name: str | None = None,
    check: bool | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Export:
    """Write `model` as GGUF to `file`, by default in the weights' own type.

    `check`: whether llama.cpp must agree with transformers before the file appears; None: where it is installed.

    Raises a SecateurError, one sentence, for everything that a user can correct.
    """
    file = Path(file)
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
