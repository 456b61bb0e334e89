"""The seconds behind the target `latency`: a decoded token's cost per unit, per layer and in all.

Each timing is a forward pass of one token at batch 1 after `PROMPT_TOKENS`, on copies with random
weights: the whole model, and with fewer units of one kind of group at a time. Copies take turns, so
that drift affects all alike. A unit's price is the slope of a least-squares line through the
medians. The overhead of `generate` is not counted.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import nn

from secateur.errors import RecipeError
from secateur.facts import Workload
from secateur.log import Progress, silent
from secateur.methods.depth import remove_layers
from secateur.methods.prices import Seconds
from secateur.model.bind import Arch, bind, decoder_layers
from secateur.model.checkpoint import meta_model, restore_buffers
from secateur.model.group import Group, cut
from secateur.pruning.open import Opened
from secateur.ranks import from_first
from secateur.store import Services
from secateur.stream.device import CPU, now, on_device

# The layers must not fit a processor's cache, as a whole model's do not.
LEAST_BYTES = 2**28
KEEP_SHARES = (0.25, 0.5, 0.75)
# Small models repeat for this long, so that a burst of other work moves no median.
WARM_UPS, REPEATS, LEAST_SECONDS = 2, 15, 3.0
PROMPT_TOKENS = Workload().prompt_tokens


@dataclass(frozen=True, slots=True)
class Timing:
    """Median seconds and quartiles per decoded token, with `num_units` of `group` in all layers."""

    group: str
    num_units: int
    seconds: float
    quartiles: tuple[float, float]


def with_seconds(opened: Opened, services: Services) -> Opened:
    """Return `opened` with measured `seconds` if its target needs them.

    A resumed run takes them from its store, because a second measurement would differ. Only the
    model's config and dtype count, so no weights are needed. Raises ArchError if the family has no
    such group, RecipeError if fewer units save no time.
    """
    recipe, log = opened.recipe, services.log
    if recipe.remove.target != "latency":
        return opened

    def measured() -> dict[str, Any]:
        with log.time("latency"):
            groups, progress = recipe.remove.group_names, services.progress
            seconds, timings = measure_latency(opened.arch, groups, opened.model, progress, opened.device)
        for timing in timings:
            log.write({"event": "latency", "num_threads": torch.get_num_threads(), **asdict(timing)})
        log.write({"event": "seconds", **asdict(seconds)})
        return asdict(seconds)

    stored = services.store.value("seconds", lambda: from_first(measured), is_input=True)
    return replace(opened, seconds=Seconds(**stored))


@torch.inference_mode()
def measure_latency(
    arch: Arch, names: tuple[str, ...], model: Any, progress: Progress = silent, device: torch.device = CPU
) -> tuple[Seconds, list[Timing]]:
    """Return seconds per unit, per layer and per decoded token of the whole model, and the timings.

    As many layers are built as hold `LEAST_BYTES`, at most all. Prices per unit are for these
    layers.
    """
    shape = on_device(_random_model(arch, model), device)
    built = bind(shape)
    variants: dict[tuple[str, int], nn.Module] = {("", 0): shape}
    for name in names:
        members = built.select((name,))
        for share in KEEP_SHARES:
            counts = [max(1, round(share * group.num_units)) for group in members]
            if sum(counts) < sum(group.num_units for group in members):
                variants[name, sum(counts)] = _narrower(shape, built, members, counts)
    spans, rests = _take_turns({key: _step(variant, built) for key, variant in variants.items()}, progress)
    whole = statistics.median(spans["", 0])
    timings, per_unit = [], {}
    for name in names:
        num_units = sum(group.num_units for group in built.select((name,)))
        timings += [_timing(name, num_units, spans["", 0])]
        timings += [_timing(name, units, spans[key, units]) for key, units in spans if key == name]
        per_unit[name] = _slope([timing for timing in timings if timing.group == name])
    per_layer = whole / built.num_layers
    total = statistics.median(rests["", 0]) + per_layer * arch.num_layers
    return Seconds(total=total, per_layer=per_layer, per_unit=per_unit), timings


def _random_model(arch: Arch, model: Any) -> Any:
    """Return a model of the same config and dtype with few layers and random weights."""
    shape = meta_model(copy.deepcopy(model.config))
    layers = decoder_layers(shape, arch)
    layer_bytes = sum(p.numel() for layer in layers for p in layer.parameters()) * model.dtype.itemsize // len(layers)
    surplus = range(-(-LEAST_BYTES // layer_bytes), len(layers))
    # A model of per-layer widths cannot lose layers: time it whole.
    if surplus and not shape.config.is_heterogeneous:
        remove_layers(shape, arch, surplus)
    shape = shape.to(model.dtype).to_empty(device=CPU).eval()
    generator = torch.Generator().manual_seed(0)
    for tensor in (*shape.parameters(), *shape.buffers()):
        tensor.uniform_(-0.02, 0.02, generator=generator)
    restore_buffers(shape)
    return shape


def _narrower(shape: Any, arch: Arch, groups: tuple[Group, ...], counts: list[int]) -> nn.Module:
    """Return a copy with fewer units of these groups; the embedding and the head are shared."""
    shared = (shape.get_input_embeddings(), shape.get_output_embeddings())
    variant = copy.deepcopy(shape, {id(module): module for module in shared})
    layers = decoder_layers(variant, arch)
    for group, count in zip(groups, counts, strict=True):
        cut(layers[group.layer], group, torch.arange(count, device=shape.device), group.num_units)
    return variant


def _step(model: Any, arch: Arch) -> Callable[[], tuple[float, float]]:
    """Return a function that decodes a token and returns the layers' seconds and the rest."""
    ids_1T = torch.zeros(1, PROMPT_TOKENS, dtype=torch.long, device=model.device)
    output = model(ids_1T, use_cache=True, logits_to_keep=1)
    cache = output["cache"] if "cache" in output else output["past_key_values"]  # either
    layers = decoder_layers(model, arch)

    def step() -> tuple[float, float]:
        times: list[float] = []
        before = layers[0].register_forward_pre_hook(lambda *_: times.append(now(model.device)))
        with before, layers[-1].register_forward_hook(lambda *_: times.append(now(model.device))):
            start = now(model.device)
            model(ids_1T[:, :1], None, None, cache, use_cache=True)
            total = now(model.device) - start
        span = times[1] - times[0]
        return span, total - span

    return step


