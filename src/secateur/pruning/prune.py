"""One prune: open, tokens, resolve, text, load, layers, rounds, polish, save, verify, result, report.

All that can be checked without weights is checked before a weight is read.
`api.prune` adds recovery.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import NamedTuple

from secateur.errors import RecipeError
from secateur.log import Progress, Tell
from secateur.model.kept_units import Keeps
from secateur.model.stock import CausalLM, Tokenizer, eval_mode
from secateur.pruning.like import Measured, opened_like, recipe_like, recipe_over
from secateur.pruning.loop import prune_together, remove_depth
from secateur.pruning.open import Opened, open_model, tokenizer_of
from secateur.pruning.prepare import (
    Prepared,
    Sizes,
    begun,
    judge_of,
    judged,
    judged_dense,
    largest_of,
    of_sizes,
    prepared,
    with_most,
)
from secateur.pruning.resolve import checked
from secateur.pruning.result import Result, calibration_facts, save_and_prove, summary_of
from secateur.pruning.run import Run, text_losses
from secateur.pruning.text import with_share_of_answers
from secateur.pruning.trimmed import without_tokens
from secateur.ranks import size
from secateur.recipe import RECIPE_FILE, Recipe, load_recipe
from secateur.recovery.polish import learn, polish
from secateur.report.measured import PolishRecord
from secateur.report.records import LEAST_NATS, Summary, nats_at
from secateur.result_directory import RESULT_FILE
from secateur.stream.device import keeping_freed, peak_bytes, peak_bytes_on
from secateur.stream.threads import threads_kept

# A limit on the loss: how many cuts look for it at most, and the part of it by which one is near enough.
NUM_CUTS, NEAR = 3, 0.9
# Without a measured curve: nats per token for each time that 1 - 1/e of the units go. Small models lose so many.
GUESSED_NATS = 2.0

# Writes card, result.json and page into the run's directory; returns the summary as it was written.
Finish = Callable[[Path, Summary, Recipe], Summary]


@keeping_freed()
@threads_kept()
def prune_run(
    model: CausalLM | str | Path,
    recipe: Recipe,
    *,
    finish: Finish,
    out: Path | str | None,
    like: Path | str | None = None,
    tokenizer: Tokenizer | None,
    overwrite: bool,
    resume: bool,
    force: bool = False,
    command: str,
    progress: Progress,
    tell: Tell,
    from_: Path | str | None,
    sizes: Sizes | None = None,
    max_loss: float | None = None,
) -> list[Result]:
    """Prune a causal LM, without the recipe's `recover`. Arguments, errors: see `api.prune`.

    `finish`: writes what people read of a finished run. `sizes`: each goes into a directory of its name
    below `out`.
    """
    if max_loss is not None and not max_loss > 0:
        raise RecipeError(f"max_loss: give nats per token above 0, got {max_loss}.")
    if max_loss is not None and like is not None:
        raise RecipeError("max_loss: says how much goes, and so does like; leave out one of them.")
    asked = recipe
    recipe = recipe if like is None else recipe_like(Path(like), recipe)
    measured = None if from_ is None else Measured.of(Path(from_))
    recipe = recipe if from_ is None else recipe_over(load_recipe(Path(from_, RECIPE_FILE)), recipe)
    opened = open_model(model, recipe, tokenizer)
    if measured is not None:
        measured.check_model(opened)
    opened = with_share_of_answers(checked(opened if like is None else opened_like(opened, Path(like))))
    base, is_alone = opened, sizes is None and max_loss is None
    num_models = num_results = len(sizes or "1")
    if sizes is not None:
        opened = largest_of(opened, sizes)
    elif max_loss is not None:
        # The model as it is, the best cut so far, and the one that is cut.
        opened, num_models = with_most(opened, asked, "max_loss"), 3
    # Sizes that are finished serve another run with other ones beside them.
    with begun(base, out, overwrite=overwrite, resume=resume, progress=progress, tell=tell) as services:
        if is_alone and services.scratch is not None:
            services.log.append_to(services.scratch)
        does = "removes" if is_alone else "removes up to"
        ready = prepared(opened, services, does=does, num_models=num_models, num_results=num_results)
        if measured is not None:
            if max_loss is not None or "calibration" not in asked.model_fields_set:
                measured.check_text(ready.run)
            ready = ready._replace(run=replace(ready.run, profiles=measured.profiles))
        if measured or max_loss:
            given = f"{max_loss} {measured and measured.record.files[RESULT_FILE]}"
            services.store.check_input("limit or measurement", given)
        with eval_mode(ready.run.model):
            members = {"": ready} if sizes is None else of_sizes(ready, base.recipe, sizes)
            cut = shaped(ready, [*members.values()], force=force)
            if max_loss is not None:
                cut = _within(ready, measured, max_loss)
            results = list(_pruned(ready, members, cut, command, finish))
    return [replace(each, out=out and Path(out) / name) for name, each in zip(members, results, strict=True)]


def _pruned(
    ready: Prepared, members: Mapping[str, Prepared], cut: Iterator["Shaped"], command: str, finish: Finish
) -> Iterator[Result]:
    """Yield the result of each member, once it is cut and written to the run's directory, if there is one."""
    services, judge = ready.run.services, judge_of(ready)
    dense = None if judge is None else judged_dense(ready, judge)
    for name, (member, run, keeps, polished) in zip(members, cut, strict=True):
        opened, placement, directory, log = member.opened, member.placement, run.services.scratch, run.services.log
        peak, pruned = peak_bytes(), None if judge is None else judged(run, f"pruned {name}".strip(), judge.pruned)
        services.store.note_found()
        device_peak = peak_bytes_on(opened.device)
        placement.offload()
        proof = None if directory is None else save_and_prove(opened, run, keeps, directory)
        summary = summary_of(
            opened,
            run,
            keeps,
            proof,
            command=command,
            calibration=calibration_facts(ready.drawn),
            lineage=opened.lineage,
            polish=polished,
            dense_losses=dense.domains if dense else {},
            pruned_losses=pruned.domains if pruned else {},
            other_text=dense and pruned and (dense.other, pruned.other),
            own_answers=pruned and pruned.answers,
            peak_bytes=peak,
            device_peak_bytes=device_peak,
        )
        if directory is not None:
            log.write({"event": "seconds", **summary.seconds})
            summary = finish(directory, summary, run.resolved.recipe)
        yield Result(run.model, tokenizer_of(opened), run.resolved.recipe, keeps, run.resolved.layers, summary)


