"""Everything a user can get wrong, and every way a run can be stopped: one sentence, an exit status, nothing left."""

import errno
import json
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
from little import BEGUN
from recipes import grouped
from run_cli import Outcome, run_cli
from safetensors.torch import load_file, save_file

from secateur.cli.common import last_word, stoppable
from secateur.errors import CheckpointError
from secateur.files import disk_errors
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


def refused(outcome: Outcome, expected: str, longest: int = 400) -> None:
    """Exit status 2, and nothing said but one sentence (after the lines of the stages that ran) which holds this."""
    assert outcome.status == 2 and outcome.stdout == ""
    *lines, sentence = outcome.stderr.splitlines()
    assert all(SAID.fullmatch(line) for line in lines), outcome.stderr
    assert sentence.startswith("secateur: ") and "Traceback" not in outcome.stderr
    assert expected in sentence and len(sentence) < longest, "what is long is not printed whole"


def edit_config(model: Path, **changes: Any) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, **changes}))


def edit_tensors(model: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    tensors = load_file(model / "model.safetensors")
    save_file(tensors | change(tensors), model / "model.safetensors", {"format": "pt"})


def renamed(name: str) -> Callable[[Path], object]:
    return lambda model: (model / "config.json").rename(model / name)


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "a type that nobody knows": (
        lambda model: edit_config(model, model_type="xyzzy"),
        "transformers knows no model_type 'xyzzy'; use a version of transformers that does.",
    ),
    "two weights more": (
        lambda model: edit_tensors(model, lambda _: {"x.a": torch.ones(2), "x.b": torch.ones(2)}),
        "weights and config disagree, unexpected: x.a (and 1 more); use the config.json and the weights of the same",
    ),
    "quantised by nothing that is said": (
        lambda model: edit_config(model, quantization_config={}),
        "its weights are quantised, and the method that it does not name cannot be read; known are fp8, ",
    ),
    "pickle": (
        lambda model: (model / "model.safetensors").rename(model / "pytorch_model.bin"),
        "only pickle files (pytorch_model.bin), which can run code when opened; convert pickle weights",
    ),
    "int8 and no quantization_config": (
        lambda model: edit_tensors(model, lambda tensors: {UP_PROJ: tensors[UP_PROJ].to(torch.int8)}),
        f"weight {UP_PROJ} is stored as int8, so the weights are quantised, and its config.json has no",
    ),
    "an adapter": (
        renamed("adapter_config.json"),
        "is a PEFT adapter, not a whole model; merge it into its base model",
    ),
    "a pipeline": (renamed("model_index.json"), "is a diffusers pipeline, which makes images and is no language model"),
    "a part of a pipeline": (
        lambda model: (model / "config.json").write_text('{"_diffusers_version": "0.30.0"}'),
        "is a diffusers pipeline",
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_model(name, model, prune):
    damage, expected = DAMAGES[name]
    damage(model)
    outcome = prune()
    refused(outcome, expected, longest=600)
    assert outcome.stderr.splitlines()[-1].count(str(model)) <= 1, "a sentence is not put into another"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("--remove abc", "--remove abc: give a share such as 0.2"),
        ("--to 0.4X", "remove.to: must be parameters, such as 0.4B or 400M, or bytes, such as 250MB, got"),
        ("--remove 0.2 --to 50K", "share and to each say how much goes; give one of them"),
        ("--remove 0.1,0.2 --like it", "--like it: gives one size; leave it out, or --remove and --to."),
        ("--remove 0.1,0.2 --max-loss 0.5", "--max-loss 0.5: gives one size; leave it out"),
        ("--remove 0.1,0.2 --set remove.share=0.3", "--set remove.share: gives one size; leave it out"),
        ("--remove 0.1,2", "recipe: remove.share: Input should be less than 1, got 2.0."),
        ("--remove=", "--remove : give a share such as 0.2"),
        ("--answers=", "--answers : is no share and no file"),
        ("--vocabulary 320 --set remove.groups=[]", "remove.vocabulary: 320 rows are all that the model has"),
        ("--max-loss inf", "max_loss: give a number of nats per token above 0, got inf"),
        ("--set seed=4294967296", "--set: seed: "),
        ("--domain klingon", "'klingon'; allowed: web, encyclopedia, dialogue, multilingual, code, mathematics"),
        ("--domain =file.txt", "--domain =file.txt: give NAME=FILE"),
        ("--domain code --domain general", "--domain code: given twice"),
        ("--domain mine=https://a.b/c", "calibration files https://a.b/c: is a web address; download it"),
        ("--recipe https://a.b/c", "cannot be read (it is a web address); give a YAML file"),
        ("--device mps", "machine.device: torch finds no 'mps' here (Could not run "),
    ],
)
def test_bad_option(options, expected, prune):
    refused(prune(*options.split()), expected)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"xyzzy": 1}, "unknown key 'xyzzy'; give one of calibration, choose, machine, output, "),
        ({"calibration": {"domains": {"a": {"installed": "klingon"}}}}, "calibration.domains.a.installed 'klingon'"),
        ({"calibration": {"domains": {"a": {"files": [""]}}}}, "files.0: String should have at least 1 character"),
        ({"calibration": {"domains": "genral"}}, "or a mixture: general, got 'genral'"),
        ({"calibration": {"domains": [f"domain {n}" for n in range(99)]}}, "got ['domain 0', 'domain 1', 'domain 2'"),
    ],
)
def test_bad_recipe(changes, expected, prune):
    refused(prune(**changes), expected)


def test_a_full_disk_behind_the_standard_output():
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, "-m", "secateur", "recipe"], stdout=full, stderr=-1, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("secateur: standard output: the disk is full; ")


