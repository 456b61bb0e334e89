"""`secateur.recover`: a pruned checkpoint and its dense model in, the same checkpoint with quality won back out.

In: two model references, what to change of the pruned model's recipe. Out: a record, and a directory that stands on its
own. Everything checkable without a forward pass is checked before one; an interrupted run goes on, see `recover_job`.
"""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from secateur.evaluate_tasks import LoadedTasks
from secateur.memory import peak_bytes
from secateur.progress import Progress, silent
from secateur.recipe import Recipe, load_recipe, parse_recipe
from secateur.recover_guard import train_guarded
from secateur.recover_job import RECIPE_FILE, changes_of, cost_of, open_job, prepare
from secateur.recover_logits import TRAINER_FOLDER, Work
from secateur.recover_output import last_lines, save_recovered, write_record
from secateur.recover_record import RecoveryRecord, TaskScores, TrainingRecord, Verdicts
from secateur.recover_sharded import wants_shards
from secateur.recover_tasks import score_tasks, tasks_of
from secateur.report import missing_plots, write_report
from secateur.runlog import LOG_FILE, RunLog
from secateur.staged_directory import check_replaceable, staging
from secateur.summary import RESULT_FILE, versions
from secateur.verify import Verification, verify_reload

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
