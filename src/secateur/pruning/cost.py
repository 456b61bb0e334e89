"""What a run will cost in memory, on disk and in time, from shapes alone."""

import importlib.util
from dataclasses import dataclass, replace

import psutil
import torch

from secateur.errors import RecipeError
from secateur.facts import Size
from secateur.files import parse_size
from secateur.log import human_bytes
from secateur.methods.scores import needs_gram
from secateur.methods.select import units_at_once
from secateur.model.bind import decoder_layers, text_config
from secateur.model.group import OF_EXPERTS
from secateur.pruning.open import Opened, computes_in_float32
from secateur.pruning.resolve import NARROW_TOKENS_PER_INPUT, Resolved
from secateur.recovery.weights import autocasts, num_trained, polish_settings, training_bytes
from secateur.report.records import MemoryEstimate
from secateur.stream.device import free_bytes
from secateur.stream.statistics import BY_DOMAIN, NUM_BLOCKS, PRODUCT_ROWS

# Of the host's free memory, what all layers in float32 may take.
FREE_SHARE = 0.5
HELD_OUT_FACTOR = (
    10 / 9
)  # held-out blocks come on top of the calibration tokens, one for every nine


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A run's memory, whether weights stay on disk, and whether layers are onloaded one at a time.

    `budget_bytes`: the device's limit, if known. `in_float32`: compute in it, store the own dtype.
    `keeps_layers`: all of them in float32 beside those that are stored.
    """

    estimate: MemoryEstimate
    weights_on_disk: bool
    one_layer_at_a_time: bool = False
    budget_bytes: int | None = None
    in_float32: bool = False
    keeps_layers: bool = False


def memory_for(opened: Opened, resolved: Resolved) -> MemoryPlan:
    """Return how the run fits the memory. Raises RecipeError with the least that can work.

    On a processor weights are in memory if they fit the recipe's `memory_budget`, else on disk. A
    device has all of them, or two layers at a time, by the recipe's `device_budget` or else by its
    free memory, which may be unknown; the host's memory holds weights alone, as far as they fit
    `memory_budget`.
    """
    size, per_layer = opened.size, opened.arch.params_per_layer
    on_cpu, in_float32 = opened.device.type == "cpu", computes_in_float32(opened)
    stored = size.num_bytes // size.num_params
    outside, two_layers = size.num_params - sum(per_layer), 2 * max(per_layer)
    if (
        on_cpu and in_float32
    ):  # stored weights, and what computes: what is in no layer, and two layers or all
        keeps = 4 * size.num_params <= FREE_SHARE * psutil.virtual_memory().available
        computing = 4 * (outside + (sum(per_layer) if keeps else two_layers))
        estimate = estimate_memory(
            opened, resolved, size.num_bytes + computing - outside * stored, 4
        )
        return MemoryPlan(estimate, False, in_float32=True, keeps_layers=keeps)

    item = 4 if in_float32 else stored
    whole = estimate_memory(
        opened, resolved, 4 * size.num_params if in_float32 else size.num_bytes, item
    )
    host = _allowed(opened, "memory_budget")
    budget = host if on_cpu else _there(opened)
    needed = whole.peak if on_cpu else size.num_bytes
    on_disk = host is not None and needed > host
    files = opened.checkpoint  # safetensors as they are can be mapped, layer by layer
    if on_disk and (files is None or files.gguf_file is not None or files.quantised is not None):
        raise RecipeError(
            f"machine.memory_budget: {resolved.recipe.machine.memory_budget} is less than the "
            f"{human_bytes(needed)} that are needed with this model's weights in memory; only "
            "safetensors weights, not quantised and given by their path, can stay on disk."
        )
    if budget is None or whole.peak <= budget:
        return MemoryPlan(whole, on_disk, in_float32, budget, in_float32)

    if on_cpu:  # a cut layer is in memory until it is written
        least = estimate_memory(opened, resolved, 0, item)
        least = replace(least, solve=max(least.solve, max(per_layer) * item))
    else:  # the running layer, the prefetched one, and what is in no layer
        least = estimate_memory(
            opened, resolved, min(size.num_params, outside + two_layers) * item, item
        )
    if least.peak > budget:
        key, how = (
            ("memory_budget", "all weights on disk")
            if on_cpu
            else ("device_budget", "two layers at a time there")
        )
        remedy = "lower calibration.num_tokens"
        if least.is_of_layer_choice:
            remedy = "name layers that go in remove.layers or give depth: 0"
        raise RecipeError(
            f"machine.{key}: {human_bytes(budget)} cannot work; with {how} the run still needs "
            f"{human_bytes(least.peak)}; allow that, or {remedy}."
        )
    return MemoryPlan(least, on_disk, not on_cpu, budget, in_float32)


def _allowed(opened: Opened, key: str) -> int | None:
    """Return the bytes that a key of the recipe's `machine` allows; None: as many as there are."""
    text = getattr(opened.recipe.machine, key)
    return None if text is None else parse_size(f"machine.{key}", text)


