"""`secateur.inspect`: what a model consists of and what a run would leave, without its weights.

In: a model reference and a recipe. Out: an `Inspection`. The model stays on the meta device.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from secateur.errors import RecipeError, SecateurError
from secateur.formats.gguf import gguf_bytes
from secateur.formats.gguf_tensors import TOLD
from secateur.log import Progress, silent
from secateur.methods.budget import align_of, token_prices
from secateur.model.checkpoint import meta_model, notes_on
from secateur.model.group import Counts, Group, by_name
from secateur.pruning.cost import disk_bytes, memory_for, with_polish_that_fits
from secateur.pruning.group_step import model_left
from secateur.pruning.open import Opened, open_model
from secateur.pruning.resolve import Resolved, checked, nearest, resolve
from secateur.pruning.trim import trim_to
from secateur.recipe import AnyRecipe, as_recipe
from secateur.report.records import GroupFacts, Inspection

FILE_TYPES = ("bf16", "q8_0", TOLD)


def gguf_files(opened: Opened, resolved: Resolved) -> tuple[dict[str, tuple[int, int]], str | None]:
    """Return `files` and `files_problem`."""
    config = opened.model.config
    steps = {group.key: align_of(group, resolved.align) for group in resolved.groups}
    widths = {
        key: steps[key] * max(1, round(kept / steps[key]))
        for key, kept in resolved.plans[-1].num_keep.items()
    }
    try:
        models = (
            meta_model(config),
            model_left(config, resolved.layers, widths, opened.vocabulary_left),
        )
        dense, left = (
            [gguf_bytes(model, kind, opened.name) for kind in FILE_TYPES] for model in models
        )
    except SecateurError as error:
        return {}, str(error).removesuffix(".")
    return dict(zip(FILE_TYPES, zip(dense, left, strict=True), strict=True)), None


def _trimmed(opened: Opened) -> tuple[Opened, tuple[str, ...]]:
    """Return the model with as many tokens gone as the recipe says, and a note if a run measures
    it.
    """
    size = opened.recipe.remove.vocabulary
    if size is None:
        return opened, ()
    if size == "auto":
        note = (
            "remove.vocabulary: auto measures in the run how many tokens go; here all is asked of "
            "the groups, and if there are none, nothing."
        )
        return opened, (note,)
    return replace(opened, trim=trim_to(opened, size)), ()


def inspect(
    model: str | Path,
    recipe: AnyRecipe = None,
    *,
    progress: Progress = silent,
) -> Inspection:
    """Say what a model consists of, and what a run would leave and cost, without its weights.

    `model`: a local directory, a hub id, a `.gguf` file or `smollm2-135m`. `recipe`: as in `prune`.
    `progress`: as of the other verbs; nothing here is worth telling.

    Returns groups, widths before and after, bytes, memory and disk, how much of the model
    its vocabulary is, and how large GGUF files will be.

    Raises what `prune` raises before it reads weights: RecipeError, CheckpointError or ArchError.
    But a share that cannot be is a note, and the nearest one that can is shown.
    """
    opened = open_model(model, as_recipe(recipe), weights=False)
    aside = () if opened.checkpoint is None else notes_on(opened.checkpoint, opened.model)
    opened = checked(opened)

    # The run, or the nearest one that can be.
    opened, measured_later = _trimmed(opened)
    resolved, refused = _resolved(opened)
    resolved = with_polish_that_fits(opened, resolved)

    # What it leaves, and takes.
    arch, size, recipe = opened.arch, opened.size, opened.recipe
    memory = memory_for(opened, resolved)
    plan, bytes_per_param = resolved.plans[-1], size.num_bytes // size.num_params
    num_params = plan.cost_after
    embedding: Any = opened.model.get_input_embeddings()
    num_tokens: int = embedding.num_embeddings
    files, files_problem = gguf_files(opened, resolved)
    cut = by_name(resolved.groups)  # not those that protected layers alone have
    return Inspection(
        model=opened.name,
        family=arch.family,
        dtype=str(opened.model.dtype).removeprefix("torch."),
        size=size,
        num_layers=(arch.num_layers, len(resolved.layers)),
        groups=tuple(
            _facts(cut[name], plan.num_keep) for name in recipe.remove.group_names if name in cut
        ),
        remove_asked=recipe.remove.share,
        remove_reached=1 - num_params / size.num_params,
        largest_remove=resolved.largest,
        align=resolved.align,
        num_params_after=num_params,
        num_bytes_after=num_params * bytes_per_param,
        num_calibration_tokens=resolved.num_tokens,
        memory=memory.estimate,
        weights_on_disk=memory.weights_on_disk,
        disk_bytes=disk_bytes(opened, resolved, memory),
        device=str(opened.device),
        warnings=(*refused, *measured_later, *resolved.warnings, *aside),
        possible=tuple(_facts(members, {}) for members in by_name(arch.groups).values()),
        impossible=arch.omits,
        num_tokens=num_tokens,
        num_token_params=token_prices(opened.model, num_tokens),
        files=files,
        files_problem=files_problem,
    )


def _resolved(opened: Opened) -> tuple[Resolved, tuple[str, ...]]:
    """Return the run, or that of the nearest share that can be, with a note that says why.

    Raises RecipeError if that share cannot mend it.
    """
    try:
        return resolve(opened), ()
    except RecipeError as refused:
        possible = nearest(opened)
        if possible.recipe == opened.recipe:
            raise
        share, why = possible.recipe.remove.share, str(refused).removesuffix(".")
        return resolve(possible), (f"a run would be refused ({why}); shown is remove: {share:g}.",)


def _facts(members: Sequence[Group], num_keep: Counts) -> GroupFacts:
    """Return what groups of one name are together. One that `num_keep` does not have keeps all."""
    kept = round(mean(num_keep.get(group.key, group.num_units) for group in members))
    num_params = sum(group.num_units * group.params_per_unit for group in members)
    first = members[0]
    return GroupFacts(
        first.name,
        first.unit,
        len(members),
        first.num_units,
        kept,
        first.params_per_unit,
        num_params,
    )
