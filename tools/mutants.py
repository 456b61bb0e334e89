"""Change the code in places that nobody here chose, one at a time, and see whether the tests notice.

    python tools/mutants.py [--count 300] [--seed 2026] [--only methods] [--tests tests/methods/...]

The changes are those of cosmic-ray's operators: another arithmetic or comparison operator, a number
plus or minus one, `and` for `or`, a `not`, a loop that never runs, a decorator or an exception gone.
A seed draws a line among all lines of src that an operator can change, then one of its changes.
Annotations, and what no longer compiles, are not drawn.

The test files that import the changed module judge it first, then the others of its room, then the
rest, until one test fails. A test file runs once under coverage when it is first needed; of its tests
those judge that ran the changed line, the quickest first, in a fork that has torch and transformers
imported. The changed code is a copy of src. What is finished is kept in `build/mutants` until src or
the test file changes, so that a stopped run goes on. `--reach 1` asks the first files alone, `--reach 2`
the room's, too: what they kill is killed. The tests that list defaults and numbers, and read the source
itself, judge what a module does when it is imported first, and all else last; whether a function runs
without gradients, the test of every verb judges.
What no test is seen to run, as it runs in a process that leaves no coverage, all tests of the module's
files and of its room judge.

`tools/equivalent.yaml` lists the changes that no test can see, with the reason: they are counted
apart. Everything else that lives is printed. The status is 1 if fewer than `--least` are killed.
"""

import argparse
import ast
import contextlib
import gc
import hashlib
import json
import os
import random
import re
import resource
import shutil
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "secateur"
WORK = ROOT / "build" / "mutants"
EQUIVALENT = Path(__file__).with_name("equivalent.yaml")
KILLED, SURVIVED, UNCOVERED, BROKEN = "killed", "SURVIVED", "NOT COVERED", "BROKEN"
# Seconds under coverage of the tests that judge one change at once, and processor time beyond them.
MAX_SECONDS, MORE_SECONDS = 120.0, 60
# Its tests read what is made when a module is imported, defaults, fields and numbers, and the source. They run no
# function.
READ_WHOLE = "tests/test_signatures_shown.py"
# Its test runs every verb and lets autograd keep nothing.
WITHOUT_GRADIENTS = "tests/test_stages_shown.py"
# Leaves of cosmic-ray's syntax tree that no operator changes.
UNCHANGED = {"name", "string", "newline", "endmarker", "fstring_start", "fstring_string", "fstring_end"}


@dataclass(frozen=True, slots=True)
class Mutant:
    """One change: `occurrence` of cosmic-ray's `operator` in src/secateur/`file`, at `line`."""

    file: str
    line: int
    operator: str
    occurrence: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.operator}\n    - {self.old}\n    + {self.new}"


# ---------------------------------------------------------------------------------------- drawing


def draw(count: int, seed: int, only: list[str]) -> list[Mutant]:
    """Return `count` changes, or as many as there are: of a drawn line each, no line twice."""
    changes = {
        (file, line): on_line
        for file in sorted(path.relative_to(SOURCE).as_posix() for path in SOURCE.rglob("*.py"))
        if not only or any(file.startswith(prefix) for prefix in only)
        for line, on_line in sorted(_changes(file).items())
    }
    lines = sorted(changes)
    chooser = random.Random(seed)
    chooser.shuffle(lines)
    mutants: list[Mutant] = []
    for place in lines:
        # Of each kind of operator alike: an arithmetic sign has eleven replacements, a number two.
        kinds = defaultdict(list)
        for change in changes[place]:
            kinds[change[0].split("_")[0]].append(change)
        candidates = kinds[chooser.choice(sorted(kinds))]
        chooser.shuffle(candidates)
        mutant = next(filter(None, (_mutant(*place, *candidate) for candidate in candidates)), None)
        if mutant is not None:
            mutants.append(mutant)
        if len(mutants) == count:
            break
    return mutants


