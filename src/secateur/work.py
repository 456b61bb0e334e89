"""What a run has to do, before it: floating-point operations, seconds on this machine, bytes of disk.

In: an opened model, its resolved recipe. Out: operations by kind; seconds, from the rate at which
the device multiplies matrices of such sizes now; bytes. Text and the reload check are not counted.
"""

import time

import torch

from secateur.arch import Group, decoder_layers
from secateur.device import float64_device
from secateur.estimate import HELD_OUT_FACTOR, MemoryPlan
from secateur.gram import NUM_BLOCKS, exact_product_precision
from secateur.inspect_record import Work
from secateur.opening import Opened
from secateur.resolve import Resolved
from secateur.resolve_depth import TOKENS_PER_INPUT
from secateur.walk import LAYERS_AT_ONCE

# Products that are timed: as many rows as a batch has tokens, and not more than a fraction of a second of them.
ROWS, MOST_WIDTH, REPEATS = 512, 2048, 3


def work_of(opened: Opened, resolved: Resolved) -> Work:
    """Return the operations of a run.

    forward, per round: the pruned stream, and where there is one the dense stream, through every layer, and what was
    cut once more; the held-out tenth through two models with head; for measured budgets the probe's tokens
    through half of the layers, on average, and the head for every group; before the first round what choosing whole
    layers takes.
    gram: the lower block triangle of x'x, once more for measured budgets. solve, for F inputs, C that go and S that
    stay: inverse 2 F^3, updates 2 C F^2, Cholesky S^3 / 3, substitutions 2 S^2 H, right side 2 C S H.
    """
    recipe, num_rounds = resolved.recipe, len(resolved.plans)
    tokens, num_params = resolved.num_tokens, opened.size.num_params
    held_out = tokens * (HELD_OUT_FACTOR - 1)
    in_layers = sum(opened.arch.params_per_layer)
    is_measured = recipe.budget == "curve"
    streams = 2 if resolved.target_mix else 1
    forward = num_rounds * streams * 2 * (tokens + held_out) * in_layers
    if recipe.evaluate:
        forward += 2 * 2 * held_out * num_params
    gram, solve = 0.0, 0.0
    for plan in resolved.plans:
        for group in resolved.groups:
            parts = _group_work(group, plan.num_keep[group.layer, group.name], tokens)
            forward += 2 * (tokens + held_out) * parts[0]
            gram, solve = gram + parts[1] * (1 + is_measured), solve + parts[2] * (1 + is_measured)
    if is_measured:
        probe = recipe.probe_blocks * len(recipe.calibration.domains) * resolved.sequence_length
        one = 2.0 * probe * (num_params - in_layers / 2)
        forward += num_rounds * len(resolved.groups) * one
    for part in _layers_work(opened, resolved):
        forward, gram, solve = forward + part.forward, gram + part.gram, solve + part.solve
    return Work(float(forward), float(gram), float(solve))


def _layers_work(opened: Opened, resolved: Resolved) -> list[Work]:
    """Return the operations of choosing layers, unless the recipe names them, and of folding them into those before."""
    if not resolved.depth:
        return []
    fold = _fold_work(opened, resolved)
    return [fold] if resolved.recipe.removed_layers else [_choice_work(opened, resolved), fold]


