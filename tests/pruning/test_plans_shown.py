"""All that a recipe and a model's shapes decide before a weight is read: layers, widths, text, memory and disk.

One line for each case, or the sentence that refuses it; `test_resolve` has the formulas.
"""

from dataclasses import asdict, replace
from functools import cache
from typing import Any

import pytest
import torch
from bpe_tokenizer import bpe_tokenizer
from models import opened, tiny_gemma3, tiny_llama
from recipes import grouped
from shown import assert_shown

from secateur.errors import SecateurError
from secateur.pruning.cost import disk_bytes, memory_for, with_polish_that_fits
from secateur.pruning.inspect import gguf_files
from secateur.pruning.open import Opened
from secateur.pruning.prepare import foretold
from secateur.pruning.resolve import nearest, resolve
from secateur.recipe import parse_recipe
from secateur.stream.device import CPU
from secateur.vocabulary.kept import KeptTokens, Trim
from tests.families import tiny_family

DOMAINS = {"mine": {"files": ["mine.txt"]}, "code": {"files": ["code.py"]}}
FEW = {"num_tokens": 4096, "sequence_length": 32}
HEADS = ["ffn", "kv_heads"]
TOKENIZER = bpe_tokenizer()


def on_meta(**sizes: Any) -> Any:
    """Return a llama of ten layers, as large as is said, without weights."""
    with torch.device("meta"):
        return type(tiny_llama())(tiny_llama(num_layers=1).config.__class__(**sizes)).to(torch.bfloat16)


@cache
def model_of(name: str) -> Any:
    if name == "large":
        heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
        sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 10, "vocab_size": 32000}
        return on_meta(**sizes, **heads)
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
