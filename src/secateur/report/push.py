"""`secateur push`: a result onto the Hugging Face hub. In: a result directory. Out: a `Pushed`.

What is sent are the files of the run and the records of later commands, nothing that was added.
"""

import dataclasses
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, ModelCardData, constants, get_token, metadata_load
from huggingface_hub.constants import CONFIG_NAME
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # httpx or httpx2
)

from secateur.errors import CheckpointError, RecipeError, one_line
from secateur.facts import Record
from secateur.files import files_in, lies_in
from secateur.log import Progress, silent
from secateur.model.config import is_hub_id
from secateur.model.stock import quiet_transformers
from secateur.recipe import RECIPE_FILE, dump_recipe
from secateur.report.records import read_result
from secateur.report.report import CARD_FILE, card_data, unknown, with_metadata
from secateur.result_directory import LATER_FILES, RESULT_FILE, read_digests, write_summary

# Of an earlier upload: its index or a file of its weights could be loaded in place of the new ones.
STALE = ["*.safetensors", "*.safetensors.index.json"]


@dataclass(frozen=True, slots=True)
class Pushed(Record):
    """What was sent, or with `dry_run` would be. `files`: bytes by path. `metadata`: of the model
    card.

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
    public: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> Pushed:
    """Upload a result to the Hugging Face hub as the model `repo`, which is made if it is not
    there.

    `result`: a directory that `prune` or `recover` wrote. `repo`: its name there, as user/name.
    `public`: everybody may see it; by default only its owner. `dry_run`: send nothing, and ask
    nothing of the network. `progress`: called with (stage, done, total).

    Returns a `Pushed`. What is sent holds no local path: in the recipe, files of text are named by
    their last part.

    Raises RecipeError for a name that is no hub id, CheckpointError if `result` is no result, or
    the hub cannot be reached or refuses.
    """
    if not is_hub_id(repo):
        raise RecipeError(
            f"push {repo}: is no name on the hub; give OWNER/NAME, such as Qwen/Qwen2.5-0.5B."
        )
    directory = Path(result)
    if (directory / RESULT_FILE).is_file() and not (directory / CONFIG_NAME).is_file():
        raise CheckpointError(
            f"push {directory}: has no {CONFIG_NAME}, so it is no model; give a result of prune."
        )
    digests, files = read_digests(directory), read_result(directory)
    if digests is None:
        raise CheckpointError(
            f"{directory}: its {RESULT_FILE} is damaged; prune again, or push another result."
        )
    if not dry_run:
        _check_access()
    summary = files.summary
    with tempfile.TemporaryDirectory(prefix="secateur-push-") as scratch:
        stage = Path(scratch)
        _stage(directory, stage, digests)
        data = _metadata(directory / CARD_FILE, card_data(summary, files.recipe))
        _write(
            stage,
            CARD_FILE,
            with_metadata((directory / CARD_FILE).read_text(encoding="utf-8"), data),
        )
        _write(stage, RECIPE_FILE, dump_recipe(files.recipe, places=False))
        (stage / RESULT_FILE).unlink()
        linked = {name: digest for name, digest in digests.items() if (stage / name).is_symlink()}
        write_summary(stage, dataclasses.replace(summary, files={}), known=linked)
        sent = {name: (stage / name).stat().st_size for name in files_in(stage)}
        url = None if dry_run else _upload(stage, repo, progress, public=public)
    return Pushed(repo, not public, url, sent, data.to_dict(), tuple(unknown(data, summary)))


def _metadata(card: Path, data: ModelCardData) -> ModelCardData:
    """Return the metadata with what its owner has added to the card. Raises CheckpointError if that
    is none.
    """
    try:
        return ModelCardData(**{**data.to_dict(), **(metadata_load(card) or {})})
    except (ValueError, yaml.YAMLError) as error:
        raise CheckpointError(
            f"{card}: its first lines are no metadata ({one_line(error)}); correct them."
        ) from None


def _check_access() -> None:
    if constants.HF_HUB_OFFLINE:
        raise CheckpointError(
            "push: HF_HUB_OFFLINE is set; unset it, or give --dry-run to see what would be sent."
        )
    if get_token() is None:
        raise CheckpointError(
            "push: the hub wants a token with write access; run hf auth login, or set HF_TOKEN."
        )


def _stage(directory: Path, stage: Path, digests: dict[str, str]) -> None:
    """Link what is sent into `stage`: files with digests and what later commands wrote, nothing
    else.

    Raises CheckpointError for a file that is gone, or a link to somewhere else.
    """
    later = [name for name in LATER_FILES if (directory / name).is_file()]
    for name in (*digests, *later):
        if not (directory / name).is_file() or not lies_in(directory, directory / name):
            raise CheckpointError(
                f"{directory / name}: is gone, or a link to a file outside the result; bring it "
                "back, or prune again."
            )
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        (stage / name).symlink_to((directory / name).resolve())


def _write(stage: Path, name: str, text: str) -> None:
    """Write a staged file in place of the link."""
    (stage / name).unlink(missing_ok=True)
    (stage / name).write_text(text, encoding="utf-8")


def _upload(stage: Path, repo: str, progress: Progress, *, public: bool) -> str:
    """Upload the directory; return the repository's address. Raises CheckpointError."""
    api = HfApi()
    progress("push", 0, 1)
    try:
        with quiet_transformers():
            api.create_repo(repo, private=not public, exist_ok=True)
            if not public and not api.model_info(repo).private:
                raise CheckpointError(
                    f"push {repo}: everybody can see this repository; give --public if that is "
                    "meant."
                )
            api.upload_folder(
                repo_id=repo,
                folder_path=stage,
                commit_message="Upload a result of secateur",
                delete_patterns=STALE,
            )
    except CheckpointError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        remedy = {
            401: "the token is not valid; run hf auth login",
            403: "the token may not write there",
        }
        reason = remedy.get(status) or one_line(error)
        raise CheckpointError(
            f"push {repo}: the hub refuses with status {status}; {reason}."
        ) from None
    except (OSError, HTTPError, ValueError) as error:
        raise CheckpointError(
            f"push {repo}: the hub cannot be reached or the upload failed ({one_line(error)}); run "
            "the same command again, it goes on from there."
        ) from None
    progress("push", 1, 1)
    return f"{api.endpoint}/{repo}"
