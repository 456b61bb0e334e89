"""Measuring: what is foretold rests on models that were cut and judged, and holds for those that `prune` writes."""

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from models import saved, tiny_llama
from recipes import grouped
from run_cli import run_cli
from shown import assert_sentences, refusal
from stops import stopped_again_and_again
from tiny_tokenizer import tiny_tokenizer

import secateur
from secateur.errors import CheckpointError
from secateur.evaluation.measure import COPIES, PROBES, _band, _opened
from secateur.log import human_bytes
from secateur.pruning.cost import walk_seconds
from secateur.pruning.resolve import resolve
from secateur.pruning.run import Supports, keep_statistics
from secateur.recipe import as_recipe
from secateur.report.page import render
from secateur.report.records import LEAST_NATS, Measurement, SizeCost, nats_at
from secateur.report.report import marked, measurement_page
from secateur.store import Store
from secateur.stream.statistics import NUM_BLOCKS, Statistics
from tests.families import tiny_family

pytestmark = pytest.mark.usefixtures("unproved")


@pytest.fixture(scope="module")
def measured(checkpoints, recipe, tmp_path_factory) -> tuple[Measurement, Path]:
    out = tmp_path_factory.mktemp("measured") / "out"
    return secateur.measure(checkpoints["llama"], grouped({**recipe, "budget": "curve"}), out=out), out


@pytest.fixture(scope="module")
def even(checkpoints, recipe, tmp_path_factory) -> tuple[Measurement, Path]:
    """Of equal widths."""
    out = tmp_path_factory.mktemp("even") / "out"
    return secateur.measure(checkpoints["llama"], grouped(recipe), out=out), out


@pytest.mark.parametrize("number", range(len(PROBES)))
def test_a_size_that_was_measured_is_cut_as_by_a_run_of_its_own_and_loses_what_that_loses(
    number, even, checkpoints, recipe
):
    """Bit for bit, and no calibration text goes through a layer."""
    (record, out), model = even, checkpoints["llama"]
    assert len(record.probes) == len(record.pace) == len(PROBES)
    assert all(0 < seconds < 60 for seconds in record.pace[number])
    probe = record.probes[number]
    with patch("secateur.stream.statistics.Statistics.update", side_effect=AssertionError("measured already")):
        made = secateur.prune(model, {"remove": probe.removed, "polish": False}, from_=out)
    alone = secateur.prune(model, grouped({**recipe, "remove": probe.removed, "depth": 0, "polish": False}))
    assert all((made.model.state_dict()[name] == tensor).all() for name, tensor in alone.model.state_dict().items())
    summary = alone.summary
    assert made.summary.dense_losses == summary.dense_losses
    assert summary.pruned_size.num_params == probe.num_params
    for name, before in summary.dense_losses.items():
        assert probe.lost[name] == summary.pruned_losses[name].nats_per_token - before.nats_per_token
    dense, pruned = summary.other_text
    assert probe.lost["other text"] == pruned.nats_per_token - dense.nats_per_token


def test_sizes_are_told_of_the_whole_model_and_the_record_is_that_on_disk(measured, checkpoints, recipe):
    record, out = measured
    assert Measurement.from_json((out / "result.json").read_text(), "x") == record
    assert set(record.files) >= {"recipe.yaml", "probe-0/run.jsonl", "result.json"}
    assert [cost.removed for cost in record.sizes] == pytest.approx(
        [1 - cost.num_params / record.dense_size.num_params for cost in record.sizes], rel=1e-12
    )
    page = measurement_page(record)
    chart = page.sections[0].chart
    assert page.verdict.startswith("Hardly noticed up to ") and page.verdict.endswith("%.")
    assert all(f"{name} {100 * share:.1f}%</text>" in render(page) for name, share in marked(record).items())
    assert chart is not None and set(chart.lines) == {"own answers", "other text", "mean of domains"}
    largest = record.sizes[-1]
    asked = grouped({**recipe, "remove": largest.removed, "depth": 0, "budget": "uniform"})
    assert secateur.inspect(checkpoints["llama"], asked).num_params_after == largest.num_params


