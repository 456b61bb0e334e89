"""secateur makes large language models smaller and writes ordinary Hugging Face checkpoints.

`prune` is the whole job; the errors are what a user can correct.
"""

from secateur.errors import (
    ArchError,
    CalibrationError,
    CheckpointError,
    NumericsError,
    RecipeError,
    SecateurError,
)
from secateur.prune import Result, prune
from secateur.recipe import Calibration, Domain, Recipe

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
    "prune",
]
