"""All that a recipe and a model's shapes decide before a weight is read: layers, widths, text, memory and disk.

One line for each case, or the sentence that refuses it; and some numbers that are worked out here by hand.
"""

import math
import re
from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pytest
import torch
from bpe_tokenizer import bpe_tokenizer
from models import opened, sizes, tiny_gemma3, tiny_llama
from recipes import grouped
from shown import assert_shown

from secateur.errors import RecipeError, SecateurError
from secateur.facts import Size
from secateur.pruning.cost import disk_bytes, memory_for, with_polish_that_fits
from secateur.pruning.inspect import gguf_files
from secateur.pruning.open import Opened
from secateur.pruning.prepare import foretold
from secateur.pruning.resolve import Resolved, nearest, resolve
from secateur.recipe import parse_recipe
from secateur.stream.device import CPU
from secateur.vocabulary.kept import KeptTokens, Trim
from tests.families import tiny_family

DOMAINS = {"mine": {"files": ["mine.txt"]}, "code": {"files": ["code.py"]}}
FEW = {"num_tokens": 4096, "sequence_length": 32}
HEADS = ["ffn", "kv_heads"]
TOKENIZER = bpe_tokenizer()


def on_meta(**values: Any) -> Any:
    """Return a llama of ten layers, as large as is said, without weights."""
    with torch.device("meta"):
        return type(tiny_llama())(tiny_llama(num_layers=1).config.__class__(**values)).to(torch.bfloat16)


@cache
def model_of(name: str) -> Any:
    if name == "large":
        heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
        large = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10, "vocab_size": 32000}
        return on_meta(**large, **heads)
    if name == "llama":
        return tiny_llama(num_layers=10, num_attention_heads=8, num_key_value_heads=8)
    return tiny_gemma3() if name == "gemma3" else tiny_family(name)