def _there(opened: Opened) -> int | None:
    """Return the bytes that the run's device allows, by the recipe or by what is free; None:
    unknown.
    """
    budget = _allowed(opened, "memory_budget" if opened.device.type == "cpu" else "device_budget")
    return free_bytes(opened.device) if budget is None and opened.checkpoint is not None else budget


def estimate_memory(
    opened: Opened, resolved: Resolved, weight_bytes: int, bytes_per_param: int
) -> MemoryEstimate:
    """Return the bytes that the run needs beyond the interpreter.

    hidden_states: tokens x hidden size, twice with a dense stream. statistics: Gram matrices as
    lower triangles, pooled in float32, and the current domain's in float64 with the product being
    added (all domains' in float32 if they get weights), the drift's, and the held-out inputs.
    solve: the pooled ones and the larger of two: for `greedy_obs` the float64 square, a batch's
    rows four times and the reader in float32; for least squares `_fit_bytes` and the reader in
    float32.
    """
    recipe, hidden_size = resolved.recipe, text_config(opened.model).hidden_size
    num_tokens = round(resolved.num_tokens * HELD_OUT_FACTOR)
    widest = max((group.num_inputs for group in resolved.groups), default=0)
    reader, has_drift = widest * hidden_size, bool(resolved.target_mix)
    sums = 4 * _num_sums(opened, resolved, widest)
    held_out = (
        (num_tokens - resolved.num_tokens) * (widest + has_drift * hidden_size) * bytes_per_param
    )
    num_domains = (
        len(recipe.calibration.domains) if recipe.choose.domain_weighting in BY_DOMAIN else 0
    )
    at_once = units_at_once(widest, 1)
    obs = (
        8 * widest * widest + 4 * 8 * widest * at_once + 4 * reader
        if needs_gram(recipe.choose.score)
        else 0
    )
    fit = (
        _fit_bytes(resolved, hidden_size) + 4 * reader
        if recipe.repair.compensate == "least_squares"
        else 0
    )
    return MemoryEstimate(
        weights=weight_bytes,
        hidden_states=(1 + has_drift) * num_tokens * hidden_size * bytes_per_param,
        statistics=(1 + num_domains + 2) * sums + _product_bytes(widest) + held_out,
        solve=max(1, num_domains) * sums + held_out + max(obs, fit),
        layer_choice=_layer_choice_bytes(opened, resolved, bytes_per_param),
        polish=polish_bytes(opened, resolved),
    )


def _layer_choice_bytes(opened: Opened, resolved: Resolved, bytes_per_param: int) -> int:
    """Return the bytes for choosing layers beside the weights; 0 if none are chosen.

    The narrow readers of all layers, and the larger of: the fit of one reader (hidden states of its
    tokens, float64 Gram matrix, least squares); a batch's streams, one per layer, with logits.
    """
    recipe, arch, config = resolved.recipe, opened.arch, text_config(opened.model)
    if not resolved.depth or recipe.remove.layers:
        return 0
    hidden_size = config.hidden_size
    inputs = [group.num_inputs for group in arch.groups if group.name == "ffn"]
    readers, widest = sum(inputs) * hidden_size * bytes_per_param, max(inputs, default=0)
    fit = _fit_bytes(resolved, hidden_size) if recipe.repair.compensate == "least_squares" else 0
    fitted = min(NARROW_TOKENS_PER_INPUT * widest, resolved.num_tokens)
    gram = 8 * _triangle(widest * widest) + _product_bytes(widest)
    streams = (
        resolved.sequence_length
        * (arch.num_layers * hidden_size + config.vocab_size)
        * bytes_per_param
    )
    return readers + max(
        (fitted * bytes_per_param + 4 * widest) * hidden_size + gram + fit, streams
    )


def _num_sums(opened: Opened, resolved: Resolved, num_inputs: int) -> int:
    """Return the numbers in a reader's statistics: a Gram matrix, if one is summed, and the
    drift's.
    """
    recipe = resolved.recipe
    has_gram = needs_gram(recipe.choose.score) or recipe.repair.compensate == "least_squares"
    drift = num_inputs * text_config(opened.model).hidden_size if resolved.target_mix else 0
    return _triangle(num_inputs * num_inputs * has_gram) + drift


def _triangle(square: int) -> int:
    """Return the numbers in a symmetric matrix, stored as a triangle of blocks."""
    return round(square * (1 + 1 / NUM_BLOCKS) / 2)


