"""Every option, argument, field and number that has a value by default: what a run does that nobody asked for."""

import ast
import dataclasses
import importlib
import inspect
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer
from shown import assert_shown

import secateur
from secateur import Result
from secateur.cli import app
from secateur.facts import Record

COMMANDS = typer.main.get_command(app).commands


def plain(value: Any) -> str:
    """Return a default without what differs from process to process."""
    if value is inspect.Parameter.empty:
        return "needed"
    return value.__name__ if callable(value) and hasattr(value, "__name__") else repr(value)


def test_every_option_of_the_command_line() -> None:
    lines = list[str]()
    for name, command in sorted(COMMANDS.items()):
        lines.append(name)
        for each in command.params:
            kind = getattr(each, "type", None)
            limits = f", {kind.min} to {kind.max}" if hasattr(kind, "min") else ""
            told = "needed" if each.required else repr(each.default)
            lines.append(f"    {' '.join((*each.opts, *each.secondary_opts))}: {told}{limits}")
    assert_shown("options", "\n".join(lines))


def test_every_argument_of_the_functions_in_python() -> None:
    lines = list[str]()
    for name in secateur.__all__:
        found = getattr(secateur, name)
        if inspect.isfunction(found):
            arguments = inspect.signature(found).parameters.values()
            lines += [name, *(f"    {each.name}, {each.kind.description}: {plain(each.default)}" for each in arguments)]
    assert_shown("arguments", "\n".join(lines))


KEYS_OF_THE_RECIPE = {  # options of the command line, keys of `recipe` in Python
    "prune": "remove to fit context type_name preset domains answers vocabulary keep_script polish "
    "groups budget align rounds seed memory_budget device set",
    "measure": "preset domains answers budget device set",
    "inspect": "remove to fit context type_name preset polish groups budget align rounds memory_budget set",
    "recover": "domains answers set",
}


@pytest.mark.parametrize("name", sorted(COMMANDS.keys() & set(secateur.__all__)))
def test_an_option_has_the_word_and_the_default_of_the_argument(name: str) -> None:
    arguments = inspect.signature(getattr(secateur, name)).parameters
    renamed = {"domain": "domains", "type": "type_name", "from": "from_"}
    words = {"json", "dry_run", *arguments, *KEYS_OF_THE_RECIPE.get(name, "").split()}
    for each in COMMANDS[name].params:
        word = max(each.opts, key=len).removeprefix("--").replace("-", "_")
        assert renamed.get(word, word) in words
    told = {each.name: each.default for each in COMMANDS[name].params if not each.required}
    taken = {key: each.default for key, each in arguments.items() if each.default is not inspect.Parameter.empty}
    shared = told.keys() & taken.keys()
    assert {key: told[key] or None for key in shared} == {key: taken[key] or None for key in shared}


def _modules() -> Iterator[tuple[ModuleType, ast.Module]]:
    source = Path(secateur.__file__).parent
    for file in sorted(source.rglob("*.py")):
        name = ".".join(("secateur", *file.relative_to(source).with_suffix("").parts))
        if not file.stem.startswith("__") and not file.stem.endswith("_child"):  # they run when they are imported
            yield importlib.import_module(name), ast.parse(file.read_text(encoding="utf-8"))


def _records() -> Iterator[type]:
    for module, _ in _modules():
        for found in vars(module).values():
            if dataclasses.is_dataclass(found) and isinstance(found, type) and found.__module__ == module.__name__:
                yield found


def test_every_number_that_a_module_is_headed_by() -> None:
    """What was chosen, by a measurement in most cases, and no recipe changes."""
    lines = list[str]()
    for module, tree in _modules():
        for each in (each for each in tree.body if isinstance(each, ast.Assign)):
            parts = list(ast.walk(each.value))
            has_numbers = any(isinstance(part, ast.Constant) and type(part.value) in (int, float) for part in parts)
            if has_numbers and not any(isinstance(part, ast.Subscript | ast.Lambda) for part in parts):
                lines.append(f"{module.__name__}: {ast.unparse(each)}")
    assert_shown("numbers", "\n".join(lines))


def test_every_field_that_may_be_left_out() -> None:
    lines = list[str]()
    for record in sorted(_records(), key=lambda each: (each.__module__, each.__qualname__)):
        if record.__name__.startswith("_"):
            continue
        fields = [each for each in dataclasses.fields(record) if each.default is not dataclasses.MISSING]
        lines += [f"{record.__module__}.{record.__qualname__}.{each.name}: {plain(each.default)}" for each in fields]
    assert_shown("fields", "\n".join(lines))


# What a run fills while it goes, and what the trainer's own class or another base asks for.
CHANGES = set("Listener RunText Statistics Subject Work _Counter _Domain _Observed".split())
WITHOUT_SLOTS = {"KeptTokens", "Listener", "Work"}


def test_records_cannot_be_changed_and_take_no_field_that_they_do_not_name() -> None:
    records = list(_records())
    assert {each.__name__ for each in records if not each.__dataclass_params__.frozen} == CHANGES
    assert {each.__name__ for each in records if "__slots__" not in vars(each)} == WITHOUT_SLOTS
    # Those with more numbers than a screen shows say so where Python prints them.
    large = {each.__name__ for each in records if each.__repr__ in (Record.__repr__, Result.__repr__)}
    named = "BenchResult Comparison Evaluation Inspection Measurement RecoveryRecord Result Summary"
    assert large - {"Record"} == set(named.split())


def test_where_a_pair_may_be_dropped_is_known() -> None:
    dropped = Counter[str]()
    for module, tree in _modules():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "zip":
                if [ast.unparse(each.value) for each in node.keywords if each.arg == "strict"] != ["True"]:
                    dropped[module.__name__] += 1
    assert dropped == {
        "secateur.pruning.run": 1,  # the last cut has no neighbour
        "secateur.evaluation.bench": 1,
        "secateur.formats.save": 1,
        "secateur.model.group": 1,
        "secateur.model.bind": 3,
    }
