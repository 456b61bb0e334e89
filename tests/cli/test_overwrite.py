"""`--overwrite` replaces results alone: nothing that secateur did not write, or that was changed since, is deleted."""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from little import BEGUN
from run_cli import Outcome, run_cli
from shown import assert_sentences

QUICK = ("--set", "output.evaluate=false")


@pytest.fixture(scope="module")
def result(checkpoints, recipe_file, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("overwrite") / "result"
    outcome = run_cli("prune", checkpoints["llama"], out, "--recipe", recipe_file, *QUICK)
    assert outcome.status == 0, outcome.stderr
    return out


@pytest.fixture
def out(result, tmp_path) -> Path:
    return Path(shutil.copytree(result, tmp_path / "out"))


@pytest.fixture
def prune(checkpoints, recipe_file, tmp_path) -> Callable[..., Outcome]:
    """Run `prune ... --overwrite` onto `out`, or another place."""

    def run(*options: object, out: Path = tmp_path / "out") -> Outcome:
        return run_cli("prune", checkpoints["llama"], out, "--recipe", recipe_file, *QUICK, "--overwrite", *options)

    return run


def contents(directory: Path) -> dict[str, bytes | str]:
    """Return every file's bytes and every link's target."""
    return {
        str(path.relative_to(directory)): os.readlink(path) if path.is_symlink() else path.read_bytes()
        for path in directory.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def refused(outcome: Outcome) -> str:
    """Return the one line that is said."""
    assert outcome.status == 2 and outcome.stdout == "" and outcome.stderr.count("\n") == 1, outcome.stderr
    return outcome.stderr.strip()


def write(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"my {name}")


NAMES = ("notes.md", ".git/HEAD", "rounds/9/x.txt", "evaluation/mine.json", "model.gguf", "README.md")


def test_what_is_not_as_secateur_wrote_it_is_never_deleted(prune, checkpoints, result, tmp_path):
    out, said = tmp_path / "out", dict[str, str]()

    def kept(about: str, place: Path = out) -> None:
        before = contents(tmp_path)
        said[about] = refused(prune(out=place))
        assert contents(tmp_path) == before

    write(out, "config.json", "package.json", "src/app.ts", ".git/HEAD", ".git/config", "src/a/b.ts")
    kept("a project of the web")
    shutil.rmtree(out)
    shutil.copytree(checkpoints["qwen2"], out)
    write(out, "notes.md")
    kept("another model with notes")
    for about, text in (
        ("another program's result.json", '{"accuracy": 0.9}'),
        ("a damaged one", (result / "result.json").read_text().replace("llama", "mamba")),
    ):
        (out / "result.json").write_text(text)
        kept(about)
    for name in NAMES:
        shutil.rmtree(out)
        shutil.copytree(result, out)
        write(out, name)
        kept(f"a result with {name}")
    shutil.rmtree(out)
    shutil.copytree(result, out)
    write(tmp_path, "data/text.txt")
    (out / "data").symlink_to(tmp_path / "data")
    weights = Path(shutil.move(out / "model.safetensors", tmp_path / "weights"))
    (out / "model.safetensors").symlink_to(weights)
    kept("links to what is elsewhere")
    (tmp_path / "link").symlink_to(out)
    kept("a link to a result", tmp_path / "link")
    assert_sentences("overwrite/prune", said, tmp_path)


def test_a_whole_result_is_replaced_with_all_that_later_commands_wrote(prune, out, checkpoints):
    times = ("--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1)
    for command in (("bench", out, *times), ("evaluate", out, "--against", checkpoints["llama"])):
        (out / "report.html").unlink()
        assert run_cli(*command).status == 0
        assert "</html>" in (out / "report.html").read_text()
    assert {"bench.json", "evaluation.json", "report.html", "evaluation"} < {path.name for path in out.iterdir()}
    outcome = prune("--set", "seed=3")
    assert outcome.status == 0, outcome.stderr
    assert not (out / "bench.json").exists() and not (out / "evaluation").exists()
    assert "seed: 3" in (out / "recipe.yaml").read_text()
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_no_command_replaces_a_file_of_the_user_nor_writes_into_a_result(prune, out, checkpoints, tmp_path):
    llama = checkpoints["llama"]
    write(tmp_path, "thesis.docx", "mine/evaluation.json", "mine/report.html", "model/config.json", "model/notes.txt")
    before, file, mine, model = contents(tmp_path), tmp_path / "thesis.docx", tmp_path / "mine", tmp_path / "model"
    teacher = ("--teacher", llama, "--tokens", 640, "--overwrite")
    commands = {
        "prune into a result": lambda: prune(out=out / "deep" / "more"),
        "prune over what holds the model": lambda: run_cli("prune", out, tmp_path, *QUICK, "--overwrite"),
        "compare into a result": lambda: run_cli("compare", "methods", out / "study"),
        "compare": lambda: run_cli("compare", "methods", mine, "--model", llama, "--small"),
        "export": lambda: run_cli("export", out, "--no-check", file, "--overwrite"),
        "evaluate": lambda: run_cli("evaluate", out, "--out", mine),
        "evaluate into a result": lambda: run_cli("evaluate", llama, "--out", out),
        "bench": lambda: run_cli("bench", out, "--against", tmp_path / "nowhere"),
        "recover": lambda: run_cli("recover", out, *teacher, "--out", model),
        "trim": lambda: run_cli("trim", llama, model, "--vocabulary", 128, "--overwrite"),
    }
    assert_sentences("overwrite/others", {name: refused(run()) for name, run in commands.items()}, tmp_path, llama)
    demo = run_cli("demo", model, "--overwrite")  # says first what it does
    assert demo.status == 2 and "would delete" in demo.stderr and "notes.txt" in demo.stderr
    assert contents(tmp_path) == before


KILLED = """
import os
from pathlib import Path
from secateur.cli import main
rename = Path.rename
def renamed(self, target):
    if Path(target).name == "out" and ".partial-" in self.name:
        os._exit(9)
    return rename(self, target)
Path.rename = renamed
sys.argv = ["secateur", *sys.argv[1:]]
main()
"""


def test_killed_between_the_two_renames_the_old_result_comes_back(prune, out, checkpoints, recipe_file, warm):
    before = contents(out)
    command = ("prune", checkpoints["llama"], out, "--recipe", recipe_file, *QUICK)
    arguments = [sys.executable, "-c", BEGUN + KILLED, *map(str, command), "--overwrite"]
    assert warm.run(arguments, env=dict(os.environ)).returncode == 9
    assert not out.exists()
    outcome = run_cli(*command)
    said, sentence = outcome.stderr.splitlines()
    assert said == f"OUT {out}: a run was killed while it replaced this directory, so the old result is back there."
    assert outcome.status == 2 and "already exists" in sentence
    assert contents(out) == before
    assert prune().status == 0
    assert [path.name for path in out.parent.iterdir()] == ["out"]
