"""What a run will cost in memory and on disk, from shapes alone."""

import importlib.util
from dataclasses import dataclass, replace

from secateur.errors import RecipeError
from secateur.files import parse_size
from secateur.methods.budget import params_gone
from secateur.methods.scores import needs_gram
from secateur.methods.select import units_at_once
from secateur.model.bind import decoder_layers, text_config
from secateur.pruning.open import Opened, computes_in_float32
from secateur.pruning.resolve import Resolved
from secateur.pruning.resolve_parts import NARROW_TOKENS_PER_INPUT
from secateur.recovery.cost import num_trained, polish_settings, training_bytes
from secateur.recovery.weights import autocasts
from secateur.report.records import MemoryEstimate
from secateur.stream.device import free_bytes
from secateur.stream.statistics import NUM_BLOCKS, PRODUCT_ROWS
from secateur.stream.walk import DEVICE_BATCH_TOKENS

HELD_OUT_FACTOR = 10 / 9  # held-out blocks come on top of the calibration tokens, one for every nine


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """A run's memory, whether weights stay on disk, and whether layers are onloaded one at a time.

    `budget_bytes`: the device's limit, if known. `in_float32`: compute in it, store the own dtype.
    """

    estimate: MemoryEstimate
    weights_on_disk: bool
    one_layer_at_a_time: bool = False
    budget_bytes: int | None = None
    in_float32: bool = False


def memory_for(opened: Opened, resolved: Resolved) -> MemoryPlan:
    """Return how the run fits the memory. Raises RecipeError with the least that can work."""
    return _on_cpu(opened, resolved) if opened.device.type == "cpu" else _on_device(opened, resolved)


def _can_map(opened: Opened) -> bool:
    """Return whether weights are in safetensors files as they are, to be mapped layer by layer."""
    files = opened.checkpoint
    return files is not None and files.gguf_file is None and files.quantised is None


def _on_cpu(opened: Opened, resolved: Resolved) -> MemoryPlan:
    """Return how the run keeps `memory_budget`: weights in memory if they fit, else on disk."""
    size, per_layer = opened.size, opened.arch.params_per_layer
    bytes_per_param = size.num_bytes // size.num_params
    if computes_in_float32(opened):  # also what is in no layer, and two layers
        outside = size.num_params - sum(per_layer)
        weights = size.num_bytes + 4 * (outside + 2 * max(per_layer)) - outside * bytes_per_param
        return MemoryPlan(estimate_memory(opened, resolved, weights, 4), False, in_float32=True)
    whole = estimate_memory(opened, resolved, size.num_bytes, bytes_per_param)
    text = resolved.recipe.machine.memory_budget
    if text is None or whole.peak <= parse_size("machine.memory_budget", text):
        return MemoryPlan(whole, False)
    if not _can_map(opened):
        raise RecipeError(
            f"machine.memory_budget: {text} is less than the {whole.peak / 1e9:.2f} GB that the run needs with this "
            f"model's weights in memory; only safetensors weights, not quantised and given by their path, can stay on "
            f"disk."
        )
    streamed = estimate_memory(opened, resolved, 0, bytes_per_param)
    # A cut layer is in memory until it is written.
    streamed = replace(streamed, solve=max(streamed.solve, max(per_layer) * bytes_per_param))
    if streamed.peak > parse_size("machine.memory_budget", text):
        parts, remedy = _explained(streamed)
        raise RecipeError(
            f"machine.memory_budget: {text} cannot work; with all weights on disk the run still needs "
            f"{streamed.peak / 1e9:.2f} GB ({parts}); allow that, or {remedy}."
        )
    return MemoryPlan(streamed, True)


