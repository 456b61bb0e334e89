"""Packages import one way, three rules hold, optional packages are imported where they are used. Read from source."""

import ast
import tokenize
from collections.abc import Iterable, Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "secateur"
# From top to bottom: a module imports from its own package and from lines below it, never from beside it.
PACKAGES = [
    "__init__ __main__",
    "cli",
    "api",
    "evaluation",
    "pruning",
    "recovery",
    "formats report",
    "methods",
    "stream",
    "vocabulary",
    "data",
    "model",
    "store result_directory files ranks recipe log plugins facts errors",
]
GROUND = set(PACKAGES[-1].split())
WITHOUT_RECIPE = {"model", "data", "vocabulary", "stream", "methods"}
WITH_TRANSFORMERS = {"model", "vocabulary", "data", "formats", "evaluation", "recovery"}
WITH_RANKS = {"cli", "api", "recovery", "evaluation", "pruning", "store", "result_directory", "files"}
WITH_RANKS |= {"stream.statistics", "stream.losses", "stream.judge"}
# Plain numbers, which all rooms above may read; the rest of report makes pages of them.
RECORDS = {"report.records"}
ONLY_INSIDE_FUNCTIONS = {"lm_eval", "peft", "gguf", "pyarrow", "datasets", "llama_cpp", "vllm"}
# What the package may weigh: who adds deletes. Each limit only ever falls.
MAX_TOKENS = 167_483
MAX_MODULES, MAX_CHAIN, MAX_FAN_OUT = 95, 14, 15

LAYOUT = {getattr(tokenize, kind) for kind in "COMMENT NL NEWLINE INDENT DEDENT ENCODING ENDMARKER".split()}

MODULES = {".".join(file.relative_to(SOURCE).with_suffix("").parts): file for file in sorted(SOURCE.rglob("*.py"))}
TREES = {module: ast.parse(file.read_text(encoding="utf-8")) for module, file in MODULES.items()}


def imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the dotted names of the modules that import statements among the nodes name."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, "relative import; write from secateur.x import y"
            names |= {node.module if node.module != "secateur" else f"secateur.{alias.name}" for alias in node.names}
    return names


def own(module: str) -> set[str]:
    """Return the modules of secateur that this one imports, also inside functions, without their first part."""
    names = imported(ast.walk(TREES[module]))
    return {name.removeprefix("secateur.") for name in names if name.startswith("secateur.")}


def tokens_of(module: str) -> int:
    """Count the tokens of a module's code, without comments, docstrings and layout."""
    prose: set[int] = set()
    for node in ast.walk(TREES[module]):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            prose |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    with MODULES[module].open("rb") as file:
        tokens = tokenize.tokenize(file.readline)
        return sum(token.type not in LAYOUT and token.start[0] not in prose for token in tokens)


def line_of(module: str) -> int:
    (number,) = (number for number, line in enumerate(PACKAGES) if module.split(".")[0] in line.split())
    return number


def outside_functions(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        is_typing = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not isinstance(child, ast.FunctionDef) and not is_typing:
            yield child
            yield from outside_functions(child)


def is_in(module: str, places: set[str]) -> bool:
    return module in places or module.split(".")[0] in places


@pytest.mark.parametrize("module", MODULES)
def test_packages_import_one_way(module):
    package = module.split(".")[0]
    others = {name for name in own(module) if name.split(".")[0] != package and not {name, package} <= GROUND}
    wrong = sorted(name for name in others if line_of(name) <= line_of(module))
    assert not wrong, f"{module} imports {wrong}, which are not below it in PACKAGES"


@pytest.mark.parametrize("module", MODULES)
def test_the_three_rules(module):
    roots = {name.split(".")[0] for name in imported(ast.walk(TREES[module]))}
    assert not (is_in(module, WITHOUT_RECIPE) and "recipe" in own(module)), "kernels take numbers and tensors"
    assert is_in(module, WITH_TRANSFORMERS) or "transformers" not in roots, "transformers stays at the edges"
    assert is_in(module, WITH_RANKS) or "ranks" not in own(module), "who works on what is decided above the kernels"
    at_once = {name.split(".")[0] for name in imported(outside_functions(TREES[module]))}
    assert not at_once & ONLY_INSIDE_FUNCTIONS, "optional packages are imported where they are used"


@pytest.mark.parametrize("module", MODULES)
def test_modules_have_a_subject_and_an_end(module):
    assert ast.get_docstring(TREES[module]), "a module begins with what goes in and what comes out"
    assert len(own(module)) <= MAX_FAN_OUT


def loaded_with(modules: set[str]) -> set[str]:
    """Return the modules that are imported with these, and what each names of other packages, as PACKAGE.NAME."""
    names, waiting = set[str](), list(modules)
    while waiting:
        names.add(module := waiting.pop())
        nodes = list(outside_functions(TREES[module]))
        named = {name.removeprefix("secateur.") for name in imported(nodes)}
        waiting += [name for name in named if name in MODULES and name not in names]
        froms = [node for node in nodes if isinstance(node, ast.ImportFrom)]
        names |= {f"{node.module}.{alias.name}" for node in froms for alias in node.names}
    return names


def test_what_is_said_of_a_model_waits_for_nothing_that_trains():
    """Trainer and its arguments bring accelerate, datasets, pandas and peft, half a second of each command."""
    names = loaded_with({"cli.__init__", "cli.prune", "pruning.inspect", "evaluation.tables"})
    assert "model.bind" in names and "torch.nn" in names
    assert not names & {"api", "recovery.train", "transformers.Trainer", "transformers.TrainingArguments"}
    assert "torch.utils.benchmark.Timer" not in names
    # Help does not even wait for torch.
    assert not {name for name in loaded_with({"cli.__init__", "cli.prune", "cli.measure"}) if name.startswith("torch")}


def test_modules_are_few_and_in_short_rows_that_never_lead_back():
    imports, length = {module: own(module) & MODULES.keys() for module in MODULES}, dict[str, int]()
    for module in TopologicalSorter(imports).static_order():  # an error names modules that import each other
        length[module] = 1 + max((length[name] for name in imports[module]), default=0)
    assert len(MODULES) <= MAX_MODULES and max(length.values()) <= MAX_CHAIN


@pytest.mark.parametrize("module", [name for name in MODULES if is_in(name, {"pruning", "recovery", *RECORDS})])
def test_runs_and_records_know_records_and_no_page(module):
    pages = {name for name in own(module) if name.startswith("report.")} - RECORDS
    assert not pages, f"{module} imports {sorted(pages)}; a verb writes what people read after the run"


def test_the_package_stays_within_its_budget():
    assert sum(map(tokens_of, MODULES)) <= MAX_TOKENS