def _choice_work(opened: Opened, resolved: Resolved) -> Work:
    """Return the operations of choosing layers.

    The probe's tokens: a stream without each layer from there on, and the head; then, for each further layer, about
    `LAYERS_AT_ONCE` of these again. The narrow readers: a few tokens per input, twice through the model.
    """
    recipe, arch, depth = resolved.recipe, opened.arch, resolved.depth
    in_layers, num_params = sum(arch.params_per_layer), opened.size.num_params
    ffns = [group for group in arch.groups if group.name == "ffn"]
    probe = recipe.probe_blocks * len(recipe.calibration.domains) * resolved.sequence_length
    num_streams = arch.num_layers + LAYERS_AT_ONCE * (depth - 1)
    passes = num_streams / 2 + 2 * depth
    fitted = TOKENS_PER_INPUT * max((group.num_inputs for group in ffns), default=0)
    forward = 2 * probe * (passes * in_layers + (num_streams + depth) * (num_params - in_layers))
    # How many stay hardly matters to the operations: about half, as where layers go.
    parts = [_group_work(group, group.num_units // 2, fitted) for group in ffns]
    gram, solve = sum(part[1] for part in parts), sum(part[2] for part in parts)
    return Work(float(forward + 4 * fitted * in_layers), float(gram), float(solve))


def _fold_work(opened: Opened, resolved: Resolved) -> Work:
    """Return the operations of folding layers: all tokens through those before each, half of all on average."""
    arch, depth, tokens = opened.arch, resolved.depth, resolved.num_tokens * HELD_OUT_FACTOR
    ffns = [group for group in arch.groups if group.name == "ffn"][:depth]
    parts = [_group_work(group, group.num_units // 2, round(tokens)) for group in ffns]
    return Work(depth * tokens * sum(arch.params_per_layer), float(sum(part[1] for part in parts)), 0.0)


def _group_work(group: Group, num_keep: int, tokens: int) -> tuple[float, float, float]:
    """Return parameters that stay, and the operations of statistics and solves."""
    inputs, stays = group.num_inputs, min(group.num_inputs, num_keep * group.width)
    gone = inputs - stays
    outputs = group.params_per_unit / max(1, group.width * group.parts.num_linears)
    solve = 2.0 * inputs**3 + 2.0 * gone * inputs**2 + stays**3 / 3
    solve += 2.0 * stays**2 * outputs + 2.0 * gone * stays * outputs
    gram = tokens * inputs**2 * (1 + 1 / NUM_BLOCKS)
    return float(num_keep * group.params_per_unit), gram, solve if gone else 0.0


def seconds_for(work: Work, hidden_size: int, dtype: torch.dtype, device: torch.device) -> Work:
    """Return the seconds that the work takes at the rates of `measured_rates`. `dtype`: what is computed in."""
    rates = measured_rates(device, dtype, min(MOST_WIDTH, hidden_size))
    return Work(work.forward / rates.forward, work.gram / rates.gram, work.solve / rates.solve)


@torch.inference_mode()
def measured_rates(device: torch.device, dtype: torch.dtype, width: int, rows: int = ROWS) -> Work:
    """Return operations per second of products like those of each kind, the best of a few."""
    forward = _rate(torch.zeros(rows, width, dtype=dtype, device=device), 4 * width)
    with exact_product_precision(dtype):
        gram = _rate(torch.zeros(rows, width, device=device), 4 * width)
    solve = _rate(torch.zeros(rows, ROWS, dtype=torch.float64, device=float64_device(device)), ROWS)
    return Work(forward, gram, solve)


def _rate(left: torch.Tensor, columns: int) -> float:
    right = left.new_zeros(columns, left.shape[1])
    seconds = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        (left @ right.T)[0, 0].item()
        seconds.append(time.perf_counter() - start)
    return 2 * left.numel() * columns / min(seconds)


def disk_bytes(opened: Opened, resolved: Resolved, plan: MemoryPlan) -> int:
    """Return the most bytes that a run needs on the disk of its output.

    The result, never larger than the dense model, once more for every round that is kept; the store's refitted
    readers of every round; layers as they were before the first of several rounds; finished layers, where weights
    stay on disk.
    """
    model, num_rounds = opened.model, len(resolved.plans)
    layers = decoder_layers(model, opened.arch)
    parameters = (next(iter(g.parts.refitted(layers[g.layer]).values())) for g in resolved.groups)
    readers = sum(p.numel() * (4 if plan.in_float32 else p.element_size()) for p in parameters)
    in_layers = sum(p.numel() * p.element_size() for layer in layers for p in layer.parameters())
    num_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    total = num_bytes * (num_rounds if resolved.recipe.keep_rounds else 1) + num_rounds * readers
    if num_rounds > 1 and resolved.target_mix:
        total += in_layers
    return total + (min(num_rounds, 2) * in_layers if plan.weights_on_disk else 0)