def _on_device(opened: Opened, resolved: Resolved) -> MemoryPlan:
    """Return how a run fits its device: all weights there, or layer by layer.

    The recipe's `device_budget` comes before the free memory, which may be unknown. The host's
    memory holds only weights, and not even those if they exceed the recipe's `memory_budget`.
    """
    recipe, size, per_layer = resolved.recipe, opened.size, opened.arch.params_per_layer
    in_float32 = computes_in_float32(opened)
    bytes_per_param, text = 4 if in_float32 else size.num_bytes // size.num_params, recipe.machine.device_budget
    free = None if opened.checkpoint is None else free_bytes(opened.device)
    budget = free if text is None else parse_size("machine.device_budget", text)
    whole = estimate_memory(opened, resolved, size.num_params * bytes_per_param, bytes_per_param)
    host = (
        None
        if recipe.machine.memory_budget is None
        else parse_size("machine.memory_budget", recipe.machine.memory_budget)
    )
    on_disk = host is not None and size.num_bytes > host
    if on_disk and not _can_map(opened):
        raise RecipeError(
            f"machine.memory_budget: {recipe.machine.memory_budget} is less than the {size.num_bytes / 1e9:.2f} GB of "
            f"this model's weights, and only safetensors weights, not quantised and given by their path, can stay on "
            f"disk."
        )
    if budget is None or whole.peak <= budget:
        return MemoryPlan(whole, on_disk, in_float32, budget, in_float32)
    # Onloaded: the running layer, the prefetched one, and what is in no layer.
    apart = sum(per_layer) - 2 * max(per_layer)
    weights = (size.num_params - max(apart, 0)) * bytes_per_param
    by_layers = estimate_memory(opened, resolved, weights, bytes_per_param)
    if by_layers.peak > budget:
        parts, remedy = _explained(by_layers)
        raise RecipeError(
            f"machine.device_budget: {budget / 1e9:.2f} GB of the device cannot work; with two layers there at a time "
            f"the run still needs {by_layers.peak / 1e9:.2f} GB (weights {by_layers.weights / 1e9:.2f}, {parts}); "
            f"free that much, {remedy}, or give device: cpu."
        )
    return MemoryPlan(by_layers, on_disk, True, budget, in_float32)


def _explained(estimate: MemoryEstimate) -> tuple[str, str]:
    """Return the parts of the peak, and what lowers it, for a message."""
    if estimate.is_of_layer_choice:
        return f"choice of layers {estimate.layer_choice / 1e9:.2f}", "name them in remove.layers or give depth: 0"
    named = {"hidden states": estimate.hidden_states, "statistics": estimate.statistics, "solve": estimate.solve}
    return ", ".join(f"{name} {part / 1e9:.2f}" for name, part in named.items()), "lower calibration.num_tokens"


