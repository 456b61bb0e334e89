"""`secateur.prune`: checkpoint in, smaller checkpoint out.

In: a model (reference or in memory) and a recipe. Out: a `Result`, and, where `out` is given, a directory that stands
on its own. Everything checkable without weights is checked before a weight is read.
"""

import dataclasses
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.budget import GroupKey
from secateur.calibration import CalibrationSet, build_calibration
from secateur.calibration_facts import calibration_facts
from secateur.calibration_sampled import with_sampled
from secateur.card import model_card
from secateur.depth_step import remove_depth
from secateur.in_memory import eval_mode
from secateur.job import Job
from secateur.latency import with_prices
from secateur.loop import prune_in_place
from secateur.memory import peak_bytes
from secateur.opening import (
    Given,
    computes_in_float32,
    device_for,
    loaded,
    memory_for,
    opened,
    placement_of,
    resolve_for,
    store_for,
    tokenizer_of,
)
from secateur.output import check_free_space
from secateur.progress import Progress, silent
from secateur.prune_recover import prune_then_recover
from secateur.pruned_checkpoint import PrunedCheckpoint
from secateur.ranks import from_first, is_first
from secateur.ranks_check import check_same_run
from secateur.ranks_group import joined
from secateur.recipe import Recipe, as_recipe
from secateur.report import missing_plots, write_report
from secateur.run import Keeps, Run
from secateur.runlog import RunLog
from secateur.staged_directory import staging_if_any
from secateur.store import Store
from secateur.summary import Size, Summary, group_widths, versions
from secateur.verify import Verification, verify_reload
from secateur.work import disk_bytes

