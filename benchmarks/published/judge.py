"""How models are judged: nats per token by block, and zero-shot tasks question by question.

Questions, prompts and metrics are those of lm-evaluation-harness, read offline as the product reads
them. The answers of a question are scored in one pass behind the prompt that they share: the
harness runs the prompt again for each, which takes twice as long and gives the same numbers.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.evaluation.tasks import LoadedTasks, quiet_harness

# Of each task, the metrics that are kept; LAMBADA's `perplexity` is the log-likelihood of the word.
METRICS = ("acc", "acc_norm", "perplexity")


@torch.inference_mode()
def block_nats(model: PreTrainedModel, blocks_NT: Tensor) -> list[float]:
    """Return each block's mean of -log p(token t+1 | tokens 0..t)."""
    found = []
    for ids_T in blocks_NT:
        logits_PV = model(ids_T[None], use_cache=False).logits[0, :-1].float()
        found.append(float(nn.functional.cross_entropy(logits_PV, ids_T[1:])))
    return found


def encode_pair(tokenizer: PreTrainedTokenizerBase, context: str, answer: str) -> tuple[list[int], list[int]]:
    """Return the ids of both as the harness splits them: spaces between belong to the answer."""
    bare = context.rstrip()
    answer, context = context[len(bare) :] + answer, bare
    whole, prompt = tokenizer.encode(context + answer), tokenizer.encode(context)
    return prompt, whole[len(prompt) :]


@torch.inference_mode()
def answer_logliks(model: PreTrainedModel, prompt: list[int], answers: list[list[int]]) -> list[tuple[float, bool]]:
    """Return log p(answer | prompt) and whether each token was the likeliest, for every answer.

    All answers follow the prompt in one sequence: each sees the prompt and itself, and its
    positions go on from the prompt's end.
    """
    ids = torch.tensor(prompt + [token for answer in answers for token in answer])
    owner = torch.tensor([-1] * len(prompt) + [place for place, answer in enumerate(answers) for _ in answer])
    positions = torch.tensor(
        [*range(len(prompt))] + [len(prompt) + step for answer in answers for step in range(len(answer))]
    )
    sees = (owner[None] == -1) | (owner[None] == owner[:, None])
    mask = (sees & torch.ones(len(ids), len(ids), dtype=torch.bool).tril())[None, None]
    hidden = model.model(ids[None], attention_mask=mask, position_ids=positions[None], use_cache=False)
    found, start = [], len(prompt)
    for answer in answers:
        predict = [len(prompt) - 1, *range(start, start + len(answer) - 1)]
        log_p = model.lm_head(hidden.last_hidden_state[0, predict]).float().log_softmax(-1)
        targets = torch.tensor(answer)
        greedy = bool((log_p.argmax(-1) == targets).all())
        found.append((float(log_p.gather(1, targets[:, None]).sum()), greedy))
        start += len(answer)
    return found


def task_scores(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, loaded: LoadedTasks, limit: int
) -> dict[str, dict[str, list[float]]]:
    """Return every question's metrics, by task; the first `limit` questions are asked."""
    scores: dict[str, dict[str, list[float]]] = {}
    for name, task in loaded.tasks.items():
        with quiet_harness():
            task.build_all_requests(limit=limit, rank=0, world_size=1)
        questions = defaultdict(list)
        for instance in task.instances:
            questions[instance.doc_id].append(instance)
        mine = scores[name] = defaultdict(list)
        for instances in questions.values():
            results: list[Any] = _results(model, tokenizer, [instance.args for instance in instances])
            for metric, value in task.process_results(instances[0].doc, results).items():
                if metric in METRICS:
                    mine[metric].append(float(value))
    return {name: dict(mine) for name, mine in scores.items()}


def _results(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: list[tuple[str, str]]
) -> list[tuple[float, bool]]:
    encoded = [encode_pair(tokenizer, context, answer) for context, answer in pairs]
    together = all(prompt == encoded[0][0] for prompt, _ in encoded)
    groups = [encoded] if together else [[pair] for pair in encoded]
    return [each for group in groups for each in answer_logliks(model, group[0][0], [answer for _, answer in group])]