Key = tuple[str, int]


def _take_turns(
    steps: dict[Key, Callable[[], tuple[float, float]]], progress: Progress
) -> tuple[dict[Key, list[float]], dict[Key, list[float]]]:
    """Return the seconds of layers and of the rest, by variant and repeat."""
    spans: dict[Key, list[float]] = {key: [] for key in steps}
    rests: dict[Key, list[float]] = {key: [] for key in steps}
    progress("latency", 0, REPEATS)
    number, start = 0, time.perf_counter()
    while number < WARM_UPS + REPEATS or time.perf_counter() - start < LEAST_SECONDS:
        for key, step in steps.items():
            span, rest = step()
            if number >= WARM_UPS:
                spans[key].append(span)
                rests[key].append(rest)
        number += 1
        progress("latency", min(max(0, number - WARM_UPS), REPEATS), REPEATS)
    return spans, rests


def _timing(group: str, num_units: int, seconds: list[float]) -> Timing:
    lower, median, upper = statistics.quantiles(seconds, n=4)
    return Timing(group, num_units, median, (lower, upper))


def _slope(timings: list[Timing]) -> float:
    """Return seconds per unit by least squares. Raises RecipeError if none can be saved."""
    name, widths = timings[0].group, [timing.num_units for timing in timings]
    if len(widths) < 2:
        raise RecipeError(f"remove.target: latency has no price for {name}, of which no layer has more than one unit.")
    slope = statistics.linear_regression(widths, [timing.seconds for timing in timings]).slope
    if slope <= 0:
        table = ", ".join(f"{timing.num_units:,}: {timing.seconds * 1000:.3f} ms" for timing in timings)
        raise RecipeError(
            f"remove.target: latency has no price for {name}, since layers get no faster here with fewer units "
            f"({table}); let nothing else run meanwhile, or use target parameters or kv_bytes."
        )
    return slope
