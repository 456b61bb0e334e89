"""README and the pages of docs do what they say.

Commands run on a tiny model that bears the pages' names. What needs a GPU, several processes or minutes is parsed by
the real command line. Recipes are parsed, and Python runs. By default the commands of
README alone run; `pytest -m slow` runs those of all pages. extend.md has a test of its own (test_extend.py).
"""

import ast
import csv
import gzip
import importlib
import inspect
import json
import re
import shlex
import shutil
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec
from itertools import groupby
from pathlib import Path
from runpy import run_path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
import yaml
from bpe_tokenizer import CORPUS, bpe_tokenizer
from models import saved, tiny_llama
from run_cli import run_cli

import secateur
from secateur.cli import app
from secateur.recipe import Recipe, parse_recipe

ROOT = Path(__file__).parents[1]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in (ROOT / "docs").rglob("*.md")}
PAGES["README.md"] = (ROOT / "README.md").read_text(encoding="utf-8")
ELSEWHERE = ("docs/extend.md", "docs/testing.md")  # their blocks have tests of their own
HISTORY = ("docs/LOG.md",)  # commands as they were on the day
GUIDES = sorted(page for page in PAGES if page not in (*ELSEWHERE, *HISTORY))
COMMANDS: dict[str, Any] = typer.main.get_command(app).commands  # type: ignore[attr-defined]

pytestmark = pytest.mark.usefixtures("unproved")

WORDS = "the pruned channels of a layer are read by one linear map and written by two others".split()
DOMAINS = {"prose": {"files": ["law.txt"]}, "chat": {"files": ["chat.jsonl"]}}
SMALL = {"num_tokens": 640, "sequence_length": 32}
SETS = [f"--set=calibration.{key}={value}" for key, value in SMALL.items()]
SETS += ["--set=calibration.domains={prose: {files: law.txt}}"]
SETS += ["--set=remove.align=8", "--set=polish.num_tokens=64", "--set=polish.batch_tokens=32"]
# What makes a command small: words in place of others, and options behind it.
INSTEAD = {
    "Qwen/Qwen2.5-0.5B-Instruct": "path/to/model",  # a hub id
    "32768": "448",
    "300000": "640",
    "chat=~/sharegpt.json": "chat=sharegpt.json",
    "benchmarks/equal_bytes.yaml": "recipe.yaml",  # its text is beside the repository
    "tasks.yaml": "recipe.yaml",
    "code": "code=notes",  # all of Python's library
    "0.4B": "170K",  # sizes of the tiny model
    "250MB": "360KB",
}
BEHIND = {
    "prune": SETS,
    "measure": SETS,
    "inspect": SETS,
    "trim": ["--domain=prose=law.txt", *SETS[:2]],
    "recover": ["--set=recover.held_out_blocks=1", "--set=recover.batch_tokens=64"],
    "bench": ["--prompt-tokens=16", "--new-tokens=2", "--repeats=1"],
    "push": ["--dry-run"],  # there is no hub
}
NOT_RUN = {
    "compare": "minutes",
    "cuda:1": "a GPU",
    "demo": "minutes",
    "general": "a hub",
    "calibration.answers=1": "blocks in which the prompts that come with secateur fit",
    "vllm": "vLLM",  # tests/formats/test_vllm.py runs it
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def pages_with(language: str) -> list[str]:
    return [page for page in GUIDES if blocks(page, language)]


def fast_first(pages: list[str]) -> list[Any]:
    """Return the pages as parameters, all but README slow."""
    return [page if page == "README.md" else pytest.param(page, marks=pytest.mark.slow) for page in pages]


def inline_code(page: str) -> Iterator[str]:
    """Yield what stands between backticks outside of blocks, on one line each."""
    prose = re.sub(r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE)
    yield from (" ".join(found.split()) for found in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose))


def commands(page: str) -> Iterator[list[str]]:
    """Yield the commands of a page's shell blocks as words, without comments."""
    for line in "\n".join(blocks(page, "sh")).replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        for is_between, part in groupby(words, "&&".__eq__):
            if not is_between:
                yield list(part)


def arguments(words: list[str]) -> list[str] | None:
    """Return what follows `secateur`, behind a launcher too; None for another program."""
    if Path(words[0]).name == "secateur":
        return words[1:]
    return words[words.index("secateur") + 1 :] if words[0] in ("torchrun", "accelerate") else None


