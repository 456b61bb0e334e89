"""Both stages of a recovery, each judged on held-out text and undone where it did not help.

In: the two models in memory, text, a judge, a directory that outlives an interruption. Out: the pruned model with its
weights won back, and a record per stage. Nothing of the result is written here.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.progress import Progress, silent
from secateur.ranks import alone
from secateur.recover_blocks import Pair, recover_blocks
from secateur.recover_cost import predict_flops
from secateur.recover_judge import Judge, Verdicts, domain_weights, mean_kl, mean_nats
from secateur.recover_logits import LogitJob, recover_logits
from secateur.recover_pair import Candidates
from secateur.recover_recipe import RecoverySettings, StageName
from secateur.recover_record import StageRecord
from secateur.recover_store import LayerStore
from secateur.recover_teacher import TeacherCache
from secateur.recover_text import RecoveryText, blocks_per_step, training_tokens
from secateur.store import Store
from secateur.walk import Batch

LAYERS_FOLDER, CACHE_FOLDER, TRAINER_FOLDER, STAGES_FOLDER = "layers", "teacher", "trainer", "stages"


@dataclass
class Work:
    """A recovery with everything at hand. `teacher` becomes None once nothing asks it any more."""

    candidates: Candidates
    pruned: PreTrainedModel
    teacher: PreTrainedModel | None
    text: RecoveryText
    judge: Judge
    settings: RecoverySettings
    seed: int
    directory: Path
    log: Callable[[dict[str, Any]], None] = lambda line: None
    progress: Progress = silent
    tell: Callable[[str], None] = lambda text: None


def run_stages(work: Work) -> tuple[Verdicts, list[StageRecord]]:
    """Run the stages and return the verdicts before them and a record of each.

    A stage after which the mean held-out KL is not lower is undone: the model has then the weights it had before it.
    Plain fine-tuning, which has no teacher, goes by the held-out loss instead.
    """
    before = judged(work)
    weights = domain_weights(before, work.settings.domain_weighting)
    records, current = [], before
    for stage in work.settings.stages:
        old = {name: parameter.data for name, parameter in work.pruned.named_parameters()}  # stages replace, not change
        cost = _train(work, stage, weights)
        after = judged(work)
        plain = stage == "logits" and work.settings.logits.kl_share == 0
        name, mean = ("loss", mean_nats) if plain else ("KL", mean_kl)
        held = mean(after) < mean(current)
        if held:
            current = after
        else:
            _put_back(work.pruned, old)
            what = f"recover, {stage}: held-out {name} did not fall ({mean(current):.4f} -> {mean(after):.4f} nats"
            work.log({"event": "note", "text": f"{what} per token), so the weights are those from before this stage."})
        records.append(StageRecord(stage, **cost, after=after, held=held))
        work.log({"event": "recover_stage", "stage": stage, "held": held, "kl": {d: v.kl for d, v in after.items()}})
    return before, records


def _train(work: Work, stage: StageName, weights: dict[str, float]) -> dict[str, Any]:
    """Run one stage, or take what it had finished before, and return its tokens, seconds and operations."""
    store = Store(work.directory / STAGES_FOLDER, label="recover", tell=work.tell)
    (work.directory / STAGES_FOLDER).mkdir(exist_ok=True)
    with alone():  # every process has the whole model, and reads and writes it by itself
        found = store.find(stage)
    if found is not None:
        _put_back(work.pruned, {name: data.to(work.pruned.device) for name, data in found[0].items()})
        return found[1]
    start = time.perf_counter()
    num_tokens = _STAGES[stage](work, weights)
    seconds = round(time.perf_counter() - start, 2)
    share = num_tokens / training_tokens(work.text, work.settings)[stage]  # less than one after an early stop
    cost = {"num_tokens": num_tokens, "seconds": seconds, "flops": sum(_flops(work)[stage]) * share}
    with alone():
        store.keep(stage, dict(work.pruned.named_parameters()), cost)
    return cost


def judged(work: Work) -> Verdicts:
    """Return the pruned model's verdicts as its weights are now."""
    device = next(work.pruned.parameters()).device
    return work.judge.verdicts(lambda ids_BT: work.pruned(input_ids=ids_BT.to(device), use_cache=False).logits)


def _blocks(work: Work, weights: dict[str, float]) -> int:
    assert work.teacher is not None
    settings, found = work.settings.blocks, work.candidates
    size = blocks_per_step(settings.batch_tokens, work.text.sequence_length)
    batches = [Batch(domain, True, ids_T[None]) for domain, blocks in work.text.held_out_NT.items() for ids_T in blocks]
    pair = Pair(work.pruned, found.pruned_arch, work.teacher, found.teacher_arch, found.layers)
    batches += mixed_batches(work.text, size)
    store = LayerStore(work.directory / LAYERS_FOLDER)
    recover_blocks(pair, batches, weights, settings, store, work.log, work.progress)
    return settings.epochs * sum(batch.ids_BT.numel() for batch in batches if not batch.held_out)


def mixed_batches(text: RecoveryText, size: int) -> list[Batch]:
    """Return the block-wise stage's text in batches of at most `size` blocks, each batch of one domain.

    In the order in which the domains' blocks come, a batch standing where its last block does.
    """
    waiting: dict[str, list[Tensor]] = {}
    batches = []
    for domain, ids_T in text.blocks:
        waiting.setdefault(domain, []).append(ids_T)
        if len(waiting[domain]) == size:
            batches.append(Batch(domain, False, torch.stack(waiting.pop(domain))))
    return batches + [Batch(domain, False, torch.stack(rest)) for domain, rest in waiting.items()]


def _logits(work: Work, weights: dict[str, float]) -> int:
    settings, cache = work.settings.logits, None
    if settings.cache and settings.kl_share > 0:
        assert settings.top_words is not None
        cache = TeacherCache(work.directory / CACHE_FOLDER, len(work.text.logits))
        if not cache.is_complete:
            assert work.teacher is not None
            blocks = [ids_T for _, ids_T in work.text.logits]
            cache.fill(work.teacher, blocks, settings.temperature, settings.top_words, work.progress)
    if cache is not None or settings.kl_share == 0:
        work.teacher = None
    return recover_logits(
        LogitJob(
            work.pruned,
            work.teacher,
            cache,
            work.text.logits,
            weights,
            work.judge,
            settings,
            work.directory / TRAINER_FOLDER,
            work.seed,
            work.log,
            work.progress,
            work.tell,
        )
    )


_STAGES: dict[str, Callable[[Work, dict[str, float]], int]] = {"blocks": _blocks, "logits": _logits}


def _flops(work: Work) -> dict[str, tuple[float, float]]:
    shapes = work.candidates.pruned_shape, work.candidates.teacher_shape
    tokens = training_tokens(work.text, work.settings)
    return predict_flops(*shapes, work.settings, tokens, work.text.num_held_out_tokens, work.text.sequence_length)


def _put_back(model: nn.Module, old: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data = old[name]
