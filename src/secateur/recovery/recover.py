"""`secateur.recover`: a pruned checkpoint and its dense model in, a better checkpoint out."""

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from secateur.files import check_replaceable, staging
from secateur.log import Progress, silent
from secateur.ranks import alone
from secateur.recovery.cost import cost_of
from secateur.recovery.judge import domain_weights
from secateur.recovery.open import changes_of, open_job, prepare
from secateur.recovery.result import tasks_of, write_result
from secateur.recovery.train import Work, recover_logits, wants_shards
from secateur.report.measured import RecoveryRecord, TrainingRecord, Verdicts, mean_kl, mean_nats
from secateur.store import Store

TRAINED_FOLDER = "trained"


def train_guarded(work: Work) -> tuple[Verdicts, TrainingRecord]:
    """Train the pruned model; return the verdicts before the training and the record of it.

    The weights are put back if the mean held-out KL did not fall; plain fine-tuning, which has no
    teacher, goes by the held-out loss.
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
        work.log.write({"event": "note", "text": f"{what}, so the weights are those from before the training."})
    work.log.write({"event": "recover_judged", "held": held, "kl": {domain: v.kl for domain, v in after.items()}})
    return before, TrainingRecord(**cost, after=after, held=held)


def judged(work: Work) -> Verdicts:
    """Return the pruned model's verdicts as its weights are now."""
    device = next(work.pruned.parameters()).device
    return work.judge.verdicts(lambda ids_BT: work.pruned(input_ids=ids_BT.to(device), use_cache=False).logits)


def _train(work: Work, weights: dict[str, float]) -> dict[str, Any]:
    """Train, or load what an interrupted run had trained; return tokens, seconds and FLOPs."""
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
    flops = cost_of(work.candidates, work.settings, work.text).flops["training"]
    cost = {"num_tokens": num_tokens, "seconds": seconds, "flops": flops * share}
    with alone():
        store.save("trained", dict(work.pruned.named_parameters()), cost)
    return cost


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
    """Train `pruned` to win back what pruning took from the dense `teacher`; write it to `out`.

    `recipe`: changes to the recipe.yaml of `pruned`, as keys or a YAML file. Its key `recover` says
    how to train, on how many tokens, and which tasks are asked before and after.
    `tokens`: to train on, all domains together. `overwrite`: replace `out` if it is a result.
    `command`: how to repeat the run, for the model card. `name`: what to call `pruned`.
    `tasks_data`: a directory where rows of tasks are looked for first. `progress`: called with
    (stage, done, total). `tell`: gets lines of text, at every evaluation and of interrupted runs.

    Returns the `RecoveryRecord` that recovery.json holds. The result is never worse: if the
    held-out KL to the dense model did not fall, the old weights are written, and a note says so.
    Under torchrun or `accelerate launch` every process calls this; the first one writes, the others
    return None.

    Raises a SecateurError, one sentence, for everything that a user can correct: RecipeError for
    the recipe and for missing packages, CheckpointError for models that do not fit each other.
    """
    wants_shards()  # checks the launcher before anything is read
    candidates, whole, settings = open_job(pruned, teacher, changes_of(recipe, tokens))
    tasks = tasks_of(settings.evaluation, tasks_data)
    path, is_main = Path(out), int(os.environ.get("RANK", "0")) == 0
    had_processes = _has_processes()
    if not is_main:
        progress, tell = silent, lambda text: None
    record = None
    check_replaceable(path, overwrite=overwrite, protected=candidates.teacher.directory)
    target = staging(path, overwrite=overwrite, protected=candidates.pruned.directory) if is_main else nullcontext()
    with target as directory:
        work = prepare(candidates, whole, settings, path, progress, tell, write_log=is_main)
        with _told_if_interrupted(work):
            with work.log.time("recover"):
                before, training = train_guarded(work)
            _let_others_go(had_processes)
            if directory is not None:
                record = write_result(work, before, training, tasks, directory, name, command)
    if is_main:
        shutil.rmtree(work.directory)
    return record


@contextmanager
def _told_if_interrupted(work: Work) -> Iterator[None]:
    """Say where an interrupted run leaves what it had finished."""
    done = False
    try:
        yield
        done = True
    finally:
        if not done:
            place = work.directory
            work.tell(
                f"{place}: keeps what is finished; the same command goes on from there, or delete it to start anew."
            )


def _let_others_go(had_processes: bool) -> None:
    """Wait until every process has trained; the first one does the rest alone."""
    if _has_processes():
        torch.distributed.barrier()  # nobody reads what is removed in the end
        if not had_processes:  # the Trainer made the group for this run
            torch.distributed.destroy_process_group()


def _has_processes() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
