"""The end of a prune: the model saved and proved by a reload, the summary, the model card and the report.

In: a run whose model is cut and in ordinary memory. Out: files in its directory, and the `Result`.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.arch_group import Group
from secateur.calibration_facts import calibration_facts
from secateur.card import model_card
from secateur.facts import Size
from secateur.opening import Opened
from secateur.pruned_checkpoint import PrunedCheckpoint
from secateur.recipe import Recipe
from secateur.report import missing_plots, write_report
from secateur.run import Keeps, Run
from secateur.runlog import RunLog
from secateur.summary import Summary, versions
from secateur.verify import Verification, verify_reload

VERIFY_TOKENS = 64


@dataclass(frozen=True, slots=True)
class Result:
    """A pruned model. `keeps`: by (layer, group), the original indices of the units that stayed, sorted.

    `layers`: the dense model's layers that stayed; layer n of the result, and of `keeps`, was `layers[n]` there.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    recipe: Recipe
    keeps: Keeps
    layers: tuple[int, ...]
    summary: Summary
    out: Path | None = None


def save_and_prove(run: Run, checkpoint: PrunedCheckpoint, keeps: Keeps) -> Verification:
    """Write the model and have a fresh process compute the logits that it gives here."""
    services = run.services
    with services.log.time("save"):
        checkpoint.save(keeps)
    with services.log.time("verify"):
        services.progress("verify", 0, 1)
        ids_1T = run.text.domains[0].held_out_NT[:1, :VERIFY_TOKENS].to(run.model.device)
        with torch.inference_mode():
            logits = run.model(ids_1T, use_cache=False).logits
        proof = verify_reload(checkpoint.directory, ids_1T, logits)
        services.progress("verify", 1, 1)
    return proof


def summary_of(opened: Opened, run: Run, keeps: Keeps, proof: Verification | None, **measured: Any) -> Summary:
    """Return what the run says of itself. `measured`: the command, losses and peaks of memory, by the field's name."""
    recipe, log, pruned_size = run.resolved.recipe, run.services.log, Size.of(run.model)
    notes = tuple(line["text"] for line in log.lines if line["event"] == "note")
    return Summary(
        model=opened.name,
        family=run.arch.family,
        remove_asked=recipe.remove,
        remove_reached=1 - pruned_size.num_params / opened.size.num_params,
        outcome=run.resolved.outcome({key: keep.shape[-1] for key, keep in keeps.items()}),
        dense_size=opened.size,
        pruned_size=pruned_size,
        num_layers=(opened.arch.num_layers, len(run.resolved.layers)),
        widths=group_widths(run.arch.select(recipe.groups), keeps),
        calibration=calibration_facts(run.text),
        guard_refusals=sum(line.get("step", 1) == 0 for line in log.lines),
        seconds={name: round(seconds, 2) for name, seconds in log.seconds.items()},
        reload_max_abs_difference=proof.max_abs_difference if proof else None,
        sample_text=proof.generated_text if proof else None,
        warnings=(*run.resolved.warnings, *notes, *(missing_plots() if proof else ())),
        versions=versions(),
        device=str(opened.device),
        **measured,
    )


def write_report_files(directory: Path, summary: Summary, log: RunLog) -> None:
    """Write the summary, the model card and the report."""
    log.write({"event": "seconds", **summary.seconds})
    (directory / "result.json").write_text(summary.to_json(), encoding="utf-8")
    (directory / "README.md").write_text(model_card(summary), encoding="utf-8")
    if not missing_plots():
        write_report(directory)


def group_widths(groups: tuple[Group, ...], keeps: Mapping[tuple[int, str], Tensor]) -> dict[str, tuple[int, int, int]]:
    """Return, by kind of group, units per layer before, and after in the narrowest and the widest layer."""
    widths: dict[str, tuple[int, int, int]] = {}
    for group in groups:
        keep = keeps.get((group.layer, group.name))
        kept = group.num_units if keep is None else keep.shape[-1]
        before, least, most = widths.get(group.name, (group.num_units, kept, kept))
        widths[group.name] = (before, min(least, kept), max(most, kept))
    return widths
