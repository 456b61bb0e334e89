"""What other packages add by entry points: scores and exporters.

In: a group of entry points, and what is built in. Out: names, or the objects, which imports their
package. Installing a package is enough: docs/extend.md. And where general text comes from.
"""

from collections.abc import Mapping
from functools import cache
from importlib import metadata, resources
from importlib.metadata import EntryPoint, PackageNotFoundError, PackagePath
from pathlib import Path
from typing import Any, TypeVar

import yaml

from secateur.errors import PluginError, RecipeError, advice

SCORE_GROUP = "secateur.scores"
EXPORTER_GROUP = "secateur.exporters"

# Calibration text that is not technical: the package that carries it, and its file.
GENERAL_TEXT = {
    "web": ("exllamav3", "c4.utf8"),
    "encyclopedia": ("exllamav3", "wiki.utf8"),
    "multilingual": ("exllamav3", "multilingual.utf8"),
    "dialogue": ("chitchat-dataset", "dataset.json"),
}

PROSE, TECHNICAL = ("web", "encyclopedia", "multilingual"), ("code", "mathematics", "science")

Loaded = TypeVar("Loaded")


def installed_files(package: str) -> list[PackagePath] | None:
    """Return the files of a package; None if it is not installed. Imports nothing."""
    try:
        return metadata.distribution(package).files or []
    except PackageNotFoundError:
        return None


def general_text(kind: str) -> Path | None:
    """Return the installed file with a kind of `GENERAL_TEXT`, or None. Imports nothing."""
    package, name = GENERAL_TEXT[kind]
    files = installed_files(package) or ()
    return next(
        (
            path
            for file in files
            if file.name == name and (path := Path(str(file.locate()))).is_file()
        ),
        None,
    )


def default_domains() -> dict[str, Any]:
    """Return the domains of a recipe that names none: a general mix, or technical text."""
    general = tuple(name for name in (*PROSE, "dialogue") if general_text(name) is not None)
    return {name: {"installed": name} for name in (*general, *TECHNICAL)}


@cache
def mixtures() -> dict[str, dict[str, dict[str, Any]]]:
    """Return the domains of each named mixture, from data/mixtures.yaml."""
    return yaml.safe_load(
        resources.files("secateur").joinpath("data", "mixtures.yaml").read_bytes()
    )


def mixture(name: str) -> dict[str, dict[str, Any]]:
    """Return the domains of a named mixture. Raises ValueError for a name that is none."""
    if name not in mixtures():
        raise ValueError(
            f"needs a mapping of names to sources, or a mixture: {', '.join(mixtures())}"
        )
    return mixtures()[name]


def score_names() -> tuple[str, ...]:
    """Return the sorted names of scores that packages register. Imports nothing."""
    return tuple(sorted({point.name for point in _entry_points(SCORE_GROUP)}))


def plugin_packages() -> dict[str, str]:
    """Return the packages that register anything, with versions. Imports nothing."""
    groups = (SCORE_GROUP, EXPORTER_GROUP)
    packages = (point.dist for group in groups for point in _entry_points(group))
    return dict(
        sorted((package.name, package.version) for package in packages if package is not None)
    )


def load_point(point: EntryPoint, kind: type[Loaded]) -> Loaded:
    """Return an entry point's object. Raises PluginError if it fails or is not of this kind."""
    try:
        loaded = point.load()
    except Exception as error:  # whatever another package's import raises
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise PluginError(
            f"{where(point)}: cannot be loaded ({reason}); correct, update or uninstall "
            f"{_package(point)}."
        ) from error
    if not isinstance(loaded, kind):
        wanted, got = kind.__name__, type(loaded).__name__
        raise PluginError(
            f"{where(point)}: must be a secateur.{wanted}, got {got}; see docs/extend.md."
        )
    return loaded


def look_up(group: str, name: str, built_in: Mapping[str, Loaded], kind: type[Loaded]) -> Loaded:
    """Return what `name` stands for, built in or registered. Others of the group may be unusable.

    Raises RecipeError for an unknown name, listing the known ones. Raises PluginError if a package
    registers a built-in name, or two register the same, and as `load_point`.
    """
    named = [point for point in _entry_points(group) if point.name == name]
    if not named and name in built_in:
        return built_in[name]
    if not named:
        names = [*built_in, *sorted({point.name for point in _entry_points(group)} - {*built_in})]
        raise RecipeError(
            f"unknown {_what(group)} '{name}'; allowed: {', '.join(names)}; {advice(name, names)}"
        )

    # A name that says two things is refused.
    point, *others = named
    if name in built_in:
        raise PluginError(
            f"{where(point)}: the name is secateur's own; rename it in {_package(point)}."
        )
    if others:
        raise PluginError(
            f"{where(others[0])}: {_package(point)} has one of that name too; uninstall one."
        )
    return load_point(point, kind)


def where(point: EntryPoint) -> str:
    """Return an entry point's description in errors: package, kind and name."""
    return f"package {_package(point)}, {_what(point.group)} '{point.name}'"


def _what(group: str) -> str:
    return group.removeprefix("secateur.").removesuffix("s")


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value.partition(":")[0]


@cache
def _entry_points(group: str) -> tuple[EntryPoint, ...]:
    """Read once per process, since it opens the metadata of every installed package."""
    return tuple(metadata.entry_points(group=group))
