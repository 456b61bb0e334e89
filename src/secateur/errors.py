"""Every error that a user's own input can cause. The sentence says what, where, got, allowed, and what to do.

SecateurError (a ValueError)
 |- RecipeError       the recipe or a command-line option
 |- ArchError         the model's family or structure
 |- CheckpointError   reading or writing a checkpoint
 |- CalibrationError  calibration text
 |- NumericsError     a non-finite or unsolvable number, with layer, module and domain
 |- PluginError       an installed package that extends secateur does it wrongly
 `- RankError         a run of several ranks: one was lost, or they do not run the same

The command line prints the sentence and exits with status 2; anything else is a bug and shows its traceback.
"""

import difflib
from collections.abc import Iterable


class SecateurError(ValueError):
    """Base of all errors that a user can cause and correct."""


class RecipeError(SecateurError):
    """The recipe, or an option that overrides it, is wrong."""


class ArchError(SecateurError):
    """The model's family is not supported, or its modules disagree with the architecture spec."""


class CheckpointError(SecateurError):
    """A checkpoint cannot be read or written."""


class CalibrationError(SecateurError):
    """Calibration text is missing, unreadable or too short."""


class NumericsError(SecateurError):
    """A number that must be finite is not, or a system cannot be solved."""


class PluginError(SecateurError):
    """An installed package registers a score, family, source or exporter that cannot be used."""


class RankError(SecateurError):
    """One of several ranks was lost, or the ranks do not run the same."""


# Below this likeness a name is no slip of the one that was meant.
ALIKE = 0.6


def advice(name: str, allowed: Iterable[str]) -> str:
    """Return what to do about a name that is not allowed: the one that was meant where there is one so much alike."""
    alike = difflib.get_close_matches(name, sorted(allowed), n=1, cutoff=ALIKE)
    return f"did you mean '{alike[0]}'?" if alike else "give one of these."


def nearest(name: str, allowed: Iterable[str]) -> str:
    """Return the allowed name most like `name`, for "did you mean"; an empty string if nothing is allowed."""
    return next(iter(difflib.get_close_matches(name, sorted(allowed), n=1, cutoff=0.0)), "")
