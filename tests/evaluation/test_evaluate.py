"""`secateur evaluate` on text: figures against computations by hand, resume after a kill, mistakes in a sentence."""

import contextlib
import json
import math
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from models import saved
from recipes import grouped
from run_cli import run_cli
from shown import assert_sentences
from tiny_tokenizer import tiny_tokenizer
from transformers import AutoModelForCausalLM

from secateur.api import prune
from secateur.data.blocks import JudgedText
from secateur.errors import CheckpointError
from secateur.evaluation.evaluate import evaluate
from secateur.evaluation.text import _changes, named_blocks
from secateur.facts import standard_error
from secateur.log import silent
from secateur.recipe import Domain
from secateur.report.records import Evaluation


@pytest.fixture(scope="module")
def result(checkpoints, recipe, tmp_path_factory) -> Path:
    """A pruned llama; the tests that write into it take a copy."""
    out = tmp_path_factory.mktemp("evaluate") / "pruned"
    prune(checkpoints["llama"], grouped({**recipe, "remove": 0.2}), out=out)
    return out


@pytest.fixture
def copy(result, tmp_path) -> Path:
    return Path(shutil.copytree(result, tmp_path / "copy"))


@pytest.mark.parametrize("text", ["{}", "[" * 5000, '{"calibration": 1}'])
def test_a_damaged_result_is_a_sentence(text, tmp_path):
    (tmp_path / "result.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"result.json: .*make it again"):
        list(_changes(tmp_path, JudgedText({})))


def test_against_the_dense_model(copy, checkpoints):
    found = evaluate(copy, checkpoints["llama"])
    written = json.loads((copy / "result.json").read_text())
    assert found.notes == () and found.kl is not None and set(found.kl) == {"prose", "code"}
    for which, measured in found.models.items():
        for domain, quality in measured.domains.items():
            # The same held-out blocks as the run's own figures, so the same losses.
            assert quality.nats_per_token == pytest.approx(written[f"{which}_losses"][domain]["nats_per_token"])
            assert quality.perplexity == pytest.approx(math.exp(quality.nats_per_token))
    assert found.dense is not None and found.differences is not None
    for domain, change in found.differences.domains.items():
        dense, pruned = found.dense.domains[domain], found.pruned.domains[domain]
        assert change.nats_per_token == pytest.approx(pruned.nats_per_token - dense.nats_per_token)
        pairs = [after - before for before, after in zip(dense.document_nats, pruned.document_nats, strict=True)]
        error = standard_error(pairs, dense.document_tokens)
        assert change.standard_error == error and dense.document_tokens == pruned.document_tokens
        assert found.kl[domain].kl > 0
    for which, measured in (("dense", found.dense), ("pruned", found.pruned)):
        number = ("dense", "pruned").index(which)
        assert measured.other_text.nats_per_token == pytest.approx(written["other_text"][number]["nats_per_token"])
    assert found.differences.other_text.nats_per_token != 0 and found.pruned.other_text.num_bytes > 20
    text = (copy / "evaluation.json").read_text()
    assert Evaluation.from_json(text, "evaluation.json").to_json() == found.to_json() == text
    keys = ["model", "against", "notes", "dense", "pruned", "kl", "differences", "versions"]
    keys += ["own_answers"]
    assert list(json.loads(text)) == keys and list(json.loads(text)["pruned"]) == ["domains", "other_text", "tasks"]


def test_named_domains_give_the_blocks_asked_for_whatever_their_shares(texts):
    domains = {name: Domain(files=(str(texts[name]),), share=share) for name, share in (("prose", 3), ("code", 1))}
    for num_blocks in (1, 7, 10, 11):
        blocks, _ = named_blocks(domains, num_blocks, 24, tiny_tokenizer(), silent)
        assert {name: tuple(each.ids_NT.shape) for name, each in blocks.items()} == dict.fromkeys(
            domains, (num_blocks, 24)
        )
        assert len({tuple(ids) for ids in blocks["prose"].ids_NT.tolist()}) == num_blocks


def test_blocks_are_no_longer_than_the_model_reads(copy, texts):
    found = evaluate(copy, domains={"prose": Domain(files=(str(texts["prose"]),))}, num_blocks=2)
    assert found.pruned.domains["prose"].num_tokens == 2 * (256 - 1)  # the first of its 256 positions predicts nothing


def test_a_killed_evaluation_goes_on(copy, checkpoints, texts, tmp_path, warm):
    domains = [f"--domain={name}={file}" for name, file in texts.items()]
    arguments = ["evaluate", copy, "--against", checkpoints["llama"], *domains]
    arguments += ["--num-blocks", "8", "--sequence-length", "32", "--json"]
    command = [sys.executable, Path(__file__).parents[1] / "little_main.py", *arguments]
    process = warm.start(command, dict(os.environ))
    while not list((copy / "evaluation").glob("*.json")):
        assert psutil.pid_exists(process), warm.wait(command)
        time.sleep(0.002)
    with contextlib.suppress(ProcessLookupError):  # a busy machine may let it end before
        os.kill(process, signal.SIGKILL)
    warm.wait(command)
    done = {part: part.stat().st_mtime_ns for part in (copy / "evaluation").glob("*.json")}
    assert done
    second = run_cli(*arguments)
    assert second.status == 0
    assert {part: part.stat().st_mtime_ns for part in done} == done  # not computed again
    fresh = run_cli(*arguments, "--out", tmp_path / "fresh")
    assert json.loads(second.stdout) == json.loads(fresh.stdout)
    parts = [
        {part.name for part in folder.iterdir()} for folder in (copy / "evaluation", tmp_path / "fresh/evaluation")
    ]
    assert parts[0] == parts[1] and len(parts[0]) == 5  # text and answers of both, KL


def test_damaged_parts_are_measured_again(copy):
    found, heard = evaluate(copy, against=copy, other_dense=True), list[str]()
    parts = sorted((copy / "evaluation").iterdir())
    whole = [part.read_bytes() for part in parts]
    parts[0].write_bytes(b"")
    parts[1].write_bytes(whole[1][:-5])
    parts[2].write_bytes(re.sub(rb"\d\.\d", b"9.9", whole[2], count=1))
    parts[3].write_bytes(whole[3].replace(b'"step"', b'"stop"'))
    assert evaluate(copy, against=copy, other_dense=True, tell=heard.append) == found
    assert [part.read_bytes() for part in parts] == whole
    said = "finished by an earlier run, is damaged on disk, so it is done again."
    assert sorted(heard) == [f"{part.parent}: {part.stem}, {said}" for part in parts[:4]]


def test_another_model_in_the_same_place_is_measured_anew(copy):
    before = evaluate(copy).pruned.domains
    model = AutoModelForCausalLM.from_pretrained(copy)
    with torch.no_grad():
        model.lm_head.weight.mul_(0.5)
    model.save_pretrained(copy)
    assert evaluate(copy).pruned.domains != before


MISTAKES = """nowhere
TEXTS
DENSE
DENSE --out OUT
RESULT --against nowhere
RESULT --against WIDER
RESULT --against WIDER --other-dense
RESULT --domain code=nowhere.txt
RESULT --domain kode
RESULT --domain code --sequence-length 999
RESULT --out TEXT
RESULT --tasks-data nowhere"""


def test_mistakes_are_one_sentence(result, checkpoints, texts, tmp_path):
    places = {"TEXTS": texts["prose"].parent, "TEXT": texts["prose"], "DENSE": checkpoints["llama"], "RESULT": result}
    places |= {"OUT": tmp_path / "out", "WIDER": _wider(checkpoints["llama"], tmp_path / "wider")}
    said = dict[str, str]()
    for asked in MISTAKES.splitlines():
        outcome = run_cli("evaluate", *(places.get(word, word) for word in asked.split()))
        assert outcome.status == 2 and outcome.stdout == ""
        *_, said[asked] = outcome.stderr.splitlines()  # behind the progress, if text was begun
        said[asked] = re.sub("fingerprint [0-9a-f]+", "fingerprint ...", said[asked])
        for name, place in reversed(places.items()):
            said[asked] = said[asked].replace(str(place), name)
    assert_sentences("evaluation/refused", said)


def _wider(source: Path, target: Path) -> Path:
    model = AutoModelForCausalLM.from_pretrained(source)
    model.resize_token_embeddings(321, mean_resizing=False)
    return saved(target, model)
