"""`secateur.recover`: a pruned checkpoint and its dense model in, the same checkpoint with quality won back out."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from secateur.errors import RecipeError
from secateur.evaluation.tasks import LoadedTasks
from secateur.files import check_free_space, check_replaceable, disk_errors, staging
from secateur.formats.save import Verification, verify_reload
from secateur.log import LOG_FILE, Progress, RunLog, silent, versions
from secateur.methods.prices import sequence_length
from secateur.model.checkpoint import Checkpoint, load_model, weight_digests
from secateur.ranks import alone
from secateur.recipe import Recipe, RecoverySettings
from secateur.recipe_file import load_recipe, merged, over_preset, parse_recipe
from secateur.recovery.cost import predict_cost, predict_flops, time_a_step
from secateur.recovery.judge import Judge, domain_weights
from secateur.recovery.pair import Candidates, RecoveryText, open_pair, recovery_text
from secateur.recovery.result import last_lines, save_recovered, score_tasks, tasks_of, write_record
from secateur.recovery.train import TRAINER_FOLDER, Work, recover_logits, wants_shards
from secateur.report.measured import Cost, RecoveryRecord, TaskScores, TrainingRecord, Verdicts, mean_kl, mean_nats
from secateur.report.records import RESULT_FILE
from secateur.report.report import missing_plots, write_report
from secateur.store import Store
from secateur.stream.device import peak_bytes

TRAINED_FOLDER = "trained"


def train_guarded(work: Work) -> tuple[Verdicts, TrainingRecord]:
    """Train the pruned model and return the verdicts before the training and the record of it.

    Where the mean held-out KL is not lower afterwards, the model gets back the weights that it had before. Plain
    fine-tuning, which has no teacher, goes by the held-out loss instead.
    """
    before = judged(work)
    old = {name: parameter.data for name, parameter in work.pruned.named_parameters()}  # replaced, never changed
    cost = _train(work, domain_weights(before, work.settings.domain_weighting))
    after = judged(work)
    name, mean = ("loss", mean_nats) if work.settings.kl_share == 0 else ("KL", mean_kl)
    held = mean(after) < mean(before)
    if not held:
        for key, parameter in work.pruned.named_parameters():
            parameter.data = old[key]
        what = f"recover: held-out {name} did not fall ({mean(before):.4f} -> {mean(after):.4f} nats per token)"
        work.log({"event": "note", "text": f"{what}, so the weights are those from before the training."})
    work.log({"event": "recover_judged", "held": held, "kl": {domain: v.kl for domain, v in after.items()}})
    return before, TrainingRecord(**cost, after=after, held=held)


def judged(work: Work) -> Verdicts:
    """Return the pruned model's verdicts as its weights are now."""
    device = next(work.pruned.parameters()).device
    return work.judge.verdicts(lambda ids_BT: work.pruned(input_ids=ids_BT.to(device), use_cache=False).logits)


def _train(work: Work, weights: dict[str, float]) -> dict[str, Any]:
    """Train, or take what an interrupted run had trained to the end; return tokens, seconds and operations."""
    store = Store(work.directory / TRAINED_FOLDER, label="recover", tell=work.tell)
    (work.directory / TRAINED_FOLDER).mkdir(exist_ok=True)
    with alone():  # every process has the whole model, and reads and writes it by itself
        found = store.find("trained")
    if found is not None:
        for name, parameter in work.pruned.named_parameters():
            parameter.data = found[0][name].to(parameter.device)
        return found[1]
    start = time.perf_counter()
    num_tokens = recover_logits(work, weights)
    seconds = round(time.perf_counter() - start, 2)
    share = num_tokens / work.text.num_tokens  # less than one after an early stop
    cost = {"num_tokens": num_tokens, "seconds": seconds, "flops": _training_flops(work) * share}
    with alone():
        store.save("trained", dict(work.pruned.named_parameters()), cost)
    return cost


def _training_flops(work: Work) -> float:
    shapes, text = (work.candidates.pruned_shape, work.candidates.teacher_shape), work.text
    flops = predict_flops(*shapes, work.settings, text.num_tokens, text.num_held_out_tokens, text.sequence_length)
    return sum(flops["training"])


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
    ids_BT = torch.stack([ids_T for _, ids_T in text.blocks[: settings.blocks_per_device]])
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


VERIFY_TOKENS = 64


