"""Errors that a user's input can cause. The sentence says what, where, got, allowed, what to do.

The command line prints the sentence and exits with status 2; any other exception is a bug and shows
its traceback.
"""

import difflib
from collections.abc import Iterable

# Longer values of foreign files are left out of the middle of a sentence.
MAX_SENTENCE = 1500


class SecateurError(ValueError):
    """Base of all errors that a user can cause and correct: one line, of bounded length."""

    def __init__(self, sentence: str) -> None:
        line = " ".join(sentence.splitlines())
        half = MAX_SENTENCE // 2
        super().__init__(line if len(line) <= MAX_SENTENCE else f"{line[:half]} … {line[-half:]}")


class RecipeError(SecateurError):
    """The recipe, or an option that overrides it, is wrong."""


class ArchError(SecateurError):
    """The model's family is not supported, or its modules disagree with the architecture spec."""


class CheckpointError(SecateurError):
    """A checkpoint cannot be read or written."""


class CalibrationError(SecateurError):
    """Calibration text is missing, unreadable or too short."""


class NumericsError(SecateurError):
    """A number is not finite, or a system cannot be solved; with layer, module and domain."""


class PluginError(SecateurError):
    """An installed package registers a score, family, source or exporter that is unusable."""


class RankError(SecateurError):
    """One of several ranks was lost, or the ranks do not run the same."""


MAX_VALUE = 120


def shown(value: object) -> str:
    """Return a value as Python writes it, for a sentence: the beginning alone of a long one."""
    return shortened(repr(value))


def shortened(text: str) -> str:
    """Return the text, of a long one the beginning alone."""
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}..."


def web_address(text: str) -> bool:
    """Whether the text is a URL; as a path it has lost one of its two slashes."""
    return text.startswith(("https:/", "http:/"))


# Less similar names are not taken for typing errors.
ALIKE = 0.6


def advice(name: str, allowed: Iterable[str], otherwise: str = "give one of these.") -> str:
    """Return what to do about a wrong name: the one that was probably meant, if any is like it."""
    alike = difflib.get_close_matches(name, sorted(allowed), cutoff=ALIKE)
    return f"did you mean '{alike[0]}'?" if alike else otherwise


def one_of(allowed: Iterable[str]) -> str:
    """Return what to do about a name like none of those allowed, which are listed nowhere else."""
    return f"give one of {', '.join(sorted(allowed))}."


def one_line(error: BaseException) -> str:
    """Return what an error says, on one line of bounded length."""
    return " ".join(str(error).split())[:300] or type(error).__name__