def test_a_terminal_without_columns():
    ask = "from secateur.cli.common import CONSOLE; print(CONSOLE.width)"
    ended = subprocess.run([sys.executable, "-c", ask], env={**os.environ, "COLUMNS": "0"}, stdout=-1, text=True)
    assert ended.stdout == "80\n"


def test_out_below_links_in_a_circle(prune, tmp_path):
    (tmp_path / "one").symlink_to(tmp_path / "two")
    (tmp_path / "two").symlink_to(tmp_path / "one")
    refused(prune(out=tmp_path / "one" / "out"), "its links lead in a circle; choose another place.")


def test_a_chat_template_that_takes_no_question(prune, model):
    (model / "chat_template.jinja").write_text("{{ raise_exception('no questions') }}")
    refused(prune("--answers", 0, evaluate=True), "refuses it (no questions); correct it.")


def test_an_option_does_not_hide_a_mistake_in_the_recipe(prune, texts):
    refused(prune("--domain", f"mine={texts['prose']}", calibration=3), "recipe.yaml: calibration: ")


def test_a_key_that_stands_twice(prune, tmp_path):
    (tmp_path / "bad.yaml").write_text("remove: {share: 0.2}\nchoose: {budget: uniform,\n  rounds: 2, budget: curve}\n")
    outcome = prune("--recipe", tmp_path / "bad.yaml")
    refused(outcome, "bad.yaml: cannot be read (line 3 gives the key budget a second time); give a YAML file")


def test_text_without_names_of_columns_is_not_printed_whole(prune, tmp_path):
    line = ",".join(f"{number} lines of text that somebody has written into the first row" for number in range(9))
    (tmp_path / "mine.csv").write_text(f"{line}\n{line}\n")
    outcome = prune("--domain", f"mine={tmp_path / 'mine.csv'}")
    refused(outcome, "mine.csv, line 2: no column 'text'; there are: 0 lines of text that somebody has written")
    assert len(outcome.stderr.splitlines()[-1].split("mine.csv")[1]) < 230
    names = ",".join(f"c{number}" for number in range(200))
    (tmp_path / "wide.csv").write_text(f"{names}\n{names}\n")
    refused(prune("--domain", f"mine={tmp_path / 'wide.csv'}"), " c25, ...; set `column` to one of them.")


def test_an_address_of_the_web_is_called_one(prune):
    address = "https://huggingface.co/Qwen/Qwen2.5-0.5B"
    refused(prune(source=address), f"model {address}: is a web address; give a hub id (owner/name), or a directory.")


def test_a_recipe_is_no_study(recipe_file, tmp_path):
    outcome = run_cli("compare", recipe_file, tmp_path / "out")
    refused(outcome, "has no question, so it is no study; give a recipe to secateur prune.")
    long = {"question": "long? " * 99, "recipe": {"remove": 0.2}, "ratios": [0.2]}
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(long))
    outcome = run_cli("compare", tmp_path / "study.yaml", tmp_path / "out")
    refused(outcome, "study.yaml: model: Field required, got {")
    assert not (tmp_path / "out").exists()


def test_out_that_cannot_be(prune, model, tmp_path):
    refused(prune(out=model / "deep" / "out"), f"is inside the model's directory {model}; choose one outside of it.")
    refused(prune(out="/"), "OUT /: is the root of the file system; choose a new directory.")
    refused(prune(out="/proc/nowhere/out"), "OUT /proc/nowhere/out: no directory can be made there")
    for name in ("x" * 300, "x" * 300 + "/out"):
        refused(prune(out=tmp_path / name), f"{name}: no directory can be made there (File name too long)", longest=600)


def test_a_result_beside_a_gguf_file_is_not_inside_a_model(tmp_path):
    (tmp_path / "a.gguf").write_bytes(b"GGUF")
    check_replaceable(tmp_path / "out", overwrite=False, protected=tmp_path)


def test_out_of_evaluate_and_compare_cannot_be_made(model, recipe, tmp_path, texts):
    file = tmp_path / "study.yaml"
    small = {"question": "Which?", "model": str(model), "ratios": [0.2], "seeds": [0], "methods": {"ours": {}}}
    file.write_text(yaml.safe_dump({**small, "recipe": grouped(recipe)}))
    domain = ("--domain", f"mine={texts['prose']}", "--num-blocks", 1, "--sequence-length", 16)
    refused(run_cli("compare", file, "/dev/null"), "OUT /dev/null: no directory can be made there (")
    outcome = run_cli("evaluate", model, "--out", "/proc/nowhere/out", *domain)
    refused(outcome, "OUT /proc/nowhere/out: no directory can be made there (")


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


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("prune model", "Missing argument"),
        ("prune model out --remvoe 0.2", "No such option: --remvoe"),
        ("prnue model out", "No such command 'prnue'"),
    ],
)
def test_usage_errors(arguments, expected):
    outcome = run_cli(*arguments.split())
    assert outcome.status == 2 and outcome.stdout == ""
    assert expected in outcome.stderr and "Traceback" not in outcome.stderr


def test_inspect_refuses_what_prune_would(model, recipe_file, prune):
    inspected = run_cli("inspect", model, "--recipe", recipe_file, "--remove", "nan")
    assert inspected.status == 2 and inspected.stderr == prune("--remove", "nan").stderr


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
    process = subprocess.Popen(
        [sys.executable, "-c", BLOCKED],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout and process.stdout.readline() == "in\n"
    # A signal between the print and the long call would be heard by Python at once.
    watched = psutil.Process(process.pid)
    before = watched.cpu_times().user
    while watched.cpu_times().user < before + 0.3:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=1200)
    assert process.returncode == 130 and said.startswith("secateur: interrupted in a long operation; ")
