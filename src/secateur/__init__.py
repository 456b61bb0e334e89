"""secateur makes large language models smaller and writes ordinary Hugging Face checkpoints.

`prune` is the whole job, `recover` trains its result, `load` opens what they wrote; the errors are what a user can
correct. `Score` and `Exporter` are what other packages register (docs/extend.md). All but recipe and errors are
imported when first used, so that the command line's help does not wait for torch.
"""

from typing import TYPE_CHECKING, Any

from secateur.errors import (
    ArchError,
    CalibrationError,
    CheckpointError,
    NumericsError,
    PluginError,
    RecipeError,
    SecateurError,
)
from secateur.recipe import Calibration, Domain, Recipe

if TYPE_CHECKING:
    from secateur.checkpoint import load
    from secateur.export import Exporter
    from secateur.pruning import Result, prune
    from secateur.recovering import recover
    from secateur.score import Score

__all__ = [
    "ArchError",
    "Calibration",
    "CalibrationError",
    "CheckpointError",
    "Domain",
    "Exporter",
    "NumericsError",
    "PluginError",
    "Recipe",
    "RecipeError",
    "Result",
    "Score",
    "SecateurError",
    "load",
    "prune",
    "recover",
]


def __getattr__(name: str) -> Any:
    if name in ("Result", "prune"):
        from secateur import pruning

        return getattr(pruning, name)
    if name == "recover":
        from secateur import recovering

        return recovering.recover
    if name == "Score":
        from secateur import score

        return score.Score
    if name == "Exporter":
        from secateur.export import Exporter

        return Exporter
    if name == "load":
        from secateur import checkpoint

        return checkpoint.load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