def test_a_plan_by_what_was_measured_is_that_of_a_run(measured, checkpoints, recipe):
    """With slopes of the same cut; else by those of the measured one."""
    record, out = measured
    middle = record.probes[1].removed
    asked = {**recipe, "budget": "curve", "remove": middle, "depth": 0}
    with patch("secateur.pruning.loop.profile", side_effect=AssertionError("measured already")):
        planned = secateur.prune(checkpoints["llama"], {"remove": middle}, from_=out)
    alone = secateur.prune(checkpoints["llama"], grouped(asked))
    assert planned.summary.widths == alone.summary.widths


def test_statistics_between_two_cuts_are_their_mixture(tmp_path):
    def empty() -> Statistics:
        return Statistics.empty(4, torch.device("cpu"), gram=True, drift_size=2, dtype=torch.float32)

    stores, parts = {share: Store(tmp_path / f"{share}") for share in (0.1, 0.5, 0.6)}, list[Statistics]()
    for energy, store in enumerate(stores.values(), start=1):
        part, tensors = empty(), dict[str, torch.Tensor]()
        part.update(torch.randn(9, 4), torch.randn(9, 2), torch.randn(9, 2))
        assert keep_statistics(tensors, part, {"a": 1.0 * energy}) == {"a": energy}
        store.directory.mkdir()
        store.save("step", tensors, {"output_energy": {"a": 1.0 * energy}})
        parts.append(part)
    between = math.log((1 - 0.1 / 0.7) / (1 - 0.2 / 0.7)) / math.log((1 - 0.1 / 0.7) / (1 - 0.5 / 0.7))
    for share, first, weight in ((0.2, 0, between**2), (0.1, 0, 0.0), (0.05, 0, 0.0), (0.5, 1, 0.0), (0.65, 1, 1.0)):
        mixed = empty()
        energies = Supports(stores, units=0.7).mix("step", share, mixed, {"a": 0.0})
        assert energies == pytest.approx({"a": 1 + first + weight}) and mixed.mass == pytest.approx(9.0)
        for mine, before, after in zip(mixed.sums, parts[first].sums, parts[first + 1].sums, strict=True):
            torch.testing.assert_close(mine, torch.lerp(before, after, weight))
    with pytest.raises(CheckpointError, match=r"0\.1: lacks round-1-layer-0-ffn; measure again\.$"):
        Supports(stores, units=0.7).mix("round-1-layer-0-ffn", 0.2, empty(), {})


def test_another_model_text_version_or_key_is_refused(measured, checkpoints, texts, tmp_path, monkeypatch):
    _, out = measured

    def refused(changes: dict[str, Any] = {}, model: str = "llama", from_: Path = out) -> str:  # noqa: B006
        return refusal(secateur.prune, checkpoints[model], changes, from_=from_)

    said = {"another model": refused(model="qwen2")}
    monkeypatch.setattr("secateur.pruning.sizes.versions", lambda: {"secateur": "9.9"})
    said["another version"] = refused().replace(secateur.__version__, "0.0")
    monkeypatch.undo()
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "result.json").write_text((out / "result.json").read_text().replace('"band"', '"bond"'))
    said["a record that was changed"] = refused(from_=tmp_path / "damaged")
    before = texts["prose"].read_text(encoding="utf-8")
    try:
        texts["prose"].write_text(before.replace("the", "a"), encoding="utf-8")
        said["another text"] = refused()
    finally:
        texts["prose"].write_text(before, encoding="utf-8")
    for group, key, value in (
        ("calibration", "num_tokens", 640),
        ("choose", "score", "wanda"),
        ("remove", "vocabulary", 64),
        ("output", "evaluate", 64),
    ):
        said[f"another {key}"] = refused({group: {key: value}})
    assert_sentences("measure/other", said, out, tmp_path)


def test_a_damaged_measurement_is_refused_and_left(even, checkpoints, tmp_path):
    damaged = shutil.copytree(even[1], tmp_path / "damaged")
    file = next((damaged / "steps" / "probe-1").glob("round-1-*.safetensors"))
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(
        CheckpointError, match=rf"^from {damaged}: steps/probe-1/{file.name} was changed since; measure again"
    ):
        secateur.prune(checkpoints["llama"], {}, from_=damaged)
    assert file.read_bytes() == raw
    # What people lay beside it is theirs.
    whole = shutil.copytree(even[1], tmp_path / "whole")
    (whole / "notes.txt").write_text("mine")
    assert secateur.prune(checkpoints["llama"], {"polish": False}, from_=whole).summary.remove_reached > 0


