"""`secateur.bench`: time a model, or time a pruned and its dense model in turns.

In: model references and a workload. Out: a `BenchResult`, saved as `bench.json`. Everything that
the configs can tell is checked before any weights are read.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import repeat
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from secateur.errors import RecipeError
from secateur.facts import Costs, Size, Workload
from secateur.log import Progress, silent, steps, versions
from secateur.model.bind import kv_cache_bytes_per_token
from secateur.model.checkpoint import (
    Checkpoint,
    check_weights,
    load_model,
    meta_model,
    open_checkpoint,
)
from secateur.model.identity import check_dense, is_result, name_of
from secateur.model.stock import head_width, replaced
from secateur.ranks import device_called
from secateur.report.records import BenchResult, ModelFigures, Speed, SpeedUp, Spread
from secateur.report.report import add_figures
from secateur.result_directory import BENCH_FILE
from secateur.stream.device import now
from secateur.vocabulary.kept import kept_tokens_of

# The names that configs have for layers without attention.
OTHER_LAYERS = {"linear_attention", "mamba", "mamba2", "recurrent", "conv", "mlp", "moe"}
# Tokens that a model reads, and writes, to foretell its speed.
PROMPT, WRITTEN = 256, 16
# Returns the seconds from the start to each new token; the first follows the whole prompt.
Runner = Callable[[], list[float]]


def bench(
    model: str | Path,
    against: str | Path | None = None,
    *,
    batch: int = 1,
    prompt_tokens: int = 256,
    new_tokens: int = 32,
    repeats: int = 5,
    device: str | None = None,
    other_dense: bool = False,
    progress: Progress = silent,
) -> BenchResult:
    """Time a model, in turns with the dense one, and compare the speed-up with the ideal.

    `model`: a result of `prune`, into which bench.json is written, or any other model, into which
    nothing is. `against`: the dense model; `other_dense`: it is meant to be another one than the
    result was pruned from. `batch`: prompts at a time, of `prompt_tokens` each,
    followed by `new_tokens` each. `repeats`: runs of each model. `device`: as in a recipe.
    `progress`: called with (stage, done, total).

    Returns the figures of each model, and the speed-up beside the ideal.

    Raises a SecateurError for what a user can correct: RecipeError for options, CheckpointError for
    models.
    """
    workload = Workload(batch, prompt_tokens, new_tokens, repeats)
    place = device_called(device)
    _check_options(place, workload)
    checkpoints = [
        open_checkpoint(reference) for reference in (model, against) if reference is not None
    ]
    notes = ()
    if against is not None:
        notes = check_dense(checkpoints[0], checkpoints[1], "--against", other=other_dense)
    for checkpoint in checkpoints:
        _check_model(checkpoint, workload)

    # Time them, and count the least that they have to do.
    models = list[PreTrainedModel]()
    for checkpoint in steps(progress, "load", checkpoints):
        models.append(load_model(checkpoint))
        nn.Module.to(models[-1], place)
    runs = take_turns([runner_of(model, workload) for model in models], workload.repeats, progress)
    figures = [
        ModelFigures(
            model=name_of(checkpoint),
            dtype=str(model.dtype).removeprefix("torch."),
            size=Size.of(model),
            costs=least_costs(model, workload),
            speed=speed(of_model, workload),
        )
        for checkpoint, model, of_model in zip(checkpoints, models, runs, strict=True)
    ]

    result = BenchResult(
        device=str(place),
        num_threads=torch.get_num_threads(),
        workload=workload,
        models={"model": figures[0]}
        if against is None
        else {"dense": figures[1], "pruned": figures[0]},
        speed_ups={} if against is None else _speed_ups(figures, runs, workload),
        versions=versions(),
        notes=(*notes, *_notes(checkpoints, workload)),
    )
    if is_result(Path(model)):
        add_figures(Path(model), BENCH_FILE, result.to_json())
    return result


def _speed_ups(
    figures: list[ModelFigures], runs: list[list[list[float]]], workload: Workload
) -> dict[str, SpeedUp]:
    """Return by phase how much faster the first of two models is. `runs`: of each model, seconds to
    each token.
    """
    pruned, dense = (of_model.costs for of_model in figures)
    flops = dense.prefill_flops_per_token / pruned.prefill_flops_per_token
    num_bytes = dense.decode_bytes_per_token / pruned.decode_bytes_per_token
    prefill, decode = (
        paired_ratio(*(rates(run, workload) for run in runs))
        for rates in (prefill_rates, decode_rates)
    )
    return {"prefill": SpeedUp(prefill, flops), "decode": SpeedUp(decode, num_bytes)}


def _notes(checkpoints: list[Checkpoint], workload: Workload) -> Iterator[str]:
    """Yield what the figures of two models do not say."""
    if len(checkpoints) < 2:
        return
    if len({kept_tokens_of(checkpoint.directory) for checkpoint in checkpoints}) > 1:
        sizes = " and ".join(
            f"{checkpoint.config.get_text_config().vocab_size:,}"
            for checkpoint in reversed(checkpoints)
        )
        yield (
            f"the vocabularies differ ({sizes} tokens): tokens/s count each model's own tokens, of "
            "which the same text is more where the vocabulary was trimmed."
        )
    if workload.repeats == 1:
        yield "one repeat has no range, so the speed-ups may be chance; repeat the runs to know."


def _check_options(device: torch.device, workload: Workload) -> None:
    for field, least in (("batch", 1), ("prompt_tokens", 1), ("new_tokens", 2), ("repeats", 1)):
        value = getattr(workload, field)
        if value < least:
            raise RecipeError(f"bench {field}: must be at least {least}, got {value}.")
    if device.type not in ("cpu", "cuda"):
        raise RecipeError(f"bench device: must be cpu or cuda, got '{device}'.")


def _check_model(checkpoint: Checkpoint, workload: Workload) -> None:
    shape = meta_model(checkpoint.config)
    check_weights(checkpoint, shape)
    longest = getattr(checkpoint.config.get_text_config(), "max_position_embeddings", None)
    wanted = workload.prompt_tokens + workload.new_tokens
    if longest and wanted > longest:
        raise RecipeError(
            f"bench: {workload.prompt_tokens} prompt and {workload.new_tokens} new tokens make "
            f"{wanted}, more than the {longest} that {checkpoint.reference} can attend to; ask for "
            "fewer."
        )


def seconds_per_token(
    models: Sequence[PreTrainedModel], length: int, progress: Progress
) -> list[tuple[float, float]]:
    """Return of each model in memory the seconds per token of a prompt, and of what is written:
    medians, by turns.

    `length`: the most tokens that a model reads.
    """
    new_tokens = min(WRITTEN, length // 2)
    workload = Workload(prompt_tokens=min(PROMPT, length - new_tokens), new_tokens=new_tokens)
    runs = take_turns([runner_of(model, workload) for model in models], workload.repeats, progress)
    speeds = [speed(of_model, workload) for of_model in runs]
    return [(1 / timed.prefill.median, 1 / timed.decode.median) for timed in speeds]


def take_turns(runners: list[Runner], repeats: int, progress: Progress) -> list[list[list[float]]]:
    """Warm up, then run all in turn `repeats` times; return [runner][repeat] -> token times."""
    progress("bench", 0, repeats)
    turns = [[runner() for runner in runners]]
    for done in range(1, repeats + 1):
        turns.append([runner() for runner in runners])
        progress("bench", done, repeats)
    return [list(runs) for runs in zip(*turns[1:], strict=True)]


def speed(runs: list[list[float]], workload: Workload) -> Speed:
    """Return medians and ranges of `runs` (seconds to each token, per repeat)."""
    return Speed(Spread.of(prefill_rates(runs, workload)), Spread.of(decode_rates(runs, workload)))


def prefill_rates(runs: list[list[float]], workload: Workload) -> list[float]:
    """Return prompt tokens/s per run: batch * prompt_tokens / time to the first token."""
    return [workload.batch * workload.prompt_tokens / run[0] for run in runs]


def decode_rates(runs: list[list[float]], workload: Workload) -> list[float]:
    """Return new tokens/s per run: batch * (new_tokens - 1) / time from first token to last."""
    return [workload.batch * (len(run) - 1) / (run[-1] - run[0]) for run in runs]


def paired_ratio(rates: list[float], against: list[float]) -> Spread:
    """Return how much faster `rates` are than `against`, repeat by repeat."""
    return Spread.of([rate / other for rate, other in zip(rates, against, strict=True)])


def runner_of(model: PreTrainedModel, workload: Workload) -> Runner:
    """Return a runner of `generate`. Prompts are numbers, the same for all models; timing needs no
    real text.
    """
    place_T = torch.arange(workload.prompt_tokens, device=model.device)
    row_T = place_T * 7919 % model.config.get_text_config().vocab_size
    ids_BT = row_T.expand(workload.batch, -1).contiguous()
    return partial(_generate, model, ids_BT, workload.new_tokens)


class _Clock(StoppingCriteria):
    """Never stops; records when each token is known, since `generate` calls it once per token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.times.append(now(input_ids.device))
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _generate(model: PreTrainedModel, ids_BT: Int64[Tensor, "B T"], new_tokens: int) -> list[float]:
    generate: Any = model.generate
    clock, start = _Clock(), now(model.device)
    # The model's own settings (sampling, a repetition penalty, its end of text) take no part.
    with replaced(vars(model), "generation_config", GenerationConfig()):
        generate(
            ids_BT,
            attention_mask=torch.ones_like(ids_BT),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            stopping_criteria=StoppingCriteriaList([clock]),
        )
    assert len(clock.times) == new_tokens
    return [seconds - start for seconds in clock.times]


