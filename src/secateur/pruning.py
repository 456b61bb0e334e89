"""`secateur.prune`: checkpoint in, smaller checkpoint out.

In: a model (reference or in memory) and a recipe. Out: a `Result`, and, where `out` is given, a directory that stands
on its own. Everything checkable without weights is checked before a weight is read.
"""

import dataclasses
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.arch import Arch, bind, decoder_layers
from secateur.bench import Speed, bench
from secateur.budget import GroupKey
from secateur.calibration import CalibrationSet, build_calibration
from secateur.calibration_facts import calibration_facts
from secateur.calibration_sampled import with_sampled
from secateur.card import model_card
from secateur.checkpoint import check_finite, check_weights, load_model, load_tokenizer, meta_model, open_checkpoint
from secateur.depth_step import remove_depth
from secateur.in_memory import check_in_memory, eval_mode, restore_buffers
from secateur.latency import with_prices
from secateur.loop import prune_in_place
from secateur.loss import domain_losses
from secateur.memory import peak_bytes
from secateur.original_readers import OriginalReaders
from secateur.output import check_free_space, parse_shard_size, staging
from secateur.prices import prices_of
from secateur.progress import Progress, silent
from secateur.pruned_checkpoint import PrunedCheckpoint
from secateur.recipe import Recipe, load_recipe, parse_recipe
from secateur.report import missing_plots, write_reports
from secateur.resolve import Resolved, check_without_prices, resolve
from secateur.run import Keeps, Run
from secateur.runlog import RunLog
from secateur.summary import Losses, Size, Summary, versions
from secateur.verify import Verification, verify_reload

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


@dataclass(frozen=True, slots=True)
class _Job:
    """A run with everything at hand: the dense model loaded, the text packed, the numbers resolved."""

    name: str
    command: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    arch: Arch
    resolved: Resolved
    calibration: CalibrationSet
    log: RunLog
    progress: Progress


def prune(
    model: PreTrainedModel | str | Path,
    recipe: Recipe | dict[str, Any] | Path | str | None = None,
    *,
    out: Path | str | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    overwrite: bool = False,
    command: str = "",
    progress: Progress = silent,
) -> Result:
    """Prune a causal LM by a recipe and return it with what it cost and kept.

    `model`: a local directory, a hub id, a `.gguf` file, `smollm2-135m`, or a model in memory, which needs `tokenizer`
    and is pruned in place. Buffers that no checkpoint stores, such as rotary frequencies that `.to(torch.bfloat16)`
    rounded, are first set to what loading computes; a note in the summary's `warnings` says so.
    `recipe`: a Recipe, a mapping, a YAML file, or None for the defaults. `out`: where to write the checkpoint; it
    appears complete or not at all. `command`: how to repeat the run, for the model card.

    Raises a SecateurError, one sentence, for everything that a user can correct.
    """
    parsed = _parse(recipe)
    parse_shard_size(parsed.max_shard_size)
    if isinstance(model, str | Path):
        checkpoint = open_checkpoint(model)
        shape = meta_model(checkpoint.config)
    else:
        check_in_memory(model, tokenizer)
        checkpoint, shape = None, model
    arch, size = bind(shape), Size.of(shape)
    check_without_prices(parsed, arch, shape.config)
    if checkpoint is not None:
        check_weights(checkpoint, shape)
    protected = None if checkpoint is None else checkpoint.directory
    target = nullcontext() if out is None else staging(Path(out), overwrite=overwrite, protected=protected)
    with target as directory:
        if directory is not None:
            check_free_space(directory, size.num_bytes)
        log = RunLog(directory)
        parsed = with_prices(parsed, arch, shape, log, progress)
        resolved = resolve(parsed, arch, shape.config, prices_of(parsed, arch, shape))
        with log.time("calibration"):
            if tokenizer is None:
                assert checkpoint is not None
                tokenizer = load_tokenizer(checkpoint)
            calibration = _calibrate(resolved.recipe, tokenizer, progress)
        with log.time("load"):
            loaded = shape if checkpoint is None else load_model(checkpoint)
            if checkpoint is None:
                check_finite(loaded)
                resolved = dataclasses.replace(resolved, warnings=resolved.warnings + restore_buffers(loaded))
        with log.time("calibration"):
            calibration = with_sampled(calibration, loaded, tokenizer, resolved.recipe.seed, progress)
        name = loaded.config._name_or_path or type(loaded).__name__ if checkpoint is None else checkpoint.reference
        job = _Job(str(name), command, loaded, tokenizer, arch, resolved, calibration, log, progress)
        with eval_mode(loaded):
            layers, keeps, summary = _run(job, directory, protected)
    path = None if out is None else Path(out)
    return Result(loaded, tokenizer, resolved.recipe, keeps, layers, summary, path)