def test_answers_and_a_long_polish_belong_to_the_same_measurement(tmp_path):
    """They are written anew, and differ with how many are asked for; the text that they stand beside does not."""
    (tmp_path / "a.txt").write_text("".join(f"line {number}\n" for number in range(2000)))
    chats = [[{"role": "user", "content": f"a{number}"}, {"role": "assistant", "content": "x"}] for number in range(60)]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    files = {
        "chat": {"files": str(tmp_path / "chat.jsonl"), "answers": True},
        "lines": {"files": str(tmp_path / "a.txt")},
    }
    saved(tmp_path / "model", tiny_llama())
    asked = grouped({"align": 8, "calibration": {"num_tokens": 1152, "sequence_length": 32, "domains": files}})
    secateur.measure(tmp_path / "model", asked, out=tmp_path / "sizes")
    polish = {"num_tokens": 2304, "batch_tokens": 64}
    result = secateur.prune(tmp_path / "model", {"polish": polish}, from_=tmp_path / "sizes")
    assert result.summary.polish is not None and result.summary.polish.training.num_tokens == 2304
    # A limit is on what the model answers, where it learns by answers.
    result = secateur.prune(tmp_path / "model", {"polish": False}, from_=tmp_path / "sizes", max_loss=9.0)
    assert any("held-out text (chat), of 9 that it may" in note for note in result.summary.warnings)
    assert result.summary.widths["ffn"][1:] == (8, 8)  # all that can go


def test_the_default_text_of_a_chat_model_is_that_of_its_measurement(tmp_path):
    """Half of it answers, which a recipe that names its domains would not get by itself."""
    (tmp_path / "a.txt").write_text("".join(f"line {number}\n" for number in range(9000)))
    lines = {"lines": {"files": str(tmp_path / "a.txt")}}
    asked = as_recipe(grouped({"align": 8, "calibration": {"num_tokens": 1152, "domains": lines}}))
    asked.calibration.model_fields_set.discard("domains")
    saved(tmp_path / "model", tiny_llama(max_position_embeddings=256))
    secateur.measure(tmp_path / "model", asked, out=tmp_path / "sizes")
    result = secateur.prune(tmp_path / "model", {"remove": 0.1, "polish": False}, from_=tmp_path / "sizes")
    assert set(result.summary.calibration.num_tokens) == {"lines", "answers"}


def test_a_measurement_that_was_stopped_ends_as_one_that_was_not(measured, checkpoints, recipe, tmp_path):
    _, whole = measured
    out, asked = tmp_path / "out", grouped({**recipe, "budget": "curve"})
    stopped_again_and_again(lambda: secateur.measure(checkpoints["llama"], asked, out=out), out, first=3, more=2)
    again = json.loads((out / "result.json").read_text())
    first = json.loads((whole / "result.json").read_text())
    of_the_clock = ("seconds", "pace", "files")
    assert {k: v for k, v in again.items() if k not in of_the_clock} == {
        k: v for k, v in first.items() if k not in of_the_clock
    }
    mine, other = (
        {name: digest for name, digest in record["files"].items() if re.match(r"steps/probe-.*\.safetensors$", name)}
        for record in (again, first)
    )
    assert mine == other and len(mine) == 3 * 3  # cuts, layers


def test_the_band_is_how_far_off_the_middle_probe_is_foretold_by_the_others():
    """One domain to the digit, one by half; what lost next to nothing says nothing."""

    def probe(removed: float, factor: float) -> SizeCost:
        nats = -math.log1p(-removed)
        return SizeCost(removed, 1, {"exact": nats, "half": factor * nats, "noise": LEAST_NATS / 10})

    assert _band([probe(0.2, 1), probe(0.4, 2), probe(0.6, 1)], 1.0) == pytest.approx((0 + 0.5) / 2)


