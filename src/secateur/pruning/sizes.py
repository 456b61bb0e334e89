"""Sizes of one model: copies that are cut to several, and the largest cut whose loss a limit
allows.

In: a run whose model is dense, and keys of `remove` by the name of a size. Out: a run for each, on
a copy; or the cut that is chosen. What `measure` found says where to look first.
"""

import copy
import math
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean

from secateur.errors import CheckpointError, RecipeError
from secateur.log import Progress, versions
from secateur.methods.budget import Profiles
from secateur.pruning.cost import with_polish_that_fits
from secateur.pruning.cut import Cut, cut_and_polish
from secateur.pruning.like import KEEP_FILE
from secateur.pruning.open import Opened, onload
from secateur.pruning.prepare import Prepared
from secateur.pruning.resolve import checked, nearest, resolve
from secateur.pruning.run import Run, Supports, text_losses
from secateur.recipe import RECIPE_FILE, Keys, Recipe, load_recipe, parse_recipe, recipe_over
from secateur.report.records import LEAST_NATS, Measurement, nats_at
from secateur.result_directory import RESULT_FILE, mismatches, read_digests
from secateur.store import Store, changes_of

# Where a measurement keeps what serves its cuts.
STEPS = "steps"
# Keys that a prune by a measurement may have of its own.
FREE: Keys = {"remove": {"share", "to"}, "polish": True, "recover": True, "machine": True}
# What is to go, by the name of a size: keys of the recipe's `remove`.
Sizes = Mapping[str, Keys]
# A limit on the loss: how many cuts look for it at most, and the part of it by which one is near
# enough.
NUM_CUTS, NEAR = 3, 0.9
# Without a measured curve: nats per token for each time that 1 - 1/e of the units go. Small models
# lose so many.
GUESSED_NATS = 2.0


def check_asked(
    given: Recipe, like: Path | str | None, from_: Path | str | None, max_loss: float | None
) -> None:
    """Raise RecipeError for what a prune does not take, or not together. Arguments: of `prune`."""
    if given.recover is not None:
        raise RecipeError(
            "recover: is what secateur recover reads, once a model is pruned; leave it out of a "
            "prune."
        )
    if max_loss is not None and not 0 < max_loss < math.inf:
        raise RecipeError(f"max_loss: give a number of nats per token above 0, got {max_loss}.")
    for name, other in (("max_loss", max_loss), ("from", from_)):
        if like is not None and other is not None:
            raise RecipeError(
                f"{name}: does not go with like, which says what goes; leave out one of them."
            )


def at_size(opened: Opened, remove: Keys) -> Opened:
    """Return the model with these keys of `remove`. Raises RecipeError for what cannot be."""
    return checked(opened.filled(remove=remove))


def with_most(opened: Opened, given: Recipe, verb: str, least: float = 0.0) -> Opened:
    """Return the model with the most that units alone can give, for a run of which `verb` says how
    much goes.

    Raises RecipeError if the recipe that was `given` says it too, or what copies of a model cannot
    do, or if the most is less than `least`.
    """
    if given.remove.depth or given.remove.model_fields_set & {"share", "to", "layers"}:
        raise RecipeError(
            f"{verb}: goes over all sizes that units alone can give; leave out remove.share, to, "
            "layers and depth."
        )
    _check_copies(opened.recipe)
    most = nearest(at_size(opened, {"share": 0.99, "depth": 0}))
    if (share := most.recipe.remove.share) < least:
        raise RecipeError(
            f"{verb}: at most {share:.1%} of all parameters can go, and the least size is "
            f"{least:.0%}; give more groups (remove.groups), or let tokens go (remove.vocabulary "
            "of prune)."
        )
    return most


def check_apart(opened: Opened, shares: Sequence[float]) -> None:
    """Raise RecipeError unless the shares can be removed and are cuts to different sizes."""
    left = {resolve(at_size(opened, {"share": share})).plans[-1].cost_after for share in shares}
    if len(left) < len(shares):
        raise RecipeError(
            f"measure: units are so coarse that {len(shares)} copies have {len(left)} sizes; lower "
            "remove.align, or give more groups (remove.groups)."
        )


def largest_of(opened: Opened, sizes: Sizes) -> Opened:
    """Return the model with the size of which most goes. Raises RecipeError for a size that cannot
    be.
    """
    _check_copies(opened.recipe)
    return max(
        (at_size(opened, remove) for remove in sizes.values()),
        key=lambda one: resolve(one).plans[-1].removed_share,
    )


