"""Estimate before a run: bytes of memory and of the result, from shapes alone.

In: an opened model, its resolved recipe. Out: bytes by part, and how the run keeps within memory. The parts that stand
together at the worst moment, the solve of the widest group, are summed to the peak; the interpreter is not counted.
"""

from dataclasses import dataclass, replace

from secateur.arch_numbers import text_config
from secateur.device import free_bytes
from secateur.errors import RecipeError
from secateur.gram import NUM_BLOCKS, PRODUCT_ROWS
from secateur.inspect_record import MemoryEstimate
from secateur.obs import units_at_once
from secateur.opening import Opened, computes_in_float32
from secateur.output import parse_size
from secateur.resolve import Resolved
from secateur.resolve_depth import TOKENS_PER_INPUT
from secateur.score import needs_gram
from secateur.stats import BY_DOMAIN
from secateur.walk import DEVICE_BATCH_TOKENS

# Held-out blocks come on top of the calibration tokens: one for every nine.
HELD_OUT_FACTOR = 10 / 9


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """What a run will need, whether its weights stay on disk, and whether its layers come to a device one at a time.

    `budget_bytes`: what of a device's memory that was decided by; None: there was nothing to decide. `in_float32`: the
    run computes in it, a layer at a time, and stores what the weights are stored in.
    """

    estimate: MemoryEstimate
    weights_on_disk: bool
    one_layer_at_a_time: bool = False
    budget_bytes: int | None = None
    in_float32: bool = False


def memory_for(opened: Opened, resolved: Resolved) -> MemoryPlan:
    """Return how the run keeps within the memory that there is, or that its recipe allows.

    Raises RecipeError, naming the least that can work, if nothing helps.
    """
    return _on_cpu(opened, resolved) if opened.device.type == "cpu" else _on_device(opened, resolved)


def _can_map(opened: Opened) -> bool:
    """Whether weights are in safetensors files, from which they can come layer by layer."""
    return opened.checkpoint is not None and opened.checkpoint.gguf_file is None


def _on_cpu(opened: Opened, resolved: Resolved) -> MemoryPlan:
    """Return how the run keeps within the recipe's `memory_budget`: weights in memory if they fit, else on disk."""
    size, per_layer = opened.size, opened.arch.params_per_layer
    bytes_per_param = size.num_bytes // size.num_params
    if computes_in_float32(opened):  # what is in no layer, and the layer that runs and the next one, beside all
        outside = size.num_params - sum(per_layer)
        weights = size.num_bytes + 4 * (outside + 2 * max(per_layer)) - outside * bytes_per_param
        return MemoryPlan(estimate_memory(opened, resolved, weights, 4), False, in_float32=True)
    whole = estimate_memory(opened, resolved, size.num_bytes, bytes_per_param)
    text = resolved.recipe.memory_budget
    if text is None or whole.peak <= parse_size("memory_budget", text):
        return MemoryPlan(whole, False)
    if not _can_map(opened):
        raise RecipeError(
            f"memory_budget: {text} is less than the {whole.peak / 1e9:.2f} GB that the run needs with this model's "
            f"weights in memory; only safetensors weights, given by their path, can stay on disk."
        )
    layer = max(per_layer) * bytes_per_param
    streamed = estimate_memory(opened, resolved, 0, bytes_per_param)
    # What a cut leaves of a layer is in memory until it is written.
    streamed = replace(streamed, solve=max(streamed.solve, layer))
    if streamed.peak > parse_size("memory_budget", text):
        raise RecipeError(
            f"memory_budget: {text} cannot work; with all weights on disk the run still needs "
            f"{streamed.peak / 1e9:.2f} GB ({_parts(streamed)}); allow that, or {_remedy(streamed)}."
        )
    return MemoryPlan(streamed, True)


def _on_device(opened: Opened, resolved: Resolved) -> MemoryPlan:
    """Return how a run on a device other than the CPU keeps within its memory: all weights there, or layer by layer.

    The recipe's `device_budget` comes before what is free there; nobody may know that. Ordinary memory holds weights
    alone, and by the recipe's `memory_budget` not even those.
    """
    recipe, size, per_layer = resolved.recipe, opened.size, opened.arch.params_per_layer
    in_float32 = computes_in_float32(opened)
    bytes_per_param, text = 4 if in_float32 else size.num_bytes // size.num_params, recipe.device_budget
    free = None if opened.checkpoint is None else free_bytes(opened.device)
    budget = free if text is None else parse_size("device_budget", text)
    whole = estimate_memory(opened, resolved, size.num_params * bytes_per_param, bytes_per_param)
    host = None if recipe.memory_budget is None else parse_size("memory_budget", recipe.memory_budget)
    on_disk = host is not None and size.num_bytes > host
    if on_disk and not _can_map(opened):
        raise RecipeError(
            f"memory_budget: {recipe.memory_budget} is less than the {size.num_bytes / 1e9:.2f} GB of this model's "
            f"weights, and only safetensors weights, given by their path, can stay on disk."
        )
    if budget is None or whole.peak <= budget:
        return MemoryPlan(whole, on_disk, in_float32, budget, in_float32)
    # The layer that is run and the next one on its way, beside what is in no layer.
    apart = sum(per_layer) - 2 * max(per_layer)
    weights = (size.num_params - max(apart, 0)) * bytes_per_param
    by_layers = estimate_memory(opened, resolved, weights, bytes_per_param)
    if by_layers.peak > budget:
        raise RecipeError(
            f"device_budget: {budget / 1e9:.2f} GB of the device cannot work; with two layers there at a time the run "
            f"still needs {by_layers.peak / 1e9:.2f} GB (weights {by_layers.weights / 1e9:.2f}, {_parts(by_layers)}); "
            f"free that much, {_remedy(by_layers)}, or give device: cpu."
        )
    return MemoryPlan(by_layers, on_disk, True, budget, in_float32)