def least_costs(model: Any, workload: Workload) -> Costs:
    """Return bytes per decoded token, FLOPs per prompt token and cache bytes per token."""
    flops = prefill_flops_per_token(model, workload.prompt_tokens)
    return Costs(decode_bytes_per_token(model, workload), flops, kv_cache_bytes_per_token(model))


def decode_bytes_per_token(model: Any, workload: Workload) -> float:
    """Return bytes per decoded token: (weights + B * embedding row) / B + cache of the context.

    Every weight is read once per batch, tied ones too; of an embedding that is not the head only B
    rows are, and of experts those that B tokens choose. The context is its mean over the measured
    steps: step i attends to T + i tokens, so T + N / 2.
    """
    embedding, head = model.get_input_embeddings().weight, _head(model).weight
    assert isinstance(embedding, nn.Parameter)
    weights = sum(
        weight.nbytes
        for weight in model.parameters()
        if weight is not embedding or head is embedding
    )
    weights -= sum(
        (1 - share) * stack.nbytes for stack, share in _stacks_read(model, workload.batch)
    )
    row = embedding.nbytes / len(embedding)
    mean_context = workload.prompt_tokens + workload.new_tokens / 2
    return weights / workload.batch + row + mean_context * kv_cache_bytes_per_token(model)


def prefill_flops_per_token(model: Any, prompt_tokens: int) -> float:
    """Return the operations per prompt token: 2 * weights of linears and of its experts + attention
    + head / T.

    Attention multiplies each query with the keys up to its own, and the weights with their values:
    4 * head_dim operations per pair. A token attends to (T + 1) / 2 tokens on average. As in
    generation, the head runs at the last position only.
    """
    head = _head(model)
    linears = [
        module for module in model.modules() if isinstance(module, nn.Linear) and module is not head
    ]
    num_query_channels = sum(
        layer.num_attention_heads * head_width(layer) for layer in _attending(model)
    )
    attention = 4 * num_query_channels * (prompt_tokens + 1) / 2
    weights = sum(linear.weight.numel() for linear in linears)
    weights += sum(share * stack.numel() for stack, share in _stacks_read(model, 1))
    return 2 * weights + attention + 2 * head.weight.numel() / prompt_tokens


def _attending(model: Any) -> list[Any]:
    """Return the configs of the layers that have heads: recurrent ones and convolutions do not
    attend.
    """
    config = model.config.get_text_config()
    kinds = (
        getattr(config, "layer_types", None)
        or getattr(config, "layers_block_type", None)
        or repeat("")
    )
    layers = zip(config.per_layer_config, kinds, strict=False)
    return [
        layer
        for layer, kind in layers
        if kind not in OTHER_LAYERS and hasattr(layer, "num_attention_heads")
    ]


def _stacks_read(model: Any, num_tokens: int) -> Iterator[tuple[Tensor, float]]:
    """Yield experts' matrices, and the most of them that so many tokens choose: all where no config
    says how many.
    """
    chosen = getattr(model.config.get_text_config(), "num_experts_per_tok", None)
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            if weight.ndim == 3 and not isinstance(module, nn.Conv1d):
                yield weight, min(1.0, num_tokens * chosen / len(weight)) if chosen else 1.0


def _head(model: Any) -> nn.Linear:
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    return head
