"""The step before all others: the residual stream becomes narrower in every layer at once.

In: a run whose model is dense. Out: the run as the next steps need it: the model narrower, its architecture bound anew.
"""

import dataclasses

from secateur.hidden_width import remove_channels
from secateur.run import Run
from secateur.safety_net import watched_losses


def remove_hidden(run: Run) -> Run:
    """Make the model as narrow as the recipe's `hidden_size` says, in place; call it before `remove_depth`.

    Everything after, the dense stream included, starts from this model; only the safety net still compares with the
    dense one. A line of the run log per refitted linear.
    """
    recipe = run.resolved.recipe
    if recipe.hidden_size is None:
        return run
    dense_losses = watched_losses(run, "dense")
    run.progress("hidden width", 0, 1)
    arch, keep = remove_channels(
        run.model, run.arch, run.batches(1), run.shares, recipe.hidden_size, recipe, run.log, run.scratch
    )
    run.progress("hidden width", 1, 1)
    return dataclasses.replace(run, arch=arch, channels=tuple(keep.tolist()), dense_losses=dense_losses)
