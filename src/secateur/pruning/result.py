"""What a run returns: the model, which units stay, and a summary in numbers."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from secateur.facts import Judgement, Size
from secateur.formats.save import Verification
from secateur.log import TELLING_SHARES, versions
from secateur.model.group import GroupKey, Groups, Keeps, by_name
from secateur.model.stock import CausalLM, Tokenizer
from secateur.pruning.cut import Cut
from secateur.pruning.prepare import Prepared
from secateur.pruning.trimmed import vocabulary_facts
from secateur.recipe import Recipe
from secateur.report.records import Summary
from secateur.stream.device import peak_bytes_on


@dataclass(frozen=True, slots=True, repr=False)
class Result:
    """A pruned model. `keeps`: by (layer, group), the original indices of the kept units, sorted.

    `layers`: the dense layers that stayed; layer n of the result, and of `keeps`, was `layers[n]`.
    """

    model: CausalLM
    tokenizer: Tokenizer
    recipe: Recipe
    keeps: Keeps
    layers: tuple[int, ...]
    summary: Summary
    out: Path | None = None

    def __repr__(self) -> str:
        """Name what it has, not the weights."""
        return (
            f"<Result of {self.summary.model}: secateur.table shows it, .model holds it, .out says "
            "where it is>"
        )


def summary_of(
    ready: Prepared,
    cut: Cut,
    proof: Verification | None,
    *,
    dense: Judgement | None,
    pruned: Judgement | None,
    command: str,
) -> Summary:
    """Return the summary of a cut. `dense`, `pruned`: as both were judged; None if they were
    not.
    """
    opened, (run, keeps, polish, peak) = ready.opened, cut
    recipe, log, pruned_size = run.resolved.recipe, run.services.log, Size.of(run.model)
    reached = 1 - pruned_size.num_params / opened.size.num_params
    notes = log.notes
    if opened.like is not None:
        notes += (
            f"units: those that went in {opened.like.result.name}, not chosen anew; refitted on "
            "this model.",
        )
    return Summary(
        model=opened.public_name,
        family=run.arch.family,
        remove_asked=recipe.remove.share
        if recipe.remove.group_names
        else reached,  # tokens alone: their number
        remove_reached=reached,
        dense_size=opened.size,
        pruned_size=pruned_size,
        num_layers=(opened.arch.num_layers, len(run.resolved.layers)),
        widths=group_widths(run.arch.select(recipe.remove.group_names), keeps),
        guard_refusals=sum(line.get("step", 1) == 0 for line in log.lines),
        seconds={name: round(seconds, 2) for name, seconds in log.seconds.items()},
        foretold={
            stage: told for stage, told in log.foretold.items() if len(told) == len(TELLING_SHARES)
        },
        reload_max_abs_difference=proof and proof.max_abs_difference,
        loaded_by=proof and proof.loaded_by,
        warnings=(*run.resolved.warnings, *ready.notes, *notes),
        versions=versions(),
        device=str(opened.device),
        like=opened.like and opened.like.result,
        measured=run.measured,
        vocabulary=opened.trim and vocabulary_facts(opened.trim, run.num_predicted, run.trimmed),
        command=command,
        calibration=ready.drawn.facts(),
        lineage=opened.lineage,
        polish=polish,
        dense_losses=dense.domains if dense else {},
        pruned_losses=pruned.domains if pruned else {},
        other_text=dense and pruned and (dense.other, pruned.other),
        own_answers=pruned and pruned.answers,
        peak_bytes=peak,
        device_peak_bytes=peak_bytes_on(opened.device),
    )


def group_widths(
    groups: Groups, keeps: Mapping[GroupKey, Tensor]
) -> dict[str, tuple[int, int, int]]:
    """Return, by kind of group: units per layer before, and the least and most of them after."""
    widths: dict[str, tuple[int, int, int]] = {}
    for name, members in by_name(groups).items():
        kept = [
            keeps[group.key].shape[-1] if group.key in keeps else group.num_units
            for group in members
        ]
        widths[name] = members[0].num_units, min(kept), max(kept)
    return widths
