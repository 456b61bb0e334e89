"""Measure once: what each size of a model would cost, before anything is cut.

In: a dense model. Out: a `Measurement`, and the error curves of its groups. Copies of the model are cut
to a few sizes in one walk and judged; between these sizes losses are interpolated.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
from torch.utils.benchmark import Timer

from secateur.log import Progress, human_bytes, silent, versions
from secateur.methods.curve import Profiles
from secateur.pruning.cost import HELD_OUT_FACTOR, disk_bytes, memory_for
from secateur.pruning.inspect import gguf_files
from secateur.pruning.open import Opened, open_model
from secateur.pruning.prepare import (
    Prepared,
    begun,
    foretold,
    judge_of,
    judged,
    judged_dense,
    of_sizes,
    prepared,
    sized,
    with_most,
)
from secateur.pruning.prune import shaped
from secateur.pruning.resolve import Resolved, resolve
from secateur.pruning.result import calibration_facts
from secateur.pruning.round_plan import profiles_of
from secateur.pruning.text import with_share_of_answers
from secateur.ranks import is_first, joined
from secateur.recipe import RECIPE_FILE, AnyRecipe, Recipe, as_recipe, dump_recipe
from secateur.report.records import LEAST_NATS, OTHER_TEXT, OWN_ANSWERS, Measurement, SizeCost, nats_at
from secateur.report.size_curve import write_measurement
from secateur.stream.device import keeping_freed
from secateur.stream.judge import Judgement
from secateur.stream.threads import fastest_threads, threads_kept

# Shares of the most that can go, at which copies are cut and judged; a loss between is interpolated.
PROBES = (0.2, 0.45, 0.8)
COPIES = len(PROBES)
DOES = "foretells what it costs to remove up to"
# What is foretold: from 5% to 60% of all parameters, as far as units reach.
PERCENTS = range(5, 65, 5)
FILE_TYPES = ("bf16", "q8_0", "q4_k_m")


@joined()
@keeping_freed()
@threads_kept()
def measure(
    model: str | Path,
    recipe: AnyRecipe = None,
    *,
    out: Path | str,
    overwrite: bool = False,
    resume: bool = False,
    command: str = "",
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda text: None,
) -> Measurement:
    """Foretell what each size of a model would cost, before anything is cut.

    Copies of the model are cut to three sizes in one walk and judged, as `prune` without a polish would; losses
    between are interpolated. `model`, `recipe`: as for `prune`; the recipe does not say how much goes. With budget
    `curve` the groups' error curves are kept, too, by which `prune` plans widths. `out`: the directory to write,
    with `result.json` and `report.html`. `overwrite`, `resume`, `command`, `progress`, `tell`: as for `prune`.

    Returns the `Measurement` that `result.json` holds.

    Raises a SecateurError, one sentence, for what a user can correct.
    """
    asked, progress = as_recipe(recipe), progress if is_first() else silent
    opened = _opened(model, asked, weights=True)
    with begun(opened, out, overwrite=overwrite, resume=resume, progress=progress, tell=tell) as services:
        ready = prepared(opened, services, does=DOES, num_models=COPIES, num_results=0)
        directory, measurement = services.scratch, _measured(ready, command)
        if directory is not None:
            (directory / RECIPE_FILE).write_text(dump_recipe(asked.filled(remove={"depth": 0})), encoding="utf-8")
            measurement = write_measurement(directory, measurement)
    return measurement


def foretell_measure(model: str | Path, recipe: AnyRecipe = None) -> str:
    """Return what `measure` would do and take, as a sentence; the model needs no weights. Errors: as `measure`."""
    opened = _opened(model, as_recipe(recipe), weights=False)
    resolved = resolve(opened)
    plan = memory_for(opened, resolved)
    return (
        f"{foretold(opened, resolved, plan, DOES, COPIES)} It takes "
        f"{human_bytes(disk_bytes(opened, resolved, plan, COPIES, 0))} of disk and about "
        f"{timedelta(seconds=round(_seconds(opened, resolved)))} here before the copies are judged."
    )


def _seconds(opened: Opened, resolved: Resolved) -> float:
    """Return about how long a walk with the copies of a model takes here: its products, without judging.

    Each token goes through a layer once for the dense stream, and for each copy through the whole layer and what
    is left of its FFN. A reader of F inputs takes F^2 for each token and 9 F^3 for its units and its fit. The
    speed is that of a float32 product that is timed now.
    """
    num_tokens = HELD_OUT_FACTOR * resolved.num_tokens
    once = num_tokens * sum(opened.arch.params_per_layer)
    fits = sum(group.num_inputs**2 * (num_tokens + 9 * group.num_inputs) for group in resolved.groups)
    square = torch.ones(1024, 1024, device=opened.device)
    threads = fastest_threads(lambda: square @ square)
    timer = Timer("square @ square", globals={"square": square}, num_threads=threads)
    return (once + COPIES * (1.7 * once + fits)) * timer.timeit(4).median / 1024**3


def _opened(model: str | Path, asked: Recipe, *, weights: bool) -> Opened:
    """Return the model with the most that goes."""
    opened = open_model(model, asked, weights=weights)
    plain = asked.filled(polish={"num_tokens": 0}, output={"evaluate": asked.output.evaluate or True})
    return with_share_of_answers(with_most(opened.asking(plain), asked, "measure"))


def _measured(ready: Prepared, command: str) -> Measurement:
    """Return what sizes cost."""
    opened, run, drawn = ready.opened, ready.run, ready.drawn
    services, judge = run.services, judge_of(ready)
    assert judge is not None, "a measurement is judged"
    dense = judged_dense(ready, judge)
    sizes = {f"probe-{number}": {"share": part * opened.recipe.remove.share} for number, part in enumerate(PROBES)}
    even = opened.asking(opened.recipe.filled(choose={"budget": "uniform"}))
    members = [*of_sizes(ready, even.recipe, sizes).values()]

    # Slopes are those of a cut of middle size.
    profiles: Profiles = {}
    if opened.recipe.choose.budget == "curve":
        middle = members[len(members) // 2].run
        with services.log.time("profile"):
            profiles = profiles_of(middle, 1, middle.batches())

    # Sizes are those of the whole model, which is the first copy.
    percents = [percent for percent in PERCENTS if percent / 100 <= opened.recipe.remove.share]
    costs = [_cost(sized(even, {"share": percent / 100})) for percent in percents]
    units = run.resolved.of_units

    # Cut the copies in one walk, and judge them.
    probes = list[SizeCost]()
    for name, shape in zip(sizes, shaped(ready, members), strict=True):
        pruned = judged(shape.run, name, partial(judge.pruned, speaks=False))
        plan = shape.run.resolved.plans[-1]
        probes.append(SizeCost(plan.removed_share, plan.cost_after, _lost(dense, pruned)))

    # Foretell each size by these.
    texts = probes[0].lost
    costs = [replace(cost, lost={name: nats_at(probes, name, cost.removed, units) for name in texts}) for cost in costs]
    return Measurement(
        model=opened.public_name,
        lineage=opened.lineage,
        command=command,
        dense_size=opened.size,
        calibration=calibration_facts(drawn),
        probes=tuple(probes),
        sizes=tuple(costs),
        band=_band(probes, units),
        units=units,
        seconds=services.log.seconds,
        warnings=ready.notes,
        versions=versions(),
        text_hash=run.text.measured_hash,
        profiles=tuple((layer, group, profile) for (layer, group), profile in profiles.items()),
    )


def _lost(dense: Judgement, pruned: Judgement) -> dict[str, float]:
    """Return the nats per token lost, by domain and by what else judges."""
    lost = {name: loss.nats_per_token - dense.domains[name].nats_per_token for name, loss in pruned.domains.items()}
    lost[OTHER_TEXT] = pruned.other.nats_per_token - dense.other.nats_per_token
    return lost if pruned.answers is None else {**lost, OWN_ANSWERS: pruned.answers.nats_lost}


def _cost(asked: Opened) -> SizeCost:
    """Return a cut to this share with its bytes by type of file; what it loses is not known yet."""
    resolved = resolve(asked)
    plan, (files, _) = resolved.plans[-1], gguf_files(asked, resolved, FILE_TYPES)
    return SizeCost(plan.removed_share, plan.cost_after, {}, {name: left for name, (_, left) in files.items()})


def _band(probes: Sequence[SizeCost], units: float) -> float:
    """Return how far off the middle probe is foretold by the others, as a mean share of its loss."""
    first, middle, last = probes
    told = {name: nats_at((first, last), name, middle.removed, units) for name in middle.lost}
    errors = [abs(told[name] / lost - 1) for name, lost in middle.lost.items() if lost > LEAST_NATS]
    return sum(errors) / max(len(errors), 1)