def mutated(file: str, operator: str, occurrence: int) -> str:
    """Return the text of the file with one change."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider

    return mutate_code((SOURCE / file).read_text(encoding="utf-8"), OperatorProvider()[operator](), occurrence)


def _changes(file: str) -> dict[int, list[tuple[str, int]]]:
    """Return the operators and occurrences that can change each line of a file."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.operators.provider import OperatorProvider

    text = (SOURCE / file).read_text(encoding="utf-8")
    nodes = [node for node in ast_nodes(get_ast(text)) if node.type not in UNCHANGED]
    annotations = list(_annotations(ast.parse(text)))
    changes: dict[int, list[tuple[str, int]]] = defaultdict(list)
    provider = OperatorProvider()
    for name in provider:
        if provider[name].arguments():
            continue  # those that need the name of a variable
        operator = provider[name]()
        places = [(node, start) for node in nodes for start, _ in operator.mutation_positions(node)]
        for occurrence, (node, start) in enumerate(places):
            if not _is_marker(node) and not any(first <= start < last for first, last in annotations):
                changes[start[0]].append((name, occurrence))
    return changes


def _is_marker(node: Any) -> bool:
    """Whether it is the `*` or `/` of a signature, which is no arithmetic."""
    return node.type == "operator" and node.parent.type in ("parameters", "param", "lambdef")


def _annotations(tree: ast.AST) -> Iterator[tuple[tuple[int, int], tuple[int, int]]]:
    """Yield where each annotation begins and ends."""
    for node in ast.walk(tree):
        for field in ("annotation", "returns"):
            part = getattr(node, field, None)
            if part is not None:
                yield (part.lineno, part.col_offset), (part.end_lineno, part.end_col_offset)


def _mutant(file: str, line: int, operator: str, occurrence: int) -> Mutant | None:
    """Return the change, or None if Python does not take it or it changes no code."""
    old = (SOURCE / file).read_text(encoding="utf-8")
    try:
        new = mutated(file, operator, occurrence)
    except AttributeError:  # cosmic-ray's own, of `except (package.Error, ...)`
        return None
    try:
        with warnings.catch_warnings(action="error"):  # such as `is` beside a literal
            compile(new, file, "exec")
    except (SyntaxError, SyntaxWarning):
        return None
    same = ast.dump(ast.parse(old)) == ast.dump(ast.parse(new))
    if same:
        return None
    # A removed decorator takes its line with it.
    after = new.splitlines()[line - 1] if line <= len(new.splitlines()) else ""
    return Mutant(file, line, operator, occurrence, old.splitlines()[line - 1].strip(), after.strip())


# --------------------------------------------------------------------------------------- coverage


class Contexts:
    """A pytest plugin: coverage notes which test, and which phase of it, ran a line."""

    def __init__(self, measured: Any, seconds: dict[str, float]) -> None:
        self.measured, self.seconds = measured, seconds

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.seconds[nodeid] = -_processor_seconds()
        self.measured.switch_context(nodeid + "|setup")

    def pytest_runtest_logreport(self, report: Any) -> None:
        following = {"setup": "call", "call": "teardown"}.get(report.when)
        self.measured.switch_context(f"{report.nodeid}|{following}" if following else "")
        if report.failed:
            self.seconds[report.nodeid] = float("nan")

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.seconds[nodeid] += _processor_seconds()


def _processor_seconds() -> float:
    return sum(os.times()[:4])


@dataclass(frozen=True, slots=True)
class Covered:
    """What the tests of one file ran: seconds by test, and tests by module and line.

    A line that ran outside a test's own call (a fixture's, a child process's) has all tests of the
    file behind those that ran it themselves.
    """

    seconds: dict[str, float]
    lines: dict[str, dict[int, list[str]]]


LOCKS: dict[str, threading.Lock] = defaultdict(threading.Lock)


def collect(test_file: str) -> Covered:
    """Run a test file under coverage, unless that was done for the same code."""
    with LOCKS[test_file]:
        return _collected(test_file)


def _collected(test_file: str) -> Covered:
    folder = WORK / _digest() / test_file.replace("/", "+")
    kept = folder / f"{hashlib.sha256((ROOT / test_file).read_bytes()).hexdigest()[:16]}.json"
    if not kept.exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        start = time.monotonic()
        _fork(lambda: _covered_run(test_file, folder), folder / "log")
        covered = _read_coverage(folder)
        partial = kept.with_suffix(".partial")
        partial.write_text(json.dumps(asdict(covered)), encoding="utf-8")
        partial.rename(kept)
        for data in folder.glob("data*"):
            data.unlink()
        took = f"{sum(covered.seconds.values()):.0f} s of processor time, {time.monotonic() - start:.0f} s"
        print(f"{test_file}: {len(covered.seconds)} tests, {took}", flush=True)
    record = json.loads(kept.read_text(encoding="utf-8"))
    lines = {file: {int(line): tests for line, tests in each.items()} for file, each in record["lines"].items()}
    return Covered(record["seconds"], lines)


