"""secateur makes large language models smaller and writes ordinary Hugging Face checkpoints.

The verbs of the command line are functions here, with its words: `prune`, `inspect`, `evaluate`, `bench`, `recover`,
`export` and `compare`; `load` opens what they wrote. The errors are what a user can correct. `Score` and `Exporter` are
what other packages register (docs/extend.md). What needs torch is imported when it is first used, so that the command
line's help does not wait for it.
"""

from importlib import import_module
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
    from secateur.api import Result, prune
    from secateur.evaluation.bench import bench
    from secateur.evaluation.compare import compare
    from secateur.evaluation.evaluate import evaluate
    from secateur.evaluation.inspect import inspect
    from secateur.formats.gguf import Exporter, export
    from secateur.methods.scores import Score
    from secateur.model.checkpoint import load
    from secateur.recovery.recover import recover

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
    "bench",
    "compare",
    "evaluate",
    "export",
    "inspect",
    "load",
    "prune",
    "recover",
]

_HOMES = {
    "Exporter": "secateur.formats.gguf",
    "Result": "secateur.api",
    "Score": "secateur.methods.scores",
    "bench": "secateur.evaluation.bench",
    "compare": "secateur.evaluation.compare",
    "evaluate": "secateur.evaluation.evaluate",
    "export": "secateur.formats.gguf",
    "inspect": "secateur.evaluation.inspect",
    "load": "secateur.model.checkpoint",
    "prune": "secateur.api",
    "recover": "secateur.recovery.recover",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
