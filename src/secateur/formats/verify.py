"""`secateur verify`: a result directory in; whether it is as it was written, and loads."""

from dataclasses import dataclass
from pathlib import Path

import torch

from secateur.errors import CheckpointError, SecateurError
from secateur.facts import Record
from secateur.formats.save import Verification, verify_reload
from secateur.log import Progress, silent
from secateur.model.checkpoint import load_model, open_checkpoint
from secateur.model.modules import text_model
from secateur.result_directory import RESULT_FILE, Mismatch, mismatches, read_digests

NUM_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Verified(Record):
    """What was checked. `mismatches`: empty if all is as it was written.

    `num_bytes`: of the files that match. `max_abs_difference`: of logits, stock transformers
    against `secateur.load`; None, as is the text, if files do not match, so that nothing is loaded.
    """

    directory: str
    num_files: int
    num_bytes: int
    mismatches: tuple[Mismatch, ...]
    max_abs_difference: float | None
    generated_text: str | None


def verify(result: str | Path, *, progress: Progress = silent) -> Verified:
    """Check a result against the sha256 of its files, and that stock transformers reloads it.

    `result`: a directory that `prune` or `recover` wrote. `progress`: called with (stage, done,
    total). Nothing is loaded unless all files match; code in the directory runs only if it is the
    package's own modelling file.

    Returns a `Verified`; its `mismatches` say what is not as it was written: changed, missing or
    added files, tensors that are missing, untied or not finite, other logits than `secateur.load`.

    Raises CheckpointError if `result` is no result, or one without digests.
    """
    directory = Path(result)
    digests = read_digests(directory)
    if digests is None:
        damaged = Mismatch(RESULT_FILE, "the bytes that were written", "others, so no digest can be trusted")
        return Verified(str(result), 0, 0, (damaged,), None, None)
    wrong = tuple(mismatches(directory, digests, progress))
    whole = [directory / name for name in digests.keys() - {each.what for each in wrong}]
    proof = None
    if not wrong:
        progress("reload", 0, 1)
        try:
            proof = _reload(directory)
        except SecateurError as error:
            wrong = (Mismatch("reload", "the model that secateur.load gives", str(error)),)
        progress("reload", 1, 1)
    figures = (proof.max_abs_difference, proof.generated_text) if proof else (None, None)
    return Verified(str(result), len(whole), sum(file.stat().st_size for file in whole), wrong, *figures)


@torch.inference_mode()
def _reload(directory: Path) -> Verification:
    """Compare stock transformers in a fresh process with the model here. Raises CheckpointError."""
    model = load_model(open_checkpoint(directory), mapped=True)
    ids_1T = torch.arange(1, NUM_TOKENS + 1)[None] % model.config.get_text_config().vocab_size
    logits_1TV = text_model(model)(input_ids=ids_1T, use_cache=False).logits
    if not logits_1TV.isfinite().all():
        raise CheckpointError(f"{directory}: its logits hold NaN or infinity.")
    return verify_reload(directory, ids_1T, logits_1TV)