def _product_bytes(num_inputs: int) -> int:
    """Return the bytes of the float32 product that is added to a Gram matrix."""
    return 4 * min(PRODUCT_ROWS, -(-num_inputs // NUM_BLOCKS)) * num_inputs


def _fit_bytes(resolved: Resolved, num_outputs: int) -> int:
    """Return the most bytes that one group's least squares holds in float64.

    With S inputs that stay, C that go and H outputs: S^2 of the system, C S and C H of its right
    side, S H of the result. If a budget chooses the widths, any S may come.
    """
    needs = []
    for group in resolved.groups:
        kept = (
            resolved.plans[0].num_keep[group.key] * group.width
            if resolved.is_uniform
            else group.num_inputs
        )
        removed = group.num_inputs - kept
        needs.append(8 * (kept * kept + removed * kept + (removed + kept) * num_outputs))
    return max(needs, default=0)


def polish_bytes(opened: Opened, resolved: Resolved) -> int:
    """Return the bytes of the polish: weights before it that train, what the dense model leaves,
    training.
    """
    settings, model = polish_settings(resolved.recipe), opened.model
    if settings is None:
        return 0
    hidden_size, num_params = text_config(model).hidden_size, resolved.plans[-1].cost_after
    removed = (
        opened.size.num_params
        - num_params
        - (0 if settings.train == "full" else resolved.prices.tokens)
    )
    trained, on_cpu = max(0, num_trained(model, settings) - removed), opened.device.type != "cuda"
    numbers = (
        trained if autocasts(model.dtype, on_cpu=on_cpu) else num_params
    )  # the rest has no copy
    numbers += (settings.num_tokens + text_config(model).vocab_size) * hidden_size
    training = training_bytes(
        model, num_params, trained, settings, resolved.sequence_length, on_cpu=on_cpu
    )
    return (4 if computes_in_float32(opened) else model.dtype.itemsize) * numbers + training


# What a polish does where memory is short, in this order.
LESS_MEMORY = {
    "one block at a time is trained on": {"blocks_per_device": 1},
    "low-rank additions are trained": {"blocks_per_device": 1, "train": "lora"},
}


def with_polish_that_fits(opened: Opened, resolved: Resolved) -> Resolved:
    """Return the run with a polish that takes less memory, or none, if the recipe's exceeds it.

    The memory is the device's, or the recipe's `memory_budget`. A warning says what was changed.
    """
    recipe, budget = resolved.recipe, _there(opened)
    needed = least = polish_bytes(opened, resolved)
    if budget is None or needed <= budget:
        return resolved
    too_much = f"polish: needs {needed / 1e9:.2f} GB, more than the {budget / 1e9:.2f} GB there are"
    for what, changes in LESS_MEMORY.items():
        less = replace(resolved, recipe=recipe.filled(polish=changes))
        least = polish_bytes(opened, less)
        if least <= budget and (
            "train" not in changes or importlib.util.find_spec("peft") is not None
        ):
            return replace(
                less,
                warnings=(*resolved.warnings, f"{too_much}, so {what}, for {least / 1e9:.2f} GB."),
            )
    why = (
        "peft is missing (pip install 'secateur[recover]')"
        if least <= budget
        else f"{least / 1e9:.2f} GB at least"
    )
    warning = (
        f"{too_much}, and {why}, so there is none; secateur recover can train the result on "
        "another machine."
    )
    return replace(
        resolved,
        recipe=recipe.filled(polish={"num_tokens": 0}),
        warnings=(*resolved.warnings, warning),
    )


def disk_bytes(
    opened: Opened, resolved: Resolved, plan: MemoryPlan, num_models: int = 1, num_results: int = 1
) -> int:
    """Return the most bytes that a run needs on the disk of its output.

    Results, each at most as large as the dense model, or without one each model's statistics; each
    round's refitted readers, of so many models; the dense layers if there are several rounds;
    finished layers if weights stay on disk.
    """
    num_rounds, layers = len(resolved.plans), decoder_layers(opened.model, opened.arch)
    left = [layers[index] for index in resolved.layers]
    parameters = (next(iter(g.refitted(left[g.layer]).values())) for g in resolved.groups)
    readers = sum(p.numel() * (4 if plan.in_float32 else p.element_size()) for p in parameters)
    in_layers = sum(Size.of(layer).num_bytes for layer in layers)
    sums = 4 * sum(
        _num_sums(opened, resolved, group.num_inputs)
        for group in resolved.groups
        if group.kind not in OF_EXPERTS
    )
    total = num_results * Size.of(opened.model).num_bytes + num_models * (
        num_rounds * readers + sums * (not num_results)
    )
    if num_rounds > 1 and resolved.target_mix:
        total += in_layers
    return total + (min(num_rounds, 2) * in_layers if plan.weights_on_disk else 0)


def walk_seconds(opened: Opened, resolved: Resolved, num_copies: int) -> float:
    """Return about how long a walk with the copies of a model takes here: its products, without
    judging.

    Each token goes through a layer once for the dense stream, and for each copy through the whole
    layer and what is left of its FFN. A reader of F inputs takes F^2 for each token and 9 F^3 for
    its units and its fit. The speed is that of a float32 product that is timed now.
    """
    from torch.utils.benchmark import Timer

    num_tokens = HELD_OUT_FACTOR * resolved.num_tokens
    once = num_tokens * sum(opened.arch.params_per_layer)
    fits = sum(
        group.num_inputs**2 * (num_tokens + 9 * group.num_inputs) for group in resolved.groups
    )
    square = torch.ones(1024, 1024, device=opened.device)
    timer = Timer(
        "square @ square", globals={"square": square}, num_threads=torch.get_num_threads()
    )
    return (once + num_copies * (1.7 * once + fits)) * timer.timeit(4).median / 1024**3
