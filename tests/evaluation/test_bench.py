"""Bench: models take turns, every token is timed, and speed-ups are what their definitions say."""

import json
from dataclasses import asdict, astuple, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bpe_tokenizer import bpe_tokenizer
from models import num_params, randomised, saved, tiny_llama
from recipes import grouped
from run_cli import run_cli
from shown import refusal
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM

from secateur.api import prune
from secateur.evaluation.bench import (
    bench,
    decode_rates,
    paired_ratio,
    prefill_rates,
    runner_of,
    seconds_per_token,
    speed,
    take_turns,
)
from secateur.facts import Workload
from secateur.log import silent
from secateur.report.records import BenchResult, Spread
from tests.trims import trimmed_pair

SMALL = Workload(batch=2, prompt_tokens=8, new_tokens=3, repeats=2)


@pytest.fixture(scope="module")
def pair(recipe: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(pruned, dense): a llama, and a result without half of its FFN channels."""
    place = tmp_path_factory.mktemp("pair")
    model = tiny_llama(hidden_size=64, intermediate_size=128)
    dense, pruned = saved(place / "dense", model, bpe_tokenizer()), place / "pruned"
    half = 3 * 3 * 64 * 64 / num_params(model)
    prune(dense, grouped({**recipe, "remove": half, "align": 64}), out=pruned)
    return pruned, dense


def test_models_take_turns_after_one_unmeasured_run_each():
    order: list[str] = []
    reports: list[tuple[str, int, int]] = []

    def runner(name):
        def run():
            order.append(name)
            return [float(len(order))]

        return run

    runs = take_turns([runner("a"), runner("b")], 2, lambda *report: reports.append(report))
    assert "".join(order) == "ab" + "abab"
    assert runs == [[[3.0], [5.0]], [[4.0], [6.0]]]
    assert reports == [("bench", 0, 2), ("bench", 1, 2), ("bench", 2, 2)]


def test_rates_by_hand():
    runs = [[0.5, 0.7, 0.9], [0.25, 0.5, 0.75], [1.0, 1.5, 2.0]]
    assert prefill_rates(runs, SMALL) == [32, 64, 16]  # 2 prompts of 8 tokens
    assert decode_rates(runs, SMALL) == pytest.approx([10, 8, 4])  # 2 tokens of 2 prompts after the first
    found = speed(runs, SMALL)
    assert found.prefill == Spread(median=32.0, lowest=16.0, highest=64.0)
    assert astuple(found.decode) == pytest.approx((8, 4, 10))


def test_seconds_per_token_are_medians_of_a_prompt_and_of_what_is_written(monkeypatch):
    turns = [[[2.0, 2.5, 3.5], [1.0, 5.0, 9.0], [4.0, 4.5, 5.0]]]
    monkeypatch.setattr("secateur.evaluation.bench.take_turns", lambda runners, *_: turns * len(runners))
    model = tiny_llama()
    # A prompt of 7 tokens, then 7; 2 seconds to the first, 1.5 from there to the third.
    assert seconds_per_token([model, model], 14, silent) == [(pytest.approx(2 / 7), pytest.approx(0.75))] * 2


def test_ratios_are_taken_within_each_repeat_and_told_where_1_is_not_in_their_range():
    # A machine that slows down by half between repeats changes no ratio.
    assert paired_ratio([30.0, 15.0], [20.0, 10.0]) == Spread(1.5, 1.5, 1.5)
    told, not_told = [(1.2, 1.1, 1.3), (0.8, 0.7, 0.9)], [(1.2, 0.9, 1.3), (1.2, 1.0, 1.3), (0.9, 0.8, 1.0)]
    assert all(Spread(*ratio).is_told for ratio in told)
    assert not any(Spread(*ratio).is_told for ratio in not_told)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_run_times_every_token_even_where_the_model_would_stop(batch):
    model = tiny_llama()
    model.generation_config.eos_token_id = list(range(320))
    own = model.generation_config
    times = runner_of(model, replace(SMALL, batch=batch, new_tokens=5))()
    assert len(times) == 5 and times == sorted(times) and times[0] > 0
    assert model.generation_config is own


def test_the_command_writes_what_it_shows(pair):
    pruned, dense = pair
    arguments = ("--batch", 2, "--prompt-tokens", 8, "--new-tokens", 3, "--repeats", 2)
    outcome = run_cli("bench", pruned, "--against", dense, *arguments)
    assert outcome.status == 0, outcome.stderr
    result = BenchResult.from_json((pruned / "bench.json").read_text(), "bench.json")
    assert result.workload == SMALL and list(result.models) == ["dense", "pruned"]
    dense, pruned = result.models.values()
    assert dense.size.num_params - pruned.size.num_params == 3 * 3 * 64 * 64
    decode = result.speed_ups["decode"]
    ideal = dense.costs.decode_bytes_per_token / pruned.costs.decode_bytes_per_token
    assert decode.ideal == pytest.approx(ideal) and ideal > 1
    assert f"{ideal:.2f}" in outcome.stdout


def test_a_model_without_a_limit_on_positions_is_timed(tmp_path):
    sizes = {"hidden_size": 48, "lru_width": 48, "intermediate_size": 96, "num_attention_heads": 4, "head_dim": 12}
    config = RecurrentGemmaConfig(**sizes, num_hidden_layers=3, num_key_value_heads=1, vocab_size=320)
    place = saved(tmp_path / "recurrent", randomised(RecurrentGemmaForCausalLM(config), 0))
    assert list(bench(place, **asdict(replace(SMALL, batch=1))).models) == ["model"]


def test_json_and_no_dense_model(pair, monkeypatch):
    asked = list[str | None]()
    monkeypatch.setattr(
        "secateur.evaluation.bench.device_called", lambda name: asked.append(name) or torch.device("cpu")
    )
    outcome = run_cli("bench", pair[0], "--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1, "--json")
    assert outcome.status == 0, outcome.stderr
    shown = json.loads(outcome.stdout)
    assert (list(shown["models"]), shown["speed_ups"], shown["workload"]["repeats"]) == (["model"], {}, 1)
    assert shown["device"] == "cpu" and asked == [None], "the one that all commands take"
    assert json.loads((pair[0] / "bench.json").read_text()) == shown
    assert not list(pair[0].glob(".bench*"))


def test_vocabularies_that_differ_and_one_repeat_are_a_note(pair, tmp_path):
    trimmed = trimmed_pair(tmp_path)
    sizes = {"batch": 1, "prompt_tokens": 4, "new_tokens": 2, "repeats": 2}
    (note,) = bench(trimmed.pruned, trimmed.dense, **sizes).notes
    assert note.startswith(
        f"the vocabularies differ ({trimmed.kept.num_dense} and {len(trimmed.kept.dense_ids)} tokens): "
    )
    assert bench(trimmed.pruned, trimmed.pruned, **sizes).notes == bench(trimmed.pruned, **sizes).notes == ()
    assert bench(*pair, **sizes).notes == ()
    (note,) = bench(*pair, **(sizes | {"repeats": 1})).notes
    assert note.startswith("one repeat has no range")


def test_workloads_that_cannot_run(pair):
    for change, message in (
        ({"batch": 0}, "bench batch: must be at least 1, got 0."),
        ({"new_tokens": 1}, "bench new_tokens: must be at least 2, got 1."),
        ({"prompt_tokens": 400}, "make 403, more than the 256"),
        ({"device": "cuda:99"}, "torch finds no 'cuda:99' here"),
    ):
        assert message in refusal(bench, pair[0], **(asdict(SMALL) | change))