def estimate_memory(opened: Opened, resolved: Resolved, weight_bytes: int, bytes_per_param: int) -> MemoryEstimate:
    """Return the bytes that the run needs beyond the interpreter.

    hidden_states: tokens x hidden size, twice with a dense stream. statistics: Gram matrices as
    lower triangles, pooled in float32, and the current domain's in float64 with the product being
    added, the drift's, and the held-out inputs. solve: the pooled ones and the larger of two: for
    `greedy_obs` the float64 square, a batch's rows four times and the reader in float32; for least
    squares `_fit_bytes` and the reader in float32.
    """
    recipe, hidden_size = resolved.recipe, text_config(opened.model).hidden_size
    num_tokens = round(resolved.num_tokens * HELD_OUT_FACTOR)
    widest = max((group.num_inputs for group in resolved.groups), default=0)
    has_gram = needs_gram(recipe.choose.score) or recipe.repair.compensate == "least_squares"
    square, reader = widest * widest if has_gram else 0, widest * hidden_size
    has_drift = bool(resolved.target_mix)
    sums = 4 * (_triangle(square) + has_drift * reader)
    held_out = (num_tokens - resolved.num_tokens) * (widest + has_drift * hidden_size) * bytes_per_param
    at_once = units_at_once(recipe.choose.obs_batch, widest, 1)
    obs = 8 * square + 4 * 8 * widest * at_once + 4 * reader if needs_gram(recipe.choose.score) else 0
    fit = _fit_bytes(resolved, hidden_size) + 4 * reader if recipe.repair.compensate == "least_squares" else 0
    return MemoryEstimate(
        weights=weight_bytes,
        hidden_states=(1 + has_drift) * num_tokens * hidden_size * bytes_per_param,
        statistics=3 * sums + _product_bytes(widest) + held_out,
        solve=sums + held_out + max(obs, fit),
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
    hidden_size, inputs = config.hidden_size, [group.num_inputs for group in arch.groups if group.name == "ffn"]
    readers, widest = sum(inputs) * hidden_size * bytes_per_param, max(inputs, default=0)
    fit = _fit_bytes(resolved, hidden_size) if recipe.repair.compensate == "least_squares" else 0
    fitted, length = min(NARROW_TOKENS_PER_INPUT * widest, resolved.num_tokens), resolved.sequence_length
    batch = max(length, min(recipe.choose.probe_blocks * length, DEVICE_BATCH_TOKENS))
    gram = 8 * _triangle(widest * widest) + _product_bytes(widest)
    streams = batch * (arch.num_layers * hidden_size + config.vocab_size) * bytes_per_param
    return readers + max((fitted * bytes_per_param + 4 * widest) * hidden_size + gram + fit, streams)


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
    plan, uniform = resolved.plans[0], resolved.recipe.choose.budget == "uniform"
    needs = []
    for group in resolved.groups:
        kept = plan.num_keep[group.layer, group.name] * group.width if uniform else group.num_inputs
        gone = group.num_inputs - kept
        needs.append(8 * (kept * kept + gone * kept + (gone + kept) * num_outputs))
    return max(needs, default=0)


def params_after(resolved: Resolved) -> int:
    """Return the parameters that the last plan leaves."""
    return resolved.prices_left.total - params_gone(resolved.groups, resolved.plans[-1].num_keep)


def polish_bytes(opened: Opened, resolved: Resolved) -> int:
    """Return the bytes of the polish: weights before it that train, what the dense model leaves, training."""
    settings, model = polish_settings(resolved.recipe), opened.model
    if settings is None:
        return 0
    hidden_size, num_params = text_config(model).hidden_size, params_after(resolved)
    gone = opened.size.num_params - num_params - (0 if settings.train == "full" else resolved.prices.tokens)
    trained, on_cpu = max(0, num_trained(model, settings) - gone), opened.device.type != "cuda"
    numbers = trained if autocasts(model.dtype, on_cpu=on_cpu) else num_params  # the rest has no copy
    numbers += (settings.num_tokens + text_config(model).vocab_size) * hidden_size
    training = training_bytes(model, num_params, trained, settings, resolved.sequence_length, on_cpu=on_cpu)
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
    recipe = resolved.recipe
    key = "memory_budget" if opened.device.type == "cpu" else "device_budget"
    free, text = None if opened.checkpoint is None else free_bytes(opened.device), getattr(recipe.machine, key)
    budget = free if text is None else parse_size(f"machine.{key}", text)
    needed = least = polish_bytes(opened, resolved)
    if budget is None or needed <= budget:
        return resolved
    asked = f"polish: needs {needed / 1e9:.2f} GB, more than the {budget / 1e9:.2f} GB there are"
    for what, changes in LESS_MEMORY.items():
        less = replace(resolved, recipe=recipe.filled(polish=changes))
        least = polish_bytes(opened, less)
        if least <= budget and ("train" not in changes or importlib.util.find_spec("peft") is not None):
            return replace(less, warnings=(*resolved.warnings, f"{asked}, so {what}, for {least / 1e9:.2f} GB."))
    why = "peft is missing (pip install 'secateur[recover]')" if least <= budget else f"{least / 1e9:.2f} GB at least"
    warning = f"{asked}, and {why}, so there is none; secateur recover can train the result on another machine."
    return replace(resolved, recipe=recipe.filled(polish={"num_tokens": 0}), warnings=(*resolved.warnings, warning))


def disk_bytes(opened: Opened, resolved: Resolved, plan: MemoryPlan) -> int:
    """Return the most bytes that a run needs on the disk of its output.

    The result, at most as large as the dense model, once per saved round; each round's refitted
    readers; the dense layers if there are several rounds; finished layers if weights stay on disk.
    """
    model, num_rounds = opened.model, len(resolved.plans)
    layers = decoder_layers(model, opened.arch)
    left = [layers[index] for index in resolved.layers]
    parameters = (next(iter(g.parts.refitted(left[g.layer]).values())) for g in resolved.groups)
    readers = sum(p.numel() * (4 if plan.in_float32 else p.element_size()) for p in parameters)
    in_layers = sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters())
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    total = num_bytes * (num_rounds if resolved.recipe.output.keep_rounds else 1) + num_rounds * readers
    if num_rounds > 1 and resolved.target_mix:
        total += in_layers
    return total + (min(num_rounds, 2) * in_layers if plan.weights_on_disk else 0)
