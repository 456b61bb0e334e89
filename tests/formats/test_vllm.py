"""vLLM runs pruned models and writes transformers' tokens.

Slow; needs `make runtimes RUNTIMES=vllm` first.
"""

import json
import os
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from models import tiny_ids, tiny_llama, tiny_qwen2, written

import secateur
from secateur.methods.depth import remove_layers
from secateur.model.bind import bind, decoder_layers
from secateur.model.per_layer import record_widths
from tests.model.test_families import cut_units, kept_of
from tests.trims import trimmed_pair

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-runtimes" / "vllm" / "bin" / "python"
needs_vllm = pytest.mark.skipif(not PYTHON.exists(), reason="needs vLLM: make runtimes RUNTIMES=vllm")
# vLLM's attention on a CPU has kernels for heads of 32 channels and more.
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "num_layers": 4}
BACKEND = {"model_impl": "transformers"}
Make = Callable[[Path], Any]


def cut(make: Callable[..., Any], place: Path, *, tied: bool, dtype: torch.dtype, shares: dict[str, Any]) -> None:
    """Save a tiny model with a share of each group's units; a list has one share per layer."""
    model = make(tied=tied, **SIZES)
    arch = bind(model)
    for layer, each in enumerate(decoder_layers(model, arch)):
        for name, share in shares.items():
            (group,) = (found for found in arch.select((name,)) if found.layer == layer)
            cut_units(each, group, kept_of(group, share[layer] if isinstance(share, list) else share))
    record_widths(model, arch)
    written(place, model.to(dtype))


def shallow(place: Path) -> None:
    """Save a tiny model without two of its layers."""
    model = tiny_llama(**SIZES)
    remove_layers(model, bind(model), (1, 2))
    written(place, model)


def trimmed(place: Path, *, tied: bool) -> None:
    """Save a tiny model with half of its tokens."""
    trimmed_pair(place.parent / f"{place.name}-pair", tied=tied, **SIZES).pruned.rename(place)


UNEVEN, HEADS = {"ffn": [0.5, 0.25, 0.75, 0.5]}, {"kv_heads": [0.5, 1.0, 0.5, 1.0]}
CASES: dict[str, tuple[Make, dict[str, Any]]] = {}
for family, make in (("llama", tiny_llama), ("qwen2", tiny_qwen2)):
    for tied in (False, True):
        of = partial(partial, cut, make, tied=tied, dtype=torch.float32)
        name = f"{family}-tied" if tied else family
        CASES[f"{name}-uniform"] = of(shares={"ffn": 0.5}), {}
        CASES[f"{name}-widths"] = of(shares=UNEVEN), {}
        CASES[f"{name}-heads"] = of(shares={"kv_heads": 0.5}), {} if family == "llama" else BACKEND
    CASES[f"{family}-layer-heads"] = of(shares=UNEVEN | HEADS), {}
    low = partial(partial, cut, make, tied=False, dtype=torch.bfloat16)
    CASES[f"{family}-bfloat16"] = low(shares={"ffn": 0.5}), {"dtype": "bfloat16"}
    CASES[f"{family}-bfloat16-widths"] = low(shares=UNEVEN), {"dtype": "bfloat16"}
CASES["llama-depth"] = shallow, {}
CASES["llama-vocabulary"] = partial(trimmed, tied=False), {}
CASES["llama-tied-vocabulary"] = partial(trimmed, tied=True), {}


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], list[list[int]], Path]:
    """What vLLM wrote for every case, in one process, the prompts, and the folder of the models."""
    place = tmp_path_factory.mktemp("vllm")
    prompts = tiny_ids(batch=2, length=16, vocab_size=200).tolist()
    for name, (make, _) in CASES.items():
        make(place / name)
    request = {"models": {name: str(place / name) for name in CASES}, "prompts": prompts, "text": prompts[0]}
    request |= {"options": {name: options for name, (_, options) in CASES.items()}}
    request |= {"threads": 1, "repeats": 0, "scratch": str(place / "scratch")}
    (place / "request.json").write_text(json.dumps(request))
    command = [PYTHON, "-P", ROOT / "benchmarks" / "runtime_child.py", "vllm", "request.json", "answer.json"]
    subprocess.run(command, cwd=place, env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=True)
    return json.loads((place / "answer.json").read_text())["models"], prompts, place


@pytest.mark.slow
@needs_vllm
@pytest.mark.parametrize("name", CASES)
def test_vllm_writes_transformers_tokens(name: str, said: tuple[dict[str, Any], list[list[int]], Path]) -> None:
    answers, prompts, place = said
    assert "error" not in answers[name], answers[name]
    model: Any = secateur.load(place / name)
    for prompt, tokens in zip(prompts, answers[name]["tokens"], strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
        # Behind the same context, the token is transformers' own, or as good as it: bfloat16 rounds in another order.
        gaps = logits.max(-1).values - logits.gather(-1, torch.tensor(tokens)[:, None])[:, 0]
        assert len(tokens) > 40 and gaps.max() <= (0.1 if "bfloat16" in name else 0), gaps
