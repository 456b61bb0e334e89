"""Measure once: what each size of a model would cost, before anything is cut.

In: a dense model. Out: a `Measurement`, and the error curves of its groups. Copies of the model are cut
to a few sizes in one walk and judged; between these sizes losses are interpolated.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur.errors import RecipeError
from secateur.log import Progress, silent, versions
from secateur.methods.curve import Profiles, curve_plan, predicted_rise
from secateur.pruning.inspect import gguf_files
from secateur.pruning.open import Opened, open_model
from secateur.pruning.prepare import Prepared, begun, judge_of, judged, judged_dense, of_sizes, prepared
from secateur.pruning.prune import shaped
from secateur.pruning.resolve import checked, nearest, resolve
from secateur.pruning.result import calibration_facts
from secateur.pruning.round_plan import profiles_of
from secateur.pruning.text import with_share_of_answers
from secateur.ranks import is_first, joined
from secateur.recipe import RECIPE_FILE, Recipe, as_recipe, dump_recipe
from secateur.report.records import LEAST_NATS, Measurement, SizeCost, nats_at
from secateur.report.size_curve import write_measurement
from secateur.stream.device import keeping_freed, peak_bytes
from secateur.stream.judge import Judgement
from secateur.stream.threads import threads_kept

# Shares of the most that can go, at which copies are cut and judged; a loss between is interpolated.
PROBES = (0.2, 0.45, 0.8)
# What is foretold: from 5% to 60% of all parameters, as far as units reach.
SHARES = tuple(percent / 100 for percent in range(5, 65, 5))
FILE_TYPES = ("bf16", "q8_0", "q4_k_m")
NOT_MEASURED = ("to", "layers", "depth", "vocabulary")
EQUAL, BY_LAYER = "equal widths", "widths by layer"
OTHER, ANSWERS = "other text", "own answers"


@joined()
@keeping_freed()
@threads_kept()
def measure(
    model: str | Path,
    recipe: Recipe | dict[str, Any] | Path | str | None = None,
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
    `curve` widths by layer are foretold, too, from a profile. `out`: the directory to write, with `result.json`,
    the error curves and `report.html`. `overwrite`, `resume`, `command`, `progress`, `tell`: as for `prune`.

    Returns the `Measurement` that `result.json` holds.

    Raises a SecateurError, one sentence, for what a user can correct.
    """
    asked, progress = as_recipe(recipe), progress if is_first() else silent
    opened = with_share_of_answers(_plain(open_model(model, asked)))
    with begun(opened, out, overwrite=overwrite, resume=resume, progress=progress, tell=tell) as services:
        directory, measurement = services.scratch, _measured(prepared(opened, services), command)
        if directory is not None:
            (directory / RECIPE_FILE).write_text(dump_recipe(asked.filled(remove={"depth": 0})), encoding="utf-8")
            measurement = write_measurement(directory, measurement)
    return measurement


def _plain(opened: Opened) -> Opened:
    """Return the model with a recipe by which units alone go. Raises RecipeError if it says how much goes."""
    recipe = opened.recipe
    said = [key for key in NOT_MEASURED if getattr(recipe.remove, key)] + ["rounds"] * (recipe.choose.rounds > 1)
    if said:
        raise RecipeError(f"measure: foretells what units cost that go in one round; leave out {' and '.join(said)}.")
    return nearest(checked(_asking(opened, recipe.choose.budget, 0.99)))


def _asking(opened: Opened, budget: str, share: float) -> Opened:
    recipe = opened.recipe.filled(remove={"share": share, "depth": 0}, choose={"budget": budget})
    evaluate = recipe.output.evaluate or True
    return opened.asking(recipe.filled(polish={"num_tokens": 0}, output={"evaluate": evaluate}))