VERIFY_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Result:
    """A pruned model. `keeps`: by (layer, group), the original indices of the units that stayed, sorted.

    `layers`: the dense model's layers that stayed; layer n of the result, and of `keeps`, was `layers[n]` there.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    keeps: dict[GroupKey, Tensor]
    layers: tuple[int, ...]
    summary: Summary
    out: Path | None


@joined()
def prune(
    model: PreTrainedModel | str | Path,
    recipe: Recipe | dict[str, Any] | Path | str | None = None,
    *,
    out: Path | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    resume: bool = False,
    command: str = "",
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda text: None,
) -> Result:
    """Prune a causal LM by a recipe and return it with what it cost and kept.

    `model`: a local directory, a hub id, a `.gguf` file, `smollm2-135m`, or a model in memory, which needs `tokenizer`
    and is pruned in place. Buffers that no checkpoint stores, such as rotary frequencies that `.to(torch.bfloat16)`
    rounded, are first set to what loading computes; a note in the summary's `warnings` says so.
    `recipe`: a Recipe, a mapping, a YAML file, or None for the defaults. `out`: where to write the checkpoint; it
    appears complete or not at all. `resume`: go on from what an interrupted run of the same inputs has finished, which
    lies in a hidden directory beside `out`; from the beginning if there is none. `tell` gets a line of text about that.
    `command`: how to repeat the run, for the model card. Under torchrun every process calls this and gets the same
    model; the first one writes, and alone verifies.
    Raises a SecateurError, one sentence, for everything that a user can correct.
    """
    progress = progress if is_first() else silent
    parsed = as_recipe(recipe)
    if parsed.recover is not None:
        options = {"resume": resume, "tell": tell}
        return prune_then_recover(prune, model, parsed, out, tokenizer, overwrite, command, progress, options)
    checkpoint, shape, arch = opened(model, tokenizer, parsed)
    device = device_for(parsed, checkpoint, shape)
    protected = None if checkpoint is None else checkpoint.directory
    place, log = None if out is None else Path(os.path.abspath(out)), RunLog()
    target = staging_if_any(place, overwrite=overwrite, protected=protected)
    computes = {"device": str(device), "in float32": computes_in_float32(parsed, checkpoint, shape, device)}
    kept = store_for(place, parsed, checkpoint, computes, log, resume=resume, overwrite=overwrite, tell=tell)
    given = Given(checkpoint, shape, arch, device)
    del shape  # its modules alone are 0.1 MB per layer
    with kept as store, target as directory:
        job = _prepared(given, parsed, tokenizer, store, directory, command, progress)
        with eval_mode(job.model):
            layers, keeps, summary = _run(job, directory, protected)
    return Result(
        job.model, job.tokenizer, job.resolved.recipe, keeps, layers, summary, None if out is None else Path(out)
    )


def _prepared(
    given: Given,
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase | None,
    store: Store,
    directory: Path | None,
    command: str,
    progress: Progress,
) -> Job:
    """Return the job with its model on the device and its text packed, after everything has been checked."""
    checkpoint, shape, arch, device = given.checkpoint, given.shape, given.arch, given.device
    log = store.log
    if directory is not None:
        log.append_to(directory)
    recipe = with_prices(recipe, arch, shape, store, progress, device)
    resolved = resolve_for(recipe, shape)
    plan = memory_for(resolved, arch, shape, checkpoint, device)
    if directory is not None:
        check_free_space(directory, disk_bytes(arch, resolved, shape, plan))
    tokenizer = tokenizer or tokenizer_of(checkpoint)
    with log.time("calibration"):
        calibration = from_first(partial(_calibrate, resolved.recipe, tokenizer, progress))
    with log.time("load"):
        model, notes = loaded(given, plan)
        resolved = dataclasses.replace(resolved, warnings=resolved.warnings + notes)
        check_same_run(model, resolved)
        size, placement = Size.of(model), placement_of(model, given, plan)
        placement.go()
    with log.time("calibration"), eval_mode(model):
        calibration = from_first(partial(with_sampled, calibration, model, tokenizer, recipe.seed, progress))
        store.check_input("calibration text", calibration.content_hash)
    name = str(checkpoint.reference if checkpoint else model.config._name_or_path or type(model).__name__)
    parts = (tokenizer, arch, resolved, calibration, log, store, progress, plan, device, placement, size)
    return Job(name, command, model, *parts)


def _run(job: Job, directory: Path | None, carry_from: Path | None) -> tuple[tuple[int, ...], Keeps, Summary]:
    recipe, log = job.resolved.recipe, job.log
    dense_size, dense_layers = job.dense_size, job.arch.num_layers
    dense_losses = job.evaluate("dense")
    with tempfile.TemporaryDirectory(dir=directory, prefix="scratch-") as scratch:
        run = Run(job.model, job.arch, job.resolved, job.calibration, log.write, job.progress, Path(scratch))
        with log.time("prune"):
            run = dataclasses.replace(run, weights_on_disk=job.plan.weights_on_disk, store=job.store)
            run = remove_depth(run)
            job, layers = dataclasses.replace(job, arch=run.arch, resolved=run.resolved), run.resolved.layers
            checkpoint = directory and PrunedCheckpoint(job.model, job.tokenizer, recipe, directory, carry_from, layers)
            if checkpoint and recipe.keep_rounds:
                run = dataclasses.replace(run, after_round=job.at_home(checkpoint.save_round))
            keeps = prune_in_place(run)
        peak = peak_bytes()
        pruned_losses = job.evaluate("pruned")
    job.store.note_found()
    device_peak = job.come_home()
    proof = _save(job, checkpoint, keeps)
    summary = Summary(
        model=job.name,
        family=job.arch.family,
        command=job.command,
        remove_asked=recipe.remove,
        remove_reached=1 - Size.of(job.model).num_params / dense_size.num_params,
        outcome=job.resolved.outcome({key: keep.shape[-1] for key, keep in keeps.items()}),
        dense_size=dense_size,
        pruned_size=Size.of(job.model),
        num_layers=(dense_layers, len(layers)),
        widths=group_widths(job.arch.select(recipe.groups), keeps),
        calibration=calibration_facts(job.calibration),
        dense_losses=dense_losses,
        pruned_losses=pruned_losses,
        guard_refusals=sum(line.get("step", 1) == 0 for line in log.lines),
        seconds={name: round(seconds, 2) for name, seconds in log.seconds.items()},
        peak_bytes=peak,
        reload_max_abs_difference=proof.max_abs_difference if proof else None,
        sample_text=proof.generated_text if proof else None,
        warnings=(*job.notes(), *(missing_plots() if directory else ())),
        versions=versions(),
        device=str(job.device),
        device_peak_bytes=device_peak,
    )
    if directory is not None:
        _tell(log, directory, summary)
    return layers, keeps, summary


def _tell(log: RunLog, directory: Path, summary: Summary) -> None:
    log.write({"event": "seconds", **summary.seconds})
    (directory / "result.json").write_text(summary.to_json(), encoding="utf-8")
    (directory / "README.md").write_text(model_card(summary), encoding="utf-8")
    if not missing_plots():
        write_report(directory)


def _save(job: Job, checkpoint: PrunedCheckpoint | None, keeps: Keeps) -> Verification | None:
    if checkpoint is None:
        return None
    with job.log.time("save"):
        checkpoint.save(keeps)
    with job.log.time("verify"):
        job.progress("verify", 0, 1)
        ids_1T = job.calibration.domains[0].held_out_NT[:1, :VERIFY_TOKENS].to(job.model.device)
        with torch.inference_mode():
            logits = job.model(ids_1T, use_cache=False).logits
        proof = verify_reload(checkpoint.directory, ids_1T, logits)
        job.progress("verify", 1, 1)
    return proof


def _calibrate(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> CalibrationSet:
    assert recipe.calibration.num_tokens is not None
    return build_calibration(
        recipe.calibration, recipe.calibration.num_tokens, tokenizer, recipe.seed, progress, num_rounds=recipe.rounds
    )