def _covered_run(test_file: str, folder: Path) -> int:
    import coverage
    import pytest

    settings = folder / "coverage.ini"
    settings.write_text(
        f"[run]\nsource = {SOURCE}\nparallel = true\npatch = subprocess\ndata_file = {folder / 'data'}\n"
        "disable_warnings = no-data-collected,module-not-imported,dynamic-conflict\n",
        encoding="utf-8",
    )
    measured, seconds = coverage.Coverage(config_file=str(settings)), dict[str, float]()
    measured.start()
    pytest.main([*_options(), test_file], plugins=[Contexts(measured, seconds)])
    measured.stop()
    measured.save()
    passed = {test: taken for test, taken in seconds.items() if taken == taken}  # those that fail judge nothing
    (folder / "seconds.json").write_text(json.dumps(passed), encoding="utf-8")
    return 0


def _read_coverage(folder: Path) -> Covered:
    from coverage import CoverageData

    seconds = json.loads((folder / "seconds.json").read_text(encoding="utf-8"))
    lines: dict[str, dict[int, set[str]]] = defaultdict(lambda: defaultdict(set))
    for file in sorted(folder.glob("data*")):
        data = CoverageData(str(file))
        data.read()
        for measured in data.measured_files():
            module = Path(measured).relative_to(SOURCE).as_posix()
            for line, contexts in data.contexts_by_lineno(measured).items():
                for context in contexts:
                    test, _, phase = context.rpartition("|")
                    lines[module][line].add(test if phase == "call" else "")
    return _by_line(seconds, lines)


def _by_line(seconds: dict[str, float], lines: dict[str, dict[int, set[str]]]) -> Covered:
    quickest = sorted(seconds, key=lambda test: seconds[test])
    found: dict[str, dict[int, list[str]]] = {}
    for module, by_line in lines.items():
        inside = _lines_of_functions(module)
        found[module] = {}
        for line, tests in by_line.items():
            own = [test for test in quickest if test in tests]
            if line in inside:
                found[module][line] = own + [test for test in quickest if "" in tests and test not in tests]
    return Covered(seconds, found)


@cache
def _lines_of_functions(file: str) -> frozenset[int]:
    """Return the lines below a `def`: others run once, when the module is imported."""
    tree = ast.parse((SOURCE / file).read_text(encoding="utf-8"))
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return frozenset(line for node in functions for line in range(node.body[0].lineno, node.body[-1].end_lineno + 1))