class Shaped(NamedTuple):
    """A member with its model cut and polished, and which units stay."""

    member: Prepared
    run: Run
    keeps: Keeps
    polish: PolishRecord | None


def shaped(
    ready: Prepared, members: Sequence[Prepared] = (), *, force: bool = False, cut: bool = True
) -> Iterator[Shaped]:
    """Take tokens, layers and units from the models, in place, and polish them; yield each when it is done.

    `members`: sizes of the one that is `ready`; none: itself. `force`: a trim may cost more than was
    foretold. Without `cut` the dense model is polished, by what the recipe would polish the pruned one by.
    """
    members = members or [ready]
    opened, runs, services = ready.opened, [member.run for member in members], ready.run.services
    if opened.trim is not None:
        runs = [without_tokens(runs[0], opened.trim, force=force)]
    first = runs[0]
    walked = cut and _walk_has_dense_states(opened, first)
    lesson = learn(first.model, first.arch, first.text, first.resolved.recipe, services, walked=walked)
    if lesson is not None and walked:
        runs[0] = replace(first, after_dense=partial(lesson.take_states, first.model))

    # Whole layers go first, then units, round by round. Models of equal layers have one dense stream.
    keeps = dict[int, Keeps]()
    if cut:
        with services.log.time("prune"):
            runs = [remove_depth(run) for run in runs]
            whole = [run for run in runs if not run.resolved.depth]
            alone = [[run] for run in runs if run.resolved.depth]
            pairs = [zip(some, prune_together(some), strict=True) for some in (whole, *alone) if some]
            keeps = {id(run): each for some in pairs for run, each in some}

    for member, run in zip(members, runs, strict=True):
        polished = None
        if lesson is not None:
            with member.placement.on_host():
                polished = polish(run.model, lesson, first.resolved.recipe.seed, run.services, opened.device)
        yield Shaped(member, run, keeps.get(id(run), Keeps()), polished)


