"""Measure once: what each size of a model would cost, before anything is cut.

In: a dense model. Out: a `Measurement`, and the error curves of its groups. Copies of the model are
cut to a few sizes in one walk and judged; between these sizes losses are interpolated.
"""

from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from secateur.evaluation.bench import seconds_per_token
from secateur.log import Progress, Tell, human_bytes, mute, silent, versions
from secateur.pruning.cost import disk_bytes, memory_for, walk_seconds
from secateur.pruning.cut import cut_and_polish
from secateur.pruning.inspect import gguf_files
from secateur.pruning.loop import profiles_of
from secateur.pruning.open import Opened, open_model
from secateur.pruning.prepare import (
    Prepared,
    begun_run,
    foretold,
    judged,
    judged_dense,
    prepared,
)
from secateur.pruning.resolve import nearest, resolve
from secateur.pruning.sizes import STEPS, at_size, check_apart, of_sizes, with_most
from secateur.pruning.text import completed
from secateur.ranks import from_first, joined
from secateur.recipe import AnyRecipe, Recipe, as_recipe, write_recipe
from secateur.report.records import LEAST_NATS, Measurement, SizeCost, nats_at
from secateur.report.report import write_measurement

# Shares at which copies are cut and judged: sizes that people ask for, which need no interpolation
# then. Where less than `MOST` can go they are as much closer together.
PROBES, MOST = (0.1, 0.3, 0.4), 0.5
COPIES = len(PROBES)
# Of equal widths.
EVEN: Any = {"choose": {"budget": "uniform"}}
DOES = "foretells what it costs to remove up to"
# What is foretold: from 5% to 60% of all parameters, as far as units reach.
PERCENTS = range(5, 65, 5)


@joined()
def measure(
    model: str | Path,
    recipe: AnyRecipe = None,
    *,
    out: Path | str,
    overwrite: bool = False,
    command: str = "",
    progress: Progress = silent,
    tell: Tell = mute,
) -> Measurement:
    """Foretell what each size of a model would cost, before anything is cut.

    Copies of the model are cut to three sizes in one walk and judged, as `prune` without a polish
    would; losses between are interpolated. `model`, `recipe`: as for `prune`; the recipe does not
    say how much goes. With budget `curve` the groups' error curves are kept, too, by which `prune`
    plans widths. `out`: the directory to write, with `result.json` and `report.html`. `overwrite`,
    `command`, `progress`, `tell`: as for `prune`.

    Returns the `Measurement` that `result.json` holds.

    Raises a SecateurError, one sentence, for what a user can correct.
    """
    given = as_recipe(recipe)
    opened = _opened(model, given, weights=True)
    with begun_run(opened, out, overwrite=overwrite, progress=progress, tell=tell) as services:
        ready = prepared(opened, services, does=DOES, num_models=COPIES, num_results=0)
        measurement = _measured(ready, command)
        if (directory := services.scratch) is not None:
            # With what the model decided, so that `prune` by it may say the same, and another
            # model's keys are told.
            resolved = ready.run.resolved.recipe
            given = given.filled(
                remove={"depth": 0, "groups": resolved.remove.groups},
                repair=vars(resolved.repair),
                calibration=vars(resolved.calibration),
            )
            write_recipe(directory, given)
            (directory / STEPS).mkdir()
            services.store.hand_on(directory / STEPS)
            measurement = write_measurement(directory, measurement)
    return measurement


def foretell_measure(model: str | Path, recipe: AnyRecipe = None) -> str:
    """Return what `measure` would do and take, as a sentence; the model needs no weights. Errors:
    as `measure`.
    """
    opened = _opened(model, as_recipe(recipe), weights=False)
    resolved = resolve(opened)
    plan = memory_for(opened, resolved)
    return (
        f"{foretold(opened, resolved, plan, DOES, COPIES)} It takes "
        f"{human_bytes(disk_bytes(opened, resolved, plan, COPIES, 0))} of disk and about "
        f"{timedelta(seconds=round(walk_seconds(opened, resolved, COPIES)))} here before the "
        "copies are judged."
    )


