"""`secateur push`: a result onto the Hugging Face hub. In: a result directory. Out: a `Pushed`.

What is sent is the result without local paths: links to its files beside rewritten records.
"""

import dataclasses
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCardData, constants, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # httpx or httpx2
)
from huggingface_hub.utils import validate_repo_id

from secateur.errors import CheckpointError, RecipeError
from secateur.facts import Record
from secateur.files import lies_in
from secateur.log import LOG_FILE, Progress, silent
from secateur.model.config import one_line, quiet_transformers
from secateur.recipe_file import RECIPE_FILE
from secateur.report.card import card_data, unknown, with_metadata, with_section, without_places
from secateur.report.measured import RECOVERY_FILE
from secateur.report.records import ResultFiles, read_result, read_summary
from secateur.report.report import missing_plots, write_report
from secateur.report.rows import escaped
from secateur.report.rows_measured import bench_card
from secateur.result_directory import BENCH_FILE, EVALUATION_FILE, PAGE_FILE, RESULT_FILE, write_summary

CARD = "README.md"
# Files that name places of this machine; what is read is rewritten, the page is made again.
RECORDS = (RECIPE_FILE, RESULT_FILE, LOG_FILE, BENCH_FILE, EVALUATION_FILE, RECOVERY_FILE)
# Rounds, a trainer's curves and the parts of an evaluation stay here, and so does what is hidden.
NOT_SENT = ("rounds", "runs", "evaluation")
# Of an earlier upload: its index or a file of its weights could be loaded in place of the new ones.
STALE = ["*.safetensors", "*.safetensors.index.json"]


@dataclass(frozen=True, slots=True)
class Pushed(Record):
    """What was sent, or with `dry_run` would be. `files`: bytes by path. `metadata`: of the model card.

    `url`: of the repository; None for a dry run. `notes`: what the card does not know.
    """

    repo: str
    private: bool
    url: str | None
    files: dict[str, int]
    metadata: dict[str, Any]
    notes: tuple[str, ...]


def push(
    result: str | Path,
    repo: str,
    *,
    base_model: str | None = None,
    public: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Pushed:
    """Upload a result to the Hugging Face hub as the model `repo`, which is made if it is not there.

    `result`: a directory that `prune` or `recover` wrote. `repo`: its name there, as user/name.
    `base_model`: the hub id of the dense model, where it is not known or another is meant. `public`:
    everybody may see it; by default only its owner. `dry_run`: send nothing, and ask nothing of the
    network. `progress`: called with (stage, done, total).

    Returns a `Pushed`. What is sent holds no local path: files of text are named by their last part.

    Raises RecipeError for a name that is no hub id, CheckpointError if `result` is no result, or the
    hub cannot be reached or refuses.
    """
    _check_id("push", repo)
    if base_model is not None:
        _check_id("--base-model", base_model)
        if os.path.isdir(base_model):
            raise RecipeError(f"--base-model {base_model}: is a directory here; give the model's name on the hub.")
    directory = Path(result)
    files = read_result(directory)
    if not dry_run:
        _check_access()
    summary, recipe, given = files.summary, files.recipe, {"base_model": base_model, "name": repo.split("/")[1]}
    data = card_data(summary, recipe, recovery=files.recovery, evaluation=files.evaluation, **given)
    notes = tuple(unknown(data, summary))
    with tempfile.TemporaryDirectory(prefix="secateur-push-") as scratch:
        stage = Path(scratch)
        _stage(directory, stage, files)
        _write_card(stage, files, data, notes)
        _digest_again(stage)
        sizes = {path.relative_to(stage).as_posix(): path.stat().st_size for path in sorted(stage.rglob("*"))}
        sent = {name: size for name, size in sizes.items() if not (stage / name).is_dir()}
        progress("push", 0, 1)
        url = None if dry_run else _upload(stage, repo, public=public)
        progress("push", 1, 1)
    return Pushed(repo, not public, url, sent, data.to_dict(), notes)


def _check_id(option: str, hub_id: str) -> None:
    try:
        validate_repo_id(hub_id)
        valid = hub_id.count("/") == 1
    except HFValidationError:
        valid = False
    if not valid:
        raise RecipeError(f"{option} {hub_id}: is no name on the hub; give OWNER/NAME, such as Qwen/Qwen2.5-0.5B.")


def _check_access() -> None:
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError("push: HF_HUB_OFFLINE is set; unset it, or give --dry-run to see what would be sent.")
    if get_token() is None:
        raise CheckpointError("push: the hub wants a token with write access; run hf auth login, or set HF_TOKEN.")


def _stage(directory: Path, stage: Path, files: ResultFiles) -> None:
    """Link the result's files into `stage`, and write its records there without local paths."""
    for path in sorted(directory.rglob("*")):
        name = path.relative_to(directory)
        hidden = any(part.startswith(".") for part in name.parts)
        if hidden or name.parts[0] in NOT_SENT or not path.is_file() or str(name) == PAGE_FILE:
            continue
        if not lies_in(directory, path):
            raise CheckpointError(f"{path}: is a link to a file outside the result, which is not sent; remove it.")
        place = stage / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if str(name) in RECORDS:
            text = path.read_text(encoding="utf-8")
            place.write_text(without_places(text, files.summary, files.recipe), encoding="utf-8")
        else:
            place.symlink_to(path.resolve())
    if (directory / PAGE_FILE).is_file() and not missing_plots():
        write_report(stage, other_dense=True)


def _write_card(stage: Path, files: ResultFiles, data: ModelCardData, notes: tuple[str, ...]) -> None:
    """Write the staged card again: with this metadata and what `bench` found, without notes that no longer hold."""
    summary, recipe = files.summary, files.recipe
    card = (stage / CARD).read_text(encoding="utf-8") if (stage / CARD).is_file() else ""
    for note in set(unknown(card_data(summary, recipe), summary)) - set(notes):
        card = card.replace(f"- note: {escaped(note)}\n", "")
    if files.bench is not None and files.bench.dense is not None:
        card = with_section(card, bench_card(files.bench))
    (stage / CARD).unlink(missing_ok=True)  # a link to the result's own
    (stage / CARD).write_text(with_metadata(without_places(card, summary, recipe), data), encoding="utf-8")


def _digest_again(stage: Path) -> None:
    """Write the sha256 of what was rewritten into the staged `result.json`."""
    summary = read_summary(stage)
    linked = {name: digest for name, digest in summary.files.items() if (stage / name).is_symlink()}
    write_summary(stage, dataclasses.replace(summary, files={}), known=linked)


def _upload(stage: Path, repo: str, *, public: bool) -> str:
    """Upload the directory; return the repository's address. Raises CheckpointError."""
    api = HfApi()
    with _hub_errors(repo), quiet_transformers():
        api.create_repo(repo, private=not public, exist_ok=True)
        if not public and not api.model_info(repo).private:
            raise CheckpointError(f"push {repo}: everybody can see this repository; give --public if that is meant.")
        api.upload_folder(
            repo_id=repo, folder_path=stage, commit_message="Upload a result of secateur", delete_patterns=STALE
        )
    return f"{api.endpoint}/{repo}"


@contextmanager
def _hub_errors(repo: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = {401: "the token is not valid; run hf auth login", 403: "the token may not write there"}
        reason = remedy.get(status) or one_line(error)
        raise CheckpointError(f"push {repo}: the hub refuses with status {status}; {reason}.") from None
    except (OSError, HTTPError, ValueError) as error:
        raise CheckpointError(
            f"push {repo}: the hub cannot be reached or the upload failed ({one_line(error)}); run the same command "
            "again, it goes on from there."
        ) from None