def _within(ready: Prepared, measured: Measured | None, max_loss: float) -> Iterator[Shaped]:
    """Yield the largest of a few cuts that loses no more nats per token of held-out text, polish included.

    That text is of the dense model's answers, if the run learns by some, else of all domains. The first size is
    the one at which the measured curve reaches the limit, or a guessed one; for the next ones the curve is scaled
    to what the last cut has lost. Raises RecipeError if none of them loses so little.
    """
    run, resolved, services = ready.run, ready.run.resolved, ready.run.services
    answers = [name for name, domain in resolved.recipe.calibration.domains.items() if domain.answers]
    text = {name: run.held_out[name] for name in answers or run.held_out}
    units, step = resolved.of_units, resolved.step / resolved.prices.total

    def foretold(steps: int) -> float:
        if measured is None:
            return -GUESSED_NATS * math.log1p(-steps * step / units)
        return mean(nats_at(measured.record.probes, name, steps * step, units) for name in text)

    def nats(run: Run, which: str) -> float:
        return mean(loss.nats_per_token for loss in text_losses(run, which, text).values())

    dense, factor, lost = nats(run, "held-out text"), 1.0, dict[int, float]()
    best, fits, fails, notes = None, 0, int(resolved.largest / step) + 1, list[str]()
    for number in range(1, NUM_CUTS + 1):
        # The most steps of the widths that the curve allows; a guess ends at a power law through both sides.
        more = range(fits + 1, fails)
        steps = max(1, fits + bisect_right(more, max_loss, key=lambda steps: factor * foretold(steps)))
        if measured is None and fits and fails in lost:
            least = max(lost[fits], LEAST_NATS)
            steps = int(fits * (fails / fits) ** (math.log(max_loss / least) / math.log(lost[fails] / least)))
        if steps not in more:
            break

        # Cut a copy; its lines are those of the run only if it is chosen.
        part = ready._replace(run=replace(run, services=replace(services, scratch=None)))
        sizes = {f"cut-{number}": {"share": round(steps * step, 6)}}
        [member] = of_sizes(part, ready.opened.recipe, sizes, stays=True).values()
        [shape] = shaped(member)
        lost[steps] = nats(shape.run, "held-out text, cut") - dense
        factor = lost[steps] / foretold(steps)
        notes.append(
            f"max_loss: without {shape.run.resolved.plans[-1].removed_share:.1%} of all parameters it loses "
            f"{lost[steps]:.3f} nats per token of held-out text ({', '.join(text)}), of {max_loss:g} that it may."
        )
        services.tell(notes[-1])
        if lost[steps] > max_loss:
            fails = steps
        else:
            best, fits = shape, steps
        if NEAR * max_loss <= lost[steps] <= max_loss:
            break
    if best is None:
        raise RecipeError(f"{notes[-1].removesuffix('.')}; allow more, or polish with more tokens.")

    # What is written is written as by a run of its own.
    chosen = replace(best.run.services, scratch=services.scratch)
    if chosen.scratch is not None:
        chosen.log.append_to(chosen.scratch)
    for note in notes:
        chosen.log.write({"event": "note", "text": note})
    yield best._replace(run=replace(best.run, services=chosen))


def _walk_has_dense_states(opened: Opened, run: Run) -> bool:
    """Whether the prune's dense stream ends in what the polish asks the dense model for, on the same text."""
    resolved = run.resolved
    whole = opened.trim is None and not resolved.depth and size() == 1
    walks_once = len(resolved.plans) == 1 and resolved.removals[0] > 0 and resolved.target_mix > 0
    return whole and walks_once
