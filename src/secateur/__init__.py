"""secateur makes large language models smaller and writes ordinary Hugging Face checkpoints.

The command line's verbs are functions here: `measure`, `prune`, `inspect`, `evaluate`, `bench`,
`recover`, `export`, `push`, `verify` and `compare`; `load` opens what they wrote. The errors are
those that a user can correct. Other packages register a `Score` or an `Exporter` (docs/extend.md).
All else is imported on first use: the command line's help does not wait for torch, nor Ctrl-C for
anything.
"""

import importlib.metadata
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
from secateur.log import bars

if TYPE_CHECKING:
    from secateur.api import Result, prune, prune_sizes, recover
    from secateur.evaluation.bench import bench
    from secateur.evaluation.compare import compare
    from secateur.evaluation.evaluate import evaluate
    from secateur.evaluation.measure import foretell_measure, measure
    from secateur.evaluation.tables import table
    from secateur.formats.gguf import Exporter, export
    from secateur.formats.save import verify
    from secateur.methods.scores import Score
    from secateur.model.checkpoint import load
    from secateur.pruning.inspect import inspect
    from secateur.recipe import Calibration, Domain, Recipe
    from secateur.report.push import push

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
    "bars",
    "bench",
    "compare",
    "evaluate",
    "export",
    "foretell_measure",
    "inspect",
    "load",
    "measure",
    "prune",
    "prune_sizes",
    "push",
    "recover",
    "table",
    "verify",
]

_MODULES = {
    "api": ("Result", "prune", "prune_sizes", "recover"),
    "evaluation.bench": ("bench",),
    "evaluation.compare": ("compare",),
    "evaluation.evaluate": ("evaluate",),
    "evaluation.measure": ("foretell_measure", "measure"),
    "evaluation.tables": ("table",),
    "pruning.inspect": ("inspect",),
    "formats.save": ("verify",),
    "formats.gguf": ("Exporter", "export"),
    "methods.scores": ("Score",),
    "model.checkpoint": ("load",),
    "recipe": ("Calibration", "Domain", "Recipe"),
    "report.push": ("push",),
}


__version__ = importlib.metadata.version("secateur")


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


def __getattr__(name: str) -> Any:
    for module, names in _MODULES.items():
        if name in names:
            return getattr(import_module(f"secateur.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
