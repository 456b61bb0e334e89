"""Everything a user can get wrong, and every way a run can be stopped: one sentence, an exit status, nothing left."""

import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml
from bpe_tokenizer import bpe_tokenizer
from damage import edit_json
from little import BEGUN
from recipes import grouped
from run_cli import Outcome, run_cli
from safetensors.torch import load_file, save_file
from shown import assert_sentences

from secateur.cli.common import last_word, stoppable
from secateur.errors import CheckpointError
from secateur.files import disk_errors, staged_file
from secateur.result_directory import check_replaceable
from secateur.store import HOW, place_beside

UP_PROJ = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def model(checkpoints: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the llama checkpoint to damage."""
    return Path(shutil.copytree(checkpoints["llama"], tmp_path / "model"))


@pytest.fixture
def prune(recipe: dict[str, Any], model: Path, tmp_path: Path) -> Callable[..., Outcome]:
    """Run `secateur prune` with changes to the shared recipe, and see that it left nothing beside what was there."""

    def run(*options: object, source: object = model, out: object = None, **changes: Any) -> Outcome:
        file = tmp_path / "recipe.yaml"
        file.write_text(yaml.safe_dump(grouped({**recipe, **changes})), encoding="utf-8")
        before = sorted(tmp_path.rglob("*"))
        outcome = run_cli("prune", source, out or tmp_path / "out", "--recipe", file, *options)
        assert sorted(tmp_path.rglob("*")) == before
        return outcome

    return run


# What a run says of itself before it ends: what it will do, and a line per stage.
SAID = re.compile(r"\d+:\d\d:\d\d .+|.*: removes .+ of memory beyond the interpreter\.")


def sentence_of(outcome: Outcome) -> str:
    """Exit status 2, and nothing said but the stages that ran and this one sentence."""
    assert outcome.status == 2 and outcome.stdout == ""
    *lines, sentence = outcome.stderr.splitlines()
    assert all(SAID.fullmatch(line) for line in lines), outcome.stderr
    assert sentence.startswith("secateur: ") and "Traceback" not in outcome.stderr
    return sentence


def refused(outcome: Outcome, expected: str, longest: int = 400) -> None:
    sentence = sentence_of(outcome)
    assert expected in sentence and len(sentence) < longest, "what is long is not printed whole"


def edit_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | change(tensors), model / "model.safetensors", {"format": "pt"})


def renamed(name: str) -> Callable[[Path], object]:
    return lambda model: (model / "config.json").rename(model / name)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a type that nobody knows": lambda model: edit_json(model / "config.json", model_type="xyzzy"),
    "two weights more": lambda model: edit_tensors(model, lambda _: {"x.a": torch.ones(2), "x.b": torch.ones(2)}),
    "quantised by nothing that is said": lambda model: edit_json(model / "config.json", quantization_config={}),
    "pickle": lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin"),
    "int8 and no quantization_config": lambda model: edit_tensors(
        model, lambda tensors: {UP_PROJ: tensors[UP_PROJ].to(torch.int8)}
    ),
    "an adapter": renamed("adapter_config.json"),
    "a pipeline": renamed("model_index.json"),
    "a part of a pipeline": lambda model: (model / "config.json").write_text('{"_diffusers_version": "0.30.0"}'),
}


def test_damaged_models(model, prune, checkpoints, tmp_path):
    said = dict[str, str]()
    for name, damage in DAMAGES.items():
        shutil.rmtree(model)
        shutil.copytree(checkpoints["llama"], model)
        damage(model)
        said[name] = sentence_of(prune())
    assert_sentences("cli/damaged-models", said, tmp_path)


OPTIONS = """--remove abc
--to 0.4X
--remove 0.2 --to 50K
--remove 0.1,0.2 --like it
--remove 0.1,0.2 --max-loss 0.5
--remove 0.1,0.2 --set remove.share=0.3
--remove 0.1,2
--remove=
--answers=
--vocabulary 320 --set remove.groups=[]
--max-loss inf
--set seed=4294967296
--domain klingon
--domain =file.txt
--domain code --domain general
--domain mine=https://a.b/c
--recipe https://a.b/c
--recipe twice.yaml
--domain mine=rows.csv
--domain mine=wide.csv
--set remove.shrae=0.2
--set align=8
--set num_tokens=1
--set repair.target_mix=2
--set remove.share
--set .share=1
--set seed=[
--set remove.keep_scripts=[latin]
--vocabulary 0 --set seed=1"""
DOMAINS: dict[str, Any] = {
    "an installed domain that is none": {"a": {"installed": "klingon"}},
    "a file without a name": {"a": {"files": [""]}},
    "a mixture that is none": "genral",
    "a name that ends with a blank, as that of the judge's text": {"other text ": {"answers": True}},
    "a name that colours the terminal": {"a\x1b[31m": {"answers": True}},
    "a name that is no text": {1: {"answers": True}},
    "a long list of domains": [f"domain {n}" for n in range(99)],
}


def test_what_a_prune_is_asked_that_cannot_be(prune, model, texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("twice.yaml").write_text("remove: {share: 0.2}\nchoose: {budget: uniform,\n  rounds: 2, budget: curve}\n")
    line = ",".join(f"{number} lines of text that somebody has written into the first row" for number in range(9))
    Path("rows.csv").write_text(f"{line}\n{line}\n")
    names = ",".join(f"c{number}" for number in range(200))
    Path("wide.csv").write_text(f"{names}\n{names}\n")
    Path("one").symlink_to("two")
    Path("two").symlink_to("one")
    said = {options: sentence_of(prune(*options.split())) for options in OPTIONS.splitlines()}
    said |= {name: sentence_of(prune(calibration={"domains": each})) for name, each in DOMAINS.items()}
    said["a key that nobody knows"] = sentence_of(prune(xyzzy=1))
    mine = f"mine={texts['prose']}"
    said["an option beside a mistake in the recipe"] = sentence_of(prune("--domain", mine, calibration=3))
    for out in ("one/out", model / "deep" / "out", "/"):
        said[f"OUT {out}"] = sentence_of(prune(out=out))
    address = "https://huggingface.co/Qwen/Qwen2.5-0.5B"
    said["a web address"] = sentence_of(prune(source=address))
    outcome = prune("--domain", "chat=missing.jsonl")
    said["text that is not there"] = sentence_of(outcome)
    assert outcome.stderr.count("\n") == 1, "before what the run would do"
    refused(prune("--device", "mps"), "machine.device: torch finds no 'mps' here (Could not run ")
    refused(prune(out="/proc/nowhere/out"), "OUT /proc/nowhere/out: no directory can be made there")
    for name in ("x" * 300, "x" * 300 + "/out"):
        refused(prune(out=tmp_path / name), f"{name}: no directory can be made there (File name too long)", longest=600)
    (model / "chat_template.jinja").write_text("{{ raise_exception('no questions') }}")
    said["a chat template that takes no question"] = sentence_of(prune("--answers", 0, evaluate=True))
    assert max(map(len, said.values())) < 400 + len(str(tmp_path)), "what is long is not printed whole"
    assert_sentences("cli/refused", said, tmp_path)


# The command line in a process that does something as it imports a module.
WHILE_IMPORTED = """
import runpy, signal, sys, tempfile
class Acting:
    def find_spec(self, name, path=None, target=None):
        if name == "{module}":
            {action}
sys.meta_path.insert(0, Acting())
signal.signal(signal.SIGINT, signal.default_int_handler)
tempfile._candidate_tempdir_list = lambda: ["/missing"]
runpy.run_module("secateur", run_name="__main__", alter_sys=True)
"""


def python(*arguments: str, stdout: Any = subprocess.PIPE, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a process of its own."""
    options = {"env": os.environ | environment, "stdout": stdout, "stderr": subprocess.PIPE}
    return subprocess.run([sys.executable, *arguments], text=True, **options)


def test_ctrl_c_while_modules_are_imported_is_quiet():
    ended = python("-c", WHILE_IMPORTED.format(module="typer", action="signal.raise_signal(signal.SIGINT)"))
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")


@pytest.mark.parametrize("command", ["verify", "bench"])
def test_no_place_for_temporary_files_is_one_sentence(command):
    ended = python("-c", WHILE_IMPORTED.format(module="torch", action="tempfile.gettempdir()"), command, "x")
    assert ended.returncode == 2 and ended.stderr.count("\n") == 1
    assert ended.stderr.startswith("secateur: No usable temporary directory found in ['/missing']; set TMPDIR to ")


def test_a_full_disk_behind_the_standard_output():
    with open("/dev/full", "w") as full:
        ended = python("-m", "secateur", "recipe", stdout=full)
    assert ended.returncode == 2 and ended.stderr.startswith("secateur: standard output: the disk is full; ")


def test_the_package_alone_imports_nothing_slow_and_a_terminal_may_have_no_columns():
    ask = "import sys, secateur; print({'pydantic', 'typer', 'torch'} & set(sys.modules))"
    ask += "; from secateur.cli.common import CONSOLE; print(CONSOLE.width)"
    assert python("-c", ask, COLUMNS="0").stdout == "set()\n80\n"


def test_a_result_beside_a_gguf_file_is_not_inside_a_model(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    check_replaceable(tmp_path / "out", overwrite=False, protected=tmp_path)


def test_what_other_commands_are_asked_that_cannot_be(model, recipe_file, recipe, prune, tmp_path, texts):
    file, out = tmp_path / "study.yaml", tmp_path / "out"
    refused(run_cli("compare", recipe_file, out), "has no question, so it is no study; give a recipe to")
    file.write_text(yaml.safe_dump({"question": "long? " * 99, "recipe": {"remove": 0.2}, "ratios": [0.2]}))
    refused(run_cli("compare", file, out), "study.yaml: model: Field required, got {")
    assert not out.exists()
    small = {"question": "Which?", "model": str(model), "ratios": [0.2], "seeds": [0], "methods": {"ours": {}}}
    file.write_text(yaml.safe_dump({**small, "recipe": grouped(recipe)}))
    refused(run_cli("compare", file, "/dev/null"), "OUT /dev/null: no directory can be made there (")
    domain = ("--domain", f"mine={texts['prose']}", "--num-blocks", 1, "--sequence-length", 16)
    outcome = run_cli("evaluate", model, "--out", "/proc/nowhere/out", *domain)
    refused(outcome, "OUT /proc/nowhere/out: no directory can be made there (")
    inspected = run_cli("inspect", model, "--recipe", recipe_file, "--remove", "nan")
    assert inspected.status == 2 and inspected.stderr == prune("--remove", "nan").stderr
    for arguments, expected in {
        "prune model": "Missing argument",
        "prune model out --remvoe 0.2": "No such option: --remvoe",
        "prnue model out": "No such command 'prnue'",
    }.items():
        outcome = run_cli(*arguments.split())
        assert outcome.status == 2 and outcome.stdout == ""
        assert expected in outcome.stderr and "Traceback" not in outcome.stderr


# What numpy and the file system say; the first one has no number.
FULL = "Not enough free space to write 512 bytes after offset 0", "1024 requested and 24 written", errno.ENOSPC


@pytest.mark.parametrize("error", FULL)
def test_disk_full_in_export(error, model, tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")

    def full(writer: Any, array: Any) -> None:
        raise OSError(error, "No space left on device") if isinstance(error, int) else OSError(error)

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    bpe_tokenizer().save_pretrained(model)
    file = tmp_path / "out.gguf"
    refused(run_cli("export", model, file, "--no-check"), f"{file}: the disk is full; free ")
    assert list(tmp_path.iterdir()) == [model]


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ((), "out: the disk is full; "),
        (("there",), "there: the disk is full; "),
        (("from", None, "to"), "to: the disk is full; "),  # of a copy
        ((".out.partial-7/model",), "out/model: the disk is full; "),  # as it will be called
    ],
)
def test_a_full_disk_is_that_of_the_file_which_was_written(names, said):
    with pytest.raises(CheckpointError, match=f"^{said}"), disk_errors(Path("out")):
        raise OSError(errno.ENOSPC, "No space left on device", *names)


def test_what_is_wrong_with_a_file_names_it_as_it_will_be_called(tmp_path):
    file = tmp_path / "out.gguf"
    for said in (f"{file}: llama.cpp cannot load it; nothing was written.", "other: is wrong."):
        with pytest.raises(CheckpointError, match=f"^{re.escape(said)}$"), staged_file(file, overwrite=False) as staged:
            raise CheckpointError("other: is wrong." if "other" in said else f"{staged}: llama.cpp cannot load it.")


# What is said is a file, too, so it is written when there is no limit.
PRUNE_WITH_FILE_SIZE_LIMITS = """
import io, resource, signal
from secateur.cli import main
sys.stderr = io.StringIO()
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit fails as on a full disk
for limit in (100, 4000, 10_000, 100_000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        main()
    except SystemExit as end:
        print(end.code)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
sys.__stderr__.write(sys.stderr.getvalue())
"""


def test_disk_full_in_the_middle(model, recipe_file, warm, tmp_path):
    # The limits stop the run log, the tokenizer, the kept readers and the weights.
    out = tmp_path / "deep" / "out"
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-c", BEGUN + PRUNE_WITH_FILE_SIZE_LIMITS, "prune", model, out, "--recipe", recipe_file]
    process = warm.run(command, env=dict(os.environ))
    assert process.stdout.splitlines() == ["2"] * 4, process.stderr
    lines = process.stderr.splitlines()
    errors = [line for line in lines if line.startswith(f"secateur: {out}")]
    assert len(errors) == 4 and all("no file there may become that large" in line for line in errors), lines
    assert {line for line in lines if line.startswith("secateur: ")} - set(errors) == {f"secateur: {HOW}."}
    # What was finished before the kept readers and the weights were too large stays, to resume from.
    store = place_beside(out)
    shutil.rmtree(store)
    store.parent.rmdir()
    assert sorted(tmp_path.rglob("*")) == before


def test_one_of_several_ranks_says_why_all_end(monkeypatch):
    assert last_word("ended.") == "ended."
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, said in (("0", "ended."), ("1", None)):
        monkeypatch.setenv("RANK", rank)
        assert last_word("ended.") == said


@pytest.fixture
def outside_of_nohup() -> Iterator[None]:
    """The tests themselves may run under it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def test_nohup_stays(outside_of_nohup):
    with stoppable():
        assert signal.getsignal(signal.SIGHUP) not in (signal.SIG_IGN, signal.SIG_DFL)
    assert signal.getsignal(signal.SIGHUP) == signal.SIG_DFL
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with stoppable():
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_command_with_its_status(number, outside_of_nohup):
    """Ctrl-C, SIGTERM and the end of the terminal."""
    with pytest.raises(SystemExit) as ended, stoppable():
        signal.raise_signal(number)
    assert ended.value.code == 128 + number


def test_stopped_by_a_signal(model, recipe, tmp_path, warm):
    """In the middle of the rounds."""
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(yaml.safe_dump(grouped({**recipe, "rounds": 2000, "evaluate": False})))
    before = sorted(tmp_path.rglob("*"))
    command = [sys.executable, "-m", "secateur", "prune", model, tmp_path / "place" / "out"]
    process = warm.start([*command, "--recipe", recipe_file], dict(os.environ))
    while not any("group" in log.read_text() for log in (tmp_path / "place").glob(".out.partial-*/run.jsonl")):
        assert psutil.pid_exists(process), warm.wait(command)
        time.sleep(0.05)
    os.kill(process, signal.SIGINT)
    ended = warm.wait(command)
    assert (ended.returncode, ended.stdout) == (130, "")
    assert ended.stderr.splitlines()[-1] == f"secateur: interrupted; {HOW}." and "Traceback" not in ended.stderr
    assert [path.name for path in (tmp_path / "place").iterdir()] == [".out.resume"]
    shutil.rmtree(tmp_path / "place")
    assert sorted(tmp_path.rglob("*")) == before


BLOCKED = """
import hashlib
from secateur.cli.common import last_word, stoppable
with stoppable(0.2):
    print("in", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_ctrl_c_ends_an_operation_that_takes_minutes():
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options |= {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)}
    process = subprocess.Popen([sys.executable, "-c", BLOCKED], **options)
    assert process.stdout and process.stdout.readline() == "in\n"
    # A signal between the print and the long call would be heard by Python at once.
    watched = psutil.Process(process.pid)
    before = watched.cpu_times().user
    while watched.cpu_times().user < before + 0.3:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=1200)
    assert process.returncode == 130 and said.startswith("secateur: interrupted in a long operation; ")