def check_other(words: list[str]) -> None:
    """Check that what a command names is there: targets, files and their options, extras, tests."""
    match words:
        case ["make", target, *_]:
            assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE), words
        case ["python" | "bash", file, *options] if "/" in file:
            text = (ROOT / file).read_text(encoding="utf-8")
            assert all(f'"{option}"' in text for option in options if option.startswith("--")), words
        case ["python3", "-m", "venv", _] | ["vllm", "serve", "smaller", *_] | ["llama-imatrix" | "llama-quantize", *_]:
            pass
        case [("pytest" | "python"), *options] if "pytest" in words:
            assert all((ROOT / option).exists() for option in options if option.endswith(".py")), words
        case [program, "install", *what] if Path(program).name == "pip":
            extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
            assert {name for each in what for name in re.findall(r"\[(.+)\]", each)} <= extras.keys(), words
        case _:
            pytest.fail(f"no test knows the command {words}")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with all that the pages name: a dense model, one that was pruned, text, a recipe."""
    world = tmp_path_factory.mktemp("world")
    model = world / "path" / "to" / "model"
    tokenizer = bpe_tokenizer(vocab_size=630, corpus=[*CORPUS, " ".join(WORDS), PAGES["docs/LOG.md"][:20_000]])
    saved(model, tiny_llama(vocab_size=640, num_layers=6), tokenizer)
    (world / "MODEL").symlink_to(model)
    saved(model.with_name("sibling"), tiny_llama(vocab_size=640, num_layers=6, seed=1), tokenizer)
    lines = [" ".join(WORDS[start % 17 :] + WORDS[: start % 7]) + f" {start}" for start in range(2600)]
    (world / "law.txt").write_text("\n".join(lines))
    (world / "chat.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    asked = ({"messages": [{"role": "user", "content": f"What is {number}?"}]} for number in range(40))
    (world / "prompts.jsonl").write_text("\n".join(map(json.dumps, asked)))
    turns = [[{"from": "human", "value": "Go on."}, {"from": "gpt", "value": line}] for line in lines]
    (world / "sharegpt.json").write_text(json.dumps([{"conversations": each} for each in turns]))
    (world / "notes" / "deep").mkdir(parents=True)
    (world / "notes" / "deep" / "page.md").write_text("\n".join(lines))
    with gzip.open(world / "more.json.gz", "wt") as file:
        json.dump([{"text": line} for line in lines], file)
    with open(world / "rows.csv", "w", newline="") as file:
        csv.writer(file).writerows([["question"], *([line] for line in lines)])
    recipe: dict[str, Any] = {"remove": 0.2, "calibration": {"domains": DOMAINS}}
    (world / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.MonkeyPatch.context() as patched:
        patched.chdir(world)
        options = BEHIND["prune"] + ["--set=output.evaluate=false"]
        done = run_cli("prune", "path/to/model", "smaller", "--recipe", "recipe.yaml", *options)
    assert done.status == 0, done.stderr
    return world


@pytest.fixture
def inside(world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(world)
    return world


DONE: set[tuple[str, ...]] = set()  # the same command stands on several pages


def run_small(words: list[str]) -> None:
    """Run `secateur WORDS`, smaller, in the world."""
    verb, *rest = words
    file = rest.pop() if ">" in rest else None
    rest = [INSTEAD.get(word, word) for word in rest if word != ">"]
    for option in ("--tasks", "--limit"):  # these need rows of questions
        if option in rest:
            del rest[rest.index(option) : rest.index(option) + 2]
    if tuple(words) in DONE:
        return
    DONE.add(tuple(words))
    if verb in ("prune", "trim", "measure") and "--overwrite" not in rest:
        shutil.rmtree(rest[1], ignore_errors=True)
    done = run_cli(verb, *rest, *BEHIND.get(verb, []))
    assert done.status == 0, (verb, rest, done.stderr)
    if file:  # recipe.yaml of other pages stays small
        parse_recipe(yaml.safe_load(done.stdout))


@pytest.mark.parametrize("page", pages_with("sh"))
def test_the_commands_of_a_page_are_legal(page: str) -> None:
    for words in commands(page):
        if given := arguments(words):
            verb, *rest = given
            COMMANDS[verb].make_context(verb, rest[: rest.index(">")] if ">" in rest else rest)
        else:
            check_other(words)


@pytest.mark.parametrize("page", fast_first(pages_with("sh")))
def test_the_commands_of_a_page_run(page: str, inside: Path) -> None:
    for words in commands(page):
        if Path(words[0]).name == "secateur" and not NOT_RUN.keys() & set(words):
            run_small(words[1:])


@pytest.mark.parametrize("page", sorted(PAGES.keys() - set(HISTORY)))
def test_commands_and_recipes_in_sentences_are_known(page: str) -> None:
    for code in inline_code(page):
        group, _, value = code.partition(": ")
        if re.match(r"secateur [a-z]", code):
            verb, *options = (word for word in code.split()[1:] if word != "...")
            known = {option for parameter in COMMANDS[verb].params for option in (*parameter.opts, "--help")}
            assert {option.partition("=")[0] for option in options if option.startswith("--")} <= known, code
        elif re.match(r"(python|pytest|make|bash|pip) [a-z.-]", code) and "DIR" not in code:
            check_other(shlex.split(code))
        elif group in (*Recipe.model_fields, "preset") and re.match(r"[^A-Z]+$", value):
            parse_recipe(yaml.safe_load(code))
        elif re.fullmatch(r"(src|docs|tests|tools|benchmarks)/[\w./-]+\.\w+", code) and "NAME" not in code:
            assert (ROOT / code).exists(), code


@pytest.mark.parametrize("page", pages_with("yaml"))
def test_recipes_are_recipes(page: str) -> None:
    for block in blocks(page, "yaml"):
        assert parse_recipe(yaml.safe_load(block)) != Recipe() or "preset" in block


CODE = {page: blocks(page, "python") for page in pages_with("python")}
SCRIPTS = [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("tools/*.py")]
CODE |= {file.name: [file.read_text(encoding="utf-8")] for file in SCRIPTS}


@pytest.mark.parametrize("place", sorted(CODE))
def test_python_is_legal(place: str) -> None:
    for node in (node for text in CODE[place] for node in ast.walk(ast.parse(text))):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in ("secateur", "transformers"):
            module = importlib.import_module(str(node.module))
            for each in node.names:
                assert hasattr(module, each.name) or find_spec(f"{node.module}.{each.name}"), each.name
        elif isinstance(node, ast.Call) and ast.unparse(node.func).startswith("secateur."):
            function = getattr(secateur, ast.unparse(node.func).removeprefix("secateur."))
            inspect.signature(function).bind(*node.args, **{str(each.arg): each.value for each in node.keywords})


@pytest.mark.parametrize("page", fast_first(pages_with("python")))
def test_python_runs(page: str, inside: Path) -> None:
    for block in blocks(page, "python"):
        if "secateur.prune" in block:
            shutil.rmtree("smaller", ignore_errors=True)
        small = {"calibration": {"domains": DOMAINS, **SMALL}, "polish": False}
        text = block.replace('"remove": 0.2}', '"remove": {"share": 0.2, "align": 8}, **small}')
        exec(text.replace(', tasks=("arc_easy",), limit=100', ""), {"small": small})


NOTEBOOKS = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in ROOT.glob("docs/notebooks/*.ipynb")}
SMALLER = {
    '"smollm2-135m"': '"path/to/model"',
    "model: smollm2-135m": "model: path/to/model",
    '"remove": 0.2,': '"remove": {"share": 0.2, "align": 8},',
    '"num_tokens": 8192,': '"num_tokens": 640, "sequence_length": 32,',
    "num_tokens: 4096": "num_tokens: 640",
    "sequence_length: 256": "sequence_length: 32",
    "polish: false": "polish: false\n  remove: {align: 8}",
    "seeds: [0, 1, 2]": "seeds: [0, 1]",
    "prompt_tokens=128, new_tokens=16, repeats=3": "prompt_tokens=16, new_tokens=2, repeats=2",
}


def code_cells(name: str) -> list[dict[str, Any]]:
    return [cell for cell in NOTEBOOKS[name]["cells"] if cell["cell_type"] == "code"]


@pytest.mark.parametrize("name", sorted(NOTEBOOKS))
def test_a_notebook_shows_no_error_and_no_place_of_a_machine(name: str) -> None:
    for cell in code_cells(name):
        ast.parse("".join(line for line in cell["source"] if not line.startswith("%")))
        assert not [output for output in cell["outputs"] if output["output_type"] == "error"]
    assert not re.search(r"/(home|root|tmp|work)/", json.dumps(NOTEBOOKS[name])), "a place of the machine that ran it"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["prune_your_own.ipynb", "compare_methods.ipynb"])  # test_extend.py adds a score
def test_a_notebook_runs(name: str, inside: Path) -> None:
    text = "\n\n".join("".join(cell["source"]) for cell in code_cells(name))
    for word, small in SMALLER.items():
        text = text.replace(word, small)
    exec(text.replace("plt.show()", 'plt.savefig("lost.png"); plt.close()'), {})


def test_the_pictures_show_todays_tables() -> None:
    tool = SimpleNamespace(**run_path(str(ROOT / "tools" / "pictures.py")))
    for name, (measured, _) in tool.PICTURES.items():
        picture = (ROOT / "docs" / "images" / f"{name}.svg").read_text(encoding="utf-8")
        assert tool.digest(measured()) in picture, f"{name}: run python tools/pictures.py"
