"""A recovery before its first step: both models, the recipe, the text, what it will cost, and where it works.

In: two model references and what to change of the pruned model's recipe. Out: a `Work`, ready to run, or its `Cost`.
What an interrupted run has finished lies in a hidden directory beside OUT, named after all that the result depends on.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.checkpoint import Checkpoint, load_model
from secateur.errors import RecipeError
from secateur.fingerprint import weight_digests
from secateur.output import check_free_space, disk_errors
from secateur.prices import sequence_length
from secateur.progress import Progress, silent
from secateur.recipe import Recipe, load_recipe, merged, over_preset, parse_recipe
from secateur.recover_cost import predict_cost, time_a_step
from secateur.recover_judge import Judge
from secateur.recover_logits import Work
from secateur.recover_pair import Candidates, open_pair
from secateur.recover_recipe import RecoverySettings
from secateur.recover_record import Cost
from secateur.recover_text import RecoveryText, recovery_text
from secateur.runlog import RunLog

RECIPE_FILE = "recipe.yaml"


def changes_of(recipe: dict[str, Any] | Path | str | None, tokens: int | None) -> dict[str, Any]:
    """Return what a mapping or a file, and `tokens`, change of the pruned model's recipe, its preset filled in."""
    changes = load_recipe(Path(recipe)) if isinstance(recipe, Path | str) else recipe or {}
    if "preset" in changes:
        changes = over_preset(changes, "recipe")
    return changes if tokens is None else merged(changes, {"recover": {"num_tokens": tokens}})


def open_job(
    pruned: str | Path, teacher: str | Path, changes: dict[str, Any] | None
) -> tuple[Candidates, Recipe, RecoverySettings]:
    """Return both models' checkpoints, the whole recipe and its part on recovery; nothing but JSON and headers is read.

    Raises CheckpointError for models that do not fit each other, RecipeError for what the recipe has wrong.
    """
    candidates = open_pair(pruned, teacher)
    changes = changes or {}
    path = candidates.pruned.directory / RECIPE_FILE
    if not path.is_file() and "calibration" not in changes:
        raise RecipeError(
            f"{pruned}: has no {RECIPE_FILE}, so its domains are not known; say what to train on with --domain "
            "NAME[=FILE] or --recipe FILE."
        )
    base = load_recipe(path) if path.is_file() else {}
    if "domains" in changes.get("calibration", {}):  # these are then all there are
        base.get("calibration", {}).pop("domains", None)
    recipe = parse_recipe(merged(base, changes), "recover")
    length = sequence_length(recipe.calibration.sequence_length, candidates.pruned_shape.config.get_text_config())
    calibration = recipe.calibration.model_copy(update={"sequence_length": length})
    settings = recipe.recover or RecoverySettings()
    return candidates, recipe.model_copy(update={"calibration": calibration, "recover": settings}), settings


def prepare(
    candidates: Candidates,
    recipe: Recipe,
    settings: RecoverySettings,
    out: Path,
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda text: None,
    *,
    keep_log: bool = True,
) -> tuple[Work, RunLog]:
    """Open both models, draw the text, ask the dense model once, and make the hidden directory beside `out`.

    Weights stay on disk, mapped, so that they fill memory only where training changes them.

    Raises CalibrationError for too little text, CheckpointError for too little disk.
    """
    dense = _load(candidates.teacher)
    text = recovery_text(recipe, settings, candidates.tokenizer, dense, progress)
    scratch = out.absolute().with_name(f".{out.name}.recover-{_fingerprint(candidates, recipe, text)}")
    with disk_errors(out):
        scratch.mkdir(parents=True, exist_ok=True)
    for line in left_behind(scratch, out):
        tell(line)
    cost = cost_of(candidates, settings, text)
    check_free_space(scratch, cost.scratch_bytes)
    log = RunLog(scratch if keep_log else None)
    with log.time("judge"):
        judge = Judge(dense, candidates.teacher_arch, text.held_out_NT, progress)
    model, calls = _load(candidates.pruned), (log.write, progress, tell)
    return Work(candidates, model, dense, text, judge, settings, recipe.seed, scratch, *calls), log


def left_behind(scratch: Path, out: Path) -> Iterator[str]:
    """Yield what interrupted runs towards `out` have left: what this run goes on with, and what nobody will use."""
    for place in sorted(path for path in scratch.parent.iterdir() if path.name.startswith(f".{out.name}.recover-")):
        num_bytes = sum(file.stat().st_size for file in place.rglob("*") if file.is_file())
        if num_bytes:
            found = f"{place}: {num_bytes / 1e6:,.1f} MB that an interrupted run left"
            end = "this one goes on from there" if place == scratch else "of other inputs; delete it if you are done"
            yield f"{found}, {end}."


def _load(checkpoint: Checkpoint) -> PreTrainedModel:
    """Return the model, its weights mapped from their files where these are safetensors."""
    return load_model(checkpoint, mapped=checkpoint.gguf_file is None)


def dry_run(
    pruned: str | Path, teacher: str | Path, changes: dict[str, Any] | None = None, progress: Progress = silent
) -> Cost:
    """Return what `recover` would cost: tokens, operations, memory, disk; seconds from one step that is timed here.

    Loads both models and writes nothing. Raises what `recover` would raise before its first step.
    """
    candidates, recipe, settings = open_job(pruned, teacher, changes)
    dense = _load(candidates.teacher)
    text = recovery_text(recipe, settings, candidates.tokenizer, dense, progress)
    progress("time a step", 0, 1)
    ids_BT = torch.stack([ids_T for _, ids_T in text.blocks[: settings.logits.blocks_per_device]])
    seconds_per_flop = time_a_step(_load(candidates.pruned), dense, settings, ids_BT)
    progress("time a step", 1, 1)
    return cost_of(candidates, settings, text, seconds_per_flop)


def cost_of(
    candidates: Candidates,
    settings: RecoverySettings,
    text: RecoveryText,
    seconds_per_flop: tuple[float, float] | None = None,
) -> Cost:
    """Return what training on the text costs; seconds only where the speed of this machine is given."""
    shapes = candidates.pruned_shape, candidates.teacher_shape
    tokens = text.num_tokens, text.num_held_out_tokens
    return predict_cost(*shapes, settings, *tokens, text.sequence_length, seconds_per_flop)


def _fingerprint(candidates: Candidates, recipe: Recipe, text: RecoveryText) -> str:
    """Return a short hash of all that the weights of the result depend on: recipe, text, both models' files."""
    digests = [weight_digests(checkpoint) for checkpoint in (candidates.pruned, candidates.teacher)]
    inputs = [recipe.model_dump(mode="json", exclude={"recover": {"evaluation"}}), text.content_hash, *digests]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:12]
