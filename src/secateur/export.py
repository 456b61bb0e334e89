"""`secateur.export`: a checkpoint directory as one file of another format, which appears complete, proved where it can.

In: a checkpoint, a format of `EXPORTERS`. Out: the file. Packages add formats: docs/extend.md.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from secateur.checkpoint import Checkpoint, open_checkpoint
from secateur.errors import RecipeError
from secateur.gguf_check import GgufCheck, check_gguf
from secateur.gguf_export import check_exportable, export_gguf
from secateur.gguf_metadata import context_length
from secateur.gguf_rules import gguf_family
from secateur.json_file import Record
from secateur.llama_cpp import have_llama_cpp, require_llama_cpp
from secateur.plugins import EXPORTER_GROUP, look_up
from secateur.progress import Progress, silent
from secateur.staged_file import check_file, staged_file


@dataclass(frozen=True, slots=True)
class Proof:
    """How a written file is compared with the checkpoint, by a program that not everyone has installed.

    is_possible: whether that program is there. require(what): raises CheckpointError if it is not.
    run(path, checkpoint, type name): returns the figures, or raises CheckpointError if the file is not the model.
    """

    is_possible: Callable[[], bool]
    require: Callable[[str], None]
    run: Callable[[Path, Checkpoint, str], GgufCheck]


@dataclass(frozen=True, slots=True)
class Exporter:
    """One format.

    check(checkpoint, type name or None): returns the type of numbers to write, by default the weights' own. It reads no
    weights and raises a SecateurError for whatever cannot be written.
    write(checkpoint, path, type name, progress): writes the file, in a hidden place that becomes FILE at the end.
    context_length(checkpoint): for how many tokens the file is right, where that is known.
    """

    check: Callable[[Checkpoint, str | None], str]
    write: Callable[[Checkpoint, Path, str, Progress], Any]
    context_length: Callable[[Checkpoint], int] | None = None
    proof: Proof | None = None


EXPORTERS: dict[str, Exporter] = {
    "gguf": Exporter(
        check_exportable,
        export_gguf,
        lambda checkpoint: context_length(checkpoint.config, gguf_family(checkpoint)),
        Proof(have_llama_cpp, require_llama_cpp, check_gguf),
    ),
}


@dataclass(frozen=True, slots=True)
class Export(Record):
    """The written file. `context_length`: for how many tokens it is right, None where the format does not say.

    `check` is None where it was not run.
    """

    file: str
    type_name: str
    num_bytes: int
    context_length: int | None
    check: GgufCheck | None


def find_exporter(name: str) -> Exporter:
    """Return a built-in exporter, or the one of that name that an installed package registers.

    Raises RecipeError if there is none, PluginError if a package registers one that cannot be used.
    """

    def is_exporter(found: Any) -> bool:
        return isinstance(found, Exporter)

    return look_up(EXPORTER_GROUP, name, EXPORTERS, is_exporter, "a secateur.Exporter")


def export(
    model: str | Path,
    gguf: str | Path,
    *,
    format: str = "gguf",
    type_name: str | None = None,
    check: bool | None = None,
    overwrite: bool = False,
    progress: Progress = silent,
) -> Export:
    """Write a model, its tokenizer and chat template as one file; it appears complete or not at all.

    `model`: a local directory, a hub id or `smollm2-135m`. `gguf`: the file to write. `format`: one of `EXPORTERS`, or
    one that an installed package registers. `type_name`: f32, f16, bf16 or q8_0 (the option --type), by default the
    weights' own. `check`: whether a program of that format (llama.cpp for GGUF) must agree with transformers before the
    file appears; None: where it is installed. `overwrite`: replace the file if it exists. `progress`: called with
    (stage, done, total).

    Returns an `Export`: the file, its type and bytes, and what the check found.

    Raises a SecateurError, one sentence, for everything that a user can correct: CheckpointError for a model that
    llama.cpp cannot run, RecipeError for options.
    """
    file, exporter = Path(gguf), find_exporter(format)
    proof = _proof(exporter, format, check)
    check_file(file, overwrite=overwrite)
    checkpoint = open_checkpoint(model)
    type_name = exporter.check(checkpoint, type_name)
    with staged_file(file, overwrite=overwrite) as staged:
        exporter.write(checkpoint, staged, type_name, progress)
        num_bytes, found = staged.stat().st_size, None
        if proof is not None:
            progress("check", 0, 1)
            found = proof.run(staged, checkpoint, type_name)
            progress("check", 1, 1)
    length = exporter.context_length(checkpoint) if exporter.context_length else None
    return Export(str(file), type_name, num_bytes, length, found)


def _proof(exporter: Exporter, name: str, check: bool | None) -> Proof | None:
    """Return the proof to run. Raises RecipeError or CheckpointError if it is asked for and cannot be had."""
    if check is False:
        return None
    if check and exporter.proof is None:
        raise RecipeError(f"export --check: format {name} has nothing that checks it; leave --check out.")
    if check and exporter.proof is not None:
        exporter.proof.require("export --check")
    return exporter.proof if exporter.proof is not None and exporter.proof.is_possible() else None
