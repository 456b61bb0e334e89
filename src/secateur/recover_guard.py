"""The training of a recovery, judged on held-out text and undone where it did not help.

In: the two models in memory, text, a judge, a directory that outlives an interruption. Out: the pruned model with its
weights won back, and a record. Nothing of the result is written here.
"""

import time
from typing import Any

from secateur.ranks import alone
from secateur.recover_cost import predict_flops
from secateur.recover_judge import domain_weights
from secateur.recover_logits import Work, recover_logits
from secateur.recover_record import TrainingRecord, Verdicts, mean_kl, mean_nats
from secateur.store import Store

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
    name, mean = ("loss", mean_nats) if work.settings.logits.kl_share == 0 else ("KL", mean_kl)
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
        store.keep("trained", dict(work.pruned.named_parameters()), cost)
    return cost


def _training_flops(work: Work) -> float:
    shapes, text = (work.candidates.pruned_shape, work.candidates.teacher_shape), work.text
    flops = predict_flops(*shapes, work.settings, text.num_tokens, text.num_held_out_tokens, text.sequence_length)
    return sum(flops["training"])