def _parts(estimate: MemoryEstimate) -> str:
    """Name the parts that stand together at the worst moment."""
    if estimate.is_of_layer_choice:
        return f"choice of layers {estimate.layer_choice / 1e9:.2f}"
    named = {"hidden states": estimate.hidden_states, "statistics": estimate.statistics, "solve": estimate.solve}
    return ", ".join(f"{name} {part / 1e9:.2f}" for name, part in named.items())


def _remedy(estimate: MemoryEstimate) -> str:
    choice = "name them in removed_layers or give depth: 0"
    return choice if estimate.is_of_layer_choice else "lower calibration.num_tokens"


def estimate_memory(opened: Opened, resolved: Resolved, weight_bytes: int, bytes_per_param: int) -> MemoryEstimate:
    """Return the bytes that the run needs beyond the interpreter.

    hidden: tokens x hidden size in the model's dtype, twice where a dense stream is walked too. statistics: Gram
    matrices as lower triangles, pooled in float32 and the current domain's in float64 with the product that is added to
    it (all domains' in float32 too where their weights are sought), the same of the drift, and the held-out inputs.
    solve: the pooled ones, and the larger of two: the float64 square that
    `greedy_obs` inverts in place, with a batch's rows four times and the reader in float32; or what least squares needs
    in float64, see `_fit_bytes`, with the reader in float32. layer_choice: see `_layer_choice_bytes`.
    """
    recipe, hidden_size = resolved.recipe, text_config(opened.model).hidden_size
    num_tokens = round(resolved.num_tokens * HELD_OUT_FACTOR)
    widest = max(group.num_inputs for group in resolved.groups)
    has_gram = needs_gram(recipe.score) or recipe.compensate == "least_squares"
    square = widest * widest if has_gram else 0
    has_drift = bool(resolved.target_mix)
    reader = widest * hidden_size
    sums = 4 * (_triangle(square) + has_drift * reader)
    inputs_and_drift = widest + has_drift * hidden_size
    held_out = (num_tokens - resolved.num_tokens) * inputs_and_drift * bytes_per_param
    num_domains = len(recipe.calibration.domains) if recipe.domain_weighting in BY_DOMAIN else 0
    at_once = units_at_once(recipe.obs_batch, widest, 1)
    obs = 8 * square + 4 * 8 * widest * at_once + 4 * reader if needs_gram(recipe.score) else 0
    fit = _fit_bytes(resolved, hidden_size) + 4 * reader if recipe.compensate == "least_squares" else 0
    return MemoryEstimate(
        weights=weight_bytes,
        hidden_states=(1 + has_drift) * num_tokens * hidden_size * bytes_per_param,
        statistics=(1 + num_domains + 2) * sums + _product_bytes(widest) + held_out,
        solve=max(1, num_domains) * sums + held_out + max(obs, fit),
        layer_choice=_layer_choice_bytes(opened, resolved, bytes_per_param),
    )


def _layer_choice_bytes(opened: Opened, resolved: Resolved, bytes_per_param: int) -> int:
    """Return the bytes that choosing layers needs beside the weights: the narrow readers of all layers, above all.

    With them either what one of them is fitted by (the hidden states of `TOKENS_PER_INPUT` tokens per input, the Gram
    matrix in float64 and what least squares needs) or a batch's streams, one for every layer, and its logits.
    None where no layer goes, or the recipe names those that do.
    """
    recipe, arch, config = resolved.recipe, opened.arch, text_config(opened.model)
    if not resolved.depth or recipe.removed_layers:
        return 0
    hidden_size, inputs = config.hidden_size, [group.num_inputs for group in arch.groups if group.name == "ffn"]
    readers, widest = sum(inputs) * hidden_size * bytes_per_param, max(inputs, default=0)
    fit = _fit_bytes(resolved, hidden_size) if recipe.compensate == "least_squares" else 0
    fitted, length = min(TOKENS_PER_INPUT * widest, resolved.num_tokens), resolved.sequence_length
    batch = max(length, min(recipe.probe_blocks * length, DEVICE_BATCH_TOKENS))
    gram = 8 * _triangle(widest * widest) + _product_bytes(widest)
    streams = batch * (arch.num_layers * hidden_size + config.vocab_size) * bytes_per_param
    return readers + max((fitted * bytes_per_param + 4 * widest) * hidden_size + gram + fit, streams)


def _triangle(square: int) -> int:
    """Return how many numbers a symmetric matrix takes: a triangle of blocks, a little more than half of the square."""
    return round(square * (1 + 1 / NUM_BLOCKS) / 2)


def _product_bytes(num_inputs: int) -> int:
    """Return the bytes of the float32 product that is added to a Gram matrix."""
    return 4 * min(PRODUCT_ROWS, -(-num_inputs // NUM_BLOCKS)) * num_inputs


def _fit_bytes(resolved: Resolved, num_outputs: int) -> int:
    """Return the most that one group's least squares holds in float64.

    With S inputs that stay, C that go and H outputs: S^2 of the system, C S and C H of its right side, S H of the
    result. Where a budget is to choose the widths, any may come.
    """
    plan, uniform = resolved.plans[0], resolved.recipe.budget == "uniform"
    needs = []
    for group in resolved.groups:
        kept = plan.num_keep[group.layer, group.name] * group.width if uniform else group.num_inputs
        gone = group.num_inputs - kept
        needs.append(8 * (kept * kept + gone * kept + (gone + kept) * num_outputs))
    return max(needs)