def _check_copies(recipe: Recipe) -> None:
    remove, choose, machine = recipe.remove, recipe.choose, recipe.machine
    if remove.vocabulary or choose.rounds > 1 or machine.memory_budget or machine.device_budget:
        raise RecipeError(
            "remove: several sizes, or a limit on the loss, go in one round each, on copies of all "
            "weights and with all tokens; leave out rounds, memory_budget, device_budget and "
            "vocabulary, or prune to one size at a time."
        )


def of_sizes(
    ready: Prepared, recipe: Recipe, sizes: Sizes, *, stays: bool = False
) -> dict[str, Prepared]:
    """Return a run for each size, by its name: on a copy of the dense model, and on the same text.

    `recipe`: that all share. `stays`: the model that is ready is none of them. Raises RecipeError
    where the weights do not fit the device.
    """
    opened, dense, drawn, placement, notes = ready
    if placement.one_at_a_time:
        raise RecipeError(
            "remove: several sizes at once need all weights on the device; prune to one size at a "
            "time."
        )
    with placement.on_host():
        models = [] if stays else [opened.model]
        models += [copy.deepcopy(opened.model) for _ in range(len(models), len(sizes))]
    base = recipe.model_copy(update={"calibration": dense.resolved.recipe.calibration})
    members = dict[str, Prepared]()
    for (name, remove), model in zip(sizes.items(), models, strict=True):
        member = at_size(replace(opened, model=model, recipe=base), remove)
        resolved = with_polish_that_fits(member, resolve(member))
        place = placement
        if model is not opened.model:
            place = onload(member, in_float32=placement.in_float32)
        services = dense.services.part(name)
        services.store.check_input("size", f"{remove}")
        run = replace(
            dense, model=model, resolved=resolved, services=services, on_host=place.on_host
        )
        members[name] = Prepared(member, run, drawn, place, notes)
    return members


@dataclass(frozen=True, slots=True)
class MeasuredSizes:
    """A directory of `measure`, and its record."""

    directory: Path
    record: Measurement

    @classmethod
    def of(cls, directory: Path) -> "MeasuredSizes":
        """Read the directory. Raises CheckpointError if it is none that `measure` wrote, or is
        damaged.
        """
        path = directory / RESULT_FILE
        if (directory / KEEP_FILE).is_file():
            raise CheckpointError(
                f"from {directory}: is a result of prune; give what secateur measure MODEL DIR "
                "writes."
            )
        if not path.is_file():
            raise CheckpointError(
                f"from {directory}: has no {RESULT_FILE}; give a directory that measure has "
                "written."
            )
        if read_digests(directory) is None:
            raise CheckpointError(
                f"from {directory}: {RESULT_FILE} was changed since; measure again."
            )
        return cls(directory, Measurement.from_json(path.read_bytes(), str(path)))

    @property
    def digest(self) -> str:
        """The sha256 of its record."""
        return self.record.files[RESULT_FILE]

    def recipe_with(self, given: Recipe) -> Recipe:
        """Return its recipe with the keys given. Raises RecipeError for those that change what was
        measured.
        """
        base = load_recipe(self.directory / RECIPE_FILE)
        measured, recipe = parse_recipe(base, RECIPE_FILE), recipe_over(base, given)
        before, now = (one.model_dump(mode="json", exclude=FREE) for one in (measured, recipe))
        if changes := changes_of(before, now):
            raise RecipeError(
                f"from {self.directory}: {changes[0]}; leave it out, or measure with it."
            )
        return recipe

    def steps(self, progress: Progress) -> Store:
        """Return what the dense model answered and lost. Raises CheckpointError if a file is not as
        it was written.
        """
        for wrong in mismatches(self.directory, self.record.files, progress):
            if wrong.what in self.record.files:
                raise CheckpointError(
                    f"from {self.directory}: {wrong.what} was changed since; measure again."
                )
        return Store(self.directory / STEPS)

    def check_model(self, opened: Opened) -> None:
        """Raise CheckpointError if it is of another model or version."""
        measured, record = self.record.versions, self.record
        if record.lineage[-1].fingerprint != opened.lineage[-1].fingerprint:
            raise self._other(f"is of another model, {record.model}")
        for name, version in versions().items():
            if measured.get(name) != version:
                raise self._other(
                    f"was measured with {name} {measured.get(name)}, and here is {version}"
                )

    def served(self, run: Run) -> Run:
        """Return the run by what was measured. Raises CheckpointError if that was on another
        text.
        """
        record = self.record
        if record.text_hash != run.text.measured_hash:
            raise self._other("was measured on another text than the domains give now")
        profiles: Profiles = {(layer, group): profile for layer, group, profile in record.profiles}
        cuts = {
            probe.removed: Store(self.directory / STEPS / f"probe-{n}")
            for n, probe in enumerate(record.probes)
        }
        supports = Supports(cuts, record.units) if run.can_mix else None
        return replace(
            run, measured=self.directory.resolve().name, profiles=profiles, supports=supports
        )

    def _other(self, how: str) -> CheckpointError:
        return CheckpointError(f"from {self.directory}: {how}; measure again, or leave it out.")


