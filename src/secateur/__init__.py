"""secateur makes large language models smaller and writes ordinary Hugging Face checkpoints.

`prune` is the whole job, `recover` trains its result, `load` opens what they wrote; the errors are what a user can
correct. `prune`, `Result`, `recover` and `load` are imported when first used, so that the command line's help does not
wait for torch.
"""

from typing import TYPE_CHECKING, Any

from secateur.errors import (
    ArchError,
    CalibrationError,
    CheckpointError,
    NumericsError,
    RecipeError,
    SecateurError,
)
from secateur.recipe import Calibration, Domain, Recipe

if TYPE_CHECKING:
    from secateur.api import Result, prune
    from secateur.checkpoint import load
    from secateur.recovering import recover

__all__ = [
    "ArchError",
    "Calibration",
    "CalibrationError",
    "CheckpointError",
    "Domain",
    "NumericsError",
    "Recipe",
    "RecipeError",
    "Result",
    "SecateurError",
    "load",
    "prune",
    "recover",
]


def __getattr__(name: str) -> Any:
    if name in ("Result", "prune"):
        from secateur import api

        return getattr(api, name)
    if name == "recover":
        from secateur import recovering

        return recovering.recover
    if name == "load":
        from secateur import checkpoint

        return checkpoint.load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
