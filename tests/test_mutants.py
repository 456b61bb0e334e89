"""The lists of mutations fit the code and the tests as they are, which running them would find out much later."""

import ast
import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent
SPEC = importlib.util.spec_from_file_location("mutants_tool", TESTS.parent / "tools" / "mutants.py")
assert SPEC is not None and SPEC.loader is not None
tool: Any = importlib.util.module_from_spec(SPEC)
sys.modules[SPEC.name] = tool  # where dataclasses look for their annotations
SPEC.loader.exec_module(tool)

LISTS = sorted(file.stem for file in (TESTS / "mutants").glob("*.yaml"))


@cache
def source(file: str) -> str:
    return (TESTS.parent / "src" / "secateur" / file).read_text(encoding="utf-8")


@cache
def functions(file: str) -> set[str]:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("name", LISTS)
def test_what_is_changed_is_there_once_and_the_change_is_one(name):
    wrong = [
        f"{each.file}: {each.old!r} occurs {source(each.file).count(each.old)} times"
        for each in tool.mutations([name])
        if source(each.file).count(each.old) != 1 or each.old == each.new
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", LISTS)
def test_what_is_changed_is_still_python(name):
    for each in tool.mutations([name]):
        if each.file.endswith(".py"):
            ast.parse(source(each.file).replace(each.old, each.new))


@pytest.mark.parametrize("name", LISTS)
def test_the_tests_that_must_fail_are_there(name):
    for each in tool.mutations([name]):
        assert each.equivalent or each.tests, f"{each.file}: {each.old!r} names no test"
        for test in each.tests:
            file, _, function = test.partition("::")
            assert not function or function.partition("[")[0] in functions(file), f"{test} is not there"
            assert (TESTS / file).is_file(), f"{file} is not there"


def test_no_change_is_listed_twice():
    found = [(each.file, each.old, each.new) for each in tool.mutations([])]
    assert len(found) == len(set(found))


def test_every_change_that_no_test_can_see_is_told_with_its_reason():
    """docs/testing.md lists them; this prints the rows that are missing there."""
    told = (TESTS.parent / "docs" / "testing.md").read_text(encoding="utf-8")
    rows = [f"| `{each.file}` | {each.equivalent} |" for each in tool.mutations([]) if each.equivalent]
    missing = [row for row in rows if row not in told]
    assert not missing, "add to docs/testing.md:\n" + "\n".join(missing)