def cut_within(
    ready: Prepared, measured: MeasuredSizes | None, max_loss: float
) -> Iterator[tuple[Prepared, Cut]]:
    """Yield the largest of a few cuts that loses no more nats per token of held-out text, and what
    it was cut from.

    A polish is included. The text is of the dense model's answers, if the run learns by some, else
    of all domains. The first size is the one at which the measured curve reaches the limit, or a
    guessed one; for the next ones the curve is scaled to what the last cut has lost. Raises
    RecipeError if none of them loses so little.
    """
    run, resolved, services = ready.run, ready.run.resolved, ready.run.services
    text = {
        name: run.held_out[name] for name in resolved.recipe.calibration.answered or run.held_out
    }
    units, step = resolved.of_units, resolved.step / resolved.prices.total

    def foretold(steps: int) -> float:
        if measured is None:
            return -GUESSED_NATS * math.log1p(-steps * step / units)
        return mean(nats_at(measured.record.probes, name, steps * step, units) for name in text)

    def nats(run: Run, which: str) -> float:
        return mean(loss.nats_per_token for loss in text_losses(run, which, text).values())

    dense, factor, lost = nats(run, "held-out text"), 1.0, dict[int, float]()
    best, fits, fails, notes = None, 0, int(round(resolved.largest / step, 6)) + 1, list[str]()
    for number in range(1, NUM_CUTS + 1):
        # The most steps of the widths that the curve allows; a guess ends at a power law through
        # both sides.
        more = range(fits + 1, fails)
        steps = max(
            1, fits + bisect_right(more, max_loss, key=lambda steps: factor * foretold(steps))
        )
        if measured is None and fits and fails in lost:
            steps = steps_between((fits, lost[fits]), (fails, lost[fails]), max_loss)
        if steps not in more:
            break

        # Cut a copy; its lines are those of the run only if it is chosen.
        part = ready._replace(run=replace(run, services=replace(services, scratch=None)))
        sizes = {
            f"cut-{number}": {"share": min(round(steps * step, 6), resolved.recipe.remove.share)}
        }
        [member] = of_sizes(part, ready.opened.recipe, sizes, stays=True).values()
        [cut] = cut_and_polish(member.run)
        lost[steps] = nats(cut.run, "held-out text, cut") - dense
        factor = lost[steps] / foretold(steps)
        notes.append(
            f"max_loss: without {cut.run.resolved.plans[-1].removed_share:.1%} of all parameters "
            f"it loses {lost[steps]:.3f} nats per token of held-out text ({', '.join(text)}), of "
            f"{max_loss:g} that it may."
        )
        services.tell(notes[-1])
        if lost[steps] > max_loss:
            fails = steps
        else:
            best, fits = (member, cut), steps
        if NEAR * max_loss <= lost[steps] <= max_loss:
            break
    if best is None:
        raise RecipeError(f"{notes[-1].removesuffix('.')}; allow more, or polish with more tokens.")

    # What is written is written as by a run of its own.
    member, cut = best
    chosen = replace(cut.run.services, scratch=services.scratch)
    if chosen.scratch is not None:
        chosen.log.append_to(chosen.scratch)
    for note in notes:
        chosen.log.note(note)
    yield member, cut._replace(run=replace(cut.run, services=chosen))


def steps_between(fits: tuple[int, float], fails: tuple[int, float], max_loss: float) -> int:
    """Return the steps at which a power law through two cuts, each with its loss, reaches the
    limit.

    Halfway, if both lose too little to be told apart.
    """
    (fewer, least), (more, most) = fits, fails
    least = max(least, LEAST_NATS)
    if most <= least:
        return (fewer + more) // 2
    return int(fewer * (more / fewer) ** (math.log(max_loss / least) / math.log(most / least)))