def test_a_config_alone_says_what_measuring_takes(checkpoints, recipe, recipe_file, tmp_path):
    (tmp_path / "config").mkdir()
    for file in checkpoints["llama"].iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, tmp_path / "config")
    told: list[str] = []
    secateur.measure(checkpoints["llama"], grouped(recipe), out=tmp_path / "out", tell=told.append)
    does = told[0].replace(str(checkpoints["llama"]), "")
    said = secateur.foretell_measure(tmp_path / "config", grouped(recipe))
    assert said.startswith(str(tmp_path / "config")) and does in said
    # The readers of three copies, in float32, half of their Gram matrices and the drift's sums, and no result.
    sums = round(112 * 112 * (1 + 1 / NUM_BLOCKS) / 2) + 112 * 48
    assert f"It takes {human_bytes(3 * 3 * (112 * 48 + sums) * 4)} of disk" in said
    kept = sum(file.stat().st_size for file in (tmp_path / "out" / "steps").rglob("round-*.safetensors"))
    assert 0.85 < kept / (3 * 3 * (112 * 48 + sums) * 4) < 1.05  # readers are cut; sums by channel, what begins a file
    hours, minutes, seconds = said.split("about ")[1].split(" here")[0].split(":")
    assert 0 <= int(hours) * 3600 + int(minutes) * 60 + int(seconds) < 600
    run = run_cli("measure", tmp_path / "config", tmp_path / "no", "--recipe", recipe_file, "--dry-run")
    assert (
        run.status == 0
        and does.split(" prose")[0] in run.stdout.replace("code, prose", "prose, code")
        and not (tmp_path / "no").exists()
    )


def test_more_tokens_and_wider_models_take_longer(checkpoints, recipe):
    def seconds(**asked: Any) -> float:
        opened = _opened(checkpoints["llama"], as_recipe(grouped({**recipe, **asked})), weights=False)
        with patch("torch.utils.benchmark.Timer") as timer:
            timer.return_value.timeit.return_value.median = 1024**3
            return walk_seconds(opened, resolve(opened), COPIES)

    # Products in all: of the stream and three copies, of Gram matrices, and of what is solved.
    num_tokens, in_layers, width = 1280 * 10 / 9, 3 * 23_136, 112
    by_hand = num_tokens * in_layers * (1 + 3 * 1.7) + 3 * 3 * width**2 * (num_tokens + 9 * width)
    assert seconds() == pytest.approx(by_hand)


def test_what_cannot_be_measured_is_refused_before_it_is_read(checkpoints, recipe, tmp_path):
    shape = tiny_llama(vocab_size=8192, hidden_size=16, intermediate_size=256, num_layers=1)
    saved(tmp_path / "wide", shape)
    (tmp_path / "wide" / "model.safetensors").unlink()
    short, said = {"calibration": {"num_tokens": 512}}, dict[str, str]()
    said["a model of words"] = refusal(secateur.foretell_measure, tmp_path / "wide", short)
    changes = {"depth": 1, "remove": 0.3, "rounds": 2, "memory_budget": "1GB", "align": 64}
    for key, value in changes.items():
        asked = grouped({**recipe, key: value})
        said[key] = refusal(secateur.measure, checkpoints["llama"], asked, out=tmp_path / "out")
    for align in (28, 64):
        asked = grouped({**recipe, "align": align})
        said[f"foretold, align {align}"] = refusal(secateur.foretell_measure, checkpoints["llama"], asked)
    assert [file.name for file in tmp_path.iterdir()] == ["wide"]
    assert_sentences("measure/refused", said, tmp_path, checkpoints["llama"])


def kept(share: float) -> float:
    """Return the share of all parameters that goes where so much of the units, half of all, stays."""
    return 0.5 * (1 - share)


PROBED = tuple(SizeCost(kept(share), 1, {"x": nats}) for share, nats in ((0.8, 0.2), (0.64, 0.8), (0.4096, 1.6)))