def _run(job: _Job, directory: Path | None, carry_from: Path | None) -> tuple[tuple[int, ...], Keeps, Summary]:
    recipe, log = job.resolved.recipe, job.log
    dense_size, dense_layers = Size.of(job.model), job.arch.num_layers
    dense_losses = _evaluate(job, "dense")
    dense_speed = _bench(job, "dense")
    with tempfile.TemporaryDirectory(dir=directory, prefix="originals-") as scratch:
        compare = recipe.evaluate and recipe.compensate != "none"
        originals = OriginalReaders(Path(scratch)) if compare else None
        run = Run(job.model, job.arch, job.resolved, job.calibration, originals, log.write, job.progress, Path(scratch))
        with log.time("prune"):
            run = remove_depth(run)
            job, layers = dataclasses.replace(job, arch=run.arch, resolved=run.resolved), run.resolved.layers
            checkpoint = directory and PrunedCheckpoint(job.model, job.tokenizer, recipe, directory, carry_from, layers)
            if checkpoint and recipe.keep_rounds:
                run = dataclasses.replace(run, after_round=checkpoint.save_round)
            keeps = prune_in_place(run)
        peak = peak_bytes()
        pruned_losses = _evaluate(job, "pruned")
        uncompensated_losses: Losses = {}
        if originals is not None:
            with originals.in_place(decoder_layers(job.model, job.arch), job.arch.groups, keeps):
                uncompensated_losses = _evaluate(job, "uncompensated")
    pruned_speed = _bench(job, "pruned")
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
        widths=_widths(job, keeps),
        calibration=calibration_facts(job.calibration),
        dense_losses=dense_losses,
        pruned_losses=pruned_losses,
        uncompensated_losses=uncompensated_losses,
        dense_speed=dense_speed,
        pruned_speed=pruned_speed,
        guard_refusals=sum(line.get("step", 1) == 0 for line in log.lines),
        seconds={name: round(seconds, 2) for name, seconds in log.seconds.items()},
        peak_bytes=peak,
        reload_max_abs_difference=proof.max_abs_difference if proof else None,
        sample_text=proof.generated_text if proof else None,
        warnings=(
            *job.resolved.warnings,
            *(line["text"] for line in log.lines if line["event"] == "note"),
            *(missing_plots() if directory else ()),
        ),
        versions=versions(),
    )
    if directory is not None:
        log.write({"event": "seconds", **summary.seconds})
        (directory / "result.json").write_text(summary.to_json(), encoding="utf-8")
        (directory / "README.md").write_text(model_card(summary), encoding="utf-8")
        if not missing_plots():
            write_reports([directory])
    return layers, keeps, summary


def _save(job: _Job, checkpoint: PrunedCheckpoint | None, keeps: Keeps) -> Verification | None:
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


def _evaluate(job: _Job, which: str) -> Losses:
    if not job.resolved.recipe.evaluate:
        return {}
    blocks = {domain.name: domain.held_out_NT for domain in job.calibration.domains}
    with job.log.time("evaluate"):
        losses = domain_losses(job.model, job.arch, blocks, job.progress, f"evaluate {which}")
    for domain, loss in losses.items():
        job.log.write({"event": "loss", "model": which, "domain": domain, **dataclasses.asdict(loss)})
    return losses


def _bench(job: _Job, which: str) -> Speed | None:
    if not job.resolved.recipe.bench:
        return None
    with job.log.time("bench"):
        return bench(job.model, progress=job.progress, stage=f"bench {which}")


def _calibrate(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, progress: Progress) -> CalibrationSet:
    assert recipe.calibration.num_tokens is not None
    return build_calibration(
        recipe.calibration, recipe.calibration.num_tokens, tokenizer, recipe.seed, progress, num_rounds=recipe.rounds
    )


def _widths(job: _Job, keeps: Keeps) -> dict[str, tuple[int, int, int]]:
    widths: dict[str, tuple[int, int, int]] = {}
    for group in job.arch.select(job.resolved.recipe.groups):
        keep = keeps.get((group.layer, group.name))
        kept = group.num_units if keep is None else keep.shape[-1]
        before, least, most = widths.get(group.name, (group.num_units, kept, kept))
        widths[group.name] = (before, min(least, kept), max(most, kept))
    return widths


def _parse(recipe: Recipe | dict[str, Any] | Path | str | None) -> Recipe:
    if isinstance(recipe, Recipe):
        return recipe
    if isinstance(recipe, Path | str):
        return parse_recipe(load_recipe(Path(recipe)), f"recipe {recipe}")
    return parse_recipe(recipe or {})
