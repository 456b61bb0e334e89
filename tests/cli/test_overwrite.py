"""`--overwrite` replaces results alone: nothing that secateur did not write, or that was changed since, is deleted."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from little import BEGUN
from run_cli import Outcome, run_cli

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


def refused(outcome: Outcome, *expected: str) -> None:
    assert outcome.status == 2 and outcome.stdout == "" and outcome.stderr.count("\n") == 1, outcome.stderr
    assert all(part in outcome.stderr for part in expected), outcome.stderr


def write(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(f"my {name}")


def test_a_web_project_is_never_deleted(prune, tmp_path):
    write(tmp_path / "out", "config.json", "package.json", "src/app.ts", ".git/HEAD", ".git/config", "src/a/b.ts")
    before = contents(tmp_path)
    refused(
        prune(),
        f"OUT {tmp_path / 'out'}: is no result of secateur (it has no result.json with its digest), and --overwrite "
        "would delete what is not as secateur wrote it: config.json, package.json, src/app.ts, src/a/b.ts and 2 more; "
        "move it elsewhere, or choose a new directory.",
    )
    assert contents(tmp_path) == before


def test_another_models_directory_with_notes_is_never_deleted(prune, checkpoints, result, tmp_path):
    shutil.copytree(checkpoints["qwen2"], tmp_path / "out")
    write(tmp_path / "out", "notes.md")
    # Another program's file of that name, and one of ours that is damaged, are no proof.
    for text in (None, '{"accuracy": 0.9}', (result / "result.json").read_text().replace("llama", "mamba")):
        if text is not None:
            (tmp_path / "out" / "result.json").write_text(text)
        before = contents(tmp_path)
        refused(prune(), "is no result of secateur", "config.json, ")
        assert contents(tmp_path) == before


NAMES = ("notes.md", ".git/HEAD", "rounds/9/x.txt", "evaluation/mine.json", "model.gguf", "README.md (changed since)")


@pytest.mark.parametrize("name", NAMES)
def test_a_file_among_those_of_a_result_is_never_deleted(name, prune, out):
    write(out, name.split()[0])
    before = contents(out)
    refused(prune(), f"--overwrite would delete what is not as secateur wrote it: {name}; move it elsewhere")
    assert contents(out) == before


def test_a_link_is_never_deleted_nor_followed(prune, out, tmp_path):
    write(tmp_path, "data/text.txt")
    (out / "data").symlink_to(tmp_path / "data")
    weights = Path(shutil.move(out / "model.safetensors", tmp_path / "weights"))
    (out / "model.safetensors").symlink_to(weights)
    before = contents(tmp_path)
    refused(prune(), "wrote it: data, model.safetensors; move it")
    assert contents(tmp_path) == before
    (tmp_path / "link").symlink_to(out)
    refused(prune(out=tmp_path / "link"), "is a symbolic link, which is never replaced")
    assert contents(out) == {name.removeprefix("out/"): old for name, old in before.items() if name.startswith("out/")}


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


def test_a_result_is_neither_written_into_another_one_nor_over_the_model_within_it(prune, out, tmp_path):
    before = contents(tmp_path)
    refused(prune(out=out / "deep" / "more"), f"is inside the result {out}; choose a directory outside of it.")
    refused(run_cli("compare", "methods", out / "study"), f"is inside the result {out}; choose a directory outside")
    refused(run_cli("prune", out, tmp_path, *QUICK, "--overwrite"), "holds the model that is being pruned")
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


def test_killed_between_the_two_renames_the_old_result_comes_back_and_is_told(
    prune, out, checkpoints, recipe_file, warm
):
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


def test_other_commands_replace_no_file_of_the_user(out, checkpoints, tmp_path):
    write(tmp_path, "thesis.docx", "mine/evaluation.json", "mine/report.html")
    before = contents(tmp_path)
    file, place = tmp_path / "thesis.docx", tmp_path / "mine"
    export = ("export", out, "--no-check")
    refused(run_cli(*export, file, "--overwrite"), f"{file}: is no GGUF file, so --overwrite does not replace it")
    refused(run_cli("evaluate", out, "--out", place), "has an evaluation.json that evaluate did not write")
    refused(run_cli("evaluate", checkpoints["llama"], "--out", out), f"--out {out}: is another result")
    options = ("--model", checkpoints["llama"], "--small")
    refused(run_cli("compare", "methods", place, *options), f"compare {place}: holds other files")
    refused(run_cli("bench", out, "--against", tmp_path / "nowhere"), "nowhere")
    assert contents(tmp_path) == before


def test_recover_and_trim_keep_the_same_rule(out, checkpoints, tmp_path):
    write(tmp_path / "mine", "config.json", "notes.txt")
    before = contents(tmp_path)
    teacher = ("--teacher", checkpoints["llama"], "--tokens", 640, "--overwrite")
    refused(run_cli("recover", out, *teacher, "--out", tmp_path / "mine"), "would delete", "notes.txt")
    trim = ("trim", checkpoints["llama"], tmp_path / "mine", "--vocabulary", 128, "--overwrite")
    refused(run_cli(*trim), "would delete", "notes.txt")
    demo = run_cli("demo", tmp_path / "mine", "--overwrite")  # says first what it does
    assert demo.status == 2 and "would delete" in demo.stderr and "notes.txt" in demo.stderr
    assert contents(tmp_path) == before
    assert json.loads((out / "result.json").read_text())["files"]