def _measured(ready: Prepared, command: str) -> Measurement:
    """Return what sizes cost."""
    opened, run, drawn = ready.opened, ready.run, ready.drawn
    services, judge = run.services, judge_of(ready)
    assert judge is not None, "a measurement is judged"
    dense = judged_dense(ready, judge)
    sizes = {f"probe-{number}": {"share": part * opened.recipe.remove.share} for number, part in enumerate(PROBES)}
    plain = ready._replace(opened=_asking(opened, "uniform", opened.recipe.remove.share))
    members = [*of_sizes(plain, sizes).values()]

    # Slopes are those of a cut of middle size.
    profiles: Profiles = {}
    if opened.recipe.choose.budget == "curve":
        middle = members[len(members) // 2].run
        with services.log.time("profile"):
            profiles = profiles_of(middle, 1, middle.batches())

    # Sizes are those of the whole model, which is the first copy.
    shares = [share for share in SHARES if share <= opened.recipe.remove.share]
    equal = [_sized(_asking(opened, "uniform", share)) for share in shares]
    worth = [_worth_of_widths(opened, cost.removed, profiles) for cost in equal] if profiles else []
    units = sum(group.num_units * group.params_per_unit for group in run.resolved.groups) / opened.size.num_params

    # Cut the copies in one walk, and judge them.
    probes = list[SizeCost]()
    for name, shape in zip(sizes, shaped(plain, members), strict=True):
        pruned = judged(shape.run, name, judge.pruned)
        plan = shape.run.resolved.plans[-1]
        probes.append(SizeCost(plan.removed_share, plan.cost_after, _lost(dense, pruned)))

    # Foretell each size by these.
    texts = probes[0].lost
    equal = [replace(cost, lost={name: nats_at(probes, name, cost.removed, units) for name in texts}) for cost in equal]
    forms = {EQUAL: equal}
    if worth:
        forms[BY_LAYER] = [
            replace(cost, lost={name: nats * by_layer[name] for name, nats in cost.lost.items()})
            for cost, by_layer in zip(equal, worth, strict=True)
        ]
    return Measurement(
        model=opened.public_name,
        lineage=opened.lineage,
        command=command,
        dense_size=opened.size,
        calibration=calibration_facts(drawn),
        probes=tuple(probes),
        forms={name: tuple(costs) for name, costs in forms.items()},
        band=_band(probes, units),
        units=units,
        seconds=services.log.seconds,
        peak_bytes=peak_bytes(),
        warnings=ready.notes,
        versions=versions(),
        text_hash=run.text.measured_hash,
        profiles=tuple((layer, group, profile) for (layer, group), profile in profiles.items()),
    )


def _lost(dense: Judgement, pruned: Judgement) -> dict[str, float]:
    """Return the nats per token lost, by domain and by what else judges."""
    lost = {name: loss.nats_per_token - dense.domains[name].nats_per_token for name, loss in pruned.domains.items()}
    lost[OTHER] = pruned.other.nats_per_token - dense.other.nats_per_token
    return lost if pruned.answers is None else {**lost, ANSWERS: pruned.answers.nats_lost}


def _sized(asked: Opened) -> SizeCost:
    """Return an even cut to this share with its bytes by type of file; what it loses is not known yet."""
    resolved = resolve(asked)
    plan, (files, _) = resolved.plans[-1], gguf_files(asked, resolved, FILE_TYPES)
    return SizeCost(plan.removed_share, plan.cost_after, {}, {name: left for name, (_, left) in files.items()})


def _band(probes: Sequence[SizeCost], units: float) -> float:
    """Return how far off the middle probe is foretold by the others, as a mean share of its loss."""
    first, middle, last = probes
    told = {name: nats_at((first, last), name, middle.removed, units) for name in middle.lost}
    errors = [abs(told[name] / lost - 1) for name, lost in middle.lost.items() if lost > LEAST_NATS]
    return sum(errors) / max(len(errors), 1)


def _worth_of_widths(opened: Opened, share: float, profiles: Profiles) -> defaultdict[str, float]:
    """Return the part of the loss of equal widths that widths by layer have, by domain; else the mean of these."""
    resolved = resolve(_asking(opened, "curve", share))
    plan = curve_plan(resolved.groups, profiles, resolved.prices_left, share, min_keep=resolved.least_keep)
    even = {  # at the levels that are nearest to equal widths
        key: min(profiles[key].levels, key=lambda level: abs(level - count))
        for key, count in resolve(_asking(opened, "uniform", share)).plans[-1].num_keep.items()
    }
    least, most = predicted_rise(profiles, plan.num_keep), predicted_rise(profiles, even)
    worth = {name: least[name] / most[name] for name in least if most[name] > 0}
    mean = sum(worth.values()) / max(len(worth), 1)
    return defaultdict(lambda: mean, worth)