CASES: dict[str, list[dict[str, Any]]] = {
    "llama": [
        {},
        {"remove": 0.001},
        {"remove": 0.4},
        {"remove": 0.5},
        {"remove": 0.65},
        {"remove": 0.95},
        {"remove": 0.4, "depth": 0},
        {"remove": 0.4, "depth": 4},
        {"remove": 0.2, "depth": 4},
        {"remove": 0.3, "depth": 10},
        {"remove": 0.3, "depth": 9, "protected_layers": [0]},
        {"remove": 0.2, "removed_layers": [3, -1]},
        {"removed_layers": [3, 3]},
        {"removed_layers": [10]},
        {"removed_layers": [-11]},
        {"removed_layers": [2], "protected_layers": [-8]},
        {"removed_layers": [2], "depth": 2},
        {"removed_layers": 1},
        {"removed_layers": list(range(10))},
        {"depth": -1},
        {"depth": 5, "remove": 0.5, "protected_layers": [-1]},
        {"remove": 0.65, "preset": "quick"},
        {"remove": 0.65, "preset": "paper"},
        {"protected_layers": [0, -1]},
        {"protected_layers": list(range(10))},
        {"protected_layers": list(range(8)), "remove": 0.3},
        {"groups": HEADS},
        {"groups": ["kv_heads"], "remove": 0.1},
        {"groups": ["query_heads"], "remove": 0.1},
        {"groups": ["fn"]},
        {"groups": ["experts"]},
        {"groups": ["kv_heads", "query_heads"]},
        {"rounds": 3, "remove": 0.4},
        {"rounds": 3, "target_mix": 0.0, "groups": HEADS},
        {"budget": "curve", "remove": 0.5},
        {"budget": "curve", "remove": 0.7},
        {"budget": "curve", "remove": 0.7, "depth": 1},
        {"budget": "curves"},
        {"align": 1},
        {"align": 40},
        {"to": "150K"},
        {"to": "600KB"},
        {"to": "2MB"},
        {"to": "300K"},
        {"to": "20K"},
        {"to": "150K", "groups": ["kv_heads"]},
        {"to": "150K", "budget": "curve"},
        {"compensate": "none"},
        {"compensate": "none", "score": "magnitude", "domain_weighting": "tokens"},
        {"score": "wanda", "domain_weighting": "tokens"},
        {"score": "reap"},
        {"domain_weighting": "minimax"},
        {"damping": 0.5},
        {"calibration": {"num_tokens": 100, "sequence_length": 32}},
        {"calibration": {"num_tokens": 4096, "sequence_length": 100000}},
        {"calibration": {}},
        {"polish": "default"},
        {"polish": {"num_tokens": 999, "train": "full", "batch_tokens": 64}},
        {"polish": {"num_tokens": 999, "train": "lora"}},
        {"polish": {"num_tokens": 999, "gradient_checkpointing": True}},
        {"polish": "default", "compensate": "none"},
        {"polish": "default", "memory_budget": "1GB"},
        {"memory_budget": "4.5MB"},
        {"memory_budget": "10KB"},
        {"compute_dtype": "float32"},
        {"vocabulary": "auto", "groups": ["kv_heads"]},
    ],
    "large": [
        {},
        {"remove": 0.5},
        {"remove": 0.2, "budget": "curve", "rounds": 2},
        {"remove": 0.2, "groups": HEADS, "domain_weighting": "minimax"},
        {"remove": 0.02, "groups": ["kv_heads"], "align": 1, "calibration": {"sequence_length": 32}},
        {"remove": 0.15, "groups": ["kv_heads"], "depth": 1, "calibration": {"sequence_length": 32}},
        {"compute_dtype": "float32"},
        {"memory_budget": "700MB"},
        {"memory_budget": "300MB"},
        {"memory_budget": "300MB", "remove": 0.5, "depth": 1},
        {"polish": "default"},
        {"polish": "default", "calibration": {"sequence_length": 2048}},
        {"polish": "default", "memory_budget": "2.36GB"},
        {"polish": "default", "memory_budget": "690MB"},
        {"polish": {"num_tokens": 10000, "train": "lora"}, "compute_dtype": "float32"},
    ],
    "gemma3": [{"remove": 0.1}, {"target_mix": 0.5}, {"groups": HEADS, "remove": 0.1}],
    "mixtral": [
        {},
        {"remove": 0.5},
        {"remove": 0.9},
        {"to": "700KB"},
        {"groups": ["expert_ffn"]},
        {"groups": ["experts", "expert_ffn"]},
        {"groups": ["experts", "kv_heads"]},
        {"score": "reap"},
        {"score": "reap", "groups": ["experts", "kv_heads"]},
        {"score": "wanda"},
        {"domain_weighting": "minimax"},
        {"budget": "curve"},
        {"remove": 0.5, "rounds": 2, "polish": "default"},
    ],
    "qwen2_moe-mixed": [{}, {"groups": ["ffn"], "remove": 0.05}, {"groups": ["shared", "experts"], "remove": 0.3}],
    "deepseek_v3": [{}, {"remove": 0.4}, {"groups": ["kv_heads"]}],
    "gpt2": [{"remove": 0.1}],
    "qwen2_vl": [{"remove": 0.1}, {"budget": "curve"}, {"protected_layers": [0]}],
}


def shortly(counts: dict[Any, int]) -> str:
    """Return the units that stay, of layers alike once."""
    groups: dict[str, list[int]] = {}
    for (_, name), count in counts.items():
        groups.setdefault(name, []).append(count)
    return "; ".join(f"{name} {each[0] if len(set(each)) == 1 else each}" for name, each in groups.items())


def planned(found: Opened) -> str:
    """Return what the run would be, in numbers."""
    run = with_polish_that_fits(found, resolve(found))
    plan = memory_for(found, run)
    files, problem = gguf_files(found, run)
    files.pop("q8_0", None)
    told = {
        "share": f"{run.recipe.remove.share:.6g}",
        "after": run.plans[-1].cost_after,
        "layers": f"{len(run.layers)} of {run.arch.num_layers}, the last {run.layers[-1]}",
        "align": run.align,
        "rounds": " then ".join(shortly(dict(each.num_keep)) for each in run.plans),
        "gone": [round(each, 5) for each in run.removals],
        "least": shortly(run.least_keep),
        "largest": round(run.largest, 5),
        "text": (run.num_tokens, run.sequence_length, run.recipe.polish.num_tokens),
        "fit": (run.damping, run.target_mix),
        "training": run.recipe.polish.model_dump(exclude_defaults=True),
        "memory": list(asdict(plan.estimate).values()),
        "peak": (plan.estimate.peak, plan.estimate.is_of_layer_choice),
        "where": (plan.weights_on_disk, plan.one_layer_at_a_time, plan.budget_bytes, plan.in_float32),
        "disk": disk_bytes(found, run, plan),
        "files": (files, problem),
        "nearest": f"{nearest(found).recipe.remove.share:.6g}",
        "says": foretold(found, run, plan, "removes", 1),
        "of three": foretold(found, run, plan, "foretells", 3).rpartition(";")[2],
    }
    return "\n".join([f"    {key}: {value}" for key, value in told.items()] + [f"    {each}" for each in run.warnings])