def recover(
    pruned: str | Path,
    teacher: str | Path,
    recipe: dict[str, Any] | Path | str | None = None,
    *,
    out: str | Path,
    tokens: int | None = None,
    overwrite: bool = False,
    command: str = "",
    name: str | None = None,
    tasks_data: Path | None = None,
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda text: None,
) -> RecoveryRecord | None:
    """Train `pruned` to win back what pruning took from `teacher`, the dense model, and write it to `out`.

    `recipe`: keys, or a YAML file, over the recipe.yaml of `pruned`, whose domains, shares and seed are used; its key
    `recover` says how, on how many tokens, and which tasks are asked before and after. `tokens`: to train on, all
    domains together. `overwrite`: replace `out` if it is an earlier result. `command`: how to repeat the run, for the
    model card. `name`: what to call `pruned`. `tasks_data`: a directory where rows of tasks are looked for first.
    `progress`: called with (stage, done, total). `tell`: gets a line of text at every evaluation on the way, and what
    an interrupted run leaves behind.

    Returns the `RecoveryRecord` that recovery.json holds. The result is never worse: where the held-out KL to the dense
    model did not fall, the input weights are written, and a note says so. Under torchrun or `accelerate launch` every
    process calls this, the first one writes, and the others return None.

    Raises a SecateurError, one sentence, for everything that a user can correct: RecipeError for the recipe and what
    needs more than is there, CheckpointError for models that do not fit each other.
    """
    wants_shards()  # refuses what cannot be had before anything is read
    candidates, whole, settings = open_job(pruned, teacher, changes_of(recipe, tokens))
    loaded = tasks_of(settings.evaluation, tasks_data)
    path, is_main = Path(out), int(os.environ.get("RANK", "0")) == 0
    had_processes = _has_processes()
    if not is_main:
        progress, tell = silent, lambda text: None
    source, record = candidates.pruned.directory, None
    check_replaceable(path, overwrite=overwrite, protected=candidates.teacher.directory)
    target = staging(path, overwrite=overwrite, protected=source) if is_main else nullcontext()
    with target as directory:
        work, log = prepare(candidates, whole, settings, path, progress, tell, keep_log=is_main)
        with _left_behind(work, tell):
            with log.time("recover"):
                before, training = train_guarded(work)
            _let_others_go(had_processes)
            if directory is not None:
                with log.time("save"):
                    save_recovered(work.pruned, candidates.tokenizer, _saved(source, whole), source, directory)
                with log.time("verify"):
                    proof = _verify(work, directory)
                with log.time("tasks"):
                    scores = _score(work, loaded, {"dense": teacher, "pruned": pruned, "recovered": directory})
                names = name or str(pruned), str(teacher), command
                record = _record(names, whole, work, log, before, training, proof, scores)
                _write(record, work, directory)
    if is_main:
        shutil.rmtree(work.directory)
    return record


@contextmanager
def _left_behind(work: Work, tell: Callable[[str], None]) -> Iterator[None]:
    """Say where an interrupted run has left what it had finished."""
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            place = work.directory
            tell(f"{place}: keeps what is finished; the same command goes on from there, or delete it to start anew.")


def _let_others_go(had_processes: bool) -> None:
    """Wait until every process has done its part of the training; what follows the first one does alone."""
    if _has_processes():
        torch.distributed.barrier()  # nobody reads what is removed in the end
        if not had_processes:  # the Trainer made the group for this run
            torch.distributed.destroy_process_group()


def _saved(source: Path, recipe: Recipe) -> Recipe:
    """Return the recipe that lies beside the result: the pruned model's own, which still describes it, and `recover`.

    Where the recovery used other text, recovery.json says which.
    """
    path = source / RECIPE_FILE
    own = parse_recipe(load_recipe(path), f"recipe {path}") if path.is_file() else recipe
    return own.model_copy(update={"recover": recipe.recover})


def _verify(work: Work, directory: Path) -> Verification:
    ids_1T = next(iter(work.text.held_out_NT.values()))[:1, :VERIFY_TOKENS].to(work.pruned.device)
    work.progress("verify", 0, 1)
    with torch.inference_mode():
        logits = work.pruned(ids_1T, use_cache=False).logits
    proof = verify_reload(directory, ids_1T, logits)
    work.progress("verify", 1, 1)
    return proof


def _score(work: Work, loaded: LoadedTasks | None, places: dict[str, str | Path]) -> TaskScores | None:
    if loaded is None:
        return None
    asked = work.settings.evaluation
    return score_tasks(loaded, asked, places, work.candidates.tokenizer, work.directory, work.progress, work.tell)


def _record(
    names: tuple[str, str, str],
    recipe: Recipe,
    work: Work,
    log: RunLog,
    before: Verdicts,
    training: TrainingRecord,
    proof: Verification,
    tasks: TaskScores | None,
) -> RecoveryRecord:
    return RecoveryRecord(
        *names,
        calibration=recipe.calibration.model_dump(mode="json", exclude_none=True),
        settings=work.settings.model_dump(mode="json"),
        seed=work.seed,
        content_hash=work.text.content_hash,
        sequence_length=work.text.sequence_length,
        num_held_out_tokens=work.text.num_held_out_tokens,
        dense=work.judge.dense(),
        before=before,
        training=training,
        seconds={name: round(seconds, 2) for name, seconds in log.seconds.items()},
        judge_flops=cost_of(work.candidates, work.settings, work.text).flops["judge"],
        peak_bytes=peak_bytes(),
        reload_max_abs_difference=proof.max_abs_difference,
        notes=tuple(line["text"] for line in log.lines if line["event"] == "note"),
        versions=versions(),
        tasks=tasks,
    )


def _write(record: RecoveryRecord, work: Work, directory: Path) -> None:
    lines = map(json.loads, (work.directory / LOG_FILE).read_text(encoding="utf-8").splitlines())
    write_record(record, last_lines(lines), work.candidates.pruned.directory, directory)
    curves = work.directory / TRAINER_FOLDER / "runs"  # what tensorboard reads, where report_to asks for it
    if curves.is_dir():
        shutil.copytree(curves, directory / "runs")
    if not missing_plots() and (directory / RESULT_FILE).is_file():
        write_report(directory)


def _has_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