@pytest.mark.parametrize(
    ("left", "nats"),
    [(1.0, 0.0), (0.8, 0.2), (0.64, 0.8), (0.512, 1.2), (0.4096, 1.6), (0.32768, 2.0), (0.894427191, 0.05)],
)
def test_a_loss_between_two_sizes_is_a_power_of_how_often_a_part_of_the_rest_went(left, nats):
    """A fifth of what is left goes each time: twice as often costs four times as much at first, then twice."""
    assert nats_at(PROBED, "x", kept(left), 0.5) == pytest.approx(nats)


def test_the_command_prints_sizes_and_marks_and_prune_takes_them(checkpoints, recipe_file, tmp_path):
    sizes, family = tmp_path / "sizes", tmp_path / "family"
    run = run_cli("measure", checkpoints["llama"], sizes, "--recipe", recipe_file)
    assert "llama: foretells what it costs to remove up to" in run.stderr
    assert run.status == 0 and max(map(len, run.stdout.splitlines()[:-1])) <= 80
    for said in ("own answers", "mean of domains", "q4_k_m", "hardly noticed", f"Written to {sizes}: result.json"):
        assert said in run.stdout
    assert "<svg" in (sizes / "report.html").read_text()
    asked = ("--from", sizes, "--set", "polish=false")
    run = run_cli("prune", checkpoints["llama"], family, "--remove", "0.1,0.2", *asked)
    assert run.status == 0 and sorted(path.name for path in family.iterdir()) == ["10", "20"]
    assert run.stdout.count("removed (asked") == 2
    run = run_cli("prune", checkpoints["llama"], tmp_path / "one", "--to", "90K", *asked)
    assert run.status == 0 and secateur.load(tmp_path / "one").num_parameters() <= 90_000
    said = dict[str, str]()
    for model, options in (
        ("llama", ("--remove", "0.1,x", *asked)),
        ("llama", ("--remove", "0.1,2", *asked)),
        ("llama", ("--remove", "0.1,0.9", *asked)),
        ("llama", ("--from", family / "10")),
        ("llama", ("--remove", "0.2", "--from", tmp_path)),
        ("qwen2", ("--remove", "0.2", *asked)),
    ):
        run = run_cli("prune", checkpoints[model], tmp_path / "no", *options)
        assert (run.status, run.stderr.count("\n")) == (2, 1) and not (tmp_path / "no").exists()
        said[f"{model} {' '.join(map(str, options))}"] = run.stderr.strip()
    assert_sentences("measure/commands", said, tmp_path, checkpoints["llama"])


def test_a_page_says_how_to_cut_by_the_same_measurement_again(even, checkpoints, tmp_path):
    _, sizes = even
    first, again = tmp_path / "first", tmp_path / "again"
    secateur.prune(checkpoints["llama"], {"remove": 0.12, "polish": False}, from_=sizes, out=first)
    assert f"OUT --from {sizes.name} --recipe recipe.yaml" in (first / "report.html").read_text(encoding="utf-8")
    secateur.prune(checkpoints["llama"], first / "recipe.yaml", from_=sizes, out=again)
    assert (first / "model.safetensors").read_bytes() == (again / "model.safetensors").read_bytes()


def test_a_measurement_is_whole_without_a_model_and_is_not_pushed(even):
    _, out = even
    verified = secateur.verify(out)
    assert verified.num_files > 2 and (verified.mismatches, verified.max_abs_difference) == ((), None)
    with pytest.raises(CheckpointError, match=r"has no config\.json, so it is no model"):
        secateur.push(out, "me/sizes", dry_run=True)


def test_sizes_of_which_nothing_would_go_have_no_row(recipe, tmp_path):
    """Half of an expert in each layer is more than 5% of the model."""
    model = saved(tmp_path / "model", tiny_family("mixtral"), tiny_tokenizer())
    record = secateur.measure(model, grouped(recipe), out=tmp_path / "out")
    assert record.sizes[0].removed > 0.05 and record.sizes[0].num_params < record.dense_size.num_params


def test_no_size_is_too_far_if_none_loses_so_much(even):
    record, _ = even
    probes = [replace(probe, lost=dict.fromkeys(probe.lost, 0.4)) for probe in record.probes]
    largest = int(1000 * record.sizes[-1].removed) / 1000
    assert marked(replace(record, probes=tuple(probes))) == {"hardly noticed": 0.0, "with a polish": largest}