def shown_plan(name: str, short: dict[str, Any], gone: int = 0, device: torch.device = CPU) -> str:
    """Return the plan after so many tokens are gone, or the sentence that refuses it."""
    recipe = {"align": None if name == "large" else 8, "calibration": FEW, **short}
    recipe["calibration"] = {"domains": DOMAINS, **recipe["calibration"]}
    try:
        found = replace(opened(model_of(name), parse_recipe(grouped(recipe))), tokenizer=TOKENIZER, device=device)
        if gone:
            num_rows = found.model.config.vocab_size
            kept = KeptTokens(tuple(range(num_rows - gone)), num_rows)
            found = replace(found, trim=Trim(kept, TOKENIZER, TOKENIZER))
        return planned(found)
    except SecateurError as error:
        return f"    refused: {error}"


@pytest.fixture(autouse=True)
def any_processor(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plan as on a processor that multiplies bfloat16 itself."""
    for module in ("pruning.open", "recovery.weights"):
        monkeypatch.setattr(f"secateur.{module}.multiplies_in_software", lambda *_: False)


@pytest.mark.parametrize("name", CASES)
def test_what_a_recipe_decides_for_a_model(name: str) -> None:
    assert_shown(f"plans/{name}", "\n".join(f"{short}\n{shown_plan(name, short)}" for short in CASES[name]))


def test_what_it_decides_once_tokens_are_gone() -> None:
    cases = [{}, {"remove": 0.02}, {"remove": 0.5}, {"remove": 0.3, "depth": 1}, {"groups": [], "vocabulary": 192}]
    cases += [{"polish": {"num_tokens": 4096, "train": train}} for train in ("full", "layers")]
    lines = [f"{short}\n{shown_plan('llama', {'vocabulary': 192, **short}, 128)}" for short in cases]
    assert_shown("plans/fewer-tokens", "\n".join(lines))


def test_what_it_trains_where_memory_is_just_enough_or_too_little_and_without_peft(monkeypatch) -> None:
    # Just enough for all of it, for one block at a time, and for low-rank additions; and a kilobyte less.
    budgets = ("2362052.608", "2362051.608", "2332315.648", "2332314.648", "755585.024", "755584.024")
    cases = [{"polish": "default", "memory_budget": f"{budget}KB"} for budget in budgets]
    lines = [f"{short}\n{shown_training(short)}" for short in cases]
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    lines += [f"{short} without peft\n{shown_training(short)}" for short in cases[2:5]]
    assert_shown("plans/training", "\n".join(lines))


def shown_training(short: dict[str, Any]) -> str:
    """Return what the plan says of the training and its memory."""
    lines = shown_plan("large", short).splitlines()
    return "\n".join(line for line in lines if line.lstrip().startswith(("training", "memory", "polish")))


def test_what_it_decides_on_a_gpu() -> None:
    cases = [{}, {"device_budget": "100MB"}, {"device_budget": "500MB", "polish": "default"}]
    cases += [{"polish": {"num_tokens": 4096, "train": train}} for train in ("layers", "lora")]
    gpu = torch.device("cuda")
    assert_shown("plans/on-gpu", "\n".join(f"{short}\n{shown_plan('large', short, device=gpu)}" for short in cases))


WIDTH = 112  # of an FFN of the tiny models


def resolved(model: Any = None, **short: Any) -> Resolved:
    """Resolve a recipe in short for a tiny llama of three layers, or for `model`."""
    asked = {"align": 8, "calibration": FEW, **short}
    asked["calibration"] = {"domains": {"mine": {"files": ["mine.txt"]}}, **asked["calibration"]}
    return resolve(opened(model or tiny_llama(), parse_recipe(grouped(asked))))


def test_layers_that_take_the_share_alone_leave_the_widths_whole():
    model = tiny_llama(num_layers=6)
    per_layer = sum(parameter.numel() for parameter in model.model.layers[0].parameters())
    share = 2 * per_layer / Size.of(model).num_params
    found = resolved(model, remove=share, depth=2, rounds=2, budget="curve")
    assert found.removals == (0.0,) and set(found.plans[0].num_keep.values()) == {WIDTH}
    assert found.recipe.choose.rounds == 1
    # One step of the least kind more or less is the widths' to give.
    step = 4 * 8 * 3 * 48 / Size.of(model).num_params
    assert resolved(model, remove=share + 0.4 * step, depth=2).removals == (0.0,)
    assert resolved(model, remove=share + 0.6 * step, depth=2).removals[0] > 0
    assert resolved(model, remove=share - 0.4 * step, depth=2).removals == (0.0,)
    said = r"remove\.depth: 2 layers .* use depth 1 at most, or remove at least"
    with pytest.raises(RecipeError, match=said) as caught:
        resolved(model, remove=share - 0.6 * step, depth=2)
    assert f"at least {math.ceil(1e4 * share) / 1e4:.4f}." in str(caught.value)


def test_the_least_share_that_is_named_can_be_where_heads_are_coarse():
    """Of four KV heads three cannot stay, so the least step is two."""
    model = on_meta(**sizes() | {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 4})
    with pytest.raises(RecipeError, match=r"nothing would go; .*or name a group of smaller units\.") as caught:
        resolved(model, remove=0.01, groups=["kv_heads"])
    named = re.search(r"at least (0\.\d+)", str(caught.value))
    assert named is not None
    found = resolved(model, remove=float(named[1]), groups=["kv_heads"])
    assert set(found.plans[0].num_keep.values()) == {2}


@pytest.mark.parametrize("budget", ["uniform", "curve"])
def test_the_largest_share_that_is_named_can_be_with_the_layers_that_then_go(budget):
    """More to remove lets more layers go by default: each share has its own limit, and theirs is named."""
    asked = {"align": 16, "budget": budget, "calibration": {"sequence_length": 32}}
    model = on_meta(**sizes(num_layers=30) | {"intermediate_size": 1536})
    with pytest.raises(RecipeError, match=r"out of reach") as caught:
        resolved(model, remove=0.998, **asked)
    named = re.search(r"at most (0\.\d+) with", str(caught.value))
    assert named is not None
    largest = float(named[1])
    found = resolved(model, remove=largest, **asked)
    assert 0 < found.depth < 29 and abs(found.largest - largest) < 0.002
    with pytest.raises(RecipeError, match=r"out of reach"):
        resolved(model, remove=largest + 0.01, **asked)


def test_text_without_general_prose_is_noted():
    def notes(domains: dict[str, Any]) -> list[str]:
        calibration = {"num_tokens": 4096, "sequence_length": 32, "domains": domains}
        return [each for each in resolved(calibration=calibration).warnings if "general prose" in each]

    [note] = notes({"code": {"installed": "code"}, "talk": {"installed": "dialogue"}, "self": {"answers": True}})
    assert note.startswith("calibration.domains: no general prose that people wrote, so text unlike these domains")
    for prose in ({"installed": "web"}, {"installed": "multilingual"}, {"files": ["mine.txt"]}, {"dataset": "a/b"}):
        assert not notes({"code": {"installed": "code"}, "other": prose})


def test_a_damping_that_few_tokens_raise_is_not_raised_again():
    found = resolved(calibration={"num_tokens": 320, "sequence_length": 32})
    assert found.recipe.repair.damping == pytest.approx(1e-3 * 10 * WIDTH / 320)
    assert resolve(opened(tiny_llama(), found.recipe)).recipe == found.recipe
