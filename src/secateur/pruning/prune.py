"""One prune: open, resolve, text, load, remove layers, rounds, save, verify, result, report.

All that can be checked without weights is checked before a weight is read.
`api.prune` adds recovery.
"""

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from secateur.log import Progress, RunLog, silent
from secateur.model.checkpoint import Tokenizer, eval_mode
from secateur.model.modules import CausalLM
from secateur.pruning.loop import prune_in_place, remove_depth
from secateur.pruning.open import Opened, computes_in_float32, open_model, store_for, tokenizer_of
from secateur.pruning.prepare import prepared
from secateur.pruning.resolve import checked
from secateur.pruning.result import PrunedCheckpoint, Result, save_and_prove, summary_of, write_report_files
from secateur.pruning.run import Keeps, Run
from secateur.ranks import staging_if_any
from secateur.recipe import Recipe
from secateur.store import Services
from secateur.stream.device import peak_bytes, peak_bytes_on
from secateur.stream.offload import Placement


def prune_run(
    model: CausalLM | str | Path,
    recipe: Recipe,
    *,
    out: Path | str | None = None,
    tokenizer: Tokenizer | None = None,
    overwrite: bool = False,
    resume: bool = False,
    command: str = "",
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda text: None,
) -> Result:
    """Prune a causal LM, without the recipe's `recover`. Arguments, errors: see `api.prune`."""
    opened = checked(open_model(model, recipe, tokenizer))
    place, log = None if out is None else Path(os.path.abspath(out)), RunLog()
    computes = {"device": str(opened.device), "in float32": computes_in_float32(opened)}
    target = staging_if_any(place, overwrite=overwrite, protected=opened.directory)
    options: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "tell": tell}
    with store_for(place, recipe, opened.checkpoint, computes, log, **options) as store, target as directory:
        if directory is not None:
            log.append_to(directory)
        services = Services(progress=progress, log=log, store=store, scratch=directory)
        opened, run, placement = prepared(opened, services)
        with eval_mode(run.model):
            result = _pruned(opened, run, placement, directory, command)
    return dataclasses.replace(result, out=None if out is None else Path(out))


def _pruned(opened: Opened, run: Run, placement: Placement, directory: Path | None, command: str) -> Result:
    """Return the result of a run whose model is still dense, and write it to the directory."""
    services, measured = run.services, dict[str, Any](dense_losses=run.losses("dense"))
    run, checkpoint, keeps = _cut(opened, run, placement, directory)
    measured |= {"peak_bytes": peak_bytes(), "pruned_losses": run.losses("pruned")}
    services.store.note_found()
    measured |= {"device_peak_bytes": peak_bytes_on(opened.device)}
    placement.offload()
    proof = None if checkpoint is None else save_and_prove(run, checkpoint, keeps)
    summary = summary_of(opened, run, keeps, proof, command=command, **measured)
    if directory is not None:
        summary = write_report_files(directory, summary, services.log)
    return Result(run.model, tokenizer_of(opened), run.resolved.recipe, keeps, run.resolved.layers, summary)


def _cut(
    opened: Opened, run: Run, placement: Placement, directory: Path | None
) -> tuple[Run, PrunedCheckpoint | None, Keeps]:
    """Remove layers, then prune all rounds; return the run then, the checkpoint and the keeps."""
    checkpoint = None
    with run.services.log.time("prune"):
        run = remove_depth(run)
        recipe = run.resolved.recipe
        if directory is not None:
            facts = (directory, opened.directory, run.resolved.layers)
            checkpoint = PrunedCheckpoint(run.model, tokenizer_of(opened), recipe, *facts)
            if recipe.output.keep_rounds:
                run = dataclasses.replace(run, after_round=partial(_save_round, placement, checkpoint))
        keeps = prune_in_place(run)
    return run, checkpoint, keeps


def _save_round(placement: Placement, checkpoint: PrunedCheckpoint, number: int, keeps: Keeps) -> None:
    with placement.on_host():
        checkpoint.save(keeps, number)