@cache
def _digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in SOURCE.rglob("*") if path.is_file() and path.suffix != ".pyc"):
        digest.update(path.relative_to(SOURCE).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


# ---------------------------------------------------------------------------------------- judging


def stages(file: str, test_files: list[str]) -> list[list[str]]:
    """Return the test files that import a module, those of its name and its room first, the room's others, the rest."""
    parent, _, leaf = ".".join(("secateur", *Path(file).with_suffix("").parts)).rpartition(".")
    imported = re.compile(rf"\b{parent}\.{leaf}\b|\bfrom {parent} import .*\b{leaf}\b")
    texts = {test_file: (ROOT / test_file).read_text(encoding="utf-8") for test_file in test_files}
    own_room = {each for each in test_files if each.split("/")[1] == file.split("/")[0]}
    first = [test_file for test_file in test_files if imported.search(texts[test_file])]
    first.sort(key=lambda each: (leaf.strip("_") not in each, each not in own_room, len(texts[each])))
    room = sorted(own_room - set(first))
    return [first, room, [each for each in test_files if each not in first and each not in room]]


def judges(mutant: Mutant, everything: Iterable[Covered]) -> list[str]:
    """Return the tests that ran the changed statement, file by file, the quickest file first.

    A statement that runs when its module is imported is judged by what runs any function there.
    """
    span = _statement(mutant.file, mutant.line)
    by_file: list[tuple[float, list[str]]] = []
    for covered in everything:
        lines = covered.lines.get(mutant.file, {})
        chosen = span if mutant.line in _lines_of_functions(mutant.file) else lines.keys()
        tests = list(dict.fromkeys(test for line in sorted(chosen) for test in lines.get(line, ())))
        if tests:
            tests.sort(key=lambda test, seconds=covered.seconds: seconds[test])
            by_file.append((sum(covered.seconds[test] for test in tests), tests))
    return in_time(by_file)


def in_time(by_file: list[tuple[float, list[str]]]) -> list[str]:
    """Return the tests of the quickest files, at least of one and of as many as MAX_SECONDS have room for."""
    ordered, total = [], 0.0
    for seconds, tests in sorted(by_file):
        if ordered and total + seconds > MAX_SECONDS:
            break
        ordered, total = [*ordered, *tests], total + seconds
    return ordered


def panels(mutant: Mutant, test_files: list[str], reach: int) -> Iterator[tuple[list[str], float]]:
    """Yield the tests that judge a change, one panel after another, each with its seconds under coverage."""
    near, room, rest = stages(mutant.file, test_files)
    at_import, seen_to_run = mutant.line not in _lines_of_functions(mutant.file), False

    def panel(files: list[str], *, whole: bool = False) -> Iterator[tuple[list[str], float]]:
        """Yield the tests that ran the change, or the `whole` of the files."""
        everything = [collect(file) for file in files]
        all_tests = [(sum(covered.seconds.values()), list(covered.seconds)) for covered in everything]
        if tests := in_time(all_tests) if whole else judges(mutant, everything):
            seconds = {test: taken for covered in everything for test, taken in covered.seconds.items()}
            yield tests, sum(seconds[test] for test in tests)

    if at_import:
        yield from panel([READ_WHOLE], whole=True)
    if mutant.operator == "RemoveDecorator":
        yield from panel([WITHOUT_GRADIENTS], whole=True)
    # File by file, where the first or second one kills most changes.
    for files in [*([file] for file in near), *[room, rest][: reach - 1]]:
        for tests, seconds in panel(files):
            seen_to_run = True
            yield tests, seconds
    if not seen_to_run:
        yield from panel([*near, *room], whole=True)
    if not at_import:
        yield from panel([READ_WHOLE], whole=True)


@cache
def _spans(file: str) -> tuple[tuple[int, int], ...]:
    """Return the lines of each statement; those of a block are its head's."""
    spans = []
    for node in ast.walk(ast.parse((SOURCE / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.stmt | ast.ExceptHandler):
            body = getattr(node, "body", None)
            spans.append((node.lineno, max(node.lineno, body[0].lineno - 1) if body else node.end_lineno))
    return tuple(spans)


def _statement(file: str, line: int) -> range:
    around = [(last - first, first, last) for first, last in _spans(file) if first <= line <= last]
    _, first, last = min(around, default=(0, line, line))
    return range(first, last + 1)


def outcome(mutant: Mutant, tests: list[str], seconds: float) -> str:
    """Run the tests on a copy of src with the change."""
    if not tests:
        return UNCOVERED
    with tempfile.TemporaryDirectory(prefix="secateur-mutant-") as folder:
        source = Path(folder, "src")
        # With the compiled files: only the changed module is compiled again.
        shutil.copytree(ROOT / "src", source, ignore=shutil.ignore_patterns("*.egg-info"))
        text = mutated(mutant.file, mutant.operator, mutant.occurrence)
        (source / "secateur" / mutant.file).write_text(text, encoding="utf-8")
        limit = MORE_SECONDS + int(2 * seconds)
        status = _fork(lambda: _run_tests(tests, limit), Path(folder, "log"), source, wall=20 * limit)
        # pytest: 0 all passed, 1 some failed, 2 a module no longer imports, 4 conftest or a test's name is no longer
        # there; by a signal: the time is over.
        return {0: SURVIVED, 1: KILLED, 2: KILLED, 4: KILLED}.get(status, KILLED if status < 0 else BROKEN)


def _run_tests(tests: list[str], limit: int) -> int:
    import pytest

    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
    sys.dont_write_bytecode = True
    return int(pytest.main(["-x", *_options(), *tests]))


def _options() -> list[str]:
    # The warning is about what the parent has imported.
    return ["-p", "no:cacheprovider", "--hypothesis-profile=first", "-W", "ignore::pytest.PytestAssertRewriteWarning"]


def _fork(work: Any, log: Path, source: Path = ROOT / "src", wall: float = 7200) -> int:
    """Do work in a fork, which has the heavy packages loaded, and return its exit status."""
    child = os.fork()
    if child == 0:
        os.setpgid(0, 0)
        os.chdir(ROOT)
        os.environ["PYTHONPATH"] = str(source)  # for the processes that tests start
        sys.path[:0] = [str(source), str(ROOT)]  # as `python -m pytest` has it
        with log.open("w") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
            status = work()
        os._exit(status)
    deadline = time.monotonic() + wall
    while time.monotonic() < deadline:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            break
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, 9)  # and what it started
    if not ended:
        _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def load_heavy_packages() -> None:
    """Import what most tests import, secateur excepted: each fork then starts in no time."""
    import beartype  # noqa: F401
    import datasets  # noqa: F401
    import gguf  # noqa: F401
    import hypothesis.strategies  # noqa: F401
    import jaxtyping  # noqa: F401
    import matplotlib.figure  # noqa: F401
    import pydantic  # noqa: F401
    import rich  # noqa: F401
    import torch  # noqa: F401
    from transformers import (  # noqa: F401
        Gemma3ForCausalLM,
        GemmaForCausalLM,
        LlamaForCausalLM,
        MistralForCausalLM,
        PreTrainedTokenizerFast,
        Qwen2ForCausalLM,
        Qwen3ForCausalLM,
        Trainer,
    )

    # A fork's collections pass by what the parent has, which halves the time of a short test.
    gc.collect()
    gc.freeze()


def main() -> None:
    """Draw the changes, judge them, and print what lives and the counts by room."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--only", nargs="*", default=[], help="rooms or modules, such as methods/scores.py")
    parser.add_argument("--tests", nargs="*", default=[], help="test files that judge; all of them otherwise")
    parser.add_argument("--reach", type=int, choices=(1, 2, 3), default=3, help="how far to look for tests that judge")
    parser.add_argument("--least", type=float, default=0.9, help="the share that must be killed")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    test_files = options.tests or sorted(
        path.relative_to(ROOT).as_posix() for path in (ROOT / "tests").rglob("test_*.py")
    )
    for test_file in test_files:
        if not (ROOT / test_file).is_file():
            parser.error(f"--tests names {test_file}, which is no file here: name files that exist")
    load_heavy_packages()

    mutants = draw(options.count, options.seed, options.only)
    results = WORK / _digest() / "results.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    known = _known(results)

    def judged(mutant: Mutant) -> str:
        found = UNCOVERED
        for tests, seconds in panels(mutant, test_files, options.reach):
            key = hashlib.sha256(json.dumps([asdict(mutant), tests]).encode()).hexdigest()[:16]
            found = known.get(key)
            if found is None:
                found = outcome(mutant, tests, seconds)
                with results.open("a", encoding="utf-8") as stream:
                    stream.write(json.dumps({"key": key, "outcome": found, **asdict(mutant)}) + "\n")
            if found != SURVIVED:
                break
        return found

    with ThreadPoolExecutor(options.processes) as pool:
        reasons, tried, lived = _equivalent(), Counter[str](), Counter[str]()
        for mutant, found in zip(mutants, pool.map(judged, mutants), strict=True):
            reason = reasons.get((mutant.file, mutant.old, mutant.new))
            if found != KILLED and reason:
                print(f"equivalent {mutant}\n    {reason}", flush=True)
                continue
            room = mutant.file.split("/")[0]
            tried[room] += 1
            if found != KILLED:
                lived[room] += 1
                print(f"{found} {mutant}", flush=True)
    for room in sorted(tried):
        print(f"{room:<16} {tried[room] - lived[room]:>4} of {tried[room]:>4} killed")
    num_tried, num_killed = tried.total(), tried.total() - lived.total()
    share = num_killed / max(num_tried, 1)
    print(f"{num_killed} of {num_tried} killed ({share:.1%}); {len(mutants) - num_tried} that no test can see")
    sys.exit(share < options.least)


def _known(results: Path) -> dict[str, str]:
    if not results.exists():
        return {}
    records = map(json.loads, results.read_text(encoding="utf-8").splitlines())
    return {record["key"]: record["outcome"] for record in records}


def _equivalent() -> dict[tuple[str, str, str], str]:
    listed = yaml.safe_load(EQUIVALENT.read_text(encoding="utf-8")) or []
    for each in listed:
        if each["old"] not in (SOURCE / each["file"]).read_text(encoding="utf-8"):
            sys.exit(
                f"{EQUIVALENT.name}: {each['file']} has no line {each['old']!r} any more; give the line as it is now."
            )
    return {(each["file"], each["old"], each["new"]): each["why"] for each in listed}


if __name__ == "__main__":
    main()