def _opened(model: str | Path, given: Recipe, *, weights: bool) -> Opened:
    """Return the model with the most that goes. Raises RecipeError for a model of which the least
    copy is none.
    """
    opened = open_model(model, given, weights=weights)
    plain = given.filled(
        polish={"num_tokens": 0}, output={"evaluate": given.output.evaluate or True}
    )
    opened = completed(with_most(opened.asking(plain), given, "measure", least=PERCENTS[0] / 100))
    check_apart(opened.filled(**EVEN), _probed(opened))
    return opened


def _measured(ready: Prepared, command: str) -> Measurement:
    """Return what sizes cost."""
    opened, run, drawn = ready.opened, ready.run, ready.drawn
    services = run.services
    judge, dense = judged_dense(ready)
    sizes = {f"probe-{number}": {"share": share} for number, share in enumerate(_probed(opened))}
    even = opened.filled(**EVEN)
    ready = ready._replace(run=replace(run, keeps_statistics=run.can_mix))
    runs = [member.run for member in of_sizes(ready, even.recipe, sizes).values()]

    # Slopes are those of a cut of middle size.
    profiles = {}
    if opened.recipe.choose.budget == "curve":
        middle = runs[COPIES // 2]
        with services.log.time("profile"):
            profiles = profiles_of(middle, 1, middle.batches())

    # Sizes are those of the whole model, which is the first copy.
    least = nearest(at_size(even, {"share": 1e-6})).recipe.remove.share
    percents = [
        percent for percent in PERCENTS if least <= percent / 100 <= opened.recipe.remove.share
    ]
    costs = [_cost(at_size(even, {"share": percent / 100})) for percent in percents]
    units = run.resolved.of_units

    # Cut the copies in one walk, and judge them.
    probes = list[SizeCost]()
    for name, cut in zip(sizes, cut_and_polish(run, runs), strict=True):
        pruned = judged(cut.run, name, partial(judge.pruned, speaks=False))
        plan = cut.run.resolved.plans[-1]
        probes.append(SizeCost(plan.removed_share, plan.cost_after, pruned.lost(dense)))

    # Time them, on one rank.
    models, length = [member.model for member in runs], run.text.sequence_length
    with services.log.time("bench"):
        pace = from_first(partial(seconds_per_token, models, length, services.progress))

    # Foretell each size by these.
    texts = probes[0].lost
    costs = [
        replace(cost, lost={name: nats_at(probes, name, cost.removed, units) for name in texts})
        for cost in costs
    ]
    return Measurement(
        model=opened.public_name,
        lineage=opened.lineage,
        command=command,
        dense_size=opened.size,
        calibration=drawn.facts(),
        probes=tuple(probes),
        sizes=tuple(costs),
        band=_band(probes, units),
        units=units,
        pace=tuple(pace),
        seconds=services.log.seconds,
        warnings=ready.notes,
        versions=versions(),
        text_hash=run.text.measured_hash,
        profiles=tuple((layer, group, profile) for (layer, group), profile in profiles.items()),
    )


def _probed(opened: Opened) -> list[float]:
    """Return the shares at which copies are cut. `opened`: with the most that can go."""
    return [share * min(1.0, opened.recipe.remove.share / MOST) for share in PROBES]


def _cost(opened: Opened) -> SizeCost:
    """Return a cut to the recipe's share with its bytes by type of file; what it loses is not known
    yet.
    """
    resolved = resolve(opened)
    plan, (files, _) = resolved.plans[-1], gguf_files(opened, resolved)
    return SizeCost(
        plan.removed_share, plan.cost_after, {}, {name: left for name, (_, left) in files.items()}
    )


def _band(probes: Sequence[SizeCost], units: float) -> float:
    """Return how far off the middle probe is foretold by the others, as a mean share of its
    loss.
    """
    first, middle, last = probes
    expected = {name: nats_at((first, last), name, middle.removed, units) for name in middle.lost}
    errors = [
        abs(expected[name] / lost - 1) for name, lost in middle.lost.items() if lost > LEAST_NATS
    ]
    return sum(errors) / max(len(errors), 1)
